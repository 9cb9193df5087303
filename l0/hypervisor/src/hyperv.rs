//! As much of Hyper-V's interface as a guest needs to use the enlightened VMCS (Hyper-V
//! Top-Level Functional Specification): CPUID leaves 40000000H–4000000AH, synthetic MSRs, the
//! hypercall page and the virtual-processor assist page. Offered with `--vmcs-access direct` alone.
//!
//! Offered: guest OS identity and hypercall page, virtual-processor index, interrupt-control
//! MSRs and assist page, frequencies, reenlightenment, the invariant TSC, enlightened VMCS version 1.
//!
//! Not supported, and not offered: any hypercall (each fails with "invalid hypercall code"),
//! reference counter and reference TSC page, synthetic interrupt controller and timers, lazy EOI
//! (its bit in the assist page is never set), enlightened TLB flush and MSR bitmap of nested guests,
//! VMBus. The TSC's frequency never changes, so that the reenlightenment interrupt never comes.
//! Pages are not overlays: the hypercall page is written into the RAM that the guest names.

use devices::lapic::ApicMode;
use devices::{GpFault, Interrupts};
use engine::{Engine, VmExit};
use memory::{L1Gpa, L1Ram};
use vmx_emu::evmcs;
use x86_spec::exception;
use x86_spec::reg::gpr;
use x86_spec::segment::seg;

use crate::exits::Outcome;
use crate::vcpu_loop::VcpuLoop;

const MAX_LEAF: u32 = 0x4000_000a;

/// 40000003H:EAX: interrupt-control MSRs and assist page (4), hypercall MSRs (5), virtual-processor
/// index (6), frequency MSRs (11), reenlightenment (13), invariant-TSC control (15).
const FEATURES_EAX: u32 = 1 << 4 | 1 << 5 | 1 << 6 | 1 << 11 | 1 << 13 | 1 << 15;
/// 40000003H:EDX: frequency MSRs (8).
const FEATURES_EDX: u32 = 1 << 8;
/// 40000004H:EAX: the enlightened VMCS is recommended (14).
const RECOMMENDATIONS: u32 = 1 << 14;
/// 4000000AH:EBX: the structure's fields of IA32_PERF_GLOBAL_CTRL count (0).
const NESTED_FEATURES_EBX: u32 = 1 << 0;
/// 40000004H:EBX: spinlocks never notify.
const SPINLOCK_RETRIES: u32 = u32::MAX;

const GUEST_OS_ID: u32 = 0x4000_0000;
const HYPERCALL: u32 = 0x4000_0001;
const VP_INDEX: u32 = 0x4000_0002;
const TSC_FREQUENCY: u32 = 0x4000_0022;
const APIC_FREQUENCY: u32 = 0x4000_0023;
const EOI: u32 = 0x4000_0070;
const ICR: u32 = 0x4000_0071;
const TPR: u32 = 0x4000_0072;
const VP_ASSIST_PAGE: u32 = 0x4000_0073;
const REENLIGHTENMENT_CONTROL: u32 = 0x4000_0106;
const TSC_EMULATION_CONTROL: u32 = 0x4000_0107;
const TSC_EMULATION_STATUS: u32 = 0x4000_0108;
const TSC_INVARIANT_CONTROL: u32 = 0x4000_0118;

/// In the MSRs that name a page: it is enabled.
const ENABLE: u64 = 1 << 0;
/// The hypercall MSR can't be changed any more.
const LOCKED: u64 = 1 << 1;
/// Bits of [`REENLIGHTENMENT_CONTROL`]: vector, enabled, target.
const REENLIGHTENMENT_DEFINED: u64 = 0xff | 1 << 16 | 0xffff_ffff << 32;

/// Offsets of the same registers in the xAPIC page; the MSR of x2APIC mode is 800H plus a
/// sixteenth of it (SDM Vol. 3A §11.12.1.2).
const APIC_TPR: u32 = 0x80;
const APIC_EOI: u32 = 0xb0;
const APIC_ICR: u32 = 0x300;
const APIC_ICR_HIGH: u32 = 0x310;

