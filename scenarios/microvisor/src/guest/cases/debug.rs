//! Debug exceptions of L2 by DR0 to DR3, which L1 and L2 share, and DR7, which the VMCS holds (SDM Vol. 3B ch. 18,
//! Vol. 3C §28.2.1, §28.3.4): exit qualification, pending debug exceptions, RF.

use core::arch::asm;

use crate::guest::fields::*;
use crate::guest::memory;
use crate::guest::suite::{Ctx, Outcome, check};
use crate::guest::vm::{Exit, Vm, code};

super::cases! { true;
    "debug.data.write" "Vol. 3C 28.2.1" data_write;
    "debug.data.read" "Vol. 3C 28.2.1" data_read;
    "debug.data.two" "Vol. 3C 28.2.1" data_two;
    "debug.data.not_enabled" "Vol. 3B 18.2.4" not_enabled;
    "debug.instruction" "Vol. 3B 18.3.1.1" instruction;
    "debug.single_step_and_data" "Vol. 3C 28.2.1" step_and_data;
    "debug.general_detect" "Vol. 3B 18.3.1.3" general_detect;
    "debug.io" "Vol. 3B 18.3.1.2" io;
    "debug.delivered" "Vol. 3B 18.2.3" delivered;
    "debug.pending.mov_ss" "Vol. 3C 28.3.4" pending_mov_ss;
    "debug.pending.none" "Vol. 3C 28.3.4" pending_none;
}

const B0: u64 = 1;
const B1: u64 = 2;
const B2: u64 = 4;
const B3: u64 = 8;
const BD: u64 = 1 << 13;
const BS: u64 = 1 << 14;
/// Pending debug exceptions: an enabled breakpoint.
const ENABLED: u64 = 1 << 12;

/// DR0 to DR3, zeroed again in the end.
struct Addresses;

impl Addresses {
    fn set(at: [u64; 4]) -> Self {
        unsafe {
            asm!("mov dr0, {}", "mov dr1, {}", "mov dr2, {}", "mov dr3, {}",
                in(reg) at[0], in(reg) at[1], in(reg) at[2], in(reg) at[3]);
        }
        Self
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        unsafe { asm!("mov dr0, {z}", "mov dr1, {z}", "mov dr2, {z}", "mov dr3, {z}", z = in(reg) 0_u64) };
    }
}

/// Breakpoint `n` enabled in DR7, with its condition (0 execution, 1 writes, 2 I/O, 3 reads and writes) and length
/// field.
const fn enable(n: u32, condition: u64, length: u64) -> u64 {
    1 << (2 * n) | (condition | length << 2) << (16 + 4 * n)
}

/// A machine with this DR7 that exits for #DB, and has RBX at its data.
fn machine(ctx: &Ctx, code: u64, dr7: u64) -> Outcome<Vm> {
    memory::reset();
    let mut vm = Vm::new(&ctx.caps, code)?;
    vm.need_entry(entry::LOAD_DEBUG)?;
    vm.set(GUEST_DR7, 0x400 | dr7)?;
    vm.set(EXCEPTIONS, 2)?;
    vm.regs.rbx = vm.data;
    Ok(vm)
}

fn expect_db(vm: &mut Vm, qualification: u64, offset: u64) -> Outcome<Exit> {
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("interruption information", e.info, 0x8000_0301_u32);
    check!("qualification", e.qualification, qualification);
    check!("RIP - code", e.rip.wrapping_sub(vm.code), offset);
    // The exit reports what DR6 would have got, and nothing stays pending.
    check!("pending debug exceptions", vm.get(PENDING_DEBUG)?, 0);
    Ok(e)
}

/// A trap behind the write; a read of the same bytes does not hit.
fn data_write(ctx: &mut Ctx) -> Outcome {
    let l2 = code!["mov eax, [rbx + 8]", "mov [rbx + 11], al", "nop", "vmcall"];
    let mut vm = machine(ctx, l2, enable(1, 1, 3))?;
    let _dr = Addresses::set([0, vm.data + 8, 0, 0]);
    expect_db(&mut vm, B1, 6)?;
    vm.finish()?;
    Ok(())
}

fn data_read(ctx: &mut Ctx) -> Outcome {
    let l2 = code!["mov al, [rbx + 1]", "mov ax, [rbx + 3]", "nop", "vmcall"];
    let mut vm = machine(ctx, l2, enable(2, 3, 3))?;
    let _dr = Addresses::set([0, 0, vm.data + 4, 0]);
    expect_db(&mut vm, B2, 7)?;
    Ok(())
}

