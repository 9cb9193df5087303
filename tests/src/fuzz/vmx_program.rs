//! Any program of VMX instructions, run as L1 on the software engine with a PC around it: VMCS writes, entries
//! into L2, memory writes, MSRs, and raw bytes of code in between.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use devices::{Clock, Interrupts, MachineEvent};
use engine_soft::SoftEngine;
use hypervisor::{
    Board, Ept02Config, MIN_EPT02_PAGES, RunEnd, Start, VcpuLoop, VmBuilder, VmConfig, VmcsAccess,
};
use machine::boot::{BootGprs, BootState, BootTable};
use machine::{Pc, PcConfig};
use memory::{L1Gpa, L1Ram, MachineMemory};
use vmx_emu::Field;
use vmx_emu::vmcs12::REVISION;

use super::Bytes;

/// Guest memory.
const RAM: u64 = 4 << 20;
const TABLES: u64 = 0x1000;
/// A GDT with flat segments: 08H 64-bit code, 10H data, 18H a TSS.
const GDT: u64 = 0x4000;
const TSS: u64 = 0x4800;
const IDT: u64 = 0x5000;
const STACK: u64 = 0x7000;
/// Where L1 goes on after an exception or an exit of L2.
const NEXT: u64 = 0x7800;
const CODE: u64 = 0x8000;
/// The handler of all exceptions and interrupts of L1, and its host RIP.
const HANDLER: u64 = 0x7900;
const EPT12: u64 = 0x4_0000;
/// L2's code: CPUID, VMCALL, then what is there.
const L2: u64 = 0x5_0000;
/// VMXON region, and VMCSs in the pages after it.
const REGIONS: u64 = 0x6_0000;
/// Pointers to those, operands of VMXON, VMCLEAR, VMPTRLD.
const POINTERS: u64 = 0x7_0000;
/// Scratch memory.
const DATA: u64 = 0x8_0000;
/// Most operations of a program.
const MAX_OPERATIONS: usize = 120;
/// Most turns of the loop; each asks the board for events.
const MAX_TURNS: u32 = 1000;
/// How long a guest may run without an exit, in nanoseconds.
const SLICE: u64 = 20_000;
/// When a run ends that nothing else ends, such as one of an L2 that waits for a start-up IPI.
const LIMIT: Duration = Duration::from_millis(300);

/// The PC, for a bounded number of turns, with a deadline that is always near.
struct Bounded {
    pc: Arc<Pc>,
    turns: Mutex<u32>,
}

impl Board for Bounded {
    fn pio_read(&self, port: u16, size: u8) -> u32 {
        self.pc.pio_read(port, size)
    }
    fn pio_write(&self, port: u16, size: u8, value: u32) {
        self.pc.pio_write(port, size, value);
    }
    fn mmio_read(&self, cpu: usize, gpa: u64, size: u8) -> u64 {
        self.pc.mmio_read(cpu, L1Gpa(gpa), size)
    }
    fn mmio_write(&self, cpu: usize, gpa: u64, size: u8, value: u64) {
        self.pc.mmio_write(cpu, L1Gpa(gpa), size, value);
    }
    fn interrupts(&self) -> &Interrupts {
        self.pc.interrupts()
    }
    fn now_ns(&self) -> u64 {
        self.pc.now_ns()
    }
    fn tick(&self) {
        self.pc.tick(self.pc.now_ns());
    }
    fn next_deadline(&self) -> Option<u64> {
        Some(self.pc.now_ns() + SLICE)
    }
    fn take_event(&self) -> Option<MachineEvent> {
        let mut turns = self.turns.lock().expect("nothing panics while it is held");
        *turns += 1;
        if *turns > MAX_TURNS { Some(MachineEvent::PowerOff) } else { self.pc.take_event() }
    }
}

/// Machine code of L1.
#[derive(Default)]
struct Code(Vec<u8>);

