//! The command line.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};
use x86_spec::exit::ExitReason;

use hypervisor::{Ept02Config, MAX_EPT02_PAGES, MIN_EPT02_PAGES};
use machine::iommu::IommuOptions;
use memory::L1Ram;

use scenario_runner::suite::Shard;

use crate::image::{DEFAULT_COMMAND_LINE, DEFAULT_KERNEL_PACKAGE};
use crate::status;

/// Smallest RAM that a PC kernel can be expected to start in.
pub const MIN_MEMORY: u64 = 64 << 20;

/// Runs x86-64 kernels and hypervisors on any x86-64 Linux host, with or without /dev/kvm.
#[derive(Debug, Parser)]
#[command(name = "nestvmm", version, about, after_help = status::HELP, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boot a disk image or a kernel
    Run(Box<RunArgs>),
    /// Boot L1, boot L2 in it, run a few commands there, and sum up what it took
    Demo(DemoArgs),
    /// Say what this host offers and which engine would be used
    Doctor(DoctorArgs),
    /// Build an image, or show what is in one
    #[command(subcommand)]
    Image(ImageCommand),
    /// In a guest: run the command that `run --exec` sends over a serial port
    #[command(hide = true)]
    ServeExec {
        /// The terminal of the serial port
        port: PathBuf,
    },
    /// Run guests as files describe it, and judge what they do
    #[command(subcommand)]
    Scenario(ScenarioCommand),
    /// Read what `run --trace-exits` wrote
    #[command(subcommand)]
    Trace(TraceCommand),
    /// Measure speed, as ratios against a peer in the same run
    #[command(subcommand)]
    Bench(BenchCommand),
}

/// Subcommands of `trace`.
#[derive(Debug, Subcommand)]
pub enum TraceCommand {
    /// Print the tables of `run --exit-stats`, of a trace or a part of it
    Summary(TraceSummaryArgs),
    /// Print a line for each exit
    Show(TraceShowArgs),
    /// Write trace-event JSON, which Perfetto and Chrome show
    Export(TraceExportArgs),
}

/// Which part of a trace.
#[derive(Clone, Copy, Debug, Args)]
pub struct TraceWindow {
    /// Leave out what was before this time, in seconds from the machine's start
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub from: Option<u64>,
    /// Leave out what was after this time
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub to: Option<u64>,
}

/// Arguments of `trace summary`.
#[derive(Debug, Args)]
pub struct TraceSummaryArgs {
    /// File that `run --trace-exits` wrote
    pub file: PathBuf,
    /// Which part of it.
    #[command(flatten)]
    pub window: TraceWindow,
    /// Print JSON, as `run --exit-stats-json` writes it
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `trace show`.
#[derive(Debug, Args)]
pub struct TraceShowArgs {
    /// File that `run --trace-exits` wrote
    pub file: PathBuf,
    /// Which part of it.
    #[command(flatten)]
    pub window: TraceWindow,
    /// Only exits of this level
    #[arg(long, value_enum)]
    pub level: Option<TraceLevel>,
    /// Only exits that this level handled
    #[arg(long, value_enum)]
    pub owner: Option<TraceOwner>,
    /// Only exits for this reason, by name (CPUID); may be repeated
    #[arg(long = "reason", value_name = "NAME", value_parser = parse_reason)]
    pub reasons: Vec<ExitReason>,
    /// Only the exit with this number, or those from FIRST to LAST
    #[arg(long, value_name = "FIRST[-LAST]", value_parser = parse_numbers)]
    pub number: Option<(u64, u64)>,
    /// Only exits that exit N caused
    #[arg(long, value_name = "N")]
    pub cause: Option<u64>,
    /// Name L1's code by the symbols in FILE: ELF, System.map or /proc/kallsyms
    #[arg(long, value_name = "FILE")]
    pub symbols: Option<PathBuf>,
    /// Name L2's code by the symbols in FILE
    #[arg(long, value_name = "FILE")]
    pub l2_symbols: Option<PathBuf>,
    /// Hexadecimal number to add to the addresses in both files, for a kernel that moved itself
    #[arg(long, value_name = "HEX", value_parser = parse_hex)]
    pub symbol_offset: Option<u64>,
}

/// Arguments of `trace export`.
#[derive(Debug, Args)]
pub struct TraceExportArgs {
    /// File that `run --trace-exits` wrote
    pub file: PathBuf,
    /// Which part of it.
    #[command(flatten)]
    pub window: TraceWindow,
    /// File to write
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

/// `trace show --level`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TraceLevel {
    /// L0's guest.
    L1,
    /// L1's guest.
    L2,
}

/// `trace show --owner`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TraceOwner {
    /// L0 alone.
    L0,
    /// L1.
    L1,
}

