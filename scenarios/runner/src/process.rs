//! A running program, on pipes or on a pseudo-terminal: type, and wait for what it prints.
//!
//! Nothing here sleeps: every wait is for an event and has a time limit. A program is the leader of a
//! process group of its own, and the whole group is killed at its end.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memchr::memmem;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::terminal::{self, Modes};
use crate::transcript::{Missing, Transcript};

/// How much of a transcript a failure shows, in characters.
const SHOWN: usize = 4000;
/// For a collecting thread to read what is left in a pipe whose writers are gone.
const DRAIN: Duration = Duration::from_secs(5);

/// Why a program could not be driven.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    /// It did not start.
    #[error("{program} does not start: {source}", program = .program.display())]
    Start {
        /// Its path.
        program: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A pseudo-terminal was asked for and could not be had.
    #[error("no pseudo-terminal: {0}")]
    Terminal(io::Error),
    /// Something was expected and did not come in time.
    #[error("no {what} within {limit:?}")]
    Timeout {
        /// What was expected.
        what: String,
        /// How long was waited.
        limit: Duration,
    },
    /// Something was expected, and the output ended without it.
    #[error("no {what}: the output ended")]
    Ended {
        /// What was expected.
        what: String,
    },
    /// It takes no input.
    #[error("takes no input: {0}")]
    Input(io::Error),
    /// Its input was closed before.
    #[error("its input is closed")]
    InputClosed,
    /// Its standard error was asked for, which is not a pipe of its own.
    #[error("its standard error is its terminal")]
    NoErrors,
    /// It still runs.
    #[error("still runs after {0:?}")]
    StillRuns(Duration),
    /// The system does not tell of its end, or refuses a signal.
    #[error("its process can't be reached: {0}")]
    Process(io::Error),
}

/// How a program is started.
#[derive(Clone, Debug)]
pub struct Launch {
    program: PathBuf,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Launch {
    /// `program` with `arguments`.
    pub fn new<S: Into<String>>(program: impl Into<PathBuf>, arguments: impl IntoIterator<Item = S>) -> Self {
        Self {
            program: program.into(),
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

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).envs(self.environment.iter().map(|(k, v)| (k, v)));
        command.process_group(0);
        command
    }

    /// The command line, for messages.
    pub fn describe(&self) -> String {
        let name = self.program.file_name().map(Path::new).unwrap_or(&self.program);
        let mut text = name.display().to_string();
        for argument in &self.arguments {
            text.push(' ');
            if argument.is_empty() || argument.contains(|c: char| c.is_whitespace() || c == '"') {
                text.push_str(&format!("{argument:?}"));
            } else {
                text.push_str(argument);
            }
        }
        text
    }

    /// Starts it on pipes.
    ///
    /// # Errors
    /// When the program can't be started.
    pub fn start(&self) -> Result<Process, DriveError> {
        let mut command = self.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.spawn(&mut command)?;
        let input = child.stdin.take().map(|i| Box::new(i) as Box<dyn Write + Send>);
        let output = child.stdout.take().map(Transcript::collect);
        let errors = child.stderr.take().map(Transcript::collect);
        Process::new(child, self.describe(), input, output.unwrap_or_default(), errors, None)
    }

    /// Starts it on a new pseudo-terminal, on which output and errors both end up.
    ///
    /// # Errors
    /// When there is no terminal, or the program can't be started.
    pub fn start_on_terminal(&self) -> Result<Process, DriveError> {
        let (master, slave) = terminal::open().map_err(DriveError::Terminal)?;
        let clone = |end: &OwnedFd| end.try_clone().map_err(DriveError::Terminal);
        let initial = Modes::of(&slave).map_err(DriveError::Terminal)?;
        let source = File::from(clone(&master)?);
        let mut command = self.command();
        command.stdin(clone(&slave)?).stdout(clone(&slave)?).stderr(clone(&slave)?);
        let child = self.spawn(&mut command)?;
        let terminal = Some((slave, initial));
        let input: Box<dyn Write + Send> = Box::new(File::from(master));
        Process::new(child, self.describe(), Some(input), Transcript::collect(source), None, terminal)
    }

    fn spawn(&self, command: &mut Command) -> Result<Child, DriveError> {
        command.spawn().map_err(|source| DriveError::Start { program: self.program.clone(), source })
    }
}

/// A program that has ended.
#[derive(Clone, Debug)]
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

/// Kills a program from another thread. Does nothing once the program has been waited for.
#[derive(Clone, Debug)]
pub struct Killer(Arc<Mutex<Option<Pid>>>);

impl Killer {
    fn lock(&self) -> MutexGuard<'_, Option<Pid>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the program has not been waited for yet.
    pub fn is_armed(&self) -> bool {
        self.lock().is_some()
    }

