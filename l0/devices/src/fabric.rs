//! The interrupt fabric: ISA and GSI lines into the 8259 pair and the I/O APIC, messages to
//! the local APICs, and the word to each vCPU that it may have something to take.
//!
//! Wiring: ISA line 0 is I/O APIC pin 2, line 2 does not exist, the others are pin for pin.
//! The 8259's INTR goes to LINT0 of every local APIC and to I/O APIC pin 0.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use crate::device::{IrqLine, IrqSink, lock};
use crate::ioapic::{IoApic, MessageSink, PINS, entry_message, message};
use crate::lapic::{ApicAction, GpFault, LocalApic};
use crate::message::{DeliveryMode, Destination, InterruptMessage};
use crate::pic::DualPic;

/// Called with a vCPU's index when it may have gained something to take. Must not call back
/// into the fabric.
pub type Notifier = Box<dyn Fn(usize) + Send + Sync>;

/// What waits for a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// A maskable interrupt that the priorities let through.
    pub interrupt: bool,
    /// An NMI.
    pub nmi: bool,
    /// INIT or a start-up IPI.
    pub init_or_sipi: bool,
    /// CR8: the task priority.
    pub cr8: u8,
}

impl Waiting {
    /// Whether there is an interrupt or an NMI.
    pub fn has_event(&self) -> bool {
        self.interrupt || self.nmi
    }
}

/// What remaps the I/O APIC's interrupts: an IOMMU.
pub trait Remapper: Send + Sync {
    /// Delivers the interrupt that the I/O APIC's write of `data` to `address` stands for. Returns whether a local
    /// APIC accepted it. Called with the I/O APIC's lock held: must not call back into that.
    fn deliver(&self, address: u64, data: u32) -> bool;
}

/// The controllers that are shared by all vCPUs.
struct Chips {
    pic: DualPic,
    ioapic: IoApic,
    intr: bool,
}

/// Local APICs that are not here but with whoever runs the vCPUs.
pub trait OtherApics: Send + Sync {
    /// Delivers a message. Returns whether an APIC accepted it.
    fn deliver(&self, message: &InterruptMessage) -> bool;
    /// The messages of the I/O APIC's level-triggered pins changed: of these the end has to be told to
    /// [`Interrupts::end_of_interrupt`].
    fn set_level_messages(&self, messages: &[Option<InterruptMessage>; PINS]);
}

/// All interrupt controllers of the machine.
pub struct Interrupts {
    chips: Mutex<Chips>,
    lapics: Vec<Mutex<LocalApic>>,
    /// In place of `lapics`.
    others: OnceLock<Box<dyn OtherApics>>,
    /// The 8259's INTR, as far as `others` have to be told.
    intr: AtomicBool,
    notifier: OnceLock<Notifier>,
    remapper: OnceLock<Weak<dyn Remapper>>,
}

/// Delivers to local APICs; handed to the I/O APIC.
struct LapicBus<'a>(&'a Interrupts);

impl MessageSink for LapicBus<'_> {
    fn deliver(&mut self, message: &InterruptMessage) -> bool {
        self.0.deliver(message)
    }

    fn deliver_entry(&mut self, entry: u64) -> bool {
        match self.0.remapper.get().and_then(Weak::upgrade) {
            Some(remapper) => {
                let (address, data) = entry_message(entry);
                remapper.deliver(address, data)
            }
            None => self.deliver(&message(entry)),
        }
    }
}

/// Accepts nothing, so that what is to be sent is sent later.
struct Nobody;

impl MessageSink for Nobody {
    fn deliver(&mut self, _: &InterruptMessage) -> bool {
        false
    }
}

impl Interrupts {
    /// A fabric around the vCPUs' local APICs, in the order of vCPUs.
    pub fn new(lapics: Vec<LocalApic>) -> Arc<Self> {
        Arc::new(Self {
            chips: Mutex::new(Chips { pic: DualPic::new(), ioapic: IoApic::new(), intr: false }),
            lapics: lapics.into_iter().map(Mutex::new).collect(),
            others: OnceLock::new(),
            intr: AtomicBool::new(false),
            notifier: OnceLock::new(),
            remapper: OnceLock::new(),
        })
    }

    /// Has `others` in place of the local APICs that are here, which are as if they did not exist from then on: only
    /// the 8259's interrupt is for vCPU 0 to take. Only the first call counts; returns whether this was it.
    pub fn use_other_apics(&self, others: Box<dyn OtherApics>) -> bool {
        self.others.set(others).is_ok()
    }

