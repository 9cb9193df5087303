//! Instructions that raise events: INT n, INT3, INTO, INT1, BOUND, UD0–UD2.

use iced_x86::{Code, Instruction};
use x86_spec::exception;
use x86_spec::interruption::EventType;
use x86_spec::reg::rflags;

use super::event::deliver;
use crate::cpu::{Access, Cpu, Event, Exec};

fn software(cpu: &mut Cpu, i: &Instruction, vector: u8, kind: EventType) -> Exec {
    // Delivery counts from the instruction: a fault on the way returns to it.
    let next = cpu.rip();
    cpu.set_rip(cpu.ip);
    let result = deliver(cpu, Event { vector, kind, error: None, payload: 0 }, i.len() as u32);
    if result.is_err() {
        cpu.set_rip(next);
    }
    result
}

/// INT n.
pub(super) fn int_n(cpu: &mut Cpu, i: &Instruction) -> Exec {
    software(cpu, i, i.immediate8(), EventType::SoftwareInterrupt)
}

/// INT3.
pub(super) fn int3(cpu: &mut Cpu, i: &Instruction) -> Exec {
    software(cpu, i, exception::BP, EventType::SoftwareException)
}

/// INTO: #OF if OF is set.
pub(super) fn into(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if cpu.rflags() & rflags::OF == 0 {
        return Ok(());
    }
    software(cpu, i, exception::OF, EventType::SoftwareException)
}

/// INT1 (ICEBP).
pub(super) fn int1(cpu: &mut Cpu, i: &Instruction) -> Exec {
    software(cpu, i, exception::DB, EventType::PrivilegedSoftwareException)
}

/// UD0, UD1, UD2.
pub(super) fn undefined(cpu: &mut Cpu, _: &Instruction) -> Exec {
    Err(cpu.ud())
}

/// BOUND: #BR if the signed index is outside the two bounds in memory.
pub(super) fn bound(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size: u8 = if i.code() == Code::Bound_r16_m1616 { 2 } else { 4 };
    let lin = cpu.operand_linear(i, size as u32 * 2, Access::Read)?;
    let lower = cpu.read_sized(lin, size)?;
    let upper = cpu.read_sized(lin.wrapping_add(size as u64) & 0xffff_ffff, size)?;
    let signed = |v: u64| if size == 2 { v as i16 as i64 } else { v as i32 as i64 };
    let index = signed(cpu.reg(i.op0_register()));
    if index < signed(lower) || index > signed(upper) {
        return Err(cpu.fault(exception::BR));
    }
    Ok(())
}
