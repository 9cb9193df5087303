//! The user's terminal. That every way out restores it is tested beside the program; here are
//! stopping and going on, the escape keys, and a shell.

use rustix::process::Signal;
use tests::artifacts::Kernel;
use tests::guest::{self, COMMAND, Guest};
use tests::payload::Payload;
use tests::process::{Modes, Process};

use crate::payloads::{LIMIT, launch};

/// A payload on a terminal, in raw mode, and the modes from before.
///
/// The terminal's modes are changed before the guest prints, so "ready" says that they are.
fn on_terminal(payload: &Payload, options: &[&str]) -> (Process, Modes, tempfile::TempDir) {
    let (launch, dir) = launch(payload, options);
    let mut process = launch.start_on_terminal();
    let before = process.initial_modes().clone();
    assert!(before.is_cooked());
    process.expect("ready", LIMIT);
    (process, before, dir)
}

/// A payload that spins on a terminal.
fn spinning() -> (Process, Modes, tempfile::TempDir) {
    let (process, before, dir) = on_terminal(&Payload::new().print("ready").spin(), &[]);
    assert!(!process.terminal_modes().is_cooked(), "keys go to the guest one by one");
    (process, before, dir)
}

#[track_caller]
fn ends_restored(process: Process, before: &Modes, status: i32) {
    let (finished, after) = process.finish_on_terminal(LIMIT);
    finished.expect_status(status);
    assert_eq!(after, *before);
}

#[test]
fn lent_back_while_stopped() {
    let (process, before, _dir) = spinning();
    let raw = process.terminal_modes();
    process.signal(Signal::TSTP);
    process.expect_stopped(LIMIT);
    assert_eq!(process.terminal_modes(), before);
    process.signal(Signal::CONT);
    process.expect_modes(&raw, LIMIT);
    process.signal(Signal::TERM);
    ends_restored(process, &before, 128 + 15);
}

#[test]
fn escape_keys() {
    // The guest echoes what it gets: l: in al, 0x3fd; test al, 1; jz l; in al, 0x3f8; out 0x3f8, al.
    let echo = Payload::new()
        .print("ready")
        .code(&[0xba, 0xfd, 0x03, 0x00, 0x00, 0xec, 0xa8, 0x01, 0x74, 0xf6])
        .code(&[0xba, 0xf8, 0x03, 0x00, 0x00, 0xec, 0xee, 0xeb, 0xed]);
    // Data terminal ready, request to send, OUT2: the terminal at the other end waits for them.
    let echo = Payload::new().out8(0x3fc, 0xb).code(echo.machine_code());
    let (mut process, before, _dir) = on_terminal(&echo, &[]);
    // Ctrl-C and friends are for the guest.
    process.type_bytes(b"a\x03\x1a\x1cb");
    process.expect("a\x03\x1a\x1cb", LIMIT);
    process.type_bytes(b"\x01\x01c");
    process.expect("\x01c", LIMIT);
    process.type_bytes(b"\x01h");
    process.expect("Ctrl-A x", LIMIT);
    process.type_bytes(b"\x01s");
    process.expect("guest instructions", LIMIT);
    process.type_bytes(b"\x01v");
    process.expect("L1 is not in VMX operation: it has no VMCS12.", LIMIT);
    process.expect("Guest RIP", LIMIT);
    // Anything else after Ctrl-A is dropped, and what follows is the guest's again.
    process.type_bytes(b"\x01zQ~");
    process.expect("Q~", LIMIT);
    process.type_bytes(b"\x01x");
    ends_restored(process, &before, 130);
}

#[test]
fn a_shell_on_a_terminal() {
    let mut guest = Guest::boot_on_terminal(&guest::launch(Kernel::Cloud, &[]));
    let before = guest.process().initial_modes().clone();
    assert_eq!(guest.succeed("test -t 0 && tty"), "/dev/ttyS0\n");
    // Ctrl-C ends the command in the guest, not the run; the shell says so by its status.
    let process = guest.process();
    // Printed by the command itself: it is in the terminal's foreground by then, so that Ctrl-C is its.
    process.type_bytes(b"sh -c \"echo st''art; exec sleep 1000\"\n");
    process.expect("start", COMMAND);
    process.type_bytes(b"\x03");
    process.type_bytes(b"echo stat''us=$?.\n");
    process.expect("status=130.", COMMAND);
    process.expect("l1:~# ", COMMAND);
    // Ctrl-D leaves the shell, which powers off.
    let mut process = guest.into_process();
    process.type_bytes(b"\x04");
    ends_restored(process, &before, 0);
}
