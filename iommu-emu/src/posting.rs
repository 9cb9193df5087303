//! Interrupt posting (§5.2): an interrupt becomes a bit in a descriptor in memory, and a notification if
//! nobody has been notified yet.

use memory::L1Gpa;

use crate::interrupts::{Delivery, Remapped};
use crate::iommu::Iommu;
use crate::memory_access::IoMemory;
use crate::spec::fault::FaultReason;
use crate::spec::interrupt::{descriptor as pd, irte};

/// How often an update starts over because a processor changed the descriptor under it.
const RETRIES: usize = 16;

impl<M: IoMemory> Iommu<M> {
    /// Posts the interrupt of a present, well-formed entry (§5.2.4).
    pub(crate) fn post(&mut self, [low, high]: [u64; 2]) -> Result<Remapped, FaultReason> {
        let address = L1Gpa(high & irte::PDA_HIGH | low >> irte::PDA_LOW_SHIFT << 6);
        let vector = (low >> irte::V_SHIFT) as u8;
        let control = address.offset(pd::CONTROL);
        let before = self.memory.read_u64(control).ok_or(FaultReason::DescriptorAccess)?;
        if before & self.descriptor_reserved() != 0 {
            return Err(FaultReason::DescriptorReserved);
        }
        let word = address.offset(u64::from(vector / 64) * 8);
        self.memory.fetch_or(word, 1 << (vector % 64)).ok_or(FaultReason::DescriptorAccess)?;
        self.stats.posted += 1;
        let urgent = low & irte::URG != 0;
        match self.set_outstanding(control, urgent)? {
            Some(control) => Ok(Remapped::Notify(self.notification(control))),
            None => Ok(Remapped::Posted),
        }
    }

    /// Sets ON, unless it is set or notifications are suppressed and the interrupt is not urgent. The control word
    /// to notify by, if it was set.
    fn set_outstanding(&self, at: L1Gpa, urgent: bool) -> Result<Option<u64>, FaultReason> {
        for _ in 0..RETRIES {
            let control = self.memory.read_u64(at).ok_or(FaultReason::DescriptorAccess)?;
            if control & pd::ON != 0 || control & pd::SN != 0 && !urgent {
                return Ok(None);
            }
            let set = self.memory.compare_exchange(at, control, control | pd::ON);
            if set.ok_or(FaultReason::DescriptorAccess)? {
                return Ok(Some(control));
            }
        }
        // It keeps changing: one notification too many harms nobody.
        let control = self.memory.fetch_or(at, pd::ON).ok_or(FaultReason::DescriptorAccess)?;
        Ok((control & pd::ON == 0).then_some(control))
    }

    /// The notification event: fixed, physical, edge-triggered (§5.2.3).
    fn notification(&self, control: u64) -> Delivery {
        Delivery {
            destination: self.apic_id((control >> pd::NDST_SHIFT) as u32),
            extended: self.is_extended(),
            logical: false,
            redirection_hint: false,
            delivery_mode: 0,
            vector: (control >> pd::NV_SHIFT) as u8,
            level: false,
        }
    }

    /// Reserved bits of the control word (§9.12). Without extended interrupt mode those of NDST, too.
    fn descriptor_reserved(&self) -> u64 {
        let destination = if self.is_extended() { 0 } else { 0xffff_00ff << pd::NDST_SHIFT };
        pd::RESERVED | destination
    }
}
