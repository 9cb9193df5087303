//! From instruction bytes to blocks.

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction};
use memory::MachineAddr;
use x86_spec::segment::seg;

use crate::block::{Block, MODE_SINGLE, NewBlock};
use crate::cpu::{CodeSize, Cpu, Exec};
use crate::op::{Op, SimpleFn, SimpleKind, blank, simple_end, simple_next};
use crate::ops::{self, Flow};
use crate::{system, thunk};

/// Most instructions in a block.
const MAX_INSTRUCTIONS: usize = 48;
/// Bytes looked at for one block; blocks are shorter than this.
const WINDOW: usize = 256;
/// Longest instruction (SDM Vol. 2A §2.3.11).
const MAX_LENGTH: usize = 15;

/// #UD.
fn undefined(cpu: &mut Cpu, _: &Instruction) -> Exec {
    Err(cpu.ud())
}
/// An instruction of more than 15 bytes: #GP(0).
fn too_long(cpu: &mut Cpu, _: &Instruction) -> Exec {
    Err(cpu.gp(0))
}

/// Code bytes at a place, and where they come from.
struct Window {
    bytes: [u8; WINDOW],
    len: usize,
    /// Set when bytes of the next page were appended.
    second_page: Option<u64>,
}

impl Cpu {
    /// Finds or decodes the block at RIP for the present mode.
    ///
    /// # Errors
    /// Faults and exits of the fetch.
    pub(crate) fn find_block(&mut self) -> Exec<*const Block> {
        let rip = self.rip();
        let linear =
            if self.is_64() { rip } else { self.segment_linear(seg::CS, rip, 1, crate::cpu::Access::Fetch)? };
        let mode = self.block_mode | if self.single { MODE_SINGLE } else { 0 };
        let machine = self.fetch_address(linear)?.0;
        let mut found = self.blocks.find(machine, mode);
        if let Some(b) = found {
            // SAFETY: `find` returns live blocks.
            let b = unsafe { &*b };
            if let Some(second) = b.second_page {
                let next = (linear | 0xfff).wrapping_add(1);
                if self.fetch_address(next)?.page() != second {
                    // Mapped elsewhere now: this block is of no more use.
                    self.blocks.drop_range(machine, 1);
                    found = None;
                }
            }
        }
        let block = match found {
            Some(b) => b,
            None => self.decode_block(linear, machine, mode)?,
        };
        // SAFETY: found or just made.
        let b = unsafe { &*block };
        if !self.is_64() {
            self.check_code_limit(rip, b.len as u64, mode)?;
        }
        if b.second_page.is_none() && !self.single {
            let key = self.ctx << 8 | self.block_mode as u64;
            self.blocks.set_jump(rip, key, self.mmu.fetch_epoch, block);
        }
        Ok(block)
    }

    /// #GP(0) when a block reaches over the code segment's limit; long blocks first try again
    /// as single instructions.
    fn check_code_limit(&mut self, rip: u64, len: u64, mode: u8) -> Exec {
        if rip + len - 1 <= self.segments[seg::CS].limit as u64 {
            return Ok(());
        }
        if mode & MODE_SINGLE != 0 {
            return Err(self.gp(0));
        }
        self.single = true;
        self.reason = crate::cpu::Reason::Reexecute;
        Err(crate::cpu::Stop(()))
    }

    fn window(&mut self, machine: u64) -> Window {
        let mut w = Window { bytes: [0; WINDOW], len: 0, second_page: None };
        w.len = WINDOW.min(0x1000 - (machine & 0xfff) as usize);
        if self.memory.read(MachineAddr(machine), &mut w.bytes[..w.len]).is_err() {
            w.len = 0;
        }
        w
    }

    /// Appends bytes of the page after `linear`'s.
    fn extend_window(&mut self, linear: u64, w: &mut Window) -> Exec {
        let next = (linear | 0xfff).wrapping_add(1);
        let next = if self.is_64() { next } else { next & 0xffff_ffff };
        let machine = self.fetch_address(next)?;
        let want = MAX_LENGTH.saturating_sub(w.len);
        if self.memory.read(machine, &mut w.bytes[w.len..w.len + want]).is_ok() {
            w.len += want;
        }
        w.second_page = Some(machine.page());
        Ok(())
    }

    fn decode_block(&mut self, linear: u64, machine: u64, mode: u8) -> Exec<*const Block> {
        if self.blocks.is_full() {
            self.drop_all_code();
        }
        // The page becomes a code page before its bytes are read, so that a write by someone else in
        // between is not missed.
        self.make_code_page(machine >> 12);
        let mut w = self.window(machine);
        let mut insns = decode_window(&w, self.code_size, mode);
        if insns.is_empty() {
            self.extend_window(linear, &mut w)?;
            insns = decode_window(&w, self.code_size, mode | MODE_SINGLE);
        }
        if let Some(second) = w.second_page {
            self.make_code_page(second);
        }
        let new = self.lower_block(machine, mode, insns, w.second_page);
        Ok(self.blocks.insert(new))
    }

