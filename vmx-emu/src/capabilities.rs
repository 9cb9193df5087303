//! What L1 is offered of VMX, as its capability MSRs say it (SDM Vol. 3D appendix A): what
//! the engine can do and L0 implements.
//!
//! [`PIN`], [`PRIMARY`], [`SECONDARY`], [`EXIT`] and [`ENTRY`] list every control bit of the
//! SDM with what offering it needs; the conformance page and reports print them.
//!
//! Not offered whatever the engine can do: the controls marked
//! [`Needs::Unavailable`]; dual-monitor treatment of SMM; RDMSR of IA32_SMBASE;
//! 5-level EPT; supervisor shadow stacks; tertiary controls and secondary exit controls.

use x86_spec::caps::{AllowedControls, VmxCapabilities, ept_vpid};
use x86_spec::controls::{
    EntryControls as N, ExitControls as X, PinbasedControls as P, PrimaryControls as C,
    SecondaryControls as S,
};
use x86_spec::msr;
use x86_spec::reg::{cr0, cr4};

use crate::fields::{Field, FieldSet};
use crate::vmcs12::{REGION_SIZE, REVISION};

/// What the 1-setting of a control needs before it can be offered to L1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// The engine must have the same control: it does the work while L2 runs.
    Engine,
    /// L0 does the work between two entries, on every engine.
    L0,
    /// L0 does not implement it.
    Unavailable,
}

/// One control bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    /// Its bit in the control field.
    pub bit: u32,
    /// Its name in the SDM.
    pub name: &'static str,
    /// What offering it needs.
    pub needs: Needs,
}

impl Control {
    /// Its value in the control field.
    pub const fn mask(&self) -> u32 {
        1 << self.bit
    }
}

macro_rules! controls {
    ($($bit:literal $name:literal $needs:ident;)*) => {
        &[$(Control { bit: $bit, name: $name, needs: Needs::$needs },)*]
    };
}

/// Pin-based VM-execution controls (SDM Vol. 3C table 25-5).
pub const PIN: &[Control] = controls! {
    0 "External-interrupt exiting" Engine;
    3 "NMI exiting" Engine;
    5 "Virtual NMIs" Engine;
    6 "Activate VMX-preemption timer" Engine;
    7 "Process posted interrupts" Engine;
};

/// Primary processor-based VM-execution controls (table 25-6).
pub const PRIMARY: &[Control] = controls! {
    2 "Interrupt-window exiting" Engine;
    3 "Use TSC offsetting" Engine;
    7 "HLT exiting" Engine;
    9 "INVLPG exiting" Engine;
    10 "MWAIT exiting" Engine;
    11 "RDPMC exiting" Engine;
    12 "RDTSC exiting" Engine;
    15 "CR3-load exiting" Engine;
    16 "CR3-store exiting" Engine;
    17 "Activate tertiary controls" Unavailable;
    19 "CR8-load exiting" Engine;
    20 "CR8-store exiting" Engine;
    21 "Use TPR shadow" Engine;
    22 "NMI-window exiting" Engine;
    23 "MOV-DR exiting" Engine;
    24 "Unconditional I/O exiting" Engine;
    25 "Use I/O bitmaps" Engine;
    27 "Monitor trap flag" Engine;
    28 "Use MSR bitmaps" Engine;
    29 "MONITOR exiting" Engine;
    30 "PAUSE exiting" Engine;
    31 "Activate secondary controls" Engine;
};

