//! Virtio over PCI (Virtio 1.2 §4.1): the common, notification, interrupt status and device-specific structures in one BAR, and
//! the capabilities that point at them.
//!
//! Not supported: the legacy interface, notification data, resetting single queues, shared memory regions.

use std::io;
use std::sync::Arc;

use memory::dma::{DeviceDma, MessageSink, Requester};
use virtio_queue::QueueT;

use super::{Backend, NO_VECTOR, Shared, State};
use crate::device::lock;
use crate::pci::root::new_requester;
use crate::pci::{Bar, Endpoint, EndpointConfig, Identity, MsixLayout, Registers, SharedWire, Signals};
use crate::worker::{Bell, Worker};

/// The structures' places in BAR 0, each on a page of its own.
const COMMON: u64 = 0x0000;
const COMMON_SIZE: u64 = 56;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;
const MSIX_PENDING: u64 = 0x5000;
const BAR_SIZE: u64 = 0x8000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Size of a structure's page.
const PAGE: u64 = 0x1000;

/// Vendor of all virtio devices, and the device ID that the virtio device ID is added to.
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;

/// Structure types (§4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// What a device on the bus is connected to.
pub struct Wiring {
    /// Its own name on the bus.
    pub requester: Arc<Requester>,
    /// Its way to memory.
    pub dma: DeviceDma,
    /// Where its messages go.
    pub sink: Arc<dyn MessageSink>,
    /// Its interrupt wire, and the number of the wire that firmware tells the system.
    pub wire: Option<(Arc<SharedWire>, u8)>,
    /// Whether it is behind a root port.
    pub behind_port: bool,
}

impl Wiring {
    /// A device with `dma` made for its requester ID.
    pub fn new(
        dma: impl FnOnce(Arc<Requester>) -> DeviceDma,
        sink: Arc<dyn MessageSink>,
        wire: Option<(Arc<SharedWire>, u8)>,
        behind_port: bool,
    ) -> Self {
        let requester = new_requester();
        Self { dma: dma(requester.clone()), requester, sink, wire, behind_port }
    }

    /// The interrupts of the device, with `vectors` MSI-X vectors.
    pub fn signals(&self, vectors: u16) -> Arc<Signals> {
        let wire = self.wire.as_ref().map(|(wire, _)| wire.clone());
        Arc::new(Signals::new(vectors, wire, self.sink.clone(), self.requester.clone()))
    }

    /// Its interrupt line register.
    pub fn interrupt_line(&self) -> Option<u8> {
        self.wire.as_ref().map(|(_, line)| *line)
    }
}

/// The registers of a virtio device.
struct VirtioRegisters {
    shared: Arc<Shared>,
    /// Ends with the device.
    _worker: Worker,
}

/// The device `backend` is, on the bus; `name` is its thread's.
///
/// # Errors
/// The host's, when it gives no thread.
pub fn endpoint(name: &str, mut backend: Box<dyn Backend>, wiring: Wiring) -> io::Result<Endpoint> {
    let vectors = backend.queues().len() as u16 + 1;
    let signals = wiring.signals(vectors);
    let bell = Arc::new(Bell::default());
    let shared = Arc::new(Shared::new(&*backend, bell.clone(), signals.clone(), wiring.dma.clone()));
    let device = DEVICE_BASE + backend.id();
    let identity = Identity {
        vendor: VENDOR,
        device,
        revision: 1,
        class: backend.class(),
        subsystem_vendor: VENDOR,
        subsystem: device,
    };
    let config = EndpointConfig {
        identity,
        bars: vec![(0, Bar { size: BAR_SIZE, prefetchable: false, wide: true })],
        msix: Some(MsixLayout { bar: 0, table: MSIX_TABLE, pending: MSIX_PENDING, vectors }),
        msi: false,
        behind_port: wiring.behind_port,
        interrupt_line: wiring.interrupt_line(),
        vendor_capabilities: capabilities(backend.queues().len(), shared.config.len()),
        window: true,
    };
    let for_worker = shared.clone();
    let worker = Worker::start(name.to_owned(), bell, move || for_worker.work(&mut *backend))?;
    let registers = Box::new(VirtioRegisters { shared, _worker: worker });
    Ok(Endpoint::new(config, wiring.requester, signals, registers))
}

