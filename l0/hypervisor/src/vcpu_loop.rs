//! The run loop of one vCPU: let devices tick, deliver what is pending, enter, dispatch the exit.
//!
//! One such loop runs in one thread; vCPUs share nothing but their [`Vm`].

use std::sync::Arc;
use std::time::Duration;

use devices::{MachineEvent, Waiting};
use engine::{
    Controls, Engine, EngineVmcs, EventWindows, GuestRegs, Monitor, Vcpu, VmExit, interruptibility,
};
use exit_trace::Level;
use machine::boot::BootState;
use x86_spec::controls::PrimaryControls;
use x86_spec::exception;
use x86_spec::exit::{ExitReason, ept_violation};
use x86_spec::interruption::{EventType, InterruptionInfo};
use x86_spec::pmu;
use x86_spec::reg::rflags;
use x86_spec::segment::seg;

use crate::board::{Board, CpuBus};
use crate::cpuid;
use crate::exits::{Outcome, route};
use crate::msr::MsrState;
use crate::nested::Nested;
use crate::report::{CodeBytes, CrashCause, CrashReport, bitness};
use crate::stats::Account;
use crate::vm::{Vm, VmError};
use crate::vmcs01;

const NS_PER_SEC: u64 = 1_000_000_000;
/// How much code a crash report shows, in bytes.
const CODE_BYTES: usize = 64;

/// How a run ends.
#[derive(Debug)]
pub enum RunEnd {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest reset the machine.
    Reset,
    /// The guest wrote this to isa-debug-exit.
    DebugExit(u32),
    /// The guest can't go on.
    Crash(Box<CrashReport>),
    /// [`crate::VmHandle::stop`] was called.
    Stopped,
    /// The engine can't go on with this guest on this host, and why.
    Engine(String),
    /// L0 or the engine did what it must not.
    Internal(String),
}

/// How a vCPU starts.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// In the state after RESET, at FFFFFFF0H.
    Reset,
    /// As a boot protocol says.
    Boot(&'a BootState),
}

/// An event on its way into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PendingEvent {
    pub info: InterruptionInfo,
    pub error_code: u32,
    pub instruction_length: u32,
}

impl PendingEvent {
    /// Has the next VM entry inject it (SDM Vol. 3C §25.8.3).
    pub fn inject(self, c: &mut Controls) {
        c.entry_interruption = self.info;
        c.entry_error_code = self.error_code;
        c.entry_instruction_length = self.instruction_length;
    }
}

/// How often a waiting MWAIT looks at its line. A store by a device shows at the latest then; what comes with
/// an interrupt shows at once.
const MWAIT_LOOK: Duration = Duration::from_millis(10);

/// MWAIT that waits.
#[derive(Clone, Copy, Debug)]
struct Mwait {
    monitor: Monitor,
    /// ECX bit 0: masked interrupts end it too.
    masked_interrupts: bool,
}

/// One vCPU and what L0 keeps for it.
pub struct VcpuLoop<E: Engine> {
    pub(crate) vcpu: E::Vcpu,
    pub(crate) vmcs: EngineVmcs,
    pub(crate) regs: GuestRegs,
    pub(crate) msrs: MsrState,
    /// VMX for L1, where it is offered.
    pub(crate) nested: Option<Box<Nested>>,
    vm: Arc<Vm<E>>,
    pub(crate) index: usize,
    pub(crate) event: Option<PendingEvent>,
    pub(crate) halted: bool,
    /// MWAIT is waiting.
    mwait: Option<Mwait>,
    /// The devices' next deadline, as long as nothing touched them.
    deadline: Option<Option<u64>>,
    timer_shift: u32,
    tsc_hz: u64,
    pub(crate) account: Account,
}

impl<E: Engine> VcpuLoop<E> {
    /// vCPU `index` of `vm`, ready to start.
    ///
    /// # Errors
    /// [`VmError::Control`] when the engine lacks a control that L0 needs, [`VmError::Engine`]
    /// when it can't make a vCPU.
    pub fn new(vm: Arc<Vm<E>>, index: usize, start: Start<'_>) -> Result<Self, VmError> {
        let engine = vm.engine();
        let caps = engine.capabilities();
        let model = vm.cpuid();
        let cr4 = vmcs01::offered_cr4(model.leaf1(), model.leaf7());
        let controls = vmcs01::controls(caps, vm.ept01().eptp(), vm.msr_bitmap(), cr4)?;
        let timer_shift = caps.preemption_timer_shift.into();
        let mut vcpu = engine.create_vcpu()?;
        vcpu.set_cpuid(&model.entries(index as u32))?;
        vm.handle().set_kicker(index, vcpu.kicker());
        let mut vmcs = EngineVmcs { controls, ..EngineVmcs::default() };
        let mut regs = vmcs01::reset_registers(cpuid::SIGNATURE);
        if let Start::Boot(boot) = start {
            vmcs01::load_boot_state(&mut vmcs, &mut regs, boot);
        }
        let tsc = vm.tsc(index).cloned().ok_or_else(|| engine::EngineError::Unsupported {
            engine: "chosen",
            reason: format!("the machine has no vCPU {index}"),
        })?;
        vmcs.controls.tsc_offset = tsc.offset();
        let tsc_hz = engine.tsc_frequency().max(1);
        let nested = if model.has_vmx() && !engine.serves_vmx() {
            Some(Box::new(Nested::new(&vm, index, cr4, vm.vmcs_access())?))
        } else {
            None
        };
        let account = Account::new(engine.tsc(), tsc_hz);
        Ok(Self {
            vcpu,
            vmcs,
            regs,
            msrs: MsrState::new(tsc)
                .with_performance_counters(model.has_performance_counters())
                .with_monitor(model.has_monitor()),
            nested,
            vm,
            index,
            event: None,
            halted: false,
            mwait: None,
            deadline: None,
            timer_shift,
            tsc_hz,
            account,
        })
    }

