//! Boot loading: puts a kernel, its initrd or modules, its command line and the firmware's
//! tables into L1's RAM, and says in which state the first vCPU starts.
//!
//! Supported: Linux `bzImage` (unpacked on the host), unified kernel images, ELF files with
//! a PVH note, multiboot 1. Not supported: multiboot 2, EFI programs, real-mode boot
//! sectors, boot loaders inside the guest.

mod bda;
mod bzimage;
mod decompress;
mod e820;
mod elf;
mod error;
mod linux;
mod multiboot;
mod placement;
mod pvh;
mod state;
mod uki;

use std::borrow::Cow;

use memory::{L1Gpa, L1Ram};

pub use bzimage::{SetupHeader, is_bzimage, parse as parse_setup_header, version_string};
pub use decompress::{Compression, DecompressError, decompress, decompress_start};
pub use e820::{MemoryKind, MemoryRange, memory_map};
pub use error::BootError;
pub use multiboot::{MultibootHeader, find_header as find_multiboot_header};
pub use state::{BootGprs, BootMode, BootSegment, BootState, BootTable};
pub use uki::{Uki, is_pe, parse as parse_uki};

use placement::Placement;

/// A file's contents and the name that errors call it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootFile {
    /// The name, as the user knows it.
    pub name: String,
    /// The contents.
    pub data: Vec<u8>,
}

/// A file handed to the kernel beside itself (multiboot, PVH).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BootModule {
    /// The file.
    pub file: BootFile,
    /// Its arguments; for multiboot its name goes before them.
    pub command_line: String,
}

/// How a Linux kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BootEntry {
    /// The unpacked kernel by its 64-bit entry, else PVH, else its own decompressor.
    #[default]
    Auto,
    /// The PVH entry.
    Pvh,
    /// The decompressor inside the bzImage, as a boot loader on hardware would.
    Decompressor,
}

/// What to start.
#[derive(Clone, Copy, Debug)]
pub struct BootRequest<'a> {
    /// The kernel.
    pub kernel: &'a BootFile,
    /// The initrd; for multiboot and PVH it is the first module. Replaces a UKI's.
    pub initrd: Option<&'a BootFile>,
    /// Modules for multiboot and PVH kernels.
    pub modules: &'a [BootModule],
    /// The command line; `None` leaves a UKI its own and gives others an empty one.
    pub command_line: Option<&'a str>,
    /// ACPI table blobs and where they go.
    pub acpi: &'a [(L1Gpa, Vec<u8>)],
    /// Address of the RSDP among them; 0 for none.
    pub rsdp: L1Gpa,
    /// How a Linux kernel is entered; other formats ignore it.
    pub entry: BootEntry,
}

/// The protocol that a kernel is started by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootProtocol {
    /// Linux, 64-bit entry.
    Linux64,
    /// Linux, 32-bit entry.
    Linux32,
    /// PVH.
    Pvh,
    /// Multiboot 1.
    Multiboot,
}

impl std::fmt::Display for BootProtocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Linux64 => "Linux 64-bit boot protocol",
            Self::Linux32 => "Linux 32-bit boot protocol",
            Self::Pvh => "PVH",
            Self::Multiboot => "multiboot 1",
        })
    }
}

/// A kernel in RAM, ready to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// How it is started.
    pub protocol: BootProtocol,
    /// State of the first vCPU.
    pub state: BootState,
    /// The kernel's version string, if it has one.
    pub kernel_version: Option<String>,
    /// What the user should know.
    pub notices: Vec<String>,
}

/// Loads what `request` says into `ram`, ACPI tables included. A kernel that is packed as
/// a whole (`xen.gz`) is unpacked. RAM may be dirty (a reboot): what a protocol says is zero
/// is zeroed.
///
/// # Errors
/// [`BootError`], which names the file at fault. RAM may have been written then.
pub fn load(ram: &L1Ram, request: &BootRequest<'_>) -> Result<Loaded, BootError> {
    match unpack_file(request.kernel, ram.size())? {
        Some(kernel) => load_unpacked(ram, &BootRequest { kernel: &kernel, ..*request }),
        None => load_unpacked(ram, request),
    }
}

