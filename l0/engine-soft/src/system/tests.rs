//! Table tests of system instructions and events; expectations are the SDM's.

use engine::{Activity, ExitBus, Segment, Vcpu, interruptibility};
use memory::Gpa;
use x86_spec::controls::{EntryControls, PinbasedControls, PrimaryControls, SecondaryControls};
use x86_spec::exception::{self as ex, pf};
use x86_spec::exit::{ExitReason as R, cr_access, io};
use x86_spec::interruption::{EventType, InterruptionInfo};
use x86_spec::reg::{cr0, cr4, dr, efer, gpr, rflags};
use x86_spec::segment::{AccessRights, seg};

use super::testutil::*;

const HLT: u8 = 0xf4;

fn with_code(prefix: &[u8]) -> Vec<u8> {
    let mut v = prefix.to_vec();
    v.push(HLT);
    v
}

/// SDM Vol. 3C §26.1.2: these always exit, with their length.
#[test]
fn unconditional_exits() {
    for (bytes, reason) in [
        (&[0x0f, 0xa2][..], R::Cpuid),
        (&[0x0f, 0x08], R::Invd),
        (&[0x0f, 0x01, 0xc1], R::Vmcall),
        (&[0x0f, 0x01, 0xc2], R::Vmlaunch),
        (&[0x0f, 0x01, 0xc3], R::Vmresume),
        (&[0x0f, 0x01, 0xc4], R::Vmxoff),
    ] {
        let exit = Guest::long(bytes).expect(reason);
        assert_eq!(exit.instruction_length as usize, bytes.len());
    }
}

/// VMX instructions with memory operands: instruction information and displacement
/// (SDM Vol. 3C table 28-13, §28.2.1).
#[test]
fn vmx_instruction_operands() {
    // vmptrld [rax + rcx*4 + 0x12]
    let mut g = Guest::long(&[0x0f, 0xc7, 0x74, 0x88, 0x12]);
    let e = g.expect(R::Vmptrld);
    assert_eq!(e.qualification, 0x12);
    assert_eq!(e.instruction_info, 2 | 2 << 7 | (seg::DS as u32) << 15 | 1 << 18);
    // vmread [rip + 0x100], rdx: the qualification adds the next RIP.
    let mut g = Guest::long(&[0x0f, 0x78, 0x15, 0x00, 0x01, 0x00, 0x00]);
    let e = g.expect(R::Vmread);
    assert_eq!(e.qualification, CODE + 7 + 0x100);
    assert_eq!(e.instruction_info >> 28, gpr::RDX as u32);
    assert_ne!(e.instruction_info & 1 << 22, 0, "no index");
    assert_ne!(e.instruction_info & 1 << 27, 0, "no base");
    // vmwrite rbx, rsi: register operand in bits 6:3, bit 10 set.
    let mut g = Guest::long(&[0x0f, 0x79, 0xde]);
    let e = g.expect(R::Vmwrite);
    assert_eq!(e.instruction_info, 1 << 10 | (gpr::RSI as u32) << 3 | (gpr::RBX as u32) << 28);
    // In compatibility mode they are #UD (SDM Vol. 3D chapter 31).
    let mut g = Guest::long(&[0x0f, 0x01, 0xc2]).patch(|g| {
        let cs = &mut g.vmcs.guest.segments[seg::CS];
        (cs.access, cs.selector) = (AccessRights(0xc09b), sel::CODE32);
    });
    g.expect_event(ex::UD, None);
}

/// MOV to CR0: guest/host mask and read shadow (SDM Vol. 3C §26.1.3, §25.6.6).
#[test]
fn cr0_mask_and_shadow() {
    // mov rax, cr0; mov rbx, rax; or eax, 8 (TS); mov cr0, rax; hlt
    let bytes = with_code(&[0x0f, 0x20, 0xc0, 0x89, 0xc3, 0x83, 0xc8, 0x08, 0x0f, 0x22, 0xc0]);
    let mut g = Guest::long(&bytes).patch(|g| {
        g.vmcs.controls.cr0_mask = cr0::TS;
        g.vmcs.controls.cr0_shadow = 0;
    });
    let e = g.expect(R::CrAccess);
    assert_eq!(e.qualification, cr_access::mov(0, cr_access::Kind::MovTo, gpr::RAX as u8));
    assert_eq!(g.vmcs.guest.rip, CODE + 8);
    // With the shadow saying 1 already, the write goes on and leaves the owned bit alone.
    let mut g = Guest::long(&bytes).patch(|g| {
        g.vmcs.controls.cr0_mask = cr0::TS;
        g.vmcs.controls.cr0_shadow = cr0::TS;
    });
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.cr0 & cr0::TS, 0);
    assert_ne!(g.regs.gpr[gpr::RBX] & cr0::TS, 0, "reads come from the shadow");
}

/// MOV to CR0 faults (SDM Vol. 2B, MOV—Move to/from Control Registers).
#[test]
fn cr0_faults() {
    for clear_set in [(cr0::PE, 0), (cr0::PG, 0), (0, cr0::NW), (0, 1 << 32)] {
        let value = (cr0::PE | cr0::PG | cr0::ET | cr0::NE) & !clear_set.0 | clear_set.1;
        let mut g = Guest::long(&[0x0f, 0x22, 0xc0]).with(gpr::RAX, value);
        g.expect_event(ex::GP, Some(0));
    }
}

/// MOV to CR4 faults (ibid.): reserved bits, PAE in IA-32e mode, PCIDE with CR3[11:0].
#[test]
fn cr4_faults() {
    for value in [cr4::PAE | 1 << 23, cr4::PAE | cr4::LA57, cr4::DE] {
        let mut g = Guest::long(&[0x0f, 0x22, 0xe0]).with(gpr::RAX, value);
        g.expect_event(ex::GP, Some(0));
    }
    let pcide = cr4::PAE | cr4::PCIDE;
    let mut g = Guest::long(&[0x0f, 0x22, 0xe0]).with(gpr::RAX, pcide).patch(|g| g.vmcs.guest.cr3 |= 8);
    g.expect_event(ex::GP, Some(0));
    let mut g = Guest::long(&with_code(&[0x0f, 0x22, 0xe0])).with(gpr::RAX, pcide);
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.cr4, pcide);
}

/// CR3-load exiting and CR3-target values (SDM Vol. 3C §25.6.7).
#[test]
fn cr3_targets() {
    let bytes = with_code(&[0x0f, 0x22, 0xd8]);
    let run = |count| {
        let mut g = Guest::long(&bytes).with(gpr::RAX, 0x1_0000).primary(PrimaryControls::CR3_LOAD_EXITING);
        g.vmcs.controls.cr3_targets[0] = 0x1_0000;
        g.vmcs.controls.cr3_target_count = count;
        g.enter().reason
    };
    assert_eq!(run(0), R::CrAccess);
    assert_eq!(run(1), R::Hlt);
}

/// CLTS and LMSW exit conditions (SDM Vol. 3C §26.1.3).
#[test]
fn clts_and_lmsw() {
    let mut g = Guest::long(&with_code(&[0x0f, 0x06])).patch(|g| {
        g.vmcs.guest.cr0 |= cr0::TS;
        g.vmcs.controls.cr0_mask = cr0::TS;
        g.vmcs.controls.cr0_shadow = cr0::TS;
    });
    assert_eq!(cr_access::kind(g.expect(R::CrAccess).qualification), cr_access::Kind::Clts);
    let mut g = Guest::long(&with_code(&[0x0f, 0x06])).patch(|g| g.vmcs.guest.cr0 |= cr0::TS);
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.cr0 & cr0::TS, 0);
    // lmsw ax with TS|EM: loads bits 3:1 and can't clear PE.
    let mut g = Guest::long(&with_code(&[0x0f, 0x01, 0xf0])).with(gpr::RAX, cr0::TS | cr0::EM);
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.cr0 & 0xf, cr0::PE | cr0::TS | cr0::EM);
    let mut g = Guest::long(&[0x0f, 0x01, 0xf0]).with(gpr::RAX, cr0::TS).patch(|g| {
        g.vmcs.controls.cr0_mask = cr0::TS;
    });
    let e = g.expect(R::CrAccess);
    assert_eq!(e.qualification, 3 << 4 | cr0::TS << 16);
}

/// MOV DR: general detect, DR4 aliasing, reserved halves (SDM Vol. 3B §18.2).
#[test]
fn debug_registers() {
    // mov dr7, rax with GD set raises #DB (fault) with BD and clears GD.
    let mut g = Guest::long(&[0x0f, 0x23, 0xf8]).patch(|g| g.vmcs.guest.dr7 |= dr::DR7_GD);
    g.expect_event(ex::DB, None);
    assert_ne!(g.regs.dr6 & dr::DR6_BD, 0);
    assert_eq!(g.vmcs.guest.dr7 & dr::DR7_GD, 0);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE, "general detect is a fault");
    // dr4 with CR4.DE is #UD, without it it is DR6.
    let mut g = Guest::long(&[0x0f, 0x21, 0xe0]);
    g.expect_event(ex::UD, None);
    let mut g = Guest::long(&with_code(&[0x0f, 0x21, 0xe0])).patch(|g| g.vmcs.guest.cr4 &= !cr4::DE);
    g.expect(R::Hlt);
    assert_eq!(g.regs.gpr[gpr::RAX], dr::DR6_FIXED1);
    let mut g = Guest::long(&[0x0f, 0x23, 0xf0]).with(gpr::RAX, 1 << 32);
    g.expect_event(ex::GP, Some(0));
    // The exit comes before the privilege check.
    let mut g = Guest::user(&[0x0f, 0x21, 0xf8]).primary(PrimaryControls::MOV_DR_EXITING);
    assert_eq!(g.expect(R::MovDr).qualification, 7 | 1 << 4);
}

/// Privileged instructions at CPL 3 are #GP(0) and don't exit (SDM Vol. 3C §26.1.1).
#[test]
fn privilege_comes_before_exits() {
    for bytes in [
        &[0xf4][..],
        &[0x0f, 0x32],
        &[0x0f, 0x30],
        &[0x0f, 0x20, 0xd8],
        &[0x0f, 0x22, 0xd8],
        &[0x0f, 0x08],
        &[0x0f, 0x09],
        &[0x0f, 0x06],
        &[0x0f, 0x01, 0x38],
        &[0x0f, 0x01, 0x10],
        &[0x0f, 0x00, 0xd0],
        &[0x0f, 0x01, 0xf8],
        &[0xfa],
        &[0xfb],
        &[0xe4, 0x10],
        &[0x48, 0x0f, 0x07],
    ] {
        let mut g = Guest::user(bytes).with(gpr::RAX, DATA);
        g.expect_event(ex::GP, Some(0));
        assert_eq!(g.read64(g.vmcs.guest.rsp + 8), CODE, "{bytes:x?}");
    }
}

/// The 64-bit interrupt frame from CPL 3: stack from RSP0, SS null, RF set for a fault,
/// IF and TF cleared (SDM Vol. 3A §6.14).
#[test]
fn long_mode_frame() {
    let mut g = Guest::user(&[0x0f, 0x0b]).patch(|g| g.vmcs.guest.rflags |= rflags::IF);
    g.vmcs.guest.rsp = STACK - 3;
    g.expect_event(ex::UD, None);
    let rsp = g.vmcs.guest.rsp;
    assert_eq!(rsp, STACK0 - 40);
    assert_eq!(g.read64(rsp), CODE);
    assert_eq!(g.read64(rsp + 8), sel::USER_CODE64 as u64);
    assert_eq!(g.read64(rsp + 16), rflags::FIXED1 | rflags::IF | rflags::RF);
    assert_eq!(g.read64(rsp + 24), STACK - 3);
    assert_eq!(g.read64(rsp + 32), sel::USER_DATA as u64);
    assert_eq!(g.vmcs.guest.segments[seg::SS].selector, 0);
    assert!(g.vmcs.guest.segments[seg::SS].access.unusable());
    assert_eq!(g.vmcs.guest.rflags, rflags::FIXED1);
}

/// IST stacks and alignment of the same-level stack (SDM Vol. 3A §6.14.2, §6.14.5).
#[test]
fn interrupt_stack_table_and_alignment() {
    let mut g = Guest::long(&[0x0f, 0x0b]).patch(|g| g.gate64(ex::UD, 0x8e, 1));
    g.expect_event(ex::UD, None);
    assert_eq!(g.vmcs.guest.rsp, IST1 - 40);
    let mut g = Guest::long(&[0x0f, 0x0b]).with(gpr::RSP, STACK + 5);
    g.expect_event(ex::UD, None);
    assert_eq!(g.vmcs.guest.rsp, STACK - 40);
    assert_eq!(g.read64(g.vmcs.guest.rsp + 24), STACK + 5);
}

/// INT n pushes the next instruction's address and needs gate.DPL >= CPL; the error code
/// of the #GP has the IDT bit and not EXT (SDM Vol. 3A §6.12.1.2, §6.13).
#[test]
fn software_interrupts() {
    let mut g = Guest::user(&[0xcd, 0x80]).patch(|g| g.gate64(0x80, 0xee, 0));
    g.expect_event(0x80, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 2);
    let mut g = Guest::user(&[0xcd, 0x80]);
    g.expect_event(ex::GP, Some(0x80 * 8 + 2));
    assert_eq!(g.read64(g.vmcs.guest.rsp + 8), CODE);
    let mut g = Guest::user(&[0xcc]).patch(|g| g.gate64(ex::BP, 0xee, 0));
    g.expect_event(ex::BP, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 1);
    // A gate that isn't present: #NP with the vector.
    let mut g = Guest::long(&[0xcd, 0x80]).patch(|g| g.gate64(0x80, 0x0e, 0));
    g.expect_event(ex::NP, Some(0x80 * 8 + 2));
    // Trap gates leave IF alone.
    let mut g = Guest::long(&[0xcd, 0x80]).patch(|g| {
        g.gate64(0x80, 0x8f, 0);
        g.vmcs.guest.rflags |= rflags::IF;
    });
    g.expect_event(0x80, None);
    assert_ne!(g.vmcs.guest.rflags & rflags::IF, 0);
}

