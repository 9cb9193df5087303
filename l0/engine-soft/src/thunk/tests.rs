//! Table tests of what the differential test can't reach: availability, faults, save
//! areas, modes other than 64-bit. Expectations are the SDM's.

use iced_x86::{Decoder, DecoderOptions};
use x86_spec::exception as ex;
use x86_spec::exit::ExitReason as R;
use x86_spec::reg::gpr::{RAX, RBX, RCX, RDX};
use x86_spec::reg::{cr0, cr4, rflags};

use super::class::classify;
use super::compile::normalised;
use super::{ThunkCache, host_can_avx};
use crate::system::testutil::{DATA, Guest};

const HLT: u8 = 0xf4;
const OS: u64 = cr4::OSFXSR | cr4::OSXMMEXCPT;

/// 64-bit code that ends in HLT, with SSE and AVX enabled.
fn long(bytes: &[u8]) -> Guest {
    let mut code = bytes.to_vec();
    code.push(HLT);
    let mut g = Guest::long(&code);
    g.vmcs.guest.cr4 |= OS | cr4::OSXSAVE;
    g.regs.xcr0 = 7;
    g
}

/// CR0 and CR4 values, and the exception that they give.
type Availability = (u64, u64, Option<u8>);

fn availability(bytes: &[u8], table: &[Availability]) {
    for (set0, cr4, expected) in table {
        let mut g = long(bytes);
        g.vmcs.guest.cr0 |= set0;
        g.vmcs.guest.cr4 = cr4::PAE | cr4;
        match expected {
            Some(v) => g.expect_event(*v, None),
            None => {
                g.expect(R::Hlt);
            }
        }
    }
}

/// SDM Vol. 2A table 2-21 and its kin: CR0.EM and CR4.OSFXSR before CR0.TS.
#[test]
fn legacy_sse_availability() {
    // movaps xmm0, xmm1
    availability(
        &[0x0f, 0x28, 0xc1],
        &[
            (0, OS, None),
            (0, 0, Some(ex::UD)),
            (cr0::EM, OS, Some(ex::UD)),
            (cr0::TS, OS, Some(ex::NM)),
            (cr0::TS | cr0::EM, OS, Some(ex::UD)),
        ],
    );
}

/// SDM Vol. 2A §2.4.4: VEX needs CR4.OSXSAVE and XCR0, CR0.EM doesn't matter.
#[test]
fn avx_availability() {
    if !host_can_avx() {
        return;
    }
    // vmovaps xmm0, xmm1
    let code = [0xc5, 0xf8, 0x28, 0xc1];
    let on = cr4::OSXSAVE;
    availability(
        &code,
        &[(0, on, None), (0, OS, Some(ex::UD)), (cr0::EM, on, None), (cr0::TS, on, Some(ex::NM))],
    );
    let mut g = long(&code).patch(|g| g.regs.xcr0 = 3);
    g.expect_event(ex::UD, None);
    // andn eax, eax, ecx in real-address mode.
    let mut g = Guest::real(&[0xc4, 0xe2, 0x78, 0xf2, 0xc1]);
    g.expect_event(ex::UD, None);
}

/// SDM Vol. 3A §2.5, table of CR0.EM, MP and TS.
#[test]
fn x87_and_mmx_availability() {
    let fld1 = [0xd9, 0xe8];
    availability(&fld1, &[(0, 0, None), (cr0::EM, 0, Some(ex::NM)), (cr0::TS, 0, Some(ex::NM))]);
    let wait = [0x9b];
    availability(
        &wait,
        &[(cr0::TS, 0, None), (cr0::MP, 0, None), (cr0::TS | cr0::MP, 0, Some(ex::NM)), (cr0::EM, 0, None)],
    );
    let paddb = [0x0f, 0xfc, 0xc1];
    availability(&paddb, &[(0, 0, None), (cr0::EM, 0, Some(ex::UD)), (cr0::TS, 0, Some(ex::NM))]);
}

/// SDM Vol. 1 §8.7: a pending exception is reported by the next waiting instruction.
#[test]
fn pending_x87_exceptions() {
    let pending = |g: &mut Guest| {
        // ZE set and unmasked, ES, B.
        g.regs.fpu.x87.0[0] = 0x7b;
        g.regs.fpu.x87.0[1] = 0x03;
        g.regs.fpu.x87.0[2] = 0x84;
        g.regs.fpu.x87.0[3] = 0x80;
    };
    for waiting in [&[0xd9, 0xe8][..], &[0x9b], &[0xd9, 0x28], &[0x0f, 0xfc, 0xc1], &[0x0f, 0x77]] {
        long(waiting).with(RAX, DATA).patch(pending).expect_event(ex::MF, None);
    }
    // fnstsw ax; fnclex; fld1
    let mut g = long(&[0xdf, 0xe0, 0xdb, 0xe2, 0xd9, 0xe8]).patch(pending);
    g.expect(R::Hlt);
    assert_eq!(g.regs.gpr[RAX] & 0xffff, 0x8084);
    // fninit; fld1
    long(&[0xdb, 0xe3, 0xd9, 0xe8]).patch(pending).expect(R::Hlt);
}

