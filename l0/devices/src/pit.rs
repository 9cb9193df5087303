//! The 8254 interval timer and port 0x61 (Intel 8254 datasheet; 82371AB datasheet for NMI status and
//! control).
//!
//! Channel 0's OUT is IRQ 0, channel 2's gate and OUT are in port 0x61. All six modes, binary
//! and BCD, latch and read-back commands.
//!
//! Not supported: sound from the speaker; a new count written in modes 2 and 3
//! starts at once instead of at the end of the running period; the low phase of
//! IRQ 0 is shown just before its next rising edge; periodic interrupts more often than every 20 µs.

use std::sync::Arc;

use crate::clock::{Clock, NS_PER_SEC, mul_div, mul_div_up};
use crate::device::{IrqLine, PioDevice, TimedDevice};

/// Input clock in hertz.
pub const PIT_HZ: u64 = 1_193_182;
/// IRQ 0 is not raised more often than this.
const MIN_PERIOD_NS: u64 = 20_000;
/// Port 0x61 bit 4 toggles with every DRAM refresh, 15.085 µs apart.
const REFRESH_NS: u64 = 15_085;

/// How a channel's 16-bit count is accessed through its 8-bit port (RW bits).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low,
    High,
    LowHigh,
}

#[derive(Clone, Debug)]
struct Channel {
    mode: u8,
    bcd: bool,
    access: Access,
    /// Count in input clocks, 1 to 65536.
    reload: u64,
    /// When counting (as if) began; `None` before a count or trigger.
    start_ns: Option<u64>,
    /// Elapsed clocks at the moment the gate stopped counting.
    paused_at: Option<u64>,
    gate: bool,
    /// A control word was written, a count not yet.
    null_count: bool,
    write_low: Option<u8>,
    read_high_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: Access::LowHigh,
            reload: 0x1_0000,
            start_ns: None,
            paused_at: None,
            gate,
            null_count: true,
            write_low: None,
            read_high_next: false,
            latched_count: None,
            latched_status: None,
        }
    }

    /// Input clocks since counting began.
    fn elapsed(&self, now: u64) -> Option<u64> {
        let start = self.start_ns?;
        Some(self.paused_at.unwrap_or_else(|| mul_div(now.saturating_sub(start), PIT_HZ, NS_PER_SEC)))
    }

    fn is_triggered_by_gate(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// The level of OUT (8254 datasheet, mode definitions).
    fn out(&self, now: u64) -> bool {
        let Some(elapsed) = self.elapsed(now) else {
            return self.mode != 0;
        };
        match self.mode {
            0 | 1 => elapsed >= self.reload,
            2 => !self.gate || elapsed % self.reload != self.reload - 1,
            3 => !self.gate || elapsed % self.reload < self.reload.div_ceil(2),
            _ => elapsed != self.reload,
        }
    }

    /// The counting element's value.
    fn count(&self, now: u64) -> u16 {
        let value = match self.elapsed(now) {
            None => self.reload,
            Some(elapsed) => match self.mode {
                2 => self.reload - elapsed % self.reload,
                3 => {
                    let half = self.reload.div_ceil(2);
                    (self.reload - elapsed % half * 2 % self.reload) & !1
                }
                _ => self.reload.wrapping_sub(elapsed),
            },
        };
        if self.bcd { to_bcd(value % 10_000) } else { value as u16 }
    }

    fn status(&self, now: u64) -> u8 {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::LowHigh => 3,
        };
        u8::from(self.out(now)) << 7
            | u8::from(self.null_count) << 6
            | access << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    /// A control word for this channel.
    fn program(&mut self, control: u8) {
        self.access = match control >> 4 & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::LowHigh,
        };
        // Modes 6 and 7 are 2 and 3.
        self.mode = match control >> 1 & 7 {
            mode @ 6.. => mode - 4,
            mode => mode,
        };
        self.bcd = control & 1 != 0;
        self.start_ns = None;
        self.paused_at = None;
        self.null_count = true;
        self.write_low = None;
        self.read_high_next = false;
        self.latched_count = None;
        self.latched_status = None;
    }

    fn latch_count(&mut self, now: u64) {
        if self.latched_count.is_none() {
            self.latched_count = Some(self.count(now));
            self.read_high_next = false;
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let value = self.latched_count.unwrap_or_else(|| self.count(now));
        let [low, high] = value.to_le_bytes();
        match self.access {
            Access::Low => {
                self.latched_count = None;
                low
            }
            Access::High => {
                self.latched_count = None;
                high
            }
            Access::LowHigh if std::mem::take(&mut self.read_high_next) => {
                self.latched_count = None;
                high
            }
            Access::LowHigh => {
                self.read_high_next = true;
                low
            }
        }
    }

    /// A byte of the count. Returns whether the count is complete.
    fn write(&mut self, value: u8, now: u64) -> bool {
        let count = match self.access {
            Access::Low => u16::from(value),
            Access::High => u16::from(value) << 8,
            Access::LowHigh => match self.write_low.take() {
                Some(low) => u16::from_le_bytes([low, value]),
                None => {
                    self.write_low = Some(value);
                    if self.mode == 0 {
                        // The first byte stops the count and sets OUT low (mode 0).
                        self.start_ns = None;
                    }
                    return false;
                }
            },
        };
        self.load(count, now);
        true
    }

    fn load(&mut self, count: u16, now: u64) {
        self.reload = match (self.bcd, count) {
            (false, 0) => 0x1_0000,
            (false, n) => n.into(),
            (true, 0) => 10_000,
            (true, n) => from_bcd(n),
        };
        self.null_count = false;
        if !self.is_triggered_by_gate() {
            self.start_ns = Some(now);
            self.paused_at = (!self.gate).then_some(0);
        }
    }

    /// The gate input (8254 datasheet, Figure 21: gate pin operations).
    fn set_gate(&mut self, gate: bool, now: u64) {
        let rising = gate && !self.gate;
        let falling = !gate && self.gate;
        self.gate = gate;
        if rising && matches!(self.mode, 1 | 2 | 3 | 5) && !self.null_count {
            self.start_ns = Some(now);
            self.paused_at = None;
        } else if rising && let Some(elapsed) = self.paused_at.take() {
            self.start_ns = Some(now.saturating_sub(mul_div_up(elapsed, NS_PER_SEC, PIT_HZ)));
        } else if falling && !self.is_triggered_by_gate() {
            self.paused_at = self.elapsed(now);
        }
    }

    /// When OUT next rises after `now`.
    fn next_rise(&self, now: u64) -> Option<u64> {
        if self.paused_at.is_some() {
            return None;
        }
        let start = self.start_ns?;
        let elapsed = self.elapsed(now)?;
        let at = match self.mode {
            0 | 1 => Some(self.reload).filter(|at| *at > elapsed)?,
            2 | 3 => (elapsed / self.reload + 1).saturating_mul(self.reload),
            _ => Some(self.reload + 1).filter(|at| *at > elapsed)?,
        };
        Some(start.saturating_add(mul_div_up(at, NS_PER_SEC, PIT_HZ)))
    }
}