/// Secondary processor-based VM-execution controls (table 25-7).
pub const SECONDARY: &[Control] = controls! {
    0 "Virtualize APIC accesses" Engine;
    1 "Enable EPT" Engine;
    2 "Descriptor-table exiting" Engine;
    3 "Enable RDTSCP" Engine;
    4 "Virtualize x2APIC mode" Engine;
    5 "Enable VPID" Engine;
    6 "WBINVD exiting" Engine;
    7 "Unrestricted guest" Engine;
    8 "APIC-register virtualization" Engine;
    9 "Virtual-interrupt delivery" Engine;
    10 "PAUSE-loop exiting" Engine;
    11 "RDRAND exiting" Engine;
    12 "Enable INVPCID" Engine;
    13 "Enable VM functions" Engine;
    14 "VMCS shadowing" L0;
    15 "Enable ENCLS exiting" Unavailable;
    16 "RDSEED exiting" Engine;
    17 "Enable PML" L0;
    18 "EPT-violation #VE" Unavailable;
    19 "Conceal VMX from PT" Unavailable;
    20 "Enable XSAVES/XRSTORS" Engine;
    21 "PASID translation" Unavailable;
    22 "Mode-based execute control for EPT" Engine;
    23 "Sub-page write permissions for EPT" Unavailable;
    24 "Intel PT uses guest physical addresses" Unavailable;
    25 "Use TSC scaling" Engine;
    26 "Enable user wait and pause" Unavailable;
    27 "Enable PCONFIG" Unavailable;
    28 "Enable ENCLV exiting" Unavailable;
    30 "VMM bus-lock detection" Unavailable;
    31 "Instruction timeout" Unavailable;
};

/// Primary VM-exit controls (table 25-13). Loading host state is L0's work, which an exit to
/// L1 is.
pub const EXIT: &[Control] = controls! {
    2 "Save debug controls" Engine;
    9 "Host address-space size" L0;
    12 "Load IA32_PERF_GLOBAL_CTRL" Engine;
    15 "Acknowledge interrupt on exit" L0;
    18 "Save IA32_PAT" Engine;
    19 "Load IA32_PAT" L0;
    20 "Save IA32_EFER" Engine;
    21 "Load IA32_EFER" L0;
    22 "Save VMX-preemption timer value" Engine;
    23 "Clear IA32_BNDCFGS" Unavailable;
    24 "Conceal VMX from PT" Unavailable;
    25 "Clear IA32_RTIT_CTL" Unavailable;
    26 "Clear IA32_LBR_CTL" Unavailable;
    27 "Clear UINV" Unavailable;
    28 "Load CET state" Unavailable;
    29 "Load PKRS" Unavailable;
    30 "Save IA32_PERF_GLOBAL_CTL" Unavailable;
    31 "Activate secondary controls" Unavailable;
};

/// VM-entry controls (table 25-15).
pub const ENTRY: &[Control] = controls! {
    2 "Load debug controls" Engine;
    9 "IA-32e mode guest" Engine;
    10 "Entry to SMM" Unavailable;
    11 "Deactivate dual-monitor treatment" Unavailable;
    13 "Load IA32_PERF_GLOBAL_CTRL" Engine;
    14 "Load IA32_PAT" Engine;
    15 "Load IA32_EFER" Engine;
    16 "Load IA32_BNDCFGS" Unavailable;
    17 "Conceal VMX from PT" Unavailable;
    18 "Load IA32_RTIT_CTL" Unavailable;
    19 "Load UINV" Unavailable;
    20 "Load CET state" Unavailable;
    21 "Load guest IA32_LBR_CTL" Unavailable;
    22 "Load PKRS" Unavailable;
};

/// The tables of controls with the names of their fields, for reports.
pub const CONTROL_FIELDS: [(&str, &[Control]); 5] = [
    ("Pin-based VM-execution controls", PIN),
    ("Primary processor-based VM-execution controls", PRIMARY),
    ("Secondary processor-based VM-execution controls", SECONDARY),
    ("Primary VM-exit controls", EXIT),
    ("VM-entry controls", ENTRY),
];

/// Reserved bits that must be 1 even by the TRUE MSRs, and the whole default1 class, which
/// the MSRs without TRUE report as fixed to 1 (SDM Vol. 3C §25.6–25.8, Vol. 3D A.2–A.5).
mod default1 {
    pub const PIN_RESERVED: u32 = 0x16;
    pub const PRIMARY_RESERVED: u32 = 0x0400_6172;
    pub const EXIT_RESERVED: u32 = 0x0003_6dfb;
    pub const ENTRY_RESERVED: u32 = 0x0000_11fb;
    pub const PIN: u32 = 0x16;
    pub const PRIMARY: u32 = 0x0401_e172;
    pub const EXIT: u32 = 0x0003_6dff;
    pub const ENTRY: u32 = 0x0000_11ff;
}

