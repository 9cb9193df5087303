//! Starting a kernel by the Multiboot Specification 0.6.96 ("multiboot 1"): ELF files and
//! flat files with load addresses in the header (the "a.out kludge").
//!
//! Not supported: a framebuffer or VBE information (a header that asks for a video mode is
//! started without one, with a notice), drives, ROM configuration and APM tables, symbol
//! tables.

use super::e820::{MemoryKind, MemoryRange};
use super::elf::{self, Elf};
use super::placement::{HIGH_START, Placement};
use super::{
    BootError, BootGprs, BootModule, BootProtocol, BootRequest, BootState, Loaded, command_line_bytes, pvh,
};

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// §3.1: the header is wholly within the first 8192 bytes and 4-byte aligned.
const SEARCH: usize = 8192;
/// §3.1.2 flags, bit 0: align modules on pages.
const PAGE_ALIGN: u32 = 1;
/// Bit 1: memory information is wanted.
const MEMORY_INFO: u32 = 1 << 1;
/// Bit 2: a video mode is wanted.
const VIDEO_MODE: u32 = 1 << 2;
/// Bit 16: the address fields are valid.
const AOUT_KLUDGE: u32 = 1 << 16;
/// Bits 0 to 15 are demands that a loader must know or refuse.
const DEMANDS: u32 = 0xffff;
/// §3.2: in EAX at entry.
const BOOTLOADER_MAGIC: u64 = 0x2bad_b002;
const PAGE: u64 = memory::PAGE_SIZE;

/// A multiboot header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MultibootHeader {
    /// Where it is in the file.
    pub offset: usize,
    /// Its flags.
    pub flags: u32,
    /// `header_addr`, `load_addr`, `load_end_addr`, `bss_end_addr`, `entry_addr`, if bit 16
    /// of the flags is set.
    pub addresses: Option<[u32; 5]>,
}

fn u32_at(data: &[u8], offset: usize) -> Option<u32> {
    data.get(offset..).and_then(|d| d.first_chunk()).map(|b| u32::from_le_bytes(*b))
}

/// The multiboot header of `data`: magic number, flags and a checksum that makes their sum
/// zero.
pub fn find_header(data: &[u8]) -> Option<MultibootHeader> {
    let head = data.get(..data.len().min(SEARCH))?;
    (0..head.len()).step_by(4).find_map(|offset| {
        let field = |i: usize| u32_at(head, offset + 4 * i);
        let (magic, flags, checksum) = (field(0)?, field(1)?, field(2)?);
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            return None;
        }
        let addresses = match flags & AOUT_KLUDGE {
            0 => None,
            _ => Some([field(3)?, field(4)?, field(5)?, field(6)?, field(7)?]),
        };
        Some(MultibootHeader { offset, flags, addresses })
    })
}

/// Loads the multiboot kernel of `request`.
pub(super) fn load(
    placement: &mut Placement<'_>,
    map: &[MemoryRange],
    request: &BootRequest<'_>,
    header: &MultibootHeader,
    command_line: &str,
) -> Result<Loaded, BootError> {
    let file = &request.kernel.name;
    let unknown = header.flags & DEMANDS & !(PAGE_ALIGN | MEMORY_INFO | VIDEO_MODE);
    if unknown != 0 {
        return Err(BootError::Unsupported {
            file: file.clone(),
            what: format!("multiboot header flags {unknown:#x}"),
            offset: header.offset as u64 + 4,
            remedy: "build the kernel without them",
        });
    }
    let entry = match header.addresses {
        Some(a) => load_flat(placement, request, header, a)?,
        None => load_elf(placement, request)?,
    };
    let info_at = put_info(placement, map, request, command_line)?;
    let (gdtr, selectors) = pvh::put_flat_gdt(placement, file)?;
    let gprs = BootGprs { rax: BOOTLOADER_MAGIC, rbx: info_at, ..BootGprs::default() };
    let mut notices = Vec::new();
    if header.flags & VIDEO_MODE != 0 {
        notices.push(format!("{file} asks for a video mode; there is no display, it is started without one"));
    }
    Ok(Loaded {
        protocol: BootProtocol::Multiboot,
        state: BootState::protected32(entry, gprs, selectors, gdtr),
        kernel_version: None,
        notices,
    })
}

fn load_elf(placement: &mut Placement<'_>, request: &BootRequest<'_>) -> Result<u32, BootError> {
    let kernel = request.kernel;
    if !elf::is_elf(&kernel.data) {
        return Err(BootError::NotAKernel {
            file: kernel.name.clone(),
            found: "a multiboot header without load addresses in a file that is no ELF".into(),
        });
    }
    let elf = Elf::parse(&kernel.name, &kernel.data)?;
    elf.load(&kernel.name, placement)?;
    elf.physical_entry(elf.entry).and_then(|e| u32::try_from(e).ok()).ok_or_else(|| BootError::BadField {
        file: kernel.name.clone(),
        what: "ELF entry point",
        offset: 24,
        value: elf.entry,
        expected: "inside a loaded segment and below 4 GiB",
    })
}

