//! Tests of paging, EPT and self-modifying code: what the MMU does, seen from the guest.

use engine::{InvalidateScope, VmExit};
use x86_spec::controls::{PinbasedControls, SecondaryControls as S};
use x86_spec::ept;
use x86_spec::exception::{self as ex, pf};
use x86_spec::exit::{ExitReason as R, ept_violation as q};
use x86_spec::interruption::InterruptionInfo;
use x86_spec::reg::{cr0, cr4, efer, gpr, rflags};

use super::testutil::*;
use crate::cpu::Access::{self, Fetch, Read, Write};

const HLT: u8 = 0xf4;
const VMCALL: [u8; 3] = [0x0f, 0x01, 0xc1];

const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const XD: u64 = 1 << 63;
/// Above the physical-address width.
const RESERVED: u64 = 1 << 50;

/// Tables for the tests' linear address, one page per level, highest first, then the page.
const TABLES: [u64; 5] = [0x1_0000, 0xf_0000, 0xf_1000, 0xf_2000, 0xf_3000];

/// An instruction that makes the access to \[RBX\], then VMCALL.
fn access_code(access: Access) -> Vec<u8> {
    let mut bytes: Vec<u8> = match access {
        Read => vec![0x8b, 0x03],
        Write => vec![0x89, 0x03],
        Fetch => vec![0xff, 0xe3],
    };
    bytes.extend(VMCALL);
    bytes
}

/// Every page fault exits; VMCALL ends what works.
fn page_fault_exits(g: &mut Guest) {
    g.vmcs.controls.exception_bitmap |= 1 << ex::PF;
}

/// The page fault's error code, or `None` for an access that worked.
#[track_caller]
fn outcome(g: &mut Guest, linear: u64) -> Option<u32> {
    let e = g.enter();
    match e.reason {
        R::Vmcall => None,
        R::ExceptionOrNmi => {
            assert_eq!((e.interruption_info.vector(), e.qualification), (ex::PF, linear), "{e:x?}");
            Some(e.interruption_error_code)
        }
        _ => panic!("{e:x?}"),
    }
}

/// The linear address of 4-level tests: slot 1 of each level.
const LINEAR: u64 = 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12;

fn long(user: bool, access: Access, flags: [u64; 4]) -> Guest {
    let bytes = access_code(access);
    let mut g = if user { Guest::user(&bytes) } else { Guest::long(&bytes) };
    for (n, f) in flags.into_iter().enumerate() {
        g.write64(TABLES[n] + 8, TABLES[n + 1] | f);
    }
    g.write(TABLES[4], &VMCALL);
    if !user {
        // The code itself in a supervisor page, for SMEP and SMAP.
        g.write64(0x1_2000, 0x83);
    }
    page_fault_exits(&mut g);
    g.with(gpr::RBX, LINEAR)
}

/// 4-level paging: which accesses fault, and with which code (SDM Vol. 3A §4.5, §4.6, §4.7).
#[test]
fn four_level_permissions() {
    const ALL: u64 = P | W | U;
    let (user, supervisor) = (true, false);
    let f = |level: usize, flags: u64| {
        let mut all = [ALL; 4];
        all[level] = flags;
        all
    };
    for level in 0..4 {
        for (cpl3, access, flags, code) in [
            (user, Read, ALL, None),
            (user, Write, ALL, None),
            (user, Fetch, ALL, None),
            (user, Read, ALL & !P, Some(pf::U)),
            (user, Write, ALL & !P, Some(pf::U | pf::W)),
            (user, Fetch, ALL & !P, Some(pf::U | pf::I)),
            (supervisor, Read, ALL & !P, Some(0)),
            (user, Read, ALL & !U, Some(pf::P | pf::U)),
            (user, Fetch, ALL & !U, Some(pf::P | pf::U | pf::I)),
            (supervisor, Read, ALL & !U, None),
            (user, Write, ALL & !W, Some(pf::P | pf::U | pf::W)),
            (user, Read, ALL & !W, None),
            (supervisor, Write, ALL & !W, Some(pf::P | pf::W)),
            (user, Fetch, ALL | XD, Some(pf::P | pf::U | pf::I)),
            (supervisor, Fetch, ALL | XD, Some(pf::P | pf::I)),
            (user, Read, ALL | XD, None),
            (user, Read, ALL | RESERVED, Some(pf::P | pf::U | pf::RSVD)),
            (supervisor, Write, ALL | RESERVED, Some(pf::P | pf::W | pf::RSVD)),
        ] {
            let mut g = long(cpl3, access, f(level, flags));
            assert_eq!(outcome(&mut g, LINEAR), code, "level {level} {access:?} {flags:x}");
        }
    }
    // PS is reserved in a PML4E; in a large page, the bits below its base but for PAT.
    let mut g = long(user, Read, f(0, ALL | PS));
    assert_eq!(outcome(&mut g, LINEAR), Some(pf::P | pf::U | pf::RSVD));
    let mut g = long(user, Read, f(2, ALL | PS));
    assert_eq!(outcome(&mut g, LINEAR), Some(pf::P | pf::U | pf::RSVD), "bit 13 of the PDE's address");
}

