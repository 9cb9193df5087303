//! A test device for bare-metal test kernels, compatible with QEMU's pc-testdev: a 32-bit latch
//! in port space, interrupt lines driven by port writes, and 64 KiB of memory that is always
//! reached through the bus.
//!
//! Not supported: the page-flush port (0xE4) has no effect that a guest could see, so
//! writes to it are dropped.

use crate::device::{IrqLine, MmioDevice, PioDevice};

/// First port of the latch.
pub const LATCH_PORT: u16 = 0xe0;
/// The latch with its byte-wide mirror at 0xE8 and the flush port between them.
pub const LATCH_PORTS: u16 = 12;
/// First port of the interrupt lines.
pub const IRQ_PORT: u16 = 0x2000;
/// Number of interrupt lines.
pub const IRQ_PORTS: u16 = 24;
/// Where the memory is.
pub const SCRATCH_BASE: u64 = 0xff00_0000;
/// Its size in bytes.
pub const SCRATCH_SIZE: u64 = 0x1_0000;

/// The latch: four bytes at 0xE0–0xE3 and again at 0xE8–0xEB, in all sizes.
#[derive(Debug, Default)]
pub struct TestLatch {
    bytes: [u8; 4],
}

impl TestLatch {
    fn index(offset: u16) -> Option<usize> {
        match offset {
            0..4 | 8..12 => Some(usize::from(offset & 3)),
            _ => None,
        }
    }
}

impl PioDevice for TestLatch {
    fn read(&mut self, offset: u16, size: u8) -> u32 {
        (0..u16::from(size.min(4))).fold(0, |acc, i| {
            let byte = Self::index(offset + i).map_or(0, |index| self.bytes[index]);
            acc | u32::from(byte) << (i * 8)
        })
    }

    fn write(&mut self, offset: u16, size: u8, value: u32) {
        for (i, byte) in (0..u16::from(size.min(4))).zip(value.to_le_bytes()) {
            if let Some(index) = Self::index(offset + i) {
                self.bytes[index] = byte;
            }
        }
    }
}

/// Interrupt lines: a write of non-zero to port `0x2000 + n` asserts line `n`, of zero releases it.
pub struct TestIrqs {
    lines: Vec<IrqLine>,
}

impl TestIrqs {
    /// Drives `lines`, in order.
    pub fn new(lines: Vec<IrqLine>) -> Self {
        Self { lines }
    }
}

impl PioDevice for TestIrqs {
    fn read(&mut self, _offset: u16, _size: u8) -> u32 {
        0
    }

    fn write(&mut self, offset: u16, _size: u8, value: u32) {
        if let Some(line) = self.lines.get(usize::from(offset)) {
            line.set(value != 0);
        }
    }
}

/// The memory.
pub struct TestScratch {
    bytes: Box<[u8]>,
}

impl TestScratch {
    /// Zeroed memory.
    pub fn new() -> Self {
        Self { bytes: vec![0; SCRATCH_SIZE as usize].into() }
    }

    fn range(&mut self, offset: u64, size: u8) -> Option<&mut [u8]> {
        let start = usize::try_from(offset).ok()?;
        self.bytes.get_mut(start..start.checked_add(size.min(8).into())?)
    }
}

impl Default for TestScratch {
    fn default() -> Self {
        Self::new()
    }
}

impl MmioDevice for TestScratch {
    fn read(&mut self, offset: u64, size: u8) -> u64 {
        let Some(bytes) = self.range(offset, size) else {
            return u64::MAX;
        };
        bytes.iter().rev().fold(0, |acc, byte| acc << 8 | u64::from(*byte))
    }

    fn write(&mut self, offset: u64, size: u8, value: u64) {
        if let Some(bytes) = self.range(offset, size) {
            bytes.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::testing::LineLog;
    use std::sync::Arc;

    #[test]
    fn latch_takes_all_sizes_and_mirrors() {
        let mut latch = TestLatch::default();
        latch.write(0, 4, 0x1234_5678);
        assert_eq!(latch.read(0, 4), 0x1234_5678);
        assert_eq!(latch.read(1, 1), 0x56);
        assert_eq!(latch.read(8, 2), 0x5678);
        latch.write(2, 2, 0xabcd);
        latch.write(8, 1, 0xff);
        assert_eq!(latch.read(0, 4), 0xabcd_56ff);
        // The flush port keeps nothing.
        latch.write(4, 4, 0xffff_ffff);
        assert_eq!(latch.read(4, 4), 0);
        assert_eq!(latch.read(0, 4), 0xabcd_56ff);
    }

    #[test]
    fn irq_ports_drive_lines() {
        let log = Arc::new(LineLog::default());
        let mut irqs = TestIrqs::new((0..24).map(|n| IrqLine::new(log.clone(), n)).collect());
        irqs.write(14, 1, 1);
        irqs.write(14, 1, 0);
        irqs.write(200, 1, 1);
        assert_eq!(log.take(), [(14, true), (14, false)]);
    }

    #[test]
    fn scratch_is_bounded_memory() {
        let mut scratch = TestScratch::new();
        scratch.write(0x10, 8, 0x1122_3344_5566_7788);
        assert_eq!(scratch.read(0x10, 8), 0x1122_3344_5566_7788);
        assert_eq!(scratch.read(0x13, 2), 0x4455);
        scratch.write(SCRATCH_SIZE - 4, 8, 0);
        assert_eq!(scratch.read(SCRATCH_SIZE - 4, 8), u64::MAX);
    }
}
