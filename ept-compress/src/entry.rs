//! EPT entries as values (SDM Vol. 3C §29.3.2, tables 29-1 to 29-6).

use core::fmt;
use core::ops::BitAnd;

use x86_spec::ept;

/// The level of an EPT paging structure, named by what its entries are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Level {
    /// Page table: 4 KiB pages.
    Pte = 1,
    /// Page directory: 2 MiB pages or page tables.
    Pde = 2,
    /// Page-directory-pointer table: 1 GiB pages or page directories.
    Pdpte = 3,
    /// PML4 table.
    Pml4e = 4,
}

impl Level {
    /// log2 of the bytes that one entry of this level covers.
    pub const fn shift(self) -> u32 {
        3 + 9 * self as u32
    }
    /// Bytes that one entry of this level covers.
    pub const fn size(self) -> u64 {
        1 << self.shift()
    }
    /// The level of the tables that this level's entries reference.
    pub const fn below(self) -> Option<Level> {
        match self {
            Self::Pml4e => Some(Self::Pdpte),
            Self::Pdpte => Some(Self::Pde),
            Self::Pde => Some(Self::Pte),
            Self::Pte => None,
        }
    }
    /// Byte offset of the entry for guest-physical `gpa` in a table of this level.
    pub const fn entry_offset(self, gpa: u64) -> u64 {
        (gpa >> self.shift() & 511) * 8
    }
}

/// What a mapping allows: bits 0, 1, 2 and 10 of an entry, in their places.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Rights(u64);

impl Rights {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Data reads.
    pub const R: Self = Self(ept::R);
    /// Data writes.
    pub const W: Self = Self(ept::W);
    /// Fetches; with mode-based execute control, from supervisor-mode linear addresses.
    pub const X: Self = Self(ept::X);
    /// Fetches from user-mode linear addresses, with mode-based execute control.
    pub const XU: Self = Self(ept::XU);
    /// Everything.
    pub const ALL: Self = Self(ept::RWX | ept::XU);

    /// The rights in an entry. Without mode-based execute control bit 10 is ignored, and bit 2
    /// counts for user-mode addresses too.
    pub const fn of_entry(entry: u64, mode_based_execute: bool) -> Self {
        if mode_based_execute {
            Self(entry & (ept::RWX | ept::XU))
        } else {
            let xu = if entry & ept::X != 0 { ept::XU } else { 0 };
            Self(entry & ept::RWX | xu)
        }
    }
    /// The entry bits for these rights.
    pub const fn entry_bits(self, mode_based_execute: bool) -> u64 {
        self.0 & if mode_based_execute { ept::RWX | ept::XU } else { ept::RWX }
    }
    /// Both.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
    /// Whether all of `other` is allowed.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
    /// These without `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
    /// Whether nothing is allowed.
    pub const fn is_none(self) -> bool {
        self.0 == 0
    }
}

impl BitAnd for Rights {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Debug for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Rights {
    /// `rwxu`, with `-` for what is missing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (right, letter) in [(Self::R, 'r'), (Self::W, 'w'), (Self::X, 'x'), (Self::XU, 'u')] {
            write!(f, "{}", if self.contains(right) { letter } else { '-' })?;
        }
        Ok(())
    }
}

/// Memory type of a leaf, bits 5:3 (SDM Vol. 3C §29.3.7). The values that are missing are
/// reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum MemoryType {
    /// Uncacheable.
    Uncacheable = 0,
    /// Write combining.
    WriteCombining = 1,
    /// Write-through.
    WriteThrough = 4,
    /// Write-protected.
    WriteProtected = 5,
    /// Write-back.
    WriteBack = 6,
}

impl MemoryType {
    /// The type with this number; `None` for 2, 3 and 7, which are reserved.
    pub const fn from_bits(bits: u64) -> Option<Self> {
        match bits {
            0 => Some(Self::Uncacheable),
            1 => Some(Self::WriteCombining),
            4 => Some(Self::WriteThrough),
            5 => Some(Self::WriteProtected),
            6 => Some(Self::WriteBack),
            _ => None,
        }
    }

