//! CPUID, time-stamp counter, cache and TLB control, MONITOR/MWAIT, PAUSE, random numbers
//! (SDM Vol. 2, Vol. 3C §26.1).
//!
//! MWAIT that doesn't exit completes at once, as it may (SDM Vol. 2B); L0 has it exit, and waits.

use std::sync::atomic::{Ordering, fence as memory_fence};

use engine::Monitor;
use iced_x86::{Instruction, OpKind};
use x86_spec::controls::{PrimaryControls, SecondaryControls};
use x86_spec::exit::ExitReason;
use x86_spec::reg::{cr4, gpr, rflags};

use super::canonical;
use super::capabilities::{guest_random, host_tsc};
use super::info::{memory_linear, operand_exit};
use super::instruction_exit_for;
use crate::cpu::{Access, Cpu, Exec};

impl Cpu {
    /// The TSC as the guest reads it (SDM Vol. 3C §26.3, RDTSC).
    pub(crate) fn guest_tsc(&self) -> u64 {
        let mut tsc = host_tsc();
        if self.primary(PrimaryControls::USE_TSC_OFFSETTING) {
            if self.secondary(SecondaryControls::USE_TSC_SCALING) {
                tsc = ((tsc as u128 * self.controls.tsc_multiplier as u128) >> 48) as u64;
            }
            tsc = tsc.wrapping_add(self.controls.tsc_offset);
        }
        tsc
    }
}

/// CPUID always exits.
pub(super) fn cpuid(cpu: &mut Cpu, i: &Instruction) -> Exec {
    Err(cpu.instruction_exit(i, ExitReason::Cpuid))
}

/// CR4.TSD keeps RDTSC and RDTSCP from user mode.
fn check_tsd(cpu: &mut Cpu) -> Exec {
    if cpu.cr4 & cr4::TSD != 0 && cpu.cpl > 0 && cpu.protected() { Err(cpu.gp(0)) } else { Ok(()) }
}

fn set_edx_eax(cpu: &mut Cpu, value: u64) {
    cpu.set_gpr(gpr::RAX, value & 0xffff_ffff);
    cpu.set_gpr(gpr::RDX, value >> 32);
}

/// RDTSC.
pub(super) fn rdtsc(cpu: &mut Cpu, i: &Instruction) -> Exec {
    check_tsd(cpu)?;
    if cpu.primary(PrimaryControls::RDTSC_EXITING) {
        return Err(cpu.instruction_exit(i, ExitReason::Rdtsc));
    }
    let tsc = cpu.guest_tsc();
    set_edx_eax(cpu, tsc);
    Ok(())
}

/// RDTSCP.
pub(super) fn rdtscp(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if !cpu.secondary(SecondaryControls::ENABLE_RDTSCP) {
        return Err(cpu.ud());
    }
    check_tsd(cpu)?;
    if cpu.primary(PrimaryControls::RDTSC_EXITING) {
        return Err(cpu.instruction_exit(i, ExitReason::Rdtscp));
    }
    let tsc = cpu.guest_tsc();
    set_edx_eax(cpu, tsc);
    cpu.set_gpr(gpr::RCX, cpu.msrs.tsc_aux & 0xffff_ffff);
    Ok(())
}

/// RDPID needs "enable RDTSCP" (SDM Vol. 3C §26.3).
pub(super) fn rdpid(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if !cpu.secondary(SecondaryControls::ENABLE_RDTSCP) {
        return Err(cpu.ud());
    }
    let aux = cpu.msrs.tsc_aux & 0xffff_ffff;
    cpu.set_reg(i.op0_register(), aux);
    Ok(())
}

/// RDPMC (SDM Vol. 2B).
pub(super) fn rdpmc(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if cpu.cr4 & cr4::PCE == 0 && cpu.cpl > 0 && cpu.protected() {
        return Err(cpu.gp(0));
    }
    if cpu.primary(PrimaryControls::RDPMC_EXITING) {
        return Err(cpu.instruction_exit(i, ExitReason::Rdpmc));
    }
    let Some(value) = cpu.performance_counter(cpu.gpr(gpr::RCX) as u32) else { return Err(cpu.gp(0)) };
    set_edx_eax(cpu, value);
    Ok(())
}

