//! EPT, VPID, EPTP switching and page-modification logging (SDM Vol. 3C ch. 29).

use crate::guest::ept::{ACCESSED, DIRTY, Ept, LARGE, RWX, USER_EXECUTE, WB};
use crate::guest::fields::*;
use crate::guest::suite::{Ctx, Outcome, check, fail, skip};
use crate::guest::vm::{Exit, Regs, Vm, code, ok};
use crate::guest::{cpu, evmcs, memory, vmx};

super::cases! { true;
    "ept.violation.permissions" "Vol. 3C 28.2.1" permissions;
    "ept.violation.levels" "Vol. 3C 29.3.2" levels;
    "ept.violation.intersection" "Vol. 3C 29.3.2" intersection;
    "ept.violation.large_page" "Vol. 3C 29.3.2" large_violation;
    "ept.violation.page_walk" "Vol. 3C 28.2.1" page_walk;
    "ept.violation.page_walk_accessed_dirty" "Vol. 3C 28.2.1" page_walk_ad;
    "ept.violation.advanced" "Vol. 3C 28.2.1" advanced;
    "ept.violation.across_pages" "Vol. 3C 28.2.1" across_pages;
    "ept.violation.resolved" "Vol. 3C 29.4.3" resolved;
    "ept.violation.before_page_fault" "Vol. 3C 29.3.2" page_fault_first;
    "ept.misconfiguration.write_only" "Vol. 3C 29.3.3.1" write_only;
    "ept.misconfiguration.execute_only" "Vol. 3C 29.3.3.1" execute_only;
    "ept.misconfiguration.memory_type" "Vol. 3C 29.3.3.1" memory_type;
    "ept.misconfiguration.reserved_bits" "Vol. 3C 29.3.3.1" reserved_bits;
    "ept.misconfiguration.not_present_ignored" "Vol. 3C 29.3.2" not_present;
    "ept.map.4k" "Vol. 3C 29.3.2" map_4k;
    "ept.map.2m" "Vol. 3C 29.3.2" map_2m;
    "ept.map.1g" "Vol. 3C 29.3.2" map_1g;
    "ept.map.uncacheable" "Vol. 3C 29.3.7" map_uc;
    "ept.accessed_dirty" "Vol. 3C 29.3.5" accessed_dirty;
    "ept.accessed_dirty.large" "Vol. 3C 29.3.5" accessed_dirty_large;
    "ept.accessed_dirty.off" "Vol. 3C 29.3.5" accessed_dirty_off;
    "ept.invept.single" "Vol. 3C 29.4.3.1" invept_single;
    "ept.invept.all" "Vol. 3C 29.4.3.1" invept_all;
    "ept.two_roots" "Vol. 3C 29.4" two_roots;
    "ept.many_tables" "Vol. 3C 29.3.2" many_tables;
    "ept.written.instructions" "Vol. 3C 29.4.3.1" written_by_instructions;
    "ept.written.by_l2" "Vol. 3C 29.4.3.1" written_by_l2;
    "ept.pml.log" "Vol. 3C 29.3.6" pml_log;
    "ept.pml.full" "Vol. 3C 29.3.6" pml_full;
    "ept.mode_based.supervisor" "Vol. 3C 29.3.2" mode_based_supervisor;
    "ept.mode_based.user" "Vol. 3C 29.3.2" mode_based_user;
    "ept.vmfunc.switch" "Vol. 3C 26.5.6.3" vmfunc_switch;
    "ept.vmfunc.wrong_index" "Vol. 3C 26.5.6.3" vmfunc_index;
    "ept.vmfunc.wrong_eptp" "Vol. 3C 26.5.6.3" vmfunc_eptp;
    "ept.off" "Vol. 3C 26.6" without_ept;
    "ept.off.page_fault" "Vol. 3C 26.6" without_ept_fault;
    "ept.off.invlpg" "Vol. 3C 29.4.3" without_ept_invlpg;
    "vpid.kept" "Vol. 3C 29.4.1" vpid_kept;
    "vpid.invvpid.address" "Vol. 3C 29.4.3.2" invvpid_address;
    "vpid.invvpid.single" "Vol. 3C 29.4.3.2" invvpid_single;
    "vpid.invvpid.all" "Vol. 3C 29.4.3.2" invvpid_all;
    "vpid.invvpid.retaining_globals" "Vol. 3C 29.4.3.2" invvpid_globals;
    "vpid.without" "Vol. 3C 29.4.1" vpid_without;
}

const READ: u64 = 1;
const WRITE: u64 = 2;
const FETCH: u64 = 4;
/// The guest-linear address is valid; the access is to its translation.
const LINEAR: u64 = 0x180;

/// A machine that reads, writes or executes the page at RBX.
fn accessing(ctx: &Ctx, access: u64) -> Outcome<(Vm, Ept)> {
    let code = match access {
        READ => code!["mov al, [rbx]", "vmcall", "2: jmp 2b"],
        WRITE => code!["mov [rbx], al", "vmcall", "2: jmp 2b"],
        _ => code!["jmp rbx"],
    };
    let mut vm = Vm::new(&ctx.caps, code)?;
    let ept = vm.need_ept()?;
    vm.regs.rbx = vm.data;
    vm.regs.rax = 0x0f;
    // VMCALL, for fetches.
    memory::write(vm.data, [0x0f_u8, 0x01, 0xc1]);
    Ok((vm, ept))
}

