//! Far JMP, CALL, RET and IRET (SDM Vol. 2, Vol. 3A §5.8, §6.12.1, §7.3).
//!
//! Not supported: shadow stacks.

use engine::{Segment, VmExit, interruptibility};
use iced_x86::{Code, Instruction, OpKind};
use x86_spec::controls::PinbasedControls;
use x86_spec::exception;
use x86_spec::exit::{ExitReason, ept_violation};
use x86_spec::reg::{gpr, rflags};
use x86_spec::segment::{AccessRights, seg};

use super::canonical;
use super::event::{Origin, deliver_from, tss_stack32, tss_stack64};
use super::segment::{Descriptor, NULL, is_null, null_stack_segment, read_far_pointer, ty};
use super::stack::Stack;
use crate::cpu::{Cpu, Exec, Reason, Stop};
use crate::operand::size_mask;

/// What asked for a task switch, as the exit qualification encodes it (SDM Vol. 3C
/// table 28-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TaskSource {
    Call = 0,
    Iret = 1,
    Jmp = 2,
    IdtGate = 3,
}

/// The exit for a task switch to `selector`.
pub(super) fn task_switch(cpu: &mut Cpu, selector: u16, source: TaskSource, length: u32) -> Stop {
    let mut exit = VmExit::new(ExitReason::TaskSwitch).qualified(selector as u64 | (source as u64) << 30);
    exit.instruction_length = length;
    cpu.exit(exit)
}

/// The checks of a task gate's TSS selector (SDM Vol. 3A §7.3).
pub(super) fn check_new_task(cpu: &mut Cpu, selector: u16, ext: u32) -> Exec {
    let code = selector as u32 & 0xfffc | ext;
    if selector & 4 != 0 || is_null(selector) {
        return Err(cpu.gp(code));
    }
    let d = cpu.descriptor(selector, exception::GP, ext)?;
    if !d.is_system(ty::TSS_AVAILABLE) && !d.is_system(ty::TSS16_AVAILABLE) {
        return Err(cpu.gp(code));
    }
    if !d.access().present() {
        return Err(cpu.fault_code(exception::NP, code));
    }
    Ok(())
}

/// Selector, offset and operand size of a far branch.
fn far_target(cpu: &mut Cpu, i: &Instruction) -> Exec<(u16, u64, u8)> {
    if i.op_kind(0) == OpKind::Memory {
        let size = match i.code() {
            Code::Jmp_m1616 | Code::Call_m1616 => 2,
            Code::Jmp_m1664 | Code::Call_m1664 => 8,
            _ => 4,
        };
        let (selector, offset) = read_far_pointer(cpu, i, 0, size)?;
        Ok((selector, offset, size))
    } else if i.op_kind(0) == OpKind::FarBranch16 {
        Ok((i.far_branch_selector(), i.far_branch16() as u64, 2))
    } else {
        Ok((i.far_branch_selector(), i.far_branch32() as u64, 4))
    }
}

/// Whether code with these access rights is 64-bit code now.
fn is_64_bit_code(cpu: &Cpu, a: AccessRights) -> bool {
    cpu.long_mode() && a.long()
}

/// Checks an offset into a code segment: canonical in 64-bit code, else within the limit.
///
/// # Errors
/// #GP(0).
fn check_offset(cpu: &mut Cpu, cs: &Segment, offset: u64) -> Exec {
    let ok = if is_64_bit_code(cpu, cs.access) { canonical(offset) } else { offset <= cs.limit as u64 };
    if ok { Ok(()) } else { Err(cpu.gp(0)) }
}

/// Checks the code segment of a direct far JMP or CALL (SDM Vol. 3A §5.8.1).
fn direct_code_segment(cpu: &mut Cpu, selector: u16, d: &mut Descriptor) -> Exec<Segment> {
    let code = selector as u32 & 0xfffc;
    let a = d.access();
    if cpu.long_mode() && a.long() && a.db() {
        return Err(cpu.gp(code));
    }
    let allowed = if a.conforming() {
        a.dpl() <= cpu.cpl
    } else {
        (selector & 3) as u8 <= cpu.cpl && a.dpl() == cpu.cpl
    };
    if !allowed {
        return Err(cpu.gp(code));
    }
    if !a.present() {
        return Err(cpu.fault_code(exception::NP, code));
    }
    cpu.mark_accessed(d)?;
    Ok(d.segment(selector & !3 | cpu.cpl as u16))
}

