//! One exit, and what keeps the last ones.

use std::collections::VecDeque;
use std::fmt;

use x86_spec::exit::ExitReason;
use x86_spec::instruction_error::InstructionError;
use x86_spec::interruption::InterruptionInfo;

use crate::summary::{HandOvers, Instructions, VcpuSummary, VmcsAccesses};
use crate::{Statistics, TraceWriter};

/// How many exits a [`Recorder`] remembers, for a crash report.
pub const LAST: usize = 32;

/// Which level was in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Level {
    /// L0's guest; a guest that is no hypervisor is L1 too.
    L1,
    /// L1's guest.
    L2,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::L1 => "L1",
            Self::L2 => "L2",
        })
    }
}

/// How a VMX instruction of L1 failed (SDM Vol. 3C §31.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum VmFail {
    /// VMfailInvalid: there is no current VMCS, or what would be one is none.
    Invalid,
    /// VMfailValid: the current VMCS got this error number.
    Valid(InstructionError),
}

impl fmt::Display for VmFail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid => f.write_str("VMfailInvalid"),
            Self::Valid(e) => write!(f, "VMfailValid {}: {}", e.number(), e.description()),
        }
    }
}

/// An exit, after L0 has handled it. Times are in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Its number, counted from 1; a [`Recorder`] gives it.
    pub number: u64,
    /// When it happened, from the start of the machine.
    pub time_ns: u64,
    /// Which level left the guest.
    pub level: Level,
    /// Why, as the engine reports it (SDM Vol. 3D appendix C).
    pub reason: ExitReason,
    /// L1 got it, for this reason; otherwise L0 handled it alone.
    pub forwarded: Option<ExitReason>,
    /// The engine did not exit: L0 made an exit to L1 out of an event for L1 that came while L0 did
    /// something else, or out of a VM entry of L1 that failed.
    pub synthesized: bool,
    /// A VM entry that failed (bit 31 of the exit reason, SDM Vol. 3C §27.8).
    pub entry_failure: bool,
    /// It was for a VMX instruction of L1, which failed like this.
    pub failed: Option<VmFail>,
    /// Exit qualification (§28.2.1).
    pub qualification: u64,
    /// RIP of the level that exited.
    pub rip: u64,
    /// Guest-physical address, where the reason has one.
    pub guest_physical: u64,
    /// Guest-linear address, where the reason has one.
    pub guest_linear: u64,
    /// VM-exit interruption information (§25.9.2).
    pub interruption: InterruptionInfo,
    /// IDT-vectoring information (§25.9.3).
    pub idt_vectoring: InterruptionInfo,
    /// VM-exit instruction length in bytes.
    pub instruction_length: u8,
    /// Time in the guest before it.
    pub guest_ns: u64,
    /// L0's time for it, to the next entry or until L0 began to wait.
    pub l0_ns: u64,
    /// The forwarded exit of L2 that L1 was working on when it exited; a [`Recorder`] says.
    pub cause: Option<u64>,
    /// VMREADs and VMWRITEs without exits since the exit before, where the engine counts them; a
    /// [`Recorder`] says.
    pub accesses: VmcsAccesses,
}

impl Exit {
    /// An exit of `level` for `reason`, with nothing else known of it.
    pub const fn new(level: Level, reason: ExitReason) -> Self {
        Self {
            number: 0,
            time_ns: 0,
            level,
            reason,
            forwarded: None,
            synthesized: false,
            entry_failure: false,
            failed: None,
            qualification: 0,
            rip: 0,
            guest_physical: 0,
            guest_linear: 0,
            interruption: InterruptionInfo::NONE,
            idt_vectoring: InterruptionInfo::NONE,
            instruction_length: 0,
            guest_ns: 0,
            l0_ns: 0,
            cause: None,
            accesses: VmcsAccesses { vmreads: 0, vmwrites: 0 },
        }
    }

    /// Whether L1 puts L2 away with it: L2 won't go on from where it exited.
    pub(crate) fn ends_work_on_l2(&self) -> bool {
        self.level == Level::L1 && matches!(self.reason, ExitReason::Vmclear | ExitReason::Vmxoff)
    }
}

