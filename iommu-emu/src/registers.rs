//! The register file (chapter 10): 32-bit registers, and 64-bit ones that can be accessed whole or in
//! halves. A 64-bit access is one of the low half and then one of the high half, which holds the command bits.

use crate::faults::Event;
use crate::iommu::{Config, Iommu};
use crate::memory_access::IoMemory;
use crate::spec::reg::{self, cap, ccmd, ecap, gcmd, ics, iotlb, iqa, irta, iva, queue_index, rtaddr};

/// Maximum guest address width in bits.
const MGAW: u64 = 48;
/// Largest address mask of an invalidation: 2^18 pages are 1 GiB.
pub(crate) const MAX_ADDRESS_MASK: u64 = 18;
/// Largest mask of an index-selective invalidation of interrupt entries: 2^15 of them.
pub(crate) const MAX_HANDLE_MASK: u64 = 15;

/// Registers without a home of their own.
#[derive(Debug, Default)]
pub(crate) struct Registers {
    /// CAP_REG.
    cap: u64,
    /// ECAP_REG.
    ecap: u64,
    /// GSTS_REG.
    pub status: u32,
    /// RTADDR_REG as written, and as SRTP made it current.
    rtaddr: u64,
    pub root: u64,
    /// IRTA_REG as written, and as SIRTP made it current.
    irta: u64,
    pub interrupt_table: u64,
    pub ccmd: u64,
    pub iotlb: u64,
    pub iva: u64,
    pub queue_address: u64,
    pub queue_head: u64,
    pub queue_tail: u64,
    /// IQERCD_REG.
    pub queue_error: u64,
    /// ICS_REG.
    pub completion: u32,
    /// The invalidation completion event.
    pub invalidation_event: Event,
    extended_interrupts: bool,
}

impl Registers {
    pub fn new(config: &Config) -> Self {
        Self {
            cap: cap_register(config),
            ecap: ecap_register(config),
            extended_interrupts: config.extended_interrupts,
            ..Self::default()
        }
    }
}

/// CAP_REG (§10.4.2): what is implemented here.
fn cap_register(config: &Config) -> u64 {
    let option = |on: bool, bit: u64| if on { bit } else { 0 };
    cap::ND_16_BITS
        | option(config.caching_mode, cap::CM)
        | cap::SAGAW_39
        | cap::SAGAW_48
        | (MGAW - 1) << cap::MGAW_SHIFT
        | cap::ZLR
        | (reg::FRCD / 16) << cap::FRO_SHIFT
        | cap::SLLPS_2M
        | cap::SLLPS_1G
        | cap::PSI
        | (reg::FRCD_COUNT as u64 - 1) << cap::NFR_SHIFT
        | MAX_ADDRESS_MASK << cap::MAMV_SHIFT
        | cap::DWD
        | cap::DRD
        | option(config.posted_interrupts, cap::PI)
}

/// ECAP_REG (§10.4.3).
fn ecap_register(config: &Config) -> u64 {
    let extended = if config.extended_interrupts { ecap::EIM } else { 0 };
    ecap::C
        | ecap::QI
        | ecap::IR
        | extended
        | ecap::PT
        | ecap::SC
        | (reg::IVA / 16) << ecap::IRO_SHIFT
        | MAX_HANDLE_MASK << ecap::MHMV_SHIFT
}

/// The half of `value` that is at `offset` if the register is at `register`.
fn half(value: u64, register: u64, offset: u64) -> u32 {
    if offset == register { value as u32 } else { (value >> 32) as u32 }
}

/// Replaces that half by `value`.
fn set_half(register_value: u64, register: u64, offset: u64, value: u32) -> u64 {
    if offset == register {
        register_value & !0xffff_ffff | u64::from(value)
    } else {
        register_value & 0xffff_ffff | u64::from(value) << 32
    }
}

