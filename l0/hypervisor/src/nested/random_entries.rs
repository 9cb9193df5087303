//! VM entries with random VMCSs, through the real thing: an L1 in memory that executes VMXON, VMCLEAR, VMPTRLD and
//! VMLAUNCH on the software engine, with a PC around it.
//!
//! Each entry either is legal, and L2 runs for a moment, or it fails, L1 gets the one answer that the checks give,
//! and the user gets every check that failed.

use std::sync::Arc;

use devices::{Clock, Interrupts, MachineEvent};
use engine::{Activity, Engine, EngineVmcs, GuestRegs, Segment};
use engine_soft::SoftEngine;
use machine::{Pc, PcConfig};
use memory::{L1Gpa, MachineMemory};
use vmx_emu::checks::{self, Answer, MsrBits, Report};
use vmx_emu::vmcs12::REVISION;
use vmx_emu::{Capabilities, Field, L1Physical, Vmcs12};
use x86_spec::controls::{EntryControls, ExitControls, SecondaryControls};
use x86_spec::exit::ExitReason;
use x86_spec::reg::{cr0, cr4, efer, rflags};
use x86_spec::segment::{AccessRights, seg};

use crate::board::Board;
use crate::nested::{Ept02Config, MIN_EPT02_PAGES, VmcsAccess};
use crate::vcpu_loop::{RunEnd, Start, VcpuLoop};
use crate::vm::{Vm, VmBuilder, VmConfig};

const RAM: u64 = 4 << 20;
/// L1's page tables: RAM in pages of 2 MiB.
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x8000;
const VMXON: u64 = 0x9000;
const VMCS: u64 = 0xa000;
/// Where VMXON's and VMPTRLD's operands are.
const POINTERS: u64 = 0xb000;
/// EPT12: RAM, each address at itself.
const EPT12: u64 = 0xc000;
/// L2's code and L1's at its host RIP.
const L2: u64 = 0x1_0000;
const HOST: u64 = 0x1_1000;
/// How long L2 may run at a time, in nanoseconds.
const SLICE: u64 = 5_000;
/// Turns of the loop that L2 gets.
const TURNS: usize = 3;

/// The PC, with a deadline that is always near, so that no L2 runs for long.
struct Impatient(Arc<Pc>);

impl Board for Impatient {
    fn pio_read(&self, port: u16, size: u8) -> u32 {
        self.0.pio_read(port, size)
    }
    fn pio_write(&self, port: u16, size: u8, value: u32) {
        self.0.pio_write(port, size, value);
    }
    fn mmio_read(&self, cpu: usize, gpa: u64, size: u8) -> u64 {
        self.0.mmio_read(cpu, L1Gpa(gpa), size)
    }
    fn mmio_write(&self, cpu: usize, gpa: u64, size: u8, value: u64) {
        self.0.mmio_write(cpu, L1Gpa(gpa), size, value);
    }
    fn interrupts(&self) -> &Interrupts {
        self.0.interrupts()
    }
    fn now_ns(&self) -> u64 {
        self.0.now_ns()
    }
    fn tick(&self) {
        self.0.tick(self.0.now_ns());
    }
    fn next_deadline(&self) -> Option<u64> {
        Some(self.0.now_ns() + SLICE)
    }
    fn take_event(&self) -> Option<MachineEvent> {
        self.0.take_event()
    }
}

/// A fixed sequence of pseudo-random numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }
    /// A value that is not merely noise for a field whose value is `now`.
    fn value(&mut self, now: u64) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => now ^ 1 << self.below(64),
            3 => now ^ 1 << self.below(32),
            4 => self.below(256),
            5 => self.below(RAM / 0x1000) << 12,
            6 => self.below(RAM),
            _ => self.next(),
        }
    }
}

/// What came of the entries.
#[derive(Debug, Default)]
struct Tally {
    entered: u64,
    controls: u64,
    host: u64,
    guest: u64,
    msrs: u64,
    aborts: u64,
    /// No VMCS was current: VMPTRLD had refused the region.
    no_vmcs: u64,
}

