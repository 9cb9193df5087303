//! The same kernel and initrd in nestvmm and in QEMU's TCG, driven over their consoles.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use machine::image;
use rustix::fs::MemfdFlags;

use crate::status::Failure;

/// Kernels and initrds are not larger.
const IMAGE_LIMIT: u64 = 1 << 30;
/// What `/init` prints when L1 is up.
pub const READY: &str = "nestvmm: L1 ready";
/// What the shell prints before it reads a command.
pub const PROMPT: &str = "l1:~#";
/// No guest needs longer for any step.
const STEP_LIMIT: Duration = Duration::from_secs(300);
/// Console output that is kept to be looked at; more is a guest that went wild.
const SEEN_LIMIT: usize = 4 << 20;

/// A file that only this program's memory holds, so that nothing is left behind however it ends.
pub struct MemoryFile(File);

impl MemoryFile {
    /// A file named `name` with `bytes` in it.
    ///
    /// # Errors
    /// [`Failure`] when the host has no memory for it.
    pub fn new(name: &str, bytes: &[u8]) -> Result<Self, Failure> {
        let failed = |e: std::io::Error| Failure::host(format!("can't make a file in memory: {e}"));
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        let mut file = File::from(fd);
        file.write_all(bytes).map_err(failed)?;
        Ok(Self(file))
    }

    /// A path for programs that this one starts.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }
}

/// Kernel and initrd of an image, as files that both programs take.
pub struct Payload {
    kernel: MemoryFile,
    initrd: MemoryFile,
}

impl Payload {
    /// Those of the image at `path`.
    ///
    /// # Errors
    /// [`Failure`] when it is no image or has no initrd.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let source = image::open(path, None, IMAGE_LIMIT).map_err(Failure::input)?;
        let Some(initrd) = source.initrd else {
            return Err(Failure::input(format!(
                "{} has no initrd; give an image that `nestvmm image build` made",
                path.display()
            )));
        };
        Ok(Self {
            kernel: MemoryFile::new("kernel", &source.kernel.data)?,
            initrd: MemoryFile::new("initrd", &initrd.data)?,
        })
    }

    /// `nestvmm run` of it in the software engine.
    ///
    /// # Errors
    /// [`Failure`] when this program can't find itself.
    pub fn own_command(&self) -> Result<Command, Failure> {
        let mut c = own_program()?;
        c.args(["run", "--engine", "soft", "--exit-stats", "--memory", "1G"]);
        c.args(["--append", "console=ttyS0 quiet"]);
        c.arg("--kernel").arg(self.kernel.path()).arg("--initrd").arg(self.initrd.path());
        Ok(c)
    }

    /// QEMU's TCG with it: one CPU of all features that TCG has, SVM among them.
    pub fn qemu_command(&self, qemu: &Path) -> Command {
        let mut c = Command::new(qemu);
        c.args(["-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "1G"]);
        c.args(["-nographic", "-nodefaults", "-no-reboot", "-serial", "stdio"]);
        c.args(["-append", "console=ttyS0 quiet"]);
        c.arg("-kernel").arg(self.kernel.path()).arg("-initrd").arg(self.initrd.path());
        c
    }
}

/// This program, to be started again.
///
/// # Errors
/// [`Failure`] when the host does not tell where it is.
pub fn own_program() -> Result<Command, Failure> {
    std::env::current_exe()
        .map(Command::new)
        .map_err(|e| Failure::host(format!("can't find this program: {e}")))
}

/// A guest on pipes; killed when dropped.
pub struct Guest {
    child: Child,
    start: Instant,
    pieces: Receiver<Vec<u8>>,
    seen: String,
    looked_at: usize,
}

/// Hands on what the guest prints, by pieces and not by lines: a prompt has no end of line.
fn forward(mut out: ChildStdout, to: &SyncSender<Vec<u8>>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(n @ 1..) = out.read(&mut buffer) {
        if to.send(buffer[..n].to_vec()).is_err() {
            return;
        }
    }
}

impl Guest {
    /// Starts `command`.
    ///
    /// # Errors
    /// [`Failure`] when it can't be started.
    pub fn spawn(mut command: Command) -> Result<Self, Failure> {
        let program = command.get_program().to_owned();
        let start = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| Failure::host(format!("can't start {}: {e}", program.display())))?;
        let (sender, pieces) = sync_channel(16);
        if let Some(out) = child.stdout.take() {
            std::thread::spawn(move || forward(out, &sender));
        }
        Ok(Self { child, start, pieces, seen: String::new(), looked_at: 0 })
    }

    /// Waits until `text` is printed, after what earlier waits found; the time since the start.
    ///
    /// # Errors
    /// [`Failure`] with the last output when it does not come.
    pub fn wait_for(&mut self, text: &str) -> Result<Duration, Failure> {
        let deadline = Instant::now() + STEP_LIMIT;
        self.seen.drain(..self.looked_at);
        self.looked_at = 0;
        loop {
            if let Some(at) = self.seen.find(text) {
                self.looked_at = at + text.len();
                return Ok(self.start.elapsed());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.pieces.recv_timeout(left) {
                Ok(piece) if self.seen.len() < SEEN_LIMIT => {
                    self.seen.push_str(&String::from_utf8_lossy(&piece));
                }
                _ => return Err(self.silence(text)),
            }
        }
    }

    fn silence(&self, text: &str) -> Failure {
        let mut from = self.seen.len().saturating_sub(400);
        while !self.seen.is_char_boundary(from) {
            from += 1;
        }
        let tail = &self.seen[from..];
        Failure::host(format!("the guest never printed {text:?}; its last output: {tail:?}"))
    }

    /// What was printed between the last two texts waited for, the second included.
    pub fn text(&self) -> &str {
        self.seen.get(..self.looked_at).unwrap_or_default()
    }

    /// Types a line.
    ///
    /// # Errors
    /// [`Failure`] when the guest's input is closed.
    pub fn type_line(&mut self, line: &str) -> Result<(), Failure> {
        let Some(stdin) = self.child.stdin.as_mut() else {
            return Err(Failure::host("the guest has no input"));
        };
        writeln!(stdin, "{line}").map_err(|e| Failure::host(format!("can't type to the guest: {e}")))
    }

    /// Powers off; what the program wrote to standard error.
    ///
    /// # Errors
    /// [`Failure`] when the guest's input is closed.
    pub fn power_off(mut self) -> Result<String, Failure> {
        self.type_line("poweroff -f")?;
        let mut report = String::new();
        if let Some(mut err) = self.child.stderr.take() {
            // Ends when the program does.
            let _ = err.read_to_string(&mut report);
        }
        let _ = self.child.wait();
        Ok(report)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