/// Control bits (SDM Vol. 3A §4.6.1): WP, SMEP, SMAP with AC, NXE.
#[test]
fn control_bits() {
    const ALL: u64 = P | W | U;
    let run = |access, leaf: u64, change: &dyn Fn(&mut Guest)| {
        let mut g = long(false, access, [ALL, ALL, ALL, leaf]);
        change(&mut g);
        outcome(&mut g, LINEAR)
    };
    let none: &dyn Fn(&mut Guest) = &|_| {};
    assert_eq!(run(Write, ALL & !W, &|g| g.vmcs.guest.cr0 &= !cr0::WP), None);
    let smep: &dyn Fn(&mut Guest) = &|g| g.vmcs.guest.cr4 |= cr4::SMEP;
    assert_eq!(run(Fetch, ALL, none), None);
    assert_eq!(run(Fetch, ALL, smep), Some(pf::P | pf::I));
    assert_eq!(run(Fetch, ALL & !U, smep), None);
    let smap: &dyn Fn(&mut Guest) = &|g| g.vmcs.guest.cr4 |= cr4::SMAP;
    assert_eq!(run(Read, ALL, smap), Some(pf::P));
    assert_eq!(run(Write, ALL, smap), Some(pf::P | pf::W));
    assert_eq!(run(Fetch, ALL, smap), None);
    assert_eq!(
        run(Read, ALL, &|g| {
            smap(g);
            g.vmcs.guest.rflags |= rflags::AC;
        }),
        None
    );
    // Without NXE bit 63 is reserved, and fetches don't show in the code.
    let no_nxe: &dyn Fn(&mut Guest) = &|g| g.vmcs.guest.efer &= !efer::NXE;
    assert_eq!(run(Read, ALL | XD, no_nxe), Some(pf::P | pf::RSVD));
    assert_eq!(run(Fetch, 0, no_nxe), Some(0));
}

/// Accessed and dirty flags (SDM Vol. 3A §4.8): in all entries used, dirty only in the last; none for
/// an access that faults.
#[test]
fn accessed_and_dirty() {
    const ALL: u64 = P | W | U;
    let flags = |g: &Guest| [0, 1, 2, 3].map(|n| g.read64(TABLES[n] + 8) & (A | D));
    let mut g = long(true, Read, [ALL; 4]);
    assert_eq!(outcome(&mut g, LINEAR), None);
    assert_eq!(flags(&g), [A; 4]);
    // Now a write through the translation that is cached.
    g.write(CODE, &access_code(Write));
    g.vmcs.guest.rip = CODE;
    assert_eq!(outcome(&mut g, LINEAR), None);
    assert_eq!(flags(&g), [A, A, A, A | D]);
    let mut g = long(true, Write, [ALL, ALL, ALL, ALL & !W]);
    assert!(outcome(&mut g, LINEAR).is_some());
    assert_eq!(flags(&g)[3], 0);
}

/// 32-bit protected mode with paging; `pae` chooses the format. The identity map is supervisor.
fn paged32(access: Access, pae: bool) -> Guest {
    let mut g = Guest::protected(&access_code(access));
    let s = &mut g.vmcs.guest;
    s.cr0 |= cr0::PG | cr0::WP;
    s.cr3 = 0xf_0000;
    if pae {
        s.cr4 |= cr4::PAE;
        s.efer |= efer::NXE;
        s.pdptes = [0xf_1000 | P, 0xf_2000 | P, 0, 0];
        for n in 0..MEMORY >> 21 {
            g.write64(0xf_1000 + n * 8, n << 21 | P | W | PS);
        }
    } else {
        s.cr4 |= cr4::PSE;
        for n in 0..MEMORY >> 22 {
            g.write(0xf_0000 + n * 4, &((n << 22 | P | W | PS) as u32).to_le_bytes());
        }
    }
    g.write(0xf_4000, &VMCALL);
    page_fault_exits(&mut g);
    g
}

