//! VPID02: the engine's VPIDs for L1's.

/// VPIDs that L2s get; L0 gives L1 another (SDM Vol. 3C §29.1).
const FIRST: u16 = 2;
/// How many of L1's VPIDs have one of the engine's at a time.
const SLOTS: usize = 64;

/// Which VPID of the engine stands for which of L1's. L1's processor has 65535 and so has the
/// engine, one of which is L1's own: so they are handed out, and the one unused for longest is
/// reused.
#[derive(Clone, Debug, Default)]
pub struct VpidMap {
    /// L1's VPID (0: VMCS12 does not enable VPIDs) and the time of the last use, by slot.
    slots: Vec<(u16, u64)>,
    clock: u64,
}

/// A VPID for VMCS02.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vpid02 {
    /// The VPID.
    pub vpid: u16,
    /// Translations tagged with it belong to something else and must be dropped first.
    pub flush: bool,
}

impl VpidMap {
    /// The engine's VPID for L1's `vpid12`, or for an L2 without VPID if that is 0. The latter is to
    /// be flushed at each entry and exit besides (§29.3.1): here it only has a number of its
    /// own.
    pub fn get(&mut self, vpid12: u16) -> Vpid02 {
        self.clock += 1;
        if let Some(i) = self.slots.iter().position(|(v, _)| *v == vpid12) {
            if let Some(slot) = self.slots.get_mut(i) {
                slot.1 = self.clock;
            }
            return Vpid02 { vpid: FIRST + i as u16, flush: false };
        }
        if self.slots.len() < SLOTS {
            self.slots.push((vpid12, self.clock));
            return Vpid02 { vpid: FIRST + self.slots.len() as u16 - 1, flush: true };
        }
        let oldest = (self.slots.iter().enumerate()).min_by_key(|(_, s)| s.1).map_or(0, |(i, _)| i);
        if let Some(slot) = self.slots.get_mut(oldest) {
            *slot = (vpid12, self.clock);
        }
        Vpid02 { vpid: FIRST + oldest as u16, flush: true }
    }

    /// The engine's VPID for L1's, if there is one: what INVVPID has to invalidate.
    pub fn lookup(&self, vpid12: u16) -> Option<u16> {
        self.slots.iter().position(|(v, _)| *v == vpid12).map(|i| FIRST + i as u16)
    }

    /// All VPIDs that are in use: what INVVPID all-context has to invalidate.
    pub fn all(&self) -> impl Iterator<Item = u16> + '_ {
        (0..self.slots.len()).map(|i| FIRST + i as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vpids_are_distinct_and_a_reused_one_is_flushed() {
        let mut m = VpidMap::default();
        let first = m.get(0);
        assert!(first.flush);
        assert_eq!(m.get(0), Vpid02 { flush: false, ..first });
        for v in 1..SLOTS as u16 {
            assert!(m.get(v).flush);
        }
        let mut used: Vec<_> = m.all().collect();
        used.dedup();
        assert_eq!(used.len(), SLOTS);
        assert!(!used.contains(&1), "VPID 1 is L1's");
        m.get(0);
        // The oldest is 1's now.
        let gone = m.lookup(1).unwrap();
        assert_eq!(m.get(1000), Vpid02 { vpid: gone, flush: true });
        assert_eq!(m.lookup(1), None);
        assert_eq!(m.lookup(0), Some(first.vpid));
    }
}
