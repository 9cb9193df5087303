//! The local APIC of one vCPU (Intel SDM Vol. 3A ch. 11): xAPIC registers in memory, x2APIC
//! registers as MSRs, IA32_APIC_BASE, IA32_TSC_DEADLINE, the timer and the local
//! vector table.
//!
//! A register write yields an [`ApicAction`] instead of calling other controllers, so that
//! nobody is called while this APIC's lock is held.
//!
//! Not supported: SMI (there is no SMM, such messages are dropped), focus-processor
//! checking, changing the xAPIC ID (read-only, as SDM §11.4.6 allows), extended LVT of AMD,
//! lowest-priority arbitration through APR and RRD (reserved here, as on newer processors),
//! user IPIs and posted interrupts.

use std::sync::Arc;

use crate::clock::{Clock, NS_PER_SEC, TscSource, mul_div, mul_div_up};
use crate::message::{DeliveryMode, Destination, InterruptMessage};

/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// First x2APIC MSR.
pub const MSR_X2APIC_FIRST: u32 = 0x800;
/// Last x2APIC MSR.
pub const MSR_X2APIC_LAST: u32 = 0x8ff;
/// Where the xAPIC page is after reset.
pub const DEFAULT_APIC_BASE: u64 = 0xfee0_0000;

/// IA32_APIC_BASE.BSP.
const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE.EXTD: x2APIC mode.
const BASE_EXTD: u64 = 1 << 10;
/// IA32_APIC_BASE.EN: APIC global enable.
const BASE_EN: u64 = 1 << 11;
/// Bits 7:0 and 9 are reserved (SDM Vol. 3A Figure 11-5 and 11-26).
const BASE_RESERVED_LOW: u64 = 0x2ff;

// Register numbers: MMIO offset >> 4, MSR address - 0x800 (SDM Vol. 3A Table 11-1 and 11-6).
const REG_ID: u16 = 0x02;
const REG_VERSION: u16 = 0x03;
const REG_TPR: u16 = 0x08;
const REG_PPR: u16 = 0x0a;
const REG_EOI: u16 = 0x0b;
const REG_LDR: u16 = 0x0d;
const REG_DFR: u16 = 0x0e;
const REG_SVR: u16 = 0x0f;
const REG_ISR: u16 = 0x10;
const REG_TMR: u16 = 0x18;
const REG_IRR: u16 = 0x20;
const REG_ESR: u16 = 0x28;
const REG_LVT_CMCI: u16 = 0x2f;
const REG_ICR: u16 = 0x30;
const REG_ICR_HIGH: u16 = 0x31;
const REG_LVT_TIMER: u16 = 0x32;
const REG_LVT_THERMAL: u16 = 0x33;
const REG_LVT_PERF: u16 = 0x34;
const REG_LVT_LINT0: u16 = 0x35;
const REG_LVT_LINT1: u16 = 0x36;
const REG_LVT_ERROR: u16 = 0x37;
const REG_INITIAL_COUNT: u16 = 0x38;
const REG_CURRENT_COUNT: u16 = 0x39;
const REG_DIVIDE: u16 = 0x3e;
const REG_SELF_IPI: u16 = 0x3f;

/// Version 0x15, seven LVT entries (bits 23:16 hold the number less one), EOI-broadcast
/// suppression offered in bit 24 (SDM Vol. 3A §11.4.8).
const VERSION: u32 = 0x15 | 6 << 16 | 1 << 24;

const SVR_ENABLE: u32 = 1 << 8;
const SVR_SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;
const SVR_BITS: u32 = 0x13ff;

const LVT_VECTOR: u32 = 0xff;
const LVT_DELIVERY_STATUS: u32 = 1 << 12;
const LVT_REMOTE_IRR: u32 = 1 << 14;
const LVT_LEVEL: u32 = 1 << 15;
const LVT_MASKED: u32 = 1 << 16;
const LVT_TIMER_MODE: u32 = 3 << 17;

/// ESR: send illegal vector.
const ESR_SEND_ILLEGAL: u32 = 1 << 5;
/// ESR: receive illegal vector.
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
/// ESR: illegal register address.
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// ICR bits that software may set: vector, delivery mode, destination mode, delivery status
/// (ignored), level, trigger, shorthand.
const ICR_BITS: u64 = 0xc_dfff;
const ICR_DELIVERY_STATUS: u64 = 1 << 12;

/// A periodic timer is not expired more often than this, so that no guest can keep L0 busy
/// with nothing else.
const MIN_PERIOD_NS: u64 = 20_000;

/// An access that raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("general-protection fault")]
pub struct GpFault;

/// What a register access asks of the rest of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum ApicAction {
    /// Nothing.
    None,
    /// Tell the I/O APICs of an EOI for this vector.
    EoiBroadcast(u8),
    /// Deliver an interprocessor interrupt.
    Ipi(InterruptMessage),
}

