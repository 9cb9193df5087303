//! VMCALL by L1: it would call an SMM-transfer monitor, and there is none.

use super::{Execution, check_privilege, check_vmx_operation};
use crate::explain::InstructionError;
use crate::l1::{Fault, L1, L1Ext};
use crate::state::VmxState;

/// VMCALL outside VMX non-root operation (SDM Vol. 3D §31.3).
pub(super) fn vmcall<T: L1 + ?Sized>(state: &mut VmxState, l1: &mut T) -> Execution {
    check_vmx_operation(state)?;
    if l1.virtual_8086() || l1.long_mode() && !l1.is_64bit() {
        return Err(Fault::UD.into());
    }
    check_privilege(l1)?;
    Ok(state.fail(InstructionError::VmcallInRoot).into())
}
