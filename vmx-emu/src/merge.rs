//! Merge: the controls of VMCS02 from VMCS01 (what L0 needs), VMCS12 (what L1 wants) and the
//! engine's capabilities.
//!
//! Three kinds of controls:
//! - those that make something exit: on if L0 *or* L1 wants it;
//! - those that give L2 something (RDTSCP, INVPCID, XSAVES, unrestricted guest): on if L1 wants
//!   it *and* L0 gives it to L1;
//! - those that L0 carries out itself between two entries, so that VMCS02 has them off: PML,
//!   VMCS shadowing for L2, VM functions' EPTP switching (its VMFUNC exits to L0).
//!
//! Guest state is not merged: it is loaded from VMCS12 at the entry (see [`crate::enter`]).
//!
//! Not supported: L0 with exceptions of its own other than as bits of the exception bitmap,
//! CR3 targets of L0, TPR shadow of L0, since VMCS01 uses none of them.

pub mod bitmaps;
pub mod cr;
pub mod provenance;
#[cfg(test)]
pub(crate) mod tests;
pub mod tsc;
pub mod vpid;

use engine::{Controls, EngineVmcs};
use memory::{L1Gpa, MachineAddr, MachineMemory, MemoryError};
use x86_spec::caps::{AllowedControls, VmxCapabilities};
use x86_spec::controls::{
    EntryControls as N, ExitControls as X, PinbasedControls as P, PrimaryControls as C,
    SecondaryControls as S,
};
use x86_spec::interruption::InterruptionInfo;
use x86_spec::reg::cr0;

use crate::capabilities::Capabilities;
use crate::fields::{CR3_TARGETS, EOI_EXIT, Field};
use crate::physical::L1Physical;
use crate::vmcs12::Vmcs12;
use bitmaps::{MsrBitmaps, primary12, secondary12};
use cr::CrMask;
use provenance::{ControlOrigins, Origins};
use tsc::TscView;

/// Pages of L0's pool that the merge fills, one set for each logical processor of L1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pages {
    /// I/O bitmap A.
    pub io_bitmap_a: MachineAddr,
    /// I/O bitmap B.
    pub io_bitmap_b: MachineAddr,
    /// MSR bitmap.
    pub msr_bitmap: MachineAddr,
    /// A page that stands for pages which L1 names and which are not RAM (a virtual-APIC page in
    /// a hole, for example). Its content has no meaning.
    pub nowhere: MachineAddr,
}

/// L0's side.
#[derive(Clone, Copy, Debug)]
pub struct L0<'a> {
    /// How L0 runs L1: all that VMCS01's controls ask for, L0 needs.
    pub vmcs01: &'a EngineVmcs,
    /// What the engine can do.
    pub engine: &'a VmxCapabilities,
    /// What L1 was offered.
    pub caps: &'a Capabilities,
    /// Interrupt- and NMI-window exiting, where L0 itself waits to inject something.
    pub windows: C,
    /// When L0 needs the processor back, in ticks of the VMX-preemption timer.
    pub deadline: Option<u32>,
    /// Pages to fill.
    pub pages: Pages,
    /// What the MSR bitmap among them was made of.
    pub msr_bitmaps: &'a MsrBitmaps,
    /// The memory that they are in.
    pub memory: &'a MachineMemory,
}

/// Where L2 lives in the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Space {
    /// EPTP02 from `ept_compress::Ept02::root`; EPT01's own if VMCS12 does not enable EPT.
    pub eptp02: u64,
    /// From [`vpid::VpidMap`].
    pub vpid02: u16,
}

/// What the merge gives.
#[derive(Clone, Debug)]
pub struct Merged {
    /// Controls of VMCS02.
    pub controls: Controls,
    /// Value of the VMX-preemption timer, if VMCS02 uses it.
    pub preemption_timer: Option<u32>,
    /// Where each control bit comes from.
    pub origins: ControlOrigins,
    /// VMCS12's APIC-access page, if it is used and not RAM: accesses to it must find
    /// [`Pages::nowhere`] in EPT02.
    pub apic_access_elsewhere: Option<L1Gpa>,
}

