//! How devices reach memory and send interrupts: two traits, behind which an IOMMU can be.
//!
//! A device names itself by its requester ID and gives the address that it puts on the bus. A [`DmaSpace`] says where
//! in L1's memory that leads; without an IOMMU, to the same address. All transfers of a device are made in
//! [`DmaSession`]s, which also are the `GuestMemory` that the `virtio-queue` crate wants. Messages
//! (MSI, MSI-X) go to a [`MessageSink`] in the same way.
//!
//! Not supported: address translation services (devices with a translation cache of their own), PASIDs,
//! transfers between devices (what is not RAM is a fault).

use std::fmt;
use std::iter::FusedIterator;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions, VolatileSlice};
use x86_spec::pci::Bdf;

use crate::{BusAddress, L1Gpa, L1Ram, MachineAddr, MachineMemory, PAGE_SIZE};

/// What a device does with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaAccess {
    /// It reads.
    Read,
    /// It writes.
    Write,
}

/// A device's access to memory that was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaFault {
    /// The IOMMU has no translation, or one without the permission.
    #[error("the IOMMU blocks device {requester} at bus address {address}")]
    Blocked {
        /// Whose access.
        requester: Bdf,
        /// Where.
        address: BusAddress,
    },
    /// The device, or a bridge above it, is not enabled to make accesses (bus master enable).
    #[error("device {requester} is no bus master")]
    NotMaster {
        /// Whose access.
        requester: Bdf,
    },
    /// There is no RAM.
    #[error("device {requester} accesses bus address {address}, where no RAM is")]
    NotRam {
        /// Whose access.
        requester: Bdf,
        /// Where.
        address: BusAddress,
    },
}

/// Where a bus address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The address in L1's physical address space.
    pub gpa: L1Gpa,
    /// The machine memory behind it, if the space knows: an IOMMU keeps both steps as one.
    pub machine: Option<MachineAddr>,
    /// How many bytes from there on lead on without a gap: at least 1.
    pub len: u64,
}

/// Where devices' addresses lead: an IOMMU, or none.
pub trait DmaSpace: Send + Sync + fmt::Debug {
    /// Where `address` of device `requester` leads. The implementation records its faults itself, as hardware does.
    ///
    /// # Errors
    /// [`DmaFault`] when the access is not allowed.
    fn translate(&self, requester: Bdf, address: BusAddress, access: DmaAccess) -> Result<Route, DmaFault>;

    /// Held for reading while a device uses translations. Who takes translations back acquires it for
    /// writing, after the tables have changed and before saying that it is done: then no access by an old translation
    /// is under way any more.
    fn in_flight(&self) -> &RwLock<()>;
}

/// No IOMMU: a bus address is a physical address of L1.
#[derive(Debug, Default)]
pub struct Untranslated(RwLock<()>);

impl DmaSpace for Untranslated {
    fn translate(&self, _: Bdf, address: BusAddress, _: DmaAccess) -> Result<Route, DmaFault> {
        Ok(Route { gpa: L1Gpa(address.0), machine: None, len: u64::MAX })
    }
    fn in_flight(&self) -> &RwLock<()> {
        &self.0
    }
}

/// Where message-signalled interrupts go: to the local APICs, possibly by way of interrupt remapping.
pub trait MessageSink: Send + Sync {
    /// Device `requester` writes `data` to `address`. What is no interrupt message is dropped.
    fn send(&self, requester: Bdf, address: u64, data: u32);
}

/// A function as the origin of requests: its requester ID, whose bus number changes when the system renumbers
/// buses, and whether it may make requests.
#[derive(Debug, Default)]
pub struct Requester {
    id: AtomicU16,
    /// Bus master enable of the function.
    master: AtomicBool,
    /// The bridge above does not forward requests.
    cut_off: AtomicBool,
}

