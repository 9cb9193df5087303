//! Random instructions of a given form, and random states to execute them in.

use iced_x86::{
    Code, CpuidFeature as F, Decoder, DecoderOptions, Encoder, EncodingKind, FlowControl, Instruction,
    Mnemonic as M, OpCodeOperandKind as K, OpKind, Register,
};

use crate::layout::{DATA, INSTRUCTION, READ_ONLY};
use crate::state::{Data, State};

/// SplitMix64, and the mode to make instructions for.
pub struct Random {
    /// State.
    pub seed: u64,
    /// 64 or 32.
    pub bits: u32,
}

impl Random {
    /// 64 random bits.
    pub fn next(&mut self) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.seed;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
    /// A register number that the mode has.
    fn register(&mut self) -> u64 {
        self.below(if self.bits == 64 { 16 } else { 8 })
    }
    /// One of `items`.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }
}

/// Extensions whose instructions are compared; those the host lacks fault on both sides.
fn feature_included(f: &F) -> bool {
    matches!(
        f,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::CMOV
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::FXSR
            | F::CX8
            | F::CMPXCHG16B
            | F::CLFSH
            | F::CLFLUSHOPT
            | F::CLWB
            | F::MULTIBYTENOP
            | F::PREFETCHW
            | F::PAUSE
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::GFNI
            | F::VAES
            | F::VPCLMULQDQ
            | F::AVX
            | F::AVX2
            | F::FMA
            | F::F16C
            | F::AVX_VNNI
            | F::BMI1
            | F::BMI2
            | F::ADX
            | F::POPCNT
            | F::LZCNT
            | F::MOVBE
    )
}

