//! Counts and times of exits, by level, owner and reason, and of what they cause.
//!
//! Memory is bounded: a histogram of fixed size for each (level, owner, reason) that occurred.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use x86_spec::exit::ExitReason;

use crate::record::{Event, Exit, Level, VmFail};
use crate::summary::{Caused, FailedInstruction, ForwardedRow, Latency, Row, TimeShares, VcpuSummary};

/// Longest time that is told apart, in nanoseconds.
const MAX_NS: u64 = 10_000_000_000;
/// More than the largest exit reason.
const REASONS: usize = 80;

/// Adds times, which a damaged trace may have any of.
fn add(to: &mut u64, ns: u64) {
    *to = to.saturating_add(ns);
}

/// The distribution of a time.
#[derive(Debug)]
struct Times {
    count: u64,
    total_ns: u64,
    /// `None` only if the histogram's fixed bounds were invalid.
    histogram: Option<Histogram<u32>>,
}

impl Times {
    fn new() -> Self {
        Self { count: 0, total_ns: 0, histogram: Histogram::new_with_bounds(1, MAX_NS, 2).ok() }
    }

    fn add(&mut self, ns: u64) {
        self.count += 1;
        self.total_ns = self.total_ns.saturating_add(ns);
        if let Some(h) = &mut self.histogram {
            h.saturating_record(ns.max(1));
        }
    }

    fn latency(&self) -> Latency {
        let at = |q| self.histogram.as_ref().map_or(0, |h| h.value_at_quantile(q));
        Latency {
            total_ns: self.total_ns,
            median_ns: at(0.5),
            p90_ns: at(0.9),
            p99_ns: at(0.99),
            max_ns: self.histogram.as_ref().map_or(0, Histogram::max),
        }
    }
}

/// Something for each exit reason that occurred.
#[derive(Debug)]
struct ByReason<T>(Vec<Option<Box<T>>>);

impl<T> Default for ByReason<T> {
    fn default() -> Self {
        Self((0..REASONS).map(|_| None).collect())
    }
}

impl<T> ByReason<T> {
    fn get_or_insert(&mut self, reason: ExitReason, new: impl FnOnce() -> T) -> Option<&mut T> {
        let slot = self.0.get_mut(reason as usize)?;
        Some(slot.get_or_insert_with(|| Box::new(new())))
    }

    fn iter(&self) -> impl Iterator<Item = (ExitReason, &T)> {
        let reason = |i| ExitReason::from_u16(u16::try_from(i).ok()?);
        self.0.iter().enumerate().filter_map(move |(i, t)| Some((reason(i)?, t.as_deref()?)))
    }
}

/// Exits of L1 for one reason, caused by exits of L2 for another.
#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    count: u64,
    l0_ns: u64,
}

/// Exits of L2 for one reason that L1 got.
#[derive(Debug)]
struct Forwarded {
    l0: Times,
    synthesized: u64,
    entry_failures: u64,
    round_trip: Times,
    l1_ns: u64,
    l1_exits: u64,
    caused: [Cell; REASONS],
}

impl Forwarded {
    fn new() -> Self {
        Self {
            l0: Times::new(),
            synthesized: 0,
            entry_failures: 0,
            round_trip: Times::new(),
            l1_ns: 0,
            l1_exits: 0,
            caused: [Cell::default(); REASONS],
        }
    }
}

/// What followed a forwarded exit of L2 so far. It counts when L2 is entered again: what L1 does after the
/// last exit of an L2 has other reasons.
#[derive(Debug)]
struct Open {
    /// The forwarded exit's reason, as L1 sees it; `None` if L1 works on none.
    reason: Option<ExitReason>,
    l0_ns: u64,
    l1_ns: u64,
    exits: u64,
    cells: [Cell; REASONS],
    /// Which of `cells` are not zero.
    touched: u128,
}

impl Default for Open {
    fn default() -> Self {
        Self { reason: None, l0_ns: 0, l1_ns: 0, exits: 0, cells: [Cell::default(); REASONS], touched: 0 }
    }
}

/// The indices of the set bits.
fn bits(mut set: u128) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let i = set.trailing_zeros() as usize;
        set &= set.checked_sub(1)?;
        Some(i)
    })
}

