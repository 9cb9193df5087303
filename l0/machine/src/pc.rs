//! The PC that L1 sees: which devices it has, where, and how they are wired.
//!
//! | Ports | Device |
//! |---|---|
//! | 0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1 | 8259 pair, ELCR |
//! | 0x40–0x43, 0x61 | 8254, NMI status and control |
//! | 0x60, 0x64 | 8042 |
//! | 0x70, 0x71 | RTC and CMOS RAM |
//! | 0x80 | POST code |
//! | 0x92, 0xCF9 | reset |
//! | 0xCF8, 0xCFC–0xCFF | PCI configuration |
//! | 0x2F8–0x2FF | second serial port (option) |
//! | 0x3F8–0x3FF | serial port |
//! | 0x510, 0x511 | fw_cfg |
//! | 0x600–0x60B | ACPI fixed hardware |
//! | 0xE0–0xEB, 0x2000–0x2017 | test device (option) |
//! | 0xF4–0xF7 | isa-debug-exit (option) |
//!
//! Memory that is neither RAM nor one of the fixed devices is PCI's ([`crate::pci`]).
//!
//! Not supported: HPET, VGA, floppy, parallel port.

use std::io::Write;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use devices::debug_exit::{DEBUG_EXIT_PORT, DEBUG_EXIT_PORTS, DebugExit};
use devices::fabric::Notifier;
use devices::fw_cfg::{FW_CFG_PORT, FW_CFG_PORTS, FwCfg};
use devices::i8042::I8042;
use devices::ioapic::{IOAPIC_BASE, IOAPIC_SIZE};
use devices::pci::{ADDRESS_PORT, DATA_PORT, DATA_PORTS, PciPorts, PciRoot, PciWindows};
use devices::pit::Pit;
use devices::pm::{PM_BASE, PM_PORTS, PowerManagement};
use devices::reset::{Port92, PostCode, RESET_PORT, ResetControl};
use devices::rtc::Rtc;
use devices::serial::Serial;
use devices::testdev::{
    IRQ_PORT, IRQ_PORTS, LATCH_PORT, LATCH_PORTS, SCRATCH_BASE, SCRATCH_SIZE, TestIrqs, TestLatch,
    TestScratch,
};
use devices::{
    Clock, EventSink, GpFault, Interrupts, LapicConfig, LocalApic, MachineEvent, MmioDevice, MonotonicClock,
    PioDevice, TimedDevice, TscSource, lock,
};
use memory::{L1Gpa, RamLayout};

use crate::bus::{MmioBus, Overlap, PioBus, PortWidth, size_mask};
use crate::iommu::{IommuOptions, RemappingUnit, VTD_BASE, VtdWindow};
use crate::pci::{self, PciDevices, PciError};

/// First port of the serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt line.
pub const SERIAL_IRQ: u32 = 4;
/// First port of the second serial port, which programs outside and inside talk over.
pub const CHANNEL_PORT: u16 = 0x2f8;
/// Its interrupt line.
pub const CHANNEL_IRQ: u32 = 3;
/// The interrupt line of ACPI events (level-triggered).
pub const SCI_IRQ: u32 = 9;

/// What a PC is made of.
pub struct PcConfig {
    /// RAM in bytes.
    pub ram_bytes: u64,
    /// Number of vCPUs, at least 1. APIC IDs are their indices.
    pub cpus: u16,
    /// The kernel command line that fw_cfg shows.
    pub cmdline: String,
    /// Whether to have isa-debug-exit at 0xF4.
    pub debug_exit: bool,
    /// Whether to have the test device.
    pub testdev: bool,
    /// Local-APIC timer input clock in hertz: what CPUID leaf 0x15 reports in ECX.
    pub lapic_timer_hz: u64,
    /// Width of L1's physical addresses in bits, as CPUID reports it.
    pub max_phys_bits: u8,
    /// Wall-clock time at power-on, nanoseconds since 1970 UTC; `None` takes the host's.
    pub utc_ns: Option<u64>,
    /// The machine's time; `None` takes the host's monotonic clock from now on.
    pub clock: Option<Arc<dyn Clock>>,
    /// Where the serial port's output goes.
    pub console: Box<dyn Write + Send>,
    /// Where the second serial port's output goes; `None` for no such port.
    pub channel: Option<Box<dyn Write + Send>>,
    /// What there is on PCI besides the host bridge.
    pub devices: Option<PciDevices>,
    /// The IOMMU; `None` for none.
    pub iommu: Option<IommuOptions>,
}

