//! The VMCS that L0 enters an engine with (SDM Vol. 3C ch. 25): VMCS01 and VMCS02.
//!
//! There is no host-state area: an exit returns to L0's Rust code.

use memory::MachineAddr;
use x86_spec::controls::{EntryControls, ExitControls, PinbasedControls, PrimaryControls, SecondaryControls};
use x86_spec::interruption::InterruptionInfo;
use x86_spec::reg::{cr0, dr, rflags};
use x86_spec::segment::{AccessRights, seg};

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes (granularity applied).
    pub limit: u32,
    /// Access rights in VMCS format.
    pub access: AccessRights,
    /// Selector.
    pub selector: u16,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct DescriptorTable {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
}

/// Activity state (SDM Vol. 3C §25.4.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u32)]
pub enum Activity {
    /// Executing.
    #[default]
    Active = 0,
    /// HLT.
    Hlt = 1,
    /// Shutdown after a triple fault.
    Shutdown = 2,
    /// Waiting for a start-up IPI.
    WaitForSipi = 3,
}

/// Interruptibility state bits (SDM Vol. 3C table 25-3).
pub mod interruptibility {
    /// Blocking by STI.
    pub const STI: u32 = 1 << 0;
    /// Blocking by MOV SS.
    pub const MOV_SS: u32 = 1 << 1;
    /// Blocking by SMI.
    pub const SMI: u32 = 1 << 2;
    /// Blocking by NMI (virtual NMI where that control is 1).
    pub const NMI: u32 = 1 << 3;
}

/// Pending debug exception bits (SDM Vol. 3C table 25-4).
pub mod pending_debug {
    /// B0–B3.
    pub const B: u64 = 0xf;
    /// An enabled breakpoint was met.
    pub const ENABLED_BREAKPOINT: u64 = 1 << 12;
    /// Single step.
    pub const BS: u64 = 1 << 14;
}

/// Guest state (SDM Vol. 3C §25.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestState {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// DR7.
    pub dr7: u64,
    /// RSP.
    pub rsp: u64,
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS, LDTR, TR, indexed by [`seg`].
    pub segments: [Segment; 8],
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// IA32_DEBUGCTL.
    pub debugctl: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_PERF_GLOBAL_CTRL.
    pub perf_global_ctrl: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// Activity state.
    pub activity: Activity,
    /// Interruptibility state.
    pub interruptibility: u32,
    /// Pending debug exceptions.
    pub pending_debug: u64,
    /// PDPTEs, used with EPT and PAE paging.
    pub pdptes: [u64; 4],
    /// VMX-preemption timer value.
    pub preemption_timer: u32,
    /// Guest interrupt status: RVI in bits 7:0, SVI in bits 15:8.
    pub interrupt_status: u16,
    /// PML index.
    pub pml_index: u16,
}

impl Default for GuestState {
    /// The state after RESET (SDM Vol. 3A table 9-1).
    fn default() -> Self {
        let data = Segment { base: 0, limit: 0xffff, access: AccessRights(0x93), selector: 0 };
        let mut segments = [data; 8];
        segments[seg::CS] =
            Segment { base: 0xffff_0000, limit: 0xffff, access: AccessRights(0x9b), selector: 0xf000 };
        segments[seg::LDTR].access = AccessRights(0x82);
        segments[seg::TR].access = AccessRights(0x8b);
        Self {
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr3: 0,
            cr4: 0,
            dr7: dr::DR7_FIXED1,
            rsp: 0,
            rip: 0xfff0,
            rflags: rflags::FIXED1,
            segments,
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            debugctl: 0,
            sysenter_cs: 0,
            sysenter_esp: 0,
            sysenter_eip: 0,
            perf_global_ctrl: 0,
            pat: 0x0007_0406_0007_0406,
            efer: 0,
            activity: Activity::Active,
            interruptibility: 0,
            pending_debug: 0,
            pdptes: [0; 4],
            preemption_timer: 0,
            interrupt_status: 0,
            pml_index: 511,
        }
    }
}

