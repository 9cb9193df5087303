//! `--trace-exits`: the file, and the thread that keeps it up to date.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hypervisor::VmHandle;

use crate::status::Failure;

/// How old a record may get before it is in the file.
const FLUSH: Duration = Duration::from_millis(200);

/// A trace that is being written.
pub struct TraceFile {
    path: PathBuf,
    handle: VmHandle,
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl TraceFile {
    /// Makes the file anew, and has the exits of vCPU 0 go there.
    ///
    /// # Errors
    /// When the file can't be written or the host refuses a thread.
    pub fn start(path: &Path, size: u64, handle: &VmHandle, tsc_hz: u64) -> Result<Self, Failure> {
        let refuse = |e| Failure::input(format!("--trace-exits {}: can't be written: {e}", path.display()));
        let file = File::create(path).map_err(refuse)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let start = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let writers = exit_trace::start(file, size, 1, tsc_hz, start).map_err(refuse)?;
        for (cpu, writer) in writers.into_iter().enumerate() {
            handle.set_trace(cpu, writer);
        }
        let (stop, stopped) = mpsc::channel::<()>();
        let flushed = handle.clone();
        let body = move || {
            while stopped.recv_timeout(FLUSH) == Err(RecvTimeoutError::Timeout) {
                if flushed.flush_traces().is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("trace".into()).spawn(body);
        let thread = thread.map_err(|e| Failure::host(format!("can't start the trace's thread: {e}")))?;
        Ok(Self { path: path.to_owned(), handle: handle.clone(), stop, thread })
    }

    /// Writes the rest. Says so if the file does not have everything.
    pub fn finish(self) {
        drop(self.stop);
        let _ = self.thread.join();
        if let Err(e) = self.handle.flush_traces() {
            tracing::warn!("--trace-exits {}: the trace ends early: {e}", self.path.display());
        }
    }
}
