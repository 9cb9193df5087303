//! DMA translation, faults and their recording, table by table of the specification.

mod common;

use common::*;
use iommu_emu::spec::fault::FaultReason;
use iommu_emu::{Access, AddressType, Blocked, Config, Iova};
use x86_spec::pci::Bdf;

/// §10.4.2, §10.4.3: what is offered, bit by bit.
#[test]
fn capabilities() {
    let w = World::new(Config::default());
    let cap = w.read(0x08, 8);
    let field = |value: u64, high: u32, low: u32| value >> low & ((1 << (high - low + 1)) - 1);
    assert_eq!(w.read(0x00, 4), 0x10, "version 1.0");
    assert_eq!(field(cap, 2, 0), 6, "ND: 16-bit domain IDs");
    assert_eq!(field(cap, 6, 3), 0, "AFL, RWBF, PLMR, PHMR");
    assert_eq!(field(cap, 7, 7), 0, "CM");
    assert_eq!(field(cap, 12, 8), 0b00110, "SAGAW: 39 and 48 bits");
    assert_eq!(field(cap, 21, 16), 47, "MGAW");
    assert_eq!(field(cap, 22, 22), 1, "ZLR");
    assert_eq!(field(cap, 33, 24) * 16, 0x200, "FRO");
    assert_eq!(field(cap, 37, 34), 0b0011, "SLLPS");
    assert_eq!(field(cap, 39, 39), 1, "PSI");
    assert_eq!(field(cap, 47, 40), 7, "NFR");
    assert_eq!(field(cap, 53, 48), 18, "MAMV");
    assert_eq!(field(cap, 55, 54), 3, "DRD, DWD");
    assert_eq!(field(cap, 59, 59), 1, "PI");
    assert_eq!(field(cap, 63, 60), 0);
    let ecap = w.read(0x10, 8);
    assert_eq!(field(ecap, 7, 0), 0b1101_1011, "C, QI, no DT, IR, EIM, PT, SC");
    assert_eq!(field(ecap, 17, 8) * 16, 0xf0, "IRO");
    assert_eq!(field(ecap, 23, 20), 15, "MHMV");
    assert_eq!(field(ecap, 63, 24), 0, "nothing of scalable mode");
    let options = Config {
        caching_mode: true,
        extended_interrupts: false,
        posted_interrupts: false,
        ..Config::default()
    };
    let w = World::new(options);
    assert_eq!(field(w.read(0x08, 8), 7, 7), 1);
    assert_eq!(field(w.read(0x08, 8), 59, 59), 0);
    assert_eq!(field(w.read(0x10, 8), 4, 4), 0);
}

/// §10.2: 64-bit registers whole and by halves; other accesses do nothing. §10.4: reserved and read-only bits.
#[test]
fn register_access_rules() {
    let mut w = World::new(Config::default());
    w.write(RTADDR, 8, u64::MAX);
    assert_eq!(w.read(RTADDR, 8), 0xffff_ffff_ffff_fc00);
    w.write(RTADDR, 4, 0x1234_5000);
    assert_eq!(w.read(RTADDR, 8), 0xffff_ffff_1234_5000);
    w.write(RTADDR + 4, 4, 1);
    assert_eq!((w.read(RTADDR, 4), w.read(RTADDR + 4, 4)), (0x1234_5000, 1));
    for (offset, size) in [(RTADDR, 1), (RTADDR, 2), (RTADDR + 2, 4), (RTADDR + 4, 8)] {
        w.write(offset, size, 0);
        assert_eq!(w.read(offset, size), 0);
        assert_eq!(w.read(RTADDR, 8), 0x1_1234_5000);
    }
    // Offset, what is written, what is read.
    let table = [
        (0x00, !0, 0x10),
        (GSTS, !0, 0),
        (0x3c, !0, 0xffff_ffff),
        (0x40, !0, 0xffff_fffc),
        (0x44, !0, 0xffff_ffff),
        (0x64, !0, 0),
        (0x68, !0, 0),
        (IQH, !0, 0),
        (IQT, !0, 0x7fff0),
        (IQA, !0, 0xffff_f007),
        (IQERCD, !0, 0),
        (IRTA, !0, 0xffff_f80f),
        (0xa4, !0, 0xffff_ffff),
        (0xa8, !0, 0xffff_fffc),
        (0xff0, !0, 0),
    ];
    for (offset, written, read) in table {
        w.write(offset, 4, written);
        assert_eq!(w.read(offset, 4), read, "{offset:#x}");
    }
    assert_eq!(w.read(GCMD, 4), 0, "write-only");
    assert_eq!(w.read(FECTL, 4), 1 << 31, "masked after reset");
    // Without extended interrupt mode, upper addresses and upper data are reserved (§10.4.11, §10.4.13).
    let mut w = World::new(Config { extended_interrupts: false, ..Config::default() });
    for (offset, read) in [(0x3c, 0xffff), (0x44, 0), (0xa4, 0xffff), (0xac, 0), (IRTA, 0xffff_f00f)] {
        w.write(offset, 4, !0);
        assert_eq!(w.read(offset, 4), read, "{offset:#x}");
    }
}

