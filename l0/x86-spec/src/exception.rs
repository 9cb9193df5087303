//! Exception vectors (SDM Vol. 3A §6.3.1) and page-fault error codes (§4.7).

/// Divide error, #DE.
pub const DE: u8 = 0;
/// Debug, #DB.
pub const DB: u8 = 1;
/// Non-maskable interrupt.
pub const NMI: u8 = 2;
/// Breakpoint, #BP.
pub const BP: u8 = 3;
/// Overflow, #OF.
pub const OF: u8 = 4;
/// BOUND range exceeded, #BR.
pub const BR: u8 = 5;
/// Invalid opcode, #UD.
pub const UD: u8 = 6;
/// Device not available, #NM.
pub const NM: u8 = 7;
/// Double fault, #DF.
pub const DF: u8 = 8;
/// Invalid TSS, #TS.
pub const TS: u8 = 10;
/// Segment not present, #NP.
pub const NP: u8 = 11;
/// Stack fault, #SS.
pub const SS: u8 = 12;
/// General protection, #GP.
pub const GP: u8 = 13;
/// Page fault, #PF.
pub const PF: u8 = 14;
/// x87 floating-point error, #MF.
pub const MF: u8 = 16;
/// Alignment check, #AC.
pub const AC: u8 = 17;
/// Machine check, #MC.
pub const MC: u8 = 18;
/// SIMD floating-point exception, #XM.
pub const XM: u8 = 19;
/// Virtualization exception, #VE.
pub const VE: u8 = 20;
/// Control protection, #CP.
pub const CP: u8 = 21;

/// Whether the exception pushes an error code (SDM Vol. 3A table 6-1).
pub const fn has_error_code(vector: u8) -> bool {
    matches!(vector, DF | TS | NP | SS | GP | PF | AC | CP)
}

/// #PF error code bits (SDM Vol. 3A §4.7).
pub mod pf {
    /// The page was present.
    pub const P: u32 = 1 << 0;
    /// A write.
    pub const W: u32 = 1 << 1;
    /// A user-mode access.
    pub const U: u32 = 1 << 2;
    /// A reserved bit was set in a paging-structure entry.
    pub const RSVD: u32 = 1 << 3;
    /// An instruction fetch.
    pub const I: u32 = 1 << 4;
    /// A protection-key violation.
    pub const PK: u32 = 1 << 5;
}
