//! `nestvmm run`.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use engine::Engine;
use engine_kvm::{HybridEngine, KvmEngine};
use engine_soft::SoftEngine;
use engine_soft::system::shadow_vmcs::{ShadowField, ShadowLayout};
use hypervisor::{Ept02Config, RunEnd, Start, VcpuLoop, VmBuilder, VmConfig, VmError};
use machine::boot::{self, BootEntry, BootFile, BootModule, BootRequest};
use machine::image::ImageKind;
use machine::pci::{PciDevices, PciError};
use machine::{Pc, PcConfig, PcError, acpi, image, iommu};
use memory::{MachineMemory, RamLayout};
use tracing_subscriber::EnvFilter;

use crate::cli::{
    ConsoleTarget, EngineChoice, EntryPoint, EptSyncChoice, Explain, IommuChoice, IrqchipChoice, OnCrash,
    OnOff, OnReset, RunArgs, VmcsAccessChoice, VmxChoice,
};
use crate::console::{Console, Output};
use crate::crash;
use crate::disks::{self, Disks};
use crate::engines::choice::{Choice, Need, Taken, choose};
use crate::engines::{self, Findings};
use crate::exec::NO_STATUS;
use crate::exec::host::Exec;
use crate::session::{Running, Session};
use crate::status::{self, Failure};
use crate::terminal::RawMode;
use crate::trace_file::TraceFile;

/// Number of vCPUs.
const CPUS: u16 = 1;
/// Where the log has what `--engine auto` takes.
const CHOICE: &str = "nestvmm::engine";
/// Stack of a vCPU's thread in bytes.
const VCPU_STACK: usize = 16 << 20;

/// Runs a guest until it ends; the exit status.
///
/// # Errors
/// [`Failure`] with the status to end with.
pub fn run(args: &RunArgs) -> Result<u8, Failure> {
    match &args.exec {
        None => run_until_end(args, None),
        // The statuses that have a meaning of their own otherwise are the command's here.
        Some(command) => Exec::new(command, args.exec_status.clone())
            .and_then(|exec| run_until_end(args, Some(&Arc::new(exec))))
            .map_err(|failure| Failure { status: NO_STATUS, ..failure }),
    }
}

fn run_until_end(args: &RunArgs, exec: Option<&Arc<Exec>>) -> Result<u8, Failure> {
    start_log(args)?;
    if args.engine() == EngineChoice::Kvm && args.ept_sync == EptSyncChoice::WriteProtect {
        return Err(Failure::usage(
            "--ept-sync write-protect: KVM can't write-protect single pages; use --engine soft",
        ));
    }
    if args.vmx() == VmxChoice::Host {
        check_host_vmx(args)?;
    }
    if args.irqchip == Some(IrqchipChoice::Split) {
        if args.engine() != EngineChoice::Kvm {
            return Err(Failure::usage("--irqchip split: only KVM has a local APIC; add --engine kvm"));
        }
        if let Some(why) = args.needs_apic_here() {
            return Err(Failure::usage(format!("--irqchip split: {why}")));
        }
    }
    check_host_memory(args.memory.0)?;
    // Before anything is made that a signal must not leave behind.
    let session = Arc::new(Session::default());
    session.start_signals()?;
    let mut files = BootFiles::load(args)?;
    let disks = disks::open(args)?;
    let target = match (&args.console, exec) {
        (Some(ConsoleTarget::Stdio), Some(_)) => {
            return Err(Failure::usage(
                "--console stdio: with --exec, these are the command's input and output",
            ));
        }
        (Some(target), _) => target,
        (None, Some(_)) => &ConsoleTarget::Kept,
        (None, None) => &ConsoleTarget::Stdio,
    };
    let mut console = Console::open(target)?;
    if let Some(exec) = exec {
        Exec::check_initrd(files.initrd.as_ref())?;
        files.command_line = Some(Exec::command_line(files.command_line.as_deref()));
        exec.start(&session)?;
    }
    let raw = match target {
        ConsoleTarget::Stdio => RawMode::enter()
            .map_err(|e| Failure::host(format!("the terminal can't be put into raw mode: {e}")))?,
        _ => None,
    };
    console.start_input(&session)?;
    let result = run_machines(args, &files, &disks, &console.output, &session, exec);
    drop(raw);
    match (result?, exec) {
        (End::Status(s), None) => Ok(s),
        (End::Crash(text), _) => Err(Failure::new(status::GUEST_CRASH, text)),
        (End::Status(s), Some(exec)) => exec.end(s, &console.output.kept()),
    }
}