/// A fault on the way to a handler sets EXT for events that no program asked for
/// (SDM Vol. 3A §6.13).
#[test]
fn ext_bit() {
    // #BR-free way: #DB by INT1 counts as external; its gate isn't present.
    let mut g = Guest::long(&[0xf1]).patch(|g| g.gate64(ex::DB, 0x0e, 0));
    g.expect_event(ex::NP, Some(8 + 2 + 1));
    let mut g = Guest::long(&[0x0f, 0x0b]).patch(|g| g.gate64(ex::UD, 0x0e, 0));
    g.expect_event(ex::NP, Some(ex::UD as u32 * 8 + 2 + 1));
}

/// Two contributory faults make a double fault, a third a triple fault (SDM Vol. 3A
/// tables 6-4 and 6-5).
#[test]
fn double_and_triple_faults() {
    // The #GP gate isn't present: #NP during #GP.
    let gp = [0x0f, 0x22, 0xe0];
    let broken = |g: &mut Guest| g.gate64(ex::GP, 0x0e, 0);
    let mut g = Guest::long(&gp).with(gpr::RAX, u64::MAX).patch(broken);
    g.expect_event(ex::DF, Some(0));
    let mut g = Guest::long(&gp).with(gpr::RAX, u64::MAX).patch(broken).patch(|g| g.gate64(ex::DF, 0x0e, 0));
    let e = g.expect(R::TripleFault);
    assert!(!e.idt_vectoring.is_valid(), "SDM Vol. 3C 28.2.4: not during event delivery");
    assert_eq!(g.vmcs.guest.rip, CODE);
    // A benign first event and a contributory second are handled one after the other.
    let mut g = Guest::long(&[0x0f, 0x0b]).patch(|g| g.gate64(ex::UD, 0x0e, 0));
    g.expect_event(ex::NP, Some(ex::UD as u32 * 8 + 3));
    // A page fault while delivering a page fault is a double fault.
    let mut g = Guest::long(&[0x48, 0x8b, 0x00]).with(gpr::RAX, NOT_PRESENT).with(gpr::RSP, NOT_PRESENT);
    g.gate64(ex::DF, 0x8e, 1);
    g.expect_event(ex::DF, Some(0));
    assert_eq!(g.vmcs.guest.rsp, IST1 - 48);
}

/// #PF: error code and CR2 (SDM Vol. 3A §4.7); with the exception bitmap, the address is
/// in the qualification and CR2 doesn't change (Vol. 3C §28.1, §28.2.1).
#[test]
fn page_fault_delivery_and_exit() {
    let bytes = [0x48, 0x8b, 0x00];
    let mut g = Guest::long(&bytes).with(gpr::RAX, NOT_PRESENT);
    g.expect_event(ex::PF, Some(0));
    assert_eq!(g.regs.cr2, NOT_PRESENT);
    let mut g = Guest::long(&bytes).with(gpr::RAX, NOT_PRESENT).patch(|g| {
        g.vmcs.controls.exception_bitmap = 1 << ex::PF;
        g.regs.cr2 = 0x1234;
    });
    let e = g.expect(R::ExceptionOrNmi);
    assert_eq!(e.interruption_info, InterruptionInfo::new(14, EventType::HardwareException, true));
    assert_eq!(e.qualification, NOT_PRESENT);
    assert_eq!(g.regs.cr2, 0x1234);
    assert_ne!(g.vmcs.guest.rflags & rflags::RF, 0, "Vol. 3C 28.3.3");
    // PFEC mask and match: exit only if (code & mask) == match, inverted if the bit is 0.
    for (bitmap, mask, matches, exits) in
        [(1, pf::W, 0, true), (1, pf::W, pf::W, false), (0, pf::W, pf::W, true), (0, 0, 0, false)]
    {
        let mut g = Guest::long(&bytes).with(gpr::RAX, NOT_PRESENT).patch(|g| {
            g.vmcs.controls.exception_bitmap = bitmap << ex::PF;
            g.vmcs.controls.pfec_mask = mask;
            g.vmcs.controls.pfec_match = matches;
        });
        assert_eq!(g.enter().reason == R::ExceptionOrNmi, exits, "{bitmap} {mask} {matches}");
    }
}

/// An exit during delivery reports the event in IDT-vectoring information (SDM Vol. 3C §28.2.4).
#[test]
fn idt_vectoring() {
    // The #PF handler's stack faults, and #DF exits: not during delivery.
    let page_fault = |bitmap: u32| {
        Guest::long(&[0x48, 0x8b, 0x00])
            .with(gpr::RAX, NOT_PRESENT)
            .patch(|g| g.vmcs.controls.exception_bitmap = bitmap)
    };
    let mut g = page_fault(1 << ex::DF).with(gpr::RSP, NOT_PRESENT);
    assert!(!g.expect(R::ExceptionOrNmi).idt_vectoring.is_valid());
    // #NP while delivering #UD exits with #UD as the event in delivery.
    let mut g = Guest::long(&[0x0f, 0x0b]).patch(|g| {
        g.gate64(ex::UD, 0x0e, 0);
        g.vmcs.controls.exception_bitmap = 1 << ex::NP;
    });
    let e = g.expect(R::ExceptionOrNmi);
    assert_eq!(e.interruption_info.vector(), ex::NP);
    assert_eq!(e.idt_vectoring, InterruptionInfo::new(ex::UD, EventType::HardwareException, false));
    // An EPT violation on the handler's stack during INT 80h: its length goes with it.
    let mut g = Guest::long(&[0xcd, 0x80]).patch(|g| {
        g.write64(0x3000 + 8, 0);
        g.vmcs.guest.rsp = 0x20_1000;
    });
    let e = g.expect(R::EptViolation);
    assert_eq!(e.idt_vectoring, InterruptionInfo::new(0x80, EventType::SoftwareInterrupt, false));
    assert_eq!(e.instruction_length, 2);
    assert_eq!(g.vmcs.guest.rip, CODE);
}

/// An exception that the bitmap has exit doesn't become a double or triple fault, whatever was
/// being delivered (SDM Vol. 3C §26.2, "Triple fault"): how hypervisors with shadow page tables
/// get to map the IDT and the handler's stack.
#[test]
fn exceptions_during_delivery_exit_before_they_combine() {
    // (the injected event, its error code, what the bitmap has besides #PF)
    let rows = [(ex::PF, 3, 0), (ex::GP, 8, 0), (ex::DF, 0, 0), (ex::PF, 6, 1 << ex::DF)];
    for (vector, code, others) in rows {
        let injected = InterruptionInfo::new(vector, EventType::HardwareException, true);
        let mut g = Guest::long(&[HLT]).with(gpr::RSP, NOT_PRESENT).patch(|g| {
            g.vmcs.controls.exception_bitmap = 1 << ex::PF | others;
            g.vmcs.controls.entry_interruption = injected;
            g.vmcs.controls.entry_error_code = code;
            g.regs.cr2 = 0x1234;
        });
        let e = g.expect(R::ExceptionOrNmi);
        assert_eq!(e.interruption_info, InterruptionInfo::new(ex::PF, EventType::HardwareException, true));
        assert_eq!((e.interruption_error_code, e.qualification), (pf::W, NOT_PRESENT - 8));
        assert_eq!((e.idt_vectoring, e.idt_vectoring_error_code), (injected, code));
        assert_eq!((g.vmcs.guest.rip, g.regs.cr2), (CODE, 0x1234));
    }
}

/// Event injection of each type (SDM Vol. 3C §27.6.1).
#[test]
fn injection() {
    let inject = |g: &mut Guest, vector, kind, error: Option<u32>| {
        g.vmcs.controls.entry_interruption = InterruptionInfo::new(vector, kind, error.is_some());
        g.vmcs.controls.entry_error_code = error.unwrap_or(0);
    };
    let mut g = Guest::long(&[HLT]);
    inject(&mut g, 0x31, EventType::External, None);
    g.expect_event(0x31, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE);
    assert!(!g.vmcs.controls.entry_interruption.is_valid(), "cleared by the entry");

    let mut g = Guest::long(&[HLT]);
    // An injected exception doesn't exit by the exception bitmap, and CR2 is the hypervisor's.
    g.vmcs.controls.exception_bitmap = u32::MAX;
    g.regs.cr2 = 77;
    inject(&mut g, ex::PF, EventType::HardwareException, Some(2));
    g.expect_event(ex::PF, Some(2));
    assert_eq!(g.regs.cr2, 77);

    let mut g = Guest::long(&[HLT]);
    inject(&mut g, 0x80, EventType::SoftwareInterrupt, None);
    g.vmcs.controls.entry_instruction_length = 2;
    g.expect_event(0x80, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 2);

    let mut g = Guest::long(&[HLT]).patch(|g| g.vmcs.guest.activity = Activity::Hlt);
    inject(&mut g, 2, EventType::Nmi, None);
    g.expect_event(2, None);
    assert_ne!(g.vmcs.guest.interruptibility & interruptibility::NMI, 0);
    assert_eq!(g.vmcs.guest.activity, Activity::Active);

    let mut g = Guest::long(&[HLT]);
    inject(&mut g, 0, EventType::Other, None);
    g.expect(R::MonitorTrapFlag);
    assert_eq!(g.vmcs.guest.rip, CODE);
}

/// IRETQ pops five words, changes privilege, unblocks NMIs (SDM Vol. 2A; Vol. 3A §6.7.1).
#[test]
fn iret_to_user() {
    let mut g = Guest::long(&[0x48, 0xcf]).with(gpr::RSP, STACK - 40).patch(|g| {
        g.vmcs.guest.interruptibility = interruptibility::NMI;
        let frame = [CODE + 0x100, sel::USER_CODE64 as u64, 0x202, DATA, sel::USER_DATA as u64];
        for (n, v) in frame.iter().enumerate() {
            g.write64(STACK - 40 + n as u64 * 8, *v);
        }
        g.write(CODE + 0x100, &[0x0f, 0xa2]);
    });
    g.expect(R::Cpuid);
    let s = &g.vmcs.guest;
    assert_eq!((s.rip, s.rsp, s.rflags), (CODE + 0x100, DATA, 0x202));
    assert_eq!(s.segments[seg::SS].access.dpl(), 3);
    assert_eq!(s.interruptibility, 0);
}

/// IRET to CPL 3 makes a segment register null that points to a segment of DPL 0 (SDM Vol. 3A §5.8.6). One that VM entry
/// loaded with a null selector points to none, so its base stays.
#[test]
fn iret_to_user_keeps_bases_of_null_segments() {
    for (selector, base) in [(0, 0x7f00_1122_3000), (3, 0x7f00_1122_3000), (sel::DATA, 0)] {
        let mut g = Guest::long(&[0x48, 0xcf]).with(gpr::RSP, STACK - 40).patch(|g| {
            let fs = &mut g.vmcs.guest.segments[seg::FS];
            (fs.selector, fs.base, fs.access) = (selector, 0x7f00_1122_3000, AccessRights(0xc093));
            let frame = [CODE + 0x100, sel::USER_CODE64 as u64, 0x202, DATA, sel::USER_DATA as u64];
            for (n, v) in frame.iter().enumerate() {
                g.write64(STACK - 40 + n as u64 * 8, *v);
            }
            g.write(CODE + 0x100, &[0x0f, 0xa2]);
        });
        g.expect(R::Cpuid);
        assert_eq!(g.vmcs.guest.segments[seg::FS].base, base, "selector {selector:#x}");
    }
}

/// IRET in 64-bit mode with NT is #GP(0); NMIs are unblocked all the same.
#[test]
fn iret_with_nt_faults() {
    let mut g = Guest::long(&[0x48, 0xcf]).patch(|g| {
        g.vmcs.guest.rflags |= rflags::NT;
        g.vmcs.guest.interruptibility = interruptibility::NMI;
        g.vmcs.controls.exception_bitmap = 1 << ex::GP;
    });
    let e = g.expect(R::ExceptionOrNmi);
    assert_ne!(e.interruption_info.0 & InterruptionInfo::NMI_UNBLOCKING, 0);
    assert_eq!(g.vmcs.guest.interruptibility & interruptibility::NMI, 0);
}

