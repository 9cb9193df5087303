//! What a distribution's kernel and its user space find: a quiet log, right arithmetic, time that
//! passes, memory that is there.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tests::artifacts::{CRYPTO_MODULES, Kernel};
use tests::guest::{self, BOOT, COMMAND, Guest, check_log};
use tests::payload::Payload;
use tests::process::Launch;

/// Loads the crypto modules: the kernel checks each algorithm against known answers.
#[track_caller]
fn check_crypto(guest: &mut Guest) {
    let drivers_before = guest.succeed("grep -c ^driver /proc/crypto");
    guest.succeed(&format!("for m in {}; do modprobe $m || exit 1; done", CRYPTO_MODULES.join(" ")));
    let drivers = guest.succeed("grep -c ^driver /proc/crypto");
    let count = |s: &str| s.trim().parse::<u32>().expect("grep -c prints a number");
    assert!(count(&drivers) >= count(&drivers_before) + 40, "{drivers_before} and then {drivers}");
    let tests = guest.succeed("grep ^selftest /proc/crypto | sort | uniq -c");
    assert_eq!(tests.lines().count(), 1, "{tests}");
    assert!(tests.contains("passed"), "{tests}");
    // An algorithm whose test fails is taken off the list again.
    let drivers = guest.succeed("grep ^driver /proc/crypto");
    for name in ["generic-gcm-aesni", "sha256-ni", "sha512-avx2", "chacha20-simd", "ghash-clmulni"] {
        // Hosts without SHA extensions or AVX2 have fewer.
        let flag = match name {
            "sha256-ni" => "sha_ni",
            "sha512-avx2" => "avx2",
            _ => "aes",
        };
        if guest.shell(&format!("grep -qw {flag} /proc/cpuinfo")).status == 0 {
            assert!(drivers.contains(name), "no {name} in {drivers}");
        }
    }
}

/// The kernel finds the performance counters whole, and its NMI watchdog gets their interrupts.
#[track_caller]
fn check_performance_counters(guest: &mut Guest) {
    let log = guest.succeed("dmesg");
    // Not, for example, "PMU not available" or "Broken PMU hardware detected".
    let found = log.lines().find(|l| l.contains("Performance Events: ")).unwrap_or_default();
    assert!(found.ends_with(" events, full-width counters, Intel PMU driver."), "{found:?}");
    assert!(log.contains("NMI watchdog: Enabled."), "{log}");
    assert_eq!(guest.succeed("cat /proc/sys/kernel/nmi_watchdog"), "1\n");
    // An overflow for each second that the processor does not halt; perf takes it as an NMI.
    guest.succeed("echo 1 > /proc/sys/kernel/watchdog_thresh");
    guest.succeed("until grep -q 'PMI: *[1-9]' /proc/interrupts; do :; done");
    guest.succeed("grep -q 'NMI: *[1-9]' /proc/interrupts && echo 10 > /proc/sys/kernel/watchdog_thresh");
}

