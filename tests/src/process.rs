//! A running `nestvmm`, on pipes or on a pseudo-terminal: type, and wait for what it prints.
//!
//! Nothing here sleeps: every wait is for an event and has a time limit.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use rustix::pty::OpenptFlags;
use rustix::termios::Termios;

use crate::program;

/// How much of a transcript a failure shows.
const SHOWN: usize = 4000;

/// Output that a thread collects while others wait for something in it.
#[derive(Clone, Default)]
struct Transcript(Arc<(Mutex<Collected>, Condvar)>);

#[derive(Default)]
struct Collected {
    bytes: Vec<u8>,
    ended: bool,
}

impl Transcript {
    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a thread that collects what `source` gives until its end.
    fn collect(source: impl Read + Send + 'static) -> Self {
        let transcript = Self::default();
        let ours = transcript.clone();
        thread::spawn(move || {
            let mut source = source;
            let mut buf = [0; 4096];
            loop {
                // A terminal whose other end is closed gives an error at its end.
                let n = source.read(&mut buf).unwrap_or(0);
                let mut collected = ours.lock();
                collected.bytes.extend_from_slice(buf.get(..n).unwrap_or_default());
                collected.ended = n == 0;
                ours.0.1.notify_all();
                if n == 0 {
                    return;
                }
            }
        });
        transcript
    }