/// 32-bit paging (SDM Vol. 3A §4.3): two levels, 4 MiB pages, PSE-36's reserved bit.
#[test]
fn paging_32_bit() {
    const LINEAR: u64 = 0x4000_1000;
    for (access, pde, pte, code) in [
        (Read, P | W, P | W, None),
        (Write, P | W, P | W, None),
        (Fetch, P | W, P | W, None),
        (Read, 0, P | W, Some(0)),
        (Write, P | W, 0, Some(pf::W)),
        (Write, P, P | W, Some(pf::P | pf::W)),
        (Write, P | W, P, Some(pf::P | pf::W)),
        // There is no XD, and no fetch in the code.
        (Fetch, P | W, 0, Some(0)),
    ] {
        let mut g = paged32(access, false).with(gpr::RBX, LINEAR);
        g.write(0xf_0000 + 0x100 * 4, &((0xf_3000 | pde) as u32).to_le_bytes());
        g.write(0xf_3000 + 4, &((0xf_4000 | pte) as u32).to_le_bytes());
        assert_eq!(outcome(&mut g, LINEAR), code, "{access:?} {pde:x} {pte:x}");
        if code.is_none() {
            let dirty = if access == Write { D } else { 0 };
            assert_eq!(g.read32(0xf_0000 + 0x400) as u64 & (A | D), A);
            assert_eq!(g.read32(0xf_3004) as u64 & (A | D), A | dirty);
        }
    }
    // A 4 MiB page to machine address 4 MiB; bit 21 is reserved; without PSE it's a table.
    let large = |bits: u64, pse: bool| {
        let mut g = paged32(Read, false).with(gpr::RBX, 0x4000_1000);
        g.write(0xf_0000 + 0x100 * 4, &((0x40_0000 | P | W | PS | bits) as u32).to_le_bytes());
        g.write(0x40_1000, &[0x5a]);
        if !pse {
            // The identity map then is of tables too.
            g.vmcs.guest.cr4 &= !cr4::PSE;
            g.write(0xf_0000, &((0xf_5000 | P | W) as u32).to_le_bytes());
            for n in 0..1024u64 {
                g.write(0xf_5000 + n * 4, &((n << 12 | P | W) as u32).to_le_bytes());
            }
        }
        (outcome(&mut g, 0x4000_1000), g.regs.gpr[gpr::RAX])
    };
    assert_eq!(large(0, true), (None, 0x5a));
    assert_eq!(large(1 << 21, true).0, Some(pf::P | pf::RSVD));
    assert_eq!(large(0, false).0, Some(0), "the table at 4 MiB is empty");
}

/// PAE paging (SDM Vol. 3A §4.4): PDPTE registers, 8-byte entries, bits 62:52 reserved.
#[test]
fn paging_pae() {
    const LINEAR: u64 = 0x4020_1000;
    for (access, pdpte, pde, pte, code) in [
        (Read, P, P | W, P | W, None),
        (Write, P, P | W, P | W, None),
        (Fetch, P, P | W, P | W, None),
        (Read, 0, P | W, P | W, Some(0)),
        (Write, P, P | W, P, Some(pf::P | pf::W)),
        (Fetch, P, P | W | XD, P | W, Some(pf::P | pf::I)),
        (Fetch, P, P | W, P | W | XD, Some(pf::P | pf::I)),
        (Read, P, P | W | 1 << 52, P | W, Some(pf::P | pf::RSVD)),
        (Read, P, P | W, P | W | 1 << 62, Some(pf::P | pf::RSVD)),
        (Read, P, P | W, P | W | RESERVED, Some(pf::P | pf::RSVD)),
        // Bit 13 of a 2 MiB page.
        (Read, P, P | W | PS, P | W, Some(pf::P | pf::RSVD)),
    ] {
        let mut g = paged32(access, true).with(gpr::RBX, LINEAR);
        g.vmcs.guest.pdptes[1] = 0xf_2000 | pdpte;
        g.write64(0xf_2000 + 8, 0xf_3000 | pde);
        g.write64(0xf_3000 + 8, 0xf_4000 | pte);
        assert_eq!(outcome(&mut g, LINEAR), code, "{access:?} {pdpte:x} {pde:x} {pte:x}");
    }
}

