//! The host's side: gives the command and its input to the guest, and what comes back to the user.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use machine::boot::{BootFile, Compression, decompress_start};

use super::protocol::{COMMAND_MAX, Decoder, FromGuest, FromHost, Message, VERSION, WINDOW};
use super::{COMMAND_LINE_WORD, MARK, NO_STATUS, Outcome};
use crate::session::Session;
use crate::status::{self, Failure};

/// How much of an initrd's start is looked at for [`MARK`].
const MARK_WITHIN: usize = 512;

/// A command that is to run in the guest, and what is known of it.
pub struct Exec {
    command: Vec<u8>,
    status_file: Option<PathBuf>,
    progress: Mutex<Progress>,
    /// `progress` changed.
    changed: Condvar,
}

#[derive(Default)]
struct Progress {
    /// The guest's side is there.
    ready: bool,
    /// Bytes of input that were sent and not yet taken.
    in_flight: usize,
    outcome: Option<Outcome>,
    /// Why there is no outcome, if that is known.
    failure: Option<String>,
}

impl Exec {
    /// A command; where to write its outcome.
    ///
    /// # Errors
    /// For a command that can't be, and a file that can't be written.
    pub fn new(command: &str, status_file: Option<PathBuf>) -> Result<Self, Failure> {
        if command.len() > COMMAND_MAX || command.contains('\0') {
            return Err(Failure::usage(format!(
                "--exec: the command must have at most {COMMAND_MAX} bytes, none of them 0"
            )));
        }
        let exec = Self {
            command: command.as_bytes().to_vec(),
            status_file,
            progress: Mutex::default(),
            changed: Condvar::new(),
        };
        exec.write_status("unknown")?;
        Ok(exec)
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_status(&self, text: &str) -> Result<(), Failure> {
        let Some(path) = &self.status_file else { return Ok(()) };
        let written = File::create(path).and_then(|mut f| writeln!(f, "{text}"));
        written
            .map_err(|e| Failure::input(format!("--exec-status {}: can't be written: {e}", path.display())))
    }

    /// Checks that the initrd's init knows what to do.
    ///
    /// # Errors
    /// When it is not one of `nestvmm image build`.
    pub fn check_initrd(initrd: Option<&BootFile>) -> Result<(), Failure> {
        let known = initrd.is_some_and(|file| {
            let start = match Compression::detect(&file.data) {
                Some(format) => decompress_start(format, &file.data, MARK_WITHIN as u64),
                None => file.data.get(..file.data.len().min(MARK_WITHIN)).unwrap_or_default().to_vec(),
            };
            start.windows(MARK.len()).any(|w| w == MARK.as_bytes())
        });
        if known {
            return Ok(());
        }
        let name =
            initrd.map_or_else(|| "there is no initrd".to_owned(), |f| format!("{} is not one", f.name));
        Err(Failure::input(format!(
            "--exec: works with an initrd that `nestvmm image build` made with nestvmm in it, and {name}"
        )))
    }

    /// The kernel command line with what `--exec` needs: the port's name, and that a kernel that
    /// panics ends instead of waiting for somebody to read the console.
    pub fn command_line(base: Option<&str>) -> String {
        let base = base.unwrap_or_default();
        let has_panic = base.split_whitespace().any(|w| w.starts_with("panic="));
        let panic = if has_panic { "" } else { " panic=-1" };
        format!("{base} {COMMAND_LINE_WORD}{panic}").trim_start().to_owned()
    }

    /// The guest's messages go here.
    pub fn port(self: &Arc<Self>, session: &Arc<Session>) -> Port {
        Port {
            exec: self.clone(),
            session: Arc::downgrade(session),
            decoder: Decoder::default(),
            garbled: false,
        }
    }

    /// Starts the thread that sends command and input. It ends with the process.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn start(self: &Arc<Self>, session: &Arc<Session>) -> Result<(), Failure> {
        let (exec, session) = (self.clone(), session.clone());
        let body = move || exec.send_input(&session);
        let thread = std::thread::Builder::new().name("exec input".into()).spawn(body);
        thread.map(drop).map_err(|e| Failure::host(format!("can't start a thread: {e}")))
    }

