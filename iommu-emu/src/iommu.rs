//! The unit as a whole: its configuration, and the way of one DMA through it.

use memory::{L1Gpa, MachineAddr};
use x86_spec::pci::Bdf;

use crate::cache::{Cached, Caches};
use crate::commands::Pending;
use crate::faults::{Fault, FaultLog};
use crate::interrupts::Message;
use crate::memory_access::IoMemory;
use crate::registers::Registers;
use crate::spec::fault::FaultReason;
use crate::spec::reg::gcmd;
use crate::spec::table::{INTERRUPT_RANGE, is_interrupt_address};
use crate::walk::{self, Context, Rights, TranslationType};

/// An I/O virtual address: what a device puts on the bus and the unit translates.
pub use memory::BusAddress as Iova;

/// What a unit is built with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Width of L1's physical addresses in bits (CPUID 8000_0008H, EAX\[7:0\]); more than 52 counts as 52. Bits
    /// from there on are reserved in table entries.
    pub host_address_width: u8,
    /// CAP_REG.CM: software has to invalidate after every change, and what was not present or wrong is cached
    /// as well (§6.1).
    pub caching_mode: bool,
    /// ECAP_REG.EIM: interrupts to 32-bit APIC IDs.
    pub extended_interrupts: bool,
    /// CAP_REG.PI: posted interrupts.
    pub posted_interrupts: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            host_address_width: 46,
            caching_mode: false,
            extended_interrupts: true,
            posted_interrupts: true,
        }
    }
}

impl Config {
    /// The address bits that are reserved in every entry.
    pub(crate) fn reserved_address(&self) -> u64 {
        !0 << self.width()
    }

    /// The host address width, within what entries can hold.
    pub(crate) fn width(&self) -> u8 {
        self.host_address_width.clamp(12, 52)
    }
}

/// What a device does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// It reads no bytes, to flush its writes: allowed in a write-only page (CAP_REG.ZLR).
    ZeroLengthRead,
}

impl Access {
    /// Whether `rights` allow it.
    pub(crate) fn allowed_by(self, rights: Rights) -> bool {
        match self {
            Self::Read => rights.read,
            Self::Write => rights.write,
            Self::ZeroLengthRead => rights.read || rights.write,
        }
    }

    /// The fault if they do not.
    pub(crate) fn denied(self) -> FaultReason {
        match self {
            Self::Write => FaultReason::WriteDenied,
            Self::Read | Self::ZeroLengthRead => FaultReason::ReadDenied,
        }
    }
}

/// The AT field of a request (PCI Express: address translation services).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressType {
    /// As devices without a translation cache send it.
    Untranslated,
    /// A device asks for a translation.
    TranslationRequest,
    /// A device says that it has translated.
    Translated,
}

impl AddressType {
    /// The encoding, as fault records have it.
    pub(crate) fn bits(self) -> u64 {
        match self {
            Self::Untranslated => 0,
            Self::TranslationRequest => 1,
            Self::Translated => 2,
        }
    }
}

/// Where an access leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The address in L1's physical address space.
    pub gpa: L1Gpa,
    /// The machine memory there, if the whole page is RAM and contiguous; else L1's address has to be looked up.
    pub machine: Option<MachineAddr>,
    /// How many bytes from there on are in the same mapping, at least 1.
    pub len: u64,
    /// What the mapping allows.
    pub rights: Rights,
}

/// Why an access does not get to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Blocked {
    /// A fault, which has been recorded if it is to be.
    #[error("DMA fault: {0}")]
    Fault(FaultReason),
    /// The address is in the range of interrupt requests, which is not translated (§3.14): a write of 4 bytes is
    /// a matter for [`Iommu::remap`], anything else is dropped.
    #[error("an address of interrupt requests")]
    InterruptRequest,
}

/// What [`Iommu::advance`] has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Progress {
    /// There is nothing to do.
    Idle,
    /// There is more: call again.
    More,
    /// Translations were taken back. When all accesses by translations from before have ended, call
    /// [`Iommu::drained`] with this number and then [`Iommu::advance`] again. The unit must not be kept locked
    /// meanwhile: those accesses may need it.
    Drain(u64),
}

/// How often what happened, since reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Translations that the IOTLB had.
    pub iotlb_hits: u64,
    /// Walks through second-level tables.
    pub walks: u64,
    /// Interrupts that were remapped.
    pub remapped: u64,
    /// Interrupts that were posted.
    pub posted: u64,
    /// Requests that were blocked.
    pub faults: u64,
    /// Invalidation descriptors that were executed.
    pub descriptors: u64,
}

/// A remapping unit. Its owner serialises access to it, and sends what [`Iommu::take_events`] gives after
/// every call.
#[derive(Debug)]
pub struct Iommu<M> {
    pub(crate) config: Config,
    pub(crate) memory: M,
    pub(crate) regs: Registers,
    pub(crate) faults: FaultLog,
    pub(crate) caches: Caches,
    pub(crate) pending: Pending,
    pub(crate) stats: Stats,
}

impl<M: IoMemory> Iommu<M> {
    /// A unit after reset in front of `memory`.
    pub fn new(config: Config, memory: M) -> Self {
        Self {
            config,
            memory,
            regs: Registers::new(&config),
            faults: FaultLog::default(),
            caches: Caches::default(),
            pending: Pending::default(),
            stats: Stats::default(),
        }
    }

    /// Resets it: nothing is translated, remapped or cached.
    pub fn reset(&mut self) {
        self.regs = Registers::new(&self.config);
        self.faults = FaultLog::default();
        self.caches = Caches::default();
        self.pending = Pending::default();
        self.stats = Stats::default();
    }

    /// How often what happened.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// L1's memory is elsewhere in machine memory from now on: forgets what the caches know of machine addresses.
    pub fn memory_moved(&mut self) {
        self.caches.iotlb.clear();
    }

