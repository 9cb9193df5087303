//! The CMOS real-time clock: Motorola MC146818A with a PC's century byte at 0x32 and the memory sizes
//! that PC firmware keeps in its RAM.
//!
//! Time is UTC: the host's at power-on, moved on by the machine's clock and by what
//! the guest sets. Interrupts: periodic, alarm and update-ended, on IRQ 8.
//!
//! Not supported: daylight saving (bit DSE is stored, not applied), square-wave output,
//! battery-low conditions, the second RAM bank at 0x72.

use std::sync::Arc;

use time::{Date, Month, OffsetDateTime, Time, UtcDateTime};

use crate::clock::{Clock, NS_PER_SEC, mul_div, mul_div_up};
use crate::device::{IrqLine, PioDevice, TimedDevice};

const REG_SECONDS: u8 = 0x00;
const REG_SECONDS_ALARM: u8 = 0x01;
const REG_MINUTES: u8 = 0x02;
const REG_MINUTES_ALARM: u8 = 0x03;
const REG_HOURS: u8 = 0x04;
const REG_HOURS_ALARM: u8 = 0x05;
const REG_WEEKDAY: u8 = 0x06;
const REG_DAY: u8 = 0x07;
const REG_MONTH: u8 = 0x08;
const REG_YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;
/// Where a PC keeps the century, as the FADT says.
pub const REG_CENTURY: u8 = 0x32;

const A_UPDATE_IN_PROGRESS: u8 = 0x80;
const B_SET: u8 = 0x80;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
/// Interrupt flags and enables share positions: periodic, alarm, update-ended.
const FLAG_PERIODIC: u8 = 0x40;
const FLAG_ALARM: u8 = 0x20;
const FLAG_UPDATE: u8 = 0x10;
const C_IRQ: u8 = 0x80;
const D_VALID: u8 = 0x80;

/// UIP is set this long before an update (MC146818A, Figure 16: t_BUC).
const UPDATE_NOTICE_NS: u64 = 244_000;
/// After the divider is released the first update comes half a second later.
const DIVIDER_RELEASE_NS: u64 = NS_PER_SEC / 2;
/// Years that the century byte can express, in seconds since 1970.
const MAX_SECONDS: u64 = 253_402_300_799;

/// A date and time in the clock's own fields, always valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fields {
    second: u8,
    minute: u8,
    hour: u8,
    weekday: u8,
    day: u8,
    month: u8,
    year: u8,
    century: u8,
}

impl Fields {
    fn from_seconds(seconds: u64) -> Self {
        let seconds = i64::try_from(seconds.min(MAX_SECONDS)).unwrap_or(0);
        let t = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
        let year = u16::try_from(t.year()).unwrap_or(1970);
        Self {
            second: t.second(),
            minute: t.minute(),
            hour: t.hour(),
            weekday: t.weekday().number_from_sunday(),
            day: t.day(),
            month: u8::from(t.month()),
            year: (year % 100) as u8,
            century: (year / 100) as u8,
        }
    }

    /// Seconds since 1970. Fields that are out of range are brought into it.
    fn to_seconds(self) -> u64 {
        let month = Month::try_from(self.month.clamp(1, 12)).unwrap_or(Month::January);
        let year = i32::from(self.century) * 100 + i32::from(self.year % 100);
        let day = self.day.clamp(1, month.length(year));
        let date = Date::from_calendar_date(year, month, day).unwrap_or(Date::MIN);
        let time = Time::from_hms(self.hour.min(23), self.minute.min(59), self.second.min(59))
            .unwrap_or(Time::MIDNIGHT);
        u64::try_from(UtcDateTime::new(date, time).unix_timestamp()).unwrap_or(0)
    }
}

