//! Every way in which a VMX instruction can fail (SDM Vol. 3D §31.3), and that it works.

use engine::{VmExit, interruptibility};
use memory::L1Gpa;
use proptest::prelude::*;
use x86_spec::caps::ept_vpid;
use x86_spec::controls::{PrimaryControls, SecondaryControls};
use x86_spec::exit::ExitReason as R;
use x86_spec::reg::{cr0, cr4, gpr, rflags};
use x86_spec::segment::{AccessRights, seg};

use super::vmfunc::{VmFunction, vmfunc};
use super::*;
use crate::capabilities::{FeatureControl, misc};
use crate::explain::InstructionError as E;
use crate::fields::Width;
use crate::state::Operation;
use crate::testing::*;
use crate::vmcs12::{LaunchState, REVISION, SHADOW_INDICATOR, Vmcs12};

const UD: Outcome = Outcome::Fault(Fault::UD);
const GP: Outcome = Outcome::Fault(Fault::GP);

const fn fail(error: E) -> Outcome {
    Outcome::Complete(VmResult::FailValid(error))
}

/// All that are #UD by mode.
const MODAL: [R; 11] = [
    R::Vmxon,
    R::Vmxoff,
    R::Vmclear,
    R::Vmptrld,
    R::Vmptrst,
    R::Vmread,
    R::Vmwrite,
    R::Vmlaunch,
    R::Vmresume,
    R::Invept,
    R::Invvpid,
];

fn error_field(m: &Machine) -> u64 {
    m.state.current().unwrap().get(Field::VmInstructionError)
}

#[test]
fn undefined_outside_protected_and_64_bit_mode() {
    for reason in MODAL {
        let mut m = Machine::long().with_current(VMCS_A);
        m.l1.guest.cr0 &= !cr0::PE;
        assert_eq!(m.plain(reason), UD, "{reason:?} in real mode");
        let mut m = Machine::protected().with_current(VMCS_A);
        m.l1.guest.rflags |= rflags::VM;
        assert_eq!(m.plain(reason), UD, "{reason:?} in virtual-8086 mode");
        let mut m = Machine::long().with_current(VMCS_A);
        m.l1.guest.segments[seg::CS].access = AccessRights(0xc09b);
        // #UD has priority over #GP(0) for CPL.
        m.l1.guest.segments[seg::SS].access = AccessRights(0xc0f3);
        assert_eq!(m.plain(reason), UD, "{reason:?} in compatibility mode");
    }
}

#[test]
fn undefined_outside_vmx_operation() {
    for reason in MODAL.into_iter().filter(|r| *r != R::Vmxon).chain([R::Vmcall, R::Vmfunc]) {
        assert_eq!(Machine::long().plain(reason), UD, "{reason:?}");
    }
}

#[test]
fn privileged() {
    for reason in MODAL.into_iter().chain([R::Vmcall]) {
        for mut m in [Machine::long().in_root(), Machine::long().with_current(VMCS_A)] {
            m.l1.guest.segments[seg::SS].access = AccessRights(0xc0f3);
            assert_eq!(m.plain(reason), GP, "{reason:?}");
        }
    }
    let mut m = Machine::long();
    m.l1.guest.segments[seg::SS].access = AccessRights(0xc0f3);
    assert_eq!(m.pointer(R::Vmxon, VMXON), GP);
}

#[test]
fn other_exits_are_not_vmx_instructions() {
    let mut m = Machine::long();
    let exit = VmExit::new(R::Cpuid);
    assert_eq!(execute(&mut m.state, &m.caps, &mut m.l1, &exit), None);
}

/// SDM Vol. 3D §31.2.
#[test]
fn results_in_rflags() {
    let before = rflags::FIXED1 | rflags::IF | rflags::STATUS;
    let kept = rflags::FIXED1 | rflags::IF;
    assert_eq!(VmResult::Succeed.rflags(before), kept);
    assert_eq!(VmResult::FailInvalid.rflags(before), kept | rflags::CF);
    assert_eq!(VmResult::FailValid(E::VmcallInRoot).rflags(before), kept | rflags::ZF);
}

#[test]
fn vmxon_enters_root_operation() {
    for mut m in [Machine::long(), Machine::protected()] {
        if m.l1.guest.efer == 0 {
            // A 32-bit operand address as well.
            m.put64(OPERAND, VMXON);
            let mut exit = VmExit::new(R::Vmxon).qualified(OPERAND);
            exit.instruction_info = memory_info(0) & !(7 << 7) | 1 << 7;
            assert_eq!(m.run(&exit), SUCCEED);
        } else {
            assert_eq!(m.pointer(R::Vmxon, VMXON), SUCCEED);
        }
        assert_eq!(m.state.operation(), Operation::Root { vmxon: L1Gpa(VMXON) });
        assert_eq!(m.state.current_pointer(), None);
    }
}

