//! A logical processor for tests: flat RAM, identity paging with one page missing.

use std::cell::RefCell;

use engine::{GuestRegs, GuestState, LinearFault, Segment, VmExit};
use memory::{L1Gpa, MachineAddr, PAGE_SIZE};
use x86_spec::exception::pf;
use x86_spec::exit::ExitReason;
use x86_spec::reg::{cr0, cr4, efer, gpr};
use x86_spec::segment::{AccessRights, seg};

use crate::capabilities::tests::full;
use crate::capabilities::{Capabilities, FeatureControl};
use crate::instructions::{Outcome, execute};
use crate::l1::{Fault, L1};
use crate::physical::L1Physical;
use crate::state::{VmResult, VmxState};
use crate::vmcs12::REVISION;

/// RAM size in bytes.
pub const RAM: usize = 0x1_0000;
/// A page that is not present in linear memory.
pub const ABSENT: u64 = 0xf000;
/// A page whose accesses exit.
pub const DEVICE: u64 = 0xe000;
/// Where memory operands are.
pub const OPERAND: u64 = 0x100;
/// The VMXON region.
pub const VMXON: u64 = 0x1000;
/// A VMCS region.
pub const VMCS_A: u64 = 0x2000;
/// Another one.
pub const VMCS_B: u64 = 0x3000;

/// RAM from physical address 0.
pub struct Ram(RefCell<Vec<u8>>);

impl L1Physical for Ram {
    fn read(&self, at: L1Gpa, buf: &mut [u8]) {
        let ram = self.0.borrow();
        for (i, b) in buf.iter_mut().enumerate() {
            let a = at.checked_add(i as u64).and_then(|a| usize::try_from(a.0).ok());
            *b = a.and_then(|a| ram.get(a)).copied().unwrap_or(0xff);
        }
    }
    fn write(&self, at: L1Gpa, buf: &[u8]) {
        let mut ram = self.0.borrow_mut();
        for (i, b) in buf.iter().enumerate() {
            let a = at.checked_add(i as u64).and_then(|a| usize::try_from(a.0).ok());
            if let Some(to) = a.and_then(|a| ram.get_mut(a)) {
                *to = *b;
            }
        }
    }
    fn machine(&self, at: L1Gpa) -> Option<MachineAddr> {
        (at.0 < RAM as u64).then_some(MachineAddr(at.0))
    }
}

/// Registers and memory.
pub struct Processor {
    /// VMCS01's guest state.
    pub guest: GuestState,
    /// The other registers.
    pub regs: GuestRegs,
    /// Memory.
    pub ram: Ram,
}

/// A linear access: identity paging of RAM, except for [`ABSENT`]
/// and [`DEVICE`].
fn page(linear: u64, len: usize) -> Result<L1Gpa, LinearFault> {
    let end = linear.saturating_add(len as u64);
    let absent = linear < ABSENT + PAGE_SIZE && end > ABSENT;
    if absent || end > RAM as u64 {
        return Err(Fault::page(linear.max(ABSENT), pf::W).into());
    }
    if linear < DEVICE + PAGE_SIZE && end > DEVICE {
        return Err(LinearFault::Exit(VmExit::new(ExitReason::EptViolation)));
    }
    Ok(L1Gpa(linear))
}

impl L1 for Processor {
    fn guest(&self) -> &GuestState {
        &self.guest
    }
    fn guest_mut(&mut self) -> &mut GuestState {
        &mut self.guest
    }
    fn regs(&self) -> &GuestRegs {
        &self.regs
    }
    fn regs_mut(&mut self) -> &mut GuestRegs {
        &mut self.regs
    }
    fn cr0(&self) -> u64 {
        self.guest.cr0
    }
    fn cr4(&self) -> u64 {
        self.guest.cr4
    }
    fn physical(&self) -> &dyn L1Physical {
        &self.ram
    }
    fn read_linear(&mut self, linear: u64, buf: &mut [u8]) -> Result<(), LinearFault> {
        self.ram.read(page(linear, buf.len())?, buf);
        Ok(())
    }
    fn write_linear(&mut self, linear: u64, buf: &[u8]) -> Result<(), LinearFault> {
        self.ram.write(page(linear, buf.len())?, buf);
        Ok(())
    }
}

/// A processor with its VMX state and what it is offered.
pub struct Machine {
    /// The processor.
    pub l1: Processor,
    /// VMX state.
    pub state: VmxState,
    /// What is offered.
    pub caps: Capabilities,
}

