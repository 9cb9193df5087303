//! What was measured, as `--json` writes it. Times are in nanoseconds.

use std::collections::BTreeMap;
use std::fmt;

use exit_trace::Chain;
use serde::Serialize;
use x86_spec::exit::ExitReason;

use super::access_name;
use super::console::{Outcome, Said, Timed};
use crate::cli::{L1Choice, MmuChoice, VmcsAccessChoice};

/// The version of the JSON form, which changes when a field changes its meaning or goes away.
const VERSION: u32 = 1;

/// One way of running L2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// Whose L2.
    pub l1: L1Choice,
    /// How L1 accesses its VMCS.
    pub access: VmcsAccessChoice,
    /// How L2's memory is mapped.
    pub mmu: MmuChoice,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, VMCS access {}, MMU {}", self.l1, access_name(self.access), self.mmu)
    }
}

/// All of it.
#[derive(Debug, Serialize)]
pub struct Report {
    version: u32,
    /// Rounds of each benchmark.
    pub rounds: u32,
    /// A list of runs.
    pub modes: Vec<Measured>,
}

impl Report {
    /// What `modes` have measured with so many rounds each.
    pub fn new(rounds: u32, modes: Vec<Measured>) -> Self {
        Self { version: VERSION, rounds, modes }
    }
}

/// What one run measured.
#[derive(Debug, Serialize)]
#[serde(into = "ModeJson")]
pub struct Measured {
    /// How L2 ran.
    pub mode: Mode,
    /// In the order in which they ran.
    pub benchmarks: Vec<Benchmark>,
}

/// [`Measured`] with names.
#[derive(Serialize)]
struct ModeJson {
    l1: String,
    vmcs_access: &'static str,
    mmu: String,
    benchmarks: Vec<Benchmark>,
}

impl Clone for Measured {
    fn clone(&self) -> Self {
        Self { mode: self.mode, benchmarks: self.benchmarks.clone() }
    }
}

impl From<Measured> for ModeJson {
    fn from(m: Measured) -> Self {
        Self {
            l1: m.mode.l1.to_string(),
            vmcs_access: access_name(m.mode.access),
            mmu: m.mode.mmu.to_string(),
            benchmarks: m.benchmarks,
        }
    }
}

/// One benchmark in one mode.
#[derive(Clone, Debug, Serialize)]
pub struct Benchmark {
    /// Its name.
    pub name: String,
    /// How often its operation was carried out.
    pub rounds: u64,
    /// Why it was not, if so.
    pub skipped: Option<String>,
    /// The time of one round by the guest's own clock: the microvisor's (L1's) rounds are from one handled exit of L2 to
    /// the next; KVM's L2 times its own operations.
    pub guest_ns: Option<Timed>,
    /// The kinds of exits of L2 that the operation causes, the most frequent first.
    pub exits: Vec<Kind>,
    /// Exits of L2 for other reasons, such as interrupts that came meanwhile.
    pub other_exits: u64,
}

/// Exits of L2 for one reason, with the same owner.
#[derive(Clone, Debug, Serialize)]
pub struct Kind {
    /// The reason by its name, as L1 sees it where L1 gets it.
    pub reason: &'static str,
    /// Whether L1 gets it; otherwise L0 handles it alone.
    pub forwarded: bool,
    /// How many.
    pub count: u64,
    /// How often L0 is entered for one: exit multiplication.
    pub l0_entries: Distribution,
    /// The exits of L1 that are among them, the most frequent first.
    pub caused: Vec<Caused>,
    /// L1's VMREADs for one, with exits and without.
    pub vmreads: Distribution,
    /// How many of them exit.
    pub trapped_vmreads: Distribution,
    /// L1's VMWRITEs for one, with exits and without.
    pub vmwrites: Distribution,
    /// How many of them exit.
    pub trapped_vmwrites: Distribution,
    /// Time in L0 for one.
    pub l0_ns: Distribution,
    /// Time in L1.
    pub l1_ns: Distribution,
    /// Time in L2 before it.
    pub l2_ns: Distribution,
    /// All three.
    pub total_ns: Distribution,
}