/// Merges the controls for a VM entry. `timer12` is what is left of L1's VMX-preemption
/// timer. The event that VMCS12 injects is included: this is for VMLAUNCH and VMRESUME, and
/// between them VMCS02 just runs on, with [`set_timer`] and [`set_windows`].
///
/// # Errors
/// [`MemoryError`] when a page of L0 (not of L1) is not in machine memory.
pub fn merge(
    l0: &L0<'_>,
    vmcs12: &Vmcs12,
    l1: &dyn L1Physical,
    space: L2Space,
    timer12: Option<u32>,
) -> Result<Merged, MemoryError> {
    let c01 = &l0.vmcs01.controls;
    let origins = ControlOrigins {
        pin: pin(l0, vmcs12),
        primary: primary(l0, vmcs12),
        secondary: secondary(l0, vmcs12),
        exit: exit(l0, vmcs12),
        entry: entry(l0, vmcs12),
    };
    let mut c = Controls {
        pin: P::from_bits_truncate(origins.pin.value),
        primary: C::from_bits_truncate(origins.primary.value),
        secondary: S::from_bits_truncate(origins.secondary.value),
        exit: X::from_bits_truncate(origins.exit.value),
        entry: N::from_bits_truncate(origins.entry.value),
        eptp: space.eptp02,
        vpid: space.vpid02,
        // No VM function is the engine's: each VMFUNC exits, and L0 does EPTP switching.
        vm_functions: 0,
        ple_gap: vmcs12.get32(Field::PleGap),
        ple_window: vmcs12.get32(Field::PleWindow),
        xss_exit_bitmap: c01.xss_exit_bitmap | vmcs12.get(Field::XssExitBitmap),
        entry_interruption: InterruptionInfo(vmcs12.get32(Field::EntryInterruptionInfo)),
        entry_error_code: vmcs12.get32(Field::EntryErrorCode),
        entry_instruction_length: vmcs12.get32(Field::EntryInstructionLength),
        ..Controls::default()
    };
    exceptions(&mut c, c01, vmcs12);
    control_registers(&mut c, l0, vmcs12);
    time_stamps(&mut c, c01, vmcs12);
    io(&mut c, l0, vmcs12, l1)?;
    msrs(&mut c, l0, vmcs12, l1)?;
    let apic_access_elsewhere = apic(&mut c, l0, vmcs12, l1);
    let preemption_timer = preemption_timer(l0.deadline, timer12);
    Ok(Merged { controls: c, preemption_timer, origins, apic_access_elsewhere })
}

/// Sets VMCS02's VMX-preemption timer to the sooner of L0's deadline and L1's timer. To be called
/// before each entry with VMCS02.
pub fn set_timer(vmcs02: &mut EngineVmcs, deadline: Option<u32>, timer12: Option<u32>) {
    let value = preemption_timer(deadline, timer12);
    vmcs02.controls.pin.set(P::VMX_PREEMPTION_TIMER, value.is_some());
    vmcs02.guest.preemption_timer = value.unwrap_or(0);
}

