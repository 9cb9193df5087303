//! VM exits from L2 to L1 (SDM Vol. 3C ch. 28): what the exit was and L2's state into VMCS12,
//! VMCS12's host state into L1's.
//!
//! Not supported: IA32_BNDCFGS, IA32_RTIT_CTL, CET, PKRS, SMM, whose controls are not offered.

use engine::{
    Activity, DescriptorTable, EngineVmcs, GuestRegs, GuestState, Segment, VmExit, interruptibility,
};
use x86_spec::controls::{
    EntryControls as N, ExitControls as X, PinbasedControls as P, SecondaryControls as S,
};
use x86_spec::exit::ExitReason;
use x86_spec::interruption::{EventType, InterruptionInfo};
use x86_spec::msr;
use x86_spec::reg::{cr0, cr4, dr, efer, rflags};
use x86_spec::segment::{AccessRights, seg};

use crate::capabilities::Capabilities;
use crate::enter::{self, CR0_KEPT, FailedEntry, MSR_LIST_MAX};
use crate::fields::{Field, GUEST_PDPTES};
use crate::merge::bitmaps::secondary12;
use crate::merge::tsc::Timer12;
use crate::physical::{L1Physical, Msrs};
use crate::vmcs12::Vmcs12;

/// Bit 31 of the exit reason: VM-entry failure (§25.9.1).
const ENTRY_FAILURE: u64 = 1 << 31;

/// A VMX abort (§28.7): the number goes to the abort indicator of the VMCS region
/// ([`crate::vmcs12::ABORT_INDICATOR_OFFSET`]), and L1's processor shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[repr(u32)]
pub enum Abort {
    /// A guest MSR could not be saved.
    #[error("VMX abort 1: saving guest MSRs failed at entry {entry} of the VM-exit MSR-store list")]
    SaveGuestMsrs {
        /// Entry, counted from 1.
        entry: u32,
    } = 1,
    /// PDPTEs of the host could not be loaded.
    #[error("VMX abort 2: a PDPTE at host CR3 {cr3:#x} has reserved bits set")]
    HostPdptes {
        /// Host CR3.
        cr3: u64,
    } = 2,
    /// A host MSR could not be loaded.
    #[error("VMX abort 4: loading host MSRs failed at entry {entry} of the VM-exit MSR-load list")]
    LoadHostMsrs {
        /// Entry, counted from 1.
        entry: u32,
    } = 4,
    /// L2 was in IA-32e mode, and "host address-space size" is 0.
    #[error("VMX abort 6: the guest was in IA-32e mode and \"host address-space size\" is 0")]
    HostAddressSpace = 6,
}

impl Abort {
    /// The VMX-abort indicator.
    pub const fn indicator(self) -> u32 {
        match self {
            Self::SaveGuestMsrs { .. } => 1,
            Self::HostPdptes { .. } => 2,
            Self::LoadHostMsrs { .. } => 4,
            Self::HostAddressSpace => 6,
        }
    }
}

/// What the hypervisor still has to do after a VM exit or entry for L1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AfterSwitch {
    /// VMCS12 does not enable VPIDs: translations of VPID 0, L1's and this L2's, are to be
    /// dropped (§28.5.5, §29.3.1).
    pub flush_vpid0: bool,
}

/// Whether the switch between L1 and L2 drops the translations of VPID 0.
pub fn after_switch(vmcs12: &Vmcs12) -> AfterSwitch {
    AfterSwitch { flush_vpid0: !secondary12(vmcs12).contains(S::ENABLE_VPID) }
}

/// The parts that a VM exit to L1 touches.
pub struct Parts<'a> {
    /// L1's VMCS.
    pub vmcs12: &'a mut Vmcs12,
    /// L1's context: becomes what VMCS12's host state says.
    pub vmcs01: &'a mut EngineVmcs,
    /// L2's context as the engine left it.
    pub vmcs02: &'a EngineVmcs,
    /// Registers that stay in the processor.
    pub regs: &'a mut GuestRegs,
    /// L1's memory.
    pub l1: &'a dyn L1Physical,
    /// L1's MSRs.
    pub msrs: &'a mut dyn Msrs,
    /// L1's VMX-preemption timer and the TSC at the exit.
    pub timer12: Option<(Timer12, u64)>,
    /// L1's MAXPHYADDR.
    pub physical_bits: u8,
}