/// Seconds as nanoseconds.
fn parse_seconds(s: &str) -> Result<u64, String> {
    let seconds: f64 = s.parse().map_err(|_| "give seconds, for example 1.5")?;
    // Larger ones saturate.
    if seconds >= 0.0 { Ok((seconds * 1e9) as u64) } else { Err("give seconds from 0 on".into()) }
}

fn parse_reason(s: &str) -> Result<ExitReason, String> {
    let found = ExitReason::ALL.iter().find(|r| r.name().eq_ignore_ascii_case(s));
    found.copied().ok_or_else(|| "is no exit reason; `nestvmm trace summary` names those that occur".into())
}

/// A hexadecimal number, with or without `0x`.
fn parse_hex(s: &str) -> Result<u64, String> {
    let digits = s.strip_prefix("0x").unwrap_or(s);
    u64::from_str_radix(digits, 16).map_err(|e| format!("{s:?} is no hexadecimal number of 64 bits: {e}"))
}

fn parse_numbers(s: &str) -> Result<(u64, u64), String> {
    let (first, last) = s.split_once('-').unwrap_or((s, s));
    let number = |n: &str| n.parse().map_err(|_| "give a number, or FIRST-LAST".to_owned());
    Ok((number(first)?, number(last)?))
}

/// Subcommands of `bench`.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Boot an image here and under QEMU's TCG, run the mix in both and on the host, and compare
    Boot(BenchBootArgs),
    /// Boot L1 and in it L2, here and under QEMU's TCG with SVM, measure L2's exits in both, and compare
    Nested(BenchNestedArgs),
    /// Measure what exits cost the guest that causes them; in L1 with --engine kvm, an L2
    Vmexit(BenchVmexitArgs),
    /// Measure what exits of L2 take, by level, in all ways of VMCS access and MMU modes
    Exits(BenchExitsArgs),
    /// Measure the speed of code under each engine, and what exits, VMX instructions and hand-overs take
    Engines(BenchEnginesArgs),
    /// Run a fixed user-mode workload here and print a line per part, in milliseconds
    Mix,
}

/// Arguments of `bench engines`.
#[derive(Debug, Args)]
pub struct BenchEnginesArgs {
    /// Rounds of each exit, at most 10000; medians are printed
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10000))]
    pub rounds: u32,
    /// Write everything that was measured as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Arguments of `bench exits`.
#[derive(Debug, Args)]
pub struct BenchExitsArgs {
    /// Image that `nestvmm image build` made: L2s under its KVM are measured too
    pub image: Option<PathBuf>,
    /// Whose L2s, parted by commas [default: the microvisor's, and KVM's if there is an IMAGE]
    #[arg(long, value_enum, value_name = "L1", value_delimiter = ',')]
    pub l1: Vec<L1Choice>,
    /// How L1 accesses its VMCS, parted by commas
    #[arg(long, value_enum, value_name = "WAYS", value_delimiter = ',',
        default_values_t = [VmcsAccessChoice::Trapped, VmcsAccessChoice::Shadow, VmcsAccessChoice::Direct])]
    pub vmcs_access: Vec<VmcsAccessChoice>,
    /// How L2's memory is mapped, parted by commas
    #[arg(long, value_enum, value_name = "MODES", value_delimiter = ',',
        default_values_t = [MmuChoice::Ept, MmuChoice::ShadowOnEpt])]
    pub mmu: Vec<MmuChoice>,
    /// Rounds of each benchmark
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..=10000))]
    pub rounds: u32,
    /// Only the benchmarks with these names, parted by commas
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Write everything that was measured as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the times in L0, L1 and L2 as a bar chart
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

