//! Which instructions thunks execute, and what has to be checked before.

use std::sync::OnceLock;

use iced_x86::{Code, CpuidFeature as F, EncodingKind, Instruction, Mnemonic as M, OpKind};

use super::compile::Uses;
use crate::operand::has_memory;

/// Legacy SSE: CR0.EM, CR0.TS, CR4.OSFXSR.
pub(super) const SSE: u8 = 1;
/// VEX-encoded with vector registers: XCR0, CR4.OSXSAVE, CR0.TS, mode.
pub(super) const AVX: u8 = 2;
/// MMX registers: CR0.EM, CR0.TS, pending #MF; resets the x87 stack.
pub(super) const MMX: u8 = 4;
/// x87: CR0.EM, CR0.TS, pending #MF.
pub(super) const X87: u8 = 8;
/// May raise SIMD floating-point exceptions.
pub(super) const FP: u8 = 16;
/// VEX-encoded with general registers only: protected mode.
pub(super) const VEX: u8 = 32;

/// How an instruction is executed by a thunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Class {
    /// Set of [`SSE`], [`AVX`], [`MMX`], [`X87`], [`FP`], [`VEX`].
    pub kind: u8,
    /// The memory operand's address has to be a multiple of this plus one.
    pub alignment: u8,
}

impl Class {
    pub(super) fn uses(self) -> Uses {
        Uses { x87: self.kind & X87 != 0, mmx: self.kind & MMX != 0, mxcsr: self.kind & FP != 0 }
    }
}

/// Instruction-set extensions that host and engine both have.
#[derive(Debug)]
pub(super) struct HostFeatures {
    avx: bool,
    avx2: bool,
    fma: bool,
    f16c: bool,
    aes: bool,
    pclmul: bool,
    sha: bool,
    gfni: bool,
    vaes: bool,
    vpclmul: bool,
    avx_vnni: bool,
    bmi1: bool,
    bmi2: bool,
    adx: bool,
    popcnt: bool,
    lzcnt: bool,
    movbe: bool,
    sse3: bool,
    ssse3: bool,
    sse41: bool,
    sse42: bool,
}

/// The host's instruction-set extensions, found once.
pub(super) fn host() -> &'static HostFeatures {
    static HOST: OnceLock<HostFeatures> = OnceLock::new();
    HOST.get_or_init(|| HostFeatures {
        // These macros also check that the host's system enabled the registers.
        avx: is_x86_feature_detected!("avx"),
        avx2: is_x86_feature_detected!("avx2"),
        fma: is_x86_feature_detected!("fma"),
        f16c: is_x86_feature_detected!("f16c"),
        aes: is_x86_feature_detected!("aes"),
        pclmul: is_x86_feature_detected!("pclmulqdq"),
        sha: is_x86_feature_detected!("sha"),
        gfni: is_x86_feature_detected!("gfni"),
        vaes: is_x86_feature_detected!("vaes") && is_x86_feature_detected!("avx"),
        vpclmul: is_x86_feature_detected!("vpclmulqdq") && is_x86_feature_detected!("avx"),
        avx_vnni: is_x86_feature_detected!("avxvnni"),
        bmi1: is_x86_feature_detected!("bmi1"),
        bmi2: is_x86_feature_detected!("bmi2"),
        adx: is_x86_feature_detected!("adx"),
        popcnt: is_x86_feature_detected!("popcnt"),
        lzcnt: is_x86_feature_detected!("lzcnt"),
        movbe: is_x86_feature_detected!("movbe"),
        sse3: is_x86_feature_detected!("sse3"),
        ssse3: is_x86_feature_detected!("ssse3"),
        sse41: is_x86_feature_detected!("sse4.1"),
        sse42: is_x86_feature_detected!("sse4.2"),
    })
}