/// Reflects `exit` to L1. One that the engine reports as a failed entry is reflected by
/// [`entry_failure`].
///
/// # Errors
/// [`Abort`].
pub fn reflect(exit: &VmExit, parts: &mut Parts<'_>) -> Result<AfterSwitch, Abort> {
    if exit.entry_failure {
        return entry_failure(exit.reason, exit.qualification, parts);
    }
    record_exit(parts.vmcs12, exit);
    pending_injection(parts.vmcs12, exit, parts.vmcs02);
    save_guest_state(parts.vmcs12, &parts.vmcs02.guest);
    save_timer(parts.vmcs12, exit.reason, parts.timer12);
    clear_injection(parts.vmcs12);
    store_msrs(parts)?;
    let nmi =
        exit.reason == ExitReason::ExceptionOrNmi && exit.interruption_info.event_type() == EventType::Nmi;
    load_host(parts, nmi, true)
}

/// Reflects a VM entry that failed during or after loading of guest state (§27.8): only exit
/// reason and qualification are recorded; VMCS12's guest state, its MSR-store list and the valid bit
/// of its injection are not touched.
///
/// # Errors
/// [`Abort`].
pub fn entry_failure(
    reason: ExitReason,
    qualification: u64,
    parts: &mut Parts<'_>,
) -> Result<AfterSwitch, Abort> {
    parts.vmcs12.set(Field::ExitReason, reason as u64 | ENTRY_FAILURE);
    parts.vmcs12.set(Field::ExitQualification, qualification);
    load_host(parts, false, false)
}

impl FailedEntry {
    /// Reflects it, as [`entry_failure`].
    ///
    /// # Errors
    /// [`Abort`].
    pub fn reflect(self, parts: &mut Parts<'_>) -> Result<AfterSwitch, Abort> {
        entry_failure(self.reason, self.qualification, parts)
    }
}

// ---- exit information ------------------------------------------------------------------

/// VM-exit information fields (§28.2).
fn record_exit(vmcs12: &mut Vmcs12, exit: &VmExit) {
    for (field, value) in [
        (Field::ExitReason, exit.reason as u64),
        (Field::ExitQualification, exit.qualification),
        (Field::ExitInterruptionInfo, exit.interruption_info.0.into()),
        (Field::ExitInterruptionErrorCode, exit.interruption_error_code.into()),
        (Field::IdtVectoringInfo, exit.idt_vectoring.0.into()),
        (Field::IdtVectoringErrorCode, exit.idt_vectoring_error_code.into()),
        (Field::ExitInstructionLength, exit.instruction_length.into()),
        (Field::ExitInstructionInfo, exit.instruction_info.into()),
        (Field::GuestLinearAddress, exit.guest_linear),
    ] {
        vmcs12.set(field, value);
    }
    // The other exits leave the field unmodified (§28.2.1).
    if matches!(exit.reason, ExitReason::EptViolation | ExitReason::EptMisconfiguration) {
        vmcs12.set(Field::GuestPhysicalAddress, exit.guest_physical.0);
    }
}

/// An event that L0 was still to inject (again) into L2 when the exit to L1 came up was
/// interrupted by that exit, as far as L1 can see: it becomes IDT-vectoring information
/// (§28.2.4).
fn pending_injection(vmcs12: &mut Vmcs12, exit: &VmExit, vmcs02: &EngineVmcs) {
    let c = &vmcs02.controls;
    let info = c.entry_interruption;
    if exit.idt_vectoring.is_valid() || !info.is_valid() || info.event_type() == EventType::Other {
        return;
    }
    vmcs12.set(Field::IdtVectoringInfo, info.0.into());
    if info.has_error_code() {
        vmcs12.set(Field::IdtVectoringErrorCode, c.entry_error_code.into());
    }
    if is_software(info.event_type()) {
        vmcs12.set(Field::ExitInstructionLength, c.entry_instruction_length.into());
    }
}

