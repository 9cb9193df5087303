//! The cost of exits as the guest that causes them sees it, named as in kvm-unit-tests' vmexit where that
//! has them. VMX is not used here: the image is a plain guest, of L0, of a KVM or of a KVM inside L1, and
//! each figure is the whole round trip to whoever handles the exit and back.
//!
//! Not measured: exits that no guest without a hypervisor of its own can cause, such as those of VMX
//! instructions; exits that depend on a second processor.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use super::bench::{BEGIN_PORT, END_PORT, VMEXITS, report, samples};
use super::suite::Choice;
use super::{cpu, trap};

/// A port that nothing answers on a PC but the manufacturer's POST display.
const POST_PORT: u16 = 0x80;
/// The ACPI power-management timer of the machine that nestvmm shows.
const PM_TIMER: u16 = 0x608;
/// Nothing is here: between the I/O APIC and the local APIC.
const UNASSIGNED: u64 = 0xfed4_0000;
/// Untouched memory starts here, above the image and the page pool.
const FRESH: u64 = 16 << 20;
/// The interrupt that is sent to this processor itself.
const VECTOR: u8 = 0x51;
/// And one that ends a HLT that missed it.
const RESCUE_VECTOR: u8 = 0x52;
/// How long such a HLT lasts, in ticks of the local APIC's clock: 17 ms to 0.7 s.
const RESCUE_TICKS: u32 = 1 << 24;

/// One measurement: what happens once a round, given the round's number.
struct Exit {
    name: &'static str,
    once: fn(u64),
}

const EXITS: &[Exit] = &[
    // What a KVM's kernel part handles.
    Exit { name: "cpuid", once: |_| _ = cpu::cpuid(0, 0) },
    Exit { name: "vmcall", once: hypercall },
    Exit { name: "inl", once: |_| _ = cpu::inl(POST_PORT) },
    Exit { name: "mov_dr", once: |_| unsafe { asm!("mov dr7, {}", in(reg) 0x400_u64, options(nostack)) } },
    Exit { name: "rd_pat_msr", once: |_| _ = cpu::msr(cpu::MSR_PAT) },
    Exit { name: "mov_to_cr0", once: |_| _ = cpu::set_cr0(cpu::cr0() ^ CR0_TS) },
    // What a hypervisor watches that keeps shadow page tables, and no other.
    Exit { name: "mov_to_cr3", once: |_| _ = cpu::set_cr3(CR3.load(Relaxed)) },
    Exit { name: "invlpg", once: |_| unsafe { asm!("invlpg [{}]", in(reg) FRESH, options(nostack)) } },
    // What nestvmm handles itself in any case: time is its own.
    Exit { name: "rd_tsc_adjust", once: |_| _ = cpu::msr(cpu::MSR_TSC_ADJUST) },
    Exit { name: "wr_tsc_adjust", once: |_| _ = cpu::wrmsr(cpu::MSR_TSC_ADJUST, 0) },
    // What its userspace handles.
    Exit { name: "outb_to_post", once: |_| cpu::outb(POST_PORT, 0) },
    Exit { name: "inl_from_pmtimer", once: |_| _ = cpu::inl(PM_TIMER) },
    Exit { name: "mmio_read", once: |_| read(UNASSIGNED) },
    // What depends on where the local APIC is.
    Exit { name: "self_ipi_sti_nop", once: |_| self_ipi_nop() },
    Exit { name: "self_ipi_sti_hlt", once: |_| self_ipi_hlt() },
    // The first access to a page: an EPT violation or a nested page fault.
    Exit { name: "page_touch", once: |round| read(FRESH + round * 4096) },
];

const _: () = {
    assert!(EXITS.len() == VMEXITS.len(), "VMEXITS has all names");
    let mut i = 0;
    while i < EXITS.len() {
        assert!(super::coverage::same(EXITS[i].name, VMEXITS[i]), "VMEXITS has the names in order");
        i += 1;
    }
};

/// CR0.TS: guests flip it, hypervisors watch it.
const CR0_TS: u64 = 1 << 3;

/// What is asked for once, as asking may exit too: CR3, and whether this is an AMD processor.
static CR3: AtomicU64 = AtomicU64::new(0);
static AMD: AtomicBool = AtomicBool::new(false);

fn read(at: u64) {
    unsafe { asm!("mov {0:e}, [{0}]", inout(reg) at => _, options(nostack)) };
}

/// A hypercall with a number that no hypervisor knows.
fn hypercall(_: u64) {
    let _ = if AMD.load(Relaxed) {
        trap::guarded!("vmmcall", inout("rax") !0_u64 => _)
    } else {
        trap::guarded!("vmcall", inout("rax") !0_u64 => _)
    };
}

fn is_amd() -> bool {
    // "Auth" of AuthenticAMD, "Hygo" of HygonGenuine.
    matches!(cpu::cpuid(0, 0)[1], 0x6874_7541 | 0x6f67_7948)
}

fn self_ipi_nop() {
    cpu::apic::send_self(VECTOR);
    cpu::interrupts_for_a_moment();
}

/// The interrupt comes after HLT: STI holds it back for one instruction. QEMU's TCG forgets that when its own guest, a
/// hypervisor with SVM, is interrupted in between: then it comes before HLT, and HLT waits. A timer makes that a slow
/// round and not an endless one.
fn self_ipi_hlt() {
    cpu::apic::send_self(VECTOR);
    unsafe { asm!("sti", "hlt", "cli") };
}

/// Measures the exits of `choice`, `rounds` times each; returns whether one can't be measured here.
pub fn main(choice: Choice, rounds: u32) -> bool {
    println!("benchmark            rounds  min cycles  median  p99   median ns");
    CR3.store(cpu::cr3(), Relaxed);
    AMD.store(is_amd(), Relaxed);
    let mut failed = false;
    for exit in EXITS.iter().filter(|e| choice.has(e.name)) {
        failed |= !measure(exit, rounds);
    }
    failed
}

fn measure(exit: &Exit, rounds: u32) -> bool {
    // An exit that is a fault here, as a hypercall is without a hypervisor, would measure the fault.
    unsafe { (&raw mut trap::TRAP.vector).write_volatile(trap::NONE) };
    let taken = trap::interrupts(VECTOR);
    let times = samples(rounds);
    let rescued = exit.name == "self_ipi_sti_hlt";
    if rescued {
        cpu::apic::start_timer(RESCUE_VECTOR, RESCUE_TICKS);
    }
    let mut round = 0;
    cpu::outb(BEGIN_PORT, 0);
    for time in times.iter_mut() {
        let start = cpu::tsc();
        (exit.once)(round);
        *time = (cpu::tsc() - start).min(u32::MAX.into()) as u32;
        round += 1;
    }
    if rescued {
        cpu::apic::stop_timer();
    }
    if let Some(fault) = trap::last() {
        println!("skip {} (exception {} here)", exit.name, fault.vector);
        return true;
    }
    if exit.name.starts_with("self_ipi") && trap::interrupts(VECTOR) - taken != round {
        println!("FAIL {}: {} of {round} interrupts came", exit.name, trap::interrupts(VECTOR) - taken);
        return false;
    }
    cpu::outb(END_PORT, 0);
    report(exit.name, times);
    true
}
