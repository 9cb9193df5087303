//! Expectations are from Intel SDM Vol. 3A ch. 11, section by section.

use super::*;
use crate::clock::{ClockTsc, ManualClock};

const TSC_HZ: u64 = 2_000_000_000;
const TIMER_HZ: u64 = 1_000_000_000;

fn apic_with(id: u32) -> (LocalApic, Arc<ManualClock>) {
    let clock = Arc::new(ManualClock::default());
    let tsc = Arc::new(ClockTsc::new(clock.clone(), TSC_HZ));
    let config = LapicConfig { id, timer_hz: TIMER_HZ, ..LapicConfig::default() };
    (LocalApic::new(config, clock.clone(), tsc), clock)
}

/// In xAPIC mode, software-enabled.
fn xapic() -> (LocalApic, Arc<ManualClock>) {
    let (mut apic, clock) = apic_with(0);
    set(&mut apic, REG_SVR, 0x1ff);
    (apic, clock)
}

/// In x2APIC mode, software-enabled.
fn x2apic(id: u32) -> (LocalApic, Arc<ManualClock>) {
    let (mut apic, clock) = apic_with(id);
    set_msr(&mut apic, MSR_APIC_BASE, DEFAULT_APIC_BASE | BASE_BSP | BASE_EN | BASE_EXTD);
    set_msr(&mut apic, msr(REG_SVR), 0x1ff);
    (apic, clock)
}

fn msr(reg: u16) -> u32 {
    MSR_X2APIC_FIRST + u32::from(reg)
}

fn store(apic: &mut LocalApic, reg: u16, value: u32) -> ApicAction {
    apic.mmio_write(u64::from(reg) << 4, 4, value.into())
}

/// A store that asks nothing of the rest of the machine.
fn set(apic: &mut LocalApic, reg: u16, value: u32) {
    assert_eq!(store(apic, reg, value), ApicAction::None);
}

/// A WRMSR that succeeds and asks nothing of the rest of the machine.
fn set_msr(apic: &mut LocalApic, msr: u32, value: u64) {
    assert_eq!(wrmsr(apic, msr, value), Ok(ApicAction::None));
}

fn load(apic: &mut LocalApic, reg: u16) -> u32 {
    apic.mmio_read(u64::from(reg) << 4, 4) as u32
}

fn wrmsr(apic: &mut LocalApic, msr: u32, value: u64) -> Result<ApicAction, GpFault> {
    apic.write_msr(msr, value)
}

fn take(apic: &mut LocalApic) -> Option<u8> {
    let vector = apic.pending_vector()?;
    apic.ack(vector);
    Some(vector)
}

#[test]
fn power_up_state() {
    // §11.4.7.1
    let (mut apic, _) = apic_with(3);
    assert_eq!(apic.mode(), ApicMode::XApic);
    assert_eq!(apic.mmio_page(), Some(0xfee0_0000));
    assert_eq!(load(&mut apic, REG_ID), 3 << 24);
    assert_eq!(load(&mut apic, REG_VERSION), 0x0106_0015);
    assert_eq!(load(&mut apic, REG_DFR), u32::MAX);
    assert_eq!(load(&mut apic, REG_SVR), 0xff);
    for reg in [REG_LVT_CMCI, REG_LVT_TIMER, REG_LVT_THERMAL, REG_LVT_PERF, REG_LVT_LINT0, REG_LVT_LINT1] {
        assert_eq!(load(&mut apic, reg), 0x1_0000, "LVT register {reg:#x}");
    }
    for reg in [REG_TPR, REG_LDR, REG_ICR, REG_INITIAL_COUNT, REG_CURRENT_COUNT, REG_DIVIDE] {
        assert_eq!(load(&mut apic, reg), 0, "register {reg:#x}");
    }
}

