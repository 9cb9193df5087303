//! The performance-monitoring unit of one processor: its registers and what they mean (SDM Vol. 3B
//! §20.2, architectural performance monitoring version 2).
//!
//! An engine counts; here is which counter counts what, and what a counter does. Both kinds of
//! cycles are ticks of the TSC while the engine runs the context and it is not halted: an engine
//! has no core clock of its own, and L0's work for the guest is not the guest's.
//!
//! Not supported: events that nothing here can count (caches, branches, everything
//! model-specific), which can be selected and count nothing; the same for edge detection and
//! for counter masks on instructions, as there is no notion of what happens within one cycle;
//! pin control (the bit is only stored), PEBS, AnyThread, version 3 and later.

use x86_spec::msr as n;
use x86_spec::pmu::{self, event, event_select as sel, fixed_control as fix};

/// The registers besides IA32_PERF_GLOBAL_CTRL, which is part of a VMCS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pmu {
    /// IA32_PERFEVTSELx.
    pub event_select: [u64; pmu::GENERAL],
    /// IA32_PMCx.
    pub counters: [u64; pmu::GENERAL],
    /// IA32_FIXED_CTRx.
    pub fixed: [u64; pmu::FIXED],
    /// IA32_FIXED_CTR_CTRL.
    pub fixed_control: u64,
    /// IA32_PERF_GLOBAL_STATUS.
    pub global_status: u64,
    /// A counter that overflowed asks for an interrupt, which the local APIC has not got yet.
    pub interrupt: bool,
}

/// Which counters count what, as bits of IA32_PERF_GLOBAL_CTRL.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CounterSets {
    /// Instructions retired.
    pub instructions: u64,
    /// Cycles, core or reference.
    pub cycles: u64,
}

impl CounterSets {
    /// Nothing is counted.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// WRMSR or RDMSR would raise #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PmuFault;

/// Which register of a bank `msr` is.
fn bank(msr: u32, first: u32, len: usize) -> Option<usize> {
    let i = msr.checked_sub(first)? as usize;
    (i < len).then_some(i)
}

/// Numbers of the bits that are set.
fn bits(mut set: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = (set != 0).then(|| set.trailing_zeros())?;
        set &= set - 1;
        Some(bit)
    })
}

impl Pmu {
    /// What the counters count at one privilege level (`user`: CPL 1 to 3) with this
    /// IA32_PERF_GLOBAL_CTRL.
    pub fn running(&self, global_ctrl: u64, user: bool) -> CounterSets {
        let mut sets = CounterSets::default();
        for bit in bits(global_ctrl & pmu::GLOBAL) {
            let set = match self.counted(bit, user) {
                Some(event::INSTRUCTIONS) => &mut sets.instructions,
                Some(_) => &mut sets.cycles,
                None => continue,
            };
            *set |= 1 << bit;
        }
        sets
    }

    /// The event that counter `bit` of IA32_PERF_GLOBAL_CTRL counts at this privilege level.
    fn counted(&self, bit: u32, user: bool) -> Option<u64> {
        match bit.checked_sub(pmu::FIRST_FIXED) {
            Some(i) => {
                let control = self.fixed_control >> (i * fix::BITS);
                let wanted = if user { fix::USR } else { fix::OS };
                let event = [event::INSTRUCTIONS, event::CORE_CYCLES, event::REFERENCE_CYCLES];
                event.get(i as usize).copied().filter(|_| control & wanted != 0)
            }
            None => counted_event(*self.event_select.get(bit as usize)?, user),
        }
    }

    fn counter_mut(&mut self, bit: u32) -> Option<&mut u64> {
        match bit.checked_sub(pmu::FIRST_FIXED) {
            Some(i) => self.fixed.get_mut(i as usize),
            None => self.counters.get_mut(bit as usize),
        }
    }

    fn counter(&self, bit: u32) -> Option<u64> {
        match bit.checked_sub(pmu::FIRST_FIXED) {
            Some(i) => self.fixed.get(i as usize).copied(),
            None => self.counters.get(bit as usize).copied(),
        }
    }

