//! String instructions on memory: MOVS, STOS, LODS, SCAS, CMPS, with and without REP.
//!
//! They are restartable: registers are updated after every piece, so that a fault or an event in
//! the middle leaves the architectural state of the iterations done. Forward MOVS and STOS on
//! memory go by whole pages. INS and OUTS are in [`crate::system`].

use std::ptr;

use iced_x86::{Instruction, Mnemonic, OpKind};
use x86_spec::reg::gpr::{RAX, RCX, RDI, RSI};
use x86_spec::segment::seg;

use super::alu::{self, Bin};
use super::{Flow, put};
use crate::cpu::{Access, Cpu, Exec};
use crate::op::{Op, SimpleFn, simple_end};
use crate::operand::{memory_segment, segment_index, size_mask};

/// Pieces done before the run loop looks at events.
const PIECES_PER_TURN: u32 = 64;

/// What the instruction does with each element.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Movs,
    Stos,
    Lods,
    Scas,
    Cmps,
}

/// A string instruction, decoded.
#[derive(Clone, Copy)]
struct Form {
    kind: Kind,
    /// Element size in bytes.
    size: u8,
    /// Mask of index and count registers.
    mask: u64,
    source_segment: usize,
    /// REP, REPE or REPNE.
    repeated: bool,
    /// The repetition goes on while ZF has this value (SCAS, CMPS).
    while_zf: bool,
}

fn form(i: &Instruction) -> Option<Form> {
    use Mnemonic as M;
    let (kind, size) = match i.mnemonic() {
        M::Movsb => (Kind::Movs, 1),
        M::Movsw => (Kind::Movs, 2),
        M::Movsd => (Kind::Movs, 4),
        M::Movsq => (Kind::Movs, 8),
        M::Stosb => (Kind::Stos, 1),
        M::Stosw => (Kind::Stos, 2),
        M::Stosd => (Kind::Stos, 4),
        M::Stosq => (Kind::Stos, 8),
        M::Lodsb => (Kind::Lods, 1),
        M::Lodsw => (Kind::Lods, 2),
        M::Lodsd => (Kind::Lods, 4),
        M::Lodsq => (Kind::Lods, 8),
        M::Scasb => (Kind::Scas, 1),
        M::Scasw => (Kind::Scas, 2),
        M::Scasd => (Kind::Scas, 4),
        M::Scasq => (Kind::Scas, 8),
        M::Cmpsb => (Kind::Cmps, 1),
        M::Cmpsw => (Kind::Cmps, 2),
        M::Cmpsd => (Kind::Cmps, 4),
        M::Cmpsq => (Kind::Cmps, 8),
        _ => return None,
    };
    // MOVSD and CMPSD are also SSE2 instructions.
    if !i.is_string_instruction() {
        return None;
    }
    let mask = (0..i.op_count()).find_map(|n| match i.op_kind(n) {
        OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(u64::MAX),
        OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(0xffff_ffff),
        OpKind::MemorySegSI | OpKind::MemoryESDI => Some(0xffff),
        _ => None,
    })?;
    Some(Form {
        kind,
        size,
        mask,
        source_segment: segment_index(memory_segment(i)),
        repeated: i.has_rep_prefix() || i.has_repne_prefix(),
        while_zf: !i.has_repne_prefix(),
    })
}

/// Writes an index or count register: 32-bit ones zero the upper half, 16-bit ones keep it.
fn set_masked(cpu: &mut Cpu, r: usize, value: u64, mask: u64) {
    cpu.regs[r] = if mask == 0xffff { cpu.regs[r] & !mask | value & mask } else { value & mask };
}

fn advance(cpu: &mut Cpu, r: usize, by: u64, mask: u64) {
    set_masked(cpu, r, cpu.regs[r].wrapping_add(by), mask);
}

/// Executes the instruction, or as much of it as comes before the next look at events.
fn string(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let Some(f) = form(i) else { return Err(cpu.ud()) };
    if !f.repeated {
        return element(cpu, f);
    }
    let flags = cpu.flags;
    let result = repeat(cpu, f);
    if result.is_err() {
        // A fault restores the flags (SDM Vol. 2B, REP); the iterations done stay done.
        cpu.flags = flags;
    }
    result
}

