//! VMCS01: how L0 runs L1. Which controls it sets, and why.
//!
//! The reasons are data, so that the merge for L2 can say where a bit of VMCS02 comes from.

use engine::{Controls, DescriptorTable, EngineVmcs, GuestRegs, Segment};
use machine::boot::{BootSegment, BootState};
use memory::{MachineAddr, MachineMemory, MemoryError};
use x86_spec::caps::{AllowedControls, VmxCapabilities};
use x86_spec::controls::{EntryControls, ExitControls, PinbasedControls, PrimaryControls, SecondaryControls};
use x86_spec::reg::{cr4, efer, gpr};
use x86_spec::segment::{AccessRights, seg};
use x86_spec::{msr, reg};

/// One control that L0 wants.
#[derive(Clone, Copy, Debug)]
pub struct Need<C> {
    /// The control.
    pub control: C,
    /// L0 can't run L1 without it.
    pub required: bool,
    /// What L0 needs it for.
    pub why: &'static str,
}

const fn must<C>(control: C, why: &'static str) -> Need<C> {
    Need { control, required: true, why }
}
const fn may<C>(control: C, why: &'static str) -> Need<C> {
    Need { control, required: false, why }
}

/// Pin-based controls (SDM Vol. 3C §25.6.1).
pub const PIN: &[Need<PinbasedControls>] = &[
    must(PinbasedControls::EXTERNAL_INTERRUPT_EXITING, "a kick must return to L0"),
    must(PinbasedControls::NMI_EXITING, "NMIs are L0's"),
    must(
        PinbasedControls::VIRTUAL_NMIS,
        "L1's NMI blocking is tracked by the processor, and NMI windows exist",
    ),
    must(PinbasedControls::VMX_PREEMPTION_TIMER, "devices must get the processor at their next deadline"),
];

/// Primary processor-based controls (§25.6.2), without those that come and go.
pub const PRIMARY: &[Need<PrimaryControls>] = &[
    must(PrimaryControls::USE_TSC_OFFSETTING, "L1's TSC starts at 0 and can be written"),
    must(PrimaryControls::HLT_EXITING, "an idle L1 must give the host's processor back"),
    may(
        PrimaryControls::CR8_LOAD_EXITING,
        "the task priority is the local APIC's; without, it is carried over at entries and exits",
    ),
    may(
        PrimaryControls::CR8_STORE_EXITING,
        "the task priority is the local APIC's; without, it is carried over at entries and exits",
    ),
    must(PrimaryControls::UNCOND_IO_EXITING, "all ports are devices of L0"),
    must(PrimaryControls::USE_MSR_BITMAPS, "MSRs that switch with the context need no exit"),
    must(PrimaryControls::SECONDARY_CONTROLS, "EPT and what else is below"),
    may(PrimaryControls::MWAIT_EXITING, "L0 waits, or MWAIT is not offered"),
    may(PrimaryControls::MONITOR_EXITING, "MONITOR is not offered or not enabled; else cleared"),
];

/// Secondary processor-based controls (§25.6.2).
pub const SECONDARY: &[Need<SecondaryControls>] = &[
    must(SecondaryControls::ENABLE_EPT, "L1's memory is EPT01"),
    must(SecondaryControls::UNRESTRICTED_GUEST, "L1 uses real mode and protected mode without paging"),
    may(SecondaryControls::ENABLE_VPID, "switches between L1 and L2 keep translations"),
    may(SecondaryControls::ENABLE_RDTSCP, "offered to L1 by CPUID"),
    may(SecondaryControls::ENABLE_INVPCID, "offered to L1 by CPUID"),
    may(SecondaryControls::ENABLE_XSAVES_XRSTORS, "offered to L1 by CPUID"),
    may(SecondaryControls::WBINVD_EXITING, "the host's caches are not L1's to flush"),
];

