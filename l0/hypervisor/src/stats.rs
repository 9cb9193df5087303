//! What a vCPU's thread notes of the exit that it is dealing with, until it becomes a record.
//!
//! An exit is recorded when L0 is done with it: then its owner and L0's time are known, and one lock and
//! two reads of the TSC are all that an exit costs.

use engine::VmExit;
use exit_trace::{Exit, Level, VmFail};
use x86_spec::exit::ExitReason;

/// The clock and the exit that is being handled.
#[derive(Debug)]
pub(crate) struct Account {
    start: u64,
    /// Nanoseconds for a TSC tick, with 32 bits after the point.
    ns_per_tick: u64,
    /// End of what is accounted, in nanoseconds from the start.
    since_ns: u64,
    current: Option<Exit>,
}

impl Account {
    /// At TSC `start`, which ticks `hz` times a second.
    pub fn new(start: u64, hz: u64) -> Self {
        Self { start, ns_per_tick: (1_000_000_000 << 32) / hz.max(1), since_ns: 0, current: None }
    }

    /// End of what is accounted, in nanoseconds from the start.
    pub fn since_ns(&self) -> u64 {
        self.since_ns
    }

    /// Nanoseconds since the last call.
    pub fn lap(&mut self, tsc: u64) -> u64 {
        let ticks = tsc.wrapping_sub(self.start);
        let now = ((u128::from(ticks) * u128::from(self.ns_per_tick)) >> 32) as u64;
        let ns = now.saturating_sub(self.since_ns);
        self.since_ns = now;
        ns
    }

    /// The engine exited at TSC `tsc`.
    pub fn exited(&mut self, level: Level, exit: &VmExit, rip: u64, tsc: u64) {
        let guest_ns = self.lap(tsc);
        self.current = Some(Exit { time_ns: self.since_ns, guest_ns, ..record(level, exit, rip) });
    }

    /// L0 made an exit to L1 without one of the engine.
    pub fn synthesized(&mut self, exit: &VmExit, rip: u64, tsc: u64) {
        self.lap(tsc);
        self.current = Some(Exit {
            time_ns: self.since_ns,
            forwarded: Some(exit.reason),
            synthesized: true,
            ..record(Level::L2, exit, rip)
        });
    }

    /// The exit that is being handled goes to L1 as `exit`.
    pub fn forwarded(&mut self, exit: &VmExit) {
        if let Some(c) = &mut self.current {
            c.forwarded = Some(exit.reason);
        }
    }

    /// The VMX instruction of L1 that is being handled fails.
    pub fn failed(&mut self, how: VmFail) {
        if let Some(c) = self.current.as_mut().filter(|c| c.level == Level::L1) {
            c.failed = Some(how);
        }
    }

    /// Whether an exit to L1 is another one than that which is being handled, as that was L1's, or
    /// L0 is done with it.
    pub fn is_of_its_own(&self) -> bool {
        self.current.is_none_or(|c| c.level == Level::L1 || c.forwarded.is_some())
    }

    /// Whether the exit that is being handled tells L0 no more than to look for events. It then
    /// becomes what L0 finds.
    pub fn looks_for_events(&self) -> bool {
        self.current.is_some_and(|c| {
            c.level == Level::L2
                && matches!(
                    c.reason,
                    ExitReason::ExternalInterrupt
                        | ExitReason::PreemptionTimer
                        | ExitReason::InterruptWindow
                        | ExitReason::NmiWindow
                )
        })
    }

    /// L0 is done with the exit: the record.
    pub fn handled(&mut self, tsc: u64) -> Option<Exit> {
        let l0_ns = self.lap(tsc);
        let exit = self.current.take()?;
        Some(Exit { l0_ns, ..exit })
    }

    /// The exit that is being handled.
    pub fn unfinished(&self) -> Option<Exit> {
        self.current
    }
}

fn record(level: Level, exit: &VmExit, rip: u64) -> Exit {
    Exit {
        entry_failure: exit.entry_failure,
        qualification: exit.qualification,
        rip,
        guest_physical: exit.guest_physical.0,
        guest_linear: exit.guest_linear,
        interruption: exit.interruption_info,
        idt_vectoring: exit.idt_vectoring,
        instruction_length: exit.instruction_length as u8,
        ..Exit::new(level, exit.reason)
    }
}
