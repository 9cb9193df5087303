//! Time for devices: one monotonic nanosecond count, and the guest's TSC.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Nanoseconds in a second.
pub const NS_PER_SEC: u64 = 1_000_000_000;

/// A monotonic time source. Zero is the machine's power-on.
pub trait Clock: Send + Sync {
    /// Nanoseconds since power-on.
    fn now_ns(&self) -> u64;
}

/// The host's monotonic clock, counted from creation.
#[derive(Debug)]
pub struct MonotonicClock {
    start: Instant,
}

impl MonotonicClock {
    /// A clock that reads zero now.
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for MonotonicClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for MonotonicClock {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A clock that moves only when told to, for tests and for replay.
#[derive(Debug, Default)]
pub struct ManualClock {
    ns: AtomicU64,
}

impl ManualClock {
    /// Sets the time, in nanoseconds since power-on.
    pub fn set_ns(&self, ns: u64) {
        self.ns.store(ns, Ordering::Relaxed);
    }

    /// Moves the time on by `ns` nanoseconds.
    pub fn advance_ns(&self, ns: u64) {
        self.ns.fetch_add(ns, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now_ns(&self) -> u64 {
        self.ns.load(Ordering::Relaxed)
    }
}

/// A vCPU's time-stamp counter as its guest reads it (host TSC scaled and offset, as
/// the hypervisor does it). The local APIC's TSC-deadline timer counts in it.
pub trait TscSource: Send + Sync {
    /// The guest's TSC now.
    fn guest_tsc(&self) -> u64;
    /// Its frequency in hertz; zero is read as 1.
    fn frequency_hz(&self) -> u64;
}

/// A TSC that is derived from a [`Clock`]: zero at power-on, constant frequency.
pub struct ClockTsc {
    clock: Arc<dyn Clock>,
    hz: u64,
}

impl ClockTsc {
    /// A TSC of `hz` hertz.
    pub fn new(clock: Arc<dyn Clock>, hz: u64) -> Self {
        Self { clock, hz: hz.max(1) }
    }
}

impl TscSource for ClockTsc {
    fn guest_tsc(&self) -> u64 {
        mul_div(self.clock.now_ns(), self.hz, NS_PER_SEC)
    }
    fn frequency_hz(&self) -> u64 {
        self.hz
    }
}

/// `value * mul / div`, rounded down, saturating at `u64::MAX`. A `div` of zero counts as 1.
pub fn mul_div(value: u64, mul: u64, div: u64) -> u64 {
    let wide = u128::from(value) * u128::from(mul) / u128::from(div.max(1));
    u64::try_from(wide).unwrap_or(u64::MAX)
}

/// `value * mul / div`, rounded up, saturating at `u64::MAX`. A `div` of zero counts as 1.
pub fn mul_div_up(value: u64, mul: u64, div: u64) -> u64 {
    let wide = (u128::from(value) * u128::from(mul)).div_ceil(u128::from(div.max(1)));
    u64::try_from(wide).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tsc_follows_the_clock() {
        let clock = Arc::new(ManualClock::default());
        let tsc = ClockTsc::new(clock.clone(), 2_500_000_000);
        clock.set_ns(1_000);
        assert_eq!(tsc.guest_tsc(), 2_500);
        clock.advance_ns(NS_PER_SEC);
        assert_eq!(tsc.guest_tsc(), 2_500_002_500);
    }

    #[test]
    fn scaling_saturates_and_rounds() {
        assert_eq!(mul_div(10, 1, 3), 3);
        assert_eq!(mul_div_up(10, 1, 3), 4);
        assert_eq!(mul_div(u64::MAX, u64::MAX, 1), u64::MAX);
        assert_eq!(mul_div_up(u64::MAX, 2, 0), u64::MAX);
    }
}
