//! Near control transfers.
//!
//! In 64-bit mode jumps, calls, returns and conditional jumps have handlers of their own, which
//! find the next block by link or jump cache. All others go through one function that follows the
//! operand size and checks the code-segment limit.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use x86_spec::reg::gpr::{RCX, RSP};
use x86_spec::segment::seg;

use super::misc::{by_condition, condition, condition_code};
use super::{Addr, AddrForm, Base, Flow, Full, Seg, by_addr, get, operand_size};
use crate::attempt;
use crate::block::Block;
use crate::cpu::{Access, Cpu, Exec};
use crate::mmu::canonical;
use crate::op::{Handler, Op, SimpleFn, simple_end};
use crate::operand::size_mask;

impl Cpu {
    /// The block linked to exit `slot` of the running block, or null and a request to the run
    /// loop to set the link.
    #[inline(always)]
    pub(crate) fn follow_link(&mut self, slot: usize, start: u64) -> *const Block {
        // SAFETY: `block` runs, so it is alive.
        let links = unsafe { &(*self.block).links };
        let link = &links[slot & 1];
        if link.generation == self.blocks.generation {
            return link.block;
        }
        self.link_from = self.block;
        self.link_slot = slot as u8;
        self.link_start = start;
        std::ptr::null()
    }

    /// The block for RIP from the jump cache, or null.
    #[inline(always)]
    pub(crate) fn follow_jump(&self) -> *const Block {
        let key = self.ctx << 8 | self.block_mode as u64;
        self.blocks.jump(self.rip(), key, self.mmu.fetch_epoch).unwrap_or(std::ptr::null())
    }
}

macro_rules! end_handler {
    ($(#[$d:meta])* fn $name:ident $([$($g:tt)*])? ($cpu:ident, $op:ident, $o:ident) $body:block) => {
        $(#[$d])*
        ///
        /// # Safety
        /// As [`Handler`]; 64-bit mode.
        pub(crate) unsafe extern "sysv64-unwind" fn $name $(<$($g)*>)? ($cpu: &mut Cpu, $op: *const Op) -> *const Block {
            // SAFETY: the contract of `Handler`; register fields were made by `lower`.
            unsafe {
                let $o = &*$op;
                $body
            }
        }
    };
}

/// Address of the instruction after `o` for a block that starts at `start`.
#[inline(always)]
fn after(o: &Op, start: u64) -> u64 {
    start.wrapping_add(o.offset as u64 + o.len as u64)
}

end_handler! {
    /// jcc rel; `imm` is the target relative to the block's start
    fn jcc[const C: u8](cpu, op, o) {
        let start = cpu.rip();
        if condition(cpu.flags, C) {
            cpu.set_rip(start.wrapping_add(o.imm));
            cpu.follow_link(1, start)
        } else {
            cpu.set_rip(after(o, start));
            cpu.follow_link(0, start)
        }
    }
}
end_handler! {
    /// jmp rel
    fn jmp(cpu, op, o) {
        let start = cpu.rip();
        cpu.set_rip(start.wrapping_add(o.imm));
        cpu.follow_link(1, start)
    }
}
end_handler! {
    /// call rel
    fn call(cpu, op, o) {
        let start = cpu.rip();
        let sp = cpu.regs[RSP].wrapping_sub(8);
        attempt!(cpu, op, cpu.write(sp, after(o, start)));
        cpu.regs[RSP] = sp;
        cpu.set_rip(start.wrapping_add(o.imm));
        if (start ^ cpu.rip()) >> 12 == 0 { cpu.follow_link(1, start) } else { cpu.follow_jump() }
    }
}
end_handler! {
    /// ret, ret imm
    fn ret(cpu, op, o) {
        let sp = cpu.regs[RSP];
        let target: u64 = attempt!(cpu, op, cpu.read(sp));
        if !canonical(target) {
            attempt!(cpu, op, Err(cpu.gp(0)));
        }
        cpu.regs[RSP] = sp.wrapping_add(8 + o.imm);
        cpu.set_rip(target);
        cpu.follow_jump()
    }
}
/// Jumps (or with `CALL` calls) to `target`.
#[inline(always)]
unsafe fn indirect<const CALL: bool>(cpu: &mut Cpu, op: *const Op, target: u64) -> *const Block {
    // SAFETY: the caller is a handler.
    unsafe {
        if !canonical(target) {
            attempt!(cpu, op, Err(cpu.gp(0)));
        }
        if CALL {
            let sp = cpu.regs[RSP].wrapping_sub(8);
            let next = after(&*op, cpu.rip());
            attempt!(cpu, op, cpu.write(sp, next));
            cpu.regs[RSP] = sp;
        }
        cpu.set_rip(target);
        cpu.follow_jump()
    }
}
end_handler! {
    /// jmp, call r64
    fn indirect_r[const CALL: bool](cpu, op, o) {
        let target = get::<u64>(cpu, o.dst);
        indirect::<CALL>(cpu, op, target)
    }
}
end_handler! {
    /// jmp m64
    fn jmp_m[A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, 8, Access::Read));
        let target: u64 = attempt!(cpu, op, cpu.read(lin));
        indirect::<false>(cpu, op, target)
    }
}
end_handler! {
    /// call m64
    fn call_m[A: Addr](cpu, op, o) {
        let lin = attempt!(cpu, op, A::linear(cpu, o, 8, Access::Read));
        let target: u64 = attempt!(cpu, op, cpu.read(lin));
        indirect::<true>(cpu, op, target)
    }
}
end_handler! {
    /// End of a block that was cut: goes on with the next instruction. `offset` is the block's length.
    fn fallthrough(cpu, op, o) {
        let start = cpu.rip();
        cpu.set_rip(start.wrapping_add(o.offset as u64) & cpu.ip_mask());
        cpu.follow_link(0, start)
    }
}

