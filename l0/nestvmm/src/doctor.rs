//! `nestvmm doctor`: what this host offers, and which engine would be used.

use std::sync::Arc;

use engine::Engine;
use engine_kvm::{KvmEngine, device};
use engine_soft::SoftEngine;
use kvm_ioctls::{Cap, Kvm, KvmNestedStateBuffer};
use memory::MachineMemory;
use serde::Serialize;

use crate::cli::DoctorArgs;
use crate::engines::choice::{Need, Taken, choose};
use crate::engines::{
    self,
    figures::{Figures, TrapFigure, vmx_traps},
};
use crate::status::Failure;

/// Exits that are measured.
const ROUNDS: u32 = 200;

/// Everything that `doctor` finds out.
#[derive(Debug, Serialize)]
struct Report {
    cpu: CpuReport,
    kvm: KvmReport,
    engines: Vec<EngineReport>,
    /// How VMX instructions reach L0.
    vmx_traps: Vec<TrapFigure>,
    chosen: Choices,
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
    NotOpenable {
        reason: String,
    },
    Present {
        api_version: i32,
        /// In words.
        kind: String,
        /// What it virtualizes with.
        hardware: Option<&'static str>,
        /// What it gets wrong.
        flaws: Vec<String>,
        capabilities: Vec<Feature>,
    },
}

#[derive(Debug, Serialize)]
struct EngineReport {
    name: &'static str,
    usable: bool,
    detail: String,
    /// Measured.
    figures: Figures,
}

/// What `--engine auto` takes.
#[derive(Debug, Serialize)]
struct Choices {
    /// For a guest with VMX.
    vmx: Chosen,
    /// For one without (`--vmx off`).
    plain: Chosen,
}

#[derive(Debug, Serialize)]
struct Chosen {
    engine: Taken,
    why: String,
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
        vmx_traps: vmx_traps(ROUNDS),
        chosen: Choices { vmx: chosen(Need::Vmx), plain: chosen(Need::Plain) },
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
        KvmReport::NotOpenable { reason } => println!("KVM         can't be used: {reason}"),
        KvmReport::Present { api_version, kind, capabilities, .. } => {
            println!("KVM         /dev/kvm, API version {api_version}, {kind}");
            println!("            {}", features(capabilities));
        }
    }
    for e in &r.engines {
        let usable = if e.usable { "usable" } else { "not usable" };
        println!("Engine      {}: {usable}; {}", e.name, e.detail);
        if e.usable {
            let f = &e.figures;
            let speed = "million guest instructions a second in a small loop";
            println!("            CPL 0: {}", f.cpl0_instructions_per_second.text(1e6, speed));
            println!("            CPL 3: {}", f.cpl3_instructions_per_second.text(1e6, speed));
            println!("            an exit: {}", f.exit_ns.text(1e3, "µs"));
        }
    }
    for trap in &r.vmx_traps {
        println!("VMX traps   {}: {}", trap.method, trap.ns.text(1e3, "µs"));
    }
    for (guest, c) in [("with VMX", &r.chosen.vmx), ("--vmx off", &r.chosen.plain)] {
        println!("Chosen      {guest}: {}; {}", c.engine.name(), c.why);
    }
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
    if !device::path().exists() {
        return KvmReport::Absent;
    }
    let kvm = match device::open() {
        Ok(kvm) => kvm,
        Err(e) => return KvmReport::NotOpenable { reason: e.to_string() },
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
    KvmReport::Present {
        api_version: kvm.get_api_version(),
        kind: kind.into(),
        hardware: cpu.virtualization,
        flaws: engine_kvm::probe()
            .map_or_else(|e| vec![e.to_string()], |p| p.flaws.iter().map(ToString::to_string).collect()),
        capabilities,
    }
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
    let (usable, detail) = match engine_kvm::probe() {
        Ok(p) => {
            let limits = match p.flaws.as_slice() {
                [] => "runs L1 on the processor, its VMX instructions and its guests in the software engine"
                    .into(),
                flaws => crate::run::without_kvm(flaws),
            };
            (true, format!("guest TSC at {} MHz; {limits}", p.tsc_hz / 1_000_000))
        }
        Err(e) => (false, e.to_string()),
    };
    EngineReport { name: "kvm", usable, detail, figures: Figures::of(KvmEngine::new, ROUNDS) }
}

fn soft_report() -> EngineReport {
    let engine = MachineMemory::new(0x1000)
        .map_err(|e| e.to_string())
        .and_then(|memory| SoftEngine::new(Arc::new(memory)).map_err(|e| e.to_string()));
    let (usable, detail) = match engine {
        Ok(e) => (true, format!("guest TSC at {} MHz", e.tsc_frequency() / 1_000_000)),
        Err(why) => (false, why),
    };
    EngineReport { name: "soft", usable, detail, figures: Figures::of(SoftEngine::new, ROUNDS) }
}

/// What `--engine auto` takes for a guest that needs this.
fn chosen(need: Need) -> Chosen {
    let choice = choose(need, &engines::look(need));
    Chosen { engine: choice.engine, why: choice.why.to_string() }
}
