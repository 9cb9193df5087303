//! IN, OUT, INS and OUTS (SDM Vol. 1 chapter 19, Vol. 3C §26.1.3, §28.2.1, tables 28-5, 28-8).
//!
//! A port that neither exits nor goes to a bus has nothing behind it: reads give ones.

use engine::Segment;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86_spec::controls::PrimaryControls;
use x86_spec::exit::ExitReason;
use x86_spec::exit::io as q;
use x86_spec::reg::gpr;
use x86_spec::segment::seg;

use super::info::address_size_bits;
use super::instruction_exit_for;
use super::msr::bit;
use crate::cpu::{Access, Cpu, Exec};
use crate::operand::{segment_index, size_mask};

/// Iterations of a REP string instruction before the run loop may look at events.
const BATCH: u32 = 1024;

/// The current TSS, which is a 32- or 64-bit one, and the offset of the I/O permission bitmap in it (SDM Vol. 1 §19.5.2).
///
/// # Errors
/// #GP(0) if there is no such TSS or it has no room for the offset.
pub(super) fn permission_bitmap(cpu: &mut Cpu) -> Exec<(Segment, u32)> {
    let tr = cpu.segments[seg::TR];
    let wide = !tr.access.unusable() && tr.access.ty() & 8 != 0;
    if !wide || tr.limit < 0x67 {
        return Err(cpu.gp(0));
    }
    let at = cpu.table_linear(tr.base, 0x66)?;
    Ok((tr, cpu.sys_read::<u16>(at)?.into()))
}

/// Whether this code may access the ports `port..port + size` (SDM Vol. 1 §19.5).
///
/// # Errors
/// #GP(0).
fn check_permission(cpu: &mut Cpu, port: u16, size: u8) -> Exec {
    if !cpu.protected() || !cpu.v8086() && cpu.cpl <= cpu.iopl() {
        return Ok(());
    }
    let (tr, map) = permission_bitmap(cpu)?;
    // The processor reads two bytes, so that the bits of a misaligned access are there.
    let at = map + port as u32 / 8;
    if at + 1 > tr.limit {
        return Err(cpu.gp(0));
    }
    let lin = cpu.table_linear(tr.base, at as u64)?;
    let low = cpu.sys_read::<u8>(lin)? as u16;
    let lin = cpu.table_linear(tr.base, at as u64 + 1)?;
    let high = cpu.sys_read::<u8>(lin)? as u16;
    let bits = low | high << 8;
    let mask = ((1u16 << size) - 1) << (port % 8);
    if bits & mask != 0 { Err(cpu.gp(0)) } else { Ok(()) }
}

/// Whether an access exits: bitmaps if in use, else unconditional I/O exiting.
fn exits(cpu: &Cpu, port: u16, size: u8) -> bool {
    if cpu.bus.is_some() {
        return false;
    }
    if !cpu.primary(PrimaryControls::USE_IO_BITMAPS) {
        return cpu.primary(PrimaryControls::UNCOND_IO_EXITING);
    }
    // An access that wraps around the port space exits (SDM Vol. 3C §25.6.4).
    (0..size as u16).any(|n| match port.checked_add(n) {
        Some(p) if p < 0x8000 => bit(cpu, cpu.controls.io_bitmap_a, 0, p as u32),
        Some(p) => bit(cpu, cpu.controls.io_bitmap_b, 0, p as u32 - 0x8000),
        None => true,
    })
}

fn port_read(cpu: &mut Cpu, port: u16, size: u8) -> u64 {
    match cpu.bus {
        // SAFETY: `bus` is set only while `emulate` runs, from an exclusive borrow that lives
        // that long, and nobody else uses it.
        Some(bus) => unsafe { (*bus).pio_read(port, size) as u64 & size_mask(size) },
        None => size_mask(size),
    }
}

fn port_write(cpu: &mut Cpu, port: u16, size: u8, value: u64) {
    if let Some(bus) = cpu.bus {
        // SAFETY: as in `port_read`.
        unsafe { (*bus).pio_write(port, size, (value & size_mask(size)) as u32) };
    }
}

/// The port operand and whether it is an immediate.
fn port_operand(cpu: &Cpu, i: &Instruction, n: u32) -> (u16, bool) {
    if i.op_kind(n) == OpKind::Register {
        (cpu.gpr(gpr::RDX) as u16, false)
    } else {
        (i.immediate8() as u16, true)
    }
}

fn scalar_exit(cpu: &mut Cpu, i: &Instruction, port: u16, size: u8, flags: u64) -> Exec {
    let exit =
        instruction_exit_for(i, ExitReason::IoInstruction).qualified(q::qualification(port, size, flags));
    Err(cpu.exit(exit))
}

/// IN.
pub(super) fn input(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = i.op0_register().size() as u8;
    let (port, immediate) = port_operand(cpu, i, 1);
    check_permission(cpu, port, size)?;
    if exits(cpu, port, size) {
        let flags = q::IN | if immediate { q::IMMEDIATE } else { 0 };
        return scalar_exit(cpu, i, port, size, flags);
    }
    let value = port_read(cpu, port, size);
    cpu.set_reg(i.op0_register(), value);
    Ok(())
}

