//! The virtio block device (Virtio 1.2 §5.2).
//!
//! Requests are done one after the other. What was written and flushed is on the host's disk when the guest is told so; a
//! driver that does not know flushes gets each write flushed. Errors of the host are I/O errors of the guest.
//!
//! Not supported: more than one queue, cache mode switching, secure erase, zones, lifetime information, geometry.

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::{Backend, Chain, ChainError, Handled};
use crate::disk::{SECTOR, Storage};

const ID: u16 = 2;
/// Mass storage controller, other.
const CLASS: u32 = 0x01_8000;
const QUEUE_SIZE: u16 = 256;
/// Data segments of a request: the queue, less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// The header: type, reserved, sector.
const HEADER: u64 = 16;
/// Bytes that are moved at a time.
const PIECE: u64 = 256 << 10;
/// Segments of a discard or zeroing, and sectors of one.
const MAX_RANGES: u32 = 32;
const MAX_RANGE_SECTORS: u32 = 4 << 20;
/// A range: sector, number of sectors, flags.
const RANGE: u64 = 16;
/// Its flag: space may be given back.
const RANGE_UNMAP: u32 = 1;

/// A block device on some storage.
pub struct Block {
    storage: Arc<dyn Storage>,
    /// What GET_ID answers.
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

/// How a request failed.
enum Failure {
    /// With a status for the driver.
    Status(u32),
    Chain(ChainError),
}

impl From<ChainError> for Failure {
    fn from(e: ChainError) -> Self {
        Self::Chain(e)
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        tracing::warn!("a disk of the guest: {e}; the guest sees an I/O error");
        Self::Status(VIRTIO_BLK_S_IOERR)
    }
}

const IO_ERROR: Failure = Failure::Status(VIRTIO_BLK_S_IOERR);
const UNSUPPORTED: Failure = Failure::Status(VIRTIO_BLK_S_UNSUPP);

impl Block {
    /// A disk that calls itself `serial`, of which 20 bytes count.
    pub fn new(storage: Arc<dyn Storage>, serial: &str) -> Self {
        let mut bytes = [0; VIRTIO_BLK_ID_BYTES as usize];
        bytes.iter_mut().zip(serial.bytes()).for_each(|(to, from)| *to = from);
        Self { storage, serial: bytes }
    }

    /// Does a request whose status byte is left out; the number of bytes written to it.
    fn request(&self, chain: &Chain<'_>) -> Result<u64, Failure> {
        let mut header = [0; HEADER as usize];
        chain.read(0, &mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let into = chain.writable_len().saturating_sub(1);
        let from = chain.readable_len() - HEADER;
        match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => self.read(chain, sector, into),
            VIRTIO_BLK_T_OUT => self.write(chain, sector, from),
            VIRTIO_BLK_T_FLUSH => Ok(self.storage.flush().map(|()| 0)?),
            VIRTIO_BLK_T_GET_ID => {
                let len = into.min(self.serial.len() as u64);
                chain.write(0, self.serial.get(..len as usize).unwrap_or_default())?;
                Ok(len)
            }
            VIRTIO_BLK_T_DISCARD => self.ranges(chain, from, |offset, len, flags| {
                if flags != 0 {
                    return Err(UNSUPPORTED);
                }
                Ok(self.storage.discard(offset, len)?)
            }),
            VIRTIO_BLK_T_WRITE_ZEROES => self.ranges(chain, from, |offset, len, flags| {
                if flags & !RANGE_UNMAP != 0 {
                    return Err(UNSUPPORTED);
                }
                Ok(self.storage.zero(offset, len, flags & RANGE_UNMAP != 0)?)
            }),
            _ => Err(UNSUPPORTED),
        }
    }

