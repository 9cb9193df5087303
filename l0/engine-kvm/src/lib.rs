//! Direct execution through `/dev/kvm`, from userspace only.
//!
//! The same seam as the software engine: a context described by a VMCS runs until it exits. KVM is
//! told what the VMCS says in its own terms: EPT01 becomes memory slots ([`slots`]), the MSR bitmap
//! an MSR filter, the preemption timer a POSIX timer, a kick a signal ([`kick`]), an injected event
//! KVM's vCPU events ([`state`]). The local APIC is L0's, or KVM's ([`apics`]) where the guest is no hypervisor.
//! [`KvmEngine::serving_vmx`] makes an engine whose guests can be hypervisors on KVM's own VMX ([`host_vmx`]).
//!
//! Which exits exist is in [`capabilities`]. Contexts that need others (every L2) can't run here.
//! CPUID is answered by KVM from the table of [`engine::Vcpu::set_cpuid`].
//!
//! Not supported: x87, vector and XCR0 state is loaded by nobody and shown to nobody (KVM has it, from
//! RESET on); debug registers and MSRs of the context are loaded when L0 changes them, but shown only
//! after a triple fault; pending debug exceptions and activity states other than active; software
//! events injected by L0 with an instruction length; debug exceptions of single steps over an instruction that
//! L0 completes.

