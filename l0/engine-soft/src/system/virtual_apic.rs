//! APIC virtualization and virtual interrupts (SDM Vol. 3C chapter 30): the TPR shadow, the
//! APIC-access page, APIC-register virtualization, x2APIC virtualization, virtual-interrupt delivery.
//!
//! The virtual-APIC page is machine memory; RVI and SVI live in [`VirtualApic`] between entry
//! and exit. Posted interrupts are processed by L0 at an exit ([`engine::post_interrupts`]): what
//! they add is found by the evaluation at the next entry.
//!
//! Not supported: IPI virtualization, the tertiary controls; writes of event delivery to the
//! APIC-access page are never virtualized, they exit.

use engine::{Activity, VmExit, interruptibility};
use x86_spec::controls::{PrimaryControls, SecondaryControls as S};
use x86_spec::exit::ExitReason;
use x86_spec::interruption::EventType;
use x86_spec::reg::rflags;

use super::event::deliver;
use crate::cpu::{Access, Cpu, Event, Exec, Stop};

/// Page offsets of virtualized registers (SDM Vol. 3C §30.1.1).
mod offset {
    pub const TPR: u64 = 0x80;
    pub const PPR: u64 = 0xa0;
    pub const EOI: u64 = 0xb0;
    pub const ISR: u64 = 0x100;
    pub const IRR: u64 = 0x200;
    pub const ICR_LOW: u64 = 0x300;
    pub const ICR_HIGH: u64 = 0x310;
    pub const SELF_IPI: u64 = 0x3f0;
}

/// Access types of the APIC-access exit qualification, bits 15:12 (SDM Vol. 3C table 28-6).
mod access_type {
    pub const READ: u64 = 0;
    pub const WRITE: u64 = 1;
    pub const FETCH: u64 = 2;
    pub const EVENT: u64 = 3;
    pub const PHYSICAL_EVENT: u64 = 10;
    pub const PHYSICAL: u64 = 15;
}

/// A virtualized write whose emulation waits for the end of its instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ApicWrite {
    offset: u64,
    size: usize,
}

/// What the processor knows of virtual interrupts.
#[derive(Clone, Copy, Debug, Default)]
pub struct VirtualApic {
    /// Requesting virtual interrupt.
    rvi: u8,
    /// Servicing virtual interrupt.
    svi: u8,
    /// A pending virtual interrupt was recognized.
    pub(crate) recognized: bool,
    write: Option<ApicWrite>,
}

/// Registers that reads of the APIC-access page and RDMSR virtualize with "APIC-register
/// virtualization" (SDM Vol. 3C §30.4.2).
fn readable(register: u64) -> bool {
    matches!(
        register,
        0x20 | 0x30
            | 0x80
            | 0xb0
            | 0xd0
            | 0xe0
            | 0xf0
            | 0x100..=0x280
            | 0x300
            | 0x310
            | 0x320..=0x380
            | 0x3e0
    )
}

/// The same for writes (SDM Vol. 3C §30.4.3).
fn writable(register: u64) -> bool {
    matches!(
        register,
        0x20 | 0x80 | 0xb0 | 0xd0 | 0xe0 | 0xf0 | 0x280 | 0x300 | 0x310 | 0x320..=0x380 | 0x3e0
    )
}

/// Register and bit of a vector in IRR or ISR.
fn place(base: u64, vector: u8) -> (u64, u32) {
    (base + (vector as u64 >> 5) * 16, 1 << (vector & 31))
}

impl Cpu {
    /// Whether the machine page at `machine` is the APIC-access page.
    #[inline]
    pub(crate) fn is_apic_page(&self, machine: u64) -> bool {
        self.secondary(S::VIRTUALIZE_APIC) && machine & !0xfff == self.controls.apic_access.0
    }

    // ---- the virtual-APIC page -----------------------------------------------------------------

    /// A 32-bit register. Outside machine memory reads give zero.
    fn vapic(&self, offset: u64) -> u32 {
        let mut b = [0; 4];
        let _ = self.memory.read(self.controls.virtual_apic.offset(offset), &mut b);
        u32::from_le_bytes(b)
    }

    /// Outside machine memory writes are lost.
    fn set_vapic(&mut self, offset: u64, value: u32) {
        let _ = self.memory.write(self.controls.virtual_apic.offset(offset), &value.to_le_bytes());
    }

    fn highest(&self, base: u64) -> u8 {
        (0..8u64)
            .rev()
            .find_map(|n| {
                let bits = self.vapic(base + n * 16);
                (bits != 0).then(|| (n * 32) as u8 + 31 - bits.leading_zeros() as u8)
            })
            .unwrap_or(0)
    }

