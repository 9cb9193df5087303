//! What CPUID shows L1 (SDM Vol. 2A, CPUID; Vol. 1 ch. 21).
//!
//! An Intel server processor of family 6, model 8FH. Feature bits are exactly those that
//! the engine executes, plus those that L0 itself implements (local APIC, MTRRs, TSC
//! deadline and adjustment, ARCH_CAPABILITIES and the speculation MSRs), minus those that
//! need something which L0 withholds (VMX). Performance counters are shown where the engine
//! has those that L0 has registers for.
//! MONITOR is offered where the engine has the exits that L0 needs for it ([`CpuidModel::with_monitor`]).
//!
//! The HYPERVISOR bit (01H:ECX\[31\]) is set, but there is no hypervisor leaf (40000000H
//! and up read as zero): without the bit, Linux takes the processor for bare metal and goes
//! looking for what its model number promises (uncore counters, RAPL, C-states, the
//! microcode loader and its "old microcode" check), each of which ends in a #GP or in a
//! warning in its log; with the bit and no leaf it uses neither those nor any
//! paravirtualization. Direct VMCS access needs the leaves of [`crate::hyperv`].

use engine::CpuidEntry;
use x86_spec::pmu;
use x86_spec::reg::{cr4, xcr0};

use crate::hyperv;

/// Family 6, model 8FH, stepping 8.
pub const SIGNATURE: u32 = 0x0008_06f8;
/// Physical-address width in bits.
pub const PHYSICAL_BITS: u8 = 46;

const MAX_BASIC: u32 = 0x1f;
const MAX_EXTENDED: u32 = 0x8000_0008;

/// 01H:ECX: x2APIC (21), TSC deadline (24), HYPERVISOR (31).
const L0_LEAF1_ECX: u32 = 1 << 21 | 1 << 24 | 1 << 31;
/// 01H:ECX that L0 withholds unless it is asked to show it: DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, CNXT-ID, SDBG, xTPR,
/// PDCM, DCA.
const WITHHELD_LEAF1_ECX: u32 = 0b1101_1111_1100 | 1 << 14 | 1 << 15 | 1 << 18;
/// 01H:ECX: PDCM, IA32_PERF_CAPABILITIES; a bit number.
const LEAF1_ECX_PDCM: u32 = 15;
/// 01H:ECX: VMX.
const LEAF1_ECX_VMX: u32 = 1 << 5;
/// 01H:EDX: TSC (4), MSR (5), MCE (7), APIC (9), MTRR (12), MCA (14), PAT (16).
const L0_LEAF1_EDX: u32 = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 9 | 1 << 12 | 1 << 14 | 1 << 16;
/// 01H:EDX that L0 withholds: PSN, DS, ACPI, HTT (set by the number of CPUs), TM, PBE.
const WITHHELD_LEAF1_EDX: u32 = 1 << 18 | 1 << 21 | 1 << 22 | 1 << 28 | 1 << 29 | 1 << 31;
/// 01H:ECX: MONITOR.
const LEAF1_ECX_MONITOR: u32 = 1 << 3;
/// 05H: lines of 64 bytes, smallest and largest; extensions are enumerated (0), masked interrupts can end MWAIT
/// (1); C1 has one sub-state (EDX bits 7:4).
const LEAF5: [u32; 4] = [64, 64, 0b11, 0x10];
/// 07H:EBX: IA32_TSC_ADJUST (1).
const L0_LEAF7_EBX: u32 = 1 << 1;
/// 07H:EBX that L0 withholds: SGX, HLE, RDT-M, RTM, MPX, RDT-A, Processor Trace.
const WITHHELD_LEAF7_EBX: u32 = 1 << 2 | 1 << 4 | 1 << 11 | 1 << 12 | 1 << 14 | 1 << 15 | 1 << 25;
/// 07H:EDX: MD_CLEAR (10), IBRS and IBPB (26), STIBP (27), L1D_FLUSH (28), ARCH_CAPABILITIES
/// (29), SSBD (31).
const L0_LEAF7_EDX: u32 = 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31;
/// 07H.2:EDX: MCDT_NO (5).
const L0_LEAF7_2_EDX: u32 = 1 << 5;
/// 07H.2:EDX that needs the engine, which holds IA32_SPEC_CTRL: BHI_CTRL (4). Linux takes every
/// processor with enhanced IBRS for one that needs a workaround for BHI, BHI_NO or not, and
/// without BHI_CTRL runs a loop of branches at each system call.
const ENGINE_LEAF7_2_EDX: u32 = 1 << 4;
/// 06H:EAX: ARAT (2), the APIC timer always runs.
const L0_LEAF6_EAX: u32 = 1 << 2;
/// 80000007H:EDX: invariant TSC (8).
const INVARIANT_TSC: u32 = 1 << 8;