fn violation(vm: &mut Vm, qualification: u64, address: u64) -> Outcome<Exit> {
    let e = vm.expect(reason::EPT_VIOLATION)?;
    check!("qualification", e.qualification & 0x1bf, qualification);
    check!("guest-physical address", e.physical, address);
    check!("guest-linear address", e.linear, address);
    check!("IDT-vectoring information", e.idt_info >> 31, 0);
    Ok(e)
}

fn permissions(ctx: &mut Ctx) -> Outcome {
    for permission in [0, 1, 3, 4, 5, 7] {
        if permission == 4 && ctx.caps.ept_vpid & 1 == 0 {
            continue;
        }
        for access in [READ, WRITE, FETCH] {
            memory::reset();
            let (mut vm, ept) = accessing(ctx, access)?;
            let data = vm.data;
            ept.map(data, data, permission | if permission == 0 { 0 } else { WB });
            if permission & access != 0 {
                vm.finish()?;
                continue;
            }
            violation(&mut vm, access | permission << 3 | LINEAR, data)?;
            // With the permission, the access goes through; an EPT violation needs no INVEPT.
            ept.map(data, data, RWX | WB);
            vm.finish()?;
        }
    }
    Ok(())
}

fn levels(ctx: &mut Ctx) -> Outcome {
    for level in [1, 2, 3] {
        memory::reset();
        let (mut vm, ept) = accessing(ctx, READ)?;
        // 512 GiB are one PML4 entry and 1 GiB one of the PDPT: an address apart from the code's.
        let address = 0xc000_0000_u64 + 0x1008;
        vm.regs.rbx = address;
        ept.set(address, level, 0);
        violation(&mut vm, READ | LINEAR, address)?;
    }
    // The PML4 entry: nothing is there, not even L2's code.
    memory::reset();
    let (mut vm, ept) = accessing(ctx, READ)?;
    ept.set(0, 4, 0);
    let e = vm.expect(reason::EPT_VIOLATION)?;
    // L2's paging structures are read first.
    check!("qualification", e.qualification & 0x1bf, READ | 0x80);
    check!("guest-physical address", e.physical, cpu::cr3() & !0xfff);
    check!("guest-linear address", e.linear, vm.code);
    Ok(())
}

/// What counts is allowed by the entries of all levels.
fn intersection(ctx: &mut Ctx) -> Outcome {
    for (upper, lower) in [(1, 7), (7, 1), (5, 3), (3, 5)] {
        memory::reset();
        let (mut vm, ept) = accessing(ctx, WRITE)?;
        let address = 0xc000_0000_u64;
        vm.regs.rbx = address;
        ept.map(address, vm.data, lower | WB);
        let slot = ept.entry_at(address, 2);
        memory::write(slot, memory::read::<u64>(slot) & !7 | upper);
        violation(&mut vm, WRITE | (upper & lower) << 3 | LINEAR, address)?;
    }
    Ok(())
}

fn large_violation(ctx: &mut Ctx) -> Outcome {
    let (mut vm, ept) = accessing(ctx, WRITE)?;
    let address = 0xc012_3450_u64;
    vm.regs.rbx = address;
    ept.set(address, 2, 0xc000_0000 | LARGE | WB | 5);
    violation(&mut vm, WRITE | 5 << 3 | LINEAR, address)?;
    Ok(())
}

/// L2's PDPT, which is a page of L1's boot code.
fn pdpt() -> u64 {
    memory::read::<u64>(cpu::cr3() & !0xfff) & !0xfff
}

fn page_walk(ctx: &mut Ctx) -> Outcome {
    let (mut vm, ept) = accessing(ctx, READ)?;
    ept.map(pdpt(), 0, 0);
    let e = vm.expect(reason::EPT_VIOLATION)?;
    check!("qualification", e.qualification & 0x1bf, READ | 0x80);
    check!("guest-physical address", e.physical, pdpt());
    check!("guest-linear address", e.linear, vm.code);
    Ok(())
}

/// With accessed and dirty flags for EPT, accesses to L2's paging structures count as writes.
fn page_walk_ad(ctx: &mut Ctx) -> Outcome {
    if ctx.caps.ept_vpid >> 21 & 1 == 0 {
        return skip("accessed and dirty flags for EPT not offered");
    }
    let (mut vm, ept) = accessing(ctx, READ)?;
    vm.set(EPTP, ept.eptp() | 0x40)?;
    ept.map(pdpt(), pdpt(), READ | WB);
    let e = vm.expect(reason::EPT_VIOLATION)?;
    check!("qualification", e.qualification & 0x1bf, READ | WRITE | READ << 3 | 0x80);
    check!("guest-physical address", e.physical, pdpt());
    Ok(())
}

/// Bits 9 to 11 tell of L2's own translation: user-mode page, writable, execute-disabled.
fn advanced(ctx: &mut Ctx) -> Outcome {
    if ctx.caps.ept_vpid >> 22 & 1 == 0 {
        return skip("advanced EPT-violation information not offered");
    }
    let (mut vm, ept) = accessing(ctx, READ)?;
    ept.map(vm.data, 0, 0);
    let e = vm.expect(reason::EPT_VIOLATION)?;
    // The boot page tables: user, writable, executable.
    check!("qualification bits 11:9", e.qualification >> 9 & 7, 3);
    Ok(())
}

