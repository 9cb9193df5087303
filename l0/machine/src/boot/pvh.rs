//! Starting an ELF through its PVH entry point (Xen's docs/misc/pvh.pandoc and
//! public/arch-x86/hvm/start_info.h, version 1): 32-bit protected mode, EBX pointing to
//! `hvm_start_info`.

use super::e820::MemoryRange;
use super::elf::Elf;
use super::placement::Placement;
use super::{
    BootError, BootFile, BootGprs, BootModule, BootProtocol, BootRequest, BootState, BootTable, Loaded,
    command_line_bytes,
};

const START_MAGIC: u32 = 0x336e_c578;
const PAGE: u64 = memory::PAGE_SIZE;
/// Longest command line taken; Linux keeps 2048 bytes, other kernels vary.
pub(super) const COMMAND_LINE_MAX: usize = 4095;
const FLAT_CODE: u64 = 0x00cf_9b00_0000_ffff;
const FLAT_DATA: u64 = 0x00cf_9300_0000_ffff;
const CODE: u16 = 0x08;
const DATA: u16 = 0x10;

/// A GDT with flat 32-bit segments, for the two protocols that leave GDTR undefined: a
/// kernel that reloads a selector before it has its own table still runs.
pub(super) fn put_flat_gdt(
    placement: &mut Placement<'_>,
    file: &str,
) -> Result<(BootTable, (u16, u16)), BootError> {
    let gdt: Vec<u8> = [0, FLAT_CODE, FLAT_DATA].iter().flat_map(|d: &u64| d.to_le_bytes()).collect();
    let base = placement.put_low(file, "the boot GDT", &gdt, 16)?;
    Ok((BootTable { base, limit: (gdt.len() - 1) as u16 }, (CODE, DATA)))
}

/// An initrd as the only module.
pub(super) fn initrd_module(initrd: Option<&BootFile>) -> Vec<BootModule> {
    initrd.map(|i| BootModule { file: i.clone(), command_line: String::new() }).into_iter().collect()
}

/// Loads `elf`, which has a PVH note.
pub(super) fn load(
    placement: &mut Placement<'_>,
    map: &[MemoryRange],
    request: &BootRequest<'_>,
    elf: &Elf<'_>,
    entry: u64,
    command_line: &str,
) -> Result<Loaded, BootError> {
    let file = &request.kernel.name;
    elf.load(file, placement)?;
    let entry = u32::try_from(entry)
        .ok()
        .filter(|e| elf.physical_entry((*e).into()) == Some((*e).into()))
        .ok_or_else(|| BootError::Malformed {
            file: file.clone(),
            what: "the PVH note",
            offset: 0,
            reason: format!("entry point {entry:#x} is outside the loaded segments"),
        })?;
    let mut modules = initrd_module(request.initrd);
    modules.extend_from_slice(request.modules);
    start(placement, map, request, file, entry, &modules, command_line)
}

/// Lays out `hvm_start_info` and what it points to, for a kernel that is in RAM already.
pub(super) fn start(
    placement: &mut Placement<'_>,
    map: &[MemoryRange],
    request: &BootRequest<'_>,
    file: &str,
    entry: u32,
    modules: &[BootModule],
    command_line: &str,
) -> Result<Loaded, BootError> {
    let command_line = command_line_bytes(file, command_line, COMMAND_LINE_MAX)?;
    let command_line_at = placement.put_low(file, "the command line", &command_line, 16)?;

    let mut list = Vec::new();
    for m in modules {
        let (name, len) = (&m.file.name, m.file.data.len() as u64);
        let at = placement.alloc_down(name, "the module", len, PAGE, u64::MAX)?;
        placement.write(name, at, &m.file.data)?;
        let text = match m.command_line.as_str() {
            "" => 0,
            c => {
                let bytes = command_line_bytes(name, c, COMMAND_LINE_MAX)?;
                placement.put_low(name, "the module's command line", &bytes, 16)?
            }
        };
        for word in [at, len, text, 0] {
            list.extend_from_slice(&word.to_le_bytes());
        }
    }
    let list_at = if list.is_empty() { 0 } else { placement.put_low(file, "the module list", &list, 16)? };

    let mut memmap = Vec::new();
    for r in map {
        memmap.extend_from_slice(&r.start.to_le_bytes());
        memmap.extend_from_slice(&r.len.to_le_bytes());
        memmap.extend_from_slice(&(r.kind as u32).to_le_bytes());
        memmap.extend_from_slice(&[0; 4]);
    }
    let memmap_at = placement.put_low(file, "the memory map", &memmap, 16)?;

    let mut info = Vec::new();
    // magic, version, flags, nr_modules.
    for word in [START_MAGIC, 1, 0, modules.len() as u32] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    for word in [list_at, command_line_at, request.rsdp.0, memmap_at] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    info.extend_from_slice(&(map.len() as u32).to_le_bytes());
    info.extend_from_slice(&[0; 4]);
    let info_at = placement.put_low(file, "hvm_start_info", &info, 16)?;

    let (gdtr, selectors) = put_flat_gdt(placement, file)?;
    let gprs = BootGprs { rbx: info_at, ..BootGprs::default() };
    Ok(Loaded {
        protocol: BootProtocol::Pvh,
        state: BootState::protected32(entry, gprs, selectors, gdtr),
        kernel_version: None,
        notices: Vec::new(),
    })
}
