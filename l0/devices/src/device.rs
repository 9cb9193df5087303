//! What all devices share: the bus-facing traits, interrupt lines and machine events.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Locks `m`. A panic in another thread while it held the lock does not spread: device
/// state stays valid at every step, so it is used as it is.
pub fn lock<T: ?Sized>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device in port I/O space.
pub trait PioDevice: Send {
    /// Reads `size` (1, 2 or 4) bytes at `offset` from the start of the device's range.
    /// Bits above `size` bytes are ignored by the bus.
    fn read(&mut self, offset: u16, size: u8) -> u32;
    /// Writes the low `size` (1, 2 or 4) bytes of `value`.
    fn write(&mut self, offset: u16, size: u8, value: u32);
}

/// A device in physical memory space.
pub trait MmioDevice: Send {
    /// Reads `size` (1, 2, 4 or 8) bytes at `offset` from the start of the device's range.
    fn read(&mut self, offset: u64, size: u8) -> u64;
    /// Writes the low `size` (1, 2, 4 or 8) bytes of `value`.
    fn write(&mut self, offset: u64, size: u8, value: u64);
}

/// A device that acts on its own when time passes.
pub trait TimedDevice: Send {
    /// Does what is due at `now` (clock nanoseconds).
    fn tick(&mut self, now: u64);
    /// When [`Self::tick`] is next needed, if at all.
    fn next_deadline(&self) -> Option<u64>;
}

/// Something that interrupt lines lead to.
pub trait IrqSink: Send + Sync {
    /// Line `irq` is now asserted (`true`) or not.
    fn set_irq(&self, irq: u32, asserted: bool);
}

/// One interrupt line, held by the device that drives it. Only changes of its level reach the sink.
pub struct IrqLine {
    sink: Arc<dyn IrqSink>,
    irq: u32,
    level: AtomicBool,
}

impl IrqLine {
    /// Line `irq` into `sink`.
    pub fn new(sink: Arc<dyn IrqSink>, irq: u32) -> Self {
        Self { sink, irq, level: AtomicBool::new(false) }
    }

    /// A line that leads nowhere.
    pub fn unconnected() -> Self {
        struct Nowhere;
        impl IrqSink for Nowhere {
            fn set_irq(&self, _irq: u32, _asserted: bool) {}
        }
        Self::new(Arc::new(Nowhere), 0)
    }

    /// Drives the line.
    pub fn set(&self, asserted: bool) {
        if self.level.swap(asserted, Ordering::AcqRel) != asserted {
            self.sink.set_irq(self.irq, asserted);
        }
    }

    /// Asserts and releases the line: an edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// What a guest can ask of the machine as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// ACPI S5: power off.
    PowerOff,
    /// A reset of the whole machine (0xCF9, keyboard controller, port 0x92).
    Reset,
    /// isa-debug-exit was written: end with this exit status.
    DebugExit(u32),
}

/// Receives [`MachineEvent`]s.
pub trait EventSink: Send + Sync {
    /// `event` happened.
    fn signal(&self, event: MachineEvent);
}

#[cfg(test)]
pub(crate) mod testing {
    //! Recorders shared by the unit tests.

    use super::*;

    /// Records every change of a line.
    #[derive(Default)]
    pub struct LineLog(pub Mutex<Vec<(u32, bool)>>);

    impl LineLog {
        /// The recorded changes, emptied.
        pub fn take(&self) -> Vec<(u32, bool)> {
            std::mem::take(&mut lock(&self.0))
        }
        /// The level of `irq` after the last change.
        pub fn level(&self, irq: u32) -> bool {
            lock(&self.0).iter().rev().find(|(i, _)| *i == irq).is_some_and(|(_, l)| *l)
        }
    }

    impl IrqSink for LineLog {
        fn set_irq(&self, irq: u32, asserted: bool) {
            lock(&self.0).push((irq, asserted));
        }
    }

    /// Records machine events.
    #[derive(Default)]
    pub struct EventLog(pub Mutex<Vec<MachineEvent>>);

    impl EventSink for EventLog {
        fn signal(&self, event: MachineEvent) {
            lock(&self.0).push(event);
        }
    }
}