fn across_pages(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov rax, [rbx]", "vmcall"])?;
    let ept = vm.need_ept()?;
    let pages = memory::pages(2);
    ept.map(pages + 4096, 0, 0);
    vm.regs.rbx = pages + 4096 - 4;
    let e = vm.expect(reason::EPT_VIOLATION)?;
    check!("qualification", e.qualification & 0x1bf, READ | LINEAR);
    check!("guest-physical page", e.physical & !0xfff, pages + 4096);
    Ok(())
}

fn resolved(ctx: &mut Ctx) -> Outcome {
    let (mut vm, ept) = accessing(ctx, READ)?;
    let (data, other) = (vm.data, memory::page());
    memory::write(other, 0x5a_u8);
    ept.map(data, 0, 0);
    violation(&mut vm, READ | LINEAR, data)?;
    check!("RAX", vm.regs.rax, 0x0f);
    ept.map(data, other, RWX | WB);
    vm.finish()?;
    check!("RAX", vm.regs.rax, 0x5a);
    Ok(())
}

/// L2's own page fault comes first.
fn page_fault_first(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _) = accessing(ctx, READ)?;
    vm.regs.rbx = 5 << 30;
    let event = vm.expect_event(14)?;
    check!("CR2", event.cr2, 5_u64 << 30);
    Ok(())
}

fn misconfigured(ctx: &Ctx, what: &'static str, level: u32, entry: u64) -> Outcome {
    memory::reset();
    let (mut vm, ept) = accessing(ctx, READ)?;
    let address = 0xc000_0123_u64;
    vm.regs.rbx = address;
    ept.set(address, level, entry);
    let e = vm.run()?;
    check!(format_args!("{what}, level {level}: exit reason"), e.reason, reason::EPT_MISCONFIG);
    check!("guest-physical address", e.physical, address);
    Ok(())
}

fn write_only(ctx: &mut Ctx) -> Outcome {
    let table = 0x10_0000;
    for permission in [2, 6] {
        misconfigured(ctx, "leaf", 1, table | WB | permission)?;
        misconfigured(ctx, "table", 2, table | permission)?;
        misconfigured(ctx, "2-MiB page", 2, 0xc000_0000 | LARGE | WB | permission)?;
        misconfigured(ctx, "table", 3, table | permission)?;
    }
    Ok(())
}

fn execute_only(ctx: &mut Ctx) -> Outcome {
    if ctx.caps.ept_vpid & 1 != 0 {
        // Offered: a read is a violation.
        let (mut vm, ept) = accessing(ctx, READ)?;
        ept.map(vm.data, vm.data, FETCH | WB);
        let data = vm.data;
        violation(&mut vm, READ | FETCH << 3 | LINEAR, data)?;
        return Ok(());
    }
    misconfigured(ctx, "execute-only", 1, 0x10_0000 | WB | 4)
}

fn memory_type(ctx: &mut Ctx) -> Outcome {
    for ty in [2, 3, 7] {
        misconfigured(ctx, "leaf", 1, 0x10_0000 | ty << 3 | RWX)?;
        misconfigured(ctx, "2-MiB page", 2, 0xc000_0000 | LARGE | ty << 3 | RWX)?;
    }
    for ty in [1, 4, 5] {
        memory::reset();
        let (mut vm, ept) = accessing(ctx, READ)?;
        ept.set(vm.data, 1, vm.data | ty << 3 | RWX);
        vm.finish()?;
    }
    Ok(())
}

fn reserved_bits(ctx: &mut Ctx) -> Outcome {
    let beyond = ctx.caps.beyond();
    misconfigured(ctx, "address beyond the width", 1, 0x10_0000 | beyond | WB | RWX)?;
    misconfigured(ctx, "address beyond the width", 2, 0x10_0000 | beyond | RWX)?;
    misconfigured(ctx, "bits 6:3 of a table entry", 2, 0x10_0000 | 1 << 3 | RWX)?;
    misconfigured(ctx, "bits 6:3 of a table entry", 3, 0x10_0000 | 1 << 6 | RWX)?;
    misconfigured(ctx, "address bits of a 2-MiB page", 2, 0xc000_0000 | 1 << 12 | LARGE | WB | RWX)?;
    if ctx.caps.ept_vpid >> 17 & 1 != 0 {
        misconfigured(ctx, "address bits of a 1-GiB page", 3, 0xc000_0000 | 1 << 21 | LARGE | WB | RWX)?;
    } else {
        misconfigured(ctx, "1-GiB page", 3, 0xc000_0000 | LARGE | WB | RWX)?;
    }
    Ok(())
}

/// Nothing else in an entry that is not present matters.
fn not_present(ctx: &mut Ctx) -> Outcome {
    let (mut vm, ept) = accessing(ctx, READ)?;
    let data = vm.data;
    ept.set(data, 1, 0x7fff_ffff_ffff_ffb8);
    violation(&mut vm, READ | LINEAR, data)?;
    Ok(())
}

