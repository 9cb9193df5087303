//! The register file (§10.4): offsets from the unit's base address, and fields.

/// Size of the register window in bytes: one page.
pub const WINDOW: u64 = 0x1000;

/// VER_REG (§10.4.1), 32 bits.
pub const VER: u64 = 0x00;
/// CAP_REG (§10.4.2), 64 bits.
pub const CAP: u64 = 0x08;
/// ECAP_REG (§10.4.3), 64 bits.
pub const ECAP: u64 = 0x10;
/// GCMD_REG (§10.4.4), 32 bits, write-only.
pub const GCMD: u64 = 0x18;
/// GSTS_REG (§10.4.5), 32 bits.
pub const GSTS: u64 = 0x1c;
/// RTADDR_REG (§10.4.6), 64 bits.
pub const RTADDR: u64 = 0x20;
/// CCMD_REG (§10.4.7), 64 bits.
pub const CCMD: u64 = 0x28;
/// FSTS_REG (§10.4.9), 32 bits.
pub const FSTS: u64 = 0x34;
/// FECTL_REG (§10.4.10), 32 bits.
pub const FECTL: u64 = 0x38;
/// FEDATA_REG (§10.4.11), 32 bits.
pub const FEDATA: u64 = 0x3c;
/// FEADDR_REG (§10.4.12), 32 bits.
pub const FEADDR: u64 = 0x40;
/// FEUADDR_REG (§10.4.13), 32 bits.
pub const FEUADDR: u64 = 0x44;
/// PMEN_REG (§10.4.16), 32 bits: reserved without protected memory regions.
pub const PMEN: u64 = 0x64;
/// IQH_REG (§10.4.21), 64 bits.
pub const IQH: u64 = 0x80;
/// IQT_REG (§10.4.22), 64 bits.
pub const IQT: u64 = 0x88;
/// IQA_REG (§10.4.23), 64 bits.
pub const IQA: u64 = 0x90;
/// ICS_REG (§10.4.24), 32 bits.
pub const ICS: u64 = 0x9c;
/// IECTL_REG (§10.4.25), 32 bits.
pub const IECTL: u64 = 0xa0;
/// IEDATA_REG (§10.4.26), 32 bits.
pub const IEDATA: u64 = 0xa4;
/// IEADDR_REG (§10.4.27), 32 bits.
pub const IEADDR: u64 = 0xa8;
/// IEUADDR_REG (§10.4.28), 32 bits.
pub const IEUADDR: u64 = 0xac;
/// IQERCD_REG, invalidation queue error record (in the specification since revision 3.1), 64 bits.
pub const IQERCD: u64 = 0xb0;
/// IRTA_REG (§10.4.29), 64 bits.
pub const IRTA: u64 = 0xb8;
/// IVA_REG (§10.4.8.2), 64 bits; ECAP_REG.IRO says where.
pub const IVA: u64 = 0xf0;
/// IOTLB_REG (§10.4.8.1), 64 bits: 8 bytes after IVA_REG.
pub const IOTLB: u64 = 0xf8;
/// FRCD_REG\[n\] (§10.4.14), 128 bits each; CAP_REG.FRO says where.
pub const FRCD: u64 = 0x200;
/// Number of fault recording registers.
pub const FRCD_COUNT: usize = 8;
/// Size of one in bytes.
pub const FRCD_SIZE: u64 = 16;

/// Fields of VER_REG.
pub mod ver {
    /// Major version 1 in bits 7:4, minor version 0 in bits 3:0.
    pub const V1_0: u32 = 0x10;
}