#[test]
fn apic_base_transitions() {
    // Figure 11-26 and §11.12.5: the only ways are disabled ↔ xAPIC → x2APIC → disabled.
    const DISABLED: u64 = DEFAULT_APIC_BASE;
    const XAPIC: u64 = DEFAULT_APIC_BASE | BASE_EN;
    const X2APIC: u64 = DEFAULT_APIC_BASE | BASE_EN | BASE_EXTD;
    const INVALID: u64 = DEFAULT_APIC_BASE | BASE_EXTD;
    let paths: &[(&[u64], bool)] = &[
        (&[XAPIC], true),
        (&[DISABLED], true),
        (&[X2APIC], true),
        (&[INVALID], false),
        (&[DISABLED, XAPIC], true),
        (&[DISABLED, X2APIC], false),
        (&[DISABLED, INVALID], false),
        (&[X2APIC, X2APIC], true),
        (&[X2APIC, XAPIC], false),
        (&[X2APIC, INVALID], false),
        (&[X2APIC, DISABLED], true),
        (&[X2APIC, DISABLED, X2APIC], false),
        (&[X2APIC, DISABLED, XAPIC, X2APIC], true),
    ];
    for (path, allowed) in paths {
        let (mut apic, _) = apic_with(0);
        let (last, before) = path.split_last().unwrap();
        for value in before {
            set_msr(&mut apic, MSR_APIC_BASE, *value);
        }
        assert_eq!(wrmsr(&mut apic, MSR_APIC_BASE, *last).is_ok(), *allowed, "{path:x?}");
        let expected = if *allowed { *last } else { before.last().copied().unwrap_or(XAPIC | BASE_BSP) };
        assert_eq!(apic.read_msr(MSR_APIC_BASE), Ok(expected), "{path:x?}");
    }
}

#[test]
fn apic_base_reserved_bits_fault() {
    let (mut apic, _) = apic_with(0);
    for bit in [0, 1, 7, 9, 46, 52, 63] {
        let value = DEFAULT_APIC_BASE | BASE_EN | 1 << bit;
        assert_eq!(wrmsr(&mut apic, MSR_APIC_BASE, value), Err(GpFault), "bit {bit}");
    }
    // Below the physical-address width the page may be anywhere.
    set_msr(&mut apic, MSR_APIC_BASE, 0x3fff_ffff_f000 | BASE_EN);
    assert_eq!(apic.mmio_page(), Some(0x3fff_ffff_f000));
}

#[test]
fn x2apic_needs_the_cpuid_bit() {
    let clock = Arc::new(ManualClock::default());
    let tsc = Arc::new(ClockTsc::new(clock.clone(), TSC_HZ));
    let config = LapicConfig { x2apic: false, ..LapicConfig::default() };
    let mut apic = LocalApic::new(config, clock, tsc);
    assert_eq!(wrmsr(&mut apic, MSR_APIC_BASE, DEFAULT_APIC_BASE | BASE_EN | BASE_EXTD), Err(GpFault));
}

#[test]
fn disabling_loses_state_and_removes_the_page() {
    // §11.4.3
    let (mut apic, _) = xapic();
    set(&mut apic, REG_TPR, 0x20);
    set_msr(&mut apic, MSR_APIC_BASE, DEFAULT_APIC_BASE);
    assert_eq!(apic.mmio_page(), None);
    assert!(!apic.set_irq(0x40, false));
    assert_eq!(apic.pending_vector(), None);
    set_msr(&mut apic, MSR_APIC_BASE, DEFAULT_APIC_BASE | BASE_EN);
    assert_eq!((load(&mut apic, REG_TPR), load(&mut apic, REG_SVR)), (0, 0xff));
}

