//! The translator: blocks that run often become host code.
//!
//! A block is interpreted at first ([`crate::ops`]). After [`THRESHOLD`] executions it is translated:
//! guest registers stay in [`Cpu::regs`], status flags in [`Cpu::flags`], but there is no dispatch from
//! instruction to instruction any more, flags that nobody reads are not kept, a conditional jump uses
//! the flags that the comparison before it left in the host's register, and blocks go on to
//! each other without a return to the run loop. Common integer instructions are done in place
//! ([`code`]). All others call the very handler that interprets them, and so does each memory
//! access that the fast TLB does not serve: faults, exits and rare cases have one
//! implementation.
//!
//! Not translated: code outside 64-bit mode, and instructions that run alone (single steps, interrupt
//! shadows).

mod asm;
mod code;
#[cfg(test)]
mod tests;

use std::mem::offset_of;
use std::ptr;
use std::sync::atomic::AtomicU64;

use asm::{Alu, Asm, Mem, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP};

use crate::arena::Arena;
use crate::block::{Block, BlockCache, Jump, Link};
use crate::cpu::{CodeSize, Cpu, Reason, SLOT_RIP};
use crate::mmu::Mmu;
use crate::op::{Op, blank};

/// Executions after which a block is translated.
pub(crate) const THRESHOLD: u32 = 24;
/// Bytes of translated code that are kept; past that all code starts anew.
const ARENA_SIZE: usize = 64 << 20;
/// Room that a block's code must find: the longest is below this.
const MAX_BLOCK: usize = 64 << 10;

/// Host register of translated code that points this far into [`Cpu`], so that registers and flags are
/// within a byte's displacement.
const BIAS: usize = 128;

/// Displacement of a field of [`Cpu`].
const fn field(offset: usize) -> Mem {
    Mem::at(RBX, offset as i32 - BIAS as i32)
}
const CTX: Mem = field(offset_of!(Cpu, ctx));
const ICOUNT: Mem = field(offset_of!(Cpu, icount));
const FLAGS: Mem = field(offset_of!(Cpu, flags));
const BLOCK: Mem = field(offset_of!(Cpu, block));
const RIP: Mem = field(8 * SLOT_RIP);
const GENERATION: Mem = field(offset_of!(Cpu, blocks) + offset_of!(BlockCache, generation));
const EPOCH: Mem = field(offset_of!(Cpu, mmu) + offset_of!(Mmu, fetch_epoch));
const MODE: Mem = field(offset_of!(Cpu, block_mode));
/// Where a block's code is, by the block's address in RAX.
const NATIVE: Mem = Mem::at(RAX, offset_of!(Block, native) as i32);

/// Address of the stubs that translated code shares.
#[derive(Clone, Copy, Debug, Default)]
struct Stubs {
    /// Enters translated code; see [`Enter`].
    enter: usize,
    /// Returns to the run loop with the block in RAX.
    leave: usize,
    /// Goes on at RIP through the jump cache.
    dispatch: usize,
    /// Asks the run loop to set link CL of the running block, which began EAX bytes before RIP.
    link: usize,
}

/// Runs translated code: the processor, a block, the run loop's limit, the jump cache. Returns as a
/// [`crate::op::Handler`] does.
type Enter =
    unsafe extern "sysv64-unwind" fn(*mut Cpu, *const Block, *const AtomicU64, *const Jump) -> *const Block;

/// Translated code of one vCPU.
#[derive(Debug)]
pub struct Translator {
    arena: Arena,
    asm: Asm,
    stubs: Stubs,
    /// Executions after which a block is translated; 0 for never.
    threshold: u32,
    /// Blocks translated so far.
    pub translated: u64,
}

impl Translator {
    /// A translator without code.
    ///
    /// # Errors
    /// When the host refuses executable memory.
    pub fn new() -> std::io::Result<Self> {
        let arena = Arena::new(c"nestvmm-code", ARENA_SIZE)?;
        let mut t =
            Self { arena, asm: Asm::default(), stubs: Stubs::default(), threshold: THRESHOLD, translated: 0 };
        t.push_stubs();
        Ok(t)
    }

