//! The layout of a trace file. Numbers are little-endian.
//!
//! | Offset | What |
//! |---|---|
//! | 0 | the header, [`HEADER_SIZE`] bytes |
//! | [`HEADER_SIZE`] | for each vCPU a ring of chunks of [`CHUNK_SIZE`] bytes |
//!
//! A chunk has a header of [`RECORD_SIZE`] bytes and up to [`RECORDS`] records. Chunk number n of a vCPU, counted
//! from 0, is in place n mod (chunks in a ring). Each header has a checksum, and a chunk's header one of its records too:
//! what was being written when the writer was killed is told from what is whole.

use x86_spec::exit::ExitReason;
use x86_spec::instruction_error::InstructionError;
use x86_spec::interruption::InterruptionInfo;

use crate::VmcsAccesses;
use crate::record::{Event, Exit, Level, VmFail};

/// First bytes of a trace; the last of them is the version.
pub const MAGIC: [u8; 8] = *b"nvmexit\x02";
/// First bytes of a chunk.
pub const CHUNK_MAGIC: [u8; 4] = *b"exit";
/// Size of the header in bytes.
pub const HEADER_SIZE: usize = 4096;
/// Size of a chunk in bytes.
pub const CHUNK_SIZE: usize = 65536;
/// Size of a record in bytes.
pub const RECORD_SIZE: usize = 72;
/// Records in a chunk.
pub const RECORDS: usize = CHUNK_SIZE / RECORD_SIZE - 1;
/// Most chunks of a file that a reader looks for: 1 TiB.
pub const MAX_CHUNKS: u64 = 1 << 24;

mod flag {
    pub const L2: u8 = 1 << 0;
    pub const FORWARDED: u8 = 1 << 1;
    pub const SYNTHESIZED: u8 = 1 << 2;
    pub const ENTRY_FAILURE: u8 = 1 << 3;
    pub const IDLE: u8 = 1 << 4;
    /// The byte of the forwarded reason is a VM-instruction error number; 0 is VMfailInvalid.
    pub const FAILED: u8 = 1 << 5;
}

/// Bits 12:0 of interruption information, with its valid bit in bit 15.
fn short(info: InterruptionInfo) -> u16 {
    (info.0 & 0x1fff) as u16 | ((info.0 >> 16) & 0x8000) as u16
}

fn long(info: u16) -> InterruptionInfo {
    InterruptionInfo(u32::from(info & 0x1fff) | u32::from(info & 0x8000) << 16)
}

/// Reads and writes fields one after another.
struct Fields<'a>(&'a mut [u8]);

impl Fields<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let (now, rest) = std::mem::take(&mut self.0).split_at_mut(bytes.len());
        now.copy_from_slice(bytes);
        self.0 = rest;
    }
}

/// Times have 48 bits: 78 hours.
fn six(ns: u64) -> [u8; 6] {
    let [a, b, c, d, e, f, _, _] = ns.min((1 << 48) - 1).to_le_bytes();
    [a, b, c, d, e, f]
}

/// A record's bytes.
pub fn encode(event: &Event) -> [u8; RECORD_SIZE] {
    let mut bytes = [0; RECORD_SIZE];
    let mut f = Fields(&mut bytes);
    match event {
        Event::Idle { time_ns, ns } => {
            f.put(&time_ns.to_le_bytes());
            f.put(&[0; 32]);
            f.put(&six(0));
            f.put(&six(*ns));
            f.put(&[0; 6]);
            f.put(&[flag::IDLE]);
        }
        Event::Exit(e) => {
            for v in [e.time_ns, e.rip, e.qualification, e.guest_physical, e.guest_linear] {
                f.put(&v.to_le_bytes());
            }
            f.put(&six(e.guest_ns));
            f.put(&six(e.l0_ns));
            let distance = e.cause.and_then(|c| u32::try_from(e.number.checked_sub(c)?).ok()).unwrap_or(0);
            f.put(&distance.to_le_bytes());
            f.put(&[e.reason as u8, forwarded_or_failed(e), flags(e), e.instruction_length]);
            f.put(&short(e.interruption).to_le_bytes());
            f.put(&short(e.idt_vectoring).to_le_bytes());
            for n in [e.accesses.vmreads, e.accesses.vmwrites] {
                f.put(&u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes());
            }
        }
    }
    bytes
}