/// The iterations of a repeated instruction up to the next look at events.
fn repeat(cpu: &mut Cpu, f: Form) -> Exec {
    for _ in 0..PIECES_PER_TURN {
        let count = cpu.regs[RCX] & f.mask;
        if count == 0 {
            // The count register is written even so: with 32-bit addresses in 64-bit mode its upper
            // half is cleared only when an iteration was done.
            return Ok(());
        }
        let done = match bulk(cpu, f, count)? {
            Some(n) => n,
            None => {
                element(cpu, f)?;
                1
            }
        };
        set_masked(cpu, RCX, count - done, f.mask);
        let ended = matches!(f.kind, Kind::Scas | Kind::Cmps) && (cpu.flags & 0x4000 != 0) != f.while_zf;
        if count == done || ended {
            return Ok(());
        }
        if cpu.single || cpu.events_wait() {
            break;
        }
    }
    // Come back to this instruction after events had their chance.
    cpu.icount += 1;
    cpu.not_retired(2);
    cpu.request_event_check();
    cpu.set_rip(cpu.ip);
    Ok(())
}

/// One element.
fn element(cpu: &mut Cpu, f: Form) -> Exec {
    let step = if cpu.df() { (f.size as u64).wrapping_neg() } else { f.size as u64 };
    let bytes = f.size as u32;
    let source = |cpu: &mut Cpu| -> Exec<u64> {
        let lin = cpu.segment_linear(f.source_segment, cpu.regs[RSI] & f.mask, bytes, Access::Read)?;
        cpu.read_sized(lin, f.size)
    };
    let destination = |cpu: &mut Cpu, access| -> Exec<u64> {
        cpu.segment_linear(seg::ES, cpu.regs[RDI] & f.mask, bytes, access)
    };
    match f.kind {
        Kind::Movs => {
            let v = source(cpu)?;
            let to = destination(cpu, Access::Write)?;
            cpu.write_sized(to, f.size, v)?;
        }
        Kind::Stos => {
            let to = destination(cpu, Access::Write)?;
            cpu.write_sized(to, f.size, cpu.regs[RAX])?;
        }
        Kind::Lods => {
            let v = source(cpu)?;
            // SAFETY: offset 0 is RAX.
            unsafe {
                match f.size {
                    1 => put(cpu, 0, v as u8),
                    2 => put(cpu, 0, v as u16),
                    4 => put(cpu, 0, v as u32),
                    _ => put(cpu, 0, v),
                }
            }
        }
        Kind::Scas => {
            let at = destination(cpu, Access::Read)?;
            let b = cpu.read_sized(at, f.size)?;
            compare(cpu, cpu.regs[RAX], b, f.size);
        }
        Kind::Cmps => {
            // Processors read the destination first, which shows when both fault.
            let at = destination(cpu, Access::Read)?;
            let b = cpu.read_sized(at, f.size)?;
            let a = source(cpu)?;
            compare(cpu, a, b, f.size);
        }
    }
    if f.kind != Kind::Stos && f.kind != Kind::Scas {
        advance(cpu, RSI, step, f.mask);
    }
    if f.kind != Kind::Lods {
        advance(cpu, RDI, step, f.mask);
    }
    Ok(())
}

fn compare(cpu: &mut Cpu, a: u64, b: u64, size: u8) {
    let f = &mut cpu.flags;
    match size {
        1 => _ = <alu::Cmp as Bin<u8>>::run(a as u8, b as u8, f),
        2 => _ = <alu::Cmp as Bin<u16>>::run(a as u16, b as u16, f),
        4 => _ = <alu::Cmp as Bin<u32>>::run(a as u32, b as u32, f),
        _ => _ = <alu::Cmp as Bin<u64>>::run(a, b, f),
    }
}

