//! The guest's side: runs the command that comes over a serial port and sends back what it prints and
//! how it ends.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::Outcome;
use super::protocol::{CHUNK, Decoder, FromGuest, FromHost, Message, VERSION};
use crate::status::Failure;

/// Serves one command over the terminal `port`.
///
/// # Errors
/// [`Failure`] when the port can't be used. What goes wrong with the command goes over the port.
pub fn serve(port: &Path) -> Result<(), Failure> {
    let wrap = |e: io::Error| Failure::host(format!("{}: {e}", port.display()));
    let file = OpenOptions::new().read(true).write(true).open(port).map_err(wrap)?;
    pass_bytes_unchanged(&file).map_err(wrap)?;
    let channel = Channel(Arc::new(Mutex::new(file.try_clone().map_err(wrap)?)));
    channel.send(&FromGuest::Hello(VERSION)).map_err(wrap)?;
    let mut input = Input { file, decoder: Decoder::default() };
    let command = loop {
        match input.next().map_err(wrap)? {
            FromHost::Command(command) => break command,
            FromHost::Input(_) | FromHost::InputEnd => {}
        }
    };
    let end = match run(command, &channel, input) {
        Ok(outcome) => FromGuest::Ended(outcome),
        Err(e) => FromGuest::Failed(format!("the command can't be run in the guest: {e}")),
    };
    channel.send(&end).map_err(wrap)
}

/// Terminals change and interpret bytes unless they are told not to.
fn pass_bytes_unchanged(port: &File) -> io::Result<()> {
    let mut modes = tcgetattr(port)?;
    modes.make_raw();
    Ok(tcsetattr(port, OptionalActions::Now, &modes)?)
}

/// Where messages to the host go.
#[derive(Clone)]
struct Channel(Arc<Mutex<File>>);

impl Channel {
    fn send(&self, message: &FromGuest) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(&message.encode())
    }
}

/// Where messages from the host come from.
struct Input {
    file: File,
    decoder: Decoder,
}

impl Input {
    fn next(&mut self) -> io::Result<FromHost> {
        loop {
            let garbled = |_| io::Error::other("the host's side speaks another protocol");
            if let Some(message) = self.decoder.next().map_err(garbled)? {
                return Ok(message);
            }
            let mut buffer = [0; CHUNK];
            match self.file.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.decoder.feed(buffer.get(..n).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

fn run(command: Vec<u8>, channel: &Channel, input: Input) -> io::Result<Outcome> {
    let mut child = Command::new("/bin/sh")
        .arg("-c")
        .arg(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(command))
        .env_remove("nestvmm_channel")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(stdin) = child.stdin.take() {
        let channel = channel.clone();
        // It ends with the program.
        std::thread::Builder::new().name("input".into()).spawn(move || feed(input, stdin, &channel))?;
    }
    let mut outputs = Vec::new();
    if let Some(pipe) = child.stdout.take() {
        outputs.push(Pipe::new(pipe.into(), FromGuest::Output)?);
    }
    if let Some(pipe) = child.stderr.take() {
        outputs.push(Pipe::new(pipe.into(), FromGuest::Errors)?);
    }
    let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    forward(&mut outputs, &pidfd, channel)?;
    Ok(outcome(child.wait()?))
}

fn outcome(status: ExitStatus) -> Outcome {
    match (status.code(), status.signal()) {
        (Some(code), _) => Outcome::Exited(code as u8),
        (None, signal) => Outcome::Signal(signal.unwrap_or_default() as u8),
    }
}

/// Gives the command its input. One that does not read it gets no more, but does not hold anything up.
fn feed(mut input: Input, stdin: ChildStdin, channel: &Channel) {
    let mut stdin = Some(stdin);
    while let Ok(message) = input.next() {
        match message {
            FromHost::Input(data) => {
                if stdin.as_mut().is_some_and(|s| s.write_all(&data).is_err()) {
                    stdin = None;
                }
                if channel.send(&FromGuest::Credit(data.len() as u16)).is_err() {
                    return;
                }
            }
            FromHost::InputEnd => stdin = None,
            FromHost::Command(_) => return,
        }
    }
}

/// One of the command's outputs.
struct Pipe {
    file: File,
    message: fn(Vec<u8>) -> FromGuest,
    open: bool,
}

impl Pipe {
    fn new(fd: OwnedFd, message: fn(Vec<u8>) -> FromGuest) -> io::Result<Self> {
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self { file: fd.into(), message, open: true })
    }

    /// Forwards what is there; whether there was something.
    fn forward(&mut self, channel: &Channel) -> io::Result<bool> {
        let mut buffer = [0; CHUNK];
        match self.file.read(&mut buffer) {
            Ok(0) => {
                self.open = false;
                Ok(false)
            }
            Ok(n) => {
                channel.send(&(self.message)(buffer.get(..n).unwrap_or_default().to_vec()))?;
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(e) => Err(e),
        }
    }
}

/// Forwards outputs until the command ends. What it left in the background may keep the pipes open
/// and is not waited for, but all that was written before the end is forwarded.
fn forward(outputs: &mut [Pipe], pidfd: &OwnedFd, channel: &Channel) -> io::Result<()> {
    loop {
        let mut fds = vec![PollFd::new(pidfd, PollFlags::IN)];
        fds.extend(
            outputs
                .iter()
                .filter(|o| o.open)
                .map(|o| PollFd::from_borrowed_fd(o.file.as_fd(), PollFlags::IN)),
        );
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let ended = fds.first().is_some_and(|f| !f.revents().is_empty());
        drop(fds);
        for output in outputs.iter_mut().filter(|o| o.open) {
            while output.forward(channel)? && ended {}
        }
        if ended {
            return Ok(());
        }
    }
}
