//! The VMCS fields that L1 can have (SDM Vol. 3D appendix B), in one table.
//!
//! Only fields of controls that L0 may offer are here. Which of them exist for an L1
//! follows from what it is offered ([`Field::exists`]); any other encoding is an
//! unsupported VMCS component (VM-instruction error 12).
//!
//! Not supported: fields of #VE, ENCLS and ENCLV exiting, sub-page permissions, tertiary
//! controls, HLAT, processor trace, CET, PKRS, BNDCFGS, user interrupts, instruction
//! timeouts, SMM's dual-monitor treatment (the executive-VMCS pointer and SMBASE exist on
//! every processor and just hold what is written).

use x86_spec::controls::{
    EntryControls as N, ExitControls as X, PinbasedControls as P, PrimaryControls as C,
    SecondaryControls as S,
};

use crate::capabilities::Capabilities;

/// What must be offered for a field to exist (notes to the tables of SDM Vol. 3D
/// appendix B).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existence {
    /// On every processor.
    Always,
    /// With the 1-setting of a pin-based control.
    Pin(P),
    /// With the 1-setting of a primary control.
    Primary(C),
    /// With the 1-setting of a secondary control.
    Secondary(S),
    /// With the 1-setting of an entry control.
    Entry(N),
    /// With the 1-setting of an exit control.
    Exit(X),
    /// With the 1-setting of either control.
    EntryOrExit(N, X),
    /// With at least this many CR3-target values (IA32_VMX_MISC bits 24:16).
    Cr3Targets(u64),
    /// With EPTP switching (IA32_VMX_VMFUNC bit 0).
    EptpSwitching,
}

/// Width of a field (encoding bits 14:13, SDM Vol. 3C table 25-21).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Width {
    /// 16 bits.
    Bits16 = 0,
    /// 64 bits, in every mode.
    Bits64 = 1,
    /// 32 bits.
    Bits32 = 2,
    /// Natural width: 64 bits on a processor with Intel 64.
    Natural = 3,
}

impl Width {
    /// The bits that a field of this width holds.
    pub const fn mask(self) -> u64 {
        match self {
            Self::Bits16 => 0xffff,
            Self::Bits32 => 0xffff_ffff,
            Self::Bits64 | Self::Natural => u64::MAX,
        }
    }
    /// Bytes.
    pub const fn bytes(self) -> u8 {
        match self {
            Self::Bits16 => 2,
            Self::Bits32 => 4,
            Self::Bits64 | Self::Natural => 8,
        }
    }
}

/// Type of a field (encoding bits 11:10, SDM Vol. 3C table 25-21).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FieldType {
    /// Control.
    Control = 0,
    /// VM-exit information, read-only without IA32_VMX_MISC bit 29.
    ReadOnly = 1,
    /// Guest state.
    Guest = 2,
    /// Host state.
    Host = 3,
}

/// Which part of a field an encoding names (encoding bit 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// All of it.
    Full,
    /// Bits 63:32 of a 64-bit field.
    High,
}

/// Mode of the processor that executes VMREAD or VMWRITE, as far as it decides the
/// operand size: 64 bits in 64-bit mode, else 32 (SDM Vol. 3D chapter 31).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperandSize {
    /// Outside 64-bit mode.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

macro_rules! vmcs_fields {
    ($($name:ident = $encoding:literal, $kvm:literal, $sdm:literal, $exists:expr;)*) => {
        /// A VMCS field. The discriminant is its index in [`Field::ALL`], not its encoding.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Field { $(#[doc = $sdm] $name,)* }

        impl Field {
            /// Every field, in order of index.
            pub const ALL: &[Field] = &[$(Field::$name,)*];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The encoding for full access.
            pub const fn encoding(self) -> u32 {
                match self { $(Self::$name => $encoding,)* }
            }
            /// The name that KVM and its tools use.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $kvm,)* }
            }
            /// The name in the SDM.
            pub const fn sdm_name(self) -> &'static str {
                match self { $(Self::$name => $sdm,)* }
            }
            /// What makes it exist.
            pub const fn existence(self) -> Existence {
                use Existence::*;
                match self { $(Self::$name => $exists,)* }
            }
        }
    };
}

