//! An NVM Express controller (NVM Express Base Specification 1.4) with one namespace.
//!
//! Registers are accessed by vCPUs; commands are done on the controller's own thread, one after the other, taking turns
//! between submission queues. When a Flush, or a write with FUA, is completed, the host has what was written on its disk.
//! Errors of the host are media errors of the guest.
//!
//! Not supported: pages other than 4 KiB, scatter-gather lists, arbitration by weights, metadata and protection information,
//! blocks other than 512 bytes, namespace management, formatting, firmware updates, security commands, compare,
//! reservations, fused commands, host and controller memory buffers, subsystem resets, power states other than 0,
//! interrupt coalescing (it may be set, and has no effect).

mod admin;
mod command;
mod io;
mod prp;
mod queue;

use std::io as std_io;
use std::sync::{Arc, Mutex, MutexGuard};

use memory::BusAddress;
use memory::dma::{DeviceDma, DmaFault, DmaSession};

use crate::device::lock;
use crate::disk::Storage;
use crate::pci::{Bar, Endpoint, EndpointConfig, Identity, MsixLayout, Registers, Signals};
use crate::virtio::pci::Wiring;
use crate::worker::{Bell, Worker};

use command::{Command, Failure, Status};
use queue::{Completion, CompletionQueue, OutOfRange, SubmissionQueue};

/// Page size of the controller.
const PAGE: u64 = 4096;
/// I/O queues that a system can create.
pub const IO_QUEUES: u16 = 8;
/// Largest queue.
const MAX_ENTRIES: u32 = 1024;
/// Outstanding asynchronous event requests.
const MAX_EVENT_REQUESTS: usize = 4;
/// Commands of a queue before it is another's turn.
const BURST: usize = 32;
/// The bell's bit for a shutdown.
const SHUTDOWN_BIT: u32 = 63;

/// BAR 0: registers, doorbells, and a page each for MSI-X table and pending bits.
const DOORBELLS: u64 = 0x1000;
const MSIX_TABLE: u64 = 0x2000;
const MSIX_PENDING: u64 = 0x3000;
const BAR_SIZE: u64 = 0x4000;

/// The identity that other virtual machine monitors' controllers have.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0010,
    revision: 1,
    // Mass storage, NVM, NVM Express.
    class: 0x01_0802,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

// Registers (§3.1).
const REG_CAP: u64 = 0x00;
const REG_VS: u64 = 0x08;
const REG_INTMS: u64 = 0x0c;
const REG_INTMC: u64 = 0x10;
const REG_CC: u64 = 0x14;
const REG_CSTS: u64 = 0x1c;
const REG_AQA: u64 = 0x24;
const REG_ASQ: u64 = 0x28;
const REG_ACQ: u64 = 0x30;

/// CAP: entries − 1, contiguous queues required, 10 s to get ready, NVM command set, pages of 4 KiB.
const CAP: u64 = (MAX_ENTRIES as u64 - 1) | 1 << 16 | 20 << 24 | 1 << 37;
/// Version 1.4.
const VERSION: u32 = 0x0001_0400;

const CC_ENABLE: u32 = 1;
/// Command set, page size, arbitration: all zero here.
const CC_FIXED: u32 = 0x3ff0;
const CC_SHUTDOWN: u32 = 0b11 << 14;
/// Entry sizes, 2^n: 64 and 16 bytes.
const CC_ENTRIES: u32 = 0xff << 16;
const CC_ENTRIES_VALUE: u32 = 6 << 16 | 4 << 20;
const CC_WRITABLE: u32 = CC_ENABLE | CC_FIXED | CC_SHUTDOWN | CC_ENTRIES;

const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 1 << 1;
const CSTS_SHUTDOWN: u32 = 0b11 << 2;
const CSTS_SHUTDOWN_BUSY: u32 = 0b01 << 2;
const CSTS_SHUTDOWN_DONE: u32 = 0b10 << 2;

/// An asynchronous event (§5.2.1): error, with the information "write to an invalid doorbell" or "invalid doorbell value", and
/// the log page to read.
const EVENT_INVALID_DOORBELL: u32 = 0x01_0000;
const EVENT_INVALID_VALUE: u32 = 0x01_0100;

/// What the system has set up.
#[derive(Default)]
struct State {
    /// Counts resets.
    epoch: u64,
    cc: u32,
    csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    interrupt_mask: u32,
    submission: Vec<Option<SubmissionQueue>>,
    completion: Vec<Option<CompletionQueue>>,
    /// Identifiers of requests for asynchronous events.
    event_requests: Vec<u16>,
    /// An event that waits for a request.
    event: Option<u32>,
    features: admin::Features,
}

/// What registers and worker share.
struct Controller {
    state: Mutex<State>,
    bell: Arc<Bell>,
    signals: Arc<Signals>,
    dma: DeviceDma,
    storage: Arc<dyn Storage>,
    serial: String,
}