/// The log, the performance counters and the crypto self-tests of a kernel.
fn quiet_and_right(kernel: Kernel) {
    let mut guest = Guest::boot(&guest::launch(kernel, &[]));
    check_performance_counters(&mut guest);
    check_crypto(&mut guest);
    check_log(&guest.succeed("dmesg -r"));
    assert_eq!(
        guest.succeed("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "tsc\n"
    );
    guest.power_off();
}

#[test]
fn the_cloud_kernel_is_quiet_and_its_crypto_tests_pass() {
    quiet_and_right(Kernel::Cloud);
}

#[test]
fn the_generic_kernel_is_quiet_and_its_crypto_tests_pass() {
    quiet_and_right(Kernel::Generic);
}

/// Seconds since the guest's boot, from /proc/uptime.
fn uptime(text: &str) -> f64 {
    let first = text.split_whitespace().next().and_then(|s| s.parse().ok());
    first.unwrap_or_else(|| panic!("not an uptime: {text:?}"))
}

#[test]
fn time_passes_as_on_the_host() {
    let mut guest = Guest::boot(&guest::launch(Kernel::Cloud, &[]));

    // The date, to the seconds that a busy host needs to show it.
    let before = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let date: u64 = guest.succeed("date -u +%s").trim().parse().expect("date prints a number");
    let after = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    assert!((before.saturating_sub(2)..=after + 2).contains(&date), "{before} <= {date} <= {after}");

    // The clock in the RTC is the system's.
    let skew = guest.succeed("echo $(( $(cat /sys/class/rtc/rtc0/since_epoch) - $(date +%s) ))");
    let skew: i64 = skew.trim().parse().expect("a difference is a number");
    assert!(skew.abs() <= 2, "{skew} s between the RTC and the system's clock");

    // sleep sleeps for no less than asked, and the guest's and the host's clocks agree about it.
    let started = Instant::now();
    let text = guest.succeed("cat /proc/uptime; sleep 3; cat /proc/uptime");
    let host = started.elapsed().as_secs_f64();
    let mut lines = text.lines();
    let (first, second) = (lines.next().map(uptime), lines.next().map(uptime));
    let slept = second.expect("two lines") - first.expect("two lines");
    // /proc/uptime has hundredths.
    assert!(slept >= 2.99, "slept {slept} s");
    assert!(slept <= host + 0.02, "slept {slept} s of the guest's in {host} s of the host's");
    assert!(host - slept < 10.0, "slept {slept} s of the guest's in {host} s of the host's");

    // Over a longer span the clocks do not drift apart.
    let (host_start, guest_start) = (Instant::now(), uptime(&guest.succeed("cat /proc/uptime")));
    let latency = host_start.elapsed().as_secs_f64();
    guest.succeed("i=0; while [ $i -lt 20 ]; do usleep 100000; i=$((i+1)); done");
    let guest_end = uptime(&guest.succeed("cat /proc/uptime"));
    let host = host_start.elapsed().as_secs_f64();
    let passed = guest_end - guest_start;
    assert!(passed >= 1.99, "20 times 0.1 s took {passed} s");
    assert!(passed <= host + 0.02, "{passed} s of the guest's in {host} s of the host's");
    assert!(passed >= 1.99_f64.max(host - latency - 10.0), "{passed} s in {host} s");

    // A timer ends what takes too long; SIGTERM is 15.
    let status = guest.shell("timeout 1 sleep 1000").status;
    assert_eq!(status, 128 + 15);

    // An idle guest waits in HLT instead of burning the host's time.
    let ticks = |g: &mut Guest| cpu_ticks(g.process().id());
    let idle_before = ticks(&mut guest);
    guest.succeed("sleep 2");
    let used = ticks(&mut guest) - idle_before;
    // 2 s are 200 ticks of USER_HZ.
    assert!(used < 100, "{used} ticks of 10 ms while the guest slept for 2 s");
    guest.power_off();
}

/// User and system time of a process, in ticks of 1/100 s (proc_pid_stat(5), fields 14 and 15).
fn cpu_ticks(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    let after_name = text.rsplit_once(')').expect("stat has a name in parentheses").1;
    let field = |n: usize| after_name.split_whitespace().nth(n - 3).and_then(|f| f.parse::<u64>().ok());
    field(14).zip(field(15)).map(|(user, system)| user + system).expect("stat has numbers")
}

#[test]
fn data_stays_what_it_is() {
    let mut guest = Guest::boot(&guest::launch(Kernel::Cloud, &[]));
    guest.succeed("dd if=/dev/zero of=/tmp/zeros bs=1M count=32 2>/dev/null");
    // SHA-256 of 32 MiB of zeros.
    let zeros = "83ee47245398adee79bd9c0a8bc57b821e92aba10f5f9ade8a5d1fae4d8c4302";
    assert_eq!(guest.succeed("sha256sum < /tmp/zeros"), format!("{zeros}  -\n"));
    // Random data survives being copied by blocks of an odd size, packed and unpacked.
    guest.succeed("dd if=/dev/urandom of=/tmp/random bs=64k count=64 2>/dev/null");
    guest.succeed("dd if=/tmp/random of=/tmp/copy bs=777 2>/dev/null && cmp /tmp/random /tmp/copy");
    guest.succeed("gzip -c /tmp/copy | gunzip | cmp - /tmp/random");
    guest.succeed("tar cf - -C /tmp random | tar xOf - random | cmp - /tmp/random");
    // Floating point, as busybox's awk prints it.
    assert_eq!(guest.succeed("awk 'BEGIN { printf \"%.9f\\n\", 7 / 3 * 1.1 - 1e-3 }'"), "2.565666667\n");
    // Processes come and go.
    let forks = "i=0; while [ $i -lt 100 ]; do (exit $((i % 7))); i=$((i+1)); done; echo $i";
    assert_eq!(guest.succeed(forks), "100\n");
    guest.power_off();
}

/// MemTotal of /proc/meminfo in KiB.
fn mem_total(guest: &mut Guest) -> u64 {
    let text = guest.succeed("grep ^MemTotal: /proc/meminfo");
    text.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{text}"))
}

/// Checks that nestvmm itself takes little memory: all but the guest's RAM, which is shared memory.
#[track_caller]
fn check_own_memory(guest: &mut Guest) {
    let process = guest.process();
    let (all, guests) = (process.memory_kib("VmRSS"), process.memory_kib("RssShmem"));
    assert!(all - guests <= 200 << 10, "{all} KiB resident, of which {guests} KiB are the guest's");
}

#[test]
fn a_guest_of_6_gib() {
    let mut guest = Guest::boot(&guest::launch(Kernel::Cloud, &["--memory", "6G"]));
    let total = mem_total(&mut guest);
    assert!((5_800 << 10..=6 << 20).contains(&total), "{total} KiB");
    // RAM goes on above the hole below 4 GiB.
    let map = guest.succeed("grep 'System RAM' /proc/iomem");
    assert!(map.lines().any(|l| l.starts_with("100000000-")), "{map}");
    // Untouched RAM takes nothing from the host.
    let resident = guest.process().memory_kib("VmRSS");
    assert!(resident < 1 << 20, "{resident} KiB are resident");
    // The kernel gives out high pages first. What is written there is there.
    guest.succeed("dd if=/dev/urandom of=/tmp/a bs=1M count=96 2>/dev/null && cp /tmp/a /tmp/b");
    guest.succeed("cmp /tmp/a /tmp/b");
    let grown = guest.process().memory_kib("RssShmem");
    assert!(grown >= (2 * 96) << 10, "{grown} KiB of the guest's RAM are touched");
    check_own_memory(&mut guest);
    guest.power_off();
}

#[test]
fn a_guest_of_1_gib() {
    let mut guest = Guest::boot(&guest::launch(Kernel::Cloud, &["--memory", "1G"]));
    let total = mem_total(&mut guest);
    assert!((920 << 10..=1 << 20).contains(&total), "{total} KiB");
    check_own_memory(&mut guest);
    guest.power_off();
}

#[test]
fn reboot_boots_again_or_ends() {
    let mut guest = Guest::boot(&guest::launch(Kernel::Cloud, &[]));
    guest.succeed("touch /tmp/gone");
    let mut process = guest.into_process();
    process.type_bytes(b"reboot\n");
    let mut guest = Guest::at_shell(process);
    assert_eq!(guest.shell("test -e /tmp/gone").status, 1, "the file was in RAM");
    guest.power_off();

    let mut process = Guest::boot(&guest::launch(Kernel::Cloud, &["--on-reset", "exit"])).into_process();
    process.type_bytes(b"reboot\n");
    process.finish(COMMAND).expect_status(12);
}

#[test]
fn a_kernel_panic_ends_in_a_reset() {
    let options = ["--on-reset", "exit", "--append", "console=ttyS0 loglevel=4 panic=-1"];
    let mut process = Guest::boot(&guest::launch(Kernel::Cloud, &options)).into_process();
    process.type_bytes(b"echo c > /proc/sysrq-trigger\n");
    process.expect("Kernel panic - not syncing: sysrq triggered crash", COMMAND);
    process.finish(COMMAND).expect_status(12);
}

#[test]
fn a_command_instead_of_a_shell() {
    let append = "console=ttyS0 loglevel=4 nestvmm_exec=\"uname -m; exit 7\"";
    let finished = guest::launch(Kernel::Cloud, &["--append", append]).run(BOOT);
    finished.expect_status(0);
    assert!(finished.output.contains("x86_64\r\n"), "{}", finished.output);
    assert!(finished.output.contains("nestvmm: L1 command ended with status 7"), "{}", finished.output);
}

#[test]
fn the_decompressor_and_pvh_entries_boot_too() {
    for entry in ["decompressor", "pvh"] {
        let append = "console=ttyS0 loglevel=4 nestvmm_exec=\"echo en''tered\"";
        let options = ["--entry-point", entry, "--append", append];
        let finished = guest::launch(Kernel::Cloud, &options).run(BOOT + Duration::from_secs(120));
        finished.expect_status(0);
        assert!(finished.output.contains("entered\r\n"), "{entry}: {}", finished.output);
    }
}

#[test]
fn a_small_guest() {
    // Not much less is enough for this kernel and its initrd: at 96 MiB it stops with "deadlocked on memory".
    let mut guest = Guest::boot(&guest::launch(Kernel::Cloud, &["--memory", "112M"]));
    let total = mem_total(&mut guest);
    assert!((64 << 10..=112 << 10).contains(&total), "{total} KiB");
    check_own_memory(&mut guest);
    guest.power_off();

    // What can't be enough is refused before the boot.
    for (memory, why) in [("64M", "does not fit into 64 MiB of RAM"), ("88M", "88 MiB of RAM are too little")]
    {
        let refused = guest::launch(Kernel::Cloud, &["--memory", memory]).run(COMMAND);
        refused.expect_status(4);
        assert!(refused.errors.contains(why), "{}", refused.errors);
    }
}

/// The same program at every level: the software engine executes itself.
#[test]
fn nestvmm_runs_in_its_own_guest() {
    let dir = tempfile::tempdir().expect("the host has a temporary folder");
    let payload = Payload::new().print("from the inner guest\n").cpuid_loop(100).exit(5).write(&dir);
    let image = dir.path().join("with-payload.img");
    let file = format!("{}=/payload", payload.display());
    Launch::new(["image", "build", "--file", &file]).path(&image).run(BOOT).expect_status(0);

    let mut guest = Guest::boot(&Launch::new(["run"]).path(&image));
    let command = "nestvmm run --memory 64M --debug-exit --exit-stats /payload </dev/null 2>/tmp/stats";
    let inner = guest.shell(command);
    assert_eq!(inner.output, "from the inner guest\n");
    assert_eq!(inner.status, 5 << 1 | 1, "{}", guest.shell("cat /tmp/stats").output);
    let stats = guest.succeed("cat /tmp/stats");
    let cpuid = stats.lines().find(|l| l.starts_with("CPUID"));
    assert_eq!(cpuid.and_then(|l| l.split_whitespace().nth(1)), Some("100"), "{stats}");
    guest.power_off();
}

#[test]
fn kvm_loads_where_there_is_vmx() {
    let mut guest = Guest::boot(&guest::launch(Kernel::Cloud, &[]));
    assert_eq!(guest.shell("test -c /dev/kvm").status, 0, "{}", guest.shell("dmesg | tail").output);
    guest.succeed("grep -qw vmx /proc/cpuinfo && grep -q ^kvm_intel /proc/modules");
    // The processor is as it was after the module is gone and comes again.
    guest.succeed("rmmod kvm_intel && modprobe kvm_intel && test -c /dev/kvm");
    check_log(&guest.succeed("dmesg -r"));
    guest.power_off();

    let mut guest = Guest::boot(&guest::launch(Kernel::Cloud, &["--vmx", "off"]));
    assert_eq!(guest.shell("test -c /dev/kvm").status, 1);
    assert_eq!(guest.shell("grep -qw vmx /proc/cpuinfo").status, 1);
    guest.power_off();
}
