//! VM entry after its checks: L2's state into VMCS02 (SDM Vol. 3C §27.3.2–27.4).
//!
//! Not supported: IA32_BNDCFGS, IA32_RTIT_CTL, CET, PKRS and entries to SMM, whose controls are not
//! offered.

use engine::{Activity, EngineVmcs, GuestRegs, GuestState};
use memory::L1Gpa;
use x86_spec::controls::{EntryControls as N, PinbasedControls as P, SecondaryControls as S};
use x86_spec::exit::ExitReason;
use x86_spec::msr;
use x86_spec::reg::{cr0, cr4, dr, efer};
use x86_spec::segment::seg;

use crate::checks::Report;
use crate::fields::{Field, GUEST_PDPTES};
use crate::merge::bitmaps::secondary12;
use crate::merge::{Merged, set_timer};
use crate::physical::{L1Physical, Msrs};
use crate::vmcs12::Vmcs12;

/// Most entries of an MSR list: 512 × (N + 1), with N from IA32_VMX_MISC bits 27:25 being 0. More
/// is undefined behaviour by §25.7.2; here it fails the entry or aborts the exit.
pub const MSR_LIST_MAX: u32 = 512;
/// Size of an entry of an MSR list in bytes (table 25-14).
const MSR_ENTRY: u64 = 16;

/// CR0 bits that VM entries and exits never change (§27.3.2.1, §28.5.1): ET, NW, CD, and all
/// reserved ones.
pub(crate) const CR0_KEPT: u64 = !(cr0::DEFINED & !(cr0::ET | cr0::NW | cr0::CD));

/// An entry that fails after its checks; reflect it with [`crate::reflect::entry_failure`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("VM entry fails: exit reason {} with qualification {qualification}", reason.name())]
pub struct FailedEntry {
    /// [`ExitReason::MsrLoading`].
    pub reason: ExitReason,
    /// Exit qualification: number of the MSR-list entry, counted from 1.
    pub qualification: u64,
}

/// An entry of a list of MSRs to load that can't be loaded (§27.4, §28.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {entry} of the list, MSR {word:#x} with value {value:#x}: {rule}")]
pub struct MsrLoadFailure {
    /// Its number, counted from 1.
    pub entry: u32,
    /// Its first half: the MSR's index in bits 31:0.
    pub word: u64,
    /// The value to be loaded.
    pub value: u64,
    /// What it breaks.
    pub rule: MsrRule,
}

/// A rule for the entries of a list of MSRs to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MsrRule {
    /// §25.7.2.
    #[error("the list has more than 512 entries (IA32_VMX_MISC bits 27:25)")]
    Length,
    /// Bits 63:32 of the entry.
    #[error("bits 63:32 of the entry are not 0")]
    Reserved,
    /// IA32_FS_BASE, IA32_GS_BASE.
    #[error("the MSR is loaded from the VMCS, with the segment")]
    SegmentBase,
    /// IA32_SMM_MONITOR_CTL.
    #[error("the MSR can be written in SMM only")]
    Smm,
    /// IA32_BIOS_UPDT_TRIG, IA32_BIOS_SIGN_ID.
    #[error("the MSR belongs to microcode updates, which can't be loaded here")]
    Microcode,
    /// An x2APIC register in x2APIC mode.
    #[error("registers of the local APIC can't be loaded in x2APIC mode")]
    X2apic,
    /// WRMSR would raise #GP(0).
    #[error("WRMSR would be #GP(0): there is no such MSR, or it does not take the value")]
    Refused,
}

impl MsrRule {
    /// What would satisfy it.
    pub const fn expected(self) -> &'static str {
        match self {
            Self::Length => "at most 512 entries",
            Self::Reserved => "bits 63:32 of the first half of the entry = 0",
            Self::SegmentBase => {
                "the FS or GS base field of the VMCS instead of IA32_FS_BASE or IA32_GS_BASE"
            }
            Self::Smm => "no IA32_SMM_MONITOR_CTL",
            Self::Microcode => "no IA32_BIOS_UPDT_TRIG and no IA32_BIOS_SIGN_ID",
            Self::X2apic => "no MSR from 800H to 8FFH",
            Self::Refused => "an MSR and a value that WRMSR accepts at CPL 0",
        }
    }
}

impl From<MsrLoadFailure> for FailedEntry {
    fn from(f: MsrLoadFailure) -> Self {
        Self { reason: ExitReason::MsrLoading, qualification: f.entry.into() }
    }
}

impl MsrLoadFailure {
    /// What the user is told of a VM entry with `vmcs12` that fails so.
    pub fn report(&self, vmcs12: &Vmcs12) -> Report {
        let mut report = Report::default();
        report.msr_loading(vmcs12, self.entry, self.to_string(), self.rule.expected());
        report
    }
}

