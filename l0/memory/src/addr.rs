//! Address newtypes. An address of one level can't be used at another by accident.

use core::fmt;

/// log2 of the page size that everything here counts in.
pub const PAGE_SHIFT: u32 = 12;
/// Page size in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

macro_rules! address_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The page number that holds this address.
            pub const fn page(self) -> u64 {
                self.0 >> PAGE_SHIFT
            }
            /// The offset inside its page, in bytes.
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
            /// The address of the start of its page.
            pub const fn page_base(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }
            /// The address `bytes` further on, wrapping at 2^64.
            pub const fn offset(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }
            /// The address `bytes` further on, or `None` past 2^64.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(v) => Some(Self(v)),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address_type!(
    /// An address of machine (L0-physical) memory: an offset into the one mapping.
    MachineAddr
);
address_type!(
    /// A guest-physical address of L1.
    L1Gpa
);
address_type!(
    /// A guest-physical address of L2.
    L2Gpa
);
address_type!(
    /// A guest-physical address of whatever context an engine runs. Only L0 knows
    /// whether that is L1's or L2's, and converts.
    Gpa
);

address_type!(
    /// An address that a device puts on the bus: L1's physical address, or what an IOMMU translates to
    /// one.
    BusAddress
);

impl From<Gpa> for L1Gpa {
    fn from(g: Gpa) -> Self {
        Self(g.0)
    }
}
impl From<Gpa> for L2Gpa {
    fn from(g: Gpa) -> Self {
        Self(g.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_arithmetic() {
        let a = L1Gpa(0x1234_5678);
        assert_eq!(a.page(), 0x12345);
        assert_eq!(a.page_offset(), 0x678);
        assert_eq!(a.page_base(), L1Gpa(0x1234_5000));
        assert_eq!(L1Gpa(u64::MAX).checked_add(1), None);
    }
}