    /// The machine.
    pub fn vm(&self) -> &Arc<Vm<E>> {
        &self.vm
    }

    pub(crate) fn board(&self) -> &dyn Board {
        self.vm.board()
    }

    pub(crate) fn index(&self) -> usize {
        self.index
    }

    /// The devices' deadlines may have changed.
    pub(crate) fn devices_touched(&mut self) {
        self.deadline = None;
    }

    /// Runs until the machine stops.
    pub fn run(&mut self) -> RunEnd {
        let end = self.enter_until_end();
        self.account_handled();
        end
    }

    fn enter_until_end(&mut self) -> RunEnd {
        loop {
            if let Some(end) = self.turn() {
                return end;
            }
        }
    }

    /// One turn of the loop: at most one entry. `Some` when the machine stops.
    pub(crate) fn turn(&mut self) -> Option<RunEnd> {
        if self.vm.handle().wants_view(self.index) {
            let handle = self.vm.handle().clone();
            handle.answer_views(self.index, || self.vmcs_view());
        }
        if let Some(end) = self.service_devices() {
            return Some(end);
        }
        if self.regs.pmu.interrupt {
            self.performance_interrupt();
        }
        // What comes later from another thread is announced by a request, which is looked at before the entry.
        let mut waiting = self.board().interrupts().waiting(self.index);
        if waiting.init_or_sipi
            && let Some(end) = self.take_init()
        {
            return Some(end);
        }
        if self.halted {
            if self.has_wake_event() {
                self.halted = false;
            } else {
                self.account_handled();
                self.idle(None);
                return None;
            }
        }
        if let Some(mwait) = self.mwait {
            if self.ends_mwait(&mwait) {
                self.mwait = None;
            } else {
                self.account_handled();
                self.idle(Some(MWAIT_LOOK));
                return None;
            }
        }
        if self.in_l2() {
            if let Some(exit) = self.prepare_l2() {
                if !self.account.looks_for_events() {
                    self.account_handled();
                }
                if let Outcome::End(end) = self.reflect_exit(&exit) {
                    return Some(end);
                }
                return None;
            }
        } else {
            let has_event = self.event.is_some() || waiting.has_event();
            if has_event && let Some(exit) = self.settle(&mut waiting) {
                self.account_handled();
                self.account_exit(&exit);
                match self.dispatch(&exit) {
                    Outcome::Resume => {}
                    Outcome::Halt => self.halted = true,
                    Outcome::End(end) => return Some(end),
                }
                return None;
            }
            self.prepare_entry(has_event);
        }
        if !self.vm.handle().entering(self.index) {
            return None;
        }
        self.account_handled();
        let exit = self.enter(waiting.cr8);
        self.vm.handle().left(self.index);
        self.account_exit(&exit);
        let outcome = if self.in_l2() {
            self.dispatch_l2(&exit)
        } else {
            self.keep_interrupted_event(&exit);
            self.dispatch(&exit)
        };
        match outcome {
            Outcome::Resume => {}
            Outcome::Halt => self.halted = true,
            Outcome::End(end) => return Some(end),
        }
        None
    }

    /// VM entry to VM exit. Where the engine lacks exits for CR8, the task priority goes from the local
    /// APIC, where it is `before`, to the processor and back.
    fn enter(&mut self, before: u8) -> VmExit {
        let exits = self.vmcs.controls.primary.contains(PrimaryControls::CR8_LOAD_EXITING)
            && !self.vm.engine().is_lenient();
        if exits || self.in_l2() {
            return self.vcpu.enter(&mut self.vmcs, &mut self.regs);
        }
        self.regs.cr8 = before.into();
        let exit = self.vcpu.enter(&mut self.vmcs, &mut self.regs);
        let after = (self.regs.cr8 & 15) as u8;
        if after != before {
            self.board().interrupts().with_lapic(self.index, |l| l.set_cr8(after));
            self.devices_touched();
        }
        exit
    }

    /// Hands an exit to its owner.
    pub(crate) fn dispatch(&mut self, exit: &VmExit) -> Outcome {
        tracing::trace!(
            reason = exit.reason.name(),
            rip = format_args!("{:#x}", self.vmcs.guest.rip),
            qualification = format_args!("{:#x}", exit.qualification),
            gpa = %exit.guest_physical,
            "exit"
        );
        (route::<E>(exit.reason).handler)(self, exit)
    }

    // ---- accounting ---------------------------------------------------------------------

    /// Which level runs, or ran until its exit.
    pub(crate) fn level(&self) -> Level {
        if self.in_l2() { Level::L2 } else { Level::L1 }
    }

