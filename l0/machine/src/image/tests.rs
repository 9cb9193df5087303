//! Disk images made for the test, whole and damaged.

use std::fs;
use std::io::{Cursor, Write};

use gpt::disk::LogicalBlockSize;
use proptest::prelude::*;

use super::*;
use crate::boot::testing::{bzimage, gzip};

const MIB: usize = 1 << 20;
const ESP_START: usize = MIB;
const ESP_LEN: usize = 3 * MIB;

/// A FAT file system of 3 MiB with `files`.
fn fat(files: &[(&str, &[u8])]) -> Vec<u8> {
    format(ESP_LEN, fatfs::FormatVolumeOptions::new(), files)
}

fn format(len: usize, options: fatfs::FormatVolumeOptions, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut volume = Cursor::new(vec![0; len]);
    fatfs::format_volume(&mut volume, options).unwrap();
    volume.set_position(0);
    let fs = fatfs::FileSystem::new(&mut volume, fatfs::FsOptions::new()).unwrap();
    for (path, data) in files {
        let mut dir = fs.root_dir();
        let mut rest = *path;
        while let Some((first, more)) = rest.split_once('/') {
            dir = dir.create_dir(first).unwrap();
            rest = more;
        }
        dir.create_file(rest).unwrap().write_all(data).unwrap();
    }
    fs.unmount().unwrap();
    volume.into_inner()
}

/// A disk whose only partition, of 3 MiB or more, has `volume` and the given type.
fn disk(volume: &[u8], kind: gpt::partition_types::Type, block: LogicalBlockSize) -> Vec<u8> {
    let size = u64::from(block);
    let mut image = Cursor::new(vec![0; volume.len().max(ESP_LEN) + 2 * MIB]);
    let mut table = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(block)
        .create_from_device(&mut image, None)
        .unwrap();
    let partition = gpt::partition::Partition {
        part_type_guid: kind,
        part_guid: table.guid().to_owned(),
        first_lba: ESP_START as u64 / size,
        last_lba: (ESP_START + volume.len().max(ESP_LEN)) as u64 / size - 1,
        flags: 0,
        name: "boot".into(),
    };
    table.update_partitions([(1, partition)].into_iter().collect()).unwrap();
    table.write().unwrap();
    let mut image = image.into_inner();
    image[ESP_START..ESP_START + volume.len()].copy_from_slice(volume);
    image
}

fn esp(files: &[(&str, &[u8])]) -> Vec<u8> {
    disk(&fat(files), gpt::partition_types::EFI, LogicalBlockSize::Lb512)
}

fn kernel() -> Vec<u8> {
    bzimage(&gzip(b"not really a kernel"))
}

/// A disk with two entries, of which loader.conf prefers the older.
fn two_entries() -> Vec<u8> {
    esp(&[
        ("loader/loader.conf", b"timeout 5\ndefault old-*\n"),
        ("loader/entries/new-kernel.conf", b"title New\nversion 6.10\nlinux /k/new\ninitrd /k/initrd-1\n"),
        (
            "loader/entries/old-kernel.conf",
            b"title Old\nversion 6.9\nlinux \\k\\old\ninitrd /k/initrd-1\ninitrd /k/initrd-2\noptions a=1\noptions b\n",
        ),
        ("loader/entries/README", b"no entry"),
        ("k/new", b"MZ new"),
        ("k/old", &kernel()),
        ("k/initrd-1", b"first"),
        ("k/initrd-2", b"second"),
    ])
}

fn with_file<T>(data: &[u8], f: impl FnOnce(&Path) -> T) -> T {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("test.img");
    fs::write(&path, data).unwrap();
    f(&path)
}

fn open_bytes(data: &[u8], entry: Option<&str>) -> Result<BootSource, ImageError> {
    with_file(data, |p| open(p, entry, MIB as u64))
}

#[test]
fn the_default_entry_of_a_disk() {
    let s = open_bytes(&two_entries(), None).unwrap();
    assert_eq!(s.kind, ImageKind::Disk);
    assert_eq!(s.entry.unwrap().id, "old-kernel");
    assert_eq!(s.kernel.data, kernel());
    assert!(s.kernel.name.ends_with("test.img: \\k\\old"));
    // The second archive starts at a multiple of 4.
    assert_eq!(s.initrd.unwrap().data, b"first\0\0\0second");
    assert_eq!(s.options.as_deref(), Some("a=1 b"));
}

#[test]
fn an_entry_asked_for() {
    assert_eq!(open_bytes(&two_entries(), Some("new-kernel")).unwrap().kernel.data, b"MZ new");
    let e = open_bytes(&two_entries(), Some("none")).unwrap_err();
    assert!(matches!(e, ImageError::NoSuchEntry { .. }));
    assert!(e.to_string().contains("old-kernel, new-kernel"), "{e}");
}

