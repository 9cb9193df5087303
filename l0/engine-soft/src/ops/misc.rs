//! Multiplication and division, bit tests, exchanges, conversions, conditional moves, flag
//! instructions, and the stack.
//!
//! Not here (thunks do them): BMI, ADX, POPCNT, SHLD/SHRD, MOVBE, BCD arithmetic.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use x86_spec::exception;
use x86_spec::reg::gpr::{RAX, RBP, RBX, RCX, RDX, RSP};
use x86_spec::reg::rflags;
use x86_spec::segment::seg;

use super::alu::{self, Bin, MulWide, Word};
use super::{
    Addr, AddrForm, Base, Flow, Full, Seg, get, handler, modify, modify_locked, offset_of, operand_size, put,
    rm, rr, sized, sized_addr, sized_wide, sized_wide_addr,
};
use crate::block::Block;
use crate::cpu::{Access, Cpu, Exec};
use crate::op::{Handler, Op, SimpleFn, simple_next};
use crate::operand::size_mask;
use crate::{attempt, next};

/// Carry flag in [`Cpu::flags`].
const CF: u16 = 0x100;

/// Evaluates a condition by its encoding (SDM Vol. 2A appendix B.1.4.7) on [`Cpu::flags`].
#[inline(always)]
pub(super) const fn condition(f: u16, code: u8) -> bool {
    let met = match code >> 1 {
        0 => f & 1 != 0,
        1 => f & CF != 0,
        2 => f & 0x4000 != 0,
        3 => f & 0x4100 != 0,
        4 => f & 0x8000 != 0,
        5 => f & 0x400 != 0,
        6 => (f >> 15 ^ f) & 1 != 0,
        _ => f & 0x4000 != 0 || (f >> 15 ^ f) & 1 != 0,
    };
    met != (code & 1 != 0)
}

/// Encoding number of the instruction's condition.
pub(crate) fn condition_code(i: &Instruction) -> usize {
    (i.condition_code() as usize).wrapping_sub(1) & 15
}

macro_rules! by_condition {
    ($code:expr, $h:ident $(, $g:ty)*) => {
        match $code {
            0 => $h::<0 $(, $g)*> as Handler, 1 => $h::<1 $(, $g)*>, 2 => $h::<2 $(, $g)*>,
            3 => $h::<3 $(, $g)*>, 4 => $h::<4 $(, $g)*>, 5 => $h::<5 $(, $g)*>, 6 => $h::<6 $(, $g)*>,
            7 => $h::<7 $(, $g)*>, 8 => $h::<8 $(, $g)*>, 9 => $h::<9 $(, $g)*>, 10 => $h::<10 $(, $g)*>,
            11 => $h::<11 $(, $g)*>, 12 => $h::<12 $(, $g)*>, 13 => $h::<13 $(, $g)*>, 14 => $h::<14 $(, $g)*>,
            _ => $h::<15 $(, $g)*>,
        }
    };
}
pub(super) use by_condition;

handler! {
    /// setcc reg
    fn set_r[const C: u8](cpu, op, o) { let v = condition(cpu.flags, C) as u8; put(cpu, o.dst, v); }
}
handler! {
    /// setcc mem
    fn set_m[const C: u8, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, 1, Access::Write));
        let v = condition(cpu.flags, C) as u8;
        attempt!(cpu, op, cpu.write(lin, v));
    }
}
handler! {
    /// cmovcc reg, reg
    fn cmov_rr[const C: u8, T: Word](cpu, op, o) {
        let v: T = if condition(cpu.flags, C) { get(cpu, o.src) } else { get(cpu, o.dst) };
        put(cpu, o.dst, v);
    }
}
handler! {
    /// cmovcc reg, mem
    fn cmov_rm[const C: u8, T: Word, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Read));
        let m: T = attempt!(cpu, op, cpu.read(lin));
        let v: T = if condition(cpu.flags, C) { m } else { get(cpu, o.dst) };
        put(cpu, o.dst, v);
    }
}

// ---- multiplication, division ----------------------------------------------------------------------

