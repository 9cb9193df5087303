//! A small guest for tests: memory, EPT, page tables, GDT, IDT and TSS made by hand, run
//! through [`Vcpu::enter`] until it exits.
//!
//! Every vector's handler is a VMCALL at [`handler`], so that an exit's RIP tells which
//! event was delivered.

use std::sync::Arc;

use engine::{Engine, EngineVmcs, GuestRegs, Segment, Vcpu, VmExit};
use memory::{MachineAddr, MachineMemory};
use x86_spec::controls::{EntryControls, ExitControls, PinbasedControls, PrimaryControls, SecondaryControls};
use x86_spec::ept;
use x86_spec::exit::ExitReason;
use x86_spec::reg::{cr0, cr4, efer, gpr};
use x86_spec::segment::{AccessRights, seg};

use crate::{SoftEngine, SoftVcpu};

/// Bytes of guest memory, identity-mapped at every level.
pub const MEMORY: u64 = 16 << 20;
/// Where tests put code.
pub const CODE: u64 = 0x4_0000;
/// Initial RSP.
pub const STACK: u64 = 0x8_0000;
/// RSP0 of the TSS.
pub const STACK0: u64 = 0x9_0000;
/// IST1 of the TSS.
pub const IST1: u64 = 0xa_0000;
/// Data for tests.
pub const DATA: u64 = 0xb_0000;
/// A linear page that is not present in 64-bit mode.
pub const NOT_PRESENT: u64 = MEMORY + 0x1000;
/// The GDT.
pub const GDT: u64 = 0x2_0000;
/// The IDT.
pub const IDT: u64 = 0x2_1000;
/// The TSS.
pub const TSS: u64 = 0x2_2000;
/// The MSR bitmap, all clear.
pub const MSR_BITMAP: u64 = 0x5000;
/// I/O bitmap A, all clear; B follows.
pub const IO_BITMAP: u64 = 0x6000;
/// The virtual-APIC page.
pub const VIRTUAL_APIC: u64 = 0x8000;

/// Selectors of the GDT.
pub mod sel {
    pub const CODE64: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const USER_CODE32: u16 = 0x18 | 3;
    pub const USER_DATA: u16 = 0x20 | 3;
    pub const USER_CODE64: u16 = 0x28 | 3;
    pub const CODE32: u16 = 0x30;
    pub const TSS: u16 = 0x38;
    /// Free slots from here.
    pub const FREE: u16 = 0x48;
}

/// Address of a vector's handler.
pub const fn handler(vector: u8) -> u64 {
    0x3_0000 + vector as u64 * 16
}

pub struct Guest {
    pub memory: Arc<MachineMemory>,
    pub vcpu: SoftVcpu,
    pub vmcs: EngineVmcs,
    pub regs: GuestRegs,
}

fn code(selector: u16, access: u32) -> Segment {
    Segment { base: 0, limit: u32::MAX, access: AccessRights(access), selector }
}

impl Guest {
    fn new() -> Self {
        let memory = Arc::new(MachineMemory::new(MEMORY).unwrap());
        let engine = SoftEngine::new(memory.clone()).unwrap();
        let vcpu = engine.create_vcpu().unwrap();
        let caps = engine.capabilities().clone();
        let mut vmcs = EngineVmcs::default();
        let c = &mut vmcs.controls;
        c.pin = PinbasedControls::from_bits_truncate(caps.pin.must_be_one)
            | PinbasedControls::EXTERNAL_INTERRUPT_EXITING
            | PinbasedControls::NMI_EXITING
            | PinbasedControls::VIRTUAL_NMIS;
        c.primary = PrimaryControls::from_bits_truncate(caps.primary.must_be_one)
            | PrimaryControls::HLT_EXITING
            | PrimaryControls::USE_MSR_BITMAPS
            | PrimaryControls::UNCOND_IO_EXITING
            | PrimaryControls::SECONDARY_CONTROLS;
        c.secondary = SecondaryControls::ENABLE_EPT
            | SecondaryControls::UNRESTRICTED_GUEST
            | SecondaryControls::ENABLE_VPID
            | SecondaryControls::ENABLE_RDTSCP
            | SecondaryControls::ENABLE_INVPCID;
        c.exit = ExitControls::from_bits_truncate(caps.exit.must_be_one)
            | ExitControls::SAVE_DEBUG_CONTROLS
            | ExitControls::SAVE_IA32_EFER
            | ExitControls::SAVE_IA32_PAT;
        c.entry = EntryControls::from_bits_truncate(caps.entry.must_be_one)
            | EntryControls::LOAD_DEBUG_CONTROLS
            | EntryControls::LOAD_IA32_EFER
            | EntryControls::LOAD_IA32_PAT;
        c.vpid = 1;
        c.eptp = ept::eptp(0x1000, false);
        c.msr_bitmap = MachineAddr(MSR_BITMAP);
        c.io_bitmap_a = MachineAddr(IO_BITMAP);
        c.io_bitmap_b = MachineAddr(IO_BITMAP + 0x1000);
        c.virtual_apic = MachineAddr(VIRTUAL_APIC);
        let mut g = Self { memory, vcpu, vmcs, regs: GuestRegs::reset() };
        let wb = ept::RWX | ept::MEMTYPE_WB << ept::MEMTYPE_SHIFT;
        g.write64(0x1000, 0x2000 | ept::RWX);
        g.write64(0x2000, 0x3000 | ept::RWX);
        for n in 0..MEMORY >> 21 {
            g.write64(0x3000 + n * 8, n << 21 | wb | ept::LARGE);
        }
        for v in 0..=255u8 {
            g.write(handler(v), &[0x0f, 0x01, 0xc1]);
        }
        g.vmcs.guest.rip = CODE;
        g.vmcs.guest.rsp = STACK;
        g
    }

