//! VM entry and VM exit: moving state between an [`EngineVmcs`] and the processor (SDM
//! Vol. 3C chapters 27 and 28).
//!
//! L0 has checked the VMCS as its VM entries demand; here only what this processor
//! couldn't represent fails, with exit reason 33.
//!
//! Not supported: MSR load and store areas (they belong to VMX root operation, which is
//! L0's), SMM, IA32_BNDCFGS, IA32_RTIT_CTL.

use engine::{EngineVmcs, EntryFailure, GuestRegs, VmExit};
use x86_spec::controls::{EntryControls, ExitControls, PinbasedControls, PrimaryControls, SecondaryControls};
use x86_spec::exit::ExitReason;
use x86_spec::interruption::{EventType, InterruptionInfo};
use x86_spec::reg::{cr0, cr4, dr, efer, gpr, rflags};
use x86_spec::segment::seg;

use super::canonical;
use super::capabilities::{PREEMPTION_TIMER_SHIFT, host_tsc};
use super::control::SUPPORTED_CR4;
use super::event::{Origin, deliver_from};
use super::msr::is_valid_pat;
use crate::cpu::{Cpu, Event, Exec, Reason, SLOT_RIP, SLOT_ZERO};

fn failure(qualification: EntryFailure) -> VmExit {
    VmExit {
        entry_failure: true,
        ..VmExit::new(ExitReason::InvalidGuestState).qualified(qualification as u64)
    }
}

/// IA32_EFER that the entry gives the guest (SDM Vol. 3C §27.3.2.1).
fn entry_efer(cpu: &Cpu, vmcs: &EngineVmcs) -> u64 {
    let entry = vmcs.controls.entry;
    if entry.contains(EntryControls::LOAD_IA32_EFER) {
        return vmcs.guest.efer;
    }
    let mut v = cpu.efer & !efer::LMA;
    if entry.contains(EntryControls::IA32E_MODE_GUEST) {
        v |= efer::LMA | efer::LME;
    } else if vmcs.guest.cr0 & cr0::PG != 0 {
        v &= !efer::LME;
    }
    v
}

/// Whether the processor can be in the state that `vmcs` describes (from SDM Vol. 3C §27.3.1).
fn representable(vmcs: &EngineVmcs, efer_value: u64) -> bool {
    let g = &vmcs.guest;
    let long = efer_value & efer::LMA != 0;
    let paging = g.cr0 & cr0::PG != 0;
    let v86 = g.rflags & rflags::VM != 0;
    let cs = g.segments[seg::CS].access;
    let code64 = long && cs.long();
    let control = vmcs.controls.entry.contains(EntryControls::IA32E_MODE_GUEST);
    g.cr4 & !SUPPORTED_CR4 == 0
        && g.cr0 >> 32 == 0
        && !(paging && g.cr0 & cr0::PE == 0)
        && efer_value & !efer::DEFINED == 0
        && long == control
        && (!long || paging && g.cr4 & cr4::PAE != 0 && efer_value & efer::LME != 0 && !v86)
        && !(paging && efer_value & efer::LME != 0 && !long)
        && (long || g.cr4 & cr4::PCIDE == 0)
        && !(code64 && cs.db())
        && g.rflags & rflags::FIXED1 != 0
        && (!v86 || g.cr0 & cr0::PE != 0)
        // Bits 63:48 of RIP are identical; with another bit 47 the fetch is #GP (§27.3.1.4).
        && if code64 { matches!(g.rip >> 48, 0 | 0xffff) } else { g.rip >> 32 == 0 }
        && g.segments.iter().all(|s| s.access.unusable() || canonical(s.base))
        && canonical(g.segments[seg::FS].base)
        && canonical(g.segments[seg::GS].base)
        && canonical(g.gdtr.base)
        && canonical(g.idtr.base)
        && (!vmcs.controls.entry.contains(EntryControls::LOAD_IA32_PAT) || is_valid_pat(g.pat))
}

