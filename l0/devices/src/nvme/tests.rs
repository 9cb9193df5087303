//! A driver for the controller, and what it finds. Numbers are those of NVM Express 1.4.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use memory::dma::{MessageSink, Untranslated};
use memory::{L1Gpa, L1Ram, MachineMemory, RamLayout};
use x86_spec::pci::Bdf;

use super::*;
use crate::disk::testing::MemoryDisk;

const RAM: u64 = 8 << 20;
const QUEUES: u64 = 0x1_0000;
const DATA: u64 = 0x10_0000;
const SECTORS: usize = 4096;

struct ToTest(Mutex<Sender<u32>>);

impl MessageSink for ToTest {
    fn send(&self, _: Bdf, _: u64, data: u32) {
        // The test may have ended.
        let _ = lock(&self.0).send(data);
    }
}

struct Driver {
    ram: L1Ram,
    device: Endpoint,
    messages: Receiver<u32>,
    disk: Arc<MemoryDisk>,
    /// By queue: submission tail, completion head.
    rings: [(u32, u32); 3],
}

/// Entries of each queue of the tests.
const ENTRIES: u32 = 8;

fn submission(queue: u16) -> u64 {
    QUEUES + u64::from(queue) * 0x2000
}

fn completion(queue: u16) -> u64 {
    submission(queue) + 0x1000
}

/// A command without its identifier.
fn command(opcode: u8, namespace: u32, prp: [u64; 2], dwords: &[u32]) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[0] = opcode;
    bytes[2] = 0x5a;
    bytes[4..8].copy_from_slice(&namespace.to_le_bytes());
    for (at, prp) in [(24, prp[0]), (32, prp[1])] {
        bytes[at..at + 8].copy_from_slice(&prp.to_le_bytes());
    }
    for (i, dword) in dwords.iter().enumerate() {
        bytes[40 + i * 4..44 + i * 4].copy_from_slice(&dword.to_le_bytes());
    }
    bytes
}

impl Driver {
    fn new(disk: MemoryDisk) -> Self {
        let memory = Arc::new(MachineMemory::new(RAM).unwrap());
        let ram = L1Ram::new(memory, RamLayout::new(RAM)).unwrap();
        let disk = Arc::new(disk);
        let (sender, messages) = channel();
        let dma = |requester| DeviceDma::new(ram.clone(), Arc::new(Untranslated::default()), requester);
        let wiring = Wiring::new(dma, Arc::new(ToTest(Mutex::new(sender))), None, true);
        let mut device = endpoint("test", disk.clone(), "serial", wiring).unwrap();
        device.config_write(Bdf::new(1, 0, 0), 4, 2, 0b110);
        Self { ram, device, messages, disk, rings: Default::default() }
    }

    /// Enabled, with one pair of I/O queues.
    fn start(disk: MemoryDisk) -> Self {
        let mut d = Self::new(disk);
        d.enable();
        let size = (ENTRIES - 1) << 16;
        // Create completion queue 1 with vector 1, submission queue 1 on it.
        assert_eq!(d.admin(5, [completion(1), 0], &[size | 1, 1 << 16 | 0b11]), (0, 0));
        assert_eq!(d.admin(1, [submission(1), 0], &[size | 1, 1 << 16 | 1]), (0, 0));
        d
    }

    fn read(&mut self, offset: u64) -> u32 {
        self.device.read(0, offset, 4) as u32
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.device.write(0, offset, 4, value.into());
    }

    /// §7.6.1.
    fn enable(&mut self) {
        self.ram.fill(L1Gpa(QUEUES), 0, 0x8000).unwrap();
        self.rings = Default::default();
        for vector in 0..3u64 {
            let entry = MSIX_TABLE + vector * 16;
            self.write(entry, 0xfee0_0000);
            self.write(entry + 8, vector as u32);
            self.write(entry + 12, 0);
        }
        let mut at = self.device.config_read(0x34, 1) as usize;
        while self.device.config_read(at, 1) != 0x11 {
            at = self.device.config_read(at + 1, 1) as usize;
        }
        self.device.config_write(Bdf::new(1, 0, 0), at + 2, 2, 0x8000);
        self.write(0x24, (ENTRIES - 1) | (ENTRIES - 1) << 16);
        self.device.write(0, 0x28, 8, submission(0));
        self.device.write(0, 0x30, 8, completion(0));
        self.write(0x14, 0x0046_0001);
        assert_eq!(self.read(0x1c), 1, "CSTS.RDY");
    }