/// SDM Vol. 1 §11.5.3: an unmasked exception leaves the destination unchanged and sets its
/// flag; without CR4.OSXMMEXCPT it is #UD.
#[test]
fn unmasked_simd_exceptions() {
    const ONES: u64 = 0x3f80_0000_3f80_0000;
    // divps xmm0, xmm1
    let guest = |os: u64| {
        let mut g = long(&[0x0f, 0x5e, 0xc1]);
        g.vmcs.guest.cr4 = cr4::PAE | os;
        g.regs.fpu.mxcsr = 0x1f80 & !0x200;
        g.regs.fpu.vectors[0] = [ONES, ONES, 6, 7];
        g
    };
    let mut g = guest(OS);
    g.expect_event(ex::XM, None);
    assert_eq!(g.regs.fpu.mxcsr, 0x1f84 & !0x200, "ZE");
    assert_eq!(g.regs.fpu.vectors[0], [ONES, ONES, 6, 7]);
    guest(cr4::OSFXSR).expect_event(ex::UD, None);
    // Masked, it completes and keeps the upper half.
    let mut g = guest(OS);
    g.regs.fpu.mxcsr = 0x1f80;
    g.expect(R::Hlt);
    assert_eq!(g.regs.fpu.vectors[0][0], 0x7f80_0000_7f80_0000);
    assert_eq!(g.regs.fpu.vectors[0][2..], [6, 7]);
    assert_eq!(g.regs.fpu.mxcsr & 0x3f, 0x04, "ZE");
}

/// MXCSR's reserved bits (SDM Vol. 1 §10.2.3).
#[test]
fn mxcsr_loads() {
    // ldmxcsr [rax]
    let mut g = long(&[0x0f, 0xae, 0x10]).with(RAX, DATA);
    g.write64(DATA, 0x1_1f80);
    g.expect_event(ex::GP, Some(0));
    g = long(&[0x0f, 0xae, 0x10, 0x0f, 0xae, 0x58, 0x08]).with(RAX, DATA);
    g.write64(DATA, 0xffff);
    g.expect(R::Hlt);
    assert_eq!((g.regs.fpu.mxcsr, g.read32(DATA + 8)), (0xffff, 0xffff));
}

const ALL: [(usize, u64); 2] = [(RAX, 7), (RDX, 0)];

fn saving(bytes: &[u8]) -> Guest {
    let mut g = long(bytes);
    for (r, v) in ALL {
        g.regs.gpr[r] = v;
    }
    g.regs.gpr[RBX] = DATA;
    g.regs.gpr[RCX] = DATA + 0x1000;
    g
}

/// XSAVE, then XRSTOR into a changed state (SDM Vol. 1 §13.7, §13.8).
#[test]
fn xsave_round_trip() {
    if !host_can_avx() {
        return;
    }
    // xsave [rbx]; vzeroall; fninit; xrstor [rbx]
    let mut g = saving(&[0x0f, 0xae, 0x23, 0xc5, 0xfc, 0x77, 0xdb, 0xe3, 0x0f, 0xae, 0x2b]);
    g.regs.fpu.vectors[3] = [1, 2, 3, 4];
    g.regs.fpu.x87.0[0] = 0x7e;
    g.regs.fpu.x87.0[4] = 0x80;
    g.regs.fpu.mxcsr = 0x9f80;
    g.expect(R::Hlt);
    assert_eq!(g.regs.fpu.vectors[3], [1, 2, 3, 4]);
    assert_eq!((g.regs.fpu.x87.0[0], g.regs.fpu.x87.0[4], g.regs.fpu.mxcsr), (0x7e, 0x80, 0x9f80));
    assert_eq!(g.read64(DATA + 512), 7, "XSTATE_BV");
    assert_eq!(g.read64(DATA + 520), 0, "XCOMP_BV");
    assert_eq!((g.read64(DATA + 160 + 48), g.read64(DATA + 576 + 48)), (1, 3));
    assert_eq!(g.read64(DATA + 24), 0xffff_0000_9f80, "MXCSR and its mask");
}