fn reads(vm: &mut Vm, what: &'static str, at: u64, expected: u8) -> Outcome {
    vm.regs = Regs { rbx: at, ..Regs::default() };
    vm.set(GUEST_RIP, vm.code)?;
    vm.finish()?;
    check!(what, vm.regs.rax, expected);
    Ok(())
}

fn map_4k(ctx: &mut Ctx) -> Outcome {
    let (mut vm, ept) = accessing(ctx, READ)?;
    let other = memory::pages(2);
    memory::write(other + 5, 0x77_u8);
    memory::write(other + 4096 + 6, 0x88_u8);
    ept.map(0xc000_3000, other, READ | WB);
    ept.map(0xc000_4000, other + 4096, READ | WB);
    reads(&mut vm, "first page", 0xc000_3005, 0x77)?;
    reads(&mut vm, "second page", 0xc000_4006, 0x88)
}

fn map_2m(ctx: &mut Ctx) -> Outcome {
    let (mut vm, ept) = accessing(ctx, READ)?;
    let data = vm.data;
    memory::write(data + 5, 0x79_u8);
    let large = data & !0x1f_ffff;
    ept.set(0xc020_0000, 2, large | LARGE | READ | WB);
    reads(&mut vm, "through a 2-MiB page", 0xc020_0000 + (data & 0x1f_ffff) + 5, 0x79)
}

fn map_1g(ctx: &mut Ctx) -> Outcome {
    if ctx.caps.ept_vpid >> 17 & 1 == 0 {
        return skip("1-GiB pages not offered");
    }
    let (mut vm, ept) = accessing(ctx, READ)?;
    let data = vm.data;
    memory::write(data + 5, 0x7b_u8);
    ept.set(0xc000_0000, 3, LARGE | READ | WB);
    reads(&mut vm, "through a 1-GiB page", 0xc000_0000 + data + 5, 0x7b)
}

fn map_uc(ctx: &mut Ctx) -> Outcome {
    let (mut vm, ept) = accessing(ctx, READ)?;
    memory::write(vm.data, 0x11_u8);
    ept.map(vm.data, vm.data, RWX);
    let data = vm.data;
    reads(&mut vm, "through an uncacheable page", data, 0x11)
}

fn with_ad(ctx: &Ctx, access: u64) -> Outcome<(Vm, Ept)> {
    if ctx.caps.ept_vpid >> 21 & 1 == 0 {
        return skip("accessed and dirty flags for EPT not offered");
    }
    let (vm, ept) = accessing(ctx, access)?;
    vm.set(EPTP, ept.eptp() | 0x40)?;
    Ok((vm, ept))
}

fn accessed_dirty(ctx: &mut Ctx) -> Outcome {
    let address = 0xc000_0000_u64;
    for (access, flags) in [(READ, ACCESSED), (WRITE, ACCESSED | DIRTY)] {
        memory::reset();
        let (mut vm, ept) = with_ad(ctx, access)?;
        vm.regs.rbx = address;
        ept.map(address, vm.data, RWX | WB);
        vm.finish()?;
        check!("flags of the leaf", ept.get(address, 1) & (ACCESSED | DIRTY), flags);
        check!("flags of the table entry", ept.get(address, 2) & ACCESSED, ACCESSED);
        check!("flags of the PDPT entry", ept.get(address, 3) & ACCESSED, ACCESSED);
        check!("flags of the PML4 entry", ept.get(address, 4) & ACCESSED, ACCESSED);
        check!("flags of a page not touched", ept.get(address + 4096, 1) & (ACCESSED | DIRTY), 0);
    }
    // A page that has been read gets its dirty flag by the first write.
    memory::reset();
    let (mut vm, ept) = with_ad(ctx, READ)?;
    vm.code = code!["mov al, [rbx]", "vmcall", "mov [rbx], al", "vmcall"];
    vm.set(GUEST_RIP, vm.code)?;
    ept.map(vm.data, vm.data, RWX | WB);
    let e = vm.finish()?;
    check!("dirty after a read", ept.get(vm.data, 1) & DIRTY, 0);
    vm.skip_instruction(&e)?;
    vm.finish()?;
    check!("dirty after a write", ept.get(vm.data, 1) & DIRTY, DIRTY);
    Ok(())
}

fn accessed_dirty_large(ctx: &mut Ctx) -> Outcome {
    let (mut vm, ept) = with_ad(ctx, WRITE)?;
    let data = vm.data;
    ept.set(0xc020_0000, 2, data & !0x1f_ffff | LARGE | RWX | WB);
    vm.regs.rbx = 0xc020_0000 + (data & 0x1f_ffff);
    vm.finish()?;
    check!("flags of the 2-MiB page", ept.get(0xc020_0000, 2) & (ACCESSED | DIRTY), ACCESSED | DIRTY);
    Ok(())
}

fn accessed_dirty_off(ctx: &mut Ctx) -> Outcome {
    let (mut vm, ept) = accessing(ctx, WRITE)?;
    ept.map(vm.data, vm.data, RWX | WB);
    vm.finish()?;
    check!("flags", ept.get(vm.data, 1) & (ACCESSED | DIRTY), 0);
    Ok(())
}

