//! L2: VM entries of L1 into it, its exits, and what L0 does on its behalf.
//!
//! While L2 runs, [`VcpuLoop::vmcs`] *is* VMCS02, and VMCS01 waits in [`Nested::vmcs01`]: so what L0
//! does for L1 (devices, HLT, MSRs that L1 leaves to L2) works for L2 as it is.

use std::time::Duration;

use engine::{Activity, Engine, EngineVmcs, ExitBus, InvalidateScope, Vcpu, VmExit, interruptibility};
use ept_compress::{
    Access, Ept01View, Fault as EptFault, Flush, Format, L0Fault, L1Map, Leaf, Level, MemoryType, NoLog, Pml,
    Rights, RootKey, walk,
};
use memory::{Gpa, L1Gpa, L1Ram, L2Gpa, MachineAddr};
use vmx_emu::checks::{self, Answer, MsrBits, Report};
use vmx_emu::enter::{self, FailedEntry};
use vmx_emu::instructions::shadowed;
use vmx_emu::instructions::vmfunc::{VmFunction, vmfunc};
use vmx_emu::merge::bitmaps::secondary12;
use vmx_emu::merge::tsc::{Timer12, TscView};
use vmx_emu::merge::{self, L0, L2Space};
use vmx_emu::reflect::{self, Abort, AfterSwitch, Parts};
use vmx_emu::route::{self, Owner};
use vmx_emu::view::ThreeWay;
use vmx_emu::{Field, Invalidation, L1Physical, Outcome as Vmx, Vmcs12};
use x86_spec::controls::{ExitControls, PinbasedControls, PrimaryControls, SecondaryControls};
use x86_spec::exit::ExitReason;
use x86_spec::interruption::{EventType, InterruptionInfo};
use x86_spec::reg::{efer, gpr, rflags};
use x86_spec::{exception, msr};

use super::Nested;
use super::l1::L1View;
use super::msrs::MsrView;
use crate::board::CpuBus;
use crate::cpuid::PHYSICAL_BITS;
use crate::exits::{self, Outcome};
use crate::report::CrashCause;
use crate::vcpu_loop::VcpuLoop;
use crate::vmcs01;

const SHADOW: u32 = interruptibility::STI | interruptibility::MOV_SS;

/// The context of the checks reads L1's memory through this.
pub(super) struct Physical<'a>(pub &'a L1Ram);
impl checks::ReadPhysical for Physical<'_> {
    fn read(&self, at: L1Gpa, buf: &mut [u8]) {
        L1Physical::read(self.0, at, buf);
    }
}

/// EPT01, and the page that stands for an APIC-access page of L1 which is not RAM.
struct L1Memory<'a> {
    view: Ept01View<'a>,
    elsewhere: Option<L1Gpa>,
    nowhere: MachineAddr,
}

impl L1Map for L1Memory<'_> {
    fn lookup(&self, gpa: L1Gpa) -> Result<Leaf<MachineAddr>, L0Fault> {
        if self.elsewhere != Some(gpa.page_base()) {
            return self.view.lookup(gpa);
        }
        Ok(Leaf {
            page: self.nowhere,
            level: Level::Pte,
            rights: Rights::ALL,
            memory_type: MemoryType::WriteBack,
            ignore_pat: false,
            dirty: true,
            path: [None; 4],
        })
    }
}

/// Devices of L1's machine as an L2 reaches them that L1 gives them to: addresses go through EPT12.
struct L2Bus<'a, B> {
    bus: B,
    ram: &'a L1Ram,
    /// As [`ept12`] says.
    ept12: Option<(u64, Format)>,
}

impl<B> L2Bus<'_, B> {
    /// Where in L1's memory the access goes; `None` if EPT12 does not allow it.
    fn l1_address(&self, gpa: Gpa, access: Access) -> Option<Gpa> {
        let Some((eptp12, format)) = &self.ept12 else { return Some(gpa) };
        let l2 = L2Gpa(gpa.0);
        let leaf = walk(*eptp12, l2, access, format, self.ram, &mut NoLog).ok()?;
        Some(Gpa(leaf.address(l2).0))
    }
}

impl<B: ExitBus> ExitBus for L2Bus<'_, B> {
    fn is_device(&mut self, gpa: Gpa, write: bool) -> bool {
        // RAM that EPT02 lacks is an exit, and so is what EPT12 does not allow.
        let at = self.l1_address(gpa, if write { Access::WRITE } else { Access::READ });
        at.is_some_and(|at| self.ram.translate(L1Gpa(at.0)).is_none())
    }
    fn mmio_read(&mut self, gpa: Gpa, size: u8) -> u64 {
        // Nothing answers where L1 maps nothing: all bits read as one.
        self.l1_address(gpa, Access::READ).map_or(u64::MAX, |at| self.bus.mmio_read(at, size))
    }
    fn mmio_write(&mut self, gpa: Gpa, size: u8, value: u64) {
        if let Some(at) = self.l1_address(gpa, Access::WRITE) {
            self.bus.mmio_write(at, size, value);
        }
    }
    fn pio_read(&mut self, port: u16, size: u8) -> u32 {
        self.bus.pio_read(port, size)
    }
    fn pio_write(&mut self, port: u16, size: u8, value: u32) {
        self.bus.pio_write(port, size, value);
    }
}