impl Code {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
    /// MOV of an immediate to RAX (0), RCX (1), RDX (2) or another register.
    fn mov(&mut self, register: u8, value: u64) {
        self.bytes(&[0x48 | register >> 3, 0xb8 | register & 7]);
        self.bytes(&value.to_le_bytes());
    }
    /// An instruction with a memory operand at an absolute address, whose ModR/M has `reg`.
    fn memory(&mut self, opcode: &[u8], reg: u8, at: u64) {
        self.bytes(opcode);
        self.bytes(&[reg << 3 | 4, 0x25]);
        self.bytes(&(at as u32).to_le_bytes());
    }
    /// VMWRITE of a value to the field with this encoding.
    fn vmwrite(&mut self, encoding: u64, value: u64) {
        self.mov(0, value);
        self.mov(1, encoding);
        self.bytes(&[0x0f, 0x79, 0xc8]);
    }
    /// Where to go on after a fault or an exit of the operation that follows: behind its `len` bytes.
    fn resume_behind(&mut self, operation: &Code) {
        // MOV RAX, imm64; MOV [NEXT], RAX: 10 and 8 bytes.
        let next = CODE + (self.0.len() + 18 + operation.0.len()) as u64;
        self.mov(0, next);
        self.memory(&[0x48, 0x89], 0, NEXT);
    }
}

/// A field: one that exists, or any encoding.
fn field(b: &mut Bytes<'_>) -> u64 {
    match b.u8() {
        n if n < 0xf0 => Field::ALL[usize::from(n) % Field::ALL.len()].encoding().into(),
        _ => b.u64(),
    }
}

/// Where one of the pointers is.
fn pointer(b: &mut Bytes<'_>) -> u64 {
    POINTERS + u64::from(b.u8() & 7) * 8
}

/// An operand's address: scratch memory, mostly; else a region, a table, or outside RAM.
fn operand(b: &mut Bytes<'_>) -> u64 {
    let low = u64::from(b.u8());
    match b.u8() & 15 {
        0 => 0x9000_0000 + low,
        1 => REGIONS + low * 8,
        2 => EPT12 + low * 8,
        3 => RAM - 4,
        4 => TABLES + low * 8,
        _ => DATA + low * 8,
    }
}

/// The VMCS of an L2 that runs, as VMWRITEs.
fn valid_vmcs(code: &mut Code) {
    let rows: &[(Field, u64)] = &[
        (Field::PinControls, 0x16),
        (Field::PrimaryControls, 0x8400_6172),
        (Field::SecondaryControls, 0x2),
        (Field::ExitControls, 0x3_6ffb),
        (Field::EntryControls, 0x13fb),
        (Field::Eptp, EPT12 | 0x1e),
        (Field::LinkPointer, u64::MAX),
        (Field::HostCr0, 0x8001_0031),
        (Field::HostCr3, TABLES),
        (Field::HostCr4, 0x2020),
        (Field::HostCsSelector, 8),
        (Field::HostSsSelector, 0x10),
        (Field::HostTrSelector, 0x18),
        (Field::HostTrBase, TSS),
        (Field::HostGdtrBase, GDT),
        (Field::HostIdtrBase, IDT),
        (Field::HostRip, HANDLER),
        (Field::HostRsp, STACK),
        (Field::GuestCr0, 0x8001_0031),
        (Field::GuestCr3, TABLES),
        (Field::GuestCr4, 0x2020),
        (Field::GuestDr7, 0x400),
        (Field::GuestRip, L2),
        (Field::GuestRsp, STACK - 0x800),
        (Field::GuestRflags, 2),
        (Field::GuestGdtrBase, GDT),
        (Field::GuestGdtrLimit, 0x3f),
        (Field::GuestIdtrBase, IDT),
        (Field::GuestIdtrLimit, 0xfff),
    ];
    for (field, value) in rows {
        code.vmwrite(field.encoding().into(), *value);
    }
    // ES, CS, SS, DS, FS, GS, LDTR, TR: selector, limit, access rights (SDM Vol. 3D appendix B).
    let segments =
        [(0x10, 0xc093), (8, 0xa09b), (0x10, 0xc093), (0x10, 0xc093), (0x10, 0xc093), (0x10, 0xc093)];
    for (i, (selector, access)) in (0..).zip(segments) {
        code.vmwrite(0x800 + 2 * i, selector);
        code.vmwrite(0x4800 + 2 * i, 0xffff_ffff);
        code.vmwrite(0x4814 + 2 * i, access);
    }
    code.vmwrite(0x4820, 0x1_0000);
    code.vmwrite(0x80e, 0x18);
    code.vmwrite(0x480e, 0x67);
    code.vmwrite(0x4822, 0x8b);
}

