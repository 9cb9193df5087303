//! Tests of APIC virtualization, VM functions, PAUSE-loop exiting, VMCS shadowing and inactive guests.

use engine::{Activity, Engine, Vcpu};
use memory::MachineAddr;
use x86_spec::controls::{PinbasedControls, PrimaryControls as C, SecondaryControls as S};
use x86_spec::ept;
use x86_spec::exception as ex;
use x86_spec::exit::ExitReason as R;
use x86_spec::interruption::EventType;
use x86_spec::reg::{gpr, rflags};

use super::shadow_vmcs::{ShadowField, ShadowLayout};
use super::testutil::*;

const HLT: u8 = 0xf4;
/// The APIC-access page.
const APIC: u64 = 0xd_0000;
/// mov eax, [rbx]
const LOAD: &[u8] = &[0x8b, 0x03, HLT];
/// mov [rbx], eax; nop
const STORE: &[u8] = &[0x89, 0x03, 0x90, HLT];

fn apic(bytes: &[u8], secondary: S) -> Guest {
    Guest::long(bytes).primary(C::USE_TPR_SHADOW).secondary(S::VIRTUALIZE_APIC | secondary).patch(|g| {
        g.vmcs.controls.apic_access = MachineAddr(APIC);
    })
}

fn status(rvi: u8, svi: u8) -> u16 {
    u16::from_le_bytes([rvi, svi])
}

/// Which reads are virtualized (SDM Vol. 3C §30.4.2); the others exit with access type 0.
#[test]
fn apic_page_reads() {
    let (none, registers) = (S::empty(), S::VIRTUALIZE_APIC_REGISTER);
    for (secondary, offset, virtualized) in [
        (none, 0x80, true),
        (none, 0x20, false),
        (none, 0xb0, false),
        (none, 0x84, false),
        (S::VIRTUAL_INTERRUPT_DELIVERY, 0xb0, false),
        (registers, 0x20, true),
        (registers, 0x30, true),
        (registers, 0x40, false),
        (registers, 0xa0, false),
        (registers, 0xd0, true),
        (registers, 0x100, true),
        (registers, 0x1f0, true),
        (registers, 0x270, true),
        (registers, 0x280, true),
        (registers, 0x290, false),
        (registers, 0x310, true),
        (registers, 0x370, true),
        (registers, 0x380, true),
        (registers, 0x390, false),
        (registers, 0x3e0, true),
        (registers, 0x3f0, false),
        // Not within the low 4 bytes of 16.
        (registers, 0x82, false),
        (registers, 0x8c, false),
    ] {
        let mut g = apic(LOAD, secondary).with(gpr::RBX, APIC + offset);
        if virtualized {
            g.write(VIRTUAL_APIC + offset, &0x1234_5678u32.to_le_bytes());
            g.expect(R::Hlt);
            assert_eq!(g.regs.gpr[gpr::RAX], 0x1234_5678, "{offset:x}");
        } else {
            let e = g.expect(R::ApicAccess);
            assert_eq!((e.qualification, e.instruction_length), (offset, 2), "{offset:x}");
            assert_eq!(g.vmcs.guest.rip, CODE);
        }
    }
    // Without TPR shadow, and with more than 4 bytes, everything exits.
    let mut g = apic(LOAD, registers).with(gpr::RBX, APIC + 0x80);
    g.vmcs.controls.primary.remove(C::USE_TPR_SHADOW);
    g.expect(R::ApicAccess);
    let mut g = apic(&[0x48, 0x8b, 0x03, HLT], registers).with(gpr::RBX, APIC + 0x80);
    g.expect(R::ApicAccess);
    // Across the page's start: the part in the page counts.
    let mut g = apic(LOAD, registers).with(gpr::RBX, APIC - 2);
    assert_eq!(g.expect(R::ApicAccess).qualification, 0);
}

