//! The MSRs that L0 answers (SDM Vol. 4 table 2-2), and MTRRs (Vol. 3A §12.11).
//!
//! Everything else raises #GP(0), as an MSR that the processor does not have. MTRRs are
//! kept and checked but change nothing: all of L1's RAM is write-back. Microcode updates
//! are accepted and ignored. Not supported: machine-check banks (there are none), last-branch records,
//! thermal and power management but for what drivers of MWAIT touch, VMX.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::{GpFault, LocalApic};
use engine::{GuestRegs, GuestState};
use x86_spec::msr::{self, arch_cap};
use x86_spec::pmu;
use x86_spec::reg::{cr0, efer};
use x86_spec::segment::seg;

use crate::cpuid::PHYSICAL_BITS;

/// IA32_ARCH_CAPABILITIES: a processor without the flaws that guests would work around.
pub const ARCH_CAPABILITIES: u64 = arch_cap::RDCL_NO
    | arch_cap::IBRS_ALL
    | arch_cap::SKIP_L1DFL_VMENTRY
    | arch_cap::SSB_NO
    | arch_cap::MDS_NO
    | arch_cap::PSCHANGE_MC_NO
    | arch_cap::TAA_NO
    | arch_cap::SBDR_SSDP_NO
    | arch_cap::FBSDP_NO
    | arch_cap::PSDP_NO
    | arch_cap::BHI_NO
    | arch_cap::PBRSB_NO
    | arch_cap::GDS_NO
    | arch_cap::RFDS_NO
    | arch_cap::ITS_NO;

/// Microcode revision of IA32_BIOS_SIGN_ID bits 63:32.
const MICROCODE: u64 = 0x2b00_0643 << 32;
/// IA32_FEATURE_CONTROL: locked, VMX and SMX off.
const FEATURE_CONTROL: u64 = 1;
/// IA32_MISC_ENABLE: fast strings (0); BTS (11) and PEBS (12) unavailable.
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12;
/// IA32_MISC_ENABLE bits that can be written: fast strings; and MONITOR's, where that is offered.
const MISC_ENABLE_WRITABLE: u64 = 1;
/// IA32_MISC_ENABLE: enable MONITOR FSM.
const MISC_ENABLE_MONITOR: u64 = 1 << 18;
/// IA32_SPEC_CTRL: IBRS, STIBP, SSBD, BHI_DIS_S.
const SPEC_CTRL_DEFINED: u64 = 7 | 1 << 10;
/// IA32_DEBUGCTL: LBR and BTF.
const DEBUGCTL_DEFINED: u64 = 3;
/// IA32_DEBUGCTL bits that come with performance counters.
const DEBUGCTL_FREEZE: u64 = pmu::DEBUGCTL_FREEZE_LBRS | pmu::DEBUGCTL_FREEZE_PERFMON;
/// MSR_SMI_COUNT.
const SMI_COUNT: u32 = 0x34;
/// MSR_PKG_CST_CONFIG_CONTROL, which drivers of MWAIT read.
const PKG_CST_CONFIG_CONTROL: u32 = 0xe2;
/// Its value: no package C-state but C0 and C1 (limit 0), and locked (CFG Lock, bit 15), so that writes are #GP.
const PKG_CST_CONFIG: u64 = 1 << 15;
/// MSR_POWER_CTL, in which drivers of MWAIT switch C1E.
const POWER_CTL: u32 = 0x1fc;
/// Its bit that there is: enable C1E.
const POWER_CTL_C1E: u64 = 1 << 1;
/// How many different unknown MSRs are reported.
const MAX_REPORTED: usize = 256;

/// The TSC of one vCPU: the engine's plus an offset that the guest can change.
pub struct GuestTsc {
    now: Box<dyn Fn() -> u64 + Send + Sync>,
    hz: u64,
    offset: AtomicU64,
}

impl std::fmt::Debug for GuestTsc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestTsc").field("hz", &self.hz).field("offset", &self.offset).finish_non_exhaustive()
    }
}

