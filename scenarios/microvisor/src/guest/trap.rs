//! Exceptions and interrupts of the hypervisor itself, and of the L2 guests that use the
//! tables made here.
//!
//! An exception within [`guarded!`] is recorded and execution continues behind the guarded
//! instruction. Any other ends the run. Interrupts are counted and acknowledged.
//!
//! L2's handlers record the event in [`L2_EVENT`] and execute VMCALL, so that every event
//! delivered in L2 is an exit with reason 18 and RIP [`l2_event_rip`]; resumed behind
//! it, they return from the event.

use core::arch::global_asm;

use super::cpu;

/// An exception that a guarded instruction raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Its vector.
    pub vector: u8,
    /// Its error code; 0 if it has none.
    pub code: u32,
    /// RIP that was pushed.
    pub rip: u64,
    /// CR2 after it.
    pub cr2: u64,
}

/// No exception.
pub const NONE: u64 = !0;

/// What the assembly handlers record: vector, error code, RIP, CR2, CS.
#[repr(C)]
pub struct Record {
    /// The vector, or [`NONE`].
    pub vector: u64,
    /// The error code.
    pub code: u64,
    /// RIP.
    pub rip: u64,
    /// CR2.
    pub cr2: u64,
    /// CS.
    pub cs: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RSP.
    pub rsp: u64,
    /// Number of events so far.
    pub count: u64,
    /// Whether the NMI handler has run, as a count.
    pub nmis: u64,
}

const EMPTY: Record =
    Record { vector: NONE, code: 0, rip: 0, cr2: 0, cs: 0, rflags: 0, rsp: 0, count: 0, nmis: 0 };

/// The last exception of the hypervisor.
#[unsafe(no_mangle)]
pub static mut TRAP: Record = EMPTY;
/// Where to continue after an exception; 0 when none is expected.
#[unsafe(no_mangle)]
pub static mut FIXUP: u64 = 0;
/// RSP to continue with when the exception comes from another code segment.
#[unsafe(no_mangle)]
pub static mut FIXUP_RSP: u64 = 0;
/// Interrupts taken by the hypervisor, by vector.
#[unsafe(no_mangle)]
pub static mut INTERRUPTS: [u64; 256] = [0; 256];
/// The last event delivered in L2.
#[unsafe(no_mangle)]
pub static mut L2_EVENT: Record = EMPTY;

global_asm!(
    // Stubs of 16 bytes: error code or 0, vector, jump.
    ".macro STUBS name, common",
    ".balign 16",
    ".global \\name",
    "\\name:",
    ".set vec, 0",
    ".rept 256",
    ".balign 16",
    ".if !((vec == 8) || ((vec >= 10) && (vec <= 14)) || (vec == 17) || (vec == 21))",
    ".byte 0x6a, 0", // push 0
    ".endif",
    ".byte 0x68", // push imm32
    ".long vec",
    "jmp \\common",
    ".set vec, vec + 1",
    ".endr",
    ".endm",
    ".section .text.trap,\"ax\"",
    "STUBS l1_stubs, l1_trap",
    "STUBS l2_stubs, l2_trap",
    // The stack: vector, error code, RIP, CS, RFLAGS, RSP, SS.
    "l1_trap:",
    "push rax",
    "push rcx",
    "push rdx",
    "mov rax, [rsp + 24]",
    "cmp rax, 2",
    "je 4f",
    "cmp rax, 32",
    "jae 3f",
    "mov [rip + TRAP], rax",
    "mov rcx, [rsp + 32]",
    "mov [rip + TRAP + 8], rcx",
    "mov rcx, [rsp + 40]",
    "mov [rip + TRAP + 16], rcx",
    "mov rcx, cr2",
    "mov [rip + TRAP + 24], rcx",
    "mov rcx, [rsp + 48]",
    "mov [rip + TRAP + 32], rcx",
    "mov rdx, [rsp + 56]",
    "mov [rip + TRAP + 40], rdx",
    "inc qword ptr [rip + TRAP + 56]",
    "mov rax, [rip + FIXUP]",
    "test rax, rax",
    "jz 9f",
    "mov [rsp + 40], rax",
    "mov qword ptr [rip + FIXUP], 0",
    // Neither TF nor IF survive the fixup.
    "and qword ptr [rsp + 56], 0xfffffffffffffcff",
    "cmp rcx, 8",
    "je 5f",
    "mov qword ptr [rsp + 48], 8",
    "mov rax, [rip + FIXUP_RSP]",
    "mov [rsp + 64], rax",
    "mov qword ptr [rsp + 72], 0x10",
    "jmp 5f",
    "3: lea rcx, [rip + INTERRUPTS]",
    "inc qword ptr [rcx + rax * 8]",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "jmp 5f",
    "4: inc qword ptr [rip + TRAP + 64]",
    "5: pop rdx",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    "9: sub rsp, 8",
    "and rsp, -16",
    "call {fatal}",
    "l2_trap:",
    "push rax",
    "mov rax, [rsp + 8]",
    "mov [rip + L2_EVENT], rax",
    "mov rax, [rsp + 16]",
    "mov [rip + L2_EVENT + 8], rax",
    "mov rax, [rsp + 24]",
    "mov [rip + L2_EVENT + 16], rax",
    "mov rax, cr2",
    "mov [rip + L2_EVENT + 24], rax",
    "mov rax, [rsp + 32]",
    "mov [rip + L2_EVENT + 32], rax",
    "mov rax, [rsp + 40]",
    "mov [rip + L2_EVENT + 40], rax",
    "mov rax, [rsp + 48]",
    "mov [rip + L2_EVENT + 48], rax",
    "inc qword ptr [rip + L2_EVENT + 56]",
    "pop rax",
    "add rsp, 16",
    ".global l2_event_vmcall",
    "l2_event_vmcall: vmcall",
    "iretq",
    fatal = sym fatal,
);

