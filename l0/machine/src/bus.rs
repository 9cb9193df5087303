//! Dispatch of port and memory accesses to devices. What no device claims reads as all
//! ones, and writes to it are dropped, as on a PC.

use std::sync::{Arc, Mutex};

use devices::{MmioDevice, PioDevice, lock};

/// How wide the accesses are that a device takes. The bus splits wider ones into bytes, each going to
/// whatever device its port belongs to, as an ISA bridge does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortWidth {
    /// Bytes only.
    Byte,
    /// 1, 2 and 4 bytes.
    Any,
}

struct PortRange {
    first: u16,
    last: u16,
    width: PortWidth,
    device: Arc<Mutex<dyn PioDevice>>,
}

/// Port I/O space.
#[derive(Default)]
pub struct PioBus {
    /// Sorted by first port, without overlaps.
    ranges: Vec<PortRange>,
}

/// A range could not be claimed: part of it belongs to another device, or it is empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{first:#x}..={last:#x} overlaps another device")]
pub struct Overlap {
    /// First port or address of the range.
    pub first: u64,
    /// Last port or address of the range.
    pub last: u64,
}

impl PioBus {
    /// Gives `device` the ports from `first` on, `count` of them.
    ///
    /// # Errors
    /// [`Overlap`] when one of them is taken, or there are none.
    pub fn claim(
        &mut self,
        first: u16,
        count: u16,
        width: PortWidth,
        device: Arc<Mutex<dyn PioDevice>>,
    ) -> Result<(), Overlap> {
        let last = count.checked_sub(1).and_then(|n| first.checked_add(n));
        let Some(last) = last else {
            return Err(Overlap { first: first.into(), last: u64::from(first) + u64::from(count) });
        };
        let at = self.ranges.partition_point(|r| r.last < first);
        if self.ranges.get(at).is_some_and(|r| r.first <= last) {
            return Err(Overlap { first: first.into(), last: last.into() });
        }
        self.ranges.insert(at, PortRange { first, last, width, device });
        Ok(())
    }

    fn find(&self, port: u16) -> Option<&PortRange> {
        let at = self.ranges.partition_point(|r| r.last < port);
        self.ranges.get(at).filter(|r| r.first <= port)
    }

    fn read_byte(&self, port: u16) -> u32 {
        self.find(port).map_or(0xff, |r| lock(&r.device).read(port - r.first, 1) & 0xff)
    }

    /// Reads `size` (1, 2 or 4) bytes at `port`, zero-extended.
    pub fn read(&self, port: u16, size: u8) -> u32 {
        let mask = size_mask(size) as u32;
        let Some(range) = self.find(port) else {
            return mask;
        };
        if size == 1 || range.width == PortWidth::Any {
            return lock(&range.device).read(port - range.first, size) & mask;
        }
        (0..u16::from(size.min(4))).fold(0, |acc, i| acc | self.read_byte(port.wrapping_add(i)) << (i * 8))
    }

    /// Writes the low `size` (1, 2 or 4) bytes of `value` to `port`.
    pub fn write(&self, port: u16, size: u8, value: u32) {
        let value = value & size_mask(size) as u32;
        let Some(range) = self.find(port) else {
            return;
        };
        if size == 1 || range.width == PortWidth::Any {
            lock(&range.device).write(port - range.first, size, value);
            return;
        }
        for (i, byte) in (0..u16::from(size.min(4))).zip(value.to_le_bytes()) {
            let port = port.wrapping_add(i);
            if let Some(range) = self.find(port) {
                lock(&range.device).write(port - range.first, 1, byte.into());
            }
        }
    }
}

struct MemoryRange {
    first: u64,
    last: u64,
    device: Arc<Mutex<dyn MmioDevice>>,
}

/// Device memory in L1's physical address space.
#[derive(Default)]
pub struct MmioBus {
    /// Sorted by first address, without overlaps.
    ranges: Vec<MemoryRange>,
}

impl MmioBus {
    /// Gives `device` the addresses from `first` on, `len` bytes.
    ///
    /// # Errors
    /// [`Overlap`] when some of them are taken, or there are none.
    pub fn claim(&mut self, first: u64, len: u64, device: Arc<Mutex<dyn MmioDevice>>) -> Result<(), Overlap> {
        let last = len.checked_sub(1).and_then(|n| first.checked_add(n));
        let Some(last) = last else {
            return Err(Overlap { first, last: first.saturating_add(len) });
        };
        let at = self.ranges.partition_point(|r| r.last < first);
        if self.ranges.get(at).is_some_and(|r| r.first <= last) {
            return Err(Overlap { first, last });
        }
        self.ranges.insert(at, MemoryRange { first, last, device });
        Ok(())
    }