/// The capabilities' bodies (§4.1.4): length, type, BAR, ID, padding, offset, length of the structure.
fn capabilities(queues: usize, config: usize) -> Vec<Vec<u8>> {
    let capability = |kind: u8, offset: u64, length: u32, more: &[u8]| {
        let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
        body.extend((offset as u32).to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(more);
        body
    };
    let mut all = vec![
        capability(CFG_COMMON, COMMON, COMMON_SIZE as u32, &[]),
        capability(CFG_ISR, ISR, 1, &[]),
        capability(CFG_NOTIFY, NOTIFY, queues as u32 * NOTIFY_MULTIPLIER, &NOTIFY_MULTIPLIER.to_le_bytes()),
    ];
    if config > 0 {
        all.push(capability(CFG_DEVICE, DEVICE, config as u32, &[]));
    }
    all.push(capability(CFG_PCI, 0, 0, &[0; 4]));
    all
}

impl Registers for VirtioRegisters {
    fn read(&mut self, _bar: usize, offset: u64, size: u8) -> u32 {
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.shared.read_common(within, size),
            ISR if within == 0 => self.shared.take_isr().into(),
            DEVICE => {
                let bytes = self.shared.config.iter().skip(within as usize).take(size.into());
                bytes.rev().fold(0, |value, b| value << 8 | u32::from(*b))
            }
            _ => 0,
        }
    }

    fn write(&mut self, _bar: usize, offset: u64, size: u8, value: u32) {
        let within = offset % PAGE;
        match offset - within {
            COMMON => self.shared.write_common(within, size, value),
            NOTIFY => self.shared.bell.ring((within / u64::from(NOTIFY_MULTIPLIER)) as u32),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.shared.reset();
    }
}

/// Half of a 64-bit value.
fn half(value: u64, high: bool) -> u32 {
    if high { (value >> 32) as u32 } else { value as u32 }
}

impl Shared {
    /// Reads the common structure (§4.1.4.3). Fields are accessed with their own width; other accesses read as 0.
    fn read_common(&self, offset: u64, size: u8) -> u32 {
        let mut state = lock(&self.state);
        let state = &mut *state;
        let queues = state.queues.len() as u32;
        match (offset, size) {
            (0, 4) => state.device_feature_select,
            (4, 4) => features_half(self.features, state.device_feature_select),
            (8, 4) => state.driver_feature_select,
            (12, 4) => features_half(state.driver_features, state.driver_feature_select),
            (16, 2) => state.config_vector.into(),
            (18, 2) => queues,
            (20, 1) => state.status,
            // The configuration does not change.
            (21, 1) => 0,
            (22, 2) => state.queue_select.into(),
            (24.., _) => read_queue(state, offset, size),
            _ => 0,
        }
    }

    /// Writes the common structure.
    fn write_common(&self, offset: u64, size: u8, value: u32) {
        if (offset, size) == (20, 1) {
            self.set_status(value);
            return;
        }
        let mut state = lock(&self.state);
        let vectors = state.queues.len() as u16 + 1;
        match (offset, size) {
            (0, 4) => state.device_feature_select = value,
            (8, 4) => state.driver_feature_select = value,
            (12, 4) => state.set_features(value),
            (16, 2) => state.config_vector = vector(value, vectors),
            (22, 2) => state.queue_select = value as u16,
            (24.., _) => write_queue(&mut state, offset, size, value, vectors),
            _ => {}
        }
    }
}

/// 32 of the feature bits.
fn features_half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// A vector, or none if there is no such (§4.1.5.1.2).
fn vector(value: u32, vectors: u16) -> u16 {
    let value = value as u16;
    if value < vectors { value } else { NO_VECTOR }
}

impl State {
    /// Features are chosen before FEATURES_OK.
    fn set_features(&mut self, value: u32) {
        if self.status & virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        self.driver_features = match self.driver_feature_select {
            0 => self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features & 0xffff_ffff | value << 32,
            // Bits that no device offers: kept as one that can't be accepted.
            _ if value != 0 => u64::MAX,
            _ => self.driver_features,
        };
    }
}

fn read_queue(state: &mut State, offset: u64, size: u8) -> u32 {
    let index = state.queue_select;
    let Some(q) = state.selected() else { return 0 };
    let vector = q.vector;
    let q = &q.queue;
    match (offset, size) {
        (24, 2) => q.size().into(),
        (26, 2) => vector.into(),
        (28, 2) => q.ready().into(),
        // Notification offset: the queue's number.
        (30, 2) => index.into(),
        (32 | 36, 4) => half(q.desc_table(), offset == 36),
        (40 | 44, 4) => half(q.avail_ring(), offset == 44),
        (48 | 52, 4) => half(q.used_ring(), offset == 52),
        _ => 0,
    }
}

/// Writes a field of the selected queue. Size and addresses are fixed once it is enabled.
fn write_queue(state: &mut State, offset: u64, size: u8, value: u32, vectors: u16) {
    let Some(q) = state.selected() else { return };
    if (offset, size) == (26, 2) {
        q.vector = vector(value, vectors);
        return;
    }
    let q = &mut q.queue;
    if q.ready() {
        return;
    }
    match (offset, size) {
        (24, 2) => q.set_size(value as u16),
        (28, 2) => q.set_ready(value == 1),
        (32, 4) => q.set_desc_table_address(Some(value), None),
        (36, 4) => q.set_desc_table_address(None, Some(value)),
        (40, 4) => q.set_avail_ring_address(Some(value), None),
        (44, 4) => q.set_avail_ring_address(None, Some(value)),
        (48, 4) => q.set_used_ring_address(Some(value), None),
        (52, 4) => q.set_used_ring_address(None, Some(value)),
        _ => {}
    }
}
