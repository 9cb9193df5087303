//! One vCPU: from VM entry to VM exit by `KVM_RUN`.
//!
//! KVM finishes some instructions only when it is entered again: port and device-memory accesses, RDMSR
//! and WRMSR. Accesses stay open until [`Vcpu::emulate`], which answers them; their exits have
//! instruction length 0, as KVM does not tell it. The next run finishes them on its way into the guest, so
//! that an access costs one `KVM_RUN`; whoever needs the state after the instruction before that asks with
//! [`Vcpu::settle`]. MSR accesses are finished at once, with an outcome that
//! changes nothing but RIP, and L0 is shown the state before the instruction together with the length that RIP
//! moved by; whatever L0 then makes of it differs from KVM's state and is loaded at the next entry.

use std::fmt;
use std::sync::Arc;

use engine::{
    CpuidEntry, EngineError, EngineVmcs, EventWindows, ExitBus, GuestRegs, Kick, LinearFault, Vcpu, VmExit,
    interruptibility,
};
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT,
    KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_IOAPIC_EOI, KVM_EXIT_IRQ_WINDOW_OPEN,
    KVM_EXIT_MMIO, KVM_EXIT_SET_TPR, KVM_EXIT_SHUTDOWN, KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR,
    KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, KVM_SYNC_X86_VALID_FIELDS, KVM_VCPU_TSC_CTRL,
    KVM_VCPU_TSC_OFFSET, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_device_attr, kvm_guest_debug,
    kvm_msr_entry, kvm_run, kvm_sregs, kvm_xcrs,
};
use kvm_ioctls::{Cap, SyncReg, VcpuFd};
use memory::{Gpa, MachineAddr};
use x86_spec::controls::PrimaryControls;
use x86_spec::exit::{ExitReason, ept_violation, io};
use x86_spec::interruption::{EventType, InterruptionInfo};
use x86_spec::msr;
use x86_spec::reg::{cr0, cr4, efer, gpr};

use crate::capabilities::PREEMPTION_TIMER_SHIFT;
use crate::kick::{Armed, KickState, Timer};
use crate::state::{Dirty, KvmState};
use crate::{Shared, apics, host, host_tsc, unsupported};
use crate::{fpu, host_vmx};

