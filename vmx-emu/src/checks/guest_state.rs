//! Checks on guest descriptor tables, RIP, RFLAGS, non-register state and PDPTEs (SDM Vol. 3C
//! §27.3.1.3–27.3.1.6).

use engine::{Activity, interruptibility as block, pending_debug};
use memory::L1Gpa;
use x86_spec::controls::{EntryControls as N, PinbasedControls as P, SecondaryControls as S};
use x86_spec::exception::{DB, MC};
use x86_spec::interruption::EventType;
use x86_spec::reg::{cr0, rflags};
use x86_spec::segment::AccessRights;

use super::{Context, Findings, rules};
use crate::Field::*;
use crate::fields::GUEST_PDPTES;
use crate::vmcs12::{REVISION, SHADOW_INDICATOR};

/// RFLAGS bits that must be 0: 63:22, 15, 5 and 3.
const RFLAGS_ZERO: u64 = !0x3f_ffff | 1 << 15 | 1 << 5 | 1 << 3;
/// Interruptibility-state bits that must be 0: 31:5.
const INTERRUPTIBILITY_RESERVED: u32 = !0x1f;
/// Interruptibility state: enclave interruption.
const ENCLAVE: u32 = 1 << 4;
/// Pending-debug bits that must be 0: 11:4, 13, 15 and 63:17.
const PENDING_DEBUG_RESERVED: u64 = 0xff0 | 1 << 13 | 1 << 15 | !0x1_ffff;
/// Pending debug exceptions: debug exception or breakpoint inside an RTM region.
const PENDING_DEBUG_RTM: u64 = 1 << 16;
/// IA32_DEBUGCTL: single-step on branches.
const DEBUGCTL_BTF: u64 = 1 << 1;
/// A link pointer that points nowhere.
const NO_LINK: u64 = u64::MAX;
/// PDPTE bits that must be 0 if the entry is present, apart from those beyond the
/// physical-address width: 2:1 and 8:5 (SDM Vol. 3A table 4-8).
const PDPTE_RESERVED: u64 = 0x1e6;

/// Bases of GDTR and IDTR must be canonical (§27.3.1.3).
pub(super) fn descriptor_table_bases(c: &Context, f: &mut Findings) {
    rules::canonical_fields(c, f, &[GuestGdtrBase, GuestIdtrBase]);
}

/// Bits 31:16 of the limits of GDTR and IDTR must be 0 (§27.3.1.3).
pub(super) fn descriptor_table_limits(c: &Context, f: &mut Findings) {
    for field in [GuestGdtrLimit, GuestIdtrLimit] {
        if c.get(field) >> 16 != 0 {
            f.fail(&[field], format!("{} is beyond 64 KiB", field.sdm_name()), "bits 31:16 = 0");
        }
    }
}

/// RIP: outside 64-bit mode, bits 63:32 must be 0; in 64-bit mode, bits 63:N must be
/// identical, for N linear-address bits (§27.3.1.4). That is one bit less than canonical.
pub(super) fn guest_rip(c: &Context, f: &mut Findings) {
    let rip = c.get(GuestRip);
    if c.ia32e_guest() && AccessRights(c.get32(GuestCsAccessRights)).long() {
        if !rules::canonical(rip, c.linear_bits.saturating_add(1)) {
            f.fail(
                &[GuestRip],
                "RIP is beyond the linear-address width",
                format!("bits 63:{} all equal", c.linear_bits),
            );
        }
    } else {
        f.require(
            rip >> 32 == 0,
            &[GuestRip, EntryControls, GuestCsAccessRights],
            "a 64-bit RIP outside 64-bit mode",
            "bits 63:32 = 0, or IA-32e mode guest (entry bit 9) = 1 and L of CS (bit 13) = 1",
        );
    }
}

