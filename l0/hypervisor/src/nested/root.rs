//! L1 in VMX root operation: its VMX instructions, and what they restrict (SDM Vol. 3C §24.8).

use engine::{Engine, VmExit};
use exit_trace::VmFail;
use memory::L1Gpa;
use vmx_emu::{Capabilities, Fault, Outcome as Vmx, VmResult, instructions};
use x86_spec::exception;
use x86_spec::exit::ExitReason;
use x86_spec::exit::cr_access::{self, Kind};
use x86_spec::reg::cr4;

use crate::board::{CpuBus, DeviceBus};
use crate::exits::Outcome;
use crate::nested::l1::L1View;
use crate::vcpu_loop::VcpuLoop;

/// A VMX instruction of L1.
pub(crate) fn vmx_instruction<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    if exit.reason == ExitReason::Vmcall
        && let Some(outcome) = cpu.hypercall(exit)
    {
        return outcome;
    }
    let vm = cpu.vm().clone();
    cpu.load_shadow_vmcs();
    let Some(nested) = cpu.nested.as_mut() else {
        cpu.inject_exception(exception::UD, None);
        return Outcome::Resume;
    };
    let mut bus = DeviceBus(CpuBus { board: vm.board(), cpu: cpu.index, ram: vm.ram() });
    let mut l1 = L1View {
        vcpu: &mut cpu.vcpu,
        vmcs01: &mut cpu.vmcs,
        regs: &mut cpu.regs,
        ram: vm.ram(),
        bus: &mut bus,
    };
    let outcome = instructions::execute(&mut nested.state, &nested.caps, &mut l1, exit);
    match outcome {
        Some(Vmx::Complete(result)) => cpu.complete_vmx(exit, result),
        Some(Vmx::Invalidate(what)) => {
            cpu.nested_invalidate(what);
            cpu.complete_vmx(exit, VmResult::Succeed)
        }
        // An operand in a table of L1 that is write-protected.
        Some(Vmx::Exit(access)) if vm.ept01().is_protected(L1Gpa(access.guest_physical.0)) => {
            // The instruction starts again.
            cpu.let_table_go(L1Gpa(access.guest_physical.0));
            Outcome::Resume
        }
        // What EPT01 does not map is on the bus, so that only paging structures outside RAM are left.
        Some(Vmx::Exit(access)) => {
            tracing::warn!(gpa = %access.guest_physical, "a VMX instruction's operand can't be translated: #GP");
            cpu.nested_fault(Fault::GP)
        }
        Some(Vmx::Fault(fault)) => cpu.nested_fault(fault),
        Some(Vmx::Enter(_)) => cpu.nested_entry(exit),
        None => {
            cpu.inject_exception(exception::UD, None);
            Outcome::Resume
        }
    }
}

impl<E: Engine> VcpuLoop<E> {
    /// Ends a VMX instruction with its result in RFLAGS.
    pub(crate) fn complete_vmx(&mut self, exit: &VmExit, result: VmResult) -> Outcome {
        if let VmResult::FailValid(error) = result {
            tracing::debug!(
                rip = format_args!("{:#x}", self.vmcs.guest.rip),
                "{} fails: {error}",
                exit.reason.name()
            );
            self.store_instruction_error();
        }
        match result {
            VmResult::Succeed => {}
            VmResult::FailInvalid => self.account.failed(VmFail::Invalid),
            VmResult::FailValid(error) => self.account.failed(VmFail::Valid(error)),
        }
        self.vmcs.guest.rflags = result.rflags(self.vmcs.guest.rflags);
        self.restrict_control_registers();
        self.store_shadow_vmcs();
        self.skip_instruction(exit);
        Outcome::Resume
    }

    /// Has L1 take a fault of a VMX instruction.
    pub(crate) fn nested_fault(&mut self, fault: Fault) -> Outcome {
        if let Some(address) = fault.cr2 {
            self.regs.cr2 = address;
        }
        self.inject_exception(fault.vector, fault.error_code);
        Outcome::Resume
    }

    /// VMX operation fixes bits of CR0: writes that clear one must exit, to be #GP (SDM Vol. 3C
    /// §24.8). CR4.VMXE is always L0's.
    pub(crate) fn restrict_control_registers(&mut self) {
        let on = self.nested.as_ref().is_some_and(|n| n.state.in_vmx_operation());
        let fixed = if on { Capabilities::CR0_FIXED0 } else { 0 };
        self.vmcs.controls.cr0_mask = fixed;
        self.vmcs.controls.cr0_shadow = fixed;
    }

    /// MOV to CR0, LMSW, CLTS or MOV to CR4 of L1 that change a bit which L0 holds.
    pub(crate) fn held_cr_access(&mut self, exit: &VmExit) -> Outcome {
        let q = exit.qualification;
        if (cr_access::cr(q), cr_access::kind(q)) == (4, Kind::MovTo) {
            let value = self.read_gpr(cr_access::gpr(q));
            // What the engine let L1 set before stays L1's.
            let c = &self.vmcs.controls;
            let offered = !c.cr4_mask | c.cr4_shadow | cr4::VMXE;
            if let Some(n) = &self.nested
                && value & !offered == 0
                && n.state.allows_cr4(&n.caps, value)
            {
                // VMXE is in the shadow alone. The instruction runs again; now it changes no bit that L0 holds.
                self.vmcs.controls.cr4_shadow = value & cr4::VMXE;
                return Outcome::Resume;
            }
        }
        self.inject_exception(exception::GP, Some(0));
        Outcome::Resume
    }
}