    /// Where `len` bytes from `sector` on are, if the disk has them.
    fn locate(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR).ok_or(IO_ERROR)?;
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.storage.size());
        if inside && len.is_multiple_of(SECTOR) { Ok(offset) } else { Err(IO_ERROR) }
    }

    fn read(&self, chain: &Chain<'_>, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = self.locate(sector, len)?;
        let mut buf = vec![0; len.min(PIECE) as usize];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(PIECE) as usize;
            let piece = buf.get_mut(..n).ok_or(IO_ERROR)?;
            self.storage.read(offset + done, piece)?;
            chain.write(done, piece)?;
            done += n as u64;
        }
        Ok(len)
    }

    fn write(&self, chain: &Chain<'_>, sector: u64, len: u64) -> Result<u64, Failure> {
        self.check_writable()?;
        let offset = self.locate(sector, len)?;
        let mut buf = vec![0; len.min(PIECE) as usize];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(PIECE) as usize;
            let piece = buf.get_mut(..n).ok_or(IO_ERROR)?;
            chain.read(HEADER + done, piece)?;
            self.storage.write(offset + done, piece)?;
            done += n as u64;
        }
        self.write_through(chain)?;
        Ok(0)
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.storage.is_read_only() { Err(IO_ERROR) } else { Ok(()) }
    }

    /// Without the feature, a driver takes a write that is done for one that stays (§5.2.6.2).
    fn write_through(&self, chain: &Chain<'_>) -> Result<(), Failure> {
        if !chain.has_feature(VIRTIO_BLK_F_FLUSH) {
            self.storage.flush()?;
        }
        Ok(())
    }

    /// Calls `f` for each range that a discard or zeroing names: offset and length in bytes, flags.
    fn ranges(
        &self,
        chain: &Chain<'_>,
        len: u64,
        f: impl Fn(u64, u64, u32) -> Result<(), Failure>,
    ) -> Result<u64, Failure> {
        self.check_writable()?;
        if !len.is_multiple_of(RANGE) || len / RANGE > MAX_RANGES.into() {
            return Err(IO_ERROR);
        }
        for at in (0..len).step_by(RANGE as usize) {
            let mut range = [0; RANGE as usize];
            chain.read(HEADER + at, &mut range)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = range;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
            if sectors > MAX_RANGE_SECTORS {
                return Err(IO_ERROR);
            }
            let bytes = u64::from(sectors) * SECTOR;
            let offset = self.locate(sector, bytes)?;
            // The host refuses empty ranges.
            if bytes > 0 {
                f(offset, bytes, u32::from_le_bytes([f0, f1, f2, f3]))?;
            }
        }
        self.write_through(chain)?;
        Ok(0)
    }
}

