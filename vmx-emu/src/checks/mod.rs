//! The checks of VM entry (SDM Vol. 3C §27.2 and §27.3.1), one function each.
//!
//! [`CHECKS`] lists them in the order of the manual. [`run`] performs all of them and
//! collects every failure for the user; [`Report::architectural`] is the one answer that L1
//! gets.
//!
//! Where the SDM leaves a choice to the processor, L0 chooses: injection of an NMI requires
//! that blocking by STI is 0 (qualification 3); PDPTEs are checked at every entry with PAE
//! paging; more than one check may fail, and the answer is that of the first in the
//! registry.
//!
//! Not here: the checks before these (§27.1: launch state, blocking by MOV SS), which are the
//! instructions'; loading of MSRs (§27.4), which the caller reports to
//! [`Report::msr_loading`]; rules for features that L1 is never offered (SMM's dual-monitor
//! treatment beyond its controls being 0, CET, LAM, PKS, user interrupts, processor trace,
//! LBR, MPX, SGX, RTM, 5-level paging, tertiary and secondary exit controls): their control
//! and register bits are reserved, and the checks on reserved bits find them.

mod controls_entry;
mod controls_execution;
mod controls_exit;
mod guest_registers;
mod guest_segments;
mod guest_state;
mod host;
mod report;
mod rules;
#[cfg(test)]
mod tests;

use memory::L1Gpa;
use x86_spec::controls::{
    EntryControls as N, ExitControls as X, PinbasedControls as P, PrimaryControls as C,
    SecondaryControls as S,
};
use x86_spec::interruption::InterruptionInfo;
use x86_spec::reg::{cr0, cr4, rflags};

pub use report::{Answer, Failure, Findings, Report};

use crate::{Capabilities, Field, Vmcs12};

/// Why a VM entry fails with exit reason 33, as its exit qualification tells (SDM Vol. 3C
/// §27.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum GuestCause {
    /// None of the others.
    Other = 0,
    /// Loading the PDPTEs.
    Pdptes = 2,
    /// Injecting an NMI into a guest that blocks events by STI.
    NmiBlockedBySti = 3,
    /// The VMCS link pointer.
    LinkPointer = 4,
}

/// What a check is about. It decides how a VM entry fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Area {
    /// VM-execution control fields: VM-instruction error 7.
    ExecutionControls,
    /// VM-exit control fields: VM-instruction error 7.
    ExitControls,
    /// VM-entry control fields: VM-instruction error 7.
    EntryControls,
    /// Host-state area: VM-instruction error 8.
    HostState,
    /// Guest-state area: exit reason 33.
    GuestState(GuestCause),
    /// MSR loading: exit reason 34.
    MsrLoading,
}

impl Area {
    /// One of the three areas of controls.
    pub const fn is_controls(self) -> bool {
        matches!(self, Self::ExecutionControls | Self::ExitControls | Self::EntryControls)
    }
}

/// One check.
pub struct Check {
    /// Its name, unique and stable.
    pub name: &'static str,
    /// Its section in the SDM, volume 3C.
    pub section: &'static str,
    /// What it is about.
    pub area: Area,
    /// Performs it.
    pub run: fn(&Context, &mut Findings),
}

/// L1-physical memory, for the checks that look into it.
///
/// Reads never fail, as on a bus: what is not RAM reads as ones.
pub trait ReadPhysical {
    /// Reads `buf.len()` bytes at `at`.
    fn read(&self, at: L1Gpa, buf: &mut [u8]);
}

impl<F: Fn(L1Gpa, &mut [u8])> ReadPhysical for F {
    fn read(&self, at: L1Gpa, buf: &mut [u8]) {
        self(at, buf);
    }
}

/// Which values of MSR fields have no reserved bits on L1's processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrBits {
    /// Bits of IA32_EFER that may be 1.
    pub efer: u64,
    /// Bits of IA32_DEBUGCTL that may be 1.
    pub debugctl: u64,
    /// Bits of IA32_PERF_GLOBAL_CTRL that may be 1.
    pub perf_global_ctrl: u64,
}

/// All that a check can look at.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The current VMCS of L1.
    pub vmcs: &'a Vmcs12,
    /// The current-VMCS pointer.
    pub current_vmcs: L1Gpa,
    /// What L1 is offered.
    pub caps: &'a Capabilities,
    /// Reserved bits of MSRs.
    pub msr_bits: MsrBits,
    /// Width of linear addresses of L1's processor in bits: 48, or 57 with 5-level paging.
    pub linear_bits: u8,
    /// IA32_EFER.LMA of L1 at VM entry.
    pub l1_long_mode: bool,
    /// L1's memory.
    pub memory: &'a dyn ReadPhysical,
}

