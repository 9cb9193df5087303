//! Instructions executed by the host's own units.
//!
//! Decode asks [`install`] for everything that has no handler of its own: SSE to SSE4.2,
//! AES, PCLMUL, SHA, GFNI, AVX, AVX2, FMA, F16C, x87, MMX, BMI and the rarer integer forms. For
//! most of them [`install`] makes a *thunk*: a small machine-code function that loads the guest
//! registers the instruction reads, executes the very instruction, and stores what it
//! wrote. Thunks are kept per form (instruction, registers, immediate; the address of a
//! memory operand is a parameter) in a bounded cache. What the host can't do on the
//! guest's behalf (masked accesses, save areas, x87 environment, BCD adjustments) is
//! done in Rust.
//!
//! Not supported: AVX-512, AMX, XOP, 3DNow!, SSE4A, MPX, and CR0.NE = 0 reporting of x87 errors
//! through FERR# (they are always reported as #MF).

mod bcd;
mod class;
mod compile;
mod features;
mod masked;
mod simple;
#[cfg(test)]
mod tests;
mod x87;
mod xsave;

use std::collections::HashMap;
use std::io;

use engine::FpuState;
use iced_x86::{Code, Instruction, OpAccess, OpKind};
use x86_spec::reg::{cr0, cr4};
use x86_spec::{exception, reg::xcr0};

use crate::arena::Arena;
use crate::block::Block;
use crate::cpu::{Access, Cpu, Exec};
use crate::op::{Handler, Op, SimpleFn, simple_next};
use crate::operand::{has_memory, memory_segment, segment_index, size_mask};
use crate::ops::op_linear;
use crate::{attempt, next};

use class::{AVX, Class, FP, MMX, SSE, VEX, X87, as_decoded_by_host, classify};
use compile::{Compiler, normalised};
pub use features::supported_features;

/// A thunk: guest registers, vector and x87 state, the memory operand, status flags
/// ([`Cpu::flags`]).
type Thunk = unsafe extern "sysv64" fn(*mut u64, *mut FpuState, *mut u8, *mut u16);

/// Bytes of thunks: one is 50 to 150 bytes and a booted Linux uses a few thousand forms.
const ARENA_SIZE: usize = 2 << 20;

/// What [`install`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Installed {
    /// The op is ready; other instructions may follow it in the block.
    Yes,
    /// Neither thunk nor Rust code for this instruction: it is not offered.
    No,
    /// The cache is full: drop all blocks, call [`ThunkCache::clear`], decode again.
    Full,
}

/// What tells thunks apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Form {
    code: Code,
    registers: [u8; 5],
    immediate: u64,
    memory: bool,
    lock: bool,
}

impl Form {
    fn of(i: &Instruction) -> Self {
        let mut f = Self {
            code: i.code(),
            registers: [0; 5],
            immediate: 0,
            memory: has_memory(i),
            lock: i.has_lock_prefix(),
        };
        for n in 0..i.op_count() {
            match i.op_kind(n) {
                OpKind::Register => f.registers[n as usize % 5] = i.op_register(n) as u8,
                OpKind::Memory => {}
                _ => f.immediate = i.try_immediate(n).unwrap_or(0),
            }
        }
        f
    }
}

/// All thunks of one vCPU.
#[derive(Debug)]
pub struct ThunkCache {
    arena: Arena,
    forms: HashMap<Form, usize>,
    compiler: Compiler,
    generation: u64,
}

impl ThunkCache {
    /// An empty cache.
    ///
    /// # Errors
    /// When the host refuses executable memory.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            arena: Arena::new(c"nestvmm-thunks", ARENA_SIZE)?,
            forms: HashMap::new(),
            compiler: Compiler::new(),
            generation: 0,
        })
    }

    /// Drops all thunks. Blocks that were decoded before must not run any more.
    pub fn clear(&mut self) {
        self.forms.clear();
        self.arena.clear();
        self.generation += 1;
    }

    /// How often the cache was cleared.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Number of thunks.
    pub fn len(&self) -> usize {
        self.forms.len()
    }

    /// Whether there is no thunk.
    pub fn is_empty(&self) -> bool {
        self.forms.is_empty()
    }

    /// Entry point of the thunk for `i`; `Ok(None)` when the arena is full.
    fn get(&mut self, i: &Instruction, class: Class) -> Result<Option<usize>, iced_x86::IcedError> {
        let form = Form::of(i);
        if let Some(entry) = self.forms.get(&form) {
            return Ok(Some(*entry));
        }
        let code = self.compiler.compile(i, class.uses())?;
        let Some(entry) = self.arena.push(&code) else { return Ok(None) };
        self.forms.insert(form, entry);
        Ok(Some(entry))
    }
}

