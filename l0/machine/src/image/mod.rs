//! Reading images: what kind a file is, and for a disk what its EFI system partition says
//! is to be started.
//!
//! Not supported: disks without a GPT, file systems other than FAT, compressed or
//! copy-on-write image formats.

mod bls;
mod disk;
mod error;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use crate::boot::{self, BootFile};

pub use bls::{BootEntryConf, compare_versions};
pub use disk::{FileInfo, PartitionInfo, PartitionRole, PartitionTable};
pub use error::ImageError;

use disk::Fat;

/// How much of a file's start is looked at to tell its kind.
const PROBE: u64 = 64 << 10;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// A disk with a GPT.
    Disk,
    /// A Linux bzImage.
    BzImage,
    /// A PE program, which may be a unified kernel image.
    Pe,
    /// A multiboot 1 kernel.
    Multiboot,
    /// An ELF file.
    Elf,
}

impl std::fmt::Display for ImageKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Disk => "disk image (GPT)",
            Self::BzImage => "Linux bzImage",
            Self::Pe => "unified kernel image (PE)",
            Self::Multiboot => "multiboot 1 kernel",
            Self::Elf => "ELF kernel",
        })
    }
}

/// What to start, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootSource {
    /// What the file is.
    pub kind: ImageKind,
    /// The kernel.
    pub kernel: BootFile,
    /// The initrd; several are concatenated, as Linux takes them.
    pub initrd: Option<BootFile>,
    /// The command line that the image asks for.
    pub options: Option<String>,
    /// The boot entry, for disks.
    pub entry: Option<BootEntryConf>,
}

/// All that can be said about a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskContents {
    /// The partition table.
    pub table: PartitionTable,
    /// What is on the partitions that booting looks at.
    pub volumes: Vec<Volume>,
    /// Boot entries of all volumes, the preferred one first.
    pub entries: Vec<BootEntryConf>,
    /// Which of the entries is started when none is asked for.
    pub default: Option<usize>,
}

/// A FAT file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Number of its partition.
    pub partition: u32,
    /// Volume label.
    pub label: String,
    /// Its files, in order of path.
    pub files: Vec<FileInfo>,
}

/// Opens `path` for reading, if it is something that has contents.
fn open_file(path: &Path) -> Result<(String, File, u64), ImageError> {
    let file = path.display().to_string();
    let wrap = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => ImageError::NotFound { file: file.clone() },
        _ => ImageError::Unreadable { file: file.clone(), reason: e.to_string() },
    };
    // Asked before opening: to open a pipe would wait for a writer.
    let kind = std::fs::metadata(path).map_err(wrap)?.file_type();
    let odd = [
        (kind.is_dir(), "a directory"),
        (kind.is_fifo(), "a pipe"),
        (kind.is_socket(), "a socket"),
        (kind.is_char_device(), "a character device"),
    ];
    if let Some((_, kind)) = odd.into_iter().find(|(is, _)| *is) {
        return Err(ImageError::NotAFile { file, kind });
    }
    let mut handle = File::open(path).map_err(wrap)?;
    // The end and not the metadata, which say 0 of a block device.
    let len = handle.seek(SeekFrom::End(0)).map_err(wrap)?;
    if len == 0 {
        return Err(ImageError::Empty { file });
    }
    Ok((file, handle, len))
}

fn read_at_start(file: &str, handle: &mut File, limit: u64) -> Result<Vec<u8>, ImageError> {
    let wrap = |e: io::Error| ImageError::Unreadable { file: file.into(), reason: e.to_string() };
    handle.seek(SeekFrom::Start(0)).map_err(wrap)?;
    let mut data = Vec::new();
    handle.take(limit).read_to_end(&mut data).map_err(wrap)?;
    Ok(data)
}

/// The kind that the start of a file, which may be packed, tells; disks are told apart
/// before.
fn kind_of(head: &[u8]) -> Option<ImageKind> {
    match boot::Compression::detect(head) {
        Some(format) => kind_of_plain(&boot::decompress_start(format, head, PROBE)),
        None => kind_of_plain(head),
    }
}

fn kind_of_plain(head: &[u8]) -> Option<ImageKind> {
    if boot::is_bzimage(head) {
        Some(ImageKind::BzImage)
    } else if boot::is_pe(head) {
        Some(ImageKind::Pe)
    } else if boot::find_multiboot_header(head).is_some() {
        Some(ImageKind::Multiboot)
    } else if head.starts_with(b"\x7fELF") {
        Some(ImageKind::Elf)
    } else {
        None
    }
}

