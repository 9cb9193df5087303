// Which cases cause which exit reason and which VM-instruction error, and which show that it does not come
// where it should not. Included by the image, which makes sure that the cases exist and, when they run,
// that they cause what is said here; and by the library, so that a reason or error without a case fails
// the build of the tests.

/// The cases for one exit reason or one VM-instruction error.
#[derive(Clone, Copy, Debug)]
pub struct Covered {
    /// The basic exit reason, or the number of the error.
    pub number: u32,
    /// Cases in which it comes.
    pub causes: &'static [&'static str],
    /// Cases, or parts of them, in which a like machine does not cause it: without the control, or with what the
    /// instruction asks for.
    pub passes: &'static [&'static str],
}

macro_rules! covered {
    ($($number:literal: [$($causes:literal),*] [$($passes:literal),*];)*) => {
        &[$(Covered { number: $number, causes: &[$($causes),*], passes: &[$($passes),*] }),*]
    };
}

/// By basic exit reason.
pub const EXITS: &[Covered] = covered! {
    0: ["event.exception.ud", "event.exception.gp", "event.exception.pf", "event.nmi.exit"]
        ["event.exception.not_in_bitmap", "event.exception.pf_mask_match", "event.exception.int_n_no_exit"];
    1: ["event.external.exit", "event.external.acknowledge", "event.external.wakes_hlt"] ["event.external.not_exiting"];
    2: ["exit.triple_fault"] [];
    3: ["event.init", "event.init.blocked_in_root"] [];
    4: ["event.sipi"] ["event.sipi.discarded"];
    7: ["event.interrupt_window", "event.interrupt_window.sti"] ["event.external.not_exiting"];
    8: ["event.nmi_window", "event.nmi_window.blocked"] ["event.nmi.unblocking_by_iret"];
    9: ["exit.task_switch", "exit.task_switch.iret", "exit.task_switch.gate", "exit.task_switch.idt"] [];
    10: ["exit.cpuid", "exit.user.cpuid"] [];
    12: ["exit.hlt"] ["event.activity.hlt_saved"];
    13: ["exit.invd"] [];
    14: ["exit.invlpg"] ["exit.invlpg"];
    15: ["exit.rdpmc"] ["exit.rdpmc.off"];
    16: ["exit.rdtsc"] ["exit.rdtsc"];
    18: ["exit.vmcall"] [];
    19: ["exit.vmclear"] [];
    20: ["exit.vmlaunch"] [];
    21: ["exit.vmptrld"] [];
    22: ["exit.vmptrst"] [];
    23: ["exit.vmread", "exit.vmread.memory"] ["shadowing.read"];
    24: ["exit.vmresume"] [];
    25: ["exit.vmwrite"] ["shadowing.write"];
    26: ["exit.vmxoff"] [];
    27: ["exit.vmxon"] [];
    28: ["exit.cr3.load", "exit.cr3.store", "exit.cr8.load", "exit.cr8.store", "exit.cr0.mask", "exit.cr4.mask", "exit.clts", "exit.lmsw"]
        ["exit.cr3.load", "exit.cr3.store", "exit.cr3.targets", "exit.cr0.no_exit_when_equal", "exit.clts.no_exit"];
    29: ["exit.mov_dr.to", "exit.mov_dr.from"] ["exit.mov_dr.to", "exit.mov_dr.from"];
    30: ["exit.io.in", "exit.io.out", "exit.io.string"] ["exit.io.bitmap"];
    31: ["exit.rdmsr", "exit.msr.out_of_range"] ["exit.msr.bitmap"];
    32: ["exit.wrmsr"] ["exit.msr.bitmap"];
    33: ["check.guest_cr0"] ["check.guest_cr0"];
    34: ["msr_list.entry_load.forbidden"] ["msr_list.entry_load"];
    36: ["exit.mwait", "exit.mwait.armed"] ["mwait.falls_through", "mwait.interrupt"];
    37: ["event.mtf", "event.mtf.injection", "event.mtf.pending"] ["event.mtf.off"];
    39: ["exit.monitor"] ["exit.monitor"];
    40: ["exit.pause", "exit.pause.loop"] ["exit.pause"];
    43: ["apic.tpr_threshold"] ["apic.tpr_shadow"];
    44: ["apic.access.read", "apic.access.write"] ["apic.registers.read"];
    45: ["apic.eoi.exit"] ["apic.eoi"];
    46: ["exit.sgdt", "exit.sidt", "exit.lgdt", "exit.lidt"] ["exit.sgdt", "exit.lgdt"];
    47: ["exit.sldt", "exit.str", "exit.lldt", "exit.ltr"] ["exit.str", "exit.lldt"];
    48: ["ept.violation.permissions", "ept.violation.page_walk"] ["ept.map.4k", "ept.off"];
    49: ["ept.misconfiguration.write_only", "ept.misconfiguration.reserved_bits"] ["ept.misconfiguration.not_present_ignored"];
    50: ["exit.invept"] [];
    51: ["exit.rdtscp"] ["exit.rdtscp"];
    52: ["event.timer.zero", "event.timer.rate", "event.timer.hlt"] ["event.timer.off"];
    53: ["exit.invvpid"] [];
    54: ["exit.wbinvd"] ["exit.wbinvd"];
    55: ["exit.xsetbv"] [];
    56: ["apic.registers.write"] ["apic.eoi"];
    57: ["exit.rdrand"] ["exit.rdrand"];
    58: ["exit.invpcid"] ["exit.invpcid"];
    59: ["exit.vmfunc.unsupported", "ept.vmfunc.wrong_index"] ["ept.vmfunc.switch"];
    61: ["exit.rdseed"] ["exit.rdseed"];
    62: ["ept.pml.full"] ["ept.pml.log"];
};

/// By VM-instruction error.
pub const ERRORS: &[Covered] = covered! {
    1: ["instr.vmcall.in_root"] [];
    2: ["instr.vmclear.address"] ["instr.vmclear.current"];
    3: ["instr.vmclear.vmxon_pointer"] ["instr.vmclear.current"];
    4: ["instr.vmlaunch.not_clear"] ["instr.vmresume.after_vmclear"];
    5: ["instr.vmresume.not_launched"] ["exit.cpuid"];
    7: ["check.vpid_not_zero"] ["check.vpid_not_zero"];
    8: ["check.host_cr0"] ["check.host_cr0"];
    9: ["instr.vmptrld.address"] ["instr.vmcs.two"];
    10: ["instr.vmptrld.vmxon_pointer"] ["instr.vmcs.two"];
    11: ["instr.vmptrld.revision"] ["instr.vmcs.two"];
    12: ["instr.vmread.unsupported", "instr.vmwrite.unsupported"] ["instr.fields.all"];
    15: ["instr.vmxon.in_root"] ["instr.vmxoff"];
    26: ["instr.vmlaunch.mov_ss"] ["instr.vmlaunch.flags"];
    28: ["instr.invept", "instr.invvpid"] ["instr.invept", "instr.invvpid"];
};

/// Whether two names are the same, also while compiling.
pub const fn same(a: &str, b: &str) -> bool {
    let (a, b) = (a.as_bytes(), b.as_bytes());
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}