/// What executes the guest's instructions.
enum Engines {
    Soft,
    Kvm,
    /// KVM, and VMX too.
    HostVmx,
    Auto(Choice),
}

impl Engines {
    fn of(args: &RunArgs) -> Self {
        let need = match args.vmx() {
            VmxChoice::Off if args.ept_sync == EptSyncChoice::WriteProtect => Need::WriteProtection,
            VmxChoice::Off => Need::Plain,
            _ => Need::Vmx,
        };
        match args.engine() {
            EngineChoice::Kvm if args.vmx() == VmxChoice::Host => Self::HostVmx,
            EngineChoice::Kvm => Self::Kvm,
            EngineChoice::Soft => Self::Soft,
            EngineChoice::Auto => Self::Auto(choose(need, &engines::look(need))),
        }
    }

    /// Tells what `--engine auto` takes, once for each engine, however often the machine is reset.
    fn say(&self) {
        static SAID: [std::sync::Once; 2] = [const { std::sync::Once::new() }; 2];
        if let Self::Auto(choice) = self {
            let [soft, kvm] = &SAID;
            let said = if choice.engine == Taken::Soft { soft } else { kvm };
            said.call_once(|| tracing::info!(target: CHOICE, "{choice}"));
        }
    }

    /// What is left when the engine failed before the guest began; nothing if the user named one.
    fn without_kvm(&self, cause: &engine::EngineError) -> Option<Self> {
        match self {
            Self::Auto(Choice { engine: Taken::Kvm, .. }) => {
                Some(Self::Auto(choose(Need::Plain, &Findings::Unusable(cause.to_string()))))
            }
            _ => None,
        }
    }
}

/// Why there was no boot.
enum BootFailure {
    /// The engine, before the guest's first instruction.
    Engine(engine::EngineError),
    Other(Failure),
}

impl From<Failure> for BootFailure {
    fn from(failure: Failure) -> Self {
        Self::Other(failure)
    }
}

impl From<VmError> for BootFailure {
    fn from(e: VmError) -> Self {
        match e {
            VmError::Engine(e) => Self::Engine(e),
            other => Self::Other(vm_failure(other)),
        }
    }
}

/// How a run ends.
enum End {
    Status(u8),
    Crash(String),
}

/// Boots, and boots again after each reset.
fn run_machines(
    args: &RunArgs,
    files: &BootFiles,
    disks: &Disks,
    output: &Output,
    session: &Arc<Session>,
    exec: Option<&Arc<Exec>>,
) -> Result<End, Failure> {
    let mut engine = Engines::of(args);
    loop {
        let translate = args.translator == OnOff::On;
        let soft = |memory| {
            engine.say();
            soft_engine(memory, translate)
        };
        let booted = match engine {
            Engines::HostVmx => boot_once(KvmEngine::serving_vmx, args, files, disks, output, session, exec),
            Engines::Kvm | Engines::Auto(Choice { engine: Taken::Kvm, .. }) => {
                let kvm = |memory| kvm_engine(args, memory).inspect(|_| engine.say());
                boot_once(kvm, args, files, disks, output, session, exec)
            }
            Engines::Soft | Engines::Auto(_) => boot_once(soft, args, files, disks, output, session, exec),
        };
        let end = match booted {
            Ok(end) => end,
            Err(BootFailure::Engine(e)) => {
                engine = engine.without_kvm(&e).ok_or_else(|| Failure::host(e))?;
                continue;
            }
            Err(BootFailure::Other(failure)) => return Err(failure),
        };
        match end {
            RunEnd::PowerOff => return Ok(End::Status(status::POWER_OFF)),
            RunEnd::DebugExit(status) => return Ok(End::Status(status as u8)),
            RunEnd::Stopped => return Ok(End::Status(session.ending().unwrap_or(status::INTERNAL))),
            RunEnd::Engine(why) => {
                let remedy = "--engine soft runs the guest without KVM";
                return Err(Failure::host(format!("the engine can't go on: {why}; {remedy}")));
            }
            RunEnd::Internal(what) => {
                return Err(Failure::internal(format!("internal error: {what}; please report this")));
            }
            RunEnd::Crash(report) if args.on_crash == OnCrash::Report => {
                return Ok(End::Crash(crash::render(&report)));
            }
            RunEnd::Crash(report) => tracing::warn!("the guest crashed: {}", report.cause),
            RunEnd::Reset => {}
        }
        // The next boot would run the command again.
        if args.on_reset == OnReset::Exit || exec.is_some() {
            return Ok(End::Status(status::GUEST_RESET));
        }
        tracing::info!("the machine is reset");
    }
}

