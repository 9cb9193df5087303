//! `nestvmm demo`: boots L1, boots L2 in it, runs a few commands there, and sums up what it took.
//!
//! The guests run in a `nestvmm run --exec` of its own, as users would start it. Lines that begin with
//! [`MARK`] are the script's and say where it is.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use scenario_runner::process::{DriveError, Launch, Process};

use crate::cli::DemoArgs;
use crate::image::{self, BuildOptions};
use crate::status::{self, Failure};
use crate::{child, image_command, interrupt};

/// What lines of the script begin with.
const MARK: &str = "@@";
/// The longest that a line is waited for.
const PATIENCE: Duration = Duration::from_secs(900);

/// Commands for L1.
const L1_COMMANDS: [&str; 3] = [
    "uname -srm",
    "grep -m1 ^model.name /proc/cpuinfo",
    "cd /sys/module/kvm_intel/parameters && grep -H . ept vpid unrestricted_guest enable_shadow_vmcs",
];
/// Commands for L2.
const L2_COMMANDS: [&str; 4] = [
    "uname -srm",
    "hostname",
    "grep MemTotal /proc/meminfo",
    "dd if=/dev/zero bs=1M count=8 2>/dev/null | sha256sum",
];

/// The script for L1, which has one for L2 in it.
fn script() -> String {
    // No command has a single quote in it: the script for L2 is in such quotes.
    let shown = |level: &str, commands: &[&str]| -> String {
        commands.iter().map(|c| format!("echo \"{MARK}{level}# {c}\"; ({c}) 2>&1; ")).collect()
    };
    format!(
        "echo {MARK}L1 up; {}echo '{MARK}L1# boot-l2'; boot-l2 --exec 'echo {MARK}L2 up; {}' 2>&1; echo {MARK}end $?",
        shown("L1", &L1_COMMANDS),
        shown("L2", &L2_COMMANDS)
    )
}

/// Runs the demonstration; the exit status.
///
/// # Errors
/// [`Failure`] with the status to end with.
pub fn demo(args: &DemoArgs) -> Result<u8, Failure> {
    interrupt::handle_signals()?;
    let result = image(args).and_then(|i| run(&i.path));
    interrupt::settle();
    result.map(|()| status::POWER_OFF)
}

/// The image to boot.
struct Image {
    path: PathBuf,
    /// Without a cache directory, what it is in until the end.
    _scratch: Option<(tempfile::TempDir, interrupt::Guard)>,
}

fn image(args: &DemoArgs) -> Result<Image, Failure> {
    if let Some(path) = &args.image {
        if !path.exists() {
            build(path)?;
        }
        return Ok(Image { path: path.clone(), _scratch: None });
    }
    if let Some(dir) = image::cache_folder() {
        let path = dir.join("demo.img");
        if !image::is_newer_than_program(&path) {
            build(&path)?;
        }
        return Ok(Image { path, _scratch: None });
    }
    let scratch = interrupt::scratch_dir(tempfile::tempdir);
    let (dir, guard) = scratch.map_err(|e| Failure::host(format!("no temporary directory: {e}")))?;
    let path = dir.path().join("demo.img");
    build(&path)?;
    Ok(Image { path, _scratch: Some((dir, guard)) })
}

fn build(path: &Path) -> Result<(), Failure> {
    println!("nestvmm image build {}", path.display());
    let options = BuildOptions { force: true, ..BuildOptions::new(path) };
    let report = image::build(options).map_err(image_command::failure)?;
    if report.l2_kernel.is_none() {
        let why = report.notices.join("; ");
        return Err(Failure::host(format!("{}: has no L2: {why}", path.display())));
    }
    println!("{report}\n");
    Ok(())
}

