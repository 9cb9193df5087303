//! KVM and another engine as one: KVM runs the contexts that it can deliver every demanded exit of
//! ([`can_run`]), the other one, which is exact, runs the rest over the same memory and state.
//!
//! It also executes what KVM can't: an instruction that KVM fails to emulate, and one that KVM answered with
//! #UD or #GP although L0 has it (the VMX instructions, CR4.VMXE). For the latter KVM has breakpoints at the
//! guest's handlers of these vectors; at one, the fault is taken back and the instruction executed again by the
//! other engine. There it exits, completes, or faults again, and then the fault is the guest's. The other engine goes on
//! until there has been nothing of that kind for some time.
//!
//! A KVM that gets wrong what nobody can put right ([`Flaw`]) runs nothing at all.
//!
//! State goes from KVM to the other engine whole, and back as far as it differs. Code that the other engine has
//! decoded is dropped when it takes over, as KVM's guests write memory unseen.
//!
//! CR4.VMXE is in KVM's CR4 where KVM takes it, which it does when it could do VMX itself.
//!
//! Not supported, while it is KVM that runs a hypervisor: CR4.VMXE on other hosts (a guest that reads CR4 sees 0, and a
//! write that clears it does not exit); writes to CR0 and CR4 that VMX operation forbids; VMCALL where KVM takes it for a
//! hypercall; a switch to legacy mode between two exits; on AMD processors, breakpoints that a hypervisor sets for
//! itself between two exits.

use std::sync::Arc;

use engine::{
    Activity, CpuidEntry, Engine, EngineError, EngineVmcs, EventWindows, ExitBus, GuestRegs, GuestState,
    HandOvers, InvalidateScope, Kick, LinearFault, LocalApics, Segment, Vcpu, VmExit,
};
use memory::{Gpa, MachineMemory};
use x86_spec::caps::VmxCapabilities;
use x86_spec::controls::{EntryControls, PrimaryControls};
use x86_spec::exception::{GP, UD};
use x86_spec::exit::ExitReason;
use x86_spec::interruption::EventType;
use x86_spec::reg::{cr4, efer, gpr, rflags};
use x86_spec::segment::{AccessRights, seg};

use crate::capabilities::PREEMPTION_TIMER_SHIFT;
use crate::probe::Flaw;
use crate::vcpu::Failure;
use crate::{KvmEngine, KvmVcpu, apics, host_tsc};

/// IA32_VMX_BASIC: whoever is about to use VMX reads the revision identifier in it.
const IA32_VMX_BASIC: u64 = 0x480;
/// How many instructions the exact engine goes on for after what KVM can't do: a few times what it would execute in the
/// time that a hand-over takes. Not a time, so that how busy the host is does not decide what KVM runs.
const LINGER: u64 = 50_000;
/// How often it is looked at whether these are over, in ticks of the preemption timer: about every millisecond.
const QUANTUM: u32 = 1 << 16;
/// DR7: a breakpoint is enabled, or general detection (SDM Vol. 3B §18.2.4).
const DR7_ENABLES: u64 = 0xff | 1 << 13;
/// "No deadline", as L0 says it.
const NEVER: u32 = u32::MAX;

/// Why KVM can't run a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotForKvm {
    /// CPUID and other instructions must exit (the context is not [`engine::Controls::lenient`]).
    #[error("CPUID and other instructions that KVM keeps to itself must exit")]
    Strict,
    /// Exceptions must exit.
    #[error("exceptions {0:#x} must exit")]
    Exceptions(u32),
    /// A primary control asks for what KVM can't do.
    #[error("KVM has nothing for the control {0:?}")]
    Control(PrimaryControls),
    /// It has flaws ([`Flaw`]).
    #[error("this host's KVM gets some things wrong")]
    Flawed,
    /// The context is not active.
    #[error("activity state {0:?}")]
    Activity(Activity),
}

/// Primary controls that a lenient context may have although KVM keeps their exits to itself.
const KEPT: PrimaryControls = PrimaryControls::CR8_LOAD_EXITING
    .union(PrimaryControls::CR8_STORE_EXITING)
    .union(PrimaryControls::RDPMC_EXITING)
    .union(PrimaryControls::MWAIT_EXITING)
    .union(PrimaryControls::MONITOR_EXITING);

