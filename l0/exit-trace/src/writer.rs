//! Writes a trace: a ring of chunks for each vCPU, bounded in size.
//!
//! A writer that is killed leaves a file that can be read: records are written before the chunk's header
//! that covers them, and a chunk that replaces an old one first takes away its header.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::format::{CHUNK_SIZE, ChunkHeader, HEADER_SIZE, Header, RECORD_SIZE, RECORDS, encode};
use crate::record::Event;

/// The smallest file in bytes: two chunks for one vCPU.
pub const MIN_SIZE: u64 = HEADER_SIZE as u64 + 2 * CHUNK_SIZE as u64;

/// Writes the records of one vCPU.
#[derive(Debug)]
pub struct TraceWriter {
    file: Arc<File>,
    header: Header,
    /// The chunk that is being filled.
    chunk: ChunkHeader,
    /// Its records.
    records: Vec<u8>,
    /// How many of their bytes are in the file.
    written: usize,
    sum: crc32fast::Hasher,
    /// The first error; nothing is written after it.
    error: Option<io::Error>,
}

/// Starts a trace in an empty `file` of at most `size` bytes (at least two chunks for each vCPU): a writer for
/// each of `vcpus`. `start_unix_ns` is when the machine starts.
///
/// # Errors
/// When the file can't be written.
pub fn start(
    file: File,
    size: u64,
    vcpus: u32,
    tsc_hz: u64,
    start_unix_ns: u64,
) -> io::Result<Vec<TraceWriter>> {
    let vcpus = vcpus.max(1);
    let chunks = size.saturating_sub(HEADER_SIZE as u64) / CHUNK_SIZE as u64 / u64::from(vcpus);
    let chunks = chunks.clamp(2, crate::format::MAX_CHUNKS / u64::from(vcpus));
    let header = Header { vcpus, chunks, tsc_hz, start_unix_ns };
    file.write_all_at(&header.encode(), 0)?;
    let file = Arc::new(file);
    Ok((0..vcpus).map(|cpu| TraceWriter::new(file.clone(), header, cpu)).collect())
}

impl TraceWriter {
    fn new(file: Arc<File>, header: Header, cpu: u32) -> Self {
        Self {
            file,
            header,
            chunk: ChunkHeader { cpu, sequence: 0, first: 1, count: 0, sum: 0 },
            records: Vec::with_capacity(CHUNK_SIZE),
            written: 0,
            sum: crc32fast::Hasher::new(),
            error: None,
        }
    }

    /// Adds a record. `next` is the number of the exit after it.
    pub fn push(&mut self, event: &Event, next: u64) {
        if self.error.is_some() {
            return;
        }
        self.records.extend_from_slice(&encode(event));
        self.chunk.count += 1;
        if self.chunk.count as usize == RECORDS {
            self.flush();
            self.chunk.sequence += 1;
            (self.chunk.first, self.chunk.count) = (next, 0);
            (self.written, self.sum) = (0, crc32fast::Hasher::new());
            self.records.clear();
        }
    }

    /// Writes what is not in the file yet.
    pub fn flush(&mut self) {
        if self.error.is_none()
            && let Err(e) = self.try_flush()
        {
            self.error = Some(e);
        }
    }

    fn try_flush(&mut self) -> io::Result<()> {
        let new = self.records.get(self.written..).unwrap_or_default();
        if new.is_empty() {
            return Ok(());
        }
        let at = self.header.offset(self.chunk.cpu, self.chunk.sequence);
        if self.written == 0 {
            // An old chunk that is there loses its records.
            self.file.write_all_at(&[0; RECORD_SIZE], at)?;
        }
        self.file.write_all_at(new, at + (RECORD_SIZE + self.written) as u64)?;
        self.sum.update(new);
        self.written = self.records.len();
        self.chunk.sum = self.sum.clone().finalize();
        self.file.write_all_at(&self.chunk.encode(), at)
    }

    /// Why the trace ended early, if it did.
    pub fn error(&self) -> Option<&io::Error> {
        self.error.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_the_file_ends_the_trace_and_is_kept() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut writer = start(file.reopen().unwrap(), MIN_SIZE, 1, 1, 0).unwrap().remove(0);
        // Open for reading only.
        writer.file = Arc::new(File::open(file.path()).unwrap());
        for _ in 0..3 * RECORDS {
            writer.push(&Event::Idle { time_ns: 0, ns: 1 }, 1);
        }
        assert!(writer.error().is_some());
        assert_eq!(file.path().metadata().unwrap().len(), 52, "the header");
        assert!(writer.records.len() <= CHUNK_SIZE);
    }
}