/// The clock with its 128 bytes of RAM.
pub struct Rtc {
    clock: Arc<dyn Clock>,
    irq: IrqLine,
    /// Wall-clock nanoseconds since 1970 at clock zero, wrapping.
    base_ns: u64,
    index: u8,
    ram: [u8; 128],
    flags: u8,
    /// The fields while updates are stopped (SET, or divider held).
    stopped: Option<Fields>,
    /// Wall-clock time up to which flags have been set.
    seen_ns: u64,
}

impl Rtc {
    /// A clock that shows `utc_ns` (nanoseconds since 1970) now, with the sizes of RAM below and above 4
    /// GiB in bytes for firmware's bytes of the CMOS RAM.
    pub fn new(clock: Arc<dyn Clock>, irq: IrqLine, utc_ns: u64, ram_low: u64, ram_high: u64) -> Self {
        let base_ns = utc_ns.wrapping_sub(clock.now_ns());
        let mut rtc =
            Self { clock, irq, base_ns, index: 0, ram: [0; 128], flags: 0, stopped: None, seen_ns: utc_ns };
        // 32.768 kHz time base, 1024 Hz; 24-hour BCD.
        rtc.ram[usize::from(REG_A)] = 0x26;
        rtc.ram[usize::from(REG_B)] = B_24_HOURS;
        rtc.store_memory_sizes(ram_low, ram_high);
        rtc
    }

    /// What PC firmware stores: base memory in KiB at 0x15, from 1 MiB in KiB at 0x17 and 0x30 (at most 65535),
    /// from 16 MiB in 64 KiB at 0x34, above 4 GiB in 64 KiB at 0x5B.
    fn store_memory_sizes(&mut self, low: u64, high: u64) {
        let kib_above_1m = (low.saturating_sub(1 << 20) >> 10).min(0xffff);
        let blocks_above_16m = (low.saturating_sub(16 << 20) >> 16).min(0xffff);
        let blocks_above_4g = (high >> 16).min(0xff_ffff);
        let mut store = |at: usize, value: u64, bytes: usize| {
            let target = self.ram.iter_mut().skip(at).take(bytes);
            target.zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
        };
        store(0x15, 640, 2);
        store(0x17, kib_above_1m, 2);
        store(0x30, kib_above_1m, 2);
        store(0x34, blocks_above_16m, 2);
        store(0x5b, blocks_above_4g, 3);
    }

    fn byte(&self, register: u8) -> u8 {
        self.ram.get(usize::from(register)).copied().unwrap_or(0)
    }

    fn wall_ns(&self) -> u64 {
        self.base_ns.wrapping_add(self.clock.now_ns())
    }

    fn divider_held(&self) -> bool {
        // DV 11x holds the divider; others than 010 select time bases that a PC does not have.
        self.byte(REG_A) & 0x60 == 0x60
    }

    fn fields(&self) -> Fields {
        self.stopped.unwrap_or_else(|| Fields::from_seconds(self.wall_ns() / NS_PER_SEC))
    }

    // ---- encodings ----------------------------------------------------------------------

    fn encode(&self, value: u8) -> u8 {
        if self.byte(REG_B) & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.byte(REG_B) & B_BINARY != 0 {
            value
        } else {
            (value >> 4).saturating_mul(10).saturating_add(value & 0xf)
        }
    }

    /// Hours: in 12-hour mode bit 7 says afternoon.
    fn encode_hour(&self, hour: u8) -> u8 {
        if self.byte(REG_B) & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.byte(REG_B) & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let afternoon = if value & 0x80 != 0 { 12 } else { 0 };
        self.decode(value & 0x7f) % 12 + afternoon
    }

    // ---- time passing -------------------------------------------------------------------

    /// Frequency of the periodic interrupt in hertz (MC146818A Table 5); `None` when off.
    fn periodic_hz(&self) -> Option<u64> {
        // Rates 1 and 2 are those of 8 and 9 with a 32.768 kHz time base.
        let rate = match self.byte(REG_A) & 0xf {
            0 => return None,
            low @ 1..=2 => low + 7,
            rate => rate,
        };
        Some(32_768 >> (rate - 1))
    }