const fn is_software(ty: EventType) -> bool {
    matches!(
        ty,
        EventType::SoftwareInterrupt | EventType::PrivilegedSoftwareException | EventType::SoftwareException
    )
}

/// Has the event whose delivery `exit` interrupted delivered again at the next entry with
/// `vmcs`. For exits that L0 keeps.
pub fn requeue_vectoring(vmcs: &mut EngineVmcs, exit: &VmExit) {
    if !exit.idt_vectoring.is_valid() {
        return;
    }
    let c = &mut vmcs.controls;
    // Bit 12 is about NMIs unblocked by IRET and reserved for entries.
    c.entry_interruption = InterruptionInfo(exit.idt_vectoring.0 & !InterruptionInfo::NMI_UNBLOCKING);
    c.entry_error_code = exit.idt_vectoring_error_code;
    c.entry_instruction_length = exit.instruction_length;
    if exit.idt_vectoring.event_type() == EventType::Nmi {
        // Injection needs NMIs unblocked; the injected NMI blocks them again (§27.3.1.5).
        vmcs.guest.interruptibility &= !interruptibility::NMI;
    }
}

/// §28.2: an exit clears the valid bit of the VM-entry interruption-information field.
fn clear_injection(vmcs12: &mut Vmcs12) {
    let info = vmcs12.get32(Field::EntryInterruptionInfo) & !InterruptionInfo::VALID;
    vmcs12.set(Field::EntryInterruptionInfo, info.into());
}

// ---- guest state -----------------------------------------------------------------------

/// Saves L2's state (§28.3).
pub fn save_guest_state(vmcs12: &mut Vmcs12, g: &GuestState) {
    let exit = X::from_bits_truncate(vmcs12.get32(Field::ExitControls));
    for (field, value) in [
        (Field::GuestCr0, g.cr0),
        (Field::GuestCr3, g.cr3),
        (Field::GuestCr4, g.cr4),
        (Field::GuestSysenterCs, g.sysenter_cs),
        (Field::GuestSysenterEsp, g.sysenter_esp),
        (Field::GuestSysenterEip, g.sysenter_eip),
        (Field::GuestGdtrBase, g.gdtr.base),
        (Field::GuestGdtrLimit, g.gdtr.limit.into()),
        (Field::GuestIdtrBase, g.idtr.base),
        (Field::GuestIdtrLimit, g.idtr.limit.into()),
        (Field::GuestRsp, g.rsp),
        (Field::GuestRip, g.rip),
        (Field::GuestRflags, g.rflags),
        (Field::GuestActivity, g.activity as u64),
        (Field::GuestInterruptibility, g.interruptibility.into()),
        (Field::GuestPendingDebug, g.pending_debug),
    ] {
        vmcs12.set(field, value);
    }
    for (i, s) in g.segments.iter().enumerate() {
        vmcs12.set_guest_segment(i, s);
    }
    if exit.contains(X::SAVE_DEBUG_CONTROLS) {
        vmcs12.set(Field::GuestDr7, g.dr7);
        vmcs12.set(Field::GuestDebugctl, g.debugctl);
    }
    if exit.contains(X::SAVE_IA32_PAT) {
        vmcs12.set(Field::GuestPat, g.pat);
    }
    if exit.contains(X::SAVE_IA32_EFER) {
        vmcs12.set(Field::GuestEfer, g.efer);
    }
    // IA32_VMX_MISC bit 5: the entry control follows LMA (§28.2).
    let lma = N::IA32E_MODE_GUEST.bits();
    let others = vmcs12.get32(Field::EntryControls) & !lma;
    let entry = if g.efer & efer::LMA != 0 { others | lma } else { others };
    vmcs12.set(Field::EntryControls, entry.into());
    let secondary = secondary12(vmcs12);
    if secondary.contains(S::ENABLE_EPT) {
        for (f, v) in GUEST_PDPTES.iter().zip(g.pdptes) {
            vmcs12.set(*f, v);
        }
    }
    if secondary.contains(S::VIRTUAL_INTERRUPT_DELIVERY) {
        vmcs12.set(Field::GuestInterruptStatus, g.interrupt_status.into());
    }
}

