//! Composition of TSC offsets and multipliers (SDM Vol. 3C §25.6.5), and L1's VMX-preemption
//! timer.

/// Fractional bits of a TSC multiplier.
const FRACTION: u32 = 48;
/// The multiplier that changes nothing.
pub const UNIT: u64 = 1 << FRACTION;

/// What a guest reads as its TSC: the processor's, times `multiplier`, shifted right by 48, plus
/// `offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscView {
    /// TSC offset, two's complement.
    pub offset: u64,
    /// TSC multiplier.
    pub multiplier: u64,
}

impl TscView {
    /// The processor's own TSC.
    pub const IDENTITY: Self = Self { offset: 0, multiplier: UNIT };

    /// What RDTSC gives where the processor's TSC is `tsc` (§26.3): the 128-bit product shifted
    /// right by 48, its low 64 bits, plus the offset.
    pub const fn read(self, tsc: u64) -> u64 {
        let scaled = (tsc as u128 * self.multiplier as u128) >> FRACTION;
        (scaled as u64).wrapping_add(self.offset)
    }

    /// The view of a guest for which `inner` is set, inside a guest whose own view is `self`.
    ///
    /// Exact where either multiplier is [`UNIT`] and `self.offset` times `inner.multiplier` has
    /// no fraction; else what is lost to rounding is below one tick for the offset, and
    /// 2^-48 of the TSC for the multiplier, as both are fixed-point numbers. A composed
    /// multiplier that does not fit is the greatest there is.
    pub const fn compose(self, inner: Self) -> Self {
        let multiplier = (self.multiplier as u128 * inner.multiplier as u128) >> FRACTION;
        let scaled = (self.offset as i64 as i128 * inner.multiplier as i128) >> FRACTION;
        Self {
            multiplier: if multiplier > u64::MAX as u128 { u64::MAX } else { multiplier as u64 },
            offset: (scaled as u64).wrapping_add(inner.offset),
        }
    }
}

/// L1's VMX-preemption timer while L2 runs. It counts down by one each time the TSC has
/// advanced by 2^rate, also while L0 works on L2's behalf, so it is kept as a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timer12 {
    deadline: u64,
    rate: u8,
}

impl Timer12 {
    /// A timer with `value` left at TSC `now`, counting every 2^`rate` ticks
    /// (IA32_VMX_MISC bits 4:0).
    pub const fn start(value: u32, rate: u8, now: u64) -> Self {
        let rate = rate & 31;
        // The timer counts changes of TSC bit `rate`, so the first one may come sooner.
        let base = now >> rate << rate;
        Self { deadline: base.saturating_add((value as u64) << rate), rate }
    }
    /// What is left at TSC `now`, in ticks of the timer, rounded up.
    pub const fn remaining(self, now: u64) -> u32 {
        let left = self.deadline.saturating_sub(now);
        let ticks = left.div_ceil(1 << self.rate);
        if ticks > u32::MAX as u64 { u32::MAX } else { ticks as u32 }
    }
    /// Whether it has reached zero.
    pub const fn expired(self, now: u64) -> bool {
        now >= self.deadline
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_formula_of_the_manual() {
        // Twice the rate, five behind.
        let v = TscView { offset: 5u64.wrapping_neg(), multiplier: 2 * UNIT };
        assert_eq!(v.read(100), 195);
        assert_eq!(TscView::IDENTITY.read(u64::MAX), u64::MAX);
    }

    #[test]
    fn an_offset_below_zero_is_scaled_as_such() {
        let l1 = TscView { offset: 1000u64.wrapping_neg(), multiplier: UNIT };
        let l2 = TscView { offset: 7, multiplier: UNIT / 2 };
        let both = l1.compose(l2);
        assert_eq!(both.read(5000), l2.read(l1.read(5000)));
        assert_eq!(both.read(5000), 2007);
    }

    #[test]
    fn the_timer_counts_at_its_rate() {
        let t = Timer12::start(10, 5, 1000);
        assert_eq!(t.remaining(1000), 10);
        assert_eq!(t.remaining(992 + 32), 9);
        assert!(!t.expired(992 + 319));
        assert!(t.expired(992 + 320));
        assert_eq!(t.remaining(u64::MAX), 0);
        assert_eq!(Timer12::start(0, 5, 64).remaining(64), 0);
    }

    proptest! {
        /// With L0 only offsetting, the composition is off by at most one tick.
        #[test]
        fn composition_agrees_with_one_view_inside_the_other(
            tsc in 0u64..1 << 60, o1 in -(1i64 << 59)..1 << 59, o2: u64, m2 in 0u64..1 << 51,
        ) {
            let l1 = TscView { offset: o1 as u64, multiplier: UNIT };
            prop_assume!(tsc as i64 + o1 >= 0);
            let l2 = TscView { offset: o2, multiplier: m2 };
            let composed = l1.compose(l2).read(tsc);
            let nested = l2.read(l1.read(tsc));
            prop_assert!(nested.wrapping_sub(composed) <= 1, "{} {}", nested, composed);
            let plain = TscView { offset: o2, multiplier: UNIT };
            prop_assert_eq!(l1.compose(plain).read(tsc), plain.read(l1.read(tsc)));
        }
    }
}
