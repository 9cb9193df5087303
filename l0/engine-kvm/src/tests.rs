//! Tiny guests through [`engine::Vcpu`]. Where `/dev/kvm` can't be used they say so and end.

use super::*;
use engine::{EngineVmcs, ExitBus, GuestRegs, Vcpu, VmExit};
use memory::Gpa;
use x86_spec::controls::PrimaryControls;
use x86_spec::ept;
use x86_spec::exit::{ExitReason, io};
use x86_spec::interruption::{EventType, InterruptionInfo};
use x86_spec::reg::{gpr, rflags};
use x86_spec::segment::seg;

pub(crate) const TABLES: u64 = 2 << 20;
pub(crate) const MSR_BITMAP: u64 = TABLES + 0x4000;
pub(crate) const CODE: u64 = 0x1000;

/// EPT at [`TABLES`] that maps the first 2 MiB as they are, and an MSR bitmap with which all exit.
pub(crate) fn map_low_memory(memory: &MachineMemory) {
    let put = |at: u64, v: u64| memory.write_u64(MachineAddr(at), v).unwrap();
    put(TABLES, (TABLES + 0x1000) | ept::RWX);
    put(TABLES + 0x1000, (TABLES + 0x2000) | ept::RWX);
    put(TABLES + 0x2000, ept::RWX | ept::LARGE | ept::MEMTYPE_WB << ept::MEMTYPE_SHIFT);
    memory.fill(MachineAddr(MSR_BITMAP), 0xff, 4096).unwrap();
}

struct Rig {
    vcpu: KvmVcpu,
    vmcs: EngineVmcs,
    regs: GuestRegs,
    memory: Arc<MachineMemory>,
    engine: KvmEngine,
}

/// 2 MiB at guest-physical 0, all MSRs exiting, `code` at 1000H in real mode. `None` with a reason printed
/// where KVM can't be used.
fn rig(code: &[u8]) -> Option<Rig> {
    rig_with(code, false, Ok)
}

/// The same on an engine that has KVM decide what becomes of events, for `--vmx host`.
fn rig_serving_vmx(code: &[u8]) -> Option<Rig> {
    rig_with(code, true, Ok)
}

/// The same with local APICs in KVM; `None` also where it can't have them.
fn rig_with_apics(code: &[u8]) -> Option<Rig> {
    rig_with(code, false, |engine| match engine.can_have_local_apics() {
        true => engine.with_local_apics(),
        false => Err(unsupported("KVM_CAP_SPLIT_IRQCHIP is missing")),
    })
}

fn rig_with(
    code: &[u8],
    host_vmx: bool,
    choose: impl FnOnce(KvmEngine) -> Result<KvmEngine, EngineError>,
) -> Option<Rig> {
    let memory = Arc::new(MachineMemory::new(3 << 20).unwrap());
    let engine = match KvmEngine::open_with(memory.clone(), host_vmx).and_then(choose) {
        Ok(e) => e,
        Err(e) => {
            eprintln!("skipped: {e}");
            return None;
        }
    };
    map_low_memory(&memory);
    memory.write(MachineAddr(CODE), code).unwrap();
    let mut vmcs = EngineVmcs::default();
    vmcs.controls.eptp = ept::eptp(TABLES, false);
    vmcs.controls.msr_bitmap = MachineAddr(MSR_BITMAP);
    vmcs.guest.preemption_timer = u32::MAX;
    let cs = &mut vmcs.guest.segments[seg::CS];
    (cs.base, cs.selector) = (0, 0);
    vmcs.guest.rip = CODE;
    vmcs.guest.rsp = 0x800;
    let vcpu = engine.create_vcpu().unwrap();
    Some(Rig { vcpu, vmcs, regs: GuestRegs::reset(), memory, engine })
}

impl Rig {
    fn enter(&mut self) -> VmExit {
        let exit = self.vcpu.enter(&mut self.vmcs, &mut self.regs);
        assert!(!exit.entry_failure, "{:?}", self.vcpu.failure());
        exit
    }
    fn emulate(&mut self, bus: &mut Bus) {
        let exit = self.vcpu.emulate(&mut self.vmcs, &mut self.regs, bus);
        assert_eq!(exit, None, "{:?}", self.vcpu.failure());
    }
    fn settle(&mut self, bus: &mut Bus) {
        let exit = self.vcpu.settle(&mut self.vmcs, &mut self.regs, bus);
        assert_eq!(exit, None, "{:?}", self.vcpu.failure());
    }
    fn skip(&mut self, exit: &VmExit) {
        self.vmcs.guest.rip += u64::from(exit.instruction_length);
    }
}