/// Instruction information for a memory operand that is a displacement alone, in DS with a
/// 64-bit address, and `reg2` in bits 31:28.
pub const fn memory_info(reg2: usize) -> u32 {
    2 << 7 | (seg::DS as u32) << 15 | 1 << 22 | 1 << 27 | (reg2 as u32) << 28
}

/// Instruction information for operands in registers.
pub const fn register_info(reg1: usize, reg2: usize) -> u32 {
    1 << 10 | (reg1 as u32) << 3 | (reg2 as u32) << 28
}

impl Machine {
    /// 64-bit mode at CPL 0, VMX enabled, outside VMX operation; regions at [`VMXON`],
    /// [`VMCS_A`] and [`VMCS_B`] carry the revision identifier.
    pub fn long() -> Self {
        let mut guest = GuestState {
            cr0: cr0::PE | cr0::NE | cr0::PG | cr0::ET,
            cr4: cr4::PAE | cr4::VMXE,
            efer: efer::LME | efer::LMA,
            ..GuestState::default()
        };
        guest.segments = [Segment { base: 0, limit: u32::MAX, access: AccessRights(0xc093), selector: 8 }; 8];
        guest.segments[seg::CS].access = AccessRights(0xa09b);
        let regs = GuestRegs::default();
        let mut m = Self {
            l1: Processor { guest, regs, ram: Ram(RefCell::new(vec![0; RAM])) },
            state: VmxState::new(FeatureControl::ENABLED),
            caps: full(),
        };
        for region in [VMXON, VMCS_A, VMCS_B] {
            m.put32(region, REVISION);
        }
        m
    }

    /// The same in 32-bit protected mode.
    pub fn protected() -> Self {
        let mut m = Self::long();
        m.l1.guest.efer = 0;
        m.l1.guest.segments[seg::CS].access = AccessRights(0xc09b);
        m
    }

    /// After VMXON.
    pub fn in_root(mut self) -> Self {
        assert_eq!(self.pointer(ExitReason::Vmxon, VMXON), SUCCEED);
        self
    }

    /// After VMXON, VMCLEAR and VMPTRLD of `vmcs`.
    pub fn with_current(self, vmcs: u64) -> Self {
        let mut m = self.in_root();
        assert_eq!(m.pointer(ExitReason::Vmclear, vmcs), SUCCEED);
        assert_eq!(m.pointer(ExitReason::Vmptrld, vmcs), SUCCEED);
        m
    }

    /// Writes a dword to RAM.
    pub fn put32(&mut self, at: u64, value: u32) {
        self.l1.ram.write(L1Gpa(at), &value.to_le_bytes());
    }

    /// Writes a qword to RAM.
    pub fn put64(&mut self, at: u64, value: u64) {
        self.l1.ram.write(L1Gpa(at), &value.to_le_bytes());
    }

    /// Reads a qword of RAM.
    pub fn get64(&self, at: u64) -> u64 {
        self.l1.ram.read_u64(L1Gpa(at))
    }

    /// Executes the instruction of this exit.
    pub fn run(&mut self, exit: &VmExit) -> Outcome {
        execute(&mut self.state, &self.caps, &mut self.l1, exit).unwrap()
    }

    /// Executes an instruction with its memory operand at [`OPERAND`], or none.
    pub fn plain(&mut self, reason: ExitReason) -> Outcome {
        let mut exit = VmExit::new(reason).qualified(OPERAND);
        exit.instruction_info = memory_info(gpr::RBX);
        self.run(&exit)
    }

    /// Executes an instruction that takes a 64-bit pointer in memory.
    pub fn pointer(&mut self, reason: ExitReason, pointer: u64) -> Outcome {
        self.put64(OPERAND, pointer);
        self.plain(reason)
    }

    /// VMREAD or VMWRITE of the field with this encoding (RBX), the value in RCX.
    pub fn field(&mut self, reason: ExitReason, encoding: u64) -> Outcome {
        self.l1.regs.gpr[gpr::RBX] = encoding;
        let mut exit = VmExit::new(reason);
        exit.instruction_info = register_info(gpr::RCX, gpr::RBX);
        self.run(&exit)
    }

    /// INVEPT or INVVPID of this type (RBX) with this descriptor.
    pub fn invalidate(&mut self, reason: ExitReason, ty: u64, low: u64, high: u64) -> Outcome {
        self.l1.regs.gpr[gpr::RBX] = ty;
        self.put64(OPERAND, low);
        self.put64(OPERAND + 8, high);
        self.plain(reason)
    }
}

/// VMsucceed.
pub const SUCCEED: Outcome = Outcome::Complete(VmResult::Succeed);
/// VMfailInvalid.
pub const FAIL_INVALID: Outcome = Outcome::Complete(VmResult::FailInvalid);
