//! Exit statistics of a run, as `--exit-stats-json` writes them, and what checks read of them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use exit_trace::{Row, Summary, VcpuSummary};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::inotify;
use rustix::process::Signal;

use crate::counts::{Counter, Figures, Kind, Owner, Share};
use crate::process::{DriveError, Process};

/// Nanoseconds in a millisecond.
const MS: f64 = 1e6;

/// Why there are no statistics.
#[derive(Debug, thiserror::Error)]
pub enum StatisticsError {
    /// nestvmm did not write them.
    #[error("no exit statistics within {0:?}")]
    Timeout(Duration),
    /// They can't be read.
    #[error("exit statistics can't be read: {0}")]
    Unreadable(io::Error),
    /// nestvmm can't be asked.
    #[error("{0}")]
    Drive(#[from] DriveError),
}

/// The file in which nestvmm leaves its statistics.
#[derive(Debug)]
pub struct StatisticsFile {
    path: PathBuf,
}

impl StatisticsFile {
    /// A file in `folder`.
    pub fn new(folder: &Path) -> Self {
        Self { path: folder.join("exits.json") }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is in it.
    ///
    /// # Errors
    /// When it is not there or not what nestvmm writes.
    pub fn read(&self) -> Result<Summary, StatisticsError> {
        let bytes = fs::read(&self.path).map_err(StatisticsError::Unreadable)?;
        serde_json::from_slice(&bytes).map_err(|e| StatisticsError::Unreadable(e.into()))
    }

    /// Has `process` write them now.
    ///
    /// # Errors
    /// When they don't come within `limit`.
    pub fn ask(&self, process: &Process, limit: Duration) -> Result<Summary, StatisticsError> {
        let refuse = |e: rustix::io::Errno| StatisticsError::Unreadable(e.into());
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(StatisticsError::Unreadable(e)),
            _ => {}
        }
        // nestvmm gives the finished file its name; the watch is there before it is asked.
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).map_err(refuse)?;
        let folder = self.path.parent().unwrap_or(Path::new("."));
        let events = inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::CREATE;
        inotify::add_watch(&watch, folder, events).map_err(refuse)?;
        process.signal(Signal::USR1)?;
        let deadline = Instant::now() + limit;
        while !self.path.exists() {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(&watch, PollFlags::IN)];
            match rustix::event::poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
                Ok(0) => return Err(StatisticsError::Timeout(limit)),
                Ok(_) => {
                    // What the events say is of no interest.
                    let mut events = [0; 4096];
                    rustix::io::read(&watch, &mut events).map_err(refuse)?;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(refuse(e)),
            }
        }
        self.read()
    }
}

/// The figures of a whole run.
#[derive(Clone, Debug)]
pub struct Total(pub Summary);

impl Figures for Total {
    fn figure(&self, counter: Counter) -> Option<f64> {
        self.0.vcpus.iter().map(|v| of_vcpu(v, counter)).sum()
    }
}

/// The figures between two marks.
#[derive(Clone, Debug)]
pub struct Difference<'a> {
    /// At the first mark.
    pub from: &'a Total,
    /// At the second.
    pub to: &'a Total,
}

impl Figures for Difference<'_> {
    fn figure(&self, counter: Counter) -> Option<f64> {
        Some(self.to.figure(counter)? - self.from.figure(counter)?)
    }
}

/// `None` when the run does not count it.
fn of_vcpu(v: &VcpuSummary, counter: Counter) -> Option<f64> {
    let ns = |n: u64| Some(n as f64 / MS);
    let count = match counter {
        Counter::Exits => v.exits,
        Counter::L1(kind) => rows(&v.l1, kind),
        Counter::L2(kind, Owner::Kept) => rows(&v.l2_kept, kind),
        Counter::L2(Kind::Exits, Owner::Any) => v.l2_exits,
        Counter::L2(kind, Owner::Any) => {
            let engine_s = forwarded(v, kind, |r| r.count.saturating_sub(r.synthesized));
            rows(&v.l2_kept, kind) + engine_s
        }
        Counter::L2(kind, Owner::Forwarded) => forwarded(v, kind, |r| r.count),
        Counter::L2(kind, Owner::Synthesized) => forwarded(v, kind, |r| r.synthesized),
        Counter::L2(kind, Owner::Returned) => forwarded(v, kind, |r| r.returned),
        Counter::Caused(what, by) => forwarded(v, Kind::Reason(by), |r| match what {
            Kind::Exits => r.l1_exits,
            Kind::Reason(reason) => r.caused_by_reason(reason),
        }),
        Counter::Instructions(Share::L1) => v.instructions?.l1,
        Counter::Instructions(Share::L2) => v.instructions?.l2,
        Counter::Instructions(Share::L0 | Share::Idle) => return None,
        Counter::Vmreads => v.vmcs_accesses?.vmreads,
        Counter::Vmwrites => v.vmcs_accesses?.vmwrites,
        Counter::Milliseconds(Share::L0) => return ns(v.time.l0_ns),
        Counter::Milliseconds(Share::L1) => return ns(v.time.l1_ns),
        Counter::Milliseconds(Share::L2) => return ns(v.time.l2_ns),
        Counter::Milliseconds(Share::Idle) => return ns(v.time.idle_ns),
    };
    Some(count as f64)
}

fn rows(rows: &[Row], kind: Kind) -> u64 {
    rows.iter().filter(|r| is(kind, r.reason)).map(|r| r.count).sum()
}

fn forwarded(v: &VcpuSummary, kind: Kind, what: impl Fn(&exit_trace::ForwardedRow) -> u64) -> u64 {
    v.l2_forwarded.iter().filter(|r| is(kind, r.reason)).map(what).sum()
}

fn is(kind: Kind, reason: x86_spec::exit::ExitReason) -> bool {
    match kind {
        Kind::Exits => true,
        Kind::Reason(r) => r == reason,
    }
}
