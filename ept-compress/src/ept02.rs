//! EPT02: the composed tables, in hardware format in pages of L0's pool.
//!
//! An [`Ept02`] belongs to one logical processor of L1, as a TLB does: INVEPT acts on the
//! processor that executes it, and no other processor runs on these tables while they
//! change. It is filled on demand by EPT violations, and everything in it may be dropped at any
//! time. So the pool is bounded without failing: when pages run out, the least recently used
//! roots go, and at last the contents of the present one.

use std::sync::Arc;

use memory::{L1Gpa, L2Gpa, MachineAddr, MachineMemory, MemoryError, PAGE_SHIFT, PAGE_SIZE, PagePool};
use x86_spec::ept;

use crate::access::Access;
use crate::compose::{Composed, Fault, L1Map, compose};
use crate::entry::{Entry, Level, Rights};
use crate::misconfiguration::Format;
use crate::sync::{Affected, ProtectionChanges, Tracker};
use crate::tables::TableMemory;
use crate::walk::{DirtyLog, Step};

/// The fewest pages that work: a root and the three tables to one mapping.
pub const MIN_PAGES: u64 = 4;
/// Roots are searched linearly; more than this many are not kept.
const MAX_ROOTS: usize = 64;
/// Tables of EPT12 that are tracked per page of EPT02, in write-protect mode.
const TRACKED_PER_PAGE: u64 = 4;

/// Why an EPT02 could not be made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Ept02Error {
    /// The limit is too low.
    #[error("EPT02 needs at least {MIN_PAGES} pages, {0} were given")]
    TooSmall(u64),
    /// L0's pool does not have the pages that the smallest EPT02 needs.
    #[error(transparent)]
    Pool(#[from] MemoryError),
}

/// What identifies a set of composed tables: all that changes how EPT12 is walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RootKey {
    /// The EPT pointer of VMCS12, with its accessed-and-dirty flag.
    pub eptp12: u64,
    /// "Mode-based execute control for EPT" of VMCS12.
    pub mode_based_execute: bool,
}

/// Translations that the engine must drop before it runs a guest again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flush {
    /// None.
    #[default]
    None,
    /// Those of one EPT pointer (of EPT02).
    Eptp(u64),
    /// All: tables were freed and may get another meaning.
    All,
}

impl Flush {
    /// Both.
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::None, x) | (x, Self::None) => x,
            (a, b) if a == b => a,
            _ => Self::All,
        }
    }
}

/// The answer to [`Ept02::root`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// EPT pointer for VMCS02.
    pub eptp02: u64,
    /// What the engine must drop.
    pub flush: Flush,
}

/// A mapping that was put into EPT02.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    /// The mapping.
    pub mapping: Composed,
    /// What the engine must drop.
    pub flush: Flush,
}

/// Counters for reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Mappings written, by level: 4 KiB, 2 MiB, 1 GiB.
    pub fills: [u64; 3],
    /// Roots dropped to make room.
    pub evicted_roots: u64,
    /// Times the present root's contents were dropped to make room.
    pub emptied: u64,
    /// Roots emptied by INVEPT.
    pub invalidations: u64,
    /// Writes to tracked tables of EPT12.
    pub table_writes: u64,
    /// Tables of EPT12 that were written too often, or could not be protected.
    pub dropped_tables: u64,
}

impl Stats {
    /// How often tables were dropped to make room.
    pub fn reclaims(&self) -> u64 {
        self.evicted_roots + self.emptied
    }
}

#[derive(Debug)]
struct RootTable {
    key: RootKey,
    /// Identifies the root to the tracker; never reused.
    id: u64,
    table: MachineAddr,
    last_used: u64,
}

/// The composed tables of one logical processor.
#[derive(Debug)]
pub struct Ept02 {
    memory: Arc<MachineMemory>,
    pool: Arc<PagePool>,
    /// Most pages to take from the pool.
    limit: u64,
    /// Pages taken.
    held: u64,
    /// Pages taken and not in use.
    spare: Vec<MachineAddr>,
    roots: Vec<RootTable>,
    clock: u64,
    next_id: u64,
    /// What the engine supports.
    engine: Format,
    tracker: Option<Tracker>,
    /// With a tracker: a bit for each page of machine memory that a mapping may let L2 write.
    writable: Vec<u64>,
    stats: Stats,
}