/// Whether KVM can run a context of L0 and deliver every exit that it demands.
///
/// # Errors
/// [`NotForKvm`] says what it can't deliver.
pub fn can_run(vmcs: &EngineVmcs, kvm: &VmxCapabilities) -> Result<(), NotForKvm> {
    let c = &vmcs.controls;
    if !c.lenient {
        return Err(NotForKvm::Strict);
    }
    if c.exception_bitmap != 0 {
        return Err(NotForKvm::Exceptions(c.exception_bitmap));
    }
    // Reserved bits that must be 1 mean nothing. KVM looks for an NMI window once in a while, instructions too late.
    let can =
        PrimaryControls::from_bits_truncate(kvm.primary.may_be_one) - PrimaryControls::NMI_WINDOW_EXITING;
    let lacking = c.primary - KEPT - can;
    if !lacking.is_empty() {
        return Err(NotForKvm::Control(lacking));
    }
    match vmcs.guest.activity {
        Activity::Active => Ok(()),
        other => Err(NotForKvm::Activity(other)),
    }
}

/// An engine made of KVM and `S`.
pub struct HybridEngine<S> {
    kvm: KvmEngine,
    soft: Arc<S>,
    flaws: Vec<Flaw>,
}

impl<S: Engine> HybridEngine<S> {
    /// An engine over `memory`, which `soft` runs guests in, too.
    ///
    /// # Errors
    /// As [`KvmEngine::new`].
    pub fn new(memory: Arc<MachineMemory>, soft: S) -> Result<Self, EngineError> {
        // One with flaws runs nothing, so there is nothing to withhold from its guests.
        let kvm = KvmEngine::open(memory)?;
        let flaws = crate::probe::flaws()?;
        Ok(Self { kvm, soft: Arc::new(soft), flaws })
    }

    /// What this host's KVM gets wrong; if anything, the other engine runs all.
    pub fn flaws(&self) -> &[Flaw] {
        &self.flaws
    }
}

impl<S: Engine> HybridEngine<S> {
    /// Why KVM should not have the local APICs, if it should not.
    pub fn without_local_apics(&self) -> Option<&'static str> {
        if !self.flaws.is_empty() {
            Some("the software CPU runs the guest")
        } else if !self.kvm.can_have_local_apics() {
            Some("this KVM lacks KVM_CAP_SPLIT_IRQCHIP")
        } else {
            None
        }
    }

    /// As [`KvmEngine::with_local_apics`]; for guests that are no hypervisors.
    ///
    /// # Errors
    /// As there, and what [`Self::without_local_apics`] says.
    pub fn with_local_apics(self) -> Result<Self, EngineError> {
        if let Some(why) = self.without_local_apics() {
            return Err(crate::unsupported(why));
        }
        Ok(Self { kvm: self.kvm.with_local_apics()?, ..self })
    }
}

impl<S: Engine> Engine for HybridEngine<S> {
    type Vcpu = HybridVcpu<S>;

    /// Those of the exact engine: it runs what KVM can't.
    fn capabilities(&self) -> &VmxCapabilities {
        self.soft.capabilities()
    }

    fn supported_features(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let b = self.soft.supported_features(leaf, subleaf);
        if !self.flaws.is_empty() {
            return b;
        }
        let a = self.kvm.supported_features(leaf, subleaf);
        std::array::from_fn(|i| a[i] & b[i])
    }

    fn tsc_frequency(&self) -> u64 {
        self.kvm.tsc_frequency()
    }

    fn tsc(&self) -> u64 {
        self.kvm.tsc()
    }

    fn create_vcpu(&self) -> Result<HybridVcpu<S>, EngineError> {
        let (kvm, soft) = (self.kvm.create_vcpu()?, self.soft.create_vcpu()?);
        let kick = Arc::new(BothKicks(kvm.kicker(), soft.kicker()));
        Ok(HybridVcpu {
            kvm,
            soft,
            engine: self.soft.clone(),
            memory: self.kvm.shared.memory.clone(),
            capabilities: self.kvm.capabilities().clone(),
            kick,
            shown: true,
            wrote: false,
            mapped: false,
            has_apics: self.kvm.local_apics().is_some(),
            watches: false,
            breakpoints: [0; 2],
            trusts: self.flaws.is_empty(),
            takes_vmxe: false,
            lingers: 0,
            count: HandOvers::default(),
        })
    }