fn to_bcd(value: u64) -> u16 {
    (0..4).fold(0, |acc, digit| acc | ((value / 10u64.pow(digit) % 10) as u16) << (digit * 4))
}

/// Digits above nine count as what they are, as in the hardware's nibble counters; never zero.
fn from_bcd(value: u16) -> u64 {
    let digits = (0..4).rev().fold(0, |acc, digit| acc * 10 + u64::from(value >> (digit * 4) & 0xf));
    digits.max(1)
}

/// The 8254 at 0x40–0x43.
pub struct Pit {
    clock: Arc<dyn Clock>,
    irq: IrqLine,
    channels: [Channel; 3],
    next_irq: Option<u64>,
    /// Port 0x61 bits 1 (speaker) and 3:2 (NMI masks), as written.
    port61: u8,
}

impl Pit {
    /// A timer whose channel 0 drives `irq`. No channel counts yet.
    pub fn new(clock: Arc<dyn Clock>, irq: IrqLine) -> Self {
        Self {
            clock,
            irq,
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            next_irq: None,
            port61: 0,
        }
    }

    /// Channel 0 was programmed: show OUT and plan its next rising edge.
    fn channel0_changed(&mut self, now: u64) {
        self.irq.set(self.channels[0].out(now));
        self.next_irq = self.channels[0].next_rise(now);
    }

    fn write_control(&mut self, value: u8, now: u64) {
        match value >> 6 {
            3 => self.read_back(value, now),
            select => {
                let index = usize::from(select);
                if value & 0x30 == 0 {
                    self.channels[index].latch_count(now);
                } else {
                    self.channels[index].program(value);
                    if index == 0 {
                        self.channel0_changed(now);
                    }
                }
            }
        }
    }

