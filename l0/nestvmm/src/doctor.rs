//! `nestvmm doctor`: what this host offers, and which engine would be used.

use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use engine::Engine;
use engine_kvm::KvmEngine;
use engine_soft::SoftEngine;
use hypervisor::{Ept02Config, RunEnd, Start, VcpuLoop, VmBuilder, VmConfig, VmcsAccess};
use kvm_ioctls::{Cap, Kvm, KvmNestedStateBuffer};
use machine::boot::{BootGprs, BootState, BootTable};
use machine::{Pc, PcConfig};
use memory::{L1Gpa, MachineMemory};
use serde::Serialize;

use crate::cli::DoctorArgs;
use crate::status::Failure;

/// Everything that `doctor` finds out.
#[derive(Debug, Serialize)]
struct Report {
    cpu: CpuReport,
    kvm: KvmReport,
    engines: Vec<EngineReport>,
    chosen: Choice,
}

#[derive(Debug, Serialize)]
struct CpuReport {
    vendor: String,
    model: String,
    /// Hardware virtualization that the processor shows: vmx, svm or nothing.
    virtualization: Option<&'static str>,
    /// This host is itself a virtual machine.
    virtual_machine: bool,
    /// Features that the software engine uses where they are.
    features: Vec<Feature>,
}

#[derive(Debug, Serialize)]
struct Feature {
    name: &'static str,
    present: bool,
}

#[derive(Debug, Serialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
enum KvmReport {
    Absent,
    NotOpenable { reason: String },
    Present { api_version: i32, kind: String, capabilities: Vec<Feature> },
}

#[derive(Debug, Serialize)]
struct EngineReport {
    name: &'static str,
    usable: bool,
    detail: String,
    /// Measured: guest instructions a second in a small loop.
    instructions_per_second: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Choice {
    engine: &'static str,
    why: &'static str,
}

/// Prints what this host offers.
///
/// # Errors
/// When the report can't be printed.
pub fn doctor(args: &DoctorArgs) -> Result<(), Failure> {
    let cpu = cpu_report();
    let kvm = kvm_report(&cpu);
    let report = Report {
        kvm,
        cpu,
        engines: vec![soft_report(), kvm_engine_report()],
        chosen: Choice {
            engine: "soft",
            why: "the software engine runs on every x86-64 host, and guests that are hypervisors; --engine kvm \
                  asks for /dev/kvm",
        },
    };
    if args.json {
        let text = serde_json::to_string_pretty(&report).map_err(Failure::internal)?;
        println!("{text}");
    } else {
        print_report(&report);
    }
    Ok(())
}

fn print_report(r: &Report) {
    let features = |list: &[Feature]| {
        let marked = |f: &Feature| format!("{}{}", if f.present { "" } else { "no " }, f.name);
        list.iter().map(marked).collect::<Vec<_>>().join(", ")
    };
    println!("Processor   {} ({})", r.cpu.model, r.cpu.vendor);
    println!("            hardware virtualization: {}", r.cpu.virtualization.unwrap_or("none visible"));
    println!(
        "            this host is {}",
        if r.cpu.virtual_machine { "a virtual machine" } else { "bare metal" }
    );
    println!("            {}", features(&r.cpu.features));
    match &r.kvm {
        KvmReport::Absent => println!("KVM         no /dev/kvm"),
        KvmReport::NotOpenable { reason } => println!("KVM         /dev/kvm can't be opened: {reason}"),
        KvmReport::Present { api_version, kind, capabilities } => {
            println!("KVM         /dev/kvm, API version {api_version}, {kind}");
            println!("            {}", features(capabilities));
        }
    }
    for e in &r.engines {
        let usable = if e.usable { "usable" } else { "not usable" };
        println!("Engine      {}: {usable}; {}", e.name, e.detail);
        if let Some(speed) = e.instructions_per_second {
            let millions = speed as f64 / 1e6;
            println!("            {millions:.1} million guest instructions a second in a small loop");
        }
    }
    println!("Chosen      {}: {}", r.chosen.engine, r.chosen.why);
}

fn cpu_report() -> CpuReport {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        info.lines()
            .find_map(|l| l.split_once(':').filter(|(k, _)| k.trim() == name))
            .map(|(_, v)| v.trim().to_owned())
    };
    let flags = field("flags").unwrap_or_default();
    let has = |name: &str| flags.split_whitespace().any(|f| f == name);
    let names = [
        "sse3",
        "ssse3",
        "sse4_1",
        "sse4_2",
        "popcnt",
        "aes",
        "pclmulqdq",
        "sha_ni",
        "avx",
        "avx2",
        "fma",
        "f16c",
        "bmi1",
        "bmi2",
        "movbe",
        "rdrand",
        "rdseed",
        "cx16",
        "xsave",
        "erms",
    ];
    // Linux shows SSE3 as pni.
    let present = |name: &'static str| has(if name == "sse3" { "pni" } else { name });
    CpuReport {
        vendor: field("vendor_id").unwrap_or_else(|| "unknown vendor".into()),
        model: field("model name").unwrap_or_else(|| "unknown model".into()),
        virtualization: if has("vmx") {
            Some("vmx")
        } else if has("svm") {
            Some("svm")
        } else {
            None
        },
        virtual_machine: has("hypervisor"),
        features: names.iter().map(|n| Feature { name: n, present: present(n) }).collect(),
    }
}