/// INVD always exits.
pub(super) fn invd(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    Err(cpu.instruction_exit(i, ExitReason::Invd))
}

/// WBINVD and WBNOINVD. The host's caches are coherent: nothing to do.
pub(super) fn wbinvd(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    if cpu.secondary(SecondaryControls::WBINVD_EXITING) {
        return Err(cpu.instruction_exit(i, ExitReason::Wbinvd));
    }
    Ok(())
}

/// INVLPG. The operand isn't accessed, so no segment checks apply.
pub(super) fn invlpg(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.require_cpl0()?;
    let linear = memory_linear(cpu, i);
    if cpu.primary(PrimaryControls::INVLPG_EXITING) {
        let exit = instruction_exit_for(i, ExitReason::Invlpg).qualified(linear);
        return Err(cpu.exit(exit));
    }
    if canonical(linear) {
        cpu.flush_linear(linear);
    }
    Ok(())
}

/// INVPCID (SDM Vol. 2A).
pub(super) fn invpcid(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if !cpu.secondary(SecondaryControls::ENABLE_INVPCID) {
        return Err(cpu.ud());
    }
    cpu.require_cpl0()?;
    if cpu.primary(PrimaryControls::INVLPG_EXITING) {
        let reg2 = (i.op0_register().number() as u32) << 28;
        return Err(operand_exit(cpu, i, ExitReason::Invpcid, 1, reg2));
    }
    let kind = cpu.reg(i.op0_register());
    let lin = cpu.operand_linear(i, 16, Access::Read)?;
    let mut b = [0u8; 16];
    cpu.read_bytes(lin, &mut b)?;
    let descriptor = u128::from_le_bytes(b);
    let pcid = (descriptor & 0xfff) as u16;
    let address = (descriptor >> 64) as u64;
    let reserved = descriptor as u64 >> 12 != 0;
    let pcid_ok = cpu.cr4 & cr4::PCIDE != 0 || pcid == 0;
    match kind {
        0 if !reserved && pcid_ok && canonical(address) => cpu.flush_pcid_linear(pcid, address),
        1 if !reserved && pcid_ok => cpu.flush_pcid(pcid),
        2 => cpu.flush_tlb(true),
        3 => cpu.flush_tlb(false),
        _ => return Err(cpu.gp(0)),
    }
    Ok(())
}

/// RCX as MONITOR and MWAIT look at it: all of it in 64-bit mode.
fn extensions(cpu: &Cpu) -> u64 {
    let rcx = cpu.gpr(gpr::RCX);
    if cpu.is_64() { rcx } else { rcx & 0xffff_ffff }
}

/// MONITOR (SDM Vol. 2B): checked as a byte load, and arms the line if that is memory. Without the feature it
/// exits, to be #UD.
pub(super) fn monitor(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if cpu.cpl > 0 {
        return Err(cpu.ud());
    }
    if cpu.primary(PrimaryControls::MONITOR_EXITING) {
        return Err(cpu.instruction_exit(i, ExitReason::Monitor));
    }
    if extensions(cpu) != 0 {
        return Err(cpu.gp(0));
    }
    let mask = if cpu.is_64() { u64::MAX } else { 0xffff_ffff };
    let address = cpu.gpr(gpr::RAX) & mask;
    let lin = cpu.segment_linear(super::control::operand_segment(i), address, 1, Access::Read)?;
    cpu.read::<u8>(lin)?;
    let at = cpu.data_address(lin)?;
    cpu.monitor = at.and_then(|at| Monitor::arm(&cpu.memory, at));
    Ok(())
}