impl Ept02 {
    /// Tables of at most `limit` pages of `pool`, for an engine that supports `engine`.
    /// With `write_protect`, EPT12's tables are tracked: see [`Self::protection_changes`].
    ///
    /// # Errors
    /// [`Ept02Error`]: fewer than [`MIN_PAGES`], which are taken at once.
    pub fn new(
        memory: Arc<MachineMemory>,
        pool: Arc<PagePool>,
        limit: u64,
        engine: Format,
        write_protect: bool,
    ) -> Result<Self, Ept02Error> {
        if limit < MIN_PAGES {
            return Err(Ept02Error::TooSmall(limit));
        }
        let tracked = limit.saturating_mul(TRACKED_PER_PAGE);
        let words = if write_protect { (memory.size() >> PAGE_SHIFT).div_ceil(64) } else { 0 };
        let mut this = Self {
            memory,
            pool,
            limit,
            held: 0,
            spare: Vec::new(),
            roots: Vec::new(),
            clock: 0,
            next_id: 0,
            engine,
            writable: vec![0; usize::try_from(words).unwrap_or(0)],
            tracker: write_protect.then(|| Tracker::new(usize::try_from(tracked).unwrap_or(usize::MAX))),
            stats: Stats::default(),
        };
        for _ in 0..MIN_PAGES {
            let page = this.pool.alloc()?;
            this.held += 1;
            this.spare.push(page);
        }
        Ok(this)
    }

    /// Pages of the pool that are held now: those of tables and spare ones.
    pub fn held_pages(&self) -> u64 {
        self.held
    }

    /// How many roots are kept.
    pub fn roots(&self) -> usize {
        self.roots.len()
    }

    /// Counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The EPT pointer for VMCS02 whose tables stand for `key`. To be asked before each entry; the
    /// answer stays the same until the root is evicted in favour of others.
    pub fn root(&mut self, key: RootKey) -> Root {
        let (index, flush) = self.find_or_make(key);
        Root { eptp02: self.eptp02(index), flush }
    }

    /// Handles an EPT violation (or misconfiguration) of the engine at `gpa`: composes the
    /// mapping and puts it into EPT02.
    ///
    /// `format12` is what L1 was told that its processor supports; `key` says whether
    /// mode-based execute control is in force.
    ///
    /// # Errors
    /// [`Fault`] when there is nothing to map, and who has to act. EPT02 is unchanged then.
    #[allow(clippy::too_many_arguments, reason = "both levels' tables and formats are the caller's")]
    pub fn fill<M, P>(
        &mut self,
        key: RootKey,
        format12: &Format,
        gpa: L2Gpa,
        access: Access,
        tables12: &M,
        l1: &P,
        log: &mut dyn DirtyLog,
    ) -> Result<Filled, Fault>
    where
        M: TableMemory<Address = L1Gpa>,
        P: L1Map + ?Sized,
    {
        let format = format12.mode_based_execute(key.mode_based_execute);
        let mapping = compose(key.eptp12, &format, gpa, access, tables12, l1, log)?;
        let flush = self.insert(key, gpa, &mapping);
        Ok(Filled { mapping, flush })
    }

    /// Puts a composed mapping of `gpa` into EPT02.
    pub fn insert(&mut self, key: RootKey, gpa: L2Gpa, mapping: &Composed) -> Flush {
        let (index, mut flush) = self.find_or_make(key);
        flush = flush.and(self.reserve(index, 3));
        // Eviction may have moved the root within the list.
        let Some(root) = self.roots.iter().find(|r| r.key == key) else { return flush };
        let (id, table, eptp02) = (root.id, root.table, eptp(root));
        if !self.track(id, gpa, &mapping.leaf12.path) {
            flush = flush.and(self.drop_all());
            // Empty now, so there is room for one path.
            let _ = self.track(id, gpa, &mapping.leaf12.path);
        }
        let level = self.largest_supported(mapping.level);
        let offset = gpa.0 & (mapping.level.size() - 1) & !(level.size() - 1);
        let page = mapping.page.0 | offset;
        let leaf = self.leaf_entry(page, level, mapping, key.mode_based_execute);
        if mapping.rights.contains(Rights::W) {
            self.note_writable(page, level);
        }
        if self.write_leaf(table, gpa.0, level, leaf, key.mode_based_execute) {
            flush = flush.and(Flush::Eptp(eptp02));
        }
        if let Some(n) = self.stats.fills.get_mut(level as usize - 1) {
            *n += 1;
        }
        flush
    }

