//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and the FS/GS base instructions (SDM Vol. 2B,
//! Intel's rules where AMD's differ).
//!
//! Not supported: SYSCALL outside 64-bit mode (#UD, as on Intel), shadow stacks, FRED.

use engine::{Segment, pending_debug};
use iced_x86::{Instruction, Mnemonic};
use x86_spec::reg::{cr4, efer, gpr, rflags};
use x86_spec::segment::{AccessRights, seg};

use super::canonical;
use crate::cpu::{Cpu, Exec};

/// Flat segments as these instructions load them, without reading descriptors.
const CODE64: u32 = 0xa09b;
const CODE32: u32 = 0xc09b;
const DATA: u32 = 0xc093;

fn flat(selector: u16, access: u32, dpl: u8) -> Segment {
    Segment { base: 0, limit: u32::MAX, access: AccessRights(access | (dpl as u32) << 5), selector }
}

fn load_flat(cpu: &mut Cpu, cpl: u8, cs: Segment, ss_selector: u16) {
    cpu.cpl = cpl;
    cpu.segments[seg::SS] = flat(ss_selector, DATA, cpl);
    cpu.set_segment(seg::CS, cs);
}

/// SYSCALL: 64-bit mode only.
pub(super) fn syscall(cpu: &mut Cpu, _: &Instruction) -> Exec {
    if !cpu.is_64() || cpu.efer & efer::SCE == 0 {
        return Err(cpu.ud());
    }
    let flags = cpu.rflags() & !rflags::RF;
    cpu.set_gpr(gpr::RCX, cpu.rip());
    cpu.set_gpr(11, flags);
    let selector = (cpu.msrs.star >> 32) as u16;
    load_flat(cpu, 0, flat(selector & !3, CODE64, 0), (selector & !3).wrapping_add(8));
    cpu.set_rip(cpu.msrs.lstar);
    cpu.set_rflags(flags & !cpu.msrs.fmask | rflags::FIXED1);
    // TF counts as it is after the instruction: masked, there is no single-step trap.
    if cpu.rflags_other & rflags::TF == 0 {
        cpu.boundary.step_at = None;
    }
    Ok(())
}

/// SYSRET: 64-bit mode at CPL 0 only.
pub(super) fn sysret(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if !cpu.is_64() || cpu.efer & efer::SCE == 0 {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let wide = i.mnemonic() == Mnemonic::Sysretq;
    let rip = cpu.gpr(gpr::RCX);
    if wide && !canonical(rip) {
        return Err(cpu.gp(0));
    }
    let selector = (cpu.msrs.star >> 48) as u16;
    let cs =
        if wide { flat(selector.wrapping_add(16) | 3, CODE64, 3) } else { flat(selector | 3, CODE32, 3) };
    load_flat(cpu, 3, cs, selector.wrapping_add(8) | 3);
    cpu.set_rip(if wide { rip } else { rip & 0xffff_ffff });
    // RF, VM and reserved bits are cleared.
    const LOADED: u64 = rflags::STATUS
        | rflags::TF
        | rflags::IF
        | rflags::DF
        | rflags::IOPL
        | rflags::NT
        | rflags::AC
        | rflags::VIF
        | rflags::VIP
        | rflags::ID;
    cpu.set_rflags(cpu.gpr(11) & LOADED | rflags::FIXED1);
    // As after SYSCALL, TF counts as it is now: SYSRET that sets it traps at once.
    if cpu.rflags_other & rflags::TF != 0 {
        cpu.pending_debug |= pending_debug::BS;
    }
    Ok(())
}

/// SYSENTER.
pub(super) fn sysenter(cpu: &mut Cpu, _: &Instruction) -> Exec {
    let [cs, esp, eip] = cpu.sysenter;
    if !cpu.protected() || cs & 0xfffc == 0 {
        return Err(cpu.gp(0));
    }
    let selector = cs as u16 & !3;
    let long = cpu.long_mode();
    cpu.rflags_other &= !rflags::VM;
    load_flat(cpu, 0, flat(selector, if long { CODE64 } else { CODE32 }, 0), selector.wrapping_add(8));
    cpu.set_rflags(cpu.rflags() & !(rflags::VM | rflags::IF | rflags::RF));
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.set_gpr(gpr::RSP, esp & mask);
    cpu.set_rip(eip & mask);
    Ok(())
}

/// SYSEXIT.
pub(super) fn sysexit(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let cs = cpu.sysenter[0];
    if !cpu.protected() || cs & 0xfffc == 0 || cpu.cpl != 0 {
        return Err(cpu.gp(0));
    }
    let (rip, rsp) = (cpu.gpr(gpr::RDX), cpu.gpr(gpr::RCX));
    let wide = i.mnemonic() == Mnemonic::Sysexitq;
    let selector = cs as u16 & !3;
    if wide {
        if !canonical(rip) || !canonical(rsp) {
            return Err(cpu.gp(0));
        }
        let cs = flat(selector.wrapping_add(32) | 3, CODE64, 3);
        load_flat(cpu, 3, cs, selector.wrapping_add(40) | 3);
        cpu.set_gpr(gpr::RSP, rsp);
        cpu.set_rip(rip);
    } else {
        let cs = flat(selector.wrapping_add(16) | 3, CODE32, 3);
        load_flat(cpu, 3, cs, selector.wrapping_add(24) | 3);
        cpu.set_gpr(gpr::RSP, rsp & 0xffff_ffff);
        cpu.set_rip(rip & 0xffff_ffff);
    }
    Ok(())
}

/// SWAPGS.
pub(super) fn swapgs(cpu: &mut Cpu, _: &Instruction) -> Exec {
    if !cpu.is_64() {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    let base = cpu.segments[seg::GS].base;
    cpu.set_segment_base(seg::GS, cpu.msrs.kernel_gs_base);
    cpu.msrs.kernel_gs_base = base;
    Ok(())
}

fn require_fsgsbase(cpu: &mut Cpu) -> Exec {
    if cpu.is_64() && cpu.cr4 & cr4::FSGSBASE != 0 { Ok(()) } else { Err(cpu.ud()) }
}

fn read_base(cpu: &mut Cpu, i: &Instruction, index: usize) -> Exec {
    require_fsgsbase(cpu)?;
    let base = cpu.segments[index].base;
    cpu.set_reg(i.op0_register(), base);
    Ok(())
}

fn write_base(cpu: &mut Cpu, i: &Instruction, index: usize) -> Exec {
    require_fsgsbase(cpu)?;
    let base = cpu.reg(i.op0_register());
    if !canonical(base) {
        return Err(cpu.gp(0));
    }
    cpu.set_segment_base(index, base);
    Ok(())
}

/// RDFSBASE.
pub(super) fn rdfsbase(cpu: &mut Cpu, i: &Instruction) -> Exec {
    read_base(cpu, i, seg::FS)
}
/// RDGSBASE.
pub(super) fn rdgsbase(cpu: &mut Cpu, i: &Instruction) -> Exec {
    read_base(cpu, i, seg::GS)
}
/// WRFSBASE.
pub(super) fn wrfsbase(cpu: &mut Cpu, i: &Instruction) -> Exec {
    write_base(cpu, i, seg::FS)
}
/// WRGSBASE.
pub(super) fn wrgsbase(cpu: &mut Cpu, i: &Instruction) -> Exec {
    write_base(cpu, i, seg::GS)
}