/// `bench exits --l1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum L1Choice {
    /// The bare-metal hypervisor that comes with nestvmm: no more than a handler for one exit.
    Microvisor,
    /// Linux' KVM, with nestvmm as the VMM.
    Kvm,
}

impl fmt::Display for L1Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Microvisor => "microvisor",
            Self::Kvm => "kvm",
        })
    }
}

/// `bench exits --mmu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MmuChoice {
    /// L1 gives L2 an EPT, which L0 composes with its own.
    Ept,
    /// L1 shadows L2's page tables, and L2 runs on L0's EPT alone.
    ShadowOnEpt,
}

impl fmt::Display for MmuChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ept => "ept",
            Self::ShadowOnEpt => "shadow-on-ept",
        })
    }
}

/// Arguments of `bench nested`.
#[derive(Debug, Args)]
pub struct BenchNestedArgs {
    /// Image that `nestvmm image build` made, with nestvmm and an L2 in it
    pub image: PathBuf,
    /// QEMU's program
    #[arg(long, value_name = "FILE", default_value = "qemu-system-x86_64")]
    pub qemu: PathBuf,
    /// How often each boots; medians are compared
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub runs: usize,
    /// Rounds of each exit
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10000))]
    pub rounds: u32,
}

/// Arguments of `bench vmexit`.
#[derive(Debug, Args)]
pub struct BenchVmexitArgs {
    /// What executes the guest's instructions
    #[arg(long, value_enum, default_value_t = EngineChoice::Auto)]
    pub engine: EngineChoice,
    /// Rounds of each exit, at most 10000
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=10000))]
    pub rounds: u32,
    /// Only the exits whose names start so
    #[arg(long, value_name = "PREFIX")]
    pub only: Option<String>,
    /// Only the exits with these names, parted by commas
    #[arg(long, value_name = "NAMES")]
    pub exactly: Option<String>,
}

/// Arguments of `bench boot`.
#[derive(Debug, Args)]
pub struct BenchBootArgs {
    /// Image that `nestvmm image build` made, with nestvmm in it
    pub image: PathBuf,
    /// QEMU's program
    #[arg(long, value_name = "FILE", default_value = "qemu-system-x86_64")]
    pub qemu: PathBuf,
    /// How often each boots; medians are compared
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub runs: usize,
}

/// Subcommands of `scenario`.
#[derive(Debug, Subcommand)]
pub enum ScenarioCommand {
    /// Run scenarios
    #[command(after_help = status::SCENARIO_HELP)]
    Run(ScenarioRunArgs),
    /// Show the scenarios that are part of nestvmm, and those in ./scenarios, or given ones
    List(ScenarioListArgs),
    /// Look for mistakes in scenarios without running them
    Check(ScenarioCheckArgs),
}

/// Arguments of `scenario run`.
#[derive(Debug, Args)]
pub struct ScenarioRunArgs {
    /// What to run: names of scenarios that are part of nestvmm, files, folders, or all
    #[arg(required = true, value_name = "SCENARIO")]
    pub scenarios: Vec<String>,
    /// How many run at a time [default: the number of processors]
    #[arg(short, long, value_name = "N")]
    pub jobs: Option<usize>,
    /// Run only a part of them, for a CI matrix: 1/3, 2/3 and 3/3 are all
    #[arg(long, value_name = "INDEX/COUNT")]
    pub shard: Option<Shard>,
    /// Run only those with TAG; may be repeated
    #[arg(long = "tag", value_name = "TAG")]
    pub tags: Vec<String>,
    /// Leave out those with this tag or name; may be repeated
    #[arg(long, value_name = "TAG")]
    pub skip: Vec<String>,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write the results as JUnit XML
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Where the consoles of runs that did not pass are kept
    #[arg(long, value_name = "DIR", default_value = "scenario-logs")]
    pub logs: PathBuf,
    /// Keep the consoles of runs that passed too
    #[arg(long)]
    pub keep_logs: bool,
    /// Multiply all time limits, for a slow or busy host
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub patience: u32,
    /// Image for the guest NAME of scenarios; may be repeated
    #[arg(long = "guest", value_name = "NAME=FILE", value_parser = parse_guest)]
    pub guests: Vec<GuestFile>,
}

