//! The scenario format: TOML text to [`Scenario`]s, with a place in the text for every mistake.
//! docs/scenarios.md describes it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Deserialize;
use toml::{Spanned, Value};

use crate::counts::CountCheck;
use crate::limit::TimeLimit;
use crate::options::{self, OptionSpec};
use crate::pattern::LinePattern;
use crate::source::{Origin, Problem};

/// Largest text that is read, in bytes.
pub const MAX_SIZE: usize = 1 << 20;
/// Most runs that a matrix may make of one scenario.
pub const MAX_RUNS: usize = 256;
/// For a whole run, if nothing else is said.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(300);
/// For a step, if nothing else is said.
const DEFAULT_STEP_TIMEOUT: Duration = Duration::from_secs(120);
/// What `nestvmm run` ends with after a guest's crash.
const CRASH_STATUS: i32 = 8;
/// What it ends with after SIGTERM.
const STOP_STATUS: i32 = 128 + 15;

/// One run: a scenario, with values for its matrix's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Scenario {
    /// Where it comes from.
    pub origin: Origin,
    /// Its name, with the parameters: `l2-boot[ept=0]`.
    pub name: String,
    /// What it shows.
    pub description: String,
    /// For `--tag` and `--skip`.
    pub tags: Vec<String>,
    /// A guest that the program brings, by name.
    pub guest: Option<String>,
    /// Arguments of `nestvmm run`.
    pub arguments: Vec<String>,
    /// For the whole run.
    pub timeout: Duration,
    /// What is typed and expected, in order.
    pub steps: Vec<Step>,
    /// How it ends.
    pub end: End,
    /// No line that the guest or nestvmm prints may match.
    pub forbid: Vec<LinePattern>,
    /// What the exit statistics have to say.
    pub checks: Vec<Check>,
}

impl Scenario {
    /// Multiplies all time limits by `factor`, for a busy or slow host.
    pub fn be_patient(&mut self, factor: u32) {
        self.timeout = self.timeout.saturating_mul(factor);
        for limit in self.steps.iter_mut().filter_map(|s| s.timeout.as_mut()) {
            *limit = limit.saturating_mul(factor);
        }
    }
}

/// A level that has a shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum Level {
    /// nestvmm's guest.
    #[serde(rename = "l1")]
    L1,
    /// Its guest, whose console passes through L1's.
    #[serde(rename = "l2")]
    L2,
    /// And so on.
    #[serde(rename = "l3")]
    L3,
}

impl Level {
    /// The prompt of its shell.
    pub fn prompt(self) -> &'static str {
        match self {
            Self::L1 => "l1:~# ",
            Self::L2 => "l2:~# ",
            Self::L3 => "l3:~# ",
        }
    }
}

/// Which status a command has to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// This one.
    Exactly(u32),
    /// Any but 0.
    Failure,
    /// Any.
    Any,
}

impl Wanted {
    /// Whether `status` will do.
    pub fn accepts(self, status: u32) -> bool {
        match self {
            Self::Exactly(n) => n == status,
            Self::Failure => status != 0,
            Self::Any => true,
        }
    }
}

/// What a step does.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Waits for a text on the console.
    Expect(String),
    /// Waits for a line on the console.
    ExpectLine(LinePattern),
    /// Waits for a text on nestvmm's standard error.
    ExpectError(String),
    /// Types.
    Type(String),
    /// Waits for a level's prompt and types a command, without waiting for its end.
    Start {
        /// The command.
        command: String,
        /// Whose shell.
        on: Level,
    },
    /// Waits for a level's prompt, types a command and waits for its end.
    Shell {
        /// The command.
        command: String,
        /// Whose shell.
        on: Level,
        /// Its status.
        status: Wanted,
        /// Texts that it has to print.
        output: Vec<String>,
        /// A line that it has to print.
        output_line: Option<LinePattern>,
    },
    /// Remembers the exit statistics under a name.
    Mark(String),
}

/// A step.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "StepTable")]
pub struct Step {
    /// What it does.
    pub action: Action,
    /// How long it may take.
    pub timeout: Option<Duration>,
    /// What it is for, for reports.
    pub note: Option<String>,
}

/// One text or several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
enum Texts {
    One(String),
    Several(Vec<String>),
}

