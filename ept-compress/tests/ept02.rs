//! EPT02's behaviour, case by case.

mod common;

use common::*;
use ept_compress::{Access, Ept02Error, Fault, Flush, Level, NoLog, Pml, RootKey};
use memory::{L1Gpa, L2Gpa};

fn key(root12: u64, flags: u64) -> RootKey {
    RootKey { eptp12: root12 | 0x1e | flags, mode_based_execute: false }
}

#[test]
fn large_pages_stay_large_where_both_have_them() {
    let w = World::new();
    let root12 = w.table12();
    w.map12(root12, 0, 3, 1 << 30 | 7 | WB | LARGE, 7);
    w.map12(root12, 1 << 30, 2, 0x20_0000 | 7 | WB | LARGE, 7);
    let root01 = w.table01();
    // 1 GiB at 1 GiB; the first 2 MiB page of L1 in small pages.
    w.map01(root01, 1 << 30, 3, 7 << 30 | 7 | WB | LARGE);
    w.map01(root01, 0x20_5000, 1, 0x77_7000 | 7 | WB);
    let view = w.view01(root01);
    let mut e = w.ept02(64, false);
    let mut fill =
        |gpa| e.fill(key(root12, 0), &FORMAT, L2Gpa(gpa), Access::READ, &w.ram, &view, &mut NoLog).unwrap();
    let m = fill(0x1234_5678).mapping;
    assert_eq!((m.level, m.page.0), (Level::Pdpte, 7 << 30));
    let m = fill((1 << 30) + 0x5432).mapping;
    assert_eq!((m.level, m.page.0), (Level::Pte, 0x77_7000));
    assert_eq!(e.stats().fills, [1, 0, 1]);
    let eptp02 = e.root(key(root12, 0)).eptp02;
    let Walked::Page { address, size, .. } = w.reference(eptp02, 0x1234_5678) else { panic!() };
    assert_eq!((address, size), ((7 << 30) | 0x1234_5678, 1 << 30));
}

#[test]
fn an_engine_without_large_pages_gets_small_ones() {
    let w = World::new();
    let root12 = w.table12();
    w.map12(root12, 0, 3, 1 << 30 | 7 | WB | LARGE, 7);
    let root01 = w.plain01(0);
    let engine = ept_compress::Format { page_1g: false, page_2m: false, ..FORMAT };
    let mut e = ept_compress::Ept02::new(w.memory.clone(), w.pool.clone(), 8, engine, false).unwrap();
    let gpa = L2Gpa(0x1234_5678);
    let view = w.view01(root01);
    e.fill(key(root12, 0), &FORMAT, gpa, Access::READ, &w.ram, &view, &mut NoLog).unwrap();
    let eptp02 = e.root(key(root12, 0)).eptp02;
    let Walked::Page { address, size, .. } = w.reference(eptp02, gpa.0) else { panic!() };
    assert_eq!((address, size), ((1 << 30) | 0x1234_5678, 0x1000));
}

/// SDM Vol. 3C §29.3.5: the dirty flag is set by a write alone; so EPT02 lets the first one exit.
#[test]
fn a_clean_page_is_read_only_until_it_is_written() {
    let w = World::new();
    let root12 = w.table12();
    w.map12(root12, 0x3000, 1, 0x9000 | 7 | WB, 7);
    let root01 = w.plain01(0);
    let view = w.view01(root01);
    let mut e = w.ept02(8, false);
    let k = key(root12, EPTP_AD);
    let mut go = |a| e.fill(k, &FORMAT, L2Gpa(0x3000), a, &w.ram, &view, &mut NoLog).unwrap();
    let leaf = |w: &World| {
        let Walked::Page { entries, .. } = w.reference(root12, 0x3000) else { panic!() };
        entries.iter().map(|e| w.entry(*e) & (A | D)).collect::<Vec<_>>()
    };
    let read = go(Access::READ);
    assert_eq!(read.mapping.rights.to_string(), "r-xu");
    assert_eq!(leaf(&w), [A, A, A, A]);
    let write = go(Access::WRITE);
    assert_eq!(write.mapping.rights.to_string(), "rwxu");
    assert_eq!(write.flush, Flush::None, "a page that allows more needs no flush");
    assert_eq!(leaf(&w), [A, A, A, A | D]);
    assert_ne!(e.root(k).eptp02 & EPTP_AD, 0, "page walks must count as writes");
}