/// Fields of CAP_REG.
pub mod cap {
    /// Number of domains, bits 2:0: 6 is 16-bit domain IDs.
    pub const ND_16_BITS: u64 = 6;
    /// Caching mode.
    pub const CM: u64 = 1 << 7;
    /// Supported adjusted guest address widths, bits 12:8: 39 bits (3 levels).
    pub const SAGAW_39: u64 = 1 << 9;
    /// 48 bits (4 levels).
    pub const SAGAW_48: u64 = 1 << 10;
    /// Maximum guest address width less one, bits 21:16.
    pub const MGAW_SHIFT: u32 = 16;
    /// Zero-length reads of write-only pages.
    pub const ZLR: u64 = 1 << 22;
    /// Offset of the fault recording registers in 16 bytes, bits 33:24.
    pub const FRO_SHIFT: u32 = 24;
    /// Second-level large pages of 2 MiB.
    pub const SLLPS_2M: u64 = 1 << 34;
    /// Of 1 GiB.
    pub const SLLPS_1G: u64 = 1 << 35;
    /// Page-selective invalidation.
    pub const PSI: u64 = 1 << 39;
    /// Number of fault recording registers less one, bits 47:40.
    pub const NFR_SHIFT: u32 = 40;
    /// Maximum address mask value, bits 53:48.
    pub const MAMV_SHIFT: u32 = 48;
    /// Write draining.
    pub const DWD: u64 = 1 << 54;
    /// Read draining.
    pub const DRD: u64 = 1 << 55;
    /// Posted interrupts.
    pub const PI: u64 = 1 << 59;
}

/// Fields of ECAP_REG.
pub mod ecap {
    /// Page-walk coherency.
    pub const C: u64 = 1 << 0;
    /// Queued invalidation.
    pub const QI: u64 = 1 << 1;
    /// Interrupt remapping.
    pub const IR: u64 = 1 << 3;
    /// Extended interrupt mode: 32-bit APIC IDs.
    pub const EIM: u64 = 1 << 4;
    /// Pass-through.
    pub const PT: u64 = 1 << 6;
    /// Snoop control.
    pub const SC: u64 = 1 << 7;
    /// Offset of IVA_REG in 16 bytes, bits 17:8.
    pub const IRO_SHIFT: u32 = 8;
    /// Maximum handle mask value, bits 23:20.
    pub const MHMV_SHIFT: u32 = 20;
}

/// Bits of GCMD_REG and, in the same places, of GSTS_REG.
pub mod gcmd {
    /// Translation enable (TES).
    pub const TE: u32 = 1 << 31;
    /// Set root table pointer (RTPS).
    pub const SRTP: u32 = 1 << 30;
    /// Set fault log (FLS): advanced fault logging only.
    pub const SFL: u32 = 1 << 29;
    /// Enable advanced fault logging (AFLS).
    pub const EAFL: u32 = 1 << 28;
    /// Write buffer flush (WBFS): only where CAP_REG.RWBF is set.
    pub const WBF: u32 = 1 << 27;
    /// Queued invalidation enable (QIES).
    pub const QIE: u32 = 1 << 26;
    /// Interrupt remapping enable (IRES).
    pub const IRE: u32 = 1 << 25;
    /// Set interrupt remap table pointer (IRTPS).
    pub const SIRTP: u32 = 1 << 24;
    /// Compatibility format interrupts pass (CFIS).
    pub const CFI: u32 = 1 << 23;
}

/// Fields of RTADDR_REG.
pub mod rtaddr {
    /// Root table address, bits 63:12.
    pub const ADDRESS: u64 = !0xfff;
    /// Translation table mode, bits 11:10: 0 is legacy mode.
    pub const TTM: u64 = 3 << 10;
}

/// Fields of CCMD_REG.
pub mod ccmd {
    /// Invalidate context cache: set to start, clear when done.
    pub const ICC: u64 = 1 << 63;
    /// Requested granularity, bits 62:61.
    pub const CIRG_SHIFT: u32 = 61;
    /// Actual granularity, bits 60:59.
    pub const CAIG_SHIFT: u32 = 59;
    /// Function mask, bits 33:32.
    pub const FM_SHIFT: u32 = 32;
    /// Source ID, bits 31:16.
    pub const SID_SHIFT: u32 = 16;
    /// What software may write.
    pub const WRITABLE: u64 = ICC | 3 << CIRG_SHIFT | 0x3_ffff_ffff;
}

/// Fields of IOTLB_REG.
pub mod iotlb {
    /// Invalidate IOTLB: set to start, clear when done.
    pub const IVT: u64 = 1 << 63;
    /// Requested granularity, bits 61:60.
    pub const IIRG_SHIFT: u32 = 60;
    /// Actual granularity, bits 58:57.
    pub const IAIG_SHIFT: u32 = 57;
    /// Domain ID, bits 47:32.
    pub const DID_SHIFT: u32 = 32;
    /// What software may write: IVT, IIRG, drain reads, drain writes, domain ID.
    pub const WRITABLE: u64 = IVT | 3 << IIRG_SHIFT | 1 << 49 | 1 << 48 | 0xffff << DID_SHIFT;
}

