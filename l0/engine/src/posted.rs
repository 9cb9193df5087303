//! Posted-interrupt processing (SDM Vol. 3C §30.6), as L0 does it between an exit and the next entry.

use std::sync::atomic::Ordering;

use memory::MachineMemory;

use crate::EngineVmcs;

/// Offset of the outstanding-notification bit's word in the descriptor (bit 256 of it).
const NOTIFICATION: u64 = 32;
/// Offset of VIRR in the virtual-APIC page.
const VIRR: u64 = 0x200;

/// Moves the interrupts posted in the descriptor of `vmcs` to its virtual-APIC page: clears the
/// outstanding notification, merges PIR into VIRR, raises RVI. To be called when the notification vector
/// has arrived for the context while it runs; the next entry evaluates pending virtual
/// interrupts, as the architecture does at the end of the processing. True if any was posted.
///
/// A descriptor or virtual-APIC page outside machine memory has nothing posted.
pub fn post_interrupts(memory: &MachineMemory, vmcs: &mut EngineVmcs) -> bool {
    let descriptor = vmcs.controls.posted_descriptor;
    let Ok(notification) = memory.atomic_u64(descriptor.offset(NOTIFICATION)) else { return false };
    notification.fetch_and(!1, Ordering::AcqRel);
    let mut highest = None;
    for word in 0..4u64 {
        let at = descriptor.offset(word * 8);
        let Ok(cell) = memory.atomic_u64(at) else { return false };
        let posted = cell.swap(0, Ordering::AcqRel);
        if posted == 0 {
            continue;
        }
        highest = Some((word * 64) as u8 + 63 - posted.leading_zeros() as u8);
        for half in 0..2u64 {
            let at = vmcs.controls.virtual_apic.offset(VIRR + (word * 2 + half) * 16);
            let mut register = [0; 4];
            if memory.read(at, &mut register).is_ok() {
                let merged = u32::from_le_bytes(register) | (posted >> (half * 32)) as u32;
                // The page was readable, so it is writable.
                let _ = memory.write(at, &merged.to_le_bytes());
            }
        }
    }
    memory.written(descriptor, 64);
    let Some(vector) = highest else { return false };
    let [rvi, svi] = vmcs.guest.interrupt_status.to_le_bytes();
    vmcs.guest.interrupt_status = u16::from_le_bytes([rvi.max(vector), svi]);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::MachineAddr;

    #[test]
    fn pir_goes_to_virr_and_raises_rvi() {
        let memory = MachineMemory::new(2 << 20).unwrap();
        let mut vmcs = EngineVmcs::default();
        vmcs.controls.posted_descriptor = MachineAddr(0x1000);
        vmcs.controls.virtual_apic = MachineAddr(0x2000);
        vmcs.guest.interrupt_status = 0x3050;
        memory.write_u64(MachineAddr(0x1000 + 8), 1 << (0x61 - 64) | 1 << (0x45 - 64)).unwrap();
        // ON, and the notification vector and destination, which stay.
        memory.write_u64(MachineAddr(0x1020), 0x1_00f2_0001).unwrap();
        memory.write(MachineAddr(0x2000 + 0x230), &[1, 0, 0, 0]).unwrap();
        assert!(post_interrupts(&memory, &mut vmcs));
        assert_eq!(vmcs.guest.interrupt_status, 0x3061, "RVI is the highest, SVI stays");
        assert_eq!(memory.read_u64(MachineAddr(0x1008)).unwrap(), 0);
        assert_eq!(memory.read_u64(MachineAddr(0x1020)).unwrap(), 0x1_00f2_0000);
        let register = |at: u64| {
            let mut b = [0; 4];
            memory.read(MachineAddr(0x2000 + at), &mut b).unwrap();
            u32::from_le_bytes(b)
        };
        assert_eq!((register(0x220), register(0x230)), (1 << 5, 1 << 1 | 1), "merged");
        assert!(!post_interrupts(&memory, &mut vmcs), "nothing is left");
    }
}
