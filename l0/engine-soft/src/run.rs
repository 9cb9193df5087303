//! The run loop: from block to block, with a look at events where one is due.

use std::ptr;
use std::sync::atomic::Ordering;

use engine::VmExit;
use x86_spec::exit::ExitReason;

use crate::block::{Block, BlockCache, MODE_SINGLE};
use crate::cpu::{Cpu, Exec, Reason, Stop};
use crate::system;

/// Instructions between two looks at the clock.
const QUANTUM: u64 = 4096;
impl Cpu {
    /// Runs until a VM exit, or, with `one_shot`, until one instruction has completed
    /// or its fault was delivered (`None`).
    pub(crate) fn run(&mut self) -> Option<VmExit> {
        self.link_from = ptr::null();
        self.request_event_check();
        let mut next: *const Block = ptr::null();
        loop {
            if self.single || self.icount >= self.shared.limit.load(Ordering::Relaxed) {
                next = ptr::null();
                if self.boundary().is_err() {
                    match self.settle() {
                        Some(exit) => return Some(exit),
                        None => continue,
                    }
                }
            }
            if next.is_null() {
                next = match self.next_block() {
                    Ok(b) => b,
                    Err(Stop(())) => {
                        let retry = self.reason == Reason::Reexecute;
                        if let Some(exit) = self.settle() {
                            return Some(exit);
                        }
                        if self.one_shot && !retry {
                            return None;
                        }
                        continue;
                    }
                };
            }
            // SAFETY: `next` is there: links and jump-cache entries are void once blocks are freed, which
            // happens only in `boundary`, which nulls `next`.
            let b = unsafe { &*next };
            if !b.valid.get() {
                // Linked to or jumped to, but dropped since.
                self.blocks.generation += 1;
                self.blocks.forget_jumps(self.rip());
                next = ptr::null();
                continue;
            }
            let native = b.native.get() != self.blocks.untranslated || !self.single && self.warm(b);
            next = if native {
                // SAFETY: a live block; blocks that run alone are never translated.
                unsafe { self.run_native(next) }
            } else {
                self.block = next;
                self.icount += b.instructions() as u64;
                if self.single {
                    if let Some(done) = self.run_alone(b) {
                        return done;
                    }
                    next = ptr::null();
                    continue;
                }
                // SAFETY: the first op of a live block, which is `self.block`.
                unsafe { (b.ops.get_unchecked(0).run)(self, b.ops.as_ptr()) }
            };
            if next.is_null()
                && self.reason != Reason::None
                && let Some(exit) = self.settle()
            {
                return Some(exit);
            }
        }
    }

    /// Runs a one-instruction block. `Some`: leave the run loop.
    fn run_alone(&mut self, b: &Block) -> Option<Option<VmExit>> {
        // SAFETY: the first op of a live block, which is `self.block`.
        unsafe { (b.ops.get_unchecked(0).run)(self, b.ops.as_ptr()) };
        self.link_from = ptr::null();
        let retry = self.reason == Reason::Reexecute;
        if self.reason != Reason::None
            && let Some(exit) = self.settle()
        {
            return Some(Some(exit));
        }
        (self.one_shot && !retry).then_some(None)
    }

    /// What comes at an instruction boundary before the next instruction: invalidations
    /// asked for by others, then events in order of priority.
    fn boundary(&mut self) -> Exec {
        self.block = ptr::null();
        self.link_from = ptr::null();
        self.shared.limit.store((self.icount + QUANTUM).min(self.counting.limit), Ordering::SeqCst);
        if self.shared.invalidate.swap(false, Ordering::SeqCst) {
            self.take_invalidations();
        }
        if self.code_full {
            self.code_full = false;
            self.drop_all_code();
        }
        if self.blocks.bury() {
            self.mmu.fetch_epoch += 1;
        }
        if self.one_shot {
            self.single = true;
        } else {
            system::pending::check(self)?;
            self.single |= self.force_single;
        }
        self.force_single = false;
        Ok(())
    }

