//! What the threads of a run share: the machine that runs now, and the wish to end.

use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hypervisor::VmHandle;
use machine::Pc;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGSTOP, SIGTERM, SIGTSTP, SIGUSR1, SIGUSR2};
use signal_hook::flag;
use signal_hook::iterator::Signals;

use crate::interrupt;
use crate::status::{self, Failure};
use crate::terminal::{self, Escape, KEYS};

/// The machine that runs now; a reboot makes a new one.
#[derive(Clone)]
pub struct Running {
    /// Its devices.
    pub pc: Arc<Pc>,
    /// Its vCPUs.
    pub handle: VmHandle,
    /// Where statistics go as JSON.
    pub stats_json: Option<PathBuf>,
}

impl Running {
    /// Prints exit statistics.
    pub fn print_stats(&self) {
        if let Some(stats) = self.handle.stats(0) {
            eprint!("\n{stats}");
        }
    }

    /// Writes exit statistics as JSON, if that was asked for.
    pub fn write_stats(&self) {
        let Some(path) = &self.stats_json else { return };
        if let Err(e) = write_json(path, &self.handle.summary()) {
            tracing::warn!("--exit-stats-json {}: can't be written: {e}", path.display());
        }
    }
}

/// Replaces the file at once, so that nobody reads half of it.
fn write_json(path: &Path, summary: &exit_trace::Summary) -> io::Result<()> {
    let dir = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let (mut file, _guard) = interrupt::scratch_file(|| tempfile::NamedTempFile::new_in(dir))?;
    serde_json::to_writer_pretty(&mut file, summary)?;
    file.write_all(b"\n")?;
    file.as_file().set_permissions(Permissions::from_mode(0o644))?;
    file.persist(path)?;
    Ok(())
}

/// How long a vCPU may take to show its VMCSs. It leaves the guest at once, so this is for a host that is busy.
const VIEW_PATIENCE: Duration = Duration::from_secs(5);

/// A run.
#[derive(Default)]
pub struct Session {
    running: Mutex<Option<Running>>,
    /// `running` or `ending` changed.
    changed: Condvar,
    ending: Mutex<Option<u8>>,
    /// Which of SIGTSTP and SIGCONT came last.
    job_control: Arc<AtomicUsize>,
}

/// How long a signal that ends the run waits for the guest to stop.
const GRACE: Duration = Duration::from_secs(2);

