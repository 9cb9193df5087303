//! `docs/conformance.md` is made from the code: the tables of controls, the engine's capabilities, the
//! registry of entry checks, the routing table and the sources of the instructions. The test fails
//! when the page says something else; `UPDATE_DOCS=1 cargo test -p vmx-emu --test conformance_table`
//! writes it anew.
//!
//! What is written here by hand is where each offered control is implemented; that the named file
//! exists and mentions the named word is tested.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::{Engine, GuestRegs, GuestState, VmExit};
use engine_soft::SoftEngine;
use engine_soft::system::shadow_vmcs::{ShadowField, ShadowLayout};
use memory::{L1Gpa, MachineAddr, MachineMemory};
use vmx_emu::capabilities::{CONTROL_FIELDS, Control, L1Cpu, Needs};
use vmx_emu::checks::{self, Area, CHECKS, GuestCause, MsrBits, ReadPhysical};
use vmx_emu::route::{self, Cause, Owner};
use vmx_emu::{Capabilities, Field, InstructionError, L1Physical, Vmcs12};
use x86_spec::caps::{AllowedControls, VmxCapabilities};
use x86_spec::controls::{PinbasedControls, PrimaryControls, SecondaryControls};
use x86_spec::exit::{ExitReason, cr_access};
use x86_spec::interruption::{EventType, InterruptionInfo};
use x86_spec::msr;

const SYSTEM: &str = "l0/engine-soft/src/system";
const NESTED: &str = "l0/hypervisor/src/nested";

/// Where the behaviour behind a control is.
struct Place {
    /// Index into [`CONTROL_FIELDS`].
    field: usize,
    /// Its bit.
    bit: u32,
    /// The folder or crate, then the file in it.
    file: (&'static str, &'static str),
    /// A word that the file must have.
    word: &'static str,
    /// What a reader should know besides.
    note: &'static str,
}

macro_rules! places {
    ($($field:literal $bit:literal $dir:tt $file:literal $word:literal $note:literal;)*) => {
        &[$(Place { field: $field, bit: $bit, file: ($dir, $file), word: $word, note: $note },)*]
    };
}

