//! `nestvmm scenario`: the shipped scenarios pass, and what is wrong is reported.

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;
use tests::artifacts::Kernel;
use tests::payload::Payload;
use tests::process::{Finished, Launch};

/// For a run that boots nothing larger than a few instructions.
const LIMIT: Duration = Duration::from_secs(60);
/// For the shipped ones, on a busy host.
const ALL_LIMIT: Duration = Duration::from_secs(3000);
/// Time limits are written for an idle host; the other tests run at the same time.
const PATIENCE: &str = "4";

/// Runs the shipped scenarios that `options` choose; all have to pass.
fn shipped(options: &[&str]) {
    let dir = tempfile::tempdir().expect("the host has a temporary folder");
    let demo = format!("demo={}", Kernel::Cloud.image_as_l2().display());
    let finished = Launch::new(["scenario", "run", "all", "--patience", PATIENCE, "--guest", &demo])
        .args(options)
        .arg("--json")
        .path(&dir.path().join("results.json"))
        .arg("--logs")
        .path(&dir.path().join("logs"))
        .run(ALL_LIMIT);
    let consoles = fs::read_dir(dir.path().join("logs")).into_iter().flatten().flatten();
    let consoles: String =
        consoles.map(|f| fs::read_to_string(f.path()).unwrap_or_default() + "\n====\n").collect();
    assert_eq!(finished.status.code(), Some(0), "{}\n{}\n{consoles}", finished.output, finished.errors);
    let json = fs::read_to_string(dir.path().join("results.json")).expect("results were written");
    assert!(json.contains("\"failed\": 0") && !json.contains("\"passed\": 0"), "{json}");
    println!("{}", finished.output);
}

#[test]
fn shipped_scenarios_pass() {
    shipped(&["--skip", "slow", "--jobs", "1"]);
}

#[test]
#[ignore = "takes minutes; .ci/run runs it"]
fn slow_shipped_scenarios_pass() {
    shipped(&["--tag", "slow", "--jobs", "2"]);
}

/// A folder with the payload `kernel` and the scenario `one.toml`.
fn folder(payload: &Payload, scenario: &str) -> TempDir {
    let dir = tempfile::tempdir().expect("the host has a temporary folder");
    fs::rename(payload.write(&dir), dir.path().join("kernel")).expect("the folder is writable");
    let head = "description = \"x\"\n";
    fs::write(dir.path().join("one.toml"), format!("{head}{scenario}")).expect("the folder is writable");
    dir
}

fn launch(dir: &Path, command: &str) -> Launch {
    Launch::new(["scenario", command]).path(&dir.join("one.toml"))
}

fn run(dir: &Path) -> Finished {
    launch(dir, "run").arg("--logs").path(&dir.join("logs")).run(LIMIT)
}

const KERNEL: &str = "[run]\nkernel = \"kernel\"\nmemory = \"64M\"\ndebug-exit = true\n";

#[test]
fn what_passes_and_what_fails() {
    let payload = Payload::new().print("ready\n").cpuid_loop(100).exit(0);
    let text = |count: u32| {
        format!(
            "{KERNEL}[[steps]]\nexpect = \"ready\"\n[end]\nstatus = 1\n[[checks]]\ncount = \"L1.CPUID == {count}\"\n"
        )
    };
    let dir = folder(&payload, &text(100));
    let finished = run(dir.path());
    finished.expect_status(0);
    assert!(finished.output.contains("1 passed, 0 failed"), "{}", finished.output);
    assert!(!dir.path().join("logs").exists());

    let dir = folder(&payload, &text(99));
    let junit = dir.path().join("results.xml");
    let finished = launch(dir.path(), "run")
        .arg("--logs")
        .path(&dir.path().join("logs"))
        .arg("--junit")
        .path(&junit)
        .run(LIMIT);
    finished.expect_status(14);
    let why = "L1.CPUID == 99: L1.CPUID = 100";
    assert!(finished.output.contains(why), "{}", finished.output);
    assert!(fs::read_to_string(&junit).is_ok_and(|x| x.contains(why) && x.contains("failures=\"1\"")));
    let console = fs::read_to_string(dir.path().join("logs/one.console"));
    assert_eq!(console.expect("the console is kept"), "ready\n");
}

#[test]
fn a_mistake_is_shown_with_its_place() {
    let dir = folder(&Payload::new(), "[run]\nkernel = \"kernel\"\nmemroy = \"64M\"\n");
    for command in ["run", "check", "list"] {
        let finished = launch(dir.path(), command).run(LIMIT);
        finished.expect_status(4);
        let place = format!("{}:4:1: unknown option memroy", dir.path().join("one.toml").display());
        assert!(finished.errors.contains(&place), "{}", finished.errors);
    }
    let finished = Launch::new(["scenario", "run", "nothing-like-this"]).run(LIMIT);
    finished.expect_status(4);
    assert!(finished.errors.contains("scenario list"), "{}", finished.errors);
}

/// The processes whose parent is `pid` (proc_pid_stat(5): the second field after the name).
fn children(pid: u32) -> Vec<u32> {
    let all = fs::read_dir("/proc").expect("there is a /proc").flatten();
    let numbers = all.filter_map(|e| e.file_name().to_str()?.parse().ok());
    let parent = |child: &u32| {
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    numbers.filter(|n| parent(n) == Some(pid)).collect()
}

#[test]
fn a_signal_stops_all_runs() {
    let dir = folder(
        &Payload::new().print("ready\n").spin(),
        &format!("{KERNEL}[[steps]]\nexpect-error = \"never\"\n[matrix]\nn = [1, 2, 3]\n"),
    );
    let mut process =
        launch(dir.path(), "run").args(&["--jobs", "2"]).arg("--logs").path(&dir.path().join("logs")).start();
    // Nothing tells when both have started, so it is looked at again and again.
    let deadline = std::time::Instant::now() + LIMIT;
    let mut running = Vec::new();
    while running.len() < 2 {
        assert!(std::time::Instant::now() < deadline, "{running:?}");
        running = children(process.id());
    }
    process.signal(Signal::INT);
    process.close_input();
    let finished = process.finish(LIMIT);
    finished.expect_status(130);
    assert!(finished.output.contains("0 passed, 0 failed, 3 stopped"), "{}", finished.output);
    for child in running {
        assert!(!Path::new(&format!("/proc/{child}")).exists(), "{child} is left");
    }
}