/// Remembers what was written, answers reads with A5…H.
#[derive(Default)]
struct Bus(Vec<(u64, u8, u64)>);

impl ExitBus for Bus {
    fn mmio_read(&mut self, gpa: Gpa, size: u8) -> u64 {
        self.0.push((gpa.0, size, 0));
        0xa5a5_a5a5_a5a5_a5a5
    }
    fn mmio_write(&mut self, gpa: Gpa, size: u8, value: u64) {
        self.0.push((gpa.0, size, value));
    }
    fn pio_read(&mut self, port: u16, size: u8) -> u32 {
        self.0.push((port.into(), size, 0));
        0xa5a5_a5a5
    }
    fn pio_write(&mut self, port: u16, size: u8, value: u32) {
        self.0.push((port.into(), size, value.into()));
    }
}

#[test]
fn ports_are_answered_by_emulate_and_hlt_exits() {
    // mov al, 42h; out 80h, al; in al, 71h; hlt
    let Some(mut r) = rig(&[0xb0, 0x42, 0xe6, 0x80, 0xe4, 0x71, 0xf4]) else { return };
    let mut bus = Bus::default();
    let exit = r.enter();
    assert_eq!(exit.reason, ExitReason::IoInstruction);
    assert_eq!(exit.qualification, io::qualification(0x80, 1, 0));
    assert_eq!(exit.instruction_length, 0, "L0 must not do it itself");
    r.emulate(&mut bus);
    let exit = r.enter();
    assert_eq!(exit.qualification, io::qualification(0x71, 1, io::IN));
    r.emulate(&mut bus);
    assert_eq!(bus.0, [(0x80, 1, 0x42), (0x71, 1, 0)]);
    r.settle(&mut bus);
    assert_eq!((r.regs.gpr[gpr::RAX] & 0xff, r.vmcs.guest.rip), (0xa5, CODE + 6));
    let exit = r.enter();
    assert_eq!((exit.reason, exit.instruction_length), (ExitReason::Hlt, 1));
    assert_eq!(r.vmcs.guest.rip, CODE + 6);
}

#[test]
fn memory_that_no_slot_maps_is_answered_by_emulate() {
    // mov ax, 0ffffh; mov ds, ax; mov bx, [0fff0h+…]: unmapped only above 2 MiB, so protected "unreal"
    // addressing is set up through the hidden part of DS.
    let Some(mut r) = rig(&[0x8b, 0x1e, 0x10, 0x00, 0x89, 0x1e, 0x20, 0x00, 0xf4]) else { return };
    r.vmcs.guest.segments[seg::DS].base = 0x30_0000;
    let mut bus = Bus::default();
    let exit = r.enter();
    assert_eq!((exit.reason, exit.guest_physical), (ExitReason::EptViolation, Gpa(0x30_0010)));
    r.emulate(&mut bus);
    let exit = r.enter();
    assert_eq!(r.regs.gpr[gpr::RBX] & 0xffff, 0xa5a5, "finished on the way into the guest");
    assert_eq!((exit.reason, exit.guest_physical), (ExitReason::EptViolation, Gpa(0x30_0020)));
    r.emulate(&mut bus);
    assert_eq!(bus.0, [(0x30_0010, 2, 0), (0x30_0020, 2, 0xa5a5)]);
    assert_eq!(r.enter().reason, ExitReason::Hlt);
}

