//! Who owns an exit of L2: one table, a rule for each basic exit reason.
//!
//! VMCS02 exits for what L0 needs and for what L1 wants. L1 gets an exit that its own VMCS12
//! would have caused on a processor; the rest is L0's. L0 keeps an exit either to do something
//! of its own, or to carry out on the spot what L2 would have been allowed without an exit.

use std::fmt;

use engine::{GuestRegs, GuestState, VmExit};
use ept_compress::Fault;
use x86_spec::controls::{PinbasedControls as P, PrimaryControls as C, SecondaryControls as S};
use x86_spec::exception;
use x86_spec::exit::{ExitReason as R, cr_access, ept_violation, io};
use x86_spec::interruption::EventType;
use x86_spec::reg::{cr0, efer, gpr};
use x86_spec::segment::seg;

use crate::capabilities::{CONTROL_FIELDS, Needs, VMFUNC_EPTP_SWITCHING};
use crate::fields::{CR3_TARGETS, Field};
use crate::merge::PageFaultFilter;
use crate::merge::bitmaps::{io_exits, msr_exits, primary12, secondary12};
use crate::merge::cr::CrMask;
use crate::physical::L1Physical;
use crate::vmcs_page;
use crate::vmcs12::Vmcs12;

/// Who handles an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// L0 keeps it.
    L0,
    /// It is reflected to L1.
    L1,
    /// Composing EPT12 with EPT01 tells (`ept_compress::Ept02::fill`, then [`of_fault`]).
    Composition,
}

/// Who handles an exit, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Who.
    pub owner: Owner,
    /// The reason, for reports.
    pub why: &'static str,
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.owner, self.why)
    }
}

const fn l0(why: &'static str) -> Route {
    Route { owner: Owner::L0, why }
}
const fn l1(why: &'static str) -> Route {
    Route { owner: Owner::L1, why }
}

/// What the rules look at.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// VMCS12.
    pub vmcs12: &'a Vmcs12,
    /// L2's state at the exit, from VMCS02.
    pub guest: &'a GuestState,
    /// Registers at the exit.
    pub regs: &'a GuestRegs,
    /// L1's memory, for its bitmaps.
    pub l1: &'a dyn L1Physical,
    /// L1's VMX-preemption timer is in use and has reached zero.
    pub timer12_expired: bool,
    /// VMCS12 injected a pending MTF exit (interruption type 7, §27.6.2).
    pub mtf_injected: bool,
}

impl Context<'_> {
    fn pin(&self, control: P) -> bool {
        P::from_bits_truncate(self.vmcs12.get32(Field::PinControls)).contains(control)
    }
    fn primary(&self, control: C) -> bool {
        primary12(self.vmcs12).contains(control)
    }
    fn secondary(&self, control: S) -> bool {
        secondary12(self.vmcs12).contains(control)
    }
    /// A general register as an operand: 32 bits outside 64-bit mode.
    fn gpr(&self, index: usize) -> u64 {
        let value = if index & 15 == gpr::RSP { self.guest.rsp } else { self.regs.gpr[index & 15] };
        if self.is_64bit() { value } else { value & 0xffff_ffff }
    }
    fn is_64bit(&self) -> bool {
        self.guest.efer & efer::LMA != 0 && self.guest.segments[seg::CS].access.long()
    }
    fn when(&self, wanted: bool, yes: &'static str, no: &'static str) -> Route {
        if wanted { l1(yes) } else { l0(no) }
    }
}

type Decide = fn(&VmExit, &Context<'_>) -> Route;

/// What would have to be offered to L1 for an exit to occur.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// A control: its field, as an index of [`CONTROL_FIELDS`], and its bit.
    Control(usize, u32),
    /// Any of the bits `mask` in a register (EAX to EDX are 0 to 3) of a leaf of CPUID.
    Cpuid {
        /// Leaf.
        leaf: u32,
        /// Subleaf.
        subleaf: u32,
        /// Register.
        register: usize,
        /// Bits.
        mask: u32,
    },
}

/// When L1 gets an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Whatever VMCS12's controls say.
    Unconditional,
    /// As these controls of VMCS12 say, or what goes with them: (field, bit) as in [`Offer::Control`].
    Controls(&'static [(usize, u32)]),
    /// Not with what L1 is offered.
    Never {
        /// Why not.
        why: &'static str,
        /// What is not offered, and would change that.
        unless: &'static [Offer],
    },
}

/// A rule of the table.
pub struct Rule {
    /// The basic exit reason.
    pub reason: R,
    /// Where the SDM says when the exit occurs.
    pub section: &'static str,
    /// When L1 gets the exit.
    pub cause: Cause,
    decide: Decide,
}

const fn rule(reason: R, section: &'static str, decide: Decide) -> Rule {
    Rule { reason, section, cause: cause(reason), decide }
}