/// §10.4.4, §10.4.5.
#[test]
fn commands_and_status() {
    let mut w = World::new(Config::default());
    w.enable(SRTP);
    for bit in [TE, QIE, IRE, CFI] {
        w.enable(bit);
        w.disable(bit);
    }
    // Not there: advanced fault log, write buffer.
    w.write(GCMD, 4, 1 << 29 | 1 << 28 | 1 << 27);
    assert_eq!(w.read(GSTS, 4), SRTP);
}

#[test]
fn nothing_is_translated_before_it_is_enabled() {
    let mut w = World::new(Config::default());
    assert_eq!(w.access(0x12_3456, Access::Write), Ok(0x12_3456));
    assert!(w.unit.translate(DEVICE, Iova(RAM), Access::Read).unwrap().machine.is_none());
    assert_eq!(w.access(0xfee0_0000, Access::Write), Err(0xff), "§3.14");
}

/// §3.7, §9.8: page sizes, both widths, rights of all levels together.
#[test]
fn pages_of_every_size() {
    for (aw, levels) in [(AW39, 3), (AW48, 4)] {
        let mut w = World::translating(Config::default());
        let tables = w.attach(DEVICE, 7, aw);
        w.map(tables, levels, 0x1000, 1, 0x5000 | R | W);
        w.map(tables, levels, 0x20_0000, 2, 0x40_0000 | R | PS);
        w.map(tables, levels, 0x4000_0000, 3, R | W | PS);
        w.map(tables, levels, 0x3000, 1, 0x8000 | W);
        for _ in 0..2 {
            assert_eq!(w.access(0x1abc, Access::Write), Ok(0x5abc));
            assert_eq!(w.access(0x21_2345, Access::Read), Ok(0x41_2345));
            assert_eq!(w.access(0x21_2345, Access::Write), Err(5));
            assert_eq!(w.access(0x4012_3456, Access::Write), Ok(0x12_3456));
            assert_eq!(w.access(0x3000, Access::Read), Err(6));
            assert_eq!(w.access(0x3000, Access::ZeroLengthRead), Ok(0x8000));
            assert_eq!(w.access(0x2000, Access::Read), Err(6), "not present");
        }
        assert!(w.unit.stats().iotlb_hits >= 5);
        // How far a mapping goes; the 1 GiB page is only in part RAM.
        let to = w.unit.translate(DEVICE, Iova(0x1ffe), Access::Read).unwrap();
        assert_eq!((to.len, to.machine.is_some()), (2, true));
        let to = w.unit.translate(DEVICE, Iova(0x4000_0001), Access::Read).unwrap();
        assert_eq!((to.len, to.machine), ((1 << 30) - 1, None));
    }
}