/// Bits of IA32_VMX_MISC (appendix A.6).
pub mod misc {
    /// Exits store EFER.LMA into the "IA-32e mode guest" entry control.
    pub const STORE_LMA: u64 = 1 << 5;
    /// Activity states HLT, shutdown and wait-for-SIPI, from bit 6 up.
    pub const ACTIVITY_STATES: u64 = 7 << 6;
    /// VMWRITE can write to VM-exit information fields.
    pub const VMWRITE_ANY_FIELD: u64 = 1 << 29;
    /// Software interrupts and exceptions can be injected with instruction length 0.
    pub const ZERO_LENGTH_INJECTION: u64 = 1 << 30;
    /// The most CR3-target values that are offered: the VMCS fields of more don't exist.
    pub const CR3_TARGETS: u64 = 4;
}

/// The function of IA32_VMX_VMFUNC that is implemented: EPTP switching (SDM Vol. 3C §26.5.6).
pub const VMFUNC_EPTP_SWITCHING: u64 = 1 << 0;

/// What else of L1's processor bears on VMX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Cpu {
    /// The CR4 bits that L1's CPUID lets it set; VMXE need not be among them.
    pub cr4: u64,
    /// MAXPHYADDR.
    pub physical_bits: u8,
    /// Pin-based controls that are not to be offered.
    pub withheld_pin: P,
    /// Secondary controls that are not to be offered, such as those of instructions that CPUID hides
    /// from L1.
    pub withheld: S,
}

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
    /// CR4 bits that may be 1 in VMX operation (IA32_VMX_CR4_FIXED1).
    pub cr4_fixed1: u64,
    /// L1's MAXPHYADDR.
    pub physical_bits: u8,
    /// The VMCS fields that exist.
    pub fields: FieldSet,
}

fn offered(controls: &[Control], engine: AllowedControls, reserved: u32) -> AllowedControls {
    let can = |c: &&Control| match c.needs {
        Needs::Engine => engine.may_be_one & c.mask() != 0,
        Needs::L0 => true,
        Needs::Unavailable => false,
    };
    let may = controls.iter().filter(can).fold(0, |all, c| all | c.mask());
    AllowedControls { must_be_one: reserved, may_be_one: reserved | may }
}

/// Takes out secondary controls whose 1-setting always fails VM entry because a control
/// that it requires is not offered (SDM Vol. 3C §27.2.1.1).
fn drop_unusable(mut secondary: u32, pin: u32, primary: u32) -> u32 {
    let mut drop_without = |have: bool, dependents: S| {
        if !have {
            secondary &= !dependents.bits();
        }
    };
    drop_without(primary & C::SECONDARY_CONTROLS.bits() != 0, S::all());
    drop_without(
        primary & C::USE_TPR_SHADOW.bits() != 0,
        S::VIRTUALIZE_X2APIC | S::VIRTUALIZE_APIC_REGISTER | S::VIRTUAL_INTERRUPT_DELIVERY,
    );
    drop_without(pin & P::EXTERNAL_INTERRUPT_EXITING.bits() != 0, S::VIRTUAL_INTERRUPT_DELIVERY);
    let ept = secondary & S::ENABLE_EPT.bits() != 0;
    if !ept {
        let needs_ept = S::UNRESTRICTED_GUEST | S::ENABLE_PML | S::MODE_BASED_EPT | S::ENABLE_VM_FUNCTIONS;
        secondary &= !needs_ept.bits();
    }
    secondary
}

