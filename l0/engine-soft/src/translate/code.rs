//! What a block becomes: host code for each of its instructions.
//!
//! In translated code RBX points [`BIAS`] bytes into [`Cpu`](crate::cpu::Cpu), RBP holds the running block, R12 the TLB
//! context, R14 the same shifted to the fast TLB's index, R13 the address of the run loop's limit and R15
//! the jump cache; RAX, RCX, RDX, RSI and RDI are free. A memory access that the fast TLB does not
//! have, and each instruction without a form here, calls its handler.

use iced_x86::{Instruction, Mnemonic, OpKind};
use x86_spec::reg::gpr;

use super::asm::{Alu, Asm, Jump, Mem, R12, R13, R14, RAX, RBP, RBX, RCX, RDI, RDX, RSI};
use super::{
    BIAS, BLOCK, FLAGS, GENERATION, ICOUNT, NATIVE, NOT_BELOW, NOT_EQUAL, RETURNED, RIP, Stubs, TLB_SHIFT,
    call_pair, field, finish, link, load_context,
};
use crate::block::Block;
use crate::cpu::{Cpu, SLOT_ZERO};
use crate::mmu::{Mmu, TLB_ENTRIES, TlbEntry};
use crate::op::Op;
use crate::operand::has_memory;
use crate::ops::branch::branch_size;
use crate::ops::misc::{condition_code, is_cmovcc, is_setcc};
use crate::ops::{Kinds, fallthrough, kinds, operand_size};
use std::mem::offset_of;

/// What an instruction does, of those done in place. Operand kinds and sizes are the instruction's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Nop,
    Mov,
    ZeroExtend,
    SignExtend,
    Lea,
    Alu(Alu),
    Test,
    /// INC, DEC: opcode extension of FEH and FFH.
    Step(u8),
    /// NOT, NEG: opcode extension of F6H and F7H.
    Unary(u8),
    /// Opcode extension of C0H, C1H, D2H and D3H.
    Shift(u8),
    Imul,
    /// Opcode extension of 0FH BAH.
    Bit(u8),
    Set(u8),
    Cmov(u8),
    Exchange,
    /// CWDE, CDQE: size of the result.
    Widen(u8),
    /// CDQ, CQO: size of the source.
    Spread(u8),
    ByteSwap,
    Push,
    Pop,
    Leave,
    // What ends a block.
    JumpIf(u8),
    Jump,
    Call,
    Return,
    JumpRegister,
    CallRegister,
    Fallthrough,
}

/// How an instruction treats the status flags.
struct Effect {
    /// Writes all six.
    writes: bool,
    /// Reads some, or keeps some.
    reads: bool,
    /// May stop with a fault or an exit, or is not done in place.
    stops: bool,
}

const NEG: u8 = 3;
const NOT: u8 = 2;
/// The zero slot's offset.
const NONE: u8 = SLOT_ZERO as u8 * 8;