/// §3.14: a mapping around the interrupt range ends there, as a source and as a target.
#[test]
fn the_interrupt_range_is_cut_out() {
    let mut w = World::translating(Config::default());
    let tables = w.attach(DEVICE, 1, AW39);
    w.map(tables, 3, 0xc000_0000, 3, R | W | PS);
    w.map(tables, 3, 0, 3, 0xc000_0000 | R | W | PS);
    let to = w.unit.translate(DEVICE, Iova(0xfedf_ff00), Access::Write).unwrap();
    assert_eq!(to.len, 0x100);
    assert_eq!(w.access(0xfee0_1000, Access::Write), Err(0xff));
    assert_eq!(w.access(0xfef0_0000, Access::Write), Ok(0x3ef0_0000));
    // The other way round it is a fault, cached or not.
    assert_eq!(w.access(0x3ed0_0000, Access::Write), Ok(0xfed0_0000));
    assert_eq!(w.access(0x3ee0_0000, Access::Write), Err(0x0e));
}

#[test]
fn pass_through() {
    let mut w = World::translating(Config::default());
    w.set_context(DEVICE, 1 | 2 << 2, 3 << 8 | AW48);
    assert_eq!(w.access(0x1_2345, Access::Write), Ok(0x1_2345));
    assert_eq!(w.access(1 << 48, Access::Write), Err(4));
    let other = Bdf::new(0, 4, 0);
    // AW has to be the largest (§9.3).
    w.set_context(other, 1 | 2 << 2, 3 << 8 | AW39);
    assert_eq!(w.access_from(other, 0, Access::Read), Err(3));
}

/// Appendix A, for untranslated requests: each cause, its code, and whether FPD keeps it from being recorded.
#[test]
fn fault_reasons() {
    const GOOD: u64 = 9 << 8 | AW39;
    type Break = fn(&mut World, u64);
    // Name, code, qualified, what is broken after everything is right. The context entry has FPD set.
    let table: &[(&str, u8, bool, Break)] = &[
        ("root entry not present", 0x01, false, |w, _| w.set_entry(ROOT, CONTEXTS, 0)),
        ("context entry not present", 0x02, true, |w, t| w.set_context(DEVICE, t | 2, GOOD)),
        ("TT 01 without device TLBs", 0x03, true, |w, t| w.set_context(DEVICE, t | 3 | 1 << 2, GOOD)),
        ("TT 11", 0x03, true, |w, t| w.set_context(DEVICE, t | 3 | 3 << 2, GOOD)),
        ("AW 0", 0x03, true, |w, t| w.set_context(DEVICE, t | 3, GOOD & !7)),
        ("AW 57 bits", 0x03, true, |w, t| w.set_context(DEVICE, t | 3, GOOD & !7 | 3)),
        ("not present, at the last level", 0x06, true, |w, t| w.map(t, 3, 0x1000, 1, 0x5000)),
        ("write-only", 0x06, true, |w, t| w.map(t, 3, 0x1000, 1, 0x5000 | W)),
        ("table outside memory", 0x07, true, |w, t| w.poke(t, 0x1_0000_0000 | R | W)),
        ("context table outside memory", 0x09, false, |w, _| w.set_entry(ROOT, 0x1_0000_0001, 0)),
        ("root: reserved low", 0x0a, false, |w, _| w.set_entry(ROOT, CONTEXTS | 1 | 1 << 11, 0)),
        ("root: above the host's width", 0x0a, false, |w, _| w.set_entry(ROOT, CONTEXTS | 1 | 1 << 46, 0)),
        ("root: reserved high", 0x0a, false, |w, _| w.set_entry(ROOT, CONTEXTS | 1, 1)),
        ("context: reserved low", 0x0b, true, |w, t| w.set_context(DEVICE, t | 3 | 1 << 4, GOOD)),
        ("context: above the host's width", 0x0b, true, |w, t| w.set_context(DEVICE, t | 3 | 1 << 46, GOOD)),
        ("context: bit 71", 0x0b, true, |w, t| w.set_context(DEVICE, t | 3, GOOD | 1 << 7)),
        ("context: reserved high", 0x0b, true, |w, t| w.set_context(DEVICE, t | 3, GOOD | 1 << 63)),
        ("PTE: above the host's width", 0x0c, true, |w, t| w.map(t, 3, 0x1000, 1, 1 << 46 | R)),
        ("PTE: transient mapping", 0x0c, true, |w, t| w.map(t, 3, 0x1000, 1, 1 << 62 | R)),
        ("PDE: snoop", 0x0c, true, |w, t| w.poke(t, w.peek(t) | 1 << 11)),
        ("2 MiB: address within the page", 0x0c, true, |w, t| w.map(t, 3, 0x1000, 2, 0x1000 | R | PS)),
        ("1 GiB: address within the page", 0x0c, true, |w, t| w.map(t, 3, 0x1000, 3, 0x20_0000 | R | PS)),
        ("translation to the interrupt range", 0x0e, true, |w, t| w.map(t, 3, 0x1000, 1, 0xfee0_0000 | R)),
    ];
    for (name, code, qualified, damage) in table {
        let mut w = World::translating(Config::default());
        let tables = w.table();
        w.set_context(DEVICE, tables | 3, GOOD);
        w.map(tables, 3, 0x1000, 1, 0x5000 | R | W);
        damage(&mut w, tables);
        assert_eq!(w.access(0x1234, Access::Read), Err(*code), "{name}");
        let recorded = w.read(FSTS, 4) != 0;
        assert_eq!(recorded, !qualified, "{name}: FPD");
        if recorded {
            // FRCD_REG (§10.4.14): F, read, reason, source; the page.
            let expected = 1 << 63 | 1 << 62 | u64::from(*code) << 32 | u64::from(DEVICE.requester_id());
            assert_eq!(w.record(0), [0x1000, expected], "{name}");
        }
    }
}

