//! DIV and IDIV in Rust, for their #DE. The status flags, undefined afterwards, stay.

use iced_x86::{Instruction, Mnemonic};
use x86_spec::exception;
use x86_spec::reg::gpr::{RAX, RDX};

use crate::cpu::{Cpu, Exec};
use crate::op::SimpleFn;
use crate::operand::size_mask;

/// The function for `i`, if it divides.
pub(super) fn function(i: &Instruction) -> Option<SimpleFn> {
    match i.mnemonic() {
        Mnemonic::Div => Some(div),
        Mnemonic::Idiv => Some(idiv),
        _ => None,
    }
}

/// Operand size in bytes.
fn size(i: &Instruction) -> u8 {
    use iced_x86::Code as C;
    match i.code() {
        C::Div_rm8 | C::Idiv_rm8 => 1,
        C::Div_rm16 | C::Idiv_rm16 => 2,
        C::Div_rm32 | C::Idiv_rm32 => 4,
        _ => 8,
    }
}

/// The double-width dividend in AX, DX:AX, EDX:EAX or RDX:RAX.
fn dividend(cpu: &Cpu, size: u8) -> u128 {
    let (a, d) = (cpu.gpr(RAX), cpu.gpr(RDX));
    if size == 1 {
        return (a & 0xffff).into();
    }
    let mask = size_mask(size);
    u128::from(d & mask) << (8 * size) | u128::from(a & mask)
}

/// Writes quotient and remainder.
fn store(cpu: &mut Cpu, size: u8, quotient: u64, remainder: u64) {
    let mask = size_mask(size);
    let (a, d) = (cpu.gpr(RAX), cpu.gpr(RDX));
    match size {
        1 => cpu.set_gpr(RAX, a & !0xffff | quotient & 0xff | (remainder & 0xff) << 8),
        2 => {
            cpu.set_gpr(RAX, a & !mask | quotient & mask);
            cpu.set_gpr(RDX, d & !mask | remainder & mask);
        }
        _ => {
            cpu.set_gpr(RAX, quotient & mask);
            cpu.set_gpr(RDX, remainder & mask);
        }
    }
}

fn div(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = size(i);
    let divisor = u128::from(cpu.read_operand(i, 0, size)?);
    let n = dividend(cpu, size);
    let quotient = n.checked_div(divisor).filter(|q| *q <= size_mask(size).into());
    let Some(q) = quotient else { return Err(cpu.fault(exception::DE)) };
    store(cpu, size, q as u64, (n % divisor) as u64);
    Ok(())
}

fn idiv(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = size(i);
    let bits = 8 * u32::from(size);
    let signed = |v: u128, bits: u32| (v << (128 - bits)) as i128 >> (128 - bits);
    let divisor = signed(cpu.read_operand(i, 0, size)?.into(), bits);
    let n = signed(dividend(cpu, size), 2 * bits);
    let quotient = n.checked_div(divisor).filter(|q| signed(*q as u128, bits) == *q);
    let Some(q) = quotient else { return Err(cpu.fault(exception::DE)) };
    store(cpu, size, q as u64, (n % divisor) as u64);
    Ok(())
}
