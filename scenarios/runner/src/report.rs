//! Reports of runs: a table for people, JSON, and JUnit's XML for CI.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use quick_junit::{NonSuccessKind, TestCase, TestCaseStatus, TestSuite};
use serde::Serialize;

use crate::run::{CheckReport, Report, Verdict};

/// Version of the JSON form, which changes when a field changes its meaning or goes away.
pub const VERSION: u32 = 1;
/// Name of the JUnit report and its one suite.
const SUITE: &str = "nestvmm scenarios";

impl Verdict {
    /// In one word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Passed => "passed",
            Self::Failed(_) => "failed",
            Self::Stopped => "stopped",
        }
    }

    fn message(&self) -> Option<&str> {
        if let Self::Failed(why) = self { Some(why) } else { None }
    }
}

/// How many passed, failed and were stopped.
fn counts(reports: &[Report]) -> [usize; 3] {
    let count = |word: &str| reports.iter().filter(|r| r.verdict.word() == word).count();
    ["passed", "failed", "stopped"].map(count)
}

/// The table, and under it why scenarios failed and a line that counts.
pub fn table(reports: &[Report], time: Duration) -> String {
    let width = reports.iter().map(|r| r.name.chars().count()).max().unwrap_or(0).max("scenario".len());
    let mut text = String::new();
    let mut line = |name: &str, result: &str, time: &str, l1: &str, l2: &str| {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{name:<width$}  {result:<7}  {time:>8}  {l1:>11}  {l2:>11}");
    };
    line("scenario", "result", "time", "exits of L1", "exits of L2");
    for r in reports {
        let (l1, l2) = r.exits.map_or(Default::default(), |(a, b)| (a.to_string(), b.to_string()));
        line(&r.name, r.verdict.word(), &format!("{:.1} s", r.time.as_secs_f64()), &l1, &l2);
    }
    for r in reports {
        if let Some(why) = r.verdict.message() {
            let _ = writeln!(text, "\n{} failed: {why}", r.name);
        }
    }
    let [passed, failed, stopped] = counts(reports);
    let _ = write!(text, "\n{passed} passed, {failed} failed");
    if stopped > 0 {
        let _ = write!(text, ", {stopped} stopped");
    }
    let _ = writeln!(text, " in {:.1} s", time.as_secs_f64());
    text
}

#[derive(Serialize)]
struct Json<'a> {
    version: u32,
    seconds: f64,
    passed: usize,
    failed: usize,
    stopped: usize,
    scenarios: Vec<JsonScenario<'a>>,
}

#[derive(Serialize)]
struct JsonScenario<'a> {
    name: &'a str,
    description: &'a str,
    tags: &'a [String],
    result: &'a str,
    message: Option<&'a str>,
    seconds: f64,
    command: &'a str,
    exit_status: Option<i32>,
    l1_exits: Option<f64>,
    l2_exits: Option<f64>,
    checks: Vec<JsonCheck<'a>>,
}

impl<'a> JsonScenario<'a> {
    fn new(r: &'a Report) -> Self {
        let check = |c: &'a CheckReport| JsonCheck { check: &c.check, holds: c.holds, figures: &c.figures };
        Self {
            name: &r.name,
            description: &r.description,
            tags: &r.tags,
            result: r.verdict.word(),
            message: r.verdict.message(),
            seconds: r.time.as_secs_f64(),
            command: &r.command,
            exit_status: r.status,
            l1_exits: r.exits.map(|e| e.0),
            l2_exits: r.exits.map(|e| e.1),
            checks: r.checks.iter().map(check).collect(),
        }
    }
}

#[derive(Serialize)]
struct JsonCheck<'a> {
    check: &'a str,
    holds: bool,
    figures: &'a str,
}

/// The reports as JSON.
///
/// # Errors
/// When the file can't be written.
pub fn write_json(path: &Path, reports: &[Report], time: Duration) -> io::Result<()> {
    let [passed, failed, stopped] = counts(reports);
    let json = Json {
        version: VERSION,
        seconds: time.as_secs_f64(),
        passed,
        failed,
        stopped,
        scenarios: reports.iter().map(JsonScenario::new).collect(),
    };
    let mut text = serde_json::to_string_pretty(&json)?;
    text.push('\n');
    fs::write(path, text)
}