/// The registers in BAR 0.
struct NvmeRegisters {
    controller: Arc<Controller>,
    _worker: Worker,
}

/// An NVMe controller on `storage` that calls itself `serial` (20 characters count); `name` is its thread's.
///
/// # Errors
/// The host's, when it gives no thread.
pub fn endpoint(
    name: &str,
    storage: Arc<dyn Storage>,
    serial: &str,
    wiring: Wiring,
) -> std_io::Result<Endpoint> {
    let vectors = IO_QUEUES + 1;
    let signals = wiring.signals(vectors);
    let bell = Arc::new(Bell::default());
    let controller = Arc::new(Controller {
        state: Mutex::default(),
        bell: bell.clone(),
        signals: signals.clone(),
        dma: wiring.dma.clone(),
        storage,
        serial: serial.to_owned(),
    });
    controller.reset();
    let for_worker = controller.clone();
    let worker = Worker::start(name.to_owned(), bell, move || for_worker.work())?;
    let config = EndpointConfig {
        identity: IDENTITY,
        bars: vec![(0, Bar { size: BAR_SIZE, prefetchable: false, wide: true })],
        msix: Some(MsixLayout { bar: 0, table: MSIX_TABLE, pending: MSIX_PENDING, vectors }),
        msi: true,
        behind_port: wiring.behind_port,
        interrupt_line: wiring.interrupt_line(),
        vendor_capabilities: Vec::new(),
        window: false,
    };
    let registers = Box::new(NvmeRegisters { controller, _worker: worker });
    Ok(Endpoint::new(config, wiring.requester, signals, registers))
}

impl Registers for NvmeRegisters {
    fn read(&mut self, _bar: usize, offset: u64, size: u8) -> u32 {
        // Registers are read by doublewords (§3.1).
        if size != 4 || !offset.is_multiple_of(4) {
            return 0;
        }
        let state = lock(&self.controller.state);
        match offset {
            REG_CAP => CAP as u32,
            0x04 => (CAP >> 32) as u32,
            REG_VS => VERSION,
            REG_INTMS | REG_INTMC => state.interrupt_mask,
            REG_CC => state.cc,
            REG_CSTS => state.csts,
            REG_AQA => state.aqa,
            REG_ASQ => state.asq as u32,
            0x2c => (state.asq >> 32) as u32,
            REG_ACQ => state.acq as u32,
            0x34 => (state.acq >> 32) as u32,
            _ => 0,
        }
    }

    fn write(&mut self, _bar: usize, offset: u64, size: u8, value: u32) {
        if size != 4 || !offset.is_multiple_of(4) {
            return;
        }
        let c = &self.controller;
        if (DOORBELLS..MSIX_TABLE).contains(&offset) {
            c.doorbell((offset - DOORBELLS) / 4, value);
            return;
        }
        let mut state = lock(&c.state);
        let s = &mut *state;
        match offset {
            REG_INTMS => s.interrupt_mask |= value,
            REG_INTMC => s.interrupt_mask &= !value,
            REG_CC => c.set_configuration(s, value & CC_WRITABLE),
            REG_AQA => s.aqa = value & 0x0fff_0fff,
            REG_ASQ => s.asq = low(s.asq, value & !0xfff),
            0x2c => s.asq = high(s.asq, value),
            REG_ACQ => s.acq = low(s.acq, value & !0xfff),
            0x34 => s.acq = high(s.acq, value),
            _ => {}
        }
        c.update_wire(s);
    }

    fn reset(&mut self) {
        self.controller.reset();
    }
}

fn low(old: u64, value: u32) -> u64 {
    old & !0xffff_ffff | u64::from(value)
}

fn high(old: u64, value: u32) -> u64 {
    old & 0xffff_ffff | u64::from(value) << 32
}

impl State {
    /// A controller reset (§7.3.2): queues and requests are gone; the admin queues' registers stay.
    fn controller_reset(&mut self) {
        self.epoch += 1;
        self.csts = 0;
        self.interrupt_mask = 0;
        let queues = usize::from(IO_QUEUES) + 1;
        self.submission = (0..queues).map(|_| None).collect();
        self.completion = (0..queues).map(|_| None).collect();
        self.event_requests.clear();
        self.event = None;
        self.features = admin::Features::default();
    }

    fn is_running(&self) -> bool {
        self.csts & (CSTS_READY | CSTS_FATAL) == CSTS_READY
    }
}

impl Controller {
    // ---- the registers' side ------------------------------------------------------------

    /// Everything as after power-up.
    fn reset(&self) {
        let mut s = lock(&self.state);
        s.controller_reset();
        (s.cc, s.aqa, s.asq, s.acq) = (0, 0, 0, 0);
        self.update_wire(&s);
    }

