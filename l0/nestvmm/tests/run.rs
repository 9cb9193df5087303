//! `nestvmm run` with guests of a few instructions: how each kind of end shows, and that the
//! terminal survives all of them.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

/// 32-bit code that writes `text` to the serial port.
fn print(text: &str) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov dx, 0x3f8
    for b in text.bytes() {
        code.extend([0xb0, b, 0xee]); // mov al, b; out dx, al
    }
    code
}

/// `cli; hlt`, for ever.
const HALT: [u8; 4] = [0xfa, 0xf4, 0xeb, 0xfd];
/// `ud2` without an IDT: a triple fault.
const TRIPLE_FAULT: [u8; 2] = [0x0f, 0x0b];
/// Writes 15H to isa-debug-exit.
const DEBUG_EXIT: [u8; 4] = [0xb0, 0x15, 0xe6, 0xf4];
/// Writes 6 to port CF9H: a reset.
const RESET: [u8; 8] = [0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4];
/// Echoes the serial port's input until a 'q' comes, then goes on.
const ECHO: [u8; 26] = [
    0x66, 0xba, 0xfc, 0x03, // mov dx, 0x3fc (modem control)
    0xb0, 0x0b, // mov al, DTR | RTS | OUT2: ready for input
    0xee, // out dx, al
    0x66, 0xba, 0xfd, 0x03, // again: mov dx, 0x3fd (line status)
    0xec, // wait: in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xfb, // jz wait
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0xee, // out dx, al
    0x3c, b'q', // cmp al, 'q'
    0x75, 0xed, // jne again
];

/// A multiboot 1 kernel (Multiboot Specification 0.6.96 §3.1) that runs `code` at 1 MiB.
fn kernel(dir: &Path, parts: &[&[u8]]) -> PathBuf {
    const MAGIC: u32 = 0x1bad_b002;
    /// The header says where to load.
    const FLAGS: u32 = 1 << 16;
    const LOAD: u32 = 0x10_0000;
    let code = parts.concat();
    let end = LOAD + 32 + code.len() as u32;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS);
    let header = [MAGIC, FLAGS, checksum, LOAD, LOAD, end, end, LOAD + 32];
    let mut file: Vec<u8> = header.iter().flat_map(|w| w.to_le_bytes()).collect();
    file.extend(code);
    let path = dir.join("kernel");
    std::fs::write(&path, file).unwrap();
    path
}

fn command(kernel: &Path, options: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_nestvmm"));
    c.args(["run", "--memory", "64M", "--kernel"]).arg(kernel).args(options);
    c.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    c
}

fn run(parts: &[&[u8]], options: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    command(&kernel(dir.path(), parts), options).output().unwrap()
}

/// Reads from `from` until `text` came.
fn wait_for(from: &mut impl Read, text: &str) -> String {
    let (mut seen, mut b) = (Vec::new(), [0]);
    while !seen.ends_with(text.as_bytes()) {
        match from.read(&mut b) {
            Ok(1) => seen.push(b[0]),
            other => panic!("{other:?} before {text:?}, after {:?}", String::from_utf8_lossy(&seen)),
        }
    }
    String::from_utf8_lossy(&seen).into_owned()
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn isa_debug_exit_gives_the_status() {
    let out = run(&[&DEBUG_EXIT, &HALT], &["--debug-exit"]);
    assert_eq!(out.status.code(), Some(0x15 << 1 | 1));
}

#[test]
fn a_triple_fault_is_reported() {
    let out = run(&[&TRIPLE_FAULT], &[]);
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(8), "{err}");
    for text in ["triple fault", "rip 0000000000100020", "TRIPLE_FAULT", "ud2"] {
        assert!(err.contains(text), "no {text:?} in {err}");
    }
}

