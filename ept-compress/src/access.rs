//! The access that is being translated, and the exit qualification that describes it.

use x86_spec::exit::ept_violation as q;

use crate::entry::Rights;

/// One access to guest-physical memory, as an EPT violation's exit qualification describes it
/// (SDM Vol. 3C table 28-7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// A data read (or the read of a paging-structure entry).
    pub read: bool,
    /// A data write (or an update of a paging-structure entry).
    pub write: bool,
    /// An instruction fetch.
    pub fetch: bool,
    /// The linear address is a user-mode one. Counts for fetches under mode-based execute
    /// control.
    pub user_mode: bool,
    /// The access is to a paging-structure entry while walking the guest's page tables.
    pub paging_structure: bool,
    /// Bits 12:7 of the qualification, which describe the linear access and not EPT: validity of
    /// the linear address, the advanced information, NMI unblocking.
    pub linear_bits: u64,
}

/// Bits 12:7: they pass unchanged from the engine's exit to L1's.
const LINEAR_BITS: u64 =
    q::LINEAR_VALID | q::TRANSLATED | q::USER_LINEAR | q::GUEST_WRITABLE | q::GUEST_XD | q::NMI_UNBLOCKING;

/// A valid linear address, an access to its translation, user-mode.
const USER_MODE: u64 = q::LINEAR_VALID | q::TRANSLATED | q::USER_LINEAR;

impl Access {
    /// A plain data read, as L0 makes it for itself.
    pub const READ: Self = Self {
        read: true,
        write: false,
        fetch: false,
        user_mode: false,
        paging_structure: false,
        linear_bits: 0,
    };
    /// A plain data write.
    pub const WRITE: Self = Self { read: false, write: true, ..Self::READ };
    /// A supervisor-mode fetch.
    pub const FETCH: Self = Self { read: false, fetch: true, ..Self::READ };

    /// The access behind an EPT violation of the engine. An access with a valid linear
    /// address that is not to its translation is to a paging-structure entry. Bit 9 means
    /// something only for an access to the translation (table 28-7).
    pub const fn from_qualification(qualification: u64) -> Self {
        Self {
            read: qualification & q::READ != 0,
            write: qualification & q::WRITE != 0,
            fetch: qualification & q::FETCH != 0,
            user_mode: qualification & USER_MODE == USER_MODE,
            paging_structure: qualification & q::LINEAR_VALID != 0 && qualification & q::TRANSLATED == 0,
            linear_bits: qualification & LINEAR_BITS,
        }
    }

    /// The same access as hardware counts it when the EPTP enables accessed and dirty
    /// flags: then every access to a paging-structure entry is a write as well (§29.3.3.2,
    /// and note 1 of table 28-7: bits 0 and 1 are both set).
    pub const fn under(mut self, accessed_dirty: bool) -> Self {
        if accessed_dirty && self.paging_structure {
            self.read = true;
            self.write = true;
        }
        self
    }

    /// The rights that the access needs (§29.3.3.2).
    pub const fn needs(self, mode_based_execute: bool) -> Rights {
        let mut rights = Rights::NONE;
        if self.read {
            rights = rights.union(Rights::R);
        }
        if self.write {
            rights = rights.union(Rights::W);
        }
        if self.fetch {
            let user = mode_based_execute && self.user_mode;
            rights = rights.union(if user { Rights::XU } else { Rights::X });
        }
        rights
    }

    /// The exit qualification of a violation by this access where the EPT entries together
    /// allow `rights` (table 28-7). Bit 6 is undefined without mode-based execute
    /// control; it is 0 here.
    pub const fn qualification(self, rights: Rights, mode_based_execute: bool) -> u64 {
        let mut bits = self.linear_bits;
        let flags = [
            (self.read, q::READ),
            (self.write, q::WRITE),
            (self.fetch, q::FETCH),
            (rights.contains(Rights::R), q::READABLE),
            (rights.contains(Rights::W), q::WRITABLE),
            (rights.contains(Rights::X), q::EXECUTABLE),
            (mode_based_execute && rights.contains(Rights::XU), q::USER_EXECUTABLE),
        ];
        let mut i = 0;
        while i < flags.len() {
            if flags[i].0 {
                bits |= flags[i].1;
            }
            i += 1;
        }
        bits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qualifications_round_trip_with_new_rights() {
        // A user-mode write to a page that L1 made read-only, with advanced information.
        let from_engine = 0x782 | q::EXECUTABLE;
        let a = Access::from_qualification(from_engine);
        assert!(a.write && a.user_mode && !a.read && !a.paging_structure);
        let to_l1 = a.qualification(Rights::R, false);
        assert_eq!(to_l1, 0x782 | q::READABLE);
    }

    #[test]
    fn page_walks_are_writes_under_accessed_and_dirty_flags() {
        // Linear address valid, access not to the translation: a paging-structure entry.
        let a = Access::from_qualification(q::READ | q::LINEAR_VALID);
        assert!(a.paging_structure);
        assert_eq!(a.under(false).needs(false), Rights::R);
        assert_eq!(a.under(true).needs(false), Rights::R.union(Rights::W));
        assert_eq!(a.under(true).qualification(Rights::R, false), 0x8b);
    }

    #[test]
    fn user_fetches_need_xu_only_under_mode_based_control() {
        let a = Access { user_mode: true, ..Access::FETCH };
        assert_eq!(a.needs(false), Rights::X);
        assert_eq!(a.needs(true), Rights::XU);
    }
}