/// For each control that is offered.
const PLACES: &[Place] = places! {
    0 0 NESTED "guest.rs" "EXTERNAL_INTERRUPT_EXITING" "what L1's local APIC has pending exits before L2 is entered again";
    0 3 NESTED "guest.rs" "NMI_EXITING" "as for interrupts";
    0 5 SYSTEM "far.rs" "VIRTUAL_NMIS" "the engine tracks the blocking, and IRET ends it";
    0 6 "vmx-emu/src/merge" "tsc.rs" "Timer12" "kept as a deadline of the TSC; VMCS02's timer is the sooner of it and of L0's own";
    0 7 NESTED "guest.rs" "process_posted_interrupts" "L0 takes the notification and moves what was posted; no exit to L1";
    1 2 SYSTEM "pending.rs" "INTERRUPT_WINDOW_EXITING" "";
    1 3 SYSTEM "misc.rs" "USE_TSC_OFFSETTING" "L1's offset is added to L0's (`vmx-emu/src/merge/tsc.rs`)";
    1 7 SYSTEM "flags.rs" "HLT_EXITING" "where L1 does not ask for it, L0 waits on L2's behalf";
    1 9 SYSTEM "misc.rs" "INVLPG_EXITING" "";
    1 10 SYSTEM "misc.rs" "MWAIT_EXITING" "where L1 does not ask for it, L0 waits on L2's behalf";
    1 11 SYSTEM "misc.rs" "RDPMC_EXITING" "without it the engine reads L1's counters";
    1 12 SYSTEM "misc.rs" "RDTSC_EXITING" "RDTSCP too";
    1 15 SYSTEM "control.rs" "CR3_LOAD_EXITING" "with four CR3-target values";
    1 16 SYSTEM "control.rs" "CR3_STORE_EXITING" "";
    1 19 SYSTEM "control.rs" "CR8_LOAD_EXITING" "without it and without the TPR shadow, CR8 is L1's local APIC's";
    1 20 SYSTEM "control.rs" "CR8_STORE_EXITING" "as for CR8 loads";
    1 21 SYSTEM "virtual_apic.rs" "USE_TPR_SHADOW" "";
    1 22 SYSTEM "pending.rs" "NMI_WINDOW_EXITING" "";
    1 23 SYSTEM "control.rs" "MOV_DR_EXITING" "";
    1 24 SYSTEM "io.rs" "UNCOND_IO_EXITING" "L0 has it on for L1, so it stays on in VMCS02";
    1 25 "vmx-emu/src/merge" "bitmaps.rs" "USE_IO_BITMAPS" "every port exits to L0, which looks into L1's bitmaps";
    1 27 SYSTEM "pending.rs" "MONITOR_TRAP_FLAG" "";
    1 28 "vmx-emu/src/merge" "bitmaps.rs" "combine_msr" "VMCS02's bitmap has the bits that L0 or L1 sets";
    1 29 SYSTEM "misc.rs" "MONITOR_EXITING" "also where IA32_MISC_ENABLE disables it";
    1 30 SYSTEM "misc.rs" "PAUSE_EXITING" "";
    1 31 SYSTEM "mod.rs" "SECONDARY_CONTROLS" "";
    2 0 SYSTEM "virtual_apic.rs" "VIRTUALIZE_APIC" "the APIC-access page need not be RAM";
    2 1 "ept-compress/src" "ept02.rs" "Ept02" "composed with EPT01 on demand; the engine walks the result";
    2 2 SYSTEM "control.rs" "DTABLE_EXITING" "";
    2 3 SYSTEM "misc.rs" "ENABLE_RDTSCP" "";
    2 4 SYSTEM "virtual_apic.rs" "VIRTUALIZE_X2APIC" "";
    2 5 "vmx-emu/src/merge" "vpid.rs" "VpidMap" "64 of L1's VPIDs have one of the engine's at a time";
    2 6 SYSTEM "misc.rs" "WBINVD_EXITING" "";
    2 7 SYSTEM "vmentry.rs" "UNRESTRICTED_GUEST" "";
    2 8 SYSTEM "virtual_apic.rs" "VIRTUALIZE_APIC_REGISTER" "";
    2 9 SYSTEM "virtual_apic.rs" "VIRTUAL_INTERRUPT_DELIVERY" "";
    2 10 SYSTEM "misc.rs" "PAUSE_LOOP_EXITING" "PLE_Gap and PLE_Window are counted in the host's TSC";
    2 11 SYSTEM "misc.rs" "RDRAND_EXITING" "";
    2 12 SYSTEM "misc.rs" "ENABLE_INVPCID" "";
    2 13 "vmx-emu/src/instructions" "vmfunc.rs" "switch_eptp" "VMFUNC exits to L0, which switches EPTP12; no exit to L1";
    2 14 "vmx-emu/src/instructions" "shadowed.rs" "VMREAD" "for L2's own VMREAD and VMWRITE: they exit to L0, which uses L1's shadow VMCS; no exit to L1";
    2 16 SYSTEM "misc.rs" "RDSEED_EXITING" "";
    2 17 "ept-compress/src" "walk.rs" "DirtyLog" "L0 writes L1's log when EPT02 is filled for a write; off in VMCS02";
    2 20 "l0/engine-soft/src/thunk" "xsave.rs" "xsaves" "CPUID shows no supervisor state components";
    2 22 "l0/engine-soft/src" "mmu.rs" "MODE_BASED_EPT" "";
    2 25 SYSTEM "misc.rs" "USE_TSC_SCALING" "L1's multiplier is composed with L0's offset (`vmx-emu/src/merge/tsc.rs`)";
    3 2 "vmx-emu/src" "reflect.rs" "SAVE_DEBUG_CONTROLS" "";
    3 9 "vmx-emu/src" "reflect.rs" "HOST_ADDRESS_SPACE_SIZE" "";
    3 12 "vmx-emu/src" "reflect.rs" "LOAD_IA32_PERF_GLOBAL_CTRL" "";
    3 15 NESTED "guest.rs" "ACK_INTERRUPT_ON_EXIT" "";
    3 18 "vmx-emu/src" "reflect.rs" "SAVE_IA32_PAT" "";
    3 19 "vmx-emu/src" "reflect.rs" "LOAD_IA32_PAT" "";
    3 20 "vmx-emu/src" "reflect.rs" "SAVE_IA32_EFER" "";
    3 21 "vmx-emu/src" "reflect.rs" "LOAD_IA32_EFER" "";
    3 22 "vmx-emu/src" "reflect.rs" "SAVE_VMX_PREEMPTION_TIMER" "";
    4 2 "vmx-emu/src" "enter.rs" "LOAD_DEBUG_CONTROLS" "";
    4 9 "vmx-emu/src" "enter.rs" "IA32E_MODE_GUEST" "";
    4 13 "vmx-emu/src" "enter.rs" "LOAD_IA32_PERF_GLOBAL_CTRL" "the engine counts L2 with it, in L1's counters";
    4 14 "vmx-emu/src" "enter.rs" "LOAD_IA32_PAT" "";
    4 15 "vmx-emu/src" "enter.rs" "LOAD_IA32_EFER" "";
};

