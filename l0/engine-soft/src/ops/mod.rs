//! Integer instructions that run inside a block: handlers, and the choice of a handler for a
//! decoded instruction.
//!
//! Handlers are generic over operand size, operation and addressing form; [`lower`] picks the
//! instance. What is not here goes to [`crate::system`] (privileged, far and flag-register
//! instructions) and [`crate::thunk`] (vector, x87 and rare integer instructions).

pub mod alu;
pub(crate) mod branch;
pub(crate) mod misc;
mod string;

use std::ptr;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::block::Block;
use crate::cpu::{Access, Cpu, Exec, SLOT_FS, SLOT_GS, SLOT_RIP, SLOT_ZERO, gpr8_number};
use crate::op::{Handler, Op};
use crate::operand::{has_memory, memory_segment, segment_index, size_mask};
use crate::{attempt, next};
use alu::{Bin, Shift, Un, Word};
pub(crate) use branch::fallthrough;

/// Whether a lowered instruction ends its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Others may follow.
    Next,
    /// It is the block's last.
    End,
}

// ---- registers -------------------------------------------------------------------------------

/// Reads a register field.
///
/// # Safety
/// `offset` comes from [`reg_offset`] or is a slot's offset, and `T` fits what it was made for.
#[inline(always)]
pub(crate) unsafe fn get<T: Word>(cpu: &Cpu, offset: u8) -> T {
    // SAFETY: offsets made by decode stay inside `regs`.
    unsafe { ptr::read_unaligned((&raw const cpu.regs).cast::<u8>().add(offset as usize).cast()) }
}

/// Writes a register field; 32-bit writes zero the upper half.
///
/// # Safety
/// As [`get`].
#[inline(always)]
pub(crate) unsafe fn put<T: Word>(cpu: &mut Cpu, offset: u8, value: T) {
    // SAFETY: as in `get`.
    unsafe {
        let p = (&raw mut cpu.regs).cast::<u8>().add(offset as usize);
        if T::BYTES == 4 {
            ptr::write_unaligned(p.cast::<u64>(), value.to_u64());
        } else {
            ptr::write_unaligned(p.cast::<T>(), value);
        }
    }
}

/// Byte offset of a general register in [`Cpu::regs`].
pub(crate) fn reg_offset(r: Register) -> u8 {
    if r.is_gpr8() {
        match r {
            Register::AH | Register::CH | Register::DH | Register::BH => {
                (r as u8 - Register::AH as u8) * 8 + 1
            }
            _ => gpr8_number(r) as u8 * 8,
        }
    } else if r.is_gpr() {
        r.number() as u8 * 8
    } else {
        slot(SLOT_ZERO)
    }
}

/// Byte offset of a slot.
const fn slot(n: usize) -> u8 {
    n as u8 * 8
}

// ---- addressing --------------------------------------------------------------------------------

/// How an op computes its linear address.
pub(crate) trait Addr {
    /// The linear address of the memory operand for an access of `size` bytes.
    ///
    /// # Safety
    /// `op` was lowered for this form.
    unsafe fn linear(cpu: &mut Cpu, op: &Op, size: u32, access: Access) -> Exec<u64>;
}
/// 64-bit mode, base + displacement, flat segment.
pub(crate) struct Base;
/// 64-bit mode, everything with 64-bit addresses.
pub(crate) struct Full;
/// Any mode, with segmentation.
pub(crate) struct Seg;