impl Backend for Block {
    fn id(&self) -> u16 {
        ID
    }
    fn class(&self) -> u32 {
        CLASS
    }
    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        let more = if self.storage.is_read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        common | more
    }
    fn queues(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    /// §5.2.4.
    fn config(&self) -> Vec<u8> {
        let mut c = vec![0; 60];
        let mut set = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
        set(0, &(self.storage.size() / SECTOR).to_le_bytes());
        set(12, &SEG_MAX.to_le_bytes());
        set(20, &(SECTOR as u32).to_le_bytes());
        // Discard: sectors, segments, alignment; zeroing: sectors, segments, may give space back.
        for at in [36, 48] {
            set(at, &MAX_RANGE_SECTORS.to_le_bytes());
            set(at + 4, &MAX_RANGES.to_le_bytes());
        }
        set(44, &1u32.to_le_bytes());
        set(56, &[1]);
        c
    }

    fn handle(&mut self, _queue: usize, chain: &mut Chain<'_>) -> Handled {
        let writable = chain.writable_len();
        // No place for the status, or no header: the driver can't be told.
        if writable == 0 || chain.readable_len() < HEADER {
            return Handled::Broken;
        }
        let (status, written) = match self.request(chain) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Status(status)) => (status, 0),
            // The data can't be reached; perhaps the status can.
            Err(Failure::Chain(ChainError::Fault)) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Chain(ChainError::Gone)) => return Handled::Gone,
        };
        match chain.write(writable - 1, &[status as u8]) {
            Ok(()) => Handled::Done(u32::try_from(written + 1).unwrap_or(u32::MAX)),
            Err(e) => e.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::lock;
    use crate::disk::testing::MemoryDisk;
    use crate::virtio::testing::{DATA, Driver, RAM};
    use memory::L1Gpa;

    const STATUS: u64 = DATA + 0x1000;
    const BUFFER: u64 = DATA + 0x2000;

    fn start(disk: MemoryDisk, without: u64) -> (Driver, Arc<MemoryDisk>) {
        let disk = Arc::new(disk);
        (Driver::start(Box::new(Block::new(disk.clone(), "serial")), without), disk)
    }

    /// A request with one data segment at BUFFER; its status, and how many bytes the device wrote.
    fn request(d: &mut Driver, kind: u32, sector: u64, data: Option<(u32, bool)>) -> (u8, u32) {
        header(d, kind, sector);
        let mut segments = vec![(DATA, 16, false)];
        segments.extend(data.map(|(len, write)| (BUFFER, len, write)));
        segments.push((STATUS, 1, true));
        let written = d.request(&segments);
        (status(d), written)
    }

    fn header(d: &Driver, kind: u32, sector: u64) {
        d.ram.write(L1Gpa(DATA), &kind.to_le_bytes()).unwrap();
        d.ram.write(L1Gpa(DATA + 8), &sector.to_le_bytes()).unwrap();
        d.ram.write(L1Gpa(STATUS), &[0xff]).unwrap();
    }

    fn status(d: &Driver) -> u8 {
        let mut status = [0];
        d.ram.read(L1Gpa(STATUS), &mut status).unwrap();
        status[0]
    }

    fn at_buffer(d: &Driver, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        d.ram.read(L1Gpa(BUFFER), &mut bytes).unwrap();
        bytes
    }

    // Request types and statuses: Virtio 1.2 §5.2.6.
    const IN: u32 = 0;
    const OUT: u32 = 1;
    const FLUSH: u32 = 4;
    const GET_ID: u32 = 8;
    const DISCARD: u32 = 11;
    const ZEROES: u32 = 13;

    #[test]
    fn sectors_are_written_read_zeroed_and_flushed() {
        let (mut d, disk) = start(MemoryDisk::new(2048), 0);
        assert_eq!(d.read(0x2000, 4), 2048, "capacity");
        d.ram.write(L1Gpa(BUFFER), &[0x5a; 1024]).unwrap();
        assert_eq!(request(&mut d, OUT, 3, Some((1024, false))), (0, 1));
        assert_eq!(lock(&disk.bytes)[1536..2560], [0x5a; 1024]);
        assert_eq!(*lock(&disk.flushes), 0);
        assert_eq!(request(&mut d, FLUSH, 0, None), (0, 1));
        assert_eq!(*lock(&disk.flushes), 1);
        // More than is moved at a time.
        assert_eq!(request(&mut d, IN, 0, Some((1 << 20, true))), (0, (1 << 20) + 1));
        assert_eq!(at_buffer(&d, 1 << 20), *lock(&disk.bytes));
        for kind in [ZEROES, DISCARD] {
            lock(&disk.bytes).fill(1);
            // A range: sector 1, two sectors, no flags.
            let range: Vec<u8> = [1u32, 0, 2, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
            d.ram.write(L1Gpa(BUFFER), &range).unwrap();
            assert_eq!(request(&mut d, kind, 0, Some((16, false))), (0, 1));
            assert!(
                lock(&disk.bytes).iter().enumerate().all(|(i, b)| *b == u8::from(!(512..1536).contains(&i)))
            );
        }
        assert_eq!(request(&mut d, GET_ID, 0, Some((20, true))), (0, 21));
        assert_eq!(at_buffer(&d, 7), b"serial\0");
        assert_eq!(request(&mut d, 99, 0, None), (2, 1));
    }

    #[test]
    fn without_flushes_each_write_is_flushed() {
        let (mut d, disk) = start(MemoryDisk::new(8), 1 << VIRTIO_BLK_F_FLUSH);
        assert_eq!(request(&mut d, OUT, 0, Some((512, false))).0, 0);
        assert_eq!(*lock(&disk.flushes), 1);
    }

    #[test]
    fn what_is_not_on_the_disk_is_an_io_error() {
        let (mut d, disk) = start(MemoryDisk::new(8), 0);
        for (kind, sector, len, write) in [
            (IN, 8, 512, true),
            (IN, 7, 1024, true),
            (IN, u64::MAX, 512, true),
            (IN, 0, 100, true),
            (OUT, u64::MAX / 512 + 1, 512, false),
            (OUT, 0, 511, false),
        ] {
            assert_eq!(request(&mut d, kind, sector, Some((len, write))), (1, 1), "{kind} {sector} {len}");
        }
        // ENOSPC.
        *lock(&disk.failure) = Some(28);
        for (kind, data) in [(IN, Some((512, true))), (OUT, Some((512, false))), (FLUSH, None)] {
            assert_eq!(request(&mut d, kind, 0, data), (1, 1));
        }
        *lock(&disk.failure) = None;
        assert_eq!(request(&mut d, IN, 0, Some((512, true))).0, 0);
    }

    #[test]
    fn a_read_only_disk_refuses_writes() {
        let (mut d, disk) = start(MemoryDisk { read_only: true, ..MemoryDisk::new(8) }, 0);
        assert_ne!(d.offered() & 1 << VIRTIO_BLK_F_RO, 0);
        d.ram.write(L1Gpa(BUFFER), &[1; 512]).unwrap();
        for kind in [OUT, DISCARD, ZEROES] {
            assert_eq!(request(&mut d, kind, 0, Some((512, false))).0, 1);
        }
        assert!(lock(&disk.bytes).iter().all(|b| *b == 0));
    }

    #[test]
    fn data_that_is_not_in_ram_is_an_io_error() {
        let (mut d, disk) = start(MemoryDisk::new(8), 0);
        for at in [RAM, RAM - 1, u64::MAX - 511, u64::MAX] {
            header(&d, OUT, 0);
            d.request(&[(DATA, 16, false), (at, 512, false), (STATUS, 1, true)]);
            assert_eq!(status(&d), 1, "{at:#x}");
        }
        assert!(lock(&disk.bytes).iter().all(|b| *b == 0));
    }

    #[test]
    fn requests_that_make_no_sense_stop_the_device_until_it_is_reset() {
        let (mut d, _) = start(MemoryDisk::new(8), 0);
        let malformed: [&[(u64, u32, bool)]; 4] = [
            &[(DATA, 16, false)],
            &[(STATUS, 1, true)],
            &[(DATA, 15, false), (STATUS, 1, true)],
            &[(DATA, 16, false), (RAM, 1, true)],
        ];
        for segments in malformed {
            header(&d, IN, 0);
            d.chain(segments);
            d.wait_broken();
            d.negotiate(0);
            assert_eq!(request(&mut d, IN, 0, Some((512, true))).0, 0);
        }
        // A descriptor that is its own successor: the chain is cut at the queue's size.
        header(&d, IN, 0);
        d.describe(0, 0, DATA, 16, 1, 0);
        d.offer(0, 0);
        d.wait_broken();
        d.negotiate(0);
        // An available index that is further on than there are entries.
        d.ram.write(L1Gpa(0x1_1002), &1000u16.to_le_bytes()).unwrap();
        d.write(0x3000, 2, 0);
        d.wait_broken();
        d.negotiate(0);
        assert_eq!(request(&mut d, IN, 0, Some((512, true))).0, 0);
    }

    #[test]
    fn nothing_is_done_before_the_driver_is_ready_or_after_a_reset() {
        let (mut d, _) = start(MemoryDisk::new(8), 0);
        assert_eq!(request(&mut d, IN, 0, Some((512, true))).0, 0);
        let used = d.last_used(0).0;
        d.write(20, 1, 0);
        header(&d, IN, 0);
        d.chain(&[(DATA, 16, false), (STATUS, 1, true)]);
        d.negotiate(0);
        assert_eq!(request(&mut d, IN, 0, Some((512, true))).0, 0);
        assert_eq!((d.last_used(0).0, used), (1, 1), "the queue started anew");
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let mut d = Driver::new(Box::new(Block::new(Arc::new(MemoryDisk::new(8)), "")));
        d.write(20, 1, 3);
        for (select, half) in [(0, 1 << 31), (1, 1)] {
            d.write(8, 4, select);
            d.write(12, 4, half);
        }
        d.write(20, 1, 0xf);
        assert_eq!(d.read(20, 1), 3, "neither FEATURES_OK nor DRIVER_OK");
    }
}