/// VM entry up to event injection: the processor becomes what `vmcs` and `regs` say.
///
/// # Errors
/// The exit of a failed entry (reason 33); the processor's state is then without meaning, and
/// `vmcs` and `regs` are as before.
pub fn load(cpu: &mut Cpu, vmcs: &EngineVmcs, regs: &mut GuestRegs) -> Result<(), VmExit> {
    let g = &vmcs.guest;
    let efer_value = entry_efer(cpu, vmcs);
    if !representable(vmcs, efer_value) {
        return Err(failure(EntryFailure::General));
    }
    cpu.controls.clone_from(&vmcs.controls);
    cpu.regs[..16].copy_from_slice(&regs.gpr);
    cpu.set_gpr(gpr::RSP, g.rsp);
    cpu.regs[SLOT_ZERO] = 0;
    cpu.regs[SLOT_RIP] = g.rip;
    cpu.ip = g.rip;
    cpu.cr0 = g.cr0 & cr0::DEFINED | cr0::ET;
    cpu.cr2 = regs.cr2;
    cpu.cr3 = g.cr3;
    cpu.cr4 = g.cr4;
    cpu.cr8 = regs.cr8;
    cpu.efer = efer_value;
    cpu.xcr0 = regs.xcr0;
    cpu.monitor = regs.monitor;
    cpu.dr = regs.dr;
    cpu.dr6 = regs.dr6;
    if cpu.controls.entry.contains(EntryControls::LOAD_DEBUG_CONTROLS) {
        cpu.dr7 = g.dr7 & 0xffff_ffff | dr::DR7_FIXED1;
        cpu.debugctl = g.debugctl;
    }
    if cpu.controls.entry.contains(EntryControls::LOAD_IA32_PAT) {
        cpu.pat = g.pat;
    }
    if cpu.controls.entry.contains(EntryControls::LOAD_IA32_PERF_GLOBAL_CTRL) {
        cpu.perf_global_ctrl = g.perf_global_ctrl;
    }
    cpu.sysenter = [g.sysenter_cs, g.sysenter_esp, g.sysenter_eip];
    cpu.msrs = regs.msrs;
    cpu.gdtr = g.gdtr;
    cpu.idtr = g.idtr;
    cpu.activity = g.activity;
    cpu.interruptibility = g.interruptibility;
    cpu.pending_debug = g.pending_debug;
    cpu.pml_index = g.pml_index;
    cpu.delivering = None;
    cpu.reason = Reason::None;
    cpu.single = false;
    cpu.cpl = if g.cr0 & cr0::PE == 0 {
        0
    } else if g.rflags & rflags::VM != 0 {
        3
    } else {
        g.segments[seg::SS].access.dpl()
    };
    cpu.rflags_other = g.rflags & !(rflags::STATUS | rflags::FIXED1);
    cpu.set_status_flags(g.rflags);
    cpu.segments = g.segments;
    cpu.mmu_vm_entry();
    for index in [seg::CS, seg::FS, seg::GS] {
        cpu.set_segment(index, g.segments[index]);
    }
    load_entry_pdptes(cpu, vmcs)?;
    cpu.timer_deadline = cpu
        .controls
        .pin
        .contains(PinbasedControls::VMX_PREEMPTION_TIMER)
        .then(|| host_tsc().saturating_add((g.preemption_timer as u64) << PREEMPTION_TIMER_SHIFT));
    cpu.boundary_reset();
    cpu.enter_virtual_apic(g.interrupt_status);
    swap_in_place(cpu, regs);
    cpu.start_counting();
    Ok(())
}

/// Moves between `cpu` and `regs` what is not copied: x87 and vector state, performance counters.
pub(crate) fn swap_in_place(cpu: &mut Cpu, regs: &mut GuestRegs) {
    cpu.stop_counting();
    std::mem::swap(&mut cpu.fpu, &mut regs.fpu);
    std::mem::swap(&mut cpu.pmu, &mut regs.pmu);
}

/// PDPTEs: from the VMCS with EPT, else from memory (SDM Vol. 3C §27.3.2.4).
fn load_entry_pdptes(cpu: &mut Cpu, vmcs: &EngineVmcs) -> Result<(), VmExit> {
    let pae = cpu.cr0 & cr0::PG != 0 && cpu.cr4 & cr4::PAE != 0 && !cpu.long_mode();
    if !pae {
        return Ok(());
    }
    if cpu.secondary(SecondaryControls::ENABLE_EPT) {
        cpu.pdptes = vmcs.guest.pdptes;
        return Ok(());
    }
    let loaded = cpu.load_pdptes(cpu.cr3);
    cpu.reason = Reason::None;
    loaded.map_err(|_| failure(EntryFailure::Pdpte))
}