    /// A write to CC (§3.1.5).
    fn set_configuration(&self, s: &mut State, value: u32) {
        let old = std::mem::replace(&mut s.cc, value);
        match (old & CC_ENABLE, value & CC_ENABLE) {
            (0, 1..) => self.enable(s),
            (1.., 0) => s.controller_reset(),
            _ => {}
        }
        if value & CC_SHUTDOWN != 0 && old & CC_SHUTDOWN == 0 {
            s.csts = s.csts & !CSTS_SHUTDOWN | CSTS_SHUTDOWN_BUSY;
            self.bell.ring(SHUTDOWN_BIT);
        }
    }

    /// Gets ready, or fails for good if the system wants what there is not.
    fn enable(&self, s: &mut State) {
        s.controller_reset();
        let (submission, completion) = (s.aqa & 0xfff, s.aqa >> 16);
        let entries = s.cc & CC_ENTRIES;
        let fits = |size: u32| (1..MAX_ENTRIES).contains(&size);
        let valid = s.cc & CC_FIXED == 0
            && (entries == CC_ENTRIES_VALUE || entries == 0)
            && fits(submission)
            && fits(completion);
        if !valid {
            tracing::warn!("the guest enables an NVMe controller with a configuration that it does not have");
            s.csts = CSTS_FATAL;
            return;
        }
        s.submission[0] = Some(SubmissionQueue::new(BusAddress(s.asq), submission + 1, 0));
        s.completion[0] = Some(CompletionQueue::new(BusAddress(s.acq), completion + 1, Some(0)));
        s.csts = CSTS_READY;
    }

    /// A write to doorbell `index`: even ones are submission queues' tails, odd ones completion queues' heads (§3.1.16,
    /// §3.1.17).
    fn doorbell(&self, index: u64, value: u32) {
        let mut state = lock(&self.state);
        let s = &mut *state;
        if !s.is_running() {
            return;
        }
        let id = (index / 2) as usize;
        let accepted = if index.is_multiple_of(2) {
            s.submission.get_mut(id).and_then(Option::as_mut).map(|queue| {
                queue.set_tail(value)?;
                self.bell.ring(id as u32);
                Ok::<_, OutOfRange>(())
            })
        } else {
            s.completion.get_mut(id).and_then(Option::as_mut).map(|queue| {
                // Commands may have waited for room.
                if queue.set_head(value)? {
                    (0..=u32::from(IO_QUEUES)).for_each(|q| self.bell.ring(q));
                }
                Ok(())
            })
        };
        let event = match accepted {
            Some(Ok(())) => None,
            Some(Err(OutOfRange)) => Some(EVENT_INVALID_VALUE),
            None => Some(EVENT_INVALID_DOORBELL),
        };
        if event.is_some() {
            s.event = event;
            self.bell.ring(0);
        }
        self.update_wire(s);
    }

    /// The interrupt wire: asserted while a queue with interrupts has something and is not masked (§7.5.1).
    fn update_wire(&self, s: &State) {
        let mask = s.interrupt_mask;
        let wants =
            |q: &CompletionQueue| q.vector.is_some_and(|v| mask >> (v & 31) & 1 == 0) && !q.is_empty();
        self.signals.set_wire(s.completion.iter().flatten().any(wants));
    }

    // ---- the worker's side --------------------------------------------------------------

    fn work(&self) {
        while let Some(rung) = self.bell.wait() {
            for queue in (0..=IO_QUEUES).filter(|q| rung >> q & 1 != 0) {
                self.serve(queue);
            }
            if rung >> SHUTDOWN_BIT & 1 != 0 {
                self.shut_down();
            }
        }
    }

    /// Does commands of submission queue `id`.
    fn serve(&self, id: u16) {
        if id == 0 {
            self.send_event();
        }
        for _ in 0..BURST {
            let Some((epoch, command)) = self.fetch(id) else { return };
            let access = Access { controller: self, epoch };
            let result = if id == 0 { access.admin(&command) } else { access.io(&command) };
            let (status, result) = match result {
                Ok(Some(result)) => (Status::SUCCESS, result),
                // Completed later, if ever.
                Ok(None) => continue,
                Err(Failure::Status(status)) => (status, 0),
                Err(Failure::Gone) => return,
            };
            self.complete(epoch, id, command.id, status, result);
        }
        self.bell.ring(id.into());
    }

    /// The next command of queue `id`, if its completion will have room.
    fn fetch(&self, id: u16) -> Option<(u64, Command)> {
        let mut state = lock(&self.state);
        let s = &mut *state;
        if !s.is_running() || self.bell.is_stopped() {
            return None;
        }
        let queue = s.submission.get_mut(usize::from(id))?.as_mut()?;
        let completion = s.completion.get(usize::from(queue.completion))?.as_ref()?;
        if completion.is_full() {
            return None;
        }
        let at = queue.next()?;
        let mut bytes = [0; Command::SIZE];
        let read = self.dma.session().read(at, &mut bytes);
        if let Err(e) = read {
            self.fatal(s, &e);
            return None;
        }
        Some((s.epoch, Command::parse(&bytes)))
    }