/// Bits of IA32_VMX_EPT_VPID_CAP. Page sizes, paging-structure types and the invalidating
/// instructions are L0's: it walks EPT12 itself. What a translation in EPT02 must be able to
/// express is the engine's.
fn ept_vpid_cap(engine: &VmxCapabilities, secondary: u32) -> u64 {
    use ept_vpid as e;
    let mut cap = 0;
    if secondary & S::ENABLE_EPT.bits() != 0 {
        cap |= e::WALK4 | e::UC | e::WB | e::PAGE_2M | e::PAGE_1G;
        cap |= e::INVEPT | e::INVEPT_SINGLE | e::INVEPT_ALL;
        cap |= engine.ept_vpid & (e::EXECUTE_ONLY | e::AD | e::ADVANCED_EXIT);
    }
    if secondary & S::ENABLE_VPID.bits() != 0 {
        cap |= e::INVVPID | e::INVVPID_ALL_TYPES;
    }
    cap
}

fn misc_msr(engine: &VmxCapabilities) -> u64 {
    let targets = (engine.misc >> 16 & 0x1ff).min(misc::CR3_TARGETS);
    // Bits 27:25 stay 0: at most 512 MSRs in each list.
    (engine.preemption_timer_shift & 0x1f) as u64
        | misc::STORE_LMA
        | engine.misc & (misc::ACTIVITY_STATES | misc::ZERO_LENGTH_INJECTION)
        | targets << 16
        | misc::VMWRITE_ANY_FIELD
}

impl Capabilities {
    /// What L1 is offered on `engine`.
    pub fn new(engine: &VmxCapabilities, cpu: &L1Cpu) -> Self {
        let mut pin = offered(PIN, engine.pin, default1::PIN_RESERVED);
        pin.may_be_one &= !cpu.withheld_pin.bits();
        let primary = offered(PRIMARY, engine.primary, default1::PRIMARY_RESERVED);
        let mut secondary = offered(SECONDARY, engine.secondary, 0);
        secondary.may_be_one &= !cpu.withheld.bits();
        secondary.may_be_one = drop_unusable(secondary.may_be_one, pin.may_be_one, primary.may_be_one);
        let mut exit = offered(EXIT, engine.exit, default1::EXIT_RESERVED);
        if secondary.may_be_one & S::VIRTUAL_INTERRUPT_DELIVERY.bits() == 0 {
            pin.may_be_one &= !P::POSTED_INTERRUPTS.bits();
        }
        if pin.may_be_one & P::VMX_PREEMPTION_TIMER.bits() == 0 {
            exit.may_be_one &= !X::SAVE_VMX_PREEMPTION_TIMER.bits();
        }
        let vm_functions = secondary.may_be_one & S::ENABLE_VM_FUNCTIONS.bits() != 0;
        let mut caps = Self {
            pin,
            primary,
            secondary,
            exit,
            entry: offered(ENTRY, engine.entry, default1::ENTRY_RESERVED),
            ept_vpid: ept_vpid_cap(engine, secondary.may_be_one),
            misc: misc_msr(engine),
            vmfunc: if vm_functions { VMFUNC_EPTP_SWITCHING } else { 0 },
            cr4_fixed1: cpu.cr4 | cr4::VMXE,
            physical_bits: cpu.physical_bits,
            fields: FieldSet::EMPTY,
        };
        caps.fields = FieldSet::filter(|f| f.exists(&caps));
        caps
    }

    /// How many CR3-target values there are (IA32_VMX_MISC bits 24:16).
    pub const fn cr3_targets(&self) -> u64 {
        self.misc >> 16 & 0x1ff
    }

    /// Whether these pin-based controls can be 1.
    pub const fn has_pin(&self, c: P) -> bool {
        self.pin.may_be_one & c.bits() == c.bits()
    }
    /// Whether these primary controls can be 1.
    pub const fn has_primary(&self, c: C) -> bool {
        self.primary.may_be_one & c.bits() == c.bits()
    }
    /// Whether these secondary controls can be 1.
    pub const fn has_secondary(&self, c: S) -> bool {
        self.secondary.may_be_one & c.bits() == c.bits()
    }
    /// Whether these exit controls can be 1.
    pub const fn has_exit(&self, c: X) -> bool {
        self.exit.may_be_one & c.bits() == c.bits()
    }
    /// Whether these entry controls can be 1.
    pub const fn has_entry(&self, c: N) -> bool {
        self.entry.may_be_one & c.bits() == c.bits()
    }

