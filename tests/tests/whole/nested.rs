//! L1 as a hypervisor: what a distribution's KVM makes of the VMX that it is offered.

use tests::artifacts::Kernel;
use tests::guest::{self, Guest};

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