/// A call gate: target selector, offset, operand size and parameter count.
struct CallGate {
    selector: u16,
    offset: u64,
    size: u8,
    parameters: u8,
}

/// What a far branch's selector names.
enum Destination {
    Code(Descriptor),
    Gate(CallGate),
}

/// Looks up and checks what a far branch's selector names. Task gates and TSSs exit.
fn destination(cpu: &mut Cpu, i: &Instruction, selector: u16, source: TaskSource) -> Exec<Destination> {
    if is_null(selector) {
        return Err(cpu.gp(0));
    }
    let code = selector as u32 & 0xfffc;
    let d = cpu.descriptor(selector, exception::GP, 0)?;
    let a = d.access();
    if a.is_code() {
        return Ok(Destination::Code(d));
    }
    let privileged = a.dpl() < cpu.cpl || a.dpl() < (selector & 3) as u8;
    let long = cpu.long_mode();
    match a.ty() {
        _ if a.is_code_or_data() => Err(cpu.gp(code)),
        ty::CALL_GATE16 | ty::CALL_GATE if !(long && a.ty() == ty::CALL_GATE16) => {
            if privileged {
                return Err(cpu.gp(code));
            }
            let upper = if long { cpu.descriptor_upper(selector, 0)? } else { 0 };
            if !a.present() {
                return Err(cpu.fault_code(exception::NP, code));
            }
            let wide = a.ty() == ty::CALL_GATE;
            let offset = if wide { d.gate_offset() | upper << 32 } else { d.gate_offset() & 0xffff };
            Ok(Destination::Gate(CallGate {
                selector: d.gate_selector(),
                offset,
                size: if long {
                    8
                } else if wide {
                    4
                } else {
                    2
                },
                parameters: if long { 0 } else { (d.raw >> 32) as u8 & 0x1f },
            }))
        }
        ty::TASK_GATE if !long => {
            if privileged {
                return Err(cpu.gp(code));
            }
            if !a.present() {
                return Err(cpu.fault_code(exception::NP, code));
            }
            check_new_task(cpu, d.gate_selector(), 0)?;
            Err(task_switch(cpu, d.gate_selector(), source, i.len() as u32))
        }
        ty::TSS16_AVAILABLE | ty::TSS_AVAILABLE if !long => {
            if privileged {
                return Err(cpu.gp(code));
            }
            check_new_task(cpu, selector, 0)?;
            Err(task_switch(cpu, selector, source, i.len() as u32))
        }
        _ => Err(cpu.gp(code)),
    }
}

/// The code segment that a call gate leads to.
fn gate_code_segment(cpu: &mut Cpu, gate: &CallGate) -> Exec<Descriptor> {
    if is_null(gate.selector) {
        return Err(cpu.gp(0));
    }
    let code = gate.selector as u32 & 0xfffc;
    let mut d = cpu.descriptor(gate.selector, exception::GP, 0)?;
    let a = d.access();
    let bad_long = cpu.long_mode() && (!a.long() || a.db());
    if !a.is_code() || a.dpl() > cpu.cpl || bad_long {
        return Err(cpu.gp(code));
    }
    if !a.present() {
        return Err(cpu.fault_code(exception::NP, code));
    }
    cpu.mark_accessed(&mut d)?;
    Ok(d)
}

/// A far JMP or CALL in real or virtual-8086 mode.
fn real_branch(cpu: &mut Cpu, selector: u16, offset: u64) -> Exec {
    let cs = cpu.real_segment(seg::CS, selector);
    if offset > cs.limit as u64 {
        return Err(cpu.gp(0));
    }
    cpu.set_segment(seg::CS, cs);
    cpu.set_rip(offset);
    Ok(())
}