/// How one local APIC is built.
#[derive(Clone, Copy, Debug)]
pub struct LapicConfig {
    /// Initial (x2)APIC ID.
    pub id: u32,
    /// Bootstrap processor.
    pub bsp: bool,
    /// Timer input clock in hertz before the divider: the core crystal clock that CPUID
    /// leaf 0x15 reports in ECX (SDM Vol. 3A §11.5.4).
    pub timer_hz: u64,
    /// Physical-address width (CPUID 0x8000_0008, `EAX[7:0]`); bits from there up are reserved in
    /// IA32_APIC_BASE.
    pub max_phys_bits: u8,
    /// CPUID.01H:ECX.x2APIC: whether x2APIC mode may be entered.
    pub x2apic: bool,
}

impl Default for LapicConfig {
    fn default() -> Self {
        Self { id: 0, bsp: true, timer_hz: NS_PER_SEC, max_phys_bits: 46, x2apic: true }
    }
}

/// The mode that IA32_APIC_BASE selects (SDM Vol. 3A Table 11-5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicMode {
    /// EN = 0, EXTD = 0.
    Disabled,
    /// EN = 1, EXTD = 0.
    XApic,
    /// EN = 1, EXTD = 1.
    X2Apic,
}

/// LVT timer modes (SDM Vol. 3A Table 11-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    /// 11b: never fires.
    Reserved,
}

/// The seven LVT entries, in the order of `LocalApic::lvt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lvt {
    Cmci,
    Timer,
    Thermal,
    Perf,
    Lint0,
    Lint1,
    Error,
}

impl Lvt {
    const COUNT: usize = 7;

    fn from_register(reg: u16) -> Option<Self> {
        Some(match reg {
            REG_LVT_CMCI => Self::Cmci,
            REG_LVT_TIMER => Self::Timer,
            REG_LVT_THERMAL => Self::Thermal,
            REG_LVT_PERF => Self::Perf,
            REG_LVT_LINT0 => Self::Lint0,
            REG_LVT_LINT1 => Self::Lint1,
            REG_LVT_ERROR => Self::Error,
            _ => return None,
        })
    }

    /// The bits that are not reserved (SDM Vol. 3A Figure 11-8).
    fn defined_bits(self) -> u32 {
        let common = LVT_VECTOR | LVT_DELIVERY_STATUS | LVT_MASKED;
        match self {
            Self::Timer => common | LVT_TIMER_MODE,
            Self::Error => common,
            Self::Cmci | Self::Thermal | Self::Perf => common | 0x700,
            Self::Lint0 | Self::Lint1 => common | 0x700 | 0xe000,
        }
    }
}

/// 256 vectors, one bit each, in the layout of the ISR, TMR and IRR registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct VectorSet([u32; 8]);

impl VectorSet {
    fn set(&mut self, vector: u8) {
        if let Some(word) = self.0.get_mut(usize::from(vector >> 5)) {
            *word |= 1 << (vector & 31);
        }
    }
    fn clear(&mut self, vector: u8) {
        if let Some(word) = self.0.get_mut(usize::from(vector >> 5)) {
            *word &= !(1 << (vector & 31));
        }
    }
    fn contains(&self, vector: u8) -> bool {
        self.word(u16::from(vector >> 5)) & 1 << (vector & 31) != 0
    }
    fn word(&self, index: u16) -> u32 {
        self.0.get(usize::from(index)).copied().unwrap_or(0)
    }
    fn highest(&self) -> Option<u8> {
        let (index, word) = self.0.iter().enumerate().rev().find(|(_, w)| **w != 0)?;
        u8::try_from(index as u32 * 32 + 31 - word.leading_zeros()).ok()
    }
}

/// The APIC timer's counters.
#[derive(Clone, Copy, Debug, Default)]
struct Timer {
    initial: u32,
    /// When the count was (as if) last loaded.
    start_ns: u64,
    /// When it expires next, `None` when stopped.
    deadline_ns: Option<u64>,
    /// IA32_TSC_DEADLINE; zero when disarmed.
    tsc_deadline: u64,
    divide: u32,
}

/// The local APIC of one vCPU.
pub struct LocalApic {
    config: LapicConfig,
    clock: Arc<dyn Clock>,
    tsc: Arc<dyn TscSource>,

    base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: VectorSet,
    tmr: VectorSet,
    irr: VectorSet,
    /// What a read of ESR gives.
    esr: u32,
    /// Errors since ESR was last written.
    esr_pending: u32,
    icr: u64,
    lvt: [u32; Lvt::COUNT],
    timer: Timer,

    lint: [bool; 2],
    /// An ExtINT message from the I/O APIC that no INTA cycle has answered.
    extint_message: bool,
    nmi: bool,
    init: bool,
    sipi: Option<u8>,
}