/// Exits of L1 for one reason because of one exit of L2.
#[derive(Clone, Debug, Serialize)]
pub struct Caused {
    /// The reason.
    pub reason: &'static str,
    /// How many, on average.
    pub mean: f64,
}

/// Of one number for each exit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Distribution {
    /// The mean.
    pub mean: f64,
    /// The median.
    pub median: u64,
    /// The 90th percentile.
    pub p90: u64,
    /// The 99th percentile.
    pub p99: u64,
}

impl Distribution {
    /// Of at least one number; a percentile is the smallest one that so many are not above.
    fn new(numbers: impl Iterator<Item = u64>) -> Self {
        let mut sorted: Vec<u64> = numbers.collect();
        sorted.sort_unstable();
        let at = |percent: usize| {
            let rank = (sorted.len() * percent).div_ceil(100).max(1);
            sorted.get(rank - 1).copied().unwrap_or(0)
        };
        let sum: u128 = sorted.iter().map(|n| u128::from(*n)).sum();
        Self { mean: sum as f64 / sorted.len().max(1) as f64, median: at(50), p90: at(90), p99: at(99) }
    }
}

/// Under which an exit of L2 counts.
fn key(chain: &Chain) -> (ExitReason, bool) {
    let e = &chain.exit;
    (e.forwarded.unwrap_or(e.reason), e.forwarded.is_some())
}

impl Benchmark {
    /// What the guest said, and the exits of L2 meanwhile. An operation's own exits come at least every other round;
    /// others are counted only.
    pub fn new(said: Said, chains: &[Chain]) -> Self {
        let (rounds, skipped, guest_ns) = match said.outcome {
            Outcome::Measured { rounds, timed } => (rounds, None, timed),
            Outcome::Skipped(why) => (0, Some(why), None),
        };
        let mut kinds: Vec<((ExitReason, bool), Vec<&Chain>)> = Vec::new();
        for chain in chains {
            match kinds.iter_mut().find(|(k, _)| *k == key(chain)) {
                Some((_, same)) => same.push(chain),
                None => kinds.push((key(chain), vec![chain])),
            }
        }
        let all = chains.len() as u64;
        kinds.retain(|(_, same)| 2 * same.len() as u64 >= rounds);
        kinds.sort_by_key(|(_, same)| std::cmp::Reverse(same.len()));
        let exits: Vec<Kind> = kinds.iter().map(|(key, same)| Kind::new(*key, same)).collect();
        let other_exits = all - exits.iter().map(|k| k.count).sum::<u64>();
        Self { name: said.name, rounds, skipped, guest_ns, exits, other_exits }
    }

    /// Median times in L0, L1 and L2 for one operation with all its exits.
    pub fn operation_ns(&self) -> [f64; 3] {
        let of = |f: fn(&Kind) -> u64| {
            self.exits.iter().map(|k| k.per_round(self.rounds) * f(k) as f64).sum::<f64>()
        };
        [of(|k| k.l0_ns.median), of(|k| k.l1_ns.median), of(|k| k.l2_ns.median)]
    }

    /// Median number of L0's entries for one operation.
    pub fn operation_entries(&self) -> f64 {
        self.exits.iter().map(|k| k.per_round(self.rounds) * k.l0_entries.median as f64).sum()
    }
}

impl Kind {
    fn new((reason, forwarded): (ExitReason, bool), chains: &[&Chain]) -> Self {
        let of = |f: fn(&Chain) -> u64| Distribution::new(chains.iter().map(|c| f(c)));
        Self {
            reason: reason.name(),
            forwarded,
            count: chains.len() as u64,
            l0_entries: of(Chain::l0_entries),
            caused: caused(chains),
            vmreads: of(|c| c.trapped().vmreads + c.untrapped.vmreads),
            trapped_vmreads: of(|c| c.trapped().vmreads),
            vmwrites: of(|c| c.trapped().vmwrites + c.untrapped.vmwrites),
            trapped_vmwrites: of(|c| c.trapped().vmwrites),
            l0_ns: of(|c| c.l0_ns),
            l1_ns: of(|c| c.l1_ns),
            l2_ns: of(|c| c.l2_ns),
            total_ns: of(|c| c.l0_ns.saturating_add(c.l1_ns).saturating_add(c.l2_ns)),
        }
    }

