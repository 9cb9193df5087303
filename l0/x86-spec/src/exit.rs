//! Basic VM-exit reasons (SDM Vol. 3D appendix C) and exit qualifications (Vol. 3C §28.2.1).

macro_rules! exit_reasons {
    ($($(#[$doc:meta])* $name:ident = $value:literal, $text:literal;)*) => {
        /// A basic VM-exit reason (SDM Vol. 3D appendix C, table C-1).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum ExitReason { $($(#[$doc])* $name = $value,)* }

        impl ExitReason {
            /// All reasons, in order of number.
            pub const ALL: &[ExitReason] = &[$(ExitReason::$name,)*];

            /// The reason with this number.
            pub const fn from_u16(n: u16) -> Option<Self> {
                match n { $($value => Some(Self::$name),)* _ => None }
            }
            /// The name that KVM's tools use.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

exit_reasons! {
    /// Exception or non-maskable interrupt.
    ExceptionOrNmi = 0, "EXCEPTION_NMI";
    /// External interrupt.
    ExternalInterrupt = 1, "EXTERNAL_INTERRUPT";
    /// Triple fault.
    TripleFault = 2, "TRIPLE_FAULT";
    /// INIT signal.
    Init = 3, "INIT_SIGNAL";
    /// Start-up IPI.
    Sipi = 4, "SIPI_SIGNAL";
    /// I/O SMI.
    IoSmi = 5, "IO_SMI";
    /// Other SMI.
    OtherSmi = 6, "OTHER_SMI";
    /// Interrupt window.
    InterruptWindow = 7, "INTERRUPT_WINDOW";
    /// NMI window.
    NmiWindow = 8, "NMI_WINDOW";
    /// Task switch.
    TaskSwitch = 9, "TASK_SWITCH";
    /// CPUID.
    Cpuid = 10, "CPUID";
    /// GETSEC.
    Getsec = 11, "GETSEC";
    /// HLT.
    Hlt = 12, "HLT";
    /// INVD.
    Invd = 13, "INVD";
    /// INVLPG.
    Invlpg = 14, "INVLPG";
    /// RDPMC.
    Rdpmc = 15, "RDPMC";
    /// RDTSC.
    Rdtsc = 16, "RDTSC";
    /// RSM.
    Rsm = 17, "RSM";
    /// VMCALL.
    Vmcall = 18, "VMCALL";
    /// VMCLEAR.
    Vmclear = 19, "VMCLEAR";
    /// VMLAUNCH.
    Vmlaunch = 20, "VMLAUNCH";
    /// VMPTRLD.
    Vmptrld = 21, "VMPTRLD";
    /// VMPTRST.
    Vmptrst = 22, "VMPTRST";
    /// VMREAD.
    Vmread = 23, "VMREAD";
    /// VMRESUME.
    Vmresume = 24, "VMRESUME";
    /// VMWRITE.
    Vmwrite = 25, "VMWRITE";
    /// VMXOFF.
    Vmxoff = 26, "VMXOFF";
    /// VMXON.
    Vmxon = 27, "VMXON";
    /// Control-register access.
    CrAccess = 28, "CR_ACCESS";
    /// MOV DR.
    MovDr = 29, "DR_ACCESS";
    /// I/O instruction.
    IoInstruction = 30, "IO_INSTRUCTION";
    /// RDMSR.
    Rdmsr = 31, "MSR_READ";
    /// WRMSR.
    Wrmsr = 32, "MSR_WRITE";
    /// VM-entry failure: invalid guest state.
    InvalidGuestState = 33, "INVALID_STATE";
    /// VM-entry failure: MSR loading.
    MsrLoading = 34, "MSR_LOAD_FAIL";
    /// MWAIT.
    Mwait = 36, "MWAIT_INSTRUCTION";
    /// Monitor trap flag.
    MonitorTrapFlag = 37, "MONITOR_TRAP_FLAG";
    /// MONITOR.
    Monitor = 39, "MONITOR_INSTRUCTION";
    /// PAUSE.
    Pause = 40, "PAUSE_INSTRUCTION";
    /// VM-entry failure: machine-check event.
    MachineCheckOnEntry = 41, "MCE_DURING_VMENTRY";
    /// TPR below threshold.
    TprBelowThreshold = 43, "TPR_BELOW_THRESHOLD";
    /// APIC access.
    ApicAccess = 44, "APIC_ACCESS";
    /// Virtualized EOI.
    VirtualizedEoi = 45, "EOI_INDUCED";
    /// Access to GDTR or IDTR.
    GdtrIdtrAccess = 46, "GDTR_IDTR";
    /// Access to LDTR or TR.
    LdtrTrAccess = 47, "LDTR_TR";
    /// EPT violation.
    EptViolation = 48, "EPT_VIOLATION";
    /// EPT misconfiguration.
    EptMisconfiguration = 49, "EPT_MISCONFIG";
    /// INVEPT.
    Invept = 50, "INVEPT";
    /// RDTSCP.
    Rdtscp = 51, "RDTSCP";
    /// VMX-preemption timer expired.
    PreemptionTimer = 52, "PREEMPTION_TIMER";
    /// INVVPID.
    Invvpid = 53, "INVVPID";
    /// WBINVD or WBNOINVD.
    Wbinvd = 54, "WBINVD";
    /// XSETBV.
    Xsetbv = 55, "XSETBV";
    /// APIC write.
    ApicWrite = 56, "APIC_WRITE";
    /// RDRAND.
    Rdrand = 57, "RDRAND";
    /// INVPCID.
    Invpcid = 58, "INVPCID";
    /// VMFUNC.
    Vmfunc = 59, "VMFUNC";
    /// ENCLS.
    Encls = 60, "ENCLS";
    /// RDSEED.
    Rdseed = 61, "RDSEED";
    /// Page-modification log full.
    PmlFull = 62, "PML_FULL";
    /// XSAVES.
    Xsaves = 63, "XSAVES";
    /// XRSTORS.
    Xrstors = 64, "XRSTORS";
    /// UMWAIT.
    Umwait = 67, "UMWAIT";
    /// TPAUSE.
    Tpause = 68, "TPAUSE";
}

/// EPT-violation qualification bits (SDM Vol. 3C table 28-7).
pub mod ept_violation {
    /// A data read.
    pub const READ: u64 = 1 << 0;
    /// A data write.
    pub const WRITE: u64 = 1 << 1;
    /// An instruction fetch.
    pub const FETCH: u64 = 1 << 2;
    /// The EPT entries allowed reads.
    pub const READABLE: u64 = 1 << 3;
    /// The EPT entries allowed writes.
    pub const WRITABLE: u64 = 1 << 4;
    /// The EPT entries allowed (supervisor) fetches.
    pub const EXECUTABLE: u64 = 1 << 5;
    /// The EPT entries allowed user-mode fetches (mode-based execute control).
    pub const USER_EXECUTABLE: u64 = 1 << 6;
    /// The guest-linear address field is valid.
    pub const LINEAR_VALID: u64 = 1 << 7;
    /// The access was to the translation of a linear address, not a paging-structure entry.
    pub const TRANSLATED: u64 = 1 << 8;
    /// Advanced information: the linear address is user-mode.
    pub const USER_LINEAR: u64 = 1 << 9;
    /// Advanced information: the guest page is writable.
    pub const GUEST_WRITABLE: u64 = 1 << 10;
    /// Advanced information: the guest page is execute-disabled.
    pub const GUEST_XD: u64 = 1 << 11;
    /// NMI unblocking due to IRET.
    pub const NMI_UNBLOCKING: u64 = 1 << 12;
}

/// I/O-instruction qualification (SDM Vol. 3C table 28-5).
pub mod io {
    /// Bit 3: IN (else OUT).
    pub const IN: u64 = 1 << 3;
    /// Bit 4: string instruction.
    pub const STRING: u64 = 1 << 4;
    /// Bit 5: REP prefixed.
    pub const REP: u64 = 1 << 5;
    /// Bit 6: immediate operand (else DX).
    pub const IMMEDIATE: u64 = 1 << 6;

    /// Builds the qualification. `size` is 1, 2 or 4 bytes.
    pub const fn qualification(port: u16, size: u8, flags: u64) -> u64 {
        (size as u64 - 1) | flags | (port as u64) << 16
    }
    /// Access size in bytes.
    pub const fn size(qualification: u64) -> u8 {
        (qualification & 7) as u8 + 1
    }
    /// Port number.
    pub const fn port(qualification: u64) -> u16 {
        (qualification >> 16) as u16
    }
}

/// Control-register-access qualification (SDM Vol. 3C table 28-3).
pub mod cr_access {
    /// Access type, bits 5:4.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[repr(u8)]
    pub enum Kind {
        /// MOV to CR.
        MovTo = 0,
        /// MOV from CR.
        MovFrom = 1,
        /// CLTS.
        Clts = 2,
        /// LMSW.
        Lmsw = 3,
    }
    /// Builds the qualification for MOV to or from CR`cr` with general register `gpr`.
    pub const fn mov(cr: u8, kind: Kind, gpr: u8) -> u64 {
        cr as u64 | (kind as u64) << 4 | (gpr as u64) << 8
    }
    /// The CR number.
    pub const fn cr(q: u64) -> u8 {
        (q & 15) as u8
    }
    /// The access type.
    pub const fn kind(q: u64) -> Kind {
        match (q >> 4) & 3 {
            0 => Kind::MovTo,
            1 => Kind::MovFrom,
            2 => Kind::Clts,
            _ => Kind::Lmsw,
        }
    }
    /// The general register.
    pub const fn gpr(q: u64) -> usize {
        ((q >> 8) & 15) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip() {
        for r in ExitReason::ALL {
            assert_eq!(ExitReason::from_u16(*r as u16), Some(*r));
        }
        assert_eq!(ExitReason::from_u16(35), None);
    }
}