/// SYSCALL and SYSRET (SDM Vol. 2B).
#[test]
fn syscall_and_sysret() {
    let star = (sel::CODE64 as u64) << 32 | ((sel::USER_CODE32 & !3) as u64) << 48;
    let mut g = Guest::user(&[0x0f, 0x05, 0x0f, 0xa2]).patch(|g| {
        g.regs.msrs.star = star;
        g.regs.msrs.lstar = CODE + 0x100;
        g.regs.msrs.fmask = rflags::IF;
        g.vmcs.guest.rflags |= rflags::IF | rflags::CF;
        // sysretq
        g.write(CODE + 0x100, &[0x48, 0x0f, 0x07]);
    });
    g.expect(R::Cpuid);
    let s = &g.vmcs.guest;
    assert_eq!(s.rip, CODE + 2);
    assert_eq!(g.regs.gpr[gpr::RCX], CODE + 2);
    assert_eq!(g.regs.gpr[11], 0x203);
    assert_eq!(s.rflags, 0x203);
    assert_eq!(s.segments[seg::CS].selector, sel::USER_CODE64);
    assert_eq!(s.segments[seg::SS].selector, sel::USER_DATA);
    // SYSRETQ to a non-canonical address faults at CPL 0.
    let mut g = Guest::long(&[0x48, 0x0f, 0x07]).with(gpr::RCX, 1 << 47);
    g.expect_event(ex::GP, Some(0));
    // SYSCALL without EFER.SCE is #UD, and in compatibility mode on Intel always.
    let mut g = Guest::user(&[0x0f, 0x05]).patch(|g| g.vmcs.guest.efer &= !efer::SCE);
    g.expect_event(ex::UD, None);
    let mut g = Guest::user(&[0x0f, 0x05]).patch(|g| {
        let cs = &mut g.vmcs.guest.segments[seg::CS];
        (cs.access, cs.selector) = (AccessRights(0xc0fb), sel::USER_CODE32);
    });
    g.expect_event(ex::UD, None);
}

/// SYSENTER and SYSEXIT in 64-bit mode (SDM Vol. 2B).
#[test]
fn sysenter_and_sysexit() {
    let mut g = Guest::user(&[0x0f, 0x34]).patch(|g| {
        g.vmcs.guest.sysenter_cs = 0x50;
        g.vmcs.guest.sysenter_esp = STACK0;
        g.vmcs.guest.sysenter_eip = CODE + 0x100;
        g.vmcs.guest.rflags |= rflags::IF;
        g.write(CODE + 0x100, &[HLT]);
    });
    g.expect(R::Hlt);
    let s = &g.vmcs.guest;
    assert_eq!((s.rsp, s.rflags & rflags::IF), (STACK0, 0));
    assert_eq!((s.segments[seg::CS].selector, s.segments[seg::SS].selector), (0x50, 0x58));
    let mut g = Guest::user(&[0x0f, 0x34]);
    g.expect_event(ex::GP, Some(0));
    // sysexitq
    let mut g =
        Guest::long(&[0x48, 0x0f, 0x35]).with(gpr::RDX, CODE + 0x100).with(gpr::RCX, DATA).patch(|g| {
            g.vmcs.guest.sysenter_cs = 0x50;
            g.write(CODE + 0x100, &[0x0f, 0xa2]);
        });
    g.expect(R::Cpuid);
    let s = &g.vmcs.guest;
    assert_eq!((s.rip, s.rsp), (CODE + 0x100, DATA));
    assert_eq!((s.segments[seg::CS].selector, s.segments[seg::SS].selector), (0x73, 0x7b));
}

/// SWAPGS and WRFSBASE (SDM Vol. 2B).
#[test]
fn bases() {
    let mut g = Guest::long(&with_code(&[0x0f, 0x01, 0xf8])).patch(|g| {
        g.vmcs.guest.segments[seg::GS].base = 1;
        g.regs.msrs.kernel_gs_base = 2;
    });
    g.expect(R::Hlt);
    assert_eq!((g.vmcs.guest.segments[seg::GS].base, g.regs.msrs.kernel_gs_base), (2, 1));
    let wrfsbase = with_code(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]);
    Guest::long(&wrfsbase).expect_event(ex::UD, None);
    let fsgsbase = |g: &mut Guest| g.vmcs.guest.cr4 |= cr4::FSGSBASE;
    let mut g = Guest::long(&wrfsbase).with(gpr::RAX, 0xffff_8000_0000_0000).patch(fsgsbase);
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.segments[seg::FS].base, 0xffff_8000_0000_0000);
    let mut g = Guest::long(&wrfsbase).with(gpr::RAX, 1 << 47).patch(fsgsbase);
    g.expect_event(ex::GP, Some(0));
}

/// MSRs that the engine serves, with their checks (SDM Vol. 4, Vol. 3A §2.2.1, §12.12.2).
#[test]
fn msr_writes() {
    use x86_spec::msr;
    let write = |m: u32, value: u64| {
        Guest::long(&with_code(&[0x0f, 0x30]))
            .with(gpr::RCX, m as u64)
            .with(gpr::RAX, value & 0xffff_ffff)
            .with(gpr::RDX, value >> 32)
    };
    for (m, value) in [
        (msr::LSTAR, 1 << 47),
        (msr::KERNEL_GS_BASE, 1 << 63),
        (msr::FMASK, 1 << 32),
        (msr::IA32_PAT, 2),
        (msr::IA32_PAT, 8),
        (msr::EFER, 1 << 1),
        (msr::EFER, efer::SCE),
        (msr::IA32_SYSENTER_EIP, 1 << 47),
        (msr::IA32_TSC_AUX_MSR, 1 << 32),
        (0x123, 0),
    ] {
        write(m, value).expect_event(ex::GP, Some(0));
    }
    let mut g = write(msr::LSTAR, 0xffff_8000_1234_5678);
    g.expect(R::Hlt);
    assert_eq!(g.regs.msrs.lstar, 0xffff_8000_1234_5678);
    let mut g = write(msr::GS_BASE, 0x1234);
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.segments[seg::GS].base, 0x1234);
    // LMA can't be written.
    let mut g = write(msr::EFER, efer::LME | efer::NXE);
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.efer, efer::LME | efer::LMA | efer::NXE);
}

/// The MSR bitmap's four quarters (SDM Vol. 3C §25.6.9).
#[test]
fn msr_bitmap() {
    let run = |op: u8, m: u32, byte: u64, bit: u8| {
        let mut g = Guest::long(&with_code(&[0x0f, op])).with(gpr::RCX, m as u64);
        g.write(MSR_BITMAP + byte, &[1 << bit]);
        g.enter().reason
    };
    assert_eq!(run(0x32, 0x174, 0x174 / 8, 4), R::Rdmsr);
    assert_eq!(run(0x32, 0xc000_0082, 0x400 + 0x82 / 8, 2), R::Rdmsr);
    assert_eq!(run(0x30, 0x174, 0x800 + 0x174 / 8, 4), R::Wrmsr);
    assert_eq!(run(0x30, 0xc000_0082, 0xc00 + 0x82 / 8, 2), R::Wrmsr);
    assert_eq!(run(0x32, 0x174, 0x800 + 0x174 / 8, 4), R::Hlt);
    // Outside both ranges everything exits.
    assert_eq!(run(0x32, 0x4000_0000, 0, 0), R::Rdmsr);
}

/// I/O exits: qualification for immediate, DX and string forms (SDM Vol. 3C table 28-5).
#[test]
fn io_exits() {
    let mut g = Guest::long(&[0xe4, 0x71]);
    assert_eq!(g.expect(R::IoInstruction).qualification, io::qualification(0x71, 1, io::IN | io::IMMEDIATE));
    let mut g = Guest::long(&[0xef]).with(gpr::RDX, 0xcf8);
    assert_eq!(g.expect(R::IoInstruction).qualification, io::qualification(0xcf8, 4, 0));
    // rep outsw from fs:[rsi]
    let mut g = Guest::long(&[0xf3, 0x64, 0x66, 0x6f])
        .with(gpr::RDX, 0x3f8)
        .with(gpr::RCX, 5)
        .with(gpr::RSI, 0x10)
        .patch(|g| g.vmcs.guest.segments[seg::FS].base = DATA);
    let e = g.expect(R::IoInstruction);
    assert_eq!(e.qualification, io::qualification(0x3f8, 2, io::STRING | io::REP));
    assert_eq!(e.instruction_info, 2 << 7 | (seg::FS as u32) << 15);
    assert_eq!(e.guest_linear, DATA + 0x10);
    // A zero count does nothing.
    let mut g = Guest::long(&with_code(&[0xf3, 0x6f])).with(gpr::RCX, 0);
    g.expect(R::Hlt);
}

/// I/O bitmaps decide byte by byte (SDM Vol. 3C §25.6.4).
#[test]
fn io_bitmaps() {
    let run = |op: u8, port: u64, byte: u64, bit: u8| {
        let mut g = Guest::long(&with_code(&[op]))
            .with(gpr::RDX, port)
            .primary(PrimaryControls::USE_IO_BITMAPS)
            .patch(|g| g.write(IO_BITMAP + byte, &[1 << bit]));
        g.enter().reason
    };
    assert_eq!(run(0xec, 0x60, 0x60 / 8, 0), R::IoInstruction);
    assert_eq!(run(0xec, 0x61, 0x60 / 8, 0), R::Hlt);
    assert_eq!(run(0xed, 0x5d, 0x60 / 8, 0), R::IoInstruction);
    assert_eq!(run(0xec, 0x8001, 0x1000, 1), R::IoInstruction);
    assert_eq!(run(0xed, 0xffff, 0x100, 0), R::IoInstruction);
}

/// The TSS's I/O permission bitmap (SDM Vol. 1 §19.5.2), which comes before exits.
#[test]
fn io_permission_bitmap() {
    let run = |limit: u32, bits: u8| {
        let mut g = Guest::user(&[0xec]).with(gpr::RDX, 0x60).patch(|g| {
            g.write(TSS + 0x66, &0x68u16.to_le_bytes());
            g.write(TSS + 0x68 + 0x60 / 8, &[bits]);
            g.vmcs.guest.segments[seg::TR].limit = limit;
        });
        g.enter().reason
    };
    assert_eq!(run(0x100, 0), R::IoInstruction);
    assert_eq!(run(0x100, 1), R::Vmcall);
    assert_eq!(run(0x68 + 0x60 / 8, 0), R::Vmcall, "the second byte is beyond the limit");
}

struct Log(Vec<(bool, u16, u8, u32)>);
impl ExitBus for Log {
    fn mmio_read(&mut self, _: Gpa, _: u8) -> u64 {
        0
    }
    fn mmio_write(&mut self, _: Gpa, _: u8, _: u64) {}
    fn pio_read(&mut self, port: u16, size: u8) -> u32 {
        self.0.push((false, port, size, 0));
        0x1234_5678
    }
    fn pio_write(&mut self, port: u16, size: u8, value: u32) {
        self.0.push((true, port, size, value));
    }
}

/// `emulate` performs port accesses on the bus, string forms to their end.
#[test]
fn io_on_a_bus() {
    let mut bus = Log(vec![]);
    let mut g = Guest::long(&[0x66, 0xed]).with(gpr::RDX, 0x10).with(gpr::RAX, u64::MAX);
    assert_eq!(g.vcpu.emulate(&mut g.vmcs, &mut g.regs, &mut bus), None);
    assert_eq!(g.regs.gpr[gpr::RAX], 0xffff_ffff_ffff_5678);
    assert_eq!(g.vmcs.guest.rip, CODE + 2);
    // std; rep outsb, three bytes downwards
    let mut g =
        Guest::long(&[0xf3, 0x6e]).with(gpr::RDX, 0x10).with(gpr::RCX, 3).with(gpr::RSI, DATA + 2).patch(
            |g| {
                g.write(DATA, b"abc");
                g.vmcs.guest.rflags |= rflags::DF;
            },
        );
    bus.0.clear();
    assert_eq!(g.vcpu.emulate(&mut g.vmcs, &mut g.regs, &mut bus), None);
    assert_eq!(bus.0, [(true, 16, 1, b'c' as u32), (true, 16, 1, b'b' as u32), (true, 16, 1, b'a' as u32)]);
    assert_eq!((g.regs.gpr[gpr::RCX], g.regs.gpr[gpr::RSI]), (0, DATA - 1));
    assert_eq!(g.vmcs.guest.rip, CODE + 2);
    // insb to an unmapped page: the port isn't touched.
    let mut g = Guest::long(&[0x6c]).with(gpr::RDI, NOT_PRESENT);
    bus.0.clear();
    assert_eq!(g.vcpu.emulate(&mut g.vmcs, &mut g.regs, &mut bus), None);
    assert_eq!(g.vmcs.guest.rip, handler(ex::PF));
    assert!(bus.0.is_empty());
}

/// Single-step: a trap after each instruction, none after the one that sets TF
/// (SDM Vol. 3B §18.3.1.4).
#[test]
fn single_step() {
    // pushfq; or dword [rsp], 0x100; popfq; nop; nop
    let mut g = Guest::long(&[0x9c, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d, 0x90, 0x90]);
    g.expect_event(ex::DB, None);
    let rsp = g.vmcs.guest.rsp;
    assert_eq!(g.read64(rsp), CODE + 10, "after the first NOP");
    assert_ne!(g.read64(rsp + 16) & rflags::TF, 0);
    assert_eq!(g.regs.dr6, dr::DR6_FIXED1 | dr::DR6_BS);
    assert_eq!(g.vmcs.guest.rflags & rflags::TF, 0);
    // In the exception bitmap, DR6 stays and the qualification says BS.
    let mut g = Guest::long(&[0x90, 0x90]).patch(|g| {
        g.vmcs.guest.rflags |= rflags::TF;
        g.vmcs.controls.exception_bitmap = 1 << ex::DB;
    });
    let e = g.expect(R::ExceptionOrNmi);
    assert_eq!((e.qualification, g.regs.dr6, g.vmcs.guest.rip), (dr::DR6_BS, dr::DR6_FIXED1, CODE + 1));
}