fn preemption_timer(deadline: Option<u32>, timer12: Option<u32>) -> Option<u32> {
    match (deadline, timer12) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// Sets the windows that L0 waits for, besides L1's.
pub fn set_windows(vmcs02: &mut EngineVmcs, vmcs12: &Vmcs12, windows: C) {
    let wanted = (primary12(vmcs12) | windows) & WINDOWS;
    let others = vmcs02.controls.primary & !WINDOWS;
    vmcs02.controls.primary = others | wanted;
}

/// The field's origins for `value`, with L1's bits as L1 chose them.
fn origins(value: u32, l0: u32, l1: u32, engine: AllowedControls, offered: AllowedControls) -> Origins {
    Origins {
        value: value | engine.must_be_one,
        l0,
        l1: l1 & !offered.must_be_one,
        forced: engine.must_be_one,
    }
}

/// Pin-based controls (§25.6.1).
///
/// Virtual NMIs: L0 has L2's NMI blocking tracked as it has L1's, unless L1 takes NMIs of L2
/// itself. Then its choice stands, since it decides whether IRET ends the blocking (§26.3).
fn pin(l0: &L0<'_>, vmcs12: &Vmcs12) -> Origins {
    let wants = P::from_bits_truncate(vmcs12.get32(Field::PinControls));
    let mut needs = l0.vmcs01.controls.pin;
    needs.set(P::VMX_PREEMPTION_TIMER, l0.deadline.is_some());
    if wants.contains(P::NMI_EXITING) {
        needs.remove(P::VIRTUAL_NMIS);
    }
    let value = (needs | wants).bits() & l0.engine.pin.may_be_one;
    origins(value, needs.bits(), vmcs12.get32(Field::PinControls), l0.engine.pin, l0.caps.pin)
}

/// Controls that come and go with what L0 waits for.
const WINDOWS: C = C::INTERRUPT_WINDOW_EXITING.union(C::NMI_WINDOW_EXITING);

/// What L0 needs of the primary controls for this VMCS12. The windows in VMCS01 are for events
/// of L1 and say nothing of L2.
fn primary_needs(l0: &L0<'_>, wants: C) -> C {
    let mut needs = l0.vmcs01.controls.primary & !WINDOWS | l0.windows & WINDOWS;
    if wants.contains(C::USE_TPR_SHADOW) {
        // CR8 is then the virtual-APIC page's, not that of L1's local APIC.
        needs.remove(C::CR8_LOAD_EXITING | C::CR8_STORE_EXITING);
    }
    needs
}

/// Primary processor-based controls (§25.6.2).
fn primary(l0: &L0<'_>, vmcs12: &Vmcs12) -> Origins {
    let wants = primary12(vmcs12);
    let needs = primary_needs(l0, wants);
    let mut value = needs | wants;
    // An MSR access passes only where both bitmaps let it pass, so both must exist.
    value.set(C::USE_MSR_BITMAPS, (needs & wants).contains(C::USE_MSR_BITMAPS));
    let exits = io_exits(needs, wants);
    value.set(C::UNCOND_IO_EXITING, exits == IoExits::All);
    value.set(C::USE_IO_BITMAPS, matches!(exits, IoExits::L0 | IoExits::L1 | IoExits::Both));
    let value = value.bits() & l0.engine.primary.may_be_one;
    origins(value, needs.bits(), vmcs12.get32(Field::PrimaryControls), l0.engine.primary, l0.caps.primary)
}

/// Controls that give L2 something: both must agree.
const GIVING: S =
    S::ENABLE_RDTSCP.union(S::ENABLE_INVPCID).union(S::ENABLE_XSAVES_XRSTORS).union(S::UNRESTRICTED_GUEST);
/// Controls that L0 carries out in software.
const EMULATED: S = S::ENABLE_PML.union(S::VMCS_SHADOWING);

/// Secondary processor-based controls (§25.6.2).
fn secondary(l0: &L0<'_>, vmcs12: &Vmcs12) -> Origins {
    let wants = secondary12(vmcs12);
    let c01 = l0.vmcs01.controls.secondary;
    let needs = c01 & !GIVING & !EMULATED;
    let value = needs | (wants & !GIVING & !EMULATED) | (wants & c01 & GIVING);
    let value = value.bits() & l0.engine.secondary.may_be_one;
    origins(value, needs.bits(), wants.bits(), l0.engine.secondary, l0.caps.secondary)
}

/// VM-exit controls (§25.7.1): exits of VMCS02 go to L0, which saves all it may have to pass
/// on. Loading of host state for L1 is L0's work.
fn exit(l0: &L0<'_>, vmcs12: &Vmcs12) -> Origins {
    let wants = X::from_bits_truncate(vmcs12.get32(Field::ExitControls));
    let mut needs = l0.vmcs01.controls.exit;
    if P::from_bits_truncate(vmcs12.get32(Field::PinControls)).contains(P::POSTED_INTERRUPTS) {
        // Demanded with "process posted interrupts" (§27.2.1.1).
        needs |= wants & X::ACK_INTERRUPT_ON_EXIT;
    }
    let value = needs.bits() & l0.engine.exit.may_be_one;
    origins(value, needs.bits(), wants.bits(), l0.engine.exit, l0.caps.exit)
}

/// VM-entry controls (§25.8.1): L0 always loads what it saves; [`crate::enter`] puts L1's
/// values where VMCS12 has none to load.
fn entry(l0: &L0<'_>, vmcs12: &Vmcs12) -> Origins {
    let wants = N::from_bits_truncate(vmcs12.get32(Field::EntryControls));
    let needs = l0.vmcs01.controls.entry & !N::IA32E_MODE_GUEST;
    let value = (needs | wants).bits() & l0.engine.entry.may_be_one;
    origins(value, needs.bits(), wants.bits(), l0.engine.entry, l0.caps.entry)
}

/// Which page faults exit, as §25.6.3 combines bit 14 of the exception bitmap with the
/// page-fault error-code mask and match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFaultFilter {
    /// Bit 14 of the exception bitmap.
    pub bit: bool,
    /// Page-fault error-code mask.
    pub mask: u32,
    /// Page-fault error-code match.
    pub matching: u32,
}