    /// How many there are in one round.
    pub fn per_round(&self, rounds: u64) -> f64 {
        self.count as f64 / rounds.max(1) as f64
    }
}

fn caused(chains: &[&Chain]) -> Vec<Caused> {
    let mut counts: BTreeMap<&'static str, u64> = BTreeMap::new();
    for reason in chains.iter().flat_map(|c| &c.caused) {
        *counts.entry(reason.name()).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let mean = |n| n as f64 / chains.len().max(1) as f64;
    counts.into_iter().map(|(reason, n)| Caused { reason, mean: mean(n) }).collect()
}

#[cfg(test)]
pub mod tests {
    use exit_trace::{Exit, Level, VmcsAccesses};

    use super::*;

    /// An exit of L2 that took so long in L0, L1 and L2.
    pub fn chain(reason: ExitReason, forwarded: bool, [l0_ns, l1_ns, l2_ns]: [u64; 3]) -> Chain {
        use ExitReason::{Rdmsr, Vmread, Vmresume, Vmwrite};
        Chain {
            exit: Exit { forwarded: forwarded.then_some(reason), ..Exit::new(Level::L2, reason) },
            caused: if forwarded { vec![Vmread, Rdmsr, Vmwrite, Vmresume] } else { Vec::new() },
            untrapped: VmcsAccesses { vmreads: 2, vmwrites: 0 },
            l0_ns,
            l1_ns,
            l2_ns,
        }
    }

    pub fn said(name: &str, rounds: u64) -> Said {
        Said { name: name.into(), outcome: Outcome::Measured { rounds, timed: None } }
    }

    #[test]
    fn percentiles_are_exact() {
        let d = Distribution::new((1..=200).rev());
        assert_eq!(d, Distribution { mean: 100.5, median: 100, p90: 180, p99: 198 });
        let one = Distribution { mean: 7.0, median: 7, p90: 7, p99: 7 };
        assert_eq!(Distribution::new(std::iter::once(7)), one);
    }

    #[test]
    fn an_operation_s_exits_are_told_from_others() {
        let mut chains: Vec<_> =
            (1..=10).map(|n| chain(ExitReason::EptViolation, true, [n * 100, n * 10, n])).collect();
        chains.extend((0..9).map(|_| chain(ExitReason::EptViolation, false, [50, 0, 3])));
        chains.push(chain(ExitReason::ExternalInterrupt, true, [9000, 9000, 9000]));
        let b = Benchmark::new(said("page_touch", 10), &chains);
        assert_eq!(b.other_exits, 1);
        let [touched, filled] = &b.exits[..] else { panic!("{b:?}") };
        assert_eq!((touched.count, touched.forwarded, touched.reason), (10, true, "EPT_VIOLATION"));
        assert_eq!((touched.vmreads.median, touched.trapped_vmreads.median), (3, 1));
        assert_eq!((touched.vmwrites.median, touched.trapped_vmwrites.median), (1, 1));
        let caused: Vec<_> = touched.caused.iter().map(|c| (c.reason, c.mean)).collect();
        assert_eq!(caused, [("MSR_READ", 1.0), ("VMREAD", 1.0), ("VMRESUME", 1.0), ("VMWRITE", 1.0)]);
        assert_eq!((touched.l0_ns.median, touched.l0_ns.p90, touched.total_ns.p99), (500, 900, 1110));
        assert_eq!((filled.count, filled.forwarded, filled.l0_entries.median), (9, false, 1));
        // Nine of ten rounds have both exits.
        assert_eq!(b.operation_ns(), [500.0 + 0.9 * 50.0, 50.0, 5.0 + 0.9 * 3.0]);
        assert_eq!(b.operation_entries(), 5.9);
    }
}