impl Open {
    fn start(&mut self, reason: Option<ExitReason>, l0_ns: u64) {
        for i in bits(self.touched) {
            if let Some(c) = self.cells.get_mut(i) {
                *c = Cell::default();
            }
        }
        (self.reason, self.l0_ns, self.l1_ns, self.exits, self.touched) = (reason, l0_ns, 0, 0, 0);
    }

    fn add(&mut self, exit: &Exit) {
        let i = exit.reason as usize;
        add(&mut self.l0_ns, exit.l0_ns);
        add(&mut self.l1_ns, exit.guest_ns);
        self.exits += 1;
        if let Some(c) = self.cells.get_mut(i) {
            c.count += 1;
            add(&mut c.l0_ns, exit.l0_ns);
            self.touched |= 1 << i;
        }
    }
}

/// Statistics of one vCPU.
#[derive(Debug, Default)]
pub struct Statistics {
    l1: ByReason<Times>,
    kept: ByReason<Times>,
    forwarded: ByReason<Forwarded>,
    open: Open,
    l1_exits: u64,
    l2_exits: u64,
    caused_exits: u64,
    /// VMX instructions of L1 that failed; there are not more than reasons and error numbers.
    failed: BTreeMap<(u16, VmFail), u64>,
    time: TimeShares,
}

impl Statistics {
    /// Counts an exit.
    pub fn exit(&mut self, exit: &Exit) {
        add(&mut self.time.l0_ns, exit.l0_ns);
        match exit.level {
            Level::L1 => self.exit_of_l1(exit),
            Level::L2 => self.exit_of_l2(exit),
        }
    }

    fn exit_of_l1(&mut self, exit: &Exit) {
        self.l1_exits += 1;
        if let Some(failed) = exit.failed {
            *self.failed.entry((exit.reason as u16, failed)).or_default() += 1;
        }
        add(&mut self.time.l1_ns, exit.guest_ns);
        if let Some(t) = self.l1.get_or_insert(exit.reason, Times::new) {
            t.add(exit.l0_ns);
        }
        if self.open.reason.is_some() {
            if exit.ends_work_on_l2() {
                self.open.start(None, 0);
            } else {
                self.open.add(exit);
            }
        }
    }

    fn exit_of_l2(&mut self, exit: &Exit) {
        self.l2_exits += u64::from(!exit.synthesized);
        add(&mut self.time.l2_ns, exit.guest_ns);
        self.close();
        let Some(reason) = exit.forwarded else {
            if let Some(t) = self.kept.get_or_insert(exit.reason, Times::new) {
                t.add(exit.l0_ns);
            }
            return;
        };
        self.open.start(Some(reason), exit.l0_ns);
        if let Some(f) = self.forwarded.get_or_insert(reason, Forwarded::new) {
            f.l0.add(exit.l0_ns);
            f.synthesized += u64::from(exit.synthesized);
            f.entry_failures += u64::from(exit.entry_failure);
        }
    }

    /// L1 entered L2 again.
    fn close(&mut self) {
        let Some(reason) = self.open.reason.take() else { return };
        let Some(f) = self.forwarded.get_or_insert(reason, Forwarded::new) else { return };
        f.round_trip.add(self.open.l0_ns.saturating_add(self.open.l1_ns));
        add(&mut f.l1_ns, self.open.l1_ns);
        f.l1_exits += self.open.exits;
        self.caused_exits += self.open.exits;
        for i in bits(self.open.touched) {
            if let (Some(to), Some(from)) = (f.caused.get_mut(i), self.open.cells.get(i)) {
                to.count += from.count;
                add(&mut to.l0_ns, from.l0_ns);
            }
        }
    }

    /// Takes an exit or a time of waiting.
    pub fn event(&mut self, event: &Event) {
        match event {
            Event::Exit(exit) => self.exit(exit),
            Event::Idle { ns, .. } => add(&mut self.time.idle_ns, *ns),
        }
    }

    /// Exits are missing here: what L1 works on is not known.
    pub fn gap(&mut self) {
        self.open.start(None, 0);
    }