/// Arguments of `scenario list`.
#[derive(Debug, Args)]
pub struct ScenarioListArgs {
    /// What to show: names, files, folders, or all
    #[arg(value_name = "SCENARIO")]
    pub scenarios: Vec<String>,
    /// Image for the guest NAME of scenarios; may be repeated
    #[arg(long = "guest", value_name = "NAME=FILE", value_parser = parse_guest)]
    pub guests: Vec<GuestFile>,
}

/// Arguments of `scenario check`.
#[derive(Debug, Args)]
pub struct ScenarioCheckArgs {
    /// What to check: names, files, folders, or all
    #[arg(required = true, value_name = "SCENARIO")]
    pub scenarios: Vec<String>,
    /// Image for the guest NAME of scenarios; may be repeated
    #[arg(long = "guest", value_name = "NAME=FILE", value_parser = parse_guest)]
    pub guests: Vec<GuestFile>,
}

/// `--guest`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestFile {
    /// The name that scenarios use.
    pub name: String,
    /// What is booted.
    pub image: PathBuf,
}

fn parse_guest(s: &str) -> Result<GuestFile, String> {
    match s.split_once('=') {
        Some((name, image)) if !name.is_empty() && !image.is_empty() => {
            Ok(GuestFile { name: name.into(), image: image.into() })
        }
        _ => Err("give NAME=FILE, for example demo=l1.img".into()),
    }
}

/// Subcommands of `image`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Build a bootable disk image from the system's packages: kernel, KVM modules, busybox, nestvmm
    Build(Box<BuildArgs>),
    /// Show what is in a disk image or kernel
    Inspect {
        /// The file
        image: PathBuf,
    },
}

/// Arguments of `image build`.
#[derive(Debug, Args)]
pub struct BuildArgs {
    /// The image file to write
    pub output: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    pub force: bool,
    /// Package to take the kernel and its modules from
    #[arg(long, value_name = "NAME", default_value = DEFAULT_KERNEL_PACKAGE)]
    pub kernel_package: String,
    /// Kernel file to take instead of a package
    #[arg(long, value_name = "FILE", conflicts_with = "kernel_package")]
    pub kernel_file: Option<PathBuf>,
    /// The kernel file's modules (/lib/modules/VERSION)
    #[arg(long, value_name = "DIR", requires = "kernel_file")]
    pub modules_dir: Option<PathBuf>,
    /// Kernel module to add to KVM's; may be repeated
    #[arg(long = "module", value_name = "NAME")]
    pub modules: Vec<String>,
    /// Statically linked busybox to take instead of the package's
    #[arg(long, value_name = "FILE")]
    pub busybox: Option<PathBuf>,
    /// Statically linked nestvmm to put into the image [default: this one, or one beside it, if
    /// it is]
    #[arg(long, value_name = "FILE")]
    pub nestvmm: Option<PathBuf>,
    /// Whether L1 gets an L2 and the command boot-l2
    #[arg(long, value_enum, default_value_t = OnOff::On)]
    pub l2: OnOff,
    /// Package to take L2's kernel from [default: L1's kernel]
    #[arg(long, value_name = "NAME")]
    pub l2_kernel_package: Option<String>,
    /// Kernel file for L2 [default: L1's kernel]
    #[arg(long, value_name = "FILE", conflicts_with = "l2_kernel_package")]
    pub l2_kernel_file: Option<PathBuf>,
    /// L2's kernel command line
    #[arg(long, value_name = "STRING", default_value = DEFAULT_COMMAND_LINE)]
    pub l2_append: String,
    /// File of the host to put into L2's initrd, and its path there; may be repeated
    #[arg(long = "l2-file", value_name = "HOST=PATH", value_parser = parse_file)]
    pub l2_files: Vec<(PathBuf, String)>,
    /// File of the host to put into L1's initrd, and its path there; may be repeated
    #[arg(long = "file", value_name = "HOST=PATH", value_parser = parse_file)]
    pub files: Vec<(PathBuf, String)>,
    /// Kernel command line
    #[arg(long, value_name = "STRING", default_value = DEFAULT_COMMAND_LINE)]
    pub append: String,
    /// How the initrd is packed
    #[arg(long, value_enum, default_value_t = Compression::None)]
    pub compression: Compression,
}