impl PageFaultFilter {
    /// All page faults.
    pub const ALL: Self = Self { bit: true, mask: 0, matching: 0 };

    /// Whether a page fault with this error code exits: where code AND mask equals match, bit 14
    /// says so, elsewhere its opposite.
    pub const fn exits(self, error_code: u32) -> bool {
        (error_code & self.mask == self.matching) == self.bit
    }

    /// Whether no page fault can exit.
    const fn none_exits(self) -> bool {
        if self.matching & !self.mask != 0 {
            // Never equal.
            self.bit
        } else {
            self.mask == 0 && !self.bit
        }
    }

    /// A filter that lets everything exit that exits by either. One filter can't always
    /// express both exactly; then all exit, and L0 sorts them out.
    pub fn combine(self, other: Self) -> Self {
        if self.none_exits() {
            other
        } else if other.none_exits() || self == other {
            self
        } else {
            Self::ALL
        }
    }

    /// VMCS12's filter.
    pub fn of(vmcs12: &Vmcs12) -> Self {
        Self {
            bit: vmcs12.get(Field::ExceptionBitmap) & 1 << 14 != 0,
            mask: vmcs12.get32(Field::PageFaultErrorCodeMask),
            matching: vmcs12.get32(Field::PageFaultErrorCodeMatch),
        }
    }
}

/// Exception bitmap and page-fault filter (§25.6.3).
fn exceptions(c: &mut Controls, c01: &Controls, vmcs12: &Vmcs12) {
    let pf = 1 << 14;
    let l0 = PageFaultFilter {
        bit: c01.exception_bitmap & pf != 0,
        mask: c01.pfec_mask,
        matching: c01.pfec_match,
    };
    let both = l0.combine(PageFaultFilter::of(vmcs12));
    let others = (c01.exception_bitmap | vmcs12.get32(Field::ExceptionBitmap)) & !pf;
    c.exception_bitmap = others | if both.bit { pf } else { 0 };
    (c.pfec_mask, c.pfec_match) = (both.mask, both.matching);
}

