//! Comparisons of exit counts: `L2.CPUID.forwarded == 1000`, `L1.exits for L2.CPUID <= 30 * L2.CPUID.forwarded`.
//!
//! ```text
//! check   = sum ("==" | "!=" | "<=" | ">=" | "<" | ">") sum
//! sum     = product (("+" | "-") product)*
//! product = factor (("*" | "/") factor)*
//! factor  = number | "(" sum ")" | counter
//! counter = LEVEL "." what | "L2." REASON "." ("kept" | "forwarded" | "synthesized" | "returned")
//!         | "L1." REASON-or-exits " for L2." REASON
//! ```
//!
//! All arithmetic is in floating point: counts are far below 2⁵³.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use x86_spec::exit::ExitReason;

/// How deep parentheses may be nested.
const MAX_DEPTH: usize = 16;
/// Longest text of a check, in bytes.
const MAX_LENGTH: usize = 1000;

/// What is counted of a level's exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// All exits.
    Exits,
    /// Exits for one reason.
    Reason(ExitReason),
}

/// Which of L2's exits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// All.
    Any,
    /// Those that L0 handled alone.
    Kept,
    /// Those that L1 got.
    Forwarded,
    /// Those that L1 got without an exit of the engine.
    Synthesized,
    /// Those after which L1 entered L2 again.
    Returned,
}

/// Whose time or instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Share {
    /// L0's.
    L0,
    /// L1's.
    L1,
    /// L2's.
    L2,
    /// Nobody's: waiting after HLT.
    Idle,
}

/// A figure of a run's statistics.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Counter {
    /// Exits of both levels.
    Exits,
    /// Exits of L1.
    L1(Kind),
    /// Exits of L2.
    L2(Kind, Owner),
    /// Exits of L1 that exits of L2 for a reason caused, before L2 was entered again.
    Caused(Kind, ExitReason),
    /// Guest instructions of L1 or L2.
    Instructions(Share),
    /// Time in milliseconds.
    Milliseconds(Share),
    /// L1's VMREADs without an exit.
    Vmreads,
    /// L1's VMWRITEs without an exit.
    Vmwrites,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exits => "exits",
            Self::Reason(r) => r.name(),
        })
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::L0 => "L0",
            Self::L1 => "L1",
            Self::L2 => "L2",
            Self::Idle => "idle",
        })
    }
}

impl fmt::Display for Counter {
    /// As it is written in a check.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exits => f.write_str("exits"),
            Self::L1(kind) => write!(f, "L1.{kind}"),
            Self::L2(kind, Owner::Any) => write!(f, "L2.{kind}"),
            Self::L2(kind, Owner::Kept) => write!(f, "L2.{kind}.kept"),
            Self::L2(kind, Owner::Forwarded) => write!(f, "L2.{kind}.forwarded"),
            Self::L2(kind, Owner::Synthesized) => write!(f, "L2.{kind}.synthesized"),
            Self::L2(kind, Owner::Returned) => write!(f, "L2.{kind}.returned"),
            Self::Caused(kind, reason) => write!(f, "L1.{kind} for L2.{}", reason.name()),
            Self::Instructions(s) => write!(f, "{s}.instructions"),
            Self::Milliseconds(s) => write!(f, "{s}.ms"),
            Self::Vmreads => f.write_str("L1.vmreads"),
            Self::Vmwrites => f.write_str("L1.vmwrites"),
        }
    }
}

/// What a check's counters are read from.
pub trait Figures {
    /// The value of a counter; `None` if the run does not count it.
    fn figure(&self, counter: Counter) -> Option<f64>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
}

#[derive(Clone, Debug, PartialEq)]
enum Expression {
    Number(f64),
    Counter(Counter),
    Operation(Operator, Box<(Expression, Expression)>),
}

/// How two sides are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Comparison {
    Equal,
    NotEqual,
    AtMost,
    AtLeast,
    Less,
    More,
}

impl Comparison {
    const ALL: [(&'static str, Self); 6] = [
        ("==", Self::Equal),
        ("!=", Self::NotEqual),
        ("<=", Self::AtMost),
        (">=", Self::AtLeast),
        ("<", Self::Less),
        (">", Self::More),
    ];

    fn holds(self, a: f64, b: f64) -> bool {
        match self {
            Self::Equal => a == b,
            Self::NotEqual => a != b,
            Self::AtMost => a <= b,
            Self::AtLeast => a >= b,
            Self::Less => a < b,
            Self::More => a > b,
        }
    }
}

/// A comparison of counts.
#[derive(Clone, Debug, PartialEq)]
pub struct CountCheck {
    text: String,
    left: Expression,
    comparison: Comparison,
    right: Expression,
}

impl fmt::Display for CountCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What came of a check.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    /// Whether it holds.
    pub holds: bool,
    /// The value of each of its counters.
    pub figures: BTreeMap<String, f64>,
    /// Why it has no value at all, if so.
    pub problem: Option<String>,
}

