//! x87 instructions that are done in Rust: control and status words, environment and
//! state images; and what surrounds the others, which thunks execute.
//!
//! The state is kept in FXSAVE64 format (SDM Vol. 1 table 10-2): registers in stack order,
//! tags abridged. FCS and FDS are deprecated (CPUID.7.0:EBX\[13\]) and read as zero.

use engine::FpuState;
use iced_x86::{Code, Encoder, Instruction};
use x86_spec::exception;
use x86_spec::reg::cr0;

use crate::cpu::{Access, Cpu, Exec};
use crate::op::{Op, SimpleFn};

/// Exception summary, in the status word's low byte.
pub(super) const ES: u8 = 0x80;

/// Offsets in the FXSAVE64 image.
const FCW: usize = 0;
const FSW: usize = 2;
const FTW: usize = 4;
const FOP: usize = 6;
const FIP: usize = 8;
const FDP: usize = 16;
const ST: usize = 32;

/// B and ES in the status word.
const SUMMARY: u16 = 0x8080;
/// TOP in the status word.
const TOP: u16 = 7 << 11;

impl Image<'_> {
    fn word(&self, at: usize) -> u16 {
        let mut b = [0; 2];
        b.copy_from_slice(&self.0.x87.0[at..at + 2]);
        u16::from_le_bytes(b)
    }
    fn set_word(&mut self, at: usize, value: u16) {
        self.0.x87.0[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    fn quad(&self, at: usize) -> u64 {
        let mut b = [0; 8];
        b.copy_from_slice(&self.0.x87.0[at..at + 8]);
        u64::from_le_bytes(b)
    }
    fn set_quad(&mut self, at: usize, value: u64) {
        self.0.x87.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    fn top(&self) -> usize {
        usize::from((self.word(FSW) & TOP) >> 11)
    }
    /// Turns the stack-ordered registers by `by` places.
    fn rotate(&mut self, by: usize) {
        self.0.x87.0[ST..ST + 128].rotate_left(16 * (by & 7));
    }
    /// Sets the control word; reserved bits read as on the processor.
    fn set_control(&mut self, value: u16) {
        self.set_word(FCW, value & 0x1f3f | 0x40);
        self.update_summary();
    }
    /// Recomputes ES and B from flags and masks (SDM Vol. 1 §8.1.3.3).
    fn update_summary(&mut self) {
        let (status, control) = (self.word(FSW), self.word(FCW));
        let pending = status & !control & 0x3f != 0;
        self.set_word(FSW, status & !SUMMARY | if pending { SUMMARY } else { 0 });
    }
    /// FNINIT (SDM Vol. 2A): the registers keep their places while TOP becomes 0.
    fn init(&mut self) {
        self.rotate(8 - self.top());
        self.set_word(FCW, 0x37f);
        self.set_word(FSW, 0);
        self.0.x87.0[FTW] = 0;
        self.set_word(FOP, 0);
        self.set_quad(FIP, 0);
        self.set_quad(FDP, 0);
    }
    /// The full tag word (SDM Vol. 1 §8.1.7, §10.5.1.1).
    fn full_tags(&self) -> u16 {
        let top = self.top();
        (0..8).fold(0, |tags, physical| {
            let tag = if self.0.x87.0[FTW] & 1 << physical == 0 {
                3
            } else {
                let at = ST + 16 * ((physical + 8 - top) & 7);
                let (mantissa, exponent) = (self.quad(at), self.word(at + 8) & 0x7fff);
                match (exponent, mantissa) {
                    (0, 0) => 1,
                    (0 | 0x7fff, _) => 2,
                    (_, m) if m >> 63 == 0 => 2,
                    _ => 0,
                }
            };
            tags | tag << (2 * physical)
        })
    }
    fn set_full_tags(&mut self, tags: u16) {
        let abridged = (0..8).filter(|n| tags >> (2 * n) & 3 != 3).fold(0, |t, n| t | 1 << n);
        self.0.x87.0[FTW] = abridged;
    }
}

/// Access to the x87 part of the state.
struct Image<'a>(&'a mut FpuState);

fn image(cpu: &mut Cpu) -> Image<'_> {
    Image(&mut cpu.fpu)
}

/// Whether the x87 state is the one that FNINIT leaves, registers included.
pub(super) fn is_initial(fpu: &FpuState) -> bool {
    let x = &fpu.x87.0;
    x[..ST].iter().enumerate().all(|(n, b)| match n {
        0 => *b == 0x7f,
        1 => *b == 0x03,
        24..32 => true,
        _ => *b == 0,
    }) && x[ST..ST + 128].iter().all(|b| *b == 0)
}