impl From<Texts> for Vec<String> {
    fn from(texts: Texts) -> Self {
        match texts {
            Texts::One(t) => vec![t],
            Texts::Several(t) => t,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a status: a number, \"failure\" or \"any\"")]
enum StatusValue {
    Number(u32),
    Word(StatusWord),
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum StatusWord {
    Failure,
    Any,
}

impl From<StatusValue> for Wanted {
    fn from(value: StatusValue) -> Self {
        match value {
            StatusValue::Number(n) => Self::Exactly(n),
            StatusValue::Word(StatusWord::Failure) => Self::Failure,
            StatusValue::Word(StatusWord::Any) => Self::Any,
        }
    }
}

/// A step as it is written.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct StepTable {
    expect: Option<String>,
    expect_line: Option<LinePattern>,
    expect_error: Option<String>,
    r#type: Option<String>,
    start: Option<String>,
    shell: Option<String>,
    mark: Option<String>,
    on: Option<Level>,
    status: Option<StatusValue>,
    output: Option<Texts>,
    output_line: Option<LinePattern>,
    timeout: Option<TimeLimit>,
    note: Option<String>,
}

impl TryFrom<StepTable> for Step {
    type Error = String;

    fn try_from(t: StepTable) -> Result<Self, String> {
        let on = t.on.unwrap_or(Level::L1);
        let one_line = |command: String| {
            if command.contains('\n') { Err("a command is one line".to_owned()) } else { Ok(command) }
        };
        let (has_level, has_result) = (t.start.is_some() || t.shell.is_some(), t.shell.is_some());
        if t.on.is_some() && !has_level {
            return Err("\"on\" is for steps with \"shell\" or \"start\"".into());
        }
        if (t.status.is_some() || t.output.is_some() || t.output_line.is_some()) && !has_result {
            return Err("\"status\", \"output\" and \"output-line\" are for steps with \"shell\"".into());
        }
        let shell = t.shell.map(one_line).transpose()?.map(|command| Action::Shell {
            command,
            on,
            status: t.status.map_or(Wanted::Exactly(0), Into::into),
            output: t.output.map(Into::into).unwrap_or_default(),
            output_line: t.output_line,
        });
        let start = t.start.map(one_line).transpose()?.map(|command| Action::Start { command, on });
        let actions = [
            t.expect.map(Action::Expect),
            t.expect_line.map(Action::ExpectLine),
            t.expect_error.map(Action::ExpectError),
            t.r#type.map(Action::Type),
            t.mark.map(Action::Mark),
            start,
            shell,
        ];
        let mut actions = actions.into_iter().flatten();
        match (actions.next(), actions.next()) {
            (Some(action), None) => Ok(Self { action, timeout: t.timeout.map(|l| l.0), note: t.note }),
            (None, _) => {
                Err("a step needs one of expect, expect-line, expect-error, type, start, shell, mark".into())
            }
            (Some(_), Some(_)) => Err("a step does one thing; write another [[steps]] for the second".into()),
        }
    }
}

/// How a run ends.
#[derive(Default, Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "EndTable")]
pub struct End {
    /// nestvmm's exit status.
    pub status: i32,
    /// nestvmm is told to end it; otherwise it ends by itself.
    pub stop: bool,
    /// Texts on nestvmm's standard error.
    pub errors: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct EndTable {
    status: Option<i32>,
    crash: Option<String>,
    stop: bool,
    errors: Option<Texts>,
}

impl TryFrom<EndTable> for End {
    type Error = String;