    /// Whether the VMCS field exists.
    pub const fn has_field(&self, field: Field) -> bool {
        self.fields.contains(field)
    }

    /// IA32_VMX_CR0_FIXED0: the CR0 bits that must be 1 in VMX operation (appendix A.7). PE
    /// and PG are among them though unrestricted guests may clear both: the MSR is about root
    /// operation.
    pub const CR0_FIXED0: u64 = cr0::PE | cr0::NE | cr0::PG;
    /// IA32_VMX_CR0_FIXED1: the CR0 bits that may be 1.
    pub const CR0_FIXED1: u64 = 0xffff_ffff;
    /// IA32_VMX_CR4_FIXED0: the CR4 bits that must be 1 (appendix A.8).
    pub const CR4_FIXED0: u64 = cr4::VMXE;

    /// Whether `value` is a CR0 that VMX operation supports (SDM Vol. 3C §24.8). With
    /// `unrestricted_guest`, for a guest that has that control, PE and PG may be 0.
    pub const fn allows_cr0(&self, value: u64, unrestricted_guest: bool) -> bool {
        let exempt = if unrestricted_guest { cr0::PE | cr0::PG } else { 0 };
        let ones = Self::CR0_FIXED0 & !exempt;
        value & ones == ones && value & !Self::CR0_FIXED1 == 0
    }

    /// Whether `value` is a CR4 that VMX operation supports (SDM Vol. 3C §24.8).
    pub const fn allows_cr4(&self, value: u64) -> bool {
        value & Self::CR4_FIXED0 == Self::CR4_FIXED0 && value & !self.cr4_fixed1 == 0
    }

    /// Whether VM entry with "enable EPT" accepts this EPTP (SDM Vol. 3C §27.2.1.1): a
    /// supported memory type, walk length 4, the A/D bit only if supported, reserved bits 0.
    pub const fn allows_eptp(&self, eptp: u64) -> bool {
        let memory_type = match eptp & 7 {
            0 => self.ept_vpid & ept_vpid::UC != 0,
            6 => self.ept_vpid & ept_vpid::WB != 0,
            _ => false,
        };
        let walk = eptp & 0x38 == x86_spec::ept::EPTP_WALK4 && self.ept_vpid & ept_vpid::WALK4 != 0;
        let ad = eptp & x86_spec::ept::EPTP_AD == 0 || self.ept_vpid & ept_vpid::AD != 0;
        memory_type && walk && ad && eptp & 0xf80 == 0 && self.is_physical(eptp)
    }

    /// Whether `address` sets no bit beyond the physical-address width.
    pub const fn is_physical(&self, address: u64) -> bool {
        self.physical_bits >= 64 || address >> self.physical_bits == 0
    }

    /// IA32_VMX_BASIC (appendix A.1): revision identifier, region size, 64-bit physical
    /// addresses, write-back regions, information on INS and OUTS exits, TRUE MSRs.
    pub const fn basic() -> u64 {
        REVISION as u64 | (REGION_SIZE as u64) << 32 | 6 << 50 | 1 << 54 | 1 << 55
    }