/// How often NMI blocking is looked at while an NMI waits: KVM has no NMI-window exit for userspace.
const NMI_POLLS_PER_SECOND: u64 = 1000;
/// How many accesses one instruction may make in [`Vcpu::settle`]. KVM splits long string
/// instructions itself; this only bounds a KVM that does not.
const MAX_ACCESSES: usize = 1 << 16;
/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)`, which `kvm-ioctls` has for other processors only.
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;

/// Why a run ended in a way that no VM exit describes.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("KVM_RUN failed: {0}")]
    Run(std::io::Error),
    #[error("KVM internal error {suberror} ({name}){bytes}")]
    Internal { suberror: u32, name: &'static str, bytes: Bytes },
    #[error("the processor refused KVM's VM entry: hardware reason {0:#x}")]
    Entry(u64),
    #[error("KVM exit {0}, which this engine does not know")]
    Unknown(u32),
    #[error("KVM did not finish an instruction: exit {0} where none was possible")]
    Unfinished(u32),
    /// KVM stopped at a breakpoint of [`KvmVcpu::set_breakpoints`].
    #[error("KVM stopped at a breakpoint that L0 did not set")]
    Breakpoint,
    #[error(
        "KVM can't emulate an instruction that needs its local APIC; --irqchip userspace leaves the local APIC to nestvmm"
    )]
    Apic,
    #[error("KVM waits for the answer to an access that L0 left open")]
    Open,
    #[error(
        "L0 changed state that it had not seen, or in the middle of an instruction that KVM has not finished"
    )]
    Unsettled,
}

/// Instruction bytes of a failed emulation.
#[derive(Debug)]
pub(crate) struct Bytes(Vec<u8>);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.is_empty() {
            write!(f, ", instruction bytes")?;
        }
        self.0.iter().try_for_each(|b| write!(f, " {b:02x}"))
    }
}

/// An access that KVM waits for.
#[derive(Clone, Copy, Debug)]
enum Access {
    Port { port: u16, size: u8, count: u32, read: bool, offset: u64 },
    Memory { gpa: u64, len: u32, read: bool },
}

/// State that exits do not bring: what was loaded last.
#[derive(Debug, PartialEq, Eq)]
struct Loaded {
    debug: [u64; 6],
    msrs: [u64; 12],
    tsc_offset: u64,
}

/// MSRs of the context, in the order of [`context_msrs`].
const CONTEXT_MSRS: [u32; 12] = [
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::FMASK,
    msr::KERNEL_GS_BASE,
    msr::IA32_TSC_AUX_MSR,
    msr::IA32_SPEC_CTRL,
    msr::IA32_SYSENTER_CS,
    msr::IA32_SYSENTER_ESP,
    msr::IA32_SYSENTER_EIP,
    msr::IA32_PAT,
    msr::IA32_DEBUGCTL,
];

/// Their values.
fn context_msrs(vmcs: &EngineVmcs, regs: &GuestRegs) -> [u64; 12] {
    let (g, m) = (&vmcs.guest, &regs.msrs);
    [
        m.star,
        m.lstar,
        m.cstar,
        m.fmask,
        m.kernel_gs_base,
        m.tsc_aux,
        m.spec_ctrl,
        g.sysenter_cs,
        g.sysenter_esp,
        g.sysenter_eip,
        g.pat,
        g.debugctl,
    ]
}

/// What KVM can't deliver is not shown. On Intel processors KVM (Linux 6.1 and others) answers WRMSR of
/// IA32_TSC_DEADLINE in a fast path, before its MSR filter, for a local APIC that it does not have: the
/// timer would never expire. Guests use the APIC timer's count instead.
fn with_kvm_limits(mut entry: CpuidEntry) -> CpuidEntry {
    /// 01H:ECX bit 24 (SDM Vol. 2A, CPUID).
    const TSC_DEADLINE: u32 = 1 << 24;
    if entry.leaf == 1 {
        entry.registers[2] &= !TSC_DEADLINE;
    }
    entry
}

/// Shows one of them.
fn show_msr(vmcs: &mut EngineVmcs, regs: &mut GuestRegs, index: u32, value: u64) {
    let (g, m) = (&mut vmcs.guest, &mut regs.msrs);
    let slot = match index {
        msr::STAR => &mut m.star,
        msr::LSTAR => &mut m.lstar,
        msr::CSTAR => &mut m.cstar,
        msr::FMASK => &mut m.fmask,
        msr::KERNEL_GS_BASE => &mut m.kernel_gs_base,
        msr::IA32_TSC_AUX_MSR => &mut m.tsc_aux,
        msr::IA32_SPEC_CTRL => &mut m.spec_ctrl,
        msr::IA32_SYSENTER_CS => &mut g.sysenter_cs,
        msr::IA32_SYSENTER_ESP => &mut g.sysenter_esp,
        msr::IA32_SYSENTER_EIP => &mut g.sysenter_eip,
        msr::IA32_PAT => &mut g.pat,
        msr::IA32_DEBUGCTL => &mut g.debugctl,
        _ => return,
    };
    *slot = value;
}

/// A vCPU of the KVM engine.
pub struct KvmVcpu {
    fd: VcpuFd,
    shared: Arc<Shared>,
    tsc_frequency: u64,
    /// Registers come with each exit in the run structure (`KVM_CAP_SYNC_REGS`).
    sync: bool,
    state: KvmState,
    loaded: Option<Loaded>,
    access: Option<Access>,
    /// The last access is answered, but KVM has not finished its instruction: `state` is from before.
    unfinished: bool,
    /// KVM's guest has run since `state` got the system registers.
    stale: bool,
    /// Every exit shows them.
    shows_all: bool,
    kick: Arc<KickState>,
    timer: Option<Timer>,
    /// By the TSC.
    deadline: Option<u64>,
    /// KVM takes an interrupt, as it said at the last exit.
    takes_interrupt: bool,
    failure: Option<String>,
}

impl KvmVcpu {
    pub(crate) fn new(shared: Arc<Shared>, tsc_frequency: u64) -> Result<Self, EngineError> {
        let mut created = shared.vcpus.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut fd = shared.vm.create_vcpu(*created).map_err(host("KVM_CREATE_VCPU"))?;
        *created += 1;
        drop(created);
        if shared.host_vmx {
            host_vmx::hide_lapic(&fd)?;
        }
        let fields = KVM_SYNC_X86_VALID_FIELDS as i32;
        let sync = shared.vm.check_extension_int(Cap::SyncRegs) & fields == fields;
        if sync {
            for part in [SyncReg::Register, SyncReg::VcpuEvents] {
                fd.set_sync_valid_reg(part);
            }
        }
        if shared.has_apics {
            apics::enter_virtual_wire_mode(&fd)?;
        }
        let mut state = KvmState::new(
            fd.get_regs().map_err(host("KVM_GET_REGS"))?,
            fd.get_sregs().map_err(host("KVM_GET_SREGS"))?,
            fd.get_vcpu_events().map_err(host("KVM_GET_VCPU_EVENTS"))?,
        );
        (state.keeps_events, state.pending_exceptions) = (shared.host_vmx, shared.pending_exceptions);
        Ok(Self {
            fd,
            shared,
            tsc_frequency,
            sync,
            state,
            loaded: None,
            access: None,
            unfinished: false,
            stale: false,
            shows_all: false,
            kick: Arc::default(),
            timer: None,
            deadline: None,
            takes_interrupt: false,
            failure: None,
        })
    }

    /// Shows the guest all features of `cpuid`.
    pub(crate) fn set_features(&mut self, cpuid: &CpuId) -> Result<(), EngineError> {
        self.fd.set_cpuid2(cpuid).map_err(host("KVM_SET_CPUID2"))
    }

    fn run_structure(&mut self) -> &mut kvm_run {
        self.fd.get_kvm_run()
    }

    // ---- state --------------------------------------------------------------------------

    /// Takes the state that KVM has after a run, but for the system registers: in a guest of a KVM, reading
    /// them costs as much as the rest of an exit, and few exits need them.
    fn fetch(&mut self) -> Result<(), EngineError> {
        if self.sync {
            let all = self.fd.sync_regs_mut();
            (self.state.regs, self.state.events) = (all.regs, all.events);
        } else {
            self.state.regs = self.fd.get_regs().map_err(host("KVM_GET_REGS"))?;
            self.state.events = self.fd.get_vcpu_events().map_err(host("KVM_GET_VCPU_EVENTS"))?;
        }
        self.stale = true;
        self.state.normalise();
        Ok(())
    }

    /// Takes and shows the system registers too, if KVM's guest has run since they were.
    fn show_system(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) -> Result<(), EngineError> {
        if self.stale {
            self.state.sregs = self.fd.get_sregs().map_err(host("KVM_GET_SREGS"))?;
            self.state.normalise();
            self.stale = false;
            self.state.show_system(vmcs, regs);
        }
        Ok(())
    }

    /// Whether L0 answers an exit for this reason without a look at system registers.
    fn is_light(&self, reason: Option<u32>) -> bool {
        const LIGHT: [u32; 6] = [
            KVM_EXIT_IO,
            KVM_EXIT_MMIO,
            KVM_EXIT_HLT,
            KVM_EXIT_IRQ_WINDOW_OPEN,
            KVM_EXIT_SET_TPR,
            KVM_EXIT_IOAPIC_EOI,
        ];
        !self.shows_all && reason.is_some_and(|r| LIGHT.contains(&r))
    }

    /// The guest is about to use VMX: VMCALL is its own.
    pub(crate) fn keep_hypercall_code(&self) {
        self.shared.keep_hypercall_code();
    }

    /// Has every exit show the system registers.
    pub(crate) fn show_all_at_exits(&mut self) {
        self.shows_all = true;
    }

    /// Gives KVM what L0 changed.
    fn load(&mut self, vmcs: &EngineVmcs, regs: &GuestRegs) -> Result<(), Failure> {
        let dirty = self.state.take(vmcs, regs);
        if self.unfinished && dirty != Dirty::default() || self.stale && dirty.sregs {
            return Err(Failure::Unsettled);
        }
        if self.sync {
            if dirty.regs {
                self.fd.sync_regs_mut().regs = self.state.regs;
                self.fd.set_sync_dirty_reg(SyncReg::Register);
            }
            if dirty.sregs {
                self.fd.sync_regs_mut().sregs = self.state.sregs;
                self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
            }
            if dirty.events {
                self.fd.sync_regs_mut().events = self.state.events;
                self.fd.set_sync_dirty_reg(SyncReg::VcpuEvents);
            }
        } else {
            if dirty.regs {
                self.fd.set_regs(&self.state.regs).map_err(host("KVM_SET_REGS"))?;
            }
            if dirty.sregs {
                self.fd.set_sregs(&self.state.sregs).map_err(host("KVM_SET_SREGS"))?;
            }
            if dirty.events {
                self.fd.set_vcpu_events(&self.state.events).map_err(host("KVM_SET_VCPU_EVENTS"))?;
            }
        }
        Ok(self.load_rest(vmcs, regs)?)
    }

    /// Debug registers, MSRs and the TSC offset, where they differ from what was loaded last.
    fn load_rest(&mut self, vmcs: &EngineVmcs, regs: &GuestRegs) -> Result<(), EngineError> {
        let [d0, d1, d2, d3] = regs.dr;
        let want = Loaded {
            debug: [d0, d1, d2, d3, regs.dr6, vmcs.guest.dr7],
            msrs: context_msrs(vmcs, regs),
            tsc_offset: vmcs.controls.tsc_offset,
        };
        if self.loaded.as_ref() == Some(&want) {
            return Ok(());
        }
        let old = self.loaded.take();
        if old.as_ref().is_none_or(|o| o.debug != want.debug) {
            let debug =
                kvm_debugregs { db: regs.dr, dr6: regs.dr6, dr7: vmcs.guest.dr7, ..kvm_debugregs::default() };
            self.fd.set_debug_regs(&debug).map_err(host("KVM_SET_DEBUGREGS"))?;
        }
        for (i, (index, value)) in CONTEXT_MSRS.into_iter().zip(want.msrs).enumerate() {
            // A new vCPU has 0 in it; a KVM without this MSR would log a warning.
            let before = old.as_ref().map(|o| o.msrs[i]).or((index == msr::IA32_DEBUGCTL).then_some(0));
            if before != Some(value) {
                self.set_msr(index, value)?;
            }
        }
        if old.as_ref().is_none_or(|o| o.tsc_offset != want.tsc_offset) {
            self.set_tsc_offset(want.tsc_offset)?;
        }
        self.loaded = Some(want);
        Ok(())
    }

    fn set_msr(&self, index: u32, data: u64) -> Result<(), EngineError> {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let list = Msrs::from_entries(&[entry]).map_err(|e| unsupported(format!("{e:?}")))?;
        let set = self.fd.set_msrs(&list).map_err(host("KVM_SET_MSRS"))?;
        // An MSR that this KVM lacks holds 0 as well as any. IA32_SPEC_CTRL only hints.
        if set == 1 || data == 0 || index == msr::IA32_SPEC_CTRL {
            Ok(())
        } else {
            Err(unsupported(format!("KVM refuses {data:#x} in MSR {index:#x}")))
        }
    }

    fn set_tsc_offset(&self, offset: u64) -> Result<(), EngineError> {
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_VCPU_TSC_CTRL,
            attr: KVM_VCPU_TSC_OFFSET.into(),
            addr: std::ptr::from_ref(&offset) as u64,
        };
        // SAFETY: the descriptor is a vCPU's; the structure and the 64-bit value that it
        // points to live for the call, which only reads them.
        let result = unsafe {
            libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&self.fd), KVM_SET_DEVICE_ATTR as _, &attribute)
        };
        if result == 0 {
            return Ok(());
        }
        // Before Linux 5.16 KVM takes the value, and does with it what it thinks fit.
        self.set_msr(msr::TSC, host_tsc().wrapping_add(offset))
    }

    /// Shows what exits do not bring, for a report.
    fn show_rest(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) -> Result<(), EngineError> {
        let debug = self.fd.get_debug_regs().map_err(host("KVM_GET_DEBUGREGS"))?;
        (regs.dr, regs.dr6, vmcs.guest.dr7) = (debug.db, debug.dr6, debug.dr7);
        let mut rest = &CONTEXT_MSRS[..];
        // KVM stops at one that it lacks.
        while !rest.is_empty() {
            let entries: Vec<_> =
                rest.iter().map(|i| kvm_msr_entry { index: *i, ..Default::default() }).collect();
            let mut list = Msrs::from_entries(&entries).map_err(|e| unsupported(format!("{e:?}")))?;
            let got = self.fd.get_msrs(&mut list).map_err(host("KVM_GET_MSRS"))?;
            for e in list.as_slice().iter().take(got) {
                show_msr(vmcs, regs, e.index, e.data);
            }
            rest = rest.get(got + 1..).unwrap_or_default();
        }
        // What is shown is what KVM has.
        self.loaded = self.loaded.take().map(|l| Loaded {
            debug: [debug.db[0], debug.db[1], debug.db[2], debug.db[3], debug.dr6, debug.dr7],
            msrs: context_msrs(vmcs, regs),
            ..l
        });
        Ok(())
    }

    /// As [`Self::show_rest`], with x87 and vector state and XCR0: everything that another engine needs.
    pub(crate) fn show_all(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
    ) -> Result<(), EngineError> {
        self.show_system(vmcs, regs)?;
        self.show_rest(vmcs, regs)?;
        let area = self.fd.get_xsave().map_err(host("KVM_GET_XSAVE"))?;
        fpu::show(&area, self.shared.ymm_offset, &mut regs.fpu);
        self.show_pdptes(vmcs);
        if let Some(xcr0) = self.xcr0()? {
            regs.xcr0 = xcr0;
        }
        Ok(())
    }

    /// With PAE paging, the processor has the four entries at CR3 (SDM Vol. 3A §4.4.1); KVM, the memory that they
    /// came from.
    fn show_pdptes(&self, vmcs: &mut EngineVmcs) {
        let g = &mut vmcs.guest;
        if g.cr0 & cr0::PG == 0 || g.cr4 & cr4::PAE == 0 || g.efer & efer::LMA != 0 {
            return;
        }
        for (i, entry) in g.pdptes.iter_mut().enumerate() {
            let at = self.shared.machine((g.cr3 & !31) + 8 * i as u64);
            *entry = at.and_then(|at| self.shared.memory.read_u64(at).ok()).unwrap_or(0);
        }
    }

    /// Gives KVM what [`Self::show_all`] shows and [`Self::try_enter`] does not load.
    pub(crate) fn load_vectors(&mut self, regs: &GuestRegs) -> Result<(), EngineError> {
        let mut area = self.fd.get_xsave().map_err(host("KVM_GET_XSAVE"))?;
        fpu::take(&mut area, self.shared.ymm_offset, &regs.fpu);
        // SAFETY: KVM reads 4096 bytes, the size of the structure: no larger components are enabled, which
        // a process has to ask for.
        unsafe { self.fd.set_xsave(&area) }.map_err(host("KVM_SET_XSAVE"))?;
        if self.xcr0()?.is_some_and(|x| x != regs.xcr0) {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
            xcrs.xcrs[0].value = regs.xcr0;
            self.fd.set_xcrs(&xcrs).map_err(host("KVM_SET_XCRS"))?;
        }
        Ok(())
    }

    /// XCR0, where KVM has it.
    fn xcr0(&self) -> Result<Option<u64>, EngineError> {
        if !self.shared.has_xcrs {
            return Ok(None);
        }
        let xcrs = self.fd.get_xcrs().map_err(host("KVM_GET_XCRS"))?;
        Ok((xcrs.nr_xcrs > 0).then_some(xcrs.xcrs[0].value))
    }

    /// Has KVM stop before the instructions at these linear addresses, four at most, in place of the
    /// guest's own breakpoints; none gives the guest its own back.
    pub(crate) fn set_breakpoints(&mut self, at: &[u64]) -> Result<(), EngineError> {
        let mut debug = kvm_guest_debug::default();
        for (i, address) in at.iter().enumerate().take(4) {
            debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
            debug.arch.debugreg[i] = *address;
            // Gn; condition and length 0 are those of an instruction (SDM Vol. 3B §18.2.4).
            debug.arch.debugreg[7] |= 2 << (2 * i);
            // GD: what the guest does with debug registers stops too, where KVM looks at this bit (on Intel processors).
            debug.arch.debugreg[7] |= 1 << 13;
        }
        self.fd.set_guest_debug(&debug).map_err(host("KVM_SET_GUEST_DEBUG"))
    }

    /// Whether KVM takes these bits of CR4, in the state after RESET.
    pub(crate) fn takes_cr4(&self, bits: u64) -> Result<bool, EngineError> {
        let before = self.fd.get_sregs().map_err(host("KVM_GET_SREGS"))?;
        let changed = kvm_sregs { cr4: before.cr4 | bits, ..before };
        let takes = self.fd.set_sregs(&changed).is_ok();
        self.fd.set_sregs(&before).map_err(host("KVM_SET_SREGS"))?;
        Ok(takes)
    }

    /// Whether [`Vcpu::emulate`] is to answer an access.
    pub(crate) fn is_open(&self) -> bool {
        self.access.is_some()
    }

    /// Whether an answered access is not finished.
    pub(crate) fn is_unfinished(&self) -> bool {
        self.unfinished
    }

    /// The event that KVM has not delivered, taken from it.
    pub(crate) fn undelivered(&self) -> (InterruptionInfo, u32) {
        self.state.interrupted_event()
    }

    /// `len` bytes at a linear address, if they are mapped.
    pub(crate) fn peek(&self, linear: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        let memory = self.shared.memory.clone();
        self.pieces(linear, len, |at, range| drop(memory.read(at, &mut bytes[range]))).ok()?;
        Some(bytes)
    }

    // ---- running ------------------------------------------------------------------------

    /// Arms the timer for the VMX-preemption timer's value.
    fn set_timer(&mut self, vmcs: &EngineVmcs) -> Result<(), EngineError> {
        let ticks = vmcs.guest.preemption_timer;
        let polls = vmcs.controls.primary.contains(PrimaryControls::NMI_WINDOW_EXITING);
        self.deadline = None;
        // The largest value is L0's "never".
        if ticks == u32::MAX && !polls {
            return Ok(());
        }
        let now = host_tsc();
        let mut limit = u64::MAX;
        if ticks != u32::MAX {
            limit = now.saturating_add(u64::from(ticks) << PREEMPTION_TIMER_SHIFT);
            self.deadline = Some(limit);
        }
        if polls {
            limit = limit.min(now.saturating_add(self.tsc_frequency / NMI_POLLS_PER_SECOND));
        }
        let timer = |source| EngineError::Host { call: "setting a timer", source };
        if self.timer.as_ref().is_none_or(|t| !t.is_own()) {
            self.timer = Some(Timer::new(self.tsc_frequency).map_err(timer)?);
        }
        match &mut self.timer {
            Some(t) => t.set(now, limit).map_err(timer),
            None => Ok(()),
        }
    }

    /// `KVM_RUN`: KVM's exit reason, or `None` when a signal or `immediate_exit` ended it. It finishes what
    /// was begun before anything else.
    fn kvm_run(&mut self) -> Result<Option<u32>, Failure> {
        self.unfinished = false;
        match self.fd.run() {
            Ok(_) => Ok(Some(self.run_structure().exit_reason)),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => Ok(None),
            Err(e) => Err(Failure::Run(std::io::Error::from_raw_os_error(e.errno()))),
        }
    }

    /// Has KVM finish what it began, without another guest instruction.
    fn finish(&mut self) -> Result<Option<u32>, Failure> {
        self.fd.set_kvm_immediate_exit(1);
        let result = self.kvm_run();
        self.fd.set_kvm_immediate_exit(0);
        if result.is_ok() {
            self.fetch()?;
        }
        result
    }

    /// Gives KVM what is not part of the state that it shows where it serves VMX: interrupts, NMIs and CR8.
    fn load_beside(&mut self, vmcs: &EngineVmcs, regs: &GuestRegs) -> Result<(), EngineError> {
        if !self.shared.host_vmx {
            return Ok(());
        }
        if self.run_structure().cr8 != regs.cr8 {
            host_vmx::set_cr8(&self.fd, regs.cr8)?;
        }
        let info = vmcs.controls.entry_interruption;
        match info.event_type() {
            _ if !info.is_valid() => Ok(()),
            EventType::External => {
                host_vmx::interrupt(&self.fd, info.vector())?;
                // There is room for one; the next run says when it has gone in.
                self.run_structure().ready_for_interrupt_injection = 0;
                Ok(())
            }
            EventType::Nmi => self.fd.nmi().map_err(host("KVM_NMI")),
            _ => Ok(()),
        }
    }

    /// Runs the guest. `None` is a kick or the timer.
    fn run_guest(&mut self, vmcs: &EngineVmcs) -> Result<Option<u32>, Failure> {
        self.fd.set_kvm_immediate_exit(0);
        let flag = &raw mut self.run_structure().immediate_exit;
        let kick = self.kick.clone();
        // SAFETY: `flag` points into the run structure, mapped as long as `self.fd` lives, which
        // is longer than `armed`.
        let armed = unsafe { Armed::new(&kick, flag) };
        // Not earlier: a signal before this thread is armed would be lost.
        self.set_timer(vmcs)?;
        if kick.is_requested() {
            return Ok(None);
        }
        let result = self.kvm_run();
        drop(armed);
        self.fd.set_kvm_immediate_exit(0);
        if result.is_ok() {
            self.fetch()?;
        }
        result
    }

    pub(crate) fn try_enter(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
    ) -> Result<VmExit, Failure> {
        if self.access.take().is_some() {
            return Err(Failure::Open);
        }
        self.shared.realise(vmcs.controls.eptp, vmcs.controls.msr_bitmap)?;
        if self.shared.has_apics
            && let Some(vector) = apics::take_pic_interrupt(vmcs, self.state.events.interrupt.injected != 0)
        {
            host_vmx::interrupt(&self.fd, vector)?;
            self.run_structure().ready_for_interrupt_injection = 0;
        }
        if !self.shared.has_apics {
            // Loaded with the system registers, if they are; else see below.
            self.state.sregs.cr8 = regs.cr8;
        }
        self.load(vmcs, regs)?;
        self.load_beside(vmcs, regs)?;
        vmcs.controls.entry_interruption = InterruptionInfo::NONE;
        let window = vmcs.controls.primary.contains(PrimaryControls::INTERRUPT_WINDOW_EXITING);
        let run = self.run_structure();
        run.request_interrupt_window = window.into();
        run.cr8 = regs.cr8;
        let reason = self.run_guest(vmcs)?;
        let run = self.run_structure();
        regs.cr8 = run.cr8;
        let takes_interrupt = run.ready_for_interrupt_injection != 0;
        self.takes_interrupt = takes_interrupt;
        self.state.show(vmcs, regs);
        if !self.is_light(reason) {
            self.show_system(vmcs, regs)?;
        }
        let exit = match reason {
            None => self.interrupted(vmcs),
            Some(reason) => self.translate_exit(reason, vmcs, regs)?,
        };
        Ok(exit)
    }

    /// The exit for a run that a signal ended.
    fn interrupted(&mut self, vmcs: &EngineVmcs) -> VmExit {
        let nmi_window = vmcs.controls.primary.contains(PrimaryControls::NMI_WINDOW_EXITING);
        let reason = if self.kick.take() {
            ExitReason::ExternalInterrupt
        } else if self.deadline.is_some_and(|d| d <= host_tsc()) {
            ExitReason::PreemptionTimer
        } else if nmi_window && vmcs.guest.interruptibility & interruptibility::NMI == 0 {
            ExitReason::NmiWindow
        } else {
            // The timer for an earlier deadline, or a signal for somebody else.
            ExitReason::ExternalInterrupt
        };
        self.with_interrupted_event(VmExit::new(reason))
    }

    fn with_interrupted_event(&self, mut exit: VmExit) -> VmExit {
        (exit.idt_vectoring, exit.idt_vectoring_error_code) = self.state.interrupted_event();
        exit
    }

    /// KVM's exit as a VM exit.
    fn translate_exit(
        &mut self,
        reason: u32,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
    ) -> Result<VmExit, Failure> {
        if let Some(exit) = self.open_access(reason) {
            return Ok(exit);
        }
        let run = self.run_structure();
        Ok(match reason {
            KVM_EXIT_HLT => {
                // KVM has stepped over it; hardware exits before.
                vmcs.guest.rip = vmcs.guest.rip.wrapping_sub(1);
                VmExit { instruction_length: 1, ..VmExit::new(ExitReason::Hlt) }
            }
            KVM_EXIT_IRQ_WINDOW_OPEN => self.with_interrupted_event(VmExit::new(ExitReason::InterruptWindow)),
            KVM_EXIT_IOAPIC_EOI => {
                // SAFETY: the exit reason says which member of the union KVM wrote.
                let vector = unsafe { run.__bindgen_anon_1.eoi.vector };
                let exit = VmExit::new(ExitReason::VirtualizedEoi).qualified(vector.into());
                self.with_interrupted_event(exit)
            }
            // The task priority fell: L0 looks at its local APIC again.
            KVM_EXIT_SET_TPR => self.with_interrupted_event(VmExit::new(ExitReason::ExternalInterrupt)),
            KVM_EXIT_X86_RDMSR => {
                run.__bindgen_anon_1.msr.data = regs.gpr[gpr::RAX] & 0xffff_ffff | regs.gpr[gpr::RDX] << 32;
                self.finish_msr(vmcs, ExitReason::Rdmsr)?
            }
            KVM_EXIT_X86_WRMSR => self.finish_msr(vmcs, ExitReason::Wrmsr)?,
            KVM_EXIT_SHUTDOWN => {
                self.show_rest(vmcs, regs)?;
                VmExit::new(ExitReason::TripleFault)
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: the exit reason says which member of the union KVM wrote.
                let hardware = unsafe { run.__bindgen_anon_1.fail_entry.hardware_entry_failure_reason };
                return Err(Failure::Entry(hardware));
            }
            KVM_EXIT_INTERNAL_ERROR => return Err(internal_error(run)),
            KVM_EXIT_DEBUG => return Err(Failure::Breakpoint),
            other => return Err(Failure::Unknown(other)),
        })
    }

    /// RDMSR or WRMSR: KVM steps over it, L0 decides what it does.
    fn finish_msr(&mut self, vmcs: &EngineVmcs, reason: ExitReason) -> Result<VmExit, Failure> {
        self.run_structure().__bindgen_anon_1.msr.error = 0;
        // Stepping over it leaves the system registers as they were shown.
        let stale = self.stale;
        if let Some(other) = self.finish()? {
            return Err(Failure::Unfinished(other));
        }
        self.stale = stale;
        let length = self.state.regs.rip.wrapping_sub(vmcs.guest.rip);
        Ok(VmExit { instruction_length: length as u32 & 15, ..VmExit::new(reason) })
    }

    /// If KVM waits for an access: keeps it for [`Vcpu::emulate`], and gives its VM exit.
    fn open_access(&mut self, reason: u32) -> Option<VmExit> {
        let run = self.run_structure();
        match reason {
            KVM_EXIT_IO => {
                // SAFETY: the exit reason says which member of the union KVM wrote.
                let p = unsafe { run.__bindgen_anon_1.io };
                let read = u32::from(p.direction) == KVM_EXIT_IO_IN;
                self.access = Some(Access::Port {
                    port: p.port,
                    size: p.size,
                    count: p.count,
                    read,
                    offset: p.data_offset,
                });
                let flags = if read { io::IN } else { 0 };
                let q = io::qualification(p.port, p.size.max(1), flags);
                Some(VmExit::new(ExitReason::IoInstruction).qualified(q))
            }
            KVM_EXIT_MMIO => {
                // SAFETY: as above.
                let m = unsafe { run.__bindgen_anon_1.mmio };
                let read = m.is_write == 0;
                self.access = Some(Access::Memory { gpa: m.phys_addr, len: m.len.min(8), read });
                let kind = if read { ept_violation::READ } else { ept_violation::WRITE };
                let exit = VmExit::new(ExitReason::EptViolation).qualified(kind);
                Some(VmExit { guest_physical: Gpa(m.phys_addr), ..exit })
            }
            _ => None,
        }
    }

    /// Does what KVM waits for on `bus`.
    fn answer(&mut self, access: Access, bus: &mut dyn ExitBus) {
        match access {
            Access::Port { port, size, count, read, offset } => {
                let size = usize::from(size);
                for i in 0..count as usize {
                    let data = self.port_data(offset, i * size, size);
                    if read {
                        let value = bus.pio_read(port, size as u8).to_le_bytes();
                        data.iter_mut().zip(value).for_each(|(d, v)| *d = v);
                    } else {
                        let mut value = [0; 4];
                        value.iter_mut().zip(data.iter()).for_each(|(v, d)| *v = *d);
                        bus.pio_write(port, size as u8, u32::from_le_bytes(value));
                    }
                }
            }
            Access::Memory { gpa, len, read } => {
                let run = self.run_structure();
                // SAFETY: KVM_EXIT_MMIO wrote this member, and nothing has run since.
                let data = unsafe { &mut run.__bindgen_anon_1.mmio.data };
                let len = (len as usize).min(data.len());
                if read {
                    mmio(gpa, &mut data[..len], |gpa, chunk| {
                        let value = bus.mmio_read(gpa, chunk.len() as u8).to_le_bytes();
                        chunk.iter_mut().zip(value).for_each(|(d, v)| *d = v);
                    });
                } else {
                    mmio(gpa, &mut data[..len], |gpa, chunk| {
                        let mut value = [0; 8];
                        value.iter_mut().zip(chunk.iter()).for_each(|(v, d)| *v = *d);
                        bus.mmio_write(gpa, chunk.len() as u8, u64::from_le_bytes(value));
                    });
                }
            }
        }
    }

    /// Bytes of a port access in the run structure's mapping.
    fn port_data(&mut self, offset: u64, at: usize, size: usize) -> &mut [u8] {
        let run: *mut kvm_run = self.run_structure();
        // SAFETY: KVM says where in the mapping of the run structure the data are (`data_offset`) and
        // that they are `size * count` bytes; `at` is below that. The mapping lives as long as
        // `self`, which the result borrows.
        unsafe { std::slice::from_raw_parts_mut(run.cast::<u8>().add(offset as usize + at), size) }
    }

    pub(crate) fn failed(&mut self, failure: &Failure, vmcs: &EngineVmcs) -> VmExit {
        let g = &vmcs.guest;
        let text = format!(
            "{failure}; rip {:#x}, cs {:#x}, cr0 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x}, rflags {:#x}",
            g.rip,
            g.segments[x86_spec::segment::seg::CS].selector,
            g.cr0,
            g.cr3,
            g.cr4,
            g.efer,
            g.rflags
        );
        tracing::debug!("{text}");
        self.failure = Some(text);
        VmExit { entry_failure: true, ..VmExit::new(ExitReason::InvalidGuestState) }
    }

    fn try_emulate(&mut self, bus: &mut dyn ExitBus) -> Option<VmExit> {
        // Only an instruction that KVM began can be finished; L0 takes the exit for one that the engine
        // can't do.
        let Some(access) = self.access.take() else {
            return Some(VmExit::new(ExitReason::EptViolation));
        };
        self.answer(access, bus);
        self.unfinished = true;
        None
    }

    fn try_settle(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        bus: &mut dyn ExitBus,
    ) -> Result<Option<VmExit>, Failure> {
        for _ in 0..MAX_ACCESSES {
            if !self.unfinished {
                self.show_system(vmcs, regs)?;
                return Ok(None);
            }
            let reason = self.finish()?;
            self.state.show(vmcs, regs);
            self.show_system(vmcs, regs)?;
            let Some(reason) = reason else {
                // A fault of the instruction waits in KVM; L0 must not choose another event.
                let (info, code) = self.state.interrupted_event();
                vmcs.controls.entry_interruption = info;
                vmcs.controls.entry_error_code = code;
                return Ok(None);
            };
            if self.open_access(reason).is_none() {
                return self.translate_exit(reason, vmcs, regs).map(Some);
            }
            self.try_emulate(bus);
        }
        Err(Failure::Unfinished(KVM_EXIT_IO))
    }

    /// Physical address of `linear`, by KVM's walk of the guest's tables.
    fn physical(&self, linear: u64) -> Option<Gpa> {
        let t = self.fd.translate_gva(linear).ok()?;
        (t.valid != 0).then_some(Gpa(t.physical_address))
    }

    /// Calls `f` for each piece of `len` bytes at `linear` that is in one page, with its machine
    /// address.
    fn pieces(
        &self,
        linear: u64,
        len: usize,
        mut f: impl FnMut(MachineAddr, std::ops::Range<usize>),
    ) -> Result<(), LinearFault> {
        let mut at = 0;
        while at < len {
            let address = linear.wrapping_add(at as u64);
            let step = (4096 - (address & 4095) as usize).min(len - at);
            let fault =
                LinearFault::Exception { vector: x86_spec::exception::PF, error_code: Some(0), address };
            let gpa = self.physical(address).ok_or(fault)?;
            let Some(machine) = self.shared.machine(gpa.0) else {
                let exit = VmExit::new(ExitReason::EptViolation);
                return Err(LinearFault::Exit(VmExit { guest_physical: gpa, ..exit }));
            };
            f(machine, at..at + step);
            at += step;
        }
        Ok(())
    }
}

/// Calls `f` for the parts of an access that have sizes which devices know: 8, 4, 2 or 1 bytes.
fn mmio(mut gpa: u64, mut data: &mut [u8], mut f: impl FnMut(Gpa, &mut [u8])) {
    while !data.is_empty() {
        let size = 1 << data.len().min(8).ilog2();
        let (part, rest) = data.split_at_mut(size);
        f(Gpa(gpa), part);
        gpa = gpa.wrapping_add(size as u64);
        data = rest;
    }
}

/// What KVM says about an internal error.
fn internal_error(run: &mut kvm_run) -> Failure {
    // SAFETY: the exit reason says which member of the union KVM wrote.
    let e = unsafe { run.__bindgen_anon_1.internal };
    let name = match e.suberror {
        1 => "emulation failure",
        2 => "simultaneous exceptions",
        3 => "exit during event delivery",
        4 => "unexpected exit reason",
        _ => "unknown",
    };
    // Of an emulation failure: flags, with bit 0 for instruction bytes; then their number and
    // they.
    let mut bytes = Vec::new();
    if e.suberror == 1 && e.ndata >= 4 && e.data[0] & 1 != 0 {
        bytes.extend(e.data[1..4].iter().flat_map(|d| d.to_le_bytes()));
        let n = usize::from(bytes[0]).min(15);
        bytes.drain(..1);
        bytes.truncate(n);
    }
    Failure::Internal { suberror: e.suberror, name, bytes: Bytes(bytes) }
}

impl Vcpu for KvmVcpu {
    fn enter(&mut self, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) -> VmExit {
        match self.try_enter(vmcs, regs) {
            Ok(exit) => exit,
            Err(failure) => self.failed(&failure, vmcs),
        }
    }

    fn emulate(&mut self, _: &mut EngineVmcs, _: &mut GuestRegs, bus: &mut dyn ExitBus) -> Option<VmExit> {
        self.try_emulate(bus)
    }

    fn settle(
        &mut self,
        vmcs: &mut EngineVmcs,
        regs: &mut GuestRegs,
        bus: &mut dyn ExitBus,
    ) -> Option<VmExit> {
        match self.try_settle(vmcs, regs, bus) {
            Ok(exit) => exit,
            Err(failure) => Some(self.failed(&failure, vmcs)),
        }
    }

    /// Without effects on accessed and dirty flags, which KVM's translation does not touch.
    fn read_linear(
        &mut self,
        _: &mut EngineVmcs,
        _: &mut GuestRegs,
        linear: u64,
        buf: &mut [u8],
    ) -> Result<(), LinearFault> {
        let memory = self.shared.memory.clone();
        // A slot lies in machine memory, so the read can't fail.
        self.pieces(linear, buf.len(), |at, range| drop(memory.read(at, &mut buf[range])))
    }

    /// As [`Self::read_linear`]; write protection is not looked at.
    fn write_linear(
        &mut self,
        _: &mut EngineVmcs,
        _: &mut GuestRegs,
        linear: u64,
        buf: &[u8],
    ) -> Result<(), LinearFault> {
        let memory = self.shared.memory.clone();
        self.pieces(linear, buf.len(), |_, _| ())?;
        self.pieces(linear, buf.len(), |at, range| drop(memory.write(at, &buf[range])))
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    fn instructions(&self) -> u64 {
        0
    }

    fn translate(&mut self, _: &EngineVmcs, _: &GuestRegs, linear: u64) -> Option<Gpa> {
        self.physical(linear)
    }

    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> Result<(), EngineError> {
        let entries: Vec<_> = entries
            .iter()
            .map(|e| if self.shared.has_apics { *e } else { with_kvm_limits(*e) })
            .map(|e| kvm_cpuid_entry2 {
                function: e.leaf,
                index: e.subleaf.unwrap_or(0),
                flags: if e.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
                eax: e.registers[0],
                ebx: e.registers[1],
                ecx: e.registers[2],
                edx: e.registers[3],
                padding: [0; 3],
            })
            .collect();
        let table = CpuId::from_entries(&entries).map_err(|e| unsupported(format!("{e:?}")))?;
        self.fd.set_cpuid2(&table).map_err(host("KVM_SET_CPUID2"))?;
        if self.shared.host_vmx {
            // After CPUID, which says whether there is such a register.
            self.set_msr(msr::IA32_FEATURE_CONTROL, host_vmx::FEATURE_CONTROL)?;
        }
        Ok(())
    }

    /// KVM takes NMIs at any time, and an interrupt when it says so at an exit.
    fn event_windows(&self) -> Option<EventWindows> {
        let kvm_decides = self.shared.host_vmx || self.shared.has_apics;
        kvm_decides.then_some(EventWindows { interrupt: self.takes_interrupt, nmi: true })
    }

    fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_that_would_never_expire_is_not_shown() {
        // SDM Vol. 2A, CPUID: 01H:ECX bit 24.
        let all = |leaf| CpuidEntry { leaf, subleaf: None, registers: [u32::MAX; 4] };
        assert_eq!(with_kvm_limits(all(1)).registers, [u32::MAX, u32::MAX, !(1 << 24), u32::MAX]);
        assert_eq!(with_kvm_limits(all(6)), all(6));
    }

    #[test]
    fn odd_accesses_are_split_into_sizes_that_devices_know() {
        let mut parts = Vec::new();
        mmio(0x1000, &mut [1, 2, 3, 4, 5, 6, 7], |gpa, part| parts.push((gpa.0, part.to_vec())));
        assert_eq!(parts, [(0x1000, vec![1, 2, 3, 4]), (0x1004, vec![5, 6]), (0x1006, vec![7])]);
    }
}
