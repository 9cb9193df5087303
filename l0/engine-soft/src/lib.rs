//! A software x86-64 CPU in VMX non-root operation.
//!
//! It decodes guest code into blocks of specialised handlers ([`ops`]), runs vector, x87 and rare
//! integer instructions on the host's own units ([`thunk`]), makes host code of what runs often
//! ([`translate`]), translates addresses in two
//! dimensions ([`mmu`]), and exits as the SDM says ([`system`]).
//!
//! Not supported: see the head of each module; in short 5-level paging, protection keys,
//! AVX-512, AMX, CET, SMM, hardware task switches beyond their VM exit.

mod arena;
pub mod block;
pub mod cpu;
mod decode;
pub mod mmu;
pub mod op;
pub mod operand;
pub mod ops;
mod run;
pub mod system;
pub mod thunk;
mod translate;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use engine::{
    Activity, Engine, EngineError, EngineVmcs, ExitBus, GuestRegs, InvalidateScope, Kick, LinearFault, Vcpu,
    VmExit,
};
use memory::{Gpa, MachineMemory};
use x86_spec::caps::VmxCapabilities;
use x86_spec::controls::SecondaryControls;
use x86_spec::exit::ExitReason;

use block::{BlockCache, Watcher, WrittenPages};
use cpu::{CodeSize, Cpu, Reason, Shared};
use mmu::Mmu;
use system::shadow_vmcs::ShadowLayout;

/// Invalidations that wait for a vCPU. Bounded: past the bound everything goes.
#[derive(Debug, Default)]
pub struct Requests(Mutex<Vec<InvalidateScope>>);

impl Requests {
    const MAX: usize = 256;

    fn push(&self, scope: InvalidateScope) {
        let mut list = self.0.lock().unwrap_or_else(|e| e.into_inner());
        if list.len() >= Self::MAX {
            list.clear();
            list.push(InvalidateScope::All);
        } else {
            list.push(scope);
        }
    }

    fn take(&self) -> Vec<InvalidateScope> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(|e| e.into_inner()))
    }
}

/// What the engine keeps of each vCPU to reach it from other threads.
#[derive(Clone)]
struct Remote {
    shared: Arc<Shared>,
    requests: Arc<Requests>,
}

/// The software engine.
pub struct SoftEngine {
    memory: Arc<MachineMemory>,
    capabilities: VmxCapabilities,
    tsc_frequency: u64,
    vcpus: Mutex<Vec<Remote>>,
    shadow_layout: Arc<ShadowLayout>,
    translate_after: u32,
}

impl SoftEngine {
    /// A software engine over `memory`.
    ///
    /// # Errors
    /// [`EngineError::Unsupported`] when the host's processor lacks what thunks need.
    pub fn new(memory: Arc<MachineMemory>) -> Result<Self, EngineError> {
        Ok(Self {
            memory,
            capabilities: system::capabilities::capabilities(),
            tsc_frequency: system::capabilities::tsc_frequency(),
            vcpus: Mutex::new(Vec::new()),
            shadow_layout: Arc::default(),
            translate_after: translate::THRESHOLD,
        })
    }

    /// The same, but code is translated after that many executions of a block; 0: never, all is
    /// interpreted.
    #[must_use]
    pub fn with_translation_after(mut self, executions: u32) -> Self {
        self.translate_after = executions;
        self
    }

    /// The same with VMCS shadowing: vCPUs execute VMREAD and VMWRITE against shadow VMCSs of this
    /// layout.
    #[must_use]
    pub fn with_vmcs_shadowing(mut self, layout: ShadowLayout) -> Self {
        if !layout.is_empty() {
            self.capabilities.secondary.may_be_one |= SecondaryControls::VMCS_SHADOWING.bits();
        }
        self.shadow_layout = Arc::new(layout);
        self
    }
}

impl Engine for SoftEngine {
    type Vcpu = SoftVcpu;

    fn capabilities(&self) -> &VmxCapabilities {
        &self.capabilities
    }
    fn supported_features(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        match leaf {
            0xa => x86_spec::pmu::LEAF,
            _ => thunk::supported_features(leaf, subleaf),
        }
    }
    fn tsc_frequency(&self) -> u64 {
        self.tsc_frequency
    }
    fn tsc(&self) -> u64 {
        system::capabilities::host_tsc()
    }

