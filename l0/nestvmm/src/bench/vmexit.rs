//! `nestvmm bench vmexit`: what exits cost the guest that causes them.
//!
//! The guest is the microvisor's image as a plain guest, without VMX. In L1 with `--engine kvm` it is an L2.
//!
//! Not measured: exits of VMX instructions and exits that L1 handles for its L2; the microvisor's own
//! benchmarks are for those.

use crate::cli::{BenchVmexitArgs, EngineChoice};
use crate::status::Failure;

use super::peer::{MemoryFile, own_program};

/// Runs the guest, whose console is standard output.
///
/// # Errors
/// [`Failure`] when it can't be started or says that a measurement failed.
pub fn vmexit(args: &BenchVmexitArgs) -> Result<(), Failure> {
    let image = MemoryFile::new("vmexit", microvisor::BYTES)?;
    let engine = match args.engine {
        EngineChoice::Soft => "soft",
        EngineChoice::Kvm => "kvm",
        EngineChoice::Auto => "auto",
    };
    let mut words = format!("vmexit rounds={}", args.rounds);
    if let Some(only) = &args.only {
        words.push_str(&format!(" only={only}"));
    }
    let mut command = own_program()?;
    command.args(["run", "--memory", "64M", "--debug-exit", "--vmx", "off", "--engine", engine]);
    command.arg("--kernel").arg(image.path()).args(["--append", &words]);
    let status = command.status().map_err(|e| Failure::host(format!("can't start the guest: {e}")))?;
    match status.code() {
        // isa-debug-exit with 0.
        Some(1) => Ok(()),
        _ => Err(Failure::host(format!("the guest ended with {status}; see what it printed"))),
    }
}