    /// Waits until `found` finds something in what came after byte `from`, or the output ends, or
    /// `deadline` is there.
    fn wait<T>(&self, from: usize, deadline: Instant, found: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
        let mut collected = self.lock();
        loop {
            if let Some(t) = collected.bytes.get(from..).and_then(&found) {
                return Some(t);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if collected.ended || left.is_zero() {
                return None;
            }
            collected = self.0.1.wait_timeout(collected, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

/// How a program is started.
pub struct Launch {
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Launch {
    /// nestvmm with `arguments`.
    pub fn new<S: Into<String>>(arguments: impl IntoIterator<Item = S>) -> Self {
        Self {
            program: program::path().to_owned(),
            arguments: arguments.into_iter().map(Into::into).collect(),
            environment: Vec::new(),
        }
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args(mut self, arguments: &[&str]) -> Self {
        self.arguments.extend(arguments.iter().map(|a| (*a).to_owned()));
        self
    }

    /// One more argument that is a path.
    #[must_use]
    pub fn path(self, path: &Path) -> Self {
        self.arg(path.to_str().expect("test paths are UTF-8"))
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).envs(self.environment.iter().map(|(k, v)| (k, v)));
        command
    }

    fn describe(&self) -> String {
        format!("nestvmm {}", self.arguments.join(" "))
    }

    /// Starts it on pipes.
    pub fn start(&self) -> Process {
        let mut command = self.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("nestvmm starts");
        let output = Transcript::collect(child.stdout.take().expect("a pipe was asked for"));
        let errors = Transcript::collect(child.stderr.take().expect("a pipe was asked for"));
        let stdin = child.stdin.take().expect("a pipe was asked for");
        Process {
            child,
            name: self.describe(),
            input: Some(Box::new(stdin)),
            output,
            errors: Some(errors),
            terminal: None,
            initial_modes: None,
            position: 0,
        }
    }

    /// Starts it on a new pseudo-terminal, on which output and errors both end up.
    pub fn start_on_terminal(&self) -> Process {
        let (master, slave) = open_terminal();
        let initial_modes = Modes::of(&rustix::termios::tcgetattr(&slave).expect("it is a terminal"));
        let mut command = self.command();
        let clone = || slave.try_clone().expect("file descriptors are left");
        command.stdin(clone()).stdout(clone()).stderr(clone());
        let child = command.spawn().expect("nestvmm starts");
        let output = Transcript::collect(File::from(master.try_clone().expect("file descriptors are left")));
        Process {
            child,
            name: self.describe(),
            input: Some(Box::new(File::from(master))),
            output,
            errors: None,
            terminal: Some(slave),
            initial_modes: Some(initial_modes),
            position: 0,
        }
    }

    /// Runs it to its end without input.
    pub fn run(&self, limit: Duration) -> Finished {
        let mut process = self.start();
        process.close_input();
        process.finish(limit)
    }
}

/// A pseudo-terminal: the tester's end and the program's.
fn open_terminal() -> (OwnedFd, OwnedFd) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags).expect("the host has pseudo-terminals");
    rustix::pty::grantpt(&master).expect("the terminal is ours");
    rustix::pty::unlockpt(&master).expect("the terminal is ours");
    let name = rustix::pty::ptsname(&master, Vec::new()).expect("the terminal has a name");
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
    let slave = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).expect("the terminal opens");
    (master, slave)
}

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    /// How it was started.
    pub name: String,
    /// What it ended with.
    pub status: ExitStatus,
    /// What it wrote to standard output, or to the terminal.
    pub output: String,
    /// What it wrote to standard error, if that was a pipe.
    pub errors: String,
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
pub struct Process {
    child: Child,
    name: String,
    input: Option<Box<dyn Write + Send>>,
    output: Transcript,
    errors: Option<Transcript>,
    terminal: Option<OwnedFd>,
    initial_modes: Option<Modes>,
    position: usize,
}

impl Process {
    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its standard input.
    #[track_caller]
    pub fn type_bytes(&mut self, bytes: &[u8]) {
        let input = self.input.as_mut().expect("the input is still open");
        if let Err(e) = input.write_all(bytes).and_then(|()| input.flush()) {
            panic!("{}: takes no input: {e}\n{}", self.name, self.shown());
        }
    }

    /// Closes its standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Waits for `text` in the output after what was waited for before; gives what came before it.
    #[track_caller]
    pub fn expect(&mut self, text: &str, limit: Duration) -> String {
        self.expect_match(&format!("{text:?}"), limit, |bytes| {
            let at = find(bytes, text.as_bytes())?;
            let before = bytes.get(..at).unwrap_or_default();
            Some((String::from_utf8_lossy(before).into_owned(), at + text.len()))
        })
    }

    /// Waits until `found` finds something in the output after what was waited for before, and says
    /// how many bytes of it are done with.
    #[track_caller]
    pub fn expect_match<T>(
        &mut self,
        what: &str,
        limit: Duration,
        found: impl Fn(&[u8]) -> Option<(T, usize)>,
    ) -> T {
        match self.output.wait(self.position, Instant::now() + limit, found) {
            Some((t, used)) => {
                self.position += used;
                t
            }
            None => panic!("{}: no {what} in {limit:?}\n{}", self.name, self.shown()),
        }
    }

    /// Waits for `text` on standard error.
    #[track_caller]
    pub fn expect_error(&mut self, text: &str, limit: Duration) {
        let errors = self.errors.as_ref().expect("standard error is a pipe");
        let found = errors.wait(0, Instant::now() + limit, |b| find(b, text.as_bytes()));
        assert!(found.is_some(), "{}: no {text:?} in {limit:?}\n{}", self.name, self.shown());
    }

    /// Whether standard output holds `text` by now.
    pub fn has_printed(&self, text: &str) -> bool {
        find(&self.output.lock().bytes, text.as_bytes()).is_some()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        let pid = pid.expect("a process id is positive");
        rustix::process::kill_process(pid, signal).expect("the process is ours");
    }

    /// The modes of its terminal.
    pub fn terminal_modes(&self) -> Modes {
        let terminal = self.terminal.as_ref().expect("it runs on a terminal");
        Modes::of(&rustix::termios::tcgetattr(terminal).expect("the terminal is open"))
    }

    /// The modes that its terminal had when it was started.
    pub fn initial_modes(&self) -> &Modes {
        self.initial_modes.as_ref().expect("it runs on a terminal")
    }

    /// Waits until the terminal has the modes `wanted`.
    #[track_caller]
    pub fn expect_modes(&self, wanted: &Modes, limit: Duration) {
        // The kernel does not tell of changed modes, so they are looked at again and again.
        let deadline = Instant::now() + limit;
        while self.terminal_modes() != *wanted {
            assert!(Instant::now() < deadline, "{}: not the modes\n{}", self.name, self.shown());
            thread::yield_now();
        }
    }

    /// Waits until the process is stopped, as by a shell's job control.
    #[track_caller]
    pub fn expect_stopped(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap_or_default();
            // The state comes after the name, which is in parentheses (proc_pid_stat(5)).
            if stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('T')) {
                return;
            }
            assert!(Instant::now() < deadline, "{}: not stopped: {stat}\n{}", self.name, self.shown());
            thread::yield_now();
        }
    }

    /// A line of /proc/PID/status, in KiB.
    pub fn memory_kib(&self, key: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let text = std::fs::read_to_string(path).expect("the process runs");
        let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        let number = line.and_then(|l| l.split_whitespace().next()).and_then(|n| n.parse().ok());
        number.unwrap_or_else(|| panic!("no {key} in {text}"))
    }

    /// Waits for the end.
    #[track_caller]
    pub fn finish(mut self, limit: Duration) -> Finished {
        let status = match self.wait_end(limit) {
            Some(status) => status,
            None => panic!("{}: still runs after {limit:?}\n{}", self.name, self.shown()),
        };
        // With the program's ends closed, the collecting threads come to theirs.
        self.terminal = None;
        let deadline = Instant::now() + Duration::from_secs(5);
        for transcript in [Some(&self.output), self.errors.as_ref()].into_iter().flatten() {
            transcript.wait(0, deadline, |_| None::<()>);
        }
        Finished {
            name: self.name.clone(),
            status,
            output: self.output.text(),
            errors: self.errors.as_ref().map(Transcript::text).unwrap_or_default(),
        }
    }

    /// Waits for the end, and gives the terminal's modes then.
    #[track_caller]
    pub fn finish_on_terminal(mut self, limit: Duration) -> (Finished, Modes) {
        let end = self.wait_end(limit);
        assert!(end.is_some(), "{}: still runs after {limit:?}\n{}", self.name, self.shown());
        let modes = self.terminal_modes();
        (self.finish(limit), modes)
    }

    fn wait_end(&mut self, limit: Duration) -> Option<ExitStatus> {
        if let Some(status) = self.child.try_wait().expect("the child is ours") {
            return Some(status);
        }
        let pid = rustix::process::Pid::from_child(&self.child);
        let flags = rustix::process::PidfdFlags::empty();
        let pidfd = rustix::process::pidfd_open(pid, flags).expect("Linux has had pidfds since 5.3");
        let mut fds = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec::try_from(limit).ok();
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(1) => Some(self.child.wait().expect("the child is ours")),
            _ => None,
        }
    }

    /// The ends of the transcripts, for a failure's message.
    fn shown(&self) -> String {
        let mut text = tail("output", &self.output.text());
        if let Some(errors) = &self.errors {
            text.push_str(&tail("errors", &errors.text()));
        }
        text
    }
}

fn tail(name: &str, text: &str) -> String {
    let start = text.char_indices().rev().nth(SHOWN).map_or(0, |(i, _)| i);
    format!("--- {name}\n{}\n", text.get(start..).unwrap_or_default())
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The modes of a terminal, in a form that can be compared and shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Modes {
    input: u32,
    output: u32,
    control: u32,
    local: u32,
    special: String,
}

impl Modes {
    fn of(t: &Termios) -> Self {
        Self {
            input: t.input_modes.bits(),
            output: t.output_modes.bits(),
            control: t.control_modes.bits(),
            local: t.local_modes.bits(),
            special: format!("{:?}", t.special_codes),
        }
    }

    /// Whether typed characters are shown and lines can be edited: a terminal as a shell leaves it.
    pub fn is_cooked(&self) -> bool {
        use rustix::termios::LocalModes;
        let cooked = LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG;
        LocalModes::from_bits_retain(self.local).contains(cooked)
    }
}
