//! EPT01: L1-physical to machine addresses, in hardware format (SDM Vol. 3C §29.3).
//!
//! Built once, before L1 starts: RAM is write-back and fully accessible, everything else is
//! not present, so that accesses to devices exit as EPT violations. A page is as large as
//! alignment, length and the engine allow. The tables live in L0's page pool.

use memory::{MachineAddr, MachineMemory, MemoryError, PagePool, RamRegion};
use x86_spec::caps::ept_vpid;
use x86_spec::ept;

/// log2 of the sizes that a leaf can have, by level (1: page table, 2: directory, 3: PDPT).
const SHIFT: [u32; 4] = [12, 21, 30, 39];
const LEAF: u64 = ept::RWX | ept::MEMTYPE_WB << ept::MEMTYPE_SHIFT;

/// The tables.
#[derive(Debug)]
pub struct Ept01 {
    root: MachineAddr,
    tables: u64,
}

impl Ept01 {
    /// Maps `regions`. `capabilities` is IA32_VMX_EPT_VPID_CAP of the engine, which
    /// says which large pages it knows.
    ///
    /// # Errors
    /// [`MemoryError::PoolEmpty`] when the pool can't hold the tables (it needs one page
    /// for each 2 MiB that can't be mapped by a large page).
    pub fn build(
        memory: &MachineMemory,
        pool: &PagePool,
        regions: &[RamRegion],
        capabilities: u64,
    ) -> Result<Self, MemoryError> {
        let mut ept = Self { root: pool.alloc()?, tables: 1 };
        for r in regions {
            let (mut gpa, mut machine, mut left) = (r.start.0, r.machine.0, r.len);
            while left >= memory::PAGE_SIZE {
                let level = leaf_level(gpa | machine, left, capabilities);
                ept.map(memory, pool, gpa, machine, level)?;
                let size = 1 << SHIFT[level];
                gpa += size;
                machine += size;
                left -= size;
            }
        }
        Ok(ept)
    }

    /// The EPT pointer (SDM Vol. 3C §25.6.11): 4 levels, write-back, without accessed and
    /// dirty flags, which nothing of L0 reads.
    pub fn eptp(&self) -> u64 {
        ept::eptp(self.root.0, false)
    }

    /// How many pages of the pool the tables take.
    pub fn tables(&self) -> u64 {
        self.tables
    }

    /// Writes the leaf for `gpa` at table `level` (0 is a page table).
    fn map(
        &mut self,
        memory: &MachineMemory,
        pool: &PagePool,
        gpa: u64,
        machine: u64,
        level: usize,
    ) -> Result<(), MemoryError> {
        let mut table = self.root;
        for l in (level + 1..4).rev() {
            let slot = entry_address(table, gpa, l);
            let entry = memory.read_u64(slot)?;
            table = if entry & ept::RWX == 0 {
                let new = pool.alloc()?;
                self.tables += 1;
                memory.write_u64(slot, new.0 | ept::RWX)?;
                new
            } else {
                MachineAddr(entry & ept::ADDR_MASK)
            };
        }
        let large = if level == 0 { 0 } else { ept::LARGE };
        memory.write_u64(entry_address(table, gpa, level), machine | LEAF | large)
    }
}

/// The largest page for a mapping whose addresses, or'ed, are `addresses`.
fn leaf_level(addresses: u64, left: u64, capabilities: u64) -> usize {
    let fits = |level: usize| {
        let size = 1u64 << SHIFT[level];
        addresses.is_multiple_of(size) && left >= size
    };
    if capabilities & ept_vpid::PAGE_1G != 0 && fits(2) {
        2
    } else if capabilities & ept_vpid::PAGE_2M != 0 && fits(1) {
        1
    } else {
        0
    }
}

fn entry_address(table: MachineAddr, gpa: u64, level: usize) -> MachineAddr {
    table.offset((gpa >> SHIFT[level] & 511) * 8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::RamLayout;
    use std::sync::Arc;

    /// A walk as SDM Vol. 3C §29.3.2 has it: the leaf, its level, and the machine address.
    fn walk(m: &MachineMemory, eptp: u64, gpa: u64) -> Option<(u64, usize, u64)> {
        let mut table = MachineAddr(eptp & ept::ADDR_MASK);
        for level in (0..4).rev() {
            let e = m.read_u64(entry_address(table, gpa, level)).unwrap();
            if e & 7 == 0 {
                return None;
            }
            if level == 0 || e & ept::LARGE != 0 {
                let mask = (1u64 << SHIFT[level]) - 1;
                return Some((e, level, (e & ept::ADDR_MASK & !mask) | gpa & mask));
            }
            // Bits 7:3 of an entry that references a table are reserved (table 29-2 ff.).
            assert_eq!(e & 0xf8, 0);
            table = MachineAddr(e & ept::ADDR_MASK);
        }
        None
    }

    fn build(size: u64, caps: u64) -> (Arc<MachineMemory>, Ept01) {
        let m = Arc::new(MachineMemory::new(size + (64 << 20)).unwrap());
        let pool = PagePool::new(m.clone(), MachineAddr(size), 16 << 10).unwrap();
        let e = Ept01::build(&m, &pool, &RamLayout::new(size).regions, caps).unwrap();
        (m, e)
    }

    #[test]
    fn large_pages_where_the_layout_allows() {
        let (m, e) = build((6 << 30) + (3 << 20) + 0x5000, ept_vpid::PAGE_1G | ept_vpid::PAGE_2M);
        let at = |gpa| walk(&m, e.eptp(), gpa).map(|(_, level, machine)| (level, machine));
        assert_eq!(at(0x1234), Some((2, 0x1234)));
        assert_eq!(at((3 << 30) - 1), Some((2, (3 << 30) - 1)));
        assert_eq!(at((4 << 30) + 5), Some((2, (3 << 30) + 5)));
        assert_eq!(at((7 << 30) + 5), Some((1, (6 << 30) + 5)));
        let last = (7 << 30) + (3 << 20) + 0x4fff;
        assert_eq!(at(last), Some((0, last - (1 << 30))));
        assert_eq!(at(last + 1), None);
    }

    #[test]
    fn the_device_hole_is_not_present() {
        let (m, e) = build(6 << 30, ept_vpid::PAGE_1G);
        for gpa in [3 << 30, 0xfee0_0000, 0xfec0_0000, (4 << 30) - 1, 7 << 30] {
            assert_eq!(walk(&m, e.eptp(), gpa), None, "{gpa:#x}");
        }
    }

    #[test]
    fn leaves_are_write_back_and_fully_accessible() {
        let (m, e) = build(64 << 20, 0);
        let (leaf, level, _) = walk(&m, e.eptp(), 0x10_0000).unwrap();
        assert_eq!((leaf & 0xfff, level), (0x37, 0));
        // SDM Vol. 3C table 25-9: WB (6), page-walk length 4 (3 in bits 5:3), no A/D.
        assert_eq!(e.eptp() & 0xfff, 0x1e);
        // 32 page tables, a directory, a PDPT and the root.
        assert_eq!(e.tables(), 35);
    }

    #[test]
    fn a_full_pool_is_an_error() {
        let m = Arc::new(MachineMemory::new(65 << 20).unwrap());
        let pool = PagePool::new(m.clone(), MachineAddr(64 << 20), 10).unwrap();
        let r = Ept01::build(&m, &pool, &RamLayout::new(64 << 20).regions, 0);
        assert_eq!(r.unwrap_err(), MemoryError::PoolEmpty { pages: 10 });
    }
}