    /// The type of memory to which two parties give a type each. Write-back yields to
    /// anything, uncacheable to nothing; two that differ otherwise give uncacheable, as SDM
    /// Vol. 3A table 12-7 has it or permits it.
    pub fn combine(self, other: Self) -> Self {
        match (self, other) {
            (a, b) if a == b => a,
            (Self::WriteBack, t) | (t, Self::WriteBack) => t,
            _ => Self::Uncacheable,
        }
    }
}

/// One EPT entry. Which bits mean what depends on its level and on whether it maps a page.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Entry(pub u64);

impl Entry {
    /// An entry that references the table at physical address `table`: it allows everything, so
    /// that the leaf alone decides, and is marked accessed.
    pub const fn table(table: u64, mode_based_execute: bool) -> Self {
        Self(table & ept::ADDR_MASK | Rights::ALL.entry_bits(mode_based_execute) | ept::A)
    }

    /// Whether it is present (§29.3.2): any of bits 2:0, or bit 10 under mode-based
    /// execute control.
    pub const fn present(self, mode_based_execute: bool) -> bool {
        self.0 & (ept::RWX | if mode_based_execute { ept::XU } else { 0 }) != 0
    }
    /// Whether it maps a page, being at `level`: every page-table entry, and entries of a directory or
    /// directory-pointer table with bit 7.
    pub const fn is_leaf(self, level: Level) -> bool {
        match level {
            Level::Pte => true,
            Level::Pde | Level::Pdpte => self.0 & ept::LARGE != 0,
            Level::Pml4e => false,
        }
    }
    /// The physical address in bits 51:12.
    pub const fn address(self) -> u64 {
        self.0 & ept::ADDR_MASK
    }
    /// The physical address of the page that a leaf at `level` maps.
    pub const fn page(self, level: Level) -> u64 {
        self.0 & ept::ADDR_MASK & !(level.size() - 1)
    }
    /// Memory type of a leaf, or `None` if reserved.
    pub const fn memory_type(self) -> Option<MemoryType> {
        MemoryType::from_bits(self.0 >> ept::MEMTYPE_SHIFT & 7)
    }
    /// "Ignore PAT" of a leaf, bit 6.
    pub const fn ignore_pat(self) -> bool {
        self.0 & ept::IGNORE_PAT != 0
    }
    /// Accessed flag, bit 8; means something only where the EPTP enables it.
    pub const fn accessed(self) -> bool {
        self.0 & ept::A != 0
    }
    /// Dirty flag of a leaf, bit 9; means something only where the EPTP enables it.
    pub const fn dirty(self) -> bool {
        self.0 & ept::D != 0
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Entry({:#x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_cover_4k_2m_1g_512g() {
        let sizes = [Level::Pte, Level::Pde, Level::Pdpte, Level::Pml4e].map(Level::size);
        assert_eq!(sizes, [4 << 10, 2 << 20, 1 << 30, 512 << 30]);
        assert_eq!(Level::Pde.entry_offset(0x4060_0000), 3 * 8);
    }

    #[test]
    fn bit_10_counts_only_with_mode_based_control() {
        // SDM Vol. 3C §29.3.2: bit 10 is ignored when the control is 0.
        assert!(!Entry(ept::XU).present(false));
        assert!(Entry(ept::XU).present(true));
        assert!(Rights::of_entry(ept::X, false).contains(Rights::XU));
        assert!(!Rights::of_entry(ept::X, true).contains(Rights::XU));
        assert_eq!(Rights::ALL.entry_bits(false), 7);
    }

    #[test]
    fn the_stricter_memory_type_wins() {
        use MemoryType::*;
        assert_eq!(WriteBack.combine(WriteBack), WriteBack);
        assert_eq!(WriteBack.combine(WriteThrough), WriteThrough);
        assert_eq!(Uncacheable.combine(WriteBack), Uncacheable);
        assert_eq!(WriteCombining.combine(WriteThrough), Uncacheable);
        assert_eq!([2, 3, 7].map(MemoryType::from_bits), [None; 3]);
    }
}
