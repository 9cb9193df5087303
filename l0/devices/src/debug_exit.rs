//! QEMU's isa-debug-exit: a write ends the machine with an exit status.
//!
//! Not supported: choosing another port than the bus maps it at.

use std::sync::Arc;

use crate::device::{EventSink, MachineEvent, PioDevice};

/// Usual first port.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;
/// Number of ports.
pub const DEBUG_EXIT_PORTS: u16 = 4;

/// The device.
pub struct DebugExit {
    events: Arc<dyn EventSink>,
}

impl DebugExit {
    /// A device that reports to `events`.
    pub fn new(events: Arc<dyn EventSink>) -> Self {
        Self { events }
    }
}

impl PioDevice for DebugExit {
    fn read(&mut self, _offset: u16, _size: u8) -> u32 {
        0
    }

    /// Value `v` ends the machine with status `(v << 1) | 1`, never zero.
    fn write(&mut self, _offset: u16, _size: u8, value: u32) {
        self.events.signal(MachineEvent::DebugExit(value << 1 | 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{lock, testing::EventLog};

    #[test]
    fn status_is_odd_and_carries_the_value() {
        let log = Arc::new(EventLog::default());
        let mut device = DebugExit::new(log.clone());
        device.write(0, 1, 0);
        device.write(0, 4, 0x10);
        assert_eq!(*lock(&log.0), [MachineEvent::DebugExit(1), MachineEvent::DebugExit(0x21)]);
    }
}
