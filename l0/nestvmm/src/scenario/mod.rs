//! `nestvmm scenario`: runs, lists and checks scenarios.

mod guests;
mod progress;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::{ArgAction, CommandFactory, ValueHint};
use scenario_runner::options::{IMAGE, OptionSpec};
use scenario_runner::report;
use scenario_runner::run::{Program, Report, Stopper, Verdict};
use scenario_runner::scenario::{self, Offer, Scenario};
use scenario_runner::shipped::SHIPPED;
use scenario_runner::source::Origin;
use scenario_runner::suite::{self, Event, Selection};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::child;
use crate::cli::{Cli, ScenarioCheckArgs, ScenarioCommand, ScenarioListArgs, ScenarioRunArgs};
use crate::status::{self, Failure};

use guests::Guests;
use progress::Progress;

/// The argument that stands for every scenario that is part of the program.
const ALL: &str = "all";
/// The folder of a checkout that has scenarios.
const FOLDER: &str = "scenarios";
/// A second signal that comes sooner is the first one again: `timeout` and shells signal a program and then
/// its group.
const AGAIN: Duration = Duration::from_secs(1);
/// Columns of `scenario list` for tags.
const TAGS_WIDTH: usize = 16;

/// Does what `command` says; the exit status.
///
/// # Errors
/// [`Failure`] with the status to end with.
pub fn scenario(command: &ScenarioCommand) -> Result<u8, Failure> {
    match command {
        ScenarioCommand::Run(args) => run(args),
        ScenarioCommand::List(args) => list(args),
        ScenarioCommand::Check(args) => check(args),
    }
}

fn run(args: &ScenarioRunArgs) -> Result<u8, Failure> {
    let guests = Guests::new(&args.guests);
    let offer = offer(&guests);
    let mut scenarios = Vec::new();
    for source in &args.scenarios {
        scenarios.extend(Source::find(source)?.read(&offer)?);
    }
    let selection = Selection { tags: args.tags.clone(), skip: args.skip.clone(), shard: args.shard };
    let mut scenarios = selection.choose(scenarios);
    for s in &mut scenarios {
        s.be_patient(args.patience);
    }
    if scenarios.is_empty() {
        println!("no scenario is left to run");
        return Ok(0);
    }
    let used = scenarios.iter().filter_map(|s| s.guest.as_deref());
    let prepared = guests.prepare(used)?;
    let program = Program { path: child::own_program()?, guests: prepared.arguments.clone() };

    let stopper = Stopper::default();
    let signalled = watch_signals(&stopper)?;
    let jobs = args.jobs.unwrap_or_else(default_jobs);
    let started = Instant::now();
    let mut progress = Progress::new(scenarios.len());
    let reports = suite::run(&scenarios, &program, jobs, &stopper, |event| {
        if let Event::Ended(r) = &event {
            keep_log(args, r);
        }
        progress.show(&event);
    });
    let time = started.elapsed();
    progress.end();
    print!("{}", report::table(&reports, time));
    if let Some(path) = &args.json {
        written(path, report::write_json(path, &reports, time))?;
    }
    if let Some(path) = &args.junit {
        written(path, report::write_junit(path, &reports, time))?;
    }
    match signalled.load(Ordering::SeqCst) {
        0 if suite::all_passed(&reports) => Ok(0),
        0 => Ok(status::SCENARIO_FAILED),
        signal => Ok(status::signalled(signal)),
    }
}

/// As many as there are processors.
fn default_jobs() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// What a scenario that did not pass printed is kept.
fn keep_log(args: &ScenarioRunArgs, report: &Report) {
    if report.verdict == Verdict::Passed && !args.keep_logs {
        return;
    }
    if let Err(e) = report::keep_log(&args.logs, report) {
        eprintln!("nestvmm: --logs {}: can't be written: {e}", args.logs.display());
    }
}

fn written(path: &Path, result: std::io::Result<()>) -> Result<(), Failure> {
    result.map_err(|e| Failure::input(format!("{}: can't be written: {e}", path.display())))
}

