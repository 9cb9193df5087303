//! Bad input on the command line: one clear message and the right status, and never a panic.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn nestvmm(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nestvmm"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("nestvmm starts")
}

/// Runs, and checks status and that standard error is one message which has all of `words`.
fn fails(args: &[&str], status: i32, words: &[&str]) {
    let out = nestvmm(args);
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(status), "{args:?}: {err}");
    assert!(!err.contains("panicked"), "{args:?}: {err}");
    for w in words {
        assert!(err.contains(w), "{args:?}: no {w:?} in: {err}");
    }
    if status != 2 {
        assert_eq!(err.lines().count(), 1, "{args:?}: {err}");
    }
}

fn file(dir: &tempfile::TempDir, name: &str, data: &[u8]) -> String {
    let path: PathBuf = dir.path().join(name);
    fs::File::create(&path).unwrap().write_all(data).unwrap();
    path.display().to_string()
}

/// The first sector of a bzImage with nothing after it (Documentation/arch/x86/boot.rst).
fn truncated_bzimage() -> Vec<u8> {
    let mut v = vec![0; 0x400];
    v[0x1f1] = 4;
    v[0x1fe] = 0x55;
    v[0x1ff] = 0xaa;
    v[0x202..0x206].copy_from_slice(b"HdrS");
    v[0x206] = 0x0f;
    v[0x207] = 2;
    v
}

#[test]
fn missing_files_are_named() {
    fails(&["run", "/no/such/image"], 4, &["/no/such/image"]);
    fails(&["run", "--kernel", "/no/such/kernel"], 4, &["/no/such/kernel"]);
    fails(&["image", "inspect", "/no/such/image"], 4, &["/no/such/image"]);
}

#[test]
fn files_that_are_no_images() {
    let dir = tempfile::tempdir().unwrap();
    let empty = file(&dir, "empty", b"");
    let text = file(&dir, "text", b"this is not a kernel\n");
    let cut = file(&dir, "cut", &truncated_bzimage());
    fails(&["run", &empty], 4, &[&empty, "empty"]);
    fails(&["run", "--kernel", &empty], 4, &[&empty, "empty"]);
    fails(&["run", &text], 4, &[&text]);
    fails(&["run", "--kernel", &text], 4, &[&text]);
    fails(&["run", &cut], 4, &[&cut]);
    fails(&["run", &dir.path().display().to_string()], 4, &["directory"]);
    fails(&["image", "inspect", &text], 4, &[&text]);
}

#[test]
fn unreadable_files() {
    // /proc/self/mem opens, but its start can't be read, not even by root.
    let path = "/proc/self/mem";
    if Path::new(path).exists() {
        fails(&["run", "--kernel", path], 4, &[path]);
    }
}

#[test]
fn bad_initrds_and_modules_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = file(&dir, "k", &truncated_bzimage());
    fails(&["run", "--kernel", &kernel, "--initrd", "/no/such/initrd"], 4, &["/no/such/initrd"]);
    fails(&["run", "--kernel", &kernel, "--module", "/no/such/module arg"], 4, &["/no/such/module"]);
}

#[test]
fn bad_usage() {
    fails(&["run"], 2, &["IMAGE"]);
    fails(&["run", "x", "--no-such-option"], 2, &["--no-such-option"]);
    fails(&["no-such-command"], 2, &["no-such-command"]);
    fails(&["run", "x", "--ept02-pages", "255"], 2, &["255", "256..=1048576"]);
    fails(&["run", "x", "--ept02-pages", "1048577"], 2, &["1048577", "256..=1048576"]);
    fails(&["run", "x", "--memory", "63M"], 2, &["63M", "64 MiB"]);
    fails(&["run", "x", "--memory", "lots"], 2, &["lots"]);
    fails(&["run", "x", "--engine", "warp"], 2, &["warp", "soft"]);
    fails(&["run", "x", "--console", "tcp:1"], 2, &["tcp:1", "stdio"]);
    fails(&["run", "x", "--trace-filter", "debug"], 2, &["--trace"]);
    fails(&["run", "x", "--trace", "/dev/null", "--trace-filter", "=="], 2, &["--trace-filter"]);
}