handler! {
    /// imul reg, reg, imm
    fn imul3_r[T: Word, O: Bin<T>](cpu, op, o) {
        let r = O::run(get(cpu, o.src), T::from_u64(o.imm), &mut cpu.flags);
        put::<T>(cpu, o.dst, r);
    }
}
handler! {
    /// imul reg, mem, imm
    fn imul3_m[T: Word, O: Bin<T>, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Read));
        let m: T = attempt!(cpu, op, cpu.read(lin));
        let r = O::run(m, T::from_u64(o.imm), &mut cpu.flags);
        put::<T>(cpu, o.dst, r);
    }
}

/// What one-operand multiplications and divisions do with their source.
pub(crate) trait Wide<T> {
    fn run(cpu: &mut Cpu, source: T) -> Exec;
}
pub(crate) struct Mul;
pub(crate) struct ImulWide;
pub(crate) struct Div;
pub(crate) struct Idiv;

/// Writes the double-width result: AX for bytes, else DX:AX in the operand size.
fn put_wide<T: Word>(cpu: &mut Cpu, low: T, high: T) {
    // SAFETY: offsets of RAX, AH and RDX.
    unsafe {
        put(cpu, RAX as u8 * 8, low);
        put(cpu, if T::BYTES == 1 { 1 } else { RDX as u8 * 8 }, high);
    }
}
impl<T: Word + MulWide> Wide<T> for Mul {
    #[inline(always)]
    fn run(cpu: &mut Cpu, source: T) -> Exec {
        let (l, h) = T::mul(T::from_u64(cpu.regs[RAX]), source, &mut cpu.flags);
        put_wide(cpu, l, h);
        Ok(())
    }
}
impl<T: Word + MulWide> Wide<T> for ImulWide {
    #[inline(always)]
    fn run(cpu: &mut Cpu, source: T) -> Exec {
        let (l, h) = T::imul(T::from_u64(cpu.regs[RAX]), source, &mut cpu.flags);
        put_wide(cpu, l, h);
        Ok(())
    }
}
/// The double-width dividend, zero-extended.
fn dividend<T: Word>(cpu: &Cpu) -> u128 {
    if T::BYTES == 1 {
        return cpu.regs[RAX] as u16 as u128;
    }
    let bits = T::BYTES as u32 * 8;
    let mask = size_mask(T::BYTES);
    ((cpu.regs[RDX] & mask) as u128) << bits | (cpu.regs[RAX] & mask) as u128
}
impl<T: Word> Wide<T> for Div {
    fn run(cpu: &mut Cpu, source: T) -> Exec {
        let d = source.to_u64();
        let n = dividend::<T>(cpu);
        if d == 0 {
            return Err(cpu.fault(exception::DE));
        }
        let (q, r) = match u64::try_from(n) {
            Ok(n) => ((n / d) as u128, n % d),
            Err(_) => (n / d as u128, (n % d as u128) as u64),
        };
        if q > size_mask(T::BYTES) as u128 {
            return Err(cpu.fault(exception::DE));
        }
        put_wide(cpu, T::from_u64(q as u64), T::from_u64(r));
        Ok(())
    }
}
impl<T: Word> Wide<T> for Idiv {
    fn run(cpu: &mut Cpu, source: T) -> Exec {
        let d = source.sext() as i128;
        let shift = 128 - T::BYTES as u32 * 16;
        let n = (dividend::<T>(cpu) << shift) as i128 >> shift;
        let bits = T::BYTES as u32 * 8;
        let (Some(q), Some(r)) = (n.checked_div(d), n.checked_rem(d)) else {
            return Err(cpu.fault(exception::DE));
        };
        if q < -(1 << (bits - 1)) || q >= 1 << (bits - 1) {
            return Err(cpu.fault(exception::DE));
        }
        put_wide(cpu, T::from_u64(q as u64), T::from_u64(r as u64));
        Ok(())
    }
}
handler! {
    /// mul, imul, div, idiv reg
    fn wide_r[T: Word, O: Wide<T>](cpu, op, o) {
        let s: T = get(cpu, o.dst);
        attempt!(cpu, op, O::run(cpu, s));
    }
}
handler! {
    /// mul, imul, div, idiv mem
    fn wide_m[T: Word, O: Wide<T>, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Read));
        let s: T = attempt!(cpu, op, cpu.read(lin));
        attempt!(cpu, op, O::run(cpu, s));
    }
}
fn lower_wide<O>(i: &Instruction, form: AddrForm) -> Handler
where
    O: Wide<u8> + Wide<u16> + Wide<u32> + Wide<u64>,
{
    let size = operand_size(i, 0);
    if i.op_kind(0) == OpKind::Memory { sized_addr!(size, form, wide_m, O) } else { sized!(size, wide_r, O) }
}

