//! The engines of this host: what they can, how fast they are, and which of them `--engine auto` takes.

pub mod choice;
pub mod figures;

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use choice::Need;
use engine_kvm::tiny::{self, Level};
use engine_kvm::{Flaw, KvmEngine};
use engine_soft::SoftEngine;

/// How long each engine's loop runs for the choice.
const LOOP: Duration = Duration::from_millis(4);
/// How long the choice waits for KVM: many times of what it takes, a few virtual machines made and entered. That is some
/// tens of milliseconds, and more where KVM's host is itself emulated.
const PATIENCE: Duration = Duration::from_secs(1);

/// What is known of this host's KVM, as far as the choice needs it.
#[derive(Clone, Debug, PartialEq)]
pub enum Findings {
    /// It can't be used: the call that failed and the host's answer, or what it lacks.
    Unusable(String),
    /// It can be opened; more was not asked.
    Opened,
    /// It gets these wrong.
    Flawed(Vec<Flaw>),
    /// It is right as far as is known, and runs so many guest instructions a second; so many, the software engine.
    Measured {
        /// KVM's kernel code.
        kvm: f64,
        /// The software engine's.
        soft: f64,
    },
}

/// Looks at KVM as closely as `need` asks for, in a bounded time.
pub fn look(need: Need) -> Findings {
    match engine_kvm::device::open() {
        Err(e) => Findings::Unusable(e.to_string()),
        Ok(_) if need != Need::Plain => Findings::Opened,
        Ok(_) => measured(),
    }
}

/// Asks in another thread, since a call to KVM may take as long as it likes.
fn measured() -> Findings {
    let (answer, wait) = channel();
    // If nobody waits any more, the answer is lost, and the thread ends.
    let asking = std::thread::Builder::new().name("probe".into()).spawn(move || answer.send(probe()));
    match asking.map(|_| wait.recv_timeout(PATIENCE)) {
        Ok(Ok(findings)) => findings,
        Ok(Err(RecvTimeoutError::Timeout)) => {
            Findings::Unusable(format!("its probe was not done after {} ms", PATIENCE.as_millis()))
        }
        Ok(Err(RecvTimeoutError::Disconnected)) => Findings::Unusable("its probe failed".into()),
        Err(e) => Findings::Unusable(format!("can't start a thread to probe it: {e}")),
    }
}

fn probe() -> Findings {
    match engine_kvm::probe() {
        Err(e) => return Findings::Unusable(e.to_string()),
        Ok(p) if !p.flaws.is_empty() => return Findings::Flawed(p.flaws),
        Ok(_) => {}
    }
    let kvm = tiny::speed(KvmEngine::new, Level::Kernel, LOOP);
    let soft = tiny::speed(SoftEngine::new, Level::Kernel, LOOP);
    match (kvm, soft) {
        (Ok(kvm), Ok(soft)) => Findings::Measured { kvm, soft },
        // The software engine's own failure is not KVM's, but shows when the guest is started.
        (Err(e), _) | (_, Err(e)) => Findings::Unusable(format!("its speed could not be measured: {e}")),
    }
}
