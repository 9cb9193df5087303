//! PCI configuration mechanism #1 (PCI Local Bus Specification 3.0 §3.2.2.3.2) with one function: a host
//! bridge at 00:00.0, so that systems find a PCI that is there and empty instead of warning that there is
//! none.
//!
//! Not supported: devices behind the bridge, base address registers, interrupts, the memory-mapped
//! mechanism. The bridge's registers are read-only.

use crate::device::PioDevice;

/// Port of the configuration address register, which takes 32-bit accesses only.
pub const ADDRESS_PORT: u16 = 0xcf8;
/// First of the four ports of the configuration data window.
pub const DATA_PORT: u16 = 0xcfc;
/// Number of ports of that window.
pub const DATA_PORTS: u16 = 4;

const ADDRESS_ENABLE: u32 = 1 << 31;
/// Enable, bus, device and function, register number (a multiple of 4).
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// Vendor 0x8086, device 0x0D57: the identity other virtual machine monitors use for a bare host bridge.
const BRIDGE_ID: u32 = 0x0d57_8086;
/// Base class 6, subclass 0: host bridge.
const BRIDGE_CLASS: u32 = 0x0600_0000;

/// Configuration address and data registers. Offset 0 is port 0xCF8, offset 4 port 0xCFC.
#[derive(Debug, Default)]
pub struct PciConfig {
    address: u32,
}

impl PciConfig {
    /// The addressed 32-bit register; all ones where there is no function (§6.1).
    fn register(&self) -> u32 {
        if self.address & ADDRESS_ENABLE == 0 || self.address & 0x00ff_ff00 != 0 {
            return u32::MAX;
        }
        match self.address & 0xfc {
            0x00 => BRIDGE_ID,
            0x08 => BRIDGE_CLASS,
            _ => 0,
        }
    }
}

impl PioDevice for PciConfig {
    fn read(&mut self, offset: u16, size: u8) -> u32 {
        match (offset, size) {
            (0, 4) => self.address,
            (4..8, _) => self.register() >> (u32::from(offset & 3) * 8),
            _ => u32::MAX,
        }
    }

    fn write(&mut self, offset: u16, size: u8, value: u32) {
        if (offset, size) == (0, 4) {
            self.address = value & ADDRESS_BITS;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_host_bridge_and_nothing_else() {
        let mut pci = PciConfig::default();
        pci.write(0, 4, 0x8000_0000);
        assert_eq!(pci.read(0, 4), 0x8000_0000);
        assert_eq!(pci.read(4, 4), 0x0d57_8086);
        assert_eq!(pci.read(6, 2), 0x0d57);
        pci.write(0, 4, 0x8000_0008);
        // Class code in the upper three bytes: 06 00 00.
        assert_eq!([7, 6, 5].map(|offset| pci.read(offset, 1) as u8), [6, 0, 0]);
        // Other functions, devices and buses.
        for other in [0x8000_0100, 0x8000_0800, 0x8001_0000] {
            pci.write(0, 4, other);
            assert_eq!(pci.read(4, 4), u32::MAX);
        }
        // Disabled.
        pci.write(0, 4, 0);
        assert_eq!(pci.read(4, 4), u32::MAX);
    }

    #[test]
    fn the_address_register_is_32_bits_wide() {
        let mut pci = PciConfig::default();
        pci.write(0, 1, 0xff);
        assert_eq!(pci.read(0, 4), 0);
        assert_eq!(pci.read(0, 1) as u8, 0xff);
        pci.write(0, 4, u32::MAX);
        assert_eq!(pci.read(0, 4), ADDRESS_BITS);
    }
}