impl Addr for Base {
    #[inline(always)]
    unsafe fn linear(cpu: &mut Cpu, op: &Op, _: u32, _: Access) -> Exec<u64> {
        // SAFETY: `base` is a register or slot offset.
        Ok(unsafe { get::<u64>(cpu, op.base) }.wrapping_add(op.disp))
    }
}
impl Addr for Full {
    #[inline(always)]
    unsafe fn linear(cpu: &mut Cpu, op: &Op, _: u32, _: Access) -> Exec<u64> {
        // SAFETY: register or slot offsets.
        let (b, i, s) =
            unsafe { (get::<u64>(cpu, op.base), get::<u64>(cpu, op.index), get::<u64>(cpu, op.segment)) };
        Ok(b.wrapping_add(i << op.scale).wrapping_add(op.disp).wrapping_add(s))
    }
}
impl Addr for Seg {
    #[inline(never)]
    unsafe fn linear(cpu: &mut Cpu, op: &Op, size: u32, access: Access) -> Exec<u64> {
        // SAFETY: register or slot offsets.
        let ea = unsafe { offset_of(cpu, op) };
        cpu.segment_linear(op.segment as usize, ea, size, access)
    }
}

/// The offset part of an op's address, truncated to its address size.
///
/// # Safety
/// `op` has a memory operand.
pub(crate) unsafe fn offset_of(cpu: &Cpu, op: &Op) -> u64 {
    // SAFETY: register or slot offsets.
    let (b, i) = unsafe { (get::<u64>(cpu, op.base), get::<u64>(cpu, op.index)) };
    b.wrapping_add(i << op.scale).wrapping_add(op.disp) & size_mask(op.address_size)
}

/// Addressing form of an op.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum AddrForm {
    Base,
    Full,
    Seg,
}

/// Fills the op's memory-operand fields.
pub(crate) fn lower_memory(i: &Instruction, bits64: bool, op: &mut Op) -> AddrForm {
    let base = i.memory_base();
    let index = i.memory_index();
    let rip = base == Register::RIP || base == Register::EIP;
    op.base = if rip { slot(SLOT_RIP) } else { reg_offset(base) };
    op.index = reg_offset(index);
    op.scale = i.memory_index_scale().trailing_zeros() as u8;
    op.disp = i.memory_displacement64();
    op.stack = memory_segment(i) == Register::SS;
    let by = if base != Register::None { base } else { index };
    op.address_size = if by.is_gpr64() || base == Register::RIP {
        8
    } else if by.is_gpr32() || base == Register::EIP {
        4
    } else if by.is_gpr16() {
        2
    } else {
        match i.memory_displ_size() {
            8 => 8,
            2 => 2,
            4 if bits64 => 8,
            _ => 4,
        }
    };
    if !bits64 || op.address_size != 8 {
        op.segment = segment_index(memory_segment(i)) as u8;
        return AddrForm::Seg;
    }
    op.segment = match i.memory_segment() {
        Register::FS => slot(SLOT_FS),
        Register::GS => slot(SLOT_GS),
        _ => slot(SLOT_ZERO),
    };
    if index == Register::None && op.segment == slot(SLOT_ZERO) { AddrForm::Base } else { AddrForm::Full }
}

/// Linear address of an op's memory operand, whatever its form; for the thunks.
///
/// # Errors
/// #GP(0), #SS(0) (segment checks outside 64-bit mode; the canonical check comes with the
/// access).
///
/// # Safety
/// `op` was lowered by [`lower_memory`] and belongs to the running block.
#[inline(always)]
pub(crate) unsafe fn op_linear(cpu: &mut Cpu, op: &Op, size: u32, access: Access) -> Exec<u64> {
    // SAFETY: the caller's contract.
    unsafe {
        if cpu.is_64() && op.address_size == 8 {
            Full::linear(cpu, op, size, access)
        } else {
            Seg::linear(cpu, op, size, access)
        }
    }
}

// ---- read-modify-write -------------------------------------------------------------------------