/// The software engine, able to do VMREAD and VMWRITE in shadow VMCSs of `vmx-emu`'s layout.
fn soft_engine(memory: Arc<MachineMemory>, translate: bool) -> Result<SoftEngine, engine::EngineError> {
    let fields = vmx_emu::shadow_layout().iter().map(|f| ShadowField {
        encoding: f.encoding,
        offset: f.offset,
        width: f.width,
    });
    let engine = SoftEngine::new(memory)?.with_vmcs_shadowing(ShadowLayout::new(fields));
    Ok(if translate { engine } else { engine.with_translation_after(0) })
}

/// KVM, with the software engine for what KVM can't do.
fn kvm_engine(
    args: &RunArgs,
    memory: Arc<MachineMemory>,
) -> Result<HybridEngine<SoftEngine>, engine::EngineError> {
    /// Said once, however often the machine is reset.
    static NOTICE: std::sync::Once = std::sync::Once::new();
    let engine = HybridEngine::new(memory.clone(), soft_engine(memory, args.translator == OnOff::On)?)?;
    if !engine.flaws().is_empty() {
        NOTICE.call_once(|| tracing::warn!("{}", without_kvm(engine.flaws())));
    }
    match (args.irqchip, engine.without_local_apics()) {
        (Some(IrqchipChoice::Userspace), _) => Ok(engine),
        (None, _) if args.needs_apic_here().is_some() => Ok(engine),
        (None, Some(why)) => {
            tracing::info!("the local APIC is not in KVM: {why}");
            Ok(engine)
        }
        (Some(IrqchipChoice::Split), _) | (None, None) => engine.with_local_apics(),
    }
}

/// What users of `--engine kvm` are told about a KVM that runs nothing.
pub(crate) fn without_kvm(flaws: &[engine_kvm::Flaw]) -> String {
    let flaws: Vec<_> = flaws.iter().map(ToString::to_string).collect();
    format!("this host's KVM can't be trusted with guests, the software CPU runs them: {}", flaws.join("; "))
}

