//! MONITOR and MWAIT in L1 and L2 (SDM Vol. 2B, Vol. 3C §26.1.3, §28.2.1).

use core::arch::asm;

use crate::guest::fields::*;
use crate::guest::suite::{Ctx, Outcome, check, fail, skip};
use crate::guest::vm::{Vm, code};
use crate::guest::{cpu, memory, trap};

super::cases! { true;
    "exit.mwait.armed" "Vol. 3C 28.2.1" armed;
    "mwait.cpuid" "Vol. 2A CPUID" cpuid;
    "mwait.misc_enable" "Vol. 4 2.1" misc_enable;
    "mwait.falls_through" "Vol. 2B MWAIT" falls_through;
    "mwait.triggered" "Vol. 2B MWAIT" triggered;
    "mwait.faults" "Vol. 2B MONITOR" faults;
    "mwait.timer" "Vol. 3C 26.5.1" timer;
    "mwait.interrupt" "Vol. 2B MWAIT" interrupt;
    "mwait.masked_interrupt" "Vol. 2B MWAIT" masked_interrupt;
    "mwait.external_exit" "Vol. 3C 26.2" external_exit;
    "mwait.root" "Vol. 2B MWAIT" root;
}

const MSR_MISC_ENABLE: u32 = 0x1a0;

fn need() -> Outcome {
    if cpu::cpuid(1, 0)[2] >> 3 & 1 == 0 {
        return skip("CPUID does not show the feature");
    }
    Ok(())
}

/// A machine with RAX and RBX at its data.
fn machine(ctx: &Ctx, code: u64) -> Outcome<Vm> {
    need()?;
    memory::reset();
    let mut vm = Vm::new(&ctx.caps, code)?;
    vm.regs.rax = vm.data;
    vm.regs.rbx = vm.data;
    Ok(vm)
}

/// Has the local APIC's timer interrupt with `vector` soon, once.
fn arm_timer(vector: u8) {
    let _ = cpu::wrmsr(0x83e, 0xb);
    let _ = cpu::wrmsr(0x832, vector.into());
    let _ = cpu::wrmsr(0x838, 100_000);
}

/// The qualification tells whether a line is armed; VM exits and entries disarm.
fn armed(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["monitor", "mwait", "mwait", "vmcall"])?;
    vm.need_primary(primary::MWAIT)?;
    let e = vm.expect(reason::MWAIT)?;
    check!("qualification", e.qualification, 1);
    check!("instruction length", e.len, 3);
    vm.skip_instruction(&e)?;
    let e = vm.expect(reason::MWAIT)?;
    check!("qualification after an exit and an entry", e.qualification, 0);
    // What L1 armed is not armed in L2.
    let mut vm = machine(ctx, code!["mwait", "vmcall"])?;
    vm.need_primary(primary::MWAIT)?;
    unsafe { asm!("monitor", in("rax") vm.data, in("ecx") 0, in("edx") 0) };
    let e = vm.expect(reason::MWAIT)?;
    check!("qualification when L1 had armed a line", e.qualification, 0);
    Ok(())
}

fn cpuid(_: &mut Ctx) -> Outcome {
    need()?;
    let [smallest, largest, ecx, edx] = cpu::cpuid(5, 0);
    check!("smallest line", smallest, 64);
    check!("largest line", largest, 64);
    check!("extensions", ecx, 3);
    check!("C1 sub-states", edx >> 4 & 0xf, 1);
    Ok(())
}

/// IA32_MISC_ENABLE bit 18 hides MONITOR and MWAIT, which are #UD then.
fn misc_enable(_: &mut Ctx) -> Outcome {
    need()?;
    let before = cpu::msr(MSR_MISC_ENABLE);
    check!("bit 18", before >> 18 & 1, 1);
    if cpu::wrmsr(MSR_MISC_ENABLE, before & !(1 << 18)).is_err() {
        fail!("IA32_MISC_ENABLE bit 18 can't be cleared")
    }
    let shown = cpu::cpuid(1, 0)[2] >> 3 & 1;
    let monitor = trap::guarded!("monitor", in("rax") 0x1000_u64, in("ecx") 0, in("edx") 0);
    let mwait = trap::guarded!("mwait", in("eax") 0, in("ecx") 0);
    let _ = cpu::wrmsr(MSR_MISC_ENABLE, before);
    check!("CPUID", shown, 0);
    for (what, got) in [("MONITOR", monitor), ("MWAIT", mwait)] {
        match got {
            Err(f) => check!(what, f.vector, 6),
            Ok(_) => fail!("{what}: expected #UD"),
        }
    }
    need()
}

