//! Starting Linux by its 64-bit or 32-bit boot protocol
//! (Documentation/arch/x86/boot.rst, Documentation/arch/x86/zero-page.rst).
//!
//! The kernel proper is unpacked here and entered at its own `startup_64`, which spares the
//! guest its decompressor. A kernel that comes this way runs where it was linked: no
//! physical or virtual KASLR. Kernels whose payload can't be unpacked are entered at their
//! decompressor instead.
//!
//! Not supported: setup_data, EFI handover, video modes, initrds above 4 GiB.

use super::bzimage::{self, Payload, SetupHeader};
use super::e820::MemoryRange;
use super::elf::{self, Elf};
use super::placement::Placement;
use super::{
    BootEntry, BootError, BootFile, BootGprs, BootProtocol, BootRequest, BootState, BootTable, Loaded,
    command_line_bytes, pvh,
};

const PAGE: u64 = memory::PAGE_SIZE;
const BOOT_PARAMS_LEN: usize = 4096;
/// `boot_params.acpi_rsdp_addr`.
const ACPI_RSDP_ADDR: usize = 0x70;
/// `boot_params.alt_mem_k`: memory above 1 MiB in KiB.
const ALT_MEM_K: usize = 0x1e0;
/// `boot_params.e820_entries`.
const E820_ENTRIES: usize = 0x1e8;
/// `boot_params.hdr.vid_mode`.
const VID_MODE: usize = 0x1fa;
/// `boot_params.hdr.type_of_loader`.
const TYPE_OF_LOADER: usize = 0x210;
/// `boot_params.hdr.loadflags`.
const LOADFLAGS: usize = 0x211;
/// `boot_params.hdr.code32_start`.
const CODE32_START: usize = 0x214;
/// `boot_params.hdr.ramdisk_image` and `ramdisk_size`.
const RAMDISK: usize = 0x218;
/// `boot_params.hdr.cmd_line_ptr`.
const CMD_LINE_PTR: usize = 0x228;
/// `boot_params.e820_table`, of 20-byte entries.
const E820_TABLE: usize = 0x2d0;
/// Its length in entries.
const E820_MAX: usize = 128;

/// `__BOOT_CS` and `__BOOT_DS`.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const GDT_CODE64: u64 = 0x00af_9b00_0000_ffff;
const GDT_CODE32: u64 = 0x00cf_9b00_0000_ffff;
const GDT_DATA: u64 = 0x00cf_9300_0000_ffff;

/// What is entered, once it is in RAM.
enum Entered {
    /// 64-bit code at this address.
    Long(u64),
    /// 32-bit code at this address.
    Protected(u32),
    /// PVH at this address.
    Pvh(u32),
}

/// Loads the bzImage `kernel`.
pub(super) fn load(
    placement: &mut Placement<'_>,
    map: &[MemoryRange],
    request: &BootRequest<'_>,
    kernel: &BootFile,
    initrd: Option<&BootFile>,
    command_line: &str,
) -> Result<Loaded, BootError> {
    let file = &kernel.name;
    let header = bzimage::parse(file, &kernel.data)?;
    // Zero means that an old kernel does not say.
    let max = match header.cmdline_size {
        0 => 255,
        n => n as usize,
    };
    let command_line_data = command_line_bytes(file, command_line, max)?;
    let entered = place_kernel(placement, &header, kernel, request.entry)?;
    let kernel_bytes = placement.used_high();
    let version = bzimage::version_string(&header, &kernel.data);
    if let Entered::Pvh(entry) = entered {
        check_ram(placement, file, kernel_bytes, initrd)?;
        let modules = pvh::initrd_module(initrd);
        let loaded = pvh::start(placement, map, request, file, entry, &modules, command_line)?;
        return Ok(Loaded { kernel_version: version, ..loaded });
    }
    let ramdisk = match initrd {
        Some(i) if !i.data.is_empty() => {
            let below = u64::from(header.initrd_addr_max).saturating_add(1);
            let at = placement.alloc_down(&i.name, "the initrd", i.data.len() as u64, PAGE, below)?;
            placement.write(&i.name, at, &i.data)?;
            (at as u32, i.data.len() as u32)
        }
        _ => (0, 0),
    };
    check_ram(placement, file, kernel_bytes, initrd)?;
    let command_line_at = placement.put_low(file, "the command line", &command_line_data, 16)?;
    let params = boot_params(&header, map, request.rsdp.0, ramdisk, command_line_at as u32);
    let params_at = placement.put_low(file, "boot_params", &params, PAGE)?;
    let gprs = BootGprs { rsi: params_at, ..BootGprs::default() };
    let (protocol, state) = match entered {
        Entered::Long(rip) => {
            let gdtr = put_gdt(placement, file, GDT_CODE64)?;
            let cr3 = identity_map(placement, file)?;
            (BootProtocol::Linux64, BootState::long64(rip, gprs, cr3, (BOOT_CS, BOOT_DS), gdtr))
        }
        Entered::Protected(rip) | Entered::Pvh(rip) => {
            let gdtr = put_gdt(placement, file, GDT_CODE32)?;
            (BootProtocol::Linux32, BootState::protected32(rip, gprs, (BOOT_CS, BOOT_DS), gdtr))
        }
    };
    Ok(Loaded { protocol, state, kernel_version: version, notices: Vec::new() })
}