impl Default for PcConfig {
    /// One vCPU, 1 GiB, no test devices, output dropped.
    fn default() -> Self {
        Self {
            ram_bytes: 1 << 30,
            cpus: 1,
            cmdline: String::new(),
            debug_exit: false,
            testdev: false,
            lapic_timer_hz: 1_000_000_000,
            max_phys_bits: 46,
            utc_ns: None,
            clock: None,
            console: Box::new(std::io::sink()),
            channel: None,
            devices: None,
            iommu: None,
        }
    }
}

/// A machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum PcError {
    /// The number of vCPUs is not one that local APICs can name.
    #[error("{0} vCPUs: must be 1 to {MAX_CPUS}")]
    Cpus(u16),
    /// Two devices claim the same ports or addresses.
    #[error("device layout: {0}")]
    Layout(#[from] Overlap),
    /// The PCI devices.
    #[error(transparent)]
    Pci(#[from] PciError),
}

/// Most vCPUs that ACPI tables and 8-bit I/O APIC destinations can name here.
pub const MAX_CPUS: u16 = 255;

/// One machine event at a time: the first that the guest caused stands until it is taken.
#[derive(Default)]
struct EventSlot {
    event: Mutex<Option<MachineEvent>>,
    interrupts: Mutex<Option<std::sync::Weak<Interrupts>>>,
}

impl EventSlot {
    fn take(&self) -> Option<MachineEvent> {
        lock(&self.event).take()
    }
}

impl EventSink for EventSlot {
    fn signal(&self, event: MachineEvent) {
        lock(&self.event).get_or_insert(event);
        let interrupts = lock(&self.interrupts).as_ref().and_then(std::sync::Weak::upgrade);
        if let Some(interrupts) = interrupts {
            interrupts.notify_all();
        }
    }
}

/// The 8259s' ports.
struct PicPorts {
    interrupts: Arc<Interrupts>,
    base: u16,
}

impl PioDevice for PicPorts {
    fn read(&mut self, offset: u16, _size: u8) -> u32 {
        self.interrupts.pic_read(self.base + offset).into()
    }
    fn write(&mut self, offset: u16, _size: u8, value: u32) {
        self.interrupts.pic_write(self.base + offset, value as u8);
    }
}

/// The I/O APIC's register window: 32-bit registers, 16 bytes apart.
struct IoApicWindow(Arc<Interrupts>);

impl MmioDevice for IoApicWindow {
    fn read(&mut self, offset: u64, _size: u8) -> u64 {
        self.0.ioapic_read(offset & 0xff).into()
    }
    fn write(&mut self, offset: u64, _size: u8, value: u64) {
        self.0.ioapic_write(offset & 0xff, value as u32);
    }
}

/// A device together with the time of its next [`TimedDevice::tick`], kept where it can be read without
/// the device's lock: the vCPU loop asks at every exit.
struct Scheduled<D> {
    device: D,
    due: Arc<AtomicU64>,
}

impl<D: TimedDevice> Scheduled<D> {
    fn new(device: D) -> Self {
        let scheduled = Self { device, due: Arc::new(AtomicU64::new(u64::MAX)) };
        scheduled.reschedule();
        scheduled
    }

    fn reschedule(&self) {
        self.due.store(self.device.next_deadline().unwrap_or(u64::MAX), Ordering::Release);
    }
}

impl<D: TimedDevice + PioDevice> PioDevice for Scheduled<D> {
    fn read(&mut self, offset: u16, size: u8) -> u32 {
        let value = self.device.read(offset, size);
        self.reschedule();
        value
    }
    fn write(&mut self, offset: u16, size: u8, value: u32) {
        self.device.write(offset, size, value);
        self.reschedule();
    }
}

impl<D: TimedDevice> TimedDevice for Scheduled<D> {
    fn tick(&mut self, now: u64) {
        self.device.tick(now);
        self.reschedule();
    }
    fn next_deadline(&self) -> Option<u64> {
        self.device.next_deadline()
    }
}

/// A timed device as the machine's clockwork sees it.
struct Timer {
    device: Arc<Mutex<dyn TimedDevice>>,
    due: Arc<AtomicU64>,
}

impl Timer {
    fn new<D: TimedDevice + 'static>(device: &Arc<Mutex<Scheduled<D>>>) -> Self {
        Self { device: device.clone(), due: lock(device).due.clone() }
    }
}