/// VM-exit controls (§25.7.1).
pub const EXIT: &[Need<ExitControls>] = &[
    may(ExitControls::SAVE_DEBUG_CONTROLS, "DR7 and IA32_DEBUGCTL are L1's"),
    may(ExitControls::HOST_ADDRESS_SPACE_SIZE, "L0 is 64-bit"),
    may(ExitControls::LOAD_IA32_PERF_GLOBAL_CTRL, "L1's performance counters do not count L0"),
    must(ExitControls::SAVE_IA32_PAT, "IA32_PAT is L1's"),
    must(ExitControls::SAVE_IA32_EFER, "IA32_EFER is L1's"),
];

/// VM-entry controls (§25.8.1), without "IA-32e mode guest", which follows IA32_EFER.LMA.
pub const ENTRY: &[Need<EntryControls>] = &[
    must(EntryControls::LOAD_DEBUG_CONTROLS, "DR7 and IA32_DEBUGCTL are L1's"),
    may(EntryControls::LOAD_IA32_PERF_GLOBAL_CTRL, "IA32_PERF_GLOBAL_CTRL is L1's"),
    must(EntryControls::LOAD_IA32_PAT, "IA32_PAT is L1's"),
    must(EntryControls::LOAD_IA32_EFER, "IA32_EFER is L1's"),
];

/// MSRs that L1 reads and writes without an exit: they are part of the context that the
/// engine switches, and the engine does the architectural checks on writes.
pub const PASS_THROUGH: &[u32] = &[
    msr::FS_BASE,
    msr::GS_BASE,
    msr::KERNEL_GS_BASE,
    msr::STAR,
    msr::LSTAR,
    msr::CSTAR,
    msr::FMASK,
    msr::EFER,
    msr::IA32_SYSENTER_CS,
    msr::IA32_SYSENTER_ESP,
    msr::IA32_SYSENTER_EIP,
    msr::IA32_PAT,
    msr::IA32_TSC_AUX_MSR,
    msr::IA32_SPEC_CTRL,
];

/// MSRs that L1 reads without an exit where the engine has the values that L0 gave it: KVM reads IA32_DEBUGCTL before
/// each entry of its guest.
const READ_THROUGH: &[u32] = &[msr::IA32_DEBUGCTL];

/// MSRs that are the engine's as well where it executes VMX instructions itself: IA32_FEATURE_CONTROL and the
/// capability MSRs (SDM Vol. 3D appendix A).
pub fn vmx_msrs() -> impl Iterator<Item = u32> {
    std::iter::once(msr::IA32_FEATURE_CONTROL).chain(msr::IA32_VMX_BASIC..=msr::IA32_VMX_VMFUNC)
}

/// The VPID of L1. 0 is L0's own (SDM Vol. 3C §29.1); L2s get the others.
pub const VPID: u16 = 1;

/// The engine lacks a control that L0 can't do without.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the engine lacks the VM-execution control {control}, which L0 needs: {why}")]
pub struct MissingControl {
    /// The control's name.
    pub control: String,
    /// What it is needed for.
    pub why: &'static str,
}

/// Puts `needs` together with what the engine forces.
fn choose<C: Copy + std::fmt::Debug>(
    needs: &[Need<C>],
    bits: impl Fn(C) -> u32,
    allowed: AllowedControls,
) -> Result<u32, MissingControl> {
    let mut value = allowed.must_be_one;
    for n in needs {
        let b = bits(n.control);
        if allowed.may_be_one & b == b {
            value |= b;
        } else if n.required {
            return Err(MissingControl { control: format!("{:?}", n.control), why: n.why });
        }
    }
    Ok(value)
}