    /// What they tell of vCPU `cpu`.
    pub fn summary(&self, cpu: usize) -> VcpuSummary {
        let mut l2_forwarded: Vec<_> = self.forwarded.iter().map(|(r, f)| forwarded_row(r, f)).collect();
        l2_forwarded.sort_by_key(|r| std::cmp::Reverse((r.round_trip.total_ns, r.l0.total_ns, r.count)));
        let multiplication = 1.0 + self.caused_exits as f64 / self.l2_exits.max(1) as f64;
        VcpuSummary {
            cpu,
            exits: self.l1_exits + self.l2_exits,
            l1_exits: self.l1_exits,
            l2_exits: self.l2_exits,
            caused_exits: self.caused_exits,
            exit_multiplication: (self.l2_exits > 0).then_some(multiplication),
            time: self.time,
            instructions: None,
            vmcs_accesses: None,
            hand_overs: None,
            l1: rows(&self.l1),
            l2_kept: rows(&self.kept),
            l2_forwarded,
            failed: self.failed.iter().filter_map(|(&(r, how), &n)| failed_row(r, how, n)).collect(),
        }
    }
}

fn failed_row(reason: u16, how: VmFail, count: u64) -> Option<FailedInstruction> {
    let error = match how {
        VmFail::Invalid => None,
        VmFail::Valid(e) => Some(e.number()),
    };
    Some(FailedInstruction { reason: ExitReason::from_u16(reason)?, error, text: how.to_string(), count })
}

fn rows(by_reason: &ByReason<Times>) -> Vec<Row> {
    let row = |(reason, t): (_, &Times)| Row { reason, count: t.count, l0: t.latency() };
    let mut rows: Vec<Row> = by_reason.iter().map(row).collect();
    rows.sort_by_key(|r| std::cmp::Reverse((r.l0.total_ns, r.count)));
    rows
}

