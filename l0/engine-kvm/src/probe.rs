//! What this host's KVM does, found out by running a tiny guest.
//!
//! A KVM without hardware virtualization emulates its guests' kernel code, and its emulator lacks
//! instructions that KVM_GET_SUPPORTED_CPUID promises all the same. CMPXCHG16B is the one that Linux
//! relies on when CPUID has it (its memory allocator does), and can do without.

use std::sync::Arc;

use engine::{Engine, EngineError, EngineVmcs, GuestRegs, Segment, Vcpu};
use kvm_bindings::CpuId;
use memory::{MachineAddr, MachineMemory};
use x86_spec::ept;
use x86_spec::exit::ExitReason;
use x86_spec::reg::{cr0, cr4, efer, gpr};
use x86_spec::segment::{AccessRights, seg};

use crate::{KvmEngine, unsupported};

/// What [`probe`] finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Frequency of guests' TSC in Hz.
    pub tsc_hz: u64,
    /// Kernel code of guests runs on the processor. Otherwise KVM emulates it, slowly and not
    /// completely.
    pub kernel_code: bool,
}

/// Whether this host's `/dev/kvm` runs guests.
///
/// # Errors
/// [`EngineError`] says why not.
pub fn probe() -> Result<Probe, EngineError> {
    let memory = Arc::new(MachineMemory::new(MEMORY).map_err(|e| unsupported(e.to_string()))?);
    let engine = KvmEngine::open(memory)?;
    Ok(Probe { tsc_hz: engine.tsc_frequency(), kernel_code: runs_cmpxchg16b()? })
}

/// 01H:ECX bit 13 (SDM Vol. 2A, CPUID).
const CMPXCHG16B: u32 = 1 << 13;

/// Takes CMPXCHG16B out of what guests are shown.
pub(crate) fn withhold_cmpxchg16b(cpuid: &mut CpuId) {
    for entry in cpuid.as_mut_slice().iter_mut().filter(|e| e.function == 1) {
        entry.ecx &= !CMPXCHG16B;
    }
}

const MEMORY: u64 = 3 << 20;
const CODE: u64 = 0x1000;
/// Guest paging: PML4, PDPT, page directory with one large page.
const PAGING: u64 = 0x10_0000;
/// EPT with one large page, and a page of ones as MSR bitmap.
const TABLES: u64 = 2 << 20;
const MSR_BITMAP: u64 = TABLES + 0x3000;
/// `lock cmpxchg16b [rsi]; hlt`.
const PROGRAM: [u8; 6] = [0xf0, 0x48, 0x0f, 0xc7, 0x0e, 0xf4];

/// Whether a 64-bit guest can execute CMPXCHG16B at CPL 0.
pub(crate) fn runs_cmpxchg16b() -> Result<bool, EngineError> {
    let failed = |e: memory::MemoryError| unsupported(e.to_string());
    let memory = Arc::new(MachineMemory::new(MEMORY).map_err(failed)?);
    let large = 1 << 7 | 3;
    for (at, value) in [
        (TABLES, (TABLES + 0x1000) | ept::RWX),
        (TABLES + 0x1000, (TABLES + 0x2000) | ept::RWX),
        (TABLES + 0x2000, ept::RWX | ept::LARGE | ept::MEMTYPE_WB << ept::MEMTYPE_SHIFT),
        (PAGING, (PAGING + 0x1000) | 3),
        (PAGING + 0x1000, (PAGING + 0x2000) | 3),
        (PAGING + 0x2000, large),
    ] {
        memory.write_u64(MachineAddr(at), value).map_err(failed)?;
    }
    memory.fill(MachineAddr(MSR_BITMAP), 0xff, 4096).map_err(failed)?;
    memory.write(MachineAddr(CODE), &PROGRAM).map_err(failed)?;
    let engine = KvmEngine::open(memory)?;
    let mut vmcs = EngineVmcs::default();
    vmcs.controls.eptp = ept::eptp(TABLES, false);
    vmcs.controls.msr_bitmap = MachineAddr(MSR_BITMAP);
    let g = &mut vmcs.guest;
    // One second, should anything go wrong.
    g.preemption_timer = u32::try_from(engine.tsc_frequency() >> 5).unwrap_or(u32::MAX - 1);
    (g.cr0, g.cr3, g.cr4) = (cr0::PE | cr0::PG | cr0::ET | cr0::NE, PAGING, cr4::PAE);
    g.efer = efer::LME | efer::LMA;
    let data = Segment { base: 0, limit: u32::MAX, access: AccessRights(0xc093), selector: 16 };
    for i in [seg::DS, seg::ES, seg::SS, seg::FS, seg::GS] {
        g.segments[i] = data;
    }
    g.segments[seg::CS] = Segment { access: AccessRights(0xa09b), selector: 8, ..data };
    (g.rip, g.rsp) = (CODE, 0x800);
    let mut regs = GuestRegs::reset();
    regs.gpr[gpr::RSI] = 0x2000;
    let mut vcpu = engine.create_vcpu()?;
    vcpu.set_features(&engine.cpuid)?;
    let exit = vcpu.enter(&mut vmcs, &mut regs);
    if exit.reason != ExitReason::Hlt {
        let why = vcpu.failure().unwrap_or(exit.reason.name());
        tracing::debug!("CMPXCHG16B in a guest's kernel: {why}");
    }
    Ok(exit.reason == ExitReason::Hlt)
}
