//! The VMX side of one of L1's logical processors.

use memory::L1Gpa;

use crate::capabilities::{Capabilities, FeatureControl};
use crate::evmcs::{self, Evmcs};
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

/// What a VMCS is in L1's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A VMCS region of the SDM, which L1 accesses by VMREAD and VMWRITE.
    Region,
    /// An enlightened VMCS ([`crate::evmcs`]), which L1 accesses as memory.
    Enlightened,
}

/// The current VMCS.
#[derive(Clone, Debug)]
pub struct CurrentVmcs {
    /// Where it is in L1's memory.
    pub pointer: L1Gpa,
    /// What it is there.
    pub form: Form,
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
    /// L1's virtual-processor assist page, which can name an enlightened VMCS.
    pub assist_page: Option<L1Gpa>,
}

impl VmxState {
    /// Outside VMX operation, with IA32_FEATURE_CONTROL as firmware left it.
    pub const fn new(feature_control: FeatureControl) -> Self {
        Self { operation: Operation::Off, current: None, feature_control, assist_page: None }
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

    /// The current-VMCS pointer of VMPTRLD and VMPTRST, unless it is invalid. It is while an enlightened
    /// VMCS is in use, and VMREAD and VMWRITE have nothing to access.
    pub fn region_pointer(&self) -> Option<L1Gpa> {
        self.current.as_ref().filter(|c| c.form == Form::Region).map(|c| c.pointer)
    }

    /// The enlightened VMCS in use.
    fn enlightened(&self) -> Option<&CurrentVmcs> {
        self.current.as_ref().filter(|c| c.form == Form::Enlightened)
    }

    /// Where the VMCS is that VM entries use.
    pub fn current_pointer(&self) -> Option<L1Gpa> {
        self.current.as_ref().map(|c| c.pointer)
    }

    /// The VMCS that VM entries use.
    pub fn current(&self) -> Option<&Vmcs12> {
        self.current.as_ref().map(|c| &*c.vmcs)
    }

    /// The same, to be changed.
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
        self.assist_page = None;
    }

    /// Makes the region at `pointer`, whose content is `vmcs`, the current VMCS; the one before
    /// goes to memory.
    pub(crate) fn load(&mut self, memory: &dyn L1Physical, pointer: L1Gpa) {
        if self.region_pointer() == Some(pointer) {
            return;
        }
        self.release(memory);
        let mut region = [0; REGION_SIZE];
        memory.read(pointer, &mut region);
        let vmcs = Box::new(Vmcs12::from_region(&region));
        self.current = Some(CurrentVmcs { pointer, form: Form::Region, vmcs });
    }

    /// Writes the current VMCS to its region and leaves none current.
    pub(crate) fn release(&mut self, memory: &dyn L1Physical) {
        self.flush(memory);
        self.current = None;
    }

    /// Writes the current VMCS to its region. It stays current. For a reader of L1's memory
    /// who should see it, such as a snapshot. In an enlightened VMCS everything is there already.
    pub fn flush(&self, memory: &dyn L1Physical) {
        if let Some(c) = self.current.as_ref().filter(|c| c.form == Form::Region) {
            c.vmcs.write_region(memory, c.pointer);
        }
    }

    /// Has VM entries use the enlightened VMCS at `pointer`, whose content is `evmcs`: with
    /// `changes_only`, if it is the one of the last entry, L0's copy is still good but for what L1
    /// has not marked clean.
    pub(crate) fn load_enlightened(
        &mut self,
        memory: &dyn L1Physical,
        pointer: L1Gpa,
        evmcs: &Evmcs,
        changes_only: bool,
    ) {
        match &mut self.current {
            Some(c) if c.form == Form::Enlightened && c.pointer == pointer => {
                if changes_only {
                    evmcs.load_changed(&mut c.vmcs);
                } else {
                    evmcs.load_all(&mut c.vmcs);
                }
            }
            _ => {
                self.release(memory);
                let mut vmcs = Box::<Vmcs12>::default();
                evmcs.load_all(&mut vmcs);
                self.current = Some(CurrentVmcs { pointer, form: Form::Enlightened, vmcs });
            }
        }
    }

    /// Ends the use of an enlightened VMCS: none is current then.
    pub(crate) fn drop_enlightened(&mut self) {
        if self.enlightened().is_some() {
            self.current = None;
        }
    }

    /// Shows L1 what an exit, or an entry that failed as one does, left in its enlightened VMCS. To be
    /// called before L1 runs on. Does nothing for an ordinary VMCS.
    pub fn store_enlightened(&self, memory: &dyn L1Physical) {
        if let Some(c) = self.enlightened() {
            let mut evmcs = Evmcs::read(memory, c.pointer);
            evmcs.store_exit(&c.vmcs);
            evmcs.write(memory, c.pointer);
        }
    }

    /// The same after VMfailValid, which changes the VM-instruction error alone.
    pub fn store_instruction_error(&self, memory: &dyn L1Physical) {
        if let Some(c) = self.enlightened() {
            evmcs::write_instruction_error(memory, c.pointer, &c.vmcs);
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