vmcs_fields! {
    // Table B-1: 16-bit control fields.
    Vpid = 0x0000, "VIRTUAL_PROCESSOR_ID", "Virtual-processor identifier", Secondary(S::ENABLE_VPID);
    PostedInterruptVector = 0x0002, "POSTED_INTR_NV", "Posted-interrupt notification vector", Pin(P::POSTED_INTERRUPTS);
    // Table B-2: 16-bit guest-state fields.
    GuestEsSelector = 0x0800, "GUEST_ES_SELECTOR", "Guest ES selector", Always;
    GuestCsSelector = 0x0802, "GUEST_CS_SELECTOR", "Guest CS selector", Always;
    GuestSsSelector = 0x0804, "GUEST_SS_SELECTOR", "Guest SS selector", Always;
    GuestDsSelector = 0x0806, "GUEST_DS_SELECTOR", "Guest DS selector", Always;
    GuestFsSelector = 0x0808, "GUEST_FS_SELECTOR", "Guest FS selector", Always;
    GuestGsSelector = 0x080a, "GUEST_GS_SELECTOR", "Guest GS selector", Always;
    GuestLdtrSelector = 0x080c, "GUEST_LDTR_SELECTOR", "Guest LDTR selector", Always;
    GuestTrSelector = 0x080e, "GUEST_TR_SELECTOR", "Guest TR selector", Always;
    GuestInterruptStatus = 0x0810, "GUEST_INTR_STATUS", "Guest interrupt status", Secondary(S::VIRTUAL_INTERRUPT_DELIVERY);
    PmlIndex = 0x0812, "GUEST_PML_INDEX", "PML index", Secondary(S::ENABLE_PML);
    // Table B-3: 16-bit host-state fields.
    HostEsSelector = 0x0c00, "HOST_ES_SELECTOR", "Host ES selector", Always;
    HostCsSelector = 0x0c02, "HOST_CS_SELECTOR", "Host CS selector", Always;
    HostSsSelector = 0x0c04, "HOST_SS_SELECTOR", "Host SS selector", Always;
    HostDsSelector = 0x0c06, "HOST_DS_SELECTOR", "Host DS selector", Always;
    HostFsSelector = 0x0c08, "HOST_FS_SELECTOR", "Host FS selector", Always;
    HostGsSelector = 0x0c0a, "HOST_GS_SELECTOR", "Host GS selector", Always;
    HostTrSelector = 0x0c0c, "HOST_TR_SELECTOR", "Host TR selector", Always;
    // Table B-4: 64-bit control fields.
    IoBitmapA = 0x2000, "IO_BITMAP_A", "Address of I/O bitmap A", Always;
    IoBitmapB = 0x2002, "IO_BITMAP_B", "Address of I/O bitmap B", Always;
    MsrBitmap = 0x2004, "MSR_BITMAP", "Address of MSR bitmaps", Primary(C::USE_MSR_BITMAPS);
    ExitMsrStoreAddress = 0x2006, "VM_EXIT_MSR_STORE_ADDR", "VM-exit MSR-store address", Always;
    ExitMsrLoadAddress = 0x2008, "VM_EXIT_MSR_LOAD_ADDR", "VM-exit MSR-load address", Always;
    EntryMsrLoadAddress = 0x200a, "VM_ENTRY_MSR_LOAD_ADDR", "VM-entry MSR-load address", Always;
    ExecutiveVmcsPointer = 0x200c, "EXECUTIVE_VMCS_POINTER", "Executive-VMCS pointer", Always;
    PmlAddress = 0x200e, "PML_ADDRESS", "PML address", Secondary(S::ENABLE_PML);
    TscOffset = 0x2010, "TSC_OFFSET", "TSC offset", Always;
    VirtualApicAddress = 0x2012, "VIRTUAL_APIC_PAGE_ADDR", "Virtual-APIC address", Primary(C::USE_TPR_SHADOW);
    ApicAccessAddress = 0x2014, "APIC_ACCESS_ADDR", "APIC-access address", Secondary(S::VIRTUALIZE_APIC);
    PostedInterruptDescriptor = 0x2016, "POSTED_INTR_DESC_ADDR", "Posted-interrupt descriptor address", Pin(P::POSTED_INTERRUPTS);
    VmFunctionControls = 0x2018, "VM_FUNCTION_CONTROL", "VM-function controls", Secondary(S::ENABLE_VM_FUNCTIONS);
    Eptp = 0x201a, "EPT_POINTER", "EPT pointer", Secondary(S::ENABLE_EPT);
    EoiExit0 = 0x201c, "EOI_EXIT_BITMAP0", "EOI-exit bitmap 0", Secondary(S::VIRTUAL_INTERRUPT_DELIVERY);
    EoiExit1 = 0x201e, "EOI_EXIT_BITMAP1", "EOI-exit bitmap 1", Secondary(S::VIRTUAL_INTERRUPT_DELIVERY);
    EoiExit2 = 0x2020, "EOI_EXIT_BITMAP2", "EOI-exit bitmap 2", Secondary(S::VIRTUAL_INTERRUPT_DELIVERY);
    EoiExit3 = 0x2022, "EOI_EXIT_BITMAP3", "EOI-exit bitmap 3", Secondary(S::VIRTUAL_INTERRUPT_DELIVERY);
    EptpListAddress = 0x2024, "EPTP_LIST_ADDRESS", "EPTP-list address", EptpSwitching;
    VmreadBitmap = 0x2026, "VMREAD_BITMAP", "VMREAD-bitmap address", Secondary(S::VMCS_SHADOWING);
    VmwriteBitmap = 0x2028, "VMWRITE_BITMAP", "VMWRITE-bitmap address", Secondary(S::VMCS_SHADOWING);
    XssExitBitmap = 0x202c, "XSS_EXIT_BITMAP", "XSS-exiting bitmap", Secondary(S::ENABLE_XSAVES_XRSTORS);
    TscMultiplier = 0x2032, "TSC_MULTIPLIER", "TSC multiplier", Secondary(S::USE_TSC_SCALING);
    // Table B-5: 64-bit read-only data field.
    GuestPhysicalAddress = 0x2400, "GUEST_PHYSICAL_ADDRESS", "Guest-physical address", Secondary(S::ENABLE_EPT);
    // Table B-6: 64-bit guest-state fields.
    LinkPointer = 0x2800, "VMCS_LINK_POINTER", "VMCS link pointer", Always;
    GuestDebugctl = 0x2802, "GUEST_IA32_DEBUGCTL", "Guest IA32_DEBUGCTL", Always;
    GuestPat = 0x2804, "GUEST_IA32_PAT", "Guest IA32_PAT", EntryOrExit(N::LOAD_IA32_PAT, X::SAVE_IA32_PAT);
    GuestEfer = 0x2806, "GUEST_IA32_EFER", "Guest IA32_EFER", EntryOrExit(N::LOAD_IA32_EFER, X::SAVE_IA32_EFER);
    GuestPerfGlobalCtrl = 0x2808, "GUEST_IA32_PERF_GLOBAL_CTRL", "Guest IA32_PERF_GLOBAL_CTRL", Entry(N::LOAD_IA32_PERF_GLOBAL_CTRL);
    GuestPdpte0 = 0x280a, "GUEST_PDPTR0", "Guest PDPTE0", Secondary(S::ENABLE_EPT);
    GuestPdpte1 = 0x280c, "GUEST_PDPTR1", "Guest PDPTE1", Secondary(S::ENABLE_EPT);
    GuestPdpte2 = 0x280e, "GUEST_PDPTR2", "Guest PDPTE2", Secondary(S::ENABLE_EPT);
    GuestPdpte3 = 0x2810, "GUEST_PDPTR3", "Guest PDPTE3", Secondary(S::ENABLE_EPT);
    // Table B-7: 64-bit host-state fields.
    HostPat = 0x2c00, "HOST_IA32_PAT", "Host IA32_PAT", Exit(X::LOAD_IA32_PAT);
    HostEfer = 0x2c02, "HOST_IA32_EFER", "Host IA32_EFER", Exit(X::LOAD_IA32_EFER);
    HostPerfGlobalCtrl = 0x2c04, "HOST_IA32_PERF_GLOBAL_CTRL", "Host IA32_PERF_GLOBAL_CTRL", Exit(X::LOAD_IA32_PERF_GLOBAL_CTRL);
    // Table B-8: 32-bit control fields.
    PinControls = 0x4000, "PIN_BASED_VM_EXEC_CONTROL", "Pin-based VM-execution controls", Always;
    PrimaryControls = 0x4002, "CPU_BASED_VM_EXEC_CONTROL", "Primary processor-based VM-execution controls", Always;
    ExceptionBitmap = 0x4004, "EXCEPTION_BITMAP", "Exception bitmap", Always;
    PageFaultErrorCodeMask = 0x4006, "PAGE_FAULT_ERROR_CODE_MASK", "Page-fault error-code mask", Always;
    PageFaultErrorCodeMatch = 0x4008, "PAGE_FAULT_ERROR_CODE_MATCH", "Page-fault error-code match", Always;
    Cr3TargetCount = 0x400a, "CR3_TARGET_COUNT", "CR3-target count", Always;
    ExitControls = 0x400c, "VM_EXIT_CONTROLS", "Primary VM-exit controls", Always;
    ExitMsrStoreCount = 0x400e, "VM_EXIT_MSR_STORE_COUNT", "VM-exit MSR-store count", Always;
    ExitMsrLoadCount = 0x4010, "VM_EXIT_MSR_LOAD_COUNT", "VM-exit MSR-load count", Always;
    EntryControls = 0x4012, "VM_ENTRY_CONTROLS", "VM-entry controls", Always;
    EntryMsrLoadCount = 0x4014, "VM_ENTRY_MSR_LOAD_COUNT", "VM-entry MSR-load count", Always;
    EntryInterruptionInfo = 0x4016, "VM_ENTRY_INTR_INFO_FIELD", "VM-entry interruption-information field", Always;
    EntryErrorCode = 0x4018, "VM_ENTRY_EXCEPTION_ERROR_CODE", "VM-entry exception error code", Always;
    EntryInstructionLength = 0x401a, "VM_ENTRY_INSTRUCTION_LEN", "VM-entry instruction length", Always;
    TprThreshold = 0x401c, "TPR_THRESHOLD", "TPR threshold", Primary(C::USE_TPR_SHADOW);
    SecondaryControls = 0x401e, "SECONDARY_VM_EXEC_CONTROL", "Secondary processor-based VM-execution controls", Primary(C::SECONDARY_CONTROLS);
    PleGap = 0x4020, "PLE_GAP", "PLE_Gap", Secondary(S::PAUSE_LOOP_EXITING);
    PleWindow = 0x4022, "PLE_WINDOW", "PLE_Window", Secondary(S::PAUSE_LOOP_EXITING);
    // Table B-9: 32-bit read-only data fields.
    VmInstructionError = 0x4400, "VM_INSTRUCTION_ERROR", "VM-instruction error", Always;
    ExitReason = 0x4402, "VM_EXIT_REASON", "Exit reason", Always;
    ExitInterruptionInfo = 0x4404, "VM_EXIT_INTR_INFO", "VM-exit interruption information", Always;
    ExitInterruptionErrorCode = 0x4406, "VM_EXIT_INTR_ERROR_CODE", "VM-exit interruption error code", Always;
    IdtVectoringInfo = 0x4408, "IDT_VECTORING_INFO_FIELD", "IDT-vectoring information field", Always;
    IdtVectoringErrorCode = 0x440a, "IDT_VECTORING_ERROR_CODE", "IDT-vectoring error code", Always;
    ExitInstructionLength = 0x440c, "VM_EXIT_INSTRUCTION_LEN", "VM-exit instruction length", Always;
    ExitInstructionInfo = 0x440e, "VMX_INSTRUCTION_INFO", "VM-exit instruction information", Always;
    // Table B-10: 32-bit guest-state fields.
    GuestEsLimit = 0x4800, "GUEST_ES_LIMIT", "Guest ES limit", Always;
    GuestCsLimit = 0x4802, "GUEST_CS_LIMIT", "Guest CS limit", Always;
    GuestSsLimit = 0x4804, "GUEST_SS_LIMIT", "Guest SS limit", Always;
    GuestDsLimit = 0x4806, "GUEST_DS_LIMIT", "Guest DS limit", Always;
    GuestFsLimit = 0x4808, "GUEST_FS_LIMIT", "Guest FS limit", Always;
    GuestGsLimit = 0x480a, "GUEST_GS_LIMIT", "Guest GS limit", Always;
    GuestLdtrLimit = 0x480c, "GUEST_LDTR_LIMIT", "Guest LDTR limit", Always;
    GuestTrLimit = 0x480e, "GUEST_TR_LIMIT", "Guest TR limit", Always;
    GuestGdtrLimit = 0x4810, "GUEST_GDTR_LIMIT", "Guest GDTR limit", Always;
    GuestIdtrLimit = 0x4812, "GUEST_IDTR_LIMIT", "Guest IDTR limit", Always;
    GuestEsAccessRights = 0x4814, "GUEST_ES_AR_BYTES", "Guest ES access rights", Always;
    GuestCsAccessRights = 0x4816, "GUEST_CS_AR_BYTES", "Guest CS access rights", Always;
    GuestSsAccessRights = 0x4818, "GUEST_SS_AR_BYTES", "Guest SS access rights", Always;
    GuestDsAccessRights = 0x481a, "GUEST_DS_AR_BYTES", "Guest DS access rights", Always;
    GuestFsAccessRights = 0x481c, "GUEST_FS_AR_BYTES", "Guest FS access rights", Always;
    GuestGsAccessRights = 0x481e, "GUEST_GS_AR_BYTES", "Guest GS access rights", Always;
    GuestLdtrAccessRights = 0x4820, "GUEST_LDTR_AR_BYTES", "Guest LDTR access rights", Always;
    GuestTrAccessRights = 0x4822, "GUEST_TR_AR_BYTES", "Guest TR access rights", Always;
    GuestInterruptibility = 0x4824, "GUEST_INTERRUPTIBILITY_INFO", "Guest interruptibility state", Always;
    GuestActivity = 0x4826, "GUEST_ACTIVITY_STATE", "Guest activity state", Always;
    GuestSmbase = 0x4828, "GUEST_SMBASE", "Guest SMBASE", Always;
    GuestSysenterCs = 0x482a, "GUEST_SYSENTER_CS", "Guest IA32_SYSENTER_CS", Always;
    PreemptionTimer = 0x482e, "VMX_PREEMPTION_TIMER_VALUE", "VMX-preemption timer value", Pin(P::VMX_PREEMPTION_TIMER);
    // Table B-11: 32-bit host-state field.
    HostSysenterCs = 0x4c00, "HOST_IA32_SYSENTER_CS", "Host IA32_SYSENTER_CS", Always;
    // Table B-12: natural-width control fields.
    Cr0Mask = 0x6000, "CR0_GUEST_HOST_MASK", "CR0 guest/host mask", Always;
    Cr4Mask = 0x6002, "CR4_GUEST_HOST_MASK", "CR4 guest/host mask", Always;
    Cr0Shadow = 0x6004, "CR0_READ_SHADOW", "CR0 read shadow", Always;
    Cr4Shadow = 0x6006, "CR4_READ_SHADOW", "CR4 read shadow", Always;
    Cr3Target0 = 0x6008, "CR3_TARGET_VALUE0", "CR3-target value 0", Cr3Targets(1);
    Cr3Target1 = 0x600a, "CR3_TARGET_VALUE1", "CR3-target value 1", Cr3Targets(2);
    Cr3Target2 = 0x600c, "CR3_TARGET_VALUE2", "CR3-target value 2", Cr3Targets(3);
    Cr3Target3 = 0x600e, "CR3_TARGET_VALUE3", "CR3-target value 3", Cr3Targets(4);
    // Table B-13: natural-width read-only data fields.
    ExitQualification = 0x6400, "EXIT_QUALIFICATION", "Exit qualification", Always;
    IoRcx = 0x6402, "IO_RCX", "I/O RCX", Always;
    IoRsi = 0x6404, "IO_RSI", "I/O RSI", Always;
    IoRdi = 0x6406, "IO_RDI", "I/O RDI", Always;
    IoRip = 0x6408, "IO_RIP", "I/O RIP", Always;
    GuestLinearAddress = 0x640a, "GUEST_LINEAR_ADDRESS", "Guest-linear address", Always;
    // Table B-14: natural-width guest-state fields.
    GuestCr0 = 0x6800, "GUEST_CR0", "Guest CR0", Always;
    GuestCr3 = 0x6802, "GUEST_CR3", "Guest CR3", Always;
    GuestCr4 = 0x6804, "GUEST_CR4", "Guest CR4", Always;
    GuestEsBase = 0x6806, "GUEST_ES_BASE", "Guest ES base", Always;
    GuestCsBase = 0x6808, "GUEST_CS_BASE", "Guest CS base", Always;
    GuestSsBase = 0x680a, "GUEST_SS_BASE", "Guest SS base", Always;
    GuestDsBase = 0x680c, "GUEST_DS_BASE", "Guest DS base", Always;
    GuestFsBase = 0x680e, "GUEST_FS_BASE", "Guest FS base", Always;
    GuestGsBase = 0x6810, "GUEST_GS_BASE", "Guest GS base", Always;
    GuestLdtrBase = 0x6812, "GUEST_LDTR_BASE", "Guest LDTR base", Always;
    GuestTrBase = 0x6814, "GUEST_TR_BASE", "Guest TR base", Always;
    GuestGdtrBase = 0x6816, "GUEST_GDTR_BASE", "Guest GDTR base", Always;
    GuestIdtrBase = 0x6818, "GUEST_IDTR_BASE", "Guest IDTR base", Always;
    GuestDr7 = 0x681a, "GUEST_DR7", "Guest DR7", Always;
    GuestRsp = 0x681c, "GUEST_RSP", "Guest RSP", Always;
    GuestRip = 0x681e, "GUEST_RIP", "Guest RIP", Always;
    GuestRflags = 0x6820, "GUEST_RFLAGS", "Guest RFLAGS", Always;
    GuestPendingDebug = 0x6822, "GUEST_PENDING_DBG_EXCEPTIONS", "Guest pending debug exceptions", Always;
    GuestSysenterEsp = 0x6824, "GUEST_SYSENTER_ESP", "Guest IA32_SYSENTER_ESP", Always;
    GuestSysenterEip = 0x6826, "GUEST_SYSENTER_EIP", "Guest IA32_SYSENTER_EIP", Always;
    // Table B-15: natural-width host-state fields.
    HostCr0 = 0x6c00, "HOST_CR0", "Host CR0", Always;
    HostCr3 = 0x6c02, "HOST_CR3", "Host CR3", Always;
    HostCr4 = 0x6c04, "HOST_CR4", "Host CR4", Always;
    HostFsBase = 0x6c06, "HOST_FS_BASE", "Host FS base", Always;
    HostGsBase = 0x6c08, "HOST_GS_BASE", "Host GS base", Always;
    HostTrBase = 0x6c0a, "HOST_TR_BASE", "Host TR base", Always;
    HostGdtrBase = 0x6c0c, "HOST_GDTR_BASE", "Host GDTR base", Always;
    HostIdtrBase = 0x6c0e, "HOST_IDTR_BASE", "Host IDTR base", Always;
    HostSysenterEsp = 0x6c10, "HOST_IA32_SYSENTER_ESP", "Host IA32_SYSENTER_ESP", Always;
    HostSysenterEip = 0x6c12, "HOST_IA32_SYSENTER_EIP", "Host IA32_SYSENTER_EIP", Always;
    HostRsp = 0x6c14, "HOST_RSP", "Host RSP", Always;
    HostRip = 0x6c16, "HOST_RIP", "Host RIP", Always;
}