    fn try_from(t: EndTable) -> Result<Self, String> {
        let status = match (t.status, &t.crash, t.stop) {
            (Some(_), Some(_), _) => return Err("a crash has status 8: leave \"status\" away".into()),
            (_, Some(_), true) => return Err("a run that crashes is not stopped: write one of both".into()),
            (Some(n), ..) => n,
            (None, Some(_), _) => CRASH_STATUS,
            (None, None, true) => STOP_STATUS,
            (None, None, false) => 0,
        };
        let mut errors: Vec<String> = t.errors.map(Into::into).unwrap_or_default();
        errors.extend(t.crash);
        Ok(Self { status, stop: t.stop, errors })
    }
}

/// A check of the statistics.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    /// The comparison.
    pub count: CountCheck,
    /// Between which marks; `None` for the whole run.
    pub between: Option<(String, String)>,
    /// What it is for, for reports.
    pub note: Option<String>,
}

#[derive(Deserialize)]
#[serde(try_from = "String")]
struct CountText(CountCheck);

impl TryFrom<String> for CountText {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse().map(Self)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CheckTable {
    count: CountText,
    between: Option<[Spanned<String>; 2]>,
    note: Option<String>,
}

/// A scenario as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    name: Option<Spanned<String>>,
    description: String,
    #[serde(default)]
    tags: Vec<Spanned<String>>,
    guest: Option<Spanned<String>>,
    timeout: Option<TimeLimit>,
    step_timeout: Option<TimeLimit>,
    #[serde(default)]
    forbid: Vec<LinePattern>,
    /// Read before, by [`MatrixOnly`].
    #[serde(default, rename = "matrix")]
    _matrix: BTreeMap<String, Vec<Value>>,
    #[serde(default)]
    run: BTreeMap<Spanned<String>, Spanned<Value>>,
    #[serde(default)]
    steps: Vec<Step>,
    #[serde(default)]
    end: End,
    #[serde(default)]
    checks: Vec<CheckTable>,
}

/// The parameters alone, which are known before the rest is read.
#[derive(Deserialize)]
struct MatrixOnly {
    #[serde(default)]
    matrix: BTreeMap<Spanned<String>, Spanned<Vec<Spanned<Value>>>>,
}

/// What the program offers to scenarios.
#[derive(Clone, Debug, Default)]
pub struct Offer {
    /// The options of `nestvmm run`.
    pub options: Vec<OptionSpec>,
    /// The names of the guests that it brings.
    pub guests: Vec<String>,
}

/// Values for a matrix's parameters.
type Parameters = Vec<(String, String)>;

/// Reads a scenario: one run, or one for each combination of its matrix's values.
///
/// # Errors
/// The first mistake.
pub fn parse(text: &str, origin: &Origin, offer: &Offer) -> Result<Vec<Scenario>, Problem> {
    if text.len() > MAX_SIZE {
        return Err(Problem::whole(origin, format!("is larger than {MAX_SIZE} bytes")));
    }
    combinations(text, origin)?.iter().map(|p| parse_one(text, origin, offer, p)).collect()
}

/// Every combination of the matrix's values; a single empty one without a matrix.
fn combinations(text: &str, origin: &Origin) -> Result<Vec<Parameters>, Problem> {
    let matrix = read::<MatrixOnly>(text, origin)?.matrix;
    let mut all = vec![Parameters::new()];
    for (name, values) in &matrix {
        let key = name.get_ref();
        if !is_name(key) {
            return Err(Problem::at(origin, text, name.span(), name_rule(key)));
        }
        if values.get_ref().is_empty() || all.len() * values.get_ref().len() > MAX_RUNS {
            let message = format!("a parameter needs values, and all together make at most {MAX_RUNS} runs");
            return Err(Problem::at(origin, text, values.span(), message));
        }
        let values = values.get_ref().iter().map(|v| parameter(v, text, origin));
        let values = values.collect::<Result<Vec<_>, _>>()?;
        all = all
            .iter()
            .flat_map(|p| values.iter().map(|v| [p.clone(), vec![(key.clone(), v.clone())]].concat()))
            .collect();
    }
    Ok(all)
}

/// A parameter's value as it is put into the text.
fn parameter(value: &Spanned<Value>, text: &str, origin: &Origin) -> Result<String, Problem> {
    let plain = match value.get_ref() {
        Value::String(s) => s.clone(),
        Value::Integer(n) => n.to_string(),
        _ => return Err(Problem::at(origin, text, value.span(), "a parameter is a text or a whole number")),
    };
    let special = |c: char| c.is_control() || matches!(c, '"' | '\'' | '\\' | '{' | '}');
    if plain.contains(special) {
        let message = "a parameter's value has no quotes, backslashes, braces or control characters";
        return Err(Problem::at(origin, text, value.span(), message));
    }
    Ok(plain)
}

/// Puts parameters into the text where `{{NAME}}` stands. Lines stay where they are.
fn substitute(text: &str, parameters: &Parameters) -> String {
    parameters
        .iter()
        .fold(text.to_owned(), |text, (name, value)| text.replace(&format!("{{{{{name}}}}}"), value))
}

/// The first `{{NAME}}` that is left, and its place.
fn left_over(text: &str) -> Option<(&str, usize)> {
    text.match_indices("{{").find_map(|(at, _)| {
        let rest = text.get(at + 2..)?;
        let name = rest.get(..rest.find("}}")?)?;
        is_name(name).then_some((name, at))
    })
}

fn read<T: serde::de::DeserializeOwned>(text: &str, origin: &Origin) -> Result<T, Problem> {
    toml::from_str(text).map_err(|e| match e.span() {
        Some(span) => Problem::at(origin, text, span, e.message()),
        None => Problem::whole(origin, e.message()),
    })
}

/// Whether something can be a scenario's, tag's, mark's or parameter's name.
fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 64
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'))
}

