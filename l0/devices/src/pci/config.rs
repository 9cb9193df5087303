//! The configuration space of a function: registers with their read-only, writable and write-1-to-clear bits, base address
//! registers, and the lists of capabilities (PCI Express Base Specification 6.0 §7.5).
//!
//! Not supported: I/O base address registers, expansion ROMs, CardBus.

/// Size of a configuration space in bytes.
pub const CONFIG_SIZE: usize = 4096;
/// Number of base address registers of an endpoint.
pub const BARS: usize = 6;

const VENDOR: usize = 0x00;
const DEVICE: usize = 0x02;
/// Command register.
pub const COMMAND: usize = 0x04;
/// Status register.
pub const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const CACHE_LINE: usize = 0x0c;
/// Header type.
pub const HEADER_TYPE: usize = 0x0e;
const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
/// Interrupt line: what firmware tells the system, without effect on the device.
pub const INTERRUPT_LINE: usize = 0x3c;
/// Interrupt pin: 1 is INTA.
pub const INTERRUPT_PIN: usize = 0x3d;
/// First byte after the header.
pub const HEADER_END: usize = 0x40;

/// Command: respond to memory accesses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: make requests.
pub const COMMAND_MASTER: u16 = 1 << 2;
/// Command: no INTx.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Memory, bus master, parity response, SERR#, INTx disable.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | COMMAND_MASTER | 1 << 6 | 1 << 8 | COMMAND_INTX_DISABLE;
/// Status: INTx is asserted.
pub const STATUS_INTX: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// BAR bits 2:1: 64 bits wide.
const BAR_64: u32 = 0b100;
const BAR_PREFETCHABLE: u32 = 0b1000;
/// Smallest BAR: smaller regions could not be given to a guest of the guest by pages.
const MIN_BAR: u64 = 4096;

/// What a function says it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, subclass and programming interface, from the high byte on.
    pub class: u32,
    /// Subsystem vendor ID (endpoints only).
    pub subsystem_vendor: u16,
    /// Subsystem ID (endpoints only).
    pub subsystem: u16,
}

/// A region of device memory that a BAR gives an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Size in bytes: a power of two, at least 4096.
    pub size: u64,
    /// Prefetchable: reads have no side effects.
    pub prefetchable: bool,
    /// Takes two registers and may be above 4 GiB.
    pub wide: bool,
}

/// Registers.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Box<[u8]>,
    /// What they are after power-up.
    initial: Box<[u8]>,
    /// Bits that writes change.
    writable: Box<[u8]>,
    bars: [Option<Bar>; BARS],
    /// Where the next capability goes, and where its address has to be written.
    next: usize,
    link: usize,
    next_extended: usize,
    last_extended: Option<usize>,
}

impl ConfigSpace {
    /// The header of a function, of type 0 for an endpoint.
    pub fn endpoint(id: &Identity) -> Self {
        let mut c = Self::header(id, 0);
        c.set_u16(SUBSYSTEM, id.subsystem_vendor);
        c.set_u16(SUBSYSTEM + 2, id.subsystem);
        c
    }

    /// What headers of both types have.
    pub(super) fn header(id: &Identity, kind: u8) -> Self {
        let zeroes = || vec![0u8; CONFIG_SIZE].into_boxed_slice();
        let mut c = Self {
            bytes: zeroes(),
            initial: zeroes(),
            writable: zeroes(),
            bars: [None; BARS],
            next: HEADER_END,
            link: CAPABILITIES,
            next_extended: 0x100,
            last_extended: None,
        };
        c.set_u16(VENDOR, id.vendor);
        c.set_u16(DEVICE, id.device);
        c.put(REVISION, &[id.revision]);
        c.put(CLASS, &id.class.to_le_bytes()[..3]);
        c.put(HEADER_TYPE, &[kind]);
        c.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        c.allow(CACHE_LINE, &[0xff]);
        c.allow(INTERRUPT_LINE, &[0xff]);
        c
    }

    // ---- the device's side --------------------------------------------------------------

    /// The 16-bit register at `offset`; 0 outside.
    pub fn u16(&self, offset: usize) -> u16 {
        self.bytes.get(offset..offset + 2).map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
    }

    /// The 32-bit register at `offset`; 0 outside.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    /// Sets the 16-bit register at `offset`, read-only bits too.
    pub fn set_u16(&mut self, offset: usize, value: u16) {
        self.put(offset, &value.to_le_bytes());
    }

