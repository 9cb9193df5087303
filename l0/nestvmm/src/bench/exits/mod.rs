//! `nestvmm bench exits`: what an exit of L2 takes, by the way in which L1 accesses its VMCS and by the MMU mode, in
//! one run: how often L0 is entered, VMREADs and VMWRITEs, and the time in L0, L1 and L2.
//!
//! The guests are the microvisor, whose benchmarks have marks where they begin and end, and Linux' KVM, whose L2 is
//! the microvisor's image as a plain guest with the same marks. Counts and times are those of the exit trace
//! (`run --trace-exits`), exit by exit. Each mode is one run of `nestvmm run`, one after another.
//!
//! Not supported: other hypervisors; Turtles' third MMU mode, shadow-on-shadow; runs on `/dev/kvm`.

mod console;
mod measure;
mod report;
mod svg;
mod table;

use std::fs::File;
use std::io::{self, BufReader, Write as _};
use std::path::Path;
use std::time::Duration;

use exit_trace::{Level, Trace};
use scenario_runner::process::Launch;

use self::console::Said;
use self::report::{Benchmark, Mode, Report};
use super::peer::MemoryFile;
use crate::child;
use crate::cli::{BenchExitsArgs, L1Choice, MmuChoice, VmcsAccessChoice};
use crate::interrupt;
use crate::status::Failure;

/// Most memory that a run's trace takes; the file grows as records come.
const TRACE_SIZE: &str = "2G";
/// No run takes longer.
const LIMIT: Duration = Duration::from_secs(3600);

/// Measures all modes, prints tables and writes what was asked for.
///
/// # Errors
/// [`Failure`] for options that can't be used together, files that can't be, and guests that fail.
pub fn exits(args: &BenchExitsArgs) -> Result<(), Failure> {
    let modes = modes(args)?;
    // Before the work, in case that they can't be written.
    let json = args.json.as_deref().map(Output::create).transpose()?;
    let svg = args.svg.as_deref().map(Output::create).transpose()?;
    interrupt::handle_signals()?;
    let runner = Runner { args, image: MemoryFile::new("microvisor", microvisor::BYTES)? };
    let mut measured = Vec::new();
    for (n, mode) in modes.iter().enumerate() {
        eprintln!("run {} of {}: {mode}", n + 1, modes.len());
        measured.push(runner.measure(*mode)?);
    }
    let report = Report::new(args.rounds, measured);
    print!("{}", table::tables(&report));
    if let Some(file) = json {
        let text = serde_json::to_string_pretty(&report).map_err(Failure::internal)?;
        file.write(&format!("{text}\n"))?;
    }
    if let Some(file) = svg {
        file.write(&svg::chart(&report).map_err(Failure::internal)?)?;
    }
    Ok(())
}

/// A file that the user asked for.
struct Output<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> Output<'a> {
    fn create(path: &'a Path) -> Result<Self, Failure> {
        let file = File::create(path).map_err(|e| Self::failure(path, &e))?;
        Ok(Self { path, file })
    }

    fn write(mut self, text: &str) -> Result<(), Failure> {
        self.file.write_all(text.as_bytes()).map_err(|e| Self::failure(self.path, &e))
    }

    fn failure(path: &Path, e: &io::Error) -> Failure {
        Failure::input(format!("{}: can't be written: {e}", path.display()))
    }
}

/// The combinations that the options ask for.
fn modes(args: &BenchExitsArgs) -> Result<Vec<Mode>, Failure> {
    let mut l1s = args.l1.clone();
    if l1s.is_empty() {
        l1s.push(L1Choice::Microvisor);
        l1s.extend(args.image.as_ref().map(|_| L1Choice::Kvm));
    }
    if l1s.contains(&L1Choice::Kvm) && args.image.is_none() {
        return Err(Failure::usage("--l1 kvm: give an IMAGE that `nestvmm image build` made"));
    }
    for name in &args.only {
        if !l1s.iter().any(|l1| names(*l1).contains(&name.as_str())) {
            let lists = l1s.iter().map(|l1| format!("{l1} has {}", names(*l1).join(", ")));
            let lists = lists.collect::<Vec<_>>().join("; ");
            return Err(Failure::usage(format!("--only {name}: there is no such benchmark; {lists}")));
        }
    }
    let mut modes = Vec::new();
    for l1 in l1s {
        for mmu in &args.mmu {
            modes.extend(args.vmcs_access.iter().map(|access| Mode { l1, access: *access, mmu: *mmu }));
        }
    }
    // An option's value that was given twice is measured once, and a guest without any of the names not at all.
    let mut seen = Vec::new();
    modes.retain(|m| {
        let wanted = args.only.is_empty() || args.only.iter().any(|n| names(m.l1).contains(&n.as_str()));
        let new = wanted && !seen.contains(m);
        seen.extend(new.then_some(*m));
        new
    });
    Ok(modes)
}

