//! A root port: a function with a type 1 header and one link below it (PCI Express Base Specification 6.0 §7.5.1.3).
//!
//! Not supported: I/O windows, hot plug, interrupts of the port itself, errors. There is at most one device below,
//! with number 0.

use std::sync::{Arc, Mutex};

use super::config::{COMMAND_MASTER, COMMAND_MEMORY, ConfigSpace, Identity};
use super::endpoint::Endpoint;
use super::express::{self, PortType};
use crate::device::lock;

const PRIMARY: usize = 0x18;
const SECONDARY: usize = 0x19;
const SUBORDINATE: usize = 0x1a;
const MEMORY_BASE: usize = 0x20;
const PREFETCH_BASE: usize = 0x24;
const PREFETCH_BASE_HIGH: usize = 0x28;
const PREFETCH_LIMIT_HIGH: usize = 0x2c;
const BRIDGE_CONTROL: usize = 0x3e;
/// Bridge control: secondary bus reset.
const SECONDARY_RESET: u16 = 1 << 6;
/// Bits 15:4 of base and limit registers are address bits 31:20.
const WINDOW_BITS: u32 = 0xfff0_fff0;
/// Prefetchable base and limit, bits 3:0: 64-bit addresses.
const PREFETCH_64: u32 = 0x0001_0001;

/// A vendor's generic root port: Red Hat, as other virtual machine monitors have it.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x000c,
    revision: 0,
    class: 0x06_0400,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// A range of addresses, ends included.
pub type Range = std::ops::RangeInclusive<u64>;

/// A root port and what is below it.
pub struct RootPort {
    config: ConfigSpace,
    child: Arc<Mutex<Endpoint>>,
    /// Secondary bus reset is set.
    in_reset: bool,
}

impl RootPort {
    /// Port `number` with `child` below.
    pub fn new(number: u8, child: Arc<Mutex<Endpoint>>) -> Self {
        let mut c = ConfigSpace::header(&IDENTITY, 1);
        for bus in [PRIMARY, SECONDARY, SUBORDINATE] {
            c.allow(bus, &[0xff]);
        }
        c.allow(MEMORY_BASE, &WINDOW_BITS.to_le_bytes());
        c.set_u32(PREFETCH_BASE, PREFETCH_64);
        c.allow(PREFETCH_BASE, &WINDOW_BITS.to_le_bytes());
        c.allow(PREFETCH_BASE_HIGH, &[0xff; 4]);
        c.allow(PREFETCH_LIMIT_HIGH, &[0xff; 4]);
        // Parity response, SERR#, secondary bus reset.
        c.allow(BRIDGE_CONTROL, &(0b11 | SECONDARY_RESET).to_le_bytes());
        // Windows that are shut: base above limit.
        c.write(MEMORY_BASE, 4, 0x0000_fff0);
        c.write(PREFETCH_BASE, 4, 0x0000_fff0);
        express::add(&mut c, PortType::RootPort, number);
        express::add_access_control(&mut c);
        Self { config: c, child, in_reset: false }
    }

    /// The device below.
    pub fn child(&self) -> &Arc<Mutex<Endpoint>> {
        &self.child
    }

    /// The bus below, if the port has been given one.
    pub fn secondary(&self) -> Option<u8> {
        let bus = self.config.read(SECONDARY, 1) as u8;
        (bus != 0).then_some(bus)
    }

    /// Sets bus numbers and windows, as firmware does. A window is megabytes, both ends included.
    pub fn assign(&mut self, secondary: u8, memory: &Range, prefetchable: &Range) {
        let c = &mut self.config;
        c.write(SECONDARY, 1, secondary.into());
        c.write(SUBORDINATE, 1, secondary.into());
        let window = |r: &Range| (*r.start() >> 16) as u32 & 0xfff0 | *r.end() as u32 & 0xfff0_0000;
        c.write(MEMORY_BASE, 4, window(memory));
        c.write(PREFETCH_BASE, 4, window(prefetchable));
        c.write(PREFETCH_BASE_HIGH, 4, (*prefetchable.start() >> 32) as u32);
        c.write(PREFETCH_LIMIT_HIGH, 4, (*prefetchable.end() >> 32) as u32);
        c.write(super::config::COMMAND, 2, (COMMAND_MEMORY | COMMAND_MASTER).into());
        self.apply();
    }

    /// Reads configuration space.
    pub fn config_read(&self, offset: usize, size: u8) -> u32 {
        self.config.read(offset, size)
    }

    /// Writes configuration space.
    pub fn config_write(&mut self, offset: usize, size: u8, value: u32) {
        self.config.write(offset, size, value);
        self.apply();
    }

    fn apply(&mut self) {
        let reset = self.config.u16(BRIDGE_CONTROL) & SECONDARY_RESET != 0;
        if reset && !self.in_reset {
            lock(&self.child).reset();
        }
        self.in_reset = reset;
        let forwarded = self.config.command() & COMMAND_MASTER != 0;
        lock(&self.child).requester().set_forwarded(forwarded);
    }

    /// Whether the device below answers.
    pub fn link_is_up(&self) -> bool {
        !self.in_reset
    }

    /// Whether a range of addresses is forwarded downstream.
    pub fn forwards(&self, first: u64, size: u64) -> bool {
        let last = first.saturating_add(size.saturating_sub(1));
        let inside = |r: Range| *r.start() <= first && last <= *r.end();
        let on = self.config.command() & COMMAND_MEMORY != 0 && self.link_is_up();
        on && (inside(self.memory_window()) || inside(self.prefetchable_window()))
    }

    fn window(&self, at: usize, base_high: u32, limit_high: u32) -> Range {
        let register = self.config.u32(at);
        let base = u64::from(register & 0xfff0) << 16 | u64::from(base_high) << 32;
        let limit = u64::from(register & 0xfff0_0000 | 0xf_ffff) | u64::from(limit_high) << 32;
        base..=limit
    }

    fn memory_window(&self) -> Range {
        self.window(MEMORY_BASE, 0, 0)
    }

    fn prefetchable_window(&self) -> Range {
        self.window(PREFETCH_BASE, self.config.u32(PREFETCH_BASE_HIGH), self.config.u32(PREFETCH_LIMIT_HIGH))
    }
}