#[test]
fn vmxon_undefined_without_cr4_vmxe() {
    let mut m = Machine::long();
    m.l1.guest.cr4 &= !cr4::VMXE;
    assert_eq!(m.pointer(R::Vmxon, VMXON), UD);
}

/// SDM Vol. 3C §24.7, §24.8.
#[test]
fn vmxon_needs_fixed_bits_and_feature_control() {
    type Change = fn(&mut Machine);
    let changes: [(&str, Change); 5] = [
        ("CR0.NE", |m| m.l1.guest.cr0 &= !cr0::NE),
        ("CR0.PG", |m| m.l1.guest.cr0 &= !cr0::PG),
        ("a CR4 bit that is not offered", |m| m.l1.guest.cr4 |= 1 << 30),
        ("not locked", |m| {
            let mut f = FeatureControl::RESET;
            f.write(FeatureControl::VMX_OUTSIDE_SMX).unwrap();
            m.state.feature_control = f;
        }),
        ("not enabled", |m| {
            let mut f = FeatureControl::RESET;
            f.write(FeatureControl::LOCK).unwrap();
            m.state.feature_control = f;
        }),
    ];
    for (what, change) in changes {
        let mut m = Machine::long();
        change(&mut m);
        assert_eq!(m.pointer(R::Vmxon, VMXON), GP, "{what}");
        assert_eq!(m.state.operation(), Operation::Off);
    }
}

#[test]
fn vmxon_fails_for_a_bad_region() {
    for (what, pointer, revision) in [
        ("unaligned", VMXON + 8, REVISION),
        ("beyond the physical-address width", 1 << 40, REVISION),
        ("not RAM", 0x8000_0000, REVISION),
        ("revision identifier", VMXON, REVISION + 1),
        ("shadow indicator", VMXON, REVISION | SHADOW_INDICATOR),
    ] {
        let mut m = Machine::long();
        m.put32(VMXON, revision);
        m.put32(VMXON + 8, revision);
        assert_eq!(m.pointer(R::Vmxon, pointer), FAIL_INVALID, "{what}");
        assert_eq!(m.state.operation(), Operation::Off);
    }
}

#[test]
fn vmxon_in_root_operation() {
    assert_eq!(Machine::long().in_root().pointer(R::Vmxon, VMXON), FAIL_INVALID);
    let mut m = Machine::long().with_current(VMCS_A);
    assert_eq!(m.pointer(R::Vmxon, VMXON), fail(E::VmxonInRoot));
    assert_eq!(error_field(&m), 15);
}

#[test]
fn vmxoff_leaves_and_writes_the_vmcs() {
    let mut m = Machine::long().with_current(VMCS_A);
    m.state.current_mut().unwrap().set(Field::GuestRip, 0x1234);
    assert_eq!(m.plain(R::Vmxoff), SUCCEED);
    assert_eq!(m.state.operation(), Operation::Off);
    assert_eq!(m.state.current_pointer(), None);
    let mut m = m.in_root();
    assert_eq!(m.pointer(R::Vmptrld, VMCS_A), SUCCEED);
    assert_eq!(m.state.current().unwrap().get(Field::GuestRip), 0x1234);
}

#[test]
fn vmclear_and_vmptrld_check_their_pointer() {
    for (reason, pointer, error) in [
        (R::Vmclear, VMCS_B + 1, E::VmclearInvalidAddress),
        (R::Vmclear, 1 << 40, E::VmclearInvalidAddress),
        (R::Vmclear, VMXON, E::VmclearVmxonPointer),
        (R::Vmptrld, VMCS_B + 0x800, E::VmptrldInvalidAddress),
        (R::Vmptrld, 1 << 63, E::VmptrldInvalidAddress),
        (R::Vmptrld, VMXON, E::VmptrldVmxonPointer),
        // Nothing there: reads as ones.
        (R::Vmptrld, 0x8000_0000, E::VmptrldWrongRevision),
    ] {
        let mut m = Machine::long().with_current(VMCS_A);
        assert_eq!(m.pointer(reason, pointer), fail(error));
        assert_eq!(error_field(&m), error.number() as u64);
        assert_eq!(m.state.current_pointer(), Some(L1Gpa(VMCS_A)));
        // Without a current VMCS there is nowhere to put the number.
        assert_eq!(Machine::long().in_root().pointer(reason, pointer), FAIL_INVALID);
    }
}

