//! A virtual machine: what its vCPUs share, and the handle for other threads.

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use devices::clock::{NS_PER_SEC, mul_div_up};
use devices::{Clock, TscSource};
use engine::{Engine, EngineError, Kick};
use exit_trace::{Recorder, VcpuSummary};
use memory::{L1Ram, MachineAddr, MachineMemory, MemoryError, PAGE_SIZE, PagePool, RamLayout};

use x86_spec::controls::PrimaryControls;

use crate::apics::EngineApics;
use crate::board::Board;
use crate::cpuid::CpuidModel;
use crate::ept01::Ept01;
use crate::msr::GuestTsc;
use crate::nested::{self, Ept02Config, NestedError, VmcsAccess};
use crate::vmcs01::{self, MissingControl};

/// Pages of L0's pool besides those of EPT02 and the page tables of EPT01: EPT01's upper levels, bitmaps,
/// shadow VMCSs.
const POOL_RESERVE: u64 = 2048;

/// What a machine is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// RAM in bytes; rounded up to whole pages.
    pub ram: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Offer VMX to L1: the engine's own where it [`Engine::serves_vmx`], else L0's.
    pub vmx: bool,
    /// How L1's VMREAD and VMWRITE are done.
    pub vmcs_access: VmcsAccess,
    /// The composed tables of L1's guests.
    pub ept02: Ept02Config,
}

impl VmConfig {
    fn ram_pages(&self) -> u64 {
        self.ram.div_ceil(PAGE_SIZE)
    }
    /// EPT01 needs at most one table for 512 pages, and one for 512 of those; each vCPU has an EPT02.
    fn pool_pages(&self) -> u64 {
        let ept02 = self.ept02.pages.saturating_mul(u64::from(self.cpus.max(1)));
        let tables = self.ram_pages() / 512;
        (tables + tables / 512 + POOL_RESERVE).saturating_add(ept02)
    }
    /// Bytes of machine memory that the machine needs: L1's RAM from 0, L0's pool
    /// after it. `None` past 2^63.
    pub fn machine_memory(&self) -> Option<u64> {
        let pages = self.ram_pages().checked_add(self.pool_pages())?;
        pages.checked_mul(PAGE_SIZE).filter(|b| *b <= i64::MAX as u64)
    }
}

