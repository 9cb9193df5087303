//! VMPTRLD: make a VMCS current.

use engine::VmExit;
use x86_spec::controls::SecondaryControls;

use super::{Execution, check_root, pointer_operand, region_revision, valid_region};
use crate::capabilities::Capabilities;
use crate::explain::InstructionError;
use crate::l1::L1;
use crate::state::{VmResult, VmxState};
use crate::vmcs12::{REVISION, SHADOW_INDICATOR};

/// VMPTRLD (SDM Vol. 3D §31.3).
pub(super) fn vmptrld<T: L1 + ?Sized>(
    state: &mut VmxState,
    caps: &Capabilities,
    l1: &mut T,
    exit: &VmExit,
) -> Execution {
    check_root(state, l1)?;
    let pointer = pointer_operand(l1, exit)?;
    if !valid_region(caps, pointer) {
        return Ok(state.fail(InstructionError::VmptrldInvalidAddress).into());
    }
    if state.vmxon_pointer() == Some(pointer) {
        return Ok(state.fail(InstructionError::VmptrldVmxonPointer).into());
    }
    if !accepts_revision(caps, region_revision(l1, pointer)) {
        return Ok(state.fail(InstructionError::VmptrldWrongRevision).into());
    }
    state.load(l1.physical(), pointer);
    Ok(VmResult::Succeed.into())
}

/// The revision identifier must be ours; the shadow-VMCS indicator needs the control.
fn accepts_revision(caps: &Capabilities, revision: u32) -> bool {
    let shadow = revision & SHADOW_INDICATOR != 0;
    revision & !SHADOW_INDICATOR == REVISION
        && (!shadow || caps.has_secondary(SecondaryControls::VMCS_SHADOWING))
}