/// The first signal that is to end the program stops all runs; its number is left in what is returned.
/// The second one ends the program at once.
fn watch_signals(stopper: &Stopper) -> Result<Arc<AtomicI32>, Failure> {
    let refuse = |e: std::io::Error| Failure::host(format!("can't handle signals: {e}"));
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT]).map_err(refuse)?;
    let first = Arc::new(AtomicI32::new(0));
    let (stopper, seen) = (stopper.clone(), first.clone());
    let body = move || {
        let mut first: Option<Instant> = None;
        for signal in signals.forever() {
            stopper.stop();
            if first.is_some_and(|f| f.elapsed() > AGAIN) {
                std::process::exit(status::signalled(signal).into());
            }
            first.get_or_insert_with(Instant::now);
            // The first one counts.
            let _ = seen.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst);
        }
    };
    thread::Builder::new().name("signals".into()).spawn(body).map_err(refuse)?;
    Ok(first)
}

fn list(args: &ScenarioListArgs) -> Result<u8, Failure> {
    let offer = offer(&Guests::new(&args.guests));
    let mut problems = 0;
    let mut rows = Vec::new();
    let sources = match args.scenarios.as_slice() {
        [] => vec![Source::Shipped, Source::Folder(FOLDER.into())],
        given => given.iter().map(|s| Source::find(s)).collect::<Result<_, _>>()?,
    };
    for source in sources {
        for (origin, text) in source.texts().unwrap_or_default() {
            // A checkout's own files are the shipped ones.
            let name = origin.stem() + ".toml";
            if matches!(source, Source::Folder(_)) && SHIPPED.iter().any(|(n, t)| *n == name && *t == text) {
                continue;
            }
            match scenario::parse(&text, &origin, &offer) {
                Ok(all) => rows.extend(all),
                Err(problem) => {
                    eprintln!("{problem}");
                    problems += 1;
                }
            }
        }
    }
    let width = rows.iter().map(|s| s.name.chars().count()).max().unwrap_or(0);
    for s in &rows {
        let tags = s.tags.join(",");
        println!("{:width$}  {tags:TAGS_WIDTH$}  {}", s.name, s.description);
    }
    Ok(if problems == 0 { 0 } else { status::BAD_INPUT })
}

fn check(args: &ScenarioCheckArgs) -> Result<u8, Failure> {
    let offer = offer(&Guests::new(&args.guests));
    let mut problems = 0;
    let mut runs = 0;
    for source in &args.scenarios {
        for (origin, text) in Source::find(source)?.texts()? {
            match scenario::parse(&text, &origin, &offer) {
                Ok(all) => runs += all.len(),
                Err(problem) => {
                    eprintln!("{problem}");
                    problems += 1;
                }
            }
        }
    }
    println!("{runs} runs, {problems} files with a mistake");
    Ok(if problems == 0 { 0 } else { status::BAD_INPUT })
}

/// Where scenarios are taken from.
enum Source {
    /// All that are part of the program.
    Shipped,
    /// One that is part of the program: its file's name and text.
    One(&'static str, &'static str),
    /// A file.
    File(PathBuf),
    /// The `.toml` files in a folder.
    Folder(PathBuf),
}

impl Source {
    /// What `argument` means: `all`, a shipped scenario's name, a file or a folder.
    fn find(argument: &str) -> Result<Self, Failure> {
        if argument == ALL {
            return Ok(Self::Shipped);
        }
        let file = format!("{argument}.toml");
        if let Some((name, text)) = SHIPPED.iter().find(|(n, _)| *n == file) {
            return Ok(Self::One(name, text));
        }
        let path = PathBuf::from(argument);
        if path.is_dir() {
            return Ok(Self::Folder(path));
        }
        if path.exists() {
            return Ok(Self::File(path));
        }
        Err(Failure::input(format!(
            "{argument}: is no scenario, no file and no folder; `nestvmm scenario list` shows the scenarios"
        )))
    }