    /// What the code of a block that is not translated is: it returns to the run loop.
    pub(crate) fn untranslated(&self) -> usize {
        self.stubs.leave
    }

    /// Executions after which a block is translated from now on; 0 for never.
    pub fn set_threshold(&mut self, executions: u32) {
        self.threshold = executions;
    }

    /// Drops all code. None of it may run afterwards, but for the stubs.
    pub(crate) fn clear(&mut self) {
        self.arena.clear();
        self.push_stubs();
    }

    /// Puts the stubs to the start of the arena: each time at the same addresses.
    fn push_stubs(&mut self) {
        let origin = self.arena.next();
        self.asm.start(origin);
        let a = &mut self.asm;
        let mut stubs = Stubs { enter: origin, ..Stubs::default() };
        let saved = [RBX, RBP, R12, R13, R14, R15];
        saved.iter().for_each(|r| a.push(*r));
        a.lea(8, RSP, Mem::at(RSP, -8));
        a.lea(8, RBX, Mem::at(RDI, BIAS as i32));
        a.mov(8, R13, RDX);
        a.mov(8, R15, RCX);
        a.mov(8, RAX, RSI);
        load_context(a);
        a.jump_mem(NATIVE);

        stubs.leave = origin + a.len();
        a.lea(8, RSP, Mem::at(RSP, 8));
        saved.iter().rev().for_each(|r| a.pop(*r));
        a.ret();

        stubs.dispatch = origin + a.len();
        // The index and the comparisons of `BlockCache::jump`.
        a.load(8, RSI, RIP);
        a.mov(8, RCX, RSI);
        a.shift(5, 8, RCX, BlockCache::JUMP_PAGE_SHIFT);
        a.alu_imm(Alu::And, 4, RCX, BlockCache::JUMP_PAGE_MASK as i32);
        a.mov(8, RDX, RSI);
        a.shift(5, 8, RDX, 7);
        a.alu(Alu::Xor, 4, RDX, RSI);
        a.alu_imm(Alu::And, 4, RDX, BlockCache::JUMP_OFFSET_MASK as i32);
        a.alu(Alu::Or, 4, RCX, RDX);
        a.shift(4, 4, RCX, size_of::<Jump>().trailing_zeros() as u8);
        a.alu(Alu::Add, 8, RCX, R15);
        a.load(1, RDX, MODE);
        a.mov(8, RAX, R12);
        a.shift(4, 8, RAX, 8);
        a.alu(Alu::Or, 8, RDX, RAX);
        a.load(8, RAX, EPOCH);
        let mut misses = Vec::new();
        for (register, offset) in
            [(RSI, offset_of!(Jump, rip)), (RDX, offset_of!(Jump, key)), (RAX, offset_of!(Jump, epoch))]
        {
            a.alu_mem(Alu::Cmp, 8, register, Mem::at(RCX, offset as i32));
            misses.push(a.jump_if(NOT_EQUAL));
        }
        a.load(8, RAX, Mem::at(RCX, offset_of!(Jump, block) as i32));
        a.jump_mem(NATIVE);
        misses.into_iter().for_each(|m| a.land(m));
        a.alu(Alu::Xor, 4, RAX, RAX);
        a.jump_to(stubs.leave);

        stubs.link = origin + a.len();
        a.reg(8, &[0x63], RAX, RAX);
        a.load(8, RDX, RIP);
        a.alu(Alu::Sub, 8, RDX, RAX);
        a.store(8, RDX, field(offset_of!(Cpu, link_start)));
        a.store(1, RCX, field(offset_of!(Cpu, link_slot)));
        a.store(8, RBP, field(offset_of!(Cpu, link_from)));
        a.alu(Alu::Xor, 4, RAX, RAX);
        a.jump_to(stubs.leave);

        // The arena is empty and larger than this.
        let _ = self.arena.push(self.asm.bytes());
        self.stubs = stubs;
    }
}

