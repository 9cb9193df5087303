//! PUSHF, POPF, CLI, STI, CLAC, STAC and HLT (SDM Vol. 2), with the virtual interrupt flag of
//! CR4.VME and CR4.PVI (SDM Vol. 3B §21.3, §21.4).

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

/// Whether PUSHF, POPF or IRET with operands of `size` bytes has VIF in place of IF: in
/// virtual-8086 mode with IOPL below 3 and CR4.VME. PVI has no such effect (SDM Vol. 3B §21.4).
///
/// # Errors
/// #GP(0) if the instruction is for the virtual-8086 monitor: IOPL is below 3, and either VME is
/// off or the operands are 32 bits wide.
pub(super) fn virtual_interrupt_flag(cpu: &mut Cpu, size: u8) -> Exec<bool> {
    if !cpu.v8086() || cpu.iopl() == 3 {
        Ok(false)
    } else if cpu.cr4 & cr4::VME != 0 && size == 2 {
        Ok(true)
    } else {
        Err(cpu.gp(0))
    }
}

impl Cpu {
    /// FLAGS as an 8086 program with a virtual interrupt flag sees them: VIF as IF, IOPL 3.
    pub(super) fn virtual_flags(&self) -> u64 {
        let flags = self.rflags();
        let interrupt = if flags & rflags::VIF != 0 { rflags::IF } else { 0 };
        flags & 0xffff & !rflags::IF | rflags::IOPL | interrupt
    }

    /// RFLAGS after such a program popped the FLAGS `image`: IF goes to VIF, IF and IOPL stay.
    ///
    /// # Errors
    /// #GP(0) if that would set TF, or enable virtual interrupts while one is pending (VIP).
    pub(super) fn popped_virtual_flags(&mut self, image: u64) -> Exec<u64> {
        let flags = self.rflags();
        let enables = image & rflags::IF != 0;
        if image & rflags::TF != 0 || enables && flags & rflags::VIP != 0 {
            return Err(self.gp(0));
        }
        const CHANGE: u64 = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
        let vif = if enables { rflags::VIF } else { 0 };
        Ok(flags & !(CHANGE | rflags::VIF | rflags::RF) | image & CHANGE | vif)
    }
}

/// PUSHF: VM and RF read as zero.
pub(super) fn pushf(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = operand_size(i);
    let image = if virtual_interrupt_flag(cpu, size)? {
        cpu.virtual_flags()
    } else {
        cpu.rflags() & !(rflags::VM | rflags::RF)
    };
    let mut stack = Stack::current(cpu);
    stack.push(cpu, size, image)?;
    stack.commit(cpu);
    Ok(())
}

/// POPF. VIF, VIP and VM stay, but for what CR4.VME does to VIF (SDM Vol. 2B table 4-16).
pub(super) fn popf(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let size = operand_size(i);
    let virtual_if = virtual_interrupt_flag(cpu, size)?;
    let mut stack = Stack::current(cpu);
    let image = stack.pop(cpu, size)?;
    if virtual_if {
        let flags = cpu.popped_virtual_flags(image)?;
        stack.commit(cpu);
        cpu.set_rflags(flags);
        return Ok(());
    }
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
    let flags = cpu.rflags() & !change | image & change;
    cpu.set_rflags(flags & !rflags::RF);
    Ok(())
}

/// Which flag CLI and STI act on: IF if CPL is at most IOPL; else VIF in virtual-8086 mode with
/// CR4.VME, and at CPL 3 of protected mode with CR4.PVI (SDM Vol. 2A, CLI, table 3-7).
///
/// # Errors
/// #GP(0) if neither may be changed.
fn interrupt_flag(cpu: &mut Cpu) -> Exec<u64> {
    if !cpu.protected() || cpu.cpl <= cpu.iopl() {
        return Ok(rflags::IF);
    }
    let extension = if cpu.v8086() { cr4::VME } else { cr4::PVI };
    if cpu.cpl == 3 && cpu.cr4 & extension != 0 { Ok(rflags::VIF) } else { Err(cpu.gp(0)) }
}

/// CLI.
pub(super) fn cli(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let flag = interrupt_flag(cpu)?;
    cpu.rflags_other &= !flag;
    Ok(())
}

/// STI. Interrupts stay blocked for one instruction if they were disabled (SDM Vol. 2B). A
/// pending virtual interrupt makes enabling them #GP(0), so that the monitor can deliver it.
pub(super) fn sti(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let flag = interrupt_flag(cpu)?;
    if flag == rflags::VIF && cpu.rflags_other & rflags::VIP != 0 {
        return Err(cpu.gp(0));
    }
    let was_enabled = cpu.rflags_other & flag != 0;
    cpu.rflags_other |= flag;
    if flag == rflags::IF && !was_enabled {
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
