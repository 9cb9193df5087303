//! What L0 does about each VM exit of L1 (SDM Vol. 3C ch. 26 and 28).
//!
//! [`route`] is the one table: who owns an exit reason, why, and which function handles it.

use devices::GpFault;
use engine::{Engine, Vcpu, VmExit, interruptibility, pending_debug};
use x86_spec::exception;
use x86_spec::exit::{ExitReason, cr_access, ept_violation, io};
use x86_spec::interruption::EventType;
use x86_spec::reg::{efer, gpr, rflags, xcr0};
use x86_spec::segment::seg;

use crate::board::Board;
use crate::cpuid::CpuidState;
use crate::msr::{ApicMsrs, MsrContext};
use crate::nested::vmx_instruction;
use crate::report::CrashCause;
use crate::vcpu_loop::{RunEnd, VcpuLoop};

/// Who handles an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// L0 itself.
    L0,
}

/// What becomes of the vCPU after an exit.
#[derive(Debug)]
pub enum Outcome {
    /// The guest goes on.
    Resume,
    /// The guest waits for an interrupt.
    Halt,
    /// The machine stops.
    End(RunEnd),
}

/// A function that handles an exit.
pub type Handler<E> = fn(&mut VcpuLoop<E>, &VmExit) -> Outcome;

/// One line of the routing table.
pub struct Route<E: Engine> {
    /// Who handles the exit.
    pub owner: Owner,
    /// Why.
    pub why: &'static str,
    /// How.
    pub handler: Handler<E>,
}

/// Where an exit of L1 for `reason` goes.
pub fn route<E: Engine>(reason: ExitReason) -> Route<E> {
    use ExitReason as R;
    let l0 = |why, handler| Route { owner: Owner::L0, why, handler };
    match reason {
        R::ExternalInterrupt => l0("a kick by another thread, or a performance counter's interrupt", resume),
        R::PreemptionTimer => l0("a device's deadline", resume),
        R::InterruptWindow | R::NmiWindow => l0("L1 can take the event that waits", resume),
        R::ExceptionOrNmi => l0("only NMIs can cause it: no exception is intercepted", exception_or_nmi),
        R::TripleFault => l0("L1 can't go on", triple_fault),
        R::TaskSwitch => l0("always exits; not supported", task_switch),
        R::Cpuid => l0("L0 decides what L1 sees", cpuid),
        R::Hlt => l0("the host's processor is not L1's to hold", hlt),
        R::CrAccess => l0("CR8 is the local APIC's; CR4 bits that are not offered", cr_access),
        R::IoInstruction => l0("ports are L0's devices", io_instruction),
        R::Rdmsr => l0("MSRs outside of the context", rdmsr),
        R::Wrmsr => l0("MSRs outside of the context", wrmsr),
        R::EptViolation => l0("device memory", ept_violation),
        R::EptMisconfiguration => l0("EPT01 is L0's", ept_misconfiguration),
        R::Xsetbv => l0("L0 decides which state components L1 uses", xsetbv),
        R::Invd | R::Wbinvd => l0("caches are coherent: nothing to do", skip),
        R::Vmcall
        | R::Vmclear
        | R::Vmlaunch
        | R::Vmptrld
        | R::Vmptrst
        | R::Vmread
        | R::Vmresume
        | R::Vmwrite
        | R::Vmxoff
        | R::Vmxon
        | R::Vmfunc
        | R::Invept
        | R::Invvpid => l0("L1's VMX is emulated", vmx_instruction),
        R::VirtualizedEoi => l0("the I/O APIC is L0's, the local APIC the engine's", virtualized_eoi),
        R::Mwait => l0("L0 waits on the guest's behalf", mwait),
        R::Monitor => l0("MONITOR is not offered or not enabled", invalid_opcode),
        R::Getsec | R::Rsm | R::Umwait | R::Tpause | R::Encls => l0("not offered", invalid_opcode),
        R::InvalidGuestState | R::MsrLoading | R::MachineCheckOnEntry => l0("VMCS01 is L0's", failed_entry),
        R::Init
        | R::Sipi
        | R::IoSmi
        | R::OtherSmi
        | R::Invlpg
        | R::Rdpmc
        | R::Rdtsc
        | R::Rdtscp
        | R::MovDr
        | R::MonitorTrapFlag
        | R::Pause
        | R::TprBelowThreshold
        | R::ApicAccess
        | R::GdtrIdtrAccess
        | R::LdtrTrAccess
        | R::ApicWrite
        | R::Rdrand
        | R::Invpcid
        | R::Rdseed
        | R::PmlFull
        | R::Xsaves
        | R::Xrstors => l0("VMCS01 does not ask for it", unexpected),
    }
}

