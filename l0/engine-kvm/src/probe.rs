//! What this host's KVM does, found out by running two tiny guests.
//!
//! A KVM without hardware virtualization emulates its guests' kernel code and runs their user code as it is. One such
//! KVM (PVM) executes under two million kernel instructions a second, lacks instructions that
//! KVM_GET_SUPPORTED_CPUID promises, enters the kernel with the user's CS and SS at SYSCALL, and lets user code
//! see the host's CPUID and TSC. None of this can be intercepted from userspace, so that guests are not run by such a
//! KVM at all.

use std::sync::Arc;

use engine::{Engine, EngineError, EngineVmcs, GuestRegs, Segment, Vcpu, VmExit};
use kvm_bindings::CpuId;
use memory::{MachineAddr, MachineMemory};
use x86_spec::ept;
use x86_spec::exit::ExitReason;
use x86_spec::reg::{cr0, cr4, efer, gpr};
use x86_spec::segment::{AccessRights, seg};

use crate::{KvmEngine, KvmVcpu, unsupported};

/// What [`probe`] finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Frequency of guests' TSC in Hz.
    pub tsc_hz: u64,
    /// What this KVM gets wrong. If there is anything, it is not used to run guests.
    pub flaws: Vec<Flaw>,
}

/// What a KVM gets wrong, and its userspace can't put right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// Kernel code of guests does not run on the processor.
    #[error("it emulates guests' kernel code, slowly and not completely")]
    KernelCode,
    /// SYSCALL leads elsewhere than the SDM says, or with other segments (Vol. 2B, SYSCALL).
    #[error("a guest's SYSCALL does not enter its kernel as it should")]
    Syscall,
    /// CPUID at privilege level 3 is not answered from the table that userspace gave.
    #[error("user code sees CPU features that the guest was not offered")]
    Cpuid,
    /// RDTSC at privilege level 3 does not add the TSC offset.
    #[error("user code reads the host's TSC")]
    Tsc,
}

/// Whether this host's `/dev/kvm` runs guests, and how well.
///
/// # Errors
/// [`EngineError`] says why not.
pub fn probe() -> Result<Probe, EngineError> {
    let tsc_hz = machine()?.1.tsc_frequency();
    Ok(Probe { tsc_hz, flaws: flaws()? })
}

