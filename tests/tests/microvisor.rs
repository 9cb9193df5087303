//! The microvisor's suite, run as L1: VMX instructions, entry checks, exits, events, EPT and APIC
//! virtualization as a hypervisor sees them.

use std::fs;
use std::time::Duration;

use exit_trace::{Summary, VcpuSummary, VmcsAccesses};
use microvisor::Covered;
use quick_xml::events::Event;
use rustix::process::Signal;
use tests::process::{Finished, Launch};
use vmx_emu::InstructionError;
use vmx_emu::route::{Cause, TABLE};
use x86_spec::exit::ExitReason;

/// Far more than the suite takes on a busy host.
const LIMIT: Duration = Duration::from_secs(300);

/// And in QEMU's TCG.
const SLOW_LIMIT: Duration = Duration::from_secs(1200);

/// Each check of VM entry that L0 registers has a case in the microvisor; without one this does
/// not compile.
const _: () = {
    let mut i = 0;
    while i < vmx_emu::checks::CHECKS.len() {
        assert!(
            has_case(vmx_emu::checks::CHECKS[i].name),
            "a check of VM entry has no case in the microvisor"
        );
        i += 1;
    }
};

/// Each exit reason that L1 can get has a case that causes it, and, where a control of L1's decides, one that
/// does not; those that can't occur have none. Else this does not compile.
const _: () = {
    let mut i = 0;
    while i < TABLE.len() {
        let row = find(microvisor::EXITS, TABLE[i].reason as u32);
        match TABLE[i].cause {
            Cause::Never { .. } => assert!(row.is_none(), "an exit that never occurs has a case"),
            Cause::Unconditional => causes(row),
            Cause::Controls(_) => {
                causes(row);
                assert!(passes(row), "an exit that a control decides has no case that does not exit");
            }
        }
        i += 1;
    }
};

/// The same for VM-instruction errors. VMCALL in VMX root operation (1) fails always.
const _: () = {
    let mut i = 0;
    while i < InstructionError::ALL.len() {
        let error = InstructionError::ALL[i];
        let row = find(microvisor::ERRORS, error.number());
        if vmx_emu::explain::never(error).is_some() {
            assert!(row.is_none(), "a VM-instruction error that never occurs has a case");
        } else {
            causes(row);
            let always = matches!(error, InstructionError::VmcallInRoot);
            assert!(always || passes(row), "a VM-instruction error has no case that succeeds");
        }
        i += 1;
    }
};

const fn find(table: &[Covered], number: u32) -> Option<&Covered> {
    let mut i = 0;
    while i < table.len() {
        if table[i].number == number {
            return Some(&table[i]);
        }
        i += 1;
    }
    None
}

const fn causes(row: Option<&Covered>) {
    match row {
        Some(row) => assert!(!row.causes.is_empty(), "nothing in the microvisor causes it"),
        None => panic!("an exit reason or VM-instruction error has no case in the microvisor"),
    }
}

const fn passes(row: Option<&Covered>) -> bool {
    match row {
        Some(row) => !row.passes.is_empty(),
        None => false,
    }
}

const fn has_case(check: &str) -> bool {
    let mut i = 0;
    while i < microvisor::CHECKS.len() {
        if microvisor::same(microvisor::CHECKS[i], check) {
            return true;
        }
        i += 1;
    }
    false
}

fn run(options: &[&str], words: &str) -> Finished {
    launch(options, words).run(LIMIT)
}

fn launch(options: &[&str], words: &str) -> Launch {
    Launch::new([
        "run",
        "--memory",
        "64M",
        "--debug-exit",
        "--on-reset",
        "exit",
        "--kernel",
        microvisor::IMAGE,
    ])
    .args(options)
    .args(&["--append", words])
}

/// The three numbers of the last line: passed, failed, skipped.
fn counts(finished: &Finished) -> [usize; 3] {
    let line = finished.output.lines().rfind(|l| l.contains(" passed, ")).unwrap_or_default();
    let mut numbers = line.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok());
    [(); 3].map(|()| numbers.next().unwrap_or(0))
}

/// Runs the whole suite; every case that is listed must have run, and none failed. What may be missing is what L0
/// does not offer: fewer than `skips` cases, and `missing_exits` exit reasons that only they cause.
fn suite(options: &[&str], skips: usize, missing_exits: usize) -> Finished {
    let finished = run(options, "verbose");
    check_suite(&finished, skips, missing_exits);
    finished
}

