//! Unpacking compressed kernels on the host, within a limit.
//!
//! Not supported: bzip2, LZO and lzma-alone payloads. Kernels that use them are started
//! through their own decompressor.

use std::io::{self, Read};

/// A compression, told by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// gzip (RFC 1952).
    Gzip,
    /// xz, with or without the x86 BCJ filter.
    Xz,
    /// LZ4's legacy frame or its current one.
    Lz4,
    /// Zstandard (RFC 8878).
    Zstd,
    /// bzip2.
    Bzip2,
    /// LZO as lzop writes it.
    Lzo,
    /// LZMA without a container.
    Lzma,
}

impl Compression {
    /// The compression whose magic number `data` starts with.
    pub fn detect(data: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 8] = [
            (&[0x1f, 0x8b], Compression::Gzip),
            (&[0xfd, b'7', b'z', b'X', b'Z', 0], Compression::Xz),
            (&[0x02, 0x21, 0x4c, 0x18], Compression::Lz4),
            (&[0x04, 0x22, 0x4d, 0x18], Compression::Lz4),
            (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
            (b"BZh", Compression::Bzip2),
            (&[0x89, b'L', b'Z', b'O'], Compression::Lzo),
            (&[0x5d, 0, 0], Compression::Lzma),
        ];
        MAGICS.iter().find(|(magic, _)| data.starts_with(magic)).map(|(_, c)| *c)
    }

    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Bzip2 => "bzip2",
            Self::Lzo => "lzo",
            Self::Lzma => "lzma",
        }
    }
}

/// Why [`decompress`] gave up.
#[derive(Debug, thiserror::Error)]
pub enum DecompressError {
    /// The compression is known but not supported.
    #[error("{} is not supported", .0.name())]
    Unsupported(Compression),
    /// More than the limit.
    #[error("unpacks to more than {limit} bytes")]
    TooBig {
        /// The limit in bytes.
        limit: u64,
    },
    /// The data are damaged.
    #[error("{0}")]
    Corrupt(#[from] io::Error),
}

/// Unpacks `data`, which is compressed as `format`, into at most `limit` bytes. Decoders
/// get at most `limit` and 64 MiB more for their window.
///
/// # Errors
/// [`DecompressError`].
pub fn decompress(format: Compression, data: &[u8], limit: u64) -> Result<Vec<u8>, DecompressError> {
    read_limited(reader(format, data, limit)?, limit)
}

/// Unpacks the first `len` bytes of `data`, or as many as there are before it ends or is
/// damaged: enough to tell what is inside.
pub fn decompress_start(format: Compression, data: &[u8], len: u64) -> Vec<u8> {
    let mut out = Vec::new();
    if let Ok(reader) = reader(format, data, 0) {
        // What came before an error stays in `out`.
        let _ = reader.take(len).read_to_end(&mut out);
    }
    out
}

fn reader<'d>(
    format: Compression,
    data: &'d [u8],
    limit: u64,
) -> Result<Box<dyn Read + 'd>, DecompressError> {
    let window = limit.saturating_add(64 << 20);
    Ok(match format {
        Compression::Gzip => Box::new(flate2::read::GzDecoder::new(data)),
        Compression::Xz => {
            let window_kib = u32::try_from(window >> 10).unwrap_or(u32::MAX);
            Box::new(lzma_rust2::XzReader::new_mem_limit(data, false, window_kib))
        }
        Compression::Lz4 => Box::new(lz4_flex::frame::FrameDecoder::new(data)),
        Compression::Zstd => {
            // Kernels are packed with a window of 128 MiB however small they are; the decoder's
            // buffer grows with the data, so this is no allocation.
            let window = window.max(128 << 20);
            let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(data, window)
                .map_err(|e| io::Error::other(e.to_string()))?;
            Box::new(decoder)
        }
        Compression::Bzip2 | Compression::Lzo | Compression::Lzma => {
            return Err(DecompressError::Unsupported(format));
        }
    })
}

fn read_limited(reader: impl Read, limit: u64) -> Result<Vec<u8>, DecompressError> {
    let mut out = Vec::new();
    let n = reader.take(limit.saturating_add(1)).read_to_end(&mut out)?;
    if n as u64 > limit {
        return Err(DecompressError::TooBig { limit });
    }
    Ok(out)
}
