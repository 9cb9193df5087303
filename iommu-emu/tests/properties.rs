//! Properties over generated tables: the cached path agrees with a walk that shares nothing with the crate's own, and
//! an invalidation leaves nothing stale.

mod common;

use common::*;
use iommu_emu::{Access, Config};
use proptest::prelude::*;
use x86_spec::pci::Bdf;

/// Few devices, domains and places, so that they meet.
const DEVICES: [Bdf; 3] = [Bdf::new(0, 3, 0), Bdf::new(0, 3, 1), Bdf::new(0, 5, 0)];
const DOMAINS: [u16; 2] = [1, 0x1234];

/// A leaf in one of two domains' tables.
#[derive(Clone, Debug)]
struct Mapping {
    domain: usize,
    iova: u64,
    level: u32,
    target: u64,
    bits: u64,
}

fn place() -> impl Strategy<Value = u64> {
    [0..2u64, 0..2u64, 0..3u64, 0..3u64].prop_map(|p| p[0] << 39 | p[1] << 30 | p[2] << 21 | p[3] << 12)
}

fn mapping() -> impl Strategy<Value = Mapping> {
    let bits = prop_oneof![
        8 => Just(R | W), 3 => Just(R), 2 => Just(W), 2 => Just(0), 1 => Just(R | W | 1 << 11),
        1 => Just(R | 1 << 62), 1 => Just(R | W | 1 << 46), 1 => Just(R | W | 0x3ff << 52 | 0x7c)
    ];
    // Within RAM, beyond it, around the interrupt range.
    let target = prop_oneof![6 => 0..0x1000u64, 1 => 0xfed00..0xfef10u64, 1 => Just(0x4_0000u64)];
    let level = prop_oneof![6 => Just(1u32), 3 => Just(2), 1 => Just(3)];
    (0..2usize, place(), level, target, bits, prop::bool::weighted(0.1)).prop_map(
        |(domain, iova, level, target, bits, unaligned)| {
            let within = if unaligned { 0xfff } else { (1 << (12 + 9 * (level - 1))) - 1 };
            Mapping { domain, iova, level, target: target << 12 & !within, bits }
        },
    )
}

#[derive(Clone, Debug)]
enum Step {
    Map(Mapping),
    /// Changes an upper-level entry's rights.
    Restrict {
        domain: usize,
        iova: u64,
        level: u32,
        bits: u64,
    },
    /// Puts a device into a domain, or passes it through, or takes it out.
    Attach {
        device: usize,
        to: usize,
    },
    Access {
        device: usize,
        iova: u64,
        write: bool,
    },
    Invalidate(Invalidation),
}

#[derive(Clone, Debug)]
enum Invalidation {
    Everything,
    Contexts,
    Domain(usize),
    Pages {
        domain: usize,
        iova: u64,
        mask: u64,
    },
    /// The device's context entry, with all domains that it was in.
    Device(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let invalidation = prop_oneof![
        1 => Just(Invalidation::Everything),
        1 => Just(Invalidation::Contexts),
        2 => (0..2usize).prop_map(Invalidation::Domain),
        4 => (0..2usize, place(), prop_oneof![4 => Just(0u64), 1 => Just(9), 1 => Just(18)])
            .prop_map(|(domain, iova, mask)| Invalidation::Pages { domain, iova, mask }),
        2 => (0..3usize).prop_map(Invalidation::Device),
    ];
    prop_oneof![
        4 => mapping().prop_map(Step::Map),
        1 => (0..2usize, place(), 2..4u32, prop_oneof![Just(R), Just(W), Just(R | W)])
            .prop_map(|(domain, iova, level, bits)| Step::Restrict { domain, iova, level, bits }),
        2 => (0..3usize, 0..4usize).prop_map(|(device, to)| Step::Attach { device, to }),
        12 => (0..3usize, place(), 0..0x1000u64, any::<bool>())
            .prop_map(|(device, iova, offset, write)| Step::Access { device, iova: iova | offset, write }),
        3 => invalidation.prop_map(Step::Invalidate),
    ]
}

/// What the specification says of an access with the tables as they are, by plain arithmetic (§9.1, §9.3, §9.8).
fn naive(w: &World, device: Bdf, iova: u64, write: bool) -> Result<u64, u8> {
    let word = |at: u64| if at + 8 <= RAM { Some(w.peek(at)) } else { None };
    let entry = CONTEXTS + u64::from(device.devfn()) * 16;
    let (low, high) = (w.peek(entry), w.peek(entry + 8));
    if low & 1 == 0 {
        return Err(2);
    }
    let levels = (high & 7) + 2;
    if iova >> (9 * levels + 12) != 0 {
        return Err(4);
    }
    if low >> 2 & 3 == 2 {
        return Ok(iova);
    }
    let mut table = low & !0xfff;
    for level in (0..levels).rev() {
        let shift = 12 + 9 * level;
        let Some(e) = word(table + (iova >> shift) % 512 * 8) else { return Err(7) };
        if write && e & W == 0 {
            return Err(5);
        }
        if !write && e & R == 0 {
            return Err(6);
        }
        let leaf = level == 0 || e & PS != 0;
        let page = 1u64 << shift;
        // Bits 51:46 are above the host's width; TM; SNP but in leaves; the address within a large page.
        let snoop = if leaf { 0 } else { 1 << 11 };
        let within = if leaf { (page - 1) & !0xfff } else { 0 };
        if level == 3 && leaf || e & (0x3f << 46 | 1 << 62 | snoop | within) != 0 {
            return Err(0xc);
        }
        let address = e & 0x000f_ffff_ffff_f000;
        if leaf {
            let to = address | iova & (page - 1);
            return if to >> 20 == 0xfee { Err(0xe) } else { Ok(to) };
        }
        table = address;
    }
    unreachable!("the last level is a leaf")
}

struct Model {
    w: World,
    tables: [u64; 2],
}

impl Model {
    fn new(caching_mode: bool) -> Self {
        let mut w = World::translating(Config { caching_mode, ..Config::default() });
        w.enable_queue();
        let tables = [w.table(), w.table()];
        Self { w, tables }
    }

