//! A guest with a shell on its serial console.

use std::time::Duration;

use crate::artifacts::Kernel;
use crate::process::{Finished, Launch, Process};

/// For a boot. A second or two when the machine is not busy.
pub const BOOT: Duration = Duration::from_secs(180);
/// For a command in the shell.
pub const COMMAND: Duration = Duration::from_secs(120);

/// `nestvmm run` of `kernel`'s image with the kernel's whole log kept, and `options`.
pub fn launch(kernel: Kernel, options: &[&str]) -> Launch {
    Launch::new(["run"]).path(kernel.image()).args(options)
}

/// Messages at level "warning" or worse that are no fault, each with the reason.
const ALLOWED: [(&str, &str); 5] = [
    (
        "hrtimer: interrupt took",
        "the kernel notices that the host ran something else; it depends on the host's load",
    ),
    ("core: CPUID marked event: 'cache references' unavailable", NOT_COUNTED),
    ("core: CPUID marked event: 'cache misses' unavailable", NOT_COUNTED),
    ("core: CPUID marked event: 'branch instructions' unavailable", NOT_COUNTED),
    ("core: CPUID marked event: 'branch misses' unavailable", NOT_COUNTED),
];
const NOT_COUNTED: &str = "the kernel's way to take note of leaf 0AH: nothing counts these events";

/// What must not appear in the log at any level.
const NEVER: [&str; 13] = [
    "BUG:",
    "WARNING:",
    "Oops",
    "Call Trace",
    "Kernel panic",
    "unknown NMI",
    "Uhhuh. NMI received",
    "clocksource: Long readout",
    "as unstable",
    "TSC_DEADLINE disabled",
    "self-test failed",
    "unchecked MSR access",
    "segfault",
];

/// Checks a kernel's log, in the form `<priority>[time] text` (`dmesg -r`).
#[track_caller]
pub fn check_log(log: &str) {
    assert!(log.contains("Linux version"), "the log has its start: {log}");
    let mut bad = Vec::new();
    for line in log.lines() {
        let priority = line.strip_prefix('<').and_then(|l| l.split_once('>')).map(|(p, _)| p.parse::<u32>());
        // The low three bits are the level; 4 is "warning".
        let warns = matches!(priority, Some(Ok(p)) if p & 7 <= 4);
        let allowed = ALLOWED.iter().any(|(text, _)| line.contains(text));
        if (warns && !allowed) || NEVER.iter().any(|n| line.contains(n)) {
            bad.push(line);
        }
    }
    assert!(bad.is_empty(), "in the kernel's log:\n{}", bad.join("\n"));
}

/// What a command gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandResult {
    /// Its exit status.
    pub status: u32,
    /// What it printed, with lines ended by `\n`, without empty lines at its start.
    pub output: String,
}

/// A guest at its shell.
pub struct Guest {
    process: Process,
}

impl Guest {
    /// Starts on pipes and waits for the shell.
    #[track_caller]
    pub fn boot(launch: &Launch) -> Self {
        Self::at_shell(launch.start())
    }

    /// Starts on a pseudo-terminal and waits for the shell.
    #[track_caller]
    pub fn boot_on_terminal(launch: &Launch) -> Self {
        Self::at_shell(launch.start_on_terminal())
    }

    /// Waits for the shell of a guest that boots.
    #[track_caller]
    pub fn at_shell(mut process: Process) -> Self {
        process.expect("nestvmm: L1 ready", BOOT);
        process.expect("l1:~# ", COMMAND);
        Self { process }
    }

    /// The program that runs it.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Types a command, and gives its output and status.
    #[track_caller]
    pub fn shell(&mut self, command: &str) -> CommandResult {
        // The shell echoes what is typed, so the marks are typed in pieces.
        let line = format!("echo '<''<'; {command}; echo '<''='$?'=>'\n");
        self.process.type_bytes(line.as_bytes());
        self.process.expect("<<", COMMAND);
        let output = self.process.expect("<=", COMMAND).replace('\r', "");
        let status = self.process.expect("=>", COMMAND);
        let status = status.parse().unwrap_or_else(|_| panic!("{command}: status {status:?}"));
        CommandResult { status, output: output.trim_start_matches('\n').to_owned() }
    }

    /// Types a command that has to succeed; its output.
    #[track_caller]
    pub fn succeed(&mut self, command: &str) -> String {
        let result = self.shell(command);
        assert_eq!(result.status, 0, "{command}: {}", result.output);
        result.output
    }

    /// Types `poweroff`, and checks that the program ends with status 0.
    #[track_caller]
    pub fn power_off(mut self) -> Finished {
        self.process.type_bytes(b"poweroff\n");
        let finished = self.process.finish(COMMAND);
        finished.expect_status(0);
        finished
    }

    /// The program itself.
    pub fn into_process(self) -> Process {
        self.process
    }
}
