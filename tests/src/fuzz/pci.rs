//! A guest's driver that does anything: to configuration space, BARs, queues and what is in them.

use std::sync::{Arc, Mutex, PoisonError};

use devices::disk::Storage;
use devices::{Clock, ManualClock};
use machine::pci::{Disk, PciDevices};
use machine::{Pc, PcConfig};
use memory::{L1Gpa, L1Ram, MachineMemory, RamLayout};

use super::Bytes;

const RAM: u64 = 1 << 20;
/// Where queues are: descriptors, available ring, used ring; NVMe's submission and completion queue.
const QUEUES: u64 = 0x1_0000;
const ECAM: u64 = 0xe000_0000;
/// How often a device is looked at before it is left alone.
const PATIENCE: u32 = 200;
/// The slots of disk, entropy device, port, and the controller behind it.
const FUNCTIONS: [u64; 4] = [1 << 3, 2 << 3, 3 << 3, 1 << 8];

/// A disk in memory; what is beyond its end would be a panic.
struct MemoryDisk(Mutex<Vec<u8>>);

impl MemoryDisk {
    fn with(&self, offset: u64, len: usize, f: impl FnOnce(&mut [u8])) -> std::io::Result<()> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        f(&mut bytes[offset as usize..offset as usize + len]);
        Ok(())
    }
}

impl Storage for MemoryDisk {
    fn size(&self) -> u64 {
        64 << 10
    }
    fn is_read_only(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        self.with(offset, buf.len(), |b| buf.copy_from_slice(b))
    }
    fn write(&self, offset: u64, buf: &[u8]) -> std::io::Result<()> {
        self.with(offset, buf.len(), |b| b.copy_from_slice(buf))
    }
    fn flush(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.with(offset, len as usize, |b| b.fill(0))
    }
    fn zero(&self, offset: u64, len: u64, _: bool) -> std::io::Result<()> {
        self.discard(offset, len)
    }
}

struct Guest<'a> {
    pc: Pc,
    ram: L1Ram,
    b: Bytes<'a>,
}

/// Sets the devices up as a driver does, fills their queues with the input, rings, and goes on with accesses to anything.
/// How many requests were completed.
pub fn pci(data: &[u8]) -> u64 {
    let memory = Arc::new(MachineMemory::new(RAM).expect("1 MiB of memory"));
    let ram = L1Ram::new(memory, RamLayout::new(RAM)).expect("RAM inside memory");
    let disk = || {
        let storage = Arc::new(MemoryDisk(Mutex::new(vec![0; 64 << 10])));
        vec![Disk { storage, serial: "fuzz".into() }]
    };
    let devices = PciDevices { ram: ram.clone(), disks: disk(), rng: true, nvme: disk() };
    let clock = Arc::new(ManualClock::default());
    assert_eq!(clock.now_ns(), 0);
    let config = PcConfig {
        ram_bytes: RAM,
        clock: Some(clock),
        utc_ns: Some(0),
        devices: Some(devices),
        ..PcConfig::default()
    };
    let pc = Pc::new(config, &[]).expect("a PC with a few devices");
    let mut guest = Guest { pc, ram, b: Bytes(data) };
    for function in FUNCTIONS {
        guest.write(ECAM + (function << 12) + 4, 2, 0b110);
    }
    let mut done = 0;
    while !guest.b.0.is_empty() {
        match guest.b.u8() & 7 {
            0 | 1 => done += guest.virtio(FUNCTIONS[0]),
            2 => done += guest.virtio(FUNCTIONS[1]),
            3 | 4 => done += guest.nvme(),
            5 => guest.configure(),
            _ => guest.access(),
        }
    }
    done
}

