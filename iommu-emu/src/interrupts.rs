//! Interrupt remapping (§5.1).

use memory::L1Gpa;
use x86_spec::pci::Bdf;

use crate::faults::Fault;
use crate::iommu::{Failure, Iommu};
use crate::memory_access::{IoMemory, read_entry};
use crate::spec::fault::FaultReason;
use crate::spec::interrupt::{compatibility, irte, request};
use crate::spec::reg::{gcmd, irta};
use crate::spec::table::is_interrupt_address;

/// A write to the range of interrupt addresses, as a device (MSI, MSI-X) or an I/O APIC makes it: for the latter,
/// address bits 19:4 are bits 63:48 of the redirection entry and address bit 2 its bit 11 (§5.1.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptRequest {
    /// FEEx_xxxxH.
    pub address: u64,
    /// The 4 bytes that are written.
    pub data: u32,
}

/// An interrupt message that the unit itself sends; it is not remapped. Bits 63:40 of the address are bits 31:8 of the
/// destination in extended interrupt mode (§5.1.6).
pub type Message = InterruptRequest;

/// An interrupt for local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Destination: of 32 bits if `extended`, else of 8.
    pub destination: u32,
    /// The local APICs are in x2APIC mode, and the destination is meant so.
    pub extended: bool,
    /// The destination is a logical one.
    pub logical: bool,
    /// Redirection hint: to one of the destinations, that of lowest priority.
    pub redirection_hint: bool,
    /// Delivery mode as SDM Vol. 3A §11.11.2 encodes it: 0 to 7.
    pub delivery_mode: u8,
    /// Vector.
    pub vector: u8,
    /// Level-triggered.
    pub level: bool,
}

impl Message {
    /// What the message means to local APICs if it is not remapped (SDM Vol. 3A §11.11): compatibility
    /// format, with a destination of 32 bits if `extended`.
    pub fn delivery(&self, extended: bool) -> Delivery {
        let low = (self.address >> compatibility::DESTINATION_SHIFT) as u32 & 0xff;
        let high = (self.address >> 32) as u32 & !0xff;
        Delivery {
            destination: if extended { high | low } else { low },
            extended,
            logical: self.address & compatibility::DM != 0,
            redirection_hint: self.address & compatibility::RH != 0,
            delivery_mode: (self.data >> compatibility::DELIVERY_SHIFT & 7) as u8,
            vector: self.data as u8,
            level: self.data & compatibility::LEVEL != 0,
        }
    }
}

/// What becomes of an interrupt request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remapped {
    /// It goes to local APICs.
    Deliver(Delivery),
    /// It was posted in memory, and this is the notification.
    Notify(Delivery),
    /// It was posted, and nobody needs to be told.
    Posted,
}

impl<M: IoMemory> Iommu<M> {
    /// What becomes of the interrupt request that `source` makes.
    ///
    /// # Errors
    /// The fault by which it is blocked, which has been recorded.
    pub fn remap(&mut self, source: Bdf, request: InterruptRequest) -> Result<Remapped, FaultReason> {
        if !self.remapping_enabled() || !is_interrupt_address(request.address) {
            return Ok(Remapped::Deliver(request.delivery(false)));
        }
        if request.address & request::FORMAT == 0 {
            return self.compatibility(source, request);
        }
        let index = interrupt_index(request);
        let result = match reserved_in_request(request) {
            true => Err(Failure::of(FaultReason::RequestReserved)),
            false => self.remap_entry(source, index),
        };
        result.map_err(|failure| {
            self.record(Fault::interrupt(source, index, failure.reason), failure.suppressed);
            failure.reason
        })
    }

    /// A compatibility format request: it passes if software allows that, and never in extended interrupt
    /// mode (§5.1.4).
    fn compatibility(&mut self, source: Bdf, request: InterruptRequest) -> Result<Remapped, FaultReason> {
        if self.regs.status & gcmd::CFI != 0 && !self.is_extended() {
            return Ok(Remapped::Deliver(request.delivery(false)));
        }
        let reason = FaultReason::CompatibilityBlocked;
        self.record(Fault::interrupt(source, 0, reason), false);
        Err(reason)
    }

    /// IRTA_REG.EIME as SIRTP made it current.
    pub(crate) fn is_extended(&self) -> bool {
        self.regs.interrupt_table & irta::EIME != 0
    }