/// Puts L2's state and the merged controls into `vmcs02`, then loads the MSR list.
///
/// `vmcs01` holds L1's state at the VMX instruction.
///
/// # Errors
/// [`MsrLoadFailure`] when an MSR can't be loaded (§27.4). `vmcs02` then has L2's state, and
/// MSRs before the failing one are loaded, as on a processor.
pub fn enter(
    vmcs02: &mut EngineVmcs,
    merged: Merged,
    vmcs01: &EngineVmcs,
    vmcs12: &Vmcs12,
    regs: &mut GuestRegs,
    l1: &dyn L1Physical,
    msrs: &mut dyn Msrs,
) -> Result<(), MsrLoadFailure> {
    let timer = merged.preemption_timer;
    vmcs02.controls = merged.controls;
    vmcs02.guest = guest_state(vmcs12, &vmcs01.guest, l1);
    set_timer(vmcs02, timer, None);
    let list = (vmcs12.get(Field::EntryMsrLoadAddress), vmcs12.get32(Field::EntryMsrLoadCount));
    load_msrs(list, &mut vmcs02.guest, regs, l1, msrs)
}

/// L2's state as VM entry loads it from VMCS12 (§27.3.2), on a processor whose state is
/// `now`, L1's.
pub fn guest_state(vmcs12: &Vmcs12, now: &GuestState, l1: &dyn L1Physical) -> GuestState {
    let entry = N::from_bits_truncate(vmcs12.get32(Field::EntryControls));
    let mut g = now.clone();
    control_registers(&mut g, vmcs12, now);
    debug_controls(&mut g, vmcs12, entry);
    model_specific(&mut g, vmcs12, entry);
    for i in 0..8 {
        if let Some(s) = g.segments.get_mut(i) {
            *s = vmcs12.guest_segment(i);
        }
    }
    unusable_bases(&mut g);
    (g.gdtr, g.idtr) = (vmcs12.guest_gdtr(), vmcs12.guest_idtr());
    g.rsp = vmcs12.get(Field::GuestRsp);
    g.rip = vmcs12.get(Field::GuestRip);
    g.rflags = vmcs12.get(Field::GuestRflags);
    pdptes(&mut g, vmcs12, l1);
    non_register_state(&mut g, vmcs12, now);
    g
}

/// §27.3.2.1: CR0 but for the bits that VM entry never changes; CR3 and CR4 whole.
fn control_registers(g: &mut GuestState, vmcs12: &Vmcs12, now: &GuestState) {
    g.cr0 = vmcs12.get(Field::GuestCr0) & !CR0_KEPT | now.cr0 & CR0_KEPT;
    g.cr3 = vmcs12.get(Field::GuestCr3);
    g.cr4 = vmcs12.get(Field::GuestCr4);
}

/// §27.3.2.1: DR7 with bits 15:14 and 12 cleared and bit 10 set, and IA32_DEBUGCTL, if L1 asks for
/// it. Else they stay as L1 has them.
fn debug_controls(g: &mut GuestState, vmcs12: &Vmcs12, entry: N) {
    if entry.contains(N::LOAD_DEBUG_CONTROLS) {
        g.dr7 = vmcs12.get(Field::GuestDr7) & 0xffff_ffff & !0xd000 | dr::DR7_FIXED1;
        g.debugctl = vmcs12.get(Field::GuestDebugctl);
    }
}

/// §27.3.2.1: SYSENTER MSRs always; IA32_PAT and IA32_PERF_GLOBAL_CTRL if asked for; IA32_EFER from its
/// field, or, if not asked for, with LMA from "IA-32e mode guest", and LME too if L2 has
/// paging.
fn model_specific(g: &mut GuestState, vmcs12: &Vmcs12, entry: N) {
    g.sysenter_cs = vmcs12.get(Field::GuestSysenterCs);
    g.sysenter_esp = vmcs12.get(Field::GuestSysenterEsp);
    g.sysenter_eip = vmcs12.get(Field::GuestSysenterEip);
    if entry.contains(N::LOAD_IA32_PAT) {
        g.pat = vmcs12.get(Field::GuestPat);
    }
    if entry.contains(N::LOAD_IA32_PERF_GLOBAL_CTRL) {
        g.perf_global_ctrl = vmcs12.get(Field::GuestPerfGlobalCtrl);
    }
    if entry.contains(N::LOAD_IA32_EFER) {
        g.efer = vmcs12.get(Field::GuestEfer);
    } else {
        let long = entry.contains(N::IA32E_MODE_GUEST);
        let set = |value: u64, bit: u64| if long { value | bit } else { value & !bit };
        g.efer = set(g.efer, efer::LMA);
        if g.cr0 & cr0::PG != 0 {
            g.efer = set(g.efer, efer::LME);
        }
    }
}

/// §27.3.2.2: of unusable SS, DS and ES the upper half of the base is cleared, and LDTR's is made
/// canonical; the rest is undefined, and stays as it is.
fn unusable_bases(g: &mut GuestState) {
    for i in [seg::ES, seg::SS, seg::DS, seg::LDTR] {
        if let Some(s) = g.segments.get_mut(i)
            && s.access.unusable()
        {
            s.base &= 0xffff_ffff;
        }
    }
}