// ---- bit tests ---------------------------------------------------------------------------------------

handler! {
    /// bt, bts, btr, btc mem, reg/imm. `K`: 0 bt, 1 bts, 2 btr, 3 btc; 4 added: locked
    fn bit_m[const K: u8, T: Word](cpu, op, o) {
        let bits = T::BYTES as u32 * 8;
        let index = if o.aux != 0 { get::<T>(cpu, o.src).sext() } else { o.imm as i64 & (bits as i64 - 1) };
        let delta = ((index >> bits.trailing_zeros()) * T::BYTES as i64) as u64;
        let ea = offset_of(cpu, o).wrapping_add(delta) & size_mask(o.address_size);
        let access = if K & 3 == 0 { Access::Read } else { Access::Write };
        let lin = if cpu.is_64() && o.address_size == 8 {
            ea.wrapping_add(get::<u64>(cpu, o.segment))
        } else {
            attempt!(cpu, op, cpu.segment_linear(o.segment as usize, ea, T::SIZE, access))
        };
        let bit = 1u64 << (index as u32 & (bits - 1));
        let change = |a: T, f: &mut u16| {
            let a = a.to_u64();
            *f = *f & !CF | if a & bit != 0 { CF } else { 0 };
            let r = match K & 3 {
                1 => a | bit,
                2 => a & !bit,
                3 => a ^ bit,
                _ => a,
            };
            (T::from_u64(r), ())
        };
        if K == 0 {
            let a: T = attempt!(cpu, op, cpu.read(lin));
            change(a, &mut cpu.flags);
        } else if K & 4 != 0 {
            attempt!(cpu, op, modify_locked(cpu, lin, change));
        } else {
            attempt!(cpu, op, modify(cpu, lin, change));
        }
    }
}

fn lower_bit(i: &Instruction, op: &mut Op) -> Handler {
    let size = operand_size(i, 0);
    let by_reg = i.op_kind(1) == OpKind::Register;
    op.aux = by_reg as u8;
    let kind = match i.mnemonic() {
        Mnemonic::Bt => 0,
        Mnemonic::Bts => 1,
        Mnemonic::Btr => 2,
        _ => 3,
    };
    if i.op_kind(0) == OpKind::Memory {
        macro_rules! pick {
            ($k:literal) => {
                match size {
                    2 => bit_m::<$k, u16> as Handler,
                    4 => bit_m::<$k, u32>,
                    _ => bit_m::<$k, u64>,
                }
            };
        }
        return match (kind, i.has_lock_prefix()) {
            (0, _) => pick!(0),
            (1, false) => pick!(1),
            (2, false) => pick!(2),
            (_, false) => pick!(3),
            (1, true) => pick!(5),
            (2, true) => pick!(6),
            (_, true) => pick!(7),
        };
    }
    use super::ri;
    match (kind, by_reg) {
        (0, true) => sized_wide!(size, rr, alu::Bt),
        (1, true) => sized_wide!(size, rr, alu::Bts),
        (2, true) => sized_wide!(size, rr, alu::Btr),
        (_, true) => sized_wide!(size, rr, alu::Btc),
        (0, false) => sized_wide!(size, ri, alu::Bt),
        (1, false) => sized_wide!(size, ri, alu::Bts),
        (2, false) => sized_wide!(size, ri, alu::Btr),
        (_, false) => sized_wide!(size, ri, alu::Btc),
    }
}

// ---- exchanges -----------------------------------------------------------------------------------------