/// Sets the x87 part to its initial state for XRSTOR (SDM Vol. 1 §13.6).
pub(super) fn reset(fpu: &mut FpuState) {
    let mut i = Image(fpu);
    i.init();
    i.0.x87.0[ST..ST + 128].fill(0);
}

/// Loads the x87 part from bytes 0–159 of an FXSAVE or XSAVE image.
pub(super) fn load(fpu: &mut FpuState, area: &[u8; 160], wide: bool) {
    let mut i = Image(fpu);
    i.0.x87.0[FSW..FSW + 2].copy_from_slice(&area[FSW..FSW + 2]);
    i.0.x87.0[FTW] = area[FTW];
    i.0.x87.0[FOP] = area[FOP];
    i.0.x87.0[FOP + 1] = area[FOP + 1] & 7;
    let width = if wide { 8 } else { 4 };
    for at in [FIP, FDP] {
        i.set_quad(at, 0);
        i.0.x87.0[at..at + width].copy_from_slice(&area[at..at + width]);
    }
    for n in 0..8 {
        let at = ST + 16 * n;
        i.0.x87.0[at..at + 10].copy_from_slice(&area[at..at + 10]);
    }
    i.set_control(u16::from_le_bytes([area[FCW], area[FCW + 1]]));
}

/// Bytes 0–23 and the registers of an FXSAVE or XSAVE image.
pub(super) fn store(fpu: &FpuState, area: &mut [u8; 160], wide: bool) {
    let x = &fpu.x87.0;
    area[..8].copy_from_slice(&x[..8]);
    area[FTW + 1] = 0;
    let width = if wide { 8 } else { 4 };
    for at in [FIP, FDP] {
        area[at..at + 8].fill(0);
        area[at..at + width].copy_from_slice(&x[at..at + width]);
    }
    for n in 0..8 {
        let at = ST + 16 * n;
        area[at..at + 10].copy_from_slice(&x[at..at + 10]);
        area[at + 10..at + 16].fill(0);
    }
}

/// Enters MMX state: top of stack 0, all registers valid (SDM Vol. 1 §9.5.1).
#[inline]
pub(super) fn enter_mmx(fpu: &mut FpuState) {
    let mut i = Image(fpu);
    let top = i.top();
    if top != 0 {
        // Register n becomes the nth of the stack.
        i.rotate(8 - top);
        let status = i.word(FSW) & !TOP;
        i.set_word(FSW, status);
    }
    i.0.x87.0[FTW] = 0xff;
}

/// An MMX register.
pub(super) fn mmx(fpu: &FpuState, n: usize) -> [u8; 8] {
    let x = &fpu.x87.0;
    let top = usize::from(x[FSW + 1] >> 3 & 7);
    let mut b = [0; 8];
    b.copy_from_slice(&x[ST + 16 * ((n + 8 - top) & 7)..][..8]);
    b
}

/// EMMS: all registers empty.
pub(super) fn leave_mmx(fpu: &mut FpuState) {
    enter_mmx(fpu);
    fpu.x87.0[FTW] = 0;
}

/// Whether an exception that keeps a store from being made may be reported: invalid,
/// overflow or underflow is unmasked.
pub(super) fn store_may_be_kept(fpu: &FpuState) -> bool {
    !fpu.x87.0[FCW] & KEEPS_STORE != 0
}

/// Whether such an exception is pending.
pub(super) fn store_kept(fpu: &FpuState) -> bool {
    fpu.x87.0[FSW] & !fpu.x87.0[FCW] & KEEPS_STORE != 0
}

/// IE, OE, UE.
const KEEPS_STORE: u8 = 1 << 0 | 1 << 3 | 1 << 4;

/// The last-instruction pointers before a thunk runs.
#[derive(Clone, Copy)]
pub(super) struct Pointers {
    instruction: u64,
    data: u64,
}

/// The last-instruction pointers now.
pub(super) fn pointers(fpu: &mut FpuState) -> Pointers {
    let i = Image(fpu);
    Pointers { instruction: i.quad(FIP), data: i.quad(FDP) }
}

