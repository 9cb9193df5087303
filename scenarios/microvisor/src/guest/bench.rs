//! Exit benchmarks, named as in kvm-unit-tests' vmexit where that has them: the time from L1's VMRESUME to
//! the next exit in L1, and L1's own handling up to the next VMRESUME.
//!
//! `NAME` is with a handler that does what a hypervisor must: reads reason, length and RIP, writes RIP.
//! `NAME_bare` resumes L2 at the same instruction: one exit and one entry, nothing else.

use super::fields::*;
use super::suite::{Ctx, Outcome, Stop, enter_vmx};
use super::vm::{Vm, code};
use super::{cpu, evmcs, memory};

/// Samples that are kept.
const SAMPLES: usize = 10_000;
static mut TIMES: [u32; SAMPLES] = [0; SAMPLES];

struct Bench {
    name: &'static str,
    code: fn() -> u64,
    setup: fn(&mut Vm) -> Outcome,
    reason: u32,
    handle: bool,
}

fn none(_: &mut Vm) -> Outcome {
    Ok(())
}

const BENCHES: &[Bench] = &[
    Bench {
        name: "cpuid_bare",
        code: || code!["2: cpuid", "jmp 2b"],
        setup: none,
        reason: reason::CPUID,
        handle: false,
    },
    Bench {
        name: "cpuid",
        code: || code!["2: cpuid", "jmp 2b"],
        setup: none,
        reason: reason::CPUID,
        handle: true,
    },
    // With what every hypervisor uses: a VPID and an MSR bitmap.
    Bench {
        name: "cpuid_vpid",
        code: || code!["2: cpuid", "jmp 2b"],
        setup: |vm| {
            vm.need_secondary(secondary::VPID)?;
            vm.set(VPID, 1)?;
            vm.need_primary(primary::MSR_BITMAPS)?;
            vm.set(MSR_BITMAP, memory::page())
        },
        reason: reason::CPUID,
        handle: true,
    },
    Bench {
        name: "vmcall",
        code: || code!["2: vmcall", "jmp 2b"],
        setup: none,
        reason: reason::VMCALL,
        handle: true,
    },
    Bench {
        name: "inl",
        code: || code!["mov edx, 0x80", "2: in eax, dx", "jmp 2b"],
        setup: |vm| vm.need_primary(primary::IO_ALL),
        reason: reason::IO,
        handle: true,
    },
    Bench {
        name: "mov_dr",
        code: || code!["mov eax, 0x400", "2: mov dr7, rax", "jmp 2b"],
        setup: |vm| vm.need_primary(primary::MOV_DR),
        reason: reason::DR,
        handle: true,
    },
    Bench {
        name: "wr_tsc_adjust",
        code: || code!["mov ecx, 0x3b", "xor eax, eax", "xor edx, edx", "2: wrmsr", "jmp 2b"],
        setup: none,
        reason: reason::WRMSR,
        handle: true,
    },
    Bench {
        name: "ept_violation",
        code: || code!["2: mov al, [rbx]", "jmp 2b"],
        setup: |vm| {
            let ept = vm.need_ept()?;
            vm.regs.rbx = vm.data;
            ept.map(vm.data, 0, 0);
            Ok(())
        },
        reason: reason::EPT_VIOLATION,
        handle: true,
    },
];

/// Runs the benchmarks whose names start with `only`; returns whether one failed.
pub fn main(ctx: &Ctx, only: Option<&str>, rounds: u32) -> bool {
    if let Err(Stop::Fail(_)) = enter_vmx(ctx) {
        println!("VMX operation cannot be entered");
        return true;
    }
    evmcs::want(true);
    let mut failed = false;
    println!("benchmark            rounds  min cycles  median  p99   median ns");
    for bench in BENCHES.iter().filter(|b| only.is_none_or(|o| b.name.starts_with(o))) {
        memory::reset();
        match run(ctx, bench, rounds) {
            Ok(()) => {}
            Err(Stop::Skip(why)) => println!("skip {} ({why})", bench.name),
            Err(Stop::Fail(text)) => {
                failed = true;
                println!("FAIL {}: {}", bench.name, text.as_str());
            }
        }
    }
    failed |= ept_fill(ctx, only);
    failed
}

/// VMREAD as a hypervisor does it that knows its fields to exist: without a look at the outcome; or a load.
#[inline(always)]
fn vmread(field: u32) -> u64 {
    if let Some(at) = evmcs::current() {
        return evmcs::read(at, field).unwrap_or(0);
    }
    let value;
    unsafe { core::arch::asm!("vmread {}, {}", out(reg) value, in(reg) u64::from(field), options(nostack)) };
    value
}

