//! Performance counters (SDM Vol. 3B §20.2), and the VM-entry and VM-exit controls that load
//! IA32_PERF_GLOBAL_CTRL.

use core::arch::asm;

use crate::guest::fields::*;
use crate::guest::suite::{Ctx, Outcome, check, fail, skip};
use crate::guest::vm::{Regs, Vm, code};
use crate::guest::{cpu, memory, trap};

super::cases! { true;
    "pmu.loop" "Vol. 3B 20.2.2" counted_loop;
    "pmu.registers" "Vol. 3B 20.2.2" registers;
    "pmu.nmi" "Vol. 3A 11.5.1" overflow_nmi;
    "pmu.l2.goes_on" "Vol. 3C 27.3.2.1" goes_on_in_l2;
    "pmu.l2.entry_load" "Vol. 3C 27.3.2.1" entry_load;
    "pmu.l2.exit_load" "Vol. 3C 28.5.1" exit_load;
    "pmu.l2.overflow" "Vol. 3C 26.2" overflow_in_l2;
    "pmu.l2.msr_list" "Vol. 3C 27.4" msr_list;
    "pmu.l2.rdpmc" "Vol. 3C 26.1.3" rdpmc_in_l2;
}

/// IA32_FIXED_CTR0: instructions retired.
const FIXED_CTR0: u32 = 0x309;
/// IA32_FIXED_CTR_CTRL.
const FIXED_CTR_CTRL: u32 = 0x38d;
/// IA32_PERF_GLOBAL_STATUS.
const GLOBAL_STATUS: u32 = 0x38e;
/// IA32_PERF_GLOBAL_OVF_CTRL.
const OVF_CTRL: u32 = 0x390;
/// The local APIC's LVT entry for performance counters.
const LVT_PERF: u32 = 0x834;
/// Fixed counter 0 in IA32_PERF_GLOBAL_CTRL and its kin.
const FIXED0: u64 = 1 << 32;
/// The greatest value of a counter of 48 bits.
const FULL: u64 = (1 << 48) - 1;

/// Sets fixed counter 0 up with this value and IA32_FIXED_CTR_CTRL, and counting off. Skips the case
/// without architectural performance monitoring.
fn set_up(value: u64, control: u64) -> Outcome {
    let [a, _, _, d] = cpu::cpuid(0xa, 0);
    if a & 0xff < 2 || d & 0x1f == 0 || d >> 5 & 0xff != 48 {
        return skip("no performance counters");
    }
    let done = cpu::wrmsr(cpu::MSR_PERF_GLOBAL_CTRL, 0)
        .and(cpu::wrmsr(FIXED_CTR_CTRL, control))
        .and(cpu::wrmsr(FIXED_CTR0, value))
        .and(cpu::wrmsr(OVF_CTRL, FIXED0));
    if done.is_err() {
        fail!("the counter can't be set up: {:x?}", trap::last())
    }
    Ok(())
}

/// Reads the counter with counting off.
fn stop() -> u64 {
    let _ = cpu::wrmsr(cpu::MSR_PERF_GLOBAL_CTRL, 0);
    cpu::msr(FIXED_CTR0)
}

fn counted_loop(_: &mut Ctx) -> Outcome {
    set_up(0, 3)?;
    let _ = cpu::wrmsr(cpu::MSR_PERF_GLOBAL_CTRL, FIXED0);
    let (first, last): (u64, u64);
    unsafe {
        asm!(
            "mov ecx, 0x40000000", "rdpmc", "mov r8, rax",
            "mov ecx, 12345", "2: dec ecx", "jnz 2b",
            // IA32_TSC_ADJUST: a VMM may have to read it for its guest.
            "mov ecx, 0x3b", "rdmsr",
            "mov ecx, 0x40000000", "rdpmc",
            out("r8") first, out("rax") last, out("rcx") _, out("rdx") _,
        )
    }
    stop();
    // RDPMC and two MOVs, the loop, MOV, RDMSR, MOV.
    check!("instructions", last - first, 3 + 2 * 12345 + 3);
    Ok(())
}

