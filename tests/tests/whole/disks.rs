//! PCI as a distribution's kernel finds it, and disks: what the guest writes is in the host's file, survives resets and the
//! program's violent end, and images stay as they are.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use rustix::process::Signal;
use tests::artifacts::Kernel;
use tests::guest::{self, COMMAND, Guest, check_log};

const MIB: usize = 1 << 20;

/// Each function: place, vendor and device, class.
const FUNCTIONS: &str = "\
0000:00:00.0 0x8086 0x0d57 0x060000
0000:00:01.0 0x1af4 0x1042 0x018000
0000:00:02.0 0x1af4 0x1042 0x018000
0000:00:03.0 0x1af4 0x1044 0x00ff00
0000:00:04.0 0x1b36 0x000c 0x060400
0000:01:00.0 0x1b36 0x0010 0x010802
";

/// Numbers that differ from byte to byte and from block to block.
fn pattern(seed: u8) -> Vec<u8> {
    (0..MIB).map(|i| (i as u8).wrapping_mul(31) ^ (i >> 9) as u8 ^ seed).collect()
}

fn sha256(path: &Path, from: usize, blocks: usize) -> String {
    let script = "dd if=\"$0\" bs=64k skip=$1 count=$2 2>/dev/null | sha256sum";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(path).args([from.to_string(), blocks.to_string()]);
    let output = command.output().expect("sh runs");
    String::from_utf8(output.stdout).expect("sha256sum prints text")
}

/// Reads the pattern at the start of `disk`, writes 2 MiB elsewhere, and gets the same back, on both sides.
#[track_caller]
fn check_disk(guest: &mut Guest, disk: &str, file: &Path) {
    let read =
        |from: u32| format!("dd if={disk} bs=64k skip={from} count=32 iflag=direct 2>/dev/null | sha256sum");
    assert_eq!(guest.succeed(&read(0)), sha256(file, 0, 32), "{disk}");
    guest.succeed(&format!("dd if=/dev/urandom of={disk} bs=64k seek=64 count=32 conv=fsync 2>/dev/null"));
    let written = guest.succeed(&read(64));
    assert_eq!(written, sha256(file, 64, 32), "{disk}");
    assert_ne!(written, sha256(file, 96, 32));
    // Space is given back, and reads as zeros.
    guest.succeed(&format!("blkdiscard -o 4194304 -l 1048576 {disk}"));
    let mut bytes = vec![1; MIB];
    let host = fs::File::open(file).expect("the disk's file");
    host.read_exact_at(&mut bytes, 4 << 20).expect("the disk's bytes");
    assert!(bytes.iter().all(|b| *b == 0), "{disk} was discarded");
}

