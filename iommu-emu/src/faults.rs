//! Primary fault logging and the fault event (§7.3.1, §7.4, §10.4.9–§10.4.14).

use x86_spec::pci::Bdf;

use crate::interrupts::Message;
use crate::iommu::{AddressType, Iova};
use crate::spec::fault::FaultReason;
use crate::spec::reg::{FRCD_COUNT, event_control, frcd, fsts};

/// A request that was blocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Whose request.
    pub source: Bdf,
    /// Why it was blocked.
    pub reason: FaultReason,
    /// FRCD_REG.FI as the low half of the record has it: the page, or the interrupt index in bits 63:48.
    info: u64,
    read: bool,
    address_type: AddressType,
}

impl Fault {
    /// A DMA at `iova`.
    pub(crate) fn dma(
        source: Bdf,
        iova: Iova,
        read: bool,
        address_type: AddressType,
        reason: FaultReason,
    ) -> Self {
        Self { source, reason, info: iova.page_base().0, read, address_type }
    }

    /// An interrupt request for the entry at `index`.
    pub(crate) fn interrupt(source: Bdf, index: u32, reason: FaultReason) -> Self {
        let info = u64::from(index) << frcd::INDEX_SHIFT;
        Self { source, reason, info, read: false, address_type: AddressType::Untranslated }
    }

    /// The record, F set (§10.4.14).
    fn record(&self) -> [u64; 2] {
        let read = if self.read { frcd::T_READ } else { 0 };
        let reason = u64::from(self.reason.code()) << frcd::FR_SHIFT;
        let address_type = self.address_type.bits() << frcd::AT_SHIFT;
        [self.info, frcd::F | read | address_type | reason | u64::from(self.source.requester_id())]
    }
}

/// An interrupt that the unit itself sends: control, data and address registers, and whether one is due.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    masked: bool,
    pending: bool,
    due: bool,
    pub data: u32,
    pub address: u32,
    pub upper_address: u32,
}

impl Default for Event {
    /// After reset: masked (§10.4.10, §10.4.25).
    fn default() -> Self {
        Self { masked: true, pending: false, due: false, data: 0, address: 0, upper_address: 0 }
    }
}

impl Event {
    /// FECTL_REG or IECTL_REG.
    pub fn control(&self) -> u32 {
        let bit = |set: bool, bit: u32| if set { bit } else { 0 };
        bit(self.masked, event_control::IM) | bit(self.pending, event_control::IP)
    }

    /// A write of it: what was pending is sent when the mask is cleared.
    pub fn set_control(&mut self, value: u32) {
        self.masked = value & event_control::IM != 0;
        if !self.masked && self.pending {
            self.send();
        }
    }

    /// The interrupt condition arose.
    pub fn raise(&mut self) {
        if self.masked {
            self.pending = true;
        } else {
            self.send();
        }
    }

    /// Software dealt with what the interrupt is for.
    pub fn serviced(&mut self) {
        self.pending = false;
    }

    fn send(&mut self) {
        self.pending = false;
        self.due = true;
    }

    /// The message, if one is due.
    pub fn take(&mut self) -> Option<Message> {
        std::mem::take(&mut self.due).then(|| Message {
            address: u64::from(self.upper_address) << 32 | u64::from(self.address),
            data: self.data,
        })
    }
}

/// The fault recording registers, FSTS_REG and the fault event.
#[derive(Debug, Default)]
pub(crate) struct FaultLog {
    records: [[u64; 2]; FRCD_COUNT],
    /// The register that the next fault goes to.
    next: usize,
    /// The first that is pending, valid while one is.
    first: usize,
    /// PFO and IQE. ICE and ITE come from device TLBs.
    sticky: u32,
    pub event: Event,
}

impl FaultLog {
    /// Records `fault` in the next register; if that still has one, the fault is lost, and so are all until
    /// software has cleared the overflow (§7.3.1).
    pub fn record(&mut self, fault: Fault) {
        if self.sticky & fsts::PFO != 0 {
            return;
        }
        let before = self.status();
        let next = self.next;
        let Some(record) = self.records.get_mut(next) else { return };
        if record[1] & frcd::F != 0 {
            self.sticky |= fsts::PFO;
            return;
        }
        *record = fault.record();
        self.next = (next + 1) % FRCD_COUNT;
        if before & fsts::PPF == 0 {
            self.first = next;
            self.condition(before);
        }
    }

    /// The invalidation queue met an error.
    pub fn queue_error(&mut self) {
        let before = self.status();
        self.sticky |= fsts::IQE;
        self.condition(before);
    }

    /// Whether the invalidation queue has stopped at an error.
    pub fn is_queue_stopped(&self) -> bool {
        self.sticky & fsts::IQE != 0
    }

    /// A status bit was set: that is an interrupt condition if none was before (§10.4.10).
    fn condition(&mut self, before: u32) {
        if before & (fsts::PFO | fsts::PPF | fsts::IQE) == 0 {
            self.event.raise();
        }
    }

    /// FSTS_REG.
    pub fn status(&self) -> u32 {
        let pending = self.records.iter().any(|r| r[1] & frcd::F != 0);
        let index = if pending { (self.first as u32) << fsts::FRI_SHIFT } else { 0 };
        self.sticky | index | if pending { fsts::PPF } else { 0 }
    }

    /// A write of FSTS_REG: clears what is written as 1.
    pub fn clear_status(&mut self, value: u32) {
        self.sticky &= !(value & (fsts::PFO | fsts::IQE));
        self.update_pending();
    }

    /// The interrupt is no longer pending when no status bit is left (§10.4.10).
    fn update_pending(&mut self) {
        if self.status() & (fsts::PFO | fsts::PPF | fsts::IQE) == 0 {
            self.event.serviced();
        }
    }

    /// 32 bits of a fault recording register, `dword` (0–3) from its start.
    pub fn read_record(&self, register: usize, dword: usize) -> u32 {
        let half = self.records.get(register).and_then(|r| r.get(dword / 2)).copied().unwrap_or(0);
        (half >> (dword % 2 * 32)) as u32
    }

    /// A write of them: F is cleared by writing 1, nothing else can be written.
    pub fn write_record(&mut self, register: usize, dword: usize, value: u32) {
        const F: u32 = (frcd::F >> 32) as u32;
        if dword == 3
            && value & F != 0
            && let Some(record) = self.records.get_mut(register)
        {
            record[1] &= !frcd::F;
            self.first_pending_after(register);
            self.update_pending();
        }
    }

    /// The first pending fault was cleared: the next in the order of recording takes its place.
    fn first_pending_after(&mut self, cleared: usize) {
        if cleared != self.first {
            return;
        }
        let in_order = (0..FRCD_COUNT).map(|i| (cleared + i) % FRCD_COUNT);
        let pending = |i: &usize| self.records.get(*i).is_some_and(|r| r[1] & frcd::F != 0);
        if let Some(first) = in_order.into_iter().find(pending) {
            self.first = first;
        }
    }
}