/// Why a machine can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine is not able enough.
    #[error(transparent)]
    Control(#[from] MissingControl),
    /// VMX for L1.
    #[error(transparent)]
    Nested(#[from] NestedError),
}

/// Time as the engine counts it, so that devices and the guest's TSC agree.
struct EngineClock {
    tsc: Box<dyn Fn() -> u64 + Send + Sync>,
    start: u64,
    /// Nanoseconds for a tick, with [`Self::FRACTION`] bits after the point: each exit asks for the time, and a
    /// division would be a large part of what that costs.
    ns_per_tick: u64,
}

impl EngineClock {
    /// Enough for an error of less than a nanosecond in a year.
    const FRACTION: u32 = 56;

    /// A clock that starts now, of a TSC of `hz` hertz.
    fn new(tsc: Box<dyn Fn() -> u64 + Send + Sync>, hz: u64) -> Self {
        // Of a TSC slower than 4 MHz this would be too much for 64 bits.
        // Rounded up, so that whole nanoseconds come out whole.
        let ns_per_tick = mul_div_up(NS_PER_SEC, 1 << Self::FRACTION, hz);
        Self { start: tsc(), tsc, ns_per_tick }
    }
}

impl Clock for EngineClock {
    fn now_ns(&self) -> u64 {
        let ticks = (self.tsc)().wrapping_sub(self.start);
        ((u128::from(ticks) * u128::from(self.ns_per_tick)) >> Self::FRACTION) as u64
    }
}

/// A machine without its devices: what they need to be made.
pub struct VmBuilder<E: Engine> {
    engine: Arc<E>,
    memory: Arc<MachineMemory>,
    ram: L1Ram,
    pool: Arc<PagePool>,
    ept01: Ept01,
    msr_bitmap: MachineAddr,
    cpuid: CpuidModel,
    clock: Arc<dyn Clock>,
    tscs: Vec<Arc<GuestTsc>>,
    vmcs_access: VmcsAccess,
    ept02: Ept02Config,
}

impl<E: Engine + 'static> VmBuilder<E> {
    /// Lays out machine memory, builds EPT01 and the MSR bitmap, decides on CPUID.
    ///
    /// # Errors
    /// [`VmError::Memory`] when `memory` is smaller than [`VmConfig::machine_memory`].
    pub fn new(engine: Arc<E>, memory: Arc<MachineMemory>, config: VmConfig) -> Result<Self, VmError> {
        let ram_bytes = config.ram_pages() * PAGE_SIZE;
        let ram = L1Ram::new(memory.clone(), RamLayout::new(ram_bytes))?;
        let pool = Arc::new(PagePool::new(memory.clone(), MachineAddr(ram_bytes), config.pool_pages())?);
        let ept01 = Ept01::build(&memory, &pool, ram.regions(), engine.capabilities().ept_vpid)?;
        let msr_bitmap = pool.alloc()?;
        vmcs01::write_msr_bitmap(&memory, msr_bitmap, !engine.is_lenient())?;
        let hz = engine.tsc_frequency().max(1);
        let mut cpuid = CpuidModel::new(|l, s| engine.supported_features(l, s), hz, config.cpus);
        let exits = PrimaryControls::MONITOR_EXITING | PrimaryControls::MWAIT_EXITING;
        if let Some(apics) = engine.local_apics() {
            cpuid = cpuid.with_apic_timer(apics.timer_frequency());
        }
        let monitor = engine.supported_features(1, 0)[2] & 1 << 3 != 0;
        cpuid = cpuid.with_monitor(monitor && engine.capabilities().has_primary(exits));
        if config.vmx && engine.serves_vmx() {
            vmcs01::pass_through(&memory, msr_bitmap, vmcs01::vmx_msrs(), true)?;
            cpuid = cpuid.with_vmx();
        } else if config.vmx && nested::is_possible(&*engine) {
            cpuid = cpuid.with_vmx();
            if config.vmcs_access == VmcsAccess::Direct {
                cpuid = cpuid.with_hyperv();
            }
        }
        let now = |e: &Arc<E>| {
            let e = e.clone();
            move || e.tsc()
        };
        let clock = Arc::new(EngineClock::new(Box::new(now(&engine)), hz));
        let tscs = (0..config.cpus.max(1)).map(|_| GuestTsc::new(now(&engine), hz)).collect();
        let (vmcs_access, ept02) = (config.vmcs_access, config.ept02);
        Ok(Self { engine, memory, ram, pool, ept01, msr_bitmap, cpuid, clock, tscs, vmcs_access, ept02 })
    }

    /// L1's RAM.
    pub fn ram(&self) -> &L1Ram {
        &self.ram
    }
    /// Time for devices.
    pub fn clock(&self) -> Arc<dyn Clock> {
        self.clock.clone()
    }
    /// The TSCs of all vCPUs, for their local APICs.
    pub fn tscs(&self) -> Vec<Arc<dyn TscSource>> {
        self.tscs.iter().map(|t| t.clone() as Arc<dyn TscSource>).collect()
    }
    /// What CPUID shows.
    pub fn cpuid(&self) -> &CpuidModel {
        &self.cpuid
    }

    /// The machine with its devices.
    pub fn build(self, board: Arc<dyn Board>) -> Arc<Vm<E>> {
        let handle = VmHandle::new(self.tscs.len());
        let for_notifier = handle.clone();
        if !board.interrupts().set_notifier(Box::new(move |cpu| for_notifier.notify(cpu))) {
            tracing::warn!("the interrupt controllers report to someone else already");
        }
        if let Some(apics) = self.engine.local_apics()
            && !board.interrupts().use_other_apics(Box::new(EngineApics(apics)))
        {
            tracing::warn!("the interrupt controllers have other local APICs already");
        }
        Arc::new(Vm { base: self, board, handle })
    }
}

/// What all vCPUs share.
pub struct Vm<E: Engine> {
    base: VmBuilder<E>,
    board: Arc<dyn Board>,
    handle: VmHandle,
}

impl<E: Engine> Vm<E> {
    /// The engine.
    pub fn engine(&self) -> &Arc<E> {
        &self.base.engine
    }
    /// Machine memory.
    pub fn memory(&self) -> &Arc<MachineMemory> {
        &self.base.memory
    }
    /// L1's RAM.
    pub fn ram(&self) -> &L1Ram {
        &self.base.ram
    }
    /// L0's own pages.
    pub fn pool(&self) -> &Arc<PagePool> {
        &self.base.pool
    }
    /// EPT01.
    pub fn ept01(&self) -> &Ept01 {
        &self.base.ept01
    }
    /// The page of L1's MSR bitmap.
    pub fn msr_bitmap(&self) -> MachineAddr {
        self.base.msr_bitmap
    }
    /// What CPUID shows.
    pub fn cpuid(&self) -> &CpuidModel {
        &self.base.cpuid
    }
    /// The TSC of vCPU `cpu`.
    pub fn tsc(&self, cpu: usize) -> Option<&Arc<GuestTsc>> {
        self.base.tscs.get(cpu)
    }
    /// How L1's VMREAD and VMWRITE are done.
    pub(crate) fn vmcs_access(&self) -> VmcsAccess {
        self.base.vmcs_access
    }
    /// The composed tables of L1's guests.
    pub(crate) fn ept02_config(&self) -> Ept02Config {
        self.base.ept02
    }
    /// The devices.
    pub fn board(&self) -> &dyn Board {
        self.board.as_ref()
    }
    /// The handle for other threads.
    pub fn handle(&self) -> &VmHandle {
        &self.handle
    }
}

