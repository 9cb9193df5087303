//! QEMU's firmware-configuration device at ports 0x510 and 0x511 (QEMU documentation,
//! "QEMU Firmware Configuration (fw_cfg) Device").
//!
//! Not supported: the DMA interface (not offered in the ID), writing items, files (the
//! directory is empty).

use std::collections::BTreeMap;

use crate::device::PioDevice;

/// First port: the selector, then data.
pub const FW_CFG_PORT: u16 = 0x510;
/// Number of ports.
pub const FW_CFG_PORTS: u16 = 2;

const KEY_SIGNATURE: u16 = 0x00;
const KEY_ID: u16 = 0x01;
const KEY_RAM_SIZE: u16 = 0x03;
const KEY_CPU_COUNT: u16 = 0x05;
const KEY_MAX_CPUS: u16 = 0x0f;
const KEY_CMDLINE_SIZE: u16 = 0x14;
const KEY_CMDLINE_DATA: u16 = 0x15;
const KEY_FILE_DIRECTORY: u16 = 0x19;

/// The device.
#[derive(Debug)]
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    selected: u16,
    position: usize,
}

impl FwCfg {
    /// Items for a machine with `ram_bytes` of RAM, `cpus` vCPUs and the kernel command line
    /// `cmdline` (an end-of-string byte is added).
    pub fn new(ram_bytes: u64, cpus: u16, cmdline: &str) -> Self {
        let mut command_line = cmdline.as_bytes().to_vec();
        command_line.push(0);
        let size = u32::try_from(command_line.len()).unwrap_or(u32::MAX);
        let items = BTreeMap::from([
            (KEY_SIGNATURE, b"QEMU".to_vec()),
            // Bit 0: the traditional interface.
            (KEY_ID, 1u32.to_le_bytes().to_vec()),
            (KEY_RAM_SIZE, ram_bytes.to_le_bytes().to_vec()),
            (KEY_CPU_COUNT, cpus.to_le_bytes().to_vec()),
            (KEY_MAX_CPUS, cpus.to_le_bytes().to_vec()),
            (KEY_CMDLINE_SIZE, size.to_le_bytes().to_vec()),
            (KEY_CMDLINE_DATA, command_line),
            // The count of files, big-endian.
            (KEY_FILE_DIRECTORY, 0u32.to_be_bytes().to_vec()),
        ]);
        Self { items, selected: 0, position: 0 }
    }

    fn next_byte(&mut self) -> u8 {
        let byte = self.items.get(&self.selected).and_then(|item| item.get(self.position)).copied();
        self.position = self.position.saturating_add(1);
        // Past the end and for unknown items: zero.
        byte.unwrap_or(0)
    }
}

impl PioDevice for FwCfg {
    fn read(&mut self, offset: u16, size: u8) -> u32 {
        match (offset, size) {
            (1, 1) => self.next_byte().into(),
            // The selector is write-only.
            _ => 0,
        }
    }

    fn write(&mut self, offset: u16, size: u8, value: u32) {
        if offset == 0 && size == 2 {
            self.selected = value as u16;
            self.position = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(device: &mut FwCfg, key: u16, len: usize) -> Vec<u8> {
        device.write(0, 2, key.into());
        (0..len).map(|_| device.read(1, 1) as u8).collect()
    }

    #[test]
    fn basic_keys() {
        let mut device = FwCfg::new(1 << 30, 3, "console=ttyS0");
        assert_eq!(item(&mut device, KEY_SIGNATURE, 4), b"QEMU");
        assert_eq!(item(&mut device, KEY_ID, 4), [1, 0, 0, 0]);
        assert_eq!(item(&mut device, KEY_RAM_SIZE, 8), (1u64 << 30).to_le_bytes());
        assert_eq!(item(&mut device, KEY_CPU_COUNT, 2), [3, 0]);
        assert_eq!(item(&mut device, KEY_MAX_CPUS, 2), [3, 0]);
        assert_eq!(item(&mut device, KEY_CMDLINE_SIZE, 4), [14, 0, 0, 0]);
        assert_eq!(item(&mut device, KEY_CMDLINE_DATA, 14), b"console=ttyS0\0");
        assert_eq!(item(&mut device, KEY_FILE_DIRECTORY, 4), [0; 4]);
    }

    #[test]
    fn reads_past_the_end_and_of_unknown_items_give_zero() {
        let mut device = FwCfg::new(0, 1, "");
        assert_eq!(item(&mut device, KEY_SIGNATURE, 6), b"QEMU\0\0");
        assert_eq!(item(&mut device, 0x7777, 2), [0, 0]);
        // A byte-wide write does not select.
        device.write(0, 1, 0);
        assert_eq!(device.read(1, 1), 0);
    }
}
