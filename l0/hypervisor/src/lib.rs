//! L0 itself: what runs L1.
//!
//! The path of one exit: [`vcpu_loop`] enters the engine with VMCS01 ([`vmcs01`]) over EPT01
//! ([`ept01`]), the engine exits with an SDM exit reason, [`exits`] looks up who owns the
//! reason and calls its handler, which asks [`cpuid`], [`msr`] or the machine's devices
//! and changes guest state; then the loop delivers what is pending and enters again.
//!
//! Everything is generic over the engine, and nothing is global: a [`Vm`] is shared by
//! its vCPUs, each of which owns its VMCS01, registers and MSRs.
//!
//! VMX for L1 is `vmx-emu`'s and `ept-compress`'s; [`nested`] joins them to the loop.
//!
//! Not supported: more than one vCPU (the structure allows it), SMM.

mod apics;
pub mod board;
pub mod cpuid;
pub mod ept01;
pub mod exits;
mod hyperv;
pub mod msr;
mod nested;
pub mod report;
mod stats;
#[cfg(test)]
mod testing;
pub mod vcpu_loop;
pub mod vm;
pub mod vmcs01;

pub use board::Board;
pub use nested::{Ept02Config, EptSync, MAX_EPT02_PAGES, MIN_EPT02_PAGES, VmcsAccess};
pub use report::CrashReport;
pub use vcpu_loop::{RunEnd, Start, VcpuLoop};
pub use vm::{FailedEntries, Vm, VmBuilder, VmConfig, VmError, VmHandle};