/// OUT.
pub(super) fn output(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = i.op1_register().size() as u8;
    let (port, immediate) = port_operand(cpu, i, 0);
    check_permission(cpu, port, size)?;
    if exits(cpu, port, size) {
        return scalar_exit(cpu, i, port, size, if immediate { q::IMMEDIATE } else { 0 });
    }
    let value = cpu.reg(i.op1_register());
    port_write(cpu, port, size, value);
    Ok(())
}

/// A string I/O instruction as decoded.
struct StringIo {
    input: bool,
    size: u8,
    /// 2, 4 or 8.
    address_size: u8,
    /// RSI or RDI.
    pointer: usize,
    segment: usize,
    rep: bool,
}

fn decode_string(i: &Instruction) -> StringIo {
    let input = matches!(i.mnemonic(), Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd);
    let size = match i.mnemonic() {
        Mnemonic::Insb | Mnemonic::Outsb => 1,
        Mnemonic::Insw | Mnemonic::Outsw => 2,
        _ => 4,
    };
    let memory = if input { i.op_kind(0) } else { i.op_kind(1) };
    let address_size = match memory {
        OpKind::MemorySegSI | OpKind::MemoryESDI => 2,
        OpKind::MemorySegESI | OpKind::MemoryESEDI => 4,
        _ => 8,
    };
    let segment =
        if input || i.memory_segment() == Register::ES { seg::ES } else { segment_index(i.memory_segment()) };
    StringIo {
        input,
        size,
        address_size,
        pointer: if input { gpr::RDI } else { gpr::RSI },
        segment,
        rep: i.has_rep_prefix() || i.has_repne_prefix(),
    }
}

/// Writes a pointer or count register as wide as the address size.
fn set_address_register(cpu: &mut Cpu, r: usize, size: u8, value: u64) {
    let v = match size {
        2 => cpu.gpr(r) & !0xffff | value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    };
    cpu.set_gpr(r, v);
}

fn string_exit(cpu: &mut Cpu, i: &Instruction, s: &StringIo, port: u16) -> Exec {
    let flags = q::STRING | if s.input { q::IN } else { 0 } | if s.rep { q::REP } else { 0 };
    let mut exit =
        instruction_exit_for(i, ExitReason::IoInstruction).qualified(q::qualification(port, s.size, flags));
    exit.instruction_info = address_size_bits(s.address_size);
    if !s.input {
        exit.instruction_info |= (s.segment as u32) << 15;
    }
    let offset = cpu.gpr(s.pointer) & size_mask(s.address_size);
    let flat = cpu.is_64() && s.segment < seg::FS;
    let linear = if flat { offset } else { cpu.segments[s.segment].base.wrapping_add(offset) };
    exit.guest_linear = if cpu.is_64() { linear } else { linear & 0xffff_ffff };
    Err(cpu.exit(exit))
}

/// One iteration on the bus. The memory operand is checked before the port is touched.
fn string_step(cpu: &mut Cpu, s: &StringIo, port: u16) -> Exec {
    let offset = cpu.gpr(s.pointer) & size_mask(s.address_size);
    if s.input {
        let lin = cpu.segment_linear(s.segment, offset, s.size as u32, Access::Write)?;
        cpu.probe(lin, s.size as u32, Access::Write)?;
        let value = port_read(cpu, port, s.size);
        cpu.write_bytes(lin, &value.to_le_bytes()[..s.size as usize])?;
    } else {
        let lin = cpu.segment_linear(s.segment, offset, s.size as u32, Access::Read)?;
        let value = cpu.read_sized(lin, s.size)?;
        port_write(cpu, port, s.size, value);
    }
    let step = if cpu.df() { (s.size as u64).wrapping_neg() } else { s.size as u64 };
    set_address_register(cpu, s.pointer, s.address_size, offset.wrapping_add(step));
    Ok(())
}

fn string_io(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let s = decode_string(i);
    let port = cpu.gpr(gpr::RDX) as u16;
    let mut count = if s.rep { cpu.gpr(gpr::RCX) & size_mask(s.address_size) } else { 1 };
    if count == 0 {
        return Ok(());
    }
    check_permission(cpu, port, s.size)?;
    if exits(cpu, port, s.size) {
        return string_exit(cpu, i, &s, port);
    }
    for _ in 0..BATCH {
        string_step(cpu, &s, port)?;
        if !s.rep {
            return Ok(());
        }
        count -= 1;
        set_address_register(cpu, gpr::RCX, s.address_size, count);
        if count == 0 {
            return Ok(());
        }
    }
    // More to do: the same instruction again, after a look at events.
    cpu.not_retired(1);
    cpu.set_rip(cpu.ip);
    Ok(())
}

/// INS, with REP restartable at every iteration.
pub(super) fn ins(cpu: &mut Cpu, i: &Instruction) -> Exec {
    string_io(cpu, i)
}

/// OUTS, with REP restartable at every iteration.
pub(super) fn outs(cpu: &mut Cpu, i: &Instruction) -> Exec {
    string_io(cpu, i)
}