/// MOV SS holds back single-step traps for one instruction (SDM Vol. 3A §6.8.3).
#[test]
fn mov_ss_shadow() {
    // mov ss, ax; nop; nop
    let mut g = Guest::long(&[0x8e, 0xd0, 0x90, 0x90])
        .with(gpr::RAX, sel::DATA as u64)
        .patch(|g| g.vmcs.guest.rflags |= rflags::TF);
    g.expect_event(ex::DB, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 3);
}

/// Instruction breakpoints are faults; RF suppresses one (SDM Vol. 3B §18.3.1.1).
#[test]
fn instruction_breakpoint() {
    let armed = |rf: u64| {
        Guest::long(&[0x90, 0x90, HLT]).patch(|g| {
            g.regs.dr[1] = CODE + 1;
            g.vmcs.guest.dr7 |= 1 << 2;
            g.vmcs.guest.rip = CODE + if rf == 0 { 0 } else { 1 };
            g.vmcs.guest.rflags |= rf;
        })
    };
    let mut g = armed(0);
    g.expect_event(ex::DB, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 1);
    assert_eq!(g.regs.dr6, dr::DR6_FIXED1 | 2);
    let mut g = armed(rflags::RF);
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.rflags & rflags::RF, 0);
}

/// Data breakpoints are traps after the access (SDM Vol. 3B §18.3.1.2).
#[test]
fn data_breakpoint() {
    // mov [rax], ecx; nop
    let run = |rw: u64, address: u64, code: &[u8]| {
        let mut g = Guest::long(&with_code(code)).with(gpr::RAX, DATA).patch(|g| {
            g.regs.dr[0] = address;
            // 4 bytes
            g.vmcs.guest.dr7 |= 1 | (rw | 3 << 2) << 16;
        });
        let exit = g.enter();
        (exit.reason, g)
    };
    let (reason, g) = run(1, DATA, &[0x89, 0x08, 0x90]);
    assert_eq!((reason, g.vmcs.guest.rip), (R::Vmcall, handler(ex::DB)));
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 2);
    assert_eq!(g.regs.dr6, dr::DR6_FIXED1 | 1);
    // A read doesn't hit a write breakpoint but a read/write one; a miss is a miss.
    assert_eq!(run(1, DATA, &[0x8b, 0x08, 0x90]).0, R::Hlt);
    assert_eq!(run(3, DATA, &[0x8b, 0x08, 0x90]).0, R::Vmcall);
    assert_eq!(run(3, DATA + 4, &[0x8b, 0x08, 0x90]).0, R::Hlt);
}

/// Interrupt-window exits: IF and no shadow (SDM Vol. 3C §26.2).
#[test]
fn interrupt_window() {
    // sti; nop; nop
    let mut g = Guest::long(&[0xfb, 0x90, 0x90, HLT]).primary(PrimaryControls::INTERRUPT_WINDOW_EXITING);
    g.expect(R::InterruptWindow);
    assert_eq!(g.vmcs.guest.rip, CODE + 2, "STI blocks for one instruction");
    let mut g = Guest::long(&[0x90, HLT])
        .primary(PrimaryControls::INTERRUPT_WINDOW_EXITING)
        .patch(|g| g.vmcs.guest.rflags |= rflags::IF);
    g.expect(R::InterruptWindow);
    assert_eq!(g.vmcs.guest.rip, CODE, "open at entry");
}

/// The STI shadow is in the VMCS when the next instruction exits (SDM Vol. 3C table 25-3).
#[test]
fn sti_hlt() {
    let mut g = Guest::long(&[0xfb, HLT]);
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.interruptibility, interruptibility::STI);
    let mut g = Guest::long(&[0xfb, 0x90, HLT]);
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.interruptibility, 0);
}

/// NMI-window exits wait for IRET (SDM Vol. 3C §26.2).
#[test]
fn nmi_window() {
    let mut g = Guest::long(&[HLT]).primary(PrimaryControls::NMI_WINDOW_EXITING);
    g.expect(R::NmiWindow);
    let mut g = Guest::long(&[HLT])
        .primary(PrimaryControls::NMI_WINDOW_EXITING)
        .patch(|g| g.vmcs.guest.interruptibility = interruptibility::NMI);
    g.expect(R::Hlt);
}

/// MTF: an exit after each instruction and after an injected event (SDM Vol. 3C §26.5.2).
#[test]
fn monitor_trap_flag() {
    let mut g = Guest::long(&[0x90, 0x90]).primary(PrimaryControls::MONITOR_TRAP_FLAG);
    for n in 1..=2 {
        g.expect(R::MonitorTrapFlag);
        assert_eq!(g.vmcs.guest.rip, CODE + n);
    }
    g.vmcs.controls.entry_interruption = InterruptionInfo::new(0x40, EventType::External, false);
    g.expect(R::MonitorTrapFlag);
    assert_eq!(g.vmcs.guest.rip, handler(0x40));
}

/// The preemption timer ends an endless loop; at 0 it exits before any instruction
/// (SDM Vol. 3C §26.5.1).
#[test]
fn preemption_timer() {
    let timer = |value| {
        Guest::long(&[0xeb, 0xfe]).patch(|g| {
            g.vmcs.controls.pin |= PinbasedControls::VMX_PREEMPTION_TIMER;
            g.vmcs.guest.preemption_timer = value;
        })
    };
    timer(1000).expect(R::PreemptionTimer);
    timer(0).expect(R::PreemptionTimer);
    // Inactive guests too.
    let mut g = timer(1000).patch(|g| g.vmcs.guest.activity = Activity::Hlt);
    g.expect(R::PreemptionTimer);
    assert_eq!(g.vmcs.guest.activity, Activity::Hlt);
}

/// A kick is an external-interrupt exit, also with IF clear.
#[test]
fn kick() {
    let mut g = Guest::long(&[0xeb, 0xfe]);
    g.vcpu.kicker().kick();
    g.expect(R::ExternalInterrupt);
    assert_eq!(g.vmcs.guest.rip, CODE);
}

/// TPR shadow: MOV CR8 goes to VTPR, and below the threshold exits after it completed
/// (SDM Vol. 3C §30.1.2, §30.3).
#[test]
fn tpr_shadow() {
    // mov cr8, rax; mov rbx, cr8; hlt
    let bytes = with_code(&[0x44, 0x0f, 0x22, 0xc0, 0x44, 0x0f, 0x20, 0xc3]);
    let mut g = Guest::long(&bytes).with(gpr::RAX, 5).primary(PrimaryControls::USE_TPR_SHADOW);
    g.expect(R::Hlt);
    assert_eq!(g.regs.gpr[gpr::RBX], 5);
    assert_eq!(g.read32(VIRTUAL_APIC + 0x80), 0x50);
    let mut g = Guest::long(&bytes).with(gpr::RAX, 2).primary(PrimaryControls::USE_TPR_SHADOW).patch(|g| {
        g.write(VIRTUAL_APIC + 0x80, &[0x40]);
        g.vmcs.controls.tpr_threshold = 3;
    });
    g.expect(R::TprBelowThreshold);
    assert_eq!(g.vmcs.guest.rip, CODE + 4);
    // At entry.
    g.expect(R::TprBelowThreshold);
    assert_eq!(g.vmcs.guest.rip, CODE + 4);
}

/// Descriptor-table exiting: which instruction and operand (SDM Vol. 3C tables 28-11, 28-12).
#[test]
fn descriptor_table_exiting() {
    let run = |bytes: &[u8]| {
        let mut g = Guest::long(bytes).with(gpr::RAX, DATA).secondary(SecondaryControls::DTABLE_EXITING);
        g.enter()
    };
    for (modrm, identity) in [(0x00, 0), (0x08, 1), (0x10, 2), (0x18, 3)] {
        let e = run(&[0x0f, 0x01, modrm]);
        assert_eq!((e.reason, e.instruction_info >> 28 & 3), (R::GdtrIdtrAccess, identity));
    }
    for (modrm, identity) in [(0xc0, 0), (0xc8, 1), (0xd0, 2), (0xd8, 3)] {
        let e = run(&[0x0f, 0x00, modrm]);
        assert_eq!((e.reason, e.instruction_info >> 28 & 3), (R::LdtrTrAccess, identity));
        assert_ne!(e.instruction_info & 1 << 10, 0, "register operand");
    }
}

/// LGDT in 64-bit mode loads ten bytes; UMIP keeps SGDT from user mode (SDM Vol. 2).
#[test]
fn descriptor_table_registers() {
    let mut g = Guest::long(&with_code(&[0x0f, 0x01, 0x10])).with(gpr::RAX, DATA).patch(|g| {
        g.write(DATA, &[0x34, 0x12]);
        g.write64(DATA + 2, 0xffff_8000_0000_1000);
    });
    g.expect(R::Hlt);
    assert_eq!((g.vmcs.guest.gdtr.base, g.vmcs.guest.gdtr.limit), (0xffff_8000_0000_1000, 0x1234));
    let mut g = Guest::user(&[0x0f, 0x01, 0x00]).with(gpr::RAX, DATA);
    g.vmcs.guest.cr4 |= cr4::UMIP;
    g.expect_event(ex::GP, Some(0));
}

/// LTR reads a 16-byte descriptor and sets its busy bit (SDM Vol. 2A).
#[test]
fn ltr() {
    let mut g = Guest::long(&with_code(&[0x0f, 0x00, 0xd8])).with(gpr::RAX, sel::FREE as u64).patch(|g| {
        g.write64(GDT + sel::FREE as u64, 0x1200_8934_5678_0067);
        g.write64(GDT + sel::FREE as u64 + 8, 0xffff_8000);
    });
    g.expect(R::Hlt);
    let tr = g.vmcs.guest.segments[seg::TR];
    assert_eq!((tr.base, tr.limit, tr.access.ty()), (0xffff_8000_1234_5678, 0x67, 11));
    assert_eq!(g.read64(GDT + sel::FREE as u64) >> 40 & 0xff, 0x8b);
    // A busy one is #GP(selector).
    let mut g = Guest::long(&[0x0f, 0x00, 0xd8]).with(gpr::RAX, sel::TSS as u64);
    g.expect_event(ex::GP, Some(sel::TSS as u32));
}

/// Loading data segments (SDM Vol. 2B, MOV; Vol. 3A §5.4).
#[test]
fn data_segment_loads() {
    // mov ds, ax; hlt
    let load = |g: Guest, selector: u16| g.with(gpr::RAX, selector as u64);
    let bytes = with_code(&[0x8e, 0xd8]);
    let mut g = load(Guest::long(&bytes), 0);
    g.expect(R::Hlt);
    assert!(g.vmcs.guest.segments[seg::DS].access.unusable());
    // Not present, system descriptor, beyond the limit, privilege.
    let mut g = load(Guest::long(&bytes), sel::FREE).patch(|g| {
        g.write64(GDT + sel::FREE as u64, 0x00cf_1300_0000_ffff);
    });
    g.expect_event(ex::NP, Some(sel::FREE as u32));
    load(Guest::long(&bytes), sel::TSS).expect_event(ex::GP, Some(sel::TSS as u32));
    load(Guest::long(&bytes), 0x108).expect_event(ex::GP, Some(0x108));
    load(Guest::user(&bytes), sel::DATA).expect_event(ex::GP, Some(sel::DATA as u32));
    // The accessed bit is set in memory.
    let mut g = load(Guest::long(&bytes), sel::FREE).patch(|g| {
        g.write64(GDT + sel::FREE as u64, 0x00cf_9200_0000_ffff);
    });
    g.expect(R::Hlt);
    assert_eq!(g.read64(GDT + sel::FREE as u64) >> 40 & 0xff, 0x93);
    // mov ss, ax with a null selector: allowed at CPL 0, not at CPL 3.
    let ss = with_code(&[0x8e, 0xd0]);
    load(Guest::long(&ss), 0).expect(R::Hlt);
    load(Guest::user(&ss), 3).expect_event(ex::GP, Some(0));
    // SS not present is #SS.
    let mut g = load(Guest::long(&ss), sel::FREE).patch(|g| {
        g.write64(GDT + sel::FREE as u64, 0x00cf_1300_0000_ffff);
    });
    g.expect_event(ex::SS, Some(sel::FREE as u32));
}

/// LAR, LSL, VERR and VERW (SDM Vol. 2).
#[test]
fn access_checks() {
    // lar ecx, ax; setz bl; lsl edx, ax; hlt
    let bytes = with_code(&[0x0f, 0x02, 0xc8, 0x0f, 0x94, 0xc3, 0x0f, 0x03, 0xd0]);
    let mut g = Guest::long(&bytes).with(gpr::RAX, sel::DATA as u64);
    g.expect(R::Hlt);
    assert_eq!(g.regs.gpr[gpr::RCX], 0x00cf_9300);
    assert_eq!(g.regs.gpr[gpr::RBX] & 1, 1);
    assert_eq!(g.regs.gpr[gpr::RDX], 0xffff_ffff);
    // Invisible at CPL 3.
    let mut g = Guest::user(&[0x0f, 0x02, 0xc8, 0x0f, 0x94, 0xc3, 0x0f, 0xa2])
        .with(gpr::RAX, sel::DATA as u64)
        .with(gpr::RCX, 7);
    g.expect(R::Cpuid);
    assert_eq!((g.regs.gpr[gpr::RCX], g.regs.gpr[gpr::RBX] & 1), (7, 0));
    // verw ax of a code segment clears ZF, verr sets it.
    for (modrm, zf) in [(0xe0, 1), (0xe8, 0)] {
        let mut g = Guest::long(&with_code(&[0x0f, 0x00, modrm, 0x0f, 0x94, 0xc3]))
            .with(gpr::RAX, sel::CODE64 as u64);
        g.expect(R::Hlt);
        assert_eq!(g.regs.gpr[gpr::RBX] & 1, zf);
    }
}

