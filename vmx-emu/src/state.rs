//! The VMX side of one of L1's logical processors.

use memory::L1Gpa;

use crate::capabilities::{Capabilities, FeatureControl};
use crate::explain::InstructionError;
use crate::fields::Field;
use crate::physical::L1Physical;
use crate::vmcs12::{LaunchState, REGION_SIZE, Vmcs12};

/// Whether the processor is in VMX operation (SDM Vol. 3C §24.3), and where its VMXON region
/// is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Operation {
    /// Outside VMX operation.
    #[default]
    Off,
    /// VMX root operation: L1 runs.
    Root {
        /// The VMXON pointer.
        vmxon: L1Gpa,
    },
    /// VMX non-root operation: L2 runs.
    Guest {
        /// The VMXON pointer.
        vmxon: L1Gpa,
    },
}

/// The current VMCS.
#[derive(Clone, Debug)]
pub struct CurrentVmcs {
    /// Its region in L1's memory.
    pub pointer: L1Gpa,
    /// Its content, newer than the region's.
    pub vmcs: Box<Vmcs12>,
}

/// VMX state of one logical processor of L1.
///
/// Launch states of VMCSs other than the current one are in their regions.
#[derive(Clone, Debug)]
pub struct VmxState {
    operation: Operation,
    current: Option<CurrentVmcs>,
    /// IA32_FEATURE_CONTROL.
    pub feature_control: FeatureControl,
}

impl VmxState {
    /// Outside VMX operation, with IA32_FEATURE_CONTROL as firmware left it.
    pub const fn new(feature_control: FeatureControl) -> Self {
        Self { operation: Operation::Off, current: None, feature_control }
    }

    /// Whether L1 is in VMX operation, and how.
    pub const fn operation(&self) -> Operation {
        self.operation
    }

    /// In VMX operation, root or not: INIT is blocked or causes exits, and CR0 and CR4 are
    /// restricted.
    pub const fn in_vmx_operation(&self) -> bool {
        !matches!(self.operation, Operation::Off)
    }

    /// In VMX non-root operation.
    pub const fn in_guest(&self) -> bool {
        matches!(self.operation, Operation::Guest { .. })
    }

    /// The VMXON pointer.
    pub const fn vmxon_pointer(&self) -> Option<L1Gpa> {
        match self.operation {
            Operation::Off => None,
            Operation::Root { vmxon } | Operation::Guest { vmxon } => Some(vmxon),
        }
    }

    /// The current-VMCS pointer, unless it is invalid.
    pub fn current_pointer(&self) -> Option<L1Gpa> {
        self.current.as_ref().map(|c| c.pointer)
    }

    /// The current VMCS.
    pub fn current(&self) -> Option<&Vmcs12> {
        self.current.as_ref().map(|c| &*c.vmcs)
    }

    /// The current VMCS, to be changed.
    pub fn current_mut(&mut self) -> Option<&mut Vmcs12> {
        self.current.as_mut().map(|c| &mut *c.vmcs)
    }

    /// Notes that a VM entry has passed every check and L2 runs: VMX non-root operation, and
    /// the VMCS is launched (SDM Vol. 3D chapter 31, VMLAUNCH/VMRESUME). Does nothing outside
    /// VMX root operation.
    pub fn enter_guest(&mut self) {
        if let Operation::Root { vmxon } = self.operation {
            self.operation = Operation::Guest { vmxon };
            if let Some(c) = &mut self.current {
                c.vmcs.launch_state = LaunchState::Launched;
            }
        }
    }

    /// Notes that a VM exit has taken L1 back to VMX root operation.
    pub fn leave_guest(&mut self) {
        if let Operation::Guest { vmxon } = self.operation {
            self.operation = Operation::Root { vmxon };
        }
    }

    /// Whether L1 may load `value` into CR0: in VMX operation only with the fixed bits, else
    /// MOV to CR0 is #GP(0) (SDM Vol. 3C §24.8). For L1 itself, not for L2.
    pub const fn allows_cr0(&self, caps: &Capabilities, value: u64) -> bool {
        !self.in_vmx_operation() || caps.allows_cr0(value, false)
    }

    /// Whether L1 may load `value` into CR4, as [`Self::allows_cr0`]. VMXE thus can't be
    /// cleared before VMXOFF.
    pub const fn allows_cr4(&self, caps: &Capabilities, value: u64) -> bool {
        !self.in_vmx_operation() || caps.allows_cr4(value)
    }

    /// Enters VMX root operation.
    pub(crate) fn start(&mut self, vmxon: L1Gpa) {
        self.operation = Operation::Root { vmxon };
        self.current = None;
    }

    /// Leaves VMX operation; the current VMCS goes to memory.
    pub(crate) fn stop(&mut self, memory: &dyn L1Physical) {
        self.release(memory);
        self.operation = Operation::Off;
    }

    /// Back to the state after RESET: nothing is written to memory. IA32_FEATURE_CONTROL stays,
    /// which firmware would set again.
    pub fn reset(&mut self) {
        self.operation = Operation::Off;
        self.current = None;
    }

    /// Makes the region at `pointer`, whose content is `vmcs`, the current VMCS; the one before
    /// goes to memory.
    pub(crate) fn load(&mut self, memory: &dyn L1Physical, pointer: L1Gpa) {
        if self.current_pointer() == Some(pointer) {
            return;
        }
        self.release(memory);
        let mut region = [0; REGION_SIZE];
        memory.read(pointer, &mut region);
        self.current = Some(CurrentVmcs { pointer, vmcs: Box::new(Vmcs12::from_region(&region)) });
    }

    /// Writes the current VMCS to its region and leaves none current.
    pub(crate) fn release(&mut self, memory: &dyn L1Physical) {
        self.flush(memory);
        self.current = None;
    }

    /// Writes the current VMCS to its region. It stays current. For a reader of L1's memory
    /// who should see it, such as a snapshot.
    pub fn flush(&self, memory: &dyn L1Physical) {
        if let Some(c) = &self.current {
            c.vmcs.write_region(memory, c.pointer);
        }
    }

    /// VMfail (SDM Vol. 3D §31.2): VMfailValid with the number in the current VMCS's
    /// VM-instruction error field, or VMfailInvalid if there is no current VMCS.
    pub fn fail(&mut self, error: InstructionError) -> VmResult {
        match &mut self.current {
            Some(c) => {
                c.vmcs.set(Field::VmInstructionError, error.number() as u64);
                VmResult::FailValid(error)
            }
            None => VmResult::FailInvalid,
        }
    }
}

/// How a VMX instruction that completes tells its result (SDM Vol. 3D §31.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmResult {
    /// VMsucceed.
    Succeed,
    /// VMfailInvalid.
    FailInvalid,
    /// VMfailValid.
    FailValid(InstructionError),
}

impl VmResult {
    /// RFLAGS after the instruction, when it was `before`: CF and ZF tell the result; PF, AF,
    /// SF and OF are cleared.
    pub const fn rflags(self, before: u64) -> u64 {
        use x86_spec::reg::rflags;
        let result = match self {
            Self::Succeed => 0,
            Self::FailInvalid => rflags::CF,
            Self::FailValid(_) => rflags::ZF,
        };
        before & !rflags::STATUS | result
    }
}
