//! L1's RAM: which L1 physical ranges are backed by which machine memory.

use std::sync::Arc;

use crate::{L1Gpa, MachineAddr, MachineMemory, MemoryError};

/// Start of the hole below 4 GiB that holds devices (I/O APIC, local APIC, ECAM …).
const HOLE_START: u64 = 0xc000_0000;
/// Where RAM goes on above the hole.
const HOLE_END: u64 = 1 << 32;

/// One contiguous range of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// First L1 physical address.
    pub start: L1Gpa,
    /// Length in bytes.
    pub len: u64,
    /// The machine memory behind `start`.
    pub machine: MachineAddr,
}

/// How `size` bytes of RAM are laid out in L1's physical address space: up to 3 GiB
/// from 0, the rest from 4 GiB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    /// The regions, in order of address.
    pub regions: Vec<RamRegion>,
}

impl RamLayout {
    /// Lays out `size` bytes, which use machine memory from 0.
    pub fn new(size: u64) -> Self {
        let low = size.min(HOLE_START);
        let mut regions = vec![RamRegion { start: L1Gpa(0), len: low, machine: MachineAddr(0) }];
        if size > low {
            regions.push(RamRegion { start: L1Gpa(HOLE_END), len: size - low, machine: MachineAddr(low) });
        }
        Self { regions }
    }
}

/// L1's RAM, as loaders and devices see it.
#[derive(Clone, Debug)]
pub struct L1Ram {
    memory: Arc<MachineMemory>,
    layout: RamLayout,
}

impl L1Ram {
    /// RAM laid out as `layout` in `memory`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when a region is not inside `memory`.
    pub fn new(memory: Arc<MachineMemory>, layout: RamLayout) -> Result<Self, MemoryError> {
        for r in &layout.regions {
            memory.host_ptr(r.machine, r.len as usize)?;
        }
        Ok(Self { memory, layout })
    }

    /// The machine memory that holds it.
    pub fn memory(&self) -> &Arc<MachineMemory> {
        &self.memory
    }

    /// The regions, in order of address.
    pub fn regions(&self) -> &[RamRegion] {
        &self.layout.regions
    }

    /// RAM size in bytes.
    pub fn size(&self) -> u64 {
        self.layout.regions.iter().map(|r| r.len).sum()
    }

    /// The machine address behind `gpa` and how many bytes of RAM follow it without a
    /// gap; `None` where there is no RAM.
    pub fn translate(&self, gpa: L1Gpa) -> Option<(MachineAddr, u64)> {
        self.layout.regions.iter().find_map(|r| {
            let off = gpa.0.checked_sub(r.start.0).filter(|o| *o < r.len)?;
            Some((r.machine.offset(off), r.len - off))
        })
    }

    /// The L1 physical address of RAM at machine address `at`; `None` for other machine memory.
    pub fn gpa_of(&self, at: MachineAddr) -> Option<L1Gpa> {
        self.layout.regions.iter().find_map(|r| {
            let off = at.0.checked_sub(r.machine.0).filter(|o| *o < r.len)?;
            Some(r.start.offset(off))
        })
    }

    fn range(&self, gpa: L1Gpa, len: usize) -> Result<MachineAddr, MemoryError> {
        match self.translate(gpa) {
            Some((m, room)) if room >= len as u64 => Ok(m),
            _ => Err(MemoryError::NotRam { addr: gpa.0, len: len as u64 }),
        }
    }

    /// Copies RAM at `gpa` into `buf`.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`] when any byte is not RAM; nothing was read then.
    pub fn read(&self, gpa: L1Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(self.range(gpa, buf.len())?, buf)
    }

    /// Copies `buf` to RAM at `gpa`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(&self, gpa: L1Gpa, buf: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(self.range(gpa, buf.len())?, buf)
    }

    /// Fills `len` bytes of RAM at `gpa` with `byte`.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn fill(&self, gpa: L1Gpa, byte: u8, len: usize) -> Result<(), MemoryError> {
        self.memory.fill(self.range(gpa, len)?, byte, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_above_3_gib_goes_on_at_4_gib() {
        let l = RamLayout::new(6 << 30);
        assert_eq!(l.regions.len(), 2);
        assert_eq!(l.regions[1].start, L1Gpa(4 << 30));
        assert_eq!(l.regions[1].len, 3 << 30);
        assert_eq!(l.regions[1].machine, MachineAddr(3 << 30));
        let mem = Arc::new(MachineMemory::new(7 << 30).unwrap());
        let ram = L1Ram::new(mem, l).unwrap();
        assert_eq!(ram.gpa_of(MachineAddr((3 << 30) + 5)), Some(L1Gpa((4 << 30) + 5)));
        assert_eq!(ram.gpa_of(MachineAddr(5)), Some(L1Gpa(5)));
        assert_eq!(ram.gpa_of(MachineAddr(6 << 30)), None);
    }

    #[test]
    fn accesses_across_the_end_fail_whole() {
        let mem = Arc::new(MachineMemory::new(0x10000).unwrap());
        let ram = L1Ram::new(mem, RamLayout::new(0x10000)).unwrap();
        assert_eq!(ram.write(L1Gpa(0xffff), &[1, 2]), Err(MemoryError::NotRam { addr: 0xffff, len: 2 }));
        let mut b = [9];
        ram.read(L1Gpa(0xffff), &mut b).unwrap();
        assert_eq!(b, [0]);
    }
}