#[test]
fn vmptrld_checks_the_revision() {
    let mut m = Machine::long().with_current(VMCS_A);
    m.put32(VMCS_B, REVISION ^ 1);
    assert_eq!(m.pointer(R::Vmptrld, VMCS_B), fail(E::VmptrldWrongRevision));
    // The shadow indicator is allowed with VMCS shadowing alone.
    m.put32(VMCS_B, REVISION | SHADOW_INDICATOR);
    m.caps.secondary.may_be_one &= !SecondaryControls::VMCS_SHADOWING.bits();
    assert_eq!(m.pointer(R::Vmptrld, VMCS_B), fail(E::VmptrldWrongRevision));
    m.caps.secondary.may_be_one |= SecondaryControls::VMCS_SHADOWING.bits();
    assert_eq!(m.pointer(R::Vmptrld, VMCS_B), SUCCEED);
    assert!(m.state.current().unwrap().shadow);
}

#[test]
fn vmptrst_stores_the_pointer() {
    let mut m = Machine::long().in_root();
    assert_eq!(m.plain(R::Vmptrst), SUCCEED);
    assert_eq!(m.get64(OPERAND), u64::MAX);
    assert_eq!(m.pointer(R::Vmptrld, VMCS_B), SUCCEED);
    assert_eq!(m.plain(R::Vmptrst), SUCCEED);
    assert_eq!(m.get64(OPERAND), VMCS_B);
}

#[test]
fn vmclear_of_the_current_vmcs_leaves_none() {
    let mut m = Machine::long().with_current(VMCS_A);
    assert_eq!(m.pointer(R::Vmclear, VMCS_B), SUCCEED);
    assert_eq!(m.state.current_pointer(), Some(L1Gpa(VMCS_A)), "another VMCS stays current");
    assert_eq!(m.pointer(R::Vmclear, VMCS_A), SUCCEED);
    assert_eq!(m.state.current_pointer(), None);
}

/// Launch states belong to the VMCS, not to the processor (SDM Vol. 3C §25.1).
#[test]
fn launch_state_travels_with_the_vmcs() {
    let mut m = Machine::long().with_current(VMCS_A);
    assert_eq!(m.plain(R::Vmresume), fail(E::VmresumeNonLaunched));
    assert_eq!(m.plain(R::Vmlaunch), Outcome::Enter(EntryKind::Launch));
    // An entry that fails its checks leaves the state clear.
    assert_eq!(m.plain(R::Vmlaunch), Outcome::Enter(EntryKind::Launch));
    m.state.enter_guest();
    assert!(m.state.in_guest());
    m.state.leave_guest();
    assert_eq!(m.plain(R::Vmlaunch), fail(E::VmlaunchNonClear));
    assert_eq!(error_field(&m), 4);
    assert_eq!(m.pointer(R::Vmclear, VMCS_B), SUCCEED);
    assert_eq!(m.pointer(R::Vmptrld, VMCS_B), SUCCEED);
    assert_eq!(m.plain(R::Vmresume), fail(E::VmresumeNonLaunched));
    assert_eq!(m.pointer(R::Vmptrld, VMCS_A), SUCCEED);
    assert_eq!(m.plain(R::Vmresume), Outcome::Enter(EntryKind::Resume));
    assert_eq!(m.pointer(R::Vmclear, VMCS_A), SUCCEED);
    assert_eq!(m.pointer(R::Vmptrld, VMCS_A), SUCCEED);
    assert_eq!(m.plain(R::Vmlaunch), Outcome::Enter(EntryKind::Launch));
    // VMCLEAR of a launched VMCS that is not current clears it in memory.
    m.state.enter_guest();
    m.state.leave_guest();
    assert_eq!(m.pointer(R::Vmptrld, VMCS_B), SUCCEED);
    assert_eq!(m.pointer(R::Vmclear, VMCS_A), SUCCEED);
    assert_eq!(m.pointer(R::Vmptrld, VMCS_A), SUCCEED);
    assert_eq!(m.state.current().unwrap().launch_state, LaunchState::Clear);
}

