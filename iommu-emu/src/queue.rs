//! The invalidation queue (§6.5.2): descriptors are executed in order, one at a time, so that fences need no
//! work of their own.

use memory::L1Gpa;

use crate::iommu::{Iommu, Progress};
use crate::memory_access::IoMemory;
use crate::registers::MAX_HANDLE_MASK;
use crate::spec::descriptor::{
    CONTEXT_CACHE, DID_SHIFT, G_SHIFT, INTERRUPT_ENTRY, IOTLB, SIZE, TYPE, WAIT, context_cache,
    interrupt_entry, iotlb, wait,
};
use crate::spec::reg::{gcmd, ics, iqa, iqei, queue_index};

/// What became of a descriptor.
enum Executed {
    Done,
    /// It waits for the accesses in flight at this invalidation.
    Drain(u64),
}

impl<M: IoMemory> Iommu<M> {
    /// Executes the descriptor at the head of the queue, if there is one.
    pub(crate) fn queue_step(&mut self) -> Progress {
        if self.regs.status & gcmd::QIE == 0 || self.faults.is_queue_stopped() {
            return Progress::Idle;
        }
        let descriptors = 0x100u64 << (self.regs.queue_address & iqa::QS);
        let head = self.regs.queue_head >> queue_index::SHIFT;
        let tail = self.regs.queue_tail >> queue_index::SHIFT;
        if tail >= descriptors || head >= descriptors {
            return self.queue_error(iqei::INVALID_TAIL);
        }
        if head == tail {
            return Progress::Idle;
        }
        let at = L1Gpa(self.regs.queue_address & iqa::ADDRESS).offset(head * SIZE);
        let (Some(low), Some(high)) = (self.memory.read_u64(at), self.memory.read_u64(at.offset(8))) else {
            return self.queue_error(iqei::FETCH);
        };
        match self.execute(low, high) {
            Ok(Executed::Done) => {
                self.stats.descriptors += 1;
                self.regs.queue_head = ((head + 1) % descriptors) << queue_index::SHIFT;
                Progress::More
            }
            Ok(Executed::Drain(wait)) => Progress::Drain(wait),
            Err(code) => self.queue_error(code),
        }
    }

    /// Stops the queue at its head until software clears FSTS_REG.IQE (§6.5.2.10).
    fn queue_error(&mut self, code: u64) -> Progress {
        self.regs.queue_error = code;
        self.faults.queue_error();
        Progress::Idle
    }

    fn execute(&mut self, low: u64, high: u64) -> Result<Executed, u64> {
        match low & TYPE {
            CONTEXT_CACHE => self.context_descriptor(low, high),
            IOTLB => self.iotlb_descriptor(low, high),
            INTERRUPT_ENTRY => self.interrupt_descriptor(low, high),
            WAIT => self.wait_descriptor(low, high),
            _ => Err(iqei::INVALID_TYPE),
        }
    }

    /// Context-cache invalidation (§6.5.2.1).
    fn context_descriptor(&mut self, low: u64, high: u64) -> Result<Executed, u64> {
        let source = (low >> context_cache::SID_SHIFT) as u16;
        let mask = low >> context_cache::FM_SHIFT & 3;
        let is_valid = low & context_cache::RESERVED == 0
            && high == 0
            && self.invalidate_contexts(low >> G_SHIFT & 3, (low >> DID_SHIFT) as u16, source, mask);
        if is_valid { Ok(Executed::Done) } else { Err(iqei::RESERVED) }
    }

    /// IOTLB invalidation (§6.5.2.3).
    fn iotlb_descriptor(&mut self, low: u64, high: u64) -> Result<Executed, u64> {
        let domain = (low >> DID_SHIFT) as u16;
        let is_valid = low & iotlb::RESERVED == 0
            && high & iotlb::RESERVED_HIGH == 0
            && self.invalidate_translations(
                low >> G_SHIFT & 3,
                domain,
                high & iotlb::ADDRESS,
                high & iotlb::AM,
            );
        if is_valid { Ok(Executed::Done) } else { Err(iqei::RESERVED) }
    }

    /// Interrupt entry cache invalidation (§6.5.2.7).
    fn interrupt_descriptor(&mut self, low: u64, high: u64) -> Result<Executed, u64> {
        let mask = low >> interrupt_entry::IM_SHIFT & 0x1f;
        if low & interrupt_entry::RESERVED != 0 || high != 0 {
            return Err(iqei::RESERVED);
        }
        if low & interrupt_entry::G_INDEX == 0 {
            self.caches.interrupts.clear();
        } else if mask <= MAX_HANDLE_MASK {
            self.caches.interrupts.invalidate((low >> interrupt_entry::IIDX_SHIFT) as u16, mask);
        } else {
            return Err(iqei::RESERVED);
        }
        Ok(Executed::Done)
    }

    /// Invalidation wait (§6.5.2.8, §6.5.2.9).
    fn wait_descriptor(&mut self, low: u64, high: u64) -> Result<Executed, u64> {
        if low & wait::RESERVED != 0 || high & !wait::ADDRESS != 0 {
            return Err(iqei::RESERVED);
        }
        if let Some(wait) = self.pending.undrained() {
            return Ok(Executed::Drain(wait));
        }
        if low & wait::SW != 0 {
            self.memory.write_u32(L1Gpa(high & wait::ADDRESS), (low >> wait::DATA_SHIFT) as u32);
        }
        if low & wait::IF != 0 && self.regs.completion & ics::IWC == 0 {
            self.regs.completion |= ics::IWC;
            self.regs.invalidation_event.raise();
        }
        Ok(Executed::Done)
    }
}