fn pin12(vmcs12: &Vmcs12, c: PinbasedControls) -> bool {
    PinbasedControls::from_bits_truncate(vmcs12.get32(Field::PinControls)).contains(c)
}

fn uses_ept(vmcs12: &Vmcs12) -> bool {
    secondary12(vmcs12).contains(SecondaryControls::ENABLE_EPT)
}

fn root_key(vmcs12: &Vmcs12) -> RootKey {
    RootKey {
        eptp12: vmcs12.get(Field::Eptp),
        mode_based_execute: secondary12(vmcs12).contains(SecondaryControls::MODE_BASED_EPT),
    }
}

/// EPT12 of the current VMCS12 and the format of its tables; `None` where L1 does not use EPT.
fn ept12(n: &Nested) -> Option<(u64, Format)> {
    let vmcs12 = n.state.current().filter(|v| uses_ept(v))?;
    let key = root_key(vmcs12);
    let format = Format::from_capabilities(n.caps.ept_vpid, PHYSICAL_BITS);
    Some((key.eptp12, format.mode_based_execute(key.mode_based_execute)))
}

fn vpid12(vmcs12: &Vmcs12) -> u16 {
    let on = secondary12(vmcs12).contains(SecondaryControls::ENABLE_VPID);
    if on { vmcs12.get(Field::Vpid) as u16 } else { 0 }
}

/// A failed entry as the exit that L1 sees (SDM Vol. 3C §27.8).
fn failed_exit(failed: &FailedEntry) -> VmExit {
    VmExit { entry_failure: true, ..VmExit::new(failed.reason).qualified(failed.qualification) }
}

impl<E: Engine> VcpuLoop<E> {
    /// Whether L2 runs.
    pub(crate) fn in_l2(&self) -> bool {
        self.nested.as_ref().is_some_and(|n| n.state.in_guest())
    }

    /// Whether L1 is in VMX operation, root or not.
    pub(crate) fn in_vmx_operation(&self) -> bool {
        self.nested.as_ref().is_some_and(|n| n.state.in_vmx_operation())
    }

    // ---- invalidation -------------------------------------------------------------------------

    /// INVEPT and INVVPID of L1.
    pub(crate) fn nested_invalidate(&mut self, what: Invalidation) {
        self.take_table_writes();
        let engine = self.vm().engine().clone();
        let Some(n) = self.nested.as_mut() else { return };
        let scope = |vpid12: u16, f: fn(u16) -> InvalidateScope| {
            if let Some(vpid) = n.vpids.lookup(vpid12) {
                engine.invalidate(f(vpid));
            }
        };
        match what {
            Invalidation::Eptp(eptp) => {
                let flush = n.ept02.invept_single(eptp);
                self.ept02_changed(flush);
            }
            Invalidation::AllEptps => {
                let flush = n.ept02.invept_all();
                self.ept02_changed(flush);
            }
            Invalidation::Address { vpid, linear } => {
                if let Some(vpid) = n.vpids.lookup(vpid) {
                    engine.invalidate(InvalidateScope::Address { vpid, linear });
                }
            }
            Invalidation::Vpid(v) => scope(v, InvalidateScope::Vpid),
            Invalidation::VpidRetainGlobals(v) => scope(v, InvalidateScope::VpidRetainGlobals),
            Invalidation::AllVpids => n.vpids.all().for_each(|v| engine.invalidate(InvalidateScope::Vpid(v))),
        }
    }

    /// A list of MSRs that VMCS12 has loaded at entries or exits may have moved the deadline of a device (the
    /// local APIC's timer). Nothing else in a switch between L1 and L2 does.
    fn msr_lists_loaded(&mut self) {
        let counts = [Field::EntryMsrLoadCount, Field::ExitMsrLoadCount];
        let vmcs12 = self.nested.as_ref().and_then(|n| n.state.current());
        if vmcs12.is_none_or(|v| counts.into_iter().any(|f| v.get(f) != 0)) {
            self.devices_touched();
        }
    }

    // ---- entry --------------------------------------------------------------------------------