/// Read-modify-write of a memory operand, not atomic. `f` must not have lasting effects: the
/// write may still fault.
#[inline(always)]
fn modify<T: Word, R>(cpu: &mut Cpu, linear: u64, f: impl FnOnce(T, &mut u16) -> (T, R)) -> Exec<R> {
    if let Some(p) = cpu.fast_rmw::<T>(linear) {
        // SAFETY: the TLB vouches for the pointer.
        unsafe {
            let (v, r) = f(ptr::read_unaligned(p), &mut cpu.flags);
            ptr::write_unaligned(p, v);
            return Ok(r);
        }
    }
    cpu.probe(linear, T::SIZE, Access::Write)?;
    let mut flags = cpu.flags;
    let (v, r) = f(cpu.read(linear)?, &mut flags);
    cpu.write(linear, v)?;
    cpu.flags = flags;
    Ok(r)
}

/// Atomic read-modify-write of a memory operand.
pub(crate) fn modify_locked<T: Word, R>(
    cpu: &mut Cpu,
    linear: u64,
    f: impl Fn(T, &mut u16) -> (T, R),
) -> Exec<R> {
    let within_line = linear & 63 <= 64 - T::SIZE as u64;
    if within_line && let Some(p) = cpu.direct(linear, T::SIZE, Access::Write)? {
        let p = p.cast::<T>();
        // SAFETY: `direct` vouches for the pointer.
        let mut old = unsafe { ptr::read_unaligned(p) };
        loop {
            let mut flags = cpu.flags;
            let (new, r) = f(old, &mut flags);
            // SAFETY: as above.
            let found = unsafe { T::cas(p, old, new) };
            if found == old {
                cpu.flags = flags;
                return Ok(r);
            }
            old = found;
        }
    }
    modify(cpu, linear, f)
}

// ---- handlers ------------------------------------------------------------------------------------