/// RFLAGS: bits 63:22, 15, 5 and 3 must be 0, bit 1 must be 1 (§27.3.1.4).
pub(super) fn rflags_reserved(c: &Context, f: &mut Findings) {
    let value = c.get(GuestRflags);
    rules::fixed_bits(f, GuestRflags, rflags::FIXED1 & !value, value & RFLAGS_ZERO, "reserved bits");
}

/// RFLAGS: VM must be 0 with "IA-32e mode guest" or if CR0.PE is 0 (§27.3.1.4).
pub(super) fn rflags_virtual_8086(c: &Context, f: &mut Findings) {
    f.require(
        !c.virtual_8086() || !c.ia32e_guest() && c.get(GuestCr0) & cr0::PE != 0,
        &[GuestRflags, EntryControls, GuestCr0],
        "virtual-8086 mode in IA-32e or real-address mode",
        "VM (bit 17) = 0, or IA-32e mode guest (entry bit 9) = 0 and PE (CR0 bit 0) = 1",
    );
}

/// RFLAGS: IF must be 1 if an external interrupt is injected (§27.3.1.4).
pub(super) fn rflags_interrupt_flag(c: &Context, f: &mut Findings) {
    f.require(
        !injects(c, EventType::External) || c.get(GuestRflags) & rflags::IF != 0,
        &[GuestRflags, EntryInterruptionInfo],
        "an external interrupt is injected into a guest with interrupts disabled",
        "IF (bit 9) = 1, or no external interrupt",
    );
}

fn injects(c: &Context, ty: EventType) -> bool {
    c.injection().is_some_and(|e| e.event_type() == ty)
}

/// Whether all these kinds of blocking are in the interruptibility state.
fn blocks(c: &Context, bits: u32) -> bool {
    c.get32(GuestInterruptibility) & bits == bits
}

fn activity(c: &Context) -> Option<Activity> {
    match c.get(GuestActivity) {
        0 => Some(Activity::Active),
        1 => Some(Activity::Hlt),
        2 => Some(Activity::Shutdown),
        3 => Some(Activity::WaitForSipi),
        _ => None,
    }
}

/// The activity state must be 0–3 and one that IA32_VMX_MISC bits 8:6 report (§27.3.1.5,
/// A.6).
pub(super) fn activity_supported(c: &Context, f: &mut Findings) {
    let supported = match activity(c) {
        Some(Activity::Active) => true,
        Some(state) => c.caps.misc >> (5 + state as u32) & 1 != 0,
        None => false,
    };
    f.require(
        supported,
        &[GuestActivity],
        "the activity state is not supported",
        "0 (active), or 1 (HLT), 2 (shutdown), 3 (wait-for-SIPI) where IA32_VMX_MISC bit 6, 7, 8 is 1",
    );
}

/// The activity state must not be HLT if the DPL of SS is not 0 (§27.3.1.5).
pub(super) fn activity_hlt_cpl(c: &Context, f: &mut Findings) {
    f.require(
        activity(c) != Some(Activity::Hlt) || AccessRights(c.get32(GuestSsAccessRights)).dpl() == 0,
        &[GuestActivity, GuestSsAccessRights],
        "HLT above privilege level 0",
        "activity state 0 (active), or DPL of SS (bits 6:5) = 0",
    );
}

/// The activity state must be active if there is blocking by STI or MOV SS (§27.3.1.5).
pub(super) fn activity_blocking(c: &Context, f: &mut Findings) {
    f.require(
        c.get(GuestActivity) == 0 || !blocks(c, block::STI) && !blocks(c, block::MOV_SS),
        &[GuestActivity, GuestInterruptibility],
        "an inactive guest blocks by STI or MOV SS",
        "activity state 0 (active), or interruptibility bits 1:0 = 0",
    );
}

