//! Interrupt remapping and posting.

mod common;

use common::*;
use iommu_emu::{Config, Delivery, InterruptRequest, IoMemory, Remapped};
use memory::L1Gpa;
use x86_spec::pci::Bdf;

const XAPIC: Config = Config {
    host_address_width: 46,
    caching_mode: false,
    extended_interrupts: true,
    posted_interrupts: true,
};
const EIME: u64 = 1 << 11;

/// With interrupt remapping on: 2^(7+1) entries.
fn remapping(config: Config, mode: u64) -> World {
    let mut w = World::new(config);
    w.write(IRTA, 8, INTERRUPTS | mode | 7);
    w.enable(SIRTP);
    w.enable_queue();
    w.enable(IRE);
    w
}

/// A remappable request (§5.1.2.2) without sub-handle.
fn request(index: u64) -> InterruptRequest {
    let address = 0xfee0_0000 | 1 << 4 | (index & 0x7fff) << 5 | (index >> 15) << 2;
    InterruptRequest { address, data: 0 }
}

fn set(w: &World, index: u64, low: u64, high: u64) {
    w.set_entry(INTERRUPTS + index * 16, low, high);
}

fn flush(w: &mut World) {
    w.submit(&[[4, 0], wait_status(1)]);
}

/// The fault's code, or what becomes of the request.
fn send(w: &mut World, request: InterruptRequest) -> Result<Remapped, u8> {
    w.unit.remap(DEVICE, request).map_err(|reason| reason.code())
}

const FIXED: Delivery = Delivery {
    destination: 0,
    extended: false,
    logical: false,
    redirection_hint: false,
    delivery_mode: 0,
    vector: 0,
    level: false,
};

/// §9.10: each field, in xAPIC mode (8-bit destination in bits 47:40) and x2APIC mode (63:32).
#[test]
fn fields_of_an_entry() {
    let table = [
        (1 | 0x31 << 16 | 5 << 40, Delivery { destination: 5, vector: 0x31, ..FIXED }),
        (1 | 1 << 2 | 0xff << 40, Delivery { destination: 0xff, logical: true, ..FIXED }),
        (1 | 1 << 3, Delivery { redirection_hint: true, ..FIXED }),
        (1 | 1 << 4 | 0x80 << 16, Delivery { level: true, vector: 0x80, ..FIXED }),
        (1 | 4 << 5, Delivery { delivery_mode: 4, ..FIXED }),
        (1 | 7 << 5 | 0xf << 8, Delivery { delivery_mode: 7, ..FIXED }),
    ];
    for (low, expected) in table {
        let mut w = remapping(XAPIC, 0);
        set(&w, 3, low, 0);
        assert_eq!(send(&mut w, request(3)), Ok(Remapped::Deliver(expected)), "{low:#x}");
    }
    let mut w = remapping(XAPIC, EIME);
    set(&w, 3, 1 | 0x31 << 16 | 0x1234_5678 << 32, 0);
    let expected = Delivery { destination: 0x1234_5678, extended: true, vector: 0x31, ..FIXED };
    assert_eq!(send(&mut w, request(3)), Ok(Remapped::Deliver(expected)));
}

/// §5.1.3: handle plus sub-handle, if that is valid.
#[test]
fn interrupt_index() {
    let mut w = remapping(XAPIC, 0);
    w.write(IRTA, 8, TABLES | 0xf);
    w.enable(SIRTP);
    let put = |w: &World, index: u64| {
        w.set_entry(TABLES + index * 16, 1 | (index & 0xff) << 16, 0);
    };
    [0x8001, 0x12, 0x1f, 0xffff].iter().for_each(|i| put(&w, *i));
    let vector = |w: &mut World, r| match send(w, r) {
        Ok(Remapped::Deliver(d)) => d.vector,
        other => panic!("{other:?}"),
    };
    assert_eq!(vector(&mut w, request(0x8001)), 1);
    assert_eq!(vector(&mut w, request(0xffff)), 0xff);
    let with_sub = |handle, sub| {
        let r = request(handle);
        InterruptRequest { address: r.address | 1 << 3, data: sub }
    };
    assert_eq!(vector(&mut w, with_sub(0x12, 0)), 0x12);
    assert_eq!(vector(&mut w, with_sub(0x12, 0xd)), 0x1f);
    // Without SHV the data does not count.
    assert_eq!(vector(&mut w, InterruptRequest { data: 0xffff_ffff, ..request(0x12) }), 0x12);
    assert_eq!(send(&mut w, with_sub(0xffff, 1)), Err(0x21));
    assert_eq!(send(&mut w, with_sub(0x12, 0x1_0000)), Err(0x20));
}

