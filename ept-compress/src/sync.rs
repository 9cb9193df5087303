//! Which pages of L1 hold EPT12 tables that EPT02 was composed from, so that the hypervisor
//! can write-protect them.

use std::collections::HashMap;

use memory::{L1Gpa, L2Gpa, PAGE_SHIFT};

use crate::entry::Level;

/// What the hypervisor has to change in EPT01 before it runs L1 or L2 again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProtectionChanges {
    /// Pages to write-protect.
    pub protect: Vec<L1Gpa>,
    /// Pages that need no protection any more.
    pub release: Vec<L1Gpa>,
}

/// One use of a page as a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Use {
    root: u64,
    level: Level,
    /// The L2 address that its first entry translates.
    base: u64,
}

/// L2 addresses whose mapping a write may have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Affected {
    /// The root that uses the table.
    pub root: u64,
    /// First address.
    pub base: L2Gpa,
    /// Length in bytes.
    pub len: u64,
}

/// The table pages, by page number.
#[derive(Debug, Default)]
pub struct Tracker {
    pages: HashMap<u64, Vec<Use>>,
    uses: usize,
    limit: usize,
    protect: Vec<u64>,
    release: Vec<u64>,
}

impl Tracker {
    /// A tracker that remembers at most `limit` uses of pages.
    pub fn new(limit: usize) -> Self {
        Self { limit, ..Self::default() }
    }

    /// Remembers that `table` is a table of `level` of `root` on the way to `gpa`. False
    /// when that would be too many: then everything must be dropped.
    #[must_use]
    pub fn add(&mut self, root: u64, table: L1Gpa, level: Level, gpa: L2Gpa) -> bool {
        let covers = level.size() << 9;
        let new = Use { root, level, base: gpa.0 & !(covers - 1) };
        if self.pages.get(&table.page()).is_some_and(|uses| uses.contains(&new)) {
            return true;
        }
        if self.uses >= self.limit {
            return false;
        }
        self.uses += 1;
        let uses = self.pages.entry(table.page()).or_default();
        if uses.is_empty() && !take(&mut self.release, table.page()) {
            self.protect.push(table.page());
        }
        uses.push(new);
        true
    }

    /// Forgets what `root` uses.
    pub fn drop_root(&mut self, root: u64) {
        let (protect, release) = (&mut self.protect, &mut self.release);
        let mut left = 0;
        self.pages.retain(|page, uses| {
            uses.retain(|u| u.root != root);
            left += uses.len();
            if uses.is_empty() && !take(protect, *page) {
                release.push(*page);
            }
            !uses.is_empty()
        });
        self.uses = left;
    }

    /// Whether the page of `at` is tracked.
    pub fn contains(&self, at: L1Gpa) -> bool {
        self.pages.contains_key(&at.page())
    }

    /// The mappings that a write of `len` bytes at `at` may have changed.
    pub fn affected(&self, at: L1Gpa, len: u64) -> Vec<Affected> {
        let Some(uses) = self.pages.get(&at.page()) else { return Vec::new() };
        let first = at.page_offset() / 8;
        let end = (at.page_offset().saturating_add(len)).div_ceil(8).min(512);
        uses.iter()
            .map(|u| Affected {
                root: u.root,
                base: L2Gpa(u.base + first * u.level.size()),
                len: end.saturating_sub(first) * u.level.size(),
            })
            .collect()
    }

    /// All tracked pages.
    pub fn pages(&self) -> impl Iterator<Item = L1Gpa> + '_ {
        self.pages.keys().map(|p| L1Gpa(p << PAGE_SHIFT))
    }

    /// What changed since the last call.
    pub fn take_changes(&mut self) -> ProtectionChanges {
        let addresses = |v: &mut Vec<u64>| v.drain(..).map(|p| L1Gpa(p << PAGE_SHIFT)).collect();
        ProtectionChanges { protect: addresses(&mut self.protect), release: addresses(&mut self.release) }
    }
}

/// Removes `page` from `list`; whether it was there.
fn take(list: &mut Vec<u64>, page: u64) -> bool {
    match list.iter().position(|p| *p == page) {
        Some(i) => {
            list.swap_remove(i);
            true
        }
        None => false,
    }
}
