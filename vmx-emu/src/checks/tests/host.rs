//! SDM Vol. 3C §27.2.2–27.2.4.

use x86_spec::controls::{EntryControls as N, ExitControls as X};
use x86_spec::reg::{cr0, cr4, efer};

use super::setup::{BEYOND, NOT_CANONICAL};
use super::{Case, fail, pass};
use crate::Field::*;

pub const CASES: &[Case] = &[
    // NW and CD are never checked.
    pass("host_cr0", |s| {
        s.or(HostCr0, cr0::NW | cr0::CD);
    }),
    fail(&["host_cr0"], |s| {
        s.clear(HostCr0, cr0::NE);
    }),
    fail(&["host_cr0"], |s| {
        s.clear(HostCr0, cr0::PG);
    }),
    fail(&["host_cr0"], |s| {
        s.or(HostCr0, 1 << 32);
    }),
    pass("host_cr4", |s| {
        s.or(HostCr4, cr4::PCIDE | cr4::SMEP | cr4::SMAP);
    }),
    fail(&["host_cr4"], |s| {
        s.clear(HostCr4, cr4::VMXE);
    }),
    fail(&["host_cr4"], |s| {
        s.or(HostCr4, cr4::LA57);
    }),
    pass("host_cr3", |s| {
        s.set(HostCr3, BEYOND - 1);
    }),
    fail(&["host_cr3"], |s| {
        s.set(HostCr3, BEYOND);
    }),
    pass("host_sysenter", |s| {
        s.set(HostSysenterEsp, NOT_CANONICAL - 1).set(HostSysenterEip, u64::MAX);
    }),
    fail(&["host_sysenter"], |s| {
        s.set(HostSysenterEsp, NOT_CANONICAL);
    }),
    fail(&["host_sysenter"], |s| {
        s.set(HostSysenterEip, NOT_CANONICAL);
    }),
    pass("host_perf_global_ctrl", |s| {
        s.on(X::LOAD_IA32_PERF_GLOBAL_CTRL).set(HostPerfGlobalCtrl, 0x7_0000_000f);
    }),
    pass("host_perf_global_ctrl", |s| {
        s.set(HostPerfGlobalCtrl, u64::MAX);
    }),
    fail(&["host_perf_global_ctrl"], |s| {
        s.on(X::LOAD_IA32_PERF_GLOBAL_CTRL).set(HostPerfGlobalCtrl, 1 << 63);
    }),
    pass("host_pat", |s| {
        s.set(HostPat, 0x0706_0504_0100_0007);
    }),
    pass("host_pat", |s| {
        s.off(X::LOAD_IA32_PAT).set(HostPat, u64::MAX);
    }),
    fail(&["host_pat"], |s| {
        s.set(HostPat, 2);
    }),
    fail(&["host_pat"], |s| {
        s.set(HostPat, 3 << 56);
    }),
    fail(&["host_pat"], |s| {
        s.set(HostPat, 8 << 24);
    }),
    pass("host_efer_reserved", |s| {
        s.set(HostEfer, efer::LME | efer::LMA);
    }),
    pass("host_efer_reserved", |s| {
        s.off(X::LOAD_IA32_EFER).set(HostEfer, u64::MAX);
    }),
    fail(&["host_efer_reserved"], |s| {
        s.or(HostEfer, 1 << 1);
    }),
    pass("host_efer_mode", |s| {
        s.off(X::LOAD_IA32_EFER).set(HostEfer, 0);
    }),
    pass("host_efer_mode", |s| {
        s.legacy_l1().set(HostEfer, efer::NXE);
    }),
    fail(&["host_efer_mode"], |s| {
        s.clear(HostEfer, efer::LMA);
    }),
    fail(&["host_efer_mode"], |s| {
        s.clear(HostEfer, efer::LME);
    }),
    fail(&["host_efer_mode"], |s| {
        s.legacy_l1().set(HostEfer, efer::LME);
    }),
    pass("host_selector_rpl_ti", |s| {
        s.set(HostDsSelector, 0xfff8).set(HostGsSelector, 8);
    }),
    fail(&["host_selector_rpl_ti"], |s| {
        s.set(HostCsSelector, 0x11);
    }),
    fail(&["host_selector_rpl_ti"], |s| {
        s.set(HostSsSelector, 0x1a);
    }),
    fail(&["host_selector_rpl_ti"], |s| {
        s.set(HostDsSelector, 4);
    }),
    fail(&["host_selector_rpl_ti"], |s| {
        s.set(HostEsSelector, 4);
    }),
    fail(&["host_selector_rpl_ti"], |s| {
        s.set(HostFsSelector, 3);
    }),
    fail(&["host_selector_rpl_ti"], |s| {
        s.set(HostGsSelector, 1);
    }),
    fail(&["host_selector_rpl_ti"], |s| {
        s.set(HostTrSelector, 0x44);
    }),
    pass("host_cs_tr_not_null", |s| {
        s.set(HostCsSelector, 8).set(HostTrSelector, 8);
    }),
    fail(&["host_cs_tr_not_null"], |s| {
        s.set(HostCsSelector, 0);
    }),
    fail(&["host_cs_tr_not_null"], |s| {
        s.set(HostTrSelector, 0);
    }),
    pass("host_ss_not_null", |s| {
        s.set(HostSsSelector, 0);
    }),
    fail(&["host_ss_not_null"], |s| {
        s.legacy_l1().set(HostSsSelector, 0);
    }),
    pass("host_bases_canonical", |s| {
        s.set(HostFsBase, NOT_CANONICAL - 1).set(HostGsBase, 0xffff_8000_0000_0000);
    }),
    fail(&["host_bases_canonical"], |s| {
        s.set(HostFsBase, NOT_CANONICAL);
    }),
    fail(&["host_bases_canonical"], |s| {
        s.set(HostGsBase, NOT_CANONICAL);
    }),
    fail(&["host_bases_canonical"], |s| {
        s.set(HostGdtrBase, NOT_CANONICAL);
    }),
    fail(&["host_bases_canonical"], |s| {
        s.set(HostIdtrBase, NOT_CANONICAL);
    }),
    fail(&["host_bases_canonical"], |s| {
        s.set(HostTrBase, NOT_CANONICAL);
    }),
    pass("legacy_mode_address_spaces", |s| {
        s.legacy_l1();
    }),
    fail(&["legacy_mode_address_spaces"], |s| {
        s.l1_long_mode = false;
    }),
    fail(&["legacy_mode_address_spaces"], |s| {
        s.legacy().l1_long_mode = false;
    }),
    pass("long_mode_host_address_space", |s| {
        s.legacy();
    }),
    fail(&["long_mode_host_address_space"], |s| {
        s.legacy_l1().l1_long_mode = true;
    }),
    pass("host_32_bit_state", |s| {
        s.legacy_l1().set(HostRip, 0xffff_ffff);
    }),
    fail(&["host_32_bit_state"], |s| {
        s.legacy_l1().set(HostRip, 1 << 32);
    }),
    fail(&["host_32_bit_state"], |s| {
        s.legacy_l1().or(HostCr4, cr4::PCIDE);
    }),
    fail(&["host_32_bit_state", "long_mode_host_address_space"], |s| {
        s.legacy_l1().on(N::IA32E_MODE_GUEST).or(GuestEfer, efer::LME | efer::LMA);
        s.l1_long_mode = true;
    }),
    pass("host_64_bit_state", |s| {
        s.set(HostRip, NOT_CANONICAL - 1);
    }),
    fail(&["host_64_bit_state"], |s| {
        s.clear(HostCr4, cr4::PAE);
    }),
    fail(&["host_64_bit_state"], |s| {
        s.set(HostRip, NOT_CANONICAL);
    }),
];