/// VMCALL; RET.
const HYPERCALL_CODE: [u8; 4] = [0x0f, 0x01, 0xc1, 0xc3];
/// HV_STATUS_INVALID_HYPERCALL_CODE.
const INVALID_HYPERCALL_CODE: u64 = 2;

/// CPUID leaf `leaf` of the hypervisor's range, on a machine with `cpus` processors.
pub fn cpuid(leaf: u32, cpus: u32) -> [u32; 4] {
    let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    match leaf {
        0x4000_0000 => [MAX_LEAF, word(b"Micr"), word(b"osof"), word(b"t Hv")],
        0x4000_0001 => [word(b"Hv#1"), 0, 0, 0],
        0x4000_0003 => [FEATURES_EAX, 0, 0, FEATURES_EDX],
        0x4000_0004 => [RECOMMENDATIONS, SPINLOCK_RETRIES, 0, 0],
        0x4000_0005 => [cpus, cpus, 0, 0],
        // The lowest and the highest version of the enlightened VMCS.
        0x4000_000a => [evmcs::VERSION | evmcs::VERSION << 8, NESTED_FEATURES_EBX, 0, 0],
        _ => [0; 4],
    }
}

/// The synthetic MSRs of one virtual processor.
#[derive(Clone, Debug)]
pub(crate) struct HyperV {
    index: u32,
    tsc_hz: u64,
    apic_hz: u64,
    guest_os_id: u64,
    hypercall: u64,
    assist_page: u64,
    reenlightenment: u64,
    tsc_emulation: u64,
    tsc_invariant: u64,
}

/// What an MSR access touches besides [`HyperV`].
pub(crate) struct Surroundings<'a> {
    pub ram: &'a L1Ram,
    pub interrupts: &'a Interrupts,
}

fn allow(ok: bool) -> Result<(), GpFault> {
    if ok { Ok(()) } else { Err(GpFault) }
}

const fn page(value: u64) -> L1Gpa {
    L1Gpa(value).page_base()
}

impl HyperV {
    /// After reset: nothing is enabled. `apic_hz` is the frequency of the local APIC's timer.
    pub const fn new(index: u32, tsc_hz: u64, apic_hz: u64) -> Self {
        Self {
            index,
            tsc_hz,
            apic_hz,
            guest_os_id: 0,
            hypercall: 0,
            assist_page: 0,
            reenlightenment: 0,
            tsc_emulation: 0,
            tsc_invariant: 0,
        }
    }

    /// Whether the guest has made the hypercall page.
    const fn hypercalls(&self) -> bool {
        self.hypercall & ENABLE != 0
    }

    /// Whether CPUID is to show the invariant TSC.
    pub const fn shows_invariant_tsc(&self) -> bool {
        self.tsc_invariant & 1 != 0
    }

    /// The assist page, where it is enabled.
    pub fn assist_page(&self) -> Option<L1Gpa> {
        (self.assist_page & ENABLE != 0).then(|| page(self.assist_page))
    }

    /// RDMSR; `None` for MSRs that are not of this interface.
    fn read(&self, msr: u32, around: &Surroundings<'_>) -> Option<Result<u64, GpFault>> {
        Some(Ok(match msr {
            GUEST_OS_ID => self.guest_os_id,
            HYPERCALL => self.hypercall,
            VP_INDEX => self.index.into(),
            TSC_FREQUENCY => self.tsc_hz,
            APIC_FREQUENCY => self.apic_hz,
            // EOI is write-only.
            EOI => return Some(Err(GpFault)),
            ICR => return Some(self.read_icr(around.interrupts)),
            TPR => return Some(self.read_apic(around.interrupts, APIC_TPR)),
            VP_ASSIST_PAGE => self.assist_page,
            REENLIGHTENMENT_CONTROL => self.reenlightenment,
            TSC_EMULATION_CONTROL => self.tsc_emulation,
            // No access to the TSC is emulated.
            TSC_EMULATION_STATUS => 0,
            TSC_INVARIANT_CONTROL => self.tsc_invariant,
            _ => return None,
        }))
    }