    /// The exit before, if any, is dealt with: L0 is about to enter, to wait or to end.
    fn account_handled(&mut self) {
        let now = self.vm.engine().tsc();
        if let Some(exit) = self.account.handled(now) {
            let instructions = self.vcpu.instructions();
            let (handed, accesses) = (self.vcpu.hand_overs(), self.vcpu.vmcs_accesses());
            self.vm.handle().with_recorder(self.index, |r| {
                r.count_accesses(
                    accesses.map(|a| exit_trace::VmcsAccesses { vmreads: a.vmreads, vmwrites: a.vmwrites }),
                );
                r.exit(exit, instructions);
                r.hand_overs = handed
                    .map(|h| exit_trace::HandOvers { instructions: h.instructions, entries: h.entries });
            });
        }
    }

    fn account_exit(&mut self, exit: &VmExit) {
        let now = self.vm.engine().tsc();
        self.account.exited(self.level(), exit, self.vmcs.guest.rip, now);
    }

    /// L1 gets an exit of L2, or a VM entry of L1 fails after its first checks.
    pub(crate) fn account_forwarded(&mut self, exit: &VmExit) {
        if self.account.is_of_its_own() {
            self.account_handled();
            let now = self.vm.engine().tsc();
            self.account.synthesized(exit, self.vmcs.guest.rip, now);
        } else {
            self.account.forwarded(exit);
        }
    }

    // ---- between exits ------------------------------------------------------------------

    /// Lets due timers expire and looks for what ends the run.
    fn service_devices(&mut self) -> Option<RunEnd> {
        let (board, handle) = (self.vm.board(), self.vm.handle());
        if handle.take_request(self.index) {
            // Whoever asks may have changed a device.
            self.deadline = None;
        }
        let deadline = *self.deadline.get_or_insert_with(|| board.next_deadline());
        if deadline.is_some_and(|d| d <= board.now_ns()) {
            board.tick();
            self.deadline = None;
            // What the tick raised is looked at below; no need to be told of it again.
            handle.take_request(self.index);
        }
        if handle.is_stopping() {
            return Some(RunEnd::Stopped);
        }
        board.take_event().map(|event| match event {
            MachineEvent::PowerOff => RunEnd::PowerOff,
            MachineEvent::Reset => RunEnd::Reset,
            MachineEvent::DebugExit(status) => RunEnd::DebugExit(status),
        })
    }

    /// INIT sends the bootstrap processor to the reset vector (SDM Vol. 3A §9.1), where there is no
    /// firmware: the machine is reset. In VMX operation it waits: root operation blocks it (Vol. 3C
    /// §24.8), L2 exits with it.
    fn take_init(&mut self) -> Option<RunEnd> {
        if self.in_vmx_operation() {
            return None;
        }
        let init = self.board().interrupts().with_lapic(self.index, |l| {
            let init = l.init_or_sipi_pending() && l.take_init();
            // Not waiting for a SIPI: it is dropped (§9.4.4).
            l.take_sipi();
            init
        });
        (init == Some(true)).then_some(RunEnd::Reset)
    }

    /// Counters of the running context overflowed: their interrupt goes to the local APIC, and what
    /// IA32_DEBUGCTL says is to freeze freezes (SDM Vol. 3B §18.4.7).
    fn performance_interrupt(&mut self) {
        self.regs.pmu.interrupt = false;
        let g = &mut self.vmcs.guest;
        if g.debugctl & pmu::DEBUGCTL_FREEZE_PERFMON != 0 {
            g.perf_global_ctrl = 0;
        }
        if g.debugctl & pmu::DEBUGCTL_FREEZE_LBRS != 0 {
            /// IA32_DEBUGCTL.LBR.
            const LBR: u64 = 1;
            g.debugctl &= !LBR;
        }
        self.board().interrupts().with_lapic(self.index, |l| l.performance_interrupt());
    }

    fn next_deadline(&mut self) -> Option<u64> {
        match self.deadline {
            Some(d) => d,
            None => {
                let d = self.board().next_deadline();
                self.deadline = Some(d);
                d
            }
        }
    }

    /// Waits after HLT or MWAIT for an interrupt or a deadline, at most for `most`.
    fn idle(&mut self, most: Option<Duration>) {
        let deadline =
            self.next_deadline().map(|d| Duration::from_nanos(d.saturating_sub(self.board().now_ns())));
        let limit = [deadline, most, self.timer12_left()].into_iter().flatten().min();
        if limit.is_none_or(|l| !l.is_zero()) {
            self.vm.handle().wait(self.index, limit);
        }
        // Whoever notified may have changed a device.
        self.deadline = None;
        let from = self.account.since_ns();
        let ns = self.account.lap(self.vm.engine().tsc());
        self.vm.handle().with_recorder(self.index, |r| r.idle(from, ns));
    }

    /// Starts MWAIT's wait, if a line is armed; that ends its being armed.
    pub(crate) fn start_mwait(&mut self, masked_interrupts: bool) {
        self.mwait = self.regs.monitor.take().map(|monitor| Mwait { monitor, masked_interrupts });
    }

    /// Ends MWAIT's wait.
    pub(crate) fn stop_mwait(&mut self) {
        self.mwait = None;
    }