impl LocalApic {
    /// A local APIC in its power-up state: xAPIC mode, software-disabled.
    pub fn new(config: LapicConfig, clock: Arc<dyn Clock>, tsc: Arc<dyn TscSource>) -> Self {
        let mut apic = Self {
            config,
            clock,
            tsc,
            base: DEFAULT_APIC_BASE | BASE_EN | if config.bsp { BASE_BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: 0,
            svr: 0,
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            irr: VectorSet::default(),
            esr: 0,
            esr_pending: 0,
            icr: 0,
            lvt: [0; Lvt::COUNT],
            timer: Timer::default(),
            lint: [false; 2],
            extint_message: false,
            nmi: false,
            init: false,
            sipi: None,
        };
        apic.reset_registers();
        apic
    }

    /// The state of all registers after power-up or INIT (SDM Vol. 3A §11.4.7.1, §11.4.7.3). The
    /// ID and IA32_APIC_BASE stay.
    fn reset_registers(&mut self) {
        self.tpr = 0;
        self.dfr = u32::MAX;
        self.ldr = if self.mode() == ApicMode::X2Apic { self.x2apic_ldr() } else { 0 };
        self.svr = 0xff;
        self.isr = VectorSet::default();
        self.tmr = VectorSet::default();
        self.irr = VectorSet::default();
        self.esr = 0;
        self.esr_pending = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; Lvt::COUNT];
        self.timer = Timer::default();
        self.extint_message = false;
    }

    /// INIT: as power-up, but ID and IA32_APIC_BASE keep their values (SDM Vol. 3A §11.4.7.3).
    pub fn init_reset(&mut self) {
        self.reset_registers();
        self.nmi = false;
        self.sipi = None;
    }

    /// Power-up reset, IA32_APIC_BASE included.
    pub fn power_up_reset(&mut self) {
        self.base = DEFAULT_APIC_BASE | BASE_EN | if self.config.bsp { BASE_BSP } else { 0 };
        self.init_reset();
        self.init = false;
    }

    /// What PC firmware leaves on the bootstrap processor: software-enabled, LINT0 as ExtINT for
    /// the 8259 and LINT1 as NMI (virtual wire mode, MultiProcessor Specification 1.4 §3.6.2.2).
    pub fn enter_virtual_wire_mode(&mut self) {
        self.svr = SVR_ENABLE | 0xff;
        self.lvt[Lvt::Lint0 as usize] = LVT_LEVEL | 7 << 8;
        self.lvt[Lvt::Lint1 as usize] = 4 << 8;
    }

    /// The (x2)APIC ID.
    pub fn id(&self) -> u32 {
        self.config.id
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.base
    }

    /// The mode that IA32_APIC_BASE selects.
    pub fn mode(&self) -> ApicMode {
        match (self.base & BASE_EN != 0, self.base & BASE_EXTD != 0) {
            (false, _) => ApicMode::Disabled,
            (true, false) => ApicMode::XApic,
            (true, true) => ApicMode::X2Apic,
        }
    }

    /// The physical address of the 4-KiB register page, when registers are in memory (xAPIC mode).
    pub fn mmio_page(&self) -> Option<u64> {
        (self.mode() == ApicMode::XApic).then_some(self.base & self.base_address_bits())
    }

    fn base_address_bits(&self) -> u64 {
        let bits = u32::from(self.config.max_phys_bits).clamp(32, 52);
        ((1u64 << bits) - 1) & !0xfff
    }

    /// Writes IA32_APIC_BASE (SDM Vol. 3A §11.4.4, §11.12.1 and the transitions of §11.12.5).
    fn write_apic_base(&mut self, value: u64) -> Result<(), GpFault> {
        let defined = self.base_address_bits() | BASE_BSP | BASE_EXTD | BASE_EN;
        if value & (!defined | BASE_RESERVED_LOW) != 0 {
            return Err(GpFault);
        }
        let extended = value & BASE_EXTD != 0;
        let enabled = value & BASE_EN != 0;
        if extended && (!enabled || !self.config.x2apic) {
            return Err(GpFault);
        }
        let old = self.mode();
        match (old, enabled, extended) {
            // Only xAPIC mode leads to x2APIC mode, and only disabling leads out of it.
            (ApicMode::Disabled, true, true) | (ApicMode::X2Apic, true, false) => return Err(GpFault),
            _ => {}
        }
        self.base = value;
        match (old, self.mode()) {
            (ApicMode::XApic | ApicMode::X2Apic, ApicMode::Disabled) => self.reset_registers(),
            (ApicMode::XApic, ApicMode::X2Apic) => {
                self.ldr = self.x2apic_ldr();
                self.icr &= 0xffff_ffff;
            }
            _ => {}
        }
        Ok(())
    }

    /// LDR in x2APIC mode: derived from the ID (SDM Vol. 3A §11.12.10.2).
    fn x2apic_ldr(&self) -> u32 {
        (self.config.id >> 4) << 16 | 1 << (self.config.id & 0xf)
    }

    // ---- priorities and the CPU's side --------------------------------------------------

