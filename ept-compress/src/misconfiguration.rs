//! What makes an EPT entry misconfigured (SDM Vol. 3C §29.3.3.1), one function per rule.

use x86_spec::caps::ept_vpid;
use x86_spec::ept;

use crate::entry::{Entry, Level};

/// What the processor that walks the tables knows, as it was told to L1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// Width of physical addresses in bits (CPUID 80000008H EAX 7:0).
    pub physical_bits: u8,
    /// Execute-only translations are supported (IA32_VMX_EPT_VPID_CAP bit 0).
    pub execute_only: bool,
    /// 2 MiB pages are supported (bit 16).
    pub page_2m: bool,
    /// 1 GiB pages are supported (bit 17).
    pub page_1g: bool,
    /// The VMCS has "mode-based execute control for EPT" at 1.
    pub mode_based_execute: bool,
}

impl Format {
    /// From IA32_VMX_EPT_VPID_CAP, without mode-based execute control.
    pub const fn from_capabilities(ept_vpid_cap: u64, physical_bits: u8) -> Self {
        Self {
            physical_bits,
            execute_only: ept_vpid_cap & ept_vpid::EXECUTE_ONLY != 0,
            page_2m: ept_vpid_cap & ept_vpid::PAGE_2M != 0,
            page_1g: ept_vpid_cap & ept_vpid::PAGE_1G != 0,
            mode_based_execute: false,
        }
    }
    /// The same with the control as given.
    pub const fn mode_based_execute(mut self, on: bool) -> Self {
        self.mode_based_execute = on;
        self
    }
    /// Whether an entry of `level` may map a page.
    pub const fn allows_leaf(self, level: Level) -> bool {
        match level {
            Level::Pte => true,
            Level::Pde => self.page_2m,
            Level::Pdpte => self.page_1g,
            Level::Pml4e => false,
        }
    }
}

/// The rule that a misconfigured entry breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Misconfiguration {
    /// Writes are allowed but reads are not.
    #[error("bit 1 (write) is set and bit 0 (read) is clear")]
    WriteWithoutRead,
    /// Only execution is allowed, which the processor does not support.
    #[error("execute-only, which is not supported")]
    ExecuteOnly,
    /// Bits 7:3 or 6:3 of an entry that references a table.
    #[error("reserved bits are set in an entry that references a table")]
    ReservedInTable,
    /// Address bits below the page size of a large page.
    #[error("address bits below the page size are set in a large page's entry")]
    ReservedInLargePage,
    /// Bit 7 where pages of that size are not supported.
    #[error("maps a page of a size that is not supported")]
    PageSize,
    /// Address bits beyond the physical-address width.
    #[error("address bits beyond the physical-address width are set")]
    AddressWidth,
    /// The memory type of a leaf is 2, 3 or 7.
    #[error("reserved memory type")]
    MemoryType,
}

type Rule = fn(Entry, Level, &Format) -> bool;

const RULES: &[(Misconfiguration, Rule)] = &[
    (Misconfiguration::WriteWithoutRead, write_without_read),
    (Misconfiguration::ExecuteOnly, execute_only),
    (Misconfiguration::ReservedInTable, reserved_in_table),
    (Misconfiguration::PageSize, page_size),
    (Misconfiguration::ReservedInLargePage, reserved_in_large_page),
    (Misconfiguration::AddressWidth, address_width),
    (Misconfiguration::MemoryType, memory_type),
];

/// The first rule that `entry`, which is present and stands at `level`, breaks.
pub fn misconfigured(entry: Entry, level: Level, format: &Format) -> Option<Misconfiguration> {
    RULES.iter().find(|(_, broken)| broken(entry, level, format)).map(|(name, _)| *name)
}

/// §29.3.3.1: bit 0 is clear and bit 1 is set.
fn write_without_read(entry: Entry, _: Level, _: &Format) -> bool {
    entry.0 & (ept::R | ept::W) == ept::W
}

/// §29.3.3.1: bit 0 is clear, execute-only translations are not supported, and bit 2, or
/// bit 10 under mode-based execute control, is set.
fn execute_only(entry: Entry, _: Level, format: &Format) -> bool {
    let execute = ept::X | if format.mode_based_execute { ept::XU } else { 0 };
    !format.execute_only && entry.0 & ept::R == 0 && entry.0 & execute != 0
}