/// Prepares `op` to execute `i`: sets `run`, `data`, `imm` and `aux`. The fields that
/// describe a memory operand (`base`, `index`, `scale`, `segment`, `disp`, `address_size`) and `insn`,
/// `len`, `offset` and `number` are the caller's. Never ends a block.
pub fn install(cpu: &mut Cpu, i: &Instruction, op: &mut Op) -> Installed {
    if let Some(f) = rust_function(i) {
        op.run = simple_next;
        op.data = f as usize;
        return Installed::Yes;
    }
    if is_hint(i.code()) {
        op.run = nop;
        return Installed::Yes;
    }
    let i = &as_decoded_by_host(i);
    let Some(class) = classify(i) else { return Installed::No };
    let i = &normalised(i);
    match cpu.thunks.get(i, class) {
        Ok(Some(entry)) => op.data = entry,
        Ok(None) => return Installed::Full,
        Err(error) => {
            tracing::warn!(%error, code = ?i.code(), "no thunk");
            return Installed::No;
        }
    }
    let memory = has_memory(i);
    op.aux = i.memory_size().size() as u8;
    op.imm = u64::from(class.alignment) | if memory { memory_access(i) } else { 0 };
    if memory && is_bit_string(i) {
        op.run = bit_string;
        return Installed::Yes;
    }
    op.run = match (class.kind, memory) {
        (0, false) => registers::<0>,
        (0, true) => with_memory::<0>,
        (VEX, false) => registers::<VEX>,
        (VEX, true) => with_memory::<VEX>,
        (SSE, false) => registers::<SSE>,
        (SSE, true) => with_memory::<SSE>,
        (AVX, false) => registers::<AVX>,
        (AVX, true) => with_memory::<AVX>,
        (MMX, false) => registers::<MMX>,
        (MMX, true) => with_memory::<MMX>,
        (X87, false) => registers::<X87>,
        (X87, true) => with_memory::<X87>,
        (SSE_FP, false) => registers::<SSE_FP>,
        (SSE_FP, true) => with_memory::<SSE_FP>,
        (AVX_FP, false) => registers::<AVX_FP>,
        (AVX_FP, true) => with_memory::<AVX_FP>,
        (SSE_MMX, false) => registers::<SSE_MMX>,
        (SSE_MMX, true) => with_memory::<SSE_MMX>,
        (SSE_MMX_FP, false) => registers::<SSE_MMX_FP>,
        (SSE_MMX_FP, true) => with_memory::<SSE_MMX_FP>,
        _ => return Installed::No,
    };
    Installed::Yes
}

const SSE_FP: u8 = SSE | FP;
const AVX_FP: u8 = AVX | FP;
const SSE_MMX: u8 = SSE | MMX;
const SSE_MMX_FP: u8 = SSE | MMX | FP;

// Layout of `Op::imm` for thunks.
/// The address must have none of these bits.
const ALIGNMENT: u64 = 0xff;
/// The memory operand is read.
const READ: u64 = 1 << 8;
/// The memory operand is written.
const WRITE: u64 = 1 << 9;

fn memory_access(i: &Instruction) -> u64 {
    let mut info = iced_x86::InstructionInfoFactory::new();
    let info = info.info_options(i, iced_x86::InstructionInfoOptions::NO_REGISTER_USAGE);
    let n = (0..i.op_count()).find(|n| i.op_kind(*n) == OpKind::Memory).unwrap_or(0);
    match info.op_access(n) {
        OpAccess::Write | OpAccess::CondWrite => WRITE,
        OpAccess::ReadWrite | OpAccess::ReadCondWrite => READ | WRITE,
        _ => READ,
    }
}

/// BT and its kin with a register bit offset reach beyond the operand's address.
fn is_bit_string(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc) && i.op_kind(1) == OpKind::Register
}

