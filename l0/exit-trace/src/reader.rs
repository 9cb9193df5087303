//! Reads a trace, whole or not.

use std::io::{self, Read, Seek, SeekFrom};

use crate::format::{BadHeader, CHUNK_SIZE, ChunkHeader, HEADER_SIZE, Header, RECORD_SIZE, checksum, decode};
use crate::record::Event;

/// Why a trace can't be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file can't be read.
    #[error("it can't be read: {0}")]
    Io(#[from] io::Error),
    /// It has no good header.
    #[error(transparent)]
    Header(#[from] BadHeader),
    /// There is no such vCPU.
    #[error("it has {vcpus} vCPUs; there is no number {cpu}")]
    NoVcpu {
        /// The number asked for.
        cpu: u32,
        /// How many there are.
        vcpus: u32,
    },
}

/// A chunk that seems whole.
#[derive(Clone, Copy, Debug)]
struct Place {
    header: ChunkHeader,
    at: u64,
}

/// A trace.
#[derive(Debug)]
pub struct Trace<R> {
    input: R,
    header: Header,
    places: Vec<Place>,
    damaged: u64,
}

impl<R: Read + Seek> Trace<R> {
    /// Looks for the chunks of a trace. Damaged ones are left out.
    ///
    /// # Errors
    /// [`TraceError`] without a good header, or when reading fails.
    pub fn new(mut input: R) -> Result<Self, TraceError> {
        let length = input.seek(SeekFrom::End(0))?;
        let mut bytes = Vec::new();
        input.seek(SeekFrom::Start(0))?;
        input.by_ref().take(HEADER_SIZE as u64).read_to_end(&mut bytes)?;
        let header = Header::decode(&bytes)?;
        let mut trace = Self { input, header, places: Vec::new(), damaged: 0 };
        for cpu in 0..header.vcpus {
            for place in 0..header.chunks {
                let at = header.offset(cpu, place);
                if at >= length {
                    break;
                }
                trace.look(cpu, place, at)?;
            }
        }
        trace.places.sort_by_key(|p| (p.header.cpu, p.header.sequence));
        Ok(trace)
    }

    /// Fills `bytes` from `at`; whether there are so many.
    fn fill(&mut self, at: u64, bytes: &mut [u8]) -> Result<bool, TraceError> {
        self.input.seek(SeekFrom::Start(at))?;
        match self.input.read_exact(bytes) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn look(&mut self, cpu: u32, place: u64, at: u64) -> Result<(), TraceError> {
        let mut bytes = [0; RECORD_SIZE];
        let whole = self.fill(at, &mut bytes)?;
        match ChunkHeader::decode(&bytes) {
            Some(h) if whole && h.cpu == cpu && h.sequence % self.header.chunks == place => {
                self.places.push(Place { header: h, at });
            }
            // Nothing was written there, or the writer was about to.
            _ if bytes == [0; RECORD_SIZE] => {}
            _ => self.damaged += 1,
        }
        Ok(())
    }

    /// What the header says.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How many chunks were found to be damaged so far; their records are left out.
    pub fn damaged(&self) -> u64 {
        self.damaged
    }

    /// Calls `f` with each record of vCPU `cpu`, in order, and with `None` where records are missing in
    /// between, until it returns false.
    ///
    /// # Errors
    /// [`TraceError::NoVcpu`], or [`TraceError::Io`] when reading fails.
    pub fn for_each(&mut self, cpu: u32, mut f: impl FnMut(Option<Event>) -> bool) -> Result<(), TraceError> {
        if cpu >= self.header.vcpus {
            return Err(TraceError::NoVcpu { cpu, vcpus: self.header.vcpus });
        }
        let places: Vec<_> = self.places.iter().copied().filter(|p| p.header.cpu == cpu).collect();
        let mut bytes = Vec::with_capacity(CHUNK_SIZE);
        let mut next = places.first().map_or(0, |p| p.header.sequence);
        for p in places {
            let gap = p.header.sequence != std::mem::replace(&mut next, p.header.sequence.wrapping_add(1));
            bytes.resize(p.header.count as usize * RECORD_SIZE, 0);
            let whole = self.fill(p.at + RECORD_SIZE as u64, &mut bytes)?;
            if !whole || checksum(&bytes) != p.header.sum {
                self.damaged += 1;
                next = u64::MAX;
                continue;
            }
            if gap && !f(None) {
                return Ok(());
            }
            let mut number = p.header.first;
            for record in bytes.chunks_exact(RECORD_SIZE) {
                let event = decode(record, number);
                number = number.wrapping_add(u64::from(matches!(event, Some(Event::Exit(_)))));
                if !f(event) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Cursor;

    use super::*;
    use crate::format::RECORDS;
    use crate::record::{Exit, Level};
    use crate::writer::{MIN_SIZE, TraceWriter, start};
    use crate::{Recorder, Statistics};
    use x86_spec::exit::ExitReason;

    fn writer(size: u64) -> (File, TraceWriter) {
        let file = tempfile::tempfile().unwrap();
        let writer = start(file.try_clone().unwrap(), size, 1, 1_000_000_000, 0).unwrap().remove(0);
        (file, writer)
    }

    fn bytes(mut file: &File) -> Vec<u8> {
        let mut all = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut all).unwrap();
        all
    }

    /// Numbers of the exits in a trace, 0 for a gap.
    fn numbers(bytes: &[u8]) -> Vec<u64> {
        let mut found = Vec::new();
        let mut trace = Trace::new(Cursor::new(bytes)).unwrap();
        trace
            .for_each(0, |e| {
                match e {
                    Some(Event::Exit(e)) => found.push(e.number),
                    Some(Event::Idle { .. }) => {}
                    None => found.push(0),
                }
                true
            })
            .unwrap();
        found
    }

    /// Every seventh record is an idle one.
    fn play(recorder: &mut Recorder, exits: u64) {
        for i in 0..exits {
            let l2 = i % 3 == 1;
            let level = if l2 { Level::L2 } else { Level::L1 };
            let reason = ExitReason::ALL[(i % 20) as usize];
            let exit = Exit {
                time_ns: i * 100,
                guest_ns: i % 50,
                l0_ns: 2 * i % 70,
                forwarded: (i % 6 == 1).then_some(reason),
                ..Exit::new(level, reason)
            };
            recorder.exit(exit, 0);
            if i % 6 == 5 {
                recorder.idle(i * 100, 33);
            }
        }
    }

    #[test]
    fn what_was_written_is_read_and_gives_the_same_statistics() {
        let (file, writer) = writer(1 << 20);
        let mut recorder = Recorder::with_trace(writer);
        play(&mut recorder, 3000);
        recorder.flush_trace();
        let all = bytes(&file);
        assert_eq!(numbers(&all), (1..=3000).collect::<Vec<_>>());
        let mut again = Statistics::default();
        let mut trace = Trace::new(Cursor::new(&all[..])).unwrap();
        trace
            .for_each(0, |e| {
                again.event(&e.expect("no gap"));
                true
            })
            .unwrap();
        assert_eq!(again.summary(0), recorder.summary(0));
        assert_eq!(trace.damaged(), 0);
    }

    #[test]
    fn a_ring_keeps_the_last_records_and_its_size() {
        let (file, writer) = writer(MIN_SIZE);
        let mut recorder = Recorder::with_trace(writer);
        let mut exits = 0;
        for _ in 0..50 {
            play(&mut recorder, 100);
            exits += 100;
            recorder.flush_trace();
            let all = bytes(&file);
            assert!(all.len() as u64 <= MIN_SIZE);
            let found = numbers(&all);
            assert!(found.windows(2).all(|w| w[0] + 1 == w[1]), "{found:?}");
            assert_eq!(found.last(), Some(&exits));
            assert!(found.len() as u64 >= exits.min(RECORDS as u64 * 6 / 7));
        }
    }

    /// Cuts the file after each write that a writer does, as a kill would.
    #[test]
    fn a_file_is_good_wherever_its_end_or_a_damage_is() {
        let (file, writer) = writer(1 << 20);
        let mut recorder = Recorder::with_trace(writer);
        play(&mut recorder, 3000);
        recorder.flush_trace();
        let all = bytes(&file);
        for cut in (52..all.len()).step_by(997) {
            let found = numbers(&all[..cut]);
            assert!(found.windows(2).all(|w| w[0] + 1 == w[1]), "{cut}");
        }
        for at in (52..all.len()).step_by(997) {
            let mut bad = all.clone();
            bad[at] ^= 0x40;
            let found = numbers(&bad);
            assert!(found.len() <= 3001 && found.len() >= 3000 - RECORDS, "{at}: {}", found.len());
        }
        for cut in 0..52 {
            assert!(Trace::new(Cursor::new(&all[..cut])).is_err(), "{cut}");
        }
    }
}