/// Whether the engine offers what `code` needs.
pub(super) fn offered(code: Code) -> bool {
    matches!(code.op_code().encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && code.cpuid_features().iter().all(|f| feature_offered(*f))
}

fn feature_offered(f: F) -> bool {
    let h = host();
    match f {
        F::INTEL8086
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::FPU
        | F::FPU287
        | F::FPU387
        | F::CMOV
        | F::MMX
        | F::SSE
        | F::SSE2
        | F::FXSR
        | F::CX8
        | F::CMPXCHG16B
        | F::CLFSH
        | F::MULTIBYTENOP
        | F::PREFETCHW
        | F::PAUSE => true,
        F::CLFLUSHOPT | F::CLWB => true,
        F::XSAVE | F::XSAVEOPT | F::XSAVEC | F::XSAVES => true,
        F::SSE3 => h.sse3,
        F::SSSE3 => h.ssse3,
        F::SSE4_1 => h.sse41,
        F::SSE4_2 => h.sse42,
        F::AES => h.aes,
        F::PCLMULQDQ => h.pclmul,
        F::SHA => h.sha,
        F::GFNI => h.gfni,
        F::VAES => h.vaes,
        F::VPCLMULQDQ => h.vpclmul,
        F::AVX => h.avx,
        F::AVX2 => h.avx2,
        F::FMA => h.fma,
        F::F16C => h.f16c,
        F::AVX_VNNI => h.avx_vnni,
        F::BMI1 => h.bmi1,
        F::BMI2 => h.bmi2,
        F::ADX => h.adx,
        F::POPCNT => h.popcnt,
        F::LZCNT => h.lzcnt,
        F::MOVBE => h.movbe,
        _ => false,
    }
}

/// Whether this host lets the engine offer AVX at all.
pub(super) fn avx_offered() -> bool {
    host().avx
}

/// What a processor without BMI1 or LZCNT makes of TZCNT and LZCNT: BSF and BSR with a prefix that
/// means nothing (SDM Vol. 2B, LZCNT; Vol. 2C, TZCNT). Compilers rely on it.
pub(super) fn as_decoded_by_host(i: &Instruction) -> Instruction {
    let mut i = *i;
    if !offered(i.code()) {
        i.set_code(match i.code() {
            Code::Tzcnt_r16_rm16 => Code::Bsf_r16_rm16,
            Code::Tzcnt_r32_rm32 => Code::Bsf_r32_rm32,
            Code::Tzcnt_r64_rm64 => Code::Bsf_r64_rm64,
            Code::Lzcnt_r16_rm16 => Code::Bsr_r16_rm16,
            Code::Lzcnt_r32_rm32 => Code::Bsr_r32_rm32,
            Code::Lzcnt_r64_rm64 => Code::Bsr_r64_rm64,
            code => code,
        });
    }
    i
}

/// The class of an instruction, if a thunk can execute it.
pub(super) fn classify(i: &Instruction) -> Option<Class> {
    let code = i.code();
    if !offered(code) {
        return None;
    }
    let vex = code.op_code().encoding() == EncodingKind::VEX;
    let (mut vector, mut mmx) = (false, false);
    for n in 0..i.op_count() {
        if i.op_kind(n) == OpKind::Register {
            let r = i.op_register(n);
            vector |= r.is_vector_register();
            mmx |= r.is_mm();
        }
    }
    let features = code.cpuid_features();
    let x87 = features.iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387));
    // CVTSS2SI and its kin with a memory source name no vector register.
    let sse = features.iter().any(|f| matches!(f, F::SSE | F::SSE2 | F::AVX));
    let fp = (sse || vector) && uses_mxcsr(i.mnemonic());
    let mut kind = if x87 {
        X87
    } else if vector || fp {
        if vex { AVX } else { SSE }
    } else {
        0
    };
    if mmx {
        kind |= MMX;
    }
    if kind == 0 {
        if vex && is_vex_integer(i.mnemonic()) {
            kind = VEX;
        } else if !is_integer(i.mnemonic()) {
            return None;
        }
    }
    if fp {
        kind |= FP;
    }
    let size = i.memory_size().size();
    let aligned = has_memory(i)
        && if vex {
            always_aligned(i.mnemonic())
        } else {
            code == Code::Cmpxchg16b_m128 || kind & SSE != 0 && size == 16 && !never_aligned(i.mnemonic())
        };
    let alignment = if aligned { (size as u8).wrapping_sub(1) } else { 0 };
    Some(Class { kind, alignment })
}

/// VEX-encoded instructions that check alignment (SDM Vol. 1 table 14-22).
fn always_aligned(m: M) -> bool {
    matches!(m, M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa)
}

/// Legacy SSE instructions with 16-byte operands that need not be aligned (SDM Vol. 2 §2.4.4).
fn never_aligned(m: M) -> bool {
    matches!(
        m,
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestrm
            | M::Pcmpistri
            | M::Pcmpistrm
            | M::Pcmpestri64
            | M::Pcmpestrm64
    )
}