fn check_suite(finished: &Finished, skips: usize, missing_exits: usize) {
    let listed = run(&[], "list").output.lines().filter(|l| l.starts_with("case ")).count();
    let [passed, failed, skipped] = counts(finished);
    let failures: Vec<_> = finished.output.lines().filter(|l| l.starts_with("FAIL")).collect();
    assert!(failures.is_empty(), "{failures:#?}");
    finished.expect_status(1);
    assert_eq!(failed, 0);
    assert_eq!(passed + skipped, listed, "{}", finished.output);
    assert!(listed > 300, "{listed} cases");
    assert!(skipped < skips, "{}", finished.output);
    let (exits, errors) = (microvisor::EXITS.len(), microvisor::ERRORS.len());
    let all = format!(
        "coverage: {} of {exits} exit reasons, {errors} of {errors} VM-instruction errors",
        exits - missing_exits
    );
    assert!(finished.output.lines().any(|l| l == all), "{}", finished.output);
}

#[test]
fn every_case_with_trapped_vmcs_accesses() {
    let trace = tempfile::NamedTempFile::new().expect("a temporary file").into_temp_path();
    let trace = trace.to_str().expect("its path is UTF-8");
    suite(&["--vmcs-access", "trapped", "--trace-exits", trace], 20, 0);
    failed_instructions_are_in_the_trace(trace);
}

/// The suite causes every VM-instruction error that can occur, by VM entries and other instructions; errors by their
/// numbers and texts of SDM Vol. 3D table 31-1.
fn failed_instructions_are_in_the_trace(trace: &str) {
    let show = &Launch::new(["trace", "show", "--reason", "VMLAUNCH", trace]).run(LIMIT).output;
    let summary = &Launch::new(["trace", "summary", trace]).run(LIMIT).output;
    for how in [
        "VMfailInvalid",
        "VMfailValid 7: VM entry with invalid control field(s)",
        "VMfailValid 8: VM entry with invalid host-state field(s)",
        "VMfailValid 26: VM entry with events blocked by MOV SS",
    ] {
        let marked = show.lines().filter(|l| l.contains(&format!(" {how} guest "))).count();
        assert!(marked > 0, "{how}: {show}");
        assert!(summary.contains(&format!("\n{marked} VMLAUNCH failed: {how}\n")), "{how}: {summary}");
    }
    for e in vmx_emu::InstructionError::ALL {
        let text = format!(" failed: VMfailValid {}: {}\n", e.number(), e.description());
        let can = vmx_emu::explain::never(*e).is_none();
        assert_eq!(summary.contains(&text), can, "{text}{summary}");
    }
}

#[test]
fn every_case_with_a_shadow_vmcs() {
    suite(&["--vmcs-access", "shadow"], 20, 0);
}

/// Cases about VMX instructions use ordinary VMCSs, all others the enlightened VMCS: what it has no field
/// for is not offered.
#[test]
fn every_case_with_an_enlightened_vmcs() {
    // APIC access and write, EOI, preemption timer, VMFUNC, PML; and SIPI, whose case needs the timer.
    let finished = suite(&["--vmcs-access", "direct"], 80, 7);
    let other: Vec<_> = finished
        .output
        .lines()
        .filter(|l| l.starts_with("skip ") && !l.ends_with("(control not offered)"))
        .filter(|l| !l.ends_with("(CPUID does not show the feature)"))
        .collect();
    assert!(other.is_empty(), "{other:#?}");
    let own = finished.output.lines().filter(|l| l.starts_with("ok direct.")).count();
    assert_eq!(own, 10, "cases of the enlightened VMCS itself");
}

/// SDM Vol. 3C §28.7: a VM exit that can't load L1's state is a VMX abort. The processor shuts down, which ends the run
/// as any shutdown of L1 does, with what failed; the indicator is in the VMCS region.
#[test]
fn vmx_aborts_end_the_run() {
    for (what, message) in [
        ("msr_store", "VMX abort 1: saving guest MSRs failed at entry 1"),
        ("pdptes", "VMX abort 2: a PDPTE at host CR3"),
        ("msr_load", "VMX abort 4: loading host MSRs failed: entry 1 of the list, MSR 0xc0000102"),
        ("address_size", "VMX abort 6: the guest was in IA-32e mode"),
    ] {
        let finished = run(&[], &format!("abort={what}"));
        finished.expect_status(8);
        assert!(finished.errors.contains(message), "{what}: {}", finished.errors);
        assert!(!finished.output.contains("FAIL"), "{what}: {}", finished.output);
    }
}