    /// Whether something ends MWAIT (SDM Vol. 2B): a store to the line, what ends HLT, INIT, a masked interrupt if
    /// MWAIT was told so; in L2 also what exits to L1 whatever L2 masks.
    fn ends_mwait(&self, mwait: &Mwait) -> bool {
        let interrupts = self.board().interrupts();
        mwait.monitor.is_triggered(self.vm.memory())
            || self.has_wake_event()
            || mwait.masked_interrupts && interrupts.has_interrupt(self.index)
            || interrupts.with_lapic(self.index, |l| l.init_or_sipi_pending()) == Some(true)
            || self.in_l2() && self.exits_while_waiting()
    }

    /// Whether something ends HLT (SDM Vol. 2A, HLT): an NMI, or an interrupt that is enabled.
    fn has_wake_event(&self) -> bool {
        let g = &self.vmcs.guest;
        let interrupts = self.board().interrupts();
        let nmi = g.interruptibility & interruptibility::NMI == 0
            && interrupts.with_lapic(self.index, |l| l.nmi_pending()) == Some(true);
        nmi || self.event.is_some() || g.rflags & rflags::IF != 0 && interrupts.has_interrupt(self.index)
    }

    // ---- events -------------------------------------------------------------------------

    /// An exit during the delivery of an event must not lose it (SDM Vol. 3C §28.2.4): it is
    /// delivered again at the next entry.
    pub(crate) fn keep_interrupted_event(&mut self, exit: &VmExit) {
        let info = exit.idt_vectoring;
        if !info.is_valid() {
            let unblocked = exit.reason == ExitReason::EptViolation
                && exit.qualification & ept_violation::NMI_UNBLOCKING != 0;
            if unblocked {
                // §28.2.3: IRET had unblocked NMIs and is about to be executed again.
                self.vmcs.guest.interruptibility |= interruptibility::NMI;
            }
            return;
        }
        if info.event_type() == EventType::Nmi {
            // NMIs were blocked by its delivery, which starts anew (§27.7.1.2).
            self.vmcs.guest.interruptibility &= !interruptibility::NMI;
        }
        self.event = Some(PendingEvent {
            info: InterruptionInfo(info.0 & !InterruptionInfo::NMI_UNBLOCKING),
            error_code: exit.idt_vectoring_error_code,
            instruction_length: exit.instruction_length,
        });
    }

    /// Has the guest take an exception at the instruction that exited.
    pub(crate) fn inject_exception(&mut self, vector: u8, error_code: Option<u32>) {
        // Real mode pushes no error codes (SDM Vol. 3C §27.2.1.3: the deliver-error-code bit
        // is 1 only with CR0.PE).
        let error_code = error_code.filter(|_| self.vmcs.guest.cr0 & x86_spec::reg::cr0::PE != 0);
        debug_assert!(error_code.is_none() || exception::has_error_code(vector));
        self.event = Some(PendingEvent {
            info: InterruptionInfo::new(vector, EventType::HardwareException, error_code.is_some()),
            error_code: error_code.unwrap_or(0),
            instruction_length: 0,
        });
    }

    /// An event goes in after the instruction that L0 had the engine execute, so the engine must be done with
    /// it, which may change what waits. An exit that the rest of the instruction caused.
    fn settle(&mut self, waiting: &mut Waiting) -> Option<VmExit> {
        let vm = self.vm.clone();
        let mut bus = CpuBus { board: vm.board(), cpu: self.index, ram: vm.ram() };
        let exit = self.vcpu.settle(&mut self.vmcs, &mut self.regs, &mut bus);
        *waiting = vm.board().interrupts().waiting(self.index);
        exit
    }

    /// MONITOR exits, to be #UD, where it is not enabled; MWAIT exits always.
    fn restrict_monitor(&mut self) {
        if self.vm.cpuid().has_monitor() {
            let enabled = self.msrs.has_monitor();
            self.vmcs.controls.primary.set(PrimaryControls::MONITOR_EXITING, !enabled);
        }
    }

    /// Fills in what changes from entry to entry: the event to inject, window controls, the
    /// preemption timer, "IA-32e mode guest". `has_event`: there may be something to inject.
    fn prepare_entry(&mut self, has_event: bool) {
        vmcs01::sync_long_mode(&mut self.vmcs);
        self.restrict_monitor();
        if has_event {
            if !self.vmcs.controls.entry_interruption.is_valid() {
                self.choose_event();
            }
            self.request_windows();
        } else {
            let windows = PrimaryControls::INTERRUPT_WINDOW_EXITING | PrimaryControls::NMI_WINDOW_EXITING;
            self.vmcs.controls.primary -= windows;
        }
        self.vmcs.guest.preemption_timer = self.timer_ticks();
    }

    /// At most one event goes in at an entry: one that was interrupted or raised by L0, else an
    /// NMI, else an interrupt (priorities: SDM Vol. 3A table 6-2).
    fn choose_event(&mut self) {
        if let Some(e) = self.event.take() {
            e.inject(&mut self.vmcs.controls);
            return;
        }
        let open = self.vcpu.event_windows().unwrap_or_else(|| self.windows());
        let vm = self.vm.clone();
        let interrupts = vm.board().interrupts();
        if open.nmi && interrupts.with_lapic(self.index, |l| l.take_nmi()) == Some(true) {
            self.vmcs.controls.entry_interruption =
                InterruptionInfo::new(exception::NMI, EventType::Nmi, false);
        } else if open.interrupt
            && interrupts.has_interrupt(self.index)
            && let Some(vector) = interrupts.take_interrupt(self.index)
        {
            self.vmcs.controls.entry_interruption = InterruptionInfo::new(vector, EventType::External, false);
        }
    }

