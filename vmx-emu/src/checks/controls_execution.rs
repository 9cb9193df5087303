//! Checks on VM-execution control fields (SDM Vol. 3C §27.2.1.1).

use memory::L1Gpa;
use x86_spec::caps::ept_vpid;
use x86_spec::controls::{
    ExitControls as X, PinbasedControls as P, PrimaryControls as C, SecondaryControls as S,
};
use x86_spec::ept::EPTP_AD;

use super::rules::{self, address};
use super::{Context, Findings};
use crate::Field::*;
use crate::capabilities::{self, VMFUNC_EPTP_SWITCHING};

/// Offset of VTPR on the virtual-APIC page (SDM Vol. 3C §30.1.1).
const VTPR: u64 = 0x80;

/// Reserved bits in the pin-based controls must be set properly (§27.2.1.1, A.3.1).
pub(super) fn pin_controls_reserved(c: &Context, f: &mut Findings) {
    rules::control_field(c, f, PinControls, c.caps.pin, capabilities::PIN);
}

/// Reserved bits in the primary controls must be set properly (§27.2.1.1, A.3.2).
pub(super) fn primary_controls_reserved(c: &Context, f: &mut Findings) {
    rules::control_field(c, f, PrimaryControls, c.caps.primary, capabilities::PRIMARY);
}

/// With "activate secondary controls", reserved bits in the secondary controls must be 0
/// (§27.2.1.1, A.3.3). Without, the field is not looked at.
pub(super) fn secondary_controls_reserved(c: &Context, f: &mut Findings) {
    if c.primary(C::SECONDARY_CONTROLS) {
        rules::control_field(c, f, SecondaryControls, c.caps.secondary, capabilities::SECONDARY);
    }
}

/// The CR3-target count must not be greater than IA32_VMX_MISC says (§27.2.1.1, A.6).
pub(super) fn cr3_target_count(c: &Context, f: &mut Findings) {
    let most = c.caps.cr3_targets();
    if c.get(Cr3TargetCount) > most {
        f.fail(&[Cr3TargetCount], "more CR3 targets than there are", format!("at most {most}"));
    }
}

/// With "use I/O bitmaps", both addresses must be page-aligned and within the
/// physical-address width (§27.2.1.1).
pub(super) fn io_bitmap_addresses(c: &Context, f: &mut Findings) {
    if c.primary(C::USE_IO_BITMAPS) {
        address(c, f, IoBitmapA, 12);
        address(c, f, IoBitmapB, 12);
    }
}

/// With "use MSR bitmaps", the address must be page-aligned and within the physical-address
/// width (§27.2.1.1).
pub(super) fn msr_bitmap_address(c: &Context, f: &mut Findings) {
    if c.primary(C::USE_MSR_BITMAPS) {
        address(c, f, MsrBitmap, 12);
    }
}

/// With "use TPR shadow", the virtual-APIC address must be page-aligned and within the
/// physical-address width (§27.2.1.1).
pub(super) fn virtual_apic_address(c: &Context, f: &mut Findings) {
    if c.primary(C::USE_TPR_SHADOW) {
        address(c, f, VirtualApicAddress, 12);
    }
}

/// With "use TPR shadow" and without "virtual-interrupt delivery", bits 31:4 of the TPR
/// threshold must be 0 (§27.2.1.1).
pub(super) fn tpr_threshold_reserved(c: &Context, f: &mut Findings) {
    if c.primary(C::USE_TPR_SHADOW) && !c.secondary(S::VIRTUAL_INTERRUPT_DELIVERY) {
        f.require(
            c.get(TprThreshold) & !0xf == 0,
            &[TprThreshold],
            "reserved bits of the TPR threshold",
            "bits 31:4 = 0",
        );
    }
}