impl Requester {
    /// A function at `bdf`, which is no bus master yet.
    pub fn new(bdf: Bdf) -> Self {
        Self { id: AtomicU16::new(bdf.requester_id()), ..Self::default() }
    }
    /// Where the function is now.
    pub fn get(&self) -> Bdf {
        Bdf::from_requester_id(self.id.load(Ordering::Relaxed))
    }
    /// The function was addressed as `bdf`, and is that from now on (PCI Express 6.0 §2.2.6.2).
    pub fn set(&self, bdf: Bdf) {
        self.id.store(bdf.requester_id(), Ordering::Relaxed);
    }
    /// Bus master enable of the function.
    pub fn set_master(&self, enabled: bool) {
        self.master.store(enabled, Ordering::Release);
    }
    /// Bus master enable of the bridge above the function.
    pub fn set_forwarded(&self, enabled: bool) {
        self.cut_off.store(!enabled, Ordering::Release);
    }
    /// Whether the function's requests get anywhere.
    pub fn can_request(&self) -> bool {
        self.master.load(Ordering::Acquire) && !self.cut_off.load(Ordering::Acquire)
    }
}

/// One device's way to memory.
#[derive(Clone, Debug)]
pub struct DeviceDma {
    ram: L1Ram,
    space: Arc<dyn DmaSpace>,
    requester: Arc<Requester>,
}

impl DeviceDma {
    /// The way of `requester` to `ram` through `space`.
    pub fn new(ram: L1Ram, space: Arc<dyn DmaSpace>, requester: Arc<Requester>) -> Self {
        Self { ram, space, requester }
    }

    /// Starts transfers. Translations stay valid until the session is dropped, so it has to be short: never
    /// across a wait for the host, and never two at a time in one thread.
    pub fn session(&self) -> DmaSession<'_> {
        let in_flight = self.space.in_flight().read().unwrap_or_else(PoisonError::into_inner);
        DmaSession { dma: self, requester: self.requester.get(), _in_flight: in_flight }
    }
}

/// Transfers of one device during which translations do not change.
#[derive(Debug)]
pub struct DmaSession<'s> {
    dma: &'s DeviceDma,
    requester: Bdf,
    _in_flight: RwLockReadGuard<'s, ()>,
}

impl<'s> DmaSession<'s> {
    /// The machine memory behind `address`, and how many of `len` bytes follow it without a gap.
    fn locate(
        &self,
        address: BusAddress,
        len: u64,
        access: DmaAccess,
    ) -> Result<(MachineAddr, u64), DmaFault> {
        if !self.dma.requester.can_request() {
            return Err(DmaFault::NotMaster { requester: self.requester });
        }
        let route = self.dma.space.translate(self.requester, address, access)?;
        let not_ram = DmaFault::NotRam { requester: self.requester, address };
        let (machine, room) = match route.machine {
            Some(machine) => (machine, route.len),
            None => self.dma.ram.translate(route.gpa).ok_or(not_ram)?,
        };
        Ok((machine, route.len.min(room).min(len)))
    }

    /// Calls `f` for each contiguous piece of `len` bytes at `address`, with the offset from `address`.
    fn pieces(
        &self,
        address: BusAddress,
        len: usize,
        access: DmaAccess,
        mut f: impl FnMut(MachineAddr, usize, usize) -> bool,
    ) -> Result<(), DmaFault> {
        let mut done = 0;
        while done < len {
            let fault = DmaFault::NotRam { requester: self.requester, address };
            let at = address.checked_add(done as u64).ok_or(fault)?;
            let (machine, here) = self.locate(at, (len - done) as u64, access)?;
            let here = (here as usize).max(1);
            if !f(machine, done, here) {
                return Err(fault);
            }
            done += here;
        }
        Ok(())
    }

    /// The device reads memory at `address` into `buf`.
    ///
    /// # Errors
    /// [`DmaFault`]; `buf` may have been filled in part.
    pub fn read(&self, address: BusAddress, buf: &mut [u8]) -> Result<(), DmaFault> {
        let memory = self.dma.ram.memory();
        self.pieces(address, buf.len(), DmaAccess::Read, |at, from, n| {
            buf.get_mut(from..from + n).is_some_and(|piece| memory.read(at, piece).is_ok())
        })
    }

    /// The device writes `buf` to memory at `address`.
    ///
    /// # Errors
    /// [`DmaFault`]; a part may have been written.
    pub fn write(&self, address: BusAddress, buf: &[u8]) -> Result<(), DmaFault> {
        let memory = self.dma.ram.memory();
        self.pieces(address, buf.len(), DmaAccess::Write, |at, from, n| {
            buf.get(from..from + n).is_some_and(|piece| memory.write(at, piece).is_ok())
        })
    }
}

/// Tells machine memory what is written through a slice of it.
#[derive(Clone, Copy, Debug)]
pub struct WriteMarks<'m> {
    memory: &'m MachineMemory,
    start: MachineAddr,
}