    fn is_lenient(&self) -> bool {
        self.flaws.is_empty()
    }

    fn local_apics(&self) -> Option<Arc<dyn LocalApics>> {
        self.kvm.local_apics()
    }

    fn invalidate(&self, scope: InvalidateScope) {
        self.kvm.invalidate(scope);
        self.soft.invalidate(scope);
    }
}

/// Kicks whichever runs. The other one's next run ends at once, which costs a turn of L0's loop.
struct BothKicks(Arc<dyn Kick>, Arc<dyn Kick>);

impl Kick for BothKicks {
    fn kick(&self) {
        self.0.kick();
        self.1.kick();
    }
}

/// A vCPU of the composed engine.
pub struct HybridVcpu<S: Engine> {
    kvm: KvmVcpu,
    soft: S::Vcpu,
    engine: Arc<S>,
    memory: Arc<MachineMemory>,
    capabilities: VmxCapabilities,
    kick: Arc<BothKicks>,
    /// VMCS and registers have the whole state; KVM has run nothing since they got it.
    shown: bool,
    /// KVM's guest may have written code that the exact engine has decoded.
    wrote: bool,
    /// And paging structures that the exact engine has translations from.
    mapped: bool,
    /// KVM has the local APICs.
    has_apics: bool,
    /// Faults are to be taken back.
    watches: bool,
    /// KVM's breakpoints at the handlers of #UD and #GP; 0 is none.
    breakpoints: [u64; 2],
    /// KVM has no flaws.
    trusts: bool,
    /// KVM takes CR4.VMXE.
    takes_vmxe: bool,
    /// Up to which instruction of its own the exact engine runs KVM's contexts.
    lingers: u64,
    count: HandOvers,
}

impl<S: Engine> HybridVcpu<S> {
    /// Shows what KVM has.
    fn show(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) -> Result<(), Failure> {
        if !self.shown {
            self.kvm.show_all(vmcs, regs)?;
            self.shown = true;
            // What L0 sets before an entry, and KVM's guest may have changed since.
            let long = vmcs.guest.efer & efer::LMA != 0;
            vmcs.controls.entry.set(EntryControls::IA32E_MODE_GUEST, long);
            // What KVM let its guest set is the guest's: writes that leave it alone do not exit.
            let c = &mut vmcs.controls;
            let others = c.cr4_mask & !cr4::VMXE;
            c.cr4_shadow = c.cr4_shadow & !others | vmcs.guest.cr4 & others;
        }
        Ok(())
    }

    /// Runs a context that KVM can run, by KVM or not, until L0 has to know.
    fn enter_lenient(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) -> Result<VmExit, Failure> {
        let ticks = vmcs.guest.preemption_timer;
        let deadline = host_tsc().saturating_add(u64::from(ticks) << PREEMPTION_TIMER_SHIFT);
        let left = || match ticks {
            NEVER => NEVER,
            _ => (deadline.saturating_sub(host_tsc()) >> PREEMPTION_TIMER_SHIFT) as u32,
        };
        loop {
            let exit = if self.kvm.is_unfinished() || !self.lingers(vmcs) {
                self.enter_kvm(vmcs, regs)?
            } else {
                Some(self.go_on(vmcs, regs)?)
            };
            match exit {
                // The exact engine may have gone on long enough.
                Some(VmExit { reason: ExitReason::PreemptionTimer, .. }) if left() > 0 => {}
                Some(exit) => {
                    self.notice(&exit, regs);
                    return Ok(exit);
                }
                None => {}
            }
            vmcs.guest.preemption_timer = left();
        }
    }