/// Port 0x61, which belongs to the 8254's channel 2.
struct Port61(Arc<Mutex<Scheduled<Pit>>>);

impl PioDevice for Port61 {
    fn read(&mut self, _offset: u16, _size: u8) -> u32 {
        lock(&self.0).device.read_port61().into()
    }
    fn write(&mut self, _offset: u16, _size: u8, value: u32) {
        lock(&self.0).device.write_port61(value as u8);
    }
}

/// A part of a device whose ports lie apart, `offset` ports from its first.
struct PortsAt<D> {
    device: Arc<Mutex<D>>,
    offset: u16,
}

impl<D: PioDevice> PioDevice for PortsAt<D> {
    fn read(&mut self, offset: u16, size: u8) -> u32 {
        lock(&self.device).read(self.offset + offset, size)
    }
    fn write(&mut self, offset: u16, size: u8, value: u32) {
        lock(&self.device).write(self.offset + offset, size, value);
    }
}

/// A serial port whose other end is a thread that waits for space.
struct SerialLine {
    first_port: u16,
    uart: Arc<Mutex<Scheduled<Serial>>>,
    space: Condvar,
    /// How many threads wait for `space`, so that a port access need not wake nobody.
    waiters: AtomicUsize,
}

impl SerialLine {
    fn new(first_port: u16, uart: Serial) -> Self {
        let uart = shared(Scheduled::new(uart));
        Self { first_port, uart, space: Condvar::new(), waiters: AtomicUsize::new(0) }
    }

    /// An access to the port may have made space for input.
    fn accessed(&self, port: u16) {
        let ours = (self.first_port..self.first_port + 8).contains(&port);
        if ours && self.waiters.load(Ordering::SeqCst) != 0 {
            self.space.notify_all();
        }
    }

    fn push(&self, bytes: &[u8]) -> usize {
        lock(&self.uart).device.push_input(bytes)
    }

    fn wait_space(&self, timeout: Duration) -> bool {
        self.waiters.fetch_add(1, Ordering::SeqCst);
        let guard = lock(&self.uart);
        let result = self.space.wait_timeout_while(guard, timeout, |s| s.device.input_space() == 0);
        self.waiters.fetch_sub(1, Ordering::SeqCst);
        let (guard, _) = result.unwrap_or_else(PoisonError::into_inner);
        guard.device.input_space() > 0
    }

    fn flush(&self) {
        lock(&self.uart).device.flush();
    }
}

/// The machine around the vCPUs. All methods take `&self` and may be called from any
/// thread.
pub struct Pc {
    clock: Arc<dyn Clock>,
    interrupts: Arc<Interrupts>,
    pio: PioBus,
    mmio: MmioBus,
    pci: Arc<PciRoot>,
    timers: Vec<Timer>,
    console: SerialLine,
    channel: Option<SerialLine>,
    power: Arc<Mutex<Scheduled<PowerManagement>>>,
    events: Arc<EventSlot>,
    /// The I/O APIC does not keep it alive.
    iommu: Option<Arc<RemappingUnit>>,
}

