//! The EPT walk (SDM Vol. 3C §29.3.2–29.3.6).

use memory::{L1Gpa, L2Gpa};
use x86_spec::ept;

use crate::access::Access;
use crate::entry::{Entry, Level, MemoryType, Rights};
use crate::misconfiguration::{Format, Misconfiguration, misconfigured};
use crate::tables::{PhysicalAddress, TableMemory};

/// How often a walk starts over because another processor changed an entry under it.
const RETRIES: usize = 8;

/// An entry that a walk used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step<A> {
    /// Where it is.
    pub at: A,
    /// The level of its table.
    pub level: Level,
    /// Its value, before this walk's own updates of accessed and dirty flags.
    pub entry: Entry,
}

/// A completed translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf<A> {
    /// Start of the page.
    pub page: A,
    /// Level of the entry that maps it, which gives its size.
    pub level: Level,
    /// What all entries of the path allow together.
    pub rights: Rights,
    /// Memory type.
    pub memory_type: MemoryType,
    /// "Ignore PAT".
    pub ignore_pat: bool,
    /// A write needs no further update of the dirty flag: it is set, or the EPTP does not
    /// enable such flags.
    pub dirty: bool,
    /// The entries of the path, from the root; `None` below the leaf.
    pub path: [Option<Step<A>>; 4],
}

impl<A: PhysicalAddress> Leaf<A> {
    /// The address that `gpa`, the address that was translated, has.
    pub fn address<I: PhysicalAddress>(&self, gpa: I) -> A {
        A::new(self.page.raw() | gpa.raw() & (self.level.size() - 1))
    }
}

/// Why a translation was not completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalkError<A> {
    /// An EPT violation (§29.3.3.2): an entry is not present or the access is not allowed.
    #[error("EPT violation: the entries allow {rights}")]
    Violation {
        /// What the entries of the path allow together; nothing if one is not present.
        rights: Rights,
    },
    /// An EPT misconfiguration (§29.3.3.1).
    #[error("EPT misconfiguration: {rule}")]
    Misconfiguration {
        /// The rule that the entry breaks.
        rule: Misconfiguration,
        /// The entry.
        step: Step<A>,
    },
    /// The page-modification log is full (§29.3.6). No flag was set and nothing was logged.
    #[error("page-modification log full")]
    LogFull,
    /// Another processor kept changing the entries: run the guest again, it will repeat the
    /// access.
    #[error("entries changed during the walk")]
    Contended,
}

/// Page-modification logging, asked when a dirty flag goes from 0 to 1 (§29.3.6).
pub trait DirtyLog {
    /// Whether there is room: the PML index is at most 511.
    fn has_room(&self) -> bool;
    /// Logs the 4 KiB page of `gpa`.
    fn log(&mut self, gpa: u64);
}

/// No logging.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoLog;

impl DirtyLog for NoLog {
    fn has_room(&self) -> bool {
        true
    }
    fn log(&mut self, _: u64) {}
}

/// The page-modification log of a VMCS12.
#[derive(Debug)]
pub struct Pml<'a, M> {
    /// Where the log is.
    pub memory: &'a M,
    /// PML address.
    pub address: L1Gpa,
    /// PML index: the next entry to fill; counts down and passes 0 to FFFFH.
    pub index: &'a mut u16,
}

impl<M: TableMemory<Address = L1Gpa>> DirtyLog for Pml<'_, M> {
    fn has_room(&self) -> bool {
        *self.index < 512
    }

    fn log(&mut self, gpa: u64) {
        let at = self.address.page_base().offset(u64::from(*self.index) * 8);
        self.memory.write_word(at, L2Gpa(gpa).page_base().0);
        *self.index = self.index.wrapping_sub(1);
    }
}

/// Translates `gpa` for `access` with the tables that `eptp` points to in `memory`, as a processor of
/// the given `format` does. Sets accessed and dirty flags if `eptp` enables them, but only
/// for a translation that succeeds.
///
/// # Errors
/// [`WalkError`]. A misconfigured or not-present entry on the path comes before missing
/// permissions (§29.3.3.3).
pub fn walk<I, M>(
    eptp: u64,
    gpa: I,
    access: Access,
    format: &Format,
    memory: &M,
    log: &mut dyn DirtyLog,
) -> Result<Leaf<M::Address>, WalkError<M::Address>>
where
    I: PhysicalAddress,
    M: TableMemory,
{
    let flags = eptp & ept::EPTP_AD != 0;
    let access = access.under(flags);
    let needed = access.needs(format.mode_based_execute);
    for _ in 0..RETRIES {
        let mut leaf = find_leaf(eptp, gpa.raw(), format, memory)?;
        if !leaf.rights.contains(needed) {
            return Err(WalkError::Violation { rights: leaf.rights });
        }
        if !flags {
            leaf.dirty = true;
            return Ok(leaf);
        }
        let newly_dirty = access.write && !leaf.dirty;
        if newly_dirty && !log.has_room() {
            return Err(WalkError::LogFull);
        }
        if !set_flags(&leaf, access.write, memory) {
            continue;
        }
        if newly_dirty {
            log.log(gpa.raw());
            leaf.dirty = true;
        }
        return Ok(leaf);
    }
    Err(WalkError::Contended)
}

/// The walk without permission checks and without updates of flags.
fn find_leaf<M: TableMemory>(
    eptp: u64,
    gpa: u64,
    format: &Format,
    memory: &M,
) -> Result<Leaf<M::Address>, WalkError<M::Address>> {
    // A 4-level walk translates 48 bits.
    if gpa >> 48 != 0 {
        return Err(WalkError::Violation { rights: Rights::NONE });
    }
    let mut table = eptp & ept::ADDR_MASK;
    let mut rights = Rights::ALL;
    let mut path = [None; 4];
    let mut level = Level::Pml4e;
    for slot in 0..4 {
        let at = M::Address::new(table + level.entry_offset(gpa));
        let entry = Entry(memory.read_entry(at));
        let step = Step { at, level, entry };
        if !entry.present(format.mode_based_execute) {
            return Err(WalkError::Violation { rights: Rights::NONE });
        }
        if let Some(rule) = misconfigured(entry, level, format) {
            return Err(WalkError::Misconfiguration { rule, step });
        }
        rights = rights & Rights::of_entry(entry.0, format.mode_based_execute);
        if let Some(p) = path.get_mut(slot) {
            *p = Some(step);
        }
        match level.below() {
            Some(below) if !entry.is_leaf(level) => {
                table = entry.address();
                level = below;
            }
            _ => {
                return Ok(Leaf {
                    page: M::Address::new(entry.page(level)),
                    level,
                    rights,
                    // Reserved types are misconfigurations, so this is never the default.
                    memory_type: entry.memory_type().unwrap_or(MemoryType::Uncacheable),
                    ignore_pat: entry.ignore_pat(),
                    dirty: entry.dirty(),
                    path,
                });
            }
        }
    }
    // Four levels always end in a leaf: every page-table entry is one.
    Err(WalkError::Contended)
}

/// Sets the accessed flag of each entry of the path, and the dirty flag of the leaf if
/// `write` (§29.3.5). False if an entry is no longer what the walk read.
fn set_flags<M: TableMemory>(leaf: &Leaf<M::Address>, write: bool, memory: &M) -> bool {
    leaf.path.iter().flatten().all(|step| {
        let is_leaf = step.level == leaf.level;
        let bits = ept::A | if is_leaf && write { ept::D } else { 0 };
        let entry = step.entry.0;
        entry & bits == bits || memory.compare_exchange(step.at, entry, entry | bits)
    })
}