/// Which writes are virtualized (SDM Vol. 3C §30.4.3), and what follows them: nothing, or an
/// APIC-write exit right after the instruction.
#[test]
fn apic_page_writes() {
    #[derive(Clone, Copy, PartialEq, Debug)]
    enum After {
        Access,
        Nothing,
        Exit,
    }
    use After::{Access, Exit, Nothing};
    let (none, registers, delivery) =
        (S::empty(), S::VIRTUALIZE_APIC_REGISTER, S::VIRTUAL_INTERRUPT_DELIVERY);
    for (secondary, offset, after) in [
        (none, 0x80, Nothing),
        (none, 0xb0, Access),
        (none, 0x300, Access),
        (delivery, 0x80, Nothing),
        (delivery, 0xb0, Nothing),
        // The value below is no self-IPI.
        (delivery, 0x300, Exit),
        (delivery, 0x310, Access),
        (registers, 0x20, Exit),
        (registers, 0x30, Access),
        (registers, 0x80, Nothing),
        (registers, 0xb0, Exit),
        (registers, 0xd0, Exit),
        (registers, 0xf0, Exit),
        (registers, 0x100, Access),
        (registers, 0x280, Exit),
        (registers, 0x300, Exit),
        (registers, 0x310, Nothing),
        (registers, 0x320, Exit),
        (registers, 0x380, Exit),
        (registers, 0x390, Access),
        (registers, 0x3e0, Exit),
        (registers, 0x84, Access),
    ] {
        let mut g = apic(STORE, secondary).with(gpr::RBX, APIC + offset).with(gpr::RAX, 0x3312_3460);
        let e = g.enter();
        let case = format!("{secondary:?} {offset:x} {e:x?}");
        match after {
            Access => {
                assert_eq!((e.reason, e.qualification), (R::ApicAccess, 1 << 12 | offset), "{case}");
                assert_eq!((g.vmcs.guest.rip, e.instruction_length), (CODE, 2), "{case}");
                assert_eq!(g.read32(VIRTUAL_APIC + offset), 0, "{case}");
            }
            Exit => {
                assert_eq!((e.reason, e.qualification), (R::ApicWrite, offset), "{case}");
                assert_eq!(g.vmcs.guest.rip, CODE + 2, "trap-like: {case}");
                assert_eq!(g.read32(VIRTUAL_APIC + offset), 0x3312_3460, "{case}");
            }
            Nothing => assert_eq!(e.reason, R::Hlt, "{case}"),
        }
        match offset {
            0x80 if after == Nothing => assert_eq!(g.read32(VIRTUAL_APIC + 0x80), 0x60, "{case}"),
            0x310 if after == Nothing => {
                assert_eq!(g.read32(VIRTUAL_APIC + 0x310), 0x3300_0000, "{case}")
            }
            0xb0 if after == Nothing => assert_eq!(g.read32(VIRTUAL_APIC + 0xb0), 0, "{case}"),
            _ => {}
        }
        assert_eq!(g.read64(APIC + offset), 0, "the page itself stays: {case}");
    }
    // A read-modify-write reads what it virtualizes: or dword [rbx], 1
    let mut g = apic(&[0x83, 0x0b, 0x01, HLT], registers).with(gpr::RBX, APIC + 0xf0);
    g.write(VIRTUAL_APIC + 0xf0, &[0x40]);
    assert_eq!(g.expect(R::ApicWrite).qualification, 0xf0);
    assert_eq!(g.read32(VIRTUAL_APIC + 0xf0), 0x41);
}

/// A TPR write below the threshold exits after the instruction, within a block too (SDM Vol. 3C §30.1.2).
#[test]
fn tpr_threshold_by_memory_write() {
    let mut g = apic(STORE, S::empty()).with(gpr::RBX, APIC + 0x80).with(gpr::RAX, 0x20);
    g.write(VIRTUAL_APIC + 0x80, &[0x50]);
    g.vmcs.controls.tpr_threshold = 4;
    g.expect(R::TprBelowThreshold);
    assert_eq!(g.vmcs.guest.rip, CODE + 2);
    assert_eq!(g.read32(VIRTUAL_APIC + 0x80), 0x20);
}

