//! SDM Vol. 3C §27.2.1.1–27.2.1.3.

use x86_spec::caps::ept_vpid;
use x86_spec::controls::{
    EntryControls as N, ExitControls as X, PinbasedControls as P, PrimaryControls as C,
    SecondaryControls as S,
};
use x86_spec::interruption::EventType as T;
use x86_spec::reg::cr0;

use super::setup::{APIC_PAGE, BEYOND, Setup};
use super::{Case, fail, pass};
use crate::Field::*;

/// Virtual-interrupt delivery with what it needs.
fn virtual_interrupts(s: &mut Setup) -> &mut Setup {
    s.on(S::VIRTUAL_INTERRUPT_DELIVERY)
}

/// Posted interrupts with what they need.
fn posted(s: &mut Setup) -> &mut Setup {
    virtual_interrupts(s)
        .on(P::POSTED_INTERRUPTS)
        .set(PostedInterruptVector, 0xf2)
        .set(PostedInterruptDescriptor, 0x8040)
}

/// VM functions with EPTP switching.
fn switching(s: &mut Setup) -> &mut Setup {
    s.on(S::ENABLE_VM_FUNCTIONS).set(VmFunctionControls, 1).set(EptpListAddress, 0x9000)
}

fn shadowing(s: &mut Setup) -> &mut Setup {
    s.on(S::VMCS_SHADOWING).set(VmreadBitmap, 0xa000).set(VmwriteBitmap, 0xb000)
}

fn vtpr(s: &mut Setup, value: u8) -> &mut Setup {
    s.store(APIC_PAGE + 0x80, &[value])
}

