//! VM-instruction errors (SDM Vol. 3D table 31-1) with their names, and what usually is
//! behind each.

use std::fmt;

macro_rules! instruction_errors {
    ($($name:ident = $number:literal, $text:literal, $hint:literal;)*) => {
        /// A VM-instruction error number.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum InstructionError { $(#[doc = $text] $name = $number,)* }

        impl InstructionError {
            /// All of them, in order of number.
            pub const ALL: &[InstructionError] = &[$(InstructionError::$name,)*];

            /// The error with this number.
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
            /// The SDM's description.
            pub const fn description(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
            /// What the hypervisor that got it should look at.
            pub const fn hint(self) -> &'static str {
                match self { $(Self::$name => $hint,)* }
            }
        }
    };
}

instruction_errors! {
    VmcallInRoot = 1, "VMCALL executed in VMX root operation",
        "VMCALL is for guests; in root operation it would call an SMM-transfer monitor, which is not offered";
    VmclearInvalidAddress = 2, "VMCLEAR with invalid physical address",
        "the operand must be 4-KiB aligned and within the physical-address width";
    VmclearVmxonPointer = 3, "VMCLEAR with VMXON pointer",
        "the VMXON region can't be used as a VMCS";
    VmlaunchNonClear = 4, "VMLAUNCH with non-clear VMCS",
        "use VMRESUME, or VMCLEAR it first";
    VmresumeNonLaunched = 5, "VMRESUME with non-launched VMCS",
        "use VMLAUNCH after VMCLEAR and VMPTRLD";
    VmresumeAfterVmxoff = 6, "VMRESUME after VMXOFF",
        "VMXOFF and VMXON came between VMLAUNCH and VMRESUME";
    EntryInvalidControls = 7, "VM entry with invalid control field(s)",
        "see the list of failed checks on controls";
    EntryInvalidHostState = 8, "VM entry with invalid host-state field(s)",
        "see the list of failed checks on host state";
    VmptrldInvalidAddress = 9, "VMPTRLD with invalid physical address",
        "the operand must be 4-KiB aligned and within the physical-address width";
    VmptrldVmxonPointer = 10, "VMPTRLD with VMXON pointer",
        "the VMXON region can't be used as a VMCS";
    VmptrldWrongRevision = 11, "VMPTRLD with incorrect VMCS revision identifier",
        "write IA32_VMX_BASIC bits 30:0 to the first dword of the region; bit 31 needs VMCS shadowing";
    UnsupportedComponent = 12, "VMREAD/VMWRITE from/to unsupported VMCS component",
        "no such field, or it belongs to a control that the capability MSRs don't offer";
    ReadOnlyComponent = 13, "VMWRITE to read-only VMCS component",
        "IA32_VMX_MISC bit 29 tells whether VM-exit information fields can be written";
    VmxonInRoot = 15, "VMXON executed in VMX root operation",
        "the processor is in VMX operation already";
    InvalidExecutivePointer = 16, "VM entry with invalid executive-VMCS pointer",
        "only with dual-monitor treatment of SMM";
    NonLaunchedExecutive = 17, "VM entry with non-launched executive VMCS",
        "only with dual-monitor treatment of SMM";
    ExecutiveNotVmxonPointer = 18, "VM entry with executive-VMCS pointer not VMXON pointer",
        "only with dual-monitor treatment of SMM";
    VmcallNonClear = 19, "VMCALL with non-clear VMCS",
        "only with dual-monitor treatment of SMM";
    VmcallInvalidExitControls = 20, "VMCALL with invalid VM-exit control fields",
        "only with dual-monitor treatment of SMM";
    VmcallWrongMsegRevision = 22, "VMCALL with incorrect MSEG revision identifier",
        "only with dual-monitor treatment of SMM";
    VmxoffDualMonitor = 23, "VMXOFF under dual-monitor treatment of SMIs and SMM",
        "only with dual-monitor treatment of SMM";
    VmcallInvalidSmmFeatures = 24, "VMCALL with invalid SMM-monitor features",
        "only with dual-monitor treatment of SMM";
    InvalidExecutiveControls = 25,
        "VM entry with invalid VM-execution control fields in executive VMCS",
        "only with dual-monitor treatment of SMM";
    EventsBlockedByMovSs = 26, "VM entry with events blocked by MOV SS",
        "an instruction must lie between MOV SS or POP SS and VM entry";
    InvalidInvalidateOperand = 28, "Invalid operand to INVEPT/INVVPID",
        "the type must be offered by IA32_VMX_EPT_VPID_CAP; EPTP must be valid, VPID not 0, the address canonical";
}

impl InstructionError {
    /// Its number.
    pub const fn number(self) -> u32 {
        self as u32
    }
}

impl fmt::Display for InstructionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VM-instruction error {}: {}", self.number(), self.description())
    }
}