impl Pc {
    /// Builds the machine. `tscs` gives each vCPU's TSC, in order of vCPUs; the number of
    /// vCPUs is `config.cpus`, and a missing TSC is the last one given, or the clock itself in
    /// nanoseconds.
    ///
    /// # Errors
    /// [`PcError::Cpus`] for an impossible number of vCPUs.
    pub fn new(config: PcConfig, tscs: &[Arc<dyn TscSource>]) -> Result<Self, PcError> {
        if config.cpus == 0 || config.cpus > MAX_CPUS {
            return Err(PcError::Cpus(config.cpus));
        }
        let clock = config.clock.unwrap_or_else(|| Arc::new(MonotonicClock::new()));
        let default_tsc: Arc<dyn TscSource> = Arc::new(devices::ClockTsc::new(clock.clone(), 1_000_000_000));
        let lapics = (0..config.cpus).map(|cpu| {
            let lapic = LapicConfig {
                id: cpu.into(),
                bsp: cpu == 0,
                timer_hz: config.lapic_timer_hz,
                max_phys_bits: config.max_phys_bits,
                x2apic: true,
            };
            let tsc = tscs.get(usize::from(cpu)).or(tscs.last()).unwrap_or(&default_tsc);
            LocalApic::new(lapic, clock.clone(), tsc.clone())
        });
        let interrupts = Interrupts::new(lapics.collect());
        // Firmware would leave the bootstrap processor in virtual wire mode.
        interrupts.with_lapic(0, LocalApic::enter_virtual_wire_mode);

        let iommu = config.iommu.as_ref();
        let iommu = iommu.map(|o| RemappingUnit::new(o, config.max_phys_bits, interrupts.clone()));

        let events = Arc::new(EventSlot::default());
        *lock(&events.interrupts) = Some(Arc::downgrade(&interrupts));
        let sink: Arc<dyn EventSink> = events.clone();
        let utc_ns = config.utc_ns.unwrap_or_else(host_utc_ns);
        let ram = RamLayout::new(config.ram_bytes);
        let ram_high: u64 = ram.regions.iter().skip(1).map(|r| r.len).sum();
        let ram_low = config.ram_bytes.saturating_sub(ram_high);

        let pit = shared(Scheduled::new(Pit::new(clock.clone(), interrupts.isa_line(0))));
        let rtc = Rtc::new(clock.clone(), interrupts.isa_line(8), utc_ns, ram_low, ram_high);
        let rtc = shared(Scheduled::new(rtc));
        let serial = Serial::new(clock.clone(), interrupts.isa_line(SERIAL_IRQ), config.console);
        let console = SerialLine::new(SERIAL_PORT, serial);
        let channel = config.channel.map(|out| {
            let serial = Serial::new(clock.clone(), interrupts.isa_line(CHANNEL_IRQ), out);
            SerialLine::new(CHANNEL_PORT, serial)
        });
        let power = PowerManagement::new(clock.clone(), interrupts.isa_line(SCI_IRQ), sink.clone());
        let power = shared(Scheduled::new(power));
        let i8042 = shared(I8042::new(sink.clone(), interrupts.isa_line(1), interrupts.isa_line(12)));

        let mut pio = PioBus::default();
        for base in [0x20, 0xa0, 0x4d0] {
            pio.claim(base, 2, PortWidth::Byte, shared(PicPorts { interrupts: interrupts.clone(), base }))?;
        }
        pio.claim(0x40, 4, PortWidth::Byte, pit.clone())?;
        pio.claim(0x61, 1, PortWidth::Byte, shared(Port61(pit.clone())))?;
        for offset in [0, 4] {
            let port = PortsAt { device: i8042.clone(), offset };
            pio.claim(0x60 + offset, 1, PortWidth::Byte, shared(port))?;
        }
        // The reset register lies between PCI's two.
        let windows = pci_windows(&ram);
        let pci = Arc::new(pci::build(windows, config.devices, &interrupts, iommu.as_ref())?);
        let ports = shared(PciPorts(pci.clone()));
        for (port, count) in [(ADDRESS_PORT, 1), (DATA_PORT, DATA_PORTS)] {
            let part = PortsAt { device: ports.clone(), offset: port - ADDRESS_PORT };
            pio.claim(port, count, PortWidth::Any, shared(part))?;
        }
        pio.claim(0x70, 2, PortWidth::Byte, rtc.clone())?;
        pio.claim(0x80, 1, PortWidth::Byte, shared(PostCode::default()))?;
        pio.claim(0x92, 1, PortWidth::Byte, shared(Port92::new(sink.clone())))?;
        pio.claim(RESET_PORT, 1, PortWidth::Byte, shared(ResetControl::new(sink.clone())))?;
        for line in [Some(&console), channel.as_ref()].into_iter().flatten() {
            pio.claim(line.first_port, 8, PortWidth::Byte, line.uart.clone())?;
        }
        let fw_cfg = FwCfg::new(config.ram_bytes, config.cpus, &config.cmdline);
        pio.claim(FW_CFG_PORT, FW_CFG_PORTS, PortWidth::Any, shared(fw_cfg))?;
        pio.claim(PM_BASE, PM_PORTS, PortWidth::Any, power.clone())?;

        let mut mmio = MmioBus::default();
        mmio.claim(IOAPIC_BASE, IOAPIC_SIZE, shared(IoApicWindow(interrupts.clone())))?;

        if let Some(unit) = &iommu {
            mmio.claim(VTD_BASE, iommu_emu::spec::reg::WINDOW, shared(VtdWindow(unit.clone())))?;
        }
        if config.debug_exit {
            let device = DebugExit::new(sink);
            pio.claim(DEBUG_EXIT_PORT, DEBUG_EXIT_PORTS, PortWidth::Any, shared(device))?;
        }
        if config.testdev {
            let lines = (0..u32::from(IRQ_PORTS)).map(|irq| interrupts.isa_line(irq)).collect();
            pio.claim(LATCH_PORT, LATCH_PORTS, PortWidth::Any, shared(TestLatch::default()))?;
            pio.claim(IRQ_PORT, IRQ_PORTS, PortWidth::Any, shared(TestIrqs::new(lines)))?;
            mmio.claim(SCRATCH_BASE, SCRATCH_SIZE, shared(TestScratch::new()))?;
        }
        let mut timers =
            vec![Timer::new(&pit), Timer::new(&rtc), Timer::new(&console.uart), Timer::new(&power)];
        timers.extend(channel.as_ref().map(|c| Timer::new(&c.uart)));
        Ok(Self { clock, interrupts, pio, mmio, pci, timers, console, channel, power, events, iommu })
    }