#[test]
fn x2apic_mode_keeps_state_and_derives_ldr() {
    // §11.12.10.2: LDR = cluster (ID[19:4]) and 1 << ID[3:0].
    let (mut apic, _) = apic_with(0x25);
    set(&mut apic, REG_SVR, 0x1f0);
    set(&mut apic, REG_TPR, 0x30);
    set_msr(&mut apic, MSR_APIC_BASE, DEFAULT_APIC_BASE | BASE_EN | BASE_EXTD);
    assert_eq!(apic.mmio_page(), None);
    assert_eq!(apic.read_msr(msr(REG_ID)), Ok(0x25));
    assert_eq!(apic.read_msr(msr(REG_LDR)), Ok(0x0002_0020));
    assert_eq!(apic.read_msr(msr(REG_TPR)), Ok(0x30));
    assert_eq!(apic.read_msr(msr(REG_SVR)), Ok(0x1f0));
}

#[test]
fn x2apic_msrs_fault_outside_x2apic_mode() {
    let (mut apic, _) = xapic();
    for msr in MSR_X2APIC_FIRST..=MSR_X2APIC_LAST {
        assert_eq!(apic.read_msr(msr), Err(GpFault));
        assert_eq!(wrmsr(&mut apic, msr, 0), Err(GpFault));
    }
}

#[test]
fn x2apic_register_addresses() {
    // Table 11-6: which addresses can be read and written; everything else faults.
    let readable: Vec<u32> = [0x802, 0x803, 0x808, 0x80a, 0x80d, 0x80f]
        .into_iter()
        .chain(0x810..=0x827)
        .chain([0x828, 0x82f, 0x830])
        .chain(0x832..=0x839)
        .chain([0x83e])
        .collect();
    let writable: Vec<u32> = [0x808, 0x80b, 0x80f, 0x828, 0x82f, 0x830]
        .into_iter()
        .chain(0x832..=0x838)
        .chain([0x83e, 0x83f])
        .collect();
    for msr in MSR_X2APIC_FIRST..=MSR_X2APIC_LAST {
        let (mut apic, _) = x2apic(0);
        assert_eq!(apic.read_msr(msr).is_ok(), readable.contains(&msr), "read {msr:#x}");
        assert_eq!(wrmsr(&mut apic, msr, 0).is_ok(), writable.contains(&msr), "write {msr:#x}");
    }
}

#[test]
fn x2apic_reserved_bits_fault() {
    // §11.12.1.3, with the fields of Figures 11-8, 11-10, 11-18, 11-23 and 11-28.
    let defined: &[(u16, u64)] = &[
        (REG_TPR, 0xff),
        (REG_EOI, 0),
        (REG_ESR, 0),
        (REG_SVR, 0x13ff),
        (REG_ICR, 0xffff_ffff_000c_dfff),
        (REG_LVT_TIMER, 0x7_10ff),
        (REG_LVT_THERMAL, 0x1_17ff),
        (REG_LVT_PERF, 0x1_17ff),
        (REG_LVT_CMCI, 0x1_17ff),
        (REG_LVT_LINT0, 0x1_f7ff),
        (REG_LVT_LINT1, 0x1_f7ff),
        (REG_LVT_ERROR, 0x1_10ff),
        (REG_INITIAL_COUNT, 0xffff_ffff),
        (REG_DIVIDE, 0xb),
        (REG_SELF_IPI, 0xff),
    ];
    for (reg, bits) in defined {
        for bit in 0..64 {
            let (mut apic, _) = x2apic(0);
            let allowed = bits & 1 << bit != 0;
            assert_eq!(wrmsr(&mut apic, msr(*reg), 1 << bit).is_ok(), allowed, "{reg:#x} bit {bit}");
        }
    }
}

