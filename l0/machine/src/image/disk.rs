//! Disk images: GPT by the `gpt` crate, FAT by `fatfs`, both kept within the partition and
//! within a budget of reads, so that damaged or hostile images end in an error.
//!
//! Not supported: MBR partitions, the backup GPT, file systems other than FAT.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::rc::Rc;

use gpt::disk::LogicalBlockSize;

use super::ImageError;

/// More partitions than the 128 that any tool makes by default.
const MAX_PARTITIONS: u32 = 1024;
/// Most directory entries listed on one partition.
const MAX_FILES: usize = 16384;
/// Deepest directory listed.
const MAX_DEPTH: usize = 16;
/// How often a partition's size can be read from it: file system code looks at a block of
/// the FAT for each block of a file, twice, and at directories for each file.
const BUDGET_TIMES: u64 = 4;
/// What can be read from a partition in excess of that.
const BUDGET_EXTRA: u64 = 64 << 20;
/// What the smallest read counts for.
const BUDGET_STEP: u64 = 512;
/// The size of a partition that the budget believes in.
const BUDGET_MAX: u64 = 2 << 30;

/// Type of the EFI system partition (UEFI Specification §5.3.3).
const ESP: &str = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B";
/// Type of the extended boot loader partition (Boot Loader Specification).
const XBOOTLDR: &str = "BC13C2FF-59E6-4262-A352-B275FD6F7172";

/// What a partition is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionRole {
    /// EFI system partition.
    Esp,
    /// Extended boot loader partition.
    Xbootldr,
    /// Anything else.
    Other,
}

/// One partition of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionInfo {
    /// Its number, from 1.
    pub number: u32,
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Name in the partition table.
    pub name: String,
    /// Type GUID.
    pub type_guid: String,
    /// Partition GUID.
    pub guid: String,
    /// What its type means for booting.
    pub role: PartitionRole,
}

/// The partition table of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionTable {
    /// Disk GUID.
    pub guid: String,
    /// Size of a logical block in bytes.
    pub block_size: u64,
    /// Partitions in order of number.
    pub partitions: Vec<PartitionInfo>,
}

/// A file on a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    /// Path from the root, with slashes.
    pub path: String,
    /// Size in bytes.
    pub len: u64,
}

/// The logical block size of the GPT on `device`, if there is one: told by the signature
/// in block 1 (UEFI Specification §5.3.2).
pub(super) fn gpt_block_size(device: &mut File) -> io::Result<Option<u64>> {
    for size in [512, 4096] {
        let mut signature = [0; 8];
        device.seek(SeekFrom::Start(size))?;
        match device.read_exact(&mut signature) {
            Ok(()) if &signature == b"EFI PART" => return Ok(Some(size)),
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(e) => return Err(e),
        }
    }
    Ok(None)
}

/// Reads the partition table of `device`, whose GPT has blocks of `block_size` bytes.
pub(super) fn read_table(
    file: &str,
    device: &mut File,
    block_size: u64,
) -> Result<PartitionTable, ImageError> {
    let bad =
        |reason: String| ImageError::BadPartitionTable { file: file.into(), offset: block_size, reason };
    let lb = if block_size == 4096 { LogicalBlockSize::Lb4096 } else { LogicalBlockSize::Lb512 };
    let disk_len = device.seek(SeekFrom::End(0)).map_err(|e| bad(e.to_string()))?;
    let header =
        gpt::header::read_header_from_arbitrary_device(device, lb).map_err(|e| bad(e.to_string()))?;
    if header.part_size != 128 || header.num_parts > MAX_PARTITIONS {
        return Err(bad(format!(
            "{} entries of {} bytes; at most {MAX_PARTITIONS} of 128 bytes are supported",
            header.num_parts, header.part_size
        )));
    }
    let entries = gpt::partition::file_read_partitions(device, &header, lb).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => ImageError::Truncated {
            file: file.into(),
            what: "the partition table".into(),
            need: header.part_start.saturating_add(32).saturating_mul(block_size),
            len: disk_len,
        },
        _ => bad(e.to_string()),
    })?;
    let mut partitions = Vec::new();
    for (number, p) in entries.iter().filter(|(_, p)| p.is_used()) {
        let range = p
            .first_lba
            .checked_mul(block_size)
            .zip(p.last_lba.checked_add(1).and_then(|end| end.checked_mul(block_size)));
        let Some((start, end)) = range.filter(|(start, end)| start < end) else {
            return Err(bad(format!("partition {number} has blocks {} to {}", p.first_lba, p.last_lba)));
        };
        let type_guid = p.part_type_guid.guid.to_string().to_uppercase();
        let role = match type_guid.as_str() {
            ESP => PartitionRole::Esp,
            XBOOTLDR => PartitionRole::Xbootldr,
            _ => PartitionRole::Other,
        };
        partitions.push(PartitionInfo {
            number: *number,
            start,
            len: end - start,
            name: p.name.clone(),
            type_guid,
            guid: p.part_guid.to_string().to_uppercase(),
            role,
        });
    }
    Ok(PartitionTable { guid: header.disk_guid.to_string().to_uppercase(), block_size, partitions })
}