impl GuestTsc {
    /// A guest TSC that reads 0 now. `now` is the engine's TSC, of `hz` Hz.
    pub fn new(now: impl Fn() -> u64 + Send + Sync + 'static, hz: u64) -> Arc<Self> {
        let offset = now().wrapping_neg();
        Arc::new(Self { now: Box::new(now), hz, offset: AtomicU64::new(offset) })
    }

    /// The TSC offset for the VMCS.
    pub fn offset(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }

    fn add(&self, delta: u64) {
        self.offset.fetch_add(delta, Ordering::Relaxed);
    }
}

impl devices::TscSource for GuestTsc {
    fn guest_tsc(&self) -> u64 {
        (self.now)().wrapping_add(self.offset())
    }
    fn frequency_hz(&self) -> u64 {
        self.hz
    }
}

/// What the MSRs of one vCPU touch besides its own state.
pub trait ApicMsrs {
    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// [`GpFault`] where the processor raises #GP(0).
    fn read(&mut self, msr: u32) -> Result<u64, GpFault>;
    /// WRMSR of one of them.
    ///
    /// # Errors
    /// As [`Self::read`].
    fn write(&mut self, msr: u32, value: u64) -> Result<(), GpFault>;
    /// The guest's TSC jumped.
    fn tsc_changed(&mut self);
}

/// Where an access takes place.
pub struct MsrContext<'a> {
    /// Guest state of the VMCS.
    pub guest: &'a mut GuestState,
    /// Registers outside of the VMCS.
    pub regs: &'a mut GuestRegs,
    /// The local APIC.
    pub apic: &'a mut dyn ApicMsrs,
}

/// The MSRs of one vCPU that are in neither VMCS nor [`GuestRegs`].
#[derive(Debug)]
pub struct MsrState {
    tsc: Arc<GuestTsc>,
    tsc_adjust: u64,
    misc_enable: u64,
    offers_monitor: bool,
    power_ctl: u64,
    mcg_status: u64,
    performance_counters: bool,
    mtrr: Mtrrs,
    reported: HashSet<(u32, bool)>,
}

impl MsrState {
    /// As firmware leaves them.
    pub fn new(tsc: Arc<GuestTsc>) -> Self {
        Self {
            tsc,
            tsc_adjust: 0,
            misc_enable: MISC_ENABLE,
            offers_monitor: false,
            power_ctl: 0,
            mcg_status: 0,
            performance_counters: false,
            mtrr: Mtrrs::default(),
            reported: HashSet::new(),
        }
    }

    /// The same with or without performance counters.
    #[must_use]
    pub fn with_performance_counters(mut self, on: bool) -> Self {
        self.performance_counters = on;
        if on {
            self.misc_enable |= pmu::MISC_ENABLE_AVAILABLE;
        }
        self
    }

    /// Bits of IA32_DEBUGCTL that can be 1 (SDM Vol. 4 table 2-2).
    pub fn debugctl_bits(&self) -> u64 {
        DEBUGCTL_DEFINED | if self.performance_counters { DEBUGCTL_FREEZE } else { 0 }
    }

    /// Bits of IA32_PERF_GLOBAL_CTRL that can be 1.
    pub fn perf_global_ctrl_bits(&self) -> u64 {
        if self.performance_counters { pmu::GLOBAL } else { 0 }
    }

    /// Offers MONITOR and MWAIT, as IA32_MISC_ENABLE bit 18 then says (SDM Vol. 4, table 2-2).
    #[must_use]
    pub fn with_monitor(mut self, on: bool) -> Self {
        self.offers_monitor = on;
        if on {
            self.misc_enable |= MISC_ENABLE_MONITOR;
        }
        self
    }

    /// Whether MONITOR and MWAIT are offered and enabled.
    pub fn has_monitor(&self) -> bool {
        self.misc_enable & MISC_ENABLE_MONITOR != 0
    }

    /// The TSC.
    pub fn tsc(&self) -> &Arc<GuestTsc> {
        &self.tsc
    }