/// Access types of fetches, event delivery and page walks (SDM Vol. 3C table 28-6).
#[test]
fn apic_access_types() {
    // jmp rbx
    let mut g = apic(&[0xff, 0xe3], S::empty()).with(gpr::RBX, APIC + 0x80);
    assert_eq!(g.expect(R::ApicAccess).qualification, 2 << 12 | 0x80);
    assert_eq!(g.vmcs.guest.rip, APIC + 0x80);
    // int 0x40 pushes to the page: 16-byte alignment, then 8 bytes down.
    let mut g = apic(&[0xcd, 0x40], S::empty()).with(gpr::RSP, APIC + 0x90);
    let e = g.expect(R::ApicAccess);
    assert_eq!(e.qualification, 3 << 12 | 0x88);
    assert_eq!(e.idt_vectoring.event_type(), EventType::SoftwareInterrupt);
    assert_eq!((e.idt_vectoring.vector(), e.instruction_length), (0x40, 2));
    // A page table in the page: a guest-physical access.
    let mut g = apic(LOAD, S::empty()).with(gpr::RBX, NOT_PRESENT);
    g.write64(0x1_2000 + (NOT_PRESENT >> 21) * 8, APIC | 7);
    assert_eq!(g.expect(R::ApicAccess).qualification >> 12, 15);
}

/// x2APIC virtualization (SDM Vol. 3C §30.5).
#[test]
fn x2apic_msrs() {
    let (rdmsr, wrmsr): (&[u8], &[u8]) = (&[0x0f, 0x32, HLT], &[0x0f, 0x30, HLT]);
    let x2 = |bytes: &[u8], msr: u64, more: S| {
        Guest::long(bytes)
            .primary(C::USE_TPR_SHADOW)
            .secondary(S::VIRTUALIZE_X2APIC | more)
            .with(gpr::RCX, msr)
    };
    let registers = S::VIRTUALIZE_APIC_REGISTER;
    for (msr, more, works) in [
        (0x808, S::empty(), true),
        (0x80d, S::empty(), false),
        (0x80d, registers, true),
        (0x8ff, registers, true),
        (0x900, registers, false),
    ] {
        let mut g = x2(rdmsr, msr, more);
        g.write64(VIRTUAL_APIC + ((msr & 0xff) << 4), 0x1122_3344_5566_7788);
        if works {
            g.expect(R::Hlt);
            assert_eq!((g.regs.gpr[gpr::RDX], g.regs.gpr[gpr::RAX]), (0x1122_3344, 0x5566_7788));
        } else {
            g.expect_event(ex::GP, Some(0));
        }
    }
    let mut g = x2(wrmsr, 0x808, S::empty()).with(gpr::RAX, 0x35);
    g.vmcs.controls.tpr_threshold = 4;
    g.write(VIRTUAL_APIC + 0x80, &[0x40]);
    g.expect(R::TprBelowThreshold);
    assert_eq!((g.vmcs.guest.rip, g.read32(VIRTUAL_APIC + 0x80)), (CODE + 2, 0x35));
    x2(wrmsr, 0x808, S::empty()).with(gpr::RAX, 0x100).expect_event(ex::GP, Some(0));
    let delivery = S::VIRTUAL_INTERRUPT_DELIVERY;
    x2(wrmsr, 0x80b, delivery).with(gpr::RAX, 1).expect_event(ex::GP, Some(0));
    x2(wrmsr, 0x80b, S::empty()).expect_event(ex::GP, Some(0));
    x2(wrmsr, 0x83f, delivery).with(gpr::RAX, 0x140).expect_event(ex::GP, Some(0));
    // Illegal vectors are the hypervisor's.
    assert_eq!(x2(wrmsr, 0x83f, delivery).with(gpr::RAX, 0xf).expect(R::ApicWrite).qualification, 0x3f0);
    let mut g = x2(wrmsr, 0x83f, delivery).with(gpr::RAX, 0x40);
    g.vmcs.guest.rflags |= rflags::IF;
    g.expect_event(0x40, None);
    assert_eq!(g.vmcs.guest.interrupt_status, status(0, 0x40));
}