/// Names of the benchmarks that an L1 has.
fn names(l1: L1Choice) -> &'static [&'static str] {
    match l1 {
        L1Choice::Microvisor => microvisor::BENCHMARKS,
        L1Choice::Kvm => microvisor::VMEXITS,
    }
}

/// What runs share.
struct Runner<'a> {
    args: &'a BenchExitsArgs,
    image: MemoryFile,
}

impl Runner<'_> {
    /// Runs one mode.
    fn measure(&self, mode: Mode) -> Result<report::Measured, Failure> {
        let trace = MemoryFile::new("trace", &[])?;
        let launch = self.launch(mode, &trace)?;
        let (mut process, _guard) = child::start(&launch)?;
        process.close_input();
        let finished = process.finish(LIMIT).map_err(|e| Failure::host(format!("{mode}: {e}")))?;
        let good = match mode.l1 {
            // isa-debug-exit with 0.
            L1Choice::Microvisor => 1,
            L1Choice::Kvm => 0,
        };
        if finished.status.code() != Some(good) {
            let (output, errors) = (finished.output.trim_end(), finished.errors.trim_end());
            return Err(Failure::host(format!(
                "{mode}: the run ended with {}\n{output}\n{errors}",
                finished.status
            )));
        }
        let marks = match mode.l1 {
            L1Choice::Microvisor => Level::L1,
            L1Choice::Kvm => Level::L2,
        };
        let unreadable =
            |e: exit_trace::TraceError| Failure::internal(format!("{mode}: its exit trace: {e}"));
        let file = BufReader::new(trace.reader()?);
        let mut trace = Trace::new(file).map_err(unreadable)?;
        let sections = measure::sections(&mut trace, marks).map_err(unreadable)?;
        let said = console::read(&finished.output);
        let benchmarks = join(said, &sections).map_err(|e| {
            let errors = finished.errors.trim_end();
            Failure::host(format!("{mode}: {e}{}{errors}", if errors.is_empty() { "" } else { "\n" }))
        })?;
        Ok(report::Measured { mode, benchmarks })
    }

    fn launch(&self, mode: Mode, trace: &MemoryFile) -> Result<Launch, Failure> {
        let launch = Launch::new(child::own_program()?, ["run", "--engine", "soft", "--vmx", "on"])
            .args(&["--vmcs-access", access_name(mode.access)])
            .args(&["--trace-exits-size", TRACE_SIZE, "--trace-exits"])
            .arg(trace.path());
        let rounds = self.args.rounds;
        // Each L1 is given those of the names that it has.
        let chosen = self.args.only.iter().map(String::as_str).filter(|n| names(mode.l1).contains(n));
        let chosen = chosen.collect::<Vec<_>>().join(",");
        Ok(match mode.l1 {
            L1Choice::Microvisor => {
                let mut words = format!("bench rounds={rounds} mmu={}", mode.mmu);
                if !chosen.is_empty() {
                    words.push_str(&format!(" exactly={chosen}"));
                }
                let machine = ["--memory", "64M", "--debug-exit", "--on-reset", "exit", "--append"];
                launch.args(&machine).arg(words).arg("--kernel").arg(self.image.path())
            }
            L1Choice::Kvm => {
                let mut command = format!("nestvmm bench vmexit --engine kvm --rounds {rounds}");
                if !chosen.is_empty() {
                    command.push_str(&format!(" --exactly {chosen}"));
                }
                let (reload, ept) = match mode.mmu {
                    MmuChoice::Ept => ("", "Y"),
                    MmuChoice::ShadowOnEpt => ("rmmod kvm_intel && modprobe kvm_intel ept=0 && ", "N"),
                };
                // In case that KVM decides otherwise, for the kernel's command line or for the processor.
                let parameter = "/sys/module/kvm_intel/parameters/ept";
                let refuse =
                    format!("echo \"KVM's parameter ept is $(cat {parameter}), not {ept}\" >&2; exit 1");
                let check = format!("{{ grep -q {ept} {parameter} || {{ {refuse}; }}; }}");
                let command = format!("{reload}{check} && {command}");
                let image = self.args.image.as_deref().unwrap_or(Path::new(""));
                let image = image.to_str().ok_or_else(|| {
                    Failure::usage(format!("{}: is not UTF-8; use another name", image.display()))
                })?;
                launch.arg("--exec").arg(command).args(&["--", image])
            }
        })
    }
}

