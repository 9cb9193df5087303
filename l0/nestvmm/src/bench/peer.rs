//! The same kernel and initrd in nestvmm and in QEMU's TCG, driven over their consoles.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use machine::image;
use rustix::fs::MemfdFlags;
use scenario_runner::process::{Launch, Process};

use crate::child;
use crate::interrupt::Guard;
use crate::status::Failure;

/// Kernels and initrds are not larger.
const IMAGE_LIMIT: u64 = 1 << 30;
/// What `/init` prints when L1 is up.
pub const READY: &str = "nestvmm: L1 ready";
/// What the shell prints before it reads a command.
pub const PROMPT: &str = "l1:~#";
/// No guest needs longer for any step.
const STEP_LIMIT: Duration = Duration::from_secs(300);

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
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

impl MemoryFile {
    /// What is in it, from the start.
    ///
    /// # Errors
    /// [`Failure`] when the host does not open it again.
    pub fn reader(&self) -> Result<File, Failure> {
        File::open(self.path()).map_err(|e| Failure::host(format!("can't read a file in memory: {e}")))
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
    pub fn own_launch(&self) -> Result<Launch, Failure> {
        let run = ["run", "--engine", "soft", "--exit-stats", "--memory", "1G"];
        Ok(self.with_files(Launch::new(child::own_program()?, run), "--"))
    }

    /// QEMU's TCG with it: one CPU of all features that TCG has, SVM among them.
    pub fn qemu_launch(&self, qemu: &Path) -> Launch {
        let machine = ["-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "1G"];
        let console = ["-nographic", "-nodefaults", "-no-reboot", "-serial", "stdio"];
        self.with_files(Launch::new(qemu, machine).args(&console), "-")
    }

    /// Kernel, initrd and command line as options, which start with `dash`.
    fn with_files(&self, launch: Launch, dash: &str) -> Launch {
        let option = |name: &str| format!("{dash}{name}");
        launch
            .arg(option("kernel"))
            .arg(self.kernel.path())
            .arg(option("initrd"))
            .arg(self.initrd.path())
            .arg(option("append"))
            .arg("console=ttyS0 quiet")
    }
}

/// A guest on pipes; killed when dropped, and when a signal ends this program.
pub struct Guest {
    process: Process,
    start: Instant,
    _guard: Guard,
}

impl Guest {
    /// Starts `launch`.
    ///
    /// # Errors
    /// [`Failure`] when it can't be started.
    pub fn spawn(launch: &Launch) -> Result<Self, Failure> {
        let start = Instant::now();
        let (process, guard) = child::start(launch)?;
        Ok(Self { process, start, _guard: guard })
    }

    /// Waits until `text` is printed, after what earlier waits found; what came before it, and the time since the
    /// start.
    ///
    /// # Errors
    /// [`Failure`] with the last output when it does not come.
    pub fn wait_for(&mut self, text: &str) -> Result<(String, Duration), Failure> {
        match self.process.expect(text, STEP_LIMIT) {
            Ok(before) => Ok((before, self.start.elapsed())),
            Err(e) => Err(Failure::host(format!("{e}\n{}", self.process.shown()))),
        }
    }

    /// Types a line.
    ///
    /// # Errors
    /// [`Failure`] when the guest's input is closed.
    pub fn type_line(&mut self, line: &str) -> Result<(), Failure> {
        self.process.type_bytes(format!("{line}\n").as_bytes()).map_err(Failure::host)
    }

    /// Powers off; what the program wrote to standard error.
    ///
    /// # Errors
    /// [`Failure`] when it does not end.
    pub fn power_off(mut self) -> Result<String, Failure> {
        self.type_line("poweroff -f")?;
        self.process.finish(STEP_LIMIT).map(|f| f.errors).map_err(Failure::host)
    }
}
