//! Control and debug registers, XCR0 (SDM Vol. 2B, MOV; Vol. 3A §2.5; Vol. 3C §26.1.3, §26.3).
//!
//! Not supported: CR4 bits outside [`SUPPORTED_CR4`] (#GP), debug extensions for RTM.

use iced_x86::{Instruction, OpKind, Register};
use x86_spec::controls::{PrimaryControls, SecondaryControls};
use x86_spec::exception;
use x86_spec::exit::ExitReason;
use x86_spec::exit::cr_access::{self, Kind};
use x86_spec::reg::{cr0, cr4, dr, efer, gpr};
use x86_spec::segment::seg;

use super::{MAX_PHYSICAL_BITS, instruction_exit_for};
use crate::cpu::{Cpu, Event, Exec};
use crate::op::{SimpleFn, SimpleKind};
use crate::operand::segment_index;

/// CR4 bits that the engine implements; setting another is #GP(0).
pub const SUPPORTED_CR4: u64 = cr4::VME
    | cr4::PVI
    | cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::VMXE
    | cr4::FSGSBASE
    | cr4::PCIDE
    | cr4::OSXSAVE
    | cr4::SMEP
    | cr4::SMAP;

pub(super) fn lookup_mov(i: &Instruction) -> Option<(SimpleFn, SimpleKind)> {
    let (dst, src) = (i.op0_register(), i.op1_register());
    if i.op_kind(0) == OpKind::Register && dst.is_cr() {
        Some((mov_to_cr, SimpleKind::End))
    } else if i.op_kind(1) == OpKind::Register && src.is_cr() {
        Some((mov_from_cr, SimpleKind::Next))
    } else if i.op_kind(0) == OpKind::Register && dst.is_dr() {
        Some((mov_to_dr, SimpleKind::End))
    } else if i.op_kind(1) == OpKind::Register && src.is_dr() {
        Some((mov_from_dr, SimpleKind::Next))
    } else {
        None
    }
}

fn cr_exit(cpu: &mut Cpu, i: &Instruction, qualification: u64) -> Exec {
    let exit = instruction_exit_for(i, ExitReason::CrAccess).qualified(qualification);
    Err(cpu.exit(exit))
}

fn mov_to_cr(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let value = cpu.reg(i.op1_register());
    let gpr = i.op1_register().number() as u8;
    let number = i.op0_register().number() as u8;
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let q = cr_access::mov(number, Kind::MovTo, gpr);
    match number {
        0 => {
            if (value ^ cpu.controls.cr0_shadow) & cpu.controls.cr0_mask != 0 {
                return cr_exit(cpu, i, q);
            }
            let mask = cpu.controls.cr0_mask;
            cpu.write_cr0(cpu.cr0 & mask | value & !mask)
        }
        2 => {
            cpu.cr2 = value;
            Ok(())
        }
        3 => {
            if cpu.primary(PrimaryControls::CR3_LOAD_EXITING) && !is_cr3_target(cpu, value) {
                return cr_exit(cpu, i, q);
            }
            cpu.write_cr3(value)
        }
        4 => {
            if (value ^ cpu.controls.cr4_shadow) & cpu.controls.cr4_mask != 0 {
                return cr_exit(cpu, i, q);
            }
            let mask = cpu.controls.cr4_mask;
            cpu.write_cr4(cpu.cr4 & mask | value & !mask)
        }
        _ => {
            if cpu.primary(PrimaryControls::CR8_LOAD_EXITING) {
                return cr_exit(cpu, i, q);
            }
            if value & !15 != 0 {
                return Err(cpu.gp(0));
            }
            cpu.write_tpr(value);
            Ok(())
        }
    }
}

fn is_cr3_target(cpu: &Cpu, value: u64) -> bool {
    let n = (cpu.controls.cr3_target_count as usize).min(4);
    cpu.controls.cr3_targets.iter().take(n).any(|t| *t == value)
}

