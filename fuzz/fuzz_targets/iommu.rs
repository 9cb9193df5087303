//! See `tests::fuzz::iommu`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::iommu(data));