/// With "use TPR shadow" and without "virtualize APIC accesses" and "virtual-interrupt
/// delivery", bits 3:0 of the TPR threshold should not be greater than bits 7:4 of VTPR
/// (§27.2.1.1).
pub(super) fn tpr_threshold_against_vtpr(c: &Context, f: &mut Findings) {
    if !c.primary(C::USE_TPR_SHADOW)
        || c.secondary(S::VIRTUALIZE_APIC)
        || c.secondary(S::VIRTUAL_INTERRUPT_DELIVERY)
    {
        return;
    }
    let threshold = c.get(TprThreshold) & 0xf;
    let page = c.get(VirtualApicAddress);
    if threshold == 0 || page & 0xfff != 0 || !c.caps.is_physical(page) {
        return; // Nothing is below 0; a wrong address is another check's matter.
    }
    let mut vtpr = [0];
    c.memory.read(L1Gpa(page | VTPR), &mut vtpr);
    let class = u64::from(vtpr[0] >> 4);
    if threshold > class {
        f.fail(
            &[TprThreshold, VirtualApicAddress],
            format!("the TPR threshold is greater than bits 7:4 of VTPR, which is {:#04x}", vtpr[0]),
            format!("bits 3:0 at most {class}"),
        );
    }
}

/// Without "NMI exiting", "virtual NMIs" must be 0 (§27.2.1.1).
pub(super) fn virtual_nmis_need_nmi_exiting(c: &Context, f: &mut Findings) {
    f.require(
        c.pin(P::NMI_EXITING) || !c.pin(P::VIRTUAL_NMIS),
        &[PinControls],
        "virtual NMIs without NMI exiting",
        "NMI exiting (bit 3) = 1 or virtual NMIs (bit 5) = 0",
    );
}

/// Without "virtual NMIs", "NMI-window exiting" must be 0 (§27.2.1.1).
pub(super) fn nmi_window_needs_virtual_nmis(c: &Context, f: &mut Findings) {
    f.require(
        c.pin(P::VIRTUAL_NMIS) || !c.primary(C::NMI_WINDOW_EXITING),
        &[PinControls, PrimaryControls],
        "NMI-window exiting without virtual NMIs",
        "virtual NMIs (pin-based bit 5) = 1 or NMI-window exiting (primary bit 22) = 0",
    );
}

/// With "virtualize APIC accesses", the APIC-access address must be page-aligned and within
/// the physical-address width (§27.2.1.1).
pub(super) fn apic_access_address(c: &Context, f: &mut Findings) {
    if c.secondary(S::VIRTUALIZE_APIC) {
        address(c, f, ApicAccessAddress, 12);
    }
}

/// Without "use TPR shadow", "virtualize x2APIC mode", "APIC-register virtualization" and
/// "virtual-interrupt delivery" must be 0 (§27.2.1.1).
pub(super) fn apic_virtualization_needs_tpr_shadow(c: &Context, f: &mut Findings) {
    let any = c.secondary(S::VIRTUALIZE_X2APIC)
        || c.secondary(S::VIRTUALIZE_APIC_REGISTER)
        || c.secondary(S::VIRTUAL_INTERRUPT_DELIVERY);
    f.require(
        c.primary(C::USE_TPR_SHADOW) || !any,
        &[PrimaryControls, SecondaryControls],
        "APIC virtualization without the TPR shadow",
        "use TPR shadow (primary bit 21) = 1, or virtualize x2APIC mode, APIC-register virtualization \
         and virtual-interrupt delivery (secondary bits 4, 8, 9) = 0",
    );
}

/// With "virtualize x2APIC mode", "virtualize APIC accesses" must be 0 (§27.2.1.1).
pub(super) fn x2apic_excludes_apic_accesses(c: &Context, f: &mut Findings) {
    f.require(
        !c.secondary(S::VIRTUALIZE_X2APIC | S::VIRTUALIZE_APIC),
        &[SecondaryControls],
        "both x2APIC mode and APIC accesses are virtualized",
        "virtualize APIC accesses (bit 0) = 0 or virtualize x2APIC mode (bit 4) = 0",
    );
}

/// With "virtual-interrupt delivery", "external-interrupt exiting" must be 1 (§27.2.1.1).
pub(super) fn virtual_interrupts_need_interrupt_exiting(c: &Context, f: &mut Findings) {
    f.require(
        c.pin(P::EXTERNAL_INTERRUPT_EXITING) || !c.secondary(S::VIRTUAL_INTERRUPT_DELIVERY),
        &[PinControls, SecondaryControls],
        "virtual-interrupt delivery without external-interrupt exiting",
        "external-interrupt exiting (pin-based bit 0) = 1 or virtual-interrupt delivery (secondary bit 9) = 0",
    );
}