    fn set_vector(&mut self, base: u64, vector: u8, on: bool) {
        let (at, bit) = place(base, vector);
        let bits = self.vapic(at);
        self.set_vapic(at, if on { bits | bit } else { bits & !bit });
    }

    fn virtual_delivery(&self) -> bool {
        self.secondary(S::VIRTUAL_INTERRUPT_DELIVERY)
    }

    // ---- the task priority -----------------------------------------------------------------------

    /// The task priority, 0–15: VTPR's upper half with a TPR shadow, else CR8.
    pub(crate) fn read_tpr(&self) -> u8 {
        if self.primary(PrimaryControls::USE_TPR_SHADOW) {
            self.vapic(offset::TPR) as u8 >> 4
        } else {
            (self.cr8 & 15) as u8
        }
    }

    /// MOV to CR8 that doesn't exit (SDM Vol. 3C §30.3).
    pub(super) fn write_tpr(&mut self, value: u64) {
        if !self.primary(PrimaryControls::USE_TPR_SHADOW) {
            self.cr8 = value;
            return;
        }
        self.set_vapic(offset::TPR, (value as u32 & 15) << 4);
        self.tpr_virtualization();
    }

    /// TPR virtualization (SDM Vol. 3C §30.1.2).
    fn tpr_virtualization(&mut self) {
        if self.virtual_delivery() {
            self.ppr_virtualization();
            self.evaluate_virtual_interrupts();
        } else if (self.read_tpr() as u32) < self.controls.tpr_threshold & 15 {
            self.apic_trap(VmExit::new(ExitReason::TprBelowThreshold));
        }
    }

    /// A trap-like exit: the instruction has completed.
    fn apic_trap(&mut self, exit: VmExit) {
        self.boundary.trap_exit = Some(exit);
        self.request_event_check();
    }

    /// PPR virtualization (SDM Vol. 3C §30.1.3).
    fn ppr_virtualization(&mut self) {
        let (tpr, svi) = (self.vapic(offset::TPR) as u8, self.virtual_apic.svi);
        let ppr = if tpr >> 4 >= svi >> 4 { tpr } else { svi & 0xf0 };
        self.set_vapic(offset::PPR, ppr as u32);
    }

    // ---- virtual interrupts -----------------------------------------------------------------------

    /// EOI virtualization (SDM Vol. 3C §30.1.4).
    fn eoi_virtualization(&mut self) {
        let vector = self.virtual_apic.svi;
        self.set_vector(offset::ISR, vector, false);
        self.virtual_apic.svi = self.highest(offset::ISR);
        self.ppr_virtualization();
        let word = self.controls.eoi_exit.get(vector as usize >> 6).copied().unwrap_or(0);
        if word >> (vector & 63) & 1 != 0 {
            self.apic_trap(VmExit::new(ExitReason::VirtualizedEoi).qualified(vector as u64));
        } else {
            self.evaluate_virtual_interrupts();
        }
    }

    /// Self-IPI virtualization (SDM Vol. 3C §30.1.5).
    fn self_ipi_virtualization(&mut self, vector: u8) {
        self.set_vector(offset::IRR, vector, true);
        self.virtual_apic.rvi = self.virtual_apic.rvi.max(vector);
        self.evaluate_virtual_interrupts();
    }

    /// Evaluation of pending virtual interrupts (SDM Vol. 3C §30.2.1).
    fn evaluate_virtual_interrupts(&mut self) {
        let above = self.virtual_apic.rvi >> 4 > self.vapic(offset::PPR) as u8 >> 4;
        let recognized = above && !self.primary(PrimaryControls::INTERRUPT_WINDOW_EXITING);
        self.virtual_apic.recognized = recognized;
        if recognized {
            self.request_event_check();
        }
    }

    // ---- the APIC-access page ---------------------------------------------------------------------

    /// Whether an access to the APIC-access page, at `offset`, is virtualized (SDM Vol. 3C §30.4.2,
    /// §30.4.3).
    fn virtualizes(&self, access: Access, offset: u64, size: usize) -> bool {
        let (register, within) = (offset & !15, offset & 15);
        let another = self
            .virtual_apic
            .write
            .is_some_and(|w| access == Access::Read || w != ApicWrite { offset, size });
        if !self.primary(PrimaryControls::USE_TPR_SHADOW) || within + size as u64 > 4 || another {
            return false;
        }
        let registers = self.secondary(S::VIRTUALIZE_APIC_REGISTER);
        match access {
            Access::Fetch => false,
            Access::Read if registers => readable(register),
            Access::Write if registers => writable(register),
            Access::Write if self.virtual_delivery() => {
                matches!(register, offset::TPR | offset::EOI | offset::ICR_LOW)
            }
            Access::Read | Access::Write => register == offset::TPR,
        }
    }