#[test]
fn msr_accesses_exit_with_their_length_and_l0_decides() {
    // mov ecx, 6e0h; rdmsr; wrmsr; hlt
    let Some(mut r) = rig(&[0x66, 0xb9, 0xe0, 0x06, 0, 0, 0x0f, 0x32, 0x0f, 0x30, 0xf4]) else { return };
    r.regs.gpr[gpr::RAX] = 0x1234;
    let exit = r.enter();
    assert_eq!((exit.reason, exit.instruction_length), (ExitReason::Rdmsr, 2));
    assert_eq!(r.vmcs.guest.rip, CODE + 6, "before the instruction");
    assert_eq!((r.regs.gpr[gpr::RAX], r.regs.gpr[gpr::RCX]), (0x1234, 0x6e0));
    (r.regs.gpr[gpr::RAX], r.regs.gpr[gpr::RDX]) = (7, 9);
    r.skip(&exit);
    let exit = r.enter();
    assert_eq!(exit.reason, ExitReason::Wrmsr);
    assert_eq!((r.regs.gpr[gpr::RAX], r.regs.gpr[gpr::RDX]), (7, 9));
    r.skip(&exit);
    assert_eq!(r.enter().reason, ExitReason::Hlt);
}

#[test]
fn an_msr_that_l0_refuses_raises_gp_at_the_instruction() {
    // rdmsr; at 1100H, the handler of #GP: hlt
    let Some(mut r) = rig(&[0x0f, 0x32]) else { return };
    r.memory.write(MachineAddr(13 * 4), &[0x00, 0x11, 0, 0]).unwrap();
    r.memory.write(MachineAddr(0x1100), &[0xf4]).unwrap();
    r.regs.gpr[gpr::RCX] = 0x6e0;
    assert_eq!(r.enter().reason, ExitReason::Rdmsr);
    r.vmcs.controls.entry_interruption = InterruptionInfo::new(13, EventType::HardwareException, false);
    assert_eq!(r.enter().reason, ExitReason::Hlt);
    assert_eq!(r.vmcs.guest.rip, 0x1100);
    let mut ip = [0; 2];
    r.memory.read(MachineAddr(r.vmcs.guest.rsp), &mut ip).unwrap();
    assert_eq!(u64::from(u16::from_le_bytes(ip)), CODE, "a fault: IP of the instruction");
}

#[test]
fn interrupts_wait_for_their_window_and_are_delivered() {
    // nop; sti; jmp $; vector 40H: hlt at 1100H
    let Some(mut r) = rig(&[0x90, 0xfb, 0xeb, 0xfe]) else { return };
    // Ends the test where no window would.
    r.vmcs.guest.preemption_timer = 1 << 26;
    r.memory.write(MachineAddr(0x40 * 4), &[0x00, 0x11, 0, 0]).unwrap();
    r.memory.write(MachineAddr(0x1100), &[0xf4]).unwrap();
    r.vmcs.controls.primary |= PrimaryControls::INTERRUPT_WINDOW_EXITING;
    let exit = r.enter();
    assert_eq!(exit.reason, ExitReason::InterruptWindow);
    assert_eq!(r.vmcs.guest.rip, CODE + 2);
    assert_ne!(r.vmcs.guest.rflags & rflags::IF, 0);
    r.vmcs.controls.primary -= PrimaryControls::INTERRUPT_WINDOW_EXITING;
    r.vmcs.controls.entry_interruption = InterruptionInfo::new(0x40, EventType::External, false);
    assert_eq!(r.enter().reason, ExitReason::Hlt);
    assert_eq!(r.vmcs.guest.rip, 0x1100);
    assert!(!r.vmcs.controls.entry_interruption.is_valid());
}

#[test]
fn an_event_goes_in_after_the_instruction_that_was_answered() {
    // sti; nop; in al, 71h; vector 40H: hlt at 1100H
    let Some(mut r) = rig(&[0xfb, 0x90, 0xe4, 0x71]) else { return };
    r.memory.write(MachineAddr(0x40 * 4), &[0x00, 0x11, 0, 0]).unwrap();
    r.memory.write(MachineAddr(0x1100), &[0xf4]).unwrap();
    let mut bus = Bus::default();
    assert_eq!(r.enter().reason, ExitReason::IoInstruction);
    r.emulate(&mut bus);
    r.settle(&mut bus);
    r.vmcs.controls.entry_interruption = InterruptionInfo::new(0x40, EventType::External, false);
    assert_eq!((r.enter().reason, r.vmcs.guest.rip), (ExitReason::Hlt, 0x1100));
    let mut ip = [0; 2];
    r.memory.read(MachineAddr(r.vmcs.guest.rsp), &mut ip).unwrap();
    assert_eq!(u64::from(u16::from_le_bytes(ip)), CODE + 4);
    assert_eq!((bus.0.len(), r.regs.gpr[gpr::RAX] & 0xff), (1, 0xa5));
}