/// An event that is injected must not be one that the activity state blocks (§27.3.1.5).
pub(super) fn activity_injection(c: &Context, f: &mut Findings) {
    let (Some(state), Some(event)) = (activity(c), c.injection()) else { return };
    let exception = |vectors: &[u8]| {
        event.event_type() == EventType::HardwareException && vectors.contains(&event.vector())
    };
    let allowed = match state {
        Activity::Active => true,
        Activity::Hlt => {
            matches!(event.event_type(), EventType::External | EventType::Nmi)
                || exception(&[DB, MC])
                || event.event_type() == EventType::Other && event.vector() == 0
        }
        Activity::Shutdown => event.event_type() == EventType::Nmi || exception(&[MC]),
        Activity::WaitForSipi => false,
    };
    f.require(
        allowed,
        &[GuestActivity, EntryInterruptionInfo],
        "the activity state blocks the injected event",
        "active: any; HLT: external interrupt, NMI, #DB, #MC, pending MTF; shutdown: NMI, #MC; \
         wait-for-SIPI: none",
    );
}

/// Interruptibility state: bits 31:5 must be 0 (§27.3.1.5).
pub(super) fn interruptibility_reserved(c: &Context, f: &mut Findings) {
    let reserved = c.get32(GuestInterruptibility) & INTERRUPTIBILITY_RESERVED;
    rules::fixed_bits(f, GuestInterruptibility, 0, reserved as u64, "reserved bits");
}

/// Interruptibility state: not both STI and MOV SS (§27.3.1.5).
pub(super) fn interruptibility_sti_and_mov_ss(c: &Context, f: &mut Findings) {
    f.require(
        !blocks(c, block::STI | block::MOV_SS),
        &[GuestInterruptibility],
        "blocking by both STI and MOV SS",
        "bit 0 = 0 or bit 1 = 0",
    );
}

/// Interruptibility state: no blocking by STI if IF is 0 (§27.3.1.5).
pub(super) fn interruptibility_sti_needs_if(c: &Context, f: &mut Findings) {
    f.require(
        !blocks(c, block::STI) || c.get(GuestRflags) & rflags::IF != 0,
        &[GuestInterruptibility, GuestRflags],
        "blocking by STI with interrupts disabled",
        "bit 0 = 0, or IF (RFLAGS bit 9) = 1",
    );
}

/// Interruptibility state: no blocking by STI or MOV SS if an external interrupt is injected
/// (§27.3.1.5).
pub(super) fn interruptibility_external_interrupt(c: &Context, f: &mut Findings) {
    f.require(
        !injects(c, EventType::External) || !blocks(c, block::STI) && !blocks(c, block::MOV_SS),
        &[GuestInterruptibility, EntryInterruptionInfo],
        "an external interrupt is injected into a guest that blocks it",
        "bits 1:0 = 0, or no external interrupt",
    );
}

/// Interruptibility state: no blocking by MOV SS if an NMI is injected (§27.3.1.5).
pub(super) fn interruptibility_nmi_mov_ss(c: &Context, f: &mut Findings) {
    f.require(
        !injects(c, EventType::Nmi) || !blocks(c, block::MOV_SS),
        &[GuestInterruptibility, EntryInterruptionInfo],
        "an NMI is injected into a guest that blocks by MOV SS",
        "bit 1 = 0, or no NMI",
    );
}

/// Interruptibility state: blocking by SMI must be 0 outside SMM, and 1 with "entry to SMM"
/// (§27.3.1.5).
pub(super) fn interruptibility_smi(c: &Context, f: &mut Findings) {
    f.require(
        blocks(c, block::SMI) == c.entry(N::ENTRY_TO_SMM),
        &[GuestInterruptibility, EntryControls],
        "blocking by SMI outside SMM",
        "bit 2 = 0",
    );
}

/// Interruptibility state: with "virtual NMIs", no blocking by NMI if an NMI is injected
/// (§27.3.1.5).
pub(super) fn interruptibility_virtual_nmi(c: &Context, f: &mut Findings) {
    f.require(
        !c.pin(P::VIRTUAL_NMIS) || !injects(c, EventType::Nmi) || !blocks(c, block::NMI),
        &[GuestInterruptibility, EntryInterruptionInfo, PinControls],
        "a virtual NMI is injected into a guest that blocks NMIs",
        "bit 3 = 0, or no NMI",
    );
}

