//! VMX instructions as L1 executes them (SDM Vol. 3D chapter 31), one file each.
//!
//! Each function does what the manual's pseudo-code does, in its order, given the VM exit
//! that the instruction caused. What the hypervisor must then do is the [`Outcome`].
//!
//! An exit from L2 is not for here: routing decides first whose it is, and what L2 executes
//! exits to L1. The exceptions are what L0 does on L2's behalf: VMFUNC ([`vmfunc`]), and VMREAD
//! and VMWRITE with VMCS shadowing ([`shadowed`]).
//!
//! Not supported: SMX operation, the dual-monitor treatment of SMM, A20M (the A20 line is
//! never masked).

mod entry;
mod invept;
mod invvpid;
pub mod shadowed;
mod vmcall;
mod vmclear;
pub mod vmfunc;
mod vmptrld;
mod vmptrst;
mod vmread;
mod vmwrite;
mod vmxoff;
mod vmxon;

#[cfg(test)]
mod tests;

use engine::{LinearFault, VmExit};
use memory::L1Gpa;
use x86_spec::exit::ExitReason;

use crate::capabilities::Capabilities;
use crate::fields::{Access, Field};
use crate::l1::{Fault, L1, L1Ext};
use crate::operand::{self, InstructionInfo};
use crate::state::{VmResult, VmxState};

pub use entry::EntryKind;

/// What INVEPT or INVVPID invalidates, besides what L0 itself derived from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// Guest-physical and combined mappings of the EPT12 with this pointer (INVEPT type 1).
    Eptp(u64),
    /// Those of every EPT12 (INVEPT type 2).
    AllEptps,
    /// Mappings of one linear address, tagged with L1's VPID (INVVPID type 0).
    Address {
        /// The VPID.
        vpid: u16,
        /// The linear address.
        linear: u64,
    },
    /// All mappings tagged with L1's VPID (INVVPID type 1).
    Vpid(u16),
    /// All mappings tagged with any VPID that L1 can use (INVVPID type 2).
    AllVpids,
    /// Those tagged with L1's VPID, except global ones (INVVPID type 3).
    VpidRetainGlobals(u16),
}

/// What the hypervisor must do after a VMX instruction of L1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Skip the instruction; RFLAGS tell the result ([`VmResult::rflags`]).
    Complete(VmResult),
    /// Invalidate, then complete with VMsucceed.
    Invalidate(Invalidation),
    /// Inject the fault; RIP stays.
    Fault(Fault),
    /// Handle this exit, which the access to the memory operand caused, then let the
    /// instruction be executed again; RIP stays.
    Exit(VmExit),
    /// Go on with VM entry: check controls and host state (their failure completes the
    /// instruction with error 7 or 8), then guest state. RIP is not advanced: where L1 goes on
    /// after L2's exit is host state in its VMCS.
    Enter(EntryKind),
}

impl From<Fault> for Outcome {
    fn from(f: Fault) -> Self {
        Self::Fault(f)
    }
}

impl From<LinearFault> for Outcome {
    fn from(f: LinearFault) -> Self {
        match f {
            LinearFault::Exception { vector, error_code, address } => Self::Fault(Fault {
                vector,
                error_code,
                cr2: (vector == x86_spec::exception::PF).then_some(address),
            }),
            LinearFault::Exit(exit) => Self::Exit(exit),
        }
    }
}

impl From<VmResult> for Outcome {
    fn from(r: VmResult) -> Self {
        Self::Complete(r)
    }
}

