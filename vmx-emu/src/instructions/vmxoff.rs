//! VMXOFF: leave VMX operation.

use super::{Execution, check_root};
use crate::l1::L1;
use crate::state::{VmResult, VmxState};

/// VMXOFF (SDM Vol. 3D §31.3). The current VMCS is written to its region, though software
/// should have used VMCLEAR (Vol. 3C §25.11.1).
pub(super) fn vmxoff<T: L1 + ?Sized>(state: &mut VmxState, l1: &mut T) -> Execution {
    check_root(state, l1)?;
    state.stop(l1.physical());
    Ok(VmResult::Succeed.into())
}