/// An exit that L1 got is of L2, and a VMX instruction that failed is of L1: they share a byte.
fn forwarded_or_failed(e: &Exit) -> u8 {
    match (e.forwarded, e.failed) {
        (Some(reason), _) => reason as u8,
        (None, Some(VmFail::Valid(error))) => error as u8,
        (None, Some(VmFail::Invalid) | None) => 0,
    }
}

fn flags(e: &Exit) -> u8 {
    let level = if e.level == Level::L2 { flag::L2 } else { 0 };
    let set = |on, bit| if on { bit } else { 0 };
    level
        | set(e.forwarded.is_some(), flag::FORWARDED)
        | set(e.synthesized, flag::SYNTHESIZED)
        | set(e.entry_failure, flag::ENTRY_FAILURE)
        | set(e.forwarded.is_none() && e.failed.is_some(), flag::FAILED)
}

/// Takes `N` bytes off `bytes`; zeros past their end.
fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let Some((now, rest)) = bytes.split_first_chunk::<N>() else {
        *bytes = &[];
        return [0; N];
    };
    *bytes = rest;
    *now
}

fn take_six(bytes: &mut &[u8]) -> u64 {
    let [a, b, c, d, e, f] = take::<6>(bytes);
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
}

/// A record from its bytes; `number` is the next exit's. `None` if it holds what no writer writes.
pub fn decode(mut bytes: &[u8], number: u64) -> Option<Event> {
    let b = &mut bytes;
    let [time_ns, rip, qualification, guest_physical, guest_linear] =
        [(); 5].map(|()| u64::from_le_bytes(take(b)));
    let (guest_ns, l0_ns) = (take_six(b), take_six(b));
    let distance = u64::from(u32::from_le_bytes(take(b)));
    let [reason, forwarded, flags, instruction_length] = take::<4>(b);
    if flags & flag::IDLE != 0 {
        return Some(Event::Idle { time_ns, ns: l0_ns });
    }
    let [interruption, idt_vectoring] = [(); 2].map(|()| long(u16::from_le_bytes(take(b))));
    let [vmreads, vmwrites] = [(); 2].map(|()| u64::from(u32::from_le_bytes(take(b))));
    let reason = ExitReason::from_u16(reason.into())?;
    let failed = match (flags & flag::FAILED, forwarded) {
        (0, _) => None,
        (_, 0) => Some(VmFail::Invalid),
        (_, number) => Some(VmFail::Valid(InstructionError::from_number(number.into())?)),
    };
    let forwarded = match flags & flag::FORWARDED {
        0 => None,
        _ => Some(ExitReason::from_u16(forwarded.into())?),
    };
    Some(Event::Exit(Exit {
        number,
        time_ns,
        level: if flags & flag::L2 != 0 { Level::L2 } else { Level::L1 },
        reason,
        forwarded,
        synthesized: flags & flag::SYNTHESIZED != 0,
        entry_failure: flags & flag::ENTRY_FAILURE != 0,
        failed,
        qualification,
        rip,
        guest_physical,
        guest_linear,
        interruption,
        idt_vectoring,
        instruction_length,
        guest_ns,
        l0_ns,
        cause: if distance == 0 { None } else { number.checked_sub(distance) },
        accesses: VmcsAccesses { vmreads, vmwrites },
    }))
}

/// The checksum of a chunk's records.
pub fn checksum(records: &[u8]) -> u32 {
    crc32fast::hash(records)
}

/// What a file's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Number of vCPUs, each of which has a ring.
    pub vcpus: u32,
    /// Chunks in a ring.
    pub chunks: u64,
    /// TSC ticks in a second, of the clock that times are from.
    pub tsc_hz: u64,
    /// When the machine started, in nanoseconds from 1970-01-01.
    pub start_unix_ns: u64,
}

/// Why bytes are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHeader {
    /// They do not start as a trace does.
    #[error("this is no exit trace: it does not start as one")]
    Magic,
    /// It is a trace of another version.
    #[error("it is an exit trace of version {0}; this nestvmm reads version {ours}", ours = MAGIC[7])]
    Version(u8),
    /// The checksum is wrong, or it is shorter than a header.
    #[error("its header is damaged")]
    Damaged,
    /// It says what can't be.
    #[error("its header says that there are {vcpus} vCPUs with {chunks} chunks each, which can't be")]
    Size {
        /// vCPUs.
        vcpus: u32,
        /// Chunks in a ring.
        chunks: u64,
    },
}