#[test]
fn priorities_decide_what_is_delivered() {
    // §11.8.3, §11.8.4
    let (mut apic, _) = xapic();
    assert!(apic.set_irq(0x31, false));
    assert!(apic.set_irq(0x52, false));
    assert!(apic.set_irq(0x51, false));
    assert_eq!(take(&mut apic), Some(0x52));
    // Same class as what is in service: held back.
    assert_eq!(apic.pending_vector(), None);
    assert_eq!(load(&mut apic, REG_PPR), 0x50);
    assert!(apic.set_irq(0x60, false));
    assert_eq!(take(&mut apic), Some(0x60));
    assert_eq!(store(&mut apic, REG_EOI, 0), ApicAction::None);
    assert_eq!(store(&mut apic, REG_EOI, 0), ApicAction::None);
    assert_eq!(take(&mut apic), Some(0x51));
    // TPR of the same class holds 0x31 back even after EOI; PPR then is the whole TPR.
    apic.set_tpr(0x37);
    assert_eq!(store(&mut apic, REG_EOI, 0), ApicAction::None);
    assert_eq!(load(&mut apic, REG_PPR), 0x37);
    assert_eq!(apic.pending_vector(), None);
    assert!(apic.has_request());
    apic.set_tpr(0x2f);
    assert_eq!(take(&mut apic), Some(0x31));
}

#[test]
fn a_performance_interrupt_masks_its_entry() {
    // §11.5.1
    let (mut apic, _) = xapic();
    assert!(!apic.performance_interrupt(), "masked after reset");
    set(&mut apic, REG_LVT_PERF, 0x71);
    assert!(apic.performance_interrupt());
    assert_eq!(load(&mut apic, REG_LVT_PERF), 0x1_0071);
    assert!(!apic.performance_interrupt(), "until software unmasks it");
    assert_eq!(take(&mut apic), Some(0x71));
    assert_eq!(take(&mut apic), None);
    set(&mut apic, REG_LVT_PERF, 0x400);
    assert!(apic.performance_interrupt());
    assert!(apic.take_nmi(), "delivery mode NMI");
    assert_eq!(load(&mut apic, REG_LVT_PERF), 0x1_0400);
}

#[test]
fn cr8_is_the_class_of_tpr() {
    // §11.8.6
    let (mut apic, _) = xapic();
    set(&mut apic, REG_TPR, 0x57);
    assert_eq!(apic.cr8(), 5);
    apic.set_cr8(0xa);
    assert_eq!(load(&mut apic, REG_TPR), 0xa0);
}

#[test]
fn irr_isr_and_tmr_registers() {
    // §11.8.4, Figure 11-20: vector v is bit v % 32 of register v / 32.
    let (mut apic, _) = xapic();
    apic.set_irq(0x45, true);
    assert_eq!(load(&mut apic, REG_IRR + 2), 1 << 5);
    assert_eq!(load(&mut apic, REG_TMR + 2), 1 << 5);
    take(&mut apic);
    assert_eq!((load(&mut apic, REG_IRR + 2), load(&mut apic, REG_ISR + 2)), (0, 1 << 5));
    assert_eq!(store(&mut apic, REG_EOI, 0), ApicAction::EoiBroadcast(0x45));
    assert_eq!(load(&mut apic, REG_ISR + 2), 0);
    apic.set_irq(0x45, false);
    assert_eq!(load(&mut apic, REG_TMR + 2), 0);
}

#[test]
fn eoi_broadcast_can_be_suppressed() {
    // §11.8.5
    let (mut apic, _) = xapic();
    set(&mut apic, REG_SVR, 0x11ff);
    apic.set_irq(0x45, true);
    take(&mut apic);
    assert_eq!(store(&mut apic, REG_EOI, 0), ApicAction::None);
}