/// Whatever this host's KVM is: what it gets wrong or can't do, the software CPU does. A KVM that is used has no
/// performance counters and no MONITOR for guests, and with SVM fewer features still.
#[test]
fn every_case_with_kvm() {
    let opened = fs::File::options().read(true).write(true).open("/dev/kvm").map_err(|e| e.to_string());
    match opened.and_then(|_| engine_kvm::probe().map_err(|e| e.to_string())) {
        Err(why) => eprintln!("skipped: /dev/kvm can't be used: {why}"),
        Ok(probe) => {
            let used = probe.flaws.is_empty();
            let finished = run(&["--engine", "kvm", "--vmx", "on"], "verbose");
            assert_eq!(finished.errors.contains("can't be trusted"), !used, "{}", finished.errors);
            let (skips, missing) = if used { (40, without_instructions(&finished)) } else { (20, 0) };
            check_suite(&finished, skips, missing);
        }
    }
}

/// How many exit reasons were not covered, if only such as a guest of KVM has no instructions for: RDPMC, MONITOR and MWAIT,
/// XSAVES and XRSTORS.
fn without_instructions(finished: &Finished) -> usize {
    const NOT_ON_KVM: usize = 5;
    let line = finished.output.lines().rfind(|l| l.starts_with("coverage: ")).unwrap_or_default();
    let covered = line.split(' ').nth(1).and_then(|n| n.parse().ok()).unwrap_or(0);
    let missing = microvisor::EXITS.len().saturating_sub(covered);
    assert!(missing <= NOT_ON_KVM, "{line}");
    missing
}

/// The same in L1, whose KVM is one with hardware for what it knows.
#[test]
fn every_case_with_kvm_in_l1() {
    let command = "cat > /tmp/microvisor && nestvmm run --memory 64M --debug-exit --on-reset exit \
        --kernel /tmp/microvisor --engine kvm --vmx on --append verbose --exit-stats </dev/null";
    let image = tests::artifacts::Kernel::Cloud.image();
    let mut process = Launch::new(["run", "--memory", "1G"]).path(image).args(&["--exec", command]).start();
    process.type_bytes(&fs::read(microvisor::IMAGE).expect("the microvisor is built"));
    process.close_input();
    let finished = process.finish(LIMIT);
    assert!(!finished.errors.contains("can't be trusted"), "{}", finished.errors);
    check_suite(&finished, 40, without_instructions(&finished));
    assert!(finished.errors.contains("left by KVM to the software engine"), "{}", finished.errors);
}

