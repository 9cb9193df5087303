//! Guest registers that a VMCS does not hold: what stays in the processor across VM
//! entries and exits.

use std::fmt;

use memory::{MachineAddr, MachineMemory};

use crate::pmu::Pmu;

/// A 512-byte image in FXSAVE64 format, of which only the x87 part is used.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct FxArea(pub [u8; 512]);

/// One vector register, as four 64-bit lanes, lowest first (XMM is the lower two).
pub type VectorRegister = [u64; 4];

/// x87, SSE and AVX state.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct FpuState {
    /// YMM0–15.
    pub vectors: [VectorRegister; 16],
    /// x87 state in FXSAVE64 format (bytes 0–159; MXCSR and XMM in it are not used).
    pub x87: FxArea,
    /// MXCSR.
    pub mxcsr: u32,
    /// XINUSE-style bit map of components not in their initial state is not kept: every
    /// enabled component counts as in use.
    pub reserved: u32,
}

impl Default for FpuState {
    /// State after RESET (SDM Vol. 3A table 9-1).
    fn default() -> Self {
        let mut x87 = FxArea([0; 512]);
        x87.0[0] = 0x40; // FCW = 0040H
        Self { vectors: [[0; 4]; 16], x87, mxcsr: 0x1f80, reserved: 0 }
    }
}

impl fmt::Debug for FpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FpuState").field("mxcsr", &self.mxcsr).finish_non_exhaustive()
    }
}

/// MSRs that a VMCS does not hold and that guests use without exits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Msrs {
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_SPEC_CTRL.
    pub spec_ctrl: u64,
    /// IA32_XSS.
    pub xss: u64,
}

/// Size in bytes of the line that MONITOR watches (CPUID leaf 5).
pub const MONITOR_LINE: usize = 64;

/// Address-range monitoring as MONITOR armed it (SDM Vol. 2B, MONITOR).
///
/// A store to the line shows by what is in it then: one that writes what was there before goes
/// unnoticed, which is as if it had come before MONITOR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Monitor {
    /// The line.
    pub line: MachineAddr,
    /// What was in it when it was armed.
    pub content: [u8; MONITOR_LINE],
}

impl Monitor {
    /// Watches the line around `at`; `None` outside memory.
    pub fn arm(memory: &MachineMemory, at: MachineAddr) -> Option<Self> {
        let line = MachineAddr(at.0 & !(MONITOR_LINE as u64 - 1));
        let mut content = [0; MONITOR_LINE];
        memory.read(line, &mut content).ok()?;
        Some(Self { line, content })
    }

    /// Whether something else is in the line now.
    pub fn is_triggered(&self, memory: &MachineMemory) -> bool {
        Self::arm(memory, self.line) != Some(*self)
    }
}

/// Registers that stay in the processor across entries and exits.
#[derive(Clone, Debug, Default)]
#[repr(C)]
pub struct GuestRegs {
    /// RAX … R15 in encoding order. RSP's slot is not used: the VMCS holds RSP.
    pub gpr: [u64; 16],
    /// CR2.
    pub cr2: u64,
    /// CR8 (the task priority, bits 3:0) where no TPR shadow is in use.
    pub cr8: u64,
    /// DR0–DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// XCR0.
    pub xcr0: u64,
    /// Address-range monitoring, while it is armed. VM entries and exits clear it (SDM Vol. 3C §27.5, §28.5.6): L0 does,
    /// where they are L1's.
    pub monitor: Option<Monitor>,
    /// MSRs.
    pub msrs: Msrs,
    /// x87 and vector state.
    pub fpu: Box<FpuState>,
    /// Performance counters; an engine without them leaves this alone.
    pub pmu: Box<Pmu>,
}

impl GuestRegs {
    /// Registers after RESET (SDM Vol. 3A table 9-1), RDX excepted, which the platform sets.
    pub fn reset() -> Self {
        Self { dr6: x86_spec::reg::dr::DR6_FIXED1, xcr0: x86_spec::reg::xcr0::X87, ..Self::default() }
    }
}