    /// The read-back command: latches counts (bit 5 clear) and statuses (bit 4 clear).
    fn read_back(&mut self, value: u8, now: u64) {
        for (index, channel) in self.channels.iter_mut().enumerate() {
            if value & 2 << index == 0 {
                continue;
            }
            if value & 0x20 == 0 {
                channel.latch_count(now);
            }
            if value & 0x10 == 0 && channel.latched_status.is_none() {
                channel.latched_status = Some(channel.status(now));
            }
        }
    }

    /// Reads port 0x61.
    pub fn read_port61(&self) -> u8 {
        let now = self.clock.now_ns();
        let refresh = ((now / REFRESH_NS) & 1) as u8;
        self.port61 & 0xe
            | u8::from(self.channels[2].gate)
            | refresh << 4
            | u8::from(self.channels[2].out(now)) << 5
    }

    /// Writes port 0x61: bit 0 is channel 2's gate.
    pub fn write_port61(&mut self, value: u8) {
        self.port61 = value & 0xe;
        self.channels[2].set_gate(value & 1 != 0, self.clock.now_ns());
    }
}

impl PioDevice for Pit {
    fn read(&mut self, offset: u16, _size: u8) -> u32 {
        let now = self.clock.now_ns();
        match self.channels.get_mut(usize::from(offset)) {
            Some(channel) => channel.read(now).into(),
            // The control word register can't be read.
            None => 0xff,
        }
    }

    fn write(&mut self, offset: u16, _size: u8, value: u32) {
        let now = self.clock.now_ns();
        let value = value as u8;
        match self.channels.get_mut(usize::from(offset)) {
            Some(channel) => {
                channel.write(value, now);
                if offset == 0 {
                    self.channel0_changed(now);
                }
            }
            None => self.write_control(value, now),
        }
    }
}

impl TimedDevice for Pit {
    fn tick(&mut self, now: u64) {
        let Some(due) = self.next_irq.filter(|due| *due <= now) else {
            return;
        };
        self.irq.set(false);
        self.irq.set(true);
        let next = self.channels[0].next_rise(now);
        self.next_irq = next.map(|n| n.max(due.saturating_add(MIN_PERIOD_NS)));
    }

