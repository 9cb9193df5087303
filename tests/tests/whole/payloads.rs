//! Bare-metal test kernels. How each kind of end shows is tested beside the program; here is what
//! such kernels find in the machine.

use std::time::Duration;

use tempfile::TempDir;
use tests::payload::Payload;
use tests::process::{Finished, Launch};

/// Far more than a few instructions take.
pub const LIMIT: Duration = Duration::from_secs(60);

/// `nestvmm run PAYLOAD` with `options`; the payload's folder has to live as long as the run.
pub fn launch(payload: &Payload, options: &[&str]) -> (Launch, TempDir) {
    let dir = tempfile::tempdir().expect("the host has a temporary folder");
    let path = payload.write(&dir);
    (Launch::new(["run", "--memory", "64M"]).args(options).path(&path), dir)
}

fn run(payload: &Payload, options: &[&str]) -> Finished {
    let (launch, _dir) = launch(payload, options);
    launch.run(LIMIT)
}

#[test]
fn without_the_option_there_is_no_debug_exit() {
    // Nobody claims the port, so the write is dropped, and the program comes to its reset.
    let payload = Payload::new().exit(0).print("still here").out8(0xcf9, 6).spin();
    let finished = run(&payload, &["--on-reset", "exit"]);
    finished.expect_status(12);
    assert_eq!(finished.output, "still here");
}

#[test]
fn every_way_to_reset() {
    // Reset control register; keyboard controller's pulse of line 0; fast reset at port 0x92.
    for (port, value) in [(0xcf9, 6), (0x64, 0xfe), (0x92, 1)] {
        run(&Payload::new().out8(port, value).spin(), &["--on-reset", "exit"]).expect_status(12);
    }
}

#[test]
fn exit_statistics_count_every_exit() {
    let payload = Payload::new().cpuid_loop(1000).exit(0);
    let finished = run(&payload, &["--debug-exit", "--exit-stats"]);
    finished.expect_status(1);
    let count = |reason: &str| {
        let line = finished.errors.lines().find(|l| l.split_whitespace().next() == Some(reason));
        line.and_then(|l| l.split_whitespace().nth(1)).map(str::to_owned)
    };
    assert_eq!(count("CPUID").as_deref(), Some("1000"), "{}", finished.errors);
    assert_eq!(count("IO_INSTRUCTION").as_deref(), Some("1"), "{}", finished.errors);
    assert!(finished.errors.contains("guest instructions"), "{}", finished.errors);
}

#[test]
fn the_test_device_latches_and_maps_memory() {
    // What is written to port 0xe0 comes back.
    let latch = Payload::new().out32(0xe0, 0x1234_5629).in32(0xe0).exit_with_al();
    run(&latch, &["--debug-exit", "--testdev"]).expect_status(0x29 << 1 | 1);
    // So does what is written to its memory: mov byte [0xff000123], 0x2a; mov al, [0xff000123].
    let memory = Payload::new()
        .code(&[0xc6, 0x05, 0x23, 0x01, 0x00, 0xff, 0x2a])
        .code(&[0xa0, 0x23, 0x01, 0x00, 0xff])
        .exit_with_al();
    run(&memory, &["--debug-exit", "--testdev"]).expect_status(0x2a << 1 | 1);
}

#[test]
fn the_test_device_raises_interrupt_lines() {
    // Initialize the master 8259 (ICW1–ICW4), raise IRQ 5, select the request register (OCW3), read it.
    let payload = [(0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0x2005, 1), (0x20, 0x0a)]
        .iter()
        .fold(Payload::new(), |p, (port, value)| p.out8(*port, *value))
        .in8(0x20)
        // and al, 0x20: other lines may be up.
        .code(&[0x24, 0x20])
        .exit_with_al();
    run(&payload, &["--debug-exit", "--testdev"]).expect_status(0x20 << 1 | 1);
}

#[test]
fn the_command_line_reaches_a_multiboot_kernel() {
    // mov esi, [ebx+16]: cmdline of the information structure (§3.3). Print until the final zero:
    // mov edx, 0x3f8; l: lodsb; test al, al; jz +3; out dx, al; jmp l.
    let payload = Payload::new()
        .code(&[0x8b, 0x73, 0x10, 0xba, 0xf8, 0x03, 0x00, 0x00])
        .code(&[0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8])
        .exit(0);
    let finished = run(&payload, &["--debug-exit", "--append", "alpha beta=2"]);
    finished.expect_status(1);
    assert!(finished.output.ends_with("alpha beta=2"), "{:?}", finished.output);
}

#[test]
fn the_last_words_before_a_crash_are_printed() {
    let finished = run(&Payload::new().print("last words").triple_fault(), &[]);
    finished.expect_status(8);
    assert_eq!(finished.output, "last words");
    // The report shows the register that the payload set and the exits before.
    for word in ["12345678", "IO_INSTRUCTION"] {
        assert!(finished.errors.contains(word), "no {word:?} in: {}", finished.errors);
    }
}