    /// A remappable request for the entry at `index` (§5.1.4.1).
    fn remap_entry(&mut self, source: Bdf, index: u32) -> Result<Remapped, Failure> {
        let entries = 2u32 << (self.regs.interrupt_table & irta::S);
        let index = u16::try_from(index).ok().filter(|i| u32::from(*i) < entries);
        let index = index.ok_or(Failure::of(FaultReason::IndexTooHigh))?;
        let entry = self.interrupt_entry(index)?;
        let suppressed = entry[0] & irte::FPD != 0;
        let failed = |reason| Failure { reason, suppressed };
        self.check_entry(entry).map_err(failed)?;
        verify_source(entry[1], source).map_err(failed)?;
        if entry[0] & irte::IM != 0 {
            return self.post(entry).map_err(failed);
        }
        self.stats.remapped += 1;
        Ok(Remapped::Deliver(self.delivery(entry[0])))
    }

    /// The entry at `index`, from the interrupt entry cache or memory. What is not present or wrong is cached in
    /// caching mode only (§6.1).
    fn interrupt_entry(&mut self, index: u16) -> Result<[u64; 2], Failure> {
        if let Some(entry) = self.caches.interrupts.get(index) {
            return Ok(entry);
        }
        let at = L1Gpa(self.regs.interrupt_table & irta::ADDRESS).offset(u64::from(index) * irte::SIZE);
        let entry = read_entry(&self.memory, at).ok_or(Failure::of(FaultReason::EntryAccess))?;
        if self.config.caching_mode || self.check_entry(entry).is_ok() {
            self.caches.interrupts.insert(index, entry);
        }
        Ok(entry)
    }

    /// Whether an entry is present and well-formed (§9.10, §9.11).
    fn check_entry(&self, [low, high]: [u64; 2]) -> Result<(), FaultReason> {
        if low & irte::P == 0 {
            return Err(FaultReason::EntryNotPresent);
        }
        let posted = low & irte::IM != 0;
        let (reserved_low, reserved_high) = match (posted, self.is_extended()) {
            (true, _) => (irte::RESERVED_POSTED, irte::RESERVED_HIGH_POSTED),
            (false, true) => (irte::RESERVED, irte::RESERVED_HIGH),
            (false, false) => (irte::RESERVED | irte::RESERVED_XAPIC, irte::RESERVED_HIGH),
        };
        let is_wrong = low & reserved_low != 0
            || high & reserved_high != 0
            || high >> irte::SVT_SHIFT & 3 > irte::SVT_BUS
            || posted && !self.config.posted_interrupts;
        if is_wrong { Err(FaultReason::EntryReserved) } else { Ok(()) }
    }

    /// The interrupt that a remapped entry describes (§9.10).
    fn delivery(&self, low: u64) -> Delivery {
        let destination = (low >> irte::DST_SHIFT) as u32;
        Delivery {
            destination: self.apic_id(destination),
            extended: self.is_extended(),
            logical: low & irte::DM != 0,
            redirection_hint: low & irte::RH != 0,
            delivery_mode: (low >> irte::DLM_SHIFT & 7) as u8,
            vector: (low >> irte::V_SHIFT) as u8,
            level: low & irte::TM != 0,
        }
    }

    /// A destination field's APIC ID: all of it in extended interrupt mode, else bits 15:8.
    pub(crate) fn apic_id(&self, field: u32) -> u32 {
        if self.is_extended() { field } else { field >> 8 & 0xff }
    }
}

/// The index of a remappable request: its handle, and the sub-handle if it is valid (§5.1.3).
fn interrupt_index(request: InterruptRequest) -> u32 {
    let low = (request.address >> request::HANDLE_SHIFT) as u32 & 0x7fff;
    let high = if request.address & request::HANDLE_15 != 0 { 0x8000 } else { 0 };
    let sub_handle = if request.address & request::SHV != 0 { request.data & 0xffff } else { 0 };
    (high | low) + sub_handle
}

/// Whether a remappable request has bits that it may not have (§5.1.2.2).
fn reserved_in_request(request: InterruptRequest) -> bool {
    request.address & request::SHV != 0 && request.data & request::DATA_RESERVED != 0
}

/// Whether an entry may be used by `source` (§9.10: SVT, SQ, SID).
fn verify_source(high: u64, source: Bdf) -> Result<(), FaultReason> {
    let sid = (high & irte::SID) as u16;
    let is_right = match high >> irte::SVT_SHIFT & 3 {
        irte::SVT_NONE => true,
        irte::SVT_SOURCE => {
            let ignored = match high >> irte::SQ_SHIFT & 3 {
                0 => 0,
                1 => 0b100,
                2 => 0b110,
                _ => 0b111,
            };
            (sid ^ source.requester_id()) & !ignored == 0
        }
        _ => ((sid >> 8) as u8..=sid as u8).contains(&source.bus()),
    };
    if is_right { Ok(()) } else { Err(FaultReason::SourceDenied) }
}
