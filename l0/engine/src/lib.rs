//! The seam between L0 and whatever runs guests: one level of hardware virtualization.
//!
//! An [`Engine`] makes [`Vcpu`]s; a vCPU runs the context that an [`EngineVmcs`]
//! describes until that context exits, and reports the exit in the SDM's own terms
//! ([`VmExit`]). It knows nothing of L1 and L2: L0 enters it with VMCS01 or with VMCS02.
//!
//! Not here: VM-entry checks on behalf of L1 and everything else of VMX root operation
//! (that is `vmx-emu`).

mod exit;
pub mod pmu;
mod posted;
mod regs;
mod vmcs;

pub use exit::{EntryFailure, VmExit};
pub use pmu::Pmu;
pub use posted::post_interrupts;
pub use regs::{FpuState, FxArea, GuestRegs, MONITOR_LINE, Monitor, Msrs, VectorRegister};
pub use vmcs::{
    Activity, Controls, DescriptorTable, EngineVmcs, GuestState, Segment, interruptibility, pending_debug,
};

use std::sync::Arc;

use memory::Gpa;
use x86_spec::caps::VmxCapabilities;

/// What an engine-wide or vCPU-wide invalidation covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidateScope {
    /// Every cached translation.
    All,
    /// Guest-physical and combined mappings of one EPTP (INVEPT single-context).
    Eptp(u64),
    /// Linear and combined mappings of one VPID, global ones too (INVVPID single-context).
    Vpid(u16),
    /// As [`Self::Vpid`] but global translations may stay (INVVPID type 3).
    VpidRetainGlobals(u16),
    /// One linear address of one VPID (INVVPID type 0).
    Address {
        /// The VPID.
        vpid: u16,
        /// The linear address.
        linear: u64,
    },
    /// Mappings that reach machine memory pages `first..first + pages`.
    Machine {
        /// First page number.
        first: u64,
        /// Number of pages.
        pages: u64,
    },
}

/// Why an engine could not be made or could not make a vCPU.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The host lacks something that the engine can't do without.
    #[error("this host can't run the {engine} engine: {reason}")]
    Unsupported {
        /// The engine's name.
        engine: &'static str,
        /// What is missing.
        reason: String,
    },
    /// A call to the host failed.
    #[error("{call} failed: {source}")]
    Host {
        /// The call.
        call: &'static str,
        /// The host's answer.
        source: std::io::Error,
    },
}

/// An interrupt message as a device writes it to memory (SDM Vol. 3A §11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Message address: FEE0_0000H with destination and its mode.
    pub address: u32,
    /// Message data: vector, delivery mode, trigger mode.
    pub data: u32,
}

/// Local APICs that the engine has, with all that leads to a vCPU: the guest's accesses to their registers do
/// not exit, HLT waits in the engine, and interrupts and NMIs are delivered without L0. What is outside (I/O
/// APIC, 8259) stays L0's:
///
/// - an interrupt of the 8259 that L0 injects as an external interrupt goes to the processor through LINT0;
///   [`Vcpu::event_windows`] says whether that lets it through now, "interrupt-window exiting" exits when it does;
/// - the end of an interrupt whose message is one of [`Self::set_level_messages`] exits with "virtualized EOI" (SDM
///   Vol. 3C §30.1.4), its vector in the exit qualification.
pub trait LocalApics: Send + Sync {
    /// Delivers a message. Returns whether an APIC accepted it.
    fn send(&self, message: Message) -> bool;
    /// The messages of all level-triggered pins of the I/O APIC, by pin.
    fn set_level_messages(&self, messages: &[Option<Message>]);
    /// The frequency of their timers, in hertz.
    fn timer_frequency(&self) -> u32;
}

/// Something that runs guests of one level.
pub trait Engine: Send + Sync {
    /// Its vCPU type.
    type Vcpu: Vcpu;