impl Tally {
    fn sum(&self) -> u64 {
        self.entered + self.controls + self.host + self.guest + self.msrs + self.aborts + self.no_vmcs
    }
}

struct Rig {
    cpu: VcpuLoop<SoftEngine>,
    vm: Arc<Vm<SoftEngine>>,
    start: EngineVmcs,
    pool: u64,
}

fn segment(selector: u16, access: u32) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, access: AccessRights(access), selector }
}

impl Rig {
    fn new() -> Self {
        let ept02 = Ept02Config { pages: MIN_EPT02_PAGES, ..Ept02Config::default() };
        let config = VmConfig { ram: RAM, cpus: 1, vmx: true, vmcs_access: VmcsAccess::Trapped, ept02 };
        let memory = Arc::new(MachineMemory::new(config.machine_memory().unwrap()).unwrap());
        let engine = Arc::new(SoftEngine::new(memory.clone()).unwrap());
        let builder = VmBuilder::new(engine, memory, config).unwrap();
        let clock: Arc<dyn Clock> = builder.clock();
        let pc_config = PcConfig { ram_bytes: RAM, clock: Some(clock), ..PcConfig::default() };
        let pc = Arc::new(Pc::new(pc_config, &builder.tscs()).unwrap());
        let vm = builder.build(Arc::new(Impatient(pc)));
        let cpu = VcpuLoop::new(vm.clone(), 0, Start::Reset).unwrap();
        let mut start = cpu.vmcs.clone();
        let g = &mut start.guest;
        g.rip = CODE;
        g.rsp = 0x7000;
        g.rflags = rflags::FIXED1;
        g.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET | cr0::WP;
        g.cr3 = TABLES;
        g.cr4 |= cr4::PAE;
        g.efer = efer::LME | efer::LMA;
        // L1 reads CR4.VMXE from the shadow.
        start.controls.cr4_shadow |= cr4::VMXE;
        g.segments = [segment(0x10, 0xc093); 8];
        g.segments[seg::CS] = segment(8, 0xa09b);
        g.segments[seg::LDTR] = segment(0, AccessRights::UNUSABLE);
        g.segments[seg::TR] =
            Segment { base: 0x3000, limit: 0x67, access: AccessRights(0x8b), selector: 0x18 };
        // No IDT: an exception of L1 is its end.
        g.idtr.limit = 0;
        let pool = vm.pool().used();
        Self { cpu, vm, start, pool }
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        L1Physical::write(self.vm.ram(), L1Gpa(at), bytes);
    }
    fn put64(&self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// L1 before VMXON, with `region` as its VMCS. L2 may have changed anything in memory.
    fn reset(&mut self, region: &[u8]) {
        for (at, value) in [
            (TABLES, 0x2007),
            (TABLES + 0x1000, 0x3007),
            (TABLES + 0x2000, 0x87),
            (TABLES + 0x2008, 0x20_0087),
            (EPT12, (EPT12 + 0x1000) | 7),
            (EPT12 + 0x1000, (EPT12 + 0x2000) | 7),
            (EPT12 + 0x2000, 0xb7),
            (EPT12 + 0x2008, 0x20_00b7),
            (POINTERS, VMXON),
            (POINTERS + 8, VMCS),
        ] {
            self.put64(at, value);
        }
        self.put(VMXON, &REVISION.to_le_bytes());
        self.put(VMCS, region);
        // VMXON, VMCLEAR, VMPTRLD, VMLAUNCH; what L2 does: CPUID; HLT.
        let operand = |at: u64| (at as u32).to_le_bytes();
        let mut code = Vec::new();
        code.extend([0xf3, 0x0f, 0xc7, 0x34, 0x25]);
        code.extend(operand(POINTERS));
        code.extend([0x66, 0x0f, 0xc7, 0x34, 0x25]);
        code.extend(operand(POINTERS + 8));
        code.extend([0x0f, 0xc7, 0x34, 0x25]);
        code.extend(operand(POINTERS + 8));
        code.extend([0x0f, 0x01, 0xc2, 0xf4]);
        self.put(CODE, &code);
        self.put(L2, &[0x0f, 0xa2, 0xf4]);
        self.put(HOST, &[0xf4]);
        self.cpu.vmcs = self.start.clone();
        self.cpu.regs = GuestRegs::reset();
        self.cpu.event = None;
        self.cpu.halted = false;
        self.cpu.stop_mwait();
        if let Some(n) = self.cpu.nested.as_mut() {
            n.state.reset();
        }
        self.vm.engine().invalidate(engine::InvalidateScope::All);
    }

    fn caps(&self) -> &Capabilities {
        &self.cpu.nested.as_ref().unwrap().caps
    }

    /// Runs L1 up to its VMLAUNCH, and that. `Err`: the machine came to an end.
    fn launch(&mut self) -> Result<Option<Report>, RunEnd> {
        let vmlaunch = CODE + 26;
        // VMXON, VMCLEAR, VMPTRLD; the deadline may come in between.
        while self.cpu.vmcs.guest.rip != vmlaunch {
            assert!(!self.cpu.in_l2());
            if let Some(end) = self.cpu.turn() {
                return Err(end);
            }
        }
        let expected = self.expected();
        while self.cpu.vmcs.guest.rip == vmlaunch && !self.cpu.in_l2() && !self.failed_after_checks() {
            if let Some(end) = self.cpu.turn() {
                return Err(end);
            }
        }
        Ok(expected)
    }

    /// What the checks say of the current VMCS.
    fn expected(&self) -> Option<Report> {
        let n = self.cpu.nested.as_ref()?;
        let context = checks::Context {
            vmcs: n.state.current()?,
            current_vmcs: n.state.current_pointer()?,
            caps: &n.caps,
            msr_bits: MsrBits {
                efer: efer::DEFINED,
                debugctl: self.cpu.msrs.debugctl_bits(),
                perf_global_ctrl: self.cpu.msrs.perf_global_ctrl_bits(),
            },
            linear_bits: 48,
            l1_long_mode: true,
            memory: &super::guest::Physical(self.vm.ram()),
        };
        Some(checks::run(&context))
    }

    fn field(&self, field: Field) -> u64 {
        self.cpu.nested.as_ref().and_then(|n| n.state.current()).map_or(0, |v| v.get(field))
    }

    /// Bit 31 of the exit reason: L1 is at its host RIP after a VM-entry failure.
    fn failed_after_checks(&self) -> bool {
        self.field(Field::ExitReason) >> 31 == 1 && self.cpu.vmcs.guest.rip == self.field(Field::HostRip)
    }

    /// One entry with this region. `Err`: the machine came to an end, and another is needed.
    fn enter(&mut self, region: &[u8], tally: &mut Tally) -> Result<(), RunEnd> {
        self.reset(region);
        let before = self.vm.handle().failed_entries().count;
        let outcome = self.launch();
        let failed = self.vm.handle().failed_entries();
        let said = failed.last.back().cloned().unwrap_or_default();
        let expected = match outcome {
            Ok(expected) => expected,
            Err(RunEnd::Crash(report)) if report.cause.to_string().starts_with("VMX abort") => {
                // An entry that failed and whose host state can't be loaded.
                assert_eq!(failed.count, before + 1, "an abort without a failed entry");
                tally.aborts += 1;
                return Err(RunEnd::Crash(report));
            }
            Err(end) => panic!("the machine ended at VMLAUNCH: {end:?}"),
        };
        let flags = self.cpu.vmcs.guest.rflags & (rflags::CF | rflags::ZF);
        let Some(expected) = expected else {
            assert_eq!(flags, rflags::CF, "VMfailInvalid");
            tally.no_vmcs += 1;
            return Ok(());
        };
        let answer = expected.architectural();
        if answer != Answer::Enter {
            assert_eq!(failed.count, before + 1, "a failure that nobody is told of");
            for failure in expected.failures() {
                assert!(said.contains(failure.check), "{} is missing in:\n{said}", failure.check);
            }
        }
        match answer {
            Answer::FailValid(error) => {
                assert!(!self.cpu.in_l2());
                assert_eq!(
                    (flags, self.field(Field::VmInstructionError)),
                    (rflags::ZF, error.number().into())
                );
                *(if error.number() == 7 { &mut tally.controls } else { &mut tally.host }) += 1;
            }
            Answer::FailEntry { reason, qualification } => {
                assert!(!self.cpu.in_l2());
                self.is_failure(reason, qualification);
                tally.guest += 1;
            }
            Answer::Enter if self.cpu.in_l2() => {
                assert_eq!(failed.count, before, "{said}");
                tally.entered += 1;
                self.run_l2(before)?;
            }
            Answer::Enter => {
                assert_eq!(failed.count, before + 1, "a failure that nobody is told of");
                assert!(said.contains("entry_msr_loading"), "{said}");
                let entry = self.field(Field::ExitQualification);
                assert!(said.contains(&format!("entry {entry} of the list")), "{said}");
                self.is_failure(ExitReason::MsrLoading, entry);
                tally.msrs += 1;
            }
        }
        Ok(())
    }

    fn is_failure(&self, reason: ExitReason, qualification: u64) {
        let got = (self.field(Field::ExitReason), self.field(Field::ExitQualification));
        assert_eq!(got, (reason as u64 | 1 << 31, qualification));
        assert_eq!(self.cpu.vmcs.guest.rip, self.field(Field::HostRip));
    }

    /// Lets L2 run for a moment. The engine must take any state that passes the checks.
    fn run_l2(&mut self, failures: u64) -> Result<(), RunEnd> {
        for _ in 0..TURNS {
            // Nothing but a start-up IPI ends this, and none comes.
            if !self.cpu.in_l2() || self.cpu.vmcs.guest.activity == Activity::WaitForSipi {
                break;
            }
            match self.cpu.turn() {
                None => {}
                Some(RunEnd::Internal(what)) => panic!("L2: {what}"),
                Some(end) => return Err(end),
            }
            let failed = self.vm.handle().failed_entries();
            let refused = self.cpu.nested.as_ref().map(|n| &n.vmcs01.guest);
            assert_eq!(failed.count, failures, "{:?}: {refused:#x?}", failed.last.back());
        }
        Ok(())
    }

    /// A VMCS that passes all checks.
    fn valid(&self) -> Vmcs12 {
        let caps = self.caps();
        let mut v = Vmcs12::default();
        let entry = caps.entry.must_be_one | EntryControls::IA32E_MODE_GUEST.bits();
        let exit = caps.exit.must_be_one | ExitControls::HOST_ADDRESS_SPACE_SIZE.bits();
        let secondary = SecondaryControls::ENABLE_EPT.bits();
        let cr4 = cr4::PAE | cr4::VMXE;
        for (field, value) in [
            (Field::PinControls, caps.pin.must_be_one.into()),
            (Field::PrimaryControls, u64::from(caps.primary.must_be_one) | 1 << 31),
            (Field::SecondaryControls, secondary.into()),
            (Field::EntryControls, entry.into()),
            (Field::ExitControls, exit.into()),
            (Field::Eptp, EPT12 | 0x1e),
            (Field::LinkPointer, u64::MAX),
            (Field::HostCr0, self.start.guest.cr0),
            (Field::HostCr3, TABLES),
            (Field::HostCr4, cr4),
            (Field::HostCsSelector, 8),
            (Field::HostSsSelector, 0x10),
            (Field::HostTrSelector, 0x18),
            (Field::HostRip, HOST),
            (Field::HostRsp, 0x7000),
            (Field::GuestCr0, self.start.guest.cr0),
            (Field::GuestCr3, TABLES),
            (Field::GuestCr4, cr4),
            (Field::GuestDr7, 0x400),
            (Field::GuestRip, L2),
            (Field::GuestRsp, 0x6000),
            (Field::GuestRflags, 2),
        ] {
            v.set(field, value);
        }
        for (i, s) in self.start.guest.segments.iter().enumerate() {
            v.set_guest_segment(i, s);
        }
        v
    }

    /// Random settings of the controls, all of them allowed.
    fn controls(&self, v: &mut Vmcs12, r: &mut Random) {
        let caps = self.caps();
        for (field, allowed) in [
            (Field::PinControls, caps.pin),
            (Field::PrimaryControls, caps.primary),
            (Field::SecondaryControls, caps.secondary),
            (Field::EntryControls, caps.entry),
            (Field::ExitControls, caps.exit),
        ] {
            let few = r.next() & r.next() & r.next();
            let on = if r.below(2) == 0 { few } else { r.next() };
            v.set(field, v.get(field) | u64::from(allowed.may_be_one) & on | u64::from(allowed.must_be_one));
        }
        for field in [Field::VirtualApicAddress, Field::ApicAccessAddress, Field::MsrBitmap, Field::IoBitmapA]
        {
            v.set(field, r.below(RAM / 0x1000) << 12);
        }
    }

    /// The content of a random VMCS region.
    fn region(&self, r: &mut Random) -> Vec<u8> {
        let mut region = vec![0; 4096];
        if r.below(8) == 0 {
            // Noise all over, up to the revision identifier and the mark of an initialised region.
            region.chunks_mut(8).for_each(|c| c.copy_from_slice(&r.next().to_le_bytes()));
            if r.below(16) != 0 {
                region[..4].copy_from_slice(&REVISION.to_le_bytes());
            }
            if r.below(4) != 0 {
                Vmcs12::default().to_region(&mut region);
                let noise = Field::ALL.iter().fold(Vmcs12::default(), |mut v, f| {
                    v.set(*f, r.next() & f.width().mask());
                    v
                });
                noise.to_region(&mut region);
            }
            return region;
        }
        let mut v = self.valid();
        if r.below(2) == 0 {
            self.controls(&mut v, r);
        }
        for _ in 0..r.below(6) {
            let field = Field::ALL[r.below(Field::ALL.len() as u64) as usize];
            v.set(field, r.value(v.get(field)) & field.width().mask());
        }
        region[..4].copy_from_slice(&REVISION.to_le_bytes());
        v.to_region(&mut region);
        region
    }
}

/// Resident memory of this process in bytes.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap() * 4096
}