impl Context<'_> {
    /// A field of the VMCS.
    #[inline]
    pub fn get(&self, field: Field) -> u64 {
        self.vmcs.get(field)
    }
    /// The low 32 bits of a field.
    #[inline]
    pub fn get32(&self, field: Field) -> u32 {
        self.vmcs.get32(field)
    }
    /// Whether all these pin-based controls are 1.
    pub fn pin(&self, c: P) -> bool {
        self.get32(Field::PinControls) & c.bits() == c.bits()
    }
    /// Whether all these primary controls are 1.
    pub fn primary(&self, c: C) -> bool {
        self.get32(Field::PrimaryControls) & c.bits() == c.bits()
    }
    /// Whether all these secondary controls are 1. Without "activate secondary controls" none
    /// is (SDM Vol. 3C §25.6.2).
    pub fn secondary(&self, c: S) -> bool {
        self.primary(C::SECONDARY_CONTROLS) && self.get32(Field::SecondaryControls) & c.bits() == c.bits()
    }
    /// Whether all these exit controls are 1.
    pub fn exit(&self, c: X) -> bool {
        self.get32(Field::ExitControls) & c.bits() == c.bits()
    }
    /// Whether all these entry controls are 1.
    pub fn entry(&self, c: N) -> bool {
        self.get32(Field::EntryControls) & c.bits() == c.bits()
    }
    /// The guest will be in IA-32e mode.
    pub fn ia32e_guest(&self) -> bool {
        self.entry(N::IA32E_MODE_GUEST)
    }
    /// L1 returns to 64-bit mode.
    pub fn host_64(&self) -> bool {
        self.exit(X::HOST_ADDRESS_SPACE_SIZE)
    }
    /// The guest will be in virtual-8086 mode.
    pub fn virtual_8086(&self) -> bool {
        self.get(Field::GuestRflags) & rflags::VM != 0
    }
    /// The guest is an unrestricted one.
    pub fn unrestricted(&self) -> bool {
        self.secondary(S::UNRESTRICTED_GUEST)
    }
    /// The guest will use PAE paging.
    pub fn pae_paging(&self) -> bool {
        self.get(Field::GuestCr0) & cr0::PG != 0
            && self.get(Field::GuestCr4) & cr4::PAE != 0
            && !self.ia32e_guest()
    }
    /// The event to inject, if there is one.
    pub fn injection(&self) -> Option<InterruptionInfo> {
        let info = InterruptionInfo(self.get32(Field::EntryInterruptionInfo));
        info.is_valid().then_some(info)
    }
}

macro_rules! registry {
    ($($area:expr, $section:literal, $module:ident: $($name:ident)*;)*) => {
        /// Every check, in the order of the manual.
        pub static CHECKS: &[Check] = &[$($(
            Check { name: stringify!($name), section: $section, area: $area, run: $module::$name },
        )*)*];

        /// Calls each check by its name rather than through [`CHECKS`], so that the compiler can
        /// see into it: this is on the path of every entry to L2.
        fn run_all(context: &Context, report: &mut Report) {
            let mut checks = CHECKS.iter();
            $($(
                if let Some(check) = checks.next() {
                    $module::$name(context, &mut Findings::new(context.vmcs, check, report));
                }
            )*)*
        }
    };
}