impl fmt::Display for Checked {
    /// The counters' values.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(problem) = &self.problem {
            return f.write_str(problem);
        }
        for (i, (name, value)) in self.figures.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{name} = {value}")?;
        }
        Ok(())
    }
}

impl CountCheck {
    /// Compares, with the counters' values from `figures`.
    pub fn check(&self, figures: &dyn Figures) -> Checked {
        let mut checked = Checked { holds: false, figures: BTreeMap::new(), problem: None };
        let mut value = |e: &Expression| e.value(figures, &mut checked.figures);
        match (value(&self.left), value(&self.right)) {
            (Ok(a), Ok(b)) => checked.holds = self.comparison.holds(a, b),
            (Err(e), _) | (_, Err(e)) => checked.problem = Some(e),
        }
        checked
    }
}

impl Expression {
    fn value(&self, figures: &dyn Figures, seen: &mut BTreeMap<String, f64>) -> Result<f64, String> {
        match self {
            Self::Number(n) => Ok(*n),
            Self::Counter(c) => {
                let v = figures.figure(*c).ok_or_else(|| format!("{c} is not counted in this run"))?;
                seen.insert(c.to_string(), v);
                Ok(v)
            }
            Self::Operation(operator, sides) => {
                let (a, b) = (sides.0.value(figures, seen)?, sides.1.value(figures, seen)?);
                match operator {
                    Operator::Add => Ok(a + b),
                    Operator::Subtract => Ok(a - b),
                    Operator::Multiply => Ok(a * b),
                    Operator::Divide if b == 0.0 => Err("division by zero".into()),
                    Operator::Divide => Ok(a / b),
                }
            }
        }
    }
}

