//! The VM-exit instruction-information field and what goes with it (SDM Vol. 3C §28.2.5,
//! tables 28-8 to 28-15).
//!
//! Not supported: the forms of UMWAIT, TPAUSE and LOADIWKEY, which are not offered.

use engine::VmExit;
use iced_x86::{Instruction, OpKind, Register};
use x86_spec::exit::ExitReason;

use super::control::operand_segment;
use super::instruction_exit_for;
use crate::cpu::{Cpu, Stop};

/// Bit 10: the operand is a register.
const REGISTER: u32 = 1 << 10;

/// Address size as encoded in bits 9:7: 0 for 16 bits, 1 for 32, 2 for 64.
pub(super) fn address_size_bits(bytes: u8) -> u32 {
    match bytes {
        2 => 0,
        4 => 1 << 7,
        _ => 2 << 7,
    }
}

/// The bits that describe a memory operand: scaling, address size, segment, index, base.
fn memory_bits(cpu: &Cpu, i: &Instruction) -> u32 {
    let mut info = i.memory_index_scale().trailing_zeros() & 3;
    info |= address_size_bits(cpu.address_size(i));
    info |= (operand_segment(i) as u32) << 15;
    info |= match i.memory_index() {
        Register::None => 1 << 22,
        r => (r.number() as u32) << 18,
    };
    info |= match i.memory_base() {
        Register::None | Register::RIP | Register::EIP => 1 << 27,
        r => (r.number() as u32) << 23,
    };
    info
}

/// The exit qualification of instructions with a memory operand: its displacement, to
/// which a RIP-relative operand adds the next instruction's address.
fn displacement(cpu: &Cpu, i: &Instruction) -> u64 {
    if i.is_ip_rel_memory_operand() {
        return cpu.ip.wrapping_add(i.memory_displacement64().wrapping_sub(i.ip()));
    }
    let d = i.memory_displacement64();
    match cpu.address_size(i) {
        8 => d,
        4 => d as u32 as i32 as i64 as u64,
        _ => d as u16 as i16 as i64 as u64,
    }
}

/// Linear address of the memory operand, without checks.
pub(super) fn memory_linear(cpu: &Cpu, i: &Instruction) -> u64 {
    let lin = cpu.segments[operand_segment(i)].base.wrapping_add(cpu.effective_address(i));
    let flat = cpu.is_64() && operand_segment(i) < x86_spec::segment::seg::FS;
    if flat {
        cpu.effective_address(i)
    } else if cpu.is_64() {
        lin
    } else {
        lin & 0xffff_ffff
    }
}

/// An exit with information about operand `operand` (memory or register).
///
/// `extra` holds what the reason adds: a register in bits 31:28 or 6:3, an instruction
/// identity in bits 29:28, an operand size.
pub(super) fn operand_exit(
    cpu: &mut Cpu,
    i: &Instruction,
    reason: ExitReason,
    operand: u32,
    extra: u32,
) -> Stop {
    let mut exit: VmExit = instruction_exit_for(i, reason);
    if i.op_kind(operand) == OpKind::Memory {
        exit.qualification = displacement(cpu, i);
        exit.instruction_info = memory_bits(cpu, i) | extra;
    } else {
        exit.instruction_info = REGISTER | (i.op_register(operand).number() as u32) << 3 | extra;
    }
    cpu.exit(exit)
}