/// Locks `m`; a panic of another holder does not spread, as each holder leaves the data whole.
pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How other threads reach one vCPU.
#[derive(Default)]
struct CpuSignal {
    /// Something may have changed since the vCPU last looked.
    request: AtomicBool,
    /// The vCPU is in the guest or about to enter it.
    in_guest: AtomicBool,
    kicker: OnceLock<Arc<dyn Kick>>,
    sleep: Mutex<()>,
    wake: Condvar,
    recorder: Mutex<Recorder>,
    /// Those who want to see the VMCSs.
    views: Mutex<Vec<mpsc::Sender<String>>>,
    view_wanted: AtomicBool,
}

/// Explanations of failed VM entries that are kept; older ones give way.
const MAX_EXPLAINED: usize = 8;

/// Failed VM entries after which the three-way view is no longer made anew.
const MAX_VIEWS: u64 = 100;

/// VM entries of L1 that failed.
#[derive(Clone, Debug, Default)]
pub struct FailedEntries {
    /// How many there were.
    pub count: u64,
    /// Explanations of the last ones, oldest first.
    pub last: VecDeque<String>,
    /// VMCS01, VMCS12 and VMCS02 side by side at the last of the first hundred whose checks failed.
    pub view: String,
}

struct Shared {
    cpus: Vec<CpuSignal>,
    stop: AtomicBool,
    failed_entries: Mutex<FailedEntries>,
}

/// Lets other threads wake, stop and watch a machine.
#[derive(Clone)]
pub struct VmHandle(Arc<Shared>);

impl VmHandle {
    fn new(cpus: usize) -> Self {
        let cpus = (0..cpus).map(|_| CpuSignal::default()).collect();
        let failed_entries = Mutex::default();
        Self(Arc::new(Shared { cpus, stop: AtomicBool::new(false), failed_entries }))
    }

    /// Tells vCPU `cpu` to look at its interrupts and devices again: it leaves the guest or
    /// stops waiting.
    pub fn notify(&self, cpu: usize) {
        let Some(c) = self.0.cpus.get(cpu) else { return };
        // A vCPU says that it enters before it looks at `request` for the last time, so one
        // of the two sees the other.
        if c.request.swap(true, Ordering::SeqCst) {
            return;
        }
        if c.in_guest.load(Ordering::SeqCst) {
            if let Some(k) = c.kicker.get() {
                k.kick();
            }
        } else {
            drop(lock(&c.sleep));
            c.wake.notify_one();
        }
    }

    /// Tells every vCPU to look again.
    pub fn notify_all(&self) {
        (0..self.0.cpus.len()).for_each(|cpu| self.notify(cpu));
    }

    /// Makes all vCPUs return [`crate::RunEnd::Stopped`] soon.
    pub fn stop(&self) {
        self.0.stop.store(true, Ordering::SeqCst);
        self.notify_all();
    }

    /// Whether [`Self::stop`] was called.
    pub fn is_stopping(&self) -> bool {
        self.0.stop.load(Ordering::SeqCst)
    }

    /// Exit statistics of vCPU `cpu` so far.
    pub fn stats(&self, cpu: usize) -> Option<VcpuSummary> {
        self.with_recorder(cpu, |r| r.summary(cpu))
    }

    /// Exit statistics of all vCPUs so far.
    pub fn summary(&self) -> exit_trace::Summary {
        exit_trace::Summary::new((0..self.0.cpus.len()).filter_map(|cpu| self.stats(cpu)).collect())
    }

    /// VMCS01, VMCS12 and VMCS02 of vCPU `cpu` side by side, as they are between an exit and the next entry. `None` if
    /// there is no such vCPU, or it does not answer within `patience`, as when it has stopped.
    pub fn vmcs_view(&self, cpu: usize, patience: Duration) -> Option<String> {
        let c = self.0.cpus.get(cpu)?;
        let (sender, receiver) = mpsc::channel();
        lock(&c.views).push(sender);
        c.view_wanted.store(true, Ordering::SeqCst);
        self.notify(cpu);
        receiver.recv_timeout(patience).ok()
    }