/// VEX-encoded instructions on general registers.
fn is_vex_integer(m: M) -> bool {
    matches!(
        m,
        M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bzhi
            | M::Mulx
            | M::Pdep
            | M::Pext
            | M::Rorx
            | M::Sarx
            | M::Shlx
            | M::Shrx
    )
}

/// Integer instructions that depend on nothing but registers, flags and one memory
/// operand, and can't fault beyond the memory access.
fn is_integer(m: M) -> bool {
    matches!(
        m,
        M::Adc
            | M::Adcx
            | M::Add
            | M::Adox
            | M::And
            | M::Bsf
            | M::Bsr
            | M::Bswap
            | M::Bt
            | M::Btc
            | M::Btr
            | M::Bts
            | M::Cbw
            | M::Cdq
            | M::Cdqe
            | M::Clc
            | M::Cmc
            | M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs
            | M::Cmp
            | M::Cmpxchg
            | M::Cmpxchg8b
            | M::Cmpxchg16b
            | M::Cqo
            | M::Crc32
            | M::Cwd
            | M::Cwde
            | M::Dec
            | M::Imul
            | M::Inc
            | M::Lahf
            | M::Lzcnt
            | M::Movbe
            | M::Movnti
            | M::Movsx
            | M::Movsxd
            | M::Movzx
            | M::Mul
            | M::Neg
            | M::Not
            | M::Or
            | M::Popcnt
            | M::Rcl
            | M::Rcr
            | M::Rol
            | M::Ror
            | M::Sahf
            | M::Sal
            | M::Sar
            | M::Sbb
            | M::Seta
            | M::Setae
            | M::Setb
            | M::Setbe
            | M::Sete
            | M::Setg
            | M::Setge
            | M::Setl
            | M::Setle
            | M::Setne
            | M::Setno
            | M::Setnp
            | M::Setns
            | M::Seto
            | M::Setp
            | M::Sets
            | M::Shl
            | M::Shld
            | M::Shr
            | M::Shrd
            | M::Stc
            | M::Sub
            | M::Test
            | M::Tzcnt
            | M::Xadd
            | M::Xchg
            | M::Xor
    )
}