handler! {
    /// xchg reg, reg
    fn xchg_rr[T: Word](cpu, op, o) {
        let (a, b): (T, T) = (get(cpu, o.dst), get(cpu, o.src));
        put(cpu, o.dst, b);
        put(cpu, o.src, a);
    }
}
handler! {
    /// xchg mem, reg: locked without a prefix
    fn xchg_m[T: Word, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Write));
        let new: T = get(cpu, o.src);
        let old = match cpu.fast_rmw::<T>(lin) {
            Some(p) if lin & 63 <= 64 - T::SIZE as u64 => T::swap(p, new),
            _ => attempt!(cpu, op, modify_locked::<T, T>(cpu, lin, |old, _| (new, old))),
        };
        put(cpu, o.src, old);
    }
}
handler! {
    /// xadd reg, reg
    fn xadd_rr[T: Word, O: Bin<T>](cpu, op, o) {
        let (a, b): (T, T) = (get(cpu, o.dst), get(cpu, o.src));
        let sum = O::run(a, b, &mut cpu.flags);
        put(cpu, o.src, a);
        put(cpu, o.dst, sum);
    }
}
handler! {
    /// xadd mem, reg (`aux`: locked)
    fn xadd_m[T: Word, O: Bin<T>, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Write));
        let b: T = get(cpu, o.src);
        let add = |a: T, f: &mut u16| (O::run(a, b, f), a);
        let old = if o.aux != 0 { modify_locked(cpu, lin, add) } else { modify(cpu, lin, add) };
        let old = attempt!(cpu, op, old);
        put(cpu, o.src, old);
    }
}
handler! {
    /// cmpxchg reg, reg
    fn cmpxchg_rr[T: Word, O: Bin<T>](cpu, op, o) {
        let (a, dst): (T, T) = (get(cpu, 0), get(cpu, o.dst));
        O::run(a, dst, &mut cpu.flags);
        if a == dst {
            let src: T = get(cpu, o.src);
            put(cpu, o.dst, src);
        } else {
            put(cpu, 0, dst);
        }
    }
}
handler! {
    /// cmpxchg mem, reg (`aux`: locked)
    fn cmpxchg_m[T: Word, O: Bin<T>, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Write));
        let (a, src): (T, T) = (get(cpu, 0), get(cpu, o.src));
        let f = |dst: T, f: &mut u16| {
            O::run(a, dst, f);
            (if dst == a { src } else { dst }, dst)
        };
        let old = if o.aux != 0 { modify_locked(cpu, lin, f) } else { modify(cpu, lin, f) };
        let old = attempt!(cpu, op, old);
        if old != a {
            put(cpu, 0, old);
        }
    }
}

/// CMPXCHG8B and CMPXCHG16B (SDM Vol. 2A). The 16-byte form needs alignment.
fn cmpxchg_pair(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let wide = i.mnemonic() == Mnemonic::Cmpxchg16b;
    let half = if wide { 8 } else { 4 };
    let mask = size_mask(half);
    let bits = half as u32 * 8;
    let lin = cpu.operand_linear(i, half as u32 * 2, Access::Write)?;
    if wide && lin & 15 != 0 {
        return Err(cpu.gp(0));
    }
    let join = |h: u64, l: u64| ((h & mask) as u128) << bits | (l & mask) as u128;
    let expected = join(cpu.regs[RDX], cpu.regs[RAX]);
    let new = join(cpu.regs[RCX], cpu.regs[RBX]);
    let len = half as u32 * 2;
    let found = match cpu.direct(lin, len, Access::Write)? {
        // SAFETY: `direct` vouches for the pointer; the 16-byte form was checked for alignment.
        Some(p) if wide => unsafe { cas16(p, expected, new) },
        Some(p) if lin & 63 <= 56 => {
            // SAFETY: as above; LOCK CMPXCHG takes any alignment.
            (unsafe { <u64 as Word>::cas(p.cast(), expected as u64, new as u64) }) as u128
        }
        _ => {
            let mut b = [0; 16];
            cpu.probe(lin, len, Access::Write)?;
            cpu.read_bytes(lin, &mut b[..len as usize])?;
            let found = u128::from_le_bytes(b);
            let v = if found == expected { new } else { found };
            cpu.write_bytes(lin, &v.to_le_bytes()[..len as usize])?;
            found
        }
    };
    if found == expected {
        cpu.flags |= 0x4000;
    } else {
        cpu.flags &= !0x4000;
        cpu.regs[RAX] = found as u64 & mask;
        cpu.regs[RDX] = (found >> bits) as u64 & mask;
    }
    Ok(())
}

/// 16-byte compare-and-swap; returns what was found.
///
/// # Safety
/// `p` is aligned to 16 bytes and valid for reads and writes.
unsafe fn cas16(p: *mut u8, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: the caller's contract. RBX can't be named as an operand, so it is exchanged.
    unsafe {
        core::arch::asm!(
            "xchg rbx, {nl}", "lock cmpxchg16b [{p}]", "mov rbx, {nl}",
            nl = inout(reg) new as u64 => _, p = in(reg) p, in("rcx") (new >> 64) as u64,
            inout("rax") low, inout("rdx") high, options(nostack)
        );
    }
    (high as u128) << 64 | low as u128
}

