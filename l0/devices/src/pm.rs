//! ACPI fixed hardware: the power-management timer, PM1 event and control registers (ACPI
//! Specification 6.5 §4.8.3).
//!
//! The machine is always in ACPI mode (no SMI command port, SCI_EN reads as one).
//!
//! Not supported: sleep states other than S5, general-purpose events, the second (b) register blocks,
//! processor throttling and C-states by port.

use std::sync::Arc;

use crate::clock::{Clock, NS_PER_SEC, mul_div, mul_div_up};
use crate::device::{EventSink, IrqLine, MachineEvent, PioDevice, TimedDevice};

/// First port of the block.
pub const PM_BASE: u16 = 0x600;
/// Ports of the block: event registers at 0, control at 4, timer at 8.
pub const PM_PORTS: u16 = 12;
/// Offset of the PM1a event block in it.
pub const PM1_EVENT: u16 = 0;
/// Offset of the PM1a control block in it.
pub const PM1_CONTROL: u16 = 4;
/// Offset of the timer in it.
pub const PM_TIMER: u16 = 8;
/// SLP_TYP of S5, as the DSDT's `\_S5` names it.
pub const SLP_TYP_S5: u8 = 5;
/// Timer frequency in hertz.
pub const PM_TIMER_HZ: u64 = 3_579_545;

const STS_TIMER: u16 = 1 << 0;
const STS_BUS_MASTER: u16 = 1 << 4;
const STS_GLOBAL: u16 = 1 << 5;
const STS_POWER_BUTTON: u16 = 1 << 8;
const STS_SLEEP_BUTTON: u16 = 1 << 9;
const STS_RTC: u16 = 1 << 10;
const STS_WAKE: u16 = 1 << 15;
const STS_ALL: u16 =
    STS_TIMER | STS_BUS_MASTER | STS_GLOBAL | STS_POWER_BUTTON | STS_SLEEP_BUTTON | STS_RTC | STS_WAKE;
/// Enable bits that exist: timer, global lock, power button, sleep button, RTC.
const EN_ALL: u16 = STS_TIMER | STS_GLOBAL | STS_POWER_BUTTON | STS_SLEEP_BUTTON | STS_RTC;

const CNT_SCI_EN: u16 = 1 << 0;
const CNT_SLP_EN: u16 = 1 << 13;
/// BM_RLD, GBL_RLS (write-only) and SLP_TYP; what is kept of a write.
const CNT_KEPT: u16 = 1 << 1 | 7 << 10;

/// The timer's status bit is set when bit 31 changes (the timer is 32 bits wide).
const TIMER_CARRY: u64 = 1 << 31;

/// The power-management registers.
pub struct PowerManagement {
    clock: Arc<dyn Clock>,
    sci: IrqLine,
    events: Arc<dyn EventSink>,
    status: u16,
    enable: u16,
    control: u16,
    /// Timer carries (changes of bit 31) that are already in the status register.
    carries: u64,
}

impl PowerManagement {
    /// Registers that interrupt through `sci` and report power-off to `events`.
    pub fn new(clock: Arc<dyn Clock>, sci: IrqLine, events: Arc<dyn EventSink>) -> Self {
        Self { clock, sci, events, status: 0, enable: 0, control: 0, carries: 0 }
    }

    /// The user presses the power button.
    pub fn press_power_button(&mut self) {
        self.status |= STS_POWER_BUTTON;
        self.update_sci();
    }

    fn timer(&self) -> u64 {
        mul_div(self.clock.now_ns(), PM_TIMER_HZ, NS_PER_SEC)
    }

    fn update_carry(&mut self) {
        let carries = self.timer() / TIMER_CARRY;
        if carries != self.carries {
            self.carries = carries;
            self.status |= STS_TIMER;
        }
    }

    fn update_sci(&self) {
        self.sci.set(self.status & self.enable & EN_ALL != 0);
    }

    fn write_control(&mut self, value: u16) {
        self.control = value & CNT_KEPT;
        if value & CNT_SLP_EN != 0 && (value >> 10 & 7) as u8 == SLP_TYP_S5 {
            self.events.signal(MachineEvent::PowerOff);
        }
    }

    fn read_byte(&mut self, offset: u16) -> u8 {
        let word = match offset & !1 {
            0 => self.status,
            2 => self.enable,
            4 => self.control | CNT_SCI_EN,
            _ => 0,
        };
        word.to_le_bytes()[usize::from(offset & 1)]
    }
}

impl PioDevice for PowerManagement {
    fn read(&mut self, offset: u16, size: u8) -> u32 {
        if offset >= PM_TIMER {
            return (self.timer() as u32) >> (u32::from(offset - PM_TIMER) * 8).min(31);
        }
        self.update_carry();
        (0..u16::from(size.min(4))).fold(0, |acc, i| acc | u32::from(self.read_byte(offset + i)) << (i * 8))
    }

