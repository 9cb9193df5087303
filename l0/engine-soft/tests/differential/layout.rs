//! Linear addresses, the same natively and in the guest.

/// Pages of data: two writable, a hole, one read-only, a hole.
pub const DATA: u64 = 0x3000_0000;
/// Size of the data area without holes: three pages.
pub const DATA_SIZE: usize = 0x3000;
/// The read-only page.
pub const READ_ONLY: u64 = DATA + 0x3000;
/// The page of the instruction.
pub const CODE: u64 = 0x3100_0000;
/// The instruction.
pub const INSTRUCTION: u64 = CODE + 0x800;
/// Native only: entry and exit code.
pub const STUB: u64 = CODE + 0x1000;
/// Native only: registers in and out.
pub const BLOCK: u64 = CODE + 0x2000;
/// Page size.
pub const PAGE: usize = 0x1000;