    /// Kills the program's process group.
    pub fn kill(&self) {
        // The lock keeps the id from being given to somebody else in between.
        if let Some(group) = *self.lock() {
            // The group may have ended by itself.
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }
}

/// A running program. It and its process group are killed when dropped.
pub struct Process {
    child: Child,
    pid: Pid,
    pidfd: OwnedFd,
    killer: Killer,
    name: String,
    input: Option<Box<dyn Write + Send>>,
    output: Transcript,
    errors: Option<Transcript>,
    /// The program's end, and its modes before it started.
    terminal: Option<(OwnedFd, Modes)>,
    position: u64,
    errors_position: u64,
}

impl Process {
    fn new(
        mut child: Child,
        name: String,
        input: Option<Box<dyn Write + Send>>,
        output: Transcript,
        errors: Option<Transcript>,
        terminal: Option<(OwnedFd, Modes)>,
    ) -> Result<Self, DriveError> {
        let pid = Pid::from_child(&child);
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(e) => {
                // It would run on, unwatched.
                let _ = child.kill();
                let _ = child.wait();
                return Err(DriveError::Process(e.into()));
            }
        };
        let killer = Killer(Arc::new(Mutex::new(Some(pid))));
        Ok(Self {
            child,
            pid,
            pidfd,
            killer,
            name,
            input,
            output,
            errors,
            terminal,
            position: 0,
            errors_position: 0,
        })
    }

    /// How it was started.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Something that kills it from another thread.
    pub fn killer(&self) -> Killer {
        self.killer.clone()
    }

    /// Writes to its standard input.
    ///
    /// # Errors
    /// When it is closed, at either end.
    pub fn type_bytes(&mut self, bytes: &[u8]) -> Result<(), DriveError> {
        let input = self.input.as_mut().ok_or(DriveError::InputClosed)?;
        input.write_all(bytes).and_then(|()| input.flush()).map_err(DriveError::Input)
    }

    /// Closes its standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Waits for `text` in the output after what was waited for before; gives what came before it.
    ///
    /// # Errors
    /// When it does not come within `limit`, or the output ends.
    pub fn expect(&mut self, text: &str, limit: Duration) -> Result<String, DriveError> {
        self.expect_match(&format!("{text:?}"), limit, |bytes| {
            let at = memmem::find(bytes, text.as_bytes())?;
            let before = bytes.get(..at).unwrap_or_default();
            Some((String::from_utf8_lossy(before).into_owned(), at + text.len()))
        })
    }

    /// Waits until `found` finds something in the output after what was waited for before, and says
    /// how many bytes of it are done with. `what` names it in the error.
    ///
    /// # Errors
    /// When it does not come within `limit`, or the output ends.
    pub fn expect_match<T>(
        &mut self,
        what: &str,
        limit: Duration,
        found: impl FnMut(&[u8]) -> Option<(T, usize)>,
    ) -> Result<T, DriveError> {
        let got = self.output.wait(self.position, Instant::now() + limit, found);
        let (t, position) = got.map_err(|m| missing(m, what, limit))?;
        self.position = position;
        Ok(t)
    }

    /// Waits for `text` on standard error, after what was waited for there before.
    ///
    /// # Errors
    /// When it does not come within `limit`, or the output ends, or standard error is a terminal.
    pub fn expect_error(&mut self, text: &str, limit: Duration) -> Result<(), DriveError> {
        let errors = self.errors.as_ref().ok_or(DriveError::NoErrors)?;
        let found = |b: &[u8]| memmem::find(b, text.as_bytes()).map(|at| ((), at.saturating_add(text.len())));
        let got = errors.wait(self.errors_position, Instant::now() + limit, found);
        let ((), position) = got.map_err(|m| missing(m, &format!("{text:?} on standard error"), limit))?;
        self.errors_position = position;
        Ok(())
    }

    /// What it has printed by now.
    pub fn output(&self) -> String {
        self.output.text()
    }

    /// What it has printed on standard error by now, if that is a pipe.
    pub fn errors(&self) -> String {
        self.errors.as_ref().map(Transcript::text).unwrap_or_default()
    }

    /// Sends a signal to it, not to its group.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<(), DriveError> {
        rustix::process::pidfd_send_signal(&self.pidfd, signal).map_err(|e| DriveError::Process(e.into()))
    }

    /// The modes of its terminal; `None` on pipes.
    pub fn terminal_modes(&self) -> Option<Modes> {
        self.terminal.as_ref().and_then(|(t, _)| Modes::of(t).ok())
    }

