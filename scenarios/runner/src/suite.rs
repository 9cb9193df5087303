//! Many scenarios: which of them, in which share, how many at a time.

use std::collections::VecDeque;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;

use crate::run::{self, Program, Report, Stopper, Verdict};
use crate::scenario::Scenario;

/// One of several equal parts of a list, for a matrix of CI jobs: `2/3`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which, from 1.
    index: usize,
    /// Of how many.
    of: usize,
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: give INDEX/COUNT, from 1/3 to 3/3 for three parts");
        let (index, of) = text.split_once('/').ok_or_else(wrong)?;
        match (index.parse(), of.parse()) {
            (Ok(index), Ok(of)) if (1..=of).contains(&index) => Ok(Self { index, of }),
            _ => Err(wrong()),
        }
    }
}

/// Which scenarios run.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Only those with one of these tags; empty for all.
    pub tags: Vec<String>,
    /// Not those with one of these tags or names.
    pub skip: Vec<String>,
    /// Of those that are left, one part.
    pub shard: Option<Shard>,
}

impl Selection {
    /// The chosen ones, in the same order. Each shard takes every n-th, so that neighbours, which take
    /// a similar time, are spread.
    pub fn choose(&self, all: Vec<Scenario>) -> Vec<Scenario> {
        let has = |s: &Scenario, tag: &String| s.tags.contains(tag);
        let named = |s: &Scenario, name: &String| s.name == *name || s.name.split('[').next() == Some(name);
        let chosen = all
            .into_iter()
            .filter(|s| self.tags.is_empty() || self.tags.iter().any(|t| has(s, t)))
            .filter(|s| !self.skip.iter().any(|t| has(s, t) || named(s, t)));
        match self.shard {
            None => chosen.collect(),
            Some(Shard { index, of }) => chosen.skip(index - 1).step_by(of).collect(),
        }
    }
}

/// What happens while scenarios run, as it happens.
#[derive(Debug)]
pub enum Event<'a> {
    /// One starts.
    Started(&'a str),
    /// One ended.
    Ended(&'a Report),
}

/// Runs all, at most `jobs` at a time; `watch` is told of each start and end. Reports are in the order of
/// the scenarios, those that never started included.
pub fn run(
    scenarios: &[Scenario],
    program: &Program,
    jobs: usize,
    stopper: &Stopper,
    mut watch: impl FnMut(Event<'_>),
) -> Vec<Report> {
    enum Message<'a> {
        Started(&'a str),
        Ended(usize, Box<Report>),
    }
    let waiting = Mutex::new(scenarios.iter().enumerate().collect::<VecDeque<_>>());
    let (sender, receiver) = mpsc::channel();
    let mut reports: Vec<Option<Report>> = scenarios.iter().map(|_| None).collect();
    thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, scenarios.len().max(1)) {
            let (sender, waiting) = (sender.clone(), &waiting);
            scope.spawn(move || {
                loop {
                    let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some((i, scenario)) = next else { return };
                    if !stopper.is_stopped() {
                        // The receiver is there until all senders are gone.
                        let _ = sender.send(Message::Started(&scenario.name));
                    }
                    let report = run::run(scenario, program, stopper);
                    let _ = sender.send(Message::Ended(i, Box::new(report)));
                }
            });
        }
        drop(sender);
        for message in receiver {
            match message {
                Message::Started(name) => watch(Event::Started(name)),
                Message::Ended(i, report) => {
                    watch(Event::Ended(&report));
                    if let Some(slot) = reports.get_mut(i) {
                        *slot = Some(*report);
                    }
                }
            }
        }
    });
    reports.into_iter().flatten().collect()
}

/// Whether all of them passed.
pub fn all_passed(reports: &[Report]) -> bool {
    reports.iter().all(|r| r.verdict == Verdict::Passed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::{Offer, parse};
    use crate::source::Origin;

    fn scenarios() -> Vec<Scenario> {
        let offer = Offer { options: vec![], guests: vec!["g".into()] };
        let text = "description = \"x\"\nguest = \"g\"\ntags = [\"even{{n}}\", \"all\"]\n\
                    [matrix]\nn = [0, 1, 0, 1, 0]\n";
        parse(text, &Origin::Shipped("x.toml".into()), &offer).unwrap()
    }

    fn indices(selection: &Selection) -> Vec<usize> {
        let all: Vec<Scenario> = scenarios()
            .into_iter()
            .enumerate()
            .map(|(i, s)| Scenario { description: i.to_string(), ..s })
            .collect();
        selection.choose(all).iter().map(|s| s.description.parse().unwrap()).collect()
    }

    #[test]
    fn tags_choose_and_skip() {
        let list = |t: &[&str]| t.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
        let with =
            |tags: &[&str], skip: &[&str]| Selection { tags: list(tags), skip: list(skip), shard: None };
        assert_eq!(indices(&with(&[], &[])), [0, 1, 2, 3, 4]);
        assert_eq!(indices(&with(&["even1"], &[])), [1, 3]);
        assert_eq!(indices(&with(&["all"], &["even1"])), [0, 2, 4]);
        assert_eq!(indices(&with(&[], &["x[n=0]"])), [1, 3]);
        assert!(indices(&with(&[], &["x"])).is_empty());
    }

    #[test]
    fn shards_are_disjoint_and_complete() {
        let shard = |t: &str| indices(&Selection { shard: Some(t.parse().unwrap()), ..Selection::default() });
        assert_eq!((shard("1/2"), shard("2/2")), (vec![0, 2, 4], vec![1, 3]));
        let mut all: Vec<usize> = (1..=7).flat_map(|i| shard(&format!("{i}/7"))).collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3, 4]);
        for bad in ["", "1", "0/2", "3/2", "1/0", "a/b", "-1/2"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
    }

    #[test]
    fn reports_come_in_order() {
        let program = Program { path: "/bin/false".into(), guests: [("g".to_owned(), vec![])].into() };
        let mut seen = 0;
        let reports = run(&scenarios(), &program, 3, &Stopper::default(), |e| {
            seen += usize::from(matches!(e, Event::Ended(_)));
        });
        let names: Vec<String> = reports.iter().map(|r| r.name.clone()).collect();
        assert_eq!(names, scenarios().into_iter().map(|s| s.name).collect::<Vec<_>>());
        assert_eq!(seen, 5);
        assert!(
            reports.iter().all(|r| matches!(&r.verdict, Verdict::Failed(w) if w.contains("exit status: 1")))
        );
        assert!(!all_passed(&reports));
    }

    #[test]
    fn a_stopper_stops_all() {
        let stopper = Stopper::default();
        stopper.stop();
        let program = Program { path: "/bin/false".into(), guests: [("g".to_owned(), vec![])].into() };
        let started = |e: Event<'_>| assert!(!matches!(e, Event::Started(_)), "{e:?}");
        let reports = run(&scenarios(), &program, 2, &stopper, started);
        assert!(reports.iter().all(|r| r.verdict == Verdict::Stopped));
        assert_eq!(reports.len(), 5);
    }
}
