//! What one exit of L2 takes until L2 runs again.

use x86_spec::exit::ExitReason;

use crate::record::{Event, Exit, Level};
use crate::summary::VmcsAccesses;

/// An exit of L2 with all that it caused. Times are in nanoseconds, without waiting for interrupts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The exit of L2.
    pub exit: Exit,
    /// The exits of L1 because of it, in order.
    pub caused: Vec<ExitReason>,
    /// L1's VMREADs and VMWRITEs that did not exit.
    pub untrapped: VmcsAccesses,
    /// L0's time.
    pub l0_ns: u64,
    /// L1's time.
    pub l1_ns: u64,
    /// L2's time before the exit.
    pub l2_ns: u64,
}

impl Chain {
    fn new(exit: Exit) -> Self {
        Self {
            exit,
            caused: Vec::new(),
            untrapped: VmcsAccesses::default(),
            l0_ns: exit.l0_ns,
            l1_ns: 0,
            l2_ns: exit.guest_ns,
        }
    }

    /// How often L0 was entered: the exit itself, unless L0 made it, and those of L1.
    pub fn l0_entries(&self) -> u64 {
        u64::from(!self.exit.synthesized) + self.caused.len() as u64
    }

    /// How many exits of L1 for `reason` it caused.
    pub fn caused_exits(&self, reason: ExitReason) -> u64 {
        self.caused.iter().filter(|r| **r == reason).count() as u64
    }

    /// L1's VMREADs and VMWRITEs that exited.
    pub fn trapped(&self) -> VmcsAccesses {
        let [vmreads, vmwrites] = [ExitReason::Vmread, ExitReason::Vmwrite].map(|r| self.caused_exits(r));
        VmcsAccesses { vmreads, vmwrites }
    }

    /// Adds an exit of L1.
    fn add(&mut self, exit: &Exit) {
        self.caused.push(exit.reason);
        self.untrapped.vmreads += exit.accesses.vmreads;
        self.untrapped.vmwrites += exit.accesses.vmwrites;
        self.l0_ns = self.l0_ns.saturating_add(exit.l0_ns);
        self.l1_ns = self.l1_ns.saturating_add(exit.guest_ns);
    }
}

/// Makes chains of the exits of one vCPU.
#[derive(Debug, Default)]
pub struct Chains {
    open: Option<Chain>,
}

impl Chains {
    /// Takes an exit or a time of waiting; gives the chain that it ends, which the next exit of L2 does. An exit of L2
    /// after which L1 puts L2 away has none.
    pub fn event(&mut self, event: &Event) -> Option<Chain> {
        let Event::Exit(exit) = event else { return None };
        if exit.level == Level::L2 {
            return self.open.replace(Chain::new(*exit));
        }
        match &mut self.open {
            Some(chain) if exit.cause == Some(chain.exit.number) && !exit.ends_work_on_l2() => {
                chain.add(exit)
            }
            _ => self.open = None,
        }
        None
    }

    /// What began has no end: exits are missing here, or what comes is of no interest.
    pub fn gap(&mut self) {
        self.open = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn l1(reason: ExitReason, cause: u64, vmreads: u64) -> Event {
        Event::Exit(Exit {
            cause: Some(cause),
            accesses: VmcsAccesses { vmreads, vmwrites: 1 },
            guest_ns: 10,
            l0_ns: 3,
            ..Exit::new(Level::L1, reason)
        })
    }

    fn l2(number: u64) -> Event {
        let reason = ExitReason::Cpuid;
        let exit = Exit::new(Level::L2, reason);
        Event::Exit(Exit { number, forwarded: Some(reason), guest_ns: 100, l0_ns: 7, ..exit })
    }

    fn chains(events: &[Event]) -> Vec<Chain> {
        let mut chains = Chains::default();
        events.iter().filter_map(|e| chains.event(e)).collect()
    }

    #[test]
    fn a_chain_has_the_exit_of_l2_and_those_of_l1_that_it_caused() {
        let wait = Event::Idle { time_ns: 0, ns: 1_000_000 };
        let all = chains(&[
            l1(ExitReason::Vmlaunch, 9, 5),
            l2(1),
            l1(ExitReason::Vmread, 1, 2),
            wait,
            l1(ExitReason::Vmwrite, 1, 0),
            l1(ExitReason::Vmresume, 1, 4),
            l2(5),
        ]);
        let [chain] = &all[..] else { panic!("{all:?}") };
        assert_eq!((chain.exit.number, chain.l0_entries()), (1, 4));
        assert_eq!(chain.untrapped, VmcsAccesses { vmreads: 6, vmwrites: 3 });
        assert_eq!(chain.caused, [ExitReason::Vmread, ExitReason::Vmwrite, ExitReason::Vmresume]);
        assert_eq!(chain.trapped(), VmcsAccesses { vmreads: 1, vmwrites: 1 });
        assert_eq!((chain.l0_ns, chain.l1_ns, chain.l2_ns), (7 + 9, 30, 100));
    }

    #[test]
    fn an_l2_that_is_put_away_or_out_of_sight_ends_no_chain() {
        assert_eq!(chains(&[l2(1), l1(ExitReason::Vmclear, 1, 0), l2(3)]), []);
        let mut chains = Chains::default();
        assert_eq!(chains.event(&l2(1)), None);
        chains.gap();
        assert_eq!(chains.event(&l2(2)), None);
        assert_eq!(chains.event(&l2(3)).map(|c| c.exit.number), Some(2));
    }

    #[test]
    fn an_exit_that_l0_made_is_no_entry_of_l0() {
        let Event::Exit(made) = l2(1) else { unreachable!() };
        let made = Event::Exit(Exit { synthesized: true, ..made });
        let all = chains(&[made, l1(ExitReason::Vmresume, 1, 0), l2(3)]);
        assert_eq!(all[0].l0_entries(), 1);
    }
}