    // ---- buses --------------------------------------------------------------------------

    /// IN: `size` (1, 2 or 4) bytes from `port`, zero-extended.
    pub fn pio_read(&self, port: u16, size: u8) -> u32 {
        let value = self.pio.read(port, size);
        self.wake_input(port);
        value
    }

    /// OUT: the low `size` (1, 2 or 4) bytes of `value` to `port`.
    pub fn pio_write(&self, port: u16, size: u8, value: u32) {
        self.pio.write(port, size, value);
        self.wake_input(port);
    }

    /// An access to a serial port may have made space for input.
    fn wake_input(&self, port: u16) {
        self.console.accessed(port);
        if let Some(channel) = &self.channel {
            channel.accessed(port);
        }
    }

    /// A load by vCPU `cpu` of `size` (1, 2, 4 or 8) bytes from what is not RAM, zero-extended.
    pub fn mmio_read(&self, cpu: usize, gpa: L1Gpa, size: u8) -> u64 {
        match self.interrupts.lapic_mmio_read(cpu, gpa.0, size) {
            Some(value) => value & size_mask(size),
            None if self.mmio.has(gpa.0) => self.mmio.read(gpa.0, size),
            None => self.pci.mmio_read(gpa.0, size) & size_mask(size),
        }
    }

    /// A store by vCPU `cpu` to what is not RAM.
    pub fn mmio_write(&self, cpu: usize, gpa: L1Gpa, size: u8, value: u64) {
        if self.interrupts.lapic_mmio_write(cpu, gpa.0, size, value) {
            return;
        }
        if self.mmio.has(gpa.0) {
            self.mmio.write(gpa.0, size, value);
        } else {
            self.pci.mmio_write(gpa.0, size, value & size_mask(size));
        }
    }

    // ---- time ---------------------------------------------------------------------------

    /// Nanoseconds since power-on.
    pub fn now_ns(&self) -> u64 {
        self.clock.now_ns()
    }

    /// Does what is due at `now` in every device. The vCPU loop calls it before it looks for interrupts once
    /// [`Self::next_deadline`] has passed; calling it earlier costs little and does nothing.
    pub fn tick(&self, now: u64) {
        self.interrupts.tick(now);
        for timer in &self.timers {
            if timer.due.load(Ordering::Acquire) <= now {
                lock(&timer.device).tick(now);
            }
        }
    }

    /// When [`Self::tick`] is next needed, in nanoseconds since power-on.
    pub fn next_deadline(&self) -> Option<u64> {
        let devices =
            self.timers.iter().map(|t| t.due.load(Ordering::Acquire)).filter(|due| *due != u64::MAX);
        devices.chain(self.interrupts.next_deadline()).min()
    }

    /// The IOMMU, if there is one.
    pub fn iommu(&self) -> Option<&Arc<RemappingUnit>> {
        self.iommu.as_ref()
    }

    // ---- interrupts ---------------------------------------------------------------------

    /// The interrupt controllers, for what is not offered here.
    pub fn interrupts(&self) -> &Arc<Interrupts> {
        &self.interrupts
    }

