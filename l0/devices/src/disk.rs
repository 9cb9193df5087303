//! What disks keep their data in: a raw file or block device of the host.
//!
//! Not supported: formats with a header, copy-on-write, direct I/O, sizes that change while the machine runs.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// Size of a sector in bytes.
pub const SECTOR: u64 = 512;

/// Bytes that stay. Offsets and lengths are within [`Storage::size`]; callers check.
pub trait Storage: Send + Sync {
    /// Size in bytes, a multiple of [`SECTOR`].
    fn size(&self) -> u64;
    /// Whether writes are refused.
    fn is_read_only(&self) -> bool;
    /// Reads all of `buf`.
    ///
    /// # Errors
    /// The host's.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Writes all of `buf`.
    ///
    /// # Errors
    /// The host's.
    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()>;
    /// Has what was written before survive a crash of the host.
    ///
    /// # Errors
    /// The host's. What was written since the last success may be lost.
    fn flush(&self) -> io::Result<()>;
    /// The bytes are not needed any more. They may keep their values.
    ///
    /// # Errors
    /// The host's.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    /// The bytes become zero; space of the file is given back where that can be done and `unmap` is set.
    ///
    /// # Errors
    /// The host's.
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
}

/// A raw file or block device.
#[derive(Clone, Debug)]
pub struct FileDisk {
    file: Arc<File>,
    size: u64,
    read_only: bool,
}

/// A file can't be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host refuses.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It has no sectors, or a part of one.
    #[error(
        "its size of {0} bytes is not a multiple of {SECTOR}, at least one; `truncate -s %512 FILE` rounds it"
    )]
    Size(u64),
}

impl FileDisk {
    /// A disk of the data in `file`, which has to be open for writing unless `read_only`.
    ///
    /// # Errors
    /// [`DiskError`] when its size can't be found out or is not that of a disk.
    pub fn new(file: File, read_only: bool) -> Result<Self, DiskError> {
        // The size of a block device is where its end is.
        let size = (&file).seek(SeekFrom::End(0))?;
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return Err(DiskError::Size(size));
        }
        Ok(Self { file: Arc::new(file), size, read_only })
    }
}

/// Whether the host merely can't do it.
fn is_unsupported(e: Errno) -> bool {
    matches!(e, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL)
}

impl Storage for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }
    fn is_read_only(&self) -> bool {
        self.read_only
    }
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
    fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }
    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(e) if !is_unsupported(e) => Err(e.into()),
            _ => Ok(()),
        }
    }
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
        match fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len) {
            Err(e) if is_unsupported(e) => write_zeroes(self, offset, len),
            done => Ok(done?),
        }
    }
}

/// Zeroes by writing them.
fn write_zeroes(disk: &dyn Storage, offset: u64, len: u64) -> io::Result<()> {
    const PIECE: u64 = 64 << 10;
    let zeroes = vec![0; PIECE.min(len) as usize];
    let mut done = 0;
    while done < len {
        let piece = zeroes.get(..(len - done).min(PIECE) as usize).unwrap_or(&zeroes);
        disk.write(offset + done, piece)?;
        done += piece.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod testing {
    //! A disk in memory that can fail.

    use std::sync::Mutex;

    use super::*;
    use crate::device::lock;

    /// A disk in memory.
    #[derive(Default)]
    pub struct MemoryDisk {
        /// Contents.
        pub bytes: Mutex<Vec<u8>>,
        /// What fails from now on, by errno.
        pub failure: Mutex<Option<i32>>,
        /// Flushes so far.
        pub flushes: Mutex<u32>,
        /// Writes are refused.
        pub read_only: bool,
    }

    impl MemoryDisk {
        /// `sectors` zeroed sectors.
        pub fn new(sectors: usize) -> Self {
            Self { bytes: Mutex::new(vec![0; sectors * 512]), ..Self::default() }
        }
        fn check(&self) -> io::Result<()> {
            lock(&self.failure).map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
        }
    }

    impl Storage for MemoryDisk {
        fn size(&self) -> u64 {
            lock(&self.bytes).len() as u64
        }
        fn is_read_only(&self) -> bool {
            self.read_only
        }
        fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
            self.check()?;
            let bytes = lock(&self.bytes);
            buf.copy_from_slice(&bytes[offset as usize..offset as usize + buf.len()]);
            Ok(())
        }
        fn write(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
            self.check()?;
            lock(&self.bytes)[offset as usize..offset as usize + buf.len()].copy_from_slice(buf);
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            self.check()?;
            *lock(&self.flushes) += 1;
            Ok(())
        }
        fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
            self.zero(offset, len, true)
        }
        fn zero(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
            self.check()?;
            lock(&self.bytes)[offset as usize..(offset + len) as usize].fill(0);
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_sectors_make_a_disk() {
        for (size, ok) in [(0, false), (511, false), (512, true), (513, false), (1 << 20, true)] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(size).unwrap();
            assert_eq!(FileDisk::new(file, false).is_ok(), ok, "{size}");
        }
    }

    #[test]
    fn zeroed_and_discarded_bytes_are_gone() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let disk = FileDisk::new(file, false).unwrap();
        disk.write(0, &[0xaa; 0x3000]).unwrap();
        disk.zero(0x200, 0x200, false).unwrap();
        disk.zero(0x1000, 0x1000, true).unwrap();
        write_zeroes(&disk, 0x2200, 0x200).unwrap();
        disk.flush().unwrap();
        let mut bytes = [0; 0x3000];
        disk.read(0, &mut bytes).unwrap();
        let zero = |i: usize| matches!(i, 0x200..0x400 | 0x1000..0x2000 | 0x2200..0x2400);
        assert!(bytes.iter().enumerate().all(|(i, b)| *b == if zero(i) { 0 } else { 0xaa }));
        assert!(disk.read((1 << 20) - 1, &mut [0; 2]).is_err());
    }
}
