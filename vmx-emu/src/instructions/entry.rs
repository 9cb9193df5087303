//! VMLAUNCH and VMRESUME up to the checks of the VMCS's content.

use engine::interruptibility;

use super::{Execution, Outcome, check_root, valid_region};
use crate::capabilities::Capabilities;
use crate::evmcs::{self, Evmcs};
use crate::explain::InstructionError;
use crate::l1::L1;
use crate::physical::L1Physical;
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
pub(super) fn vmlaunch<T: L1 + ?Sized>(state: &mut VmxState, caps: &Capabilities, l1: &mut T) -> Execution {
    enter(state, caps, l1, EntryKind::Launch)
}

/// VMRESUME (SDM Vol. 3D §31.3).
pub(super) fn vmresume<T: L1 + ?Sized>(state: &mut VmxState, caps: &Capabilities, l1: &mut T) -> Execution {
    enter(state, caps, l1, EntryKind::Resume)
}

/// Makes the VMCS current that L1's assist page names, if it names one.
///
/// VMLAUNCH reads all of it, and so does VMRESUME unless it is the one of the last entry.
/// It has no launch state: either instruction enters it.
fn select_enlightened(
    state: &mut VmxState,
    caps: &Capabilities,
    memory: &dyn L1Physical,
    kind: EntryKind,
) -> Result<(), VmResult> {
    let named = state.assist_page.and_then(|page| evmcs::nested_vmcs(memory, page));
    let Some(pointer) = named else {
        state.drop_enlightened();
        return Ok(());
    };
    let evmcs = Evmcs::read(memory, pointer);
    let possible = valid_region(caps, pointer) && state.vmxon_pointer() != Some(pointer);
    if !possible || evmcs.version() != evmcs::VERSION {
        state.drop_enlightened();
        return Err(VmResult::FailInvalid);
    }
    state.load_enlightened(memory, pointer, &evmcs, kind == EntryKind::Resume);
    if let Some(vmcs) = state.current_mut() {
        vmcs.launch_state = match kind {
            EntryKind::Launch => LaunchState::Clear,
            EntryKind::Resume => LaunchState::Launched,
        };
    }
    Ok(())
}

/// The basic VM-entry checks, in order (SDM Vol. 3C §27.1).
fn enter<T: L1 + ?Sized>(state: &mut VmxState, caps: &Capabilities, l1: &T, kind: EntryKind) -> Execution {
    check_root(state, l1)?;
    if let Err(result) = select_enlightened(state, caps, l1.physical(), kind) {
        return Ok(result.into());
    }
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