/// Tables 29-1, 29-3, 29-5: bits 6:3 of an entry that references a table are reserved, bit 7 of a
/// PML4E too.
fn reserved_in_table(entry: Entry, level: Level, _: &Format) -> bool {
    !entry.is_leaf(level) && entry.0 & 0x78 != 0 || level == Level::Pml4e && entry.0 & ept::LARGE != 0
}

/// Tables 29-2, 29-4: bit 7 is reserved where pages of the size are not supported.
fn page_size(entry: Entry, level: Level, format: &Format) -> bool {
    entry.is_leaf(level) && !format.allows_leaf(level)
}

/// Tables 29-2, 29-4: bits 29:12 of a 1 GiB page's entry and 20:12 of a 2 MiB page's are
/// reserved.
fn reserved_in_large_page(entry: Entry, level: Level, _: &Format) -> bool {
    entry.is_leaf(level) && entry.address() & (level.size() - 1) != 0
}

/// §29.3.3.1: a bit in 51:12 beyond the physical-address width.
fn address_width(entry: Entry, _: Level, format: &Format) -> bool {
    let in_width = 1u64.checked_shl(format.physical_bits.into()).map_or(u64::MAX, |b| b - 1);
    entry.address() & !in_width != 0
}

/// §29.3.3.1: the memory type of a leaf is reserved.
fn memory_type(entry: Entry, level: Level, _: &Format) -> bool {
    entry.is_leaf(level) && entry.memory_type().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86_spec::ept::*;

    const ALL: Format = Format {
        physical_bits: 46,
        execute_only: true,
        page_2m: true,
        page_1g: true,
        mode_based_execute: false,
    };

    /// The expectations are those of SDM Vol. 3C §29.3.3.1 and tables 29-1 to 29-6.
    #[test]
    fn each_rule_has_an_entry_that_breaks_it_and_one_that_does_not() {
        use Level::*;
        use Misconfiguration as M;
        let wb = MEMTYPE_WB << MEMTYPE_SHIFT;
        let no_xo = Format { execute_only: false, ..ALL };
        let mbx = Format { mode_based_execute: true, ..no_xo };
        let small = Format { page_2m: false, page_1g: false, ..ALL };
        let cases: &[(u64, Level, Format, Option<M>)] = &[
            (W, Pml4e, ALL, Some(M::WriteWithoutRead)),
            (W | X, Pte, ALL, Some(M::WriteWithoutRead)),
            (R | W, Pml4e, ALL, None),
            (X | wb, Pte, no_xo, Some(M::ExecuteOnly)),
            (X | wb, Pte, ALL, None),
            (XU | wb, Pte, mbx, Some(M::ExecuteOnly)),
            (R | XU | wb, Pte, mbx, None),
            (R | 1 << 3, Pde, ALL, Some(M::ReservedInTable)),
            (R | 1 << 6, Pdpte, ALL, Some(M::ReservedInTable)),
            (R | LARGE, Pml4e, ALL, Some(M::ReservedInTable)),
            (R | A | D | XU | 1 << 11 | 0x7ff << 52 | 1 << 63, Pml4e, ALL, None),
            (R | LARGE, Pde, small, Some(M::PageSize)),
            (R | LARGE, Pdpte, small, Some(M::PageSize)),
            (R | LARGE | 1 << 20, Pde, ALL, Some(M::ReservedInLargePage)),
            (R | LARGE | 1 << 21, Pde, ALL, None),
            (R | LARGE | 1 << 29, Pdpte, ALL, Some(M::ReservedInLargePage)),
            (R | LARGE | 1 << 30, Pdpte, ALL, None),
            (R | 1 << 46, Pml4e, ALL, Some(M::AddressWidth)),
            (R | 1 << 45, Pml4e, ALL, None),
            (R | 1 << 51, Pte, ALL, Some(M::AddressWidth)),
            (R | 2 << 3, Pte, ALL, Some(M::MemoryType)),
            (R | 3 << 3 | LARGE, Pde, ALL, Some(M::MemoryType)),
            (R | 7 << 3, Pte, ALL, Some(M::MemoryType)),
            (R | 5 << 3 | IGNORE_PAT, Pte, ALL, None),
            (R | LARGE, Pte, ALL, None),
        ];
        for (entry, level, format, expected) in cases {
            assert_eq!(misconfigured(Entry(*entry), *level, format), *expected, "{entry:#x} {level:?}");
        }
    }
}