// ---- conversions, flags --------------------------------------------------------------------------------

handler! {
    /// cbw, cwde, cdqe
    fn widen[D: Word, S: Word](cpu, op, _o) {
        let v: S = get(cpu, 0);
        put(cpu, 0, D::from_u64(v.sext() as u64));
    }
}
handler! {
    /// cwd, cdq, cqo
    fn spread[T: Word](cpu, op, _o) {
        let v: T = get(cpu, 0);
        put(cpu, RDX as u8 * 8, T::from_u64((v.sext() >> 63) as u64));
    }
}
handler! {
    /// bswap r32
    fn bswap32(cpu, op, o) { let v: u32 = get(cpu, o.dst); put(cpu, o.dst, v.swap_bytes()); }
}
handler! {
    /// bswap r64
    fn bswap64(cpu, op, o) { let v: u64 = get(cpu, o.dst); put(cpu, o.dst, v.swap_bytes()); }
}
handler! {
    /// clc, stc, cmc, cld, std by `aux`
    fn flag_op(cpu, op, o) {
        match o.aux {
            0 => cpu.flags &= !CF,
            1 => cpu.flags |= CF,
            2 => cpu.flags ^= CF,
            3 => cpu.rflags_other &= !rflags::DF,
            _ => cpu.rflags_other |= rflags::DF,
        }
    }
}
handler! {
    /// lahf
    fn lahf(cpu, op, _o) { let v = (cpu.flags >> 8) as u8 & 0xd5 | 2; put(cpu, 1, v); }
}
handler! {
    /// sahf
    fn sahf(cpu, op, _o) {
        let v: u8 = get(cpu, 1);
        cpu.flags = cpu.flags & 0xff | ((v & 0xd5 | 2) as u16) << 8;
    }
}

/// XLAT.
fn xlat(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let lin = cpu.operand_linear(i, 1, Access::Read)?;
    let v: u8 = cpu.read(lin)?;
    cpu.set_reg(Register::AL, v as u64);
    Ok(())
}

// ---- stack ------------------------------------------------------------------------------------------------

impl Cpu {
    /// Mask of the stack pointer's bits that are in use.
    pub(crate) fn stack_mask(&self) -> u64 {
        size_mask(self.stack_size())
    }

    /// Replaces the stack pointer's bits that are in use.
    pub(crate) fn set_stack_pointer(&mut self, value: u64) {
        let m = self.stack_mask();
        self.regs[RSP] = if m == 0xffff { self.regs[RSP] & !m | value & m } else { value & m };
    }

    /// Pushes `size` (2, 4, 8) bytes.
    ///
    /// # Errors
    /// #SS(0), #PF; nothing changed then.
    pub(crate) fn push(&mut self, size: u8, value: u64) -> Exec {
        let sp = self.regs[RSP].wrapping_sub(size as u64) & self.stack_mask();
        let lin = self.segment_linear(seg::SS, sp, size as u32, Access::Write)?;
        self.write_sized(lin, size, value)?;
        self.set_stack_pointer(sp);
        Ok(())
    }

    /// Reads what POP of `size` bytes at `offset` above the stack pointer would, without moving it.
    ///
    /// # Errors
    /// #SS(0), #PF.
    pub(crate) fn peek_stack(&mut self, offset: u64, size: u8) -> Exec<u64> {
        let sp = self.regs[RSP].wrapping_add(offset) & self.stack_mask();
        let lin = self.segment_linear(seg::SS, sp, size as u32, Access::Read)?;
        self.read_sized(lin, size)
    }

    /// Adds to the stack pointer.
    pub(crate) fn add_stack(&mut self, bytes: u64) {
        self.set_stack_pointer(self.regs[RSP].wrapping_add(bytes));
    }
}