/// One operation, as the input says.
fn operation(b: &mut Bytes<'_>, code: &mut Code) {
    match b.u8() % 26 {
        0..=3 => {
            let (field, value) = (field(b), b.value());
            code.vmwrite(field, value);
        }
        4 => {
            code.mov(1, field(b));
            code.bytes(&[0x0f, 0x78, 0xc8]);
        }
        5 => {
            code.mov(1, field(b));
            code.memory(&[0x0f, 0x78], 1, operand(b));
        }
        6 => {
            code.mov(1, field(b));
            code.memory(&[0x0f, 0x79], 1, operand(b));
        }
        7 => code.memory(&[0x66, 0x0f, 0xc7], 6, pointer(b)),
        8 => code.memory(&[0x0f, 0xc7], 6, pointer(b)),
        9 => code.memory(&[0x0f, 0xc7], 7, operand(b)),
        10 => code.memory(&[0xf3, 0x0f, 0xc7], 6, pointer(b)),
        11 => code.bytes(&[0x0f, 0x01, 0xc4]),
        12 | 13 => code.bytes(&[0x0f, 0x01, 0xc2]),
        14 | 15 => code.bytes(&[0x0f, 0x01, 0xc3]),
        16 => {
            code.mov(0, u64::from(b.u8() & 3));
            code.memory(&[0x66, 0x0f, 0x38, 0x80], 0, operand(b));
        }
        17 => {
            code.mov(0, u64::from(b.u8() & 7));
            code.memory(&[0x66, 0x0f, 0x38, 0x81], 0, operand(b));
        }
        18 => code.bytes(&[0x0f, 0x01, 0xc1]),
        19 => valid_vmcs(code),
        20 => {
            // MOV [operand], RAX.
            let at = operand(b);
            code.mov(0, b.value());
            code.memory(&[0x48, 0x89], 0, at);
        }
        21 => {
            // WRMSR.
            let msr = match b.u8() & 3 {
                0 => 0x480 + u64::from(b.u8() & 0x1f),
                1 => 0x800 + u64::from(b.u8() & 0x3f),
                _ => b.u64() & 0xffff_ffff,
            };
            code.mov(1, msr);
            code.mov(0, b.value());
            code.mov(2, b.value());
            code.bytes(&[0x0f, 0x30]);
        }
        22 => {
            // MOV to CR0 or CR4.
            code.mov(0, b.value());
            code.bytes(&[0x0f, 0x22, if b.u8() & 1 == 0 { 0xc0 } else { 0xe0 }]);
        }
        23 => {
            // Bytes of L2's code.
            code.mov(0, b.u64());
            code.memory(&[0x48, 0x89], 0, L2 + u64::from(b.u8() & 0x1f));
        }
        _ => {
            let raw = b.u64().to_le_bytes();
            code.bytes(&raw[..usize::from(b.u8() & 7)]);
        }
    }
}

/// L1's program.
fn program(b: &mut Bytes<'_>) -> Vec<u8> {
    let mut code = Code::default();
    // LIDT; LTR would need the TSS only for interrupts, which use no stack table. CR4.VMXE, VMXON, VMCLEAR, VMPTRLD.
    code.memory(&[0x0f, 0x01], 3, GDT + 0x400);
    code.bytes(&[0x0f, 0x20, 0xe0, 0x0d, 0x00, 0x20, 0x00, 0x00, 0x0f, 0x22, 0xe0]);
    if b.u8() & 7 != 0 {
        code.memory(&[0xf3, 0x0f, 0xc7], 6, POINTERS);
        code.memory(&[0x66, 0x0f, 0xc7], 6, POINTERS + 8);
        code.memory(&[0x0f, 0xc7], 6, POINTERS + 8);
        valid_vmcs(&mut code);
    }
    for _ in 0..MAX_OPERATIONS {
        if b.0.is_empty() {
            break;
        }
        let mut one = Code::default();
        operation(b, &mut one);
        code.resume_behind(&one);
        code.bytes(&one.0);
    }
    // OUT to isa-debug-exit; HLT.
    code.bytes(&[0xe6, 0xf4, 0xf4]);
    code.0
}

fn put64(ram: &L1Ram, at: u64, value: u64) {
    ram.write(L1Gpa(at), &value.to_le_bytes()).expect("inside RAM");
}