/// Far jumps between 64-bit and compatibility mode, and what they refuse (SDM Vol. 2A, JMP).
#[test]
fn far_jump() {
    // jmp far [rax] (m16:32)
    let to = |selector: u16| {
        Guest::long(&[0xff, 0x28]).with(gpr::RAX, DATA).patch(|g| {
            g.write(DATA, &((CODE + 0x100) as u32).to_le_bytes());
            g.write(DATA + 4, &selector.to_le_bytes());
            g.write(CODE + 0x100, &[0x0f, 0xa2]);
        })
    };
    let mut g = to(sel::CODE32);
    g.expect(R::Cpuid);
    assert_eq!(g.vmcs.guest.rip, CODE + 0x100);
    assert!(!g.vmcs.guest.segments[seg::CS].access.long());
    to(0).expect_event(ex::GP, Some(0));
    to(sel::DATA).expect_event(ex::GP, Some(sel::DATA as u32));
    to(sel::USER_CODE64).expect_event(ex::GP, Some(sel::USER_CODE64 as u32 & !3));
    // A TSS in IA-32e mode is #GP, no task switch.
    to(sel::TSS).expect_event(ex::GP, Some(sel::TSS as u32));
}

/// A call through a 64-bit gate switches to RSP0 and far return goes back (SDM Vol. 3A §5.8.3.1).
#[test]
fn call_gate_64() {
    // call far [rax]; cpuid
    let mut g = Guest::user(&[0xff, 0x18, 0x0f, 0xa2]).with(gpr::RAX, DATA).patch(|g| {
        let target = CODE + 0x100;
        let gate = target & 0xffff | (sel::CODE64 as u64) << 16 | 0xec << 40 | target >> 16 << 48;
        g.write64(GDT + sel::FREE as u64, gate);
        g.write64(GDT + sel::FREE as u64 + 8, 0);
        g.write(DATA + 4, &(sel::FREE | 3).to_le_bytes());
        // mov rbx, rsp; retfq
        g.write(target, &[0x48, 0x89, 0xe3, 0x48, 0xcb]);
    });
    g.expect(R::Cpuid);
    assert_eq!(g.regs.gpr[gpr::RBX], STACK0 - 32);
    assert_eq!(g.read64(STACK0 - 32), CODE + 2);
    assert_eq!(g.read64(STACK0 - 24), sel::USER_CODE64 as u64);
    assert_eq!(g.read64(STACK0 - 16), STACK);
    assert_eq!(g.read64(STACK0 - 8), sel::USER_DATA as u64);
    let s = &g.vmcs.guest;
    assert_eq!((s.rip, s.rsp, s.segments[seg::SS].selector), (CODE + 2, STACK, sel::USER_DATA));
}

/// POPF: which bits change at which privilege (SDM Vol. 2B table 4-16).
#[test]
fn popf() {
    let all = rflags::IF | rflags::IOPL | rflags::AC | rflags::NT | rflags::ID | rflags::CF;
    let bytes = [0x9d, 0x0f, 0xa2];
    let mut g = Guest::long(&bytes).patch(|g| g.write64(STACK, all));
    g.expect(R::Cpuid);
    assert_eq!(g.vmcs.guest.rflags, all | rflags::FIXED1);
    // CPL 3: IOPL never, IF only with IOPL 3.
    let mut g = Guest::user(&bytes).patch(|g| g.write64(STACK, all));
    g.expect(R::Cpuid);
    assert_eq!(g.vmcs.guest.rflags, all & !(rflags::IF | rflags::IOPL) | rflags::FIXED1);
    // popfw leaves the upper half.
    let mut g = Guest::long(&[0x66, 0x9d, 0x0f, 0xa2]).patch(|g| g.write64(STACK, all));
    g.expect(R::Cpuid);
    assert_eq!(g.vmcs.guest.rflags, all & 0xffff | rflags::FIXED1);
}

/// INVPCID checks (SDM Vol. 2A).
#[test]
fn invpcid() {
    // invpcid rcx, [rax]
    let run = |kind: u64, low: u64, high: u64| {
        let mut g = Guest::long(&with_code(&[0x66, 0x0f, 0x38, 0x82, 0x08]))
            .with(gpr::RAX, DATA)
            .with(gpr::RCX, kind);
        g.write64(DATA, low);
        g.write64(DATA + 8, high);
        g.enter().reason
    };
    assert_eq!(run(0, 0, DATA), R::Hlt);
    assert_eq!(run(2, 0, 0), R::Hlt);
    assert_eq!(run(0, 0, 1 << 47), R::Vmcall, "not canonical");
    assert_eq!(run(1, 5, 0), R::Vmcall, "a PCID without CR4.PCIDE");
    assert_eq!(run(0, 1 << 12, 0), R::Vmcall, "reserved bits");
    assert_eq!(run(4, 0, 0), R::Vmcall);
}

/// RDTSC: offset and multiplier (SDM Vol. 3C §25.3), TSD, RDTSCP's enable.
#[test]
fn tsc() {
    let bytes = with_code(&[0x0f, 0x31]);
    let mut g = Guest::long(&bytes).primary(PrimaryControls::USE_TSC_OFFSETTING);
    let before = super::capabilities::host_tsc();
    g.vmcs.controls.tsc_offset = before.wrapping_neg();
    g.expect(R::Hlt);
    let elapsed = super::capabilities::host_tsc() - before;
    let seen = g.regs.gpr[gpr::RDX] << 32 | g.regs.gpr[gpr::RAX];
    assert!(seen <= elapsed, "{seen} {elapsed}");
    // Multiplier 0.5.
    let mut g = Guest::long(&bytes)
        .primary(PrimaryControls::USE_TSC_OFFSETTING)
        .secondary(SecondaryControls::USE_TSC_SCALING);
    g.vmcs.controls.tsc_multiplier = 1 << 47;
    let low = super::capabilities::host_tsc() / 2;
    g.expect(R::Hlt);
    let seen = g.regs.gpr[gpr::RDX] << 32 | g.regs.gpr[gpr::RAX];
    assert!((low..=super::capabilities::host_tsc() / 2).contains(&seen));
    let mut g = Guest::user(&bytes).patch(|g| g.vmcs.guest.cr4 |= cr4::TSD);
    g.expect_event(ex::GP, Some(0));
    let mut g = Guest::long(&[0x0f, 0x01, 0xf9]);
    g.vmcs.controls.secondary -= SecondaryControls::ENABLE_RDTSCP;
    g.expect_event(ex::UD, None);
}

/// Real mode: IVT, six-byte frame, no error code (SDM Vol. 3B §21.1.4).
#[test]
fn real_mode_interrupt() {
    let mut g = Guest::real(&[0xcd, 0x21]).patch(|g| g.vmcs.guest.rflags |= rflags::IF);
    g.expect_event(0x21, None);
    let s = &g.vmcs.guest;
    assert_eq!((s.rsp, s.rflags & rflags::IF), (0x8000 - 6, 0));
    let at = 0x1_0000 + 0x8000 - 6;
    assert_eq!(g.read16(at), 2);
    assert_eq!(g.read16(at + 2), (CODE >> 4) as u16);
    assert_eq!(g.read16(at + 4), 0x202);
}

/// Real-mode far transfers keep limits; entering protected mode and 64-bit mode by hand
/// (SDM Vol. 3A §9.9).
#[test]
fn real_to_protected_mode() {
    // lgdt [0]; mov eax, cr0; or al, 1; mov cr0, eax; jmp dword CODE32:CODE+0x100
    let mut code = vec![0x0f, 0x01, 0x16, 0, 0, 0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0];
    code.extend([0x66, 0xea]);
    code.extend(((CODE + 0x100) as u32).to_le_bytes());
    code.extend(sel::CODE32.to_le_bytes());
    let mut g = Guest::real(&code).patch(|g| {
        g.write(0x1_0000, &[0xff, 0]);
        g.write(0x1_0002, &(GDT as u32).to_le_bytes());
        g.write64(GDT + sel::CODE32 as u64, 0x00cf_9b00_0000_ffff);
        g.write64(GDT + sel::DATA as u64, 0x00cf_9300_0000_ffff);
        // mov eax, DATA; mov ds, eax; mov eax, [0x40000]; hlt
        let mut p = vec![0xb8];
        p.extend((sel::DATA as u32).to_le_bytes());
        p.extend([0x8e, 0xd8, 0xa1]);
        p.extend((CODE as u32).to_le_bytes());
        p.push(HLT);
        g.write(CODE + 0x100, &p);
    });
    g.expect(R::Hlt);
    assert_eq!(g.regs.gpr[gpr::RAX] as u32, 0x0016_010f);
    assert_eq!(g.vmcs.guest.segments[seg::DS].base, 0);
    assert!(!g.vmcs.controls.entry.contains(EntryControls::IA32E_MODE_GUEST));
}

/// 32-bit protected mode: frames of fault and inter-privilege interrupt (SDM Vol. 3A §6.12.1).
#[test]
fn protected_mode_frames() {
    let mut g = Guest::protected(&[0x0f, 0x0b]);
    g.expect_event(ex::UD, None);
    let rsp = g.vmcs.guest.rsp;
    assert_eq!(rsp, STACK - 12);
    assert_eq!(g.read32(rsp) as u64, CODE);
    assert_eq!(g.read32(rsp + 4), sel::CODE32 as u32);
    assert_ne!(g.read32(rsp + 8) & rflags::RF as u32, 0);
    let user = |bytes: &[u8]| {
        Guest::protected(bytes).patch(|g| {
            for s in &mut g.vmcs.guest.segments[..6] {
                (s.selector, s.access) = (sel::USER_DATA, AccessRights(0xc0f3));
            }
            let cs = &mut g.vmcs.guest.segments[seg::CS];
            (cs.selector, cs.access) = (sel::USER_CODE32, AccessRights(0xc0fb));
        })
    };
    let mut g = user(&[0xcd, 0x80]).patch(|g| g.gate32(0x80, 0xee, sel::CODE32, handler(0x80) as u32));
    g.expect_event(0x80, None);
    let rsp = g.vmcs.guest.rsp;
    assert_eq!(rsp, STACK0 - 20);
    let frame: Vec<u32> = (0..5).map(|n| g.read32(rsp + n * 4)).collect();
    assert_eq!(frame, [CODE as u32 + 2, sel::USER_CODE32 as u32, 2, STACK as u32, sel::USER_DATA as u32]);
    // And IRETD back.
    g.write(handler(0x80), &[0xcf]);
    g.write(CODE + 2, &[0x0f, 0xa2]);
    g.vmcs.guest.rip = handler(0x80);
    g.expect(R::Cpuid);
    let s = &g.vmcs.guest;
    assert_eq!((s.rip, s.rsp), (CODE + 2, STACK));
    assert_eq!(s.segments[seg::SS].access.dpl(), 3);
}

/// Call gate with parameters: they are copied to the inner stack (SDM Vol. 3A §5.8.5).
#[test]
fn call_gate_copies_parameters() {
    // lcall FREE|3:0
    let mut code = vec![0x9a, 0, 0, 0, 0];
    code.extend((sel::FREE | 3).to_le_bytes());
    let mut g = Guest::protected(&code).patch(|g| {
        for s in &mut g.vmcs.guest.segments[..6] {
            (s.selector, s.access) = (sel::USER_DATA, AccessRights(0xc0f3));
        }
        let cs = &mut g.vmcs.guest.segments[seg::CS];
        (cs.selector, cs.access) = (sel::USER_CODE32, AccessRights(0xc0fb));
        let target = CODE + 0x100;
        let gate = target & 0xffff | (sel::CODE32 as u64) << 16 | 2 << 32 | 0xec << 40 | target >> 16 << 48;
        g.write64(GDT + sel::FREE as u64, gate);
        g.write64(STACK, 0x2222_2222_1111_1111);
        g.write(target, &[HLT]);
    });
    g.expect(R::Hlt);
    let rsp = g.vmcs.guest.rsp;
    assert_eq!(rsp, STACK0 - 24);
    let frame: Vec<u32> = (0..6).map(|n| g.read32(rsp + n * 4)).collect();
    assert_eq!(
        frame,
        [
            CODE as u32 + 7,
            sel::USER_CODE32 as u32,
            0x1111_1111,
            0x2222_2222,
            STACK as u32,
            sel::USER_DATA as u32
        ]
    );
}

/// Task switches exit with selector and source (SDM Vol. 3C §26.4.2, table 28-2).
#[test]
fn task_switch_exits() {
    let available = |g: &mut Guest| g.write64(GDT + sel::FREE as u64, 0x0000_8902_3000_0067);
    let mut code = vec![0xea, 0, 0, 0, 0];
    code.extend(sel::FREE.to_le_bytes());
    let mut g = Guest::protected(&code).patch(available);
    let e = g.expect(R::TaskSwitch);
    assert_eq!((e.qualification, e.instruction_length), (sel::FREE as u64 | 2 << 30, 7));
    code[0] = 0x9a;
    let mut g = Guest::protected(&code).patch(available);
    assert_eq!(g.expect(R::TaskSwitch).qualification, sel::FREE as u64);
    // Through a task gate in the IDT, with IDT-vectoring information.
    let mut g = Guest::protected(&[0x0f, 0x0b]).patch(available).patch(|g| {
        g.gate32(ex::UD, 0x85, sel::FREE, 0);
    });
    let e = g.expect(R::TaskSwitch);
    assert_eq!(e.qualification, sel::FREE as u64 | 3 << 30);
    assert_eq!(e.idt_vectoring, InterruptionInfo::new(ex::UD, EventType::HardwareException, false));
    // IRET with NT: the busy TSS that the present one links to.
    let mut g = Guest::protected(&[0xcf]).patch(|g| {
        g.vmcs.guest.rflags |= rflags::NT;
        g.write(TSS, &sel::FREE.to_le_bytes());
        g.write64(GDT + sel::FREE as u64, 0x0000_8b02_3000_0067);
    });
    assert_eq!(g.expect(R::TaskSwitch).qualification, sel::FREE as u64 | 1 << 30);
}

