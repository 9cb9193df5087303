//! System instructions, event delivery, VM entry and exit: everything of a processor in
//! VMX non-root operation that is not computation or memory access.
//!
//! "SDM" is the Intel 64 and IA-32 Architectures Software Developer's Manual.
//!
//! Not supported, and so never to be shown in CPUID: 5-level paging, protection keys,
//! control-flow enforcement, SMX, SGX, TSX, UINTR, FRED, user-level MONITOR, SERIALIZE.
//! Hardware task switches always exit, as the SDM demands (Vol. 3C §26.4.2), so none is
//! performed here.

pub mod capabilities;
mod control;
pub mod event;
mod far;
mod flags;
mod info;
mod interrupts;
mod io;
mod misc;
mod msr;
pub mod pending;
pub mod pmu;
mod segment;
pub mod shadow_vmcs;
mod stack;
mod syscall;
mod tables;
pub mod virtual_apic;
pub mod vmentry;
mod vmx;

#[cfg(test)]
mod apic_tests;
#[cfg(test)]
mod paging_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod testutil;

use engine::VmExit;
use iced_x86::{Instruction, Mnemonic};
use x86_spec::controls::{PrimaryControls, SecondaryControls};
use x86_spec::exit::ExitReason;

use crate::cpu::{Cpu, Exec, Stop};
use crate::op::{SimpleFn, SimpleKind};

pub use crate::mmu::canonical;
pub use event::deliver;
pub(crate) use vmx::{require_xsaves, xss_exit};

/// Physical-address width that reserved-bit checks assume (SDM Vol. 3A §4.1.4).
pub const MAX_PHYSICAL_BITS: u32 = crate::mmu::MAXPHYADDR;

impl Cpu {
    /// Whether a primary processor-based control is 1.
    pub(crate) fn primary(&self, c: PrimaryControls) -> bool {
        self.controls.primary.contains(c)
    }

    /// Whether a secondary processor-based control is 1 and in force.
    pub(crate) fn secondary(&self, c: SecondaryControls) -> bool {
        self.primary(PrimaryControls::SECONDARY_CONTROLS) && self.controls.secondary.contains(c)
    }

    /// A VM exit caused by the execution of `i`.
    pub(crate) fn instruction_exit(&mut self, i: &Instruction, reason: ExitReason) -> Stop {
        self.exit(instruction_exit_for(i, reason))
    }

    /// #GP(0) unless CPL is 0. Virtual-8086 mode has CPL 3, real mode CPL 0.
    pub(crate) fn require_cpl0(&mut self) -> Exec {
        if self.cpl == 0 { Ok(()) } else { Err(self.gp(0)) }
    }
}

/// The exit information that every instruction exit has.
pub(crate) fn instruction_exit_for(i: &Instruction, reason: ExitReason) -> VmExit {
    VmExit { instruction_length: i.len() as u32, ..VmExit::new(reason) }
}