/// The CR0 bits that L0 holds while L2 runs: VMCS01's, and those that VMX operation fixes to 1
/// (§24.8). L2 gets #GP(0) for clearing them, from L0 as from a processor. An unrestricted guest
/// may clear PE and PG, though VMCS01 holds them: L1 is in VMX root operation and may not.
pub fn l0_cr0_bits(mask01: u64, vmcs12: &Vmcs12) -> u64 {
    let unrestricted = secondary12(vmcs12).contains(S::UNRESTRICTED_GUEST);
    let exempt = if unrestricted { cr0::PE | cr0::PG } else { 0 };
    (mask01 | Capabilities::CR0_FIXED0) & !exempt
}

/// The CR4 bits that L0 holds while L2 runs: VMCS01's, and those that VMX operation fixes to 0
/// or 1.
pub fn l0_cr4_bits(mask01: u64, caps: &Capabilities) -> u64 {
    mask01 | Capabilities::CR4_FIXED0 | !caps.cr4_fixed1
}

/// CR0 and CR4 masks and shadows, CR3 targets (§25.6.6, §25.6.7).
fn control_registers(c: &mut Controls, l0: &L0<'_>, vmcs12: &Vmcs12) {
    let c01 = &l0.vmcs01.controls;
    let cr0 = CrMask::compose(
        vmcs12.get(Field::Cr0Mask),
        vmcs12.get(Field::Cr0Shadow),
        l0_cr0_bits(c01.cr0_mask, vmcs12),
        vmcs12.get(Field::GuestCr0),
    );
    let cr4 = CrMask::compose(
        vmcs12.get(Field::Cr4Mask),
        vmcs12.get(Field::Cr4Shadow),
        l0_cr4_bits(c01.cr4_mask, l0.caps),
        vmcs12.get(Field::GuestCr4),
    );
    (c.cr0_mask, c.cr0_shadow) = (cr0.mask, cr0.shadow);
    (c.cr4_mask, c.cr4_shadow) = (cr4.mask, cr4.shadow);
    c.cr3_targets = CR3_TARGETS.map(|f| vmcs12.get(f));
    c.cr3_target_count = vmcs12.get32(Field::Cr3TargetCount).min(4);
    if c01.primary.contains(C::CR3_LOAD_EXITING) {
        // L0 wants all loads.
        c.cr3_target_count = 0;
    }
}

/// The TSC as VMCS12 shows it to L2, on top of L1's (§25.6.5). Scaling acts only with
/// offsetting.
pub fn tsc12(vmcs12: &Vmcs12) -> TscView {
    if !primary12(vmcs12).contains(C::USE_TSC_OFFSETTING) {
        return TscView::IDENTITY;
    }
    let scaled = secondary12(vmcs12).contains(S::USE_TSC_SCALING);
    TscView {
        offset: vmcs12.get(Field::TscOffset),
        multiplier: if scaled { vmcs12.get(Field::TscMultiplier) } else { tsc::UNIT },
    }
}

/// The TSC as VMCS01 shows it to L1.
pub fn tsc01(c01: &Controls) -> TscView {
    if !c01.primary.contains(C::USE_TSC_OFFSETTING) {
        return TscView::IDENTITY;
    }
    let scaled = c01.secondary.contains(S::USE_TSC_SCALING);
    TscView { offset: c01.tsc_offset, multiplier: if scaled { c01.tsc_multiplier } else { tsc::UNIT } }
}

fn time_stamps(c: &mut Controls, c01: &Controls, vmcs12: &Vmcs12) {
    let view = tsc01(c01).compose(tsc12(vmcs12));
    (c.tsc_offset, c.tsc_multiplier) = (view.offset, view.multiplier);
}

/// Whose I/O instructions exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IoExits {
    /// None.
    None,
    /// All.
    All,
    /// Those of L0's bitmaps.
    L0,
    /// Those of L1's bitmaps.
    L1,
    /// Those of either's bitmaps.
    Both,
}