    /// The modes that its terminal had before it was started; `None` on pipes.
    pub fn initial_modes(&self) -> Option<&Modes> {
        self.terminal.as_ref().map(|(_, m)| m)
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// When it still runs after `limit`. It goes on, and can be waited for again.
    pub fn finish(&mut self, limit: Duration) -> Result<Finished, DriveError> {
        let status = self.wait_end(limit)?;
        // With the program's ends closed, the collecting threads come to theirs.
        self.terminal = None;
        let deadline = Instant::now() + DRAIN;
        self.output.wait_end(deadline);
        if let Some(errors) = &self.errors {
            errors.wait_end(deadline);
        }
        Ok(Finished { name: self.name.clone(), status, output: self.output(), errors: self.errors() })
    }

    /// Waits for the end; the terminal is left open.
    ///
    /// # Errors
    /// When it still runs after `limit`.
    pub fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus, DriveError> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            match rustix::event::poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
                Ok(0) => return Err(DriveError::StillRuns(limit)),
                Ok(_) => return self.reap(),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(DriveError::Process(e.into())),
            }
        }
    }

    /// Collects the status of a program that ends, after what is left of its group was killed.
    fn reap(&mut self) -> Result<ExitStatus, DriveError> {
        self.killer.kill();
        // From here on the id may be somebody else's.
        *self.killer.lock() = None;
        self.child.wait().map_err(DriveError::Process)
    }

    /// The ends of the transcripts, for a failure's message.
    pub fn shown(&self) -> String {
        let mut text = tail("output", &self.output());
        if self.errors.is_some() {
            text.push_str(&tail("errors", &self.errors()));
        }
        text
    }

    /// The state that /proc shows (proc_pid_stat(5)): `T` for a stopped process. `None` at its end.
    pub fn state(&self) -> Option<char> {
        let path = format!("/proc/{}/stat", self.pid.as_raw_nonzero());
        let stat = std::fs::read_to_string(path).ok()?;
        // It comes after the name, which is in parentheses.
        stat.rsplit_once(") ").and_then(|(_, state)| state.chars().next())
    }
}

fn missing(missing: Missing, what: &str, limit: Duration) -> DriveError {
    let what = what.to_owned();
    match missing {
        Missing::Timeout => DriveError::Timeout { what, limit },
        Missing::Ended => DriveError::Ended { what },
    }
}

fn tail(name: &str, text: &str) -> String {
    let start = text.char_indices().rev().nth(SHOWN).map_or(0, |(i, _)| i);
    format!("--- {name}\n{}\n", text.get(start..).unwrap_or_default())
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended and been waited for already; then this is nothing.
        let _ = self.reap();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn sh(script: &str) -> Process {
        Launch::new("/bin/sh", ["-c", script]).start().unwrap()
    }

    #[test]
    fn types_and_expects() {
        let mut p = sh("read a; echo one $a; read b; echo two $b >&2; exit 3");
        p.type_bytes(b"x\n").unwrap();
        assert_eq!(p.expect("x", LIMIT).unwrap(), "one ");
        p.type_bytes(b"y\n").unwrap();
        p.expect_error("two y", LIMIT).unwrap();
        let finished = p.finish(LIMIT).unwrap();
        assert_eq!(finished.status.code(), Some(3));
        assert_eq!((finished.output.as_str(), finished.errors.as_str()), ("one x\n", "two y\n"));
    }

    #[test]
    fn what_does_not_come_is_named() {
        let mut p = sh("echo here; read a");
        let e = p.expect("there", Duration::from_millis(1)).unwrap_err();
        assert_eq!(e.to_string(), "no \"there\" within 1ms");
        assert!(matches!(p.finish(Duration::ZERO), Err(DriveError::StillRuns(_))));
        p.close_input();
        let e = p.expect("there", LIMIT).unwrap_err();
        assert_eq!(e.to_string(), "no \"there\": the output ended");
        assert!(matches!(p.type_bytes(b"x"), Err(DriveError::InputClosed)));
        assert!(p.shown().contains("here"));
    }

    /// Whether a process is there and is not only waited for.
    fn runs(pid: &str) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        stat.is_ok_and(|s| s.rsplit_once(") ").is_some_and(|(_, s)| !s.starts_with(['Z', 'X'])))
    }

    #[test]
    fn the_whole_group_is_killed() {
        let mut p = sh("sleep 1000 & echo $!.; wait");
        let grandchild = p.expect(".", LIMIT).unwrap();
        assert!(runs(&grandchild));
        drop(p);
        // Nobody tells of a grandchild's end, so it is looked at again and again.
        let deadline = Instant::now() + LIMIT;
        while runs(&grandchild) {
            assert!(Instant::now() < deadline, "{grandchild} still runs");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_killer_ends_a_wait() {
        let mut p = sh("read a");
        let killer = p.killer();
        let other = std::thread::spawn(move || killer.kill());
        assert!(matches!(p.expect("x", LIMIT), Err(DriveError::Ended { .. })));
        other.join().unwrap();
        assert_eq!(p.wait_end(LIMIT).unwrap().code(), None);
        p.killer().kill();
    }

    #[test]
    fn a_program_that_is_not_there() {
        let e = Launch::new("/no/such/program", ["run", "a b"]).start().map(|_| ()).unwrap_err();
        assert!(e.to_string().starts_with("/no/such/program does not start: "), "{e}");
        assert_eq!(Launch::new("/x/nestvmm", ["run", "a b"]).describe(), "nestvmm run \"a b\"");
    }

    #[test]
    fn a_terminal_shows_its_modes() {
        let launch = Launch::new("/bin/sh", ["-c", "stty -icanon; echo done; read a"]);
        let mut p = launch.start_on_terminal().unwrap();
        p.expect("done", LIMIT).unwrap();
        assert!(p.initial_modes().unwrap().is_cooked());
        assert!(!p.terminal_modes().unwrap().is_cooked());
    }
}