    /// Deals with a stop: delivers its event (which may raise others) or returns its exit.
    pub(crate) fn settle(&mut self) -> Option<VmExit> {
        self.block = ptr::null();
        loop {
            match std::mem::replace(&mut self.reason, Reason::None) {
                Reason::None => return None,
                Reason::Exit(exit) => {
                    // An instruction that is to be executed again has met no data breakpoints yet.
                    let again =
                        matches!(exit.reason, ExitReason::EptViolation | ExitReason::EptMisconfiguration);
                    if again && self.boundary.data_watch && !exit.idt_vectoring.is_valid() {
                        self.pending_debug = self.boundary.pending_before;
                    }
                    return Some(exit);
                }
                Reason::Reexecute => {
                    self.force_single = true;
                    self.request_event_check();
                    return None;
                }
                Reason::Event(event) => {
                    let delivered = system::deliver(self, event, 0);
                    if delivered.is_ok() {
                        self.request_event_check();
                        self.reason = Reason::None;
                        return None;
                    }
                }
            }
        }
    }

    /// The block at RIP; links the block before to it where that is safe.
    fn next_block(&mut self) -> Exec<*const Block> {
        let from = std::mem::replace(&mut self.link_from, ptr::null());
        if !self.single && self.is_64() {
            let hit = self.follow_jump();
            if !hit.is_null() {
                self.link(from, hit);
                return Ok(hit);
            }
        }
        let found = self.find_block()?;
        self.link(from, found);
        Ok(found)
    }

    fn link(&mut self, from: *const Block, to: *const Block) {
        if from.is_null() || self.single || !self.is_64() || (self.link_start ^ self.rip()) >> 12 != 0 {
            return;
        }
        // SAFETY: both are live or wait in the graveyard until the next `boundary`, which would have
        // nulled `link_from`; no Rust reference to `from` is held while its link is written.
        unsafe {
            if (*to).second_page.is_some() || !(*from).valid.get() || (*to).mode & MODE_SINGLE != 0 {
                return;
            }
            let links = &raw mut (*from.cast_mut()).links;
            (*links)[self.link_slot as usize & 1] =
                crate::block::Link { block: to, generation: self.blocks.generation };
        }
    }

    /// Makes sure that the running instruction is a block of its own, so that what it causes comes
    /// right after it.
    ///
    /// # Errors
    /// [`Reason::Reexecute`] if it is not.
    pub(crate) fn require_alone(&mut self) -> Exec {
        // SAFETY: `block` is null or runs, hence alive.
        if let Some(b) = unsafe { self.block.as_ref() }
            && b.mode & MODE_SINGLE == 0
        {
            self.reason = Reason::Reexecute;
            return Err(Stop(()));
        }
        Ok(())
    }

    /// A write of `len` bytes, within one page, to a page that holds decoded code. Drops
    /// what it overwrites.
    ///
    /// # Errors
    /// [`Reason::Reexecute`] when the running block would be overwritten: the instruction is
    /// then executed again, alone.
    pub(crate) fn code_write(&mut self, machine: u64, len: u64) -> Exec {
        if !self.blocks.touches(machine, len) {
            return Ok(());
        }
        // SAFETY: `block` is null or runs, hence alive.
        if let Some(b) = unsafe { self.block.as_ref() }
            && b.mode & MODE_SINGLE == 0
            && BlockCache::block_overlaps(b, machine, len)
        {
            self.reason = Reason::Reexecute;
            return Err(Stop(()));
        }
        if self.blocks.drop_range(machine, len) {
            self.memory.set_code_page(machine >> 12, false);
        }
        Ok(())
    }

    /// Carries out what other threads asked for.
    pub(crate) fn take_invalidations(&mut self) {
        let (pages, all) = self.written_pages.take();
        if all {
            self.drop_all_code();
        }
        for page in pages {
            if self.blocks.drop_range(page << 12, 0x1000) {
                self.memory.set_code_page(page, false);
            }
        }
        self.mmu.fetch_epoch += 1;
        for scope in self.requests.take() {
            self.invalidate(scope);
        }
    }
}