/// Says what `path` is, without reading all of it.
///
/// # Errors
/// [`ImageError`] when it can't be read or is nothing known.
pub fn detect(path: &Path) -> Result<ImageKind, ImageError> {
    let (file, mut handle, _) = open_file(path)?;
    detect_open(&file, &mut handle).map(|(kind, _)| kind)
}

/// The kind of an open file, and the block size if it is a disk.
fn detect_open(file: &str, handle: &mut File) -> Result<(ImageKind, u64), ImageError> {
    let block_size = disk::gpt_block_size(handle)
        .map_err(|e| ImageError::Unreadable { file: file.into(), reason: e.to_string() })?;
    if let Some(block_size) = block_size {
        return Ok((ImageKind::Disk, block_size));
    }
    let head = read_at_start(file, handle, PROBE)?;
    match kind_of(&head) {
        Some(kind) => Ok((kind, 0)),
        None => Err(ImageError::UnknownFormat { file: file.into(), found: boot::describe(&head) }),
    }
}

/// Reads a whole file, e.g. for `--kernel` and `--initrd`.
///
/// # Errors
/// [`ImageError`] when it can't be read, is empty or larger than `limit` bytes.
pub fn read_file(path: &Path, limit: u64) -> Result<BootFile, ImageError> {
    let (name, mut handle, len) = open_file(path)?;
    read_whole(name, &mut handle, len, limit)
}

fn read_whole(name: String, handle: &mut File, len: u64, limit: u64) -> Result<BootFile, ImageError> {
    if len > limit {
        return Err(ImageError::TooBig { file: name, len, limit });
    }
    let data = read_at_start(&name, handle, limit)?;
    Ok(BootFile { name, data })
}

/// Finds out what is to be started from `path`: the file itself if it is a kernel, else the
/// entry of the disk that is called `entry` (a name or pattern) or is its default. `limit`,
/// the size of RAM in bytes, bounds each file.
///
/// # Errors
/// [`ImageError`].
pub fn open(path: &Path, entry: Option<&str>, limit: u64) -> Result<BootSource, ImageError> {
    let (file, mut handle, len) = open_file(path)?;
    let (kind, block_size) = detect_open(&file, &mut handle)?;
    if kind != ImageKind::Disk {
        let kernel = read_whole(file, &mut handle, len, limit)?;
        return Ok(BootSource { kind, kernel, initrd: None, options: None, entry: None });
    }
    let disk = Disk::open(file, handle, block_size)?;
    disk.boot_source(entry, limit)
}

/// Lists what is on the disk image `path`.
///
/// # Errors
/// [`ImageError`]; also when it is no disk or has no EFI system partition.
pub fn read_disk(path: &Path) -> Result<DiskContents, ImageError> {
    let (file, mut handle, _) = open_file(path)?;
    let (kind, block_size) = detect_open(&file, &mut handle)?;
    if kind != ImageKind::Disk {
        return Err(ImageError::UnknownFormat { file, found: "a kernel, not a disk" });
    }
    let disk = Disk::open(file, handle, block_size)?;
    let mut volumes = Vec::new();
    for (partition, fat) in &disk.volumes {
        volumes.push(Volume { partition: partition.number, label: fat.label(), files: fat.files()? });
    }
    let found = disk.entries()?;
    let entries: Vec<BootEntryConf> = found.into_iter().map(|(_, e)| e).collect();
    let pattern = disk.default_pattern()?;
    let default = bls::choose(&entries, pattern.as_deref()).and_then(|c| entries.iter().position(|e| e == c));
    Ok(DiskContents { table: disk.table, volumes, entries, default })
}

struct Disk {
    file: String,
    table: PartitionTable,
    volumes: Vec<(PartitionInfo, Fat)>,
}

impl Disk {
    fn open(file: String, mut handle: File, block_size: u64) -> Result<Self, ImageError> {
        let table = disk::read_table(&file, &mut handle, block_size)?;
        let with = |role| table.partitions.iter().filter(move |p| p.role == role);
        if with(PartitionRole::Esp).next().is_none() {
            let found: Vec<String> =
                table.partitions.iter().map(|p| format!("{} {:?}", p.number, p.name)).collect();
            let found = if found.is_empty() { "no partition at all".into() } else { found.join(", ") };
            return Err(ImageError::NoEsp { file, found });
        }
        let mut volumes = Vec::new();
        for p in with(PartitionRole::Esp) {
            volumes.push((p.clone(), Fat::open(&file, &handle, p)?));
        }
        // An extended boot loader partition may have another file system; then it is left out.
        for p in with(PartitionRole::Xbootldr) {
            volumes.extend(Fat::open(&file, &handle, p).ok().map(|fat| (p.clone(), fat)));
        }
        Ok(Self { file, table, volumes })
    }