/// What is right next to what is wrong.
#[test]
fn bits_that_are_ignored() {
    let mut w = World::translating(Config::default());
    let tables = w.table();
    // Context bits 70:67 are software's (§9.3); PTE bits 61:52, 63, 10:2 are ignored, SNP is there (§9.8).
    w.set_context(DEVICE, tables | 1, 1 << 8 | 0xf << 3 | AW39);
    w.map(tables, 3, 0x1000, 1, 0x5000 | R | 0xbff0_0000_0000_0ffc);
    assert_eq!(w.access(0x1000, Access::Read), Ok(0x5000));
    // Entries that are not present can hold anything.
    w.map(tables, 3, 0x2000, 1, !3);
    assert_eq!(w.access(0x2000, Access::Write), Err(5));
}

/// Codes 4, 8, DH and 31H, which need something else than a broken entry.
#[test]
fn other_fault_reasons() {
    let mut w = World::translating(Config::default());
    let tables = w.attach(DEVICE, 1, AW39);
    w.map(tables, 3, 0x1000, 1, 0x5000 | R | W);
    assert_eq!(w.access(1 << 39, Access::Read), Err(4));
    for kind in [AddressType::TranslationRequest, AddressType::Translated] {
        let result = w.unit.translate_request(DEVICE, Iova(0x1000), Access::Read, kind);
        assert_eq!(result, Err(Blocked::Fault(FaultReason::TranslatedBlocked)));
    }
    // AT of the request is in the record (bits 125:124).
    assert_eq!(w.record(2)[1] >> 60 & 3, 2);
    for (root, code) in [(RAM, 8), (ROOT | 1 << 10, 0x31)] {
        w.write(RTADDR, 8, root);
        w.enable(SRTP);
        w.write(CCMD, 8, 1 << 63 | 1 << 61);
        assert_eq!(w.access(0x1000, Access::Read), Err(code));
    }
}