fn resume<E: Engine>(_: &mut VcpuLoop<E>, _: &VmExit) -> Outcome {
    Outcome::Resume
}

/// The engine's local APIC ended an interrupt of a level-triggered pin: its vector is in the qualification
/// (SDM Vol. 3C table 28-1).
fn virtualized_eoi<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    cpu.board().interrupts().end_of_interrupt(exit.qualification as u8);
    Outcome::Resume
}

fn skip<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    cpu.skip_instruction(exit);
    Outcome::Resume
}

fn general_protection<E: Engine>(cpu: &mut VcpuLoop<E>, _: &VmExit) -> Outcome {
    cpu.inject_exception(exception::GP, Some(0));
    Outcome::Resume
}

fn invalid_opcode<E: Engine>(cpu: &mut VcpuLoop<E>, _: &VmExit) -> Outcome {
    cpu.inject_exception(exception::UD, None);
    Outcome::Resume
}

fn unexpected<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    Outcome::End(RunEnd::Internal(format!(
        "the engine exited with {} at {:#x}, which VMCS01 does not ask for",
        exit.reason.name(),
        cpu.vmcs.guest.rip
    )))
}

/// VM entry with VMCS01 failed (SDM Vol. 3C §27.8): L0 built a state that it must not.
fn failed_entry<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    if let Some(why) = cpu.vcpu.failure() {
        return Outcome::End(RunEnd::Engine(why.to_owned()));
    }
    let g = &cpu.vmcs.guest;
    Outcome::End(RunEnd::Internal(format!(
        "VM entry with VMCS01 failed: {}, qualification {}; rip {:#x}, cr0 {:#x}, cr4 {:#x}, efer {:#x}, \
         rflags {:#x}, interruptibility {:#x}, injecting {:#x}",
        exit.reason.name(),
        exit.qualification,
        g.rip,
        g.cr0,
        g.cr4,
        g.efer,
        g.rflags,
        g.interruptibility,
        cpu.vmcs.controls.entry_interruption.0
    )))
}

fn exception_or_nmi<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    match exit.interruption_info.event_type() {
        // A host NMI; the host has handled it.
        EventType::Nmi => Outcome::Resume,
        _ => unexpected(cpu, exit),
    }
}

fn triple_fault<E: Engine>(cpu: &mut VcpuLoop<E>, _: &VmExit) -> Outcome {
    cpu.crash(CrashCause::TripleFault)
}

/// SDM Vol. 3C table 28-2: the selector is in bits 15:0.
fn task_switch<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    cpu.crash(CrashCause::TaskSwitch { selector: exit.qualification as u16 })
}

fn cpuid<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    // IA32_APIC_BASE.EN; the register can always be read.
    let base = cpu.board().interrupts().read_msr(cpu.index(), x86_spec::msr::IA32_APIC_BASE).unwrap_or(0);
    let state = CpuidState {
        cr4: cpu.vmcs.guest.cr4,
        xcr0: cpu.regs.xcr0,
        xss: cpu.regs.msrs.xss,
        apic_enabled: base & 1 << 11 != 0,
        apic_id: cpu.index() as u32,
        hides_invariant_tsc: cpu
            .nested
            .as_ref()
            .and_then(|n| n.hyperv.as_ref())
            .is_some_and(|h| !h.shows_invariant_tsc()),
        monitor: cpu.msrs.has_monitor(),
    };
    let (leaf, subleaf) = (cpu.regs.gpr[gpr::RAX] as u32, cpu.regs.gpr[gpr::RCX] as u32);
    let [a, b, c, d] = cpu.vm().cpuid().query(leaf, subleaf, &state);
    for (r, v) in [(gpr::RAX, a), (gpr::RBX, b), (gpr::RCX, c), (gpr::RDX, d)] {
        cpu.regs.gpr[r] = v.into();
    }
    skip(cpu, exit)
}

