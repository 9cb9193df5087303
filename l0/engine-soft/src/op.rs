//! Decoded instructions as the interpreter runs them.
//!
//! A block is an array of [`Op`]s. Each op's handler does its work and then calls the next
//! op's handler in tail position, so that a release build runs threaded code; the last op
//! of a block returns to the run loop. Should the compiler not turn a call into a jump, the
//! stack grows by at most one frame per op of a block.

use iced_x86::Instruction;

use crate::block::Block;
use crate::cpu::{Cpu, Exec, Reason, SLOT_ZERO};
use x86_spec::exception;

/// A handler. Returns the block to run next, or null to let the run loop look: after a
/// stop ([`Cpu::reason`] tells) or where the next block isn't known.
///
/// # Safety
/// `op` points into the op array of `cpu.block`, and a handler that goes on to the next op is
/// never the last one of its array.
pub type Handler = unsafe extern "sysv64-unwind" fn(&mut Cpu, *const Op) -> *const Block;

/// An instruction executed out of line. [`Cpu::ip`] is its address. In a handler
/// installed as block end ([`SimpleKind::End`]), [`Cpu::rip`] is already the next instruction's
/// address and may be changed; on `Err` it goes back to the instruction itself.
pub type SimpleFn = fn(&mut Cpu, &Instruction) -> Exec;

/// Whether an out-of-line instruction may be followed by others in its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimpleKind {
    /// It changes neither RIP, nor mode, nor translations, nor event masks.
    Next,
    /// It may change any of those.
    End,
}

/// One decoded instruction.
///
/// Register fields are byte offsets into [`Cpu::regs`] (so AH is RAX's offset + 1).
#[repr(C)]
pub struct Op {
    /// What executes it.
    pub run: Handler,
    /// Displacement of the memory operand; relative to the block's start if RIP-relative.
    pub disp: u64,
    /// Immediate operand, sign-extended; branch target relative to the block's start; or
    /// what the handler needs.
    pub imm: u64,
    /// The iced instruction; its IP is the offset from the block's start.
    pub insn: *const Instruction,
    /// Second word for the handler (a function, a thunk).
    pub data: usize,
    /// Destination register.
    pub dst: u8,
    /// Source register.
    pub src: u8,
    /// Base register of the memory operand (the zero slot if none).
    pub base: u8,
    /// Index register (the zero slot if none).
    pub index: u8,
    /// Scale as a shift count.
    pub scale: u8,
    /// 64-bit mode: slot of the segment base (zero, FS or GS). Else: segment index.
    pub segment: u8,
    /// Instruction length in bytes.
    pub len: u8,
    /// Position in the block.
    pub number: u8,
    /// Offset of the instruction from the block's start.
    pub offset: u16,
    /// Address-size mask selector: 8, 4 or 2 bytes.
    pub address_size: u8,
    /// Free for the handler.
    pub aux: u8,
    /// The memory operand is in the stack segment, or the instruction uses the stack: a
    /// non-canonical address is #SS, not #GP.
    pub stack: bool,
}

/// An op without operands.
pub(crate) fn blank() -> Op {
    const NONE: u8 = SLOT_ZERO as u8 * 8;
    Op {
        run: simple_end,
        disp: 0,
        imm: 0,
        insn: std::ptr::null(),
        data: 0,
        dst: NONE,
        src: NONE,
        base: NONE,
        index: NONE,
        scale: 0,
        segment: NONE,
        len: 0,
        number: 0,
        offset: 0,
        address_size: 8,
        aux: 0,
        stack: false,
    }
}

/// Goes on to the next op.
#[macro_export]
macro_rules! next {
    ($cpu:expr, $op:expr) => {{
        let n = $op.add(1);
        return ((*n).run)($cpu, n);
    }};
}

/// Unwraps an `Exec` in a handler, leaving the block on a stop.
#[macro_export]
macro_rules! attempt {
    ($cpu:expr, $op:expr, $e:expr) => {
        match $e {
            Ok(v) => v,
            Err(_) => return $crate::op::stopped($cpu, $op),
        }
    };
}

/// Leaves a block in the middle: RIP becomes the stopped instruction's address, and the
/// instructions not executed are taken back from the count.
///
/// # Safety
/// As [`Handler`].
#[cold]
#[inline(never)]
pub unsafe fn stopped(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's contract.
    let (op, block) = unsafe { (&*op, &*cpu.block) };
    cpu.icount = cpu.icount.wrapping_sub(block.instructions() as u64 - op.number as u64);
    let ip = cpu.rip().wrapping_add(op.offset as u64) & cpu.ip_mask();
    cpu.set_rip(ip);
    cpu.ip = ip;
    if cpu.mmu.noncanonical {
        cpu.noncanonical_fault(op.stack);
    }
    std::ptr::null()
}

/// Handler of an out-of-line instruction in the middle of a block; `data` is the function.
///
/// # Safety
/// As [`Handler`]; `data` holds a [`SimpleFn`] and `insn` points to the block's instruction.
pub unsafe extern "sysv64-unwind" fn simple_next(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: decode installs this handler only together with a `SimpleFn` in `data`.
    unsafe {
        let o = &*op;
        cpu.ip = cpu.rip().wrapping_add(o.offset as u64) & cpu.ip_mask();
        let f: SimpleFn = std::mem::transmute(o.data);
        attempt!(cpu, op, f(cpu, &*o.insn));
        next!(cpu, op)
    }
}

/// Handler of an out-of-line instruction that ends its block.
///
/// # Safety
/// As [`simple_next`].
pub unsafe extern "sysv64-unwind" fn simple_end(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: as in `simple_next`.
    unsafe {
        let o = &*op;
        let start = cpu.rip();
        cpu.ip = start.wrapping_add(o.offset as u64) & cpu.ip_mask();
        cpu.set_rip(start.wrapping_add(o.offset as u64 + o.len as u64) & cpu.ip_mask());
        let f: SimpleFn = std::mem::transmute(o.data);
        if f(cpu, &*o.insn).is_err() {
            // Count this instruction as not executed; RIP back to it.
            cpu.icount = cpu.icount.wrapping_sub(1);
            cpu.set_rip(cpu.ip);
            if cpu.mmu.noncanonical {
                cpu.noncanonical_fault(o.stack);
            }
        }
    }
    std::ptr::null()
}

impl Cpu {
    /// Turns the #GP(0) of a non-canonical address into #SS(0) for stack accesses (SDM Vol. 1
    /// §3.3.7.1).
    #[cold]
    pub(crate) fn noncanonical_fault(&mut self, stack: bool) {
        self.mmu.noncanonical = false;
        if stack
            && let Reason::Event(e) = &mut self.reason
            && e.vector == exception::GP
        {
            e.vector = exception::SS;
        }
    }

    /// Mask that RIP is kept within in the present mode.
    #[inline(always)]
    pub fn ip_mask(&self) -> u64 {
        if self.is_64() { u64::MAX } else { 0xffff_ffff }
    }
}