    /// Sets who is told when a vCPU may have something to take. Only the first call counts; returns whether
    /// this was it.
    pub fn set_notifier(&self, notifier: Notifier) -> bool {
        self.notifier.set(notifier).is_ok()
    }

    /// Puts `remapper` between the I/O APIC and the local APICs. Only the first call counts; returns whether this was
    /// it.
    pub fn set_remapper(&self, remapper: Weak<dyn Remapper>) -> bool {
        self.remapper.set(remapper).is_ok()
    }

    /// Tells the notifier about vCPU `cpu`.
    pub fn notify(&self, cpu: usize) {
        if let Some(notifier) = self.notifier.get() {
            notifier(cpu);
        }
    }

    /// Tells the notifier about every vCPU.
    pub fn notify_all(&self) {
        (0..self.lapics.len()).for_each(|cpu| self.notify(cpu));
    }

    /// The ISA line `irq` for a device to drive.
    pub fn isa_line(self: &Arc<Self>, irq: u32) -> IrqLine {
        IrqLine::new(self.clone(), irq)
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> usize {
        self.lapics.len()
    }

    /// Runs `f` on the local APIC of vCPU `cpu`; `None` if there is no such vCPU.
    pub fn with_lapic<R>(&self, cpu: usize, f: impl FnOnce(&mut LocalApic) -> R) -> Option<R> {
        self.lapics.get(cpu).map(|lapic| f(&mut lock(lapic)))
    }

    // ---- messages -----------------------------------------------------------------------

    /// Delivers a message to every local APIC that it is for, or to the one of lowest priority.
    /// Returns whether any accepted it.
    pub fn deliver(&self, message: &InterruptMessage) -> bool {
        if let Some(others) = self.others.get() {
            return others.deliver(message);
        }
        if message.delivery == DeliveryMode::LowestPriority {
            return self.deliver_lowest_priority(message);
        }
        let mut accepted = false;
        for (cpu, lapic) in self.lapics.iter().enumerate() {
            let mut lapic = lock(lapic);
            if lapic.is_destination(message.destination) && lapic.accept(message) {
                drop(lapic);
                accepted = true;
                self.notify(cpu);
            }
        }
        accepted
    }

    /// Lowest-priority delivery: to the destination with the lowest processor priority (SDM Vol. 3A
    /// §11.6.2.4); of equals, the first.
    fn deliver_lowest_priority(&self, message: &InterruptMessage) -> bool {
        let mut candidates: Vec<(u8, usize)> = Vec::new();
        for (cpu, lapic) in self.lapics.iter().enumerate() {
            let lapic = lock(lapic);
            if lapic.is_destination(message.destination) {
                candidates.push((lapic.ppr(), cpu));
            }
        }
        candidates.sort_unstable();
        for (_, cpu) in candidates {
            if self.with_lapic(cpu, |lapic| lapic.accept(message)) == Some(true) {
                self.notify(cpu);
                return true;
            }
        }
        false
    }

    /// Carries out what a register access asked for.
    fn perform(&self, action: ApicAction) {
        match action {
            ApicAction::None => {}
            ApicAction::Ipi(message) => {
                self.deliver(&message);
            }
            ApicAction::EoiBroadcast(vector) => self.end_of_interrupt(vector),
        }
    }

    /// A local APIC ended a level-triggered interrupt.
    pub fn end_of_interrupt(&self, vector: u8) {
        lock(&self.chips).ioapic.end_of_interrupt(vector, &mut LapicBus(self));
    }

    // ---- the vCPU's side ----------------------------------------------------------------

    /// What waits for vCPU `cpu`, all at once: the vCPU loop asks at every exit.
    pub fn waiting(&self, cpu: usize) -> Waiting {
        if self.others.get().is_some() {
            return Waiting { interrupt: self.has_interrupt(cpu), ..Waiting::default() };
        }
        let waiting = |l: &mut LocalApic| Waiting {
            interrupt: l.pending_vector().is_some() || l.extint_pending(),
            nmi: l.nmi_pending(),
            init_or_sipi: l.init_or_sipi_pending(),
            cr8: l.cr8(),
        };
        self.with_lapic(cpu, waiting).unwrap_or_default()
    }

    /// Whether vCPU `cpu` has a maskable interrupt to take now.
    pub fn has_interrupt(&self, cpu: usize) -> bool {
        if self.others.get().is_some() {
            return cpu == 0 && self.intr.load(Ordering::SeqCst);
        }
        self.with_lapic(cpu, |l| l.pending_vector().is_some() || l.extint_pending()).unwrap_or(false)
    }

    /// Takes the interrupt that vCPU `cpu` is to run now and returns its vector: an 8259's
    /// through INTA, else the local APIC's highest.
    pub fn take_interrupt(&self, cpu: usize) -> Option<u8> {
        let extint = match self.others.get() {
            Some(_) if !self.has_interrupt(cpu) => return None,
            Some(_) => true,
            None => self.with_lapic(cpu, |l| {
                let pending = l.extint_pending();
                l.accept_extint();
                pending
            })?,
        };
        if extint {
            let mut chips = lock(&self.chips);
            let vector = chips.pic.acknowledge();
            self.update_intr(&mut chips);
            return Some(vector);
        }
        self.with_lapic(cpu, |l| {
            let vector = l.pending_vector()?;
            l.ack(vector);
            Some(vector)
        })?
    }

    /// If `vector` is the interrupt that vCPU `cpu` is to run now: acknowledges it and ends it at once, as
    /// posted-interrupt processing does with its notification (SDM Vol. 3C §30.6).
    pub fn take_notification(&self, cpu: usize, vector: u8) -> bool {
        let action = self.with_lapic(cpu, |l| {
            (l.pending_vector() == Some(vector)).then(|| {
                l.ack(vector);
                l.eoi()
            })
        });
        let Some(Some(action)) = action else { return false };
        self.perform(action);
        true
    }

    /// RDMSR of a local-APIC MSR by vCPU `cpu`.
    ///
    /// # Errors
    /// [`GpFault`] as [`LocalApic::read_msr`].
    pub fn read_msr(&self, cpu: usize, msr: u32) -> Result<u64, GpFault> {
        if self.others.get().is_some() {
            return Err(GpFault);
        }
        self.with_lapic(cpu, |l| l.read_msr(msr)).unwrap_or(Err(GpFault))
    }

    /// WRMSR of a local-APIC MSR by vCPU `cpu`.
    ///
    /// # Errors
    /// [`GpFault`] as [`LocalApic::write_msr`].
    pub fn write_msr(&self, cpu: usize, msr: u32, value: u64) -> Result<(), GpFault> {
        if self.others.get().is_some() {
            return Err(GpFault);
        }
        let action = self.with_lapic(cpu, |l| l.write_msr(msr, value)).unwrap_or(Err(GpFault))?;
        self.perform(action);
        Ok(())
    }

    /// Reads the register page of vCPU `cpu`'s local APIC, if `gpa` is in it.
    pub fn lapic_mmio_read(&self, cpu: usize, gpa: u64, size: u8) -> Option<u64> {
        if self.others.get().is_some() {
            return None;
        }
        self.with_lapic(cpu, |l| {
            (l.mmio_page() == Some(gpa & !0xfff)).then(|| l.mmio_read(gpa & 0xfff, size))
        })?
    }

    /// Writes the register page of vCPU `cpu`'s local APIC; `false` if `gpa` is not in it.
    pub fn lapic_mmio_write(&self, cpu: usize, gpa: u64, size: u8, value: u64) -> bool {
        if self.others.get().is_some() {
            return false;
        }
        let action = self.with_lapic(cpu, |l| {
            (l.mmio_page() == Some(gpa & !0xfff)).then(|| l.mmio_write(gpa & 0xfff, size, value))
        });
        match action.flatten() {
            Some(action) => {
                self.perform(action);
                true
            }
            None => false,
        }
    }

    /// Drives LINT1, the NMI pin, of every vCPU: an edge.
    pub fn pulse_nmi(&self) {
        if let Some(others) = self.others.get() {
            let (destination, delivery) = (Destination::All, DeliveryMode::Nmi);
            others.deliver(&InterruptMessage { destination, delivery, vector: 0, level: false });
            return;
        }
        for cpu in 0..self.lapics.len() {
            let raised = self.with_lapic(cpu, |l| {
                let raised = l.set_lint(1, true);
                l.set_lint(1, false);
                raised
            });
            if raised == Some(true) {
                self.notify(cpu);
            }
        }
    }

    /// Expires the timers of all local APICs.
    pub fn tick(&self, now: u64) {
        for (cpu, lapic) in self.lapics.iter().enumerate() {
            if lock(lapic).tick(now) {
                self.notify(cpu);
            }
        }
    }

    /// The earliest time at which a local APIC's timer expires.
    pub fn next_deadline(&self) -> Option<u64> {
        self.lapics.iter().filter_map(|l| lock(l).next_deadline()).min()
    }

    /// Resets every controller to its power-up state.
    pub fn reset(&self) {
        let mut chips = lock(&self.chips);
        chips.pic.reset();
        chips.ioapic.reset();
        self.update_intr(&mut chips);
        for lapic in &self.lapics {
            lock(lapic).power_up_reset();
        }
    }

    // ---- the devices' side --------------------------------------------------------------

    /// Passes a change of the 8259's INTR on to LINT0 and I/O APIC pin 0. Called with the
    /// chips locked, so that changes arrive in order.
    fn update_intr(&self, chips: &mut Chips) {
        let intr = chips.pic.intr();
        if intr == chips.intr {
            return;
        }
        chips.intr = intr;
        if self.others.get().is_some() {
            self.intr.store(intr, Ordering::SeqCst);
            if intr {
                self.notify(0);
            }
        } else {
            for (cpu, lapic) in self.lapics.iter().enumerate() {
                if lock(lapic).set_lint(0, intr) {
                    self.notify(cpu);
                }
            }
        }
        chips.ioapic.set_pin(0, intr, &mut LapicBus(self));
    }

    /// Drives global system interrupt `gsi` (an I/O APIC pin).
    pub fn set_gsi(&self, gsi: u32, asserted: bool) {
        if let Ok(pin) = usize::try_from(gsi)
            && pin < PINS
        {
            lock(&self.chips).ioapic.set_pin(pin, asserted, &mut LapicBus(self));
        }
    }

    /// Reads an 8259 or ELCR port.
    pub fn pic_read(&self, port: u16) -> u8 {
        let mut chips = lock(&self.chips);
        let value = chips.pic.read(port).unwrap_or(0xff);
        self.update_intr(&mut chips);
        value
    }

    /// Writes an 8259 or ELCR port.
    pub fn pic_write(&self, port: u16, value: u8) {
        let mut chips = lock(&self.chips);
        chips.pic.write(port, value);
        self.update_intr(&mut chips);
    }

    /// Reads the I/O APIC's register window.
    pub fn ioapic_read(&self, offset: u64) -> u32 {
        lock(&self.chips).ioapic.mmio_read(offset)
    }

    /// Writes the I/O APIC's register window.
    pub fn ioapic_write(&self, offset: u64, value: u32) {
        let mut chips = lock(&self.chips);
        match self.others.get() {
            None => chips.ioapic.mmio_write(offset, value, &mut LapicBus(self)),
            Some(others) => {
                // They have to know a message whose end is wanted before they get it.
                let before = chips.ioapic.level_messages();
                chips.ioapic.mmio_write(offset, value, &mut Nobody);
                let after = chips.ioapic.level_messages();
                if before != after {
                    others.set_level_messages(&after);
                }
                chips.ioapic.service_levels(&mut LapicBus(self));
            }
        }
    }
}

impl IrqSink for Interrupts {
    /// Drives ISA line `irq` (0–15) or, above that, GSI `irq`.
    fn set_irq(&self, irq: u32, asserted: bool) {
        let pin = match irq {
            0 => 2,
            2 => return,
            1..16 => irq as usize,
            _ => return self.set_gsi(irq, asserted),
        };
        let mut chips = lock(&self.chips);
        chips.pic.set_irq(irq as u8, asserted);
        self.update_intr(&mut chips);
        chips.ioapic.set_pin(pin, asserted, &mut LapicBus(self));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{ClockTsc, ManualClock};
    use crate::ioapic::IOAPIC_BASE;
    use crate::lapic::{DEFAULT_APIC_BASE, LapicConfig};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// A fabric of `cpus` vCPUs, all software-enabled, vCPU 0 in virtual wire mode.
    fn fabric(cpus: u32) -> Arc<Interrupts> {
        let clock = Arc::new(ManualClock::default());
        let tsc = Arc::new(ClockTsc::new(clock.clone(), 1_000_000_000));
        let lapics = (0..cpus).map(|id| {
            let config = LapicConfig { id, bsp: id == 0, ..LapicConfig::default() };
            LocalApic::new(config, clock.clone(), tsc.clone())
        });
        let fabric = Interrupts::new(lapics.collect());
        fabric.with_lapic(0, LocalApic::enter_virtual_wire_mode);
        for cpu in 1..cpus as usize {
            assert!(fabric.lapic_mmio_write(cpu, DEFAULT_APIC_BASE + 0xf0, 4, 0x1ff));
        }
        fabric
    }

    fn program_pin(fabric: &Interrupts, pin: u32, entry: u64) {
        for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
            fabric.ioapic_write(0, 0x10 + pin * 2 + half);
            fabric.ioapic_write(0x10, value);
        }
    }

