//! A driver for tests: sets a device up through its registers and gives it requests.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use memory::dma::{DeviceDma, MessageSink, Untranslated};
use memory::{L1Gpa, L1Ram, MachineMemory, RamLayout};
use x86_spec::pci::Bdf;

use super::pci::{Wiring, endpoint};
use super::{Backend, NO_VECTOR};
use crate::device::lock;
use crate::pci::Endpoint;

/// RAM of the test machine.
pub const RAM: u64 = 4 << 20;
/// Rings of queue 0; each queue has 0x4000 bytes.
const RINGS: u64 = 0x1_0000;
/// From here on tests may use memory as they like.
pub const DATA: u64 = 0x10_0000;

const NOTIFY: u64 = 0x3000;
/// FEATURES_OK and what comes before it; DRIVER_OK.
const NEGOTIATED: u32 = 1 | 2 | 8;
const RUNNING: u32 = NEGOTIATED | 4;

/// Hands messages' data to the test.
struct ToTest(Mutex<Sender<u32>>);

impl MessageSink for ToTest {
    fn send(&self, _: Bdf, _: u64, data: u32) {
        // The test may have ended.
        let _ = lock(&self.0).send(data);
    }
}

/// A device and its driver.
pub struct Driver {
    pub ram: L1Ram,
    pub device: Endpoint,
    messages: Receiver<u32>,
    available: [u16; 4],
}

impl Driver {
    /// The device `backend` is, with all its features accepted but those in `without`, and running.
    pub fn start(backend: Box<dyn Backend>, without: u64) -> Self {
        let mut driver = Self::new(backend);
        driver.negotiate(without);
        driver
    }

    pub fn new(backend: Box<dyn Backend>) -> Self {
        let memory = Arc::new(MachineMemory::new(RAM).unwrap());
        let ram = L1Ram::new(memory, RamLayout::new(RAM)).unwrap();
        let (sender, messages) = channel();
        let sink = Arc::new(ToTest(Mutex::new(sender)));
        let dma = |requester| DeviceDma::new(ram.clone(), Arc::new(Untranslated::default()), requester);
        let wiring = Wiring::new(dma, sink, None, false);
        let mut device = endpoint("test", backend, wiring).unwrap();
        device.config_write(Bdf::new(0, 1, 0), 4, 2, 0b110);
        Self { ram, device, messages, available: [0; 4] }
    }

    pub fn read(&mut self, offset: u64, size: u8) -> u32 {
        self.device.read(0, offset, size) as u32
    }

    pub fn write(&mut self, offset: u64, size: u8, value: u32) {
        self.device.write(0, offset, size, value.into());
    }

    /// The features that the device offers.
    pub fn offered(&mut self) -> u64 {
        let mut half = |select| {
            self.write(0, 4, select);
            u64::from(self.read(4, 4))
        };
        half(0) | half(1) << 32
    }

    /// Resets the device and sets it up again, queues and MSI-X included (Virtio 1.2 §3.1.1).
    pub fn negotiate(&mut self, without: u64) {
        self.write(20, 1, 0);
        assert_eq!(self.read(20, 1), 0);
        self.available = [0; 4];
        self.write(20, 1, 3);
        let features = self.offered() & !without;
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(8, 4, select);
            self.write(12, 4, half);
        }
        self.write(20, 1, NEGOTIATED);
        assert_eq!(self.read(20, 1), NEGOTIATED, "FEATURES_OK");
        // The MSI-X capability is the third, after power management and PCI Express.
        let mut at = self.device.config_read(0x34, 1);
        while self.device.config_read(at as usize, 1) != 0x11 {
            at = self.device.config_read(at as usize + 1, 1);
        }
        self.device.config_write(Bdf::new(0, 1, 0), at as usize + 2, 2, 0x8000);
        for queue in 0..self.read(18, 2) {
            let entry = 0x4000 + u64::from(queue) * 16;
            self.write(entry, 4, 0xfee0_0000);
            self.write(entry + 8, 4, queue);
            self.write(entry + 12, 4, 0);
            self.write(22, 2, queue);
            self.write(26, 2, queue);
            assert_ne!(self.read(26, 2), u32::from(NO_VECTOR));
            self.write(24, 2, 16);
            let rings = RINGS as u32 + queue * 0x4000;
            for (register, at) in [(32, rings), (40, rings + 0x1000), (48, rings + 0x2000)] {
                self.write(register, 4, at);
            }
            self.ram.fill(L1Gpa(rings.into()), 0, 0x4000).unwrap();
            self.write(28, 2, 1);
        }
        self.write(20, 1, RUNNING);
    }

    /// Writes descriptor `index` of queue `queue`.
    pub fn describe(&self, queue: u64, index: u64, at: u64, len: u32, flags: u16, next: u16) {
        let to = L1Gpa(RINGS + queue * 0x4000 + index * 16);
        let mut bytes = at.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.ram.write(to, &bytes).unwrap();
    }

    /// Offers the chain that starts at descriptor `head`, and rings the bell.
    pub fn offer(&mut self, queue: u64, head: u16) {
        let count = &mut self.available[queue as usize];
        let ring = RINGS + queue * 0x4000 + 0x1000;
        self.ram.write(L1Gpa(ring + 4 + u64::from(*count % 16) * 2), &head.to_le_bytes()).unwrap();
        // used_event: interrupt at the next completion.
        self.ram.write(L1Gpa(ring + 4 + 32), &count.to_le_bytes()).unwrap();
        *count += 1;
        let count = *count;
        self.ram.write(L1Gpa(ring + 2), &count.to_le_bytes()).unwrap();
        self.write(NOTIFY + queue * 4, 2, queue as u32);
    }

    /// Waits for an interrupt; its data, which is the number of the queue.
    pub fn wait(&self) -> u32 {
        self.messages.recv_timeout(Duration::from_secs(60)).expect("an interrupt")
    }

    /// What the used ring of `queue` has last: index of the chain's head, length.
    pub fn last_used(&self, queue: u64) -> (u16, u32, u32) {
        let ring = RINGS + queue * 0x4000 + 0x2000;
        let mut bytes = [0; 2];
        self.ram.read(L1Gpa(ring + 2), &mut bytes).unwrap();
        let count = u16::from_le_bytes(bytes);
        let mut entry = [0; 8];
        let last = u64::from(count.wrapping_sub(1) % 16);
        self.ram.read(L1Gpa(ring + 4 + last * 8), &mut entry).unwrap();
        let word = |i: usize| u32::from_le_bytes(entry[i..i + 4].try_into().unwrap());
        (count, word(0), word(4))
    }

    /// Has queue 0 handle a chain of segments: address, length, whether the device writes. How many bytes it wrote.
    pub fn request(&mut self, segments: &[(u64, u32, bool)]) -> u32 {
        self.chain(segments);
        assert_eq!(self.wait(), 0);
        self.last_used(0).2
    }

    /// As [`Self::request`], without waiting.
    pub fn chain(&mut self, segments: &[(u64, u32, bool)]) {
        for (i, (at, len, write)) in segments.iter().enumerate() {
            let last = i + 1 == segments.len();
            let flags = u16::from(!last) | u16::from(*write) << 1;
            self.describe(0, i as u64, *at, *len, flags, i as u16 + 1);
        }
        self.offer(0, 0);
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_broken(&mut self) {
        let start = std::time::Instant::now();
        while self.read(20, 1) & 0x40 == 0 {
            assert!(start.elapsed() < Duration::from_secs(60), "the device needs no reset");
            std::thread::yield_now();
        }
    }
}