#[test]
fn software_disable_masks_and_rejects() {
    // §11.4.7.2
    let (mut apic, _) = xapic();
    set(&mut apic, REG_LVT_TIMER, 0x40);
    apic.set_irq(0x50, false);
    set(&mut apic, REG_SVR, 0xff);
    assert_eq!(load(&mut apic, REG_LVT_TIMER), 0x1_0040);
    set(&mut apic, REG_LVT_TIMER, 0x41);
    assert_eq!(load(&mut apic, REG_LVT_TIMER), 0x1_0041);
    assert!(!apic.set_irq(0x60, false));
    // What was accepted before stays.
    assert_eq!(apic.pending_vector(), Some(0x50));
    // NMI, INIT and start-up are still accepted.
    let message =
        |delivery| InterruptMessage { destination: Destination::All, delivery, vector: 0x9a, level: false };
    assert!(apic.accept(&message(DeliveryMode::Nmi)));
    assert!(apic.accept(&message(DeliveryMode::Init)));
    assert!(apic.accept(&message(DeliveryMode::StartUp)));
    assert!(!apic.accept(&message(DeliveryMode::Fixed)));
    assert!(apic.take_nmi() && !apic.nmi_pending());
    assert!(apic.take_init());
    assert_eq!(apic.take_sipi(), Some(0x9a));
    assert!(!apic.init_or_sipi_pending());
}

#[test]
fn xapic_ipis() {
    // §11.6.1
    let (mut apic, _) = apic_with(2);
    set(&mut apic, REG_SVR, 0x1ff);
    let sent = |apic: &mut LocalApic, high: u32, low: u32| {
        set(apic, REG_ICR_HIGH, high);
        store(apic, REG_ICR, low)
    };
    let ipi = |destination, delivery, vector| {
        ApicAction::Ipi(InterruptMessage { destination, delivery, vector, level: false })
    };
    assert_eq!(sent(&mut apic, 5 << 24, 0x4031), ipi(Destination::Physical(5), DeliveryMode::Fixed, 0x31));
    assert_eq!(load(&mut apic, REG_ICR_HIGH), 5 << 24);
    assert_eq!(sent(&mut apic, 5 << 24, 0x4831), ipi(Destination::Logical(5), DeliveryMode::Fixed, 0x31));
    assert_eq!(sent(&mut apic, 0xff << 24, 0x4431), ipi(Destination::All, DeliveryMode::Nmi, 0x31));
    assert_eq!(sent(&mut apic, 0, 0x4_4031), ipi(Destination::Physical(2), DeliveryMode::Fixed, 0x31));
    assert_eq!(sent(&mut apic, 0, 0x8_4031), ipi(Destination::All, DeliveryMode::Fixed, 0x31));
    assert_eq!(sent(&mut apic, 0, 0xc_4500), ipi(Destination::AllExcept(2), DeliveryMode::Init, 0));
    assert_eq!(sent(&mut apic, 0, 0xc_4699), ipi(Destination::AllExcept(2), DeliveryMode::StartUp, 0x99));
    // INIT level de-assert does nothing.
    assert_eq!(sent(&mut apic, 1 << 24, 0x8500), ApicAction::None);
}

#[test]
fn x2apic_ipis() {
    // §11.12.9: one 64-bit write; all ones is a broadcast.
    let (mut apic, _) = x2apic(0);
    let ipi = |destination| {
        Ok(ApicAction::Ipi(InterruptMessage {
            destination,
            delivery: DeliveryMode::Fixed,
            vector: 0x31,
            level: false,
        }))
    };
    assert_eq!(wrmsr(&mut apic, msr(REG_ICR), 0x0001_0002_0000_0031), ipi(Destination::Physical(0x1_0002)));
    assert_eq!(apic.read_msr(msr(REG_ICR)), Ok(0x0001_0002_0000_0031));
    assert_eq!(wrmsr(&mut apic, msr(REG_ICR), 0x0001_0002_0000_0831), ipi(Destination::Logical(0x1_0002)));
    assert_eq!(wrmsr(&mut apic, msr(REG_ICR), 0xffff_ffff_0000_0031), ipi(Destination::All));
    // §11.12.11
    assert_eq!(wrmsr(&mut apic, msr(REG_SELF_IPI), 0x77), Ok(ApicAction::None));
    assert_eq!(apic.pending_vector(), Some(0x77));
}