    /// Whether someone wants to see the VMCSs of vCPU `cpu`.
    pub(crate) fn wants_view(&self, cpu: usize) -> bool {
        self.0.cpus.get(cpu).is_some_and(|c| c.view_wanted.load(Ordering::Relaxed))
    }

    /// Shows the VMCSs, as `view` makes them, to those who asked.
    pub(crate) fn answer_views(&self, cpu: usize, view: impl FnOnce() -> String) {
        let Some(c) = self.0.cpus.get(cpu) else { return };
        if !c.view_wanted.swap(false, Ordering::SeqCst) {
            return;
        }
        let view = view();
        for sender in lock(&c.views).drain(..) {
            // Who asked may have run out of patience.
            let _ = sender.send(view.clone());
        }
    }

    /// Has the exits of vCPU `cpu` written to a trace.
    pub fn set_trace(&self, cpu: usize, trace: exit_trace::TraceWriter) {
        self.with_recorder(cpu, |r| r.trace = Some(trace));
    }

    /// Writes what the traces' file does not have yet.
    ///
    /// # Errors
    /// Why a trace ended early.
    pub fn flush_traces(&self) -> Result<(), String> {
        let flush = |r: &mut Recorder| {
            r.flush_trace();
            let error = r.trace.as_ref().and_then(|t| t.error());
            error.map_or(Ok(()), |e| Err(e.to_string()))
        };
        (0..self.0.cpus.len()).filter_map(|cpu| self.with_recorder(cpu, flush)).collect()
    }

    /// VM entries of L1 that failed so far, and why.
    pub fn failed_entries(&self) -> FailedEntries {
        lock(&self.0.failed_entries).clone()
    }

    /// Records a failed VM entry of L1.
    pub(crate) fn entry_failed(&self, explain: impl FnOnce() -> String, view: Option<&dyn fmt::Display>) {
        let mut failed = lock(&self.0.failed_entries);
        failed.count += 1;
        if failed.last.len() == MAX_EXPLAINED {
            failed.last.pop_front();
        }
        failed.last.push_back(explain());
        // The view is long: an L1 that fails again and again need not pay for it each time.
        if failed.count <= MAX_VIEWS
            && let Some(view) = view
        {
            failed.view = view.to_string();
        }
    }

    pub(crate) fn set_kicker(&self, cpu: usize, kicker: Arc<dyn Kick>) {
        if let Some(c) = self.0.cpus.get(cpu) {
            // A vCPU is made once; a second kicker would be for a vCPU that replaced it.
            let _ = c.kicker.set(kicker);
        }
    }

    /// Whether someone notified; forgets it, as what caused it is looked at after this.
    pub(crate) fn take_request(&self, cpu: usize) -> bool {
        self.0.cpus.get(cpu).is_some_and(|c| c.request.swap(false, Ordering::SeqCst))
    }

    /// Says that vCPU `cpu` is about to enter the guest. `false` when it must look again
    /// first; then it counts as outside.
    pub(crate) fn entering(&self, cpu: usize) -> bool {
        let Some(c) = self.0.cpus.get(cpu) else { return true };
        c.in_guest.store(true, Ordering::SeqCst);
        let go = !c.request.load(Ordering::SeqCst);
        if !go {
            c.in_guest.store(false, Ordering::SeqCst);
        }
        go
    }

    /// Says that vCPU `cpu` left the guest.
    pub(crate) fn left(&self, cpu: usize) {
        if let Some(c) = self.0.cpus.get(cpu) {
            c.in_guest.store(false, Ordering::SeqCst);
        }
    }

    /// Waits until someone notifies vCPU `cpu`, or for `limit`.
    pub(crate) fn wait(&self, cpu: usize, limit: Option<Duration>) {
        let Some(c) = self.0.cpus.get(cpu) else { return };
        let quiet = |_: &mut ()| !c.request.load(Ordering::SeqCst);
        let guard = lock(&c.sleep);
        match limit {
            Some(limit) => drop(c.wake.wait_timeout_while(guard, limit, quiet)),
            None => drop(c.wake.wait_while(guard, quiet)),
        }
    }

    pub(crate) fn with_recorder<R>(&self, cpu: usize, f: impl FnOnce(&mut Recorder) -> R) -> Option<R> {
        self.0.cpus.get(cpu).map(|c| f(&mut lock(&c.recorder)))
    }
}