/// When L1 gets an exit with this reason (SDM Vol. 3C §26.1–26.5).
const fn cause(reason: R) -> Cause {
    const PIN: usize = 0;
    const PRIMARY: usize = 1;
    const SECONDARY: usize = 2;
    const ENTRY: usize = 4;
    const SMM: &[Offer] = &[Offer::Control(ENTRY, 10), Offer::Control(ENTRY, 11)];
    const WAIT: &[Offer] =
        &[Offer::Control(SECONDARY, 26), Offer::Cpuid { leaf: 7, subleaf: 0, register: 2, mask: 1 << 5 }];
    let controls: &[(usize, u32)] = match reason {
        R::IoSmi | R::OtherSmi | R::Rsm => {
            return Cause::Never { why: "there is no SMM", unless: SMM };
        }
        R::Getsec => {
            let smx = &[Offer::Cpuid { leaf: 1, subleaf: 0, register: 2, mask: 1 << 6 }];
            return Cause::Never { why: "SMX is not offered: GETSEC is #UD", unless: smx };
        }
        R::MachineCheckOnEntry => {
            return Cause::Never { why: "L1's machine has no machine checks", unless: &[] };
        }
        R::Encls => {
            let encls = &[Offer::Control(SECONDARY, 15)];
            return Cause::Never { why: "ENCLS exiting is not offered", unless: encls };
        }
        R::Xsaves | R::Xrstors => {
            let components = &[Offer::Cpuid { leaf: 0xd, subleaf: 1, register: 2, mask: u32::MAX }];
            let why = "CPUID shows no supervisor state components, so IA32_XSS is 0";
            return Cause::Never { why, unless: components };
        }
        R::Umwait | R::Tpause => {
            return Cause::Never { why: "user wait and pause is not offered", unless: WAIT };
        }
        R::ExceptionOrNmi => &[(PIN, 3)],
        R::ExternalInterrupt => &[(PIN, 0)],
        R::InterruptWindow => &[(PRIMARY, 2)],
        R::NmiWindow => &[(PRIMARY, 22)],
        R::Hlt => &[(PRIMARY, 7)],
        R::Invlpg => &[(PRIMARY, 9)],
        R::Rdpmc => &[(PRIMARY, 11)],
        R::Rdtsc | R::Rdtscp => &[(PRIMARY, 12)],
        R::Vmread | R::Vmwrite => &[(SECONDARY, 14)],
        R::CrAccess => &[(PRIMARY, 15), (PRIMARY, 16), (PRIMARY, 19), (PRIMARY, 20)],
        R::MovDr => &[(PRIMARY, 23)],
        R::IoInstruction => &[(PRIMARY, 24), (PRIMARY, 25)],
        R::Rdmsr | R::Wrmsr => &[(PRIMARY, 28)],
        R::Mwait => &[(PRIMARY, 10)],
        R::MonitorTrapFlag => &[(PRIMARY, 27)],
        R::Monitor => &[(PRIMARY, 29)],
        R::Pause => &[(PRIMARY, 30), (SECONDARY, 10)],
        R::TprBelowThreshold => &[(PRIMARY, 21)],
        R::ApicAccess => &[(SECONDARY, 0)],
        R::VirtualizedEoi => &[(SECONDARY, 9)],
        R::GdtrIdtrAccess | R::LdtrTrAccess => &[(SECONDARY, 2)],
        R::EptViolation | R::EptMisconfiguration => &[(SECONDARY, 1)],
        R::PreemptionTimer => &[(PIN, 6)],
        R::Wbinvd => &[(SECONDARY, 6)],
        R::ApicWrite => &[(SECONDARY, 8)],
        R::Rdrand => &[(SECONDARY, 11)],
        R::Invpcid => &[(PRIMARY, 9)],
        R::Vmfunc => &[(SECONDARY, 13)],
        R::Rdseed => &[(SECONDARY, 16)],
        R::PmlFull => &[(SECONDARY, 17)],
        R::TripleFault
        | R::Init
        | R::Sipi
        | R::TaskSwitch
        | R::Cpuid
        | R::Invd
        | R::Vmcall
        | R::Vmclear
        | R::Vmlaunch
        | R::Vmptrld
        | R::Vmptrst
        | R::Vmresume
        | R::Vmxoff
        | R::Vmxon
        | R::InvalidGuestState
        | R::MsrLoading
        | R::Invept
        | R::Invvpid
        | R::Xsetbv => return Cause::Unconditional,
    };
    Cause::Controls(controls)
}

/// Whether L0 can offer a control at all.
const fn implemented(field: usize, bit: u32) -> bool {
    let table = CONTROL_FIELDS[field].1;
    let mut i = 0;
    while i < table.len() {
        if table[i].bit == bit {
            return !matches!(table[i].needs, Needs::Unavailable);
        }
        i += 1;
    }
    panic!("no such control");
}

// An exit is not said to be impossible when a control that causes it is offered, and the controls
// that are said to cause one are.
const _: () = {
    let mut i = 0;
    while i < TABLE.len() {
        let mut k = 0;
        match TABLE[i].cause {
            Cause::Unconditional => {}
            Cause::Controls(controls) => {
                while k < controls.len() {
                    assert!(implemented(controls[k].0, controls[k].1), "not offered, but causes an exit");
                    k += 1;
                }
            }
            Cause::Never { unless, .. } => {
                while k < unless.len() {
                    if let Offer::Control(field, bit) = unless[k] {
                        assert!(!implemented(field, bit), "a control is offered whose exit never occurs");
                    }
                    k += 1;
                }
            }
        }
        i += 1;
    }
};

