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
use crate::enter::{self, CR0_KEPT, FailedEntry, MSR_LIST_MAX, MsrLoadFailure};
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
    #[error("VMX abort 4: loading host MSRs failed: {0}")]
    LoadHostMsrs(MsrLoadFailure) = 4,
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
            Self::LoadHostMsrs(_) => 4,
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
    let v = &parts.vmcs12;
    let list = (v.get(Field::ExitMsrLoadAddress), v.get32(Field::ExitMsrLoadCount));
    enter::load_msrs(list, &mut parts.vmcs01.guest, parts.regs, parts.l1, parts.msrs)
        .map_err(Abort::LoadHostMsrs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checks::Answer;
    use crate::enter::MsrRule;
    use crate::merge::Merged;
    use crate::merge::tests::machine;
    use crate::physical::MsrFault;
    use memory::{Gpa, L1Gpa, L1Ram};
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// MSRs: EFER in the context, 10H to 1FH in the processor, nothing else.
    #[derive(Default)]
    struct FewMsrs {
        own: BTreeMap<u32, u64>,
        x2apic: bool,
    }

    impl Msrs for FewMsrs {
        fn read_msr(&mut self, guest: &GuestState, _: &GuestRegs, index: u32) -> Result<u64, MsrFault> {
            match index {
                msr::EFER => Ok(guest.efer),
                0x10..=0x1f => Ok(self.own.get(&index).copied().unwrap_or(0)),
                _ => Err(MsrFault),
            }
        }
        fn write_msr(
            &mut self,
            guest: &mut GuestState,
            _: &mut GuestRegs,
            index: u32,
            value: u64,
        ) -> Result<(), MsrFault> {
            match index {
                msr::EFER => guest.efer = value,
                0x10..=0x1f | 0x800..=0x8ff => {
                    self.own.insert(index, value);
                }
                _ => return Err(MsrFault),
            }
            Ok(())
        }
        fn x2apic(&self) -> bool {
            self.x2apic
        }
    }

    struct Bench {
        vmcs12: Vmcs12,
        vmcs01: EngineVmcs,
        vmcs02: EngineVmcs,
        regs: GuestRegs,
        ram: L1Ram,
        msrs: FewMsrs,
    }

    const STORE: u64 = 0x1000;
    const LOAD: u64 = 0x2000;
    const ENTRY: u64 = 0x3000;

    impl Bench {
        /// A 64-bit L1 with a 64-bit L2.
        fn new() -> Self {
            let (_, ram) = machine();
            let mut vmcs12 = Vmcs12::default();
            for (f, v) in [
                (Field::HostCr0, cr0::PE | cr0::PG | cr0::NE | cr0::WP),
                (Field::HostCr3, 0x7000),
                (Field::HostCr4, cr4::PAE | cr4::VMXE | cr4::PCIDE),
                (Field::HostRip, 0xffff_8000_0000_1234),
                (Field::HostRsp, 0xffff_8000_0000_5678),
                (Field::HostCsSelector, 8),
                (Field::HostSsSelector, 0x10),
                (Field::HostFsBase, 0x1111),
                (Field::HostGsBase, 0x2222),
                (Field::HostTrSelector, 0x40),
                (Field::HostTrBase, 0x3333),
                (Field::HostGdtrBase, 0x4444),
                (Field::HostIdtrBase, 0x5555),
                (Field::HostSysenterEip, 0x6666),
                (Field::ExitControls, X::HOST_ADDRESS_SPACE_SIZE.bits().into()),
                (Field::ExitMsrStoreAddress, STORE),
                (Field::ExitMsrLoadAddress, LOAD),
                (Field::EntryMsrLoadAddress, ENTRY),
                (Field::EntryControls, u64::from(0x11fb | N::IA32E_MODE_GUEST.bits())),
            ] {
                vmcs12.set(f, v);
            }
            let mut vmcs02 = EngineVmcs::default();
            vmcs02.guest.efer = efer::LMA | efer::LME | efer::NXE;
            vmcs02.guest.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET;
            vmcs02.guest.cr4 = cr4::PAE | cr4::VMXE;
            Self {
                vmcs12,
                vmcs01: EngineVmcs::default(),
                vmcs02,
                regs: GuestRegs::reset(),
                ram,
                msrs: FewMsrs::default(),
            }
        }
        fn parts(&mut self) -> Parts<'_> {
            Parts {
                vmcs12: &mut self.vmcs12,
                vmcs01: &mut self.vmcs01,
                vmcs02: &self.vmcs02,
                regs: &mut self.regs,
                l1: &self.ram,
                msrs: &mut self.msrs,
                timer12: None,
                physical_bits: 46,
            }
        }
        fn reflect(&mut self, exit: &VmExit) -> Result<AfterSwitch, Abort> {
            reflect(exit, &mut self.parts())
        }
        fn put(&self, at: u64, words: &[u64]) {
            for (i, w) in words.iter().enumerate() {
                L1Physical::write(&self.ram, L1Gpa(at + 8 * i as u64), &w.to_le_bytes());
            }
        }
        fn enter(&mut self) -> Result<(), MsrLoadFailure> {
            let merged = Merged {
                controls: engine::Controls::default(),
                preemption_timer: None,
                origins: Default::default(),
                apic_access_elsewhere: None,
            };
            let (v02, v01, v12) = (&mut self.vmcs02, &self.vmcs01, &self.vmcs12);
            enter::enter(v02, merged, v01, v12, &mut self.regs, &self.ram, &mut self.msrs)
        }
    }

    /// §28.5.
    #[test]
    fn a_64_bit_host_is_loaded() {
        let mut b = Bench::new();
        b.vmcs01.guest.rflags = 0x246;
        b.vmcs02.guest.debugctl = 3;
        let after = b.reflect(&VmExit::new(ExitReason::Cpuid)).unwrap();
        assert!(after.flush_vpid0, "VMCS12 does not enable VPIDs");
        let g = &b.vmcs01.guest;
        assert_eq!((g.rip, g.rsp, g.rflags), (0xffff_8000_0000_1234, 0xffff_8000_0000_5678, 2));
        assert_eq!((g.dr7, g.debugctl, g.activity), (0x400, 0, Activity::Active));
        assert_eq!((g.cr3, g.cr4), (0x7000, cr4::PAE | cr4::VMXE | cr4::PCIDE));
        assert_eq!(g.cr0, cr0::PE | cr0::PG | cr0::NE | cr0::WP | cr0::ET, "ET is never changed");
        assert_eq!(g.efer, efer::LMA | efer::LME | efer::NXE, "NXE stays as L2 had it");
        let s = |i: usize| (g.segments[i].selector, g.segments[i].base, g.segments[i].access.0);
        assert_eq!(s(seg::CS), (8, 0, 0xa09b));
        assert_eq!(s(seg::SS), (0x10, 0, 0xc093));
        assert_eq!(s(seg::DS), (0, 0, 0x10000), "a null selector is unusable");
        assert_eq!(s(seg::FS), (0, 0x1111, 0x10000));
        assert_eq!(s(seg::GS), (0, 0x2222, 0x10000));
        assert_eq!(s(seg::TR), (0x40, 0x3333, 0x8b));
        assert_eq!(s(seg::LDTR), (0, 0, 0x10000));
        assert_eq!(g.segments[seg::TR].limit, 0x67);
        assert_eq!(g.segments[seg::CS].limit, u32::MAX);
        assert_eq!((g.gdtr, g.idtr.base), (DescriptorTable { base: 0x4444, limit: 0xffff }, 0x5555));
        assert_eq!((g.sysenter_eip, g.interruptibility, g.pending_debug), (0x6666, 0, 0));
    }

    #[test]
    fn a_32_bit_host_is_loaded() {
        let mut b = Bench::new();
        b.vmcs12.set(Field::ExitControls, 0);
        assert_eq!(b.reflect(&VmExit::new(ExitReason::Cpuid)), Err(Abort::HostAddressSpace));
        assert_eq!(Abort::HostAddressSpace.indicator(), 6);
        b.vmcs02.guest.efer = efer::NXE;
        b.reflect(&VmExit::new(ExitReason::Cpuid)).unwrap();
        let g = &b.vmcs01.guest;
        assert_eq!(g.segments[seg::CS].access.0, 0xc09b);
        assert_eq!((g.efer, g.cr4 & cr4::PCIDE, g.rip), (efer::NXE, 0, 0x1234));
    }

    #[test]
    fn optional_msrs_are_loaded_if_asked_for() {
        let mut b = Bench::new();
        b.vmcs12.set(Field::HostPat, 0x0606);
        b.vmcs12.set(Field::HostEfer, efer::LMA | efer::LME | efer::SCE);
        b.vmcs02.guest.pat = 0x0404;
        b.reflect(&VmExit::new(ExitReason::Hlt)).unwrap();
        assert_eq!(b.vmcs01.guest.pat, 0x0404, "L2's PAT stays in the processor");
        let controls = X::HOST_ADDRESS_SPACE_SIZE | X::LOAD_IA32_PAT | X::LOAD_IA32_EFER;
        b.vmcs12.set(Field::ExitControls, controls.bits().into());
        b.reflect(&VmExit::new(ExitReason::Hlt)).unwrap();
        assert_eq!((b.vmcs01.guest.pat, b.vmcs01.guest.efer), (0x0606, efer::LMA | efer::LME | efer::SCE));
    }

    /// §28.2.
    #[test]
    fn exit_information_is_copied() {
        let mut b = Bench::new();
        b.vmcs12.set(Field::GuestPhysicalAddress, 0x99);
        b.vmcs12.set(Field::EntryInterruptionInfo, 0x8000_0b0e);
        let exit = VmExit {
            qualification: 0x1234,
            interruption_info: InterruptionInfo(0x8000_0b0d),
            interruption_error_code: 7,
            idt_vectoring: InterruptionInfo(0x8000_0020),
            idt_vectoring_error_code: 9,
            instruction_length: 3,
            instruction_info: 0x55,
            guest_linear: 0x4321,
            guest_physical: Gpa(0x77),
            ..VmExit::new(ExitReason::ExceptionOrNmi)
        };
        b.reflect(&exit).unwrap();
        let v = |f| b.vmcs12.get(f);
        assert_eq!((v(Field::ExitReason), v(Field::ExitQualification)), (0, 0x1234));
        assert_eq!((v(Field::ExitInterruptionInfo), v(Field::ExitInterruptionErrorCode)), (0x8000_0b0d, 7));
        assert_eq!((v(Field::IdtVectoringInfo), v(Field::IdtVectoringErrorCode)), (0x8000_0020, 9));
        assert_eq!((v(Field::ExitInstructionLength), v(Field::ExitInstructionInfo)), (3, 0x55));
        assert_eq!(v(Field::GuestLinearAddress), 0x4321);
        assert_eq!(v(Field::GuestPhysicalAddress), 0x99, "only EPT exits set it");
        assert_eq!(v(Field::EntryInterruptionInfo), 0x0b0e, "the valid bit is cleared");
        b.reflect(&VmExit { reason: ExitReason::EptViolation, ..exit }).unwrap();
        assert_eq!(b.vmcs12.get(Field::GuestPhysicalAddress), 0x77);
    }

    /// §28.2.4: an event that was not yet delivered is not lost.
    #[test]
    fn an_event_to_be_injected_becomes_idt_vectoring() {
        let mut b = Bench::new();
        b.vmcs02.controls.entry_interruption =
            InterruptionInfo::new(0x80, EventType::SoftwareInterrupt, false);
        b.vmcs02.controls.entry_instruction_length = 2;
        b.reflect(&VmExit::new(ExitReason::ExternalInterrupt)).unwrap();
        assert_eq!(b.vmcs12.get(Field::IdtVectoringInfo), 0x8000_0480);
        assert_eq!(b.vmcs12.get(Field::ExitInstructionLength), 2);
        // And the other way: an exit that L0 keeps has it delivered again.
        let mut v = EngineVmcs::default();
        v.guest.interruptibility = interruptibility::NMI;
        let exit = VmExit {
            idt_vectoring: InterruptionInfo::new(2, EventType::Nmi, false),
            ..VmExit::new(ExitReason::EptViolation)
        };
        requeue_vectoring(&mut v, &exit);
        assert_eq!(v.controls.entry_interruption, exit.idt_vectoring);
        assert_eq!(v.guest.interruptibility, 0, "injection needs NMIs unblocked");
    }

    /// §27.8.
    #[test]
    fn a_failed_entry_leaves_guest_state_and_injection() {
        let mut b = Bench::new();
        b.vmcs12.set(Field::GuestRip, 0xabcd);
        b.vmcs12.set(Field::EntryInterruptionInfo, 0x8000_0b0e);
        b.vmcs12.set(Field::ExitInterruptionInfo, 0x42);
        b.vmcs12.set(Field::ExitMsrStoreCount, 1);
        b.put(STORE, &[0x9999, 0]);
        b.put(LOAD, &[0x10, 5]);
        b.vmcs12.set(Field::ExitMsrLoadCount, 1);
        let exit = VmExit { entry_failure: true, ..VmExit::new(ExitReason::InvalidGuestState).qualified(4) };
        b.reflect(&exit).unwrap();
        let v = |f| b.vmcs12.get(f);
        assert_eq!((v(Field::ExitReason), v(Field::ExitQualification)), (0x8000_0021, 4));
        assert_eq!((v(Field::GuestRip), v(Field::EntryInterruptionInfo)), (0xabcd, 0x8000_0b0e));
        assert_eq!(v(Field::ExitInterruptionInfo), 0x42);
        assert_eq!(b.vmcs01.guest.rip, 0xffff_8000_0000_1234, "host state is loaded");
        assert_eq!(b.msrs.own.get(&0x10), Some(&5), "and so are its MSRs");
    }

    /// §28.4, §28.6, §28.7.
    #[test]
    fn msr_lists_and_aborts() {
        let mut b = Bench::new();
        b.msrs.own.insert(0x11, 0x1234);
        b.put(STORE, &[0x11, 0, msr::EFER.into(), 0]);
        b.put(LOAD, &[0x12, 77]);
        b.vmcs12.set(Field::ExitMsrStoreCount, 2);
        b.vmcs12.set(Field::ExitMsrLoadCount, 1);
        b.reflect(&VmExit::new(ExitReason::Cpuid)).unwrap();
        assert_eq!(b.ram.read_u64(L1Gpa(STORE + 8)), 0x1234);
        assert_eq!(b.ram.read_u64(L1Gpa(STORE + 24)), b.vmcs02.guest.efer, "L2's EFER");
        assert_eq!(b.msrs.own.get(&0x12), Some(&77));
        let mut fails = |list: u64, word: u64| {
            b.put(STORE, &[0x11, 0, 0x11, 0]);
            b.put(LOAD, &[0x12, 0]);
            b.put(list, &[word]);
            b.msrs.x2apic = true;
            b.reflect(&VmExit::new(ExitReason::Cpuid)).unwrap_err()
        };
        assert_eq!(fails(STORE + 16, 0x9999), Abort::SaveGuestMsrs { entry: 2 });
        assert_eq!(fails(STORE, 1 << 32 | 0x11), Abort::SaveGuestMsrs { entry: 1 });
        assert_eq!(fails(STORE, 0x808), Abort::SaveGuestMsrs { entry: 1 });
        for (word, rule) in [(0x808, MsrRule::X2apic), (msr::FS_BASE.into(), MsrRule::SegmentBase)] {
            let Abort::LoadHostMsrs(failure) = fails(LOAD, word) else { panic!("another abort") };
            assert_eq!((failure.entry, failure.word, failure.rule), (1, word, rule));
        }
        for (list, indicator) in [(STORE, 1), (LOAD, 4)] {
            let abort = fails(list, 1 << 32 | 0x12);
            assert_eq!(abort.indicator(), indicator);
            assert!(abort.to_string().starts_with(&format!("VMX abort {indicator}: ")));
        }
    }

    #[test]
    fn pdptes_of_a_pae_host() {
        let mut b = Bench::new();
        b.vmcs12.set(Field::ExitControls, 0);
        b.vmcs02.guest.efer = 0;
        b.put(0x7000, &[0x5001, 0, 0x6001, 0]);
        b.reflect(&VmExit::new(ExitReason::Cpuid)).unwrap();
        assert_eq!(b.vmcs01.guest.pdptes, [0x5001, 0, 0x6001, 0]);
        // Bit 1 of a present PDPTE is reserved (SDM Vol. 3A table 4-8).
        b.put(0x7000, &[0x5003]);
        let abort = Abort::HostPdptes { cr3: 0x7000 };
        assert_eq!(b.reflect(&VmExit::new(ExitReason::Cpuid)), Err(abort));
        assert_eq!(abort.indicator(), 2);
    }

    /// §28.5.5 and §26.3: who has NMIs blocked afterwards.
    #[test]
    fn nmi_blocking_after_the_exit() {
        let nmi = interruptibility::NMI;
        let virtual_nmis = u64::from((P::NMI_EXITING | P::VIRTUAL_NMIS).bits());
        let plain = u64::from(P::NMI_EXITING.bits());
        for (pin, l1, l2, expected) in
            [(virtual_nmis, 0, nmi, 0), (virtual_nmis, nmi, 0, nmi), (plain, 0, nmi, nmi), (plain, nmi, 0, 0)]
        {
            let mut b = Bench::new();
            b.vmcs12.set(Field::PinControls, pin);
            b.vmcs01.guest.interruptibility = l1 | interruptibility::STI;
            b.vmcs02.guest.interruptibility = l2;
            b.reflect(&VmExit::new(ExitReason::Cpuid)).unwrap();
            assert_eq!(b.vmcs01.guest.interruptibility, expected, "{pin:#x} {l1} {l2}");
        }
        let mut b = Bench::new();
        let exit = VmExit {
            interruption_info: InterruptionInfo::new(2, EventType::Nmi, false),
            ..VmExit::new(ExitReason::ExceptionOrNmi)
        };
        b.reflect(&exit).unwrap();
        assert_eq!(b.vmcs01.guest.interruptibility, nmi);
    }

    #[test]
    fn the_timer_is_saved_if_asked_for() {
        let mut b = Bench::new();
        b.vmcs12.set(Field::PreemptionTimer, 100);
        let timer = Some((Timer12::start(100, 5, 0), 32 * 60));
        let go = |b: &mut Bench, reason| {
            let mut parts = b.parts();
            parts.timer12 = timer;
            reflect(&VmExit::new(reason), &mut parts).unwrap();
            b.vmcs12.get(Field::PreemptionTimer)
        };
        assert_eq!(go(&mut b, ExitReason::Cpuid), 100);
        let save = X::HOST_ADDRESS_SPACE_SIZE | X::SAVE_VMX_PREEMPTION_TIMER;
        b.vmcs12.set(Field::ExitControls, save.bits().into());
        assert_eq!(go(&mut b, ExitReason::Cpuid), 40);
        assert_eq!(go(&mut b, ExitReason::PreemptionTimer), 0);
    }

    /// §27.4.
    #[test]
    fn entry_msr_list() {
        let mut b = Bench::new();
        b.vmcs12.set(Field::EntryMsrLoadCount, 2);
        b.put(ENTRY, &[0x10, 1, 0x11, 2]);
        assert_eq!(b.enter(), Ok(()));
        assert_eq!((b.msrs.own.get(&0x10), b.msrs.own.get(&0x11)), (Some(&1), Some(&2)));
        let mut fails = |number: u64, word: u64, rule: MsrRule| {
            b.put(ENTRY, &[0x10, 1, 0x11, 2]);
            b.put(ENTRY + (number - 1) * 16, &[word]);
            let failure = b.enter().unwrap_err();
            assert_eq!(failure, MsrLoadFailure { entry: number as u32, word, value: number, rule });
            let failed = FailedEntry::from(failure);
            assert_eq!(failed, FailedEntry { reason: ExitReason::MsrLoading, qualification: number });
            // The user is told index, value and rule; the architecture's answer is the number.
            let report = failure.report(&b.vmcs12);
            let answer = Answer::FailEntry { reason: ExitReason::MsrLoading, qualification: number };
            assert_eq!(report.architectural(), answer);
            let text = report.to_string();
            for part in [format!("{word:#x}"), format!("value {number:#x}"), rule.to_string()] {
                assert!(text.contains(&part), "{part:?} in {text}");
            }
        };
        fails(1, msr::FS_BASE.into(), MsrRule::SegmentBase);
        fails(2, msr::GS_BASE.into(), MsrRule::SegmentBase);
        fails(2, msr::IA32_SMM_MONITOR_CTL.into(), MsrRule::Smm);
        fails(2, msr::IA32_BIOS_UPDT_TRIG.into(), MsrRule::Microcode);
        fails(1, 1 << 40 | 0x10, MsrRule::Reserved);
        fails(2, 0x9999, MsrRule::Refused);
    }

    /// §27.3.2.1.
    #[test]
    fn what_an_entry_loads_only_if_asked_for() {
        let mut b = Bench::new();
        let l1 = &mut b.vmcs01.guest;
        (l1.dr7, l1.debugctl, l1.pat, l1.efer) = (0x401, 1, 0x11, efer::LMA | efer::LME | efer::NXE);
        l1.cr0 = cr0::CD | cr0::ET | cr0::PE;
        for (f, v) in [
            (Field::GuestDr7, 0xffff_ffff),
            (Field::GuestDebugctl, 2),
            (Field::GuestPat, 0x22),
            (Field::GuestEfer, efer::SCE),
            (Field::GuestCr0, cr0::PE | cr0::PG | cr0::NE | cr0::NW),
            (Field::EntryControls, 0),
        ] {
            b.vmcs12.set(f, v);
        }
        b.enter().unwrap();
        let g = &b.vmcs02.guest;
        assert_eq!((g.dr7, g.debugctl, g.pat), (0x401, 1, 0x11));
        assert_eq!(g.efer, efer::NXE, "LMA and LME follow \"IA-32e mode guest\" with paging");
        assert_eq!(g.cr0, cr0::PE | cr0::PG | cr0::NE | cr0::CD | cr0::ET, "CD, NW and ET stay");
        let all = N::LOAD_DEBUG_CONTROLS | N::LOAD_IA32_PAT | N::LOAD_IA32_EFER;
        b.vmcs12.set(Field::EntryControls, all.bits().into());
        b.enter().unwrap();
        let g = &b.vmcs02.guest;
        assert_eq!((g.dr7, g.debugctl, g.pat, g.efer), (0xffff_2fff, 2, 0x22, efer::SCE));
    }

    proptest! {
        /// What an entry loads, an exit saves: L2's state survives the trip through VMCS02.
        #[test]
        fn guest_state_survives(values in prop::collection::vec(any::<u64>(), Field::COUNT), ept: bool) {
            let mut b = Bench::new();
            for (f, v) in Field::ALL.iter().zip(values) {
                if f.field_type() == crate::FieldType::Guest {
                    b.vmcs12.set(*f, v);
                }
            }
            let long = b.vmcs12.get(Field::GuestEfer) & efer::LMA;
            b.vmcs12.set(Field::GuestActivity, b.vmcs12.get(Field::GuestActivity) & 3);
            b.vmcs12.set(Field::GuestCr0, b.vmcs12.get(Field::GuestCr0) & cr0::DEFINED & !(cr0::CD | cr0::NW) | cr0::ET);
            b.vmcs12.set(Field::GuestDr7, b.vmcs12.get(Field::GuestDr7) & 0xffff_2fff | 0x400);
            for s in [Field::GuestEsAccessRights, Field::GuestSsAccessRights, Field::GuestDsAccessRights, Field::GuestLdtrAccessRights] {
                b.vmcs12.set(s, b.vmcs12.get(s) & !0x10000);
            }
            let entry = N::LOAD_DEBUG_CONTROLS | N::LOAD_IA32_PAT | N::LOAD_IA32_EFER;
            let entry = if long != 0 { entry | N::IA32E_MODE_GUEST } else { entry };
            b.vmcs12.set(Field::EntryControls, entry.bits().into());
            let exit = X::SAVE_DEBUG_CONTROLS | X::SAVE_IA32_PAT | X::SAVE_IA32_EFER | X::HOST_ADDRESS_SPACE_SIZE;
            b.vmcs12.set(Field::ExitControls, exit.bits().into());
            if ept {
                let c = x86_spec::controls::PrimaryControls::SECONDARY_CONTROLS;
                b.vmcs12.set(Field::PrimaryControls, c.bits().into());
                b.vmcs12.set(Field::SecondaryControls, (S::ENABLE_EPT | S::VIRTUAL_INTERRUPT_DELIVERY).bits().into());
            }
            b.vmcs01.guest.cr0 = cr0::ET;
            let before = b.vmcs12.clone();
            b.enter().unwrap();
            save_guest_state(&mut b.vmcs12, &b.vmcs02.guest);
            for f in Field::ALL {
                prop_assert_eq!(b.vmcs12.get(*f), before.get(*f), "{}", f.name());
            }
        }
    }
}