/// After an entry changed, each of these makes the new one seen (SDM Vol. 3A §4.10.4).
#[test]
fn invalidation() {
    const ALL: u64 = P | W | U;
    // mov eax, [rbx]; mov [rsi], rdi; …; mov ecx, [rbx]; vmcall
    let run = |instruction: &[u8], leaf: u64, change: &dyn Fn(&mut Guest)| {
        let mut bytes = vec![0x8b, 0x03, 0x48, 0x89, 0x3e];
        bytes.extend(instruction);
        bytes.extend([0x8b, 0x0b]);
        bytes.extend(VMCALL);
        let mut g = long(false, Read, [ALL; 4]);
        g.write(CODE, &bytes);
        g.write64(TABLES[3] + 8, TABLES[4] | leaf);
        g.write(TABLES[4], &[1, 0, 0, 0]);
        g.write(0xf_5000, &[2, 0, 0, 0]);
        let mut g = g.with(gpr::RSI, TABLES[3] + 8).with(gpr::RDI, 0xf_5000 | leaf);
        g.regs.gpr[9] = DATA;
        change(&mut g);
        g.expect(R::Vmcall);
        assert_eq!(g.regs.gpr[gpr::RAX], 1);
        g.regs.gpr[gpr::RCX]
    };
    let none: &dyn Fn(&mut Guest) = &|_| {};
    let invlpg: &[u8] = &[0x0f, 0x01, 0x3b];
    let load_cr3: &[u8] = &[0x0f, 0x22, 0xda];
    let load_cr4: &[u8] = &[0x0f, 0x22, 0xe2];
    let invpcid: &[u8] = &[0x66, 0x45, 0x0f, 0x38, 0x82, 0x01];
    let global: &dyn Fn(&mut Guest) = &|g| {
        g.vmcs.guest.cr4 |= cr4::PGE;
        g.regs.gpr[gpr::RDX] = cr4::PAE | cr4::DE;
    };
    let cr3: &dyn Fn(&mut Guest) = &|g| g.regs.gpr[gpr::RDX] = 0x1_0000;
    assert_eq!(run(invlpg, ALL, none), 2);
    assert_eq!(run(invlpg, ALL | G, global), 2, "INVLPG takes globals");
    assert_eq!(run(load_cr3, ALL, cr3), 2);
    assert_eq!(run(load_cr4, ALL | G, global), 2, "clearing PGE takes globals");
    for (kind, descriptor, address) in [(0u64, 0u64, LINEAR), (1, 0, 0), (2, 0, 0), (3, 0, 0)] {
        let found = run(invpcid, ALL, &|g| {
            g.regs.gpr[8] = kind;
            g.write64(DATA, descriptor);
            g.write64(DATA + 8, address);
        });
        assert_eq!(found, 2, "INVPCID type {kind}");
    }
    // With PCIDs: the load of the same CR3 without bit 63 takes the current PCID's.
    let pcid: &dyn Fn(&mut Guest) = &|g| {
        g.vmcs.guest.cr4 |= cr4::PCIDE;
        g.vmcs.guest.cr3 = 0x1_0005;
        g.regs.gpr[gpr::RDX] = 0x1_0005;
    };
    assert_eq!(run(load_cr3, ALL, pcid), 2);
    // Global pages outlive a CR3 load, and PCIDs without a flush keep theirs: the point of both.
    let both: &dyn Fn(&mut Guest) = &|g| {
        g.vmcs.guest.cr4 |= cr4::PGE;
        g.regs.gpr[gpr::RDX] = 0x1_0000;
    };
    assert_eq!(run(load_cr3, ALL | G, both), 1);
    let kept: &dyn Fn(&mut Guest) = &|g| {
        pcid(g);
        g.regs.gpr[gpr::RDX] |= 1 << 63;
    };
    assert_eq!(run(load_cr3, ALL, kept), 1);
}

/// INVLPG of any address in a large page takes all of it (SDM Vol. 3A §4.10.4.1).
#[test]
fn invlpg_of_large_pages() {
    // mov eax, [rbx]; mov [rsi], rdi; invlpg [rdx]; mov ecx, [rbx]; vmcall
    let mut bytes = vec![0x8b, 0x03, 0x48, 0x89, 0x3e, 0x0f, 0x01, 0x3a, 0x8b, 0x0b];
    bytes.extend(VMCALL);
    let mut g = Guest::long(&bytes)
        .with(gpr::RBX, 0x20_5000)
        .with(gpr::RDX, 0x3f_f000)
        .with(gpr::RSI, 0x1_2008)
        .with(gpr::RDI, 0x40_0087);
    g.write(0x20_5000, &[1]);
    g.write(0x40_5000, &[2]);
    g.expect(R::Vmcall);
    assert_eq!((g.regs.gpr[gpr::RAX], g.regs.gpr[gpr::RCX]), (1, 2));
}

// ---- EPT -------------------------------------------------------------------------------------

/// The guest-physical page of EPT tests, and the table that maps its 2 MiB in 4 KiB pages.
const PAGE: u64 = 0x20_0000;
const EPT_TABLE: u64 = 0xe_8000;
const EPT_ROOT: u64 = 0x1000;
const WB: u64 = ept::MEMTYPE_WB << ept::MEMTYPE_SHIFT;