/// Where the host noted its own addresses as last instruction and operand, puts the guest's
/// (SDM Vol. 1 §8.1.8). What was noted and when is the host's rule.
pub(super) fn set_pointers(cpu: &mut Cpu, op: &Op, before: Pointers, linear: u64) {
    let now = pointers(&mut cpu.fpu);
    let mask = cpu.ip_mask();
    if now.instruction != before.instruction {
        let ip = cpu.rip().wrapping_add(op.offset as u64) & mask;
        image(cpu).set_quad(FIP, ip);
        if cpu.fpu.x87.0[FSW] & ES != 0 {
            // SAFETY: decode keeps the instruction as long as its op.
            let code = opcode(unsafe { &*op.insn }, cpu.is_64());
            image(cpu).set_word(FOP, code);
        }
    }
    if now.data != before.data {
        let base = if cpu.is_64() && op.address_size == 8 {
            cpu.regs[op.segment as usize / 8 % 20]
        } else {
            cpu.segments[op.segment as usize & 7].base
        };
        image(cpu).set_quad(FDP, linear.wrapping_sub(base) & mask);
    }
}

/// FOP: the low three bits of the first opcode byte and the ModRM byte (SDM Vol. 1 §8.1.9).
#[cold]
fn opcode(i: &Instruction, long: bool) -> u16 {
    let mut encoder = Encoder::new(if long { 64 } else { 32 });
    if encoder.encode(i, i.ip()).is_err() {
        return 0;
    }
    let bytes = encoder.take_buffer();
    match bytes.iter().position(|b| (0xd8..=0xdf).contains(b)) {
        Some(n) => u16::from(bytes[n] & 7) << 8 | bytes.get(n + 1).copied().unwrap_or(0) as u16,
        None => 0,
    }
}

/// The function for an x87 instruction that no thunk executes.
pub(super) fn function(i: &Instruction) -> Option<SimpleFn> {
    Some(match i.code() {
        Code::Wait => wait,
        Code::Fldcw_m2byte => fldcw,
        Code::Fnstcw_m2byte => fnstcw,
        Code::Fnstsw_m2byte | Code::Fnstsw_AX => fnstsw,
        Code::Fnclex => fnclex,
        Code::Fninit => fninit,
        // Only the 8087 and 80287 did something here (SDM Vol. 3B §23.18.9).
        Code::Fneni | Code::Fndisi | Code::Fnsetpm => obsolete,
        Code::Fnstenv_m14byte | Code::Fnstenv_m28byte => fnstenv,
        Code::Fldenv_m14byte | Code::Fldenv_m28byte => fldenv,
        Code::Fnsave_m94byte | Code::Fnsave_m108byte => fnsave,
        Code::Frstor_m94byte | Code::Frstor_m108byte => frstor,
        _ => return None,
    })
}

/// FWAIT: #NM only with both MP and TS (SDM Vol. 3A §2.5).
fn wait(cpu: &mut Cpu, _: &Instruction) -> Exec {
    const BOTH: u64 = cr0::MP | cr0::TS;
    if cpu.cr0 & BOTH == BOTH {
        return Err(cpu.fault(exception::NM));
    }
    if cpu.fpu.x87.0[FSW] & ES != 0 {
        return Err(cpu.fault(exception::MF));
    }
    Ok(())
}

fn fldcw(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_x87(true)?;
    let value = cpu.read_operand(i, 0, 2)?;
    image(cpu).set_control(value as u16);
    Ok(())
}

fn fnstcw(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_x87(false)?;
    let value = image(cpu).word(FCW);
    cpu.write_operand(i, 0, 2, value.into())
}

fn fnstsw(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_x87(false)?;
    let value = image(cpu).word(FSW);
    cpu.write_operand(i, 0, 2, value.into())
}

fn fnclex(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.check_x87(false)?;
    let mut x = image(cpu);
    let status = x.word(FSW) & 0x7f00;
    x.set_word(FSW, status);
    Ok(())
}

fn fninit(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.check_x87(false)?;
    image(cpu).init();
    Ok(())
}

fn obsolete(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.check_x87(false)
}

/// Size of the environment for the instruction: 14 or 28 bytes.
fn environment_size(i: &Instruction) -> usize {
    match i.code() {
        Code::Fnstenv_m14byte | Code::Fldenv_m14byte | Code::Fnsave_m94byte | Code::Frstor_m94byte => 14,
        _ => 28,
    }
}