registry! {
    Area::ExecutionControls, "27.2.1.1", controls_execution:
        pin_controls_reserved
        primary_controls_reserved
        secondary_controls_reserved
        cr3_target_count
        io_bitmap_addresses
        msr_bitmap_address
        virtual_apic_address
        tpr_threshold_reserved
        tpr_threshold_against_vtpr
        virtual_nmis_need_nmi_exiting
        nmi_window_needs_virtual_nmis
        apic_access_address
        apic_virtualization_needs_tpr_shadow
        x2apic_excludes_apic_accesses
        virtual_interrupts_need_interrupt_exiting
        posted_interrupts_need_virtual_interrupts
        posted_interrupts_need_acknowledge
        posted_interrupt_vector
        posted_interrupt_descriptor
        vpid_not_zero
        eptp_memory_type
        eptp_walk_length
        eptp_accessed_dirty
        eptp_reserved_bits
        pml_needs_ept
        pml_address
        unrestricted_guest_needs_ept
        mode_based_execute_needs_ept
        vm_function_controls_reserved
        eptp_switching_needs_ept
        eptp_list_address
        vmcs_shadowing_bitmaps
        tsc_multiplier_not_zero;
    Area::ExitControls, "27.2.1.2", controls_exit:
        exit_controls_reserved
        save_preemption_timer_needs_timer
        exit_msr_store_area
        exit_msr_load_area;
    Area::EntryControls, "27.2.1.3", controls_entry:
        entry_controls_reserved
        injection_type
        injection_vector
        injection_error_code_required
        injection_error_code_forbidden
        injection_reserved_bits
        injection_error_code_value
        injection_instruction_length
        entry_msr_load_area
        entry_smm_controls;
    Area::HostState, "27.2.2", host:
        host_cr0
        host_cr4
        host_cr3
        host_sysenter
        host_perf_global_ctrl
        host_pat
        host_efer_reserved
        host_efer_mode;
    Area::HostState, "27.2.3", host:
        host_selector_rpl_ti
        host_cs_tr_not_null
        host_ss_not_null
        host_bases_canonical;
    Area::HostState, "27.2.4", host:
        legacy_mode_address_spaces
        long_mode_host_address_space
        host_32_bit_state
        host_64_bit_state;
    Area::GuestState(GuestCause::Other), "27.3.1.1", guest_registers:
        guest_cr0
        guest_paging_needs_protection
        guest_cr4
        guest_debugctl
        guest_ia32e_paging
        guest_pcid_needs_ia32e
        guest_cr3
        guest_dr7
        guest_sysenter
        guest_perf_global_ctrl
        guest_pat
        guest_efer_reserved
        guest_efer_lma
        guest_efer_lme;
    Area::GuestState(GuestCause::Other), "27.3.1.2", guest_segments:
        tr_selector_ti
        ldtr_selector_ti
        ss_selector_rpl
        v8086_segment_bases
        tr_fs_gs_bases_canonical
        ldtr_base_canonical
        cs_base_high
        ss_ds_es_bases_high
        v8086_segment_limits
        v8086_segment_access_rights
        cs_type
        ss_type
        data_segments_accessed
        data_segments_readable
        segments_not_system
        cs_dpl
        ss_dpl_rpl
        ss_dpl_zero
        data_segments_dpl
        segments_present
        segments_reserved_low
        cs_default_size
        segments_granularity
        segments_reserved_high
        tr_type
        tr_system
        tr_present
        tr_reserved_low
        tr_granularity
        tr_usable
        tr_reserved_high
        ldtr_type
        ldtr_system
        ldtr_present
        ldtr_reserved_low
        ldtr_granularity
        ldtr_reserved_high;
    Area::GuestState(GuestCause::Other), "27.3.1.3", guest_state:
        descriptor_table_bases
        descriptor_table_limits;
    Area::GuestState(GuestCause::Other), "27.3.1.4", guest_state:
        guest_rip
        rflags_reserved
        rflags_virtual_8086
        rflags_interrupt_flag;
    Area::GuestState(GuestCause::Other), "27.3.1.5", guest_state:
        activity_supported
        activity_hlt_cpl
        activity_blocking
        activity_injection
        interruptibility_reserved
        interruptibility_sti_and_mov_ss
        interruptibility_sti_needs_if
        interruptibility_external_interrupt
        interruptibility_nmi_mov_ss
        interruptibility_smi
        interruptibility_virtual_nmi
        interruptibility_enclave
        pending_debug_reserved
        pending_debug_single_step
        pending_debug_no_single_step
        pending_debug_rtm;
    Area::GuestState(GuestCause::NmiBlockedBySti), "27.3.1.5", guest_state:
        interruptibility_nmi_sti;
    Area::GuestState(GuestCause::LinkPointer), "27.3.1.5", guest_state:
        link_pointer_address
        link_pointer_revision
        link_pointer_shadow_indicator
        link_pointer_not_current;
    Area::GuestState(GuestCause::Pdptes), "27.3.1.6", guest_state:
        guest_pdptes
        memory_pdptes;
}

/// Performs every check. Allocates nothing when none fails.
pub fn run(context: &Context) -> Report {
    let mut report = Report::default();
    run_all(context, &mut report);
    report
}