    fn levels(domain: usize) -> u32 {
        if domain == 0 { 3 } else { 4 }
    }

    fn attach(&mut self, device: usize, to: usize) {
        let (low, high) = match to {
            0 => (self.tables[0] | 1, u64::from(DOMAINS[0]) << 8 | AW39),
            1 => (self.tables[1] | 1, u64::from(DOMAINS[1]) << 8 | AW48),
            2 => (1 | 2 << 2, 0x77 << 8 | AW48),
            _ => (0, 0),
        };
        self.w.set_context(DEVICES[device], low, high);
    }

    fn map(&mut self, m: &Mapping) {
        let levels = Self::levels(m.domain);
        let large = if m.level > 1 { PS } else { 0 };
        self.w.map(self.tables[m.domain], levels, m.iova, m.level, m.target | m.bits | large);
    }

    /// Sets the rights of the table entry at `level` for `iova`, if there is a table below it.
    fn restrict(&mut self, domain: usize, iova: u64, level: u32, bits: u64) {
        let mut table = self.tables[domain];
        for l in (level..=Self::levels(domain)).rev() {
            let slot = table + (iova >> (12 + 9 * (l - 1)) & 0x1ff) * 8;
            let entry = self.w.peek(slot);
            if entry & 3 == 0 || entry & PS != 0 {
                return;
            }
            if l == level {
                return self.w.poke(slot, entry & !3 | bits);
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
    }

    fn invalidate(&mut self, what: &Invalidation) {
        let done = wait_status(1);
        match what {
            Invalidation::Everything => self.w.submit(&[context_global(), iotlb_global(), done]),
            Invalidation::Contexts => self.w.submit(&[context_global(), done]),
            Invalidation::Domain(d) => self.w.submit(&[iotlb_domain(DOMAINS[*d]), done]),
            Invalidation::Pages { domain, iova, mask } => {
                self.w.submit(&[iotlb_pages(DOMAINS[*domain], *iova, *mask), done]);
            }
            Invalidation::Device(d) => {
                let id = u64::from(DEVICES[*d].requester_id());
                let of = |domain: u64| [1 | 3 << 4 | domain << 16 | id << 32, 0];
                self.w.submit(&[of(0), of(0x77), of(DOMAINS[0].into()), of(DOMAINS[1].into()), done]);
            }
        }
    }

    fn access(&mut self, device: usize, iova: u64, write: bool) -> Result<u64, u8> {
        let access = if write { Access::Write } else { Access::Read };
        self.w.access_from(DEVICES[device], iova, access)
    }
}

fn places() -> Vec<u64> {
    let mut all = Vec::new();
    for i in 0..36u64 {
        all.push((i / 18) << 39 | (i / 9 % 2) << 30 | (i / 3 % 3) << 21 | (i % 3) << 12);
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// Tables that do not change: the first access, which walks, and later ones, which do not, agree with the naive walk,
    /// whatever order they come in.
    #[test]
    fn the_cached_path_agrees_with_the_naive_walk(
        maps in prop::collection::vec(mapping(), 0..20),
        to in [0..4usize, 0..4usize, 0..4usize],
        accesses in prop::collection::vec((0..3usize, place(), 0..0x1000u64, any::<bool>()), 1..80),
        caching_mode in any::<bool>(),
    ) {
        let mut m = Model::new(caching_mode);
        maps.iter().for_each(|map| m.map(map));
        (0..3).for_each(|device| m.attach(device, to[device]));
        for (device, iova, offset, write) in accesses {
            let expected = naive(&m.w, DEVICES[device], iova | offset, write);
            prop_assert_eq!(m.access(device, iova | offset, write), expected, "{:#x}", iova | offset);
        }
    }

    /// No byte that a translation hands out lies outside what is mapped.
    #[test]
    fn the_whole_length_is_mapped(
        maps in prop::collection::vec(mapping(), 1..20),
        accesses in prop::collection::vec((place(), 0..0x1000u64, any::<bool>()), 1..20),
    ) {
        let mut m = Model::new(false);
        maps.iter().for_each(|map| m.map(map));
        m.attach(0, 1);
        for (iova, offset, write) in accesses {
            let access = if write { Access::Write } else { Access::Read };
            let at = iova | offset;
            if let Ok(to) = m.w.unit.translate(DEVICES[0], iommu_emu::Iova(at), access) {
                for step in [0, 1, 0x1000, 0x1f_f000, to.len / 2, to.len - 1] {
                    let Some(step) = Some(step).filter(|s| *s < to.len) else { continue };
                    let there = naive(&m.w, DEVICES[0], at + step, write);
                    prop_assert!(there == Ok(to.gpa.0 + step) || there == Err(0xe), "{at:#x} + {step:#x}");
                }
            }
        }
    }

    /// Tables that change: an answer is always one that was right since the last invalidation that concerns it;
    /// after the invalidation of everything, or of a place and its context, it is the one that is right now.
    #[test]
    fn nothing_stale_remains(steps in prop::collection::vec(step(), 1..120), caching_mode in any::<bool>()) {
        let mut m = Model::new(caching_mode);
        for step in &steps {
            match step {
                Step::Map(map) => m.map(map),
                Step::Restrict { domain, iova, level, bits } => m.restrict(*domain, *iova, *level, *bits),
                Step::Attach { device, to } => m.attach(*device, *to),
                Step::Access { device, iova, write } => {
                    let _ = m.access(*device, *iova, *write);
                }
                Step::Invalidate(what) => {
                    m.invalidate(what);
                    check(&mut m, what)?;
                }
            }
        }
        m.invalidate(&Invalidation::Everything);
        check(&mut m, &Invalidation::Everything)?;
    }
}

/// What an invalidation promises. A domain's translations are looked at by a device that is attached to the
/// domain for the purpose, so that no old context is in the way.
fn check(m: &mut Model, what: &Invalidation) -> Result<(), TestCaseError> {
    let in_scope: Vec<(usize, u64)> = match what {
        Invalidation::Everything => (0..3).flat_map(|d| places().into_iter().map(move |p| (d, p))).collect(),
        Invalidation::Domain(domain) => scoped(m, *domain, |_| true),
        Invalidation::Pages { domain, iova, mask } => {
            scoped(m, *domain, |p| p >> (12 + mask) == iova >> (12 + mask))
        }
        // Contexts alone say nothing of the IOTLB: what is checked is whether a device has one.
        Invalidation::Contexts => return contexts(m, &[0, 1, 2]),
        Invalidation::Device(d) => return contexts(m, &[*d]),
    };
    for (device, place) in in_scope {
        for write in [false, true] {
            let expected = naive(&m.w, DEVICES[device], place, write);
            prop_assert_eq!(m.access(device, place, write), expected, "{:?}: {:#x}", what, place);
        }
    }
    Ok(())
}

/// The places of `domain` that `wanted` names, as device 2 sees them, which is attached to it.
fn scoped(m: &mut Model, domain: usize, wanted: impl Fn(u64) -> bool) -> Vec<(usize, u64)> {
    m.attach(2, domain);
    m.invalidate(&Invalidation::Device(2));
    places().into_iter().filter(|p| wanted(*p)).map(|p| (2, p)).collect()
}

/// The devices' context entries are the current ones: not present, passing through, or in the domain.
fn contexts(m: &mut Model, devices: &[usize]) -> Result<(), TestCaseError> {
    for device in devices {
        // Beyond 39 bits and beyond 48: no tables are needed to tell the entries apart.
        for iova in [1 << 47, 1 << 48] {
            let expected = naive(&m.w, DEVICES[*device], iova, false);
            let is_by_tables = !matches!(expected, Ok(_) | Err(2 | 4));
            let actual = m.access(*device, iova, false);
            prop_assert!(actual == expected || is_by_tables && actual.is_err(), "{actual:?} {expected:?}");
        }
    }
    Ok(())
}
