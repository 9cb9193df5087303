//! VMCS shadowing for L1 (SDM Vol. 3C §25.10): the engine executes L1's VMREAD and VMWRITE against a
//! page of L0's instead of exiting.

use engine::Engine;
use memory::{MachineAddr, MachineMemory, MemoryError, PagePool};
use vmx_emu::vmcs12::USED;
use vmx_emu::{Capabilities, VmxState, vmcs_page};
use x86_spec::controls::SecondaryControls;

use crate::vcpu_loop::VcpuLoop;

/// How L1 accesses its VMCS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VmcsAccess {
    /// Each VMREAD and VMWRITE exits to L0.
    Trapped,
    /// The engine does them in a shadow VMCS, if it can.
    #[default]
    Shadow,
    /// L1 that knows Hyper-V's enlightened VMCS uses ordinary loads and stores; VMREAD and VMWRITE exit.
    Direct,
}

/// The page, and which fields go there.
#[derive(Debug)]
pub(super) struct ShadowPage {
    page: MachineAddr,
    vmread_bitmap: MachineAddr,
    vmwrite_bitmap: MachineAddr,
}

impl ShadowPage {
    /// # Errors
    /// [`MemoryError`] when L0's pool is used up.
    pub fn new(memory: &MachineMemory, pool: &PagePool, caps: &Capabilities) -> Result<Self, MemoryError> {
        let (page, vmread_bitmap, vmwrite_bitmap) = (pool.alloc()?, pool.alloc()?, pool.alloc()?);
        memory.write(vmread_bitmap, &vmcs_page::vmread_bitmap(caps)[..])?;
        memory.write(vmwrite_bitmap, &vmcs_page::vmwrite_bitmap(caps)[..])?;
        Ok(Self { page, vmread_bitmap, vmwrite_bitmap })
    }

    /// Takes over what L1 wrote since [`Self::store`].
    fn load(&self, memory: &MachineMemory, state: &mut VmxState) -> Result<(), MemoryError> {
        let mut bytes = [0; USED];
        memory.read(self.page, &mut bytes)?;
        vmcs_page::load(state, &bytes);
        Ok(())
    }

    /// Shows L1 its current VMCS; whether there is one.
    fn store(&self, memory: &MachineMemory, state: &VmxState) -> Result<bool, MemoryError> {
        let mut bytes = [0; USED];
        let current = vmcs_page::store(state, &mut bytes);
        if current {
            memory.write(self.page, &bytes)?;
        }
        Ok(current)
    }
}

impl<E: Engine> VcpuLoop<E> {
    /// To be called when L1 stopped at a VMX instruction, before its VMCS is looked at.
    pub(crate) fn load_shadow_vmcs(&mut self) {
        let shadowing = self.vmcs.controls.secondary.contains(SecondaryControls::VMCS_SHADOWING);
        let memory = self.vm().memory().clone();
        if let Some(n) = self.nested.as_mut()
            && let Some(shadow) = &n.shadow
            && shadowing
            && let Err(e) = shadow.load(&memory, &mut n.state)
        {
            // The page is from L0's own pool.
            tracing::error!("shadow VMCS: {e}");
        }
    }

    /// To be called before L1 runs on after a VMX instruction or an exit of L2.
    pub(crate) fn store_shadow_vmcs(&mut self) {
        let memory = self.vm().memory().clone();
        let Some(n) = self.nested.as_ref() else { return };
        let Some(shadow) = &n.shadow else { return };
        let current = shadow.store(&memory, &n.state).unwrap_or(false);
        let c = &mut self.vmcs.controls;
        c.secondary.set(SecondaryControls::VMCS_SHADOWING, current);
        c.shadow_vmcs = if current { shadow.page } else { MachineAddr(u64::MAX) };
        (c.vmread_bitmap, c.vmwrite_bitmap) = (shadow.vmread_bitmap, shadow.vmwrite_bitmap);
    }
}