    /// What it can do, as capability MSRs.
    fn capabilities(&self) -> &VmxCapabilities;

    /// The feature bits that guests may be shown because the engine executes them:
    /// for one CPUID (sub)leaf, masks of EAX, EBX, ECX, EDX. Leaves that hold no feature
    /// bits give zeros.
    fn supported_features(&self, leaf: u32, subleaf: u32) -> [u32; 4];

    /// Frequency of the engine's TSC in Hz; guests see TSC + offset.
    fn tsc_frequency(&self) -> u64;

    /// The engine's TSC now.
    fn tsc(&self) -> u64;

    /// A new vCPU.
    ///
    /// # Errors
    /// [`EngineError`] when the host refuses.
    fn create_vcpu(&self) -> Result<Self::Vcpu, EngineError>;

    /// Whether it makes use of [`Controls::lenient`].
    fn is_lenient(&self) -> bool {
        false
    }

    /// Whether VMX instructions of its guests are executed beneath it, by a host that virtualizes VMX itself. L0
    /// sees neither them nor the guests that they start.
    fn serves_vmx(&self) -> bool {
        false
    }

    /// The local APICs, if they are the engine's and not L0's.
    fn local_apics(&self) -> Option<Arc<dyn LocalApics>> {
        None
    }

    /// Drops cached translations of all vCPUs. Takes effect in each vCPU before its next
    /// guest instruction.
    fn invalidate(&self, scope: InvalidateScope);
}

/// Makes a running [`Vcpu::enter`] return soon with [`ExternalInterrupt`], or the next
/// one, if none is running. Kicks don't count: several may give one exit.
///
/// [`ExternalInterrupt`]: x86_spec::exit::ExitReason::ExternalInterrupt
pub trait Kick: Send + Sync {
    /// Kicks.
    fn kick(&self);
}

/// Ports and guest-physical addresses that are not memory, for [`Vcpu::emulate`].
/// `size` is 1, 2, 4 or (memory only) 8 bytes; results are zero-extended.
pub trait ExitBus {
    /// Whether an unmapped guest-physical address is on the bus, for a read or a write; if not, the access exits as in
    /// [`Vcpu::enter`].
    fn is_device(&mut self, gpa: Gpa, write: bool) -> bool {
        let _ = (gpa, write);
        true
    }
    /// A read of guest-physical memory that no EPT entry maps.
    fn mmio_read(&mut self, gpa: Gpa, size: u8) -> u64;
    /// A write to guest-physical memory that no EPT entry maps for writing.
    fn mmio_write(&mut self, gpa: Gpa, size: u8, value: u64);
    /// A read of an I/O port.
    fn pio_read(&mut self, port: u16, size: u8) -> u32;
    /// A write to an I/O port.
    fn pio_write(&mut self, port: u16, size: u8, value: u32);
}

/// Why an access to guest-linear memory can't be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearFault {
    /// The guest gets an exception.
    Exception {
        /// Vector.
        vector: u8,
        /// Error code, if it has one.
        error_code: Option<u32>,
        /// #PF: the linear address, for CR2.
        address: u64,
    },
    /// The access causes this VM exit.
    Exit(VmExit),
}

/// Accesses to shadow VMCSs, which do not exit (SDM Vol. 3C §25.10).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VmcsAccesses {
    /// VMREADs.
    pub vmreads: u64,
    /// VMWRITEs.
    pub vmwrites: u64,
}

/// How often the parts of an engine that is made of two handed the guest to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HandOvers {
    /// Single instructions that the first part could not execute, executed by the second.
    pub instructions: u64,
    /// Entries of contexts that only the second part can run.
    pub entries: u64,
}

/// Which events a vCPU takes at its next entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventWindows {
    /// External interrupts.
    pub interrupt: bool,
    /// NMIs.
    pub nmi: bool,
}

