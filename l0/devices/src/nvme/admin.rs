//! Admin commands (NVM Express 1.4 §5): queues, Identify, features, logs, asynchronous events, Abort.
//!
//! Not supported: the optional ones. Logs are the mandatory three, and hold nothing that changes but the errors' number.

use memory::BusAddress;

use super::command::{Command, Failure, Status};
use super::io::{ALL_NAMESPACES, MAX_PAGES_LOG2, NAMESPACE};
use super::queue::{CompletionQueue, SubmissionQueue};
use super::{Access, IDENTITY, IO_QUEUES, MAX_ENTRIES, MAX_EVENT_REQUESTS, PAGE, VERSION};
use crate::disk::SECTOR;

const DELETE_SUBMISSION_QUEUE: u8 = 0x00;
const CREATE_SUBMISSION_QUEUE: u8 = 0x01;
const GET_LOG_PAGE: u8 = 0x02;
const DELETE_COMPLETION_QUEUE: u8 = 0x04;
const CREATE_COMPLETION_QUEUE: u8 = 0x05;
const IDENTIFY: u8 = 0x06;
const ABORT: u8 = 0x08;
const SET_FEATURES: u8 = 0x09;
const GET_FEATURES: u8 = 0x0a;
const ASYNC_EVENT_REQUEST: u8 = 0x0c;

/// Queue flags in doubleword 11: contiguous; interrupts enabled.
const CONTIGUOUS: u32 = 1;
const INTERRUPTS: u32 = 1 << 1;

/// Feature identifiers (§5.21.1).
const TEMPERATURE: u8 = 0x04;
const WRITE_CACHE: u8 = 0x06;
const NUMBER_OF_QUEUES: u8 = 0x07;
const VECTOR_CONFIGURATION: u8 = 0x09;

/// Temperatures in kelvin: now, warning, critical.
const COMPOSITE: u16 = 300;
const WARNING: u16 = 343;
const CRITICAL: u16 = 353;

/// Feature values by identifier, for those that are one doubleword.
#[derive(Clone, Debug)]
pub(super) struct Features([u32; 12]);

impl Default for Features {
    fn default() -> Self {
        let mut values = [0; 12];
        values[usize::from(TEMPERATURE)] = CRITICAL.into();
        values[usize::from(WRITE_CACHE)] = 1;
        values[usize::from(NUMBER_OF_QUEUES)] = (u32::from(IO_QUEUES) - 1) * 0x1_0001;
        Self(values)
    }
}

impl Features {
    /// Whether writes may be cached until they are flushed.
    pub(super) fn write_cache(&self) -> bool {
        self.0[usize::from(WRITE_CACHE)] & 1 != 0
    }

    /// The value of a feature; `None` for those that there are not. Those that there are: arbitration, power
    /// management, temperature threshold, error recovery, write cache, number of queues, interrupt coalescing and vector
    /// configuration, write atomicity, event configuration.
    fn get_mut(&mut self, id: u8) -> Option<&mut u32> {
        matches!(id, 1 | 2 | 4..=11).then(|| self.0.get_mut(usize::from(id)))?
    }
}