handler! {
    /// push r64 in 64-bit mode
    fn push64_r(cpu, op, o) {
        let v: u64 = get(cpu, o.src);
        let sp = cpu.regs[RSP].wrapping_sub(8);
        attempt!(cpu, op, cpu.write(sp, v));
        cpu.regs[RSP] = sp;
    }
}
handler! {
    /// push imm in 64-bit mode
    fn push64_i(cpu, op, o) {
        let sp = cpu.regs[RSP].wrapping_sub(8);
        attempt!(cpu, op, cpu.write(sp, o.imm));
        cpu.regs[RSP] = sp;
    }
}
handler! {
    /// pop r64 in 64-bit mode
    fn pop64_r(cpu, op, o) {
        let sp = cpu.regs[RSP];
        let v: u64 = attempt!(cpu, op, cpu.read(sp));
        cpu.regs[RSP] = sp.wrapping_add(8);
        put(cpu, o.dst, v);
    }
}
handler! {
    /// push reg, any mode; `aux` is the size
    fn push_r(cpu, op, o) {
        let v: u64 = get(cpu, o.src);
        attempt!(cpu, op, cpu.push(o.aux, v));
    }
}
handler! {
    /// push imm, any mode
    fn push_i(cpu, op, o) { attempt!(cpu, op, cpu.push(o.aux, o.imm)); }
}
handler! {
    /// pop reg, any mode
    fn pop_r(cpu, op, o) {
        let v = attempt!(cpu, op, cpu.peek_stack(0, o.aux));
        cpu.add_stack(o.aux as u64);
        match o.aux {
            2 => put(cpu, o.dst, v as u16),
            4 => put(cpu, o.dst, v as u32),
            _ => put(cpu, o.dst, v),
        }
    }
}

/// PUSH mem.
fn push_m(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = operand_size(i, 0);
    let v = cpu.read_operand(i, 0, size)?;
    cpu.push(size, v)
}

/// POP mem: the address is computed with the stack pointer already raised (SDM Vol. 2B POP).
fn pop_m(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = operand_size(i, 0);
    let v = cpu.peek_stack(0, size)?;
    let sp = cpu.regs[RSP];
    cpu.add_stack(size as u64);
    let done = cpu.write_operand(i, 0, size, v);
    if done.is_err() {
        cpu.regs[RSP] = sp;
    }
    done
}

/// PUSHA and PUSHAD.
fn pusha(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = if i.mnemonic() == Mnemonic::Pushad { 4 } else { 2 };
    let sp = cpu.regs[RSP];
    let mask = cpu.stack_mask();
    let low = sp.wrapping_sub(size as u64 * 8) & mask;
    // All eight must be writable before the first is written.
    for n in [7, 0] {
        let lin = cpu.segment_linear(
            seg::SS,
            low.wrapping_add(n * size as u64) & mask,
            size as u32,
            Access::Write,
        )?;
        cpu.probe(lin, size as u32, Access::Write)?;
    }
    for n in 0..8 {
        let done = cpu.push(size, if n == RSP { sp } else { cpu.regs[n] });
        if done.is_err() {
            cpu.regs[RSP] = sp;
            return done;
        }
    }
    Ok(())
}

/// POPA and POPAD.
fn popa(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = if i.mnemonic() == Mnemonic::Popad { 4u8 } else { 2 };
    let mut values = [0; 8];
    for (n, v) in values.iter_mut().enumerate() {
        *v = cpu.peek_stack(n as u64 * size as u64, size)?;
    }
    for (n, v) in values.into_iter().enumerate() {
        let r = 7 - n;
        if r != RSP {
            cpu.regs[r] = if size == 4 { v } else { cpu.regs[r] & !0xffff | v };
        }
    }
    cpu.add_stack(size as u64 * 8);
    Ok(())
}

/// Operand size of LEAVE and ENTER.
fn frame_size(i: &Instruction) -> u8 {
    match i.mnemonic() {
        Mnemonic::Leave | Mnemonic::Enter => match i.stack_pointer_increment().unsigned_abs() {
            2 => 2,
            _ => match i.code() {
                iced_x86::Code::Leavew | iced_x86::Code::Enterw_imm16_imm8 => 2,
                iced_x86::Code::Leaved | iced_x86::Code::Enterd_imm16_imm8 => 4,
                _ => 8,
            },
        },
        _ => 8,
    }
}

handler! {
    /// leave in 64-bit mode
    fn leave64(cpu, op, _o) {
        let bp = cpu.regs[RBP];
        let v: u64 = attempt!(cpu, op, cpu.read(bp));
        cpu.regs[RSP] = bp.wrapping_add(8);
        cpu.regs[RBP] = v;
    }
}