macro_rules! handler {
    ($(#[$d:meta])* fn $name:ident $([$($g:tt)*])? ($cpu:ident, $op:ident, $o:ident) $body:block) => {
        $(#[$d])*
        ///
        /// # Safety
        /// As [`Handler`].
        pub(crate) unsafe extern "sysv64-unwind" fn $name $(<$($g)*>)? ($cpu: &mut Cpu, $op: *const Op) -> *const Block {
            // SAFETY: the contract of `Handler`; register fields were made by `lower`.
            unsafe {
                let $o = &*$op;
                $body
                next!($cpu, $op)
            }
        }
    };
}
pub(crate) use handler;

handler! {
    /// op reg, reg
    fn rr[T: Word, O: Bin<T>](cpu, op, o) {
        let r = O::run(get(cpu, o.dst), get(cpu, o.src), &mut cpu.flags);
        if O::WRITE { put::<T>(cpu, o.dst, r); }
    }
}
handler! {
    /// op reg, imm
    fn ri[T: Word, O: Bin<T>](cpu, op, o) {
        let r = O::run(get(cpu, o.dst), T::from_u64(o.imm), &mut cpu.flags);
        if O::WRITE { put::<T>(cpu, o.dst, r); }
    }
}
handler! {
    /// op reg, mem
    fn rm[T: Word, O: Bin<T>, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Read));
        let b = attempt!(cpu, op, cpu.read::<T>(lin));
        let r = O::run(get(cpu, o.dst), b, &mut cpu.flags);
        if O::WRITE { put::<T>(cpu, o.dst, r); }
    }
}
handler! {
    /// op mem, reg
    fn mr[T: Word, O: Bin<T>, A: Addr](cpu, op, o) {
        let b: T = get(cpu, o.src);
        attempt!(cpu, op, mem_bin::<T, O, A>(cpu, o, b));
    }
}
handler! {
    /// op mem, imm
    fn mi[T: Word, O: Bin<T>, A: Addr](cpu, op, o) {
        attempt!(cpu, op, mem_bin::<T, O, A>(cpu, o, T::from_u64(o.imm)));
    }
}
#[inline(always)]
unsafe fn mem_bin<T: Word, O: Bin<T>, A: Addr>(cpu: &mut Cpu, o: &Op, b: T) -> Exec {
    let access = if O::WRITE { Access::Write } else { Access::Read };
    // SAFETY: the caller's op was lowered for `A`.
    let lin = unsafe { A::linear(cpu, o, T::SIZE, access) }?;
    if O::WRITE {
        modify::<T, ()>(cpu, lin, |a, flags| (O::run(a, b, flags), ()))
    } else {
        let a = cpu.read::<T>(lin)?;
        O::run(a, b, &mut cpu.flags);
        Ok(())
    }
}
handler! {
    /// lock op mem, reg
    fn lock_mr[T: Word, O: Bin<T>, A: Addr](cpu, op, o) {
        let b: T = get(cpu, o.src);
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Write));
        attempt!(cpu, op, modify_locked::<T, ()>(cpu, lin, |a, flags| (O::run(a, b, flags), ())));
    }
}
handler! {
    /// lock op mem, imm
    fn lock_mi[T: Word, O: Bin<T>, A: Addr](cpu, op, o) {
        let b = T::from_u64(o.imm);
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Write));
        attempt!(cpu, op, modify_locked::<T, ()>(cpu, lin, |a, flags| (O::run(a, b, flags), ())));
    }
}
handler! {
    /// op reg
    fn un_r[T: Word, O: Un<T>](cpu, op, o) {
        let r = O::run(get(cpu, o.dst), &mut cpu.flags);
        put::<T>(cpu, o.dst, r);
    }
}
handler! {
    /// op mem
    fn un_m[T: Word, O: Un<T>, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Write));
        attempt!(cpu, op, modify::<T, ()>(cpu, lin, |a, flags| (O::run(a, flags), ())));
    }
}
handler! {
    /// lock op mem
    fn lock_un[T: Word, O: Un<T>, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Write));
        attempt!(cpu, op, modify_locked::<T, ()>(cpu, lin, |a, flags| (O::run(a, flags), ())));
    }
}
handler! {
    /// shift reg, imm
    fn shift_ri[T: Word, O: Shift<T>](cpu, op, o) {
        let r = O::run(get(cpu, o.dst), o.imm as u8, &mut cpu.flags);
        put::<T>(cpu, o.dst, r);
    }
}
handler! {
    /// shift reg, cl
    fn shift_rc[T: Word, O: Shift<T>](cpu, op, o) {
        let r = O::run(get(cpu, o.dst), cpu.regs[1] as u8, &mut cpu.flags);
        put::<T>(cpu, o.dst, r);
    }
}
handler! {
    /// shift mem, imm or cl (`aux` tells)
    fn shift_m[T: Word, O: Shift<T>, A: Addr](cpu, op, o) {
        let count = if o.aux != 0 { cpu.regs[1] as u8 } else { o.imm as u8 };
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Write));
        attempt!(cpu, op, modify::<T, ()>(cpu, lin, |a, flags| (O::run(a, count, flags), ())));
    }
}
handler! {
    /// mov reg, reg
    fn mov_rr[T: Word](cpu, op, o) { let v: T = get(cpu, o.src); put(cpu, o.dst, v); }
}
handler! {
    /// mov reg, imm
    fn mov_ri[T: Word](cpu, op, o) { put(cpu, o.dst, T::from_u64(o.imm)); }
}
handler! {
    /// mov reg, mem
    fn mov_rm[T: Word, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Read));
        let v = attempt!(cpu, op, cpu.read::<T>(lin));
        put(cpu, o.dst, v);
    }
}
handler! {
    /// mov mem, reg
    fn mov_mr[T: Word, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Write));
        let v: T = get(cpu, o.src);
        attempt!(cpu, op, cpu.write::<T>(lin, v));
    }
}
handler! {
    /// mov mem, imm
    fn mov_mi[T: Word, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, T::SIZE, Access::Write));
        attempt!(cpu, op, cpu.write::<T>(lin, T::from_u64(o.imm)));
    }
}
handler! {
    /// movzx reg, reg: `S` to `D`
    fn movzx_rr[D: Word, S: Word](cpu, op, o) {
        let v: S = get(cpu, o.src);
        put(cpu, o.dst, D::from_u64(v.to_u64()));
    }
}
handler! {
    /// movzx reg, mem
    fn movzx_rm[D: Word, S: Word, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, S::SIZE, Access::Read));
        let v = attempt!(cpu, op, cpu.read::<S>(lin));
        put(cpu, o.dst, D::from_u64(v.to_u64()));
    }
}
handler! {
    /// movsx reg, reg
    fn movsx_rr[D: Word, S: Word](cpu, op, o) {
        let v: S = get(cpu, o.src);
        put(cpu, o.dst, D::from_u64(v.sext() as u64));
    }
}
handler! {
    /// movsx reg, mem
    fn movsx_rm[D: Word, S: Word, A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, S::SIZE, Access::Read));
        let v = attempt!(cpu, op, cpu.read::<S>(lin));
        put(cpu, o.dst, D::from_u64(v.sext() as u64));
    }
}
handler! {
    /// lea, 64-bit base + displacement
    fn lea_base(cpu, op, o) {
        let v = get::<u64>(cpu, o.base).wrapping_add(o.disp);
        put(cpu, o.dst, v);
    }
}
handler! {
    /// lea, any form
    fn lea_any[T: Word](cpu, op, o) {
        let v = offset_of(cpu, o);
        put(cpu, o.dst, T::from_u64(v));
    }
}
handler! {
    /// lea, 64-bit with index
    fn lea_full(cpu, op, o) {
        let v = get::<u64>(cpu, o.base).wrapping_add(get::<u64>(cpu, o.index) << o.scale).wrapping_add(o.disp);
        put(cpu, o.dst, v);
    }
}
handler! {
    /// Nothing.
    fn nop(cpu, op, _o) {}
}

