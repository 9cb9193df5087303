//! Interrupt requests (§5.1.2), interrupt remapping table entries (§9.10, §9.11) and the posted-interrupt
//! descriptor (§9.12).

/// Fields of a remappable request's address (§5.1.2.2).
pub mod request {
    /// Interrupt format: remappable. Clear: compatibility.
    pub const FORMAT: u64 = 1 << 4;
    /// Sub-handle valid.
    pub const SHV: u64 = 1 << 3;
    /// Handle bit 15.
    pub const HANDLE_15: u64 = 1 << 2;
    /// Handle bits 14:0 are address bits 19:5.
    pub const HANDLE_SHIFT: u32 = 5;
    /// Reserved bits of the data where the sub-handle is valid.
    pub const DATA_RESERVED: u32 = 0xffff_0000;
}

/// Fields of a compatibility request (§5.1.2.1): address and data of SDM Vol. 3A §11.11.
pub mod compatibility {
    /// Address: destination ID, bits 19:12.
    pub const DESTINATION_SHIFT: u32 = 12;
    /// Address: redirection hint.
    pub const RH: u64 = 1 << 3;
    /// Address: logical destination.
    pub const DM: u64 = 1 << 2;
    /// Data: delivery mode, bits 10:8.
    pub const DELIVERY_SHIFT: u32 = 8;
    /// Data: level asserted.
    pub const ASSERT: u32 = 1 << 14;
    /// Data: level-triggered.
    pub const LEVEL: u32 = 1 << 15;
}

/// Fields of an IRTE's low half. SID, SQ and SVT are in the high half.
pub mod irte {
    /// Size in bytes.
    pub const SIZE: u64 = 16;
    /// Present.
    pub const P: u64 = 1 << 0;
    /// Fault processing disable.
    pub const FPD: u64 = 1 << 1;
    /// Remapped: destination mode is logical.
    pub const DM: u64 = 1 << 2;
    /// Remapped: redirection hint.
    pub const RH: u64 = 1 << 3;
    /// Remapped: level-triggered.
    pub const TM: u64 = 1 << 4;
    /// Remapped: delivery mode, bits 7:5.
    pub const DLM_SHIFT: u32 = 5;
    /// Posted: urgent.
    pub const URG: u64 = 1 << 14;
    /// IRTE mode: posted.
    pub const IM: u64 = 1 << 15;
    /// Vector, or virtual vector, bits 23:16.
    pub const V_SHIFT: u32 = 16;
    /// Remapped: destination, bits 63:32; without extended interrupt mode bits 47:40 of it.
    pub const DST_SHIFT: u32 = 32;
    /// Remapped: reserved bits 14:12 and 31:24.
    pub const RESERVED: u64 = 0xff00_7000;
    /// Remapped, without extended interrupt mode: reserved bits 39:32 and 63:48 of the destination.
    pub const RESERVED_XAPIC: u64 = 0xffff_00ff_0000_0000;
    /// Posted: reserved bits 7:2, 13:12 and 37:24.
    pub const RESERVED_POSTED: u64 = 0x0000_003f_ff00_30fc;
    /// Posted: descriptor address bits 31:6 are bits 63:38.
    pub const PDA_LOW_SHIFT: u32 = 38;

    /// High half: source ID, bits 15:0.
    pub const SID: u64 = 0xffff;
    /// High half: source-ID qualifier, bits 17:16.
    pub const SQ_SHIFT: u32 = 16;
    /// High half: source validation type, bits 19:18.
    pub const SVT_SHIFT: u32 = 18;
    /// High half, remapped: reserved bits 63:20.
    pub const RESERVED_HIGH: u64 = 0xffff_ffff_fff0_0000;
    /// High half, posted: reserved bits 31:20.
    pub const RESERVED_HIGH_POSTED: u64 = 0xfff0_0000;
    /// High half, posted: descriptor address bits 63:32.
    pub const PDA_HIGH: u64 = 0xffff_ffff_0000_0000;

    /// SVT: no verification.
    pub const SVT_NONE: u64 = 0;
    /// SVT: the request's source ID, compared as SQ says.
    pub const SVT_SOURCE: u64 = 1;
    /// SVT: the request's bus number, from SID bits 15:8 to SID bits 7:0.
    pub const SVT_BUS: u64 = 2;
}

/// The posted-interrupt descriptor: 256 bits of requests, then control.
pub mod descriptor {
    /// Size in bytes, and its alignment.
    pub const SIZE: u64 = 64;
    /// Where the word with ON, SN, NV and NDST is.
    pub const CONTROL: u64 = 32;
    /// Outstanding notification.
    pub const ON: u64 = 1 << 0;
    /// Suppress notification.
    pub const SN: u64 = 1 << 1;
    /// Notification vector, bits 23:16 of the control word.
    pub const NV_SHIFT: u32 = 16;
    /// Notification destination, bits 63:32; without extended interrupt mode bits 15:8 of it.
    pub const NDST_SHIFT: u32 = 32;
    /// Reserved bits 15:2 and 31:24 of the control word.
    pub const RESERVED: u64 = 0xff00_fffc;
}
