//! Virtio devices (Virtual I/O Device Version 1.2), with the modern PCI transport ([`pci`]).
//!
//! Queues are the `virtio-queue` crate's. A backend handles one chain of descriptors at a time on the device's own
//! thread; each of its accesses to the guest's memory first makes sure that the device was not reset meanwhile.
//!
//! Not supported: packed queues, resetting single queues, shared memory, legacy (before 1.0) drivers.

pub mod block;
pub mod pci;
pub mod rng;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use memory::BusAddress;
use memory::dma::{DeviceDma, DmaSession};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use crate::device::lock;
use crate::pci::Signals;
use crate::worker::Bell;

/// No MSI-X vector (§4.1.4.3).
pub const NO_VECTOR: u16 = 0xffff;
/// Longest chain of descriptors.
const MAX_SEGMENTS: usize = 1024;

/// Features of every device here: version 1, indirect descriptors, event indices, and that its accesses to memory may be
/// translated (§6).
const COMMON_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_F_ACCESS_PLATFORM;

/// Why an access to a chain's memory was not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainError {
    /// The device was reset, or the machine ends: the request is to be forgotten.
    Gone,
    /// The memory can't be reached, or the chain is shorter.
    Fault,
}

/// What a backend did with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    /// It is done, with so many bytes written to it.
    Done(u32),
    /// It is to be offered again when the bell rings next.
    NotYet,
    /// The driver broke the protocol: the device needs a reset.
    Broken,
    /// The request is forgotten.
    Gone,
}

impl From<ChainError> for Handled {
    fn from(e: ChainError) -> Self {
        match e {
            ChainError::Gone => Self::Gone,
            ChainError::Fault => Self::Broken,
        }
    }
}

/// What is special about a kind of device.
pub trait Backend: Send {
    /// Its device ID (§5).
    fn id(&self) -> u16;
    /// PCI class code.
    fn class(&self) -> u32;
    /// Device features besides those that all have.
    fn features(&self) -> u64;
    /// Largest size of each queue, powers of two.
    fn queues(&self) -> &'static [u16];
    /// The device configuration space.
    fn config(&self) -> Vec<u8>;
    /// Handles one chain of queue `queue`.
    fn handle(&mut self, queue: usize, chain: &mut Chain<'_>) -> Handled;
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    address: BusAddress,
    len: u32,
}

/// A request: memory that the device reads, and memory that it writes.
pub struct Chain<'a> {
    shared: &'a Shared,
    epoch: u64,
    features: u64,
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Chain<'_> {
    /// How many bytes there are to read.
    pub fn readable_len(&self) -> u64 {
        self.readable.iter().map(|s| u64::from(s.len)).sum()
    }

    /// How many bytes there are to write.
    pub fn writable_len(&self) -> u64 {
        self.writable.iter().map(|s| u64::from(s.len)).sum()
    }

    /// Whether the driver accepted feature `bit`.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features >> bit & 1 != 0
    }

    /// Fills `buf` from the readable bytes at `offset`.
    ///
    /// # Errors
    /// [`ChainError`].
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), ChainError> {
        self.transfer(&self.readable, offset, buf.len(), |session, at, from, n| {
            buf.get_mut(from..from + n).is_some_and(|b| session.read(at, b).is_ok())
        })
    }

    /// Writes `buf` to the writable bytes at `offset`.
    ///
    /// # Errors
    /// [`ChainError`].
    pub fn write(&self, offset: u64, buf: &[u8]) -> Result<(), ChainError> {
        self.transfer(&self.writable, offset, buf.len(), |session, at, from, n| {
            buf.get(from..from + n).is_some_and(|b| session.write(at, b).is_ok())
        })
    }

    /// Calls `f` for each piece of `len` bytes at `offset` of `segments`, while the device can't be reset.
    fn transfer(
        &self,
        segments: &[Segment],
        offset: u64,
        len: usize,
        mut f: impl FnMut(&DmaSession<'_>, BusAddress, usize, usize) -> bool,
    ) -> Result<(), ChainError> {
        let state = lock(&self.shared.state);
        if state.epoch != self.epoch || self.shared.bell.is_stopped() {
            return Err(ChainError::Gone);
        }
        let session = self.shared.dma.session();
        let (mut skip, mut done) = (offset, 0);
        for s in segments {
            let size = u64::from(s.len);
            if skip >= size {
                skip -= size;
                continue;
            }
            let n = (size - skip).min((len - done) as u64) as usize;
            let at = s.address.checked_add(skip).ok_or(ChainError::Fault)?;
            if n > 0 && !f(&session, at, done, n) {
                return Err(ChainError::Fault);
            }
            skip = 0;
            done += n;
            if done == len {
                break;
            }
        }
        if done == len { Ok(()) } else { Err(ChainError::Fault) }
    }
}