/// Vector instructions that MXCSR controls or that set its flags (SDM Vol. 1 appendix C).
fn uses_mxcsr(m: M) -> bool {
    matches!(
        m,
        M::Addpd
            | M::Addps
            | M::Addsd
            | M::Addss
            | M::Addsubpd
            | M::Addsubps
            | M::Cmppd
            | M::Cmpps
            | M::Cmpsd
            | M::Cmpss
            | M::Comisd
            | M::Comiss
            | M::Cvtdq2pd
            | M::Cvtdq2ps
            | M::Cvtpd2dq
            | M::Cvtpd2pi
            | M::Cvtpd2ps
            | M::Cvtpi2pd
            | M::Cvtpi2ps
            | M::Cvtps2dq
            | M::Cvtps2pd
            | M::Cvtps2pi
            | M::Cvtsd2si
            | M::Cvtsd2ss
            | M::Cvtsi2sd
            | M::Cvtsi2ss
            | M::Cvtss2sd
            | M::Cvtss2si
            | M::Cvttpd2dq
            | M::Cvttpd2pi
            | M::Cvttps2dq
            | M::Cvttps2pi
            | M::Cvttsd2si
            | M::Cvttss2si
            | M::Divpd
            | M::Divps
            | M::Divsd
            | M::Divss
            | M::Dppd
            | M::Dpps
            | M::Haddpd
            | M::Haddps
            | M::Hsubpd
            | M::Hsubps
            | M::Maxpd
            | M::Maxps
            | M::Maxsd
            | M::Maxss
            | M::Minpd
            | M::Minps
            | M::Minsd
            | M::Minss
            | M::Mulpd
            | M::Mulps
            | M::Mulsd
            | M::Mulss
            | M::Roundpd
            | M::Roundps
            | M::Roundsd
            | M::Roundss
            | M::Sqrtpd
            | M::Sqrtps
            | M::Sqrtsd
            | M::Sqrtss
            | M::Subpd
            | M::Subps
            | M::Subsd
            | M::Subss
            | M::Ucomisd
            | M::Ucomiss
            | M::Vaddpd
            | M::Vaddps
            | M::Vaddsd
            | M::Vaddss
            | M::Vaddsubpd
            | M::Vaddsubps
            | M::Vcmppd
            | M::Vcmpps
            | M::Vcmpsd
            | M::Vcmpss
            | M::Vcomisd
            | M::Vcomiss
            | M::Vcvtdq2pd
            | M::Vcvtdq2ps
            | M::Vcvtpd2dq
            | M::Vcvtpd2ps
            | M::Vcvtph2ps
            | M::Vcvtps2dq
            | M::Vcvtps2pd
            | M::Vcvtps2ph
            | M::Vcvtsd2si
            | M::Vcvtsd2ss
            | M::Vcvtsi2sd
            | M::Vcvtsi2ss
            | M::Vcvtss2sd
            | M::Vcvtss2si
            | M::Vcvttpd2dq
            | M::Vcvttps2dq
            | M::Vcvttsd2si
            | M::Vcvttss2si
            | M::Vdivpd
            | M::Vdivps
            | M::Vdivsd
            | M::Vdivss
            | M::Vdppd
            | M::Vdpps
            | M::Vfmadd132pd
            | M::Vfmadd132ps
            | M::Vfmadd132sd
            | M::Vfmadd132ss
            | M::Vfmadd213pd
            | M::Vfmadd213ps
            | M::Vfmadd213sd
            | M::Vfmadd213ss
            | M::Vfmadd231pd
            | M::Vfmadd231ps
            | M::Vfmadd231sd
            | M::Vfmadd231ss
            | M::Vfmaddsub132pd
            | M::Vfmaddsub132ps
            | M::Vfmaddsub213pd
            | M::Vfmaddsub213ps
            | M::Vfmaddsub231pd
            | M::Vfmaddsub231ps
            | M::Vfmsub132pd
            | M::Vfmsub132ps
            | M::Vfmsub132sd
            | M::Vfmsub132ss
            | M::Vfmsub213pd
            | M::Vfmsub213ps
            | M::Vfmsub213sd
            | M::Vfmsub213ss
            | M::Vfmsub231pd
            | M::Vfmsub231ps
            | M::Vfmsub231sd
            | M::Vfmsub231ss
            | M::Vfmsubadd132pd
            | M::Vfmsubadd132ps
            | M::Vfmsubadd213pd
            | M::Vfmsubadd213ps
            | M::Vfmsubadd231pd
            | M::Vfmsubadd231ps
            | M::Vfnmadd132pd
            | M::Vfnmadd132ps
            | M::Vfnmadd132sd
            | M::Vfnmadd132ss
            | M::Vfnmadd213pd
            | M::Vfnmadd213ps
            | M::Vfnmadd213sd
            | M::Vfnmadd213ss
            | M::Vfnmadd231pd
            | M::Vfnmadd231ps
            | M::Vfnmadd231sd
            | M::Vfnmadd231ss
            | M::Vfnmsub132pd
            | M::Vfnmsub132ps
            | M::Vfnmsub132sd
            | M::Vfnmsub132ss
            | M::Vfnmsub213pd
            | M::Vfnmsub213ps
            | M::Vfnmsub213sd
            | M::Vfnmsub213ss
            | M::Vfnmsub231pd
            | M::Vfnmsub231ps
            | M::Vfnmsub231sd
            | M::Vfnmsub231ss
            | M::Vhaddpd
            | M::Vhaddps
            | M::Vhsubpd
            | M::Vhsubps
            | M::Vmaxpd
            | M::Vmaxps
            | M::Vmaxsd
            | M::Vmaxss
            | M::Vminpd
            | M::Vminps
            | M::Vminsd
            | M::Vminss
            | M::Vmulpd
            | M::Vmulps
            | M::Vmulsd
            | M::Vmulss
            | M::Vroundpd
            | M::Vroundps
            | M::Vroundsd
            | M::Vroundss
            | M::Vsqrtpd
            | M::Vsqrtps
            | M::Vsqrtsd
            | M::Vsqrtss
            | M::Vsubpd
            | M::Vsubps
            | M::Vsubsd
            | M::Vsubss
            | M::Vucomisd
            | M::Vucomiss
    )
}

/// The host's CPUID.
pub(super) fn host_cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}