/// The form that `i` is done in, or `None` if its handler is called.
fn form(i: &Instruction, op: &Op, last: bool) -> Option<Form> {
    use Mnemonic as M;
    if last {
        return ending(i, op);
    }
    if i.has_lock_prefix() {
        return None;
    }
    let two = kinds(i);
    if has_memory(i) && i.mnemonic() != M::Nop && (op.address_size != 8 || displacement(op).is_none()) {
        return None;
    }
    let size = operand_size(i, 0);
    let register = i.op_count() > 0 && i.op_kind(0) == OpKind::Register && i.op_register(0).is_gpr();
    let plain = two != Kinds::Other;
    // An immediate of 64 bits is only MOV's.
    let short = i32::try_from(op.imm as i64).is_ok();
    let alu = |f| (plain && (short || size < 8)).then_some(Form::Alu(f));
    match i.mnemonic() {
        M::Nop | M::Endbr64 | M::Endbr32 => Some(Form::Nop),
        M::Mov if two == Kinds::MemImm => (short || size < 8).then_some(Form::Mov),
        M::Mov if plain => Some(Form::Mov),
        M::Movzx => Some(Form::ZeroExtend),
        M::Movsx | M::Movsxd => Some(Form::SignExtend),
        M::Lea if size >= 4 => Some(Form::Lea),
        M::Add => alu(Alu::Add),
        M::Or => alu(Alu::Or),
        M::Adc => alu(Alu::Adc),
        M::Sbb => alu(Alu::Sbb),
        M::And => alu(Alu::And),
        M::Sub => alu(Alu::Sub),
        M::Xor => alu(Alu::Xor),
        M::Cmp => alu(Alu::Cmp),
        M::Test if plain => Some(Form::Test),
        M::Inc => Some(Form::Step(0)),
        M::Dec => Some(Form::Step(1)),
        M::Not => Some(Form::Unary(NOT)),
        M::Neg => Some(Form::Unary(NEG)),
        M::Rol if register => Some(Form::Shift(0)),
        M::Ror if register => Some(Form::Shift(1)),
        M::Shl | M::Sal if register => Some(Form::Shift(4)),
        M::Shr if register => Some(Form::Shift(5)),
        M::Sar if register => Some(Form::Shift(7)),
        M::Imul if i.op_count() == 2 && two == Kinds::RegReg => Some(Form::Imul),
        M::Imul if i.op_count() == 3 && two == Kinds::RegReg => Some(Form::Imul),
        M::Bt if register => Some(Form::Bit(4)),
        M::Bts if register => Some(Form::Bit(5)),
        M::Btr if register => Some(Form::Bit(6)),
        M::Btc if register => Some(Form::Bit(7)),
        M::Xchg if two == Kinds::RegReg && size >= 4 => Some(Form::Exchange),
        M::Cwde => Some(Form::Widen(4)),
        M::Cdqe => Some(Form::Widen(8)),
        M::Cdq => Some(Form::Spread(4)),
        M::Cqo => Some(Form::Spread(8)),
        M::Bswap if size >= 4 => Some(Form::ByteSwap),
        M::Push if register && size == 8 => Some(Form::Push),
        M::Push if is_push_immediate(i, op) && short => Some(Form::Push),
        M::Pop if register && size == 8 => Some(Form::Pop),
        M::Leave if i.code() == iced_x86::Code::Leaveq => Some(Form::Leave),
        m if is_setcc(m) && register => Some(Form::Set(condition_code(i) as u8)),
        m if is_cmovcc(m) => Some(Form::Cmov(condition_code(i) as u8)),
        _ => None,
    }
}

fn is_push_immediate(i: &Instruction, op: &Op) -> bool {
    i.op_count() == 1 && i.try_immediate(0).is_ok() && op.aux == 8
}

/// The form of a block's last instruction.
fn ending(i: &Instruction, op: &Op) -> Option<Form> {
    use Mnemonic as M;
    if op.run as usize == fallthrough as *const () as usize {
        return Some(Form::Fallthrough);
    }
    let near = |target: u64| i32::try_from(target as i64).is_ok();
    if i.is_jcc_short_or_near() && branch_size(i) == 8 && near(op.imm) {
        return Some(Form::JumpIf(condition_code(i) as u8));
    }
    let register = i.op_count() == 1 && i.op_kind(0) == OpKind::Register && i.op_register(0).is_gpr64();
    match i.mnemonic() {
        M::Jmp if i.is_jmp_short_or_near() && branch_size(i) == 8 && near(op.imm) => Some(Form::Jump),
        M::Call if i.is_call_near() && branch_size(i) == 8 && near(op.imm) => Some(Form::Call),
        M::Jmp if register => Some(Form::JumpRegister),
        M::Call if register => Some(Form::CallRegister),
        M::Ret if branch_size(i) == 8 => Some(Form::Return),
        _ => None,
    }
}

/// A displacement that host code can hold.
fn displacement(op: &Op) -> Option<i32> {
    i32::try_from(op.disp as i64).ok()
}

fn effect(i: &Instruction, form: Option<Form>) -> Effect {
    let Some(form) = form else { return Effect { writes: false, reads: true, stops: true } };
    let (writes, reads) = match form {
        Form::Alu(Alu::Adc | Alu::Sbb) => (true, true),
        Form::Alu(_) | Form::Test | Form::Unary(NEG) | Form::Imul => (true, false),
        Form::Step(_) | Form::Shift(_) | Form::Bit(_) | Form::Set(_) | Form::Cmov(_) | Form::JumpIf(_) => {
            (false, true)
        }
        _ => (false, false),
    };
    let stops = has_memory(i) && !matches!(form, Form::Lea | Form::Nop)
        || matches!(
            form,
            Form::Push
                | Form::Pop
                | Form::Leave
                | Form::Call
                | Form::Return
                | Form::JumpRegister
                | Form::CallRegister
        );
    Effect { writes, reads, stops }
}

/// A general register, or the other slots of [`Cpu::regs`].
fn slot(offset: u8) -> Mem {
    field(offset as usize)
}
/// Slot of a general register by number.
fn gpr_slot(n: usize) -> Mem {
    field(8 * n)
}
/// AH, CH, DH or BH.
fn is_high_byte(offset: u8) -> bool {
    offset & 7 != 0
}

