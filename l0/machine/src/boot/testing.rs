//! Kernels of each format, made for tests by the formats' descriptions.

use std::io::Write;
use std::sync::Arc;

use memory::{L1Ram, MachineMemory, RamLayout};

/// RAM of `size` bytes.
pub(crate) fn ram(size: u64) -> L1Ram {
    L1Ram::new(Arc::new(MachineMemory::new(size).unwrap()), RamLayout::new(size)).unwrap()
}

/// A loaded segment of [`elf64`].
pub(crate) struct Section {
    pub paddr: u64,
    pub vaddr: u64,
    pub data: Vec<u8>,
    pub mem: u64,
}

/// An ELF64 executable with `PT_LOAD` segments and optionally a `PT_NOTE`.
pub(crate) fn elf64(entry: u64, sections: &[Section], note: Option<&[u8]>) -> Vec<u8> {
    let count = sections.len() + usize::from(note.is_some());
    let mut data_at = (64 + 56 * count) as u64;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for half in [2_u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1_u32.to_le_bytes());
    for word in [entry, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64, 56, count as u16, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    let mut bodies = Vec::new();
    let note_section = note.map(|n| Section { paddr: 0, vaddr: 0, data: n.to_vec(), mem: n.len() as u64 });
    let kinds = sections.iter().map(|s| (1_u32, s)).chain(note_section.iter().map(|s| (4_u32, s)));
    for (kind, s) in kinds {
        elf.extend(kind.to_le_bytes());
        elf.extend(7_u32.to_le_bytes());
        for word in [data_at, s.vaddr, s.paddr, s.data.len() as u64, s.mem, 4] {
            elf.extend(word.to_le_bytes());
        }
        data_at += s.data.len() as u64;
        bodies.extend_from_slice(&s.data);
    }
    elf.extend(bodies);
    elf
}

/// The note XEN_ELFNOTE_PHYS32_ENTRY.
pub(crate) fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4_u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}

pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

/// A bzImage of protocol 2.15 with one setup sector, whose payload starts 4 bytes into the
/// protected-mode code.
pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut k = vec![0; 0x404];
    k[0x1f1] = 1;
    k[0x1fe..0x208].copy_from_slice(&[0x55, 0xaa, 0xeb, 0x6a, b'H', b'd', b'r', b'S', 0x0f, 0x02]);
    // The version string, 0x200 before where it is.
    k[0x20e..0x210].copy_from_slice(&0x90_u16.to_le_bytes());
    k[0x290..0x29a].copy_from_slice(b"6.9.0-test");
    k[0x211] = 3; // LOADED_HIGH, and KASLR_FLAG, which a loader has to clear.
    k[0x236] = 1; // XLF_KERNEL_64
    k[0x234] = 1; // relocatable
    for (at, value) in [
        (0x214, 0x10_0000_u32),
        (0x22c, 0x7fff_ffff),
        (0x230, 0x20_0000),
        (0x238, 2047),
        (0x248, 4),
        (0x24c, payload.len() as u32),
        (0x258, 0x100_0000),
        (0x260, 0x8000),
    ] {
        k[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    k.extend_from_slice(payload);
    k
}

/// 0x40 bytes with a multiboot header at their start, flagged with bit 16 and `flags`.
pub(crate) fn multiboot_flat(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
    let flags = flags | 1 << 16;
    let magic = 0x1bad_b002_u32;
    let checksum = 0_u32.wrapping_sub(magic).wrapping_sub(flags);
    let words = [magic, flags, checksum].into_iter().chain(addresses);
    let mut image: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
    image.resize(0x40, 0xf4);
    image
}

/// A PE32+ file with `sections`.
pub(crate) fn pe(sections: &[(&str, &[u8])]) -> Vec<u8> {
    const HEADERS: usize = 0x400;
    let mut out = vec![0; 0x40];
    out[..2].copy_from_slice(b"MZ");
    out[0x3c] = 0x40;
    out.extend(b"PE\0\0");
    for half in [0x8664_u16, sections.len() as u16] {
        out.extend(half.to_le_bytes());
    }
    out.extend([0; 12]);
    for half in [240_u16, 0x22] {
        out.extend(half.to_le_bytes());
    }
    let optional = out.len();
    out.resize(optional + 240, 0);
    out[optional..optional + 2].copy_from_slice(&0x20b_u16.to_le_bytes());
    out[optional + 108] = 16;
    let mut at = HEADERS;
    let mut bodies = Vec::new();
    for (i, (name, data)) in sections.iter().enumerate() {
        let mut raw_name = [0; 8];
        raw_name[..name.len()].copy_from_slice(name.as_bytes());
        out.extend(raw_name);
        let raw = data.len().next_multiple_of(0x200);
        for word in [data.len() as u32, 0x1000 * (i as u32 + 1), raw as u32, at as u32] {
            out.extend(word.to_le_bytes());
        }
        out.extend([0; 16]);
        bodies.extend_from_slice(data);
        bodies.resize(at - HEADERS + raw, 0);
        at += raw;
    }
    out.resize(HEADERS, 0);
    out.extend(bodies);
    out
}
