//! Legacy-mode tables in memory: root entries (§9.1), context entries (§9.3), second-level paging
//! entries (§9.8).

/// A root or context entry as two 64-bit halves.
pub const ENTRY_SIZE: u64 = 16;
/// Bits 51:12 of a pointer; those from the host address width on are reserved.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Fields of a root entry, low half; the high half is reserved.
pub mod root {
    /// Present.
    pub const P: u64 = 1;
    /// Reserved bits 11:1.
    pub const RESERVED: u64 = 0xffe;
}

/// Fields of a context entry.
pub mod context {
    /// Low half: present.
    pub const P: u64 = 1;
    /// Low half: fault processing disable.
    pub const FPD: u64 = 1 << 1;
    /// Low half: translation type, bits 3:2.
    pub const TT_SHIFT: u32 = 2;
    /// Low half: reserved bits 11:4.
    pub const RESERVED_LOW: u64 = 0xff0;
    /// High half: address width, bits 2:0.
    pub const AW: u64 = 7;
    /// High half: domain ID, bits 23:8.
    pub const DID_SHIFT: u32 = 8;
    /// High half: reserved bits 7 and 63:24. Bits 6:3 are software's.
    pub const RESERVED_HIGH: u64 = 0xffff_ffff_ff00_0080;
    /// TT: untranslated requests by second-level tables, others blocked.
    pub const TT_SECOND_LEVEL: u64 = 0;
    /// TT: the same with device TLBs.
    pub const TT_DEVICE_TLB: u64 = 1;
    /// TT: untranslated requests pass through.
    pub const TT_PASS_THROUGH: u64 = 2;
    /// AW: 39 bits, 3 levels.
    pub const AW_39: u64 = 1;
    /// AW: 48 bits, 4 levels.
    pub const AW_48: u64 = 2;
}

/// Bits of a second-level paging entry.
pub mod second_level {
    /// Read.
    pub const R: u64 = 1 << 0;
    /// Write.
    pub const W: u64 = 1 << 1;
    /// Page size: a leaf at the second or third level. Reserved at the fourth.
    pub const PS: u64 = 1 << 7;
    /// Snoop, in leaves of units with snoop control.
    pub const SNP: u64 = 1 << 11;
    /// Transient mapping: reserved without device TLBs.
    pub const TM: u64 = 1 << 62;
}

/// First byte of the addresses that are interrupt requests when written to (§3.14).
pub const INTERRUPT_RANGE: u64 = 0xfee0_0000;
/// Size of that range in bytes.
pub const INTERRUPT_RANGE_SIZE: u64 = 0x10_0000;

/// Whether `address` is in the range of interrupt requests.
pub const fn is_interrupt_address(address: u64) -> bool {
    address & !(INTERRUPT_RANGE_SIZE - 1) == INTERRUPT_RANGE
}