/// Prefetches and the reserved multi-byte NOPs: no effect, no fault.
fn is_hint(code: Code) -> bool {
    matches!(
        code,
        Code::Prefetch_m8
            | Code::Prefetchw_m8
            | Code::Prefetchwt1_m8
            | Code::Prefetchnta_m8
            | Code::Prefetcht0_m8
            | Code::Prefetcht1_m8
            | Code::Prefetcht2_m8
            | Code::Prefetchreserved3_m8
            | Code::Prefetchreserved4_m8
            | Code::Prefetchreserved5_m8
            | Code::Prefetchreserved6_m8
            | Code::Prefetchreserved7_m8
            | Code::Prefetchit0_m8
            | Code::Prefetchit1_m8
            | Code::Cldemote_m8
            | Code::Nop_rm16
            | Code::Nop_rm32
            | Code::Nop_rm64
            | Code::Nopw
            | Code::Nopd
            | Code::Nopq
            | Code::Endbr32
            | Code::Endbr64
    ) || (Code::Reservednop_rm16_r16_0F0D..=Code::Reservednop_rm64_r64_0F0D).contains(&code)
        || (Code::Reservednop_rm16_r16_0F18..=Code::Reservednop_rm64_r64_0F1F).contains(&code)
}

/// Instructions that Rust code executes.
fn rust_function(i: &Instruction) -> Option<SimpleFn> {
    let f = simple::function(i)
        .or_else(|| x87::function(i))
        .or_else(|| xsave::function(i))
        .or_else(|| masked::function(i))
        .or_else(|| bcd::function(i))?;
    class::offered(i.code()).then_some(f)
}

// ---- handlers ------------------------------------------------------------------------

/// Handler of instructions without effect.
///
/// # Safety
/// As [`Handler`].
unsafe extern "sysv64-unwind" fn nop(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's contract: there is a next op.
    unsafe { next!(cpu, op) }
}

/// Handler of thunks without memory operand.
///
/// # Safety
/// As [`Handler`]; `data` is the entry point of a live thunk of kind `K`.
unsafe extern "sysv64-unwind" fn registers<const K: u8>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's contract; the thunk does not use its memory argument.
    unsafe {
        attempt!(cpu, op, check::<K>(cpu));
        if K & FP != 0 && cpu.simd_unmasked() {
            attempt!(cpu, op, unmasked::<K>(cpu, &*op, std::ptr::null_mut()));
        } else {
            call::<K>(cpu, &*op, std::ptr::null_mut(), 0);
        }
        next!(cpu, op)
    }
}

/// Handler of thunks with a memory operand.
///
/// # Safety
/// As [`registers`]; `aux` is the operand's size and `imm` its access.
unsafe extern "sysv64-unwind" fn with_memory<const K: u8>(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's contract; the pointer is valid for the operand's size.
    unsafe {
        let o = &*op;
        attempt!(cpu, op, check::<K>(cpu));
        let access = if o.imm & WRITE != 0 { Access::Write } else { Access::Read };
        let linear = attempt!(cpu, op, op_linear(cpu, o, o.aux as u32, access));
        if K & X87 != 0
            && o.imm & WRITE != 0
            && x87::store_may_be_kept(&cpu.fpu)
            && kept_store(cpu, o, linear)
        {
            next!(cpu, op);
        }
        attempt!(cpu, op, transfer::<K>(cpu, o, linear, access));
        next!(cpu, op)
    }
}

/// Handler of BT, BTS, BTR and BTC with a register bit offset into memory.
///
/// # Safety
/// As [`with_memory`].
unsafe extern "sysv64-unwind" fn bit_string(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's contract. The thunk adds `offset` to the pointer it is given.
    unsafe {
        let o = &*op;
        let i = &*o.insn;
        cpu.ip = cpu.rip().wrapping_add(o.offset as u64) & cpu.ip_mask();
        let offset = bit_string_offset(cpu.reg(i.op_register(1)), o.aux);
        let access = if o.imm & WRITE != 0 { Access::Write } else { Access::Read };
        let mask = size_mask(cpu.address_size(i));
        let ea = cpu.effective_address(i).wrapping_add(offset) & mask;
        let segment = segment_index(memory_segment(i));
        let linear = attempt!(cpu, op, cpu.segment_linear(segment, ea, o.aux as u32, access));
        match attempt!(cpu, op, cpu.direct(linear, o.aux as u32, access)) {
            Some(p) => call::<0>(cpu, o, p.wrapping_sub(offset as usize), linear),
            None => attempt!(cpu, op, bounce::<0>(cpu, o, linear, offset)),
        }
        next!(cpu, op)
    }
}