/// Whether the instruction is one of user mode that gives the same result wherever it runs.
pub fn included(code: Code, bits: u32) -> bool {
    let op = code.op_code();
    op.is_instruction()
        && (if bits == 64 { op.mode64() } else { op.mode32() })
        && matches!(op.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && code.cpuid_features().iter().all(feature_included)
        && code.flow_control() == FlowControl::Next
        && !op.is_privileged()
        && !op.is_input_output()
        && !excluded(code)
}

fn excluded(code: Code) -> bool {
    // Operands that only the kernel may load, and registers of the system.
    let op = code.op_code();
    let system_operand = (0..op.op_count()).any(|n| {
        matches!(op.op_kind(n), K::seg_reg | K::cr_reg | K::dr_reg | K::tr_reg)
            || matches!(op.op_kind(n), K::es | K::cs | K::ss | K::ds | K::fs | K::gs)
    });
    system_operand
        || matches!(
            code.mnemonic(),
            M::Cli
                | M::Sti
                | M::Pushf
                | M::Pushfd
                | M::Pushfq
                | M::Popf
                | M::Popfd
                | M::Popfq
                | M::Sgdt
                | M::Sidt
                | M::Sldt
                | M::Str
                | M::Smsw
                | M::Lar
                | M::Lsl
                | M::Verr
                | M::Verw
                | M::Lss
                | M::Lfs
                | M::Lgs
                | M::Cpuid
                | M::Rdtsc
                | M::Wait
                | M::Reservednop
                | M::Fstdw
                | M::Fstsg
                | M::Frstpm
                | M::Enter
                | M::Arpl
                | M::Bound
                | M::Lds
                | M::Les
                | M::Ud0
                | M::Ud1
                | M::INVALID
        )
}

const GPR: [[Register; 16]; 4] = {
    use Register::*;
    [
        [AL, CL, DL, BL, SPL, BPL, SIL, DIL, R8L, R9L, R10L, R11L, R12L, R13L, R14L, R15L],
        [AX, CX, DX, BX, SP, BP, SI, DI, R8W, R9W, R10W, R11W, R12W, R13W, R14W, R15W],
        [EAX, ECX, EDX, EBX, ESP, EBP, ESI, EDI, R8D, R9D, R10D, R11D, R12D, R13D, R14D, R15D],
        [RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15],
    ]
};

/// An instruction and where its memory operand is to be.
#[derive(Clone, Debug)]
pub struct Sample {
    /// As decoded.
    pub instruction: Instruction,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// Status flags that the SDM leaves undefined after it.
    pub undefined: u64,
}

/// FS and GS can't be used by 32-bit code in a 64-bit process; CS isn't writable.
const PREFIXES_32: [Register; 3] = [Register::ES, Register::SS, Register::DS];

fn gpr(r: &mut Random, log: usize) -> Register {
    if log == 0 && r.one_in(4) {
        return r.pick(&[Register::AH, Register::CH, Register::DH, Register::BH]);
    }
    let n = r.register() as usize;
    // Without REX there are no byte registers 4 to 7.
    GPR[log][if r.bits == 32 && log == 0 { n & 3 } else { n }]
}

fn memory(r: &mut Random, i: &mut Instruction, vsib: Option<Register>) {
    if r.bits == 32 && vsib.is_none() && r.one_in(12) {
        i.set_memory_base(r.pick(&[Register::BX, Register::SI, Register::DI, Register::BP]));
        i.set_memory_displ_size(2);
        i.set_memory_displacement64(r.below(0x10000));
        return;
    }
    let wide = r.bits == 64 && !r.one_in(12);
    let row = if wide { 3 } else { 2 };
    if r.bits == 64 && vsib.is_none() && r.one_in(8) {
        i.set_memory_base(Register::RIP);
        i.set_memory_displ_size(8);
        i.set_memory_displacement64(address(r, 64));
        return;
    }
    let base = r.register() as usize;
    i.set_memory_base(GPR[row][base]);
    match vsib {
        Some(first) => {
            i.set_memory_index(first + r.register() as u32);
            i.set_memory_index_scale(1 << r.below(4));
        }
        None if r.one_in(3) => {
            let index = r.register() as usize;
            if index != 4 && index != base {
                i.set_memory_index(GPR[row][index]);
                i.set_memory_index_scale(1 << r.below(4));
            }
        }
        None => {}
    }
    match r.below(3) {
        0 => {}
        1 => {
            i.set_memory_displ_size(1);
            i.set_memory_displacement64(r.next() as i8 as u64);
        }
        _ => {
            i.set_memory_displ_size(if wide { 8 } else { 4 });
            let d = r.next() as i32 as i64 as u64;
            i.set_memory_displacement64(if wide { d } else { d as u32 as u64 });
        }
    }
    if r.one_in(10) {
        i.set_segment_prefix(r.pick(if r.bits == 64 {
            &[Register::GS, Register::CS, Register::SS, Register::DS]
        } else {
            &PREFIXES_32
        }));
    }
}

/// A random instruction of the form, if one can be encoded.
pub fn sample(r: &mut Random, code: Code) -> Option<Sample> {
    let mut i = Instruction::default();
    i.set_code(code);
    let op = code.op_code();
    let as_register = r.one_in(2);
    for n in 0..op.op_count() {
        let register = |i: &mut Instruction, r: Register| {
            i.set_op_kind(n, OpKind::Register);
            i.set_op_register(n, r);
        };
        let xmm = |r: &mut Random| Register::XMM0 + r.register() as u32;
        let ymm = |r: &mut Random| Register::YMM0 + r.register() as u32;
        let mm = |r: &mut Random| Register::MM0 + r.below(8) as u32;
        match op.op_kind(n) {
            K::r8_or_mem if as_register => register(&mut i, gpr(r, 0)),
            K::r16_or_mem if as_register => register(&mut i, gpr(r, 1)),
            K::r32_or_mem if as_register => register(&mut i, gpr(r, 2)),
            K::r64_or_mem if as_register => register(&mut i, gpr(r, 3)),
            K::mm_or_mem if as_register => register(&mut i, mm(r)),
            K::xmm_or_mem if as_register => register(&mut i, xmm(r)),
            K::ymm_or_mem if as_register => register(&mut i, ymm(r)),
            K::mem
            | K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem => {
                i.set_op_kind(n, OpKind::Memory);
                memory(r, &mut i, None);
            }
            K::mem_vsib32x | K::mem_vsib64x => {
                i.set_op_kind(n, OpKind::Memory);
                memory(r, &mut i, Some(Register::XMM0));
            }
            K::mem_vsib32y | K::mem_vsib64y => {
                i.set_op_kind(n, OpKind::Memory);
                memory(r, &mut i, Some(Register::YMM0));
            }
            K::mem_offs => {
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_displ_size(r.bits / 8);
                i.set_memory_displacement64(address(r, 8));
            }
            K::r8_reg | K::r8_opcode => register(&mut i, gpr(r, 0)),
            K::r16_reg | K::r16_rm | K::r16_opcode => register(&mut i, gpr(r, 1)),
            K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => register(&mut i, gpr(r, 2)),
            K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => register(&mut i, gpr(r, 3)),
            K::mm_reg | K::mm_rm => register(&mut i, mm(r)),
            K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => register(&mut i, xmm(r)),
            K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => register(&mut i, ymm(r)),
            K::al => register(&mut i, Register::AL),
            K::cl => register(&mut i, Register::CL),
            K::ax => register(&mut i, Register::AX),
            K::dx => register(&mut i, Register::DX),
            K::eax => register(&mut i, Register::EAX),
            K::rax => register(&mut i, Register::RAX),
            K::st0 => register(&mut i, Register::ST0),
            K::sti_opcode => register(&mut i, Register::ST0 + r.below(8) as u32),
            K::imm8 => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8(r.next() as u8);
            }
            K::imm8_const_1 => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8(1);
            }
            K::imm8sex16 => {
                i.set_op_kind(n, OpKind::Immediate8to16);
                i.set_immediate8to16(r.next() as i8 as i16);
            }
            K::imm8sex32 => {
                i.set_op_kind(n, OpKind::Immediate8to32);
                i.set_immediate8to32(r.next() as i8 as i32);
            }
            K::imm8sex64 => {
                i.set_op_kind(n, OpKind::Immediate8to64);
                i.set_immediate8to64(r.next() as i8 as i64);
            }
            K::imm16 => {
                i.set_op_kind(n, OpKind::Immediate16);
                i.set_immediate16(r.next() as u16);
            }
            K::imm32 => {
                i.set_op_kind(n, OpKind::Immediate32);
                i.set_immediate32(r.next() as u32);
            }
            K::imm32sex64 => {
                i.set_op_kind(n, OpKind::Immediate32to64);
                i.set_immediate32to64(r.next() as i32 as i64);
            }
            K::imm64 => {
                i.set_op_kind(n, OpKind::Immediate64);
                i.set_immediate64(r.next());
            }
            K::seg_rSI if r.bits == 32 => i.set_op_kind(n, OpKind::MemorySegESI),
            K::es_rDI if r.bits == 32 => i.set_op_kind(n, OpKind::MemoryESEDI),
            K::seg_rDI if r.bits == 32 => i.set_op_kind(n, OpKind::MemorySegEDI),
            K::seg_rSI => i.set_op_kind(n, OpKind::MemorySegRSI),
            K::es_rDI => i.set_op_kind(n, OpKind::MemoryESRDI),
            K::seg_rDI => i.set_op_kind(n, OpKind::MemorySegRDI),
            K::seg_rBX_al => {
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_base(if r.bits == 64 { Register::RBX } else { Register::EBX });
                i.set_memory_index(Register::AL);
            }
            _ => return None,
        }
    }
    if op.can_use_lock_prefix() && i.op0_kind() == OpKind::Memory && r.one_in(4) {
        i.set_has_lock_prefix(true);
    }
    if is_string(&i) && r.one_in(2) {
        if r.one_in(2) {
            i.set_has_repe_prefix(true);
        } else if op.can_use_repne_prefix() {
            i.set_has_repne_prefix(true);
        }
    }
    let mut encoder = Encoder::new(r.bits);
    encoder.encode(&i, INSTRUCTION).ok()?;
    let bytes = encoder.take_buffer();
    let instruction = Decoder::with_ip(r.bits, &bytes, INSTRUCTION, DecoderOptions::NONE).decode();
    if instruction.is_invalid() || instruction.len() != bytes.len() {
        return None;
    }
    let undefined = rflags(instruction.rflags_undefined());
    Some(Sample { instruction, bytes, undefined })
}

