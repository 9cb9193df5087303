//! An engine that plays a script, for the tests of the loop.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use devices::Clock;
use engine::{Engine, EngineError, EngineVmcs, ExitBus, GuestRegs, InvalidateScope, Kick, Vcpu, VmExit};
use machine::{Pc, PcConfig};
use memory::{Gpa, MachineMemory};
use x86_spec::caps::{AllowedControls, VmxCapabilities, ept_vpid};
use x86_spec::exit::{ExitReason, io};

use crate::nested::{Ept02Config, VmcsAccess};
use crate::vcpu_loop::{RunEnd, Start, VcpuLoop};
use crate::vm::{Vm, VmBuilder, VmConfig};

/// TSC frequency: a tick is a nanosecond.
pub const TSC_HZ: u64 = 1_000_000_000;
/// TSC ticks for a tick of the preemption timer are 2^5.
pub const TIMER_SHIFT: u8 = 5;
/// What the script's last step, the end of the machine, writes to isa-debug-exit.
const END: u64 = 0x2a;

/// What the guest does between an entry and the next exit.
pub type Step = Box<dyn FnMut(&mut EngineVmcs, &mut GuestRegs, &AtomicU64) -> VmExit + Send>;
/// What the guest does when the engine is asked to emulate.
pub type Emulation = Box<dyn FnMut(&mut EngineVmcs, &mut dyn ExitBus) -> Option<VmExit> + Send>;

#[derive(Default)]
struct Script {
    steps: VecDeque<Step>,
    emulations: VecDeque<Emulation>,
}

/// The engine.
pub struct ScriptEngine {
    caps: VmxCapabilities,
    tsc: Arc<AtomicU64>,
    script: Arc<Mutex<Script>>,
}

/// Capabilities with every control allowed.
pub fn all_capabilities() -> VmxCapabilities {
    let any = AllowedControls { must_be_one: 0, may_be_one: u32::MAX };
    VmxCapabilities {
        pin: any,
        primary: any,
        secondary: any,
        exit: any,
        entry: any,
        ept_vpid: ept_vpid::PAGE_2M,
        misc: u64::from(TIMER_SHIFT),
        preemption_timer_shift: TIMER_SHIFT,
    }
}

impl Engine for ScriptEngine {
    type Vcpu = ScriptVcpu;
    fn capabilities(&self) -> &VmxCapabilities {
        &self.caps
    }
    fn supported_features(&self, _: u32, _: u32) -> [u32; 4] {
        [u32::MAX; 4]
    }
    fn tsc_frequency(&self) -> u64 {
        TSC_HZ
    }
    fn tsc(&self) -> u64 {
        self.tsc.load(Ordering::SeqCst)
    }
    fn create_vcpu(&self) -> Result<ScriptVcpu, EngineError> {
        Ok(ScriptVcpu { tsc: self.tsc.clone(), script: self.script.clone() })
    }
    fn invalidate(&self, _: InvalidateScope) {}
}

/// Its vCPU.
pub struct ScriptVcpu {
    tsc: Arc<AtomicU64>,
    script: Arc<Mutex<Script>>,
}

struct NoKick;
impl Kick for NoKick {
    fn kick(&self) {}
}

impl Vcpu for ScriptVcpu {
    fn enter(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) -> VmExit {
        let step = self.script.lock().unwrap().steps.pop_front();
        let exit = match step {
            Some(mut step) => step(vmcs, regs, &self.tsc),
            None => {
                regs.gpr[0] = END;
                VmExit {
                    instruction_length: 2,
                    ..VmExit::new(ExitReason::IoInstruction).qualified(io::qualification(0xf4, 1, 0))
                }
            }
        };
        // VM exits clear the valid bit (SDM Vol. 3C §25.8.3).
        vmcs.controls.entry_interruption.0 &= 0x7fff_ffff;
        exit
    }
    fn emulate(&mut self, vmcs: &mut EngineVmcs, _: &mut GuestRegs, bus: &mut dyn ExitBus) -> Option<VmExit> {
        let mut f = self.script.lock().unwrap().emulations.pop_front().expect("an emulation");
        f(vmcs, bus)
    }
    fn read_linear(
        &mut self,
        _: &mut EngineVmcs,
        _: &mut GuestRegs,
        linear: u64,
        _: &mut [u8],
    ) -> Result<(), engine::LinearFault> {
        Err(engine::LinearFault::Exception { vector: 14, error_code: Some(0), address: linear })
    }

