//! Encodes the few host instructions that translated code is made of.
//!
//! Operands of one byte are only ever memory or AL, CL, DL and BL, so that no byte register needs a
//! REX prefix of its own.

/// A host register, by its encoding number.
pub(super) type Reg = u8;

pub(super) const RAX: Reg = 0;
pub(super) const RCX: Reg = 1;
pub(super) const RDX: Reg = 2;
pub(super) const RBX: Reg = 3;
pub(super) const RSP: Reg = 4;
pub(super) const RBP: Reg = 5;
pub(super) const RSI: Reg = 6;
pub(super) const RDI: Reg = 7;
pub(super) const R12: Reg = 12;
pub(super) const R13: Reg = 13;
pub(super) const R14: Reg = 14;
pub(super) const R15: Reg = 15;

/// A host memory operand: base, perhaps an index with its scale as a shift, displacement.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mem {
    base: Reg,
    index: Option<(Reg, u8)>,
    disp: i32,
}

impl Mem {
    pub(super) const fn at(base: Reg, disp: i32) -> Self {
        Self { base, index: None, disp }
    }
    pub(super) const fn indexed(base: Reg, index: Reg, scale: u8, disp: i32) -> Self {
        Self { base, index: Some((index, scale)), disp }
    }
}

/// The arithmetic operations of opcodes 00H to 3FH, by their number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Alu {
    Add = 0,
    Or = 1,
    Adc = 2,
    Sbb = 3,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// A jump whose target comes later.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(super) struct Jump(usize);

/// Machine code that will run at a known address.
#[derive(Debug, Default)]
pub(super) struct Asm {
    bytes: Vec<u8>,
    origin: usize,
}

impl Asm {
    /// Starts anew, for code at `origin`.
    pub(super) fn start(&mut self, origin: usize) {
        self.bytes.clear();
        self.origin = origin;
    }