/// Bits of IA32_VMX_EPT_VPID_CAP (SDM Vol. 3D appendix A.10).
const EPT_VPID: &[(u32, &str)] = &[
    (0, "Execute-only translations"),
    (6, "Page-walk length 4"),
    (7, "Page-walk length 5"),
    (8, "Paging structures uncacheable"),
    (14, "Paging structures write-back"),
    (16, "2-MByte pages"),
    (17, "1-GByte pages"),
    (20, "INVEPT"),
    (21, "Accessed and dirty flags"),
    (22, "Advanced VM-exit information for EPT violations"),
    (23, "Supervisor shadow-stack control"),
    (25, "INVEPT, single-context"),
    (26, "INVEPT, all-context"),
    (32, "INVVPID"),
    (40, "INVVPID, individual-address"),
    (41, "INVVPID, single-context"),
    (42, "INVVPID, all-context"),
    (43, "INVVPID, single-context-retaining-globals"),
];

/// Bits of IA32_VMX_MISC (appendix A.6), as (shift, width, meaning).
const MISC: &[(u32, u32, &str)] = &[
    (0, 5, "VMX-preemption timer counts when this bit of the TSC changes"),
    (5, 1, "VM exits store IA32_EFER.LMA into \"IA-32e mode guest\""),
    (6, 1, "Activity state HLT"),
    (7, 1, "Activity state shutdown"),
    (8, 1, "Activity state wait-for-SIPI"),
    (14, 1, "Intel Processor Trace in VMX operation"),
    (15, 1, "RDMSR of IA32_SMBASE in SMM"),
    (16, 9, "CR3-target values"),
    (25, 3, "Lists of MSRs: 512 times (this + 1)"),
    (28, 1, "IA32_SMM_MONITOR_CTL bit 2"),
    (29, 1, "VMWRITE to VM-exit information fields"),
    (30, 1, "Injection of software events with instruction length 0"),
];

/// The instructions, each with its file in `vmx-emu/src/instructions`.
const INSTRUCTIONS: &[(&str, &str, &str)] = &[
    ("VMXON", "vmxon.rs", ""),
    ("VMXOFF", "vmxoff.rs", "writes the current VMCS to its region"),
    ("VMCLEAR", "vmclear.rs", ""),
    ("VMPTRLD", "vmptrld.rs", ""),
    ("VMPTRST", "vmptrst.rs", ""),
    ("VMREAD", "vmread.rs", ""),
    ("VMWRITE", "vmwrite.rs", "VM-exit information fields can be written"),
    ("VMLAUNCH, VMRESUME", "entry.rs", "what follows are the checks of VM entry, below, with errors 7 and 8"),
    ("INVEPT", "invept.rs", "single-context and all-context"),
    ("INVVPID", "invvpid.rs", "all four types"),
    ("VMCALL in L1", "vmcall.rs", "there is no SMM-transfer monitor"),
    ("VMFUNC in L2", "vmfunc.rs", "#UD in L1"),
    ("VMREAD, VMWRITE in L2", "shadowed.rs", "with VMCS shadowing; else they exit to L1"),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn source(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// What the software engine reports, set up as `nestvmm run` does.
fn engine_capabilities() -> VmxCapabilities {
    let fields = vmx_emu::shadow_layout().iter().map(|f| ShadowField {
        encoding: f.encoding,
        offset: f.offset,
        width: f.width,
    });
    let memory = Arc::new(MachineMemory::new(1 << 20).unwrap());
    let engine = SoftEngine::new(memory).unwrap().with_vmcs_shadowing(ShadowLayout::new(fields));
    engine.capabilities().clone()
}

fn offered() -> Capabilities {
    let cpu = L1Cpu {
        cr4: 0,
        physical_bits: 46,
        withheld_pin: PinbasedControls::empty(),
        withheld: SecondaryControls::empty(),
    };
    Capabilities::new(&engine_capabilities(), &cpu)
}

fn field(caps: &Capabilities, index: usize) -> AllowedControls {
    [caps.pin, caps.primary, caps.secondary, caps.exit, caps.entry][index]
}

fn place(field: usize, control: &Control) -> Option<&'static Place> {
    PLACES.iter().find(|p| p.field == field && p.bit == control.bit)
}

fn path(place: &Place) -> String {
    format!("{}/{}", place.file.0, place.file.1)
}

/// Who does the work, by the crate that the file is in.
fn crate_of(path: &str) -> &'static str {
    match path {
        p if p.starts_with("l0/engine-soft") => "engine",
        p if p.starts_with("l0/hypervisor") => "L0's loop",
        p if p.starts_with("ept-compress") => "ept-compress",
        _ => "vmx-emu",
    }
}

