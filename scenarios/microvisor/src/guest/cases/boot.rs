//! The hypervisor itself, without VMX: exceptions, interrupts, time.

use super::cases;
use crate::guest::suite::{Ctx, Outcome, check, fail};
use crate::guest::{cpu, trap};

cases! { false;
    "boot.mode" "Vol. 3A 10.8.5" mode;
    "boot.invalid_opcode" "Vol. 3A 6.15" invalid_opcode;
    "boot.general_protection" "Vol. 3A 6.15" general_protection;
    "boot.page_fault" "Vol. 3A 6.15" page_fault;
    "boot.msr" "Vol. 2B RDMSR" msr;
    "boot.interrupt" "Vol. 3A 11.6" interrupt;
    "boot.nmi" "Vol. 3A 11.6" nmi;
    "boot.tsc" "Vol. 3B 18.17" tsc;
}

fn mode(_: &mut Ctx) -> Outcome {
    // EFER.LME and LMA.
    check!("EFER.LMA and LME", cpu::msr(cpu::MSR_EFER) & 0x500, 0x500);
    check!("CR0.PG and PE", cpu::cr0() & 0x8000_0001, 0x8000_0001_u64);
    Ok(())
}

fn fault(got: Result<u64, trap::Fault>, vector: u8, code: u32) -> Outcome<trap::Fault> {
    match got {
        Err(f) => {
            check!("vector", f.vector, vector);
            check!("error code", f.code, code);
            Ok(f)
        }
        Ok(_) => fail!("expected exception {vector}, got none"),
    }
}

fn invalid_opcode(_: &mut Ctx) -> Outcome {
    fault(trap::guarded!("ud2"), 6, 0)?;
    Ok(())
}

fn general_protection(_: &mut Ctx) -> Outcome {
    let address = 1_u64 << 63;
    fault(trap::guarded!("mov {a}, [{a}]", a = inout(reg) address => _), 13, 0)?;
    Ok(())
}

fn page_fault(_: &mut Ctx) -> Outcome {
    // Beyond the 4 GiB that are mapped: not present, write.
    let address = 5_u64 << 30;
    let f = fault(trap::guarded!("mov [{a}], {a}", a = in(reg) address), 14, 2)?;
    check!("CR2", f.cr2, address);
    Ok(())
}

fn msr(_: &mut Ctx) -> Outcome {
    match cpu::rdmsr(0x1234_5678) {
        Err(f) => check!("vector", f.vector, 13),
        Ok(v) => fail!("RDMSR of 12345678H: expected #GP, got {v:#x}"),
    }
    Ok(())
}

fn interrupt(_: &mut Ctx) -> Outcome {
    let before = trap::interrupts(0x40);
    cpu::apic::send_self(0x40);
    check!("interrupts with IF = 0", trap::interrupts(0x40), before);
    check!("request", cpu::apic::requested(0x40), true);
    cpu::interrupts_for_a_moment();
    check!("interrupts", trap::interrupts(0x40), before + 1);
    check!("in service after EOI", cpu::apic::in_service(0x40), false);
    Ok(())
}

fn nmi(_: &mut Ctx) -> Outcome {
    let before = trap::nmis();
    cpu::apic::send_self_nmi();
    // The NMI arrives at an instruction boundary soon after.
    for _ in 0..1_000_000 {
        if trap::nmis() != before {
            break;
        }
    }
    check!("NMIs", trap::nmis(), before + 1);
    Ok(())
}

fn tsc(_: &mut Ctx) -> Outcome {
    let a = cpu::tsc_ordered();
    let b = cpu::tsc_ordered();
    if b <= a {
        fail!("expected the TSC to advance, got {a} and then {b}");
    }
    Ok(())
}
