//! Pages for VMCSs, paging structures, bitmaps and L2's memory: a pool that each case starts
//! with afresh. Memory is identity-mapped, so that addresses are physical ones.

const PAGES: usize = 384;

#[repr(C, align(4096))]
struct Pool([[u8; 4096]; PAGES]);

static mut POOL: Pool = Pool([[0; 4096]; PAGES]);
static mut USED: usize = 0;

/// Gives all pages back.
pub fn reset() {
    unsafe { USED = 0 };
}

/// The address of `n` zeroed pages in a row.
pub fn pages(n: usize) -> u64 {
    unsafe {
        let first = USED;
        assert!(first + n <= PAGES, "the page pool is empty");
        USED = first + n;
        let at = (&raw mut POOL as *mut u8).add(first * 4096);
        core::ptr::write_bytes(at, 0, n * 4096);
        at as u64
    }
}

/// The address of a zeroed page.
pub fn page() -> u64 {
    pages(1)
}

/// Reads memory.
pub fn read<T: Copy>(at: u64) -> T {
    unsafe { (at as *const T).read_volatile() }
}
/// Writes memory.
pub fn write<T: Copy>(at: u64, value: T) {
    unsafe { (at as *mut T).write_volatile(value) };
}
/// Fills `len` bytes.
pub fn fill(at: u64, byte: u8, len: usize) {
    unsafe { core::ptr::write_bytes(at as *mut u8, byte, len) };
}
/// Copies `len` bytes.
pub fn copy(to: u64, from: u64, len: usize) {
    unsafe { core::ptr::copy(from as *const u8, to as *mut u8, len) };
}