/// Distance in bytes from the operand's address to the word of `size` bytes that holds bit
/// `bit` (SDM Vol. 2A, BT).
fn bit_string_offset(bit: u64, size: u8) -> u64 {
    let (bit, log) = match size {
        2 => (bit as i16 as i64, 4),
        4 => (bit as i32 as i64, 5),
        _ => (bit as i64, 6),
    };
    ((bit >> log) * size as i64) as u64
}

/// An x87 store that raises an unmasked invalid, overflow or underflow exception neither
/// writes nor touches its operand (SDM Vol. 1 §8.5); says whether this is one, which is
/// then done.
///
/// # Safety
/// As [`with_memory`].
#[cold]
#[inline(never)]
unsafe fn kept_store(cpu: &mut Cpu, op: &Op, linear: u64) -> bool {
    let mut scratch = Buffer([0; 64]);
    let before = Snapshot::take(cpu);
    // SAFETY: the buffer is larger than any x87 operand of a thunk.
    unsafe { call::<X87>(cpu, op, scratch.0.as_mut_ptr(), linear) };
    let kept = x87::store_kept(&cpu.fpu);
    if !kept {
        before.restore(cpu);
    }
    kept
}

/// A copy of a memory operand.
#[repr(align(64))]
struct Buffer([u8; 64]);

/// Executes the thunk on the memory operand at `linear`.
///
/// # Safety
/// As [`with_memory`].
#[inline(always)]
unsafe fn transfer<const K: u8>(cpu: &mut Cpu, op: &Op, linear: u64, access: Access) -> Exec {
    if linear & op.imm & ALIGNMENT != 0 {
        return Err(cpu.gp(0));
    }
    // SAFETY: `direct` gives a pointer valid for the operand's size and access.
    unsafe {
        let simple = K & FP == 0 || !cpu.simd_unmasked();
        match if simple { cpu.direct(linear, op.aux as u32, access)? } else { None } {
            Some(p) => call::<K>(cpu, op, p, linear),
            None => return bounce::<K>(cpu, op, linear, 0),
        }
    }
    Ok(())
}

/// Executes the thunk on a copy of its memory operand: for operands that are not RAM within
/// one page, and where the operand must stay unchanged if the instruction faults.
/// Locked instructions are not atomic then.
///
/// # Safety
/// As [`with_memory`]; the thunk adds `offset` to the pointer it is given.
#[cold]
#[inline(never)]
unsafe fn bounce<const K: u8>(cpu: &mut Cpu, op: &Op, linear: u64, offset: u64) -> Exec {
    let mut buffer = Buffer([0; 64]);
    let (read, write) = (op.imm & READ != 0, op.imm & WRITE != 0);
    let Some(bytes) = buffer.0.get_mut(..op.aux as usize) else { return Err(cpu.ud()) };
    // A masked x87 store may leave its operand alone.
    if write && (read || K & X87 != 0) {
        cpu.probe(linear, op.aux as u32, Access::Write)?;
    }
    if read || K & X87 != 0 {
        cpu.read_bytes(linear, bytes)?;
    }
    let p = bytes.as_mut_ptr().wrapping_sub(offset as usize);
    let before = write.then(|| Snapshot::take(cpu));
    // SAFETY: the buffer holds the operand.
    unsafe {
        if K & FP != 0 && cpu.simd_unmasked() {
            unmasked::<K>(cpu, op, p)?;
        } else {
            call::<K>(cpu, op, p, linear);
        }
    }
    if let Some(before) = before {
        let written = cpu.write_bytes(linear, bytes);
        if written.is_err() {
            before.restore(cpu);
        }
        written?;
    }
    Ok(())
}

/// State that a thunk may change.
struct Snapshot {
    regs: [u64; 20],
    flags: u16,
    fpu: FpuState,
}

impl Snapshot {
    fn take(cpu: &Cpu) -> Self {
        Self { regs: cpu.regs, flags: cpu.flags, fpu: (*cpu.fpu).clone() }
    }
    fn restore(&self, cpu: &mut Cpu) {
        cpu.regs = self.regs;
        cpu.flags = self.flags;
        (*cpu.fpu).clone_from(&self.fpu);
    }
}

