//! Root, context and second-level tables in memory (§3.4.2, §3.7, chapter 9).

use memory::L1Gpa;
use x86_spec::pci::Bdf;

use crate::iommu::{Config, Failure, Iova};
use crate::memory_access::{IoMemory, read_entry};
use crate::spec::fault::FaultReason;
use crate::spec::reg::rtaddr;
use crate::spec::table::{ADDRESS, ENTRY_SIZE, context as ce, root, second_level as sl};

/// What a mapping allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
}

impl Rights {
    /// Whether it allows nothing.
    pub fn is_none(self) -> bool {
        !self.read && !self.write
    }
}

/// How a device's requests are translated (TT).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TranslationType {
    SecondLevel,
    PassThrough,
}

/// The width of a domain's addresses (AW).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    Bits39,
    Bits48,
}

impl Width {
    /// In bits. MGAW is the larger of the two, so it limits no domain further.
    pub fn bits(self) -> u32 {
        match self {
            Self::Bits39 => 39,
            Self::Bits48 => 48,
        }
    }

    /// Levels of tables.
    fn levels(self) -> u32 {
        match self {
            Self::Bits39 => 3,
            Self::Bits48 => 4,
        }
    }
}

/// A valid context entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Context {
    pub domain: u16,
    pub translation: TranslationType,
    pub width: Width,
    /// The second-level tables' root.
    pub tables: u64,
    pub fault_processing_disabled: bool,
}

/// Reads and checks the entries of `source` in the tables that `root_pointer`, RTADDR_REG's value, names.
pub(crate) fn context(
    memory: &impl IoMemory,
    config: &Config,
    root_pointer: u64,
    source: Bdf,
) -> Result<Context, Failure> {
    if root_pointer & rtaddr::TTM != 0 {
        return Err(Failure::of(FaultReason::TableMode));
    }
    let at = L1Gpa(root_pointer & rtaddr::ADDRESS).offset(u64::from(source.bus()) * ENTRY_SIZE);
    let table = root_entry(memory, config, at).map_err(Failure::of)?;
    let at = L1Gpa(table).offset(u64::from(source.devfn()) * ENTRY_SIZE);
    let entry = read_entry(memory, at).ok_or(Failure::of(FaultReason::ContextAccess))?;
    let suppressed = entry[0] & ce::FPD != 0;
    context_entry(config, entry).map_err(|reason| Failure { reason, suppressed })
}

/// A root entry's context table (§9.1).
fn root_entry(memory: &impl IoMemory, config: &Config, at: L1Gpa) -> Result<u64, FaultReason> {
    let [low, high] = read_entry(memory, at).ok_or(FaultReason::RootAccess)?;
    if low & root::P == 0 {
        return Err(FaultReason::RootNotPresent);
    }
    if low & (root::RESERVED | config.reserved_address()) != 0 || high != 0 {
        return Err(FaultReason::RootReserved);
    }
    Ok(low & ADDRESS)
}

/// A context entry's fields (§9.3). Pass-through wants the largest width that is offered.
fn context_entry(config: &Config, [low, high]: [u64; 2]) -> Result<Context, FaultReason> {
    if low & ce::P == 0 {
        return Err(FaultReason::ContextNotPresent);
    }
    if low & (ce::RESERVED_LOW | config.reserved_address()) != 0 || high & ce::RESERVED_HIGH != 0 {
        return Err(FaultReason::ContextReserved);
    }
    let translation = match low >> ce::TT_SHIFT & 3 {
        ce::TT_SECOND_LEVEL => TranslationType::SecondLevel,
        ce::TT_PASS_THROUGH => TranslationType::PassThrough,
        _ => return Err(FaultReason::ContextInvalid),
    };
    let width = match (high & ce::AW, translation) {
        (ce::AW_39, TranslationType::SecondLevel) => Width::Bits39,
        (ce::AW_48, _) => Width::Bits48,
        _ => return Err(FaultReason::ContextInvalid),
    };
    Ok(Context {
        domain: (high >> ce::DID_SHIFT) as u16,
        translation,
        width,
        tables: low & ADDRESS,
        fault_processing_disabled: low & ce::FPD != 0,
    })
}

/// What a walk found, and for how many bytes around the address it holds: log2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Walked {
    /// The start of the page in L1's physical address space, if there is one, or the fault. What lacks rights is
    /// denied before either counts.
    pub page: Result<L1Gpa, FaultReason>,
    /// What the entries on the way allow together, the faulting one included; nothing if one is not present.
    pub rights: Rights,
    pub size_bits: u32,
}

/// Walks the second-level tables of `context` (§3.7). Accesses without rights are the caller's matter.
pub(crate) fn second_level(memory: &impl IoMemory, config: &Config, context: &Context, iova: Iova) -> Walked {
    let mut table = context.tables;
    let mut rights = Rights { read: true, write: true };
    let mut level = context.width.levels();
    loop {
        let shift = 12 + 9 * (level - 1);
        let index = iova.0 >> shift & 0x1ff;
        let Some(entry) = memory.read_u64(L1Gpa(table).offset(index * 8)) else {
            return Walked { page: Err(FaultReason::PagingAccess), rights, size_bits: shift };
        };
        rights.read &= entry & sl::R != 0;
        rights.write &= entry & sl::W != 0;
        let leaf = level == 1 || level < 4 && entry & sl::PS != 0;
        let gpa = L1Gpa(entry & ADDRESS & !((1 << shift) - 1));
        let here = |page| Walked { page, rights, size_bits: shift };
        // An entry that allows nothing is not present, and its other bits mean nothing (§9.8).
        if rights.is_none() {
            return here(Ok(gpa));
        }
        if entry & reserved(config, level, leaf) != 0 {
            return here(Err(FaultReason::PagingReserved));
        }
        if leaf {
            return here(Ok(gpa));
        }
        table = entry & ADDRESS;
        level -= 1;
    }
}

/// The reserved bits of a paging entry (§9.8): address bits from the host address width on, address
/// bits within a large page, PS at the fourth level, SNP in what is no leaf, and TM, as there are no device TLBs. Bits
/// 61:52 and 63 are software's.
fn reserved(config: &Config, level: u32, leaf: bool) -> u64 {
    let above = config.reserved_address() & ADDRESS;
    let within = match (leaf, level) {
        (true, 2) => 0x1f_f000,
        (true, 3) => 0x3fff_f000,
        (true, _) => 0,
        (false, 4) => sl::SNP | sl::PS,
        (false, _) => sl::SNP,
    };
    above | within | sl::TM
}