    /// Status bits are cleared by writing ones. A byte-wide write touches that byte alone.
    fn write(&mut self, offset: u16, size: u8, value: u32) {
        self.update_carry();
        let shift = u32::from(offset & 1) * 8;
        let mask: u32 = match size {
            1 => 0xff,
            2 => 0xffff,
            _ => u32::MAX,
        };
        let aligned = u64::from(value & mask) << shift;
        let written = u64::from(mask) << shift;
        let (low, low_mask) = (aligned as u16, written as u16);
        let (high, high_mask) = ((aligned >> 16) as u16, (written >> 16) as u16);
        match offset & !1 {
            0 => {
                self.status &= !(low & STS_ALL);
                self.enable = self.enable & !high_mask | high & EN_ALL;
            }
            2 => self.enable = self.enable & !low_mask | low & low_mask & EN_ALL,
            4 => self.write_control(self.control & !low_mask | low),
            // The timer can't be written.
            _ => {}
        }
        self.update_sci();
    }
}

impl TimedDevice for PowerManagement {
    fn tick(&mut self, _now: u64) {
        if self.enable & STS_TIMER != 0 {
            self.update_carry();
            self.update_sci();
        }
    }

    fn next_deadline(&self) -> Option<u64> {
        let wanted = self.enable & STS_TIMER != 0 && self.status & STS_TIMER == 0;
        wanted.then(|| mul_div_up((self.carries + 1).saturating_mul(TIMER_CARRY), NS_PER_SEC, PM_TIMER_HZ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::device::{
        lock,
        testing::{EventLog, LineLog},
    };

    struct Bench {
        pm: PowerManagement,
        clock: Arc<ManualClock>,
        line: Arc<LineLog>,
        events: Arc<EventLog>,
    }

    fn bench() -> Bench {
        let clock = Arc::new(ManualClock::default());
        let line = Arc::new(LineLog::default());
        let events = Arc::new(EventLog::default());
        let pm = PowerManagement::new(clock.clone(), IrqLine::new(line.clone(), 9), events.clone());
        Bench { pm, clock, line, events }
    }

    #[test]
    fn timer_runs_at_its_frequency() {
        let mut b = bench();
        b.clock.set_ns(NS_PER_SEC);
        assert_eq!(b.pm.read(PM_TIMER, 4), 3_579_545);
        // Ten minutes: only by then has a 24-bit timer wrapped many times, a 32-bit one not.
        b.clock.set_ns(600 * NS_PER_SEC);
        assert_eq!(b.pm.read(PM_TIMER, 4), 2_147_727_000);
    }

    #[test]
    fn sci_en_is_always_set() {
        let mut b = bench();
        assert_eq!(b.pm.read(PM1_CONTROL, 2), 1);
        b.pm.write(PM1_CONTROL, 2, 0);
        assert_eq!(b.pm.read(PM1_CONTROL, 2), 1);
    }

    #[test]
    fn sleep_type_5_powers_off() {
        // §4.8.3.2.1: SLP_TYPx bits 12:10, SLP_EN bit 13 (write-only).
        let mut b = bench();
        b.pm.write(PM1_CONTROL, 2, 5 << 10);
        b.pm.write(PM1_CONTROL, 2, 1 << 13);
        assert!(lock(&b.events.0).is_empty());
        b.pm.write(PM1_CONTROL, 2, 5 << 10 | 1 << 13);
        assert_eq!(*lock(&b.events.0), [MachineEvent::PowerOff]);
        assert_eq!(b.pm.read(PM1_CONTROL, 2), 5 << 10 | 1);
        // As bytes: the type first, then with the enable bit.
        b.pm.write(PM1_CONTROL + 1, 1, 0x34);
        assert_eq!(lock(&b.events.0).len(), 2);
    }

    #[test]
    fn power_button_interrupts_until_cleared() {
        // §4.8.2.2.1.1, Table 4.11: PWRBTN_STS and PWRBTN_EN are bit 8.
        let mut b = bench();
        b.pm.press_power_button();
        assert!(!b.line.level(9));
        b.pm.write(2, 2, 1 << 8);
        assert!(b.line.level(9));
        assert_eq!(b.pm.read(0, 4), 1 << 24 | 1 << 8);
        // Writing zero clears nothing; a one in the high byte does.
        b.pm.write(0, 2, 0);
        assert!(b.line.level(9));
        b.pm.write(1, 1, 1);
        assert!(!b.line.level(9));
        assert_eq!((b.pm.read(0, 2), b.pm.read(2, 2)), (0, 1 << 8));
    }

    #[test]
    fn timer_carry_interrupts() {
        // §4.8.3.3: TMR_STS is set when the most significant bit changes.
        let mut b = bench();
        b.pm.write(2, 2, 1);
        let due = b.pm.next_deadline().unwrap();
        assert_eq!(due, mul_div_up(1 << 31, NS_PER_SEC, PM_TIMER_HZ));
        b.clock.set_ns(due);
        b.pm.tick(due);
        assert!(b.line.level(9));
        assert_eq!(b.pm.next_deadline(), None);
        b.pm.write(0, 2, 1);
        assert!(!b.line.level(9));
        assert_eq!(b.pm.next_deadline(), Some(mul_div_up(1 << 32, NS_PER_SEC, PM_TIMER_HZ)));
    }

    #[test]
    fn a_32_bit_write_reaches_both_registers() {
        let mut b = bench();
        b.pm.press_power_button();
        b.pm.write(0, 4, 1 << 24 | 1 << 8);
        assert_eq!(b.pm.read(0, 4), 1 << 24);
    }
}