/// A partition as a device of its own, read-only.
#[derive(Debug)]
struct Window {
    file: File,
    start: u64,
    len: u64,
    position: u64,
    budget: Rc<Cell<u64>>,
}

impl Read for Window {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.len.saturating_sub(self.position);
        let want = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let Some(budget) = self.budget.get().checked_sub((want as u64).max(BUDGET_STEP)) else {
            return Err(io::Error::other(
                "the same blocks are read over and over: its structures run in circles",
            ));
        };
        self.budget.set(budget);
        self.file.seek(SeekFrom::Start(self.start.saturating_add(self.position)))?;
        let n = self.file.read(buf.get_mut(..want).unwrap_or_default())?;
        self.position += n as u64;
        Ok(n)
    }
}

impl Write for Window {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "images are only read"))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Window {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        // A position that arithmetic on damaged fields came up with is no reason to go there.
        let position = position.filter(|p| *p <= self.len);
        self.position = position.ok_or_else(|| io::Error::other("a block outside the partition is used"))?;
        Ok(self.position)
    }
}

/// A FAT file system on a partition.
pub(super) struct Fat {
    file: String,
    partition: PartitionInfo,
    fs: fatfs::FileSystem<Window>,
}

impl Fat {
    /// Opens the file system of `partition` on `device`.
    pub(super) fn open(file: &str, device: &File, partition: &PartitionInfo) -> Result<Self, ImageError> {
        let bad = |reason: String| ImageError::BadFileSystem {
            file: file.into(),
            partition: partition.number,
            offset: partition.start,
            reason,
        };
        let mut device = device.try_clone().map_err(|e| bad(e.to_string()))?;
        let disk_len = device.seek(SeekFrom::End(0)).map_err(|e| bad(e.to_string()))?;
        let end = partition.start.saturating_add(partition.len);
        if end > disk_len {
            return Err(ImageError::Truncated {
                file: file.into(),
                what: format!("partition {}", partition.number),
                need: end,
                len: disk_len,
            });
        }
        let budget = partition.len.min(BUDGET_MAX) * BUDGET_TIMES + BUDGET_EXTRA;
        let mut window = Window {
            file: device,
            start: partition.start,
            len: partition.len,
            position: 0,
            budget: Rc::new(Cell::new(budget)),
        };
        check_boot_sector(&mut window).map_err(|e| bad(e.to_string()))?;
        let fs = fatfs::FileSystem::new(window, fatfs::FsOptions::new()).map_err(|e| bad(e.to_string()))?;
        Ok(Self { file: file.into(), partition: partition.clone(), fs })
    }

    /// The volume label.
    pub(super) fn label(&self) -> String {
        self.fs.volume_label()
    }

    fn bad(&self, what: &str, e: &io::Error) -> ImageError {
        ImageError::BadFileSystem {
            file: self.file.clone(),
            partition: self.partition.number,
            offset: self.partition.start,
            reason: format!("{what}: {e}"),
        }
    }

    /// Reads the file at `path`; `None` when there is none.
    pub(super) fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>, ImageError> {
        let path = normalise(path);
        let mut file = match self.fs.root_dir().open_file(&path) {
            Ok(f) => f,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {
                return Ok(None);
            }
            Err(_) if self.fs.root_dir().open_dir(&path).is_ok() => return Ok(None),
            Err(e) => return Err(self.bad(&path, &e)),
        };
        let len = file.seek(SeekFrom::End(0)).map_err(|e| self.bad(&path, &e))?;
        if len > limit {
            let file = format!("{}: {path}", self.file);
            return Err(ImageError::TooBig { file, len, limit });
        }
        file.seek(SeekFrom::Start(0)).map_err(|e| self.bad(&path, &e))?;
        let mut data = Vec::new();
        file.take(limit.saturating_add(1)).read_to_end(&mut data).map_err(|e| self.bad(&path, &e))?;
        if data.len() as u64 != len {
            return Err(ImageError::Truncated {
                file: self.file.clone(),
                what: format!("{path} on partition {}", self.partition.number),
                need: len,
                len: data.len() as u64,
            });
        }
        Ok(Some(data))
    }