impl Header {
    /// Bytes that matter, without the checksum that follows them.
    const USED: usize = 48;

    /// The first bytes of the file; the rest of [`HEADER_SIZE`] is zero.
    pub fn encode(&self) -> [u8; Self::USED + 4] {
        let mut bytes = [0; Self::USED + 4];
        let mut f = Fields(&mut bytes);
        f.put(&MAGIC);
        for size in [HEADER_SIZE, RECORD_SIZE, CHUNK_SIZE] {
            f.put(&(size as u32).to_le_bytes());
        }
        f.put(&self.vcpus.to_le_bytes());
        for v in [self.chunks, self.tsc_hz, self.start_unix_ns] {
            f.put(&v.to_le_bytes());
        }
        let sum = crc32fast::hash(&bytes[..Self::USED]);
        bytes[Self::USED..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`BadHeader`].
    pub fn decode(bytes: &[u8]) -> Result<Self, BadHeader> {
        match bytes.split_first_chunk::<8>() {
            Some((m, _)) if *m == MAGIC => {}
            Some(([m @ .., version], _)) if *m == MAGIC[..7] => return Err(BadHeader::Version(*version)),
            _ => return Err(BadHeader::Magic),
        }
        let (used, mut rest) = bytes.split_at_checked(Self::USED).ok_or(BadHeader::Damaged)?;
        if rest.len() < 4 || crc32fast::hash(used) != u32::from_le_bytes(take(&mut rest)) {
            return Err(BadHeader::Damaged);
        }
        let mut b = used.get(MAGIC.len()..).unwrap_or_default();
        let sizes = [(); 3].map(|()| u32::from_le_bytes(take(&mut b)) as usize);
        let vcpus = u32::from_le_bytes(take(&mut b));
        let [chunks, tsc_hz, start_unix_ns] = [(); 3].map(|()| u64::from_le_bytes(take(&mut b)));
        if sizes != [HEADER_SIZE, RECORD_SIZE, CHUNK_SIZE] {
            return Err(BadHeader::Damaged);
        }
        match chunks.checked_mul(vcpus.into()) {
            Some(1..=MAX_CHUNKS) => Ok(Self { vcpus, chunks, tsc_hz, start_unix_ns }),
            _ => Err(BadHeader::Size { vcpus, chunks }),
        }
    }

    /// Where chunk `sequence` of vCPU `cpu` is in the file.
    pub fn offset(&self, cpu: u32, sequence: u64) -> u64 {
        let place = u64::from(cpu) * self.chunks + sequence % self.chunks.max(1);
        HEADER_SIZE as u64 + place * CHUNK_SIZE as u64
    }
}

/// What a chunk's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// The vCPU.
    pub cpu: u32,
    /// The chunk's number, from 0.
    pub sequence: u64,
    /// The number of the first exit in it.
    pub first: u64,
    /// Records in it.
    pub count: u32,
    /// Checksum of its records.
    pub sum: u32,
}

impl ChunkHeader {
    const USED: usize = RECORD_SIZE - 4;