/// Interruptibility state: enclave interruption needs SGX, which L1 does not have
/// (§27.3.1.5).
pub(super) fn interruptibility_enclave(c: &Context, f: &mut Findings) {
    f.require(!blocks(c, ENCLAVE), &[GuestInterruptibility], "enclave interruption without SGX", "bit 4 = 0");
}

/// Interruptibility state: no blocking by STI if an NMI is injected. Processors may require it
/// or not; this one does (§27.3.1.5).
pub(super) fn interruptibility_nmi_sti(c: &Context, f: &mut Findings) {
    f.require(
        !injects(c, EventType::Nmi) || !blocks(c, block::STI),
        &[GuestInterruptibility, EntryInterruptionInfo],
        "an NMI is injected into a guest that blocks by STI",
        "bit 0 = 0, or no NMI",
    );
}

/// Pending debug exceptions: bits 11:4, 13, 15 and 63:17 must be 0 (§27.3.1.5).
pub(super) fn pending_debug_reserved(c: &Context, f: &mut Findings) {
    let reserved = c.get(GuestPendingDebug) & PENDING_DEBUG_RESERVED;
    rules::fixed_bits(f, GuestPendingDebug, 0, reserved, "reserved bits");
}

/// Whether BS must equal "single-stepping by instructions", and whether that is on.
fn single_stepping(c: &Context) -> Option<bool> {
    let held = blocks(c, block::STI) || blocks(c, block::MOV_SS) || activity(c) == Some(Activity::Hlt);
    held.then(|| c.get(GuestRflags) & rflags::TF != 0 && c.get(GuestDebugctl) & DEBUGCTL_BTF == 0)
}

/// Pending debug exceptions: with blocking by STI or MOV SS or in HLT, BS must be 1 if TF is 1
/// and BTF is 0 (§27.3.1.5).
pub(super) fn pending_debug_single_step(c: &Context, f: &mut Findings) {
    f.require(
        single_stepping(c) != Some(true) || c.get(GuestPendingDebug) & pending_debug::BS != 0,
        &[GuestPendingDebug, GuestRflags, GuestDebugctl, GuestInterruptibility, GuestActivity],
        "no single step is pending after an instruction that was single-stepped",
        "BS (bit 14) = 1",
    );
}

/// Pending debug exceptions: with blocking by STI or MOV SS or in HLT, BS must be 0 if TF is 0
/// or BTF is 1 (§27.3.1.5).
pub(super) fn pending_debug_no_single_step(c: &Context, f: &mut Findings) {
    f.require(
        single_stepping(c) != Some(false) || c.get(GuestPendingDebug) & pending_debug::BS == 0,
        &[GuestPendingDebug, GuestRflags, GuestDebugctl, GuestInterruptibility, GuestActivity],
        "a single step is pending after an instruction that was not single-stepped",
        "BS (bit 14) = 0",
    );
}

/// Pending debug exceptions: bit 16 needs RTM, which L1 does not have (§27.3.1.5).
pub(super) fn pending_debug_rtm(c: &Context, f: &mut Findings) {
    f.require(
        c.get(GuestPendingDebug) & PENDING_DEBUG_RTM == 0,
        &[GuestPendingDebug],
        "a debug exception in a transactional region without RTM",
        "bit 16 = 0",
    );
}

fn link(c: &Context) -> Option<u64> {
    Some(c.get(LinkPointer)).filter(|p| *p != NO_LINK)
}

/// The first dword of the VMCS region that the link pointer points to, if it can point to one.
fn linked_header(c: &Context) -> Option<u32> {
    let at = link(c).filter(|p| p & 0xfff == 0 && c.caps.is_physical(*p))?;
    let mut header = [0; 4];
    c.memory.read(L1Gpa(at), &mut header);
    Some(u32::from_le_bytes(header))
}