fn forwarded_row(reason: ExitReason, f: &Forwarded) -> ForwardedRow {
    let caused = |r: &ExitReason| {
        let c = f.caused.get(*r as usize).filter(|c| c.count > 0)?;
        Some(Caused { reason: *r, count: c.count, l0_ns: c.l0_ns })
    };
    let mut caused: Vec<_> = ExitReason::ALL.iter().filter_map(caused).collect();
    caused.sort_by_key(|c| std::cmp::Reverse(c.count));
    ForwardedRow {
        reason,
        count: f.l0.count,
        synthesized: f.synthesized,
        entry_failures: f.entry_failures,
        l0: f.l0.latency(),
        returned: f.round_trip.count,
        round_trip: f.round_trip.latency(),
        l1_ns: f.l1_ns,
        l1_exits: f.l1_exits,
        caused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn l1(reason: ExitReason, guest_ns: u64, l0_ns: u64) -> Exit {
        Exit { guest_ns, l0_ns, ..Exit::new(Level::L1, reason) }
    }

    fn l2(reason: ExitReason, forwarded: bool, guest_ns: u64, l0_ns: u64) -> Exit {
        Exit { guest_ns, l0_ns, forwarded: forwarded.then_some(reason), ..Exit::new(Level::L2, reason) }
    }

    fn statistics(exits: impl IntoIterator<Item = Exit>) -> VcpuSummary {
        let mut s = Statistics::default();
        exits.into_iter().for_each(|e| s.exit(&e));
        s.summary(0)
    }

    #[test]
    fn every_reason_has_a_place() {
        assert!(ExitReason::ALL.iter().all(|r| (*r as usize) < REASONS));
        const { assert!(REASONS <= u128::BITS as usize) };
    }

    #[test]
    fn counts_and_percentiles() {
        let mut s = Statistics::default();
        for i in 1..=100u64 {
            s.exit(&l1(ExitReason::Cpuid, 900, i * 10));
        }
        s.exit(&l1(ExitReason::Hlt, 0, 1));
        s.event(&Event::Idle { time_ns: 5, ns: 77 });
        let t = s.summary(3);
        assert_eq!((t.cpu, t.exits, t.l1_exits, t.l2_exits, t.exit_multiplication), (3, 101, 101, 0, None));
        assert_eq!(t.time, TimeShares { l0_ns: 50_501, l1_ns: 90_000, l2_ns: 0, idle_ns: 77 });
        assert_eq!((t.l1[0].reason, t.l1[0].count), (ExitReason::Cpuid, 100));
        // Two significant digits.
        assert!((495..=505).contains(&t.l1[0].l0.median_ns), "{}", t.l1[0].l0.median_ns);
        assert!((985..=1000).contains(&t.l1[0].l0.p99_ns), "{}", t.l1[0].l0.p99_ns);
        assert!((1000..=1010).contains(&t.l1[0].l0.max_ns), "{}", t.l1[0].l0.max_ns);
    }

    #[test]
    fn what_an_exit_of_l2_causes_is_counted_under_its_reason() {
        let mut exits = vec![l1(ExitReason::Vmlaunch, 5, 5)];
        for _ in 0..10 {
            exits.push(l2(ExitReason::Cpuid, true, 100, 3));
            exits.push(l1(ExitReason::Vmread, 7, 2));
            exits.push(l1(ExitReason::Vmread, 7, 2));
            exits.push(l1(ExitReason::Vmresume, 7, 4));
        }
        exits.push(l2(ExitReason::EptViolation, false, 50, 9));
        exits.push(l2(ExitReason::Vmcall, true, 50, 9));
        let t = statistics(exits);
        let row = t.forwarded(ExitReason::Cpuid).unwrap();
        assert_eq!((row.count, row.returned, row.l1_exits, row.l1_ns), (10, 10, 30, 210));
        assert_eq!(row.round_trip.total_ns, 10 * (3 + 3 * 7 + 2 + 2 + 4));
        assert_eq!(row.exit_multiplication(), Some(4.0));
        assert_eq!(
            row.caused,
            [
                Caused { reason: ExitReason::Vmread, count: 20, l0_ns: 40 },
                Caused { reason: ExitReason::Vmresume, count: 10, l0_ns: 40 }
            ]
        );
        assert_eq!(t.kept_count(ExitReason::EptViolation), 1);
        assert_eq!(t.l1_count(ExitReason::Vmread), 20);
        // 12 exits of L2, 30 of L1 because of them.
        assert_eq!((t.l2_exits, t.caused_exits, t.exit_multiplication), (12, 30, Some(3.5)));
        assert_eq!(t.time.l2_ns, 1100);
        assert_eq!(t.forwarded(ExitReason::Vmcall).unwrap().returned, 0);
    }

    #[test]
    fn what_l1_does_after_the_last_exit_of_l2_is_not_caused_by_it() {
        let end = [ExitReason::IoInstruction, ExitReason::Vmclear, ExitReason::IoInstruction];
        let mut exits = vec![l2(ExitReason::Cpuid, true, 1, 1)];
        exits.extend(end.map(|r| l1(r, 1, 1)));
        let t = statistics(exits.clone());
        assert_eq!((t.caused_exits, t.forwarded(ExitReason::Cpuid).unwrap().returned), (0, 0));
        // Not even if another L2 is started later.
        exits.push(l2(ExitReason::Hlt, true, 1, 1));
        assert_eq!(statistics(exits).caused_exits, 0);
    }

    #[test]
    fn an_exit_without_one_of_the_engine_is_forwarded_but_no_exit() {
        let failed =
            Exit { synthesized: true, entry_failure: true, ..l2(ExitReason::InvalidGuestState, true, 0, 1) };
        let t = statistics([l1(ExitReason::Vmlaunch, 1, 1), failed]);
        let row = t.forwarded(ExitReason::InvalidGuestState).unwrap();
        assert_eq!((row.count, row.synthesized, row.entry_failures), (1, 1, 1));
        assert_eq!((t.exits, t.l2_exits), (1, 0));
    }

    #[test]
    fn json_and_back() {
        let t = crate::Summary::new(vec![statistics([
            l1(ExitReason::Vmlaunch, 5, 5),
            l2(ExitReason::Cpuid, true, 100, 3),
            l1(ExitReason::Vmresume, 7, 2),
            l2(ExitReason::Cpuid, true, 100, 3),
        ])]);
        let json = serde_json::to_string(&t).unwrap();
        assert!(json.contains(r#""reason":"CPUID","count":2"#), "{json}");
        assert_eq!(serde_json::from_str::<crate::Summary>(&json).unwrap(), t);
        let bad = json.replace("CPUID", "NOTHING");
        let error = serde_json::from_str::<crate::Summary>(&bad).unwrap_err().to_string();
        assert!(error.contains("NOTHING is no exit reason"), "{error}");
    }
}