/// Refuses RAM that can't do for the kernel in it and its initrd: in the kernel's own words, that would be a
/// panic somewhere on the way.
///
/// While the kernel unpacks its initrd, that is in RAM twice, and a kernel allocates more than a
/// quarter of its own size before. (Debian's 6.1 cloud kernel, of 36 MiB, does not boot with what this comes to, nor
/// with a few MiB more.)
fn check_ram(
    placement: &Placement<'_>,
    file: &str,
    kernel: u64,
    initrd: Option<&BootFile>,
) -> Result<(), BootError> {
    let packed = initrd.map_or(&[][..], |i| &i.data);
    // What a packed one unpacks to is not known, but it is not less.
    let initrd = packed.len() as u64;
    let need = (kernel + kernel / 4).saturating_add(initrd.saturating_mul(2));
    if need <= placement.ram_size() {
        return Ok(());
    }
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    Err(BootError::TooLittleRam {
        file: file.into(),
        kernel_mib: mib(kernel),
        initrd_mib: mib(initrd),
        need_mib: mib(need),
        ram_mib: placement.ram_mib(),
    })
}

/// Puts the kernel in RAM: unpacked if that can be done and `entry` allows it.
fn place_kernel(
    placement: &mut Placement<'_>,
    header: &SetupHeader,
    kernel: &BootFile,
    entry: BootEntry,
) -> Result<Entered, BootError> {
    let file = &kernel.name;
    if entry != BootEntry::Decompressor
        && let Payload::Unpacked(vmlinux) = bzimage::unpack(file, header, &kernel.data, placement.ram_size())?
        && elf::is_elf(&vmlinux)
    {
        let inner = format!("{file} (unpacked)");
        let elf = Elf::parse(&inner, &vmlinux)?;
        let long = (elf.is_64 && header.has_64bit_entry()).then(|| elf.physical_entry(elf.entry)).flatten();
        let pvh = elf.pvh_entry.and_then(|e| u32::try_from(e).ok());
        let entered = match (entry, long, pvh) {
            (BootEntry::Pvh, _, Some(e)) => Some(Entered::Pvh(e)),
            (BootEntry::Pvh, _, None) => {
                let what = "this kernel has no PVH entry; leave out the choice of entry";
                return Err(BootError::BadRequest { file: file.clone(), what });
            }
            (_, Some(e), _) => Some(Entered::Long(e)),
            (_, None, Some(e)) => Some(Entered::Pvh(e)),
            (_, None, None) => None,
        };
        if let Some(entered) = entered {
            elf.load(&inner, placement)?;
            return Ok(entered);
        }
    }
    place_packed(placement, header, kernel)
}

/// Puts the protected-mode code in RAM as it is, to be entered at the decompressor.
fn place_packed(
    placement: &mut Placement<'_>,
    header: &SetupHeader,
    kernel: &BootFile,
) -> Result<Entered, BootError> {
    let file = &kernel.name;
    let start = usize::try_from(header.code_offset).unwrap_or(usize::MAX);
    let code = kernel.data.get(start..).unwrap_or_default();
    let at = match header.pref_address {
        Some(preferred) if header.relocatable => preferred,
        _ => header.code32_start.into(),
    };
    // The decompressor works in place: it needs the memory that the unpacked kernel will.
    let memory = u64::from(header.init_size).max(code.len() as u64);
    placement.reserve(file, "the kernel with its decompressor", at, memory)?;
    placement.write(file, at, code)?;
    if header.has_64bit_entry() {
        return Ok(Entered::Long(at.saturating_add(0x200)));
    }
    let entry = u32::try_from(at).map_err(|_| BootError::BadField {
        file: file.clone(),
        what: "preferred address",
        offset: 0x258,
        value: at,
        expected: "below 4 GiB, as the kernel has no 64-bit entry",
    })?;
    Ok(Entered::Protected(entry))
}