    /// Which events the state in the VMCS lets in (SDM Vol. 3C §25.4.2).
    fn windows(&self) -> EventWindows {
        let g = &self.vmcs.guest;
        let blocked = |bits: u32| g.interruptibility & bits != 0;
        let shadow = interruptibility::STI | interruptibility::MOV_SS;
        EventWindows {
            interrupt: !blocked(shadow) && g.rflags & rflags::IF != 0,
            nmi: !blocked(shadow | interruptibility::NMI),
        }
    }

    /// Asks for an exit as soon as L1 can take what still waits.
    fn request_windows(&mut self) {
        let interrupts = self.board().interrupts();
        let interrupt = interrupts.has_interrupt(self.index);
        let nmi = interrupts.with_lapic(self.index, |l| l.nmi_pending()) == Some(true);
        let primary = &mut self.vmcs.controls.primary;
        primary.set(PrimaryControls::INTERRUPT_WINDOW_EXITING, interrupt);
        primary.set(PrimaryControls::NMI_WINDOW_EXITING, nmi);
    }

    /// Time to the next deadline in ticks of the preemption timer (SDM Vol. 3C §26.5.1), rounded
    /// up so that the deadline has come when it expires.
    pub(crate) fn timer_ticks(&mut self) -> u32 {
        let Some(deadline) = self.next_deadline() else { return u32::MAX };
        let ns = deadline.saturating_sub(self.board().now_ns());
        let tsc = devices::clock::mul_div_up(ns, self.tsc_hz, NS_PER_SEC);
        let ticks = (tsc >> self.timer_shift).saturating_add(u64::from(self.timer_shift > 0));
        u32::try_from(ticks).unwrap_or(u32::MAX)
    }

    // ---- reports ------------------------------------------------------------------------

    pub(crate) fn crash(&mut self, cause: CrashCause) -> Outcome {
        Outcome::End(RunEnd::Crash(Box::new(self.report(cause))))
    }

    /// Everything about the vCPU now, for a report.
    pub fn report(&mut self, cause: CrashCause) -> CrashReport {
        let unfinished = self.account.unfinished();
        CrashReport {
            cause,
            level: self.level(),
            guest: self.vmcs.guest.clone(),
            regs: self.regs.clone(),
            exits: self
                .vm
                .handle()
                .with_recorder(self.index, |r| r.last_exits(unfinished))
                .unwrap_or_default(),
            code: self.code_at_rip(),
        }
    }

