//! What can be wrong with a kernel, its files or the RAM it is meant for.

use memory::MemoryError;

/// Why a kernel can't be started.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BootError {
    /// Not one of the formats that can be started.
    #[error(
        "{file}: not a kernel that can be started ({found}); give a Linux bzImage, a UKI, an ELF with a \
         PVH note, a multiboot 1 image or a disk image"
    )]
    NotAKernel {
        /// The file's name.
        file: String,
        /// What it looks like instead.
        found: String,
    },
    /// The file ends inside a structure.
    #[error(
        "{file}: cut off: {what} needs {need} bytes at offset {offset:#x}, the file has {len}; copy or build it again"
    )]
    Truncated {
        /// The file's name.
        file: String,
        /// The structure.
        what: &'static str,
        /// Where it starts in the file.
        offset: u64,
        /// Its length in bytes.
        need: u64,
        /// The file's length in bytes.
        len: u64,
    },
    /// A field holds what it must not.
    #[error("{file}: bad {what} {value:#x} at offset {offset:#x}: {expected}")]
    BadField {
        /// The file's name.
        file: String,
        /// The field.
        what: &'static str,
        /// Where it is in the file.
        offset: u64,
        /// What it holds.
        value: u64,
        /// What would be right.
        expected: &'static str,
    },
    /// An ELF or PE structure can't be read.
    #[error("{file}: {what} at offset {offset:#x} can't be read: {reason}; build the file again")]
    Malformed {
        /// The file's name.
        file: String,
        /// The structure.
        what: &'static str,
        /// Where it is in the file.
        offset: u64,
        /// What the parser says.
        reason: String,
    },
    /// The kernel is older than what is supported.
    #[error(
        "{file}: Linux boot protocol {major}.{minor:02} at offset 0x206 is too old: 2.06 (Linux 2.6.22) or newer is needed"
    )]
    ProtocolTooOld {
        /// The file's name.
        file: String,
        /// Major version.
        major: u8,
        /// Minor version.
        minor: u8,
    },
    /// The compressed payload can't be unpacked.
    #[error(
        "{file}: the {format} data at offset {offset:#x} can't be unpacked: {reason}; copy or build it again"
    )]
    Decompress {
        /// The file's name.
        file: String,
        /// The compression.
        format: &'static str,
        /// Where the data starts in the file.
        offset: u64,
        /// What the decoder says.
        reason: String,
    },
    /// The payload unpacks to more than fits in RAM.
    #[error(
        "{file}: the {format} data at offset {offset:#x} unpacks to more than {ram_mib} MiB of RAM can hold; give more with --memory"
    )]
    PayloadTooBig {
        /// The file's name.
        file: String,
        /// The compression.
        format: &'static str,
        /// Where the data starts in the file.
        offset: u64,
        /// RAM size in MiB.
        ram_mib: u64,
    },
    /// The kernel and its initrd fit into RAM, but can't do with it.
    #[error(
        "{file}: {ram_mib} MiB of RAM are too little for this kernel ({kernel_mib} MiB) and its initrd \
         ({initrd_mib} MiB, and as much again while it is unpacked): it needs more than {need_mib} MiB; give more with --memory"
    )]
    TooLittleRam {
        /// The kernel's name.
        file: String,
        /// What the kernel takes in MiB.
        kernel_mib: u64,
        /// The initrd's size in MiB.
        initrd_mib: u64,
        /// The least that is needed in MiB; it may be more.
        need_mib: u64,
        /// RAM size in MiB.
        ram_mib: u64,
    },
    /// No room in RAM.
    #[error(
        "{file}: {what} ({len} bytes) does not fit into {ram_mib} MiB of RAM{detail}; give more with --memory"
    )]
    NoRoom {
        /// The name of the file that needs the room.
        file: String,
        /// What needs it.
        what: String,
        /// How many bytes.
        len: u64,
        /// RAM size in MiB.
        ram_mib: u64,
        /// Which addresses it must have, where that matters; starts with a space.
        detail: String,
    },
    /// Two things have to be at the same address.
    #[error("{file}: {what} at {start:#x}..{end:#x} overlaps {other}")]
    Overlap {
        /// The name of the file.
        file: String,
        /// The part of it.
        what: String,
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
        /// What is there already.
        other: String,
    },
    /// The command line is longer than the kernel takes.
    #[error("{file}: the command line has {len} bytes, this kernel takes {max}; shorten --append")]
    CommandLineTooLong {
        /// The kernel's name.
        file: String,
        /// Length in bytes without the final NUL.
        len: usize,
        /// The kernel's limit.
        max: usize,
    },
    /// The command line has a NUL byte.
    #[error("{file}: the command line has a NUL byte at offset {offset}; remove it")]
    CommandLineNul {
        /// The kernel's name.
        file: String,
        /// Where.
        offset: usize,
    },
    /// The kernel asks for something that is not supported.
    #[error("{file}: {what} at offset {offset:#x} is not supported: {remedy}")]
    Unsupported {
        /// The file's name.
        file: String,
        /// What it asks for.
        what: String,
        /// Where.
        offset: u64,
        /// What to do instead.
        remedy: &'static str,
    },
    /// The request makes no sense for this kind of kernel.
    #[error("{file}: {what}")]
    BadRequest {
        /// The kernel's name.
        file: String,
        /// What is wrong and what to do.
        what: &'static str,
    },
    /// RAM refused an access that the loader thought valid.
    #[error("loading {file}: {source}")]
    Memory {
        /// The file's name.
        file: String,
        /// The refusal.
        source: MemoryError,
    },
}
