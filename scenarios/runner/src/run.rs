//! Running one scenario: start `nestvmm run`, take the steps, judge the end and the statistics.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::counts::Figures;
use crate::process::{DriveError, Finished, Killer, Launch, Process};
use crate::scenario::{Action, Level, Scenario, Step, Wanted};
use crate::statistics::{Difference, StatisticsError, StatisticsFile, Total};

/// For nestvmm to write its statistics. It does so at once.
const STATISTICS_LIMIT: Duration = Duration::from_secs(30);
/// For nestvmm to end after SIGTERM.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How much of a command's output a message shows, in characters.
const SHOWN: usize = 1000;

/// What the runner needs of the program that it runs.
#[derive(Clone, Debug)]
pub struct Program {
    /// `nestvmm`.
    pub path: PathBuf,
    /// The arguments of `nestvmm run` that boot a guest that the program brings, by name.
    pub guests: BTreeMap<String, Vec<String>>,
}

/// Stops runs from another thread, as Ctrl-C does.
#[derive(Clone, Debug, Default)]
pub struct Stopper(Arc<Mutex<Stopping>>);

#[derive(Debug, Default)]
struct Stopping {
    stopped: bool,
    running: Vec<Killer>,
}

impl Stopper {
    fn lock(&self) -> MutexGuard<'_, Stopping> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills what runs and lets nothing start any more.
    pub fn stop(&self) {
        let mut s = self.lock();
        s.stopped = true;
        s.running.iter().for_each(Killer::kill);
    }

    /// Whether [`Self::stop`] was called.
    pub fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    /// Starts a program, unless all is over.
    fn start(&self, launch: &Launch) -> Result<Option<Process>, DriveError> {
        let mut s = self.lock();
        if s.stopped {
            return Ok(None);
        }
        let process = launch.start()?;
        // Those that have ended are of no use any more.
        s.running.retain(Killer::is_armed);
        s.running.push(process.killer());
        Ok(Some(process))
    }
}

/// How a scenario came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it says.
    Passed,
    /// Not so; what was different.
    Failed(String),
    /// It was stopped before its end, or before it started.
    Stopped,
}

/// A check's outcome, for reports.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckReport {
    /// The check as it is written.
    pub check: String,
    /// Whether it holds.
    pub holds: bool,
    /// The counters' values.
    pub figures: String,
}

/// What came of a scenario.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its name, with parameters.
    pub name: String,
    /// What it shows.
    pub description: String,
    /// Its tags.
    pub tags: Vec<String>,
    /// How it came out.
    pub verdict: Verdict,
    /// How long it took.
    pub time: Duration,
    /// How nestvmm was started.
    pub command: String,
    /// nestvmm's exit status; `None` when it was killed or never ran.
    pub status: Option<i32>,
    /// What the guest printed.
    pub output: String,
    /// What nestvmm printed on standard error.
    pub errors: String,
    /// Exits of L1 and of L2, where they were counted.
    pub exits: Option<(f64, f64)>,
    /// The checks of the statistics.
    pub checks: Vec<CheckReport>,
}