// ---- the page --------------------------------------------------------------------------

fn page() -> String {
    let caps = offered();
    let mut out = String::from(INTRODUCTION);
    controls(&mut out, &caps);
    ept_vpid(&mut out, &caps);
    misc(&mut out, &caps);
    msrs(&mut out, &caps);
    fields(&mut out, &caps);
    instructions(&mut out, &caps);
    entry_checks(&mut out);
    exits(&mut out);
    out
}

const INTRODUCTION: &str = "\
# What L1 is offered of VMX

<!-- Made by vmx-emu/tests/conformance_table.rs; edit that. -->

This page is made from the code, and a test fails when the two disagree. It is about an L1 on the software
engine. Names and sections are those of the Intel SDM, volumes 3C and 3D.

*Offered* means that the capability MSRs allow the control to be 1. A VM entry that sets one which is not
offered fails with VM-instruction error 7. How it all works together is in [vmx.md](vmx.md).
";

fn controls(out: &mut String, caps: &Capabilities) {
    for (i, (title, table)) in CONTROL_FIELDS.iter().enumerate() {
        let allowed = field(caps, i);
        let count = table.iter().filter(|c| allowed.may_be_one & c.mask() != 0).count();
        write!(out, "\n## {title}\n\n{count} of {} are offered.\n\n", table.len()).unwrap();
        out.push_str("| Bit | Control | Offered | Done by | Where | |\n|---|---|---|---|---|---|\n");
        for c in *table {
            let (bit, name) = (c.bit, c.name);
            if allowed.may_be_one & c.mask() == 0 {
                let why = match c.needs {
                    Needs::Unavailable => "not implemented",
                    Needs::Engine | Needs::L0 => "the engine does not have it",
                };
                writeln!(out, "| {bit} | {name} | no | | | {why} |").unwrap();
                continue;
            }
            let p = place(i, c).unwrap_or_else(|| panic!("{title}: {name} is offered; add it to PLACES"));
            let path = path(p);
            writeln!(out, "| {bit} | {name} | yes | {} | `{path}` | {} |", crate_of(&path), p.note).unwrap();
        }
    }
    out.push_str(
        "\nExit and entry controls of VMCS02 are L0's own, since its exits lead to L0. L1's are carried out \
         when\n`vmx-emu` loads L2's state and when it goes back to L1's host state.\n",
    );
}

fn ept_vpid(out: &mut String, caps: &Capabilities) {
    out.push_str("\n## EPT and VPID capabilities\n\n| Bit | Capability | Offered |\n|---|---|---|\n");
    for (bit, name) in EPT_VPID {
        let yes = if caps.ept_vpid >> bit & 1 != 0 { "yes" } else { "no" };
        writeln!(out, "| {bit} | {name} | {yes} |").unwrap();
    }
    let known = EPT_VPID.iter().fold(0u64, |all, (bit, _)| all | 1 << bit);
    assert_eq!(caps.ept_vpid & !known, 0, "a capability without a line in EPT_VPID");
}