    /// Processor priority (SDM Vol. 3A §11.8.3.1).
    pub fn ppr(&self) -> u8 {
        let in_service = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    /// The task-priority register.
    pub fn tpr(&self) -> u8 {
        self.tpr
    }

    /// Sets the task-priority register.
    pub fn set_tpr(&mut self, tpr: u8) {
        self.tpr = tpr;
    }

    /// CR8: bits 7:4 of TPR (SDM Vol. 3A §11.8.6).
    pub fn cr8(&self) -> u8 {
        self.tpr >> 4
    }

    /// A write of CR8 sets `TPR[7:4]` and clears `TPR[3:0]`.
    pub fn set_cr8(&mut self, cr8: u8) {
        self.tpr = cr8 << 4;
    }

    /// The vector that the processor should take now: the highest in IRR if its class is above
    /// the processor priority (SDM Vol. 3A §11.8.3, §11.8.4).
    pub fn pending_vector(&self) -> Option<u8> {
        if self.mode() == ApicMode::Disabled {
            return None;
        }
        self.irr.highest().filter(|v| v >> 4 > self.ppr() >> 4)
    }

    /// Whether any vector is requested, deliverable now or held back by priority.
    pub fn has_request(&self) -> bool {
        self.mode() != ApicMode::Disabled && self.irr.highest().is_some()
    }

    /// The processor takes `vector`: from IRR to ISR.
    pub fn ack(&mut self, vector: u8) {
        self.irr.clear(vector);
        self.isr.set(vector);
    }

    /// Whether an 8259 interrupt is to be taken: INTR reaches the processor directly when
    /// the APIC is disabled, through a LINT pin in ExtINT mode, or by an ExtINT message.
    pub fn extint_pending(&self) -> bool {
        if self.mode() == ApicMode::Disabled {
            return self.lint[0];
        }
        let by_pin = |lvt: Lvt, level: bool| {
            let entry = self.lvt[lvt as usize];
            level && entry & LVT_MASKED == 0 && entry >> 8 & 7 == 7
        };
        self.extint_message || by_pin(Lvt::Lint0, self.lint[0]) || by_pin(Lvt::Lint1, self.lint[1])
    }

    /// The processor runs an INTA cycle for the 8259: forget an ExtINT message.
    pub fn accept_extint(&mut self) {
        self.extint_message = false;
    }

    /// Whether an NMI waits.
    pub fn nmi_pending(&self) -> bool {
        self.nmi
    }

    /// Takes the waiting NMI.
    pub fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }

    /// Whether an INIT or a start-up IPI waits.
    pub fn init_or_sipi_pending(&self) -> bool {
        self.init || self.sipi.is_some()
    }

    /// Takes a waiting INIT. The caller resets the vCPU and calls [`Self::init_reset`].
    pub fn take_init(&mut self) -> bool {
        std::mem::take(&mut self.init)
    }

    /// Takes a waiting start-up IPI: the page number to start at.
    pub fn take_sipi(&mut self) -> Option<u8> {
        self.sipi.take()
    }

    // ---- incoming interrupts ------------------------------------------------------------

    /// Whether a message for `destination` is for this APIC (SDM Vol. 3A §11.6.2).
    pub fn is_destination(&self, destination: Destination) -> bool {
        match destination {
            Destination::All => true,
            Destination::AllExcept(id) => id != self.config.id,
            Destination::Physical(id) => id == self.config.id,
            Destination::Logical(mda) => self.matches_logical(mda),
        }
    }

    fn matches_logical(&self, mda: u32) -> bool {
        match self.mode() {
            ApicMode::Disabled => false,
            ApicMode::X2Apic => mda >> 16 == self.ldr >> 16 && mda & self.ldr & 0xffff != 0,
            ApicMode::XApic => {
                let logical_id = self.ldr >> 24;
                match self.dfr >> 28 {
                    0xf => mda & logical_id != 0,
                    0x0 => mda >> 4 & 0xf == logical_id >> 4 && mda & logical_id & 0xf != 0,
                    _ => false,
                }
            }
        }
    }