/// A queue and where its interrupts go.
struct QueueState {
    queue: Queue,
    vector: u16,
}

/// What the driver has set up.
struct State {
    /// Counts resets.
    epoch: u64,
    status: u32,
    driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    config_vector: u16,
    queue_select: u16,
    queues: Vec<QueueState>,
    /// Interrupt status (§4.1.4.5).
    isr: u8,
}

/// What registers and worker share.
pub(crate) struct Shared {
    state: Mutex<State>,
    bell: Arc<Bell>,
    signals: Arc<Signals>,
    dma: DeviceDma,
    features: u64,
    config: Vec<u8>,
    /// A fault was reported; one is enough.
    warned: AtomicBool,
}

/// Interrupt status: a queue; the configuration.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

impl Shared {
    fn new(backend: &dyn Backend, bell: Arc<Bell>, signals: Arc<Signals>, dma: DeviceDma) -> Self {
        // Sizes are constants of the backends; one that the crate refuses is left out.
        let queue = |size: &u16| Some(QueueState { queue: Queue::new(*size).ok()?, vector: NO_VECTOR });
        let state = State {
            epoch: 0,
            status: 0,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: backend.queues().iter().filter_map(queue).collect(),
            isr: 0,
        };
        Self {
            state: Mutex::new(state),
            bell,
            signals,
            dma,
            features: backend.features() | COMMON_FEATURES,
            config: backend.config(),
            warned: AtomicBool::new(false),
        }
    }

    // ---- the worker's side --------------------------------------------------------------

    /// Handles requests until the machine ends.
    fn work(&self, backend: &mut dyn Backend) {
        while let Some(rung) = self.bell.wait() {
            let queues = backend.queues().len();
            for queue in (0..queues).filter(|q| rung >> q & 1 != 0) {
                self.serve(queue, backend);
            }
        }
    }

    /// Handles what there is in `queue`.
    fn serve(&self, queue: usize, backend: &mut dyn Backend) {
        while let Some(mut chain) = self.pop(queue) {
            match backend.handle(queue, &mut chain) {
                Handled::Done(written) => self.complete(queue, &chain, written),
                Handled::NotYet => return self.put_back(queue, &chain),
                Handled::Broken => return self.broken(&mut lock(&self.state), "a request is malformed"),
                Handled::Gone => return,
            }
        }
    }

