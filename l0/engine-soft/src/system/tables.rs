//! GDTR, IDTR, LDTR and TR (SDM Vol. 3A §2.4).
//!
//! Not supported: nothing of them is left out.

use engine::{DescriptorTable, Segment};
use iced_x86::Instruction;
use x86_spec::exception;
use x86_spec::exit::ExitReason;
use x86_spec::segment::seg;

use super::canonical;
use super::control::{descriptor_table_exiting, umip};
use super::info::operand_exit;
use super::segment::{NULL, is_null, ty};
use crate::cpu::{Access, Cpu, Exec};

/// The exit of SGDT, SIDT, LGDT and LIDT; `identity` is bits 29:28 (SDM Vol. 3C table 28-11).
fn table_exit(cpu: &mut Cpu, i: &Instruction, identity: u32) -> Exec {
    if !descriptor_table_exiting(cpu) {
        return Ok(());
    }
    let wide = base_size(i) != 3 && !cpu.is_64();
    let extra = identity << 28 | (wide as u32) << 11;
    Err(operand_exit(cpu, i, ExitReason::GdtrIdtrAccess, 0, extra))
}

/// The exit of SLDT, STR, LLDT and LTR (table 28-12).
fn selector_exit(cpu: &mut Cpu, i: &Instruction, identity: u32) -> Exec {
    if !descriptor_table_exiting(cpu) {
        return Ok(());
    }
    Err(operand_exit(cpu, i, ExitReason::LdtrTrAccess, 0, identity << 28))
}

/// Bytes of the base that count: 3 with 16-bit operand size, else 4 or 8.
fn base_size(i: &Instruction) -> u8 {
    use iced_x86::Code;
    match i.code() {
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 | Code::Sgdt_m1632_16 | Code::Sidt_m1632_16 => 3,
        Code::Lgdt_m1664 | Code::Lidt_m1664 | Code::Sgdt_m1664 | Code::Sidt_m1664 => 8,
        _ => 4,
    }
}

fn load_table(cpu: &mut Cpu, i: &Instruction) -> Exec<DescriptorTable> {
    let long = cpu.is_64();
    let len = if long { 10 } else { 6 };
    let lin = cpu.operand_linear(i, len, Access::Read)?;
    let mut b = [0u8; 10];
    cpu.read_bytes(lin, &mut b[..len as usize])?;
    let limit = u16::from_le_bytes([b[0], b[1]]) as u32;
    let base = u64::from_le_bytes([b[2], b[3], b[4], b[5], b[6], b[7], b[8], b[9]]);
    let base = match base_size(i) {
        3 => base & 0xff_ffff,
        _ if long => base,
        _ => base & 0xffff_ffff,
    };
    if long && !canonical(base) {
        return Err(cpu.gp(0));
    }
    Ok(DescriptorTable { base, limit })
}

fn store_table(cpu: &mut Cpu, i: &Instruction, t: DescriptorTable) -> Exec {
    let len = if cpu.is_64() { 10 } else { 6 };
    let lin = cpu.operand_linear(i, len, Access::Write)?;
    let mut b = [0u8; 10];
    b[..2].copy_from_slice(&(t.limit as u16).to_le_bytes());
    b[2..].copy_from_slice(&t.base.to_le_bytes());
    cpu.write_bytes(lin, &b[..len as usize])
}

/// LGDT.
pub(super) fn lgdt(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    table_exit(cpu, i, 2)?;
    cpu.gdtr = load_table(cpu, i)?;
    Ok(())
}

/// LIDT.
pub(super) fn lidt(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    table_exit(cpu, i, 3)?;
    cpu.idtr = load_table(cpu, i)?;
    Ok(())
}

/// SGDT.
pub(super) fn sgdt(cpu: &mut Cpu, i: &Instruction) -> Exec {
    umip(cpu)?;
    table_exit(cpu, i, 0)?;
    store_table(cpu, i, cpu.gdtr)
}

/// SIDT.
pub(super) fn sidt(cpu: &mut Cpu, i: &Instruction) -> Exec {
    umip(cpu)?;
    table_exit(cpu, i, 1)?;
    store_table(cpu, i, cpu.idtr)
}

fn require_protected(cpu: &mut Cpu) -> Exec {
    if cpu.real_or_v86() { Err(cpu.ud()) } else { Ok(()) }
}

/// Reads a system descriptor for LLDT or LTR with its 64-bit base.
fn system_segment(
    cpu: &mut Cpu,
    selector: u16,
    accepts: impl Fn(u8) -> bool,
) -> Exec<(super::segment::Descriptor, Segment)> {
    let code = selector as u32 & 0xfffc;
    if selector & 4 != 0 {
        return Err(cpu.gp(code));
    }
    let d = cpu.descriptor(selector, exception::GP, 0)?;
    let a = d.access();
    if a.is_code_or_data() || !accepts(a.ty()) {
        return Err(cpu.gp(code));
    }
    if !a.present() {
        return Err(cpu.fault_code(exception::NP, code));
    }
    let mut s = d.segment(selector);
    if cpu.is_64() {
        s.base |= cpu.descriptor_upper(selector, 0)? << 32;
        if !canonical(s.base) {
            return Err(cpu.gp(code));
        }
    }
    Ok((d, s))
}

/// LLDT.
pub(super) fn lldt(cpu: &mut Cpu, i: &Instruction) -> Exec {
    require_protected(cpu)?;
    cpu.require_cpl0()?;
    selector_exit(cpu, i, 2)?;
    let selector = cpu.read_operand(i, 0, 2)? as u16;
    if is_null(selector) {
        cpu.set_segment(seg::LDTR, Segment { selector, ..NULL });
        return Ok(());
    }
    let (_, s) = system_segment(cpu, selector, |t| t == ty::LDT)?;
    cpu.set_segment(seg::LDTR, s);
    Ok(())
}

/// LTR.
pub(super) fn ltr(cpu: &mut Cpu, i: &Instruction) -> Exec {
    require_protected(cpu)?;
    cpu.require_cpl0()?;
    selector_exit(cpu, i, 3)?;
    let selector = cpu.read_operand(i, 0, 2)? as u16;
    if is_null(selector) {
        return Err(cpu.gp(0));
    }
    let long = cpu.long_mode();
    let (d, mut s) =
        system_segment(cpu, selector, |t| t == ty::TSS_AVAILABLE || t == ty::TSS16_AVAILABLE && !long)?;
    // The descriptor in memory becomes busy, and so does the register.
    const BUSY: u64 = 2 << 40;
    cpu.sys_write::<u8>(d.address.wrapping_add(5), ((d.raw | BUSY) >> 40) as u8)?;
    s.access.0 |= 2;
    cpu.set_segment(seg::TR, s);
    Ok(())
}

fn store_selector(cpu: &mut Cpu, i: &Instruction, identity: u32, index: usize) -> Exec {
    require_protected(cpu)?;
    umip(cpu)?;
    selector_exit(cpu, i, identity)?;
    let selector = cpu.segments[index].selector as u64;
    cpu.write_operand(i, 0, 2, selector)
}

/// SLDT.
pub(super) fn sldt(cpu: &mut Cpu, i: &Instruction) -> Exec {
    store_selector(cpu, i, 0, seg::LDTR)
}

/// STR.
pub(super) fn str_(cpu: &mut Cpu, i: &Instruction) -> Exec {
    store_selector(cpu, i, 1, seg::TR)
}
