//! VMREAD and VMWRITE by L2 that access L1's shadow VMCS (SDM Vol. 3C §25.10, §26.1.3).
//!
//! VMCS02 has no VMCS shadowing, so that these instructions exit to L0. Routing has found that
//! VMCS12's VMREAD or VMWRITE bitmap does not want the exit; then L0 accesses the VMCS that
//! VMCS12's link pointer names, in its region in L1's memory.

use engine::VmExit;
use memory::L1Gpa;
use x86_spec::exit::ExitReason;

use super::{Execution, Outcome, check_privilege, field_operand, vmread, vmwrite};
use crate::capabilities::Capabilities;
use crate::explain::InstructionError;
use crate::fields::{Access, Field, OperandSize};
use crate::l1::{L1, L1Ext};
use crate::physical::L1Physical;
use crate::state::VmResult;
use crate::vmcs12::{self, Vmcs12};

/// Executes L2's VMREAD or VMWRITE that caused `exit`, on `l2`'s registers and linear memory.
/// `None` when the exit has another reason.
pub fn execute<T: L1 + ?Sized>(
    vmcs: &Vmcs12,
    caps: &Capabilities,
    l2: &mut T,
    exit: &VmExit,
) -> Option<Outcome> {
    let link = vmcs.get(Field::LinkPointer);
    let result = match exit.reason {
        ExitReason::Vmread => read(link, caps, l2, exit),
        ExitReason::Vmwrite => write(link, caps, l2, exit),
        _ => return None,
    };
    let (Ok(outcome) | Err(outcome)) = result;
    Some(outcome)
}

/// VMREAD in VMX non-root operation (SDM Vol. 3D §31.3).
fn read<T: L1 + ?Sized>(link: u64, caps: &Capabilities, l2: &mut T, exit: &VmExit) -> Execution {
    check_privilege(l2)?;
    let Some(shadow) = shadow_vmcs(link) else { return Ok(VmResult::FailInvalid.into()) };
    let Some((field, access)) = field_operand(caps, l2, exit) else {
        return Ok(fail(l2.physical(), shadow, InstructionError::UnsupportedComponent));
    };
    let value = vmcs12::read_in_memory(l2.physical(), shadow, field);
    let part = field.read_part(access, l2.operand_size(), value);
    vmread::store(l2, exit, part)?;
    Ok(VmResult::Succeed.into())
}

/// VMWRITE in VMX non-root operation (SDM Vol. 3D §31.3).
fn write<T: L1 + ?Sized>(link: u64, caps: &Capabilities, l2: &mut T, exit: &VmExit) -> Execution {
    check_privilege(l2)?;
    let Some(shadow) = shadow_vmcs(link) else { return Ok(VmResult::FailInvalid.into()) };
    let Some((field, access)) = field_operand(caps, l2, exit) else {
        return Ok(fail(l2.physical(), shadow, InstructionError::UnsupportedComponent));
    };
    if !vmwrite::is_writable(caps, field) {
        return Ok(fail(l2.physical(), shadow, InstructionError::ReadOnlyComponent));
    }
    let source = vmwrite::source(l2, exit)?;
    modify(l2.physical(), shadow, field, access, l2.operand_size(), source);
    Ok(VmResult::Succeed.into())
}

/// The shadow VMCS, unless the link pointer is invalid: all ones (SDM Vol. 3C §25.4.2).
fn shadow_vmcs(link: u64) -> Option<L1Gpa> {
    (link != u64::MAX).then_some(L1Gpa(link))
}

fn modify(
    memory: &dyn L1Physical,
    shadow: L1Gpa,
    field: Field,
    access: Access,
    size: OperandSize,
    source: u64,
) {
    let old = vmcs12::read_in_memory(memory, shadow, field);
    vmcs12::write_in_memory(memory, shadow, field, field.write_part(access, size, old, source));
}

/// VMfailValid with the number in the shadow VMCS: it is the one that the instruction uses.
fn fail(memory: &dyn L1Physical, shadow: L1Gpa, error: InstructionError) -> Outcome {
    vmcs12::write_in_memory(memory, shadow, Field::VmInstructionError, error.number() as u64);
    VmResult::FailValid(error).into()
}
