//! Executes one instruction in the engine, in 64-bit or compatibility mode at CPL 3.

use std::sync::Arc;

use engine::{Controls, Engine, EngineVmcs, ExitBus, GuestRegs, GuestState, Segment, Vcpu};
use engine_soft::{SoftEngine, SoftVcpu};
use memory::{Gpa, MachineAddr, MachineMemory};
use x86_spec::caps::AllowedControls;
use x86_spec::controls::{EntryControls, ExitControls, PinbasedControls, PrimaryControls, SecondaryControls};
use x86_spec::exit::ExitReason;
use x86_spec::reg::{cr0, cr4, efer, gpr};
use x86_spec::segment::{AccessRights, seg};
use x86_spec::{ept, reg};

use crate::layout::{CODE, DATA, INSTRUCTION, PAGE, READ_ONLY};
use crate::state::{Data, End, State};

/// Machine addresses of the guest's structures; EPT maps them to themselves.
const EPT_ROOT: u64 = 0x1000;
const EPT_PDPT: u64 = 0x2000;
const PML4: u64 = 0x10000;
const PDPT: u64 = 0x11000;
const PD: u64 = 0x12000;
const PT_DATA: u64 = 0x13000;
const PT_CODE: u64 = 0x14000;
const DATA_PAGES: u64 = 0x20000;
const CODE_PAGE: u64 = 0x30000;

/// The engine as an executor of single instructions.
pub struct Guest {
    memory: Arc<MachineMemory>,
    vcpu: SoftVcpu,
    vmcs: EngineVmcs,
    regs: GuestRegs,
    _engine: SoftEngine,
}

struct NoBus;

impl ExitBus for NoBus {
    fn mmio_read(&mut self, _: Gpa, _: u8) -> u64 {
        0
    }
    fn mmio_write(&mut self, _: Gpa, _: u8, _: u64) {}
    fn pio_read(&mut self, _: u16, _: u8) -> u32 {
        0
    }
    fn pio_write(&mut self, _: u16, _: u8, _: u32) {}
}

fn paging(memory: &MachineMemory) {
    let write = |table: u64, index: u64, value: u64| {
        memory.write_u64(MachineAddr(table + 8 * index), value).unwrap();
    };
    write(EPT_ROOT, 0, EPT_PDPT | ept::RWX);
    write(EPT_PDPT, 0, ept::RWX | ept::LARGE | ept::MEMTYPE_WB << ept::MEMTYPE_SHIFT);
    // Present, writable, user, accessed, dirty.
    const TABLE: u64 = 0x67;
    write(PML4, 0, PDPT | TABLE);
    write(PDPT, 0, PD | TABLE);
    write(PD, DATA >> 21 & 511, PT_DATA | TABLE);
    write(PD, CODE >> 21 & 511, PT_CODE | TABLE);
    let pt = |address: u64| address >> 12 & 511;
    write(PT_DATA, pt(DATA), DATA_PAGES | TABLE);
    write(PT_DATA, pt(DATA + 0x1000), (DATA_PAGES + 0x1000) | TABLE);
    write(PT_DATA, pt(READ_ONLY), (DATA_PAGES + 0x2000) | 0x65);
    // The host maps the code page writable and executable too.
    write(PT_CODE, pt(CODE), CODE_PAGE | TABLE);
}

fn segment(access: u32, selector: u16) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, access: AccessRights(access), selector }
}

fn guest_state() -> GuestState {
    let mut s = GuestState {
        cr0: cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::PG,
        cr3: PML4,
        cr4: cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE,
        efer: efer::SCE | efer::LME | efer::LMA | efer::NXE,
        ..GuestState::default()
    };
    s.segments = [segment(0xc0f3, 0x2b); 8];
    s.segments[seg::CS] = segment(0xa0fb, 0x33);
    s.segments[seg::LDTR] = segment(AccessRights::UNUSABLE, 0);
    s.segments[seg::TR] = segment(0x8b, 0x40);
    s.segments[seg::TR].limit = 0x67;
    s
}