/// Controls (SDM Vol. 3C §25.6–25.8). Addresses are machine addresses.
#[derive(Clone, Debug)]
pub struct Controls {
    /// Pin-based.
    pub pin: PinbasedControls,
    /// Primary processor-based.
    pub primary: PrimaryControls,
    /// Secondary processor-based.
    pub secondary: SecondaryControls,
    /// VM exit.
    pub exit: ExitControls,
    /// VM entry.
    pub entry: EntryControls,
    /// Exception bitmap.
    pub exception_bitmap: u32,
    /// Page-fault error-code mask.
    pub pfec_mask: u32,
    /// Page-fault error-code match.
    pub pfec_match: u32,
    /// I/O bitmap A (ports 0–7FFFH).
    pub io_bitmap_a: MachineAddr,
    /// I/O bitmap B (ports 8000H–FFFFH).
    pub io_bitmap_b: MachineAddr,
    /// MSR bitmap.
    pub msr_bitmap: MachineAddr,
    /// TSC offset.
    pub tsc_offset: u64,
    /// TSC multiplier, 48 fractional bits.
    pub tsc_multiplier: u64,
    /// CR0 guest/host mask.
    pub cr0_mask: u64,
    /// CR4 guest/host mask.
    pub cr4_mask: u64,
    /// CR0 read shadow.
    pub cr0_shadow: u64,
    /// CR4 read shadow.
    pub cr4_shadow: u64,
    /// CR3-target values.
    pub cr3_targets: [u64; 4],
    /// How many of them count.
    pub cr3_target_count: u32,
    /// APIC-access page.
    pub apic_access: MachineAddr,
    /// Virtual-APIC page.
    pub virtual_apic: MachineAddr,
    /// TPR threshold.
    pub tpr_threshold: u32,
    /// EOI-exit bitmap.
    pub eoi_exit: [u64; 4],
    /// Posted-interrupt notification vector.
    pub posted_vector: u8,
    /// Posted-interrupt descriptor.
    pub posted_descriptor: MachineAddr,
    /// EPT pointer (root is a machine address).
    pub eptp: u64,
    /// VPID.
    pub vpid: u16,
    /// PLE_Gap.
    pub ple_gap: u32,
    /// PLE_Window.
    pub ple_window: u32,
    /// VM-function controls.
    pub vm_functions: u64,
    /// EPTP list.
    pub eptp_list: MachineAddr,
    /// VMREAD bitmap.
    pub vmread_bitmap: MachineAddr,
    /// VMWRITE bitmap.
    pub vmwrite_bitmap: MachineAddr,
    /// The shadow VMCS (the VMCS link pointer); all ones if there is none.
    pub shadow_vmcs: MachineAddr,
    /// PML address.
    pub pml: MachineAddr,
    /// XSS-exiting bitmap.
    pub xss_exit_bitmap: u64,
    /// Event to inject at the next entry; the engine clears the valid bit.
    pub entry_interruption: InterruptionInfo,
    /// Its error code.
    pub entry_error_code: u32,
    /// Its instruction length, for software events.
    pub entry_instruction_length: u32,
    /// An engine that can't give exits for them may keep to itself: CPUID (answered from the table of
    /// [`crate::Vcpu::set_cpuid`]), XSETBV, accesses to CR8 (whose value then goes through
    /// [`crate::GuestRegs::cr8`]), WBINVD, RDPMC, MONITOR and MWAIT, and accesses to bits of CR0 and CR4 that
    /// are host-owned. No field of a VMCS: L0 allows it for VMCS01 only.
    pub lenient: bool,
}

impl Default for Controls {
    fn default() -> Self {
        Self {
            pin: PinbasedControls::empty(),
            primary: PrimaryControls::empty(),
            secondary: SecondaryControls::empty(),
            exit: ExitControls::empty(),
            entry: EntryControls::empty(),
            exception_bitmap: 0,
            pfec_mask: 0,
            pfec_match: 0,
            io_bitmap_a: MachineAddr(0),
            io_bitmap_b: MachineAddr(0),
            msr_bitmap: MachineAddr(0),
            tsc_offset: 0,
            tsc_multiplier: 1 << 48,
            cr0_mask: 0,
            cr4_mask: 0,
            cr0_shadow: 0,
            cr4_shadow: 0,
            cr3_targets: [0; 4],
            cr3_target_count: 0,
            apic_access: MachineAddr(0),
            virtual_apic: MachineAddr(0),
            tpr_threshold: 0,
            eoi_exit: [0; 4],
            posted_vector: 0,
            posted_descriptor: MachineAddr(0),
            eptp: 0,
            vpid: 0,
            ple_gap: 0,
            ple_window: 0,
            vm_functions: 0,
            eptp_list: MachineAddr(0),
            vmread_bitmap: MachineAddr(0),
            vmwrite_bitmap: MachineAddr(0),
            shadow_vmcs: MachineAddr(u64::MAX),
            pml: MachineAddr(0),
            xss_exit_bitmap: 0,
            entry_interruption: InterruptionInfo::NONE,
            entry_error_code: 0,
            entry_instruction_length: 0,
            lenient: false,
        }
    }
}

/// Guest state and controls of one context.
#[derive(Clone, Debug, Default)]
pub struct EngineVmcs {
    /// Guest state.
    pub guest: GuestState,
    /// Controls.
    pub controls: Controls,
}
