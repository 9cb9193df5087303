//! Delivery of exceptions and interrupts (SDM Vol. 3A chapter 6, Vol. 3B §21.1.4 and §21.3,
//! Vol. 3C §26.2, §28.2).
//!
//! Not supported: FRED, shadow stacks, virtualization exceptions (#VE).

use engine::{Activity, Segment, VmExit, interruptibility};
use x86_spec::controls::PrimaryControls;
use x86_spec::exception;
use x86_spec::exit::{ExitReason, ept_violation};
use x86_spec::interruption::{EventType, InterruptionInfo};
use x86_spec::reg::{cr4, dr, gpr, rflags};
use x86_spec::segment::seg;

use super::canonical;
use super::segment::{Descriptor, NULL, is_null, null_stack_segment, ty};
use super::stack::Stack;
use crate::cpu::{Cpu, Event, Exec, Reason, Stop};

/// How an event came to be delivered.
#[derive(Clone, Copy, Debug, Default)]
pub struct Origin {
    /// By VM entry: the event itself doesn't exit, nor does it change DR6 or CR2.
    pub injected: bool,
    /// It interrupts an IRET that had already unblocked NMIs (SDM Vol. 3C §28.2.3).
    pub nmi_unblocked: bool,
}

/// Delivers `event`, and what its delivery leads to, to the guest: afterwards RIP is at a
/// handler. `instruction_length` counts for software events: RIP is at the instruction.
///
/// # Errors
/// A VM exit (also for a triple fault). RIP and the other registers are then as before.
pub fn deliver(cpu: &mut Cpu, event: Event, instruction_length: u32) -> Exec {
    deliver_from(cpu, event, instruction_length, Origin::default())
}

/// As [`deliver`], for events with a history.
///
/// # Errors
/// As [`deliver`].
pub fn deliver_from(cpu: &mut Cpu, event: Event, instruction_length: u32, origin: Origin) -> Exec {
    let mut event = event;
    // The event whose delivery led to `event`, for IDT-vectoring information.
    let mut original: Option<Event> = None;
    let mut injected = origin.injected;
    loop {
        if !injected {
            if let Some(mut exit) = intercept(cpu, &event, instruction_length) {
                // A double fault that exits directly counts as not happening during delivery
                // (SDM Vol. 3C §28.2.4).
                match original.filter(|_| event.vector != exception::DF) {
                    Some(o) => set_vectoring(cpu, &mut exit, &o, instruction_length),
                    None if origin.nmi_unblocked && event.vector != exception::DF => {
                        exit.interruption_info.0 |= InterruptionInfo::NMI_UNBLOCKING;
                    }
                    None => {}
                }
                return Err(exit_for_event(cpu, exit, &event));
            }
            apply_payload(cpu, &event);
        }
        cpu.delivering = Some(event);
        cpu.delivering_length = instruction_length;
        let result = transfer(cpu, &event, instruction_length);
        cpu.delivering = None;
        let Err(stop) = result else {
            delivered(cpu, &event);
            return Ok(());
        };
        if event.kind == EventType::Nmi && matches!(cpu.reason, Reason::Event(_) | Reason::Exit(_)) {
            // An event that causes an exit indirectly does its work (SDM Vol. 3C §28.1).
            cpu.interruptibility |= interruptibility::NMI;
        }
        match cpu.reason {
            Reason::Event(second) => {
                // An exception that exits neither makes a double fault nor a triple one (SDM
                // Vol. 3C §26.2): hypervisors that shadow page tables fill them in this way.
                if let Some(mut exit) = intercept(cpu, &second, instruction_length) {
                    set_vectoring(cpu, &mut exit, &event, instruction_length);
                    return Err(exit_for_event(cpu, exit, &second));
                }
                match combine(&event, second) {
                    Some(next) => {
                        original = Some(event);
                        event = next;
                        injected = false;
                    }
                    None => return Err(cpu.exit(VmExit::new(ExitReason::TripleFault))),
                }
            }
            Reason::Exit(mut exit) => {
                set_vectoring(cpu, &mut exit, &event, instruction_length);
                return Err(cpu.exit(exit));
            }
            // The handler's stack overlaps the running block: the instruction starts anew, alone.
            Reason::Reexecute | Reason::None => return Err(stop),
        }
    }
}

