//! The caches (§6.2): context entries by source, translations by domain and page, interrupt remapping
//! entries by index. Each holds a bounded number of entries; a full one starts anew.

use std::collections::{BTreeMap, HashMap};

use memory::{L1Gpa, MachineAddr};
use x86_spec::pci::Bdf;

use crate::iommu::{Access, Failure, Iova, Translation};
use crate::memory_access::IoMemory;
use crate::spec::fault::FaultReason;
use crate::spec::table::is_interrupt_address;
use crate::walk::{Context, Rights, Walked};

/// Most context entries that are cached.
const MAX_CONTEXTS: usize = 1024;
/// Most translations that are cached.
const MAX_TRANSLATIONS: usize = 16384;
/// Most interrupt remapping entries that are cached.
const MAX_INTERRUPTS: usize = 4096;

/// All caches.
#[derive(Debug, Default)]
pub(crate) struct Caches {
    pub contexts: ContextCache,
    pub iotlb: Iotlb,
    pub interrupts: InterruptCache,
}

/// The context cache (§6.2.2). In caching mode it holds faults, too, under domain 0 (§6.1).
#[derive(Debug, Default)]
pub(crate) struct ContextCache(HashMap<u16, Result<Context, Failure>>);

/// The function mask of a device-selective invalidation: which bits of the function number do not count.
fn function_bits(mask: u64) -> u16 {
    match mask & 3 {
        0 => 0,
        1 => 0b100,
        2 => 0b110,
        _ => 0b111,
    }
}

impl ContextCache {
    pub fn get(&self, source: Bdf) -> Option<Result<Context, Failure>> {
        self.0.get(&source.requester_id()).copied()
    }

    pub fn insert(&mut self, source: Bdf, entry: Result<Context, Failure>) {
        if self.0.len() >= MAX_CONTEXTS {
            self.0.clear();
        }
        self.0.insert(source.requester_id(), entry);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn invalidate_domain(&mut self, domain: u16) {
        self.0.retain(|_, entry| entry.map_or(0, |c| c.domain) != domain);
    }

    /// Devices whose ID is `source` but for the functions that `mask` leaves out, with entries of `domain`.
    pub fn invalidate_device(&mut self, domain: u16, source: u16, mask: u64) {
        let ignored = function_bits(mask);
        for function in 0..8 {
            let id = source & !7 | function;
            let is_meant = (id ^ source) & !ignored == 0;
            if is_meant && self.0.get(&id).is_some_and(|e| e.map_or(0, |c| c.domain) == domain) {
                self.0.remove(&id);
            }
        }
    }
}

/// A translation as it is cached: L1's page and, in the same step, the machine memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cached {
    /// First IOVA that it is for.
    start: u64,
    /// log2 of how many bytes it is for.
    size_bits: u32,
    /// The start of L1's page, or the fault (in caching mode).
    page: Result<L1Gpa, FaultReason>,
    /// What the tables allow.
    pub rights: Rights,
    /// The machine memory of the page if all of it is RAM in one piece.
    machine: Option<MachineAddr>,
}

impl Cached {
    /// Puts what a walk for `iova` found and L0's own map together.
    pub fn compose(walked: Walked, iova: Iova, memory: &impl IoMemory) -> Self {
        let size = 1u64 << walked.size_bits;
        let machine = walked.page.ok().filter(|_| !walked.rights.is_none()).and_then(|page| {
            let region = memory.region(page)?;
            let offset = page.0.checked_sub(region.start.0)?;
            (region.len.checked_sub(offset)? >= size).then(|| region.machine.offset(offset))
        });
        Self {
            start: iova.0 & !(size - 1),
            size_bits: walked.size_bits,
            page: walked.page,
            rights: walked.rights,
            machine,
        }
    }

    /// Whether it is a page that can be accessed in some way.
    pub fn is_page(&self) -> bool {
        self.page.is_ok() && !self.rights.is_none()
    }

    /// Where `iova` leads by it, for `access`.
    pub fn translation(&self, iova: Iova, access: Access) -> Result<Translation, FaultReason> {
        if !access.allowed_by(self.rights) {
            return Err(access.denied());
        }
        let offset = iova.0.wrapping_sub(self.start);
        let gpa = self.page?.offset(offset);
        if is_interrupt_address(gpa.0) {
            return Err(FaultReason::InterruptRange);
        }
        Ok(Translation {
            gpa,
            machine: self.machine.map(|m| m.offset(offset)),
            len: self.last().wrapping_sub(iova.0).saturating_add(1),
            rights: self.rights,
        })
    }

    fn contains(&self, iova: u64) -> bool {
        iova >> self.size_bits == self.start >> self.size_bits
    }

    /// The last IOVA that it is for.
    fn last(&self) -> u64 {
        self.start | ((1 << self.size_bits) - 1)
    }
}

/// The IOTLB (§6.2.4): by domain, then by address. A domain's entries never overlap.
#[derive(Debug, Default)]
pub(crate) struct Iotlb {
    domains: HashMap<u16, BTreeMap<u64, Cached>>,
    len: usize,
}

impl Iotlb {
    pub fn get(&self, domain: u16, iova: Iova) -> Option<Cached> {
        let (_, cached) = self.domains.get(&domain)?.range(..=iova.0).next_back()?;
        cached.contains(iova.0).then_some(*cached)
    }

