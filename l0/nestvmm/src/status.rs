//! Exit statuses, and errors that carry one.
//!
//! Own statuses are even: what isa-debug-exit gives, `(value << 1) | 1`, is always odd.

use std::fmt;
use std::io::Write;
use std::process::ExitCode;

/// The guest powered off.
pub const POWER_OFF: u8 = 0;
/// Bad usage; also what the command-line parser ends with.
pub const USAGE: u8 = 2;
/// An input file is missing, unreadable or not what it should be.
pub const BAD_INPUT: u8 = 4;
/// The host lacks something.
pub const HOST: u8 = 6;
/// The guest crashed.
pub const GUEST_CRASH: u8 = 8;
/// nestvmm itself failed.
pub const INTERNAL: u8 = 10;
/// The guest reset the machine and `--on-reset exit` was given.
pub const GUEST_RESET: u8 = 12;
/// A scenario failed.
pub const SCENARIO_FAILED: u8 = 14;
/// The user quit with Ctrl-A x.
pub const USER_QUIT: u8 = 130;

/// What a shell shows for a program that a signal ended.
pub fn signalled(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(INTERNAL)
}

/// Statuses as the help shows them.
pub const HELP: &str = "\
Exit status of `run`:
   0  the guest powered off
   2  bad usage
   4  an input file is missing, unreadable or not what it should be
   6  the host lacks something (memory, an engine's requirement)
   8  the guest crashed (--on-crash report)
  10  internal error
  12  the guest reset the machine (--on-reset exit)
 130  quit with Ctrl-A x; 128+N when signal N ended the run
 125  with --exec, instead of 2 to 12; otherwise --exec ends with the command's status, or
      128+N if signal N ended the command
 odd  with --debug-exit, what the guest wrote: (value << 1) | 1";

/// Statuses of `scenario run` as its help shows them.
pub const SCENARIO_HELP: &str = "\
Exit status of `scenario run`:
   0  all passed
   2  bad usage
   4  a scenario has a mistake, or a file can't be used
   6  the host lacks something
  14  a scenario failed
 128+N  when signal N ended the run";

/// A message for the user and the status to end with.
#[derive(Debug)]
pub struct Failure {
    /// The exit status.
    pub status: u8,
    /// What is wrong, and what to do.
    pub message: String,
}

impl Failure {
    /// A failure with `status`.
    pub fn new(status: u8, message: impl fmt::Display) -> Self {
        Self { status, message: message.to_string() }
    }
    /// Bad usage.
    pub fn usage(message: impl fmt::Display) -> Self {
        Self::new(USAGE, message)
    }
    /// A bad input file.
    pub fn input(message: impl fmt::Display) -> Self {
        Self::new(BAD_INPUT, message)
    }
    /// Something that the host lacks.
    pub fn host(message: impl fmt::Display) -> Self {
        Self::new(HOST, message)
    }
    /// A fault of nestvmm.
    pub fn internal(message: impl fmt::Display) -> Self {
        Self::new(INTERNAL, message)
    }

    /// Prints the message and gives the status.
    pub fn report(&self) -> ExitCode {
        // Nothing can be done when standard error is gone, as with a closed terminal.
        let _ = writeln!(std::io::stderr(), "nestvmm: {}", self.message);
        ExitCode::from(self.status)
    }
}