// ---- choice ----------------------------------------------------------------------------------------

macro_rules! sized {
    ($size:expr, $h:ident $(, $g:ty)*) => {
        match $size {
            1 => $h::<u8 $(, $g)*> as Handler,
            2 => $h::<u16 $(, $g)*>,
            4 => $h::<u32 $(, $g)*>,
            _ => $h::<u64 $(, $g)*>,
        }
    };
}
macro_rules! sized_wide {
    ($size:expr, $h:ident $(, $g:ty)*) => {
        match $size {
            2 => $h::<u16 $(, $g)*> as Handler,
            4 => $h::<u32 $(, $g)*>,
            _ => $h::<u64 $(, $g)*>,
        }
    };
}
macro_rules! sized_addr {
    ($size:expr, $form:expr, $h:ident $(, $g:ty)*) => {
        match $form {
            AddrForm::Base => sized!($size, $h $(, $g)*, Base),
            AddrForm::Full => sized!($size, $h $(, $g)*, Full),
            AddrForm::Seg => sized!($size, $h $(, $g)*, Seg),
        }
    };
}
macro_rules! sized_wide_addr {
    ($size:expr, $form:expr, $h:ident $(, $g:ty)*) => {
        match $form {
            AddrForm::Base => sized_wide!($size, $h $(, $g)*, Base),
            AddrForm::Full => sized_wide!($size, $h $(, $g)*, Full),
            AddrForm::Seg => sized_wide!($size, $h $(, $g)*, Seg),
        }
    };
}
macro_rules! by_addr {
    ($form:expr, $h:ident $(, $g:ty)*) => {
        match $form {
            AddrForm::Base => $h::<$($g,)* Base> as Handler,
            AddrForm::Full => $h::<$($g,)* Full>,
            AddrForm::Seg => $h::<$($g,)* Seg>,
        }
    };
}
pub(crate) use {by_addr, sized, sized_addr, sized_wide, sized_wide_addr};

/// Size in bytes of operand `n`.
pub(crate) fn operand_size(i: &Instruction, n: u32) -> u8 {
    match i.op_kind(n) {
        OpKind::Register => i.op_register(n).size() as u8,
        OpKind::Memory => i.memory_size().size() as u8,
        _ => 0,
    }
}

