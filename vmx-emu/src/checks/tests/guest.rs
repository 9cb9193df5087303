//! SDM Vol. 3C §27.3.1.1–27.3.1.6.

use x86_spec::controls::{EntryControls as N, PinbasedControls as P, SecondaryControls as S};
use x86_spec::interruption::EventType as T;
use x86_spec::reg::{cr0, cr4, efer, rflags};

use super::setup::{BEYOND, CURRENT_VMCS, NOT_CANONICAL, OTHER_VMCS, Setup};
use super::{Case, fail, pass};
use crate::Field::*;
use crate::vmcs12::{REVISION, SHADOW_INDICATOR};

/// Interruptibility state: blocking by STI, MOV SS, SMI, NMI (table 25-3).
const STI: u64 = 1;
const MOV_SS: u64 = 2;
const SMI: u64 = 4;
const NMI: u64 = 8;
/// Activity states (§25.4.2).
const HLT: u64 = 1;
const SHUTDOWN: u64 = 2;
const WAIT_FOR_SIPI: u64 = 3;
/// Pending debug exceptions: BS (table 25-4).
const BS: u64 = 1 << 14;

/// A user-mode guest: CS and SS of privilege level 3, flat data segments.
fn user(s: &mut Setup) -> &mut Setup {
    s.segment("CS", 0x33, 0, u32::MAX, 0xa0fb).segment("SS", 0x2b, 0, u32::MAX, 0xc0f3)
}

/// A usable LDTR.
fn ldt(s: &mut Setup) -> &mut Setup {
    s.segment("LDTR", 0x50, 0xffff_fe00_0000_5000, 0xfff, 0x82)
}

/// A usable DS, with these access rights.
fn ds(s: &mut Setup, access: u64) -> &mut Setup {
    s.segment("DS", 0x18, 0, u32::MAX, access)
}

/// Shadow paging and PAE, with these PDPTEs in memory at CR3.
fn shadow_paging(s: &mut Setup, pdptes: [u64; 4]) -> &mut Setup {
    s.legacy().off(S::ENABLE_EPT).set(GuestCr3, 0xe020);
    for (i, entry) in pdptes.iter().enumerate() {
        s.store(0xe020 + 8 * i as u64, &entry.to_le_bytes());
    }
    s
}

fn linked_header(s: &mut Setup, header: u32) -> &mut Setup {
    s.set(LinkPointer, OTHER_VMCS).store(OTHER_VMCS, &header.to_le_bytes())
}

fn shadowing(s: &mut Setup) -> &mut Setup {
    s.on(S::VMCS_SHADOWING).set(VmreadBitmap, 0xa000).set(VmwriteBitmap, 0xb000)
}