#[test]
fn illegal_vectors_are_errors() {
    // §11.5.3: bit 5 send illegal vector, bit 6 receive illegal vector; ESR shows
    // what happened since it was last written.
    let (mut apic, _) = xapic();
    set(&mut apic, REG_LVT_ERROR, 0xe1);
    set(&mut apic, REG_ICR_HIGH, 0);
    assert_eq!(store(&mut apic, REG_ICR, 0x400f), ApicAction::None);
    assert_eq!(take(&mut apic), Some(0xe1));
    assert_eq!(load(&mut apic, REG_ESR), 0);
    set(&mut apic, REG_ESR, 0);
    assert_eq!(load(&mut apic, REG_ESR), 1 << 5);
    assert!(!apic.set_irq(0x0f, false));
    set(&mut apic, REG_ESR, 0);
    assert_eq!(load(&mut apic, REG_ESR), 1 << 6);
    set(&mut apic, REG_ESR, 0);
    assert_eq!(load(&mut apic, REG_ESR), 0);
}

#[test]
fn reserved_xapic_registers_are_errors() {
    // §11.5.3, bit 7: illegal register address.
    let (mut apic, _) = xapic();
    assert_eq!(load(&mut apic, 0x3f), 0);
    set(&mut apic, REG_ESR, 0);
    assert_eq!(load(&mut apic, REG_ESR), 1 << 7);
    set(&mut apic, 0x00, 1);
    set(&mut apic, REG_ESR, 0);
    assert_eq!(load(&mut apic, REG_ESR), 1 << 7);
    // Read-only registers are not reserved.
    set(&mut apic, REG_VERSION, 1);
    set(&mut apic, REG_ESR, 0);
    assert_eq!(load(&mut apic, REG_ESR), 0);
}

#[test]
fn xapic_access_sizes() {
    // §11.4.1: registers are aligned to 16 bytes and stored to as 32 bits.
    let (mut apic, _) = xapic();
    assert_eq!(apic.mmio_read(0x30, 1), 0x15);
    assert_eq!(apic.mmio_read(0x32, 2), 0x0106);
    assert_eq!(apic.mmio_read(0x34, 4), 0);
    assert_eq!(apic.mmio_write(0x80, 1, 0x40), ApicAction::None);
    assert_eq!(apic.mmio_write(0x84, 4, 0x40), ApicAction::None);
    assert_eq!(load(&mut apic, REG_TPR), 0);
    assert_eq!(apic.mmio_write(0x80, 4, 0x40), ApicAction::None);
    assert_eq!(load(&mut apic, REG_TPR), 0x40);
}

#[test]
fn logical_destinations() {
    // §11.6.2.2
    let (mut apic, _) = xapic();
    set(&mut apic, REG_LDR, 0x0400_0000);
    assert!(apic.is_destination(Destination::Logical(0x06)));
    assert!(!apic.is_destination(Destination::Logical(0x03)));
    // Cluster model: high nibble names the cluster, low nibble members.
    set(&mut apic, REG_DFR, 0);
    assert_eq!(load(&mut apic, REG_DFR), 0x0fff_ffff);
    set(&mut apic, REG_LDR, 0x2400_0000);
    assert!(apic.is_destination(Destination::Logical(0x26)));
    assert!(!apic.is_destination(Destination::Logical(0x16)));
    assert!(!apic.is_destination(Destination::Logical(0x21)));
    // §11.12.10.2
    let (apic, _) = x2apic(0x25);
    assert!(apic.is_destination(Destination::Logical(0x0002_0030)));
    assert!(!apic.is_destination(Destination::Logical(0x0001_0020)));
    assert!(apic.is_destination(Destination::Physical(0x25)));
    assert!(apic.is_destination(Destination::AllExcept(1)));
    assert!(!apic.is_destination(Destination::AllExcept(0x25)));
}