    /// Whether counter `bit` requests an interrupt when it overflows.
    fn interrupts(&self, bit: u32) -> bool {
        match bit.checked_sub(pmu::FIRST_FIXED) {
            Some(i) => self.fixed_control >> (i * fix::BITS) & fix::PMI != 0,
            None => self.event_select.get(bit as usize).is_some_and(|s| s & sel::INT != 0),
        }
    }

    /// Counts `events` with each of `counters`; those that overflow say so in
    /// IA32_PERF_GLOBAL_STATUS and request an interrupt if they are to (§20.2.2).
    pub fn count(&mut self, counters: u64, events: u64) {
        for bit in bits(counters) {
            let Some(c) = self.counter_mut(bit) else { continue };
            let sum = c.wrapping_add(events);
            *c = sum & pmu::COUNTER;
            if sum > pmu::COUNTER {
                self.global_status |= 1 << bit;
                self.interrupt |= self.interrupts(bit);
            }
        }
    }

    /// How many events the first of `counters` to overflow still takes; at least 1.
    pub fn room(&self, counters: u64) -> u64 {
        bits(counters)
            .filter_map(|bit| self.counter(bit))
            .map(|c| pmu::COUNTER - c + 1)
            .min()
            .unwrap_or(u64::MAX)
    }

    /// The counter that RDPMC reads with this ECX; `None`: #GP(0). Bit 31, "fast", exists only on
    /// processors without architectural performance monitoring (Vol. 2B, RDPMC).
    pub fn read_counter(&self, ecx: u32) -> Option<u64> {
        if ecx & pmu::RDPMC_FIXED != 0 {
            self.fixed.get((ecx ^ pmu::RDPMC_FIXED) as usize).copied()
        } else {
            self.counters.get(ecx as usize).copied()
        }
    }

    /// RDMSR; `None` if `msr` is not one of these.
    pub fn read_msr(&self, msr: u32, global_ctrl: u64) -> Option<u64> {
        let general =
            |first, values: &[u64]| bank(msr, first, pmu::GENERAL).and_then(|i| values.get(i).copied());
        general(n::IA32_PMC0, &self.counters)
            .or_else(|| general(pmu::IA32_A_PMC0, &self.counters))
            .or_else(|| general(n::IA32_PERFEVTSEL0, &self.event_select))
            .or_else(|| bank(msr, n::IA32_FIXED_CTR0, pmu::FIXED).and_then(|i| self.fixed.get(i).copied()))
            .or(match msr {
                n::IA32_PERF_CAPABILITIES => Some(pmu::CAPABILITY_FULL_WIDTH),
                n::IA32_FIXED_CTR_CTRL => Some(self.fixed_control),
                n::IA32_PERF_GLOBAL_STAUS => Some(self.global_status),
                n::IA32_PERF_GLOBAL_CTRL => Some(global_ctrl),
                n::IA32_PERF_GLOBAL_OVF_CTRL => Some(0),
                _ => None,
            })
    }

