//! 64-bit kernel code with KVM and the software engine behind it. Where `/dev/kvm` can't be used they say so
//! and end. They hold whatever kind of KVM it is.

use super::*;
use engine_soft::SoftEngine;
use memory::MachineAddr;
use x86_spec::ept;
use x86_spec::reg::cr0;

use crate::tests::{CODE, MSR_BITMAP, TABLES, map_low_memory};

/// Guest paging: PML4, PDPT, page directory with one large page.
const PAGING: u64 = 0x10_0000;
/// Handlers: HLT and NOPs, 16 bytes for each vector.
const HANDLERS: u64 = 0x2000;
const IDT: u64 = 0x3000;
const GDT: u64 = 0x4000;
const DATA: u64 = 0x5000;
const CODE64: u64 = 0x00af_9b00_0000_ffff;
const DATA64: u64 = 0x00cf_9300_0000_ffff;

struct Rig {
    vcpu: HybridVcpu<SoftEngine>,
    vmcs: EngineVmcs,
    regs: GuestRegs,
    memory: Arc<MachineMemory>,
}

fn rig(code: &[u8]) -> Option<Rig> {
    let memory = Arc::new(MachineMemory::new(3 << 20).unwrap());
    let soft = SoftEngine::new(memory.clone()).unwrap();
    let engine = match HybridEngine::new(memory.clone(), soft) {
        Ok(e) => e,
        Err(e) => {
            eprintln!("skipped: {e}");
            return None;
        }
    };
    map_low_memory(&memory);
    let put = |at: u64, v: u64| memory.write_u64(MachineAddr(at), v).unwrap();
    // Present, writable, for user code too.
    put(PAGING, (PAGING + 0x1000) | 7);
    put(PAGING + 0x1000, (PAGING + 0x2000) | 7);
    put(PAGING + 0x2000, 1 << 7 | 7);
    put(GDT + 8, CODE64);
    put(GDT + 16, DATA64);
    for vector in 0..32 {
        let at = HANDLERS + 16 * vector;
        memory.write(MachineAddr(at), &[0xf4, 0x90, 0x90]).unwrap();
        put(IDT + 16 * vector, at & 0xffff | 8 << 16 | 0x8e00 << 32);
    }
    memory.write(MachineAddr(CODE), code).unwrap();
    let mut vmcs = EngineVmcs::default();
    let c = &mut vmcs.controls;
    c.lenient = true;
    c.primary = PrimaryControls::HLT_EXITING
        | PrimaryControls::UNCOND_IO_EXITING
        | PrimaryControls::USE_MSR_BITMAPS
        | PrimaryControls::SECONDARY_CONTROLS;
    c.secondary = x86_spec::controls::SecondaryControls::ENABLE_EPT
        | x86_spec::controls::SecondaryControls::UNRESTRICTED_GUEST;
    c.entry = EntryControls::IA32E_MODE_GUEST | EntryControls::LOAD_IA32_EFER;
    c.eptp = ept::eptp(TABLES, false);
    c.msr_bitmap = MachineAddr(MSR_BITMAP);
    c.cr4_mask = cr4::VMXE;
    let g = &mut vmcs.guest;
    g.preemption_timer = NEVER;
    (g.cr0, g.cr3, g.cr4) = (cr0::PE | cr0::PG | cr0::ET | cr0::NE, PAGING, cr4::PAE | cr4::OSFXSR);
    g.efer = efer::LME | efer::LMA;
    let data = Segment { base: 0, limit: u32::MAX, access: AccessRights(0xc093), selector: 16 };
    for i in [seg::DS, seg::ES, seg::SS, seg::FS, seg::GS] {
        g.segments[i] = data;
    }
    g.segments[seg::CS] = Segment { access: AccessRights(0xa09b), selector: 8, ..data };
    (g.gdtr.base, g.gdtr.limit) = (GDT, 0x17);
    (g.idtr.base, g.idtr.limit) = (IDT, 0x1ff);
    (g.rip, g.rsp) = (CODE, 0x800);
    let mut regs = GuestRegs::reset();
    regs.gpr[gpr::RSI] = DATA;
    let mut vcpu = engine.create_vcpu().unwrap();
    // Whatever its flaws, these tests are of what it can.
    vcpu.trusts = true;
    vcpu.takes_vmxe = vcpu.kvm.takes_cr4(cr4::VMXE).unwrap();
    Some(Rig { vcpu, vmcs, regs, memory })
}

impl Rig {
    fn enter(&mut self) -> VmExit {
        let exit = self.vcpu.enter(&mut self.vmcs, &mut self.regs);
        assert!(!exit.entry_failure, "{:?}", self.vcpu.failure());
        exit
    }
    fn skip(&mut self, exit: &VmExit) {
        self.vmcs.guest.rip += u64::from(exit.instruction_length);
    }
    /// Lets the guest read IA32_VMX_BASIC, as its code does first.
    fn read_vmx_basic(&mut self) {
        let exit = self.enter();
        assert_eq!((exit.reason, self.regs.gpr[gpr::RCX]), (ExitReason::Rdmsr, IA32_VMX_BASIC));
        self.skip(&exit);
    }
}