/// From power-on to the end of one machine.
fn boot_once<E: Engine + 'static>(
    new_engine: impl FnOnce(Arc<MachineMemory>) -> Result<E, engine::EngineError>,
    args: &RunArgs,
    files: &BootFiles,
    disks: &Disks,
    output: &Output,
    session: &Arc<Session>,
    exec: Option<&Arc<Exec>>,
) -> Result<RunEnd, BootFailure> {
    let config = VmConfig {
        ram: args.memory.0,
        cpus: CPUS.into(),
        vmx: args.vmx() != VmxChoice::Off,
        vmcs_access: args.vmcs_access.into(),
        ept02: Ept02Config { pages: args.ept02_pages, sync: args.ept_sync.into() },
    };
    let size = config.machine_memory().ok_or_else(|| Failure::usage("--memory: too much"))?;
    let memory = Arc::new(MachineMemory::new(size).map_err(Failure::host)?);
    let engine = Arc::new(new_engine(memory.clone()).map_err(BootFailure::Engine)?);
    let builder = VmBuilder::new(engine, memory, config)?;

    let command_line = files.command_line.as_deref();
    let pc_config = PcConfig {
        ram_bytes: builder.ram().size(),
        cpus: CPUS,
        cmdline: command_line.unwrap_or_default().to_owned(),
        debug_exit: args.debug_exit,
        testdev: args.testdev,
        lapic_timer_hz: builder.cpuid().crystal().hz.into(),
        max_phys_bits: hypervisor::cpuid::PHYSICAL_BITS,
        utc_ns: None,
        clock: Some(builder.clock()),
        console: Box::new(output.clone()),
        devices: Some(PciDevices {
            ram: builder.ram().clone(),
            disks: disks.virtio.clone(),
            nvme: disks.nvme.clone(),
            rng: args.rng == OnOff::On,
        }),
        iommu: args.iommu.options(builder.ram()),
        channel: exec.map(|e| -> Box<dyn io::Write + Send> { Box::new(e.port(session)) }),
    };
    let windows = machine::pc::pci_windows(&RamLayout::new(builder.ram().size()));
    let dmar = (args.iommu != IommuChoice::Off).then(|| iommu::dmar(hypervisor::cpuid::PHYSICAL_BITS));
    let tables = acpi::build(CPUS, &windows, dmar.as_ref()).map_err(Failure::internal)?;
    let pc = Arc::new(Pc::new(pc_config, &builder.tscs()).map_err(pc_failure)?);
    let request = BootRequest {
        kernel: &files.kernel,
        initrd: files.initrd.as_ref(),
        modules: &files.modules,
        command_line,
        acpi: &tables.blobs,
        rsdp: tables.rsdp,
        entry: files.entry,
    };
    let loaded = boot::load(builder.ram(), &request).map_err(Failure::input)?;
    for notice in &loaded.notices {
        tracing::warn!("{notice}");
    }
    tracing::info!("{} by {}", files.kernel.name, loaded.protocol);

    let vm = builder.build(pc.clone());
    let handle = vm.handle().clone();
    let tsc_hz = vm.engine().tsc_frequency();
    let mut vcpu = VcpuLoop::new(vm, 0, Start::Boot(&loaded.state))?;
    let trace = args.trace_exits.as_deref();
    let trace = trace.map(|p| TraceFile::start(p, args.trace_exits_size.0, &handle, tsc_hz)).transpose()?;
    session.set_running(Running { pc, handle, stats_json: args.exit_stats_json.clone() });
    let thread = std::thread::Builder::new()
        .name("vcpu0".into())
        .stack_size(VCPU_STACK)
        .spawn(move || vcpu.run())
        .map_err(|e| Failure::host(format!("can't start the vCPU's thread: {e}")))?;
    let end = thread.join();
    if let Some(trace) = trace {
        trace.finish();
    }
    if let Some(stopped) = session.clear_running() {
        // However the run ended: what the guest printed last is what one wants to see.
        stopped.pc.flush_console();
        if args.explain_entries != Explain::Off {
            explain_entries(&stopped.handle.failed_entries(), args.explain_entries);
        }
        if args.exit_stats {
            stopped.print_stats();
        }
        stopped.write_stats();
    }
    let panicked = "internal error: the vCPU's thread panicked; please report this";
    end.map_err(|_| Failure::internal(panicked).into())
}

/// Says why VM entries of the guest failed, if any did.
fn explain_entries(failed: &hypervisor::FailedEntries, how: Explain) {
    if failed.count == 0 {
        return;
    }
    let shown = failed.last.len();
    // The terminal may still be raw.
    eprint!("\r\n{} VM entries of the guest failed; the last {shown}:\r\n", failed.count);
    let view = (how == Explain::View).then_some(&failed.view);
    for text in failed.last.iter().chain(view) {
        eprint!("{}\r\n", text.replace('\n', "\r\n"));
    }
}

fn pc_failure(e: PcError) -> Failure {
    match e {
        PcError::Pci(PciError::TooMany(_)) => Failure::usage(e),
        PcError::Pci(PciError::Thread(_)) => Failure::host(e),
        PcError::Cpus(_) | PcError::Layout(_) => Failure::internal(e),
    }
}

fn vm_failure(e: VmError) -> Failure {
    match e {
        VmError::Memory(_) | VmError::Engine(_) => Failure::host(e),
        VmError::Control(_) | VmError::Nested(_) => Failure::internal(e),
    }
}

/// What is to be booted.
struct BootFiles {
    kernel: BootFile,
    initrd: Option<BootFile>,
    modules: Vec<BootModule>,
    command_line: Option<String>,
    entry: BootEntry,
}

