//! Killing nestvmm while it builds an image: no process and no temporary file is left, and what was
//! there before is unharmed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use scenario_runner::process::{Launch, Process};

const LIMIT: Duration = Duration::from_secs(60);
const SIGNALS: [(Signal, i32); 4] =
    [(Signal::TERM, 15), (Signal::INT, 2), (Signal::HUP, 1), (Signal::QUIT, 3)];

/// A bzImage header by Documentation/arch/x86/boot.rst, with nothing behind it.
fn fake_kernel() -> Vec<u8> {
    let mut k = vec![0; 4096];
    for (at, bytes) in [
        (0x1f1, &[1][..]),
        (0x1fe, &[0x55, 0xaa]),
        (0x200, &[0xeb, 0x6a]),
        (0x202, b"HdrS"),
        (0x206, &0x20f_u16.to_le_bytes()),
        (0x20e, &0x100_u16.to_le_bytes()),
        (0x211, &[1]),
        (0x238, &2047_u32.to_le_bytes()),
        (0x300, b"6.9.0-test"),
    ] {
        k[at..at + bytes.len()].copy_from_slice(bytes);
    }
    k
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn build(output: &Path, cache: &Path, options: &[&str]) -> Launch {
    let launch = Launch::new(env!("CARGO_BIN_EXE_nestvmm"), ["image", "build", "--force"]).args(options);
    launch.arg(output.to_str().unwrap()).env("XDG_CACHE_HOME", cache.to_str().unwrap())
}

fn end(mut process: Process) -> (Option<i32>, String) {
    let finished = process.finish(LIMIT).unwrap();
    (finished.status.code(), finished.errors)
}

#[test]
fn while_the_image_is_written() {
    let parts = tempfile::tempdir().unwrap();
    let at = |name: &str| parts.path().join(name);
    fs::write(at("vmlinuz"), fake_kernel()).unwrap();
    // Takes a while to write.
    fs::File::create(at("big")).unwrap().set_len(96 << 20).unwrap();
    let out = tempfile::tempdir().unwrap();
    let image = out.path().join("l1.img");
    for (signal, number) in SIGNALS {
        fs::write(&image, b"precious").unwrap();
        let options = [
            "--kernel-file",
            at("vmlinuz").to_str().unwrap(),
            // It is only looked at for being static.
            "--busybox",
            env!("CARGO_BIN_EXE_nestvmm"),
            "--file",
            &format!("{}=/big", at("big").display()),
            "--l2",
            "off",
        ]
        .map(str::to_owned);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let mut process = build(&image, &at("cache"), &options).start().unwrap();
        process.expect_error("writing", LIMIT).unwrap();
        process.signal(signal).unwrap();
        let (status, errors) = end(process);
        assert_eq!(names(out.path()), ["l1.img"], "{signal:?}: {errors}");
        if status == Some(0) {
            // The signal came when all was done.
            assert!(fs::metadata(&image).unwrap().len() > 96 << 20);
        } else {
            assert_eq!(status, Some(128 + number), "{errors}");
            assert_eq!(fs::read(&image).unwrap(), b"precious", "{signal:?}");
        }
        assert_eq!(names(&at("cache/nestvmm")), ["packages"]);
    }
}

/// Whether a process is there and is not only waited for.
fn runs(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
    stat.is_ok_and(|s| s.rsplit_once(") ").is_some_and(|(_, s)| !s.starts_with(['Z', 'X'])))
}

/// Looks again and again until `done` says yes: nobody tells of other programs' files and ends.
fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn while_a_package_is_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    // An apt that never comes to an end, with a process of its own that fetches.
    fs::create_dir(at("bin")).unwrap();
    let stanza = "Package: linux-image-cloud-amd64\nVersion: 1\nFilename: pool/k.deb\nSize: 5\nSHA256: 00\n";
    let programs = [
        ("apt-cache", format!("#!/bin/sh\ncat <<'END'\n{stanza}END\n")),
        (
            "apt-get",
            format!(
                "#!/bin/sh\n: >k.part\nsleep 1000 &\necho $$ >{0}\necho $! >>{0}\nwait\n",
                at("pids").display()
            ),
        ),
    ];
    for (name, text) in programs {
        let path = at("bin").join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let search = format!("{}:{}", at("bin").display(), std::env::var("PATH").unwrap());
    for (signal, number) in SIGNALS {
        let mut process = build(&at("l1.img"), &at("cache"), &[]).env("PATH", &search).start().unwrap();
        process.expect_error("downloading linux-image-cloud-amd64 1", LIMIT).unwrap();
        let pids = || fs::read_to_string(at("pids")).unwrap_or_default();
        until("apt-get starts", || pids().lines().count() == 2);
        process.signal(signal).unwrap();
        let (status, errors) = end(process);
        assert_eq!(status, Some(128 + number), "{errors}");
        until("apt's processes end", || !pids().lines().any(runs));
        fs::remove_file(at("pids")).unwrap();
        assert_eq!(names(&at("cache/nestvmm")), ["packages"]);
        assert_eq!(names(&at("cache/nestvmm/packages")), Vec::<String>::new());
        assert!(!at("l1.img").exists());
    }
}
