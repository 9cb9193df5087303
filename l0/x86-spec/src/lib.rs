//! Constants and formats of the architecture: registers, exceptions, VM-exit reasons and
//! qualifications, EPT entries, VMX capabilities. No behaviour, no `unsafe`.
//!
//! VMCS field encodings, control bits and MSR numbers come from the `x86` crate; what
//! that lacks is here. "SDM" is the Intel 64 and IA-32 Architectures Software
//! Developer's Manual.

pub mod caps;
pub mod ept;
pub mod exception;
pub mod exit;
pub mod instruction_error;
pub mod interruption;
pub mod msr;
pub mod pci;
pub mod pmu;
pub mod reg;
pub mod segment;

/// VMX controls, as the `x86` crate names them (SDM Vol. 3C §25.6–25.8).
pub mod controls {
    pub use x86::vmx::vmcs::control::{
        EntryControls, ExitControls, PinbasedControls, PrimaryControls, SecondaryControls,
    };
}
/// VMCS field encodings (SDM Vol. 3D appendix B).
pub mod vmcs_field {
    pub use x86::vmx::vmcs::{control, guest, host, ro};
}
