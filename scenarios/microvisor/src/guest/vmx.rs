//! The VMX instructions, each with its outcome as the SDM defines it (Vol. 3C §31.2), and
//! the capability MSRs.

use core::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::trap::{self, Fault};
use super::{cpu, evmcs};

/// How a VMX instruction ends if it does not succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmxError {
    /// VMfailInvalid: CF = 1.
    Invalid,
    /// VMfailValid: ZF = 1; the VM-instruction error.
    Valid(u32),
    /// An exception.
    Fault(Fault),
    /// Flags that are no outcome.
    Flags(u64),
}

impl From<Fault> for VmxError {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// What a VMX instruction returns.
pub type Vmx<T = ()> = Result<T, VmxError>;

/// CF, PF, AF, ZF, SF, OF.
const ARITHMETIC: u64 = 0x8d5;

/// The outcome that RFLAGS tells.
pub fn outcome(flags: u64) -> Vmx {
    match flags & ARITHMETIC {
        0 => Ok(()),
        1 => Err(VmxError::Invalid),
        0x40 => Err(VmxError::Valid(instruction_error())),
        _ => Err(VmxError::Flags(flags)),
    }
}

fn instruction_error() -> u32 {
    use super::fields::VM_ERROR;
    let error = match evmcs::current() {
        Some(at) => evmcs::read(at, VM_ERROR).ok(),
        None => vmread_raw(VM_ERROR).ok().map(|(value, _)| value),
    };
    let Some(error) = error else { return !0 };
    super::coverage::error(error as u32);
    error as u32
}

fn vmread_raw(field: u32) -> Result<(u64, u64), Fault> {
    let value: u64;
    let flags = trap::guarded!("vmread {v}, {f}", v = out(reg) value, f = in(reg) u64::from(field))?;
    Ok((value, flags))
}

macro_rules! operand_instruction {
    ($($name:ident $asm:literal)*) => { $(
        #[doc = concat!("`", $asm, "` with the operand at `at`; the flags are set before, so that the instruction has to clear them.")]
        pub fn $name(at: *const u64) -> Vmx {
            outcome(trap::guarded!(concat!("push 0x8d7\npopfq\n", $asm, " [{at}]"), at = in(reg) at)?)
        }
    )* };
}
operand_instruction! { vmxon_at "vmxon" vmclear_at "vmclear" vmptrld_at "vmptrld" vmptrst_at "vmptrst" }

/// VMXON.
pub fn vmxon(region: u64) -> Vmx {
    vmxon_at(&raw const region)
}
/// VMCLEAR.
pub fn vmclear(region: u64) -> Vmx {
    vmclear_at(&raw const region)
}
/// VMPTRLD.
pub fn vmptrld(region: u64) -> Vmx {
    vmptrld_at(&raw const region)
}
/// VMPTRST.
pub fn vmptrst() -> Vmx<u64> {
    let region = 0x5555_5555_5555_5555_u64;
    vmptrst_at(&raw const region)?;
    Ok(unsafe { (&raw const region).read_volatile() })
}
/// VMXOFF.
pub fn vmxoff() -> Vmx {
    outcome(trap::guarded!("push 0x8d7\npopfq\nvmxoff")?)
}
/// VMCALL in VMX root operation.
pub fn vmcall() -> Vmx {
    outcome(trap::guarded!("push 0x8d7\npopfq\nvmcall")?)
}
/// Reads a field of the VMCS in use: VMREAD, or a load from an enlightened VMCS.
pub fn vmread(field: u32) -> Vmx<u64> {
    evmcs::current().map_or_else(|| vmread64(field.into()), |at| evmcs::read(at, field))
}
/// VMREAD with all 64 bits of the encoding.
pub fn vmread64(field: u64) -> Vmx<u64> {
    let mut value = 0_u64;
    let flags =
        trap::guarded!("push 0x8d7\npopfq\nvmread {v}, {f}", v = inout(reg) value, f = in(reg) field)?;
    outcome(flags)?;
    Ok(value)
}
/// Writes a field of the VMCS in use: VMWRITE, or a store to an enlightened VMCS.
pub fn vmwrite(field: u32, value: u64) -> Vmx {
    evmcs::current().map_or_else(|| vmwrite64(field.into(), value), |at| evmcs::write(at, field, value))
}
/// VMWRITE with all 64 bits of the encoding.
pub fn vmwrite64(field: u64, value: u64) -> Vmx {
    outcome(trap::guarded!("push 0x8d7\npopfq\nvmwrite {f}, {v}", v = in(reg) value, f = in(reg) field)?)
}
/// INVEPT with the descriptor at `at`.
pub fn invept_at(kind: u64, at: *const u64) -> Vmx {
    outcome(trap::guarded!("push 0x8d7\npopfq\ninvept {k}, [{at}]", k = in(reg) kind, at = in(reg) at)?)
}
/// Set by the word `no-invept`: the processor has to see changes of EPT structures by itself.
pub static NO_INVEPT: AtomicBool = AtomicBool::new(false);

/// INVEPT.
pub fn invept(kind: u64, eptp: u64) -> Vmx {
    if NO_INVEPT.load(Relaxed) {
        return Ok(());
    }
    let descriptor = [eptp, 0];
    invept_at(kind, descriptor.as_ptr())
}
/// INVVPID with the descriptor at `at`.
pub fn invvpid_at(kind: u64, at: *const u64) -> Vmx {
    outcome(trap::guarded!("push 0x8d7\npopfq\ninvvpid {k}, [{at}]", k = in(reg) kind, at = in(reg) at)?)
}
/// INVVPID; `vpid` with what follows it in the descriptor's first word.
pub fn invvpid(kind: u64, vpid: u64, linear: u64) -> Vmx {
    let descriptor = [vpid, linear];
    invvpid_at(kind, descriptor.as_ptr())
}

/// Allowed settings of one control field: bits that must be 1 and bits that may be.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// Must be 1.
    pub one: u32,
    /// May be 1.
    pub may: u32,
}

