//! INVEPT: invalidate translations derived from EPT.

use engine::VmExit;
use x86_spec::caps::ept_vpid;

use super::register_operand;
use super::{Execution, Invalidation, Outcome, check_mode, check_privilege, check_vmx_operation};
use crate::capabilities::Capabilities;
use crate::explain::InstructionError;
use crate::l1::{Fault, L1};
use crate::operand::{self, InstructionInfo};
use crate::state::VmxState;

/// INVEPT (SDM Vol. 3D §31.3). Bits 127:64 of the descriptor are reserved, but the
/// pseudo-code does not check them.
pub(super) fn invept<T: L1 + ?Sized>(
    state: &mut VmxState,
    caps: &Capabilities,
    l1: &mut T,
    exit: &VmExit,
) -> Execution {
    check_vmx_operation(state)?;
    check_mode(l1)?;
    if caps.ept_vpid & ept_vpid::INVEPT == 0 {
        return Err(Fault::UD.into());
    }
    check_privilege(l1)?;
    let ty = register_operand(l1, InstructionInfo(exit.instruction_info).reg2());
    let supported = match ty {
        1 => caps.ept_vpid & ept_vpid::INVEPT_SINGLE != 0,
        2 => caps.ept_vpid & ept_vpid::INVEPT_ALL != 0,
        _ => false,
    };
    if !supported {
        return Ok(state.fail(InstructionError::InvalidInvalidateOperand).into());
    }
    let descriptor = u128::from_le_bytes(operand::read(l1, exit)?);
    let eptp = descriptor as u64;
    if ty == 2 {
        Ok(Outcome::Invalidate(Invalidation::AllEptps))
    } else if caps.allows_eptp(eptp) {
        Ok(Outcome::Invalidate(Invalidation::Eptp(eptp)))
    } else {
        Ok(state.fail(InstructionError::InvalidInvalidateOperand).into())
    }
}