    fn find(&self, address: u64) -> Option<&MemoryRange> {
        let at = self.ranges.partition_point(|r| r.last < address);
        self.ranges.get(at).filter(|r| r.first <= address)
    }

    /// Whether a device has `address`.
    pub fn has(&self, address: u64) -> bool {
        self.find(address).is_some()
    }

    /// Reads `size` (1, 2, 4 or 8) bytes at `address`, zero-extended.
    pub fn read(&self, address: u64, size: u8) -> u64 {
        let mask = size_mask(size);
        self.find(address).map_or(mask, |r| lock(&r.device).read(address - r.first, size) & mask)
    }

    /// Writes the low `size` (1, 2, 4 or 8) bytes of `value` to `address`.
    pub fn write(&self, address: u64, size: u8, value: u64) {
        if let Some(r) = self.find(address) {
            lock(&r.device).write(address - r.first, size, value & size_mask(size));
        }
    }
}

/// The low `size` bytes set.
pub(crate) fn size_mask(size: u8) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as its offset, remembers the last write.
    #[derive(Default)]
    struct Echo {
        writes: Vec<(u64, u8, u64)>,
    }

    impl PioDevice for Echo {
        fn read(&mut self, offset: u16, _size: u8) -> u32 {
            0x1111_1100 | u32::from(offset)
        }
        fn write(&mut self, offset: u16, size: u8, value: u32) {
            self.writes.push((offset.into(), size, value.into()));
        }
    }

    impl MmioDevice for Echo {
        fn read(&mut self, offset: u64, _size: u8) -> u64 {
            0x2222_2222_2222_2200 | offset
        }
        fn write(&mut self, offset: u64, size: u8, value: u64) {
            self.writes.push((offset, size, value));
        }
    }

    #[test]
    fn unclaimed_ports_read_as_ones() {
        let bus = PioBus::default();
        assert_eq!(bus.read(0xcf8, 4), 0xffff_ffff);
        assert_eq!(bus.read(0xcfc, 2), 0xffff);
        assert_eq!(bus.read(0xffff, 1), 0xff);
        bus.write(0xffff, 4, 0);
    }

    #[test]
    fn byte_devices_get_wide_accesses_split() {
        let echo = Arc::new(Mutex::new(Echo::default()));
        let mut bus = PioBus::default();
        bus.claim(0x40, 2, PortWidth::Byte, echo.clone()).unwrap();
        // The third and fourth byte are nobody's.
        assert_eq!(bus.read(0x40, 4), 0xffff_0100);
        bus.write(0x40, 2, 0xabcd);
        assert_eq!(lock(&echo).writes, [(0, 1, 0xcd), (1, 1, 0xab)]);
    }

    #[test]
    fn a_wide_access_that_starts_outside_does_not_reach_a_device() {
        // 0xCF8 as a doubleword is the PCI configuration address, not the reset register at 0xCF9.
        let echo = Arc::new(Mutex::new(Echo::default()));
        let mut bus = PioBus::default();
        bus.claim(0xcf9, 1, PortWidth::Byte, echo.clone()).unwrap();
        bus.write(0xcf8, 4, 0x8000_0600);
        assert!(lock(&echo).writes.is_empty());
        bus.write(0xcf9, 1, 6);
        assert_eq!(lock(&echo).writes, [(0, 1, 6)]);
    }

    #[test]
    fn overlaps_are_refused() {
        let echo = Arc::new(Mutex::new(Echo::default()));
        let mut bus = PioBus::default();
        bus.claim(0x60, 1, PortWidth::Byte, echo.clone()).unwrap();
        bus.claim(0x64, 1, PortWidth::Byte, echo.clone()).unwrap();
        assert!(bus.claim(0x5f, 2, PortWidth::Byte, echo.clone()).is_err());
        assert!(bus.claim(0x60, 5, PortWidth::Byte, echo.clone()).is_err());
        assert!(bus.claim(0xffff, 2, PortWidth::Byte, echo.clone()).is_err());
        bus.claim(0x61, 3, PortWidth::Byte, echo).unwrap();
    }

    #[test]
    fn memory_dispatch() {
        let echo = Arc::new(Mutex::new(Echo::default()));
        let mut bus = MmioBus::default();
        bus.claim(0xfec0_0000, 0x1000, echo.clone()).unwrap();
        assert!(bus.claim(0xfec0_0fff, 1, echo.clone()).is_err());
        assert_eq!(bus.read(0xfec0_0010, 4), 0x2222_2210);
        assert_eq!(bus.read(0xfec0_1000, 8), u64::MAX);
        bus.write(0xfec0_0010, 2, 0x12_3456);
        assert_eq!(lock(&echo).writes, [(0x10, 2, 0x3456)]);
    }
}