    /// INVEPT, single-context (SDM Vol. 3C §29.4.3.1): drops what was composed from the tables
    /// that `eptp12` points to. With write-protection the tables are known to be
    /// unchanged, and nothing is dropped, unless there are some that can't be protected.
    pub fn invept_single(&mut self, eptp12: u64) -> Flush {
        if let Some(t) = &self.tracker {
            return if t.has_exempt() { self.drop_all() } else { Flush::None };
        }
        self.empty_where(|r| (r.key.eptp12 ^ eptp12) & ept::ADDR_MASK == 0)
    }

    /// INVEPT, all-context.
    pub fn invept_all(&mut self) -> Flush {
        if let Some(t) = &self.tracker
            && !t.has_exempt()
        {
            return Flush::None;
        }
        self.drop_all()
    }

    /// Drops everything, in either mode, but keeps the roots' EPT pointers.
    pub fn drop_all(&mut self) -> Flush {
        let flush = self.empty_where(|_| true);
        if let Some(t) = &mut self.tracker {
            t.forget_exempt();
        }
        self.writable.fill(0);
        flush
    }

    /// EPT01 changed for `pages` machine pages from `first`: drops all mappings that reach them.
    pub fn invalidate_machine(&mut self, first: u64, pages: u64) -> Flush {
        let range = first << PAGE_SHIFT..first.saturating_add(pages) << PAGE_SHIFT;
        let mut flush = Flush::None;
        for i in 0..self.roots.len() {
            let Some(root) = self.roots.get(i) else { break };
            let (table, eptp02) = (root.table, eptp(root));
            if self.clear_machine(table, Level::Pml4e, &range) {
                flush = flush.and(Flush::Eptp(eptp02));
            }
        }
        flush
    }

    /// What the hypervisor must write-protect in EPT01, and what it may make writable
    /// again, before it runs L1 or L2. Empty without write-protect mode.
    ///
    /// In that mode a write to a protected page exits (an EPT violation of L1's with EPT01); the
    /// hypervisor emulates it and calls [`Self::l1_wrote`]. A page that becomes protected must not stay
    /// writable for L2 either: [`Self::protect_from_l2`]. L1's other processors must be
    /// stopped between a fill and the protection of what it read.
    pub fn protection_changes(&mut self) -> ProtectionChanges {
        self.tracker.as_mut().map(Tracker::take_changes).unwrap_or_default()
    }