/// §28.3.4, §26.5.1: the timer's value is saved if L1 asks for it; at its own exit it is 0.
fn save_timer(vmcs12: &mut Vmcs12, reason: ExitReason, timer: Option<(Timer12, u64)>) {
    let exit = X::from_bits_truncate(vmcs12.get32(Field::ExitControls));
    if let Some((timer, now)) = timer
        && exit.contains(X::SAVE_VMX_PREEMPTION_TIMER)
    {
        let left = if reason == ExitReason::PreemptionTimer { 0 } else { timer.remaining(now) };
        vmcs12.set(Field::PreemptionTimer, left.into());
    }
}

/// VM-exit MSR-store list (§28.4). An entry fails if its reserved half is not 0, if it names an
/// MSR that can't be read, an x2APIC register in x2APIC mode, or IA32_SMBASE.
fn store_msrs(parts: &mut Parts<'_>) -> Result<(), Abort> {
    let list = parts.vmcs12.get(Field::ExitMsrStoreAddress);
    for number in 0..parts.vmcs12.get32(Field::ExitMsrStoreCount) {
        let failed = Abort::SaveGuestMsrs { entry: number + 1 };
        if number >= MSR_LIST_MAX {
            return Err(failed);
        }
        let (word, _) = enter::msr_entry(parts.l1, list, number);
        let index = u32::try_from(word).map_err(|_| failed)?;
        let x2apic = (0x800..=0x8ff).contains(&index) && parts.msrs.x2apic();
        if x2apic || index == msr::IA32_SMBASE {
            return Err(failed);
        }
        let value = parts.msrs.read_msr(&parts.vmcs02.guest, parts.regs, index).map_err(|_| failed)?;
        parts.l1.write(enter::msr_entry_data(list, number), &value.to_le_bytes());
    }
    Ok(())
}

// ---- host state ------------------------------------------------------------------------

/// Loads host state and the VM-exit MSR-load list (§28.5, §28.6).
fn load_host(parts: &mut Parts<'_>, nmi: bool, entered: bool) -> Result<AfterSwitch, Abort> {
    let exit = X::from_bits_truncate(parts.vmcs12.get32(Field::ExitControls));
    let l2 = &parts.vmcs02.guest;
    if l2.efer & efer::LMA != 0 && !exit.contains(X::HOST_ADDRESS_SPACE_SIZE) {
        return Err(Abort::HostAddressSpace);
    }
    let blocked = nmi_blocking(parts.vmcs12, &parts.vmcs01.guest, l2, nmi, entered);
    host_state(parts.vmcs12, l2, &mut parts.vmcs01.guest, parts.physical_bits);
    parts.vmcs01.guest.interruptibility = if blocked { interruptibility::NMI } else { 0 };
    show_host_crs(parts.vmcs01);
    load_host_pdptes(&mut parts.vmcs01.guest, parts.l1, parts.physical_bits)?;
    load_msrs(parts)?;
    Ok(after_switch(parts.vmcs12))
}

/// L1's processor after the exit (§28.5), which was `l2` before it.
pub fn host_state(vmcs12: &Vmcs12, l2: &GuestState, g: &mut GuestState, physical_bits: u8) {
    let exit = X::from_bits_truncate(vmcs12.get32(Field::ExitControls));
    let host64 = exit.contains(X::HOST_ADDRESS_SPACE_SIZE);
    host_control_registers(vmcs12, l2, g, host64, physical_bits);
    host_msrs(vmcs12, l2, g, exit, host64);
    host_segments(vmcs12, g, host64);
    // §28.5.2.
    g.gdtr = DescriptorTable { base: vmcs12.get(Field::HostGdtrBase), limit: 0xffff };
    g.idtr = DescriptorTable { base: vmcs12.get(Field::HostIdtrBase), limit: 0xffff };
    // §28.5.3: RIP, RSP, RFLAGS.
    let mask = if host64 { u64::MAX } else { 0xffff_ffff };
    g.rip = vmcs12.get(Field::HostRip) & mask;
    g.rsp = vmcs12.get(Field::HostRsp) & mask;
    g.rflags = rflags::FIXED1;
    // §28.5.5: active, nothing pending.
    g.activity = Activity::Active;
    g.pending_debug = 0;
}

