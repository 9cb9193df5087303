//! The unit in the machine: transfers, messages and the I/O APIC through it.

use std::sync::atomic::{AtomicBool, Ordering};

use devices::ioapic::IOAPIC_BASE;
use devices::lapic::DEFAULT_APIC_BASE;
use memory::dma::{DeviceDma, Requester};
use memory::{L1Gpa, MachineMemory, RamLayout};

use super::*;
use crate::{Pc, PcConfig};

const RAM: u64 = 4 << 20;
const ROOT: u64 = 0x1000;
const CONTEXTS: u64 = 0x2000;
/// Three levels of tables.
const TABLES: u64 = 0x3000;
const QUEUE: u64 = 0x6000;
const STATUS: u64 = 0x7000;
const INTERRUPTS: u64 = 0x8000;
/// IOVA 0 to 2 MiB of the device leads from here on, page 1 excepted.
const BUFFER: u64 = 0x10_0000;
const DEVICE: Bdf = Bdf::new(0, 3, 0);

struct World {
    pc: Pc,
    ram: L1Ram,
    dma: DeviceDma,
}

fn poke(ram: &L1Ram, at: u64, value: u64) {
    ram.write(L1Gpa(at), &value.to_le_bytes()).unwrap();
}

fn peek(ram: &L1Ram, at: u64) -> u64 {
    let mut bytes = [0; 8];
    ram.read(L1Gpa(at), &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

impl World {
    /// DMA of the device is translated, interrupts are remapped, and the local APIC accepts them.
    fn new() -> Self {
        let memory = Arc::new(MachineMemory::new(RAM).unwrap());
        let ram = L1Ram::new(memory, RamLayout::new(RAM)).unwrap();
        let options = IommuOptions { ram: ram.clone(), caching_mode: false };
        let config = PcConfig { ram_bytes: RAM, iommu: Some(options), ..PcConfig::default() };
        let pc = Pc::new(config, &[]).unwrap();
        assert_eq!(pc.mmio_read(0, L1Gpa(VTD_BASE), 4), 0x10, "VER_REG");
        poke(&ram, ROOT, CONTEXTS | 1);
        let context = CONTEXTS + u64::from(DEVICE.devfn()) * 16;
        poke(&ram, context, TABLES | 1);
        poke(&ram, context + 8, 5 << 8 | 1);
        poke(&ram, TABLES, (TABLES + 0x1000) | 3);
        poke(&ram, TABLES + 0x1000, (TABLES + 0x2000) | 3);
        for page in (0..512).filter(|p| *p != 1) {
            poke(&ram, TABLES + 0x2000 + page * 8, (BUFFER + (page << 12)) | 3);
        }
        let requester = Arc::new(Requester::new(DEVICE));
        requester.set_master(true);
        let dma = DeviceDma::new(ram.clone(), pc.iommu().unwrap().clone(), requester);
        let w = Self { pc, ram, dma };
        // RTADDR_REG, IQA_REG, IRTA_REG; SRTP and SIRTP; TE, QIE, IRE.
        for (offset, value) in [(0x20, ROOT), (0x90, QUEUE), (0xb8, INTERRUPTS | 7)] {
            w.write(offset, 8, value);
        }
        w.write(0x18, 4, 1 << 30 | 1 << 24);
        w.write(0x18, 4, 1 << 31 | 1 << 26 | 1 << 25);
        w.pc.mmio_write(0, L1Gpa(DEFAULT_APIC_BASE + 0xf0), 4, 0x1ff);
        w
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        self.pc.mmio_write(0, L1Gpa(VTD_BASE + offset), size, value);
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        self.pc.mmio_read(0, L1Gpa(VTD_BASE + offset), size)
    }
}

#[test]
fn transfers_are_translated_and_faults_interrupt() {
    let w = World::new();
    w.dma.session().write(BusAddress(0x2ffe), &[1, 2, 3, 4]).unwrap();
    assert_eq!(peek(&w.ram, BUFFER + 0x2ff8) >> 48, 0x0201);
    assert_eq!(peek(&w.ram, BUFFER + 0x3000) & 0xffff, 0x0403);
    // FEDATA_REG, FEADDR_REG, FECTL_REG: vector 51H to APIC 0.
    w.write(0x3c, 4, 0x51);
    w.write(0x40, 4, 0xfee0_0000);
    w.write(0x38, 4, 0);
    let address = BusAddress(0x1000);
    let blocked = DmaFault::Blocked { requester: DEVICE, address };
    assert_eq!(w.dma.session().read(BusAddress(0xffe), &mut [0; 4]), Err(blocked));
    assert_eq!(w.pc.take_interrupt(0), Some(0x51));
    assert_eq!(w.read(0x200, 8), 0x1000, "FI");
    // A write to the interrupt range is no memory.
    assert!(w.dma.session().write(BusAddress(0xfee0_0000), &[0; 4]).is_err());
}

/// The wait descriptor's status comes when the transfers that were under way have ended, not before.
#[test]
fn an_invalidation_waits_for_transfers() {
    let w = World::new();
    let session = w.dma.session();
    session.write(BusAddress(0), &[1]).unwrap();
    // Global IOTLB invalidation; wait with status 1.
    poke(&w.ram, QUEUE, 2 | 1 << 4);
    poke(&w.ram, QUEUE + 0x10, 5 | 1 << 5 | 1 << 32);
    poke(&w.ram, QUEUE + 0x18, STATUS);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            w.write(0x88, 8, 0x20);
            done.store(true, Ordering::SeqCst);
        });
        // Until the first descriptor has been executed (IQH_REG); the unit itself answers meanwhile.
        let unit = w.pc.iommu().unwrap();
        while unit.read(0x80, 8) == 0 {
            std::thread::yield_now();
        }
        session.write(BusAddress(0), &[2]).unwrap();
        assert_eq!((unit.read(0x80, 8), peek(&w.ram, STATUS)), (0x10, 0));
        assert!(!done.load(Ordering::SeqCst));
        drop(session);
    });
    assert_eq!((w.read(0x80, 8), peek(&w.ram, STATUS)), (0x20, 1));
}