    /// Puts a command into a queue and rings the doorbell.
    fn submit(&mut self, queue: u16, command: &[u8; 64]) {
        let tail = &mut self.rings[usize::from(queue)].0;
        self.ram.write(L1Gpa(submission(queue) + u64::from(*tail) * 64), command).unwrap();
        *tail = (*tail + 1) % ENTRIES;
        let tail = *tail;
        self.write(0x1000 + u64::from(queue) * 8, tail);
    }

    /// Waits for a completion and takes it: status without "do not retry", result, identifier.
    fn wait(&mut self, queue: u16) -> (u16, u32, u16) {
        let vector = self.messages.recv_timeout(Duration::from_secs(60)).expect("an interrupt");
        assert_eq!(vector, u32::from(queue));
        let head = &mut self.rings[usize::from(queue)].1;
        let mut bytes = [0; 16];
        self.ram.read(L1Gpa(completion(queue) + u64::from(*head) * 16), &mut bytes).unwrap();
        *head = (*head + 1) % ENTRIES;
        let head = *head;
        self.write(0x1004 + u64::from(queue) * 8, head);
        let word = |i: usize| u16::from_le_bytes([bytes[i], bytes[i + 1]]);
        let result = u32::from(word(0)) | u32::from(word(2)) << 16;
        assert_eq!(word(10), queue);
        (word(14) >> 1 & 0x7ff, result, word(12))
    }

    fn run(&mut self, queue: u16, command: &[u8; 64]) -> (u16, u32) {
        self.submit(queue, command);
        let (status, result, id) = self.wait(queue);
        assert_eq!(id, 0x5a);
        (status, result)
    }

    fn admin(&mut self, opcode: u8, prp: [u64; 2], dwords: &[u32]) -> (u16, u32) {
        self.run(0, &command(opcode, 0, prp, dwords))
    }

    /// A command of namespace 1 with blocks; its status.
    fn io(&mut self, opcode: u8, prp: [u64; 2], block: u64, blocks: u32, flags: u32) -> u16 {
        let dwords = [block as u32, (block >> 32) as u32, (blocks - 1) | flags];
        self.run(1, &command(opcode, 1, prp, &dwords)).0
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.ram.read(L1Gpa(at), &mut bytes).unwrap();
        bytes
    }

    fn wait_fatal(&mut self) {
        let start = std::time::Instant::now();
        while self.read(0x1c) & 2 == 0 {
            assert!(start.elapsed() < Duration::from_secs(60), "no CSTS.CFS");
            std::thread::yield_now();
        }
    }
}

const FLUSH: u8 = 0;
const WRITE: u8 = 1;
const READ: u8 = 2;
const ZEROES: u8 = 8;
const DSM: u8 = 9;

/// Bytes that differ from page to page and within one.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i >> 12) as u8 ^ (i as u8).rotate_left(3)).collect()
}

