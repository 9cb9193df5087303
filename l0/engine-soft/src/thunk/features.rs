//! What guests may be shown in CPUID because this engine executes it (SDM Vol. 2A, CPUID).

use super::class::{avx_offered, host_cpuid};

const fn set<const N: usize>(bits: [u32; N]) -> u32 {
    let mut mask = 0;
    let mut n = 0;
    while n < N {
        mask |= 1 << bits[n];
        n += 1;
    }
    mask
}

/// Masks of EAX, EBX, ECX, EDX for one leaf: user-visible extensions that thunks execute are
/// limited to what this host has; system features are the engine's own. Leaves without
/// feature bits give zeros.
pub fn supported_features(leaf: u32, subleaf: u32) -> [u32; 4] {
    match (leaf, subleaf) {
        (1, _) => [0, 0, leaf1_ecx(), LEAF1_EDX],
        (7, 0) => [2, leaf7_ebx(), leaf7_ecx(), LEAF7_EDX],
        (7, 1) => [if avx_offered() { host_cpuid(7, 1)[0] & set([4]) } else { 0 }, 0, 0, 0],
        // BHI_CTRL.
        (7, 2) => [0, 0, 0, set([4])],
        // XSAVEOPT, XSAVEC, XGETBV with ECX = 1, XSAVES.
        (0xd, 1) => [set([0, 1, 2, 3]), 0, 0, 0],
        // XCR0: x87, SSE and, where the host has it, AVX.
        (0xd, 0) => [if avx_offered() { 7 } else { 3 }, 0, 0, 0],
        (0x8000_0001, _) => {
            let lzcnt = host_cpuid(leaf, 0)[2] & set([5]);
            // LAHF/SAHF, LZCNT, PREFETCHW; SYSCALL, NX, 1-GiB pages, RDTSCP, long mode.
            [0, 0, set([0, 8]) | lzcnt, set([11, 20, 26, 27, 29])]
        }
        // Invariant TSC.
        (0x8000_0007, _) => [0, 0, 0, set([8])],
        // WBNOINVD.
        (0x8000_0008, _) => [0, set([9]), 0, 0],
        _ => [0; 4],
    }
}

/// FPU, VME, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE-36, CLFSH,
/// MMX, FXSR, SSE, SSE2, SS.
const LEAF1_EDX: u32 =
    set([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27]);

/// Extensions that only thunks execute, by host support; and the engine's own.
fn leaf1_ecx() -> u32 {
    // SSE3, PCLMULQDQ, SSSE3, SSE4.1, SSE4.2, MOVBE, POPCNT, AES.
    let legacy = set([0, 1, 9, 19, 20, 22, 23, 25]);
    // FMA, AVX, F16C.
    let vex = if avx_offered() { set([12, 28, 29]) } else { 0 };
    // MONITOR, VMX, CX16, PDCM no, PCID, x2APIC, TSC deadline, XSAVE, OSXSAVE, RDRAND.
    let own = set([3, 5, 13, 17, 21, 24, 26, 27, 30]);
    host_cpuid(1, 0)[2] & (legacy | vex) | own
}

fn leaf7_ebx() -> u32 {
    // BMI1, BMI2, ADX, SHA.
    let legacy = set([3, 8, 19, 29]);
    // AVX2.
    let vex = if avx_offered() { set([5]) } else { 0 };
    // When the host notes the operand pointer only at exceptions, so do thunks.
    let pointer = set([6]);
    // FSGSBASE, TSC_ADJUST, SMEP, ERMS, INVPCID, deprecated FCS/FDS, RDSEED, SMAP, CLFLUSHOPT, CLWB.
    let own = set([0, 1, 7, 9, 10, 13, 18, 20, 23, 24]);
    host_cpuid(7, 0)[1] & (legacy | vex | pointer) | own
}

fn leaf7_ecx() -> u32 {
    // GFNI, VAES, VPCLMULQDQ.
    let legacy = set([8]);
    let vex = if avx_offered() { set([9, 10]) } else { 0 };
    // UMIP, RDPID.
    let own = set([2, 22]);
    host_cpuid(7, 0)[2] & (legacy | vex) | own
}

/// FSRM, IBRS and IBPB, STIBP, L1D_FLUSH, ARCH_CAPABILITIES, SSBD.
const LEAF7_EDX: u32 = set([4, 26, 27, 28, 29, 31]);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_beyond_the_host_that_only_thunks_execute() {
        let host = host_cpuid(7, 0);
        let ours = supported_features(7, 0);
        for bit in [3, 5, 8, 19, 29] {
            assert!(ours[1] >> bit & 1 <= host[1] >> bit & 1, "leaf 7 EBX bit {bit}");
        }
        assert_eq!(supported_features(7, 0)[1] & 1 << 16, 0, "no AVX-512");
        assert_eq!(supported_features(0x4000_0000, 0), [0; 4]);
    }
}
