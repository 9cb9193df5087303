//! How remapping hardware reaches L1's memory.

use std::sync::atomic::Ordering;

use memory::{L1Gpa, L1Ram, RamRegion};

/// L1's physical memory: tables, queues and descriptors are in it, and translations lead to it. Accesses
/// are aligned and made in one piece, as those of hardware are.
pub trait IoMemory {
    /// Reads 64 bits; `None` where there is no memory.
    fn read_u64(&self, at: L1Gpa) -> Option<u64>;

    /// Writes 32 bits. Nothing happens where there is no memory, as on a bus.
    fn write_u32(&self, at: L1Gpa, value: u32);

    /// Sets `bits` of 64; the value from before, or `None` where there is no memory.
    fn fetch_or(&self, at: L1Gpa, bits: u64) -> Option<u64>;

    /// Replaces 64 bits by `new` if they still are `old`: whether they were, `None` where there is no memory.
    fn compare_exchange(&self, at: L1Gpa, old: u64, new: u64) -> Option<bool>;

    /// The contiguous machine memory that `at` is in; `None` where there is no memory.
    fn region(&self, at: L1Gpa) -> Option<RamRegion>;
}

impl IoMemory for L1Ram {
    fn read_u64(&self, at: L1Gpa) -> Option<u64> {
        let (machine, _) = self.translate(at).filter(|(_, room)| *room >= 8)?;
        self.memory().atomic_u64(machine).ok().map(|word| word.load(Ordering::Acquire))
    }

    fn write_u32(&self, at: L1Gpa, value: u32) {
        // Dropped where there is no memory, as the trait has it.
        let _ = self.write(at, &value.to_le_bytes());
    }

    fn fetch_or(&self, at: L1Gpa, bits: u64) -> Option<u64> {
        let (machine, _) = self.translate(at).filter(|(_, room)| *room >= 8)?;
        let old = self.memory().atomic_u64(machine).ok()?.fetch_or(bits, Ordering::AcqRel);
        self.memory().written(machine, 8);
        Some(old)
    }

    fn compare_exchange(&self, at: L1Gpa, old: u64, new: u64) -> Option<bool> {
        let (machine, _) = self.translate(at).filter(|(_, room)| *room >= 8)?;
        let word = self.memory().atomic_u64(machine).ok()?;
        let done = word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if done {
            self.memory().written(machine, 8);
        }
        Some(done)
    }

    fn region(&self, at: L1Gpa) -> Option<RamRegion> {
        self.regions().iter().find(|r| at.0.checked_sub(r.start.0).is_some_and(|off| off < r.len)).copied()
    }
}

/// How often a 128-bit entry is read again because it changed meanwhile.
const RETRIES: usize = 4;

/// Reads a 128-bit entry as if in one access: low half and high half. An entry that keeps changing is
/// taken as it was last.
pub(crate) fn read_entry(memory: &impl IoMemory, at: L1Gpa) -> Option<[u64; 2]> {
    let mut low = memory.read_u64(at)?;
    for _ in 0..RETRIES {
        let high = memory.read_u64(at.offset(8))?;
        let again = memory.read_u64(at)?;
        if again == low {
            return Some([low, high]);
        }
        low = again;
    }
    Some([low, memory.read_u64(at.offset(8))?])
}