fn hlt<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    cpu.skip_instruction(exit);
    // A single step that is due ends the halt before it starts.
    if cpu.vmcs.guest.pending_debug & pending_debug::BS != 0 { Outcome::Resume } else { Outcome::Halt }
}

/// MWAIT (SDM Vol. 2B): with an armed line it waits; without one it does nothing.
fn mwait<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    if !cpu.msrs.has_monitor() {
        return invalid_opcode(cpu, exit);
    }
    let extensions = cpu.read_gpr(gpr::RCX);
    if extensions & !1 != 0 {
        return general_protection(cpu, exit);
    }
    cpu.skip_instruction(exit);
    // A single step that is due ends the wait before it starts.
    if cpu.vmcs.guest.pending_debug & pending_debug::BS == 0 {
        cpu.start_mwait(extensions & 1 != 0);
    }
    Outcome::Resume
}

/// SDM Vol. 3C table 28-3.
fn cr_access<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    use cr_access::Kind;
    let q = exit.qualification;
    let register = cr_access::gpr(q);
    match (cr_access::cr(q), cr_access::kind(q)) {
        (8, Kind::MovFrom) => {
            let tpr = cpu.board().interrupts().with_lapic(cpu.index(), |l| l.cr8()).unwrap_or(0);
            cpu.write_gpr(register, tpr.into());
            skip(cpu, exit)
        }
        (8, Kind::MovTo) => {
            let value = cpu.read_gpr(register);
            // Bits 63:4 of CR8 are reserved (SDM Vol. 3A §11.8.6).
            let Some(tpr) = u8::try_from(value).ok().filter(|v| *v < 16) else {
                return general_protection(cpu, exit);
            };
            cpu.board().interrupts().with_lapic(cpu.index(), |l| l.set_cr8(tpr));
            cpu.devices_touched();
            skip(cpu, exit)
        }
        (0, Kind::MovTo | Kind::Lmsw | Kind::Clts) | (4, Kind::MovTo) => cpu.held_cr_access(exit),
        _ => unexpected(cpu, exit),
    }
}

/// IN, OUT, INS, OUTS (SDM Vol. 3C table 28-5).
fn io_instruction<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    let q = exit.qualification;
    cpu.devices_touched();
    // Without a length it is the engine that has to finish the instruction.
    if q & io::STRING != 0 || exit.instruction_length == 0 {
        return emulate(cpu);
    }
    let (port, size) = (io::port(q), io::size(q));
    let rax = cpu.regs.gpr[gpr::RAX];
    if q & io::IN != 0 {
        let value: u64 = cpu.board().pio_read(port, size).into();
        cpu.regs.gpr[gpr::RAX] = match size {
            1 => rax & !0xff | value & 0xff,
            2 => rax & !0xffff | value & 0xffff,
            _ => value & 0xffff_ffff,
        };
    } else {
        let mask = if size >= 4 { u32::MAX } else { (1 << (8 * u32::from(size))) - 1 };
        cpu.board().pio_write(port, size, rax as u32 & mask);
    }
    skip(cpu, exit);
    let hits = io_breakpoints(&cpu.vmcs.guest, &cpu.regs.dr, port, size);
    if hits != 0 {
        cpu.vmcs.guest.pending_debug |= hits | pending_debug::ENABLED_BREAKPOINT;
    }
    Outcome::Resume
}

/// The I/O breakpoints that an access to `size` ports from `port` on meets, as bits of DR6 (SDM Vol. 3B §18.2.4, §18.2.5).
fn io_breakpoints(guest: &engine::GuestState, dr: &[u64; 4], port: u16, size: u8) -> u64 {
    if guest.cr4 & x86_spec::reg::cr4::DE == 0 {
        return 0;
    }
    let first = u64::from(port);
    let meets = |n: usize| {
        let enabled = guest.dr7 >> (2 * n) & 3 != 0;
        let condition = guest.dr7 >> (16 + 4 * n) & 3;
        let length = [1, 2, 8, 4][(guest.dr7 >> (18 + 4 * n) & 3) as usize];
        let start = dr[n] & !(length - 1);
        enabled && condition == 2 && start < first + u64::from(size) && first < start.saturating_add(length)
    };
    (0..4).filter(|n| meets(*n)).fold(0, |all, n| all | 1 << n)
}