    fn next_deadline(&self) -> Option<u64> {
        self.next_irq
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::device::testing::LineLog;

    struct Bench {
        pit: Pit,
        clock: Arc<ManualClock>,
        line: Arc<LineLog>,
    }

    fn bench() -> Bench {
        let clock = Arc::new(ManualClock::default());
        let line = Arc::new(LineLog::default());
        let pit = Pit::new(clock.clone(), IrqLine::new(line.clone(), 0));
        Bench { pit, clock, line }
    }

    impl Bench {
        fn out(&mut self, port: u16, value: u32) {
            self.pit.write(port - 0x40, 1, value);
        }
        fn inb(&mut self, port: u16) -> u32 {
            self.pit.read(port - 0x40, 1)
        }
        /// Lets `clocks` of the timer's input pass.
        fn pass(&mut self, clocks: u64) {
            let ns = mul_div_up(clocks, NS_PER_SEC, PIT_HZ);
            self.clock.advance_ns(ns);
            self.pit.tick(self.clock.now_ns());
        }
        fn count(&mut self, channel: u16) -> u32 {
            self.out(0x43, u32::from(channel) << 6);
            self.inb(0x40 + channel) | self.inb(0x40 + channel) << 8
        }
        fn status(&mut self, channel: u16) -> u32 {
            self.out(0x43, 0xe0 | 2 << channel);
            self.inb(0x40 + channel)
        }
        fn rises(&self) -> usize {
            self.line.take().iter().filter(|(_, level)| *level).count()
        }
    }

    #[test]
    fn mode_0_interrupts_on_terminal_count() {
        let mut b = bench();
        b.out(0x43, 0x30);
        b.out(0x40, 0xe8);
        b.out(0x40, 0x03);
        assert_eq!(b.rises(), 0);
        b.pass(400);
        assert_eq!(b.count(0), 600);
        assert_eq!(b.pit.next_deadline(), Some(mul_div_up(1000, NS_PER_SEC, PIT_HZ)));
        b.pass(600);
        assert_eq!(b.rises(), 1);
        // The count goes on, wrapped.
        b.pass(1);
        assert!(b.count(0) >= 0xfffe);
        assert_eq!(b.pit.next_deadline(), None);
    }

    #[test]
    fn mode_2_interrupts_periodically() {
        let mut b = bench();
        b.out(0x43, 0x34);
        b.out(0x40, 0xa9);
        b.out(0x40, 0x04);
        let _ = b.rises();
        for _ in 0..5 {
            let due = b.pit.next_deadline().unwrap();
            b.pit.tick(due - 1);
            assert_eq!(b.rises(), 0);
            b.clock.set_ns(due);
            b.pit.tick(due);
            assert_eq!(b.rises(), 1);
        }
        // 5 periods of 1193 clocks.
        assert_eq!(b.clock.now_ns(), mul_div_up(5 * 1193, NS_PER_SEC, PIT_HZ));
    }

    #[test]
    fn mode_3_out_is_a_square_wave() {
        let mut b = bench();
        b.out(0x43, 0x36);
        b.out(0x40, 100);
        b.out(0x40, 0);
        // Status: OUT, null count clear, access 3, mode 3 (8254 datasheet, read-back).
        assert_eq!(b.status(0), 0x80 | 0x36);
        b.pass(51);
        assert_eq!(b.status(0), 0x36);
        b.pass(50);
        assert_eq!(b.status(0), 0x80 | 0x36);
        // The count goes down by two.
        assert_eq!(b.count(0), 98);
    }

    #[test]
    fn a_latched_count_stays_until_read() {
        let mut b = bench();
        b.out(0x43, 0x34);
        b.out(0x40, 0);
        b.out(0x40, 0);
        b.pass(0x1000);
        b.out(0x43, 0x00);
        b.pass(0x1000);
        // The second latch command is ignored.
        b.out(0x43, 0x00);
        assert_eq!(b.inb(0x40) | b.inb(0x40) << 8, 0xf000);
        assert_eq!(b.inb(0x40) | b.inb(0x40) << 8, 0xe000);
    }

    #[test]
    fn status_says_when_no_count_is_loaded() {
        let mut b = bench();
        b.out(0x43, 0x12);
        assert_eq!(b.status(0), 0x80 | 0x40 | 0x12);
        b.out(0x40, 5);
        assert_eq!(b.status(0) & 0x40, 0);
    }

    #[test]
    fn bcd_counts() {
        let mut b = bench();
        b.out(0x43, 0x31);
        b.out(0x40, 0x00);
        b.out(0x40, 0x10);
        b.pass(1);
        assert_eq!(b.count(0), 0x0999);
    }

    #[test]
    fn channel_2_gate_and_out_are_in_port_61() {
        let mut b = bench();
        b.out(0x43, 0xb0);
        b.out(0x42, 0x64);
        b.out(0x42, 0);
        // Gate low: mode 0 does not count.
        b.pass(1000);
        assert_eq!(b.pit.read_port61() & 0x21, 0);
        assert_eq!(b.count(2), 100);
        b.pit.write_port61(0x01);
        b.pass(50);
        assert_eq!(b.pit.read_port61() & 0x21, 0x01);
        b.pit.write_port61(0x00);
        b.pass(500);
        b.pit.write_port61(0x01);
        b.pass(49);
        assert_eq!(b.pit.read_port61() & 0x21, 0x01);
        b.pass(2);
        assert_eq!(b.pit.read_port61() & 0x21, 0x21);
        // Bits 1 to 3 read back, the refresh bit toggles.
        b.pit.write_port61(0x0e);
        let first = b.pit.read_port61();
        b.clock.advance_ns(REFRESH_NS);
        assert_eq!((first & 0x0f, (first ^ b.pit.read_port61()) & 0x10), (0x0e, 0x10));
    }

    #[test]
    fn mode_1_starts_with_the_gate() {
        let mut b = bench();
        b.out(0x43, 0xb2);
        b.out(0x42, 10);
        b.out(0x42, 0);
        assert_eq!(b.pit.read_port61() & 0x20, 0x20);
        b.pit.write_port61(1);
        assert_eq!(b.pit.read_port61() & 0x20, 0);
        b.pass(10);
        assert_eq!(b.pit.read_port61() & 0x20, 0x20);
    }

    #[test]
    fn a_tiny_period_does_not_occupy_l0() {
        let mut b = bench();
        b.out(0x43, 0x14);
        b.out(0x40, 1);
        let due = b.pit.next_deadline().unwrap();
        b.clock.set_ns(due);
        b.pit.tick(due);
        assert!(b.pit.next_deadline().unwrap() >= due + MIN_PERIOD_NS);
    }
}