/// A "newc" archive with one executable file, which Linux unpacks after the initrd that it is appended to
/// (Documentation/driver-api/early-userspace/buffer-format.rst).
fn archive(name: &str, data: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    for (name, mode, data) in [(name, 0o100_755, data), ("TRAILER!!!", 0, &[])] {
        let fields = [0, mode, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
        all.extend_from_slice(b"070701");
        fields.iter().for_each(|f| all.extend_from_slice(format!("{f:08x}").as_bytes()));
        all.extend_from_slice(name.as_bytes());
        all.push(0);
        all.resize(all.len().next_multiple_of(4), 0);
        all.extend_from_slice(data);
        all.resize(all.len().next_multiple_of(4), 0);
    }
    all
}

/// And where L1's KVM is that of an AMD processor: in QEMU's TCG, if it is installed.
#[test]
#[ignore = "slow"]
fn slow_every_case_with_kvm_on_svm_in_qemu() {
    const QEMU: &str = "qemu-system-x86_64";
    let paths = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&paths).any(|dir| dir.join(QEMU).is_file()) {
        eprintln!("skipped: there is no {QEMU}");
        return;
    }
    let (kernel, initrd) = tests::artifacts::Kernel::Cloud.files();
    let mut bytes = fs::read(initrd).expect("the initrd is there");
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(archive("microvisor", &fs::read(microvisor::IMAGE).expect("the microvisor is built")));
    let initrd = tempfile::NamedTempFile::new().expect("a temporary file").into_temp_path();
    fs::write(&initrd, bytes).expect("there is room for an initrd");
    let machine = ["-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "1G", "-append", "console=ttyS0 quiet"];
    let console = ["-nographic", "-nodefaults", "-no-reboot", "-serial", "stdio"];
    let text = |path: &std::path::Path| path.to_str().expect("its path is UTF-8").to_owned();
    let files = ["-kernel".to_owned(), text(&kernel), "-initrd".to_owned(), text(&initrd)];
    let files: Vec<&str> = files.iter().map(String::as_str).collect();
    let launch = scenario_runner::process::Launch::new(QEMU, machine).args(&console).args(&files);
    let mut qemu = launch.start().expect("QEMU starts");
    qemu.expect("l1:~#", SLOW_LIMIT).expect("L1 boots in QEMU");
    // What is typed is echoed, so it holds nothing that is looked for.
    let command = "nestvmm run --memory 64M --debug-exit --on-reset exit --kernel /microvisor --engine kvm \
        --vmx on --append verbose </dev/null >/o 2>&1; echo status $?; dmesg | grep -o -m1 SVM; \
        grep -E '^FAIL|passed|t[r]usted' /o; echo the''-end\n";
    qemu.type_bytes(command.as_bytes()).expect("its console takes input");
    let output = qemu.expect("the-end", SLOW_LIMIT).expect("the suite ends");
    assert!(output.contains("status 1") && output.contains(" passed, 0 failed, "), "{output}");
    assert!(!output.contains("FAIL ") && !output.contains("trusted"), "{output}");
    assert!(output.contains("SVM"), "KVM is on SVM: {output}");
}

#[test]
fn every_case_with_write_protected_tables() {
    suite(&["--ept-sync", "write-protect"], 20, 0);
}

/// With write-protection L0 sees what L1 does to its tables without being told, and without it, it does not:
/// each case finds tables of cases before it in its pages.
#[test]
fn write_protection_needs_no_invept() {
    let failed = |mode| {
        // All but ept.written.by_l2: what L2 writes needs INVEPT in any case.
        let cases = "ept.v,ept.m,ept.a,ept.i,ept.t,ept.p,ept.written.instructions,vpid,exit";
        let finished = run(&["--ept-sync", mode], &format!("only={cases} no-invept"));
        let [passed, failed, _] = counts(&finished);
        assert!(passed + failed > 80, "{}", finished.output);
        failed
    };
    assert_eq!(failed("write-protect"), 0);
    assert!(failed("invept") > 0);
}

/// What does not fit into EPT02 at once is dropped and made again, and L2 does not notice.
#[test]
fn a_small_ept02_is_reclaimed() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let log = dir.path().join("log");
    let options = |pages| ["--ept02-pages", pages, "--trace", log.to_str().expect("UTF-8")];
    let reclaims = |pages| {
        let finished = run(&options(pages), "only=ept");
        finished.expect_status(1);
        let [passed, failed, _] = counts(&finished);
        assert!(passed > 30 && failed == 0, "{}", finished.output);
        let log = std::fs::read_to_string(&log).expect("the log");
        log.lines().filter(|l| l.contains("EPT02 is full")).count()
    };
    assert_eq!(reclaims("2048"), 0);
    assert!(reclaims("256") > 1);
}

#[test]
fn sigusr2_shows_the_vmcss_while_l2_runs() {
    let mut process = launch(&[], "spin").start();
    process.expect("L2 spins", LIMIT);
    process.signal(Signal::USR2);
    process.expect_error("L2 runs, at 0x", LIMIT);
    process.expect_error("VMCS12 is at L1 address 0x", LIMIT);
    // What L0 needs and L1 does not ask for, in VMCS01, VMCS12 and VMCS02.
    process.expect_error(
        "External-interrupt exiting                        1          0          1  L0 needs it",
        LIMIT,
    );
    process.expect_error("Guest RIP", LIMIT);
    process.expect_error("tr   VMCS02", LIMIT);
    process.signal(Signal::TERM);
    process.finish(LIMIT).expect_status(128 + 15);
}

#[test]
fn without_vmx_the_hypervisor_says_so() {
    let finished = run(&["--vmx", "off"], "only=boot,instr");
    finished.expect_status(1);
    let [passed, failed, skipped] = counts(&finished);
    assert!(passed >= 8 && failed == 0 && skipped > 40, "{}", finished.output);
    assert!(finished.output.contains("CPUID does not show VMX"));
}

