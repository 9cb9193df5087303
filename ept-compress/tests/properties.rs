//! Properties of the composition, with generated tables.

mod common;

use common::*;
use ept_compress::{Access, Fault, Flush, L0Fault, NoLog, RootKey, compose};
use memory::L2Gpa;
use proptest::prelude::*;
use x86_spec::exit::ept_violation as q;

/// A mapping in generated tables.
#[derive(Debug, Clone)]
struct Mapping {
    place: [u64; 4],
    level: u32,
    target: u64,
    rights: u64,
    upper: u64,
    memory_type: u64,
    flags: u64,
    damage: Option<u32>,
}

/// Few places, so that mappings meet.
fn address(place: [u64; 4]) -> u64 {
    place[0] << 39 | place[1] << 30 | place[2] << 21 | place[3] << 12
}

fn place() -> impl Strategy<Value = [u64; 4]> {
    [0..2u64, 0..2u64, 0..3u64, 0..3u64]
}

fn mapping() -> impl Strategy<Value = Mapping> {
    let rights = prop_oneof![
        6 => Just(7u64), 2 => Just(R), 2 => Just(R | W), 2 => Just(R | X), 1 => Just(X), 1 => Just(0), 1 => Just(W)
    ];
    let upper = prop_oneof![8 => Just(7u64), 1 => Just(R), 1 => Just(R | W), 1 => Just(R | X)];
    let memory_type = prop_oneof![6 => Just(6u64), 1 => Just(0), 1 => Just(1), 1 => Just(4), 1 => Just(5)];
    let damage = prop_oneof![12 => Just(None), 1 => (3..63u32).prop_map(Some)];
    let flags = prop_oneof![Just(0), Just(A), Just(D), Just(A | D), Just(1 << 6)];
    (place(), 1..4u32, 0..3u64, 0..3u64, rights, upper, memory_type, (flags, damage)).prop_map(
        |(place, level, hi, lo, rights, upper, memory_type, (flags, damage))| Mapping {
            place,
            level,
            target: (hi << 30 | lo << 21 | lo << 12) & !(size(level) - 1),
            rights,
            upper,
            memory_type,
            flags,
            damage,
        },
    )
}

fn leaf(m: &Mapping) -> u64 {
    let large = if m.level > 1 { LARGE } else { 0 };
    m.target | m.rights | m.memory_type << 3 | large | m.flags | m.damage.map_or(0, |b| 1 << b)
}

/// An access: place, offset, kind.
fn access() -> impl Strategy<Value = (u64, Access)> {
    let kinds = prop_oneof![
        Just(Access::READ),
        Just(Access::WRITE),
        Just(Access::FETCH),
        Just(Access { write: true, ..Access::READ }),
        Just(Access::from_qualification(q::READ | q::LINEAR_VALID)),
        Just(Access::from_qualification(q::READ | q::WRITE | q::LINEAR_VALID)),
    ];
    (place(), 0..0x1000u64, kinds).prop_map(|(p, offset, kind)| (address(p) | offset, kind))
}

struct Tables {
    world: World,
    root12: u64,
    root01: u64,
}

fn build(maps12: &[Mapping], maps01: &[Mapping]) -> Tables {
    let world = World::new();
    let (root12, root01) = (world.table12(), world.table01());
    for m in maps12 {
        world.map12(root12, address(m.place), m.level, leaf(m), m.upper);
    }
    for m in maps01 {
        // EPT01's places are EPT12's targets.
        let at = m.place[1] << 30 | m.place[2] << 21 | m.place[3] << 12;
        let damage = None;
        let leaf = leaf(&Mapping { damage, rights: if m.rights == W { 7 } else { m.rights }, ..m.clone() });
        world.map01(root01, at, m.level, leaf + (5 << 32));
    }
    Tables { world, root12, root01 }
}

/// Bits 6:3 (memory type and "ignore PAT") of a mapping that both tables have: EPT01's where it ignores
/// the PAT, else EPT12's "ignore PAT" and the stricter type (SDM Vol. 3C §29.3.7, Vol. 3A table 12-7).
fn type_bits(t: &Tables, gpa: u64) -> Option<u64> {
    let leaf = |root, at| match t.world.reference(root, at) {
        Walked::Page { address, memory_type, entries, .. } => {
            Some((address, memory_type, t.world.entry(*entries.last()?) & 1 << 6))
        }
        _ => None,
    };
    let (l1_gpa, type12, ignore12) = leaf(t.root12, gpa)?;
    let (_, type01, ignore01) = leaf(t.root01, l1_gpa)?;
    Some(match (type12, type01) {
        (_, b) if ignore01 != 0 => b << 3 | ignore01,
        (a, b) if a == b || b == 6 => a << 3 | ignore12,
        (6, b) => b << 3 | ignore12,
        _ => ignore12,
    })
}