/// iced's flag set as RFLAGS bits.
fn rflags(bits: u32) -> u64 {
    use iced_x86::RflagsBits as B;
    [(B::CF, 0), (B::PF, 2), (B::AF, 4), (B::ZF, 6), (B::SF, 7), (B::OF, 11)]
        .iter()
        .filter(|(b, _)| bits & b != 0)
        .fold(0, |set, (_, n)| set | 1 << n)
}

/// Whether the instruction uses RSI or RDI as string instructions do.
pub fn is_string(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| {
        matches!(
            i.op_kind(n),
            OpKind::MemorySegRSI
                | OpKind::MemoryESRDI
                | OpKind::MemorySegRDI
                | OpKind::MemorySegESI
                | OpKind::MemoryESEDI
                | OpKind::MemorySegEDI
        )
    })
}

/// An address for an operand of `size` bytes: mostly inside the data, aligned or not, also
/// across pages, read-only, not present, not canonical.
fn address(r: &mut Random, size: u64) -> u64 {
    let size = size.max(1);
    match r.below(32) {
        0..8 => DATA + r.below(0x2000 / 64 - 2) * 64,
        8..16 => DATA + r.below(0x2000 - size.min(0x400)),
        16..24 => DATA + r.below(0x2000 - size.min(0x400)) / 16 * 16,
        24..27 => DATA + 0x1000 - r.below(size + 1),
        27 => DATA + 0x2000 - r.below(size + 1),
        28 => READ_ONLY + r.below(0x800),
        29 => DATA + 0x2000 + r.below(0x800),
        30 => READ_ONLY - r.below(size + 1),
        _ => DATA + r.below(0x1000),
    }
}

