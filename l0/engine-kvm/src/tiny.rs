//! Guests of a few instructions, to measure an engine by itself, without a machine around it.
//!
//! They run in 64-bit mode over 2 MiB. Nothing is interrupted and nothing has a handler: what a guest may do is
//! compute and exit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::{Engine, EngineError, EngineVmcs, GuestRegs, Segment, Vcpu, VmExit};
use memory::{MachineAddr, MachineMemory};
use x86_spec::controls::{EntryControls, PinbasedControls, PrimaryControls, SecondaryControls};
use x86_spec::ept;
use x86_spec::exit::ExitReason;
use x86_spec::reg::{cr0, cr4, efer, gpr};
use x86_spec::segment::{AccessRights, seg};

const MEMORY: u64 = 3 << 20;
const CODE: u64 = 0x1000;
/// PML4, PDPT and a page directory with one large page, for user code too.
const PAGING: u64 = 0x10_0000;
/// EPT with one large page, and a page of ones as MSR bitmap.
const TABLES: u64 = 2 << 20;
const MSR_BITMAP: u64 = TABLES + 0x3000;

/// `inc rcx; jmp $-3`: two instructions for ever.
const COUNT: [u8; 5] = [0x48, 0xff, 0xc1, 0xeb, 0xfb];
const COUNT_LENGTH: u64 = 2;
/// `hlt`, where RIP stays.
pub const HLT: [u8; 1] = [0xf4];
/// `vmread rax, rax`, where RIP stays.
pub const VMREAD: [u8; 3] = [0x0f, 0x78, 0xc0];

/// Why something could not be measured.
#[derive(Debug, thiserror::Error)]
pub enum Unmeasured {
    /// The engine or the host.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Memory for the guest.
    #[error("{0}")]
    Memory(#[from] memory::MemoryError),
    /// The guest ended otherwise than its code says.
    #[error("the guest ended with {0}")]
    Exit(String),
}

/// Privilege level that a guest runs at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// CPL 0.
    Kernel,
    /// CPL 3.
    User,
}

/// One context with its vCPU.
pub struct Guest<E: Engine> {
    pub(crate) vcpu: E::Vcpu,
    /// Guest state and controls.
    pub vmcs: EngineVmcs,
    pub(crate) regs: GuestRegs,
    pub(crate) memory: Arc<MachineMemory>,
    ticks_per_second: u64,
}

impl<E: Engine> Guest<E> {
    /// A guest at the first instruction of `code`.
    ///
    /// # Errors
    /// When the engine can't be made.
    pub fn new(
        new_engine: impl FnOnce(Arc<MachineMemory>) -> Result<E, EngineError>,
        level: Level,
        code: &[u8],
    ) -> Result<Self, Unmeasured> {
        let memory = Arc::new(MachineMemory::new(MEMORY)?);
        for (at, value) in [
            (TABLES, (TABLES + 0x1000) | ept::RWX),
            (TABLES + 0x1000, (TABLES + 0x2000) | ept::RWX),
            (TABLES + 0x2000, ept::RWX | ept::LARGE | ept::MEMTYPE_WB << ept::MEMTYPE_SHIFT),
            // Present, writable, for user code too.
            (PAGING, (PAGING + 0x1000) | 7),
            (PAGING + 0x1000, (PAGING + 0x2000) | 7),
            (PAGING + 0x2000, 1 << 7 | 7),
        ] {
            memory.write_u64(MachineAddr(at), value)?;
        }
        memory.fill(MachineAddr(MSR_BITMAP), 0xff, 4096)?;
        memory.write(MachineAddr(CODE), code)?;
        let engine = new_engine(memory.clone())?;
        Ok(Self {
            vcpu: engine.create_vcpu()?,
            vmcs: context(level),
            regs: GuestRegs::reset(),
            memory,
            ticks_per_second: engine.tsc_frequency() >> engine.capabilities().preemption_timer_shift,
        })
    }

    /// Has the next entry end after `limit`.
    pub(crate) fn limit(&mut self, limit: Duration) {
        let ticks = u128::from(self.ticks_per_second) * limit.as_micros() / 1_000_000;
        self.vmcs.guest.preemption_timer = u32::try_from(ticks).unwrap_or(u32::MAX - 1);
    }

    /// Runs until an exit, at the latest after `limit`.
    ///
    /// # Errors
    /// When the engine can't enter the context.
    pub fn enter(&mut self, limit: Duration) -> Result<VmExit, Unmeasured> {
        self.limit(limit);
        let exit = self.vcpu.enter(&mut self.vmcs, &mut self.regs);
        match self.vcpu.failure() {
            Some(why) => Err(Unmeasured::Exit(why.to_owned())),
            None if exit.entry_failure => Err(Unmeasured::Exit(format!("{}, at entry", exit.reason.name()))),
            None => Ok(exit),
        }
    }
}

