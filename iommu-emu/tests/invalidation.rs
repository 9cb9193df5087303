//! Invalidation by registers and by the queue, queue errors, caching mode.

mod common;

use common::*;
use iommu_emu::{Access, Config, Progress};
use x86_spec::pci::Bdf;

/// Device 0:3.0 in domain 7 with pages 0 to 3 at 5000H to 8000H, all of them in the IOTLB.
fn warm(config: Config) -> (World, u64) {
    let mut w = World::translating(config);
    let tables = w.attach(DEVICE, 7, AW39);
    for page in 0..4 {
        w.map(tables, 3, page << 12, 1, (page + 5) << 12 | R | W);
    }
    assert_eq!(read_all(&mut w), OLD);
    (w, tables)
}

fn read_all(w: &mut World) -> [Result<u64, u8>; 4] {
    [0, 0x1000, 0x2000, 0x3000].map(|iova| w.access(iova, Access::Read))
}

const OLD: [Result<u64, u8>; 4] = [Ok(0x5000), Ok(0x6000), Ok(0x7000), Ok(0x8000)];
const GONE: [Result<u64, u8>; 4] = [Err(6); 4];

fn unmap_all(w: &mut World, tables: u64) {
    for page in 0..4u64 {
        w.map(tables, 3, page << 12, 1, 0);
    }
}

/// §6.5.1: CCMD_REG and IOTLB_REG; the granularity that was asked for is the one that is reported.
#[test]
fn register_based_invalidation() {
    let (mut w, tables) = warm(Config::default());
    unmap_all(&mut w, tables);
    assert_eq!(read_all(&mut w), OLD, "cached until invalidated");
    // IOTLB_REG: page-selective, two pages from 2000H: IVA_REG first.
    let did = 7u64 << 32;
    w.write(0xf0, 8, 0x3000 | 1);
    w.write(0xf8, 8, 1 << 63 | 3 << 60 | did);
    assert_eq!(w.read(0xf8, 8) >> 57 & 0b100_0011, 3, "IVT clear, IAIG page-selective");
    assert_eq!(read_all(&mut w), [OLD[0], OLD[1], GONE[2], GONE[3]]);
    // Another domain's, then this one's.
    w.write(0xf8, 8, 1 << 63 | 2 << 60 | 8 << 32);
    assert_eq!(read_all(&mut w)[0], OLD[0]);
    w.write(0xf8, 8, 1 << 63 | 2 << 60 | did);
    assert_eq!(w.read(0xf8, 8) >> 57 & 0b100_0011, 2);
    assert_eq!(read_all(&mut w), GONE);
    // By halves: the command is in the high one.
    let (mut w, tables) = warm(Config::default());
    unmap_all(&mut w, tables);
    w.write(0xf8, 4, 0);
    assert_eq!(read_all(&mut w), OLD);
    w.write(0xfc, 4, 1 << 31 | 1 << 28);
    assert_eq!(w.read(0xfc, 4) >> 25 & 0b100_0011, 1, "global");
    assert_eq!(read_all(&mut w), GONE);
    // Reserved granularities and masks beyond MAMV do nothing and report 0.
    w.write(0xf8, 8, 1 << 63);
    assert_eq!(w.read(0xf8, 8) >> 57 & 0b100_0011, 0);
    w.write(0xf0, 8, 19);
    w.write(0xf8, 8, 1 << 63 | 3 << 60 | did);
    assert_eq!(w.read(0xf8, 8) >> 57 & 0b100_0011, 0);
    w.write(CCMD, 8, 1 << 63);
    assert_eq!(w.read(CCMD, 8) >> 59 & 0b10011, 0);
}