    /// The names of the files in directory `path`; none when there is no such directory.
    pub(super) fn names(&self, path: &str) -> Result<Vec<String>, ImageError> {
        let dir = match self.fs.root_dir().open_dir(&normalise(path)) {
            Ok(d) => d,
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {
                return Ok(Vec::new());
            }
            Err(e) => return Err(self.bad(path, &e)),
        };
        let mut names = Vec::new();
        for entry in dir.iter().take(MAX_FILES) {
            let entry = entry.map_err(|e| self.bad(path, &e))?;
            if entry.is_file() {
                names.push(entry.file_name());
            }
        }
        names.sort();
        Ok(names)
    }

    /// All files, in order of path.
    pub(super) fn files(&self) -> Result<Vec<FileInfo>, ImageError> {
        let mut files = Vec::new();
        self.walk(&self.fs.root_dir(), "", 0, &mut files)?;
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(files)
    }

    fn walk(
        &self,
        dir: &fatfs::Dir<'_, Window>,
        prefix: &str,
        depth: usize,
        files: &mut Vec<FileInfo>,
    ) -> Result<(), ImageError> {
        for entry in dir.iter() {
            let at = || if prefix.is_empty() { "the root directory" } else { prefix };
            let entry = entry.map_err(|e| self.bad(at(), &e))?;
            let name = entry.file_name();
            if name == "." || name == ".." {
                continue;
            }
            if files.len() >= MAX_FILES || depth >= MAX_DEPTH {
                return Err(self.bad(at(), &io::Error::other("too many or too deep directories")));
            }
            let path = format!("{prefix}/{name}");
            if entry.is_dir() {
                self.walk(&entry.to_dir(), &path, depth + 1, files)?;
            } else {
                files.push(FileInfo { path, len: entry.len() });
            }
        }
        Ok(())
    }
}

/// Paths in entries start with a slash and may use backslashes; fatfs wants neither.
fn normalise(path: &str) -> String {
    let parts = path.split(['/', '\\']).filter(|p| !p.is_empty() && *p != ".");
    parts.collect::<Vec<_>>().join("/")
}

/// Checks that the sizes in the boot sector (Microsoft's FAT specification §3.1) don't
/// overflow what fatfs computes from them, which it does not check itself.
fn check_boot_sector(window: &mut Window) -> io::Result<()> {
    let mut sector = [0; 512];
    window.seek(SeekFrom::Start(0))?;
    window.read_exact(&mut sector)?;
    window.seek(SeekFrom::Start(0))?;
    let byte = |at: usize| u64::from(sector.get(at).copied().unwrap_or(0));
    let word = |at: usize| byte(at) | byte(at + 1) << 8;
    let dword = |at: usize| word(at) | word(at + 2) << 16;
    if word(510) != 0xaa55 {
        return Err(io::Error::other("it is no FAT file system (no boot sector signature)"));
    }
    let bytes_per_sector = word(11);
    let or = |narrow: u64, wide: u64| if narrow != 0 { narrow } else { wide };
    let total_sectors = or(word(19), dword(32));
    let sectors_per_fat = or(word(22), dword(36));
    if total_sectors * bytes_per_sector > window.len {
        return Err(io::Error::other(format!(
            "it says it has {total_sectors} sectors of {bytes_per_sector} bytes, more than the partition"
        )));
    }
    let fat_bits = sectors_per_fat * bytes_per_sector * 8;
    let before_data = word(14) + byte(16) * sectors_per_fat + word(17) * 32 / bytes_per_sector.max(1);
    if fat_bits > u64::from(u32::MAX) || fat_bits < 64 || before_data > u64::from(u32::MAX) {
        return Err(io::Error::other(format!("a FAT of {sectors_per_fat} sectors is not possible")));
    }
    Ok(())
}