/// Fields of IVA_REG.
pub mod iva {
    /// Address, bits 63:12.
    pub const ADDRESS: u64 = !0xfff;
    /// Invalidation hint: only leaves changed.
    pub const IH: u64 = 1 << 6;
    /// Address mask: log2 of the number of pages, bits 5:0.
    pub const AM: u64 = 0x3f;
}

/// Granularities of CCMD_REG, IOTLB_REG and the invalidation descriptors (§6.5.1, §6.5.2).
pub mod granularity {
    /// Everything.
    pub const GLOBAL: u64 = 1;
    /// All of a domain.
    pub const DOMAIN: u64 = 2;
    /// A device's (context cache) or a domain's pages (IOTLB).
    pub const SELECTIVE: u64 = 3;
}

/// Bits of FSTS_REG.
pub mod fsts {
    /// Primary fault overflow, write 1 to clear.
    pub const PFO: u32 = 1 << 0;
    /// Primary pending fault: some fault recording register has F set.
    pub const PPF: u32 = 1 << 1;
    /// Invalidation queue error, write 1 to clear.
    pub const IQE: u32 = 1 << 4;
    /// Invalidation completion error (device TLBs), write 1 to clear.
    pub const ICE: u32 = 1 << 5;
    /// Invalidation time-out error (device TLBs), write 1 to clear.
    pub const ITE: u32 = 1 << 6;
    /// Fault record index, bits 15:8.
    pub const FRI_SHIFT: u32 = 8;
}

/// Bits of FECTL_REG and IECTL_REG.
pub mod event_control {
    /// Interrupt mask.
    pub const IM: u32 = 1 << 31;
    /// Interrupt pending.
    pub const IP: u32 = 1 << 30;
}

/// Bits of ICS_REG.
pub mod ics {
    /// Invalidation wait descriptor complete, write 1 to clear.
    pub const IWC: u32 = 1 << 0;
}

/// Fields of IQA_REG.
pub mod iqa {
    /// Queue address, bits 63:12.
    pub const ADDRESS: u64 = !0xfff;
    /// Queue size, bits 2:0: 2^QS pages of 256 descriptors.
    pub const QS: u64 = 7;
}

/// Fields of IQH_REG and IQT_REG.
pub mod queue_index {
    /// The index of a 128-bit descriptor, bits 18:4.
    pub const INDEX: u64 = 0x7fff << 4;
    /// Its place.
    pub const SHIFT: u32 = 4;
}

/// Codes of IQERCD_REG.IQEI, bits 3:0.
pub mod iqei {
    /// IQT_REG is outside the queue.
    pub const INVALID_TAIL: u64 = 1;
    /// A descriptor could not be fetched.
    pub const FETCH: u64 = 2;
    /// A descriptor's type is not known.
    pub const INVALID_TYPE: u64 = 3;
    /// A reserved field is not 0.
    pub const RESERVED: u64 = 4;
}

/// Fields of IRTA_REG.
pub mod irta {
    /// Table address, bits 63:12.
    pub const ADDRESS: u64 = !0xfff;
    /// Extended interrupt mode enable.
    pub const EIME: u64 = 1 << 11;
    /// Size, bits 3:0: 2^(S+1) entries.
    pub const S: u64 = 0xf;
}

/// Fields of FRCD_REG (§10.4.14) as two 64-bit halves.
pub mod frcd {
    /// High half: a fault is recorded; write 1 to clear.
    pub const F: u64 = 1 << 63;
    /// High half: type bit 1; set for reads.
    pub const T_READ: u64 = 1 << 62;
    /// High half: address type of the request, bits 61:60.
    pub const AT_SHIFT: u32 = 60;
    /// High half: fault reason, bits 39:32.
    pub const FR_SHIFT: u32 = 32;
    /// Low half, interrupt remapping faults: interrupt index, bits 63:48.
    pub const INDEX_SHIFT: u32 = 48;
}