/// The reports as JUnit's XML: one suite with a test case for each run.
///
/// # Errors
/// When the file can't be written.
pub fn write_junit(path: &Path, reports: &[Report], time: Duration) -> io::Result<()> {
    let mut suite = TestSuite::new(SUITE);
    suite.set_time(time);
    suite.add_test_cases(reports.iter().map(test_case));
    let mut report = quick_junit::Report::new(SUITE);
    report.set_time(time).add_test_suite(suite);
    fs::write(path, report.to_string().map_err(io::Error::other)? + "\n")
}

fn test_case(r: &Report) -> TestCase {
    let status = match &r.verdict {
        Verdict::Passed => TestCaseStatus::success(),
        Verdict::Failed(why) => {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
            status.set_message(why.as_str()).set_type("failed").set_description(why.as_str());
            status
        }
        Verdict::Stopped => {
            let mut status = TestCaseStatus::skipped();
            status.set_message("the run was stopped");
            status
        }
    };
    let mut case = TestCase::new(r.name.as_str(), status);
    case.set_time(r.time).set_classname("scenario");
    if let Verdict::Failed(_) = r.verdict {
        case.set_system_out(r.output.as_str()).set_system_err(r.errors.as_str());
    }
    case
}

/// Keeps what a run printed: `NAME.console`, `NAME.errors`, `NAME.command`.
///
/// # Errors
/// When the files can't be written.
pub fn keep_log(folder: &Path, report: &Report) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let name = file_name(&report.name);
    fs::write(folder.join(format!("{name}.console")), &report.output)?;
    fs::write(folder.join(format!("{name}.errors")), &report.errors)?;
    fs::write(folder.join(format!("{name}.command")), format!("{}\n", report.command))
}

/// A run's name as a file's: what is special to shells or paths becomes `_`.
fn file_name(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() || "-_=,.".contains(c) { c } else { '_' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reports() -> Vec<Report> {
        let passed = Report {
            name: "one".into(),
            description: "The first".into(),
            tags: vec!["l1".into()],
            verdict: Verdict::Passed,
            time: Duration::from_millis(1500),
            command: "nestvmm run x".into(),
            status: Some(0),
            output: "out \u{1b}[0m <&>".into(),
            errors: "err".into(),
            exits: Some((12.0, 3.0)),
            checks: vec![CheckReport {
                check: "exits > 1".into(),
                holds: true,
                figures: "exits = 15".into(),
            }],
        };
        let failed = Report {
            name: "two[a=<b>]".into(),
            verdict: Verdict::Failed("step 1: no \"x\" <here>".into()),
            status: None,
            exits: None,
            checks: vec![],
            ..passed.clone()
        };
        let stopped = Report { name: "three".into(), verdict: Verdict::Stopped, ..failed.clone() };
        vec![passed, failed, stopped]
    }

    #[test]
    fn the_table_says_what_failed_and_why() {
        let text = table(&reports(), Duration::from_secs(2));
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].starts_with("one ") && lines[1].contains("passed") && lines[1].contains("1.5 s"),
            "{text}"
        );
        assert!(text.contains("two[a=<b>] failed: step 1: no \"x\" <here>"));
        assert!(text.ends_with("\n1 passed, 1 failed, 1 stopped in 2.0 s\n"), "{text}");
    }

    #[test]
    fn json_and_junit_are_well_formed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r");
        write_json(&path, &reports(), Duration::from_secs(2)).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(json["failed"], 1);
        assert_eq!(json["scenarios"][1]["message"], "step 1: no \"x\" <here>");
        assert_eq!(json["scenarios"][0]["checks"][0]["figures"], "exits = 15");
        assert_eq!(json["scenarios"][1]["exit_status"], serde_json::Value::Null);
        write_junit(&path, &reports(), Duration::from_secs(2)).unwrap();
        let xml = fs::read_to_string(&path).unwrap();
        let read = quick_junit::Report::deserialize_from_str(&xml).unwrap();
        assert_eq!((read.tests, read.failures), (3, 1));
        let case = &read.test_suites[0].test_cases[1];
        assert_eq!(case.name.as_str(), "two[a=<b>]");
        // A console's control characters can't be in XML.
        assert!(case.system_out.as_ref().unwrap().as_str().contains("<&>"));
        assert!(!xml.contains('\u{1b}'));
    }

    #[test]
    fn logs_are_kept_under_plain_names() {
        let folder = tempfile::tempdir().unwrap();
        keep_log(&folder.path().join("a/b"), &reports()[1]).unwrap();
        let kept = folder.path().join("a/b/two_a=_b__.console");
        assert!(fs::read_to_string(kept).unwrap().starts_with("out"));
        assert_eq!(file_name("../x y"), ".._x_y");
    }
}