unsafe extern "C" {
    static l1_stubs: u8;
    static l2_stubs: u8;
    static l2_event_vmcall: u8;
    static mut boot_gdt: [u64; 16];
}

/// RIP of the VMCALL that ends L2's event handlers.
pub fn l2_event_rip() -> u64 {
    &raw const l2_event_vmcall as u64
}

extern "C" fn fatal() -> ! {
    let r = unsafe { &*&raw const TRAP };
    println!(
        "EXCEPTION {} in the hypervisor: code {:#x} rip {:#x} cr2 {:#x} cs {:#x}",
        r.vector, r.code, r.rip, r.cr2, r.cs
    );
    cpu::exit(2)
}

/// Runs one instruction; an exception that it raises is the error. The value is RFLAGS after it.
///
/// The operands are as for `asm!`.
macro_rules! guarded {
    ($instruction:expr $(, $($operands:tt)*)?) => {{
        let flags: u64;
        #[allow(unused_unsafe, reason = "some callers are in an unsafe block already")]
        unsafe {
            (&raw mut $crate::guest::trap::TRAP.vector).write_volatile($crate::guest::trap::NONE);
            core::arch::asm!(
                "lea {flags}, [rip + 77f]",
                "mov [rip + {fixup}], {flags}",
                $instruction,
                "77: pushfq",
                "pop {flags}",
                "mov qword ptr [rip + {fixup}], 0",
                flags = out(reg) flags,
                fixup = sym $crate::guest::trap::FIXUP,
                $($($operands)*)?
            );
        }
        $crate::guest::trap::outcome(flags)
    }};
}
pub(crate) use guarded;

/// The exception recorded since TRAP was emptied, or `flags`.
pub fn outcome(flags: u64) -> Result<u64, Fault> {
    match last() {
        Some(fault) => Err(fault),
        None => Ok(flags),
    }
}

/// The exception recorded since TRAP was emptied.
pub fn last() -> Option<Fault> {
    let r = unsafe { (&raw const TRAP).read_volatile() };
    (r.vector != NONE).then_some(Fault {
        vector: r.vector as u8,
        code: r.code as u32,
        rip: r.rip,
        cr2: r.cr2,
    })
}

/// Number of interrupts taken with `vector`.
pub fn interrupts(vector: u8) -> u64 {
    unsafe { (&raw const INTERRUPTS[usize::from(vector)]).read_volatile() }
}

/// Number of NMIs taken.
pub fn nmis() -> u64 {
    unsafe { (&raw const TRAP.nmis).read_volatile() }
}