    /// VMLAUNCH or VMRESUME that passed its own checks.
    pub(crate) fn nested_entry(&mut self, exit: &VmExit) -> Outcome {
        let vm = self.vm().clone();
        let Some(n) = self.nested.as_ref() else { return Outcome::Resume };
        let (Some(vmcs12), Some(pointer)) = (n.state.current(), n.state.current_pointer()) else {
            return Outcome::Resume;
        };
        let context = checks::Context {
            vmcs: vmcs12,
            current_vmcs: pointer,
            caps: &n.caps,
            msr_bits: MsrBits {
                efer: efer::DEFINED,
                debugctl: self.msrs.debugctl_bits(),
                perf_global_ctrl: self.msrs.perf_global_ctrl_bits(),
            },
            linear_bits: 48,
            l1_long_mode: self.vmcs.guest.efer & efer::LMA != 0,
            memory: &Physical(vm.ram()),
        };
        let report = checks::run(&context);
        if !report.passed() {
            let vmcs02 = n.origins.is_some().then_some(&*n.vmcs01);
            self.explain_entry(n, vmcs12, vmcs02, &report);
        }
        match report.architectural() {
            Answer::Enter => self.enter_l2(),
            Answer::FailValid(error) => {
                let Some(n) = self.nested.as_mut() else { return Outcome::Resume };
                let result = n.state.fail(error);
                self.complete_vmx(exit, result)
            }
            Answer::FailEntry { reason, qualification } => {
                self.fail_entry(FailedEntry { reason, qualification })
            }
        }
    }

    /// Tells the user why a VM entry of L1 fails. `vmcs02` is what was last made for L2, if anything was.
    fn explain_entry(&self, n: &Nested, vmcs12: &Vmcs12, vmcs02: Option<&EngineVmcs>, report: &Report) {
        let rip = self.vmcs.guest.rip;
        let view = ThreeWay { vmcs01: &self.vmcs, vmcs12: Some(vmcs12), vmcs02, origins: n.origins.as_ref() };
        self.vm().handle().entry_failed(|| format!("VM entry at {rip:#x}:\n{report}"), Some(&view));
        tracing::debug!("VM entry of L1 at {rip:#x} fails:\n{report}");
    }

    /// Goes from VMCS01 to VMCS02.
    fn enter_l2(&mut self) -> Outcome {
        let vm = self.vm().clone();
        let now = vm.engine().tsc();
        let Some(n) = self.nested.as_mut() else { return Outcome::Resume };
        let Some(vmcs12) = n.state.current() else { return Outcome::Resume };
        let mut flush = Flush::None;
        let eptp02 = if uses_ept(vmcs12) {
            let root = n.ept02.root(root_key(vmcs12));
            flush = root.flush;
            root.eptp02
        } else {
            vm.ept01().eptp()
        };
        let vpid = n.vpids.get(vpid12(vmcs12));
        let timer12 = enter::timer12(vmcs12);
        let l0 = L0 {
            vmcs01: &self.vmcs,
            engine: vm.engine().capabilities(),
            caps: &n.caps,
            windows: PrimaryControls::empty(),
            // That there is one. `prepare_l2` knows when.
            deadline: Some(u32::MAX),
            pages: n.pages,
            msr_bitmaps: &n.msr_bitmaps,
            memory: vm.memory(),
        };
        let space = L2Space { eptp02, vpid02: vpid.vpid };
        let merged = match merge::merge(&l0, vmcs12, vm.ram(), space, timer12) {
            Ok(m) => m,
            Err(e) => return Outcome::End(crate::RunEnd::Internal(format!("merge for L2: {e}"))),
        };
        n.origins = Some(merged.origins);
        n.apic_access_elsewhere = merged.apic_access_elsewhere;
        n.mtf_injected = enter::injects_mtf(vmcs12);
        n.timer12 = timer12.map(|v| Timer12::start(v, n.rate, now));
        let mut msrs = MsrView::new(&mut self.msrs, vm.board(), self.index);
        let entered =
            enter::enter(&mut n.vmcs01, merged, &self.vmcs, vmcs12, &mut self.regs, vm.ram(), &mut msrs);
        let shares_vpid0 = vpid12(vmcs12) == 0;
        self.ept02_changed(flush);
        // An L2 without VPID shares VPID 0 with L1, as far as L1 knows: both start each time without
        // translations (§29.4.3.1). L2's go here, L1's at the exit.
        if shares_vpid0 || vpid.flush {
            vm.engine().invalidate(InvalidateScope::Vpid(vpid.vpid));
        }
        self.msr_lists_loaded();
        // Entries clear address-range monitoring (§27.5).
        self.regs.monitor = None;
        match entered {
            Ok(()) => {
                let Some(n) = self.nested.as_mut() else { return Outcome::Resume };
                std::mem::swap(&mut *n.vmcs01, &mut self.vmcs);
                n.state.enter_guest();
                Outcome::Resume
            }
            Err(failed) => {
                if let Some(n) = self.nested.as_ref()
                    && let Some(vmcs12) = n.state.current()
                {
                    self.explain_entry(n, vmcs12, Some(&n.vmcs01), &failed.report(vmcs12));
                }
                self.fail_entry(failed.into())
            }
        }
    }

    /// An entry that fails after its checks on controls and host state: L1 goes on at its host
    /// state.
    fn fail_entry(&mut self, failed: FailedEntry) -> Outcome {
        tracing::debug!("{failed}");
        self.account_forwarded(&failed_exit(&failed));
        let result = self.with_parts(false, |parts| failed.reflect(parts));
        self.back_in_l1(result)
    }