/// §3.1.3: where a flat file goes. A `load_end_addr` of 0 means up to the file's end, a
/// `bss_end_addr` of 0 none.
fn load_flat(
    placement: &mut Placement<'_>,
    request: &BootRequest<'_>,
    header: &MultibootHeader,
    [header_addr, load_addr, load_end, bss_end, entry]: [u32; 5],
) -> Result<u32, BootError> {
    let kernel = request.kernel;
    let bad = |what, field: u64, value: u32, expected| BootError::BadField {
        file: kernel.name.clone(),
        what,
        offset: header.offset as u64 + 4 * field,
        value: value.into(),
        expected,
    };
    let start = (header_addr.checked_sub(load_addr))
        .and_then(|before| header.offset.checked_sub(before as usize))
        .ok_or_else(|| {
            bad("load_addr", 4, load_addr, "at most header_addr, and no more before it than the file has")
        })?;
    let rest = kernel.data.get(start..).unwrap_or_default();
    let len = match load_end {
        0 => rest.len(),
        _ => load_end
            .checked_sub(load_addr)
            .ok_or_else(|| bad("load_end_addr", 5, load_end, "not below load_addr"))? as usize,
    };
    let data = rest.get(..len).ok_or_else(|| BootError::Truncated {
        file: kernel.name.clone(),
        what: "the multiboot load range",
        offset: start as u64,
        need: len as u64,
        len: kernel.data.len() as u64,
    })?;
    let mem_len = match bss_end {
        0 => len as u64,
        _ => bss_end
            .checked_sub(load_addr)
            .map(u64::from)
            .filter(|l| *l >= len as u64)
            .ok_or_else(|| bad("bss_end_addr", 6, bss_end, "not below the end of the loaded data"))?,
    };
    if u64::from(entry).checked_sub(load_addr.into()).is_none_or(|o| o >= mem_len) {
        return Err(bad("entry_addr", 7, entry, "inside what is loaded"));
    }
    placement.load(&kernel.name, "the kernel", load_addr.into(), data, mem_len)?;
    Ok(entry)
}

/// §3.3: the information structure and what it points to; returns its address.
fn put_info(
    placement: &mut Placement<'_>,
    map: &[MemoryRange],
    request: &BootRequest<'_>,
    command_line: &str,
) -> Result<u64, BootError> {
    const MEMORY: u32 = 1;
    const CMDLINE: u32 = 1 << 2;
    const MODULES: u32 = 1 << 3;
    const MMAP: u32 = 1 << 6;
    const LOADER_NAME: u32 = 1 << 9;
    let file = &request.kernel.name;

    let text = named_command_line(file, command_line)?;
    let text_at = placement.put_low(file, "the command line", &text, 16)?;

    let mut modules = pvh::initrd_module(request.initrd);
    modules.extend_from_slice(request.modules);
    let (list_at, count) = put_modules(placement, file, &modules)?;

    let mut memmap = Vec::new();
    for r in map {
        // The size field counts the bytes after itself.
        memmap.extend_from_slice(&20_u32.to_le_bytes());
        memmap.extend_from_slice(&r.start.to_le_bytes());
        memmap.extend_from_slice(&r.len.to_le_bytes());
        memmap.extend_from_slice(&(r.kind as u32).to_le_bytes());
    }
    let memmap_at = placement.put_low(file, "the memory map", &memmap, 16)?;
    let name_at = placement.put_low(file, "the boot loader's name", b"nestvmm\0", 16)?;

    let kib_from = |start: u64| {
        map.iter().find(|r| r.start == start && r.kind == MemoryKind::Ram).map_or(0, |r| (r.len >> 10) as u32)
    };
    let mut info = [0; 120];
    let mut field = |at: usize, value: u32| {
        if let Some(slot) = info.get_mut(at..at + 4) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
    };
    field(0, MEMORY | CMDLINE | MODULES | MMAP | LOADER_NAME);
    field(4, kib_from(0));
    field(8, kib_from(HIGH_START));
    field(16, text_at as u32);
    field(20, count);
    field(24, list_at as u32);
    field(44, memmap.len() as u32);
    field(48, memmap_at as u32);
    field(64, name_at as u32);
    placement.put_low(file, "the multiboot information", &info, 16)
}

/// Loads `modules` page-aligned above the kernel, in order; returns address and length of
/// the list.
fn put_modules(
    placement: &mut Placement<'_>,
    file: &str,
    modules: &[BootModule],
) -> Result<(u64, u32), BootError> {
    let mut list = Vec::new();
    let above = (HIGH_START, super::placement::LOW_RAM_TOP);
    for m in modules {
        let (name, len) = (&m.file.name, m.file.data.len() as u64);
        let at = placement.alloc_up(name, "the module", len, PAGE, above)?;
        placement.write(name, at, &m.file.data)?;
        let text = named_command_line(name, &m.command_line)?;
        let text_at = placement.put_low(name, "the module's command line", &text, 16)?;
        for word in [at, at + len, text_at, 0] {
            list.extend_from_slice(&(word as u32).to_le_bytes());
        }
    }
    let at = if list.is_empty() { 0 } else { placement.put_low(file, "the module list", &list, 16)? };
    Ok((at, modules.len() as u32))
}

/// `file`'s base name, a space and the arguments: kernels take the first word for the
/// program's name, as boot loaders have always given it.
fn named_command_line(file: &str, arguments: &str) -> Result<Vec<u8>, BootError> {
    let name = file.rsplit('/').next().unwrap_or(file).replace(|c: char| c.is_whitespace() || c == '\0', "_");
    let text = if arguments.is_empty() { name } else { format!("{name} {arguments}") };
    command_line_bytes(file, &text, pvh::COMMAND_LINE_MAX)
}