    /// Runs KVM. `None` if the exact engine has to go on.
    fn enter_kvm(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) -> Result<Option<VmExit>, Failure> {
        // A fault that L0 raises must not be taken back at the handler.
        if self.watches && injects_watched(vmcs) && !self.kvm.is_unfinished() {
            self.linger();
            return Ok(None);
        }
        if self.shown {
            self.kvm.load_vectors(regs)?;
        }
        self.watch(vmcs)?;
        (self.shown, self.wrote, self.mapped) = (false, true, true);
        self.show_vmxe(vmcs);
        let result = self.kvm.try_enter(vmcs, regs);
        self.hide_vmxe(vmcs);
        match result {
            Err(Failure::Internal { .. }) => {
                let (info, code) = self.kvm.undelivered();
                (vmcs.controls.entry_interruption, vmcs.controls.entry_error_code) = (info, code);
            }
            Err(Failure::Breakpoint) => self.take_back(vmcs),
            other => return other.map(Some),
        }
        self.show(vmcs, regs)?;
        self.count.instructions += 1;
        if self.has_apics {
            return self.step(vmcs, regs);
        }
        self.linger();
        Ok(None)
    }

    /// Has the exact engine execute one instruction of a context of KVM's: while it runs, KVM's local APIC can't interrupt.
    fn step(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) -> Result<Option<VmExit>, Failure> {
        vmcs.controls.primary |= PrimaryControls::MONITOR_TRAP_FLAG;
        let exit = self.go_on(vmcs, regs);
        vmcs.controls.primary -= PrimaryControls::MONITOR_TRAP_FLAG;
        let exit = exit?;
        if apics::needs_apic(&exit, regs.gpr[gpr::RCX]) {
            return Err(Failure::Apic);
        }
        Ok((exit.reason != ExitReason::MonitorTrapFlag).then_some(exit))
    }

    /// Has the exact engine run KVM's contexts for a while. Where KVM can't do one thing there are others nearby, and a
    /// hand-over costs as much as some thousand instructions.
    fn linger(&mut self) {
        self.lingers = self.soft.instructions().saturating_add(LINGER);
    }

    /// Whether the exact engine is to run a context that KVM can run. With VMX, it has all of legacy mode, where no
    /// handlers are found, and what is debugged by breakpoints, as KVM has ours in their place.
    fn lingers(&self, vmcs: &EngineVmcs) -> bool {
        let g = &vmcs.guest;
        self.soft.instructions() < self.lingers
            || self.watches && (g.efer & efer::LMA == 0 || self.shown && g.dr7 & DR7_ENABLES != 0)
    }

    /// Has the exact engine run a context of KVM's for a while, or as long as L0 says.
    fn go_on(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) -> Result<VmExit, Failure> {
        self.show(vmcs, regs)?;
        self.take_over();
        // KVM's guest changed its paging structures without a word.
        if std::mem::take(&mut self.mapped) {
            self.engine.invalidate(InvalidateScope::Vpid(vmcs.controls.vpid));
        }
        vmcs.guest.preemption_timer = vmcs.guest.preemption_timer.min(QUANTUM);
        self.count.entries += 1;
        Ok(self.soft.enter(vmcs, regs))
    }

    /// The exact engine drops code that KVM's guest may have written.
    fn take_over(&mut self) {
        if std::mem::take(&mut self.wrote) {
            self.memory.written_anywhere();
        }
    }

    /// L0 has CR4.VMXE in the read shadow alone; KVM, where it takes the bit, in CR4.
    fn show_vmxe(&self, vmcs: &mut EngineVmcs) {
        let g = &mut vmcs.guest;
        g.cr4 &= !cr4::VMXE;
        if self.takes_vmxe {
            g.cr4 |= vmcs.controls.cr4_shadow & cr4::VMXE;
        }
    }

    fn hide_vmxe(&self, vmcs: &mut EngineVmcs) {
        if self.takes_vmxe {
            let shadow = &mut vmcs.controls.cr4_shadow;
            *shadow = *shadow & !cr4::VMXE | vmcs.guest.cr4 & cr4::VMXE;
            vmcs.guest.cr4 &= !cr4::VMXE;
        }
    }

    // ---- faults that are taken back ---------------------------------------------------------------

