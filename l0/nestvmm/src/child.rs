//! Programs that this one starts, this one itself among them.

use std::path::PathBuf;

use scenario_runner::process::{Launch, Process};

use crate::interrupt::{self, Guard};
use crate::status::Failure;

/// This program, to be started again.
///
/// # Errors
/// [`Failure`] when the host does not tell where it is.
pub fn own_program() -> Result<PathBuf, Failure> {
    std::env::current_exe().map_err(|e| Failure::host(format!("can't find this program: {e}")))
}

/// Starts a program on pipes. It is in a process group of its own, which Ctrl-C does not reach; a signal that ends
/// this program kills it, as long as the guard is there.
///
/// # Errors
/// [`Failure`] when it can't be started.
pub fn start(launch: &Launch) -> Result<(Process, Guard), Failure> {
    let started = interrupt::guarded(
        || launch.start(),
        |process| {
            let killer = process.killer();
            Box::new(move || killer.kill())
        },
    );
    started.map_err(Failure::host)
}