    /// WRMSR; `None` if `msr` is not one of these.
    ///
    /// Reserved bits and read-only registers are #GP(0). IA32_PMCx take the lower half of the value,
    /// sign-extended; their full-width aliases and the fixed counters take all of it (§20.2).
    pub fn write_msr(&mut self, msr: u32, value: u64, global_ctrl: &mut u64) -> Option<Result<(), PmuFault>> {
        let (slot, value, defined) = if let Some(i) = bank(msr, n::IA32_PMC0, pmu::GENERAL) {
            (self.counters.get_mut(i)?, value as u32 as i32 as u64 & pmu::COUNTER, pmu::COUNTER)
        } else if let Some(i) = bank(msr, pmu::IA32_A_PMC0, pmu::GENERAL) {
            (self.counters.get_mut(i)?, value, pmu::COUNTER)
        } else if let Some(i) = bank(msr, n::IA32_PERFEVTSEL0, pmu::GENERAL) {
            (self.event_select.get_mut(i)?, value, sel::DEFINED)
        } else if let Some(i) = bank(msr, n::IA32_FIXED_CTR0, pmu::FIXED) {
            (self.fixed.get_mut(i)?, value, pmu::COUNTER)
        } else {
            match msr {
                n::IA32_FIXED_CTR_CTRL => (&mut self.fixed_control, value, fix::DEFINED),
                n::IA32_PERF_GLOBAL_CTRL => (global_ctrl, value, pmu::GLOBAL),
                n::IA32_PERF_GLOBAL_OVF_CTRL => return Some(self.clear_status(value)),
                n::IA32_PERF_CAPABILITIES | n::IA32_PERF_GLOBAL_STAUS => return Some(Err(PmuFault)),
                _ => return None,
            }
        };
        if value & !defined != 0 {
            return Some(Err(PmuFault));
        }
        *slot = value;
        Some(Ok(()))
    }
}

impl Pmu {
    /// WRMSR of IA32_PERF_GLOBAL_OVF_CTRL: clears the status bits that are 1 in `value`.
    fn clear_status(&mut self, value: u64) -> Result<(), PmuFault> {
        if value & !(pmu::GLOBAL | pmu::STATUS_OTHERS) != 0 {
            return Err(PmuFault);
        }
        self.global_status &= !value;
        Ok(())
    }
}

