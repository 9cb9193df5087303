//! VMFUNC by L2, which L0 does where the engine does not (SDM Vol. 3C §26.5.6).
//!
//! In VMX root operation and outside VMX operation VMFUNC is #UD. Not supported: functions
//! other than EPTP switching; the EPTP index, which belongs to EPT-violation #VE.

use memory::L1Gpa;
use x86_spec::controls::{PrimaryControls, SecondaryControls};

use crate::capabilities::{Capabilities, VMFUNC_EPTP_SWITCHING};
use crate::fields::Field;
use crate::physical::L1Physical;
use crate::vmcs12::Vmcs12;

/// What VMFUNC in L2 does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmFunction {
    /// #UD: "enable VM functions" is 0.
    Undefined,
    /// A VM exit to L1 with reason VMFUNC.
    Exit,
    /// EPTP switching: the EPTP in VMCS12 has been replaced by this one, and L2 goes on with it
    /// after the instruction.
    SwitchEptp(u64),
}

/// VMFUNC executed by L2 with these values of EAX and ECX (SDM Vol. 3C §26.5.6.2, §26.5.6.3).
pub fn vmfunc(
    vmcs: &mut Vmcs12,
    caps: &Capabilities,
    memory: &dyn L1Physical,
    eax: u32,
    ecx: u32,
) -> VmFunction {
    if !enabled(vmcs) {
        return VmFunction::Undefined;
    }
    let function = 1u64.checked_shl(eax).unwrap_or(0);
    if vmcs.get(Field::VmFunctionControls) & function & VMFUNC_EPTP_SWITCHING == 0 {
        return VmFunction::Exit;
    }
    switch_eptp(vmcs, caps, memory, ecx)
}

/// "Enable VM functions" is 1, and so is "activate secondary controls", without which it
/// counts as 0.
fn enabled(vmcs: &Vmcs12) -> bool {
    vmcs.get32(Field::PrimaryControls) & PrimaryControls::SECONDARY_CONTROLS.bits() != 0
        && vmcs.get32(Field::SecondaryControls) & SecondaryControls::ENABLE_VM_FUNCTIONS.bits() != 0
}

/// EPTP switching, VM function 0 (SDM Vol. 3C §26.5.6.3): the list has 512 entries; one that
/// VM entry would not accept causes an exit.
fn switch_eptp(vmcs: &mut Vmcs12, caps: &Capabilities, memory: &dyn L1Physical, index: u32) -> VmFunction {
    if index >= 512 {
        return VmFunction::Exit;
    }
    let list = L1Gpa(vmcs.get(Field::EptpListAddress)).page_base();
    let eptp = memory.read_u64(list.offset(8 * index as u64));
    if !caps.allows_eptp(eptp) {
        return VmFunction::Exit;
    }
    vmcs.set(Field::Eptp, eptp);
    VmFunction::SwitchEptp(eptp)
}