    /// WRMSR; `None` as for [`Self::read`].
    fn write(&mut self, msr: u32, value: u64, around: &Surroundings<'_>) -> Option<Result<(), GpFault>> {
        let stored = |slot: &mut u64, defined: u64| {
            allow(value & !defined == 0)?;
            *slot = value;
            Ok(())
        };
        Some(match msr {
            GUEST_OS_ID => {
                self.guest_os_id = value;
                if value == 0 {
                    self.hypercall &= !ENABLE;
                }
                Ok(())
            }
            HYPERCALL => self.write_hypercall(value, around.ram),
            VP_INDEX | TSC_FREQUENCY | APIC_FREQUENCY => Err(GpFault),
            EOI => self.write_apic(around.interrupts, APIC_EOI, value),
            ICR => self.write_icr(around.interrupts, value),
            TPR => allow(value <= 0xff).and_then(|()| self.write_apic(around.interrupts, APIC_TPR, value)),
            VP_ASSIST_PAGE => self.write_assist_page(value, around.ram),
            REENLIGHTENMENT_CONTROL => stored(&mut self.reenlightenment, REENLIGHTENMENT_DEFINED),
            TSC_EMULATION_CONTROL => stored(&mut self.tsc_emulation, 1),
            TSC_EMULATION_STATUS => allow(value & !1 == 0),
            // Once shown, the TSC stays so.
            TSC_INVARIANT_CONTROL => {
                allow(value & !1 == 0 && value & self.tsc_invariant == self.tsc_invariant)
                    .map(|()| self.tsc_invariant = value)
            }
            _ => return None,
        })
    }

    /// The page is enabled only for a guest that has said who it is.
    fn write_hypercall(&mut self, value: u64, ram: &L1Ram) -> Result<(), GpFault> {
        allow(self.hypercall & LOCKED == 0)?;
        let value = if self.guest_os_id == 0 { value & !ENABLE } else { value };
        if value & ENABLE != 0 {
            ram.write(page(value), &HYPERCALL_CODE).map_err(|_| GpFault)?;
        }
        self.hypercall = value;
        Ok(())
    }

    fn write_assist_page(&mut self, value: u64, ram: &L1Ram) -> Result<(), GpFault> {
        if value & ENABLE != 0 {
            // The first dword, of lazy EOI, is the hypervisor's.
            ram.write(page(value), &0u32.to_le_bytes()).map_err(|_| GpFault)?;
        }
        self.assist_page = value;
        Ok(())
    }

    // ---- the local APIC, in either mode -----------------------------------------------------------

    fn x2apic_msr(register: u32) -> u32 {
        0x800 + register / 16
    }

    fn mode(&self, interrupts: &Interrupts) -> (usize, ApicMode, u64) {
        let cpu = self.index as usize;
        let lapic = interrupts.with_lapic(cpu, |l| (l.mode(), l.mmio_page().unwrap_or_default()));
        let (mode, page) = lapic.unwrap_or((ApicMode::Disabled, 0));
        (cpu, mode, page)
    }

    fn read_apic(&self, interrupts: &Interrupts, register: u32) -> Result<u64, GpFault> {
        match self.mode(interrupts) {
            (cpu, ApicMode::X2Apic, _) => interrupts.read_msr(cpu, Self::x2apic_msr(register)),
            (cpu, _, page) => interrupts.lapic_mmio_read(cpu, page + u64::from(register), 4).ok_or(GpFault),
        }
    }

    fn write_apic(&self, interrupts: &Interrupts, register: u32, value: u64) -> Result<(), GpFault> {
        match self.mode(interrupts) {
            (cpu, ApicMode::X2Apic, _) => interrupts.write_msr(cpu, Self::x2apic_msr(register), value),
            (cpu, _, page) => {
                allow(interrupts.lapic_mmio_write(cpu, page + u64::from(register), 4, value & 0xffff_ffff))
            }
        }
    }