/// One access that meets two breakpoints.
fn data_two(ctx: &mut Ctx) -> Outcome {
    let dr7 = enable(0, 1, 2) | enable(3, 3, 0);
    let mut vm = machine(ctx, code!["mov [rbx], rax", "nop", "vmcall"], dr7)?;
    let _dr = Addresses::set([vm.data, 0, 0, vm.data + 7]);
    expect_db(&mut vm, B0 | B3, 3)?;
    Ok(())
}

fn not_enabled(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["mov [rbx], rax", "nop", "vmcall"], enable(0, 1, 2) & !1)?;
    let _dr = Addresses::set([vm.data, 0, 0, 0]);
    vm.finish()?;
    Ok(())
}

/// A fault before the instruction, whose saved RFLAGS has no RF; with RF, L2 goes on.
fn instruction(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["nop", "nop", "vmcall"], enable(0, 0, 0))?;
    let _dr = Addresses::set([vm.code + 1, 0, 0, 0]);
    expect_db(&mut vm, B0, 1)?;
    check!("RF", vm.get(GUEST_RFLAGS)? >> 16 & 1, 0);
    vm.set(GUEST_RFLAGS, 0x1_0002)?;
    vm.finish()?;
    Ok(())
}

fn step_and_data(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["mov [rbx], eax", "nop", "vmcall"], enable(0, 1, 3))?;
    let _dr = Addresses::set([vm.data, 0, 0, 0]);
    vm.set(GUEST_RFLAGS, 0x102)?;
    expect_db(&mut vm, BS | B0, 2)?;
    Ok(())
}

/// DR7.GD: access to a debug register is a fault. An exit does not deliver it, so that GD stays (§28.1).
fn general_detect(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["mov rax, dr6", "vmcall"], 1 << 13)?;
    vm.need_exit(exit::SAVE_DEBUG)?;
    expect_db(&mut vm, BD, 0)?;
    check!("GD", vm.get(GUEST_DR7)? >> 13 & 1, 1);
    Ok(())
}

fn io(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["in al, 0x80", "nop", "vmcall"], enable(1, 2, 0))?;
    vm.need_primary(primary::IO_BITMAPS)?;
    vm.set(IO_A, memory::page())?;
    vm.set(IO_B, memory::page())?;
    vm.set(GUEST_CR4, vm.get(GUEST_CR4)? | 8)?;
    let _dr = Addresses::set([0, 0x80, 0, 0]);
    expect_db(&mut vm, B1, 2)?;
    Ok(())
}

/// Without the bitmap's bit L2's own handler sees DR6.
fn delivered(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["mov [rbx], al", "nop", "vmcall"], enable(2, 1, 0))?;
    vm.set(EXCEPTIONS, 0)?;
    let _dr = Addresses::set([0, 0, vm.data, 0]);
    unsafe { asm!("mov dr6, {}", in(reg) 0xffff_0ff0_u64) };
    let event = vm.expect_event(1)?;
    check!("RIP - code", event.rip - vm.code, 2);
    let dr6: u64;
    unsafe { asm!("mov {}, dr6", "mov dr6, {z}", out(reg) dr6, z = in(reg) 0xffff_0ff0_u64) };
    check!("DR6", dr6, 0xffff_0ff4_u64);
    Ok(())
}

/// A hit by MOV SS waits; an exit by the next instruction finds it pending, and an entry delivers it.
fn pending_mov_ss(ctx: &mut Ctx) -> Outcome {
    let l2 = code!["mov ss, [rbx]", "cpuid", "nop", "vmcall"];
    let mut vm = machine(ctx, l2, enable(0, 3, 1))?;
    memory::write(vm.data, 0x10_u16);
    let _dr = Addresses::set([vm.data, 0, 0, 0]);
    let e = vm.expect(reason::CPUID)?;
    check!("interruptibility", vm.get(INTERRUPTIBILITY)?, 2);
    check!("pending debug exceptions", vm.get(PENDING_DEBUG)?, ENABLED | B0);
    vm.set(INTERRUPTIBILITY, 0)?;
    vm.skip_instruction(&e)?;
    expect_db(&mut vm, B0, 4)?;
    Ok(())
}

/// Without a hit, an exit finds nothing pending.
fn pending_none(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx, code!["nop", "cpuid", "vmcall"], 0)?;
    vm.expect(reason::CPUID)?;
    check!("pending debug exceptions", vm.get(PENDING_DEBUG)?, 0);
    Ok(())
}