/// Bits of an encoding that select a field: width, type and index below 32. The table
/// has no index above 31.
const fn slot(encoding: u32) -> Option<usize> {
    if encoding & !0x6c3f != 0 {
        return None;
    }
    let (width, ty, index) = (encoding >> 13 & 3, encoding >> 10 & 3, encoding >> 1 & 0x1f);
    Some((width << 7 | ty << 5 | index) as usize)
}

const NO_FIELD: u8 = u8::MAX;

/// From [`slot`] to the index of the field.
const SLOTS: [u8; 512] = {
    assert!(Field::COUNT < NO_FIELD as usize);
    let mut slots = [NO_FIELD; 512];
    let mut i = 0;
    while i < Field::COUNT {
        match slot(Field::ALL[i].encoding()) {
            Some(s) => {
                assert!(slots[s] == NO_FIELD, "two fields with one encoding");
                slots[s] = i as u8;
            }
            None => panic!("an encoding with reserved bits or an index above 31"),
        }
        i += 1;
    }
    slots
};

impl Field {
    /// The field and the part of it that `encoding` names; `None` when there is no such
    /// field or a reserved bit is set. A high access is only defined for 64-bit fields.
    pub fn from_encoding(encoding: u32) -> Option<(Self, Access)> {
        let index = *SLOTS.get(slot(encoding)?)?;
        let field = *Self::ALL.get(index as usize)?;
        match (encoding & 1, field.width()) {
            (0, _) => Some((field, Access::Full)),
            (_, Width::Bits64) => Some((field, Access::High)),
            _ => None,
        }
    }

