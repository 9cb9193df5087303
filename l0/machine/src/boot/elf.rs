//! The parts of an ELF file that loaders need: segments by physical address and the PVH
//! entry note. Parsing itself is the `object` crate's.

use object::LittleEndian;
use object::elf;
use object::read::elf::{FileHeader, ProgramHeader as _};

use super::BootError;
use super::placement::Placement;

/// More segments than any kernel has; the limit bounds the time for hostile files.
const MAX_SEGMENTS: usize = 256;
const CLASS_32: u8 = elf::ELFCLASS32.0;
const CLASS_64: u8 = elf::ELFCLASS64.0;
const LITTLE_ENDIAN: u8 = elf::ELFDATA2LSB.0;
/// `XEN_ELFNOTE_PHYS32_ENTRY` of Xen's public/elfnote.h.
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// One `PT_LOAD` segment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment<'d> {
    /// Physical load address.
    pub paddr: u64,
    /// Virtual address, for entry points that are virtual.
    pub vaddr: u64,
    /// Its bytes in the file.
    pub data: &'d [u8],
    /// Its length in memory; the rest is zero.
    pub mem_len: u64,
}

/// An ELF executable for x86.
#[derive(Clone, Debug)]
pub(super) struct Elf<'d> {
    /// 64-bit ELF.
    pub is_64: bool,
    /// The entry point of the file header.
    pub entry: u64,
    /// `PT_LOAD` segments in file order.
    pub segments: Vec<Segment<'d>>,
    /// The PVH entry point, if there is a note.
    pub pvh_entry: Option<u64>,
}

/// Whether `data` starts with ELF's magic number.
pub(super) fn is_elf(data: &[u8]) -> bool {
    data.starts_with(&elf::ELFMAG)
}

impl<'d> Elf<'d> {
    /// Reads the headers of `data`, which are called `file` in errors.
    pub(super) fn parse(file: &str, data: &'d [u8]) -> Result<Self, BootError> {
        let bad = |what, offset, value: u8, expected| {
            Err(BootError::BadField { file: file.into(), what, offset, value: value.into(), expected })
        };
        match (data.get(4), data.get(5)) {
            (Some(&(CLASS_32 | CLASS_64)), Some(&LITTLE_ENDIAN)) => {}
            (Some(&class), Some(&LITTLE_ENDIAN)) => {
                return bad("ELF class", 4, class, "1 (32-bit) or 2 (64-bit)");
            }
            (Some(_), Some(&order)) => return bad("ELF byte order", 5, order, "1 (little-endian)"),
            _ => return Err(truncated(file, "the ELF header", 0, 64, data)),
        }
        if data.get(4) == Some(&CLASS_64) {
            Self::parse_class::<elf::FileHeader64<LittleEndian>>(file, data, true)
        } else {
            Self::parse_class::<elf::FileHeader32<LittleEndian>>(file, data, false)
        }
    }

    fn parse_class<H>(file: &str, data: &'d [u8], is_64: bool) -> Result<Self, BootError>
    where
        H: FileHeader<Endian = LittleEndian>,
    {
        let e = LittleEndian;
        let malformed = |what, offset: u64, reason: object::Error| BootError::Malformed {
            file: file.into(),
            what,
            offset,
            reason: reason.to_string(),
        };
        let header = H::parse(data).map_err(|r| malformed("the ELF header", 0, r))?;
        let machine = header.e_machine(e);
        if machine != elf::EM_X86_64 && machine != elf::EM_386 {
            return Err(BootError::BadField {
                file: file.into(),
                what: "ELF machine",
                offset: 18,
                value: machine.0.into(),
                expected: "62 (x86-64) or 3 (i386)",
            });
        }
        let table: u64 = header.e_phoff(e).into();
        let headers =
            header.program_headers(e, data).map_err(|r| malformed("the program header table", table, r))?;
        if headers.len() > MAX_SEGMENTS {
            return Err(BootError::BadField {
                file: file.into(),
                what: "number of program headers",
                offset: table,
                value: headers.len() as u64,
                expected: "at most 256",
            });
        }
        let mut elf = Self { is_64, entry: header.e_entry(e).into(), segments: Vec::new(), pvh_entry: None };
        for ph in headers {
            let offset: u64 = ph.p_offset(e).into();
            let filesz: u64 = ph.p_filesz(e).into();
            match ph.p_type(e) {
                elf::PT_LOAD => {
                    let bytes = ph
                        .data(e, data)
                        .map_err(|()| truncated(file, "an ELF segment", offset, filesz, data))?;
                    elf.segments.push(Segment {
                        paddr: ph.p_paddr(e).into(),
                        vaddr: ph.p_vaddr(e).into(),
                        data: bytes,
                        mem_len: ph.p_memsz(e).into(),
                    });
                }
                elf::PT_NOTE if elf.pvh_entry.is_none() => {
                    elf.pvh_entry =
                        pvh_note::<H>(ph, data).map_err(|r| malformed("an ELF note", offset, r))?;
                }
                _ => {}
            }
        }
        Ok(elf)
    }

    /// Puts the segments at their physical addresses.
    pub(super) fn load(&self, file: &str, placement: &mut Placement<'_>) -> Result<(), BootError> {
        if self.segments.iter().all(|s| s.mem_len == 0) {
            return Err(BootError::Malformed {
                file: file.into(),
                what: "the program header table",
                offset: 0,
                reason: "there is no segment to load".into(),
            });
        }
        for s in self.segments.iter().filter(|s| s.mem_len > 0) {
            placement.load(file, "the kernel's segment", s.paddr, s.data, s.mem_len)?;
        }
        Ok(())
    }

    /// The physical address of entry point `entry`, which linkers give as a physical or a
    /// virtual one; `None` outside all segments.
    pub(super) fn physical_entry(&self, entry: u64) -> Option<u64> {
        let inside = |start: u64, s: &Segment<'_>| entry.checked_sub(start).filter(|o| *o < s.mem_len);
        if self.segments.iter().any(|s| inside(s.paddr, s).is_some()) {
            return Some(entry);
        }
        self.segments.iter().find_map(|s| inside(s.vaddr, s).and_then(|o| s.paddr.checked_add(o)))
    }
}

/// The entry point in a PVH note of segment `ph`. The descriptor is 4 or 8 bytes long,
/// the address always a 32-bit physical one.
fn pvh_note<H>(ph: &H::ProgramHeader, data: &[u8]) -> Result<Option<u64>, object::Error>
where
    H: FileHeader<Endian = LittleEndian>,
{
    let e = LittleEndian;
    let Some(mut notes) = ph.notes(e, data)? else { return Ok(None) };
    while let Some(note) = notes.next()? {
        if note.name() == b"Xen" && note.n_type(e).0 == XEN_ELFNOTE_PHYS32_ENTRY {
            let address = note.desc().first_chunk::<4>().map(|b| u32::from_le_bytes(*b).into());
            return Ok(address);
        }
    }
    Ok(None)
}

fn truncated(file: &str, what: &'static str, offset: u64, need: u64, data: &[u8]) -> BootError {
    BootError::Truncated { file: file.into(), what, offset, need, len: data.len() as u64 }
}
