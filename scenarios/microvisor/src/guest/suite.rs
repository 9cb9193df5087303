//! The test suite: its cases, how they are chosen and what is reported.

use core::fmt::{self, Write};

use super::vm::{Vm, WITHOUT_EPT, code};
use super::vmx::{self, Caps};
use super::{abort, bench, cases, coverage, cpu, evmcs, memory, trap, vmexit};

/// Why a case ends early.
pub enum Stop {
    /// What was expected and what came.
    Fail(Text),
    /// The processor does not offer what the case tests.
    Skip(&'static str),
}

/// What a case returns.
pub type Outcome<T = ()> = Result<T, Stop>;

/// Text of bounded length; what does not fit is cut off.
pub struct Text {
    bytes: [u8; 360],
    len: usize,
}

impl Text {
    /// Formatted text.
    pub fn new(text: fmt::Arguments) -> Self {
        let mut t = Self { bytes: [0; 360], len: 0 };
        let _ = t.write_fmt(text);
        t
    }
    /// The text.
    pub fn as_str(&self) -> &str {
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("?")
    }
}

impl Write for Text {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for b in s.bytes().filter(u8::is_ascii) {
            if self.len < self.bytes.len() {
                self.bytes[self.len] = b;
                self.len += 1;
            }
        }
        Ok(())
    }
}

/// Fails the case with a message.
macro_rules! fail {
    ($($t:tt)*) => {
        return Err($crate::guest::suite::Stop::Fail($crate::guest::suite::Text::new(format_args!($($t)*))))
    };
}
pub(crate) use fail;

/// Expects two values to be equal: `check!("what", got, expected)`.
macro_rules! check {
    ($what:expr, $got:expr, $expected:expr) => {
        $crate::guest::suite::equal(&$what, $got as u64, $expected as u64)?
    };
}
pub(crate) use check;

/// Fails unless `got` is `expected`.
pub fn equal(what: &dyn fmt::Display, got: u64, expected: u64) -> Outcome {
    if got != expected {
        fail!("{what}: expected {expected:#x}, got {got:#x}")
    }
    Ok(())
}

/// Ends the case as skipped.
pub fn skip<T>(why: &'static str) -> Outcome<T> {
    Err(Stop::Skip(why))
}

/// What a case is given.
pub struct Ctx {
    /// What the processor offers.
    pub caps: Caps,
    /// The VMXON region.
    pub vmxon: u64,
}

/// One case.
pub struct Case {
    /// Its name, unique, with a prefix for its group.
    pub name: &'static str,
    /// The section of the SDM that it tests.
    pub section: &'static str,
    /// Whether it needs VMX operation.
    pub vmx: bool,
    /// Runs it.
    pub run: fn(&mut Ctx) -> Outcome,
}

#[repr(C, align(4096))]
struct Region([u32; 1024]);
static mut VMXON_REGION: Region = Region([0; 1024]);

/// Enters VMX operation: feature control, CR0, CR4, VMXON.
pub fn enter_vmx(ctx: &Ctx) -> Outcome {
    let control = cpu::msr(cpu::MSR_FEATURE_CONTROL);
    if control & 1 == 0 {
        let _ = cpu::wrmsr(cpu::MSR_FEATURE_CONTROL, control | 5);
    }
    let c = &ctx.caps;
    let _ = cpu::set_cr0(cpu::cr0() & c.cr0_fixed[1] | c.cr0_fixed[0]);
    if cpu::set_cr4(cpu::cr4() | c.cr4_fixed[0] | 1 << 13).is_err() {
        fail!("CR4.VMXE cannot be set");
    }
    memory::write(ctx.vmxon, c.revision());
    match vmx::vmxon(ctx.vmxon) {
        // Already in VMX operation.
        Ok(()) | Err(vmx::VmxError::Valid(15)) | Err(vmx::VmxError::Invalid) => Ok(()),
        Err(e) => fail!("VMXON: expected success, got {e:x?}"),
    }
}

/// An L2 that says so and spins for ever, for those who want to look at it.
fn spin(ctx: &Ctx) -> Outcome {
    enter_vmx(ctx)?;
    let text = b"L2 spins\n";
    let mut vm = Vm::new(&ctx.caps, code!["rep outsb", "2: jmp 2b"])?;
    memory::copy(vm.data, text.as_ptr() as u64, text.len());
    vm.regs.rsi = vm.data;
    vm.regs.rcx = text.len() as u64;
    vm.regs.rdx = 0x3f8;
    let exit = vm.run()?;
    fail!("L2 does not spin: exit reason {}", exit.reason)
}

#[derive(Default)]
struct Counts {
    passed: u32,
    failed: u32,
    skipped: u32,
}

fn word<'a>(options: &'a str, key: &str) -> Option<&'a str> {
    options.split_whitespace().find_map(|w| w.strip_prefix(key))
}

fn has(options: &str, key: &str) -> bool {
    options.split_whitespace().any(|w| w == key)
}

fn selected(only: Option<&str>, name: &str) -> bool {
    only.is_none_or(|list| list.split(',').any(|prefix| name.starts_with(prefix)))
}

/// Which benchmarks run.
#[derive(Clone, Copy)]
pub struct Choice<'a> {
    /// Those whose names start so.
    pub only: Option<&'a str>,
    /// Those with one of these names, which commas part.
    pub exactly: Option<&'a str>,
}