/// SDM Vol. 3C §27.1.
#[test]
fn basic_entry_checks() {
    for reason in [R::Vmlaunch, R::Vmresume] {
        let mut m = Machine::long().in_root();
        // No current VMCS comes before blocking by MOV SS.
        m.l1.guest.interruptibility = interruptibility::MOV_SS;
        assert_eq!(m.plain(reason), FAIL_INVALID);

        let mut m = Machine::long().with_current(VMCS_A);
        m.state.current_mut().unwrap().shadow = true;
        assert_eq!(m.plain(reason), FAIL_INVALID, "a shadow VMCS");

        let mut m = Machine::long().with_current(VMCS_A);
        m.l1.guest.interruptibility = interruptibility::MOV_SS;
        assert_eq!(m.plain(reason), fail(E::EventsBlockedByMovSs), "before the launch state");
        assert_eq!(error_field(&m), 26);
        m.l1.guest.interruptibility = interruptibility::STI;
        assert_ne!(m.plain(reason), fail(E::EventsBlockedByMovSs));
    }
}

#[test]
fn vmread_and_vmwrite_need_a_current_vmcs() {
    for reason in [R::Vmread, R::Vmwrite] {
        assert_eq!(Machine::long().in_root().field(reason, 0x681e), FAIL_INVALID);
    }
}

#[test]
fn unsupported_components() {
    for reason in [R::Vmread, R::Vmwrite] {
        for (what, encoding) in [
            ("no such field", 0x681e + 0x100),
            ("#VE information, which is not offered", 0x202a),
            ("high half of a 32-bit field", 0x4001),
            ("reserved bit 12", 0x681e | 1 << 12),
            ("bit 32 in 64-bit mode", 1 << 32 | 0x681e),
        ] {
            let mut m = Machine::long().with_current(VMCS_A);
            assert_eq!(m.field(reason, encoding), fail(E::UnsupportedComponent), "{what}");
            assert_eq!(error_field(&m), 12);
        }
        // Outside 64-bit mode the encoding has 32 bits.
        let mut m = Machine::long().with_current(VMCS_A);
        m.l1.guest.efer = 0;
        assert_eq!(m.field(reason, 1 << 32 | 0x681e), SUCCEED);
        // A field whose control is not offered does not exist.
        let mut m = Machine::long().with_current(VMCS_A);
        assert_eq!(m.field(reason, Field::Vpid.encoding() as u64), SUCCEED);
        m.caps.fields.remove(Field::Vpid);
        assert_eq!(m.field(reason, Field::Vpid.encoding() as u64), fail(E::UnsupportedComponent));
    }
}

/// IA32_VMX_MISC bit 29 (SDM Vol. 3D A.6).
#[test]
fn read_only_components() {
    let mut m = Machine::long().with_current(VMCS_A);
    let encoding = Field::ExitReason.encoding() as u64;
    m.l1.regs.gpr[gpr::RCX] = 7;
    assert_eq!(m.field(R::Vmwrite, encoding), SUCCEED);
    m.caps.misc &= !misc::VMWRITE_ANY_FIELD;
    m.l1.regs.gpr[gpr::RCX] = 8;
    assert_eq!(m.field(R::Vmwrite, encoding), fail(E::ReadOnlyComponent));
    assert_eq!(error_field(&m), 13);
    assert_eq!(m.field(R::Vmread, encoding), SUCCEED);
    assert_eq!(m.l1.regs.gpr[gpr::RCX], 7);
}

/// The primary operand in memory: 64 bits in 64-bit mode, else 32.
#[test]
fn memory_operands_of_vmread_and_vmwrite() {
    let mut m = Machine::long().with_current(VMCS_A);
    m.l1.regs.gpr[gpr::RBX] = Field::GuestRip.encoding() as u64;
    m.put64(OPERAND, 0x1122_3344_5566_7788);
    assert_eq!(m.plain(R::Vmwrite), SUCCEED);
    m.put64(OPERAND, 0);
    assert_eq!(m.plain(R::Vmread), SUCCEED);
    assert_eq!(m.get64(OPERAND), 0x1122_3344_5566_7788);
    m.l1.guest.efer = 0;
    m.put64(OPERAND, 0);
    assert_eq!(m.plain(R::Vmread), SUCCEED);
    assert_eq!(m.get64(OPERAND), 0x5566_7788, "four bytes only");
    m.put64(OPERAND, u64::MAX);
    assert_eq!(m.plain(R::Vmwrite), SUCCEED);
    assert_eq!(m.state.current().unwrap().get(Field::GuestRip), 0xffff_ffff);
}

