//! The IOMMU as a distribution's kernel uses it: DMA of every device translated, every interrupt remapped.

use std::fs;
use std::path::Path;

use tests::artifacts::Kernel;
use tests::guest::{self, Guest, check_log};

const MIB: usize = 1 << 20;
/// Translation of DMA is off in Debian's kernels by default, remapping of interrupts is on.
const APPEND: &str = "console=ttyS0 loglevel=6 intel_iommu=on";

/// What the kernel says in caching mode alone: it takes that mode for a promise of scalable mode, which it then misses.
const EXPECTED_IN_CACHING_MODE: &str = "DMAR: VT-d Scalable Mode not enabled, no PASID allocation";

/// 16 MiB whose bytes differ from block to block.
fn make_disk(path: &Path, seed: u8) {
    let bytes: Vec<u8> = (0..16 * MIB).map(|i| (i as u8).wrapping_mul(29) ^ (i >> 9) as u8 ^ seed).collect();
    fs::write(path, bytes).expect("the disk's file");
}

/// Copies the first 4 MiB of `from` to the start of `to`, past the page cache; the host then finds them there.
#[track_caller]
fn copy(guest: &mut Guest, from: (&str, &Path), to: (&str, &Path)) {
    let (source, target) = (from.0, to.0);
    guest.succeed(&format!(
        "dd if={source} of={target} bs=256k count=16 iflag=direct oflag=direct 2>/dev/null"
    ));
    let read = |path: &Path| fs::read(path).expect("the disk's file");
    assert!(read(from.1)[..4 * MIB] == read(to.1)[..4 * MIB], "{source} and {target}");
}

/// Boots with `--iommu mode` and disks of both kinds, one behind a root port, and moves data through them.
#[track_caller]
fn boot(mode: &str) -> (Guest, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let [disk, nvme] = ["disk.img", "nvme.img"].map(|name| dir.path().join(name));
    make_disk(&disk, 1);
    make_disk(&nvme, 2);
    let options = ["--iommu", mode, "--append", APPEND];
    let launch = guest::launch(Kernel::Cloud, &options).arg("--disk").path(&disk).arg("--nvme").path(&nvme);
    let mut guest = Guest::boot(&launch);
    copy(&mut guest, ("/dev/nvme0n1", &nvme), ("/dev/vdb", &disk));
    guest.succeed("dd if=/dev/urandom of=/dev/vdb bs=256k count=16 oflag=direct 2>/dev/null");
    copy(&mut guest, ("/dev/vdb", &disk), ("/dev/nvme0n1", &nvme));
    (guest, dir)
}

#[test]
fn the_kernel_translates_all_dma_and_remaps_all_interrupts() {
    let (mut guest, _dir) = boot("on");
    let log = guest.succeed("dmesg -r");
    check_log(&log);
    for line in [
        "DMAR: IOMMU enabled",
        "DMAR-IR: Enabled IRQ remapping in x2apic mode",
        "DMAR: dmar0: Using Queued invalidation",
        "DMAR: Intel(R) Virtualization Technology for Directed I/O",
    ] {
        assert!(log.contains(line), "{line}: {log}");
    }
    // Each function is in a group of its own, in a domain that translates.
    let groups = guest.succeed("cd /sys/kernel/iommu_groups; ls -1d */devices/* | sed 's,.*/,,' | sort; cd");
    assert_eq!(groups, guest.succeed("ls -1 /sys/bus/pci/devices"));
    let types = guest.succeed("sort -u /sys/kernel/iommu_groups/*/type");
    assert!(types.lines().all(|t| t.starts_with("DMA")), "{types}");
    let count = |text: String| text.lines().count();
    let functions = count(guest.succeed("ls -1 /sys/bus/pci/devices"));
    assert_eq!(count(guest.succeed("ls -1d /sys/kernel/iommu_groups/*")), functions);
    // Interrupts of pins and messages alike; the unit's own are not remapped.
    let interrupts = guest.succeed("grep -E 'IO-APIC|XT-PIC|PCI-MSI|DMAR' /proc/interrupts");
    assert!(interrupts.contains("DMAR-MSI"), "{interrupts}");
    for line in interrupts.lines().filter(|l| !l.contains("DMAR-MSI")) {
        assert!(line.contains(" IR-"), "{line}");
    }
    for name in ["virtio1-req.0", "nvme0q1", "ttyS0"] {
        let line = interrupts.lines().find(|l| l.ends_with(name)).unwrap_or_default();
        assert!(line.split_whitespace().nth(1).is_some_and(|n| n != "0"), "{name}: {interrupts}");
    }
}

#[test]
fn the_kernel_invalidates_enough_for_caching_mode() {
    let (mut guest, _dir) = boot("caching-mode");
    let log = guest.succeed("dmesg -r");
    let unexpected: Vec<&str> = log.lines().filter(|l| !l.contains(EXPECTED_IN_CACHING_MODE)).collect();
    check_log(&unexpected.join("\n"));
    // The capability register as the driver shows it, bit 7: CM.
    let cap = guest.succeed("cat /sys/class/iommu/dmar0/intel-iommu/cap");
    let cap = u64::from_str_radix(cap.trim(), 16).expect("a hexadecimal number");
    assert_eq!(cap >> 7 & 1, 1);
}