/// SDM Vol. 3C §29.3.6.
#[test]
fn page_modification_log() {
    let w = World::new();
    let root12 = w.table12();
    for p in 0..3 {
        w.map12(root12, p << 12, 1, (0x9000 + (p << 12)) | 7 | WB, 7);
    }
    let root01 = w.plain01(0);
    let view = w.view01(root01);
    let mut e = w.ept02(8, false);
    let mut index = 1u16;
    let log = w.table12();
    let mut write = |gpa, access, index: &mut u16| {
        let mut pml = Pml { memory: &w.ram, address: L1Gpa(log), index };
        e.fill(key(root12, EPTP_AD), &FORMAT, L2Gpa(gpa), access, &w.ram, &view, &mut pml)
    };
    write(0x123, Access::READ, &mut index).unwrap();
    assert_eq!(index, 1, "reads are not logged");
    write(0x123, Access::WRITE, &mut index).unwrap();
    assert_eq!((index, w.entry(log + 8)), (0, 0), "the page's address is 0");
    write(0x1ff8, Access::WRITE, &mut index).unwrap();
    assert_eq!((index, w.entry(log)), (0xffff, 0x1000));
    write(0x1ff8, Access::WRITE, &mut index).unwrap();
    assert_eq!(index, 0xffff, "a dirty page is not logged again");
    let full = write(0x2000, Access::WRITE, &mut index);
    assert_eq!(full, Err(Fault::L1LogFull));
    let Walked::Page { entries, .. } = w.reference(root12, 0x2000) else { panic!() };
    assert_eq!(w.entry(entries[3]) & (A | D), 0, "the access did not happen");
    index = 511;
    write(0x2000, Access::WRITE, &mut index).unwrap();
    assert_eq!((index, w.entry(log + 511 * 8)), (510, 0x2000));
}

#[test]
fn faults_keep_their_qualification_and_owner() {
    let w = World::new();
    let root12 = w.table12();
    w.map12(root12, 0, 1, 0x9000 | R | X | WB, 7);
    w.map12(root12, 0x1000, 1, 0xfee0_0000 | 7, 7);
    w.map12(root12, 0x2000, 1, 0x9000 | W | WB, 7);
    let root01 = w.table01();
    w.map01(root01, 0, 2, 7 | WB | LARGE);
    let view = w.view01(root01);
    let mut e = w.ept02(8, false);
    let mut go = |gpa, q| {
        let a = Access::from_qualification(q);
        e.fill(key(root12, 0), &FORMAT, L2Gpa(gpa), a, &w.ram, &view, &mut NoLog).unwrap_err()
    };
    // Table 28-7: write (1), readable (3), executable (5), linear valid (7), translation (8).
    assert_eq!(go(0x10, 0x182), Fault::L1Violation { qualification: 0x1aa });
    assert_eq!(go(0x5000, 0x181), Fault::L1Violation { qualification: 0x181 });
    assert!(matches!(go(0x1020, 0x181), Fault::L0 { gpa: L1Gpa(0xfee0_0020), .. }));
    let Fault::L1Misconfiguration { step, .. } = go(0x2000, 0x181) else { panic!() };
    assert_eq!((step.level, step.entry.0), (Level::Pte, 0x9000 | W | WB));
    assert_eq!(go(1 << 48, 0x181), Fault::L1Violation { qualification: 0x181 });
}

/// Mode-based execute control (§29.3.2): user-mode fetches need bit 10.
#[test]
fn mode_based_execute() {
    let w = World::new();
    let root12 = w.table12();
    w.map12(root12, 0, 1, 0x9000 | R | XU | WB, 7 | XU);
    w.map12(root12, 0x1000, 1, 0x9000 | R | X | WB, 7 | XU);
    let root01 = w.plain01(0);
    let view = w.view01(root01);
    let mut e = w.ept02(16, false);
    let k = RootKey { mode_based_execute: true, ..key(root12, 0) };
    let user = Access { user_mode: true, ..Access::FETCH };
    let mut go = |gpa, a| e.fill(k, &FORMAT, L2Gpa(gpa), a, &w.ram, &view, &mut NoLog);
    assert_eq!(go(0, user).unwrap().mapping.rights.to_string(), "r--u");
    assert_eq!(go(0x1000, Access::FETCH).unwrap().mapping.rights.to_string(), "r-x-");
    // Bits 5 and 6: executable for supervisor, for user.
    assert_eq!(go(0, Access::FETCH), Err(Fault::L1Violation { qualification: 0x4c }));
    assert_eq!(go(0x1000, user), Err(Fault::L1Violation { qualification: 0x2c }));
    let eptp02 = e.root(k).eptp02;
    let Walked::Page { entries, .. } = w.reference(eptp02, 0) else { panic!() };
    assert_eq!(w.entry(entries[3]) & (7 | XU), R | XU);
    assert_eq!(w.entry(entries[2]) & (7 | XU), 7 | XU);
}