impl Choice<'_> {
    /// Whether `name` is chosen.
    pub fn has(&self, name: &str) -> bool {
        self.only.is_none_or(|prefix| name.starts_with(prefix))
            && self.exactly.is_none_or(|list| list.split(',').any(|n| n == name))
    }
}

/// Runs what `options` say; returns whether a case failed.
pub fn main(options: &str) -> bool {
    println!("microvisor: {options}");
    if has(options, "list") {
        cases::all(&mut |case| println!("case {} §{}", case.name, case.section));
        return false;
    }
    cpu::apic::init();
    vmx::NO_INVEPT.store(has(options, "no-invept"), core::sync::atomic::Ordering::Relaxed);
    let caps = Caps::read();
    let rounds = word(options, "rounds=").and_then(|n| n.parse().ok()).unwrap_or(10_000);
    let choice = Choice { only: word(options, "only="), exactly: word(options, "exactly=") };
    if has(options, "vmexit") {
        return vmexit::main(choice, rounds);
    }
    if has(options, "bench") {
        WITHOUT_EPT.store(has(options, "mmu=shadow-on-ept"), core::sync::atomic::Ordering::Relaxed);
        return match caps {
            Some(caps) => bench::main(&context(caps), choice, rounds),
            None => {
                println!("CPUID does not show VMX");
                true
            }
        };
    }
    if has(options, "spin") {
        return match caps.map(|caps| spin(&context(caps))) {
            Some(Err(Stop::Fail(text))) => {
                println!("FAIL spin: {}", text.as_str());
                true
            }
            _ => {
                println!("L2 can't run");
                true
            }
        };
    }
    if let Some(what) = word(options, "abort=") {
        return match caps {
            Some(caps) => abort::main(&context(caps), what),
            None => {
                println!("CPUID does not show VMX");
                true
            }
        };
    }
    let verbose = has(options, "verbose");
    let only = word(options, "only=");
    let mut counts = Counts::default();
    cases::all(&mut |case| {
        if selected(only, case.name) {
            if verbose {
                println!("run {}", case.name);
            }
            coverage::start();
            let outcome = run(case, caps).and_then(|()| coverage::passed(case.name));
            report(case, outcome, &mut counts);
        }
    });
    if only.is_none() {
        coverage::summary();
    }
    println!("{} passed, {} failed, {} skipped", counts.passed, counts.failed, counts.skipped);
    counts.failed != 0
}

fn context(caps: Caps) -> Ctx {
    Ctx { caps, vmxon: &raw const VMXON_REGION as u64 }
}

fn run(case: &Case, caps: Option<Caps>) -> Outcome {
    memory::reset();
    let Some(caps) = caps else {
        if case.vmx {
            return skip("CPUID does not show VMX");
        }
        return (case.run)(&mut context(EMPTY_CAPS));
    };
    let mut ctx = context(caps);
    if case.vmx {
        enter_vmx(&ctx)?;
    }
    let saved = State::save();
    evmcs::want(!case.name.starts_with("instr."));
    let outcome = (case.run)(&mut ctx);
    evmcs::want(false);
    saved.restore();
    outcome
}

const EMPTY_CAPS: Caps = Caps {
    basic: 0,
    pin: vmx::Allowed { one: 0, may: 0 },
    primary: vmx::Allowed { one: 0, may: 0 },
    secondary: vmx::Allowed { one: 0, may: 0 },
    exit: vmx::Allowed { one: 0, may: 0 },
    entry: vmx::Allowed { one: 0, may: 0 },
    misc: 0,
    ept_vpid: 0,
    vmfunc: 0,
    cr0_fixed: [0; 2],
    cr4_fixed: [0; 2],
    physical_bits: 36,
};

/// State of the hypervisor that exits of a case may leave changed.
struct State {
    cr0: u64,
    cr3: u64,
    cr4: u64,
    pat: u64,
}

impl State {
    fn save() -> Self {
        Self { cr0: cpu::cr0(), cr3: cpu::cr3(), cr4: cpu::cr4(), pat: cpu::msr(cpu::MSR_PAT) }
    }
    fn restore(&self) {
        unsafe { core::arch::asm!("cli") };
        if let Ok(current) = vmx::vmptrst()
            && current != !0
        {
            let _ = vmx::vmclear(current);
        }
        if cpu::cr3() != self.cr3 {
            let _ = cpu::set_cr3(self.cr3);
        }
        let _ = cpu::set_cr0(self.cr0);
        let _ = cpu::set_cr4(self.cr4);
        let _ = cpu::wrmsr(cpu::MSR_PAT, self.pat);
        trap::load_idt(trap::idt_base(), 0xfff);
        // Interrupts that a case left pending.
        cpu::interrupts_for_a_moment();
    }
}

fn report(case: &Case, outcome: Outcome, counts: &mut Counts) {
    match outcome {
        Ok(()) => {
            counts.passed += 1;
            println!("ok {}", case.name);
        }
        Err(Stop::Skip(why)) => {
            counts.skipped += 1;
            println!("skip {} ({why})", case.name);
        }
        Err(Stop::Fail(text)) => {
            counts.failed += 1;
            println!("FAIL {}: {} [SDM {}]", case.name, text.as_str(), case.section);
        }
    }
}