const BRAND: &[u8; 48] = b"Intel(R) Xeon(R) Processor\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Guest state that CPUID reflects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidState {
    /// CR4.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// IA32_APIC_BASE.EN.
    pub apic_enabled: bool,
    /// The APIC ID of the processor that executes CPUID.
    pub apic_id: u32,
    /// L1 has not asked yet for the invariant TSC, as Hyper-V wants it to.
    pub hides_invariant_tsc: bool,
    /// IA32_MISC_ENABLE bit 18, without which MONITOR is not shown.
    pub monitor: bool,
}

/// The relation between TSC and core crystal clock (CPUID leaf 15H).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crystal {
    /// EAX: denominator.
    pub denominator: u32,
    /// EBX: numerator; TSC = crystal × numerator / denominator.
    pub numerator: u32,
    /// ECX: the crystal's frequency in Hz. The local APIC's timer counts at it
    /// (SDM Vol. 3A §11.5.4).
    pub hz: u32,
}

impl Crystal {
    /// A crystal for a TSC of `tsc_hz`.
    ///
    /// Linux computes `crystal in kHz × numerator / denominator` in 32 bits, so both
    /// have to stay small. A usual crystal (25 or 24 MHz) is used when it gives the frequency exactly;
    /// otherwise half the TSC's frequency, so that Linux' rounding to kHz costs less than
    /// a part per million.
    pub fn for_tsc(tsc_hz: u64) -> Self {
        for hz in [25_000_000u32, 24_000_000] {
            let g = gcd(tsc_hz, hz.into()).max(1);
            let (numerator, denominator) = (tsc_hz / g, u64::from(hz) / g);
            if numerator * (u64::from(hz) / 1000) <= u32::MAX.into() {
                return Self { denominator: denominator as u32, numerator: numerator as u32, hz };
            }
        }
        let mut numerator = 2;
        while tsc_hz / numerator > u64::from(u32::MAX) {
            numerator += 1;
        }
        Self { denominator: 1, numerator: numerator as u32, hz: (tsc_hz / numerator) as u32 }
    }