/// The end of an event that causes `exit`: RF is saved as the event's handler would find it
/// (SDM Vol. 3C §28.3.3).
fn exit_for_event(cpu: &mut Cpu, exit: VmExit, e: &Event) -> Stop {
    if is_fault(e) {
        cpu.rflags_other |= rflags::RF;
    }
    cpu.delivering = None;
    cpu.exit(exit)
}

/// Whether the event is a fault, which sets RF in the flags that it saves (SDM Vol. 3B
/// §18.3.1.1). #DB counts as one only for general detect.
fn is_fault(e: &Event) -> bool {
    e.kind == EventType::HardwareException
        && match e.vector {
            exception::DB => e.payload & dr::DR6_BD != 0,
            exception::DF | exception::MC => false,
            _ => true,
        }
}

fn is_software(kind: EventType) -> bool {
    matches!(
        kind,
        EventType::SoftwareInterrupt | EventType::SoftwareException | EventType::PrivilegedSoftwareException
    )
}

/// The EXT bit of error codes (SDM Vol. 3A §6.13): clear for INT n, INT3 and INTO.
fn ext(e: &Event) -> u32 {
    !matches!(e.kind, EventType::SoftwareInterrupt | EventType::SoftwareException) as u32
}

/// Interruption information for an event. Error codes aren't pushed in real mode, so
/// the field doesn't have one there (SDM Vol. 3C §28.2.2).
fn interruption_info(cpu: &Cpu, e: &Event) -> (InterruptionInfo, u32) {
    let code = e.error.filter(|_| cpu.protected());
    (InterruptionInfo::new(e.vector, e.kind, code.is_some()), code.unwrap_or(0))
}

fn set_vectoring(cpu: &Cpu, exit: &mut VmExit, e: &Event, instruction_length: u32) {
    (exit.idt_vectoring, exit.idt_vectoring_error_code) = interruption_info(cpu, e);
    if is_software(e.kind) {
        exit.instruction_length = instruction_length;
    }
    // Bit 12 of an EPT violation's qualification isn't defined during delivery.
    if exit.reason == ExitReason::EptViolation {
        exit.qualification &= !ept_violation::NMI_UNBLOCKING;
    }
}

/// The exit that the exception bitmap asks for (SDM Vol. 3C §26.2).
fn intercept(cpu: &Cpu, e: &Event, instruction_length: u32) -> Option<VmExit> {
    match e.kind {
        EventType::HardwareException
        | EventType::SoftwareException
        | EventType::PrivilegedSoftwareException => {}
        _ => return None,
    }
    let mut exits = cpu.controls.exception_bitmap >> (e.vector & 31) & 1 != 0;
    if e.vector == exception::PF {
        let code = e.error.unwrap_or(0);
        let matches = code & cpu.controls.pfec_mask == cpu.controls.pfec_match;
        exits = exits == matches;
    }
    if !exits {
        return None;
    }
    let mut exit = VmExit::new(ExitReason::ExceptionOrNmi);
    (exit.interruption_info, exit.interruption_error_code) = interruption_info(cpu, e);
    if matches!(e.vector, exception::PF | exception::DB) {
        exit.qualification = e.payload;
    }
    if is_software(e.kind) {
        exit.instruction_length = instruction_length;
    }
    Some(exit)
}

/// CR2 for #PF; DR6, DR7.GD and IA32_DEBUGCTL.LBR for #DB (SDM Vol. 3C §28.1: not
/// when the exception exits).
fn apply_payload(cpu: &mut Cpu, e: &Event) {
    match (e.kind, e.vector) {
        (EventType::HardwareException, exception::PF) => cpu.cr2 = e.payload,
        (EventType::HardwareException | EventType::PrivilegedSoftwareException, exception::DB) => {
            const CAUSES: u64 = 0xf | dr::DR6_BD | dr::DR6_BS | dr::DR6_BT;
            if e.payload & 0xf != 0 {
                cpu.dr6 &= !0xf;
            }
            cpu.dr6 |= e.payload & CAUSES;
            cpu.debugctl &= !1;
            if cpu.dr7 & dr::DR7_GD != 0 {
                cpu.set_dr7(cpu.dr7 & !dr::DR7_GD);
            }
        }
        _ => {}
    }
}

