//! A function with a type 0 header: its capabilities, MSI-X table, power states and function-level reset around a
//! device of which only the registers in BARs differ (PCI Express Base Specification 6.0 §7.5).
//!
//! Not supported: advanced error reporting, virtual channels, SR-IOV, address translation services, power states
//! D1, D2 and D3cold, PME.

use std::sync::Arc;

use memory::dma::Requester;
use x86_spec::pci::Bdf;

use super::config::{
    Bar, COMMAND_INTX_DISABLE, COMMAND_MASTER, COMMAND_MEMORY, ConfigSpace, INTERRUPT_LINE, INTERRUPT_PIN,
    Identity, STATUS, STATUS_INTX,
};
use super::express::{self, PortType};
use super::signals::{ENTRY_SIZE, MsiState, Signals};

const CAP_POWER: u8 = 0x01;
const CAP_MSI: u8 = 0x05;
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;

const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_FUNCTION_MASK: u16 = 1 << 14;

/// Power management capabilities: version 3, no PME, D0 and D3hot only (§7.5.2.1).
const POWER_CAPABILITIES: u16 = 3;
/// Control/status: No_Soft_Reset, so that D3hot loses nothing (§7.5.2.2).
const POWER_NO_SOFT_RESET: u16 = 1 << 3;
const POWER_STATE: u16 = 3;

/// The registers of a device, in its BARs.
pub trait Registers: Send {
    /// Reads `size` (1, 2 or 4) bytes at `offset` of BAR `bar`, zero-extended.
    fn read(&mut self, bar: usize, offset: u64, size: u8) -> u32;
    /// Writes the low `size` (1, 2 or 4) bytes of `value`.
    fn write(&mut self, bar: usize, offset: u64, size: u8, value: u32);
    /// Goes back to the state after power-up. Work under way has no effect on the guest's memory any more.
    fn reset(&mut self);
}

/// Where the MSI-X table and its pending bits are.
#[derive(Clone, Copy, Debug)]
pub struct MsixLayout {
    /// The BAR.
    pub bar: usize,
    /// Offset of the table in it.
    pub table: u64,
    /// Offset of the pending bits in it.
    pub pending: u64,
    /// Number of entries.
    pub vectors: u16,
}

impl MsixLayout {
    fn table_end(&self) -> u64 {
        self.table + u64::from(self.vectors) * ENTRY_SIZE
    }
    fn pending_end(&self) -> u64 {
        self.pending + u64::from(self.vectors).div_ceil(64) * 8
    }
}

/// A window of the configuration space into the BARs, as virtio has one (VIRTIO_PCI_CAP_PCI_CFG): `bar`, `offset` and
/// `length` select, `data` reads and writes.
#[derive(Clone, Copy, Debug)]
struct Window {
    bar: usize,
    offset: usize,
    length: usize,
    data: usize,
}

/// What an endpoint is made of.
pub struct EndpointConfig {
    /// Who it is.
    pub identity: Identity,
    /// Its BARs with their indices.
    pub bars: Vec<(usize, Bar)>,
    /// Its MSI-X table.
    pub msix: Option<MsixLayout>,
    /// Whether it has an MSI capability, too.
    pub msi: bool,
    /// Whether it is behind a root port, or else part of the root complex.
    pub behind_port: bool,
    /// Its interrupt line and pin, if it has a wire: the number that firmware tells the system.
    pub interrupt_line: Option<u8>,
    /// Vendor-specific capabilities: what follows the link.
    pub vendor_capabilities: Vec<Vec<u8>>,
    /// Whether the last of these is a window of virtio's.
    pub window: bool,
}

/// A function with a type 0 header.
pub struct Endpoint {
    config: ConfigSpace,
    requester: Arc<Requester>,
    signals: Arc<Signals>,
    registers: Box<dyn Registers>,
    msix: Option<(usize, MsixLayout)>,
    msi: Option<usize>,
    power: usize,
    express: usize,
    window: Option<Window>,
}

