//! What an engine takes here, measured with guests of a few instructions. A figure that can't be had says why.

use std::sync::Arc;
use std::time::Duration;

use engine::{Engine, EngineError};
use engine_kvm::HybridEngine;
use engine_kvm::tiny::{self, HLT, Level, Unmeasured, VMREAD};
use engine_kvm::traps::{Trap, traps};
use engine_soft::SoftEngine;
use memory::MachineMemory;
use serde::Serialize;
use x86_spec::exit::ExitReason;

/// How long a loop runs.
const LOOP: Duration = Duration::from_millis(100);

/// Something measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Figure {
    /// In the unit that its name says.
    Value(f64),
    /// Not available here, and why.
    Unavailable(String),
}

impl From<Result<f64, Unmeasured>> for Figure {
    fn from(result: Result<f64, Unmeasured>) -> Self {
        match result {
            Ok(value) => Self::Value(value.round()),
            Err(why) => Self::Unavailable(why.to_string()),
        }
    }
}

impl Figure {
    /// The value divided by `by`, with `unit`; or why there is none.
    pub fn text(&self, by: f64, unit: &str) -> String {
        match self {
            Self::Value(v) => format!("{:.1} {unit}", v / by),
            Self::Unavailable(why) => format!("not available here: {why}"),
        }
    }
}

/// What is measured of each engine.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Instructions a second of a small loop at privilege level 0.
    pub cpl0_instructions_per_second: Figure,
    /// The same at privilege level 3.
    pub cpl3_instructions_per_second: Figure,
    /// Median round trip of an exit (HLT), in nanoseconds.
    pub exit_ns: Figure,
}

impl Figures {
    /// Measures the engine that `new_engine` makes.
    pub fn of<E: Engine>(
        new_engine: impl Fn(Arc<MachineMemory>) -> Result<E, EngineError>,
        rounds: u32,
    ) -> Self {
        Self {
            cpl0_instructions_per_second: tiny::speed(&new_engine, Level::Kernel, LOOP).into(),
            cpl3_instructions_per_second: tiny::speed(&new_engine, Level::User, LOOP).into(),
            exit_ns: tiny::exits(&new_engine, (&HLT, ExitReason::Hlt), rounds).map(median_ns).into(),
        }
    }
}

/// What a VMX instruction of a guest takes until L0 has it.
#[derive(Clone, Debug, Serialize)]
pub struct TrapFigure {
    /// How it reaches L0: `software` (the software engine's exit), `emulation-failure` or `breakpoint` (KVM's).
    pub method: &'static str,
    /// Median in nanoseconds.
    pub ns: Figure,
}

/// All ways for VMX instructions to reach L0.
pub fn vmx_traps(rounds: u32) -> Vec<TrapFigure> {
    let soft = tiny::exits(SoftEngine::new, (&VMREAD, ExitReason::Vmread), rounds);
    let kvm = Trap::ALL.map(|trap| (trap.name(), traps(trap, rounds)));
    let all = [("software", soft)].into_iter().chain(kvm);
    all.map(|(method, times)| TrapFigure { method, ns: times.map(median_ns).into() }).collect()
}

/// Median of a hand-over from KVM to the software engine and back, in nanoseconds.
pub fn hand_over_ns(rounds: u32) -> Figure {
    let composed = |memory: Arc<MachineMemory>| {
        let engine = HybridEngine::new(memory.clone(), SoftEngine::new(memory)?)?;
        match engine.flaws() {
            [] => Ok(engine),
            flaws => Err(EngineError::Unsupported { engine: "kvm", reason: crate::run::without_kvm(flaws) }),
        }
    };
    tiny::hand_overs(composed, rounds).map(median_ns).into()
}

/// The median in nanoseconds.
pub fn median_ns(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).map_or(f64::NAN, |t| t.as_nanos() as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_say_why_there_are_none() {
        let why = Unmeasured::Exit("TRIPLE_FAULT".into());
        let none = Figure::from(Err(why));
        assert_eq!(none.text(1e6, "M/s"), "not available here: the guest ended with TRIPLE_FAULT");
        assert_eq!(Figure::from(Ok(2_500_000.2)).text(1e6, "M/s"), "2.5 M/s");
        let ns = |n| Duration::from_nanos(n);
        assert_eq!(median_ns(vec![ns(9), ns(1), ns(2)]), 2.0);
    }

    #[test]
    fn the_software_engine_has_all_figures_on_any_host() {
        let f = Figures::of(SoftEngine::new, 3);
        for figure in [f.cpl0_instructions_per_second, f.cpl3_instructions_per_second, f.exit_ns] {
            assert!(matches!(figure, Figure::Value(v) if v > 0.0), "{figure:?}");
        }
    }
}