impl FromStr for CountCheck {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_LENGTH {
            return Err(format!("the check is longer than {MAX_LENGTH} bytes"));
        }
        let mut p = Parser { text, at: 0 };
        let left = p.sum(0)?;
        let comparison = p.comparison()?;
        let right = p.sum(0)?;
        if !p.rest().is_empty() {
            return Err(p.error("nothing more"));
        }
        Ok(Self { text: text.trim().to_owned(), left, comparison, right })
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    /// What is left, after blanks.
    fn rest(&mut self) -> &'a str {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let trimmed = rest.trim_start();
        self.at += rest.len() - trimmed.len();
        trimmed
    }

    fn error(&mut self, expected: &str) -> String {
        let rest = self.rest();
        let column = self.text.get(..self.at).unwrap_or_default().chars().count() + 1;
        let got = match rest.chars().next() {
            None => "the end".to_owned(),
            Some(c) => format!("{c:?}"),
        };
        format!("{:?}, character {column}: expected {expected}, not {got}", self.text)
    }

    /// Takes `token` if it comes next.
    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn comparison(&mut self) -> Result<Comparison, String> {
        for (token, comparison) in Comparison::ALL {
            if self.take(token) {
                return Ok(comparison);
            }
        }
        Err(self.error("an operator or a comparison (==, !=, <=, >=, <, >)"))
    }

    fn sum(&mut self, depth: usize) -> Result<Expression, String> {
        let mut left = self.product(depth)?;
        loop {
            let operator = match () {
                () if self.take("+") => Operator::Add,
                () if self.take("-") => Operator::Subtract,
                () => return Ok(left),
            };
            left = Expression::Operation(operator, Box::new((left, self.product(depth)?)));
        }
    }

    fn product(&mut self, depth: usize) -> Result<Expression, String> {
        let mut left = self.factor(depth)?;
        loop {
            let operator = match () {
                () if self.take("*") => Operator::Multiply,
                () if self.take("/") => Operator::Divide,
                () => return Ok(left),
            };
            left = Expression::Operation(operator, Box::new((left, self.factor(depth)?)));
        }
    }

    fn factor(&mut self, depth: usize) -> Result<Expression, String> {
        if self.take("(") {
            if depth >= MAX_DEPTH {
                return Err(self.error(&format!("at most {MAX_DEPTH} parentheses in each other")));
            }
            let inner = self.sum(depth + 1)?;
            return if self.take(")") { Ok(inner) } else { Err(self.error("\")\"")) };
        }
        match self.rest().chars().next() {
            Some(c) if c.is_ascii_digit() => self.number(),
            Some(c) if c.is_ascii_alphabetic() => self.counter().map(Expression::Counter),
            _ => Err(self.error("a number, a counter or \"(\"")),
        }
    }

    /// The longest start of what is left whose characters are all of a kind.
    fn word(&mut self, of: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !of(c)).unwrap_or(rest.len());
        self.at += end;
        rest.get(..end).unwrap_or_default()
    }

    fn number(&mut self) -> Result<Expression, String> {
        let start = self.at;
        let word = self.word(|c| c.is_ascii_digit() || c == '_' || c == '.');
        let number = word.replace('_', "").parse::<f64>();
        number.map(Expression::Number).map_err(|_| {
            self.at = start;
            self.error("a number")
        })
    }

    fn counter(&mut self) -> Result<Counter, String> {
        self.rest();
        let start = self.at;
        let name = self.word(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
        let counter = parse_counter(name).map_err(|why| {
            self.at = start;
            let column = self.text.get(..start).unwrap_or_default().chars().count() + 1;
            format!("{:?}, character {column}: {why}", self.text)
        })?;
        let after = self.rest();
        if !after.starts_with("for ") {
            return Ok(counter);
        }
        self.take("for ");
        self.rest();
        let cause = self.word(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
        match (counter, parse_counter(cause)) {
            (Counter::L1(kind), Ok(Counter::L2(Kind::Reason(r), Owner::Any))) => Ok(Counter::Caused(kind, r)),
            _ => {
                self.at = start;
                Err(self.error("\"for\" between exits of L1 and a reason of L2, as L1.exits for L2.CPUID"))
            }
        }
    }
}

/// The reason with this name, in any case.
fn reason(name: &str) -> Result<ExitReason, String> {
    let found = ExitReason::ALL.iter().copied().find(|r| r.name().eq_ignore_ascii_case(name));
    found.ok_or_else(|| {
        let close = ExitReason::ALL.iter().map(|r| (similarity(r.name(), name), r.name())).max();
        match close {
            Some((n, close)) if n >= 3 => format!("{name} is no exit reason; {close} is"),
            _ => format!("{name} is no exit reason; they have the names that `--exit-stats` prints"),
        }
    })
}

/// How many characters two names have in common at their starts, or one has of the other.
fn similarity(a: &str, b: &str) -> usize {
    let b = b.to_ascii_uppercase();
    if a.contains(&b) {
        return b.len();
    }
    a.bytes().zip(b.bytes()).take_while(|(x, y)| x == y).count()
}

fn kind(name: &str) -> Result<Kind, String> {
    if name == "exits" { Ok(Kind::Exits) } else { reason(name).map(Kind::Reason) }
}

fn parse_counter(name: &str) -> Result<Counter, String> {
    let mut parts = name.split('.');
    let parts = (parts.next().unwrap_or_default(), parts.next(), parts.next(), parts.next());
    Ok(match parts {
        ("exits", None, ..) => Counter::Exits,
        ("L0", Some("ms"), None, _) => Counter::Milliseconds(Share::L0),
        ("L1", Some("ms"), None, _) => Counter::Milliseconds(Share::L1),
        ("L2", Some("ms"), None, _) => Counter::Milliseconds(Share::L2),
        ("idle", Some("ms"), None, _) => Counter::Milliseconds(Share::Idle),
        ("L1", Some("instructions"), None, _) => Counter::Instructions(Share::L1),
        ("L2", Some("instructions"), None, _) => Counter::Instructions(Share::L2),
        ("L1", Some("vmreads"), None, _) => Counter::Vmreads,
        ("L1", Some("vmwrites"), None, _) => Counter::Vmwrites,
        ("L1", Some(what), None, _) => Counter::L1(kind(what)?),
        ("L2", Some(what), None, _) => Counter::L2(kind(what)?, Owner::Any),
        ("L2", Some(what), Some(owner), None) => {
            let owner = match owner {
                "kept" => Owner::Kept,
                "forwarded" => Owner::Forwarded,
                "synthesized" => Owner::Synthesized,
                "returned" => Owner::Returned,
                _ => {
                    return Err(format!("{name}: {owner} is none of kept, forwarded, synthesized, returned"));
                }
            };
            Counter::L2(kind(what)?, owner)
        }
        _ => return Err(format!("{name} is no counter; L1.exits, L2.CPUID and L2.HLT.kept are")),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    struct Table(Vec<(&'static str, f64)>);

    impl Figures for Table {
        fn figure(&self, counter: Counter) -> Option<f64> {
            let name = counter.to_string();
            self.0.iter().find(|(n, _)| *n == name).map(|(_, v)| *v)
        }
    }

    fn check(text: &str) -> Checked {
        let table = Table(vec![
            ("L2.CPUID.forwarded", 10.0),
            ("L2.CPUID", 12.0),
            ("L1.exits for L2.CPUID", 30.0),
            ("L1.HLT", 0.0),
            ("exits", 100.0),
        ]);
        text.parse::<CountCheck>().unwrap().check(&table)
    }

    #[test]
    fn compares_and_computes() {
        for (text, holds) in [
            ("L2.CPUID.forwarded == 10", true),
            ("L2.cpuid.forwarded != 10", false),
            ("L2.CPUID.forwarded<L2.CPUID", true),
            ("L2.CPUID >= 12.5", false),
            ("L1.exits for L2.CPUID / L2.CPUID.forwarded <= 3", true),
            ("1 + 2 * 3 == 7", true),
            ("(1 + 2) * 3 == 9", true),
            ("10 - 2 - 3 == 5", true),
            ("24 / 4 / 2 == 3", true),
            ("exits > 1_000", false),
        ] {
            assert_eq!(check(text).holds, holds, "{text}");
        }
    }

    #[test]
    fn says_what_was_counted() {
        assert_eq!(
            check("L1.exits for L2.CPUID < 2 * L2.CPUID").to_string(),
            "L1.exits for L2.CPUID = 30, L2.CPUID = 12"
        );
        assert_eq!(check("exits / L1.HLT == 0").problem.as_deref(), Some("division by zero"));
        let missing = check("L2.instructions > 0");
        assert!(!missing.holds);
        assert_eq!(missing.to_string(), "L2.instructions is not counted in this run");
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        for (text, message) in [
            ("L2.CPUID", "character 9: expected an operator or a comparison"),
            (
                "L2.CPUID = 3",
                "character 10: expected an operator or a comparison (==, !=, <=, >=, <, >), not '='",
            ),
            ("L2.CPUID == ", "character 13: expected a number, a counter or \"(\", not the end"),
            ("L2.CPUID == 3 4", "character 15: expected nothing more, not '4'"),
            ("1 == L2.CPUIDX", "character 6: CPUIDX is no exit reason; CPUID is"),
            ("1 == L2.VIOLATION", "VIOLATION is no exit reason; EPT_VIOLATION is"),
            ("L3.exits == 1", "L3.exits is no counter"),
            ("L1.CPUID.kept == 1", "L1.CPUID.kept is no counter"),
            ("L2.CPUID.mine == 1", "mine is none of kept, forwarded"),
            ("L2.exits for L2.CPUID == 1", "expected \"for\" between exits of L1"),
            ("L1.exits for L2.exits == 1", "expected \"for\" between exits of L1"),
            ("(1 == 2", "expected \")\""),
            ("1.2.3 == 2", "expected a number"),
            ("\u{e9} == 2", "character 1: expected a number"),
        ] {
            let e = text.parse::<CountCheck>().unwrap_err();
            assert!(e.contains(message), "{text}: {e}");
        }
        assert!("(".repeat(500).parse::<CountCheck>().unwrap_err().contains("parentheses"));
        assert!("1+".repeat(5000).parse::<CountCheck>().unwrap_err().contains("longer"));
    }

    fn any_counter() -> impl Strategy<Value = Counter> {
        let reason = proptest::sample::select(ExitReason::ALL);
        let kind = prop_oneof![Just(Kind::Exits), reason.clone().prop_map(Kind::Reason)];
        let owner = proptest::sample::select(
            &[Owner::Any, Owner::Kept, Owner::Forwarded, Owner::Synthesized, Owner::Returned][..],
        );
        let share = proptest::sample::select(&[Share::L0, Share::L1, Share::L2, Share::Idle][..]);
        prop_oneof![
            Just(Counter::Exits),
            Just(Counter::Vmreads),
            Just(Counter::Vmwrites),
            share.prop_map(Counter::Milliseconds),
            kind.clone().prop_map(Counter::L1),
            (kind.clone(), owner).prop_map(|(k, o)| Counter::L2(k, o)),
            (kind, reason).prop_map(|(k, r)| Counter::Caused(k, r)),
        ]
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,40}") {
            let _ = text.parse::<CountCheck>();
        }

        #[test]
        fn nor_do_its_own_tokens(tokens in proptest::collection::vec(proptest::sample::select(
            &["L1.exits", "L2.CPUID", ".", "for ", "==", "<", "(", ")", "+", "/", "1", "1.5", "é", " "][..]), 0..20)) {
            let _ = tokens.concat().parse::<CountCheck>();
        }

        #[test]
        fn a_counter_s_name_is_how_it_is_written(counter in any_counter()) {
            let check: CountCheck = format!("{counter} == 0").parse().unwrap();
            prop_assert_eq!(check.left, Expression::Counter(counter));
        }
    }
}