    /// Its bytes.
    pub fn encode(&self) -> [u8; RECORD_SIZE] {
        let mut bytes = [0; RECORD_SIZE];
        let mut f = Fields(&mut bytes);
        f.put(&CHUNK_MAGIC);
        f.put(&self.cpu.to_le_bytes());
        f.put(&self.sequence.to_le_bytes());
        f.put(&self.first.to_le_bytes());
        f.put(&self.count.to_le_bytes());
        f.put(&self.sum.to_le_bytes());
        let sum = crc32fast::hash(&bytes[..Self::USED]);
        bytes[Self::USED..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads one; `None` if there is none, or it is damaged.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (used, mut sum) = bytes.split_at_checked(Self::USED)?;
        let mut b = used;
        if take(&mut b) != CHUNK_MAGIC || crc32fast::hash(used) != u32::from_le_bytes(take(&mut sum)) {
            return None;
        }
        let header = Self {
            cpu: u32::from_le_bytes(take(&mut b)),
            sequence: u64::from_le_bytes(take(&mut b)),
            first: u64::from_le_bytes(take(&mut b)),
            count: u32::from_le_bytes(take(&mut b)),
            sum: u32::from_le_bytes(take(&mut b)),
        };
        (header.count as usize <= RECORDS).then_some(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86_spec::interruption::EventType;

    #[test]
    fn records_come_back_as_they_were() {
        let mut e = Exit {
            number: 1000,
            time_ns: 123_456_789_012,
            forwarded: Some(ExitReason::EptMisconfiguration),
            synthesized: true,
            entry_failure: true,
            qualification: u64::MAX,
            rip: 0xffff_ffff_8100_0000,
            guest_physical: 0x1234_5000,
            guest_linear: 0xdead_beef,
            interruption: InterruptionInfo::new(14, EventType::HardwareException, true),
            idt_vectoring: InterruptionInfo::new(0x20, EventType::External, false),
            instruction_length: 15,
            guest_ns: (1 << 48) - 1,
            l0_ns: 5_000_000_000,
            cause: Some(1),
            accesses: VmcsAccesses { vmreads: 300, vmwrites: u64::from(u32::MAX) },
            ..Exit::new(Level::L2, ExitReason::EptViolation)
        };
        for _ in 0..2 {
            let back = decode(&encode(&Event::Exit(e)), e.number);
            assert_eq!(back, Some(Event::Exit(e)));
            e = Exit { number: 1000, ..Exit::new(Level::L1, ExitReason::Tpause) };
        }
        let idle = Event::Idle { time_ns: 7, ns: 1 << 40 };
        assert_eq!(decode(&encode(&idle), 1), Some(idle));
        let mut bad = encode(&Event::Exit(e));
        bad[56] = 35;
        assert_eq!(decode(&bad, 1), None, "no exit reason has number 35");
    }

    #[test]
    fn how_an_instruction_failed_comes_back() {
        let all = InstructionError::ALL.iter().map(|e| VmFail::Valid(*e)).chain([VmFail::Invalid]);
        for failed in all.map(Some).chain([None]) {
            let e = Exit { number: 1, failed, ..Exit::new(Level::L1, ExitReason::Vmresume) };
            assert_eq!(decode(&encode(&Event::Exit(e)), 1), Some(Event::Exit(e)));
        }
        // Table 31-1 has no number 14.
        let e = Exit { failed: Some(VmFail::Invalid), ..Exit::new(Level::L1, ExitReason::Vmresume) };
        let mut bytes = encode(&Event::Exit(e));
        let at = bytes.iter().rposition(|b| *b == ExitReason::Vmresume as u8).unwrap();
        bytes[at + 1] = 14;
        assert_eq!(decode(&bytes, 1), None);
    }

    #[test]
    fn headers_come_back_or_say_what_is_wrong() {
        let h = Header { vcpus: 2, chunks: 16, tsc_hz: 2_000_000_000, start_unix_ns: 5 };
        let good = h.encode();
        assert_eq!(Header::decode(&good), Ok(h));
        assert_eq!(h.offset(1, 17), 4096 + 17 * 65536);
        let with = |at: usize, value: u8| {
            let mut bad = good;
            bad[at] = value;
            Header::decode(&bad)
        };
        assert_eq!(with(0, b'x'), Err(BadHeader::Magic));
        assert_eq!(with(7, 1), Err(BadHeader::Version(1)));
        assert_eq!(with(24, 17), Err(BadHeader::Damaged));
        assert_eq!(Header::decode(&good[..30]), Err(BadHeader::Damaged));
        let huge = Header { chunks: u64::MAX, ..h };
        assert_eq!(Header::decode(&huge.encode()), Err(BadHeader::Size { vcpus: 2, chunks: u64::MAX }));
        let c = ChunkHeader { cpu: 1, sequence: 99, first: 1234, count: 909, sum: 77 };
        assert_eq!(ChunkHeader::decode(&c.encode()), Some(c));
        assert_eq!(ChunkHeader::decode(&ChunkHeader { count: 910, ..c }.encode()), None);
        assert_eq!(ChunkHeader::decode(&[0; RECORD_SIZE]), None);
    }
}