    /// Sets who is told, by vCPU index, that a vCPU may have gained something to take (interrupt,
    /// NMI, INIT, start-up IPI, machine event). Called from any thread, often with nothing new; must not
    /// call back into the machine. Only the first call counts; returns whether this was it.
    pub fn set_notifier(&self, notifier: Notifier) -> bool {
        self.interrupts.set_notifier(notifier)
    }

    /// Whether vCPU `cpu` has a maskable interrupt to take now.
    pub fn has_interrupt(&self, cpu: usize) -> bool {
        self.interrupts.has_interrupt(cpu)
    }

    /// Takes that interrupt: its vector.
    pub fn take_interrupt(&self, cpu: usize) -> Option<u8> {
        self.interrupts.take_interrupt(cpu)
    }

    /// Whether an NMI waits for vCPU `cpu`.
    pub fn nmi_pending(&self, cpu: usize) -> bool {
        self.interrupts.with_lapic(cpu, |l| l.nmi_pending()).unwrap_or(false)
    }

    /// Takes that NMI.
    pub fn take_nmi(&self, cpu: usize) -> bool {
        self.interrupts.with_lapic(cpu, LocalApic::take_nmi).unwrap_or(false)
    }

    /// RDMSR of a local-APIC MSR ([`LocalApic::is_apic_msr`]).
    ///
    /// # Errors
    /// [`GpFault`] where the access faults.
    pub fn read_msr(&self, cpu: usize, msr: u32) -> Result<u64, GpFault> {
        self.interrupts.read_msr(cpu, msr)
    }

    /// WRMSR of a local-APIC MSR.
    ///
    /// # Errors
    /// [`GpFault`] where the access faults.
    pub fn write_msr(&self, cpu: usize, msr: u32, value: u64) -> Result<(), GpFault> {
        self.interrupts.write_msr(cpu, msr, value)
    }

    /// CR8 of vCPU `cpu`: `TPR[7:4]`.
    pub fn cr8(&self, cpu: usize) -> u8 {
        self.interrupts.with_lapic(cpu, |l| l.cr8()).unwrap_or(0)
    }

    /// Sets CR8 of vCPU `cpu`; only the low four bits count.
    pub fn set_cr8(&self, cpu: usize, value: u8) {
        self.interrupts.with_lapic(cpu, |l| l.set_cr8(value & 0xf));
    }

    // ---- the outside --------------------------------------------------------------------

    /// Takes what the guest asked of the machine as a whole. Output that still waits is handed on
    /// first.
    pub fn take_event(&self) -> Option<MachineEvent> {
        let event = self.events.take()?;
        self.flush_console();
        Some(event)
    }

    /// Queues console input; returns how many bytes were taken. The rest is for another time:
    /// see [`Self::wait_input_space`].
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        self.console.push(bytes)
    }

    /// Waits, at most `timeout`, until [`Self::push_input`] can take something. Returns whether it can.
    pub fn wait_input_space(&self, timeout: Duration) -> bool {
        self.console.wait_space(timeout)
    }

    /// As [`Self::push_input`], for the second serial port; without one everything is taken and dropped.
    pub fn push_channel_input(&self, bytes: &[u8]) -> usize {
        self.channel.as_ref().map_or(bytes.len(), |c| c.push(bytes))
    }

    /// As [`Self::wait_input_space`], for the second serial port.
    pub fn wait_channel_space(&self, timeout: Duration) -> bool {
        self.channel.as_ref().is_none_or(|c| c.wait_space(timeout))
    }

    /// Hands waiting output of the serial ports on.
    pub fn flush_console(&self) {
        self.console.flush();
        if let Some(channel) = &self.channel {
            channel.flush();
        }
    }

    /// The user presses the power button.
    pub fn press_power_button(&self) {
        lock(&self.power).device.press_power_button();
    }

    /// The user presses an NMI button.
    pub fn press_nmi_button(&self) {
        self.interrupts.pulse_nmi();
    }
}

fn shared<T>(device: T) -> Arc<Mutex<T>> {
    Arc::new(Mutex::new(device))
}

/// The addresses that PCI devices may have in a PC with `ram`.
pub fn pci_windows(ram: &RamLayout) -> PciWindows {
    let ends = ram.regions.iter().map(|r| r.start.0.saturating_add(r.len));
    PciWindows::after_ram(ends.max().unwrap_or(0))
}

fn host_utc_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