/// MWAIT. Bit 0 of an exit's qualification: whether a line is armed (SDM Vol. 3C table 28-1).
pub(super) fn mwait(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if cpu.cpl > 0 {
        return Err(cpu.ud());
    }
    if cpu.primary(PrimaryControls::MWAIT_EXITING) {
        let exit = instruction_exit_for(i, ExitReason::Mwait).qualified(cpu.monitor.is_some().into());
        return Err(cpu.exit(exit));
    }
    // Bit 0: masked interrupts end the wait.
    if extensions(cpu) & !1 != 0 {
        return Err(cpu.gp(0));
    }
    cpu.monitor = None;
    Ok(())
}

/// PAUSE.
pub(super) fn pause(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if cpu.primary(PrimaryControls::PAUSE_EXITING) {
        return Err(cpu.instruction_exit(i, ExitReason::Pause));
    }
    if cpu.cpl == 0 && cpu.secondary(SecondaryControls::PAUSE_LOOP_EXITING) && pause_loop(cpu) {
        return Err(cpu.instruction_exit(i, ExitReason::Pause));
    }
    // A spinning guest gives way to other vCPU threads.
    std::hint::spin_loop();
    Ok(())
}

/// PAUSE-loop exiting (SDM Vol. 3C §26.1.3): whether this PAUSE at CPL 0 comes more than PLE_Window
/// after the first of its loop, a loop being PAUSEs no more than PLE_Gap apart.
fn pause_loop(cpu: &mut Cpu) -> bool {
    let now = host_tsc();
    let first = match cpu.boundary.pause_loop {
        Some((last, first)) if now.saturating_sub(last) <= cpu.controls.ple_gap as u64 => first,
        _ => now,
    };
    cpu.boundary.pause_loop = Some((now, first));
    now.saturating_sub(first) > cpu.controls.ple_window as u64
}

/// Destination and operand size as RDRAND's and RDSEED's exit reports them (SDM Vol. 3C
/// table 28-13): register in bits 6:3, size in bits 12:11.
fn random_exit(cpu: &mut Cpu, i: &Instruction, reason: ExitReason) -> Exec {
    let r = i.op0_register();
    let size = match r.size() {
        2 => 0,
        4 => 1,
        _ => 2,
    };
    let mut exit = instruction_exit_for(i, reason);
    exit.instruction_info = (r.number() as u32) << 3 | size << 11;
    Err(cpu.exit(exit))
}

fn random(cpu: &mut Cpu, i: &Instruction) -> Exec {
    debug_assert_eq!(i.op_kind(0), OpKind::Register);
    let value = guest_random();
    cpu.set_reg(i.op0_register(), value.unwrap_or(0));
    // CF says whether there was a number; the other status flags are cleared.
    cpu.set_status_flags(if value.is_some() { rflags::CF } else { 0 });
    Ok(())
}

/// RDRAND.
pub(super) fn rdrand(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if cpu.secondary(SecondaryControls::RDRAND_EXITING) {
        return random_exit(cpu, i, ExitReason::Rdrand);
    }
    random(cpu, i)
}

/// RDSEED.
pub(super) fn rdseed(cpu: &mut Cpu, i: &Instruction) -> Exec {
    if cpu.secondary(SecondaryControls::RDSEED_EXITING) {
        return random_exit(cpu, i, ExitReason::Rdseed);
    }
    random(cpu, i)
}

/// CLFLUSH, CLFLUSHOPT, CLWB: checked as a byte load, and nothing to flush.
pub(super) fn cache_line(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let lin = cpu.operand_linear(i, 1, Access::Read)?;
    cpu.read::<u8>(lin).map(|_| ())
}

/// LFENCE, SFENCE, MFENCE.
pub(super) fn fence(_: &mut Cpu, _: &Instruction) -> Exec {
    memory_fence(Ordering::SeqCst);
    Ok(())
}

/// Prefetches are hints.
pub(super) fn prefetch(_: &mut Cpu, _: &Instruction) -> Exec {
    Ok(())
}
