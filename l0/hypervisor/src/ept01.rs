//! EPT01: L1-physical to machine addresses, in hardware format (SDM Vol. 3C §29.3).
//!
//! Built before L1 starts: RAM is write-back and fully accessible, everything else is
//! not present, so that accesses to devices exit as EPT violations. A page is as large as
//! alignment, length and the engine allow. The tables live in L0's page pool.
//!
//! The one thing that changes is write permission: pages of L1 can be protected, one by one
//! ([`Ept01::protect`]). A large page is split for that, and put together again when nothing in it
//! is protected any more.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use memory::{L1Gpa, MachineAddr, MachineMemory, MemoryError, PagePool, RamRegion};
use x86_spec::caps::ept_vpid;
use x86_spec::ept;

use crate::vm::lock;

/// log2 of the sizes that a leaf can have, by level (0: page table, 1: directory, 2: PDPT).
const SHIFT: [u32; 4] = [12, 21, 30, 39];
const LEAF: u64 = ept::RWX | ept::MEMTYPE_WB << ept::MEMTYPE_SHIFT;

/// The tables.
#[derive(Debug)]
pub struct Ept01 {
    memory: Arc<MachineMemory>,
    pool: Arc<PagePool>,
    root: MachineAddr,
    tables: u64,
    protected: Mutex<Protected>,
}

/// What is protected.
#[derive(Debug, Default)]
struct Protected {
    /// How many want it, by page number.
    pages: BTreeMap<u64, u32>,
    /// Large pages that were split, by start address and level of the entry.
    splits: BTreeMap<(u64, usize), Split>,
}

#[derive(Clone, Copy, Debug)]
struct Split {
    /// Where the entry is.
    slot: MachineAddr,
    /// What it was.
    entry: u64,
}

