//! What statistics tell, in a form to read, to print and to exchange as JSON.
//!
//! All times are in nanoseconds. Percentiles have two significant digits.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use x86_spec::exit::ExitReason;

/// The version of the JSON form, which changes when a field changes its meaning or goes away.
pub const VERSION: u32 = 1;

/// Exit reasons are written by name ("CPUID").
mod by_name {
    use super::*;

    pub fn serialize<S: Serializer>(reason: &ExitReason, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(reason.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<ExitReason, D::Error> {
        let name = <std::borrow::Cow<'de, str>>::deserialize(d)?;
        ExitReason::ALL
            .iter()
            .copied()
            .find(|r| r.name() == name)
            .ok_or_else(|| de::Error::custom(format!("{name} is no exit reason")))
    }
}

/// Statistics of one run: what `--exit-stats-json` writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// [`VERSION`].
    pub version: u32,
    /// One for each vCPU.
    pub vcpus: Vec<VcpuSummary>,
}

impl Summary {
    /// The statistics of these vCPUs.
    pub fn new(vcpus: Vec<VcpuSummary>) -> Self {
        Self { version: VERSION, vcpus }
    }
}

/// Statistics of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VcpuSummary {
    /// Its index.
    pub cpu: usize,
    /// Exits of the engine, of both levels.
    pub exits: u64,
    /// Those of L1.
    pub l1_exits: u64,
    /// Those of L2.
    pub l2_exits: u64,
    /// Exits of L1 that forwarded exits of L2 caused, where L2 was entered again.
    pub caused_exits: u64,
    /// Exits of the engine for one exit of L2: its own and those of L1 that it caused; `None` without
    /// exits of L2.
    pub exit_multiplication: Option<f64>,
    /// Where the time went.
    pub time: TimeShares,
    /// Guest instructions, where the engine counts them.
    pub instructions: Option<Instructions>,
    /// VMREADs and VMWRITEs in shadow VMCSs, which do not exit, where the engine counts them.
    pub vmcs_accesses: Option<VmcsAccesses>,
    /// What KVM left to the software engine, where both run the guest.
    #[serde(default)]
    pub hand_overs: Option<HandOvers>,
    /// Exits of L1, the most expensive reason first.
    pub l1: Vec<Row>,
    /// Exits of L2 that L0 handled without L1.
    pub l2_kept: Vec<Row>,
    /// Exits that L1 got as exits of L2.
    pub l2_forwarded: Vec<ForwardedRow>,
    /// VMX instructions of L1 that failed, VM entries among them.
    #[serde(default)]
    pub failed: Vec<FailedInstruction>,
}

/// Where the time went; the sum is the time that the vCPU ran.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeShares {
    /// L0's.
    pub l0_ns: u64,
    /// L1 in the guest.
    pub l1_ns: u64,
    /// L2 in the guest.
    pub l2_ns: u64,
    /// Waiting for an interrupt after HLT.
    pub idle_ns: u64,
}

impl TimeShares {
    /// All but waiting, in nanoseconds.
    pub fn busy_ns(&self) -> u64 {
        self.l0_ns.saturating_add(self.l1_ns).saturating_add(self.l2_ns)
    }
}

/// Guest instructions by level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instructions {
    /// L1's.
    pub l1: u64,
    /// L2's.
    pub l2: u64,
}

/// What one engine left to another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandOvers {
    /// Single instructions that it could not execute.
    pub instructions: u64,
    /// Entries of contexts that it could not run.
    pub entries: u64,
}

/// VMREADs and VMWRITEs in shadow VMCSs, which do not exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmcsAccesses {
    /// VMREADs.
    pub vmreads: u64,
    /// VMWRITEs.
    pub vmwrites: u64,
}

/// VMX instructions of L1 of one kind that failed in one way (SDM Vol. 3C §31.2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailedInstruction {
    /// The exit reason of the instruction.
    #[serde(with = "by_name")]
    pub reason: ExitReason,
    /// VMfailValid's VM-instruction error number; `None` is VMfailInvalid.
    pub error: Option<u32>,
    /// In words.
    pub text: String,
    /// How many.
    pub count: u64,
}

/// The distribution of a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// The sum.
    pub total_ns: u64,
    /// Median.
    pub median_ns: u64,
    /// 90th percentile.
    pub p90_ns: u64,
    /// 99th percentile.
    pub p99_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// Exits for one reason that L0 handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Row {
    /// The reason, as the engine reports it.
    #[serde(with = "by_name")]
    pub reason: ExitReason,
    /// How many.
    pub count: u64,
    /// L0's time for one, from the exit to the next entry.
    pub l0: Latency,
}

/// Exits of L2 for one reason that L1 got.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForwardedRow {
    /// The reason, as L1 sees it.
    #[serde(with = "by_name")]
    pub reason: ExitReason,
    /// How many.
    pub count: u64,
    /// How many of them came without an exit of the engine: an event for L1 while L0 handled something
    /// else, or a VM entry of L1 that failed.
    pub synthesized: u64,
    /// How many of them are VM entries of L1 that failed (SDM Vol. 3C §27.8).
    pub entry_failures: u64,
    /// L0's time to hand one to L1.
    pub l0: Latency,
    /// After how many of them L1 entered L2 again. What follows is of those.
    pub returned: u64,
    /// Time from the exit of L2 to L2's next entry, in L0 and L1 without waiting.
    pub round_trip: Latency,
    /// L1's part of the round trips.
    pub l1_ns: u64,
    /// Exits of L1 on the way.
    pub l1_exits: u64,
    /// The same by reason, the most frequent first.
    pub caused: Vec<Caused>,
}

impl ForwardedRow {
    /// Exits of the engine for one such exit of L2: its own and those of L1 that it caused. `None`
    /// if L1 never entered L2 again.
    pub fn exit_multiplication(&self) -> Option<f64> {
        (self.returned > 0).then(|| 1.0 + self.l1_exits as f64 / self.returned as f64)
    }

    /// How many exits of L1 for `reason` these exits of L2 caused.
    pub fn caused_by_reason(&self, reason: ExitReason) -> u64 {
        self.caused.iter().find(|c| c.reason == reason).map_or(0, |c| c.count)
    }
}

/// Exits of L1 for one reason that forwarded exits of L2 caused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caused {
    /// L1's reason.
    #[serde(with = "by_name")]
    pub reason: ExitReason,
    /// How many.
    pub count: u64,
    /// L0's time for them.
    pub l0_ns: u64,
}

impl VcpuSummary {
    /// How many exits of L1 for `reason` there were.
    pub fn l1_count(&self, reason: ExitReason) -> u64 {
        count(&self.l1, reason)
    }

    /// How many exits of L2 for `reason` L0 kept.
    pub fn kept_count(&self, reason: ExitReason) -> u64 {
        count(&self.l2_kept, reason)
    }

    /// Exits of L2 that L1 got for `reason`.
    pub fn forwarded(&self, reason: ExitReason) -> Option<&ForwardedRow> {
        self.l2_forwarded.iter().find(|r| r.reason == reason)
    }
}

fn count(rows: &[Row], reason: ExitReason) -> u64 {
    rows.iter().find(|r| r.reason == reason).map_or(0, |r| r.count)
}