#[test]
fn several_roots_are_kept_and_the_oldest_goes_first() {
    let w = World::new();
    let root01 = w.plain01(0);
    let view = w.view01(root01);
    let roots: Vec<u64> = (0..3)
        .map(|_| {
            let r = w.table12();
            w.map12(r, 0, 1, 0x9000 | 7 | WB, 7);
            r
        })
        .collect();
    let mut e = w.ept02(8, false);
    let fill = |e: &mut ept_compress::Ept02, r: u64| {
        e.fill(key(r, 0), &FORMAT, L2Gpa(0), Access::READ, &w.ram, &view, &mut NoLog).unwrap().flush
    };
    assert_eq!(fill(&mut e, roots[0]), Flush::None);
    assert_eq!(fill(&mut e, roots[1]), Flush::None);
    let kept = e.root(key(roots[0], 0)).eptp02;
    assert_eq!((e.roots(), e.held_pages()), (2, 8));
    // The third takes the pages of the second, which was used before the first.
    assert_eq!(fill(&mut e, roots[2]), Flush::All);
    assert_eq!((e.roots(), e.held_pages(), e.stats().evicted_roots), (2, 8, 1));
    assert!(matches!(w.reference(kept, 0), Walked::Page { .. }));
    assert_eq!(e.root(key(roots[0], 0)).eptp02, kept);
}

#[test]
fn one_root_that_needs_more_than_there_is_starts_over() {
    let w = World::new();
    let root12 = w.table12();
    for g in 0..3 {
        w.map12(root12, g << 30, 1, 0x9000 | 7 | WB, 7);
    }
    let root01 = w.plain01(0);
    let view = w.view01(root01);
    let mut e = w.ept02(4, false);
    let k = key(root12, 0);
    let eptp02 = e.root(k).eptp02;
    for g in [0u64, 1, 2, 0] {
        let f = e.fill(k, &FORMAT, L2Gpa(g << 30), Access::READ, &w.ram, &view, &mut NoLog).unwrap();
        assert_eq!(f.flush, if e.stats().emptied == 0 { Flush::None } else { Flush::Eptp(eptp02) });
        assert!(matches!(w.reference(eptp02, g << 30), Walked::Page { .. }));
    }
    assert_eq!((e.stats().emptied, e.held_pages()), (3, 4));
}

#[test]
fn too_few_pages_are_refused() {
    let w = World::new();
    let new = |n| ept_compress::Ept02::new(w.memory.clone(), w.pool.clone(), n, FORMAT, false).map(|_| ());
    assert_eq!(new(3), Err(Ept02Error::TooSmall(3)));
    assert_eq!(new(4), Ok(()));
}

/// Tables outside RAM read as ones, which is a misconfiguration.
#[test]
fn tables_in_a_hole_are_misconfigured() {
    let w = World::new();
    let root12 = w.table12();
    w.set_entry(root12, 0xd000_0000 | 7);
    let root01 = w.plain01(0);
    let mut e = w.ept02(4, false);
    let view = w.view01(root01);
    let fault = e.fill(key(root12, 0), &FORMAT, L2Gpa(0), Access::READ, &w.ram, &view, &mut NoLog);
    assert!(matches!(fault, Err(Fault::L1Misconfiguration { .. })), "{fault:?}");
}

/// In write-protect mode, a table that L1 writes and does not use is let go, with what came from it, and
/// tracked again with its next use.
#[test]
fn a_table_that_is_written_again_and_again_is_let_go() {
    let w = World::new();
    let root12 = w.table12();
    w.map12(root12, 0x3000, 1, 0x9000 | 7 | WB, 7);
    let root01 = w.plain01(0);
    let view = w.view01(root01);
    let mut e = w.ept02(16, true);
    let k = key(root12, 0);
    let fill = |e: &mut ept_compress::Ept02| {
        e.fill(k, &FORMAT, L2Gpa(0x3000), Access::READ, &w.ram, &view, &mut NoLog).unwrap()
    };
    let Walked::Page { entries, .. } = w.reference(root12, 0x3000) else { panic!() };
    let table = L1Gpa(entries[3] & !0xfff);
    for _ in 0..3 {
        fill(&mut e);
        assert!(e.protection_changes().protect.contains(&table) && e.is_protected(table));
        let eptp02 = e.root(k).eptp02;
        // Another entry: what is mapped stays, until L0 has enough of it.
        let mut writes = 0;
        while e.is_protected(table) {
            assert!(matches!(w.reference(eptp02, 0x3000), Walked::Page { .. }));
            writes += 1;
            assert!(writes < 100);
            e.l1_wrote(table.offset(8), 8);
        }
        assert!(writes > 1);
        assert_eq!(w.reference(eptp02, 0x3000), Walked::NotPresent);
        assert_eq!(e.protection_changes().release, [table]);
    }
    // Writes with uses in between are all seen.
    for _ in 0..100 {
        fill(&mut e);
        let eptp02 = e.root(k).eptp02;
        assert_eq!(e.l1_wrote(table.offset(3 * 8), 8), Flush::Eptp(eptp02));
        assert!(e.is_protected(table));
        assert_eq!(w.reference(eptp02, 0x3000), Walked::NotPresent);
    }
}