#[test]
fn benchmarks_measure_every_kind_of_exit() {
    for access in ["shadow", "direct"] {
        let finished = run(&["--vmcs-access", access], "bench rounds=200");
        finished.expect_status(1);
        for name in [
            "cpuid_bare",
            "cpuid",
            "vmcall",
            "inl",
            "mov_dr",
            "wr_tsc_adjust",
            "ept_violation",
            "ept_fill_4k",
        ] {
            let line = finished.output.lines().find(|l| l.split_whitespace().nth(1) == Some(name));
            assert!(line.is_some_and(|l| l.starts_with("bench ")), "{name}: {}", finished.output);
        }
    }
}

#[test]
fn a_plain_guest_measures_its_exits() {
    let finished = Launch::new(["bench", "vmexit", "--engine", "soft", "--rounds", "100"]).run(LIMIT);
    finished.expect_status(0);
    for name in [
        "cpuid",
        "rd_pat_msr",
        "rd_tsc_adjust",
        "outb_to_post",
        "mmio_read",
        "self_ipi_sti_hlt",
        "page_touch",
    ] {
        let line = finished.output.lines().find(|l| l.split_whitespace().nth(1) == Some(name));
        assert!(line.is_some_and(|l| l.starts_with("bench ")), "{name}: {}", finished.output);
    }
    // There is no hypervisor that would answer a plain guest's VMCALL.
    assert!(finished.output.contains("skip vmcall (exception 6 here)"), "{}", finished.output);
}

/// Exit statistics of a benchmark of CPUID with `rounds` rounds.
fn cpuid_statistics(access: &str, rounds: u64) -> VcpuSummary {
    let [json, trace] =
        [(); 2].map(|()| tempfile::NamedTempFile::new().expect("a temporary file").into_temp_path());
    let [json, trace] = [&json, &trace].map(|p| p.to_str().expect("its path is UTF-8"));
    let words = format!("bench only=cpuid rounds={rounds}");
    let options = ["--vmcs-access", access, "--exit-stats-json", json, "--trace-exits", trace];
    run(&options, &words).expect_status(1);
    let parse = |text: &str| -> VcpuSummary {
        let mut summary: Summary = serde_json::from_str(text).expect("statistics are JSON");
        summary.vcpus.pop().expect("of one vCPU")
    };
    let counted = parse(&fs::read_to_string(json).expect("the statistics are there"));
    // The trace has the same, but for what only the engine knows.
    let summary = Launch::new(["trace", "summary", "--json", trace]).run(LIMIT);
    let traced = VcpuSummary {
        instructions: counted.instructions,
        vmcs_accesses: counted.vmcs_accesses,
        hand_overs: counted.hand_overs,
        ..parse(&summary.output)
    };
    assert_eq!(traced, counted);
    counted
}

/// Three benchmarks, `cpuid_bare`, `cpuid` and `cpuid_vpid`, have so many rounds each, from one exit of L2 to the next,
/// and one that is not timed. The
/// handler of the last two reads reason, length and RIP and writes RIP; what the microvisor reads before the
/// first round is the same however many follow.
#[test]
fn statistics_tell_what_each_exit_of_l2_causes() {
    const ROUNDS: u64 = 150;
    let caused = |s: &VcpuSummary, rounds: u64| {
        let cpuid = s.forwarded(ExitReason::Cpuid).expect("CPUID exits to L1");
        // The last exit of each is not followed by an entry.
        assert_eq!((cpuid.count, cpuid.returned, cpuid.synthesized), (3 * rounds + 6, 3 * rounds + 3, 0));
        assert_eq!(cpuid.caused_by_reason(ExitReason::Vmresume), 3 * rounds + 3);
        assert_eq!(cpuid.l1_exits, cpuid.caused.iter().map(|c| c.count).sum::<u64>());
        assert!(cpuid.l1_ns > 0 && cpuid.l1_ns < cpuid.round_trip.total_ns, "{cpuid:?}");
        assert_eq!(s.kept_count(ExitReason::Cpuid), 0);
        assert_eq!(s.l1_count(ExitReason::Vmlaunch), 3);
        assert_eq!(s.l1_exits, s.l1.iter().map(|r| r.count).sum::<u64>());
        assert_eq!(s.exits, s.l1_exits + s.l2_exits);
        [ExitReason::Vmread, ExitReason::Vmwrite].map(|r| cpuid.caused_by_reason(r))
    };
    let shadowed = [ROUNDS, 2 * ROUNDS].map(|n| {
        let statistics = cpuid_statistics("shadow", n);
        assert_eq!(caused(&statistics, n), [0, 0]);
        statistics.vmcs_accesses.expect("the software engine counts them")
    });
    let more = |f: fn(&VmcsAccesses) -> u64| f(&shadowed[1]) - f(&shadowed[0]);
    assert_eq!([more(|a| a.vmreads), more(|a| a.vmwrites)], [6 * ROUNDS, 2 * ROUNDS], "{shadowed:?}");
    let [once, twice] = [ROUNDS, 2 * ROUNDS].map(|n| caused(&cpuid_statistics("trapped", n), n));
    assert_eq!([twice[0] - once[0], twice[1] - once[1]], [6 * ROUNDS, 2 * ROUNDS], "{once:?} {twice:?}");
}

