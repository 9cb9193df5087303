//! The I/O APIC: 24 pins, version 0x20 (Intel 82093AA datasheet; the EOI register is that of
//! the later ICH parts, which report the same version).
//!
//! Pins 0–15 are active-high as ISA lines are, pins 16–23 active-low as PCI lines are; the
//! lines handed in say "asserted" or not, and the polarity bit of a redirection entry
//! is applied to the resulting electrical level.
//!
//! An entry goes out as a message; with an IOMMU it may be in its remappable format, which is
//! the IOMMU's to understand ([`entry_message`]).
//!
//! Not supported: arbitration on an APIC bus.

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
/// Vector, delivery mode, destination mode, polarity, trigger, mask, extended destination ID (bits 55:48, as I/O APICs
/// that send messages have it), destination: what software may write (bits 12 and 14 are read-only,
/// 47:17 reserved).
const RTE_WRITABLE: u64 = 0xffff_0000_0001_afff;

/// Where interrupt messages go.
pub trait MessageSink {
    /// Delivers `message`. Returns whether a local APIC accepted it.
    fn deliver(&mut self, message: &InterruptMessage) -> bool;

    /// Delivers what a redirection entry asks for. Returns whether a local APIC accepted it.
    fn deliver_entry(&mut self, entry: u64) -> bool {
        self.deliver(&message(entry))
    }
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
            sink.deliver_entry(entry);
        }
    }

    /// Sends the interrupt of a level-triggered pin that is active, unmasked and not in service.
    fn service_level(&mut self, pin: usize, sink: &mut dyn MessageSink) {
        let (Some(entry), Some(level)) = (self.entries.get_mut(pin), self.level.get(pin)) else {
            return;
        };
        let ready = *entry & (RTE_MASKED | RTE_REMOTE_IRR) == 0;
        let wanted = ready && *entry & RTE_LEVEL != 0 && is_active(*entry, *level);
        if wanted && sink.deliver_entry(*entry) && message(*entry).level {
            *entry |= RTE_REMOTE_IRR;
        }
    }

    /// Sends what level-triggered pins that are active have not sent.
    pub fn service_levels(&mut self, sink: &mut dyn MessageSink) {
        (0..PINS).for_each(|pin| self.service_level(pin, sink));
    }

    /// What the level-triggered pins send, masked ones too; `None` for others.
    pub fn level_messages(&self) -> [Option<InterruptMessage>; PINS] {
        self.entries.map(|entry| Some(message(entry)).filter(|m| m.level))
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

/// The write that a redirection entry becomes on the bus: address and data. Bits 63:48 of the entry are address bits
/// 19:4, bit 11 is address bit 2 (Intel VT-d specification §5.1.5.1); the low bits are those of the data.
pub fn entry_message(entry: u64) -> (u64, u32) {
    let logical = if entry & RTE_LOGICAL != 0 { 1 << 2 } else { 0 };
    let level = if entry & RTE_LEVEL != 0 { 3 << 14 } else { 0 };
    (0xfee0_0000 | entry >> 48 << 4 | logical, entry as u32 & 0x7ff | level)
}

/// What an entry means to local APICs if nothing remaps it.
pub(crate) fn message(entry: u64) -> InterruptMessage {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log {
        messages: Vec<InterruptMessage>,
        reject: bool,
    }

    impl MessageSink for Log {
        fn deliver(&mut self, message: &InterruptMessage) -> bool {
            self.messages.push(*message);
            !self.reject
        }
    }

    fn write_entry(apic: &mut IoApic, pin: u8, entry: u64, log: &mut Log) {
        for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
            apic.mmio_write(REG_SELECT, u32::from(0x10 + pin * 2 + half), log);
            apic.mmio_write(REG_WINDOW, value, log);
        }
    }

    fn read_low(apic: &mut IoApic, pin: u8) -> u32 {
        apic.mmio_write(REG_SELECT, u32::from(0x10 + pin * 2), &mut Log::default());
        apic.mmio_read(REG_WINDOW)
    }

    #[test]
    fn registers_after_reset() {
        // 82093AA §3.2: version with 23 as the last entry, entries masked.
        let mut apic = IoApic::new();
        let mut log = Log::default();
        apic.mmio_write(REG_SELECT, 1, &mut log);
        assert_eq!(apic.mmio_read(REG_WINDOW), 0x0017_0020);
        for pin in 0..24 {
            assert_eq!(read_low(&mut apic, pin), 0x1_0000);
        }
        apic.mmio_write(REG_SELECT, 0, &mut log);
        apic.mmio_write(REG_WINDOW, 0xffff_ffff, &mut log);
        assert_eq!(apic.mmio_read(REG_WINDOW), 0x0f00_0000);
        // Past the last entry there is nothing.
        apic.mmio_write(REG_SELECT, 0x40, &mut log);
        assert_eq!(apic.mmio_read(REG_WINDOW), 0);
    }

    #[test]
    fn reserved_and_read_only_bits() {
        let mut apic = IoApic::new();
        let mut log = Log::default();
        write_entry(&mut apic, 3, u64::MAX, &mut log);
        assert_eq!(read_low(&mut apic, 3), 0x0001_afff);
        apic.mmio_write(REG_SELECT, 0x17, &mut log);
        assert_eq!(apic.mmio_read(REG_WINDOW), 0xffff_0000);
    }

    #[test]
    fn entries_as_messages() {
        // Compatibility format: destination 3, logical, level-triggered, lowest priority, vector 41H.
        let entry = 3 << 56 | RTE_LEVEL | RTE_LOGICAL | RTE_ACTIVE_LOW | 1 << 8 | 0x41;
        assert_eq!(entry_message(entry), (0xfee0_3004, 0xc141));
        // Remappable format (VT-d §5.1.5.1): index 8123H in bits 63:49 and 11, format in bit 48.
        let entry = 0x123 << 49 | 1 << 48 | 1 << 11 | 0x12;
        assert_eq!(entry_message(entry), (0xfee0_0000 | 0x123 << 5 | 1 << 4 | 1 << 2, 0x12));
    }

    #[test]
    fn edges_are_sent_once_and_lost_while_masked() {
        let mut apic = IoApic::new();
        let mut log = Log::default();
        write_entry(&mut apic, 4, 3 << 56 | 0x31, &mut log);
        apic.set_pin(4, true, &mut log);
        apic.set_pin(4, true, &mut log);
        apic.set_pin(4, false, &mut log);
        let expected = InterruptMessage {
            destination: Destination::Physical(3),
            delivery: DeliveryMode::Fixed,
            vector: 0x31,
            level: false,
        };
        assert_eq!(log.messages, [expected]);
        write_entry(&mut apic, 4, RTE_MASKED | 0x31, &mut log);
        apic.set_pin(4, true, &mut log);
        write_entry(&mut apic, 4, 0x31, &mut log);
        assert_eq!(log.messages.len(), 1);
    }

    #[test]
    fn a_level_stays_in_service_until_eoi() {
        let mut apic = IoApic::new();
        let mut log = Log::default();
        write_entry(&mut apic, 9, RTE_LEVEL | RTE_LOGICAL | 1 << 56 | 0x45, &mut log);
        apic.set_pin(9, true, &mut log);
        assert_eq!(log.messages.len(), 1);
        assert_eq!(log.messages[0].destination, Destination::Logical(1));
        assert!(log.messages[0].level);
        assert_eq!(u64::from(read_low(&mut apic, 9)) & RTE_REMOTE_IRR, RTE_REMOTE_IRR);
        // An EOI of another vector does nothing; of this one sends it again.
        apic.end_of_interrupt(0x44, &mut log);
        assert_eq!(log.messages.len(), 1);
        apic.end_of_interrupt(0x45, &mut log);
        assert_eq!(log.messages.len(), 2);
        apic.set_pin(9, false, &mut log);
        // The EOI register does the same.
        apic.mmio_write(REG_EOI, 0x45, &mut log);
        assert_eq!((log.messages.len(), u64::from(read_low(&mut apic, 9)) & RTE_REMOTE_IRR), (2, 0));
    }

    #[test]
    fn a_level_that_nobody_accepts_is_not_in_service() {
        let mut apic = IoApic::new();
        let mut log = Log { reject: true, ..Log::default() };
        write_entry(&mut apic, 9, RTE_LEVEL | 0x45, &mut log);
        apic.set_pin(9, true, &mut log);
        assert_eq!(u64::from(read_low(&mut apic, 9)) & RTE_REMOTE_IRR, 0);
    }

    #[test]
    fn unmasking_an_asserted_level_sends_it_and_edge_mode_ends_it() {
        let mut apic = IoApic::new();
        let mut log = Log::default();
        apic.set_pin(9, true, &mut log);
        write_entry(&mut apic, 9, RTE_LEVEL | 0x45, &mut log);
        assert_eq!(log.messages.len(), 1);
        write_entry(&mut apic, 9, RTE_MASKED | 0x45, &mut log);
        assert_eq!(u64::from(read_low(&mut apic, 9)) & RTE_REMOTE_IRR, 0);
    }

    #[test]
    fn polarity() {
        let mut apic = IoApic::new();
        let mut log = Log::default();
        // A PCI pin is active-low by wire; with the matching entry, asserting interrupts.
        write_entry(&mut apic, 17, RTE_LEVEL | RTE_ACTIVE_LOW | 0x51, &mut log);
        assert!(log.messages.is_empty());
        apic.set_pin(17, true, &mut log);
        assert_eq!(log.messages.len(), 1);
        // An ISA pin with active-low polarity interrupts while idle.
        write_entry(&mut apic, 5, RTE_LEVEL | RTE_ACTIVE_LOW | 0x52, &mut log);
        assert_eq!(log.messages.len(), 2);
    }

    #[test]
    fn nmi_and_broadcast_entries() {
        let mut apic = IoApic::new();
        let mut log = Log::default();
        write_entry(&mut apic, 2, 0xff << 56 | 4 << 8, &mut log);
        apic.set_pin(2, true, &mut log);
        assert_eq!(log.messages[0].delivery, DeliveryMode::Nmi);
        assert_eq!(log.messages[0].destination, Destination::All);
        // Pins that do not exist are nobody's.
        apic.set_pin(24, true, &mut log);
        apic.set_pin(usize::MAX, true, &mut log);
        assert_eq!(log.messages.len(), 1);
    }
}
