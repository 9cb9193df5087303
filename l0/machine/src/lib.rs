//! The PC that L1 sees: its buses and devices, ACPI tables, and the loading of
//! images and kernels into its memory.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod image;
pub mod iommu;
pub mod pc;
pub mod pci;

pub use pc::{Pc, PcConfig, PcError};