/// Operand kinds of a two-operand instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kinds {
    RegReg,
    RegMem,
    RegImm,
    MemReg,
    MemImm,
    Other,
}

fn is_reg(i: &Instruction, n: u32) -> bool {
    i.op_kind(n) == OpKind::Register && i.op_register(n).is_gpr()
}
fn is_imm(i: &Instruction, n: u32) -> bool {
    matches!(
        i.op_kind(n),
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}
/// The kinds of the first two operands.
pub(crate) fn kinds(i: &Instruction) -> Kinds {
    let mem = |n| i.op_kind(n) == OpKind::Memory;
    if i.op_count() < 2 {
        Kinds::Other
    } else if is_reg(i, 0) && is_reg(i, 1) {
        Kinds::RegReg
    } else if is_reg(i, 0) && mem(1) {
        Kinds::RegMem
    } else if is_reg(i, 0) && is_imm(i, 1) {
        Kinds::RegImm
    } else if mem(0) && is_reg(i, 1) {
        Kinds::MemReg
    } else if mem(0) && is_imm(i, 1) {
        Kinds::MemImm
    } else {
        Kinds::Other
    }
}

/// Fills the register and immediate fields from the operands.
fn lower_operands(i: &Instruction, op: &mut Op) {
    if i.op_count() > 0 && i.op_kind(0) == OpKind::Register {
        op.dst = reg_offset(i.op_register(0));
    }
    if i.op_count() > 1 {
        if i.op_kind(1) == OpKind::Register {
            op.src = reg_offset(i.op_register(1));
        } else if is_imm(i, 1) {
            op.imm = i.immediate(1);
        }
    }
}

fn lower_bin<O>(i: &Instruction, form: AddrForm) -> Option<Handler>
where
    O: Bin<u8> + Bin<u16> + Bin<u32> + Bin<u64>,
{
    let size = operand_size(i, 0);
    Some(match kinds(i) {
        Kinds::RegReg => sized!(size, rr, O),
        Kinds::RegImm => sized!(size, ri, O),
        Kinds::RegMem => sized_addr!(size, form, rm, O),
        Kinds::MemReg if i.has_lock_prefix() => sized_addr!(size, form, lock_mr, O),
        Kinds::MemImm if i.has_lock_prefix() => sized_addr!(size, form, lock_mi, O),
        Kinds::MemReg => sized_addr!(size, form, mr, O),
        Kinds::MemImm => sized_addr!(size, form, mi, O),
        Kinds::Other => return None,
    })
}

fn lower_un<O>(i: &Instruction, form: AddrForm) -> Option<Handler>
where
    O: Un<u8> + Un<u16> + Un<u32> + Un<u64>,
{
    let size = operand_size(i, 0);
    Some(if i.op_kind(0) == OpKind::Memory {
        if i.has_lock_prefix() {
            sized_addr!(size, form, lock_un, O)
        } else {
            sized_addr!(size, form, un_m, O)
        }
    } else {
        sized!(size, un_r, O)
    })
}

fn lower_shift<O>(i: &Instruction, op: &mut Op, form: AddrForm) -> Option<Handler>
where
    O: Shift<u8> + Shift<u16> + Shift<u32> + Shift<u64>,
{
    let size = operand_size(i, 0);
    let by_cl = i.op_kind(1) == OpKind::Register;
    op.aux = by_cl as u8;
    Some(match (i.op_kind(0) == OpKind::Memory, by_cl) {
        (true, _) => sized_addr!(size, form, shift_m, O),
        (false, true) => sized!(size, shift_rc, O),
        (false, false) => sized!(size, shift_ri, O),
    })
}

fn lower_mov(i: &Instruction, form: AddrForm) -> Option<Handler> {
    let size = operand_size(i, 0);
    Some(match kinds(i) {
        Kinds::RegReg => sized!(size, mov_rr),
        Kinds::RegImm => sized!(size, mov_ri),
        Kinds::RegMem => sized_addr!(size, form, mov_rm),
        Kinds::MemReg => sized_addr!(size, form, mov_mr),
        Kinds::MemImm => sized_addr!(size, form, mov_mi),
        Kinds::Other => return None,
    })
}

macro_rules! extend {
    ($i:expr, $form:expr, $rr:ident, $rm:ident) => {{
        let (d, s) = (operand_size($i, 0), operand_size($i, 1));
        let mem = $i.op_kind(1) == OpKind::Memory;
        macro_rules! pick {
            ($d:ty, $s:ty) => {
                if mem { by_addr!($form, $rm, $d, $s) } else { $rr::<$d, $s> as Handler }
            };
        }
        match (d, s) {
            (2, 1) => pick!(u16, u8),
            (4, 1) => pick!(u32, u8),
            (8, 1) => pick!(u64, u8),
            (2, 2) => pick!(u16, u16),
            (4, 2) => pick!(u32, u16),
            (8, 2) => pick!(u64, u16),
            (4, 4) => pick!(u32, u32),
            (8, 4) => pick!(u64, u32),
            _ => return None,
        }
    }};
}

/// Picks the handler for an instruction and fills the op. `None`: not done here.
pub fn lower(i: &Instruction, bits64: bool, op: &mut Op) -> Option<Flow> {
    use Mnemonic as M;
    lower_operands(i, op);
    let form = if has_memory(i) { lower_memory(i, bits64, op) } else { AddrForm::Base };
    let run: Option<Handler> = match i.mnemonic() {
        M::Add => lower_bin::<alu::Add>(i, form),
        M::Or => lower_bin::<alu::Or>(i, form),
        M::Adc => lower_bin::<alu::Adc>(i, form),
        M::Sbb => lower_bin::<alu::Sbb>(i, form),
        M::And => lower_bin::<alu::And>(i, form),
        M::Sub => lower_bin::<alu::Sub>(i, form),
        M::Xor => lower_bin::<alu::Xor>(i, form),
        M::Cmp => lower_bin::<alu::Cmp>(i, form),
        M::Test => lower_bin::<alu::Test>(i, form),
        M::Inc => lower_un::<alu::Inc>(i, form),
        M::Dec => lower_un::<alu::Dec>(i, form),
        M::Neg => lower_un::<alu::Neg>(i, form),
        M::Not => lower_un::<alu::Not>(i, form),
        M::Shl | M::Sal => lower_shift::<alu::Shl>(i, op, form),
        M::Shr => lower_shift::<alu::Shr>(i, op, form),
        M::Sar => lower_shift::<alu::Sar>(i, op, form),
        M::Rol => lower_shift::<alu::Rol>(i, op, form),
        M::Ror => lower_shift::<alu::Ror>(i, op, form),
        M::Rcl => lower_shift::<alu::Rcl>(i, op, form),
        M::Rcr => lower_shift::<alu::Rcr>(i, op, form),
        M::Mov => lower_mov(i, form),
        M::Movzx => Some(extend!(i, form, movzx_rr, movzx_rm)),
        M::Movsx | M::Movsxd => Some(extend!(i, form, movsx_rr, movsx_rm)),
        M::Lea => Some(match (operand_size(i, 0), form) {
            (8, AddrForm::Base) => lea_base,
            (8, AddrForm::Full) => lea_full,
            (size, _) => sized_wide!(size, lea_any),
        }),
        M::Nop | M::Endbr64 | M::Endbr32 | M::Reservednop | M::Rdsspd | M::Rdsspq | M::Cldemote => Some(nop),
        _ => None,
    };
    if let Some(run) = run {
        op.run = run;
        return Some(Flow::Next);
    }
    misc::lower(i, bits64, op, form)
        .or_else(|| branch::lower(i, bits64, op, form))
        .or_else(|| string::lower(i, bits64, op))
}