/// LEAVE in any mode.
fn leave(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = frame_size(i);
    let sp = cpu.regs[RSP];
    cpu.set_stack_pointer(cpu.regs[RBP]);
    match cpu.peek_stack(0, size) {
        Ok(v) => {
            cpu.add_stack(size as u64);
            cpu.set_reg([Register::BP, Register::EBP, Register::RBP][size.trailing_zeros() as usize - 1], v);
            Ok(())
        }
        Err(e) => {
            cpu.regs[RSP] = sp;
            Err(e)
        }
    }
}

/// ENTER (SDM Vol. 2A).
fn enter(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = frame_size(i);
    let alloc = i.immediate16() as u64;
    let level = i.immediate8_2nd() & 31;
    let (sp, bp) = (cpu.regs[RSP], cpu.regs[RBP]);
    let done = enter_frame(cpu, size, alloc, level, bp);
    if done.is_err() {
        cpu.regs[RSP] = sp;
        cpu.regs[RBP] = bp;
    }
    done
}

fn enter_frame(cpu: &mut Cpu, size: u8, alloc: u64, level: u8, bp: u64) -> Exec {
    let bytes = size as u64;
    cpu.push(size, bp)?;
    let frame = cpu.regs[RSP];
    for n in 1..level as u64 {
        let at = bp.wrapping_sub(n * bytes) & cpu.stack_mask();
        let lin = cpu.segment_linear(seg::SS, at, size as u32, Access::Read)?;
        let v = cpu.read_sized(lin, size)?;
        cpu.push(size, v)?;
    }
    if level > 0 {
        cpu.push(size, frame)?;
    }
    let m = cpu.stack_mask();
    let sp = cpu.regs[RSP].wrapping_sub(alloc) & m;
    // The new top must be writable (SDM: ENTER).
    let lin = cpu.segment_linear(seg::SS, sp, size as u32, Access::Write)?;
    cpu.probe(lin, size as u32, Access::Write)?;
    cpu.set_stack_pointer(sp);
    let mask = size_mask(size).min(if size == 2 { 0xffff } else { m.max(0xffff_ffff) });
    cpu.regs[RBP] = if size == 2 { bp & !0xffff | frame & 0xffff } else { frame & mask };
    Ok(())
}

/// Installs an out-of-line function.
fn simple(op: &mut Op, f: SimpleFn) -> Handler {
    op.data = f as usize;
    simple_next
}