/// `--compression`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Compression {
    /// Not at all: the least work for a slow CPU.
    None,
    /// gzip.
    Gzip,
    /// LZ4.
    Lz4,
}

/// `--file`: a host file and, after the last `=`, its path in the image.
fn parse_file(s: &str) -> Result<(PathBuf, String), String> {
    match s.rsplit_once('=') {
        Some((from, to)) if !from.is_empty() && !to.is_empty() => Ok((from.into(), to.into())),
        _ => Err("give HOST=PATH, for example ./test=/bin/test".into()),
    }
}

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = status::HELP)]
pub struct RunArgs {
    /// What to boot: a disk image (GPT with an EFI system partition that has a Boot Loader
    /// Specification entry), a bzImage, a unified kernel image, an ELF with a PVH note, or a multiboot 1
    /// kernel
    #[arg(required_unless_present = "kernel")]
    pub image: Option<PathBuf>,
    /// Kernel to boot, instead of the image's
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initrd, instead of the image's
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line, instead of the image's [default for a bzImage without an image: console=ttyS0]
    #[arg(long, value_name = "STRING")]
    pub append: Option<String>,
    /// Module for a multiboot or PVH kernel: a file, then, after a space, its arguments; may be
    /// repeated
    #[arg(long = "module", value_name = "FILE[ ARGS]")]
    pub modules: Vec<String>,
    /// Boot entry of the image to use, by name or pattern
    #[arg(long, value_name = "NAME")]
    pub entry: Option<String>,
    /// How a Linux kernel is entered
    #[arg(long, value_enum, default_value_t = EntryPoint::Auto)]
    pub entry_point: EntryPoint,
    /// RAM, with suffix K, M, G or T; a plain number is MiB
    #[arg(short, long, value_name = "SIZE", default_value = "1G")]
    pub memory: MemorySize,
    /// What executes the guest's instructions [default: auto, without a word about what it takes]
    #[arg(long, value_enum)]
    pub engine: Option<EngineChoice>,
    /// Let the software engine make host code of what runs often, instead of interpreting all
    #[arg(long, value_enum, default_value_t = OnOff::On)]
    pub translator: OnOff,
    /// Offer VMX to the guest, so that it can be a hypervisor [default: on; off with --engine kvm, where it is
    /// incomplete]
    #[arg(long, value_enum)]
    pub vmx: Option<VmxChoice>,
    /// Where the guest's local APIC is with --engine kvm [default: split for a guest without VMX and IOMMU, if KVM can
    /// do that; else userspace]
    #[arg(long, value_enum)]
    pub irqchip: Option<IrqchipChoice>,
    /// How L1 accesses its VMCS
    #[arg(long, value_enum, default_value_t = VmcsAccessChoice::Shadow)]
    pub vmcs_access: VmcsAccessChoice,
    /// Most pages of 4 KiB for EPT02, the tables that L1's guests run on
    #[arg(long, value_name = "N", default_value_t = Ept02Config::default().pages,
        value_parser = RangedU64ValueParser::<u64>::new().range(MIN_EPT02_PAGES..=MAX_EPT02_PAGES))]
    pub ept02_pages: u64,
    /// How EPT02 follows the guest's own EPT
    #[arg(long, value_enum, default_value_t = EptSyncChoice::Invept)]
    pub ept_sync: EptSyncChoice,
    /// Add a virtio disk that is FILE, a raw image or block device; ",ro" after it refuses writes. May be
    /// repeated
    #[arg(long = "disk", value_name = "FILE[,ro]")]
    pub disks: Vec<DiskFile>,
    /// Add an NVMe disk that is FILE, as --disk does
    #[arg(long = "nvme", value_name = "FILE[,ro]")]
    pub nvme: Vec<DiskFile>,
    /// Show the guest the disk image that it is booted from as its first disk
    #[arg(long, value_enum, default_value_t = ImageDisk::Ro)]
    pub image_disk: ImageDisk,
    /// Add a virtio entropy device
    #[arg(long, value_enum, default_value_t = OnOff::On)]
    pub rng: OnOff,
    /// Give the guest an IOMMU (Intel VT-d) for its PCI devices and interrupts
    #[arg(long, value_enum, default_value_t = IommuChoice::Off)]
    pub iommu: IommuChoice,
    /// Where the guest's serial console goes: stdio, file:PATH (output only), unix:PATH (a
    /// socket that is listened on) or none [default: stdio; with --exec none, but the end is shown
    /// when something goes wrong]
    #[arg(long, value_name = "WHERE")]
    pub console: Option<ConsoleTarget>,
    /// Run COMMAND in the guest instead of a shell and end with its status; standard input, output and
    /// error are the command's. For images that `nestvmm image build` made
    #[arg(long, value_name = "COMMAND", conflicts_with = "debug_exit")]
    pub exec: Option<String>,
    /// Write how the command ended to FILE: "exited N", "signal N", or "unknown"
    #[arg(long, value_name = "FILE", requires = "exec")]
    pub exec_status: Option<PathBuf>,
    /// Say at the end why VM entries of the guest failed
    #[arg(long, value_enum, default_value_t = Explain::On)]
    pub explain_entries: Explain,
    /// Print exit statistics at the end and on SIGUSR1
    #[arg(long)]
    pub exit_stats: bool,
    /// Write exit statistics as JSON to FILE at the end and on SIGUSR1
    #[arg(long, value_name = "FILE")]
    pub exit_stats_json: Option<PathBuf>,
    /// Write a record of each VM exit to FILE, for `nestvmm trace`
    #[arg(long, value_name = "FILE")]
    pub trace_exits: Option<PathBuf>,
    /// Most that this file takes; the oldest records give way
    #[arg(long, value_name = "SIZE", default_value = "64M", requires = "trace_exits")]
    pub trace_exits_size: TraceSize,
    /// Write a log to FILE
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// What the log holds, in tracing's filter syntax; "trace" logs every VM exit
    #[arg(long, value_name = "FILTER", default_value = "debug", requires = "trace")]
    pub trace_filter: String,
    /// Add an isa-debug-exit device at port 0xf4: a guest's write ends the run with its status
    #[arg(long)]
    pub debug_exit: bool,
    /// Add a pc-testdev device (ports 0xe0 and 0x2000, memory at 0xff000000)
    #[arg(long)]
    pub testdev: bool,
    /// When the guest crashes (triple fault and the like)
    #[arg(long, value_enum, default_value_t = OnCrash::Report)]
    pub on_crash: OnCrash,
    /// When the guest resets the machine
    #[arg(long, value_enum, default_value_t = OnReset::Reboot)]
    pub on_reset: OnReset,
}

