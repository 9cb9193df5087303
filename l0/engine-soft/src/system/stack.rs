//! Stack accesses through a given stack segment, which need not be the current one:
//! what far transfers, IRET and event delivery use.
//!
//! Not supported: shadow stacks.

use engine::Segment;
use x86_spec::exception;
use x86_spec::reg::gpr;
use x86_spec::segment::seg;

use super::canonical;
use crate::cpu::{Cpu, Event, Exec, PRIV_SUPERVISOR, PRIV_USER};

/// A stack in use by one instruction or delivery; committed by [`Stack::commit`].
pub(super) struct Stack {
    segment: Segment,
    /// Stack pointer; only the bits in `mask` are used.
    pub sp: u64,
    mask: u64,
    long: bool,
    /// Whether a switched stack belongs to CPL 3.
    user: bool,
    /// Error code of the stack fault.
    error: u32,
    /// Whether paging treats accesses as the processor's own (delivery), whatever AC says.
    system: bool,
}

impl Stack {
    /// The current stack.
    pub fn current(cpu: &Cpu) -> Self {
        Self {
            segment: cpu.segments[seg::SS],
            sp: cpu.gpr(gpr::RSP),
            mask: pointer_mask(cpu.is_64(), &cpu.segments[seg::SS]),
            long: cpu.is_64(),
            user: false,
            error: 0,
            system: false,
        }
    }

    /// A stack being switched to. `error` is the error code of a stack fault on it.
    pub fn switched(segment: Segment, sp: u64, long: bool, user: bool, error: u32) -> Self {
        let mask = pointer_mask(long, &segment);
        Self { segment, sp, mask, long, user, error, system: true }
    }

    /// The stack segment.
    pub fn segment(&self) -> Segment {
        self.segment
    }

    fn linear(&self, cpu: &mut Cpu, sp: u64, size: u8) -> Exec<u64> {
        let fault = Event::fault_code(exception::SS, self.error);
        if self.long {
            return if canonical(sp) && canonical(sp.wrapping_add(size as u64 - 1)) {
                Ok(sp)
            } else {
                Err(cpu.raise(fault))
            };
        }
        if cpu.protected() && self.segment.access.unusable() || !in_limit(&self.segment, sp, size as u64) {
            return Err(cpu.raise(fault));
        }
        Ok(self.segment.base.wrapping_add(sp) & 0xffff_ffff)
    }

    /// Pushes `size` (2, 4 or 8) bytes.
    pub fn push(&mut self, cpu: &mut Cpu, size: u8, value: u64) -> Exec {
        let sp = self.sp.wrapping_sub(size as u64) & self.mask;
        let lin = self.linear(cpu, sp, size)?;
        if self.system {
            let mode = if self.user { PRIV_USER } else { PRIV_SUPERVISOR };
            cpu.write_as(mode, lin, size as u32, value)?;
        } else {
            cpu.write_sized(lin, size, value)?;
        }
        self.sp = self.sp & !self.mask | sp;
        Ok(())
    }

    /// Reads `size` bytes at `offset` bytes above the stack pointer.
    pub fn peek(&self, cpu: &mut Cpu, offset: u64, size: u8) -> Exec<u64> {
        let sp = self.sp.wrapping_add(offset) & self.mask;
        let lin = self.linear(cpu, sp, size)?;
        cpu.read_sized(lin, size)
    }

    /// Pops `size` bytes.
    pub fn pop(&mut self, cpu: &mut Cpu, size: u8) -> Exec<u64> {
        let v = self.peek(cpu, 0, size)?;
        self.skip(size as u64);
        Ok(v)
    }

    /// Moves the pointer up.
    pub fn skip(&mut self, bytes: u64) {
        self.sp = self.sp & !self.mask | self.sp.wrapping_add(bytes) & self.mask;
    }

    /// Writes the stack pointer to RSP. SS was set before if it changes.
    pub fn commit(&self, cpu: &mut Cpu) {
        let old = cpu.gpr(gpr::RSP);
        let new = match self.mask {
            0xffff => old & !0xffff | self.sp & 0xffff,
            m => self.sp & m,
        };
        cpu.set_gpr(gpr::RSP, new);
    }
}

/// Bits of the stack pointer in use (SDM Vol. 1 §6.2.3).
fn pointer_mask(long: bool, ss: &Segment) -> u64 {
    if long {
        u64::MAX
    } else if ss.access.db() {
        0xffff_ffff
    } else {
        0xffff
    }
}

/// Whether `size` bytes at `offset` are inside the segment (SDM Vol. 3A §5.3).
pub(super) fn in_limit(s: &Segment, offset: u64, size: u64) -> bool {
    let last = offset + (size - 1);
    if s.access.expand_down() {
        let top = if s.access.db() { 0xffff_ffff } else { 0xffff };
        offset > s.limit as u64 && last <= top
    } else {
        last <= s.limit as u64
    }
}
