//! VM entry by an L1 in 32-bit protected mode: leaves IA-32e mode, enters VMX operation there, enters
//! L2 and comes back.

use core::arch::naked_asm;

use super::fields::*;
use super::suite::{Ctx, Outcome, enter_vmx};
use super::vm::{Vm, ok};
use super::{cpu, memory, vmx};

/// What the assembly is given and what it returns.
#[repr(C)]
#[derive(Debug, Default)]
struct Parameters {
    vmxon: u64,
    vmcs: u64,
    page_directory: u32,
    /// RFLAGS after VMLAUNCH; bit 31 after a VM exit.
    flags: u32,
    /// The VM-instruction error.
    error: u32,
    /// The exit reason.
    reason: u32,
    /// Flags of VMXON and VMPTRLD, ORed.
    setup: u32,
}

#[unsafe(naked)]
unsafe extern "C" fn enter(parameters: *mut Parameters) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov ebx, edi",
        "push 0x18",
        "lea rax, [rip + 2f]",
        "push rax",
        ".byte 0x48, 0xcb", // RETF with 64-bit operands
        ".code32",
        "2: mov eax, cr0",
        "and eax, 0x7fffffff",
        "mov cr0, eax",
        "mov ecx, 0xc0000080",
        "rdmsr",
        "and eax, 0xfffffeff",
        "wrmsr",
        "mov eax, cr4",
        "and eax, 0xffffffdf",
        "or eax, 0x10",
        "mov cr4, eax",
        "mov eax, [ebx + 16]",
        "mov cr3, eax",
        "mov eax, cr0",
        "or eax, 0x80000000",
        "mov cr0, eax",
        "vmxon [ebx]",
        "pushfd",
        "pop dword ptr [ebx + 32]",
        "vmptrld [ebx + 8]",
        "pushfd",
        "pop eax",
        "or [ebx + 32], eax",
        "mov eax, 0x6c14",
        "vmwrite eax, esp",
        "vmlaunch",
        "pushfd",
        "pop dword ptr [ebx + 20]",
        "jmp 4f",
        ".global legacy_landing",
        "legacy_landing: mov dword ptr [ebx + 20], 0x80000000",
        "4: mov eax, 0x4400",
        "vmread [ebx + 24], eax",
        "mov eax, 0x4402",
        "vmread [ebx + 28], eax",
        "vmxoff",
        "mov eax, cr0",
        "and eax, 0x7fffffff",
        "mov cr0, eax",
        "mov eax, cr4",
        "and eax, 0xffffffef",
        "or eax, 0x20",
        "mov cr4, eax",
        "mov eax, offset boot_pml4",
        "mov cr3, eax",
        "mov ecx, 0xc0000080",
        "rdmsr",
        "or eax, 0x100",
        "wrmsr",
        "mov eax, cr0",
        "or eax, 0x80000000",
        "mov cr0, eax",
        "push 8",
        "mov eax, offset legacy_back",
        "push eax",
        "retf",
        ".code64",
        "legacy_back: mov eax, 0x10",
        "mov ds, eax",
        "mov es, eax",
        "mov ss, eax",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

unsafe extern "C" {
    static legacy_landing: u8;
}

/// How VM entry from 32-bit mode ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Ended {
    /// VMfailValid with this error.
    Failed(u32),
    /// A VM exit with this reason.
    Exit(u32),
    /// Anything else: RFLAGS.
    Flags(u32),
}

/// Enters a machine from 32-bit mode with 32-bit paging. The guest has the same paging; `change`
/// alters the VMCS before.
pub fn enter_from_32_bit(ctx: &Ctx, code: u64, change: impl FnOnce(&mut Vm) -> Outcome) -> Outcome<Ended> {
    memory::reset();
    let mut vm = Vm::new(&ctx.caps, code)?;
    // 4-MiB pages: present, writable, user.
    let page_directory = memory::page();
    for i in 0..1024_u32 {
        memory::write(page_directory + 4 * u64::from(i), i << 22 | 0x87);
    }
    let cr4 = (cpu::cr4() | ctx.caps.cr4_fixed[0]) & !0x20 | 0x10;
    vm.and(EXIT_CTL, !exit::HOST_64)?;
    vm.and(ENTRY_CTL, !entry::IA32E)?;
    vm.segments([0x18, 0x10], super::vm::CODE32, super::vm::DATA)?;
    for (field, value) in [
        (GUEST_CR3, page_directory),
        (GUEST_CR4, cr4),
        (HOST_CR3, page_directory),
        (HOST_CR4, cr4),
        (HOST_CS, 0x18),
        (HOST_RIP, &raw const legacy_landing as u64),
    ] {
        vm.set(field, value)?;
    }
    change(&mut vm)?;
    ok("VMCLEAR", vmx::vmclear(vm.vmcs))?;
    ok("VMXOFF", vmx::vmxoff())?;
    // In the pool, whose addresses have 32 bits, as the stack's.
    let at = memory::page() as *mut Parameters;
    unsafe {
        at.write(Parameters {
            vmxon: ctx.vmxon,
            vmcs: vm.vmcs,
            page_directory: page_directory as u32,
            ..Parameters::default()
        });
        enter(at);
    }
    let p = unsafe { at.read() };
    super::trap::load_idt(super::trap::idt_base(), 0xfff);
    enter_vmx(ctx)?;
    if p.setup & 0x41 != 0 {
        super::suite::fail!("VMXON or VMPTRLD in 32-bit mode failed: flags {:#x}", p.setup)
    }
    Ok(match p.flags {
        0x8000_0000 => Ended::Exit(p.reason),
        flags if flags & 0x40 != 0 => Ended::Failed(p.error),
        flags => Ended::Flags(flags),
    })
}
