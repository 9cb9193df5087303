//! Decimal adjustments (SDM Vol. 2A) and SALC: 64-bit hosts can't execute them. Flags that the SDM
//! leaves undefined are computed from the result.

use iced_x86::{Instruction, Mnemonic};
use x86_spec::exception;
use x86_spec::reg::gpr::RAX;
use x86_spec::reg::rflags::{AF, CF, OF, PF, SF, ZF};

use crate::cpu::{Cpu, Exec};
use crate::op::SimpleFn;

/// The function for `i`, if it is a decimal adjustment.
pub(super) fn function(i: &Instruction) -> Option<SimpleFn> {
    Some(match i.mnemonic() {
        Mnemonic::Aaa => aaa,
        Mnemonic::Aad => aad,
        Mnemonic::Aam => aam,
        Mnemonic::Aas => aas,
        Mnemonic::Daa => daa,
        Mnemonic::Das => das,
        Mnemonic::Salc => salc,
        _ => return None,
    })
}

fn set_ax(cpu: &mut Cpu, ax: u16) {
    let rax = cpu.gpr(RAX);
    cpu.set_gpr(RAX, rax & !0xffff | u64::from(ax));
}

fn ax(cpu: &Cpu) -> u16 {
    cpu.gpr(RAX) as u16
}

/// SF, ZF and PF of a byte.
fn result_flags(al: u8) -> u64 {
    let parity = if al.count_ones() & 1 == 0 { PF } else { 0 };
    let zero = if al == 0 { ZF } else { 0 };
    let sign = if al & 0x80 != 0 { SF } else { 0 };
    parity | zero | sign
}

fn when(condition: bool, flags: u64) -> u64 {
    if condition { flags } else { 0 }
}

fn daa(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let old = ax(cpu) as u8;
    let flags = cpu.rflags();
    let low = old & 15 > 9 || flags & AF != 0;
    let high = old > 0x99 || flags & CF != 0;
    let al = old.wrapping_add(if low { 6 } else { 0 }).wrapping_add(if high { 0x60 } else { 0 });
    set_ax(cpu, ax(cpu) & 0xff00 | u16::from(al));
    cpu.set_status_flags(result_flags(al) | when(low, AF) | when(high, CF));
    Ok(())
}

fn das(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let old = ax(cpu) as u8;
    let flags = cpu.rflags();
    let low = old & 15 > 9 || flags & AF != 0;
    let high = old > 0x99 || flags & CF != 0;
    let borrow = low && old < 6;
    let al = old.wrapping_sub(if low { 6 } else { 0 }).wrapping_sub(if high { 0x60 } else { 0 });
    set_ax(cpu, ax(cpu) & 0xff00 | u16::from(al));
    cpu.set_status_flags(result_flags(al) | when(low, AF) | when(high || borrow, CF));
    Ok(())
}

fn aaa(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let adjust = ax(cpu) & 15 > 9 || cpu.rflags() & AF != 0;
    let value = if adjust { ax(cpu).wrapping_add(0x106) } else { ax(cpu) } & 0xff0f;
    set_ax(cpu, value);
    cpu.set_status_flags(result_flags(value as u8) | when(adjust, AF | CF));
    Ok(())
}

fn aas(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let adjust = ax(cpu) & 15 > 9 || cpu.rflags() & AF != 0;
    let value = if adjust { ax(cpu).wrapping_sub(0x106) } else { ax(cpu) } & 0xff0f;
    set_ax(cpu, value);
    cpu.set_status_flags(result_flags(value as u8) | when(adjust, AF | CF));
    Ok(())
}

/// SALC: AL becomes the carry flag in all bits. Not in the SDM, but every processor has it.
fn salc(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let al = if cpu.cf() { 0xff } else { 0 };
    set_ax(cpu, ax(cpu) & 0xff00 | al);
    Ok(())
}

fn aam(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let base = i.immediate8();
    let al = ax(cpu) as u8;
    let (Some(high), Some(low)) = (al.checked_div(base), al.checked_rem(base)) else {
        return Err(cpu.fault(exception::DE));
    };
    set_ax(cpu, u16::from(high) << 8 | u16::from(low));
    cpu.set_status_flags(result_flags(low));
    Ok(())
}

fn aad(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let [al, ah] = ax(cpu).to_le_bytes();
    let value = al.wrapping_add(ah.wrapping_mul(i.immediate8()));
    set_ax(cpu, value.into());
    cpu.set_status_flags(result_flags(value) & !OF);
    Ok(())
}