fn name_rule(name: &str) -> String {
    format!("{name:?} is no name: letters, digits, - and _, at most 64")
}

fn parse_one(
    original: &str,
    origin: &Origin,
    offer: &Offer,
    parameters: &Parameters,
) -> Result<Scenario, Problem> {
    let text = &substitute(original, parameters);
    if let Some((name, at)) = left_over(text) {
        let message = format!("there is no parameter {name}; write it into [matrix]");
        return Err(Problem::at(origin, text, at..at, message));
    }
    let file: File = read(text, origin)?;
    for name in file.name.iter().chain(&file.tags) {
        if !is_name(name.get_ref()) {
            return Err(Problem::at(origin, text, name.span(), name_rule(name.get_ref())));
        }
    }
    let name = file.name.map_or_else(|| origin.stem(), Spanned::into_inner);
    let guest = file.guest.map(|g| known_guest(&g, text, origin, offer)).transpose()?;
    let arguments = run_arguments(&file.run, text, origin, offer)?;
    if guest.is_none() && !file.run.keys().any(|k| matches!(k.get_ref().as_str(), "image" | "kernel")) {
        let guests = offer.guests.join(", ");
        let message = format!("nothing to boot: write guest = … ({guests}), or image or kernel into [run]");
        return Err(Problem::whole(origin, message));
    }
    let step_timeout = file.step_timeout.map_or(DEFAULT_STEP_TIMEOUT, |l| l.0);
    let steps = file.steps.into_iter().map(|s| Step { timeout: s.timeout.or(Some(step_timeout)), ..s });
    let steps: Vec<Step> = steps.collect();
    let checks = checks(file.checks, &steps, text, origin)?;
    Ok(Scenario {
        origin: origin.clone(),
        name: instance_name(&name, parameters),
        description: file.description,
        tags: file.tags.into_iter().map(Spanned::into_inner).collect(),
        guest,
        arguments,
        timeout: file.timeout.map_or(DEFAULT_TIMEOUT, |l| l.0),
        steps,
        end: file.end,
        forbid: file.forbid,
        checks,
    })
}

/// `name[a=1,b=2]`.
fn instance_name(name: &str, parameters: &Parameters) -> String {
    if parameters.is_empty() {
        return name.to_owned();
    }
    let list: Vec<String> = parameters.iter().map(|(n, v)| format!("{n}={v}")).collect();
    format!("{name}[{}]", list.join(","))
}

fn known_guest(
    guest: &Spanned<String>,
    text: &str,
    origin: &Origin,
    offer: &Offer,
) -> Result<String, Problem> {
    let name = guest.get_ref();
    if offer.guests.contains(name) {
        return Ok(name.clone());
    }
    let message = format!("there is no guest {name:?}; there are {}", offer.guests.join(", "));
    Err(Problem::at(origin, text, guest.span(), message))
}

fn run_arguments(
    run: &BTreeMap<Spanned<String>, Spanned<Value>>,
    text: &str,
    origin: &Origin,
    offer: &Offer,
) -> Result<Vec<String>, Problem> {
    let mut all = Vec::new();
    for (name, value) in run {
        let arguments = options::arguments(&offer.options, name.get_ref(), value.get_ref(), origin.folder());
        all.extend(arguments.map_err(|e| Problem::at(origin, text, name.span(), e))?);
    }
    Ok(all)
}