/// Combines the I/O controls: bitmaps, where used, outrank unconditional exiting (§25.6.2).
fn io_exits(l0: C, l1: C) -> IoExits {
    let bitmaps = |c: C| c.contains(C::USE_IO_BITMAPS);
    let all = |c: C| !bitmaps(c) && c.contains(C::UNCOND_IO_EXITING);
    match (bitmaps(l0), bitmaps(l1)) {
        _ if all(l0) || all(l1) => IoExits::All,
        (true, true) => IoExits::Both,
        (true, false) => IoExits::L0,
        (false, true) => IoExits::L1,
        (false, false) => IoExits::None,
    }
}

/// I/O bitmaps (§25.6.4).
fn io(c: &mut Controls, l0: &L0<'_>, vmcs12: &Vmcs12, l1: &dyn L1Physical) -> Result<(), MemoryError> {
    let c01 = &l0.vmcs01.controls;
    let wants = primary12(vmcs12);
    let pages = [
        (l0.pages.io_bitmap_a, c01.io_bitmap_a, Field::IoBitmapA),
        (l0.pages.io_bitmap_b, c01.io_bitmap_b, Field::IoBitmapB),
    ];
    (c.io_bitmap_a, c.io_bitmap_b) = (l0.pages.io_bitmap_a, l0.pages.io_bitmap_b);
    match io_exits(primary_needs(l0, wants), wants) {
        IoExits::None | IoExits::All => {}
        IoExits::L0 => (c.io_bitmap_a, c.io_bitmap_b) = (c01.io_bitmap_a, c01.io_bitmap_b),
        IoExits::L1 => {
            for (target, _, field) in pages {
                let mut page = [0; bitmaps::PAGE];
                l1.read(L1Gpa(vmcs12.get(field)).page_base(), &mut page);
                l0.memory.write(target, &page)?;
            }
        }
        IoExits::Both => {
            for (target, ours, field) in pages {
                bitmaps::combine(l0.memory, l1, ours, vmcs12.get(field), target)?;
            }
        }
    }
    Ok(())
}

/// MSR bitmap (§25.6.9).
fn msrs(c: &mut Controls, l0: &L0<'_>, vmcs12: &Vmcs12, l1: &dyn L1Physical) -> Result<(), MemoryError> {
    c.msr_bitmap = l0.pages.msr_bitmap;
    if !c.primary.contains(C::USE_MSR_BITMAPS) {
        return Ok(());
    }
    let ours = l0.vmcs01.controls.msr_bitmap;
    l0.msr_bitmaps.combine(l0.memory, l1, ours, vmcs12, l0.pages.msr_bitmap)
}

/// APIC virtualization and posted interrupts: L1's pages by their machine addresses (§25.6.8).
/// The APIC-access page if it is not RAM.
fn apic(c: &mut Controls, l0: &L0<'_>, vmcs12: &Vmcs12, l1: &dyn L1Physical) -> Option<L1Gpa> {
    let machine = |field| {
        let at = L1Gpa(vmcs12.get(field));
        l1.machine(at).unwrap_or(l0.pages.nowhere).offset(at.page_offset())
    };
    if c.primary.contains(C::USE_TPR_SHADOW) {
        c.virtual_apic = machine(Field::VirtualApicAddress);
        c.tpr_threshold = vmcs12.get32(Field::TprThreshold);
    }
    if c.secondary.contains(S::VIRTUAL_INTERRUPT_DELIVERY) {
        c.eoi_exit = EOI_EXIT.map(|f| vmcs12.get(f));
    }
    if c.pin.contains(P::POSTED_INTERRUPTS) {
        c.posted_vector = vmcs12.get(Field::PostedInterruptVector) as u8;
        c.posted_descriptor = machine(Field::PostedInterruptDescriptor);
    }
    if !c.secondary.contains(S::VIRTUALIZE_APIC) {
        return None;
    }
    c.apic_access = machine(Field::ApicAccessAddress);
    let at = L1Gpa(vmcs12.get(Field::ApicAccessAddress));
    l1.machine(at).is_none().then(|| at.page_base())
}