/// §27.3.2.4: PDPTEs of a PAE guest, from the VMCS with EPT, else from the table at CR3, which is
/// L1-physical.
fn pdptes(g: &mut GuestState, vmcs12: &Vmcs12, l1: &dyn L1Physical) {
    let pae = g.cr0 & cr0::PG != 0 && g.cr4 & cr4::PAE != 0 && g.efer & efer::LMA == 0;
    if secondary12(vmcs12).contains(S::ENABLE_EPT) {
        g.pdptes = GUEST_PDPTES.map(|f| vmcs12.get(f));
    } else if pae {
        g.pdptes = read_pdptes(l1, g.cr3);
    }
}

/// The four PDPTEs at `cr3` (SDM Vol. 3A §4.4.1).
pub(crate) fn read_pdptes(l1: &dyn L1Physical, cr3: u64) -> [u64; 4] {
    let base = L1Gpa(cr3 & 0xffff_ffe0);
    [0, 8, 16, 24].map(|at| l1.read_u64(base.offset(at)))
}

/// §27.3.2.5, §27.7: activity and interruptibility state, pending debug exceptions, interrupt
/// status.
///
/// Blocking by NMI in the field is L2's, be it virtual or not: then, with NMI exiting and
/// without virtual NMIs, it is the processor's.
fn non_register_state(g: &mut GuestState, vmcs12: &Vmcs12, now: &GuestState) {
    g.activity = match vmcs12.get(Field::GuestActivity) {
        1 => Activity::Hlt,
        2 => Activity::Shutdown,
        3 => Activity::WaitForSipi,
        _ => Activity::Active,
    };
    g.interruptibility = vmcs12.get32(Field::GuestInterruptibility);
    g.pending_debug = vmcs12.get(Field::GuestPendingDebug);
    g.interrupt_status = vmcs12.get(Field::GuestInterruptStatus) as u16;
    // L0's own, which VMCS02 does not use.
    g.pml_index = now.pml_index;
}

/// MSR entry `number` (from 0) of the list at `list`: index with the reserved half, and data.
pub(crate) fn msr_entry(l1: &dyn L1Physical, list: u64, number: u32) -> (u64, u64) {
    let at = L1Gpa(list).offset(u64::from(number) * MSR_ENTRY);
    (l1.read_u64(at), l1.read_u64(at.offset(8)))
}

/// Where the data of MSR entry `number` is.
pub(crate) fn msr_entry_data(list: u64, number: u32) -> L1Gpa {
    L1Gpa(list).offset(u64::from(number) * MSR_ENTRY + 8)
}

/// The MSR that a load entry names, if the list may hold it (§27.4, §28.6): not FS_BASE and
/// GS_BASE, not an x2APIC register in x2APIC mode, none that only SMM or microcode loading may
/// write, and bits 63:32 clear.
fn loadable_msr(word: u64, x2apic: bool) -> Result<u32, MsrRule> {
    let index = u32::try_from(word).map_err(|_| MsrRule::Reserved)?;
    match index {
        msr::FS_BASE | msr::GS_BASE => Err(MsrRule::SegmentBase),
        msr::IA32_SMM_MONITOR_CTL => Err(MsrRule::Smm),
        msr::IA32_BIOS_UPDT_TRIG | msr::IA32_BIOS_SIGN_ID => Err(MsrRule::Microcode),
        0x800..=0x8ff if x2apic => Err(MsrRule::X2apic),
        _ => Ok(index),
    }
}

/// Loads MSRs at a VM entry (§27.4) or exit (§28.6), in order of `list`, which is its address and its length.
pub(crate) fn load_msrs(
    list: (u64, u32),
    guest: &mut GuestState,
    regs: &mut GuestRegs,
    l1: &dyn L1Physical,
    msrs: &mut dyn Msrs,
) -> Result<(), MsrLoadFailure> {
    let (list, count) = list;
    for number in 0..count {
        let (word, value) = msr_entry(l1, list, number);
        let failed = |rule| MsrLoadFailure { entry: number + 1, word, value, rule };
        if number >= MSR_LIST_MAX {
            return Err(failed(MsrRule::Length));
        }
        let index = loadable_msr(word, msrs.x2apic()).map_err(failed)?;
        msrs.write_msr(guest, regs, index, value).map_err(|_| failed(MsrRule::Refused))?;
    }
    Ok(())
}

/// Whether VMCS12 activates L1's VMX-preemption timer, and with what value.
pub fn timer12(vmcs12: &Vmcs12) -> Option<u32> {
    let pin = P::from_bits_truncate(vmcs12.get32(Field::PinControls));
    pin.contains(P::VMX_PREEMPTION_TIMER).then(|| vmcs12.get32(Field::PreemptionTimer))
}

/// Whether VMCS12 injects a pending MTF exit (§27.6.2): what [`crate::route::Context`] asks.
pub fn injects_mtf(vmcs12: &Vmcs12) -> bool {
    use x86_spec::interruption::{EventType, InterruptionInfo};
    let info = InterruptionInfo(vmcs12.get32(Field::EntryInterruptionInfo));
    info.is_valid() && info.event_type() == EventType::Other
}
