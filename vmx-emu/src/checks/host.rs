//! Checks on the host-state area and on the address-space size (SDM Vol. 3C §27.2.2–27.2.4).

use x86_spec::controls::ExitControls as X;
use x86_spec::reg::{cr0, cr4, efer};

use super::{Context, Findings, rules};
use crate::{Capabilities, Field, Field::*};

/// CR0 must not set a bit to a value that VMX operation does not support. NW and CD are not
/// checked: VM exits don't change them (§27.2.2).
pub(super) fn host_cr0(c: &Context, f: &mut Findings) {
    let value = c.get(HostCr0);
    let checked = !(cr0::NW | cr0::CD);
    let zeros = Capabilities::CR0_FIXED0 & !value & checked;
    let ones = value & !Capabilities::CR0_FIXED1 & checked;
    rules::fixed_bits(f, HostCr0, zeros, ones, "bits that are fixed in VMX operation");
}

/// CR4 must not set a bit to a value that VMX operation does not support (§27.2.2).
pub(super) fn host_cr4(c: &Context, f: &mut Findings) {
    let value = c.get(HostCr4);
    let (zeros, ones) = (Capabilities::CR4_FIXED0 & !value, value & !c.caps.cr4_fixed1);
    rules::fixed_bits(f, HostCr4, zeros, ones, "bits that are fixed in VMX operation");
}

/// CR3 must not set bits beyond the physical-address width (§27.2.2).
pub(super) fn host_cr3(c: &Context, f: &mut Findings) {
    rules::cr3(c, f, HostCr3);
}

/// IA32_SYSENTER_ESP and IA32_SYSENTER_EIP must be canonical (§27.2.2).
pub(super) fn host_sysenter(c: &Context, f: &mut Findings) {
    rules::canonical_fields(c, f, &[HostSysenterEsp, HostSysenterEip]);
}

/// With "load IA32_PERF_GLOBAL_CTRL", its reserved bits must be 0 (§27.2.2).
pub(super) fn host_perf_global_ctrl(c: &Context, f: &mut Findings) {
    if c.exit(X::LOAD_IA32_PERF_GLOBAL_CTRL) {
        rules::msr_reserved(c, f, HostPerfGlobalCtrl, c.msr_bits.perf_global_ctrl);
    }
}

/// With "load IA32_PAT", each byte must be a memory type that WRMSR would accept (§27.2.2).
pub(super) fn host_pat(c: &Context, f: &mut Findings) {
    if c.exit(X::LOAD_IA32_PAT) {
        rules::pat(c, f, HostPat);
    }
}

/// With "load IA32_EFER", its reserved bits must be 0 (§27.2.2).
pub(super) fn host_efer_reserved(c: &Context, f: &mut Findings) {
    if c.exit(X::LOAD_IA32_EFER) {
        rules::msr_reserved(c, f, HostEfer, c.msr_bits.efer);
    }
}

/// With "load IA32_EFER", LMA and LME must each have the value of "host address-space size"
/// (§27.2.2).
pub(super) fn host_efer_mode(c: &Context, f: &mut Findings) {
    if c.exit(X::LOAD_IA32_EFER) {
        let mode = efer::LMA | efer::LME;
        let wanted = if c.host_64() { mode } else { 0 };
        f.require(
            c.get(HostEfer) & mode == wanted,
            &[HostEfer, ExitControls],
            "EFER disagrees with the host address-space size",
            "LME (bit 8) and LMA (bit 10) equal to host address-space size (exit bit 9)",
        );
    }
}

/// RPL and TI of the selectors of CS, SS, DS, ES, FS, GS and TR must be 0 (§27.2.3).
pub(super) fn host_selector_rpl_ti(c: &Context, f: &mut Findings) {
    const SELECTORS: [Field; 7] = [
        HostCsSelector,
        HostSsSelector,
        HostDsSelector,
        HostEsSelector,
        HostFsSelector,
        HostGsSelector,
        HostTrSelector,
    ];
    for field in SELECTORS {
        if c.get(field) & 7 != 0 {
            f.fail(&[field], format!("{} has RPL or TI", field.sdm_name()), "bits 2:0 = 0");
        }
    }
}

/// The selectors of CS and TR must not be 0000H (§27.2.3).
pub(super) fn host_cs_tr_not_null(c: &Context, f: &mut Findings) {
    for field in [HostCsSelector, HostTrSelector] {
        if c.get(field) == 0 {
            f.fail(&[field], format!("{} is null", field.sdm_name()), "not 0000H");
        }
    }
}

/// The selector of SS must not be 0000H without "host address-space size" (§27.2.3).
pub(super) fn host_ss_not_null(c: &Context, f: &mut Findings) {
    f.require(
        c.host_64() || c.get(HostSsSelector) != 0,
        &[HostSsSelector, ExitControls],
        "a 32-bit host has a null SS",
        "not 0000H, or host address-space size (exit bit 9) = 1",
    );
}

/// The bases of FS, GS, GDTR, IDTR and TR must be canonical (§27.2.3).
pub(super) fn host_bases_canonical(c: &Context, f: &mut Findings) {
    rules::canonical_fields(c, f, &[HostFsBase, HostGsBase, HostGdtrBase, HostIdtrBase, HostTrBase]);
}

/// Outside IA-32e mode, "IA-32e mode guest" and "host address-space size" must be 0
/// (§27.2.4).
pub(super) fn legacy_mode_address_spaces(c: &Context, f: &mut Findings) {
    f.require(
        c.l1_long_mode || !c.ia32e_guest() && !c.host_64(),
        &[EntryControls, ExitControls],
        "VM entry outside IA-32e mode asks for 64-bit state",
        "IA-32e mode guest (entry bit 9) = 0 and host address-space size (exit bit 9) = 0",
    );
}

/// In IA-32e mode, "host address-space size" must be 1 (§27.2.4).
pub(super) fn long_mode_host_address_space(c: &Context, f: &mut Findings) {
    f.require(
        !c.l1_long_mode || c.host_64(),
        &[ExitControls],
        "VM entry in IA-32e mode would exit to a 32-bit host",
        "host address-space size (bit 9) = 1",
    );
}

/// Without "host address-space size": "IA-32e mode guest", PCIDE in CR4 and bits 63:32 of RIP
/// must be 0 (§27.2.4).
pub(super) fn host_32_bit_state(c: &Context, f: &mut Findings) {
    if c.host_64() {
        return;
    }
    f.require(
        !c.ia32e_guest(),
        &[EntryControls, ExitControls],
        "an IA-32e mode guest with a 32-bit host",
        "IA-32e mode guest (entry bit 9) = 0 or host address-space size (exit bit 9) = 1",
    );
    f.require(
        c.get(HostCr4) & cr4::PCIDE == 0,
        &[HostCr4],
        "a 32-bit host has process-context identifiers",
        "PCIDE (bit 17) = 0",
    );
    f.require(c.get(HostRip) >> 32 == 0, &[HostRip], "a 32-bit host has a 64-bit RIP", "bits 63:32 = 0");
}

/// With "host address-space size": PAE in CR4 must be 1 and RIP canonical (§27.2.4).
pub(super) fn host_64_bit_state(c: &Context, f: &mut Findings) {
    if !c.host_64() {
        return;
    }
    f.require(c.get(HostCr4) & cr4::PAE != 0, &[HostCr4], "a 64-bit host without PAE", "PAE (bit 5) = 1");
    rules::canonical_fields(c, f, &[HostRip]);
}
