//! Submission and completion queues (NVM Express 1.4 §4.1): rings in the guest's memory.
//!
//! Not supported: queues that are not contiguous.

use std::sync::atomic::Ordering;

use memory::BusAddress;
use memory::dma::{DmaFault, DmaSession};
use vm_memory::{Bytes, GuestAddress};

use super::command::{Command, Status};

/// A doorbell was written with a value outside the queue.
#[derive(Clone, Copy, Debug)]
pub struct OutOfRange;

/// A submission queue.
#[derive(Debug)]
pub struct SubmissionQueue {
    base: BusAddress,
    size: u32,
    /// The next entry to be done.
    pub head: u32,
    tail: u32,
    /// The completion queue's identifier.
    pub completion: u16,
}

impl SubmissionQueue {
    /// `size` entries at `base`.
    pub fn new(base: BusAddress, size: u32, completion: u16) -> Self {
        Self { base, size, head: 0, tail: 0, completion }
    }

    /// The tail doorbell.
    ///
    /// # Errors
    /// [`OutOfRange`].
    pub fn set_tail(&mut self, tail: u32) -> Result<(), OutOfRange> {
        if tail >= self.size {
            return Err(OutOfRange);
        }
        self.tail = tail;
        Ok(())
    }

    /// Takes the next entry: where it is.
    pub fn next(&mut self) -> Option<BusAddress> {
        if self.head == self.tail {
            return None;
        }
        let at = self.base.offset(u64::from(self.head) * Command::SIZE as u64);
        self.head = (self.head + 1) % self.size;
        Some(at)
    }
}

/// What is written to a completion queue (§4.6).
#[derive(Debug)]
pub struct Completion {
    /// Command-specific.
    pub result: u32,
    /// The submission queue's head.
    pub head: u16,
    /// The submission queue.
    pub queue: u16,
    /// The command's identifier.
    pub command: u16,
    /// The outcome.
    pub status: Status,
}

/// A completion queue.
#[derive(Debug)]
pub struct CompletionQueue {
    base: BusAddress,
    size: u32,
    head: u32,
    tail: u32,
    phase: bool,
    /// The interrupt vector, if it interrupts.
    pub vector: Option<u16>,
}

impl CompletionQueue {
    const ENTRY: u64 = 16;

    /// `size` entries at `base`.
    pub fn new(base: BusAddress, size: u32, vector: Option<u16>) -> Self {
        Self { base, size, head: 0, tail: 0, phase: true, vector }
    }

    /// The head doorbell; whether the queue was full before.
    ///
    /// # Errors
    /// [`OutOfRange`].
    pub fn set_head(&mut self, head: u32) -> Result<bool, OutOfRange> {
        if head >= self.size {
            return Err(OutOfRange);
        }
        let was_full = self.is_full();
        self.head = head;
        Ok(was_full)
    }

    /// Whether the system has seen all entries.
    pub fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// Whether no entry can be written.
    pub fn is_full(&self) -> bool {
        (self.tail + 1) % self.size == self.head
    }

    /// Writes an entry, the phase last.
    ///
    /// # Errors
    /// [`DmaFault`].
    pub fn post(&mut self, memory: &DmaSession<'_>, c: &Completion) -> Result<(), DmaFault> {
        let at = self.base.offset(u64::from(self.tail) * Self::ENTRY);
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&c.result.to_le_bytes());
        bytes[8..10].copy_from_slice(&c.head.to_le_bytes());
        bytes[10..].copy_from_slice(&c.queue.to_le_bytes());
        memory.write(at, &bytes)?;
        let last = u32::from(c.command) | u32::from(self.phase) << 16 | u32::from(c.status.0) << 17;
        let to = at.offset(12);
        if memory.store(last, GuestAddress(to.0), Ordering::Release).is_err() {
            // The same again, for the reason.
            memory.write(to, &last.to_le_bytes())?;
        }
        self.tail = (self.tail + 1) % self.size;
        self.phase ^= self.tail == 0;
        Ok(())
    }
}
