//! Exit statistics of one vCPU: how often, how long, and the last exits for a crash report.
//!
//! Memory is bounded: a fixed histogram for each exit reason that occurred, and a ring of
//! [`RING`] exits.

use std::collections::VecDeque;
use std::fmt;

use engine::VmExit;
use hdrhistogram::Histogram;
use x86_spec::exit::ExitReason;

/// How many exits are remembered.
pub const RING: usize = 32;
/// Longest latency that is told apart, in nanoseconds.
const MAX_NS: u64 = 10_000_000_000;

/// An exit that happened.
#[derive(Clone, Copy, Debug)]
pub struct ExitRecord {
    /// Its number, counted from 1.
    pub number: u64,
    /// RIP at the exit.
    pub rip: u64,
    /// Its fields.
    pub exit: VmExit,
}

/// Counts and times of one exit reason.
#[derive(Debug)]
struct ReasonStats {
    count: u64,
    total_ns: u64,
    /// `None` only if the histogram's fixed bounds were invalid.
    latency: Option<Histogram<u32>>,
}

impl ReasonStats {
    fn new() -> Self {
        Self { count: 0, total_ns: 0, latency: Histogram::new_with_bounds(1, MAX_NS, 2).ok() }
    }
}

/// Statistics of one vCPU. Times are in nanoseconds.
#[derive(Debug, Default)]
pub struct ExitStats {
    reasons: Vec<(ExitReason, ReasonStats)>,
    ring: VecDeque<ExitRecord>,
    exits: u64,
    guest_ns: u64,
    idle_ns: u64,
}

impl ExitStats {
    /// Notes an exit when it happens, after `guest_ns` in the guest.
    pub fn exited(&mut self, exit: &VmExit, rip: u64, guest_ns: u64) {
        self.exits += 1;
        self.guest_ns += guest_ns;
        if self.ring.len() == RING {
            self.ring.pop_front();
        }
        self.ring.push_back(ExitRecord { number: self.exits, rip, exit: *exit });
    }

    /// Notes that L0 took `ns` to handle an exit for `reason`, waiting not included.
    pub fn handled(&mut self, reason: ExitReason, ns: u64) {
        let at = match self.reasons.iter().position(|(r, _)| *r == reason) {
            Some(i) => i,
            None => {
                self.reasons.push((reason, ReasonStats::new()));
                self.reasons.len() - 1
            }
        };
        if let Some((_, s)) = self.reasons.get_mut(at) {
            s.count += 1;
            s.total_ns += ns;
            if let Some(h) = &mut s.latency {
                h.saturating_record(ns.max(1));
            }
        }
    }

    /// Notes `ns` of waiting for an interrupt after HLT.
    pub fn idled(&mut self, ns: u64) {
        self.idle_ns += ns;
    }

    /// The last exits, oldest first.
    pub fn last_exits(&self) -> Vec<ExitRecord> {
        self.ring.iter().copied().collect()
    }

    /// The statistics so far; `instructions` is what the engine counted.
    pub fn summary(&self, instructions: u64) -> StatsSummary {
        let mut rows: Vec<ReasonRow> = self.reasons.iter().map(|(r, s)| row(*r, s)).collect();
        rows.sort_by_key(|r| std::cmp::Reverse((r.total_ns, r.count)));
        let l0_ns = rows.iter().map(|r| r.total_ns).sum();
        StatsSummary {
            rows,
            exits: self.exits,
            guest_ns: self.guest_ns,
            l0_ns,
            idle_ns: self.idle_ns,
            instructions,
        }
    }
}