#[test]
fn one_shot_timer() {
    // §11.5.4: counts the input clock divided by the divide configuration register.
    let (mut apic, clock) = xapic();
    set(&mut apic, REG_LVT_TIMER, 0x40);
    set(&mut apic, REG_DIVIDE, 0x3);
    set(&mut apic, REG_INITIAL_COUNT, 1000);
    assert_eq!(apic.next_deadline(), Some(16_000));
    clock.set_ns(4_000);
    assert_eq!(load(&mut apic, REG_CURRENT_COUNT), 750);
    assert!(!apic.tick(15_999));
    clock.set_ns(16_000);
    assert!(apic.tick(16_000));
    assert_eq!(take(&mut apic), Some(0x40));
    assert_eq!((apic.next_deadline(), load(&mut apic, REG_CURRENT_COUNT)), (None, 0));
    assert_eq!(load(&mut apic, REG_INITIAL_COUNT), 1000);
}

#[test]
fn timer_divisors() {
    // Figure 11-10
    for (code, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (0xa, 128), (0xb, 1)] {
        let (mut apic, _) = xapic();
        set(&mut apic, REG_DIVIDE, code);
        set(&mut apic, REG_INITIAL_COUNT, 100);
        assert_eq!(apic.next_deadline(), Some(100 * divisor), "code {code:#x}");
    }
}

#[test]
fn periodic_timer_reloads_and_catches_up_once() {
    let (mut apic, clock) = xapic();
    set(&mut apic, REG_LVT_TIMER, 0x2_0040);
    set(&mut apic, REG_DIVIDE, 0xb);
    set(&mut apic, REG_INITIAL_COUNT, 1_000_000);
    for period in 1..4 {
        clock.set_ns(period * 1_000_000);
        assert!(apic.tick(clock.now_ns()));
        assert_eq!(take(&mut apic), Some(0x40));
        assert_eq!(store(&mut apic, REG_EOI, 0), ApicAction::None);
        assert_eq!(apic.next_deadline(), Some((period + 1) * 1_000_000));
    }
    // Three and a half periods late: one interrupt, then in step again.
    clock.set_ns(7_500_000);
    assert!(apic.tick(7_500_000));
    assert_eq!(apic.next_deadline(), Some(8_000_000));
    assert_eq!(load(&mut apic, REG_CURRENT_COUNT), 500_000);
    // Zero stops it.
    set(&mut apic, REG_INITIAL_COUNT, 0);
    assert_eq!(apic.next_deadline(), None);
}

#[test]
fn a_masked_timer_counts_without_interrupting() {
    let (mut apic, _) = xapic();
    set(&mut apic, REG_LVT_TIMER, 0x1_0040);
    set(&mut apic, REG_INITIAL_COUNT, 10);
    assert!(!apic.tick(1_000));
    assert_eq!(apic.pending_vector(), None);
    assert_eq!(apic.next_deadline(), None);
}

#[test]
fn a_tiny_period_does_not_occupy_l0() {
    let (mut apic, clock) = xapic();
    set(&mut apic, REG_LVT_TIMER, 0x2_0040);
    set(&mut apic, REG_DIVIDE, 0xb);
    set(&mut apic, REG_INITIAL_COUNT, 1);
    clock.set_ns(1_000);
    apic.tick(1_000);
    assert_eq!(apic.next_deadline(), Some(21_000));
}