/// A fault of the memory operand leaves no trace.
#[test]
fn page_faults_of_operands() {
    for reason in [R::Vmclear, R::Vmptrld, R::Vmptrst, R::Vmread, R::Vmwrite, R::Invept, R::Invvpid] {
        let mut m = Machine::long().with_current(VMCS_A);
        let ty = 1;
        m.l1.regs.gpr[gpr::RBX] = match reason {
            R::Vmread | R::Vmwrite => Field::GuestRip.encoding() as u64,
            _ => ty,
        };
        m.state.current_mut().unwrap().set(Field::GuestRip, 5);
        // The last bytes of the operand are on the absent page.
        let mut exit = VmExit::new(reason).qualified(ABSENT - 4);
        exit.instruction_info = memory_info(gpr::RBX);
        assert_eq!(m.run(&exit), Outcome::Fault(Fault::page(ABSENT, 2)), "{reason:?}");
        assert_eq!(m.state.current().unwrap().get(Field::GuestRip), 5);
        assert_eq!(m.get64(ABSENT - 4), 0);
    }
    let mut exit = VmExit::new(R::Vmxon).qualified(ABSENT);
    exit.instruction_info = memory_info(0);
    assert_eq!(Machine::long().run(&exit), Outcome::Fault(Fault::page(ABSENT, 2)));
}

/// An exit that the operand's access causes is not the instruction's end.
#[test]
fn exits_of_operands() {
    let mut m = Machine::long().in_root();
    let mut exit = VmExit::new(R::Vmptrld).qualified(DEVICE);
    exit.instruction_info = memory_info(0);
    assert_eq!(m.run(&exit), Outcome::Exit(VmExit::new(R::EptViolation)));
    assert_eq!(m.state.current_pointer(), None);
}

/// SDM Vol. 3C §25.10: VMREAD and VMWRITE by L2 access the VMCS of the link pointer.
#[test]
fn shadowed_accesses() {
    let mut m = Machine::long().with_current(VMCS_A);
    m.put32(VMCS_B, REVISION | SHADOW_INDICATOR);
    assert_eq!(m.pointer(R::Vmclear, VMCS_B), SUCCEED);
    let mut vmcs = m.state.current().unwrap().clone();
    vmcs.set(Field::LinkPointer, VMCS_B);
    let run = |m: &mut Machine, vmcs: &Vmcs12, reason, field: u64, value| {
        m.l1.regs.gpr[gpr::RBX] = field;
        m.l1.regs.gpr[gpr::RCX] = value;
        let mut exit = VmExit::new(reason);
        exit.instruction_info = register_info(gpr::RCX, gpr::RBX);
        let outcome = shadowed::execute(vmcs, &m.caps, &mut m.l1, &exit).unwrap();
        (outcome, m.l1.regs.gpr[gpr::RCX])
    };
    let rip = Field::GuestRip.encoding() as u64;
    let offset_high = Field::TscOffset.encoding() as u64 | 1;
    let error = Field::VmInstructionError.encoding() as u64;
    assert_eq!(run(&mut m, &vmcs, R::Vmread, rip, 1), (SUCCEED, 0));
    assert_eq!(run(&mut m, &vmcs, R::Vmwrite, rip, 0x1234).0, SUCCEED);
    assert_eq!(run(&mut m, &vmcs, R::Vmread, rip, 0), (SUCCEED, 0x1234));
    assert_eq!(run(&mut m, &vmcs, R::Vmwrite, offset_high, 7).0, SUCCEED);
    assert_eq!(run(&mut m, &vmcs, R::Vmread, offset_high & !1, 0), (SUCCEED, 7 << 32));
    // Neither VMCS12 nor anything cached has changed; L1 finds the values there.
    assert_eq!(m.state.current().unwrap().get(Field::GuestRip), 0);
    for reason in [R::Vmread, R::Vmwrite] {
        assert_eq!(run(&mut m, &vmcs, reason, 0x7fff, 0).0, fail(E::UnsupportedComponent));
        assert_eq!(run(&mut m, &vmcs, R::Vmread, error, 0), (SUCCEED, 12));
    }
    m.caps.misc &= !misc::VMWRITE_ANY_FIELD;
    assert_eq!(run(&mut m, &vmcs, R::Vmwrite, error, 0).0, fail(E::ReadOnlyComponent));
    assert_eq!(run(&mut m, &vmcs, R::Vmread, error, 0), (SUCCEED, 13));
    assert_eq!(m.pointer(R::Vmptrld, VMCS_B), SUCCEED);
    assert_eq!(m.state.current().unwrap().get(Field::GuestRip), 0x1234);
    vmcs.set(Field::LinkPointer, u64::MAX);
    for reason in [R::Vmread, R::Vmwrite] {
        assert_eq!(run(&mut m, &vmcs, reason, rip, 0).0, FAIL_INVALID);
    }
    m.l1.guest.segments[seg::SS].access = AccessRights(0xc0f3);
    assert_eq!(run(&mut m, &vmcs, R::Vmread, rip, 0).0, GP);
}

