//! EPT walking, and the composition of EPT12 (L1's tables for L2) with EPT01 (L0's for L1)
//! into one multi-dimensional EPT02 that the engine walks.
//!
//! Pure logic over page tables: no engine, no I/O. The tables are reached through
//! [`TableMemory`], so everything here can be tested with generated ones.
//!
//! - [`walk`]: what the processor does with a guest-physical address (SDM Vol. 3C §29.3).
//! - [`compose`]: EPT12, then EPT01; the mapping that EPT02 gets, or whose fault it is.
//! - [`Ept02`]: the composed tables in hardware format, built on demand, bounded, kept
//!   right by INVEPT or by write-protecting EPT12's pages.
//!
//! # An L1 that does not use EPT (shadow-on-EPT)
//!
//! Where VMCS12 has "enable EPT" at 0, L2 has no guest-physical addresses of its own: its
//! CR3 points to page tables that L1 keeps in its own memory (its shadow tables), and the
//! addresses in them are L1-physical. So there is nothing to compose: VMCS02 runs with
//! EPT01's own EPTP, and none of this crate's EPT02 is in use. EPT violations are then L0's, as for
//! L1 itself.
//!
//! # Not supported
//!
//! 5-level EPT, #VE and sub-page permissions, guest-paging verification, supervisor
//! shadow stacks: their controls are not offered to L1.

mod access;
mod compose;
mod entry;
mod ept02;
mod misconfiguration;
mod sync;
mod tables;
mod walk;

pub use access::Access;
pub use compose::{Composed, Ept01View, Fault, L0Fault, L1Map, compose};
pub use entry::{Entry, Level, MemoryType, Rights};
pub use ept02::{Ept02, Ept02Error, Filled, Flush, MIN_PAGES, Root, RootKey, Stats};
pub use misconfiguration::{Format, Misconfiguration};
pub use sync::ProtectionChanges;
pub use tables::{PhysicalAddress, TableMemory};
pub use walk::{DirtyLog, Leaf, NoLog, Pml, Step, WalkError, walk};
