//! The IOMMU of the PC: [`iommu_emu`]'s unit at its conventional address, between devices and memory, and between
//! devices, I/O APIC and local APICs.
//!
//! Locks are taken in one order: a device's, the I/O APIC's, the unit's, a local APIC's. While accesses in flight
//! are waited for, the unit is not locked, as these accesses may need translations.
//!
//! Not supported: interrupts by transfers. What a device writes to the interrupt range in the way of data is dropped;
//! its messages are known as such.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use devices::fabric::Remapper;
use devices::{DeliveryMode, Destination, InterruptMessage, Interrupts, MmioDevice, lock};
use iommu_emu::{Access, Blocked, Config, Delivery, DeviceScope, Dmar, Drhd, InterruptRequest, Iommu};
use iommu_emu::{Progress, Remapped, ScopeKind, Stats};
use memory::dma::{DmaAccess, DmaFault, DmaSpace, MessageSink, Route};
use memory::{BusAddress, L1Ram};
use x86_spec::pci::Bdf;

/// Where the register window is.
pub const VTD_BASE: u64 = 0xfed9_0000;
/// By which source ID the I/O APIC's interrupts are known: a function of a bus that has no devices.
pub const IO_APIC_SOURCE: Bdf = Bdf::new(0xff, 0, 0);

/// What an IOMMU is made of.
#[derive(Clone, Debug)]
pub struct IommuOptions {
    /// The memory that its tables are in, and that devices get to through it.
    pub ram: L1Ram,
    /// Caching mode: L1 has to invalidate after every change.
    pub caching_mode: bool,
}

/// The remapping unit for all devices.
pub struct RemappingUnit {
    unit: Mutex<Iommu<L1Ram>>,
    /// Held for reading while a device uses translations.
    in_flight: RwLock<()>,
    interrupts: Arc<Interrupts>,
}

impl fmt::Debug for RemappingUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemappingUnit").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl RemappingUnit {
    /// A unit after reset, through which the I/O APIC's interrupts pass from now on. `max_phys_bits` is the width of
    /// L1's physical addresses.
    pub fn new(options: &IommuOptions, max_phys_bits: u8, interrupts: Arc<Interrupts>) -> Arc<Self> {
        let config = Config {
            host_address_width: max_phys_bits,
            caching_mode: options.caching_mode,
            ..Config::default()
        };
        let unit = Arc::new(Self {
            unit: Mutex::new(Iommu::new(config, options.ram.clone())),
            in_flight: RwLock::default(),
            interrupts,
        });
        let remapper: std::sync::Weak<Self> = Arc::downgrade(&unit);
        unit.interrupts.set_remapper(remapper);
        unit
    }

    /// How often what happened.
    pub fn stats(&self) -> Stats {
        lock(&self.unit).stats()
    }

    /// Reads a register.
    pub fn read(&self, offset: u64, size: u8) -> u64 {
        lock(&self.unit).read(offset, size)
    }

    /// Writes a register and carries out what that asks for.
    pub fn write(&self, offset: u64, size: u8, value: u64) {
        let mut unit = lock(&self.unit);
        unit.write(offset, size, value);
        loop {
            let progress = unit.advance();
            self.send_events(&mut unit);
            match progress {
                Progress::Idle => return,
                Progress::More => {}
                Progress::Drain(wait) => {
                    drop(unit);
                    drop(self.in_flight.write().unwrap_or_else(PoisonError::into_inner));
                    unit = lock(&self.unit);
                    unit.drained(wait);
                }
            }
        }
    }

    /// Sends the unit's own interrupts.
    fn send_events(&self, unit: &mut MutexGuard<'_, Iommu<L1Ram>>) {
        let extended = unit.extended_events();
        for event in unit.take_events() {
            self.deliver_to_apics(&event.delivery(extended));
        }
    }

    fn deliver_to_apics(&self, delivery: &Delivery) -> bool {
        interrupt_message(delivery).is_some_and(|message| self.interrupts.deliver(&message))
    }

    /// Remaps a request and delivers what comes of it while the unit is locked: an invalidation that completes
    /// later finds nothing on the way (VT-d §6.5.2.11). Returns whether it arrived.
    fn request(&self, source: Bdf, request: InterruptRequest) -> bool {
        let mut unit = lock(&self.unit);
        let result = unit.remap(source, request);
        let arrived = match result {
            Ok(Remapped::Deliver(delivery)) => self.deliver_to_apics(&delivery),
            Ok(Remapped::Notify(delivery)) => {
                self.deliver_to_apics(&delivery);
                true
            }
            Ok(Remapped::Posted) => true,
            Err(reason) => {
                tracing::debug!("interrupt {request:x?} of {source} blocked: {reason}");
                false
            }
        };
        self.send_events(&mut unit);
        arrived
    }
}