    fn code_at_rip(&mut self) -> CodeBytes {
        let g = &self.vmcs.guest;
        let bits = bitness(g);
        let linear =
            if bits == 64 { g.rip } else { g.segments[seg::CS].base.wrapping_add(g.rip) & 0xffff_ffff };
        let mut bytes = Vec::with_capacity(CODE_BYTES);
        for at in 0..CODE_BYTES as u64 {
            let gpa = self.vcpu.translate(&self.vmcs, &self.regs, linear.wrapping_add(at));
            let mut b = [0];
            match gpa.map(|g| self.vm.ram().read(g.into(), &mut b)) {
                Some(Ok(())) => bytes.push(b[0]),
                _ => break,
            }
        }
        CodeBytes { linear, bytes, bitness: bits }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::CrashCause;
    use crate::testing::{Rig, TIMER_SHIFT};
    use std::sync::atomic::Ordering;
    use x86_spec::exit::ExitReason;
    use x86_spec::exit::{cr_access, io};
    use x86_spec::msr;
    use x86_spec::reg::{cr0, gpr};

    const CPUID: VmExit = VmExit { instruction_length: 2, ..VmExit::new(ExitReason::Cpuid) };

    fn wrmsr(regs: &mut GuestRegs, msr: u32, value: u64) -> VmExit {
        regs.gpr[gpr::RCX] = msr.into();
        regs.gpr[gpr::RAX] = value & 0xffff_ffff;
        regs.gpr[gpr::RDX] = value >> 32;
        VmExit { instruction_length: 2, ..VmExit::new(ExitReason::Wrmsr) }
    }

    /// LVT timer: TSC-deadline mode (SDM Vol. 3A §11.5.4.1), vector 40H.
    const LVT_DEADLINE: u64 = 2 << 17 | 0x40;

    /// Has the guest switch to x2APIC mode and arm the timer for `ticks` from power-on.
    fn arm_timer(rig: &mut Rig, ticks: u64) {
        rig.then(|_, r, _| wrmsr(r, msr::IA32_APIC_BASE, 0xfee0_0d00))
            .then(|_, r, _| wrmsr(r, msr::IA32_X2APIC_SIVR, 0x1ff))
            .then(|_, r, _| wrmsr(r, msr::IA32_X2APIC_LVT_TIMER, LVT_DEADLINE))
            .then(move |_, r, _| wrmsr(r, msr::IA32_TSC_DEADLINE, ticks));
    }

    #[test]
    fn an_armed_timer_becomes_the_preemption_timer_and_then_an_interrupt() {
        let mut rig = Rig::new();
        arm_timer(&mut rig, 64_000);
        rig.then(|v, _, tsc| {
            // SDM Vol. 3C §26.5.1: one tick for 2^5 TSC ticks.
            let ticks = u64::from(v.guest.preemption_timer);
            assert!((64_000 >> TIMER_SHIFT..=(64_000 >> TIMER_SHIFT) + 1).contains(&ticks), "{ticks}");
            v.guest.rflags |= rflags::IF;
            tsc.fetch_add(64_000, Ordering::SeqCst);
            VmExit::new(ExitReason::PreemptionTimer)
        })
        .then(|v, _, _| {
            assert_eq!(
                v.controls.entry_interruption,
                InterruptionInfo::new(0x40, EventType::External, false)
            );
            CPUID
        })
        .then(|v, _, _| {
            assert!(!v.controls.entry_interruption.is_valid(), "delivered once");
            CPUID
        });
        rig.play();
    }

    #[test]
    fn an_interrupt_that_can_not_be_taken_waits_for_the_window() {
        let mut rig = Rig::new();
        arm_timer(&mut rig, 1000);
        let window = |v: &EngineVmcs| v.controls.primary.contains(PrimaryControls::INTERRUPT_WINDOW_EXITING);
        rig.then(move |v, _, tsc| {
            assert!(!window(v));
            tsc.fetch_add(1000, Ordering::SeqCst);
            VmExit::new(ExitReason::PreemptionTimer)
        })
        .then(move |v, _, _| {
            assert!(window(v) && !v.controls.entry_interruption.is_valid(), "IF is 0");
            v.guest.rflags |= rflags::IF;
            v.guest.interruptibility = interruptibility::STI;
            VmExit::new(ExitReason::ExternalInterrupt)
        })
        .then(move |v, _, _| {
            assert!(window(v) && !v.controls.entry_interruption.is_valid(), "blocked by STI");
            v.guest.interruptibility = 0;
            VmExit::new(ExitReason::InterruptWindow)
        })
        .then(move |v, _, _| {
            assert!(!window(v));
            assert_eq!(v.controls.entry_interruption.vector(), 0x40);
            CPUID
        });
        rig.play();
    }

    #[test]
    fn a_counter_that_overflowed_interrupts_through_its_lvt_entry() {
        const LVT_PERF: u32 = 0x834;
        let mut rig = Rig::new();
        rig.then(|_, r, _| wrmsr(r, msr::IA32_APIC_BASE, 0xfee0_0d00))
            .then(|_, r, _| wrmsr(r, msr::IA32_X2APIC_SIVR, 0x1ff))
            // SDM Vol. 3A §11.5.1: delivery mode NMI.
            .then(|_, r, _| wrmsr(r, LVT_PERF, 0x400))
            .then(|v, r, _| {
                // Vol. 3B §18.4.7.
                v.guest.debugctl = pmu::DEBUGCTL_FREEZE_PERFMON | pmu::DEBUGCTL_FREEZE_LBRS | 1;
                v.guest.perf_global_ctrl = 1;
                r.pmu.interrupt = true;
                VmExit::new(ExitReason::ExternalInterrupt)
            })
            .then(|v, r, _| {
                assert_eq!(v.controls.entry_interruption, InterruptionInfo::new(2, EventType::Nmi, false));
                assert_eq!((v.guest.debugctl & 1, v.guest.perf_global_ctrl), (0, 0), "frozen");
                v.guest.debugctl = 0;
                v.guest.perf_global_ctrl = 1;
                // The entry is masked now.
                r.pmu.interrupt = true;
                VmExit::new(ExitReason::ExternalInterrupt)
            })
            .then(|v, r, _| {
                assert!(!v.controls.entry_interruption.is_valid() && !r.pmu.interrupt);
                assert_eq!(v.guest.perf_global_ctrl, 1, "not frozen");
                CPUID
            });
        rig.play();
    }

    #[test]
    fn instructions_that_l0_completes_are_counted() {
        let mut rig = Rig::new();
        rig.then(|v, r, _| {
            v.guest.perf_global_ctrl = 3 << 32;
            // Counter 0 at CPL 0, counter 1 cycles.
            r.pmu.fixed_control = 0x31;
            CPUID
        })
        .then(|v, r, _| {
            assert_eq!(r.pmu.fixed, [1, 0, 0]);
            v.guest.segments[seg::SS].access.0 |= 0x60;
            CPUID
        })
        .then(|v, r, _| {
            assert_eq!(r.pmu.fixed, [1, 0, 0], "CPL 3");
            v.guest.segments[seg::SS].access.0 &= !0x60;
            r.pmu.fixed[0] = pmu::COUNTER;
            CPUID
        })
        .then(|v, r, _| {
            assert_eq!((r.pmu.fixed[0], r.pmu.global_status), (0, 1 << 32));
            v.guest.perf_global_ctrl = 0;
            CPUID
        })
        .then(|_, r, _| {
            assert_eq!(r.pmu.fixed[0], 0);
            CPUID
        });
        rig.play();
    }

    #[test]
    fn hlt_waits_until_another_thread_brings_an_nmi() {
        let mut rig = Rig::new();
        let (halts, halted) = std::sync::mpsc::channel();
        rig.then(move |v, _, _| {
            assert_eq!(v.guest.rip, 0xfff0);
            // Not before: an NMI that came earlier would have been delivered at this entry.
            halts.send(()).unwrap();
            VmExit { instruction_length: 1, ..VmExit::new(ExitReason::Hlt) }
        })
        .then(|v, _, _| {
            assert_eq!(v.guest.rip, 0xfff1);
            assert_eq!(v.controls.entry_interruption, InterruptionInfo::new(2, EventType::Nmi, false));
            CPUID
        });
        let pc = rig.pc.clone();
        let button = std::thread::spawn(move || {
            halted.recv().unwrap();
            pc.press_nmi_button();
        });
        rig.play();
        button.join().unwrap();
    }

    #[test]
    fn hlt_ends_at_a_deadline() {
        let mut rig = Rig::new();
        arm_timer(&mut rig, 5_000);
        rig.then(|v, _, tsc| {
            v.guest.rflags |= rflags::IF;
            tsc.fetch_add(5_000, Ordering::SeqCst);
            VmExit { instruction_length: 1, ..VmExit::new(ExitReason::Hlt) }
        })
        .then(|v, _, _| {
            assert_eq!(v.controls.entry_interruption.vector(), 0x40);
            CPUID
        });
        rig.play();
    }

    #[test]
    fn an_event_whose_delivery_exits_is_delivered_again() {
        // SDM Vol. 3C §28.2.4.
        let mut rig = Rig::new();
        let interrupted = VmExit {
            idt_vectoring: InterruptionInfo::new(14, EventType::HardwareException, true),
            idt_vectoring_error_code: 6,
            ..VmExit::new(ExitReason::ExternalInterrupt)
        };
        let nmi = VmExit {
            idt_vectoring: InterruptionInfo(InterruptionInfo::new(2, EventType::Nmi, false).0 | 1 << 12),
            ..VmExit::new(ExitReason::ExternalInterrupt)
        };
        rig.then(move |_, _, _| interrupted)
            .then(move |v, _, _| {
                let c = &v.controls;
                assert_eq!((c.entry_interruption.0, c.entry_error_code), (0x8000_0b0e, 6));
                v.guest.interruptibility = interruptibility::NMI;
                nmi
            })
            .then(|v, _, _| {
                assert_eq!(v.controls.entry_interruption.0, 0x8000_0202);
                assert_eq!(v.guest.interruptibility & interruptibility::NMI, 0);
                CPUID
            });
        rig.play();
    }

    #[test]
    fn unknown_msrs_raise_gp_at_the_instruction() {
        let mut rig = Rig::new();
        rig.then(|v, r, _| {
            v.guest.cr0 |= cr0::PE;
            r.gpr[gpr::RCX] = 0x1234_5678;
            VmExit { instruction_length: 2, ..VmExit::new(ExitReason::Rdmsr) }
        })
        .then(|v, _, _| {
            assert_eq!(v.guest.rip, 0xfff0);
            assert_eq!((v.controls.entry_interruption.0, v.controls.entry_error_code), (0x8000_0b0d, 0));
            v.guest.cr0 &= !cr0::PE;
            VmExit { instruction_length: 2, ..VmExit::new(ExitReason::Rdmsr) }
        })
        .then(|v, _, _| {
            // No error code in real mode (SDM Vol. 3C §27.2.1.3).
            assert_eq!(v.controls.entry_interruption.0, 0x8000_030d);
            CPUID
        });
        rig.play();
    }

    #[test]
    fn completing_an_instruction_has_all_its_side_effects() {
        let mut rig = Rig::new();
        rig.then(|v, _, _| {
            v.guest.rip = 0xffff_ffff;
            v.guest.rflags |= rflags::TF | rflags::RF;
            v.guest.interruptibility = interruptibility::MOV_SS | interruptibility::NMI;
            CPUID
        })
        .then(|v, _, _| {
            assert_eq!(v.guest.rip, 1, "EIP wraps outside 64-bit mode");
            assert_eq!(v.guest.interruptibility, interruptibility::NMI);
            assert_eq!(v.guest.pending_debug, 1 << 14, "BS, SDM Vol. 3C table 25-4");
            assert_eq!(v.guest.rflags & rflags::RF, 0);
            CPUID
        });
        rig.play();
    }

    #[test]
    fn in_leaves_the_rest_of_rax_as_the_operand_size_has_it() {
        let mut rig = Rig::new();
        let exit = |size| VmExit {
            instruction_length: 1,
            ..VmExit::new(ExitReason::IoInstruction).qualified(io::qualification(0xeee0, size, io::IN))
        };
        for (size, expected) in [(1, 0x1122_3344_5566_77ff), (2, 0x1122_3344_5566_ffff), (4, 0xffff_ffff_u64)]
        {
            rig.then(move |_, r, _| {
                r.gpr[gpr::RAX] = 0x1122_3344_5566_7788;
                exit(size)
            })
            .then(move |_, r, _| {
                assert_eq!(r.gpr[gpr::RAX], expected);
                CPUID
            });
        }
        rig.play();
    }

    #[test]
    fn cr8_is_the_local_apics_and_cr4_bits_that_are_not_offered_fault() {
        let mut rig = Rig::new();
        let access = |cr, kind| VmExit {
            instruction_length: 3,
            ..VmExit::new(ExitReason::CrAccess).qualified(cr_access::mov(cr, kind, gpr::RBX as u8))
        };
        rig.then(move |v, r, _| {
            v.guest.cr0 |= cr0::PE;
            r.gpr[gpr::RBX] = 9;
            access(8, cr_access::Kind::MovTo)
        })
        .then(move |_, r, _| {
            r.gpr[gpr::RBX] = 0;
            access(8, cr_access::Kind::MovFrom)
        })
        .then(move |_, r, _| {
            assert_eq!(r.gpr[gpr::RBX], 9);
            r.gpr[gpr::RBX] = 16;
            access(8, cr_access::Kind::MovTo)
        })
        .then(move |v, _, _| {
            assert_eq!(v.controls.entry_interruption.vector(), exception::GP);
            access(4, cr_access::Kind::MovTo)
        })
        .then(|v, _, _| {
            assert_eq!(v.controls.entry_interruption.vector(), exception::GP);
            CPUID
        });
        rig.play();
        assert_eq!(rig.pc.interrupts().with_lapic(0, |l| l.tpr()), Some(0x90));
    }

    #[test]
    fn vmx_instructions_are_undefined() {
        let mut rig = Rig::new();
        for reason in [ExitReason::Vmxon, ExitReason::Vmcall, ExitReason::Invept] {
            rig.then(move |_, _, _| VmExit::new(reason)).then(|v, _, _| {
                assert_eq!(v.controls.entry_interruption.0, 0x8000_0306);
                assert_eq!(v.guest.rip, 0xfff0);
                VmExit::new(ExitReason::ExternalInterrupt)
            });
        }
        rig.play();
    }

    #[test]
    fn device_memory_is_emulated_and_ram_never_is() {
        let mut rig = Rig::new();
        let mmio = VmExit {
            guest_physical: memory::Gpa(0xfee0_0020),
            ..VmExit::new(ExitReason::EptViolation).qualified(0x181)
        };
        rig.then(move |_, _, _| mmio).emulation(|v, bus| {
            assert_eq!(bus.mmio_read(memory::Gpa(0xfee0_0030), 4) & 0xff, 0x15, "APIC version");
            v.guest.rip += 3;
            None
        });
        rig.play();

        let ram = VmExit { guest_physical: memory::Gpa(0x1000), ..mmio };
        rig.then(move |_, _, _| ram);
        assert!(matches!(rig.cpu.run(), RunEnd::Internal(_)));
    }

    #[test]
    fn device_memory_that_can_not_be_emulated_is_a_crash_and_no_endless_loop() {
        let mut rig = Rig::new();
        let mmio = VmExit {
            guest_physical: memory::Gpa(0xd000_0000),
            ..VmExit::new(ExitReason::EptViolation).qualified(0x181)
        };
        rig.then(move |_, _, _| mmio).emulation(move |_, _| Some(mmio));
        let RunEnd::Crash(report) = rig.cpu.run() else { panic!() };
        assert_eq!(report.cause, CrashCause::UnsupportedDeviceAccess { gpa: 0xd000_0000 });
        let fetch = mmio.qualified(0x184);
        rig.then(move |_, _, _| fetch);
        let RunEnd::Crash(report) = rig.cpu.run() else { panic!() };
        assert_eq!(report.cause, CrashCause::FetchOutsideRam { gpa: 0xd000_0000 });
    }

    #[test]
    fn a_triple_fault_reports_the_last_exits_and_the_code() {
        let mut rig = Rig::new();
        rig.vm.ram().write(memory::L1Gpa(0x1000), &[0x0f, 0x0b]).unwrap();
        rig.then(|_, _, _| CPUID).then(|v, _, _| {
            v.guest.segments[seg::CS].base = 0;
            v.guest.rip = 0x1000;
            VmExit::new(ExitReason::TripleFault)
        });
        let RunEnd::Crash(report) = rig.cpu.run() else { panic!() };
        assert_eq!(report.cause, CrashCause::TripleFault);
        let reasons: Vec<_> = report.exits.iter().map(|e| e.reason).collect();
        assert_eq!(reasons, [ExitReason::Cpuid, ExitReason::TripleFault]);
        assert_eq!((report.code.bitness, &report.code.bytes[..2]), (16, &[0x0f, 0x0b][..]));
        assert!(report.to_string().contains("triple fault"));
    }

    #[test]
    fn another_thread_stops_a_halted_vcpu() {
        let mut rig = Rig::new();
        rig.then(|_, _, _| VmExit::new(ExitReason::Hlt));
        let handle = rig.vm.handle().clone();
        let stopper = std::thread::spawn(move || handle.stop());
        assert!(matches!(rig.cpu.run(), RunEnd::Stopped));
        stopper.join().unwrap();
        // The exit was counted, if it came to that before the stop.
        let exits = rig.vm.handle().stats(0).unwrap().exits;
        assert!(exits <= 1, "{exits}");
    }

    #[test]
    fn tsc_writes_reach_the_vmcs() {
        let mut rig = Rig::new();
        rig.then(|v, r, tsc| {
            assert_eq!(v.controls.tsc_offset.wrapping_add(tsc.load(Ordering::SeqCst)), 0);
            wrmsr(r, msr::TSC, 777)
        })
        .then(|v, _, tsc| {
            assert_eq!(v.controls.tsc_offset.wrapping_add(tsc.load(Ordering::SeqCst)), 777);
            CPUID
        });
        rig.play();
    }
}
