//! MSR lists, time, VMCS shadowing (SDM Vol. 3C §27.4, §28.4, §28.6, §26.3, §25.10).

use crate::guest::fields::*;
use crate::guest::suite::{Ctx, Outcome, check, fail, skip};
use crate::guest::vm::{Regs, Vm, code, ok};
use crate::guest::{cpu, memory, vmx};

super::cases! { true;
    "msr_list.entry_load" "Vol. 3C 27.4" entry_load;
    "msr_list.entry_load.forbidden" "Vol. 3C 27.4" entry_load_forbidden;
    "msr_list.entry_load.order" "Vol. 3C 27.4" entry_load_order;
    "msr_list.exit_store" "Vol. 3C 28.4" exit_store;
    "msr_list.exit_load" "Vol. 3C 28.6" exit_load;
    "msr_list.both" "Vol. 3C 28.6" both_lists;
    "tsc.offset" "Vol. 3C 26.3" tsc_offset;
    "tsc.offset.rdmsr" "Vol. 3C 26.3" tsc_offset_rdmsr;
    "tsc.offset.off" "Vol. 3C 26.3" tsc_offset_off;
    "tsc.scaling" "Vol. 3C 26.3" tsc_scaling;
    "shadowing.read" "Vol. 3C 31.3 VMREAD" shadowing_read;
    "shadowing.write" "Vol. 3C 31.3 VMWRITE" shadowing_write;
    "shadowing.bitmap" "Vol. 3C 26.1.3" shadowing_bitmap;
    "shadowing.no_link" "Vol. 3C 31.3 VMREAD" shadowing_no_link;
    "shadowing.no_memory" "Vol. 3C 31.3 VMREAD" shadowing_no_memory;
    "shadowing.launch" "Vol. 3C 27.1" shadowing_launch;
}

/// A list of MSR entries in a page.
fn list(entries: &[(u64, u64)]) -> u64 {
    let at = memory::page();
    for (i, (msr, value)) in entries.iter().enumerate() {
        memory::write(at + 16 * i as u64, *msr);
        memory::write(at + 16 * i as u64 + 8, *value);
    }
    at
}

const KERNEL_GS_BASE: u64 = 0xc000_0102;

fn passing_msrs(ctx: &Ctx, code: u64) -> Outcome<Vm> {
    let vm = Vm::new(&ctx.caps, code)?;
    vm.need_primary(primary::MSR_BITMAPS)?;
    vm.set(MSR_BITMAP, memory::page())?;
    Ok(vm)
}

fn entry_load(ctx: &mut Ctx) -> Outcome {
    let mut vm = passing_msrs(ctx, code!["rdmsr", "vmcall"])?;
    vm.set(ENTRY_LOAD_ADDR, list(&[(cpu::MSR_STAR.into(), 0x11), (KERNEL_GS_BASE, 0x1234_5678_9abc)]))?;
    vm.set(ENTRY_LOAD_COUNT, 2)?;
    vm.regs.rcx = KERNEL_GS_BASE;
    vm.finish()?;
    check!("the MSR that L2 read", vm.regs.rax | vm.regs.rdx << 32, 0x1234_5678_9abc_u64);
    // No exit list: L1 keeps what the entry loaded.
    check!("the MSR in L1", cpu::msr(cpu::MSR_KERNEL_GS_BASE), 0x1234_5678_9abc_u64);
    let _ = cpu::wrmsr(cpu::MSR_KERNEL_GS_BASE, 0);
    let _ = cpu::wrmsr(cpu::MSR_STAR, 0);
    Ok(())
}

