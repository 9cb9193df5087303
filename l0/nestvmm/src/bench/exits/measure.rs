//! From an exit trace to the exits of each benchmark.

use std::io::{Read, Seek};

use exit_trace::{Chain, Chains, Event, Exit, Level, Trace, TraceError};
use microvisor::{BEGIN_PORT, END_PORT};
use x86_spec::exit::ExitReason;

/// A guest's mark in its trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    Begin,
    End,
}

/// The mark that `exit` is. `level` is that of the guest that makes marks. The port is in bits 31:16 of the qualification
/// (SDM Vol. 3C table 28-5).
fn mark(exit: &Exit, level: Level) -> Option<Mark> {
    if exit.level != level || exit.reason != ExitReason::IoInstruction {
        return None;
    }
    match (exit.qualification >> 16) as u16 {
        BEGIN_PORT => Some(Mark::Begin),
        END_PORT => Some(Mark::End),
        _ => None,
    }
}

/// Collects what is between marks.
#[derive(Debug, Default)]
struct Sections {
    chains: Chains,
    open: Option<Vec<Chain>>,
    done: Vec<Vec<Chain>>,
}

impl Sections {
    fn event(&mut self, event: &Event, level: Level) {
        let chain = self.chains.event(event);
        if let (Some(open), Some(chain)) = (&mut self.open, chain) {
            open.push(chain);
        }
        let Event::Exit(exit) = event else { return };
        match mark(exit, level) {
            // What comes because of the mark itself is of no interest.
            Some(Mark::Begin) => self.open = Some(Vec::new()),
            Some(Mark::End) => self.done.extend(self.open.take()),
            None => return,
        }
        self.chains.gap();
    }

    /// Records are missing: what is open is not whole.
    fn gap(&mut self) {
        self.chains.gap();
        self.open = None;
    }
}

/// The exits of L2 in each benchmark of a trace, in order; `level` is that of the guest that makes marks.
///
/// # Errors
/// [`TraceError`] when the trace can't be read.
pub fn sections<R: Read + Seek>(trace: &mut Trace<R>, level: Level) -> Result<Vec<Vec<Chain>>, TraceError> {
    let mut sections = Sections::default();
    trace.for_each(0, |event| {
        match event {
            Some(event) => sections.event(&event, level),
            None => sections.gap(),
        }
        true
    })?;
    Ok(sections.done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(level: Level, reason: ExitReason, number: u64, cause: Option<u64>) -> Event {
        let forwarded = (level == Level::L2).then_some(reason);
        Event::Exit(Exit { number, cause, forwarded, ..Exit::new(level, reason) })
    }

    fn port(level: Level, port: u16, number: u64) -> Event {
        let Event::Exit(e) = exit(level, ExitReason::IoInstruction, number, Some(1)) else { unreachable!() };
        // OUT DX, AL.
        Event::Exit(Exit { qualification: u64::from(port) << 16, ..e })
    }

    fn numbers(events: &[Event], level: Level) -> Vec<Vec<u64>> {
        let mut s = Sections::default();
        events.iter().for_each(|e| s.event(e, level));
        s.done.iter().map(|c| c.iter().map(|c| c.exit.number).collect()).collect()
    }

    #[test]
    fn marks_of_l1_are_around_exits_of_l2() {
        use {ExitReason::Cpuid, ExitReason::Vmresume, Level::*};
        let events = [
            exit(L2, Cpuid, 1, None),
            port(L1, BEGIN_PORT, 2),
            exit(L1, Vmresume, 3, Some(1)),
            exit(L2, Cpuid, 4, None),
            exit(L1, Vmresume, 5, Some(4)),
            exit(L2, Cpuid, 6, None),
            exit(L1, Vmresume, 7, Some(6)),
            exit(L2, Cpuid, 8, None),
            port(L1, END_PORT, 9),
            exit(L1, Vmresume, 10, Some(8)),
            exit(L2, Cpuid, 11, None),
        ];
        assert_eq!(numbers(&events, L1), [[4, 6]]);
        // Another guest's writes to these ports are no marks.
        assert_eq!(numbers(&events, L2), [[0; 0]; 0]);
    }

    #[test]
    fn marks_of_l2_are_no_exits_of_its_benchmark() {
        use {ExitReason::Cpuid, ExitReason::Vmresume, Level::*};
        let events = [
            port(L2, BEGIN_PORT, 1),
            exit(L1, Vmresume, 2, Some(1)),
            exit(L2, Cpuid, 3, None),
            exit(L1, Vmresume, 4, Some(3)),
            port(L2, END_PORT, 5),
            exit(L1, Vmresume, 6, Some(5)),
            // One that ends without an end.
            port(L2, BEGIN_PORT, 7),
            exit(L2, Cpuid, 8, None),
            port(L2, BEGIN_PORT, 9),
            port(L2, END_PORT, 10),
        ];
        assert_eq!(numbers(&events, L2), [vec![3], vec![]]);
    }
}