#[test]
fn a_string_of_accesses_goes_on_at_the_next_entry() {
    // mov cx, 3; rep outsb to port 80h from 2000h; hlt
    let code = [0xb9, 3, 0, 0xba, 0x80, 0, 0xbe, 0, 0x20, 0xf3, 0x6e, 0xf4];
    let Some(mut r) = rig(&code) else { return };
    r.memory.write(MachineAddr(0x2000), b"abc").unwrap();
    let mut bus = Bus::default();
    let mut exit = r.enter();
    while exit.reason == ExitReason::IoInstruction {
        r.emulate(&mut bus);
        exit = r.enter();
    }
    assert_eq!(exit.reason, ExitReason::Hlt);
    assert_eq!(bus.0, [(0x80, 1, 0x61), (0x80, 1, 0x62), (0x80, 1, 0x63)]);
}

#[test]
fn kicks_and_the_preemption_timer_end_an_endless_loop() {
    // jmp $
    let Some(mut r) = rig(&[0xeb, 0xfe]) else { return };
    r.vmcs.guest.preemption_timer = 1000;
    assert_eq!(r.enter().reason, ExitReason::PreemptionTimer);
    r.vmcs.guest.preemption_timer = u32::MAX;
    let kicker = r.vcpu.kicker();
    kicker.kick();
    kicker.kick();
    assert_eq!(r.enter().reason, ExitReason::ExternalInterrupt, "a kick before the entry");
    let thread = std::thread::spawn(move || kicker.kick());
    // However the two threads run, this ends.
    assert_eq!(r.enter().reason, ExitReason::ExternalInterrupt);
    thread.join().unwrap();
}

/// `out 80h, al` at 1100H, the handler of `vector`: its exit says that it runs.
fn put_handler(r: &Rig, vector: u8, code: &[u8]) {
    r.memory.write(MachineAddr(u64::from(vector) * 4), &[0x00, 0x11, 0, 0]).unwrap();
    r.memory.write(MachineAddr(0x1100), code).unwrap();
}

#[test]
fn the_8259_interrupts_a_vcpu_that_waits_in_kvm() {
    // sti; hlt
    let Some(mut r) = rig_with_apics(&[0xfb, 0xf4]) else { return };
    put_handler(&r, 0x40, &[0xe6, 0x80]);
    r.vmcs.guest.preemption_timer = 1 << 20;
    assert_eq!(r.enter().reason, ExitReason::PreemptionTimer, "HLT does not exit");
    assert_eq!(r.vmcs.guest.rip, CODE + 2);
    assert!(r.vcpu.event_windows().unwrap().interrupt);
    r.vmcs.guest.preemption_timer = u32::MAX;
    r.vmcs.controls.entry_interruption = InterruptionInfo::new(0x40, EventType::External, false);
    let exit = r.enter();
    assert_eq!((exit.reason, exit.qualification), (ExitReason::IoInstruction, io::qualification(0x80, 1, 0)));
    assert!(!r.vmcs.controls.entry_interruption.is_valid());
    assert!(!r.vcpu.event_windows().unwrap().interrupt, "IF is 0 in the handler");
}

#[test]
fn the_8259_waits_for_the_window() {
    // nop; sti; jmp $
    let Some(mut r) = rig_with_apics(&[0x90, 0xfb, 0xeb, 0xfe]) else { return };
    put_handler(&r, 0x40, &[0xe6, 0x80]);
    // Ends the test where no window would.
    r.vmcs.guest.preemption_timer = 1 << 26;
    r.vmcs.controls.primary |= PrimaryControls::INTERRUPT_WINDOW_EXITING;
    assert_eq!(r.enter().reason, ExitReason::InterruptWindow);
    assert_ne!(r.vmcs.guest.rflags & rflags::IF, 0);
    r.vmcs.controls.primary -= PrimaryControls::INTERRUPT_WINDOW_EXITING;
    r.vmcs.controls.entry_interruption = InterruptionInfo::new(0x40, EventType::External, false);
    assert_eq!(r.enter().reason, ExitReason::IoInstruction);
}

