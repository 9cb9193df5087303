//! Entry points for fuzzing: each takes any bytes and must neither panic nor run without bound.
//!
//! The fuzz targets in `fuzz/` and the bounded runs in this crate's tests share them.

mod iommu;
mod pci;
mod vmx_program;

use std::io::Cursor;
use std::sync::Arc;

pub use iommu::iommu;
pub use pci::pci;
pub use vmx_program::vmx;

use engine::{Engine, EngineVmcs, ExitBus, GuestRegs, Segment, Vcpu, VmExit};
use engine_soft::SoftEngine;
use exit_trace::{Event, Exit, Level, Statistics, Trace};
use machine::boot::{self, BootEntry, BootFile, BootRequest};
use memory::{Gpa, L1Gpa, L1Ram, MachineAddr, MachineMemory, RamLayout};
use x86_spec::controls::{EntryControls, ExitControls, PinbasedControls, PrimaryControls, SecondaryControls};
use x86_spec::ept;
use x86_spec::exit::ExitReason;
use x86_spec::reg::{cr0, cr4, dr, efer, rflags};
use x86_spec::segment::{AccessRights, seg};

/// Guest memory: small, so that random addresses often hit it.
const RAM: u64 = 2 << 20;
const MACHINE: u64 = 4 << 20;
const EPT_ROOT: u64 = RAM;
const TABLES: u64 = 0x10_0000;
const CODE: u64 = 0x8000;
/// Preemption-timer ticks that one entry may take.
const TICKS: u32 = 20_000;
const MAX_EXITS: usize = 64;

/// Reads numbers off the input; zeros when it is used up.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn u64(&mut self) -> u64 {
        let mut b = [0; 8];
        let n = self.0.len().min(8);
        b[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        u64::from_le_bytes(b)
    }
    fn u8(&mut self) -> u8 {
        let Some((b, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *b
    }
    /// An address, a small number, or anything.
    fn value(&mut self) -> u64 {
        let v = self.u64();
        match v & 3 {
            0 => (v >> 8) % RAM,
            1 => (v >> 8) & 0xff,
            2 => (v >> 2) | 0xffff_8000_0000_0000,
            _ => v,
        }
    }
}

/// Devices that answer with noise.
struct Noise(u64);
impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        self.0 >> 16
    }
}
impl ExitBus for Noise {
    fn mmio_read(&mut self, _: Gpa, _: u8) -> u64 {
        self.next()
    }
    fn mmio_write(&mut self, _: Gpa, _: u8, _: u64) {}
    fn pio_read(&mut self, _: u16, _: u8) -> u32 {
        self.next() as u32
    }
    fn pio_write(&mut self, _: u16, _: u8, _: u32) {}
}

/// Writes an entry of a table that lies inside memory by construction.
fn entry(memory: &MachineMemory, table: u64, index: u64, value: u64) {
    memory.write_u64(MachineAddr(table + index * 8), value).expect("inside memory");
}

/// Identity tables for long mode (and, from the third on, PAE), and EPT01 with a device page at the
/// end of the first MiB.
fn build_tables(memory: &MachineMemory) {
    entry(memory, TABLES, 0, (TABLES + 0x1000) | 7);
    entry(memory, TABLES + 0x1000, 0, (TABLES + 0x2000) | 7);
    entry(memory, TABLES + 0x2000, 0, (TABLES + 0x3000) | 7);
    for page in 0..512 {
        entry(memory, TABLES + 0x3000, page, page << 12 | 7);
        let leaf = page << 12 | ept::RWX | ept::MEMTYPE_WB << ept::MEMTYPE_SHIFT;
        entry(memory, EPT_ROOT + 0x3000, page, if page == 0xff { 0 } else { leaf });
    }
    for level in 0..3 {
        entry(memory, EPT_ROOT + level * 0x1000, 0, (EPT_ROOT + (level + 1) * 0x1000) | ept::RWX);
    }
}

fn segment(selector: u16, access: u32) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, access: AccessRights(access), selector }
}

