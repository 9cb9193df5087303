//! How the walker reaches EPT tables.

use core::fmt::Debug;
use std::sync::atomic::Ordering;

use memory::{L1Gpa, L1Ram, L2Gpa, MachineAddr, MachineMemory};

/// A physical address of one level. Lets one walker serve all levels without mixing them.
pub trait PhysicalAddress: Copy + Debug + Eq {
    /// The address with this number.
    fn new(raw: u64) -> Self;
    /// The number.
    fn raw(self) -> u64;
}

macro_rules! physical {
    ($($t:ty),*) => {$(
        impl PhysicalAddress for $t {
            fn new(raw: u64) -> Self {
                Self(raw)
            }
            fn raw(self) -> u64 {
                self.0
            }
        }
    )*};
}
physical!(L2Gpa, L1Gpa, MachineAddr);

/// What a read that no memory answers gives.
const FLOATING: u64 = u64::MAX;

/// Memory that holds EPT tables: aligned 64-bit entries by physical address.
pub trait TableMemory {
    /// The level of the addresses in the tables (and of the tables themselves).
    type Address: PhysicalAddress;

    /// Reads the entry at `at` in one access. Where there is no memory all bits read as
    /// one, as on a bus, which is a misconfigured entry.
    fn read_entry(&self, at: Self::Address) -> u64;

    /// Replaces the entry at `at` by `new` if it still is `old`; whether it was.
    fn compare_exchange(&self, at: Self::Address, old: u64, new: u64) -> bool;

    /// Writes a 64-bit word (of the page-modification log). Nothing happens where there is no
    /// memory.
    fn write_word(&self, at: Self::Address, value: u64);
}

/// EPT01 and EPT02.
impl TableMemory for MachineMemory {
    type Address = MachineAddr;

    fn read_entry(&self, at: MachineAddr) -> u64 {
        self.read_u64(at).unwrap_or(FLOATING)
    }

    fn compare_exchange(&self, at: MachineAddr, old: u64, new: u64) -> bool {
        set_flags(self, at, old, new)
    }

    fn write_word(&self, at: MachineAddr, value: u64) {
        // A page-modification log outside memory is written to nowhere.
        let _ = self.write_u64(at, value);
    }
}

/// Sets accessed and dirty flags as a processor does: that is no write of L1's.
fn set_flags(memory: &MachineMemory, at: MachineAddr, old: u64, new: u64) -> bool {
    let Ok(cell) = memory.atomic_u64(at) else { return false };
    let done = cell.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok();
    if done {
        memory.flags_written(at, 8);
    }
    done
}

/// EPT12, in L1's RAM.
impl TableMemory for L1Ram {
    type Address = L1Gpa;

    fn read_entry(&self, at: L1Gpa) -> u64 {
        match self.translate(at) {
            Some((machine, room)) if room >= 8 => self.memory().read_entry(machine),
            _ => FLOATING,
        }
    }

    fn compare_exchange(&self, at: L1Gpa, old: u64, new: u64) -> bool {
        match self.translate(at) {
            Some((machine, room)) if room >= 8 => set_flags(self.memory(), machine, old, new),
            _ => false,
        }
    }

    fn write_word(&self, at: L1Gpa, value: u64) {
        if let Some((machine, _)) = self.translate(at) {
            self.memory().write_word(machine, value);
        }
    }
}