#[test]
fn messages_are_remapped() {
    let w = World::new();
    // Entry 3: vector 61H, for this device alone.
    poke(&w.ram, INTERRUPTS + 3 * 16, 0x61 << 16 | 1);
    poke(&w.ram, INTERRUPTS + 3 * 16 + 8, 1 << 18 | u64::from(DEVICE.requester_id()));
    let unit = w.pc.iommu().unwrap();
    let message = 0xfee0_0000 | 1 << 4 | 3 << 5;
    unit.send(Bdf::new(0, 4, 0), message, 0);
    assert_eq!(w.pc.take_interrupt(0), None);
    unit.send(DEVICE, message, 0);
    assert_eq!(w.pc.take_interrupt(0), Some(0x61));
    // What is no remappable message, and what is none.
    unit.send(DEVICE, 0xfee0_0000, 0x62);
    unit.send(DEVICE, 0x1000, 0x62);
    assert_eq!(w.pc.take_interrupt(0), None);
    let stats = unit.stats();
    assert_eq!((stats.remapped, stats.faults), (1, 2));
}

#[test]
fn the_io_apic_is_remapped() {
    let w = World::new();
    poke(&w.ram, INTERRUPTS + 9 * 16, 0x71 << 16 | 1);
    poke(&w.ram, INTERRUPTS + 9 * 16 + 8, 1 << 18 | u64::from(IO_APIC_SOURCE.requester_id()));
    // Pin 4, level-triggered, remappable format: index 9 in bits 63:49, its own vector 4.
    for (register, value) in [(0x19, 9 << 17 | 1 << 16), (0x18, 1 << 15 | 4)] {
        w.pc.mmio_write(0, L1Gpa(IOAPIC_BASE), 4, register);
        w.pc.mmio_write(0, L1Gpa(IOAPIC_BASE + 0x10), 4, value);
    }
    let line = w.pc.interrupts().isa_line(4);
    line.set(true);
    assert_eq!(w.pc.take_interrupt(0), Some(0x71));
    // Remote IRR is set, although the entry is edge-triggered; the EOI register takes the pin's own vector.
    let low = || w.pc.mmio_read(0, L1Gpa(IOAPIC_BASE + 0x10), 4);
    assert_eq!(low() >> 14 & 1, 1);
    line.set(false);
    w.pc.mmio_write(0, L1Gpa(IOAPIC_BASE + 0x40), 4, 4);
    assert_eq!(low() >> 14 & 1, 0);
}

/// SDM Vol. 3A §11.11: what local APICs make of a delivery.
#[test]
fn deliveries_as_messages() {
    let plain = Delivery {
        destination: 0x1ff,
        extended: false,
        logical: false,
        redirection_hint: false,
        delivery_mode: 0,
        vector: 0x41,
        level: false,
    };
    let message = |d: &Delivery| interrupt_message(d).map(|m| (m.destination, m.delivery, m.level));
    assert_eq!(message(&plain), Some((Destination::All, DeliveryMode::Fixed, false)));
    let extended = Delivery { extended: true, ..plain };
    assert_eq!(message(&extended), Some((Destination::Physical(0x1ff), DeliveryMode::Fixed, false)));
    let hint = Delivery { redirection_hint: true, logical: true, level: true, ..extended };
    assert_eq!(message(&hint), Some((Destination::Logical(0x1ff), DeliveryMode::LowestPriority, true)));
    for mode in [3, 6] {
        assert_eq!(message(&Delivery { delivery_mode: mode, ..plain }), None);
    }
}