/// What the architecture says of the access, by the reference walker: the rights that it needs.
fn needed(a: &Access, ad: bool) -> u64 {
    let walk = ad && a.paging_structure;
    let bit = |on: bool, b: u64| if on { b } else { 0 };
    bit(a.read || walk, R) | bit(a.write || walk, W) | bit(a.fetch, X)
}

#[derive(Debug, PartialEq)]
enum Expected {
    Mapped { machine: u64, size: u64, rights: u64 },
    L1Violation(u64),
    L1Misconfiguration,
    L0NoMemory(u64),
    L0Denied(u64),
    L0Misconfiguration(u64),
}

fn expect(t: &Tables, gpa: u64, a: &Access, ad: bool) -> Expected {
    let need = needed(a, ad);
    let (l1_gpa, size12, rights12, dirty) = match t.world.reference(t.root12, gpa) {
        Walked::NotPresent => return Expected::L1Violation(need | a.linear_bits),
        Walked::Misconfigured => return Expected::L1Misconfiguration,
        Walked::Page { address, size, rights, dirty, .. } => (address, size, rights, dirty),
    };
    if need & !rights12 != 0 {
        return Expected::L1Violation(need | rights12 << 3 | a.linear_bits);
    }
    match t.world.reference(t.root01, l1_gpa) {
        Walked::NotPresent => Expected::L0NoMemory(l1_gpa),
        Walked::Misconfigured => Expected::L0Misconfiguration(l1_gpa),
        Walked::Page { rights, .. } if need & !rights != 0 => Expected::L0Denied(l1_gpa),
        Walked::Page { address, size, rights, .. } => {
            let writable = !ad || dirty || need & W != 0;
            let rights = rights & rights12 & if writable { 7 } else { !W };
            Expected::Mapped { machine: address, size: size.min(size12), rights }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// `compose` is a walk of EPT12 and then of EPT01; it sets the flags that the walk of
    /// EPT12 sets, and no other bit of any table.
    #[test]
    fn compose_is_both_walks(
        maps12 in prop::collection::vec(mapping(), 1..12),
        maps01 in prop::collection::vec(mapping(), 1..12),
        accesses in prop::collection::vec(access(), 1..20),
        ad: bool,
    ) {
        let t = build(&maps12, &maps01);
        let eptp12 = t.root12 | 0x1e | if ad { EPTP_AD } else { 0 };
        for (gpa, a) in &accesses {
            let expected = expect(&t, *gpa, a, ad);
            let before = t.world.reference(t.root12, *gpa);
            let entries = match &before { Walked::Page { entries, .. } => entries.clone(), _ => vec![] };
            let old: Vec<u64> = entries.iter().map(|e| t.world.entry(*e)).collect();
            let got = compose(eptp12, &FORMAT, L2Gpa(*gpa), *a, &t.world.ram, &t.world.view01(t.root01), &mut NoLog);
            let got_short = match &got {
                Ok(c) => Expected::Mapped {
                    machine: c.page.0 | gpa & (c.level.size() - 1),
                    size: c.level.size(),
                    rights: c.rights.entry_bits(false),
                },
                Err(Fault::L1Violation { qualification }) => Expected::L1Violation(*qualification),
                Err(Fault::L1Misconfiguration { .. }) => Expected::L1Misconfiguration,
                Err(Fault::L0 { gpa, fault: L0Fault::NoMemory }) => Expected::L0NoMemory(gpa.0),
                Err(Fault::L0 { gpa, fault: L0Fault::Denied(_) }) => Expected::L0Denied(gpa.0),
                Err(Fault::L0 { gpa, fault: L0Fault::Misconfiguration(_) }) => Expected::L0Misconfiguration(gpa.0),
                Err(other) => panic!("{other}"),
            };
            prop_assert_eq!(&got_short, &expected, "gpa {:#x} {:?}", gpa, a);
            if let Ok(c) = &got {
                let bits = (c.memory_type as u64) << 3 | u64::from(c.ignore_pat) << 6;
                prop_assert_eq!(Some(bits), type_bits(&t, *gpa));
            }
            // Flags: A on the whole path, D on the leaf of a write, if L1 lets the access through.
            let allowed = !matches!(expected, Expected::L1Violation(_) | Expected::L1Misconfiguration);
            for (i, (at, was)) in entries.iter().zip(&old).enumerate() {
                let last = i + 1 == entries.len();
                let mut want = *was;
                if ad && allowed {
                    want |= A | if last && needed(a, ad) & W != 0 { D } else { 0 };
                }
                prop_assert_eq!(t.world.entry(*at), want);
            }
        }
    }

    /// After any fills, EPT02 walked by itself never allows what the two walks don't, leads where they
    /// lead, allows the access that was just filled, and stays within its pages.
    #[test]
    fn ept02_says_what_both_say(
        maps12 in prop::collection::vec(mapping(), 1..12),
        maps01 in prop::collection::vec(mapping(), 1..12),
        accesses in prop::collection::vec(access(), 1..40),
        ad: bool, limit in 4u64..20, write_protect: bool,
    ) {
        let t = build(&maps12, &maps01);
        let key = RootKey { eptp12: t.root12 | 0x1e | if ad { EPTP_AD } else { 0 }, mode_based_execute: false };
        let mut ept02 = t.world.ept02(limit, write_protect);
        for (gpa, a) in &accesses {
            let filled = ept02.fill(key, &FORMAT, L2Gpa(*gpa), *a, &t.world.ram, &t.world.view01(t.root01), &mut NoLog);
            prop_assert!(ept02.held_pages() <= limit);
            prop_assert_eq!(t.world.pool.used(), ept02.held_pages());
            let eptp02 = ept02.root(key).eptp02;
            for (other, b) in &accesses {
                let expected = expect(&t, *other, b, ad);
                match t.world.reference(eptp02, *other) {
                    Walked::NotPresent => {}
                    Walked::Misconfigured => prop_assert!(false, "EPT02 is misconfigured at {:#x}", other),
                    Walked::Page { address, rights, size, .. } => {
                        let allows = needed(b, ad) & !rights == 0;
                        match expected {
                            Expected::Mapped { machine, size: s, rights: r } => {
                                prop_assert_eq!(address, machine);
                                prop_assert!(size <= s);
                                prop_assert_eq!(rights & !r, 0);
                            }
                            _ => prop_assert!(!allows, "{:#x} {:?}: {:?}", other, b, expected),
                        }
                    }
                }
            }
            if let Ok(f) = filled {
                let Walked::Page { rights, size, entries, .. } = t.world.reference(eptp02, *gpa) else {
                    return Err(TestCaseError::fail("not filled"));
                };
                prop_assert_eq!(needed(a, ad) & !rights, 0);
                prop_assert_eq!(size, f.mapping.level.size());
                let leaf = entries.last().map(|at| t.world.entry(*at) & 0x78);
                prop_assert_eq!(leaf, type_bits(&t, *gpa));
            }
        }
        drop(ept02);
        prop_assert_eq!(t.world.pool.used(), 0);
    }

    /// After INVEPT nothing of the old tables is left; nor after machine memory was invalidated.
    #[test]
    fn invalidation_leaves_nothing_stale(
        maps12 in prop::collection::vec(mapping(), 1..12),
        accesses in prop::collection::vec(access(), 1..30),
        all: bool,
    ) {
        let t = build(&maps12, &[]);
        let root01 = t.world.plain01(1 << 40);
        let view = t.world.view01(root01);
        let key = RootKey { eptp12: t.root12 | 0x1e, mode_based_execute: false };
        let mut ept02 = t.world.ept02(64, false);
        let fill = |e: &mut ept_compress::Ept02| {
            accesses.iter().filter(|(gpa, a)| {
                e.fill(key, &FORMAT, L2Gpa(*gpa), *a, &t.world.ram, &view, &mut NoLog).is_ok()
            }).count()
        };
        fill(&mut ept02);
        let eptp02 = ept02.root(key).eptp02;
        // One machine page's mappings, the smallest unit.
        let mapped = accesses.iter().find_map(|(gpa, _)| match t.world.reference(eptp02, *gpa) {
            Walked::Page { address, .. } => Some(address),
            _ => None,
        });
        if let Some(address) = mapped {
            prop_assert_eq!(ept02.invalidate_machine(address >> 12, 1), Flush::Eptp(eptp02));
            for (gpa, _) in &accesses {
                if let Walked::Page { address: a, size, .. } = t.world.reference(eptp02, *gpa) {
                    let page = a & !(size - 1);
                    prop_assert!(!(page..page + size).contains(&address));
                }
            }
        }
        fill(&mut ept02);
        let flush = if all { ept02.invept_all() } else { ept02.invept_single(key.eptp12 | EPTP_AD) };
        prop_assert_eq!(flush, Flush::Eptp(eptp02));
        prop_assert_eq!(ept02.root(key).eptp02, eptp02, "VMCS02 stays as it is");
        for (gpa, _) in &accesses {
            prop_assert_eq!(t.world.reference(eptp02, *gpa), Walked::NotPresent);
        }
    }

    /// With write-protection, L1's writes to its tables alone keep EPT02 right.
    #[test]
    fn write_protection_keeps_in_step(
        maps12 in prop::collection::vec(mapping(), 1..12),
        accesses in prop::collection::vec(access(), 1..20),
        writes in prop::collection::vec((any::<prop::sample::Index>(), 0..4usize, any::<u64>(), any::<bool>()), 1..20),
        ad: bool,
    ) {
        let t = build(&maps12, &[]);
        let root01 = t.world.plain01(1 << 40);
        let view = t.world.view01(root01);
        let key = RootKey { eptp12: t.root12 | 0x1e | if ad { EPTP_AD } else { 0 }, mode_based_execute: false };
        let mut ept02 = t.world.ept02(64, true);
        let mut protected = std::collections::HashSet::new();
        for (which, step, value, keep_valid) in &writes {
            for (gpa, a) in &accesses {
                let _ = ept02.fill(key, &FORMAT, L2Gpa(*gpa), *a, &t.world.ram, &view, &mut NoLog);
            }
            let changes = ept02.protection_changes();
            for p in changes.release { prop_assert!(protected.remove(&p)); }
            for p in changes.protect { prop_assert!(protected.insert(p)); }
            prop_assert_eq!(&ept02.protected_pages().collect::<std::collections::HashSet<_>>(), &protected);
            // L1 changes an entry on the way to one of the addresses.
            let gpa = accesses[which.index(accesses.len())].0;
            let Walked::Page { entries, .. } = t.world.reference(t.root12, gpa) else { continue };
            let at = entries[(*step).min(entries.len() - 1)];
            prop_assert!(ept02.is_protected(l1(at)) || t.world.reference(ept02.root(key).eptp02, gpa) == Walked::NotPresent);
            let old = t.world.entry(at);
            t.world.set_entry(at, if *keep_valid { old ^ (value & (7 | A | D)) } else { 0 });
            ept02.l1_wrote(l1(at), 8);
            let eptp02 = ept02.root(key).eptp02;
            for (gpa, _) in &accesses {
                let Walked::Page { address, rights, .. } = t.world.reference(eptp02, *gpa) else { continue };
                let Walked::Page { address: l1_gpa, rights: r12, dirty, .. } = t.world.reference(t.root12, *gpa) else {
                    return Err(TestCaseError::fail(format!("{gpa:#x} is stale")));
                };
                prop_assert_eq!(address, l1_gpa + (1 << 40));
                prop_assert_eq!(rights & !r12, 0);
                prop_assert!(!ad || dirty || rights & W == 0);
            }
        }
    }

    /// A reclaimed table never shows through another root.
    #[test]
    fn many_roots_in_few_pages(
        picks in prop::collection::vec((0..6usize, access()), 1..80), limit in 4u64..24,
    ) {
        let w = World::new();
        let roots: Vec<u64> = (0..6u64).map(|n| {
            let root = w.table12();
            for p in 0..3u64 {
                for i in 0..3u64 {
                    w.map12(root, p << 21 | i << 12, 1, (n << 30 | p << 21 | i << 12) | 7 | WB, 7);
                }
            }
            root
        }).collect();
        let root01 = w.plain01(1 << 40);
        let view = w.view01(root01);
        let mut ept02 = w.ept02(limit, false);
        for (n, (gpa, _)) in picks {
            let gpa = gpa & 0x7f_ffff;
            let key = RootKey { eptp12: roots[n] | 0x1e, mode_based_execute: false };
            let filled = ept02.fill(key, &FORMAT, L2Gpa(gpa), Access::READ, &w.ram, &view, &mut NoLog);
            prop_assert!(ept02.held_pages() <= limit);
            prop_assert!(filled.is_ok() == (gpa >> 21 < 3 && (gpa >> 12 & 511) < 3));
            for (m, root) in roots.iter().enumerate() {
                // Asking makes a root, possibly by evicting others, so look at this one only.
                if m != n { continue }
                let key = RootKey { eptp12: root | 0x1e, mode_based_execute: false };
                let eptp02 = ept02.root(key).eptp02;
                for a in (0..3u64).flat_map(|p| (0..3u64).map(move |i| p << 21 | i << 12)) {
                    if let Walked::Page { address, .. } = w.reference(eptp02, a) {
                        prop_assert_eq!(address, (1 << 40) + ((m as u64) << 30 | a));
                    }
                }
            }
        }
        drop(ept02);
        prop_assert_eq!(w.pool.used(), 0);
    }
}
