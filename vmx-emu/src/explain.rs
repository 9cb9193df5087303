//! What usually is behind a VM-instruction error, and which can't occur.

pub use x86_spec::instruction_error::InstructionError;

/// Why it can't occur with what L1 is offered; `None` if it can.
pub const fn never(error: InstructionError) -> Option<&'static str> {
    match error {
        InstructionError::VmresumeAfterVmxoff => {
            Some("the launch state is in the VMCS region, where VMXOFF leaves it")
        }
        InstructionError::ReadOnlyComponent => {
            Some("IA32_VMX_MISC bit 29 is 1: VM-exit information fields can be written")
        }
        InstructionError::InvalidExecutivePointer
        | InstructionError::NonLaunchedExecutive
        | InstructionError::ExecutiveNotVmxonPointer
        | InstructionError::VmcallNonClear
        | InstructionError::VmcallInvalidExitControls
        | InstructionError::VmcallWrongMsegRevision
        | InstructionError::VmxoffDualMonitor
        | InstructionError::VmcallInvalidSmmFeatures
        | InstructionError::InvalidExecutiveControls => Some("there is no dual-monitor treatment of SMM"),
        _ => None,
    }
}

/// One line on the content of a VM-instruction error field, whatever it holds.
pub fn instruction_error(number: u32) -> String {
    match InstructionError::from_number(number) {
        Some(e) => format!("{e} ({})", e.hint()),
        None => format!("VM-instruction error {number}: not defined by the SDM"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip() {
        for e in InstructionError::ALL {
            assert_eq!(InstructionError::from_number(e.number()), Some(*e));
            assert!(instruction_error(e.number()).contains(e.description()));
        }
        // Table 31-1 has no 0, 14, 21 and 27.
        for n in [0, 14, 21, 27, 29] {
            assert_eq!(InstructionError::from_number(n), None);
            assert!(instruction_error(n).contains("not defined"));
        }
        assert_eq!(InstructionError::ALL.len(), 25);
    }
}
