//! `nestvmm trace`: reads what `run --trace-exits` wrote.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use exit_trace::{Event, Exit, Level, Statistics, Summary, Trace, TraceError};

use crate::cli::{
    TraceCommand, TraceExportArgs, TraceLevel, TraceOwner, TraceShowArgs, TraceSummaryArgs, TraceWindow,
};
use crate::status::Failure;
use crate::symbols::Symbols;

type TraceFile = Trace<BufReader<File>>;

/// Does what `command` says.
///
/// # Errors
/// When a file can't be read or written, or is no trace.
pub fn trace(command: &TraceCommand) -> Result<(), Failure> {
    match command {
        TraceCommand::Summary(args) => summary(args),
        TraceCommand::Show(args) => show(args),
        TraceCommand::Export(args) => export(args),
    }
}

fn unreadable(path: &Path) -> impl Fn(TraceError) -> Failure {
    move |e| Failure::input(format!("{}: {e}", path.display()))
}

fn open(path: &Path) -> Result<TraceFile, Failure> {
    let file =
        File::open(path).map_err(|e| Failure::input(format!("{}: can't be read: {e}", path.display())))?;
    Trace::new(BufReader::new(file)).map_err(unreadable(path))
}

/// Says on standard error what was left out.
fn warn_of_damage(path: &Path, trace: &TraceFile) {
    if trace.damaged() > 0 {
        eprintln!("nestvmm: {}: {} damaged parts are left out", path.display(), trace.damaged());
    }
}

/// What is written to standard output; a reader who has seen enough is no error.
fn output(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::host(format!("standard output can't be written: {e}")))
        }
        _ => Ok(()),
    }
}

fn inside(window: TraceWindow, event: &Event) -> bool {
    let (Event::Exit(Exit { time_ns, .. }) | Event::Idle { time_ns, .. }) = event;
    window.from.is_none_or(|from| *time_ns >= from) && window.to.is_none_or(|to| *time_ns <= to)
}

fn summary(args: &TraceSummaryArgs) -> Result<(), Failure> {
    let mut trace = open(&args.file)?;
    let mut vcpus = Vec::new();
    for cpu in 0..trace.header().vcpus {
        let mut statistics = Statistics::default();
        let visit = |event: Option<Event>| {
            match event {
                Some(event) if inside(args.window, &event) => statistics.event(&event),
                Some(_) => {}
                None => statistics.gap(),
            }
            true
        };
        trace.for_each(cpu, visit).map_err(unreadable(&args.file))?;
        vcpus.push(statistics.summary(cpu as usize));
    }
    warn_of_damage(&args.file, &trace);
    let mut out = io::stdout().lock();
    if args.json {
        let text = serde_json::to_string_pretty(&Summary::new(vcpus)).map_err(Failure::internal)?;
        return output(writeln!(out, "{text}"));
    }
    let many = vcpus.len() > 1;
    output(vcpus.iter().try_for_each(|v| {
        if many {
            writeln!(out, "vCPU {}", v.cpu)?;
        }
        write!(out, "{v}")
    }))
}

fn wanted(args: &TraceShowArgs, e: &Exit) -> bool {
    let level = args.level.is_none_or(|l| match l {
        TraceLevel::L1 => e.level == Level::L1,
        TraceLevel::L2 => e.level == Level::L2,
    });
    let owner = args.owner.is_none_or(|o| (o == TraceOwner::L1) == e.forwarded.is_some());
    let reason =
        args.reasons.is_empty() || args.reasons.iter().any(|r| *r == e.reason || Some(*r) == e.forwarded);
    let number = args.number.is_none_or(|(first, last)| (first..=last).contains(&e.number));
    let cause = args.cause.is_none_or(|c| e.cause == Some(c));
    level && owner && reason && number && cause
}

/// Symbols of both levels, as far as they were asked for.
struct Names {
    l1: Option<Symbols>,
    l2: Option<Symbols>,
}

impl Names {
    fn read(args: &TraceShowArgs) -> Result<Self, Failure> {
        let offset = args.symbol_offset.unwrap_or(0);
        let read = |path: &Option<PathBuf>| {
            let symbols = path.as_ref().map(|p| Symbols::read(p, offset));
            symbols.transpose().map_err(Failure::input)
        };
        Ok(Self { l1: read(&args.symbols)?, l2: read(&args.l2_symbols)? })
    }

    /// " in NAME+DISTANCE" for the code that exited.
    fn of(&self, e: &Exit) -> String {
        let symbols = match e.level {
            Level::L1 => &self.l1,
            Level::L2 => &self.l2,
        };
        let found = symbols.as_ref().and_then(|s| s.find(e.rip));
        found.map(|(name, distance)| format!(" in {name}+{distance:#x}")).unwrap_or_default()
    }
}

fn show(args: &TraceShowArgs) -> Result<(), Failure> {
    let names = Names::read(args)?;
    let mut trace = open(&args.file)?;
    let mut out = BufWriter::new(io::stdout().lock());
    let mut result = Ok(());
    for cpu in 0..trace.header().vcpus {
        let visit = |event: Option<Event>| {
            let Some(event) = event else {
                result = writeln!(out, "(records are missing here)");
                return result.is_ok();
            };
            if let Event::Exit(e) = event
                && inside(args.window, &event)
                && wanted(args, &e)
            {
                result = writeln!(
                    out,
                    "{:>5}.{:09} {e} guest {} ns L0 {} ns{}",
                    e.time_ns / 1_000_000_000,
                    e.time_ns % 1_000_000_000,
                    e.guest_ns,
                    e.l0_ns,
                    names.of(&e)
                );
            }
            result.is_ok()
        };
        trace.for_each(cpu, visit).map_err(unreadable(&args.file))?;
    }
    output(result.and_then(|()| out.flush()))?;
    drop(out);
    warn_of_damage(&args.file, &trace);
    Ok(())
}

fn export(args: &TraceExportArgs) -> Result<(), Failure> {
    let mut trace = open(&args.file)?;
    let file = File::create(&args.output)
        .map_err(|e| Failure::input(format!("{}: can't be written: {e}", args.output.display())))?;
    let window = args.window;
    exit_trace::export(&mut trace, BufWriter::new(file), |e| inside(window, e))
        .map_err(|e| Failure::input(format!("{} to {}: {e}", args.file.display(), args.output.display())))?;
    warn_of_damage(&args.file, &trace);
    Ok(())
}
