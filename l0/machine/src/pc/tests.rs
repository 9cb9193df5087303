//! The machine as a whole: wiring, and that nothing a guest does to it can hurt L0.

use std::sync::atomic::AtomicBool;

use devices::ManualClock;
use devices::lapic::{MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC_FIRST, MSR_X2APIC_LAST};

use super::*;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn pc_with(change: impl FnOnce(&mut PcConfig)) -> (Pc, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::default());
    let mut config = PcConfig { clock: Some(clock.clone()), utc_ns: Some(0), ..PcConfig::default() };
    change(&mut config);
    (Pc::new(config, &[]).unwrap(), clock)
}

fn pc() -> (Pc, Arc<ManualClock>) {
    pc_with(|_| {})
}

#[test]
fn cpus_are_checked() {
    for cpus in [0, 256] {
        let config = PcConfig { cpus, ..PcConfig::default() };
        assert!(matches!(Pc::new(config, &[]), Err(PcError::Cpus(n)) if n == cpus));
    }
}

#[test]
fn every_way_to_end_the_machine() {
    let (pc, _) = pc_with(|c| c.debug_exit = true);
    type Write = (u16, u8, u32);
    let ways: &[(&[Write], MachineEvent)] = &[
        (&[(0x604, 2, 0x3400)], MachineEvent::PowerOff),
        (&[(0xcf9, 1, 2), (0xcf9, 1, 6)], MachineEvent::Reset),
        (&[(0x64, 1, 0xfe)], MachineEvent::Reset),
        (&[(0x92, 1, 1)], MachineEvent::Reset),
        (&[(0xf4, 4, 0x10)], MachineEvent::DebugExit(0x21)),
    ];
    for (writes, event) in ways {
        assert_eq!(pc.take_event(), None);
        writes.iter().for_each(|(port, size, value)| pc.pio_write(*port, *size, *value));
        assert_eq!(pc.take_event(), Some(*event));
    }
    // The first of several stands.
    pc.pio_write(0x64, 1, 0xfe);
    pc.pio_write(0x604, 2, 0x3400);
    assert_eq!(pc.take_event(), Some(MachineEvent::Reset));
}

#[test]
fn options_leave_their_devices_out() {
    let (pc, _) = pc();
    pc.pio_write(0xf4, 1, 0);
    pc.pio_write(0xe0, 4, 0x1234);
    assert_eq!(pc.take_event(), None);
    assert_eq!(pc.pio_read(0xe0, 4), 0xffff_ffff);
    assert_eq!(pc.mmio_read(0, L1Gpa(0xff00_0000), 8), u64::MAX);
}

#[test]
fn pci_configuration_and_the_reset_register_share_a_doubleword() {
    let (pc, _) = pc();
    pc.pio_write(0xcf8, 4, 0x8000_0600);
    assert_eq!(pc.take_event(), None);
    pc.pio_write(0xcf8, 4, 0x8000_0000);
    assert_eq!((pc.pio_read(0xcf8, 4), pc.pio_read(0xcfc, 4)), (0x8000_0000, 0x0d57_8086));
    assert_eq!(pc.pio_read(0xcfe, 2), 0x0d57);
    pc.pio_write(0xcf9, 1, 6);
    assert_eq!(pc.take_event(), Some(MachineEvent::Reset));
}

#[test]
fn the_test_device_drives_interrupt_lines() {
    let (pc, _) = pc_with(|c| c.testdev = true);
    // Pin 14, edge, vector 0x55 to APIC 0.
    for (select, value) in [(0x10 + 28 + 1, 0), (0x10 + 28, 0x55)] {
        pc.mmio_write(0, L1Gpa(IOAPIC_BASE), 4, select);
        pc.mmio_write(0, L1Gpa(IOAPIC_BASE + 0x10), 4, value);
    }
    pc.pio_write(0x200e, 1, 1);
    pc.pio_write(0x200e, 1, 0);
    assert!(pc.has_interrupt(0));
    assert_eq!(pc.take_interrupt(0), Some(0x55));
    pc.mmio_write(0, L1Gpa(SCRATCH_BASE + 8), 8, 0x1122_3344_5566_7788);
    assert_eq!(pc.mmio_read(0, L1Gpa(SCRATCH_BASE + 9), 4), 0x4455_6677);
}