/// VMCS01's controls for an engine.
///
/// `cr4_offered` are the CR4 bits that L1 may set: a write to any other exits, and L0
/// answers with #GP.
///
/// # Errors
/// [`MissingControl`] when the engine can't do what L0 needs.
pub fn controls(
    caps: &VmxCapabilities,
    eptp: u64,
    msr_bitmap: MachineAddr,
    cr4_offered: u64,
) -> Result<Controls, MissingControl> {
    Ok(Controls {
        pin: PinbasedControls::from_bits_truncate(choose(PIN, |c| c.bits(), caps.pin)?),
        primary: PrimaryControls::from_bits_truncate(choose(PRIMARY, |c| c.bits(), caps.primary)?),
        secondary: SecondaryControls::from_bits_truncate(choose(SECONDARY, |c| c.bits(), caps.secondary)?),
        exit: ExitControls::from_bits_truncate(choose(EXIT, |c| c.bits(), caps.exit)?),
        entry: EntryControls::from_bits_truncate(choose(ENTRY, |c| c.bits(), caps.entry)?),
        // No exception is L0's business.
        exception_bitmap: 0,
        msr_bitmap,
        // Nothing in CR0 changes what L0 does; CD and NW are L1's to play with.
        cr0_mask: 0,
        cr0_shadow: 0,
        cr4_mask: !cr4_offered,
        cr4_shadow: 0,
        eptp,
        vpid: VPID,
        lenient: true,
        ..Controls::default()
    })
}

/// Fills the MSR bitmap at `page` (SDM Vol. 3C §25.6.9): everything exits but
/// [`PASS_THROUGH`] and, if the engine is `exact`, reads of some more. One that is not may have its own opinion of
/// their values, as KVM has of debug features.
///
/// # Errors
/// [`MemoryError::OutOfRange`] when `page` is not in machine memory.
pub fn write_msr_bitmap(memory: &MachineMemory, page: MachineAddr, exact: bool) -> Result<(), MemoryError> {
    memory.fill(page, 0xff, 4096)?;
    pass_through(memory, page, PASS_THROUGH.iter().copied(), true)?;
    if exact {
        pass_through(memory, page, READ_THROUGH.iter().copied(), false)?;
    }
    Ok(())
}

/// Has reads of `msrs`, and writes if `writes`, pass without an exit by the MSR bitmap at `page`.
///
/// # Errors
/// As [`write_msr_bitmap`].
pub fn pass_through(
    memory: &MachineMemory,
    page: MachineAddr,
    msrs: impl IntoIterator<Item = u32>,
    writes: bool,
) -> Result<(), MemoryError> {
    let mut bitmap = [0; 4096];
    memory.read(page, &mut bitmap)?;
    for msr in msrs {
        // Low MSRs at 0 (read) and 800H (write), high ones at 400H and C00H.
        let read = if msr >= 0xc000_0000 { 0x400 } else { 0 } + (msr & 0x1fff) as usize / 8;
        for at in [Some(read), writes.then_some(read + 0x800)].into_iter().flatten() {
            if let Some(b) = bitmap.get_mut(at) {
                *b &= !(1 << (msr % 8));
            }
        }
    }
    memory.write(page, &bitmap)
}

/// Makes the control "IA-32e mode guest" follow IA32_EFER.LMA, as VM entry demands
/// (SDM Vol. 3C §27.3.1.1). To be called before each entry.
pub fn sync_long_mode(vmcs: &mut EngineVmcs) {
    let long = vmcs.guest.efer & efer::LMA != 0;
    vmcs.controls.entry.set(EntryControls::IA32E_MODE_GUEST, long);
}

fn segment(b: &BootSegment) -> Segment {
    Segment { base: b.base, limit: b.limit, access: AccessRights(b.access_rights), selector: b.selector }
}