    /// Index in [`Field::ALL`] and in tables of [`Field::COUNT`] entries.
    pub const fn index(self) -> usize {
        self as usize
    }

    /// Its width.
    pub const fn width(self) -> Width {
        match self.encoding() >> 13 & 3 {
            0 => Width::Bits16,
            1 => Width::Bits64,
            2 => Width::Bits32,
            _ => Width::Natural,
        }
    }

    /// Its type.
    pub const fn field_type(self) -> FieldType {
        match self.encoding() >> 10 & 3 {
            0 => FieldType::Control,
            1 => FieldType::ReadOnly,
            2 => FieldType::Guest,
            _ => FieldType::Host,
        }
    }

    /// Whether it exists for an L1 that is offered `caps`.
    pub fn exists(self, caps: &Capabilities) -> bool {
        match self.existence() {
            Existence::Always => true,
            Existence::Pin(c) => caps.pin.may_be_one & c.bits() != 0,
            Existence::Primary(c) => caps.primary.may_be_one & c.bits() != 0,
            Existence::Secondary(c) => caps.secondary.may_be_one & c.bits() != 0,
            Existence::Entry(c) => caps.entry.may_be_one & c.bits() != 0,
            Existence::Exit(c) => caps.exit.may_be_one & c.bits() != 0,
            Existence::EntryOrExit(n, x) => {
                caps.entry.may_be_one & n.bits() != 0 || caps.exit.may_be_one & x.bits() != 0
            }
            Existence::Cr3Targets(n) => caps.cr3_targets() >= n,
            Existence::EptpSwitching => caps.vmfunc & 1 != 0,
        }
    }