    /// Accepts a message (the caller has checked [`Self::is_destination`]). Returns whether
    /// something for the processor came of it.
    pub fn accept(&mut self, message: &InterruptMessage) -> bool {
        if self.mode() == ApicMode::Disabled {
            return false;
        }
        match message.delivery {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                self.accept_fixed(message.vector, message.level)
            }
            DeliveryMode::Smi => false,
            DeliveryMode::Nmi => {
                self.nmi = true;
                true
            }
            DeliveryMode::Init => {
                self.init = true;
                self.sipi = None;
                true
            }
            DeliveryMode::StartUp => {
                self.sipi = Some(message.vector);
                true
            }
            DeliveryMode::ExtInt => {
                self.extint_message = true;
                true
            }
        }
    }

    /// Accepts a fixed interrupt into IRR and TMR. Rejected while software-disabled (SDM
    /// Vol. 3A §11.4.7.2); vectors below 16 are illegal (§11.5.2).
    fn accept_fixed(&mut self, vector: u8, level: bool) -> bool {
        if self.svr & SVR_ENABLE == 0 {
            return false;
        }
        if vector < 16 {
            self.record_error(ESR_RECEIVE_ILLEGAL);
            return false;
        }
        self.irr.set(vector);
        if level {
            self.tmr.set(vector)
        } else {
            self.tmr.clear(vector)
        }
        true
    }

    /// Raises `vector` from inside the machine, as a fixed interrupt.
    pub fn set_irq(&mut self, vector: u8, level: bool) -> bool {
        self.mode() != ApicMode::Disabled && self.accept_fixed(vector, level)
    }

    /// Records an error and raises the LVT error interrupt (SDM Vol. 3A §11.5.3). An illegal
    /// vector in that entry itself only sets the ESR bit.
    fn record_error(&mut self, error: u32) {
        self.esr_pending |= error;
        let entry = self.lvt[Lvt::Error as usize];
        let vector = (entry & LVT_VECTOR) as u8;
        if entry & LVT_MASKED == 0 && self.svr & SVR_ENABLE != 0 {
            if vector >= 16 {
                self.irr.set(vector);
                self.tmr.clear(vector);
            } else {
                self.esr_pending |= ESR_RECEIVE_ILLEGAL;
            }
        }
    }

    /// Delivers an LVT interrupt as its entry says. Returns whether the processor has something
    /// new to take.
    fn deliver_lvt(&mut self, lvt: Lvt) -> bool {
        let entry = self.lvt[lvt as usize];
        if entry & LVT_MASKED != 0 || self.mode() == ApicMode::Disabled {
            return false;
        }
        let vector = (entry & LVT_VECTOR) as u8;
        let mode = match lvt {
            Lvt::Timer | Lvt::Error => Some(DeliveryMode::Fixed),
            _ => DeliveryMode::from_bits(u64::from(entry >> 8)),
        };
        match mode {
            Some(DeliveryMode::Fixed) => {
                let level = entry & LVT_LEVEL != 0 && matches!(lvt, Lvt::Lint0 | Lvt::Lint1);
                let accepted = self.accept_fixed(vector, level);
                if accepted && level {
                    self.lvt[lvt as usize] |= LVT_REMOTE_IRR;
                }
                accepted
            }
            Some(DeliveryMode::Nmi) => {
                self.nmi = true;
                true
            }
            Some(DeliveryMode::Init) => {
                self.init = true;
                true
            }
            // ExtINT is a level that `extint_pending` reads; SMI has no SMM to go to.
            _ => false,
        }
    }

    /// A performance counter that overflowed asks for an interrupt: its entry says which, and gets
    /// masked (SDM Vol. 3A §11.5.1). Returns whether the processor has something new to take.
    pub fn performance_interrupt(&mut self) -> bool {
        let raised = self.deliver_lvt(Lvt::Perf);
        self.lvt[Lvt::Perf as usize] |= LVT_MASKED;
        raised
    }

    /// Drives a LINT pin (0 or 1). Returns whether the processor has something new to take.
    pub fn set_lint(&mut self, pin: u8, level: bool) -> bool {
        let (index, lvt) = if pin == 0 { (0, Lvt::Lint0) } else { (1, Lvt::Lint1) };
        let rising = level && !self.lint[index];
        self.lint[index] = level;
        if self.mode() == ApicMode::Disabled {
            // The pins are INTR and NMI of the processor (SDM Vol. 3A §11.4.3).
            if rising && index == 1 {
                self.nmi = true;
            }
            return rising;
        }
        let entry = self.lvt[lvt as usize];
        let is_fixed_level = entry >> 8 & 7 == 0 && entry & LVT_LEVEL != 0;
        if is_fixed_level {
            return level && entry & LVT_REMOTE_IRR == 0 && self.deliver_lvt(lvt);
        }
        rising && (self.deliver_lvt(lvt) || self.extint_pending())
    }

    /// After an EOI or an LVT write: a level-triggered LINT pin that is still asserted interrupts again.
    fn recheck_lint(&mut self, lvt: Lvt) {
        let level = match lvt {
            Lvt::Lint0 => self.lint[0],
            Lvt::Lint1 => self.lint[1],
            _ => return,
        };
        let entry = self.lvt[lvt as usize];
        if level && entry >> 8 & 7 == 0 && entry & LVT_LEVEL != 0 && entry & LVT_REMOTE_IRR == 0 {
            self.deliver_lvt(lvt);
        }
    }

    /// EOI (SDM Vol. 3A §11.8.5).
    pub(crate) fn eoi(&mut self) -> ApicAction {
        let Some(vector) = self.isr.highest() else {
            return ApicAction::None;
        };
        self.isr.clear(vector);
        for lvt in [Lvt::Lint0, Lvt::Lint1] {
            let entry = self.lvt[lvt as usize];
            if entry & LVT_REMOTE_IRR != 0 && (entry & LVT_VECTOR) as u8 == vector {
                self.lvt[lvt as usize] &= !LVT_REMOTE_IRR;
                self.recheck_lint(lvt);
            }
        }
        if self.tmr.contains(vector) && self.svr & SVR_SUPPRESS_EOI_BROADCAST == 0 {
            ApicAction::EoiBroadcast(vector)
        } else {
            ApicAction::None
        }
    }

    // ---- the timer ----------------------------------------------------------------------

    fn timer_mode(&self) -> TimerMode {
        match self.lvt[Lvt::Timer as usize] >> 17 & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            2 => TimerMode::TscDeadline,
            _ => TimerMode::Reserved,
        }
    }

    /// The divisor that the divide configuration register selects: bits 3, 1 and 0 (SDM Vol. 3A
    /// Figure 11-10).
    fn divisor(&self) -> u64 {
        let code = self.timer.divide & 3 | self.timer.divide >> 1 & 4;
        if code == 7 { 1 } else { 2 << code }
    }

    fn count_to_ns(&self, count: u64) -> u64 {
        mul_div_up(count.saturating_mul(self.divisor()), NS_PER_SEC, self.config.timer_hz)
    }

    fn ns_to_count(&self, ns: u64) -> u64 {
        mul_div(ns, self.config.timer_hz, NS_PER_SEC) / self.divisor()
    }

    fn current_count(&self, now: u64) -> u32 {
        if self.timer.deadline_ns.is_none() || !self.counts_down() {
            return 0;
        }
        let initial = u64::from(self.timer.initial);
        let elapsed = self.ns_to_count(now.saturating_sub(self.timer.start_ns));
        let left = match self.timer_mode() {
            TimerMode::Periodic => initial - elapsed % initial.max(1),
            _ => initial.saturating_sub(elapsed),
        };
        u32::try_from(left).unwrap_or(u32::MAX)
    }

    fn counts_down(&self) -> bool {
        matches!(self.timer_mode(), TimerMode::OneShot | TimerMode::Periodic)
    }

    /// A write of the initial count starts the timer; zero stops it (SDM Vol. 3A §11.5.4). In
    /// TSC-deadline mode the write is ignored (§11.5.4.1).
    fn write_initial_count(&mut self, count: u32) {
        if !self.counts_down() {
            return;
        }
        let now = self.clock.now_ns();
        self.timer.initial = count;
        self.timer.start_ns = now;
        self.timer.deadline_ns = (count != 0).then(|| now.saturating_add(self.count_to_ns(count.into())));
    }

    /// A new divisor takes effect on the count as it stands.
    fn write_divide(&mut self, value: u32) {
        let now = self.clock.now_ns();
        let left = u64::from(self.current_count(now));
        self.timer.divide = value & 0xb;
        if self.timer.deadline_ns.is_some() && self.counts_down() {
            let done = u64::from(self.timer.initial).saturating_sub(left);
            self.timer.start_ns = now.saturating_sub(self.count_to_ns(done));
            self.timer.deadline_ns = Some(now.saturating_add(self.count_to_ns(left)));
        }
    }

    /// Leaving or entering TSC-deadline mode disarms the timer (SDM Vol. 3A §11.5.4.1).
    fn timer_mode_changed(&mut self, old: TimerMode) {
        let new = self.timer_mode();
        let countdown = |m: TimerMode| matches!(m, TimerMode::OneShot | TimerMode::Periodic);
        if old != new && !(countdown(old) && countdown(new)) {
            self.timer =
                Timer { divide: self.timer.divide, start_ns: self.clock.now_ns(), ..Timer::default() };
        }
    }

    fn write_tsc_deadline(&mut self, value: u64) {
        if self.timer_mode() != TimerMode::TscDeadline {
            return;
        }
        self.timer.tsc_deadline = value;
        self.rearm_tsc_deadline();
        self.tick(self.clock.now_ns());
    }

    /// Works out when the TSC will reach the deadline.
    fn rearm_tsc_deadline(&mut self) {
        self.timer.deadline_ns = (self.timer.tsc_deadline != 0).then(|| {
            let left = self.timer.tsc_deadline.saturating_sub(self.tsc.guest_tsc());
            let ns = mul_div_up(left, NS_PER_SEC, self.tsc.frequency_hz());
            self.clock.now_ns().saturating_add(ns)
        });
    }

    /// The guest's TSC jumped (it wrote IA32_TIME_STAMP_COUNTER or IA32_TSC_ADJUST).
    pub fn tsc_changed(&mut self) {
        if self.timer_mode() == TimerMode::TscDeadline {
            self.rearm_tsc_deadline();
        }
    }

    /// When the timer wants [`Self::tick`] next, in clock nanoseconds.
    pub fn next_deadline(&self) -> Option<u64> {
        self.timer.deadline_ns
    }

    /// Expires the timer if its time has come. Returns whether the processor has something
    /// new to take.
    pub fn tick(&mut self, now: u64) -> bool {
        let Some(deadline) = self.timer.deadline_ns.filter(|d| *d <= now) else {
            return false;
        };
        match self.timer_mode() {
            TimerMode::TscDeadline => {
                // The clock and the TSC may drift apart; the TSC decides.
                if self.tsc.guest_tsc() < self.timer.tsc_deadline {
                    self.rearm_tsc_deadline();
                    return false;
                }
                self.timer.tsc_deadline = 0;
                self.timer.deadline_ns = None;
            }
            TimerMode::Periodic => {
                let period = self.count_to_ns(self.timer.initial.into()).max(1);
                let passed = (now - deadline) / period;
                self.timer.start_ns = deadline.saturating_add(passed.saturating_mul(period));
                let next = self.timer.start_ns.saturating_add(period);
                let floor = if period < MIN_PERIOD_NS { now.saturating_add(MIN_PERIOD_NS) } else { 0 };
                self.timer.deadline_ns = Some(next.max(floor));
            }
            TimerMode::OneShot | TimerMode::Reserved => self.timer.deadline_ns = None,
        }
        self.deliver_lvt(Lvt::Timer)
    }

    // ---- register access ----------------------------------------------------------------

    /// Reads a register that exists in both modes; `None` if it does not exist or can't be read.
    fn read_register(&self, reg: u16) -> Option<u32> {
        Some(match reg {
            REG_VERSION => VERSION,
            REG_TPR => self.tpr.into(),
            REG_PPR => self.ppr().into(),
            REG_LDR => self.ldr,
            REG_SVR => self.svr,
            REG_ISR..REG_TMR => self.isr.word(reg - REG_ISR),
            REG_TMR..REG_IRR => self.tmr.word(reg - REG_TMR),
            REG_IRR..REG_ESR => self.irr.word(reg - REG_IRR),
            REG_ESR => self.esr,
            REG_INITIAL_COUNT => self.timer.initial,
            REG_CURRENT_COUNT => self.current_count(self.clock.now_ns()),
            REG_DIVIDE => self.timer.divide,
            _ => return Lvt::from_register(reg).map(|lvt| self.lvt[lvt as usize]),
        })
    }

    /// Writes a register that has the same meaning in both modes.
    fn write_register(&mut self, reg: u16, value: u32) -> ApicAction {
        match reg {
            REG_TPR => self.tpr = value as u8,
            REG_EOI => return self.eoi(),
            REG_SVR => self.write_svr(value),
            REG_ESR => self.esr = std::mem::take(&mut self.esr_pending),
            REG_INITIAL_COUNT => self.write_initial_count(value),
            REG_DIVIDE => self.write_divide(value),
            _ => {
                if let Some(lvt) = Lvt::from_register(reg) {
                    self.write_lvt(lvt, value);
                }
            }
        }
        ApicAction::None
    }

    /// SVR: clearing the enable bit sets the mask of every LVT entry (SDM Vol. 3A §11.4.7.2).
    fn write_svr(&mut self, value: u32) {
        self.svr = value & SVR_BITS;
        if self.svr & SVR_ENABLE == 0 {
            self.lvt.iter_mut().for_each(|e| *e |= LVT_MASKED);
        }
    }

    /// An LVT entry: read-only bits stay, the mask can't be cleared while software-disabled.
    fn write_lvt(&mut self, lvt: Lvt, value: u32) {
        let read_only = LVT_DELIVERY_STATUS | LVT_REMOTE_IRR;
        let old_mode = self.timer_mode();
        let entry = &mut self.lvt[lvt as usize];
        *entry = value & lvt.defined_bits() & !read_only | *entry & read_only;
        if self.svr & SVR_ENABLE == 0 {
            *entry |= LVT_MASKED;
        }
        if *entry & LVT_LEVEL == 0 {
            *entry &= !LVT_REMOTE_IRR;
        }
        match lvt {
            Lvt::Timer => self.timer_mode_changed(old_mode),
            _ => self.recheck_lint(lvt),
        }
    }

    /// Sends what the ICR says (SDM Vol. 3A §11.6.1).
    fn send_ipi(&mut self, destination: Destination) -> ApicAction {
        let icr = self.icr;
        let vector = icr as u8;
        let level_assert = icr & 1 << 14 != 0;
        let level = icr & 1 << 15 != 0;
        let destination = match icr >> 18 & 3 {
            0 => destination,
            1 => Destination::Physical(self.config.id),
            2 => Destination::All,
            _ => Destination::AllExcept(self.config.id),
        };
        let Some(delivery) = DeliveryMode::from_bits(icr >> 8) else {
            return ApicAction::None;
        };
        match delivery {
            // Level de-assert: only synchronises arbitration IDs, which are gone (§11.6.1).
            DeliveryMode::Init if level && !level_assert => return ApicAction::None,
            // ExtINT can't be sent through the ICR.
            DeliveryMode::ExtInt => return ApicAction::None,
            DeliveryMode::Fixed | DeliveryMode::LowestPriority if vector < 16 => {
                self.record_error(ESR_SEND_ILLEGAL);
                return ApicAction::None;
            }
            _ => {}
        }
        // The trigger mode is ignored for IPIs: they are edges (§11.6.1, Table 11-3).
        ApicAction::Ipi(InterruptMessage { destination, delivery, vector, level: false })
    }

    // ---- MSRs ---------------------------------------------------------------------------

    /// Whether `msr` is one of this device's.
    pub fn is_apic_msr(msr: u32) -> bool {
        matches!(msr, MSR_APIC_BASE | MSR_TSC_DEADLINE | MSR_X2APIC_FIRST..=MSR_X2APIC_LAST)
    }

    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// [`GpFault`] outside x2APIC mode, for reserved addresses and for write-only registers
    /// (SDM Vol. 3A §11.12.1.2, Table 11-6).
    pub fn read_msr(&self, msr: u32) -> Result<u64, GpFault> {
        match msr {
            MSR_APIC_BASE => Ok(self.base),
            MSR_TSC_DEADLINE => Ok(self.timer.tsc_deadline),
            MSR_X2APIC_FIRST..=MSR_X2APIC_LAST if self.mode() == ApicMode::X2Apic => {
                match (msr - MSR_X2APIC_FIRST) as u16 {
                    REG_ID => Ok(self.config.id.into()),
                    REG_ICR => Ok(self.icr),
                    reg => self.read_register(reg).map(u64::from).ok_or(GpFault),
                }
            }
            _ => Err(GpFault),
        }
    }

    /// WRMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// [`GpFault`] outside x2APIC mode, for reserved addresses and bits, for read-only
    /// registers, and for illegal changes of IA32_APIC_BASE (SDM Vol. 3A §11.12.1.3).
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<ApicAction, GpFault> {
        match msr {
            MSR_APIC_BASE => self.write_apic_base(value).map(|()| ApicAction::None),
            MSR_TSC_DEADLINE => {
                self.write_tsc_deadline(value);
                Ok(ApicAction::None)
            }
            MSR_X2APIC_FIRST..=MSR_X2APIC_LAST if self.mode() == ApicMode::X2Apic => {
                self.write_x2apic((msr - MSR_X2APIC_FIRST) as u16, value)
            }
            _ => Err(GpFault),
        }
    }

    /// The bits of an x2APIC register that software may set; `None` if it can't be written.
    fn x2apic_writable_bits(reg: u16) -> Option<u64> {
        Some(match reg {
            REG_TPR | REG_SELF_IPI => 0xff,
            REG_EOI | REG_ESR => 0,
            REG_SVR => SVR_BITS.into(),
            REG_ICR => ICR_BITS | 0xffff_ffff_0000_0000,
            REG_INITIAL_COUNT => 0xffff_ffff,
            REG_DIVIDE => 0xb,
            _ => return Lvt::from_register(reg).map(|lvt| lvt.defined_bits().into()),
        })
    }

    fn write_x2apic(&mut self, reg: u16, value: u64) -> Result<ApicAction, GpFault> {
        let allowed = Self::x2apic_writable_bits(reg).ok_or(GpFault)?;
        if value & !allowed != 0 {
            return Err(GpFault);
        }
        Ok(match reg {
            REG_ICR => {
                // There is no delivery status in x2APIC mode (§11.12.9).
                self.icr = value & !ICR_DELIVERY_STATUS;
                let logical = value & 1 << 11 != 0;
                self.send_ipi(Destination::from_x2apic((value >> 32) as u32, logical))
            }
            REG_SELF_IPI => self.self_ipi(value as u8),
            _ => self.write_register(reg, value as u32),
        })
    }

    /// The SELF IPI register: an edge-triggered fixed interrupt to this processor (SDM Vol. 3A
    /// §11.12.11).
    fn self_ipi(&mut self, vector: u8) -> ApicAction {
        if vector < 16 {
            self.record_error(ESR_SEND_ILLEGAL);
        } else {
            self.accept_fixed(vector, false);
        }
        ApicAction::None
    }

    // ---- memory -------------------------------------------------------------------------

    /// Reads `size` bytes at `offset` in the xAPIC page. Registers are 32 bits wide at every 16
    /// bytes; parts of one can be read, what lies between reads as zero.
    pub fn mmio_read(&mut self, offset: u64, size: u8) -> u64 {
        let reg = (offset >> 4 & 0xff) as u16;
        let byte = offset & 0xf;
        let value = match reg {
            REG_ID => Some(self.config.id << 24),
            REG_DFR => Some(self.dfr),
            REG_ICR => Some(self.icr as u32),
            REG_ICR_HIGH => Some((self.icr >> 32) as u32),
            REG_EOI => Some(0),
            _ => self.read_register(reg),
        };
        let Some(value) = value else {
            self.record_error(ESR_ILLEGAL_REGISTER);
            return 0;
        };
        if byte >= 4 {
            return 0;
        }
        truncate(u64::from(value) >> (byte * 8), size)
    }

    /// Writes to the xAPIC page. Only aligned 32-bit stores have an effect (SDM Vol. 3A §11.4.1);
    /// reserved bits are ignored.
    pub fn mmio_write(&mut self, offset: u64, size: u8, value: u64) -> ApicAction {
        if size < 4 || offset & 0xf != 0 {
            return ApicAction::None;
        }
        let value = value as u32;
        let reg = (offset >> 4 & 0xff) as u16;
        match reg {
            // Read-only, yet not reserved: the write is dropped.
            REG_ID | REG_VERSION | REG_PPR | REG_CURRENT_COUNT | REG_ISR..REG_ESR => {}
            REG_LDR => self.ldr = value & 0xff00_0000,
            REG_DFR => self.dfr = value | 0x0fff_ffff,
            REG_ICR_HIGH => self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32,
            REG_ICR => {
                let low = u64::from(value) & ICR_BITS & !ICR_DELIVERY_STATUS;
                self.icr = self.icr & 0xffff_ffff_0000_0000 | low;
                let dest = Destination::from_xapic((self.icr >> 56) as u8, value & 1 << 11 != 0);
                return self.send_ipi(dest);
            }
            REG_TPR | REG_EOI | REG_SVR | REG_ESR | REG_INITIAL_COUNT | REG_DIVIDE => {
                return self.write_register(reg, value);
            }
            _ if Lvt::from_register(reg).is_some() => return self.write_register(reg, value),
            _ => self.record_error(ESR_ILLEGAL_REGISTER),
        }
        ApicAction::None
    }
}

/// The low `size` bytes of `value`.
fn truncate(value: u64, size: u8) -> u64 {
    match size {
        1 => value & 0xff,
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}

#[cfg(test)]
mod tests;