/// The environment image (SDM Vol. 1 figures 8-9 to 8-12), in the first `size` bytes.
fn environment(cpu: &mut Cpu, size: usize) -> [u8; 28] {
    let real = cpu.real_or_v86();
    let x = image(cpu);
    let (control, status, tags) = (x.word(FCW), x.word(FSW), x.full_tags());
    let (ip, dp, op) = (x.quad(FIP) as u32, x.quad(FDP) as u32, x.word(FOP) as u32 & 0x7ff);
    let mut out = [0; 28];
    if size == 14 {
        let (high_ip, high_dp) = if real { (ip >> 4 & 0xf000 | op, dp >> 4 & 0xf000) } else { (0, 0) };
        let words = [control, status, tags, ip as u16, high_ip as u16, dp as u16, high_dp as u16];
        for (to, w) in out.chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&w.to_le_bytes());
        }
    } else {
        // Reserved halves are written as ones.
        let word = |w: u16| 0xffff_0000 | w as u32;
        let tail = if real {
            [word(ip as u16), ip >> 4 & 0x0fff_f000 | op, word(dp as u16), dp >> 4 & 0x0fff_f000]
        } else {
            [ip, op << 16, dp, word(0)]
        };
        let head = [word(control), word(status), word(tags)];
        for (to, w) in out.chunks_exact_mut(4).zip(head.into_iter().chain(tail)) {
            to.copy_from_slice(&w.to_le_bytes());
        }
    }
    out
}

/// Loads an environment image. `turn`: the registers stay where they are while TOP changes.
fn load_environment(cpu: &mut Cpu, bytes: &[u8; 28], size: usize, turn: bool) {
    let real = cpu.real_or_v86();
    let unit = size / 7;
    let field = |n: usize| {
        let mut b = [0; 4];
        b[..unit].copy_from_slice(&bytes[n * unit..(n + 1) * unit]);
        u32::from_le_bytes(b)
    };
    let (ip, op, dp) = match (size, real) {
        (14, false) => (field(3), None, field(5)),
        (14, true) => {
            (field(3) | (field(4) & 0xf000) << 4, Some(field(4)), field(5) | (field(6) & 0xf000) << 4)
        }
        (_, false) => (field(3), Some(field(4) >> 16), field(5)),
        (_, true) => (
            field(3) & 0xffff | (field(4) & 0x0fff_f000) << 4,
            Some(field(4)),
            field(5) & 0xffff | (field(6) & 0x0fff_f000) << 4,
        ),
    };
    let mut x = image(cpu);
    let old = x.top();
    x.set_word(FSW, field(1) as u16);
    if turn {
        let new = x.top();
        x.rotate(new + 8 - old);
    }
    x.set_full_tags(field(2) as u16);
    x.set_quad(FIP, ip.into());
    x.set_quad(FDP, dp.into());
    x.set_word(FOP, op.unwrap_or(0) as u16 & 0x7ff);
    x.set_control(field(0) as u16);
}

fn fnstenv(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_x87(false)?;
    let size = environment_size(i);
    let linear = cpu.operand_linear(i, size as u32, Access::Write)?;
    let bytes = environment(cpu, size);
    cpu.write_bytes(linear, &bytes[..size])?;
    // All exceptions are masked afterwards.
    let mut x = image(cpu);
    let control = x.word(FCW) | 0x3f;
    x.set_control(control);
    Ok(())
}

fn fldenv(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_x87(true)?;
    let size = environment_size(i);
    let linear = cpu.operand_linear(i, size as u32, Access::Read)?;
    let mut bytes = [0; 28];
    cpu.read_bytes(linear, &mut bytes[..size])?;
    load_environment(cpu, &bytes, size, true);
    Ok(())
}

fn fnsave(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_x87(false)?;
    let size = environment_size(i);
    let linear = cpu.operand_linear(i, size as u32 + 80, Access::Write)?;
    let mut out = [0; 108];
    out[..28].copy_from_slice(&environment(cpu, size));
    for n in 0..8 {
        out[size + 10 * n..][..10].copy_from_slice(&cpu.fpu.x87.0[ST + 16 * n..][..10]);
    }
    cpu.write_bytes(linear, &out[..size + 80])?;
    image(cpu).init();
    Ok(())
}

fn frstor(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_x87(true)?;
    let size = environment_size(i);
    let linear = cpu.operand_linear(i, size as u32 + 80, Access::Read)?;
    let mut bytes = [0; 108];
    cpu.read_bytes(linear, &mut bytes[..size + 80])?;
    let mut head = [0; 28];
    head.copy_from_slice(&bytes[..28]);
    load_environment(cpu, &head, size, false);
    for n in 0..8 {
        cpu.fpu.x87.0[ST + 16 * n..][..10].copy_from_slice(&bytes[size + 10 * n..][..10]);
    }
    Ok(())
}