/// Why a run was not as its scenario says.
#[derive(Debug, thiserror::Error)]
enum Deviation {
    #[error("{0}")]
    Drive(#[from] DriveError),
    #[error("{0}")]
    Statistics(#[from] StatisticsError),
    #[error("{0}")]
    Other(String),
    #[error("the run was stopped")]
    Stopped,
}

/// Runs a scenario to its end.
pub fn run(scenario: &Scenario, program: &Program, stopper: &Stopper) -> Report {
    let started = Instant::now();
    let mut report = Report {
        name: scenario.name.clone(),
        description: scenario.description.clone(),
        tags: scenario.tags.clone(),
        verdict: Verdict::Passed,
        time: Duration::ZERO,
        command: String::new(),
        status: None,
        output: String::new(),
        errors: String::new(),
        exits: None,
        checks: Vec::new(),
    };
    if let Err(deviation) = run_into(scenario, program, stopper, &mut report) {
        report.verdict = match deviation {
            // Whatever it was, it was so because everything was killed.
            _ if stopper.is_stopped() => Verdict::Stopped,
            Deviation::Stopped => Verdict::Stopped,
            other => Verdict::Failed(other.to_string()),
        };
    }
    report.time = started.elapsed();
    report
}

fn run_into(
    scenario: &Scenario,
    program: &Program,
    stopper: &Stopper,
    report: &mut Report,
) -> Result<(), Deviation> {
    let folder = tempfile::Builder::new().prefix("nestvmm-scenario-").tempdir();
    let folder =
        folder.map_err(|e| Deviation::Other(format!("there is no place for temporary files: {e}")))?;
    let statistics = StatisticsFile::new(folder.path());
    let launch = launch(scenario, program, statistics.path())?;
    report.command = launch.describe();
    let mut process = stopper.start(&launch)?.ok_or(Deviation::Stopped)?;
    let mut run = Run {
        process: &mut process,
        statistics: &statistics,
        deadline: Instant::now() + scenario.timeout,
        limit: scenario.timeout,
        marks: BTreeMap::new(),
    };
    let result = run.steps(&scenario.steps).and_then(|()| run.end(scenario));
    let marks = std::mem::take(&mut run.marks);
    match &result {
        Ok(finished) => {
            report.status = finished.status.code();
            report.output = finished.output.clone();
            report.errors = finished.errors.clone();
        }
        Err(_) => {
            report.output = process.output();
            report.errors = process.errors();
        }
    }
    let finished = result?;
    judge_end(scenario, &finished)?;
    let total = statistics.read().map(Total);
    if let Ok(total) = &total {
        let level = |c| total.figure(c).unwrap_or(0.0);
        use crate::counts::{Counter, Kind, Owner};
        report.exits = Some((level(Counter::L1(Kind::Exits)), level(Counter::L2(Kind::Exits, Owner::Any))));
    }
    if scenario.checks.is_empty() {
        return Ok(());
    }
    judge_counts(scenario, &total?, &marks, report)
}

fn launch(scenario: &Scenario, program: &Program, statistics: &Path) -> Result<Launch, Deviation> {
    let mut launch = Launch::new(&program.path, ["run"]);
    if let Some(guest) = &scenario.guest {
        let arguments = program.guests.get(guest);
        let arguments = arguments.ok_or_else(|| Deviation::Other(format!("there is no guest {guest}")))?;
        launch = arguments.iter().fold(launch, |l, a| l.arg(a));
    }
    launch = scenario.arguments.iter().fold(launch, |l, a| l.arg(a));
    Ok(launch.arg("--exit-stats-json").arg(statistics.to_string_lossy()))
}

/// A run in progress.
struct Run<'a> {
    process: &'a mut Process,
    statistics: &'a StatisticsFile,
    deadline: Instant,
    limit: Duration,
    marks: BTreeMap<String, Total>,
}

impl Run<'_> {
    fn steps(&mut self, steps: &[Step]) -> Result<(), Deviation> {
        for (i, step) in steps.iter().enumerate() {
            self.step(step).map_err(|e| match e {
                Deviation::Stopped => e,
                _ => {
                    let note = step.note.as_ref().map(|n| format!(" ({n})")).unwrap_or_default();
                    Deviation::Other(format!("step {}{note}: {e}", i + 1))
                }
            })?;
        }
        Ok(())
    }