/// With "process posted interrupts", "virtual-interrupt delivery" must be 1 (§27.2.1.1).
pub(super) fn posted_interrupts_need_virtual_interrupts(c: &Context, f: &mut Findings) {
    f.require(
        c.secondary(S::VIRTUAL_INTERRUPT_DELIVERY) || !c.pin(P::POSTED_INTERRUPTS),
        &[PinControls, SecondaryControls],
        "posted interrupts without virtual-interrupt delivery",
        "virtual-interrupt delivery (secondary bit 9) = 1 or process posted interrupts (pin-based bit 7) = 0",
    );
}

/// With "process posted interrupts", "acknowledge interrupt on exit" must be 1 (§27.2.1.1).
pub(super) fn posted_interrupts_need_acknowledge(c: &Context, f: &mut Findings) {
    f.require(
        c.exit(X::ACK_INTERRUPT_ON_EXIT) || !c.pin(P::POSTED_INTERRUPTS),
        &[PinControls, ExitControls],
        "posted interrupts without acknowledging interrupts on exit",
        "acknowledge interrupt on exit (exit bit 15) = 1 or process posted interrupts (pin-based bit 7) = 0",
    );
}

/// With "process posted interrupts", the notification vector must be 0–255 (§27.2.1.1).
pub(super) fn posted_interrupt_vector(c: &Context, f: &mut Findings) {
    if c.pin(P::POSTED_INTERRUPTS) {
        f.require(
            c.get(PostedInterruptVector) <= 0xff,
            &[PostedInterruptVector],
            "the notification vector is no vector",
            "bits 15:8 = 0",
        );
    }
}

/// With "process posted interrupts", the descriptor's address must be 64-byte aligned and
/// within the physical-address width (§27.2.1.1).
pub(super) fn posted_interrupt_descriptor(c: &Context, f: &mut Findings) {
    if c.pin(P::POSTED_INTERRUPTS) {
        address(c, f, PostedInterruptDescriptor, 6);
    }
}

/// With "enable VPID", the VPID must not be 0000H (§27.2.1.1).
pub(super) fn vpid_not_zero(c: &Context, f: &mut Findings) {
    if c.secondary(S::ENABLE_VPID) {
        f.require(c.get(Vpid) != 0, &[Vpid], "VPID 0 is the host's", "1 to FFFFH");
    }
}

/// With "enable EPT", bits 2:0 of EPTP must be a memory type that IA32_VMX_EPT_VPID_CAP
/// reports (§27.2.1.1).
pub(super) fn eptp_memory_type(c: &Context, f: &mut Findings) {
    if !c.secondary(S::ENABLE_EPT) {
        return;
    }
    let supported = match c.get(Eptp) & 7 {
        0 => c.caps.ept_vpid & ept_vpid::UC != 0,
        6 => c.caps.ept_vpid & ept_vpid::WB != 0,
        _ => false,
    };
    f.require(
        supported,
        &[Eptp],
        "the memory type of the EPT paging structures is not supported",
        "bits 2:0 = 6 (WB), or 0 (UC) where IA32_VMX_EPT_VPID_CAP bit 8 is 1",
    );
}

/// With "enable EPT", bits 5:3 of EPTP must be one less than a page-walk length that is
/// supported: 3 (§27.2.1.1).
pub(super) fn eptp_walk_length(c: &Context, f: &mut Findings) {
    if c.secondary(S::ENABLE_EPT) {
        f.require(
            c.get(Eptp) >> 3 & 7 == 3 && c.caps.ept_vpid & ept_vpid::WALK4 != 0,
            &[Eptp],
            "the EPT page-walk length is not supported",
            "bits 5:3 = 3",
        );
    }
}

/// With "enable EPT", bit 6 of EPTP must be 0 if IA32_VMX_EPT_VPID_CAP bit 21 is 0
/// (§27.2.1.1).
pub(super) fn eptp_accessed_dirty(c: &Context, f: &mut Findings) {
    if c.secondary(S::ENABLE_EPT) {
        f.require(
            c.get(Eptp) & EPTP_AD == 0 || c.caps.ept_vpid & ept_vpid::AD != 0,
            &[Eptp],
            "accessed and dirty flags for EPT are not supported",
            "bit 6 = 0",
        );
    }
}

