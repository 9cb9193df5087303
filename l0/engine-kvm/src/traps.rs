//! How VMX instructions of a guest reach L0, and what that takes here.
//!
//! Not measured: what L0 does with the instruction then.

use std::time::{Duration, Instant};

use memory::MachineAddr;
use x86_spec::exception::UD;

use crate::KvmEngine;
use crate::tiny::{Guest, HLT, Level, PATIENCE, Unmeasured, VMREAD};
use crate::vcpu::Failure;

/// A way for a VMX instruction to reach L0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// KVM emulates the guest's kernel code, fails at it, and says so (KVM_CAP_EXIT_ON_EMULATION_FAILURE).
    EmulationFailure,
    /// KVM raises #UD, and stops at a breakpoint at its handler (KVM_SET_GUEST_DEBUG).
    Breakpoint,
}

impl Trap {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::EmulationFailure, Self::Breakpoint];

    /// A name for reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::EmulationFailure => "emulation-failure",
            Self::Breakpoint => "breakpoint",
        }
    }
}

/// The handler of #UD: a HLT.
const HANDLER: u64 = 0x2000;
const IDT: u64 = 0x3000;
const GDT: u64 = 0x4000;
/// Descriptors of 64-bit code and of data at privilege level 0 (SDM Vol. 3A §3.4.5).
const CODE64: u64 = 0x00af_9b00_0000_ffff;
const DATA64: u64 = 0x00cf_9300_0000_ffff;

/// Times from the entry of a guest at a VMREAD to L0's learning of it, each by itself.
///
/// # Errors
/// When KVM can't be used, and when the instruction ends in another way than `trap`'s: the error says in which.
pub fn traps(trap: Trap, rounds: u32) -> Result<Vec<Duration>, Unmeasured> {
    let mut guest = Guest::new(KvmEngine::new, Level::Kernel, &VMREAD)?;
    let memory = guest.memory.clone();
    let g = &mut guest.vmcs.guest;
    for (at, value) in [
        (GDT + 0x28, DATA64),
        (GDT + 0x30, CODE64),
        // An interrupt gate (SDM Vol. 3A §6.14.1).
        (IDT + 16 * u64::from(UD), HANDLER & 0xffff | 0x30 << 16 | 0x8e00 << 32),
    ] {
        memory.write_u64(MachineAddr(at), value)?;
    }
    memory.write(MachineAddr(HANDLER), &HLT)?;
    (g.gdtr.base, g.gdtr.limit) = (GDT, 0x37);
    (g.idtr.base, g.idtr.limit) = (IDT, 0x1ff);
    // As L0 has it when a guest uses VMX.
    guest.vcpu.show_all_at_exits();
    if trap == Trap::Breakpoint {
        guest.vcpu.set_breakpoints(&[HANDLER])?;
    }
    guest.limit(PATIENCE);
    let start = guest.vmcs.guest.clone();
    let mut times = Vec::new();
    // The first is not counted.
    for _ in 0..=rounds {
        guest.vmcs.guest = start.clone();
        let before = Instant::now();
        let result = guest.vcpu.try_enter(&mut guest.vmcs, &mut guest.regs);
        let took = before.elapsed();
        match (trap, result) {
            (Trap::EmulationFailure, Err(Failure::Internal { .. }))
            | (Trap::Breakpoint, Err(Failure::Breakpoint)) => times.push(took),
            (_, Err(Failure::Internal { .. })) => {
                return Err(Unmeasured::Exit("a failed emulation instead of #UD".into()));
            }
            (_, Err(other)) => return Err(Unmeasured::Exit(other.to_string())),
            (_, Ok(_)) if guest.vmcs.guest.rip == HANDLER => {
                return Err(Unmeasured::Exit("#UD, which KVM leaves to the guest".into()));
            }
            (_, Ok(exit)) => return Err(Unmeasured::Exit(exit.reason.name().to_owned())),
        }
    }
    times.remove(0);
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On each KVM one of the two works: where kernel code is emulated the first, elsewhere #UD is raised.
    #[test]
    fn a_vmx_instruction_reaches_l0_in_exactly_one_way() {
        if let Err(e) = crate::device::open() {
            return eprintln!("skipped: {e}");
        }
        let works = Trap::ALL.map(|trap| traps(trap, 2));
        let [emulation, breakpoint] = &works;
        assert_ne!(emulation.is_ok(), breakpoint.is_ok(), "{works:?}");
        for times in works.into_iter().flatten() {
            assert_eq!(times.len(), 2);
        }
    }
}