fn integer(r: &mut Random) -> u64 {
    match r.below(8) {
        0 => r.below(4),
        1 => r.below(70),
        2 => 1 << r.below(64),
        3 => (1 << r.below(64)) - 1,
        4 => u64::MAX - r.below(4),
        5 => r.pick(&[0x80, 0x8000, 0x8000_0000, 1 << 63, 0x7f, 0x7fff, 0x7fff_ffff, i64::MAX as u64]),
        _ => r.next(),
    }
}

const F32: [u32; 14] = [
    0,
    0x8000_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0x7f80_0001,
    1,
    0x0080_0000,
    0x7f7f_ffff,
    0x4f00_0000,
    0x3fc0_0000,
    0x807f_ffff,
];
const F64: [u64; 14] = [
    0,
    1 << 63,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0x7ff0_0000_0000_0001,
    1,
    0x0010_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0x43e0_0000_0000_0000,
    0x3ff8_0000_0000_0000,
    0x800f_ffff_ffff_ffff,
];

fn float32(r: &mut Random) -> u64 {
    let v = match r.below(4) {
        0 => r.pick(&F32),
        1 => (r.next() as i16 as f32 / 8.0).to_bits(),
        2 => r.next() as u32 & 0x807f_ffff | (0x60 + r.below(0x40) as u32) << 23,
        _ => r.next() as u32,
    };
    v.into()
}

/// A random vector lane: integer, one double or two singles.
pub fn lane(r: &mut Random) -> u64 {
    match r.below(6) {
        0 => integer(r),
        1 => r.pick(&F64),
        2 => (r.next() as i32 as f64 / 16.0).to_bits(),
        3 => r.next(),
        _ => float32(r) << 32 | float32(r),
    }
}

fn extended(r: &mut Random) -> [u8; 10] {
    let (mantissa, exponent): (u64, u16) = match r.below(8) {
        0 => (0, r.pick(&[0, 0x8000])),
        1 => (1 << 63, r.pick(&[0x7fff, 0xffff])),
        2 => (r.next() | 1 << 63, 0x7fff),
        3 => (r.next(), 0),
        4 => (r.next(), r.next() as u16),
        5 => (1 << 63, 0x3fff),
        6 => ((r.next() as u16 as u64 | 1) << 48 | 1 << 63, 0x3fff + r.below(20) as u16),
        _ => (r.next() | 1 << 63, (0x3fff - 40 + r.below(80) as u16) | (r.next() as u16 & 0x8000)),
    };
    let mut b = [0; 10];
    b[..8].copy_from_slice(&mantissa.to_le_bytes());
    b[8..].copy_from_slice(&exponent.to_le_bytes());
    b
}