    /// RDMSR.
    ///
    /// # Errors
    /// [`GpFault`] when the processor would raise #GP(0).
    pub fn read(&mut self, msr: u32, cx: &mut MsrContext<'_>) -> Result<u64, GpFault> {
        use devices::TscSource as _;
        if LocalApic::is_apic_msr(msr) {
            return cx.apic.read(msr);
        }
        if let Some(v) = read_context(msr, cx) {
            return Ok(v);
        }
        if self.performance_counters
            && let Some(v) = cx.regs.pmu.read_msr(msr, cx.guest.perf_global_ctrl)
        {
            return Ok(v);
        }
        match msr {
            msr::TSC => Ok(self.tsc.guest_tsc()),
            msr::IA32_TSC_ADJUST_MSR => Ok(self.tsc_adjust),
            msr::IA32_PLATFORM_ID | SMI_COUNT | msr::IA32_MCG_CAP => Ok(0),
            msr::IA32_FEATURE_CONTROL => Ok(FEATURE_CONTROL),
            msr::IA32_BIOS_SIGN_ID => Ok(MICROCODE),
            msr::MSR_PLATFORM_INFO => Ok(((self.tsc.hz / 100_000_000) & 0xff) << 8),
            msr::IA32_ARCH_CAPABILITIES => Ok(ARCH_CAPABILITIES),
            msr::IA32_MCG_STATUS => Ok(self.mcg_status),
            msr::IA32_MISC_ENABLE => Ok(self.misc_enable),
            PKG_CST_CONFIG_CONTROL if self.offers_monitor => Ok(PKG_CST_CONFIG),
            POWER_CTL if self.offers_monitor => Ok(self.power_ctl),
            _ => self.mtrr.read(msr).ok_or_else(|| self.report(msr, None)),
        }
    }

    /// WRMSR.
    ///
    /// # Errors
    /// [`GpFault`] when the processor would raise #GP(0); nothing changed then.
    pub fn write(&mut self, msr: u32, value: u64, cx: &mut MsrContext<'_>) -> Result<(), GpFault> {
        use devices::TscSource as _;
        if LocalApic::is_apic_msr(msr) {
            return cx.apic.write(msr, value);
        }
        if msr == msr::IA32_DEBUGCTL {
            allow(value & !self.debugctl_bits() == 0)?;
            cx.guest.debugctl = value;
            return Ok(());
        }
        if let Some(result) = write_context(msr, value, cx) {
            return result;
        }
        if self.performance_counters
            && let Some(result) = cx.regs.pmu.write_msr(msr, value, &mut cx.guest.perf_global_ctrl)
        {
            return result.map_err(|_| GpFault);
        }
        match msr {
            msr::TSC => {
                let delta = value.wrapping_sub(self.tsc.guest_tsc());
                self.move_tsc(delta, cx);
                Ok(())
            }
            msr::IA32_TSC_ADJUST_MSR => {
                let delta = value.wrapping_sub(self.tsc_adjust);
                self.move_tsc(delta, cx);
                Ok(())
            }
            // Bit 0 is IBPB, or the L1D flush; the others are reserved.
            msr::IA32_PRED_CMD | msr::IA32_FLUSH_CMD => allow(value & !1 == 0),
            msr::IA32_BIOS_SIGN_ID | msr::IA32_BIOS_UPDT_TRIG => Ok(()),
            msr::IA32_MCG_STATUS => {
                // SDM Vol. 3B §16.3.1.2: RIPV, EIPV, MCIP (and LMCE_S) are defined.
                allow(value & !0xf == 0)?;
                self.mcg_status = value;
                Ok(())
            }
            msr::IA32_MISC_ENABLE => {
                let monitor = if self.offers_monitor { MISC_ENABLE_MONITOR } else { 0 };
                allow((value ^ self.misc_enable) & !(MISC_ENABLE_WRITABLE | monitor) == 0)?;
                self.misc_enable = value;
                Ok(())
            }
            POWER_CTL if self.offers_monitor => {
                allow(value & !POWER_CTL_C1E == 0)?;
                self.power_ctl = value;
                Ok(())
            }
            _ => self.mtrr.write(msr, value).unwrap_or_else(|| Err(self.report(msr, Some(value)))),
        }
    }