impl Endpoint {
    /// A function whose BARs hold `registers`.
    pub fn new(
        config: EndpointConfig,
        requester: Arc<Requester>,
        signals: Arc<Signals>,
        registers: Box<dyn Registers>,
    ) -> Self {
        let mut c = ConfigSpace::endpoint(&config.identity);
        for (index, bar) in &config.bars {
            c.add_bar(*index, *bar);
        }
        if let Some(line) = config.interrupt_line {
            c.put(INTERRUPT_LINE, &[line]);
            c.put(INTERRUPT_PIN, &[1]);
        }
        let [p0, p1] = POWER_CAPABILITIES.to_le_bytes();
        let [s0, s1] = POWER_NO_SOFT_RESET.to_le_bytes();
        let power = c.add_capability(CAP_POWER, &[p0, p1, s0, s1, 0, 0], &[0, 0, POWER_STATE as u8]);
        let kind =
            if config.behind_port { PortType::Endpoint } else { PortType::RootComplexIntegratedEndpoint };
        let express = express::add(&mut c, kind, 0);
        let msix = config.msix.map(|layout| (add_msix(&mut c, &layout), layout));
        let msi = config.msi.then(|| add_msi(&mut c));
        let mut last = 0;
        for capability in &config.vendor_capabilities {
            last = c.add_capability(CAP_VENDOR, capability, &[]);
        }
        let window = config.window.then(|| add_window(&mut c, last));
        Self { config: c, requester, signals, registers, msix, msi, power, express, window }
    }

    /// Its requester ID.
    pub fn requester(&self) -> &Arc<Requester> {
        &self.requester
    }

