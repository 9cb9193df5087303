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