fn x87(r: &mut Random) -> [u8; 160] {
    let mut x = [0; 160];
    let masks = if r.one_in(4) { r.next() as u16 & 0x3f } else { 0x3f };
    let control = 0x40 | masks | r.pick(&[0u16, 0x200, 0x300, 0x300]) | (r.below(4) as u16) << 10;
    let mut status = (r.next() as u16) & 0x7f00;
    if r.one_in(3) {
        status |= r.next() as u16 & 0x7f;
    }
    if status & !control & 0x3f != 0 {
        status |= 0x8080;
    }
    x[..2].copy_from_slice(&control.to_le_bytes());
    x[2..4].copy_from_slice(&status.to_le_bytes());
    x[4] = if r.one_in(3) { r.next() as u8 } else { 0xff };
    for n in 0..8 {
        x[32 + 16 * n..][..10].copy_from_slice(&extended(r));
    }
    x
}

/// Fills data with random lanes.
pub fn fill(r: &mut Random, data: &mut Data) {
    for (n, chunk) in data.chunks_exact_mut(8).enumerate() {
        chunk.copy_from_slice(&lane(r).to_le_bytes());
        if n % 16 == 0 {
            chunk.copy_from_slice(&extended(r)[2..]);
        }
    }
}

fn index_of(r: Register) -> usize {
    r.full_register().number()
}

/// A random state for the instruction.
pub fn state(r: &mut Random, s: &Sample) -> State {
    let mut state = wide_state(r, s);
    if r.bits == 32 {
        state.gpr.iter_mut().for_each(|v| *v = *v as u32 as u64);
        state.gpr[8..].fill(0);
        state.vectors[8..].fill([0; 4]);
    }
    state
}

fn wide_state(r: &mut Random, s: &Sample) -> State {
    let i = &s.instruction;
    let mut state = State {
        gpr: std::array::from_fn(|_| integer(r)),
        rflags: r.next() & crate::STATUS,
        vectors: std::array::from_fn(|_| std::array::from_fn(|_| lane(r))),
        x87: x87(r),
        mxcsr: 0x1f80,
    };
    if r.one_in(2) {
        state.mxcsr |= r.next() as u32 & 0xe07f;
    }
    if r.one_in(6) {
        state.mxcsr &= !(r.next() as u32 & 0x1f80);
    }
    let size = i.memory_size().size() as u64;
    if is_string(i) {
        if r.one_in(4) {
            state.rflags |= 1 << 10;
        }
        state.gpr[1] = r.below(40);
        state.gpr[6] = address(r, 64);
        state.gpr[7] = address(r, 64);
        return state;
    }
    if i.is_stack_instruction() {
        state.gpr[4] = address(r, 8);
        state.gpr[5] = address(r, 8);
    }
    if i.mnemonic() == M::Xlatb {
        state.gpr[3] = address(r, 256);
        return state;
    }
    // Bit strings reach as far as the register says.
    if matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc) && i.op1_kind() == OpKind::Register {
        let n = index_of(i.op1_register());
        state.gpr[n] = (r.below(0x4000) as i64 - 0x2000) as u64;
    }
    let base = i.memory_base();
    if !(0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) || !base.is_gpr() {
        return state;
    }
    if i.is_vsib() {
        let v = &mut state.vectors[i.memory_index().number()];
        for lane in v.iter_mut() {
            *lane = if i.is_vsib64() {
                (r.below(0x180) as i64 - 0x40) as u64
            } else {
                (r.below(0x180) as i32 - 0x40) as u32 as u64 | r.below(0x180) << 32
            };
        }
        let far = if r.one_in(4) { 0x2000 } else { 0x1000 };
        let target = DATA + 0x200 + r.below(far);
        state.gpr[index_of(base)] = target.wrapping_sub(i.memory_displacement64());
        return state;
    }
    let mut target = address(r, size);
    if r.one_in(200) && base.is_gpr64() {
        target = r.next() | 1 << 63 & !(1 << 62);
        target &= !(1 << 62);
    }
    let index = i.memory_index();
    let offset = if index == Register::None || !index.is_gpr() {
        0
    } else {
        let v = state.gpr[index_of(index)];
        let v = if index.is_gpr32() { v as u32 as u64 } else { v };
        v.wrapping_mul(i.memory_index_scale().into())
    };
    let value = target.wrapping_sub(offset).wrapping_sub(i.memory_displacement64());
    state.gpr[index_of(base)] = value;
    state
}