/// A delivery as local APICs take it; `None` for delivery modes that messages cannot have.
fn interrupt_message(delivery: &Delivery) -> Option<InterruptMessage> {
    let mode = DeliveryMode::from_bits(delivery.delivery_mode.into())?;
    let mode = match mode {
        DeliveryMode::StartUp => return None,
        // The redirection hint chooses one of the destinations (SDM Vol. 3A §11.11.1).
        DeliveryMode::Fixed if delivery.redirection_hint => DeliveryMode::LowestPriority,
        mode => mode,
    };
    let destination = match delivery.extended {
        true => Destination::from_x2apic(delivery.destination, delivery.logical),
        false => Destination::from_xapic(delivery.destination as u8, delivery.logical),
    };
    Some(InterruptMessage { destination, delivery: mode, vector: delivery.vector, level: delivery.level })
}

impl DmaSpace for RemappingUnit {
    fn translate(&self, requester: Bdf, address: BusAddress, access: DmaAccess) -> Result<Route, DmaFault> {
        let kind = match access {
            DmaAccess::Read => Access::Read,
            DmaAccess::Write => Access::Write,
        };
        let mut unit = lock(&self.unit);
        let result = unit.translate(requester, address, kind);
        match result {
            Ok(to) => Ok(Route { gpa: to.gpa, machine: to.machine, len: to.len }),
            Err(blocked) => {
                if let Blocked::Fault(reason) = blocked {
                    tracing::debug!("{access:?} of {requester} at {address} blocked: {reason}");
                }
                self.send_events(&mut unit);
                Err(DmaFault::Blocked { requester, address })
            }
        }
    }

    fn in_flight(&self) -> &RwLock<()> {
        &self.in_flight
    }
}

impl MessageSink for RemappingUnit {
    fn send(&self, requester: Bdf, address: u64, data: u32) {
        const RANGE: std::ops::Range<u64> = 0xfee0_0000..0xfef0_0000;
        if RANGE.contains(&address) {
            self.request(requester, InterruptRequest { address, data });
        } else {
            tracing::debug!("device {requester} sends {data:#x} to {address:#x}: no interrupt");
        }
    }
}

impl Remapper for RemappingUnit {
    fn deliver(&self, address: u64, data: u32) -> bool {
        self.request(IO_APIC_SOURCE, InterruptRequest { address, data })
    }
}

/// The register window on the bus.
pub(crate) struct VtdWindow(pub Arc<RemappingUnit>);

impl MmioDevice for VtdWindow {
    fn read(&mut self, offset: u64, size: u8) -> u64 {
        self.0.read(offset, size)
    }
    fn write(&mut self, offset: u64, size: u8, value: u64) {
        self.0.write(offset, size, value);
    }
}

/// What ACPI says of the unit: it serves all PCI devices, and the I/O APIC with ID 0.
pub fn dmar(max_phys_bits: u8) -> Dmar {
    let io_apic = DeviceScope { kind: ScopeKind::IoApic, id: 0, source: IO_APIC_SOURCE };
    let unit = Drhd { base: VTD_BASE, include_all: true, scopes: vec![io_apic] };
    Dmar { host_address_width: max_phys_bits, units: vec![unit] }
}

#[cfg(test)]
mod tests;
