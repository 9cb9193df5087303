//! Cache of decoded blocks, by machine address and mode.
//!
//! A block never leaves the page that it starts in, but for a single instruction that crosses
//! into the next page and then is a block of its own. Blocks are found through (in order):
//! the link of the block before (same page only), the jump cache (by RIP), and the table (by
//! machine address). Writes to bytes that are decoded drop the blocks that hold them.

use std::cell::{Cell, OnceCell};
use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use iced_x86::Instruction;
use memory::{CodeWatcher, MachineMemory};

use crate::op::Op;

const TABLE: usize = 1 << 18;
/// Entries of the jump cache for one linear page, and pages: a page's entries are together, so that they
/// can be dropped together.
const JUMPS_OF_PAGE: usize = 1 << 7;
const JUMP_PAGES: usize = 1 << 7;
/// Dropped blocks that may wait to be freed. Then all links are void.
const MAX_BURIED_LATER: usize = 1024;
/// Ops that the cache may hold before it starts anew: about 100 bytes each with their
/// instructions.
const MAX_OPS: usize = 1_000_000;
/// Pages remembered as written by others before everything is dropped instead.
const MAX_WRITTEN: usize = 4096;

/// Bit of [`Block::mode`]: decoded for single-stepping, one instruction.
pub const MODE_SINGLE: u8 = 0x80;

/// A cached guess of the block that follows.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Link {
    /// The block.
    pub block: *const Block,
    /// [`BlockCache::generation`] when it was set; others are void.
    pub generation: u64,
}

/// A decoded block.
#[repr(C)]
pub struct Block {
    /// Its instructions; the last one's handler ends the block.
    pub ops: Box<[Op]>,
    /// Where execution went from here: \[0\] falling through, \[1\] the branch taken.
    pub links: [Link; 2],
    /// Address of its translated code, or of the stub that leaves translated code
    /// ([`crate::translate`]).
    pub native: Cell<usize>,
    /// Ops that the translated code calls handlers with.
    pub calls: OnceCell<Vec<Op>>,
    /// How often it was interpreted.
    pub heat: Cell<u32>,
    /// Length in bytes.
    pub len: u16,
    /// Instructions.
    count: u8,
    /// Mode that it was decoded for ([`crate::cpu::Cpu::block_mode`]).
    pub mode: u8,
    /// Still in the table. Others may be linked to it even so, until it is freed.
    pub valid: Cell<bool>,
    /// Machine address.
    pub machine: u64,
    /// Machine page of the rest of an instruction that crosses a page.
    pub second_page: Option<u64>,
    /// The iced instructions that ops point to.
    _insns: Box<[Instruction]>,
    next_in_bucket: *mut Block,
}

impl Block {
    /// How many instructions it has.
    #[inline(always)]
    pub fn instructions(&self) -> u8 {
        self.count
    }

    /// Whether it has bytes in `start..end` (machine addresses).
    fn overlaps(&self, start: u64, end: u64) -> bool {
        let first_end = if self.second_page.is_some() {
            (self.machine | 0xfff) + 1
        } else {
            self.machine + self.len as u64
        };
        if start < first_end && self.machine < end {
            return true;
        }
        self.second_page.is_some_and(|p| {
            let base = p << 12;
            let rest = self.machine + self.len as u64 - first_end;
            start < base + rest && base < end
        })
    }
}

/// What [`BlockCache::insert`] takes.
pub struct NewBlock {
    /// Machine address.
    pub machine: u64,
    /// Mode.
    pub mode: u8,
    /// Ops; `insn` fields point into `insns`.
    pub ops: Vec<Op>,
    /// How many instructions (ops without the one that only ends the block).
    pub count: u8,
    /// The instructions.
    pub insns: Box<[Instruction]>,
    /// Length in bytes.
    pub len: u16,
    /// See [`Block::second_page`].
    pub second_page: Option<u64>,
}

/// An entry of the jump cache: the block last found at an address.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Jump {
    /// RIP.
    pub rip: u64,
    /// TLB context and block mode.
    pub key: u64,
    /// [`crate::mmu::Mmu::fetch_epoch`] when it was found.
    pub epoch: u64,
    /// The block.
    pub block: *const Block,
}

#[derive(Default)]
struct CodePage {
    blocks: Vec<*mut Block>,
    /// 64-byte lines that hold decoded bytes.
    lines: u64,
}

/// All decoded blocks of one vCPU.
pub struct BlockCache {
    table: Box<[*mut Block]>,
    jumps: Box<[Jump]>,
    pages: HashMap<u64, CodePage>,
    /// Dropped blocks that may still be running.
    graveyard: Vec<*mut Block>,
    ops: usize,
    /// Grows when blocks are freed; voids links.
    pub generation: u64,
    /// Blocks decoded so far.
    pub decoded: u64,
    /// Blocks dropped because their code was written.
    pub dropped: u64,
    /// [`Block::native`] of blocks that are not translated.
    pub untranslated: usize,
}