fn access_name(access: VmcsAccessChoice) -> &'static str {
    match access {
        VmcsAccessChoice::Trapped => "trapped",
        VmcsAccessChoice::Shadow => "shadow",
        VmcsAccessChoice::Direct => "direct",
    }
}

/// Joins what the guest said of each benchmark with what the trace has of it, in order.
fn join(said: Vec<Said>, sections: &[Vec<exit_trace::Chain>]) -> Result<Vec<Benchmark>, String> {
    let expected = said.iter().filter(|s| s.measured().is_some()).count();
    if expected != sections.len() {
        let remedy = if sections.is_empty() {
            "did no L2 run, or is the image's nestvmm an older one?"
        } else {
            "the trace is too long; give fewer --rounds"
        };
        let there = sections.len();
        return Err(format!(
            "the guest measured {expected} benchmarks, and its exit trace has exits of L2 for {there}: {remedy}"
        ));
    }
    let mut sections = sections.iter();
    let join = |said: Said| {
        let section = said.measured().and_then(|_| sections.next());
        Benchmark::new(said, section.map_or(&[], Vec::as_slice))
    };
    Ok(said.into_iter().map(join).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{BenchCommand, Cli, Command};
    use clap::Parser;

    fn parse(words: &str) -> Result<Vec<Mode>, Failure> {
        let words = format!("nestvmm bench exits {words}");
        match Cli::try_parse_from(words.split_whitespace()).expect("the options are right").command {
            Command::Bench(BenchCommand::Exits(args)) => modes(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn all_modes_unless_fewer_are_asked_for() {
        assert_eq!(parse("").expect("fine").len(), 6);
        assert_eq!(parse("l1.img").expect("fine").len(), 12);
        assert_eq!(parse("l1.img --l1 kvm --mmu ept,ept").expect("fine").len(), 3);
        let one = parse("--vmcs-access direct --mmu shadow-on-ept").expect("fine");
        let expected =
            Mode { l1: L1Choice::Microvisor, access: VmcsAccessChoice::Direct, mmu: MmuChoice::ShadowOnEpt };
        assert_eq!(one, [expected]);
        // Only KVM's L2 measures this.
        let only = parse("l1.img --only mmio_read --mmu ept").expect("fine");
        assert!(only.len() == 3 && only.iter().all(|m| m.l1 == L1Choice::Kvm), "{only:?}");
    }

    #[test]
    fn what_can_t_be_measured_is_refused() {
        let message = |words| parse(words).expect_err("it is refused").message;
        assert!(message("--l1 kvm").contains("give an IMAGE"));
        let unknown = message("--only cpuid,mmio_read");
        assert!(unknown.contains("--only mmio_read") && unknown.contains("microvisor has cpuid_bare, "));
    }

    #[test]
    fn sections_and_lines_must_be_as_many() {
        let said = console::read("bench cpuid 3 1 2 3 4 ns\nskip vmcall (none)\n");
        let joined = join(said, &[Vec::new()]).expect("as many");
        assert_eq!(joined.iter().map(|b| b.skipped.is_some()).collect::<Vec<_>>(), [false, true]);
        let said = console::read("bench cpuid 3 1 2 3 4 ns\n");
        assert!(join(said.clone(), &[]).expect_err("all are missing").contains("did no L2 run"));
        let two = [said.clone(), said].concat();
        assert!(join(two, &[Vec::new()]).expect_err("one is missing").contains("fewer --rounds"));
    }
}