/// Far JMP.
pub(super) fn jmp_far(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let (selector, offset, _) = far_target(cpu, i)?;
    if cpu.real_or_v86() {
        return real_branch(cpu, selector, offset);
    }
    let (cs, offset) = match destination(cpu, i, selector, TaskSource::Jmp)? {
        Destination::Code(mut d) => (direct_code_segment(cpu, selector, &mut d)?, offset),
        Destination::Gate(gate) => {
            let d = gate_code_segment(cpu, &gate)?;
            let a = d.access();
            if !a.conforming() && a.dpl() != cpu.cpl {
                return Err(cpu.gp(gate.selector as u32 & 0xfffc));
            }
            (d.segment(gate.selector & !3 | cpu.cpl as u16), gate.offset)
        }
    };
    check_offset(cpu, &cs, offset)?;
    cpu.set_segment(seg::CS, cs);
    cpu.set_rip(offset);
    Ok(())
}

/// Far CALL.
pub(super) fn call_far(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let (selector, offset, size) = far_target(cpu, i)?;
    let return_rip = cpu.rip();
    let return_cs = cpu.segments[seg::CS].selector as u64;
    if cpu.real_or_v86() {
        let mut stack = Stack::current(cpu);
        stack.push(cpu, size, return_cs)?;
        stack.push(cpu, size, return_rip & size_mask(size))?;
        real_branch(cpu, selector, offset)?;
        stack.commit(cpu);
        return Ok(());
    }
    match destination(cpu, i, selector, TaskSource::Call)? {
        Destination::Code(mut d) => {
            let cs = direct_code_segment(cpu, selector, &mut d)?;
            call_same_level(cpu, cs, offset, size, return_cs, return_rip)
        }
        Destination::Gate(gate) => {
            let d = gate_code_segment(cpu, &gate)?;
            let a = d.access();
            if !a.conforming() && a.dpl() < cpu.cpl {
                return call_inner(cpu, &gate, d, return_cs, return_rip);
            }
            let cs = d.segment(gate.selector & !3 | cpu.cpl as u16);
            call_same_level(cpu, cs, gate.offset, gate.size, return_cs, return_rip)
        }
    }
}

fn call_same_level(cpu: &mut Cpu, cs: Segment, offset: u64, size: u8, ret_cs: u64, ret_rip: u64) -> Exec {
    let mut stack = Stack::current(cpu);
    stack.push(cpu, size, ret_cs)?;
    stack.push(cpu, size, ret_rip & size_mask(size))?;
    check_offset(cpu, &cs, offset)?;
    stack.commit(cpu);
    cpu.set_segment(seg::CS, cs);
    cpu.set_rip(offset);
    Ok(())
}

/// A call through a gate to an inner privilege level (SDM Vol. 3A §5.8.5).
fn call_inner(cpu: &mut Cpu, gate: &CallGate, d: Descriptor, ret_cs: u64, ret_rip: u64) -> Exec {
    let cpl = d.access().dpl();
    let (old_ss, old_rsp) = (cpu.segments[seg::SS], cpu.gpr(gpr::RSP));
    let old = Stack::current(cpu);
    let size = gate.size;
    let (ss, sp, error) = if cpu.long_mode() {
        let sp = tss_stack64(cpu, 4 + cpl as u32 * 8, 0)?;
        (null_stack_segment(cpl as u16, cpl), sp, 0)
    } else {
        let (ss, sp) = tss_stack32(cpu, cpl, 0)?;
        (ss, sp, ss.selector as u32 & 0xfffc)
    };
    let cs = d.segment(gate.selector & !3 | cpl as u16);
    let mut stack = Stack::switched(ss, sp, cpu.long_mode(), false, error);
    stack.push(cpu, size, old_ss.selector as u64)?;
    stack.push(cpu, size, old_rsp & size_mask(size))?;
    for n in (0..gate.parameters as u64).rev() {
        let parameter = old.peek(cpu, n * size as u64, size)?;
        stack.push(cpu, size, parameter)?;
    }
    stack.push(cpu, size, ret_cs)?;
    stack.push(cpu, size, ret_rip & size_mask(size))?;
    check_offset(cpu, &cs, gate.offset)?;
    cpu.cpl = cpl;
    cpu.set_segment(seg::SS, ss);
    cpu.set_segment(seg::CS, cs);
    stack.commit(cpu);
    cpu.set_rip(gate.offset);
    Ok(())
}