/// The VMCS link pointer is all ones, or page-aligned and within the physical-address width
/// (§27.3.1.5).
pub(super) fn link_pointer_address(c: &Context, f: &mut Findings) {
    if link(c).is_some() {
        rules::address(c, f, LinkPointer, 12);
    }
}

/// The VMCS region at the link pointer must have the processor's revision identifier
/// (§27.3.1.5).
pub(super) fn link_pointer_revision(c: &Context, f: &mut Findings) {
    let Some(header) = linked_header(c) else { return };
    let found = header & !SHADOW_INDICATOR;
    if found != REVISION {
        f.fail(
            &[LinkPointer],
            format!("the linked VMCS has revision identifier {found:#x}"),
            format!("{REVISION:#x} there, or link pointer FFFFFFFF_FFFFFFFFH"),
        );
    }
}

/// Bit 31 of the first dword at the link pointer must equal "VMCS shadowing" (§27.3.1.5).
pub(super) fn link_pointer_shadow_indicator(c: &Context, f: &mut Findings) {
    let Some(header) = linked_header(c) else { return };
    f.require(
        (header & SHADOW_INDICATOR != 0) == c.secondary(S::VMCS_SHADOWING),
        &[LinkPointer, SecondaryControls],
        "the linked VMCS's shadow-VMCS indicator disagrees with VMCS shadowing",
        "bit 31 of its first dword equal to VMCS shadowing (secondary bit 14)",
    );
}

/// The link pointer must not be the current-VMCS pointer (§27.3.1.5).
pub(super) fn link_pointer_not_current(c: &Context, f: &mut Findings) {
    f.require(
        link(c) != Some(c.current_vmcs.0),
        &[LinkPointer],
        "the current VMCS is linked to itself",
        "another VMCS, or FFFFFFFF_FFFFFFFFH",
    );
}

fn pdpte_valid(c: &Context, pdpte: u64) -> bool {
    pdpte & 1 == 0 || pdpte & PDPTE_RESERVED == 0 && c.caps.is_physical(pdpte)
}

fn pdpte_expected(c: &Context) -> String {
    format!("bits 2:1, 8:5 and 63:{} = 0, or present (bit 0) = 0", c.caps.physical_bits)
}

/// With PAE paging and "enable EPT", no PDPTE field that is present may set reserved bits
/// (§27.3.1.6).
pub(super) fn guest_pdptes(c: &Context, f: &mut Findings) {
    if !c.pae_paging() || !c.secondary(S::ENABLE_EPT) {
        return;
    }
    for field in GUEST_PDPTES {
        if !pdpte_valid(c, c.get(field)) {
            f.fail(&[field], format!("{} sets reserved bits", field.sdm_name()), pdpte_expected(c));
        }
    }
}

/// With PAE paging and without "enable EPT", no PDPTE in memory at CR3 that is present may set
/// reserved bits (§27.3.1.6). The SDM lets a processor check this at every entry.
pub(super) fn memory_pdptes(c: &Context, f: &mut Findings) {
    if !c.pae_paging() || c.secondary(S::ENABLE_EPT) {
        return;
    }
    // CR3 bits 31:5; higher and lower ones are ignored (SDM Vol. 3A table 4-7).
    let table = c.get(GuestCr3) & 0xffff_ffe0;
    for i in 0..4 {
        let mut bytes = [0; 8];
        c.memory.read(L1Gpa(table + i * 8), &mut bytes);
        let pdpte = u64::from_le_bytes(bytes);
        if !pdpte_valid(c, pdpte) {
            f.fail(
                &[GuestCr3],
                format!("PDPTE{i} in memory, {pdpte:#x}, sets reserved bits"),
                pdpte_expected(c),
            );
        }
    }
}