fn delivering(bytes: &[u8], rvi: u8, svi: u8) -> Guest {
    apic(bytes, S::VIRTUAL_INTERRUPT_DELIVERY).patch(|g| {
        g.vmcs.guest.rflags |= rflags::IF;
        g.vmcs.guest.interrupt_status = status(rvi, svi);
        for (base, vector) in [(0x200, rvi), (0x100, svi)] {
            if vector != 0 {
                let at = VIRTUAL_APIC + base + (vector as u64 >> 5) * 16;
                g.write(at, &(1u32 << (vector & 31)).to_le_bytes());
            }
        }
    })
}

/// Virtual-interrupt delivery (SDM Vol. 3C §30.2): IRR to ISR, PPR, guest interrupt status.
#[test]
fn virtual_interrupt_delivery() {
    let mut g = delivering(&[HLT], 0x61, 0);
    g.write(VIRTUAL_APIC + 0x210, &(1u32 << 5).to_le_bytes());
    g.expect_event(0x61, None);
    assert_eq!(g.vmcs.guest.interrupt_status, status(0x25, 0x61), "the next in IRR");
    assert_eq!((g.read32(VIRTUAL_APIC + 0x230), g.read32(VIRTUAL_APIC + 0x130)), (0, 2));
    assert_eq!(g.read32(VIRTUAL_APIC + 0xa0), 0x60);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE, "before the first instruction");
    // Not above the processor priority, from VTPR or from SVI.
    let mut g = delivering(&[HLT], 0x61, 0);
    g.write(VIRTUAL_APIC + 0x80, &[0x60]);
    g.expect(R::Hlt);
    assert_eq!(g.read32(VIRTUAL_APIC + 0xa0), 0x60);
    let mut g = delivering(&[HLT], 0x61, 0x6f);
    g.expect(R::Hlt);
    assert_eq!((g.read32(VIRTUAL_APIC + 0xa0), g.vmcs.guest.interrupt_status), (0x60, status(0x61, 0x6f)));
    // Interrupt-window exiting takes its place.
    delivering(&[HLT], 0x61, 0).primary(C::INTERRUPT_WINDOW_EXITING).expect(R::InterruptWindow);
}

/// What blocks and what allows it (SDM Vol. 3C §30.2.2): IF, the STI shadow, inactivity.
#[test]
fn virtual_interrupt_blocking() {
    // nop; sti; nop; hlt
    let mut g = delivering(&[0x90, 0xfb, 0x90, HLT], 0x61, 0);
    g.vmcs.guest.rflags &= !rflags::IF;
    g.expect_event(0x61, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 3);
    // popfq sets IF.
    let mut g = delivering(&[0x9d, 0x90, HLT], 0x61, 0);
    g.vmcs.guest.rflags &= !rflags::IF;
    g.write64(STACK, rflags::IF | 2);
    g.expect_event(0x61, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 1);
    // HLT is left at once; shutdown isn't.
    let mut g = delivering(&[0x90], 0x61, 0).patch(|g| g.vmcs.guest.activity = Activity::Hlt);
    g.expect_event(0x61, None);
    assert_eq!(g.vmcs.guest.activity, Activity::Active);
    let mut g = delivering(&[0x90], 0x61, 0).patch(|g| {
        g.vmcs.guest.activity = Activity::Shutdown;
        g.vmcs.controls.pin |= PinbasedControls::VMX_PREEMPTION_TIMER;
        g.vmcs.guest.preemption_timer = 100;
    });
    g.expect(R::PreemptionTimer);
}

/// Lowering the TPR delivers what waited (SDM Vol. 3C §30.1.2).
#[test]
fn tpr_lets_a_virtual_interrupt_through() {
    // mov cr8, rax; nop; hlt
    let mut g = delivering(&[0x44, 0x0f, 0x22, 0xc0, 0x90, HLT], 0x61, 0).with(gpr::RAX, 5);
    g.write(VIRTUAL_APIC + 0x80, &[0x70]);
    g.expect_event(0x61, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 4);
    // By memory, in the middle of a block.
    let mut g = delivering(STORE, 0x61, 0).with(gpr::RAX, 0x50).with(gpr::RBX, APIC + 0x80);
    g.write(VIRTUAL_APIC + 0x80, &[0x70]);
    g.expect_event(0x61, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 2);
}