    /// Checks an access of `size` bytes to the APIC-access page, at `at`, of which only the page offset
    /// counts.
    ///
    /// # Errors
    /// The exit, if the access is not virtualized.
    pub(crate) fn check_apic_access(&mut self, access: Access, at: u64, size: usize) -> Exec {
        let offset = at & 0xfff;
        let event = self.delivering.is_some();
        if !event && self.virtualizes(access, offset, size) {
            return Ok(());
        }
        let kind = match access {
            _ if event => access_type::EVENT,
            Access::Read => access_type::READ,
            Access::Write => access_type::WRITE,
            Access::Fetch => access_type::FETCH,
        };
        Err(self.exit(VmExit::new(ExitReason::ApicAccess).qualified(kind << 12 | offset)))
    }

    /// The exit of a guest-physical access (of a page walk) to the APIC-access page (SDM Vol. 3C
    /// §30.4.6.1).
    pub(crate) fn physical_apic_access(&mut self) -> Stop {
        let event = self.delivering.is_some();
        let kind = if event { access_type::PHYSICAL_EVENT } else { access_type::PHYSICAL };
        self.exit(VmExit::new(ExitReason::ApicAccess).qualified(kind << 12))
    }

    /// A read of the APIC-access page, already checked.
    pub(crate) fn apic_page_read(&self, at: u64, buf: &mut [u8]) {
        let _ = self.memory.read(self.controls.virtual_apic.offset(at & 0xfff), buf);
    }

    /// A write to the APIC-access page, already checked, by an instruction that runs alone. Its
    /// emulation follows when the instruction has completed ([`Cpu::finish_apic_write`]).
    pub(crate) fn apic_page_write(&mut self, at: u64, buf: &[u8]) {
        let offset = at & 0xfff;
        let _ = self.memory.write(self.controls.virtual_apic.offset(offset), buf);
        self.virtual_apic.write = Some(ApicWrite { offset, size: buf.len() });
        self.request_event_check();
    }

    /// APIC-write emulation (SDM Vol. 3C §30.4.3.2), after the instruction that wrote.
    pub(super) fn finish_apic_write(&mut self) {
        let Some(write) = self.virtual_apic.write.take() else { return };
        let exit = VmExit::new(ExitReason::ApicWrite).qualified(write.offset);
        match write.offset & !15 {
            offset::TPR => {
                let tpr = self.vapic(offset::TPR) & 0xff;
                self.set_vapic(offset::TPR, tpr);
                self.tpr_virtualization();
            }
            offset::EOI if self.virtual_delivery() => {
                self.set_vapic(offset::EOI, 0);
                self.eoi_virtualization();
            }
            offset::ICR_LOW if self.virtual_delivery() => match self_ipi(self.vapic(offset::ICR_LOW)) {
                Some(vector) => self.self_ipi_virtualization(vector),
                None => self.apic_trap(exit),
            },
            offset::ICR_HIGH => {
                let high = self.vapic(offset::ICR_HIGH) & 0xff00_0000;
                self.set_vapic(offset::ICR_HIGH, high);
            }
            _ => self.apic_trap(exit),
        }
    }

    // ---- x2APIC MSRs --------------------------------------------------------------------------------

    /// RDMSR of an x2APIC register that is virtualized (SDM Vol. 3C §30.5).
    pub(super) fn read_x2apic(&self, msr: u32) -> Option<u64> {
        let register = x2apic_register(msr)?;
        if !self.secondary(S::VIRTUALIZE_X2APIC)
            || register != offset::TPR && !self.secondary(S::VIRTUALIZE_APIC_REGISTER)
        {
            return None;
        }
        Some(self.vapic(register) as u64 | (self.vapic(register + 4) as u64) << 32)
    }