    /// Moves the TSC. IA32_TSC_ADJUST counts what WRMSR to either added (SDM Vol. 3B §18.17.3).
    fn move_tsc(&mut self, delta: u64, cx: &mut MsrContext<'_>) {
        self.tsc.add(delta);
        self.tsc_adjust = self.tsc_adjust.wrapping_add(delta);
        cx.apic.tsc_changed();
    }

    fn report(&mut self, msr: u32, value: Option<u64>) -> GpFault {
        if self.reported.len() < MAX_REPORTED && self.reported.insert((msr, value.is_some())) {
            match value {
                None => tracing::debug!("RDMSR of {msr:#x}, which does not exist: #GP"),
                Some(v) => tracing::debug!("WRMSR of {v:#x} to {msr:#x}, which can't be written: #GP"),
            }
        }
        GpFault
    }
}

fn allow(ok: bool) -> Result<(), GpFault> {
    if ok { Ok(()) } else { Err(GpFault) }
}

/// Whether a linear address is canonical for 48 bits (SDM Vol. 1 §3.3.7.1).
pub fn is_canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

/// MSRs of the context that the engine switches. Most never exit.
fn read_context(msr: u32, cx: &MsrContext<'_>) -> Option<u64> {
    let (g, m) = (&cx.guest, &cx.regs.msrs);
    Some(match msr {
        msr::FS_BASE => g.segments[seg::FS].base,
        msr::GS_BASE => g.segments[seg::GS].base,
        msr::KERNEL_GS_BASE => m.kernel_gs_base,
        msr::STAR => m.star,
        msr::LSTAR => m.lstar,
        msr::CSTAR => m.cstar,
        msr::FMASK => m.fmask,
        msr::EFER => g.efer,
        msr::IA32_SYSENTER_CS => g.sysenter_cs,
        msr::IA32_SYSENTER_ESP => g.sysenter_esp,
        msr::IA32_SYSENTER_EIP => g.sysenter_eip,
        msr::IA32_PAT => g.pat,
        msr::IA32_DEBUGCTL => g.debugctl,
        msr::IA32_TSC_AUX_MSR => m.tsc_aux,
        msr::IA32_SPEC_CTRL => m.spec_ctrl,
        msr::IA32_XSS_MSR => m.xss,
        _ => return None,
    })
}

fn write_context(msr: u32, value: u64, cx: &mut MsrContext<'_>) -> Option<Result<(), GpFault>> {
    let (g, m) = (&mut *cx.guest, &mut cx.regs.msrs);
    let (slot, valid) = match msr {
        msr::EFER => return Some(write_efer(value, g)),
        msr::FS_BASE => (&mut g.segments[seg::FS].base, is_canonical(value)),
        msr::GS_BASE => (&mut g.segments[seg::GS].base, is_canonical(value)),
        msr::KERNEL_GS_BASE => (&mut m.kernel_gs_base, is_canonical(value)),
        msr::LSTAR => (&mut m.lstar, is_canonical(value)),
        msr::CSTAR => (&mut m.cstar, is_canonical(value)),
        msr::IA32_SYSENTER_ESP => (&mut g.sysenter_esp, is_canonical(value)),
        msr::IA32_SYSENTER_EIP => (&mut g.sysenter_eip, is_canonical(value)),
        msr::IA32_SYSENTER_CS => (&mut g.sysenter_cs, true),
        msr::STAR => (&mut m.star, true),
        msr::FMASK => (&mut m.fmask, value >> 32 == 0),
        msr::IA32_PAT => (&mut g.pat, value.to_le_bytes().iter().all(|t| is_pat_type(*t))),
        msr::IA32_TSC_AUX_MSR => (&mut m.tsc_aux, value >> 32 == 0),
        msr::IA32_SPEC_CTRL => (&mut m.spec_ctrl, value & !SPEC_CTRL_DEFINED == 0),
        // No supervisor state components are offered.
        msr::IA32_XSS_MSR => (&mut m.xss, value == 0),
        _ => return None,
    };
    Some(allow(valid).map(|()| *slot = value))
}