/// MXCSR fields (SDM Vol. 1 §10.2.3).
mod mxcsr {
    /// Exceptions found before computing: invalid, denormal, divide by zero.
    pub const PRE: u32 = 0b111;
    /// Underflow.
    pub const UE: u32 = 1 << 4;
    /// Overflow.
    pub const OE: u32 = 1 << 3;
    /// Inexact.
    pub const PE: u32 = 1 << 5;
    /// All exception flags.
    pub const FLAGS: u32 = 0x3f;
    /// All exception masks.
    pub const MASKS: u32 = 0x1f80;
    /// The underflow mask.
    pub const UM: u32 = 1 << 11;
    /// Flush to zero.
    pub const FZ: u32 = 1 << 15;
}

/// Executes the thunk where the guest has unmasked SIMD floating-point exceptions: #XM, or #UD
/// without CR4.OSXMMEXCPT, leaves the destination unchanged (SDM Vol. 1 §11.5.3).
///
/// # Safety
/// As [`call`]; `memory` is not the guest's.
#[cold]
#[inline(never)]
unsafe fn unmasked<const K: u8>(cpu: &mut Cpu, op: &Op, memory: *mut u8) -> Exec {
    let before = Snapshot::take(cpu);
    let guest = cpu.fpu.mxcsr;
    let enabled = !(guest >> 7) & mxcsr::FLAGS;
    let mut raised = 0;
    let mut control = guest & !mxcsr::FLAGS | mxcsr::MASKS;
    if guest & mxcsr::UM == 0 {
        // An unmasked underflow is raised for any tiny result, a masked one only for an
        // inexact one. Flushing to zero makes the host report all tiny results; the guest's own
        // flushing does not take place (SDM Vol. 1 §4.9.1.5, §10.2.3.3).
        cpu.fpu.mxcsr = control | mxcsr::FZ;
        // SAFETY: the caller's contract.
        unsafe { call::<K>(cpu, op, memory, 0) };
        raised |= cpu.fpu.mxcsr & mxcsr::UE;
        before.restore(cpu);
        control &= !mxcsr::FZ;
    }
    cpu.fpu.mxcsr = control;
    // SAFETY: the caller's contract.
    unsafe { call::<K>(cpu, op, memory, 0) };
    raised |= cpu.fpu.mxcsr & mxcsr::FLAGS;
    // SAFETY: the caller's contract; decode keeps the instruction as long as its op.
    if guest & mxcsr::UM == 0 && unsafe { tiny_halves(cpu, &*op.insn, memory) } {
        raised |= mxcsr::UE;
    }
    if raised & enabled == 0 {
        cpu.fpu.mxcsr = guest | raised;
        return Ok(());
    }
    before.restore(cpu);
    let stopped = raised & enabled;
    cpu.fpu.mxcsr = guest
        | if stopped & mxcsr::PRE != 0 {
            raised & mxcsr::PRE
        } else if stopped & (mxcsr::OE | mxcsr::UE) != 0 {
            // An element stopped by these isn't rounded. That another one was inexact is
            // lost here.
            raised & !mxcsr::PE
        } else {
            raised
        };
    let vector = if cpu.cr4 & cr4::OSXMMEXCPT != 0 { exception::XM } else { exception::UD };
    Err(cpu.fault(vector))
}

/// Whether VCVTPS2PH, which doesn't flush to zero, gave a tiny result.
///
/// # Safety
/// `memory` is the memory operand of `i`, if it has one.
unsafe fn tiny_halves(cpu: &Cpu, i: &Instruction, memory: *const u8) -> bool {
    let halves = match i.code() {
        Code::VEX_Vcvtps2ph_xmmm64_xmm_imm8 => 4,
        Code::VEX_Vcvtps2ph_xmmm128_ymm_imm8 => 8,
        _ => return false,
    };
    let lanes = if i.op0_kind() == OpKind::Register {
        cpu.fpu.vectors[i.op0_register().number() & 15].map(u64::to_le_bytes)
    } else {
        let mut lanes = [[0; 8]; 4];
        for (n, lane) in lanes.iter_mut().take(halves / 4).enumerate() {
            // SAFETY: the operand is `2 * halves` bytes long.
            *lane = unsafe { memory.add(8 * n).cast::<[u8; 8]>().read() };
        }
        lanes
    };
    lanes.as_flattened().as_chunks::<2>().0.iter().take(halves).any(|h| {
        let h = u16::from_le_bytes(*h);
        h & 0x7c00 == 0 && h & 0x3ff != 0
    })
}