    fn write_linear(
        &mut self,
        _: &mut EngineVmcs,
        _: &mut GuestRegs,
        linear: u64,
        _: &[u8],
    ) -> Result<(), engine::LinearFault> {
        Err(engine::LinearFault::Exception { vector: 14, error_code: Some(2), address: linear })
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::new(NoKick)
    }
    fn instructions(&self) -> u64 {
        0
    }
    fn translate(&mut self, _: &EngineVmcs, _: &GuestRegs, linear: u64) -> Option<Gpa> {
        Some(Gpa(linear))
    }
}

/// A PC around a scripted vCPU, in the state after RESET.
pub struct Rig {
    pub cpu: VcpuLoop<ScriptEngine>,
    pub vm: Arc<Vm<ScriptEngine>>,
    pub pc: Arc<Pc>,
    script: Arc<Mutex<Script>>,
}

impl Rig {
    pub fn new() -> Self {
        Self::with(false, VmcsAccess::Trapped)
    }

    /// One that offers VMX with an enlightened VMCS.
    pub fn direct() -> Self {
        Self::with(true, VmcsAccess::Direct)
    }

    fn with(vmx: bool, vmcs_access: VmcsAccess) -> Self {
        let config = VmConfig { ram: 4 << 20, cpus: 1, vmx, vmcs_access, ept02: Ept02Config::default() };
        let memory = Arc::new(MachineMemory::new(config.machine_memory().unwrap()).unwrap());
        let script = Arc::new(Mutex::new(Script::default()));
        let tsc = Arc::new(AtomicU64::new(1 << 40));
        let engine = ScriptEngine { caps: all_capabilities(), tsc, script: script.clone() };
        let builder = VmBuilder::new(Arc::new(engine), memory, config).unwrap();
        let clock: Arc<dyn Clock> = builder.clock();
        let pc_config =
            PcConfig { ram_bytes: config.ram, debug_exit: true, clock: Some(clock), ..PcConfig::default() };
        let pc = Arc::new(Pc::new(pc_config, &builder.tscs()).unwrap());
        let vm = builder.build(pc.clone());
        let cpu = VcpuLoop::new(vm.clone(), 0, Start::Reset).unwrap();
        Self { cpu, vm, pc, script }
    }

    /// Adds a step.
    pub fn then(
        &mut self,
        f: impl FnMut(&mut EngineVmcs, &mut GuestRegs, &AtomicU64) -> VmExit + Send + 'static,
    ) -> &mut Self {
        self.script.lock().unwrap().steps.push_back(Box::new(f));
        self
    }

    /// Adds an answer to a request to emulate.
    pub fn emulation(
        &mut self,
        f: impl FnMut(&mut EngineVmcs, &mut dyn ExitBus) -> Option<VmExit> + Send + 'static,
    ) -> &mut Self {
        self.script.lock().unwrap().emulations.push_back(Box::new(f));
        self
    }

    /// Plays the script to its end.
    pub fn play(&mut self) {
        match self.cpu.run() {
            RunEnd::DebugExit(status) => assert_eq!(u64::from(status), END << 1 | 1),
            other => panic!("the script did not end well: {other:?}"),
        }
        assert!(self.script.lock().unwrap().steps.is_empty());
        assert!(self.vm.board().take_event().is_none());
    }
}