    /// All pages that are to be write-protected, in no order.
    pub fn protected_pages(&self) -> impl Iterator<Item = L1Gpa> + '_ {
        self.tracker.iter().flat_map(Tracker::pages)
    }

    /// Whether the page of `at` is among them.
    pub fn is_protected(&self, at: L1Gpa) -> bool {
        self.tracker.as_ref().is_some_and(|t| t.contains(at))
    }

    /// Drops the mappings by which L2 can write `page` of machine memory, which EPT01 protects now:
    /// made anew, they lack that right.
    pub fn protect_from_l2(&mut self, page: u64) -> Flush {
        let Some(word) = self.writable.get_mut((page / 64) as usize) else { return Flush::None };
        if *word >> (page % 64) & 1 == 0 {
            return Flush::None;
        }
        *word &= !(1 << (page % 64));
        self.invalidate_machine(page, 1)
    }

    /// L1 (or a device) wrote `len` bytes at `at`, within one page: drops the mappings
    /// that came from those entries. A table that is written again and again is dropped as a whole
    /// and released, until it is used again.
    pub fn l1_wrote(&mut self, at: L1Gpa, len: u64) -> Flush {
        let Some(written) = self.tracker.as_mut().map(|t| t.wrote(at, len)) else { return Flush::None };
        if !written.affected.is_empty() {
            self.stats.table_writes += 1;
        }
        if written.drop { self.drop_table(at) } else { self.drop_mappings(&written.affected) }
    }

    /// Drops all that came from the table at `at`, and releases its page.
    pub fn drop_table(&mut self, at: L1Gpa) -> Flush {
        let Some(affected) = self.tracker.as_mut().map(|t| t.drop_table(at)) else { return Flush::None };
        if !affected.is_empty() {
            self.stats.dropped_tables += 1;
        }
        self.drop_mappings(&affected)
    }

    /// As [`Self::drop_table`], and the page is not protected again, so that who must write it (L2 itself)
    /// gets on. From here to the next INVEPT, what L1 writes there is seen only by that INVEPT.
    pub fn exempt_table(&mut self, at: L1Gpa) -> Flush {
        let flush = self.drop_table(at);
        if self.tracker.as_mut().is_none_or(|t| t.exempt(at)) {
            return flush;
        }
        let all = self.drop_all();
        if let Some(t) = &mut self.tracker {
            // There is room now.
            let _ = t.exempt(at);
        }
        flush.and(all)
    }

    fn note_writable(&mut self, page: u64, level: Level) {
        let first = page >> PAGE_SHIFT;
        let (mask, words) = match level {
            Level::Pte => (1 << (first % 64), 1),
            // Aligned, and 64 pages at a time.
            _ => (u64::MAX, level.size() >> PAGE_SHIFT >> 6),
        };
        let first = (first / 64) as usize;
        let end = first.saturating_add(words as usize).min(self.writable.len());
        self.writable.get_mut(first..end).unwrap_or_default().iter_mut().for_each(|w| *w |= mask);
    }

    fn drop_mappings(&mut self, affected: &[Affected]) -> Flush {
        let mut flush = Flush::None;
        for a in affected {
            let Some(root) = self.roots.iter().find(|r| r.id == a.root) else { continue };
            let (table, eptp02) = (root.table, eptp(root));
            let range = a.base.0..a.base.0.saturating_add(a.len);
            if self.clear_range(table, Level::Pml4e, 0, &range) {
                flush = flush.and(Flush::Eptp(eptp02));
            }
        }
        flush
    }

    // ---- roots -------------------------------------------------------------------------

    fn eptp02(&self, index: usize) -> u64 {
        self.roots.get(index).map_or(0, eptp)
    }

    /// The index of `key`'s root, made if need be.
    fn find_or_make(&mut self, key: RootKey) -> (usize, Flush) {
        self.clock += 1;
        if let Some(i) = self.roots.iter().position(|r| r.key == key) {
            if let Some(r) = self.roots.get_mut(i) {
                r.last_used = self.clock;
            }
            return (i, Flush::None);
        }
        let mut flush = Flush::None;
        while self.roots.len() >= MAX_ROOTS || !self.has_pages(1) {
            flush = flush.and(self.evict_lru(None));
        }
        let table = self.take_page();
        self.next_id += 1;
        self.roots.push(RootTable { key, id: self.next_id, table, last_used: self.clock });
        (self.roots.len() - 1, flush)
    }

    /// Drops the root that was used longest ago, but not the one with id `keep`. Nothing
    /// is dropped if there is no other.
    fn evict_lru(&mut self, keep: Option<u64>) -> Flush {
        let oldest = (self.roots.iter().enumerate())
            .filter(|(_, r)| Some(r.id) != keep)
            .min_by_key(|(_, r)| r.last_used)
            .map(|(i, _)| i);
        let Some(i) = oldest else { return Flush::None };
        let root = self.roots.swap_remove(i);
        self.free_below(root.table, Level::Pml4e);
        self.spare.push(root.table);
        if let Some(t) = &mut self.tracker {
            t.drop_root(root.id);
        }
        self.stats.evicted_roots += 1;
        Flush::All
    }

    fn empty_where(&mut self, which: impl Fn(&RootTable) -> bool) -> Flush {
        let mut flush = Flush::None;
        for i in 0..self.roots.len() {
            let Some(root) = self.roots.get(i).filter(|r| which(r)) else { continue };
            flush = flush.and(Flush::Eptp(eptp(root)));
            self.empty(i);
            self.stats.invalidations += 1;
        }
        flush
    }

    /// Drops the contents of a root; its page stays, so its EPT pointer does.
    fn empty(&mut self, index: usize) {
        let Some(root) = self.roots.get(index) else { return };
        let (table, id) = (root.table, root.id);
        self.free_below(table, Level::Pml4e);
        self.zero(table);
        if let Some(t) = &mut self.tracker {
            t.drop_root(id);
        }
    }

    // ---- pages -------------------------------------------------------------------------

    /// Whether `n` pages can be taken. Takes them from the pool if need be.
    fn has_pages(&mut self, n: usize) -> bool {
        while self.spare.len() < n {
            if self.held >= self.limit {
                return false;
            }
            let Ok(page) = self.pool.alloc() else { return false };
            self.held += 1;
            self.spare.push(page);
        }
        true
    }

    /// Makes sure that `n` (at most `MIN_PAGES` - 1) pages can be taken, at the cost of
    /// other roots and, at last, of the contents of the root at `index`.
    fn reserve(&mut self, index: usize, n: usize) -> Flush {
        let Some(keep) = self.roots.get(index).map(|r| r.id) else { return Flush::None };
        let mut flush = Flush::None;
        while !self.has_pages(n) {
            if self.roots.len() > 1 {
                flush = flush.and(self.evict_lru(Some(keep)));
            } else {
                flush = flush.and(Flush::Eptp(self.eptp02(0)));
                self.empty(0);
                self.stats.emptied += 1;
                break;
            }
        }
        flush
    }

    /// Takes a zeroed page; one must be there.
    fn take_page(&mut self) -> MachineAddr {
        debug_assert!(!self.spare.is_empty(), "pages are reserved before they are taken");
        let page = self.spare.pop().unwrap_or_default();
        self.zero(page);
        page
    }

    fn zero(&self, page: MachineAddr) {
        // Pages of the pool are inside memory: that was checked when the pool was made.
        let _ = self.memory.fill(page, 0, PAGE_SIZE as usize);
    }

    /// Frees all tables below `table`, whose entries are left as they are.
    fn free_below(&mut self, table: MachineAddr, level: Level) {
        let Some(below) = level.below() else { return };
        for i in 0..512 {
            let entry = Entry(self.memory.read_entry(table.offset(i * 8)));
            if entry.0 != 0 && !entry.is_leaf(level) {
                let child = MachineAddr(entry.address());
                self.free_below(child, below);
                self.spare.push(child);
            }
        }
    }

    // ---- entries -----------------------------------------------------------------------

    /// The largest page size, up to `level`, that the engine supports.
    fn largest_supported(&self, level: Level) -> Level {
        let mut level = level;
        while !self.engine.allows_leaf(level) {
            let Some(below) = level.below() else { break };
            level = below;
        }
        level
    }

    fn leaf_entry(&self, page: u64, level: Level, mapping: &Composed, mode_based: bool) -> Entry {
        let mut rights = mapping.rights;
        if !rights.contains(Rights::R) {
            // What a processor would call misconfigured is not written.
            rights = rights.without(Rights::W);
            if !self.engine.execute_only {
                rights = Rights::NONE;
            }
        }
        let mut bits = page & ept::ADDR_MASK
            | rights.entry_bits(mode_based)
            | (mapping.memory_type as u64) << ept::MEMTYPE_SHIFT
            // Flags of EPT02 mean nothing; set, they cost the engine no update.
            | ept::A
            | ept::D;
        if mapping.ignore_pat {
            bits |= ept::IGNORE_PAT;
        }
        if level != Level::Pte {
            bits |= ept::LARGE;
        }
        Entry(bits)
    }

    /// Writes `leaf` for `gpa` at `level`, with tables on the way. Whether something else
    /// was mapped there, or more was allowed, so that the engine may hold on to it.
    fn write_leaf(
        &mut self,
        root: MachineAddr,
        gpa: u64,
        level: Level,
        leaf: Entry,
        mode_based: bool,
    ) -> bool {
        let mut table = root;
        let mut at = Level::Pml4e;
        let mut replaced = false;
        while at > level {
            let slot = table.offset(at.entry_offset(gpa));
            let entry = Entry(self.memory.read_entry(slot));
            table = if entry.0 != 0 && !entry.is_leaf(at) {
                MachineAddr(entry.address())
            } else {
                // A large page that was here goes as a whole.
                replaced |= entry.0 != 0;
                let new = self.take_page();
                self.memory.write_word(slot, Entry::table(new.0, mode_based).0);
                new
            };
            let Some(below) = at.below() else { break };
            at = below;
        }
        let slot = table.offset(level.entry_offset(gpa));
        let old = Entry(self.memory.read_entry(slot));
        if old.0 != 0 && !old.is_leaf(level) {
            replaced = true;
            let child = MachineAddr(old.address());
            if let Some(below) = level.below() {
                self.free_below(child, below);
            }
            self.spare.push(child);
        } else if old.0 != 0 {
            replaced |= takes_away(old, leaf);
        }
        self.memory.write_word(slot, leaf.0);
        replaced
    }

    /// Clears the mappings of L2 addresses in `range` below `table`, whose first entry is for
    /// `base`. Whether there were any.
    fn clear_range(
        &mut self,
        table: MachineAddr,
        level: Level,
        base: u64,
        range: &std::ops::Range<u64>,
    ) -> bool {
        let first = range.start.saturating_sub(base) >> level.shift();
        let last =
            (range.end.saturating_sub(base).saturating_add(level.size() - 1) >> level.shift()).min(512);
        let mut any = false;
        for i in first..last {
            let slot = table.offset(i * 8);
            let entry = Entry(self.memory.read_entry(slot));
            let start = base + (i << level.shift());
            let whole = range.start <= start && start.saturating_add(level.size()) <= range.end;
            match level.below() {
                _ if entry.0 == 0 => {}
                Some(below) if !entry.is_leaf(level) => {
                    let child = MachineAddr(entry.address());
                    if whole {
                        self.free_below(child, below);
                        self.spare.push(child);
                        self.memory.write_word(slot, 0);
                        any = true;
                    } else {
                        any |= self.clear_range(child, below, start, range);
                    }
                }
                _ => {
                    self.memory.write_word(slot, 0);
                    any = true;
                }
            }
        }
        any
    }

    /// Clears the leaves below `table` that map into the machine addresses `range`.
    /// Whether there were any.
    fn clear_machine(&self, table: MachineAddr, level: Level, range: &std::ops::Range<u64>) -> bool {
        let mut any = false;
        for i in 0..512 {
            let slot = table.offset(i * 8);
            let entry = Entry(self.memory.read_entry(slot));
            match level.below() {
                _ if entry.0 == 0 => {}
                Some(below) if !entry.is_leaf(level) => {
                    any |= self.clear_machine(MachineAddr(entry.address()), below, range);
                }
                _ => {
                    let page = entry.page(level);
                    if page < range.end && range.start < page.saturating_add(level.size()) {
                        self.memory.write_word(slot, 0);
                        any = true;
                    }
                }
            }
        }
        any
    }

    /// Tracks the tables of EPT12 on `path`. False if that is too much.
    fn track(&mut self, root: u64, gpa: L2Gpa, path: &[Option<Step<L1Gpa>>; 4]) -> bool {
        let Some(tracker) = &mut self.tracker else { return true };
        path.iter().flatten().all(|step| tracker.add(root, step.at.page_base(), step.level, gpa))
    }
}

impl Drop for Ept02 {
    /// Gives all pages back to the pool.
    fn drop(&mut self) {
        for root in std::mem::take(&mut self.roots) {
            self.free_below(root.table, Level::Pml4e);
            self.spare.push(root.table);
        }
        for page in self.spare.drain(..) {
            self.pool.free(page);
        }
    }
}

/// EPT02's pointer. Accessed and dirty flags are enabled where L1 enabled them: then the
/// engine counts accesses to L2's paging structures as writes, which the composition needs to set
/// EPT12's dirty flags (§29.3.5).
fn eptp(root: &RootTable) -> u64 {
    ept::eptp(root.table.0, root.key.eptp12 & ept::EPTP_AD != 0)
}

/// Whether `new` maps another page than `old`, or allows less.
fn takes_away(old: Entry, new: Entry) -> bool {
    let rights = ept::RWX | ept::XU;
    (old.0 ^ new.0) & !rights != 0 || old.0 & rights & !new.0 != 0
}