/// WRMSR to IA32_EFER (SDM Vol. 3A §2.2.1, §10.8.5): LMA can't be written, LME can't change
/// while paging is on.
fn write_efer(value: u64, g: &mut GuestState) -> Result<(), GpFault> {
    allow(value & !efer::DEFINED == 0)?;
    allow(g.cr0 & cr0::PG == 0 || (value ^ g.efer) & efer::LME == 0)?;
    g.efer = value & !efer::LMA | g.efer & efer::LMA;
    Ok(())
}

/// Memory types of IA32_PAT (SDM Vol. 3A table 12-10).
fn is_pat_type(ty: u8) -> bool {
    matches!(ty, 0 | 1 | 4..=7)
}

/// Memory types of MTRRs (SDM Vol. 3A table 12-8).
fn is_mtrr_type(ty: u8) -> bool {
    matches!(ty, 0 | 1 | 4..=6)
}

/// Number of variable ranges.
const VARIABLE: usize = 8;
/// IA32_MTRRCAP: 8 variable ranges, fixed ranges, write combining.
const MTRR_CAP: u64 = VARIABLE as u64 | 1 << 8 | 1 << 10;
/// The fixed-range registers, in order of address.
const FIXED: [u32; 11] = [
    msr::IA32_MTRR_FIX64K_00000,
    msr::IA32_MTRR_FIX16K_80000,
    msr::IA32_MTRR_FIX16K_A0000,
    msr::IA32_MTRR_FIX4K_C0000,
    msr::IA32_MTRR_FIX4K_C8000,
    msr::IA32_MTRR_FIX4K_D0000,
    msr::IA32_MTRR_FIX4K_D8000,
    msr::IA32_MTRR_FIX4K_E0000,
    msr::IA32_MTRR_FIX4K_E8000,
    msr::IA32_MTRR_FIX4K_F0000,
    msr::IA32_MTRR_FIX4K_F8000,
];
const VARIABLE_LAST: u32 = msr::IA32_MTRR_PHYSBASE0 + 2 * VARIABLE as u32 - 1;
/// Address bits of a variable range that exist.
const PHYS_MASK: u64 = ((1 << PHYSICAL_BITS) - 1) & !0xfff;

/// Memory type range registers.
#[derive(Debug)]
struct Mtrrs {
    def_type: u64,
    fixed: [u64; FIXED.len()],
    /// Base and mask by turns.
    variable: [u64; 2 * VARIABLE],
}

impl Default for Mtrrs {
    /// As firmware sets them up: write-back, but uncached where devices are (the video area,
    /// the hole from 3 to 4 GiB), write-protected where option ROMs would be.
    fn default() -> Self {
        const WB: u64 = 0x0606_0606_0606_0606;
        const WP: u64 = 0x0505_0505_0505_0505;
        let mut variable = [0; 2 * VARIABLE];
        variable[0] = 0xc000_0000;
        variable[1] = PHYS_MASK & !0x3fff_ffff | 1 << 11;
        Self {
            // E (11), FE (10), WB.
            def_type: 1 << 11 | 1 << 10 | 6,
            fixed: [WB, WB, 0, WP, WP, WP, WP, WP, WP, WP, WP],
            variable,
        }
    }
}

impl Mtrrs {
    fn read(&self, msr: u32) -> Option<u64> {
        match msr {
            msr::IA32_MTRRCAP => Some(MTRR_CAP),
            msr::IA32_MTRR_DEF_TYPE => Some(self.def_type),
            msr::IA32_MTRR_PHYSBASE0..=VARIABLE_LAST => {
                self.variable.get((msr - msr::IA32_MTRR_PHYSBASE0) as usize).copied()
            }
            _ => FIXED.iter().position(|f| *f == msr).map(|i| self.fixed[i]),
        }
    }