fn lines(offset: u64, len: u64) -> u64 {
    let first = (offset >> 6) & 63;
    let last = ((offset + len.max(1) - 1) >> 6).min(63);
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

impl Default for BlockCache {
    fn default() -> Self {
        let no = Jump { rip: 0, key: u64::MAX, epoch: 0, block: std::ptr::null() };
        Self {
            table: vec![std::ptr::null_mut(); TABLE].into(),
            jumps: vec![no; JUMPS_OF_PAGE * JUMP_PAGES].into(),
            pages: HashMap::new(),
            graveyard: Vec::new(),
            ops: 0,
            generation: 1,
            decoded: 0,
            dropped: 0,
            untranslated: 0,
        }
    }
}

impl BlockCache {
    fn bucket(machine: u64, mode: u8) -> usize {
        let h = (machine ^ (mode as u64) << 50).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (h >> (64 - TABLE.trailing_zeros())) as usize
    }

    /// Index into the jump cache: the page's part, then the address within.
    ///
    /// Translated code computes it too.
    #[inline(always)]
    fn jump_index(rip: u64) -> usize {
        let page = rip >> Self::JUMP_PAGE_SHIFT & Self::JUMP_PAGE_MASK;
        (page | (rip ^ rip >> 7) & Self::JUMP_OFFSET_MASK) as usize
    }
    pub(crate) const JUMP_PAGE_SHIFT: u8 = 12 - JUMPS_OF_PAGE.trailing_zeros() as u8;
    pub(crate) const JUMP_PAGE_MASK: u64 = ((JUMP_PAGES - 1) * JUMPS_OF_PAGE) as u64;
    pub(crate) const JUMP_OFFSET_MASK: u64 = JUMPS_OF_PAGE as u64 - 1;

    /// Forgets the jump-cache entries of a linear page, of whatever context.
    pub fn forget_jumps(&mut self, linear: u64) {
        let first = (linear >> Self::JUMP_PAGE_SHIFT & Self::JUMP_PAGE_MASK) as usize;
        self.jumps[first..first + JUMPS_OF_PAGE].iter_mut().for_each(|j| j.epoch = 0);
    }

    /// The jump cache; it stays where it is.
    pub(crate) fn jumps(&self) -> *const Jump {
        self.jumps.as_ptr()
    }

    /// The block last found for this RIP, if nothing changed since.
    #[inline(always)]
    pub fn jump(&self, rip: u64, key: u64, epoch: u64) -> Option<*const Block> {
        let j = &self.jumps[Self::jump_index(rip)];
        (j.rip == rip && j.key == key && j.epoch == epoch).then_some(j.block)
    }

    /// Remembers a block for [`Self::jump`].
    pub fn set_jump(&mut self, rip: u64, key: u64, epoch: u64, block: *const Block) {
        self.jumps[Self::jump_index(rip)] = Jump { rip, key, epoch, block };
    }

    /// The block at a machine address.
    pub fn find(&self, machine: u64, mode: u8) -> Option<*const Block> {
        let mut p = self.table[Self::bucket(machine, mode)];
        // SAFETY: blocks in the table are alive; they leave it before they are freed.
        while let Some(b) = unsafe { p.as_ref() } {
            if b.machine == machine && b.mode == mode {
                return Some(p);
            }
            p = b.next_in_bucket;
        }
        None
    }

    /// Whether the cache must be cleared before the next insertion.
    pub fn is_full(&self) -> bool {
        self.ops >= MAX_OPS
    }

    /// Adds a block.
    pub fn insert(&mut self, new: NewBlock) -> *const Block {
        let none = Link { block: std::ptr::null(), generation: 0 };
        let bucket = Self::bucket(new.machine, new.mode);
        self.ops += new.ops.len();
        self.decoded += 1;
        let block = Box::into_raw(Box::new(Block {
            count: new.count,
            ops: new.ops.into(),
            links: [none; 2],
            native: Cell::new(self.untranslated),
            calls: OnceCell::new(),
            heat: Cell::new(0),
            len: new.len,
            mode: new.mode,
            valid: Cell::new(true),
            machine: new.machine,
            second_page: new.second_page,
            _insns: new.insns,
            next_in_bucket: self.table[bucket],
        }));
        self.table[bucket] = block;
        let page = self.pages.entry(new.machine >> 12).or_default();
        page.blocks.push(block);
        page.lines |= lines(new.machine & 0xfff, new.len as u64);
        if let Some(second) = new.second_page {
            let page = self.pages.entry(second).or_default();
            page.blocks.push(block);
            page.lines |= 1;
        }
        block
    }

    /// Whether a write of `len` bytes at `machine` touches lines that hold decoded code.
    pub fn touches(&self, machine: u64, len: u64) -> bool {
        self.pages.get(&(machine >> 12)).is_some_and(|p| p.lines & lines(machine & 0xfff, len) != 0)
    }

    /// Whether `block` has bytes in the range.
    pub fn block_overlaps(block: &Block, machine: u64, len: u64) -> bool {
        block.overlaps(machine, machine + len)
    }

    /// Drops blocks with bytes in the range, which lies within one page. True if the page
    /// holds no code any more.
    pub fn drop_range(&mut self, machine: u64, len: u64) -> bool {
        let number = machine >> 12;
        let Some(page) = self.pages.get(&number) else { return true };
        let hit: Vec<*mut Block> = page
            .blocks
            .iter()
            .copied()
            // SAFETY: blocks listed in a page are alive.
            .filter(|b| unsafe { &**b }.overlaps(machine, machine + len))
            .collect();
        for b in hit {
            self.remove(b);
        }
        !self.pages.contains_key(&number)
    }

    fn remove(&mut self, block: *mut Block) {
        // SAFETY: the block is in the table, hence alive.
        let b = unsafe { &*block };
        b.valid.set(false);
        b.native.set(self.untranslated);
        self.dropped += 1;
        self.ops -= b.ops.len();
        let mut at: *mut *mut Block = &mut self.table[Self::bucket(b.machine, b.mode)];
        // SAFETY: walks the bucket's list of live blocks to the pointer that names `block`.
        unsafe {
            while !(*at).is_null() {
                if *at == block {
                    *at = b.next_in_bucket;
                    break;
                }
                at = &mut (**at).next_in_bucket;
            }
        }
        for number in [Some(b.machine >> 12), b.second_page].into_iter().flatten() {
            if let Some(page) = self.pages.get_mut(&number) {
                page.blocks.retain(|p| *p != block);
                page.lines = page.blocks.iter().fold(0, |all, p| {
                    // SAFETY: blocks listed in a page are alive.
                    let b = unsafe { &**p };
                    if b.machine >> 12 == number {
                        all | lines(b.machine & 0xfff, b.len as u64)
                    } else {
                        all | 1
                    }
                });
                if page.blocks.is_empty() {
                    self.pages.remove(&number);
                }
            }
        }
        self.graveyard.push(block);
    }

    /// Frees dropped blocks when there are many, which voids all links. Only between blocks. True if it
    /// did: the jump cache has to be voided too.
    pub fn bury(&mut self) -> bool {
        let many = self.graveyard.len() > MAX_BURIED_LATER;
        if many {
            self.bury_all();
        }
        many
    }

    fn bury_all(&mut self) {
        self.generation += 1;
        for b in self.graveyard.drain(..) {
            // SAFETY: made by `Box::into_raw`, out of every list; no link to it counts, and no block runs.
            drop(unsafe { Box::from_raw(b) });
        }
    }

    /// Drops everything. Only between blocks.
    pub fn clear(&mut self, memory: &MachineMemory) {
        for (number, _) in self.pages.drain() {
            memory.set_code_page(number, false);
        }
        for bucket in self.table.iter_mut() {
            let mut p = std::mem::replace(bucket, std::ptr::null_mut());
            while !p.is_null() {
                // SAFETY: made by `Box::into_raw`; no block runs, and the table was the only list.
                let b = unsafe { Box::from_raw(p) };
                p = b.next_in_bucket;
            }
        }
        self.bury_all();
        self.jumps.iter_mut().for_each(|j| j.epoch = 0);
        self.ops = 0;
    }
}

impl Drop for BlockCache {
    fn drop(&mut self) {
        let mut all: Vec<*mut Block> = std::mem::take(&mut self.graveyard);
        for p in self.table.iter() {
            let mut p = *p;
            while !p.is_null() {
                all.push(p);
                // SAFETY: blocks in the table are alive.
                p = unsafe { (*p).next_in_bucket };
            }
        }
        for b in all {
            // SAFETY: each block is in the table or the graveyard, never both.
            drop(unsafe { Box::from_raw(b) });
        }
    }
}

/// Collects code pages that someone else wrote, for the vCPU to drop.
#[derive(Debug, Default)]
pub struct WrittenPages {
    pages: Mutex<Vec<u64>>,
    overflow: AtomicBool,
}

impl WrittenPages {
    /// Takes what has gathered: pages, and whether everything must go.
    pub fn take(&self) -> (Vec<u64>, bool) {
        let mut pages = self.pages.lock().unwrap_or_else(|e| e.into_inner());
        (std::mem::take(&mut *pages), self.overflow.swap(false, Ordering::AcqRel))
    }
}

/// Tells one vCPU of writes to code pages.
pub struct Watcher {
    /// The list.
    pub written: std::sync::Arc<WrittenPages>,
    /// The vCPU to wake.
    pub shared: std::sync::Arc<crate::cpu::Shared>,
}

impl CodeWatcher for Watcher {
    fn code_page_written(&self, page: u64) {
        let mut pages = self.written.pages.lock().unwrap_or_else(|e| e.into_inner());
        if pages.len() >= MAX_WRITTEN {
            self.written.overflow.store(true, Ordering::Release);
        } else {
            pages.push(page);
        }
        self.shared.invalidate.store(true, Ordering::SeqCst);
        self.shared.limit.store(0, Ordering::SeqCst);
    }
}