fn misc(out: &mut String, caps: &Capabilities) {
    out.push_str("\n## Miscellaneous data and VM functions\n\n");
    out.push_str("| Bits of IA32_VMX_MISC | Meaning | Value |\n|---|---|---|\n");
    let mut known = 0;
    for (shift, width, name) in MISC {
        let mask = (1u64 << width) - 1;
        known |= mask << shift;
        let value = caps.misc >> shift & mask;
        match width {
            1 => writeln!(out, "| {shift} | {name} | {value} |"),
            _ => writeln!(out, "| {}:{shift} | {name} | {value} |", shift + width - 1),
        }
        .unwrap();
    }
    assert_eq!(caps.misc & !known, 0, "a bit without a line in MISC");
    assert_eq!(caps.vmfunc, 1);
    out.push_str("\nVM functions: EPTP switching (function 0) and no other.\n");
}

fn msrs(out: &mut String, caps: &Capabilities) {
    out.push_str("\n## Capability MSRs\n\n| MSR | Name | Value |\n|---|---|---|\n");
    let names = [
        "BASIC",
        "PINBASED_CTLS",
        "PROCBASED_CTLS",
        "EXIT_CTLS",
        "ENTRY_CTLS",
        "MISC",
        "CR0_FIXED0",
        "CR0_FIXED1",
        "CR4_FIXED0",
        "CR4_FIXED1",
        "VMCS_ENUM",
        "PROCBASED_CTLS2",
        "EPT_VPID_CAP",
        "TRUE_PINBASED_CTLS",
        "TRUE_PROCBASED_CTLS",
        "TRUE_EXIT_CTLS",
        "TRUE_ENTRY_CTLS",
        "VMFUNC",
    ];
    for (number, name) in (msr::IA32_VMX_BASIC..=msr::IA32_VMX_VMFUNC).zip(names) {
        let value = caps.msr(number).map_or("#GP(0)".into(), |v| format!("`{v:#018x}`"));
        let value = if number == msr::IA32_VMX_CR4_FIXED1 { "what CPUID shows".into() } else { value };
        writeln!(out, "| {number:#x} | IA32_VMX_{name} | {value} |").unwrap();
    }
    for number in [0x492, 0x493] {
        assert_eq!(caps.msr(number), None);
    }
    out.push_str(
        "\nIA32_FEATURE_CONTROL is locked with VMXON allowed outside SMX, as firmware leaves it. The other VMX \
         MSRs\n(tertiary controls, secondary exit controls) do not exist.\n",
    );
}

fn fields(out: &mut String, caps: &Capabilities) {
    let (have, absent): (Vec<Field>, Vec<Field>) = Field::ALL.iter().partition(|f| caps.has_field(**f));
    write!(out, "\n## VMCS fields\n\n{} fields exist.", have.len()).unwrap();
    if absent.is_empty() {
        out.push('\n');
        return;
    }
    out.push_str(" VMREAD and VMWRITE of the others are VM-instruction error 12, among them of\n");
    out.push_str("these, which the code knows and whose controls are not offered:\n\n");
    for f in absent {
        writeln!(out, "- {} ({:#06x})", f.sdm_name(), f.encoding()).unwrap();
    }
}

/// The VM-instruction errors that a source file names, in its code rather than its tests.
fn errors_in(path: &str) -> Vec<InstructionError> {
    let text = source(path);
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let named = |e: &&InstructionError| {
        let name = format!("InstructionError::{e:?}");
        code.match_indices(&name)
            .any(|(i, _)| !code[i + name.len()..].starts_with(|c: char| c.is_alphanumeric()))
    };
    InstructionError::ALL.iter().filter(named).copied().collect()
}