/// Has the engine execute the instruction with the machine's buses.
fn emulate<E: Engine>(cpu: &mut VcpuLoop<E>) -> Outcome {
    match cpu.emulate_instruction() {
        None => Outcome::Resume,
        // The engine can't do this one; the same exit would come for ever.
        Some(again) if matches!(again.reason, ExitReason::EptViolation | ExitReason::IoInstruction) => {
            cpu.crash(unsupported_access(&again))
        }
        Some(other) => cpu.dispatch_emulated(&other),
    }
}

fn unsupported_access(exit: &VmExit) -> CrashCause {
    let gpa = exit.guest_physical.0;
    if exit.idt_vectoring.is_valid() {
        CrashCause::DeliveryOutsideRam { gpa, vector: exit.idt_vectoring.vector() }
    } else if exit.qualification & ept_violation::FETCH != 0 {
        CrashCause::FetchOutsideRam { gpa }
    } else {
        CrashCause::UnsupportedDeviceAccess { gpa }
    }
}

fn ept_violation<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    let gpa = exit.guest_physical.0;
    if let Some(outcome) = cpu.write_to_table(exit) {
        return outcome;
    }
    if let Some((machine, _)) = cpu.vm().ram().translate(memory::L1Gpa(gpa)) {
        return Outcome::End(RunEnd::Internal(format!(
            "EPT violation at {gpa:#x} (qualification {:#x}), which EPT01 maps to machine address {machine}",
            exit.qualification
        )));
    }
    if exit.idt_vectoring.is_valid() || exit.qualification & ept_violation::FETCH != 0 {
        return cpu.crash(unsupported_access(exit));
    }
    cpu.devices_touched();
    emulate(cpu)
}

fn ept_misconfiguration<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    Outcome::End(RunEnd::Internal(format!(
        "EPT misconfiguration at {} from {:#x}: EPT01 holds an entry that SDM Vol. 3C §29.3.3.1 forbids",
        exit.guest_physical, cpu.vmcs.guest.rip
    )))
}

/// The local APIC of one vCPU.
pub(crate) struct CpuApic<'a> {
    pub board: &'a dyn Board,
    pub cpu: usize,
}

impl ApicMsrs for CpuApic<'_> {
    fn read(&mut self, msr: u32) -> Result<u64, GpFault> {
        self.board.interrupts().read_msr(self.cpu, msr)
    }
    fn write(&mut self, msr: u32, value: u64) -> Result<(), GpFault> {
        self.board.interrupts().write_msr(self.cpu, msr, value)
    }
    fn tsc_changed(&mut self) {
        self.board.interrupts().with_lapic(self.cpu, |l| l.tsc_changed());
    }
}

fn rdmsr<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    let msr = cpu.regs.gpr[gpr::RCX] as u32;
    match cpu.read_msr(msr) {
        Ok(v) => {
            cpu.regs.gpr[gpr::RAX] = v & 0xffff_ffff;
            cpu.regs.gpr[gpr::RDX] = v >> 32;
            skip(cpu, exit)
        }
        Err(GpFault) => general_protection(cpu, exit),
    }
}

fn wrmsr<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    let msr = cpu.regs.gpr[gpr::RCX] as u32;
    let value = cpu.regs.gpr[gpr::RAX] & 0xffff_ffff | cpu.regs.gpr[gpr::RDX] << 32;
    match cpu.write_msr(msr, value) {
        Ok(()) => skip(cpu, exit),
        Err(GpFault) => general_protection(cpu, exit),
    }
}

/// Whether XSETBV takes `value` for XCR0 (SDM Vol. 2D, XSETBV; Vol. 1 §13.3).
fn is_valid_xcr0(value: u64, supported: u64) -> bool {
    value & !supported == 0 && value & xcr0::X87 != 0 && (value & xcr0::AVX == 0 || value & xcr0::SSE != 0)
}

fn xsetbv<E: Engine>(cpu: &mut VcpuLoop<E>, exit: &VmExit) -> Outcome {
    let value = cpu.regs.gpr[gpr::RAX] & 0xffff_ffff | cpu.regs.gpr[gpr::RDX] << 32;
    let index = cpu.regs.gpr[gpr::RCX] as u32;
    if index != 0 || !is_valid_xcr0(value, cpu.vm().cpuid().supported_xcr0()) {
        return general_protection(cpu, exit);
    }
    cpu.regs.xcr0 = value;
    skip(cpu, exit)
}

