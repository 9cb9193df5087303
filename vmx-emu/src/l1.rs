//! What VMX instructions see of L1: its registers and its memory.

use engine::{GuestRegs, GuestState, LinearFault};
use x86_spec::exception;
use x86_spec::reg::{efer, gpr, rflags};
use x86_spec::segment::seg;

use crate::fields::OperandSize;
use crate::physical::L1Physical;

/// An exception that an instruction of L1 raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Vector.
    pub vector: u8,
    /// Error code, for vectors that have one.
    pub error_code: Option<u32>,
    /// What a page fault puts into CR2.
    pub cr2: Option<u64>,
}

impl Fault {
    /// #UD.
    pub const UD: Self = Self { vector: exception::UD, error_code: None, cr2: None };
    /// #GP(0).
    pub const GP: Self = Self { vector: exception::GP, error_code: Some(0), cr2: None };
    /// #SS(0).
    pub const SS: Self = Self { vector: exception::SS, error_code: Some(0), cr2: None };

    /// #PF at `linear`.
    pub const fn page(linear: u64, error_code: u32) -> Self {
        Self { vector: exception::PF, error_code: Some(error_code), cr2: Some(linear) }
    }
}

impl From<Fault> for LinearFault {
    fn from(f: Fault) -> Self {
        Self::Exception { vector: f.vector, error_code: f.error_code, address: f.cr2.unwrap_or(0) }
    }
}

/// One logical processor of L1 with its memory, stopped at a VMX instruction: what it is
/// while L1 runs, that is. For an instruction that L0 executes on L2's behalf, registers
/// and linear memory are L2's.
pub trait L1 {
    /// Registers that VMCS01 holds.
    fn guest(&self) -> &GuestState;
    /// The same, to be changed.
    fn guest_mut(&mut self) -> &mut GuestState;
    /// Registers that VMCS01 does not hold.
    fn regs(&self) -> &GuestRegs;
    /// The same, to be changed.
    fn regs_mut(&mut self) -> &mut GuestRegs;
    /// CR0 as L1 reads it: what VMCS01's mask hides comes from its read shadow.
    fn cr0(&self) -> u64;
    /// CR4 as L1 reads it.
    fn cr4(&self) -> u64;
    /// L1-physical memory.
    fn physical(&self) -> &dyn L1Physical;
    /// Reads linear memory as a supervisor-mode data access, with all its effects.
    ///
    /// # Errors
    /// The exception or exit that the access causes; `buf` is undefined then.
    fn read_linear(&mut self, linear: u64, buf: &mut [u8]) -> Result<(), LinearFault>;
    /// Writes linear memory as a supervisor-mode data access: all of `buf` or, with a fault,
    /// nothing.
    ///
    /// # Errors
    /// The exception or exit that the access causes.
    fn write_linear(&mut self, linear: u64, buf: &[u8]) -> Result<(), LinearFault>;
}

/// Questions about L1's mode that many instructions ask.
pub(crate) trait L1Ext: L1 {
    /// A general register, RSP among them; `index` modulo 16.
    fn gpr(&self, index: usize) -> u64 {
        if index & 15 == gpr::RSP { self.guest().rsp } else { self.regs().gpr[index & 15] }
    }
    /// Sets a general register, RSP among them; `index` modulo 16.
    fn set_gpr(&mut self, index: usize, value: u64) {
        if index & 15 == gpr::RSP {
            self.guest_mut().rsp = value;
        } else {
            self.regs_mut().gpr[index & 15] = value;
        }
    }
    /// Current privilege level: DPL of SS (SDM Vol. 3C §25.4.1).
    fn cpl(&self) -> u8 {
        self.guest().segments[seg::SS].access.dpl()
    }
    /// IA-32e mode is active.
    fn long_mode(&self) -> bool {
        self.guest().efer & efer::LMA != 0
    }
    /// 64-bit mode.
    fn is_64bit(&self) -> bool {
        self.long_mode() && self.guest().segments[seg::CS].access.long()
    }
    /// Virtual-8086 mode.
    fn virtual_8086(&self) -> bool {
        self.guest().rflags & rflags::VM != 0
    }
    /// Operand size of VMREAD, VMWRITE, INVEPT and INVVPID.
    fn operand_size(&self) -> OperandSize {
        if self.is_64bit() { OperandSize::Bits64 } else { OperandSize::Bits32 }
    }
}

impl<T: L1 + ?Sized> L1Ext for T {}