fn instructions(out: &mut String, caps: &Capabilities) {
    out.push_str(
        "\n## Instructions\n\n#UD, #GP(0), #SS(0) and #PF come as each instruction's page in the SDM has them.\n\n",
    );
    out.push_str("| Instruction | File | VM-instruction errors | |\n|---|---|---|---|\n");
    let mut raised = Vec::new();
    for (name, file, note) in INSTRUCTIONS {
        let path = format!("vmx-emu/src/instructions/{file}");
        let errors = errors_in(&path);
        let numbers: Vec<String> = errors.iter().map(|e| e.number().to_string()).collect();
        writeln!(out, "| {name} | `{path}` | {} | {note} |", numbers.join(", ")).unwrap();
        raised.extend(errors);
    }
    raised.extend(errors_in("vmx-emu/src/checks/report.rs"));
    out.push_str("\n### VM-instruction errors\n\n| Number | Meaning | Can occur |\n|---|---|---|\n");
    for e in InstructionError::ALL {
        let can = match vmx_emu::explain::never(*e) {
            Some(why) => format!("no: {why}"),
            None => "yes".into(),
        };
        // Read-only fields are for engines of other capabilities, and the code has their rule.
        let rule = vmx_emu::explain::never(*e).is_none() || *e == InstructionError::ReadOnlyComponent;
        assert_eq!(raised.contains(e), rule, "{e:?}");
        writeln!(out, "| {} | {} | {can} |", e.number(), e.description()).unwrap();
    }
    assert_ne!(caps.misc & 1 << 29, 0, "error 13 can occur");
}

fn answer(area: Area) -> &'static str {
    match area {
        Area::ExecutionControls => "VM-execution controls: VM-instruction error 7",
        Area::ExitControls => "VM-exit controls: VM-instruction error 7",
        Area::EntryControls => "VM-entry controls: VM-instruction error 7",
        Area::HostState => "Host state: VM-instruction error 8",
        Area::GuestState(GuestCause::Other) => "Guest state: exit reason 33, qualification 0",
        Area::GuestState(GuestCause::Pdptes) => "Guest state: exit reason 33, qualification 2",
        Area::GuestState(GuestCause::NmiBlockedBySti) => "Guest state: exit reason 33, qualification 3",
        Area::GuestState(GuestCause::LinkPointer) => "Guest state: exit reason 33, qualification 4",
        Area::MsrLoading => "MSR loading: exit reason 34",
    }
}

fn entry_checks(out: &mut String) {
    write!(
        out,
        "\n## Checks of VM entry\n\n{} checks, one function each, in `vmx-emu/src/checks`. All are performed, and \
         each that fails\nis explained to the user; L1 gets one answer.\n\n| Section | Answer to L1 | Checks |\n\
         |---|---|---|\n",
        CHECKS.len()
    )
    .unwrap();
    for group in CHECKS.chunk_by(|a, b| a.area == b.area && a.section == b.section) {
        let names: Vec<String> = group.iter().map(|c| format!("`{}`", c.name)).collect();
        let (first, count) = (&group[0], group.len());
        writeln!(out, "| {} | {} | {count}: {} |", first.section, answer(first.area), names.join(" "))
            .unwrap();
    }
    out.push_str(
        "\nBefore them come the checks of §27.1 (launch state, blocking by MOV SS, a current VMCS that is no \
         shadow), in\n`vmx-emu/src/instructions/entry.rs`; after them the loading of MSRs of §27.4, in \
         `vmx-emu/src/enter.rs`.\n",
    );
}

// ---- exit reasons ----------------------------------------------------------------------

/// Memory of L1 that holds one byte throughout.
struct Filled(u8);
impl L1Physical for Filled {
    fn read(&self, _: L1Gpa, buf: &mut [u8]) {
        buf.fill(self.0);
    }
    fn write(&self, _: L1Gpa, _: &[u8]) {}
    fn machine(&self, _: L1Gpa) -> Option<MachineAddr> {
        None
    }
}

/// VMCS12s that want nothing, everything, and everything but exits of VM functions and of CR accesses.
fn vmcs12s() -> [Vmcs12; 3] {
    let mut all = Vmcs12::default();
    for f in [
        Field::PinControls,
        Field::PrimaryControls,
        Field::SecondaryControls,
        Field::ExceptionBitmap,
        Field::Cr0Mask,
        Field::Cr4Mask,
        Field::XssExitBitmap,
    ] {
        all.set(f, u64::MAX);
    }
    let mut lenient = all.clone();
    lenient.set(Field::VmFunctionControls, 1);
    lenient.set(Field::Cr0Mask, 0);
    lenient.set(Field::Cr4Mask, 0);
    [Vmcs12::default(), all, lenient]
}

