//! The enlightened VMCS (Hyper-V Top-Level Functional Specification, "Nested Virtualization"): where L0
//! offers it, virtual machines keep their VMCS in memory, and fields are read and written there.
//!
//! Cases about VMX instructions themselves (`instr.`) use ordinary VMCSs all the same.

use super::fields::*;
use super::vmx::{self, VmxError};
use super::{cpu, memory};

/// The first dword.
pub const VERSION: u32 = 1;
/// Where the word of clean bits is, and HOST_RSP, which the world switch writes.
pub const CLEAN_FIELDS: u64 = 824;
/// Offset of HOST_RSP.
pub const HOST_RSP_OFFSET: u64 = 616;
/// The clean bit of HOST_RSP.
pub const HOST_RSP_CLEAN: u32 = 1 << 13;
/// VM-instruction error 12: unsupported VMCS component.
const UNSUPPORTED: VmxError = VmxError::Valid(12);

const MSR_VP_ASSIST_PAGE: u32 = 0x4000_0073;
/// In the assist page: entries are enlightened.
const ENLIGHTEN_ENTRY: u64 = 40;
/// In the assist page: the structure.
const NESTED_VMCS: u64 = 48;

#[repr(C, align(4096))]
struct Page([u8; 4096]);
static mut ASSIST_PAGE: Page = Page([0; 4096]);
/// The structure in use; 0 when the current VMCS is an ordinary one.
static mut CURRENT: u64 = 0;
/// Whether new machines get one.
static mut WANTED: bool = false;

const NONE: u32 = 0;

/// Where a field is and its clean bit; fields of one bit in a row.
macro_rules! places {
    ($($clean:expr => $($field:ident $offset:literal)*;)*) => {
        #[inline(always)]
        const fn place(field: u32) -> Option<(u64, u32)> {
            Some(match field {
                $($($field => ($offset, $clean),)*)*
                _ => return None,
            })
        }
    };
}

places! {
    NONE => EXIT_STORE_ADDR 320 EXIT_LOAD_ADDR 328 ENTRY_LOAD_ADDR 336 CR3_TARGET0 344 CR3_TARGET1 352
        CR3_TARGET2 360 CR3_TARGET3 368 PF_MASK 376 PF_MATCH 380 CR3_COUNT 384 EXIT_STORE_COUNT 388
        EXIT_LOAD_COUNT 392 ENTRY_LOAD_COUNT 396 GUEST_PHYS 680 VM_ERROR 688 REASON 692 INTR_INFO 696
        INTR_CODE 700 IDT_INFO 704 IDT_CODE 708 INSTR_LEN 712 INSTR_INFO 716 QUALIFICATION 720
        IO_RCX 728 IO_RSI 736 IO_RDI 744 IO_RIP 752 GUEST_LINEAR 760 TPR_THRESHOLD 812 GUEST_RIP 816;
    1 << 0 => IO_A 104 IO_B 112;
    1 << 1 => MSR_BITMAP 120;
    1 << 2 => TSC_OFFSET 400 VIRTUAL_APIC 408 XSS_BITMAP 960 TSC_MULTIPLIER 984;
    1 << 3 => PIN 92 EXIT_CTL 96 SECONDARY 100;
    1 << 4 => PRIMARY 788;
    1 << 5 => ENTRY_INFO 800 ENTRY_CODE 804 ENTRY_LEN 808;
    1 << 6 => ENTRY_CTL 796;
    1 << 7 => EXCEPTIONS 792;
    1 << 8 => CR0_MASK 512 CR4_MASK 520 CR0_SHADOW 528 CR4_SHADOW 536 GUEST_CR0 544 GUEST_CR3 552
        GUEST_CR4 560 GUEST_DR7 568;
    1 << 9 => EPTP 624 VPID 632;
    1 << 10 => GUEST_RSP 768 GUEST_RFLAGS 776 INTERRUPTIBILITY 784;
    1 << 11 => LINK 416 GUEST_DEBUGCTL 424 GUEST_PAT 432 GUEST_EFER 440 PDPTE0 448 PDPTE1 456 PDPTE2 464
        PDPTE3 472 PENDING_DEBUG 480 GUEST_SYSENTER_ESP 488 GUEST_SYSENTER_EIP 496 ACTIVITY 504
        GUEST_SYSENTER_CS 508 GUEST_PERF 904;
    1 << 12 => ES_SEL 128 CS_SEL 130 SS_SEL 132 DS_SEL 134 FS_SEL 136 GS_SEL 138 LDTR_SEL 140 TR_SEL 142
        ES_LIMIT 144 CS_LIMIT 148 SS_LIMIT 152 DS_LIMIT 156 FS_LIMIT 160 GS_LIMIT 164 LDTR_LIMIT 168
        TR_LIMIT 172 GDTR_LIMIT 176 IDTR_LIMIT 180 ES_AR 184 CS_AR 188 SS_AR 192 DS_AR 196 FS_AR 200
        GS_AR 204 LDTR_AR 208 TR_AR 212 ES_BASE 216 CS_BASE 224 SS_BASE 232 DS_BASE 240 FS_BASE 248
        GS_BASE 256 LDTR_BASE 264 TR_BASE 272 GDTR_BASE 280 IDTR_BASE 288;
    1 << 13 => HOST_FS_BASE 576 HOST_GS_BASE 584 HOST_TR_BASE 592 HOST_GDTR 600 HOST_IDTR 608 HOST_RSP 616;
    1 << 14 => HOST_ES 8 HOST_CS 10 HOST_SS 12 HOST_DS 14 HOST_FS 16 HOST_GS 18 HOST_TR 20 HOST_PAT 24
        HOST_EFER 32 HOST_CR0 40 HOST_CR3 48 HOST_CR4 56 HOST_SYSENTER_ESP 64 HOST_SYSENTER_EIP 72
        HOST_RIP 80 HOST_SYSENTER_CS 88 HOST_PERF 976;
}