    /// Notices a guest that is about to use VMX, or does.
    fn notice(&mut self, exit: &VmExit, regs: &GuestRegs) {
        // Then it is offered no VMX.
        if self.has_apics {
            return;
        }
        let asks = exit.reason == ExitReason::Rdmsr && regs.gpr[gpr::RCX] & 0xffff_ffff == IA32_VMX_BASIC;
        let uses = is_vmx_instruction(exit.reason);
        if (asks || uses) && !self.watches {
            self.watches = true;
            self.kvm.keep_hypercall_code();
            // The IDT may be elsewhere after any exit.
            self.kvm.show_all_at_exits();
        }
        if uses {
            self.linger();
        }
    }

    /// Keeps KVM's breakpoints at the guest's handlers of #UD and #GP.
    fn watch(&mut self, vmcs: &EngineVmcs) -> Result<(), Failure> {
        if !self.watches {
            return Ok(());
        }
        let want = [UD, GP].map(|vector| self.handler(vmcs, vector).unwrap_or(0));
        if want != self.breakpoints {
            let list: Vec<u64> = want.into_iter().filter(|at| *at != 0).collect();
            self.kvm.set_breakpoints(&list)?;
            self.breakpoints = want;
        }
        Ok(())
    }

    /// The offset in a 64-bit IDT's gate (SDM Vol. 3A §6.14.1).
    fn handler(&self, vmcs: &EngineVmcs, vector: u8) -> Option<u64> {
        let g = &vmcs.guest;
        let at = u32::from(vector) * 16;
        if g.efer & efer::LMA == 0 || at + 15 > g.idtr.limit {
            return None;
        }
        let gate = self.kvm.peek(g.idtr.base.wrapping_add(at.into()), 16)?;
        let word = |i: usize| u64::from_le_bytes(gate[i..i + 8].try_into().unwrap_or_default());
        let (low, high) = (word(0), word(8));
        let present = low >> 47 & 1 != 0;
        present.then_some(low & 0xffff | low >> 32 & 0xffff_0000 | high << 32)
    }

    /// The code or data segment of a selector in the GDT (SDM Vol. 3A §3.4.5).
    fn descriptor(&self, g: &GuestState, selector: u16) -> Option<Segment> {
        let at = u32::from(selector & !7);
        // Selectors of the LDT are not looked up.
        if selector & 4 != 0 || at + 7 > g.gdtr.limit {
            return None;
        }
        let bytes = self.kvm.peek(g.gdtr.base.wrapping_add(at.into()), 8)?;
        let d = u64::from_le_bytes(bytes.try_into().ok()?);
        let access = AccessRights::from_descriptor_high((d >> 32) as u32);
        let limit = (d & 0xffff | d >> 32 & 0xf_0000) as u32;
        let limit = if access.0 & AccessRights::G != 0 { limit << 12 | 0xfff } else { limit };
        let base = d >> 16 & 0xff_ffff | d >> 32 & 0xff00_0000;
        (access.is_code_or_data() && access.present()).then_some(Segment { base, limit, access, selector })
    }

    /// At the first instruction of a handler: makes the state that of before the fault, if that can be told.
    fn take_back(&mut self, vmcs: &mut EngineVmcs) {
        let g = &mut vmcs.guest;
        let rip = g.rip;
        let [ud, gp] = self.breakpoints;
        if rip != ud && rip != gp {
            return;
        }
        // Of the two, #GP pushes an error code.
        let frame = g.rsp.wrapping_add(if rip == gp { 8 } else { 0 });
        let Some(bytes) = self.kvm.peek(frame, 40) else { return };
        let word = |i: usize| u64::from_le_bytes(bytes[8 * i..8 * i + 8].try_into().unwrap_or_default());
        let [rip, cs, flags, rsp, ss] = std::array::from_fn(word);
        if cs as u16 != g.segments[seg::CS].selector {
            let (Some(cs), Some(ss)) = (self.descriptor(g, cs as u16), self.descriptor(g, ss as u16)) else {
                return;
            };
            (g.segments[seg::CS], g.segments[seg::SS]) = (cs, ss);
        }
        (g.rip, g.rsp, g.rflags) = (rip, rsp, flags & !rflags::RF);
        g.interruptibility &= engine::interruptibility::NMI;
    }
}

