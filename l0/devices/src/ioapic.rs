//! The I/O APIC: 24 pins, version 0x20 (Intel 82093AA datasheet; the EOI register is that of
//! the later ICH parts, which report the same version).
//!
//! Pins 0–15 are active-high as ISA lines are, pins 16–23 active-low as PCI lines are; the
//! lines handed in say "asserted" or not, and the polarity bit of a redirection entry
//! is applied to the resulting electrical level.
//!
//! Not supported: the interrupt-remapping format of redirection entries, arbitration on an
//! APIC bus.

use crate::message::{DeliveryMode, Destination, InterruptMessage};

/// Number of pins.
pub const PINS: usize = 24;
/// Where its registers are in physical memory.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Size of its register window in bytes.
pub const IOAPIC_SIZE: u64 = 0x1000;

const REG_SELECT: u64 = 0x00;
const REG_WINDOW: u64 = 0x10;
const REG_EOI: u64 = 0x40;

const INDEX_ID: u8 = 0;
const INDEX_VERSION: u8 = 1;
const INDEX_ARBITRATION: u8 = 2;
const INDEX_REDIRECTION: u8 = 0x10;

/// Version 0x20; bits 23:16 hold the number of the last entry.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

const RTE_LOGICAL: u64 = 1 << 11;
const RTE_ACTIVE_LOW: u64 = 1 << 13;
const RTE_REMOTE_IRR: u64 = 1 << 14;
const RTE_LEVEL: u64 = 1 << 15;
const RTE_MASKED: u64 = 1 << 16;
/// Vector, delivery mode, destination mode, polarity, trigger, mask, destination: what
/// software may write (bits 12 and 14 are read-only, 55:17 reserved).
const RTE_WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Where interrupt messages go.
pub trait MessageSink {
    /// Delivers `message`. Returns whether a local APIC accepted it.
    fn deliver(&mut self, message: &InterruptMessage) -> bool;
}

/// An I/O APIC.
#[derive(Debug)]
pub struct IoApic {
    id: u32,
    select: u8,
    entries: [u64; PINS],
    /// Electrical level of each pin.
    level: [bool; PINS],
}

impl IoApic {
    /// An I/O APIC after reset: every pin masked, every line idle.
    pub fn new() -> Self {
        let mut level = [false; PINS];
        level[16..].fill(true);
        Self { id: 0, select: 0, entries: [RTE_MASKED; PINS], level }
    }

    /// Hardware reset: registers as after power-up, pin levels stay.
    pub fn reset(&mut self) {
        self.id = 0;
        self.select = 0;
        self.entries = [RTE_MASKED; PINS];
    }

    /// Drives `pin`; pins that do not exist are ignored.
    pub fn set_pin(&mut self, pin: usize, asserted: bool, sink: &mut dyn MessageSink) {
        let active_low_wire = pin >= 16;
        let level = asserted != active_low_wire;
        let Some(old) = self.level.get_mut(pin).map(|l| std::mem::replace(l, level)) else {
            return;
        };
        let entry = self.entries[pin];
        if entry & RTE_LEVEL != 0 {
            self.service_level(pin, sink);
        } else if old != level && is_active(entry, level) && entry & RTE_MASKED == 0 {
            // An edge on a masked pin is lost (82093AA §3.2.4, interrupt mask).
            sink.deliver(&message(entry));
        }
    }

    /// Sends the interrupt of a level-triggered pin that is active, unmasked and not in service.
    fn service_level(&mut self, pin: usize, sink: &mut dyn MessageSink) {
        let (Some(entry), Some(level)) = (self.entries.get_mut(pin), self.level.get(pin)) else {
            return;
        };
        let ready = *entry & (RTE_MASKED | RTE_REMOTE_IRR) == 0;
        if ready && *entry & RTE_LEVEL != 0 && is_active(*entry, *level) {
            let message = message(*entry);
            if sink.deliver(&message) && message.level {
                *entry |= RTE_REMOTE_IRR;
            }
        }
    }

    /// A local APIC (or the EOI register) ended interrupt `vector`: clears Remote IRR and sends again
    /// what is still asserted.
    pub fn end_of_interrupt(&mut self, vector: u8, sink: &mut dyn MessageSink) {
        for pin in 0..PINS {
            let entry = &mut self.entries[pin];
            if *entry & RTE_REMOTE_IRR != 0 && *entry as u8 == vector {
                *entry &= !RTE_REMOTE_IRR;
                self.service_level(pin, sink);
            }
        }
    }

    /// Reads the register window. Registers are 32 bits wide; other sizes see their low part.
    pub fn mmio_read(&self, offset: u64) -> u32 {
        match offset {
            REG_SELECT => self.select.into(),
            REG_WINDOW => self.read_indexed(),
            _ => 0,
        }
    }

    /// Writes the register window.
    pub fn mmio_write(&mut self, offset: u64, value: u32, sink: &mut dyn MessageSink) {
        match offset {
            REG_SELECT => self.select = value as u8,
            REG_WINDOW => self.write_indexed(value, sink),
            REG_EOI => self.end_of_interrupt(value as u8, sink),
            _ => {}
        }
    }

    /// The pin that the selected index belongs to, and whether it is the entry's high half.
    fn selected_entry(&self) -> Option<(usize, bool)> {
        let index = self.select.checked_sub(INDEX_REDIRECTION)?;
        let pin = usize::from(index / 2);
        (pin < PINS).then_some((pin, index % 2 == 1))
    }

    fn read_indexed(&self) -> u32 {
        match self.select {
            INDEX_ID | INDEX_ARBITRATION => self.id << 24,
            INDEX_VERSION => VERSION,
            _ => match self.selected_entry() {
                Some((pin, true)) => (self.entries[pin] >> 32) as u32,
                Some((pin, false)) => self.entries[pin] as u32,
                None => 0,
            },
        }
    }

    fn write_indexed(&mut self, value: u32, sink: &mut dyn MessageSink) {
        if self.select == INDEX_ID {
            self.id = value >> 24 & 0xf;
            return;
        }
        let Some((pin, high)) = self.selected_entry() else {
            return;
        };
        let entry = &mut self.entries[pin];
        let value = u64::from(value);
        let wanted =
            if high { *entry & 0xffff_ffff | value << 32 } else { *entry & 0xffff_ffff_0000_0000 | value };
        *entry = wanted & RTE_WRITABLE | *entry & RTE_REMOTE_IRR;
        // Remote IRR has no meaning for edge-triggered pins; switching to edge clears it, and
        // system software relies on that to end an interrupt (82093AA §3.2.4).
        if *entry & RTE_LEVEL == 0 {
            *entry &= !RTE_REMOTE_IRR;
        }
        self.service_level(pin, sink);
    }
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

fn is_active(entry: u64, level: bool) -> bool {
    level != (entry & RTE_ACTIVE_LOW != 0)
}

fn message(entry: u64) -> InterruptMessage {
    // Reserved encodings behave as fixed; start-up IPIs do not come from pins.
    let delivery = match DeliveryMode::from_bits(entry >> 8) {
        Some(DeliveryMode::StartUp) | None => DeliveryMode::Fixed,
        Some(mode) => mode,
    };
    let is_vectored = matches!(delivery, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
    InterruptMessage {
        destination: Destination::from_xapic((entry >> 56) as u8, entry & RTE_LOGICAL != 0),
        delivery,
        vector: entry as u8,
        level: is_vectored && entry & RTE_LEVEL != 0,
    }
}