mod apics;
mod capabilities;
pub mod device;
mod fpu;
mod host_vmx;
mod hybrid;
mod kick;
mod probe;
mod slots;
mod state;
pub mod tiny;
pub mod traps;
mod vcpu;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine::{Engine, EngineError, InvalidateScope, LocalApics};
use kvm_bindings::{
    CpuId, KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_MAX_CPUID_ENTRIES, KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN, KVM_X86_QUIRK_FIX_HYPERCALL_INSN, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use memory::{MachineAddr, MachineMemory};
use x86_spec::caps::VmxCapabilities;

pub use hybrid::{HybridEngine, HybridVcpu, NotForKvm, can_run};
pub use probe::{Flaw, Probe, probe};
use slots::Slot;
pub use vcpu::KvmVcpu;

/// Where KVM may put three pages of its own (for real mode on processors without "unrestricted
/// guest"): in the hole below 4 GiB, where no device is.
const TSS_AT: usize = 0xfffb_d000;
/// And one more, the page before.
const IDENTITY_MAP_AT: u64 = 0xfffb_c000;

/// Turns an error of a KVM call into ours.
fn host(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> EngineError {
    move |e| EngineError::Host { call, source: io::Error::from_raw_os_error(e.errno()) }
}

fn unsupported(reason: impl Into<String>) -> EngineError {
    EngineError::Unsupported { engine: "kvm", reason: reason.into() }
}

/// Enables `bits` of a capability whose answer to "is it there" is the bits that it has.
fn enable_bits(vm: &VmFd, cap: u32, bits: u64) {
    let offered = vm.check_extension_raw(cap.into());
    if offered < 0 || offered as u64 & bits == 0 {
        return;
    }
    let mut enable = kvm_enable_cap { cap, ..Default::default() };
    enable.args[0] = bits;
    if let Err(e) = vm.enable_cap(&enable) {
        tracing::debug!("KVM_ENABLE_CAP({cap}) failed: {e}");
    }
}

/// What of the VMCS's structures in memory KVM has been told.
#[derive(Debug, Default)]
struct Realised {
    eptp: Option<u64>,
    slots: Vec<Slot>,
    msr_bitmap: Option<MachineAddr>,
}

/// What the engine and its vCPUs share.
struct Shared {
    vm: VmFd,
    memory: Arc<MachineMemory>,
    realised: Mutex<Realised>,
    /// KVM has the local APICs.
    has_apics: bool,
    /// KVM has XCR0.
    has_xcrs: bool,
    /// Where the upper halves of YMM registers are in an XSAVE area, if there are any.
    ymm_offset: Option<usize>,
    /// KVM serves VMX to the guest.
    host_vmx: bool,
    /// KVM tells pending exceptions from others.
    pending_exceptions: bool,
    /// How many vCPUs were made: the number of the next.
    vcpus: Mutex<u64>,
}

impl Shared {
    fn realised(&self) -> MutexGuard<'_, Realised> {
        self.realised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Machine address of a guest-physical one.
    fn machine(&self, gpa: u64) -> Option<MachineAddr> {
        let realised = self.realised();
        let slot = realised.slots.iter().find(|s| gpa >= s.gpa && gpa - s.gpa < s.len)?;
        Some(MachineAddr(slot.machine + (gpa - slot.gpa)))
    }

    /// Makes KVM's memory slots and MSR filter those that a context with this EPT pointer and MSR
    /// bitmap has. All vCPUs of a machine run with the same.
    fn realise(&self, eptp: u64, msr_bitmap: MachineAddr) -> Result<(), EngineError> {
        let mut r = self.realised();
        if r.eptp != Some(eptp) {
            let new = slots::slots(&self.memory, eptp)?;
            if new != r.slots {
                self.set_slots(&mut r.slots, &new)?;
            }
            r.eptp = Some(eptp);
        }
        if r.msr_bitmap != Some(msr_bitmap) {
            self.set_msr_filter(msr_bitmap)?;
            r.msr_bitmap = Some(msr_bitmap);
        }
        Ok(())
    }

    /// Has KVM not replace VMCALL and VMMCALL in the guest's code, for a guest that uses VMX: there they are L0's. Any
    /// other guest's are KVM's, as on a KVM without L0. Older kernels always replace them.
    fn keep_hypercall_code(&self) {
        enable_bits(&self.vm, KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_FIX_HYPERCALL_INSN.into());
    }

    fn set_slots(&self, old: &mut Vec<Slot>, new: &[Slot]) -> Result<(), EngineError> {
        while let Some(slot) = old.pop() {
            // A slot of size 0 deletes.
            self.set_slot(old.len(), &Slot { len: 0, ..slot })?;
        }
        for slot in new {
            self.set_slot(old.len(), slot)?;
            old.push(*slot);
        }
        Ok(())
    }

    fn set_slot(&self, number: usize, slot: &Slot) -> Result<(), EngineError> {
        let at = self
            .memory
            .host_ptr(MachineAddr(slot.machine), slot.len as usize)
            .map_err(|e| unsupported(e.to_string()))?;
        let region = kvm_userspace_memory_region {
            slot: number as u32,
            flags: 0,
            guest_phys_addr: slot.gpa,
            memory_size: slot.len,
            userspace_addr: at as u64,
        };
        // SAFETY: the range lies in machine memory, which `self` keeps mapped as long as the VM
        // exists and which no Rust reference points into.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(host("KVM_SET_USER_MEMORY_REGION"))
    }

    /// The MSR bitmap (SDM Vol. 3C §25.6.9) as a filter: what exits there is not allowed here. MSRs
    /// that no bitmap covers always exit.
    fn set_msr_filter(&self, bitmap: MachineAddr) -> Result<(), EngineError> {
        let mut allowed = [0u8; 4096];
        self.memory.read(bitmap, &mut allowed).map_err(|e| unsupported(e.to_string()))?;
        for byte in &mut allowed {
            *byte = !*byte;
        }
        if self.has_apics {
            apics::allow_msrs(&mut allowed);
        }
        let (read, write) = (MsrFilterRangeFlags::READ, MsrFilterRangeFlags::WRITE);
        let quarters = [(read, 0), (read, 0xc000_0000), (write, 0), (write, 0xc000_0000)];
        let ranges: Vec<_> = allowed
            .chunks_exact(1024)
            .zip(quarters)
            .map(|(bitmap, (flags, base))| MsrFilterRange { flags, base, msr_count: 8192, bitmap })
            .collect();
        self.vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges).map_err(host("KVM_X86_SET_MSR_FILTER"))
    }
}

/// The engine.
pub struct KvmEngine {
    shared: Arc<Shared>,
    capabilities: VmxCapabilities,
    cpuid: CpuId,
    tsc_frequency: u64,
}

impl KvmEngine {
    /// An engine over `memory`: opens `/dev/kvm` and makes a virtual machine.
    ///
    /// # Errors
    /// [`EngineError`] when there is no `/dev/kvm`, it can't be opened, or lacks what is
    /// needed; it says what.
    pub fn new(memory: Arc<MachineMemory>) -> Result<Self, EngineError> {
        Self::without_what_fails(Self::open(memory)?)
    }

    /// As [`Self::new`]; KVM executes the guest's VMX instructions, once L0 shows it VMX in CPUID.
    ///
    /// # Errors
    /// As [`Self::new`], and when this host's KVM has no VMX for its guests.
    pub fn serving_vmx(memory: Arc<MachineMemory>) -> Result<Self, EngineError> {
        let kvm = device::open()?;
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(host("KVM_GET_SUPPORTED_CPUID"))?;
        host_vmx::check(&kvm, |leaf, bits| {
            cpuid.as_slice().iter().any(|e| e.function == leaf && e.ecx & bits != 0)
        })?;
        Self::without_what_fails(Self::open_with(memory, true)?)
    }

    fn without_what_fails(mut engine: Self) -> Result<Self, EngineError> {
        if !probe::runs_cmpxchg16b()? {
            probe::withhold_cmpxchg16b(&mut engine.cpuid);
        }
        Ok(engine)
    }

    /// The engine with all features that KVM claims.
    fn open(memory: Arc<MachineMemory>) -> Result<Self, EngineError> {
        Self::open_with(memory, false)
    }

    fn open_with(memory: Arc<MachineMemory>, host_vmx: bool) -> Result<Self, EngineError> {
        kick::install_handler()
            .map_err(|source| EngineError::Host { call: "installing a signal handler", source })?;
        let kvm = device::open()?;
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(host("KVM_GET_SUPPORTED_CPUID"))?;
        let vm = kvm.create_vm().map_err(host("KVM_CREATE_VM"))?;
        if kvm.check_extension(Cap::SetIdentityMapAddr) {
            vm.set_identity_map_address(IDENTITY_MAP_AT).map_err(host("KVM_SET_IDENTITY_MAP_ADDR"))?;
        }
        if kvm.check_extension(Cap::SetTssAddr) {
            vm.set_tss_address(TSS_AT).map_err(host("KVM_SET_TSS_ADDR"))?;
        }
        // Unknown MSRs come too: those of the x2APIC are unknown to a KVM without a local APIC, and a
        // filter does not apply to them.
        let reasons = KVM_MSR_EXIT_REASON_FILTER | KVM_MSR_EXIT_REASON_INVAL | KVM_MSR_EXIT_REASON_UNKNOWN;
        let mut enable = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
        enable.args[0] = reasons.into();
        vm.enable_cap(&enable).map_err(host("KVM_ENABLE_CAP(KVM_CAP_X86_USER_SPACE_MSR)"))?;
        // Older kernels lack it; there a failed emulation may show a #UD that is not the guest's.
        enable_bits(&vm, KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1);
        if host_vmx {
            host_vmx::split_irqchip(&vm)?;
        }
        let pending_exceptions = host_vmx && host_vmx::tell_pending_exceptions(&vm);
        let tsc_frequency = Self::host_tsc_frequency(&kvm)?;
        let shared = Shared {
            vm,
            memory,
            realised: Mutex::default(),
            has_apics: false,
            has_xcrs: kvm.check_extension(Cap::Xcrs),
            ymm_offset: fpu::ymm_offset(cpuid.as_slice()),
            host_vmx,
            pending_exceptions,
            vcpus: Mutex::new(0),
        };
        Ok(Self {
            shared: Arc::new(shared),
            capabilities: capabilities::capabilities(),
            cpuid,
            tsc_frequency,
        })
    }

    /// The frequency that KVM gives a new vCPU's TSC, which is the host's. Only a vCPU can be
    /// asked: one in a virtual machine that exists just for this.
    fn host_tsc_frequency(kvm: &Kvm) -> Result<u64, EngineError> {
        let vm = kvm.create_vm().map_err(host("KVM_CREATE_VM"))?;
        let vcpu = vm.create_vcpu(0).map_err(host("KVM_CREATE_VCPU"))?;
        let khz = vcpu.get_tsc_khz().map_err(host("KVM_GET_TSC_KHZ"))?;
        if khz == 0 {
            return Err(unsupported("KVM does not know the TSC's frequency"));
        }
        Ok(u64::from(khz) * 1000)
    }
}

impl Engine for KvmEngine {
    type Vcpu = KvmVcpu;

    fn capabilities(&self) -> &VmxCapabilities {
        &self.capabilities
    }

    fn supported_features(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let entry = self.cpuid.as_slice().iter().find(|e| (e.function, e.index) == (leaf, subleaf));
        let Some(e) = entry else { return [0; 4] };
        let [a, b, c, d] = capabilities::feature_mask(leaf, subleaf);
        [e.eax & a, e.ebx & b, e.ecx & c, e.edx & d]
    }

    fn tsc_frequency(&self) -> u64 {
        self.tsc_frequency
    }

    fn tsc(&self) -> u64 {
        host_tsc()
    }

    fn local_apics(&self) -> Option<Arc<dyn LocalApics>> {
        self.shared.has_apics.then(|| self.shared.clone() as Arc<dyn LocalApics>)
    }

    fn create_vcpu(&self) -> Result<KvmVcpu, EngineError> {
        KvmVcpu::new(self.shared.clone(), self.tsc_frequency)
    }

    fn serves_vmx(&self) -> bool {
        self.shared.host_vmx
    }

    /// KVM keeps its own translations right, but is told of ranges, not of tables: they are read
    /// again before the next entry.
    fn invalidate(&self, scope: InvalidateScope) {
        if matches!(scope, InvalidateScope::All | InvalidateScope::Eptp(_) | InvalidateScope::Machine { .. })
        {
            self.shared.realised().eptp = None;
        }
    }
}

/// The host's TSC, which KVM's guests see plus an offset.
fn host_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor; Linux does not disable it for user mode.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests;