/// §10.4.7: global, by domain, by device with function mask and domain.
#[test]
fn context_cache_granularities() {
    let devices: Vec<Bdf> = (0..8).map(|f| Bdf::new(0, 3, f)).collect();
    // Command, which functions are looked up anew. Functions 0 to 3 are in domain 1, the others in 2.
    let selective =
        |did: u64, function: u64, mask: u64| 3 << 61 | mask << 32 | (3 << 3 | function) << 16 | did;
    let table: [(u64, &[usize]); 8] = [
        (1 << 61, &[0, 1, 2, 3, 4, 5, 6, 7]),
        (2 << 61 | 1, &[0, 1, 2, 3]),
        (2 << 61 | 3, &[]),
        (selective(1, 2, 0), &[2]),
        (selective(2, 2, 0), &[]),
        (selective(1, 1, 1), &[1]),
        (selective(2, 1, 2), &[5, 7]),
        (selective(1, 1, 3), &[0, 1, 2, 3]),
    ];
    for (command, expected) in table {
        let mut w = World::translating(Config::default());
        for d in &devices {
            w.set_context(*d, 1 | 2 << 2, (1 + u64::from(d.function() >= 4)) << 8 | AW48);
            assert!(w.access_from(*d, 0, Access::Read).is_ok());
            w.set_context(*d, 0, 0);
        }
        w.write(CCMD, 8, 1 << 63 | command);
        assert_eq!(w.read(CCMD, 8) >> 59 & 0b10011, command >> 61, "ICC clear, CAIG as CIRG");
        let anew: Vec<usize> =
            (0..8).filter(|f| w.access_from(devices[*f], 0, Access::Read).is_err()).collect();
        assert_eq!(anew, expected, "{command:#x}");
    }
}

/// Registers do nothing while the queue is enabled (§6.5).
#[test]
fn registers_give_way_to_the_queue() {
    let (mut w, tables) = warm(Config::default());
    w.enable_queue();
    unmap_all(&mut w, tables);
    w.write(0xf8, 8, 1 << 63 | 1 << 60);
    assert_eq!(w.read(0xf8, 8) >> 57 & 0b100_0011, 0, "done, nothing invalidated");
    assert_eq!(read_all(&mut w), OLD);
}

/// §6.5.2.1, §6.5.2.3, §6.5.2.8.
#[test]
fn queued_invalidation() {
    let (mut w, tables) = warm(Config::default());
    w.enable_queue();
    unmap_all(&mut w, tables);
    w.submit(&[iotlb_pages(7, 0x1000, 0), wait_status(0xabcd)]);
    assert_eq!(w.peek(STATUS), 0xabcd);
    assert_eq!((w.read(IQH, 8), w.read(IQT, 8)), (0x20, 0x20));
    assert_eq!(read_all(&mut w), [OLD[0], GONE[1], OLD[2], OLD[3]]);
    w.submit(&[iotlb_domain(6), wait_status(1)]);
    assert_eq!(read_all(&mut w)[0], OLD[0]);
    w.submit(&[iotlb_domain(7), wait_status(2)]);
    assert_eq!(read_all(&mut w), GONE);
    // The context is still cached.
    w.set_context(DEVICE, 0, 0);
    assert_eq!(w.access(0, Access::Read), Err(6));
    w.submit(&[context_global(), iotlb_global(), wait_status(3)]);
    assert_eq!(w.access(0, Access::Read), Err(2));
    // Round the end of the queue.
    for i in 0..300u32 {
        w.submit(&[wait_status(i)]);
        assert_eq!(w.peek(STATUS), u64::from(i));
    }
    assert_eq!(w.read(FSTS, 4) & 0x70, 0);
    // Disabling resets the head (§10.4.21).
    w.disable(QIE);
    assert_eq!(w.read(IQH, 8), 0);
}

/// The IOTLB has large pages as one entry, which any of their pages invalidates.
#[test]
fn a_page_of_a_large_page() {
    let mut w = World::translating(Config::default());
    let tables = w.attach(DEVICE, 7, AW48);
    w.map(tables, 4, 0x20_0000, 2, 0x40_0000 | R | PS);
    assert_eq!(w.access(0x23_4567, Access::Read), Ok(0x43_4567));
    w.map(tables, 4, 0x20_0000, 2, 0x60_0000 | R | PS);
    assert_eq!(w.access(0x20_0000, Access::Read), Ok(0x40_0000));
    w.enable_queue();
    w.submit(&[iotlb_pages(7, 0x3f_f000, 0), wait_status(1)]);
    assert_eq!(w.access(0x20_0000, Access::Read), Ok(0x60_0000));
}

