//! INVVPID: invalidate translations tagged with a VPID.

use engine::VmExit;
use x86_spec::caps::ept_vpid;

use super::register_operand;
use super::{Execution, Invalidation, Outcome, check_mode, check_privilege, check_vmx_operation};
use crate::capabilities::Capabilities;
use crate::explain::InstructionError;
use crate::l1::{Fault, L1};
use crate::operand::{self, InstructionInfo, is_canonical};
use crate::state::VmxState;

/// The INVVPID descriptor (SDM Vol. 3D §31.3, INVVPID).
struct Descriptor {
    vpid: u16,
    reserved: u64,
    linear: u64,
}

impl Descriptor {
    fn new(bytes: [u8; 16]) -> Self {
        let d = u128::from_le_bytes(bytes);
        Self { vpid: d as u16, reserved: d as u64 >> 16, linear: (d >> 64) as u64 }
    }
}

/// INVVPID (SDM Vol. 3D §31.3).
pub(super) fn invvpid<T: L1 + ?Sized>(
    state: &mut VmxState,
    caps: &Capabilities,
    l1: &mut T,
    exit: &VmExit,
) -> Execution {
    check_vmx_operation(state)?;
    check_mode(l1)?;
    if caps.ept_vpid & ept_vpid::INVVPID == 0 {
        return Err(Fault::UD.into());
    }
    check_privilege(l1)?;
    let ty = register_operand(l1, InstructionInfo(exit.instruction_info).reg2());
    // IA32_VMX_EPT_VPID_CAP bits 43:40 say which of types 0–3 are supported.
    if ty > 3 || caps.ept_vpid >> (40 + ty) & 1 == 0 {
        return Ok(state.fail(InstructionError::InvalidInvalidateOperand).into());
    }
    let descriptor = Descriptor::new(operand::read(l1, exit)?);
    match scope(ty, &descriptor, l1.cr4()) {
        Some(scope) => Ok(Outcome::Invalidate(scope)),
        None => Ok(state.fail(InstructionError::InvalidInvalidateOperand).into()),
    }
}

/// What a descriptor asks for; `None` when it is invalid for the type.
fn scope(ty: u64, d: &Descriptor, cr4: u64) -> Option<Invalidation> {
    if d.reserved != 0 || ty != 2 && d.vpid == 0 {
        return None;
    }
    match ty {
        0 if !is_canonical(d.linear, cr4) => None,
        0 => Some(Invalidation::Address { vpid: d.vpid, linear: d.linear }),
        1 => Some(Invalidation::Vpid(d.vpid)),
        2 => Some(Invalidation::AllVpids),
        _ => Some(Invalidation::VpidRetainGlobals(d.vpid)),
    }
}