/// Checks whose marks there are, in the right order.
fn checks(
    tables: Vec<CheckTable>,
    steps: &[Step],
    text: &str,
    origin: &Origin,
) -> Result<Vec<Check>, Problem> {
    let marks: Vec<&str> = steps
        .iter()
        .filter_map(|s| if let Action::Mark(m) = &s.action { Some(m.as_str()) } else { None })
        .collect();
    let position = |mark: &Spanned<String>| {
        marks.iter().position(|m| m == mark.get_ref()).ok_or_else(|| {
            let message = format!("no step has mark = {:?}", mark.get_ref());
            Problem::at(origin, text, mark.span(), message)
        })
    };
    let check = |t: CheckTable| {
        let between = match t.between {
            None => None,
            Some([a, b]) => {
                if position(&a)? >= position(&b)? {
                    let message = format!("the mark {:?} does not come after {:?}", b.get_ref(), a.get_ref());
                    return Err(Problem::at(origin, text, b.span(), message));
                }
                Some((a.into_inner(), b.into_inner()))
            }
        };
        Ok(Check { count: t.count.0, between, note: t.note })
    };
    if let Some(twice) = marks.iter().enumerate().find(|(i, m)| marks.iter().take(*i).any(|o| o == *m)) {
        return Err(Problem::whole(
            origin,
            format!("two steps have mark = {:?}; give each its own", twice.1),
        ));
    }
    tables.into_iter().map(check).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offer() -> Offer {
        let spec = |name: &str, takes_value, is_path| OptionSpec {
            name: name.into(),
            takes_value,
            repeats: false,
            is_path,
            values: if name == "vmcs-access" { vec!["trapped".into(), "shadow".into()] } else { vec![] },
        };
        Offer {
            options: vec![
                spec("image", true, true),
                spec("kernel", true, true),
                spec("vmcs-access", true, false),
                spec("debug-exit", false, false),
            ],
            guests: vec!["demo".into(), "microvisor".into()],
        }
    }

    fn read(text: &str) -> Result<Vec<Scenario>, Problem> {
        parse(text, &Origin::File("dir/one.toml".into()), &offer())
    }

    const FULL: &str = r#"
description = "Everything"
tags = ["l2", "slow"]
guest = "demo"
timeout = "10m"
step-timeout = "7s"
forbid = ["BUG:"]

[matrix]
access = ["trapped", "shadow"]
count = [1, 2]

[run]
vmcs-access = "{{access}}"
debug-exit = true

[[steps]]
expect = "ready"
timeout = "1s"

[[steps]]
shell = "true {{count}}"
on = "l2"
status = "failure"
output = ["a", "b"]
output-line = "^c$"
note = "why"

[[steps]]
mark = "a"
[[steps]]
mark = "b"

[end]
crash = "triple fault"

[[checks]]
count = "L2.CPUID.forwarded == {{count}}"
between = ["a", "b"]
"#;

    #[test]
    fn a_matrix_makes_a_run_of_each_combination() {
        let all = read(FULL).unwrap();
        let names: Vec<&str> = all.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "one[access=trapped,count=1]",
                "one[access=trapped,count=2]",
                "one[access=shadow,count=1]",
                "one[access=shadow,count=2]"
            ]
        );
        let last = &all[3];
        assert_eq!(last.arguments, ["--debug-exit", "--vmcs-access=shadow"]);
        assert_eq!(last.timeout, Duration::from_secs(600));
        assert_eq!(last.steps[0].timeout, Some(Duration::from_secs(1)));
        assert_eq!(last.steps[1].timeout, Some(Duration::from_secs(7)));
        let Action::Shell { command, on, status, output, .. } = &last.steps[1].action else { panic!() };
        assert_eq!((command.as_str(), *on, *status), ("true 2", Level::L2, Wanted::Failure));
        assert_eq!(output, &["a", "b"]);
        assert_eq!(last.end, End { status: 8, stop: false, errors: vec!["triple fault".into()] });
        assert_eq!(last.checks[0].count.to_string(), "L2.CPUID.forwarded == 2");
        assert_eq!(last.checks[0].between, Some(("a".into(), "b".into())));
    }

    #[test]
    fn little_needs_to_be_said() {
        let all = read("description = \"x\"\n[run]\nkernel = \"k\"\n").unwrap();
        assert_eq!(all.len(), 1);
        assert_eq!(all[0].name, "one");
        assert_eq!(all[0].arguments, ["--kernel=dir/k"]);
        assert_eq!(all[0].end, End { status: 0, stop: false, errors: vec![] });
    }

    /// A mistake's place and message.
    fn problem(text: &str) -> (Option<(usize, usize)>, String) {
        let p = read(text).unwrap_err();
        (p.place, p.message)
    }

    #[test]
    fn every_mistake_has_its_place_and_remedy() {
        let head = "description = \"x\"\nguest = \"demo\"\n";
        for (tail, place, message) in [
            ("colour = 1\n", (3, 1), "unknown field `colour`"),
            ("timeout = \"5\"\n", (3, 11), "no length of time"),
            ("tags = [\"a b\"]\n", (3, 9), "\"a b\" is no name"),
            ("forbid = [\"(\"]\n", (3, 10), "no regular expression"),
            ("[run]\nvmcs_access = \"shadow\"\n", (4, 1), "write vmcs-access"),
            ("[run]\nvmcs-access = \"both\"\n", (4, 1), "one of trapped, shadow"),
            ("[[steps]]\nexpect = \"a\"\ntype = \"b\"\n", (3, 1), "a step does one thing"),
            ("[[steps]]\nnote = \"a\"\n", (3, 1), "a step needs one of expect"),
            ("[[steps]]\nexpect = \"a\"\non = \"l2\"\n", (3, 1), "\"on\" is for"),
            ("[[steps]]\ntype = \"a\"\nstatus = 1\n", (3, 1), "are for steps with \"shell\""),
            ("[[steps]]\nshell = \"a\"\nstatus = \"bad\"\n", (5, 10), "\"failure\" or \"any\""),
            ("[[steps]]\nshell = \"a\"\non = \"l9\"\n", (5, 6), "unknown variant `l9`"),
            ("[[steps]]\nshell = \"a\\nb\"\n", (3, 1), "a command is one line"),
            ("[end]\ncrash = \"x\"\nstatus = 8\n", (3, 1), "leave \"status\" away"),
            ("[[checks]]\ncount = \"L2.CPUID\"\n", (4, 9), "expected an operator or a comparison"),
            (
                "[[checks]]\ncount = \"exits > 1\"\nbetween = [\"a\", \"b\"]\n",
                (5, 12),
                "no step has mark = \"a\"",
            ),
            ("[[steps]]\nshell = \"{{x}}\"\n", (4, 10), "there is no parameter x"),
            ("[matrix]\nx = []\n", (4, 5), "a parameter needs values"),
            ("[matrix]\nx = [\"'\"]\n", (4, 6), "no quotes"),
            ("[matrix]\nx = [1.5]\n", (4, 6), "a text or a whole number"),
            ("guest = \"demo\"\n", (3, 1), "duplicate key"),
            ("= 1\n", (3, 1), ""),
        ] {
            let (at, got) = problem(&format!("{head}{tail}"));
            assert!(got.contains(message), "{tail}: {got}");
            assert_eq!(at, Some(place), "{tail}: {got}");
        }
        assert_eq!(
            problem("description = \"x\"\nguest = \"dmo\"\n").1,
            "there is no guest \"dmo\"; there are demo, microvisor"
        );
        assert!(problem("description = \"x\"\n").1.starts_with("nothing to boot"));
        assert!(problem("guest = \"demo\"\n").1.contains("missing field `description`"));
    }

    #[test]
    fn marks_come_in_order_and_once() {
        let text = |first: &str, second: &str| {
            format!(
                "description = \"x\"\nguest = \"demo\"\n[[steps]]\nmark = \"{first}\"\n[[steps]]\nmark = \"{second}\"\n\
                 [[checks]]\ncount = \"exits > 1\"\nbetween = [\"a\", \"b\"]\n"
            )
        };
        assert!(read(&text("a", "b")).is_ok());
        assert!(problem(&text("b", "a")).1.contains("does not come after"));
        assert!(problem(&text("a", "a")).1.contains("two steps"));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,200}") {
            let _ = read(&text);
        }

        #[test]
        fn nor_does_a_damaged_scenario(at in 0..FULL.len(), len in 0usize..40, new in "[\\[\\]\"={}a-z0-9.\n\u{e9}-]{0,8}") {
            let mut text = FULL.to_owned();
            let end = (at + len).min(text.len());
            text.replace_range(at..end, &new);
            let _ = read(&text);
        }
    }
}