/// Ends the program at once.
fn give_up(status: u8) -> ! {
    terminal::restore();
    interrupt::exit(status)
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    /// Says which machine runs now. One that is to end at once is told so.
    pub fn set_running(&self, running: Running) {
        let handle = running.handle.clone();
        *lock(&self.running) = Some(running);
        self.changed.notify_all();
        if self.ending().is_some() {
            handle.stop();
        }
    }

    /// Says that the machine stopped.
    pub fn clear_running(&self) -> Option<Running> {
        lock(&self.running).take()
    }

    /// The machine that runs now; waits for one. `None` at the end of the run.
    fn wait_running(&self) -> Option<Running> {
        let waiting = |r: &mut Option<Running>| r.is_none() && self.ending().is_none();
        let guard = self.changed.wait_while(lock(&self.running), waiting);
        guard.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The status to end with, if the user or a signal asked for the end.
    pub fn ending(&self) -> Option<u8> {
        *lock(&self.ending)
    }

    fn running(&self) -> Option<Running> {
        lock(&self.running).clone()
    }

    /// Ends the run with `status`; the first wish counts.
    pub fn end(&self, status: u8) {
        lock(&self.ending).get_or_insert(status);
        drop(lock(&self.running));
        self.changed.notify_all();
        if let Some(r) = self.running() {
            r.handle.stop();
        }
    }

    /// Gives console input to the guest, waiting while its buffer is full.
    pub fn push_input(&self, bytes: &[u8]) {
        self.push(bytes, Pc::push_input, Pc::wait_input_space);
    }

    /// Gives input of the second serial port to the guest, waiting while its buffer is full.
    pub fn push_channel(&self, bytes: &[u8]) {
        self.push(bytes, Pc::push_channel_input, Pc::wait_channel_space);
    }

    fn push(&self, mut bytes: &[u8], push: fn(&Pc, &[u8]) -> usize, wait: fn(&Pc, Duration) -> bool) {
        while !bytes.is_empty() && self.ending().is_none() {
            // Before the machine runs, and between two boots, input waits.
            let Some(r) = self.wait_running() else { return };
            let taken = push(&r.pc, bytes);
            bytes = bytes.get(taken..).unwrap_or_default();
            if !bytes.is_empty() {
                wait(&r.pc, Duration::from_millis(100));
            }
        }
    }

    /// Does what an escape key asks for.
    pub fn escape(&self, escape: Escape) {
        match escape {
            Escape::Quit => self.end(status::USER_QUIT),
            Escape::Help => eprint!("{KEYS}"),
            Escape::PowerButton => {
                if let Some(r) = self.running() {
                    r.pc.press_power_button();
                    r.handle.notify_all();
                }
            }
            Escape::Stats => self.print_stats(),
            Escape::Vmcs => self.print_vmcs(),
        }
    }

    /// Prints exit statistics of the machine that runs now.
    pub fn print_stats(&self) {
        if let Some(r) = self.running() {
            r.print_stats();
        }
    }

    /// Writes exit statistics of the machine that runs now as JSON, if that was asked for.
    fn write_stats(&self) {
        if let Some(r) = self.running() {
            r.write_stats();
        }
    }

    /// Prints VMCS01, VMCS12 and VMCS02 of the machine that runs now.
    pub fn print_vmcs(&self) {
        if let Some(r) = self.running() {
            match r.handle.vmcs_view(0, VIEW_PATIENCE) {
                Some(view) => eprint!("\n{view}"),
                None => eprintln!("\nnestvmm: the vCPU does not answer; no VMCS to show"),
            }
        }
    }

    /// Starts the thread that waits for signals.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn start_signals(self: &Arc<Self>) -> Result<(), Failure> {
        let refuse = |e: std::io::Error| Failure::host(format!("can't handle signals: {e}"));
        let list = [SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGTSTP, SIGCONT];
        for signal in [SIGTSTP, SIGCONT] {
            // First, so that it is up to date when the thread below hears of the signal.
            let number = usize::try_from(signal).unwrap_or_default();
            flag::register_usize(signal, self.job_control.clone(), number).map_err(refuse)?;
        }
        let mut signals = Signals::new(list).map_err(refuse)?;
        let session = self.clone();
        let body = move || signals.forever().for_each(|s| session.signal(s));
        std::thread::Builder::new().name("signals".into()).spawn(body).map(|_| ()).map_err(refuse)
    }

    fn signal(&self, signal: i32) {
        match signal {
            SIGUSR1 => {
                self.print_stats();
                self.write_stats();
            }
            SIGUSR2 => self.print_vmcs(),
            SIGCONT => terminal::resume(),
            SIGTSTP => self.stop_process(),
            _ if self.ending().is_some() => {
                // A second one: do not wait for the guest any longer.
                give_up(status::signalled(signal));
            }
            _ => {
                let status = status::signalled(signal);
                self.end(status);
                // The guest stops soon, unless its thread waits for somebody to read what it prints.
                let body = move || {
                    std::thread::sleep(GRACE);
                    give_up(status);
                };
                if std::thread::Builder::new().name("grace".into()).spawn(body).is_err() {
                    give_up(status);
                }
            }
        }
    }

    /// Stops the process as SIGTSTP does by default, with the terminal lent back.
    fn stop_process(&self) {
        // Of several signals that are pending, the thread hears in no particular order. What counts is
        // which came last: a SIGCONT ends a stop, also one that has not begun.
        let continued = usize::try_from(SIGCONT).unwrap_or_default();
        if self.job_control.load(Ordering::SeqCst) == continued {
            return;
        }
        terminal::restore();
        if let Err(e) = signal_hook::low_level::raise(SIGSTOP) {
            tracing::warn!("can't stop: {e}");
        }
        // Here it goes on. SIGCONT says so too, maybe later.
        terminal::resume();
    }
}
