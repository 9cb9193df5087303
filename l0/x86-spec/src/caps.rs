//! VMX capability MSRs (SDM Vol. 3D appendix A).

use crate::controls::{EntryControls, ExitControls, PinbasedControls, PrimaryControls, SecondaryControls};

/// Which values of a 32-bit control field are allowed (appendix A.2): a bit that is set
/// in `must_be_one` can't be 0, one that is clear in `may_be_one` can't be 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllowedControls {
    /// Low half of the MSR.
    pub must_be_one: u32,
    /// High half of the MSR.
    pub may_be_one: u32,
}

impl AllowedControls {
    /// The MSR's value.
    pub const fn msr(self) -> u64 {
        self.must_be_one as u64 | (self.may_be_one as u64) << 32
    }
    /// Whether `value` is allowed.
    pub const fn allows(self, value: u32) -> bool {
        value & self.must_be_one == self.must_be_one && value & !self.may_be_one == 0
    }
}

/// EPT and VPID capabilities (IA32_VMX_EPT_VPID_CAP, appendix A.10).
pub mod ept_vpid {
    /// Execute-only translations.
    pub const EXECUTE_ONLY: u64 = 1 << 0;
    /// Page-walk length 4.
    pub const WALK4: u64 = 1 << 6;
    /// UC paging structures.
    pub const UC: u64 = 1 << 8;
    /// WB paging structures.
    pub const WB: u64 = 1 << 14;
    /// 2 MiB pages.
    pub const PAGE_2M: u64 = 1 << 16;
    /// 1 GiB pages.
    pub const PAGE_1G: u64 = 1 << 17;
    /// INVEPT.
    pub const INVEPT: u64 = 1 << 20;
    /// Accessed and dirty flags.
    pub const AD: u64 = 1 << 21;
    /// Advanced EPT-violation exit information.
    pub const ADVANCED_EXIT: u64 = 1 << 22;
    /// INVEPT single context.
    pub const INVEPT_SINGLE: u64 = 1 << 25;
    /// INVEPT all contexts.
    pub const INVEPT_ALL: u64 = 1 << 26;
    /// INVVPID.
    pub const INVVPID: u64 = 1 << 32;
    /// INVVPID, all four types.
    pub const INVVPID_ALL_TYPES: u64 = 0xf << 40;
}

/// What an engine can do, in the terms of the capability MSRs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmxCapabilities {
    /// Pin-based controls.
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
    /// log2 of TSC ticks per VMX-preemption-timer tick (IA32_VMX_MISC bits 4:0).
    pub preemption_timer_shift: u8,
}

impl VmxCapabilities {
    /// Whether every given pin-based control can be 1.
    pub fn has_pin(&self, c: PinbasedControls) -> bool {
        self.pin.may_be_one & c.bits() == c.bits()
    }
    /// Whether every given primary control can be 1.
    pub fn has_primary(&self, c: PrimaryControls) -> bool {
        self.primary.may_be_one & c.bits() == c.bits()
    }
    /// Whether every given secondary control can be 1.
    pub fn has_secondary(&self, c: SecondaryControls) -> bool {
        self.secondary.may_be_one & c.bits() == c.bits()
    }
    /// Whether every given exit control can be 1.
    pub fn has_exit(&self, c: ExitControls) -> bool {
        self.exit.may_be_one & c.bits() == c.bits()
    }
    /// Whether every given entry control can be 1.
    pub fn has_entry(&self, c: EntryControls) -> bool {
        self.entry.may_be_one & c.bits() == c.bits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowed_settings() {
        let a = AllowedControls { must_be_one: 0x16, may_be_one: 0x7f };
        assert!(a.allows(0x16));
        assert!(!a.allows(0x14));
        assert!(!a.allows(0x96));
        assert_eq!(a.msr(), 0x7f_0000_0016);
    }
}