/// EOI virtualization (SDM Vol. 3C §30.1.4): ISR, SVI, PPR; exit by bitmap or delivery.
#[test]
fn eoi_virtualization() {
    let eoi = |svi, rvi| {
        let mut g = delivering(STORE, rvi, svi).with(gpr::RBX, APIC + 0xb0);
        // 33H is in service too.
        g.write(VIRTUAL_APIC + 0x110, &(1u32 << 0x13).to_le_bytes());
        g
    };
    let mut g = eoi(0x61, 0);
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.interrupt_status, status(0, 0x33));
    assert_eq!((g.read32(VIRTUAL_APIC + 0x130), g.read32(VIRTUAL_APIC + 0xa0)), (0, 0x30));
    let mut g = eoi(0x61, 0x51);
    g.expect_event(0x51, None);
    assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 2);
    let mut g = eoi(0x61, 0x51);
    g.vmcs.controls.eoi_exit[1] = 1 << (0x61 - 64);
    assert_eq!(g.expect(R::VirtualizedEoi).qualification, 0x61);
    assert_eq!((g.vmcs.guest.rip, g.vmcs.guest.interrupt_status), (CODE + 2, status(0x51, 0x33)));
    // The next entry evaluates.
    g.expect_event(0x51, None);
}

/// Which ICR values are self-IPIs (SDM Vol. 3C §30.4.3.2).
#[test]
fn self_ipi() {
    for (icr, virtualized) in [
        (0x4_0041u64, true),
        // Destination mode and level don't matter.
        (0x4_4841, true),
        (0x4_000f, false),
        (0x4_8041, false),
        (0x4_0441, false),
        (0x4_1041, false),
        (0x8_0041, false),
        (0x0_0041, false),
        (0x14_0041, false),
    ] {
        let mut g = delivering(STORE, 0, 0).with(gpr::RBX, APIC + 0x300).with(gpr::RAX, icr);
        if virtualized {
            g.expect_event(0x41, None);
            assert_eq!(g.read64(g.vmcs.guest.rsp), CODE + 2);
        } else {
            assert_eq!(g.expect(R::ApicWrite).qualification, 0x300, "{icr:x}");
        }
    }
}

/// A fault in the delivery of a virtual interrupt exits with it as IDT-vectoring information.
#[test]
fn virtual_interrupt_vectoring() {
    let mut g = delivering(&[HLT], 0x61, 0);
    g.vmcs.controls.exception_bitmap = 1 << ex::NP;
    g.gate64(0x61, 0x0e, 0);
    let e = g.expect(R::ExceptionOrNmi);
    assert_eq!((e.idt_vectoring.vector(), e.idt_vectoring.event_type()), (0x61, EventType::External));
    assert_eq!(g.vmcs.guest.interrupt_status, status(0, 0x61));
}

/// VMFUNC (SDM Vol. 3C §26.5.6): #UD, exits, and a switch that takes effect with the next access.
#[test]
fn eptp_switching() {
    const LIST: u64 = 0xe_0000;
    // vmfunc; mov eax, [rbx]; hlt
    let bytes = [0x0f, 0x01, 0xd4, 0x8b, 0x03, HLT];
    let other = ept::eptp(0xe_1000, false);
    let guest = |function, index| {
        let mut g = Guest::long(&bytes)
            .secondary(S::ENABLE_VM_FUNCTIONS)
            .with(gpr::RAX, function)
            .with(gpr::RCX, index)
            .with(gpr::RBX, 0x20_0000);
        g.vmcs.controls.vm_functions = 1;
        g.vmcs.controls.eptp_list = MachineAddr(LIST);
        let wb = ept::RWX | ept::MEMTYPE_WB << ept::MEMTYPE_SHIFT | ept::LARGE;
        g.write64(0xe_1000, 0xe_2000 | ept::RWX);
        g.write64(0xe_2000, 0xe_3000 | ept::RWX);
        g.write64(0xe_3000, wb);
        // The second 2 MiB page is another one here.
        g.write64(0xe_3008, 0x40_0000 | wb);
        g.write(0x20_0000, &[1]);
        g.write(0x40_0000, &[2]);
        g.write64(LIST + 5 * 8, other);
        g.write64(LIST + 6 * 8, other | 1);
        g.write64(LIST + 7 * 8, other & !0x38);
        g.write64(LIST + 8 * 8, other | 1 << 50);
        g.write64(LIST + 9 * 8, other | 1 << 8);
        g
    };
    let mut g = guest(0, 5);
    g.expect(R::Hlt);
    assert_eq!((g.regs.gpr[gpr::RAX], g.vmcs.controls.eptp), (2, other));
    for index in [6, 7, 8, 9, 4, 512] {
        let mut g = guest(0, index);
        assert_eq!(g.expect(R::Vmfunc).instruction_length, 3, "{index}");
        assert_eq!(g.vmcs.guest.rip, CODE);
    }
    guest(1, 5).expect(R::Vmfunc);
    guest(64, 5).expect_event(ex::UD, None);
    let mut g = guest(0, 5);
    g.vmcs.controls.vm_functions = 0;
    g.expect(R::Vmfunc);
    let mut g = guest(0, 5);
    g.vmcs.controls.secondary.remove(S::ENABLE_VM_FUNCTIONS);
    g.expect_event(ex::UD, None);
}