    /// The value of a VMX capability MSR; `None` when L1 has no such MSR and the access is
    /// #GP(0).
    pub fn msr(&self, number: u32) -> Option<u64> {
        let secondary = self.has_primary(C::SECONDARY_CONTROLS);
        Some(match number {
            msr::IA32_VMX_BASIC => Self::basic(),
            msr::IA32_VMX_PINBASED_CTLS => with_default1(self.pin, default1::PIN),
            msr::IA32_VMX_PROCBASED_CTLS => with_default1(self.primary, default1::PRIMARY),
            msr::IA32_VMX_EXIT_CTLS => with_default1(self.exit, default1::EXIT),
            msr::IA32_VMX_ENTRY_CTLS => with_default1(self.entry, default1::ENTRY),
            msr::IA32_VMX_MISC => self.misc,
            msr::IA32_VMX_CR0_FIXED0 => Self::CR0_FIXED0,
            msr::IA32_VMX_CR0_FIXED1 => Self::CR0_FIXED1,
            msr::IA32_VMX_CR4_FIXED0 => Self::CR4_FIXED0,
            msr::IA32_VMX_CR4_FIXED1 => self.cr4_fixed1,
            msr::IA32_VMX_VMCS_ENUM => self.fields.vmcs_enum(),
            msr::IA32_VMX_PROCBASED_CTLS2 if secondary => self.secondary.msr(),
            msr::IA32_VMX_EPT_VPID_CAP if self.ept_vpid != 0 => self.ept_vpid,
            msr::IA32_VMX_TRUE_PINBASED_CTLS => self.pin.msr(),
            msr::IA32_VMX_TRUE_PROCBASED_CTLS => self.primary.msr(),
            msr::IA32_VMX_TRUE_EXIT_CTLS => self.exit.msr(),
            msr::IA32_VMX_TRUE_ENTRY_CTLS => self.entry.msr(),
            msr::IA32_VMX_VMFUNC if self.has_secondary(S::ENABLE_VM_FUNCTIONS) => self.vmfunc,
            _ => return None,
        })
    }
}

/// The form without TRUE: controls of the default1 class are fixed to 1 (appendix A.2).
const fn with_default1(controls: AllowedControls, default1: u32) -> u64 {
    AllowedControls {
        must_be_one: controls.must_be_one | default1 & controls.may_be_one,
        may_be_one: controls.may_be_one,
    }
    .msr()
}

/// IA32_FEATURE_CONTROL of one logical processor (SDM Vol. 3C §24.7, Vol. 4 table 2-2).
/// SMX is not offered, nor is anything else that has a bit in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureControl(u64);

/// A write that the MSR does not accept: #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FeatureControlError {
    /// The lock bit is set.
    #[error("IA32_FEATURE_CONTROL is locked")]
    Locked,
    /// The value sets bits that are reserved here.
    #[error("{0:#x} sets reserved bits of IA32_FEATURE_CONTROL")]
    Reserved(u64),
}

impl FeatureControl {
    /// Lock bit.
    pub const LOCK: u64 = 1 << 0;
    /// VMXON is enabled outside SMX operation.
    pub const VMX_OUTSIDE_SMX: u64 = 1 << 2;

    /// After RESET, before any firmware.
    pub const RESET: Self = Self(0);
    /// As firmware that enables VMX leaves it.
    pub const ENABLED: Self = Self(Self::LOCK | Self::VMX_OUTSIDE_SMX);

    /// RDMSR.
    pub const fn read(self) -> u64 {
        self.0
    }

    /// WRMSR.
    ///
    /// # Errors
    /// When the write is #GP(0).
    pub const fn write(&mut self, value: u64) -> Result<(), FeatureControlError> {
        let reserved = value & !(Self::LOCK | Self::VMX_OUTSIDE_SMX);
        if self.0 & Self::LOCK != 0 {
            Err(FeatureControlError::Locked)
        } else if reserved != 0 {
            Err(FeatureControlError::Reserved(reserved))
        } else {
            self.0 = value;
            Ok(())
        }
    }

