//! Reading images: disks, kernels and what is on an EFI system partition.