/// Jumps near to `target` in the operand size, after the checks.
fn jump_near(cpu: &mut Cpu, target: u64, size: u8) -> Exec {
    let target = target & size_mask(size);
    cpu.check_near_target(target)?;
    cpu.set_rip(target);
    Ok(())
}

impl Cpu {
    /// #GP(0) for a near target outside the code segment or not canonical.
    pub(crate) fn check_near_target(&mut self, target: u64) -> Exec {
        let bad =
            if self.is_64() { !canonical(target) } else { target > self.segments[seg::CS].limit as u64 };
        if bad { Err(self.gp(0)) } else { Ok(()) }
    }
}

/// Size in bytes of the instruction pointer that a near branch writes.
pub(crate) fn branch_size(i: &Instruction) -> u8 {
    match i.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => match i.code() {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            Code::Retnq | Code::Retnq_imm16 => 8,
            _ => operand_size(i, 0),
        },
    }
}

/// Every near transfer, by the book.
fn near(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = branch_size(i);
    let target = cpu.ip.wrapping_add(i.near_branch_target().wrapping_sub(i.ip()));
    match i.mnemonic() {
        Mnemonic::Jmp if i.is_jmp_short_or_near() => jump_near(cpu, target, size),
        Mnemonic::Jmp => {
            let t = cpu.read_operand(i, 0, size)?;
            jump_near(cpu, t, size)
        }
        Mnemonic::Call => {
            let t = if i.is_call_near() { target } else { cpu.read_operand(i, 0, size)? } & size_mask(size);
            cpu.check_near_target(t)?;
            let next = cpu.rip();
            cpu.push(size, next)?;
            cpu.set_rip(t);
            Ok(())
        }
        Mnemonic::Ret => {
            let t = cpu.peek_stack(0, size)?;
            cpu.check_near_target(t)?;
            let extra = if i.op_count() == 1 { i.immediate16() as u64 } else { 0 };
            cpu.add_stack(size as u64);
            cpu.add_stack(extra);
            cpu.set_rip(t);
            Ok(())
        }
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => {
            let mask = counter_mask(i);
            let count = cpu.regs[RCX].wrapping_sub(1) & mask;
            let zf = cpu.flags & 0x4000 != 0;
            let taken = count != 0
                && match i.mnemonic() {
                    Mnemonic::Loope => zf,
                    Mnemonic::Loopne => !zf,
                    _ => true,
                };
            if taken {
                jump_near(cpu, target, size)?;
            }
            cpu.regs[RCX] = merge_counter(cpu.regs[RCX], count, mask);
            Ok(())
        }
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => {
            let mask = match i.mnemonic() {
                Mnemonic::Jcxz => 0xffff,
                Mnemonic::Jecxz => 0xffff_ffff,
                _ => u64::MAX,
            };
            if cpu.regs[RCX] & mask == 0 { jump_near(cpu, target, size) } else { Ok(()) }
        }
        _ => {
            if condition(cpu.flags, condition_code(i) as u8) {
                jump_near(cpu, target, size)
            } else {
                Ok(())
            }
        }
    }
}

/// Writes the counter register of the address size: ECX zeroes the upper half, CX keeps it.
fn merge_counter(old: u64, count: u64, mask: u64) -> u64 {
    if mask == 0xffff { old & !0xffff | count } else { count }
}

/// Mask of the counter that LOOP uses, by its address size.
fn counter_mask(i: &Instruction) -> u64 {
    use Code as C;
    match i.code() {
        C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX => 0xffff,
        C::Loop_rel8_64_RCX
        | C::Loop_rel8_16_RCX
        | C::Loope_rel8_64_RCX
        | C::Loope_rel8_16_RCX
        | C::Loopne_rel8_64_RCX
        | C::Loopne_rel8_16_RCX => u64::MAX,
        _ => 0xffff_ffff,
    }
}

/// Picks the handler. `None`: not a near transfer.
pub(super) fn lower(i: &Instruction, bits64: bool, op: &mut Op, form: AddrForm) -> Option<Flow> {
    use Mnemonic as M;
    let mem = i.op_count() > 0 && i.op_kind(0) == OpKind::Memory;
    op.imm = i.near_branch_target();
    let fast = bits64 && branch_size(i) == 8;
    let run: Handler = match i.mnemonic() {
        M::Jmp if i.is_jmp_far() || i.is_jmp_far_indirect() => return None,
        M::Call if i.is_call_far() || i.is_call_far_indirect() => return None,
        M::Jmp if fast && i.is_jmp_short_or_near() => jmp,
        M::Jmp if fast && mem => by_addr!(form, jmp_m),
        M::Jmp if fast => indirect_r::<false>,
        M::Call if fast && i.is_call_near() => {
            op.stack = true;
            call
        }
        M::Call if fast && mem => by_addr!(form, call_m),
        M::Call if fast => {
            op.stack = true;
            indirect_r::<true>
        }
        M::Ret if fast => {
            op.stack = true;
            op.imm = if i.op_count() == 1 { i.immediate16() as u64 } else { 0 };
            ret
        }
        M::Jmp | M::Call | M::Ret | M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => {
            simple(op)
        }
        _ if i.is_jcc_short_or_near() && fast => by_condition!(condition_code(i), jcc),
        _ if i.is_jcc_short_or_near() => simple(op),
        _ => return None,
    };
    op.run = run;
    Some(Flow::End)
}

fn simple(op: &mut Op) -> Handler {
    op.data = near as SimpleFn as usize;
    simple_end
}