/// Memory as the program finds it.
fn lay_out(ram: &L1Ram, code: &[u8]) {
    for (at, value) in [
        (TABLES, 0x2007),
        (0x2000, 0x3007),
        (0x3000, 0x87),
        (0x3008, 0x20_0087),
        // Unbacked memory behind a 1-GiB page, for operands: linear 80000000H to C0000000H.
        (0x2010, 0x8000_0087),
        (GDT + 8, 0x00af_9b00_0000_ffff),
        (GDT + 0x10, 0x00cf_9300_0000_ffff),
        (GDT + 0x18, 0x0000_8b00_4800_0067),
        (GDT + 0x400, IDT << 16 | 0xfff),
        (EPT12, (EPT12 + 0x1000) | 7),
        (EPT12 + 0x1000, (EPT12 + 0x2000) | 7),
        (EPT12 + 0x1010, 0x8000_0000 | 0xb7),
        (EPT12 + 0x2000, 0xb7),
        (EPT12 + 0x2008, 0x20_00b7),
        (L2, 0xf4c1_010f_a20f),
    ] {
        put64(ram, at, value);
    }
    for n in 0..8 {
        put64(ram, POINTERS + 8 * n, REGIONS + 0x1000 * n);
        let shadow = if n == 5 { 1 << 31 } else { 0 };
        put64(ram, REGIONS + 0x1000 * n, u64::from(REVISION) | shadow);
    }
    // Interrupt gates to the handler, which starts over with the stack and goes on with the next operation.
    let gate = HANDLER & 0xffff | 8 << 16 | 0x8e << 40 | (HANDLER >> 16 & 0xffff) << 48;
    for vector in 0..256 {
        put64(ram, IDT + 16 * vector, gate);
    }
    let mut handler = Code::default();
    handler.mov(4, STACK);
    handler.memory(&[0xff], 4, NEXT);
    ram.write(L1Gpa(HANDLER), &handler.0).expect("inside RAM");
    ram.write(L1Gpa(CODE), code).expect("inside RAM");
}

/// Runs the input as a program of VMX instructions in L1, for a bounded time. The first byte chooses how L1
/// accesses its VMCS. Returns how many exits of L2 there were.
pub fn vmx(data: &[u8]) -> u64 {
    let mut b = Bytes(data);
    let vmcs_access = if b.u8() & 1 == 0 { VmcsAccess::Trapped } else { VmcsAccess::Shadow };
    let ept02 = Ept02Config { pages: MIN_EPT02_PAGES, ..Ept02Config::default() };
    let config = VmConfig { ram: RAM, cpus: 1, vmx: true, vmcs_access, ept02 };
    let size = config.machine_memory().expect("a small machine");
    let memory = Arc::new(MachineMemory::new(size).expect("memory"));
    let engine = SoftEngine::new(memory.clone()).expect("a host that runs the software engine");
    let engine = match vmcs_access {
        VmcsAccess::Shadow => engine.with_vmcs_shadowing(shadow_layout()),
        _ => engine,
    };
    let builder = VmBuilder::new(Arc::new(engine), memory, config).expect("a machine");
    let clock: Arc<dyn Clock> = builder.clock();
    let pc = PcConfig { ram_bytes: RAM, debug_exit: true, clock: Some(clock), ..PcConfig::default() };
    let pc = Arc::new(Pc::new(pc, &builder.tscs()).expect("a PC"));
    let vm = builder.build(Arc::new(Bounded { pc, turns: Mutex::new(0) }));
    lay_out(vm.ram(), &program(&mut b));
    let gprs = BootGprs { rsp: STACK, ..BootGprs::default() };
    let gdt = BootTable { base: GDT, limit: 0x3f };
    let state = BootState::long64(CODE, gprs, TABLES, (8, 0x10), gdt);
    let mut cpu = VcpuLoop::new(vm.clone(), 0, Start::Boot(&state)).expect("a vCPU");
    let (done, wait) = channel::<()>();
    let end = thread::scope(|scope| {
        let handle = vm.handle();
        scope.spawn(move || {
            if wait.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout) {
                handle.stop();
            }
        });
        let end = cpu.run();
        drop(done);
        end
    });
    if let RunEnd::Internal(what) = end {
        panic!("L0 or the engine did what it must not: {what}");
    }
    vm.handle().stats(0).map_or(0, |s| s.l2_exits)
}

/// Where fields are in a shadow VMCS, as `nestvmm run` tells the engine.
fn shadow_layout() -> engine_soft::system::shadow_vmcs::ShadowLayout {
    use engine_soft::system::shadow_vmcs::{ShadowField, ShadowLayout};
    let fields = vmx_emu::shadow_layout().iter().map(|f| ShadowField {
        encoding: f.encoding,
        offset: f.offset,
        width: f.width,
    });
    ShadowLayout::new(fields)
}
