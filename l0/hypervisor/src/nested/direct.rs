//! Direct access of L1 to its VMCS: an enlightened VMCS in L1's own memory ([`vmx_emu::evmcs`]).
//!
//! VMLAUNCH and VMRESUME take it over (`vmx-emu`); here it is brought up to date before L1 runs on.

use engine::Engine;

use crate::vcpu_loop::VcpuLoop;

impl<E: Engine> VcpuLoop<E> {
    /// After an exit of L2 to L1, or an entry that failed as one does.
    pub(crate) fn store_enlightened_vmcs(&self) {
        if let Some(n) = &self.nested {
            n.state.store_enlightened(self.vm().ram());
        }
    }

    /// After VMfailValid.
    pub(crate) fn store_instruction_error(&self) {
        if let Some(n) = &self.nested {
            n.state.store_instruction_error(self.vm().ram());
        }
    }
}
