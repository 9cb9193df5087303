//! What happens between two instructions (SDM Vol. 3A §6.9, table 6-2; Vol. 3C §26.2, §26.5).
//!
//! Data breakpoints are found by the MMU, which caches no translation while one is enabled; I/O
//! breakpoints by decoding the next instruction before it runs.
//!
//! INIT signals and start-up IPIs come to L0, which kicks; it makes their exits itself.
//!
//! Not supported: SMIs, branch trapping (IA32_DEBUGCTL.BTF).

use std::sync::atomic::Ordering;
use std::time::Duration;

use engine::{Activity, VmExit, interruptibility, pending_debug};
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind};
use x86_spec::controls::PrimaryControls;
use x86_spec::exception;
use x86_spec::exit::ExitReason;
use x86_spec::reg::{cr4, dr, gpr, rflags};
use x86_spec::segment::seg;

use super::capabilities::{host_tsc, tsc_frequency};
use super::event::deliver;
use super::virtual_apic::deliver_virtual_interrupt;
use crate::cpu::{CodeSize, Cpu, Event, Exec, Reason};

/// What the processor remembers from one instruction boundary to the next.
#[derive(Clone, Debug, Default)]
pub struct Boundary {
    /// `icount` when the interrupt shadow began.
    shadow_at: u64,
    /// `icount` when an instruction was started with TF set.
    pub(super) step_at: Option<u64>,
    /// `icount` when an instruction was started with the monitor trap flag.
    mtf_at: Option<u64>,
    /// `icount` when an instruction was started that meets data or I/O breakpoints, and which.
    data_at: Option<(u64, u64)>,
    /// Debug exceptions that were pending when the instruction was started.
    pub(crate) pending_before: u64,
    /// `icount` when an instruction was started with RF set.
    resume_at: Option<u64>,
    /// An MTF VM exit is pending.
    pub(super) mtf_pending: bool,
    /// A trap-like exit of the previous instruction is pending.
    pub(super) trap_exit: Option<VmExit>,
    /// DR7 enables a data breakpoint: accesses go the MMU's slow way, which looks for hits.
    pub(crate) data_watch: bool,
    /// DR7 enables an instruction breakpoint.
    pub(super) instruction_breakpoints: bool,
    /// TSC at the last PAUSE at CPL 0 and at the first of its loop.
    pub(super) pause_loop: Option<(u64, u64)>,
}

const SHADOW: u32 = interruptibility::STI | interruptibility::MOV_SS;

impl Cpu {
    /// Blocks events until the next instruction has completed; called by the instruction
    /// that does it.
    pub(crate) fn begin_shadow(&mut self, kind: u32) {
        self.interruptibility = self.interruptibility & !SHADOW | kind;
        self.boundary.shadow_at = self.icount;
        // Whatever looks before the next instruction has completed sees the shadow, and whatever
        // looks later ends it. Only an open window is waited for to the instruction.
        let windows = PrimaryControls::INTERRUPT_WINDOW_EXITING | PrimaryControls::NMI_WINDOW_EXITING;
        if self.controls.primary.intersects(windows) || self.virtual_apic.recognized {
            self.request_event_check();
        }
    }

    /// Looks up what DR7 means for [`check`]; to be called when DR7 changes.
    pub(crate) fn boundary_dr7_changed(&mut self) {
        self.boundary.instruction_breakpoints =
            breakpoints(self.dr7).any(|b| b.condition == Condition::Execute);
        let watch =
            breakpoints(self.dr7).any(|b| matches!(b.condition, Condition::Write | Condition::ReadWrite));
        if watch && !std::mem::replace(&mut self.boundary.data_watch, watch) {
            // Nothing cached before may bypass the watch.
            self.mmu_clear();
        }
        self.boundary.data_watch = watch;
        self.request_event_check();
    }

    /// Records the data breakpoints that an access hits (SDM Vol. 3B §18.2.5).
    pub(crate) fn data_breakpoints(&mut self, linear: u64, len: u64, write: bool) {
        for b in breakpoints(self.dr7) {
            let wanted = match b.condition {
                Condition::Write => write,
                Condition::ReadWrite => true,
                Condition::Execute | Condition::Io => false,
            };
            let start = self.dr[b.number] & !(b.length as u64 - 1);
            let overlap = linear < start.wrapping_add(b.length as u64) && start < linear.wrapping_add(len);
            if wanted && overlap {
                // Taken back if the instruction does not complete.
                self.pending_debug |= 1 << b.number | pending_debug::ENABLED_BREAKPOINT;
                self.request_event_check();
            }
        }
    }

