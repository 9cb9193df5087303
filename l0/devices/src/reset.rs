//! Reset control register 0xCF9 (82371AB datasheet), port 0x92 (fast A20 and reset) and the POST code port
//! 0x80.
//!
//! Not supported: the difference between soft and hard reset (both reset the machine); masking of
//! address bit 20 (the A20 bit is only stored).

use std::sync::Arc;

use crate::device::{EventSink, MachineEvent, PioDevice};

/// Port of the reset control register.
pub const RESET_PORT: u16 = 0xcf9;
/// The value that resets through [`RESET_PORT`]: hard reset, reset now.
pub const RESET_VALUE: u8 = 0x06;

/// Port 0xCF9. Bit 1 chooses a hard reset, a rising bit 2 resets.
pub struct ResetControl {
    events: Arc<dyn EventSink>,
    value: u8,
}

impl ResetControl {
    /// A register that reports to `events`.
    pub fn new(events: Arc<dyn EventSink>) -> Self {
        Self { events, value: 0 }
    }
}

impl PioDevice for ResetControl {
    fn read(&mut self, _offset: u16, _size: u8) -> u32 {
        self.value.into()
    }

    fn write(&mut self, _offset: u16, _size: u8, value: u32) {
        let value = value as u8;
        let rising = value & !self.value & 4 != 0;
        self.value = value & 0x0e;
        if rising {
            self.value &= !4;
            self.events.signal(MachineEvent::Reset);
        }
    }
}

/// Port 0x92, system control port A.
pub struct Port92 {
    events: Arc<dyn EventSink>,
    value: u8,
}

impl Port92 {
    /// A port that reports to `events`; A20 is on.
    pub fn new(events: Arc<dyn EventSink>) -> Self {
        Self { events, value: 2 }
    }
}

impl PioDevice for Port92 {
    fn read(&mut self, _offset: u16, _size: u8) -> u32 {
        self.value.into()
    }

    fn write(&mut self, _offset: u16, _size: u8, value: u32) {
        let value = value as u8;
        // Bit 0 pulses the processor's INIT on its rising edge.
        if value & !self.value & 1 != 0 {
            self.events.signal(MachineEvent::Reset);
        }
        self.value = value & 0x03;
    }
}

/// Port 0x80: the last POST code. Writing it is also the classic I/O delay.
#[derive(Debug, Default)]
pub struct PostCode {
    value: u8,
}

impl PioDevice for PostCode {
    fn read(&mut self, _offset: u16, _size: u8) -> u32 {
        self.value.into()
    }

    fn write(&mut self, _offset: u16, _size: u8, value: u32) {
        self.value = value as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{lock, testing::EventLog};

    #[test]
    fn cf9_resets_when_bit_2_rises() {
        let log = Arc::new(EventLog::default());
        let mut register = ResetControl::new(log.clone());
        register.write(0, 1, 0x02);
        assert_eq!(register.read(0, 1), 0x02);
        assert!(lock(&log.0).is_empty());
        register.write(0, 1, u32::from(RESET_VALUE));
        assert_eq!(*lock(&log.0), [MachineEvent::Reset]);
    }

    #[test]
    fn port92_resets_on_bit_0_and_keeps_a20() {
        let log = Arc::new(EventLog::default());
        let mut port = Port92::new(log.clone());
        assert_eq!(port.read(0, 1), 2);
        port.write(0, 1, 0);
        assert_eq!(port.read(0, 1), 0);
        port.write(0, 1, 3);
        port.write(0, 1, 3);
        assert_eq!(lock(&log.0).len(), 1);
    }
}