/// Picks the handler. `None`: not one of these.
pub(super) fn lower(i: &Instruction, bits64: bool, op: &mut Op, form: AddrForm) -> Option<Flow> {
    use Mnemonic as M;
    let size = operand_size(i, 0);
    let mem0 = i.op_count() > 0 && i.op_kind(0) == OpKind::Memory;
    let mem1 = i.op_count() > 1 && i.op_kind(1) == OpKind::Memory;
    let gpr = i.op_count() > 0 && i.op_kind(0) == OpKind::Register && i.op_register(0).is_gpr();
    let lock = i.has_lock_prefix();
    let code = condition_code(i);
    op.run = match i.mnemonic() {
        M::Mul => lower_wide::<Mul>(i, form),
        M::Div => lower_wide::<Div>(i, form),
        M::Idiv => lower_wide::<Idiv>(i, form),
        M::Imul => match (i.op_count(), mem1) {
            (1, _) => lower_wide::<ImulWide>(i, form),
            (2, false) => sized_wide!(size, rr, alu::Imul),
            (2, true) => sized_wide_addr!(size, form, rm, alu::Imul),
            (_, mem) => {
                op.imm = i.immediate(2);
                if mem {
                    sized_wide_addr!(size, form, imul3_m, alu::Imul)
                } else {
                    sized_wide!(size, imul3_r, alu::Imul)
                }
            }
        },
        M::Bsf if mem1 => sized_wide_addr!(size, form, rm, alu::Bsf),
        M::Bsf => sized_wide!(size, rr, alu::Bsf),
        M::Bsr if mem1 => sized_wide_addr!(size, form, rm, alu::Bsr),
        M::Bsr => sized_wide!(size, rr, alu::Bsr),
        M::Bt | M::Bts | M::Btr | M::Btc => lower_bit(i, op),
        M::Xchg if mem0 => sized_addr!(size, form, xchg_m),
        M::Xchg if mem1 => {
            op.src = op.dst;
            sized_addr!(size, form, xchg_m)
        }
        M::Xchg => sized!(size, xchg_rr),
        M::Xadd if mem0 => {
            op.aux = lock as u8;
            sized_addr!(size, form, xadd_m, alu::Add)
        }
        M::Xadd => sized!(size, xadd_rr, alu::Add),
        M::Cmpxchg if mem0 => {
            op.aux = lock as u8;
            sized_addr!(size, form, cmpxchg_m, alu::Cmp)
        }
        M::Cmpxchg => sized!(size, cmpxchg_rr, alu::Cmp),
        M::Cmpxchg8b | M::Cmpxchg16b => simple(op, cmpxchg_pair),
        M::Cbw => widen::<u16, u8>,
        M::Cwde => widen::<u32, u16>,
        M::Cdqe => widen::<u64, u32>,
        M::Cwd => spread::<u16>,
        M::Cdq => spread::<u32>,
        M::Cqo => spread::<u64>,
        M::Bswap if size == 4 => bswap32,
        M::Bswap if size == 8 => bswap64,
        M::Clc | M::Stc | M::Cmc | M::Cld | M::Std => {
            op.aux = match i.mnemonic() {
                M::Clc => 0,
                M::Stc => 1,
                M::Cmc => 2,
                M::Cld => 3,
                _ => 4,
            };
            flag_op
        }
        M::Lahf => lahf,
        M::Sahf => sahf,
        M::Xlatb => simple(op, xlat),
        M::Push | M::Pop if size != 0 && !gpr && !mem0 => return None,
        M::Push if mem0 => simple(op, push_m),
        M::Push if gpr => {
            op.src = op.dst;
            op.aux = size;
            op.stack = true;
            if bits64 && size == 8 { push64_r } else { push_r }
        }
        M::Push => {
            op.imm = i.immediate(0);
            op.aux = (i.stack_pointer_increment().unsigned_abs() & 15) as u8;
            op.stack = true;
            if bits64 && op.aux == 8 { push64_i } else { push_i }
        }
        M::Pop if mem0 => simple(op, pop_m),
        M::Pop => {
            op.aux = size;
            op.stack = true;
            if bits64 && size == 8 { pop64_r } else { pop_r }
        }
        M::Pusha | M::Pushad => simple(op, pusha),
        M::Popa | M::Popad => simple(op, popa),
        M::Leave if bits64 && i.code() == iced_x86::Code::Leaveq => {
            op.stack = true;
            leave64
        }
        M::Leave => simple(op, leave),
        M::Enter => simple(op, enter),
        m if is_setcc(m) => {
            if mem0 {
                match form {
                    AddrForm::Base => by_condition!(code, set_m, Base),
                    AddrForm::Full => by_condition!(code, set_m, Full),
                    AddrForm::Seg => by_condition!(code, set_m, Seg),
                }
            } else {
                by_condition!(code, set_r)
            }
        }
        m if is_cmovcc(m) => {
            macro_rules! pick {
                ($t:ty) => {
                    match (mem1, form) {
                        (false, _) => by_condition!(code, cmov_rr, $t),
                        (_, AddrForm::Base) => by_condition!(code, cmov_rm, $t, Base),
                        (_, AddrForm::Full) => by_condition!(code, cmov_rm, $t, Full),
                        (_, AddrForm::Seg) => by_condition!(code, cmov_rm, $t, Seg),
                    }
                };
            }
            match size {
                2 => pick!(u16),
                4 => pick!(u32),
                _ => pick!(u64),
            }
        }
        _ => return None,
    };
    Some(Flow::Next)
}

pub(crate) fn is_setcc(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Seto
            | M::Setno
            | M::Setb
            | M::Setae
            | M::Sete
            | M::Setne
            | M::Setbe
            | M::Seta
            | M::Sets
            | M::Setns
            | M::Setp
            | M::Setnp
            | M::Setl
            | M::Setge
            | M::Setle
            | M::Setg
    )
}
pub(crate) fn is_cmovcc(m: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        m,
        M::Cmovo
            | M::Cmovno
            | M::Cmovb
            | M::Cmovae
            | M::Cmove
            | M::Cmovne
            | M::Cmovbe
            | M::Cmova
            | M::Cmovs
            | M::Cmovns
            | M::Cmovp
            | M::Cmovnp
            | M::Cmovl
            | M::Cmovge
            | M::Cmovle
            | M::Cmovg
    )
}