#[test]
fn a_reset_ends_or_boots_again() {
    let out = run(&[&print("up\n"), &RESET], &["--on-reset", "exit"]);
    assert_eq!((out.status.code(), &out.stdout[..]), (Some(12), &b"up\n"[..]));

    let dir = tempfile::tempdir().unwrap();
    let mut child = command(&kernel(dir.path(), &[&print("up\n"), &RESET]), &[]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    for _ in 0..3 {
        wait_for(&mut stdout, "up\n");
    }
    signal(&child, Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
}

#[test]
fn a_crash_can_reset_the_machine() {
    let dir = tempfile::tempdir().unwrap();
    let k = kernel(dir.path(), &[&print("up\n"), &TRIPLE_FAULT]);
    let mut child = command(&k, &["--on-crash", "reset"]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    wait_for(&mut stdout, "up\n");
    wait_for(&mut stdout, "up\n");
    signal(&child, Signal::INT);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 2));
}

#[test]
fn input_comes_from_a_pipe_and_ctrl_a_is_only_input_there() {
    let dir = tempfile::tempdir().unwrap();
    let k = kernel(dir.path(), &[&ECHO, &DEBUG_EXIT]);
    let mut child = command(&k, &["--debug-exit"]).stdin(Stdio::piped()).spawn().unwrap();
    let long = "x".repeat(1000);
    child.stdin.take().unwrap().write_all(format!("a\x01x{long}q").as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    assert_eq!(out.status.code(), Some(0x2b));
    assert_eq!(String::from_utf8_lossy(&out.stdout), format!("a\x01x{long}q"));
}

#[test]
fn the_console_can_be_a_file_a_socket_or_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("out");
    let hello = print("hello");
    let out =
        run(&[&hello, &DEBUG_EXIT], &["--debug-exit", "--console", &format!("file:{}", file.display())]);
    assert_eq!((out.status.code(), out.stdout.len()), (Some(0x2b), 0));
    assert_eq!(std::fs::read(&file).unwrap(), b"hello");

    let out = run(&[&hello, &DEBUG_EXIT], &["--debug-exit", "--console", "none"]);
    assert_eq!((out.status.code(), out.stdout.len()), (Some(0x2b), 0));

    let socket = dir.path().join("socket");
    let k = kernel(dir.path(), &[&ECHO, &DEBUG_EXIT]);
    let options = ["--debug-exit", "--console", &format!("unix:{}", socket.display())];
    let mut child = command(&k, &options).spawn().unwrap();
    let mut client = loop {
        match UnixStream::connect(&socket) {
            Ok(c) => break c,
            Err(e) => assert!(child.try_wait().unwrap().is_none(), "{e}"),
        }
    };
    client.write_all(b"abcq").unwrap();
    wait_for(&mut client, "abcq");
    assert_eq!(child.wait().unwrap().code(), Some(0x2b));
    assert!(!socket.exists(), "the socket's file is removed");
}

#[test]
fn sigusr1_prints_exit_statistics() {
    let dir = tempfile::tempdir().unwrap();
    let k = kernel(dir.path(), &[&print("up\n"), &HALT]);
    let mut child = command(&k, &[]).spawn().unwrap();
    wait_for(child.stdout.as_mut().unwrap(), "up\n");
    signal(&child, Signal::USR1);
    wait_for(child.stderr.as_mut().unwrap(), "IO_INSTRUCTION");
    signal(&child, Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
}

#[test]
fn the_log_of_exits_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let out = run(
        &[&DEBUG_EXIT],
        &["--debug-exit", "--trace", &log.display().to_string(), "--trace-filter", "hypervisor=trace"],
    );
    assert_eq!(out.status.code(), Some(0x2b));
    let text = std::fs::read_to_string(&log).unwrap();
    assert!(text.contains("IO_INSTRUCTION") && text.contains("rip=0x100022"), "{text}");
}

/// A pseudo-terminal: our end and the guest's.
fn terminal() -> (File, File) {
    let ours: OwnedFd = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&ours).unwrap();
    unlockpt(&ours).unwrap();
    let name = ptsname(&ours, Vec::new()).unwrap();
    let path = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
    let theirs = OpenOptions::new().read(true).write(true).open(path).unwrap();
    (File::from(ours), theirs)
}