    /// What VMREAD with this access and operand size gives for the field's value (SDM Vol.
    /// 3D chapter 31, VMREAD; Vol. 3C §25.11.2): zero-extended to the operand size, cut to it
    /// if the field is longer.
    pub const fn read_part(self, access: Access, size: OperandSize, value: u64) -> u64 {
        let part = match access {
            Access::Full => value & self.width().mask(),
            Access::High => value >> 32,
        };
        match size {
            OperandSize::Bits64 => part,
            OperandSize::Bits32 => part & 0xffff_ffff,
        }
    }

    /// The field's value after VMWRITE of `source` with this access and operand size, when
    /// it was `old` (SDM Vol. 3D chapter 31, VMWRITE; Vol. 3C §25.11.2): high bits of a source
    /// that is too long are ignored, of a field that is longer cleared; a high access
    /// leaves bits 31:0.
    pub const fn write_part(self, access: Access, size: OperandSize, old: u64, source: u64) -> u64 {
        let source = match size {
            OperandSize::Bits64 => source,
            OperandSize::Bits32 => source & 0xffff_ffff,
        };
        match access {
            Access::Full => source & self.width().mask(),
            Access::High => old & 0xffff_ffff | source << 32,
        }
    }
}

impl std::fmt::Display for Field {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of fields.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FieldSet([u64; Field::COUNT.div_ceil(64)]);

impl FieldSet {
    /// No field.
    pub const EMPTY: Self = Self([0; Field::COUNT.div_ceil(64)]);

