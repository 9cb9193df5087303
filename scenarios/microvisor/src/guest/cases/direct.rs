//! The enlightened VMCS (Hyper-V Top-Level Functional Specification, "Nested Virtualization").

use super::cases;
use crate::guest::fields::*;
use crate::guest::suite::{Ctx, Outcome, Stop, check, fail, skip};
use crate::guest::vm::{Vm, code, ok};
use crate::guest::vmx::{self, VmxError};
use crate::guest::{evmcs, memory};

cases! { true;
    "direct.clean_fields" "TLFS Clean Fields" clean_fields;
    "direct.exit_cleans" "TLFS Clean Fields" exit_cleans;
    "direct.vmlaunch_reads_all" "TLFS Clean Fields" vmlaunch_reads_all;
    "direct.two" "TLFS Clean Fields" two;
    "direct.vmclear" "TLFS VMCLEAR" vmclear;
    "direct.version" "TLFS Enlightened VMCS Versioning" version;
    "direct.pointer" "TLFS Enlightened VMCS" pointer;
    "direct.no_vmread" "TLFS Enlightened VMCS" no_vmread;
    "direct.beside_ordinary" "TLFS Enlightened VMCS" beside_ordinary;
    "direct.instruction_error" "TLFS Enlightened VMCS" instruction_error;
}

/// A machine whose L2 does nothing but VMCALL, again and again.
fn machine(ctx: &Ctx) -> Result<Vm, Stop> {
    if !evmcs::wanted() {
        return skip("no enlightened VMCS is offered");
    }
    Vm::new(&ctx.caps, code!["2: vmcall", "jmp 2b"])
}

fn clean(vm: &Vm) -> u32 {
    memory::read(vm.vmcs + evmcs::CLEAN_FIELDS)
}

/// Has RDTSC exit, which the primary controls say, without marking their group as changed.
fn poke_primary(vm: &Vm, bits: u32) -> Outcome {
    let before = clean(vm);
    vm.or(PRIMARY, bits)?;
    memory::write(vm.vmcs + evmcs::CLEAN_FIELDS, before);
    Ok(())
}

/// An L2 at its first instruction, RDTSC, which it has executed before without an exit. Its VMCS says now that RDTSC
/// exits, but not that this has changed.
fn poked(ctx: &mut Ctx) -> Outcome<(Vm, u64)> {
    let mut vm = machine(ctx)?;
    vm.set(GUEST_RIP, code!["2: rdtsc", "vmcall", "jmp 2b"])?;
    let start = vm.get(GUEST_RIP)?;
    vm.expect(reason::VMCALL)?;
    poke_primary(&vm, primary::RDTSC)?;
    vm.set(GUEST_RIP, start)?;
    Ok((vm, start))
}

/// What L1 marks as clean is not read again, until it is marked as changed.
fn clean_fields(ctx: &mut Ctx) -> Outcome {
    let (mut vm, start) = poked(ctx)?;
    vm.expect(reason::VMCALL)?;
    vm.set(PRIMARY, vm.get(PRIMARY)?)?;
    vm.set(GUEST_RIP, start)?;
    vm.expect(reason::RDTSC)?;
    Ok(())
}

fn exit_cleans(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx)?;
    check!("clean fields before", clean(&vm) & 0xffff, 0);
    vm.expect(reason::VMCALL)?;
    check!("clean fields after an exit", clean(&vm) & 0xffff, 0xffff);
    Ok(())
}

fn vmlaunch_reads_all(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _) = poked(ctx)?;
    vm.launched = false;
    vm.expect(reason::RDTSC)?;
    Ok(())
}

