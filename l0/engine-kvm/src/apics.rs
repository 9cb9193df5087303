//! Local APICs in KVM (`KVM_CAP_SPLIT_IRQCHIP`): a guest's accesses to them, its timer, interrupts to itself and HLT then
//! cost no exit to userspace. I/O APIC and 8259 stay L0's.
//!
//! For a guest that uses VMX this is no choice: L0 has to see every interrupt.
//!
//! Not supported: INIT makes KVM reset the vCPU itself, and not the machine; an ExtINT entry of the I/O APIC, which KVM ignores
//! (the 8259 reaches the processor through LINT0); the NMI button when the guest masked LINT1.

use std::sync::Arc;

use engine::{EngineError, EngineVmcs, LocalApics, Message, VmExit};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::{Cap, VcpuFd};
use x86_spec::exit::ExitReason;
use x86_spec::interruption::EventType;
use x86_spec::msr;

use crate::{KvmEngine, Shared, host, host_vmx, unsupported};

/// KVM's APIC timers count nanoseconds.
const TIMER_HZ: u32 = 1_000_000_000;

/// MSRs of the local APIC that an MSR filter applies to; the x2APIC's registers never exit.
const FILTERED_MSRS: [u32; 2] = [msr::IA32_APIC_BASE, msr::IA32_TSC_DEADLINE];

/// Lets accesses to the local APIC's MSRs pass a filter, which has the MSR bitmap's layout.
pub(crate) fn allow_msrs(allowed: &mut [u8; 4096]) {
    for m in FILTERED_MSRS {
        for quarter in [0, 0x800] {
            if let Some(byte) = allowed.get_mut(quarter + m as usize / 8) {
                *byte |= 1 << (m % 8);
            }
        }
    }
}

impl KvmEngine {
    /// Whether KVM can have the local APICs.
    pub fn can_have_local_apics(&self) -> bool {
        self.shared.vm.check_extension(Cap::SplitIrqchip)
    }

    /// Has KVM have the local APICs; before a vCPU is made.
    ///
    /// # Errors
    /// [`EngineError`] when KVM refuses, or there is a vCPU already.
    pub fn with_local_apics(mut self) -> Result<Self, EngineError> {
        let shared = Arc::get_mut(&mut self.shared)
            .ok_or_else(|| unsupported("local APICs in KVM have to be chosen before a vCPU is made"))?;
        host_vmx::split_irqchip(&shared.vm)?;
        shared.has_apics = true;
        Ok(self)
    }
}

impl LocalApics for Shared {
    fn send(&self, message: Message) -> bool {
        let msi = kvm_msi { address_lo: message.address, data: message.data, ..Default::default() };
        self.vm.signal_msi(msi).is_ok_and(|accepted| accepted > 0)
    }

    fn set_level_messages(&self, messages: &[Option<Message>]) {
        let entry = |(pin, m): (usize, &Option<Message>)| {
            let m = (*m)?;
            Some(kvm_irq_routing_entry {
                gsi: pin as u32,
                type_: KVM_IRQ_ROUTING_MSI,
                u: kvm_irq_routing_entry__bindgen_ty_1 {
                    msi: kvm_irq_routing_msi {
                        address_lo: m.address,
                        data: m.data,
                        ..kvm_irq_routing_msi::default()
                    },
                },
                ..kvm_irq_routing_entry::default()
            })
        };
        let entries: Vec<_> = messages.iter().enumerate().filter_map(entry).collect();
        let set = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| unsupported(format!("{e:?}")))
            .and_then(|r| self.vm.set_gsi_routing(&r).map_err(host("KVM_SET_GSI_ROUTING")));
        if let Err(e) = set {
            tracing::warn!("level-triggered interrupts will come once only: {e}");
        }
    }

    fn timer_frequency(&self) -> u32 {
        TIMER_HZ
    }
}