    /// The fields that `keep` accepts.
    pub fn filter(keep: impl Fn(Field) -> bool) -> Self {
        let mut set = Self::EMPTY;
        Field::ALL.iter().filter(|f| keep(**f)).for_each(|f| set.insert(*f));
        set
    }
    /// Adds `field`.
    pub const fn insert(&mut self, field: Field) {
        self.0[field.index() / 64] |= 1 << (field.index() % 64);
    }
    /// Takes `field` out.
    pub const fn remove(&mut self, field: Field) {
        self.0[field.index() / 64] &= !(1 << (field.index() % 64));
    }
    /// Whether `field` is in it.
    pub const fn contains(&self, field: Field) -> bool {
        self.0[field.index() / 64] >> (field.index() % 64) & 1 != 0
    }
    /// The fields in it, in order of index.
    pub fn iter(&self) -> impl Iterator<Item = Field> + '_ {
        Field::ALL.iter().copied().filter(|f| self.contains(*f))
    }
    /// IA32_VMX_VMCS_ENUM (SDM Vol. 3D appendix A.9): the highest index value of these
    /// fields in bits 9:1.
    pub fn vmcs_enum(&self) -> u64 {
        self.iter().map(|f| f.encoding() as u64 & 0x3fe).max().unwrap_or(0)
    }
}