/// §28.5.1: CR0 but for ET, NW, CD, reserved bits and those fixed in VMX operation; CR3 without bits
/// beyond the physical-address width; CR4 with PAE as a 64-bit host needs it, without PCIDE for
/// another one, and with the bits fixed in VMX operation; DR7.
fn host_control_registers(vmcs12: &Vmcs12, l2: &GuestState, g: &mut GuestState, host64: bool, bits: u8) {
    g.cr0 = vmcs12.get(Field::HostCr0) & !CR0_KEPT | l2.cr0 & CR0_KEPT | Capabilities::CR0_FIXED0;
    let width = 1u64.checked_shl(bits.into()).map_or(u64::MAX, |b| b - 1);
    g.cr3 = vmcs12.get(Field::HostCr3) & width;
    let mut cr4 = vmcs12.get(Field::HostCr4) | Capabilities::CR4_FIXED0;
    if host64 {
        cr4 |= cr4::PAE;
    } else {
        cr4 &= !cr4::PCIDE;
    }
    g.cr4 = cr4;
    g.dr7 = dr::DR7_FIXED1;
}

/// §28.5.1: IA32_DEBUGCTL is cleared; SYSENTER MSRs are loaded; IA32_EFER, IA32_PAT and
/// IA32_PERF_GLOBAL_CTRL if L1 asks for it. IA32_EFER's LMA and LME otherwise follow "host
/// address-space size". What is not loaded stays as L2 had it.
fn host_msrs(vmcs12: &Vmcs12, l2: &GuestState, g: &mut GuestState, exit: X, host64: bool) {
    g.debugctl = 0;
    g.sysenter_cs = vmcs12.get(Field::HostSysenterCs);
    g.sysenter_esp = vmcs12.get(Field::HostSysenterEsp);
    g.sysenter_eip = vmcs12.get(Field::HostSysenterEip);
    let long = efer::LME | efer::LMA;
    g.efer = l2.efer & !long | if host64 { long } else { 0 };
    if exit.contains(X::LOAD_IA32_EFER) {
        g.efer = vmcs12.get(Field::HostEfer);
    }
    g.pat = if exit.contains(X::LOAD_IA32_PAT) { vmcs12.get(Field::HostPat) } else { l2.pat };
    g.perf_global_ctrl = if exit.contains(X::LOAD_IA32_PERF_GLOBAL_CTRL) {
        vmcs12.get(Field::HostPerfGlobalCtrl)
    } else {
        l2.perf_global_ctrl
    };
}