/// Puts the state that a boot protocol prescribes into `vmcs` and `regs`, which hold the
/// state after RESET.
pub fn load_boot_state(vmcs: &mut EngineVmcs, regs: &mut GuestRegs, boot: &BootState) {
    let g = &mut vmcs.guest;
    (g.rip, g.rflags, g.rsp) = (boot.rip, boot.rflags, boot.gprs.rsp);
    (g.cr0, g.cr3, g.cr4, g.efer) = (boot.cr0, boot.cr3, boot.cr4, boot.efer);
    for (i, s) in [
        (seg::CS, &boot.cs),
        (seg::DS, &boot.ds),
        (seg::ES, &boot.es),
        (seg::SS, &boot.ss),
        (seg::FS, &boot.fs),
        (seg::GS, &boot.gs),
        (seg::TR, &boot.tr),
        (seg::LDTR, &boot.ldtr),
    ] {
        g.segments[i] = segment(s);
    }
    g.gdtr = DescriptorTable { base: boot.gdtr.base, limit: boot.gdtr.limit.into() };
    g.idtr = DescriptorTable { base: boot.idtr.base, limit: boot.idtr.limit.into() };
    let b = &boot.gprs;
    for (i, v) in [
        (gpr::RAX, b.rax),
        (gpr::RBX, b.rbx),
        (gpr::RCX, b.rcx),
        (gpr::RDX, b.rdx),
        (gpr::RSI, b.rsi),
        (gpr::RDI, b.rdi),
        (gpr::RBP, b.rbp),
    ] {
        regs.gpr[i] = v;
    }
    regs.gpr[8..].copy_from_slice(&b.r8_r15);
}

/// The CR4 bits that L1 may set, given what CPUID shows it (SDM Vol. 3A §2.5). VMXE is not
/// among them: VMX is not offered.
pub fn offered_cr4(leaf1: [u32; 4], leaf7: [u32; 4]) -> u64 {
    let always = cr4::TSD | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::PCE;
    let by_feature = [
        (leaf1[3], 1, cr4::VME | cr4::PVI),
        (leaf1[3], 2, cr4::DE),
        (leaf1[3], 24, cr4::OSFXSR),
        (leaf1[3], 25, cr4::OSXMMEXCPT),
        (leaf1[2], 17, cr4::PCIDE),
        (leaf1[2], 26, cr4::OSXSAVE),
        (leaf7[1], 0, cr4::FSGSBASE),
        (leaf7[1], 7, cr4::SMEP),
        (leaf7[1], 20, cr4::SMAP),
        (leaf7[2], 2, cr4::UMIP),
        (leaf7[2], 3, cr4::PKE),
        (leaf7[2], 16, cr4::LA57),
    ];
    by_feature
        .iter()
        .filter(|(word, bit, _)| word & 1 << bit != 0)
        .fold(always, |all, (_, _, bits)| all | bits)
}

