//! EPT12, then EPT01: what EPT02 maps an L2 address to, or whose fault there is.

use memory::{L1Gpa, L2Gpa, MachineAddr, MachineMemory};

use crate::access::Access;
use crate::entry::{Level, MemoryType, Rights};
use crate::misconfiguration::{Format, Misconfiguration};
use crate::tables::TableMemory;
use crate::walk::{DirtyLog, Leaf, NoLog, Step, WalkError, walk};

/// L0's side of the composition: what L1-physical memory is.
pub trait L1Map {
    /// The page that holds `gpa`, whatever it allows.
    ///
    /// # Errors
    /// [`L0Fault`] where L1 has no memory.
    fn lookup(&self, gpa: L1Gpa) -> Result<Leaf<MachineAddr>, L0Fault>;
}

/// EPT01 as [`L1Map`].
#[derive(Clone, Copy, Debug)]
pub struct Ept01View<'a> {
    /// The memory that holds it.
    pub memory: &'a MachineMemory,
    /// Its EPT pointer.
    pub eptp: u64,
    /// What the engine supports.
    pub format: Format,
}

impl L1Map for Ept01View<'_> {
    fn lookup(&self, gpa: L1Gpa) -> Result<Leaf<MachineAddr>, L0Fault> {
        // An access that needs nothing: permissions are the composition's business.
        walk(self.eptp, gpa, Access::default(), &self.format, self.memory, &mut NoLog).map_err(|e| match e {
            WalkError::Violation { .. } => L0Fault::NoMemory,
            WalkError::Misconfiguration { rule, .. } => L0Fault::Misconfiguration(rule),
            WalkError::LogFull | WalkError::Contended => L0Fault::Contended,
        })
    }
}

/// Why L0's side has no mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum L0Fault {
    /// L1 has no memory there: a device of L0's, or nothing.
    #[error("no memory of L1")]
    NoMemory,
    /// L0 does not allow the access (a page that it write-protects).
    #[error("EPT01 allows {0} only")]
    Denied(Rights),
    /// EPT01 is broken, which is L0's own error.
    #[error("EPT01 is misconfigured: {0}")]
    Misconfiguration(Misconfiguration),
    /// EPT01 changed during the walk.
    #[error("EPT01 changed during the walk")]
    Contended,
}

/// Why an access of L2 has no translation, and who must deal with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// L1 gets an EPT violation, with this exit qualification and L2's own addresses.
    #[error("EPT violation for L1, qualification {qualification:#x}")]
    L1Violation {
        /// Exit qualification.
        qualification: u64,
    },
    /// L1 gets an EPT misconfiguration.
    #[error("EPT misconfiguration for L1: {rule}: entry {:#x} at L1 address {}", step.entry.0, step.at)]
    L1Misconfiguration {
        /// The rule that EPT12's entry breaks.
        rule: Misconfiguration,
        /// The entry.
        step: Step<L1Gpa>,
    },
    /// L1 gets a page-modification-log-full exit.
    #[error("page-modification log full")]
    L1LogFull,
    /// L1 allows the access, and L0 must emulate it at this L1-physical address, as it would
    /// if L1 made it: a device, memory that is not there, or a page that L0 protects.
    #[error("L0 must handle the access at L1 address {gpa}: {fault}")]
    L0 {
        /// The L1-physical address of the access.
        gpa: L1Gpa,
        /// Why.
        fault: L0Fault,
    },
    /// Tables changed during the walk: enter L2 again.
    #[error("tables changed during the walk")]
    Retry,
}

/// A composed mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Composed {
    /// Start of the page in machine memory.
    pub page: MachineAddr,
    /// Its size: the smaller of both.
    pub level: Level,
    /// What EPT12 and EPT01 both allow. Writes are left out while EPT12's dirty flag must
    /// still be set by one.
    pub rights: Rights,
    /// Memory type for EPT02.
    pub memory_type: MemoryType,
    /// "Ignore PAT" for EPT02.
    pub ignore_pat: bool,
    /// EPT12's part.
    pub leaf12: Leaf<L1Gpa>,
}

/// Translates `gpa` for `access` by EPT12, setting its accessed and dirty flags as hardware
/// would, then by EPT01.
///
/// `eptp12` and `format` are those that L1 set up; `format` has the mode-based execute
/// control of VMCS12. `log` is VMCS12's page-modification log.
///
/// # Errors
/// [`Fault`] says whether L1 or L0 has to act.
pub fn compose<M, P>(
    eptp12: u64,
    format: &Format,
    gpa: L2Gpa,
    access: Access,
    tables12: &M,
    l1: &P,
    log: &mut dyn DirtyLog,
) -> Result<Composed, Fault>
where
    M: TableMemory<Address = L1Gpa>,
    P: L1Map + ?Sized,
{
    let access = access.under(eptp12 & x86_spec::ept::EPTP_AD != 0);
    let mode_based = format.mode_based_execute;
    let leaf12 = walk(eptp12, gpa, access, format, tables12, log).map_err(|e| match e {
        WalkError::Violation { rights } => {
            Fault::L1Violation { qualification: access.qualification(rights, mode_based) }
        }
        WalkError::Misconfiguration { rule, step } => Fault::L1Misconfiguration { rule, step },
        WalkError::LogFull => Fault::L1LogFull,
        WalkError::Contended => Fault::Retry,
    })?;
    let l1_gpa = leaf12.address(gpa);
    let leaf01 = l1.lookup(l1_gpa).map_err(|fault| match fault {
        L0Fault::Contended => Fault::Retry,
        fault => Fault::L0 { gpa: l1_gpa, fault },
    })?;
    if !leaf01.rights.contains(access.needs(mode_based)) {
        return Err(Fault::L0 { gpa: l1_gpa, fault: L0Fault::Denied(leaf01.rights) });
    }
    Ok(intersect(gpa, leaf12, leaf01))
}

/// The mapping that both leaves allow, at the smaller of both page sizes.
fn intersect(gpa: L2Gpa, leaf12: Leaf<L1Gpa>, leaf01: Leaf<MachineAddr>) -> Composed {
    let level = leaf12.level.min(leaf01.level);
    let machine = leaf01.address(leaf12.address(gpa));
    let mut rights = leaf12.rights & leaf01.rights;
    if !leaf12.dirty {
        rights = rights.without(Rights::W);
    }
    let (memory_type, ignore_pat) = memory_type(&leaf12, &leaf01);
    Composed {
        page: MachineAddr(machine.0 & !(level.size() - 1)),
        level,
        rights,
        memory_type,
        ignore_pat,
        leaf12,
    }
}

/// The memory type for EPT02 (§29.3.7). Where EPT01 ignores the PAT it decides alone, since all that L1
/// says of types is then ignored; else both types combine, and EPT12 says whether L2's PAT
/// counts.
fn memory_type(leaf12: &Leaf<L1Gpa>, leaf01: &Leaf<MachineAddr>) -> (MemoryType, bool) {
    if leaf01.ignore_pat {
        (leaf01.memory_type, true)
    } else {
        (leaf12.memory_type.combine(leaf01.memory_type), leaf12.ignore_pat)
    }
}