    /// Whether VMXON is allowed: locked, and enabled outside SMX operation.
    pub const fn allows_vmxon(self) -> bool {
        self.0 & Self::ENABLED.0 == Self::ENABLED.0
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    fn everything() -> AllowedControls {
        AllowedControls { must_be_one: 0, may_be_one: u32::MAX }
    }

    /// An engine that can do all that the SDM has.
    pub(crate) fn full_engine() -> VmxCapabilities {
        VmxCapabilities {
            pin: everything(),
            primary: everything(),
            secondary: everything(),
            exit: everything(),
            entry: everything(),
            ept_vpid: u64::MAX,
            misc: u64::MAX,
            preemption_timer_shift: 5,
        }
    }

    pub(crate) const CPU: L1Cpu =
        L1Cpu { cr4: 0x3727ff, physical_bits: 40, withheld_pin: P::empty(), withheld: S::empty() };

    pub(crate) fn full() -> Capabilities {
        Capabilities::new(&full_engine(), &CPU)
    }

    #[test]
    fn what_is_not_implemented_is_not_offered() {
        let c = full();
        assert_eq!(c.secondary.may_be_one & S::EPT_VIOLATION_VE.bits(), 0);
        assert_eq!(c.primary.may_be_one & 1 << 17, 0, "tertiary controls");
        assert_eq!(c.ept_vpid & 1 << 7, 0, "5-level EPT");
        assert_eq!(c.misc & 1 << 28, 0, "dual-monitor treatment");
        assert_eq!(c.cr3_targets(), 4);
        assert_eq!(c.misc & 0x1f, 5);
    }

    #[test]
    fn what_the_engine_lacks_is_not_offered() {
        let mut e = full_engine();
        e.secondary.may_be_one &= !S::ENABLE_EPT.bits();
        e.pin.may_be_one &= !P::VMX_PREEMPTION_TIMER.bits();
        e.exit.may_be_one = 0;
        let c = Capabilities::new(&e, &CPU);
        // What needs EPT goes with it (SDM Vol. 3C §27.2.1.1).
        for s in [S::ENABLE_EPT, S::UNRESTRICTED_GUEST, S::ENABLE_PML, S::MODE_BASED_EPT] {
            assert!(!c.has_secondary(s), "{s:?}");
        }
        assert_eq!(c.ept_vpid & 0xffff_ffff, 0);
        assert_ne!(c.ept_vpid & ept_vpid::INVVPID, 0);
        assert!(!c.has_field(Field::Eptp) && !c.has_field(Field::GuestPhysicalAddress));
        assert!(!c.has_field(Field::PreemptionTimer));
        assert!(!c.has_exit(X::SAVE_VMX_PREEMPTION_TIMER));
        // L0's own work does not depend on the engine.
        assert!(c.has_exit(X::HOST_ADDRESS_SPACE_SIZE | X::ACK_INTERRUPT_ON_EXIT | X::LOAD_IA32_EFER));
        assert_eq!(c.msr(msr::IA32_VMX_VMFUNC), None);
    }

    #[test]
    fn no_secondary_controls_no_msr() {
        let mut e = full_engine();
        e.primary.may_be_one &= !C::SECONDARY_CONTROLS.bits();
        let c = Capabilities::new(&e, &CPU);
        assert_eq!(c.secondary.may_be_one, 0);
        assert_eq!(c.msr(msr::IA32_VMX_PROCBASED_CTLS2), None);
        assert_eq!(c.msr(msr::IA32_VMX_EPT_VPID_CAP), None);
        assert!(!c.has_field(Field::SecondaryControls));
        assert!(!c.has_pin(P::POSTED_INTERRUPTS), "needs virtual-interrupt delivery");
    }

    /// Appendix A.3.1–A.5: TRUE MSRs allow the named controls of the default1 class to be 0.
    #[test]
    fn default1_controls_are_fixed_only_without_true() {
        let c = full();
        let cr3 = (C::CR3_LOAD_EXITING | C::CR3_STORE_EXITING).bits() as u64;
        let low = |number| c.msr(number).unwrap() & 0xffff_ffff;
        assert_eq!(low(msr::IA32_VMX_PROCBASED_CTLS) & cr3, cr3);
        assert_eq!(low(msr::IA32_VMX_TRUE_PROCBASED_CTLS) & cr3, 0);
        assert_eq!(low(msr::IA32_VMX_PROCBASED_CTLS), 0x0401_e172);
        assert_eq!(low(msr::IA32_VMX_EXIT_CTLS), 0x36dff);
        assert_eq!(low(msr::IA32_VMX_TRUE_EXIT_CTLS), 0x36dfb);
        assert_eq!(low(msr::IA32_VMX_ENTRY_CTLS), 0x11ff);
        assert_eq!(low(msr::IA32_VMX_PINBASED_CTLS), 0x16);
    }

    /// A bit fixed to 1 can be 1.
    #[test]
    fn allowed_settings_are_consistent() {
        for e in [
            full_engine(),
            VmxCapabilities { primary: AllowedControls { must_be_one: 0, may_be_one: 0 }, ..full_engine() },
        ] {
            let c = Capabilities::new(&e, &CPU);
            for n in (0x481..=0x484).chain(0x48d..=0x490) {
                let v = c.msr(n).unwrap();
                assert_eq!(v & !(v >> 32) & 0xffff_ffff, 0, "MSR {n:#x}");
            }
        }
    }

    #[test]
    fn tables_are_in_order_and_name_each_bit_once() {
        for (_, table) in CONTROL_FIELDS {
            assert!(table.windows(2).all(|w| w[0].bit < w[1].bit));
            assert!(table.iter().all(|c| c.bit < 32 && !c.name.is_empty()));
        }
    }

    /// Appendix A.1.
    #[test]
    fn basic_information() {
        let b = Capabilities::basic();
        assert_eq!(b & 0x7fff_ffff, REVISION as u64);
        assert_eq!(b >> 31 & 1, 0);
        assert_eq!(b >> 32 & 0x1fff, 4096);
        assert_eq!(b >> 48 & 1, 0, "physical addresses are not cut to 32 bits");
        assert_eq!(b >> 50 & 15, 6, "write-back");
        assert_eq!(b >> 55 & 1, 1);
    }

    /// SDM Vol. 3C §24.8, §27.3.1.1.
    #[test]
    fn fixed_bits() {
        let c = full();
        assert!(c.allows_cr0(cr0::PE | cr0::NE | cr0::PG, false));
        assert!(!c.allows_cr0(cr0::NE, false));
        assert!(c.allows_cr0(cr0::NE, true));
        assert!(!c.allows_cr0(0, true), "NE is fixed even then");
        assert!(!c.allows_cr0(cr0::PE | cr0::NE | cr0::PG | 1 << 32, false));
        assert!(c.allows_cr4(cr4::VMXE | cr4::PAE));
        assert!(!c.allows_cr4(cr4::PAE));
        assert!(!c.allows_cr4(cr4::VMXE | 1 << 30));
    }

    /// SDM Vol. 3C §27.2.1.1, table 25-9.
    #[test]
    fn ept_pointers() {
        let mut c = full();
        for (eptp, allowed) in [
            (0x1000 | 6 | 3 << 3, true),
            (0x1000 | 3 << 3, true),
            (0x1000 | 6 | 3 << 3 | 1 << 6, true),
            (0x1000 | 1 | 3 << 3, false),
            (0x1000 | 6 | 4 << 3, false),
            (0x1000 | 6 | 3 << 3 | 1 << 7, false),
            (0x1000 | 6 | 3 << 3 | 1 << 11, false),
            (1 << 40 | 6 | 3 << 3, false),
        ] {
            assert_eq!(c.allows_eptp(eptp), allowed, "{eptp:#x}");
        }
        c.ept_vpid &= !ept_vpid::AD;
        assert!(!c.allows_eptp(0x1000 | 6 | 3 << 3 | 1 << 6));
    }

    #[test]
    fn feature_control_locks() {
        let mut f = FeatureControl::RESET;
        assert!(!f.allows_vmxon());
        assert_eq!(f.write(1 << 1), Err(FeatureControlError::Reserved(2)));
        assert_eq!(f.write(FeatureControl::VMX_OUTSIDE_SMX), Ok(()));
        assert!(!f.allows_vmxon(), "not locked");
        assert_eq!(f.write(5), Ok(()));
        assert!(f.allows_vmxon());
        assert_eq!(f.write(5), Err(FeatureControlError::Locked));
        assert_eq!(f, FeatureControl::ENABLED);
    }
}
