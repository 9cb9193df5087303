//! Bad input made from real images and kernels: one message that names the file, and its status, at once.
//! Files made up for the purpose are tested beside the program and its loaders.

use std::fs;
use std::path::Path;
use std::time::Duration;

use tests::artifacts::Kernel;
use tests::guest;
use tests::process::{Finished, Launch};

/// Errors come before anything is booted.
const LIMIT: Duration = Duration::from_secs(30);

/// Checks for one line on standard error that has all of `words`.
#[track_caller]
fn one_message(finished: &Finished, status: i32, words: &[&str]) {
    finished.expect_status(status);
    assert_eq!(finished.output, "");
    assert_eq!(finished.errors.lines().count(), 1, "{}", finished.errors);
    for word in words {
        assert!(finished.errors.contains(word), "no {word:?} in {:?}", finished.errors);
    }
}

fn write(dir: &Path, name: &str, data: &[u8]) -> std::path::PathBuf {
    let path = dir.join(name);
    fs::write(&path, data).expect("the folder is writable");
    path
}

#[test]
fn images_cut_off_anywhere() {
    let image = fs::read(Kernel::Cloud.image()).expect("the image is there");
    let dir = tempfile::tempdir().expect("the host has a temporary folder");
    // In the protective MBR, the partition table, the file system's tables, its files.
    for length in [1, 511, 513, 1024, 16 << 10, 1 << 20, (1 << 20) + 700, 3 << 20, image.len() / 2] {
        let cut = write(dir.path(), &format!("cut-{length}.img"), image.get(..length).expect("it is longer"));
        let name = format!("cut-{length}.img");
        one_message(&Launch::new(["run"]).path(&cut).run(LIMIT), 4, &[&name]);
    }
}

#[test]
fn kernels_and_initrds_cut_off() {
    let (vmlinuz, _) = Kernel::Cloud.files();
    let kernel = fs::read(&vmlinuz).expect("the kernel is there");
    let dir = tempfile::tempdir().expect("the host has a temporary folder");
    for length in [0x200, 0x300, 0x1000, kernel.len() / 2, kernel.len() / 8 * 7, kernel.len() - 4096] {
        let name = format!("cut-{length}");
        let cut = write(dir.path(), &name, kernel.get(..length).expect("it is longer"));
        one_message(&Launch::new(["run", "--kernel"]).path(&cut).run(LIMIT), 4, &[&name]);
    }
}

#[test]
fn an_entry_without_a_kernel() {
    let mut image = fs::read(Kernel::Cloud.image()).expect("the image is there");
    let key = b"\nlinux /nestvmm";
    let at = image.windows(key.len()).position(|w| w == key).expect("the image has a boot entry");
    *image.get_mut(at + 1).expect("found just now") = b'#';
    let dir = tempfile::tempdir().expect("the host has a temporary folder");
    let path = write(dir.path(), "no-kernel.img", &image);
    one_message(&Launch::new(["run"]).path(&path).run(LIMIT), 4, &["no-kernel.img"]);
}

#[test]
fn an_entry_that_is_not_there() {
    let launch = guest::launch(Kernel::Cloud, &["--entry", "no-such-entry"]);
    one_message(&launch.run(LIMIT), 4, &["no-such-entry"]);
}

#[test]
fn devices_are_no_images() {
    for device in ["/dev/null", "/dev/zero"] {
        one_message(&Launch::new(["run", device]).run(LIMIT), 4, &[device]);
        let (vmlinuz, _) = Kernel::Cloud.files();
        let launch = Launch::new(["run", "--initrd", device, "--kernel"]).path(&vmlinuz);
        one_message(&launch.run(LIMIT), 4, &[device]);
    }
}

#[test]
fn a_kernel_that_does_not_fit() {
    let (vmlinuz, _) = Kernel::Cloud.files();
    let dir = tempfile::tempdir().expect("the host has a temporary folder");
    let initrd = write(dir.path(), "big-initrd", &vec![0x5a; 60 << 20]);
    let launch =
        Launch::new(["run", "--memory", "64M", "--kernel"]).path(&vmlinuz).arg("--initrd").path(&initrd);
    one_message(&launch.run(LIMIT), 4, &["big-initrd"]);
}

#[test]
fn an_existing_image_is_not_overwritten() {
    let dir = tempfile::tempdir().expect("the host has a temporary folder");
    let path = write(dir.path(), "mine.img", b"precious");
    let finished = Launch::new(["image", "build"]).path(&path).run(LIMIT);
    one_message(&finished, 2, &["mine.img", "--force"]);
    assert_eq!(fs::read(&path).expect("the file is there"), b"precious");
}

#[test]
fn an_image_is_described() {
    let finished = Launch::new(["image", "inspect"]).path(Kernel::Cloud.image()).run(LIMIT);
    finished.expect_status(0);
    for text in ["EFI system partition", "nestvmm.conf", "-cloud-amd64", "console=ttyS0", "bzImage", "initrd"]
    {
        assert!(finished.output.contains(text), "no {text:?} in {}", finished.output);
    }
}
