//! VMX for L1: what L1's VMX instructions do, its VMCS (VMCS12), and what it is offered.
//!
//! Pure logic: no I/O, no engine, no global state. Memory and registers of L1 are reached
//! through small traits that the hypervisor implements.

pub mod capabilities;
pub mod fields;
pub mod vmcs12;

pub use capabilities::Capabilities;
pub use fields::{Access, Field, FieldSet, FieldType, OperandSize, Width};
pub use vmcs12::{LaunchState, Vmcs12};