/// The zero page.
fn boot_params(
    header: &SetupHeader,
    map: &[MemoryRange],
    rsdp: u64,
    (ramdisk, ramdisk_len): (u32, u32),
    command_line: u32,
) -> Vec<u8> {
    let mut page = vec![0; BOOT_PARAMS_LEN];
    put(&mut page, SetupHeader::RAW_OFFSET, &header.raw);
    put(&mut page, ACPI_RSDP_ADDR, &rsdp.to_le_bytes());
    put(&mut page, VID_MODE, &0xffff_u16.to_le_bytes());
    // A boot loader without an assigned number.
    put(&mut page, TYPE_OF_LOADER, &[0xff]);
    let loadflags = (header.loadflags | SetupHeader::LOADED_HIGH) & !SetupHeader::KASLR_FLAG;
    put(&mut page, LOADFLAGS, &[loadflags]);
    put(&mut page, CODE32_START, &header.code32_start.to_le_bytes());
    put(&mut page, RAMDISK, &ramdisk.to_le_bytes());
    put(&mut page, RAMDISK + 4, &ramdisk_len.to_le_bytes());
    put(&mut page, CMD_LINE_PTR, &command_line.to_le_bytes());
    let entries = map.get(..map.len().min(E820_MAX)).unwrap_or_default();
    put(&mut page, E820_ENTRIES, &[entries.len() as u8]);
    for (i, r) in entries.iter().enumerate() {
        let at = E820_TABLE + 20 * i;
        put(&mut page, at, &r.start.to_le_bytes());
        put(&mut page, at + 8, &r.len.to_le_bytes());
        put(&mut page, at + 16, &(r.kind as u32).to_le_bytes());
    }
    let above_1_mib = map.iter().find(|r| r.start == super::placement::HIGH_START).map_or(0, |r| r.len >> 10);
    put(&mut page, ALT_MEM_K, &(above_1_mib as u32).to_le_bytes());
    page
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(slot) = page.get_mut(at..at + bytes.len()) {
        slot.copy_from_slice(bytes);
    }
}

/// Puts a GDT with `code` at [`BOOT_CS`] and a flat data segment at [`BOOT_DS`] into RAM.
fn put_gdt(placement: &mut Placement<'_>, file: &str, code: u64) -> Result<BootTable, BootError> {
    let mut gdt = Vec::new();
    for descriptor in [0, 0, code, GDT_DATA] {
        gdt.extend_from_slice(&descriptor.to_le_bytes());
    }
    let base = placement.put_low(file, "the boot GDT", &gdt, 16)?;
    Ok(BootTable { base, limit: (gdt.len() - 1) as u16 })
}

/// Builds page tables that map the low 4 GiB to themselves in 2 MiB pages (SDM Vol. 3A
/// §4.5) and returns the address for CR3.
fn identity_map(placement: &mut Placement<'_>, file: &str) -> Result<u64, BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const PAGE_SIZE_BIT: u64 = 1 << 7;
    const DIRECTORIES: u64 = 4;
    let total = (2 + DIRECTORIES) * PAGE;
    let range = (super::placement::LOW_RESERVED, super::placement::LOW_END);
    let base = placement.alloc_up(file, "the boot page tables", total, PAGE, range)?;
    let (pdpt, directories) = (base + PAGE, base + 2 * PAGE);
    let mut tables = vec![0; total as usize];
    let mut entry = |table: u64, index: u64, value: u64| {
        put(&mut tables, (table - base + 8 * index) as usize, &value.to_le_bytes());
    };
    entry(base, 0, pdpt | PRESENT_WRITABLE);
    for d in 0..DIRECTORIES {
        let directory = directories + d * PAGE;
        entry(pdpt, d, directory | PRESENT_WRITABLE);
        for i in 0..512 {
            entry(directory, i, (d * 512 + i) << 21 | PAGE_SIZE_BIT | PRESENT_WRITABLE);
        }
    }
    placement.write(file, base, &tables)?;
    Ok(base)
}