/// Event injection, after [`load`] (SDM Vol. 3C §27.6).
///
/// # Errors
/// A VM exit during delivery of the event.
pub fn inject(cpu: &mut Cpu) -> Exec {
    tpr_threshold(cpu);
    let info = cpu.controls.entry_interruption;
    if !info.is_valid() {
        return Ok(());
    }
    let kind = info.event_type();
    if kind == EventType::Other {
        // Vector 0 is a pending MTF exit, whatever the control says (§27.6.2).
        cpu.boundary.mtf_pending = true;
        return Ok(());
    }
    let error = info.has_error_code().then_some(cpu.controls.entry_error_code);
    let event = Event { vector: info.vector(), kind, error, payload: 0 };
    let length = cpu.controls.entry_instruction_length;
    deliver_from(cpu, event, length, Origin { injected: true, ..Origin::default() })
}

/// An entry with the task priority below the threshold exits at once (SDM Vol. 3C §27.7.7).
fn tpr_threshold(cpu: &mut Cpu) {
    let virtual_delivery = cpu.secondary(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY);
    let below = (cpu.read_tpr() as u32) < cpu.controls.tpr_threshold & 15;
    if cpu.primary(PrimaryControls::USE_TPR_SHADOW) && !virtual_delivery && below {
        cpu.boundary.trap_exit = Some(VmExit::new(ExitReason::TprBelowThreshold));
    }
}

/// VM exit: the processor's state goes back to `vmcs` and `regs` (SDM Vol. 3C §28.3).
pub fn save(cpu: &mut Cpu, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) {
    super::pending::finish_previous(cpu);
    regs.gpr.copy_from_slice(&cpu.regs[..16]);
    regs.cr2 = cpu.cr2;
    regs.cr8 = cpu.cr8;
    regs.xcr0 = cpu.xcr0;
    regs.monitor = cpu.monitor;
    regs.dr = cpu.dr;
    regs.dr6 = cpu.dr6;
    regs.msrs = cpu.msrs;
    swap_in_place(cpu, regs);

    let g = &mut vmcs.guest;
    let exit = vmcs.controls.exit;
    g.rsp = cpu.gpr(gpr::RSP);
    g.rip = cpu.rip();
    g.rflags = cpu.rflags();
    (g.cr0, g.cr3, g.cr4) = (cpu.cr0, cpu.cr3, cpu.cr4);
    g.segments = cpu.segments;
    // CPL is kept in SS.DPL, whatever SS was loaded with.
    let ss = &mut g.segments[seg::SS].access.0;
    *ss = *ss & !0x60 | (cpu.cpl as u32) << 5;
    (g.gdtr, g.idtr) = (cpu.gdtr, cpu.idtr);
    [g.sysenter_cs, g.sysenter_esp, g.sysenter_eip] = cpu.sysenter;
    if exit.contains(ExitControls::SAVE_DEBUG_CONTROLS) {
        g.dr7 = cpu.dr7;
        g.debugctl = cpu.debugctl;
    }
    if exit.contains(ExitControls::SAVE_IA32_PAT) {
        g.pat = cpu.pat;
    }
    if exit.contains(ExitControls::SAVE_IA32_EFER) {
        g.efer = cpu.efer;
    }
    if exit.contains(ExitControls::LOAD_IA32_PERF_GLOBAL_CTRL) {
        // L0, the host, counts nothing of itself.
        cpu.perf_global_ctrl = 0;
    }
    g.activity = cpu.activity;
    g.interruptibility = cpu.interruptibility;
    g.pending_debug = cpu.pending_debug;
    g.pml_index = cpu.pml_index;
    if cpu.secondary(SecondaryControls::VIRTUAL_INTERRUPT_DELIVERY) {
        g.interrupt_status = cpu.interrupt_status();
    }
    if cpu.secondary(SecondaryControls::ENABLE_VM_FUNCTIONS) {
        // EPTP switching changes the VMCS (SDM Vol. 3C §26.5.6.3).
        vmcs.controls.eptp = cpu.controls.eptp;
    }
    if cpu.secondary(SecondaryControls::ENABLE_EPT) {
        g.pdptes = cpu.pdptes;
    }
    if exit.contains(ExitControls::SAVE_VMX_PREEMPTION_TIMER)
        && let Some(deadline) = cpu.timer_deadline
    {
        let left = deadline.saturating_sub(host_tsc()) >> PREEMPTION_TIMER_SHIFT;
        g.preemption_timer = left.min(u32::MAX as u64) as u32;
    }
    // With "unrestricted guest", the entry control follows LMA (SDM Vol. 3C §28.2).
    if cpu.secondary(SecondaryControls::UNRESTRICTED_GUEST) {
        vmcs.controls.entry.set(EntryControls::IA32E_MODE_GUEST, cpu.long_mode());
    }
    vmcs.controls.entry_interruption.0 &= !InterruptionInfo::VALID;
}