fn row(reason: ExitReason, s: &ReasonStats) -> ReasonRow {
    let at = |q| s.latency.as_ref().map_or(0, |h| h.value_at_quantile(q));
    ReasonRow {
        reason,
        count: s.count,
        total_ns: s.total_ns,
        median_ns: at(0.5),
        p90_ns: at(0.9),
        p99_ns: at(0.99),
        max_ns: s.latency.as_ref().map_or(0, Histogram::max),
    }
}

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReasonRow {
    /// The exit reason.
    pub reason: ExitReason,
    /// How many exits.
    pub count: u64,
    /// Time that L0 took for all of them, in nanoseconds.
    pub total_ns: u64,
    /// Median of the time for one.
    pub median_ns: u64,
    /// 90th percentile.
    pub p90_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// Statistics of one vCPU at one moment; `Display` gives the table of `--exit-stats`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatsSummary {
    /// By exit reason, the most expensive first.
    pub rows: Vec<ReasonRow>,
    /// All exits.
    pub exits: u64,
    /// Time in the guest, in nanoseconds.
    pub guest_ns: u64,
    /// Time in L0, in nanoseconds.
    pub l0_ns: u64,
    /// Time waiting after HLT, in nanoseconds.
    pub idle_ns: u64,
    /// Guest instructions executed; 0 when the engine does not count.
    pub instructions: u64,
}

impl fmt::Display for StatsSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let busy = (self.guest_ns + self.l0_ns).max(1);
        let percent = |ns: u64| ns as f64 * 100.0 / busy as f64;
        let us = |ns: u64| ns as f64 / 1000.0;
        writeln!(
            f,
            "{:<20} {:>12} {:>7} {:>10} {:>10} {:>10} {:>10}",
            "VM exit", "count", "time %", "median µs", "p90 µs", "p99 µs", "max µs"
        )?;
        for r in &self.rows {
            writeln!(
                f,
                "{:<20} {:>12} {:>7.2} {:>10.2} {:>10.2} {:>10.2} {:>10.2}",
                r.reason.name(),
                r.count,
                percent(r.total_ns),
                us(r.median_ns),
                us(r.p90_ns),
                us(r.p99_ns),
                us(r.max_ns)
            )?;
        }
        writeln!(
            f,
            "{} exits; guest {:.3} s ({:.1} %), L0 {:.3} s ({:.1} %), idle {:.3} s",
            self.exits,
            self.guest_ns as f64 / 1e9,
            percent(self.guest_ns),
            self.l0_ns as f64 / 1e9,
            percent(self.l0_ns),
            self.idle_ns as f64 / 1e9
        )?;
        if self.instructions > 0 && self.guest_ns > 0 {
            let mips = self.instructions as f64 * 1000.0 / self.guest_ns as f64;
            writeln!(
                f,
                "{} guest instructions, {mips:.1} million a second of guest time",
                self.instructions
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_shares_and_percentiles() {
        let mut s = ExitStats::default();
        for i in 1..=100u64 {
            s.exited(&VmExit::new(ExitReason::Cpuid), 0x1000, 900);
            s.handled(ExitReason::Cpuid, i * 10);
        }
        s.exited(&VmExit::new(ExitReason::Hlt), 0x1000, 0);
        s.handled(ExitReason::Hlt, 1);
        let t = s.summary(1_000_000);
        assert_eq!((t.exits, t.guest_ns, t.l0_ns), (101, 90_000, 50_501));
        assert_eq!(t.rows[0].reason, ExitReason::Cpuid);
        assert_eq!(t.rows[0].count, 100);
        // Two significant digits.
        assert!((495..=505).contains(&t.rows[0].median_ns), "{}", t.rows[0].median_ns);
        assert!((985..=1000).contains(&t.rows[0].p99_ns), "{}", t.rows[0].p99_ns);
        let text = t.to_string();
        assert!(text.contains("CPUID") && text.contains("101 exits"), "{text}");
    }

    #[test]
    fn the_ring_keeps_the_last_exits() {
        let mut s = ExitStats::default();
        for i in 0..100 {
            s.exited(&VmExit::new(ExitReason::IoInstruction), i, 0);
        }
        let last = s.last_exits();
        assert_eq!(last.len(), RING);
        assert_eq!((last[0].rip, last[RING - 1].rip, last[RING - 1].number), (68, 99, 100));
    }
}