/// Checks the CS of a far return or IRET to the same or an outer level.
fn return_code_segment(cpu: &mut Cpu, selector: u16) -> Exec<Segment> {
    if is_null(selector) {
        return Err(cpu.gp(0));
    }
    let code = selector as u32 & 0xfffc;
    let rpl = (selector & 3) as u8;
    let mut d = cpu.descriptor(selector, exception::GP, 0)?;
    let a = d.access();
    let privilege_ok = if a.conforming() { a.dpl() <= rpl } else { a.dpl() == rpl };
    if !a.is_code() || rpl < cpu.cpl || !privilege_ok || cpu.long_mode() && a.long() && a.db() {
        return Err(cpu.gp(code));
    }
    if !a.present() {
        return Err(cpu.fault_code(exception::NP, code));
    }
    cpu.mark_accessed(&mut d)?;
    Ok(d.segment(selector))
}

/// Checks the SS of a return to `cpl` running `cs`.
fn return_stack_segment(cpu: &mut Cpu, selector: u16, cpl: u8, cs: &Segment) -> Exec<Segment> {
    if is_null(selector) {
        if is_64_bit_code(cpu, cs.access) && cpl != 3 && (selector & 3) as u8 == cpl {
            return Ok(null_stack_segment(selector, cpl));
        }
        return Err(cpu.gp(0));
    }
    let code = selector as u32 & 0xfffc;
    let mut d = cpu.descriptor(selector, exception::GP, 0)?;
    let a = d.access();
    let writable_data = a.is_code_or_data() && !a.is_code() && a.read_write();
    if (selector & 3) as u8 != cpl || a.dpl() != cpl || !writable_data {
        return Err(cpu.gp(code));
    }
    if !a.present() {
        return Err(cpu.fault_code(exception::SS, code));
    }
    cpu.mark_accessed(&mut d)?;
    Ok(d.segment(selector))
}

/// On a return to an outer level, data segments that it may not use become null
/// (SDM Vol. 3A §5.8.6). A null selector points to no segment, whatever VM entry put into the hidden part: KVM as a
/// hypervisor in L1 gives its guest, after an exit of that one's guest, a usable FS with a null selector, DPL 0 and
/// the base of a thread at CPL 3.
fn drop_inner_segments(cpu: &mut Cpu) {
    for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
        let Segment { access: a, selector, .. } = cpu.segments[index];
        let restricted = !(a.is_code() && a.conforming());
        let is_null = selector & !3 == 0;
        if !is_null && !a.unusable() && restricted && a.dpl() < cpu.cpl {
            cpu.set_segment(index, NULL);
        }
    }
}

/// Far RET.
pub(super) fn ret_far(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = match i.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfq | Code::Retfq_imm16 => 8,
        _ => 4,
    };
    let release = if i.op_count() == 1 { i.immediate16() as u64 } else { 0 };
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    stack.skip(release);
    if cpu.real_or_v86() {
        real_branch(cpu, selector, rip)?;
        stack.commit(cpu);
        return Ok(());
    }
    let cs = return_code_segment(cpu, selector)?;
    let rpl = (selector & 3) as u8;
    if rpl == cpu.cpl {
        check_offset(cpu, &cs, rip)?;
        stack.commit(cpu);
        cpu.set_segment(seg::CS, cs);
        cpu.set_rip(rip);
        return Ok(());
    }
    let sp = stack.pop(cpu, size)?;
    let ss_selector = stack.pop(cpu, size)? as u16;
    let ss = return_stack_segment(cpu, ss_selector, rpl, &cs)?;
    check_offset(cpu, &cs, rip)?;
    enter_outer(cpu, cs, rip, ss, sp, release);
    Ok(())
}