/// A guest in 64-bit mode that accesses PAGE + 8, whose EPT leaf has these bits.
fn ept_guest(user: bool, access: Access, leaf: u64) -> Guest {
    let bytes = access_code(access);
    let mut g = if user { Guest::user(&bytes) } else { Guest::long(&bytes) };
    g.write64(0x3008, EPT_TABLE | ept::RWX | ept::XU);
    for n in 0..512u64 {
        g.write64(EPT_TABLE + n * 8, (PAGE + n * 0x1000) | WB | ept::RWX | ept::XU);
    }
    g.write64(EPT_TABLE, PAGE | leaf);
    g.write(PAGE + 8, &VMCALL);
    g.with(gpr::RBX, PAGE + 8)
}

fn bits(access: Access) -> u64 {
    match access {
        Read => q::READ,
        Write => q::WRITE,
        Fetch => q::FETCH,
    }
}

#[track_caller]
fn violation(g: &mut Guest) -> VmExit {
    let e = g.expect(R::EptViolation);
    assert_eq!((e.guest_physical.0, e.guest_linear), (PAGE + 8, PAGE + 8));
    e
}

/// Rights and qualification of violations (SDM Vol. 3C §29.3.3, table 28-7), the advanced
/// information among it: this guest page is user-mode, writable, executable.
#[test]
fn ept_rights() {
    const ADVANCED: u64 = q::LINEAR_VALID | q::TRANSLATED | q::USER_LINEAR | q::GUEST_WRITABLE;
    for rights in [0, ept::R, ept::X, ept::R | ept::W, ept::R | ept::X, ept::RWX] {
        for (access, need) in [(Read, ept::R), (Write, ept::W), (Fetch, ept::X)] {
            let mut g = ept_guest(false, access, WB | rights);
            if rights & need != 0 {
                g.expect(R::Vmcall);
            } else {
                let e = violation(&mut g);
                assert_eq!(e.qualification, bits(access) | rights << 3 | ADVANCED, "{access:?} {rights}");
                let rip = if access == Fetch { PAGE + 8 } else { CODE };
                assert_eq!(g.vmcs.guest.rip, rip);
            }
        }
    }
    // Rights are those of all levels together.
    let mut g = ept_guest(false, Write, WB | ept::RWX);
    g.write64(0x3008, EPT_TABLE | ept::R | ept::X);
    assert_eq!(violation(&mut g).qualification, q::WRITE | q::READABLE | q::EXECUTABLE | ADVANCED);
}

/// Advanced information follows the guest's entry (SDM Vol. 3C table 28-7, bits 11:9).
#[test]
fn ept_advanced_information() {
    for (guest, advanced) in [
        (P | W | U, q::USER_LINEAR | q::GUEST_WRITABLE),
        (P | W, q::GUEST_WRITABLE),
        (P | U, q::USER_LINEAR),
        (P | XD, q::GUEST_XD),
    ] {
        let mut g = ept_guest(false, Read, 0);
        g.write64(0x1_2008, PAGE | PS | guest);
        let e = violation(&mut g);
        assert_eq!(e.qualification, q::READ | q::LINEAR_VALID | q::TRANSLATED | advanced, "{guest:x}");
    }
    // Without paging: user-mode, writable, executable.
    let mut g = Guest::protected(&access_code(Read)).with(gpr::RBX, PAGE + 8);
    g.write64(0x3008, 0);
    let e = violation(&mut g);
    assert_eq!(
        e.qualification,
        q::READ | q::LINEAR_VALID | q::TRANSLATED | q::USER_LINEAR | q::GUEST_WRITABLE
    );
}

/// Misconfigurations (SDM Vol. 3C §29.3.3.1) come before violations.
#[test]
fn ept_misconfigurations() {
    for leaf in
        [ept::W, ept::W | ept::X, ept::R | 2 << 3, ept::R | 3 << 3, ept::R | 7 << 3, ept::R | RESERVED]
    {
        let mut g = ept_guest(false, Read, leaf);
        let e = g.expect(R::EptMisconfiguration);
        assert_eq!(e.guest_physical.0, PAGE + 8, "{leaf:x}");
    }
    for upper in [1 << 3, 1 << 6, RESERVED] {
        let mut g = ept_guest(false, Read, WB | ept::RWX);
        g.write64(0x3008, EPT_TABLE | ept::RWX | upper);
        g.expect(R::EptMisconfiguration);
    }
    // A 2 MiB page whose address isn't aligned.
    let mut g = ept_guest(false, Read, 0);
    g.write64(0x3008, 0x40_1000 | WB | ept::RWX | ept::LARGE);
    g.expect(R::EptMisconfiguration);
}