/// mov ecx, 480h; rdmsr
const READ_VMX_BASIC: [u8; 7] = [0xb9, 0x80, 0x04, 0, 0, 0x0f, 0x32];

fn after_vmx_basic(code: &[u8]) -> Vec<u8> {
    [&READ_VMX_BASIC, code].concat()
}

#[test]
fn a_context_that_demands_exits_is_not_for_kvm() {
    let kvm = crate::capabilities::capabilities();
    let mut vmcs = EngineVmcs::default();
    assert_eq!(can_run(&vmcs, &kvm), Err(NotForKvm::Strict), "CPUID exits (SDM Vol. 3C §26.1.2)");
    vmcs.controls.lenient = true;
    vmcs.controls.primary = PrimaryControls::HLT_EXITING | PrimaryControls::CR8_LOAD_EXITING;
    assert_eq!(can_run(&vmcs, &kvm), Ok(()));
    vmcs.controls.primary |= PrimaryControls::RDTSC_EXITING;
    assert_eq!(can_run(&vmcs, &kvm), Err(NotForKvm::Control(PrimaryControls::RDTSC_EXITING)));
    // An NMI window opens after IRET, not some time later (SDM Vol. 3C §26.2).
    vmcs.controls.primary = PrimaryControls::NMI_WINDOW_EXITING;
    assert_eq!(can_run(&vmcs, &kvm), Err(NotForKvm::Control(PrimaryControls::NMI_WINDOW_EXITING)));
    vmcs.controls.primary = PrimaryControls::empty();
    vmcs.controls.exception_bitmap = 1 << 14;
    assert_eq!(can_run(&vmcs, &kvm), Err(NotForKvm::Exceptions(1 << 14)));
    vmcs.controls.exception_bitmap = 0;
    vmcs.guest.activity = Activity::WaitForSipi;
    assert_eq!(can_run(&vmcs, &kvm), Err(NotForKvm::Activity(Activity::WaitForSipi)));
}

#[test]
fn what_kvm_does_not_emulate_is_executed_all_the_same() {
    // movq xmm1, rsi; paddq xmm1, xmm1; movq [rsi], xmm1; hlt
    let code = [0x66, 0x48, 0x0f, 0x6e, 0xce, 0x66, 0x0f, 0xd4, 0xc9, 0x66, 0x0f, 0xd6, 0x0e, 0xf4];
    let Some(mut r) = rig(&code) else { return };
    assert_eq!(r.enter().reason, ExitReason::Hlt);
    assert_eq!(r.memory.read_u64(MachineAddr(DATA)).unwrap(), 2 * DATA);
    let left = r.vcpu.hand_overs().unwrap();
    let direct = !crate::probe().unwrap().flaws.contains(&Flaw::KernelCode);
    assert_eq!(left == HandOvers::default(), direct, "{left:?}");
}

#[test]
fn vector_state_goes_to_the_other_engine_and_back() {
    // movq xmm1, rsi; hlt; paddq xmm1, xmm1; movq [rsi], xmm1; hlt. The second part is run by the exact
    // engine, the third by KVM where it can.
    let code =
        [0x66, 0x48, 0x0f, 0x6e, 0xce, 0xf4, 0x66, 0x0f, 0xd4, 0xc9, 0xf4, 0x66, 0x0f, 0xd6, 0x0e, 0xf4];
    let Some(mut r) = rig(&code) else { return };
    for lenient in [true, false, true] {
        r.vmcs.controls.lenient = lenient;
        let exit = r.enter();
        assert_eq!(exit.reason, ExitReason::Hlt);
        r.skip(&exit);
    }
    assert_eq!(r.memory.read_u64(MachineAddr(DATA)).unwrap(), 2 * DATA);
    assert_eq!(r.regs.fpu.vectors[1][0], 2 * DATA);
}

#[test]
fn a_vmx_instruction_exits_with_its_information() {
    // vmxon [rsi + 8]
    let code = after_vmx_basic(&[0xf3, 0x0f, 0xc7, 0x76, 0x08]);
    let Some(mut r) = rig(&code) else { return };
    r.read_vmx_basic();
    let exit = r.enter();
    assert_eq!((exit.reason, exit.instruction_length), (ExitReason::Vmxon, 5));
    assert_eq!(exit.qualification, 8, "the displacement (SDM Vol. 3C §28.2.1)");
    assert_eq!((r.vmcs.guest.rip, r.vmcs.guest.rsp), (CODE + 7, 0x800), "before the instruction");
    assert_eq!(r.vmcs.guest.rflags & rflags::RF, 0);
}

