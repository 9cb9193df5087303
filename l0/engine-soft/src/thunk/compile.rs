//! Makes the machine code of a thunk.
//!
//! A thunk is `extern "sysv64" fn(regs, fpu, memory, flags)`: it loads the guest registers that the
//! instruction reads, executes the instruction itself with its memory operand replaced by
//! `[memory]`, and stores what it wrote. Guest registers live in the host registers of the
//! same number, so that implicit operands need no care; only RSP is renamed.

use std::mem::offset_of;

use crate::operand::has_memory;
use engine::FpuState;
use iced_x86::{
    Code, CodeSize, Encoder, EncodingKind, IcedError, Instruction, InstructionInfoFactory, MemoryOperand,
    OpAccess, OpKind, Register, RflagsBits,
};

/// The status flags as iced names them.
const STATUS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;
/// MXCSR that the host's own code runs with: everything masked, round to nearest.
const HOST_MXCSR: u32 = 0x1f80;
/// Registers that a callee must preserve (SysV x86-64 ABI), by number.
const CALLEE_SAVED: u16 = 1 << 3 | 1 << 5 | 0xf000;

const X87: i64 = offset_of!(FpuState, x87) as i64;
const VECTORS: i64 = offset_of!(FpuState, vectors) as i64;
const MXCSR: i64 = offset_of!(FpuState, mxcsr) as i64;

/// Which state beyond general registers and flags an instruction works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Uses {
    /// The x87 stack, control and status.
    pub x87: bool,
    /// MMX registers.
    pub mmx: bool,
    /// MXCSR: its control bits matter or its flags may change.
    pub mxcsr: bool,
}

const GPR64: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

/// Registers that an instruction reads and writes, as bit sets by number.
#[derive(Debug, Default)]
struct Used {
    gpr_read: u16,
    gpr_written: u16,
    vector_read: u16,
    vector_written: u16,
    mmx: u8,
    mmx_written: u8,
    ymm: bool,
    /// AH, CH, DH or BH is an operand: no REX prefix, so only registers below 8.
    high_byte: bool,
}

/// Compiles thunks; keeps the encoder's buffers.
pub(super) struct Compiler {
    encoder: Encoder,
    info: InstructionInfoFactory,
}

impl std::fmt::Debug for Compiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compiler")
    }
}

impl Compiler {
    pub(super) fn new() -> Self {
        Self { encoder: Encoder::new(64), info: InstructionInfoFactory::new() }
    }