impl fmt::Display for Exit {
    /// One line, as crash reports have it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let owner = match self.forwarded {
            None => "L0".to_owned(),
            Some(r) if r == self.reason => "L1".to_owned(),
            Some(r) => format!("L1 as {}", r.name()),
        };
        write!(
            f,
            "{:>10} {} {:<18} to {owner:<4} rip {:#x} qualification {:#x} length {} gpa {:#x}",
            self.number,
            self.level,
            self.reason.name(),
            self.rip,
            self.qualification,
            self.instruction_length,
            self.guest_physical
        )?;
        if self.entry_failure {
            write!(f, " VM entry failed")?;
        }
        if let Some(failed) = self.failed {
            write!(f, " {failed}")?;
        }
        if let Some(cause) = self.cause {
            write!(f, " because of {cause}")?;
        }
        if self.idt_vectoring.is_valid() {
            write!(f, " while delivering vector {}", self.idt_vectoring.vector())?;
        }
        Ok(())
    }
}

/// What a trace has records of. Times are in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An exit.
    Exit(Exit),
    /// Waiting for an interrupt after HLT.
    Idle {
        /// When it began, from the start of the machine.
        time_ns: u64,
        /// How long it took.
        ns: u64,
    },
}

/// What one vCPU's exits go to.
#[derive(Debug, Default)]
pub struct Recorder {
    statistics: Statistics,
    last: VecDeque<Exit>,
    exits: u64,
    /// The exit of L2 that L1 works on.
    cause: Option<u64>,
    /// The engine's count of instructions at the last exit.
    counted: u64,
    instructions: Instructions,
    /// VMREADs and VMWRITEs without exits, where the engine counts them.
    vmcs_accesses: Option<VmcsAccesses>,
    /// Those of them that no exit has got yet.
    new_accesses: VmcsAccesses,
    /// What one part of the engine left to the other, where it has two.
    pub hand_overs: Option<HandOvers>,
    /// The file that gets a record of each exit.
    pub trace: Option<TraceWriter>,
}

impl Recorder {
    /// One whose records go to a file too.
    pub fn with_trace(trace: TraceWriter) -> Self {
        Self { trace: Some(trace), ..Self::default() }
    }

    /// Takes an exit; its number and cause are filled in here. `instructions`: what the engine has
    /// counted so far, 0 if it does not count.
    pub fn exit(&mut self, mut exit: Exit, instructions: u64) {
        self.number(&mut exit);
        self.statistics.exit(&exit);
        if let Some(t) = &mut self.trace {
            t.push(&Event::Exit(exit), self.exits + 1);
        }
        let executed = instructions.wrapping_sub(self.counted);
        self.counted = instructions;
        match exit.level {
            Level::L1 => self.instructions.l1 += executed,
            Level::L2 => self.instructions.l2 += executed,
        }
        if self.last.len() == LAST {
            self.last.pop_front();
        }
        self.last.push_back(exit);
    }

    /// What the engine has counted of VMREADs and VMWRITEs without exits, up to the exit that comes next here.
    pub fn count_accesses(&mut self, total: Option<VmcsAccesses>) {
        let (now, before) = (total.unwrap_or_default(), self.vmcs_accesses.unwrap_or_default());
        self.new_accesses.vmreads += now.vmreads.saturating_sub(before.vmreads);
        self.new_accesses.vmwrites += now.vmwrites.saturating_sub(before.vmwrites);
        self.vmcs_accesses = total;
    }

    fn number(&mut self, exit: &mut Exit) {
        self.exits += 1;
        exit.accesses = std::mem::take(&mut self.new_accesses);
        exit.number = self.exits;
        exit.cause = match exit.level {
            Level::L1 => self.cause,
            Level::L2 => None,
        };
        if exit.level == Level::L2 {
            self.cause = exit.forwarded.map(|_| exit.number);
        } else if exit.ends_work_on_l2() {
            self.cause = None;
        }
    }

    /// Notes that the vCPU waited for an interrupt after HLT, `ns` from `time_ns` on.
    pub fn idle(&mut self, time_ns: u64, ns: u64) {
        let event = Event::Idle { time_ns, ns };
        self.statistics.event(&event);
        if let Some(t) = &mut self.trace {
            t.push(&event, self.exits + 1);
        }
    }

    /// Writes what the trace's file does not have yet.
    pub fn flush_trace(&mut self) {
        if let Some(t) = &mut self.trace {
            t.flush();
        }
    }

    /// The last exits, oldest first; `unfinished` is one that is being handled.
    pub fn last_exits(&self, unfinished: Option<Exit>) -> Vec<Exit> {
        let mut exits: Vec<Exit> = self.last.iter().copied().collect();
        if let Some(mut exit) = unfinished {
            exit.number = self.exits + 1;
            exit.cause = self.cause.filter(|_| exit.level == Level::L1);
            exits.push(exit);
        }
        exits
    }