/// Takes write permission away behind L2's back; INVEPT makes it seen.
fn invept(ctx: &Ctx, kind: u64) -> Outcome {
    if ctx.caps.ept_vpid >> 20 & 1 == 0 || ctx.caps.ept_vpid >> (24 + kind) & 1 == 0 {
        return skip("INVEPT type not offered");
    }
    let (mut vm, ept) = accessing(ctx, WRITE)?;
    let data = vm.data;
    ept.map(data, data, RWX | WB);
    vm.finish()?;
    ept.map(data, data, READ | WB);
    ok("INVEPT", vmx::invept(kind, ept.eptp()))?;
    vm.set(GUEST_RIP, vm.code)?;
    violation(&mut vm, WRITE | READ << 3 | LINEAR, data)?;
    // Another page, by the same address.
    let other = memory::page();
    ept.map(data, other, RWX | WB);
    ok("INVEPT", vmx::invept(kind, ept.eptp()))?;
    vm.regs.rax = 0x99;
    vm.finish()?;
    check!("what was written", memory::read::<u8>(other), 0x99);
    Ok(())
}
fn invept_single(ctx: &mut Ctx) -> Outcome {
    invept(ctx, 1)
}
fn invept_all(ctx: &mut Ctx) -> Outcome {
    invept(ctx, 2)
}

/// Two EPTPs with different mappings, in turn.
fn two_roots(ctx: &mut Ctx) -> Outcome {
    let (mut vm, first) = accessing(ctx, READ)?;
    let second = Ept::identity();
    let other = memory::page();
    let data = vm.data;
    memory::write(data, 1_u8);
    memory::write(other, 2_u8);
    second.map(data, other, RWX | WB);
    for _ in 0..3 {
        vm.set(EPTP, first.eptp())?;
        reads(&mut vm, "by the first EPTP", data, 1)?;
        vm.set(EPTP, second.eptp())?;
        reads(&mut vm, "by the second EPTP", data, 2)?;
    }
    Ok(())
}

/// L2 touches 1 GiB, 2 MiB apart: what maps it takes 512 tables of a processor that makes them anew, and only
/// three of L1's. Twice, so that tables which had to go are needed again.
fn many_tables(ctx: &mut Ctx) -> Outcome {
    const REGIONS: u64 = 512;
    let code = code![
        // RBX: address; RDX: from one to the next.
        "mov rsi, rbx",
        "xor ecx, ecx",
        "2: mov [rsi], rcx",
        "add rsi, rdx",
        "inc ecx",
        "cmp ecx, 512",
        "jne 2b",
        "xor eax, eax",
        "3: sub rsi, rdx",
        "add rax, [rsi]",
        "loop 3b",
        "vmcall",
    ];
    let mut vm = Vm::new(&ctx.caps, code)?;
    let ept = vm.need_ept()?;
    let base = 0xc000_0000_u64;
    let (directory, table, page) = (memory::page(), memory::page(), memory::page());
    for i in 0..REGIONS {
        memory::write(directory + 8 * i, table | RWX);
        memory::write(table + 8 * i, page | RWX | WB);
    }
    ept.set(base, 3, directory | RWX);
    vm.regs.rbx = base;
    vm.regs.rdx = (2 << 20) + 8;
    vm.finish()?;
    check!("sum", vm.regs.rax, REGIONS * (REGIONS - 1) / 2);
    for i in 0..REGIONS {
        check!(format_args!("word {i}"), memory::read::<u64>(page + 8 * i), i);
    }
    Ok(())
}

/// Writes to the entry at the first argument, which holds the second, the third.
type Writer = unsafe fn(u64, u64, u64);

/// Instructions that write RCX to an entry at RDX, which holds RAX.
const WRITERS: &[(&str, Writer)] = &[
    ("MOV", |slot, _, new| unsafe { core::arch::asm!("mov [{}], {}", in(reg) slot, in(reg) new) }),
    ("LOCK CMPXCHG", |slot, old, new| unsafe {
        core::arch::asm!("lock cmpxchg [{}], {}", in(reg) slot, in(reg) new, inout("rax") old => _)
    }),
    ("XCHG", |slot, _, new| unsafe { core::arch::asm!("xchg [{}], {}", in(reg) slot, inout(reg) new => _) }),
    ("two halves", |slot, _, new| unsafe {
        core::arch::asm!("mov [{s}], {n:e}", "shr {n}, 32", "mov [{s} + 4], {n:e}", s = in(reg) slot, n = inout(reg) new => _)
    }),
    ("PUSH", |slot, _, new| unsafe {
        core::arch::asm!("mov {s}, rsp", "lea rsp, [{a} + 8]", "push {n}", "mov rsp, {s}",
            a = in(reg) slot, n = in(reg) new, s = out(reg) _)
    }),
    ("MOVUPS", |slot, _, new| unsafe {
        let both = [new, (slot as *const u64).add(1).read_volatile()];
        core::arch::asm!("movups {x}, [{b}]", "movups [{s}], {x}", b = in(reg) &both, s = in(reg) slot, x = out(xmm_reg) _)
    }),
    ("REP MOVSQ", |slot, _, new| unsafe {
        let copy = core::ptr::read_volatile(&new);
        core::arch::asm!("rep movsq", inout("rcx") 1_u64 => _, inout("rsi") &copy => _, inout("rdi") slot => _)
    }),
    ("VMREAD", |slot, _, new| unsafe {
        let _ = vmx::vmwrite(GUEST_SYSENTER_ESP, new);
        core::arch::asm!("vmread [{}], {}", in(reg) slot, in(reg) u64::from(GUEST_SYSENTER_ESP));
        let _ = vmx::vmwrite(GUEST_SYSENTER_ESP, 0);
    }),
];