    /// Starts a new run: VM entry. A shadow or trap flag that the VMCS holds counts from here.
    pub(super) fn boundary_reset(&mut self) {
        self.boundary = Boundary { shadow_at: self.icount, ..Boundary::default() };
        self.boundary_dr7_changed();
        prepare_next(self);
    }
}

/// Condition field of a breakpoint (DR7 R/W bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Instruction execution.
    Execute,
    /// Data writes.
    Write,
    /// I/O accesses (CR4.DE).
    Io,
    /// Data reads and writes.
    ReadWrite,
}

/// An enabled breakpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Breakpoint {
    /// DR0–DR3.
    pub number: usize,
    /// When it hits.
    pub condition: Condition,
    /// Its length in bytes.
    pub length: u8,
}

/// The breakpoints that DR7 enables (SDM Vol. 3B §18.2.4).
pub fn breakpoints(dr7: u64) -> impl Iterator<Item = Breakpoint> {
    (0..4usize).filter(move |n| dr7 >> (n * 2) & 3 != 0).map(move |number| {
        let field = dr7 >> (16 + number * 4) & 15;
        let condition = match field & 3 {
            0 => Condition::Execute,
            1 => Condition::Write,
            2 => Condition::Io,
            _ => Condition::ReadWrite,
        };
        let length = [1, 2, 8, 4][(field >> 2) as usize];
        Breakpoint { number, condition, length }
    })
}

/// Looks at everything that can happen at this instruction boundary, in order of
/// priority, and prepares the next instruction. To be called before the first
/// instruction of a run, whenever [`crate::cpu::Shared::limit`] was reached, and after an
/// instruction that ran alone.
///
/// # Errors
/// A VM exit.
pub fn check(cpu: &mut Cpu) -> Exec {
    finish_previous(cpu);
    while cpu.activity == Activity::WaitForSipi {
        // Everything else is blocked, the preemption timer too (SDM Vol. 3C §26.5.1, §27.7.2).
        kick(cpu)?;
        wait(cpu, None);
    }
    if let Some(exit) = cpu.boundary.trap_exit.take() {
        return Err(cpu.exit(exit));
    }
    if std::mem::take(&mut cpu.boundary.mtf_pending) {
        return Err(cpu.exit(VmExit::new(ExitReason::MonitorTrapFlag)));
    }
    debug_traps(cpu)?;
    loop {
        preemption_timer(cpu)?;
        windows(cpu)?;
        if deliver_virtual_interrupt(cpu)? {
            // The handler's first instruction has a boundary of its own.
            return check(cpu);
        }
        super::pmu::overflow(cpu)?;
        kick(cpu)?;
        if cpu.activity == Activity::Active {
            break;
        }
        wait(cpu, cpu.timer_deadline);
    }
    instruction_breakpoint(cpu)?;
    prepare_next(cpu);
    Ok(())
}

/// Waits, with an inactive guest, for what may end that: a kick, an invalidation, `deadline` (a TSC
/// value). Nothing else can: virtual interrupts come only from the guest itself.
fn wait(cpu: &mut Cpu, deadline: Option<u64>) {
    let left = deadline.map(|deadline| {
        let ticks = deadline.saturating_sub(host_tsc()) as u128;
        let nanos = (ticks * 1_000_000_000).div_ceil(tsc_frequency() as u128);
        Duration::from_nanos(nanos.min(u64::MAX as u128) as u64)
    });
    // Counters of cycles stand still.
    cpu.stop_counting();
    cpu.shared.wait(left);
    cpu.start_counting();
    if cpu.shared.invalidate.swap(false, Ordering::SeqCst) {
        cpu.take_invalidations();
    }
}

/// The trap-like exit that the instruction executed by [`engine::Vcpu::emulate`] left pending:
/// TPR below threshold or MTF. To be called after the state was saved.
pub fn take_exit(cpu: &mut Cpu) -> Option<VmExit> {
    let mtf = std::mem::take(&mut cpu.boundary.mtf_pending);
    cpu.boundary.trap_exit.take().or(mtf.then(|| VmExit::new(ExitReason::MonitorTrapFlag)))
}