/// Exits with this reason that may be routed differently.
fn samples(reason: ExitReason) -> Vec<VmExit> {
    use cr_access::Kind;
    match reason {
        ExitReason::ExceptionOrNmi => {
            [(2, EventType::Nmi), (13, EventType::HardwareException), (14, EventType::HardwareException)]
                .map(|(vector, ty)| {
                    let mut exit = VmExit::new(reason);
                    exit.interruption_info = InterruptionInfo::new(vector, ty, false);
                    exit
                })
                .to_vec()
        }
        ExitReason::CrAccess => [
            (0, Kind::MovTo),
            (3, Kind::MovTo),
            (4, Kind::MovTo),
            (8, Kind::MovTo),
            (3, Kind::MovFrom),
            (8, Kind::MovFrom),
            (0, Kind::Clts),
            (0, Kind::Lmsw),
        ]
        .map(|(cr, kind)| {
            let mut exit = VmExit::new(reason);
            exit.qualification = cr_access::mov(cr, kind, 0);
            exit
        })
        .to_vec(),
        _ => vec![VmExit::new(reason)],
    }
}

/// All the answers that the routing table has for a reason.
fn routes(reason: ExitReason) -> Vec<route::Route> {
    let mut zeros = GuestRegs::reset();
    zeros.msrs.xss = u64::MAX;
    let mut ones = zeros.clone();
    ones.gpr.fill(u64::MAX);
    let mut found = Vec::new();
    for exit in samples(reason) {
        for vmcs12 in &vmcs12s() {
            for byte in [0u8, 0xff] {
                for regs in [&zeros, &ones] {
                    for flag in [false, true] {
                        let context = route::Context {
                            vmcs12,
                            guest: &GuestState::default(),
                            regs,
                            l1: &Filled(byte),
                            timer12_expired: flag,
                            mtf_injected: flag,
                        };
                        let route = route::route(&exit, &context);
                        if !found.contains(&route) {
                            found.push(route);
                        }
                    }
                }
            }
        }
    }
    found
}

fn exits(out: &mut String) {
    out.push_str(
        "\n## Exit reasons: who handles an exit of L2\n\nThe rules of `vmx-emu/src/route.rs`. Where both columns \
         have something, VMCS12 (or the state that the rule\nnames) decides.\n\n| Number | Reason | Section | L1 \
         gets it | L0 keeps it |\n|---|---|---|---|---|\n",
    );
    for rule in route::TABLE {
        if let Cause::Never { why, .. } = rule.cause {
            let (number, name) = (rule.reason as u16, rule.reason.name());
            writeln!(out, "| {number} | {name} | {} | does not occur | {why} |", rule.section).unwrap();
            continue;
        }
        let found = routes(rule.reason);
        let column = |owner: Owner| {
            let whys: Vec<&str> = found.iter().filter(|r| r.owner == owner).map(|r| r.why).collect();
            whys.join("; ")
        };
        let (number, name) = (rule.reason as u16, rule.reason.name());
        let (mut l1, mut l0) = (column(Owner::L1), column(Owner::L0));
        if found.iter().any(|r| r.owner == Owner::Composition) {
            (l1, l0) = ("see below".into(), format!("see below; {l0}"));
        }
        writeln!(out, "| {number} | {name} | {} | {l1} | {l0} |", rule.section).unwrap();
    }
    out.push_str(
        "\nThe rule for EPT violations and misconfigurations, where L1 uses EPT: EPT12 does not allow the access, or one of its \
         entries is\nmisconfigured, or L1's page-modification log is full: L1 gets the exit. Otherwise L0 fills \
         EPT02, or carries out the\naccess to a device of L1's machine that L1 gives to L2.\n",
    );
}

// ---- tests -----------------------------------------------------------------------------

#[test]
fn the_conformance_page_says_what_the_code_does() {
    let (file, made) = (root().join("docs/conformance.md"), page());
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&file, &made).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap();
    for (i, (a, b)) in written.lines().zip(made.lines()).enumerate() {
        assert_eq!(a, b, "docs/conformance.md, line {}: run this test with UPDATE_DOCS=1", i + 1);
    }
    assert_eq!(written, made);
}