/// §28.5.2: segment registers.
fn host_segments(vmcs12: &Vmcs12, g: &mut GuestState, host64: bool) {
    let selector = |f| vmcs12.get(f) as u16;
    let data = |f, base| {
        let selector = selector(f);
        if selector == 0 {
            // A null selector leaves the register unusable, but FS and GS have their bases.
            Segment { base, limit: 0, access: AccessRights(AccessRights::UNUSABLE), selector }
        } else {
            // Read/write, accessed, DPL 0, present, 4 GiB, big.
            Segment { base, limit: u32::MAX, access: AccessRights(0xc093), selector }
        }
    };
    let base = |f| vmcs12.get(f);
    g.segments[seg::ES] = data(Field::HostEsSelector, 0);
    g.segments[seg::SS] = data(Field::HostSsSelector, 0);
    g.segments[seg::DS] = data(Field::HostDsSelector, 0);
    g.segments[seg::FS] = data(Field::HostFsSelector, base(Field::HostFsBase));
    g.segments[seg::GS] = data(Field::HostGsSelector, base(Field::HostGsBase));
    // Execute/read, accessed, DPL 0, present, 4 GiB; 64-bit or 32-bit.
    let mode = if host64 { AccessRights::L } else { AccessRights::DB };
    g.segments[seg::CS] = Segment {
        base: 0,
        limit: u32::MAX,
        access: AccessRights(0x809b | mode),
        selector: selector(Field::HostCsSelector),
    };
    // A busy 32- or 64-bit TSS.
    g.segments[seg::TR] = Segment {
        base: base(Field::HostTrBase),
        limit: 0x67,
        access: AccessRights(0x8b),
        selector: selector(Field::HostTrSelector),
    };
    g.segments[seg::LDTR] =
        Segment { base: 0, limit: 0, access: AccessRights(AccessRights::UNUSABLE), selector: 0 };
}

/// Whether L1 has NMIs blocked after the exit (§28.5.5, §28.1): after an NMI exit; else as the
/// processor had it. With virtual NMIs L2's blocking is its own; without, it is the
/// processor's.
fn nmi_blocking(vmcs12: &Vmcs12, l1: &GuestState, l2: &GuestState, nmi: bool, entered: bool) -> bool {
    let pin = P::from_bits_truncate(vmcs12.get32(Field::PinControls));
    let of = |g: &GuestState| g.interruptibility & interruptibility::NMI != 0;
    nmi || if entered && !pin.contains(P::VIRTUAL_NMIS) { of(l2) } else { of(l1) }
}

/// Where VMCS01 hides bits of CR0 and CR4 from L1, L1 reads in them what it asked for.
fn show_host_crs(vmcs01: &mut EngineVmcs) {
    let (g, c) = (&vmcs01.guest, &mut vmcs01.controls);
    c.cr0_shadow = c.cr0_shadow & !c.cr0_mask | g.cr0 & c.cr0_mask;
    c.cr4_shadow = c.cr4_shadow & !c.cr4_mask | g.cr4 & c.cr4_mask;
}

/// §28.5.4: a host with PAE paging gets its PDPTEs from memory.
fn load_host_pdptes(g: &mut GuestState, l1: &dyn L1Physical, physical_bits: u8) -> Result<(), Abort> {
    let pae = g.cr0 & cr0::PG != 0 && g.cr4 & cr4::PAE != 0 && g.efer & efer::LMA == 0;
    if !pae {
        return Ok(());
    }
    let pdptes = enter::read_pdptes(l1, g.cr3);
    if pdptes.iter().any(|e| !valid_pdpte(*e, physical_bits)) {
        return Err(Abort::HostPdptes { cr3: g.cr3 });
    }
    g.pdptes = pdptes;
    Ok(())
}

/// Whether a PDPTE is not present or has no reserved bit set (SDM Vol. 3A table 4-8).
pub(crate) fn valid_pdpte(entry: u64, physical_bits: u8) -> bool {
    let width = 1u64.checked_shl(physical_bits.into()).map_or(u64::MAX, |b| b - 1);
    entry & 1 == 0 || entry & (!width | 0x1e6) == 0
}

/// VM-exit MSR-load list (§28.6).
fn load_msrs(parts: &mut Parts<'_>) -> Result<(), Abort> {
    let list = parts.vmcs12.get(Field::ExitMsrLoadAddress);
    for number in 0..parts.vmcs12.get32(Field::ExitMsrLoadCount) {
        let failed = Abort::LoadHostMsrs { entry: number + 1 };
        if number >= MSR_LIST_MAX {
            return Err(failed);
        }
        let (word, value) = enter::msr_entry(parts.l1, list, number);
        let index = enter::loadable_msr(word, parts.msrs.x2apic()).ok_or(failed)?;
        let guest = &mut parts.vmcs01.guest;
        parts.msrs.write_msr(guest, parts.regs, index, value).map_err(|_| failed)?;
    }
    Ok(())
}