/// Mode-based execute control (SDM Vol. 3C §29.3.3.2): the mode of the linear address decides.
#[test]
fn mode_based_execute_control() {
    for (user_page, rights, allowed) in [
        (true, ept::X, false),
        (true, ept::XU, true),
        (false, ept::X, true),
        (false, ept::XU, false),
        (false, ept::X | ept::XU, true),
        (true, 0, false),
    ] {
        let mut g = ept_guest(false, Fetch, WB | ept::R | rights).secondary(S::MODE_BASED_EPT);
        // The other pages are for both.
        for n in 0..MEMORY >> 21 {
            if n != 1 {
                g.write64(0x3000 + n * 8, n << 21 | WB | ept::RWX | ept::XU | ept::LARGE);
            }
        }
        g.write64(0x1000, 0x2000 | ept::RWX | ept::XU);
        g.write64(0x2000, 0x3000 | ept::RWX | ept::XU);
        let guest = if user_page { U } else { 0 };
        g.write64(0x1_2008, PAGE | PS | P | W | guest);
        if allowed {
            g.expect(R::Vmcall);
            continue;
        }
        let e = violation(&mut g);
        let readable = q::READABLE
            | if rights & ept::X != 0 { q::EXECUTABLE } else { 0 }
            | if rights & ept::XU != 0 { q::USER_EXECUTABLE } else { 0 };
        let user = if user_page { q::USER_LINEAR } else { 0 };
        assert_eq!(
            e.qualification,
            q::FETCH | readable | q::LINEAR_VALID | q::TRANSLATED | q::GUEST_WRITABLE | user,
            "{user_page} {rights:x}"
        );
    }
    // Without the control bit 10 means nothing.
    ept_guest(false, Fetch, WB | ept::R | ept::XU).expect(R::EptViolation);
    ept_guest(true, Fetch, WB | ept::R | ept::X).expect(R::Vmcall);
}

/// Accessed and dirty flags for EPT (SDM Vol. 3C §29.3.5).
#[test]
fn ept_accessed_and_dirty() {
    let path = |g: &Guest| [0x1000, 0x2000, 0x3008, EPT_TABLE].map(|at| g.read64(at) & (ept::A | ept::D));
    let with_ad = |access, leaf| {
        ept_guest(false, access, leaf).patch(|g| g.vmcs.controls.eptp = ept::eptp(EPT_ROOT, true))
    };
    let mut g = with_ad(Read, WB | ept::RWX);
    g.expect(R::Vmcall);
    assert_eq!(path(&g), [ept::A; 4]);
    // A write with the translation cached for reading sets the flag.
    g.write(CODE, &access_code(Write));
    g.vmcs.guest.rip = CODE;
    g.expect(R::Vmcall);
    assert_eq!(path(&g), [ept::A, ept::A, ept::A, ept::A | ept::D]);
    // Off, nothing is set.
    let mut g = ept_guest(false, Write, WB | ept::RWX);
    g.expect(R::Vmcall);
    assert_eq!(path(&g), [0; 4]);
    // Accesses to paging-structure entries count as writes: both bits, and no final translation.
    let walk = |ad| {
        let mut g = ept_guest(false, Read, WB | ept::R);
        g.vmcs.controls.eptp = ept::eptp(EPT_ROOT, ad);
        // PDE 8 leads to a page table in the read-only page.
        g.write64(0x1_2000 + 8 * 8, PAGE | 7);
        g.write64(PAGE, DATA | A | D | 7);
        g.regs.gpr[gpr::RBX] = 8 << 21;
        g.enter()
    };
    let e = walk(true);
    assert_eq!(e.reason, R::EptViolation);
    assert_eq!(e.qualification, q::READ | q::WRITE | q::READABLE | q::LINEAR_VALID);
    assert_eq!((e.guest_physical.0, e.guest_linear), (PAGE, 8 << 21));
    assert_eq!(walk(false).reason, R::Vmcall);
}

