//! Linux's `bzImage`: the setup header of the x86 boot protocol
//! (Documentation/arch/x86/boot.rst) and the compressed payload.
//!
//! Not supported: boot protocols before 2.06, `zImage` (kernels loaded low), entering the
//! real-mode setup code.

use super::BootError;
use super::decompress::{Compression, DecompressError, decompress};

const SETUP_SECTS: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const JUMP_OFFSET: usize = 0x201;
const MAGIC: usize = 0x202;
const SYSSIZE: usize = 0x1f4;
const VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const LOADFLAGS: usize = 0x211;
const CODE32_START: usize = 0x214;
const INITRD_ADDR_MAX: usize = 0x22c;
const KERNEL_ALIGNMENT: usize = 0x230;
const RELOCATABLE: usize = 0x234;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;
/// End of the last field of 2.06, before the payload fields came.
const END_OF_2_06: usize = 0x23c;
/// Longest setup header: it ends where boot_params' EDD data start.
const HEADER_MAX_END: usize = 0x290;

/// The setup header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetupHeader {
    /// Where protected-mode code starts in the file.
    pub code_offset: u64,
    /// Protocol version, e.g. 0x020f.
    pub protocol: u16,
    /// Offset of the version string in the file, if there is one.
    pub version_offset: Option<u64>,
    /// `loadflags`.
    pub loadflags: u8,
    /// Where protected-mode code goes if it can't be moved, and its 32-bit entry.
    pub code32_start: u32,
    /// Highest address of the initrd's last byte.
    pub initrd_addr_max: u32,
    /// Alignment in bytes that a relocatable kernel needs.
    pub kernel_alignment: u32,
    /// Whether protected-mode code can be moved.
    pub relocatable: bool,
    /// `xloadflags`; 0 before 2.12.
    pub xloadflags: u16,
    /// Longest command line in bytes, without the final NUL.
    pub cmdline_size: u32,
    /// The compressed payload in the file: offset and length; `None` before 2.08.
    pub payload: Option<(u64, u64)>,
    /// Address that the kernel would like to run at; `None` before 2.10.
    pub pref_address: Option<u64>,
    /// Memory in bytes that the kernel needs from where it runs; 0 before 2.10.
    pub init_size: u32,
    /// The header's bytes as boot_params has them, from [`Self::RAW_OFFSET`].
    pub raw: Vec<u8>,
}

impl SetupHeader {
    /// Where the header starts, in the file and in boot_params.
    pub const RAW_OFFSET: usize = SETUP_SECTS;
    /// `loadflags`: protected-mode code goes to 1 MiB or above.
    pub const LOADED_HIGH: u8 = 1;
    /// `loadflags`: the kernel was told that it may have been randomized.
    pub const KASLR_FLAG: u8 = 1 << 1;
    /// `xloadflags`: there is a 64-bit entry at 0x200.
    pub const XLF_KERNEL_64: u16 = 1;

    /// Whether the protected-mode code has a 64-bit entry, 0x200 after its start.
    pub fn has_64bit_entry(&self) -> bool {
        self.xloadflags & Self::XLF_KERNEL_64 != 0
    }

    /// Protocol version as major and minor number.
    pub fn protocol_parts(&self) -> (u8, u8) {
        ((self.protocol >> 8) as u8, self.protocol as u8)
    }
}

/// Whether `data` starts like a bzImage.
pub fn is_bzimage(data: &[u8]) -> bool {
    data.get(BOOT_FLAG..BOOT_FLAG + 2) == Some(&[0x55, 0xaa]) && data.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
}

fn le<const N: usize>(data: &[u8], offset: usize) -> [u8; N] {
    data.get(offset..).and_then(|d| d.first_chunk::<N>()).copied().unwrap_or([0; N])
}

fn u16_at(data: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(le(data, offset))
}

fn u32_at(data: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(le(data, offset))
}

fn u64_at(data: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(le(data, offset))
}