#[test]
fn tsc_deadline_timer() {
    // §11.5.4.1
    let (mut apic, clock) = xapic();
    // Not in this mode: the write is ignored, the read gives zero.
    set_msr(&mut apic, MSR_TSC_DEADLINE, 10_000);
    assert_eq!((apic.read_msr(MSR_TSC_DEADLINE), apic.next_deadline()), (Ok(0), None));
    set(&mut apic, REG_LVT_TIMER, 0x4_0040);
    set_msr(&mut apic, MSR_TSC_DEADLINE, 10_000);
    assert_eq!((apic.read_msr(MSR_TSC_DEADLINE), apic.next_deadline()), (Ok(10_000), Some(5_000)));
    // The count registers do not take part.
    set(&mut apic, REG_INITIAL_COUNT, 77);
    assert_eq!((load(&mut apic, REG_CURRENT_COUNT), apic.next_deadline()), (0, Some(5_000)));
    clock.set_ns(5_000);
    assert!(apic.tick(5_000));
    assert_eq!(take(&mut apic), Some(0x40));
    assert_eq!((apic.read_msr(MSR_TSC_DEADLINE), apic.next_deadline()), (Ok(0), None));
    // A deadline in the past interrupts at once, zero disarms.
    assert_eq!(store(&mut apic, REG_EOI, 0), ApicAction::None);
    set_msr(&mut apic, MSR_TSC_DEADLINE, 1);
    assert_eq!(take(&mut apic), Some(0x40));
    set_msr(&mut apic, MSR_TSC_DEADLINE, 1 << 40);
    set_msr(&mut apic, MSR_TSC_DEADLINE, 0);
    assert_eq!(apic.next_deadline(), None);
    // Leaving the mode disarms.
    set_msr(&mut apic, MSR_TSC_DEADLINE, 1 << 40);
    set(&mut apic, REG_LVT_TIMER, 0x40);
    assert_eq!((apic.read_msr(MSR_TSC_DEADLINE), apic.next_deadline()), (Ok(0), None));
}

#[test]
fn a_lint0_extint_passes_the_8259() {
    // §11.5.1; masked at reset.
    let (mut apic, _) = xapic();
    assert!(!apic.set_lint(0, true));
    assert!(!apic.extint_pending());
    set(&mut apic, REG_LVT_LINT0, 0x700);
    assert!(apic.extint_pending());
    apic.set_lint(0, false);
    assert!(!apic.extint_pending());
    assert!(apic.set_lint(0, true));
    // Globally disabled, the pin is INTR itself (§11.4.3).
    set_msr(&mut apic, MSR_APIC_BASE, DEFAULT_APIC_BASE);
    assert!(apic.extint_pending());
}

#[test]
fn a_lint1_nmi_is_an_edge() {
    let (mut apic, _) = xapic();
    set(&mut apic, REG_LVT_LINT1, 0x400);
    assert!(apic.set_lint(1, true));
    assert!(apic.take_nmi());
    assert!(!apic.set_lint(1, true));
    assert!(!apic.nmi_pending());
}

#[test]
fn a_level_lint_sets_remote_irr_until_eoi() {
    // Figure 11-8, Remote IRR.
    let (mut apic, _) = xapic();
    set(&mut apic, REG_LVT_LINT0, 0x8055);
    assert!(apic.set_lint(0, true));
    assert_eq!(load(&mut apic, REG_LVT_LINT0), 0xc055);
    assert_eq!(take(&mut apic), Some(0x55));
    // Still asserted at EOI: again.
    assert_eq!(store(&mut apic, REG_EOI, 0), ApicAction::EoiBroadcast(0x55));
    assert_eq!(take(&mut apic), Some(0x55));
    apic.set_lint(0, false);
    assert_eq!(store(&mut apic, REG_EOI, 0), ApicAction::EoiBroadcast(0x55));
    assert_eq!(apic.pending_vector(), None);
    assert_eq!(load(&mut apic, REG_LVT_LINT0), 0x8055);
}

#[test]
fn init_keeps_id_and_base() {
    // §11.4.7.3
    let (mut apic, _) = x2apic(7);
    apic.set_irq(0x40, false);
    apic.init_reset();
    assert_eq!(apic.mode(), ApicMode::X2Apic);
    assert_eq!(apic.read_msr(msr(REG_ID)), Ok(7));
    assert_eq!(apic.read_msr(msr(REG_LDR)), Ok(0x80));
    assert_eq!(apic.read_msr(msr(REG_SVR)), Ok(0xff));
    assert!(!apic.has_request());
}
