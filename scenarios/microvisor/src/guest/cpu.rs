//! Privileged instructions, registers and what of the platform the hypervisor needs.

use core::arch::asm;

use super::trap::{self, Fault};

/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_FEATURE_CONTROL.
pub const MSR_FEATURE_CONTROL: u32 = 0x3a;
/// IA32_TSC_ADJUST.
pub const MSR_TSC_ADJUST: u32 = 0x3b;
/// IA32_SYSENTER_CS; ESP and EIP follow.
pub const MSR_SYSENTER_CS: u32 = 0x174;
/// IA32_SYSENTER_ESP.
pub const MSR_SYSENTER_ESP: u32 = 0x175;
/// IA32_SYSENTER_EIP.
pub const MSR_SYSENTER_EIP: u32 = 0x176;
/// IA32_DEBUGCTL.
pub const MSR_DEBUGCTL: u32 = 0x1d9;
/// IA32_PAT.
pub const MSR_PAT: u32 = 0x277;
/// IA32_PERF_GLOBAL_CTRL.
pub const MSR_PERF_GLOBAL_CTRL: u32 = 0x38f;
/// IA32_EFER.
pub const MSR_EFER: u32 = 0xc000_0080;
/// IA32_STAR.
pub const MSR_STAR: u32 = 0xc000_0081;
/// IA32_LSTAR.
pub const MSR_LSTAR: u32 = 0xc000_0082;
/// IA32_FS_BASE.
pub const MSR_FS_BASE: u32 = 0xc000_0100;
/// IA32_GS_BASE.
pub const MSR_GS_BASE: u32 = 0xc000_0101;
/// IA32_KERNEL_GS_BASE.
pub const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
/// IA32_TSC_AUX.
pub const MSR_TSC_AUX: u32 = 0xc000_0103;

/// IN from an 8-bit port.
pub fn inb(port: u16) -> u8 {
    let value;
    unsafe { asm!("in al, dx", in("dx") port, out("al") value) };
    value
}
/// IN from a 32-bit port.
pub fn inl(port: u16) -> u32 {
    let value;
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value) };
    value
}
/// OUT to an 8-bit port.
pub fn outb(port: u16, value: u8) {
    unsafe { asm!("out dx, al", in("dx") port, in("al") value) };
}
/// OUT to a 32-bit port.
pub fn outl(port: u16, value: u32) {
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value) };
}

/// Ends the machine's run through isa-debug-exit.
pub fn exit(status: u32) -> ! {
    outl(0xf4, status);
    loop {
        unsafe { asm!("cli", "hlt") };
    }
}

/// Masks every input of both 8259As.
pub fn mask_pic() {
    outb(0x21, 0xff);
    outb(0xa1, 0xff);
}

/// CPUID.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// RDMSR.
pub fn rdmsr(msr: u32) -> Result<u64, Fault> {
    let (lo, hi): (u32, u32);
    trap::guarded!("rdmsr", in("ecx") msr, out("eax") lo, out("edx") hi)?;
    Ok(u64::from(lo) | u64::from(hi) << 32)
}

/// WRMSR.
pub fn wrmsr(msr: u32, value: u64) -> Result<(), Fault> {
    trap::guarded!("wrmsr", in("ecx") msr, in("eax") value as u32, in("edx") (value >> 32) as u32)?;
    Ok(())
}

/// RDMSR of a register that exists; 0 if it does not.
pub fn msr(msr: u32) -> u64 {
    rdmsr(msr).unwrap_or(0)
}

macro_rules! control_register {
    ($read:ident $write:ident $reg:literal) => {
        #[doc = concat!("MOV from ", $reg, ".")]
        pub fn $read() -> u64 {
            let value;
            unsafe { asm!(concat!("mov {}, ", $reg), out(reg) value) };
            value
        }
        #[doc = concat!("MOV to ", $reg, ".")]
        pub fn $write(value: u64) -> Result<(), Fault> {
            trap::guarded!(concat!("mov ", $reg, ", {v}"), v = in(reg) value)?;
            Ok(())
        }
    };
}
control_register!(cr0 set_cr0 "cr0");
control_register!(cr2 set_cr2 "cr2");
control_register!(cr3 set_cr3 "cr3");
control_register!(cr4 set_cr4 "cr4");
control_register!(dr7 set_dr7 "dr7");

/// RDTSC.
pub fn tsc() -> u64 {
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// RDTSC between barriers, for measuring.
pub fn tsc_ordered() -> u64 {
    let (lo, hi): (u32, u32);
    unsafe { asm!("lfence", "rdtsc", "lfence", out("eax") lo, out("edx") hi) };
    u64::from(lo) | u64::from(hi) << 32
}

/// STI, one instruction to take what is pending, CLI.
pub fn interrupts_for_a_moment() {
    unsafe { asm!("sti", "nop", "nop", "cli") };
}

/// The local APIC in x2APIC mode.
pub mod apic {
    use super::{MSR_APIC_BASE, msr, wrmsr};

    /// Spurious-interrupt vector register.
    const SVR: u32 = 0x80f;
    /// Interrupt command register.
    const ICR: u32 = 0x830;

    /// Switches x2APIC mode on and enables the APIC.
    pub fn init() {
        let base = msr(MSR_APIC_BASE);
        let _ = wrmsr(MSR_APIC_BASE, base | 3 << 10);
        let _ = wrmsr(SVR, 0x1ff);
        // TPR 0.
        let _ = wrmsr(0x808, 0);
    }
    /// Sends a fixed interrupt to this processor.
    pub fn send_self(vector: u8) {
        let _ = wrmsr(0x83f, vector.into());
    }
    /// Sends an NMI to this processor.
    pub fn send_self_nmi() {
        // Delivery mode NMI (100B), physical destination: the own ID.
        let id = msr(0x802);
        let _ = wrmsr(ICR, id << 32 | 4 << 8 | 1 << 14);
    }
    /// Has the timer interrupt again and again, each time after `count` ticks of its clock.
    pub fn start_timer(vector: u8, count: u32) {
        /// LVT timer: periodic (SDM Vol. 3A §11.5.4).
        const PERIODIC: u64 = 1 << 17;
        // Divide by 1.
        let _ = wrmsr(0x83e, 0xb);
        let _ = wrmsr(0x832, PERIODIC | u64::from(vector));
        let _ = wrmsr(0x838, count.into());
    }
    /// Stops the timer.
    pub fn stop_timer() {
        let _ = wrmsr(0x838, 0);
    }
    /// End of interrupt.
    pub fn eoi() {
        let _ = wrmsr(0x80b, 0);
    }
    /// Whether `vector` is requested and not yet in service.
    pub fn requested(vector: u8) -> bool {
        msr(0x820 + u32::from(vector >> 5)) >> (vector & 31) & 1 != 0
    }
    /// Whether `vector` is in service.
    pub fn in_service(vector: u8) -> bool {
        msr(0x810 + u32::from(vector >> 5)) >> (vector & 31) & 1 != 0
    }
}