fn entry_load_forbidden(ctx: &mut Ctx) -> Outcome {
    for (what, entry) in [
        ("IA32_FS_BASE", (0xc000_0100, 0)),
        ("IA32_GS_BASE", (0xc000_0101, 0)),
        ("x2APIC TPR", (0x808, 0)),
        ("an MSR that does not exist", (0x1234_5678, 0)),
        ("a value that WRMSR refuses", (KERNEL_GS_BASE, 1 << 63)),
        ("bits 63:32 of the index", (1 << 32 | KERNEL_GS_BASE, 0)),
        ("IA32_SMM_MONITOR_CTL", (0x9b, 0)),
    ] {
        memory::reset();
        let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
        vm.set(ENTRY_LOAD_ADDR, list(&[(cpu::MSR_STAR.into(), 0), entry]))?;
        vm.set(ENTRY_LOAD_COUNT, 2)?;
        match vm.enter() {
            Ok(e) => {
                check!(format_args!("{what}: exit reason"), e.reason, 0x8000_0022_u32);
                check!(format_args!("{what}: qualification"), e.qualification, 2);
            }
            Err(e) => fail!("{what}: expected exit reason 0x80000022, got {e:x?}"),
        }
    }
    Ok(())
}

/// The last of several entries for one MSR counts.
fn entry_load_order(ctx: &mut Ctx) -> Outcome {
    let mut vm = passing_msrs(ctx, code!["rdmsr", "vmcall"])?;
    vm.set(ENTRY_LOAD_ADDR, list(&[(KERNEL_GS_BASE, 1), (KERNEL_GS_BASE, 2), (KERNEL_GS_BASE, 3)]))?;
    vm.set(ENTRY_LOAD_COUNT, 3)?;
    vm.regs.rcx = KERNEL_GS_BASE;
    vm.finish()?;
    check!("the MSR that L2 read", vm.regs.rax, 3);
    let _ = cpu::wrmsr(cpu::MSR_KERNEL_GS_BASE, 0);
    Ok(())
}

fn exit_store(ctx: &mut Ctx) -> Outcome {
    let mut vm = passing_msrs(ctx, code!["wrmsr", "vmcall"])?;
    let at = list(&[(KERNEL_GS_BASE, !0), (0x10, 0)]);
    vm.set(EXIT_STORE_ADDR, at)?;
    vm.set(EXIT_STORE_COUNT, 2)?;
    vm.regs = Regs { rcx: KERNEL_GS_BASE, rax: 0x789, ..Regs::default() };
    let before = cpu::tsc_ordered();
    vm.finish()?;
    let after = cpu::tsc_ordered();
    check!("index", memory::read::<u64>(at), KERNEL_GS_BASE);
    check!("stored MSR", memory::read::<u64>(at + 8), 0x789);
    let tsc = memory::read::<u64>(at + 24);
    if !(before..=after).contains(&tsc) {
        fail!("stored TSC: expected {before} to {after}, got {tsc}")
    }
    let _ = cpu::wrmsr(cpu::MSR_KERNEL_GS_BASE, 0);
    Ok(())
}

fn exit_load(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.set(EXIT_LOAD_ADDR, list(&[(KERNEL_GS_BASE, 0x4321), (cpu::MSR_LSTAR.into(), 0x8765)]))?;
    vm.set(EXIT_LOAD_COUNT, 2)?;
    vm.finish()?;
    check!("IA32_KERNEL_GS_BASE", cpu::msr(cpu::MSR_KERNEL_GS_BASE), 0x4321);
    check!("IA32_LSTAR", cpu::msr(cpu::MSR_LSTAR), 0x8765);
    let _ = cpu::wrmsr(cpu::MSR_KERNEL_GS_BASE, 0);
    let _ = cpu::wrmsr(cpu::MSR_LSTAR, 0);
    Ok(())
}

/// Stored first, then loaded: one page can keep L2's value and another L1's.
fn both_lists(ctx: &mut Ctx) -> Outcome {
    let mut vm = passing_msrs(ctx, code!["2: rdmsr", "inc eax", "wrmsr", "vmcall", "jmp 2b"])?;
    let l2 = list(&[(KERNEL_GS_BASE, 10)]);
    vm.set(ENTRY_LOAD_ADDR, l2)?;
    vm.set(ENTRY_LOAD_COUNT, 1)?;
    vm.set(EXIT_STORE_ADDR, l2)?;
    vm.set(EXIT_STORE_COUNT, 1)?;
    vm.set(EXIT_LOAD_ADDR, list(&[(KERNEL_GS_BASE, 77)]))?;
    vm.set(EXIT_LOAD_COUNT, 1)?;
    for round in 1..4 {
        vm.regs.rcx = KERNEL_GS_BASE;
        let e = vm.finish()?;
        vm.skip_instruction(&e)?;
        check!("the MSR of L2", memory::read::<u64>(l2 + 8), 10 + round);
        check!("the MSR of L1", cpu::msr(cpu::MSR_KERNEL_GS_BASE), 77);
    }
    let _ = cpu::wrmsr(cpu::MSR_KERNEL_GS_BASE, 0);
    Ok(())
}

