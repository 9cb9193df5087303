//! What is known about a guest that can't go on.

use std::fmt;

use engine::{GuestRegs, GuestState};
use exit_trace::{Exit, Level};
use vmx_emu::reflect::Abort;
use x86_spec::reg::{efer, gpr};
use x86_spec::segment::seg;

/// Why the guest can't go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CrashCause {
    /// A triple fault: the processor shut down (SDM Vol. 3A §6.15, "Interrupt 8").
    TripleFault,
    /// The guest fetched an instruction where there is no memory.
    FetchOutsideRam {
        /// The guest-physical address.
        gpa: u64,
    },
    /// The delivery of an interrupt or exception used a stack or table that is no memory.
    DeliveryOutsideRam {
        /// The guest-physical address.
        gpa: u64,
        /// The vector.
        vector: u8,
    },
    /// A hardware task switch, which is not supported.
    TaskSwitch {
        /// The selector of the new task.
        selector: u16,
    },
    /// A VM exit to L1 that could not be completed (SDM Vol. 3C §28.7).
    VmxAbort {
        /// What failed.
        abort: Abort,
    },
    /// An instruction that the engine can't do on device memory.
    UnsupportedDeviceAccess {
        /// The guest-physical address.
        gpa: u64,
    },
}

impl fmt::Display for CrashCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TripleFault => write!(f, "triple fault"),
            Self::FetchOutsideRam { gpa } => {
                write!(f, "an instruction was fetched from physical address {gpa:#x}, which is not memory")
            }
            Self::DeliveryOutsideRam { gpa, vector } => write!(
                f,
                "the delivery of vector {vector} used physical address {gpa:#x}, which is not memory"
            ),
            Self::TaskSwitch { selector } => {
                write!(f, "a hardware task switch (to selector {selector:#x}), which is not supported")
            }
            Self::VmxAbort { abort } => write!(f, "{abort}"),
            Self::UnsupportedDeviceAccess { gpa } => write!(
                f,
                "an instruction that is not supported on device memory, at physical address {gpa:#x}"
            ),
        }
    }
}

/// Code near RIP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CodeBytes {
    /// Linear address of the first byte: CS base + RIP.
    pub linear: u64,
    /// Bytes from there, as many as are mapped.
    pub bytes: Vec<u8>,
    /// 16, 32 or 64.
    pub bitness: u32,
}

/// A guest's last state.
#[derive(Clone, Debug)]
pub struct CrashReport {
    /// Why it can't go on.
    pub cause: CrashCause,
    /// Which level was in the guest.
    pub level: Level,
    /// Guest state.
    pub guest: GuestState,
    /// Registers outside of the VMCS.
    pub regs: GuestRegs,
    /// The last exits, oldest first.
    pub exits: Vec<Exit>,
    /// The code at RIP.
    pub code: CodeBytes,
}

/// The size of code that CS selects: 16, 32 or 64 bits.
pub fn bitness(guest: &GuestState) -> u32 {
    let cs = guest.segments[seg::CS].access;
    if guest.efer & efer::LMA != 0 && cs.long() {
        64
    } else if cs.db() {
        32
    } else {
        16
    }
}

impl fmt::Display for CrashReport {
    /// Cause, registers and last exits. The disassembly is the caller's.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the guest crashed in {}: {}", self.level, self.cause)?;
        write_registers(f, &self.guest, &self.regs)?;
        writeln!(f, "last VM exits, with level and owner:")?;
        self.exits.iter().try_for_each(|exit| writeln!(f, "  {exit}"))
    }
}

fn write_registers(f: &mut fmt::Formatter<'_>, g: &GuestState, r: &GuestRegs) -> fmt::Result {
    for row in 0..4 {
        for col in 0..4 {
            let i = row * 4 + col;
            let v = if i == gpr::RSP { g.rsp } else { r.gpr[i] };
            write!(f, "{:>4} {v:016x}", gpr::NAMES[i])?;
        }
        writeln!(f)?;
    }
    writeln!(f, " rip {:016x} rflags {:08x} activity {:?}", g.rip, g.rflags, g.activity)?;
    writeln!(f, " cr0 {:08x} cr2 {:016x} cr3 {:016x} cr4 {:08x}", g.cr0, r.cr2, g.cr3, g.cr4)?;
    writeln!(f, " efer {:04x} xcr0 {:x} dr6 {:08x} dr7 {:08x}", g.efer, r.xcr0, r.dr6, g.dr7)?;
    for (name, s) in seg::NAMES.iter().zip(&g.segments) {
        writeln!(
            f,
            "{name:>4} {:04x} base {:016x} limit {:08x} access {:05x}",
            s.selector, s.base, s.limit, s.access.0
        )?;
    }
    writeln!(f, "gdtr base {:016x} limit {:04x}", g.gdtr.base, g.gdtr.limit)?;
    writeln!(f, "idtr base {:016x} limit {:04x}", g.idtr.base, g.idtr.limit)
}