/// As many elements of a forward MOVS or STOS as lie within one page of source and destination, if
/// both are plain memory. `None`: go by element.
fn bulk(cpu: &mut Cpu, f: Form, count: u64) -> Exec<Option<u64>> {
    if cpu.df() || cpu.single || !matches!(f.kind, Kind::Movs | Kind::Stos) || count < 2 {
        return Ok(None);
    }
    let size = f.size as u64;
    let (si, di) = (cpu.regs[RSI] & f.mask, cpu.regs[RDI] & f.mask);
    // Index registers must not wrap inside the piece.
    let room = |index: u64| (f.mask - index).saturating_add(1) / size;
    let Some(to) = piece(cpu, seg::ES, di, size, Access::Write) else { return Ok(None) };
    let mut n = count.min((0x1000 - (to & 0xfff)) / size).min(room(di));
    let mut from = 0;
    if f.kind == Kind::Movs {
        let Some(l) = piece(cpu, f.source_segment, si, size, Access::Read) else { return Ok(None) };
        from = l;
        n = n.min((0x1000 - (from & 0xfff)) / size).min(room(si));
    }
    if n < 2 {
        return Ok(None);
    }
    let bytes = n * size;
    // The whole piece against the segment limits.
    if !cpu.is_64() {
        let ok = piece(cpu, seg::ES, di, bytes, Access::Write).is_some()
            && (f.kind == Kind::Stos || piece(cpu, f.source_segment, si, bytes, Access::Read).is_some());
        if !ok {
            return Ok(None);
        }
    }
    if f.kind == Kind::Stos {
        let Some(p) = cpu.direct(to, bytes as u32, Access::Write)? else { return Ok(None) };
        // SAFETY: `direct` vouches for `bytes` bytes at `p`.
        unsafe { fill(p, cpu.regs[RAX], f.size, n as usize) };
        advance(cpu, RDI, bytes, f.mask);
        return Ok(Some(n));
    }
    let Some(s) = cpu.direct(from, bytes as u32, Access::Read)? else { return Ok(None) };
    let Some(d) = cpu.direct(to, bytes as u32, Access::Write)? else { return Ok(None) };
    // A destination shortly after the source repeats a pattern: element by element.
    let distance = (d as usize).wrapping_sub(s as usize);
    // SAFETY: `direct` vouches for `bytes` bytes at both pointers; no Rust reference points there.
    unsafe {
        if distance != 0 && distance < bytes as usize {
            for k in 0..n as usize {
                ptr::copy(s.add(k * size as usize), d.add(k * size as usize), size as usize);
            }
        } else {
            ptr::copy(s, d, bytes as usize);
        }
    }
    advance(cpu, RSI, bytes, f.mask);
    advance(cpu, RDI, bytes, f.mask);
    Ok(Some(n))
}

/// Linear address of a piece if segment checks let it pass; faults are left to the element path.
fn piece(cpu: &mut Cpu, segment: usize, offset: u64, bytes: u64, access: Access) -> Option<u64> {
    let saved = cpu.reason;
    let lin = cpu.segment_linear(segment, offset, bytes as u32, access).ok();
    cpu.reason = saved;
    lin
}

/// Stores `n` elements of `size` bytes.
///
/// # Safety
/// `p` is valid for writes of `n * size` bytes.
unsafe fn fill(p: *mut u8, value: u64, size: u8, n: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let low = value & size_mask(size);
        let byte = low as u8;
        let uniform = low == (u64::from_le_bytes([byte; 8]) & size_mask(size));
        if uniform {
            return ptr::write_bytes(p, byte, n * size as usize);
        }
        for k in 0..n {
            match size {
                2 => ptr::write_unaligned(p.cast::<u16>().add(k), low as u16),
                4 => ptr::write_unaligned(p.cast::<u32>().add(k), low as u32),
                _ => ptr::write_unaligned(p.cast::<u64>().add(k), low),
            }
        }
    }
}

impl Cpu {
    /// Whether the run loop should look at events.
    pub(crate) fn events_wait(&self) -> bool {
        self.icount >= self.shared.limit.load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// Picks the handler. `None`: not one of these.
pub(super) fn lower(i: &Instruction, _bits64: bool, op: &mut Op) -> Option<Flow> {
    form(i)?;
    op.data = string as SimpleFn as usize;
    op.run = simple_end;
    Some(Flow::End)
}
