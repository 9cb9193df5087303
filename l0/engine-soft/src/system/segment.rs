//! Segment registers and descriptors (SDM Vol. 3A chapters 3 and 5).
//!
//! Not supported: nothing of them is left out.

use engine::{Segment, interruptibility};
use iced_x86::{Instruction, OpKind, Register};
use x86_spec::exception;
use x86_spec::reg::rflags;
use x86_spec::segment::{AccessRights, seg};

use super::canonical;
use super::stack::Stack;
use crate::cpu::{Access, Cpu, Exec};
use crate::op::{SimpleFn, SimpleKind};
use crate::operand::{segment_index, size_mask};

/// System descriptor types (SDM Vol. 3A table 3-2).
pub(super) mod ty {
    pub const TSS16_AVAILABLE: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS16_BUSY: u8 = 3;
    pub const CALL_GATE16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE16: u8 = 6;
    pub const TRAP_GATE16: u8 = 7;
    pub const TSS_AVAILABLE: u8 = 9;
    pub const TSS_BUSY: u8 = 11;
    pub const CALL_GATE: u8 = 12;
    pub const INTERRUPT_GATE: u8 = 14;
    pub const TRAP_GATE: u8 = 15;
}

/// The access rights of a register that a null selector was loaded into.
pub(super) const NULL: Segment =
    Segment { base: 0, limit: 0, access: AccessRights(AccessRights::UNUSABLE), selector: 0 };

/// A descriptor and where it was read from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Descriptor {
    /// Linear address.
    pub address: u64,
    /// Its eight bytes.
    pub raw: u64,
}

impl Descriptor {
    /// Access rights in VMCS format.
    pub fn access(&self) -> AccessRights {
        AccessRights::from_descriptor_high((self.raw >> 32) as u32)
    }
    /// Base address, 32 bits.
    pub fn base(&self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }
    /// Limit in bytes.
    pub fn limit(&self) -> u32 {
        let l = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.access().0 & AccessRights::G != 0 { l << 12 | 0xfff } else { l }
    }
    /// As the hidden part of a segment register.
    pub fn segment(&self, selector: u16) -> Segment {
        Segment { base: self.base(), limit: self.limit(), access: self.access(), selector }
    }
    /// Whether it is a system descriptor of type `t`.
    pub fn is_system(&self, t: u8) -> bool {
        !self.access().is_code_or_data() && self.access().ty() == t
    }
    /// Gates: the selector.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }
    /// Gates: the low 32 bits of the offset.
    pub fn gate_offset(&self) -> u64 {
        self.raw & 0xffff | self.raw >> 32 & 0xffff_0000
    }
}

/// Whether a selector is null.
pub(super) const fn is_null(selector: u16) -> bool {
    selector & !3 == 0
}

impl Cpu {
    /// Linear address `offset` bytes into a system table or segment: 32 bits wide outside
    /// IA-32e mode.
    pub(super) fn table_linear(&mut self, base: u64, offset: u64) -> Exec<u64> {
        let lin = base.wrapping_add(offset);
        if !self.long_mode() {
            Ok(lin & 0xffff_ffff)
        } else if canonical(lin) {
            Ok(lin)
        } else {
            Err(self.gp(0))
        }
    }

