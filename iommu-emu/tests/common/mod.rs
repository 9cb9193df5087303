//! A unit in front of a few megabytes of RAM, with tables that tests fill, and a driver's view of its registers.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::sync::Arc;

use iommu_emu::{Access, Config, IoMemory, Iommu, Iova, Message, Progress};
use memory::{L1Gpa, L1Ram, MachineMemory, RamLayout};
use x86_spec::pci::Bdf;

pub const RAM: u64 = 16 << 20;
pub const ROOT: u64 = 0x1000;
pub const CONTEXTS: u64 = 0x2000;
pub const QUEUE: u64 = 0x4000;
pub const STATUS: u64 = 0x6000;
pub const INTERRUPTS: u64 = 0x7000;
pub const DESCRIPTOR: u64 = 0x9000;
/// Second-level tables from here on.
pub const TABLES: u64 = 0x10_0000;

pub const R: u64 = 1;
pub const W: u64 = 2;
pub const PS: u64 = 1 << 7;
/// Context entry, high half: 39 and 48 bits.
pub const AW39: u64 = 1;
pub const AW48: u64 = 2;

// Registers by their offsets in §10.4.
pub const GCMD: u64 = 0x18;
pub const GSTS: u64 = 0x1c;
pub const RTADDR: u64 = 0x20;
pub const CCMD: u64 = 0x28;
pub const FSTS: u64 = 0x34;
pub const FECTL: u64 = 0x38;
pub const IQH: u64 = 0x80;
pub const IQT: u64 = 0x88;
pub const IQA: u64 = 0x90;
pub const ICS: u64 = 0x9c;
pub const IECTL: u64 = 0xa0;
pub const IQERCD: u64 = 0xb0;
pub const IRTA: u64 = 0xb8;

pub const TE: u64 = 1 << 31;
pub const SRTP: u64 = 1 << 30;
pub const QIE: u64 = 1 << 26;
pub const IRE: u64 = 1 << 25;
pub const SIRTP: u64 = 1 << 24;
pub const CFI: u64 = 1 << 23;

/// The device under test.
pub const DEVICE: Bdf = Bdf::new(0, 3, 0);

pub struct World {
    pub ram: L1Ram,
    pub unit: Iommu<L1Ram>,
    next_table: u64,
    enables: u64,
    /// Waits for accesses in flight.
    pub drains: usize,
}

impl World {
    pub fn new(config: Config) -> Self {
        let memory = Arc::new(MachineMemory::new(RAM).unwrap());
        let ram = L1Ram::new(memory, RamLayout::new(RAM)).unwrap();
        let unit = Iommu::new(config, ram.clone());
        Self { ram, unit, next_table: TABLES, enables: 0, drains: 0 }
    }

    /// With translation on: an empty context table for bus 0.
    pub fn translating(config: Config) -> Self {
        let mut w = Self::new(config);
        w.set_entry(ROOT, CONTEXTS | 1, 0);
        w.write(RTADDR, 8, ROOT);
        w.enable(SRTP);
        w.enable(TE);
        w
    }

    pub fn poke(&self, at: u64, value: u64) {
        self.ram.write(L1Gpa(at), &value.to_le_bytes()).unwrap();
    }

    pub fn peek(&self, at: u64) -> u64 {
        self.ram.read_u64(L1Gpa(at)).unwrap()
    }

    /// A 128-bit entry.
    pub fn set_entry(&self, at: u64, low: u64, high: u64) {
        self.poke(at, low);
        self.poke(at + 8, high);
    }

    pub fn set_context(&self, device: Bdf, low: u64, high: u64) {
        self.set_entry(CONTEXTS + u64::from(device.devfn()) * 16, low, high);
    }

    /// `device` in domain `domain`, with tables of its own at the address that is returned.
    pub fn attach(&mut self, device: Bdf, domain: u16, aw: u64) -> u64 {
        let tables = self.table();
        self.set_context(device, tables | 1, u64::from(domain) << 8 | aw);
        tables
    }

    pub fn table(&mut self) -> u64 {
        let at = self.next_table;
        self.next_table += 0x1000;
        assert!(self.next_table <= RAM, "the test needs more tables");
        at
    }