/// Page-modification logging (SDM Vol. 3C §29.3.6).
#[test]
fn page_modification_logging() {
    const LOG: u64 = 0xe_9000;
    let with_pml = |access, index| {
        ept_guest(false, access, WB | ept::RWX).secondary(S::ENABLE_PML).patch(|g| {
            g.vmcs.controls.eptp = ept::eptp(EPT_ROOT, true);
            g.vmcs.controls.pml = memory::MachineAddr(LOG);
            g.vmcs.guest.pml_index = index;
            // Guest entries are accessed and dirty already, and everything but the page is logged.
            g.write64(0x1_0000, 0x1_1000 | A | 7);
            g.write64(0x1_1000, 0x1_2000 | A | 7);
            g.write64(0x3000, WB | ept::RWX | ept::LARGE | ept::A | ept::D);
            for n in 0..MEMORY >> 21 {
                g.write64(0x1_2000 + n * 8, n << 21 | PS | A | D | 7);
            }
        })
    };
    let mut g = with_pml(Write, 5);
    g.expect(R::Vmcall);
    assert_eq!((g.vmcs.guest.pml_index, g.read64(LOG + 5 * 8)), (4, PAGE));
    // It is dirty now: no second entry.
    g.vmcs.guest.rip = CODE;
    g.expect(R::Vmcall);
    assert_eq!(g.vmcs.guest.pml_index, 4);
    let mut g = with_pml(Read, 5);
    g.expect(R::Vmcall);
    assert_eq!(g.vmcs.guest.pml_index, 5, "reads aren't logged");
    // The last entry makes the index FFFFH; then the log is full, and nothing is written.
    let mut g = with_pml(Write, 0);
    g.expect(R::Vmcall);
    assert_eq!((g.vmcs.guest.pml_index, g.read64(LOG)), (0xffff, PAGE));
    let mut g = with_pml(Write, 0xffff).with(gpr::RAX, 0x55);
    let e = g.expect(R::PmlFull);
    assert_eq!((e.qualification, g.vmcs.guest.rip), (0, CODE));
    assert_eq!(g.read64(EPT_TABLE) & ept::D, 0);
    assert_ne!(g.read64(PAGE + 8) as u8, 0x55);
}

/// Large EPT pages and INVEPT (SDM Vol. 3C §29.4.3.1): a changed entry is seen afterwards.
#[test]
fn ept_invalidation() {
    let mut g = Guest::long(&access_code(Read)).with(gpr::RBX, PAGE);
    g.write(PAGE, &[1]);
    g.write(0x40_0000, &[2]);
    g.expect(R::Vmcall);
    assert_eq!(g.regs.gpr[gpr::RAX], 1);
    g.write64(0x3008, 0x40_0000 | WB | ept::RWX | ept::LARGE);
    let eptp = g.vmcs.controls.eptp;
    g.vcpu.cpu().invalidate(InvalidateScope::Eptp(eptp));
    g.vmcs.guest.rip = CODE;
    g.expect(R::Vmcall);
    assert_eq!(g.regs.gpr[gpr::RAX], 2);
    // 1 GiB page: the identity again.
    g.write64(0x2000, WB | ept::RWX | ept::LARGE);
    g.vcpu.cpu().invalidate(InvalidateScope::All);
    g.vmcs.guest.rip = CODE;
    g.expect(R::Vmcall);
    assert_eq!(g.regs.gpr[gpr::RAX], 1);
}

/// NMI unblocking by an IRET that meets an EPT violation or page fault (SDM Vol. 3C §28.2.3, table 28-7
/// bit 12), and that IRET leaves physical NMI blocking alone without virtual NMIs (§26.3).
#[test]
fn nmi_unblocking_by_iret() {
    use engine::interruptibility::NMI;
    let blocked = |rsp| {
        let mut g = Guest::long(&[0x48, 0xcf, HLT]).with(gpr::RSP, rsp);
        g.vmcs.guest.interruptibility = NMI;
        g.write64(0x3008, 0);
        g
    };
    let e = blocked(PAGE).enter();
    assert_eq!(e.reason, R::EptViolation);
    assert_ne!(e.qualification & q::NMI_UNBLOCKING, 0);
    let mut g = blocked(PAGE);
    g.vmcs.guest.interruptibility = 0;
    assert_eq!(g.enter().qualification & q::NMI_UNBLOCKING, 0, "nothing was unblocked");
    let mut g = blocked(NOT_PRESENT);
    page_fault_exits(&mut g);
    let e = g.expect(R::ExceptionOrNmi);
    assert_ne!(e.interruption_info.0 & InterruptionInfo::NMI_UNBLOCKING, 0);
    assert_eq!(g.vmcs.guest.interruptibility & NMI, 0);
    let frame = |g: &mut Guest| {
        for (n, v) in [CODE + 2, sel::CODE64 as u64, 2, STACK, sel::DATA as u64].into_iter().enumerate() {
            g.write64(STACK - 40 + n as u64 * 8, v);
        }
    };
    for (nmi_controls, left) in [
        (PinbasedControls::NMI_EXITING | PinbasedControls::VIRTUAL_NMIS, 0),
        (PinbasedControls::NMI_EXITING, NMI),
        (PinbasedControls::empty(), 0),
    ] {
        let mut g = blocked(STACK - 40);
        frame(&mut g);
        g.vmcs.controls.pin.remove(PinbasedControls::NMI_EXITING | PinbasedControls::VIRTUAL_NMIS);
        g.vmcs.controls.pin |= nmi_controls;
        g.expect(R::Hlt);
        assert_eq!(g.vmcs.guest.interruptibility & NMI, left, "{nmi_controls:?}");
    }
}