#[test]
fn the_controller_describes_itself() {
    let mut d = Driver::start(MemoryDisk::new(SECTORS));
    assert_eq!(d.read(0x08), 0x0001_0400);
    assert_eq!(d.read(0x00) & 0xffff, 1023);
    assert_eq!(d.run(0, &command(6, 0, [DATA, 0], &[1])), (0, 0));
    let id = d.bytes(DATA, 4096);
    assert_eq!(&id[4..24], b"serial              ");
    assert_eq!((id[77], &id[512..514], id[516], id[525] & 1), (7, &[0x66, 0x44][..], 1, 1));
    assert!(id[768..].starts_with(b"nqn.2014-08.org.nvmexpress:"));
    assert_eq!(d.run(0, &command(6, 1, [DATA, 0], &[0])), (0, 0));
    let id = d.bytes(DATA, 4096);
    assert_eq!(id[..8], (SECTORS as u64).to_le_bytes());
    assert_eq!((id[99], id[130]), (0, 9));
    assert_eq!(d.run(0, &command(6, 0, [DATA, 0], &[2])), (0, 0));
    assert_eq!(d.bytes(DATA, 8), [1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(d.run(0, &command(6, 2, [DATA, 0], &[0])).0, 0x0b, "no namespace 2");
    // Number of queues, minus one, both kinds.
    assert_eq!(d.admin(9, [0; 2], &[7, 0x00ff_00ff]), (0, 0x0007_0007));
    assert_eq!(d.admin(10, [0; 2], &[6]), (0, 1), "the write cache is on");
    assert_eq!(d.admin(10, [0; 2], &[0x80]).0, 2);
    // SMART: 512 bytes, temperature at 1.
    assert_eq!(d.admin(2, [DATA, 0], &[127 << 16 | 2]), (0, 0));
    assert_eq!(d.bytes(DATA + 1, 2), 300u16.to_le_bytes());
    assert_eq!(d.admin(2, [DATA, 0], &[127 << 16 | 0x77]).0, 0x109);
    assert_eq!(d.admin(0x99, [0; 2], &[]).0, 1);
}

#[test]
fn blocks_are_written_and_read_through_every_form_of_pointers() {
    let mut d = Driver::start(MemoryDisk::new(SECTORS));
    let (page, list) = (|i: u64| DATA + i * 0x2000, DATA - 0x1000);
    let put_list = |d: &Driver, at: u64, entries: &[u64]| {
        let bytes: Vec<u8> = entries.iter().flat_map(|e| e.to_le_bytes()).collect();
        d.ram.write(L1Gpa(at), &bytes).unwrap();
    };
    // Length, pointers, and the pieces of memory that they name.
    let ends = (page(130) - DATA) as usize;
    let whole: Vec<u64> = (0..128).map(page).collect();
    put_list(&d, list, &whole[1..]);
    type Case = (u32, [u64; 2], Vec<(u64, usize)>);
    let cases: [Case; 5] = [
        (1, [page(0) + 0x200, 0], vec![(page(0) + 0x200, 512)]),
        (8, [page(0), 0], vec![(page(0), 4096)]),
        (9, [page(0) + 0x400, page(1)], vec![(page(0) + 0x400, 3072), (page(1), 1536)]),
        (1024, [page(0), list], whole.iter().map(|p| (*p, 4096)).collect()),
        (
            24,
            [page(0) + 0x800, list],
            vec![(page(0) + 0x800, 2048), (page(1), 4096), (page(2), 4096), (page(3), 2048)],
        ),
    ];
    for (blocks, prp, pieces) in cases {
        let data = pattern(blocks as usize * 512);
        d.ram.fill(L1Gpa(DATA), 0, ends).unwrap();
        let mut at = 0;
        for (to, len) in &pieces {
            d.ram.write(L1Gpa(*to), &data[at..at + len]).unwrap();
            at += len;
        }
        assert_eq!(d.io(WRITE, prp, 16, blocks, 0), 0, "{blocks} blocks");
        assert_eq!(lock(&d.disk.bytes)[16 * 512..][..data.len()], data);
        d.ram.fill(L1Gpa(DATA), 0, ends).unwrap();
        assert_eq!(d.io(READ, prp, 16, blocks, 0), 0);
        let back: Vec<u8> = pieces.iter().flat_map(|(from, len)| d.bytes(*from, *len)).collect();
        assert_eq!(back, data, "{blocks} blocks");
    }
    // A list that begins two entries before its page's end: the last one leads on to the next.
    put_list(&d, list + 0xff0, &[page(1), list - 0x1000]);
    put_list(&d, list - 0x1000, &[page(2), page(3)]);
    assert_eq!(d.io(READ, [page(0), list + 0xff0], 16, 32, 0), 0);
    assert_eq!(d.bytes(page(3), 4096), lock(&d.disk.bytes)[16 * 512 + 3 * 4096..][..4096]);
}

#[test]
fn what_has_to_be_on_disk_is_flushed() {
    let mut d = Driver::start(MemoryDisk::new(SECTORS));
    let flushes = |d: &Driver| *lock(&d.disk.flushes);
    assert_eq!(d.io(WRITE, [DATA, 0], 0, 1, 0), 0);
    assert_eq!(flushes(&d), 0);
    assert_eq!(d.io(WRITE, [DATA, 0], 0, 1, 1 << 30), 0);
    assert_eq!(flushes(&d), 1, "FUA");
    assert_eq!(d.io(FLUSH, [0; 2], 0, 1, 0), 0);
    assert_eq!(flushes(&d), 2);
    assert_eq!(d.run(1, &command(FLUSH, u32::MAX, [0; 2], &[])).0, 0);
    assert_eq!(flushes(&d), 3);
    // Without the volatile write cache, each write.
    assert_eq!(d.admin(9, [0; 2], &[6, 0]), (0, 0));
    assert_eq!(d.io(WRITE, [DATA, 0], 0, 1, 0), 0);
    assert_eq!(flushes(&d), 4);
    // A shutdown.
    d.write(0x14, 0x0046_4001);
    let start = std::time::Instant::now();
    while d.read(0x1c) & 0b1100 != 0b1000 {
        assert!(start.elapsed() < Duration::from_secs(60), "no CSTS.SHST");
        std::thread::yield_now();
    }
    assert_eq!(flushes(&d), 5);
}

#[test]
fn blocks_are_zeroed_and_deallocated() {
    let mut d = Driver::start(MemoryDisk::new(64));
    let holes = |d: &Driver| {
        let bytes = lock(&d.disk.bytes);
        bytes.chunks(512).map(|s| s.iter().all(|b| *b == 0)).collect::<Vec<_>>()
    };
    let is = |blocks: &[usize]| (0..64).map(|i| blocks.contains(&i)).collect::<Vec<_>>();
    lock(&d.disk.bytes).fill(1);
    assert_eq!(d.io(ZEROES, [0; 2], 3, 2, 0), 0);
    assert_eq!(holes(&d), is(&[3, 4]));
    // Two ranges: attributes, length, first block.
    lock(&d.disk.bytes).fill(1);
    let ranges: Vec<u8> = [0u32, 1, 7, 0, 0, 2, 60, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
    d.ram.write(L1Gpa(DATA), &ranges).unwrap();
    assert_eq!(d.run(1, &command(DSM, 1, [DATA, 0], &[1, 0])).0, 0);
    assert_eq!(holes(&d), is(&[]), "hints only");
    assert_eq!(d.run(1, &command(DSM, 1, [DATA, 0], &[1, 4])).0, 0);
    assert_eq!(holes(&d), is(&[7, 60, 61]));
    // One range outside: nothing is done.
    lock(&d.disk.bytes).fill(1);
    d.ram.write(L1Gpa(DATA + 24), &63u32.to_le_bytes()).unwrap();
    assert_eq!(d.run(1, &command(DSM, 1, [DATA, 0], &[1, 4])).0, 0x80);
    assert_eq!(holes(&d), is(&[]));
}

#[test]
fn errors_have_the_statuses_that_the_specification_names() {
    let mut d = Driver::start(MemoryDisk::new(SECTORS));
    let list = DATA - 0x1000;
    for (opcode, prp, block, blocks, status) in [
        (READ, [DATA, 0], SECTORS as u64, 1, 0x80),
        (READ, [DATA, 0], u64::MAX, 1, 0x80),
        (WRITE, [DATA, 0], SECTORS as u64 - 1, 2, 0x80),
        (ZEROES, [DATA, 0], SECTORS as u64 - 1, 2, 0x80),
        // More than MDTS.
        (READ, [DATA, list], 0, 1025, 0x02),
        (READ, [DATA + 1, 0], 0, 1, 0x13),
        (READ, [DATA, DATA + 8], 0, 9, 0x13),
        (READ, [DATA, list + 4], 0, 32, 0x13),
        // Not RAM: data, second page, list.
        (READ, [RAM, 0], 0, 1, 0x04),
        (WRITE, [u64::MAX - 0xfff, 0], 0, 1, 0x04),
        (WRITE, [DATA, RAM], 0, 16, 0x04),
        (WRITE, [DATA, RAM], 0, 32, 0x04),
        (0x7f, [DATA, 0], 0, 1, 0x01),
    ] {
        assert_eq!(d.io(opcode, prp, block, blocks, 0), status, "{opcode} {prp:x?} {block:#x} {blocks}");
    }
    // A list whose last entry leads to itself.
    d.ram.write(L1Gpa(list + 0xff8), &(list + 0xff8).to_le_bytes()).unwrap();
    assert_eq!(d.io(READ, [DATA, list + 0xff8], 0, 32, 0), 0x02);
    assert_eq!(d.run(1, &command(READ, 2, [DATA, 0], &[0; 3])).0, 0x0b);
    // A fused command, and scatter-gather lists.
    for flags in [1, 0x40] {
        let mut c = command(READ, 1, [DATA, 0], &[0; 3]);
        c[1] = flags;
        assert_eq!(d.run(1, &c).0, 0x02);
    }
    // ENOSPC: write fault and unrecovered read error, media errors.
    *lock(&d.disk.failure) = Some(28);
    assert_eq!(d.io(WRITE, [DATA, 0], 0, 1, 0), 0x280);
    assert_eq!(d.io(FLUSH, [DATA, 0], 0, 1, 0), 0x280);
    assert_eq!(d.io(READ, [DATA, 0], 0, 1, 0), 0x281);
    *lock(&d.disk.failure) = None;
    assert_eq!(d.io(READ, [DATA, 0], 0, 1, 0), 0);

    let mut d = Driver::start(MemoryDisk { read_only: true, ..MemoryDisk::new(8) });
    for opcode in [WRITE, ZEROES] {
        assert_eq!(d.io(opcode, [DATA, 0], 0, 1, 0), 0x20);
    }
    assert_eq!(d.run(0, &command(6, 1, [DATA, 0], &[0])), (0, 0));
    assert_eq!(d.bytes(DATA + 99, 1), [1], "write protected");
}

#[test]
fn queues_are_made_and_deleted_in_order() {
    let mut d = Driver::start(MemoryDisk::new(8));
    let size = (ENTRIES - 1) << 16;
    for (opcode, dwords, prp, status) in [
        (5, [size | 1, 1], completion(2), 0x101),
        (5, [size, 1], completion(2), 0x101),
        (5, [size | 9, 1], completion(2), 0x101),
        (5, [2, 1], completion(2), 0x102),
        (5, [1024 << 16 | 2, 1], completion(2), 0x102),
        (5, [size | 2, 0], completion(2), 0x02),
        (5, [size | 2, 9 << 16 | 0b11], completion(2), 0x108),
        (5, [size | 2, 1], completion(2) + 8, 0x13),
        (1, [size | 2, 2 << 16 | 1], submission(2), 0x100),
        (1, [size | 2, 1], submission(2), 0x100),
        (4, [1, 0], 0, 0x10c),
        (4, [0, 0], 0, 0x101),
        (0, [0, 0], 0, 0x101),
        (0, [2, 0], 0, 0x101),
        (0, [1, 0], 0, 0),
        (4, [1, 0], 0, 0),
        (4, [1, 0], 0, 0x101),
    ] {
        assert_eq!(d.admin(opcode, [prp, 0], &dwords).0, status, "{opcode} {dwords:x?}");
    }
}

#[test]
fn a_wrong_doorbell_is_an_event() {
    let mut d = Driver::start(MemoryDisk::new(8));
    // Four requests are kept, a fifth is too many.
    for _ in 0..4 {
        d.submit(0, &command(12, 0, [0; 2], &[]));
    }
    assert_eq!(d.admin(12, [0; 2], &[]).0, 0x105);
    // Queue 2 does not exist; a tail outside queue 1.
    d.write(0x1000 + 2 * 8, 1);
    assert_eq!(d.wait(0), (0, 0x01_0000, 0x5a));
    d.write(0x1000 + 8, ENTRIES);
    assert_eq!(d.wait(0), (0, 0x01_0100, 0x5a));
    assert_eq!(d.io(READ, [DATA, 0], 0, 1, 0), 0);
}

#[test]
fn commands_wait_while_there_is_no_room_for_completions() {
    let mut d = Driver::start(MemoryDisk::new(SECTORS));
    let read = command(READ, 1, [DATA, 0], &[0; 3]);
    // Seven commands fill a completion queue of eight; the head stays where it was.
    for _ in 0..7 {
        d.submit(1, &read);
        d.messages.recv_timeout(Duration::from_secs(60)).expect("an interrupt");
    }
    d.submit(1, &read);
    d.rings[1].1 = 7;
    d.write(0x1004 + 8, 7);
    assert_eq!(d.wait(1).0, 0);
    // The phase has changed where the queue started anew.
    assert_eq!(d.io(READ, [DATA, 0], 0, 1, 0), 0);
    assert_eq!(d.bytes(completion(1) + 14, 2)[0] & 1, 0, "second round");
    assert_eq!(d.bytes(completion(1) + 7 * 16 + 14, 2)[0] & 1, 1, "first round");
}

#[test]
fn a_controller_that_can_t_go_on_says_so_until_it_is_reset() {
    let mut d = Driver::new(MemoryDisk::new(8));
    // Pages of 8 KiB.
    d.write(0x24, 0x0007_0007);
    d.write(0x14, 0x0046_0081);
    assert_eq!(d.read(0x1c), 2);
    d.write(0x14, 0);
    assert_eq!(d.read(0x1c), 0);
    // Admin queues where no RAM is.
    d.device.write(0, 0x28, 8, RAM);
    d.device.write(0, 0x30, 8, completion(0));
    d.write(0x14, 0x0046_0001);
    d.write(0x1000, 1);
    d.wait_fatal();
    d.write(0x14, 0);
    d.enable();
    assert_eq!(d.admin(6, [DATA, 0], &[1]).0, 0);
    // A function-level reset: registers are as after power-up.
    d.device.reset();
    assert_eq!((d.read(0x14), d.read(0x1c), d.read(0x28)), (0, 0, 0));
    d.device.config_write(Bdf::new(1, 0, 0), 4, 2, 0b110);
    d.enable();
    assert_eq!(d.admin(6, [DATA, 0], &[1]).0, 0);
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(48))]

    /// Data goes where the PRP entries say, whichever pages these name, wherever the first begins, and however the lists
    /// are laid out; and it comes back.
    #[test]
    fn data_is_where_the_pointers_say(
        blocks in 1..=1024u32,
        offset in 0..1024u64,
        stride in 0..200u64,
        in_list in 0..512u64,
    ) {
        let mut d = Driver::start(MemoryDisk::new(2048));
        let (offset, len) = (offset * 4, u64::from(blocks) * 512);
        // Distinct pages of the 256 from DATA on: an odd stride visits all.
        let page = |i: u64| DATA + (i * (stride * 2 + 1) % 256) * 4096;
        let mut pieces = vec![(page(0) + offset, len.min(4096 - offset))];
        let mut left = len - pieces[0].1;
        while left > 0 {
            pieces.push((page(pieces.len() as u64), left.min(4096)));
            left -= left.min(4096);
        }
        let rest: Vec<u64> = pieces[1..].iter().map(|(at, _)| *at).collect();
        // Lists are after the pages, the first beginning at entry `in_list`.
        let mut list = DATA + 256 * 4096 + in_list * 8;
        let second = match rest.as_slice() {
            [] => 0,
            [page] => *page,
            _ => list,
        };
        if rest.len() > 1 {
            let mut todo = rest.as_slice();
            while !todo.is_empty() {
                let room = (4096 - list as usize % 4096) / 8;
                let (now, later) = if todo.len() <= room { (todo, &[][..]) } else { todo.split_at(room - 1) };
                let mut entries: Vec<u8> = now.iter().flat_map(|e| e.to_le_bytes()).collect();
                let next = (list / 4096 + 1) * 4096;
                if !later.is_empty() {
                    entries.extend(next.to_le_bytes());
                }
                d.ram.write(L1Gpa(list), &entries).unwrap();
                (list, todo) = (next, later);
            }
        }
        let data = pattern(len as usize);
        let mut done = 0;
        for (at, n) in &pieces {
            d.ram.write(L1Gpa(*at), &data[done..done + *n as usize]).unwrap();
            done += *n as usize;
        }
        let prp = [pieces[0].0, second];
        proptest::prop_assert_eq!(d.io(WRITE, prp, 5, blocks, 0), 0);
        proptest::prop_assert!(lock(&d.disk.bytes)[5 * 512..][..data.len()] == data);
        for (at, n) in &pieces {
            d.ram.fill(L1Gpa(*at), 0xee, *n as usize).unwrap();
        }
        proptest::prop_assert_eq!(d.io(READ, prp, 5, blocks, 0), 0);
        let back: Vec<u8> = pieces.iter().flat_map(|(at, n)| d.bytes(*at, *n as usize)).collect();
        proptest::prop_assert!(back == data);
    }
}