    /// Whether an alarm byte matches: 11xxxxxx is "don't care".
    fn alarm_matches(&self, register: u8, value: u8) -> bool {
        let alarm = self.byte(register);
        let wanted = if register == REG_HOURS_ALARM { self.decode_hour(alarm) } else { self.decode(alarm) };
        alarm >= 0xc0 || wanted == value
    }

    /// The first second after `seconds` (since 1970) at which the alarm matches.
    fn next_alarm(&self, seconds: u64) -> Option<u64> {
        let mut t = seconds.saturating_add(1);
        // At most 24 steps by hours, 60 by minutes and 60 by seconds lead to a match.
        for _ in 0..200 {
            let (hour, minute, second) = ((t / 3600 % 24) as u8, (t / 60 % 60) as u8, (t % 60) as u8);
            if !self.alarm_matches(REG_HOURS_ALARM, hour) {
                t = (t / 3600 + 1).saturating_mul(3600);
            } else if !self.alarm_matches(REG_MINUTES_ALARM, minute) {
                t = (t / 60 + 1).saturating_mul(60);
            } else if !self.alarm_matches(REG_SECONDS_ALARM, second) {
                t = t.saturating_add(1);
            } else {
                return Some(t);
            }
        }
        None
    }

    /// Sets the flags of what happened since it was last asked.
    fn catch_up(&mut self) {
        let now = self.wall_ns();
        let before = std::mem::replace(&mut self.seen_ns, now);
        if now <= before || self.divider_held() {
            return;
        }
        let ticks = |at, hz| mul_div(at, hz, NS_PER_SEC);
        if self.periodic_hz().is_some_and(|hz| ticks(now, hz) != ticks(before, hz)) {
            self.flags |= FLAG_PERIODIC;
        }
        if self.stopped.is_none() && now / NS_PER_SEC != before / NS_PER_SEC {
            self.flags |= FLAG_UPDATE;
            if self.next_alarm(before / NS_PER_SEC).is_some_and(|at| at <= now / NS_PER_SEC) {
                self.flags |= FLAG_ALARM;
            }
        }
    }

    fn irq_active(&self) -> bool {
        self.flags & self.byte(REG_B) & (FLAG_PERIODIC | FLAG_ALARM | FLAG_UPDATE) != 0
    }

    fn update_irq(&self) {
        self.irq.set(self.irq_active());
    }

    // ---- registers ----------------------------------------------------------------------

    fn read_register(&mut self, register: u8) -> u8 {
        let fields = self.fields();
        match register {
            REG_SECONDS => self.encode(fields.second),
            REG_MINUTES => self.encode(fields.minute),
            REG_HOURS => self.encode_hour(fields.hour),
            REG_WEEKDAY => self.encode(fields.weekday),
            REG_DAY => self.encode(fields.day),
            REG_MONTH => self.encode(fields.month),
            REG_YEAR => self.encode(fields.year),
            REG_CENTURY => self.encode(fields.century),
            REG_A => {
                self.byte(REG_A) & 0x7f | if self.update_in_progress() { A_UPDATE_IN_PROGRESS } else { 0 }
            }
            REG_C => {
                let irq = if self.irq_active() { C_IRQ } else { 0 };
                irq | std::mem::take(&mut self.flags)
            }
            REG_D => D_VALID,
            _ => self.byte(register),
        }
    }

    fn update_in_progress(&self) -> bool {
        self.stopped.is_none() && NS_PER_SEC - self.wall_ns() % NS_PER_SEC <= UPDATE_NOTICE_NS
    }

    fn write_register(&mut self, register: u8, value: u8) {
        match register {
            REG_A | REG_B => self.write_control(register, value),
            // Flags and the battery bit are read-only.
            REG_C | REG_D => {}
            REG_SECONDS | REG_MINUTES | REG_HOURS | REG_WEEKDAY..=REG_YEAR | REG_CENTURY => {
                self.write_time(register, value);
            }
            _ => {
                if let Some(byte) = self.ram.get_mut(usize::from(register)) {
                    *byte = value;
                }
            }
        }
    }