impl<'m> WithBitmapSlice<'_> for WriteMarks<'m> {
    type S = WriteMarks<'m>;
}

impl BitmapSlice for WriteMarks<'_> {}

impl<'m> Bitmap for WriteMarks<'m> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.memory.written(self.start.offset(offset as u64), len as u64);
    }
    /// Nobody here asks.
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
    fn slice_at(&self, offset: usize) -> WriteMarks<'m> {
        WriteMarks { memory: self.memory, start: self.start.offset(offset as u64) }
    }
}

/// The pieces of a range of bus addresses.
struct Slices<'a, 's> {
    session: &'a DmaSession<'s>,
    at: u64,
    left: usize,
    access: DmaAccess,
}

impl<'a, 's> Slices<'a, 's> {
    fn piece(&self) -> Result<VolatileSlice<'a, WriteMarks<'s>>, GuestMemoryError> {
        let bad = GuestMemoryError::InvalidGuestAddress(GuestAddress(self.at));
        let address = BusAddress(self.at);
        let Ok((start, len)) = self.session.locate(address, self.left as u64, self.access) else {
            return Err(bad);
        };
        let memory: &'s MachineMemory = self.session.dma.ram.memory();
        let len = len as usize;
        let pointer = memory.host_ptr(start, len).map_err(|_| bad)?;
        // SAFETY: `host_ptr` checked that the bytes are within the mapping, which `memory` keeps alive for
        // longer than the slice; guest memory is only accessed by raw copies and atomics.
        Ok(unsafe { VolatileSlice::with_bitmap(pointer, len, WriteMarks { memory, start }, None) })
    }
}

impl<'a, 's> Iterator for Slices<'a, 's> {
    type Item = Result<VolatileSlice<'a, WriteMarks<'s>>, GuestMemoryError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let piece = self.piece();
        match &piece {
            Ok(slice) => {
                self.at = self.at.wrapping_add(slice.len() as u64);
                self.left = self.left.saturating_sub(slice.len());
            }
            Err(_) => self.left = 0,
        }
        Some(piece)
    }
}

impl FusedIterator for Slices<'_, '_> {}
impl<'a, 's> GuestMemorySliceIterator<'a, WriteMarks<'s>> for Slices<'a, 's> {}

impl<'s> GuestMemory for DmaSession<'s> {
    /// There is none: each range is translated.
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = WriteMarks<'s>;

    /// Looks at one byte of each page: what a queue's layout says is checked once, and again at each access.
    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let accesses = accesses(access);
        let Some(last) = addr.0.checked_add((count as u64).saturating_sub(1)) else { return false };
        let pages = addr.0 / PAGE_SIZE..=last / PAGE_SIZE;
        accesses.into_iter().flatten().all(|access| {
            pages.clone().all(|page| {
                let at = BusAddress((page * PAGE_SIZE).max(addr.0));
                self.locate(at, 1, access).is_ok()
            })
        })
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, WriteMarks<'s>>, GuestMemoryError> {
        let access = if access.has_write() { DmaAccess::Write } else { DmaAccess::Read };
        Ok(Slices { session: self, at: addr.0, left: count, access })
    }
}