impl Ept01 {
    /// Maps `regions`. `capabilities` is IA32_VMX_EPT_VPID_CAP of the engine, which
    /// says which large pages it knows.
    ///
    /// # Errors
    /// [`MemoryError::PoolEmpty`] when the pool can't hold the tables (it needs one page
    /// for each 2 MiB that can't be mapped by a large page).
    pub fn build(
        memory: &Arc<MachineMemory>,
        pool: &Arc<PagePool>,
        regions: &[RamRegion],
        capabilities: u64,
    ) -> Result<Self, MemoryError> {
        let mut ept = Self {
            memory: memory.clone(),
            pool: pool.clone(),
            root: pool.alloc()?,
            tables: 1,
            protected: Mutex::default(),
        };
        for r in regions {
            let (mut gpa, mut machine, mut left) = (r.start.0, r.machine.0, r.len);
            while left >= memory::PAGE_SIZE {
                let level = leaf_level(gpa | machine, left, capabilities);
                ept.map(gpa, machine, level)?;
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

    /// How many pages of the pool the tables took when they were built.
    pub fn tables(&self) -> u64 {
        self.tables
    }

    /// Takes the write permission of the page of `at` away. Each call needs one of
    /// [`Self::release`]. Whether anything changed, so that the engine has to drop its translations.
    ///
    /// # Errors
    /// [`MemoryError::PoolEmpty`] when a large page can't be split; then nothing is protected.
    pub fn protect(&self, at: L1Gpa) -> Result<bool, MemoryError> {
        let mut p = lock(&self.protected);
        if let Some(n) = p.pages.get_mut(&at.page()) {
            *n += 1;
            return Ok(false);
        }
        let Some(slot) = self.split_to(&mut p, at)? else { return Ok(false) };
        p.pages.insert(at.page(), 1);
        let entry = self.memory.read_u64(slot)?;
        self.memory.write_u64(slot, entry & !ept::W)?;
        Ok(true)
    }

    /// Ends one protection of the page of `at`. Whether tables were freed, so that the engine has to
    /// drop what it cached of them.
    ///
    /// # Errors
    /// None for tables that this type made.
    pub fn release(&self, at: L1Gpa) -> Result<bool, MemoryError> {
        let mut p = lock(&self.protected);
        let Some(n) = p.pages.get_mut(&at.page()) else { return Ok(false) };
        *n -= 1;
        if *n > 0 {
            return Ok(false);
        }
        p.pages.remove(&at.page());
        if let Some(slot) = self.split_to(&mut p, at)? {
            let entry = self.memory.read_u64(slot)?;
            self.memory.write_u64(slot, entry | ept::W)?;
        }
        self.merge(&mut p, at)
    }

    /// Whether the page of `at` is protected.
    pub fn is_protected(&self, at: L1Gpa) -> bool {
        lock(&self.protected).pages.contains_key(&at.page())
    }

    /// The entry of the 4-KiB page of `at`; `None` where nothing is mapped. Large pages on the way are
    /// split.
    fn split_to(&self, p: &mut Protected, at: L1Gpa) -> Result<Option<MachineAddr>, MemoryError> {
        let mut table = self.root;
        for level in (1..4).rev() {
            let slot = entry_address(table, at.0, level);
            let entry = self.memory.read_u64(slot)?;
            table = if entry & ept::RWX == 0 {
                return Ok(None);
            } else if entry & ept::LARGE != 0 {
                let new = self.split(slot, entry, level)?;
                p.splits.insert((start(at.0, level), level), Split { slot, entry });
                new
            } else {
                MachineAddr(entry & ept::ADDR_MASK)
            };
        }
        let slot = entry_address(table, at.0, 0);
        Ok((self.memory.read_u64(slot)? & ept::RWX != 0).then_some(slot))
    }

    /// Replaces a large page by a table that maps the same. The table.
    fn split(&self, slot: MachineAddr, entry: u64, level: usize) -> Result<MachineAddr, MemoryError> {
        let table = self.pool.alloc()?;
        let child = if level == 1 { entry & !ept::LARGE } else { entry };
        for i in 0..512 {
            self.memory.write_u64(table.offset(i * 8), child + (i << SHIFT[level - 1]))?;
        }
        self.memory.write_u64(slot, table.0 | ept::RWX)?;
        Ok(table)
    }

    /// Puts the large pages around `at` together again that hold nothing protected.
    fn merge(&self, p: &mut Protected, at: L1Gpa) -> Result<bool, MemoryError> {
        let mut merged = false;
        for (level, shift) in SHIFT.into_iter().enumerate().take(3).skip(1) {
            let start = start(at.0, level);
            let pages = start >> SHIFT[0]..(start + (1 << shift)) >> SHIFT[0];
            if p.pages.range(pages).next().is_some() {
                break;
            }
            if let Some(split) = p.splits.remove(&(start, level)) {
                let table = MachineAddr(self.memory.read_u64(split.slot)? & ept::ADDR_MASK);
                self.memory.write_u64(split.slot, split.entry)?;
                self.pool.free(table);
                merged = true;
            }
        }
        Ok(merged)
    }

    /// Writes the leaf for `gpa` at table `level` (0 is a page table).
    fn map(&mut self, gpa: u64, machine: u64, level: usize) -> Result<(), MemoryError> {
        let mut table = self.root;
        for l in (level + 1..4).rev() {
            let slot = entry_address(table, gpa, l);
            let entry = self.memory.read_u64(slot)?;
            table = if entry & ept::RWX == 0 {
                let new = self.pool.alloc()?;
                self.tables += 1;
                self.memory.write_u64(slot, new.0 | ept::RWX)?;
                new
            } else {
                MachineAddr(entry & ept::ADDR_MASK)
            };
        }
        let large = if level == 0 { 0 } else { ept::LARGE };
        self.memory.write_u64(entry_address(table, gpa, level), machine | LEAF | large)
    }
}

/// Start of what an entry of `level` maps around `gpa`.
fn start(gpa: u64, level: usize) -> u64 {
    gpa >> SHIFT[level] << SHIFT[level]
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
        let pool = Arc::new(PagePool::new(m.clone(), MachineAddr(size), 16 << 10).unwrap());
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
    fn a_page_is_protected_and_released() {
        let size = 2 << 30;
        let (m, e) = build(size, ept_vpid::PAGE_1G | ept_vpid::PAGE_2M);
        let used = e.pool.used();
        let before = walk(&m, e.eptp(), 0x4567_8000).unwrap();
        assert_eq!(e.protect(L1Gpa(0x4567_8123)), Ok(true));
        assert_eq!(e.protect(L1Gpa(0x4567_8000)), Ok(false), "it is already");
        assert!(e.is_protected(L1Gpa(0x4567_8fff)) && !e.is_protected(L1Gpa(0x4567_9000)));
        let (leaf, level, machine) = walk(&m, e.eptp(), 0x4567_8000).unwrap();
        assert_eq!((leaf & 0xfff, level, machine), (0x35, 0, before.2));
        // What is around it is mapped as before.
        for (gpa, level) in [(0x4567_7008, 0), (0x4567_9008, 0), (0x4580_0008, 1), (0x4000_0008, 1), (8, 2)] {
            let (leaf, l, machine) = walk(&m, e.eptp(), gpa).unwrap();
            assert_eq!((leaf & 7, l, machine), (7, level, gpa), "{gpa:#x}");
            assert_eq!(leaf & ept::LARGE != 0, level > 0);
        }
        assert_eq!(e.pool.used(), used + 2);
        assert_eq!(e.protect(L1Gpa(0x4580_0000)), Ok(true));
        assert_eq!(e.pool.used(), used + 3);
        assert_eq!(e.release(L1Gpa(0x4567_8000)), Ok(false), "protected twice");
        assert_eq!(walk(&m, e.eptp(), 0x4567_8000).unwrap().0 & 7, 5);
        assert_eq!(e.release(L1Gpa(0x4567_8000)), Ok(true));
        assert_eq!(walk(&m, e.eptp(), 0x4567_8000).unwrap().1, 1, "the other is in another 2 MiB");
        assert_eq!(e.release(L1Gpa(0x4580_0000)), Ok(true));
        assert_eq!(walk(&m, e.eptp(), 0x4567_8000), Some(before));
        assert_eq!(e.pool.used(), used);
        // Nothing to protect where there is no RAM, and nothing to release.
        assert_eq!(e.protect(L1Gpa(size)), Ok(false));
        assert_eq!(e.release(L1Gpa(size)), Ok(false));
    }

    #[test]
    fn a_full_pool_is_an_error() {
        let m = Arc::new(MachineMemory::new(65 << 20).unwrap());
        let pool = Arc::new(PagePool::new(m.clone(), MachineAddr(64 << 20), 10).unwrap());
        let r = Ept01::build(&m, &pool, &RamLayout::new(64 << 20).regions, 0);
        assert_eq!(r.unwrap_err(), MemoryError::PoolEmpty { pages: 10 });
    }
}