/// §7.3.1: registers are filled in turn; when the next is taken there is an overflow, and nothing is recorded until
/// software has cleared it.
#[test]
fn fault_recording_and_overflow() {
    let mut w = World::translating(Config::default());
    for i in 0..8u64 {
        assert_eq!(w.access(i << 12, Access::Write), Err(2));
    }
    assert_eq!(w.read(FSTS, 4), 0b10, "pending, first is 0, no overflow");
    for i in 0..8 {
        assert_eq!(w.record(i), [i << 12, 1 << 63 | 2 << 32 | u64::from(DEVICE.requester_id())]);
    }
    assert_eq!(w.access(0x9000, Access::Write), Err(2));
    assert_eq!(w.read(FSTS, 4), 0b11);
    // Clearing a record does not end the overflow.
    w.write(0x20c, 4, 1 << 31);
    assert_eq!(w.record(0), [0, 2 << 32 | u64::from(DEVICE.requester_id())]);
    assert_eq!(w.read(FSTS, 4), 1 << 8 | 0b11, "the first that is pending is 1 now");
    assert_eq!(w.access(0xa000, Access::Write), Err(2));
    assert_eq!(w.record(0)[1] >> 63, 0, "lost");
    w.write(FSTS, 4, 1);
    assert_eq!(w.access(0xb000, Access::Write), Err(2));
    assert_eq!(w.record(0)[0], 0xb000);
    // Writes of 0 and to other parts change nothing.
    w.write(0x20c, 4, 0);
    w.write(0x200, 8, u64::MAX);
    assert_eq!((w.record(0)[0], w.record(0)[1] >> 63), (0xb000, 1));
    for i in 0..8 {
        w.write(0x208 + i * 16, 8, 1 << 63);
    }
    assert_eq!(w.read(FSTS, 4) & 3, 0);
}

/// §10.4.10: one message for a row of faults; masked, it stays pending until unmasked or serviced.
#[test]
fn fault_event() {
    let mut w = World::translating(Config::default());
    w.write(0x3c, 4, 0x41);
    w.write(0x40, 4, 0xfee0_1000);
    w.write(0x44, 4, 0);
    assert_eq!(w.access(0, Access::Write), Err(2));
    assert_eq!(w.events(), []);
    assert_eq!(w.read(FECTL, 4), 3 << 30, "masked and pending");
    w.write(FECTL, 4, 0);
    let events = w.events();
    assert_eq!((events.len(), events[0].address, events[0].data), (1, 0xfee0_1000, 0x41));
    assert_eq!(w.read(FECTL, 4), 0);
    // PPF is still set: no new condition.
    assert_eq!(w.access(0, Access::Write), Err(2));
    assert_eq!(w.events(), []);
    w.write(0x208, 8, 1 << 63);
    w.write(0x218, 8, 1 << 63);
    assert_eq!(w.access(0, Access::Write), Err(2));
    assert_eq!(w.events().len(), 1);
    // Pending, but serviced before it was unmasked.
    w.write(0x228, 8, 1 << 63);
    w.write(FECTL, 4, 1 << 31);
    assert_eq!(w.access(0, Access::Write), Err(2));
    assert_eq!(w.read(FECTL, 4), 3 << 30);
    w.write(0x238, 8, 1 << 63);
    assert_eq!(w.read(FECTL, 4), 1 << 31);
    w.write(FECTL, 4, 0);
    assert_eq!(w.events(), []);
}

#[test]
fn reset_forgets_everything() {
    let mut w = World::translating(Config::default());
    let tables = w.attach(DEVICE, 1, AW39);
    w.map(tables, 3, 0x1000, 1, 0x5000 | R);
    assert_eq!(w.access(0x1000, Access::Read), Ok(0x5000));
    assert_eq!(w.access(0x1000, Access::Write), Err(5));
    w.unit.reset();
    assert_eq!((w.read(GSTS, 4), w.read(FSTS, 4), w.read(RTADDR, 8)), (0, 0, 0));
    assert_eq!(w.access(0x1000, Access::Write), Ok(0x1000));
}