/// Arguments of `demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Image of `nestvmm image build`; built there if it is missing [default: one that is kept in
    /// nestvmm's cache directory and built anew when it is older than the program]
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
}

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl RunArgs {
    /// Why the guest's local APIC can't be KVM's, if it can't.
    pub fn needs_apic_here(&self) -> Option<&'static str> {
        if self.vmx() != VmxChoice::Off {
            Some("the local APIC of a guest that uses VMX has to be here; use --vmx off")
        } else if self.iommu != IommuChoice::Off {
            Some("the IOMMU remaps interrupts for a local APIC that is here; use --iommu off")
        } else {
            None
        }
    }

    /// What executes the guest's instructions.
    pub fn engine(&self) -> EngineChoice {
        self.engine.unwrap_or(EngineChoice::Auto)
    }

    /// Which VMX the guest is offered. On `/dev/kvm` one only if it was asked for: see docs/unsupported.md.
    pub fn vmx(&self) -> VmxChoice {
        let default = if self.engine() == EngineChoice::Kvm { VmxChoice::Off } else { VmxChoice::On };
        self.vmx.unwrap_or(default)
    }
}

/// `--engine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EngineChoice {
    /// The software CPU.
    Soft,
    /// /dev/kvm; VMX is incomplete with it.
    Kvm,
    /// KVM if the guest has no VMX and a probe finds KVM right and faster, else the software CPU.
    Auto,
}