/// Bytes of a field, by its encoding (SDM Vol. 3C table 25-21).
#[inline(always)]
const fn bytes(field: u32) -> u8 {
    match field >> 13 & 3 {
        0 => 2,
        2 => 4,
        _ => 8,
    }
}

/// Whether the processor recommends it.
pub fn offered() -> bool {
    let [max, b, c, d] = cpu::cpuid(0x4000_0000, 0);
    let hyperv = [b, c, d] == [0x7263_694d, 0x666f_736f, 0x7648_2074];
    hyperv
        && max >= 0x4000_000a
        && cpu::cpuid(0x4000_0004, 0)[0] >> 14 & 1 != 0
        && cpu::cpuid(0x4000_000a, 0)[0] as u8 <= VERSION as u8
}

/// The assist page.
pub fn assist_page() -> u64 {
    &raw const ASSIST_PAGE as u64
}

/// Whether machines that are made from now on shall have one, if it is offered. Ends the use of the present one.
pub fn want(wanted: bool) {
    deselect();
    let wanted = wanted && offered();
    if wanted {
        let _ = cpu::wrmsr(MSR_VP_ASSIST_PAGE, assist_page() | 1);
    }
    unsafe { WANTED = wanted };
}

/// Whether new machines get one.
pub fn wanted() -> bool {
    unsafe { WANTED }
}

/// The structure in use.
#[inline(always)]
pub fn current() -> Option<u64> {
    match unsafe { CURRENT } {
        0 => None,
        at => Some(at),
    }
}

/// Has entries use the structure at `at`.
pub fn select(at: u64) {
    point_at(at);
    unsafe { CURRENT = at };
}

/// Writes the pointer and the flag of the assist page alone.
pub fn point_at(at: u64) {
    memory::write(assist_page() + NESTED_VMCS, at);
    memory::write(assist_page() + ENLIGHTEN_ENTRY, 1_u8);
}

/// Has entries use the current VMCS, of which there is none.
pub fn deselect() {
    memory::write(assist_page() + ENLIGHTEN_ENTRY, 0_u8);
    if let Some(at) = current() {
        let _ = vmx::vmclear(at);
    }
    unsafe { CURRENT = 0 };
}

/// Reads a field of the structure at `at`.
#[inline(always)]
pub fn read(at: u64, field: u32) -> vmx::Vmx<u64> {
    let Some((offset, _)) = place(field) else { return Err(UNSUPPORTED) };
    Ok(match bytes(field) {
        2 => u64::from(memory::read::<u16>(at + offset)),
        4 => u64::from(memory::read::<u32>(at + offset)),
        _ => memory::read(at + offset),
    })
}

/// Writes a field and says so in the clean bits.
#[inline(always)]
pub fn write(at: u64, field: u32, value: u64) -> vmx::Vmx {
    let Some((offset, clean)) = place(field) else { return Err(UNSUPPORTED) };
    match bytes(field) {
        2 => memory::write(at + offset, value as u16),
        4 => memory::write(at + offset, value as u32),
        _ => memory::write(at + offset, value),
    }
    let bits: u32 = memory::read(at + CLEAN_FIELDS);
    memory::write(at + CLEAN_FIELDS, bits & !clean);
    Ok(())
}