#[test]
fn more_memory_than_the_host_has() {
    fails(
        &["run", "x", "--engine", "kvm", "--ept-sync", "write-protect"],
        2,
        &["--ept-sync", "--engine soft"],
    );
    fails(&["run", "x", "--memory", "100000T"], 6, &["--memory", "this host"]);
}

#[test]
fn outputs_that_can_not_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = file(&dir, "k", &truncated_bzimage());
    fails(&["run", "--kernel", &kernel, "--console", "file:/no/such/dir/f"], 4, &["/no/such/dir/f"]);
    fails(&["run", "--kernel", &kernel, "--trace", "/no/such/dir/t"], 4, &["/no/such/dir/t"]);
    let there = file(&dir, "socket", b"x");
    fails(&["run", "--kernel", &kernel, "--console", &format!("unix:{there}")], 4, &[&there]);
    assert_eq!(fs::read(&there).unwrap(), b"x", "a file that was there is left alone");
}

#[test]
fn help_names_the_statuses() {
    for args in [&["--help"][..], &["run", "--help"]] {
        let out = nestvmm(args);
        assert!(out.status.success());
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(text.contains("Exit status") && text.contains("the guest crashed"), "{text}");
    }
}

#[test]
fn doctor_prints_json() {
    let out = nestvmm(&["doctor", "--json"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let v: serde_json::Value = serde_json::from_slice(&out.stdout).expect("valid JSON");
    assert_eq!(v["chosen"]["vmx"]["engine"], "soft", "VMX is incomplete with KVM: {v}");
    assert!(["soft", "kvm"].map(Some).contains(&v["chosen"]["plain"]["engine"].as_str()), "{v}");
    assert!(v["chosen"]["plain"]["why"].is_string(), "{v}");
    assert_eq!(v["engines"][0]["usable"], true, "{v}");
    for figure in ["cpl0_instructions_per_second", "cpl3_instructions_per_second", "exit_ns"] {
        assert!(v["engines"][0]["figures"][figure]["value"].as_f64() > Some(0.0), "{v}");
    }
    assert_eq!(v["vmx_traps"][0]["method"], "software", "{v}");
    assert!(v["vmx_traps"][0]["ns"]["value"].as_f64() > Some(0.0), "{v}");
    assert!(v["cpu"]["vendor"].is_string() && v["kvm"]["state"].is_string());
}

#[test]
fn bench_engines_writes_json() {
    let dir = tempfile::tempdir().unwrap();
    let json = dir.path().join("engines.json");
    for (device, has_kvm) in [(None, None), (Some("/dev/null"), Some(false))] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nestvmm"));
        command.args(["bench", "engines", "--rounds", "5", "--json"]).arg(&json);
        if let Some(device) = device {
            command.env("NESTVMM_KVM", device);
        }
        let out = command.output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let table = String::from_utf8_lossy(&out.stdout);
        assert_eq!(table.lines().count(), 10, "{table}");
        let v: serde_json::Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
        let mut figures = vec![&v["hand_over_ns"]];
        for (engine, name) in [(0, "soft"), (1, "kvm")] {
            assert_eq!(v["engines"][engine]["name"], name);
            let f = &v["engines"][engine]["figures"];
            figures.extend(
                ["cpl0_instructions_per_second", "cpl3_instructions_per_second", "exit_ns"].map(|n| &f[n]),
            );
        }
        for (i, method) in ["software", "emulation-failure", "breakpoint"].into_iter().enumerate() {
            assert_eq!(v["vmx_traps"][i]["method"], method);
            figures.push(&v["vmx_traps"][i]["ns"]);
        }
        for figure in &figures {
            assert!(figure["value"].as_f64() > Some(0.0) || figure["unavailable"].is_string(), "{v}");
        }
        // The software engine has all of its four.
        let measured = figures.iter().filter(|f| f["value"].is_number()).count();
        assert!(measured >= 4, "{v}");
        if has_kvm == Some(false) {
            assert_eq!(measured, 4, "{v}");
            assert!(table.contains("not available here: KVM_GET_API_VERSION failed"), "{table}");
        }
    }
}