fn kvm_report(cpu: &CpuReport) -> KvmReport {
    if !std::path::Path::new("/dev/kvm").exists() {
        return KvmReport::Absent;
    }
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(e) => return KvmReport::NotOpenable { reason: std::io::Error::from(e).to_string() },
    };
    let kind = match cpu.virtualization {
        Some("vmx") => "on Intel VMX",
        Some(_) => "on AMD SVM",
        None => "without VMX or SVM (a software KVM such as PVM)",
    };
    let caps = [
        ("user memory", Cap::UserMemory),
        ("set-tss-addr", Cap::SetTssAddr),
        ("nested state", Cap::NestedState),
        ("user-space MSRs", Cap::X86UserSpaceMsr),
        ("MSR filter", Cap::X86MsrFilter),
        ("guest debug", Cap::SetGuestDebug),
        ("sync regs", Cap::SyncRegs),
        ("xsave", Cap::Xsave),
        ("tsc control", Cap::TscControl),
    ];
    let mut capabilities: Vec<Feature> =
        caps.into_iter().map(|(name, cap)| Feature { name, present: kvm.check_extension(cap) }).collect();
    capabilities.push(Feature { name: "nested state read and set", present: nested_state_works(&kvm) });
    KvmReport::Present { api_version: kvm.get_api_version(), kind: kind.into(), capabilities }
}

/// Whether KVM_GET_NESTED_STATE gives a vCPU's state and KVM_SET_NESTED_STATE takes it back (KVM API
/// documentation §4.114 and §4.115), as migration of guests that are hypervisors needs it.
fn nested_state_works(kvm: &Kvm) -> bool {
    if !kvm.check_extension(Cap::NestedState) {
        return false;
    }
    let round_trip = || {
        let vm = kvm.create_vm()?;
        let vcpu = vm.create_vcpu(0)?;
        let mut state = KvmNestedStateBuffer::empty();
        vcpu.nested_state(&mut state)?;
        vcpu.set_nested_state(&state)
    };
    round_trip().is_ok()
}

fn kvm_engine_report() -> EngineReport {
    let report =
        |usable, detail, speed| EngineReport { name: "kvm", usable, detail, instructions_per_second: speed };
    match engine_kvm::probe() {
        Ok(p) => {
            let limits = match p.flaws.as_slice() {
                [] => "runs L1 on the processor, its VMX instructions and its guests in the software engine"
                    .into(),
                flaws => crate::run::without_kvm(flaws),
            };
            let detail = format!("guest TSC at {} MHz; {limits}", p.tsc_hz / 1_000_000);
            match measure(KvmEngine::new) {
                Ok((_, speed)) => report(true, detail, Some(speed)),
                Err(why) => report(true, format!("{detail}; its speed could not be measured: {why}"), None),
            }
        }
        Err(e) => report(false, e.to_string(), None),
    }
}