fn mov_from_cr(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let number = i.op1_register().number() as u8;
    if !matches!(number, 0 | 2 | 3 | 4 | 8) {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let q = cr_access::mov(number, Kind::MovFrom, i.op0_register().number() as u8);
    let value = match number {
        0 => cpu.visible_cr0(),
        2 => cpu.cr2,
        3 => {
            if cpu.primary(PrimaryControls::CR3_STORE_EXITING) {
                return cr_exit(cpu, i, q);
            }
            cpu.cr3
        }
        4 => cpu.visible_cr4(),
        _ => {
            if cpu.primary(PrimaryControls::CR8_STORE_EXITING) {
                return cr_exit(cpu, i, q);
            }
            cpu.read_tpr() as u64
        }
    };
    cpu.set_reg(i.op0_register(), value);
    Ok(())
}

impl Cpu {
    /// CR0 as the guest reads it (SDM Vol. 3C §25.6.6).
    pub(crate) fn visible_cr0(&self) -> u64 {
        let c = &self.controls;
        self.cr0 & !c.cr0_mask | c.cr0_shadow & c.cr0_mask
    }

    /// CR4 as the guest reads it.
    pub(crate) fn visible_cr4(&self) -> u64 {
        let c = &self.controls;
        self.cr4 & !c.cr4_mask | c.cr4_shadow & c.cr4_mask
    }

    /// MOV to CR0 with the value that really goes there.
    ///
    /// # Errors
    /// #GP(0).
    fn write_cr0(&mut self, value: u64) -> Exec {
        if value >> 32 != 0
            || value & (cr0::PG | cr0::PE) == cr0::PG
            || value & (cr0::NW | cr0::CD) == cr0::NW
        {
            return Err(self.gp(0));
        }
        // Undefined bits of the low half read as zero; ET is always one.
        let new = value & cr0::DEFINED | cr0::ET;
        let changed = new ^ self.cr0;
        let mut efer = self.efer;
        if changed & cr0::PG != 0 {
            if new & cr0::PG != 0 {
                if efer & efer::LME != 0 {
                    if self.cr4 & cr4::PAE == 0 || self.segments[seg::CS].access.long() {
                        return Err(self.gp(0));
                    }
                    efer |= efer::LMA;
                }
            } else {
                if self.is_64() || self.cr4 & cr4::PCIDE != 0 {
                    return Err(self.gp(0));
                }
                efer &= !efer::LMA;
            }
        }
        let pae = new & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 && efer & efer::LMA == 0;
        if pae && changed & (cr0::PG | cr0::CD | cr0::NW) != 0 {
            self.load_pdptes(self.cr3)?;
        }
        if efer != self.efer {
            self.set_efer(efer);
        }
        self.set_cr0(new);
        // WP is part of what translations are tagged with.
        if changed & cr0::PG != 0 {
            self.flush_tlb(true);
        }
        Ok(())
    }

    /// MOV to CR3.
    ///
    /// # Errors
    /// #GP(0).
    fn write_cr3(&mut self, value: u64) -> Exec {
        let mut value = value;
        let mut flush = true;
        if self.cr4 & cr4::PCIDE != 0 {
            flush = value >> 63 == 0;
            value &= !(1 << 63);
        }
        if self.is_64() && value >> MAX_PHYSICAL_BITS != 0 {
            return Err(self.gp(0));
        }
        let pae = self.cr0 & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 && !self.long_mode();
        if pae {
            self.load_pdptes(value)?;
        }
        self.load_cr3(value, flush);
        Ok(())
    }

    /// MOV to CR4 with the value that really goes there.
    ///
    /// # Errors
    /// #GP(0).
    fn write_cr4(&mut self, new: u64) -> Exec {
        let changed = new ^ self.cr4;
        let long = self.long_mode();
        if new & !SUPPORTED_CR4 != 0
            || long && new & cr4::PAE == 0
            || changed & new & cr4::PCIDE != 0 && (!long || self.cr3 & 0xfff != 0)
        {
            return Err(self.gp(0));
        }
        const PAGING: u64 = cr4::PGE | cr4::PSE | cr4::PAE | cr4::SMEP;
        let pae = self.cr0 & cr0::PG != 0 && new & cr4::PAE != 0 && !long;
        if pae && changed & PAGING != 0 {
            self.load_pdptes(self.cr3)?;
        }
        self.set_cr4(new);
        if changed & (PAGING | cr4::SMAP | cr4::PCIDE) != 0 {
            self.flush_tlb(true);
        }
        Ok(())
    }
}

/// CLTS (SDM Vol. 3C §26.1.3, §26.3).
pub(super) fn clts(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let owned = cpu.controls.cr0_mask & cr0::TS != 0;
    if !owned {
        cpu.set_cr0(cpu.cr0 & !cr0::TS);
    } else if cpu.controls.cr0_shadow & cr0::TS != 0 {
        return cr_exit(cpu, i, (Kind::Clts as u64) << 4);
    }
    Ok(())
}

/// LMSW: loads CR0 bits 3:0, of which PE can only be set.
pub(super) fn lmsw(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let source = cpu.read_operand(i, 0, 2)?;
    let (mask, shadow) = (cpu.controls.cr0_mask, cpu.controls.cr0_shadow);
    let sets_pe = mask & !shadow & source & cr0::PE != 0;
    let changes = (source ^ shadow) & mask & (cr0::MP | cr0::EM | cr0::TS) != 0;
    if sets_pe || changes {
        let memory = i.op_kind(0) == OpKind::Memory;
        let mut exit = instruction_exit_for(i, ExitReason::CrAccess)
            .qualified((Kind::Lmsw as u64) << 4 | (memory as u64) << 6 | source << 16);
        if memory {
            exit.guest_linear = super::info::memory_linear(cpu, i);
        }
        return Err(cpu.exit(exit));
    }
    let loadable = 0xf & !mask;
    let value = cpu.cr0 & !(loadable & !cr0::PE) | source & loadable;
    cpu.write_cr0(value)
}

/// SMSW. A memory operand is 16 bits; a register takes as much of CR0 as it has bits.
pub(super) fn smsw(cpu: &mut Cpu, i: &Instruction) -> Exec {
    umip(cpu)?;
    let value = cpu.visible_cr0();
    cpu.write_operand(i, 0, 2, value)
}

/// User-mode instruction prevention (SDM Vol. 3A §2.5, CR4.UMIP).
pub(super) fn umip(cpu: &mut Cpu) -> Exec {
    if cpu.cr4 & cr4::UMIP != 0 && cpu.cpl > 0 && cpu.protected() { Err(cpu.gp(0)) } else { Ok(()) }
}

/// What MOV DR checks before anything else. The exit comes before privilege checks and
/// before #UD for DR4 and DR5 (SDM Vol. 3C §26.1.3).
fn debug_access(cpu: &mut Cpu, i: &Instruction, dr: Register, gpr: Register, from: bool) -> Exec<usize> {
    let number = dr.number();
    if number > 7 {
        return Err(cpu.ud());
    }
    if cpu.primary(PrimaryControls::MOV_DR_EXITING) {
        let q = number as u64 | (from as u64) << 4 | (gpr.number() as u64) << 8;
        let exit = instruction_exit_for(i, ExitReason::MovDr).qualified(q);
        return Err(cpu.exit(exit));
    }
    let number = match number {
        4 | 5 if cpu.cr4 & cr4::DE != 0 => return Err(cpu.ud()),
        4 | 5 => number + 2,
        n => n,
    };
    cpu.require_cpl0()?;
    if cpu.dr7 & dr::DR7_GD != 0 {
        return Err(cpu.raise(Event { payload: dr::DR6_BD, ..Event::fault(exception::DB) }));
    }
    Ok(number)
}

fn mov_to_dr(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let number = debug_access(cpu, i, i.op0_register(), i.op1_register(), false)?;
    let value = cpu.reg(i.op1_register());
    match number {
        0..=3 => {
            cpu.dr[number] = value;
            cpu.mmu_breakpoints_changed();
            cpu.request_event_check();
        }
        _ if value >> 32 != 0 => return Err(cpu.gp(0)),
        6 => cpu.dr6 = value & 0xe00f | dr::DR6_FIXED1,
        _ => {
            cpu.set_dr7(value & 0xffff_23ff | dr::DR7_FIXED1);
            cpu.boundary_dr7_changed();
        }
    }
    Ok(())
}

fn mov_from_dr(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let number = debug_access(cpu, i, i.op1_register(), i.op0_register(), true)?;
    let value = match number {
        0..=3 => cpu.dr[number],
        6 => cpu.dr6,
        _ => cpu.dr7,
    };
    cpu.set_reg(i.op0_register(), value);
    Ok(())
}

/// XGETBV: XCR0, or with ECX = 1 the components in use (SDM Vol. 2C): all enabled ones, which
/// is what an implementation may always say.
pub(super) fn xgetbv(cpu: &mut Cpu, _: &Instruction) -> Exec {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    if cpu.gpr(gpr::RCX) as u32 > 1 {
        return Err(cpu.gp(0));
    }
    let v = cpu.xcr0;
    cpu.set_gpr(gpr::RAX, v & 0xffff_ffff);
    cpu.set_gpr(gpr::RDX, v >> 32);
    Ok(())
}

/// XSETBV always exits (SDM Vol. 3C §26.1.2).
pub(super) fn xsetbv(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    Err(cpu.instruction_exit(i, ExitReason::Xsetbv))
}

/// Whether descriptor-table accesses exit, for [`super::tables`].
pub(super) fn descriptor_table_exiting(cpu: &Cpu) -> bool {
    cpu.secondary(SecondaryControls::DTABLE_EXITING)
}

/// Segment register named by a memory operand, in exit encoding.
pub(super) fn operand_segment(i: &Instruction) -> usize {
    segment_index(i.memory_segment())
}