#[test]
fn rsp_is_an_operand() {
    let mut m = Machine::long().with_current(VMCS_A);
    m.l1.guest.rsp = 0x7777;
    m.l1.regs.gpr[gpr::RBX] = Field::GuestRsp.encoding() as u64;
    let mut exit = VmExit::new(R::Vmwrite);
    exit.instruction_info = register_info(gpr::RSP, gpr::RBX);
    assert_eq!(m.run(&exit), SUCCEED);
    m.l1.guest.rsp = 0;
    exit.reason = R::Vmread;
    assert_eq!(m.run(&exit), SUCCEED);
    assert_eq!(m.l1.guest.rsp, 0x7777);
}

#[test]
fn invept_types() {
    let mut m = Machine::long().with_current(VMCS_A);
    let eptp = 0x5000 | 6 | 3 << 3;
    let bad = fail(E::InvalidInvalidateOperand);
    assert_eq!(m.invalidate(R::Invept, 1, eptp, 0), Outcome::Invalidate(Invalidation::Eptp(eptp)));
    assert_eq!(m.invalidate(R::Invept, 2, 0, 0), Outcome::Invalidate(Invalidation::AllEptps));
    for ty in [0, 3, 1 << 32 | 1] {
        assert_eq!(m.invalidate(R::Invept, ty, eptp, 0), bad, "type {ty:#x}");
    }
    assert_eq!(error_field(&m), 28);
    assert_eq!(m.invalidate(R::Invept, 1, eptp | 1, 0), bad, "memory type");
    m.caps.ept_vpid &= !ept_vpid::INVEPT_SINGLE;
    assert_eq!(m.invalidate(R::Invept, 1, eptp, 0), bad, "type not offered");
    m.caps.ept_vpid &= !ept_vpid::INVEPT;
    assert_eq!(m.invalidate(R::Invept, 2, 0, 0), UD);
    // Outside 64-bit mode the type has 32 bits.
    let mut m = Machine::long().with_current(VMCS_A);
    m.l1.guest.efer = 0;
    let all = Outcome::Invalidate(Invalidation::AllEptps);
    assert_eq!(m.invalidate(R::Invept, 1 << 32 | 2, 0, 0), all);
}

#[test]
fn invvpid_types() {
    let mut m = Machine::long().with_current(VMCS_A);
    let bad = fail(E::InvalidInvalidateOperand);
    for (ty, low, high, expected) in [
        (0, 5, 0x1000, Outcome::Invalidate(Invalidation::Address { vpid: 5, linear: 0x1000 })),
        (1, 5, 0, Outcome::Invalidate(Invalidation::Vpid(5))),
        (2, 0, 0, Outcome::Invalidate(Invalidation::AllVpids)),
        (3, 5, 0, Outcome::Invalidate(Invalidation::VpidRetainGlobals(5))),
        (0, 5, 1 << 47, bad),
        (0, 0, 0x1000, bad),
        (1, 0, 0, bad),
        (3, 0, 0, bad),
        (1, 1 << 16 | 5, 0, bad),
        (2, 1 << 63, 0, bad),
        (4, 5, 0, bad),
        (1 << 40, 5, 0, bad),
    ] {
        assert_eq!(m.invalidate(R::Invvpid, ty, low, high), expected, "{ty} {low:#x} {high:#x}");
    }
    assert_eq!(error_field(&m), 28);
    m.caps.ept_vpid &= !(1 << 41);
    assert_eq!(m.invalidate(R::Invvpid, 1, 5, 0), bad, "type not offered");
    m.caps.ept_vpid &= !ept_vpid::INVVPID;
    assert_eq!(m.invalidate(R::Invvpid, 2, 0, 0), UD);
}

#[test]
fn vmcall_in_root() {
    assert_eq!(Machine::long().in_root().plain(R::Vmcall), FAIL_INVALID);
    let mut m = Machine::long().with_current(VMCS_A);
    assert_eq!(m.plain(R::Vmcall), fail(E::VmcallInRoot));
    assert_eq!(error_field(&m), 1);
    m.l1.guest.segments[seg::CS].access = AccessRights(0xc09b);
    assert_eq!(m.plain(R::Vmcall), UD, "compatibility mode");
}

#[test]
fn vmfunc_in_root_is_undefined() {
    assert_eq!(Machine::long().with_current(VMCS_A).plain(R::Vmfunc), UD);
}