    /// WRMSR to an x2APIC register; true if it is virtualized (SDM Vol. 3C §30.5).
    ///
    /// # Errors
    /// #GP(0) for reserved bits.
    pub(super) fn write_x2apic(&mut self, msr: u32, value: u64) -> Exec<bool> {
        let Some(register) = x2apic_register(msr) else { return Ok(false) };
        let reserved = match register {
            offset::TPR | offset::SELF_IPI => !0xff,
            _ => u64::MAX,
        };
        let delivery = self.virtual_delivery();
        let known = register == offset::TPR || delivery && matches!(register, offset::EOI | offset::SELF_IPI);
        if !known || !self.secondary(S::VIRTUALIZE_X2APIC) {
            return Ok(false);
        }
        if value & reserved != 0 {
            return Err(self.gp(0));
        }
        self.set_vapic(register, value as u32);
        self.set_vapic(register + 4, 0);
        match register {
            offset::TPR => self.tpr_virtualization(),
            offset::EOI => self.eoi_virtualization(),
            // Vectors 0 to 15 are not legal, and left to the hypervisor.
            _ if value >> 4 == 0 => {
                self.apic_trap(VmExit::new(ExitReason::ApicWrite).qualified(offset::SELF_IPI));
            }
            _ => self.self_ipi_virtualization(value as u8),
        }
        Ok(true)
    }

    // ---- entry and exit -------------------------------------------------------------------------------

    /// VM entry: guest interrupt status, PPR virtualization and evaluation (SDM Vol. 3C §27.3.2.5,
    /// §27.7.5).
    pub(super) fn enter_virtual_apic(&mut self, interrupt_status: u16) {
        let [rvi, svi] = interrupt_status.to_le_bytes();
        self.virtual_apic = VirtualApic { rvi, svi, ..VirtualApic::default() };
        if self.virtual_delivery() {
            self.ppr_virtualization();
            self.evaluate_virtual_interrupts();
        }
    }

    /// Guest interrupt status for the VMCS.
    pub(super) fn interrupt_status(&self) -> u16 {
        u16::from_le_bytes([self.virtual_apic.rvi, self.virtual_apic.svi])
    }
}

/// The vector of a self-IPI that ICR's low half asks for, if the processor virtualizes it (SDM
/// Vol. 3C §30.4.3.2): fixed, edge-triggered, shorthand "self", vector 16 or more.
fn self_ipi(icr: u32) -> Option<u8> {
    const RESERVED: u32 = 0xfff0_0000 | 3 << 16 | 1 << 13 | 1 << 12;
    const SHORTHAND: u32 = 3 << 18;
    const LEVEL_TRIGGERED: u32 = 1 << 15;
    const MODE: u32 = 7 << 8;
    let wanted = icr & (RESERVED | SHORTHAND | LEVEL_TRIGGERED | MODE) == 1 << 18;
    (wanted && icr as u8 >> 4 != 0).then_some(icr as u8)
}

/// Page offset of an x2APIC MSR (SDM Vol. 3A §11.12.1.2).
fn x2apic_register(msr: u32) -> Option<u64> {
    matches!(msr, 0x800..=0x8ff).then_some((msr as u64 & 0xff) << 4)
}

/// Virtual-interrupt delivery, if one was recognized and nothing blocks it (SDM Vol. 3C §30.2.2).
/// True if an interrupt was delivered.
///
/// # Errors
/// A VM exit during delivery.
pub(super) fn deliver_virtual_interrupt(cpu: &mut Cpu) -> Exec<bool> {
    let shadow = interruptibility::STI | interruptibility::MOV_SS;
    if !cpu.virtual_apic.recognized
        || cpu.rflags_other & rflags::IF == 0
        || cpu.interruptibility & shadow != 0
        || matches!(cpu.activity, Activity::Shutdown | Activity::WaitForSipi)
    {
        return Ok(false);
    }
    let vector = cpu.virtual_apic.rvi;
    cpu.set_vector(offset::ISR, vector, true);
    cpu.virtual_apic.svi = vector;
    cpu.set_vapic(offset::PPR, vector as u32 & 0xf0);
    cpu.set_vector(offset::IRR, vector, false);
    cpu.virtual_apic.rvi = cpu.highest(offset::IRR);
    cpu.virtual_apic.recognized = false;
    let event = Event { vector, kind: EventType::External, error: None, payload: 0 };
    deliver(cpu, event, 0)?;
    Ok(true)
}

/// Gives the exit of a linear access to the APIC-access page the length of its instruction. The SDM
/// leaves the field undefined; processors fill it, and hypervisors have come to rely on it.
pub(crate) fn complete_exit(cpu: &mut Cpu, exit: &mut VmExit) {
    let instruction = exit.qualification >> 12 & 15 <= access_type::WRITE;
    if exit.reason == ExitReason::ApicAccess && instruction && !exit.idt_vectoring.is_valid() {
        exit.instruction_length = super::pending::next_instruction(cpu).map_or(0, |i| i.len() as u32);
    }
}