/// The bits that each field holds, by index.
pub(crate) const WIDTH_MASKS: [u64; Field::COUNT] = {
    let mut masks = [0; Field::COUNT];
    let mut i = 0;
    while i < Field::COUNT {
        masks[i] = Field::ALL[i].width().mask();
        i += 1;
    }
    masks
};

/// The fields of one guest segment register.
#[derive(Clone, Copy, Debug)]
pub struct SegmentFields {
    /// Selector.
    pub selector: Field,
    /// Base.
    pub base: Field,
    /// Limit.
    pub limit: Field,
    /// Access rights.
    pub access: Field,
}

macro_rules! segment_fields {
    ($($selector:ident $base:ident $limit:ident $access:ident;)*) => {
        [$(SegmentFields {
            selector: Field::$selector, base: Field::$base, limit: Field::$limit, access: Field::$access,
        },)*]
    };
}

/// ES, CS, SS, DS, FS, GS, LDTR, TR of the guest, indexed as [`x86_spec::segment::seg`].
pub const GUEST_SEGMENTS: [SegmentFields; 8] = segment_fields! {
    GuestEsSelector GuestEsBase GuestEsLimit GuestEsAccessRights;
    GuestCsSelector GuestCsBase GuestCsLimit GuestCsAccessRights;
    GuestSsSelector GuestSsBase GuestSsLimit GuestSsAccessRights;
    GuestDsSelector GuestDsBase GuestDsLimit GuestDsAccessRights;
    GuestFsSelector GuestFsBase GuestFsLimit GuestFsAccessRights;
    GuestGsSelector GuestGsBase GuestGsLimit GuestGsAccessRights;
    GuestLdtrSelector GuestLdtrBase GuestLdtrLimit GuestLdtrAccessRights;
    GuestTrSelector GuestTrBase GuestTrLimit GuestTrAccessRights;
};

/// The CR3-target values.
pub const CR3_TARGETS: [Field; 4] =
    [Field::Cr3Target0, Field::Cr3Target1, Field::Cr3Target2, Field::Cr3Target3];
/// The EOI-exit bitmap.
pub const EOI_EXIT: [Field; 4] = [Field::EoiExit0, Field::EoiExit1, Field::EoiExit2, Field::EoiExit3];
/// The guest's PDPTEs.
pub const GUEST_PDPTES: [Field; 4] =
    [Field::GuestPdpte0, Field::GuestPdpte1, Field::GuestPdpte2, Field::GuestPdpte3];

#[cfg(test)]
mod tests {
    use super::*;