/// XSTATE_BV bits outside the request are kept; components in their initial state are
/// left out by XSAVEOPT and XSAVEC (SDM Vol. 1 §13.7, §13.9, §13.10).
#[test]
fn init_optimization() {
    if !host_can_avx() {
        return;
    }
    let fill = |g: &mut Guest| {
        for n in 0..104 {
            g.write64(DATA + 8 * n, 0x1111_1111_1111_1111);
        }
        g.write64(DATA + 512, 1 << 63 | 2);
        g.write64(DATA + 520, 0);
        (g.regs.fpu.x87.0[0], g.regs.fpu.x87.0[1]) = (0x7f, 0x03);
    };
    // xsaveopt [rbx] with only AVX in use
    let mut g = saving(&[0x0f, 0xae, 0x33]).patch(fill).with(RAX, 6);
    g.regs.fpu.vectors[0][3] = 9;
    g.expect(R::Hlt);
    assert_eq!(g.read64(DATA + 512), 1 << 63 | 4, "SSE initial, AVX in use, the rest kept");
    assert_eq!(g.read64(DATA + 160), 0x1111_1111_1111_1111, "XMM left out");
    assert_eq!(g.read64(DATA + 576 + 8), 9);
    // xsavec [rbx]
    let mut g = saving(&[0x0f, 0xc7, 0x23]).patch(fill);
    g.regs.fpu.vectors[0][3] = 9;
    g.expect(R::Hlt);
    assert_eq!((g.read64(DATA + 512), g.read64(DATA + 520)), (4, 1 << 63 | 7));
    assert_eq!(g.read64(DATA), 0x1111_1111_1111_1111, "x87 left out");
    assert_eq!(g.read64(DATA + 24), 0x1111_1111_1111_1111, "MXCSR initial: left out");
}

/// Faults of the family (SDM Vol. 2C, XRSTOR).
#[test]
fn xsave_faults() {
    let xrstor = [0x0f, 0xae, 0x2b];
    let mut g = saving(&[0x0f, 0xae, 0x23]).with(RBX, DATA + 8);
    g.expect_event(ex::GP, Some(0));
    let mut g = saving(&xrstor).patch(|g| g.vmcs.guest.cr4 &= !cr4::OSXSAVE);
    g.expect_event(ex::UD, None);
    let mut g = saving(&xrstor).patch(|g| g.vmcs.guest.cr0 |= cr0::TS);
    g.expect_event(ex::NM, None);
    let mut g = saving(&xrstor).patch(|g| g.write64(DATA + 512, 8));
    g.expect_event(ex::GP, Some(0));
    let mut g = saving(&xrstor).patch(|g| g.write64(DATA + 24, 1 << 16));
    g.expect_event(ex::GP, Some(0));
    // The standard form takes MXCSR from memory though XSTATE_BV is 0.
    let mut g = saving(&xrstor).patch(|g| g.write64(DATA + 24, 0x1fc0));
    g.regs.fpu.vectors[1] = [1; 4];
    g.expect(R::Hlt);
    assert_eq!((g.regs.fpu.mxcsr, g.regs.fpu.vectors[1]), (0x1fc0, [0; 4]));
}

/// FXSAVE and FXRSTOR (SDM Vol. 2A).
#[test]
fn fxsave_faults_and_round_trip() {
    let mut g = saving(&[0x0f, 0xae, 0x03]).with(RBX, DATA + 8);
    g.expect_event(ex::GP, Some(0));
    let mut g = saving(&[0x0f, 0xae, 0x0b]).patch(|g| g.write64(DATA + 24, 1 << 31));
    g.expect_event(ex::GP, Some(0));
    // fxsave [rbx]; pxor xmm15, xmm15; fxrstor [rbx]
    let mut g = saving(&[0x0f, 0xae, 0x03, 0x66, 0x45, 0x0f, 0xef, 0xff, 0x0f, 0xae, 0x0b]);
    g.regs.fpu.vectors[15] = [1, 2, 3, 4];
    g.write64(DATA + 416, 77);
    g.expect(R::Hlt);
    assert_eq!(g.regs.fpu.vectors[15], [1, 2, 3, 4]);
    assert_eq!(g.read64(DATA + 416), 77, "bytes from 416 are software's");
}

/// Figures 8-9 to 8-12 of SDM Vol. 1: the environment in each format.
#[test]
fn x87_environments() {
    // fld1; fnstenv [0xb0000]
    let mut g = Guest::protected(&[0xd9, 0xe8, 0xd9, 0x35, 0, 0, 0x0b, 0, HLT]);
    g.expect(R::Hlt);
    let words: Vec<u32> = (0..7).map(|n| g.read32(DATA + 4 * n)).collect();
    assert_eq!(words[..3], [0xffff_0040, 0xffff_3800, 0xffff_3fff], "control, status, tags");
    assert_eq!(words[3], 0x4_0000, "FIP");
    assert_eq!(words[4] & 0xffff, 0, "FCS is deprecated");
    assert_eq!(g.regs.fpu.x87.0[0], 0x7f, "all exceptions masked afterwards");
    // Real-address mode, 16-bit: fld1; fnstenv [0x100]
    let mut g = Guest::real(&[0xd9, 0xe8, 0xd9, 0x36, 0x00, 0x01, HLT]);
    g.vmcs.guest.rip = 0;
    g.expect(R::Hlt);
    let words: Vec<u16> = (0..7).map(|n| g.read16(0x1_0100 + 2 * n)).collect();
    assert_eq!(words, [0x40, 0x3800, 0x3fff, 0, 0, 0, 0]);
}