    /// What is left for something that may take `limit`.
    fn left(&self, limit: Option<Duration>) -> Result<Duration, Deviation> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Deviation::Other(format!("the run took longer than {:?}", self.limit)));
        }
        Ok(limit.map_or(left, |l| l.min(left)))
    }

    fn step(&mut self, step: &Step) -> Result<(), Deviation> {
        let limit = self.left(step.timeout)?;
        match &step.action {
            Action::Expect(text) => {
                self.process.expect(text, limit)?;
            }
            Action::ExpectLine(line) => {
                self.process.expect_match(&line.to_string(), limit, |b| line.find_ended(b))?;
            }
            Action::ExpectError(text) => self.process.expect_error(text, limit)?,
            Action::Type(text) => self.process.type_bytes(text.as_bytes())?,
            Action::Start { command, on } => {
                self.process.expect(on.prompt(), limit)?;
                self.process.type_bytes(format!("{command}\n").as_bytes())?;
            }
            Action::Mark(name) => {
                let total = Total(self.statistics.ask(self.process, limit.min(STATISTICS_LIMIT))?);
                self.marks.insert(name.clone(), total);
            }
            Action::Shell { command, on, status, output, output_line } => {
                let (got, printed) = self.shell(command, *on, limit)?;
                judge_command(command, *status, got, &printed)?;
                if let Some(missing) = output.iter().find(|o| !printed.contains(o.as_str())) {
                    return Err(said(command, &format!("did not print {missing:?}"), &printed));
                }
                if let Some(line) = output_line.as_ref().filter(|l| l.find(&printed).is_none()) {
                    return Err(said(command, &format!("printed no {line}"), &printed));
                }
            }
        }
        Ok(())
    }

    /// Types a command at a shell's prompt; its status, and what it printed.
    fn shell(&mut self, command: &str, on: Level, limit: Duration) -> Result<(u32, String), Deviation> {
        let deadline = Instant::now() + limit;
        let left = || deadline.saturating_duration_since(Instant::now());
        self.process.expect(on.prompt(), left())?;
        // The shell echoes what is typed, so the marks are typed in pieces.
        let line = format!("echo '<''<'; {command}; echo '<''='$?'=>'\n");
        self.process.type_bytes(line.as_bytes())?;
        self.process.expect("<<", left())?;
        let what = format!("end of {command:?}");
        let end = self.process.expect_match(&what, left(), find_end)?;
        Ok((end.0, end.1.replace('\r', "").trim_start_matches('\n').to_owned()))
    }

    /// The run's end.
    fn end(&mut self, scenario: &Scenario) -> Result<Finished, Deviation> {
        if scenario.end.stop {
            self.process.signal(rustix::process::Signal::TERM)?;
            return Ok(self.process.finish(STOP_LIMIT)?);
        }
        let left = self.left(None)?;
        self.process.finish(left).map_err(|e| match e {
            DriveError::StillRuns(_) => {
                Deviation::Other(format!("the run did not end within {:?}", self.limit))
            }
            e => e.into(),
        })
    }
}

/// Finds `<=STATUS=>`; status, and what comes before.
fn find_end(bytes: &[u8]) -> Option<((u32, String), usize)> {
    for at in memchr::memmem::find_iter(bytes, b"<=") {
        let rest = bytes.get(at + 2..)?;
        let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
        let Some(after) = rest.get(digits..).filter(|r| r.starts_with(b"=>")) else { continue };
        let status = std::str::from_utf8(rest.get(..digits)?).ok().and_then(|s| s.parse().ok());
        let Some(status) = status else { continue };
        let before = String::from_utf8_lossy(bytes.get(..at)?).into_owned();
        return Some(((status, before), bytes.len() - after.len() + 2));
    }
    None
}

fn said(command: &str, what: &str, printed: &str) -> Deviation {
    let start = printed.char_indices().rev().nth(SHOWN).map_or(0, |(i, _)| i);
    let printed = printed.get(start..).unwrap_or_default().trim_end();
    Deviation::Other(format!("{command:?} {what}; it printed: {printed}"))
}

fn judge_command(command: &str, wanted: Wanted, got: u32, printed: &str) -> Result<(), Deviation> {
    if wanted.accepts(got) {
        return Ok(());
    }
    Err(said(command, &format!("ended with status {got}"), printed))
}