/// Guest state for one of the modes: real, protected 16- and 32-bit, PAE, 64-bit, each at
/// either privilege where it has one.
fn guest_state(vmcs: &mut EngineVmcs, mode: u8) {
    let g = &mut vmcs.guest;
    g.rip = CODE;
    g.rsp = 0x7000;
    g.cr0 = cr0::ET | cr0::NE;
    g.cr3 = TABLES;
    (g.gdtr.base, g.idtr.base) = (0x1000, 0x2000);
    let user = mode & 8 != 0;
    let (dpl, rpl) = if user { (0x60, 3) } else { (0, 0) };
    match mode & 7 {
        0 => {
            g.segments[seg::CS].base = 0;
            g.segments[seg::CS].selector = 0;
            return;
        }
        1 | 2 => g.cr0 |= cr0::PE,
        3 => {
            g.cr0 |= cr0::PE | cr0::PG;
            g.cr4 |= cr4::PAE;
            g.cr3 = TABLES + 0x1000;
            g.pdptes[0] = (TABLES + 0x2000) | 1;
        }
        _ => {
            g.cr0 |= cr0::PE | cr0::PG | cr0::WP;
            g.cr4 |= cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
            g.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
            vmcs.controls.entry |= EntryControls::IA32E_MODE_GUEST;
        }
    }
    let g = &mut vmcs.guest;
    let code = match mode & 7 {
        1 => 0x809b,
        2 | 3 => 0xc09b,
        _ => 0xa09b,
    };
    g.segments = [segment(0x10 | rpl, 0xc093 | dpl); 8];
    g.segments[seg::CS] = segment(8 | rpl, code | dpl);
    g.segments[seg::LDTR] = segment(0, 0x1_0000);
    g.segments[seg::TR] = Segment { base: 0x3000, limit: 0x67, access: AccessRights(0x8b), selector: 0x18 };
}

/// Runs the input as code from a state that its first bytes choose, on the software engine, with
/// noise for devices, for a bounded number of exits and a bounded time each.
pub fn cpu(data: &[u8]) {
    let mut b = Bytes(data);
    let memory = Arc::new(MachineMemory::new(MACHINE).expect("4 MiB of memory"));
    // One in two inputs has each block translated at once.
    let engine = SoftEngine::new(memory.clone())
        .expect("a host that runs the software engine")
        .with_translation_after(u32::from(b.u8() & 1));
    let mut vcpu = engine.create_vcpu().expect("a vCPU");
    build_tables(&memory);
    let mut vmcs = EngineVmcs::default();
    let c = &mut vmcs.controls;
    c.pin = PinbasedControls::EXTERNAL_INTERRUPT_EXITING | PinbasedControls::VMX_PREEMPTION_TIMER;
    c.primary = PrimaryControls::HLT_EXITING
        | PrimaryControls::UNCOND_IO_EXITING
        | PrimaryControls::MWAIT_EXITING
        | PrimaryControls::SECONDARY_CONTROLS;
    c.secondary = SecondaryControls::ENABLE_EPT
        | SecondaryControls::UNRESTRICTED_GUEST
        | SecondaryControls::ENABLE_RDTSCP
        | SecondaryControls::ENABLE_INVPCID
        | SecondaryControls::ENABLE_XSAVES_XRSTORS;
    c.entry =
        EntryControls::LOAD_DEBUG_CONTROLS | EntryControls::LOAD_IA32_EFER | EntryControls::LOAD_IA32_PAT;
    c.exit = ExitControls::SAVE_DEBUG_CONTROLS | ExitControls::SAVE_IA32_EFER | ExitControls::SAVE_IA32_PAT;
    c.eptp = ept::eptp(EPT_ROOT, false);
    c.exception_bitmap = if b.u8() & 1 != 0 { u32::MAX } else { 0 };
    guest_state(&mut vmcs, b.u8());
    let mut regs = GuestRegs::reset();
    regs.xcr0 = 7;
    regs.gpr = std::array::from_fn(|_| b.value());
    let g = &mut vmcs.guest;
    g.rflags = b.u64() & (rflags::STATUS | rflags::DF | rflags::TF | rflags::IF) | rflags::FIXED1;
    if b.u8() & 7 == 0 {
        g.dr7 = b.u64() & 0xffff_03ff | dr::DR7_FIXED1;
        regs.dr = std::array::from_fn(|_| b.value());
    }
    // The rest is code, and what it finds in memory: tables for interrupts among it.
    let code = b.0;
    for at in [CODE, 0x1000, 0x2000, 0x3000] {
        let len = code.len().min(0x1000);
        memory.write(MachineAddr(at), &code[..len]).expect("inside memory");
    }
    run(&mut vcpu, &mut vmcs, &mut regs);
}