impl BootFiles {
    /// Reads the files; options override what an image says.
    fn load(args: &RunArgs) -> Result<Self, Failure> {
        let limit = args.memory.0;
        let read = |path: &Path| image::read_file(path, limit).map_err(Failure::input);
        let image = match &args.image {
            Some(path) => Some(image::open(path, args.entry.as_deref(), limit).map_err(Failure::input)?),
            None => None,
        };
        let (kernel, initrd, options) = match image {
            Some(source) => (Some(source.kernel), source.initrd, source.options),
            None => (None, None, None),
        };
        let kernel = match (&args.kernel, kernel) {
            (Some(path), _) => {
                if image::detect(path).map_err(Failure::input)? == ImageKind::Disk {
                    let path = path.display();
                    return Err(Failure::usage(format!(
                        "--kernel {path}: is a disk image, not a kernel; give it without --kernel"
                    )));
                }
                read(path)?
            }
            (None, Some(kernel)) => kernel,
            (None, None) => return Err(Failure::usage("give an IMAGE or --kernel FILE")),
        };
        let initrd = match &args.initrd {
            Some(path) => Some(read(path)?),
            None => initrd,
        };
        let default = boot::is_bzimage(&kernel.data).then(|| "console=ttyS0".to_owned());
        let modules = args.modules.iter().map(|m| read_module(m, &read)).collect::<Result<_, _>>()?;
        Ok(Self {
            kernel,
            initrd,
            modules,
            command_line: args.append.clone().or(options).or(default),
            entry: match args.entry_point {
                EntryPoint::Auto => BootEntry::Auto,
                EntryPoint::Pvh => BootEntry::Pvh,
                EntryPoint::Decompressor => BootEntry::Decompressor,
            },
        })
    }
}

/// A `--module`: a file, a space, arguments.
fn read_module(
    option: &str,
    read: &impl Fn(&Path) -> Result<BootFile, Failure>,
) -> Result<BootModule, Failure> {
    let (path, arguments) = option.split_once(' ').unwrap_or((option, ""));
    Ok(BootModule { file: read(Path::new(path))?, command_line: arguments.to_owned() })
}

/// Options that say something about VMX which L0 has no part in.
fn check_host_vmx(args: &RunArgs) -> Result<(), Failure> {
    if args.engine() != EngineChoice::Kvm {
        return Err(Failure::usage(
            "--vmx host: this is the VMX of the host's KVM; add --engine kvm, or leave it out for nestvmm's own VMX",
        ));
    }
    if args.vmcs_access != VmcsAccessChoice::Shadow {
        return Err(Failure::usage(
            "--vmx host: how the guest accesses its VMCS is the host's business; leave out --vmcs-access",
        ));
    }
    Ok(())
}

/// RAM that is larger than the host's can only end badly.
fn check_host_memory(bytes: u64) -> Result<(), Failure> {
    let info = rustix::system::sysinfo();
    #[allow(clippy::useless_conversion, reason = "the type differs between C libraries")]
    let host = u64::from(info.totalram).saturating_mul(info.mem_unit.into());
    if bytes > host {
        return Err(Failure::host(format!(
            "--memory: {} MiB is more than this host's {} MiB; ask for less",
            bytes >> 20,
            host >> 20
        )));
    }
    Ok(())
}

/// Warnings go to standard error, or everything that the filter lets through to `--trace`'s file.
fn start_log(args: &RunArgs) -> Result<(), Failure> {
    let started = match &args.trace {
        None => tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new(match args.engine {
                Some(EngineChoice::Auto) => format!("warn,{CHOICE}=info"),
                _ => "warn".into(),
            }))
            .with_writer(io::stderr)
            .without_time()
            .with_target(false)
            .try_init(),
        Some(path) => {
            let file = File::create(path)
                .map_err(|e| Failure::input(format!("--trace {}: can't be written: {e}", path.display())))?;
            let filter = EnvFilter::try_new(&args.trace_filter)
                .map_err(|e| Failure::usage(format!("--trace-filter {}: {e}", args.trace_filter)))?;
            tracing_subscriber::fmt()
                .with_env_filter(filter)
                .with_ansi(false)
                .with_writer(Arc::new(file))
                .try_init()
        }
    };
    started.map_err(|e| Failure::internal(format!("can't start the log: {e}")))
}