    /// Real mode with flat zero bases; code at [`CODE`] is reached through CS.base.
    pub fn real(bytes: &[u8]) -> Self {
        let mut g = Self::new();
        let s = |selector: u16, access| Segment {
            base: (selector as u64) << 4,
            limit: 0xffff,
            access: AccessRights(access),
            selector,
        };
        for index in 0..6 {
            g.vmcs.guest.segments[index] = s(0x1000, 0x93);
        }
        g.vmcs.guest.segments[seg::CS] = s((CODE >> 4) as u16, 0x9b);
        g.vmcs.guest.rip = 0;
        g.vmcs.guest.rsp = 0x8000;
        g.vmcs.guest.cr0 = cr0::ET;
        g.vmcs.guest.idtr.base = 0;
        for v in 0..=255u64 {
            g.write(v * 4, &((handler(v as u8) >> 4 << 16) as u32).to_le_bytes());
        }
        g.write(CODE, bytes);
        g
    }

    fn tables(&mut self) {
        let descriptors: [u64; 7] = [
            0,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x00cf_9b00_0000_ffff,
        ];
        for (n, d) in descriptors.iter().enumerate() {
            self.write64(GDT + n as u64 * 8, *d);
        }
        self.write64(GDT + sel::TSS as u64, 0x0000_8b00_0000_0067 | (TSS & 0xff_ffff) << 16);
        // No I/O permission bitmap: its base is past the limit.
        self.write(TSS + 0x66, &0x68u16.to_le_bytes());
        self.vmcs.guest.gdtr.base = GDT;
        self.vmcs.guest.gdtr.limit = 0xff;
        self.vmcs.guest.idtr.base = IDT;
        self.vmcs.guest.segments[seg::TR] =
            Segment { base: TSS, limit: 0x67, access: AccessRights(0x8b), selector: sel::TSS };
        self.vmcs.guest.segments[seg::LDTR] =
            Segment { access: AccessRights(AccessRights::UNUSABLE), ..Segment::default() };
    }

    /// 32-bit protected mode without paging, CPL 0, all vectors through 32-bit interrupt gates.
    pub fn protected(bytes: &[u8]) -> Self {
        let mut g = Self::new();
        g.tables();
        for v in 0..=255u8 {
            g.gate32(v, 0x8e, sel::CODE32, handler(v) as u32);
        }
        g.vmcs.guest.idtr.limit = 0x7ff;
        g.write(TSS + 4, &(STACK0 as u32).to_le_bytes());
        g.write(TSS + 8, &(sel::DATA as u32).to_le_bytes());
        g.vmcs.guest.cr0 = cr0::PE | cr0::ET | cr0::NE;
        for index in 0..6 {
            g.vmcs.guest.segments[index] = code(sel::DATA, 0xc093);
        }
        g.vmcs.guest.segments[seg::CS] = code(sel::CODE32, 0xc09b);
        g.write(CODE, bytes);
        g
    }