/// Executes the VMX instruction of L1 that caused `exit`. `None` when the exit has another
/// reason.
pub fn execute<T: L1 + ?Sized>(
    state: &mut VmxState,
    caps: &Capabilities,
    l1: &mut T,
    exit: &VmExit,
) -> Option<Outcome> {
    let result = match exit.reason {
        ExitReason::Vmread => vmread::vmread(state, caps, l1, exit),
        ExitReason::Vmwrite => vmwrite::vmwrite(state, caps, l1, exit),
        ExitReason::Vmresume => entry::vmresume(state, caps, l1),
        ExitReason::Vmlaunch => entry::vmlaunch(state, caps, l1),
        ExitReason::Vmptrld => vmptrld::vmptrld(state, caps, l1, exit),
        ExitReason::Vmptrst => vmptrst::vmptrst(state, l1, exit),
        ExitReason::Vmclear => vmclear::vmclear(state, caps, l1, exit),
        ExitReason::Vmxon => vmxon::vmxon(state, caps, l1, exit),
        ExitReason::Vmxoff => vmxoff::vmxoff(state, l1),
        ExitReason::Invept => invept::invept(state, caps, l1, exit),
        ExitReason::Invvpid => invvpid::invvpid(state, caps, l1, exit),
        ExitReason::Vmcall => vmcall::vmcall(state, l1),
        ExitReason::Vmfunc => Err(Fault::UD.into()),
        _ => return None,
    };
    let (Ok(outcome) | Err(outcome)) = result;
    Some(outcome)
}

/// What an instruction comes to; an error is one that ended it early.
type Execution = Result<Outcome, Outcome>;

/// #UD outside protected mode, in virtual-8086 and in compatibility mode, which every VMX
/// instruction but VMCALL and VMFUNC has (the first condition in each one's pseudo-code).
fn check_mode<T: L1 + ?Sized>(l1: &T) -> Result<(), Fault> {
    let protected = l1.cr0() & x86_spec::reg::cr0::PE != 0;
    let compatibility = l1.long_mode() && !l1.is_64bit();
    if !protected || l1.virtual_8086() || compatibility { Err(Fault::UD) } else { Ok(()) }
}

/// #UD outside VMX operation.
fn check_vmx_operation(state: &VmxState) -> Result<(), Fault> {
    if state.in_vmx_operation() { Ok(()) } else { Err(Fault::UD) }
}

/// #GP(0) with CPL above 0.
fn check_privilege<T: L1 + ?Sized>(l1: &T) -> Result<(), Fault> {
    if l1.cpl() == 0 { Ok(()) } else { Err(Fault::GP) }
}

/// What all but VMXON, VMCALL and VMFUNC begin with.
fn check_root<T: L1 + ?Sized>(state: &VmxState, l1: &T) -> Result<(), Fault> {
    check_vmx_operation(state)?;
    check_mode(l1)?;
    check_privilege(l1)
}

/// The 64-bit physical address in memory that VMXON, VMCLEAR and VMPTRLD take.
fn pointer_operand<T: L1 + ?Sized>(l1: &mut T, exit: &VmExit) -> Result<L1Gpa, LinearFault> {
    Ok(L1Gpa(u64::from_le_bytes(operand::read(l1, exit)?)))
}

/// Whether a region can be at `pointer`: 4-KiB aligned, within the physical-address width.
fn valid_region(caps: &Capabilities, pointer: L1Gpa) -> bool {
    pointer.page_offset() == 0 && caps.is_physical(pointer.0)
}

/// The first dword of a region: revision identifier and shadow-VMCS indicator.
fn region_revision<T: L1 + ?Sized>(l1: &T, pointer: L1Gpa) -> u32 {
    let mut dword = [0; 4];
    l1.physical().read(pointer, &mut dword);
    u32::from_le_bytes(dword)
}

/// A register operand of the operand size: 64 bits in 64-bit mode, else 32.
fn register_operand<T: L1 + ?Sized>(l1: &T, index: usize) -> u64 {
    let value = l1.gpr(index);
    if l1.is_64bit() { value } else { value & 0xffff_ffff }
}

/// The field that VMREAD or VMWRITE names in its register operand; `None` when this L1 has
/// no such field, or bits 63:32 of a 64-bit operand are not all 0.
fn field_operand<T: L1 + ?Sized>(caps: &Capabilities, l1: &T, exit: &VmExit) -> Option<(Field, Access)> {
    let operand = register_operand(l1, InstructionInfo(exit.instruction_info).reg2());
    let (field, access) = Field::from_encoding(u32::try_from(operand).ok()?)?;
    caps.has_field(field).then_some((field, access))
}
