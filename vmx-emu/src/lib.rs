//! VMX for L1: what L1's VMX instructions do, its VMCS (VMCS12), and what it is offered.
//!
//! Pure logic: no I/O, no engine, no global state. Memory and registers of L1 are reached
//! through small traits that the hypervisor implements.

pub mod capabilities;
pub mod checks;
pub mod enter;
pub mod evmcs;
pub mod explain;
pub mod fields;
pub mod instructions;
pub mod l1;
pub mod merge;
pub mod operand;
pub mod physical;
pub mod reflect;
pub mod route;
pub mod state;
pub mod view;
pub mod vmcs12;
pub mod vmcs_page;

#[cfg(test)]
mod testing;

pub use capabilities::{Capabilities, FeatureControl, L1Cpu};
pub use explain::InstructionError;
pub use fields::{Access, Field, FieldSet, FieldType, OperandSize, Width};
pub use instructions::{EntryKind, Invalidation, Outcome};
pub use l1::{Fault, L1};
pub use physical::L1Physical;
pub use state::{Operation, VmResult, VmxState};
pub use vmcs12::{LaunchState, Vmcs12, shadow_layout};
