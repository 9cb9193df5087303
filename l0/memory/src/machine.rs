//! The one mapping of machine memory, and the bitmaps over its pages.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use crate::{MachineAddr, PAGE_SHIFT, PAGE_SIZE};

/// Why an access to memory could not be done.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MemoryError {
    /// The host did not give the memory.
    #[error("can't reserve {size} bytes of machine memory: {reason}; ask for less with --memory")]
    Reserve {
        /// Bytes asked for.
        size: u64,
        /// The host's answer.
        reason: String,
    },
    /// The range is not (wholly) inside machine memory.
    #[error("{len} bytes at machine address {addr} are outside machine memory")]
    OutOfRange {
        /// Start of the range.
        addr: MachineAddr,
        /// Its length in bytes.
        len: u64,
    },
    /// The range is not (wholly) RAM of L1.
    #[error("{len} bytes at L1 physical address {addr:#x} are not RAM")]
    NotRam {
        /// Start of the range.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// L0's own page pool is used up.
    #[error("L0's pool of {pages} pages is used up")]
    PoolEmpty {
        /// Size of the pool in pages.
        pages: u64,
    },
}

/// Told when a page that holds decoded code is written by someone other than the
/// engine itself (a device, a loader, another vCPU).
pub trait CodeWatcher: Send + Sync {
    /// `page` (a machine page number) was written. Called after the write; the page's
    /// code bit is already clear.
    fn code_page_written(&self, page: u64);
}

/// Writes to watched pages are kept apart up to this many; more are "anything".
const MAX_WATCHED_WRITES: usize = 256;

/// Writes to watched pages, in order. Writes that continue each other are one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WatchedWrites {
    /// Start and length in bytes of each.
    pub writes: Vec<(MachineAddr, u64)>,
    /// There were too many: any watched page may have been written.
    pub overflow: bool,
}

impl WatchedWrites {
    fn add(&mut self, addr: MachineAddr, len: u64) {
        let room = self.writes.len() < MAX_WATCHED_WRITES;
        match self.writes.last_mut() {
            Some((last, n)) if last.offset(*n) == addr => *n += len,
            Some((last, n)) if *last <= addr && addr.offset(len) <= last.offset(*n) => {}
            _ if room => self.writes.push((addr, len)),
            _ => self.overflow = true,
        }
    }
}

/// Machine memory: a sparse memfd mapped once. Pages that were never touched cost
/// nothing.
///
/// Concurrency: guests, devices and L0 access it as hardware would, without locks; all
/// accesses through this type are byte copies or atomics on raw memory, never Rust
/// references to it.
pub struct MachineMemory {
    region: MmapRegion,
    /// One byte a page: 1 while decoded code from the page may be cached. A byte, not a
    /// bit, so that the engine's write path tests it with one load.
    code: Box<[AtomicU8]>,
    /// One bit a page: set when written since the bit was last taken.
    dirty: Box<[AtomicU64]>,
    /// One bit a page: writes to it are kept in `watched_writes`.
    watched: Box<[AtomicU64]>,
    watched_writes: Mutex<WatchedWrites>,
    /// `watched_writes` has something.
    has_watched_writes: AtomicBool,
    watchers: RwLock<Vec<Arc<dyn CodeWatcher>>>,
}