impl<E: Engine> VcpuLoop<E> {
    /// RDMSR of L1.
    ///
    /// # Errors
    /// [`GpFault`] when the processor would raise #GP(0).
    pub(crate) fn read_msr(&mut self, msr: u32) -> Result<u64, GpFault> {
        if let Some(v) = self.nested.as_ref().and_then(|n| n.read_msr(msr)) {
            return Ok(v);
        }
        if let Some(result) = self.read_synthetic_msr(msr) {
            return result;
        }
        let vm = self.vm().clone();
        let mut apic = CpuApic { board: vm.board(), cpu: self.index() };
        let mut cx = MsrContext { guest: &mut self.vmcs.guest, regs: &mut self.regs, apic: &mut apic };
        self.msrs.read(msr, &mut cx)
    }

    /// WRMSR of L1.
    ///
    /// # Errors
    /// As [`Self::read_msr`]; nothing changed then.
    pub(crate) fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), GpFault> {
        if let Some(result) = self.nested.as_mut().and_then(|n| n.write_msr(msr, value)) {
            return result;
        }
        if let Some(result) = self.write_synthetic_msr(msr, value) {
            return result;
        }
        let vm = self.vm().clone();
        let mut apic = CpuApic { board: vm.board(), cpu: self.index() };
        let mut cx = MsrContext { guest: &mut self.vmcs.guest, regs: &mut self.regs, apic: &mut apic };
        let result = self.msrs.write(msr, value, &mut cx);
        self.devices_touched();
        if result.is_ok() {
            self.refresh_tsc_offset();
        }
        result
    }

    /// Whether the guest runs 64-bit code.
    pub(crate) fn in_64_bit_mode(&self) -> bool {
        let g = &self.vmcs.guest;
        g.efer & efer::LMA != 0 && g.segments[seg::CS].access.long()
    }

    /// A general register as an operand; its upper half reads as 0 outside 64-bit mode.
    pub(crate) fn read_gpr(&self, index: usize) -> u64 {
        let v = if index == gpr::RSP { self.vmcs.guest.rsp } else { self.regs.gpr[index & 15] };
        if self.in_64_bit_mode() { v } else { v & 0xffff_ffff }
    }

    fn write_gpr(&mut self, index: usize, value: u64) {
        if index == gpr::RSP {
            self.vmcs.guest.rsp = value;
        } else {
            self.regs.gpr[index & 15] = value;
        }
    }

    /// Completes the instruction that exited: RIP moves on, blocking by STI and MOV SS ends, RF
    /// is cleared, a single step that was due is left pending (SDM Vol. 3C §26.3.4,
    /// Vol. 3B §18.3.1.4), and counters of instructions count it.
    pub(crate) fn skip_instruction(&mut self, exit: &VmExit) {
        let long = self.in_64_bit_mode();
        let g = &mut self.vmcs.guest;
        let next = g.rip.wrapping_add(exit.instruction_length.into());
        g.rip = if long { next } else { next & 0xffff_ffff };
        g.interruptibility &= !(interruptibility::STI | interruptibility::MOV_SS);
        /// IA32_DEBUGCTL.BTF: single-step on branches only.
        const BTF: u64 = 1 << 1;
        if g.rflags & rflags::TF != 0 && g.debugctl & BTF == 0 {
            g.pending_debug |= pending_debug::BS;
        }
        g.rflags &= !rflags::RF;
        if g.perf_global_ctrl != 0 {
            let user = g.segments[seg::SS].access.dpl() > 0;
            let counters = self.regs.pmu.running(g.perf_global_ctrl, user).instructions;
            self.regs.pmu.count(counters, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xcr0_rules() {
        // SDM Vol. 2D, XSETBV: #GP if bit 0 is clear, if AVX without SSE, if reserved.
        for (value, ok) in [(1, true), (3, true), (7, true), (0, false), (2, false), (5, false), (9, false)] {
            assert_eq!(is_valid_xcr0(value, 7), ok, "{value:#x}");
        }
        assert!(!is_valid_xcr0(7, 3));
    }
}