#[test]
fn the_kernel_finds_pci_and_its_disks_and_data_stays() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let files = ["disk.img", "nvme.img"].map(|name| dir.path().join(name));
    for (file, seed) in files.iter().zip([1, 2]) {
        let mut bytes = pattern(seed);
        bytes.resize(16 * MIB, 0);
        fs::write(file, bytes).expect("the disk's file");
    }
    let [disk, nvme] = &files;
    let image = fs::read(Kernel::Cloud.image()).expect("the image");
    let launch = guest::launch(Kernel::Cloud, &[]).arg("--disk").path(disk).arg("--nvme").path(nvme);
    let mut guest = Guest::boot(&launch);

    let list =
        "cd /sys/bus/pci/devices; for d in *; do echo $d $(cat $d/vendor $d/device $d/class); done; cd";
    assert_eq!(guest.succeed(list), FUNCTIONS);
    // Configuration space through memory: the extended part is there.
    assert_eq!(guest.succeed("wc -c < /sys/bus/pci/devices/0000:01:00.0/config"), "4096\n");
    assert_eq!(
        guest.succeed("od -An -tx4 -j256 -N4 /sys/bus/pci/devices/0000:00:04.0/config"),
        " 0001000d\n"
    );
    assert_eq!(guest.succeed("cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/nvme0n1/ro"), "1\n0\n0\n");
    assert_eq!(guest.succeed("cat /sys/block/vda/serial /sys/block/vdb/serial"), "imagedisk0");

    check_disk(&mut guest, "/dev/vdb", disk);
    check_disk(&mut guest, "/dev/nvme0n1", nvme);
    // A function-level reset, and the driver goes on.
    guest.succeed("echo 1 > /sys/bus/pci/devices/0000:01:00.0/reset");
    assert_eq!(
        guest.succeed("dd if=/dev/nvme0n1 bs=64k count=32 iflag=direct 2>/dev/null | sha256sum"),
        sha256(nvme, 0, 32)
    );
    // The image can be read, and is not changed.
    let read = guest.succeed("dd if=/dev/vda bs=64k count=32 2>/dev/null | sha256sum");
    assert_eq!(read, sha256(Kernel::Cloud.image(), 0, 32));
    assert_ne!(guest.shell("dd if=/dev/zero of=/dev/vda bs=512 count=1 conv=fsync").status, 0);
    assert!(
        guest.succeed("dd if=/dev/hwrng bs=64 count=1 2>/dev/null | od -An -tx8 | sort -u | wc -l").trim()
            != "1"
    );

    // Interrupts of all three came as messages.
    let interrupts = guest.succeed("grep PCI-MSI /proc/interrupts");
    for name in ["virtio0-req.0", "virtio1-req.0", "nvme0q0", "nvme0q1"] {
        let line =
            interrupts.lines().find(|l| l.ends_with(name)).unwrap_or_else(|| panic!("{name}: {interrupts}"));
        assert_ne!(line.split_whitespace().nth(1), Some("0"), "{line}");
    }

    check_log(&guest.succeed("dmesg -r"));

    // A file system on each, whose files are there after a reset of the machine.
    for (device, kind) in [("vdb", "ext2"), ("nvme0n1", "ext4")] {
        guest.succeed(&format!("mke2fs /dev/{device} >/dev/null && mkdir -p /mnt/{device}"));
        guest.succeed(&format!("mount -t {kind} /dev/{device} /mnt/{device}"));
        guest.succeed(&format!("echo {device} says hello > /mnt/{device}/file"));
    }
    let mut process = guest.into_process();
    process.type_bytes(b"umount /mnt/*; reboot\n");
    let mut guest = Guest::at_shell(process);
    for (device, kind) in [("vdb", "ext2"), ("nvme0n1", "ext4")] {
        guest.succeed(&format!("mkdir -p /mnt/{device}; mount -t {kind} /dev/{device} /mnt/{device}"));
        assert_eq!(guest.succeed(&format!("cat /mnt/{device}/file")), format!("{device} says hello\n"));
    }

    // Nobody else may write what this run has, nor read it.
    for option in ["--disk", "--nvme"] {
        for read_only in ["", ",ro"] {
            let file = format!("{}{read_only}", disk.display());
            let second = guest::launch(Kernel::Cloud, &[]).arg(option).arg(file).run(COMMAND);
            second.expect_status(4);
            assert!(second.errors.contains("another run has it open"), "{}", second.errors);
        }
    }

    // What the guest has flushed survives when the program is killed.
    guest.succeed("dd if=/mnt/vdb/file of=/dev/nvme0n1 bs=512 seek=20000 conv=sync,fsync 2>/dev/null");
    let process = guest.into_process();
    process.signal(Signal::KILL);
    process.finish(COMMAND);
    let mut bytes = [0; 14];
    let host = fs::File::open(nvme).expect("the disk's file");
    host.read_exact_at(&mut bytes, 20000 * 512).expect("the disk's bytes");
    assert_eq!(&bytes, b"vdb says hello");
    assert!(fs::read(Kernel::Cloud.image()).expect("the image") == image, "the image is as it was");
}

#[test]
fn files_that_are_no_disks_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let odd = dir.path().join("odd");
    fs::write(&odd, [0; 700]).expect("a file");
    let odd = odd.display().to_string();
    for (file, what) in [
        (odd.as_str(), "not a multiple of 512"),
        ("/nonexistent", "No such file"),
        ("/nonexistent,ro", "disk /nonexistent: can't be opened"),
        ("/", "can't be opened"),
    ] {
        let finished = guest::launch(Kernel::Cloud, &["--disk", file]).run(COMMAND);
        finished.expect_status(4);
        assert!(finished.errors.contains(what), "{file}: {}", finished.errors);
    }
}