fn enter(count: u64, seed: u64) -> Tally {
    let mut r = Random(seed);
    let mut rig = Rig::new();
    let mut tally = Tally::default();
    let (mut ends, mut early) = (0_u64, 0);
    for round in 0..count {
        let region = rig.region(&mut r);
        let (pool, used) = (rig.pool, rig.vm.pool().used());
        assert!(used <= pool + MIN_EPT02_PAGES, "L0's pool grows: {used} pages of {pool}");
        if rig.enter(&region, &mut tally).is_err() {
            ends += 1;
            rig = Rig::new();
        }
        if round == count / 10 {
            early = resident();
        }
    }
    let late = resident();
    assert!(late < early + (64 << 20), "L0 grows: {early} bytes, then {late}");
    assert_eq!(tally.sum(), count);
    println!("{tally:?}; {ends} ends of the machine; resident {} MiB, then {} MiB", early >> 20, late >> 20);
    tally
}

#[test]
fn random_entries_are_legal_or_explained() {
    let tally = enter(10_000, 0x6e65_7374_766d_6d21);
    // The generator reaches all of it.
    for n in [tally.entered, tally.controls, tally.host, tally.guest, tally.msrs, tally.no_vmcs] {
        assert!(n > 0, "{tally:?}");
    }
}

#[test]
#[ignore = "takes minutes"]
fn a_million_random_entries_are_legal_or_explained() {
    enter(1_000_000, 0x1234_5678_9abc_def1);
}