fn registers(_: &mut Ctx) -> Outcome {
    set_up(0, 0)?;
    for (msr, value) in [
        (cpu::MSR_PERF_GLOBAL_CTRL, 1 << 63),
        (FIXED_CTR_CTRL, 1 << 63),
        (FIXED_CTR0, 1 << 48),
        (GLOBAL_STATUS, 0),
        (OVF_CTRL, 1 << 31),
        (0x186, 1 << 63),
    ] {
        match cpu::wrmsr(msr, value) {
            Err(f) => check!(format_args!("vector of WRMSR {msr:#x}"), f.vector, 13),
            Ok(()) => fail!("WRMSR of {value:#x} to {msr:#x} succeeds"),
        }
    }
    Ok(())
}

/// An overflow in L1 comes as the NMI that the LVT entry asks for, which is masked then.
fn overflow_nmi(_: &mut Ctx) -> Outcome {
    set_up(FULL - 10_000, 0xb)?;
    let _ = cpu::wrmsr(LVT_PERF, 4 << 8);
    let before = trap::nmis();
    let _ = cpu::wrmsr(cpu::MSR_PERF_GLOBAL_CTRL, FIXED0);
    for _ in 0..20_000 {
        core::hint::spin_loop();
    }
    let counted = stop();
    check!("NMIs", trap::nmis(), before + 1);
    check!("LVT entry", cpu::msr(LVT_PERF), 1 << 16 | 4 << 8);
    check!("status", cpu::msr(GLOBAL_STATUS), FIXED0);
    if counted > 1 << 40 {
        fail!("the counter did not wrap: {counted:#x}")
    }
    let _ = cpu::wrmsr(OVF_CTRL, FIXED0);
    check!("status, cleared", cpu::msr(GLOBAL_STATUS), 0);
    Ok(())
}

/// L2's loop: RCX times two instructions; VMCALL does not retire.
fn looping(ctx: &Ctx, rounds: u64) -> Outcome<Vm> {
    let mut vm = Vm::new(&ctx.caps, code!["2: dec rcx", "jnz 2b", "vmcall"])?;
    vm.regs = Regs { rcx: rounds, ..Regs::default() };
    Ok(vm)
}

/// Without the controls, L1's counters count L2 as they count L1.
fn goes_on_in_l2(ctx: &mut Ctx) -> Outcome {
    set_up(0, 3)?;
    let mut counts = [0; 2];
    for (count, rounds) in counts.iter_mut().zip([1000, 51_000]) {
        let mut vm = looping(ctx, rounds)?;
        let _ = cpu::wrmsr(FIXED_CTR0, 0);
        let _ = cpu::wrmsr(cpu::MSR_PERF_GLOBAL_CTRL, FIXED0);
        let done = vm.finish();
        *count = stop();
        done?;
    }
    // What L1 did besides was the same both times.
    check!("the difference", counts[1] - counts[0], 100_000);
    Ok(())
}

/// Counting is on in L2 alone.
fn entry_load(ctx: &mut Ctx) -> Outcome {
    set_up(0, 3)?;
    let mut vm = looping(ctx, 5000)?;
    vm.need_entry(entry::LOAD_PERF)?;
    vm.need_exit(exit::LOAD_PERF)?;
    vm.set(GUEST_PERF, FIXED0)?;
    vm.set(HOST_PERF, 0)?;
    vm.finish()?;
    check!("IA32_PERF_GLOBAL_CTRL of L1", cpu::msr(cpu::MSR_PERF_GLOBAL_CTRL), 0);
    check!("IA32_PERF_GLOBAL_CTRL in the VMCS", vm.get(GUEST_PERF)?, FIXED0);
    check!("instructions of L2", cpu::msr(FIXED_CTR0), 10_000);
    Ok(())
}

/// Counting is on in L1, and off in L2 by the entry; what is not loaded at the exit stays as L2 had it.
fn exit_load(ctx: &mut Ctx) -> Outcome {
    set_up(0, 3)?;
    let mut counts = [0; 2];
    for (count, rounds) in counts.iter_mut().zip([1000, 51_000]) {
        let mut vm = looping(ctx, rounds)?;
        vm.need_entry(entry::LOAD_PERF)?;
        vm.need_exit(exit::LOAD_PERF)?;
        vm.set(GUEST_PERF, 0)?;
        vm.set(HOST_PERF, FIXED0)?;
        let _ = cpu::wrmsr(FIXED_CTR0, 0);
        let _ = cpu::wrmsr(cpu::MSR_PERF_GLOBAL_CTRL, FIXED0);
        let done = vm.finish();
        let on = cpu::msr(cpu::MSR_PERF_GLOBAL_CTRL);
        *count = stop();
        done?;
        check!("IA32_PERF_GLOBAL_CTRL of L1", on, FIXED0);
    }
    check!("the difference", counts[1] - counts[0], 0);
    let mut vm = looping(ctx, 1)?;
    vm.need_entry(entry::LOAD_PERF)?;
    vm.set(GUEST_PERF, FIXED0)?;
    vm.finish()?;
    let on = cpu::msr(cpu::MSR_PERF_GLOBAL_CTRL);
    stop();
    check!("IA32_PERF_GLOBAL_CTRL that no exit loaded", on, FIXED0);
    Ok(())
}

