//! VMXON: enter VMX operation.

use engine::VmExit;
use x86_spec::reg::cr4;

use super::{Execution, check_mode, check_privilege, pointer_operand, region_revision, valid_region};
use crate::capabilities::Capabilities;
use crate::explain::InstructionError;
use crate::l1::{Fault, L1};
use crate::state::{VmResult, VmxState};
use crate::vmcs12::REVISION;

/// VMXON (SDM Vol. 3D §31.3).
pub(super) fn vmxon<T: L1 + ?Sized>(
    state: &mut VmxState,
    caps: &Capabilities,
    l1: &mut T,
    exit: &VmExit,
) -> Execution {
    check_enabled(l1)?;
    if state.in_vmx_operation() {
        check_privilege(l1)?;
        return Ok(state.fail(InstructionError::VmxonInRoot).into());
    }
    check_privilege(l1)?;
    check_supported(state, caps, l1)?;
    let pointer = pointer_operand(l1, exit)?;
    // Bit 31 of the first dword, the shadow indicator, must be 0 too.
    if !valid_region(caps, pointer) || region_revision(l1, pointer) != REVISION {
        return Ok(VmResult::FailInvalid.into());
    }
    state.start(pointer);
    Ok(VmResult::Succeed.into())
}

/// #UD by mode or without CR4.VMXE.
fn check_enabled<T: L1 + ?Sized>(l1: &T) -> Result<(), Fault> {
    check_mode(l1)?;
    if l1.cr4() & cr4::VMXE == 0 { Err(Fault::UD) } else { Ok(()) }
}

/// #GP(0) where CR0, CR4 or IA32_FEATURE_CONTROL does not allow VMX operation (SDM Vol. 3C
/// §24.7, §24.8).
fn check_supported<T: L1 + ?Sized>(state: &VmxState, caps: &Capabilities, l1: &T) -> Result<(), Fault> {
    let registers = caps.allows_cr0(l1.cr0(), false) && caps.allows_cr4(l1.cr4());
    if registers && state.feature_control.allows_vmxon() { Ok(()) } else { Err(Fault::GP) }
}
