//! What L1 is offered of VMX, as its capability MSRs say it (SDM Vol. 3D appendix A).

use x86_spec::caps::AllowedControls;

/// What L1 is offered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Pin-based controls (the TRUE form, as all of these).
    pub pin: AllowedControls,
    /// Primary processor-based controls.
    pub primary: AllowedControls,
    /// Secondary processor-based controls.
    pub secondary: AllowedControls,
    /// VM-exit controls.
    pub exit: AllowedControls,
    /// VM-entry controls.
    pub entry: AllowedControls,
    /// IA32_VMX_EPT_VPID_CAP.
    pub ept_vpid: u64,
    /// IA32_VMX_MISC.
    pub misc: u64,
    /// IA32_VMX_VMFUNC.
    pub vmfunc: u64,
}

impl Capabilities {
    /// How many CR3-target values there are (IA32_VMX_MISC bits 24:16).
    pub const fn cr3_targets(&self) -> u64 {
        self.misc >> 16 & 0x1ff
    }
}
