//! A small machine with EPT12 and EPT01 that tests fill, and a walker that shares nothing
//! with the crate's own.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::cell::Cell;
use std::sync::Arc;

use ept_compress::{Ept01View, Ept02, Format};
use memory::{L1Gpa, L1Ram, MachineAddr, MachineMemory, PagePool, RamLayout};

pub const R: u64 = 1;
pub const W: u64 = 2;
pub const X: u64 = 4;
pub const XU: u64 = 1 << 10;
pub const LARGE: u64 = 1 << 7;
pub const A: u64 = 1 << 8;
pub const D: u64 = 1 << 9;
pub const WB: u64 = 6 << 3;
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
pub const EPTP_AD: u64 = 1 << 6;

pub const FORMAT: Format =
    Format { physical_bits: 46, execute_only: true, page_2m: true, page_1g: true, mode_based_execute: false };

const L1_RAM: u64 = 8 << 20;
const TABLES_12: u64 = 1 << 20;
const TABLES_01: u64 = 8 << 20;
const POOL: u64 = 16 << 20;
const POOL_PAGES: u64 = 4096;

/// The machine.
pub struct World {
    pub memory: Arc<MachineMemory>,
    pub ram: L1Ram,
    pub pool: Arc<PagePool>,
    next12: Cell<u64>,
    next01: Cell<u64>,
}

impl World {
    pub fn new() -> Self {
        let memory = Arc::new(MachineMemory::new(POOL + POOL_PAGES * 0x1000).unwrap());
        let ram = L1Ram::new(memory.clone(), RamLayout::new(L1_RAM)).unwrap();
        let pool = Arc::new(PagePool::new(memory.clone(), MachineAddr(POOL), POOL_PAGES).unwrap());
        Self { memory, ram, pool, next12: Cell::new(TABLES_12), next01: Cell::new(TABLES_01) }
    }

    pub fn ept02(&self, limit: u64, write_protect: bool) -> Ept02 {
        Ept02::new(self.memory.clone(), self.pool.clone(), limit, FORMAT, write_protect).unwrap()
    }

    pub fn view01(&self, root01: u64) -> Ept01View<'_> {
        Ept01View { memory: &self.memory, eptp: root01 | 0x1e, format: FORMAT }
    }

    fn take(next: &Cell<u64>, end: u64) -> u64 {
        let page = next.get();
        assert!(page < end, "the test needs more table pages");
        next.set(page + 0x1000);
        page
    }

    /// A table page for EPT12: machine and L1 address are the same in low RAM.
    pub fn table12(&self) -> u64 {
        Self::take(&self.next12, L1_RAM)
    }

    /// A table page for EPT01.
    pub fn table01(&self) -> u64 {
        Self::take(&self.next01, POOL)
    }

    pub fn entry(&self, at: u64) -> u64 {
        self.memory.read_u64(MachineAddr(at)).unwrap()
    }

    pub fn set_entry(&self, at: u64, value: u64) {
        self.memory.write_u64(MachineAddr(at), value).unwrap();
    }

    /// Writes `leaf` for `gpa` at `level` (1: page table), with tables by `table` that
    /// have the entry bits `upper`. Gives up below an entry that maps a large page.
    pub fn map(&self, root: u64, gpa: u64, level: u32, leaf: u64, upper: u64, table: impl Fn(&Self) -> u64) {
        let mut at = root;
        for l in (level + 1..=4).rev() {
            let slot = slot(at, gpa, l);
            let e = self.entry(slot);
            if e & 7 == 0 && e & ADDRESS == 0 {
                let new = table(self);
                self.set_entry(slot, new | upper);
                at = new;
            } else if l < 4 && e & LARGE != 0 {
                return;
            } else {
                at = e & ADDRESS;
            }
            if at + 0x1000 > POOL {
                return;
            }
        }
        self.set_entry(slot(at, gpa, level), leaf);
    }

    pub fn map12(&self, root: u64, gpa: u64, level: u32, leaf: u64, upper: u64) {
        self.map(root, gpa, level, leaf, upper, Self::table12);
    }

    pub fn map01(&self, root: u64, gpa: u64, level: u32, leaf: u64) {
        self.map(root, gpa, level, leaf, R | W | X, Self::table01);
    }

    /// EPT01 that maps the first 512 GiB of L1 to machine addresses `shift` higher.
    pub fn plain01(&self, shift: u64) -> u64 {
        let root = self.table01();
        for g in 0..8u64 {
            self.map01(root, g << 30, 3, ((g << 30) + shift) | R | W | X | WB | LARGE);
        }
        root
    }

    /// The reference walk.
    pub fn reference(&self, root: u64, gpa: u64) -> Walked {
        let (mut table, mut rights, mut entries) = (root & ADDRESS, R | W | X, vec![]);
        for level in (1..=4).rev() {
            let at = slot(table, gpa, level);
            let Ok(e) = self.memory.read_u64(MachineAddr(at)) else { return Walked::Misconfigured };
            if e & 7 == 0 {
                return Walked::NotPresent;
            }
            let leaf = level == 1 || (level < 4 && e & LARGE != 0);
            if bad(e, level, leaf) {
                return Walked::Misconfigured;
            }
            rights &= e;
            entries.push(at);
            if leaf {
                let size = size(level);
                return Walked::Page {
                    address: (e & ADDRESS & !(size - 1)) | (gpa & (size - 1)),
                    size,
                    rights: rights & 7,
                    memory_type: e >> 3 & 7,
                    entries,
                    dirty: e & D != 0,
                };
            }
            table = e & ADDRESS;
        }
        unreachable!()
    }
}

pub fn size(level: u32) -> u64 {
    1 << (12 + 9 * (level - 1))
}

pub fn slot(table: u64, gpa: u64, level: u32) -> u64 {
    table + (gpa / size(level) % 512) * 8
}

/// Misconfigured, with 46 physical bits and everything supported (SDM Vol. 3C §29.3.3.1).
fn bad(e: u64, level: u32, leaf: bool) -> bool {
    let wide = (46..52).any(|b| e & 1 << b != 0);
    let write_only = e & 3 == 2;
    let kind = if leaf {
        [2, 3, 7].contains(&(e >> 3 & 7)) || (12..12 + 9 * (level - 1)).any(|b| e & 1 << b != 0)
    } else {
        (3..7).any(|b| e & 1 << b != 0) || (level == 4 && e & LARGE != 0)
    };
    wide || write_only || kind
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Walked {
    NotPresent,
    Misconfigured,
    Page { address: u64, size: u64, rights: u64, memory_type: u64, entries: Vec<u64>, dirty: bool },
}

pub fn l1(at: u64) -> L1Gpa {
    L1Gpa(at)
}