/// Whether it is the exit of a VMX instruction.
fn is_vmx_instruction(reason: ExitReason) -> bool {
    use ExitReason as R;
    matches!(
        reason,
        R::Vmcall
            | R::Vmclear
            | R::Vmlaunch
            | R::Vmptrld
            | R::Vmptrst
            | R::Vmread
            | R::Vmresume
            | R::Vmwrite
            | R::Vmxoff
            | R::Vmxon
            | R::Invept
            | R::Invvpid
    )
}

/// Whether the entry delivers #UD or #GP.
fn injects_watched(vmcs: &EngineVmcs) -> bool {
    let info = vmcs.controls.entry_interruption;
    info.is_valid() && info.event_type() == EventType::HardwareException && matches!(info.vector(), UD | GP)
}

#[cfg(test)]
mod tests;

impl<S: Engine> Vcpu for HybridVcpu<S> {
    fn enter(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) -> VmExit {
        let runs = if self.trusts { can_run(vmcs, &self.capabilities) } else { Err(NotForKvm::Flawed) };
        let result = match runs {
            Ok(()) => self.enter_lenient(vmcs, regs),
            Err(why) => {
                tracing::trace!("not for KVM: {why}");
                let result = self.show(vmcs, regs).map(|()| {
                    self.take_over();
                    self.count.entries += 1;
                    self.soft.enter(vmcs, regs)
                });
                // L1 will look at its guest's exit.
                if !vmcs.controls.lenient {
                    self.linger();
                }
                result
            }
        };
        result.unwrap_or_else(|failure| self.kvm.failed(&failure, vmcs))
    }

    fn emulate(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        bus: &mut dyn ExitBus,
    ) -> Option<VmExit> {
        if self.kvm.is_open() {
            return self.kvm.emulate(vmcs, regs, bus);
        }
        match self.show(vmcs, regs) {
            Ok(()) => self.soft.emulate(vmcs, regs, bus),
            Err(failure) => Some(self.kvm.failed(&failure, vmcs)),
        }
    }

    fn settle(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        bus: &mut dyn ExitBus,
    ) -> Option<VmExit> {
        if !self.kvm.is_unfinished() {
            return None;
        }
        let exit = self.kvm.settle(vmcs, regs, bus);
        self.hide_vmxe(vmcs);
        exit
    }

    fn read_linear(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        linear: u64,
        buf: &mut [u8],
    ) -> Result<(), LinearFault> {
        match self.shown {
            true => self.soft.read_linear(vmcs, regs, linear, buf),
            false => self.kvm.read_linear(vmcs, regs, linear, buf),
        }
    }

    fn write_linear(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        linear: u64,
        buf: &[u8],
    ) -> Result<(), LinearFault> {
        match self.shown {
            true => self.soft.write_linear(vmcs, regs, linear, buf),
            false => self.kvm.write_linear(vmcs, regs, linear, buf),
        }
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    /// Of the exact engine alone: KVM does not count.
    fn instructions(&self) -> u64 {
        self.soft.instructions()
    }

    fn translate(&mut self, vmcs: &EngineVmcs, regs: &GuestRegs, linear: u64) -> Option<Gpa> {
        match self.shown {
            true => self.soft.translate(vmcs, regs, linear),
            false => self.kvm.translate(vmcs, regs, linear),
        }
    }

    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<(), EngineError> {
        if !self.trusts {
            return Ok(());
        }
        self.kvm.set_cpuid(entries)?;
        self.takes_vmxe = self.kvm.takes_cr4(cr4::VMXE)?;
        Ok(())
    }

    fn event_windows(&self) -> Option<EventWindows> {
        self.kvm.event_windows()
    }

    fn hand_overs(&self) -> Option<HandOvers> {
        Some(self.count)
    }

    fn vmcs_accesses(&self) -> Option<engine::VmcsAccesses> {
        self.soft.vmcs_accesses()
    }

    fn failure(&self) -> Option<&str> {
        self.kvm.failure().or_else(|| self.soft.failure())
    }
}
