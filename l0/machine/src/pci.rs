//! The PCI devices of the PC: which there are, and in which slots.
//!
//! | Device | What |
//! |---|---|
//! | 00:00.0 | host bridge |
//! | 00:01.0 … | disks (virtio), in the order given; then the entropy device; then root ports |
//! | 01:00.0, 02:00.0 … | NVMe controllers, each behind a root port of its own |
//!
//! INTA of root-bus device *n*, and of what is behind it, is I/O APIC pin 16 + *n* mod 8.
//!
//! Not supported: interrupt wires for systems that use the 8259s, adding and removing devices while the machine runs.

use std::io;
use std::sync::Arc;

use devices::disk::Storage;
use devices::nvme;
use devices::pci::{Endpoint, PciRoot, PciWindows, SharedWire};
use devices::virtio::block::Block;
use devices::virtio::pci::{Wiring, endpoint};
use devices::virtio::rng::Rng;
use devices::{InterruptMessage, Interrupts};
use memory::L1Ram;
use memory::dma::{DeviceDma, DmaSpace, MessageSink, Untranslated};
use x86_spec::pci::Bdf;

use crate::iommu::RemappingUnit;

/// I/O APIC pins that PCI wires lead to: the first, and how many.
const FIRST_WIRE: u32 = 16;
const WIRES: u32 = 8;
/// Device numbers of a bus.
pub const SLOTS: u8 = 32;

/// The I/O APIC pin of INTA of device `device` on the root bus.
pub fn wire_of(device: u8) -> u32 {
    FIRST_WIRE + u32::from(device) % WIRES
}

/// A disk.
#[derive(Clone)]
pub struct Disk {
    /// Its data.
    pub storage: Arc<dyn Storage>,
    /// What it calls itself; 20 bytes count.
    pub serial: String,
}

/// The devices that a PC has on PCI.
pub struct PciDevices {
    /// What they transfer from and to.
    pub ram: L1Ram,
    /// Virtio disks.
    pub disks: Vec<Disk>,
    /// Whether there is an entropy device.
    pub rng: bool,
    /// NVMe controllers with a namespace each.
    pub nvme: Vec<Disk>,
}

/// PCI devices could not be made.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// There are more than slots.
    #[error("{0} PCI devices: there are slots for {max}", max = SLOTS - 1)]
    TooMany(usize),
    /// The host gives no thread.
    #[error("can't start a device's thread: {0}")]
    Thread(#[from] io::Error),
}

/// Delivers messages to local APICs.
struct ApicMessages(Arc<Interrupts>);

impl MessageSink for ApicMessages {
    fn send(&self, requester: Bdf, address: u64, data: u32) {
        match InterruptMessage::from_msi(address, data) {
            Some(message) => _ = self.0.deliver(&message),
            None => tracing::debug!("device {requester} sends {data:#x} to {address:#x}: no interrupt"),
        }
    }
}

/// What gives slots to devices.
struct Slots<'a> {
    ram: &'a L1Ram,
    space: Arc<dyn DmaSpace>,
    sink: Arc<dyn MessageSink>,
    wires: Vec<Arc<SharedWire>>,
    next: u8,
}

impl Slots<'_> {
    fn wiring(&self, behind_port: bool) -> Wiring {
        let line = wire_of(self.next);
        let wire = self.wires.get((line - FIRST_WIRE) as usize).cloned();
        let dma = |requester| DeviceDma::new(self.ram.clone(), self.space.clone(), requester);
        Wiring::new(dma, self.sink.clone(), wire.map(|w| (w, line as u8)), behind_port)
    }

    /// Puts what `make` makes into the next slot of the root bus.
    fn add(
        &mut self,
        root: &PciRoot,
        make: impl FnOnce(Wiring) -> io::Result<Endpoint>,
    ) -> Result<(), PciError> {
        root.add(self.next, make(self.wiring(false))?);
        self.next += 1;
        Ok(())
    }

    /// Puts a root port with what `make` makes into the next slot.
    fn add_behind_port(
        &mut self,
        root: &PciRoot,
        make: impl FnOnce(Wiring) -> io::Result<Endpoint>,
    ) -> Result<(), PciError> {
        root.add_behind_port(self.next, make(self.wiring(true))?);
        self.next += 1;
        Ok(())
    }
}

/// Makes the root complex with its devices, behind `iommu` if there is one, and does with them what firmware does.
///
/// # Errors
/// [`PciError`].
pub(crate) fn build(
    windows: PciWindows,
    devices: Option<PciDevices>,
    interrupts: &Arc<Interrupts>,
    iommu: Option<&Arc<RemappingUnit>>,
) -> Result<PciRoot, PciError> {
    let root = PciRoot::new(windows);
    let Some(devices) = devices else { return Ok(root) };
    let count = devices.disks.len() + usize::from(devices.rng) + devices.nvme.len();
    if count >= SLOTS.into() {
        return Err(PciError::TooMany(count));
    }
    let wires = (0..WIRES).map(|i| Arc::new(SharedWire::new(interrupts.isa_line(FIRST_WIRE + i)))).collect();
    let (space, sink): (Arc<dyn DmaSpace>, Arc<dyn MessageSink>) = match iommu {
        Some(unit) => (unit.clone(), unit.clone()),
        None => (Arc::new(Untranslated::default()), Arc::new(ApicMessages(interrupts.clone()))),
    };
    let mut slots = Slots { ram: &devices.ram, space, sink, wires, next: 1 };
    for (i, disk) in devices.disks.iter().enumerate() {
        let block = Box::new(Block::new(disk.storage.clone(), &disk.serial));
        slots.add(&root, |wiring| endpoint(&format!("disk{i}"), block, wiring))?;
    }
    if devices.rng {
        slots.add(&root, |wiring| endpoint("rng", Box::new(Rng), wiring))?;
    }
    for (i, disk) in devices.nvme.iter().enumerate() {
        slots.add_behind_port(&root, |wiring| {
            nvme::endpoint(&format!("nvme{i}"), disk.storage.clone(), &disk.serial, wiring)
        })?;
    }
    root.assign();
    Ok(root)
}