/// Virtual-8086 mode: entered by IRETD, left by an interrupt that pushes all data
/// segments (SDM Vol. 3B §21.2.5, §21.3.1).
#[test]
fn virtual_8086_round_trip() {
    let mut g = Guest::protected(&[0xcf]).with(gpr::RSP, STACK - 36).patch(|g| {
        let flags = 0x202 | rflags::VM as u32 | 3 << 12;
        let frame = [0x10, (CODE >> 4) as u32, flags, 0x100, 0x2000, 1, 2, 3, 4];
        for (n, v) in frame.iter().enumerate() {
            g.write(STACK - 36 + n as u64 * 4, &v.to_le_bytes());
        }
        // int 0x21 with IOPL 3
        g.write(CODE + 0x10, &[0xcd, 0x21]);
        g.gate32(0x21, 0xee, sel::CODE32, handler(0x21) as u32);
    });
    g.expect_event(0x21, None);
    let rsp = g.vmcs.guest.rsp;
    assert_eq!(rsp, STACK0 - 36);
    let frame: Vec<u32> = (0..9).map(|n| g.read32(rsp + n * 4)).collect();
    let flags = 0x3202 | rflags::VM as u32;
    assert_eq!(frame, [0x12, (CODE >> 4) as u32, flags, 0x100, 0x2000, 1, 2, 3, 4]);
    assert_eq!(g.vmcs.guest.rflags & rflags::VM, 0);
    assert!(g.vmcs.guest.segments[seg::DS].access.unusable());
    // With IOPL 0 INT n is #GP(0).
    let mut g = Guest::protected(&[0xcf]).with(gpr::RSP, STACK - 36).patch(|g| {
        let frame = [0x10, (CODE >> 4) as u32, 0x202 | rflags::VM as u32, 0x100, 0x2000, 0, 0, 0, 0];
        for (n, v) in frame.iter().enumerate() {
            g.write(STACK - 36 + n as u64 * 4, &v.to_le_bytes());
        }
        g.write(CODE + 0x10, &[0xcd, 0x21]);
    });
    g.expect_event(ex::GP, Some(0));
}

/// Offset of the software-interrupt redirection bitmap in the TSS of [`virtual_8086`].
const REDIRECTION: u64 = 0x68;

/// Virtual-8086 mode at [`CODE`] with SS = 0, SP = 8000H, RFLAGS = `flags` and CR4.VME. The
/// redirection bitmap is all ones, the I/O permission bitmap follows it, and the 8086 program's
/// handlers (all vectors of the table at address 0) are at 3000:vector * 16.
fn virtual_8086(bytes: &[u8], flags: u64) -> Guest {
    Guest::protected(bytes).patch(|g| {
        for index in 0..6 {
            g.vmcs.guest.segments[index] =
                Segment { base: 0, limit: 0xffff, access: AccessRights(0xf3), selector: 0 };
        }
        let cs = &mut g.vmcs.guest.segments[seg::CS];
        (cs.base, cs.selector) = (CODE, (CODE >> 4) as u16);
        g.vmcs.guest.rip = 0;
        g.vmcs.guest.rsp = 0x8000;
        g.vmcs.guest.rflags = flags | rflags::FIXED1 | rflags::VM;
        g.vmcs.guest.cr4 |= cr4::VME;
        g.vmcs.guest.segments[seg::TR].limit = 0x8f;
        g.write(TSS + 0x66, &(REDIRECTION as u16 + 32).to_le_bytes());
        g.write(TSS + REDIRECTION, &[0xff; 32]);
        for v in 0..=255u32 {
            g.write(v as u64 * 4, &(0x3000_0000 + v * 16).to_le_bytes());
        }
    })
}

/// CLI and STI below IOPL (SDM Vol. 2A table 3-7 and Vol. 2B, STI): with CR4.VME in virtual-8086
/// mode and CR4.PVI at CPL 3 of protected mode they change VIF, and STI is #GP(0) with VIP.
#[test]
fn cli_and_sti_on_the_virtual_interrupt_flag() {
    use rflags::{IF, IOPL, VIF, VIP};
    const CLI: u8 = 0xfa;
    const STI: u8 = 0xfb;
    // (CR4, instruction, flags before, flags after or None for #GP(0))
    let rows = |extension: u64| {
        [
            (extension, STI, IF, Some(IF | VIF)),
            (extension, STI, 0, Some(VIF)),
            (extension, STI, VIP, None),
            (extension, STI, 1 << 12 | VIF | VIP, None),
            (extension, CLI, IF | VIF, Some(IF)),
            (extension, CLI, IF | VIF | VIP, Some(IF | VIP)),
            (extension, STI, IOPL | VIP, Some(IOPL | VIP | IF)),
            (extension, CLI, IOPL | IF | VIF, Some(IOPL | VIF)),
            (extension ^ (cr4::VME | cr4::PVI), STI, 0, None),
            (extension ^ (cr4::VME | cr4::PVI), CLI, VIF, None),
        ]
    };
    let run = |mut g: Guest, cr4: u64, after: Option<u64>, what: String| {
        g.vmcs.guest.cr4 = g.vmcs.guest.cr4 & !(cr4::VME | cr4::PVI) | cr4;
        let before = g.vmcs.guest.rflags;
        let (exit, s) = (g.enter(), &g.vmcs.guest);
        match after {
            Some(flags) => {
                let mode = before & (rflags::FIXED1 | rflags::VM);
                assert_eq!((exit.reason, s.rflags), (R::Cpuid, flags | mode), "{what}");
                let shadow = s.interruptibility & interruptibility::STI != 0;
                assert_eq!(shadow, !before & flags & IF != 0, "only IF has a shadow: {what}");
            }
            None => assert_eq!((exit.reason, s.rip), (R::Vmcall, handler(ex::GP)), "{what}"),
        }
    };
    for (cr4, opcode, before, after) in rows(cr4::VME) {
        let g = virtual_8086(&[opcode, 0x0f, 0xa2], before);
        run(g, cr4, after, format!("v8086 {opcode:x} {before:x}"));
    }
    for (cr4, opcode, before, after) in rows(cr4::PVI) {
        let g = Guest::user(&[opcode, 0x0f, 0xa2]).patch(|g| g.vmcs.guest.rflags |= before);
        run(g, cr4, after, format!("CPL 3 {opcode:x} {before:x}"));
    }
    // PVI is for CPL 3 only (SDM Vol. 3B §21.4): at CPL 1 it's #GP(0).
    let mut g = Guest::protected(&[STI]).patch(|g| {
        let s = &mut g.vmcs.guest;
        s.cr4 |= cr4::PVI;
        for (index, access) in [(seg::CS, 0xc0bb), (seg::SS, 0xc0b3)] {
            s.segments[index].access = AccessRights(access);
            s.segments[index].selector |= 1;
        }
    });
    g.expect_event(ex::GP, Some(0));
}

/// PUSHF, POPF and IRET in virtual-8086 mode with IOPL below 3 (SDM Vol. 2B, PUSHF and table
/// 4-16): 16-bit forms have VIF in place of IF with CR4.VME, everything else is #GP(0).
#[test]
fn virtual_8086_flag_images() {
    use rflags::{CF, DF, IF, IOPL, NT, TF, VIF, VIP, VM};
    for (flags, image) in [(IF, IOPL), (VIF, IOPL | IF), (IF | VIF | VIP | CF, IOPL | IF | CF)] {
        let mut g = virtual_8086(&[0x9c, 0x0f, 0xa2], flags);
        g.expect(R::Cpuid);
        assert_eq!(g.read16(0x7ffe) as u64, image | rflags::FIXED1, "pushf {flags:x}");
    }
    // (flags before, popped image, flags after or None for #GP(0)); bit 1 and VM aside
    let rows = [
        (0, IF | CF, Some(VIF | CF)),
        (IF | VIF, CF, Some(IF | CF)),
        (IF | 1 << 12, IOPL | NT | DF, Some(IF | 1 << 12 | NT | DF)),
        (VIP, CF, Some(VIP | CF)),
        (VIP | VIF, CF, Some(VIP | CF)),
        (VIP, IF, None),
        (0, TF, None),
    ];
    for (before, image, after) in rows {
        // popf; and iret to the instruction behind it
        for (bytes, stack) in
            [(&[0x9d, 0x0f, 0xa2], vec![]), (&[0xcf, 0x0f, 0xa2], vec![1, (CODE >> 4) as u16])]
        {
            let mut g = virtual_8086(bytes, before);
            for (n, word) in stack.iter().chain([&(image as u16)]).enumerate() {
                g.write(0x8000 + n as u64 * 2, &word.to_le_bytes());
            }
            let (exit, s) = (g.enter(), &g.vmcs.guest);
            match after {
                Some(flags) => {
                    let expected = (R::Cpuid, flags | rflags::FIXED1 | VM, 0x8002 + stack.len() as u64 * 2);
                    assert_eq!((exit.reason, s.rflags, s.rsp), expected, "{bytes:x?} {before:x} {image:x}");
                }
                None => {
                    assert_eq!((exit.reason, s.rip), (R::Vmcall, handler(ex::GP)), "{bytes:x?} {image:x}");
                    let (rsp, flags) = (g.read32(s.rsp + 16), g.read32(s.rsp + 12) as u64);
                    assert_eq!((rsp, flags & (VIF | IF)), (0x8000, before & (VIF | IF)), "nothing changed");
                }
            }
        }
    }
    // Operands of 32 bits, and 16-bit ones without VME.
    for bytes in [&[0x66, 0x9c][..], &[0x66, 0x9d], &[0x66, 0xcf]] {
        virtual_8086(bytes, 0).expect_event(ex::GP, Some(0));
    }
    for bytes in [[0x9c], [0x9d], [0xcf]] {
        virtual_8086(&bytes, 0).patch(|g| g.vmcs.guest.cr4 = 0).expect_event(ex::GP, Some(0));
    }
    // With IOPL 3, VME changes nothing: IF is IF.
    let mut g = virtual_8086(&[0x9c, 0x0f, 0xa2], IOPL | VIF);
    g.expect(R::Cpuid);
    assert_eq!(g.read16(0x7ffe) as u64, IOPL | rflags::FIXED1);
}

/// The methods of handling INT n in virtual-8086 mode (SDM Vol. 3B table 21-2).
#[test]
fn virtual_8086_software_interrupts() {
    use rflags::{IF, IOPL, TF, VIF, VIP};
    #[derive(Debug, PartialEq)]
    enum Handler {
        /// Of the monitor, through the IDT.
        Protected,
        GeneralProtection,
        /// Of the 8086 program: the FLAGS image pushed, RFLAGS there.
        Program(u64, u64),
    }
    use Handler::{GeneralProtection, Program, Protected};
    let vectors: [u8; 3] = [0x21, 0, 0xff];
    // (method, CR4, flags, bit of the bitmap, who handles it)
    let rows = [
        (1, 0, IOPL | IF, 0, Protected),
        (2, 0, IF, 0, GeneralProtection),
        (3, cr4::VME, IF, 1, GeneralProtection),
        (4, cr4::VME, IOPL | IF, 1, Protected),
        (5, cr4::VME, IOPL | IF | VIF, 0, Program(IOPL | IF, IOPL | VIF)),
        (5, cr4::VME, IOPL, 0, Program(IOPL, IOPL)),
        (6, cr4::VME, IF, 0, Program(IOPL, IF)),
        (6, cr4::VME, 1 << 12 | VIF | VIP, 0, Program(IOPL | IF, 1 << 12 | VIP)),
        (6, cr4::PVI, VIF, 0, GeneralProtection),
    ];
    for (method, cr4, flags, bit, expected) in rows {
        for vector in vectors {
            let mut g = virtual_8086(&[0xcd, vector], flags).patch(|g| {
                g.vmcs.guest.cr4 = cr4;
                // Only this vector's bit says so.
                let rest = if bit == 0 { 0xff } else { 0 };
                g.write(TSS + REDIRECTION, &[rest; 32]);
                g.write(TSS + REDIRECTION + vector as u64 / 8, &[rest ^ 1 << (vector % 8)]);
                g.gate32(vector, 0xee, sel::CODE32, handler(vector) as u32);
            });
            let exit = g.enter();
            let s = &g.vmcs.guest;
            assert_eq!(exit.reason, R::Vmcall, "method {method}");
            let found = if s.rflags & rflags::VM != 0 {
                assert_eq!((s.segments[seg::CS].selector, s.rip), (0x3000, vector as u64 * 16));
                assert_eq!(s.segments[seg::CS].access, AccessRights(0xf3));
                assert_eq!(s.rsp, 0x7ffa);
                assert_eq!((g.read16(0x7ffa), g.read16(0x7ffc)), (2, (CODE >> 4) as u16));
                let mode = rflags::FIXED1 | rflags::VM;
                Program(g.read16(0x7ffe) as u64 & !rflags::FIXED1, s.rflags & !mode)
            } else if s.rip == handler(vector) {
                assert_eq!(s.rsp, STACK0 - 36);
                assert_eq!(g.read32(s.rsp + 8) as u64 & IF, flags & IF);
                Protected
            } else {
                assert_eq!(s.rip, handler(ex::GP));
                assert_eq!((g.read32(s.rsp), g.read32(s.rsp + 4)), (0, 0), "error code, EIP");
                GeneralProtection
            };
            assert_eq!(found, expected, "method {method}, vector {vector:x}");
        }
    }
    // INT3 isn't redirected, nor does it depend on IOPL (SDM Vol. 3B §21.3.3).
    let mut g = virtual_8086(&[0xcc], 0).patch(|g| {
        g.write(TSS + REDIRECTION, &[0; 32]);
        g.gate32(ex::BP, 0xee, sel::CODE32, handler(ex::BP) as u32);
    });
    g.expect_event(ex::BP, None);
    // The handler starts without TF; the image that it returns with keeps it.
    let mut g = virtual_8086(&[0xcd, 0x21], TF).patch(|g| g.write(TSS + REDIRECTION, &[0; 32]));
    g.expect(R::Vmcall);
    assert_eq!((g.vmcs.guest.rip, g.read16(0x7ffe) as u64 & TF, g.vmcs.guest.rflags & TF), (0x210, TF, 0));
    // A bitmap that isn't in the TSS is #GP(0), whatever the IOPL.
    for (limit, map) in [(0x66, 0x88u16), (0x6b, 0x88), (0x8f, 31)] {
        let mut g = virtual_8086(&[0xcd, 0x21], IOPL).patch(|g| {
            g.vmcs.guest.segments[seg::TR].limit = limit;
            g.write(TSS + 0x66, &map.to_le_bytes());
            g.write(TSS + REDIRECTION, &[0; 32]);
            g.gate32(0x21, 0xee, sel::CODE32, handler(0x21) as u32);
        });
        if map == 31 {
            // Vector 21H's byte is at 31 - 32 + 4; vector 0's would be below the TSS.
            g.write(TSS + 3, &[0xff]);
            g.write(CODE, &[0xcd, 0]);
        }
        g.expect_event(ex::GP, Some(0));
    }
}

