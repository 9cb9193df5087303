//! Taking files out of a Debian package (deb(5)): an `ar` archive with a compressed tar
//! archive in it.
//!
//! Not supported: data archives packed with bzip2 or lzma-alone, which no package in use
//! has.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::ImageError;

/// Largest file taken out of a package, in bytes.
const FILE_MAX: u64 = 512 << 20;
/// Largest window of a decoder, in KiB.
const WINDOW_KIB: u32 = 256 << 10;

/// A file from a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PackedFile {
    /// Path without the leading `./`.
    pub path: String,
    /// Contents.
    pub data: Vec<u8>,
}

/// Takes the regular files that `wanted` (given their path) says out of package `path`.
pub(super) fn extract(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<PackedFile>, ImageError> {
    let bad = |reason: String| ImageError::BadPackage { path: path.to_owned(), reason };
    let file = File::open(path).map_err(|source| ImageError::Read { path: path.to_owned(), source })?;
    let mut archive = ar::Archive::new(file);
    while let Some(member) = archive.next_entry() {
        let member = member.map_err(|e| bad(e.to_string()))?;
        let name = String::from_utf8_lossy(member.header().identifier()).into_owned();
        let Some(format) = name.trim_end_matches('/').strip_prefix("data.tar") else { continue };
        let reader: Box<dyn Read + '_> = match format {
            "" => Box::new(member),
            ".gz" => Box::new(flate2::read::GzDecoder::new(member)),
            ".xz" => Box::new(lzma_rust2::XzReader::new_mem_limit(member, true, WINDOW_KIB)),
            ".zst" => {
                let window = u64::from(WINDOW_KIB) << 10;
                let decoder = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(member, window);
                Box::new(decoder.map_err(|e| bad(e.to_string()))?)
            }
            _ => return Err(bad(format!("its {name} is packed in a way that is not supported"))),
        };
        return extract_tar(reader, wanted).map_err(|e| bad(e.to_string()));
    }
    Err(bad("it has no data.tar member".into()))
}

fn extract_tar(reader: impl Read, wanted: impl Fn(&str) -> bool) -> std::io::Result<Vec<PackedFile>> {
    let mut files = Vec::new();
    for entry in tar::Archive::new(reader).entries()? {
        let entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_owned();
        if !wanted(&path) {
            continue;
        }
        let len = entry.size();
        if len > FILE_MAX {
            return Err(std::io::Error::other(format!("{path} has {len} bytes, more than {FILE_MAX}")));
        }
        let mut data = Vec::new();
        entry.take(FILE_MAX).read_to_end(&mut data)?;
        files.push(PackedFile { path, data });
    }
    Ok(files)
}