/// The rules, in order of exit reason. Sections are of SDM Vol. 3C.
pub const TABLE: &[Rule] = &[
    rule(R::ExceptionOrNmi, "26.2", exception_or_nmi),
    rule(R::ExternalInterrupt, "26.2", |_, _| l0("a kick or a host interrupt; L1's come by L1's local APIC")),
    rule(R::TripleFault, "26.2", |_, _| l1("a triple fault of L2 exits unconditionally")),
    rule(R::Init, "26.2", |_, _| l1("INIT exits unconditionally in VMX non-root operation")),
    rule(R::Sipi, "26.2", |_, _| l1("a start-up IPI in the wait-for-SIPI state exits unconditionally")),
    rule(R::IoSmi, "32.2", |_, _| l0("SMM is not offered to L1")),
    rule(R::OtherSmi, "32.2", |_, _| l0("SMM is not offered to L1")),
    rule(R::InterruptWindow, "26.2", |_, c| {
        c.when(
            c.primary(C::INTERRUPT_WINDOW_EXITING),
            "interrupt-window exiting",
            "L0 waited to inject an interrupt",
        )
    }),
    rule(R::NmiWindow, "26.2", |_, c| {
        c.when(c.primary(C::NMI_WINDOW_EXITING), "NMI-window exiting", "L0 waited to inject an NMI")
    }),
    rule(R::TaskSwitch, "26.2", |_, _| l1("task switches exit unconditionally")),
    rule(R::Cpuid, "26.1.2", always),
    rule(R::Getsec, "26.1.2", always),
    rule(R::Hlt, "26.1.3", |_, c| {
        c.when(
            c.primary(C::HLT_EXITING),
            "HLT exiting",
            "L0 gives the host's processor back until an event comes",
        )
    }),
    rule(R::Invd, "26.1.2", always),
    rule(R::Invlpg, "26.1.3", |_, c| {
        c.when(c.primary(C::INVLPG_EXITING), "INVLPG exiting", "L0 performs it")
    }),
    rule(R::Rdpmc, "26.1.3", |_, c| {
        c.when(c.primary(C::RDPMC_EXITING), "RDPMC exiting", "the engine performs it")
    }),
    rule(R::Rdtsc, "26.1.3", |_, c| c.when(c.primary(C::RDTSC_EXITING), "RDTSC exiting", "L0 performs it")),
    rule(R::Rsm, "26.1.2", always),
    rule(R::Vmcall, "26.1.2", always),
    rule(R::Vmclear, "26.1.2", always),
    rule(R::Vmlaunch, "26.1.2", always),
    rule(R::Vmptrld, "26.1.2", always),
    rule(R::Vmptrst, "26.1.2", always),
    rule(R::Vmread, "26.1.3", |e, c| shadowed(e, c, Field::VmreadBitmap)),
    rule(R::Vmresume, "26.1.2", always),
    rule(R::Vmwrite, "26.1.3", |e, c| shadowed(e, c, Field::VmwriteBitmap)),
    rule(R::Vmxoff, "26.1.2", always),
    rule(R::Vmxon, "26.1.2", always),
    rule(R::CrAccess, "26.1.3", cr_access_owner),
    rule(R::MovDr, "26.1.3", |_, c| c.when(c.primary(C::MOV_DR_EXITING), "MOV-DR exiting", "L0 performs it")),
    rule(R::IoInstruction, "26.1.3", |e, c| {
        let q = e.qualification;
        c.when(
            io_exits(c.vmcs12, c.l1, io::port(q), io::size(q)),
            "L1's I/O controls or bitmaps",
            "L1 gives the port to L2: a device of L1's machine",
        )
    }),
    rule(R::Rdmsr, "26.1.3", |_, c| msr(c, false)),
    rule(R::Wrmsr, "26.1.3", |_, c| msr(c, true)),
    rule(R::InvalidGuestState, "27.8", |_, _| l1("the engine refused L2's guest state")),
    rule(R::MsrLoading, "27.8", |_, _| l1("MSR loading failed")),
    rule(R::Mwait, "26.1.3", |_, c| c.when(c.primary(C::MWAIT_EXITING), "MWAIT exiting", "L0 performs it")),
    rule(R::MonitorTrapFlag, "26.5.2", |_, c| {
        c.when(
            c.mtf_injected || c.primary(C::MONITOR_TRAP_FLAG),
            "monitor trap flag, or an injected MTF exit",
            "L0 steps L2",
        )
    }),
    rule(R::Monitor, "26.1.3", |_, c| {
        c.when(c.primary(C::MONITOR_EXITING), "MONITOR exiting", "L0 performs it")
    }),
    rule(R::Pause, "26.1.3", |_, c| {
        c.when(
            c.primary(C::PAUSE_EXITING) || c.secondary(S::PAUSE_LOOP_EXITING),
            "PAUSE exiting or PAUSE-loop exiting",
            "L0 goes on",
        )
    }),
    rule(R::MachineCheckOnEntry, "27.9", |_, _| l1("a machine check during VM entry")),
    rule(R::TprBelowThreshold, "30.1.2", |_, _| l1("the TPR shadow is L1's")),
    rule(R::ApicAccess, "30.4", |_, _| l1("the APIC-access page is L1's")),
    rule(R::VirtualizedEoi, "30.1.4", |_, _| l1("virtual-interrupt delivery is L1's")),
    rule(R::GdtrIdtrAccess, "26.1.3", descriptor_table),
    rule(R::LdtrTrAccess, "26.1.3", descriptor_table),
    rule(R::EptViolation, "29.3.3.2", ept),
    rule(R::EptMisconfiguration, "29.3.3.1", ept),
    rule(R::Invept, "26.1.2", always),
    rule(R::Rdtscp, "26.1.3", |_, c| {
        c.when(
            c.primary(C::RDTSC_EXITING) && c.secondary(S::ENABLE_RDTSCP),
            "RDTSC exiting",
            "L0 performs it",
        )
    }),
    rule(R::PreemptionTimer, "26.5.1", |_, c| {
        c.when(
            c.pin(P::VMX_PREEMPTION_TIMER) && c.timer12_expired,
            "L1's VMX-preemption timer reached zero",
            "a deadline of L0's devices",
        )
    }),
    rule(R::Invvpid, "26.1.2", always),
    rule(R::Wbinvd, "26.1.3", |_, c| {
        c.when(c.secondary(S::WBINVD_EXITING), "WBINVD exiting", "the host's caches are not L2's to flush")
    }),
    rule(R::Xsetbv, "26.1.2", always),
    rule(R::ApicWrite, "30.4.3.3", |_, _| l1("the virtual-APIC page is L1's")),
    rule(R::Rdrand, "26.1.3", |_, c| {
        c.when(c.secondary(S::RDRAND_EXITING), "RDRAND exiting", "L0 performs it")
    }),
    rule(R::Invpcid, "26.1.3", |_, c| {
        c.when(
            c.primary(C::INVLPG_EXITING) && c.secondary(S::ENABLE_INVPCID),
            "INVLPG exiting",
            "L0 performs it",
        )
    }),
    rule(R::Vmfunc, "26.5.6.2", vm_function),
    rule(R::Encls, "26.1.3", |_, _| l0("ENCLS exiting is not offered to L1")),
    rule(R::Rdseed, "26.1.3", |_, c| {
        c.when(c.secondary(S::RDSEED_EXITING), "RDSEED exiting", "L0 performs it")
    }),
    rule(R::PmlFull, "29.3.6", |_, _| l0("the engine's log is L0's; L1's is kept while EPT02 is filled")),
    rule(R::Xsaves, "26.1.3", xss),
    rule(R::Xrstors, "26.1.3", xss),
    rule(R::Umwait, "26.1.3", |_, _| l0("user wait and pause is not offered to L1")),
    rule(R::Tpause, "26.1.3", |_, _| l0("user wait and pause is not offered to L1")),
];