/// What PC firmware leaves on the bootstrap processor: software-enabled, LINT0 as ExtINT for the 8259, LINT1 as
/// NMI (MultiProcessor Specification 1.4 §3.6.2.2).
pub(crate) fn enter_virtual_wire_mode(vcpu: &VcpuFd) -> Result<(), EngineError> {
    // SVR, LVT LINT0 (ExtINT, level), LVT LINT1 (NMI): SDM Vol. 3A table 11-1.
    for (register, value) in [(0xf0, 0x1ff), (0x350, 0x8700), (0x360, 0x400)] {
        host_vmx::set_register(vcpu, register, value)?;
    }
    Ok(())
}

/// Takes an external interrupt that L0 injects out of the VMCS, unless it is `interrupted`, one that KVM began to deliver:
/// it is the 8259's.
pub(crate) fn take_pic_interrupt(vmcs: &mut EngineVmcs, interrupted: bool) -> Option<u8> {
    let info = vmcs.controls.entry_interruption;
    let is_new = info.is_valid() && info.event_type() == EventType::External && !interrupted;
    is_new.then(|| {
        vmcs.controls.entry_interruption = x86_spec::interruption::InterruptionInfo::NONE;
        info.vector()
    })
}

/// Whether an exit of an instruction that KVM left to the exact engine is one that needs KVM's local APIC.
pub(crate) fn needs_apic(exit: &VmExit, rcx: u64) -> bool {
    /// The x2APIC's registers (SDM Vol. 3A §11.12.1.2).
    const X2APIC: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;
    /// Where the registers are unless the guest moved them.
    const PAGE: u64 = 0xfee0_0000;
    let m = rcx as u32;
    match exit.reason {
        ExitReason::Hlt | ExitReason::Mwait => true,
        ExitReason::Rdmsr | ExitReason::Wrmsr => FILTERED_MSRS.contains(&m) || X2APIC.contains(&m),
        ExitReason::EptViolation => exit.guest_physical.0 & !0xfff == PAGE,
        ExitReason::CrAccess => x86_spec::exit::cr_access::cr(exit.qualification) == 8,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::Gpa;

    #[test]
    fn the_filter_lets_the_apic_s_msrs_pass_and_no_others() {
        let mut allowed = [0; 4096];
        allow_msrs(&mut allowed);
        let passes = |quarter: usize, m: usize| allowed[quarter + m / 8] >> (m % 8) & 1 != 0;
        for quarter in [0, 0x800] {
            // SDM Vol. 4: IA32_APIC_BASE, IA32_TSC_DEADLINE; their neighbours.
            assert!(passes(quarter, 0x1b) && passes(quarter, 0x6e0));
            assert!(!passes(quarter, 0x1a) && !passes(quarter, 0x6e1));
        }
        assert_eq!(allowed.iter().map(|b| b.count_ones()).sum::<u32>(), 4);
    }

    #[test]
    fn what_needs_the_local_apic_is_told_from_other_exits() {
        let exit = VmExit::new;
        assert!(needs_apic(&exit(ExitReason::Hlt), 0));
        assert!(needs_apic(&exit(ExitReason::Wrmsr), 0x80b));
        assert!(!needs_apic(&exit(ExitReason::Wrmsr), 0x10));
        let at = |gpa| VmExit { guest_physical: Gpa(gpa), ..exit(ExitReason::EptViolation) };
        assert!(needs_apic(&at(0xfee0_00b0), 0) && !needs_apic(&at(0xfec0_0000), 0));
        assert!(!needs_apic(&exit(ExitReason::Cpuid), 0));
    }

    #[test]
    fn only_what_l0_injects_anew_is_the_8259_s() {
        let mut vmcs = EngineVmcs::default();
        let external = x86_spec::interruption::InterruptionInfo::new(0x20, EventType::External, false);
        vmcs.controls.entry_interruption = external;
        assert_eq!(take_pic_interrupt(&mut vmcs, true), None, "KVM has it already");
        assert_eq!(vmcs.controls.entry_interruption, external);
        assert_eq!(take_pic_interrupt(&mut vmcs, false), Some(0x20));
        assert!(!vmcs.controls.entry_interruption.is_valid());
        assert_eq!(take_pic_interrupt(&mut vmcs, false), None);
    }
}
