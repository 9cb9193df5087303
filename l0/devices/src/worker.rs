//! Threads on which devices do what may take long: the guest's vCPUs only ring a bell.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::device::lock;

#[derive(Default)]
struct Rung {
    /// One bit for each thing that there is to do.
    bits: u64,
    stop: bool,
}

/// What wakes a worker.
#[derive(Default)]
pub struct Bell {
    rung: Mutex<Rung>,
    wake: Condvar,
}

impl Bell {
    /// There is something to do, of kind `bit` (0–63; others are dropped).
    pub fn ring(&self, bit: u32) {
        lock(&self.rung).bits |= 1u64.checked_shl(bit).unwrap_or(0);
        self.wake.notify_one();
    }

    /// Waits until there is something to do: bits by kind. `None` when the worker has to end.
    pub fn wait(&self) -> Option<u64> {
        let quiet = |r: &mut Rung| r.bits == 0 && !r.stop;
        let guard = self.wake.wait_while(lock(&self.rung), quiet);
        let mut rung = guard.unwrap_or_else(PoisonError::into_inner);
        (!rung.stop).then(|| std::mem::take(&mut rung.bits))
    }

    /// Whether the worker has to end.
    pub fn is_stopped(&self) -> bool {
        lock(&self.rung).stop
    }

    fn stop(&self) {
        lock(&self.rung).stop = true;
        self.wake.notify_all();
    }
}

/// A device's thread. Dropping it ends and joins it.
pub struct Worker {
    bell: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts `run` on a thread called `name`. It has to end when [`Bell::wait`] says so.
    ///
    /// # Errors
    /// The host's, when it gives no thread.
    pub fn start(name: String, bell: Arc<Bell>, run: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let thread = std::thread::Builder::new().name(name).spawn(run)?;
        Ok(Self { bell, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.bell.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a device's thread panicked; please report this");
        }
    }
}