/// Who owns `exit`, which L2 caused under VMCS02.
pub fn route(exit: &VmExit, context: &Context<'_>) -> Route {
    match TABLE.binary_search_by_key(&exit.reason, |r| r.reason).ok().and_then(|i| TABLE.get(i)) {
        Some(rule) => (rule.decide)(exit, context),
        // Not reached: the table has a rule for each reason, which a test makes sure of.
        None => l1("L1 gets what nobody claims"),
    }
}

/// Who must act on a fault of the composition.
pub fn of_fault(fault: &Fault) -> Route {
    match fault {
        Fault::L1Violation { .. } => l1("EPT12 does not allow the access"),
        Fault::L1Misconfiguration { .. } => l1("an entry of EPT12 is misconfigured"),
        Fault::L1LogFull => l1("L1's page-modification log is full"),
        Fault::L0 { .. } => l0("L1 allows the access; there L1 itself has no memory"),
        Fault::Retry => l0("tables changed during the walk: L2 tries again"),
    }
}

/// The exit that L1 gets for a fault of the composition, when the engine reported `exit` for
/// the access; `None` if it is not L1's.
pub fn exit_of_fault(exit: &VmExit, fault: &Fault) -> Option<VmExit> {
    // All three keep what the exit says of an event whose delivery it interrupted.
    match *fault {
        Fault::L1Violation { qualification } => {
            Some(VmExit { reason: R::EptViolation, qualification, ..*exit })
        }
        // Qualification and guest-linear address are undefined (SDM Vol. 3C §28.2.1).
        Fault::L1Misconfiguration { .. } => {
            Some(VmExit { reason: R::EptMisconfiguration, qualification: 0, guest_linear: 0, ..*exit })
        }
        // Bit 12, NMI unblocking due to IRET, is the only one (§28.2.1).
        Fault::L1LogFull => {
            let qualification = exit.qualification & ept_violation::NMI_UNBLOCKING;
            Some(VmExit { reason: R::PmlFull, qualification, guest_linear: 0, ..*exit })
        }
        Fault::L0 { .. } | Fault::Retry => None,
    }
}

fn always(_: &VmExit, _: &Context<'_>) -> Route {
    l1("the instruction exits unconditionally")
}

/// Whether an exception with this vector and error code exits to L1 (§26.2, §25.6.3).
pub fn exception_exits(vmcs12: &Vmcs12, vector: u8, error_code: u32) -> bool {
    if vector == exception::PF {
        return PageFaultFilter::of(vmcs12).exits(error_code);
    }
    vmcs12.get(Field::ExceptionBitmap) & 1 << (vector & 31) != 0
}

fn exception_or_nmi(exit: &VmExit, c: &Context<'_>) -> Route {
    let info = exit.interruption_info;
    if info.event_type() == EventType::Nmi {
        return l0("an NMI of the host; L1's come by L1's local APIC");
    }
    c.when(
        exception_exits(c.vmcs12, info.vector(), exit.interruption_error_code),
        "exception bitmap",
        "L1 leaves the exception to L2",
    )
}