/// What a fault during the delivery of `first` becomes; `None` is a triple fault (SDM
/// Vol. 3A §6.15, tables 6-4 and 6-5).
fn combine(first: &Event, second: Event) -> Option<Event> {
    #[derive(PartialEq)]
    enum Class {
        Benign,
        Contributory,
        PageFault,
        DoubleFault,
    }
    let class = |e: &Event| {
        if e.kind != EventType::HardwareException {
            return Class::Benign;
        }
        match e.vector {
            exception::DE | exception::TS | exception::NP | exception::SS | exception::GP | exception::CP => {
                Class::Contributory
            }
            exception::PF | exception::VE => Class::PageFault,
            exception::DF => Class::DoubleFault,
            _ => Class::Benign,
        }
    };
    match (class(first), class(&second)) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault) => None,
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => {
            Some(Event::fault_code(exception::DF, 0))
        }
        _ => Some(second),
    }
}

/// State that changes when delivery has succeeded.
fn delivered(cpu: &mut Cpu, e: &Event) {
    cpu.interruptibility &= !(interruptibility::STI | interruptibility::MOV_SS);
    if e.kind == EventType::Nmi {
        cpu.interruptibility |= interruptibility::NMI;
    }
    cpu.activity = Activity::Active;
    cpu.reason = Reason::None;
    cpu.pending_debug = 0;
    cpu.boundary.step_at = None;
    // The handler's first instruction is preceded by an MTF exit, both after injection and
    // after a fault (SDM Vol. 3C §26.5.2).
    if cpu.primary(PrimaryControls::MONITOR_TRAP_FLAG) {
        cpu.boundary.mtf_pending = true;
        cpu.request_event_check();
    }
}

/// RFLAGS as saved by a delivery.
fn saved_flags(cpu: &Cpu, e: &Event) -> u64 {
    cpu.rflags() | if is_fault(e) { rflags::RF } else { 0 }
}

/// RIP as saved by a delivery.
fn saved_rip(cpu: &Cpu, e: &Event, instruction_length: u32) -> u64 {
    if is_software(e.kind) {
        let next = cpu.rip().wrapping_add(instruction_length as u64);
        if cpu.is_64() { next } else { next & 0xffff_ffff }
    } else {
        cpu.rip()
    }
}

fn transfer(cpu: &mut Cpu, e: &Event, length: u32) -> Exec {
    if !cpu.protected() {
        real_mode(cpu, e, length)
    } else if cpu.long_mode() {
        long_mode(cpu, e, length)
    } else if cpu.v8086() && e.kind == EventType::SoftwareInterrupt {
        virtual_8086_software_interrupt(cpu, e, length)
    } else {
        protected_mode(cpu, e, length)
    }
}

/// INT n in virtual-8086 mode: which handler it reaches (SDM Vol. 3B table 21-2). INT3, INTO
/// and INT1 neither depend on IOPL nor are they redirected.
fn virtual_8086_software_interrupt(cpu: &mut Cpu, e: &Event, length: u32) -> Exec {
    if cpu.cr4 & cr4::VME != 0 && is_redirected(cpu, e.vector)? {
        redirect(cpu, e, length)
    } else if cpu.iopl() < 3 {
        Err(cpu.gp(0))
    } else {
        protected_mode(cpu, e, length)
    }
}

/// Whether the TSS's software-interrupt redirection bitmap, the 32 bytes below the I/O
/// permission bitmap, leaves `vector` to the 8086 program (SDM Vol. 3B §21.3, figure 21-5).
///
/// # Errors
/// #GP(0) if the TSS doesn't hold the vector's bit.
fn is_redirected(cpu: &mut Cpu, vector: u8) -> Exec<bool> {
    let (tr, map) = super::io::permission_bitmap(cpu)?;
    let Some(at) = (map + vector as u32 / 8).checked_sub(32).filter(|at| *at <= tr.limit) else {
        return Err(cpu.gp(0));
    };
    let lin = cpu.table_linear(tr.base, at as u64)?;
    Ok(cpu.sys_read::<u8>(lin)? >> (vector % 8) & 1 == 0)
}