    /// A crystal of `hz`, and the fraction that is nearest to the TSC's frequency among those that fit in Linux'
    /// computation ([`Self::for_tsc`]).
    fn of(hz: u32, tsc_hz: u64) -> Self {
        let most = u64::from(u32::MAX) / u64::from(hz / 1000).max(1);
        let (mut a, mut b) = (tsc_hz, u64::from(hz).max(1));
        // The last two convergents of the continued fraction.
        let ((mut n0, mut d0), (mut n1, mut d1)) = ((0, 1), (1, 0));
        while b != 0 {
            let (n, d) = (a / b * n1 + n0, a / b * d1 + d0);
            if n > most {
                break;
            }
            ((n0, d0), (n1, d1)) = ((n1, d1), (n, d));
            (a, b) = (b, a % b);
        }
        Self { denominator: d1.max(1) as u32, numerator: n1 as u32, hz }
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The CPUID model of a machine.
#[derive(Clone, Debug)]
pub struct CpuidModel {
    leaf1: [u32; 4],
    leaf7: [[u32; 4]; 3],
    xsave: [u32; 4],
    extended1: [u32; 4],
    extended8: [u32; 4],
    performance_counters: bool,
    crystal: Crystal,
    tsc_mhz: u32,
    cpus: u32,
    hyperv: bool,
}

impl CpuidModel {
    /// The model for an engine with `features` (as [`engine::Engine::supported_features`]),
    /// a TSC of `tsc_hz` and `cpus` processors.
    pub fn new(features: impl Fn(u32, u32) -> [u32; 4], tsc_hz: u64, cpus: u32) -> Self {
        let [_, _, c, d] = features(1, 0);
        // L0 has registers for one kind of PMU.
        let performance_counters = features(0xa, 0) == pmu::LEAF;
        let pdcm = u32::from(performance_counters) << LEAF1_ECX_PDCM;
        let leaf1 = [
            SIGNATURE,
            0,
            c & !(WITHHELD_LEAF1_ECX | 1 << 27) | L0_LEAF1_ECX | pdcm,
            d & !WITHHELD_LEAF1_EDX | L0_LEAF1_EDX | u32::from(cpus > 1) << 28,
        ];
        let [_, b7, c7, d7] = features(7, 0);
        let [a71, b71, c71, d71] = features(7, 1);
        let [_, _, _, d72] = features(7, 2);
        let leaf7 = [
            [2, b7 & !WITHHELD_LEAF7_EBX | L0_LEAF7_EBX, c7 & !(1 << 4), d7 | L0_LEAF7_EDX],
            [a71, b71, c71, d71],
            [0, 0, 0, d72 & ENGINE_LEAF7_2_EDX | L0_LEAF7_2_EDX],
        ];
        let [_, b8, ..] = features(0x8000_0008, 0);
        Self {
            leaf1,
            leaf7,
            xsave: features(0xd, 1),
            extended1: features(0x8000_0001, 0),
            extended8: [u32::from(PHYSICAL_BITS) | 48 << 8, b8, 0, 0],
            performance_counters,
            crystal: Crystal::for_tsc(tsc_hz),
            tsc_mhz: u32::try_from(tsc_hz / 1_000_000).unwrap_or(u32::MAX),
            cpus: cpus.max(1),
            hyperv: false,
        }
    }

    /// The relation between TSC and crystal.
    pub fn crystal(&self) -> Crystal {
        self.crystal
    }

    /// Leaf 1 without the bits that reflect guest state.
    pub fn leaf1(&self) -> [u32; 4] {
        self.leaf1
    }

    /// Whether VMX is shown (01H:ECX bit 5).
    pub fn has_vmx(&self) -> bool {
        self.leaf1[2] & LEAF1_ECX_VMX != 0
    }

    /// Shows a crystal of `hz`, which the local APIC's timer counts at.
    #[must_use]
    pub fn with_apic_timer(mut self, hz: u32) -> Self {
        self.crystal = Crystal::of(
            hz,
            u64::from(self.crystal.hz) * u64::from(self.crystal.numerator)
                / u64::from(self.crystal.denominator.max(1)),
        );
        self
    }

    /// Shows VMX.
    #[must_use]
    pub fn with_vmx(mut self) -> Self {
        self.leaf1[2] |= LEAF1_ECX_VMX;
        self
    }

    /// Whether Hyper-V's interface is shown.
    pub fn has_hyperv(&self) -> bool {
        self.hyperv
    }

    /// Shows Hyper-V's interface, for the enlightened VMCS.
    #[must_use]
    pub fn with_hyperv(mut self) -> Self {
        self.hyperv = true;
        self
    }

    /// Whether architectural performance monitoring is shown (0AH:EAX\[7:0\]).
    pub fn has_performance_counters(&self) -> bool {
        self.performance_counters
    }

    /// Shows MONITOR and MWAIT, if the engine supports them.
    #[must_use]
    pub fn with_monitor(mut self, supported: bool) -> Self {
        if supported {
            self.leaf1[2] |= LEAF1_ECX_MONITOR;
        }
        self
    }

    /// Whether MONITOR and MWAIT are offered.
    pub fn has_monitor(&self) -> bool {
        self.leaf1[2] & LEAF1_ECX_MONITOR != 0
    }

    /// Leaf 7, subleaf 0, without the bits that reflect guest state.
    pub fn leaf7(&self) -> [u32; 4] {
        self.leaf7[0]
    }

    /// Whether 07H:EDX shows `bit`.
    pub fn has_leaf7_edx(&self, bit: u32) -> bool {
        self.leaf7[0][3] & 1 << bit != 0
    }

    /// The XCR0 bits that L1 may set: 0 without XSAVE (SDM Vol. 1 §13.3).
    pub fn supported_xcr0(&self) -> u64 {
        let has = |bit: u32| self.leaf1[2] & 1 << bit != 0;
        if !has(26) {
            0
        } else if has(28) {
            xcr0::X87 | xcr0::SSE | xcr0::AVX
        } else {
            xcr0::X87 | xcr0::SSE
        }
    }

    /// The whole table for the processor with `apic_id`, for engines that execute CPUID without an exit.
    pub fn entries(&self, apic_id: u32) -> Vec<CpuidEntry> {
        let state = CpuidState {
            xcr0: xcr0::X87,
            apic_enabled: true,
            apic_id,
            monitor: true,
            ..CpuidState::default()
        };
        let leaves = (0..=MAX_BASIC).chain(0x8000_0000..=MAX_EXTENDED);
        leaves
            .flat_map(|leaf| {
                let subleaves: &[Option<u32>] = match leaf {
                    4 | 7 | 0xb | 0xd | 0x1f => &[Some(0), Some(1), Some(2), Some(3), Some(4)],
                    _ => &[None],
                };
                subleaves.iter().map(move |subleaf| (leaf, *subleaf))
            })
            .map(|(leaf, subleaf)| {
                let registers = self.query(leaf, subleaf.unwrap_or(0), &state);
                CpuidEntry { leaf, subleaf, registers }
            })
            .collect()
    }

    /// Executes CPUID.
    pub fn query(&self, leaf: u32, subleaf: u32, state: &CpuidState) -> [u32; 4] {
        match leaf {
            0x4000_0000..=0x4fff_ffff if self.hyperv => hyperv::cpuid(leaf, self.cpus),
            0x4000_0000..=0x4fff_ffff => [0; 4],
            0x8000_0007 if state.hides_invariant_tsc => [0; 4],
            0x8000_0000..=MAX_EXTENDED => self.extended(leaf),
            0..=MAX_BASIC => self.basic(leaf, subleaf, state),
            // "If a value entered for CPUID.EAX is higher than the maximum input value … the data
            // for the highest basic information leaf is returned."
            _ => self.basic(MAX_BASIC, subleaf, state),
        }
    }

    fn basic(&self, leaf: u32, subleaf: u32, state: &CpuidState) -> [u32; 4] {
        match leaf {
            0 => [MAX_BASIC, word(b"Genu"), word(b"ntel"), word(b"ineI")],
            1 => self.features(state),
            // Descriptors: use leaf 4 (FFH), 64-byte prefetch (F0H).
            2 => [0x00f0_ff01, 0, 0, 0],
            4 => self.cache(subleaf),
            5 if self.has_monitor() => LEAF5,
            6 => [L0_LEAF6_EAX, 0, 0, 0],
            7 => {
                let mut regs = self.leaf7.get(subleaf as usize).copied().unwrap_or_default();
                if subleaf == 0 && state.cr4 & cr4::PKE != 0 {
                    regs[2] |= 1 << 4;
                }
                regs
            }
            0xa if self.performance_counters => pmu::LEAF,
            0xb | 0x1f => self.topology(subleaf, state),
            0xd => self.xsave(subleaf, state),
            0x15 => [self.crystal.denominator, self.crystal.numerator, self.crystal.hz, 0],
            0x16 => [self.tsc_mhz & 0xffff, self.tsc_mhz & 0xffff, 100, 0],
            _ => [0; 4],
        }
    }

    fn features(&self, state: &CpuidState) -> [u32; 4] {
        let mut regs = self.leaf1;
        let ids = self.cpus.next_power_of_two().min(255);
        // CLFLUSH line of 64 bytes in bits 15:8, in units of 8.
        regs[1] = (state.apic_id & 0xff) << 24 | ids << 16 | 8 << 8;
        if state.cr4 & cr4::OSXSAVE != 0 {
            regs[2] |= 1 << 27;
        }
        if !state.monitor {
            regs[2] &= !LEAF1_ECX_MONITOR;
        }
        if !state.apic_enabled {
            // SDM Vol. 3A §11.4.3: a globally disabled APIC is not reported.
            regs[3] &= !(1 << 9);
        }
        regs
    }

    /// Deterministic cache parameters.
    fn cache(&self, subleaf: u32) -> [u32; 4] {
        // Type (1 data, 2 instruction, 3 unified), level, ways, sets, shared by all CPUs.
        let (ty, level, ways, sets, shared) = match subleaf {
            0 => (1, 1, 12, 64, false),
            1 => (2, 1, 8, 64, false),
            2 => (3, 2, 16, 2048, false),
            3 => (3, 3, 15, 32768, true),
            _ => return [0; 4],
        };
        let ids = self.cpus.next_power_of_two();
        let sharing = if shared { ids - 1 } else { 0 };
        // Bit 8: self-initializing.
        let eax = ty | level << 5 | 1 << 8 | (sharing & 0xfff) << 14 | ((ids - 1) & 0x3f) << 26;
        [eax, (ways - 1) << 22 | 63, sets - 1, 0]
    }

    /// Extended topology: one thread a core, all cores in one package.
    fn topology(&self, subleaf: u32, state: &CpuidState) -> [u32; 4] {
        let bits = self.cpus.next_power_of_two().trailing_zeros();
        let (shift, processors, ty) = match subleaf {
            0 => (0, 1, 1),
            1 => (bits, self.cpus, 2),
            _ => (0, 0, 0),
        };
        [shift, processors, (subleaf & 0xff) | ty << 8, state.apic_id]
    }

    /// Sizes of the XSAVE area (SDM Vol. 1 §13.2).
    fn xsave(&self, subleaf: u32, state: &CpuidState) -> [u32; 4] {
        let supported = self.supported_xcr0();
        if supported == 0 {
            return [0; 4];
        }
        let size = |components: u64| if components & xcr0::AVX != 0 { 832 } else { 576 };
        match subleaf {
            0 => [supported as u32, size(state.xcr0), size(supported), (supported >> 32) as u32],
            // XSAVES' compacted area is laid out as the standard one: AVX is the only
            // extended component.
            1 if self.xsave[0] & (1 << 1 | 1 << 3) != 0 => {
                [self.xsave[0] & 0xf, size(state.xcr0 | state.xss), 0, 0]
            }
            1 => [self.xsave[0] & 0xf, 0, 0, 0],
            2 if supported & xcr0::AVX != 0 => [256, 576, 0, 0],
            _ => [0; 4],
        }
    }

    fn extended(&self, leaf: u32) -> [u32; 4] {
        match leaf {
            0x8000_0000 => [MAX_EXTENDED, 0, 0, 0],
            0x8000_0001 => [0, 0, self.extended1[2], self.extended1[3]],
            0x8000_0002..=0x8000_0004 => {
                let at = (leaf - 0x8000_0002) as usize * 16;
                let mut regs = [0; 4];
                for (r, bytes) in regs.iter_mut().zip(BRAND[at..at + 16].chunks_exact(4)) {
                    *r = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                }
                regs
            }
            // L2: 2048 KiB, 16-way (8), 64-byte lines.
            0x8000_0006 => [0, 0, 2048 << 16 | 8 << 12 | 64, 0],
            0x8000_0007 => [0, 0, 0, INVARIANT_TSC],
            0x8000_0008 => self.extended8,
            _ => [0; 4],
        }
    }
}

const fn word(bytes: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_crystal_is_related_to_the_tsc_as_well_as_linux_can_compute() {
        let of = |tsc| Crystal::of(1_000_000_000, tsc);
        assert_eq!((of(2_000_000_000).numerator, of(2_000_000_000).denominator), (2, 1));
        assert_eq!((of(2_900_000_000).numerator, of(2_900_000_000).denominator), (29, 10));
        for tsc in [2_394_374_000_u64, 2_194_843_216, 3_000_000_001, 999_999_937] {
            let c = of(tsc);
            let shown = u64::from(c.hz) * u64::from(c.numerator) / u64::from(c.denominator);
            assert!(shown.abs_diff(tsc) < tsc / 1_000_000, "{c:?} for {tsc}");
            assert!(u64::from(c.numerator) * 1_000_000 <= u32::MAX.into(), "{c:?}");
        }
    }

    /// An engine that claims every feature bit.
    fn greedy() -> CpuidModel {
        CpuidModel::new(|_, _| [u32::MAX; 4], 2_500_000_000, 1)
    }
    /// An engine that claims none.
    fn bare() -> CpuidModel {
        CpuidModel::new(|_, _| [0; 4], 2_500_000_000, 1)
    }
    const ON: CpuidState = CpuidState {
        cr4: 0,
        xcr0: 1,
        xss: 0,
        apic_enabled: true,
        apic_id: 0,
        hides_invariant_tsc: false,
        monitor: true,
    };

    #[test]
    fn the_table_has_what_cpuid_gives() {
        let m = greedy();
        let table = m.entries(0);
        for e in &table {
            assert_eq!(e.registers, m.query(e.leaf, e.subleaf.unwrap_or(0), &ON), "{:#x}", e.leaf);
        }
        let has = |leaf, subleaf| table.iter().any(|e| (e.leaf, e.subleaf) == (leaf, subleaf));
        assert!(has(0, None) && has(7, Some(2)) && has(0xd, Some(1)) && has(MAX_EXTENDED, None));
    }

    #[test]
    fn vendor_string_is_in_ebx_edx_ecx() {
        let [max, b, c, d] = bare().query(0, 0, &ON);
        let text: Vec<u8> = [b, d, c].iter().flat_map(|r| r.to_le_bytes()).collect();
        assert_eq!(text, b"GenuineIntel");
        assert_eq!(max, 0x1f);
    }

    #[test]
    fn l0s_own_features_do_not_need_the_engine() {
        let [sig, _, c, d] = bare().query(1, 0, &ON);
        // SDM Vol. 2A figure 3-6: extended model 8, family 6, model F.
        assert_eq!((sig >> 16 & 15, sig >> 8 & 15, sig >> 4 & 15), (8, 6, 15));
        for bit in [21, 24, 31] {
            assert_ne!(c & 1 << bit, 0, "ECX bit {bit}");
        }
        for bit in [4, 5, 7, 9, 12, 14, 16] {
            assert_ne!(d & 1 << bit, 0, "EDX bit {bit}");
        }
        assert_eq!(bare().query(7, 0, &ON)[3] & 1 << 29, 1 << 29);
        assert_eq!(bare().query(6, 0, &ON), [4, 0, 0, 0]);
        assert_eq!(bare().query(0x8000_0007, 0, &ON), [0, 0, 0, 0x100]);
    }

    #[test]
    fn what_l0_withholds_is_not_shown_even_if_the_engine_has_it() {
        let c = greedy().query(1, 0, &ON)[2];
        // DTES64, MONITOR, DS-CPL, VMX, SMX, EIST, TM2, PDCM, DCA.
        for bit in [2, 3, 4, 5, 6, 7, 8, 15, 18] {
            assert_eq!(c & 1 << bit, 0, "ECX bit {bit}");
        }
        // SSE3, PCLMULQDQ, SSSE3, FMA, CX16, XSAVE, AVX stay.
        for bit in [0, 1, 9, 12, 13, 26, 28] {
            assert_ne!(c & 1 << bit, 0, "ECX bit {bit}");
        }
        let b = greedy().query(7, 0, &ON)[1];
        for bit in [2, 4, 11, 14, 25] {
            assert_eq!(b & 1 << bit, 0, "07H:EBX bit {bit}");
        }
        assert_eq!(greedy().query(0xa, 0, &ON), [0; 4]);
        assert_eq!(greedy().query(5, 0, &ON), [0; 4]);
    }

    #[test]
    fn performance_counters_are_shown_where_the_engine_has_those() {
        let soft = CpuidModel::new(|l, _| if l == 0xa { pmu::LEAF } else { [0; 4] }, 2_500_000_000, 1);
        // SDM Vol. 2A, CPUID 0AH: version 2; 4 and 3 counters of 48 bits; of 7 events, 3 to 6 missing.
        assert_eq!(soft.query(0xa, 0, &ON), [0x0730_0402, 0x78, 0, 0x603]);
        assert_ne!(soft.query(1, 0, &ON)[2] & 1 << 15, 0, "PDCM");
        // Another PMU is not what L0 has registers for.
        assert!(!greedy().has_performance_counters() && !bare().has_performance_counters());
    }

    #[test]
    fn guest_state_shows() {
        let m = greedy();
        assert_eq!(m.query(1, 0, &ON)[2] & 1 << 27, 0);
        let s = CpuidState { cr4: cr4::OSXSAVE | cr4::PKE, ..ON };
        assert_ne!(m.query(1, 0, &s)[2] & 1 << 27, 0);
        assert_eq!(m.query(7, 0, &ON)[2] & 1 << 4, 0);
        assert_ne!(m.query(7, 0, &s)[2] & 1 << 4, 0);
        let off = CpuidState { apic_enabled: false, ..ON };
        assert_eq!(m.query(1, 0, &off)[3] & 1 << 9, 0);
    }

    #[test]
    fn xsave_sizes_follow_xcr0() {
        let m = greedy();
        // SDM Vol. 1 §13.4: 512 legacy + 64 header, AVX 256 bytes at 576.
        assert_eq!(m.query(0xd, 0, &ON), [7, 576, 832, 0]);
        assert_eq!(m.query(0xd, 0, &CpuidState { xcr0: 7, ..ON })[1], 832);
        assert_eq!(m.query(0xd, 1, &CpuidState { xcr0: 7, ..ON }), [15, 832, 0, 0]);
        assert_eq!(m.query(0xd, 2, &ON), [256, 576, 0, 0]);
        assert_eq!(m.query(0xd, 3, &ON), [0; 4]);
        assert_eq!(bare().query(0xd, 0, &ON), [0; 4]);
    }

    #[test]
    fn no_hypervisor_leaves_and_highest_leaf_for_what_is_out_of_range() {
        let m = bare();
        assert_eq!(m.query(0x4000_0000, 0, &ON), [0; 4]);
        assert_eq!(m.query(0x20, 1, &ON), m.query(0x1f, 1, &ON));
        assert_eq!(m.query(0x8000_0009, 0, &ON), m.query(0x1f, 0, &ON));
    }

    #[test]
    fn topology_ends_with_type_invalid() {
        let m = CpuidModel::new(|_, _| [0; 4], 2_000_000_000, 3);
        let s = CpuidState { apic_id: 2, ..ON };
        assert_eq!(m.query(0xb, 0, &s), [0, 1, 0x100, 2]);
        assert_eq!(m.query(0xb, 1, &s), [2, 3, 0x201, 2]);
        assert_eq!(m.query(0x1f, 2, &s), [0, 0, 2, 2]);
    }

    #[test]
    fn crystal_gives_the_tsc_frequency_the_way_linux_computes_it() {
        for hz in
            [1_000_000_000u64, 2_500_000_000, 2_100_000_000, 2_699_998_123, 3_333_333_333, 5_700_000_001]
        {
            let c = Crystal::for_tsc(hz);
            let khz = (c.hz / 1000).checked_mul(c.numerator).expect("Linux overflows") / c.denominator;
            let error = (f64::from(khz) * 1000.0 / hz as f64 - 1.0).abs();
            assert!(error < 2e-6, "{hz}: {c:?} gives {khz} kHz");
        }
        assert_eq!(
            Crystal::for_tsc(2_500_000_000),
            Crystal { denominator: 1, numerator: 100, hz: 25_000_000 }
        );
    }
}