/// DR7 and the like after RESET are in [`EngineVmcs::default`]; this gives the general
/// registers, of which only RDX (the processor's signature, SDM Vol. 3A table 9-1) is not 0.
pub fn reset_registers(signature: u32) -> GuestRegs {
    let mut regs = GuestRegs::reset();
    regs.gpr[gpr::RDX] = signature.into();
    debug_assert_eq!(regs.xcr0, reg::xcr0::X87);
    regs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::all_capabilities;

    #[test]
    fn an_engine_without_a_needed_control_is_named() {
        let mut caps = all_capabilities();
        caps.secondary.may_be_one &= !SecondaryControls::ENABLE_EPT.bits();
        let e = controls(&caps, 0, MachineAddr(0), 0).unwrap_err();
        assert!(e.control.contains("ENABLE_EPT"), "{e}");
        // What is only nice to have may be missing.
        let mut caps = all_capabilities();
        caps.secondary.may_be_one &= !SecondaryControls::WBINVD_EXITING.bits();
        let c = controls(&caps, 0, MachineAddr(0), 0).unwrap();
        assert!(!c.secondary.contains(SecondaryControls::WBINVD_EXITING));
    }

    #[test]
    fn controls_obey_the_consistency_rules() {
        // SDM Vol. 3C §27.2.1.1.
        let c = controls(&all_capabilities(), 0x1e, MachineAddr(0x5000), 0).unwrap();
        assert!(c.pin.contains(PinbasedControls::NMI_EXITING), "virtual NMIs need it");
        assert!(c.secondary.contains(SecondaryControls::ENABLE_EPT), "unrestricted guest needs it");
        assert_ne!(c.vpid, 0, "enabled VPIDs are not 0");
        assert!(!c.primary.contains(PrimaryControls::USE_TPR_SHADOW));
        assert!(!c.primary.contains(PrimaryControls::NMI_WINDOW_EXITING));
        assert_eq!(c.exception_bitmap, 0);
    }

    #[test]
    fn the_msr_bitmap_lets_only_the_context_through() {
        let m = MachineMemory::new(0x2000).unwrap();
        let page = MachineAddr(0x1000);
        write_msr_bitmap(&m, page, false).unwrap();
        let mut inexact = [0; 4096];
        m.read(page, &mut inexact).unwrap();
        write_msr_bitmap(&m, page, true).unwrap();
        let mut bytes = [0; 4096];
        m.read(page, &mut bytes).unwrap();
        // SDM Vol. 3C §25.6.9: read low, read high, write low, write high.
        let exits = |msr: u32, write: bool| {
            let quarter = usize::from(msr >= 0xc000_0000) * 1024 + usize::from(write) * 2048;
            let n = (msr & 0x1fff) as usize;
            bytes[quarter + n / 8] & 1 << (n % 8) != 0
        };
        for m in PASS_THROUGH {
            assert!(!exits(*m, false) && !exits(*m, true), "{m:#x}");
        }
        for m in [msr::TSC, msr::IA32_APIC_BASE, msr::IA32_TSC_DEADLINE, 0x808, msr::IA32_XSS_MSR] {
            assert!(exits(m, false) && exits(m, true), "{m:#x}");
        }
        assert!(!exits(msr::IA32_DEBUGCTL, false) && exits(msr::IA32_DEBUGCTL, true));
        let clear = |bytes: &[u8]| bytes.iter().map(|b| b.count_zeros() as usize).sum::<usize>();
        assert_eq!(clear(&bytes), 2 * PASS_THROUGH.len() + READ_THROUGH.len());
        assert_eq!(clear(&inexact), 2 * PASS_THROUGH.len());
    }

    #[test]
    fn cr4_bits_follow_cpuid() {
        let none = offered_cr4([0; 4], [0; 4]);
        let all = offered_cr4([u32::MAX; 4], [u32::MAX; 4]);
        assert_eq!(none & cr4::OSXSAVE, 0);
        assert_ne!(all & cr4::OSXSAVE, 0);
        assert_eq!(all & (cr4::VMXE | cr4::SMXE), 0);
        let c = controls(&all_capabilities(), 0, MachineAddr(0), all).unwrap();
        assert_eq!(c.cr4_mask & cr4::VMXE, cr4::VMXE);
        assert_eq!(c.cr4_mask & cr4::PAE, 0);
    }

    #[test]
    fn long_mode_guests_need_the_entry_control() {
        let mut v = EngineVmcs::default();
        v.guest.efer = efer::LMA;
        sync_long_mode(&mut v);
        assert!(v.controls.entry.contains(EntryControls::IA32E_MODE_GUEST));
        v.guest.efer = 0;
        sync_long_mode(&mut v);
        assert!(!v.controls.entry.contains(EntryControls::IA32E_MODE_GUEST));
    }

    #[test]
    fn boot_state_is_loaded_whole() {
        use machine::boot::{BootGprs, BootTable};
        let gprs = BootGprs { rsi: 7, rsp: 9, r8_r15: [1, 0, 0, 0, 0, 0, 0, 8], ..BootGprs::default() };
        let boot = BootState::long64(0x100_0000, gprs, 0x2000, (16, 24), BootTable { base: 5, limit: 6 });
        let (mut v, mut r) = (EngineVmcs::default(), reset_registers(0x806f8));
        load_boot_state(&mut v, &mut r, &boot);
        assert_eq!((v.guest.rip, v.guest.rsp, v.guest.cr3), (0x100_0000, 9, 0x2000));
        assert_eq!((r.gpr[gpr::RSI], r.gpr[8], r.gpr[15]), (7, 1, 8));
        assert!(v.guest.segments[seg::CS].access.long());
        assert_eq!(v.guest.segments[seg::TR].access.ty(), 11, "a busy TSS, SDM Vol. 3C §27.3.1.2");
        assert_eq!((v.guest.gdtr.base, v.guest.gdtr.limit), (5, 6));
    }
}