/// `--disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFile {
    /// The file.
    pub path: PathBuf,
    /// The guest can't write.
    pub read_only: bool,
}

impl FromStr for DiskFile {
    type Err = String;

    /// A path; `,ro` or `,rw` at its end are the options.
    fn from_str(s: &str) -> Result<Self, String> {
        let (path, read_only) = match (s.strip_suffix(",ro"), s.strip_suffix(",rw")) {
            (Some(path), _) => (path, true),
            (None, Some(path)) => (path, false),
            (None, None) => (s, false),
        };
        if path.is_empty() {
            return Err("give FILE or FILE,ro".into());
        }
        Ok(Self { path: path.into(), read_only })
    }
}

/// `--image-disk`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageDisk {
    /// It can read it.
    Ro,
    /// It can change it.
    Rw,
    /// It does not see it.
    Off,
}

/// `--vmx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VmxChoice {
    /// That of nestvmm, which sees each exit of the guest's guests.
    On,
    /// None.
    Off,
    /// That of the host's KVM, if it has nested virtualization; with --engine kvm.
    Host,
}

/// `--irqchip`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IrqchipChoice {
    /// The local APIC in KVM, I/O APIC and 8259 here: its accesses and HLT cost no exits.
    Split,
    /// All here, as with --engine soft.
    Userspace,
}

/// A switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    /// On.
    On,
    /// Off.
    Off,
}

/// `--explain-entries`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Explain {
    /// Every check that failed, with field values and what would satisfy it.
    On,
    /// That, and VMCS01, VMCS12 and VMCS02 side by side, with the origin of each control bit.
    View,
    /// Nothing.
    Off,
}

/// `--vmcs-access`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VmcsAccessChoice {
    /// Each VMREAD and VMWRITE exits to L0.
    Trapped,
    /// VMREAD and VMWRITE work on a shadow VMCS, without an exit.
    Shadow,
    /// As memory: L1 is offered Hyper-V's enlightened VMCS, and no control that it has no field for.
    Direct,
}

impl From<VmcsAccessChoice> for hypervisor::VmcsAccess {
    fn from(choice: VmcsAccessChoice) -> Self {
        match choice {
            VmcsAccessChoice::Trapped => Self::Trapped,
            VmcsAccessChoice::Shadow => Self::Shadow,
            VmcsAccessChoice::Direct => Self::Direct,
        }
    }
}

/// `--iommu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IommuChoice {
    /// There is none.
    Off,
    /// There is one.
    On,
    /// There is one in caching mode: the guest has to invalidate what was not present, too.
    CachingMode,
}

impl IommuChoice {
    /// What it means for a machine with `ram`.
    pub fn options(self, ram: &L1Ram) -> Option<IommuOptions> {
        (self != Self::Off)
            .then(|| IommuOptions { ram: ram.clone(), caching_mode: self == Self::CachingMode })
    }
}

/// `--ept-sync`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EptSyncChoice {
    /// When the guest executes INVEPT, as a processor does.
    Invept,
    /// At each write to its tables, whose pages are write-protected.
    WriteProtect,
}

impl From<EptSyncChoice> for hypervisor::EptSync {
    fn from(choice: EptSyncChoice) -> Self {
        match choice {
            EptSyncChoice::Invept => Self::Invept,
            EptSyncChoice::WriteProtect => Self::WriteProtect,
        }
    }
}

/// `--entry-point`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EntryPoint {
    /// The unpacked kernel's 64-bit entry, else PVH, else its own decompressor.
    Auto,
    /// PVH.
    Pvh,
    /// The decompressor inside the bzImage.
    Decompressor,
}