/// POPF leaves VIF and VIP alone at CPL 0, IRETD loads them (SDM Vol. 2B table 4-16, Vol. 2A, IRET).
#[test]
fn virtual_interrupt_flags_at_cpl_0() {
    let both = rflags::VIF | rflags::VIP;
    let mut g = Guest::protected(&[0x9d, 0x0f, 0xa2]).patch(|g| {
        g.vmcs.guest.rflags |= rflags::VIF;
        g.write64(STACK, rflags::VIP | rflags::CF);
    });
    g.expect(R::Cpuid);
    assert_eq!(g.vmcs.guest.rflags, rflags::VIF | rflags::CF | rflags::FIXED1);
    let mut g = Guest::protected(&[0xcf, 0x0f, 0xa2]).patch(|g| {
        for (n, v) in [CODE as u32 + 1, sel::CODE32 as u32, both as u32].iter().enumerate() {
            g.write(STACK + n as u64 * 4, &v.to_le_bytes());
        }
    });
    g.expect(R::Cpuid);
    assert_eq!(g.vmcs.guest.rflags, both | rflags::FIXED1);
}

/// State that the processor can't be in fails the entry with reason 33 and bit 31
/// (SDM Vol. 3C §27.8).
#[test]
fn impossible_state_fails_entry() {
    let fails = |f: fn(&mut Guest)| {
        let mut g = Guest::long(&[HLT]).patch(f);
        let e = g.enter();
        assert_eq!((e.reason, e.entry_failure), (R::InvalidGuestState, true));
    };
    fails(|g| g.vmcs.guest.cr4 |= cr4::LA57);
    fails(|g| g.vmcs.guest.cr0 &= !cr0::PE);
    fails(|g| g.vmcs.guest.rip = 1 << 48);
    fails(|g| g.vmcs.controls.entry -= EntryControls::IA32E_MODE_GUEST);
    fails(|g| g.vmcs.guest.cr4 &= !cr4::PAE);
}

/// The capability MSRs are consistent: what must be 1 may be 1 (SDM Vol. 3D appendix A.2).
#[test]
fn capabilities_are_consistent() {
    let c = super::capabilities::capabilities();
    for a in [c.pin, c.primary, c.secondary, c.exit, c.entry] {
        assert_eq!(a.must_be_one & !a.may_be_one, 0);
    }
    assert_eq!(c.misc & 0x1f, c.preemption_timer_shift as u64);
    let f = super::capabilities::tsc_frequency();
    assert!((100_000_000..20_000_000_000).contains(&f), "{f}");
}

/// What an emulated instruction leaves behind at its boundary: an ended shadow, a pending
/// single-step trap unless it faulted, an MTF exit.
#[test]
fn emulated_instruction_boundary() {
    let mut bus = Log(vec![]);
    let mut g = Guest::long(&[0xec]).patch(|g| {
        g.vmcs.guest.interruptibility = interruptibility::STI;
        g.vmcs.guest.rflags |= rflags::TF;
    });
    assert_eq!(g.vcpu.emulate(&mut g.vmcs, &mut g.regs, &mut bus), None);
    assert_eq!(g.vmcs.guest.interruptibility, 0);
    g.expect_event(ex::DB, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 1);
    let mut g = Guest::long(&[0x6c]).with(gpr::RDI, NOT_PRESENT).patch(|g| g.vmcs.guest.rflags |= rflags::TF);
    assert_eq!(g.vcpu.emulate(&mut g.vmcs, &mut g.regs, &mut bus), None);
    assert_eq!((g.vmcs.guest.rip, g.vmcs.guest.pending_debug), (handler(ex::PF), 0));
    let mut g = Guest::long(&[0xec]).primary(PrimaryControls::MONITOR_TRAP_FLAG);
    let exit = g.vcpu.emulate(&mut g.vmcs, &mut g.regs, &mut bus);
    assert_eq!(exit.map(|e| e.reason), Some(R::MonitorTrapFlag));
}

/// XSAVES needs its control (SDM Vol. 3C §26.3).
#[test]
fn xsaves_control() {
    // xsaves [rax]
    let mut g = Guest::long(&with_code(&[0x0f, 0xc7, 0x28])).with(gpr::RAX, DATA);
    g.vmcs.guest.cr4 |= cr4::OSXSAVE;
    g.expect_event(ex::UD, None);
    let mut g = Guest::long(&with_code(&[0x0f, 0xc7, 0x28]))
        .with(gpr::RAX, DATA)
        .secondary(SecondaryControls::ENABLE_XSAVES_XRSTORS);
    g.vmcs.guest.cr4 |= cr4::OSXSAVE;
    g.expect(R::Hlt);
    // With a component in IA32_XSS and the XSS-exiting bitmap it exits.
    let mut g = Guest::long(&[0x0f, 0xc7, 0x28])
        .with(gpr::RAX, 1 << 8)
        .secondary(SecondaryControls::ENABLE_XSAVES_XRSTORS);
    g.vmcs.guest.cr4 |= cr4::OSXSAVE;
    g.regs.msrs.xss = 1 << 8;
    g.vmcs.controls.xss_exit_bitmap = 1 << 8;
    g.expect(R::Xsaves);
}

/// LTR-loaded and injected state survive a save and load: what an exit wrote back enters
/// again (CPL in SS.DPL, SDM Vol. 3C §25.4.1).
#[test]
fn cpl_is_kept_in_ss() {
    // mov ss, null at CPL 0; cpuid
    let mut g = Guest::long(&[0x8e, 0xd0, 0x90, 0x0f, 0xa2]).with(gpr::RAX, 0);
    g.expect(R::Cpuid);
    assert_eq!(g.vmcs.guest.segments[seg::SS].access.dpl(), 0);
    let mut g = Guest::user(&[0x0f, 0xa2, 0xfa]);
    g.expect(R::Cpuid);
    assert_eq!(g.vmcs.guest.segments[seg::SS].access.dpl(), 3);
    g.vmcs.guest.rip += 2;
    g.expect_event(ex::GP, Some(0));
}

/// RDRAND sets CF and clears the other status flags; its exit names register and size
/// (SDM Vol. 2B; Vol. 3C table 28-13).
#[test]
fn rdrand() {
    let bytes = with_code(&[0x48, 0x0f, 0xc7, 0xf3]);
    let mut g = Guest::long(&bytes).patch(|g| g.vmcs.guest.rflags |= rflags::STATUS);
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.rflags & rflags::STATUS, rflags::CF);
    let mut g = Guest::long(&bytes).secondary(SecondaryControls::RDRAND_EXITING);
    assert_eq!(g.expect(R::Rdrand).instruction_info, (gpr::RBX as u32) << 3 | 2 << 11);
}

/// INVLPG exits with the linear address; otherwise the translation goes away
/// (SDM Vol. 3A §4.10.4.1).
#[test]
fn invlpg() {
    // mov ecx, [rdi]; mov [rbx], rdx (the PDE); invlpg [rdi]; mov ecx, [rdi]
    let mut g = Guest::long(&[0x8b, 0x0f, 0x48, 0x89, 0x13, 0x0f, 0x01, 0x3f, 0x8b, 0x0f])
        .with(gpr::RDI, 0x20_0000)
        .with(gpr::RBX, 0x1_2008)
        .with(gpr::RDX, 0);
    g.expect_event(ex::PF, Some(0));
    assert_eq!(g.read64(g.vmcs.guest.rsp + 8), CODE + 8);
    let mut g =
        Guest::long(&[0x0f, 0x01, 0x3f]).with(gpr::RDI, 0x1234).primary(PrimaryControls::INVLPG_EXITING);
    assert_eq!(g.expect(R::Invlpg).qualification, 0x1234);
}

/// SYSRET that sets TF traps before the first user instruction, and SYSCALL that masks TF
/// doesn't trap (both count TF as it is after the instruction).
#[test]
fn single_step_and_syscall() {
    let star = (sel::CODE64 as u64) << 32 | ((sel::USER_CODE32 & !3) as u64) << 48;
    let mut g = Guest::long(&[0x48, 0x0f, 0x07]).with(gpr::RCX, CODE + 0x100).with(11, 0x302).patch(|g| {
        g.regs.msrs.star = star;
    });
    g.expect_event(ex::DB, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 0x100);
    let mut g = Guest::user(&[0x0f, 0x05]).patch(|g| {
        g.regs.msrs.star = star;
        g.regs.msrs.lstar = CODE + 0x100;
        g.regs.msrs.fmask = rflags::TF;
        g.vmcs.guest.rflags |= rflags::TF;
        g.write(CODE + 0x100, &[HLT]);
    });
    g.expect(R::Hlt);
}

/// Real mode pushes and reports no error codes (SDM Vol. 3B §21.1.4; Vol. 3C §28.2.2).
#[test]
fn real_mode_exceptions_have_no_error_code() {
    // mov ax, [0xffff]: a word across the segment's end is #GP.
    let bytes = [0xa1, 0xff, 0xff];
    let mut g = Guest::real(&bytes);
    g.expect_event(ex::GP, None);
    assert_eq!(g.vmcs.guest.rsp, 0x8000 - 6);
    let mut g = Guest::real(&bytes).patch(|g| g.vmcs.controls.exception_bitmap = 1 << ex::GP);
    let e = g.expect(R::ExceptionOrNmi);
    assert_eq!(e.interruption_info, InterruptionInfo::new(ex::GP, EventType::HardwareException, false));
    // An IVT that ends before the vector leads to a triple fault in the end.
    let mut g = Guest::real(&[0xcd, 0x21]).patch(|g| g.vmcs.guest.idtr.limit = 0);
    g.expect(R::TripleFault);
}

/// BOUND and INTO (SDM Vol. 2A).
#[test]
fn bound_and_into() {
    // bound eax, [DATA]
    let mut bytes = vec![0x62, 0x05];
    bytes.extend((DATA as u32).to_le_bytes());
    bytes.push(HLT);
    for (index, inside) in [(-3i32, false), (-2, true), (5, true), (6, false)] {
        let mut g = Guest::protected(&bytes).with(gpr::RAX, index as u32 as u64);
        g.write(DATA, &(-2i32).to_le_bytes());
        g.write(DATA + 4, &5i32.to_le_bytes());
        if inside {
            g.expect(R::Hlt);
        } else {
            g.expect_event(ex::BR, None);
            assert_eq!(g.read32(g.vmcs.guest.rsp) as u64, CODE, "a fault");
        }
    }
    let mut g = Guest::protected(&[0xce, HLT]);
    g.expect(R::Hlt);
    let mut g = Guest::protected(&[0xce]).patch(|g| g.vmcs.guest.rflags |= rflags::OF);
    g.expect_event(ex::OF, None);
    assert_eq!(g.read32(g.vmcs.guest.rsp) as u64, CODE + 1, "a trap");
}