/// Reads the setup header of `data`, which is called `file` in errors.
///
/// # Errors
/// [`BootError`] when it is no bzImage, is cut off or too old, or has impossible fields.
pub fn parse(file: &str, data: &[u8]) -> Result<SetupHeader, BootError> {
    let len = data.len() as u64;
    let cut = |what, offset, need| BootError::Truncated { file: file.into(), what, offset, need, len };
    if !is_bzimage(data) {
        return Err(BootError::NotAKernel { file: file.into(), found: "no bzImage signature".into() });
    }
    let protocol = u16_at(data, VERSION);
    if protocol < 0x206 {
        let [minor, major] = protocol.to_le_bytes();
        return Err(BootError::ProtocolTooOld { file: file.into(), major, minor });
    }
    let header_end = MAGIC + usize::from(data.get(JUMP_OFFSET).copied().unwrap_or(0));
    if !(END_OF_2_06..=HEADER_MAX_END).contains(&header_end) {
        return Err(BootError::BadField {
            file: file.into(),
            what: "length of the setup header (jump offset)",
            offset: JUMP_OFFSET as u64,
            value: (header_end - MAGIC) as u64,
            expected: "between 0x3a and 0x8e",
        });
    }
    let raw = data
        .get(SETUP_SECTS..header_end)
        .ok_or_else(|| cut("the setup header", SETUP_SECTS as u64, (header_end - SETUP_SECTS) as u64))?;
    // Fields past the header's end are not there, whatever the version claims.
    let head = data.get(..header_end).unwrap_or(data);
    let has = |field: usize, size: usize, since: u16| protocol >= since && field + size <= header_end;

    // 0 means 4, from the days before the field.
    let sectors = match data.get(SETUP_SECTS) {
        Some(0) | None => 4,
        Some(n) => u64::from(*n),
    };
    let code_offset = (sectors + 1) * 512;
    if code_offset >= len {
        return Err(cut("the setup code", 0, code_offset + 1));
    }
    // Every protocol that is supported has the field. What follows the code, such as a signature, does
    // not count; a kernel that says 0 does not tell.
    let code_len = u64::from(u32_at(head, SYSSIZE)) * 16;
    if code_offset + code_len > len {
        return Err(cut("the kernel's code", code_offset, code_len));
    }
    let loadflags = head.get(LOADFLAGS).copied().unwrap_or(0);
    if loadflags & SetupHeader::LOADED_HIGH == 0 {
        return Err(BootError::Unsupported {
            file: file.into(),
            what: "a zImage, which loads below 1 MiB,".into(),
            offset: LOADFLAGS as u64,
            remedy: "build the kernel as bzImage",
        });
    }
    let kernel_alignment = u32_at(head, KERNEL_ALIGNMENT).max(1);
    let relocatable = head.get(RELOCATABLE).is_some_and(|b| *b != 0);
    if relocatable && !kernel_alignment.is_power_of_two() {
        return Err(BootError::BadField {
            file: file.into(),
            what: "kernel alignment",
            offset: KERNEL_ALIGNMENT as u64,
            value: kernel_alignment.into(),
            expected: "a power of two",
        });
    }
    let payload = has(PAYLOAD_OFFSET, 8, 0x208).then(|| {
        let (offset, length) = (u32_at(head, PAYLOAD_OFFSET), u32_at(head, PAYLOAD_LENGTH));
        (code_offset + u64::from(offset), u64::from(length))
    });
    if let Some((offset, length)) = payload
        && offset + length > len
    {
        return Err(cut("the compressed kernel", offset, length));
    }
    let version = u16_at(head, KERNEL_VERSION);
    Ok(SetupHeader {
        code_offset,
        protocol,
        version_offset: (version != 0).then(|| u64::from(version) + 0x200),
        loadflags,
        code32_start: u32_at(head, CODE32_START),
        initrd_addr_max: u32_at(head, INITRD_ADDR_MAX),
        kernel_alignment,
        relocatable,
        xloadflags: if has(XLOADFLAGS, 2, 0x20c) { u16_at(head, XLOADFLAGS) } else { 0 },
        cmdline_size: u32_at(head, CMDLINE_SIZE),
        payload: payload.filter(|(_, length)| *length > 0),
        pref_address: has(PREF_ADDRESS, 8, 0x20a).then(|| u64_at(head, PREF_ADDRESS)),
        init_size: if has(INIT_SIZE, 4, 0x20a) { u32_at(head, INIT_SIZE) } else { 0 },
        raw: raw.to_vec(),
    })
}

/// The kernel's version string (`6.1.0-… (…) #1 SMP …`), if it has one.
pub fn version_string(header: &SetupHeader, data: &[u8]) -> Option<String> {
    let start = usize::try_from(header.version_offset?).ok()?;
    let bytes = data.get(start..)?;
    let bytes = bytes.get(..bytes.len().min(256))?;
    let text = bytes.split(|b| *b == 0).next()?;
    let text = String::from_utf8_lossy(text).into_owned();
    (!text.is_empty() && !text.contains(|c: char| c.is_control())).then_some(text)
}

/// How the payload of a bzImage came out.
#[derive(Debug)]
pub(super) enum Payload {
    /// The unpacked kernel.
    Unpacked(Vec<u8>),
    /// There is none, or none that can be unpacked here: the kernel's own decompressor must.
    LeaveToGuest,
}

/// Unpacks the payload into at most `limit` bytes.
pub(super) fn unpack(
    file: &str,
    header: &SetupHeader,
    data: &[u8],
    limit: u64,
) -> Result<Payload, BootError> {
    let Some((offset, length)) = header.payload else { return Ok(Payload::LeaveToGuest) };
    let range = usize::try_from(offset).ok().zip(usize::try_from(offset + length).ok());
    let packed = range.and_then(|(a, b)| data.get(a..b)).unwrap_or_default();
    let Some(format) = Compression::detect(packed) else { return Ok(Payload::LeaveToGuest) };
    // The build appends the unpacked size to formats that lack it; decoders would take it
    // for the next block or stream.
    let stream = match format {
        Compression::Gzip => packed,
        _ => packed.get(..packed.len().saturating_sub(4)).unwrap_or_default(),
    };
    let format_name = format.name();
    match decompress(format, stream, limit) {
        Ok(v) => Ok(Payload::Unpacked(v)),
        Err(DecompressError::Unsupported(_)) => Ok(Payload::LeaveToGuest),
        Err(DecompressError::TooBig { .. }) => Err(BootError::PayloadTooBig {
            file: file.into(),
            format: format_name,
            offset,
            ram_mib: limit >> 20,
        }),
        Err(DecompressError::Corrupt(e)) => Err(BootError::Decompress {
            file: file.into(),
            format: format_name,
            offset,
            reason: e.to_string(),
        }),
    }
}
