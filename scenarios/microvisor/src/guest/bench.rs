//! Exit benchmarks, named as in kvm-unit-tests' vmexit where that has them: the time from L1's VMRESUME to
//! the next exit in L1, and L1's own handling up to the next VMRESUME.
//!
//! `NAME` is with a handler that does what a hypervisor must: reads reason, length and RIP, writes RIP.
//! `NAME_bare` resumes L2 at the same instruction: one exit and one entry, nothing else.
//!
//! What is measured is between a write to [`BEGIN_PORT`] and one to [`END_PORT`], so that exit traces have it too.

use core::sync::atomic::{AtomicU64, Ordering};

use super::ept::{RWX, WB};
use super::fields::*;
use super::suite::{Choice, Ctx, Outcome, Stop, enter_vmx, skip};
use super::vm::{Vm, WITHOUT_EPT, code};
use super::{cpu, evmcs, memory};

include!("../benchmarks.rs");

/// Samples that are kept.
const SAMPLES: usize = 10_000;
static mut TIMES: [u32; SAMPLES] = [0; SAMPLES];

struct Bench {
    name: &'static str,
    code: fn() -> u64,
    setup: fn(&mut Vm) -> Outcome,
    reason: u32,
    handler: Handler,
}

const _: () = {
    let mut i = 0;
    while i < BENCHES.len() {
        let mut k = 0;
        while !super::coverage::same(BENCHES[i].name, BENCHMARKS[k]) {
            k += 1;
            assert!(k < BENCHMARKS.len(), "BENCHMARKS has all names");
        }
        i += 1;
    }
};

impl Bench {
    /// Of two with the same name, one is for an L2 with EPT and one for an L2 without.
    fn is_of_mode(&self) -> bool {
        match self.handler {
            Handler::Map(field, _) => (field != GUEST_PHYS) == WITHOUT_EPT.load(Ordering::Relaxed),
            _ => true,
        }
    }
}

/// What L1 does at an exit.
#[derive(Clone, Copy)]
enum Handler {
    /// Nothing.
    Bare,
    /// Reads reason and RIP, moves RIP behind the instruction.
    Skip,
    /// Reads reason and RIP, leaves L2 where it is: an EPT violation has no length.
    Stay,
    /// Reads reason and address, which is in a field, and maps its page with these bits in [`LEAVES`].
    Map(u32, u64),
}

/// Where L2's untouched pages are in `page_touch`, above the image, and their number in tables of 512.
const FRESH: u64 = 16 << 20;
const FRESH_TABLES: usize = SAMPLES.div_ceil(512) + 1;
/// The tables whose entries map them, one after another.
static LEAVES: AtomicU64 = AtomicU64::new(0);

/// Tables for the untouched pages, with nothing in them; gives their addresses, with those of the 2 MiB that each maps.
fn leaves() -> impl Iterator<Item = (u64, u64)> {
    let tables = memory::pages(FRESH_TABLES);
    LEAVES.store(tables, Ordering::Relaxed);
    (0..FRESH_TABLES as u64).map(move |i| (tables + 4096 * i, FRESH + (i << 21)))
}

/// Maps a page of those.
fn map(address: u64, bits: u64) {
    let page = address & !0xfff;
    memory::write(LEAVES.load(Ordering::Relaxed) + (page.wrapping_sub(FRESH) >> 12) * 8, page | bits);
}

/// L2 touches pages that L1 has not mapped yet in its EPT.
fn touch_with_ept(vm: &mut Vm) -> Outcome {
    let ept = vm.need_ept()?;
    for (table, address) in leaves() {
        ept.set(address, 2, table | RWX);
    }
    vm.regs.rbx = FRESH;
    Ok(())
}

/// The same in the page tables that L1 gives an L2 without EPT: it shadows those that L2 would have, and all of
/// L2's page faults are L1's.
fn touch_with_shadow_tables(vm: &mut Vm) -> Outcome {
    if vm.ept.is_some() {
        return skip("L2 has EPT");
    }
    let copy = |table: u64| {
        let new = memory::page();
        memory::copy(new, table & ADDRESS, 4096);
        new
    };
    let root = copy(cpu::cr3());
    let pointers = copy(memory::read(root));
    let directory = copy(memory::read(pointers));
    memory::write(root, directory_entry(pointers));
    memory::write(pointers, directory_entry(directory));
    for (table, address) in leaves() {
        memory::write(directory + (address >> 21) * 8, directory_entry(table));
    }
    vm.set(GUEST_CR3, root)?;
    vm.set(EXCEPTIONS, 1 << 14)?;
    vm.regs.rbx = FRESH;
    Ok(())
}

/// Present, writable, for user mode.
const PAGE: u64 = 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