/// Forgets the last event in L2.
pub fn clear_l2_event() {
    unsafe { (&raw mut L2_EVENT).write_volatile(EMPTY) };
}

/// The last event in L2.
pub fn l2_event() -> Record {
    unsafe { (&raw const L2_EVENT).read_volatile() }
}

/// An interrupt descriptor table.
#[repr(C, align(16))]
pub struct Idt(pub [[u64; 2]; 256]);

/// A 64-bit task-state segment and the I/O permission bitmap's end.
#[repr(C, align(16))]
pub struct Tss(pub [u32; 32]);

static mut L1_IDT: Idt = Idt([[0; 2]; 256]);
static mut L2_IDT: Idt = Idt([[0; 2]; 256]);
static mut L1_TSS: Tss = Tss([0; 32]);
static mut L2_TSS: Tss = Tss([0; 32]);

#[repr(C, align(16))]
struct Stack([u8; 16384]);
static mut L1_IST: Stack = Stack([0; 16384]);
static mut L2_RSP0: Stack = Stack([0; 16384]);

/// The selector of L1's TSS.
pub const L1_TR: u16 = 0x40;
/// The selector of L2's TSS.
pub const L2_TR: u16 = 0x50;

/// An interrupt gate for 64-bit mode.
pub fn gate(handler: u64, selector: u16, ist: u8, dpl: u8) -> [u64; 2] {
    let low = handler & 0xffff
        | u64::from(selector) << 16
        | u64::from(ist) << 32
        | 0x8e << 40
        | u64::from(dpl) << 45
        | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

fn fill(idt: *mut Idt, stubs: u64, ist: u8) {
    for vector in 0..256 {
        let dpl = if vector == 3 || vector == 4 || vector == 0x80 { 3 } else { 0 };
        let entry = gate(stubs + stub_offset(vector), 8, ist, dpl);
        unsafe { (*idt).0[vector as usize] = entry };
    }
}

/// Each stub takes 16 bytes.
const fn stub_offset(vector: u64) -> u64 {
    16 * vector
}

fn fill_tss(tss: *mut Tss, selector: u16, stack: u64) {
    unsafe {
        let words = &mut (*tss).0;
        for at in [1, 9] {
            // RSP0 and IST1.
            words[at] = stack as u32;
            words[at + 1] = (stack >> 32) as u32;
        }
        words[25] = 104 << 16;
        let base = tss as u64;
        let low = 103 | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        let gdt = &raw mut boot_gdt as *mut u64;
        gdt.add(usize::from(selector / 8)).write(low);
        gdt.add(usize::from(selector / 8) + 1).write(base >> 32);
    }
}

/// Loads IDT and TSS of the hypervisor and makes those of L2.
pub fn init() {
    fill(&raw mut L1_IDT, &raw const l1_stubs as u64, 1);
    fill(&raw mut L2_IDT, &raw const l2_stubs as u64, 0);
    fill_tss(&raw mut L1_TSS, L1_TR, &raw const L1_IST as u64 + 16384);
    fill_tss(&raw mut L2_TSS, L2_TR, &raw const L2_RSP0 as u64 + 16384);
    load_idt(idt_base(), 0xfff);
    unsafe { core::arch::asm!("ltr {0:x}", in(reg) L1_TR) };
}

/// LIDT.
pub fn load_idt(base: u64, limit: u16) {
    let mut pointer = [0_u16; 5];
    pointer[0] = limit;
    for i in 0..4 {
        pointer[i + 1] = (base >> (16 * i)) as u16;
    }
    unsafe { core::arch::asm!("lidt [{}]", in(reg) pointer.as_ptr()) };
}

/// Base of the hypervisor's IDT.
pub fn idt_base() -> u64 {
    &raw const L1_IDT as u64
}
/// Base of L2's IDT.
pub fn l2_idt_base() -> u64 {
    &raw const L2_IDT as u64
}
/// Base of the GDT, which L1 and L2 share.
pub fn gdt_base() -> u64 {
    &raw const boot_gdt as u64
}
/// Base of the hypervisor's TSS.
pub fn tss_base() -> u64 {
    &raw const L1_TSS as u64
}
/// Base of L2's TSS.
pub fn l2_tss_base() -> u64 {
    &raw const L2_TSS as u64
}