/// To the 8086 program's own handler, through the vector table at linear address 0: methods 5
/// (IOPL 3) and 6 (IOPL below 3, with VIF in IF's place) of SDM Vol. 3B table 21-2.
fn redirect(cpu: &mut Cpu, e: &Event, length: u32) -> Exec {
    let target = cpu.sys_read::<u32>(e.vector as u64 * 4)?;
    let virtual_if = cpu.iopl() < 3;
    let image = if virtual_if { cpu.virtual_flags() } else { cpu.rflags() & 0xffff };
    let mut stack = Stack::current(cpu);
    stack.push(cpu, 2, image)?;
    stack.push(cpu, 2, cpu.segments[seg::CS].selector as u64)?;
    stack.push(cpu, 2, saved_rip(cpu, e, length) & 0xffff)?;
    stack.commit(cpu);
    let cs = cpu.real_segment(seg::CS, (target >> 16) as u16);
    cpu.set_segment(seg::CS, cs);
    cpu.set_rip(target as u64 & 0xffff);
    let interrupt_flag = if virtual_if { rflags::VIF } else { rflags::IF };
    cpu.set_rflags(cpu.rflags() & !(interrupt_flag | rflags::TF | rflags::RF));
    Ok(())
}

/// Through the interrupt vector table (SDM Vol. 3B §21.1.4).
fn real_mode(cpu: &mut Cpu, e: &Event, length: u32) -> Exec {
    let at = e.vector as u64 * 4;
    if at + 3 > cpu.idtr.limit as u64 {
        return Err(cpu.gp(e.vector as u32 * 8 + 2 + ext(e)));
    }
    let lin = cpu.table_linear(cpu.idtr.base, at)?;
    let target = cpu.sys_read::<u32>(lin)?;
    let mut stack = Stack::current(cpu);
    stack.push(cpu, 2, saved_flags(cpu, e) & 0xffff)?;
    stack.push(cpu, 2, cpu.segments[seg::CS].selector as u64)?;
    stack.push(cpu, 2, saved_rip(cpu, e, length) & 0xffff)?;
    stack.commit(cpu);
    let selector = (target >> 16) as u16;
    let cs = cpu.real_segment(seg::CS, selector);
    cpu.set_segment(seg::CS, cs);
    cpu.set_rip(target as u64 & 0xffff);
    cpu.set_rflags(cpu.rflags() & !(rflags::IF | rflags::TF | rflags::AC | rflags::RF));
    Ok(())
}

/// Checks that an IDT gate's DPL lets a software event through (SDM Vol. 3A §6.12.1.2).
fn check_gate_privilege(cpu: &mut Cpu, e: &Event, gate: &Descriptor) -> Exec {
    let by_program = matches!(e.kind, EventType::SoftwareInterrupt | EventType::SoftwareException);
    if by_program && gate.access().dpl() < cpu.cpl {
        return Err(cpu.gp(e.vector as u32 * 8 + 2));
    }
    Ok(())
}

/// Where a gate leads: the code segment, its selector with RPL = the new CPL.
struct Target {
    cs: Segment,
    cpl: u8,
}

/// The code segment that a gate names and the privilege level it runs at.
fn gate_target(cpu: &mut Cpu, selector: u16, ext: u32) -> Exec<Target> {
    if is_null(selector) {
        return Err(cpu.gp(ext));
    }
    let code = selector as u32 & 0xfffc | ext;
    let mut d = cpu.descriptor(selector, exception::GP, ext)?;
    let a = d.access();
    if !a.is_code() || a.dpl() > cpu.cpl {
        return Err(cpu.gp(code));
    }
    if cpu.long_mode() && (!a.long() || a.db()) {
        return Err(cpu.gp(code));
    }
    if !a.present() {
        return Err(cpu.fault_code(exception::NP, code));
    }
    let cpl = if a.conforming() { cpu.cpl } else { a.dpl() };
    if cpu.v8086() && cpl != 0 {
        return Err(cpu.gp(code));
    }
    cpu.mark_accessed(&mut d)?;
    Ok(Target { cs: d.segment(selector & !3 | cpl as u16), cpl })
}

fn enter_handler(cpu: &mut Cpu, target: &Target, rip: u64, interrupt_gate: bool) {
    let clear =
        rflags::TF | rflags::NT | rflags::RF | rflags::VM | if interrupt_gate { rflags::IF } else { 0 };
    cpu.set_rip(rip);
    cpu.cpl = target.cpl;
    cpu.rflags_other &= !rflags::VM;
    cpu.set_segment(seg::CS, target.cs);
    cpu.set_rflags(cpu.rflags() & !clear);
}