    /// The statistics so far, of vCPU `cpu`.
    pub fn summary(&self, cpu: usize) -> VcpuSummary {
        let mut s = self.statistics.summary(cpu);
        s.instructions = (self.counted > 0).then_some(self.instructions);
        s.vmcs_accesses = self.vmcs_accesses;
        s.hand_overs = self.hand_overs;
        s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn l1(reason: ExitReason) -> Exit {
        Exit::new(Level::L1, reason)
    }

    fn l2(reason: ExitReason, forwarded: bool) -> Exit {
        Exit { forwarded: forwarded.then_some(reason), ..Exit::new(Level::L2, reason) }
    }

    #[test]
    fn exits_of_l1_have_the_forwarded_exit_of_l2_as_their_cause() {
        let mut r = Recorder::default();
        for exit in [
            l1(ExitReason::Vmlaunch),
            l2(ExitReason::Cpuid, true),
            l1(ExitReason::Vmread),
            l1(ExitReason::Vmresume),
            l2(ExitReason::EptViolation, false),
            l2(ExitReason::Vmcall, true),
            l1(ExitReason::Vmresume),
            l1(ExitReason::Vmclear),
            l1(ExitReason::IoInstruction),
        ] {
            r.exit(exit, 0);
        }
        let causes: Vec<_> = r.last_exits(None).iter().map(|e| (e.number, e.cause)).collect();
        let expected = [None, None, Some(2), Some(2), None, None, Some(6), Some(6), None];
        assert_eq!(causes, (1..).zip(expected).collect::<Vec<_>>());
        r.exit(l2(ExitReason::Hlt, true), 0);
        let last = r.last_exits(Some(l1(ExitReason::Cpuid)));
        assert_eq!(last.last().map(|e| (e.number, e.cause)), Some((11, Some(10))));
    }

    #[test]
    fn failed_instructions_are_marked_and_counted() {
        // SDM Vol. 3D table 31-1: number 7.
        let seven = VmFail::Valid(InstructionError::EntryInvalidControls);
        let mut r = Recorder::default();
        for failed in [Some(seven), Some(VmFail::Invalid), None, Some(seven)] {
            r.exit(Exit { failed, ..l1(ExitReason::Vmlaunch) }, 0);
        }
        let lines: Vec<_> = r.last_exits(None).iter().map(ToString::to_string).collect();
        assert!(lines[0].ends_with(" VMfailValid 7: VM entry with invalid control field(s)"), "{}", lines[0]);
        assert!(lines[1].ends_with(" VMfailInvalid") && !lines[2].contains("VMfail"));
        let text = r.summary(0).to_string();
        for line in [
            "\n2 VMLAUNCH failed: VMfailValid 7: VM entry with invalid control field(s)\n",
            "\n1 VMLAUNCH failed: VMfailInvalid\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        let failed = r.summary(0).failed;
        assert_eq!(failed.iter().map(|f| (f.error, f.count)).collect::<Vec<_>>(), [(None, 1), (Some(7), 2)]);
    }

    #[test]
    fn the_last_exits_are_kept() {
        let mut r = Recorder::default();
        for rip in 0..100 {
            r.exit(Exit { rip, ..l1(ExitReason::IoInstruction) }, 0);
        }
        let last = r.last_exits(None);
        assert_eq!((last.len(), last[0].rip, last[LAST - 1].rip, last[LAST - 1].number), (LAST, 68, 99, 100));
    }

    #[test]
    fn accesses_to_the_vmcs_belong_to_the_exit_after_them() {
        let mut r = Recorder::default();
        for (vmreads, vmwrites) in [(3, 1), (3, 1), (10, 2)] {
            r.count_accesses(Some(VmcsAccesses { vmreads, vmwrites }));
            r.exit(l1(ExitReason::Vmresume), 0);
        }
        let each: Vec<_> =
            r.last_exits(None).iter().map(|e| (e.accesses.vmreads, e.accesses.vmwrites)).collect();
        assert_eq!(each, [(3, 1), (0, 0), (7, 1)]);
        assert_eq!(r.summary(0).vmcs_accesses, Some(VmcsAccesses { vmreads: 10, vmwrites: 2 }));
    }

    #[test]
    fn instructions_are_the_level_s_that_executed_them() {
        let mut r = Recorder::default();
        for (exit, total) in
            [(l1(ExitReason::Vmlaunch), 100), (l2(ExitReason::Cpuid, true), 107), (l1(ExitReason::Hlt), 120)]
        {
            r.exit(exit, total);
        }
        assert_eq!(r.summary(0).instructions, Some(Instructions { l1: 113, l2: 7 }));
    }
}