#[test]
fn setting_vmxe_exits_or_is_seen() {
    // mov rax, cr4; bts eax, 13; mov cr4, rax; hlt
    let code = after_vmx_basic(&[0x0f, 0x20, 0xe0, 0x0f, 0xba, 0xe8, 13, 0x0f, 0x22, 0xe0, 0xf4]);
    let Some(mut r) = rig(&code) else { return };
    r.read_vmx_basic();
    let exit = r.enter();
    if exit.reason == ExitReason::CrAccess {
        assert_eq!((exit.qualification & 0xf, r.vmcs.guest.rip), (4, CODE + 14));
        // L0 agrees, and the instruction runs again.
        r.vmcs.controls.cr4_shadow = cr4::VMXE;
        assert_eq!(r.enter().reason, ExitReason::Hlt);
    } else {
        assert_eq!(exit.reason, ExitReason::Hlt);
    }
    assert_eq!(r.vmcs.guest.rip, CODE + 17);
    assert_eq!(r.vmcs.controls.cr4_shadow, cr4::VMXE);
    assert_eq!(r.vmcs.guest.cr4 & cr4::VMXE, 0, "in the shadow alone");
}

#[test]
fn a_true_fault_is_the_guest_s() {
    // ud2
    let code = after_vmx_basic(&[0x0f, 0x0b]);
    let Some(mut r) = rig(&code) else { return };
    r.read_vmx_basic();
    assert_eq!(r.enter().reason, ExitReason::Hlt);
    assert_eq!(r.vmcs.guest.rip, HANDLERS + 16 * 6);
    // SDM Vol. 3A §6.14.2: RIP, CS, RFLAGS, RSP, SS, with RSP aligned before.
    let word = |i: u64| r.memory.read_u64(MachineAddr(r.vmcs.guest.rsp + 8 * i)).unwrap();
    assert_eq!((word(0), word(1), word(3), word(4)), (CODE + 7, 8, 0x800, 16));
}

#[test]
fn syscall_enters_the_kernel() {
    // syscall; where it leads: hlt
    let Some(mut r) = rig(&[0x0f, 0x05]) else { return };
    r.vcpu.trusts = crate::probe().unwrap().flaws.is_empty();
    let g = &mut r.vmcs.guest;
    g.efer |= efer::SCE;
    for (i, access, selector) in [(seg::CS, 0xa0fb, 0x33), (seg::SS, 0xc0f3, 0x2b)] {
        g.segments[i] = Segment { access: AccessRights(access), selector, ..g.segments[i] };
    }
    (r.regs.msrs.star, r.regs.msrs.lstar) = (0x0023_0010 << 32, HANDLERS);
    assert_eq!(r.enter().reason, ExitReason::Hlt);
    let g = &r.vmcs.guest;
    assert_eq!((g.rip, r.regs.gpr[gpr::RCX]), (HANDLERS, CODE + 2));
    let segments = [seg::CS, seg::SS].map(|i| (g.segments[i].selector, g.segments[i].access.dpl()));
    assert_eq!(segments, [(0x10, 0), (0x18, 0)], "SDM Vol. 2B, SYSCALL");
}

#[test]
fn a_kvm_with_flaws_runs_nothing() {
    let Some(mut r) = rig(&[0xf4]) else { return };
    r.vcpu.trusts = false;
    assert_eq!(r.enter().reason, ExitReason::Hlt);
    assert_eq!(r.vcpu.hand_overs().unwrap(), HandOvers { entries: 1, instructions: 0 });
    assert!(r.vcpu.shown, "KVM has run nothing");
}

#[test]
fn a_fault_that_l0_raises_is_the_guest_s() {
    // vmxon [rsi]
    let code = after_vmx_basic(&[0xf3, 0x0f, 0xc7, 0x36]);
    let Some(mut r) = rig(&code) else { return };
    r.read_vmx_basic();
    assert_eq!(r.enter().reason, ExitReason::Vmxon);
    r.vmcs.controls.entry_interruption =
        x86_spec::interruption::InterruptionInfo::new(UD, EventType::HardwareException, false);
    assert_eq!(r.enter().reason, ExitReason::Hlt);
    assert_eq!(r.vmcs.guest.rip, HANDLERS + 16 * 6);
}

#[test]
fn code_that_kvm_s_guest_writes_is_decoded_anew() {
    // mov byte [rip + 1], 0c0h changes "mov al, 1" below to "mov al, 0c0h"; hlt; mov al, 1; hlt
    let code = [0xc6, 0x05, 0x02, 0, 0, 0, 0xc0, 0xf4, 0xb0, 1, 0xf4];
    let Some(mut r) = rig(&code) else { return };
    // The exact engine decodes it first.
    r.vmcs.controls.lenient = false;
    r.vmcs.guest.rip = CODE + 8;
    assert_eq!(r.enter().reason, ExitReason::Hlt);
    assert_eq!(r.regs.gpr[gpr::RAX], 1);
    (r.vmcs.controls.lenient, r.vmcs.guest.rip) = (true, CODE);
    let exit = r.enter();
    assert_eq!(exit.reason, ExitReason::Hlt);
    r.skip(&exit);
    r.vmcs.controls.lenient = false;
    assert_eq!(r.enter().reason, ExitReason::Hlt);
    assert_eq!(r.regs.gpr[gpr::RAX], 0xc0);
}