/// A place out of the way where a handler does what the code in place can't.
struct Detour {
    from: Vec<Jump>,
    op: usize,
    /// Where the code in place goes on; `None` after a block's last instruction.
    back: Option<usize>,
}

/// The code of `block`, for the address that `a` was started with. Returns the ops that it calls handlers
/// with; they must live as long as the code, and stay where they are.
pub(super) fn emit(a: &mut Asm, stubs: Stubs, block: &Block) -> Vec<Op> {
    let mut calls = Vec::with_capacity(2 * block.ops.len());
    let forms: Vec<Option<Form>> = block
        .ops
        .iter()
        .enumerate()
        .map(|(n, op)| {
            // SAFETY: ops of a live block point to its instructions.
            form(unsafe { &*op.insn }, op, n + 1 == block.ops.len())
        })
        .collect();
    let wanted = flags_wanted(block, &forms);
    let mut e = Emitter { a, stubs, block, detours: Vec::new(), host_flags: false, calls: &mut calls };
    e.prologue();
    for (n, op) in block.ops.iter().enumerate() {
        // SAFETY: as above.
        let i = unsafe { &*op.insn };
        let last = n + 1 == block.ops.len();
        match forms[n] {
            Some(f) if last => e.end(n, op, f),
            Some(f) => e.instruction(n, i, op, f, wanted[n]),
            None if last => e.finish(op),
            None => e.call(op),
        }
    }
    e.detours();
    calls
}

/// Which instructions have to leave their flags in [`Cpu::flags`]: those whose flags something may see
/// before the next instruction that writes them all.
fn flags_wanted(block: &Block, forms: &[Option<Form>]) -> Vec<bool> {
    let mut wanted = vec![true; forms.len()];
    let mut live = true;
    for (n, op) in block.ops.iter().enumerate().rev() {
        wanted[n] = live;
        // SAFETY: ops of a live block point to its instructions.
        let e = effect(unsafe { &*op.insn }, forms[n]);
        live = live && !e.writes || e.reads || e.stops;
    }
    wanted
}

struct Emitter<'a> {
    a: &'a mut Asm,
    stubs: Stubs,
    block: &'a Block,
    calls: &'a mut Vec<Op>,
    detours: Vec<Detour>,
    /// The host's flags are the guest's here.
    host_flags: bool,
}