    /// The descriptor that `selector` names, or `None` beyond its table's limit.
    pub(super) fn try_descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, self.gdtr.limit)
        } else {
            let l = &self.segments[seg::LDTR];
            if l.access.unusable() {
                return Ok(None);
            }
            (l.base, l.limit)
        };
        let offset = selector as u64 & !7;
        if offset + 7 > limit as u64 {
            return Ok(None);
        }
        let address = self.table_linear(base, offset)?;
        let raw = self.sys_read::<u64>(address)?;
        Ok(Some(Descriptor { address, raw }))
    }

    /// The descriptor that `selector` names.
    ///
    /// # Errors
    /// `vector`(selector + `ext`) beyond the table's limit.
    pub(super) fn descriptor(&mut self, selector: u16, vector: u8, ext: u32) -> Exec<Descriptor> {
        match self.try_descriptor(selector)? {
            Some(d) => Ok(d),
            None => Err(self.fault_code(vector, selector as u32 & 0xfffc | ext)),
        }
    }

    /// The upper eight bytes of a 16-byte system descriptor (SDM Vol. 3A §3.5.2).
    ///
    /// # Errors
    /// #GP(selector) beyond the limit or when its type field isn't zero.
    pub(super) fn descriptor_upper(&mut self, selector: u16, ext: u32) -> Exec<u64> {
        let code = selector as u32 & 0xfffc | ext;
        match self.try_descriptor(selector.wrapping_add(8))? {
            Some(d) if selector <= 0xfff7 && d.raw >> 40 & 0x1f == 0 => Ok(d.raw),
            _ => Err(self.gp(code)),
        }
    }

    /// Sets the accessed bit of a code or data descriptor in memory (SDM Vol. 3A §3.4.5.1).
    pub(super) fn mark_accessed(&mut self, d: &mut Descriptor) -> Exec {
        const ACCESSED: u64 = 1 << 40;
        if d.raw & ACCESSED == 0 {
            d.raw |= ACCESSED;
            self.sys_write::<u8>(d.address.wrapping_add(5), (d.raw >> 40) as u8)?;
        }
        Ok(())
    }

    /// What a segment register holds after loading `selector` in real or virtual-8086
    /// mode (SDM Vol. 3B §21.1.1, §21.2.1).
    pub(super) fn real_segment(&self, index: usize, selector: u16) -> Segment {
        let base = (selector as u64) << 4;
        if self.v8086() {
            Segment { base, limit: 0xffff, access: AccessRights(0xf3), selector }
        } else {
            // Limit and attributes stay: unreal mode depends on it. A register that is
            // unusable becomes usable.
            let old = self.segments[index];
            let access = if old.access.unusable() { AccessRights(0x93) } else { old.access };
            let limit = if old.access.unusable() { 0xffff } else { old.limit };
            Segment { base, limit, access, selector }
        }
    }

    /// MOV or POP to DS, ES, FS, GS or SS, and LDS and its kin (SDM Vol. 2B, MOV).
    ///
    /// # Errors
    /// #GP, #NP, #SS, or what reading the descriptor gives.
    pub(super) fn load_segment(&mut self, index: usize, selector: u16) -> Exec {
        let s = if self.real_or_v86() {
            self.real_segment(index, selector)
        } else if index == seg::SS {
            self.checked_stack_segment(selector)?
        } else {
            self.checked_data_segment(selector)?
        };
        self.set_segment(index, s);
        Ok(())
    }

    fn checked_stack_segment(&mut self, selector: u16) -> Exec<Segment> {
        let code = selector as u32 & 0xfffc;
        if is_null(selector) {
            // 64-bit mode allows it at CPL 0–2 with matching RPL (SDM Vol. 3A §5.4.1.1).
            if self.is_64() && self.cpl < 3 && (selector & 3) as u8 == self.cpl {
                return Ok(null_stack_segment(selector, self.cpl));
            }
            return Err(self.gp(0));
        }
        let mut d = self.descriptor(selector, exception::GP, 0)?;
        let a = d.access();
        let writable_data = a.is_code_or_data() && !a.is_code() && a.read_write();
        if (selector & 3) as u8 != self.cpl || !writable_data || a.dpl() != self.cpl {
            return Err(self.gp(code));
        }
        if !a.present() {
            return Err(self.fault_code(exception::SS, code));
        }
        self.mark_accessed(&mut d)?;
        Ok(d.segment(selector))
    }

    fn checked_data_segment(&mut self, selector: u16) -> Exec<Segment> {
        if is_null(selector) {
            return Ok(Segment { selector, ..NULL });
        }
        let code = selector as u32 & 0xfffc;
        let mut d = self.descriptor(selector, exception::GP, 0)?;
        let a = d.access();
        if !a.is_code_or_data() || a.is_code() && !a.read_write() {
            return Err(self.gp(code));
        }
        let rpl = (selector & 3) as u8;
        if !(a.is_code() && a.conforming()) && (rpl > a.dpl() || self.cpl > a.dpl()) {
            return Err(self.gp(code));
        }
        if !a.present() {
            return Err(self.fault_code(exception::NP, code));
        }
        self.mark_accessed(&mut d)?;
        Ok(d.segment(selector))
    }

    /// Starts the interrupt shadow of MOV SS or POP SS (SDM Vol. 3A §6.8.3).
    pub(super) fn block_by_mov_ss(&mut self) {
        self.begin_shadow(interruptibility::MOV_SS);
    }
}

/// SS with a null selector in 64-bit mode. Its DPL is the CPL, which is where a VMCS
/// keeps it.
pub(super) fn null_stack_segment(selector: u16, cpl: u8) -> Segment {
    Segment {
        selector,
        access: AccessRights(AccessRights::UNUSABLE | AccessRights::DB | (cpl as u32) << 5),
        ..NULL
    }
}

