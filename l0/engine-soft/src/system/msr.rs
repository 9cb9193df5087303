//! RDMSR and WRMSR (SDM Vol. 2B, Vol. 4; Vol. 3C §25.6.9, §26.1.3).
//!
//! The engine itself serves the MSRs that belong to the context it runs. Any other that
//! the MSR bitmap lets through is #GP(0), as an MSR that doesn't exist.
//!
//! Not supported: last-branch recording and branch trapping, supervisor state components, writes
//! to IA32_TIME_STAMP_COUNTER that don't exit.

use iced_x86::Instruction;
use memory::MachineAddr;
use x86_spec::controls::PrimaryControls;
use x86_spec::exit::ExitReason;
use x86_spec::msr as n;
use x86_spec::reg::{cr0, efer, gpr};
use x86_spec::segment::seg;

use super::canonical;
use crate::cpu::{Cpu, Exec};

/// IA32_TIME_STAMP_COUNTER.
const IA32_TSC: u32 = 0x10;
/// IA32_DEBUGCTL.
const IA32_DEBUGCTL: u32 = 0x1d9;
/// IA32_DEBUGCTL bits that can be set: LBR is accepted, and no branch is ever recorded.
const DEBUGCTL_BITS: u64 = 1;
/// IA32_SPEC_CTRL bits that can be set: IBRS, STIBP, SSBD, BHI_DIS_S. Nothing here speculates on
/// the guest's behalf, so each is in force whatever its value.
const SPEC_CTRL_BITS: u64 = 7 | 1 << 10;

/// Whether an access to `msr` exits.
fn exits(cpu: &Cpu, msr: u32, write: bool) -> bool {
    if !cpu.primary(PrimaryControls::USE_MSR_BITMAPS) {
        return true;
    }
    let quarter = match msr {
        0..=0x1fff => 0,
        0xc000_0000..=0xc000_1fff => 0x400,
        _ => return true,
    } + if write { 0x800 } else { 0 };
    bit(cpu, cpu.controls.msr_bitmap, quarter, msr & 0x1fff)
}

/// Bit `index` of the bitmap at `base + offset`; set if it is outside machine memory.
pub(super) fn bit(cpu: &Cpu, base: MachineAddr, offset: u64, index: u32) -> bool {
    let mut b = [0xff];
    let at = base.offset(offset + (index / 8) as u64);
    match cpu.memory.read(at, &mut b) {
        Ok(()) => b[0] >> (index % 8) & 1 != 0,
        Err(_) => true,
    }
}

/// RDMSR.
pub(super) fn rdmsr(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let msr = cpu.gpr(gpr::RCX) as u32;
    if exits(cpu, msr, false) {
        return Err(cpu.instruction_exit(i, ExitReason::Rdmsr));
    }
    let value = match msr {
        IA32_TSC => cpu.guest_tsc(),
        n::IA32_SYSENTER_CS => cpu.sysenter[0],
        n::IA32_SYSENTER_ESP => cpu.sysenter[1],
        n::IA32_SYSENTER_EIP => cpu.sysenter[2],
        n::IA32_PAT => cpu.pat,
        IA32_DEBUGCTL => cpu.debugctl,
        n::IA32_SPEC_CTRL => cpu.msrs.spec_ctrl,
        n::IA32_XSS_MSR => cpu.msrs.xss,
        n::EFER => cpu.efer,
        n::STAR => cpu.msrs.star,
        n::LSTAR => cpu.msrs.lstar,
        n::CSTAR => cpu.msrs.cstar,
        n::FMASK => cpu.msrs.fmask,
        n::FS_BASE => cpu.segments[seg::FS].base,
        n::GS_BASE => cpu.segments[seg::GS].base,
        n::KERNEL_GS_BASE => cpu.msrs.kernel_gs_base,
        n::IA32_TSC_AUX_MSR => cpu.msrs.tsc_aux,
        _ => match cpu.read_x2apic(msr) {
            Some(value) => value,
            None => return Err(cpu.gp(0)),
        },
    };
    cpu.set_gpr(gpr::RAX, value & 0xffff_ffff);
    cpu.set_gpr(gpr::RDX, value >> 32);
    Ok(())
}

/// WRMSR.
pub(super) fn wrmsr(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let msr = cpu.gpr(gpr::RCX) as u32;
    if exits(cpu, msr, true) {
        return Err(cpu.instruction_exit(i, ExitReason::Wrmsr));
    }
    let value = cpu.gpr(gpr::RAX) & 0xffff_ffff | cpu.gpr(gpr::RDX) << 32;
    if cpu.write_x2apic(msr, value)? {
        return Ok(());
    }
    match msr {
        n::IA32_SYSENTER_CS => cpu.sysenter[0] = value & 0xffff_ffff,
        n::IA32_SYSENTER_ESP if canonical(value) => cpu.sysenter[1] = value,
        n::IA32_SYSENTER_EIP if canonical(value) => cpu.sysenter[2] = value,
        n::IA32_PAT if is_valid_pat(value) => cpu.pat = value,
        IA32_DEBUGCTL if value & !DEBUGCTL_BITS == 0 => cpu.debugctl = value,
        n::IA32_SPEC_CTRL if value & !SPEC_CTRL_BITS == 0 => cpu.msrs.spec_ctrl = value,
        // No supervisor state components are offered.
        n::IA32_XSS_MSR if value == 0 => cpu.msrs.xss = value,
        n::EFER => return write_efer(cpu, value),
        n::STAR => cpu.msrs.star = value,
        n::LSTAR if canonical(value) => cpu.msrs.lstar = value,
        n::CSTAR if canonical(value) => cpu.msrs.cstar = value,
        n::FMASK if value >> 32 == 0 => cpu.msrs.fmask = value,
        n::FS_BASE if canonical(value) => cpu.set_segment_base(seg::FS, value),
        n::GS_BASE if canonical(value) => cpu.set_segment_base(seg::GS, value),
        n::KERNEL_GS_BASE if canonical(value) => cpu.msrs.kernel_gs_base = value,
        n::IA32_TSC_AUX_MSR if value >> 32 == 0 => cpu.msrs.tsc_aux = value,
        _ => return Err(cpu.gp(0)),
    }
    Ok(())
}

/// Whether each byte of a PAT value is a memory type that exists (SDM Vol. 3A §12.12.2).
pub(super) fn is_valid_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4 | 5 | 6 | 7))
}

/// IA32_EFER: LMA is read-only, LME can't change while paging is on (SDM Vol. 3A §2.2.1).
fn write_efer(cpu: &mut Cpu, value: u64) -> Exec {
    let changed = (value ^ cpu.efer) & !efer::LMA;
    if value & !efer::DEFINED != 0 || changed & efer::LME != 0 && cpu.cr0 & cr0::PG != 0 {
        return Err(cpu.gp(0));
    }
    cpu.set_efer(value & !efer::LMA | cpu.efer & efer::LMA);
    if changed & efer::NXE != 0 {
        cpu.flush_tlb(true);
    }
    Ok(())
}