/// Each has its own state, and nothing of one is taken for the other's.
fn two(ctx: &mut Ctx) -> Outcome {
    let mut a = machine(ctx)?;
    a.set(GUEST_RIP, code!["mov eax, 1", "vmcall", "mov eax, 2", "vmcall"])?;
    a.expect(reason::VMCALL)?;
    let mut b = machine(ctx)?;
    b.set(GUEST_RIP, code!["mov eax, 3", "vmcall", "mov eax, 4", "vmcall"])?;
    b.expect(reason::VMCALL)?;
    check!("RAX of the second", b.regs.rax, 3);
    for (vm, rax) in [(&mut a, 2), (&mut b, 4)] {
        vm.make_current()?;
        vm.set(GUEST_RIP, vm.get(GUEST_RIP)? + 3)?;
        vm.expect(reason::VMCALL)?;
        check!("RAX after the switch", vm.regs.rax, rax);
    }
    Ok(())
}

/// VMCLEAR leaves the content, and what was clean is read again.
fn vmclear(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _) = poked(ctx)?;
    let before: [u64; 128] = memory::read(vm.vmcs);
    ok("VMCLEAR", vmx::vmclear(vm.vmcs))?;
    if memory::read::<[u64; 128]>(vm.vmcs) != before {
        fail!("VMCLEAR changed the enlightened VMCS")
    }
    vm.expect(reason::RDTSC)?;
    Ok(())
}

fn entry_fails(vm: &mut Vm, what: &'static str) -> Outcome {
    match vm.enter() {
        Err(VmxError::Invalid) => Ok(()),
        Err(e) => fail!("{what}: expected VMfailInvalid, got {e:x?}"),
        Ok(e) => fail!("{what}: expected VMfailInvalid, got exit reason {:#x}", e.reason),
    }
}

fn version(ctx: &mut Ctx) -> Outcome {
    for version in [0_u32, 2, 0xffff_ffff] {
        let mut vm = machine(ctx)?;
        memory::write(vm.vmcs, version);
        entry_fails(&mut vm, "another version")?;
    }
    Ok(())
}

fn pointer(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx)?;
    vm.expect(reason::VMCALL)?;
    let beyond = ctx.caps.beyond();
    for at in [vm.vmcs + 64, beyond, beyond - 4096, ctx.vmxon] {
        evmcs::point_at(at);
        entry_fails(&mut vm, "an impossible address")?;
    }
    evmcs::select(vm.vmcs);
    vm.expect(reason::VMCALL)?;
    Ok(())
}

fn no_vmread(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx)?;
    vm.expect(reason::VMCALL)?;
    for got in [vmx::vmread64(GUEST_RIP.into()).map(|_| ()), vmx::vmwrite64(GUEST_RIP.into(), 0)] {
        if got != Err(VmxError::Invalid) {
            fail!("VMREAD or VMWRITE: expected VMfailInvalid, got {got:x?}")
        }
    }
    check!("VMPTRST", ok("VMPTRST", vmx::vmptrst())?, !0_u64);
    Ok(())
}

/// An ordinary VMCS works beside it, once the assist page says so.
fn beside_ordinary(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx)?;
    vm.expect(reason::VMCALL)?;
    evmcs::want(false);
    let mut ordinary = Vm::new(&ctx.caps, code!["cpuid"])?;
    ordinary.expect(reason::CPUID)?;
    check!("VMPTRST", ok("VMPTRST", vmx::vmptrst())?, ordinary.vmcs);
    evmcs::want(true);
    vm.make_current()?;
    vm.expect(reason::VMCALL)?;
    check!("VMPTRST", ok("VMPTRST", vmx::vmptrst())?, !0_u64);
    Ok(())
}

fn instruction_error(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx)?;
    vm.set(HOST_CR0, 0)?;
    match vm.enter() {
        Err(VmxError::Valid(8)) => {}
        Err(e) => fail!("expected VMfailValid(8), got {e:x?}"),
        Ok(e) => fail!("expected VMfailValid(8), got exit reason {:#x}", e.reason),
    }
    check!("VM-instruction error", vm.get(VM_ERROR)?, 8);
    Ok(())
}