#[test]
fn blocks_of_4096_bytes() {
    let volume = fat(&[("loader/entries/a.conf", b"linux /k"), ("k", &kernel())]);
    let image = disk(&volume, gpt::partition_types::EFI, LogicalBlockSize::Lb4096);
    assert_eq!(open_bytes(&image, None).unwrap().kernel.data, kernel());
}

#[test]
fn fat32() {
    let options = fatfs::FormatVolumeOptions::new().fat_type(fatfs::FatType::Fat32).bytes_per_cluster(512);
    let big: Vec<u8> = (0..MIB as u32).map(|i| (i / 3) as u8).collect();
    let volume = format(36 * MIB, options, &[("loader/entries/a.conf", b"linux /k"), ("k", &big)]);
    let image = disk(&volume, gpt::partition_types::EFI, LogicalBlockSize::Lb512);
    assert!(open_bytes(&image, None).unwrap().kernel.data == big);
}

#[test]
fn unified_kernels_are_entries_too() {
    let image = esp(&[("EFI/Linux/b.efi", &kernel()), ("EFI/BOOT/BOOTX64.EFI", b"MZ")]);
    let s = open_bytes(&image, None).unwrap();
    assert_eq!((s.entry.unwrap().id.as_str(), s.kernel.data), ("b", kernel()));
}

#[test]
fn contents_are_listed() {
    let c = with_file(&two_entries(), read_disk).unwrap();
    assert_eq!(c.table.partitions.len(), 1);
    let p = &c.table.partitions[0];
    assert_eq!((p.start, p.len, p.role, p.name.as_str()), (MIB as u64, 3 << 20, PartitionRole::Esp, "boot"));
    let files: Vec<_> = c.volumes[0].files.iter().map(|f| (f.path.as_str(), f.len)).collect();
    assert_eq!(files[0..2], [("/k/initrd-1", 5), ("/k/initrd-2", 6)]);
    assert_eq!(files.len(), 8);
    assert_eq!(c.entries.iter().map(|e| e.display_name()).collect::<Vec<_>>(), ["Old", "New"]);
    assert_eq!(c.default, Some(0));
}

#[test]
fn what_a_disk_can_lack() {
    let linux = gpt::partition_types::LINUX_FS;
    let e = open_bytes(&disk(&fat(&[]), linux, LogicalBlockSize::Lb512), None).unwrap_err();
    assert!(matches!(e, ImageError::NoEsp { .. }) && e.to_string().contains("--kernel"), "{e}");
    let e = open_bytes(&esp(&[("loader/loader.conf", b"")]), None).unwrap_err();
    assert!(matches!(e, ImageError::NoEntry { .. }), "{e}");
    let e = open_bytes(&esp(&[("loader/entries/a.conf", b"title x")]), None).unwrap_err();
    assert!(matches!(e, ImageError::BadEntry { .. }), "{e}");
    let e = open_bytes(&esp(&[("loader/entries/a.conf", b"linux /gone")]), None).unwrap_err();
    assert!(matches!(&e, ImageError::MissingFile { path, .. } if path == "/gone"), "{e}");
    let e = open_bytes(&esp(&[("loader/entries/a.conf", b"linux /loader")]), None).unwrap_err();
    assert!(matches!(e, ImageError::MissingFile { .. }), "{e}");
    let e = open_bytes(&esp(&[("loader/entries/a.conf", b"linux /k"), ("k", b"")]), None).unwrap_err();
    assert!(matches!(e, ImageError::Empty { .. }), "{e}");
    let big = vec![1; MIB + 1];
    let e = open_bytes(&esp(&[("loader/entries/a.conf", b"linux /k"), ("k", &big)]), None).unwrap_err();
    assert!(matches!(e, ImageError::TooBig { .. }), "{e}");
    let e =
        open_bytes(&disk(&[0; 512], gpt::partition_types::EFI, LogicalBlockSize::Lb512), None).unwrap_err();
    assert!(matches!(e, ImageError::BadFileSystem { partition: 1, offset: 0x10_0000, .. }), "{e}");
}

#[test]
fn disks_cut_off() {
    let image = two_entries();
    for (len, in_table) in
        [(600, true), (1024, true), (MIB, false), (ESP_START + 512, false), (2 * MIB, false)]
    {
        let e = open_bytes(&image[..len], None).unwrap_err();
        let right = match e {
            ImageError::Truncated { .. } => true,
            ImageError::BadPartitionTable { .. } => in_table,
            _ => false,
        };
        assert!(right, "{len}: {e}");
    }
    // A backup table that is cut off is not needed.
    assert!(open_bytes(&image[..ESP_START + ESP_LEN], None).is_ok());
}