/// Unpacks a file that is packed as a whole into at most `limit` bytes; `None` when it is
/// not packed.
///
/// # Errors
/// [`BootError::PayloadTooBig`] and [`BootError::Decompress`].
pub fn unpack_file(file: &BootFile, limit: u64) -> Result<Option<BootFile>, BootError> {
    let Some(format) = Compression::detect(&file.data) else { return Ok(None) };
    let (name, format_name, offset) = (file.name.clone(), format.name(), 0);
    match decompress(format, &file.data, limit) {
        Ok(data) => Ok(Some(BootFile { name, data })),
        Err(DecompressError::TooBig { .. }) => {
            Err(BootError::PayloadTooBig { file: name, format: format_name, offset, ram_mib: limit >> 20 })
        }
        Err(e) => {
            Err(BootError::Decompress { file: name, format: format_name, offset, reason: e.to_string() })
        }
    }
}

fn load_unpacked(ram: &L1Ram, request: &BootRequest<'_>) -> Result<Loaded, BootError> {
    let kernel = request.kernel;
    let mut placement = Placement::new(ram);
    let acpi: Vec<(L1Gpa, u64)> = request.acpi.iter().map(|(at, blob)| (*at, blob.len() as u64)).collect();
    for (at, blob) in request.acpi {
        placement.note(at.0, at.0.saturating_add(blob.len() as u64), "the ACPI tables");
        placement.write("the ACPI tables", at.0, blob)?;
    }
    bda::write(&placement)?;
    let map = memory_map(ram, &acpi);
    if is_bzimage(&kernel.data) {
        let command_line = request.command_line.unwrap_or_default();
        refuse_modules(request)?;
        return linux::load(&mut placement, &map, request, kernel, request.initrd, command_line);
    }
    if is_pe(&kernel.data) {
        refuse_modules(request)?;
        return load_uki(&mut placement, &map, request);
    }
    let command_line = request.command_line.unwrap_or_default();
    if let Some(header) = multiboot::find_header(&kernel.data) {
        return multiboot::load(&mut placement, &map, request, &header, command_line);
    }
    if elf::is_elf(&kernel.data) {
        let elf = elf::Elf::parse(&kernel.name, &kernel.data)?;
        let Some(entry) = elf.pvh_entry else {
            let found = "an ELF with neither a PVH note nor a multiboot header".into();
            return Err(BootError::NotAKernel { file: kernel.name.clone(), found });
        };
        return pvh::load(&mut placement, &map, request, &elf, entry, command_line);
    }
    Err(BootError::NotAKernel { file: kernel.name.clone(), found: describe(&kernel.data).into() })
}

fn load_uki(
    placement: &mut Placement<'_>,
    map: &[MemoryRange],
    request: &BootRequest<'_>,
) -> Result<Loaded, BootError> {
    let name = &request.kernel.name;
    let uki = uki::parse(name, &request.kernel.data)?;
    let kernel = BootFile { name: format!("{name}, section .linux"), data: uki.linux.to_vec() };
    let own = uki.initrd.map(|d| BootFile { name: format!("{name}, section .initrd"), data: d.to_vec() });
    let command_line = match request.command_line {
        Some(c) => Cow::Borrowed(c),
        None => Cow::Owned(uki.command_line().unwrap_or_default()),
    };
    linux::load(placement, map, request, &kernel, request.initrd.or(own.as_ref()), &command_line)
}

fn refuse_modules(request: &BootRequest<'_>) -> Result<(), BootError> {
    if request.modules.is_empty() {
        return Ok(());
    }
    let what = "a Linux kernel takes no modules at boot; give one file with --initrd";
    Err(BootError::BadRequest { file: request.kernel.name.clone(), what })
}

/// A NUL-terminated command line of at most `max` bytes before the NUL.
fn command_line_bytes(file: &str, text: &str, max: usize) -> Result<Vec<u8>, BootError> {
    if let Some(offset) = text.bytes().position(|b| b == 0) {
        return Err(BootError::CommandLineNul { file: file.into(), offset });
    }
    // Whatever a kernel says it takes, the line has to fit into conventional memory.
    let max = max.min(64 << 10);
    if text.len() > max {
        return Err(BootError::CommandLineTooLong { file: file.into(), len: text.len(), max });
    }
    Ok(text.bytes().chain([0]).collect())
}

/// What a file that can't be started looks like.
pub(crate) fn describe(data: &[u8]) -> &'static str {
    match Compression::detect(data) {
        _ if data.is_empty() => "an empty file",
        Some(_) => "a compressed file without a kernel in it",
        None if data.starts_with(b"070701") => "a cpio archive; is it the initrd?",
        None if data.starts_with(b"#!") => "a script",
        None if data.get(510..512) == Some(&[0x55, 0xaa]) => "a boot sector",
        None if std::str::from_utf8(data.get(..data.len().min(512)).unwrap_or_default()).is_ok() => "text",
        None => "unknown contents",
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