fn enter_outer(cpu: &mut Cpu, cs: Segment, rip: u64, ss: Segment, sp: u64, release: u64) {
    cpu.cpl = (cs.selector & 3) as u8;
    // Setting CS updates what is derived from SS.
    cpu.segments[seg::SS] = ss;
    cpu.set_segment(seg::CS, cs);
    let mut outer = Stack::current(cpu);
    outer.sp = sp;
    outer.skip(release);
    outer.commit(cpu);
    drop_inner_segments(cpu);
    cpu.set_rip(rip);
}

/// IRET, IRETD, IRETQ. NMIs are unblocked even if it faults (SDM Vol. 3A §6.7.1).
pub(super) fn iret(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = match i.code() {
        Code::Iretw => 2,
        Code::Iretq => 8,
        _ => 4,
    };
    // With NMI exiting and no virtual NMIs, IRET leaves blocking by NMI alone (SDM Vol. 3C §26.3).
    let physical = cpu.controls.pin & (PinbasedControls::NMI_EXITING | PinbasedControls::VIRTUAL_NMIS)
        == PinbasedControls::NMI_EXITING;
    let unblocked = cpu.interruptibility & interruptibility::NMI != 0 && !physical;
    let result = iret_any(cpu, i, size);
    if !unblocked {
        return result;
    }
    match (result, cpu.reason) {
        (Ok(()), _) => {
            cpu.interruptibility &= !interruptibility::NMI;
            cpu.request_event_check();
            Ok(())
        }
        // The rest is how the SDM tells a hypervisor to block NMIs again (Vol. 3C §28.2.3).
        (Err(_), Reason::Exit(mut exit))
            if matches!(exit.reason, ExitReason::EptViolation | ExitReason::PmlFull) =>
        {
            cpu.interruptibility &= !interruptibility::NMI;
            exit.qualification |= ept_violation::NMI_UNBLOCKING;
            Err(cpu.exit(exit))
        }
        (Err(_), Reason::Event(event)) => {
            cpu.interruptibility &= !interruptibility::NMI;
            cpu.set_rip(cpu.ip);
            deliver_from(cpu, event, 0, Origin { nmi_unblocked: true, ..Origin::default() })
        }
        (Err(stop), _) => Err(stop),
    }
}

fn iret_any(cpu: &mut Cpu, i: &Instruction, size: u8) -> Exec {
    if cpu.real_or_v86() {
        return iret_real(cpu, size);
    }
    if cpu.rflags_other & rflags::NT != 0 {
        return if cpu.long_mode() { Err(cpu.gp(0)) } else { Err(iret_task(cpu, i)) };
    }
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    let new_flags = stack.pop(cpu, size)?;
    if size == 4 && new_flags & rflags::VM != 0 && cpu.cpl == 0 && !cpu.long_mode() {
        return iret_to_v86(cpu, stack, rip, selector, new_flags);
    }
    let cs = return_code_segment(cpu, selector)?;
    let rpl = (selector & 3) as u8;
    let flags = iret_flags(cpu, size, new_flags);
    // 64-bit mode always pops SS:RSP (SDM Vol. 3A §6.14.3).
    if rpl == cpu.cpl && !cpu.is_64() {
        check_offset(cpu, &cs, rip)?;
        stack.commit(cpu);
        cpu.set_segment(seg::CS, cs);
        cpu.set_rip(rip);
        cpu.set_rflags(flags);
        return Ok(());
    }
    let sp = stack.pop(cpu, size)?;
    let ss_selector = stack.pop(cpu, size)? as u16;
    let ss = return_stack_segment(cpu, ss_selector, rpl, &cs)?;
    check_offset(cpu, &cs, rip)?;
    enter_outer(cpu, cs, rip, ss, sp, 0);
    cpu.set_rflags(flags);
    Ok(())
}

