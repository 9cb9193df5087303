//! Commands and their outcomes (NVM Express 1.4 §4.2, §4.6).
//!
//! Not supported: fused commands, scatter-gather lists.

/// A command as it is in a submission queue.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// Opcode.
    pub opcode: u8,
    /// Fused operation and kind of data pointer, bits 7:6 and 1:0; other than zero is not supported.
    pub flags: u8,
    /// Command identifier.
    pub id: u16,
    /// Namespace.
    pub namespace: u32,
    /// Data pointers: PRP entries 1 and 2.
    pub prp: [u64; 2],
    /// Command-specific doublewords 10 to 15.
    pub dwords: [u32; 6],
}

impl Command {
    /// Size in bytes.
    pub const SIZE: usize = 64;

    /// Reads the fields.
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Self {
        let dword = |i: usize| {
            bytes.get(i * 4..i * 4 + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        };
        let qword = |i: usize| u64::from(dword(i)) | u64::from(dword(i + 1)) << 32;
        Self {
            opcode: bytes[0],
            flags: bytes[1],
            id: u16::from_le_bytes([bytes[2], bytes[3]]),
            namespace: dword(1),
            prp: [qword(6), qword(8)],
            dwords: std::array::from_fn(|i| dword(10 + i)),
        }
    }

    /// Command doubleword 10.
    pub fn dw10(&self) -> u32 {
        self.dwords[0]
    }
    /// Command doubleword 11.
    pub fn dw11(&self) -> u32 {
        self.dwords[1]
    }
    /// Command doubleword 12.
    pub fn dw12(&self) -> u32 {
        self.dwords[2]
    }
}

/// A status (§4.6.1): code in bits 7:0, type in 10:8, "do not retry" in bit 14.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    const DO_NOT_RETRY: u16 = 1 << 14;

    const fn generic(code: u8) -> Self {
        Self(code as u16 | Self::DO_NOT_RETRY)
    }
    const fn specific(code: u8) -> Self {
        Self(code as u16 | 1 << 8 | Self::DO_NOT_RETRY)
    }
    const fn media(code: u8) -> Self {
        Self(code as u16 | 2 << 8 | Self::DO_NOT_RETRY)
    }

    /// Success.
    pub const SUCCESS: Self = Self(0);
    /// Invalid command opcode.
    pub const INVALID_OPCODE: Self = Self::generic(0x01);
    /// Invalid field in the command.
    pub const INVALID_FIELD: Self = Self::generic(0x02);
    /// Data transfer error.
    pub const DATA_TRANSFER_ERROR: Self = Self::generic(0x04);
    /// Invalid namespace or format.
    pub const INVALID_NAMESPACE: Self = Self::generic(0x0b);
    /// PRP offset invalid.
    pub const PRP_OFFSET_INVALID: Self = Self::generic(0x13);
    /// The namespace is write protected.
    pub const WRITE_PROTECTED: Self = Self::generic(0x20);
    /// LBA out of range.
    pub const LBA_OUT_OF_RANGE: Self = Self::generic(0x80);
    /// The completion queue is invalid.
    pub const COMPLETION_QUEUE_INVALID: Self = Self::specific(0x00);
    /// Invalid queue identifier.
    pub const INVALID_QUEUE_IDENTIFIER: Self = Self::specific(0x01);
    /// Invalid queue size.
    pub const INVALID_QUEUE_SIZE: Self = Self::specific(0x02);
    /// Too many asynchronous event requests.
    pub const EVENT_LIMIT: Self = Self::specific(0x05);
    /// Invalid interrupt vector.
    pub const INVALID_VECTOR: Self = Self::specific(0x08);
    /// Invalid log page.
    pub const INVALID_LOG_PAGE: Self = Self::specific(0x09);
    /// Invalid queue deletion: a completion queue that is in use.
    pub const INVALID_DELETION: Self = Self::specific(0x0c);
    /// The feature can't be saved.
    pub const NOT_SAVEABLE: Self = Self::specific(0x0d);
    /// Write fault.
    pub const WRITE_FAULT: Self = Self::media(0x80);
    /// Unrecovered read error.
    pub const READ_ERROR: Self = Self::media(0x81);
}

/// Why a command is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// For a reason that the system is told.
    Status(Status),
    /// The controller was reset, or the machine ends.
    Gone,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}