/// When things happened, from the start.
#[derive(Default)]
struct Times {
    l1: Option<Duration>,
    boot_l2: Option<Duration>,
    l2: Option<Duration>,
    end: Option<(Duration, u8)>,
}

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |f: &mut fmt::Formatter<'_>, what, t: Option<Duration>| match t {
            Some(t) => writeln!(f, "{what:36}{:8.2} s", t.as_secs_f64()),
            None => writeln!(f, "{what:36}       –"),
        };
        seconds(f, "from nestvmm's start to L1's init", self.l1)?;
        let l2 = self.l2.zip(self.boot_l2).map(|(up, start)| up.saturating_sub(start));
        seconds(f, "from boot-l2's start to L2's init", l2)?;
        seconds(f, "all in all", self.end.map(|(t, _)| t))
    }
}

fn run(image: &Path) -> Result<(), Failure> {
    let launch = Launch::new(child::own_program()?, ["run", "--exit-stats", "--exec"]).arg(script());
    let launch = launch.arg(image.to_string_lossy());
    println!("nestvmm run {} --exec …", image.display());
    let start = Instant::now();
    let (mut process, _guard) = child::start(&launch)?;
    process.close_input();
    let mut times = Times::default();
    while let Some(line) = next_line(&mut process)? {
        show(&line, start, &mut times);
    }
    let finished = process.finish(PATIENCE).map_err(Failure::host)?;
    let failed =
        |what: String| Failure::new(status::GUEST_CRASH, format!("{what}\n{}", finished.errors.trim_end()));
    match times.end {
        Some((_, 0)) if finished.status.success() => {}
        Some((_, status)) if finished.status.success() => {
            return Err(failed(format!("boot-l2 ended with status {status}")));
        }
        _ => return Err(failed(format!("the guests ended too early: {}", finished.status))),
    }
    println!("\n{times}\nExits, as L0 sees them:\n{}", finished.errors.trim_end());
    Ok(())
}

/// The next line of the output; `None` at its end.
fn next_line(process: &mut Process) -> Result<Option<String>, Failure> {
    let line = process.expect_match("line", PATIENCE, |bytes| {
        let end = bytes.iter().position(|b| *b == b'\n')?;
        let line = bytes.get(..end).unwrap_or_default();
        Some((String::from_utf8_lossy(line).into_owned(), end + 1))
    });
    match line {
        Ok(line) => Ok(Some(line)),
        Err(DriveError::Ended { .. }) => Ok(None),
        Err(e) => Err(Failure::host(format!("the guests are silent: {e}\n{}", process.shown()))),
    }
}

/// Shows a line, and takes note of the script's own.
fn show(line: &str, start: Instant, times: &mut Times) {
    let now = start.elapsed();
    let clock = format!("{:6.2} s", now.as_secs_f64());
    match line.strip_prefix(MARK) {
        None => println!("          {line}"),
        Some("L1 up") => {
            times.l1 = Some(now);
            println!("{clock}  L1 is up");
        }
        Some("L2 up") => {
            times.l2 = Some(now);
            println!("{clock}  L2 is up");
        }
        Some("L1# boot-l2") => {
            times.boot_l2 = Some(now);
            println!("{clock}  L1# boot-l2");
        }
        Some(mark) => match mark.strip_prefix("end ") {
            Some(status) => times.end = Some((now, status.parse().unwrap_or(u8::MAX))),
            None => println!("{clock}  {mark}"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_fit_into_the_script() {
        for command in L1_COMMANDS.iter().chain(&L2_COMMANDS) {
            assert!(!command.contains(['\'', '"', '\\', '$']), "{command}");
        }
        assert_eq!(script().matches('\'').count(), 4);
    }

    #[test]
    fn lines_of_the_script_tell_the_times() {
        let mut times = Times::default();
        for line in ["@@L1 up", "@@L1# uname", "Linux", "@@L1# boot-l2", "@@L2 up", "@@end 3"] {
            show(line, Instant::now(), &mut times);
        }
        assert!(times.l1.is_some() && times.boot_l2.is_some() && times.l2.is_some());
        assert_eq!(times.end.map(|(_, status)| status), Some(3));
        assert_eq!(times.to_string().lines().count(), 3);
    }
}