/// An overflow in L2 is an NMI of L1's, and exits as such.
fn overflow_in_l2(ctx: &mut Ctx) -> Outcome {
    set_up(FULL - 100_000, 0xb)?;
    let mut vm = Vm::new(&ctx.caps, code!["2: jmp 2b"])?;
    vm.need_pin(pin::NMI)?;
    vm.need_entry(entry::LOAD_PERF)?;
    vm.need_exit(exit::LOAD_PERF)?;
    vm.set(GUEST_PERF, FIXED0)?;
    vm.set(HOST_PERF, 0)?;
    let _ = cpu::wrmsr(LVT_PERF, 4 << 8);
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("interruption information", e.info, 0x8000_0202_u32);
    check!("status", cpu::msr(GLOBAL_STATUS), FIXED0);
    check!("LVT entry", cpu::msr(LVT_PERF), 1 << 16 | 4 << 8);
    if cpu::msr(FIXED_CTR0) > 1 << 40 {
        fail!("the counter did not wrap: {:#x}", cpu::msr(FIXED_CTR0))
    }
    // The exit blocks NMIs; IRET unblocks.
    unsafe {
        asm!(
            "mov {t}, rsp", "push 0x10", "push {t}", "pushfq", "push 8", "lea {t}, [rip + 66f]", "push {t}", "iretq", "66:",
            t = out(reg) _
        );
    }
    Ok(())
}

/// The register in an MSR list is loaded as by the control.
fn msr_list(ctx: &mut Ctx) -> Outcome {
    set_up(0, 3)?;
    let mut vm = looping(ctx, 5000)?;
    let list = |value: u64| {
        let at = memory::page();
        memory::write(at, u64::from(cpu::MSR_PERF_GLOBAL_CTRL));
        memory::write(at + 8, value);
        at
    };
    vm.set(ENTRY_LOAD_ADDR, list(FIXED0))?;
    vm.set(ENTRY_LOAD_COUNT, 1)?;
    vm.set(EXIT_LOAD_ADDR, list(0))?;
    vm.set(EXIT_LOAD_COUNT, 1)?;
    vm.finish()?;
    check!("instructions of L2", cpu::msr(FIXED_CTR0), 10_000);
    // A reserved bit fails the entry as WRMSR would fault.
    let mut vm = looping(ctx, 1)?;
    vm.set(ENTRY_LOAD_ADDR, list(1 << 63))?;
    vm.set(ENTRY_LOAD_COUNT, 1)?;
    match vm.enter() {
        Ok(e) => check!("exit reason", e.reason, 0x8000_0022_u32),
        Err(e) => fail!("expected exit reason 0x80000022, got {e:x?}"),
    }
    Ok(())
}

/// L2 that may reads L1's counter.
fn rdpmc_in_l2(ctx: &mut Ctx) -> Outcome {
    set_up(0x1234_5678_9abc, 0)?;
    let mut vm = Vm::new(&ctx.caps, code!["rdpmc", "vmcall"])?;
    vm.regs = Regs { rcx: 0x4000_0000, ..Regs::default() };
    vm.finish()?;
    check!("RAX", vm.regs.rax, 0x5678_9abc);
    check!("RDX", vm.regs.rdx, 0x1234);
    // "Fast" reads are for processors without architectural performance monitoring.
    for ecx in [0xc000_0000, 0x4000_0020, 0x20] {
        let mut vm = Vm::new(&ctx.caps, code!["rdpmc", "vmcall"])?;
        vm.regs = Regs { rcx: ecx, ..Regs::default() };
        let event = vm.expect_event(13)?;
        check!(format_args!("error code with ECX {ecx:#x}"), event.code, 0);
    }
    Ok(())
}