    fn default_pattern(&self) -> Result<Option<String>, ImageError> {
        for (_, fat) in &self.volumes {
            if let Some(text) = fat.read("loader/loader.conf", bls::ENTRY_MAX)? {
                return Ok(bls::default_pattern(&String::from_utf8_lossy(&text)));
            }
        }
        Ok(None)
    }

    /// All entries with the index of their volume, the preferred one first.
    fn entries(&self) -> Result<Vec<(usize, BootEntryConf)>, ImageError> {
        let ends_with = |name: &String, suffix: &str| name.to_ascii_lowercase().ends_with(suffix);
        let mut entries = Vec::new();
        for (volume, (_, fat)) in self.volumes.iter().enumerate() {
            for name in fat.names("loader/entries")?.iter().filter(|n| ends_with(n, ".conf")) {
                if let Some(text) = fat.read(&format!("loader/entries/{name}"), bls::ENTRY_MAX)? {
                    entries.push((volume, BootEntryConf::parse(name, &String::from_utf8_lossy(&text))));
                }
            }
            for name in fat.names("EFI/Linux")?.iter().filter(|n| ends_with(n, ".efi")) {
                let mut entry = BootEntryConf::named(name);
                entry.efi = Some(format!("/EFI/Linux/{name}"));
                entries.push((volume, entry));
            }
        }
        entries.sort_by(|(_, a), (_, b)| bls::order(a, b));
        Ok(entries)
    }

    fn boot_source(&self, wanted: Option<&str>, limit: u64) -> Result<BootSource, ImageError> {
        let found = self.entries()?;
        let entries: Vec<BootEntryConf> = found.iter().map(|(_, e)| e.clone()).collect();
        if entries.is_empty() {
            return Err(ImageError::NoEntry { file: self.file.clone() });
        }
        let default = self.default_pattern()?;
        let pattern = wanted.or(default.as_deref());
        let chosen =
            bls::choose(&entries, pattern).ok_or_else(|| ImageError::NoEntry { file: self.file.clone() })?;
        if let Some(wanted) = wanted
            && !bls::matches(chosen, wanted)
        {
            let available: Vec<&str> = entries.iter().map(|e| e.id.as_str()).collect();
            return Err(ImageError::NoSuchEntry {
                file: self.file.clone(),
                wanted: wanted.into(),
                available: available.join(", "),
            });
        }
        let volume = found.iter().find(|(_, e)| e == chosen).map_or(0, |(v, _)| *v);
        let Some((_, fat)) = self.volumes.get(volume) else {
            return Err(ImageError::NoEntry { file: self.file.clone() });
        };
        self.load_entry(fat, chosen, limit)
    }

    fn load_entry(&self, fat: &Fat, entry: &BootEntryConf, limit: u64) -> Result<BootSource, ImageError> {
        let read = |path: &str| -> Result<BootFile, ImageError> {
            let data = fat.read(path, limit)?.ok_or_else(|| ImageError::MissingFile {
                file: self.file.clone(),
                entry: entry.file_name.clone(),
                path: path.into(),
            })?;
            Ok(BootFile { name: format!("{}: {path}", self.file), data })
        };
        let Some(path) = entry.linux.as_ref().or(entry.efi.as_ref()) else {
            return Err(ImageError::BadEntry {
                file: self.file.clone(),
                entry: entry.file_name.clone(),
                reason: "it has neither a linux nor an efi line".into(),
            });
        };
        let kernel = read(path)?;
        if kernel.data.is_empty() {
            return Err(ImageError::Empty { file: kernel.name });
        }
        let mut initrd: Option<BootFile> = None;
        for path in &entry.initrds {
            let next = read(path)?;
            match &mut initrd {
                None => initrd = Some(next),
                Some(all) => {
                    // Linux finds the next archive at a multiple of 4 bytes.
                    all.data.resize(all.data.len().next_multiple_of(4), 0);
                    all.data.extend_from_slice(&next.data);
                    let len = all.data.len() as u64;
                    if len > limit {
                        return Err(ImageError::TooBig { file: next.name, len, limit });
                    }
                }
            }
        }
        Ok(BootSource {
            kind: ImageKind::Disk,
            kernel,
            initrd,
            options: entry.options.clone(),
            entry: Some(entry.clone()),
        })
    }
}

#[cfg(test)]
mod tests;