    /// Whether DMA is translated (GSTS_REG.TES).
    pub fn translation_enabled(&self) -> bool {
        self.regs.status & gcmd::TE != 0
    }

    /// Whether interrupts are remapped (GSTS_REG.IRES).
    pub fn remapping_enabled(&self) -> bool {
        self.regs.status & gcmd::IRE != 0
    }

    /// Translates an untranslated request of `source`: where `iova` leads for `access`.
    ///
    /// # Errors
    /// [`Blocked`]; the fault has been recorded.
    pub fn translate(&mut self, source: Bdf, iova: Iova, access: Access) -> Result<Translation, Blocked> {
        self.translate_request(source, iova, access, AddressType::Untranslated)
    }

    /// As [`Self::translate`], for a request with any AT field.
    ///
    /// # Errors
    /// [`Blocked`]; the fault has been recorded.
    pub fn translate_request(
        &mut self,
        source: Bdf,
        iova: Iova,
        access: Access,
        address_type: AddressType,
    ) -> Result<Translation, Blocked> {
        if is_interrupt_address(iova.0) && address_type == AddressType::Untranslated {
            return Err(Blocked::InterruptRequest);
        }
        let result = match self.translation_enabled() {
            true => self.translated(source, iova, access, address_type),
            false => Ok(self.identity(iova)),
        };
        match result {
            Ok(to) => Ok(Translation { len: to.len.min(bytes_below_interrupt_range(iova)), ..to }),
            Err(failure) => {
                let read = access != Access::Write;
                let fault = Fault::dma(source, iova, read, address_type, failure.reason);
                self.record(fault, failure.suppressed);
                Err(Blocked::Fault(failure.reason))
            }
        }
    }

    fn translated(
        &mut self,
        source: Bdf,
        iova: Iova,
        access: Access,
        address_type: AddressType,
    ) -> Result<Translation, Failure> {
        let context = self.context(source)?;
        let failed = |reason| Failure { reason, suppressed: context.fault_processing_disabled };
        if address_type != AddressType::Untranslated {
            return Err(failed(FaultReason::TranslatedBlocked));
        }
        if iova.0 >> context.width.bits() != 0 {
            return Err(failed(FaultReason::AddressTooHigh));
        }
        if context.translation == TranslationType::PassThrough {
            return Ok(self.identity(iova));
        }
        self.second_level(&context, iova, access).map_err(failed)
    }

    /// The context entry of `source`, from the cache or memory.
    fn context(&mut self, source: Bdf) -> Result<Context, Failure> {
        if let Some(cached) = self.caches.contexts.get(source) {
            return cached;
        }
        let result = walk::context(&self.memory, &self.config, self.regs.root, source);
        if result.is_ok() || self.config.caching_mode {
            self.caches.contexts.insert(source, result);
        }
        result
    }

    /// The translation by the domain's tables, from the IOTLB or memory. A page in the IOTLB that does not allow the
    /// access is looked up again, as tables may allow more by now.
    fn second_level(
        &mut self,
        context: &Context,
        iova: Iova,
        access: Access,
    ) -> Result<Translation, FaultReason> {
        if let Some(cached) = self.caches.iotlb.get(context.domain, iova) {
            let result = cached.translation(iova, access);
            if result.is_ok() || !cached.is_page() {
                self.stats.iotlb_hits += 1;
                return result;
            }
        }
        self.stats.walks += 1;
        let walked = walk::second_level(&self.memory, &self.config, context, iova);
        let cached = Cached::compose(walked, iova, &self.memory);
        if cached.is_page() || self.config.caching_mode {
            self.caches.iotlb.insert(context.domain, cached);
        }
        cached.translation(iova, access)
    }

    /// An access that is not translated.
    fn identity(&self, iova: Iova) -> Translation {
        let gpa = L1Gpa(iova.0);
        let rights = Rights { read: true, write: true };
        match self.memory.region(gpa) {
            Some(r) => {
                let offset = gpa.0.wrapping_sub(r.start.0);
                let len = r.len.saturating_sub(offset).max(1);
                Translation { gpa, machine: Some(r.machine.offset(offset)), len, rights }
            }
            None => Translation { gpa, machine: None, len: 1, rights },
        }
    }

    /// The interrupts that the unit itself wants sent since the last call: fault event and invalidation
    /// completion event. They are not remapped; [`Message::delivery`] with [`Self::extended_events`] says what they
    /// mean.
    ///
    /// [`Message::delivery`]: crate::Message::delivery
    pub fn take_events(&mut self) -> impl Iterator<Item = Message> + use<M> {
        [self.faults.event.take(), self.regs.invalidation_event.take()].into_iter().flatten()
    }

    /// Whether the unit's own interrupts have destinations of 32 bits: in extended interrupt mode.
    pub fn extended_events(&self) -> bool {
        self.is_extended()
    }

    /// Records `fault` unless its entry disables that.
    pub(crate) fn record(&mut self, fault: Fault, suppressed: bool) {
        self.stats.faults += 1;
        if !(suppressed && fault.reason.is_qualified()) {
            self.faults.record(fault);
        }
    }
}

/// How far an access at `iova` goes before it would be an interrupt request.
fn bytes_below_interrupt_range(iova: Iova) -> u64 {
    INTERRUPT_RANGE.checked_sub(iova.0).filter(|n| *n != 0).unwrap_or(u64::MAX)
}

/// A fault before it is known of which request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub reason: FaultReason,
    /// FPD of the entry that it comes from.
    pub suppressed: bool,
}

impl Failure {
    /// A fault of a structure without FPD.
    pub fn of(reason: FaultReason) -> Self {
        Self { reason, suppressed: false }
    }
}