#[test]
fn files_that_are_no_images() {
    let e = open_bytes(&[], None).unwrap_err();
    assert!(matches!(e, ImageError::Empty { .. }), "{e}");
    let e = open_bytes(b"hello world", None).unwrap_err();
    assert!(matches!(e, ImageError::UnknownFormat { found: "text", .. }), "{e}");
    let e = open_bytes(&[0; 4096], None).unwrap_err();
    assert!(matches!(e, ImageError::UnknownFormat { .. }), "{e}");
    let e = open(Path::new("/nonexistent/l1.img"), None, 1).unwrap_err();
    assert!(matches!(e, ImageError::NotFound { .. }), "{e}");
    let e = open(Path::new("/"), None, 1).unwrap_err();
    assert!(matches!(e, ImageError::NotAFile { kind: "a directory", .. }), "{e}");
    let e = open(Path::new("/dev/null"), None, 1).unwrap_err();
    assert!(matches!(e, ImageError::NotAFile { kind: "a character device", .. }), "{e}");
    let e = with_file(&kernel(), |p| open(p, None, 100)).unwrap_err();
    assert!(matches!(e, ImageError::TooBig { limit: 100, .. }), "{e}");
    assert_eq!(with_file(&kernel(), detect).unwrap(), ImageKind::BzImage);
    assert_eq!(with_file(&gzip(&kernel()), detect).unwrap(), ImageKind::BzImage);
    assert!(with_file(&gzip(b"text"), detect).is_err());
}

/// Tables that say they are huge, with checksums that are right.
#[test]
fn tables_of_impossible_size() {
    for (at, value) in [(80, u32::MAX), (80, 1025), (84, 256), (84, 0)] {
        let mut image = two_entries();
        let header = &mut image[512..604];
        header[at..at + 4].copy_from_slice(&u32::to_le_bytes(value));
        header[16..20].fill(0);
        let mut crc = flate2::Crc::new();
        crc.update(header);
        header[16..20].copy_from_slice(&crc.sum().to_le_bytes());
        let e = open_bytes(&image, None).unwrap_err();
        assert!(matches!(e, ImageError::BadPartitionTable { offset: 512, .. }), "{at} {value}: {e}");
    }
}

/// A directory with a cluster that is followed by itself.
#[test]
fn circles_in_the_fat_end() {
    // More names than one cluster of a directory holds.
    let names: Vec<String> = (0..100).map(|i| format!("d/file-{i}")).collect();
    let files: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), b"".as_slice())).collect();
    let image = esp(&files);
    let fat_at = ESP_START + 512;
    let mut stuck = 0;
    // 12-bit entries: make each cluster its own successor in turn.
    for cluster in 2..24_usize {
        let mut image = image.clone();
        let at = fat_at + cluster * 3 / 2;
        let pair = u16::from_le_bytes([image[at], image[at + 1]]);
        let new = match cluster % 2 {
            0 => pair & 0xf000 | cluster as u16,
            _ => pair & 0x000f | (cluster as u16) << 4,
        };
        image[at..at + 2].copy_from_slice(&new.to_le_bytes());
        stuck += match with_file(&image, read_disk) {
            Ok(_) => 0,
            Err(e @ ImageError::BadFileSystem { .. }) if e.to_string().contains("circles") => 1,
            // So many names that the listing ends first.
            Err(e @ ImageError::BadFileSystem { .. }) if e.to_string().contains("too many") => 1,
            Err(e) => panic!("{e}"),
        };
    }
    assert!(stuck > 0, "no circle was walked");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever a damaged disk says, reading it ends with contents or an error.
    #[test]
    fn damaged_disks_never_panic(
        changes in prop::collection::vec(
            // The boot sector, the FATs, the directories and a little of everything.
            (prop_oneof![2 => 0..64_usize, 2 => 512..0x3000_usize, 3 => 0x3000..0xc000_usize, 1 => 0..ESP_LEN], any::<u8>()),
            1..12,
        ),
        fill in prop::option::of((0..0xc000_usize, prop::sample::select(vec![0_u8, 1, 0x0f, 0x7f, 0x80, 0xff]))),
    ) {
        let mut image = two_entries();
        for (at, value) in changes {
            image[ESP_START + at] = value;
        }
        if let Some((at, value)) = fill {
            image[ESP_START + at..ESP_START + at + 4].fill(value);
        }
        with_file(&image, |path| {
            let _ = open(path, None, MIB as u64);
            let _ = read_disk(path);
        });
    }

    /// The same for the partition table.
    #[test]
    fn damaged_tables_never_panic(changes in prop::collection::vec((0..2048_usize, any::<u8>()), 1..4), fix in any::<bool>()) {
        let mut image = two_entries();
        for (at, value) in changes {
            image[at] = value;
        }
        if fix {
            image[512 + 16..512 + 20].fill(0);
            let mut crc = flate2::Crc::new();
            crc.update(&image[1024..1024 + 128 * 128]);
            let parts = crc.sum().to_le_bytes();
            image[512 + 88..512 + 92].copy_from_slice(&parts);
            let mut crc = flate2::Crc::new();
            crc.update(&image[512..512 + 92]);
            let sum = crc.sum().to_le_bytes();
            image[512 + 16..512 + 20].copy_from_slice(&sum);
        }
        let _ = open_bytes(&image, None);
    }
}
