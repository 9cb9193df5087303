//! Invalidation descriptors (§6.5.2), 128 bits as two 64-bit halves.

/// Size in bytes.
pub const SIZE: u64 = 16;
/// Type: bits 3:0, and bits 11:9, which are 0 in all types offered here.
pub const TYPE: u64 = 0xe0f;
/// Context-cache invalidation (§6.5.2.1).
pub const CONTEXT_CACHE: u64 = 1;
/// IOTLB invalidation (§6.5.2.3).
pub const IOTLB: u64 = 2;
/// Interrupt entry cache invalidation (§6.5.2.7).
pub const INTERRUPT_ENTRY: u64 = 4;
/// Invalidation wait (§6.5.2.8).
pub const WAIT: u64 = 5;

/// Low half: granularity, bits 5:4 (bit 4 alone in [`INTERRUPT_ENTRY`]).
pub const G_SHIFT: u32 = 4;
/// Low half of [`CONTEXT_CACHE`] and [`IOTLB`]: domain ID, bits 31:16.
pub const DID_SHIFT: u32 = 16;

/// [`CONTEXT_CACHE`].
pub mod context_cache {
    /// Low half: source ID, bits 47:32.
    pub const SID_SHIFT: u32 = 32;
    /// Low half: function mask, bits 49:48.
    pub const FM_SHIFT: u32 = 48;
    /// Low half: reserved bits 15:6 and 63:50.
    pub const RESERVED: u64 = 0xfffc_0000_0000_ffc0;
}

/// [`IOTLB`].
pub mod iotlb {
    /// Low half: reserved bits 15:8 and 63:32. Bits 7:6 are drain reads and writes.
    pub const RESERVED: u64 = 0xffff_ffff_0000_ff00;
    /// High half: address, bits 63:12.
    pub const ADDRESS: u64 = !0xfff;
    /// High half: address mask, bits 5:0. Bit 6 is the invalidation hint.
    pub const AM: u64 = 0x3f;
    /// High half: reserved bits 11:7.
    pub const RESERVED_HIGH: u64 = 0xf80;
}

/// [`INTERRUPT_ENTRY`].
pub mod interrupt_entry {
    /// Low half: index-selective (bit 4 set), or global.
    pub const G_INDEX: u64 = 1 << 4;
    /// Low half: index mask, log2 of the number of entries, bits 31:27.
    pub const IM_SHIFT: u32 = 27;
    /// Low half: interrupt index, bits 47:32.
    pub const IIDX_SHIFT: u32 = 32;
    /// Low half: reserved bits 26:5 and 63:48.
    pub const RESERVED: u64 = 0xffff_0000_07ff_ffe0;
}

/// [`WAIT`].
pub mod wait {
    /// Low half: interrupt flag.
    pub const IF: u64 = 1 << 4;
    /// Low half: status write.
    pub const SW: u64 = 1 << 5;
    /// Low half: fence.
    pub const FN: u64 = 1 << 6;
    /// Low half: status data, bits 63:32.
    pub const DATA_SHIFT: u32 = 32;
    /// Low half: reserved bits 31:7. Page-request drain (bit 7) comes with page requests.
    pub const RESERVED: u64 = 0xffff_ff80;
    /// High half: status address, bits 63:2.
    pub const ADDRESS: u64 = !3;
}