impl Allowed {
    fn read(msr: u32) -> Self {
        let v = cpu::msr(msr);
        Self { one: v as u32, may: (v >> 32) as u32 }
    }
    /// Whether all of `bits` may be 1.
    pub fn can(self, bits: u32) -> bool {
        self.may & bits == bits
    }
}

/// The capability MSRs (SDM Vol. 3D appendix A).
#[derive(Clone, Copy, Debug)]
pub struct Caps {
    /// IA32_VMX_BASIC.
    pub basic: u64,
    /// Pin-based controls.
    pub pin: Allowed,
    /// Primary controls.
    pub primary: Allowed,
    /// Secondary controls.
    pub secondary: Allowed,
    /// Exit controls.
    pub exit: Allowed,
    /// Entry controls.
    pub entry: Allowed,
    /// IA32_VMX_MISC.
    pub misc: u64,
    /// IA32_VMX_EPT_VPID_CAP.
    pub ept_vpid: u64,
    /// IA32_VMX_VMFUNC.
    pub vmfunc: u64,
    /// IA32_VMX_CR0_FIXED0 and FIXED1.
    pub cr0_fixed: [u64; 2],
    /// IA32_VMX_CR4_FIXED0 and FIXED1.
    pub cr4_fixed: [u64; 2],
    /// MAXPHYADDR.
    pub physical_bits: u8,
}

impl Caps {
    /// Reads them; `None` if CPUID does not show VMX.
    pub fn read() -> Option<Self> {
        if cpu::cpuid(1, 0)[2] & 1 << 5 == 0 {
            return None;
        }
        let basic = cpu::rdmsr(0x480).ok()?;
        // Bit 55: the TRUE forms exist.
        let true_form = u32::from(basic >> 55 & 1 != 0) * 12;
        let mut caps = Self {
            basic,
            pin: Allowed::read(0x481 + true_form),
            primary: Allowed::read(0x482 + true_form),
            secondary: Allowed { one: 0, may: 0 },
            exit: Allowed::read(0x483 + true_form),
            entry: Allowed::read(0x484 + true_form),
            misc: cpu::msr(0x485),
            ept_vpid: 0,
            vmfunc: 0,
            cr0_fixed: [cpu::msr(0x486), cpu::msr(0x487)],
            cr4_fixed: [cpu::msr(0x488), cpu::msr(0x489)],
            physical_bits: cpu::cpuid(0x8000_0008, 0)[0] as u8,
        };
        if caps.primary.can(super::fields::primary::SECONDARY) {
            caps.secondary = Allowed::read(0x48b);
        }
        use super::fields::secondary as s;
        if caps.secondary.may & (s::EPT | s::VPID) != 0 {
            caps.ept_vpid = cpu::msr(0x48c);
        }
        if caps.secondary.can(s::VMFUNC) {
            caps.vmfunc = cpu::msr(0x491);
        }
        Some(caps)
    }
    /// The VMCS revision identifier.
    pub fn revision(&self) -> u32 {
        self.basic as u32 & 0x7fff_ffff
    }
    /// The first physical address that does not exist.
    pub fn beyond(&self) -> u64 {
        1 << self.physical_bits
    }
}