pub const CASES: &[Case] = &[
    // §27.3.1.1
    pass("guest_cr0", |s| {
        s.or(GuestCr0, cr0::NW | cr0::CD);
    }),
    pass("guest_cr0", |s| {
        s.real();
    }),
    fail(&["guest_cr0"], |s| {
        s.clear(GuestCr0, cr0::NE);
    }),
    // An unrestricted guest may clear PE and PG alone.
    fail(&["guest_cr0"], |s| {
        s.real().clear(GuestCr0, cr0::NE);
    }),
    fail(&["guest_cr0"], |s| {
        s.legacy().clear(GuestCr0, cr0::PG);
    }),
    fail(&["guest_cr0"], |s| {
        s.or(GuestCr0, 1 << 32);
    }),
    pass("guest_paging_needs_protection", |s| {
        s.unrestricted().legacy().clear(GuestCr0, cr0::PG);
    }),
    fail(&["guest_paging_needs_protection"], |s| {
        s.real().or(GuestCr0, cr0::PG);
    }),
    pass("guest_cr4", |s| {
        s.or(GuestCr4, cr4::SMEP | cr4::SMAP | cr4::OSXSAVE);
    }),
    fail(&["guest_cr4"], |s| {
        s.clear(GuestCr4, cr4::VMXE);
    }),
    fail(&["guest_cr4"], |s| {
        s.or(GuestCr4, cr4::LA57);
    }),
    // CET.
    fail(&["guest_cr4"], |s| {
        s.or(GuestCr4, 1 << 23);
    }),
    pass("guest_debugctl", |s| {
        s.set(GuestDebugctl, 3);
    }),
    pass("guest_debugctl", |s| {
        s.off(N::LOAD_DEBUG_CONTROLS).set(GuestDebugctl, u64::MAX);
    }),
    fail(&["guest_debugctl"], |s| {
        s.set(GuestDebugctl, 1 << 2);
    }),
    pass("guest_ia32e_paging", |s| {
        s.legacy().clear(GuestCr4, cr4::PAE);
    }),
    fail(&["guest_ia32e_paging"], |s| {
        s.clear(GuestCr4, cr4::PAE);
    }),
    fail(&["guest_ia32e_paging"], |s| {
        s.unrestricted().clear(GuestCr0, cr0::PG);
    }),
    pass("guest_pcid_needs_ia32e", |s| {
        s.or(GuestCr4, cr4::PCIDE);
    }),
    fail(&["guest_pcid_needs_ia32e"], |s| {
        s.legacy().or(GuestCr4, cr4::PCIDE);
    }),
    pass("guest_cr3", |s| {
        s.set(GuestCr3, BEYOND - 1);
    }),
    fail(&["guest_cr3"], |s| {
        s.set(GuestCr3, BEYOND);
    }),
    fail(&["guest_cr3"], |s| {
        s.set(GuestCr3, 1 << 63);
    }),
    pass("guest_dr7", |s| {
        s.set(GuestDr7, 0xffff_ffff);
    }),
    pass("guest_dr7", |s| {
        s.off(N::LOAD_DEBUG_CONTROLS).set(GuestDr7, 1 << 32);
    }),
    fail(&["guest_dr7"], |s| {
        s.set(GuestDr7, 1 << 32);
    }),
    pass("guest_sysenter", |s| {
        s.set(GuestSysenterEsp, NOT_CANONICAL - 1);
    }),
    fail(&["guest_sysenter"], |s| {
        s.set(GuestSysenterEsp, NOT_CANONICAL);
    }),
    fail(&["guest_sysenter"], |s| {
        s.set(GuestSysenterEip, NOT_CANONICAL);
    }),
    pass("guest_perf_global_ctrl", |s| {
        s.on(N::LOAD_IA32_PERF_GLOBAL_CTRL).set(GuestPerfGlobalCtrl, 0x7_0000_000f);
    }),
    pass("guest_perf_global_ctrl", |s| {
        s.set(GuestPerfGlobalCtrl, u64::MAX);
    }),
    fail(&["guest_perf_global_ctrl"], |s| {
        s.on(N::LOAD_IA32_PERF_GLOBAL_CTRL).set(GuestPerfGlobalCtrl, 1 << 35);
    }),
    pass("guest_pat", |s| {
        s.off(N::LOAD_IA32_PAT).set(GuestPat, u64::MAX);
    }),
    fail(&["guest_pat"], |s| {
        s.set(GuestPat, 2 << 32);
    }),
    pass("guest_efer_reserved", |s| {
        s.off(N::LOAD_IA32_EFER).set(GuestEfer, u64::MAX);
    }),
    fail(&["guest_efer_reserved"], |s| {
        s.or(GuestEfer, 1 << 12);
    }),
    // LME may differ from LMA without paging, LMA from the control may not.
    pass("guest_efer_lma", |s| {
        s.real().set(GuestEfer, efer::LME);
    }),
    fail(&["guest_efer_lma"], |s| {
        s.clear(GuestEfer, efer::LME | efer::LMA);
    }),
    fail(&["guest_efer_lma"], |s| {
        s.legacy().or(GuestEfer, efer::LME | efer::LMA);
    }),
    pass("guest_efer_lme", |s| {
        s.unrestricted().legacy().clear(GuestCr0, cr0::PG).set(GuestEfer, efer::LME);
    }),
    fail(&["guest_efer_lme"], |s| {
        s.clear(GuestEfer, efer::LME);
    }),
    fail(&["guest_efer_lme"], |s| {
        s.legacy().or(GuestEfer, efer::LME);
    }),
    // §27.3.1.2
    pass("tr_selector_ti", |s| {
        s.set(GuestTrSelector, 0x43);
    }),
    fail(&["tr_selector_ti"], |s| {
        s.set(GuestTrSelector, 0x44);
    }),
    pass("ldtr_selector_ti", |s| {
        s.set(GuestLdtrSelector, 0x54);
    }),
    fail(&["ldtr_selector_ti"], |s| {
        ldt(s).set(GuestLdtrSelector, 0x54);
    }),
    pass("ss_selector_rpl", |s| {
        user(s);
    }),
    pass("ss_selector_rpl", |s| {
        s.unrestricted().set(GuestSsSelector, 0x1b);
    }),
    // RPLs differ in virtual-8086 mode, where they mean nothing.
    pass("ss_selector_rpl", |s| {
        s.virtual_8086();
    }),
    fail(&["ss_selector_rpl"], |s| {
        s.set(GuestCsSelector, 0x13);
    }),
    pass("v8086_segment_bases", |s| {
        s.virtual_8086().set(GuestGsSelector, 0xffff).set(GuestGsBase, 0xffff0);
    }),
    fail(&["v8086_segment_bases"], |s| {
        s.virtual_8086().set(GuestEsBase, 0);
    }),
    fail(&["v8086_segment_bases"], |s| {
        s.virtual_8086().set(GuestCsSelector, 0);
    }),
    fail(&["v8086_segment_bases"], |s| {
        s.virtual_8086().or(GuestGsBase, 1 << 20);
    }),
    pass("tr_fs_gs_bases_canonical", |s| {
        s.set(GuestFsBase, NOT_CANONICAL - 1);
    }),
    fail(&["tr_fs_gs_bases_canonical"], |s| {
        s.set(GuestTrBase, NOT_CANONICAL);
    }),
    // Even unusable ones.
    fail(&["tr_fs_gs_bases_canonical"], |s| {
        s.set(GuestFsBase, NOT_CANONICAL);
    }),
    fail(&["tr_fs_gs_bases_canonical"], |s| {
        s.set(GuestGsBase, NOT_CANONICAL);
    }),
    pass("ldtr_base_canonical", |s| {
        s.set(GuestLdtrBase, NOT_CANONICAL);
    }),
    fail(&["ldtr_base_canonical"], |s| {
        ldt(s).set(GuestLdtrBase, NOT_CANONICAL);
    }),
    pass("cs_base_high", |s| {
        s.set(GuestCsBase, 0xffff_ffff);
    }),
    fail(&["cs_base_high"], |s| {
        s.set(GuestCsBase, 1 << 32);
    }),
    pass("ss_ds_es_bases_high", |s| {
        s.set(GuestDsBase, 1 << 32).set(GuestEsBase, 1 << 63);
    }),
    fail(&["ss_ds_es_bases_high"], |s| {
        s.set(GuestSsBase, 1 << 32);
    }),
    fail(&["ss_ds_es_bases_high"], |s| {
        ds(s, 0xc093).set(GuestDsBase, 1 << 32);
    }),
    fail(&["ss_ds_es_bases_high"], |s| {
        s.segment("ES", 0x18, 1 << 32, u32::MAX, 0xc093);
    }),
    pass("v8086_segment_limits", |s| {
        s.virtual_8086();
    }),
    fail(&["v8086_segment_limits"], |s| {
        s.virtual_8086().set(GuestFsLimit, 0xfffe);
    }),
    fail(&["v8086_segment_limits"], |s| {
        s.virtual_8086().set(GuestCsLimit, 0xffff_ffff);
    }),
    pass("v8086_segment_access_rights", |s| {
        s.virtual_8086();
    }),
    fail(&["v8086_segment_access_rights"], |s| {
        s.virtual_8086().set(GuestCsAccessRights, 0xfb);
    }),
    fail(&["v8086_segment_access_rights"], |s| {
        s.virtual_8086().set(GuestDsAccessRights, 0x1_0000);
    }),
    pass("cs_type", |s| {
        s.set(GuestCsAccessRights, 0xa099);
    }),
    pass("cs_type", |s| {
        s.real().set(GuestCsAccessRights, 0x93);
    }),
    fail(&["cs_type"], |s| {
        s.set(GuestCsAccessRights, 0xa09a);
    }),
    // Type 3 takes an unrestricted guest.
    fail(&["cs_type"], |s| {
        s.legacy().set(GuestCsAccessRights, 0xc093);
    }),
    fail(&["cs_type"], |s| {
        s.real().set(GuestCsAccessRights, 0x97);
    }),
    pass("ss_type", |s| {
        s.segment("SS", 0x18, 0, 0xfff, 0x97);
    }),
    pass("ss_type", |s| {
        s.segment("SS", 0, 0, 0, 0x1_0000);
    }),
    fail(&["ss_type"], |s| {
        s.set(GuestSsAccessRights, 0xc091);
    }),
    fail(&["ss_type"], |s| {
        s.set(GuestSsAccessRights, 0xc09b);
    }),
    pass("data_segments_accessed", |s| {
        ds(s, 0xc091);
    }),
    fail(&["data_segments_accessed"], |s| {
        ds(s, 0xc092);
    }),
    fail(&["data_segments_accessed"], |s| {
        s.segment("GS", 0x18, 0, u32::MAX, 0xc090);
    }),
    pass("data_segments_readable", |s| {
        ds(s, 0xc09b);
    }),
    fail(&["data_segments_readable"], |s| {
        ds(s, 0xc099);
    }),
    fail(&["data_segments_readable"], |s| {
        s.segment("ES", 0x10, 0, u32::MAX, 0xc09d);
    }),
    pass("segments_not_system", |s| {
        ds(s, 0xc093).set(GuestEsAccessRights, 0x1_0003);
    }),
    fail(&["segments_not_system"], |s| {
        s.clear(GuestCsAccessRights, 1 << 4);
    }),
    fail(&["segments_not_system"], |s| {
        ds(s, 0xc083);
    }),
    // CS counts even when it is marked unusable.
    fail(&["segments_not_system"], |s| {
        s.clear(GuestCsAccessRights, 1 << 4).or(GuestCsAccessRights, 1 << 16);
    }),
    // Conforming code keeps the caller's privilege level, which may be greater.
    pass("cs_dpl", |s| {
        user(s).set(GuestCsAccessRights, 0xa09f);
    }),
    fail(&["cs_dpl"], |s| {
        s.set(GuestCsAccessRights, 0xa0fb);
    }),
    fail(&["cs_dpl"], |s| {
        s.set(GuestCsAccessRights, 0xa0fd);
    }),
    fail(&["cs_dpl"], |s| {
        user(s).set(GuestCsAccessRights, 0xa09b);
    }),
    fail(&["cs_dpl"], |s| {
        s.real().set(GuestCsAccessRights, 0xf3);
    }),
    pass("ss_dpl_rpl", |s| {
        s.unrestricted().set(GuestSsSelector, 0x1a);
    }),
    fail(&["ss_dpl_rpl"], |s| {
        s.set(GuestSsSelector, 0x1b).set(GuestCsSelector, 0x13);
    }),
    fail(&["ss_dpl_rpl", "cs_dpl"], |s| {
        s.set(GuestSsAccessRights, 0xc0f3);
    }),
    pass("ss_dpl_zero", |s| {
        user(s);
    }),
    fail(&["ss_dpl_zero"], |s| {
        s.real().set(GuestSsAccessRights, 0xf3).set(GuestCsAccessRights, 0xfb);
    }),
    fail(&["ss_dpl_zero"], |s| {
        s.unrestricted().legacy().set(GuestCsAccessRights, 0xc093).set(GuestSsAccessRights, 0xc0f3);
    }),
    pass("data_segments_dpl", |s| {
        ds(s, 0xc0f3).set(GuestDsSelector, 0x2b);
    }),
    // Conforming code.
    pass("data_segments_dpl", |s| {
        ds(s, 0xc09f).set(GuestDsSelector, 0x2b);
    }),
    pass("data_segments_dpl", |s| {
        ds(s, 0xc093).unrestricted().set(GuestDsSelector, 0x2b);
    }),
    fail(&["data_segments_dpl"], |s| {
        ds(s, 0xc093).set(GuestDsSelector, 0x2b);
    }),
    fail(&["data_segments_dpl"], |s| {
        s.segment("FS", 0x13, 0, u32::MAX, 0xc0db);
    }),
    pass("segments_present", |s| {
        s.set(GuestEsAccessRights, 0x1_0013);
    }),
    fail(&["segments_present"], |s| {
        s.clear(GuestCsAccessRights, 1 << 7);
    }),
    fail(&["segments_present"], |s| {
        s.clear(GuestSsAccessRights, 1 << 7);
    }),
    pass("segments_reserved_low", |s| {
        s.set(GuestEsAccessRights, 0x1_0f00);
    }),
    fail(&["segments_reserved_low"], |s| {
        s.or(GuestCsAccessRights, 1 << 8);
    }),
    fail(&["segments_reserved_low"], |s| {
        s.or(GuestSsAccessRights, 1 << 11);
    }),
    // Outside IA-32e mode L means nothing.
    pass("cs_default_size", |s| {
        s.legacy().set(GuestCsAccessRights, 0xe09b);
    }),
    fail(&["cs_default_size"], |s| {
        s.or(GuestCsAccessRights, 1 << 14);
    }),
    pass("segments_granularity", |s| {
        s.segment("SS", 0x18, 0, 0xf_fffe, 0x4093);
    }),
    pass("segments_granularity", |s| {
        s.segment("SS", 0x18, 0, 0xfff, 0xc093);
    }),
    fail(&["segments_granularity"], |s| {
        s.set(GuestSsLimit, 0xffff_fffe);
    }),
    fail(&["segments_granularity"], |s| {
        s.clear(GuestCsAccessRights, 1 << 15);
    }),
    fail(&["segments_granularity"], |s| {
        ds(s, 0x4093).set(GuestDsLimit, 0x10_0000);
    }),
    pass("segments_reserved_high", |s| {
        s.or(GuestEsAccessRights, 1 << 17);
    }),
    fail(&["segments_reserved_high"], |s| {
        s.or(GuestCsAccessRights, 1 << 17);
    }),
    fail(&["segments_reserved_high"], |s| {
        s.or(GuestSsAccessRights, 1 << 31);
    }),
    pass("tr_type", |s| {
        s.legacy().set(GuestTrAccessRights, 0x83);
    }),
    fail(&["tr_type"], |s| {
        s.set(GuestTrAccessRights, 0x83);
    }),
    // Not busy.
    fail(&["tr_type"], |s| {
        s.legacy().set(GuestTrAccessRights, 0x89);
    }),
    pass("tr_system", |s| {
        s.set(GuestTrAccessRights, 0x8b);
    }),
    fail(&["tr_system"], |s| {
        s.or(GuestTrAccessRights, 1 << 4);
    }),
    pass("tr_present", |s| {
        s.set(GuestTrAccessRights, 0xeb);
    }),
    fail(&["tr_present"], |s| {
        s.clear(GuestTrAccessRights, 1 << 7);
    }),
    pass("tr_reserved_low", |s| {
        s.or(GuestTrAccessRights, 1 << 12);
    }),
    fail(&["tr_reserved_low"], |s| {
        s.or(GuestTrAccessRights, 1 << 9);
    }),
    pass("tr_granularity", |s| {
        s.set(GuestTrLimit, 0xfff).set(GuestTrAccessRights, 0x808b);
    }),
    fail(&["tr_granularity"], |s| {
        s.set(GuestTrAccessRights, 0x808b);
    }),
    fail(&["tr_granularity"], |s| {
        s.set(GuestTrLimit, 0x10_0fff);
    }),
    pass("tr_usable", |s| {
        s.set(GuestTrSelector, 0);
    }),
    fail(&["tr_usable"], |s| {
        s.or(GuestTrAccessRights, 1 << 16);
    }),
    pass("tr_reserved_high", |s| {
        s.or(GuestTrAccessRights, 1 << 14);
    }),
    fail(&["tr_reserved_high"], |s| {
        s.or(GuestTrAccessRights, 1 << 17);
    }),
    pass("ldtr_type", |s| {
        ldt(s);
    }),
    pass("ldtr_type", |s| {
        s.or(GuestLdtrAccessRights, 0xb);
    }),
    fail(&["ldtr_type"], |s| {
        ldt(s).set(GuestLdtrAccessRights, 0x8b);
    }),
    pass("ldtr_system", |s| {
        ldt(s);
    }),
    fail(&["ldtr_system"], |s| {
        ldt(s).or(GuestLdtrAccessRights, 1 << 4);
    }),
    pass("ldtr_present", |s| {
        s.clear(GuestLdtrAccessRights, 1 << 7);
    }),
    fail(&["ldtr_present"], |s| {
        ldt(s).clear(GuestLdtrAccessRights, 1 << 7);
    }),
    pass("ldtr_reserved_low", |s| {
        s.or(GuestLdtrAccessRights, 1 << 8);
    }),
    fail(&["ldtr_reserved_low"], |s| {
        ldt(s).or(GuestLdtrAccessRights, 1 << 8);
    }),
    pass("ldtr_granularity", |s| {
        ldt(s).or(GuestLdtrAccessRights, 1 << 15);
    }),
    fail(&["ldtr_granularity"], |s| {
        ldt(s).or(GuestLdtrAccessRights, 1 << 15).set(GuestLdtrLimit, 0xffe);
    }),
    fail(&["ldtr_granularity"], |s| {
        ldt(s).set(GuestLdtrLimit, 1 << 31 | 0xfff);
    }),
    pass("ldtr_reserved_high", |s| {
        s.or(GuestLdtrAccessRights, 1 << 20);
    }),
    fail(&["ldtr_reserved_high"], |s| {
        ldt(s).or(GuestLdtrAccessRights, 1 << 20);
    }),
    // §27.3.1.3
    pass("descriptor_table_bases", |s| {
        s.set(GuestGdtrBase, NOT_CANONICAL - 1);
    }),
    fail(&["descriptor_table_bases"], |s| {
        s.set(GuestGdtrBase, NOT_CANONICAL);
    }),
    fail(&["descriptor_table_bases"], |s| {
        s.set(GuestIdtrBase, NOT_CANONICAL);
    }),
    pass("descriptor_table_limits", |s| {
        s.set(GuestGdtrLimit, 0xffff).set(GuestIdtrLimit, 0xffff);
    }),
    fail(&["descriptor_table_limits"], |s| {
        s.set(GuestGdtrLimit, 0x1_0000);
    }),
    fail(&["descriptor_table_limits"], |s| {
        s.set(GuestIdtrLimit, 0xffff_ffff);
    }),
    // §27.3.1.4
    // Bits 63:48 are identical though the address is not canonical.
    pass("guest_rip", |s| {
        s.set(GuestRip, NOT_CANONICAL);
    }),
    pass("guest_rip", |s| {
        s.legacy().set(GuestRip, 0xffff_ffff);
    }),
    fail(&["guest_rip"], |s| {
        s.set(GuestRip, 1 << 48);
    }),
    fail(&["guest_rip"], |s| {
        s.legacy().set(GuestRip, 1 << 32);
    }),
    // Compatibility mode.
    fail(&["guest_rip"], |s| {
        s.set(GuestCsAccessRights, 0xc09b);
    }),
    pass("rflags_reserved", |s| {
        s.set(GuestRflags, 0x3f_7fd7 & !(rflags::VM));
    }),
    fail(&["rflags_reserved"], |s| {
        s.clear(GuestRflags, 2);
    }),
    fail(&["rflags_reserved"], |s| {
        s.or(GuestRflags, 1 << 3);
    }),
    fail(&["rflags_reserved"], |s| {
        s.or(GuestRflags, 1 << 5);
    }),
    fail(&["rflags_reserved"], |s| {
        s.or(GuestRflags, 1 << 15);
    }),
    fail(&["rflags_reserved"], |s| {
        s.or(GuestRflags, 1 << 22);
    }),
    fail(&["rflags_reserved"], |s| {
        s.or(GuestRflags, 1 << 63);
    }),
    pass("rflags_virtual_8086", |s| {
        s.virtual_8086();
    }),
    fail(&["rflags_virtual_8086"], |s| {
        s.virtual_8086().on(N::IA32E_MODE_GUEST).or(GuestEfer, efer::LME | efer::LMA);
    }),
    fail(&["rflags_virtual_8086"], |s| {
        s.virtual_8086().unrestricted().clear(GuestCr0, cr0::PE | cr0::PG);
    }),
    pass("rflags_interrupt_flag", |s| {
        s.inject(T::External, 0x20, false);
    }),
    pass("rflags_interrupt_flag", |s| {
        s.inject(T::Nmi, 2, false).clear(GuestRflags, rflags::IF);
    }),
    fail(&["rflags_interrupt_flag"], |s| {
        s.inject(T::External, 0x20, false).clear(GuestRflags, rflags::IF);
    }),
    // §27.3.1.5
    pass("activity_supported", |s| {
        s.set(GuestActivity, WAIT_FOR_SIPI);
    }),
    fail(&["activity_supported"], |s| {
        s.set(GuestActivity, 4);
    }),
    fail(&["activity_supported"], |s| {
        s.set(GuestActivity, HLT).caps.misc &= !(1 << 6);
    }),
    fail(&["activity_supported"], |s| {
        s.set(GuestActivity, SHUTDOWN).caps.misc &= !(1 << 7);
    }),
    fail(&["activity_supported"], |s| {
        s.set(GuestActivity, WAIT_FOR_SIPI).caps.misc &= !(1 << 8);
    }),
    pass("activity_hlt_cpl", |s| {
        s.set(GuestActivity, HLT);
    }),
    pass("activity_hlt_cpl", |s| {
        user(s).set(GuestActivity, SHUTDOWN);
    }),
    fail(&["activity_hlt_cpl"], |s| {
        user(s).set(GuestActivity, HLT);
    }),
    pass("activity_blocking", |s| {
        s.set(GuestActivity, HLT).set(GuestInterruptibility, NMI);
    }),
    fail(&["activity_blocking"], |s| {
        s.set(GuestActivity, HLT).set(GuestInterruptibility, STI);
    }),
    fail(&["activity_blocking"], |s| {
        s.set(GuestActivity, SHUTDOWN).set(GuestInterruptibility, MOV_SS);
    }),
    pass("activity_injection", |s| {
        s.set(GuestActivity, HLT).inject(T::External, 0x20, false);
    }),
    pass("activity_injection", |s| {
        s.set(GuestActivity, HLT).inject(T::Nmi, 2, false);
    }),
    pass("activity_injection", |s| {
        s.set(GuestActivity, HLT).inject(T::HardwareException, 1, false);
    }),
    pass("activity_injection", |s| {
        s.set(GuestActivity, HLT).inject(T::HardwareException, 18, false);
    }),
    pass("activity_injection", |s| {
        s.set(GuestActivity, HLT).inject(T::Other, 0, false);
    }),
    pass("activity_injection", |s| {
        s.set(GuestActivity, SHUTDOWN).inject(T::Nmi, 2, false);
    }),
    pass("activity_injection", |s| {
        s.set(GuestActivity, SHUTDOWN).inject(T::HardwareException, 18, false);
    }),
    fail(&["activity_injection"], |s| {
        s.set(GuestActivity, HLT).inject(T::HardwareException, 6, false);
    }),
    fail(&["activity_injection"], |s| {
        s.set(GuestActivity, HLT).inject(T::SoftwareInterrupt, 0x80, false);
    }),
    fail(&["activity_injection"], |s| {
        s.set(GuestActivity, SHUTDOWN).inject(T::External, 0x20, false);
    }),
    fail(&["activity_injection"], |s| {
        s.set(GuestActivity, SHUTDOWN).inject(T::HardwareException, 1, false);
    }),
    fail(&["activity_injection"], |s| {
        s.set(GuestActivity, WAIT_FOR_SIPI).inject(T::Nmi, 2, false);
    }),
    pass("interruptibility_reserved", |s| {
        s.set(GuestInterruptibility, STI | NMI);
    }),
    fail(&["interruptibility_reserved"], |s| {
        s.set(GuestInterruptibility, 1 << 5);
    }),
    fail(&["interruptibility_reserved"], |s| {
        s.set(GuestInterruptibility, 1 << 31);
    }),
    pass("interruptibility_sti_and_mov_ss", |s| {
        s.set(GuestInterruptibility, MOV_SS);
    }),
    fail(&["interruptibility_sti_and_mov_ss"], |s| {
        s.set(GuestInterruptibility, STI | MOV_SS);
    }),
    pass("interruptibility_sti_needs_if", |s| {
        s.set(GuestInterruptibility, MOV_SS).clear(GuestRflags, rflags::IF);
    }),
    fail(&["interruptibility_sti_needs_if"], |s| {
        s.set(GuestInterruptibility, STI).clear(GuestRflags, rflags::IF);
    }),
    pass("interruptibility_external_interrupt", |s| {
        s.set(GuestInterruptibility, STI).inject(T::HardwareException, 6, false);
    }),
    fail(&["interruptibility_external_interrupt"], |s| {
        s.set(GuestInterruptibility, STI).inject(T::External, 0x20, false);
    }),
    fail(&["interruptibility_external_interrupt"], |s| {
        s.set(GuestInterruptibility, MOV_SS).inject(T::External, 0x20, false);
    }),
    pass("interruptibility_nmi_mov_ss", |s| {
        s.inject(T::Nmi, 2, false);
    }),
    fail(&["interruptibility_nmi_mov_ss"], |s| {
        s.set(GuestInterruptibility, MOV_SS).inject(T::Nmi, 2, false);
    }),
    pass("interruptibility_smi", |s| {
        s.set(GuestInterruptibility, 0);
    }),
    fail(&["interruptibility_smi"], |s| {
        s.set(GuestInterruptibility, SMI);
    }),
    pass("interruptibility_virtual_nmi", |s| {
        s.off(P::VIRTUAL_NMIS).set(GuestInterruptibility, NMI).inject(T::Nmi, 2, false);
    }),
    fail(&["interruptibility_virtual_nmi"], |s| {
        s.set(GuestInterruptibility, NMI).inject(T::Nmi, 2, false);
    }),
    pass("interruptibility_enclave", |s| {
        s.set(GuestInterruptibility, NMI);
    }),
    fail(&["interruptibility_enclave"], |s| {
        s.set(GuestInterruptibility, 1 << 4);
    }),
    pass("interruptibility_nmi_sti", |s| {
        s.set(GuestInterruptibility, STI);
    }),
    fail(&["interruptibility_nmi_sti"], |s| {
        s.set(GuestInterruptibility, STI).inject(T::Nmi, 2, false);
    }),
    pass("pending_debug_reserved", |s| {
        s.set(GuestPendingDebug, 0xf | 1 << 12 | BS);
    }),
    fail(&["pending_debug_reserved"], |s| {
        s.set(GuestPendingDebug, 1 << 4);
    }),
    fail(&["pending_debug_reserved"], |s| {
        s.set(GuestPendingDebug, 1 << 11);
    }),
    fail(&["pending_debug_reserved"], |s| {
        s.set(GuestPendingDebug, 1 << 13);
    }),
    fail(&["pending_debug_reserved"], |s| {
        s.set(GuestPendingDebug, 1 << 15);
    }),
    fail(&["pending_debug_reserved"], |s| {
        s.set(GuestPendingDebug, 1 << 17);
    }),
    fail(&["pending_debug_reserved"], |s| {
        s.set(GuestPendingDebug, 1 << 63);
    }),
    // Without blocking or HLT, BS is free.
    pass("pending_debug_single_step", |s| {
        s.or(GuestRflags, rflags::TF);
    }),
    pass("pending_debug_single_step", |s| {
        s.or(GuestRflags, rflags::TF).set(GuestInterruptibility, STI).set(GuestPendingDebug, BS);
    }),
    fail(&["pending_debug_single_step"], |s| {
        s.or(GuestRflags, rflags::TF).set(GuestInterruptibility, STI);
    }),
    fail(&["pending_debug_single_step"], |s| {
        s.or(GuestRflags, rflags::TF).set(GuestInterruptibility, MOV_SS);
    }),
    fail(&["pending_debug_single_step"], |s| {
        s.or(GuestRflags, rflags::TF).set(GuestActivity, HLT);
    }),
    pass("pending_debug_no_single_step", |s| {
        s.or(GuestRflags, rflags::TF).set(GuestDebugctl, 2).set(GuestInterruptibility, STI);
    }),
    fail(&["pending_debug_no_single_step"], |s| {
        s.set(GuestInterruptibility, MOV_SS).set(GuestPendingDebug, BS);
    }),
    fail(&["pending_debug_no_single_step"], |s| {
        s.or(GuestRflags, rflags::TF)
            .set(GuestDebugctl, 2)
            .set(GuestActivity, HLT)
            .set(GuestPendingDebug, BS);
    }),
    pass("pending_debug_rtm", |s| {
        s.set(GuestPendingDebug, 1 << 12);
    }),
    fail(&["pending_debug_rtm"], |s| {
        s.set(GuestPendingDebug, 1 << 16 | 1 << 12);
    }),
    pass("link_pointer_address", |s| {
        s.set(LinkPointer, OTHER_VMCS);
    }),
    fail(&["link_pointer_address"], |s| {
        s.set(LinkPointer, OTHER_VMCS + 4);
    }),
    fail(&["link_pointer_address"], |s| {
        s.set(LinkPointer, BEYOND);
    }),
    pass("link_pointer_revision", |s| {
        linked_header(s, REVISION);
    }),
    fail(&["link_pointer_revision"], |s| {
        linked_header(s, REVISION + 1);
    }),
    // Where there is no memory, all bits are 1.
    fail(&["link_pointer_revision", "link_pointer_shadow_indicator"], |s| {
        s.set(LinkPointer, BEYOND - 0x1000);
    }),
    pass("link_pointer_shadow_indicator", |s| {
        linked_header(shadowing(s), REVISION | SHADOW_INDICATOR);
    }),
    fail(&["link_pointer_shadow_indicator"], |s| {
        linked_header(s, REVISION | SHADOW_INDICATOR);
    }),
    fail(&["link_pointer_shadow_indicator"], |s| {
        linked_header(shadowing(s), REVISION);
    }),
    pass("link_pointer_not_current", |s| {
        s.set(LinkPointer, u64::MAX);
    }),
    fail(&["link_pointer_not_current"], |s| {
        s.set(LinkPointer, CURRENT_VMCS).store(CURRENT_VMCS, &REVISION.to_le_bytes());
    }),
    // §27.3.1.6
    pass("guest_pdptes", |s| {
        s.legacy().set(GuestPdpte0, 0xf000 | 0xe19).set(GuestPdpte3, u64::MAX - 1);
    }),
    // Not PAE paging: 4-level, 32-bit, none.
    pass("guest_pdptes", |s| {
        s.set(GuestPdpte0, u64::MAX);
    }),
    pass("guest_pdptes", |s| {
        s.legacy().clear(GuestCr4, cr4::PAE).set(GuestPdpte0, u64::MAX);
    }),
    pass("guest_pdptes", |s| {
        s.real().set(GuestPdpte0, u64::MAX);
    }),
    fail(&["guest_pdptes"], |s| {
        s.legacy().set(GuestPdpte0, 1 | 1 << 1);
    }),
    fail(&["guest_pdptes"], |s| {
        s.legacy().set(GuestPdpte1, 1 | 1 << 5);
    }),
    fail(&["guest_pdptes"], |s| {
        s.legacy().set(GuestPdpte2, 1 | 1 << 8);
    }),
    fail(&["guest_pdptes"], |s| {
        s.legacy().set(GuestPdpte3, 1 | BEYOND);
    }),
    pass("memory_pdptes", |s| {
        shadow_paging(s, [0x1_0019, 0, 0x1_2001, u64::MAX - 1]);
    }),
    pass("memory_pdptes", |s| {
        s.legacy().set(GuestCr3, 0xe020);
    }),
    fail(&["memory_pdptes"], |s| {
        shadow_paging(s, [0x1_0001, 0, 0, 1 | 1 << 63]);
    }),
    fail(&["memory_pdptes"], |s| {
        shadow_paging(s, [0x1_0003, 0, 0, 0]);
    }),
];