/// Runs a halting guest on a terminal, has `end` end it, and checks that the terminal was raw
/// in between and is as before after.
fn on_a_terminal(guest: &[&[u8]], end: impl FnOnce(&Child, &mut File), status: i32) {
    let (mut ours, theirs) = terminal();
    let before = tcgetattr(&theirs).unwrap();
    assert!(before.local_modes.contains(LocalModes::ICANON | LocalModes::ECHO));
    let dir = tempfile::tempdir().unwrap();
    let mut child = command(&kernel(dir.path(), guest), &[])
        .stdin(theirs.try_clone().unwrap())
        .stdout(theirs.try_clone().unwrap())
        .spawn()
        .unwrap();
    wait_for(&mut ours, "up");
    let during = tcgetattr(&theirs).unwrap();
    assert!(!during.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
    end(&child, &mut ours);
    assert_eq!(child.wait().unwrap().code(), Some(status));
    let after = tcgetattr(&theirs).unwrap();
    assert_eq!(after.local_modes, before.local_modes);
    assert_eq!(after.input_modes, before.input_modes);
    assert_eq!(after.output_modes, before.output_modes);
}

#[test]
fn the_terminal_is_restored_on_every_way_out() {
    let up = print("up");
    let halting: [&[u8]; 2] = [&up, &HALT];
    on_a_terminal(&halting, |_, t| t.write_all(b"\x01x").unwrap(), 130);
    for (s, number) in [(Signal::TERM, 15), (Signal::HUP, 1), (Signal::INT, 2), (Signal::QUIT, 3)] {
        on_a_terminal(&halting, |c, _| signal(c, s), 128 + number);
    }
    let echo_then_fault: [&[u8]; 3] = [&up, &ECHO, &TRIPLE_FAULT];
    on_a_terminal(&echo_then_fault, |_, t| t.write_all(b"q").unwrap(), 8);
}

#[test]
fn ctrl_c_and_doubled_ctrl_a_reach_the_guest() {
    let up = print("up");
    let parts: [&[u8]; 3] = [&up, &ECHO, &TRIPLE_FAULT];
    on_a_terminal(
        &parts,
        |_, t| {
            t.write_all(b"\x03\x01\x01z").unwrap();
            assert_eq!(wait_for(t, "z"), "\x03\x01z");
            t.write_all(b"q").unwrap();
        },
        8,
    );
}

/// Whether the thread of the first vCPU sleeps (proc_pid_stat(5)).
fn vcpu_sleeps(child: &Child) -> bool {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let stats = tasks.flatten().filter_map(|t| std::fs::read_to_string(t.path().join("stat")).ok());
    stats.into_iter().any(|s| s.contains("(vcpu0) S"))
}

/// Writes to the serial port for ever: out dx, al; jmp.
const FLOOD: [u8; 3] = [0xee, 0xeb, 0xfd];

#[test]
fn a_guest_whose_output_nobody_reads_can_be_ended() {
    let dir = tempfile::tempdir().unwrap();
    let k = kernel(dir.path(), &[&print("up\n"), &FLOOD]);
    let mut child = command(&k, &[]).spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    wait_for(&mut stdout, "up\n");
    // The pipe has less than a page left, and the vCPU's thread sleeps: it waits for a reader.
    let filled = || rustix::io::ioctl_fionread(&stdout).unwrap();
    let capacity = rustix::pipe::fcntl_getpipe_size(&stdout).unwrap() as u64;
    while filled() < capacity - 4096 || !vcpu_sleeps(&child) {
        std::thread::yield_now();
    }
    signal(&child, Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
}

#[test]
fn a_second_signal_ends_at_once_and_removes_the_socket() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let k = kernel(dir.path(), &[&FLOOD]);
    let option = format!("unix:{}", socket.display());
    let mut child = command(&k, &["--console", &option]).spawn().unwrap();
    // A client that connects and does not read holds the guest up.
    let client = loop {
        match UnixStream::connect(&socket) {
            Ok(c) => break c,
            Err(e) => assert!(child.try_wait().unwrap().is_none(), "{e}"),
        }
    };
    signal(&child, Signal::TERM);
    signal(&child, Signal::INT);
    let status = child.wait().unwrap().code();
    // The guest may have stopped before the second came.
    assert!(matches!(status, Some(143 | 130)), "{status:?}");
    assert!(!socket.exists(), "the socket's file is removed");
    drop(client);
}

#[test]
fn exit_stats_are_printed_at_the_end() {
    let out = run(&[&DEBUG_EXIT], &["--debug-exit", "--exit-stats"]);
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(err.contains("IO_INSTRUCTION") && err.contains("1 exits"), "{err}");
}

/// `nestvmm trace` with these arguments.
fn trace(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nestvmm")).arg("trace").args(arguments).output().unwrap()
}

#[test]
fn a_trace_has_every_exit_even_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("trace");
    let path = file.to_str().unwrap();
    let k = kernel(dir.path(), &[&print("up\n"), &ECHO, &DEBUG_EXIT]);
    let options = ["--debug-exit", "--trace-exits", path, "--trace-exits-size", "1M"];
    let mut child = command(&k, &options).stdin(Stdio::piped()).spawn().unwrap();
    wait_for(child.stdout.as_mut().unwrap(), "up\n");
    signal(&child, Signal::KILL);
    child.wait().unwrap();
    // The guest polls, so the exits are many; which of them are in the file is the killer's luck.
    let killed = trace(&["show", path]);
    assert!(killed.status.success(), "{killed:?}");
    assert!(killed.stderr.is_empty(), "{killed:?}");

    let mut child = command(&k, &options).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"q").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0x15 << 1 | 1));
    // The ring has the last: the exit that ended the run, of `out 0xf4, al` with a qualification of port and
    // size (SDM table 28-5).
    let shown = trace(&["show", path, "--reason", "io_instruction", "--level", "l1", "--owner", "l0"]);
    let text = String::from_utf8_lossy(&shown.stdout);
    let last = text.lines().last().unwrap_or_default();
    assert!(last.contains("IO_INSTRUCTION") && last.contains("qualification 0xf40040"), "{last}");
    let none = trace(&["show", path, "--level", "l2"]);
    assert!(none.status.success() && none.stdout.is_empty(), "{none:?}");
}