#[test]
fn the_end_of_a_level_triggered_message_exits() {
    // sti; jmp $; vector 41H: mov [0b0h], eax; out 80h, al
    let Some(mut r) = rig_with_apics(&[0xfb, 0xeb, 0xfe]) else { return };
    if !probe().unwrap().flaws.is_empty() {
        eprintln!("skipped: the flawed KVM that was seen has no exits for the end of interrupts");
        return;
    }
    put_handler(&r, 0x41, &[0x66, 0xa3, 0xb0, 0x00, 0xe6, 0x80]);
    r.vmcs.guest.segments[seg::DS].base = 0xfee0_0000;
    r.vmcs.guest.preemption_timer = 1 << 26;
    let apics = r.engine.local_apics().unwrap();
    // Asserted and level-triggered, to APIC 0 (SDM Vol. 3A §11.11).
    let level = engine::Message { address: 0xfee0_0000, data: 0xc041 };
    apics.set_level_messages(&[None, Some(level)]);
    assert!(apics.send(level));
    let exit = r.enter();
    assert_eq!((exit.reason, exit.qualification), (ExitReason::VirtualizedEoi, 0x41));
    assert_eq!(r.enter().reason, ExitReason::IoInstruction);
}

#[test]
fn edge_triggered_messages_come_and_end_in_kvm() {
    // sti; jmp $; vector 41H: mov [0b0h], eax; out 80h, al; iret
    let Some(mut r) = rig_with_apics(&[0xfb, 0xeb, 0xfe]) else { return };
    put_handler(&r, 0x41, &[0x66, 0xa3, 0xb0, 0x00, 0xe6, 0x80, 0xcf]);
    r.vmcs.guest.segments[seg::DS].base = 0xfee0_0000;
    r.vmcs.guest.preemption_timer = 1 << 26;
    let apics = r.engine.local_apics().unwrap();
    let mut bus = Bus::default();
    for _ in 0..2 {
        assert!(apics.send(engine::Message { address: 0xfee0_0000, data: 0x41 }));
        assert_eq!(r.enter().reason, ExitReason::IoInstruction, "the one before has ended");
        r.emulate(&mut bus);
    }
}

#[test]
fn a_triple_fault_exits() {
    // ud2 in protected mode with an empty IDT
    let Some(mut r) = rig(&[0x0f, 0x0b]) else { return };
    r.vmcs.guest.cr0 |= x86_spec::reg::cr0::PE;
    r.vmcs.guest.idtr.limit = 0;
    assert_eq!(r.enter().reason, ExitReason::TripleFault);
}

#[test]
fn cmpxchg16b_is_offered_where_it_runs() {
    let Some(r) = rig(&[0xf4]) else { return };
    let memory = Arc::new(MachineMemory::new(4096).unwrap());
    let offered = KvmEngine::new(memory).unwrap().supported_features(1, 0)[2] & 1 << 13 != 0;
    let claimed = r.engine.supported_features(1, 0)[2] & 1 << 13 != 0;
    assert_eq!(offered, claimed && !probe().unwrap().flaws.contains(&Flaw::KernelCode));
}

/// What KVM does with an interrupt while its guest runs a guest of its own can only be seen where it has VMX (the
/// scenario depth-3 does); that the guest takes it at all, and when, everywhere.
#[test]
fn kvms_own_local_apic_passes_interrupts_on() {
    // nop; out 80h, al; sti; hlt; jmp $; vector 40H: out 81h, al at 1100H
    let Some(mut r) = rig_serving_vmx(&[0x90, 0xe6, 0x80, 0xfb, 0xf4, 0xeb, 0xfe]) else { return };
    r.memory.write(MachineAddr(0x40 * 4), &[0x00, 0x11, 0, 0]).unwrap();
    r.memory.write(MachineAddr(0x1100), &[0xe6, 0x81]).unwrap();
    let open = |r: &Rig| r.vcpu.event_windows().expect("KVM decides").interrupt;
    let mut bus = Bus::default();
    assert_eq!(r.enter().reason, ExitReason::IoInstruction);
    assert!(!open(&r), "IF is 0");
    r.emulate(&mut bus);
    r.vmcs.controls.primary |= PrimaryControls::INTERRUPT_WINDOW_EXITING;
    let exit = r.enter();
    assert_eq!(
        (exit.reason, r.vmcs.guest.rip),
        (ExitReason::InterruptWindow, CODE + 5),
        "STI blocks them for one instruction"
    );
    assert!(open(&r));
    r.vmcs.controls.primary -= PrimaryControls::INTERRUPT_WINDOW_EXITING;
    r.vmcs.controls.entry_interruption = InterruptionInfo::new(0x40, EventType::External, false);
    // A kick before the entry: the interrupt is KVM's by then, and there is no room for a second one.
    r.vcpu.kicker().kick();
    assert_eq!(r.enter().reason, ExitReason::ExternalInterrupt);
    assert!(!r.vmcs.controls.entry_interruption.is_valid() && !open(&r));
    let exit = r.enter();
    assert_eq!((exit.reason, r.vmcs.guest.rip), (ExitReason::IoInstruction, 0x1102));
    assert_eq!(exit.qualification, io::qualification(0x81, 1, 0));
}