fn soft_report() -> EngineReport {
    let report =
        |usable, detail, speed| EngineReport { name: "soft", usable, detail, instructions_per_second: speed };
    match measure(SoftEngine::new) {
        Ok((mhz, speed)) => report(true, format!("guest TSC at {mhz} MHz"), Some(speed)),
        Err(why) => report(false, why, None),
    }
}

/// Where the loop is put.
const CODE_AT: u64 = 0x10_0000;
/// Iterations of the loop: few at first, as a KVM that emulates kernel code may need a second for them;
/// many where that took no time.
const ROUNDS: [u32; 2] = [100_000, 20_000_000];
/// No engine needs longer for the first rounds.
const PATIENCE: Duration = Duration::from_secs(10);
/// Below this, the time for the first rounds says nothing.
const TOO_SHORT: Duration = Duration::from_millis(100);

/// 32-bit code at privilege level 0: `rounds` times `dec ecx; jnz`, then a write to isa-debug-exit.
fn loop_code(rounds: u32) -> [u8; 12] {
    let [a, b, c, d] = rounds.to_le_bytes();
    [0xb9, a, b, c, d, 0x49, 0x75, 0xfd, 0xb0, 0x00, 0xe6, 0xf4]
}

/// The engine's TSC frequency in MHz, and its instructions a second in a small loop of kernel code.
fn measure<E: Engine + 'static>(
    new_engine: impl Fn(Arc<MachineMemory>) -> Result<E, engine::EngineError>,
) -> Result<(u64, u64), String> {
    let (mhz, took) = run_loop(&new_engine, ROUNDS[0])?;
    let (rounds, took) =
        if took < TOO_SHORT { (ROUNDS[1], run_loop(&new_engine, ROUNDS[1])?.1) } else { (ROUNDS[0], took) };
    let ns = took.as_nanos().max(1);
    let speed = u128::from(rounds) * 2 * 1_000_000_000 / ns;
    Ok((mhz, u64::try_from(speed).unwrap_or(u64::MAX)))
}

/// Runs the loop; the engine's TSC frequency in MHz and the time that it took.
fn run_loop<E: Engine + 'static>(
    new_engine: &impl Fn(Arc<MachineMemory>) -> Result<E, engine::EngineError>,
    rounds: u32,
) -> Result<(u64, Duration), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let config = VmConfig {
        ram: 4 << 20,
        cpus: 1,
        vmx: false,
        vmcs_access: VmcsAccess::Trapped,
        ept02: Ept02Config::default(),
    };
    let size = config.machine_memory().ok_or("no memory size")?;
    let memory = Arc::new(MachineMemory::new(size).map_err(|e| text(&e))?);
    let engine = Arc::new(new_engine(memory.clone()).map_err(|e| text(&e))?);
    let mhz = engine.tsc_frequency() / 1_000_000;
    let builder = VmBuilder::new(engine, memory, config).map_err(|e| text(&e))?;
    let pc_config = PcConfig {
        ram_bytes: config.ram,
        debug_exit: true,
        clock: Some(builder.clock()),
        ..PcConfig::default()
    };
    let pc = Pc::new(pc_config, &builder.tscs()).map_err(|e| text(&e))?;
    builder.ram().write(L1Gpa(CODE_AT), &loop_code(rounds)).map_err(|e| text(&e))?;
    let state = BootState::protected32(CODE_AT as u32, BootGprs::default(), (8, 16), BootTable::default());
    let vm = builder.build(Arc::new(pc));
    let mut vcpu = VcpuLoop::new(vm.clone(), 0, Start::Boot(&state)).map_err(|e| text(&e))?;
    let handle = vm.handle().clone();
    let (done, patience) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if patience.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            handle.stop();
        }
    });
    let start = Instant::now();
    let end = vcpu.run();
    let took = start.elapsed();
    drop(done);
    // It only waits and stops; a panic of it would change nothing here.
    let _ = watchdog.join();
    match end {
        RunEnd::DebugExit(_) => {}
        RunEnd::Stopped => return Err(format!("the test loop was not done after {} s", PATIENCE.as_secs())),
        other => return Err(format!("the test loop ended with {other:?}")),
    }
    Ok((mhz, took))
}