/// SDM Vol. 3C §26.5.6.2, §26.5.6.3.
#[test]
fn eptp_switching() {
    let mut m = Machine::long().with_current(VMCS_A);
    let eptp = 0x5000 | 6 | 3 << 3;
    m.put64(0x4000 + 8 * 511, eptp);
    m.put64(0x4000 + 8, 7);
    let mut v = m.state.current().unwrap().clone();
    let call = |v: &mut Vmcs12, eax, ecx| vmfunc(v, &m.caps, m.l1.physical(), eax, ecx);
    v.set(Field::EptpListAddress, 0x4000);
    v.set(Field::SecondaryControls, SecondaryControls::ENABLE_VM_FUNCTIONS.bits() as u64);
    assert_eq!(call(&mut v, 0, 511), VmFunction::Undefined, "secondary controls not activated");
    v.set(Field::PrimaryControls, PrimaryControls::SECONDARY_CONTROLS.bits() as u64);
    assert_eq!(call(&mut v, 0, 511), VmFunction::Exit, "function not enabled");
    v.set(Field::VmFunctionControls, u64::MAX);
    assert_eq!(call(&mut v, 1, 511), VmFunction::Exit, "no such function");
    assert_eq!(call(&mut v, 64, 511), VmFunction::Exit);
    assert_eq!(call(&mut v, 0, 512), VmFunction::Exit);
    assert_eq!(call(&mut v, 0, 1), VmFunction::Exit, "an EPTP that VM entry would not accept");
    assert_eq!(v.get(Field::Eptp), 0);
    assert_eq!(call(&mut v, 0, 511), VmFunction::SwitchEptp(eptp));
    assert_eq!(v.get(Field::Eptp), eptp);
}

/// SDM Vol. 3C §24.8: not even VMXE can change in VMX operation.
#[test]
fn control_registers_in_vmx_operation() {
    let m = Machine::long();
    assert!(m.state.allows_cr4(&m.caps, 0) && m.state.allows_cr0(&m.caps, 0));
    let m = m.in_root();
    assert!(!m.state.allows_cr4(&m.caps, cr4::PAE));
    assert!(!m.state.allows_cr0(&m.caps, cr0::PE | cr0::NE));
    assert!(m.state.allows_cr0(&m.caps, cr0::PE | cr0::NE | cr0::PG | cr0::WP));
}

fn any_field() -> impl Strategy<Value = Field> {
    (0..Field::COUNT).prop_map(|i| Field::ALL[i])
}

fn any_exit() -> impl Strategy<Value = VmExit> {
    let reason = proptest::sample::select(R::ALL.to_vec());
    let info = prop_oneof![any::<u32>(), Just(memory_info(gpr::RBX)), Just(register_info(1, 3))];
    let qualification = prop_oneof![any::<u64>(), 0u64..RAM as u64, Just(OPERAND)];
    (reason, qualification, info).prop_map(|(reason, qualification, info)| {
        let mut exit = VmExit::new(reason).qualified(qualification);
        exit.instruction_info = info;
        exit
    })
}

/// Registers that make instructions go far, or random ones.
fn any_value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0u64..5,
        any_field().prop_map(|f| f.encoding() as u64),
        any_field().prop_map(|f| f.encoding() as u64 | 1),
        proptest::sample::select(vec![OPERAND, VMXON, VMCS_A, VMCS_B, 0x4000]),
    ]
}