/// The register and the 32-bit part of it that a fault recording register's offset means.
fn record_at(offset: u64) -> Option<(usize, usize)> {
    let offset = offset.checked_sub(reg::FRCD)?;
    let register = (offset / reg::FRCD_SIZE) as usize;
    (register < reg::FRCD_COUNT).then_some((register, (offset % reg::FRCD_SIZE / 4) as usize))
}

impl<M: IoMemory> Iommu<M> {
    /// Reads `size` (4 or 8) bytes at `offset` in the register window, zero-extended. Reserved offsets, other sizes
    /// and unaligned accesses read as 0.
    pub fn read(&self, offset: u64, size: u8) -> u64 {
        match size {
            4 if offset.is_multiple_of(4) => self.read_register(offset).into(),
            8 if offset.is_multiple_of(8) => {
                u64::from(self.read_register(offset)) | u64::from(self.read_register(offset + 4)) << 32
            }
            _ => 0,
        }
    }

    /// Writes the low `size` (4 or 8) bytes of `value`. What cannot be written stays. Commands that take time
    /// are carried out by [`Self::advance`].
    pub fn write(&mut self, offset: u64, size: u8, value: u64) {
        match size {
            4 if offset.is_multiple_of(4) => self.write_register(offset, value as u32),
            8 if offset.is_multiple_of(8) => {
                self.write_register(offset, value as u32);
                self.write_register(offset + 4, (value >> 32) as u32);
            }
            _ => {}
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let r = &self.regs;
        // The register that a 64-bit one's high half belongs to.
        let aligned = offset & !7;
        match (offset, aligned) {
            (reg::VER, _) => reg::ver::V1_0,
            (reg::GSTS, _) => r.status,
            (reg::FSTS, _) => self.faults.status(),
            (reg::FECTL, _) => self.faults.event.control(),
            (reg::FEDATA, _) => self.faults.event.data,
            (reg::FEADDR, _) => self.faults.event.address,
            (reg::FEUADDR, _) => self.faults.event.upper_address,
            (reg::ICS, _) => r.completion,
            (reg::IECTL, _) => r.invalidation_event.control(),
            (reg::IEDATA, _) => r.invalidation_event.data,
            (reg::IEADDR, _) => r.invalidation_event.address,
            (reg::IEUADDR, _) => r.invalidation_event.upper_address,
            (_, reg::CAP) => half(r.cap, reg::CAP, offset),
            (_, reg::ECAP) => half(r.ecap, reg::ECAP, offset),
            (_, reg::RTADDR) => half(r.rtaddr, reg::RTADDR, offset),
            (_, reg::CCMD) => half(r.ccmd, reg::CCMD, offset),
            (_, reg::IQH) => half(r.queue_head, reg::IQH, offset),
            (_, reg::IQT) => half(r.queue_tail, reg::IQT, offset),
            (_, reg::IQA) => half(r.queue_address, reg::IQA, offset),
            (_, reg::IQERCD) => half(r.queue_error, reg::IQERCD, offset),
            (_, reg::IRTA) => half(r.irta, reg::IRTA, offset),
            (_, reg::IOTLB) => half(r.iotlb, reg::IOTLB, offset),
            // IVA_REG is write-only, GCMD_REG too; PMEN_REG is reserved.
            _ => record_at(offset).map_or(0, |(register, dword)| self.faults.read_record(register, dword)),
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let aligned = offset & !7;
        match (offset, aligned) {
            (reg::GCMD, _) => self.command(value),
            (reg::FSTS, _) => self.faults.clear_status(value),
            (reg::FECTL, _) => self.faults.event.set_control(value),
            (reg::FEDATA, _) => self.faults.event.data = value & self.data_bits(),
            (reg::FEADDR, _) => self.faults.event.address = value & !3,
            (reg::FEUADDR, _) => self.faults.event.upper_address = value & self.upper_bits(),
            (reg::ICS, _) => {
                self.regs.completion &= !(value & ics::IWC);
                if self.regs.completion == 0 {
                    self.regs.invalidation_event.serviced();
                }
            }
            (reg::IECTL, _) => self.regs.invalidation_event.set_control(value),
            (reg::IEDATA, _) => self.regs.invalidation_event.data = value & self.data_bits(),
            (reg::IEADDR, _) => self.regs.invalidation_event.address = value & !3,
            (reg::IEUADDR, _) => self.regs.invalidation_event.upper_address = value & self.upper_bits(),
            (_, reg::RTADDR) => {
                let wanted = set_half(self.regs.rtaddr, reg::RTADDR, offset, value);
                self.regs.rtaddr = wanted & (rtaddr::ADDRESS | rtaddr::TTM);
            }
            (_, reg::CCMD) => {
                let wanted = set_half(self.regs.ccmd, reg::CCMD, offset, value) & ccmd::WRITABLE;
                let actual = self.regs.ccmd & 3 << ccmd::CAIG_SHIFT;
                self.regs.ccmd = wanted | actual;
                self.start_context_command();
            }
            (_, reg::IVA) => {
                let wanted = set_half(self.regs.iva, reg::IVA, offset, value);
                self.regs.iva = wanted & (iva::ADDRESS | iva::IH | iva::AM);
            }
            (_, reg::IOTLB) => {
                let wanted = set_half(self.regs.iotlb, reg::IOTLB, offset, value) & iotlb::WRITABLE;
                let actual = self.regs.iotlb & 3 << iotlb::IAIG_SHIFT;
                self.regs.iotlb = wanted | actual;
                self.start_iotlb_command();
            }
            (_, reg::IQT) => {
                let wanted = set_half(self.regs.queue_tail, reg::IQT, offset, value);
                self.regs.queue_tail = wanted & queue_index::INDEX;
            }
            (_, reg::IQA) => {
                let wanted = set_half(self.regs.queue_address, reg::IQA, offset, value);
                self.regs.queue_address = wanted & (iqa::ADDRESS | iqa::QS);
            }
            (_, reg::IRTA) => {
                let wanted = set_half(self.regs.irta, reg::IRTA, offset, value);
                let extended = if self.regs.extended_interrupts { irta::EIME } else { 0 };
                self.regs.irta = wanted & (irta::ADDRESS | irta::S | extended);
            }
            _ => {
                if let Some((register, dword)) = record_at(offset) {
                    self.faults.write_record(register, dword, value);
                }
            }
        }
    }

    /// FEDATA_REG, IEDATA_REG: the upper half is there with extended interrupt mode only (§10.4.11).
    fn data_bits(&self) -> u32 {
        if self.regs.extended_interrupts { !0 } else { 0xffff }
    }

    /// FEUADDR_REG, IEUADDR_REG: there with extended interrupt mode only (§10.4.13).
    fn upper_bits(&self) -> u32 {
        if self.regs.extended_interrupts { !0 } else { 0 }
    }

    /// GCMD_REG (§10.4.4): enables stay as written, one-shot commands are carried out. Disabling the
    /// invalidation queue resets its head (§10.4.21).
    fn command(&mut self, value: u32) {
        const ENABLES: u32 = gcmd::TE | gcmd::QIE | gcmd::IRE | gcmd::CFI;
        if value & gcmd::SRTP != 0 {
            self.regs.root = self.regs.rtaddr;
            self.regs.status |= gcmd::SRTP;
        }
        if value & gcmd::SIRTP != 0 {
            self.regs.interrupt_table = self.regs.irta;
            self.regs.status |= gcmd::SIRTP;
        }
        // SFL and EAFL come with advanced fault logging, WBF with write buffers: they do nothing.
        self.regs.status = self.regs.status & !ENABLES | value & ENABLES;
        if value & gcmd::QIE == 0 {
            self.regs.queue_head = 0;
        }
    }
}
