//! VMX that the host's KVM serves: KVM executes a guest's VMX instructions and runs its guests (Linux
//! documentation, virt/kvm/x86/nested-vmx). L0 sees neither.
//!
//! While a guest of the guest runs, the registers that KVM shows are that guest's, so events can't be put into
//! KVM's state as they are without VMX: whether an interrupt is delivered or ends in a VM exit to the guest's
//! hypervisor is KVM's to decide. KVM decides that only for what is pending in a local APIC of its own. So it gets
//! one (a "split" interrupt controller), in which nothing happens but that LINT0 is in ExtINT mode: `KVM_INTERRUPT` then
//! is an external interrupt controller with a vector. L0 goes on emulating the local APIC that the guest sees; KVM's has its
//! registers at an address of no use. NMIs are queued with `KVM_NMI`, exceptions as pending ones.
//!
//! With a local APIC KVM waits in HLT itself, until an event or a kick.
//!
//! Not supported: an exit when the guest lowers CR8 (an interrupt that CR8 held back is looked at with the next
//! exit); state of VMX operation in reports; what KVM fails to emulate.

use std::os::fd::AsRawFd as _;
use std::{fs, io};

use engine::EngineError;
use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_interrupt, kvm_lapic_state,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::{host, unsupported};

/// Where KVM's local APIC has its registers: in the hole below 4 GiB, before the pages of
/// [`crate::TSS_AT`] and [`crate::IDENTITY_MAP_AT`].
const LAPIC_AT: u64 = 0xfffb_b000;
/// IA32_APIC_BASE (SDM Vol. 3A figure 11-5): enabled; bootstrap processor.
const APIC_ENABLED_BSP: u64 = 1 << 11 | 1 << 8;
/// Offsets of the task priority and of LVT LINT0 among a local APIC's registers (SDM Vol. 3A table 11-1).
const TPR: usize = 0x80;
const LVT_LINT0: usize = 0x350;
/// LVT LINT0: delivery mode ExtINT, not masked (SDM Vol. 3A figure 11-8).
const EXT_INT: u32 = 7 << 8;
/// Interrupt routes that a split interrupt controller keeps for an I/O APIC's pins. There are none to use.
const PINS: u64 = 24;
/// IA32_FEATURE_CONTROL: locked, VMX outside of SMX (SDM Vol. 3C §24.7).
pub(crate) const FEATURE_CONTROL: u64 = 1 | 1 << 2;
/// 01H:ECX.VMX, 80000001H:ECX.SVM.
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
/// Whether kvm_intel offers VMX to its guests.
const NESTED_PARAMETER: &str = "/sys/module/kvm_intel/parameters/nested";
/// `_IOW(KVMIO, 0x86, struct kvm_interrupt)`, which `kvm-ioctls` does not have.
const KVM_INTERRUPT: libc::c_ulong = 0x4004_ae86;

/// Whether this host's KVM can serve VMX. `has` says whether it offers its guests bits of ECX of a CPUID leaf.
///
/// # Errors
/// Says what is missing and what helps.
pub(crate) fn check(kvm: &Kvm, has: impl Fn(u32, u32) -> bool) -> Result<(), EngineError> {
    let instead = "--engine soft --vmx on emulates it";
    if !has(1, VMX) {
        let nested = fs::read_to_string(NESTED_PARAMETER).unwrap_or_default();
        let why = if has(0x8000_0001, SVM) {
            "its processor has SVM and not VMX".to_owned()
        } else if matches!(nested.trim(), "N" | "0") {
            "kvm_intel was loaded without nested=1: load it with \"modprobe -r kvm_intel; modprobe kvm_intel \
             nested=1\""
                .to_owned()
        } else {
            "it has none".to_owned()
        };
        return Err(unsupported(format!("/dev/kvm has no VMX for its guests, as {why}; {instead}")));
    }
    if !kvm.check_extension(Cap::SplitIrqchip) {
        return Err(unsupported(format!("/dev/kvm lacks KVM_CAP_SPLIT_IRQCHIP (Linux 4.4); {instead}")));
    }
    Ok(())
}

/// Gives KVM local APICs. To be called before a vCPU is made.
///
/// # Errors
/// When KVM refuses.
pub(crate) fn split_irqchip(vm: &VmFd) -> Result<(), EngineError> {
    let mut enable = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    enable.args[0] = PINS;
    vm.enable_cap(&enable).map_err(host("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))
}

/// Has KVM tell pending exceptions from those whose delivery it has begun, if it can.
pub(crate) fn tell_pending_exceptions(vm: &VmFd) -> bool {
    if vm.check_extension_raw(KVM_CAP_EXCEPTION_PAYLOAD.into()) <= 0 {
        return false;
    }
    let mut enable = kvm_enable_cap { cap: KVM_CAP_EXCEPTION_PAYLOAD, ..Default::default() };
    enable.args[0] = 1;
    vm.enable_cap(&enable).is_ok()
}

/// Puts a new vCPU's local APIC out of the way, and has it take what [`interrupt`] gives.
///
/// # Errors
/// When KVM refuses.
pub(crate) fn hide_lapic(fd: &VcpuFd) -> Result<(), EngineError> {
    let mut sregs = fd.get_sregs().map_err(host("KVM_GET_SREGS"))?;
    sregs.apic_base = LAPIC_AT | APIC_ENABLED_BSP;
    fd.set_sregs(&sregs).map_err(host("KVM_SET_SREGS"))?;
    set_register(fd, LVT_LINT0, EXT_INT)
}

/// Sets a register of a vCPU's local APIC.
///
/// # Errors
/// When KVM refuses.
pub(crate) fn set_register(fd: &VcpuFd, at: usize, value: u32) -> Result<(), EngineError> {
    let mut lapic: kvm_lapic_state = fd.get_lapic().map_err(host("KVM_GET_LAPIC"))?;
    for (register, byte) in lapic.regs.iter_mut().skip(at).zip(value.to_le_bytes()) {
        *register = byte as libc::c_char;
    }
    fd.set_lapic(&lapic).map_err(host("KVM_SET_LAPIC"))
}

/// Sets CR8, which KVM keeps in its local APIC (SDM Vol. 3A §11.8.6).
///
/// # Errors
/// When KVM refuses.
pub(crate) fn set_cr8(fd: &VcpuFd, cr8: u64) -> Result<(), EngineError> {
    set_register(fd, TPR, (cr8 as u32 & 15) << 4)
}

/// Has the guest take the interrupt `vector`, or its hypervisor exit with it, as soon as that is possible.
///
/// # Errors
/// When another one still waits.
pub(crate) fn interrupt(fd: &VcpuFd, vector: u8) -> Result<(), EngineError> {
    let interrupt = kvm_interrupt { irq: vector.into() };
    // SAFETY: the descriptor is a vCPU's; the structure lives for the call, which only reads it.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_INTERRUPT as _, &interrupt) };
    if result == 0 {
        return Ok(());
    }
    Err(EngineError::Host { call: "KVM_INTERRUPT", source: io::Error::last_os_error() })
}