    /// What was emitted.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes emitted so far.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn byte(&mut self, b: u8) {
        self.bytes.push(b);
    }
    fn dword(&mut self, v: u32) {
        self.bytes.extend_from_slice(&v.to_le_bytes());
    }

    fn prefixes(&mut self, size: u8, reg: Reg, index: Reg, base: Reg) {
        if size == 2 {
            self.byte(0x66);
        }
        let rex = u8::from(size == 8) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3;
        if rex != 0 {
            self.byte(0x40 | rex);
        }
    }

    fn modrm(&mut self, reg: Reg, mem: Mem) {
        let (reg, base) = (reg & 7, mem.base & 7);
        let short = i8::try_from(mem.disp);
        // RBP and R13 as a base always have a displacement.
        let mode = match short {
            Ok(0) if base != RBP => 0,
            Ok(_) => 0x40,
            Err(_) => 0x80,
        };
        match mem.index {
            Some((index, scale)) => {
                self.byte(mode | reg << 3 | RSP);
                self.byte(scale << 6 | (index & 7) << 3 | base);
            }
            None if base == RSP => {
                self.byte(mode | reg << 3 | RSP);
                self.byte(RSP << 3 | RSP);
            }
            None => self.byte(mode | reg << 3 | base),
        }
        match (mode, short) {
            (0, _) => {}
            (0x40, Ok(d)) => self.byte(d as u8),
            _ => self.dword(mem.disp as u32),
        }
    }

    /// An instruction with a register (or opcode extension) and a memory operand of `size` bytes.
    pub(super) fn mem(&mut self, size: u8, opcode: &[u8], reg: Reg, mem: Mem) {
        self.prefixes(size, reg, mem.index.map_or(0, |(i, _)| i), mem.base);
        self.bytes.extend_from_slice(opcode);
        self.modrm(reg, mem);
    }

    /// An instruction with two registers: the one of ModRM.reg (or opcode extension), and that of ModRM.rm.
    pub(super) fn reg(&mut self, size: u8, opcode: &[u8], reg: Reg, rm: Reg) {
        self.prefixes(size, reg, 0, rm);
        self.bytes.extend_from_slice(opcode);
        self.byte(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    /// Loads `size` bytes, zero-extended.
    pub(super) fn load(&mut self, size: u8, to: Reg, from: Mem) {
        match size {
            1 => self.mem(4, &[0x0f, 0xb6], to, from),
            2 => self.mem(4, &[0x0f, 0xb7], to, from),
            _ => self.mem(size, &[0x8b], to, from),
        }
    }
    /// Loads `from_size` bytes, sign-extended to `size`.
    pub(super) fn load_signed(&mut self, size: u8, from_size: u8, to: Reg, from: Mem) {
        match from_size {
            1 => self.mem(size, &[0x0f, 0xbe], to, from),
            2 => self.mem(size, &[0x0f, 0xbf], to, from),
            _ => self.mem(size, &[0x63], to, from),
        }
    }
    /// Stores the low `size` bytes.
    pub(super) fn store(&mut self, size: u8, from: Reg, to: Mem) {
        self.mem(size, if size == 1 { &[0x88] } else { &[0x89] }, from, to);
    }
    /// Stores an immediate, sign-extended from 32 bits.
    pub(super) fn store_imm(&mut self, size: u8, value: i32, to: Mem) {
        self.mem(size, if size == 1 { &[0xc6] } else { &[0xc7] }, 0, to);
        self.immediate(size, value);
    }
    /// The immediate operand that ends an instruction: at most 4 bytes.
    pub(super) fn immediate(&mut self, size: u8, value: i32) {
        match size {
            1 => self.byte(value as u8),
            2 => self.bytes.extend_from_slice(&(value as u16).to_le_bytes()),
            _ => self.dword(value as u32),
        }
    }
    /// Copies a register.
    pub(super) fn mov(&mut self, size: u8, to: Reg, from: Reg) {
        self.reg(size, if size == 1 { &[0x88] } else { &[0x89] }, from, to);
    }
    /// Loads a constant.
    pub(super) fn mov_imm(&mut self, to: Reg, value: u64) {
        if let Ok(v) = u32::try_from(value) {
            self.prefixes(4, 0, 0, to);
            self.byte(0xb8 | to & 7);
            self.dword(v);
        } else if let Ok(v) = i32::try_from(value as i64) {
            self.reg(8, &[0xc7], 0, to);
            self.dword(v as u32);
        } else {
            self.prefixes(8, 0, 0, to);
            self.byte(0xb8 | to & 7);
            self.bytes.extend_from_slice(&value.to_le_bytes());
        }
    }
    pub(super) fn lea(&mut self, size: u8, to: Reg, mem: Mem) {
        self.mem(size, &[0x8d], to, mem);
    }
    /// `op to, from` with a memory source.
    pub(super) fn alu_mem(&mut self, op: Alu, size: u8, to: Reg, from: Mem) {
        self.mem(size, &[op as u8 * 8 + if size == 1 { 2 } else { 3 }], to, from);
    }
    /// `op to, from`.
    pub(super) fn alu(&mut self, op: Alu, size: u8, to: Reg, from: Reg) {
        self.reg(size, &[op as u8 * 8 + u8::from(size != 1)], from, to);
    }
    /// `op to, value`.
    pub(super) fn alu_imm(&mut self, op: Alu, size: u8, to: Reg, value: i32) {
        if size == 1 {
            self.reg(1, &[0x80], op as u8, to);
            self.byte(value as u8);
        } else if let Ok(v) = i8::try_from(value) {
            self.reg(size, &[0x83], op as u8, to);
            self.byte(v as u8);
        } else {
            self.reg(size, &[0x81], op as u8, to);
            self.immediate(size, value);
        }
    }
    /// `op to, value` in memory.
    pub(super) fn alu_mem_imm(&mut self, op: Alu, size: u8, to: Mem, value: i32) {
        match i8::try_from(value) {
            _ if size == 1 => {
                self.mem(1, &[0x80], op as u8, to);
                self.byte(value as u8);
            }
            Ok(v) => {
                self.mem(size, &[0x83], op as u8, to);
                self.byte(v as u8);
            }
            Err(_) => {
                self.mem(size, &[0x81], op as u8, to);
                self.immediate(size, value);
            }
        }
    }
    /// A shift by a constant; `kind` is the opcode extension (4 SHL, 5 SHR, 7 SAR …).
    pub(super) fn shift(&mut self, kind: u8, size: u8, reg: Reg, count: u8) {
        self.reg(size, if size == 1 { &[0xc0] } else { &[0xc1] }, kind, reg);
        self.byte(count);
    }
    /// Puts SF, ZF, AF, PF and CF into AH and OF into AL.
    pub(super) fn flags_to_ax(&mut self) {
        self.bytes.extend_from_slice(&[0x9f, 0x0f, 0x90, 0xc0]);
    }
    /// The opposite of [`Self::flags_to_ax`].
    pub(super) fn flags_from_ax(&mut self) {
        // ADD AL, 127 overflows if the stored OF is set; SAHF does the rest.
        self.bytes.extend_from_slice(&[0x04, 0x7f, 0x9e]);
    }

    // ---- jumps ------------------------------------------------------------------------------

    fn distance(&self, target: usize) -> u32 {
        target.wrapping_sub(self.origin + self.bytes.len() + 4) as u32
    }
    /// Jumps to an address within 2 GiB.
    pub(super) fn jump_to(&mut self, target: usize) {
        self.byte(0xe9);
        let d = self.distance(target);
        self.dword(d);
    }
    /// Jumps on a condition (its encoding number) to an address within 2 GiB.
    pub(super) fn jump_if_to(&mut self, condition: u8, target: usize) {
        self.byte(0x0f);
        self.byte(0x80 | condition);
        let d = self.distance(target);
        self.dword(d);
    }
    pub(super) fn jump_if(&mut self, condition: u8) -> Jump {
        self.byte(0x0f);
        self.byte(0x80 | condition);
        self.dword(0);
        Jump(self.bytes.len())
    }
    /// Jumps back to a place emitted before.
    pub(super) fn jump_back(&mut self, to: usize) {
        self.jump_to(self.origin + to);
    }
    /// Makes a jump lead here.
    pub(super) fn land(&mut self, jump: Jump) {
        let d = (self.bytes.len() - jump.0) as u32;
        self.bytes[jump.0 - 4..jump.0].copy_from_slice(&d.to_le_bytes());
    }
    pub(super) fn jump_mem(&mut self, mem: Mem) {
        self.mem(4, &[0xff], 4, mem);
    }
    pub(super) fn call_reg(&mut self, reg: Reg) {
        self.reg(4, &[0xff], 2, reg);
    }
    pub(super) fn push(&mut self, reg: Reg) {
        self.prefixes(4, 0, 0, reg);
        self.byte(0x50 | reg & 7);
    }
    pub(super) fn pop(&mut self, reg: Reg) {
        self.prefixes(4, 0, 0, reg);
        self.byte(0x58 | reg & 7);
    }
    pub(super) fn ret(&mut self) {
        self.byte(0xc3);
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Formatter, NasmFormatter};

    use super::*;

    fn text(f: impl FnOnce(&mut Asm)) -> String {
        let mut a = Asm::default();
        a.start(0x1000);
        f(&mut a);
        let mut out = String::new();
        for i in &mut Decoder::with_ip(64, a.bytes(), 0x1000, DecoderOptions::NONE) {
            if !out.is_empty() {
                out.push_str("; ");
            }
            NasmFormatter::new().format(&i, &mut out);
        }
        out
    }

    /// What another program's decoder makes of what the encoder made.
    #[test]
    fn encodings_are_what_they_are_called() {
        let m = Mem::at(RBX, -128);
        let cases: [(&str, String); 21] = [
            ("movzx eax,byte [rbx-80h]", text(|a| a.load(1, RAX, m))),
            ("mov ecx,[r13]", text(|a| a.load(4, RCX, Mem::at(R13, 0)))),
            ("mov rdx,[r12+1000h]", text(|a| a.load(8, RDX, Mem::at(R12, 0x1000)))),
            ("mov [rsp+8],cl", text(|a| a.store(1, RCX, Mem::at(RSP, 8)))),
            ("mov rax,[rbx+rcx*8+7]", text(|a| a.load(8, RAX, Mem::indexed(RBX, RCX, 3, 7)))),
            ("movsx rcx,word [rax]", text(|a| a.load_signed(8, 2, RCX, Mem::at(RAX, 0)))),
            ("movsxd rcx,[rax]", text(|a| a.load_signed(8, 4, RCX, Mem::at(RAX, 0)))),
            ("mov word [rax],1234h", text(|a| a.store_imm(2, 0x1234, Mem::at(RAX, 0)))),
            ("mov qword [rax],0FFFFFFFFFFFFFFFEh", text(|a| a.store_imm(8, -2, Mem::at(RAX, 0)))),
            ("mov eax,5", text(|a| a.mov_imm(RAX, 5))),
            ("mov r15,0FFFFFFFFFFFFFFFFh", text(|a| a.mov_imm(R15, u64::MAX))),
            ("mov rsi,123456789ABCDEF0h", text(|a| a.mov_imm(RSI, 0x1234_5678_9abc_def0))),
            ("xor rcx,r12", text(|a| a.alu(Alu::Xor, 8, RCX, R12))),
            ("cmp cl,[rbx-80h]", text(|a| a.alu_mem(Alu::Cmp, 1, RCX, m))),
            ("sbb cx,7FFFh", text(|a| a.alu_imm(Alu::Sbb, 2, RCX, 0x7fff))),
            ("add qword [rbx-80h],4000h", text(|a| a.alu_mem_imm(Alu::Add, 8, m, 0x4000))),
            ("shr rcx,0Ch", text(|a| a.shift(5, 8, RCX, 12))),
            ("jmp qword [rax+30h]", text(|a| a.jump_mem(Mem::at(RAX, 0x30)))),
            ("jne near 0000000000000900h", text(|a| a.jump_if_to(5, 0x900))),
            (
                "push r14; pop rbp; call rax; ret",
                text(|a| {
                    a.push(R14);
                    a.pop(RBP);
                    a.call_reg(RAX);
                    a.ret();
                }),
            ),
            (
                "ja near 0000000000001008h; mov eax,ecx; mov rdi,rdx",
                text(|a| {
                    let j = a.jump_if(7);
                    a.mov(4, RAX, RCX);
                    a.land(j);
                    a.mov(8, RDI, RDX);
                }),
            ),
        ];
        for (wanted, got) in cases {
            assert_eq!(wanted, got);
        }
    }
}
