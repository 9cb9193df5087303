//! Writing a disk image: a GPT with one EFI system partition, whole or not at all.

use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use gpt::disk::LogicalBlockSize;
use gpt::mbr::ProtectiveMBR;
use gpt::partition::Partition;

use super::progress::Step;
use crate::interrupt;

const BLOCK: u64 = 512;
const MIB: u64 = 1 << 20;
/// The partition starts at 1 MiB, as partitioning tools align it.
const START: u64 = MIB;

/// A file for the partition: path with slashes, contents.
pub(super) type EspFile<'a> = (String, &'a [u8]);

/// Writes image `path` with `files` on its EFI system partition, and returns its size in
/// bytes. What is at `path` stays as it is until the new image is complete.
pub(super) fn write(path: &Path, files: &[EspFile<'_>]) -> io::Result<u64> {
    let content: u64 = files.iter().map(|(_, d)| (d.len() as u64).next_multiple_of(64 << 10)).sum();
    // Room for the FATs, directories and a few small files more.
    let esp = (content + content / 64 + 4 * MIB).next_multiple_of(MIB);
    // The backup GPT takes 33 blocks at the end.
    let total = START + esp + MIB;

    let dir = directory_of(path);
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (mut scratch, _guard) = interrupt::scratch_file(|| {
        tempfile::Builder::new()
            .prefix(&format!(".{name}."))
            .permissions(std::fs::Permissions::from_mode(0o644))
            .tempfile_in(dir)
    })?;
    let file = scratch.as_file_mut();
    file.set_len(total)?;
    let ids = Ids::of(files);
    write_table(file, total, esp, &ids)?;
    let step = Step::bytes(&format!("writing {}", path.display()), content);
    write_files(file, esp, ids.volume, files, &step)?;
    scratch.as_file().sync_all()?;
    scratch.persist(path).map_err(|e| e.error)?;
    Ok(total)
}

/// The directory that `path` is in.
pub(super) fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Identifiers that are the same for the same contents, so that images can be compared.
struct Ids {
    disk: uuid::Uuid,
    partition: uuid::Uuid,
    volume: u32,
}

impl Ids {
    fn of(files: &[EspFile<'_>]) -> Self {
        let id = |salt: u8| {
            let half = |part: u8| {
                let mut hasher = DefaultHasher::new();
                (salt, part, files).hash(&mut hasher);
                hasher.finish()
            };
            let bytes = (u128::from(half(0)) << 64 | u128::from(half(1))).to_be_bytes();
            uuid::Builder::from_random_bytes(bytes).into_uuid()
        };
        let disk = id(0);
        Self { disk, partition: id(1), volume: disk.as_fields().0 }
    }
}

fn write_table(file: &mut File, total: u64, esp: u64, ids: &Ids) -> io::Result<()> {
    let sectors = u32::try_from(total / BLOCK - 1).unwrap_or(u32::MAX);
    ProtectiveMBR::with_lb_size(sectors).overwrite_lba0(file).map_err(io::Error::other)?;
    let mut disk = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(LogicalBlockSize::Lb512)
        .create_from_device(file.try_clone()?, Some(ids.disk))
        .map_err(io::Error::other)?;
    let partition = Partition {
        part_type_guid: gpt::partition_types::EFI,
        part_guid: ids.partition,
        first_lba: START / BLOCK,
        last_lba: (START + esp) / BLOCK - 1,
        flags: 0,
        name: "EFI system partition".into(),
    };
    let partitions = [(1, partition)].into_iter().collect();
    disk.update_partitions(partitions).map_err(io::Error::other)?;
    disk.write().map_err(io::Error::other)?;
    Ok(())
}

fn write_files(file: &File, len: u64, volume: u32, files: &[EspFile<'_>], step: &Step) -> io::Result<()> {
    let mut slice = Slice { file: file.try_clone()?, len, position: 0 };
    let options = fatfs::FormatVolumeOptions::new().volume_id(volume).volume_label(*b"NESTVMM    ");
    fatfs::format_volume(&mut slice, options)?;
    slice.seek(SeekFrom::Start(0))?;
    let fs = fatfs::FileSystem::new(slice, fatfs::FsOptions::new())?;
    let mut done = 0;
    for (path, data) in files {
        let mut dir = fs.root_dir();
        let mut rest = path.trim_start_matches('/');
        while let Some((first, more)) = rest.split_once('/') {
            dir = dir.create_dir(first)?;
            rest = more;
        }
        let mut file = dir.create_file(rest)?;
        file.truncate()?;
        for chunk in data.chunks(1 << 20) {
            file.write_all(chunk)?;
            done += chunk.len() as u64;
            step.set(done);
        }
        file.flush()?;
    }
    fs.unmount()
}

/// The partition's part of the image file.
struct Slice {
    file: File,
    len: u64,
    position: u64,
}

impl Slice {
    fn go(&mut self, wanted: usize) -> io::Result<usize> {
        self.file.seek(SeekFrom::Start(START + self.position))?;
        let left = self.len.saturating_sub(self.position);
        Ok(wanted.min(usize::try_from(left).unwrap_or(usize::MAX)))
    }
}

impl Read for Slice {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.go(buf.len())?;
        let n = self.file.read(buf.get_mut(..n).unwrap_or_default())?;
        self.position += n as u64;
        Ok(n)
    }
}

impl Write for Slice {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.go(buf.len())?;
        let n = self.file.write(buf.get(..n).unwrap_or_default())?;
        self.position += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for Slice {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position = position.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.position)
    }
}