/// Through a 64-bit gate (SDM Vol. 3A §6.14).
fn long_mode(cpu: &mut Cpu, e: &Event, length: u32) -> Exec {
    let ext = ext(e);
    let code = e.vector as u32 * 8 + 2;
    let at = e.vector as u64 * 16;
    if at + 15 > cpu.idtr.limit as u64 {
        return Err(cpu.gp(code + ext));
    }
    let lin = cpu.table_linear(cpu.idtr.base, at)?;
    let gate = Descriptor { address: lin, raw: cpu.sys_read::<u64>(lin)? };
    let upper = cpu.sys_read::<u64>(lin.wrapping_add(8))?;
    if !gate.is_system(ty::INTERRUPT_GATE) && !gate.is_system(ty::TRAP_GATE) {
        return Err(cpu.gp(code + ext));
    }
    check_gate_privilege(cpu, e, &gate)?;
    if !gate.access().present() {
        return Err(cpu.fault_code(exception::NP, code + ext));
    }
    let target = gate_target(cpu, gate.gate_selector(), ext)?;
    let rip = gate.gate_offset() | upper << 32;
    let ist = gate.raw >> 32 & 7;
    let (old_ss, old_rsp) = (cpu.segments[seg::SS], cpu.gpr(gpr::RSP));
    let inner = target.cpl < cpu.cpl;
    let rsp = if ist != 0 {
        tss_stack64(cpu, 0x24 + (ist as u32 - 1) * 8, ext)?
    } else if inner {
        tss_stack64(cpu, 4 + target.cpl as u32 * 8, ext)?
    } else {
        old_rsp
    };
    let new_ss = if inner { null_stack_segment(target.cpl as u16, target.cpl) } else { old_ss };
    let mut stack = Stack::switched(new_ss, rsp & !15, true, target.cpl == 3, ext);
    stack.push(cpu, 8, old_ss.selector as u64)?;
    stack.push(cpu, 8, old_rsp)?;
    stack.push(cpu, 8, saved_flags(cpu, e))?;
    stack.push(cpu, 8, cpu.segments[seg::CS].selector as u64)?;
    stack.push(cpu, 8, saved_rip(cpu, e, length))?;
    if let Some(error) = e.error {
        stack.push(cpu, 8, error as u64)?;
    }
    if !canonical(rip) {
        return Err(cpu.gp(ext));
    }
    // Setting CS below updates what is derived from SS.
    cpu.segments[seg::SS] = new_ss;
    enter_handler(cpu, &target, rip, gate.access().ty() == ty::INTERRUPT_GATE);
    stack.commit(cpu);
    Ok(())
}

/// A stack pointer from the 64-bit TSS (SDM Vol. 3A §7.7).
pub(super) fn tss_stack64(cpu: &mut Cpu, offset: u32, ext: u32) -> Exec<u64> {
    let tr = cpu.segments[seg::TR];
    let code = tr.selector as u32 & 0xfffc | ext;
    if offset + 7 > tr.limit {
        return Err(cpu.fault_code(exception::TS, code));
    }
    let lin = cpu.table_linear(tr.base, offset as u64)?;
    let rsp = cpu.sys_read::<u64>(lin)?;
    if canonical(rsp) { Ok(rsp) } else { Err(cpu.fault_code(exception::SS, ext)) }
}

/// SS:ESP for `cpl` from a 16- or 32-bit TSS, checked as a switch to an inner level
/// demands (SDM Vol. 3A §6.12.1).
pub(super) fn tss_stack32(cpu: &mut Cpu, cpl: u8, ext: u32) -> Exec<(Segment, u64)> {
    let tr = cpu.segments[seg::TR];
    let tss_code = tr.selector as u32 & 0xfffc | ext;
    let wide = tr.access.ty() & 8 != 0;
    let (offset, last) = if wide {
        (4 + cpl as u32 * 8, 4 + cpl as u32 * 8 + 5)
    } else {
        (2 + cpl as u32 * 4, 2 + cpl as u32 * 4 + 3)
    };
    if last > tr.limit {
        return Err(cpu.fault_code(exception::TS, tss_code));
    }
    let lin = cpu.table_linear(tr.base, offset as u64)?;
    let (sp, ss) = if wide {
        (cpu.sys_read::<u32>(lin)? as u64, cpu.sys_read::<u16>(lin.wrapping_add(4) & 0xffff_ffff)?)
    } else {
        (cpu.sys_read::<u16>(lin)? as u64, cpu.sys_read::<u16>(lin.wrapping_add(2) & 0xffff_ffff)?)
    };
    if is_null(ss) {
        return Err(cpu.fault_code(exception::TS, ext));
    }
    let code = ss as u32 & 0xfffc | ext;
    let mut d = cpu.descriptor(ss, exception::TS, ext)?;
    let a = d.access();
    let writable_data = a.is_code_or_data() && !a.is_code() && a.read_write();
    if (ss & 3) as u8 != cpl || a.dpl() != cpl || !writable_data {
        return Err(cpu.fault_code(exception::TS, code));
    }
    if !a.present() {
        return Err(cpu.fault_code(exception::SS, code));
    }
    cpu.mark_accessed(&mut d)?;
    Ok((d.segment(ss), sp))
}