#[test]
fn the_pit_interrupts_through_the_8259_and_wakes_the_vcpu() {
    let (pc, clock) = pc();
    let woken = Arc::new(AtomicBool::new(false));
    let flag = woken.clone();
    pc.set_notifier(Box::new(move |cpu| {
        assert_eq!(cpu, 0);
        flag.store(true, Ordering::SeqCst);
    }));
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
        pc.pio_write(port, 1, value);
    }
    for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
        pc.pio_write(port, 1, value);
    }
    // Programming mode 2 raises OUT; take that edge.
    assert_eq!(pc.take_interrupt(0), Some(0x20));
    pc.pio_write(0x20, 1, 0x20);
    woken.store(false, Ordering::SeqCst);
    let due = pc.next_deadline().unwrap();
    clock.set_ns(due);
    assert!(!pc.has_interrupt(0));
    pc.tick(due);
    assert!(woken.load(Ordering::SeqCst));
    assert_eq!(pc.take_interrupt(0), Some(0x20));
    assert!(pc.next_deadline().unwrap() > due);
}

#[test]
fn tsc_deadline_by_msr() {
    let (pc, clock) = pc();
    pc.write_msr(0, MSR_APIC_BASE, 0xfee0_0d00).unwrap();
    pc.write_msr(0, 0x832, 0x4_00ec).unwrap();
    pc.write_msr(0, MSR_TSC_DEADLINE, 5_000).unwrap();
    assert_eq!(pc.next_deadline(), Some(5_000));
    clock.set_ns(5_000);
    pc.tick(5_000);
    pc.set_cr8(0, 0xe);
    assert!(!pc.has_interrupt(0), "class 14 is held back by CR8 = 14");
    pc.set_cr8(0, 0xd);
    assert_eq!((pc.cr8(0), pc.take_interrupt(0)), (0xd, Some(0xec)));
    // The page has gone from memory in x2APIC mode.
    assert_eq!(pc.mmio_read(0, L1Gpa(0xfee0_0030), 4), 0xffff_ffff);
}

#[test]
fn console_both_ways_with_back_pressure() {
    let sink = Sink::default();
    let (pc, _) = pc_with(|c| c.console = Box::new(sink.clone()));
    b"login: ".iter().for_each(|byte| pc.pio_write(0x3f8, 1, u32::from(*byte)));
    pc.flush_console();
    assert_eq!(*lock(&sink.0), b"login: ");

    let pc = Arc::new(pc);
    let taken = pc.push_input(&[b'x'; 10_000]);
    assert!(taken > 0 && taken < 10_000);
    assert!(!pc.wait_input_space(Duration::ZERO));
    let waiter = {
        let pc = pc.clone();
        std::thread::spawn(move || pc.wait_input_space(Duration::from_secs(60)))
    };
    // The guest opens the port and reads; that wakes whoever waits.
    pc.pio_write(0x3fc, 1, 0x0b);
    assert_eq!(pc.pio_read(0x3f8, 1), u32::from(b'x'));
    assert!(waiter.join().unwrap());
}

#[test]
fn the_power_button_raises_the_sci() {
    let (pc, _) = pc();
    for (select, value) in [(0x10 + 18 + 1, 0), (0x10 + 18, 0x8061)] {
        pc.mmio_write(0, L1Gpa(IOAPIC_BASE), 4, select);
        pc.mmio_write(0, L1Gpa(IOAPIC_BASE + 0x10), 4, value);
    }
    pc.pio_write(0x602, 2, 0x100);
    pc.press_power_button();
    assert_eq!(pc.take_interrupt(0), Some(0x61));
    pc.press_nmi_button();
    assert!(pc.nmi_pending(0) && pc.take_nmi(0) && !pc.nmi_pending(0));
}

/// xorshift64*, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
    /// Values that find edges more often than uniform ones do.
    fn value(&mut self) -> u64 {
        let near = self.below(3);
        match self.below(5) {
            0 => near,
            1 => u64::MAX.wrapping_sub(near),
            2 => 1u64 << self.below(64),
            3 => self.below(256),
            _ => self.next(),
        }
    }
}