impl Guest<'_> {
    fn read(&self, at: u64, size: u8) -> u64 {
        self.pc.mmio_read(0, L1Gpa(at), size)
    }
    fn write(&self, at: u64, size: u8, value: u64) {
        self.pc.mmio_write(0, L1Gpa(at), size, value);
    }
    fn store(&self, at: u64, bytes: &[u8]) {
        self.ram.write(L1Gpa(at), bytes).expect("inside RAM");
    }
    fn load(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.ram.read(L1Gpa(at), &mut bytes).expect("inside RAM");
        u16::from_le_bytes(bytes)
    }
    fn bar(&self, function: u64) -> u64 {
        let at = ECAM + (function << 12) + 0x10;
        self.read(at, 8) & !0xf
    }
    /// Mostly an address in RAM.
    fn address(&mut self) -> u64 {
        let value = self.b.u64();
        if value & 15 == 0 { value >> 4 } else { ((value >> 4) % (RAM + 0x1000)) & !(value & 3) }
    }

    /// Starts a virtio device and offers up to sixteen requests of the input's; how many it did.
    fn virtio(&mut self, function: u64) -> u64 {
        let bar = self.bar(function);
        self.ram.fill(L1Gpa(QUEUES), 0, 0x4000).expect("inside RAM");
        for (at, size, value) in [
            (20, 1, 0),
            (20, 1, 3),
            (8, 4, 1),
            (12, 4, 0b11),
            (8, 4, 0),
            (12, 4, u64::from(self.b.u8() & 3) << 28 | 1 << 9),
            (20, 1, 11),
            (22, 2, 0),
            (24, 2, 16),
            (32, 4, QUEUES),
            (40, 4, QUEUES + 0x1000),
            (48, 4, QUEUES + 0x2000),
            (28, 2, 1),
        ] {
            self.write(bar + at, size, value);
        }
        for i in 0..16 {
            let mut descriptor = self.address().to_le_bytes().to_vec();
            let (len, flags) = (self.b.u64(), self.b.u8());
            let len = if len & 7 == 0 { len as u32 } else { len as u32 >> 8 & 0x1f0 };
            descriptor.extend(len.to_le_bytes());
            descriptor.extend([flags & 7, 0, self.b.u8() & 15, 0]);
            self.store(QUEUES + i * 16, &descriptor);
            // Headers of the disk's requests, wherever they are looked for.
            let header = [self.b.u8() & 15, 0, 0, 0, 0, 0, 0, 0, self.b.u8(), 0, 0, 0, 0, 0, 0, 0];
            let at = self.address() % (RAM - 16);
            if !(QUEUES..QUEUES + 0x4000).contains(&at) {
                self.store(at, &header);
            }
            let head = self.b.u8() & 15;
            self.store(QUEUES + 0x1004 + i * 2, &[head, 0]);
        }
        let count = self.b.u8() & 31;
        self.store(QUEUES + 0x1002, &[count, 0]);
        self.write(bar + 20, 1, 15);
        self.write(bar + 0x3000, 2, 0);
        let mut used = 0;
        for _ in 0..PATIENCE {
            used = self.load(QUEUES + 0x2002);
            if used >= count.into() || self.read(bar + 20, 1) & 0x40 != 0 {
                break;
            }
            std::thread::yield_now();
        }
        used.min(count.into()).into()
    }

    /// Starts the NVMe controller and gives it the input's commands; how many it did.
    fn nvme(&mut self) -> u64 {
        let bar = self.bar(FUNCTIONS[3]);
        self.ram.fill(L1Gpa(QUEUES), 0, 0x4000).expect("inside RAM");
        for (at, value) in
            [(0x14, 0), (0x24, 0x001f_001f), (0x28, QUEUES), (0x30, QUEUES + 0x1000), (0x14, 0x0046_0001)]
        {
            self.write(bar + at, 4, value);
        }
        // An I/O queue to begin with, then anything to either.
        let create = [(5u8, QUEUES + 0x3000, 1u32), (1, QUEUES + 0x2000, 1 << 16 | 1)];
        let commands = 2 + u64::from(self.b.u8() & 7);
        for i in 0..commands {
            let mut c = [0; 64];
            if let Some((opcode, prp, dw11)) = create.get(i as usize) {
                c[0] = *opcode;
                c[24..32].copy_from_slice(&prp.to_le_bytes());
                c[40..44].copy_from_slice(&0x001f_0001u32.to_le_bytes());
                c[44..48].copy_from_slice(&dw11.to_le_bytes());
            } else {
                self.random_command(&mut c);
            }
            self.store(QUEUES + i * 64, &c);
        }
        self.write(bar + 0x1000, 4, commands);
        let io = u64::from(self.b.u8() & 15);
        for i in 0..io {
            let mut c = [0; 64];
            self.random_command(&mut c);
            self.store(QUEUES + 0x2000 + i * 64, &c);
        }
        let mut done = self.completions(bar, 0x1000, commands);
        self.write(bar + 0x1008, 4, io);
        done += self.completions(bar, 0x3000, io);
        done
    }

    fn random_command(&mut self, c: &mut [u8; 64]) {
        let (opcode, namespace) = (self.b.u8(), self.b.u8());
        c[0] = if opcode & 0xf0 == 0 { opcode } else { opcode & 15 };
        c[4] = namespace & 3;
        c[24..32].copy_from_slice(&self.address().to_le_bytes());
        c[32..40].copy_from_slice(&self.address().to_le_bytes());
        for at in (40..64).step_by(4) {
            let value = self.b.u64();
            let value = if value & 3 == 0 { value as u32 } else { value as u32 >> 8 & 0xff };
            c[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Waits for completions of a queue, with some patience.
    fn completions(&self, bar: u64, queue: u64, wanted: u64) -> u64 {
        let mut done = 0;
        for _ in 0..PATIENCE {
            while done < wanted && self.load(QUEUES + queue + done * 16 + 14) & 1 != 0 {
                done += 1;
            }
            if done == wanted || self.read(bar + 0x1c, 4) & 2 != 0 {
                break;
            }
            std::thread::yield_now();
        }
        done
    }

    /// An access to configuration space, undone later or not.
    fn configure(&mut self) {
        let function = FUNCTIONS[usize::from(self.b.u8() & 3)];
        let at = ECAM + (function << 12) + (u64::from(self.b.u8()) << 2 & 0x1fc);
        let (size, value) = (1 << (self.b.u8() & 3), self.b.u64());
        let old = self.read(at, size);
        self.write(at, size, value);
        if value & 3 != 0 {
            self.write(at, size, old);
        }
    }

    /// An access to a BAR.
    fn access(&mut self) {
        let function = [FUNCTIONS[0], FUNCTIONS[1], FUNCTIONS[3]][usize::from(self.b.u8()) % 3];
        let (which, low) = (self.b.u8(), self.b.u8());
        let at = self.bar(function) + (u64::from(which & 7) << 12) + u64::from(low);
        let (size, value) = (1 << (self.b.u8() & 3), self.b.u64());
        if which & 8 == 0 { self.write(at, size, value) } else { _ = self.read(at, size) }
    }
}