    fn texts(&self) -> Result<Vec<(Origin, String)>, Failure> {
        let shipped = |(name, text): (&str, &str)| (Origin::Shipped(name.to_owned()), text.to_owned());
        match self {
            Self::Shipped => Ok(SHIPPED.iter().copied().map(shipped).collect()),
            Self::One(name, text) => Ok(vec![shipped((name, text))]),
            Self::File(path) => Ok(vec![read_file(path)?]),
            Self::Folder(path) => {
                let unreadable =
                    |e: std::io::Error| Failure::input(format!("{}: can't be read: {e}", path.display()));
                let entries = std::fs::read_dir(path).map_err(unreadable)?;
                let mut files = entries
                    .map(|e| e.map(|e| e.path()))
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(unreadable)?;
                files.retain(|f| f.extension().is_some_and(|e| e == "toml"));
                files.sort();
                files.iter().map(|f| read_file(f)).collect()
            }
        }
    }

    fn read(&self, offer: &Offer) -> Result<Vec<Scenario>, Failure> {
        let mut all = Vec::new();
        for (origin, text) in self.texts()? {
            all.extend(scenario::parse(&text, &origin, offer).map_err(Failure::input)?);
        }
        Ok(all)
    }
}

fn read_file(path: &Path) -> Result<(Origin, String), Failure> {
    let unreadable = |e| Failure::input(format!("{}: can't be read: {e}", path.display()));
    let size = std::fs::metadata(path).map_err(unreadable)?.len();
    if size > scenario::MAX_SIZE as u64 {
        return Err(Failure::input(format!("{}: is too large for a scenario", path.display())));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    Ok((Origin::File(path.to_owned()), text))
}

/// What scenarios may use: the options of `nestvmm run` as the command line has them, and guests.
fn offer(guests: &Guests) -> Offer {
    let command = Cli::command();
    let run = command.find_subcommand("run");
    let options = run.into_iter().flat_map(clap::Command::get_arguments).map(option_spec).collect();
    Offer { options, guests: guests.names() }
}

fn option_spec(arg: &clap::Arg) -> OptionSpec {
    let is_path = matches!(arg.get_value_hint(), ValueHint::AnyPath | ValueHint::FilePath);
    OptionSpec {
        name: arg.get_long().unwrap_or(IMAGE).to_owned(),
        takes_value: arg.get_action().takes_values(),
        repeats: matches!(arg.get_action(), ArgAction::Append),
        is_path,
        values: arg.get_possible_values().iter().map(|v| v.get_name().to_owned()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_of_run_are_known() {
        let offer = offer(&Guests::new(&[]));
        let option = |name: &str| offer.options.iter().find(|o| o.name == name).unwrap();
        assert!(option("image").takes_value && option("image").is_path);
        assert!(option("kernel").is_path && option("initrd").is_path);
        assert!(option("module").repeats);
        assert!(!option("debug-exit").takes_value);
        assert!(option("vmcs-access").values.contains(&"shadow".to_owned()));
        assert!(option("memory").values.is_empty());
    }

    #[test]
    fn the_example_in_the_documentation_is_right() {
        let page = include_str!("../../../../docs/scenarios.md");
        let (_, example) = page.split_once("```toml\n").unwrap();
        let (example, _) = example.split_once("```").unwrap();
        let origin = Origin::File("my.toml".into());
        let offer = offer(&Guests::new(&[]));
        assert_eq!(scenario::parse(example, &origin, &offer).unwrap().len(), 2);
        // And so is the mistake that it shows.
        let wrong = example.replace("vmcs-access", "vmcs_access");
        let problem = scenario::parse(&wrong, &origin, &offer).unwrap_err().to_string();
        assert!(page.contains(&problem), "{problem}");
    }

    #[test]
    fn every_shipped_scenario_can_be_read() {
        let offer = offer(&Guests::new(&[]));
        let all = Source::Shipped.read(&offer).unwrap();
        assert!(all.len() >= SHIPPED.len());
        let names: std::collections::BTreeSet<&str> = all.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(names.len(), all.len(), "each run has its own name");
    }
}
