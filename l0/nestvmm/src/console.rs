//! Where the guest's serial console goes and where its input comes from.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::cli::ConsoleTarget;
use crate::interrupt;
use crate::session::Session;
use crate::status::Failure;
use crate::terminal::{EscapeParser, Key};

/// Console output that outlives a reboot. It never fails: a guest does not stop because nobody
/// listens.
#[derive(Clone)]
pub struct Output(Arc<Mutex<Sink>>);

enum Sink {
    Stdout,
    File(File),
    Socket(Option<UnixStream>),
    /// The last [`KEPT`] bytes, for a message.
    Kept(VecDeque<u8>),
    None,
}

/// How much of the console's end is kept.
const KEPT: usize = 8192;

impl Output {
    fn new(sink: Sink) -> Self {
        Self(Arc::new(Mutex::new(sink)))
    }
    /// What the guest printed last, if that is kept.
    pub fn kept(&self) -> String {
        match &*self.lock() {
            Sink::Kept(bytes) => {
                let bytes: Vec<u8> = bytes.iter().copied().filter(|b| *b != b'\r').collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
            _ => String::new(),
        }
    }
    fn lock(&self) -> std::sync::MutexGuard<'_, Sink> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Output {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let result = match &mut *self.lock() {
            Sink::Stdout => {
                let mut out = io::stdout().lock();
                out.write_all(buf).and_then(|()| out.flush())
            }
            Sink::File(f) => f.write_all(buf),
            Sink::Socket(Some(s)) => s.write_all(buf),
            Sink::Kept(kept) => {
                kept.extend(buf);
                kept.drain(..kept.len().saturating_sub(KEPT));
                Ok(())
            }
            Sink::Socket(None) | Sink::None => Ok(()),
        };
        if let Err(e) = result {
            tracing::debug!("console output dropped: {e}");
        }
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket's file, removed when the run ends in whatever way.
struct SocketFile {
    path: PathBuf,
    _guard: interrupt::Guard,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // It may be gone already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The console of a run.
pub struct Console {
    /// For the serial port.
    pub output: Output,
    listener: Option<UnixListener>,
    reads_stdin: bool,
    _socket_file: Option<SocketFile>,
}

impl Console {
    /// Opens what `target` names.
    ///
    /// # Errors
    /// A message that names the file.
    pub fn open(target: &ConsoleTarget) -> Result<Self, Failure> {
        let plain = |sink, reads_stdin| Self {
            output: Output::new(sink),
            listener: None,
            reads_stdin,
            _socket_file: None,
        };
        Ok(match target {
            ConsoleTarget::Stdio => plain(Sink::Stdout, true),
            ConsoleTarget::None => plain(Sink::None, false),
            ConsoleTarget::Kept => plain(Sink::Kept(VecDeque::new()), false),
            ConsoleTarget::File(path) => {
                let file = File::create(path).map_err(|e| {
                    Failure::input(format!("--console file:{}: can't be written: {e}", path.display()))
                })?;
                plain(Sink::File(file), false)
            }
            ConsoleTarget::Unix(path) => {
                let remove = |_: &UnixListener| -> interrupt::Undo {
                    let path = path.clone();
                    Box::new(move || drop(std::fs::remove_file(path)))
                };
                let (listener, guard) = interrupt::guarded(|| listen(path), remove)?;
                Self {
                    output: Output::new(Sink::Socket(None)),
                    listener: Some(listener),
                    reads_stdin: false,
                    _socket_file: Some(SocketFile { path: path.clone(), _guard: guard }),
                }
            }
        })
    }

    /// Starts the threads that read input. They end with the process.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn start_input(&mut self, session: &Arc<Session>) -> Result<(), Failure> {
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .spawn(body)
                .map(|_| ())
                .map_err(|e| Failure::host(format!("can't start the {name} thread: {e}")))
        };
        if self.reads_stdin {
            let session = session.clone();
            spawn("stdin", Box::new(move || read_stdin(&session)))?;
        }
        if let Some(listener) = self.listener.take() {
            let (session, output) = (session.clone(), self.output.clone());
            spawn("console socket", Box::new(move || serve(&listener, &session, &output)))?;
        }
        Ok(())
    }
}

fn listen(path: &Path) -> Result<UnixListener, Failure> {
    UnixListener::bind(path).map_err(|e| {
        let hint =
            if e.kind() == io::ErrorKind::AddrInUse { "; remove it or choose another path" } else { "" };
        Failure::input(format!("--console unix:{}: can't listen there: {e}{hint}", path.display()))
    })
}

fn read_stdin(session: &Session) {
    let mut escapes = EscapeParser::default();
    // A pipe's bytes are all for the guest.
    let terminal = rustix::termios::isatty(rustix::stdio::stdin());
    let mut buf = [0; 256];
    let mut stdin = io::stdin().lock();
    loop {
        let n = match stdin.read(&mut buf) {
            Ok(0) => return,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                tracing::debug!("no more console input: {e}");
                return;
            }
        };
        let mut input = Vec::with_capacity(n);
        for byte in buf.iter().take(n) {
            match if terminal { escapes.feed(*byte) } else { Key::Guest(*byte) } {
                Key::Guest(b) => input.push(b),
                Key::Escape(e) => session.escape(e),
                Key::Nothing => {}
            }
        }
        session.push_input(&input);
    }
}

/// One client at a time; output is dropped while there is none.
fn serve(listener: &UnixListener, session: &Session, output: &Output) {
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        *output.lock() = Sink::Socket(stream.try_clone().ok());
        let mut buf = [0; 256];
        while let Ok(n) = stream.read(&mut buf) {
            if n == 0 {
                break;
            }
            session.push_input(buf.get(..n).unwrap_or_default());
        }
        *output.lock() = Sink::Socket(None);
    }
}