/// What has to be allowed for `access`.
fn accesses(access: Permissions) -> [Option<DmaAccess>; 2] {
    match access {
        Permissions::Write => [Some(DmaAccess::Write), None],
        Permissions::ReadWrite => [Some(DmaAccess::Read), Some(DmaAccess::Write)],
        Permissions::No | Permissions::Read => [Some(DmaAccess::Read), None],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RamLayout;
    use std::sync::Mutex;
    use std::sync::atomic::Ordering;
    use vm_memory::Bytes;

    /// Pages 0 and 1 of device 01:00.0 are exchanged, page 2 can only be read; others have nothing.
    #[derive(Debug, Default)]
    struct Exchange {
        lock: RwLock<()>,
        asked: Mutex<Vec<(Bdf, u64, DmaAccess)>>,
    }

    impl DmaSpace for Exchange {
        fn translate(
            &self,
            requester: Bdf,
            address: BusAddress,
            access: DmaAccess,
        ) -> Result<Route, DmaFault> {
            self.asked.lock().unwrap().push((requester, address.0, access));
            let page = match (address.page(), access) {
                (page @ (0 | 1), _) => 1 - page,
                (2, DmaAccess::Read) => 2,
                _ => return Err(DmaFault::Blocked { requester, address }),
            };
            let gpa = L1Gpa(page * PAGE_SIZE + address.page_offset());
            Ok(Route { gpa, machine: None, len: PAGE_SIZE - address.page_offset() })
        }
        fn in_flight(&self) -> &RwLock<()> {
            &self.lock
        }
    }

    fn machine(space: Arc<dyn DmaSpace>) -> (L1Ram, DeviceDma) {
        let memory = Arc::new(MachineMemory::new(0x8000).unwrap());
        let ram = L1Ram::new(memory, RamLayout::new(0x8000)).unwrap();
        let requester = Arc::new(Requester::new(Bdf::new(1, 0, 0)));
        requester.set_master(true);
        (ram.clone(), DeviceDma::new(ram, space, requester))
    }

    #[test]
    fn transfers_are_cut_where_translations_are() {
        let (ram, dma) = machine(Arc::new(Exchange::default()));
        let session = dma.session();
        session.write(BusAddress(0xffe), &[1, 2, 3, 4]).unwrap();
        let mut bytes = [0; 2];
        ram.read(L1Gpa(0x1ffe), &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2]);
        ram.read(L1Gpa(0), &mut bytes).unwrap();
        assert_eq!(bytes, [3, 4]);
        let mut back = [0; 4];
        session.read(BusAddress(0xffe), &mut back).unwrap();
        assert_eq!(back, [1, 2, 3, 4]);
    }

    #[test]
    fn faults_name_device_and_address() {
        let (_, dma) = machine(Arc::new(Exchange::default()));
        let requester = Bdf::new(1, 0, 0);
        let address = BusAddress(0x2000);
        assert_eq!(dma.session().write(address, &[0]), Err(DmaFault::Blocked { requester, address }));
        assert_eq!(dma.session().read(address, &mut [0]), Ok(()));
        let (_, dma) = machine(Arc::new(Untranslated::default()));
        let address = BusAddress(0x7ffe);
        assert!(dma.session().read(address, &mut [0; 2]).is_ok());
        let beyond = BusAddress(0x8000);
        let fault = DmaFault::NotRam { requester, address: beyond };
        assert_eq!(dma.session().read(address, &mut [0; 3]), Err(fault));
        assert!(dma.session().read(BusAddress(u64::MAX), &mut [0; 2]).is_err());
    }

    #[test]
    fn only_bus_masters_get_to_memory() {
        let (_, dma) = machine(Arc::new(Untranslated::default()));
        let read = || dma.session().read(BusAddress(0), &mut [0]);
        assert_eq!(read(), Ok(()));
        dma.requester.set_forwarded(false);
        assert_eq!(read(), Err(DmaFault::NotMaster { requester: Bdf::new(1, 0, 0) }));
        dma.requester.set_forwarded(true);
        dma.requester.set_master(false);
        assert!(read().is_err());
    }

    #[test]
    fn virtio_queues_see_the_same_memory() {
        let space = Arc::new(Exchange::default());
        let (ram, dma) = machine(space.clone());
        let session = dma.session();
        ram.memory().set_code_page(1, true);
        session.store(0x1234_5678u32, GuestAddress(0x10), Ordering::Release).unwrap();
        assert_eq!(session.load::<u32>(GuestAddress(0x10), Ordering::Acquire).unwrap(), 0x1234_5678);
        assert!(!ram.memory().is_code_page(1), "code of the page that was written is dropped");
        let mut word = [0; 4];
        ram.read(L1Gpa(0x1010), &mut word).unwrap();
        assert_eq!(u32::from_le_bytes(word), 0x1234_5678);
        assert!(session.check_range(GuestAddress(0), 0x2000, Permissions::ReadWrite));
        assert!(!session.check_range(GuestAddress(0), 0x2001, Permissions::Write));
        assert!(session.check_range(GuestAddress(0), 0x3000, Permissions::Read));
        assert!(!session.check_range(GuestAddress(u64::MAX), 2, Permissions::Read));
        let asked = space.asked.lock().unwrap();
        assert!(asked.iter().all(|(bdf, ..)| *bdf == Bdf::new(1, 0, 0)));
        assert_eq!(asked[0], (Bdf::new(1, 0, 0), 0x10, DmaAccess::Write));
    }
}