/// Enters until the guest can't go on or has had its share.
fn run(vcpu: &mut impl Vcpu, vmcs: &mut EngineVmcs, regs: &mut GuestRegs) {
    let mut noise = Noise(1);
    for _ in 0..MAX_EXITS {
        vmcs.guest.preemption_timer = TICKS;
        let long = vmcs.guest.efer & efer::LMA != 0;
        vmcs.controls.entry.set(EntryControls::IA32E_MODE_GUEST, long);
        let exit = vcpu.enter(vmcs, regs);
        if exit.entry_failure || !go_on(vcpu, vmcs, regs, &exit, &mut noise) {
            return;
        }
    }
}

fn go_on(
    vcpu: &mut impl Vcpu,
    vmcs: &mut EngineVmcs,
    regs: &mut GuestRegs,
    exit: &VmExit,
    noise: &mut Noise,
) -> bool {
    match exit.reason {
        ExitReason::TripleFault | ExitReason::PreemptionTimer | ExitReason::TaskSwitch => false,
        ExitReason::EptViolation | ExitReason::IoInstruction => match vcpu.emulate(vmcs, regs, noise) {
            None => true,
            Some(again) => !matches!(again.reason, ExitReason::EptViolation | ExitReason::IoInstruction),
        },
        ExitReason::EptMisconfiguration => false,
        _ => {
            vmcs.guest.rip = vmcs.guest.rip.wrapping_add(exit.instruction_length.into());
            if vmcs.guest.efer & efer::LMA == 0 {
                vmcs.guest.rip &= 0xffff_ffff;
            }
            exit.instruction_length != 0
        }
    }
}

/// Plays the input as a guest's accesses to the PC's devices: ports, device memory, MSRs, with time
/// passing in between. Each access takes twelve bytes.
pub fn devices(data: &[u8]) {
    use devices::{Clock, ManualClock};
    use machine::{Pc, PcConfig};
    /// Where devices are, so that most accesses find one.
    const PORTS: [u16; 16] = [
        0x20, 0xa0, 0x40, 0x43, 0x60, 0x64, 0x70, 0x71, 0x3f8, 0x3fa, 0x4d0, 0x510, 0x600, 0xcf8, 0xcf9,
        0x2000,
    ];
    const PAGES: [u64; 4] = [0xfec0_0000, 0xfee0_0000, 0xff00_0000, 0xe000_0000];
    let clock = Arc::new(ManualClock::default());
    let config = PcConfig {
        cpus: 2,
        debug_exit: true,
        testdev: true,
        clock: Some(clock.clone()),
        utc_ns: Some(0),
        ..PcConfig::default()
    };
    let pc = Pc::new(config, &[]).expect("a PC with two vCPUs");
    let mut b = Bytes(data);
    while !b.0.is_empty() {
        let (what, which, low) = (b.u8(), b.u8(), b.u8());
        let (size, value) = (1 << (b.u8() & 3), b.u64());
        let port = PORTS[which as usize & 15].wrapping_add(u16::from(low & 7));
        let port = if which & 0x80 != 0 { u16::from_le_bytes([low, which]) } else { port };
        let gpa = PAGES[which as usize & 3] + (u64::from(low) << 4);
        let cpu = usize::from(which & 1);
        let msr = 0x800 + u32::from(low);
        match what & 7 {
            0 => pc.pio_write(port, size.min(4), value as u32),
            1 => _ = pc.pio_read(port, size.min(4)),
            2 => pc.mmio_write(cpu, L1Gpa(gpa), size, value),
            3 => _ = pc.mmio_read(cpu, L1Gpa(gpa), size),
            4 => _ = pc.write_msr(cpu, if which & 0x40 != 0 { 0x1b } else { msr }, value),
            5 => _ = pc.read_msr(cpu, msr),
            6 => _ = pc.take_interrupt(cpu),
            _ => {
                clock.set_ns(clock.now_ns().saturating_add(value >> 24));
                pc.tick(clock.now_ns());
                let next = pc.next_deadline();
                assert!(next.is_none_or(|at| at > clock.now_ns()), "a deadline that does not pass");
            }
        }
    }
}