    pub fn insert(&mut self, domain: u16, cached: Cached) {
        self.invalidate_range(domain, cached.start, cached.last());
        if self.len >= MAX_TRANSLATIONS {
            self.clear();
        }
        let replaced = self.domains.entry(domain).or_default().insert(cached.start, cached);
        self.len += usize::from(replaced.is_none());
    }

    pub fn clear(&mut self) {
        self.domains.clear();
        self.len = 0;
    }

    pub fn invalidate_domain(&mut self, domain: u16) {
        if let Some(entries) = self.domains.remove(&domain) {
            self.len = self.len.saturating_sub(entries.len());
        }
    }

    /// Every page of `domain` that has an address from `first` to `last`.
    pub fn invalidate_range(&mut self, domain: u16, first: u64, last: u64) {
        let Some(entries) = self.domains.get_mut(&domain) else { return };
        let from = match entries.range(..=first).next_back() {
            Some((start, cached)) if cached.last() >= first => *start,
            _ => first,
        };
        while let Some(start) = entries.range(from..=last).next().map(|(start, _)| *start) {
            entries.remove(&start);
            self.len = self.len.saturating_sub(1);
        }
        if entries.is_empty() {
            self.domains.remove(&domain);
        }
    }
}

/// The interrupt entry cache (§6.4).
#[derive(Debug, Default)]
pub(crate) struct InterruptCache(BTreeMap<u16, [u64; 2]>);

impl InterruptCache {
    pub fn get(&self, index: u16) -> Option<[u64; 2]> {
        self.0.get(&index).copied()
    }

    pub fn insert(&mut self, index: u16, entry: [u64; 2]) {
        if self.0.len() >= MAX_INTERRUPTS {
            self.0.clear();
        }
        self.0.insert(index, entry);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// The aligned 2^`mask` entries that `index` is in.
    pub fn invalidate(&mut self, index: u16, mask: u64) {
        let low = 1u16.checked_shl(mask as u32).map_or(u16::MAX, |n| n - 1);
        let last = index | low;
        let mut next = Some(index & !low);
        while let Some(found) = next.and_then(|n| self.0.range(n..=last).next()).map(|(i, _)| *i) {
            self.0.remove(&found);
            next = found.checked_add(1).filter(|n| *n <= last);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(start: u64, size_bits: u32) -> Cached {
        let rights = Rights { read: true, write: true };
        Cached { start, size_bits, page: Ok(L1Gpa(0)), rights, machine: None }
    }

    fn count(iotlb: &Iotlb) -> usize {
        iotlb.domains.values().map(BTreeMap::len).sum()
    }

    fn starts(iotlb: &Iotlb, domain: u16) -> Vec<u64> {
        iotlb.domains.get(&domain).map(|d| d.keys().copied().collect()).unwrap_or_default()
    }

    #[test]
    fn no_cache_grows_without_bound() {
        let mut caches = Caches::default();
        for i in 0..40_000u64 {
            caches.iotlb.insert(i as u16, page(i << 12, 12));
            assert!(caches.iotlb.len <= MAX_TRANSLATIONS);
            caches
                .contexts
                .insert(Bdf::from_requester_id(i as u16), Err(Failure::of(FaultReason::RootAccess)));
            assert!(caches.contexts.0.len() <= MAX_CONTEXTS);
            caches.interrupts.insert(i as u16, [0; 2]);
            assert!(caches.interrupts.0.len() <= MAX_INTERRUPTS);
        }
        assert_eq!(caches.iotlb.len, count(&caches.iotlb));
        caches.iotlb.invalidate_domain(39_999);
        assert_eq!(caches.iotlb.len, count(&caches.iotlb));
    }

    #[test]
    fn entries_of_a_domain_do_not_overlap() {
        let mut iotlb = Iotlb::default();
        iotlb.insert(1, page(0x20_0000, 21));
        iotlb.insert(1, page(0x20_3000, 12));
        assert_eq!(starts(&iotlb, 1), [0x20_3000]);
        iotlb.insert(1, page(0x60_0000, 12));
        iotlb.insert(1, page(0, 30));
        assert_eq!((starts(&iotlb, 1), iotlb.len), (vec![0], 1));
    }

    #[test]
    fn ranges_take_every_page_that_they_touch() {
        let mut iotlb = Iotlb::default();
        for start in [0u64, 0x1000, 0x2000, 0x20_0000] {
            iotlb.insert(1, page(start, if start < 0x20_0000 { 12 } else { 21 }));
        }
        iotlb.invalidate_range(2, 0, u64::MAX);
        iotlb.invalidate_range(1, 0x3000, 0x1f_ffff);
        assert_eq!(starts(&iotlb, 1).len(), 4);
        iotlb.invalidate_range(1, 0x1000, 0x1fff);
        iotlb.invalidate_range(1, 0x2f_f000, 0x2f_ffff);
        assert_eq!((starts(&iotlb, 1), iotlb.len), (vec![0, 0x2000], 2));
    }

    /// §6.5.2.7: aligned 2^IM entries.
    #[test]
    fn interrupt_entries_by_mask() {
        for (index, mask, left) in [(5, 0, 7), (5, 1, 6), (5, 2, 4), (0, 3, 0), (0x8005, 15, 8), (7, 31, 0)] {
            let mut cache = InterruptCache::default();
            (0..8).for_each(|i| cache.insert(i, [0; 2]));
            cache.invalidate(index, mask);
            assert_eq!(cache.0.len(), left, "{index} {mask}");
        }
    }
}