/// Exits of L1 for VMX instructions that CPUID of L2 causes, by the exit statistics of a run.
fn caused_by_cpuid(access: &str, rounds: u64) -> u64 {
    let json = tempfile::NamedTempFile::new().expect("a temporary file").into_temp_path();
    let path = json.to_str().expect("its path is UTF-8");
    let words = format!("bench exactly=cpuid rounds={rounds}");
    run(&["--vmcs-access", access, "--exit-stats-json", path], &words).expect_status(1);
    let text = fs::read_to_string(&json).expect("the statistics are there");
    let summary: Summary = serde_json::from_str(&text).expect("statistics are JSON");
    let cpuid = summary.vcpus[0].forwarded(ExitReason::Cpuid).expect("CPUID exits to L1");
    let caused = |r| cpuid.caused_by_reason(r);
    caused(ExitReason::Vmread) + caused(ExitReason::Vmwrite) + caused(ExitReason::Vmresume)
}

/// What `bench exits` measured of a benchmark in a mode.
fn measured<'a>(mode: &'a serde_json::Value, benchmark: &str) -> &'a serde_json::Value {
    let benchmarks = mode["benchmarks"].as_array().expect("a list");
    benchmarks.iter().find(|b| b["name"] == benchmark).expect("it was run")
}

/// A median of the first of its exits.
fn median(mode: &serde_json::Value, benchmark: &str, what: &str) -> u64 {
    let found = measured(mode, benchmark);
    found["exits"][0][what]["median"].as_u64().unwrap_or_else(|| panic!("{benchmark}: no {what} in {found}"))
}