    /// Posts the completion of command `command` of queue `id`.
    fn complete(&self, epoch: u64, id: u16, command: u16, status: Status, result: u32) {
        let mut state = lock(&self.state);
        let s = &mut *state;
        if s.epoch != epoch {
            return;
        }
        // A queue that was deleted meanwhile has no completions.
        let Some(queue) = s.submission.get(usize::from(id)).and_then(Option::as_ref) else { return };
        let (head, to) = (queue.head as u16, usize::from(queue.completion));
        let completion = Completion { result, head, queue: id, command, status };
        self.post(s, to, &completion);
    }

    /// Writes an entry of completion queue `to` and interrupts.
    fn post(&self, s: &mut State, to: usize, completion: &Completion) {
        let Some(queue) = s.completion.get_mut(to).and_then(Option::as_mut) else { return };
        let written = queue.post(&self.dma.session(), completion);
        let vector = queue.vector;
        match written {
            Ok(()) => {
                if let Some(vector) = vector {
                    self.signals.signal(vector);
                }
                self.update_wire(s);
            }
            Err(e) => self.fatal(s, &e),
        }
    }

    /// Tells the system of an event, if it asked and there is one (§5.2).
    fn send_event(&self) {
        let mut state = lock(&self.state);
        let s = &mut *state;
        let full = s.completion.first().and_then(Option::as_ref).is_none_or(CompletionQueue::is_full);
        if !s.is_running() || full || s.event_requests.is_empty() {
            return;
        }
        let Some(result) = s.event.take() else { return };
        let command = s.event_requests.remove(0);
        let head = s.submission.first().and_then(Option::as_ref).map_or(0, |q| q.head as u16);
        let completion = Completion { result, head, queue: 0, command, status: Status::SUCCESS };
        self.post(s, 0, &completion);
    }

    /// Queues can't be reached: nothing goes on before a reset (§3.1.6, CFS).
    fn fatal(&self, s: &mut State, why: &DmaFault) {
        tracing::warn!("an NVMe controller of the guest stops: {why}");
        s.csts |= CSTS_FATAL;
    }

    /// Shutdown processing (§7.6.2).
    fn shut_down(&self) {
        let epoch = lock(&self.state).epoch;
        if let Err(e) = self.storage.flush() {
            tracing::warn!("an NVMe disk of the guest can't be flushed at its shutdown: {e}");
        }
        let mut s = lock(&self.state);
        if s.epoch == epoch {
            s.csts = s.csts & !CSTS_SHUTDOWN | CSTS_SHUTDOWN_DONE;
        }
    }
}

/// The controller as a command sees it: only as long as it is not reset.
struct Access<'a> {
    controller: &'a Controller,
    epoch: u64,
}

impl Access<'_> {
    /// What the system has set up, if it still is that.
    fn state(&self) -> Result<MutexGuard<'_, State>, Failure> {
        let state = lock(&self.controller.state);
        let gone = state.epoch != self.epoch || self.controller.bell.is_stopped();
        if gone { Err(Failure::Gone) } else { Ok(state) }
    }

    /// Runs `f` with the guest's memory.
    fn with_memory<R>(&self, f: impl FnOnce(&DmaSession<'_>) -> Result<R, DmaFault>) -> Result<R, Failure> {
        let _state = self.state()?;
        f(&self.controller.dma.session()).map_err(|_| Status::DATA_TRANSFER_ERROR.into())
    }

    /// Copies `bytes` to where the command says.
    fn give(&self, command: &Command, bytes: &[u8]) -> Result<(), Failure> {
        let pieces = prp::pieces(self, command.prp, bytes.len() as u64)?;
        self.with_memory(|memory| {
            let mut rest = bytes;
            for (at, len) in pieces {
                let (piece, after) = rest.split_at(rest.len().min(len as usize));
                memory.write(at, piece)?;
                rest = after;
            }
            Ok(())
        })
    }

    /// Takes `len` bytes from where the command says.
    fn take(&self, command: &Command, len: u64) -> Result<Vec<u8>, Failure> {
        let pieces = prp::pieces(self, command.prp, len)?;
        self.with_memory(|memory| {
            let mut bytes = vec![0; len as usize];
            let mut rest = &mut bytes[..];
            for (at, len) in pieces {
                let (piece, after) = rest.split_at_mut((len as usize).min(rest.len()));
                memory.read(at, piece)?;
                rest = after;
            }
            Ok(bytes)
        })
    }
}

#[cfg(test)]
mod tests;
