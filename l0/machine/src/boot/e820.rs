//! The memory map that a kernel is told, from L1's RAM and the firmware's tables in it.

use devices::pci::{ECAM_BASE, ECAM_SIZE};
use memory::{L1Gpa, L1Ram};

use super::placement::{HIGH_START, LOW_END};

/// Meaning of a range; the numbers are the ones E820, PVH and multiboot share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// Free RAM.
    Ram = 1,
    /// Not for use.
    Reserved = 2,
    /// ACPI tables, free once they have been read.
    Acpi = 3,
}

/// One range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// Meaning.
    pub kind: MemoryKind,
}

/// The map of `ram`, with `acpi` (address and length of each table blob) taken out of
/// free memory. In order of address, without overlaps.
pub fn memory_map(ram: &L1Ram, acpi: &[(L1Gpa, u64)]) -> Vec<MemoryRange> {
    let mut holes = vec![(LOW_END, HIGH_START, MemoryKind::Reserved)];
    for (at, len) in acpi {
        let start = at.page_base().0;
        let end = at.0.saturating_add(*len).checked_next_multiple_of(memory::PAGE_SIZE).unwrap_or(u64::MAX);
        // Tables in the ROM area are covered by its range already.
        if *len > 0 && (start < LOW_END || end > HIGH_START) {
            holes.push((start.max(if start >= LOW_END { HIGH_START } else { 0 }), end, MemoryKind::Acpi));
        }
    }
    holes.sort_by_key(|h| h.0);
    let mut map = Vec::new();
    let mut push = |start: u64, end: u64, kind| {
        if start < end {
            map.push(MemoryRange { start, len: end - start, kind });
        }
    };
    for region in ram.regions() {
        let (mut at, end) = (region.start.0, region.start.0.saturating_add(region.len));
        for (hole_start, hole_end, kind) in &holes {
            let (from, to) = ((*hole_start).max(at), (*hole_end).min(end));
            if from >= to {
                continue;
            }
            push(at, from, MemoryKind::Ram);
            push(from, to, *kind);
            at = to;
        }
        push(at, end, MemoryKind::Ram);
    }
    // PCI's configuration space, which systems believe to be there only if it is reserved.
    let ecam = MemoryRange { start: ECAM_BASE, len: ECAM_SIZE, kind: MemoryKind::Reserved };
    let at = map.partition_point(|r| r.start < ecam.start);
    map.insert(at, ecam);
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::ram;

    fn range(start: u64, end: u64, kind: MemoryKind) -> MemoryRange {
        MemoryRange { start, len: end - start, kind }
    }

    #[test]
    fn one_gib_with_tables_at_the_top() {
        let map = memory_map(&ram(1 << 30), &[(L1Gpa(0x3fff_0000), 0x1234), (L1Gpa(0xe_0000), 36)]);
        assert_eq!(
            map,
            [
                range(0, 0x9_fc00, MemoryKind::Ram),
                range(0x9_fc00, 0x10_0000, MemoryKind::Reserved),
                range(0x10_0000, 0x3fff_0000, MemoryKind::Ram),
                range(0x3fff_0000, 0x3fff_2000, MemoryKind::Acpi),
                range(0x3fff_2000, 0x4000_0000, MemoryKind::Ram),
                range(0xe000_0000, 0xf000_0000, MemoryKind::Reserved),
            ]
        );
    }

    #[test]
    fn six_gib_go_on_above_the_hole() {
        let map = memory_map(&ram(6 << 30), &[]);
        assert_eq!(map[2], range(0x10_0000, 0xc000_0000, MemoryKind::Ram));
        assert_eq!(map[3], range(0xe000_0000, 0xf000_0000, MemoryKind::Reserved));
        assert_eq!(map[4], range(1 << 32, (1 << 32) + (3 << 30), MemoryKind::Ram));
        assert_eq!(map.len(), 5);
    }
}