/// Whatever instruction changes an entry, INVEPT makes it seen.
fn written_by_instructions(ctx: &mut Ctx) -> Outcome {
    // One of them is VMREAD.
    evmcs::want(false);
    let (mut vm, ept) = accessing(ctx, READ)?;
    let address = 0xc000_3000_u64;
    let (a, b) = two_pages();
    let slot = ept.entry_at(address, 1);
    memory::write(slot, a | RWX | WB);
    for (name, write) in WRITERS {
        for (old, new, expected) in [(a, b, 0xbb), (b, a, 0xaa)] {
            vm.invalidate();
            reads(&mut vm, "before", address, 0x165_u64.wrapping_sub(expected) as u8)?;
            unsafe { write(slot, old | RWX | WB, new | RWX | WB) };
            check!(format_args!("the entry, by {name}"), memory::read::<u64>(slot), new | RWX | WB);
            vm.invalidate();
            vm.regs = Regs { rbx: address, ..Regs::default() };
            vm.set(GUEST_RIP, vm.code)?;
            vm.finish()?;
            check!(format_args!("what L2 reads after {name}"), vm.regs.rax, expected);
        }
    }
    Ok(())
}

/// L2 changes its own entry, which L1's identity map lets it do.
fn written_by_l2(ctx: &mut Ctx) -> Outcome {
    let mut vm =
        Vm::new(&ctx.caps, code!["mov al, [rbx]", "mov [rdx], rcx", "mov dword ptr [rsi], 7", "vmcall"])?;
    let ept = vm.need_ept()?;
    let address = 0xc000_3000_u64;
    let (a, b) = two_pages();
    let slot = ept.entry_at(address, 1);
    memory::write(slot, a | RWX | WB);
    for (new, expected) in [(b, 0xaa), (a, 0xbb), (b, 0xaa)] {
        vm.regs = Regs { rbx: address, rcx: new | RWX | WB, rdx: slot, rsi: vm.data, ..Regs::default() };
        vm.set(GUEST_RIP, vm.code)?;
        vm.finish()?;
        check!("what L2 read", vm.regs.rax, expected);
        check!("the entry", memory::read::<u64>(slot), new | RWX | WB);
        vm.invalidate();
    }
    Ok(())
}

fn with_pml(ctx: &Ctx, index: u64) -> Outcome<(Vm, Ept, u64)> {
    let (vm, ept) = with_ad(ctx, WRITE)?;
    vm.need_secondary(secondary::PML)?;
    let log = memory::page();
    vm.set(PML_ADDR, log)?;
    vm.set(PML_INDEX, index)?;
    Ok((vm, ept, log))
}

fn pml_log(ctx: &mut Ctx) -> Outcome {
    let (mut vm, ept, log) = with_pml(ctx, 511)?;
    let data = vm.data;
    vm.regs.rbx = data + 0x123;
    ept.map(data, data, RWX | WB);
    vm.finish()?;
    let index = vm.get(PML_INDEX)?;
    if index >= 511 {
        fail!("expected entries in the log, got index {index}")
    }
    // L2's paging structures may be in the log too.
    let found = (index + 1..512).filter(|i| memory::read::<u64>(log + 8 * i) == data).count();
    check!("entries for the page", found, 1);
    // A page that is dirty is not logged again.
    vm.set(GUEST_RIP, vm.code)?;
    vm.finish()?;
    let found = (vm.get(PML_INDEX)? + 1..512).filter(|i| memory::read::<u64>(log + 8 * i) == data).count();
    check!("entries for the page after another write", found, 1);
    Ok(())
}

fn pml_full(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _ept, _log) = with_pml(ctx, 0xffff)?;
    let e = vm.expect(reason::PML_FULL)?;
    check!("PML index", vm.get(PML_INDEX)?, 0xffff);
    check!("NMI unblocking", e.qualification & 0x1000, 0);
    vm.set(PML_INDEX, 511)?;
    vm.finish()?;
    Ok(())
}

/// Lets user-mode linear addresses be executed at the page of `gpa`.
fn user_execute(ept: &Ept, gpa: u64) {
    for level in 1..=4 {
        let slot = ept.entry_at(gpa, level);
        memory::write(slot, memory::read::<u64>(slot) | USER_EXECUTE);
    }
}

