//! From the boot loader to 64-bit mode: multiboot header, entry in 32-bit protected mode,
//! identity-mapped page tables for 4 GiB, GDT.

use core::arch::global_asm;

global_asm!(
    ".section .multiboot,\"a\"",
    ".balign 4",
    ".long 0x1badb002, 0x2, -(0x1badb002 + 0x2)",
    ".section .bss.boot,\"aw\",@nobits",
    ".balign 4096",
    ".global boot_pml4, boot_pdpt, boot_pd",
    "boot_pml4: .skip 4096",
    "boot_pdpt: .skip 4096",
    "boot_pd: .skip 4 * 4096",
    "boot_stack: .skip 65536",
    ".global boot_stack_top",
    "boot_stack_top:",
    ".section .data.boot,\"aw\"",
    ".balign 16",
    // Selectors: 08H 64-bit code, 10H data, 18H 32-bit code, 23H 64-bit user code, 2BH user data,
    // 33H 32-bit user code, 40H TSS (16 bytes), 50H another TSS, 60H 16-bit code, 68H 16-bit data.
    ".global boot_gdt",
    "boot_gdt:",
    ".quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff",
    ".quad 0x00affb000000ffff, 0x00cff3000000ffff, 0x00cffb000000ffff, 0",
    ".quad 0, 0, 0, 0, 0x00009b000000ffff, 0x000093000000ffff, 0, 0",
    "boot_gdt_end:",
    "boot_gdtr: .word boot_gdt_end - boot_gdt - 1",
    ".quad boot_gdt",
    ".section .text.boot,\"ax\"",
    ".code32",
    ".global _start32",
    "_start32:",
    "cli",
    "cld",
    "mov esp, offset boot_stack_top",
    "mov esi, ebx",
    "mov eax, offset boot_pdpt",
    "or eax, 7",
    "mov dword ptr [boot_pml4], eax",
    "mov eax, offset boot_pd",
    "or eax, 7",
    "xor ecx, ecx",
    "2: mov dword ptr [boot_pdpt + ecx * 8], eax",
    "add eax, 4096",
    "inc ecx",
    "cmp ecx, 4",
    "jne 2b",
    "xor ecx, ecx",
    "3: mov eax, ecx",
    "shl eax, 21",
    "or eax, 0x87",
    "mov dword ptr [boot_pd + ecx * 8], eax",
    "inc ecx",
    "cmp ecx, 2048",
    "jne 3b",
    "mov eax, cr4",
    "or eax, 0x620", // PAE, OSFXSR, OSXMMEXCPT
    "mov cr4, eax",
    "mov eax, offset boot_pml4",
    "mov cr3, eax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x100", // EFER.LME
    "wrmsr",
    "mov eax, cr0",
    "and eax, 0xfffffffb",
    "or eax, 0x80000023", // PG, NE, MP, PE
    "mov cr0, eax",
    "lgdt [boot_gdtr]",
    "push 8",
    "mov eax, offset start64",
    "push eax",
    "retf",
    ".code64",
    "start64:",
    "mov eax, 0x10",
    "mov ds, eax",
    "mov es, eax",
    "mov ss, eax",
    "xor eax, eax",
    "mov fs, eax",
    "mov gs, eax",
    "lea rsp, [rip + boot_stack_top]",
    "mov edi, esi",
    "call {main}",
    "ud2",
    main = sym super::microvisor_main,
);

/// The command line of the multiboot information at `info`, without the program's name.
///
/// # Safety
/// `info` is what the boot loader passed in EBX.
pub unsafe fn command_line(info: u64) -> &'static str {
    let word = |at: u64| unsafe { ((info + at) as *const u32).read_unaligned() };
    if info == 0 || word(0) & 1 << 2 == 0 {
        return "";
    }
    let start = u64::from(word(16)) as *const u8;
    let mut len = 0;
    while len < 4096 && unsafe { *start.add(len) } != 0 {
        len += 1;
    }
    let text = core::str::from_utf8(unsafe { core::slice::from_raw_parts(start, len) }).unwrap_or("");
    text.split_once(' ').map_or("", |(_, rest)| rest)
}