/// §6.5.2.9: the completion event, which is not sent again while IWC is set.
#[test]
fn completion_interrupt() {
    let (mut w, _) = warm(Config::default());
    w.enable_queue();
    w.write(0xa4, 4, 0x42);
    w.write(0xa8, 4, 0xfee0_0000);
    let wait = [5 | 1 << 4, 0];
    w.submit(&[wait]);
    assert_eq!((w.read(ICS, 4), w.read(IECTL, 4)), (1, 3 << 30));
    w.write(IECTL, 4, 0);
    let events = w.events();
    assert_eq!((events.len(), events[0].address, events[0].data), (1, 0xfee0_0000, 0x42));
    w.submit(&[wait]);
    assert_eq!(w.events(), []);
    w.write(ICS, 4, 1);
    assert_eq!(w.read(ICS, 4), 0);
    w.submit(&[wait, wait]);
    assert_eq!(w.events().len(), 1);
}

/// §6.5.2.10: the queue stops at what is wrong, says why, and goes on when software has cleared IQE.
#[test]
fn queue_errors() {
    // Descriptor, IQERCD_REG.IQEI.
    let table = [
        ([0u64, 0], 3),
        ([3, 0], 3),
        ([15, 0], 3),
        ([1 << 9 | 2, 0], 3),
        ([1, 0], 4),
        ([1 | 1 << 4 | 1 << 50, 0], 4),
        ([1 | 1 << 4, 1], 4),
        ([2, 0], 4),
        ([2 | 1 << 4 | 1 << 32, 0], 4),
        ([2 | 1 << 4, 1 << 7], 4),
        ([2 | 3 << 4, 19], 4),
        ([4 | 1 << 5, 0], 4),
        ([4 | 1 << 4 | 16 << 27, 0], 4),
        ([4, 1], 4),
        ([5 | 1 << 7, 0], 4),
        ([5 | 1 << 5, STATUS | 1], 4),
    ];
    for (bad, code) in table {
        let (mut w, _) = warm(Config::default());
        w.enable_queue();
        w.write(FECTL, 4, 0);
        w.submit(&[wait_status(1), bad, wait_status(2)]);
        assert_eq!(w.read(FSTS, 4), 1 << 4, "{bad:x?}");
        assert_eq!(w.read(IQERCD, 8), code, "{bad:x?}");
        assert_eq!((w.peek(STATUS), w.read(IQH, 8)), (1, 0x10), "stopped there");
        assert_eq!(w.events().len(), 1, "fault event");
        // As Linux does: replaces the descriptor and clears the error.
        let [low, high] = wait_status(7);
        w.set_entry(QUEUE + 0x10, low, high);
        w.write(FSTS, 4, 1 << 4);
        assert_eq!((w.peek(STATUS), w.read(IQH, 8)), (2, 0x30));
        assert_eq!(w.events(), []);
    }
}

#[test]
fn queue_outside_memory_and_tail_outside_the_queue() {
    let mut w = World::new(Config::default());
    w.enable_queue();
    w.write(IQT, 8, 256 << 4);
    assert_eq!((w.read(FSTS, 4), w.read(IQERCD, 8)), (1 << 4, 1));
    w.write(IQT, 8, 0);
    w.write(FSTS, 4, 1 << 4);
    w.write(IQA, 8, RAM);
    w.write(IQT, 8, 1 << 4);
    assert_eq!((w.read(FSTS, 4), w.read(IQERCD, 8)), (1 << 4, 2));
}

