//! VMX's own instructions in non-root operation, RSM and GETSEC (SDM Vol. 3C §26.1.2, §26.5.6). The
//! exit comes before the CPL check, which is the hypervisor's to do.
//!
//! Not supported: VM functions other than EPTP switching, SMM, SMX.

use iced_x86::{Instruction, OpKind};
use x86_spec::controls::SecondaryControls;
use x86_spec::ept;
use x86_spec::exit::ExitReason;
use x86_spec::reg::{cr4, gpr};

use super::info::operand_exit;
use super::shadow_vmcs;
use crate::cpu::{Cpu, Exec};

/// #UD in real mode, virtual-8086 mode and compatibility mode (SDM Vol. 3D chapter 31).
fn check_mode(cpu: &mut Cpu) -> Exec {
    if cpu.real_or_v86() || cpu.long_mode() && !cpu.is_64() { Err(cpu.ud()) } else { Ok(()) }
}

fn plain(cpu: &mut Cpu, i: &Instruction, reason: ExitReason) -> Exec {
    check_mode(cpu)?;
    Err(cpu.instruction_exit(i, reason))
}

/// Instructions with one 64-bit memory operand.
fn with_memory(cpu: &mut Cpu, i: &Instruction, reason: ExitReason) -> Exec {
    check_mode(cpu)?;
    if i.op_kind(0) != OpKind::Memory {
        return Err(cpu.ud());
    }
    Err(operand_exit(cpu, i, reason, 0, 0))
}

/// RSM outside SMM is #UD, which takes priority: a guest never is in SMM here.
pub(super) fn rsm(cpu: &mut Cpu, _: &Instruction) -> Exec {
    Err(cpu.ud())
}

/// GETSEC: #UD without CR4.SMXE, which can't be set.
pub(super) fn getsec(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if cpu.cr4 & cr4::SMXE == 0 {
        return Err(cpu.ud());
    }
    Err(cpu.instruction_exit(i, ExitReason::Getsec))
}

/// VMCALL exits in every mode.
pub(super) fn vmcall(cpu: &mut Cpu, i: &Instruction) -> Exec {
    Err(cpu.instruction_exit(i, ExitReason::Vmcall))
}

/// VMFUNC, at any privilege (SDM Vol. 3C §26.5.6.2).
pub(super) fn vmfunc(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let function = cpu.gpr(gpr::RAX) as u32;
    if !cpu.secondary(SecondaryControls::ENABLE_VM_FUNCTIONS) || function >= 64 {
        return Err(cpu.ud());
    }
    let enabled = function == EPTP_SWITCHING && cpu.controls.vm_functions & 1 << EPTP_SWITCHING != 0;
    if enabled && let Some(eptp) = listed_eptp(cpu, cpu.gpr(gpr::RCX) as u32) {
        cpu.controls.eptp = eptp;
        // Translations are tagged with the EPTP: nothing is to be flushed.
        cpu.mmu_reselect();
        return Ok(());
    }
    Err(cpu.instruction_exit(i, ExitReason::Vmfunc))
}

/// The VM function that switches EPTPs.
const EPTP_SWITCHING: u32 = 0;

/// Entry `index` of the EPTP list, if it exists and VM entry would accept it (SDM Vol. 3C
/// §26.5.6.3, §27.2.1.1): write-back or uncacheable, 4 levels, no reserved bit.
fn listed_eptp(cpu: &Cpu, index: u32) -> Option<u64> {
    if index >= 512 {
        return None;
    }
    let eptp = cpu.memory.read_u64(cpu.controls.eptp_list.offset(index as u64 * 8)).ok()?;
    let defined = 7 | 7 << 3 | ept::EPTP_AD | ((1 << super::MAX_PHYSICAL_BITS) - 1) & !0xfff;
    let valid = matches!(eptp & 7, ept::MEMTYPE_UC | ept::MEMTYPE_WB)
        && eptp & 7 << 3 == ept::EPTP_WALK4
        && eptp & !defined == 0;
    // With page-modification logging, accessed and dirty flags can't be off.
    let pml = cpu.secondary(SecondaryControls::ENABLE_PML);
    (valid && (!pml || eptp & ept::EPTP_AD != 0)).then_some(eptp)
}

