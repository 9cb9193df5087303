//! Which pages of L1 hold EPT12 tables that EPT02 was composed from, so that the hypervisor
//! can write-protect them.

use std::collections::{HashMap, HashSet};

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

impl Use {
    /// What entries `first..end` map.
    fn affected(&self, first: u64, end: u64) -> Affected {
        Affected {
            root: self.root,
            base: L2Gpa(self.base + first * self.level.size()),
            len: end.saturating_sub(first) * self.level.size(),
        }
    }
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

/// Writes to a table without a new mapping through it after which it is no longer tracked: L1 uses
/// the page for something else, or fills it, and is better left alone.
const MAX_WRITES: u32 = 8;
/// Tables that can't be protected.
const MAX_EXEMPT: usize = 64;

/// A page that holds a table.
#[derive(Debug, Default)]
struct Page {
    uses: Vec<Use>,
    /// Writes since a mapping was last made through it.
    writes: u32,
}

/// What a write to a table means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// The mappings that may have changed.
    pub affected: Vec<Affected>,
    /// The table is written again and again: it is to be dropped.
    pub drop: bool,
}

/// The table pages, by page number.
#[derive(Debug, Default)]
pub struct Tracker {
    pages: HashMap<u64, Page>,
    /// Tables that L2 itself writes, which can't be protected: INVEPT is needed for them.
    exempt: HashSet<u64>,
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
        if let Some(page) = self.pages.get_mut(&table.page()) {
            page.writes = 0;
            if page.uses.contains(&new) {
                return true;
            }
        }
        if self.uses >= self.limit {
            return false;
        }
        self.uses += 1;
        let uses = &mut self.pages.entry(table.page()).or_default().uses;
        let first = uses.is_empty() && !self.exempt.contains(&table.page());
        if first && !take(&mut self.release, table.page()) {
            self.protect.push(table.page());
        }
        uses.push(new);
        true
    }

    /// Forgets what `root` uses.
    pub fn drop_root(&mut self, root: u64) {
        let Self { pages, exempt, protect, release, .. } = self;
        let mut left = 0;
        pages.retain(|number, page| {
            page.uses.retain(|u| u.root != root);
            left += page.uses.len();
            if page.uses.is_empty() && !exempt.contains(number) && !take(protect, *number) {
                release.push(*number);
            }
            !page.uses.is_empty()
        });
        self.uses = left;
    }

    /// Forgets `table`: all mappings that came from it are to be dropped.
    pub fn drop_table(&mut self, table: L1Gpa) -> Vec<Affected> {
        let Some(page) = self.pages.remove(&table.page()) else { return Vec::new() };
        self.uses = self.uses.saturating_sub(page.uses.len());
        if !self.exempt.contains(&table.page()) && !take(&mut self.protect, table.page()) {
            self.release.push(table.page());
        }
        page.uses.iter().map(|u| u.affected(0, 512)).collect()
    }

    /// Has `table`, which must not be tracked now, never protected from here on. False when
    /// that would be too many: then everything must be dropped, and [`Self::forget_exempt`].
    #[must_use]
    pub fn exempt(&mut self, table: L1Gpa) -> bool {
        if self.exempt.len() >= MAX_EXEMPT {
            return false;
        }
        self.exempt.insert(table.page());
        true
    }

    /// Whether there are tables whose writes are not seen.
    pub fn has_exempt(&self) -> bool {
        !self.exempt.is_empty()
    }

    /// All tables are protected again, once they are used. Nothing may be tracked.
    pub fn forget_exempt(&mut self) {
        debug_assert!(self.pages.is_empty(), "an exempt table is tracked, and not protected");
        self.exempt.clear();
    }

    /// Whether the page of `at` is to be protected.
    pub fn contains(&self, at: L1Gpa) -> bool {
        self.pages.contains_key(&at.page()) && !self.exempt.contains(&at.page())
    }

    /// L1 wrote `len` bytes at `at`.
    pub fn wrote(&mut self, at: L1Gpa, len: u64) -> Written {
        let Some(page) = self.pages.get_mut(&at.page()) else { return Written::default() };
        page.writes += 1;
        let first = at.page_offset() / 8;
        let end = (at.page_offset().saturating_add(len)).div_ceil(8).min(512);
        Written {
            affected: page.uses.iter().map(|u| u.affected(first, end)).collect(),
            drop: page.writes > MAX_WRITES,
        }
    }

    /// All pages to be protected.
    pub fn pages(&self) -> impl Iterator<Item = L1Gpa> + '_ {
        let protected = self.pages.keys().filter(|p| !self.exempt.contains(p));
        protected.map(|p| L1Gpa(p << PAGE_SHIFT))
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