    fn initialise_pic(fabric: &Interrupts) {
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0)] {
            fabric.pic_write(port, value);
        }
    }

    fn eoi(fabric: &Interrupts, cpu: usize) {
        assert!(fabric.lapic_mmio_write(cpu, DEFAULT_APIC_BASE + 0xb0, 4, 0));
    }

    #[test]
    fn the_timer_line_reaches_pic_and_pin_2() {
        let fabric = fabric(1);
        initialise_pic(&fabric);
        program_pin(&fabric, 2, 0x30);
        fabric.isa_line(0).set(true);
        // Both have it: the 8259's first.
        assert_eq!(fabric.take_interrupt(0), Some(0x20));
        assert_eq!(fabric.take_interrupt(0), Some(0x30));
        assert_eq!(fabric.take_interrupt(0), None);
    }

    #[test]
    fn virtual_wire_delivers_8259_vectors() {
        let fabric = fabric(1);
        initialise_pic(&fabric);
        let line = fabric.isa_line(4);
        assert!(!fabric.has_interrupt(0));
        line.set(true);
        assert!(fabric.has_interrupt(0));
        assert_eq!(fabric.take_interrupt(0), Some(0x24));
        assert!(!fabric.has_interrupt(0));
        // LINT0 masked: nothing passes.
        assert!(fabric.lapic_mmio_write(0, DEFAULT_APIC_BASE + 0x350, 4, 0x1_0700));
        fabric.pic_write(0x20, 0x20);
        line.set(false);
        line.set(true);
        assert!(!fabric.has_interrupt(0));
    }

    #[test]
    fn eoi_of_a_level_interrupt_reaches_the_io_apic() {
        let fabric = fabric(1);
        program_pin(&fabric, 9, 1 << 15 | 0x45);
        let line = fabric.isa_line(9);
        line.set(true);
        assert_eq!(fabric.take_interrupt(0), Some(0x45));
        eoi(&fabric, 0);
        assert_eq!(fabric.take_interrupt(0), Some(0x45), "still asserted");
        line.set(false);
        eoi(&fabric, 0);
        assert_eq!(fabric.take_interrupt(0), None);
    }

    #[test]
    fn extint_through_io_apic_pin_0() {
        let fabric = fabric(2);
        initialise_pic(&fabric);
        // LINT0 masked; pin 0 as ExtINT to APIC 1.
        assert!(fabric.lapic_mmio_write(0, DEFAULT_APIC_BASE + 0x350, 4, 0x1_0700));
        program_pin(&fabric, 0, 1 << 56 | 7 << 8);
        fabric.isa_line(3).set(true);
        assert!(!fabric.has_interrupt(0));
        assert_eq!(fabric.take_interrupt(1), Some(0x23));
        assert!(!fabric.has_interrupt(1));
    }

    #[test]
    fn ipis_reach_their_destinations_and_notify() {
        let fabric = fabric(3);
        let told: Arc<Vec<AtomicUsize>> = Arc::new((0..3).map(|_| AtomicUsize::new(0)).collect());
        let log = told.clone();
        assert!(fabric.set_notifier(Box::new(move |cpu| {
            log[cpu].fetch_add(1, Ordering::Relaxed);
        })));
        assert!(!fabric.set_notifier(Box::new(|_| {})));
        // Fixed to APIC 2.
        assert!(fabric.lapic_mmio_write(0, DEFAULT_APIC_BASE + 0x310, 4, 2 << 24));
        assert!(fabric.lapic_mmio_write(0, DEFAULT_APIC_BASE + 0x300, 4, 0x4055));
        assert_eq!([0, 1, 2].map(|cpu| fabric.take_interrupt(cpu)), [None, None, Some(0x55)]);
        // INIT and start-up to all but self.
        assert!(fabric.lapic_mmio_write(0, DEFAULT_APIC_BASE + 0x300, 4, 0xc_4500));
        assert!(fabric.lapic_mmio_write(0, DEFAULT_APIC_BASE + 0x300, 4, 0xc_4608));
        for cpu in [1, 2] {
            assert_eq!(fabric.with_lapic(cpu, LocalApic::take_init), Some(true));
            assert_eq!(fabric.with_lapic(cpu, LocalApic::take_sipi), Some(Some(8)));
        }
        assert_eq!(fabric.with_lapic(0, |l| l.init_or_sipi_pending()), Some(false));
        // To itself.
        assert!(fabric.lapic_mmio_write(0, DEFAULT_APIC_BASE + 0x300, 4, 0x4_4066));
        assert_eq!(fabric.take_interrupt(0), Some(0x66));
        let told: Vec<usize> = told.iter().map(|n| n.load(Ordering::Relaxed)).collect();
        assert_eq!(told, [1, 2, 3]);
    }

    #[test]
    fn lowest_priority_goes_to_the_least_busy() {
        // SDM Vol. 3A §11.6.2.4
        let fabric = fabric(2);
        fabric.with_lapic(0, |l| l.set_tpr(0x40));
        program_pin(&fabric, 4, 0xff << 56 | 1 << 8 | 0x61);
        fabric.isa_line(4).set(true);
        assert_eq!([0, 1].map(|cpu| fabric.take_interrupt(cpu)), [None, Some(0x61)]);
    }

    #[test]
    fn nmi_button_and_missing_cpus() {
        let fabric = fabric(2);
        fabric.pulse_nmi();
        assert_eq!(fabric.with_lapic(0, LocalApic::take_nmi), Some(true));
        // vCPU 1's LINT1 is masked.
        assert_eq!(fabric.with_lapic(1, LocalApic::take_nmi), Some(false));
        assert_eq!(fabric.take_interrupt(7), None);
        assert_eq!(fabric.read_msr(7, 0x1b), Err(GpFault));
        assert!(!fabric.lapic_mmio_write(7, IOAPIC_BASE, 4, 0));
    }

    /// Remembers what it is told; accepts everything.
    #[derive(Default)]
    struct Others {
        messages: Mutex<Vec<InterruptMessage>>,
        level: Mutex<Vec<u8>>,
    }

    impl OtherApics for Arc<Others> {
        fn deliver(&self, message: &InterruptMessage) -> bool {
            assert!(!message.level || lock(&self.level).contains(&message.vector), "its end would be missed");
            lock(&self.messages).push(*message);
            true
        }
        fn set_level_messages(&self, messages: &[Option<InterruptMessage>; PINS]) {
            *lock(&self.level) = messages.iter().flatten().map(|m| m.vector).collect();
        }
    }

    #[test]
    fn other_local_apics_get_the_messages_and_vcpu_0_the_8259() {
        let fabric = fabric(1);
        let others = Arc::new(Others::default());
        assert!(fabric.use_other_apics(Box::new(others.clone())));
        let vectors =
            || std::mem::take(&mut *lock(&others.messages)).iter().map(|m| m.vector).collect::<Vec<_>>();
        // Edge-triggered, and level-triggered on a line that is asserted already.
        program_pin(&fabric, 4, 0x41);
        fabric.isa_line(4).set(true);
        let level = fabric.isa_line(9);
        level.set(true);
        program_pin(&fabric, 9, 1 << 15 | 0x45);
        assert_eq!(vectors(), [0x41, 0x45]);
        fabric.end_of_interrupt(0x45);
        assert_eq!(vectors(), [0x45], "still asserted");
        level.set(false);
        fabric.end_of_interrupt(0x45);
        assert_eq!((vectors(), fabric.has_interrupt(0)), (vec![], false));
        // None of the local APICs here answers.
        assert_eq!(fabric.lapic_mmio_read(0, DEFAULT_APIC_BASE, 4), None);
        assert_eq!(fabric.read_msr(0, 0x1b), Err(GpFault));
        initialise_pic(&fabric);
        fabric.isa_line(3).set(true);
        assert!(fabric.waiting(0).interrupt);
        assert_eq!(fabric.take_interrupt(0), Some(0x23));
        assert_eq!(fabric.take_interrupt(0), None);
        fabric.pulse_nmi();
        assert_eq!(lock(&others.messages).last().map(|m| m.delivery), Some(DeliveryMode::Nmi));
    }

    #[test]
    fn reset_masks_everything() {
        let fabric = fabric(1);
        initialise_pic(&fabric);
        program_pin(&fabric, 4, 0x61);
        fabric.reset();
        fabric.isa_line(4).set(true);
        assert!(!fabric.has_interrupt(0));
        fabric.ioapic_write(0, 0x18);
        assert_eq!(fabric.ioapic_read(0x10), 0x1_0000);
    }
}
