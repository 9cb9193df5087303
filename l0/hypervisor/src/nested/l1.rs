//! L1 as `vmx-emu` sees it: the registers of VMCS01 and L1's memory.

use engine::{EngineVmcs, GuestRegs, GuestState, LinearFault, Vcpu};
use memory::L1Ram;
use vmx_emu::{L1, L1Physical};

/// One vCPU stopped at a VMX instruction of L1.
pub(crate) struct L1View<'a, V: Vcpu> {
    pub vcpu: &'a mut V,
    pub vmcs01: &'a mut EngineVmcs,
    pub regs: &'a mut GuestRegs,
    pub ram: &'a L1Ram,
}

/// What a guest reads of a control register: host-owned bits come from the read shadow (SDM
/// Vol. 3C §25.6.6).
const fn visible(real: u64, mask: u64, shadow: u64) -> u64 {
    real & !mask | shadow & mask
}

impl<V: Vcpu> L1 for L1View<'_, V> {
    fn guest(&self) -> &GuestState {
        &self.vmcs01.guest
    }
    fn guest_mut(&mut self) -> &mut GuestState {
        &mut self.vmcs01.guest
    }
    fn regs(&self) -> &GuestRegs {
        self.regs
    }
    fn regs_mut(&mut self) -> &mut GuestRegs {
        self.regs
    }
    fn cr0(&self) -> u64 {
        let c = &self.vmcs01.controls;
        visible(self.vmcs01.guest.cr0, c.cr0_mask, c.cr0_shadow)
    }
    fn cr4(&self) -> u64 {
        let c = &self.vmcs01.controls;
        visible(self.vmcs01.guest.cr4, c.cr4_mask, c.cr4_shadow)
    }
    fn physical(&self) -> &dyn L1Physical {
        self.ram
    }
    fn read_linear(&mut self, linear: u64, buf: &mut [u8]) -> Result<(), LinearFault> {
        self.vcpu.read_linear(self.vmcs01, self.regs, linear, buf)
    }
    fn write_linear(&mut self, linear: u64, buf: &[u8]) -> Result<(), LinearFault> {
        self.vcpu.write_linear(self.vmcs01, self.regs, linear, buf)
    }
}