/// L2 jumps to a page with this permission; `user`: its linear addresses are user-mode ones.
fn mode_based(ctx: &Ctx, user: bool, permission: u64, allowed: bool) -> Outcome {
    memory::reset();
    let (mut vm, ept) = accessing(ctx, FETCH)?;
    vm.need_secondary(secondary::MODE_BASED)?;
    let data = vm.data;
    if user {
        vm.segments([0x23, 0x2b], 0xa0fb, 0xc0f3)?;
    } else {
        let root = memory::page();
        memory::write(root, pdpt() | 3);
        vm.set(GUEST_CR3, root)?;
    }
    for page in [vm.code, vm.code + 4096, data] {
        user_execute(&ept, page);
    }
    ept.map(data, data, permission | WB);
    if allowed {
        vm.finish()?;
        return Ok(());
    }
    let e = vm.expect(reason::EPT_VIOLATION)?;
    check!("guest-physical address", e.physical, data);
    // Bit 5: executable for supervisor-mode addresses; bit 6: for user-mode ones.
    let executable = (permission & FETCH) << 3 | u64::from(permission & USER_EXECUTE != 0) << 6;
    check!("qualification bits 6:0", e.qualification & 0x7f, FETCH | READ << 3 | executable);
    Ok(())
}

fn mode_based_supervisor(ctx: &mut Ctx) -> Outcome {
    mode_based(ctx, false, READ | FETCH, true)?;
    mode_based(ctx, false, READ | FETCH | USER_EXECUTE, true)?;
    mode_based(ctx, false, READ | USER_EXECUTE, false)?;
    mode_based(ctx, false, READ, false)
}

fn mode_based_user(ctx: &mut Ctx) -> Outcome {
    mode_based(ctx, true, READ | USER_EXECUTE, true)?;
    mode_based(ctx, true, READ | FETCH | USER_EXECUTE, true)?;
    mode_based(ctx, true, READ | FETCH, false)?;
    mode_based(ctx, true, READ, false)
}

fn with_vmfunc(ctx: &Ctx) -> Outcome<(Vm, u64)> {
    let mut vm = Vm::new(&ctx.caps, code!["mov sil, [rbx]", "vmfunc", "mov dil, [rbx]", "vmcall"])?;
    vm.need_secondary(secondary::VMFUNC)?;
    if ctx.caps.vmfunc & 1 == 0 {
        return skip("EPTP switching not offered");
    }
    vm.set(VMFUNC_CTL, 1)?;
    let list = memory::page();
    vm.set(EPTP_LIST, list)?;
    vm.regs = Regs { rbx: vm.data, ..Regs::default() };
    Ok((vm, list))
}

fn vmfunc_switch(ctx: &mut Ctx) -> Outcome {
    let (mut vm, list) = with_vmfunc(ctx)?;
    let second = Ept::identity();
    let other = memory::page();
    memory::write(vm.data, 0x31_u8);
    memory::write(other, 0x32_u8);
    second.map(vm.data, other, RWX | WB);
    memory::write(list + 8 * 7, second.eptp());
    vm.regs.rcx = 7;
    vm.finish()?;
    check!("before the switch", vm.regs.rsi, 0x31);
    check!("after the switch", vm.regs.rdi, 0x32);
    check!("EPTP", vm.get(EPTP)?, second.eptp());
    Ok(())
}

fn vmfunc_index(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _) = with_vmfunc(ctx)?;
    vm.regs.rcx = 512;
    let e = vm.expect(reason::VMFUNC)?;
    check!("instruction length", e.len, 3);
    check!("RIP - code", memory::read::<u8>(e.rip), 0x0f);
    Ok(())
}

fn vmfunc_eptp(ctx: &mut Ctx) -> Outcome {
    let (mut vm, list) = with_vmfunc(ctx)?;
    memory::write(list, 0x1000_u64 | 3);
    vm.expect(reason::VMFUNC)?;
    let eptp = vm.need_ept()?.eptp();
    check!("EPTP", vm.get(EPTP)?, eptp);
    Ok(())
}

/// L2 without EPT, with page tables of its own: 5 GiB is the page that `leaf` says.
struct Tables {
    root: u64,
    leaf: u64,
}

const LINEAR_ADDRESS: u64 = 5 << 30;

fn tables() -> Tables {
    let (root, pdpt_copy, pd, pt) = (memory::page(), memory::page(), memory::page(), memory::page());
    memory::write(root, pdpt_copy | 7);
    memory::copy(pdpt_copy, pdpt(), 32);
    memory::write(pdpt_copy + 8 * 5, pd | 7);
    memory::write(pd, pt | 7);
    Tables { root, leaf: pt }
}

fn no_ept(vm: &Vm) -> Outcome {
    if vm.ept.is_some() {
        vm.and(SECONDARY, !secondary::EPT)?;
    }
    Ok(())
}

fn two_pages() -> (u64, u64) {
    let (a, b) = (memory::page(), memory::page());
    memory::write(a, 0xaa_u8);
    memory::write(b, 0xbb_u8);
    (a, b)
}

fn reader(ctx: &Ctx) -> Outcome<(Vm, Tables, u64, u64)> {
    let vm = Vm::new(&ctx.caps, code!["mov al, [rbx]", "vmcall", "2: jmp 2b"])?;
    let t = tables();
    let (a, b) = two_pages();
    memory::write(t.leaf, a | 7);
    vm.set(GUEST_CR3, t.root)?;
    Ok((vm, t, a, b))
}