/// Calls the thunk and does what surrounds it for MMX and x87.
///
/// # Safety
/// `op.data` is the entry point of a live thunk of kind `K`, and `memory` is valid for its
/// operand.
#[inline(always)]
unsafe fn call<const K: u8>(cpu: &mut Cpu, op: &Op, memory: *mut u8, linear: u64) {
    if K & MMX != 0 {
        x87::enter_mmx(&mut cpu.fpu);
    }
    let before = (K & X87 != 0).then(|| x87::pointers(&mut cpu.fpu));
    // SAFETY: the caller's contract; the thunk touches only the state it is given.
    unsafe {
        let thunk: Thunk = std::mem::transmute(op.data);
        thunk(cpu.regs.as_mut_ptr(), &mut *cpu.fpu, memory, &mut cpu.flags);
    }
    if let Some(before) = before {
        x87::set_pointers(cpu, op, before, linear);
    }
}

/// The checks before an instruction of kind `K`.
#[inline(always)]
fn check<const K: u8>(cpu: &mut Cpu) -> Exec {
    if K & SSE != 0 {
        cpu.check_sse()?;
    }
    if K & AVX != 0 {
        cpu.check_avx()?;
    }
    if K & VEX != 0 && cpu.real_or_v86() {
        return Err(cpu.ud());
    }
    if K & MMX != 0 {
        cpu.check_mmx()?;
    }
    if K & X87 != 0 {
        cpu.check_x87(true)?;
    }
    Ok(())
}

impl Cpu {
    /// Legacy SSE (SDM Vol. 2A §2.4, exception classes 1 to 5).
    #[inline(always)]
    fn check_sse(&mut self) -> Exec {
        if self.cr0 & (cr0::EM | cr0::TS) != 0 || self.cr4 & cr4::OSFXSR == 0 {
            return Err(self.no_sse());
        }
        Ok(())
    }
    #[cold]
    fn no_sse(&mut self) -> crate::cpu::Stop {
        if self.cr0 & cr0::EM != 0 || self.cr4 & cr4::OSFXSR == 0 {
            self.ud()
        } else {
            self.fault(exception::NM)
        }
    }
    /// VEX-encoded vector instructions (SDM Vol. 2A §2.4).
    #[inline(always)]
    fn check_avx(&mut self) -> Exec {
        const NEEDED: u64 = xcr0::SSE | xcr0::AVX;
        if self.real_or_v86() || self.cr4 & cr4::OSXSAVE == 0 || self.xcr0 & NEEDED != NEEDED {
            return Err(self.ud());
        }
        if self.cr0 & cr0::TS != 0 {
            return Err(self.fault(exception::NM));
        }
        Ok(())
    }
    /// MMX (SDM Vol. 3A §13.1).
    #[inline(always)]
    fn check_mmx(&mut self) -> Exec {
        if self.cr0 & cr0::EM != 0 {
            return Err(self.ud());
        }
        self.check_x87(true)
    }
    /// x87 (SDM Vol. 3A §2.5, CR0.EM, CR0.TS); `wait`: pending exceptions are reported first.
    #[inline(always)]
    fn check_x87(&mut self, wait: bool) -> Exec {
        if self.cr0 & (cr0::EM | cr0::TS) != 0 {
            return Err(self.fault(exception::NM));
        }
        if wait && self.fpu.x87.0[2] & x87::ES != 0 {
            return Err(self.fault(exception::MF));
        }
        Ok(())
    }
    /// Whether some SIMD floating-point exception is unmasked.
    #[inline(always)]
    fn simd_unmasked(&self) -> bool {
        self.fpu.mxcsr & mxcsr::MASKS != mxcsr::MASKS
    }
}

/// Keeps the handler type in the signature of what [`install`] assigns.
const _: Handler = registers::<0>;

#[cfg(test)]
fn host_can_avx() -> bool {
    class::avx_offered()
}