proptest! {
    /// Both operand sizes and access types: what is read back is what the field can hold of
    /// what was written.
    #[test]
    fn vmread_after_vmwrite(field in any_field(), value: u64, before: u64, high: bool, long: bool) {
        let mut m = Machine::long().with_current(VMCS_A);
        for f in Field::ALL {
            m.state.current_mut().unwrap().set(*f, before);
        }
        if !long {
            m.l1.guest.efer = 0;
        }
        let high = high && field.width() == Width::Bits64;
        let encoding = field.encoding() as u64 | high as u64;
        m.l1.regs.gpr[gpr::RCX] = value;
        prop_assert_eq!(m.field(R::Vmwrite, encoding), SUCCEED);
        m.l1.regs.gpr[gpr::RCX] = !value;
        prop_assert_eq!(m.field(R::Vmread, encoding), SUCCEED);
        let bits = match field.width() {
            _ if high || !long => field.width().mask() & 0xffff_ffff,
            w => w.mask(),
        };
        prop_assert_eq!(m.l1.regs.gpr[gpr::RCX], value & bits);
        // The whole field: a high access leaves the low half, a 32-bit one clears the high half; and
        // no other field has changed.
        let whole = if high { before & 0xffff_ffff | value << 32 } else { value & bits };
        for f in Field::ALL {
            let expected = if *f == field { whole } else { before & f.width().mask() };
            prop_assert_eq!(m.state.current().unwrap().get(*f), expected, "{}", f.name());
        }
    }

    /// VMCLEAR and VMPTRLD keep every field, in any order with another VMCS. VMPTRLD alone keeps the
    /// launch state too, VMCLEAR makes it clear, and neither touches the first eight bytes of the
    /// region, which are software's and VMX abort's (SDM Vol. 3C §25.2).
    #[test]
    fn vmcs12_survives_round_trips(
        values in proptest::collection::vec(any::<u64>(), Field::COUNT), launched: bool, abort: u32,
    ) {
        let mut m = Machine::long().with_current(VMCS_A);
        m.put32(VMCS_A + 4, abort);
        let first = m.get64(VMCS_A);
        let state = if launched { LaunchState::Launched } else { LaunchState::Clear };
        m.state.current_mut().unwrap().launch_state = state;
        for (f, v) in Field::ALL.iter().zip(&values) {
            m.l1.regs.gpr[gpr::RCX] = *v;
            prop_assert_eq!(m.field(R::Vmwrite, f.encoding() as u64), if m.caps.has_field(*f) { SUCCEED } else { fail(E::UnsupportedComponent) });
        }
        prop_assert_eq!(m.pointer(R::Vmclear, VMCS_B), SUCCEED);
        prop_assert_eq!(m.pointer(R::Vmptrld, VMCS_B), SUCCEED);
        prop_assert_eq!(m.state.current().unwrap().get(Field::GuestRip), 0);
        prop_assert_eq!(m.state.current().unwrap().launch_state, LaunchState::Clear);
        prop_assert_eq!(m.pointer(R::Vmptrld, VMCS_A), SUCCEED);
        prop_assert_eq!(m.state.current().unwrap().launch_state, state);
        prop_assert_eq!(m.pointer(R::Vmclear, VMCS_A), SUCCEED);
        prop_assert_eq!(m.pointer(R::Vmptrld, VMCS_A), SUCCEED);
        prop_assert_eq!(m.state.current().unwrap().launch_state, LaunchState::Clear);
        prop_assert_eq!(m.pointer(R::Vmclear, VMCS_A), SUCCEED);
        prop_assert_eq!(m.pointer(R::Vmptrld, VMCS_A), SUCCEED);
        for (f, v) in Field::ALL.iter().zip(&values) {
            // Refused VMWRITEs left their number in the VM-instruction error.
            if m.caps.has_field(*f) && *f != Field::VmInstructionError {
                prop_assert_eq!(m.field(R::Vmread, f.encoding() as u64), SUCCEED);
                prop_assert_eq!(m.l1.regs.gpr[gpr::RCX], v & f.width().mask(), "{}", f.name());
            }
        }
        prop_assert_eq!(m.get64(VMCS_A), first);
    }

    /// Any stream of exits with any registers, modes and memory: no panic, and the state stays
    /// consistent.
    #[test]
    fn random_streams(
        steps in proptest::collection::vec((any_exit(), any_value(), any_value(), any::<u8>()), 1..200),
        scribbles in proptest::collection::vec((0..RAM as u64 - 8, any::<u64>()), 0..50),
    ) {
        let mut m = Machine::long().in_root();
        for (at, value) in scribbles {
            m.put64(at, value);
        }
        for (exit, operand, register, mode) in steps {
            m.put64(OPERAND, operand);
            m.l1.regs.gpr[gpr::RBX] = register;
            match mode {
                0 => m.l1.guest.efer ^= x86_spec::reg::efer::LMA,
                1 => m.l1.guest.segments[seg::DS].access = AccessRights(register as u32),
                2 => m.l1.guest.segments[seg::DS].limit = register as u32,
                3 => m.put32(operand & 0xf000, REVISION),
                4 => m.l1.guest.segments[seg::GS].base = register,
                _ => {}
            }
            let outcome = execute(&mut m.state, &m.caps, &mut m.l1, &exit);
            if let Some(Outcome::Enter(_)) = outcome {
                m.state.enter_guest();
                prop_assert!(m.state.in_guest());
                m.state.leave_guest();
            }
            prop_assert!(m.state.in_vmx_operation() || m.state.current().is_none());
            if let Some(p) = m.state.current_pointer() {
                prop_assert_eq!(p.page_offset(), 0);
                prop_assert_ne!(Some(p), m.state.vmxon_pointer());
            }
            if let Some(Outcome::Complete(VmResult::FailValid(e))) = outcome {
                prop_assert_eq!(error_field(&m), e.number() as u64);
            }
        }
    }
}