/// A wait, or a register command, completes only when accesses by what was taken back have ended.
#[test]
fn completion_waits_for_accesses_in_flight() {
    let (mut w, _) = warm(Config::default());
    w.unit.write(0xf8, 8, 1 << 63 | 1 << 60);
    let Progress::Drain(first) = w.unit.advance() else { panic!("nothing to wait for") };
    assert_eq!(w.read(0xfc, 4) >> 31, 1, "IVT is set until then");
    // Another invalidation meanwhile: having waited for the first is not enough.
    w.unit.write(0xf8, 8, 1 << 63 | 1 << 60);
    w.unit.drained(first);
    let Progress::Drain(second) = w.unit.advance() else { panic!("nothing to wait for") };
    w.unit.drained(second);
    assert_eq!(w.unit.advance(), Progress::Idle);
    assert_eq!(w.read(0xfc, 4) >> 31, 0);

    w.enable_queue();
    let drains = w.drains;
    w.submit(&[wait_status(1)]);
    assert_eq!(w.drains, drains, "nothing was invalidated");
    w.submit(&[iotlb_global(), context_global(), wait_status(2), wait_status(3)]);
    assert_eq!((w.drains, w.peek(STATUS)), (drains + 1, 3));
}

/// One call does a bounded piece of the longest queue there is (2^15 descriptors, §10.4.23).
#[test]
fn a_full_queue_is_done_in_pieces() {
    let mut w = World::new(Config::default());
    for i in 0..0x8000u64 {
        w.set_entry(TABLES + i * 16, 2 | 1 << 4, 0);
    }
    w.write(IQA, 8, TABLES | 7);
    w.enable(QIE);
    w.unit.write(IQT, 8, 0x7fff << 4);
    let mut calls = 1;
    while w.unit.advance() == Progress::More {
        calls += 1;
    }
    assert_eq!(w.read(IQH, 8), 0x7fff << 4);
    assert_eq!(calls, 0x8000 / 256);
}

/// §6.1: without caching mode what is not present or wrong is not cached; with it, it is, contexts under domain 0.
#[test]
fn caching_mode() {
    for caching_mode in [false, true] {
        let mut w = World::translating(Config { caching_mode, ..Config::default() });
        w.enable_queue();
        let other = Bdf::new(0, 4, 0);
        assert_eq!(w.access_from(other, 0, Access::Read), Err(2));
        let tables = w.attach(DEVICE, 7, AW39);
        w.map(tables, 3, 0x1000, 1, 0);
        assert_eq!(w.access(0x1000, Access::Read), Err(6));
        w.map(tables, 3, 0x1000, 1, 0x5000 | R);
        w.set_context(other, 1 | 2 << 2, 9 << 8 | AW48);
        let context = w.access_from(other, 0, Access::Read);
        let page = w.access(0x1000, Access::Read);
        if !caching_mode {
            assert_eq!((context, page), (Ok(0), Ok(0x5000)));
            continue;
        }
        assert_eq!((context, page), (Err(2), Err(6)));
        // The device's entry is found under domain 0, not under its new one.
        let by_device = |did: u64| [1 | 3 << 4 | did << 16 | u64::from(other.requester_id()) << 32, 0];
        w.submit(&[by_device(9), wait_status(1)]);
        assert_eq!(w.access_from(other, 0, Access::Read), Err(2));
        w.submit(&[by_device(0), iotlb_pages(7, 0x1000, 0), wait_status(2)]);
        assert_eq!(w.access_from(other, 0, Access::Read), Ok(0));
        assert_eq!(w.access(0x1000, Access::Read), Ok(0x5000));
    }
}

/// More rights than the cached ones are found without an invalidation, fewer are not.
#[test]
fn rights_that_grow() {
    let mut w = World::translating(Config::default());
    let tables = w.attach(DEVICE, 7, AW39);
    w.map(tables, 3, 0x1000, 1, 0x5000 | R);
    assert_eq!(w.access(0x1000, Access::Read), Ok(0x5000));
    w.map(tables, 3, 0x1000, 1, 0x6000 | R | W);
    assert_eq!(w.access(0x1000, Access::Read), Ok(0x5000));
    assert_eq!(w.access(0x1000, Access::Write), Ok(0x6000));
    w.map(tables, 3, 0x1000, 1, 0x6000 | R);
    assert_eq!(w.access(0x1000, Access::Write), Ok(0x6000));
}