#[test]
fn with_its_own_local_apic_kvm_waits_in_hlt_until_a_kick_or_an_interrupt() {
    // sti; hlt; jmp $; vector 40H: out 81h, al at 1100H
    let Some(mut r) = rig_serving_vmx(&[0xfb, 0xf4, 0xeb, 0xfe]) else { return };
    r.memory.write(MachineAddr(0x40 * 4), &[0x00, 0x11, 0, 0]).unwrap();
    r.memory.write(MachineAddr(0x1100), &[0xe6, 0x81]).unwrap();
    r.vmcs.guest.preemption_timer = 1 << 20;
    let exit = r.enter();
    assert_eq!((exit.reason, r.vmcs.guest.rip), (ExitReason::PreemptionTimer, CODE + 2), "halted");
    assert!(r.vcpu.event_windows().unwrap().interrupt);
    r.vmcs.controls.entry_interruption = InterruptionInfo::new(0x40, EventType::External, false);
    assert_eq!((r.enter().reason, r.vmcs.guest.rip), (ExitReason::IoInstruction, 0x1102));
    let mut ip = [0; 2];
    r.memory.read(MachineAddr(r.vmcs.guest.rsp), &mut ip).unwrap();
    assert_eq!(u64::from(u16::from_le_bytes(ip)), CODE + 2, "behind HLT");
}

#[test]
fn task_priorities_and_faults_go_to_kvm_and_back_with_its_own_local_apic() {
    // rdmsr; #GP: out 80h, al at 1100H
    let Some(mut r) = rig_serving_vmx(&[0x0f, 0x32]) else { return };
    r.memory.write(MachineAddr(13 * 4), &[0x00, 0x11, 0, 0]).unwrap();
    r.memory.write(MachineAddr(0x1100), &[0xe6, 0x80]).unwrap();
    r.regs.gpr[gpr::RCX] = 0x6e0;
    r.regs.cr8 = 5;
    assert_eq!(r.enter().reason, ExitReason::Rdmsr);
    assert_eq!(r.regs.cr8, 5);
    r.vmcs.controls.entry_interruption = InterruptionInfo::new(13, EventType::HardwareException, false);
    assert_eq!((r.enter().reason, r.vmcs.guest.rip), (ExitReason::IoInstruction, 0x1102));
    let mut ip = [0; 2];
    r.memory.read(MachineAddr(r.vmcs.guest.rsp), &mut ip).unwrap();
    assert_eq!(u64::from(u16::from_le_bytes(ip)), CODE, "a fault: IP of the instruction");
}

#[test]
fn without_vmx_in_kvm_the_reason_and_a_remedy_are_named() {
    let Ok(kvm) = Kvm::new() else { return eprintln!("skipped: no /dev/kvm") };
    let why = |has: fn(u32, u32) -> bool| host_vmx::check(&kvm, has).err().map(|e| e.to_string());
    // CPUID 80000001H:ECX bit 2 (AMD APM Vol. 3, E.4.2).
    let svm = why(|leaf, bits| (leaf, bits) == (0x8000_0001, 1 << 2)).expect("SVM is not VMX");
    assert!(svm.contains("SVM") && svm.contains("--engine soft"), "{svm}");
    let none = why(|_, _| false).expect("there is none");
    assert!(none.contains("no VMX") && none.contains("--engine soft"), "{none}");
}
