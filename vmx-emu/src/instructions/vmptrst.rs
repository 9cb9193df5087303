//! VMPTRST: store the current-VMCS pointer.

use engine::VmExit;

use super::{Execution, check_root};
use crate::l1::L1;
use crate::operand;
use crate::state::{VmResult, VmxState};

/// VMPTRST (SDM Vol. 3D §31.3). An invalid pointer is all ones (Vol. 3C §25.1); with
/// an enlightened VMCS in use there is no other.
pub(super) fn vmptrst<T: L1 + ?Sized>(state: &mut VmxState, l1: &mut T, exit: &VmExit) -> Execution {
    check_root(state, l1)?;
    let pointer = state.region_pointer().map_or(u64::MAX, |p| p.0);
    operand::write(l1, exit, &pointer.to_le_bytes())?;
    Ok(VmResult::Succeed.into())
}