/// `--on-crash`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnCrash {
    /// Print registers, last exits and disassembly, and end.
    Report,
    /// Reset the machine, as hardware does.
    Reset,
}

/// `--on-reset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnReset {
    /// Boot again.
    Reboot,
    /// End.
    Exit,
}

/// `--console`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// Standard input and output.
    Stdio,
    /// A file, for output.
    File(PathBuf),
    /// A socket to listen on.
    Unix(PathBuf),
    /// Nowhere, but the end is kept for a message.
    Kept,
    /// Nowhere.
    None,
}

impl FromStr for ConsoleTarget {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s.split_once(':') {
            None if s == "stdio" => Ok(Self::Stdio),
            None if s == "none" => Ok(Self::None),
            Some(("file", p)) if !p.is_empty() => Ok(Self::File(p.into())),
            Some(("unix", p)) if !p.is_empty() => Ok(Self::Unix(p.into())),
            _ => Err("give stdio, file:PATH, unix:PATH or none".into()),
        }
    }
}

/// `--memory`: bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize(pub u64);

/// A number of bytes; without a suffix, of MiB.
fn parse_size(s: &str) -> Result<u64, String> {
    let digits = s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
    let (number, suffix) = s.split_at(digits);
    let shift = match suffix.to_ascii_uppercase().as_str() {
        "K" | "KIB" => 10,
        "" | "M" | "MIB" => 20,
        "G" | "GIB" => 30,
        "T" | "TIB" => 40,
        _ => return Err("give a number with suffix K, M, G or T, for example 2G".into()),
    };
    let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    bytes.ok_or_else(|| "give a number with suffix K, M, G or T, for example 2G".into())
}

impl FromStr for MemorySize {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bytes = parse_size(s)?;
        if bytes < MIN_MEMORY {
            return Err(format!("too little: at least {} MiB are needed", MIN_MEMORY >> 20));
        }
        Ok(Self(bytes))
    }
}

/// `--trace-exits-size`: bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceSize(pub u64);

impl FromStr for TraceSize {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let bytes = parse_size(s)?;
        if bytes < exit_trace::MIN_SIZE {
            return Err(format!("too little: at least {}K are needed", exit_trace::MIN_SIZE.div_ceil(1024)));
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parser_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn memory_sizes() {
        let ok = |s: &str| s.parse::<MemorySize>().map(|m| m.0).ok();
        assert_eq!(ok("64M"), Some(64 << 20));
        assert_eq!(ok("512"), Some(512 << 20));
        assert_eq!(ok("6GiB"), Some(6 << 30));
        assert_eq!(ok("65536k"), Some(64 << 20));
        for bad in ["63M", "", "G", "-1G", "1.5G", "99999999999T", "1X", "18446744073709551616"] {
            assert_eq!(ok(bad), None, "{bad}");
        }
    }

    #[test]
    fn parts_of_a_trace() {
        assert_eq!(parse_seconds("1.5"), Ok(1_500_000_000));
        assert!(parse_seconds("-1").is_err() && parse_seconds("nan").is_err() && parse_seconds("").is_err());
        assert_eq!(parse_reason("cpuid"), Ok(ExitReason::Cpuid));
        assert!(parse_reason("nothing").is_err());
        assert_eq!((parse_numbers("7"), parse_numbers("7-9")), (Ok((7, 7)), Ok((7, 9))));
        assert!(parse_numbers("7-").is_err() && parse_numbers("x").is_err());
        assert_eq!("132K".parse(), Ok(TraceSize(132 << 10)));
        assert!("131K".parse::<TraceSize>().is_err());
    }

    #[test]
    fn consoles() {
        assert_eq!("file:a:b".parse(), Ok(ConsoleTarget::File("a:b".into())));
        assert_eq!("none".parse(), Ok(ConsoleTarget::None));
        assert!("file:".parse::<ConsoleTarget>().is_err());
        assert!("tcp:1".parse::<ConsoleTarget>().is_err());
    }
}