    fn create_vcpu(&self) -> Result<SoftVcpu, EngineError> {
        let mut cpu = Cpu::new(self.memory.clone())?;
        cpu.shadow_layout = self.shadow_layout.clone();
        cpu.translator.set_threshold(self.translate_after);
        let remote = Remote { shared: cpu.shared.clone(), requests: cpu.requests.clone() };
        self.memory.add_code_watcher(Arc::new(Watcher {
            written: cpu.written_pages.clone(),
            shared: cpu.shared.clone(),
        }));
        self.vcpus.lock().unwrap_or_else(|e| e.into_inner()).push(remote);
        Ok(SoftVcpu { cpu })
    }

    fn invalidate(&self, scope: InvalidateScope) {
        for v in self.vcpus.lock().unwrap_or_else(|e| e.into_inner()).iter() {
            v.requests.push(scope);
            v.shared.invalidate.store(true, Ordering::SeqCst);
            v.shared.notify();
        }
    }
}

impl Cpu {
    /// A processor after RESET over `memory`.
    ///
    /// # Errors
    /// [`EngineError::Host`] when the host refuses executable memory for thunks.
    pub fn new(memory: Arc<MachineMemory>) -> Result<Box<Self>, EngineError> {
        let thunks = thunk::ThunkCache::new()
            .map_err(|source| EngineError::Host { call: "mapping thunk memory", source })?;
        let translator = translate::Translator::new()
            .map_err(|source| EngineError::Host { call: "mapping memory for translated code", source })?;
        let mut blocks = BlockCache::default();
        blocks.untranslated = translator.untranslated();
        let regs = GuestRegs::reset();
        let guest = engine::GuestState::default();
        let mut cpu = Box::new(Self {
            regs: [0; 20],
            flags: 0x200,
            cpl: 0,
            code_size: CodeSize::Bits16,
            block_mode: 0,
            ctx: 0,
            icount: 0,
            rflags_other: 0,
            mmu: Mmu::new(memory.base_ptr(), memory.size()),
            block: std::ptr::null(),
            ip: 0,
            reason: Reason::None,
            segments: guest.segments,
            gdtr: guest.gdtr,
            idtr: guest.idtr,
            cr0: guest.cr0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            monitor: None,
            xcr0: regs.xcr0,
            pdptes: [0; 4],
            dr: [0; 4],
            dr6: regs.dr6,
            dr7: guest.dr7,
            debugctl: 0,
            sysenter: [0; 3],
            pat: guest.pat,
            msrs: regs.msrs,
            fpu: regs.fpu,
            activity: Activity::Active,
            interruptibility: 0,
            pending_debug: 0,
            pml_index: guest.pml_index,
            delivering: None,
            delivering_length: 0,
            controls: engine::Controls::default(),
            timer_deadline: None,
            single: false,
            force_single: false,
            virtual_apic: system::virtual_apic::VirtualApic::default(),
            shadow_layout: Arc::default(),
            vmcs_accesses: engine::VmcsAccesses::default(),
            boundary: system::pending::Boundary::default(),
            pmu: regs.pmu,
            perf_global_ctrl: guest.perf_global_ctrl,
            counting: system::pmu::Counting::default(),
            one_shot: false,
            bus: None,
            thunks,
            link_from: std::ptr::null(),
            link_slot: 0,
            link_start: 0,
            code_full: false,
            written_pages: Arc::new(WrittenPages::default()),
            requests: Arc::new(Requests::default()),
            blocks,
            translator,
            memory,
            shared: Arc::new(Shared::default()),
        });
        cpu.set_rip(guest.rip);
        cpu.mmu_reselect();
        cpu.update_mode();
        Ok(cpu)
    }

    /// The end of a run: state goes back, the exit stays to be seen.
    fn leave(&mut self, exit: VmExit, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) {
        self.reason = Reason::Exit(exit);
        system::vmentry::save(self, vmcs, regs);
        self.reason = Reason::None;
        self.block = std::ptr::null();
    }

    /// Drops cached translations.
    pub(crate) fn invalidate(&mut self, scope: InvalidateScope) {
        match scope {
            InvalidateScope::All | InvalidateScope::Machine { .. } => self.mmu_clear(),
            InvalidateScope::Eptp(eptp) => self.mmu_invalidate_eptp(eptp),
            InvalidateScope::Vpid(vpid) | InvalidateScope::VpidRetainGlobals(vpid) => {
                self.mmu_invalidate_vpid(vpid)
            }
            InvalidateScope::Address { vpid, linear } => self.mmu_invalidate_address(vpid, linear),
        }
    }
}

/// A vCPU of the software engine.
pub struct SoftVcpu {
    cpu: Box<Cpu>,
}