impl Access<'_> {
    /// Does a command; its result, unless it is completed later.
    pub(super) fn admin(&self, c: &Command) -> Result<Option<u32>, Failure> {
        if c.flags != 0 {
            return Err(Status::INVALID_FIELD.into());
        }
        match c.opcode {
            DELETE_SUBMISSION_QUEUE => self.delete_submission_queue(c),
            CREATE_SUBMISSION_QUEUE => self.create_submission_queue(c),
            GET_LOG_PAGE => self.get_log_page(c),
            DELETE_COMPLETION_QUEUE => self.delete_completion_queue(c),
            CREATE_COMPLETION_QUEUE => self.create_completion_queue(c),
            IDENTIFY => self.identify(c),
            // Commands are done in order: what is to be aborted is done, or unknown. Bit 0: not aborted (§5.1).
            ABORT => Ok(Some(1)),
            SET_FEATURES => self.set_features(c),
            GET_FEATURES => self.get_features(c),
            ASYNC_EVENT_REQUEST => self.async_event_request(c),
            _ => Err(Status::INVALID_OPCODE.into()),
        }
    }

    // ---- queues -------------------------------------------------------------------------

    /// Identifier and size (in entries) of the queue that a command creates.
    fn new_queue(c: &Command) -> Result<(usize, u32), Failure> {
        let (id, size) = (c.dw10() & 0xffff, (c.dw10() >> 16) + 1);
        if id == 0 || id > IO_QUEUES.into() {
            return Err(Status::INVALID_QUEUE_IDENTIFIER.into());
        }
        if !(2..=MAX_ENTRIES).contains(&size) {
            return Err(Status::INVALID_QUEUE_SIZE.into());
        }
        if c.dw11() & CONTIGUOUS == 0 {
            return Err(Status::INVALID_FIELD.into());
        }
        if !c.prp[0].is_multiple_of(PAGE) {
            return Err(Status::PRP_OFFSET_INVALID.into());
        }
        Ok((id as usize, size))
    }

    /// §5.3.
    fn create_completion_queue(&self, c: &Command) -> Result<Option<u32>, Failure> {
        let (id, size) = Self::new_queue(c)?;
        let vector = (c.dw11() >> 16) as u16;
        if vector > IO_QUEUES {
            return Err(Status::INVALID_VECTOR.into());
        }
        let vector = (c.dw11() & INTERRUPTS != 0).then_some(vector);
        let mut state = self.state()?;
        match state.completion.get_mut(id) {
            Some(slot @ None) => *slot = Some(CompletionQueue::new(BusAddress(c.prp[0]), size, vector)),
            _ => return Err(Status::INVALID_QUEUE_IDENTIFIER.into()),
        }
        Ok(Some(0))
    }

    /// §5.4.
    fn create_submission_queue(&self, c: &Command) -> Result<Option<u32>, Failure> {
        let (id, size) = Self::new_queue(c)?;
        let completion = (c.dw11() >> 16) as u16;
        let mut state = self.state()?;
        let exists = matches!(state.completion.get(usize::from(completion)), Some(Some(_)));
        if completion == 0 || !exists {
            return Err(Status::COMPLETION_QUEUE_INVALID.into());
        }
        match state.submission.get_mut(id) {
            Some(slot @ None) => *slot = Some(SubmissionQueue::new(BusAddress(c.prp[0]), size, completion)),
            _ => return Err(Status::INVALID_QUEUE_IDENTIFIER.into()),
        }
        Ok(Some(0))
    }

    /// §5.6. Its commands are done one at a time, on this thread: none is under way.
    fn delete_submission_queue(&self, c: &Command) -> Result<Option<u32>, Failure> {
        let id = (c.dw10() & 0xffff) as usize;
        let mut state = self.state()?;
        match state.submission.get_mut(id) {
            Some(slot @ Some(_)) if id != 0 => *slot = None,
            _ => return Err(Status::INVALID_QUEUE_IDENTIFIER.into()),
        }
        Ok(Some(0))
    }

    /// §5.5.
    fn delete_completion_queue(&self, c: &Command) -> Result<Option<u32>, Failure> {
        let id = (c.dw10() & 0xffff) as usize;
        let mut state = self.state()?;
        let used = state.submission.iter().flatten().any(|q| usize::from(q.completion) == id);
        match state.completion.get_mut(id) {
            Some(Some(_)) if id != 0 && used => return Err(Status::INVALID_DELETION.into()),
            Some(slot @ Some(_)) if id != 0 => *slot = None,
            _ => return Err(Status::INVALID_QUEUE_IDENTIFIER.into()),
        }
        self.controller.update_wire(&state);
        Ok(Some(0))
    }

    // ---- what there is ------------------------------------------------------------------

    /// §5.15.
    fn identify(&self, c: &Command) -> Result<Option<u32>, Failure> {
        const NAMESPACE_DATA: u8 = 0x00;
        const CONTROLLER: u8 = 0x01;
        const ACTIVE_NAMESPACES: u8 = 0x02;
        const IDENTIFIERS: u8 = 0x03;
        let page = match c.dw10() as u8 {
            NAMESPACE_DATA if c.namespace == ALL_NAMESPACES => self.identify_namespace(),
            NAMESPACE_DATA | IDENTIFIERS if c.namespace != NAMESPACE => {
                return Err(Status::INVALID_NAMESPACE.into());
            }
            NAMESPACE_DATA => self.identify_namespace(),
            CONTROLLER => self.identify_controller(),
            ACTIVE_NAMESPACES if c.namespace >= ALL_NAMESPACES - 1 => {
                return Err(Status::INVALID_NAMESPACE.into());
            }
            // Those above the one named.
            ACTIVE_NAMESPACES if c.namespace < NAMESPACE => Page::default().put(0, &NAMESPACE.to_le_bytes()),
            ACTIVE_NAMESPACES => Page::default(),
            // One identifier: type 1, 8 bytes, EUI-64.
            IDENTIFIERS => Page::default().put(0, &[1, 8]).put(4, &self.eui64()),
            _ => return Err(Status::INVALID_FIELD.into()),
        };
        self.give(c, &page.0)?;
        Ok(Some(0))
    }

    /// §5.15.2.1.
    fn identify_namespace(&self) -> Page {
        let storage = &self.controller.storage;
        let blocks = (storage.size() / SECTOR).to_le_bytes();
        // Size, capacity, utilization. NSATTR bit 0: write protected. LBA format 0: 2^9 bytes.
        Page::default()
            .put(0, &blocks)
            .put(8, &blocks)
            .put(16, &blocks)
            .put(99, &[storage.is_read_only().into()])
            .put(120, &self.eui64())
            .put(130, &[SECTOR.trailing_zeros() as u8])
    }

    /// §5.15.2.2.
    fn identify_controller(&self) -> Page {
        const MODEL: &str = "nestvmm NVMe disk";
        let serial = &self.controller.serial;
        let (vendor, subsystem_vendor) = (IDENTITY.vendor, IDENTITY.subsystem_vendor);
        // A name in the form that the specification has for controllers without one of their own (§7.9).
        let nqn =
            format!("nqn.2014-08.org.nvmexpress:{vendor:04x}{subsystem_vendor:04x}{serial:<20}{MODEL:<40}");
        Page::default()
            .put(0, &vendor.to_le_bytes())
            .put(2, &subsystem_vendor.to_le_bytes())
            .put_text(4, 20, serial)
            .put_text(24, 40, MODEL)
            .put_text(64, 8, "1")
            .put(77, &[MAX_PAGES_LOG2])
            .put(80, &VERSION.to_le_bytes())
            // An I/O controller.
            .put(111, &[1])
            // Aborts, events (both −1), firmware slots: one, read-only.
            .put(258, &[3, MAX_EVENT_REQUESTS as u8 - 1, 0b11])
            .put(266, &WARNING.to_le_bytes())
            .put(268, &CRITICAL.to_le_bytes())
            // Entry sizes: required and maximum.
            .put(512, &[0x66, 0x44])
            .put(516, &1u32.to_le_bytes())
            // Dataset Management, Write Zeroes.
            .put(520, &0b1100u16.to_le_bytes())
            // A volatile write cache; Flush of all namespaces is supported.
            .put(525, &[0b111])
            .put(768, nqn.trim_end().as_bytes())
    }

    /// A locally administered identifier made of the serial number (FNV-1a).
    fn eui64(&self) -> [u8; 8] {
        let hash = self
            .controller
            .serial
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let mut bytes = hash.to_be_bytes();
        bytes[0] = bytes[0] & !1 | 2;
        bytes
    }

    // ---- features, logs, events ---------------------------------------------------------

    /// §5.21. The number of queues is what it is, whatever is asked for.
    fn set_features(&self, c: &Command) -> Result<Option<u32>, Failure> {
        const SAVE: u32 = 1 << 31;
        if c.dw10() & SAVE != 0 {
            return Err(Status::NOT_SAVEABLE.into());
        }
        let id = c.dw10() as u8;
        let mut state = self.state()?;
        let value = state.features.get_mut(id).ok_or(Status::INVALID_FIELD)?;
        match id {
            NUMBER_OF_QUEUES if c.dw11() & 0xffff == 0xffff || c.dw11() >> 16 == 0xffff => {
                return Err(Status::INVALID_FIELD.into());
            }
            NUMBER_OF_QUEUES => return Ok(Some(*value)),
            // One vector's coalescing; there is none.
            VECTOR_CONFIGURATION if c.dw11() & 0xffff > IO_QUEUES.into() => {
                return Err(Status::INVALID_FIELD.into());
            }
            // Only power state 0.
            2 if c.dw11() & 0x1f != 0 => return Err(Status::INVALID_FIELD.into()),
            _ => *value = c.dw11(),
        }
        Ok(Some(0))
    }

    /// §5.14: the current, default or supported values.
    fn get_features(&self, c: &Command) -> Result<Option<u32>, Failure> {
        const CHANGEABLE: u32 = 1 << 2;
        let id = c.dw10() as u8;
        let mut state = self.state()?;
        let current = *state.features.get_mut(id).ok_or(Status::INVALID_FIELD)?;
        let default = Features::default().get_mut(id).copied().unwrap_or(0);
        Ok(Some(match c.dw10() >> 8 & 7 {
            0 => current,
            // Saved values are the defaults.
            1 | 2 => default,
            3 => CHANGEABLE,
            _ => return Err(Status::INVALID_FIELD.into()),
        }))
    }

    /// §5.14: error information, health, firmware slots.
    fn get_log_page(&self, c: &Command) -> Result<Option<u32>, Failure> {
        let dwords = u64::from(c.dw10() >> 16 | (c.dw11() & 0xffff) << 16) + 1;
        let offset = u64::from(c.dw12()) | u64::from(c.dwords[3]) << 32;
        let log = match c.dw10() as u8 {
            // No entry was ever written.
            0x01 => Page::default(),
            0x02 => Page::default().put(1, &COMPOSITE.to_le_bytes()).put(3, &[100, 10]),
            0x03 => Page::default().put(0, &[1]).put_text(8, 8, "1"),
            _ => return Err(Status::INVALID_LOG_PAGE.into()),
        };
        let (len, size) = (dwords * 4, log.0.len() as u64);
        if !offset.is_multiple_of(4) || offset >= size || len > size - offset {
            return Err(Status::INVALID_FIELD.into());
        }
        let bytes = log.0.get(offset as usize..(offset + len) as usize).unwrap_or_default();
        self.give(c, bytes)?;
        Ok(Some(0))
    }

    /// §5.2: kept until there is an event.
    fn async_event_request(&self, c: &Command) -> Result<Option<u32>, Failure> {
        let mut state = self.state()?;
        if state.event_requests.len() >= MAX_EVENT_REQUESTS {
            return Err(Status::EVENT_LIMIT.into());
        }
        state.event_requests.push(c.id);
        drop(state);
        self.controller.send_event();
        Ok(None)
    }
}

/// A data structure of 4 KiB.
struct Page(Box<[u8]>);

impl Default for Page {
    fn default() -> Self {
        Self(vec![0; PAGE as usize].into_boxed_slice())
    }
}

impl Page {
    fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        if let Some(to) = self.0.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(bytes);
        }
        self
    }

    /// Text in a field of `len` bytes, padded with spaces (§1.5).
    fn put_text(mut self, at: usize, len: usize, text: &str) -> Self {
        if let Some(to) = self.0.get_mut(at..at + len) {
            to.fill(b' ');
            to.iter_mut().zip(text.bytes()).for_each(|(to, from)| *to = from);
        }
        self
    }
}