    // ---- exit to L1 ------------------------------------------------------------------------------

    /// Calls `f` with all that an exit to L1 touches. `swapped`: VMCS02 is the context that runs.
    fn with_parts(
        &mut self,
        swapped: bool,
        f: impl FnOnce(&mut Parts<'_>) -> Result<AfterSwitch, Abort>,
    ) -> Option<Result<AfterSwitch, Abort>> {
        let vm = self.vm().clone();
        let now = vm.engine().tsc();
        let n = self.nested.as_mut()?;
        let timer12 = n.timer12.map(|t| (t, now));
        let vmcs12 = n.state.current_mut()?;
        let mut msrs = MsrView::new(&mut self.msrs, vm.board(), self.index);
        let (vmcs01, vmcs02) =
            if swapped { (&mut *n.vmcs01, &self.vmcs) } else { (&mut self.vmcs, &*n.vmcs01) };
        Some(f(&mut Parts {
            vmcs12,
            vmcs01,
            vmcs02,
            regs: &mut self.regs,
            l1: vm.ram(),
            msrs: &mut msrs,
            timer12,
            physical_bits: PHYSICAL_BITS,
        }))
    }

    /// Reflects an exit of L2 to L1.
    pub(crate) fn reflect_exit(&mut self, exit: &VmExit) -> Outcome {
        self.account_forwarded(exit);
        // An event that L0 was to inject into L2 is L1's to inject again.
        if let Some(e) = self.event.take()
            && !self.vmcs.controls.entry_interruption.is_valid()
        {
            e.inject(&mut self.vmcs.controls);
        }
        let result = self.with_parts(true, |parts| reflect::reflect(exit, parts));
        self.vmcs.controls.entry_interruption = InterruptionInfo::NONE;
        if let Some(n) = self.nested.as_mut() {
            std::mem::swap(&mut *n.vmcs01, &mut self.vmcs);
            n.state.leave_guest();
            n.timer12 = None;
        }
        self.halted = false;
        self.stop_mwait();
        self.back_in_l1(result)
    }

    fn back_in_l1(&mut self, result: Option<Result<AfterSwitch, Abort>>) -> Outcome {
        self.event = None;
        // Exits clear address-range monitoring (§28.5.6).
        self.regs.monitor = None;
        self.msr_lists_loaded();
        self.restrict_control_registers();
        self.store_shadow_vmcs();
        self.store_enlightened_vmcs();
        // MSR lists may have moved the TSC.
        self.vmcs.controls.tsc_offset = self.msrs.tsc().offset();
        match result {
            Some(Ok(after)) => {
                if after.flush_vpid0 {
                    self.vm().engine().invalidate(InvalidateScope::Vpid(vmcs01::VPID));
                }
                Outcome::Resume
            }
            Some(Err(abort)) => {
                let indicator = abort.indicator();
                if let Some(region) = self.nested.as_ref().and_then(|n| n.state.current_pointer()) {
                    let at = region.offset(vmx_emu::vmcs12::ABORT_INDICATOR_OFFSET);
                    L1Physical::write(self.vm().ram(), at, &indicator.to_le_bytes());
                }
                self.crash(CrashCause::VmxAbort { abort })
            }
            None => Outcome::Resume,
        }
    }

    // ---- exits of L2 -------------------------------------------------------------------------------

    /// Decides whose an exit of L2 is, and hands it on.
    pub(crate) fn dispatch_l2(&mut self, exit: &VmExit) -> Outcome {
        if exit.entry_failure {
            let name = exit.reason.name();
            self.vm().handle().entry_failed(|| format!("the engine can't run L2's state: {name}"), None);
            // VMCS02 never ran; what L1 sees is a failed entry.
            let failed = FailedEntry { reason: exit.reason, qualification: exit.qualification };
            self.account_forwarded(exit);
            let result = self.with_parts(true, |parts| failed.reflect(parts));
            if let Some(n) = self.nested.as_mut() {
                std::mem::swap(&mut *n.vmcs01, &mut self.vmcs);
                n.state.leave_guest();
            }
            return self.back_in_l1(result);
        }
        let vm = self.vm().clone();
        let now = vm.engine().tsc();
        let Some(n) = self.nested.as_ref() else { return Outcome::Resume };
        let Some(vmcs12) = n.state.current() else { return Outcome::Resume };
        let route = route::route(
            exit,
            &route::Context {
                vmcs12,
                guest: &self.vmcs.guest,
                regs: &self.regs,
                l1: vm.ram(),
                timer12_expired: n.timer12.is_some_and(|t| t.expired(now)),
                mtf_injected: n.mtf_injected,
            },
        );
        tracing::trace!(owner = ?route.owner, why = route.why, "exit of L2");
        match route.owner {
            Owner::L1 => self.reflect_exit(exit),
            Owner::L0 => {
                self.keep_interrupted_event(exit);
                let rip = self.vmcs.guest.rip;
                let outcome = self.keep_l2_exit(exit);
                self.monitor_trap(rip, outcome)
            }
            Owner::Composition => self.compose_l2(exit),
        }
    }

    /// The monitor trap flag of L1, after an exit of L2 at `rip` that L0 has handled: if that completed an instruction, its
    /// exit is due (SDM Vol. 3C §26.5.2). After an exception the engine makes it.
    fn monitor_trap(&mut self, rip: u64, outcome: Outcome) -> Outcome {
        let completed = self.in_l2() && self.event.is_none() && self.vmcs.guest.rip != rip;
        let vmcs12 = self.nested.as_ref().and_then(|n| n.state.current());
        let wanted = vmcs12.is_some_and(|v| {
            v.get32(Field::PrimaryControls) & PrimaryControls::MONITOR_TRAP_FLAG.bits() != 0
        });
        match outcome {
            Outcome::Resume if completed && wanted => {
                self.reflect_exit(&VmExit::new(ExitReason::MonitorTrapFlag))
            }
            outcome => outcome,
        }
    }

    /// An exit of L2 that L0 handles itself.
    fn keep_l2_exit(&mut self, exit: &VmExit) -> Outcome {
        let info = exit.interruption_info;
        match exit.reason {
            ExitReason::ExceptionOrNmi if info.event_type() != EventType::Nmi => {
                // A page fault that neither side wants: both filters together let it exit.
                if info.vector() == exception::PF {
                    self.regs.cr2 = exit.qualification;
                }
                let code = info.has_error_code().then_some(exit.interruption_error_code);
                self.inject_exception(info.vector(), code);
                Outcome::Resume
            }
            ExitReason::Rdmsr if self.regs.gpr[gpr::RCX] as u32 == msr::TSC => {
                let c = &self.vmcs.controls;
                let view = TscView { offset: c.tsc_offset, multiplier: c.tsc_multiplier };
                let tsc = view.read(self.vm().engine().tsc());
                self.regs.gpr[gpr::RAX] = tsc & 0xffff_ffff;
                self.regs.gpr[gpr::RDX] = tsc >> 32;
                self.skip_instruction(exit);
                Outcome::Resume
            }
            ExitReason::Vmfunc => self.vm_function(exit),
            ExitReason::Vmread | ExitReason::Vmwrite => self.shadowed_vmcs_access(exit),
            reason => {
                let outcome = (exits::route::<E>(reason).handler)(self, exit);
                self.after_l2_handler(exit, outcome)
            }
        }
    }

    /// What L0's handlers of L1's exits leave to do when the exit was L2's.
    fn after_l2_handler(&mut self, exit: &VmExit, outcome: Outcome) -> Outcome {
        if let Outcome::Halt = outcome {
            // The engine waits, so that an exit to L1 finds L2 in the HLT state.
            self.vmcs.guest.activity = Activity::Hlt;
            return Outcome::Resume;
        }
        let vmcs12 = self.nested.as_ref().and_then(|n| n.state.current());
        if !exit.idt_vectoring.is_valid()
            && let Some(e) = self.event
            && e.info.event_type() == EventType::HardwareException
            && let Some(vmcs12) = vmcs12
            && route::exception_exits(vmcs12, e.info.vector(), e.error_code)
        {
            // The exception that L0 raises is one that L1 intercepts.
            self.event = None;
            let mut reflected = VmExit::new(ExitReason::ExceptionOrNmi);
            reflected.interruption_info = e.info;
            reflected.interruption_error_code = e.error_code;
            return self.reflect_exit(&reflected);
        }
        outcome
    }

    /// VMFUNC of L2 that L1 allows: EPTP switching (SDM Vol. 3C §26.5.6.3).
    fn vm_function(&mut self, exit: &VmExit) -> Outcome {
        let vm = self.vm().clone();
        let (eax, ecx) = (self.regs.gpr[gpr::RAX] as u32, self.regs.gpr[gpr::RCX] as u32);
        let Some(n) = self.nested.as_mut() else { return Outcome::Resume };
        let Some(vmcs12) = n.state.current_mut() else { return Outcome::Resume };
        match vmfunc(vmcs12, &n.caps, vm.ram(), eax, ecx) {
            VmFunction::SwitchEptp(_) => {}
            VmFunction::Exit => return self.reflect_exit(exit),
            VmFunction::Undefined => {
                self.inject_exception(exception::UD, None);
                return Outcome::Resume;
            }
        }
        let root = n.ept02.root(root_key(vmcs12));
        self.vmcs.controls.eptp = root.eptp02;
        self.ept02_changed(root.flush);
        self.skip_instruction(exit);
        Outcome::Resume
    }

    /// VMREAD or VMWRITE of L2 that L1 lets pass to L2's shadow VMCS (SDM Vol. 3C §25.10).
    fn shadowed_vmcs_access(&mut self, exit: &VmExit) -> Outcome {
        let vm = self.vm().clone();
        let Some(n) = self.nested.as_mut() else { return Outcome::Resume };
        let Some(vmcs12) = n.state.current() else { return Outcome::Resume };
        let bus = CpuBus { board: vm.board(), cpu: self.index, ram: vm.ram() };
        let mut bus = L2Bus { bus, ram: vm.ram(), ept12: ept12(n) };
        let mut l2 = L1View {
            vcpu: &mut self.vcpu,
            vmcs01: &mut self.vmcs,
            regs: &mut self.regs,
            ram: vm.ram(),
            bus: &mut bus,
        };
        match shadowed::execute(vmcs12, &n.caps, &mut l2, exit) {
            Some(Vmx::Complete(result)) => {
                self.vmcs.guest.rflags = result.rflags(self.vmcs.guest.rflags);
                self.skip_instruction(exit);
                Outcome::Resume
            }
            Some(Vmx::Fault(fault)) => self.nested_fault(fault),
            // The operand is in memory that EPT02 does not map yet: the access is L2's, as any other.
            Some(Vmx::Exit(access)) => self.dispatch_l2(&access),
            _ => Outcome::Resume,
        }
    }

    /// An EPT violation under VMCS02: fills EPT02, or finds out who has to act.
    fn compose_l2(&mut self, exit: &VmExit) -> Outcome {
        let vm = self.vm().clone();
        let Some(n) = self.nested.as_mut() else { return Outcome::Resume };
        let format12 = Format::from_capabilities(n.caps.ept_vpid, PHYSICAL_BITS);
        let format01 = Format::from_capabilities(vm.engine().capabilities().ept_vpid, PHYSICAL_BITS);
        let Some(vmcs12) = n.state.current_mut() else { return Outcome::Resume };
        if !uses_ept(vmcs12) {
            // EPT02 is EPT01: the violation is one of L1's machine.
            self.keep_interrupted_event(exit);
            return (exits::route::<E>(exit.reason).handler)(self, exit);
        }
        let key = root_key(vmcs12);
        let access = if exit.reason == ExitReason::EptViolation {
            Access::from_qualification(exit.qualification)
        } else {
            Access::READ
        };
        let gpa = L2Gpa(exit.guest_physical.0);
        let view = Ept01View { memory: vm.memory(), eptp: vm.ept01().eptp(), format: format01 };
        let l1 = L1Memory { view, elsewhere: n.apic_access_elsewhere, nowhere: n.pages.nowhere };
        let logs = secondary12(vmcs12).contains(SecondaryControls::ENABLE_PML);
        let address = L1Gpa(vmcs12.get(Field::PmlAddress));
        let mut index = vmcs12.get(Field::PmlIndex) as u16;
        let reclaims = n.ept02.stats().reclaims();
        let filled = if logs {
            let mut log = Pml { memory: vm.ram(), address, index: &mut index };
            n.ept02.fill(key, &format12, gpa, access, vm.ram(), &l1, &mut log)
        } else {
            n.ept02.fill(key, &format12, gpa, access, vm.ram(), &l1, &mut NoLog)
        };
        if logs && let Some(v) = n.state.current_mut() {
            v.set(Field::PmlIndex, index.into());
        }
        if n.ept02.stats().reclaims() != reclaims {
            tracing::debug!(pages = n.ept02.held_pages(), "EPT02 is full: tables are dropped to make room");
        }
        if let Err(fault) = &filled
            && let Some(reflected) = route::exit_of_fault(exit, fault)
        {
            return self.reflect_exit(&reflected);
        }
        match filled {
            Ok(filled) => {
                self.ept02_changed(filled.flush);
                self.keep_interrupted_event(exit);
                Outcome::Resume
            }
            Err(EptFault::L0 { fault: L0Fault::NoMemory, .. }) => {
                self.keep_interrupted_event(exit);
                self.devices_touched();
                match self.emulate_instruction() {
                    None => Outcome::Resume,
                    // Another page that the instruction needs is an exit as any other.
                    Some(again)
                        if again.reason == ExitReason::EptViolation
                            && again.guest_physical.0 & !0xfff == exit.guest_physical.0 & !0xfff =>
                    {
                        self.crash(CrashCause::UnsupportedDeviceAccess { gpa: gpa.0 })
                    }
                    Some(other) => self.dispatch_l2(&other),
                }
            }
            Err(EptFault::L0 { gpa, fault: L0Fault::Denied(_) }) if vm.ept01().is_protected(gpa) => {
                self.let_table_go_to_l2(gpa);
                self.keep_interrupted_event(exit);
                Outcome::Resume
            }
            Err(EptFault::L0 { gpa, fault }) => {
                Outcome::End(crate::RunEnd::Internal(format!("EPT01 at {gpa} for L2: {fault}")))
            }
            // The tables changed during the walk (or the fault went to L1, above): L2 tries again.
            Err(_) => {
                self.keep_interrupted_event(exit);
                Outcome::Resume
            }
        }
    }

    /// Has the engine execute the instruction at RIP of whoever runs, with the devices of L1's machine on its
    /// buses. `Some`: the exit that it ended in.
    pub(crate) fn emulate_instruction(&mut self) -> Option<VmExit> {
        let vm = self.vm().clone();
        let mut bus = CpuBus { board: vm.board(), cpu: self.index, ram: vm.ram() };
        let ept12 = self.nested.as_ref().filter(|n| n.state.in_guest()).and_then(|n| ept12(n));
        if ept12.is_none() {
            // L1, or an L2 whose addresses are L1's.
            return self.vcpu.emulate(&mut self.vmcs, &mut self.regs, &mut bus);
        }
        let mut bus = L2Bus { bus, ram: vm.ram(), ept12 };
        self.vcpu.emulate(&mut self.vmcs, &mut self.regs, &mut bus)
    }

    /// Hands on the exit that [`Self::emulate_instruction`] ended in.
    pub(crate) fn dispatch_emulated(&mut self, exit: &VmExit) -> Outcome {
        if self.in_l2() {
            return self.dispatch_l2(exit);
        }
        self.keep_interrupted_event(exit);
        self.dispatch(exit)
    }

    /// Time until L1's VMX-preemption timer expires, if L2 runs with one.
    pub(crate) fn timer12_left(&self) -> Option<Duration> {
        if !self.in_l2() {
            return None;
        }
        let timer = self.nested.as_ref()?.timer12?;
        let engine = self.vm().engine();
        let ticks = u64::from(timer.remaining(engine.tsc())) << self.nested.as_ref()?.rate;
        let ns = devices::clock::mul_div_up(ticks, 1_000_000_000, engine.tsc_frequency().max(1));
        Some(Duration::from_nanos(ns))
    }

    /// Whether L2, waiting in MWAIT, is due an exit to L1 that its RFLAGS.IF does not hold back.
    pub(crate) fn exits_while_waiting(&self) -> bool {
        let Some(n) = self.nested.as_ref() else { return false };
        let Some(vmcs12) = n.state.current() else { return false };
        let interrupts = self.board().interrupts();
        let now = self.vm().engine().tsc();
        pin12(vmcs12, PinbasedControls::EXTERNAL_INTERRUPT_EXITING) && interrupts.has_interrupt(self.index)
            || pin12(vmcs12, PinbasedControls::NMI_EXITING)
                && interrupts.with_lapic(self.index, |l| l.nmi_pending()) == Some(true)
            || n.timer12.is_some_and(|t| t.expired(now))
            || n.mtf_injected
            || vmcs12.get32(Field::PrimaryControls)
                & (PrimaryControls::MONITOR_TRAP_FLAG
                    | PrimaryControls::INTERRUPT_WINDOW_EXITING
                    | PrimaryControls::NMI_WINDOW_EXITING)
                    .bits()
                != 0
    }

    // ---- before each entry with VMCS02 -------------------------------------------------------------

    /// Deals with what came for L1 or L2 while L2 ran. `Some`: an exit to L1 is due instead of an
    /// entry.
    pub(crate) fn prepare_l2(&mut self) -> Option<VmExit> {
        vmcs01::sync_long_mode(&mut self.vmcs);
        self.take_table_writes();
        if !self.vmcs.controls.entry_interruption.is_valid()
            && let Some(e) = self.event.take()
        {
            e.inject(&mut self.vmcs.controls);
        }
        let injecting = self.vmcs.controls.entry_interruption.is_valid();
        let vm = self.vm().clone();
        let interrupts = vm.board().interrupts();
        let (nmi, init) = interrupts
            .with_lapic(self.index, |l| (l.nmi_pending(), l.init_or_sipi_pending()))
            .unwrap_or_default();
        self.process_posted_interrupts();
        let interrupt = interrupts.has_interrupt(self.index);
        let vmcs12 = self.nested.as_ref().and_then(|n| n.state.current())?;
        let nmi_exits = pin12(vmcs12, PinbasedControls::NMI_EXITING);
        let interrupt_exits = pin12(vmcs12, PinbasedControls::EXTERNAL_INTERRUPT_EXITING);
        let acknowledge = ExitControls::from_bits_truncate(vmcs12.get32(Field::ExitControls))
            .contains(ExitControls::ACK_INTERRUPT_ON_EXIT);
        // The event that the entry injects comes first; the exit is then due at once (§27.7).
        let mut at_once = false;
        if init
            && !injecting
            && let Some(exit) = self.init_or_sipi_exit()
        {
            return Some(exit);
        }
        if nmi && nmi_exits {
            if !injecting {
                interrupts.with_lapic(self.index, |l| l.take_nmi());
                let mut exit = VmExit::new(ExitReason::ExceptionOrNmi);
                exit.interruption_info = InterruptionInfo::new(exception::NMI, EventType::Nmi, false);
                return Some(exit);
            }
            at_once = true;
        } else if interrupt && interrupt_exits {
            if !injecting {
                let mut exit = VmExit::new(ExitReason::ExternalInterrupt);
                if acknowledge && let Some(vector) = interrupts.take_interrupt(self.index) {
                    exit.interruption_info = InterruptionInfo::new(vector, EventType::External, false);
                }
                return Some(exit);
            }
            at_once = true;
        }
        self.deliver_to_l2(injecting, nmi && !nmi_exits, interrupt && !interrupt_exits);
        let deadline = if at_once { 0 } else { self.timer_ticks() };
        let now = vm.engine().tsc();
        if let Some(n) = self.nested.as_ref() {
            let timer12 = n.timer12.map(|t| t.remaining(now));
            merge::set_timer(&mut self.vmcs, Some(deadline), timer12);
        }
        None
    }

    /// The exit that a waiting INIT or SIPI causes: L2 that waits for a SIPI takes that alone, any
    /// other L2 INIT alone (SDM Vol. 3C §26.2).
    fn init_or_sipi_exit(&self) -> Option<VmExit> {
        let waiting = self.vmcs.guest.activity == Activity::WaitForSipi;
        let exit = self.board().interrupts().with_lapic(self.index, |l| {
            let sipi = l.take_sipi();
            if waiting {
                sipi.map(|page| VmExit::new(ExitReason::Sipi).qualified(page.into()))
            } else {
                l.take_init().then(|| VmExit::new(ExitReason::Init))
            }
        });
        exit.flatten()
    }

    /// The notification vector of L1's posted interrupts reaches L2 without an exit to L1 (SDM
    /// Vol. 3C §30.6).
    fn process_posted_interrupts(&mut self) {
        let vm = self.vm().clone();
        let Some(vmcs12) = self.nested.as_ref().and_then(|n| n.state.current()) else { return };
        if !pin12(vmcs12, PinbasedControls::POSTED_INTERRUPTS) {
            return;
        }
        let vector = vmcs12.get(Field::PostedInterruptVector) as u8;
        if vm.board().interrupts().take_notification(self.index, vector) {
            engine::post_interrupts(vm.memory(), &mut self.vmcs);
            self.devices_touched();
        }
    }

    /// Gives L2 what L1 lets it take itself, or asks for the window.
    fn deliver_to_l2(&mut self, injecting: bool, nmi: bool, interrupt: bool) {
        let vm = self.vm().clone();
        let interrupts = vm.board().interrupts();
        let mut windows = PrimaryControls::empty();
        let g = &self.vmcs.guest;
        let shadow = g.interruptibility & SHADOW != 0;
        let mut injecting = injecting;
        if nmi {
            let blocked = shadow || g.interruptibility & interruptibility::NMI != 0;
            if !injecting && !blocked && interrupts.with_lapic(self.index, |l| l.take_nmi()) == Some(true) {
                self.vmcs.controls.entry_interruption =
                    InterruptionInfo::new(exception::NMI, EventType::Nmi, false);
                injecting = true;
            } else {
                windows |= PrimaryControls::NMI_WINDOW_EXITING;
            }
        }
        if interrupt {
            let open = !shadow && self.vmcs.guest.rflags & rflags::IF != 0;
            if !injecting
                && open
                && let Some(vector) = interrupts.take_interrupt(self.index)
            {
                self.vmcs.controls.entry_interruption =
                    InterruptionInfo::new(vector, EventType::External, false);
            } else {
                windows |= PrimaryControls::INTERRUPT_WINDOW_EXITING;
            }
        }
        if let Some(n) = self.nested.as_ref()
            && let Some(vmcs12) = n.state.current()
        {
            merge::set_windows(&mut self.vmcs, vmcs12, windows);
        }
    }

    /// The TSC offset of the context that runs, after L1's TSC moved.
    pub(crate) fn refresh_tsc_offset(&mut self) {
        let offset01 = self.msrs.tsc().offset();
        if !self.in_l2() {
            self.vmcs.controls.tsc_offset = offset01;
            return;
        }
        let Some(n) = self.nested.as_mut() else { return };
        n.vmcs01.controls.tsc_offset = offset01;
        let Some(vmcs12) = n.state.current() else { return };
        let primary = PrimaryControls::from_bits_truncate(vmcs12.get32(Field::PrimaryControls));
        let outer = TscView { offset: offset01, ..TscView::IDENTITY };
        let inner = if primary.contains(PrimaryControls::USE_TSC_OFFSETTING) {
            let scaled = secondary12(vmcs12).contains(SecondaryControls::USE_TSC_SCALING);
            let multiplier =
                if scaled { vmcs12.get(Field::TscMultiplier) } else { TscView::IDENTITY.multiplier };
            TscView { offset: vmcs12.get(Field::TscOffset), multiplier }
        } else {
            TscView::IDENTITY
        };
        self.vmcs.controls.tsc_offset = outer.compose(inner).offset;
    }
}
