//! VMLAUNCH and VMRESUME up to the checks of the VMCS's content.

use engine::interruptibility;

use super::{Execution, Outcome, check_root};
use crate::explain::InstructionError;
use crate::l1::L1;
use crate::state::{VmResult, VmxState};
use crate::vmcs12::LaunchState;

/// Which instruction enters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// VMLAUNCH.
    Launch,
    /// VMRESUME.
    Resume,
}

/// VMLAUNCH (SDM Vol. 3D §31.3).
pub(super) fn vmlaunch<T: L1 + ?Sized>(state: &mut VmxState, l1: &mut T) -> Execution {
    enter(state, l1, EntryKind::Launch)
}

/// VMRESUME (SDM Vol. 3D §31.3).
pub(super) fn vmresume<T: L1 + ?Sized>(state: &mut VmxState, l1: &mut T) -> Execution {
    enter(state, l1, EntryKind::Resume)
}

/// The basic VM-entry checks, in order (SDM Vol. 3C §27.1).
fn enter<T: L1 + ?Sized>(state: &mut VmxState, l1: &T, kind: EntryKind) -> Execution {
    check_root(state, l1)?;
    let Some(vmcs) = state.current().filter(|v| !v.shadow) else {
        return Ok(VmResult::FailInvalid.into());
    };
    let launch_state = vmcs.launch_state;
    if l1.guest().interruptibility & interruptibility::MOV_SS != 0 {
        return Ok(state.fail(InstructionError::EventsBlockedByMovSs).into());
    }
    match (kind, launch_state) {
        (EntryKind::Launch, LaunchState::Launched) => {
            Ok(state.fail(InstructionError::VmlaunchNonClear).into())
        }
        (EntryKind::Resume, LaunchState::Clear) => {
            Ok(state.fail(InstructionError::VmresumeNonLaunched).into())
        }
        _ => Ok(Outcome::Enter(kind)),
    }
}