/// One guest access of any kind anywhere, most of them where devices are.
fn random_access(pc: &Pc, random: &mut Random) {
    const PORTS: &[u16] = &[
        0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x60, 0x61, 0x64, 0x70, 0x71, 0x80,
        0x92, 0xcf8, 0xcf9, 0xcfc, 0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x3fe, 0x3ff, 0x510, 0x511,
        0x600, 0x602, 0x604, 0x608, 0xe0, 0xe4, 0xe8, 0xf4, 0x2000, 0x2017,
    ];
    let cpu = random.below(3) as usize;
    let value = random.value();
    let port = match random.below(8) {
        0 => random.next() as u16,
        n => random.pick(PORTS).wrapping_add(if n == 1 { random.below(8) as u16 } else { 0 }),
    };
    let lapic_page = pc.interrupts().with_lapic(0, |l| l.mmio_page()).flatten().unwrap_or(0xfee0_0000);
    let gpa = match random.below(6) {
        0 => random.value(),
        1 => SCRATCH_BASE.wrapping_add(random.below(SCRATCH_SIZE + 16)),
        2 | 3 => IOAPIC_BASE + random.pick(&[0, 0x10, 0x40]),
        4 => lapic_page + (random.below(0x100) << 4),
        _ => lapic_page + random.below(0x1000),
    };
    let msr = match random.below(8) {
        0 => MSR_TSC_DEADLINE,
        1 => MSR_APIC_BASE,
        2 => random.next() as u32,
        _ => MSR_X2APIC_FIRST + random.below(u64::from(MSR_X2APIC_LAST - MSR_X2APIC_FIRST + 1)) as u32,
    };
    // The base moves and changes mode by itself rarely; let it.
    let apic_base = 0xfee0_0000 | random.pick(&[0, 0x100, 0x800, 0x900, 0xc00, 0xd00]);
    match random.below(8) {
        0 | 1 => pc.pio_write(port, random.pick(&[1, 2, 4]), value as u32),
        2 => {
            let size = random.pick(&[1, 2, 4]);
            let read = pc.pio_read(port, size);
            assert_eq!(u64::from(read) & !size_mask(size), 0, "port {port:#x} gave more than {size} bytes");
        }
        3 => pc.mmio_write(cpu, L1Gpa(gpa), random.pick(&[1, 2, 4, 8]), value),
        4 => {
            let size = random.pick(&[1, 2, 4, 8]);
            let read = pc.mmio_read(cpu, L1Gpa(gpa), size);
            assert_eq!(read & !size_mask(size), 0, "{gpa:#x} gave more than {size} bytes");
        }
        5 => {
            let value = if msr == MSR_APIC_BASE { apic_base } else { value };
            // Either outcome is right here; which one, the local APIC's tests say.
            let _ = pc.write_msr(cpu, msr, value);
        }
        6 => {
            let _ = pc.read_msr(cpu, msr);
        }
        _ => match random.below(6) {
            0 => pc.set_cr8(cpu, value as u8),
            1 => pc.press_power_button(),
            2 => pc.press_nmi_button(),
            3 => {
                pc.push_input(&value.to_le_bytes());
            }
            _ => {
                pc.take_interrupt(cpu);
            }
        },
    }
}

/// Any access, any size, any order: no panic, no value wider than asked for, time always moves on (a device whose
/// deadline never passes would keep L0 busy for ever), and nothing is kept without bound.
#[test]
fn nothing_a_guest_does_hurts() {
    for seed in [1, 0x1234_5678_9abc_def0, u64::MAX] {
        let (pc, clock) = pc_with(|c| {
            c.cpus = 2;
            c.debug_exit = true;
            c.testdev = true;
        });
        let mut random = Random(seed);
        for step in 0..200_000u32 {
            random_access(&pc, &mut random);
            let now = clock.now_ns();
            if random.below(16) == 0 {
                pc.tick(now);
                let next = pc.next_deadline();
                assert!(next.is_none_or(|at| at > now), "step {step}: due {next:?} again at {now}");
                let ahead = next.unwrap_or(now).saturating_sub(now);
                // To the next deadline, a random bit on, or, rarely, days on.
                let pass = match random.below(64) {
                    0 => random.below(1 << 50),
                    1..32 => ahead.min(1 << 32),
                    _ => random.below(100_000),
                };
                clock.advance_ns(pass);
            }
            pc.take_event();
            pc.take_nmi(0);
        }
        assert!(pc.push_input(&[0; 1 << 16]) <= devices::serial::INPUT_QUEUE);
    }
}
