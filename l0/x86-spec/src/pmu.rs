//! Architectural performance monitoring, version 2: registers, events and CPUID leaf 0AH (SDM
//! Vol. 3B §20.2.1 and §20.2.2, Vol. 4 table 2-2, Vol. 2A CPUID).

/// Version that leaf 0AH reports.
pub const VERSION: u32 = 2;
/// General-purpose counters.
pub const GENERAL: usize = 4;
/// Fixed-function counters: instructions retired, core cycles, reference cycles (§20.2.2).
pub const FIXED: usize = 3;
/// Width of all counters in bits.
pub const WIDTH: u32 = 48;
/// The bits of a counter.
pub const COUNTER: u64 = (1 << WIDTH) - 1;
/// Number of fixed counter 0 in IA32_PERF_GLOBAL_CTRL and its kin (§20.2.2).
pub const FIRST_FIXED: u32 = 32;
/// Bits of IA32_PERF_GLOBAL_CTRL: one for each counter (§20.2.2).
pub const GLOBAL: u64 = ((1 << GENERAL) - 1) | ((1 << FIXED) - 1) << FIRST_FIXED;
/// IA32_PERF_GLOBAL_STATUS: OvfDSBuffer (62) and CondChgd (63), which IA32_PERF_GLOBAL_OVF_CTRL
/// clears (§20.2.2).
pub const STATUS_OTHERS: u64 = 3 << 62;

/// IA32_A_PMC0, the alias of IA32_PMC0 that is written in full width (§20.2).
pub const IA32_A_PMC0: u32 = 0x4c1;

/// IA32_PERF_CAPABILITIES: FW_WRITE, full-width writes through IA32_A_PMCx (§20.2).
pub const CAPABILITY_FULL_WIDTH: u64 = 1 << 13;

/// IA32_DEBUGCTL: FREEZE_LBRS_ON_PMI (§18.4.7).
pub const DEBUGCTL_FREEZE_LBRS: u64 = 1 << 11;
/// IA32_DEBUGCTL: FREEZE_PERFMON_ON_PMI (§18.4.7).
pub const DEBUGCTL_FREEZE_PERFMON: u64 = 1 << 12;
/// IA32_MISC_ENABLE: performance monitoring available.
pub const MISC_ENABLE_AVAILABLE: u64 = 1 << 7;

/// Bits of IA32_PERFEVTSELx (§20.2.1.1).
pub mod event_select {
    /// Event select and unit mask.
    pub const EVENT: u64 = 0xffff;
    /// USR: count at CPL 1, 2 and 3.
    pub const USR: u64 = 1 << 16;
    /// OS: count at CPL 0.
    pub const OS: u64 = 1 << 17;
    /// E: edge detect.
    pub const EDGE: u64 = 1 << 18;
    /// INT: overflow requests an interrupt.
    pub const INT: u64 = 1 << 20;
    /// EN: the counter is enabled.
    pub const EN: u64 = 1 << 22;
    /// INV: compare with the counter mask the other way round.
    pub const INV: u64 = 1 << 23;
    /// Where the counter mask (CMASK) starts.
    pub const CMASK_SHIFT: u32 = 24;
    /// All but the reserved bits. PC (19) drives a pin; AnyThread (21) is version 3's.
    pub const DEFINED: u64 = 0xffdf_ffff;
}

/// Architectural events, as event select and unit mask (§20.2.1.2).
pub mod event {
    /// UnHalted Core Cycles.
    pub const CORE_CYCLES: u64 = 0x003c;
    /// Instruction Retired.
    pub const INSTRUCTIONS: u64 = 0x00c0;
    /// UnHalted Reference Cycles.
    pub const REFERENCE_CYCLES: u64 = 0x013c;
}

/// The four bits that IA32_FIXED_CTR_CTRL has for each counter (§20.2.2).
pub mod fixed_control {
    /// Bits for one counter.
    pub const BITS: u32 = 4;
    /// Count at CPL 0.
    pub const OS: u64 = 1 << 0;
    /// Count at CPL 1, 2 and 3.
    pub const USR: u64 = 1 << 1;
    /// Overflow requests an interrupt.
    pub const PMI: u64 = 1 << 3;
    /// All but the reserved bits; AnyThread (2) is version 3's.
    pub const DEFINED: u64 = 0xbbb;
}

/// RDPMC: fixed-function counters are type 4000H in ECX bits 31:16 (Vol. 2B).
pub const RDPMC_FIXED: u32 = 0x4000 << 16;

/// Architectural events that are not counted, as 0AH:EBX has them: last-level cache references (3)
/// and misses (4), branch instructions (5) and mispredicted branches (6).
const EVENTS_MISSING: u32 = 0b111_1000;
/// Events that EBX speaks of.
const EVENTS: u32 = 7;

/// CPUID leaf 0AH of this PMU.
pub const LEAF: [u32; 4] = [
    VERSION | (GENERAL as u32) << 8 | WIDTH << 16 | EVENTS << 24,
    EVENTS_MISSING,
    0,
    FIXED as u32 | WIDTH << 5,
];
