//! Machine (host-physical) memory: one sparse mapping, the address types of every
//! level, and the pool of pages that L0 keeps for itself.
//!
//! Not supported: growing or shrinking after creation, huge host pages by request,
//! sharing with another process.

mod addr;
pub mod dma;
mod l1ram;
mod machine;
mod pool;

pub use addr::{BusAddress, Gpa, L1Gpa, L2Gpa, MachineAddr, PAGE_SHIFT, PAGE_SIZE};
pub use l1ram::{L1Ram, RamLayout, RamRegion};
pub use machine::{CodeWatcher, MachineMemory, MemoryError, WatchedWrites};
pub use pool::PagePool;
