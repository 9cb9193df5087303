//! Signals that end the program, for commands that wait for nothing but their own work: what they
//! have begun is undone, and the program ends with 128 and the signal's number.
//!
//! Whatever must not outlive the program (a temporary file, a child process) is made by [`guarded`],
//! which notes how to undo it. A signal is handled on a thread of its own, which keeps the list of such
//! notes locked until the end of the program: nothing new can be made meanwhile.
//!
//! Not covered: SIGKILL, which leaves temporary files, with names that start with a dot, beside
//! what was being written.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use tempfile::{NamedTempFile, TempDir};

use crate::status::{self, Failure};

/// How to undo something. It may be undone already.
pub type Undo = Box<dyn FnOnce() + Send>;

/// What is to be undone, by number.
static NOTES: Mutex<Vec<(u64, Undo)>> = Mutex::new(Vec::new());

fn notes() -> MutexGuard<'static, Vec<(u64, Undo)>> {
    NOTES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a note back when dropped: what it is about is gone, or is to stay.
#[derive(Debug)]
pub struct Guard(u64);

impl Drop for Guard {
    fn drop(&mut self) {
        notes().retain(|(id, _)| *id != self.0);
    }
}

/// Makes something, and notes how to undo it. No signal is handled in between.
///
/// # Errors
/// Those of `make`.
pub fn guarded<T, E>(
    make: impl FnOnce() -> Result<T, E>,
    undo: impl FnOnce(&T) -> Undo,
) -> Result<(T, Guard), E> {
    let mut notes = notes();
    let made = make()?;
    let id = notes.last().map_or(0, |(id, _)| id + 1);
    notes.push((id, undo(&made)));
    Ok((made, Guard(id)))
}

/// Makes a temporary file that a signal removes too.
///
/// # Errors
/// Those of `make`.
pub fn scratch_file(make: impl FnOnce() -> io::Result<NamedTempFile>) -> io::Result<(NamedTempFile, Guard)> {
    guarded(make, |file| {
        let path = file.path().to_owned();
        // It is gone when it was given its name.
        Box::new(move || drop(std::fs::remove_file(path)))
    })
}

/// Makes a temporary directory that a signal removes too.
///
/// # Errors
/// Those of `make`.
pub fn scratch_dir(make: impl FnOnce() -> io::Result<TempDir>) -> io::Result<(TempDir, Guard)> {
    guarded(make, |dir| {
        let path = dir.path().to_owned();
        // It may be removed already.
        Box::new(move || drop(std::fs::remove_dir_all(path)))
    })
}

/// Ends the program with `status` after everything noted is undone.
pub fn exit(status: u8) -> ! {
    // Not unlocked any more.
    let mut notes = notes();
    for (_, undo) in notes.drain(..).rev() {
        undo();
    }
    std::process::exit(status.into())
}

/// Handles the signals that end the program from now on.
///
/// # Errors
/// When the host refuses.
pub fn handle_signals() -> Result<(), Failure> {
    let refuse = |e: io::Error| Failure::host(format!("can't handle signals: {e}"));
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT]).map_err(refuse)?;
    let body = move || {
        if let Some(signal) = signals.forever().next() {
            exit(status::signalled(signal));
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(body).map(drop).map_err(refuse)
}

/// If a signal is being handled, waits for it to end the program. To be called before the program ends
/// in another way, which may be a consequence of the signal.
pub fn settle() {
    drop(notes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_go_with_their_guards() {
        let note = || guarded(|| Ok::<_, ()>(()), |()| Box::new(|| ())).unwrap().1;
        let ids = || notes().iter().map(|(id, _)| *id).collect::<Vec<_>>();
        let (a, b) = (note(), note());
        assert!(ids().contains(&a.0) && ids().contains(&b.0) && a.0 != b.0);
        let id = a.0;
        drop(a);
        let c = note();
        assert!(!ids().contains(&id) && ids().contains(&b.0) && ids().contains(&c.0) && b.0 != c.0);
        assert_eq!(guarded(|| Err::<(), _>(5), |()| Box::new(|| ())).unwrap_err(), 5);
    }
}