impl std::fmt::Debug for MachineMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineMemory").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl MachineMemory {
    /// Reserves `size` bytes (rounded up to whole pages) of zeroed memory.
    ///
    /// # Errors
    /// [`MemoryError::Reserve`] when the host refuses.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        let fail = |reason: String| MemoryError::Reserve { size, reason };
        let rounded = size
            .checked_next_multiple_of(PAGE_SIZE)
            .filter(|s| *s > 0 && usize::try_from(*s).is_ok())
            .ok_or_else(|| fail("not a size in bytes that this host can map".into()))?;
        // SAFETY: the name is a NUL-terminated literal; the call has no other memory effects.
        let fd = unsafe { libc::memfd_create(c"nestvmm-machine-memory".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(fail(std::io::Error::last_os_error().to_string()));
        }
        // SAFETY: `fd` was just created and is owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(rounded).map_err(|e| fail(e.to_string()))?;
        let region = MmapRegionBuilder::new(rounded as usize)
            .with_file_offset(FileOffset::new(file, 0))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(|e| fail(e.to_string()))?;
        let pages = (rounded >> PAGE_SHIFT) as usize;
        Ok(Self {
            region,
            code: zeroed_atomics_u8(pages),
            dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            watched: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            watched_writes: Mutex::default(),
            has_watched_writes: AtomicBool::new(false),
            watchers: RwLock::new(Vec::new()),
        })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.region.size() as u64
    }

    /// Host pointer to the start of machine memory; valid for [`Self::size`] bytes as
    /// long as `self` lives.
    pub fn base_ptr(&self) -> *mut u8 {
        self.region.as_ptr()
    }

    /// The memfd behind the mapping, for engines that map it elsewhere too.
    pub fn file(&self) -> Option<&File> {
        self.region.file_offset().map(|f| f.file())
    }

    fn check(&self, addr: MachineAddr, len: usize) -> Result<*mut u8, MemoryError> {
        match addr.0.checked_add(len as u64) {
            // SAFETY: the offset was just checked to lie within the mapping.
            Some(end) if end <= self.size() => Ok(unsafe { self.base_ptr().add(addr.0 as usize) }),
            _ => Err(MemoryError::OutOfRange { addr, len: len as u64 }),
        }
    }

    /// Host pointer to `len` bytes at `addr`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn host_ptr(&self, addr: MachineAddr, len: usize) -> Result<*mut u8, MemoryError> {
        self.check(addr, len)
    }

    /// Copies machine memory at `addr` into `buf`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; nothing was read then.
    pub fn read(&self, addr: MachineAddr, buf: &mut [u8]) -> Result<(), MemoryError> {
        let src = self.check(addr, buf.len())?;
        // SAFETY: `src` is valid for `buf.len()` bytes, and `buf` can't overlap guest memory,
        // which no Rust reference points into.
        unsafe { ptr::copy_nonoverlapping(src, buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    /// Whether machine memory at `addr` holds `bytes`. What others write meanwhile may be seen or not.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`].
    pub fn holds(&self, addr: MachineAddr, bytes: &[u8]) -> Result<bool, MemoryError> {
        let src = self.check(addr, bytes.len())?;
        // SAFETY: both are valid for `bytes.len()` bytes; the comparison is C's, on raw memory.
        Ok(unsafe { libc::memcmp(src.cast_const().cast(), bytes.as_ptr().cast(), bytes.len()) } == 0)
    }

    /// Copies `buf` to machine memory at `addr`, marks the pages dirty and drops code
    /// decoded from them.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; nothing was written then.
    pub fn write(&self, addr: MachineAddr, buf: &[u8]) -> Result<(), MemoryError> {
        let dst = self.check(addr, buf.len())?;
        // SAFETY: as in `read`, in the other direction.
        unsafe { ptr::copy_nonoverlapping(buf.as_ptr(), dst, buf.len()) };
        self.written(addr, buf.len() as u64);
        Ok(())
    }

    /// Fills `len` bytes at `addr` with `byte`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`]; nothing was written then.
    pub fn fill(&self, addr: MachineAddr, byte: u8, len: usize) -> Result<(), MemoryError> {
        let dst = self.check(addr, len)?;
        // SAFETY: `dst` was checked to be valid for `len` bytes.
        unsafe { ptr::write_bytes(dst, byte, len) };
        self.written(addr, len as u64);
        Ok(())
    }

    /// Reads an aligned 64-bit word in one access (a page-table entry).
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`], also when `addr` is not a multiple of 8.
    pub fn read_u64(&self, addr: MachineAddr) -> Result<u64, MemoryError> {
        Ok(self.atomic_u64(addr)?.load(Ordering::Relaxed))
    }

    /// Writes an aligned 64-bit word in one access.
    ///
    /// # Errors
    /// As [`Self::read_u64`].
    pub fn write_u64(&self, addr: MachineAddr, value: u64) -> Result<(), MemoryError> {
        self.atomic_u64(addr)?.store(value, Ordering::Release);
        self.written(addr, 8);
        Ok(())
    }

    /// The aligned 64-bit word at `addr` as an atomic, for accessed and dirty bits.
    ///
    /// # Errors
    /// As [`Self::read_u64`].
    pub fn atomic_u64(&self, addr: MachineAddr) -> Result<&AtomicU64, MemoryError> {
        if !addr.0.is_multiple_of(8) {
            return Err(MemoryError::OutOfRange { addr, len: 8 });
        }
        let p = self.check(addr, 8)?;
        // SAFETY: in range, aligned, and every access to guest memory in this process that may
        // race with this one is an atomic or a raw copy.
        Ok(unsafe { AtomicU64::from_ptr(p.cast()) })
    }

    /// Whether code decoded from `page` may be cached.
    pub fn is_code_page(&self, page: u64) -> bool {
        self.code.get(page as usize).is_some_and(|b| b.load(Ordering::Relaxed) != 0)
    }

    /// Marks or unmarks `page` as one whose code is cached.
    pub fn set_code_page(&self, page: u64, cached: bool) {
        if let Some(b) = self.code.get(page as usize) {
            b.store(cached as u8, Ordering::Release);
        }
    }

    /// Pointer to the code bytes (one a page), for the engine's write path.
    pub fn code_bytes(&self) -> *const AtomicU8 {
        self.code.as_ptr()
    }

    /// Marks `page` dirty.
    pub fn mark_dirty(&self, page: u64) {
        if let Some(w) = self.dirty.get((page / 64) as usize) {
            let bit = 1 << (page % 64);
            if w.load(Ordering::Relaxed) & bit == 0 {
                w.fetch_or(bit, Ordering::Relaxed);
            }
        }
    }

    /// Takes and clears the dirty bits of 64 pages from `64 * word`.
    pub fn take_dirty(&self, word: usize) -> u64 {
        self.dirty.get(word).map_or(0, |w| w.swap(0, Ordering::Relaxed))
    }

    /// To be called after writing `len` bytes at `addr` through a raw pointer: marks
    /// pages dirty and has code decoded from them dropped.
    pub fn written(&self, addr: MachineAddr, len: u64) {
        if len == 0 {
            return;
        }
        let last = addr.offset(len - 1).page();
        for page in addr.page()..=last {
            if self.is_watched(page) {
                let start = addr.0.max(page << PAGE_SHIFT);
                let end = addr.offset(len).0.min((page + 1) << PAGE_SHIFT);
                self.watched_writes().add(MachineAddr(start), end - start);
                self.has_watched_writes.store(true, Ordering::Release);
            }
        }
        self.flags_written(addr, len);
    }

    /// As [`Self::written`], for accessed and dirty flags that L0 sets in L1's tables as a processor
    /// does: those who watch tables are not told, since no translation changes.
    pub fn flags_written(&self, addr: MachineAddr, len: u64) {
        if len == 0 {
            return;
        }
        for page in addr.page()..=addr.offset(len - 1).page() {
            self.mark_dirty(page);
            if self.is_code_page(page) {
                self.set_code_page(page, false);
                let watchers = self.watchers.read().unwrap_or_else(|e| e.into_inner());
                for w in watchers.iter() {
                    w.code_page_written(page);
                }
            }
        }
    }

    /// Starts or stops to keep the writes to `page` by anyone but a guest's own instructions
    /// (which a guest's EPT can make exit): devices, L0, and L0 on behalf of a guest.
    pub fn watch_page(&self, page: u64, on: bool) {
        if let Some(w) = self.watched.get((page / 64) as usize) {
            let bit = 1 << (page % 64);
            if on {
                w.fetch_or(bit, Ordering::SeqCst)
            } else {
                w.fetch_and(!bit, Ordering::SeqCst)
            };
        }
    }

    fn is_watched(&self, page: u64) -> bool {
        let word = self.watched.get((page / 64) as usize).map_or(0, |w| w.load(Ordering::Relaxed));
        word >> (page % 64) & 1 != 0
    }

    fn watched_writes(&self) -> MutexGuard<'_, WatchedWrites> {
        self.watched_writes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the writes to watched pages since the last call; `None` if there were none.
    pub fn take_watched_writes(&self) -> Option<WatchedWrites> {
        if !self.has_watched_writes.load(Ordering::Acquire) {
            return None;
        }
        let mut writes = self.watched_writes();
        self.has_watched_writes.store(false, Ordering::Release);
        Some(std::mem::take(&mut *writes))
    }

    /// To be called when anything may have been written from elsewhere, by a guest that another engine
    /// ran: has all decoded code dropped. Dirty marks are not set.
    pub fn written_anywhere(&self) {
        for (page, b) in self.code.iter().enumerate() {
            if b.load(Ordering::Relaxed) != 0 {
                self.set_code_page(page as u64, false);
                let watchers = self.watchers.read().unwrap_or_else(|e| e.into_inner());
                for w in watchers.iter() {
                    w.code_page_written(page as u64);
                }
            }
        }
    }

    /// Registers someone who caches decoded code.
    pub fn add_code_watcher(&self, watcher: Arc<dyn CodeWatcher>) {
        self.watchers.write().unwrap_or_else(|e| e.into_inner()).push(watcher);
    }
}

fn zeroed_atomics_u8(n: usize) -> Box<[AtomicU8]> {
    // SAFETY: `AtomicU8` has the layout of `u8`, and zero is a valid value, so zeroed (and thus
    // lazily committed) memory is an initialised slice of them.
    unsafe { Box::<[AtomicU8]>::new_zeroed_slice(n).assume_init() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Log(Mutex<Vec<u64>>);
    impl CodeWatcher for Log {
        fn code_page_written(&self, page: u64) {
            self.0.lock().unwrap().push(page);
        }
    }

    #[test]
    fn reads_back_what_was_written_and_checks_the_range() {
        let m = MachineMemory::new(0x3001).unwrap();
        assert_eq!(m.size(), 0x4000);
        m.write(MachineAddr(0xfff), &[1, 2, 3]).unwrap();
        let mut b = [0; 3];
        m.read(MachineAddr(0xfff), &mut b).unwrap();
        assert_eq!(b, [1, 2, 3]);
        assert_eq!(m.holds(MachineAddr(0xfff), &b), Ok(true));
        assert_eq!(m.holds(MachineAddr(0xffe), &b), Ok(false));
        assert!(m.holds(MachineAddr(0x3ffe), &b).is_err());
        assert!(m.write(MachineAddr(0x3ffe), &[0; 3]).is_err());
        assert!(m.read(MachineAddr(u64::MAX), &mut b).is_err());
        assert!(m.read_u64(MachineAddr(4)).is_err());
    }

    #[test]
    fn writes_to_code_pages_tell_the_watcher_once() {
        let m = MachineMemory::new(0x4000).unwrap();
        let log = Arc::new(Log(Mutex::new(vec![])));
        m.add_code_watcher(log.clone());
        m.set_code_page(1, true);
        m.write(MachineAddr(0xffe), &[0; 4]).unwrap();
        m.write(MachineAddr(0x1000), &[0; 4]).unwrap();
        assert_eq!(*log.0.lock().unwrap(), [1]);
    }

    #[test]
    fn writes_to_watched_pages_are_kept() {
        let m = MachineMemory::new(0x8000).unwrap();
        m.watch_page(2, true);
        m.write(MachineAddr(0x1000), &[1; 8]).unwrap();
        assert_eq!(m.take_watched_writes(), None);
        m.write(MachineAddr(0x1ffc), &[1; 8]).unwrap();
        m.write_u64(MachineAddr(0x2008), 1).unwrap();
        m.fill(MachineAddr(0x2010), 0, 0x20).unwrap();
        m.flags_written(MachineAddr(0x2800), 8);
        let writes = vec![(MachineAddr(0x2000), 4), (MachineAddr(0x2008), 0x28)];
        assert_eq!(m.take_watched_writes(), Some(WatchedWrites { writes, overflow: false }));
        assert_eq!(m.take_watched_writes(), None);
        for i in 0..512 {
            m.write_u64(MachineAddr(0x2000 + (i * 16) % 0x1000), 1).unwrap();
        }
        let taken = m.take_watched_writes().unwrap();
        assert!(taken.overflow && taken.writes.len() == MAX_WATCHED_WRITES);
        m.watch_page(2, false);
        m.fill(MachineAddr(0x2000), 0, 0x1000).unwrap();
        assert_eq!(m.take_watched_writes(), None);
    }

    #[test]
    fn all_code_is_dropped_when_anything_may_have_been_written() {
        let m = MachineMemory::new(0x4000).unwrap();
        let log = Arc::new(Log(Mutex::new(vec![])));
        m.add_code_watcher(log.clone());
        m.set_code_page(1, true);
        m.set_code_page(3, true);
        m.written_anywhere();
        m.written_anywhere();
        assert_eq!(*log.0.lock().unwrap(), [1, 3]);
    }

    #[test]
    fn dirty_bits_are_taken_once() {
        let m = MachineMemory::new(0x100 * 0x1000).unwrap();
        m.fill(MachineAddr(0x41 * 0x1000), 1, 0x2000).unwrap();
        assert_eq!(m.take_dirty(1), 0b110);
        assert_eq!(m.take_dirty(1), 0);
    }
}