/// VMLAUNCH.
pub(super) fn vmlaunch(cpu: &mut Cpu, i: &Instruction) -> Exec {
    plain(cpu, i, ExitReason::Vmlaunch)
}
/// VMRESUME.
pub(super) fn vmresume(cpu: &mut Cpu, i: &Instruction) -> Exec {
    plain(cpu, i, ExitReason::Vmresume)
}
/// VMXOFF.
pub(super) fn vmxoff(cpu: &mut Cpu, i: &Instruction) -> Exec {
    plain(cpu, i, ExitReason::Vmxoff)
}
/// VMCLEAR.
pub(super) fn vmclear(cpu: &mut Cpu, i: &Instruction) -> Exec {
    with_memory(cpu, i, ExitReason::Vmclear)
}
/// VMPTRLD.
pub(super) fn vmptrld(cpu: &mut Cpu, i: &Instruction) -> Exec {
    with_memory(cpu, i, ExitReason::Vmptrld)
}
/// VMPTRST.
pub(super) fn vmptrst(cpu: &mut Cpu, i: &Instruction) -> Exec {
    with_memory(cpu, i, ExitReason::Vmptrst)
}
/// VMXON.
pub(super) fn vmxon(cpu: &mut Cpu, i: &Instruction) -> Exec {
    with_memory(cpu, i, ExitReason::Vmxon)
}

/// VMREAD: operand 0 receives, operand 1 (bits 31:28) holds the encoding.
pub(super) fn vmread(cpu: &mut Cpu, i: &Instruction) -> Exec {
    check_mode(cpu)?;
    if !shadow_vmcs::exits(cpu, i.op1_register(), false) {
        return shadow_vmcs::vmread(cpu, i);
    }
    let reg2 = (i.op1_register().number() as u32) << 28;
    Err(operand_exit(cpu, i, ExitReason::Vmread, 0, reg2))
}

/// VMWRITE: operand 0 (bits 31:28) holds the encoding, operand 1 the value.
pub(super) fn vmwrite(cpu: &mut Cpu, i: &Instruction) -> Exec {
    check_mode(cpu)?;
    if !shadow_vmcs::exits(cpu, i.op0_register(), true) {
        return shadow_vmcs::vmwrite(cpu, i);
    }
    let reg2 = (i.op0_register().number() as u32) << 28;
    Err(operand_exit(cpu, i, ExitReason::Vmwrite, 1, reg2))
}

/// XSAVES and XRSTORS are #UD without their control (SDM Vol. 3C §26.3).
///
/// # Errors
/// #UD.
pub(crate) fn require_xsaves(cpu: &mut Cpu) -> Exec {
    if cpu.secondary(SecondaryControls::ENABLE_XSAVES_XRSTORS) { Ok(()) } else { Err(cpu.ud()) }
}

/// The exit of XSAVES and XRSTORS by the XSS-exiting bitmap (SDM Vol. 3C §26.1.3).
///
/// # Errors
/// The exit.
pub(crate) fn xss_exit(cpu: &mut Cpu, i: &Instruction, reason: ExitReason) -> Exec {
    let requested = cpu.gpr(gpr::RDX) << 32 | cpu.gpr(gpr::RAX) & 0xffff_ffff;
    if requested & cpu.msrs.xss & cpu.controls.xss_exit_bitmap == 0 {
        return Ok(());
    }
    Err(operand_exit(cpu, i, reason, 0, 0))
}

fn invalidate(cpu: &mut Cpu, i: &Instruction, reason: ExitReason) -> Exec {
    check_mode(cpu)?;
    let reg2 = (i.op0_register().number() as u32) << 28;
    Err(operand_exit(cpu, i, reason, 1, reg2))
}

/// INVEPT.
pub(super) fn invept(cpu: &mut Cpu, i: &Instruction) -> Exec {
    invalidate(cpu, i, ExitReason::Invept)
}
/// INVVPID.
pub(super) fn invvpid(cpu: &mut Cpu, i: &Instruction) -> Exec {
    invalidate(cpu, i, ExitReason::Invvpid)
}
