//! PUSHF, POPF, CLI, STI, CLAC, STAC and HLT (SDM Vol. 2).
//!
//! Not supported: the VIF forms of CR4.VME and CR4.PVI, which can't be set.

use engine::{Activity, interruptibility};
use iced_x86::{Instruction, Mnemonic};
use x86_spec::controls::PrimaryControls;
use x86_spec::exit::ExitReason;
use x86_spec::reg::{cr4, rflags};

use super::stack::Stack;
use crate::cpu::{Cpu, Exec};

fn operand_size(i: &Instruction) -> u8 {
    match i.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Popf => 2,
        Mnemonic::Pushfq | Mnemonic::Popfq => 8,
        _ => 4,
    }
}

/// PUSHF: VM and RF read as zero.
pub(super) fn pushf(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if cpu.v8086() && cpu.iopl() < 3 {
        return Err(cpu.gp(0));
    }
    let mut stack = Stack::current(cpu);
    stack.push(cpu, operand_size(i), cpu.rflags() & !(rflags::VM | rflags::RF))?;
    stack.commit(cpu);
    Ok(())
}

/// POPF.
pub(super) fn popf(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if cpu.v8086() && cpu.iopl() < 3 {
        return Err(cpu.gp(0));
    }
    let size = operand_size(i);
    let mut stack = Stack::current(cpu);
    let image = stack.pop(cpu, size)?;
    stack.commit(cpu);
    let mut change = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
    if size > 2 {
        change |= rflags::AC | rflags::ID;
    }
    if cpu.cpl == 0 && !cpu.v8086() {
        change |= rflags::IOPL;
    }
    if cpu.cpl <= cpu.iopl() {
        change |= rflags::IF;
    }
    let mut flags = cpu.rflags() & !change | image & change;
    flags &= !rflags::RF;
    if cpu.cpl == 0 && size > 2 {
        flags &= !(rflags::VIF | rflags::VIP);
    }
    cpu.set_rflags(flags);
    Ok(())
}

/// Whether CLI and STI may act: CPL at most IOPL.
fn require_iopl(cpu: &mut Cpu) -> Exec {
    if !cpu.protected() || cpu.cpl <= cpu.iopl() { Ok(()) } else { Err(cpu.gp(0)) }
}

/// CLI.
pub(super) fn cli(cpu: &mut Cpu, _: &Instruction) -> Exec {
    require_iopl(cpu)?;
    cpu.rflags_other &= !rflags::IF;
    Ok(())
}

/// STI. Interrupts stay blocked for one instruction if they were disabled (SDM Vol. 2B).
pub(super) fn sti(cpu: &mut Cpu, _: &Instruction) -> Exec {
    require_iopl(cpu)?;
    if cpu.rflags_other & rflags::IF == 0 {
        cpu.rflags_other |= rflags::IF;
        cpu.begin_shadow(interruptibility::STI);
    }
    Ok(())
}

fn set_ac(cpu: &mut Cpu, on: bool) -> Exec {
    if cpu.cr4 & cr4::SMAP == 0 && !cpu.smap_offered() || cpu.cpl > 0 || cpu.v8086() {
        return Err(cpu.ud());
    }
    if on {
        cpu.rflags_other |= rflags::AC;
    } else {
        cpu.rflags_other &= !rflags::AC;
    }
    cpu.update_mode();
    Ok(())
}

/// CLAC.
pub(super) fn clac(cpu: &mut Cpu, _: &Instruction) -> Exec {
    set_ac(cpu, false)
}

/// STAC.
pub(super) fn stac(cpu: &mut Cpu, _: &Instruction) -> Exec {
    set_ac(cpu, true)
}

impl Cpu {
    /// CLAC and STAC need the processor to have SMAP, not CR4 to enable it.
    fn smap_offered(&self) -> bool {
        super::control::SUPPORTED_CR4 & cr4::SMAP != 0
    }
}

/// HLT.
pub(super) fn hlt(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    if cpu.primary(PrimaryControls::HLT_EXITING) {
        return Err(cpu.instruction_exit(i, ExitReason::Hlt));
    }
    cpu.activity = Activity::Hlt;
    cpu.request_event_check();
    Ok(())
}