    fn write_time(&mut self, register: u8, value: u8) {
        let mut fields = self.fields();
        match register {
            REG_SECONDS => fields.second = self.decode(value),
            REG_MINUTES => fields.minute = self.decode(value),
            REG_HOURS => fields.hour = self.decode_hour(value),
            REG_WEEKDAY => fields.weekday = self.decode(value),
            REG_DAY => fields.day = self.decode(value),
            REG_MONTH => fields.month = self.decode(value),
            REG_YEAR => fields.year = self.decode(value),
            _ => fields.century = self.decode(value),
        }
        match &mut self.stopped {
            Some(stopped) => *stopped = fields,
            None => self.set_time(fields, self.wall_ns() % NS_PER_SEC),
        }
    }

    /// Makes the clock show `fields` now, `fraction_ns` into that second.
    fn set_time(&mut self, fields: Fields, fraction_ns: u64) {
        let wall = fields.to_seconds().saturating_mul(NS_PER_SEC).saturating_add(fraction_ns);
        self.base_ns = wall.wrapping_sub(self.clock.now_ns());
        self.seen_ns = wall;
    }

    /// Registers A and B: SET and a held divider stop the updates; releasing them starts the time from
    /// what the fields then hold.
    fn write_control(&mut self, register: u8, value: u8) {
        let fields = self.fields();
        let was_held = self.divider_held();
        let fraction = self.wall_ns() % NS_PER_SEC;
        let value = match register {
            REG_A => value & 0x7f,
            // SET clears UIE (MC146818A, register B).
            _ if value & B_SET != 0 => value & !FLAG_UPDATE,
            _ => value,
        };
        if let Some(byte) = self.ram.get_mut(usize::from(register)) {
            *byte = value;
        }
        let stop = self.byte(REG_B) & B_SET != 0 || self.divider_held();
        match (stop, self.stopped) {
            (true, None) => self.stopped = Some(fields),
            (false, Some(fields)) => {
                self.stopped = None;
                self.set_time(fields, if was_held { DIVIDER_RELEASE_NS } else { fraction });
            }
            _ => {}
        }
    }
}

impl PioDevice for Rtc {
    /// Offset 0 is port 0x70 (write-only), offset 1 port 0x71.
    fn read(&mut self, offset: u16, _size: u8) -> u32 {
        if offset == 0 {
            return 0xff;
        }
        self.catch_up();
        let value = self.read_register(self.index);
        self.update_irq();
        value.into()
    }

    fn write(&mut self, offset: u16, _size: u8, value: u32) {
        if offset == 0 {
            // Bit 7 masks NMI on a PC; nothing raises NMI through that gate here.
            self.index = value as u8 & 0x7f;
            return;
        }
        self.catch_up();
        self.write_register(self.index, value as u8);
        self.update_irq();
    }
}

impl TimedDevice for Rtc {
    fn tick(&mut self, now: u64) {
        if self.next_deadline().is_some_and(|at| at <= now) {
            self.catch_up();
            self.update_irq();
        }
    }

