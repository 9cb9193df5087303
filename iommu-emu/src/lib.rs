//! Intel VT-d as L1 sees it: DMA remapping, interrupt remapping and interrupt posting, behind the register
//! file that Linux's `intel_iommu` driver programs.
//!
//! Pure logic over L1's memory, which is reached through [`IoMemory`]: no devices, no I/O.
//!
//! - [`Iommu::read`] and [`Iommu::write`]: the registers.
//! - [`Iommu::translate`]: one access of a device, IOVA → L1 physical → machine memory, through the caches.
//! - [`Iommu::remap`]: one interrupt message of a device or an I/O APIC.
//! - [`Iommu::advance`]: what commands and the invalidation queue still have to do, a bounded piece at a time.
//! - [`Dmar`]: the ACPI table that tells L1 of it all.
//!
//! Sections are those of the *Intel Virtualization Technology for Directed I/O Architecture Specification*,
//! revision 3.0 (document D51397-010). From revision 4.0 on, chapter 10 (registers) is chapter 11.
//!
//! # Not supported
//!
//! Scalable mode, PASIDs, first-level translation, nesting, page requests, device TLBs, 5-level
//! tables, accessed and dirty flags in second-level tables, advanced fault logging, protected memory
//! regions. CAP_REG and ECAP_REG say so, and what would ask for them is a fault or an error as the
//! specification has it.

mod cache;
mod commands;
mod dmar;
mod faults;
mod interrupts;
mod iommu;
mod memory_access;
mod posting;
mod queue;
mod registers;
pub mod spec;
mod walk;

pub use dmar::{DeviceScope, Dmar, Drhd, ScopeKind};
pub use faults::Fault;
pub use interrupts::{Delivery, InterruptRequest, Message, Remapped};
pub use iommu::Iommu;
pub use iommu::{Access, AddressType, Blocked, Config, Iova, Progress, Stats, Translation};
pub use memory_access::IoMemory;
pub use walk::Rights;
