//! VMCLEAR: write a VMCS to memory and make its launch state clear.

use engine::VmExit;

use super::{Execution, check_root, pointer_operand, region_revision, valid_region};
use crate::capabilities::Capabilities;
use crate::evmcs;
use crate::explain::InstructionError;
use crate::l1::L1;
use crate::state::{VmResult, VmxState};
use crate::vmcs12::{LaunchState, clear_in_memory};

/// VMCLEAR (SDM Vol. 3D §31.3).
pub(super) fn vmclear<T: L1 + ?Sized>(
    state: &mut VmxState,
    caps: &Capabilities,
    l1: &mut T,
    exit: &VmExit,
) -> Execution {
    check_root(state, l1)?;
    let pointer = pointer_operand(l1, exit)?;
    if !valid_region(caps, pointer) {
        return Ok(state.fail(InstructionError::VmclearInvalidAddress).into());
    }
    if state.vmxon_pointer() == Some(pointer) {
        return Ok(state.fail(InstructionError::VmclearVmxonPointer).into());
    }
    if state.current_pointer() == Some(pointer) {
        if let Some(vmcs) = state.current_mut() {
            vmcs.launch_state = LaunchState::Clear;
        }
        state.release(l1.physical());
    } else if state.assist_page.is_some() && region_revision(l1, pointer) == evmcs::VERSION {
        // An enlightened VMCS that is not in use: it has no launch state, and L0 keeps nothing of it.
    } else {
        clear_in_memory(l1.physical(), pointer);
    }
    Ok(VmResult::Succeed.into())
}