    /// The code of the thunk for `i`.
    ///
    /// # Errors
    /// The encoder's, for an instruction without a form in 64-bit mode.
    pub(super) fn compile(&mut self, i: &Instruction, uses: Uses) -> Result<Vec<u8>, IcedError> {
        let mut code = normalised(i);
        let vex = code.op_code().encoding() == EncodingKind::VEX;
        let used = self.used(&code, vex);
        let touched = used.gpr_read | used.gpr_written;
        // RSP is the host's stack pointer while the thunk runs.
        let mut taken = touched | 1 << 4;
        let stand_in = if touched & 1 << 4 != 0 {
            let r =
                pick(&mut taken, if used.high_byte { &[6, 7, 3, 5] } else { &[0, 1, 2, 6, 7, 8, 9, 10, 11] });
            rename_rsp(&mut code, r);
            Some(r)
        } else {
            None
        };
        let host = |n: usize| if n == 4 { stand_in.unwrap_or(4) } else { n };

        let regs = pick(&mut taken, &[7, 8, 9, 10, 11, 3, 12, 13]);
        let fpu = pick(&mut taken, &[6, 8, 9, 10, 11, 3, 12, 13]);
        let flags = pick(&mut taken, &[1, 8, 9, 10, 11, 3, 12, 13]);
        let memory =
            pick(&mut taken, if used.high_byte { &[2, 3, 1, 6, 7] } else { &[2, 8, 9, 10, 11, 3, 14, 15] });
        let saved: Vec<usize> = (0..16).filter(|n| taken & CALLEE_SAVED & 1 << n != 0).collect();

        let flags_used = code.rflags_read() & STATUS != 0;
        let flags_modified = code.rflags_modified() & STATUS != 0;

        for &n in &saved {
            self.emit(Instruction::with1(Code::Push_r64, GPR64[n])?)?;
        }
        // A target is either the incoming register or one that carries no argument;
        // `memory` first, because it may take an argument register that is free by then.
        for (to, from) in [(regs, 7), (fpu, 6), (flags, 1), (memory, 2)] {
            if to != from {
                self.emit(Instruction::with2(Code::Mov_r64_rm64, GPR64[to], GPR64[from])?)?;
            }
        }
        let at = |base: usize, displacement: i64| MemoryOperand::with_base_displ(GPR64[base], displacement);
        if flags_used || flags_modified {
            // OF is bit 0: adding 127 overflows if it is set. SAHF does the rest.
            self.emit(Instruction::with2(Code::Movzx_r32_rm16, Register::EAX, at(flags, 0))?)?;
            self.emit(Instruction::with2(Code::Add_AL_imm8, Register::AL, 0x7f)?)?;
            self.emit(Instruction::with(Code::Sahf))?;
        }
        if uses.x87 {
            // FXRSTOR loads MXCSR too and faults on reserved bits.
            self.emit(Instruction::with2(Code::Mov_rm32_imm32, at(fpu, X87 + 24), HOST_MXCSR)?)?;
            self.emit(Instruction::with1(Code::Fxrstor64_m512byte, at(fpu, X87))?)?;
        }
        if uses.mxcsr {
            self.emit(Instruction::with1(Code::Ldmxcsr_m32, at(fpu, MXCSR))?)?;
        }
        for n in bits(used.vector_read) {
            let from = at(fpu, VECTORS + 32 * n as i64);
            self.emit(if used.ymm {
                Instruction::with2(Code::VEX_Vmovups_ymm_ymmm256, ymm(n), from)?
            } else if vex {
                Instruction::with2(Code::VEX_Vmovups_xmm_xmmm128, xmm(n), from)?
            } else {
                Instruction::with2(Code::Movups_xmm_xmmm128, xmm(n), from)?
            })?;
        }
        for n in bits(used.mmx.into()) {
            self.emit(Instruction::with2(Code::Movq_mm_mmm64, mm(n), at(fpu, X87 + 32 + 16 * n as i64))?)?;
        }
        for n in bits(used.gpr_read) {
            self.emit(Instruction::with2(Code::Mov_r64_rm64, GPR64[host(n)], at(regs, 8 * n as i64))?)?;
        }

        if has_memory(&code) {
            code.set_memory_base(GPR64[memory]);
        }
        self.emit(code)?;

        for n in bits(used.gpr_written) {
            self.emit(Instruction::with2(Code::Mov_rm64_r64, at(regs, 8 * n as i64), GPR64[host(n)])?)?;
        }
        for n in bits(used.vector_written) {
            let to = at(fpu, VECTORS + 32 * n as i64);
            // A VEX-encoded instruction zeroes its destination above what it computes,
            // a legacy one keeps it (SDM Vol. 1 §14.4.1).
            self.emit(if vex {
                Instruction::with2(Code::VEX_Vmovups_ymmm256_ymm, to, ymm(n))?
            } else {
                Instruction::with2(Code::Movups_xmmm128_xmm, to, xmm(n))?
            })?;
        }
        for n in bits(used.mmx_written.into()) {
            let slot = X87 + 32 + 16 * n as i64;
            self.emit(Instruction::with2(Code::Movq_mmm64_mm, at(fpu, slot), mm(n))?)?;
            self.emit(Instruction::with2(Code::Mov_rm16_imm16, at(fpu, slot + 8), 0xffff)?)?;
        }
        if flags_modified {
            self.emit(Instruction::with(Code::Lahf))?;
            self.emit(Instruction::with1(Code::Seto_rm8, Register::AL)?)?;
            self.emit(Instruction::with2(Code::Mov_rm16_r16, at(flags, 0), Register::AX)?)?;
        }
        if uses.x87 {
            self.emit(Instruction::with1(Code::Fxsave64_m512byte, at(fpu, X87))?)?;
            self.emit(Instruction::with(Code::Fninit))?;
        }
        if uses.mxcsr {
            self.emit(Instruction::with1(Code::Stmxcsr_m32, at(fpu, MXCSR))?)?;
            self.emit(Instruction::with2(Code::Mov_rm32_imm32, at(4, -8), HOST_MXCSR)?)?;
            self.emit(Instruction::with1(Code::Ldmxcsr_m32, at(4, -8))?)?;
        }
        if uses.mmx {
            self.emit(Instruction::with(Code::Emms))?;
        }
        if used.ymm {
            self.emit(Instruction::with(Code::VEX_Vzeroupper))?;
        }
        for &n in saved.iter().rev() {
            self.emit(Instruction::with1(Code::Pop_r64, GPR64[n])?)?;
        }
        self.emit(Instruction::with(Code::Retnq))?;
        Ok(self.encoder.take_buffer())
    }