pub const CASES: &[Case] = &[
    // §27.2.1.1
    pass("pin_controls_reserved", |s| {
        s.on(P::VMX_PREEMPTION_TIMER);
    }),
    fail(&["pin_controls_reserved"], |s| {
        s.clear(PinControls, 1 << 1);
    }),
    fail(&["pin_controls_reserved"], |s| {
        s.or(PinControls, 1 << 8);
    }),
    fail(&["pin_controls_reserved"], |s| {
        s.caps.pin.may_be_one &= !P::NMI_EXITING.bits();
    }),
    pass("primary_controls_reserved", |s| {
        s.on(C::MOV_DR_EXITING | C::USE_TSC_OFFSETTING | C::UNCOND_IO_EXITING);
    }),
    fail(&["primary_controls_reserved"], |s| {
        s.clear(PrimaryControls, 1 << 26);
    }),
    fail(&["primary_controls_reserved"], |s| {
        s.or(PrimaryControls, 1 << 0);
    }),
    // Tertiary controls are not offered.
    fail(&["primary_controls_reserved"], |s| {
        s.or(PrimaryControls, 1 << 17);
    }),
    pass("secondary_controls_reserved", |s| {
        s.on(S::ENABLE_INVPCID | S::ENABLE_XSAVES_XRSTORS | S::WBINVD_EXITING | S::DTABLE_EXITING);
    }),
    // Without "activate secondary controls" the field is not looked at.
    pass("secondary_controls_reserved", |s| {
        s.off(C::SECONDARY_CONTROLS).set(SecondaryControls, 0xffff_ffff);
    }),
    fail(&["secondary_controls_reserved"], |s| {
        s.on(S::EPT_VIOLATION_VE);
    }),
    pass("cr3_target_count", |s| {
        s.set(Cr3TargetCount, 4);
    }),
    fail(&["cr3_target_count"], |s| {
        s.set(Cr3TargetCount, 5);
    }),
    pass("io_bitmap_addresses", |s| {
        s.on(C::USE_IO_BITMAPS).set(IoBitmapA, BEYOND - 0x1000).set(IoBitmapB, 0x2000);
    }),
    pass("io_bitmap_addresses", |s| {
        s.set(IoBitmapA, 1).set(IoBitmapB, BEYOND);
    }),
    fail(&["io_bitmap_addresses"], |s| {
        s.on(C::USE_IO_BITMAPS).set(IoBitmapA, 0x800);
    }),
    fail(&["io_bitmap_addresses"], |s| {
        s.on(C::USE_IO_BITMAPS).set(IoBitmapB, BEYOND);
    }),
    pass("msr_bitmap_address", |s| {
        s.set(MsrBitmap, 0);
    }),
    pass("msr_bitmap_address", |s| {
        s.off(C::USE_MSR_BITMAPS).set(MsrBitmap, u64::MAX);
    }),
    fail(&["msr_bitmap_address"], |s| {
        s.set(MsrBitmap, 0x3001);
    }),
    fail(&["msr_bitmap_address"], |s| {
        s.set(MsrBitmap, BEYOND);
    }),
    pass("virtual_apic_address", |s| {
        s.off(C::USE_TPR_SHADOW).set(VirtualApicAddress, u64::MAX);
    }),
    fail(&["virtual_apic_address"], |s| {
        s.set(VirtualApicAddress, APIC_PAGE + 0x80);
    }),
    fail(&["virtual_apic_address"], |s| {
        s.set(VirtualApicAddress, BEYOND | APIC_PAGE);
    }),
    // With virtual-interrupt delivery the threshold is not looked at.
    pass("tpr_threshold_reserved", |s| {
        virtual_interrupts(s).set(TprThreshold, 0x10);
    }),
    fail(&["tpr_threshold_reserved"], |s| {
        s.set(TprThreshold, 0x10);
    }),
    pass("tpr_threshold_against_vtpr", |s| {
        vtpr(s, 0x50).set(TprThreshold, 5);
    }),
    pass("tpr_threshold_against_vtpr", |s| {
        s.on(S::VIRTUALIZE_APIC).set(TprThreshold, 5);
    }),
    pass("tpr_threshold_against_vtpr", |s| {
        virtual_interrupts(s).set(TprThreshold, 5);
    }),
    fail(&["tpr_threshold_against_vtpr"], |s| {
        vtpr(s, 0x4f).set(TprThreshold, 5);
    }),
    pass("virtual_nmis_need_nmi_exiting", |s| {
        s.off(P::NMI_EXITING | P::VIRTUAL_NMIS);
    }),
    fail(&["virtual_nmis_need_nmi_exiting"], |s| {
        s.off(P::NMI_EXITING);
    }),
    pass("nmi_window_needs_virtual_nmis", |s| {
        s.on(C::NMI_WINDOW_EXITING);
    }),
    fail(&["nmi_window_needs_virtual_nmis"], |s| {
        s.on(C::NMI_WINDOW_EXITING).off(P::VIRTUAL_NMIS);
    }),
    pass("apic_access_address", |s| {
        s.on(S::VIRTUALIZE_APIC).set(ApicAccessAddress, 0xfee0_0000);
    }),
    fail(&["apic_access_address"], |s| {
        s.on(S::VIRTUALIZE_APIC).set(ApicAccessAddress, 0xfee0_0010);
    }),
    fail(&["apic_access_address"], |s| {
        s.on(S::VIRTUALIZE_APIC).set(ApicAccessAddress, BEYOND);
    }),
    pass("apic_virtualization_needs_tpr_shadow", |s| {
        virtual_interrupts(s).on(S::VIRTUALIZE_X2APIC | S::VIRTUALIZE_APIC_REGISTER);
    }),
    fail(&["apic_virtualization_needs_tpr_shadow"], |s| {
        s.off(C::USE_TPR_SHADOW).on(S::VIRTUALIZE_X2APIC);
    }),
    fail(&["apic_virtualization_needs_tpr_shadow"], |s| {
        s.off(C::USE_TPR_SHADOW).on(S::VIRTUALIZE_APIC_REGISTER);
    }),
    fail(&["apic_virtualization_needs_tpr_shadow"], |s| {
        virtual_interrupts(s).off(C::USE_TPR_SHADOW);
    }),
    pass("x2apic_excludes_apic_accesses", |s| {
        s.on(S::VIRTUALIZE_X2APIC);
    }),
    fail(&["x2apic_excludes_apic_accesses"], |s| {
        s.on(S::VIRTUALIZE_X2APIC | S::VIRTUALIZE_APIC);
    }),
    pass("virtual_interrupts_need_interrupt_exiting", |s| {
        virtual_interrupts(s);
    }),
    fail(&["virtual_interrupts_need_interrupt_exiting"], |s| {
        virtual_interrupts(s).off(P::EXTERNAL_INTERRUPT_EXITING);
    }),
    pass("posted_interrupts_need_virtual_interrupts", |s| {
        posted(s);
    }),
    fail(&["posted_interrupts_need_virtual_interrupts"], |s| {
        posted(s).off(S::VIRTUAL_INTERRUPT_DELIVERY);
    }),
    pass("posted_interrupts_need_acknowledge", |s| {
        s.off(X::ACK_INTERRUPT_ON_EXIT);
    }),
    fail(&["posted_interrupts_need_acknowledge"], |s| {
        posted(s).off(X::ACK_INTERRUPT_ON_EXIT);
    }),
    pass("posted_interrupt_vector", |s| {
        posted(s).set(PostedInterruptVector, 0xff);
    }),
    fail(&["posted_interrupt_vector"], |s| {
        posted(s).set(PostedInterruptVector, 0x100);
    }),
    pass("posted_interrupt_descriptor", |s| {
        posted(s).set(PostedInterruptDescriptor, BEYOND - 0x40);
    }),
    fail(&["posted_interrupt_descriptor"], |s| {
        posted(s).set(PostedInterruptDescriptor, 0x8020);
    }),
    fail(&["posted_interrupt_descriptor"], |s| {
        posted(s).set(PostedInterruptDescriptor, BEYOND);
    }),
    pass("vpid_not_zero", |s| {
        s.set(Vpid, 0xffff);
    }),
    pass("vpid_not_zero", |s| {
        s.off(S::ENABLE_VPID).set(Vpid, 0);
    }),
    fail(&["vpid_not_zero"], |s| {
        s.set(Vpid, 0);
    }),
    pass("eptp_memory_type", |s| {
        s.clear(Eptp, 7);
    }),
    fail(&["eptp_memory_type"], |s| {
        s.or(Eptp, 1);
    }),
    fail(&["eptp_memory_type"], |s| {
        s.clear(Eptp, 7).caps.ept_vpid &= !ept_vpid::UC;
    }),
    pass("eptp_walk_length", |s| {
        s.off(S::ENABLE_EPT).set(Eptp, 0);
    }),
    fail(&["eptp_walk_length"], |s| {
        s.clear(Eptp, 1 << 3);
    }),
    // 5 levels are not offered.
    fail(&["eptp_walk_length"], |s| {
        s.clear(Eptp, 7 << 3).or(Eptp, 4 << 3);
    }),
    pass("eptp_accessed_dirty", |s| {
        s.clear(Eptp, 1 << 6).caps.ept_vpid &= !ept_vpid::AD;
    }),
    fail(&["eptp_accessed_dirty"], |s| {
        s.caps.ept_vpid &= !ept_vpid::AD;
    }),
    pass("eptp_reserved_bits", |s| {
        s.or(Eptp, BEYOND - 0x1000);
    }),
    fail(&["eptp_reserved_bits"], |s| {
        s.or(Eptp, 1 << 7);
    }),
    fail(&["eptp_reserved_bits"], |s| {
        s.or(Eptp, 1 << 11);
    }),
    fail(&["eptp_reserved_bits"], |s| {
        s.or(Eptp, BEYOND);
    }),
    pass("pml_needs_ept", |s| {
        s.on(S::ENABLE_PML).set(PmlAddress, 0xc000);
    }),
    fail(&["pml_needs_ept"], |s| {
        s.on(S::ENABLE_PML).off(S::ENABLE_EPT);
    }),
    pass("pml_address", |s| {
        s.on(S::ENABLE_PML).set(PmlAddress, BEYOND - 0x1000);
    }),
    fail(&["pml_address"], |s| {
        s.on(S::ENABLE_PML).set(PmlAddress, 0xc008);
    }),
    fail(&["pml_address"], |s| {
        s.on(S::ENABLE_PML).set(PmlAddress, BEYOND);
    }),
    pass("unrestricted_guest_needs_ept", |s| {
        s.unrestricted();
    }),
    fail(&["unrestricted_guest_needs_ept"], |s| {
        s.unrestricted().off(S::ENABLE_EPT);
    }),
    pass("mode_based_execute_needs_ept", |s| {
        s.on(S::MODE_BASED_EPT);
    }),
    fail(&["mode_based_execute_needs_ept"], |s| {
        s.on(S::MODE_BASED_EPT).off(S::ENABLE_EPT);
    }),
    pass("vm_function_controls_reserved", |s| {
        switching(s);
    }),
    pass("vm_function_controls_reserved", |s| {
        s.set(VmFunctionControls, u64::MAX);
    }),
    fail(&["vm_function_controls_reserved"], |s| {
        switching(s).or(VmFunctionControls, 1 << 1);
    }),
    pass("eptp_switching_needs_ept", |s| {
        switching(s).set(VmFunctionControls, 0).off(S::ENABLE_EPT);
    }),
    fail(&["eptp_switching_needs_ept"], |s| {
        switching(s).off(S::ENABLE_EPT);
    }),
    pass("eptp_list_address", |s| {
        switching(s).set(EptpListAddress, BEYOND - 0x1000);
    }),
    fail(&["eptp_list_address"], |s| {
        switching(s).set(EptpListAddress, 0x9ff8);
    }),
    fail(&["eptp_list_address"], |s| {
        switching(s).set(EptpListAddress, BEYOND);
    }),
    pass("vmcs_shadowing_bitmaps", |s| {
        shadowing(s);
    }),
    fail(&["vmcs_shadowing_bitmaps"], |s| {
        shadowing(s).or(VmreadBitmap, 1);
    }),
    fail(&["vmcs_shadowing_bitmaps"], |s| {
        shadowing(s).or(VmwriteBitmap, BEYOND);
    }),
    pass("tsc_multiplier_not_zero", |s| {
        s.on(S::USE_TSC_SCALING).set(TscMultiplier, 1);
    }),
    fail(&["tsc_multiplier_not_zero"], |s| {
        s.on(S::USE_TSC_SCALING);
    }),
    // §27.2.1.2
    pass("exit_controls_reserved", |s| {
        s.off(X::SAVE_IA32_PAT | X::SAVE_DEBUG_CONTROLS);
    }),
    fail(&["exit_controls_reserved"], |s| {
        s.clear(ExitControls, 1 << 17);
    }),
    fail(&["exit_controls_reserved"], |s| {
        s.on(X::CLEAR_IA32_BNDCFGS);
    }),
    pass("save_preemption_timer_needs_timer", |s| {
        s.on(P::VMX_PREEMPTION_TIMER).on(X::SAVE_VMX_PREEMPTION_TIMER);
    }),
    fail(&["save_preemption_timer_needs_timer"], |s| {
        s.on(X::SAVE_VMX_PREEMPTION_TIMER);
    }),
    pass("exit_msr_store_area", |s| {
        s.set(ExitMsrStoreAddress, BEYOND - 16).set(ExitMsrStoreCount, 1);
    }),
    pass("exit_msr_store_area", |s| {
        s.set(ExitMsrStoreAddress, u64::MAX);
    }),
    fail(&["exit_msr_store_area"], |s| {
        s.set(ExitMsrStoreAddress, 8).set(ExitMsrStoreCount, 1);
    }),
    fail(&["exit_msr_store_area"], |s| {
        s.set(ExitMsrStoreAddress, BEYOND - 16).set(ExitMsrStoreCount, 2);
    }),
    pass("exit_msr_load_area", |s| {
        s.set(ExitMsrLoadAddress, BEYOND - 32).set(ExitMsrLoadCount, 2);
    }),
    fail(&["exit_msr_load_area"], |s| {
        s.set(ExitMsrLoadAddress, BEYOND).set(ExitMsrLoadCount, 1);
    }),
    fail(&["exit_msr_load_area"], |s| {
        s.set(ExitMsrLoadAddress, BEYOND - 32).set(ExitMsrLoadCount, 0xffff_ffff);
    }),
    // §27.2.1.3
    pass("entry_controls_reserved", |s| {
        s.off(N::LOAD_IA32_PAT | N::LOAD_DEBUG_CONTROLS);
    }),
    fail(&["entry_controls_reserved"], |s| {
        s.clear(EntryControls, 1 << 12);
    }),
    fail(&["entry_controls_reserved"], |s| {
        s.on(N::LOAD_IA32_BNDCFGS);
    }),
    pass("injection_type", |s| {
        s.inject(T::Other, 0, false);
    }),
    pass("injection_type", |s| {
        s.inject(T::PrivilegedSoftwareException, 1, false);
    }),
    // Not valid, so not looked at.
    pass("injection_type", |s| {
        s.set(EntryInterruptionInfo, 0x7fff_ffff);
    }),
    fail(&["injection_type"], |s| {
        s.inject(T::Reserved, 0, false);
    }),
    fail(&["injection_type"], |s| {
        s.inject(T::Other, 0, false).caps.primary.may_be_one &= !C::MONITOR_TRAP_FLAG.bits();
    }),
    pass("injection_vector", |s| {
        s.inject(T::HardwareException, 31, false);
    }),
    pass("injection_vector", |s| {
        s.inject(T::External, 255, false);
    }),
    fail(&["injection_vector"], |s| {
        s.inject(T::HardwareException, 32, false);
    }),
    fail(&["injection_vector"], |s| {
        s.inject(T::Nmi, 3, false);
    }),
    fail(&["injection_vector"], |s| {
        s.inject(T::Other, 1, false);
    }),
    pass("injection_error_code_required", |s| {
        s.inject(T::HardwareException, 14, true);
    }),
    // #UD and, as IA32_VMX_BASIC bit 56 is 0, vector 21 have none.
    pass("injection_error_code_required", |s| {
        s.inject(T::HardwareException, 6, false);
    }),
    pass("injection_error_code_required", |s| {
        s.inject(T::HardwareException, 21, false);
    }),
    pass("injection_error_code_required", |s| {
        s.real().inject(T::HardwareException, 13, false);
    }),
    fail(&["injection_error_code_required"], |s| {
        s.inject(T::HardwareException, 8, false);
    }),
    fail(&["injection_error_code_required"], |s| {
        s.inject(T::HardwareException, 17, false);
    }),
    // An unrestricted guest in protected mode.
    fail(&["injection_error_code_required"], |s| {
        s.unrestricted().inject(T::HardwareException, 13, false);
    }),
    pass("injection_error_code_forbidden", |s| {
        s.inject(T::SoftwareInterrupt, 14, false);
    }),
    pass("injection_error_code_forbidden", |s| {
        s.inject(T::HardwareException, 17, true);
    }),
    fail(&["injection_error_code_forbidden"], |s| {
        s.inject(T::SoftwareInterrupt, 14, true);
    }),
    fail(&["injection_error_code_forbidden"], |s| {
        s.inject(T::External, 13, true);
    }),
    fail(&["injection_error_code_forbidden"], |s| {
        s.inject(T::HardwareException, 9, true);
    }),
    fail(&["injection_error_code_forbidden"], |s| {
        s.inject(T::HardwareException, 16, true);
    }),
    fail(&["injection_error_code_forbidden"], |s| {
        s.real().inject(T::HardwareException, 13, true);
    }),
    // Without "unrestricted guest" CR0.PE does not matter here.
    fail(&["injection_error_code_required", "guest_cr0"], |s| {
        s.legacy().clear(GuestCr0, cr0::PE | cr0::PG).inject(T::HardwareException, 13, false);
    }),
    pass("injection_reserved_bits", |s| {
        s.inject(T::External, 0x20, false);
    }),
    fail(&["injection_reserved_bits"], |s| {
        s.inject(T::External, 0x20, false).or(EntryInterruptionInfo, 1 << 12);
    }),
    fail(&["injection_reserved_bits"], |s| {
        s.inject(T::External, 0x20, false).or(EntryInterruptionInfo, 1 << 30);
    }),
    pass("injection_error_code_value", |s| {
        s.inject(T::HardwareException, 14, true).set(EntryErrorCode, 0xffff);
    }),
    pass("injection_error_code_value", |s| {
        s.inject(T::HardwareException, 6, false).set(EntryErrorCode, 0xffff_ffff);
    }),
    fail(&["injection_error_code_value"], |s| {
        s.inject(T::HardwareException, 14, true).set(EntryErrorCode, 1 << 16);
    }),
    pass("injection_instruction_length", |s| {
        s.inject(T::SoftwareInterrupt, 0x80, false).set(EntryInstructionLength, 15);
    }),
    // 0 is allowed with IA32_VMX_MISC bit 30.
    pass("injection_instruction_length", |s| {
        s.inject(T::SoftwareException, 3, false).set(EntryInstructionLength, 0);
    }),
    pass("injection_instruction_length", |s| {
        s.inject(T::HardwareException, 6, false).set(EntryInstructionLength, 16);
    }),
    fail(&["injection_instruction_length"], |s| {
        s.inject(T::SoftwareInterrupt, 0x80, false).set(EntryInstructionLength, 16);
    }),
    fail(&["injection_instruction_length"], |s| {
        s.inject(T::SoftwareException, 3, false).set(EntryInstructionLength, 0).caps.misc &= !(1 << 30);
    }),
    fail(&["injection_instruction_length"], |s| {
        s.inject(T::PrivilegedSoftwareException, 1, false).set(EntryInstructionLength, 0xffff_ffff);
    }),
    pass("entry_msr_load_area", |s| {
        s.set(EntryMsrLoadAddress, 0xd010).set(EntryMsrLoadCount, 512);
    }),
    fail(&["entry_msr_load_area"], |s| {
        s.set(EntryMsrLoadAddress, 0xd001).set(EntryMsrLoadCount, 1);
    }),
    fail(&["entry_msr_load_area"], |s| {
        s.set(EntryMsrLoadAddress, !0xf).set(EntryMsrLoadCount, 1);
    }),
    pass("entry_smm_controls", |_| {}),
    fail(&["entry_smm_controls", "entry_controls_reserved"], |s| {
        s.on(N::DEACTIVATE_DUAL_MONITOR);
    }),
    fail(&["entry_smm_controls", "entry_controls_reserved", "interruptibility_smi"], |s| {
        s.on(N::ENTRY_TO_SMM);
    }),
];