    fn read_icr(&self, interrupts: &Interrupts) -> Result<u64, GpFault> {
        let low = self.read_apic(interrupts, APIC_ICR)?;
        match self.mode(interrupts) {
            (_, ApicMode::X2Apic, _) => Ok(low),
            _ => Ok(low | self.read_apic(interrupts, APIC_ICR_HIGH)? << 32),
        }
    }

    fn write_icr(&self, interrupts: &Interrupts, value: u64) -> Result<(), GpFault> {
        if !matches!(self.mode(interrupts), (_, ApicMode::X2Apic, _)) {
            self.write_apic(interrupts, APIC_ICR_HIGH, value >> 32)?;
        }
        self.write_apic(interrupts, APIC_ICR, value)
    }
}

impl<E: Engine> VcpuLoop<E> {
    /// RDMSR of L1 of a synthetic MSR; `None` for others.
    pub(crate) fn read_synthetic_msr(&self, msr: u32) -> Option<Result<u64, GpFault>> {
        let hyperv = self.nested.as_ref()?.hyperv.as_ref()?;
        hyperv.read(msr, &Surroundings { ram: self.vm().ram(), interrupts: self.board().interrupts() })
    }

    /// WRMSR of L1 to a synthetic MSR; `None` for others.
    pub(crate) fn write_synthetic_msr(&mut self, msr: u32, value: u64) -> Option<Result<(), GpFault>> {
        let vm = self.vm().clone();
        let nested = self.nested.as_mut()?;
        let hyperv = nested.hyperv.as_mut()?;
        let around = Surroundings { ram: vm.ram(), interrupts: vm.board().interrupts() };
        let result = hyperv.write(msr, value, &around)?;
        nested.state.assist_page = hyperv.assist_page();
        self.devices_touched();
        Some(result)
    }

