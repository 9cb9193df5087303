//! What KVM can do for its userspace, in the terms of the VMX capability MSRs, and which features its
//! guests may see.
//!
//! A control is reported only if this engine delivers what it promises: no exits for CPUID, accesses
//! to control and debug registers, exceptions, descriptor tables, RDTSC, INVLPG or PAUSE (KVM keeps
//! them), and no VPIDs, whose translations userspace can't invalidate.

use x86_spec::caps::{AllowedControls, VmxCapabilities, ept_vpid};
use x86_spec::controls::{
    EntryControls as N, ExitControls as X, PinbasedControls as P, PrimaryControls as C,
    SecondaryControls as S,
};

/// The preemption timer counts down once every 2^5 TSC ticks.
pub(crate) const PREEMPTION_TIMER_SHIFT: u8 = 5;

const PIN: P =
    P::EXTERNAL_INTERRUPT_EXITING.union(P::NMI_EXITING).union(P::VIRTUAL_NMIS).union(P::VMX_PREEMPTION_TIMER);
const PRIMARY: C = C::INTERRUPT_WINDOW_EXITING
    .union(C::USE_TSC_OFFSETTING)
    .union(C::HLT_EXITING)
    .union(C::NMI_WINDOW_EXITING)
    .union(C::UNCOND_IO_EXITING)
    .union(C::USE_MSR_BITMAPS)
    .union(C::SECONDARY_CONTROLS);
const SECONDARY: S = S::ENABLE_EPT
    .union(S::UNRESTRICTED_GUEST)
    .union(S::ENABLE_RDTSCP)
    .union(S::ENABLE_INVPCID)
    .union(S::ENABLE_XSAVES_XRSTORS);
const EXIT: X =
    X::SAVE_DEBUG_CONTROLS.union(X::HOST_ADDRESS_SPACE_SIZE).union(X::SAVE_IA32_PAT).union(X::SAVE_IA32_EFER);
const ENTRY: N =
    N::LOAD_DEBUG_CONTROLS.union(N::IA32E_MODE_GUEST).union(N::LOAD_IA32_PAT).union(N::LOAD_IA32_EFER);

/// The capabilities.
pub(crate) fn capabilities() -> VmxCapabilities {
    let allowed = |bits| AllowedControls { must_be_one: 0, may_be_one: bits };
    VmxCapabilities {
        pin: allowed(PIN.bits()),
        primary: allowed(PRIMARY.bits()),
        secondary: allowed(SECONDARY.bits()),
        exit: allowed(EXIT.bits()),
        entry: allowed(ENTRY.bits()),
        ept_vpid: ept_vpid::WALK4 | ept_vpid::WB | ept_vpid::PAGE_2M | ept_vpid::PAGE_1G,
        misc: PREEMPTION_TIMER_SHIFT.into(),
        preemption_timer_shift: PREEMPTION_TIMER_SHIFT,
    }
}

/// The features of a (sub)leaf that need nothing of L0: state that is saved by XSAVE beyond AVX, MSRs
/// that L0 does not know and paging modes that it does not report are left out. Registers in the
/// order EAX, EBX, ECX, EDX; numbers are of bits.
const FEATURES: &[(u32, u32, [&[u32]; 4])] = &[
    (
        1,
        0,
        [
            &[],
            &[],
            // SSE3 … RDRAND.
            &[0, 1, 9, 12, 13, 17, 19, 20, 22, 23, 25, 26, 28, 29, 30],
            // FPU … SSE2.
            &[0, 1, 2, 3, 6, 8, 11, 13, 15, 17, 19, 23, 24, 25, 26, 27],
        ],
    ),
    (
        7,
        0,
        [
            &[],
            // FSGSBASE, BMI1, AVX2, FDP_EXCPTN_ONLY, SMEP, BMI2, ERMS, INVPCID, no FCS/FDS, RDSEED, ADX,
            // SMAP, CLFLUSHOPT, CLWB, SHA.
            &[0, 3, 5, 6, 7, 8, 9, 10, 13, 18, 19, 20, 23, 24, 29],
            // UMIP, GFNI, VAES, VPCLMULQDQ, RDPID, MOVDIRI, MOVDIR64B.
            &[2, 8, 9, 10, 22, 27, 28],
            // FSRM, SERIALIZE.
            &[4, 14],
        ],
    ),
    // AVX-VNNI, FZRM, FSRS, FSRC.
    (7, 1, [&[4, 10, 11, 12], &[], &[], &[]]),
    // BHI_CTRL.
    (7, 2, [&[], &[], &[], &[4]]),
    // XSAVEOPT, XSAVEC, XGETBV with ECX 1, XSAVES.
    (0xd, 1, [&[0, 1, 2, 3], &[], &[], &[]]),
    // LAHF, LZCNT, PREFETCHW; SYSCALL, NX, 1-GiB pages, RDTSCP, long mode.
    (0x8000_0001, 0, [&[], &[], &[0, 5, 8], &[11, 20, 26, 27, 29]]),
];

/// The bits of a (sub)leaf that guests may be shown, where KVM has them.
pub(crate) fn feature_mask(leaf: u32, subleaf: u32) -> [u32; 4] {
    FEATURES
        .iter()
        .find(|(l, s, _)| (*l, *s) == (leaf, subleaf))
        .map_or([0; 4], |(_, _, registers)| registers.map(|bits| bits.iter().fold(0, |all, b| all | 1 << b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_promised_that_kvm_keeps_for_itself() {
        let caps = capabilities();
        for c in [C::CR8_LOAD_EXITING, C::RDTSC_EXITING, C::MOV_DR_EXITING, C::USE_TPR_SHADOW] {
            assert!(!caps.has_primary(c), "{c:?}");
        }
        assert!(!caps.has_secondary(S::ENABLE_VPID), "VMX for L1 needs it, and would be offered");
        assert!(caps.has_secondary(S::ENABLE_EPT | S::UNRESTRICTED_GUEST));
    }

    #[test]
    fn state_that_l0_does_not_know_is_not_offered() {
        // SDM Vol. 2A, CPUID: 07H:EBX AVX512F (16), ECX PKU (3), LA57 (16), CET_SS (7); EDX AMX (22–25).
        let [_, b, c, d] = feature_mask(7, 0);
        assert_eq!(b & 1 << 16, 0);
        assert_eq!(c & (1 << 3 | 1 << 16 | 1 << 7), 0);
        assert_eq!(d & 0xf << 22, 0);
        assert_eq!(feature_mask(0x8000_0001, 0)[3] & 1 << 29, 1 << 29, "long mode");
        assert_eq!(feature_mask(0x8000_0002, 0), [0; 4]);
        assert_eq!(feature_mask(0xa, 0), [0; 4], "performance counters");
    }
}
