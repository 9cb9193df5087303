//! L1 as a hypervisor: what a distribution's KVM makes of the VMX that it is offered.

use std::time::Duration;

use tests::artifacts::Kernel;
use tests::guest::{self, Guest, check_log};
use tests::process::Launch;

/// For a boot of L2 in L1 and a command there: half a minute when the machine is not busy.
const L2: Duration = Duration::from_secs(400);

/// Parameters of `kvm_intel` that say whether it uses a VMX feature, which it decides by the
/// capability MSRs.
const FEATURES: [&str; 8] = [
    "ept",
    "eptad",
    "vpid",
    "unrestricted_guest",
    "enable_apicv",
    "enable_shadow_vmcs",
    "pml",
    "preemption_timer",
];

#[test]
fn kvm_finds_all_of_vmx() {
    let mut l1 = Guest::boot(&guest::launch(Kernel::Cloud, &[]));
    assert!(l1.succeed("grep -m1 flags /proc/cpuinfo").contains(" vmx "));
    l1.succeed("test -c /dev/kvm");
    for feature in FEATURES {
        let value = l1.succeed(&format!("cat /sys/module/kvm_intel/parameters/{feature}"));
        assert_eq!(value, "Y\n", "{feature}");
    }
    l1.power_off();
}

#[test]
fn without_vmx_there_is_no_kvm() {
    let mut l1 = Guest::boot(&guest::launch(Kernel::Cloud, &["--vmx", "off"]));
    assert!(!l1.succeed("grep -m1 flags /proc/cpuinfo").contains(" vmx "));
    l1.succeed("test ! -e /dev/kvm || test ! -d /sys/module/kvm_intel");
    l1.power_off();
}

/// Boots L2 in L1 on L1's KVM, both unmodified, and looks at what both say. Returns L1's log.
fn l2_boots(l2: Kernel, options: &[&str]) -> String {
    let command =
        "boot-l2 --exec 'uname -r; echo 6 7 | { read a b; echo $((a * b)); }; echo ==; dmesg -r; exit 7'
        status=$?; echo ==; dmesg -r; exit $status";
    let finished =
        Launch::new(["run"]).path(l2.image_as_l2()).args(options).args(&["--exec", command]).run(L2);
    finished.expect_status(7);
    let parts: Vec<&str> = finished.output.split("==\n").collect();
    let [output, l2_log, l1_log] = parts.as_slice() else { panic!("{}", finished.output) };
    let (release, product) = output.split_once('\n').expect("two lines");
    assert!(release.ends_with(l2.flavour()), "{output}");
    assert_eq!(product, "42\n");
    for log in [l2_log, l1_log] {
        check_log(log);
        assert!(!log.contains("unimplemented"), "{log}");
    }
    assert!(l1_log.contains("nestvmm_channel=ttyS1"), "the second log is L1's");
    (*l1_log).to_owned()
}

#[test]
fn l2_boots_under_kvm_in_l1() {
    let log = l2_boots(Kernel::Cloud, &[]);
    assert!(!log.contains("Hyper-V"), "{log}");
}

/// With direct access KVM keeps its VMCS in memory, as it does on Hyper-V, and has nothing to complain about.
#[test]
fn l2_boots_under_kvm_with_an_enlightened_vmcs() {
    let log = l2_boots(Kernel::Cloud, &["--vmcs-access", "direct"]);
    assert!(log.contains("using Hyper-V Enlightened VMCS"), "{log}");
}

/// KVM without EPT has to know of each INVLPG of L2; L2's marks in the trace tell its exits from those of its boot.
#[test]
fn exits_of_an_l2_under_kvm_are_measured() {
    let json = tempfile::NamedTempFile::new().expect("a temporary file").into_temp_path();
    let finished = Launch::new(["bench", "exits", "--l1", "kvm", "--only", "cpuid,invlpg", "--rounds", "20"])
        .args(&["--vmcs-access", "shadow", "--mmu", "shadow-on-ept", "--json"])
        .path(&json)
        .path(Kernel::Cloud.image_as_l2())
        .run(L2);
    finished.expect_status(0);
    let text = std::fs::read_to_string(&json).expect("the JSON is there");
    let report: serde_json::Value = serde_json::from_str(&text).expect("it is JSON");
    let benchmarks = report["modes"][0]["benchmarks"].as_array().expect("a list");
    let names: Vec<_> = benchmarks.iter().map(|b| b["name"].as_str().expect("a name")).collect();
    assert_eq!(names, ["cpuid", "invlpg"]);
    for (benchmark, reason) in benchmarks.iter().zip(["CPUID", "INVLPG"]) {
        let exit = &benchmark["exits"][0];
        assert_eq!(
            (&exit["reason"], &exit["count"], &exit["forwarded"]),
            (&reason.into(), &20.into(), &true.into())
        );
        // KVM reads at least the exit's reason, and with a shadow VMCS nothing of this exits.
        assert!(exit["vmreads"]["median"].as_u64() > Some(0), "{exit}");
        assert_eq!(exit["trapped_vmreads"]["median"], 0, "{exit}");
        assert!(exit["l0_entries"]["median"].as_u64() >= Some(2), "{exit}");
        assert!(benchmark["guest_ns"]["median"].as_u64() > Some(0), "{benchmark}");
    }
}

/// The generic kernel has many more drivers, which look for their devices in vain.
#[test]
#[ignore = "slow"]
fn slow_l2_with_the_generic_kernel_boots_under_kvm_in_l1() {
    l2_boots(Kernel::Generic, &[]);
}