/// Ends the shadow, TF, MTF and RF of the instruction that completed.
pub(super) fn finish_previous(cpu: &mut Cpu) {
    cpu.finish_apic_write();
    let now = cpu.icount;
    let completed = |at: &mut Option<u64>| at.take().is_some_and(|at| at != now);
    if cpu.interruptibility & SHADOW != 0 && cpu.boundary.shadow_at != now {
        cpu.interruptibility &= !SHADOW;
    }
    if completed(&mut cpu.boundary.step_at) {
        cpu.pending_debug |= pending_debug::BS;
    }
    if let Some((at, hits)) = cpu.boundary.data_at.take()
        && at != now
    {
        cpu.pending_debug |= hits | pending_debug::ENABLED_BREAKPOINT;
    }
    if completed(&mut cpu.boundary.mtf_at) {
        cpu.boundary.mtf_pending = true;
    }
    if completed(&mut cpu.boundary.resume_at) {
        cpu.rflags_other &= !rflags::RF;
    }
}

/// Single-step traps and data breakpoints. Blocking by MOV SS holds them back (SDM
/// Vol. 3A §6.8.3).
fn debug_traps(cpu: &mut Cpu) -> Exec {
    let pending = cpu.pending_debug;
    if pending == 0 || cpu.interruptibility & interruptibility::MOV_SS != 0 {
        return Ok(());
    }
    cpu.pending_debug = 0;
    if pending & (pending_debug::BS | pending_debug::ENABLED_BREAKPOINT) == 0 {
        return Ok(());
    }
    let payload = pending & (pending_debug::B | dr::DR6_BS);
    deliver(cpu, Event { payload, ..Event::fault(exception::DB) }, 0)
}

fn preemption_timer(cpu: &mut Cpu) -> Exec {
    match cpu.timer_deadline {
        Some(deadline) if host_tsc() >= deadline => Err(cpu.exit(VmExit::new(ExitReason::PreemptionTimer))),
        _ => Ok(()),
    }
}

/// NMI-window and interrupt-window exits (SDM Vol. 3C §26.2).
fn windows(cpu: &mut Cpu) -> Exec {
    use PrimaryControls as P;
    if !cpu.controls.primary.intersects(P::NMI_WINDOW_EXITING | P::INTERRUPT_WINDOW_EXITING) {
        return Ok(());
    }
    let blocking = cpu.interruptibility;
    let inactive = cpu.activity == Activity::Shutdown;
    let nmi_blocked = blocking & (interruptibility::NMI | SHADOW) != 0;
    if cpu.primary(P::NMI_WINDOW_EXITING) && !nmi_blocked {
        return Err(cpu.exit(VmExit::new(ExitReason::NmiWindow)));
    }
    let open = cpu.rflags_other & rflags::IF != 0 && blocking & SHADOW == 0 && !inactive;
    if cpu.primary(P::INTERRUPT_WINDOW_EXITING) && open {
        return Err(cpu.exit(VmExit::new(ExitReason::InterruptWindow)));
    }
    Ok(())
}

/// A kick is the external interrupt of this processor, and always exits.
fn kick(cpu: &mut Cpu) -> Exec {
    if cpu.shared.kicked.load(Ordering::Relaxed) && cpu.shared.kicked.swap(false, Ordering::Acquire) {
        return Err(cpu.exit(VmExit::new(ExitReason::ExternalInterrupt)));
    }
    Ok(())
}

/// Instruction breakpoints: faults before the instruction, suppressed by RF (SDM Vol. 3B
/// §18.3.1.1).
fn instruction_breakpoint(cpu: &mut Cpu) -> Exec {
    if !cpu.boundary.instruction_breakpoints || cpu.rflags_other & rflags::RF != 0 {
        return Ok(());
    }
    let linear = if cpu.is_64() {
        cpu.rip()
    } else {
        cpu.segments[seg::CS].base.wrapping_add(cpu.rip()) & 0xffff_ffff
    };
    let hits = breakpoints(cpu.dr7)
        .filter(|b| b.condition == Condition::Execute && cpu.dr[b.number] == linear)
        .fold(0u64, |all, b| all | 1 << b.number);
    if hits == 0 {
        return Ok(());
    }
    deliver(cpu, Event { payload: hits, ..Event::fault(exception::DB) }, 0)
}

