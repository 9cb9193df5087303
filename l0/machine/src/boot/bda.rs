//! The BIOS data area, as far as kernels read it without calling a BIOS: Xen puts its
//! trampoline below the extended BIOS data area, Linux reserves from there on.
//!
//! Not supported: interrupt vectors; there is no BIOS that they could point to.

use super::BootError;
use super::placement::{LOW_END, Placement};

/// I/O port of the first serial port.
const COM1: usize = 0x400;
/// Segment of the extended BIOS data area.
const EBDA_SEGMENT: usize = 0x40e;
/// Conventional memory in KiB.
const BASE_MEMORY: usize = 0x413;
/// Its length in bytes, and of the interrupt vectors before it.
const END: usize = 0x500;

/// Writes the area, and the first byte of the extended one: its length in KiB.
pub(super) fn write(placement: &Placement<'_>) -> Result<(), BootError> {
    let mut area = [0; END];
    let words = [(COM1, 0x3f8), (EBDA_SEGMENT, (LOW_END >> 4) as u16), (BASE_MEMORY, (LOW_END >> 10) as u16)];
    for (at, value) in words {
        if let Some(slot) = area.get_mut(at..at + 2) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
    }
    placement.write("the BIOS data area", 0, &area)?;
    placement.write("the BIOS data area", LOW_END, &[1])
}