/// With "enable EPT", reserved bits of EPTP must be 0: 11:7 (bit 7 as supervisor shadow
/// stacks are not offered) and those beyond the physical-address width (§27.2.1.1).
pub(super) fn eptp_reserved_bits(c: &Context, f: &mut Findings) {
    if c.secondary(S::ENABLE_EPT) {
        let eptp = c.get(Eptp);
        if eptp & 0xf80 != 0 || !c.caps.is_physical(eptp) {
            let expected = format!("bits 11:7 = 0 and bits 63:{} = 0", c.caps.physical_bits);
            f.fail(&[Eptp], "reserved bits of EPTP", expected);
        }
    }
}

/// With "enable PML", "enable EPT" must be 1 (§27.2.1.1).
pub(super) fn pml_needs_ept(c: &Context, f: &mut Findings) {
    f.require(
        c.secondary(S::ENABLE_EPT) || !c.secondary(S::ENABLE_PML),
        &[SecondaryControls],
        "PML without EPT",
        "enable EPT (bit 1) = 1 or enable PML (bit 17) = 0",
    );
}

/// With "enable PML", the PML address must be page-aligned and within the physical-address
/// width (§27.2.1.1).
pub(super) fn pml_address(c: &Context, f: &mut Findings) {
    if c.secondary(S::ENABLE_PML) {
        address(c, f, PmlAddress, 12);
    }
}

/// With "unrestricted guest", "enable EPT" must be 1 (§27.2.1.1).
pub(super) fn unrestricted_guest_needs_ept(c: &Context, f: &mut Findings) {
    f.require(
        c.secondary(S::ENABLE_EPT) || !c.unrestricted(),
        &[SecondaryControls],
        "unrestricted guest without EPT",
        "enable EPT (bit 1) = 1 or unrestricted guest (bit 7) = 0",
    );
}

/// With "mode-based execute control for EPT", "enable EPT" must be 1 (§27.2.1.1).
pub(super) fn mode_based_execute_needs_ept(c: &Context, f: &mut Findings) {
    f.require(
        c.secondary(S::ENABLE_EPT) || !c.secondary(S::MODE_BASED_EPT),
        &[SecondaryControls],
        "mode-based execute control for EPT without EPT",
        "enable EPT (bit 1) = 1 or mode-based execute control for EPT (bit 22) = 0",
    );
}

/// With "enable VM functions", reserved bits of the VM-function controls must be 0
/// (§27.2.1.1, A.11).
pub(super) fn vm_function_controls_reserved(c: &Context, f: &mut Findings) {
    if c.secondary(S::ENABLE_VM_FUNCTIONS) {
        let reserved = c.get(VmFunctionControls) & !c.caps.vmfunc;
        rules::fixed_bits(f, VmFunctionControls, 0, reserved, "bits that IA32_VMX_VMFUNC does not allow");
    }
}

fn eptp_switching(c: &Context) -> bool {
    c.secondary(S::ENABLE_VM_FUNCTIONS) && c.get(VmFunctionControls) & VMFUNC_EPTP_SWITCHING != 0
}

/// With EPTP switching, "enable EPT" must be 1 (§27.2.1.1).
pub(super) fn eptp_switching_needs_ept(c: &Context, f: &mut Findings) {
    f.require(
        c.secondary(S::ENABLE_EPT) || !eptp_switching(c),
        &[SecondaryControls, VmFunctionControls],
        "EPTP switching without EPT",
        "enable EPT (secondary bit 1) = 1 or EPTP switching (VM-function bit 0) = 0",
    );
}

/// With EPTP switching, the EPTP-list address must be page-aligned and within the
/// physical-address width (§27.2.1.1).
pub(super) fn eptp_list_address(c: &Context, f: &mut Findings) {
    if eptp_switching(c) {
        address(c, f, EptpListAddress, 12);
    }
}

/// With "VMCS shadowing", the addresses of both bitmaps must be page-aligned and within the
/// physical-address width (§27.2.1.1).
pub(super) fn vmcs_shadowing_bitmaps(c: &Context, f: &mut Findings) {
    if c.secondary(S::VMCS_SHADOWING) {
        address(c, f, VmreadBitmap, 12);
        address(c, f, VmwriteBitmap, 12);
    }
}

/// With "use TSC scaling", the TSC multiplier must not be 0 (§27.2.1.1).
pub(super) fn tsc_multiplier_not_zero(c: &Context, f: &mut Findings) {
    if c.secondary(S::USE_TSC_SCALING) {
        f.require(
            c.get(TscMultiplier) != 0,
            &[TscMultiplier],
            "TSC scaling by 0",
            "not 0; 1000000000000H scales by 1",
        );
    }
}