/// What CPUID gives for one leaf or subleaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX before.
    pub leaf: u32,
    /// ECX before, for leaves that have subleaves.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX and EDX after.
    pub registers: [u32; 4],
}

/// One virtual CPU of an engine.
pub trait Vcpu: Send {
    /// Runs the context of `vmcs` and `regs` from VM entry to VM exit. Guest state,
    /// exit information and the preemption timer are written back to `vmcs`.
    fn enter(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) -> VmExit;

    /// Executes the one instruction at RIP (all iterations of a string instruction up to
    /// an event) with accesses to unmapped guest-physical memory and to ports going to
    /// `bus` instead of exiting. `None` when it completed (or faulted into the guest);
    /// otherwise the exit that it caused. Controls of `vmcs` other than I/O and EPT
    /// violations hold as in [`Self::enter`].
    fn emulate(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        bus: &mut dyn ExitBus,
    ) -> Option<VmExit>;

    /// Makes `vmcs` and `regs` show the state after the instruction that [`Self::emulate`] executed. An
    /// engine may leave that to the next [`Self::enter`], so this comes before anything that reads the
    /// state, changes it or injects an event. It may also leave segment, table and control registers as an
    /// earlier exit showed them at exits for accesses, HLT and interrupt windows; this brings them. Further accesses of the instruction go to `bus`. `None`, or an exit
    /// that the rest of the instruction caused; a fault of the instruction is left as the event to inject.
    fn settle(
        &mut self,
        _vmcs: &mut EngineVmcs,
        _regs: &mut GuestRegs,
        _bus: &mut dyn ExitBus,
    ) -> Option<VmExit> {
        None
    }

    /// Reads guest-linear memory as a data access of the instruction at RIP would, with its effects
    /// on accessed and dirty flags; for operands of instructions that L0 executes on the guest's
    /// behalf.
    ///
    /// # Errors
    /// [`LinearFault`]; `buf` is undefined then.
    fn read_linear(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        linear: u64,
        buf: &mut [u8],
    ) -> Result<(), LinearFault>;

    /// Writes guest-linear memory likewise: all of `buf` or, with a fault, nothing.
    ///
    /// # Errors
    /// [`LinearFault`].
    fn write_linear(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        linear: u64,
        buf: &[u8],
    ) -> Result<(), LinearFault>;

    /// A handle to kick this vCPU from another thread.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// Guest instructions executed so far (for engines that count, else 0).
    fn instructions(&self) -> u64;

    /// Guest-physical translation for L0's own use (debuggers, reports): the linear
    /// address translated with the guest's current paging, without any side effect.
    fn translate(&mut self, vmcs: &EngineVmcs, regs: &GuestRegs, linear: u64) -> Option<Gpa>;

    /// What CPUID is to give, for engines that execute it without an exit. They keep the bits that reflect
    /// guest state (OSXSAVE, the size of the XSAVE area …) up to date themselves.
    ///
    /// # Errors
    /// [`EngineError`] when the host does not take the table.
    fn set_cpuid(&mut self, _entries: &[CpuidEntry]) -> Result<(), EngineError> {
        Ok(())
    }

    /// Which events can be injected now, where that does not follow from the VMCS's RFLAGS and interruptibility
    /// state, as these may be those of a guest of the guest ([`Engine::serves_vmx`]), or as the engine has the local
    /// APIC, which the 8259's interrupts have to pass ([`LocalApics`]). `None`: it does.
    fn event_windows(&self) -> Option<EventWindows> {
        None
    }

    /// How often the engine handed the guest to another one, for engines that are made of two.
    fn hand_overs(&self) -> Option<HandOvers> {
        None
    }

    /// VMREADs and VMWRITEs that did not exit, for engines that count them.
    fn vmcs_accesses(&self) -> Option<VmcsAccesses> {
        None
    }

    /// Why the last VM entry failed, in words, where the engine knows more than the exit says.
    fn failure(&self) -> Option<&str> {
        None
    }
}