/// Through a 16- or 32-bit gate (SDM Vol. 3A §6.12, Vol. 3B §21.3).
fn protected_mode(cpu: &mut Cpu, e: &Event, length: u32) -> Exec {
    let ext = ext(e);
    let code = e.vector as u32 * 8 + 2;
    let at = e.vector as u64 * 8;
    if at + 7 > cpu.idtr.limit as u64 {
        return Err(cpu.gp(code + ext));
    }
    let lin = cpu.table_linear(cpu.idtr.base, at)?;
    let gate = Descriptor { address: lin, raw: cpu.sys_read::<u64>(lin)? };
    let a = gate.access();
    let known = !a.is_code_or_data()
        && matches!(
            a.ty(),
            ty::TASK_GATE | ty::INTERRUPT_GATE16 | ty::TRAP_GATE16 | ty::INTERRUPT_GATE | ty::TRAP_GATE
        );
    if !known {
        return Err(cpu.gp(code + ext));
    }
    check_gate_privilege(cpu, e, &gate)?;
    if !a.present() {
        return Err(cpu.fault_code(exception::NP, code + ext));
    }
    if a.ty() == ty::TASK_GATE {
        return Err(task_gate(cpu, gate.gate_selector(), ext));
    }
    let target = gate_target(cpu, gate.gate_selector(), ext)?;
    let size = if a.ty() & 8 != 0 { 4 } else { 2 };
    let rip = if size == 4 { gate.gate_offset() } else { gate.gate_offset() & 0xffff };
    let (old_ss, old_rsp) = (cpu.segments[seg::SS], cpu.gpr(gpr::RSP));
    let from_v86 = cpu.v8086();
    let inner = target.cpl < cpu.cpl;
    let mut stack = if inner {
        let (ss, sp) = tss_stack32(cpu, target.cpl, ext)?;
        Stack::switched(ss, sp, false, target.cpl == 3, ss.selector as u32 & 0xfffc | ext)
    } else {
        Stack::switched(old_ss, old_rsp, false, target.cpl == 3, ext)
    };
    let new_ss = stack.segment();
    if inner {
        if from_v86 {
            for s in [seg::GS, seg::FS, seg::DS, seg::ES] {
                stack.push(cpu, size, cpu.segments[s].selector as u64)?;
            }
        }
        stack.push(cpu, size, old_ss.selector as u64)?;
        stack.push(cpu, size, old_rsp)?;
    }
    stack.push(cpu, size, saved_flags(cpu, e))?;
    stack.push(cpu, size, cpu.segments[seg::CS].selector as u64)?;
    stack.push(cpu, size, saved_rip(cpu, e, length))?;
    if let Some(error) = e.error {
        stack.push(cpu, size, error as u64)?;
    }
    if rip > target.cs.limit as u64 {
        return Err(cpu.gp(ext));
    }
    if inner {
        cpu.set_segment(seg::SS, new_ss);
        if from_v86 {
            for s in [seg::GS, seg::FS, seg::DS, seg::ES] {
                cpu.set_segment(s, NULL);
            }
        }
    }
    stack.commit(cpu);
    enter_handler(cpu, &target, rip, a.ty() & 1 == 0);
    Ok(())
}

/// A task gate in the IDT: the checks that come before a task switch, which exits
/// (SDM Vol. 3C §26.4.2).
fn task_gate(cpu: &mut Cpu, selector: u16, ext: u32) -> Stop {
    match super::far::check_new_task(cpu, selector, ext) {
        Ok(()) => super::far::task_switch(cpu, selector, super::far::TaskSource::IdtGate, 0),
        Err(stop) => stop,
    }
}