/// VMWRITE likewise.
#[inline(always)]
fn vmwrite(field: u32, value: u64) {
    if let Some(at) = evmcs::current() {
        let _ = evmcs::write(at, field, value);
        return;
    }
    unsafe { core::arch::asm!("vmwrite {}, {}", in(reg) u64::from(field), in(reg) value, options(nostack)) };
}

/// TSC frequency in kHz from CPUID 15H; 0 if that does not tell.
fn tsc_khz() -> u64 {
    let [denominator, numerator, hz, _] = cpu::cpuid(0x15, 0);
    match denominator {
        0 => 0,
        d => u64::from(hz) * u64::from(numerator) / u64::from(d) / 1000,
    }
}

fn nanoseconds(cycles: u64) -> u64 {
    (cycles * 1_000_000).checked_div(tsc_khz()).unwrap_or(0)
}

/// Room for the times of `rounds` rounds, of one measurement at a time.
pub fn samples(rounds: u32) -> &'static mut [u32] {
    let rounds = (rounds.max(1) as usize).min(SAMPLES);
    unsafe { &mut (&mut *&raw mut TIMES)[..rounds] }
}

fn run(ctx: &Ctx, bench: &Bench, rounds: u32) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, (bench.code)())?;
    (bench.setup)(&mut vm)?;
    vm.expect(bench.reason)?;
    let times = samples(rounds);
    for (i, time) in times.iter_mut().enumerate() {
        // The handler's time counts with the entry that follows it.
        let start = cpu::tsc();
        if bench.handle {
            let got = vmread(REASON);
            if got != u64::from(bench.reason) {
                super::suite::fail!("round {i}: exit reason {got}")
            }
            let rip = vmread(GUEST_RIP);
            // An EPT violation has no length: L2 stays where it is.
            if bench.reason != reason::EPT_VIOLATION {
                vmwrite(GUEST_RIP, rip + vmread(INSTR_LEN));
            }
        }
        if !unsafe { vm.resume_raw(i == 0) } {
            super::suite::fail!("round {i}: VM entry failed")
        }
        *time = (cpu::tsc() - start).min(u32::MAX.into()) as u32;
    }
    report(bench.name, times);
    Ok(())
}

/// Prints the line of one measurement, from its times in cycles.
pub fn report(name: &str, times: &mut [u32]) {
    times.sort_unstable();
    let at = |percent: usize| u64::from(times.get(times.len() * percent / 100).copied().unwrap_or(0));
    println!(
        "bench {name:17} {:>6}  {:>9}  {:>7}  {:>7}  {:>6} ns",
        times.len(),
        at(0),
        at(50),
        at(99),
        nanoseconds(at(50))
    );
}

/// The rate at which L0 fills EPT02: L2 touches pages that EPT12 maps but EPT02 does not yet.
fn ept_fill(ctx: &Ctx, only: Option<&str>) -> bool {
    for (name, small) in [("ept_fill_4k", true), ("ept_fill_2m", false)] {
        if only.is_some_and(|o| !name.starts_with(o)) {
            continue;
        }
        memory::reset();
        match fill(ctx, name, small) {
            Ok(()) => {}
            Err(Stop::Skip(why)) => println!("skip {name} ({why})"),
            Err(Stop::Fail(text)) => {
                println!("FAIL {name}: {}", text.as_str());
                return true;
            }
        }
    }
    false
}

fn fill(ctx: &Ctx, name: &str, small: bool) -> Outcome {
    // RBX: address, RCX: number of pages, RDX: step.
    let mut vm = Vm::new(&ctx.caps, code!["2: mov al, [rbx]", "add rbx, rdx", "loop 2b", "vmcall"])?;
    let ept = vm.need_ept()?;
    // 16 MiB up; the first 4 KiB of each 2-MiB page for the large ones.
    let base = 16_u64 << 20;
    let (step, pages) = if small { (4096, 4096) } else { (2 << 20, 64) };
    if small {
        for i in 0..8 {
            ept.entry_at(base + (i << 21), 1);
        }
    }
    vm.regs.rbx = base;
    vm.regs.rdx = step;
    vm.regs.rcx = pages;
    let start = cpu::tsc_ordered();
    vm.finish()?;
    let took = (cpu::tsc_ordered() - start).max(1);
    println!(
        "bench {name:17} {pages:>6}  {:>9} cycles a page, {} pages a second",
        took / pages,
        pages * tsc_khz() * 1000 / took
    );
    Ok(())
}