/// Runs L2's reading of the TSC; the result is within what `from` gives for L1's before and after.
fn reads_tsc(vm: &mut Vm, from: impl Fn(u64) -> u64) -> Outcome {
    let before = cpu::tsc_ordered();
    vm.finish()?;
    let after = cpu::tsc_ordered();
    let got = vm.regs.rax & 0xffff_ffff | vm.regs.rdx << 32;
    let (low, high) = (from(before), from(after));
    // Modulo 2^64, as the counter runs.
    if got.wrapping_sub(low) > high.wrapping_sub(low) {
        fail!("TSC of L2: expected {low:#x} to {high:#x}, got {got:#x}")
    }
    Ok(())
}

fn tsc_offset(ctx: &mut Ctx) -> Outcome {
    for offset in [0_u64, 1 << 40, (1_u64 << 50).wrapping_neg(), 12345] {
        memory::reset();
        let mut vm = Vm::new(&ctx.caps, code!["rdtsc", "vmcall"])?;
        vm.need_primary(primary::TSC_OFFSET)?;
        vm.set(TSC_OFFSET, offset)?;
        reads_tsc(&mut vm, |t| t.wrapping_add(offset))?;
    }
    Ok(())
}

fn tsc_offset_rdmsr(ctx: &mut Ctx) -> Outcome {
    let mut vm = passing_msrs(ctx, code!["rdmsr", "vmcall"])?;
    vm.need_primary(primary::TSC_OFFSET)?;
    vm.set(TSC_OFFSET, 1 << 45)?;
    vm.regs.rcx = 0x10;
    reads_tsc(&mut vm, |t| t.wrapping_add(1 << 45))
}

fn tsc_offset_off(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["rdtsc", "vmcall"])?;
    vm.set(TSC_OFFSET, 1 << 45)?;
    reads_tsc(&mut vm, |t| t)
}

fn tsc_scaling(ctx: &mut Ctx) -> Outcome {
    for multiplier in [1_u64 << 48, 2 << 48, 1 << 47, 3 << 46] {
        memory::reset();
        let mut vm = Vm::new(&ctx.caps, code!["rdtsc", "vmcall"])?;
        vm.need_primary(primary::TSC_OFFSET)?;
        vm.need_secondary(secondary::TSC_SCALING)?;
        vm.set(TSC_OFFSET, 1000)?;
        vm.set(TSC_MULTIPLIER, multiplier)?;
        // Rounding in two steps may differ by one.
        reads_tsc(&mut vm, |t| (((u128::from(t) * u128::from(multiplier)) >> 48) as u64).wrapping_add(1000))?;
    }
    Ok(())
}

/// A machine whose L2 has a shadow VMCS.
fn shadowing(ctx: &Ctx, code: u64) -> Outcome<(Vm, u64, [u64; 2])> {
    let vm = Vm::new(&ctx.caps, code)?;
    vm.need_secondary(secondary::SHADOWING)?;
    let shadow = memory::page();
    memory::write(shadow, ctx.caps.revision() | 1 << 31);
    ok("VMCLEAR of the shadow VMCS", vmx::vmclear(shadow))?;
    ok("VMPTRLD of the shadow VMCS", vmx::vmptrld(shadow))?;
    vm.set(GUEST_RIP, 0x1111)?;
    vm.set(TSC_OFFSET, 0x2222_0000_3333)?;
    ok("VMCLEAR of the shadow VMCS", vmx::vmclear(shadow))?;
    vm.make_current()?;
    let bitmaps = [memory::page(), memory::page()];
    vm.set(VMREAD_BITMAP, bitmaps[0])?;
    vm.set(VMWRITE_BITMAP, bitmaps[1])?;
    vm.set(LINK, shadow)?;
    Ok((vm, shadow, bitmaps))
}

