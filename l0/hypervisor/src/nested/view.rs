//! The three-way view of VMCSs that the user asks for while the machine runs.

use engine::Engine;
use vmx_emu::view::ThreeWay;

use crate::vcpu_loop::VcpuLoop;

impl<E: Engine> VcpuLoop<E> {
    /// VMCS01, VMCS12 and VMCS02 as they are between an exit and the next entry, and what runs.
    ///
    /// An enlightened VMCS is shown as L0 read it last, at the last VM entry of L1.
    pub(crate) fn vmcs_view(&mut self) -> String {
        // L1 may have written fields without an exit.
        self.load_shadow_vmcs();
        let in_l2 = self.in_l2();
        let rip = self.vmcs.guest.rip;
        let vmcs01 = &self.vmcs;
        let Some(n) = &self.nested else {
            let view = ThreeWay { vmcs01, vmcs12: None, vmcs02: None, origins: None };
            return format!("L1 runs, at {rip:#x}. It has no VMX: there is VMCS01 alone.\n{view}");
        };
        // Without a merge so far there has been no VMCS02.
        let waiting = n.origins.is_some().then_some(&*n.vmcs01);
        let (vmcs01, vmcs02) = if in_l2 { (&*n.vmcs01, Some(&self.vmcs)) } else { (&self.vmcs, waiting) };
        let view = ThreeWay { vmcs01, vmcs12: n.state.current(), vmcs02, origins: n.origins.as_ref() };
        let vmcs12 = match n.state.current_pointer() {
            _ if !n.state.in_vmx_operation() => "L1 is not in VMX operation: it has no VMCS12.".into(),
            Some(at) => format!("VMCS12 is at L1 address {at}."),
            None => "L1 is in VMX operation, but no VMCS is current: there is no VMCS12.".into(),
        };
        let vmcs02 = match (in_l2, vmcs02) {
            (true, _) => "",
            (_, Some(_)) => " VMCS02 is that of L2's last run.",
            (_, None) => " There has been no VMCS02 yet.",
        };
        format!("{} runs, at {rip:#x}. {vmcs12}{vmcs02}\n{view}", if in_l2 { "L2" } else { "L1" })
    }
}
