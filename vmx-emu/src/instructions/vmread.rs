//! VMREAD: read a field of the current VMCS.

use engine::{LinearFault, VmExit};

use super::{Execution, check_root, field_operand};
use crate::capabilities::Capabilities;
use crate::explain::InstructionError;
use crate::fields::OperandSize;
use crate::l1::{L1, L1Ext};
use crate::operand::{self, InstructionInfo};
use crate::state::{VmResult, VmxState};

/// VMREAD (SDM Vol. 3D §31.3).
pub(super) fn vmread<T: L1 + ?Sized>(
    state: &mut VmxState,
    caps: &Capabilities,
    l1: &mut T,
    exit: &VmExit,
) -> Execution {
    check_root(state, l1)?;
    let Some(vmcs) = state.current().filter(|_| state.region_pointer().is_some()) else {
        return Ok(VmResult::FailInvalid.into());
    };
    let Some((field, access)) = field_operand(caps, l1, exit) else {
        return Ok(state.fail(InstructionError::UnsupportedComponent).into());
    };
    let value = vmcs.read(field, access, l1.operand_size());
    store(l1, exit, value)?;
    Ok(VmResult::Succeed.into())
}

/// Stores to the primary operand, of 64 bits in 64-bit mode, else 32.
pub(super) fn store<T: L1 + ?Sized>(l1: &mut T, exit: &VmExit, value: u64) -> Result<(), LinearFault> {
    let info = InstructionInfo(exit.instruction_info);
    if info.is_register() {
        l1.set_gpr(info.reg1(), value);
        return Ok(());
    }
    match l1.operand_size() {
        OperandSize::Bits64 => operand::write(l1, exit, &value.to_le_bytes()),
        OperandSize::Bits32 => operand::write(l1, exit, &(value as u32).to_le_bytes()),
    }
}