/// Gives the input to every boot loader as a kernel with an initrd of its last bytes.
pub fn boot_loaders(data: &[u8]) {
    let memory = Arc::new(MachineMemory::new(64 << 20).expect("64 MiB of memory"));
    let ram = L1Ram::new(memory, RamLayout::new(64 << 20)).expect("RAM inside memory");
    let kernel = BootFile { name: "fuzz".into(), data: data.to_vec() };
    let initrd = BootFile { name: "initrd".into(), data: data[data.len() / 2..].to_vec() };
    for entry in [BootEntry::Auto, BootEntry::Pvh, BootEntry::Decompressor] {
        let request = BootRequest {
            kernel: &kernel,
            initrd: Some(&initrd),
            modules: &[],
            command_line: Some("fuzz"),
            acpi: &[],
            rsdp: L1Gpa(0),
            entry,
        };
        // Any error will do; none may be a panic.
        let _ = boot::load(&ram, &request);
    }
}

/// Gives the input to the image reader as a file.
pub fn image(data: &[u8]) {
    use std::io::Write;
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(data).expect("a writable temporary file");
    let _ = machine::image::open(file.path(), None, 16 << 20);
    let _ = machine::image::read_disk(file.path());
}

/// An exit trace: read, summed up and exported. With an even first byte the rest is damage done to a good trace, at
/// places that it names; else the rest is the file.
pub fn trace(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    let file = if first % 2 == 0 { damaged_trace(Bytes(rest)) } else { rest.to_vec() };
    let Ok(mut trace) = Trace::new(Cursor::new(file)) else { return };
    let mut statistics = Statistics::default();
    for cpu in 0..trace.header().vcpus.min(4) {
        let visit = |event: Option<Event>| {
            match event {
                Some(event) => statistics.event(&event),
                None => statistics.gap(),
            }
            true
        };
        trace.for_each(cpu, visit).expect("memory can be read");
    }
    let _ = statistics.summary(0).to_string();
    exit_trace::export(&mut trace, std::io::sink(), |_| true).expect("memory can be read");
}

/// A small trace with bytes changed. Checksums are made good again, as otherwise damage would go no further.
fn damaged_trace(mut bytes: Bytes<'_>) -> Vec<u8> {
    use exit_trace::format::{CHUNK_SIZE, ChunkHeader, HEADER_SIZE, RECORD_SIZE};
    const COUNT: usize = 40;
    let header = exit_trace::format::Header { vcpus: 1, chunks: 2, tsc_hz: 1, start_unix_ns: 0 };
    let mut file = vec![0; HEADER_SIZE + 2 * CHUNK_SIZE];
    let head = header.encode();
    file[..head.len()].copy_from_slice(&head);
    for sequence in 0..2 {
        let at = HEADER_SIZE + sequence * CHUNK_SIZE;
        let records = &mut file[at + RECORD_SIZE..][..COUNT * RECORD_SIZE];
        for record in records.chunks_exact_mut(RECORD_SIZE) {
            let reason = ExitReason::ALL[usize::from(bytes.u8()) % ExitReason::ALL.len()];
            let mut exit = Exit::new(Level::L1, reason);
            (exit.time_ns, exit.guest_ns, exit.l0_ns) = (bytes.value(), bytes.value(), bytes.value());
            record.copy_from_slice(&exit_trace::format::encode(&Event::Exit(exit)));
            // Flags, reasons and lengths of any value.
            let field = 52 + usize::from(bytes.u8() % 12);
            record[field] = bytes.u8();
        }
        let sum = exit_trace::format::checksum(records);
        let chunk = ChunkHeader {
            cpu: 0,
            sequence: sequence as u64 + 2 * (bytes.value() >> 1 & 1),
            first: bytes.value(),
            count: COUNT as u32,
            sum,
        };
        file[at..at + RECORD_SIZE].copy_from_slice(&chunk.encode());
    }
    let cut = bytes.value() as usize;
    if cut.is_multiple_of(4) {
        file.truncate(HEADER_SIZE + cut / 4 % (2 * CHUNK_SIZE));
    }
    file
}