    /// VMCALL of L1 where it has made the hypercall page; `None` where it has not. #UD with CPL
    /// above 0.
    pub(crate) fn hypercall(&mut self, exit: &VmExit) -> Option<Outcome> {
        if !self.nested.as_ref()?.hyperv.as_ref()?.hypercalls() {
            return None;
        }
        if self.vmcs.guest.segments[seg::SS].access.dpl() != 0 {
            self.inject_exception(exception::UD, None);
            return Some(Outcome::Resume);
        }
        tracing::debug!("hypercall {:#x}: there are none", self.regs.gpr[gpr::RCX]);
        // The result is in RAX; outside 64-bit mode in EDX:EAX.
        if !self.in_64_bit_mode() {
            self.regs.gpr[gpr::RDX] = 0;
        }
        self.regs.gpr[gpr::RAX] = INVALID_HYPERCALL_CODE;
        self.skip_instruction(exit);
        Some(Outcome::Resume)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::CpuidState;
    use crate::testing::Rig;
    use x86_spec::exit::ExitReason;
    use x86_spec::segment::AccessRights;

    const PAGE: u64 = 0x5000;
    const NOT_RAM: u64 = 1 << 40;

    fn query(rig: &Rig, leaf: u32) -> [u32; 4] {
        rig.vm.cpuid().query(leaf, 0, &CpuidState::default())
    }

    /// TLFS, "Feature and Interface Discovery".
    #[test]
    fn cpuid_offers_what_is_here_and_no_more() {
        let rig = Rig::direct();
        let [max, b, c, d] = query(&rig, 0x4000_0000);
        let signature: Vec<u8> = [b, c, d].iter().flat_map(|r| r.to_le_bytes()).collect();
        assert_eq!((max, &signature[..]), (0x4000_000a, &b"Microsoft Hv"[..]));
        assert_eq!(query(&rig, 0x4000_0001), [0x3123_7648, 0, 0, 0], "Hv#1");
        assert_eq!(query(&rig, 0x4000_0003), [0xa870, 0, 0, 0x100]);
        assert_eq!(query(&rig, 0x4000_0004), [0x4000, u32::MAX, 0, 0]);
        assert_eq!(query(&rig, 0x4000_0005), [1, 1, 0, 0]);
        assert_eq!(query(&rig, 0x4000_000a), [0x101, 1, 0, 0]);
        assert_eq!(query(&rig, 0x4000_000b), [0; 4]);
        let mut without = Rig::new();
        assert_eq!(query(&without, 0x4000_0000), [0; 4]);
        assert_eq!(without.cpu.read_msr(VP_INDEX), Err(GpFault));
        assert_eq!(without.cpu.write_msr(GUEST_OS_ID, 1), Err(GpFault));
    }

    /// TLFS, "Establishing the Hypercall Interface".
    #[test]
    fn the_hypercall_page_is_for_a_guest_that_says_who_it_is() {
        let mut rig = Rig::direct();
        let code = |rig: &Rig| {
            let mut code = [0; 4];
            rig.vm.ram().read(L1Gpa(PAGE), &mut code).unwrap();
            code
        };
        rig.cpu.write_msr(HYPERCALL, PAGE | ENABLE).unwrap();
        assert_eq!(rig.cpu.read_msr(HYPERCALL), Ok(PAGE), "not enabled");
        assert_eq!(code(&rig), [0; 4]);
        rig.cpu.write_msr(GUEST_OS_ID, 0x8100 << 48).unwrap();
        assert_eq!(rig.cpu.write_msr(HYPERCALL, NOT_RAM | ENABLE), Err(GpFault));
        rig.cpu.write_msr(HYPERCALL, PAGE | ENABLE | LOCKED).unwrap();
        assert_eq!(code(&rig), [0x0f, 0x01, 0xc1, 0xc3]);
        assert_eq!(rig.cpu.write_msr(HYPERCALL, 0), Err(GpFault), "locked");
        rig.cpu.write_msr(GUEST_OS_ID, 0).unwrap();
        assert_eq!(rig.cpu.read_msr(HYPERCALL), Ok(PAGE | LOCKED));
    }

    #[test]
    fn every_hypercall_is_one_that_does_not_exist() {
        let vmcall = |rig: &mut Rig| {
            let mut exit = VmExit::new(ExitReason::Vmcall);
            exit.instruction_length = 3;
            rig.cpu.regs.gpr[gpr::RAX] = 0;
            rig.cpu.regs.gpr[gpr::RDX] = 7;
            let before = rig.cpu.vmcs.guest.rip;
            rig.cpu.event = None;
            rig.cpu.dispatch(&exit);
            (rig.cpu.vmcs.guest.rip.wrapping_sub(before), rig.cpu.event.map(|e| e.info.vector()))
        };
        let mut rig = Rig::direct();
        assert_eq!(vmcall(&mut rig), (0, Some(exception::UD)), "no page");
        rig.cpu.write_msr(GUEST_OS_ID, 1).unwrap();
        rig.cpu.write_msr(HYPERCALL, PAGE | ENABLE).unwrap();
        assert_eq!(vmcall(&mut rig), (3, None));
        assert_eq!((rig.cpu.regs.gpr[gpr::RAX], rig.cpu.regs.gpr[gpr::RDX]), (2, 0));
        rig.cpu.vmcs.guest.segments[seg::SS].access = AccessRights(0xc0f3);
        assert_eq!(vmcall(&mut rig), (0, Some(exception::UD)), "CPL 3");
    }

    #[test]
    fn the_assist_page_is_ram_without_lazy_eoi() {
        let mut rig = Rig::direct();
        let assist = |rig: &Rig| rig.cpu.nested.as_ref().unwrap().state.assist_page;
        rig.vm.ram().write(L1Gpa(PAGE), &[0xff; 8]).unwrap();
        rig.cpu.write_msr(VP_ASSIST_PAGE, PAGE).unwrap();
        assert_eq!(assist(&rig), None, "not enabled");
        rig.cpu.write_msr(VP_ASSIST_PAGE, PAGE | ENABLE).unwrap();
        assert_eq!(assist(&rig), Some(L1Gpa(PAGE)));
        let mut start = [0; 8];
        rig.vm.ram().read(L1Gpa(PAGE), &mut start).unwrap();
        assert_eq!(start, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(rig.cpu.write_msr(VP_ASSIST_PAGE, NOT_RAM | ENABLE), Err(GpFault));
        assert_eq!(assist(&rig), Some(L1Gpa(PAGE)), "as before");
        rig.cpu.write_msr(VP_ASSIST_PAGE, 0).unwrap();
        assert_eq!(assist(&rig), None);
    }

    #[test]
    fn interrupt_control_msrs_reach_the_local_apic() {
        let mut rig = Rig::direct();
        for x2apic in [false, true] {
            if x2apic {
                let base = rig.cpu.read_msr(0x1b).unwrap();
                rig.cpu.write_msr(0x1b, base | 3 << 10).unwrap();
            }
            rig.cpu.write_msr(TPR, 0x30).unwrap();
            let tpr = rig.vm.board().interrupts().with_lapic(0, |l| l.tpr());
            assert_eq!((tpr, rig.cpu.read_msr(TPR)), (Some(0x30), Ok(0x30)));
            assert_eq!(rig.cpu.write_msr(TPR, 0x100), Err(GpFault));
            rig.cpu.write_msr(TPR, 0).unwrap();
            // Spurious-interrupt register: the APIC is enabled. Then a fixed interrupt to APIC ID 0.
            let apic = rig.cpu.nested.as_ref().unwrap().hyperv.clone().unwrap();
            apic.write_apic(rig.vm.board().interrupts(), 0xf0, 0x1ff).unwrap();
            rig.cpu.write_msr(ICR, 0x40).unwrap();
            assert_eq!(rig.cpu.read_msr(ICR), Ok(0x40));
            let interrupts = rig.vm.board().interrupts();
            assert_eq!(interrupts.take_interrupt(0), Some(0x40));
            rig.cpu.write_msr(ICR, 0x41).unwrap();
            assert!(!rig.vm.board().interrupts().has_interrupt(0), "one of its class is in service");
            assert_eq!(rig.cpu.read_msr(EOI), Err(GpFault));
            rig.cpu.write_msr(EOI, 0).unwrap();
            assert_eq!(rig.vm.board().interrupts().take_interrupt(0), Some(0x41));
            rig.cpu.write_msr(EOI, 0).unwrap();
        }
    }

    #[test]
    fn time_is_told_and_does_not_change() {
        let mut rig = Rig::direct();
        let hz = rig.vm.engine().tsc_frequency();
        assert_eq!(rig.cpu.read_msr(TSC_FREQUENCY), Ok(hz));
        assert_eq!(rig.cpu.read_msr(APIC_FREQUENCY), Ok(rig.vm.cpuid().crystal().hz.into()));
        for read_only in [TSC_FREQUENCY, APIC_FREQUENCY, VP_INDEX] {
            assert_eq!(rig.cpu.write_msr(read_only, 0), Err(GpFault));
        }
        let control = 0xee | 1 << 16 | 3 << 32;
        rig.cpu.write_msr(REENLIGHTENMENT_CONTROL, control).unwrap();
        assert_eq!(rig.cpu.read_msr(REENLIGHTENMENT_CONTROL), Ok(control));
        assert_eq!(rig.cpu.write_msr(REENLIGHTENMENT_CONTROL, 1 << 8), Err(GpFault));
        rig.cpu.write_msr(TSC_EMULATION_CONTROL, 1).unwrap();
        assert_eq!(rig.cpu.read_msr(TSC_EMULATION_STATUS), Ok(0));
        // The invariant TSC is shown on request, and for good.
        let shown = |rig: &mut Rig| {
            rig.cpu.regs.gpr[gpr::RAX] = 0x8000_0007;
            rig.cpu.dispatch(&VmExit::new(ExitReason::Cpuid));
            rig.cpu.regs.gpr[gpr::RDX] == 1 << 8
        };
        assert!(!shown(&mut rig));
        rig.cpu.write_msr(TSC_INVARIANT_CONTROL, 1).unwrap();
        assert!(shown(&mut rig));
        assert_eq!(rig.cpu.write_msr(TSC_INVARIANT_CONTROL, 0), Err(GpFault));
        assert!(shown(&mut Rig::new()));
    }
}
