//! EPT entry and EPTP formats (SDM Vol. 3C §29.3.2, §25.6.11).

/// Read access.
pub const R: u64 = 1 << 0;
/// Write access.
pub const W: u64 = 1 << 1;
/// Execute access (supervisor-mode linear addresses under mode-based control).
pub const X: u64 = 1 << 2;
/// All three.
pub const RWX: u64 = R | W | X;
/// Memory type field of a leaf, bits 5:3.
pub const MEMTYPE_SHIFT: u32 = 3;
/// Memory type WB.
pub const MEMTYPE_WB: u64 = 6;
/// Memory type UC.
pub const MEMTYPE_UC: u64 = 0;
/// Ignore PAT.
pub const IGNORE_PAT: u64 = 1 << 6;
/// Leaf at PDPTE or PDE.
pub const LARGE: u64 = 1 << 7;
/// Accessed.
pub const A: u64 = 1 << 8;
/// Dirty.
pub const D: u64 = 1 << 9;
/// Execute access for user-mode linear addresses (mode-based control).
pub const XU: u64 = 1 << 10;
/// Physical-address bits of an entry (up to MAXPHYADDR 52).
pub const ADDR_MASK: u64 = 0x000f_ffff_ffff_f000;

/// EPTP: enable accessed and dirty flags, bit 6.
pub const EPTP_AD: u64 = 1 << 6;
/// EPTP: page-walk length minus 1 (4 levels), bits 5:3.
pub const EPTP_WALK4: u64 = 3 << 3;

/// A 4-level write-back EPTP for the table at `root`.
pub const fn eptp(root: u64, accessed_dirty: bool) -> u64 {
    root | MEMTYPE_WB | EPTP_WALK4 | if accessed_dirty { EPTP_AD } else { 0 }
}