/// PAUSE-loop exiting (SDM Vol. 3C §26.1.3).
#[test]
fn pause_loop_exiting() {
    // pause; dec ecx; jnz; hlt
    let bytes = [0xf3, 0x90, 0xff, 0xc9, 0x75, 0xfa, HLT];
    let run = |mut g: Guest, gap, window| {
        g.regs.gpr[gpr::RCX] = 1000;
        g.vmcs.controls.ple_gap = gap;
        g.vmcs.controls.ple_window = window;
        g.enter()
    };
    let ple = |g: Guest| g.secondary(S::PAUSE_LOOP_EXITING);
    let e = run(ple(Guest::long(&bytes)), u32::MAX, 1);
    assert_eq!((e.reason, e.instruction_length), (R::Pause, 2));
    assert_eq!(run(ple(Guest::long(&bytes)), u32::MAX, u32::MAX).reason, R::Hlt, "within the window");
    assert_eq!(run(ple(Guest::long(&bytes)), 0, 1).reason, R::Hlt, "each starts a loop");
    assert_eq!(run(Guest::long(&bytes), u32::MAX, 1).reason, R::Hlt, "without the control");
    // Not at CPL 3, where HLT is #GP.
    assert_eq!(run(ple(Guest::user(&bytes)), u32::MAX, 1).reason, R::Vmcall);
}