    /// Marks a page as one whose code is cached.
    fn make_code_page(&mut self, page: u64) {
        if !self.memory.is_code_page(page) {
            self.memory.set_code_page(page, true);
            self.mmu.protect_code_page(page);
        }
    }

    /// Drops all decoded code and thunks. Only between blocks.
    pub(crate) fn drop_all_code(&mut self) {
        let memory = self.memory.clone();
        self.blocks.clear(&memory);
        self.thunks.clear();
        self.translator.clear();
        self.block = std::ptr::null();
        self.link_from = std::ptr::null();
        self.mmu.fetch_epoch += 1;
    }

    fn lower_block(
        &mut self,
        machine: u64,
        mode: u8,
        insns: Vec<Instruction>,
        second_page: Option<u64>,
    ) -> NewBlock {
        let mut insns: Box<[Instruction]> = if insns.is_empty() {
            // Fifteen bytes and still no end: too long.
            let mut i = Instruction::new();
            i.set_len(1);
            Box::new([i])
        } else {
            insns.into()
        };
        let bits64 = self.code_size == CodeSize::Bits64;
        let mut ops = Vec::with_capacity(insns.len() + 1);
        let mut len = 0;
        let mut ended = false;
        for n in 0..insns.len() {
            let i = &insns[n];
            let mut op = blank_op(i, n);
            let flow = self.lower(i, bits64, &mut op);
            ops.push(op);
            len = i.ip() as usize + i.len();
            if flow == Flow::End {
                ended = true;
                break;
            }
        }
        let count = ops.len();
        if !ended {
            let mut op = blank_op(&insns[count - 1], count);
            op.offset = len as u16;
            op.len = 0;
            op.run = ops::fallthrough;
            ops.push(op);
        }
        insns = insns.into_vec().into_iter().take(count).collect();
        for (n, op) in ops.iter_mut().enumerate() {
            op.insn = &raw const insns[n.min(count - 1)];
        }
        NewBlock { machine, mode, ops, count: count as u8, insns, len: len as u16, second_page }
    }

    /// Chooses who executes an instruction.
    fn lower(&mut self, i: &Instruction, bits64: bool, op: &mut Op) -> Flow {
        if i.is_invalid() {
            let f: SimpleFn =
                if i.len() == 1 && i.ip() == 0 && i.next_ip() == 0 { too_long } else { undefined };
            op.data = f as usize;
            op.run = simple_end;
            return Flow::End;
        }
        if let Some(flow) = ops::lower(i, bits64, op) {
            return flow;
        }
        if let Some((f, kind)) = system::lookup(i) {
            op.data = f as usize;
            op.run = if kind == SimpleKind::End { simple_end } else { simple_next };
            return if kind == SimpleKind::End { Flow::End } else { Flow::Next };
        }
        match thunk::install(self, i, op) {
            thunk::Installed::Yes => Flow::Next,
            thunk::Installed::Full => {
                // The arena is full: leave the block here, drop everything, come back.
                op.data = start_anew as SimpleFn as usize;
                op.run = simple_end;
                Flow::End
            }
            thunk::Installed::No => {
                op.data = undefined as SimpleFn as usize;
                op.run = simple_end;
                Flow::End
            }
        }
    }
}

/// Asks the run loop to drop all code and to execute this instruction again.
fn start_anew(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.code_full = true;
    cpu.request_event_check();
    cpu.reason = crate::cpu::Reason::Reexecute;
    Err(crate::cpu::Stop(()))
}

fn blank_op(i: &Instruction, number: usize) -> Op {
    Op { len: i.len() as u8, number: number as u8, offset: i.ip() as u16, ..blank() }
}

/// Decodes instructions until one can't be followed by others, the block is long enough, or the
/// bytes run out. Empty when the first instruction needs more bytes.
fn decode_window(w: &Window, size: CodeSize, mode: u8) -> Vec<Instruction> {
    let bitness = match size {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    let options = DecoderOptions::NONE;
    let mut decoder = Decoder::with_ip(bitness, &w.bytes[..w.len], 0, options);
    let max = if mode & MODE_SINGLE != 0 { 1 } else { MAX_INSTRUCTIONS };
    let mut out = Vec::with_capacity(16);
    while out.len() < max && decoder.can_decode() {
        let i = decoder.decode();
        if decoder.last_error() == DecoderError::NoMoreBytes {
            break;
        }
        let end = i.is_invalid() || i.flow_control() != iced_x86::FlowControl::Next;
        out.push(i);
        if end {
            break;
        }
    }
    out
}
