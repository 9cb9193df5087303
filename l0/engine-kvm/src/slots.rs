//! EPT01 as KVM memory slots.
//!
//! KVM has its own second-level tables; what it takes from userspace is a list of ranges. The list
//! is read off the EPT that the context's EPT pointer names, when a context is first entered with it
//! and after an invalidation. Not supported: entries that allow less than read, write and execute,
//! memory types other than write-back (KVM decides on these), accessed and dirty flags.

use engine::EngineError;
use memory::{MachineAddr, MachineMemory, PAGE_SIZE};
use x86_spec::ept;

/// One contiguous range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    pub gpa: u64,
    pub machine: u64,
    pub len: u64,
}

/// How many ranges an EPT may have: far below what KVM takes, far above what a PC has.
const MAX_SLOTS: usize = 256;

fn unsupported(reason: String) -> EngineError {
    EngineError::Unsupported { engine: "kvm", reason }
}

/// The ranges that the EPT of `eptp` maps, in order of address.
///
/// # Errors
/// [`EngineError::Unsupported`] where memory slots can't express the EPT.
pub(crate) fn slots(memory: &MachineMemory, eptp: u64) -> Result<Vec<Slot>, EngineError> {
    let mut found = Vec::new();
    walk(memory, eptp & ept::ADDR_MASK, 3, 0, &mut found)?;
    Ok(found)
}

fn walk(
    memory: &MachineMemory,
    table: u64,
    level: u32,
    base: u64,
    found: &mut Vec<Slot>,
) -> Result<(), EngineError> {
    let shift = 12 + 9 * level;
    for index in 0..512u64 {
        let entry = memory
            .read_u64(MachineAddr(table + index * 8))
            .map_err(|e| unsupported(format!("an EPT table is not in machine memory: {e}")))?;
        if entry & ept::RWX == 0 {
            continue;
        }
        let gpa = base | index << shift;
        let leaf = level == 0 || level < 3 && entry & ept::LARGE != 0;
        if !leaf {
            walk(memory, entry & ept::ADDR_MASK, level - 1, gpa, found)?;
            continue;
        }
        if entry & ept::RWX != ept::RWX {
            return Err(unsupported(format!("the EPT entry {entry:#x} for {gpa:#x} restricts access")));
        }
        let len = PAGE_SIZE << (9 * level);
        let machine = entry & ept::ADDR_MASK & !(len - 1);
        memory
            .host_ptr(MachineAddr(machine), len as usize)
            .map_err(|e| unsupported(format!("the EPT entry for {gpa:#x} leaves machine memory: {e}")))?;
        let full = found.len() == MAX_SLOTS;
        match found.last_mut() {
            Some(s) if s.gpa + s.len == gpa && s.machine + s.len == machine => s.len += len,
            _ if full => {
                return Err(unsupported(format!("the EPT has more than {MAX_SLOTS} ranges")));
            }
            _ => found.push(Slot { gpa, machine, len }),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAF: u64 = ept::RWX | ept::MEMTYPE_WB << ept::MEMTYPE_SHIFT;

    /// Tables at 4 MiB: 0–2 MiB by a large page, then two pages, a gap, one page elsewhere.
    fn memory() -> MachineMemory {
        let m = MachineMemory::new(5 << 20).unwrap();
        let t = |n: u64| (4 << 20) + n * 0x1000;
        let put = |at: u64, v: u64| m.write_u64(MachineAddr(at), v).unwrap();
        put(t(0), t(1) | ept::RWX);
        put(t(1), t(2) | ept::RWX);
        put(t(2), LEAF | ept::LARGE);
        put(t(2) + 8, t(3) | ept::RWX);
        put(t(3), 0x20_0000 | LEAF);
        put(t(3) + 8, 0x20_1000 | LEAF);
        put(t(3) + 24, 0x20_8000 | LEAF);
        m
    }

    #[test]
    fn contiguous_entries_make_one_slot() {
        let found = slots(&memory(), ept::eptp(4 << 20, false)).unwrap();
        assert_eq!(
            found,
            [
                Slot { gpa: 0, machine: 0, len: 0x20_2000 },
                Slot { gpa: 0x20_3000, machine: 0x20_8000, len: 0x1000 },
            ]
        );
    }

    #[test]
    fn what_slots_can_not_express_is_refused() {
        let m = memory();
        m.write_u64(MachineAddr((4 << 20) + 0x3010), 0x20_2000 | LEAF & !ept::W).unwrap();
        let e = slots(&m, ept::eptp(4 << 20, false)).unwrap_err();
        assert!(e.to_string().contains("0x202000"), "{e}");
        m.write_u64(MachineAddr((4 << 20) + 0x3010), 0x4000_0000 | LEAF).unwrap();
        assert!(slots(&m, ept::eptp(4 << 20, false)).is_err(), "outside machine memory");
    }
}
