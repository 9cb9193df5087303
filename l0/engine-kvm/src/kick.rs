//! How a running `KVM_RUN` is made to return: a signal whose handler sets `immediate_exit`.
//!
//! The signal alone would be lost if it came between the last look at the request and the call.
//! The handler therefore writes to the run structure of the vCPU that its thread is about to run,
//! which KVM reads first (Linux, `KVM_CAP_IMMEDIATE_EXIT`).

use std::cell::Cell;
use std::io;
use std::mem;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use engine::Kick;

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs; null outside of a run.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
    /// The signal came since [`Timer::set`] last looked.
    static SIGNALLED: Cell<bool> = const { Cell::new(false) };
}

fn signal_number() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_signal(_: libc::c_int) {
    // Constant initialisation and no destructor: this is a plain load, fit for a signal handler.
    SIGNALLED.set(true);
    let flag = IMMEDIATE_EXIT.with(Cell::get);
    if !flag.is_null() {
        // SAFETY: the pointer is set only while the thread is inside `Armed`, which borrows the
        // vCPU whose mapping it points into.
        unsafe { ptr::write_volatile(flag, 1) };
    }
}

/// Installs the handler, once in the process.
pub(crate) fn install_handler() -> io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        // SAFETY: all-zero is a valid `sigaction`; the handler does only what a handler may.
        let result = unsafe {
            let mut action: libc::sigaction = mem::zeroed();
            action.sa_sigaction = on_signal as *const () as libc::sighandler_t;
            // Other system calls of the thread go on; KVM_RUN returns EINTR all the same.
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal_number(), &action, ptr::null_mut())
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
    });
    done.map_err(io::Error::from_raw_os_error)
}

thread_local! {
    /// This thread's id, asked for once: each entry needs it.
    static THREAD_ID: i32 = {
        // SAFETY: the call has no arguments and can't fail.
        unsafe { libc::gettid() }
    };
}

fn thread_id() -> i32 {
    THREAD_ID.with(|id| *id)
}

/// What a vCPU and those who kick it share.
#[derive(Debug, Default)]
pub(crate) struct KickState {
    requested: AtomicBool,
    /// The thread that is in `KVM_RUN` or about to; 0 if none is.
    thread: AtomicI32,
}

impl KickState {
    /// Whether someone kicked; forgets it.
    pub fn take(&self) -> bool {
        self.requested.swap(false, Ordering::SeqCst)
    }
    /// Whether someone kicked.
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }
}

impl Kick for KickState {
    fn kick(&self) {
        // A vCPU announces its thread before it looks at the request for the last time, so one
        // of the two sees the other.
        self.requested.store(true, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        if thread != 0 {
            // SAFETY: no memory is passed. Should the thread have ended, the call fails, or the
            // handler runs in another thread of this process, where it does nothing lasting.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal_number()) };
        }
    }
}

/// The time from announcing a run to its end: signals to the thread set `immediate_exit`.
pub(crate) struct Armed<'a>(&'a KickState);

impl<'a> Armed<'a> {
    /// Announces a run. `immediate_exit` points into the run structure of the vCPU.
    ///
    /// # Safety
    /// The pointer has to stay valid as long as the result lives.
    pub unsafe fn new(state: &'a KickState, immediate_exit: *mut u8) -> Self {
        IMMEDIATE_EXIT.set(immediate_exit);
        state.thread.store(thread_id(), Ordering::SeqCst);
        Self(state)
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        self.0.thread.store(0, Ordering::SeqCst);
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// How much too early an armed timer may be before it is set anew, as a part of a second. Deadlines that are
/// computed from a remaining time jitter; a system call for each entry would cost more.
const SLACK: u64 = 20_000;

/// A timer that sends the kick signal to one thread. Its times are the TSC's, which is read without a system call.
pub(crate) struct Timer {
    id: libc::timer_t,
    thread: i32,
    tsc_frequency: u64,
    /// When it expires.
    armed: Option<u64>,
}

// SAFETY: a timer's ID may be used by any thread of the process.
unsafe impl Send for Timer {}

impl Timer {
    /// A timer for the calling thread. `tsc_frequency` is in hertz.
    pub fn new(tsc_frequency: u64) -> io::Result<Self> {
        let thread = thread_id();
        let mut id: libc::timer_t = ptr::null_mut();
        // SAFETY: all-zero is a valid `sigevent`; both pointers are valid for the call.
        let result = unsafe {
            let mut event: libc::sigevent = mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal_number();
            event.sigev_notify_thread_id = thread;
            libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut id)
        };
        if result == 0 {
            Ok(Self { id, thread, tsc_frequency: tsc_frequency.max(1), armed: None })
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Whether it was made by the calling thread.
    pub fn is_own(&self) -> bool {
        self.thread == thread_id()
    }

    /// Makes it expire at `deadline` or a little earlier. One that was set for an earlier time and
    /// has not expired yet may do so once in vain.
    pub fn set(&mut self, now: u64, deadline: u64) -> io::Result<()> {
        // The clock of timers and the TSC drift apart, so the time alone does not tell whether it expired.
        if !SIGNALLED.replace(false)
            && let Some(armed) = self.armed
            && armed > now
            && armed <= deadline
            && deadline - armed < self.tsc_frequency / SLACK
        {
            return Ok(());
        }
        let ticks = u128::from(deadline.saturating_sub(now));
        let ns = u64::try_from(ticks * 1_000_000_000 / u128::from(self.tsc_frequency)).unwrap_or(u64::MAX);
        // One that has come expires at once; zero would disarm the timer.
        let ns = ns.max(1);
        // SAFETY: all-zero is a valid `itimerspec`; the ID is of a timer that exists.
        let result = unsafe {
            let mut spec: libc::itimerspec = mem::zeroed();
            spec.it_value.tv_sec = libc::time_t::try_from(ns / 1_000_000_000).unwrap_or(libc::time_t::MAX);
            spec.it_value.tv_nsec = (ns % 1_000_000_000) as _;
            libc::timer_settime(self.id, 0, &spec, ptr::null_mut())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        self.armed = Some(deadline);
        Ok(())
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the ID is of a timer that exists and is not used after this.
        unsafe { libc::timer_delete(self.id) };
    }
}
