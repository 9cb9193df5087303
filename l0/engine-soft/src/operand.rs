//! Operands of out-of-line instructions, taken from the iced instruction.

use iced_x86::{Instruction, OpKind, Register};
use x86_spec::segment::seg;

use crate::cpu::{Access, Cpu, Exec};

/// Whether the instruction has a memory operand with a ModRM byte.
pub(crate) fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
}

/// Index of a segment register by its iced name.
pub fn segment_index(r: Register) -> usize {
    match r {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

/// The segment of the memory operand: 64-bit code ignores ES, CS, SS and DS prefixes
/// (SDM Vol. 1 §3.4.2.1).
pub fn memory_segment(i: &Instruction) -> Register {
    let segment = i.memory_segment();
    let ignored = i.code_size() == iced_x86::CodeSize::Code64
        && matches!(i.segment_prefix(), Register::ES | Register::CS | Register::SS | Register::DS);
    if !ignored {
        return segment;
    }
    match i.memory_base() {
        Register::RSP | Register::RBP | Register::ESP | Register::EBP => Register::SS,
        _ => Register::DS,
    }
}

/// The value mask of an operand of `size` bytes.
pub const fn size_mask(size: u8) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (size as u32 * 8)) - 1 }
}

impl Cpu {
    /// Offset part of the memory operand's address, truncated to the address size.
    pub fn effective_address(&self, i: &Instruction) -> u64 {
        let base = i.memory_base();
        if base == Register::RIP {
            return self.ip.wrapping_add(i.memory_displacement64().wrapping_sub(i.ip()));
        }
        if base == Register::EIP {
            return self.ip.wrapping_add(i.memory_displacement64().wrapping_sub(i.ip())) as u32 as u64;
        }
        let index = self.reg(i.memory_index()).wrapping_mul(i.memory_index_scale() as u64);
        let sum = self.reg(base).wrapping_add(index).wrapping_add(i.memory_displacement64());
        sum & size_mask(self.address_size(i))
    }

    /// Address size in bytes of the instruction's memory operand.
    pub fn address_size(&self, i: &Instruction) -> u8 {
        let (base, index) = (i.memory_base(), i.memory_index());
        let by = if base != Register::None { base } else { index };
        if by.is_gpr64() || by == Register::RIP {
            8
        } else if by.is_gpr32() || by == Register::EIP {
            4
        } else if by.is_gpr16() {
            2
        } else {
            match i.memory_displ_size() {
                8 => 8,
                2 => 2,
                4 if self.is_64() => 8,
                _ => 4,
            }
        }
    }

    /// Linear address of the memory operand after segment and canonical checks for an
    /// access of `size` bytes.
    ///
    /// # Errors
    /// #GP(0) or #SS(0).
    pub fn operand_linear(&mut self, i: &Instruction, size: u32, access: Access) -> Exec<u64> {
        let ea = self.effective_address(i);
        self.segment_linear(segment_index(memory_segment(i)), ea, size, access)
    }

    /// Reads operand `n`, a general register or memory, of `size` bytes, zero-extended.
    ///
    /// # Errors
    /// Faults and exits of the memory access.
    pub fn read_operand(&mut self, i: &Instruction, n: u32, size: u8) -> Exec<u64> {
        if i.op_kind(n) == OpKind::Memory {
            let lin = self.operand_linear(i, size as u32, Access::Read)?;
            self.read_sized(lin, size)
        } else {
            Ok(self.reg(i.op_register(n)) & size_mask(size))
        }
    }

    /// Writes operand `n`, a general register or memory. A register operand is written
    /// with its own width.
    ///
    /// # Errors
    /// As [`Self::read_operand`].
    pub fn write_operand(&mut self, i: &Instruction, n: u32, size: u8, value: u64) -> Exec {
        if i.op_kind(n) == OpKind::Memory {
            let lin = self.operand_linear(i, size as u32, Access::Write)?;
            self.write_sized(lin, size, value)
        } else {
            self.set_reg(i.op_register(n), value);
            Ok(())
        }
    }
}