    fn emit(&mut self, i: Instruction) -> Result<(), IcedError> {
        // No operand is RIP-relative, so that the address doesn't matter.
        let r = self.encoder.encode(&i, 0);
        if r.is_err() {
            drop(self.encoder.take_buffer());
        }
        r.map(|_| ())
    }

    fn used(&mut self, i: &Instruction, vex: bool) -> Used {
        let mut u = Used::default();
        for n in 0..i.op_count() {
            if i.op_kind(n) == OpKind::Register {
                let r = i.op_register(n);
                u.ymm |= r.is_ymm();
                u.high_byte |= matches!(r, Register::AH | Register::CH | Register::DH | Register::BH);
            }
        }
        for r in self.info.info(i).used_registers() {
            let (read, written) = access(r.access());
            let register = r.register();
            let n = register.full_register().number();
            if register.is_gpr() {
                // A narrow or conditional write keeps the rest of the register.
                let keeps = register.size() < 4 || r.access() != OpAccess::Write;
                u.gpr_read |= u16::from(read || keeps) << n;
                u.gpr_written |= u16::from(written) << n;
            } else if register.is_vector_register() {
                let keeps = !vex || r.access() != OpAccess::Write;
                u.vector_read |= u16::from(read || keeps) << n;
                u.vector_written |= u16::from(written) << n;
            } else if register.is_mm() {
                u.mmx |= 1 << register.number();
                u.mmx_written |= u8::from(written) << register.number();
            }
        }
        u
    }
}

/// Whether an access reads and whether it writes.
fn access(a: OpAccess) -> (bool, bool) {
    match a {
        OpAccess::Read | OpAccess::CondRead => (true, false),
        OpAccess::Write | OpAccess::CondWrite => (false, true),
        OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
        OpAccess::None | OpAccess::NoMemAccess => (false, false),
    }
}

/// Takes the first register of `candidates` that is free. There are always enough: an
/// instruction names at most five general registers.
fn pick(taken: &mut u16, candidates: &[usize]) -> usize {
    let free = candidates.iter().copied().find(|n| *taken & 1 << n == 0);
    let n = free.or_else(|| (0..16).find(|n| *taken & 1 << n == 0)).unwrap_or(15);
    *taken |= 1 << n;
    n
}

fn bits(set: u16) -> impl Iterator<Item = usize> {
    (0..16).filter(move |n| set & 1 << n != 0)
}

fn xmm(n: usize) -> Register {
    Register::XMM0 + n as u32
}

fn ymm(n: usize) -> Register {
    Register::YMM0 + n as u32
}

fn mm(n: usize) -> Register {
    Register::MM0 + n as u32
}

/// Puts `to` in place of RSP, ESP, SP and SPL among the operands.
fn rename_rsp(i: &mut Instruction, to: usize) {
    let full = GPR64[to];
    for n in 0..i.op_count() {
        if i.op_kind(n) == OpKind::Register {
            let r = match i.op_register(n) {
                Register::RSP => full,
                Register::ESP => full.full_register32(),
                Register::SP => Register::AX + to as u32,
                Register::SPL => {
                    if to < 4 {
                        Register::AL + to as u32
                    } else {
                        Register::SPL + (to as u32 - 4)
                    }
                }
                _ => continue,
            };
            i.set_op_register(n, r);
        }
    }
}

/// The instruction as a thunk holds it: without address, prefixes that only matter to the
/// address, and forms that 64-bit mode lacks.
pub(super) fn normalised(i: &Instruction) -> Instruction {
    let mut i = *i;
    i.set_ip(0);
    i.set_next_ip(0);
    i.set_code_size(CodeSize::Code64);
    if has_memory(&i) {
        i.set_memory_base(Register::None);
        i.set_memory_index(Register::None);
        i.set_memory_index_scale(1);
        i.set_memory_displacement64(0);
        i.set_memory_displ_size(0);
    }
    i.set_segment_prefix(Register::None);
    i.set_has_repe_prefix(false);
    i.set_has_repne_prefix(false);
    i.set_has_xacquire_prefix(false);
    i.set_has_xrelease_prefix(false);
    i.set_code(match i.code() {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        c => c,
    });
    i
}