/// §5.1.4.1 and appendix A: each reason, whether FPD (bit 1 of every entry here) keeps it from being recorded.
#[test]
fn fault_reasons() {
    type Case = (&'static str, u8, bool, u64, u64);
    const OK: u64 = 1 | 2;
    const POSTED: u64 = OK | 1 << 15 | DESCRIPTOR >> 6 << 38;
    let source = u64::from(DEVICE.requester_id()) + 1;
    let table: [Case; 15] = [
        ("not present", 0x22, true, 2, 0),
        ("bits 14:12", 0x24, true, OK | 1 << 12, 0),
        ("bits 31:24", 0x24, true, OK | 1 << 24, 0),
        ("xAPIC destination, low", 0x24, true, OK | 1 << 32, 0),
        ("xAPIC destination, high", 0x24, true, OK | 1 << 48, 0),
        ("bits 127:84", 0x24, true, OK, 1 << 20),
        ("SVT 11", 0x24, true, OK, 3 << 18),
        ("posted: bits 7:2", 0x24, true, POSTED | 1 << 2, 0),
        ("posted: bits 13:12", 0x24, true, POSTED | 1 << 12, 0),
        ("posted: bits 37:24", 0x24, true, POSTED | 1 << 37, 0),
        ("posted: bits 95:84", 0x24, true, POSTED, 1 << 20),
        ("source", 0x26, true, OK, 1 << 18 | source),
        ("bus", 0x26, true, OK, 2 << 18 | 0x0102),
        ("posted: descriptor outside memory", 0x27, true, OK | 1 << 15, 1 << 32),
        ("posted: descriptor's reserved bits", 0x28, true, POSTED, 0),
    ];
    for (name, code, qualified, low, high) in table {
        for fpd in [0, 2] {
            let mut w = remapping(XAPIC, 0);
            w.poke(DESCRIPTOR + 32, 1 << 2);
            set(&w, 3, low & !2 | fpd, high);
            assert_eq!(send(&mut w, request(3)), Err(code), "{name}");
            assert_eq!(w.read(FSTS, 4) != 0, fpd == 0 || !qualified, "{name}: FPD");
            if fpd == 0 {
                let expected = 1 << 63 | u64::from(code) << 32 | u64::from(DEVICE.requester_id());
                assert_eq!(w.record(0), [3 << 48, expected], "{name}");
            }
        }
    }
    // 21H and 23H.
    let mut w = remapping(XAPIC, 0);
    assert_eq!(send(&mut w, request(0x100)), Err(0x21));
    assert_eq!(w.record(0)[0], 0x100 << 48);
    w.write(IRTA, 8, RAM | 7);
    w.enable(SIRTP);
    assert_eq!(send(&mut w, request(3)), Err(0x23));
    // Without posted interrupts IM is reserved.
    let mut w = remapping(Config { posted_interrupts: false, ..XAPIC }, 0);
    set(&w, 3, POSTED, 0);
    assert_eq!(send(&mut w, request(3)), Err(0x24));
}

/// §9.10: SQ leaves function bits out, SVT 10 compares buses.
#[test]
fn source_verification() {
    // SVT, SQ, SID, functions of device 0:3 that pass.
    let sid = |function: u64| 3 << 3 | function;
    let table: [(u64, u64, u64, &[u8]); 7] = [
        (0, 0, 0xffff, &[0, 1, 2, 3, 4, 5, 6, 7]),
        (1, 0, sid(2), &[2]),
        (1, 1, sid(2), &[2, 6]),
        (1, 2, sid(2), &[0, 2, 4, 6]),
        (1, 3, sid(2), &[0, 1, 2, 3, 4, 5, 6, 7]),
        (2, 0, 0x0000, &[0, 1, 2, 3, 4, 5, 6, 7]),
        (2, 0, 0x0102, &[]),
    ];
    for (svt, sq, sid, expected) in table {
        let mut w = remapping(XAPIC, 0);
        set(&w, 0, 1, svt << 18 | sq << 16 | sid);
        let passes = |f: &u8| w.unit.remap(Bdf::new(0, 3, *f), request(0)).is_ok();
        let passing: Vec<u8> = (0..8).filter(passes).collect();
        assert_eq!(passing, expected, "SVT {svt}, SQ {sq}");
    }
}

/// §5.1.4: compatibility format passes if remapping is off or CFIS is set, and never in extended mode.
#[test]
fn compatibility_format() {
    let old = InterruptRequest { address: 0xfee0_5000 | 1 << 2, data: 0x41 | 1 << 8 };
    let plain = Delivery { destination: 5, logical: true, delivery_mode: 1, vector: 0x41, ..FIXED };
    let mut w = World::new(XAPIC);
    assert_eq!(send(&mut w, old), Ok(Remapped::Deliver(plain)));
    let mut w = remapping(XAPIC, 0);
    assert_eq!(send(&mut w, old), Err(0x25));
    assert_eq!(w.record(0)[1] >> 32 & 0xff, 0x25);
    w.enable(CFI);
    assert_eq!(send(&mut w, old), Ok(Remapped::Deliver(plain)));
    let mut w = remapping(XAPIC, EIME);
    w.enable(CFI);
    assert_eq!(send(&mut w, old), Err(0x25));
}

/// IRTA_REG counts when SIRTP is commanded (§10.4.29), and entries when the interrupt entry cache is invalidated.
#[test]
fn the_entry_cache() {
    let mut w = remapping(XAPIC, 0);
    let vector = |w: &mut World, index| match send(w, request(index)) {
        Ok(Remapped::Deliver(d)) => Ok(d.vector),
        Err(code) => Err(code),
        other => panic!("{other:?}"),
    };
    // Not present is not cached.
    assert_eq!(vector(&mut w, 4), Err(0x22));
    for i in 4..8u64 {
        set(&w, i, 1 | (0x40 + i) << 16, 0);
        assert_eq!(vector(&mut w, i), Ok(0x40 + i as u8));
        set(&w, i, 1 | (0x50 + i) << 16, 0);
        assert_eq!(vector(&mut w, i), Ok(0x40 + i as u8));
    }
    // By index with mask 1: entries 6 and 7.
    w.submit(&[[4 | 1 << 4 | 1 << 27 | 7 << 32, 0], wait_status(1)]);
    assert_eq!([4, 5, 6, 7].map(|i| vector(&mut w, i)), [Ok(0x44), Ok(0x45), Ok(0x56), Ok(0x57)]);
    flush(&mut w);
    assert_eq!(vector(&mut w, 4), Ok(0x54));
    w.write(IRTA, 8, INTERRUPTS + 0x1000);
    flush(&mut w);
    assert_eq!(vector(&mut w, 4), Ok(0x54));
    w.enable(SIRTP);
    flush(&mut w);
    assert_eq!(vector(&mut w, 0), Err(0x22));
    assert_eq!(vector(&mut w, 4), Err(0x21), "two entries");
    // Caching mode caches what is not present, too.
    let mut w = remapping(Config { caching_mode: true, ..XAPIC }, 0);
    assert_eq!(vector(&mut w, 4), Err(0x22));
    set(&w, 4, 1, 0);
    assert_eq!(vector(&mut w, 4), Err(0x22));
    flush(&mut w);
    assert_eq!(vector(&mut w, 4), Ok(0));
}

/// §5.2.4: PIR, ON, SN and URG.
#[test]
fn posting() {
    const ON: u64 = 1;
    const SN: u64 = 2;
    // Urgent, control word before: notified, control word after. NV F2H, NDST 5 in bits 47:40.
    let destination = 0xf2 << 16 | 5 << 40;
    let table = [
        (false, 0, true, ON),
        (false, ON, false, ON),
        (false, SN, false, SN),
        (false, ON | SN, false, ON | SN),
        (true, 0, true, ON),
        (true, SN, true, ON | SN),
        (true, ON | SN, false, ON | SN),
    ];
    for (urgent, before, notified, after) in table {
        let mut w = remapping(XAPIC, 0);
        let urgent = if urgent { 1 << 14 } else { 0 };
        set(&w, 3, 1 | 1 << 15 | urgent | 0x43 << 16 | DESCRIPTOR >> 6 << 38, 0);
        w.poke(DESCRIPTOR + 32, destination | before);
        let notify = Remapped::Notify(Delivery { destination: 5, vector: 0xf2, ..FIXED });
        let expected = if notified { notify } else { Remapped::Posted };
        assert_eq!(send(&mut w, request(3)), Ok(expected), "{urgent} {before}");
        assert_eq!(w.peek(DESCRIPTOR + 32), destination | after);
        let requests = [0, 8, 16, 24].map(|at| w.peek(DESCRIPTOR + at));
        assert_eq!(requests, [0, 1 << 3, 0, 0], "vector 43H");
    }
    // A descriptor above 4 GiB has its upper half in bits 127:96; x2APIC destinations have 32 bits.
    let mut w = remapping(XAPIC, EIME);
    w.poke(DESCRIPTOR + 32, 0xf2 << 16 | 0x1234_5678 << 32);
    set(&w, 3, 1 | 1 << 15 | 0xff << 16 | DESCRIPTOR >> 6 << 38, 0);
    let expected = Delivery { destination: 0x1234_5678, extended: true, vector: 0xf2, ..FIXED };
    assert_eq!(send(&mut w, request(3)), Ok(Remapped::Notify(expected)));
    assert_eq!(w.peek(DESCRIPTOR + 24), 1 << 63);
    assert_eq!(w.ram.read_u64(L1Gpa(DESCRIPTOR + 32)), Some(0xf2 << 16 | 0x1234_5678 << 32 | ON));
}

/// The unit's own messages have their destination's upper bits in the upper address (§5.1.6).
#[test]
fn own_messages() {
    let message = InterruptRequest { address: 0x1234_5600_fee7_8000 | 1 << 2, data: 0x41 | 1 << 15 };
    let d = message.delivery(true);
    assert_eq!((d.destination, d.logical, d.vector, d.level), (0x1234_5678, true, 0x41, true));
    assert_eq!(message.delivery(false).destination, 0x78);
}
