//! Memory for generated code: one memfd mapped twice, writable and executable, so that no
//! page is ever both and adding code costs no system call. Pages that were never written cost
//! nothing.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr;

/// Pieces of code start at multiples of this.
const ALIGN: usize = 16;

/// Bounded memory for generated code.
#[derive(Debug)]
pub(crate) struct Arena {
    writable: *mut u8,
    executable: *mut u8,
    size: usize,
    used: usize,
}

// SAFETY: the arena owns both mappings; the pointers are not shared with anyone else.
unsafe impl Send for Arena {}

impl Arena {
    /// An empty arena of `size` bytes, a multiple of the page size; `name` is what the host shows for it.
    ///
    /// # Errors
    /// What the host answers when it refuses executable memory.
    pub(crate) fn new(name: &CStr, size: usize) -> io::Result<Self> {
        // SAFETY: the name is NUL-terminated; the call has no other memory effects.
        let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just created and is owned by nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(size as u64)?;
        let writable = map(&file, size, libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = match map(&file, size, libc::PROT_READ | libc::PROT_EXEC) {
            Ok(p) => p,
            Err(e) => {
                // SAFETY: the mapping was made above and nothing refers to it.
                unsafe { libc::munmap(writable.cast(), size) };
                return Err(e);
            }
        };
        Ok(Self { writable, executable, size, used: 0 })
    }

    /// Where the next code will be.
    pub(crate) fn next(&self) -> usize {
        self.executable as usize + self.used
    }

    /// Adds code; its entry point, or `None` when the arena is full.
    pub(crate) fn push(&mut self, code: &[u8]) -> Option<usize> {
        let at = self.used;
        let end = at.checked_add(code.len())?;
        if end > self.size {
            return None;
        }
        // SAFETY: `at..end` lies within the writable mapping, which nothing borrows. Code there
        // is new: none that may be running is overwritten.
        unsafe { ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(at), code.len()) };
        self.used = end.next_multiple_of(ALIGN).min(self.size);
        Some(self.executable as usize + at)
    }

    /// Forgets all code. None of it may run afterwards.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both mappings were made by `new` and end with the arena.
        unsafe {
            libc::munmap(self.writable.cast(), self.size);
            libc::munmap(self.executable.cast(), self.size);
        }
    }
}

fn map(file: &File, size: usize, protection: i32) -> io::Result<*mut u8> {
    // SAFETY: a new shared mapping of a file we own, at an address the kernel chooses.
    let p = unsafe { libc::mmap(ptr::null_mut(), size, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if p == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(p.cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_runs_and_the_arena_is_bounded() {
        let mut a = Arena::new(c"test", 1 << 16).unwrap();
        // mov eax, 42; ret
        let at = a.push(&[0xb8, 42, 0, 0, 0, 0xc3]).unwrap();
        // SAFETY: the bytes are a complete function of this type.
        let f: extern "sysv64" fn() -> u32 = unsafe { std::mem::transmute(at) };
        assert_eq!(f(), 42);
        while a.push(&[0xc3; 4096]).is_some() {}
        assert!(a.used <= a.size);
        a.clear();
        assert!(a.push(&[0xc3]).is_some());
    }
}
