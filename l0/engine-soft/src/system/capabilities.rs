//! What this engine can do, in the terms of the VMX capability MSRs (SDM Vol. 3D appendix A),
//! and the host's clock and random numbers.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use x86_spec::caps::{AllowedControls, VmxCapabilities, ept_vpid};
use x86_spec::controls::{
    EntryControls as N, ExitControls as X, PinbasedControls as P, PrimaryControls as C,
    SecondaryControls as S,
};

/// The preemption timer counts down once every 2^5 TSC ticks.
pub const PREEMPTION_TIMER_SHIFT: u8 = 5;

/// Pin-based controls beyond the default-1 ones. Posted interrupts are L0's to process
/// ([`engine::post_interrupts`]).
const PIN: P = P::EXTERNAL_INTERRUPT_EXITING
    .union(P::NMI_EXITING)
    .union(P::VIRTUAL_NMIS)
    .union(P::VMX_PREEMPTION_TIMER)
    .union(P::POSTED_INTERRUPTS);

const PRIMARY: C = C::INTERRUPT_WINDOW_EXITING
    .union(C::USE_TSC_OFFSETTING)
    .union(C::HLT_EXITING)
    .union(C::INVLPG_EXITING)
    .union(C::MWAIT_EXITING)
    .union(C::RDPMC_EXITING)
    .union(C::RDTSC_EXITING)
    .union(C::CR3_LOAD_EXITING)
    .union(C::CR3_STORE_EXITING)
    .union(C::CR8_LOAD_EXITING)
    .union(C::CR8_STORE_EXITING)
    .union(C::USE_TPR_SHADOW)
    .union(C::NMI_WINDOW_EXITING)
    .union(C::MOV_DR_EXITING)
    .union(C::UNCOND_IO_EXITING)
    .union(C::USE_IO_BITMAPS)
    .union(C::MONITOR_TRAP_FLAG)
    .union(C::USE_MSR_BITMAPS)
    .union(C::MONITOR_EXITING)
    .union(C::PAUSE_EXITING)
    .union(C::SECONDARY_CONTROLS);

const SECONDARY: S = S::VIRTUALIZE_APIC
    .union(S::ENABLE_EPT)
    .union(S::DTABLE_EXITING)
    .union(S::ENABLE_RDTSCP)
    .union(S::VIRTUALIZE_X2APIC)
    .union(S::ENABLE_VPID)
    .union(S::WBINVD_EXITING)
    .union(S::UNRESTRICTED_GUEST)
    .union(S::VIRTUALIZE_APIC_REGISTER)
    .union(S::VIRTUAL_INTERRUPT_DELIVERY)
    .union(S::PAUSE_LOOP_EXITING)
    .union(S::RDRAND_EXITING)
    .union(S::ENABLE_INVPCID)
    .union(S::ENABLE_VM_FUNCTIONS)
    .union(S::RDSEED_EXITING)
    .union(S::ENABLE_PML)
    .union(S::ENABLE_XSAVES_XRSTORS)
    .union(S::MODE_BASED_EPT)
    .union(S::USE_TSC_SCALING);

const EXIT: X = X::SAVE_DEBUG_CONTROLS
    .union(X::HOST_ADDRESS_SPACE_SIZE)
    .union(X::LOAD_IA32_PERF_GLOBAL_CTRL)
    .union(X::SAVE_IA32_PAT)
    .union(X::LOAD_IA32_PAT)
    .union(X::SAVE_IA32_EFER)
    .union(X::LOAD_IA32_EFER)
    .union(X::SAVE_VMX_PREEMPTION_TIMER);

const ENTRY: N = N::LOAD_DEBUG_CONTROLS
    .union(N::IA32E_MODE_GUEST)
    .union(N::LOAD_IA32_PERF_GLOBAL_CTRL)
    .union(N::LOAD_IA32_PAT)
    .union(N::LOAD_IA32_EFER);