    /// Writes `leaf` for `iova` at `level` (1: 4 KiB), making tables below `root` of `levels` levels. Gives up below
    /// something that is no table.
    pub fn map(&mut self, root: u64, levels: u32, iova: u64, level: u32, leaf: u64) {
        let mut table = root;
        for l in (level + 1..=levels).rev() {
            let slot = table + (iova >> (12 + 9 * (l - 1)) & 0x1ff) * 8;
            let entry = self.peek(slot);
            table = match entry & 3 {
                0 => {
                    let new = self.table();
                    self.poke(slot, new | R | W);
                    new
                }
                _ if entry & PS != 0 => return,
                _ => entry & 0x000f_ffff_ffff_f000,
            };
            if table >= RAM {
                return;
            }
        }
        self.poke(table + (iova >> (12 + 9 * (level - 1)) & 0x1ff) * 8, leaf);
    }

    pub fn read(&self, offset: u64, size: u8) -> u64 {
        self.unit.read(offset, size)
    }

    /// A register write, with all that follows from it.
    pub fn write(&mut self, offset: u64, size: u8, value: u64) {
        self.unit.write(offset, size, value);
        self.settle();
    }

    pub fn settle(&mut self) {
        for _ in 0..0x10_0000 {
            match self.unit.advance() {
                Progress::Idle => return,
                Progress::More => {}
                Progress::Drain(wait) => {
                    self.drains += 1;
                    self.unit.drained(wait);
                }
            }
        }
        panic!("the unit does not come to rest");
    }

    /// Sets a GCMD bit, keeping the enables, and checks that GSTS confirms it.
    pub fn enable(&mut self, bit: u64) {
        self.write(GCMD, 4, self.enables | bit);
        assert_ne!(self.read(GSTS, 4) & bit, 0);
        if bit & (SRTP | SIRTP) == 0 {
            self.enables |= bit;
        }
    }

    pub fn disable(&mut self, bit: u64) {
        self.enables &= !bit;
        self.write(GCMD, 4, self.enables);
        assert_eq!(self.read(GSTS, 4) & bit, 0);
    }

    /// An invalidation queue of 256 descriptors.
    pub fn enable_queue(&mut self) {
        self.write(IQT, 8, 0);
        self.write(IQA, 8, QUEUE);
        self.enable(QIE);
    }

    /// Puts descriptors on the queue and lets them be executed.
    pub fn submit(&mut self, descriptors: &[[u64; 2]]) {
        let mut tail = self.read(IQT, 8) >> 4;
        for d in descriptors {
            self.set_entry(QUEUE + tail * 16, d[0], d[1]);
            tail = (tail + 1) % 256;
        }
        self.write(IQT, 8, tail << 4);
    }

    pub fn access(&mut self, iova: u64, access: Access) -> Result<u64, u8> {
        self.access_from(DEVICE, iova, access)
    }

    /// L1's address, or the fault's code.
    pub fn access_from(&mut self, device: Bdf, iova: u64, access: Access) -> Result<u64, u8> {
        match self.unit.translate(device, Iova(iova), access) {
            Ok(to) => {
                if let Some(machine) = to.machine {
                    assert_eq!(self.ram.translate(to.gpa).map(|(m, _)| m), Some(machine));
                }
                Ok(to.gpa.0)
            }
            Err(iommu_emu::Blocked::Fault(reason)) => Err(reason.code()),
            Err(iommu_emu::Blocked::InterruptRequest) => Err(0xff),
        }
    }

    pub fn events(&mut self) -> Vec<Message> {
        self.unit.take_events().collect()
    }

    /// FRCD_REG[n]: low and high half.
    pub fn record(&self, n: u64) -> [u64; 2] {
        [self.read(0x200 + n * 16, 8), self.read(0x208 + n * 16, 8)]
    }
}

/// Descriptors (§6.5.2).
pub fn context_global() -> [u64; 2] {
    [1 | 1 << 4, 0]
}
pub fn iotlb_global() -> [u64; 2] {
    [2 | 1 << 4, 0]
}
pub fn iotlb_domain(domain: u16) -> [u64; 2] {
    [2 | 2 << 4 | u64::from(domain) << 16, 0]
}
pub fn iotlb_pages(domain: u16, address: u64, mask: u64) -> [u64; 2] {
    [2 | 3 << 4 | u64::from(domain) << 16, address & !0xfff | mask]
}
pub fn wait_status(data: u32) -> [u64; 2] {
    [5 | 1 << 5 | u64::from(data) << 32, STATUS]
}
