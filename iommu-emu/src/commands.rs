//! Invalidation by registers (§6.5.1), and the order between invalidations and accesses in flight.

use crate::iommu::{Iommu, Progress};
use crate::memory_access::IoMemory;
use crate::registers::MAX_ADDRESS_MASK;
use crate::spec::reg::{ccmd, gcmd, granularity, iotlb, iva};

/// Most descriptors that one call of [`Iommu::advance`] executes.
const BATCH: usize = 256;

/// What is under way.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    /// The granularity of a context-cache command that is done but for the accesses in flight.
    context: Option<u64>,
    /// The same of an IOTLB command.
    iotlb: Option<u64>,
    /// How many invalidations of contexts and translations there were.
    invalidations: u64,
    /// Accesses that were under way at this many invalidations have ended.
    drained: u64,
}

impl Pending {
    /// Translations or contexts were taken back.
    pub fn invalidated(&mut self) {
        self.invalidations = self.invalidations.wrapping_add(1);
    }

    /// If accesses by what was taken back may be under way: which invalidation to wait for.
    pub fn undrained(&self) -> Option<u64> {
        (self.drained != self.invalidations).then_some(self.invalidations)
    }
}

impl<M: IoMemory> Iommu<M> {
    /// Carries on with what software commanded: completes register commands and executes at most 256 descriptors
    /// of the invalidation queue. To be called after every [`Self::write`], until it is idle. Both kinds of completion
    /// come after all accesses by translations that were taken back, as drain reads and drain writes demand.
    pub fn advance(&mut self) -> Progress {
        if self.pending.context.is_some() || self.pending.iotlb.is_some() {
            if let Some(wait) = self.pending.undrained() {
                return Progress::Drain(wait);
            }
            self.complete_commands();
        }
        for _ in 0..BATCH {
            match self.queue_step() {
                Progress::More => {}
                end => return end,
            }
        }
        Progress::More
    }

    /// All accesses that were under way when [`Self::advance`] returned [`Progress::Drain`] with `wait` have ended.
    pub fn drained(&mut self, wait: u64) {
        self.pending.drained = wait;
    }

    /// CCMD_REG was written (§10.4.7). With queued invalidation enabled the command does nothing.
    pub(crate) fn start_context_command(&mut self) {
        let command = self.regs.ccmd;
        if command & ccmd::ICC == 0 {
            return;
        }
        let granularity = command >> ccmd::CIRG_SHIFT & 3;
        let source = (command >> ccmd::SID_SHIFT) as u16;
        let mask = command >> ccmd::FM_SHIFT & 3;
        let by_queue = self.regs.status & gcmd::QIE != 0;
        let done = !by_queue && self.invalidate_contexts(granularity, command as u16, source, mask);
        self.pending.context = Some(if done { granularity } else { 0 });
    }

    /// IOTLB_REG was written (§10.4.8.1). With queued invalidation enabled the command does nothing.
    pub(crate) fn start_iotlb_command(&mut self) {
        let command = self.regs.iotlb;
        if command & iotlb::IVT == 0 {
            return;
        }
        let granularity = command >> iotlb::IIRG_SHIFT & 3;
        let domain = (command >> iotlb::DID_SHIFT) as u16;
        let (address, mask) = (self.regs.iva & iva::ADDRESS, self.regs.iva & iva::AM);
        let by_queue = self.regs.status & gcmd::QIE != 0;
        let done = !by_queue && self.invalidate_translations(granularity, domain, address, mask);
        self.pending.iotlb = Some(if done { granularity } else { 0 });
    }

    /// Clears ICC and IVT and reports the granularity; 0 for a command that was not understood.
    fn complete_commands(&mut self) {
        if let Some(granularity) = self.pending.context.take() {
            self.regs.ccmd &= !(ccmd::ICC | 3 << ccmd::CAIG_SHIFT);
            self.regs.ccmd |= granularity << ccmd::CAIG_SHIFT;
        }
        if let Some(granularity) = self.pending.iotlb.take() {
            self.regs.iotlb &= !(iotlb::IVT | 3 << iotlb::IAIG_SHIFT);
            self.regs.iotlb |= granularity << iotlb::IAIG_SHIFT;
        }
    }

    /// Drops context entries; false for a reserved granularity.
    pub(crate) fn invalidate_contexts(
        &mut self,
        granularity: u64,
        domain: u16,
        source: u16,
        mask: u64,
    ) -> bool {
        let cache = &mut self.caches.contexts;
        match granularity {
            granularity::GLOBAL => cache.clear(),
            granularity::DOMAIN => cache.invalidate_domain(domain),
            granularity::SELECTIVE => cache.invalidate_device(domain, source, mask),
            _ => return false,
        }
        self.pending.invalidated();
        true
    }

    /// Drops translations; false for a reserved granularity or more pages than CAP_REG.MAMV allows. The 2^`mask`
    /// pages are aligned: address bits below are ignored (§10.4.8.2).
    pub(crate) fn invalidate_translations(
        &mut self,
        granularity: u64,
        domain: u16,
        address: u64,
        mask: u64,
    ) -> bool {
        let iotlb = &mut self.caches.iotlb;
        match granularity {
            granularity::GLOBAL => iotlb.clear(),
            granularity::DOMAIN => iotlb.invalidate_domain(domain),
            granularity::SELECTIVE if mask <= MAX_ADDRESS_MASK => {
                let within = (0x1000 << mask) - 1;
                iotlb.invalidate_range(domain, address & !within, address | within);
            }
            _ => return false,
        }
        self.pending.invalidated();
        true
    }
}