fn shadowing_read(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _, _) =
        shadowing(ctx, code!["vmread rax, rcx", "vmread rbx, rdx", "pushfq", "pop rsi", "vmcall"])?;
    vm.regs = Regs { rcx: GUEST_RIP.into(), rdx: TSC_OFFSET.into(), ..Regs::default() };
    vm.finish()?;
    check!("RIP of the shadow VMCS", vm.regs.rax, 0x1111);
    check!("TSC offset of the shadow VMCS", vm.regs.rbx, 0x2222_0000_3333_u64);
    check!("flags", vm.regs.rsi & 0x8d5, 0);
    Ok(())
}

fn shadowing_write(ctx: &mut Ctx) -> Outcome {
    let (mut vm, shadow, _) = shadowing(ctx, code!["vmwrite rcx, rax", "vmread rbx, rcx", "vmcall"])?;
    vm.regs = Regs { rcx: GUEST_RIP.into(), rax: 0x4444_5555_6666, ..Regs::default() };
    vm.finish()?;
    check!("what L2 read back", vm.regs.rbx, 0x4444_5555_6666_u64);
    ok("VMCLEAR of the shadow VMCS", vmx::vmclear(shadow))?;
    ok("VMPTRLD of the shadow VMCS", vmx::vmptrld(shadow))?;
    check!("the field", vm.get(GUEST_RIP)?, 0x4444_5555_6666_u64);
    ok("VMCLEAR of the shadow VMCS", vmx::vmclear(shadow))?;
    vm.make_current()
}

fn shadowing_bitmap(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _, [reads, writes]) =
        shadowing(ctx, code!["vmread rax, rcx", "vmwrite rcx, rax", "vmcall"])?;
    let bit = |page: u64| {
        let at = page + u64::from(GUEST_RIP >> 3);
        memory::write(at, 1_u8 << (GUEST_RIP & 7));
    };
    bit(reads);
    vm.regs = Regs { rcx: GUEST_RIP.into(), ..Regs::default() };
    let e = vm.expect(reason::VMREAD)?;
    check!("instruction information", e.instruction & 0xf000_0478, 1 << 10 | 1 << 28);
    vm.skip_instruction(&e)?;
    bit(writes);
    let e = vm.expect(reason::VMWRITE)?;
    vm.skip_instruction(&e)?;
    vm.finish()?;
    // Encodings beyond 15 bits exit whatever the bitmaps say.
    vm.set(GUEST_RIP, vm.code)?;
    vm.regs.rcx = 0x8000;
    vm.expect(reason::VMREAD)?;
    Ok(())
}

/// Without a link pointer L2 gets VMfailInvalid.
fn shadowing_no_link(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _, _) = shadowing(ctx, code!["vmread rax, rcx", "pushfq", "pop rsi", "vmcall"])?;
    vm.set(LINK, !0)?;
    vm.regs = Regs { rcx: GUEST_RIP.into(), ..Regs::default() };
    vm.finish()?;
    check!("flags", vm.regs.rsi & 0x8d5, 1);
    Ok(())
}

/// An operand of L2 where L1's machine has no memory.
fn shadowing_no_memory(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _, _) =
        shadowing(ctx, code!["vmread [rbx], rcx", "vmwrite rcx, [rbx]", "vmread rax, rcx", "vmcall"])?;
    vm.regs = Regs { rcx: GUEST_RIP.into(), rbx: 0x8000_0000, ..Regs::default() };
    vm.finish()?;
    check!("what L2 read back", vm.regs.rax, u64::MAX);
    Ok(())
}

/// A shadow VMCS can't be launched.
fn shadowing_launch(ctx: &mut Ctx) -> Outcome {
    if !ctx.caps.secondary.can(secondary::SHADOWING) {
        return skip("control not offered");
    }
    let (mut vm, shadow, _) = shadowing(ctx, code!["vmcall"])?;
    ok("VMPTRLD of the shadow VMCS", vmx::vmptrld(shadow))?;
    match vm.enter() {
        Err(vmx::VmxError::Invalid) => {}
        got => fail!("VMLAUNCH of a shadow VMCS: expected VMfailInvalid, got {got:x?}"),
    }
    let _ = vmx::vmclear(shadow);
    vm.make_current()
}
