//! VMX for L1: what joins `vmx-emu` and `ept-compress` to the vCPU loop.
//!
//! L1's VMX instructions exit to [`root`]; a VM entry of L1 starts VMCS02, whose exits go to L0 or
//! L1.

mod direct;
mod guest;
pub(crate) mod l1;
mod msrs;
#[cfg(test)]
mod random_entries;
mod root;
mod shadow;
mod sync;
mod view;

use engine::{Engine, EngineVmcs};
use ept_compress::{Ept02, Ept02Error, Format};
use memory::{L1Gpa, MemoryError};
use vmx_emu::merge::Pages;
use vmx_emu::merge::bitmaps::MsrBitmaps;
use vmx_emu::merge::provenance::ControlOrigins;
use vmx_emu::merge::tsc::Timer12;
use vmx_emu::merge::vpid::VpidMap;
use vmx_emu::{Capabilities, FeatureControl, L1Cpu, VmxState, evmcs};
use x86_spec::controls::{PinbasedControls, SecondaryControls};
use x86_spec::msr;

use crate::cpuid::PHYSICAL_BITS;
use crate::hyperv::HyperV;
use crate::vm::Vm;

pub(crate) use root::vmx_instruction;
use shadow::ShadowPage;
pub use shadow::VmcsAccess;
pub use sync::EptSync;

/// The fewest pages that an EPT02 can have. All that one instruction touches must be mapped at
/// once, or L2 never gets past it: code, operands, stack and descriptor tables that cross
/// pages, each with its paging structures, are some 60 pages, and each may need three tables of its own.
pub const MIN_EPT02_PAGES: u64 = 256;
/// The most: 4 GiB of tables, which map 2 TiB in pages of 4 KiB.
pub const MAX_EPT02_PAGES: u64 = 1 << 20;

/// The composed tables of L1's guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ept02Config {
    /// Pages of L0's memory that they may take, for each vCPU: [`MIN_EPT02_PAGES`] to
    /// [`MAX_EPT02_PAGES`].
    pub pages: u64,
    /// How they follow EPT12.
    pub sync: EptSync,
}

impl Default for Ept02Config {
    /// 8 MiB of tables, which map 4 GiB in pages of 4 KiB.
    fn default() -> Self {
        Self { pages: 2048, sync: EptSync::Invept }
    }
}

/// Why nesting can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum NestedError {
    /// EPT02.
    #[error(transparent)]
    Ept02(#[from] Ept02Error),
    /// L0's pool.
    #[error(transparent)]
    Pool(#[from] MemoryError),
}

/// What one vCPU has for L1's VMX.
#[derive(Debug)]
pub(crate) struct Nested {
    /// What L1 is offered.
    pub caps: Capabilities,
    /// VMX operation and the current VMCS.
    pub state: VmxState,
    /// VMCS01 while L2 runs; else what is left of VMCS02.
    vmcs01: Box<EngineVmcs>,
    ept02: Ept02,
    sync: EptSync,
    vpids: VpidMap,
    pages: Pages,
    msr_bitmaps: MsrBitmaps,
    /// L1's VMX-preemption timer.
    timer12: Option<Timer12>,
    /// Its rate (IA32_VMX_MISC bits 4:0).
    rate: u8,
    /// The APIC-access page of VMCS12, if it is not RAM.
    apic_access_elsewhere: Option<L1Gpa>,
    /// The entry injected a pending MTF exit.
    mtf_injected: bool,
    /// The page that L1 reads and writes its current VMCS in without exits, where it does.
    shadow: Option<ShadowPage>,
    /// Hyper-V's interface, where L1 accesses its VMCS directly.
    pub hyperv: Option<HyperV>,
    /// Where the control bits of VMCS02 come from.
    origins: Option<ControlOrigins>,
}

impl Nested {
    /// VMX as the engine allows it, for vCPU `index` of an L1 that may set `cr4`.
    ///
    /// # Errors
    /// [`NestedError`] when L0's pool is too small.
    pub fn new<E: Engine>(
        vm: &Vm<E>,
        index: usize,
        cr4: u64,
        access: VmcsAccess,
    ) -> Result<Self, NestedError> {
        let engine = vm.engine().capabilities();
        let model = vm.cpuid();
        let (withheld_pin, withheld) = if model.has_hyperv() {
            evmcs::without_place()
        } else {
            (PinbasedControls::empty(), SecondaryControls::empty())
        };
        let cpu = L1Cpu { cr4, physical_bits: PHYSICAL_BITS, withheld_pin, withheld };
        let caps = Capabilities::new(engine, &cpu);
        let format = Format::from_capabilities(engine.ept_vpid, PHYSICAL_BITS);
        let pool = vm.pool();
        let can_shadow = engine.has_secondary(SecondaryControls::VMCS_SHADOWING);
        let shadow = (access == VmcsAccess::Shadow && can_shadow)
            .then(|| ShadowPage::new(vm.memory(), pool, &caps))
            .transpose()?;
        let hz = vm.engine().tsc_frequency().max(1);
        let hyperv = model.has_hyperv().then(|| HyperV::new(index as u32, hz, model.crystal().hz.into()));
        let Ept02Config { pages, sync } = vm.ept02_config();
        let protect = sync == EptSync::WriteProtect;
        Ok(Self {
            hyperv,
            shadow,
            rate: (caps.misc & 0x1f) as u8,
            caps,
            state: VmxState::new(FeatureControl::ENABLED),
            vmcs01: Box::default(),
            ept02: Ept02::new(vm.memory().clone(), pool.clone(), pages, format, protect)?,
            sync,
            vpids: VpidMap::default(),
            msr_bitmaps: MsrBitmaps::default(),
            pages: Pages {
                io_bitmap_a: pool.alloc()?,
                io_bitmap_b: pool.alloc()?,
                msr_bitmap: pool.alloc()?,
                nowhere: pool.alloc()?,
            },
            timer12: None,
            apic_access_elsewhere: None,
            mtf_injected: false,
            origins: None,
        })
    }

    /// RDMSR of a VMX MSR; `None` for others and for those that do not exist.
    pub fn read_msr(&self, number: u32) -> Option<u64> {
        match number {
            msr::IA32_FEATURE_CONTROL => Some(self.state.feature_control.read()),
            msr::IA32_VMX_BASIC..=msr::IA32_VMX_VMFUNC => self.caps.msr(number),
            _ => None,
        }
    }

    /// WRMSR of IA32_FEATURE_CONTROL; `None` for other MSRs (the capability MSRs can't be written).
    pub fn write_msr(&mut self, number: u32, value: u64) -> Option<Result<(), devices::GpFault>> {
        (number == msr::IA32_FEATURE_CONTROL)
            .then(|| self.state.feature_control.write(value).map_err(|_| devices::GpFault))
    }
}

/// Whether an engine can do what nesting needs: without EPT and VPIDs L2 can't be run.
pub fn is_possible<E: Engine>(engine: &E) -> bool {
    engine.capabilities().has_secondary(SecondaryControls::ENABLE_EPT | SecondaryControls::ENABLE_VPID)
}