fn descriptor_table(_: &VmExit, c: &Context<'_>) -> Route {
    c.when(c.secondary(S::DTABLE_EXITING), "descriptor-table exiting", "L0 performs it")
}

fn msr(c: &Context<'_>, write: bool) -> Route {
    c.when(
        msr_exits(c.vmcs12, c.l1, c.regs.gpr[gpr::RCX] as u32, write),
        "L1's MSR bitmap",
        "L1 gives the MSR to L2: L0 treats it as L1's own",
    )
}

fn ept(_: &VmExit, c: &Context<'_>) -> Route {
    if c.secondary(S::ENABLE_EPT) {
        Route { owner: Owner::Composition, why: "EPT12 or EPT01: composing them tells" }
    } else {
        l0("L1 does not use EPT, so the tables are EPT01")
    }
}

/// VMREAD and VMWRITE with VMCS shadowing (§26.1.3): they exit to L1 if bits 63:15 of the encoding
/// are not 0 or the bitmap has the bit for bits 14:0. Else L0 accesses L1's shadow VMCS.
fn shadowed(exit: &VmExit, c: &Context<'_>, bitmap: Field) -> Route {
    if !c.secondary(S::VMCS_SHADOWING) {
        return l1("no VMCS shadowing: the instruction exits unconditionally");
    }
    let encoding = c.gpr((exit.instruction_info >> 28) as usize);
    let byte = encoding / 8;
    let exits = byte >= vmcs_page::BITMAP_SIZE as u64 || {
        let at = memory::L1Gpa(c.vmcs12.get(bitmap)).page_base().offset(byte);
        c.l1.read_u8(at) & 1 << (encoding % 8) != 0
    };
    c.when(exits, "L1's VMREAD or VMWRITE bitmap", "L0 accesses L1's shadow VMCS")
}

/// VMFUNC (§26.5.6.2): an exit if the function is not enabled, else L0 performs it. EPTP switching
/// with an invalid list entry exits too, which [`crate::instructions::vmfunc`] finds out.
fn vm_function(_: &VmExit, c: &Context<'_>) -> Route {
    let function = c.regs.gpr[gpr::RAX] as u32;
    let enabled = c.vmcs12.get(Field::VmFunctionControls) & VMFUNC_EPTP_SWITCHING;
    c.when(
        function >= 64 || enabled & 1u64.checked_shl(function).unwrap_or(0) == 0,
        "the VM function is not enabled",
        "L0 switches EPTP12",
    )
}

/// XSAVES and XRSTORS (§26.1.3): EDX:EAX, IA32_XSS and the XSS-exiting bitmap have a bit in
/// common.
fn xss(_: &VmExit, c: &Context<'_>) -> Route {
    let requested = c.regs.gpr[gpr::RDX] << 32 | c.regs.gpr[gpr::RAX] & 0xffff_ffff;
    let exits = requested & c.regs.msrs.xss & c.vmcs12.get(Field::XssExitBitmap) != 0;
    c.when(exits, "L1's XSS-exiting bitmap", "L0 performs it")
}

/// CR accesses (§26.1.3). What is L0's is a change of a bit that VMX operation fixes or that L1 was not
/// offered: #GP(0) for L2; or CR8, which is L1's local APIC's.
fn cr_access_owner(exit: &VmExit, c: &Context<'_>) -> Route {
    let q = exit.qualification;
    let mask = |mask, shadow| CrMask { mask: c.vmcs12.get(mask), shadow: c.vmcs12.get(shadow) };
    let cr0_12 = mask(Field::Cr0Mask, Field::Cr0Shadow);
    let cr4_12 = mask(Field::Cr4Mask, Field::Cr4Shadow);
    const FIXED: &str = "not a bit of L1's: #GP(0), it is fixed in VMX operation or not offered";
    match (cr_access::kind(q), cr_access::cr(q)) {
        (cr_access::Kind::MovTo, 0) => {
            c.when(cr0_12.exits(c.gpr(cr_access::gpr(q))), "CR0 guest/host mask", FIXED)
        }
        (cr_access::Kind::MovTo, 4) => {
            c.when(cr4_12.exits(c.gpr(cr_access::gpr(q))), "CR4 guest/host mask", FIXED)
        }
        (cr_access::Kind::MovTo, 3) => {
            let value = c.gpr(cr_access::gpr(q));
            let count = c.vmcs12.get(Field::Cr3TargetCount) as usize;
            let target = CR3_TARGETS.iter().take(count).any(|f| c.vmcs12.get(*f) == value);
            c.when(c.primary(C::CR3_LOAD_EXITING) && !target, "CR3-load exiting", "L0 performs it")
        }
        (cr_access::Kind::MovTo, 8) => {
            c.when(c.primary(C::CR8_LOAD_EXITING), "CR8-load exiting", "CR8 is L1's local APIC's")
        }
        (cr_access::Kind::MovFrom, 3) => {
            c.when(c.primary(C::CR3_STORE_EXITING), "CR3-store exiting", "L0 performs it")
        }
        (cr_access::Kind::MovFrom, 8) => {
            c.when(c.primary(C::CR8_STORE_EXITING), "CR8-store exiting", "CR8 is L1's local APIC's")
        }
        (cr_access::Kind::Clts, _) => {
            c.when(cr0_12.mask & cr0_12.shadow & cr0::TS != 0, "CR0 guest/host mask", FIXED)
        }
        (cr_access::Kind::Lmsw, _) => {
            c.when(lmsw_exits(cr0_12, q >> 16 & 0xffff), "CR0 guest/host mask", FIXED)
        }
        _ => l1("no such control register is masked by L0"),
    }
}

