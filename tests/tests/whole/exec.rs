//! `nestvmm run --exec`: a command's input, output and status, from a guest.

use std::fs;
use std::path::Path;

use scenario_runner::process::Launch;
use tests::artifacts::Kernel;
use tests::guest::{BOOT, COMMAND};
use tests::process::{Finished, Launch as Nestvmm};
use tests::program;

fn exec(command: &str, options: &[&str]) -> Nestvmm {
    Nestvmm::new(["run", "--exec", command]).path(Kernel::Cloud.image()).args(options)
}

fn status_file(dir: &tempfile::TempDir) -> String {
    dir.path().join("status").to_str().expect("test paths are UTF-8").to_owned()
}

#[track_caller]
fn fails(finished: &Finished, parts: &[&str]) {
    finished.expect_status(125);
    for part in parts {
        assert!(finished.errors.contains(part), "no {part:?} in: {}", finished.errors);
    }
}

#[test]
fn input_output_and_status_are_the_commands() {
    let dir = tempfile::tempdir().expect("the host has a temporary folder");
    let file = status_file(&dir);
    // More than the terminal layer, the serial port and a pipe hold together, with every value of a byte.
    let input: Vec<u8> = (0..200_000_u32).map(|i| (i ^ i >> 8) as u8).collect();
    let command =
        "wc -c; sha256sum </dev/null; echo to errors >&2; printf 'no end'; (sleep 1000 &) ; exit 125";
    let mut process = exec(command, &["--exec-status", &file]).start();
    process.type_bytes(&input);
    process.close_input();
    let finished = process.finish(BOOT);
    // The command's own 125 and not nestvmm's.
    finished.expect_status(125);
    assert_eq!(fs::read_to_string(&file).expect("it was written"), "exited 125\n");
    // SHA-256 of nothing: FIPS 180-4 test vectors.
    let nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  -\n";
    // Nothing of the kernel's in between.
    assert_eq!(finished.output, format!("{}\n{nothing}no end", input.len()));
    assert_eq!(finished.errors, "to errors\n");
}

#[test]
fn input_arrives_unchanged() {
    let input: Vec<u8> = (0..20_000_u32).map(|i| (i ^ i >> 8) as u8).collect();
    let mut process = exec("od -v -An -tx1", &[]).start();
    process.type_bytes(&input);
    process.close_input();
    let finished = process.finish(BOOT);
    finished.expect_status(0);
    let bytes: Vec<u8> = finished
        .output
        .split_whitespace()
        .map(|b| u8::from_str_radix(b, 16).expect("od prints hexadecimal numbers"))
        .collect();
    assert!(bytes == input, "{} of {} bytes", bytes.len(), input.len());
}

#[test]
fn a_command_that_a_signal_ends() {
    let dir = tempfile::tempdir().expect("the host has a temporary folder");
    let file = status_file(&dir);
    let finished = exec("kill -9 $$", &["--exec-status", &file]).run(BOOT);
    finished.expect_status(128 + 9);
    assert_eq!(fs::read_to_string(&file).expect("it was written"), "signal 9\n");
}

#[test]
fn a_guest_that_ends_before_its_command() {
    let dir = tempfile::tempdir().expect("the host has a temporary folder");
    let file = status_file(&dir);
    let finished = exec("poweroff -f", &["--exec-status", &file]).run(BOOT);
    fails(&finished, &["powered off before the command ended", "reboot: Power down"]);
    assert_eq!(fs::read_to_string(&file).expect("it was written"), "unknown\n");
    // The kernel's last words are shown.
    let finished = exec("echo c > /proc/sysrq-trigger", &[]).run(BOOT);
    fails(&finished, &["reset the machine before the command ended", "Kernel panic - not syncing"]);
}

#[test]
fn nobody_reads_the_output_any_more() {
    let image = Kernel::Cloud.image().to_str().expect("test paths are UTF-8");
    let nestvmm = program::path().to_str().expect("test paths are UTF-8");
    let script = "(\"$0\" run \"$1\" --exec yes; echo status $? >&2) | head -n 1";
    let mut shell = Launch::new("/bin/sh", ["-c", script, nestvmm, image]).start().expect("there is a shell");
    let finished = shell.finish(BOOT).expect("it ends by itself");
    assert_eq!((finished.output.as_str(), finished.errors.as_str()), ("y\n", "status 141\n"));
}

#[test]
fn guests_that_know_nothing_of_it() {
    let (kernel, _) = Kernel::Cloud.files();
    let plain =
        |options: &[&str]| Nestvmm::new(["run", "--exec", "true", "--kernel"]).path(&kernel).args(options);
    fails(&plain(&[]).run(COMMAND), &["nestvmm image build", "there is no initrd"]);
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let other = other.to_str().expect("test paths are UTF-8");
    fails(&plain(&["--initrd", other]).run(COMMAND), &["nestvmm image build", other]);
    // Mistakes in usage are not the command's status either.
    fails(&plain(&["--no-such-option"]).run(COMMAND), &["--no-such-option"]);
    fails(&plain(&["--console", "stdio"]).run(COMMAND), &["--console stdio"]);
}