/// Without an armed line, MWAIT does nothing.
fn falls_through(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["mwait", "vmcall"])?;
    vm.regs.rax = 0;
    let e = vm.finish()?;
    check!("RIP - code", e.rip - vm.code, 3);
    Ok(())
}

/// A store to the line since MONITOR.
fn triggered(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["monitor", "mov byte ptr [rbx + 63], 5", "mwait", "vmcall"])?;
    vm.finish()?;
    Ok(())
}

fn faults(ctx: &mut Ctx) -> Outcome {
    let (monitor, mwait) = (code!["monitor", "vmcall"], code!["mwait", "vmcall"]);
    for (what, code, rax, rcx, vector) in [
        ("MONITOR with ECX = 1", monitor, None, 1, 13),
        ("MONITOR with RCX above 32 bits", monitor, None, 1 << 32, 13),
        ("MWAIT with ECX = 2", mwait, None, 2, 13),
        ("MWAIT with RCX above 32 bits", mwait, None, 1 << 32, 13),
        ("MONITOR of a non-canonical address", monitor, Some(1 << 63), 0, 13),
        ("MONITOR of a page that is not present", monitor, Some(5 << 30), 0, 14),
    ] {
        let mut vm = machine(ctx, code)?;
        vm.regs.rax = rax.unwrap_or(vm.data);
        vm.regs.rcx = rcx;
        let event = vm.expect_event(vector)?;
        check!(format_args!("{what}: RIP - code"), event.rip - vm.code, 0);
        check!(format_args!("{what}: error code"), event.code, 0);
    }
    for code in [monitor, mwait] {
        let mut vm = machine(ctx, code)?;
        vm.need_primary(primary::MONITOR | primary::MWAIT)?;
        vm.segments([0x23, 0x2b], 0xa0fb, 0xc0f3)?;
        vm.expect_event(6)?;
    }
    Ok(())
}

/// L1's timer ends L2's wait; L2 is active, behind MWAIT.
fn timer(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["monitor", "mwait", "2: jmp 2b"])?;
    vm.need_pin(pin::TIMER)?;
    vm.set(TIMER, 2_000_000 >> (ctx.caps.misc & 0x1f))?;
    let e = vm.expect(reason::TIMER)?;
    check!("RIP - code", e.rip - vm.code, 6);
    check!("activity", vm.get(ACTIVITY)?, 0);
    Ok(())
}

/// L2 takes an interrupt of L1's local APIC.
fn interrupt(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["sti", "2: monitor", "mwait", "jmp 2b"])?;
    arm_timer(0x46);
    vm.expect_event(0x46)?;
    cpu::apic::eoi();
    Ok(())
}

/// With ECX bit 0, an interrupt that is masked ends the wait, and stays pending.
fn masked_interrupt(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["monitor", "mov ecx, 1", "mwait", "vmcall"])?;
    arm_timer(0x47);
    vm.finish()?;
    let taken = trap::interrupts(0x47);
    while !cpu::apic::requested(0x47) {}
    cpu::interrupts_for_a_moment();
    check!("interrupts of L1", trap::interrupts(0x47), taken + 1);
    Ok(())
}

/// With external-interrupt exiting, L2's RFLAGS.IF and ECX do not matter.
fn external_exit(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["2: monitor", "mwait", "jmp 2b"])?;
    vm.need_pin(pin::EXTERNAL)?;
    arm_timer(0x48);
    vm.expect(reason::EXTERNAL)?;
    check!("activity", vm.get(ACTIVITY)?, 0);
    cpu::interrupts_for_a_moment();
    Ok(())
}

/// L1's own wait.
fn root(_: &mut Ctx) -> Outcome {
    need()?;
    let line = memory::page();
    arm_timer(0x49);
    while !cpu::apic::requested(0x49) {
        unsafe {
            asm!("monitor", in("rax") line, in("ecx") 0, in("edx") 0);
            asm!("mwait", in("eax") 0, in("ecx") 1);
        }
    }
    cpu::interrupts_for_a_moment();
    Ok(())
}
