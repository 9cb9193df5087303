//! What can be wrong with an image file.

use crate::boot::BootError;

/// Why an image can't be read or started.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no such file.
    #[error("{file}: there is no such file")]
    NotFound {
        /// The file's name.
        file: String,
    },
    /// The host does not let us read it.
    #[error("{file}: can't be read: {reason}")]
    Unreadable {
        /// The file's name.
        file: String,
        /// The host's answer.
        reason: String,
    },
    /// It is a directory, a pipe, a terminal …
    #[error("{file}: is {kind}, not an image file")]
    NotAFile {
        /// The file's name.
        file: String,
        /// What it is.
        kind: &'static str,
    },
    /// It has no bytes.
    #[error("{file}: is empty; was building or copying it cut short?")]
    Empty {
        /// The file's name.
        file: String,
    },
    /// It is none of the formats known.
    #[error(
        "{file}: is no image that can be started (it looks like {found}); give a disk image with a GPT, a Linux \
         bzImage, a UKI, an ELF with a PVH note or a multiboot 1 image"
    )]
    UnknownFormat {
        /// The file's name.
        file: String,
        /// What it looks like.
        found: &'static str,
    },
    /// The file ends before something that it says it has.
    #[error(
        "{file}: cut off: {what} needs the file to have {need} bytes, it has {len}; copy or build it again"
    )]
    Truncated {
        /// The file's name.
        file: String,
        /// What is missing.
        what: String,
        /// Bytes needed.
        need: u64,
        /// Bytes there.
        len: u64,
    },
    /// A file is larger than what can be loaded.
    #[error(
        "{file}: has {len} bytes, more than the {limit} bytes of RAM it is meant for; give more with --memory"
    )]
    TooBig {
        /// The file's name.
        file: String,
        /// Its size in bytes.
        len: u64,
        /// What would be the most.
        limit: u64,
    },
    /// The partition table is damaged.
    #[error("{file}: the partition table at offset {offset:#x} can't be used: {reason}")]
    BadPartitionTable {
        /// The file's name.
        file: String,
        /// Where it is.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// The disk has no EFI system partition.
    #[error(
        "{file}: the disk has no EFI system partition (found: {found}), so there is no kernel to start; give one with \
         --kernel"
    )]
    NoEsp {
        /// The file's name.
        file: String,
        /// The partitions that it does have.
        found: String,
    },
    /// The EFI system partition holds no FAT file system that can be read.
    #[error("{file}: the file system of partition {partition} at offset {offset:#x} can't be used: {reason}")]
    BadFileSystem {
        /// The file's name.
        file: String,
        /// Partition number.
        partition: u32,
        /// Where it starts.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// No boot entry.
    #[error(
        "{file}: there is no boot entry (loader/entries/*.conf or EFI/Linux/*.efi) on the EFI system partition; give \
         a kernel with --kernel"
    )]
    NoEntry {
        /// The file's name.
        file: String,
    },
    /// The entry asked for is not there.
    #[error("{file}: there is no boot entry {wanted:?}; there are: {available}")]
    NoSuchEntry {
        /// The file's name.
        file: String,
        /// The entry asked for.
        wanted: String,
        /// Those there are.
        available: String,
    },
    /// An entry lacks what it needs or has it wrong.
    #[error("{file}: boot entry {entry}: {reason}")]
    BadEntry {
        /// The file's name.
        file: String,
        /// The entry's file name.
        entry: String,
        /// What is wrong.
        reason: String,
    },
    /// An entry names a file that is not there.
    #[error("{file}: boot entry {entry} names {path}, which is not on the partition")]
    MissingFile {
        /// The file's name.
        file: String,
        /// The entry's file name.
        entry: String,
        /// The path on the partition.
        path: String,
    },
    /// The kernel in the image can't be started.
    #[error(transparent)]
    Kernel(#[from] BootError),
}