/// A table that is not protected because L2 must write it is INVEPT's again.
#[test]
fn an_exempt_table_needs_invept() {
    let w = World::new();
    let root12 = w.table12();
    w.map12(root12, 0x3000, 1, 0x9000 | 7 | WB, 7);
    let root01 = w.plain01(0);
    let view = w.view01(root01);
    let mut e = w.ept02(16, true);
    let k = key(root12, 0);
    let eptp02 = e.root(k).eptp02;
    let fill = |e: &mut ept_compress::Ept02| {
        e.fill(k, &FORMAT, L2Gpa(0x3000), Access::READ, &w.ram, &view, &mut NoLog).unwrap();
        assert!(matches!(w.reference(eptp02, 0x3000), Walked::Page { .. }));
    };
    let mapped = |e: &ept_compress::Ept02| {
        assert!(e.held_pages() > 0);
        w.reference(eptp02, 0x3000) != Walked::NotPresent
    };
    fill(&mut e);
    assert_eq!(e.invept_all(), Flush::None, "all that L1 did would have been seen");
    assert!(mapped(&e));
    for invept in [ept_compress::Ept02::invept_all, |e: &mut ept_compress::Ept02| e.invept_single(0x1000)] {
        fill(&mut e);
        let changes = e.protection_changes();
        assert!(changes.protect.contains(&L1Gpa(root12)) || e.is_protected(L1Gpa(root12)));
        assert_eq!(e.exempt_table(L1Gpa(root12)), Flush::Eptp(eptp02));
        assert_eq!(e.protection_changes().release, [L1Gpa(root12)]);
        assert!(!mapped(&e));
        fill(&mut e);
        assert!(!e.is_protected(L1Gpa(root12)));
        assert!(!e.protection_changes().protect.contains(&L1Gpa(root12)));
        // Any EPTP: which roots use the table is not kept.
        assert_eq!(invept(&mut e), Flush::Eptp(eptp02));
        assert!(!mapped(&e));
        fill(&mut e);
        assert!(e.is_protected(L1Gpa(root12)), "from its next use on");
    }
}

/// What L2 could write before it became a table goes.
#[test]
fn a_new_table_is_protected_from_l2_too() {
    let w = World::new();
    let root12 = w.table12();
    w.map12(root12, 0x3000, 1, 0x9000 | 7 | WB, 7);
    w.map12(root12, 0x4000, 1, 0xa000 | 7 | WB, 7);
    w.map12(root12, 0x20_0000, 2, 0x20_0000 | 7 | WB | LARGE, 7);
    let root01 = w.plain01(0);
    let view = w.view01(root01);
    let mut e = w.ept02(16, true);
    let k = key(root12, 0);
    let eptp02 = e.root(k).eptp02;
    for gpa in [0x3000, 0x4000, 0x20_0000] {
        e.fill(k, &FORMAT, L2Gpa(gpa), Access::WRITE, &w.ram, &view, &mut NoLog).unwrap();
    }
    let mapped = |gpa| matches!(w.reference(eptp02, gpa), Walked::Page { .. });
    assert_eq!(e.protect_from_l2(0xb), Flush::None, "not mapped");
    assert_eq!(e.protect_from_l2(0x9), Flush::Eptp(eptp02));
    assert!(!mapped(0x3000) && mapped(0x4000) && mapped(0x20_0000));
    assert_eq!(e.protect_from_l2(0x9), Flush::None, "not any more");
    assert_eq!(e.protect_from_l2(0x3ff), Flush::Eptp(eptp02), "the last page of the large one");
    assert!(mapped(0x4000) && !mapped(0x20_0000));
}
