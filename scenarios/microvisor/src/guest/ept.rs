//! EPT paging structures: an identity map of 4 GiB in pages of 2 MiB, whose entries a case can
//! take apart and change.

use super::memory::{self, read, write};

/// Read, write, execute.
pub const RWX: u64 = 7;
/// Memory type write-back of a leaf.
pub const WB: u64 = 6 << 3;
/// The entry maps a page of 2 MiB or 1 GiB.
pub const LARGE: u64 = 1 << 7;
/// Accessed.
pub const ACCESSED: u64 = 1 << 8;
/// Dirty.
pub const DIRTY: u64 = 1 << 9;
/// Execute access for user-mode linear addresses.
pub const USER_EXECUTE: u64 = 1 << 10;

const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A tree of EPT paging structures.
#[derive(Clone, Copy)]
pub struct Ept {
    /// Address of the PML4.
    pub root: u64,
}

impl Ept {
    /// An identity map of the first 4 GiB, all accesses allowed, write-back.
    pub fn identity() -> Self {
        let root = memory::page();
        let pdpt = memory::page();
        write(root, pdpt | RWX);
        let pds = memory::pages(4);
        for i in 0..4 {
            write(pdpt + 8 * i, (pds + 4096 * i) | RWX);
        }
        for i in 0..2048 {
            write(pds + 8 * i, i << 21 | LARGE | WB | RWX);
        }
        Self { root }
    }
    /// EPTP for it: write-back, 4 levels, without accessed and dirty flags.
    pub fn eptp(&self) -> u64 {
        self.root | 3 << 3 | 6
    }
    /// Address of the entry for `gpa` at `level` (1: page table … 4: PML4); pages are split
    /// on the way down.
    pub fn entry_at(&self, gpa: u64, level: u32) -> u64 {
        let mut table = self.root;
        let mut at = 4;
        loop {
            let slot = table + 8 * (gpa >> (12 + 9 * (at - 1)) & 0x1ff);
            if at == level {
                return slot;
            }
            let entry = read::<u64>(slot);
            if entry & LARGE != 0 && at < 4 {
                split(slot, entry, at);
            } else if entry & RWX == 0 {
                write(slot, memory::page() | RWX);
            }
            table = read::<u64>(slot) & ADDRESS;
            at -= 1;
        }
    }
    /// Sets the entry for `gpa` at `level`.
    pub fn set(&self, gpa: u64, level: u32, entry: u64) {
        write(self.entry_at(gpa, level), entry);
    }
    /// The entry for `gpa` at `level`.
    pub fn get(&self, gpa: u64, level: u32) -> u64 {
        read(self.entry_at(gpa, level))
    }
    /// Maps the 4-KiB page of `gpa` to `to` with `bits` for permissions and memory type.
    pub fn map(&self, gpa: u64, to: u64, bits: u64) {
        self.set(gpa, 1, to & ADDRESS | bits);
    }
}

fn split(slot: u64, entry: u64, level: u32) {
    let table = memory::page();
    let step = 1_u64 << (12 + 9 * (level - 2));
    let keep = if level == 2 { entry & !LARGE } else { entry };
    for i in 0..512 {
        write(table + 8 * i, keep + i * step);
    }
    write(slot, table | RWX | entry & USER_EXECUTE);
}
