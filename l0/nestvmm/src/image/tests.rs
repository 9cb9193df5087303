//! Images built from fake kernels and programs, read back through `machine::image`.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use machine::image::{self as reading, ImageKind};

use super::kmod::tests::fake_module;
use super::*;

/// A bzImage header by Documentation/arch/x86/boot.rst, with nothing behind it.
fn fake_kernel(version: &str) -> Vec<u8> {
    let mut k = vec![0; 4096];
    k[0x1f1] = 1;
    k[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    k[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    k[0x202..0x206].copy_from_slice(b"HdrS");
    k[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    k[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
    k[0x211] = 1;
    k[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
    k[0x300..0x300 + version.len()].copy_from_slice(version.as_bytes());
    k
}

/// The least that counts as a static x86-64 program: an ELF header and one `PT_LOAD`.
fn fake_program(kind: u32) -> Vec<u8> {
    let mut elf = vec![0; 64 + 56];
    elf[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    elf[16] = 2;
    elf[18] = 62;
    elf[20] = 1;
    elf[32] = 64;
    elf[52] = 64;
    elf[54] = 56;
    elf[56] = 1;
    elf[64..68].copy_from_slice(&kind.to_le_bytes());
    elf
}

const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;

struct Setup {
    dir: tempfile::TempDir,
    options: BuildOptions,
}

/// Options that need no packages.
fn setup() -> Setup {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("vmlinuz"), fake_kernel("6.9.0-test (me) #1")).unwrap();
    fs::write(at("busybox"), fake_program(PT_LOAD)).unwrap();
    fs::write(at("nestvmm"), fake_program(PT_LOAD)).unwrap();
    fs::write(at("tool"), b"#!/bin/sh\n").unwrap();
    fs::set_permissions(at("tool"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir_all(at("modules/kernel/kvm")).unwrap();
    fs::write(at("modules/kernel/kvm/kvm.ko"), fake_module("irqbypass")).unwrap();
    fs::write(at("modules/kernel/kvm/kvm-intel.ko"), fake_module("kvm")).unwrap();
    fs::write(at("modules/kernel/irqbypass.ko"), fake_module("")).unwrap();
    let options = BuildOptions {
        kernel_file: Some(at("vmlinuz")),
        modules_dir: Some(at("modules")),
        busybox: Some(at("busybox")),
        nestvmm: Some(at("nestvmm")),
        files: vec![(at("tool"), "/opt/bin/tool".into())],
        ..BuildOptions::new(at("l1.img"))
    };
    Setup { dir, options }
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|w| w == needle)
}

#[test]
fn what_is_built_is_read_back() {
    let s = setup();
    let report = build(s.options.clone()).unwrap();
    assert_eq!(report.kernel_release, "6.9.0-test");
    assert_eq!(report.modules, ["irqbypass", "kvm", "kvm_intel"]);
    assert!(report.has_nestvmm);
    assert_eq!(report.notices.len(), 1, "kvm_amd is missing: {:?}", report.notices);
    assert_eq!(fs::metadata(&s.options.output).unwrap().len(), report.size);

    let source = reading::open(&s.options.output, None, 64 << 20).unwrap();
    assert_eq!(source.kind, ImageKind::Disk);
    assert_eq!(source.kernel.data, fake_kernel("6.9.0-test (me) #1"));
    assert_eq!(source.options.as_deref(), Some(DEFAULT_COMMAND_LINE));
    assert_eq!(source.entry.unwrap().id, "nestvmm");
    let initrd = source.initrd.unwrap().data;
    assert_eq!(initrd.len() as u64, report.initrd_size);
    for name in ["init", "bin/busybox", "bin/nestvmm", "opt/bin/tool", "dev/console"] {
        assert!(contains(&initrd, format!("{name}\0").as_bytes()), "{name}");
    }
    for name in [crate::exec::MARK, "bin/boot-l2", "boot/l2/linux", "boot/l2/initrd", "boot/l2/options"] {
        assert!(contains(&initrd, format!("{name}\0").as_bytes()), "{name}");
    }
    assert!(contains(&initrd, b"l1\n") && contains(&initrd, b"l2\n"), "host names");
    crate::exec::host::Exec::check_initrd(Some(&BootFile { name: "initrd".into(), data: initrd.clone() }))
        .unwrap();
    assert!(contains(&initrd, b"kernel/kvm/kvm-intel.ko: kernel/kvm/kvm.ko kernel/irqbypass.ko\n"));
    assert!(contains(&initrd, b"lib/modules/6.9.0-test/kernel/kvm/kvm-intel.ko\0"));

    let text = inspect(&s.options.output).unwrap().to_string();
    for part in [
        "EFI system partition",
        "/loader/entries/nestvmm.conf",
        "nestvmm.conf: nestvmm demonstration L1 (Linux 6.9.0-test) (default)",
        "boot protocol 2.15",
        "version  6.9.0-test (me) #1",
        "not compressed",
    ] {
        assert!(text.contains(part), "{part:?} is not in:\n{text}");
    }
}

#[test]
fn what_l2_is_made_of() {
    let s = setup();
    let at = |name: &str| s.dir.path().join(name);
    fs::write(at("other"), fake_kernel("6.8.0-other (me) #2")).unwrap();
    let built = |l2: L2Options| {
        let report = build(BuildOptions { force: true, l2, ..s.options.clone() }).unwrap();
        let source = reading::open(&s.options.output, None, 64 << 20).unwrap();
        (report, source.initrd.unwrap().data)
    };
    let (report, initrd) = built(L2Options { present: false, ..L2Options::default() });
    assert_eq!(report.l2_kernel, None);
    assert!(!contains(&initrd, b"boot-l2\0"));

    let (report, _) = built(L2Options::default());
    assert_eq!(report.l2_kernel.unwrap().0, "6.9.0-test", "L1's kernel");

    let (report, initrd) = built(L2Options {
        kernel_file: Some(at("other")),
        files: vec![(at("tool"), "/opt/l2-tool".into())],
        command_line: "console=ttyS0 only-l2".into(),
        ..L2Options::default()
    });
    assert_eq!(report.l2_kernel.unwrap().0, "6.8.0-other");
    assert!(report.notices.iter().any(|n| n.contains("L2 has")), "{:?}", report.notices);
    for part in ["6.8.0-other (me)", "opt/l2-tool\0", "console=ttyS0 only-l2\n", "lib/modules/6.8.0-other"] {
        assert!(contains(&initrd, part.as_bytes()), "{part}");
    }
}

#[test]
fn a_compressed_initrd_serves_commands_too() {
    let s = setup();
    for compression in [InitrdCompression::Gzip, InitrdCompression::Lz4] {
        build(BuildOptions { force: true, compression, ..s.options.clone() }).unwrap();
        let source = reading::open(&s.options.output, None, 64 << 20).unwrap();
        crate::exec::host::Exec::check_initrd(source.initrd.as_ref()).unwrap();
    }
}

#[test]
fn the_same_parts_make_the_same_image() {
    let s = setup();
    build(s.options.clone()).unwrap();
    let first = fs::read(&s.options.output).unwrap();
    build(BuildOptions { force: true, ..s.options.clone() }).unwrap();
    assert!(fs::read(&s.options.output).unwrap() == first);
}

#[test]
fn an_image_is_replaced_only_when_told_and_only_whole() {
    let s = setup();
    fs::write(&s.options.output, b"precious").unwrap();
    assert!(matches!(build(s.options.clone()), Err(ImageError::Exists { .. })));
    // With force, a build that fails leaves it as it was, and nothing beside it.
    fs::write(s.dir.path().join("modules/kernel/kvm/kvm.ko"), b"no module").unwrap();
    let forced = BuildOptions { force: true, ..s.options.clone() };
    assert!(matches!(build(forced), Err(ImageError::BadModule { .. })));
    assert_eq!(fs::read(&s.options.output).unwrap(), b"precious");
    let names = fs::read_dir(s.dir.path()).unwrap().flatten().map(|e| e.file_name());
    assert!(!names.into_iter().any(|n| n.to_string_lossy().starts_with('.')));
}

#[test]
fn unusable_parts_are_named() {
    let s = setup();
    let at = |name: &str| s.dir.path().join(name);
    let o = || s.options.clone();
    fs::write(at("dynamic"), fake_program(PT_INTERP)).unwrap();
    fs::write(at("nameless"), fake_kernel("")).unwrap();
    fs::write(at("evil"), fake_kernel("../../etc")).unwrap();

    let busybox = build(BuildOptions { busybox: Some(at("dynamic")), ..o() }).unwrap_err().to_string();
    assert!(busybox.contains("dynamically linked") && busybox.contains("--busybox"), "{busybox}");
    let nestvmm = build(BuildOptions { nestvmm: Some(at("tool")), ..o() }).unwrap_err().to_string();
    assert!(nestvmm.contains("--nestvmm"), "{nestvmm}");
    for kernel in ["nameless", "evil"] {
        let e = build(BuildOptions { kernel_file: Some(at(kernel)), ..o() }).unwrap_err();
        assert!(matches!(e, ImageError::BadOption(_)), "{e}");
    }
    let e = build(BuildOptions { kernel_file: Some(at("tool")), ..o() }).unwrap_err();
    assert!(matches!(e, ImageError::Kernel(_)), "{e}");
    let e = build(BuildOptions { kernel_file: Some(at("missing")), ..o() }).unwrap_err();
    assert!(matches!(e, ImageError::Image(reading::ImageError::NotFound { .. })), "{e}");
    let e = build(BuildOptions { modules_dir: Some(at("missing")), ..o() }).unwrap_err();
    assert!(matches!(e, ImageError::Read { .. }), "{e}");
    let e = build(BuildOptions { modules: vec!["zfs".into()], ..o() }).unwrap_err();
    assert!(e.to_string().contains("no module zfs"), "{e}");
    let e = build(BuildOptions { output: at("no/such/dir/l1.img"), ..o() }).unwrap_err();
    assert!(matches!(e, ImageError::Write { .. }), "{e}");
    for to in ["", "/", "a/../b", "dir/"] {
        let e = build(BuildOptions { files: vec![(at("tool"), to.into())], ..o() }).unwrap_err();
        assert!(matches!(e, ImageError::BadOption(_)), "{to:?}: {e}");
    }
    assert!(!s.options.output.exists());
}

#[test]
fn debug_information_stays_outside() {
    let mut program = fake_program(PT_LOAD);
    // The segment ends with the headers, at 120; sections come after it.
    program[64 + 32..64 + 40].copy_from_slice(&120_u64.to_le_bytes());
    program[40..48].copy_from_slice(&200_u64.to_le_bytes());
    let mut whole = program.clone();
    whole.resize(500, 0xdd);
    program[40..48].fill(0);
    assert_eq!(without_debug_information(whole), program);
    assert_eq!(without_debug_information(b"#!/bin/sh\n".to_vec()), b"#!/bin/sh\n");
}

#[test]
fn inspecting_what_is_no_image() {
    let s = setup();
    let kernel = inspect(s.options.kernel_file.as_deref().unwrap()).unwrap().to_string();
    assert!(kernel.contains("Linux bzImage, boot protocol 2.15"), "{kernel}");
    let e = inspect(&s.dir.path().join("tool")).unwrap_err().to_string();
    assert!(e.contains("a script"), "{e}");
    let e = inspect(s.dir.path()).unwrap_err().to_string();
    assert!(e.contains("a directory"), "{e}");
}

#[test]
fn kernel_packages_are_told_from_metapackages() {
    for (name, yes) in [
        ("linux-image-6.1.0-56-cloud-amd64", true),
        ("linux-image-unsigned-6.8.0-31-generic", true),
        ("linux-image-cloud-amd64", false),
        ("linux-base", false),
    ] {
        assert_eq!(is_versioned(name, "linux-image-"), yes, "{name}");
    }
}

/// Packages as dpkg-deb makes them, with each compression of their data.
#[test]
fn packages_are_unpacked() {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, data) in [("./bin/busybox", b"program".as_slice()), ("./usr/share/doc/x", b"text")] {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o755);
        header.set_cksum();
        tar.append_data(&mut header, path, data).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.deb");
    let gz = initrd::pack(tar.clone(), InitrdCompression::Gzip).unwrap();
    let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::default()).unwrap();
    std::io::Write::write_all(&mut xz, &tar).unwrap();
    let xz = xz.finish().unwrap();
    let zst = ruzstd::encoding::compress_to_vec(tar.as_slice(), ruzstd::encoding::CompressionLevel::Fastest);
    for (member, data) in
        [("data.tar", &tar), ("data.tar.gz", &gz), ("data.tar.xz", &xz), ("data.tar.zst", &zst)]
    {
        let mut ar = ar::Builder::new(Vec::new());
        for (name, data) in [("debian-binary", b"2.0\n".as_slice()), ("control.tar.xz", b""), (member, data)]
        {
            ar.append(&ar::Header::new(name.into(), data.len() as u64), data).unwrap();
        }
        let whole = ar.into_inner().unwrap();
        fs::write(&path, &whole).unwrap();
        let files = deb::extract(&path, |p| p.starts_with("bin/")).unwrap();
        let expected = deb::PackedFile { path: "bin/busybox".into(), data: b"program".to_vec() };
        assert_eq!(files, [expected], "{member}");
        // A package cut off in the middle of its data is an error.
        fs::write(&path, &whole[..whole.len() - data.len() / 2]).unwrap();
        assert!(deb::extract(&path, |p| p.starts_with("usr/")).is_err(), "{member}");
    }
    fs::write(&path, b"!<arch>\n").unwrap();
    assert!(matches!(deb::extract(&path, |_| true), Err(ImageError::BadPackage { .. })));
}