    /// The next request of `queue`.
    fn pop(&self, queue: usize) -> Option<Chain<'_>> {
        let mut state = lock(&self.state);
        let state = &mut *state;
        if !state.is_running() || self.bell.is_stopped() {
            return None;
        }
        let q = &mut state.queues.get_mut(queue)?.queue;
        let session = self.dma.session();
        let next = next_chain(q, &session);
        drop(session);
        match next {
            Ok(None) => None,
            Ok(Some((head, readable, writable))) => {
                let (epoch, features) = (state.epoch, state.driver_features);
                Some(Chain { shared: self, epoch, features, head, readable, writable })
            }
            Err(why) => {
                self.broken(state, why);
                None
            }
        }
    }

    fn put_back(&self, queue: usize, chain: &Chain<'_>) {
        let mut state = lock(&self.state);
        if state.epoch == chain.epoch
            && let Some(q) = state.queues.get_mut(queue)
        {
            q.queue.go_to_previous_position();
        }
    }

    /// Gives a request back.
    fn complete(&self, queue: usize, chain: &Chain<'_>, written: u32) {
        let mut state = lock(&self.state);
        if state.epoch != chain.epoch {
            return;
        }
        let Some(q) = state.queues.get_mut(queue) else { return };
        let vector = q.vector;
        let session = self.dma.session();
        let used = q.queue.add_used(&session, chain.head, written);
        let notify = used.and_then(|()| q.queue.needs_notification(&session));
        drop(session);
        match notify {
            Ok(false) => {}
            Ok(true) => self.interrupt(&mut state, ISR_QUEUE, vector),
            Err(_) => self.broken(&mut state, "its used ring can't be written"),
        }
    }

    fn interrupt(&self, state: &mut State, why: u8, vector: u16) {
        if self.signals.uses_messages() {
            self.signals.signal(vector);
        } else {
            state.isr |= why;
            self.signals.set_wire(true);
        }
    }

    /// The driver broke the protocol: nothing more is done until it resets the device (§2.1.2).
    fn broken(&self, state: &mut State, why: &str) {
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!("a virtio device of the guest stops: {why}");
        }
        state.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
        if state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            let vector = state.config_vector;
            self.interrupt(state, ISR_CONFIG, vector);
        }
    }

    // ---- the registers' side ------------------------------------------------------------

    fn reset(&self) {
        let mut state = lock(&self.state);
        state.epoch += 1;
        state.status = 0;
        state.driver_features = 0;
        state.device_feature_select = 0;
        state.driver_feature_select = 0;
        state.config_vector = NO_VECTOR;
        state.queue_select = 0;
        state.isr = 0;
        for q in &mut state.queues {
            q.queue.reset();
            q.queue.set_event_idx(false);
            q.vector = NO_VECTOR;
        }
        self.signals.set_wire(false);
    }

    /// The driver writes the status (§2.1).
    fn set_status(&self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let mut state = lock(&self.state);
        // Bits are only added; needs-reset is the device's own.
        let mut new = value & 0xff & !VIRTIO_CONFIG_S_NEEDS_RESET | state.status;
        let features = state.driver_features;
        let acceptable = features & !self.features == 0 && features >> VIRTIO_F_VERSION_1 & 1 != 0;
        if new & !state.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !acceptable {
            new &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if new & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            new &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        let started = new & !state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        state.status = new;
        if started {
            let event_idx = features >> VIRTIO_RING_F_EVENT_IDX & 1 != 0;
            let count = state.queues.len();
            state.queues.iter_mut().for_each(|q| q.queue.set_event_idx(event_idx));
            drop(state);
            (0..count as u32).for_each(|q| self.bell.ring(q));
        }
    }

    /// Reads and clears the interrupt status.
    fn take_isr(&self) -> u8 {
        let mut state = lock(&self.state);
        let isr = std::mem::take(&mut state.isr);
        self.signals.set_wire(false);
        isr
    }
}

impl State {
    fn is_running(&self) -> bool {
        self.status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_NEEDS_RESET) == VIRTIO_CONFIG_S_DRIVER_OK
    }
    fn selected(&mut self) -> Option<&mut QueueState> {
        self.queues.get_mut(usize::from(self.queue_select))
    }
}

type Segments = (u16, Vec<Segment>, Vec<Segment>);

/// The next chain of `queue`; with none, the driver is asked to say when there is one.
fn next_chain(queue: &mut Queue, memory: &DmaSession<'_>) -> Result<Option<Segments>, &'static str> {
    const UNREACHABLE: &str = "its rings can't be reached";
    if !queue.ready() {
        return Ok(None);
    }
    for _ in 0..2 {
        let mut available = queue.iter(memory).map_err(|_| "its available ring is not valid")?;
        if let Some(chain) = available.next() {
            return segments(chain).map(Some);
        }
        if !queue.enable_notification(memory).map_err(|_| UNREACHABLE)? {
            return Ok(None);
        }
    }
    // There is something, but its place in the ring can't be read.
    Err(UNREACHABLE)
}

fn segments(chain: virtio_queue::DescriptorChain<&DmaSession<'_>>) -> Result<Segments, &'static str> {
    let head = chain.head_index();
    let (mut readable, mut writable) = (Vec::new(), Vec::new());
    for (count, descriptor) in chain.enumerate() {
        if count == MAX_SEGMENTS {
            return Err("a chain of descriptors is too long");
        }
        let segment = Segment { address: BusAddress(descriptor.addr().0), len: descriptor.len() };
        if descriptor.is_write_only() { &mut writable } else { &mut readable }.push(segment);
    }
    Ok((head, readable, writable))
}

#[cfg(test)]
pub(crate) mod testing;