/// What this KVM gets wrong.
pub(crate) fn flaws() -> Result<Vec<Flaw>, EngineError> {
    let kernel = (!runs_cmpxchg16b()?).then_some(Flaw::KernelCode);
    Ok(kernel.into_iter().chain(flaws_of_user_code()?).collect())
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
/// Where SYSCALL leads, in the second large page.
const KERNEL: u64 = (2 << 20) + 0x2000;
/// Guest paging: PML4, PDPT, page directory with two large pages, for user code and for the kernel alone. Both are the
/// first 2 MiB.
const PAGING: u64 = 0x10_0000;
/// EPT with one large page, and a page of ones as MSR bitmap.
const TABLES: u64 = 2 << 20;
const MSR_BITMAP: u64 = TABLES + 0x3000;
const CS: u16 = 0x10;
const HLT: u8 = 0xf4;
/// Far above any TSC that counts from the start of a host.
const TSC_OFFSET: u64 = 1 << 60;

/// `lock cmpxchg16b [rsi]; hlt`.
const KERNEL_PROGRAM: [u8; 6] = [0xf0, 0x48, 0x0f, 0xc7, 0x0e, HLT];

/// `mov eax, 7; xor ecx, ecx; cpuid; mov esi, ebx; rdtsc; shl rdx, 32; or rdx, rax; syscall`.
const USER_PROGRAM: [u8; 22] = [
    0xb8, 7, 0, 0, 0, 0x31, 0xc9, 0x0f, 0xa2, 0x89, 0xde, 0x0f, 0x31, 0x48, 0xc1, 0xe2, 0x20, 0x48, 0x09,
    0xc2, 0x0f, 0x05,
];

/// Memory with paging structures and EPT, and an engine over it.
fn machine() -> Result<(Arc<MachineMemory>, KvmEngine), EngineError> {
    let failed = |e: memory::MemoryError| unsupported(e.to_string());
    let memory = Arc::new(MachineMemory::new(MEMORY).map_err(failed)?);
    let (large, user) = (1 << 7, 1 << 2);
    for (at, value) in [
        (TABLES, (TABLES + 0x1000) | ept::RWX),
        (TABLES + 0x1000, (TABLES + 0x2000) | ept::RWX),
        (TABLES + 0x2000, ept::RWX | ept::LARGE | ept::MEMTYPE_WB << ept::MEMTYPE_SHIFT),
        (PAGING, (PAGING + 0x1000) | user | 3),
        (PAGING + 0x1000, (PAGING + 0x2000) | user | 3),
        (PAGING + 0x2000, large | user | 3),
        (PAGING + 0x2008, large | 3),
    ] {
        memory.write_u64(MachineAddr(at), value).map_err(failed)?;
    }
    memory.fill(MachineAddr(MSR_BITMAP), 0xff, 4096).map_err(failed)?;
    let engine = KvmEngine::open(memory.clone())?;
    Ok((memory, engine))
}

/// How long a guest that KVM is tried with may take, in seconds.
const PATIENCE_S: u64 = 20;

/// Runs `code` in 64-bit mode, at privilege level 3 if `user`, until it exits.
fn run(
    code: &[u8],
    user: bool,
    cpuid: impl FnOnce(&mut CpuId),
) -> Result<(VmExit, EngineVmcs, GuestRegs), EngineError> {
    let (memory, mut engine) = machine()?;
    let failed = |e: memory::MemoryError| unsupported(e.to_string());
    memory.write(MachineAddr(CODE), code).map_err(failed)?;
    memory.write(MachineAddr(KERNEL & 0xffff), &[HLT]).map_err(failed)?;
    let mut vmcs = EngineVmcs::default();
    vmcs.controls.eptp = ept::eptp(TABLES, false);
    vmcs.controls.msr_bitmap = MachineAddr(MSR_BITMAP);
    vmcs.controls.tsc_offset = TSC_OFFSET;
    let g = &mut vmcs.guest;
    // For a guest that never ends; on a busy host inside of another guest, a few instructions can take a second.
    g.preemption_timer = u32::try_from((PATIENCE_S * engine.tsc_frequency()) >> 5).unwrap_or(u32::MAX - 1);
    (g.cr0, g.cr3, g.cr4) = (cr0::PE | cr0::PG | cr0::ET | cr0::NE, PAGING, cr4::PAE);
    g.efer = efer::LME | efer::LMA | efer::SCE;
    let (dpl, rpl) = if user { (3 << 5, 3) } else { (0, 0) };
    let data = Segment { base: 0, limit: u32::MAX, access: AccessRights(0xc093 | dpl), selector: 0x28 | rpl };
    for i in [seg::DS, seg::ES, seg::SS, seg::FS, seg::GS] {
        g.segments[i] = data;
    }
    g.segments[seg::CS] = Segment { access: AccessRights(0xa09b | dpl), selector: 0x30 | rpl, ..data };
    (g.rip, g.rsp) = (CODE, 0x800);
    let mut regs = GuestRegs::reset();
    regs.gpr[gpr::RSI] = 0x2800;
    (regs.msrs.star, regs.msrs.lstar) = (u64::from(CS) << 32, KERNEL);
    let mut vcpu: KvmVcpu = engine.create_vcpu()?;
    cpuid(&mut engine.cpuid);
    vcpu.set_features(&engine.cpuid)?;
    vcpu.show_all_at_exits();
    let exit = vcpu.enter(&mut vmcs, &mut regs);
    if exit.reason != ExitReason::Hlt {
        let why = vcpu.failure().unwrap_or(exit.reason.name());
        tracing::debug!("a guest that KVM was tried with ended with: {why}");
    }
    Ok((exit, vmcs, regs))
}

/// Whether a 64-bit guest can execute CMPXCHG16B at CPL 0.
pub(crate) fn runs_cmpxchg16b() -> Result<bool, EngineError> {
    Ok(run(&KERNEL_PROGRAM, false, |_| ())?.0.reason == ExitReason::Hlt)
}

/// What user code is told by CPUID and RDTSC, and how it enters the kernel.
fn flaws_of_user_code() -> Result<Vec<Flaw>, EngineError> {
    // No features in leaf 7.
    let hide = |cpuid: &mut CpuId| {
        cpuid.as_mut_slice().iter_mut().filter(|e| e.function == 7).for_each(|e| e.ebx = 0);
    };
    let (exit, vmcs, regs) = run(&USER_PROGRAM, true, hide)?;
    let g = &vmcs.guest;
    let [cs, ss] = [seg::CS, seg::SS].map(|i| g.segments[i]);
    let entered = exit.reason == ExitReason::Hlt
        && g.rip == KERNEL
        && (cs.selector, ss.selector) == (CS, CS + 8)
        && (cs.access.dpl(), ss.access.dpl()) == (0, 0);
    let found = [
        (!entered, Flaw::Syscall),
        (regs.gpr[gpr::RSI] as u32 != 0, Flaw::Cpuid),
        (regs.gpr[gpr::RDX] < TSC_OFFSET, Flaw::Tsc),
    ];
    Ok(found.into_iter().filter(|(wrong, _)| *wrong).map(|(_, flaw)| flaw).collect())
}
