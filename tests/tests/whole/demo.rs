//! `nestvmm demo`, the README's first command.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tests::artifacts::Kernel;
use tests::guest::{BOOT, COMMAND};
use tests::process::Launch;

/// For two boots, one in the other.
const ALL: Duration = Duration::from_secs(600);

fn demo() -> Launch {
    Launch::new(["demo", "--image"]).path(Kernel::Cloud.image_as_l2())
}

#[test]
fn it_shows_both_levels_and_sums_up() {
    let finished = demo().run(ALL);
    finished.expect_status(0);
    let lines: Vec<&str> = finished.output.lines().map(str::trim).collect();
    let at = |part: &str| {
        let found = lines.iter().position(|l| l.contains(part));
        found.unwrap_or_else(|| panic!("no {part:?} in:\n{}", finished.output))
    };
    let order = ["L1 is up", "L1# boot-l2", "L2 is up", "L2# hostname", "L1's init", "L2's init", "Exits"];
    assert!(order.map(at).is_sorted(), "{}", finished.output);
    assert_eq!(lines.get(at("L2# hostname") + 1), Some(&"l2"));
    // SHA-256 of 8 MiB of zeros.
    at("2daeb1f36095b44b318410b3f4e8b5d989dcc7bb023d1426c492dab0a3053e74");
    for part in ["VMRESUME", "forwarded to L1", "kept by L0", "guest instructions"] {
        at(part);
    }
}

/// Processes whose parent is `pid`.
fn children(pid: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").expect("there is a /proc").flatten();
    let pids = processes.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    // The parent comes second after the name (proc_pid_stat(5)).
    let parent = |child: u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split_whitespace().nth(1)?.parse().ok()
    };
    pids.filter(|child| parent(*child) == Some(pid)).collect()
}

#[test]
fn ending_it_ends_its_guests() {
    for (moment, signal, number) in
        [("nestvmm run", Signal::HUP, 1), ("L1 is up", Signal::INT, 2), ("boot-l2", Signal::TERM, 15)]
    {
        let mut process = demo().start();
        process.expect(moment, BOOT);
        let guests = children(process.id());
        process.signal(signal);
        process.finish(COMMAND).expect_status(128 + number);
        let deadline = Instant::now() + COMMAND;
        while guests.iter().any(|pid| fs::exists(format!("/proc/{pid}")).unwrap_or(true)) {
            // A process whose parent is gone may be shown until somebody has waited for it.
            let zombie =
                |pid: &u32| fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| s.contains(") Z "));
            if guests.iter().all(|pid| zombie(pid) || !fs::exists(format!("/proc/{pid}")).unwrap_or(true)) {
                break;
            }
            assert!(Instant::now() < deadline, "after {moment:?}: {guests:?} still run");
            std::thread::yield_now();
        }
    }
}