/// 64-bit mode with everything that KVM can deliver exits for.
fn context(level: Level) -> EngineVmcs {
    let mut vmcs = EngineVmcs::default();
    let c = &mut vmcs.controls;
    c.lenient = true;
    c.pin = PinbasedControls::VMX_PREEMPTION_TIMER;
    c.primary = PrimaryControls::HLT_EXITING
        | PrimaryControls::UNCOND_IO_EXITING
        | PrimaryControls::USE_MSR_BITMAPS
        | PrimaryControls::SECONDARY_CONTROLS;
    c.secondary = SecondaryControls::ENABLE_EPT | SecondaryControls::UNRESTRICTED_GUEST;
    c.entry = EntryControls::IA32E_MODE_GUEST | EntryControls::LOAD_IA32_EFER;
    c.eptp = ept::eptp(TABLES, false);
    c.msr_bitmap = MachineAddr(MSR_BITMAP);
    let g = &mut vmcs.guest;
    (g.cr0, g.cr3, g.cr4) = (cr0::PE | cr0::PG | cr0::ET | cr0::NE, PAGING, cr4::PAE);
    g.efer = efer::LME | efer::LMA;
    let (dpl, rpl) = match level {
        Level::Kernel => (0, 0),
        Level::User => (3 << 5, 3),
    };
    let data = Segment { base: 0, limit: u32::MAX, access: AccessRights(0xc093 | dpl), selector: 0x28 | rpl };
    for i in [seg::DS, seg::ES, seg::SS, seg::FS, seg::GS] {
        g.segments[i] = data;
    }
    g.segments[seg::CS] = Segment { access: AccessRights(0xa09b | dpl), selector: 0x30 | rpl, ..data };
    (g.rip, g.rsp) = (CODE, 0x800);
    vmcs
}

/// Instructions a second of a small loop at `level`, in about `limit`.
///
/// # Errors
/// When the loop does not run to the limit.
pub fn speed<E: Engine>(
    new_engine: impl FnOnce(Arc<MachineMemory>) -> Result<E, EngineError>,
    level: Level,
    limit: Duration,
) -> Result<f64, Unmeasured> {
    let mut guest = Guest::new(new_engine, level, &COUNT)?;
    // First touches, first decoding.
    guest.enter(limit / 8)?;
    let before = guest.regs.gpr[gpr::RCX];
    let start = Instant::now();
    let mut took = Duration::ZERO;
    while took < limit {
        let exit = guest.enter(limit - took)?;
        took = start.elapsed();
        // An entry may end early for the host's sake.
        if !matches!(exit.reason, ExitReason::PreemptionTimer | ExitReason::ExternalInterrupt) {
            return Err(Unmeasured::Exit(exit.reason.name().to_owned()));
        }
    }
    let rounds = guest.regs.gpr[gpr::RCX].wrapping_sub(before);
    Ok(rounds.saturating_mul(COUNT_LENGTH) as f64 / took.as_secs_f64())
}

/// Round trips of an exit, from L0 to the guest and back, each by itself.
///
/// # Errors
/// When the guest does not exit for `reason`, as its `code` has to do again and again.
pub fn exits<E: Engine>(
    new_engine: impl FnOnce(Arc<MachineMemory>) -> Result<E, EngineError>,
    (code, reason): (&[u8], ExitReason),
    rounds: u32,
) -> Result<Vec<Duration>, Unmeasured> {
    let mut guest = Guest::new(new_engine, Level::Kernel, code)?;
    guest.exit(reason)?;
    (0..rounds).map(|_| guest.exit(reason)).collect()
}

/// What it takes that another part of a composed engine runs a context, there and back: each is what two entries
/// after a change of the part take more than those that follow them.
///
/// # Errors
/// When the engine has no parts, one of them runs all, or the guest does not halt.
pub fn hand_overs<E: Engine>(
    new_engine: impl FnOnce(Arc<MachineMemory>) -> Result<E, EngineError>,
    rounds: u32,
) -> Result<Vec<Duration>, Unmeasured> {
    let mut guest = Guest::new(new_engine, Level::Kernel, &HLT)?;
    let entries = |guest: &Guest<E>| guest.vcpu.hand_overs().map_or(0, |h| h.entries);
    let mut times = Vec::new();
    // The first is not counted.
    for _ in 0..=rounds {
        let mut took = Duration::ZERO;
        let before = entries(&guest);
        for kvm in [true, false] {
            // KVM has no exit for RDTSC, so that it can't run a context with this control.
            guest.vmcs.controls.primary.set(PrimaryControls::RDTSC_EXITING, !kvm);
            let changed = guest.exit(ExitReason::Hlt)?;
            let same = guest.exit(ExitReason::Hlt)?;
            took += changed.saturating_sub(same);
        }
        if entries(&guest).wrapping_sub(before) != 2 {
            return Err(Unmeasured::Exit("all entries of one part of the engine".into()));
        }
        times.push(took);
    }
    times.remove(0);
    Ok(times)
}

/// No exit takes that long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

impl<E: Engine> Guest<E> {
    /// Enters until an exit for `wanted`; the time that it took.
    ///
    /// # Errors
    /// When there is another exit.
    pub fn exit(&mut self, wanted: ExitReason) -> Result<Duration, Unmeasured> {
        let start = Instant::now();
        loop {
            match self.enter(PATIENCE)?.reason {
                reason if reason == wanted => return Ok(start.elapsed()),
                ExitReason::ExternalInterrupt => {}
                other => return Err(Unmeasured::Exit(other.name().to_owned())),
            }
        }
    }
}