fn without_ept(ctx: &mut Ctx) -> Outcome {
    let (mut vm, t, _, b) = reader(ctx)?;
    no_ept(&vm)?;
    reads(&mut vm, "the first page", LINEAR_ADDRESS, 0xaa)?;
    // Without VPID, each entry forgets translations.
    memory::write(t.leaf, b | 7);
    reads(&mut vm, "the second page", LINEAR_ADDRESS, 0xbb)?;
    check!("accessed flag", memory::read::<u64>(t.leaf) & 0x20, 0x20);
    Ok(())
}

fn without_ept_fault(ctx: &mut Ctx) -> Outcome {
    let (mut vm, t, a, _) = reader(ctx)?;
    no_ept(&vm)?;
    memory::write(t.leaf, 0_u64);
    vm.regs.rbx = LINEAR_ADDRESS;
    let event = vm.expect_event(14)?;
    check!("CR2", event.cr2, LINEAR_ADDRESS);
    check!("error code", event.code, 0);
    memory::write(t.leaf, a | 7);
    vm.set(GUEST_RIP, vm.code)?;
    vm.finish()?;
    check!("RAX", vm.regs.rax & 0xff, 0xaa);
    Ok(())
}

/// L2 changes its own tables and says INVLPG.
fn without_ept_invlpg(ctx: &mut Ctx) -> Outcome {
    for ept in [false, true] {
        memory::reset();
        let (mut vm, t, _, b) = reader(ctx)?;
        if !ept {
            no_ept(&vm)?;
        }
        vm.code = code!["mov al, [rbx]", "mov [rdx], rcx", "invlpg [rbx]", "mov sil, [rbx]", "vmcall"];
        vm.set(GUEST_RIP, vm.code)?;
        vm.regs = Regs { rbx: LINEAR_ADDRESS, rdx: t.leaf, rcx: b | 7, ..Regs::default() };
        vm.finish()?;
        check!("before", vm.regs.rax, 0xaa);
        check!("after", vm.regs.rsi, 0xbb);
    }
    Ok(())
}

fn with_vpid(ctx: &Ctx, kind: u64) -> Outcome<(Vm, Tables, u64, u64)> {
    let (vm, t, a, b) = reader(ctx)?;
    vm.need_secondary(secondary::VPID)?;
    vm.set(VPID, 5)?;
    if ctx.caps.ept_vpid >> (40 + kind) & 1 == 0 {
        return skip("INVVPID type not offered");
    }
    ok("INVVPID", vmx::invvpid(2, 0, 0))?;
    Ok((vm, t, a, b))
}

/// Translations of a VPID may live on; whatever L2 sees, it is one of both pages, and CR3 written by
/// L2 itself drops the old one.
fn vpid_kept(ctx: &mut Ctx) -> Outcome {
    let (mut vm, t, _, b) = with_vpid(ctx, 2)?;
    reads(&mut vm, "the first page", LINEAR_ADDRESS, 0xaa)?;
    memory::write(t.leaf, b | 7);
    vm.code = code!["mov al, [rbx]", "mov rcx, cr3", "mov cr3, rcx", "mov dl, [rbx]", "vmcall"];
    vm.set(GUEST_RIP, vm.code)?;
    vm.regs = Regs { rbx: LINEAR_ADDRESS, ..Regs::default() };
    vm.finish()?;
    if !matches!(vm.regs.rax, 0xaa | 0xbb) {
        fail!("expected 0xaa or 0xbb, got {:#x}", vm.regs.rax)
    }
    check!("after MOV to CR3", vm.regs.rdx, 0xbb);
    Ok(())
}

fn invvpid(ctx: &Ctx, kind: u64) -> Outcome {
    for ept in [true, false] {
        memory::reset();
        let (mut vm, t, a, b) = with_vpid(ctx, kind)?;
        if !ept {
            no_ept(&vm)?;
        }
        reads(&mut vm, "the first page", LINEAR_ADDRESS, 0xaa)?;
        memory::write(t.leaf, b | 7);
        ok("INVVPID", vmx::invvpid(kind, 5, LINEAR_ADDRESS))?;
        reads(&mut vm, "the second page", LINEAR_ADDRESS, 0xbb)?;
        memory::write(t.leaf, a | 7);
        ok("INVVPID", vmx::invvpid(kind, 5, LINEAR_ADDRESS))?;
        reads(&mut vm, "the first page again", LINEAR_ADDRESS, 0xaa)?;
    }
    Ok(())
}
fn invvpid_address(ctx: &mut Ctx) -> Outcome {
    invvpid(ctx, 0)
}
fn invvpid_single(ctx: &mut Ctx) -> Outcome {
    invvpid(ctx, 1)
}
fn invvpid_all(ctx: &mut Ctx) -> Outcome {
    invvpid(ctx, 2)
}
fn invvpid_globals(ctx: &mut Ctx) -> Outcome {
    invvpid(ctx, 3)
}

/// Without VPID, VM entries and exits forget all linear mappings.
fn vpid_without(ctx: &mut Ctx) -> Outcome {
    let (mut vm, t, a, b) = reader(ctx)?;
    for _ in 0..3 {
        memory::write(t.leaf, a | 7);
        reads(&mut vm, "the first page", LINEAR_ADDRESS, 0xaa)?;
        memory::write(t.leaf, b | 7);
        reads(&mut vm, "the second page", LINEAR_ADDRESS, 0xbb)?;
    }
    Ok(())
}