pub(super) fn lookup_mov(i: &Instruction) -> Option<(SimpleFn, SimpleKind)> {
    if i.op_kind(0) == OpKind::Register && i.op0_register().is_segment_register() {
        // Only SS changes the stack's width and blocks interrupts, but DS and ES enter block
        // decoding too, so all end the block.
        return Some((mov_to_segment, SimpleKind::End));
    }
    if i.op_kind(1) == OpKind::Register && i.op1_register().is_segment_register() {
        return Some((mov_from_segment, SimpleKind::Next));
    }
    None
}

pub(super) fn lookup_push_pop(i: &Instruction) -> Option<(SimpleFn, SimpleKind)> {
    if i.op_kind(0) != OpKind::Register || !i.op0_register().is_segment_register() {
        return None;
    }
    Some(if i.mnemonic() == iced_x86::Mnemonic::Push {
        (push_segment, SimpleKind::Next)
    } else {
        (pop_segment, SimpleKind::End)
    })
}

fn mov_to_segment(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if i.op0_register() == Register::CS {
        return Err(cpu.ud());
    }
    let index = segment_index(i.op0_register());
    let selector = cpu.read_operand(i, 1, 2)? as u16;
    cpu.load_segment(index, selector)?;
    if index == seg::SS {
        cpu.block_by_mov_ss();
    }
    Ok(())
}

fn mov_from_segment(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let selector = cpu.segments[segment_index(i.op1_register())].selector as u64;
    // To a register the selector is zero-extended to the operand size, to memory it is
    // always 16 bits.
    cpu.write_operand(i, 0, 2, selector)
}

/// Operand size of a push or pop, from how the stack pointer moves.
fn stack_operand_size(i: &Instruction) -> u8 {
    i.stack_pointer_increment().unsigned_abs() as u8
}

fn push_segment(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let selector = cpu.segments[segment_index(i.op0_register())].selector as u64;
    let mut stack = Stack::current(cpu);
    stack.push(cpu, stack_operand_size(i), selector)?;
    stack.commit(cpu);
    Ok(())
}

fn pop_segment(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let index = segment_index(i.op0_register());
    let mut stack = Stack::current(cpu);
    let selector = stack.pop(cpu, stack_operand_size(i))? as u16;
    cpu.load_segment(index, selector)?;
    // The pointer's width is that of the old SS.
    stack.commit(cpu);
    if index == seg::SS {
        cpu.block_by_mov_ss();
    }
    Ok(())
}

/// Reads a far pointer operand: offset of `size` bytes, then the selector.
pub(super) fn read_far_pointer(cpu: &mut Cpu, i: &Instruction, n: u32, size: u8) -> Exec<(u16, u64)> {
    debug_assert_eq!(i.op_kind(n), OpKind::Memory);
    let lin = cpu.operand_linear(i, size as u32 + 2, Access::Read)?;
    let offset = cpu.read_sized(lin, size)?;
    let mut selector_at = lin.wrapping_add(size as u64);
    if !cpu.is_64() {
        selector_at &= 0xffff_ffff;
    }
    let selector = cpu.read_sized(selector_at, 2)? as u16;
    Ok((selector, offset))
}

/// LDS, LES, LFS, LGS, LSS (SDM Vol. 2A).
pub(super) fn load_far_pointer(cpu: &mut Cpu, i: &Instruction) -> Exec {
    use iced_x86::Mnemonic;
    let index = match i.mnemonic() {
        Mnemonic::Les => seg::ES,
        Mnemonic::Lds => seg::DS,
        Mnemonic::Lss => seg::SS,
        Mnemonic::Lfs => seg::FS,
        _ => seg::GS,
    };
    let size = i.op0_register().size() as u8;
    let (selector, offset) = read_far_pointer(cpu, i, 1, size)?;
    cpu.load_segment(index, selector)?;
    cpu.set_reg(i.op0_register(), offset);
    Ok(())
}

fn set_zf(cpu: &mut Cpu, zf: bool) {
    let f = cpu.rflags() & !rflags::ZF | if zf { rflags::ZF } else { 0 };
    cpu.set_status_flags(f);
}