#[test]
fn what_is_no_trace_is_an_error_that_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "this is text, longer than a header's magic").unwrap();
    for command in [&["summary"][..], &["show"], &["export", "--output", "/dev/null"]] {
        let out = trace(&[command, &[file.to_str().unwrap()]].concat());
        let err = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(4), "{err}");
        assert!(err.contains("this is no exit trace") && err.contains(file.to_str().unwrap()), "{err}");
    }
}

/// What opening `path` as KVM's device is opened ends with; nothing if it can be opened.
fn opening(path: &Path) -> Option<std::io::Error> {
    OpenOptions::new().read(true).write(true).open(path).err()
}

/// Runs a guest that ends with a debug exit with this device for KVM; what is on standard error.
fn run_with_device(kernel: &Path, device: &Path, options: &[&str]) -> String {
    let out = command(kernel, options).env("NESTVMM_KVM", device).output().unwrap();
    let errors = String::from_utf8_lossy(&out.stderr).into_owned();
    // isa-debug-exit: (15H << 1) | 1.
    assert_eq!(out.status.code(), Some(0x2b), "{options:?}: {errors}");
    errors
}

#[test]
fn auto_goes_on_without_kvm_and_says_why() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let kernel = kernel(dir.path(), &[&DEBUG_EXIT, &HALT]);
    let missing = dir.path().join("no-kvm");
    let closed = dir.path().join("closed");
    File::create(&closed).unwrap().set_permissions(std::fs::Permissions::from_mode(0o000)).unwrap();
    // Root may open the file, and finds that it is none of KVM's.
    let no_kvm = || std::io::Error::from_raw_os_error(rustix::io::Errno::NOTTY.raw_os_error());
    let devices = [
        (missing.clone(), "opening the device that NESTVMM_KVM names", opening(&missing).unwrap()),
        (dir.path().into(), "opening the device that NESTVMM_KVM names", opening(dir.path()).unwrap()),
        match opening(&closed) {
            Some(e) => (closed, "opening the device that NESTVMM_KVM names", e),
            None => (closed, "KVM_GET_API_VERSION", no_kvm()),
        },
        ("/dev/null".into(), "KVM_GET_API_VERSION", no_kvm()),
    ];
    for (device, call, cause) in &devices {
        for vmx in ["on", "off"] {
            let options = ["--debug-exit", "--engine", "auto", "--vmx", vmx];
            let errors = run_with_device(&kernel, device, &options);
            assert_eq!(errors.lines().count(), 1, "{errors}");
            let expected = format!("--engine auto takes soft: KVM can't be used: {call} failed: {cause}");
            assert!(errors.contains(&expected), "no {expected:?} in {errors:?}");
        }
        // Nobody asked.
        assert_eq!(run_with_device(&kernel, device, &["--debug-exit"]), "");
        // Who asks for KVM gets it or an error.
        let options = ["--debug-exit", "--engine", "kvm"];
        let out = command(&kernel, &options).env("NESTVMM_KVM", device).output().unwrap();
        assert_eq!(out.status.code(), Some(6));
    }
}

#[test]
fn auto_says_what_it_takes_whatever_the_host_has() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = kernel(dir.path(), &[&DEBUG_EXIT, &HALT]);
    for (vmx, engines) in [("on", &["soft"][..]), ("off", &["soft", "kvm"])] {
        let out = command(&kernel, &["--debug-exit", "--engine", "auto", "--vmx", vmx]).output().unwrap();
        let errors = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(0x2b), "{errors}");
        let said = engines.iter().any(|e| errors.contains(&format!("--engine auto takes {e}: ")));
        assert!(said && errors.lines().count() == 1, "{errors}");
    }
}