    fn send_input(&self, session: &Session) {
        drop(self.changed.wait_while(self.lock(), |p| !p.ready));
        session.push_channel(&FromHost::Command(self.command.clone()).encode());
        // Keys typed at a terminal are for the shell that nestvmm was started from.
        if !rustix::termios::isatty(rustix::stdio::stdin()) {
            let mut stdin = io::stdin().lock();
            let mut buffer = [0; WINDOW / 2];
            loop {
                match stdin.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(n) => self.send(session, buffer.get(..n).unwrap_or_default()),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => {
                        tracing::debug!("no more input for the command: {e}");
                        break;
                    }
                }
            }
        }
        session.push_channel(&FromHost::InputEnd.encode());
    }

    /// Sends input when there is credit for it.
    fn send(&self, session: &Session, data: &[u8]) {
        let full = |p: &mut Progress| p.in_flight + data.len() > WINDOW;
        let waited = self.changed.wait_while(self.lock(), full);
        waited.unwrap_or_else(PoisonError::into_inner).in_flight += data.len();
        session.push_channel(&FromHost::Input(data.to_vec()).encode());
    }

    /// The status to end with when the run ended with `status`; `console` is the end of what the
    /// guest printed there.
    ///
    /// # Errors
    /// [`Failure`] when the command has not ended, and neither the user nor a signal asked for the end.
    pub fn end(&self, run_status: u8, console: &str) -> Result<u8, Failure> {
        let progress = self.lock();
        if let Some(outcome) = progress.outcome {
            self.write_status(&outcome.to_string())?;
            return Ok(outcome.status());
        }
        let when = if progress.ready { "before the command ended" } else { "before it took the command" };
        let message = match (&progress.failure, run_status) {
            (Some(failure), _) => failure.clone(),
            (None, status::POWER_OFF) => format!("the guest powered off {when}"),
            (None, status::GUEST_RESET) => format!("the guest reset the machine {when}"),
            // The user or a signal asked for the end.
            (None, 128..) => return Ok(run_status),
            (None, _) => format!("the run ended {when}"),
        };
        let console = console.trim();
        let shown =
            if console.is_empty() { String::new() } else { format!("\nIts console, at last:\n{console}") };
        Err(Failure::new(NO_STATUS, format!("--exec: {message}{shown}")))
    }
}

/// The port's output: messages from the guest.
pub struct Port {
    exec: Arc<Exec>,
    session: Weak<Session>,
    decoder: Decoder,
    garbled: bool,
}

impl Port {
    fn end(&self, status: u8) {
        if let Some(session) = self.session.upgrade() {
            session.end(status);
        }
    }

    fn fail(&self, why: String) {
        self.exec.lock().failure.get_or_insert(why);
        self.end(NO_STATUS);
    }

    fn take(&mut self, message: FromGuest) {
        match message {
            FromGuest::Hello(VERSION) => {
                self.exec.lock().ready = true;
                self.exec.changed.notify_all();
            }
            FromGuest::Hello(other) => self.fail(format!(
                "the image is of another version of nestvmm (protocol {other} and not {VERSION}); build it again"
            )),
            FromGuest::Output(data) => self.print(&mut io::stdout(), &data),
            FromGuest::Errors(data) => self.print(&mut io::stderr(), &data),
            FromGuest::Credit(bytes) => {
                let mut progress = self.exec.lock();
                progress.in_flight = progress.in_flight.saturating_sub(bytes.into());
                drop(progress);
                self.exec.changed.notify_all();
            }
            FromGuest::Ended(outcome) => {
                self.exec.lock().outcome.get_or_insert(outcome);
                self.end(outcome.status());
            }
            FromGuest::Failed(why) => self.fail(why),
        }
    }

    fn print(&self, to: &mut dyn Write, data: &[u8]) {
        match to.write_all(data).and_then(|()| to.flush()) {
            // Nobody reads any more, as with `| head`: what SIGPIPE is for.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                self.end(status::signalled(signal_hook::consts::SIGPIPE))
            }
            Err(e) => tracing::debug!("output of the command dropped: {e}"),
            Ok(()) => {}
        }
    }
}

impl Write for Port {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.garbled {
            self.decoder.feed(bytes);
            loop {
                match self.decoder.next() {
                    Ok(Some(message)) => self.take(message),
                    Ok(None) => break,
                    Err(_) => {
                        self.garbled = true;
                        self.fail("something else than nestvmm wrote to the second serial port".into());
                        break;
                    }
                }
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(session: &Arc<Session>) -> (Arc<Exec>, Port) {
        let exec = Arc::new(Exec::new("true", None).unwrap());
        let port = exec.port(session);
        (exec, port)
    }

    #[test]
    fn a_foreign_port_and_a_foreign_version_end_the_run() {
        for (bytes, part) in [(b"login: ".as_slice(), "something else"), (b"h\x01\x00\x63", "version")] {
            let session = Arc::new(Session::default());
            let (exec, mut port) = port(&session);
            port.write_all(bytes).unwrap();
            // A text's second and third byte are a length.
            port.write_all(&[0; 1 << 16]).unwrap();
            assert_eq!(session.ending(), Some(NO_STATUS));
            let failure = exec.end(NO_STATUS, "").unwrap_err();
            assert_eq!(failure.status, NO_STATUS);
            assert!(failure.message.contains(part), "{}", failure.message);
        }
    }

    #[test]
    fn the_command_line_says_what_the_guest_needs() {
        assert_eq!(Exec::command_line(None), "nestvmm_channel=ttyS1 panic=-1");
        let own = "console=ttyS0 panic=0";
        assert_eq!(Exec::command_line(Some(own)), "console=ttyS0 panic=0 nestvmm_channel=ttyS1");
    }

    #[test]
    fn commands_that_can_not_be_sent() {
        assert!(Exec::new(&"x".repeat(COMMAND_MAX), None).is_ok());
        for bad in ["x".repeat(COMMAND_MAX + 1), "a\0b".into()] {
            assert_eq!(Exec::new(&bad, None).err().unwrap().status, status::USAGE);
        }
        let status = Exec::new("x", Some("/no/such/dir/f".into())).err().unwrap();
        assert!(status.message.contains("--exec-status /no/such/dir/f"), "{}", status.message);
    }
}