/// The handler of a system instruction, or `None` if `i` isn't one.
pub fn lookup(i: &Instruction) -> Option<(SimpleFn, SimpleKind)> {
    use SimpleKind::{End, Next};
    let found: (SimpleFn, SimpleKind) = match i.mnemonic() {
        Mnemonic::Mov => return control::lookup_mov(i).or_else(|| segment::lookup_mov(i)),
        Mnemonic::Push | Mnemonic::Pop => return segment::lookup_push_pop(i),
        Mnemonic::Clts => (control::clts, End),
        Mnemonic::Lmsw => (control::lmsw, End),
        Mnemonic::Smsw => (control::smsw, Next),
        Mnemonic::Xgetbv => (control::xgetbv, Next),
        Mnemonic::Xsetbv => (control::xsetbv, End),

        Mnemonic::Lgdt => (tables::lgdt, End),
        Mnemonic::Lidt => (tables::lidt, End),
        Mnemonic::Sgdt => (tables::sgdt, Next),
        Mnemonic::Sidt => (tables::sidt, Next),
        Mnemonic::Lldt => (tables::lldt, End),
        Mnemonic::Ltr => (tables::ltr, End),
        Mnemonic::Sldt => (tables::sldt, Next),
        Mnemonic::Str => (tables::str_, Next),

        Mnemonic::Les | Mnemonic::Lds | Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs => {
            (segment::load_far_pointer, End)
        }
        Mnemonic::Lar => (segment::lar, Next),
        Mnemonic::Lsl => (segment::lsl, Next),
        Mnemonic::Verr => (segment::verr, Next),
        Mnemonic::Verw => (segment::verw, Next),
        Mnemonic::Arpl => (segment::arpl, Next),

        Mnemonic::Jmp if i.is_jmp_far() || i.is_jmp_far_indirect() => (far::jmp_far, End),
        Mnemonic::Call if i.is_call_far() || i.is_call_far_indirect() => (far::call_far, End),
        Mnemonic::Retf => (far::ret_far, End),
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => (far::iret, End),

        Mnemonic::Int => (interrupts::int_n, End),
        Mnemonic::Int3 => (interrupts::int3, End),
        Mnemonic::Into => (interrupts::into, End),
        Mnemonic::Int1 => (interrupts::int1, End),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => (interrupts::undefined, End),
        Mnemonic::Bound => (interrupts::bound, Next),

        Mnemonic::Syscall => (syscall::syscall, End),
        Mnemonic::Sysret | Mnemonic::Sysretq => (syscall::sysret, End),
        Mnemonic::Sysenter => (syscall::sysenter, End),
        Mnemonic::Sysexit | Mnemonic::Sysexitq => (syscall::sysexit, End),
        Mnemonic::Swapgs => (syscall::swapgs, Next),
        Mnemonic::Rdfsbase => (syscall::rdfsbase, Next),
        Mnemonic::Rdgsbase => (syscall::rdgsbase, Next),
        Mnemonic::Wrfsbase => (syscall::wrfsbase, Next),
        Mnemonic::Wrgsbase => (syscall::wrgsbase, Next),

        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => (flags::pushf, Next),
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => (flags::popf, End),
        Mnemonic::Cli => (flags::cli, Next),
        Mnemonic::Sti => (flags::sti, End),
        // AC selects translations at each access, so the block may go on.
        Mnemonic::Clac => (flags::clac, Next),
        Mnemonic::Stac => (flags::stac, Next),
        Mnemonic::Hlt => (flags::hlt, End),

        Mnemonic::Rdmsr => (msr::rdmsr, Next),
        Mnemonic::Wrmsr => (msr::wrmsr, End),

        Mnemonic::Cpuid => (misc::cpuid, End),
        Mnemonic::Rdtsc => (misc::rdtsc, Next),
        Mnemonic::Rdtscp => (misc::rdtscp, Next),
        // Ends its block, so that what it reads does not have instructions behind it.
        Mnemonic::Rdpmc => (misc::rdpmc, End),
        Mnemonic::Rdpid => (misc::rdpid, Next),
        Mnemonic::Invd => (misc::invd, End),
        Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => (misc::wbinvd, End),
        Mnemonic::Invlpg => (misc::invlpg, End),
        Mnemonic::Invpcid => (misc::invpcid, End),
        Mnemonic::Monitor => (misc::monitor, Next),
        Mnemonic::Mwait => (misc::mwait, End),
        Mnemonic::Pause => (misc::pause, End),
        Mnemonic::Rdrand => (misc::rdrand, Next),
        Mnemonic::Rdseed => (misc::rdseed, Next),
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => (misc::cache_line, Next),
        Mnemonic::Lfence | Mnemonic::Sfence | Mnemonic::Mfence => (misc::fence, Next),
        Mnemonic::Prefetch
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1 => (misc::prefetch, Next),

        Mnemonic::In => (io::input, Next),
        Mnemonic::Out => (io::output, Next),
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => (io::ins, End),
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => (io::outs, End),

        Mnemonic::Rsm => (vmx::rsm, End),
        Mnemonic::Getsec => (vmx::getsec, End),
        Mnemonic::Vmcall => (vmx::vmcall, End),
        Mnemonic::Vmfunc => (vmx::vmfunc, End),
        Mnemonic::Vmclear => (vmx::vmclear, End),
        Mnemonic::Vmlaunch => (vmx::vmlaunch, End),
        Mnemonic::Vmresume => (vmx::vmresume, End),
        Mnemonic::Vmptrld => (vmx::vmptrld, End),
        Mnemonic::Vmptrst => (vmx::vmptrst, End),
        Mnemonic::Vmread => (vmx::vmread, End),
        Mnemonic::Vmwrite => (vmx::vmwrite, End),
        Mnemonic::Vmxoff => (vmx::vmxoff, End),
        Mnemonic::Vmxon => (vmx::vmxon, End),
        Mnemonic::Invept => (vmx::invept, End),
        Mnemonic::Invvpid => (vmx::invvpid, End),
        _ => return None,
    };
    Some(found)
}