/// Bits that must be 1 even as the TRUE capability MSRs have it (appendix A.3–A.5).
const DEFAULT1_PIN: u32 = 0x16;
const DEFAULT1_PRIMARY: u32 = 0x0400_6172;
const DEFAULT1_EXIT: u32 = 0x0003_6dfb;
const DEFAULT1_ENTRY: u32 = 0x0000_11fb;

const fn allowed(must_be_one: u32, also: u32) -> AllowedControls {
    AllowedControls { must_be_one, may_be_one: must_be_one | also }
}

/// IA32_VMX_MISC (appendix A.6): timer rate; LMA stored to the entry control (bit 5);
/// activity states HLT, shutdown and wait-for-SIPI (8:6); 4 CR3 targets (24:16); zero-length
/// instructions can be injected (30).
const MISC: u64 = PREEMPTION_TIMER_SHIFT as u64 | 1 << 5 | 7 << 6 | 4 << 16 | 1 << 30;

/// The capabilities.
pub fn capabilities() -> VmxCapabilities {
    use ept_vpid as e;
    VmxCapabilities {
        pin: allowed(DEFAULT1_PIN, PIN.bits()),
        primary: allowed(DEFAULT1_PRIMARY, PRIMARY.bits()),
        secondary: allowed(0, SECONDARY.bits()),
        exit: allowed(DEFAULT1_EXIT, EXIT.bits()),
        entry: allowed(DEFAULT1_ENTRY, ENTRY.bits()),
        ept_vpid: e::EXECUTE_ONLY
            | e::WALK4
            | e::UC
            | e::WB
            | e::PAGE_2M
            | e::PAGE_1G
            | e::INVEPT
            | e::AD
            | e::INVEPT_SINGLE
            | e::INVEPT_ALL
            | e::ADVANCED_EXIT
            | e::INVVPID
            | e::INVVPID_ALL_TYPES,
        misc: MISC,
        preemption_timer_shift: PREEMPTION_TIMER_SHIFT,
    }
}

/// The engine's TSC: the host's.
#[inline]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no preconditions; where the host forbids it, no Linux runs.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Frequency of the host's TSC in Hz, found once.
pub fn tsc_frequency() -> u64 {
    static FREQUENCY: OnceLock<u64> = OnceLock::new();
    *FREQUENCY.get_or_init(|| cpuid_frequency().unwrap_or_else(measured_frequency))
}

/// From CPUID leaf 15H, if the host fills all of it (SDM Vol. 3B §18.17.4... table 3-8).
fn cpuid_frequency() -> Option<u64> {
    let max = cpuid(0, 0)[0];
    if max < 0x15 {
        return None;
    }
    let [denominator, numerator, crystal, _] = cpuid(0x15, 0);
    if denominator == 0 || numerator == 0 || crystal == 0 {
        return None;
    }
    Some(crystal as u64 * numerator as u64 / denominator as u64)
}

/// Counts ticks against the monotonic clock three times 20 ms; the median resists being
/// descheduled once.
fn measured_frequency() -> u64 {
    let mut samples = [0u64; 3];
    for s in &mut samples {
        let (start, tsc) = (Instant::now(), host_tsc());
        std::thread::sleep(Duration::from_millis(20));
        let (elapsed, ticks) = (start.elapsed(), host_tsc().wrapping_sub(tsc));
        *s = (ticks as u128 * 1_000_000_000 / elapsed.as_nanos().max(1)) as u64;
    }
    samples.sort_unstable();
    samples[1].max(1)
}

fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = std::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// A random number for RDRAND and RDSEED; `None` if the host has none now.
pub(super) fn guest_random() -> Option<u64> {
    let mut b = [0u8; 8];
    // SAFETY: the buffer is valid for its length.
    let n = unsafe { libc::getrandom(b.as_mut_ptr().cast(), b.len(), libc::GRND_NONBLOCK) };
    (n == b.len() as isize).then(|| u64::from_le_bytes(b))
}
