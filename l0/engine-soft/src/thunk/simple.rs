//! Small instructions in Rust: MXCSR, EMMS, VZEROUPPER, VZEROALL, fences, cache-line flushes.

use std::sync::atomic::{Ordering, fence};

use iced_x86::{Code, Instruction};

use super::x87;
use crate::cpu::{Access, Cpu, Exec};
use crate::op::SimpleFn;

/// Bits of MXCSR that exist (MXCSR_MASK).
pub(super) const MXCSR_MASK: u32 = 0xffff;

/// The function for `i`, if it is one of these.
pub(super) fn function(i: &Instruction) -> Option<SimpleFn> {
    let code = i.code();
    Some(match code {
        Code::Ldmxcsr_m32 => ldmxcsr,
        Code::VEX_Vldmxcsr_m32 => vldmxcsr,
        Code::Stmxcsr_m32 => stmxcsr,
        Code::VEX_Vstmxcsr_m32 => vstmxcsr,
        Code::Emms => emms,
        Code::VEX_Vzeroupper => vzeroupper,
        Code::VEX_Vzeroall => vzeroall,
        Code::Clflush_m8 | Code::Clflushopt_m8 | Code::Clwb_m8 => flush_line,
        _ if is_fence(code) => memory_fence,
        _ => return None,
    })
}

fn is_fence(code: Code) -> bool {
    matches!(code, Code::Lfence | Code::Mfence | Code::Sfence)
        || (Code::Lfence_E9..=Code::Lfence_EF).contains(&code)
        || (Code::Mfence_F1..=Code::Mfence_F7).contains(&code)
        || (Code::Sfence_F9..=Code::Sfence_FF).contains(&code)
}

/// MXCSR from memory; reserved bits give #GP(0) (SDM Vol. 2A, LDMXCSR).
fn load(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let value = cpu.read_operand(i, 0, 4)? as u32;
    if value & !MXCSR_MASK != 0 {
        return Err(cpu.gp(0));
    }
    cpu.fpu.mxcsr = value;
    Ok(())
}

fn ldmxcsr(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_sse()?;
    load(cpu, i)
}

fn vldmxcsr(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_avx()?;
    load(cpu, i)
}

fn stmxcsr(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_sse()?;
    cpu.write_operand(i, 0, 4, cpu.fpu.mxcsr.into())
}

fn vstmxcsr(cpu: &mut Cpu, i: &Instruction) -> Exec {
    cpu.check_avx()?;
    cpu.write_operand(i, 0, 4, cpu.fpu.mxcsr.into())
}

fn emms(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.check_mmx()?;
    x87::leave_mmx(&mut cpu.fpu);
    Ok(())
}

/// Number of vector registers that exist in the present mode.
pub(super) fn vector_count(cpu: &Cpu) -> usize {
    if cpu.is_64() { 16 } else { 8 }
}

fn vzeroupper(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.check_avx()?;
    let n = vector_count(cpu);
    for v in cpu.fpu.vectors.iter_mut().take(n) {
        v[2] = 0;
        v[3] = 0;
    }
    Ok(())
}

fn vzeroall(cpu: &mut Cpu, _: &Instruction) -> Exec {
    cpu.check_avx()?;
    let n = vector_count(cpu);
    cpu.fpu.vectors.iter_mut().take(n).for_each(|v| *v = [0; 4]);
    Ok(())
}

/// CLFLUSH, CLFLUSHOPT, CLWB: nothing to flush, but faults as for a byte load.
fn flush_line(cpu: &mut Cpu, i: &Instruction) -> Exec {
    let linear = cpu.operand_linear(i, 1, Access::Read)?;
    cpu.probe(linear, 1, Access::Read)
}

fn memory_fence(_: &mut Cpu, _: &Instruction) -> Exec {
    fence(Ordering::SeqCst);
    Ok(())
}