/// Thunks in 32-bit code: one-byte INC and DEC, MMX, SSE, masks of eight registers.
#[test]
fn thunks_in_32_bit_code() {
    let mut g = Guest::protected(&[
        0x0f, 0xa4, 0xc8, 0x04, // shld eax, ecx, 4
        0x66, 0x0f, 0x6e, 0xc0, // movd xmm0, eax
        0x66, 0x0f, 0xfe, 0x05, 0x00, 0x00, 0x0b, 0x00, // paddd xmm0, [DATA]
        0x66, 0x0f, 0x7e, 0xc3, // movd ebx, xmm0
        HLT,
    ])
    .with(RAX, 0x1234_5678)
    .with(RCX, 0x9abc_def0);
    g.vmcs.guest.cr4 |= OS;
    g.write64(DATA, 1);
    g.expect(R::Hlt);
    assert_eq!((g.regs.gpr[RAX], g.regs.gpr[RBX]), (0x2345_6789, 0x2345_678a));
    // A segment limit is checked.
    let mut g = Guest::protected(&[0x0f, 0x10, 0x05, 0xf8, 0x0f, 0, 0]);
    g.vmcs.guest.cr4 |= OS;
    g.vmcs.guest.segments[x86_spec::segment::seg::DS].limit = 0xfff;
    g.vmcs.guest.segments[x86_spec::segment::seg::DS].access.0 &= !(1 << 15);
    g.expect_event(ex::GP, Some(0));
}

/// Examples of SDM Vol. 2A, DAA, DAS, and results worked out by its pseudocode.
#[test]
fn decimal_adjustments() {
    const CF: u64 = rflags::CF;
    const AF: u64 = rflags::AF;
    for (code, ax, flags, result, flags_after) in [
        (&[0x27][..], 0xae, 0, 0x14, CF | AF),
        (&[0x2f], 0xee, CF | AF, 0x88, CF | AF),
        (&[0x2f], 0x02, AF, 0xfc, CF | AF),
        (&[0x27], 0x9a, 0, 0x00, CF | AF),
        (&[0x27], 0x45, 0, 0x45, 0),
        (&[0x37], 0x00ff, 0, 0x0205, CF | AF),
        (&[0x37], 0x0135, 0, 0x0105, 0),
        (&[0x3f], 0x020b, 0, 0x0105, CF | AF),
        (&[0xd4, 10], 63, 0, 0x0603, 0),
        (&[0xd5, 10], 0x0603, 0, 63, 0),
    ] {
        let mut bytes = code.to_vec();
        bytes.push(HLT);
        let mut g = Guest::protected(&bytes).with(RAX, ax).patch(|g| g.vmcs.guest.rflags |= flags);
        g.expect(R::Hlt);
        assert_eq!(g.regs.gpr[RAX], result, "{code:x?} of {ax:#x}");
        if code.len() == 1 {
            assert_eq!(g.vmcs.guest.rflags & (CF | AF), flags_after, "{code:x?} of {ax:#x}");
        }
    }
    Guest::protected(&[0xd4, 0]).expect_event(ex::DE, None);
}

/// The cache is bounded, says so, and works after being cleared.
#[test]
fn full_cache() {
    let mut cache = ThunkCache::new().unwrap();
    let mut forms = 0;
    let mut any = |prefix: u8| {
        (0..=255u8).any(|imm| {
            (0xc0..=0xffu8).any(|modrm| {
                [0x40, 0x41, 0x44, 0x45].into_iter().any(|rex| {
                    // pshufd, pshufhw, pshuflw with REX
                    let bytes = [prefix, rex, 0x0f, 0x70, modrm, imm];
                    let i = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
                    let class = classify(&i).unwrap();
                    forms += 1;
                    cache.get(&normalised(&i), class).unwrap().is_none()
                })
            })
        })
    };
    let full = any(0x66) || any(0xf3) || any(0xf2);
    assert!(full && forms > 1000);
    cache.clear();
    assert_eq!((cache.len(), cache.generation()), (0, 1));
    let i = Decoder::new(64, &[0x0f, 0x28, 0xc1], DecoderOptions::NONE).decode();
    assert!(cache.get(&normalised(&i), classify(&i).unwrap()).unwrap().is_some());
}