/// The descriptor for LAR, LSL, VERR and VERW: `None` if null, beyond its table or not
/// visible at CPL and RPL (conforming code always is).
fn visible_descriptor(cpu: &mut Cpu, selector: u16) -> Exec<Option<Descriptor>> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(d) = cpu.try_descriptor(selector)? else { return Ok(None) };
    let a = d.access();
    let conforming = a.is_code() && a.conforming();
    let rpl = (selector & 3) as u8;
    Ok((conforming || cpu.cpl <= a.dpl() && rpl <= a.dpl()).then_some(d))
}

fn require_protected(cpu: &mut Cpu) -> Exec {
    if cpu.real_or_v86() { Err(cpu.ud()) } else { Ok(()) }
}

/// The selector operand of LAR and LSL: memory is 16 bits whatever the operand size.
fn selector_operand(cpu: &mut Cpu, i: &Instruction, n: u32) -> Exec<u16> {
    Ok(cpu.read_operand(i, n, 2)? as u16)
}

/// LAR (SDM Vol. 2A).
pub(super) fn lar(cpu: &mut Cpu, i: &Instruction) -> Exec {
    require_protected(cpu)?;
    let selector = selector_operand(cpu, i, 1)?;
    let d = visible_descriptor(cpu, selector)?.filter(|d| {
        let a = d.access();
        a.is_code_or_data()
            || match a.ty() {
                ty::LDT | ty::TSS_AVAILABLE | ty::TSS_BUSY | ty::CALL_GATE => true,
                ty::TSS16_AVAILABLE | ty::TSS16_BUSY | ty::CALL_GATE16 | ty::TASK_GATE => !cpu.long_mode(),
                _ => false,
            }
    });
    if let Some(d) = d {
        let size = i.op0_register().size() as u8;
        cpu.set_reg(i.op0_register(), d.raw >> 32 & 0x00ff_ff00 & size_mask(size));
    }
    set_zf(cpu, d.is_some());
    Ok(())
}

/// LSL (SDM Vol. 2A).
pub(super) fn lsl(cpu: &mut Cpu, i: &Instruction) -> Exec {
    require_protected(cpu)?;
    let selector = selector_operand(cpu, i, 1)?;
    let d = visible_descriptor(cpu, selector)?.filter(|d| {
        let a = d.access();
        a.is_code_or_data()
            || match a.ty() {
                ty::LDT | ty::TSS_AVAILABLE | ty::TSS_BUSY => true,
                ty::TSS16_AVAILABLE | ty::TSS16_BUSY => !cpu.long_mode(),
                _ => false,
            }
    });
    if let Some(d) = d {
        let size = i.op0_register().size() as u8;
        cpu.set_reg(i.op0_register(), d.limit() as u64 & size_mask(size));
    }
    set_zf(cpu, d.is_some());
    Ok(())
}

/// VERR (SDM Vol. 2B).
pub(super) fn verr(cpu: &mut Cpu, i: &Instruction) -> Exec {
    require_protected(cpu)?;
    let selector = selector_operand(cpu, i, 0)?;
    let d = visible_descriptor(cpu, selector)?;
    let ok = d.is_some_and(|d| {
        let a = d.access();
        a.is_code_or_data() && (!a.is_code() || a.read_write())
    });
    set_zf(cpu, ok);
    Ok(())
}

/// VERW (SDM Vol. 2B).
pub(super) fn verw(cpu: &mut Cpu, i: &Instruction) -> Exec {
    require_protected(cpu)?;
    let selector = selector_operand(cpu, i, 0)?;
    let d = visible_descriptor(cpu, selector)?;
    let ok = d.is_some_and(|d| {
        let a = d.access();
        a.is_code_or_data() && !a.is_code() && a.read_write()
    });
    set_zf(cpu, ok);
    Ok(())
}

/// ARPL (SDM Vol. 2A); #UD in real and virtual-8086 mode.
pub(super) fn arpl(cpu: &mut Cpu, i: &Instruction) -> Exec {
    require_protected(cpu)?;
    let dst = cpu.read_operand(i, 0, 2)?;
    let rpl = cpu.reg(i.op1_register()) & 3;
    let adjust = dst & 3 < rpl;
    if adjust {
        let v = dst & !3 | rpl;
        if i.op_kind(0) == OpKind::Register {
            // 16-bit register forms keep the upper half even if iced names the wide register.
            let r = i.op0_register();
            let old = cpu.reg(r);
            cpu.set_reg(r, old & !0xffff | v);
        } else {
            cpu.write_operand(i, 0, 2, v)?;
        }
    }
    set_zf(cpu, adjust);
    Ok(())
}