/// RFLAGS after IRET from protected mode: which bits the popped image may change
/// (SDM Vol. 2A, IRET).
fn iret_flags(cpu: &Cpu, size: u8, image: u64) -> u64 {
    let mut change = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        change |= rflags::RF | rflags::AC | rflags::ID;
    }
    if cpu.cpl <= cpu.iopl() {
        change |= rflags::IF;
    }
    if cpu.cpl == 0 {
        change |= rflags::IOPL;
        if size > 2 {
            change |= rflags::VIF | rflags::VIP;
        }
    }
    let mut flags = cpu.rflags() & !change & !rflags::RF | image & change;
    if !cpu.boundary.instruction_breakpoints {
        // RF only matters to instruction breakpoints, and clearing it after the next
        // instruction would make every return single-step.
        flags &= !rflags::RF;
    }
    flags
}

/// IRET in real mode and within virtual-8086 mode.
fn iret_real(cpu: &mut Cpu, size: u8) -> Exec {
    let virtual_if = super::flags::virtual_interrupt_flag(cpu, size)?;
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, size)?;
    let selector = stack.pop(cpu, size)? as u16;
    let image = stack.pop(cpu, size)?;
    if virtual_if {
        let flags = cpu.popped_virtual_flags(image)?;
        real_branch(cpu, selector, rip)?;
        stack.commit(cpu);
        cpu.set_rflags(flags);
        return Ok(());
    }
    let mut change = rflags::STATUS | rflags::TF | rflags::IF | rflags::DF | rflags::NT;
    if !cpu.v8086() {
        change |= rflags::IOPL;
    }
    if size > 2 {
        change |= rflags::AC | rflags::ID;
    }
    let flags = cpu.rflags() & !change & !rflags::RF | image & change;
    real_branch(cpu, selector, rip)?;
    stack.commit(cpu);
    cpu.set_rflags(flags);
    Ok(())
}

/// Return to virtual-8086 mode (SDM Vol. 3B §21.2.5).
fn iret_to_v86(cpu: &mut Cpu, mut stack: Stack, rip: u64, cs: u16, flags: u64) -> Exec {
    if rip > 0xffff {
        return Err(cpu.gp(0));
    }
    let sp = stack.pop(cpu, 4)?;
    let mut selectors = [0u16; 5];
    for s in &mut selectors {
        *s = stack.pop(cpu, 4)? as u16;
    }
    const CHANGE: u64 = rflags::STATUS
        | rflags::TF
        | rflags::IF
        | rflags::DF
        | rflags::IOPL
        | rflags::NT
        | rflags::RF
        | rflags::VM
        | rflags::AC
        | rflags::VIF
        | rflags::VIP
        | rflags::ID;
    cpu.cpl = 3;
    cpu.set_rflags(flags & CHANGE | rflags::FIXED1);
    let [ss, es, ds, fs, gs] = selectors;
    for (index, selector) in
        [(seg::CS, cs), (seg::SS, ss), (seg::ES, es), (seg::DS, ds), (seg::FS, fs), (seg::GS, gs)]
    {
        let s = cpu.real_segment(index, selector);
        cpu.set_segment(index, s);
    }
    cpu.set_gpr(gpr::RSP, sp);
    cpu.set_rip(rip);
    Ok(())
}

/// IRET with NT set: back to the task that the TSS links to, which exits.
fn iret_task(cpu: &mut Cpu, i: &Instruction) -> Stop {
    let tr = cpu.segments[seg::TR];
    let link = cpu.table_linear(tr.base, 0).and_then(|lin| cpu.sys_read::<u16>(lin));
    let selector = match link {
        Ok(s) => s,
        Err(stop) => return stop,
    };
    let code = selector as u32 & 0xfffc;
    if selector & 4 != 0 || is_null(selector) {
        return cpu.fault_code(exception::TS, code);
    }
    match cpu.descriptor(selector, exception::TS, 0) {
        Ok(d) if !d.is_system(ty::TSS_BUSY) && !d.is_system(ty::TSS16_BUSY) => {
            cpu.fault_code(exception::TS, code)
        }
        Ok(d) if !d.access().present() => cpu.fault_code(exception::NP, code),
        Ok(_) => task_switch(cpu, selector, TaskSource::Iret, i.len() as u32),
        Err(stop) => stop,
    }
}