    /// 64-bit mode, CPL 0, all vectors through interrupt gates; 2 MiB user pages, identity.
    pub fn long(bytes: &[u8]) -> Self {
        let mut g = Self::new();
        g.tables();
        for v in 0..=255u8 {
            g.gate64(v, 0x8e, 0);
        }
        g.vmcs.guest.idtr.limit = 0xfff;
        g.write64(TSS + 4, STACK0);
        g.write64(TSS + 0x24, IST1);
        g.write64(0x1_0000, 0x1_1000 | 7);
        g.write64(0x1_1000, 0x1_2000 | 7);
        for n in 0..MEMORY >> 21 {
            g.write64(0x1_2000 + n * 8, n << 21 | 0x87);
        }
        let s = &mut g.vmcs.guest;
        s.cr0 = cr0::PE | cr0::PG | cr0::ET | cr0::NE | cr0::WP;
        s.cr3 = 0x1_0000;
        s.cr4 = cr4::PAE | cr4::DE;
        s.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
        for index in 0..6 {
            s.segments[index] = code(sel::DATA, 0xc093);
        }
        s.segments[seg::CS] = code(sel::CODE64, 0xa09b);
        g.vmcs.controls.entry |= EntryControls::IA32E_MODE_GUEST;
        g.write(CODE, bytes);
        g
    }

    /// As [`Guest::long`] at CPL 3.
    pub fn user(bytes: &[u8]) -> Self {
        let mut g = Self::long(bytes);
        for index in 0..6 {
            g.vmcs.guest.segments[index] = code(sel::USER_DATA, 0xc0f3);
        }
        g.vmcs.guest.segments[seg::CS] = code(sel::USER_CODE64, 0xa0fb);
        g
    }

    /// Sets a 64-bit gate to the vector's handler; `kind` is byte 5 of the gate.
    pub fn gate64(&mut self, vector: u8, kind: u8, ist: u8) {
        let h = handler(vector);
        let at = IDT + vector as u64 * 16;
        self.write64(
            at,
            h & 0xffff
                | (sel::CODE64 as u64) << 16
                | (ist as u64) << 32
                | (kind as u64) << 40
                | h >> 16 << 48,
        );
        self.write64(at + 8, 0);
    }

    /// Sets a 16- or 32-bit gate.
    pub fn gate32(&mut self, vector: u8, kind: u8, selector: u16, offset: u32) {
        let o = offset as u64;
        let raw = o & 0xffff | (selector as u64) << 16 | (kind as u64) << 40 | o >> 16 << 48;
        self.write64(IDT + vector as u64 * 8, raw);
    }

    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        self.memory.write(MachineAddr(at), bytes).unwrap();
    }
    pub fn write64(&mut self, at: u64, value: u64) {
        self.write(at, &value.to_le_bytes());
    }
    pub fn read64(&self, at: u64) -> u64 {
        let mut b = [0; 8];
        self.memory.read(MachineAddr(at), &mut b).unwrap();
        u64::from_le_bytes(b)
    }
    pub fn read32(&self, at: u64) -> u32 {
        self.read64(at) as u32
    }
    pub fn read16(&self, at: u64) -> u16 {
        self.read64(at) as u16
    }

    pub fn with(mut self, register: usize, value: u64) -> Self {
        if register == gpr::RSP {
            self.vmcs.guest.rsp = value;
        } else {
            self.regs.gpr[register] = value;
        }
        self
    }
    pub fn primary(mut self, c: PrimaryControls) -> Self {
        self.vmcs.controls.primary |= c;
        self
    }
    pub fn secondary(mut self, c: SecondaryControls) -> Self {
        self.vmcs.controls.secondary |= c;
        self
    }
    pub fn patch(mut self, f: impl FnOnce(&mut Self)) -> Self {
        f(&mut self);
        self
    }

    pub fn enter(&mut self) -> VmExit {
        self.vcpu.enter(&mut self.vmcs, &mut self.regs)
    }

    /// Runs and expects the exit reason.
    #[track_caller]
    pub fn expect(&mut self, reason: ExitReason) -> VmExit {
        let exit = self.enter();
        assert_eq!(exit.reason, reason, "{exit:x?}\n{:x?}", self.vmcs.guest);
        exit
    }

    /// Runs until the handler of `vector`, whose error code (if `error`) must be on the
    /// stack (64-bit and 32-bit mode).
    #[track_caller]
    pub fn expect_event(&mut self, vector: u8, error: Option<u32>) {
        let exit = self.enter();
        let g = &self.vmcs.guest;
        let at = g.segments[seg::CS].base + g.rip;
        assert_eq!((exit.reason, at), (ExitReason::Vmcall, handler(vector)), "{exit:x?}\n{g:x?}");
        if let Some(code) = error {
            assert_eq!(self.read32(g.rsp), code, "error code");
        }
    }
}