/// LMSW (§26.1.3): for MP, EM and TS a difference from the shadow in a masked bit; PE only if it would be
/// set.
fn lmsw_exits(cr0_12: CrMask, source: u64) -> bool {
    let low = cr0::MP | cr0::EM | cr0::TS;
    (source ^ cr0_12.shadow) & cr0_12.mask & low != 0 || cr0_12.mask & source & !cr0_12.shadow & cr0::PE != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::tests::machine;
    use memory::{L1Gpa, L1Ram};
    use x86_spec::interruption::InterruptionInfo;
    use x86_spec::segment::AccessRights;

    struct Bench {
        ram: L1Ram,
        vmcs12: Vmcs12,
        guest: GuestState,
        regs: GuestRegs,
        timer12_expired: bool,
        mtf_injected: bool,
    }

    impl Bench {
        fn new() -> Self {
            let mut guest = GuestState { efer: efer::LMA | efer::LME, ..GuestState::default() };
            guest.segments[seg::CS].access = AccessRights(0xa09b);
            let (_, ram) = machine();
            Self {
                ram,
                vmcs12: Vmcs12::default(),
                guest,
                regs: GuestRegs::reset(),
                timer12_expired: false,
                mtf_injected: false,
            }
        }
        fn with(mut self, primary: C, secondary: S) -> Self {
            let primary = if secondary.is_empty() { primary } else { primary | C::SECONDARY_CONTROLS };
            self.vmcs12.set(Field::PrimaryControls, primary.bits().into());
            self.vmcs12.set(Field::SecondaryControls, secondary.bits().into());
            self
        }
        fn pin(mut self, pin: P) -> Self {
            self.vmcs12.set(Field::PinControls, pin.bits().into());
            self
        }
        fn set(mut self, field: Field, value: u64) -> Self {
            self.vmcs12.set(field, value);
            self
        }
        fn gpr(mut self, index: usize, value: u64) -> Self {
            self.regs.gpr[index] = value;
            self
        }
        fn route(&self, exit: &VmExit) -> Owner {
            let context = Context {
                vmcs12: &self.vmcs12,
                guest: &self.guest,
                regs: &self.regs,
                l1: &self.ram,
                timer12_expired: self.timer12_expired,
                mtf_injected: self.mtf_injected,
            };
            route(exit, &context).owner
        }
        fn reason(&self, reason: R) -> Owner {
            self.route(&VmExit::new(reason))
        }
    }

    #[test]
    fn every_reason_has_its_rule() {
        let reasons: Vec<R> = TABLE.iter().map(|r| r.reason).collect();
        assert_eq!(reasons, R::ALL);
        assert!(TABLE.iter().all(|r| r.section.split('.').all(|n| n.parse::<u32>().is_ok())));
    }

    /// SDM Vol. 3C §26.1.3: exits that one control decides. (Primary, secondary, reason.)
    #[test]
    fn exits_follow_their_control() {
        const NONE: (C, S) = (C::empty(), S::empty());
        let cases = [
            (C::INTERRUPT_WINDOW_EXITING, NONE.1, R::InterruptWindow),
            (C::NMI_WINDOW_EXITING, NONE.1, R::NmiWindow),
            (C::HLT_EXITING, NONE.1, R::Hlt),
            (C::INVLPG_EXITING, NONE.1, R::Invlpg),
            (C::RDPMC_EXITING, NONE.1, R::Rdpmc),
            (C::RDTSC_EXITING, NONE.1, R::Rdtsc),
            (C::RDTSC_EXITING, S::ENABLE_RDTSCP, R::Rdtscp),
            (C::INVLPG_EXITING, S::ENABLE_INVPCID, R::Invpcid),
            (C::MOV_DR_EXITING, NONE.1, R::MovDr),
            (C::UNCOND_IO_EXITING, NONE.1, R::IoInstruction),
            (C::MWAIT_EXITING, NONE.1, R::Mwait),
            (C::MONITOR_EXITING, NONE.1, R::Monitor),
            (C::MONITOR_TRAP_FLAG, NONE.1, R::MonitorTrapFlag),
            (C::PAUSE_EXITING, NONE.1, R::Pause),
            (NONE.0, S::PAUSE_LOOP_EXITING, R::Pause),
            (NONE.0, S::DTABLE_EXITING, R::GdtrIdtrAccess),
            (NONE.0, S::DTABLE_EXITING, R::LdtrTrAccess),
            (NONE.0, S::WBINVD_EXITING, R::Wbinvd),
            (NONE.0, S::RDRAND_EXITING, R::Rdrand),
            (NONE.0, S::RDSEED_EXITING, R::Rdseed),
        ];
        for (primary, secondary, reason) in cases {
            assert_eq!(Bench::new().with(primary, secondary).reason(reason), Owner::L1, "{reason:?}");
            assert_eq!(Bench::new().reason(reason), Owner::L0, "{reason:?}");
        }
        // A secondary control counts only if they are activated.
        let idle = Bench::new().set(Field::SecondaryControls, S::all().bits().into());
        assert_eq!(idle.reason(R::Wbinvd), Owner::L0);
    }

    /// §26.1.2, §26.2.
    #[test]
    fn unconditional_exits_are_l1s() {
        for r in [
            R::Cpuid,
            R::Getsec,
            R::Invd,
            R::Xsetbv,
            R::Vmcall,
            R::Vmclear,
            R::Vmlaunch,
            R::Vmptrld,
            R::Vmptrst,
            R::Vmread,
            R::Vmresume,
            R::Vmwrite,
            R::Vmxoff,
            R::Vmxon,
            R::Invept,
            R::Invvpid,
            R::TripleFault,
            R::TaskSwitch,
            R::Init,
            R::Sipi,
            R::TprBelowThreshold,
            R::ApicAccess,
            R::ApicWrite,
            R::VirtualizedEoi,
        ] {
            assert_eq!(Bench::new().reason(r), Owner::L1, "{r:?}");
        }
        assert_eq!(Bench::new().reason(R::ExternalInterrupt), Owner::L0);
    }

    /// §25.6.3: a page fault exits by bit 14 where code AND mask is the match, against it elsewhere.
    #[test]
    fn exceptions_follow_the_bitmap() {
        let exit = |vector, code| VmExit {
            interruption_info: InterruptionInfo::new(vector, EventType::HardwareException, true),
            interruption_error_code: code,
            ..VmExit::new(R::ExceptionOrNmi)
        };
        let b = Bench::new().set(Field::ExceptionBitmap, 1 << 13 | 1 << 14);
        assert_eq!(b.route(&exit(13, 0)), Owner::L1);
        assert_eq!(b.route(&exit(12, 0)), Owner::L0);
        let b = b.set(Field::PageFaultErrorCodeMask, 4).set(Field::PageFaultErrorCodeMatch, 4);
        assert_eq!((b.route(&exit(14, 4)), b.route(&exit(14, 1))), (Owner::L1, Owner::L0));
        let b = b.set(Field::ExceptionBitmap, 0);
        assert_eq!((b.route(&exit(14, 4)), b.route(&exit(14, 1))), (Owner::L0, Owner::L1));
        let nmi = VmExit {
            interruption_info: InterruptionInfo::new(2, EventType::Nmi, false),
            ..VmExit::new(R::ExceptionOrNmi)
        };
        assert_eq!(b.set(Field::ExceptionBitmap, u64::MAX).route(&nmi), Owner::L0);
    }

    /// §26.1.3, MOV CR, CLTS, LMSW.
    #[test]
    fn control_registers() {
        use cr_access::Kind;
        let mov = |cr, kind| VmExit::new(R::CrAccess).qualified(cr_access::mov(cr, kind, 3));
        let masked = || Bench::new().set(Field::Cr0Mask, cr0::TS | cr0::PE).set(Field::Cr0Shadow, cr0::TS);
        assert_eq!(masked().gpr(3, cr0::TS).route(&mov(0, Kind::MovTo)), Owner::L0, "as the shadow");
        assert_eq!(masked().gpr(3, 0).route(&mov(0, Kind::MovTo)), Owner::L1);
        assert_eq!(masked().gpr(3, cr0::TS | cr0::WP).route(&mov(0, Kind::MovTo)), Owner::L0);
        assert_eq!(masked().route(&mov(0, Kind::Clts)), Owner::L1);
        assert_eq!(masked().set(Field::Cr0Shadow, 0).route(&mov(0, Kind::Clts)), Owner::L0);
        let lmsw = |source: u64| VmExit::new(R::CrAccess).qualified(3 << 4 | source << 16);
        assert_eq!(masked().route(&lmsw(cr0::TS)), Owner::L0);
        assert_eq!(masked().route(&lmsw(cr0::TS | cr0::PE)), Owner::L1, "LMSW can set PE");
        assert_eq!(masked().route(&lmsw(0)), Owner::L1);
        let pe = masked().set(Field::Cr0Shadow, cr0::TS | cr0::PE);
        assert_eq!(pe.route(&lmsw(cr0::TS)), Owner::L0, "LMSW can't clear PE");
        let cr4 = Bench::new().set(Field::Cr4Mask, 1 << 5).gpr(3, 1 << 5);
        assert_eq!(cr4.route(&mov(4, Kind::MovTo)), Owner::L1);
        let cr3 = || {
            let b = Bench::new().with(C::CR3_LOAD_EXITING, S::empty()).gpr(3, 0x5000);
            b.set(Field::Cr3Target1, 0x5000)
        };
        assert_eq!(cr3().set(Field::Cr3TargetCount, 2).route(&mov(3, Kind::MovTo)), Owner::L0);
        assert_eq!(cr3().set(Field::Cr3TargetCount, 1).route(&mov(3, Kind::MovTo)), Owner::L1);
        assert_eq!(cr3().route(&mov(3, Kind::MovFrom)), Owner::L0);
        let cr8 = Bench::new().with(C::CR8_STORE_EXITING, S::empty());
        assert_eq!(cr8.route(&mov(8, Kind::MovFrom)), Owner::L1);
        assert_eq!(cr8.route(&mov(8, Kind::MovTo)), Owner::L0);
    }

    #[test]
    fn ports_and_msrs_follow_l1s_bitmaps() {
        let b = Bench::new().with(C::USE_IO_BITMAPS | C::USE_MSR_BITMAPS, S::empty());
        let b = b.set(Field::IoBitmapA, 0x1000).set(Field::IoBitmapB, 0x2000).set(Field::MsrBitmap, 0x3000);
        let l1: &dyn L1Physical = &b.ram;
        l1.write(L1Gpa(0x1000 + 0x60 / 8), &[1]);
        // WRMSR of IA32_EFER: the quarter at C00H.
        l1.write(L1Gpa(0x3000 + 0xc00 + 0x80 / 8), &[1]);
        let port = |p| VmExit::new(R::IoInstruction).qualified(io::qualification(p, 1, io::IN));
        assert_eq!((b.route(&port(0x60)), b.route(&port(0x61))), (Owner::L1, Owner::L0));
        let b = b.gpr(gpr::RCX, 0xc000_0080);
        assert_eq!((b.reason(R::Wrmsr), b.reason(R::Rdmsr)), (Owner::L1, Owner::L0));
        let b = b.gpr(gpr::RCX, 0x4000_0000);
        assert_eq!(b.reason(R::Rdmsr), Owner::L1, "outside both ranges");
    }

    #[test]
    fn shadowing_ept_timer_and_functions() {
        let mut b = Bench::new().with(C::empty(), S::VMCS_SHADOWING | S::ENABLE_EPT | S::ENABLE_VM_FUNCTIONS);
        b = b.set(Field::VmreadBitmap, 0x4000).pin(P::VMX_PREEMPTION_TIMER);
        assert_eq!(b.reason(R::EptViolation), Owner::Composition);
        assert_eq!(Bench::new().reason(R::EptViolation), Owner::L0);
        let vmread = VmExit { instruction_info: 5 << 28, ..VmExit::new(R::Vmread) };
        assert_eq!(b.route(&vmread), Owner::L0, "encoding 0, its bit is 0");
        L1Physical::write(&b.ram, L1Gpa(0x4000), &[1]);
        assert_eq!(b.route(&vmread), Owner::L1);
        b = b.gpr(5, 1 << 15);
        assert_eq!(b.route(&vmread), Owner::L1, "bits above 14 are not for bitmaps");
        assert_eq!(b.reason(R::PreemptionTimer), Owner::L0);
        b.timer12_expired = true;
        assert_eq!(b.reason(R::PreemptionTimer), Owner::L1);
        assert_eq!(b.reason(R::Vmfunc), Owner::L1, "EPTP switching is not enabled");
        b = b.set(Field::VmFunctionControls, 1);
        assert_eq!(b.reason(R::Vmfunc), Owner::L0);
        assert_eq!(b.gpr(gpr::RAX, 64).reason(R::Vmfunc), Owner::L1);
        let mtf = Bench { mtf_injected: true, ..Bench::new() };
        assert_eq!(mtf.reason(R::MonitorTrapFlag), Owner::L1);
    }

    /// §26.1.3: EDX:EAX, IA32_XSS and the bitmap.
    #[test]
    fn xsaves() {
        let mut b = Bench::new().set(Field::XssExitBitmap, 1 << 8).gpr(gpr::RAX, u64::MAX);
        assert_eq!(b.reason(R::Xsaves), Owner::L0);
        b.regs.msrs.xss = 1 << 8;
        assert_eq!((b.reason(R::Xsaves), b.reason(R::Xrstors)), (Owner::L1, Owner::L1));
        assert_eq!(b.gpr(gpr::RAX, 1).reason(R::Xsaves), Owner::L0);
    }

    #[test]
    fn faults_become_exits() {
        use ept_compress::{Entry, L0Fault, Level, Misconfiguration, Step};
        let exit = VmExit {
            guest_linear: 5,
            guest_physical: memory::Gpa(0x123),
            idt_vectoring: InterruptionInfo(0x8000_0020),
            ..VmExit::new(R::EptViolation).qualified(0x1182)
        };
        let of = |fault| exit_of_fault(&exit, &fault);
        let v = of(Fault::L1Violation { qualification: 0x11aa }).unwrap();
        assert_eq!(v, VmExit { qualification: 0x11aa, ..exit });
        let step = Step { at: L1Gpa(0), level: Level::Pte, entry: Entry(2) };
        let rule = Misconfiguration::WriteWithoutRead;
        let m = of(Fault::L1Misconfiguration { rule, step }).unwrap();
        assert_eq!(
            (m.reason, m.guest_physical, m.qualification),
            (R::EptMisconfiguration, exit.guest_physical, 0)
        );
        let p = of(Fault::L1LogFull).unwrap();
        assert_eq!((p.reason, p.qualification, p.idt_vectoring), (R::PmlFull, 1 << 12, exit.idt_vectoring));
        let l0 = Fault::L0 { gpa: L1Gpa(0), fault: L0Fault::NoMemory };
        assert_eq!((of(l0), of(Fault::Retry)), (None, None));
        assert_eq!((of_fault(&l0).owner, of_fault(&Fault::L1LogFull).owner), (Owner::L0, Owner::L1));
    }
}