fn directory_entry(table: u64) -> u64 {
    table | PAGE
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
        handler: Handler::Bare,
    },
    Bench {
        name: "cpuid",
        code: || code!["2: cpuid", "jmp 2b"],
        setup: none,
        reason: reason::CPUID,
        handler: Handler::Skip,
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
        handler: Handler::Skip,
    },
    Bench {
        name: "vmcall",
        code: || code!["2: vmcall", "jmp 2b"],
        setup: none,
        reason: reason::VMCALL,
        handler: Handler::Skip,
    },
    Bench {
        name: "inl",
        code: || code!["mov edx, 0x80", "2: in eax, dx", "jmp 2b"],
        setup: |vm| vm.need_primary(primary::IO_ALL),
        reason: reason::IO,
        handler: Handler::Skip,
    },
    Bench {
        name: "mov_dr",
        code: || code!["mov eax, 0x400", "2: mov dr7, rax", "jmp 2b"],
        setup: |vm| vm.need_primary(primary::MOV_DR),
        reason: reason::DR,
        handler: Handler::Skip,
    },
    Bench {
        name: "wr_tsc_adjust",
        code: || code!["mov ecx, 0x3b", "xor eax, eax", "xor edx, edx", "2: wrmsr", "jmp 2b"],
        setup: none,
        reason: reason::WRMSR,
        handler: Handler::Skip,
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
        handler: Handler::Stay,
    },
    Bench {
        name: "page_touch",
        code: || code!["2: mov al, [rbx]", "add rbx, 4096", "jmp 2b"],
        setup: touch_with_ept,
        reason: reason::EPT_VIOLATION,
        handler: Handler::Map(GUEST_PHYS, WB | RWX),
    },
    // The qualification of a page fault is its address (SDM Vol. 3C §28.2.1).
    Bench {
        name: "page_touch",
        code: || code!["2: mov al, [rbx]", "add rbx, 4096", "jmp 2b"],
        setup: touch_with_shadow_tables,
        reason: reason::EXCEPTION_NMI,
        handler: Handler::Map(QUALIFICATION, PAGE),
    },
];

/// Runs the benchmarks of `choice`; returns whether one failed.
pub fn main(ctx: &Ctx, choice: Choice, rounds: u32) -> bool {
    if let Err(Stop::Fail(_)) = enter_vmx(ctx) {
        println!("VMX operation cannot be entered");
        return true;
    }
    evmcs::want(true);
    let mut failed = false;
    println!("benchmark            rounds  min cycles  median  p99   median ns");
    for bench in BENCHES.iter().filter(|b| choice.has(b.name) && b.is_of_mode()) {
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
    failed |= ept_fill(ctx, choice);
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

/// L1's handler of the exit that round `i` begins with.
#[inline(always)]
fn handle(bench: &Bench, i: usize) -> Outcome {
    if let Handler::Bare = bench.handler {
        return Ok(());
    }
    let got = vmread(REASON);
    if got != u64::from(bench.reason) {
        super::suite::fail!("round {i}: exit reason {got}")
    }
    match bench.handler {
        Handler::Bare => {}
        Handler::Skip => vmwrite(GUEST_RIP, vmread(GUEST_RIP) + vmread(INSTR_LEN)),
        Handler::Stay => _ = vmread(GUEST_RIP),
        Handler::Map(field, bits) => map(vmread(field), bits),
    }
    Ok(())
}

fn run(ctx: &Ctx, bench: &Bench, rounds: u32) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, (bench.code)())?;
    (bench.setup)(&mut vm)?;
    vm.expect(bench.reason)?;
    let times = samples(rounds);
    cpu::outb(BEGIN_PORT, 0);
    // The exit that the last round ends with is handled like the others, but no longer timed.
    for i in 0..=times.len() {
        // The handler's time counts with the entry that follows it.
        let start = cpu::tsc();
        handle(bench, i)?;
        if !unsafe { vm.resume_raw(i == 0) } {
            super::suite::fail!("round {i}: VM entry failed")
        }
        if let Some(time) = times.get_mut(i) {
            *time = (cpu::tsc() - start).min(u32::MAX.into()) as u32;
        }
    }
    cpu::outb(END_PORT, 0);
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
    println!(
        "percentiles {name:17} {:>6}  {:>6}  {:>6} ns",
        nanoseconds(at(50)),
        nanoseconds(at(90)),
        nanoseconds(at(99))
    );
}

/// The rate at which L0 fills EPT02: L2 touches pages that EPT12 maps but EPT02 does not yet.
fn ept_fill(ctx: &Ctx, choice: Choice) -> bool {
    for (name, small) in [("ept_fill_4k", true), ("ept_fill_2m", false)] {
        if !choice.has(name) {
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
    cpu::outb(BEGIN_PORT, 0);
    let start = cpu::tsc_ordered();
    vm.finish()?;
    let took = (cpu::tsc_ordered() - start).max(1);
    cpu::outb(END_PORT, 0);
    println!(
        "bench {name:17} {pages:>6}  {:>9} cycles a page, {} pages a second",
        took / pages,
        pages * tsc_khz() * 1000 / took
    );
    Ok(())
}
