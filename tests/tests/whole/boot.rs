//! A distribution's kernel boots to a shell, does what is typed, and powers off.

use tests::artifacts::Kernel;
use tests::guest::{self, Guest};
use tests::process::Launch;

/// Types some commands and powers off.
fn use_shell(mut guest: Guest, kernel: Kernel) {
    let release = guest.succeed("uname -r");
    assert!(release.trim_end().ends_with(kernel.flavour()), "{release}");
    assert_eq!(guest.succeed("echo $((6 * 7))"), "42\n");
    assert_eq!(guest.shell("sh -c 'exit 3'").status, 3);
    assert_eq!(guest.succeed("seq 1 2000 | sort -rn | head -n 1"), "2000\n");
    let finished = guest.power_off();
    assert!(finished.output.contains("reboot: Power down"), "{}", finished.output);
}

#[test]
fn the_cloud_kernel_boots_from_its_image() {
    use_shell(Guest::boot(&guest::launch(Kernel::Cloud, &[])), Kernel::Cloud);
}

#[test]
fn the_generic_kernel_boots_from_its_image() {
    use_shell(Guest::boot(&guest::launch(Kernel::Generic, &[])), Kernel::Generic);
}

/// `nestvmm run --kernel FILE --initrd FILE`.
fn by_files(kernel: Kernel) -> Launch {
    let (vmlinuz, initrd) = kernel.files();
    Launch::new(["run", "--append", "console=ttyS0 loglevel=6"])
        .arg("--kernel")
        .path(&vmlinuz)
        .arg("--initrd")
        .path(&initrd)
}

#[test]
fn the_cloud_kernel_boots_from_its_files() {
    use_shell(Guest::boot(&by_files(Kernel::Cloud)), Kernel::Cloud);
}

#[test]
fn the_generic_kernel_boots_from_its_files() {
    use_shell(Guest::boot(&by_files(Kernel::Generic)), Kernel::Generic);
}