    /// The `x86` crate's list of encodings is independent of this table.
    #[test]
    fn encodings_agree_with_another_table() {
        use x86_spec::vmcs_field::{control, guest, host, ro};
        for (field, encoding) in [
            (Field::Vpid, control::VPID),
            (Field::TscMultiplier, control::TSC_MULTIPLIER_FULL),
            (Field::EoiExit3, control::EOI_EXIT3_FULL),
            (Field::XssExitBitmap, control::XSS_EXITING_BITMAP_FULL),
            (Field::EptpListAddress, control::EPTP_LIST_ADDR_FULL),
            (Field::SecondaryControls, control::SECONDARY_PROCBASED_EXEC_CONTROLS),
            (Field::EntryInstructionLength, control::VMENTRY_INSTRUCTION_LEN),
            (Field::PleWindow, control::PLE_WINDOW),
            (Field::Cr3Target3, control::CR3_TARGET_VALUE3),
            (Field::PmlIndex, guest::PML_INDEX),
            (Field::GuestPdpte3, guest::PDPTE3_FULL),
            (Field::GuestIdtrLimit, guest::IDTR_LIMIT),
            (Field::GuestTrAccessRights, guest::TR_ACCESS_RIGHTS),
            (Field::PreemptionTimer, guest::VMX_PREEMPTION_TIMER_VALUE),
            (Field::GuestIdtrBase, guest::IDTR_BASE),
            (Field::GuestSysenterEip, guest::IA32_SYSENTER_EIP),
            (Field::HostTrSelector, host::TR_SELECTOR),
            (Field::HostPerfGlobalCtrl, host::IA32_PERF_GLOBAL_CTRL_FULL),
            (Field::HostRip, host::RIP),
            (Field::GuestPhysicalAddress, ro::GUEST_PHYSICAL_ADDR_FULL),
            (Field::ExitInstructionInfo, ro::VMEXIT_INSTRUCTION_INFO),
            (Field::GuestLinearAddress, ro::GUEST_LINEAR_ADDR),
        ] {
            assert_eq!(field.encoding(), encoding, "{}", field.name());
        }
    }

    #[test]
    fn every_field_is_found_by_its_encoding() {
        for (i, f) in Field::ALL.iter().enumerate() {
            assert_eq!(f.index(), i);
            assert_eq!(Field::from_encoding(f.encoding()), Some((*f, Access::Full)));
            // High access is for 64-bit fields alone (SDM Vol. 3C §25.11.2).
            let high = (f.width() == Width::Bits64).then_some((*f, Access::High));
            assert_eq!(Field::from_encoding(f.encoding() | 1), high, "{}", f.name());
            // Bit 12 and bits 31:15 are reserved (table 25-21).
            for reserved in [1 << 12, 1 << 15, 1 << 31, 1 << 9] {
                assert_eq!(Field::from_encoding(f.encoding() | reserved), None);
            }
        }
        assert_eq!(Field::from_encoding(0x202a), None, "#VE information is not offered");
    }

    /// SDM Vol. 3D chapter 31, VMREAD and VMWRITE.
    #[test]
    fn operand_sizes() {
        use Access::*;
        use OperandSize::*;
        let v = 0x1122_3344_5566_7788;
        let (w16, w32, w64, nat) = (Field::Vpid, Field::PinControls, Field::TscOffset, Field::GuestRip);
        assert_eq!(w16.write_part(Full, Bits64, 0, v), 0x7788);
        assert_eq!(w32.write_part(Full, Bits64, 0, v), 0x5566_7788);
        assert_eq!(w64.write_part(Full, Bits64, 0, v), v);
        assert_eq!(w64.write_part(Full, Bits32, u64::MAX, v), 0x5566_7788);
        assert_eq!(w64.write_part(High, Bits64, 0xaaaa_aaaa_bbbb_bbbb, v), 0x5566_7788_bbbb_bbbb);
        assert_eq!(w64.write_part(High, Bits32, 0xaaaa_aaaa_bbbb_bbbb, v), 0x5566_7788_bbbb_bbbb);
        assert_eq!(nat.write_part(Full, Bits32, u64::MAX, v), 0x5566_7788);
        assert_eq!(w64.read_part(Full, Bits64, v), v);
        assert_eq!(w64.read_part(Full, Bits32, v), 0x5566_7788);
        assert_eq!(w64.read_part(High, Bits64, v), 0x1122_3344);
        assert_eq!(w64.read_part(High, Bits32, v), 0x1122_3344);
        assert_eq!(nat.read_part(Full, Bits32, v), 0x5566_7788);
    }

    /// Appendix A.9: the highest index in the table is TSC multiplier's, 19H.
    #[test]
    fn highest_index() {
        assert_eq!(FieldSet::filter(|_| true).vmcs_enum(), 0x32);
        let few = FieldSet::filter(|f| f != Field::TscMultiplier && f.encoding() & 0x3fe <= 0x20);
        assert_eq!(few.vmcs_enum(), 0x20);
        assert_eq!(FieldSet::EMPTY.vmcs_enum(), 0);
    }
}