/// All modes in one run: counts are the same as those of the exit statistics, and are right for the mode; the picture
/// has everything that was measured.
#[test]
fn bench_exits_compares_the_modes() {
    const ROUNDS: u64 = 20;
    let [json, svg] =
        [(); 2].map(|()| tempfile::NamedTempFile::new().expect("a temporary file").into_temp_path());
    let [json, svg] = [&json, &svg].map(|p| p.to_str().expect("its path is UTF-8"));
    let rounds = ROUNDS.to_string();
    let finished =
        Launch::new(["bench", "exits", "--rounds", &rounds, "--json", json, "--svg", svg]).run(LIMIT);
    finished.expect_status(0);
    let text = fs::read_to_string(json).expect("the JSON is there");
    let report: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    let modes = report["modes"].as_array().expect("a list of modes");
    assert_eq!(modes.len(), 6);
    let mode = |access: &str, mmu: &str| {
        modes.iter().find(|m| m["vmcs_access"] == access && m["mmu"] == mmu).expect("each mode is there")
    };
    let [trapped, shadow, direct] = ["trapped", "shadow", "direct"].map(|access| mode(access, "ept"));

    // The handler of CPUID reads reason, RIP and length and writes RIP.
    for (m, accesses, exit) in [(trapped, [3, 1], [3, 1]), (shadow, [3, 1], [0, 0]), (direct, [0, 0], [0, 0])]
    {
        assert_eq!(["vmreads", "vmwrites"].map(|w| median(m, "cpuid", w)), accesses, "{m}");
        assert_eq!(["trapped_vmreads", "trapped_vmwrites"].map(|w| median(m, "cpuid", w)), exit, "{m}");
    }
    for name in ["cpuid", "vmcall", "inl", "mov_dr", "wr_tsc_adjust", "ept_violation"] {
        let accesses = median(trapped, name, "vmreads") + median(trapped, name, "vmwrites");
        let [most, least] = [trapped, shadow].map(|m| median(m, name, "l0_entries"));
        assert_eq!((most, least), (2 + accesses, 2), "{name}");
        for m in [trapped, shadow, direct] {
            assert_eq!(measured(m, name)["exits"][0]["count"], ROUNDS, "{name}");
            let parts = ["l0_ns", "l1_ns", "l2_ns"].map(|level| median(m, name, level));
            assert!(parts.iter().all(|ns| *ns > 0), "{name}: {parts:?}");
            let caused = &measured(m, name)["exits"][0]["caused"];
            let resume = caused.as_array().expect("a list").iter().find(|c| c["reason"] == "VMRESUME");
            assert_eq!(resume.map(|c| &c["mean"]), Some(&1.0.into()), "{name}: {caused}");
        }
    }
    // The statistics of the same benchmark agree; what comes before the rounds is the same however many follow.
    for (access, m) in [("trapped", trapped), ("shadow", shadow)] {
        let more = caused_by_cpuid(access, 2 * ROUNDS) - caused_by_cpuid(access, ROUNDS);
        assert_eq!(more, ROUNDS * (median(m, "cpuid", "l0_entries") - 1), "{access}");
    }
    // A page that L1 has not mapped yet: L1 maps it in its EPT, and then L0 does; or L1 in its shadow page tables.
    let touch = |mmu| {
        let exits = measured(mode("shadow", mmu), "page_touch")["exits"].as_array().expect("a list");
        let mut exits: Vec<_> = exits.iter().map(|e| format!("{} {}", e["reason"], e["forwarded"])).collect();
        exits.sort();
        exits
    };
    assert_eq!(touch("ept"), [r#""EPT_VIOLATION" false"#, r#""EPT_VIOLATION" true"#]);
    assert_eq!(touch("shadow-on-ept"), [r#""EXCEPTION_NMI" true"#]);
    assert_eq!(measured(mode("shadow", "shadow-on-ept"), "ept_violation")["skipped"], "L2 has no EPT");

    let texts = xml_texts(&fs::read_to_string(svg).expect("the picture is there"));
    for name in microvisor::BENCHMARKS {
        assert!(finished.output.lines().any(|l| l.starts_with(&format!("{name} "))), "{}", finished.output);
        assert_eq!(texts.iter().filter(|t| t == name).count(), 1, "{name}: {texts:?}");
    }
    assert!(texts.iter().any(|t| t.contains("time of one operation (µs)")), "{texts:?}");
}

/// The texts of an XML document that is well-formed.
fn xml_texts(document: &str) -> Vec<String> {
    let mut reader = quick_xml::Reader::from_str(document);
    let (mut texts, mut depth) = (Vec::new(), 0);
    loop {
        match reader.read_event().expect("well-formed XML") {
            Event::Start(e) => {
                assert!(e.attributes().all(|a| a.is_ok()), "{e:?}");
                depth += 1;
            }
            Event::End(_) => depth -= 1,
            Event::Text(t) => texts.push(t.decode().expect("UTF-8").into_owned()),
            Event::Eof => break,
            _ => {}
        }
    }
    assert_eq!(depth, 0, "all elements end");
    texts
}

#[test]
fn bench_exits_says_what_it_can_t_measure() {
    for (options, message) in [
        (["--l1", "kvm"], "--l1 kvm: give an IMAGE"),
        (
            ["--only", "cpuid,nothing"],
            "--only nothing: there is no such benchmark; microvisor has cpuid_bare",
        ),
        (["--mmu", "shadow-on-shadow"], "[possible values: ept, shadow-on-ept]"),
        (["--rounds", "0"], "0 is not in 1..=10000"),
    ] {
        let finished = Launch::new(["bench", "exits"]).args(&options).run(LIMIT);
        finished.expect_status(2);
        assert!(finished.errors.contains(message), "{options:?}: {}", finished.errors);
    }
    let finished = Launch::new(["bench", "exits", "--svg", "/nowhere/x.svg"]).run(LIMIT);
    finished.expect_status(4);
    assert!(finished.errors.contains("/nowhere/x.svg: can't be written"), "{}", finished.errors);
}