/// Decides whether the next instruction runs alone, and what its completion brings.
fn prepare_next(cpu: &mut Cpu) {
    cpu.boundary.pending_before = cpu.pending_debug;
    let now = cpu.icount;
    let trap = cpu.rflags_other & rflags::TF != 0;
    let mtf = cpu.primary(PrimaryControls::MONITOR_TRAP_FLAG);
    let resume = cpu.rflags_other & rflags::RF != 0;
    let shadow = cpu.interruptibility & SHADOW != 0;
    let data_breakpoints = breakpoints(cpu.dr7).any(|b| b.condition != Condition::Execute);
    let hits = io_breakpoint_hits(cpu);
    let b = &mut cpu.boundary;
    b.data_at = (hits != 0).then_some((now, hits));
    b.step_at = trap.then_some(now);
    b.mtf_at = mtf.then_some(now);
    b.resume_at = resume.then_some(now);
    cpu.single = trap || mtf || resume || shadow || b.instruction_breakpoints || data_breakpoints;
}

/// Which I/O breakpoints the next instruction will meet, as bits 3:0. (The MMU finds the hits of
/// data breakpoints.)
fn io_breakpoint_hits(cpu: &mut Cpu) -> u64 {
    if cpu.cr4 & cr4::DE == 0 || !breakpoints(cpu.dr7).any(|b| b.condition == Condition::Io) {
        return 0;
    }
    let Some((port, size)) = next_instruction(cpu).and_then(|i| accessed_port(cpu, &i)) else { return 0 };
    breakpoints(cpu.dr7)
        .filter(|b| b.condition == Condition::Io && overlaps(cpu.dr[b.number], b.length, port, size))
        .fold(0, |all, b| all | 1 << b.number)
}

/// Whether a breakpoint, aligned to its length (SDM Vol. 3B §18.2.5), meets an access.
fn overlaps(address: u64, length: u8, start: u64, len: u64) -> bool {
    let first = address & !(length as u64 - 1);
    start < first.saturating_add(length as u64) && first < start.saturating_add(len)
}

/// The instruction at RIP, if it can be fetched. A fault is left to the real fetch.
pub(super) fn next_instruction(cpu: &mut Cpu) -> Option<Instruction> {
    let mut bytes = [0u8; 15];
    let mut have = 0;
    while have < bytes.len() {
        let rip = cpu.rip().wrapping_add(have as u64) & cpu.ip_mask();
        let linear =
            if cpu.is_64() { rip } else { cpu.segments[seg::CS].base.wrapping_add(rip) & 0xffff_ffff };
        let Ok(at) = cpu.fetch_address(linear) else {
            cpu.reason = Reason::None;
            break;
        };
        let n = (bytes.len() - have).min(0x1000 - (linear & 0xfff) as usize);
        cpu.memory.read(at, bytes.get_mut(have..have + n)?).ok()?;
        have += n;
    }
    let bits = match cpu.code_size {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    let mut decoder = Decoder::with_ip(bits, bytes.get(..have)?, cpu.rip(), DecoderOptions::NONE);
    let i = decoder.decode();
    (!i.is_invalid()).then_some(i)
}

/// Port and size of an I/O instruction.
fn accessed_port(cpu: &Cpu, i: &Instruction) -> Option<(u64, u64)> {
    let (operand, size) = match i.mnemonic() {
        Mnemonic::In => (1, i.op0_register().size()),
        Mnemonic::Out => (0, i.op1_register().size()),
        Mnemonic::Insb | Mnemonic::Outsb => return Some((cpu.gpr(gpr::RDX) & 0xffff, 1)),
        Mnemonic::Insw | Mnemonic::Outsw => return Some((cpu.gpr(gpr::RDX) & 0xffff, 2)),
        Mnemonic::Insd | Mnemonic::Outsd => return Some((cpu.gpr(gpr::RDX) & 0xffff, 4)),
        _ => return None,
    };
    let port = if i.op_kind(operand) == OpKind::Register {
        cpu.gpr(gpr::RDX) & 0xffff
    } else {
        i.immediate8() as u64
    };
    Some((port, size as u64))
}
