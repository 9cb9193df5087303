//! What the guests print of their benchmarks.

/// Median and percentiles of a benchmark's rounds, as the guest timed them, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Timed {
    /// Median.
    pub median: u64,
    /// 90th percentile.
    pub p90: u64,
    /// 99th percentile.
    pub p99: u64,
}

/// What a guest says of one benchmark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// Its name.
    pub name: String,
    /// Its outcome.
    pub outcome: Outcome,
}

/// What came of a benchmark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It ran.
    Measured {
        /// Rounds, or pages.
        rounds: u64,
        /// The guest's own times, where it takes one of each round and knows its TSC's frequency.
        timed: Option<Timed>,
    },
    /// It can't be measured here; why.
    Skipped(String),
}

impl Said {
    /// The number of rounds, if it was measured.
    pub fn measured(&self) -> Option<u64> {
        match self.outcome {
            Outcome::Measured { rounds, .. } => Some(rounds),
            Outcome::Skipped(_) => None,
        }
    }
}

/// Reads a guest's output. Lines of interest are `bench NAME ROUNDS ...`, then perhaps
/// `percentiles NAME MEDIAN P90 P99 ns`, or `skip NAME (why)`.
pub fn read(output: &str) -> Vec<Said> {
    let mut all: Vec<Said> = Vec::new();
    for line in output.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["bench", name, rounds, ..] => {
                let Ok(rounds) = rounds.parse() else { continue };
                let outcome = Outcome::Measured { rounds, timed: None };
                all.push(Said { name: name.into(), outcome });
            }
            ["percentiles", name, median, p90, p99, "ns"] => {
                let numbers = [median, p90, p99].map(str::parse::<u64>);
                if let [Ok(median), Ok(p90), Ok(p99)] = numbers
                    && let Some(Said { name: last, outcome: Outcome::Measured { timed, .. } }) = all.last_mut()
                    && last == name
                    // Zero: it does not know its TSC's frequency.
                    && median > 0
                {
                    *timed = Some(Timed { median, p90, p99 });
                }
            }
            ["skip", name, ..] => {
                let why = line.split_once('(').map_or("", |(_, why)| why.trim_end().trim_end_matches(')'));
                all.push(Said { name: name.into(), outcome: Outcome::Skipped(why.into()) });
            }
            _ => {}
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_guests_are_read() {
        let output = "benchmark            rounds  min cycles  median  p99   median ns\r\n\
            bench cpuid_bare           20       1956     2230     4316    1115 ns\r\n\
            percentiles cpuid_bare       1115    1600    2158 ns\r\n\
            skip mov_dr (control not offered)\r\n\
            bench ept_fill_4k         4096       1060 cycles a page, 1886792 pages a second\r\n";
        let timed = Some(Timed { median: 1115, p90: 1600, p99: 2158 });
        let expected = [
            ("cpuid_bare", Outcome::Measured { rounds: 20, timed }),
            ("mov_dr", Outcome::Skipped("control not offered".into())),
            ("ept_fill_4k", Outcome::Measured { rounds: 4096, timed: None }),
        ];
        let expected = expected.map(|(name, outcome)| Said { name: name.into(), outcome });
        assert_eq!(read(output), expected);
    }
}
