//! The state in which a boot protocol hands the first vCPU to its kernel.

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootSegment {
    /// Selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes, after granularity is applied.
    pub limit: u32,
    /// Access rights in the format of a VMCS guest-state field (SDM Vol. 3C §25.4.1,
    /// table 25-2).
    pub access_rights: u32,
}

/// Type 3, S, P, G, D/B: a flat, accessed, writable data segment.
const DATA_RIGHTS: u32 = 0xc093;
/// Type 11, S, P, G, D/B: a flat, accessed, readable 32-bit code segment.
const CODE32_RIGHTS: u32 = 0xc09b;
/// Type 11, S, P, G, L: a 64-bit code segment.
const CODE64_RIGHTS: u32 = 0xa09b;
/// Type 11, P: a busy 32- or 64-bit TSS, which VM entry demands of TR (SDM Vol. 3C
/// §27.3.1.2).
const BUSY_TSS_RIGHTS: u32 = 0x008b;
/// The "unusable" bit.
const UNUSABLE: u32 = 1 << 16;

impl BootSegment {
    /// A flat data segment.
    pub const fn flat_data(selector: u16) -> Self {
        Self { selector, base: 0, limit: u32::MAX, access_rights: DATA_RIGHTS }
    }
    /// A flat 32-bit code segment.
    pub const fn flat_code32(selector: u16) -> Self {
        Self { selector, base: 0, limit: u32::MAX, access_rights: CODE32_RIGHTS }
    }
    /// A 64-bit code segment.
    pub const fn code64(selector: u16) -> Self {
        Self { selector, base: 0, limit: u32::MAX, access_rights: CODE64_RIGHTS }
    }
    /// A busy TSS of the minimal size.
    pub const fn tss(selector: u16) -> Self {
        Self { selector, base: 0, limit: 0x67, access_rights: BUSY_TSS_RIGHTS }
    }
    /// A register that holds no segment.
    pub const fn unusable() -> Self {
        Self { selector: 0, base: 0, limit: 0, access_rights: UNUSABLE }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BootTable {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// The operating mode at entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootMode {
    /// Protected mode without paging, 32-bit flat segments.
    Protected32,
    /// Long mode, 64-bit code, identity-mapped.
    Long64,
}

/// General-purpose registers at entry; those a protocol leaves undefined are 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BootGprs {
    /// RAX.
    pub rax: u64,
    /// RBX.
    pub rbx: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// RSI.
    pub rsi: u64,
    /// RDI.
    pub rdi: u64,
    /// RBP.
    pub rbp: u64,
    /// RSP.
    pub rsp: u64,
    /// R8 to R15.
    pub r8_r15: [u64; 8],
}

/// Everything of the first vCPU that a boot protocol defines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootState {
    /// The operating mode that the fields below amount to.
    pub mode: BootMode,
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS: interrupts off, only the reserved bit 1 set.
    pub rflags: u64,
    /// General-purpose registers.
    pub gprs: BootGprs,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// CS.
    pub cs: BootSegment,
    /// DS.
    pub ds: BootSegment,
    /// ES.
    pub es: BootSegment,
    /// SS.
    pub ss: BootSegment,
    /// FS.
    pub fs: BootSegment,
    /// GS.
    pub gs: BootSegment,
    /// TR.
    pub tr: BootSegment,
    /// LDTR.
    pub ldtr: BootSegment,
    /// GDTR.
    pub gdtr: BootTable,
    /// IDTR: empty, so that a fault before the kernel has its own table is a triple fault.
    pub idtr: BootTable,
}

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

impl BootState {
    /// Protected mode without paging and with flat segments, entered at `rip`: what PVH and
    /// multiboot ask for.
    pub fn protected32(rip: u32, gprs: BootGprs, selectors: (u16, u16), gdtr: BootTable) -> Self {
        let (code, data) = selectors;
        let data = BootSegment::flat_data(data);
        Self {
            mode: BootMode::Protected32,
            rip: rip.into(),
            rflags: 2,
            gprs,
            cr0: CR0_PE | CR0_ET | CR0_NE,
            cr3: 0,
            cr4: 0,
            efer: 0,
            cs: BootSegment::flat_code32(code),
            ds: data,
            es: data,
            ss: data,
            fs: data,
            gs: data,
            tr: BootSegment::tss(0),
            ldtr: BootSegment::unusable(),
            gdtr,
            idtr: BootTable::default(),
        }
    }

    /// Long mode on the page tables at `cr3`, entered at `rip`: Linux's 64-bit boot protocol.
    pub fn long64(rip: u64, gprs: BootGprs, cr3: u64, selectors: (u16, u16), gdtr: BootTable) -> Self {
        let base = Self::protected32(0, gprs, selectors, gdtr);
        Self {
            mode: BootMode::Long64,
            rip,
            cr0: base.cr0 | CR0_PG,
            cr3,
            cr4: CR4_PAE,
            efer: EFER_LME | EFER_LMA,
            cs: BootSegment::code64(selectors.0),
            ..base
        }
    }
}
