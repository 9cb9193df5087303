//! `nestvmm bench engines`: the parts that an engine's speed is made of, measured here.
//!
//! Not measured: memory accesses, paging, interrupts; `bench boot` and `bench nested` are for whole guests.

use engine_kvm::KvmEngine;
use engine_soft::SoftEngine;
use serde::Serialize;

use crate::cli::BenchEnginesArgs;
use crate::engines::figures::{Figure, Figures, TrapFigure, hand_over_ns, vmx_traps};
use crate::status::Failure;

#[derive(Debug, Serialize)]
struct Report {
    engines: Vec<EngineReport>,
    /// Until L0 has a VMX instruction of its guest.
    vmx_traps: Vec<TrapFigure>,
    /// From KVM to the software engine and back, without the exits themselves.
    hand_over_ns: Figure,
}

#[derive(Debug, Serialize)]
struct EngineReport {
    name: &'static str,
    figures: Figures,
}

/// Measures and prints.
///
/// # Errors
/// When the file can't be written.
pub fn engines(args: &BenchEnginesArgs) -> Result<(), Failure> {
    let rounds = args.rounds;
    let report = Report {
        engines: vec![
            EngineReport { name: "soft", figures: Figures::of(SoftEngine::new, rounds) },
            EngineReport { name: "kvm", figures: Figures::of(KvmEngine::new, rounds) },
        ],
        vmx_traps: vmx_traps(rounds),
        hand_over_ns: hand_over_ns(rounds),
    };
    print!("{}", table(&report));
    let Some(path) = &args.json else { return Ok(()) };
    let json = serde_json::to_vec_pretty(&report).map_err(Failure::internal)?;
    std::fs::write(path, json)
        .map_err(|e| Failure::input(format!("--json {}: can't be written: {e}", path.display())))
}

fn table(report: &Report) -> String {
    let mut lines = Vec::new();
    for EngineReport { name, figures: f } in &report.engines {
        let speed = |figure: &Figure| figure.text(1e6, "million instructions/s");
        lines.push((format!("{name}: code at CPL 0"), speed(&f.cpl0_instructions_per_second)));
        lines.push((format!("{name}: code at CPL 3"), speed(&f.cpl3_instructions_per_second)));
        lines.push((format!("{name}: an exit"), f.exit_ns.text(1.0, "ns")));
    }
    for trap in &report.vmx_traps {
        lines.push((format!("VMX instruction: {}", trap.method), trap.ns.text(1.0, "ns")));
    }
    lines.push(("hand-over, KVM to soft and back".into(), report.hand_over_ns.text(1.0, "ns")));
    lines.iter().map(|(what, figure)| format!("{what:36}{figure}\n")).collect()
}
