//! `nestvmm bench vmexit`: what exits cost the guest that causes them.
//!
//! The guest is the microvisor's image as a plain guest, without VMX. In L1 with `--engine kvm` it is an L2.
//!
//! Not measured: exits of VMX instructions and exits that L1 handles for its L2; the microvisor's own
//! benchmarks are for those.

use std::process::Command;

use crate::child;
use crate::cli::{BenchVmexitArgs, EngineChoice};
use crate::status::Failure;

use super::peer::MemoryFile;

/// A line of the guest: one kind of exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its name.
    pub name: String,
    /// Median of one round trip, in nanoseconds.
    pub median_ns: u64,
}

/// Reads a line of the guest: `bench NAME ROUNDS MIN MEDIAN P99 NS ns`.
pub fn parse_line(line: &str) -> Option<Line> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["bench", name, _, _, _, _, ns, "ns"] => {
            Some(Line { name: name.into(), median_ns: ns.parse().ok()? })
        }
        _ => None,
    }
}

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
    if let Some(exactly) = &args.exactly {
        words.push_str(&format!(" exactly={exactly}"));
    }
    let mut command = Command::new(child::own_program()?);
    command.args(["run", "--memory", "64M", "--debug-exit", "--vmx", "off", "--engine", engine]);
    command.arg("--kernel").arg(image.path()).args(["--append", &words]);
    let status = command.status().map_err(|e| Failure::host(format!("can't start the guest: {e}")))?;
    match status.code() {
        // isa-debug-exit with 0.
        Some(1) => Ok(()),
        _ => Err(Failure::host(format!("the guest ended with {status}; see what it printed"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_back() {
        let line = "bench cpuid               1000      14564    15118    33230    7558 ns\r";
        assert_eq!(parse_line(line), Some(Line { name: "cpuid".into(), median_ns: 7558 }));
        assert_eq!(parse_line("skip vmcall (exception 6 here)"), None);
        assert_eq!(parse_line("benchmark rounds min cycles median p99 median ns"), None);
    }
}
