//! The bounded pool of pages that L0 keeps for itself: EPT01, EPT02, bitmaps.

use std::sync::{Arc, Mutex};

use crate::{MachineAddr, MachineMemory, MemoryError, PAGE_SHIFT, PAGE_SIZE};

/// Pages of machine memory that belong to L0 and are handed out one at a time. The
/// pool never grows.
#[derive(Debug)]
pub struct PagePool {
    memory: Arc<MachineMemory>,
    first: u64,
    pages: u64,
    free: Mutex<FreeList>,
}

#[derive(Debug)]
struct FreeList {
    returned: Vec<u64>,
    never_used: u64,
}

impl PagePool {
    /// A pool of `pages` pages from `first`.
    ///
    /// # Errors
    /// [`MemoryError::OutOfRange`] when they are not all inside `memory`.
    pub fn new(memory: Arc<MachineMemory>, first: MachineAddr, pages: u64) -> Result<Self, MemoryError> {
        memory.host_ptr(first, (pages << PAGE_SHIFT) as usize)?;
        Ok(Self {
            memory,
            first: first.page(),
            pages,
            free: Mutex::new(FreeList { returned: Vec::new(), never_used: 0 }),
        })
    }

    /// Takes a zeroed page.
    ///
    /// # Errors
    /// [`MemoryError::PoolEmpty`].
    pub fn alloc(&self) -> Result<MachineAddr, MemoryError> {
        let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
        let page = match free.returned.pop() {
            Some(p) => p,
            None if free.never_used < self.pages => {
                free.never_used += 1;
                self.first + free.never_used - 1
            }
            None => return Err(MemoryError::PoolEmpty { pages: self.pages }),
        };
        let addr = MachineAddr(page << PAGE_SHIFT);
        self.memory.fill(addr, 0, PAGE_SIZE as usize)?;
        Ok(addr)
    }

    /// Gives a page back. Pages that are not the pool's are ignored.
    pub fn free(&self, addr: MachineAddr) {
        if (self.first..self.first + self.pages).contains(&addr.page()) {
            let mut free = self.free.lock().unwrap_or_else(|e| e.into_inner());
            debug_assert!(!free.returned.contains(&addr.page()), "page freed twice: {addr}");
            free.returned.push(addr.page());
        }
    }

    /// Pages in use now.
    pub fn used(&self) -> u64 {
        let free = self.free.lock().unwrap_or_else(|e| e.into_inner());
        free.never_used - free.returned.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_back_zeroed_and_the_pool_is_bounded() {
        let mem = Arc::new(MachineMemory::new(0x10000).unwrap());
        let pool = PagePool::new(mem.clone(), MachineAddr(0x4000), 2).unwrap();
        let a = pool.alloc().unwrap();
        let b = pool.alloc().unwrap();
        assert_ne!(a, b);
        assert_eq!(pool.alloc(), Err(MemoryError::PoolEmpty { pages: 2 }));
        mem.write(a, &[1]).unwrap();
        pool.free(a);
        assert_eq!(pool.used(), 1);
        let c = pool.alloc().unwrap();
        assert_eq!(c, a);
        assert_eq!(mem.read_u64(c).unwrap(), 0);
    }
}