#[test]
fn every_place_is_for_an_offered_control_and_exists() {
    let caps = offered();
    for p in PLACES {
        let (title, table) = CONTROL_FIELDS[p.field];
        let control = table.iter().find(|c| c.bit == p.bit);
        assert!(control.is_some(), "{title} has no bit {}", p.bit);
        assert_ne!(field(&caps, p.field).may_be_one & 1 << p.bit, 0, "{title} bit {} is not offered", p.bit);
        assert!(source(&path(p)).contains(p.word), "{} does not have {}", path(p), p.word);
    }
}

/// Each reason's row of the table of exits has an owner, and those that depend on VMCS12 have both.
#[test]
fn routing_depends_on_vmcs12_where_a_control_decides() {
    for rule in route::TABLE {
        assert!(!routes(rule.reason).is_empty());
    }
    for reason in [
        ExitReason::Hlt,
        ExitReason::IoInstruction,
        ExitReason::Rdmsr,
        ExitReason::CrAccess,
        ExitReason::Vmfunc,
        ExitReason::Vmread,
        ExitReason::Xsaves,
        ExitReason::PreemptionTimer,
        ExitReason::MonitorTrapFlag,
    ] {
        let owners: Vec<Owner> = routes(reason).iter().map(|r| r.owner).collect();
        assert!(owners.contains(&Owner::L1) && owners.contains(&Owner::L0), "{reason:?}: {owners:?}");
    }
}

struct Nothing;
impl ReadPhysical for Nothing {
    fn read(&self, _: L1Gpa, buf: &mut [u8]) {
        buf.fill(0);
    }
}

/// The example in `docs/vmx.md` is what the program prints.
#[test]
fn the_example_of_an_explained_entry_is_real() {
    let caps = offered();
    let mut vmcs = Vmcs12::default();
    vmcs.set(Field::PrimaryControls, PrimaryControls::SECONDARY_CONTROLS.bits().into());
    vmcs.set(Field::SecondaryControls, SecondaryControls::ENABLE_EPT.bits().into());
    // Write-back, but the walk length was forgotten.
    vmcs.set(Field::Eptp, 0x1_2000 | 6);
    vmcs.set(Field::GuestRflags, 0x200);
    let context = checks::Context {
        vmcs: &vmcs,
        current_vmcs: L1Gpa(0x5000),
        caps: &caps,
        msr_bits: MsrBits { efer: 0xd01, debugctl: 3, perf_global_ctrl: 0 },
        linear_bits: 48,
        l1_long_mode: true,
        memory: &Nothing,
    };
    let report = checks::run(&context);
    let page = source("docs/vmx.md");
    for name in ["eptp_walk_length", "rflags_reserved"] {
        let failure = report.failures().iter().find(|f| f.check == name).unwrap();
        assert!(page.contains(&failure.to_string()), "docs/vmx.md lacks:\n{failure}");
    }
}

/// All Rust sources below a folder.
fn rust_sources(dir: &Path, text: &mut String) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_sources(&path, text);
        } else if path.extension().is_some_and(|e| e == "rs") {
            text.push_str(&std::fs::read_to_string(&path).unwrap());
        }
    }
}

/// Functions that the page on VMX names, as far as their names have more than one word, exist.
#[test]
fn functions_in_the_page_exist() {
    let mut code = String::new();
    for dir in ["vmx-emu/src", "ept-compress/src", "l0/hypervisor/src"] {
        rust_sources(&root().join(dir), &mut code);
    }
    let page = source("docs/vmx.md");
    let words = |name: &&str| {
        name.contains('_') && name.chars().all(|c| c == '_' || c.is_ascii_lowercase() || c.is_ascii_digit())
    };
    let named: Vec<&str> = page.split('`').skip(1).step_by(2).filter(words).collect();
    assert!(named.contains(&"dispatch_l2"), "{named:?}");
    for name in named {
        let exists = ["(", "<"].iter().any(|next| code.contains(&format!("fn {name}{next}")));
        assert!(exists, "docs/vmx.md names {name}");
    }
}

/// Files that the pages name exist.
#[test]
fn files_in_the_pages_exist() {
    for page in ["docs/vmx.md", "docs/conformance.md"] {
        for name in source(page).split('`').skip(1).step_by(2) {
            let is_path = name.contains('/') && name.ends_with(".rs");
            assert!(!is_path || root().join(name).exists(), "{page} names {name}");
        }
    }
}
