//! VM exits as the engine reports them.

use memory::Gpa;
use x86_spec::exit::ExitReason;
use x86_spec::interruption::InterruptionInfo;

/// The SDM's exit-information fields (Vol. 3C §25.9, §28.2), so that reflecting an exit
/// to L1 is a copy. Fields that the reason does not define are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmExit {
    /// Basic exit reason.
    pub reason: ExitReason,
    /// The exit is a failed VM entry (bit 31 of the exit reason).
    pub entry_failure: bool,
    /// Exit qualification.
    pub qualification: u64,
    /// Exit interruption information.
    pub interruption_info: InterruptionInfo,
    /// Exit interruption error code.
    pub interruption_error_code: u32,
    /// IDT-vectoring information.
    pub idt_vectoring: InterruptionInfo,
    /// IDT-vectoring error code.
    pub idt_vectoring_error_code: u32,
    /// Instruction length in bytes.
    pub instruction_length: u32,
    /// Instruction information.
    pub instruction_info: u32,
    /// Guest-linear address.
    pub guest_linear: u64,
    /// Guest-physical address.
    pub guest_physical: Gpa,
}

impl VmExit {
    /// An exit for `reason` with everything else zero.
    pub const fn new(reason: ExitReason) -> Self {
        Self {
            reason,
            entry_failure: false,
            qualification: 0,
            interruption_info: InterruptionInfo::NONE,
            interruption_error_code: 0,
            idt_vectoring: InterruptionInfo::NONE,
            idt_vectoring_error_code: 0,
            instruction_length: 0,
            instruction_info: 0,
            guest_linear: 0,
            guest_physical: Gpa(0),
        }
    }

    /// The same with a qualification.
    pub const fn qualified(mut self, qualification: u64) -> Self {
        self.qualification = qualification;
        self
    }
}

/// Exit qualification of a VM-entry failure due to invalid guest state (SDM Vol. 3C §27.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum EntryFailure {
    /// Any check not named by the others.
    General = 0,
    /// PDPTE loading.
    Pdpte = 2,
    /// NMI injection while blocking by STI or MOV SS.
    NmiInjection = 3,
    /// The VMCS link pointer.
    LinkPointer = 4,
}