/// Conforming code runs at the caller's privilege; a far call to it pushes CS and EIP
/// (SDM Vol. 3A §5.8.1.2).
#[test]
fn conforming_code() {
    let mut code = vec![0x9a];
    code.extend(((CODE + 0x100) as u32).to_le_bytes());
    code.extend(sel::FREE.to_le_bytes());
    let mut g = Guest::protected(&code).patch(|g| {
        for s in &mut g.vmcs.guest.segments[..6] {
            (s.selector, s.access) = (sel::USER_DATA, AccessRights(0xc0f3));
        }
        let cs = &mut g.vmcs.guest.segments[seg::CS];
        (cs.selector, cs.access) = (sel::USER_CODE32, AccessRights(0xc0fb));
        g.write64(GDT + sel::FREE as u64, 0x00cf_9e00_0000_ffff);
        g.write(CODE + 0x100, &[0x0f, 0xa2]);
    });
    g.expect(R::Cpuid);
    let s = &g.vmcs.guest;
    assert_eq!(s.segments[seg::CS].selector, sel::FREE | 3);
    assert_eq!(s.segments[seg::SS].access.dpl(), 3);
    assert_eq!(g.read32(s.rsp) as u64, CODE + 7);
    assert_eq!(g.read32(s.rsp + 4), sel::USER_CODE32 as u32);
}

/// A far return to an outer level releases parameters on both stacks and makes data
/// segments of the inner level null (SDM Vol. 3A §5.8.6).
#[test]
fn far_return_outwards() {
    // retf 8
    let mut g = Guest::protected(&[0xca, 8, 0]).with(gpr::RSP, STACK - 24).patch(|g| {
        let frame = [CODE as u32 + 0x100, sel::USER_CODE32 as u32, 1, 2, DATA as u32, sel::USER_DATA as u32];
        for (n, v) in frame.iter().enumerate() {
            g.write(STACK - 24 + n as u64 * 4, &v.to_le_bytes());
        }
        g.write(CODE + 0x100, &[0x0f, 0xa2]);
    });
    g.expect(R::Cpuid);
    let s = &g.vmcs.guest;
    assert_eq!(s.rsp, DATA + 8);
    assert_eq!(s.segments[seg::CS].selector, sel::USER_CODE32);
    assert!(s.segments[seg::DS].access.unusable());
    // Inwards is #GP(selector).
    let mut g = Guest::user(&[0x48, 0xcb]).patch(|g| {
        g.write64(STACK, CODE);
        g.write64(STACK + 8, sel::CODE64 as u64);
    });
    g.expect_event(ex::GP, Some(sel::CODE64 as u32));
}

/// Expand-down stacks: offsets at or below the limit are #SS(0) (SDM Vol. 3A §5.3).
#[test]
fn expand_down_stack() {
    let run = |rsp: u64| {
        // push fs; hlt
        let mut g = Guest::protected(&[0x0f, 0xa0, HLT]).with(gpr::RSP, rsp).patch(|g| {
            let ss = &mut g.vmcs.guest.segments[seg::SS];
            (ss.limit, ss.access) = (0x7_ffff, AccessRights(0xc097));
        });
        // The fault's own frame needs a good stack: let it exit.
        g.vmcs.controls.exception_bitmap = 1 << ex::SS;
        g.enter().reason
    };
    assert_eq!(run(0x8_0004), R::Hlt);
    assert_eq!(run(0x8_0003), R::ExceptionOrNmi);
}

/// An exception in compatibility mode enters 64-bit code, and IRETQ returns to it
/// (SDM Vol. 3A §6.14).
#[test]
fn compatibility_mode_round_trip() {
    let mut g = Guest::user(&[0x0f, 0x0b]).patch(|g| {
        let cs = &mut g.vmcs.guest.segments[seg::CS];
        (cs.selector, cs.access) = (sel::USER_CODE32, AccessRights(0xc0fb));
    });
    g.expect_event(ex::UD, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp + 8), sel::USER_CODE32 as u64);
    assert!(g.vmcs.guest.segments[seg::CS].access.long());
    // Skip the UD2 and go back.
    g.write(handler(ex::UD), &[0x48, 0xcf]);
    g.write(CODE + 2, &[0x0f, 0xa2]);
    g.write64(g.vmcs.guest.rsp, CODE + 2);
    g.vmcs.guest.rip = handler(ex::UD);
    g.expect(R::Cpuid);
    let s = &g.vmcs.guest;
    assert_eq!((s.rip, s.segments[seg::CS].selector), (CODE + 2, sel::USER_CODE32));
    assert_eq!(s.segments[seg::CS].access.0, 0xc0fb);
}

/// XGETBV and XSETBV (SDM Vol. 2C, Vol. 3C §26.1.2).
#[test]
fn extended_control_registers() {
    let xgetbv = with_code(&[0x0f, 0x01, 0xd0]);
    Guest::long(&xgetbv).expect_event(ex::UD, None);
    let on = |g: &mut Guest| {
        g.vmcs.guest.cr4 |= cr4::OSXSAVE;
        g.regs.xcr0 = 3;
    };
    let mut g = Guest::long(&xgetbv).patch(on);
    g.expect(R::Hlt);
    assert_eq!((g.regs.gpr[gpr::RAX], g.regs.gpr[gpr::RDX]), (3, 0));
    Guest::long(&xgetbv).patch(on).with(gpr::RCX, 2).expect_event(ex::GP, Some(0));
    Guest::long(&[0x0f, 0x01, 0xd1]).patch(on).expect(R::Xsetbv);
    Guest::user(&[0x0f, 0x01, 0xd1]).patch(on).expect_event(ex::GP, Some(0));
}

/// Leaving and entering paging by hand: EFER.LMA follows CR0.PG, and the entry control
/// follows LMA (SDM Vol. 3A §9.8.5; Vol. 3C §28.2).
#[test]
fn long_mode_switch() {
    // 32-bit: mov cr4, eax; mov cr3, ebx; wrmsr EFER; mov cr0, edi; jmp far CODE64; hlt
    let mut code = vec![0x0f, 0x22, 0xe0, 0x0f, 0x22, 0xdb];
    code.extend([0x89, 0xf0, 0x31, 0xd2, 0x0f, 0x30, 0x0f, 0x22, 0xc7, 0xea]);
    code.extend(((CODE + 0x100) as u32).to_le_bytes());
    code.extend(sel::CODE64.to_le_bytes());
    let mut g = Guest::protected(&code)
        .with(gpr::RAX, cr4::PAE)
        .with(gpr::RBX, 0x1_0000)
        .with(gpr::RCX, x86_spec::msr::EFER as u64)
        .with(gpr::RSI, efer::LME)
        .with(gpr::RDI, cr0::PE | cr0::PG | cr0::ET)
        .patch(|g| {
            g.write64(0x1_0000, 0x1_1000 | 7);
            g.write64(0x1_1000, 0x1_2000 | 7);
            for n in 0..MEMORY >> 21 {
                g.write64(0x1_2000 + n * 8, n << 21 | 0x87);
            }
            // mov rax, 1<<40; hlt
            g.write(CODE + 0x100, &[0x48, 0xb8, 0, 0, 0, 0, 0, 1, 0, 0, HLT]);
        });
    g.expect(R::Hlt);
    assert_eq!(g.regs.gpr[gpr::RAX], 1 << 40);
    assert_eq!(g.vmcs.guest.efer, efer::LME | efer::LMA);
    assert!(g.vmcs.controls.entry.contains(EntryControls::IA32E_MODE_GUEST));
    // Without PAE the switch is #GP(0).
    let mut g = Guest::protected(&[0x0f, 0x22, 0xc7])
        .with(gpr::RDI, cr0::PE | cr0::PG | cr0::ET)
        .patch(|g| g.vmcs.guest.efer = efer::LME);
    g.expect_event(ex::GP, Some(0));
}

/// A delivery whose frame overwrites the code that runs: the instruction starts anew alone and
/// completes once.
#[test]
fn frame_over_the_running_code() {
    // nop; int 0x80
    let mut g = Guest::long(&[0x90, 0xcd, 0x80]).with(gpr::RSP, CODE + 0x20);
    g.expect_event(0x80, None);
    let rsp = g.vmcs.guest.rsp;
    assert_eq!(rsp, CODE + 0x20 - 40);
    assert_eq!(g.read64(rsp), CODE + 3);
    assert_eq!(g.read64(rsp + 24), CODE + 0x20);
}

/// STAC and CLAC within a block change what the accesses after them may do (SDM Vol. 3A §4.6.1).
#[test]
fn smap_within_a_block() {
    // stac; mov rcx, [rax]; clac; mov rcx, [rax]
    let mut g = Guest::long(&[0x0f, 0x01, 0xcb, 0x48, 0x8b, 0x08, 0x0f, 0x01, 0xca, 0x48, 0x8b, 0x08])
        .with(gpr::RAX, 0x20_0000)
        .patch(|g| {
            g.vmcs.guest.cr4 |= cr4::SMAP;
            // Everything but the 2 MiB at 0x20_0000 is the supervisor's.
            for n in (0..MEMORY >> 21).filter(|n| *n != 1) {
                g.write64(0x1_2000 + n * 8, n << 21 | 0x83);
            }
        });
    g.expect_event(ex::PF, Some(pf::P));
    assert_eq!(g.read64(g.vmcs.guest.rsp + 8), CODE + 9, "the second access");
}

/// A small generator, so that a failure can be repeated from its seed.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.next() as usize % from.len()]
    }
    /// Numbers where mistakes hide: small, at the ends, addresses of tables, random.
    fn value(&mut self) -> u64 {
        let n = self.next();
        match n % 8 {
            0 => self.next() & 0xff,
            1 => u64::MAX - (self.next() & 0xff),
            2 => self.pick(&[GDT, IDT, TSS, DATA, CODE, STACK, NOT_PRESENT, 1 << 47, 0xffff, 0xffff_ffff]),
            3 => self.next() & 0xffff,
            4 => 1 << (self.next() & 63),
            _ => self.next(),
        }
    }
}

/// Random system instructions, tables, registers and segments in every mode end in an exit and
/// never in a panic.
#[test]
fn random_system_code_always_exits() {
    const OPCODES: [&[u8]; 40] = [
        &[0x0f, 0x00],
        &[0x0f, 0x01],
        &[0x0f, 0x02],
        &[0x0f, 0x03],
        &[0x0f, 0x05],
        &[0x0f, 0x07],
        &[0x48, 0x0f, 0x07],
        &[0x0f, 0x20],
        &[0x0f, 0x21],
        &[0x0f, 0x22],
        &[0x0f, 0x23],
        &[0x0f, 0x30],
        &[0x0f, 0x32],
        &[0x0f, 0x34],
        &[0x0f, 0x35],
        &[0x0f, 0xb2],
        &[0x0f, 0xb4],
        &[0x0f, 0xc7],
        &[0x0f, 0xae],
        &[0x66, 0x0f, 0x38, 0x82],
        &[0x8e],
        &[0x8c],
        &[0x1f],
        &[0x17],
        &[0x9c],
        &[0x9d],
        &[0xca],
        &[0xcb],
        &[0xcc],
        &[0xcd],
        &[0xce],
        &[0xcf],
        &[0x48, 0xcf],
        &[0xea],
        &[0x9a],
        &[0xff],
        &[0xf3, 0x6c],
        &[0xf3, 0x6e],
        &[0xfb],
        &[0x62],
    ];
    let mut r = Random(0x9e37_79b9_7f4a_7c15);
    let mut bus = Log(vec![]);
    for round in 0..30 {
        let make = [Guest::long, Guest::user, Guest::protected, Guest::real][round % 4];
        for _ in 0..40 {
            let mut code = vec![];
            for _ in 0..4 {
                code.extend_from_slice(r.pick(&OPCODES));
                code.extend_from_slice(&r.next().to_le_bytes()[..r.next() as usize % 6]);
            }
            let mut g = make(&code);
            for i in 0..16 {
                g.regs.gpr[i] = r.value();
            }
            for _ in 0..4 {
                let at = r.pick(&[GDT, IDT, TSS, STACK, DATA]) + (r.next() & 0xf8);
                let v = r.value();
                g.write64(at, v);
            }
            let s = &mut g.vmcs.guest;
            s.rflags ^= r.next() & r.next() & 0x3c_7fd5 & !rflags::VM;
            s.gdtr.limit = r.value() as u32 & 0xffff;
            s.idtr.limit = r.value() as u32 & 0xffff;
            s.segments[seg::TR].limit = r.value() as u32;
            s.segments[seg::SS].limit = r.value() as u32;
            s.interruptibility = r.next() as u32 & 0xb;
            s.dr7 ^= r.value() & 0xffff_03ff;
            g.regs.dr = [r.value(), r.value(), DATA, CODE + 2];
            g.regs.msrs.star = r.value();
            g.vmcs.controls.exception_bitmap = r.value() as u32;
            g.vmcs.controls.pin |= PinbasedControls::VMX_PREEMPTION_TIMER;
            g.vmcs.guest.preemption_timer = 20_000;
            if r.next() & 1 == 0 {
                g.vmcs.controls.entry_interruption = InterruptionInfo::new(
                    r.next() as u8,
                    r.pick(&[
                        EventType::External,
                        EventType::Nmi,
                        EventType::HardwareException,
                        EventType::SoftwareInterrupt,
                        EventType::SoftwareException,
                    ]),
                    r.next() & 1 == 0,
                );
            }
            for _ in 0..4 {
                let exit = g.enter();
                if exit.entry_failure {
                    break;
                }
                g.vmcs.guest.preemption_timer = 20_000;
                g.vmcs.guest.rip = g.vmcs.guest.rip.wrapping_add(exit.instruction_length as u64);
                // Anything may have happened but an inconsistent state.
                let s = &g.vmcs.guest;
                assert_eq!(s.rflags & rflags::FIXED1, rflags::FIXED1);
                assert!(s.cr0 & cr0::PG == 0 || s.cr0 & cr0::PE != 0);
                g.vcpu.emulate(&mut g.vmcs, &mut g.regs, &mut bus);
                bus.0.clear();
            }
        }
    }
}
