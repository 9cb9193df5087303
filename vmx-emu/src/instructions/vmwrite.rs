//! VMWRITE: write a field of the current VMCS.

use engine::{LinearFault, VmExit};

use super::{Execution, check_root, field_operand, register_operand};
use crate::capabilities::{Capabilities, misc};
use crate::explain::InstructionError;
use crate::fields::{Field, FieldType, OperandSize};
use crate::l1::{L1, L1Ext};
use crate::operand::{self, InstructionInfo};
use crate::state::{VmResult, VmxState};

/// VMWRITE (SDM Vol. 3D §31.3). The source is read after the checks of the field, as the
/// pseudo-code has it.
pub(super) fn vmwrite<T: L1 + ?Sized>(
    state: &mut VmxState,
    caps: &Capabilities,
    l1: &mut T,
    exit: &VmExit,
) -> Execution {
    check_root(state, l1)?;
    if state.region_pointer().is_none() {
        return Ok(VmResult::FailInvalid.into());
    }
    let Some((field, access)) = field_operand(caps, l1, exit) else {
        return Ok(state.fail(InstructionError::UnsupportedComponent).into());
    };
    if !is_writable(caps, field) {
        return Ok(state.fail(InstructionError::ReadOnlyComponent).into());
    }
    let value = source(l1, exit)?;
    let size = l1.operand_size();
    if let Some(vmcs) = state.current_mut() {
        vmcs.write(field, access, size, value);
    }
    Ok(VmResult::Succeed.into())
}

/// VM-exit information fields can be written if IA32_VMX_MISC bit 29 says so.
pub(super) fn is_writable(caps: &Capabilities, field: Field) -> bool {
    field.field_type() != FieldType::ReadOnly || caps.misc & misc::VMWRITE_ANY_FIELD != 0
}

/// The primary operand, of 64 bits in 64-bit mode, else 32.
pub(super) fn source<T: L1 + ?Sized>(l1: &mut T, exit: &VmExit) -> Result<u64, LinearFault> {
    let info = InstructionInfo(exit.instruction_info);
    if info.is_register() {
        return Ok(register_operand(l1, info.reg1()));
    }
    match l1.operand_size() {
        OperandSize::Bits64 => operand::read(l1, exit).map(u64::from_le_bytes),
        OperandSize::Bits32 => operand::read(l1, exit).map(|b| u32::from_le_bytes(b) as u64),
    }
}