impl SoftVcpu {
    /// The processor, for tests and tools that look inside.
    pub fn cpu(&mut self) -> &mut Cpu {
        &mut self.cpu
    }
}

impl SoftVcpu {
    /// Makes the processor what `vmcs` and `regs` say for the time of one access.
    fn with_state(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        access: impl FnOnce(&mut Cpu) -> cpu::Exec,
    ) -> Result<(), LinearFault> {
        let cpu = &mut *self.cpu;
        system::vmentry::load(cpu, vmcs, regs).map_err(LinearFault::Exit)?;
        let done = access(cpu);
        // Nothing else was moved into the processor.
        system::vmentry::swap_in_place(cpu, regs);
        let reason = std::mem::replace(&mut cpu.reason, Reason::None);
        match (done, reason) {
            (Ok(()), _) => Ok(()),
            (Err(_), Reason::Exit(exit)) => Err(LinearFault::Exit(exit)),
            (Err(_), Reason::Event(e)) => {
                Err(LinearFault::Exception { vector: e.vector, error_code: e.error, address: e.payload })
            }
            // No block runs, so nothing asks for an instruction to be executed again.
            (Err(_), Reason::None | Reason::Reexecute) => {
                Err(LinearFault::Exit(VmExit::new(ExitReason::EptMisconfiguration)))
            }
        }
    }
}

struct SoftKicker(Arc<Shared>);

impl Kick for SoftKicker {
    fn kick(&self) {
        self.0.kicked.store(true, Ordering::SeqCst);
        self.0.notify();
    }
}

impl Vcpu for SoftVcpu {
    fn enter(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) -> VmExit {
        let cpu = &mut *self.cpu;
        if let Err(exit) = system::vmentry::load(cpu, vmcs, regs) {
            return exit;
        }
        let mut exit = loop {
            if system::vmentry::inject(cpu).is_err()
                && let Some(exit) = cpu.settle()
            {
                break exit;
            }
            if let Some(exit) = cpu.run() {
                break exit;
            }
        };
        system::virtual_apic::complete_exit(cpu, &mut exit);
        cpu.leave(exit, vmcs, regs);
        exit
    }

    fn emulate(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        bus: &mut dyn ExitBus,
    ) -> Option<VmExit> {
        // SAFETY: only the lifetime is dropped; the pointer is taken out again before this call ends,
        // also when the CPU panics, because `cpu` is then not entered again.
        let bus: *mut (dyn ExitBus + 'static) = unsafe { std::mem::transmute(bus as *mut dyn ExitBus) };
        self.cpu.bus = Some(bus);
        self.cpu.one_shot = true;
        let cpu = &mut *self.cpu;
        let exit = match system::vmentry::load(cpu, vmcs, regs) {
            Err(exit) => Some(exit),
            Ok(()) => {
                let mut exit = cpu.run();
                match &mut exit {
                    Some(exit) => {
                        system::virtual_apic::complete_exit(cpu, exit);
                        cpu.leave(*exit, vmcs, regs);
                    }
                    None => {
                        // The boundary after this instruction is the next entry's first: saving ends
                        // the interrupt shadow and makes a single-step trap pending.
                        system::vmentry::save(cpu, vmcs, regs);
                        exit = system::pending::take_exit(cpu);
                    }
                }
                exit
            }
        };
        cpu.one_shot = false;
        cpu.single = false;
        cpu.bus = None;
        exit
    }

    fn read_linear(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        linear: u64,
        buf: &mut [u8],
    ) -> Result<(), LinearFault> {
        self.with_state(vmcs, regs, |cpu| cpu.read_bytes(linear, buf))
    }

    fn write_linear(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        linear: u64,
        buf: &[u8],
    ) -> Result<(), LinearFault> {
        self.with_state(vmcs, regs, |cpu| cpu.write_bytes(linear, buf))
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(SoftKicker(self.cpu.shared.clone()))
    }

    fn instructions(&self) -> u64 {
        self.cpu.icount
    }

    fn vmcs_accesses(&self) -> Option<engine::VmcsAccesses> {
        Some(self.cpu.vmcs_accesses)
    }

    fn translate(&mut self, vmcs: &EngineVmcs, _regs: &GuestRegs, linear: u64) -> Option<Gpa> {
        let g = &vmcs.guest;
        let cpu = &mut *self.cpu;
        cpu.controls.clone_from(&vmcs.controls);
        (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer, cpu.pdptes) = (g.cr0, g.cr3, g.cr4, g.efer, g.pdptes);
        cpu.peek_translate(linear).map(Gpa)
    }
}