/// Whether the run's end and what was printed are as they should be.
fn judge_end(scenario: &Scenario, finished: &Finished) -> Result<(), Deviation> {
    let deviation = |text: String| Err(Deviation::Other(text));
    if finished.status.code() != Some(scenario.end.status) {
        let last = finished.errors.trim_end().lines().next().unwrap_or_default();
        let said = if last.is_empty() { String::new() } else { format!(": {last}") };
        let wanted = scenario.end.status;
        return deviation(format!("nestvmm ended with {}, not status {wanted}{said}", finished.status));
    }
    if let Some(text) = scenario.end.errors.iter().find(|t| !finished.errors.contains(t.as_str())) {
        return deviation(format!("nestvmm's standard error lacks {text:?}"));
    }
    for line in &scenario.forbid {
        let found = line.find(&finished.output).or_else(|| line.find(&finished.errors));
        if let Some(found) = found {
            return deviation(format!("there is a forbidden {line}: {found}"));
        }
    }
    Ok(())
}

/// Whether the statistics are as they should be.
fn judge_counts(
    scenario: &Scenario,
    total: &Total,
    marks: &BTreeMap<String, Total>,
    report: &mut Report,
) -> Result<(), Deviation> {
    let mut failed = Vec::new();
    for check in &scenario.checks {
        let checked = match &check.between {
            None => check.count.check(total),
            Some((from, to)) => match (marks.get(from), marks.get(to)) {
                (Some(from), Some(to)) => check.count.check(&Difference { from, to }),
                _ => return Err(Deviation::Other(format!("{}: a mark was not reached", check.count))),
            },
        };
        if !checked.holds {
            let note = check.note.as_ref().map(|n| format!(" ({n})")).unwrap_or_default();
            failed.push(format!("not so{note}: {}: {checked}", check.count));
        }
        report.checks.push(CheckReport {
            check: check.count.to_string(),
            holds: checked.holds,
            figures: checked.to_string(),
        });
    }
    if failed.is_empty() { Ok(()) } else { Err(Deviation::Other(failed.join("; "))) }
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::source::Origin;

    /// Runs the scenario `text` on the shell script `script` in nestvmm's place.
    fn play(script: &str, text: &str) -> Report {
        let offer = crate::scenario::Offer { options: vec![], guests: vec!["g".into()] };
        let text = format!("description = \"x\"\nguest = \"g\"\ntimeout = \"30s\"\n{text}");
        let origin = Origin::Shipped("x.toml".into());
        let scenario = crate::scenario::parse(&text, &origin, &offer).unwrap().remove(0);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nestvmm");
        std::fs::write(&path, format!("#!/bin/sh\n{script}")).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        let program = Program { path, guests: [("g".to_owned(), vec![])].into() };
        run(&scenario, &program, &Stopper::default())
    }

    #[test]
    fn find_the_end() {
        assert_eq!(find_end(b"a <= b\n<=12=>\n"), Some(((12, "a <= b\n".into()), 13)));
        assert_eq!(find_end(b"a\n<=12"), None);
        assert_eq!(find_end(b"<==>"), None);
        assert_eq!(find_end(b"<=99999999999=><=1=>"), Some(((1, "<=99999999999=>".into()), 20)));
    }

    /// What acts as a guest's shell.
    const SHELL: &str = r#"
printf 'l1:~# '
while read -r line; do
    echo "$line"
    [ "$line" = poweroff ] && exit 0
    eval "$line"
    printf 'l1:~# '
done
"#;

    #[test]
    fn steps_are_taken() {
        let steps = "[[steps]]\nshell = \"echo a; echo b 3\"\noutput = \"a\"\noutput-line = '^b \\d$'\n\
                     [[steps]]\nshell = \"false\"\nstatus = 1\n\
                     [[steps]]\nshell = \"false\"\nstatus = \"failure\"\n\
                     [[steps]]\nstart = \"poweroff\"\n";
        let report = play(SHELL, steps);
        assert_eq!(report.verdict, Verdict::Passed, "{}", report.output);
        assert_eq!(report.status, Some(0));
    }

    #[test]
    fn what_was_different_is_said() {
        let failed = |script: &str, text: &str| match play(script, text).verdict {
            Verdict::Failed(why) => why,
            other => panic!("{other:?}"),
        };
        let why = failed(SHELL, "[[steps]]\nshell = \"echo x; false\"\nnote = \"why\"\n");
        assert_eq!(why, "step 1 (why): \"echo x; false\" ended with status 1; it printed: x");
        let why = failed(SHELL, "[[steps]]\nshell = \"echo x\"\noutput = \"y\"\n");
        assert_eq!(why, "step 1: \"echo x\" did not print \"y\"; it printed: x");
        let why = failed(SHELL, "[[steps]]\nexpect = \"nothing\"\ntimeout = \"1ms\"\n");
        assert_eq!(why, "step 1: no \"nothing\" within 1ms");
        assert_eq!(
            failed("echo bad >&2; exit 3", ""),
            "nestvmm ended with exit status: 3, not status 0: bad"
        );
        assert_eq!(
            failed("exit 8", "[end]\ncrash = \"triple\"\n"),
            "nestvmm's standard error lacks \"triple\""
        );
        let why = failed("echo BUG: 1", "forbid = [\"BUG\"]\n");
        assert_eq!(why, "there is a forbidden line like /BUG/: BUG: 1");
        assert!(
            failed("exit 0", "[[checks]]\ncount = \"exits > 1\"\n")
                .starts_with("exit statistics can't be read")
        );
    }

    #[test]
    fn a_run_that_is_to_be_stopped_is() {
        let script = "trap 'exit 143' TERM; echo ready; while :; do read -r x; done";
        let report = play(script, "[[steps]]\nexpect = \"ready\"\n[end]\nstop = true\n");
        assert_eq!(report.verdict, Verdict::Passed, "{}", report.errors);
    }

    #[test]
    fn nothing_starts_after_a_stop() {
        let stopper = Stopper::default();
        stopper.stop();
        let launch = Launch::new("/bin/sh", ["-c", "exit 0"]);
        assert!(stopper.start(&launch).unwrap().is_none());
    }

    /// Marks ask for statistics by SIGUSR1; each time there are ten CPUIDs more.
    #[test]
    fn checks_between_marks() {
        let script = r#"
shift; eval "file=\${$#}"
n=0
write() {
    n=$((n + 10))
    row='{"reason":"CPUID","count":'$n',"l0":{"total_ns":0,"median_ns":0,"p90_ns":0,"p99_ns":0,"max_ns":0}}'
    echo '{"version":1,"vcpus":[{"cpu":0,"exits":'$n',"l1_exits":'$n',"l2_exits":0,"caused_exits":0,
        "exit_multiplication":null,"time":{"l0_ns":0,"l1_ns":2000000,"l2_ns":0,"idle_ns":0},
        "instructions":null,"vmcs_accesses":null,"l1":['$row'],"l2_kept":[],"l2_forwarded":[]}]}' >"$file.new"
    mv "$file.new" "$file"
}
trap write USR1
echo ready
read -r x || read -r x || read -r x
write
"#;
        let text = |count: &str, between: &str| {
            format!(
                "[[steps]]\nexpect = \"ready\"\n[[steps]]\nmark = \"a\"\n[[steps]]\nmark = \"b\"\n[[steps]]\ntype = \"\\n\"\n\
                 [[checks]]\ncount = \"{count}\"\n{between}\n"
            )
        };
        for (count, between) in [
            ("L1.CPUID == 10", "between = [\"a\", \"b\"]"),
            ("L1.CPUID == 30", ""),
            ("L1.exits == 30", ""),
            ("L2.exits == 0", ""),
            ("L1.ms == 2", ""),
        ] {
            let report = play(script, &text(count, between));
            assert_eq!(report.verdict, Verdict::Passed, "{count}: {}", report.errors);
            assert_eq!(report.exits, Some((30.0, 0.0)));
        }
        let report = play(script, &text("L1.CPUID == 5", ""));
        assert_eq!(report.verdict, Verdict::Failed("not so: L1.CPUID == 5: L1.CPUID = 30".into()));
        assert!(!report.checks[0].holds);
    }
}