/// What a counter with this IA32_PERFEVTSELx counts at a privilege level, if anything.
///
/// A counter mask compares the number of events in a cycle (§20.2.1.1). Of cycles there is one
/// in each, so that a mask of 1 (or, inverted, a greater one) counts them all.
fn counted_event(select: u64, user: bool) -> Option<u64> {
    let wanted = if user { sel::USR } else { sel::OS };
    if select & sel::EN == 0 || select & wanted == 0 || select & sel::EDGE != 0 {
        return None;
    }
    let mask = select >> sel::CMASK_SHIFT & 0xff;
    match select & sel::EVENT {
        event::INSTRUCTIONS => (mask == 0).then_some(event::INSTRUCTIONS),
        e @ (event::CORE_CYCLES | event::REFERENCE_CYCLES) => {
            let counts = if select & sel::INV != 0 { mask != 1 } else { mask <= 1 };
            counts.then_some(e)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OS_AND_USER: u64 = sel::EN | sel::OS | sel::USR;

    fn counts(select: u64, user: bool) -> Option<u64> {
        let pmu = Pmu { event_select: [0, select, 0, 0], ..Pmu::default() };
        let sets = pmu.running(pmu::GLOBAL, user);
        match (sets.instructions, sets.cycles) {
            (2, 0) => Some(event::INSTRUCTIONS),
            (0, 2) => Some(event::CORE_CYCLES),
            (0, 0) => None,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn event_selects_say_what_is_counted() {
        // SDM Vol. 3B §20.2.1.1 (fields) and §20.2.1.2 (events).
        let cases = [
            (OS_AND_USER | 0xc0, Some(event::INSTRUCTIONS)),
            (OS_AND_USER | 0x3c, Some(event::CORE_CYCLES)),
            (OS_AND_USER | 0x13c, Some(event::CORE_CYCLES)),
            // EN, then the privilege filters.
            (sel::OS | sel::USR | 0xc0, None),
            (sel::EN | 0xc0, None),
            // Events of leaf 0AH:EBX that are not there, and what is no architectural event.
            (OS_AND_USER | 0x4f2e, None),
            (OS_AND_USER | 0x412e, None),
            (OS_AND_USER | 0x00c4, None),
            (OS_AND_USER | 0x00c5, None),
            (OS_AND_USER | 0x01c0, None),
            (OS_AND_USER, None),
            // One cycle happens in each cycle: CMASK 1 counts it, more never; INV the reverse.
            (OS_AND_USER | 0x3c | 1 << 24, Some(event::CORE_CYCLES)),
            (OS_AND_USER | 0x3c | 2 << 24, None),
            (OS_AND_USER | 0x3c | 1 << 24 | sel::INV, None),
            (OS_AND_USER | 0x3c | 2 << 24 | sel::INV, Some(event::CORE_CYCLES)),
            // INV does nothing without CMASK.
            (OS_AND_USER | 0x3c | sel::INV, Some(event::CORE_CYCLES)),
            (OS_AND_USER | 0xc0 | sel::INV, Some(event::INSTRUCTIONS)),
            // How many instructions retire in a cycle is not known.
            (OS_AND_USER | 0xc0 | 1 << 24, None),
            (OS_AND_USER | 0x3c | 1 << 24 | sel::EDGE, None),
        ];
        for (select, expected) in cases {
            assert_eq!(counts(select, false), expected, "{select:#x}");
            assert_eq!(counts(select, true), expected, "{select:#x}");
        }
        assert_eq!(counts(sel::EN | sel::OS | 0xc0, false), Some(event::INSTRUCTIONS));
        assert_eq!(counts(sel::EN | sel::OS | 0xc0, true), None);
        assert_eq!(counts(sel::EN | sel::USR | 0x3c, false), None);
        assert_eq!(counts(sel::EN | sel::USR | 0x3c, true), Some(event::CORE_CYCLES));
    }

    #[test]
    fn fixed_counters_follow_their_control() {
        // SDM Vol. 3B §20.2.2: OS for counter 0, user for counter 1, both for counter 2.
        let pmu = Pmu { fixed_control: 0x321, ..Pmu::default() };
        assert_eq!(pmu.running(pmu::GLOBAL, false), CounterSets { instructions: 1 << 32, cycles: 1 << 34 });
        assert_eq!(pmu.running(pmu::GLOBAL, true), CounterSets { instructions: 0, cycles: 3 << 33 });
        assert!(pmu.running(0, true).is_empty(), "IA32_PERF_GLOBAL_CTRL is 0");
        assert!(pmu.running(1 << 33, false).is_empty());
    }

    #[test]
    fn overflow_sets_the_status_and_asks_for_an_interrupt_where_enabled() {
        let mut pmu = Pmu { fixed_control: 0x3, ..Pmu::default() };
        pmu.event_select[2] = OS_AND_USER | sel::INT | 0xc0;
        pmu.fixed[0] = pmu::COUNTER - 9;
        pmu.counters[2] = pmu::COUNTER - 19;
        let all = pmu.running(pmu::GLOBAL, false).instructions;
        assert_eq!(all, 1 << 32 | 1 << 2);
        assert_eq!(pmu.room(all), 10);
        pmu.count(all, 9);
        assert_eq!((pmu.global_status, pmu.room(all)), (0, 1));
        pmu.count(all, 1);
        assert_eq!((pmu.fixed[0], pmu.global_status, pmu.interrupt), (0, 1 << 32, false));
        pmu.count(all, 13);
        assert_eq!((pmu.counters[2], pmu.global_status, pmu.interrupt), (3, 1 << 32 | 4, true));
        assert_eq!(pmu.room(0), u64::MAX);
        // PMI of a fixed counter.
        let mut pmu = Pmu { fixed_control: 0xb0, fixed: [0, pmu::COUNTER, 0], ..Pmu::default() };
        pmu.count(1 << 33, 1);
        assert!(pmu.interrupt);
    }

    #[test]
    fn rdpmc_indexes() {
        // SDM Vol. 2B, RDPMC: type in bits 31:16, index in bits 15:0.
        let pmu = Pmu { counters: [1, 2, 3, 4], fixed: [5, 6, 7], ..Pmu::default() };
        for (ecx, value) in [(0, 1), (3, 4), (0x4000_0000, 5), (0x4000_0002, 7)] {
            assert_eq!(pmu.read_counter(ecx), Some(value), "{ecx:#x}");
        }
        for ecx in [4, 0x4000_0003, 0x8000_0000, 0xc000_0000, 0x2000_0000, 0x6000_0000, 0x4001_0000, 0x1_0000]
        {
            assert_eq!(pmu.read_counter(ecx), None, "{ecx:#x}");
        }
    }

    #[test]
    fn registers_keep_what_is_defined_and_refuse_the_rest() {
        let mut pmu = Pmu::default();
        let mut global = 0;
        // (MSR, a good value, what is read back, a bad value).
        let cases = [
            (n::IA32_PERFEVTSEL0 + 3, 0xffdf_ffff, 0xffdf_ffff, 1 << 21),
            (n::IA32_PERFEVTSEL0, 0x53_00c0, 0x53_00c0, 1 << 32),
            (pmu::IA32_A_PMC0 + 1, pmu::COUNTER, pmu::COUNTER, 1 << 48),
            (n::IA32_FIXED_CTR0 + 2, pmu::COUNTER, pmu::COUNTER, 1 << 48),
            (n::IA32_FIXED_CTR_CTRL, 0xbbb, 0xbbb, 0x4),
            (n::IA32_FIXED_CTR_CTRL, 0, 0, 0x1000),
            (n::IA32_PERF_GLOBAL_CTRL, 0x7_0000_000f, 0x7_0000_000f, 1 << 4),
            (n::IA32_PERF_GLOBAL_CTRL, 0, 0, 1 << 35),
            (n::IA32_PERF_GLOBAL_OVF_CTRL, 0xc000_0007_0000_000f, 0, 1 << 61),
        ];
        for (msr, good, read, bad) in cases {
            assert_eq!(pmu.write_msr(msr, good, &mut global), Some(Ok(())), "{msr:#x}");
            assert_eq!(pmu.read_msr(msr, global), Some(read), "{msr:#x}");
            assert_eq!(pmu.write_msr(msr, bad, &mut global), Some(Err(PmuFault)), "{msr:#x}");
            assert_eq!(pmu.read_msr(msr, global), Some(read), "{msr:#x}");
        }
        for (msr, value) in [(n::IA32_PERF_CAPABILITIES, 1 << 13), (n::IA32_PERF_GLOBAL_STAUS, 0)] {
            assert_eq!(pmu.read_msr(msr, global), Some(value));
            assert_eq!(pmu.write_msr(msr, value, &mut global), Some(Err(PmuFault)), "{msr:#x} is read-only");
        }
        for msr in [n::IA32_PMC0 + 4, n::IA32_PERFEVTSEL0 + 4, n::IA32_FIXED_CTR0 + 3, 0x4c5, 0x4c0, 0x391] {
            assert_eq!(pmu.read_msr(msr, global), None, "{msr:#x}");
            assert_eq!(pmu.write_msr(msr, 0, &mut global), None, "{msr:#x}");
        }
    }

    #[test]
    fn legacy_writes_are_sign_extended_from_32_bits() {
        let (mut pmu, mut global) = (Pmu::default(), 0);
        for (value, counter) in
            [(0x7fff_ffff, 0x7fff_ffff), (0x8000_0000, 0xffff_8000_0000), (0xffff_1234_0000_0001, 1)]
        {
            assert_eq!(pmu.write_msr(n::IA32_PMC0 + 1, value, &mut global), Some(Ok(())));
            assert_eq!(pmu.counters[1], counter, "{value:#x}");
            assert_eq!(pmu.read_msr(pmu::IA32_A_PMC0 + 1, global), Some(counter));
        }
    }

    #[test]
    fn overflow_control_clears_the_status() {
        let mut pmu = Pmu { global_status: 0x7_0000_000f, ..Pmu::default() };
        assert_eq!(pmu.write_msr(n::IA32_PERF_GLOBAL_OVF_CTRL, 0x2_0000_0003, &mut 0), Some(Ok(())));
        assert_eq!(pmu.global_status, 0x5_0000_000c);
    }
}