    /// Sets the 32-bit register at `offset`, read-only bits too.
    pub fn set_u32(&mut self, offset: usize, value: u32) {
        self.put(offset, &value.to_le_bytes());
    }

    /// Sets bytes, read-only bits too, also for after a reset.
    pub fn put(&mut self, offset: usize, bytes: &[u8]) {
        for to in [&mut self.bytes, &mut self.initial] {
            if let Some(to) = to.get_mut(offset..offset + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        }
    }

    /// Makes bits writable.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        if let Some(to) = self.writable.get_mut(offset..offset + mask.len()) {
            to.copy_from_slice(mask);
        }
    }

    /// Adds a capability (§7.5.3 ff.) whose bytes after identity and link are `body`, of which the bits in `writable`
    /// can be written. Its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.put(self.link, &[at as u8]);
        self.link = at + 1;
        self.next = (at + 2 + body.len()).next_multiple_of(4);
        let status = self.u16(STATUS) | STATUS_CAPABILITIES;
        self.set_u16(STATUS, status);
        at
    }

    /// Adds an extended capability (§7.6.3) of version 1, as [`Self::add_capability`].
    pub fn add_extended(&mut self, id: u16, body: &[u8], writable: &[u8]) -> usize {
        let at = self.next_extended;
        self.set_u32(at, u32::from(id) | 1 << 16);
        self.put(at + 4, body);
        self.allow(at + 4, writable);
        if let Some(last) = self.last_extended.replace(at) {
            let header = self.u32(last) & 0xf_ffff | (at as u32) << 20;
            self.set_u32(last, header);
        }
        self.next_extended = (at + 4 + body.len()).next_multiple_of(8);
        at
    }

    /// Gives the function a BAR. `index` and, for a wide one, the next must be free.
    pub fn add_bar(&mut self, index: usize, bar: Bar) {
        debug_assert!(bar.size.is_power_of_two() && bar.size >= MIN_BAR);
        let at = BAR0 + 4 * index;
        let kind = if bar.wide { BAR_64 } else { 0 } | if bar.prefetchable { BAR_PREFETCHABLE } else { 0 };
        let mask = !(bar.size.max(MIN_BAR) - 1);
        self.set_u32(at, kind);
        self.allow(at, &(mask as u32).to_le_bytes());
        if bar.wide {
            self.allow(at + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        if let Some(slot) = self.bars.get_mut(index) {
            *slot = Some(bar);
        }
    }

    /// The BARs by index.
    pub fn bars(&self) -> impl Iterator<Item = (usize, Bar)> + '_ {
        self.bars.iter().enumerate().filter_map(|(i, bar)| Some((i, (*bar)?)))
    }

    /// The address in BAR `index`.
    pub fn bar_address(&self, index: usize) -> u64 {
        let at = BAR0 + 4 * index;
        let low = u64::from(self.u32(at) & !0xf);
        match self.bars.get(index) {
            Some(Some(bar)) if bar.wide => low | u64::from(self.u32(at + 4)) << 32,
            _ => low,
        }
    }

    /// Writes the address of BAR `index`, as firmware does.
    pub fn set_bar_address(&mut self, index: usize, address: u64) {
        let at = BAR0 + 4 * index;
        self.write(at, 4, address as u32);
        if self.bars.get(index).is_some_and(|b| b.is_some_and(|b| b.wide)) {
            self.write(at + 4, 4, (address >> 32) as u32);
        }
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.u16(COMMAND)
    }

    // ---- the bus's side -----------------------------------------------------------------

    /// Reads `size` (1, 2 or 4) bytes; zero outside.
    pub fn read(&self, offset: usize, size: u8) -> u32 {
        let bytes = self.bytes.get(offset..offset.saturating_add(usize::from(size.min(4)))).unwrap_or(&[]);
        bytes.iter().rev().fold(0, |value, b| value << 8 | u32::from(*b))
    }

    /// Writes the writable bits among `size` (1, 2 or 4) bytes.
    pub fn write(&mut self, offset: usize, size: u8, value: u32) {
        for (i, new) in value.to_le_bytes().into_iter().enumerate().take(size.into()) {
            let at = offset + i;
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = *old & !mask | new & mask;
            }
        }
    }

    /// Gives writable bits their values after power-up, but for the interrupt line (a function-level reset, §6.6.2).
    pub fn reset(&mut self) {
        let values = self.bytes.iter_mut().zip(self.initial.iter().zip(self.writable.iter()));
        for (at, (byte, (initial, mask))) in values.enumerate() {
            if at != INTERRUPT_LINE {
                *byte = *byte & !mask | initial & mask;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::endpoint(&Identity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 1,
            class: 0x01_0802,
            subsystem_vendor: 0xaaaa,
            subsystem: 0xbbbb,
        })
    }

    #[test]
    fn header_fields_are_where_the_specification_has_them() {
        let c = space();
        assert_eq!(c.read(0, 4), 0x5678_1234);
        // Revision, then the class code from the programming interface up (§7.5.1.1.5, §7.5.1.1.6).
        assert_eq!(c.read(8, 4), 0x0108_0201);
        assert_eq!(c.read(0x2c, 4), 0xbbbb_aaaa);
        assert_eq!((c.read(0xfff, 4), c.read(0x1000, 1)), (0, 0));
    }

    #[test]
    fn a_bar_shows_its_size_when_ones_are_written() {
        let mut c = space();
        c.add_bar(0, Bar { size: 0x4000, prefetchable: false, wide: true });
        c.add_bar(2, Bar { size: 0x1000, prefetchable: true, wide: false });
        for at in [0x10, 0x14, 0x18, 0x1c] {
            c.write(at, 4, u32::MAX);
        }
        assert_eq!([0x10, 0x14, 0x18, 0x1c].map(|at| c.read(at, 4)), [0xffff_c004, u32::MAX, 0xffff_f008, 0]);
        c.set_bar_address(0, 0x12_3456_8000);
        assert_eq!((c.bar_address(0), c.read(0x10, 4)), (0x12_3456_8000, 0x3456_8004));
    }

    #[test]
    fn writes_change_writable_bits_only() {
        let mut c = space();
        c.write(0, 4, 0);
        assert_eq!(c.read(0, 4), 0x5678_1234);
        c.write(COMMAND, 2, 0xffff);
        assert_eq!(c.command(), 0x0546);
        c.write(INTERRUPT_LINE, 1, 11);
        c.reset();
        assert_eq!((c.command(), c.read(INTERRUPT_LINE, 1)), (0, 11));
    }

    proptest::proptest! {
        /// Whatever is written, read-only bits keep their values and writable ones have the last that was written.
        #[test]
        fn writes_of_any_kind_leave_read_only_bits_alone(
            writes in proptest::collection::vec((0..0x120usize, 0..3u8, proptest::prelude::any::<u32>()), 0..40),
        ) {
            let mut c = space();
            c.add_bar(0, Bar { size: 0x4000, prefetchable: false, wide: true });
            c.add_capability(5, &[0x80; 12], &[0x71, 0, 0xfc, 0xff]);
            let fresh = c.clone();
            let mut expected: Vec<u8> = (0..CONFIG_SIZE).map(|at| fresh.read(at, 1) as u8).collect();
            for (at, log2, value) in writes {
                let size = 1u8 << log2;
                c.write(at, size, value);
                for (i, new) in value.to_le_bytes().iter().enumerate().take(size.into()) {
                    let mask = fresh.writable[at + i];
                    expected[at + i] = expected[at + i] & !mask | new & mask;
                }
            }
            let now: Vec<u8> = (0..CONFIG_SIZE).map(|at| c.read(at, 1) as u8).collect();
            proptest::prop_assert!(now == expected);
            c.reset();
            let reset = (0..CONFIG_SIZE).filter(|at| *at != INTERRUPT_LINE);
            proptest::prop_assert!(reset.into_iter().all(|at| c.read(at, 1) == fresh.read(at, 1)));
        }
    }

    #[test]
    fn capabilities_are_linked() {
        let mut c = space();
        assert_eq!(c.u16(STATUS) & STATUS_CAPABILITIES, 0);
        let first = c.add_capability(1, &[0; 6], &[]);
        let second = c.add_capability(0x11, &[1, 2], &[0xff]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_ne!(c.u16(STATUS) & STATUS_CAPABILITIES, 0);
        assert_eq!((c.read(0x34, 1), c.read(0x41, 1), c.read(0x49, 1)), (0x40, 0x48, 0));
        c.write(0x4a, 2, 0);
        assert_eq!(c.read(0x48, 4), 0x0200_0011);
        let first = c.add_extended(0xd, &[0; 4], &[]);
        let second = c.add_extended(3, &[0; 8], &[]);
        assert_eq!((first, second), (0x100, 0x108));
        assert_eq!((c.read(0x100, 4), c.read(0x108, 4)), (0x1081_000d, 0x0001_0003));
    }
}