fn controls(caps: &x86_spec::caps::VmxCapabilities) -> Controls {
    let choose = |a: AllowedControls, wanted: u32| (a.must_be_one | wanted) & a.may_be_one;
    Controls {
        pin: PinbasedControls::from_bits_truncate(choose(caps.pin, 0)),
        primary: PrimaryControls::from_bits_truncate(choose(
            caps.primary,
            PrimaryControls::SECONDARY_CONTROLS.bits(),
        )),
        secondary: SecondaryControls::from_bits_truncate(choose(
            caps.secondary,
            (SecondaryControls::ENABLE_EPT
                | SecondaryControls::UNRESTRICTED_GUEST
                | SecondaryControls::ENABLE_XSAVES_XRSTORS)
                .bits(),
        )),
        exit: ExitControls::from_bits_truncate(choose(
            caps.exit,
            (ExitControls::HOST_ADDRESS_SPACE_SIZE | ExitControls::SAVE_IA32_EFER).bits(),
        )),
        entry: EntryControls::from_bits_truncate(choose(
            caps.entry,
            (EntryControls::IA32E_MODE_GUEST | EntryControls::LOAD_IA32_EFER).bits(),
        )),
        exception_bitmap: u32::MAX,
        eptp: ept::eptp(EPT_ROOT, false),
        ..Controls::default()
    }
}

impl Guest {
    /// A vCPU with the layout's pages.
    pub fn new(bits: u32) -> Self {
        let memory = Arc::new(MachineMemory::new(0x40000).unwrap());
        paging(&memory);
        let engine = SoftEngine::new(memory.clone()).unwrap();
        let vcpu = engine.create_vcpu().unwrap();
        let vmcs = EngineVmcs { guest: guest_state(), controls: controls(engine.capabilities()) };
        let mut vmcs = vmcs;
        if bits == 32 {
            vmcs.guest.segments[seg::CS] = segment(0xc0fb, 0x23);
        }
        let mut regs = GuestRegs::reset();
        regs.xcr0 = 7;
        Self { memory, vcpu, vmcs, regs, _engine: engine }
    }

    /// Puts the instruction in place.
    pub fn set_instruction(&mut self, bytes: &[u8]) {
        let mut code = [0xcc; 64];
        code[..bytes.len()].copy_from_slice(bytes);
        self.memory.write(MachineAddr(CODE_PAGE + (INSTRUCTION - CODE)), &code).unwrap();
    }

    /// Replaces the data pages.
    pub fn set_data(&mut self, data: &Data) {
        self.memory.write(MachineAddr(DATA_PAGES), &data[..2 * PAGE]).unwrap();
    }

    /// Replaces the read-only page.
    pub fn set_read_only(&mut self, data: &Data) {
        self.memory.write(MachineAddr(DATA_PAGES + 0x2000), &data[2 * PAGE..]).unwrap();
    }

    /// Copies the writable data pages out.
    pub fn data(&self, out: &mut Data) {
        self.memory.read(MachineAddr(DATA_PAGES), &mut out[..2 * PAGE]).unwrap();
    }

    /// Runs the instruction.
    pub fn run(&mut self, state: &mut State) -> End {
        let r = &mut self.regs;
        r.gpr = state.gpr;
        self.vmcs.guest.rsp = state.gpr[gpr::RSP];
        self.vmcs.guest.rip = INSTRUCTION;
        self.vmcs.guest.rflags = state.rflags | reg::rflags::FIXED1 | reg::rflags::IF;
        r.fpu.vectors = state.vectors;
        r.fpu.x87.0[..160].copy_from_slice(&state.x87);
        r.fpu.mxcsr = state.mxcsr;
        let mut exit = None;
        // A repeated string instruction may stop between iterations.
        for _ in 0..100 {
            exit = self.vcpu.emulate(&mut self.vmcs, &mut self.regs, &mut NoBus);
            if exit.is_some() || self.vmcs.guest.rip != INSTRUCTION {
                break;
            }
        }
        let r = &mut self.regs;
        state.gpr = r.gpr;
        state.gpr[gpr::RSP] = self.vmcs.guest.rsp;
        if !self.vmcs.guest.segments[seg::CS].access.long() {
            state.gpr.iter_mut().for_each(|v| *v = *v as u32 as u64);
        }
        state.rflags = self.vmcs.guest.rflags & crate::FLAGS;
        state.vectors = r.fpu.vectors;
        state.x87.copy_from_slice(&r.fpu.x87.0[..160]);
        state.x87[24..32].fill(0);
        state.mxcsr = r.fpu.mxcsr;
        match exit {
            None => End::Next(self.vmcs.guest.rip.wrapping_sub(INSTRUCTION)),
            Some(e) if e.reason == ExitReason::ExceptionOrNmi => {
                let rip = self.vmcs.guest.rip;
                assert_eq!(rip, INSTRUCTION, "a fault leaves RIP at the instruction");
                match e.interruption_info.vector() {
                    14 => End::Fault(14, e.interruption_error_code, e.qualification),
                    v => End::Fault(v, 0, 0),
                }
            }
            Some(e) => panic!("unexpected exit {e:?}"),
        }
    }
}