    /// `None` when `msr` is not a writable MTRR.
    fn write(&mut self, msr: u32, value: u64) -> Option<Result<(), GpFault>> {
        let ty_ok = is_mtrr_type(value as u8);
        let (slot, valid) = match msr {
            // Bits 9:8 and 63:12 are reserved (SDM Vol. 3A figure 12-5).
            msr::IA32_MTRR_DEF_TYPE => (&mut self.def_type, ty_ok && value & !0xcff == 0),
            msr::IA32_MTRR_PHYSBASE0..=VARIABLE_LAST => {
                let i = (msr - msr::IA32_MTRR_PHYSBASE0) as usize;
                // Figure 12-7: type in a base, V in bit 11 of a mask, the rest is address.
                let valid = if i.is_multiple_of(2) {
                    ty_ok && value & !(PHYS_MASK | 0xff) == 0
                } else {
                    value & !(PHYS_MASK | 1 << 11) == 0
                };
                (self.variable.get_mut(i)?, valid)
            }
            _ => {
                let i = FIXED.iter().position(|f| *f == msr)?;
                (&mut self.fixed[i], value.to_le_bytes().iter().all(|t| is_mtrr_type(*t)))
            }
        };
        Some(allow(valid).map(|()| *slot = value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::TscSource;

    #[derive(Default)]
    struct NoApic {
        tsc_changes: u32,
    }
    impl ApicMsrs for NoApic {
        fn read(&mut self, _: u32) -> Result<u64, GpFault> {
            Err(GpFault)
        }
        fn write(&mut self, _: u32, _: u64) -> Result<(), GpFault> {
            Err(GpFault)
        }
        fn tsc_changed(&mut self) {
            self.tsc_changes += 1;
        }
    }

    struct Rig {
        msrs: MsrState,
        guest: GuestState,
        regs: GuestRegs,
        apic: NoApic,
    }

    impl Rig {
        /// The engine's TSC stands still at 1000.
        fn new() -> Self {
            Self {
                msrs: MsrState::new(GuestTsc::new(|| 1000, 2_500_000_000)),
                guest: GuestState::default(),
                regs: GuestRegs::reset(),
                apic: NoApic::default(),
            }
        }
        fn rd(&mut self, msr: u32) -> Result<u64, GpFault> {
            let mut cx = MsrContext { guest: &mut self.guest, regs: &mut self.regs, apic: &mut self.apic };
            self.msrs.read(msr, &mut cx)
        }
        fn wr(&mut self, msr: u32, v: u64) -> Result<(), GpFault> {
            let mut cx = MsrContext { guest: &mut self.guest, regs: &mut self.regs, apic: &mut self.apic };
            self.msrs.write(msr, v, &mut cx)
        }
    }

    #[test]
    fn performance_counters_exist_where_they_are_offered() {
        let mut r = Rig::new();
        let registers = [0xc1, 0x186, 0x309, 0x345, 0x38d, 0x38e, 0x38f, 0x390, 0x4c1];
        for n in registers {
            assert_eq!(r.rd(n), Err(GpFault), "{n:#x}");
        }
        assert_eq!(r.wr(0x38f, 1), Err(GpFault));
        assert_eq!(r.wr(msr::IA32_DEBUGCTL, 1 << 12), Err(GpFault));
        r.msrs = r.msrs.with_performance_counters(true);
        for n in registers {
            assert!(r.rd(n).is_ok(), "{n:#x}");
        }
        assert_eq!(r.wr(0x38f, 0x7_0000_000f), Ok(()));
        assert_eq!(r.guest.perf_global_ctrl, 0x7_0000_000f, "part of the VMCS");
        assert_eq!(r.wr(0x38f, 1 << 4), Err(GpFault));
        // SDM Vol. 4: freezing on a PMI; "performance monitoring available" is read-only.
        assert_eq!(r.wr(msr::IA32_DEBUGCTL, 3 << 11), Ok(()));
        assert_eq!(r.wr(msr::IA32_DEBUGCTL, 1 << 13), Err(GpFault));
        assert_eq!(r.rd(msr::IA32_MISC_ENABLE).unwrap() & 1 << 7, 1 << 7);
        assert_eq!(r.wr(msr::IA32_MISC_ENABLE, 1 | 3 << 11), Err(GpFault));
    }

    #[test]
    fn tsc_and_tsc_adjust_move_together() {
        // SDM Vol. 3B §18.17.3.
        let mut r = Rig::new();
        assert_eq!(r.rd(msr::TSC), Ok(0));
        r.wr(msr::TSC, 500).unwrap();
        assert_eq!((r.rd(msr::TSC), r.rd(msr::IA32_TSC_ADJUST_MSR)), (Ok(500), Ok(500)));
        r.wr(msr::IA32_TSC_ADJUST_MSR, 100).unwrap();
        assert_eq!((r.rd(msr::TSC), r.rd(msr::IA32_TSC_ADJUST_MSR)), (Ok(100), Ok(100)));
        assert_eq!(r.msrs.tsc().guest_tsc(), 100);
        assert_eq!(r.msrs.tsc().offset(), 100u64.wrapping_sub(1000));
        assert_eq!(r.apic.tsc_changes, 2);
    }

    #[test]
    fn reserved_bits_of_mtrrs_fault_and_change_nothing() {
        // SDM Vol. 3A §12.11.2, figures 12-5 and 12-7.
        let mut r = Rig::new();
        let cases = [
            (msr::IA32_MTRR_DEF_TYPE, 0x1c02),
            (msr::IA32_MTRR_DEF_TYPE, 0xc02),
            (msr::IA32_MTRR_DEF_TYPE, 0xd06),
            (msr::IA32_MTRR_PHYSBASE0, 7),
            (msr::IA32_MTRR_PHYSBASE0, 0x106),
            (msr::IA32_MTRR_PHYSBASE0, 1 << 46),
            (msr::IA32_MTRR_PHYSMASK0, 1 << 10),
            (msr::IA32_MTRR_PHYSMASK7, 1 << 46),
            (msr::IA32_MTRR_FIX64K_00000, 0x0606_0606_0606_0603),
            (msr::IA32_MTRRCAP, 0),
        ];
        for (msr, v) in cases {
            let before = r.rd(msr).unwrap();
            assert_eq!(r.wr(msr, v), Err(GpFault), "{msr:#x} <- {v:#x}");
            assert_eq!(r.rd(msr), Ok(before));
        }
        for (msr, v) in [
            (msr::IA32_MTRR_DEF_TYPE, 0xc00),
            (msr::IA32_MTRR_PHYSBASE7, (1 << 45) | 6),
            (msr::IA32_MTRR_PHYSMASK7, PHYS_MASK | 1 << 11),
            (msr::IA32_MTRR_FIX4K_F8000, 0x0001_0405_0606_0000),
        ] {
            r.wr(msr, v).unwrap();
            assert_eq!(r.rd(msr), Ok(v));
        }
        // There are eight variable ranges (IA32_MTRRCAP.VCNT).
        assert_eq!(r.rd(msr::IA32_MTRRCAP).unwrap() & 0xff, 8);
        assert_eq!(r.rd(msr::IA32_MTRR_PHYSBASE8), Err(GpFault));
    }

    #[test]
    fn efer_rules() {
        let mut r = Rig::new();
        assert_eq!(r.wr(msr::EFER, 1 << 1), Err(GpFault));
        r.wr(msr::EFER, efer::LME | efer::NXE | efer::LMA).unwrap();
        assert_eq!(r.rd(msr::EFER), Ok(efer::LME | efer::NXE), "LMA is read-only");
        r.guest.cr0 |= cr0::PG;
        assert_eq!(r.wr(msr::EFER, 0), Err(GpFault), "LME while paging");
        r.wr(msr::EFER, efer::LME).unwrap();
    }

    #[test]
    fn pass_through_msrs_are_checked_when_they_exit_all_the_same() {
        let mut r = Rig::new();
        let bad = 0x8000_0000_0000;
        for m in [msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE, msr::LSTAR, msr::IA32_SYSENTER_EIP] {
            assert_eq!(r.wr(m, bad), Err(GpFault), "{m:#x}: not canonical");
            r.wr(m, 0xffff_8000_0000_0000).unwrap();
            assert_eq!(r.rd(m), Ok(0xffff_8000_0000_0000));
        }
        // SDM Vol. 3A table 12-10: types 2 and 3 are reserved.
        assert_eq!(r.wr(msr::IA32_PAT, 0x0007_0406_0007_0402), Err(GpFault));
        assert_eq!(r.wr(msr::FMASK, 1 << 32), Err(GpFault));
        assert_eq!(r.wr(msr::IA32_XSS_MSR, 1 << 8), Err(GpFault));
    }

    #[test]
    fn commands_are_write_only() {
        let mut r = Rig::new();
        for m in [msr::IA32_PRED_CMD, msr::IA32_FLUSH_CMD] {
            assert_eq!(r.wr(m, 1), Ok(()));
            assert_eq!(r.wr(m, 2), Err(GpFault));
            assert_eq!(r.rd(m), Err(GpFault));
        }
    }

    #[test]
    fn unknown_msrs_fault_and_what_is_kept_of_them_is_bounded() {
        let mut r = Rig::new();
        for m in 0x1_0000..0x1_0400 {
            assert_eq!(r.rd(m), Err(GpFault));
            assert_eq!(r.wr(m, 0), Err(GpFault));
        }
        assert_eq!(r.msrs.reported.len(), MAX_REPORTED);
    }

    #[test]
    fn vmx_is_locked_off() {
        let mut r = Rig::new();
        assert_eq!(r.rd(msr::IA32_FEATURE_CONTROL), Ok(1));
        assert_eq!(r.wr(msr::IA32_FEATURE_CONTROL, 5), Err(GpFault));
        assert_eq!(r.rd(msr::IA32_VMX_BASIC), Err(GpFault));
    }

    #[test]
    fn misc_enable_lets_only_fast_strings_change() {
        let mut r = Rig::new();
        let v = r.rd(msr::IA32_MISC_ENABLE).unwrap();
        r.wr(msr::IA32_MISC_ENABLE, v & !1).unwrap();
        assert_eq!(r.wr(msr::IA32_MISC_ENABLE, v | 1 << 18), Err(GpFault));
    }

    /// SDM Vol. 4, table 2-2: bit 18 is MONITOR's, where there is MONITOR.
    #[test]
    fn misc_enable_switches_monitor() {
        let mut r = Rig::new();
        assert!(!r.msrs.has_monitor());
        r.msrs = MsrState::new(GuestTsc::new(|| 1000, 2_500_000_000)).with_monitor(true);
        let v = r.rd(msr::IA32_MISC_ENABLE).unwrap();
        assert!(v & 1 << 18 != 0 && r.msrs.has_monitor());
        r.wr(msr::IA32_MISC_ENABLE, v & !(1 << 18)).unwrap();
        assert!(!r.msrs.has_monitor());
        assert_eq!(r.wr(msr::IA32_MISC_ENABLE, v | 1 << 16), Err(GpFault));
    }

    /// SDM Vol. 4 ch. 2: C-state control is locked; C1E can be switched. Neither is there without MWAIT.
    #[test]
    fn idle_states_have_their_registers_where_mwait_is() {
        let mut r = Rig::new();
        assert_eq!((r.rd(0xe2), r.rd(0x1fc)), (Err(GpFault), Err(GpFault)));
        r.msrs = MsrState::new(GuestTsc::new(|| 1000, 2_500_000_000)).with_monitor(true);
        assert_eq!(r.rd(0xe2), Ok(1 << 15));
        assert_eq!(r.wr(0xe2, 0), Err(GpFault));
        r.wr(0x1fc, 2).unwrap();
        assert_eq!(r.rd(0x1fc), Ok(2));
        assert_eq!(r.wr(0x1fc, 1), Err(GpFault));
    }
}