/// Condition numbers of jumps in translated code.
const NOT_EQUAL: u8 = 5;
const NOT_BELOW: u8 = 3;

/// Bytes of a fast-TLB entry, as a shift count.
const TLB_SHIFT: u8 = size_of::<crate::mmu::TlbEntry>().trailing_zeros() as u8;

/// Loads the TLB context into R12, and shifted to the fast TLB's index into R14.
fn load_context(a: &mut Asm) {
    a.load(8, R12, CTX);
    a.mov(8, R14, R12);
    a.shift(4, 8, R14, TLB_SHIFT);
}

impl Cpu {
    /// Counts an execution of a block that is not translated, and translates it when that pays. Whether it
    /// is translated now.
    pub(crate) fn warm(&mut self, block: &Block) -> bool {
        let heat = block.heat.get().saturating_add(1);
        block.heat.set(heat);
        if heat == self.translator.threshold && block.mode & 3 == CodeSize::Bits64 as u8 {
            self.translate(block);
        }
        block.native.get() != self.blocks.untranslated
    }

    fn translate(&mut self, block: &Block) {
        let t = &mut self.translator;
        t.asm.start(t.arena.next());
        let calls = code::emit(&mut t.asm, t.stubs, block);
        let pushed = if t.asm.len() <= MAX_BLOCK { t.arena.push(t.asm.bytes()) } else { None };
        let Some(entry) = pushed else {
            // The block stays as it is; with the next look around everything starts anew.
            self.code_full = true;
            self.request_event_check();
            return;
        };
        t.translated += 1;
        // A block is translated once, as its heat passes the threshold once.
        if block.calls.set(calls).is_ok() {
            block.native.set(entry);
        }
    }

    /// Runs a translated block, and those that follow it, until the run loop is needed.
    ///
    /// # Safety
    /// `block` is live and translated.
    pub(crate) unsafe fn run_native(&mut self, block: *const Block) -> *const Block {
        let (limit, jumps) = (&raw const self.shared.limit, self.blocks.jumps());
        // SAFETY: the stub is a function of this type. Code of live blocks follows the contract of
        // handlers; it is overwritten only by `clear`, between blocks. The limit and the jump cache live as
        // long as `self`.
        unsafe {
            let enter: Enter = std::mem::transmute(self.translator.stubs.enter);
            enter(self, block, limit, jumps)
        }
    }
}

/// Last op of a call from translated code to a handler.
///
/// # Safety
/// None is needed.
unsafe extern "sysv64-unwind" fn returned(_: &mut Cpu, _: *const Op) -> *const Block {
    ptr::without_provenance(RETURNED as usize)
}
/// What [`returned`] answers: no block is there.
const RETURNED: i32 = 1;

/// Executes the last instruction of a block by its handler, and looks for the block that follows.
///
/// # Safety
/// As [`crate::op::Handler`].
unsafe extern "sysv64-unwind" fn finish(cpu: &mut Cpu, op: *const Op) -> *const Block {
    // SAFETY: the caller's contract.
    let next = unsafe { ((*op).run)(cpu, op) };
    if next.is_null() && cpu.reason == Reason::None && cpu.link_from.is_null() && cpu.is_64() {
        return cpu.follow_jump();
    }
    next
}

/// A copy of an op to call its handler with, and what follows it there.
fn call_pair(op: &Op) -> [Op; 2] {
    [Op { ..*op }, Op { run: returned, ..blank() }]
}

/// Offset of a block's link.
const fn link(slot: usize) -> (Mem, Mem) {
    let at = (offset_of!(Block, links) + slot * size_of::<Link>()) as i32;
    (
        Mem::at(RBP, at + offset_of!(Link, block) as i32),
        Mem::at(RBP, at + offset_of!(Link, generation) as i32),
    )
}