    fn next_deadline(&self) -> Option<u64> {
        let enabled = self.byte(REG_B);
        if self.irq_active() || self.divider_held() {
            return None;
        }
        let seconds = self.seen_ns / NS_PER_SEC;
        let running = self.stopped.is_none();
        let periodic = self
            .periodic_hz()
            .filter(|_| enabled & FLAG_PERIODIC != 0)
            .map(|hz| mul_div_up(mul_div(self.seen_ns, hz, NS_PER_SEC) + 1, NS_PER_SEC, hz));
        let update =
            (running && enabled & FLAG_UPDATE != 0).then(|| (seconds + 1).saturating_mul(NS_PER_SEC));
        let alarm = Some(seconds)
            .filter(|_| running && enabled & FLAG_ALARM != 0)
            .and_then(|s| self.next_alarm(s))
            .map(|s| s.saturating_mul(NS_PER_SEC));
        let wall = [periodic, update, alarm].into_iter().flatten().min()?;
        Some(wall.wrapping_sub(self.base_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::device::testing::LineLog;

    /// 2024-02-29 23:59:58 UTC, a Thursday.
    const START: u64 = 1_709_251_198;

    struct Bench {
        rtc: Rtc,
        clock: Arc<ManualClock>,
        line: Arc<LineLog>,
    }

    fn bench() -> Bench {
        let clock = Arc::new(ManualClock::default());
        let line = Arc::new(LineLog::default());
        let irq = IrqLine::new(line.clone(), 8);
        let rtc = Rtc::new(clock.clone(), irq, START * NS_PER_SEC, 3 << 30, 5 << 30);
        Bench { rtc, clock, line }
    }

    impl Bench {
        fn get(&mut self, register: u8) -> u8 {
            self.rtc.write(0, 1, register.into());
            self.rtc.read(1, 1) as u8
        }
        fn set(&mut self, register: u8, value: u8) {
            self.rtc.write(0, 1, register.into());
            self.rtc.write(1, 1, value.into());
        }
        fn now(&mut self) -> [u8; 8] {
            [REG_CENTURY, REG_YEAR, REG_MONTH, REG_DAY, REG_WEEKDAY, REG_HOURS, REG_MINUTES, REG_SECONDS]
                .map(|register| self.get(register))
        }
        fn advance_ms(&mut self, ms: u64) {
            self.clock.advance_ns(ms * 1_000_000);
            self.rtc.tick(self.clock.now_ns());
        }
    }

    #[test]
    fn time_in_bcd_and_over_the_end_of_february() {
        let mut b = bench();
        assert_eq!(b.now(), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x58]);
        b.advance_ms(2_000);
        assert_eq!(b.now(), [0x20, 0x24, 0x03, 0x01, 6, 0x00, 0x00, 0x00]);
    }

    #[test]
    fn binary_and_12_hour_modes() {
        let mut b = bench();
        b.set(REG_B, B_BINARY);
        // 11 pm: 11 with bit 7.
        assert_eq!(b.now(), [20, 24, 2, 29, 5, 0x80 | 11, 59, 58]);
        b.advance_ms(2_000);
        // Midnight is 12 am.
        assert_eq!(b.get(REG_HOURS), 12);
        b.set(REG_HOURS, 0x80 | 12);
        b.set(REG_B, B_24_HOURS);
        assert_eq!(b.get(REG_HOURS), 0x12);
    }

    #[test]
    fn setting_the_time_with_updates_stopped() {
        let mut b = bench();
        b.set(REG_B, B_SET | B_24_HOURS);
        b.advance_ms(5_000);
        assert_eq!(b.get(REG_SECONDS), 0x58, "SET stops the updates");
        for (register, value) in [(REG_YEAR, 0x31), (REG_MONTH, 0x12), (REG_DAY, 0x31), (REG_HOURS, 0x10)] {
            b.set(register, value);
        }
        b.set(REG_B, B_24_HOURS);
        b.advance_ms(3_000);
        // 10:59:58 and three seconds; 2031-12-31 is a Wednesday.
        assert_eq!(b.now(), [0x20, 0x31, 0x12, 0x31, 4, 0x11, 0x00, 0x01]);
    }

    #[test]
    fn impossible_dates_become_possible_ones() {
        let mut b = bench();
        for register in [REG_MONTH, REG_DAY, REG_HOURS, REG_MINUTES, REG_SECONDS, REG_YEAR, REG_CENTURY] {
            b.set(register, 0xff);
        }
        let month = b.get(REG_MONTH);
        assert!((1..=0x12).contains(&month), "{month:#x}");
    }

    #[test]
    fn update_in_progress_shows_before_each_second() {
        // MC146818A Figure 16: 244 µs of notice.
        let mut b = bench();
        assert_eq!(b.get(REG_A), 0x26);
        b.clock.set_ns(NS_PER_SEC - 244_000);
        assert_eq!(b.get(REG_A), 0xa6);
        b.clock.set_ns(NS_PER_SEC);
        assert_eq!(b.get(REG_A), 0x26);
    }

    #[test]
    fn periodic_interrupt() {
        let mut b = bench();
        b.set(REG_B, B_24_HOURS | FLAG_PERIODIC);
        // Rate 6 is 1024 Hz.
        assert_eq!(b.rtc.next_deadline(), Some(976_563));
        b.clock.set_ns(976_563);
        b.rtc.tick(976_563);
        assert!(b.line.level(8));
        assert_eq!(b.rtc.next_deadline(), None, "nothing more until register C is read");
        assert_eq!(b.get(REG_C), C_IRQ | FLAG_PERIODIC);
        assert!(!b.line.level(8));
        assert_eq!(b.get(REG_C), 0);
        assert_eq!(b.rtc.next_deadline(), Some(1_953_125));
    }

    #[test]
    fn flags_are_set_without_their_interrupts() {
        let mut b = bench();
        b.clock.advance_ns(NS_PER_SEC);
        assert_eq!(b.get(REG_C), FLAG_PERIODIC | FLAG_UPDATE);
        assert!(!b.line.level(8));
    }

    #[test]
    fn alarm_interrupt() {
        let mut b = bench();
        b.set(REG_SECONDS_ALARM, 0x30);
        b.set(REG_MINUTES_ALARM, 0x01);
        b.set(REG_HOURS_ALARM, 0xff);
        b.set(REG_B, B_24_HOURS | FLAG_ALARM);
        // At 00:01:30, 92 s from now, and an hour after it again.
        assert_eq!(b.rtc.next_deadline(), Some(92 * NS_PER_SEC));
        b.advance_ms(91_999);
        assert!(!b.line.level(8));
        b.advance_ms(1);
        assert!(b.line.level(8));
        let flags = b.get(REG_C);
        assert_eq!(flags & (C_IRQ | FLAG_ALARM), C_IRQ | FLAG_ALARM);
        assert_eq!(b.rtc.next_deadline(), Some((92 + 3600) * NS_PER_SEC));
    }

    #[test]
    fn an_impossible_alarm_never_comes() {
        let mut b = bench();
        b.set(REG_HOURS_ALARM, 0x25);
        b.set(REG_B, B_24_HOURS | FLAG_ALARM);
        assert_eq!(b.rtc.next_deadline(), None);
    }

    #[test]
    fn update_interrupt_and_set_clears_it() {
        let mut b = bench();
        b.set(REG_B, B_24_HOURS | FLAG_UPDATE);
        assert_eq!(b.rtc.next_deadline(), Some(NS_PER_SEC));
        b.advance_ms(1_000);
        assert_eq!(b.get(REG_C) & (C_IRQ | FLAG_UPDATE), C_IRQ | FLAG_UPDATE);
        b.set(REG_B, B_SET | FLAG_UPDATE);
        assert_eq!(b.get(REG_B), B_SET);
    }

    #[test]
    fn cmos_memory_sizes() {
        let mut b = bench();
        assert_eq!([b.get(0x15), b.get(0x16)], [0x80, 0x02]);
        assert_eq!([b.get(0x30), b.get(0x31)], [0xff, 0xff]);
        // (3 GiB - 16 MiB) / 64 KiB = 0xbf00; 5 GiB / 64 KiB = 0x14000.
        assert_eq!([b.get(0x34), b.get(0x35)], [0x00, 0xbf]);
        assert_eq!([b.get(0x5b), b.get(0x5c), b.get(0x5d)], [0x00, 0x40, 0x01]);
        b.set(0x40, 0x5a);
        assert_eq!((b.get(0x40), b.get(0xc0)), (0x5a, 0x5a));
        assert_eq!(b.get(REG_D), D_VALID);
    }
}