// ---- self-modifying code ------------------------------------------------------------------------

/// A block that changes its own next instruction, and an instruction that it has already run.
#[test]
fn code_changes_its_own_block() {
    // mov byte [rip+1], 0x55; mov al, 1; hlt
    let mut g = Guest::long(&[0xc6, 0x05, 1, 0, 0, 0, 0x55, 0xb0, 0x01, HLT]);
    g.expect(R::Hlt);
    assert_eq!(g.regs.gpr[gpr::RAX], 0x55);
    // mov ecx, 3; L: mov al, 1; add bl, al; inc byte [L+1]; dec ecx; jnz L; hlt
    let mut g = Guest::long(&[
        0xb9, 3, 0, 0, 0, 0xb0, 1, 0x00, 0xc3, 0xfe, 0x05, 0xf7, 0xff, 0xff, 0xff, 0xff, 0xc9, 0x75, 0xf2,
        HLT,
    ]);
    g.expect(R::Hlt);
    assert_eq!(g.regs.gpr[gpr::RBX], 1 + 2 + 3);
}

/// A block that changes another one, which ran before; also the second page of an instruction.
#[test]
fn code_changes_another_block() {
    // call F; mov byte [F+1], 7; call F; hlt … F: mov al, 1; ret
    let mut bytes = vec![0xe8, 0x1b, 0, 0, 0, 0xc6, 0x05, 0x15, 0, 0, 0, 7, 0xe8, 0x0f, 0, 0, 0, HLT];
    bytes.resize(0x20, 0x90);
    bytes.extend([0xb0, 1, 0xc3]);
    let mut g = Guest::long(&bytes);
    g.expect(R::Hlt);
    assert_eq!(g.regs.gpr[gpr::RAX], 7);
    // F: mov eax, 1 at 0xffe, with three bytes of the immediate on the next page; then ret.
    let mut g = Guest::long(&[
        0xe8, 0xf9, 0x0f, 0, 0, 0xc6, 0x05, 0xf4, 0x0f, 0, 0, 0x22, 0xe8, 0xed, 0x0f, 0, 0, HLT,
    ]);
    g.write(CODE + 0xffe, &[0xb8, 1, 0, 0, 0, 0xc3]);
    g.expect(R::Hlt);
    assert_eq!(g.regs.gpr[gpr::RAX], 0x2201);
}

/// Writes by others, as a device's: between runs, and into a loop that runs.
#[test]
fn others_change_code() {
    let mut g = Guest::long(&[0xb0, 1, HLT]);
    g.expect(R::Hlt);
    g.write(CODE + 1, &[9]);
    g.vmcs.guest.rip = CODE;
    g.expect(R::Hlt);
    assert_eq!(g.regs.gpr[gpr::RAX], 9);
    // L: inc dword [rbx]; jmp L
    let mut g = Guest::long(&[0xff, 0x03, 0xeb, 0xfc]).with(gpr::RBX, DATA);
    let memory = g.memory.clone();
    let writer = std::thread::spawn(move || {
        while memory.read_u64(memory::MachineAddr(DATA)).unwrap() < 1000 {
            std::thread::yield_now();
        }
        memory.write(memory::MachineAddr(CODE), &[HLT]).unwrap();
    });
    g.expect(R::Hlt);
    writer.join().unwrap();
    assert!(g.read64(DATA) >= 1000);
}

/// A page through two linear addresses: a write through one changes the code of the other.
#[test]
fn aliased_code() {
    // call rbx; mov byte [rsi+1], 7; call rbx; hlt
    let mut g = Guest::long(&[0xff, 0xd3, 0xc6, 0x46, 1, 7, 0xff, 0xd3, HLT]);
    g.write64(0x1_2000 + 8 * 8, PAGE | 0x87);
    g.write(PAGE, &[0xb0, 1, 0xc3]);
    let mut g = g.with(gpr::RBX, PAGE).with(gpr::RSI, 8 << 21);
    g.expect(R::Hlt);
    assert_eq!(g.regs.gpr[gpr::RAX], 7);
}