/// VMREAD and VMWRITE against a shadow VMCS (SDM Vol. 3D chapter 31).
#[test]
fn vmcs_shadowing() {
    const SHADOW: u64 = 0xe_4000;
    const READ_MAP: u64 = 0xe_5000;
    const WRITE_MAP: u64 = 0xe_6000;
    let layout = || {
        ShadowLayout::new(
            [(0x0800, 0x10, 2), (0x2000, 0x18, 8), (0x4400, 0x20, 4), (0x6820, 0x28, 8)]
                .map(|(encoding, offset, width)| ShadowField { encoding, offset, width }),
        )
    };
    // vmread rax, rdx; hlt / vmwrite rdx, rax; hlt
    let (vmread, vmwrite): (&[u8], &[u8]) = (&[0x0f, 0x78, 0xd0, HLT], &[0x0f, 0x79, 0xd0, HLT]);
    let guest = |bytes: &[u8], encoding| {
        let mut g = Guest::long(bytes).with(gpr::RDX, encoding).with(gpr::RAX, 0x1122_3344_5566_7788);
        let engine = crate::SoftEngine::new(g.memory.clone()).unwrap().with_vmcs_shadowing(layout());
        assert!(engine.capabilities().has_secondary(S::VMCS_SHADOWING));
        g.vcpu = engine.create_vcpu().unwrap();
        g.vmcs.controls.secondary |= S::VMCS_SHADOWING;
        g.vmcs.controls.vmread_bitmap = MachineAddr(READ_MAP);
        g.vmcs.controls.vmwrite_bitmap = MachineAddr(WRITE_MAP);
        g.vmcs.controls.shadow_vmcs = MachineAddr(SHADOW);
        g.vmcs.guest.rflags |= rflags::CF | rflags::OF;
        for (offset, value) in [(0x10, 0x1234u64), (0x18, 0xaaaa_bbbb_cccc_dddd), (0x28, 0x77)] {
            g.write64(SHADOW + offset, value);
        }
        g
    };
    for (encoding, value) in
        [(0x800, 0x1234u64), (0x2000, 0xaaaa_bbbb_cccc_dddd), (0x2001, 0xaaaa_bbbb), (0x6820, 0x77)]
    {
        let mut g = guest(vmread, encoding);
        g.expect(R::Hlt);
        assert_eq!(g.regs.gpr[gpr::RAX], value, "{encoding:x}");
        assert_eq!(g.vmcs.guest.rflags & rflags::STATUS, 0, "VMsucceed");
    }
    for (encoding, offset, value) in [
        (0x800, 0x10, 0x7788u64),
        (0x2000, 0x18, 0x1122_3344_5566_7788),
        (0x2001, 0x18, 0x5566_7788_cccc_dddd),
        (0x4400, 0x20, 0x5566_7788),
    ] {
        let mut g = guest(vmwrite, encoding);
        g.expect(R::Hlt);
        assert_eq!(g.read64(SHADOW + offset), value, "{encoding:x}");
    }
    // Unsupported components: VMfailValid(12); high access only to 64-bit fields.
    for (bytes, encoding) in [(vmread, 0x802), (vmread, 0x801), (vmwrite, 0x6821)] {
        let mut g = guest(bytes, encoding);
        g.expect(R::Hlt);
        assert_eq!(g.vmcs.guest.rflags & rflags::STATUS, rflags::ZF);
        assert_eq!(g.read64(SHADOW + 0x20), 12);
    }
    // No shadow VMCS: VMfailInvalid.
    let mut g = guest(vmread, 0x800);
    g.vmcs.controls.shadow_vmcs = MachineAddr(u64::MAX);
    g.expect(R::Hlt);
    assert_eq!(g.vmcs.guest.rflags & rflags::STATUS, rflags::CF);
    // Exits: the bitmaps, each for its instruction, and bits above 14.
    let mut g = guest(vmread, 0x800);
    g.write(READ_MAP + 0x100, &[1]);
    g.expect(R::Vmread);
    let mut g = guest(vmwrite, 0x800);
    g.write(READ_MAP + 0x100, &[1]);
    g.expect(R::Hlt);
    g = guest(vmwrite, 0x800);
    g.write(WRITE_MAP + 0x100, &[1]);
    g.expect(R::Vmwrite);
    guest(vmread, 0x1_0800).expect(R::Vmread);
    let mut g = guest(vmread, 0x800);
    g.vmcs.controls.secondary.remove(S::VMCS_SHADOWING);
    g.expect(R::Vmread);
    // Memory operands: vmread [rbx], rdx at a page that isn't there faults.
    let mut g = guest(&[0x0f, 0x78, 0x13, HLT], 0x6820).with(gpr::RBX, DATA);
    g.expect(R::Hlt);
    assert_eq!(g.read64(DATA), 0x77);
    let mut g = guest(&[0x0f, 0x78, 0x13, HLT], 0x6820).with(gpr::RBX, NOT_PRESENT);
    g.expect_event(ex::PF, Some(2));
}

/// In the wait-for-SIPI state the preemption timer doesn't exit (SDM Vol. 3C §26.5.1), nor do windows
/// or virtual interrupts; the kick does, by which L0 makes the exit of a start-up IPI.
#[test]
fn wait_for_sipi_blocks_events() {
    let mut g = delivering(&[0x90], 0x61, 0).primary(C::NMI_WINDOW_EXITING).patch(|g| {
        g.vmcs.guest.activity = Activity::WaitForSipi;
        g.vmcs.controls.pin |= PinbasedControls::VMX_PREEMPTION_TIMER;
        g.vmcs.guest.preemption_timer = 0;
    });
    g.vcpu.kicker().kick();
    g.expect(R::ExternalInterrupt);
    assert_eq!(g.vmcs.guest.interrupt_status, status(0x61, 0));
}

