//! MSR numbers: the `x86` crate's, and what it lacks (SDM Vol. 4).

pub use x86::msr::*;

/// IA32_SPEC_CTRL.
pub const IA32_SPEC_CTRL: u32 = 0x48;
/// IA32_PRED_CMD.
pub const IA32_PRED_CMD: u32 = 0x49;
/// IA32_ARCH_CAPABILITIES.
pub const IA32_ARCH_CAPABILITIES: u32 = 0x10a;
/// IA32_FLUSH_CMD.
pub const IA32_FLUSH_CMD: u32 = 0x10b;
/// IA32_TSC_ADJUST.
pub const IA32_TSC_ADJUST_MSR: u32 = 0x3b;
/// IA32_XSS.
pub const IA32_XSS_MSR: u32 = 0xda0;
/// IA32_TSC_AUX.
pub const IA32_TSC_AUX_MSR: u32 = 0xc000_0103;
/// IA32_KERNEL_GS_BASE.
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// IA32_FS_BASE.
pub const FS_BASE: u32 = 0xc000_0100;
/// IA32_GS_BASE.
pub const GS_BASE: u32 = 0xc000_0101;
/// IA32_EFER.
pub const EFER: u32 = 0xc000_0080;
/// IA32_STAR.
pub const STAR: u32 = 0xc000_0081;
/// IA32_LSTAR.
pub const LSTAR: u32 = 0xc000_0082;
/// IA32_CSTAR.
pub const CSTAR: u32 = 0xc000_0083;
/// IA32_FMASK.
pub const FMASK: u32 = 0xc000_0084;

/// Bits of IA32_ARCH_CAPABILITIES that declare a processor free of a flaw.
pub mod arch_cap {
    /// Not susceptible to Meltdown.
    pub const RDCL_NO: u64 = 1 << 0;
    /// Enhanced IBRS.
    pub const IBRS_ALL: u64 = 1 << 1;
    /// No RSB underflow to the branch predictor (inverse of RSBA) is bit 2: left clear.
    pub const RSBA: u64 = 1 << 2;
    /// No L1D flush needed on VM entry.
    pub const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    /// Not susceptible to speculative store bypass.
    pub const SSB_NO: u64 = 1 << 4;
    /// Not susceptible to MDS.
    pub const MDS_NO: u64 = 1 << 5;
    /// No machine check on page-size change.
    pub const PSCHANGE_MC_NO: u64 = 1 << 6;
    /// Not susceptible to TAA.
    pub const TAA_NO: u64 = 1 << 8;
    /// Not susceptible to SBDR/SSDP.
    pub const SBDR_SSDP_NO: u64 = 1 << 13;
    /// Not susceptible to FBSDP.
    pub const FBSDP_NO: u64 = 1 << 14;
    /// Not susceptible to PSDP.
    pub const PSDP_NO: u64 = 1 << 15;
    /// Not susceptible to BHI.
    pub const BHI_NO: u64 = 1 << 20;
    /// Not susceptible to post-barrier RSB.
    pub const PBRSB_NO: u64 = 1 << 24;
    /// Not susceptible to gather data sampling.
    pub const GDS_NO: u64 = 1 << 26;
    /// Not susceptible to register-file data sampling.
    pub const RFDS_NO: u64 = 1 << 27;
    /// Not susceptible to indirect target selection.
    pub const ITS_NO: u64 = 1 << 62;
}