    /// The configuration space, for firmware.
    pub fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    /// The addresses that it answers to now: BAR, first address, size.
    pub fn decodes(&self) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
        let on = self.config.command() & COMMAND_MEMORY != 0 && self.is_powered();
        self.config
            .bars()
            .filter(move |_| on)
            .map(|(index, bar)| (index, self.config.bar_address(index), bar.size))
    }

    /// Whether it is in D0.
    fn is_powered(&self) -> bool {
        self.config.u16(self.power + 4) & POWER_STATE == 0
    }

    // ---- configuration ------------------------------------------------------------------

    /// Reads configuration space.
    pub fn config_read(&mut self, offset: usize, size: u8) -> u32 {
        if let Some((bar, at, length)) = self.windowed(offset, size) {
            return self.read(bar, at, length) as u32;
        }
        let status = self.config.u16(STATUS) & !STATUS_INTX;
        let status = status | if self.signals.wire_wanted() { STATUS_INTX } else { 0 };
        self.config.set_u16(STATUS, status);
        self.config.read(offset, size)
    }

    /// Writes configuration space as function `bdf`.
    pub fn config_write(&mut self, bdf: Bdf, offset: usize, size: u8, value: u32) {
        self.requester.set(bdf);
        if let Some((bar, at, length)) = self.windowed(offset, size) {
            self.write(bar, at, length, value.into());
            return;
        }
        self.config.write(offset, size, value);
        if express::take_function_reset(&mut self.config, self.express) {
            self.reset();
            return;
        }
        self.apply();
    }

    /// Has what the registers say take effect.
    pub fn apply(&mut self) {
        let command = self.config.command();
        self.requester.set_master(command & COMMAND_MASTER != 0 && self.is_powered());
        self.signals.set_intx_disabled(command & COMMAND_INTX_DISABLE != 0);
        if let Some(at) = self.msi {
            let c = &self.config;
            self.signals.set_msi(MsiState {
                enabled: c.u16(at + 2) & 1 != 0,
                address: u64::from(c.u32(at + 4)) | u64::from(c.u32(at + 8)) << 32,
                data: c.u16(at + 12),
            });
        }
        if let Some((at, _)) = self.msix {
            let control = self.config.u16(at + 2);
            self.signals.set_msix(control & MSIX_ENABLE != 0, control & MSIX_FUNCTION_MASK != 0);
        }
    }

    /// A reset of the function or of its bus: everything but what firmware said is as after power-up.
    pub fn reset(&mut self) {
        self.registers.reset();
        self.signals.reset();
        self.config.reset();
        self.apply();
    }

    /// What an access to the window's data leads to: BAR, offset, size.
    fn windowed(&self, offset: usize, size: u8) -> Option<(usize, u64, u8)> {
        let w = self.window.filter(|w| w.data == offset)?;
        let length = self.config.u32(w.length);
        let at = u64::from(self.config.u32(w.offset));
        let bar = self.config.read(w.bar, 1) as usize;
        let valid =
            matches!(length, 1 | 2 | 4) && length == u32::from(size) && at.is_multiple_of(length.into());
        let inside = self.config.bars().any(|(i, b)| i == bar && at < b.size);
        (valid && inside).then_some((bar, at, size))
    }

    // ---- BARs ---------------------------------------------------------------------------

    /// Reads `size` (1, 2, 4 or 8) bytes of a BAR.
    pub fn read(&mut self, bar: usize, offset: u64, size: u8) -> u64 {
        if size == 8 {
            let low = self.read(bar, offset, 4);
            return low | self.read(bar, offset.wrapping_add(4), 4) << 32;
        }
        if let Some((_, m)) = self.msix.filter(|(_, m)| m.bar == bar) {
            let read = if (m.table..m.table_end()).contains(&offset) {
                Some(self.signals.read_table((offset - m.table) & !3))
            } else if (m.pending..m.pending_end()).contains(&offset) {
                Some(self.signals.read_pending((offset - m.pending) & !3))
            } else {
                None
            };
            if let Some(value) = read {
                return u64::from(value >> ((offset & 3) * 8));
            }
        }
        self.registers.read(bar, offset, size).into()
    }

    /// Writes `size` (1, 2, 4 or 8) bytes of a BAR.
    pub fn write(&mut self, bar: usize, offset: u64, size: u8, value: u64) {
        if size == 8 {
            self.write(bar, offset, 4, value & 0xffff_ffff);
            self.write(bar, offset.wrapping_add(4), 4, value >> 32);
            return;
        }
        if let Some((_, m)) = self.msix.filter(|(_, m)| m.bar == bar) {
            if (m.table..m.table_end()).contains(&offset) {
                // Software writes aligned doublewords or quadwords (§7.7.2); others are dropped.
                if size == 4 && offset.is_multiple_of(4) {
                    self.signals.write_table(offset - m.table, value as u32);
                }
                return;
            }
            if (m.pending..m.pending_end()).contains(&offset) {
                return;
            }
        }
        self.registers.write(bar, offset, size, value as u32);
    }
}

/// Adds the MSI-X capability (§7.7.2); its offset.
fn add_msix(c: &mut ConfigSpace, layout: &MsixLayout) -> usize {
    let control = layout.vectors.saturating_sub(1);
    let mut body = control.to_le_bytes().to_vec();
    for at in [layout.table, layout.pending] {
        body.extend((at as u32 & !7 | layout.bar as u32).to_le_bytes());
    }
    c.add_capability(CAP_MSIX, &body, &(MSIX_ENABLE | MSIX_FUNCTION_MASK).to_le_bytes())
}

/// Adds the MSI capability with 64-bit addresses and one message (§7.7.1); its offset.
fn add_msi(c: &mut ConfigSpace) -> usize {
    const ADDRESS_64: u16 = 1 << 7;
    let mut body = [0; 12];
    body[..2].copy_from_slice(&ADDRESS_64.to_le_bytes());
    // Enable and the number of messages; address from bit 2 on; data.
    let writable = [0x71, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    c.add_capability(CAP_MSI, &body, &writable)
}

/// Makes the capability at `at` virtio's window (Virtio 1.2 §4.1.4.9): bar at 4, offset at 8, length at 12, data
/// at 16.
fn add_window(c: &mut ConfigSpace, at: usize) -> Window {
    c.allow(at + 4, &[0xff]);
    c.allow(at + 8, &[0xff; 8]);
    Window { bar: at + 4, offset: at + 8, length: at + 12, data: at + 16 }
}
