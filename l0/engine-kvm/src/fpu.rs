//! x87 and vector state in KVM's format, the standard form of an XSAVE area (SDM Vol. 1 §13.4).
//!
//! Not supported: state components beyond AVX, which no guest is shown; in-use tracking (every component counts as
//! in use once it was loaded).

use engine::FpuState;
use kvm_bindings::{kvm_cpuid_entry2, kvm_xsave};

/// The legacy region: x87 without the bytes of MXCSR and its mask, which are at 24.
const X87: [std::ops::Range<usize>; 2] = [0..24, 32..160];
const MXCSR: usize = 24;
const XMM: usize = 160;
/// XSTATE_BV.
const HEADER: usize = 512;
const SSE_IN_USE: u64 = 1 << 1;
const AVX_IN_USE: u64 = 1 << 2;

/// Offset of the component AVX: CPUID 0DH, subleaf 2, EBX (SDM Vol. 1 §13.4.3).
pub(crate) fn ymm_offset(cpuid: &[kvm_cpuid_entry2]) -> Option<usize> {
    let e = cpuid.iter().find(|e| (e.function, e.index) == (0xd, 2))?;
    let offset = e.ebx as usize;
    let area = size_of::<kvm_xsave>();
    (e.eax >= 256 && offset >= HEADER + 64 && offset.is_multiple_of(8) && offset + 256 <= area)
        .then_some(offset)
}

fn read<const N: usize>(area: &kvm_xsave, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    for (i, b) in bytes.iter_mut().enumerate() {
        let word = area.region.get((at + i) / 4).copied().unwrap_or(0);
        *b = word.to_le_bytes()[(at + i) % 4];
    }
    bytes
}

fn write(area: &mut kvm_xsave, at: usize, bytes: &[u8]) {
    for (i, b) in bytes.iter().enumerate() {
        if let Some(word) = area.region.get_mut((at + i) / 4) {
            let mut w = word.to_le_bytes();
            w[(at + i) % 4] = *b;
            *word = u32::from_le_bytes(w);
        }
    }
}

/// Shows KVM's state.
pub(crate) fn show(area: &kvm_xsave, ymm: Option<usize>, fpu: &mut FpuState) {
    let in_use = u64::from_le_bytes(read(area, HEADER));
    if in_use & 1 == 0 {
        fpu.x87 = FpuState::default().x87;
    } else {
        for i in X87.into_iter().flatten() {
            fpu.x87.0[i] = read::<1>(area, i)[0];
        }
    }
    // Loaded by SSE as well as by AVX.
    fpu.mxcsr = match in_use & (SSE_IN_USE | AVX_IN_USE) {
        0 => FpuState::default().mxcsr,
        _ => u32::from_le_bytes(read(area, MXCSR)),
    };
    for (i, v) in fpu.vectors.iter_mut().enumerate() {
        let half = |present: bool, at: usize| match present {
            true => [u64::from_le_bytes(read(area, at)), u64::from_le_bytes(read(area, at + 8))],
            false => [0; 2],
        };
        [v[0], v[1]] = half(in_use & SSE_IN_USE != 0, XMM + 16 * i);
        [v[2], v[3]] = half(in_use & AVX_IN_USE != 0 && ymm.is_some(), ymm.unwrap_or(0) + 16 * i);
    }
}

/// Takes over the other engine's state; `area` is what KVM gave.
pub(crate) fn take(area: &mut kvm_xsave, ymm: Option<usize>, fpu: &FpuState) {
    for range in X87 {
        write(area, range.start, &fpu.x87.0[range]);
    }
    write(area, MXCSR, &fpu.mxcsr.to_le_bytes());
    for (i, v) in fpu.vectors.iter().enumerate() {
        for (at, lanes) in [(Some(XMM), [v[0], v[1]]), (ymm, [v[2], v[3]])] {
            let Some(at) = at else { continue };
            write(area, at + 16 * i, &lanes[0].to_le_bytes());
            write(area, at + 16 * i + 8, &lanes[1].to_le_bytes());
        }
    }
    let avx = if ymm.is_some() { AVX_IN_USE } else { 0 };
    let in_use = u64::from_le_bytes(read(area, HEADER)) | 1 | SSE_IN_USE | avx;
    write(area, HEADER, &in_use.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some_state() -> FpuState {
        let mut fpu = FpuState::default();
        for i in X87.into_iter().flatten() {
            fpu.x87.0[i] = i as u8;
        }
        fpu.mxcsr = 0x1fa0;
        for (i, v) in fpu.vectors.iter_mut().enumerate() {
            *v = [1, 2, 3, 4].map(|n| (i as u64) << 8 | n);
        }
        fpu
    }

    #[test]
    fn state_goes_through_an_area_unchanged() {
        let (mut area, mut back) = (kvm_xsave::default(), FpuState::default());
        take(&mut area, Some(576), &some_state());
        // SDM Vol. 1 table 10-2 and §13.4: FCW, MXCSR, XMM1, XSTATE_BV, upper half of YMM1.
        assert_eq!(area.region[0] & 0xffff, 0x0100);
        assert_eq!(area.region[24 / 4], 0x1fa0);
        assert_eq!(area.region[(160 + 16) / 4], 0x101);
        assert_eq!(area.region[512 / 4], 7);
        assert_eq!(area.region[(576 + 16) / 4], 0x103);
        show(&area, Some(576), &mut back);
        assert_eq!(
            (back.vectors, back.mxcsr, back.x87.0),
            (some_state().vectors, 0x1fa0, some_state().x87.0)
        );
    }

    #[test]
    fn a_component_that_is_not_in_use_has_its_initial_state() {
        let (mut area, mut fpu) = (kvm_xsave::default(), some_state());
        take(&mut area, Some(576), &some_state());
        write(&mut area, HEADER, &0u64.to_le_bytes());
        show(&area, Some(576), &mut fpu);
        let initial = FpuState::default();
        assert_eq!((fpu.vectors, fpu.mxcsr, fpu.x87.0), (initial.vectors, initial.mxcsr, initial.x87.0));
    }
}