impl Emitter<'_> {
    /// Counts the instructions, or leaves when the run loop is to look around. RAX is the block.
    fn prologue(&mut self) {
        let a = &mut *self.a;
        a.load(8, RCX, ICOUNT);
        a.alu_mem(Alu::Cmp, 8, RCX, Mem::at(R13, 0));
        a.jump_if_to(NOT_BELOW, self.stubs.leave);
        a.alu_imm(Alu::Add, 8, RCX, self.block.instructions() as i32);
        a.store(8, RCX, ICOUNT);
        a.mov(8, RBP, RAX);
        a.store(8, RAX, BLOCK);
    }

    // ---- calls of handlers ------------------------------------------------------------------

    /// Address of a copy of an op that a handler can be called with.
    fn call_op(&mut self, op: &Op) -> *const Op {
        let at = self.calls.len();
        debug_assert!(at + 2 <= self.calls.capacity());
        self.calls.extend(call_pair(op));
        &raw const self.calls[at]
    }

    fn call_function(&mut self, op: *const Op, function: usize) {
        let a = &mut *self.a;
        a.lea(8, RDI, Mem::at(RBX, -(BIAS as i32)));
        a.mov_imm(RSI, op as u64);
        a.mov_imm(RAX, function as u64);
        a.call_reg(RAX);
        self.host_flags = false;
    }

    /// Executes an instruction by its handler; leaves if it stopped.
    fn call(&mut self, op: &Op) {
        let copy = self.call_op(op);
        self.call_function(copy, op.run as usize);
        self.a.alu_imm(Alu::Cmp, 8, RAX, RETURNED);
        self.a.jump_if_to(NOT_EQUAL, self.stubs.leave);
        load_context(self.a);
    }

    /// Executes the last instruction by its handler and goes where it leads.
    fn finish(&mut self, op: &Op) {
        self.call_function(op, finish as *const () as usize);
        let a = &mut *self.a;
        load_context(a);
        a.reg(8, &[0x85], RAX, RAX);
        let none = a.jump_if(4);
        a.jump_mem(NATIVE);
        a.land(none);
        a.jump_to(self.stubs.leave);
    }

    /// Emits what was put out of the way.
    fn detours(&mut self) {
        let block = self.block;
        for d in std::mem::take(&mut self.detours) {
            d.from.into_iter().for_each(|j| self.a.land(j));
            match d.back {
                None => self.finish(&block.ops[d.op]),
                Some(back) => {
                    self.call(&block.ops[d.op]);
                    self.flags_to_host();
                    self.a.jump_back(back);
                }
            }
        }
    }

    /// Code in place was left by `from`; after the handler of op `n`, go on here.
    fn detour(&mut self, n: usize, from: Vec<Jump>, last: bool) {
        let back = (!last).then(|| self.a.len());
        self.detours.push(Detour { from, op: n, back });
    }

    // ---- flags ----------------------------------------------------------------------------------

    /// Loads the guest's flags into the host's register. Uses RAX.
    fn flags_to_host(&mut self) {
        self.a.load(2, RAX, FLAGS);
        self.a.flags_from_ax();
    }

    /// Makes sure that the host's flags are the guest's. Uses RAX.
    fn need_flags(&mut self, valid: bool) {
        if !valid {
            self.flags_to_host();
        }
    }

    /// The host's flags are the guest's now; stores them if they are wanted. Uses RAX.
    fn set_flags(&mut self, wanted: bool) {
        if wanted {
            self.a.flags_to_ax();
            self.a.store(2, RAX, FLAGS);
        }
        self.host_flags = true;
    }

    // ---- registers -----------------------------------------------------------------------------

    /// Loads a register that will be changed and stored by [`Self::put`].
    fn get(&mut self, size: u8, to: u8, offset: u8) {
        let whole = size < 4 && !is_high_byte(offset);
        self.a.load(if whole { 8 } else { size }, to, slot(offset));
    }

    /// Stores what [`Self::get`] loaded and an instruction of `size` bytes changed.
    fn put(&mut self, size: u8, from: u8, offset: u8) {
        // Narrow results go into the whole register, so that it can be loaded again without a stall.
        self.a.store(if is_high_byte(offset) { 1 } else { 8 }, from, slot(offset));
        debug_assert!(!is_high_byte(offset) || size == 1);
    }

    /// Stores the low `size` bytes of RCX in a register; 4 zero-extended bytes are 8. Uses RDX.
    fn put_new(&mut self, size: u8, offset: u8) {
        if size >= 4 {
            self.a.store(8, RCX, slot(offset));
        } else if is_high_byte(offset) {
            self.a.store(1, RCX, slot(offset));
        } else {
            self.a.load(8, RDX, slot(offset));
            self.a.mov(size, RDX, RCX);
            self.a.store(8, RDX, slot(offset));
        }
    }

    // ---- memory ---------------------------------------------------------------------------------

    /// Puts the linear address of the memory operand into RAX. Uses RCX.
    fn linear(&mut self, op: &Op) {
        let disp = displacement(op).unwrap_or(0);
        let a = &mut *self.a;
        if op.base == NONE && op.index == NONE && op.segment != NONE {
            a.load(8, RAX, slot(op.segment));
            if disp != 0 {
                a.lea(8, RAX, Mem::at(RAX, disp));
            }
            return;
        }
        a.load(8, RAX, slot(op.base));
        if op.index != NONE {
            a.load(8, RCX, slot(op.index));
            a.lea(8, RAX, Mem::indexed(RAX, RCX, op.scale, disp));
        } else if disp != 0 {
            a.lea(8, RAX, Mem::at(RAX, disp));
        }
        if op.segment != NONE {
            a.alu_mem(Alu::Add, 8, RAX, slot(op.segment));
        }
    }

    /// Turns the linear address in RAX into a host pointer to `size` bytes, or jumps away. Uses RCX and
    /// RDX.
    fn host_pointer(&mut self, size: u8, read: bool, write: bool) -> Vec<Jump> {
        const TLB: i32 = (offset_of!(Cpu, mmu) + offset_of!(Mmu, tlb)) as i32 - BIAS as i32;
        const INDEX: i32 = ((TLB_ENTRIES - 1) << TLB_SHIFT) as i32;
        let a = &mut *self.a;
        a.mov(4, RCX, RAX);
        a.shift(5, 4, RCX, 12 - TLB_SHIFT);
        a.alu(Alu::Xor, 4, RCX, R14);
        a.alu_imm(Alu::And, 4, RCX, INDEX);
        a.lea(8, RDX, Mem::at(RAX, size as i32 - 1));
        a.alu_imm(Alu::And, 8, RDX, -0x1000);
        a.alu(Alu::Or, 8, RDX, R12);
        let entry = |offset: usize| Mem::indexed(RBX, RCX, 0, TLB + offset as i32);
        let mut away = Vec::new();
        for (wanted, offset) in [(read, offset_of!(TlbEntry, read)), (write, offset_of!(TlbEntry, write))] {
            if wanted {
                a.alu_mem(Alu::Cmp, 8, RDX, entry(offset));
                away.push(a.jump_if(NOT_EQUAL));
            }
        }
        a.alu_mem(Alu::Add, 8, RAX, entry(offset_of!(TlbEntry, addend)));
        away
    }

    // ---- instructions -----------------------------------------------------------------------------

    /// An instruction that is not the block's last.
    fn instruction(&mut self, n: usize, i: &Instruction, op: &Op, form: Form, wanted: bool) {
        let valid = std::mem::replace(&mut self.host_flags, false);
        if has_memory(i) && !matches!(form, Form::Lea | Form::Nop) {
            let away = self.with_memory(i, op, form, wanted);
            self.detour(n, away, false);
            return;
        }
        match form {
            Form::Push | Form::Pop | Form::Leave => {
                let away = self.stack(i, op, form);
                self.detour(n, away, false);
            }
            // These leave the host's flags as they are.
            Form::Nop
            | Form::Mov
            | Form::ZeroExtend
            | Form::SignExtend
            | Form::Lea
            | Form::Exchange
            | Form::Widen(_)
            | Form::ByteSwap
            | Form::Unary(NOT) => {
                self.data(i, op, form);
                self.host_flags = valid;
            }
            Form::Set(c) => {
                self.need_flags(valid);
                self.get(1, RDX, op.dst);
                self.a.reg(1, &[0x0f, 0x90 | c], 0, RDX);
                self.put(1, RDX, op.dst);
                self.host_flags = true;
            }
            Form::Cmov(c) => {
                self.need_flags(valid);
                let size = operand_size(i, 0);
                self.get(size, RCX, op.dst);
                self.a.mem(size, &[0x0f, 0x40 | c], RCX, slot(op.src));
                self.put(size, RCX, op.dst);
                self.host_flags = true;
            }
            Form::Spread(size) => {
                self.a.load(size, RCX, gpr_slot(gpr::RAX));
                self.a.shift(7, size, RCX, size * 8 - 1);
                self.a.store(8, RCX, gpr_slot(gpr::RDX));
            }
            _ => self.arithmetic(i, op, form, wanted, valid),
        }
    }

    /// Moves between registers.
    fn data(&mut self, i: &Instruction, op: &Op, form: Form) {
        let size = operand_size(i, 0);
        match form {
            Form::Mov if kinds(i) == Kinds::RegImm => {
                if size >= 4 {
                    let value = if size == 4 { op.imm as u32 as u64 } else { op.imm };
                    match i32::try_from(value as i64) {
                        Ok(v) => self.a.store_imm(8, v, slot(op.dst)),
                        Err(_) => {
                            self.a.mov_imm(RCX, value);
                            self.a.store(8, RCX, slot(op.dst));
                        }
                    }
                } else {
                    self.a.mov_imm(RCX, op.imm & 0xffff);
                    self.put_new(size, op.dst);
                }
            }
            Form::Mov => {
                self.a.load(size, RCX, slot(op.src));
                self.put_new(size, op.dst);
            }
            Form::ZeroExtend => {
                self.a.load(operand_size(i, 1), RCX, slot(op.src));
                self.put_new(size, op.dst);
            }
            Form::SignExtend => {
                self.sign_extended(i, slot(op.src));
                self.put_new(size, op.dst);
            }
            Form::Lea => {
                let disp = displacement(op).unwrap_or(0);
                self.a.load(8, RCX, slot(op.base));
                if op.index == NONE {
                    self.a.lea(size, RCX, Mem::at(RCX, disp));
                } else {
                    self.a.load(8, RDX, slot(op.index));
                    self.a.lea(size, RCX, Mem::indexed(RCX, RDX, op.scale, disp));
                }
                self.put(size, RCX, op.dst);
            }
            Form::Exchange => {
                self.a.load(size, RCX, slot(op.dst));
                self.a.load(size, RDX, slot(op.src));
                self.a.store(8, RDX, slot(op.dst));
                self.a.store(8, RCX, slot(op.src));
            }
            Form::Widen(to) => {
                self.a.load_signed(to, to / 2, RCX, gpr_slot(gpr::RAX));
                self.a.store(8, RCX, gpr_slot(gpr::RAX));
            }
            Form::ByteSwap => {
                self.a.load(size, RCX, slot(op.dst));
                // BSWAP has the register in its opcode.
                if size == 8 {
                    self.a.byte(0x48);
                }
                self.a.byte(0x0f);
                self.a.byte(0xc8 | RCX);
                self.a.store(8, RCX, slot(op.dst));
            }
            Form::Unary(_) => {
                self.get(size, RCX, op.dst);
                self.a.reg(size, if size == 1 { &[0xf6] } else { &[0xf7] }, NOT, RCX);
                self.put(size, RCX, op.dst);
            }
            _ => {}
        }
    }

    /// Loads the second operand of MOVSX and MOVSXD into RCX.
    fn sign_extended(&mut self, i: &Instruction, from: Mem) {
        let (size, source) = (operand_size(i, 0), operand_size(i, 1));
        if source == size {
            self.a.load(size, RCX, from);
        } else {
            self.a.load_signed(if size == 8 { 8 } else { 4 }, source, RCX, from);
        }
    }

    /// Arithmetic on registers.
    fn arithmetic(&mut self, i: &Instruction, op: &Op, form: Form, wanted: bool, valid: bool) {
        let size = operand_size(i, 0);
        let wide = |one: u8| if size == 1 { [one] } else { [one + 1] };
        let by_register = kinds(i) == Kinds::RegReg;
        match form {
            Form::Alu(f) => {
                if !wanted && f == Alu::Cmp {
                    return;
                }
                self.get(size, RCX, op.dst);
                if matches!(f, Alu::Adc | Alu::Sbb) {
                    self.need_flags(valid);
                }
                if by_register {
                    self.a.alu_mem(f, size, RCX, slot(op.src));
                } else {
                    self.a.alu_imm(f, size, RCX, op.imm as i32);
                }
                if f != Alu::Cmp {
                    self.put(size, RCX, op.dst);
                }
            }
            Form::Test => {
                if !wanted {
                    return;
                }
                self.get(size, RCX, op.dst);
                if by_register {
                    self.a.mem(size, &wide(0x84), RCX, slot(op.src));
                } else {
                    self.test_immediate(size, op);
                }
            }
            Form::Step(kind) => {
                self.get(size, RCX, op.dst);
                self.need_flags(valid);
                self.a.reg(size, &wide(0xfe), kind, RCX);
                self.put(size, RCX, op.dst);
            }
            Form::Unary(kind) => {
                self.get(size, RCX, op.dst);
                self.a.reg(size, &wide(0xf6), kind, RCX);
                self.put(size, RCX, op.dst);
            }
            Form::Shift(kind) => {
                // A count of zero keeps all flags, and rotations keep most.
                self.get(size, RDX, op.dst);
                self.need_flags(valid);
                // By CL in both cases, as the interpreter does: processors leave other undefined flags by the
                // form with a constant.
                if by_register {
                    self.a.load(1, RCX, gpr_slot(gpr::RCX));
                } else {
                    self.a.mov_imm(RCX, op.imm & 0xff);
                }
                self.a.reg(size, &wide(0xd2), kind, RDX);
                self.put(size, RDX, op.dst);
            }
            Form::Imul if i.op_count() == 3 => {
                self.a.load(size, RCX, slot(op.src));
                self.a.reg(size, &[0x69], RCX, RCX);
                self.a.immediate(size, op.imm as i32);
                self.put_new(size, op.dst);
            }
            Form::Imul => {
                self.a.load(size, RCX, slot(op.dst));
                self.a.mem(size, &[0x0f, 0xaf], RCX, slot(op.src));
                self.put_new(size, op.dst);
            }
            Form::Bit(kind) => {
                self.get(size, RCX, op.dst);
                if by_register {
                    self.a.load(size, RDX, slot(op.src));
                }
                self.need_flags(valid);
                if by_register {
                    // BT, BTS, BTR, BTC: 0FH A3H, ABH, B3H, BBH.
                    self.a.reg(size, &[0x0f, 0xa3 + (kind - 4) * 8], RDX, RCX);
                } else {
                    self.a.reg(size, &[0x0f, 0xba], kind, RCX);
                    self.a.byte(op.imm as u8);
                }
                if kind != 4 {
                    self.put(size, RCX, op.dst);
                }
            }
            _ => return,
        }
        self.set_flags(wanted);
    }

    fn test_immediate(&mut self, size: u8, op: &Op) {
        self.a.reg(size, if size == 1 { &[0xf6] } else { &[0xf7] }, 0, RCX);
        self.a.immediate(size, op.imm as i32);
    }

    /// An instruction with a memory operand. Returns the jumps to its detour.
    fn with_memory(&mut self, i: &Instruction, op: &Op, form: Form, wanted: bool) -> Vec<Jump> {
        let two = kinds(i);
        let size = operand_size(i, 0);
        let wide = |one: u8| if size == 1 { [one] } else { [one + 1] };
        let at = Mem::at(RAX, 0);
        self.linear(op);
        match form {
            Form::Mov if two == Kinds::RegMem => {
                let away = self.host_pointer(size, true, false);
                self.a.load(size, RCX, at);
                self.put_new(size, op.dst);
                away
            }
            Form::Mov => {
                let away = self.host_pointer(size, false, true);
                if two == Kinds::MemImm {
                    self.a.store_imm(size, op.imm as i32, at);
                } else {
                    self.a.load(size, RCX, slot(op.src));
                    self.a.store(size, RCX, at);
                }
                away
            }
            Form::ZeroExtend => {
                let source = operand_size(i, 1);
                let away = self.host_pointer(source, true, false);
                self.a.load(source, RCX, at);
                self.put_new(size, op.dst);
                away
            }
            Form::SignExtend => {
                let away = self.host_pointer(operand_size(i, 1), true, false);
                self.sign_extended(i, at);
                self.put_new(size, op.dst);
                away
            }
            Form::Cmov(c) => {
                let away = self.host_pointer(size, true, false);
                self.a.load(size, RDX, at);
                self.flags_to_host();
                self.get(size, RCX, op.dst);
                self.a.reg(size, &[0x0f, 0x40 | c], RCX, RDX);
                self.put(size, RCX, op.dst);
                self.host_flags = true;
                away
            }
            _ => {
                let write = two != Kinds::RegMem && !matches!(form, Form::Alu(Alu::Cmp) | Form::Test);
                let away = self.host_pointer(size, true, write);
                // RAX is needed for flags.
                self.a.mov(8, RDX, RAX);
                let at = Mem::at(RDX, 0);
                if matches!(form, Form::Alu(Alu::Adc | Alu::Sbb) | Form::Step(_)) {
                    self.flags_to_host();
                }
                match (form, two) {
                    (Form::Alu(f), Kinds::RegMem) => {
                        self.get(size, RCX, op.dst);
                        self.a.alu_mem(f, size, RCX, at);
                        if f != Alu::Cmp {
                            self.put(size, RCX, op.dst);
                        }
                    }
                    (Form::Alu(f), Kinds::MemReg) => {
                        self.a.load(size, RCX, slot(op.src));
                        self.a.mem(size, &wide(f as u8 * 8), RCX, at);
                    }
                    (Form::Alu(f), _) => self.a.alu_mem_imm(f, size, at, op.imm as i32),
                    (Form::Test, Kinds::MemImm) => {
                        self.a.mem(size, &wide(0xf6), 0, at);
                        self.a.immediate(size, op.imm as i32);
                    }
                    (Form::Test, _) => {
                        let register = if two == Kinds::RegMem { op.dst } else { op.src };
                        self.a.load(size, RCX, slot(register));
                        self.a.mem(size, &wide(0x84), RCX, at);
                    }
                    (Form::Step(kind), _) => self.a.mem(size, &wide(0xfe), kind, at),
                    (Form::Unary(kind), _) => self.a.mem(size, &wide(0xf6), kind, at),
                    _ => {}
                }
                if form == Form::Unary(NOT) {
                    return away;
                }
                self.set_flags(wanted);
                away
            }
        }
    }

    /// PUSH, POP and LEAVE. Returns the jumps to the detour.
    fn stack(&mut self, i: &Instruction, op: &Op, form: Form) -> Vec<Jump> {
        let (sp, at) = (gpr_slot(gpr::RSP), Mem::at(RAX, 0));
        match form {
            Form::Push => {
                self.a.load(8, RAX, sp);
                self.a.lea(8, RAX, Mem::at(RAX, -8));
                let away = self.host_pointer(8, false, true);
                if i.op_kind(0) == OpKind::Register {
                    self.a.load(8, RCX, slot(op.src));
                    self.a.store(8, RCX, at);
                } else {
                    self.a.store_imm(8, op.imm as i32, at);
                }
                self.a.alu_mem_imm(Alu::Sub, 8, sp, 8);
                away
            }
            Form::Pop => {
                self.a.load(8, RAX, sp);
                let away = self.host_pointer(8, true, false);
                self.a.load(8, RCX, at);
                self.a.alu_mem_imm(Alu::Add, 8, sp, 8);
                self.a.store(8, RCX, slot(op.dst));
                away
            }
            _ => {
                self.a.load(8, RAX, gpr_slot(gpr::RBP));
                self.a.lea(8, RSI, Mem::at(RAX, 8));
                let away = self.host_pointer(8, true, false);
                self.a.load(8, RCX, at);
                self.a.store(8, RSI, sp);
                self.a.store(8, RCX, gpr_slot(gpr::RBP));
                away
            }
        }
    }

    // ---- ends ---------------------------------------------------------------------------------------

    /// The block's last instruction.
    fn end(&mut self, n: usize, op: &Op, form: Form) {
        let valid = std::mem::replace(&mut self.host_flags, false);
        let after = op.offset as i32 + op.len as i32;
        match form {
            Form::JumpIf(c) => {
                self.need_flags(valid);
                let taken = self.a.jump_if(c);
                self.go(after, 0);
                self.a.land(taken);
                self.go(op.imm as i32, 1);
            }
            Form::Jump => self.go(op.imm as i32, 1),
            Form::Fallthrough => self.go(op.offset as i32, 0),
            Form::Call => {
                let away = self.push_return(after);
                self.detour(n, away, true);
                self.go(op.imm as i32, 1);
            }
            Form::Return => {
                self.a.load(8, RAX, gpr_slot(gpr::RSP));
                let mut away = self.host_pointer(8, true, false);
                self.a.load(8, RDX, Mem::at(RAX, 0));
                away.push(self.not_canonical());
                self.detour(n, away, true);
                self.a.alu_mem_imm(Alu::Add, 8, gpr_slot(gpr::RSP), 8 + op.imm as i32);
                self.a.store(8, RDX, RIP);
                self.a.jump_to(self.stubs.dispatch);
            }
            Form::JumpRegister => {
                self.a.load(8, RDX, slot(op.dst));
                let away = vec![self.not_canonical()];
                self.detour(n, away, true);
                self.a.store(8, RDX, RIP);
                self.a.jump_to(self.stubs.dispatch);
            }
            _ => {
                self.a.load(8, RDX, slot(op.dst));
                let mut away = vec![self.not_canonical()];
                self.a.mov(8, RSI, RDX);
                away.extend(self.push_return(after));
                self.detour(n, away, true);
                self.a.store(8, RSI, RIP);
                self.a.jump_to(self.stubs.dispatch);
            }
        }
    }

    /// Jumps away if RDX is not a canonical address. Uses RCX.
    fn not_canonical(&mut self) -> Jump {
        self.a.mov(8, RCX, RDX);
        self.a.shift(4, 8, RCX, 16);
        self.a.shift(7, 8, RCX, 16);
        self.a.alu(Alu::Cmp, 8, RCX, RDX);
        self.a.jump_if(NOT_EQUAL)
    }

    /// Pushes the address `after` bytes behind the block's start.
    fn push_return(&mut self, after: i32) -> Vec<Jump> {
        self.a.load(8, RAX, gpr_slot(gpr::RSP));
        self.a.lea(8, RAX, Mem::at(RAX, -8));
        let away = self.host_pointer(8, false, true);
        self.a.load(8, RCX, RIP);
        self.a.lea(8, RCX, Mem::at(RCX, after));
        self.a.store(8, RCX, Mem::at(RAX, 0));
        self.a.alu_mem_imm(Alu::Sub, 8, gpr_slot(gpr::RSP), 8);
        away
    }

    /// Goes on `distance` bytes from the block's start: by a link within the page, as
    /// [`Cpu::follow_link`](crate::cpu::Cpu::follow_link) has it, else through the jump cache.
    fn go(&mut self, distance: i32, which: usize) {
        self.a.alu_mem_imm(Alu::Add, 8, RIP, distance);
        let start = (self.block.machine & 0xfff) as i64;
        if !(0..0x1000).contains(&(start + distance as i64)) {
            self.a.jump_to(self.stubs.dispatch);
            return;
        }
        let (block, generation) = link(which);
        let a = &mut *self.a;
        a.load(8, RCX, GENERATION);
        a.alu_mem(Alu::Cmp, 8, RCX, generation);
        let miss = a.jump_if(NOT_EQUAL);
        a.load(8, RAX, block);
        a.jump_mem(NATIVE);
        a.land(miss);
        a.mov_imm(RAX, distance as u32 as u64);
        a.mov_imm(RCX, which as u64);
        a.jump_to(self.stubs.link);
    }
}
