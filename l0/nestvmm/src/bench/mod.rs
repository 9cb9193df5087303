//! `nestvmm bench`: how fast this is, as ratios against a peer measured in the same run, and what exits take.
//!
//! Not supported: comparing with anything but QEMU's TCG.

mod boot;
mod engines;
mod exits;
mod mix;
mod nested;
mod peer;
mod vmexit;

use crate::cli::BenchCommand;
use crate::status::Failure;

/// Runs one benchmark.
///
/// # Errors
/// [`Failure`] when an input can't be used or a guest does not do what is measured.
pub fn bench(command: &BenchCommand) -> Result<(), Failure> {
    match command {
        BenchCommand::Boot(args) => boot::boot(args),
        BenchCommand::Engines(args) => engines::engines(args),
        BenchCommand::Exits(args) => exits::exits(args),
        BenchCommand::Nested(args) => nested::nested(args),
        BenchCommand::Vmexit(args) => vmexit::vmexit(args),
        BenchCommand::Mix => {
            mix::print();
            Ok(())
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
