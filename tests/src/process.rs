//! A running `nestvmm`, as `scenario-runner` drives it, for tests: what does not come is a panic at the
//! test's own line, with what the program has printed so far.

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
pub use scenario_runner::terminal::Modes;

use crate::program;

/// How `nestvmm` is started.
pub struct Launch(scenario_runner::process::Launch);

impl Launch {
    /// nestvmm with `arguments`.
    pub fn new<S: Into<String>>(arguments: impl IntoIterator<Item = S>) -> Self {
        Self(scenario_runner::process::Launch::new(program::path(), arguments))
    }

    /// One more argument.
    #[must_use]
    pub fn arg(self, argument: impl Into<String>) -> Self {
        Self(self.0.arg(argument))
    }

    /// More arguments.
    #[must_use]
    pub fn args(self, arguments: &[&str]) -> Self {
        Self(self.0.args(arguments))
    }

    /// One more argument that is a path.
    #[must_use]
    pub fn path(self, path: &Path) -> Self {
        self.arg(path.to_str().expect("test paths are UTF-8"))
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(self, name: &str, value: &str) -> Self {
        Self(self.0.env(name, value))
    }

    /// Starts it on pipes.
    pub fn start(&self) -> Process {
        Process(self.0.start().expect("nestvmm starts"))
    }

    /// Starts it on a new pseudo-terminal, on which output and errors both end up.
    pub fn start_on_terminal(&self) -> Process {
        Process(self.0.start_on_terminal().expect("nestvmm starts"))
    }

    /// Runs it to its end without input.
    #[track_caller]
    pub fn run(&self, limit: Duration) -> Finished {
        let mut process = self.start();
        process.close_input();
        process.finish(limit)
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Finished(scenario_runner::process::Finished);

impl Deref for Finished {
    type Target = scenario_runner::process::Finished;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Finished {
    /// Checks the exit status.
    #[track_caller]
    pub fn expect_status(&self, status: i32) -> &Self {
        assert_eq!(
            self.status.code(),
            Some(status),
            "{}: {}\n--- output\n{}\n--- errors\n{}",
            self.name,
            self.status,
            self.output,
            self.errors
        );
        self
    }
}

/// A running program. It is killed when dropped.
pub struct Process(scenario_runner::process::Process);

impl Deref for Process {
    type Target = scenario_runner::process::Process;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl DerefMut for Process {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl Process {
    #[track_caller]
    fn ok<T, E: std::fmt::Display>(&self, result: Result<T, E>) -> T {
        match result {
            Ok(t) => t,
            Err(e) => panic!("{}: {e}\n{}", self.name(), self.shown()),
        }
    }

    /// Writes to its standard input.
    #[track_caller]
    pub fn type_bytes(&mut self, bytes: &[u8]) {
        let result = self.0.type_bytes(bytes);
        self.ok(result);
    }

    /// Waits for `text` in the output after what was waited for before; gives what came before it.
    #[track_caller]
    pub fn expect(&mut self, text: &str, limit: Duration) -> String {
        let result = self.0.expect(text, limit);
        self.ok(result)
    }

    /// Waits until `found` finds something in the output after what was waited for before, and says
    /// how many bytes of it are done with.
    #[track_caller]
    pub fn expect_match<T>(
        &mut self,
        what: &str,
        limit: Duration,
        found: impl FnMut(&[u8]) -> Option<(T, usize)>,
    ) -> T {
        let result = self.0.expect_match(what, limit, found);
        self.ok(result)
    }

    /// Waits for `text` on standard error, after what was waited for there before.
    #[track_caller]
    pub fn expect_error(&mut self, text: &str, limit: Duration) {
        let result = self.0.expect_error(text, limit);
        self.ok(result);
    }

    /// Whether standard output holds `text` by now.
    pub fn has_printed(&self, text: &str) -> bool {
        self.output().contains(text)
    }

    /// Sends a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        self.ok(self.0.signal(signal));
    }

    /// The modes of its terminal.
    pub fn terminal_modes(&self) -> Modes {
        self.0.terminal_modes().expect("it runs on a terminal")
    }

    /// The modes that its terminal had when it was started.
    pub fn initial_modes(&self) -> &Modes {
        self.0.initial_modes().expect("it runs on a terminal")
    }

    /// Waits until the terminal has the modes `wanted`.
    #[track_caller]
    pub fn expect_modes(&self, wanted: &Modes, limit: Duration) {
        // The kernel does not tell of changed modes, so they are looked at again and again.
        let deadline = Instant::now() + limit;
        while self.terminal_modes() != *wanted {
            assert!(Instant::now() < deadline, "{}: not the modes\n{}", self.name(), self.shown());
            thread::yield_now();
        }
    }

    /// Waits until the process is stopped, as by a shell's job control.
    #[track_caller]
    pub fn expect_stopped(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.state() != Some('T') {
            assert!(Instant::now() < deadline, "{}: not stopped\n{}", self.name(), self.shown());
            thread::yield_now();
        }
    }

    /// A line of /proc/PID/status, in KiB.
    pub fn memory_kib(&self, key: &str) -> u64 {
        let path = format!("/proc/{}/status", self.id());
        let text = std::fs::read_to_string(path).expect("the process runs");
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        let number = line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse().ok());
        number.unwrap_or_else(|| panic!("no {key} in {text}"))
    }

    /// Waits for the end.
    #[track_caller]
    pub fn finish(mut self, limit: Duration) -> Finished {
        let result = self.0.finish(limit);
        Finished(self.ok(result))
    }

    /// Waits for the end, and gives the terminal's modes then.
    #[track_caller]
    pub fn finish_on_terminal(mut self, limit: Duration) -> (Finished, Modes) {
        let end = self.0.wait_end(limit);
        self.ok(end);
        let modes = self.terminal_modes();
        (self.finish(limit), modes)
    }
}
