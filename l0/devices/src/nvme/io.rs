//! Commands of I/O queues (NVM Express 1.4 §6): Flush, Read, Write, Write Zeroes, Dataset Management.
//!
//! Not supported: Compare, Verify, Write Uncorrectable, reservations.

use super::command::{Command, Failure, Status};
use super::{Access, PAGE};
use crate::disk::SECTOR;

const FLUSH: u8 = 0x00;
const WRITE: u8 = 0x01;
const READ: u8 = 0x02;
const WRITE_ZEROES: u8 = 0x08;
const DATASET_MANAGEMENT: u8 = 0x09;

/// The namespace, and all namespaces.
pub(super) const NAMESPACE: u32 = 1;
pub(super) const ALL_NAMESPACES: u32 = u32::MAX;
/// Most data of a command: 2^7 pages (MDTS).
pub(super) const MAX_PAGES_LOG2: u8 = 7;
const MAX_BYTES: u64 = PAGE << MAX_PAGES_LOG2;

/// Doubleword 12: force unit access; deallocate (of Write Zeroes).
const FUA: u32 = 1 << 30;
const DEALLOCATE: u32 = 1 << 25;
/// Doubleword 11 of Dataset Management: deallocate.
const ATTRIBUTE_DEALLOCATE: u32 = 1 << 2;
/// A range: attributes, number of blocks, first block.
const RANGE: u64 = 16;

impl Access<'_> {
    /// Does a command; its result.
    pub(super) fn io(&self, c: &Command) -> Result<Option<u32>, Failure> {
        if c.flags != 0 {
            return Err(Status::INVALID_FIELD.into());
        }
        let known = matches!(c.opcode, FLUSH | WRITE | READ | WRITE_ZEROES | DATASET_MANAGEMENT);
        if !known {
            return Err(Status::INVALID_OPCODE.into());
        }
        let all = c.opcode == FLUSH && c.namespace == ALL_NAMESPACES;
        if c.namespace != NAMESPACE && !all {
            return Err(Status::INVALID_NAMESPACE.into());
        }
        match c.opcode {
            FLUSH => self.flush(),
            READ => self.read(c),
            WRITE => self.write(c),
            WRITE_ZEROES => self.write_zeroes(c),
            _ => self.dataset_management(c),
        }
        .map(|()| Some(0))
    }

    fn flush(&self) -> Result<(), Failure> {
        self.controller.storage.flush().map_err(|e| failed(&e, Status::WRITE_FAULT))
    }

    /// Offset and length in bytes of the blocks that a command names.
    fn range(&self, c: &Command) -> Result<(u64, u64), Failure> {
        let first = u64::from(c.dw10()) | u64::from(c.dw11()) << 32;
        let blocks = u64::from(c.dw12() & 0xffff) + 1;
        self.locate(first, blocks)
    }

    fn locate(&self, first: u64, blocks: u64) -> Result<(u64, u64), Failure> {
        let size = self.controller.storage.size() / SECTOR;
        match first.checked_add(blocks) {
            Some(end) if end <= size => Ok((first * SECTOR, blocks * SECTOR)),
            _ => Err(Status::LBA_OUT_OF_RANGE.into()),
        }
    }

    /// The same for a command with data.
    fn data_range(&self, c: &Command) -> Result<(u64, u64), Failure> {
        let (offset, len) = self.range(c)?;
        if len > MAX_BYTES { Err(Status::INVALID_FIELD.into()) } else { Ok((offset, len)) }
    }

    fn read(&self, c: &Command) -> Result<(), Failure> {
        let (offset, len) = self.data_range(c)?;
        let mut bytes = vec![0; len as usize];
        let read = self.controller.storage.read(offset, &mut bytes);
        read.map_err(|e| failed(&e, Status::READ_ERROR))?;
        self.give(c, &bytes)
    }

    fn write(&self, c: &Command) -> Result<(), Failure> {
        self.check_writable()?;
        let (offset, len) = self.data_range(c)?;
        let bytes = self.take(c, len)?;
        let written = self.controller.storage.write(offset, &bytes);
        written.map_err(|e| failed(&e, Status::WRITE_FAULT))?;
        self.write_through(c.dw12() & FUA != 0)
    }

    fn write_zeroes(&self, c: &Command) -> Result<(), Failure> {
        self.check_writable()?;
        let (offset, len) = self.range(c)?;
        let zeroed = self.controller.storage.zero(offset, len, c.dw12() & DEALLOCATE != 0);
        zeroed.map_err(|e| failed(&e, Status::WRITE_FAULT))?;
        self.write_through(c.dw12() & FUA != 0)
    }

    /// Dataset Management (§6.7). Hints other than deallocation are taken note of in no way.
    fn dataset_management(&self, c: &Command) -> Result<(), Failure> {
        let count = u64::from(c.dw10() & 0xff) + 1;
        let ranges = self.take(c, count * RANGE)?;
        if c.dw11() & ATTRIBUTE_DEALLOCATE == 0 {
            return Ok(());
        }
        self.check_writable()?;
        let located = ranges.chunks_exact(RANGE as usize).map(|r| {
            let number = |bytes: &[u8]| bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b));
            self.locate(number(&r[8..16]), number(&r[4..8]))
        });
        // None is done unless all can be.
        for (offset, len) in located.collect::<Result<Vec<_>, _>>()? {
            if len > 0 {
                let done = self.controller.storage.discard(offset, len);
                done.map_err(|e| failed(&e, Status::WRITE_FAULT))?;
            }
        }
        self.write_through(false)
    }

    fn check_writable(&self) -> Result<(), Failure> {
        if self.controller.storage.is_read_only() { Err(Status::WRITE_PROTECTED.into()) } else { Ok(()) }
    }

    /// Flushes if the command wants that, or the system has switched the volatile write cache off.
    fn write_through(&self, wanted: bool) -> Result<(), Failure> {
        let cached = self.state()?.features.write_cache();
        if wanted || !cached { self.flush() } else { Ok(()) }
    }
}

fn failed(e: &std::io::Error, status: Status) -> Failure {
    tracing::warn!("an NVMe disk of the guest: {e}; the guest sees an I/O error");
    status.into()
}
