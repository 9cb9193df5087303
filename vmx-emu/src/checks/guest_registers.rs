//! Checks on guest control registers, debug registers and MSRs (SDM Vol. 3C §27.3.1.1).

use x86_spec::controls::EntryControls as N;
use x86_spec::reg::{cr0, cr4, efer};

use super::{Context, Findings, rules};
use crate::Capabilities;
use crate::Field::*;

/// CR0 must not set a bit to a value that VMX operation does not support. NW and CD are not
/// checked, nor are PE and PG of an unrestricted guest (§27.3.1.1).
pub(super) fn guest_cr0(c: &Context, f: &mut Findings) {
    let value = c.get(GuestCr0);
    let free = if c.unrestricted() { cr0::PE | cr0::PG } else { 0 };
    let checked = !(cr0::NW | cr0::CD | free);
    let zeros = Capabilities::CR0_FIXED0 & !value & checked;
    let ones = value & !Capabilities::CR0_FIXED1 & checked;
    rules::fixed_bits(f, GuestCr0, zeros, ones, "bits that are fixed in VMX operation");
}

/// With PG in CR0, PE must be 1 (§27.3.1.1).
pub(super) fn guest_paging_needs_protection(c: &Context, f: &mut Findings) {
    let value = c.get(GuestCr0);
    f.require(
        value & cr0::PG == 0 || value & cr0::PE != 0,
        &[GuestCr0],
        "paging in real-address mode",
        "PE (bit 0) = 1 or PG (bit 31) = 0",
    );
}

/// CR4 must not set a bit to a value that VMX operation does not support (§27.3.1.1).
pub(super) fn guest_cr4(c: &Context, f: &mut Findings) {
    let value = c.get(GuestCr4);
    let (zeros, ones) = (Capabilities::CR4_FIXED0 & !value, value & !c.caps.cr4_fixed1);
    rules::fixed_bits(f, GuestCr4, zeros, ones, "bits that are fixed in VMX operation");
}

/// With "load debug controls", reserved bits of IA32_DEBUGCTL must be 0 (§27.3.1.1).
pub(super) fn guest_debugctl(c: &Context, f: &mut Findings) {
    if c.entry(N::LOAD_DEBUG_CONTROLS) {
        rules::msr_reserved(c, f, GuestDebugctl, c.msr_bits.debugctl);
    }
}

/// With "IA-32e mode guest", PG in CR0 and PAE in CR4 must be 1 (§27.3.1.1).
pub(super) fn guest_ia32e_paging(c: &Context, f: &mut Findings) {
    f.require(
        !c.ia32e_guest() || c.get(GuestCr0) & cr0::PG != 0 && c.get(GuestCr4) & cr4::PAE != 0,
        &[EntryControls, GuestCr0, GuestCr4],
        "IA-32e mode without its paging",
        "PG (CR0 bit 31) = 1 and PAE (CR4 bit 5) = 1, or IA-32e mode guest (entry bit 9) = 0",
    );
}

/// Without "IA-32e mode guest", PCIDE in CR4 must be 0 (§27.3.1.1).
pub(super) fn guest_pcid_needs_ia32e(c: &Context, f: &mut Findings) {
    f.require(
        c.ia32e_guest() || c.get(GuestCr4) & cr4::PCIDE == 0,
        &[EntryControls, GuestCr4],
        "process-context identifiers outside IA-32e mode",
        "PCIDE (CR4 bit 17) = 0 or IA-32e mode guest (entry bit 9) = 1",
    );
}

/// CR3 must not set bits beyond the physical-address width (§27.3.1.1).
pub(super) fn guest_cr3(c: &Context, f: &mut Findings) {
    rules::cr3(c, f, GuestCr3);
}

/// With "load debug controls", bits 63:32 of DR7 must be 0 (§27.3.1.1).
pub(super) fn guest_dr7(c: &Context, f: &mut Findings) {
    f.require(
        !c.entry(N::LOAD_DEBUG_CONTROLS) || c.get(GuestDr7) >> 32 == 0,
        &[GuestDr7],
        "reserved bits of DR7",
        "bits 63:32 = 0",
    );
}

/// IA32_SYSENTER_ESP and IA32_SYSENTER_EIP must be canonical (§27.3.1.1).
pub(super) fn guest_sysenter(c: &Context, f: &mut Findings) {
    rules::canonical_fields(c, f, &[GuestSysenterEsp, GuestSysenterEip]);
}

/// With "load IA32_PERF_GLOBAL_CTRL", its reserved bits must be 0 (§27.3.1.1).
pub(super) fn guest_perf_global_ctrl(c: &Context, f: &mut Findings) {
    if c.entry(N::LOAD_IA32_PERF_GLOBAL_CTRL) {
        rules::msr_reserved(c, f, GuestPerfGlobalCtrl, c.msr_bits.perf_global_ctrl);
    }
}

/// With "load IA32_PAT", each byte must be a memory type that WRMSR would accept
/// (§27.3.1.1).
pub(super) fn guest_pat(c: &Context, f: &mut Findings) {
    if c.entry(N::LOAD_IA32_PAT) {
        rules::pat(c, f, GuestPat);
    }
}

/// With "load IA32_EFER", its reserved bits must be 0 (§27.3.1.1).
pub(super) fn guest_efer_reserved(c: &Context, f: &mut Findings) {
    if c.entry(N::LOAD_IA32_EFER) {
        rules::msr_reserved(c, f, GuestEfer, c.msr_bits.efer);
    }
}

/// With "load IA32_EFER", LMA must equal "IA-32e mode guest" (§27.3.1.1).
pub(super) fn guest_efer_lma(c: &Context, f: &mut Findings) {
    f.require(
        !c.entry(N::LOAD_IA32_EFER) || (c.get(GuestEfer) & efer::LMA != 0) == c.ia32e_guest(),
        &[GuestEfer, EntryControls],
        "EFER.LMA disagrees with the guest's mode",
        "LMA (bit 10) equal to IA-32e mode guest (entry bit 9)",
    );
}

/// With "load IA32_EFER" and PG in CR0, LMA must equal LME (§27.3.1.1).
pub(super) fn guest_efer_lme(c: &Context, f: &mut Findings) {
    let value = c.get(GuestEfer);
    f.require(
        !c.entry(N::LOAD_IA32_EFER)
            || c.get(GuestCr0) & cr0::PG == 0
            || (value & efer::LMA != 0) == (value & efer::LME != 0),
        &[GuestEfer, GuestCr0],
        "EFER.LMA differs from EFER.LME with paging on",
        "LME (bit 8) equal to LMA (bit 10), or PG (CR0 bit 31) = 0",
    );
}