/// An inactive guest waits without a timer until it is kicked (SDM Vol. 3C §25.4.2).
#[test]
fn kick_ends_the_wait_of_an_inactive_guest() {
    for activity in [Activity::Hlt, Activity::Shutdown, Activity::WaitForSipi] {
        let mut g = Guest::long(&[0x90]).patch(|g| g.vmcs.guest.activity = activity);
        let kicker = g.vcpu.kicker();
        let thread = std::thread::spawn(move || kicker.kick());
        g.expect(R::ExternalInterrupt);
        thread.join().unwrap();
        assert_eq!((g.vmcs.guest.activity, g.vmcs.guest.rip), (activity, CODE));
    }
}

/// Virtualized writes by instructions of every kind: string, locked, x87, push.
#[test]
fn apic_page_writes_by_kind() {
    let run = |bytes: &[u8], register, value: u64| {
        let mut g = apic(bytes, S::VIRTUALIZE_APIC_REGISTER)
            .with(register, APIC + 0x80)
            .with(gpr::RAX, value)
            .with(gpr::RCX, 1);
        g.write(VIRTUAL_APIC + 0x80, &[0x50]);
        g.vmcs.controls.tpr_threshold = 3;
        g
    };
    // rep stosd; nop
    let mut g = run(&[0xf3, 0xab, 0x90, HLT], gpr::RDI, 0x10);
    g.expect(R::TprBelowThreshold);
    assert_eq!((g.vmcs.guest.rip, g.regs.gpr[gpr::RCX]), (CODE + 2, 0));
    // lock and [rbx], eax; nop
    let mut g = run(&[0xf0, 0x21, 0x03, 0x90, HLT], gpr::RBX, 0x1f);
    g.expect(R::TprBelowThreshold);
    assert_eq!((g.vmcs.guest.rip, g.read32(VIRTUAL_APIC + 0x80)), (CODE + 3, 0x10));
    // fldz; fstp dword [rbx]; nop
    let mut g = run(&[0xd9, 0xee, 0xd9, 0x1b, 0x90, HLT], gpr::RBX, 0);
    g.expect(R::TprBelowThreshold);
    assert_eq!((g.vmcs.guest.rip, g.read32(VIRTUAL_APIC + 0x80)), (CODE + 4, 0));
    // The second element of a string is elsewhere, and exits; the first is done.
    let mut g = run(&[0xf3, 0xab, HLT], gpr::RDI, 0x40).with(gpr::RCX, 2);
    let e = g.expect(R::ApicAccess);
    assert_eq!((e.qualification, g.regs.gpr[gpr::RCX]), (1 << 12 | 0x84, 1));
    assert_eq!(g.read32(VIRTUAL_APIC + 0x80), 0x40);
    // push of 8 bytes
    let mut g = run(&[0x50], gpr::RSP, 0);
    assert_eq!(g.expect(R::ApicAccess).qualification, 1 << 12 | 0x78);
    assert_eq!(g.vmcs.guest.rsp, APIC + 0x80);
}

/// Interrupts that L0 posts between two entries are delivered at the next (SDM Vol. 3C §30.6).
#[test]
fn posted_interrupts_are_delivered() {
    const DESCRIPTOR: u64 = 0xe_7000;
    let mut g = delivering(&[HLT], 0, 0).patch(|g| {
        g.vmcs.controls.posted_descriptor = MachineAddr(DESCRIPTOR);
        g.write64(DESCRIPTOR + 8, 1 << (0x51 - 64) | 1 << (0x62 - 64));
        g.write64(DESCRIPTOR + 32, 1);
    });
    assert!(engine::post_interrupts(&g.memory, &mut g.vmcs));
    g.expect_event(0x62, None);
    assert_eq!(g.vmcs.guest.interrupt_status, status(0x51, 0x62));
    assert_eq!(g.read64(DESCRIPTOR + 32), 0);
}
