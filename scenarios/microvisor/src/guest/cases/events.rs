//! Events: exceptions, interrupts and NMIs that exit, windows, injection, vectoring information, the
//! monitor trap flag and the preemption timer (SDM Vol. 3C §26.2, §26.5, §27.6, §27.7, §28.2).

use super::checks::Op::{self, *};
use super::checks::apply;
use crate::guest::fields::*;
use crate::guest::suite::{Ctx, Outcome, check, fail, skip};
use crate::guest::vm::{Vm, code};
use crate::guest::{cpu, memory, trap};

super::cases! { true;
    "event.exception.ud" "Vol. 3C 28.2.2" exception_ud;
    "event.exception.bp" "Vol. 3C 28.2.2" exception_bp;
    "event.exception.int1" "Vol. 3C 28.2.2" exception_int1;
    "event.exception.gp" "Vol. 3C 28.2.2" exception_gp;
    "event.exception.gp_emulated" "Vol. 3C 26.2" exception_gp_emulated;
    "event.exception.de" "Vol. 3C 28.2.2" exception_de;
    "event.exception.nm" "Vol. 3C 28.2.2" exception_nm;
    "event.exception.db_trap" "Vol. 3C 28.2.1" exception_single_step;
    "event.exception.pf" "Vol. 3C 28.2.1" exception_pf;
    "event.exception.pf_mask_match" "Vol. 3C 26.2" pf_mask_match;
    "event.exception.int_n_no_exit" "Vol. 3C 26.2" int_n;
    "event.exception.not_in_bitmap" "Vol. 3C 26.2" exception_passes;
    "event.external.exit" "Vol. 3C 26.2" external_exit;
    "event.external.acknowledge" "Vol. 3C 28.2.2" external_acknowledge;
    "event.external.masked_by_l2" "Vol. 3C 26.2" external_masked;
    "event.external.not_exiting" "Vol. 3C 26.2" external_delivered;
    "event.external.wakes_hlt" "Vol. 3C 26.2" external_hlt;
    "event.interrupt_window" "Vol. 3C 26.2" interrupt_window;
    "event.interrupt_window.sti" "Vol. 3C 26.2" interrupt_window_sti;
    "event.interrupt_window.at_entry" "Vol. 3C 27.7.5" interrupt_window_at_entry;
    "event.interrupt_window.mov_ss" "Vol. 3C 26.2" interrupt_window_mov_ss;
    "event.nmi.exit" "Vol. 3C 26.2" nmi_exit;
    "event.nmi_window" "Vol. 3C 26.2" nmi_window;
    "event.nmi_window.blocked" "Vol. 3C 26.2" nmi_window_blocked;
    "event.nmi.unblocking_by_iret" "Vol. 3C 26.3" nmi_iret;
    "event.mtf" "Vol. 3C 26.5.2" mtf;
    "event.mtf.injection" "Vol. 3C 27.7.8" mtf_injection;
    "event.mtf.pending" "Vol. 3C 27.7.8" mtf_pending;
    "event.mtf.off" "Vol. 3C 26.5.2" mtf_off;
    "event.mtf.exception" "Vol. 3C 26.5.2" mtf_exception;
    "event.mtf.exit_wins" "Vol. 3C 26.5.2" mtf_exit_wins;
    "event.mtf.port" "Vol. 3C 26.5.2" mtf_port;
    "event.timer.zero" "Vol. 3C 27.7.4" timer_zero;
    "event.timer.rate" "Vol. 3C 26.5.1" timer_rate;
    "event.timer.saved" "Vol. 3C 28.3.3" timer_saved;
    "event.timer.hlt" "Vol. 3C 26.5.1" timer_hlt;
    "event.timer.off" "Vol. 3C 26.5.1" timer_off;
    "event.timer.injection" "Vol. 3C 27.7.4" timer_injection;
    "event.timer.again" "Vol. 3C 26.5.1" timer_again;
    "event.inject.external" "Vol. 3C 27.6.1" inject_external;
    "event.inject.nmi" "Vol. 3C 27.6.1" inject_nmi;
    "event.inject.exception" "Vol. 3C 27.6.1" inject_exception;
    "event.inject.exception_with_code" "Vol. 3C 27.6.1" inject_code;
    "event.inject.page_fault" "Vol. 3C 27.6.1" inject_pf;
    "event.inject.software_interrupt" "Vol. 3C 27.6.1" inject_software;
    "event.inject.software_exception" "Vol. 3C 27.6.1" inject_software_exception;
    "event.inject.privileged_software_exception" "Vol. 3C 27.6.1" inject_icebp;
    "event.inject.software_dpl" "Vol. 3C 27.6.1.1" inject_software_dpl;
    "event.inject.bitmap_ignored" "Vol. 3C 27.6" inject_bitmap_ignored;
    "event.inject.user" "Vol. 3C 27.6.1" inject_user;
    "event.inject.real_mode" "Vol. 3C 27.6.1" inject_real;
    "event.inject.wakes_hlt" "Vol. 3C 27.7.2" inject_hlt;
    "event.inject.hlt_stays" "Vol. 3C 27.7.2" hlt_stays;
    "event.inject.resume_flag" "Vol. 3C 27.6.1.1" inject_rf;
    "event.vectoring.exception" "Vol. 3C 28.2.4" vectoring_exception;
    "event.vectoring.injected" "Vol. 3C 28.2.4" vectoring_injected;
    "event.vectoring.software" "Vol. 3C 28.2.4" vectoring_software;
    "event.vectoring.ept" "Vol. 3C 28.2.4" vectoring_ept;
    "event.vectoring.ept_interrupt" "Vol. 3C 28.2.4" vectoring_ept_interrupt;
    "event.vectoring.ept_exception" "Vol. 3C 28.2.4" vectoring_ept_exception;
    "event.vectoring.ept_nmi" "Vol. 3C 28.2.4" vectoring_ept_nmi;
    "event.vectoring.double_fault" "Vol. 3C 28.2.4" vectoring_double;
    "event.vectoring.none" "Vol. 3C 28.2.4" vectoring_none;
    "event.pending_debug.delivered" "Vol. 3C 27.7.3" pending_debug;
    "event.blocking.mov_ss_saved" "Vol. 3C 28.3.4" mov_ss_saved;
    "event.blocking.sti_saved" "Vol. 3C 28.3.4" sti_saved;
    "event.activity.hlt_saved" "Vol. 3C 28.3.4" hlt_saved;
    "event.activity.shutdown" "Vol. 3C 27.7.2" shutdown;
    "event.init" "Vol. 3C 26.2" init;
    "event.init.blocked_in_root" "Vol. 3C 24.8" init_blocked;
    "event.sipi" "Vol. 3C 26.2" sipi;
    "event.sipi.discarded" "Vol. 3C 26.2" sipi_discarded;
}

fn bitmap_exit(ctx: &Ctx, code: u64, vector: u32, ops: &[Op]) -> Outcome<(Vm, crate::guest::vm::Exit)> {
    let mut vm = Vm::new(&ctx.caps, code)?;
    vm.set(EXCEPTIONS, 1 << vector)?;
    apply(&mut vm, ops)?;
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("RIP - code", e.rip.wrapping_sub(code), 0);
    check!("IDT-vectoring information", e.idt_info >> 31, 0);
    Ok((vm, e))
}

fn exception_ud(ctx: &mut Ctx) -> Outcome {
    let (_, e) = bitmap_exit(ctx, code!["ud2"], 6, &[])?;
    check!("interruption information", e.info, 0x8000_0306_u32);
    check!("qualification", e.qualification, 0);
    Ok(())
}

fn exception_bp(ctx: &mut Ctx) -> Outcome {
    let (_, e) = bitmap_exit(ctx, code!["int3", "vmcall"], 3, &[])?;
    check!("interruption information", e.info, 0x8000_0603_u32);
    check!("instruction length", e.len, 1);
    Ok(())
}

fn exception_int1(ctx: &mut Ctx) -> Outcome {
    let (_, e) = bitmap_exit(ctx, code![".byte 0xf1", "vmcall"], 1, &[])?;
    check!("interruption information", e.info, 0x8000_0501_u32);
    check!("instruction length", e.len, 1);
    Ok(())
}

fn exception_gp(ctx: &mut Ctx) -> Outcome {
    // A non-canonical address.
    let mut vm = Vm::new(&ctx.caps, code!["mov al, [rbx]", "vmcall"])?;
    vm.set(EXCEPTIONS, 1 << 13)?;
    vm.regs.rbx = 1 << 63;
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("interruption information", e.info, 0x8000_0b0d_u32);
    check!("error code", e.code, 0);
    check!("RIP - code", e.rip - vm.code, 0);
    let mut vm = Vm::new(&ctx.caps, code!["mov ds, ecx", "vmcall"])?;
    vm.set(EXCEPTIONS, 1 << 13)?;
    vm.regs.rcx = 0x7ffb;
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("interruption information", e.info, 0x8000_0b0d_u32);
    check!("error code with a selector", e.code, 0x7ff8);
    check!("resume flag saved", vm.get(GUEST_RFLAGS)? >> 16 & 1, 1);
    Ok(())
}

/// #GP of instructions that L0 may have to emulate: it exits by L1's bitmap like any other.
fn exception_gp_emulated(ctx: &mut Ctx) -> Outcome {
    for (what, code) in [
        ("MOV to CR0 clearing NE", code!["mov rax, cr0", "btr rax, 5", "mov cr0, rax"]),
        ("MOV to CR4 clearing VMXE", code!["mov rax, cr4", "btr rax, 13", "mov cr4, rax"]),
        ("RDMSR of no MSR", code!["mov ecx, 0x1234", "rdmsr"]),
        ("WRMSR of a wrong value", code!["mov ecx, 0xc0000102", "mov edx, 1 << 31", "wrmsr"]),
    ] {
        memory::reset();
        let mut vm = Vm::new(&ctx.caps, code)?;
        vm.need_primary(primary::MSR_BITMAPS)?;
        vm.set(MSR_BITMAP, memory::page())?;
        vm.set(EXCEPTIONS, 1 << 13)?;
        let e = vm.run()?;
        check!(format_args!("{what}: exit reason"), e.reason, reason::EXCEPTION_NMI);
        check!(format_args!("{what}: interruption information"), e.info, 0x8000_0b0d_u32);
        check!(format_args!("{what}: error code"), e.code, 0);
    }
    Ok(())
}

fn exception_de(ctx: &mut Ctx) -> Outcome {
    let (_, e) = bitmap_exit(ctx, code!["div cl"], 0, &[])?;
    check!("interruption information", e.info, 0x8000_0300_u32);
    Ok(())
}

fn exception_nm(ctx: &mut Ctx) -> Outcome {
    let (_, e) = bitmap_exit(ctx, code!["fnop"], 7, &[Or(GUEST_CR0, 8)])?;
    check!("interruption information", e.info, 0x8000_0307_u32);
    Ok(())
}

/// A single step is a trap: the qualification has what DR6 would get.
fn exception_single_step(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "nop", "vmcall"])?;
    vm.set(EXCEPTIONS, 1 << 1)?;
    vm.set(GUEST_RFLAGS, 0x102)?;
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("interruption information", e.info, 0x8000_0301_u32);
    check!("qualification (BS)", e.qualification, 0x4000);
    check!("RIP - code", e.rip - vm.code, 1);
    Ok(())
}

fn exception_pf(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov [rbx], al"])?;
    vm.set(EXCEPTIONS, 1 << 14)?;
    vm.regs.rbx = 5 << 30 | 0x123;
    let _ = cpu::set_cr2(0x77);
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("interruption information", e.info, 0x8000_0b0e_u32);
    check!("error code", e.code, 2);
    check!("qualification", e.qualification, 5_u64 << 30 | 0x123);
    check!("RIP - code", e.rip - vm.code, 0);
    // The exit comes before CR2 is written.
    check!("CR2", cpu::cr2(), 0x77);
    Ok(())
}

/// A page fault exits if (code AND mask = match) equals bit 14 of the bitmap.
fn pf_mask_match(ctx: &mut Ctx) -> Outcome {
    // Bitmap bit, mask, match, whether a write (error code 2) exits.
    for (bit, mask, matching, exits) in [
        (1_u64, 2, 2, true),
        (1, 2, 0, false),
        (0, 2, 0, true),
        (0, 2, 2, false),
        (1, 0, 1, false),
        (0, 0, 1, true),
        (1, 0, 0, true),
    ] {
        memory::reset();
        let mut vm = Vm::new(&ctx.caps, code!["mov [rbx], al"])?;
        vm.set(EXCEPTIONS, bit << 14)?;
        vm.set(PF_MASK, mask)?;
        vm.set(PF_MATCH, matching)?;
        vm.regs.rbx = 5 << 30;
        match exits {
            true => {
                vm.expect(reason::EXCEPTION_NMI)?;
            }
            false => {
                vm.expect_event(14)?;
            }
        }
    }
    Ok(())
}

/// INT n does not look at the bitmap.
fn int_n(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["int 6", "vmcall"])?;
    vm.set(EXCEPTIONS, 0xffff_ffff)?;
    let event = vm.expect_event(6)?;
    check!("return RIP - code", event.rip - vm.code, 2);
    Ok(())
}

fn exception_passes(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["ud2"])?;
    vm.set(EXCEPTIONS, !(1 << 6) & 0xffff_ffff)?;
    let event = vm.expect_event(6)?;
    check!("RIP - code", event.rip - vm.code, 0);
    Ok(())
}

fn external_exit(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["2: jmp 2b"])?;
    vm.need_pin(pin::EXTERNAL)?;
    let before = trap::interrupts(0x41);
    cpu::apic::send_self(0x41);
    let e = vm.expect(reason::EXTERNAL)?;
    check!("interruption information valid", e.info >> 31, 0);
    check!("RIP - code", e.rip - vm.code, 0);
    check!("still requested", cpu::apic::requested(0x41), true);
    cpu::interrupts_for_a_moment();
    check!("taken by L1", trap::interrupts(0x41), before + 1);
    Ok(())
}

fn external_acknowledge(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["2: jmp 2b"])?;
    vm.need_pin(pin::EXTERNAL)?;
    vm.need_exit(exit::ACK)?;
    cpu::apic::send_self(0x42);
    let e = vm.expect(reason::EXTERNAL)?;
    check!("interruption information", e.info, 0x8000_0042_u32);
    check!("in service", cpu::apic::in_service(0x42), true);
    check!("requested", cpu::apic::requested(0x42), false);
    cpu::apic::eoi();
    check!("in service after EOI", cpu::apic::in_service(0x42), false);
    Ok(())
}

/// With external-interrupt exiting, L2's RFLAGS.IF does not matter.
fn external_masked(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["cli", "2: jmp 2b"])?;
    vm.need_pin(pin::EXTERNAL)?;
    cpu::apic::send_self(0x43);
    vm.expect(reason::EXTERNAL)?;
    cpu::interrupts_for_a_moment();
    Ok(())
}

/// Without it, L2 takes the interrupt through its own IDT.
fn external_delivered(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["sti", "2: nop", "jmp 2b"])?;
    cpu::apic::send_self(0x44);
    vm.expect_event(0x44)?;
    check!("in service", cpu::apic::in_service(0x44), true);
    cpu::apic::eoi();
    Ok(())
}

fn external_hlt(ctx: &mut Ctx) -> Outcome {
    if ctx.caps.misc >> 6 & 1 == 0 {
        return skip("activity state not offered");
    }
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.need_pin(pin::EXTERNAL)?;
    vm.set(ACTIVITY, 1)?;
    cpu::apic::send_self(0x45);
    vm.expect(reason::EXTERNAL)?;
    check!("activity", vm.get(ACTIVITY)?, 1);
    cpu::interrupts_for_a_moment();
    Ok(())
}

fn interrupt_window(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "push 0x202", "popfq", "nop", "vmcall"])?;
    vm.need_primary(primary::INTERRUPT_WINDOW)?;
    let e = vm.expect(reason::INTERRUPT_WINDOW)?;
    check!("RIP - code", e.rip - vm.code, 7);
    check!("interruption information valid", e.info >> 31, 0);
    Ok(())
}

fn interrupt_window_sti(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["sti", "nop", "nop", "vmcall"])?;
    vm.need_primary(primary::INTERRUPT_WINDOW)?;
    let e = vm.expect(reason::INTERRUPT_WINDOW)?;
    check!("RIP - code", e.rip - vm.code, 2);
    Ok(())
}

fn interrupt_window_at_entry(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "vmcall"])?;
    vm.need_primary(primary::INTERRUPT_WINDOW)?;
    vm.set(GUEST_RFLAGS, 0x202)?;
    let e = vm.expect(reason::INTERRUPT_WINDOW)?;
    check!("RIP - code", e.rip - vm.code, 0);
    Ok(())
}

fn interrupt_window_mov_ss(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "nop", "vmcall"])?;
    vm.need_primary(primary::INTERRUPT_WINDOW)?;
    vm.set(GUEST_RFLAGS, 0x202)?;
    vm.set(INTERRUPTIBILITY, 2)?;
    let e = vm.expect(reason::INTERRUPT_WINDOW)?;
    check!("RIP - code", e.rip - vm.code, 1);
    check!("interruptibility", vm.get(INTERRUPTIBILITY)?, 0);
    Ok(())
}

fn nmi_exit(ctx: &mut Ctx) -> Outcome {
    // L2 sends the NMI: L1 would take it itself.
    let mut vm = Vm::new(&ctx.caps, code!["wrmsr", "2: jmp 2b"])?;
    vm.need_pin(pin::NMI)?;
    vm.need_primary(primary::MSR_BITMAPS)?;
    vm.set(MSR_BITMAP, memory::page())?;
    let before = trap::nmis();
    vm.regs.rcx = 0x830;
    vm.regs.rax = 4 << 8 | 1 << 14;
    vm.regs.rdx = cpu::msr(0x802);
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("interruption information", e.info, 0x8000_0202_u32);
    check!("NMIs that L1 took", trap::nmis(), before);
    // The exit blocks NMIs in L1; IRET unblocks.
    cpu::apic::send_self_nmi();
    for _ in 0..1000 {
        core::hint::spin_loop();
    }
    check!("NMIs while blocked", trap::nmis(), before);
    unsafe {
        core::arch::asm!(
            "mov {t}, rsp", "push 0x10", "push {t}", "pushfq", "push 8", "lea {t}, [rip + 66f]", "push {t}", "iretq", "66:",
            t = out(reg) _
        );
    }
    for _ in 0..1000 {
        core::hint::spin_loop();
    }
    check!("NMIs after IRET", trap::nmis(), before + 1);
    Ok(())
}

fn nmi_window(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "vmcall"])?;
    vm.need_pin(pin::NMI | pin::VIRTUAL_NMIS)?;
    vm.need_primary(primary::NMI_WINDOW)?;
    let e = vm.expect(reason::NMI_WINDOW)?;
    check!("RIP - code", e.rip - vm.code, 0);
    Ok(())
}

/// With virtual-NMI blocking, the window opens with IRET.
fn nmi_window_blocked(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(
        &ctx.caps,
        code![
            "nop",
            "mov rax, rsp",
            "push 0x10",
            "push rax",
            "push 2",
            "push 8",
            "lea rax, [rip + 2f]",
            "push rax",
            "iretq",
            "2: nop",
            "vmcall"
        ],
    )?;
    vm.need_pin(pin::NMI | pin::VIRTUAL_NMIS)?;
    vm.need_primary(primary::NMI_WINDOW)?;
    vm.set(INTERRUPTIBILITY, 8)?;
    let e = vm.expect(reason::NMI_WINDOW)?;
    check!("RIP behind IRET", memory::read::<u8>(e.rip), 0x90);
    if e.rip == vm.code {
        fail!("the window was open at entry although virtual NMIs were blocked")
    }
    check!("interruptibility", vm.get(INTERRUPTIBILITY)?, 0);
    Ok(())
}

/// An IRET of L2 that faults while NMIs are blocked: the exit says that it unblocked them.
fn nmi_iret(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov rsp, rbx", "iretq"])?;
    vm.need_pin(pin::NMI | pin::VIRTUAL_NMIS)?;
    vm.set(EXCEPTIONS, 1 << 14)?;
    vm.set(INTERRUPTIBILITY, 8)?;
    vm.regs.rbx = 5 << 30;
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("interruption information with NMI unblocking", e.info, 0x8000_1b0e_u32);
    Ok(())
}

fn mtf(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "mov eax, 5", "jmp 2f", "ud2", "2: rep stosb", "vmcall"])?;
    vm.need_primary(primary::MTF)?;
    vm.regs.rdi = vm.data;
    vm.regs.rcx = 2;
    for offset in [1, 6, 10] {
        let e = vm.expect(reason::MTF)?;
        check!("RIP - code", e.rip - vm.code, offset);
        check!("qualification", e.qualification, 0);
    }
    // Each iteration of a string instruction counts.
    let e = vm.expect(reason::MTF)?;
    check!("RIP - code in REP", e.rip - vm.code, 10);
    check!("RCX", vm.regs.rcx, 1);
    Ok(())
}

/// After an injected event, MTF exits before the handler's first instruction.
fn mtf_injection(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.need_primary(primary::MTF)?;
    vm.set(ENTRY_INFO, 0x8000_0306)?;
    vm.expect(reason::MTF)?;
    check!("stack", vm.get(GUEST_RSP)?, vm.stack + 4096 - 40);
    check!("pushed RIP", memory::read::<u64>(vm.stack + 4096 - 40), vm.code);
    Ok(())
}

/// Injecting "other event" 0 makes an MTF exit pending, whatever the control says.
fn mtf_pending(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "vmcall"])?;
    if !ctx.caps.primary.can(primary::MTF) {
        return skip("control not offered");
    }
    vm.set(ENTRY_INFO, 0x8000_0700)?;
    let e = vm.expect(reason::MTF)?;
    check!("RIP - code", e.rip - vm.code, 0);
    Ok(())
}

fn mtf_off(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "nop", "vmcall"])?;
    vm.need_primary(primary::MTF)?;
    vm.expect(reason::MTF)?;
    vm.and(PRIMARY, !primary::MTF)?;
    let e = vm.finish()?;
    check!("RIP - code", e.rip - vm.code, 2);
    Ok(())
}

/// After an instruction that faults, MTF exits behind the delivery, before the handler.
fn mtf_exception(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["ud2"])?;
    vm.need_primary(primary::MTF)?;
    let e = vm.expect(reason::MTF)?;
    check!("pushed RIP", memory::read::<u64>(vm.stack + 4096 - 40), vm.code);
    check!("interruption information", e.info >> 31, 0);
    check!("IDT-vectoring information", e.idt_info >> 31, 0);
    vm.and(PRIMARY, !primary::MTF)?;
    vm.expect_event(6)?;
    Ok(())
}

/// An instruction that exits leaves no MTF exit pending.
fn mtf_exit_wins(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["cpuid", "nop", "vmcall"])?;
    vm.need_primary(primary::MTF)?;
    let e = vm.expect(reason::CPUID)?;
    vm.skip_instruction(&e)?;
    let e = vm.expect(reason::MTF)?;
    check!("RIP - code", e.rip - vm.code, 3);
    Ok(())
}

/// A port that L1 gives to L2 takes one instruction like any other, whoever carries it out.
fn mtf_port(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["in al, 0x80", "nop", "vmcall"])?;
    vm.need_primary(primary::MTF | primary::IO_BITMAPS)?;
    vm.set(IO_A, memory::page())?;
    vm.set(IO_B, memory::page())?;
    for offset in [2, 3] {
        let e = vm.expect(reason::MTF)?;
        check!("RIP - code", e.rip - vm.code, offset);
    }
    Ok(())
}

fn timer_zero(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "vmcall"])?;
    vm.need_pin(pin::TIMER)?;
    vm.set(TIMER, 0)?;
    let e = vm.expect(reason::TIMER)?;
    check!("RIP - code", e.rip - vm.code, 0);
    check!("qualification", e.qualification, 0);
    Ok(())
}

/// The timer counts down once per 2^N TSC ticks, N from IA32_VMX_MISC.
fn timer_rate(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["2: jmp 2b"])?;
    vm.need_pin(pin::TIMER)?;
    let shift = ctx.caps.misc & 0x1f;
    let ticks = (20_000_000 >> shift).max(1);
    vm.set(TIMER, ticks)?;
    let start = cpu::tsc_ordered();
    vm.expect(reason::TIMER)?;
    let took = cpu::tsc_ordered() - start;
    // The count may start within a period of the TSC's bit N.
    if took < (ticks - 1) << shift {
        fail!("{ticks} ticks of 2^{shift} took {took} TSC cycles, which is too few")
    }
    if took > (ticks << shift) * 20 {
        fail!("{ticks} ticks of 2^{shift} took {took} TSC cycles, which is far too many")
    }
    Ok(())
}

fn timer_saved(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov ecx, 100000", "2: loop 2b", "vmcall"])?;
    vm.need_pin(pin::TIMER)?;
    vm.set(TIMER, 0xffff_0000)?;
    vm.finish()?;
    check!("timer without saving", vm.get(TIMER)?, 0xffff_0000_u64);
    vm.set(GUEST_RIP, vm.code)?;
    vm.need_exit(exit::SAVE_TIMER)?;
    let start = cpu::tsc_ordered();
    vm.finish()?;
    let took = cpu::tsc_ordered() - start;
    let counted = 0xffff_0000 - vm.get(TIMER)?;
    let most = (took >> (ctx.caps.misc & 0x1f)) + 1;
    if counted == 0 && most > 1000 || counted > most {
        fail!("the timer counted {counted} in at most {most}")
    }
    vm.set(GUEST_RIP, vm.code)?;
    vm.set(TIMER, 1)?;
    vm.expect(reason::TIMER)?;
    check!("timer after it expired", vm.get(TIMER)?, 0);
    Ok(())
}

fn timer_hlt(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["hlt", "vmcall"])?;
    vm.need_pin(pin::TIMER)?;
    // Time enough to come to the HLT on any host.
    vm.set(TIMER, 40_000_000 >> (ctx.caps.misc & 0x1f))?;
    let e = vm.expect(reason::TIMER)?;
    check!("activity", vm.get(ACTIVITY)?, 1);
    check!("RIP - code", e.rip - vm.code, 1);
    Ok(())
}

fn timer_off(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "vmcall"])?;
    if !ctx.caps.pin.can(pin::TIMER) {
        return skip("control not offered");
    }
    vm.set(TIMER, 0)?;
    vm.finish()?;
    Ok(())
}

/// The injected event comes first, the exit before its handler's first instruction.
fn timer_injection(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.need_pin(pin::TIMER)?;
    vm.set(TIMER, 0)?;
    vm.set(ENTRY_INFO, 0x8000_0306)?;
    let e = vm.expect(reason::TIMER)?;
    check!("IDT-vectoring information", e.idt_info >> 31, 0);
    check!("stack", vm.get(GUEST_RSP)?, vm.stack + 4096 - 40);
    check!("pushed RIP", memory::read::<u64>(vm.stack + 4096 - 40), vm.code);
    vm.and(PIN, !pin::TIMER)?;
    vm.expect_event(6)?;
    Ok(())
}

/// Without saving, each entry starts from the field's value again.
fn timer_again(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["2: jmp 2b"])?;
    vm.need_pin(pin::TIMER)?;
    vm.set(TIMER, 1)?;
    for _ in 0..3 {
        let e = vm.expect(reason::TIMER)?;
        check!("RIP - code", e.rip - vm.code, 0);
        check!("timer", vm.get(TIMER)?, 1);
    }
    Ok(())
}

/// Injects an event into a machine whose code is one NOP of 1 byte and more of them.
fn inject(ctx: &Ctx, info: u64, code: u64, len: u64, ops: &[Op]) -> Outcome<(Vm, trap::Record)> {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "nop", "nop", "nop", "vmcall"])?;
    vm.set(ENTRY_INFO, info)?;
    vm.set(ENTRY_CODE, code)?;
    vm.set(ENTRY_LEN, len)?;
    apply(&mut vm, ops)?;
    let event = vm.expect_event(info as u8)?;
    check!("error code", event.code, code);
    check!("CS", event.cs, vm.get(CS_SEL)?);
    // Back from the handler, L2 goes on.
    let e = vm.get(GUEST_RIP)?;
    vm.set(GUEST_RIP, e + 3)?;
    Ok((vm, event))
}

fn inject_external(ctx: &mut Ctx) -> Outcome {
    let (mut vm, event) = inject(ctx, 0x8000_0055, 0, 0, &[Set(GUEST_RFLAGS, 0x202)])?;
    check!("RIP - code", event.rip - vm.code, 0);
    check!("RFLAGS", event.rflags, 0x202);
    check!("IF in the handler", vm.get(GUEST_RFLAGS)? & 0x200, 0);
    let e = vm.finish()?;
    check!("RIP at the end - code", e.rip - vm.code, 4);
    check!("RFLAGS after IRET", vm.get(GUEST_RFLAGS)?, 0x202);
    Ok(())
}

fn inject_nmi(ctx: &mut Ctx) -> Outcome {
    let (mut vm, event) = inject(ctx, 0x8000_0202, 0, 0, &[])?;
    check!("RIP - code", event.rip - vm.code, 0);
    check!("blocking by NMI", vm.get(INTERRUPTIBILITY)? & 8, 8);
    vm.finish()?;
    check!("blocking by NMI after IRET", vm.get(INTERRUPTIBILITY)? & 8, 0);
    Ok(())
}

fn inject_exception(ctx: &mut Ctx) -> Outcome {
    for vector in [0, 6, 7, 16, 18, 19] {
        memory::reset();
        let (mut vm, event) = inject(ctx, 0x8000_0300 | vector, 0, 0, &[])?;
        check!("RIP - code", event.rip - vm.code, 0);
        vm.finish()?;
    }
    Ok(())
}

fn inject_code(ctx: &mut Ctx) -> Outcome {
    for vector in [8, 10, 11, 12, 13, 14, 17] {
        memory::reset();
        let code = if vector == 8 || vector == 17 { 0 } else { 0x1238 };
        let (mut vm, event) = inject(ctx, 0x8000_0b00 | vector, code, 0, &[])?;
        check!("RIP - code", event.rip - vm.code, 0);
        vm.finish()?;
    }
    Ok(())
}

/// Injecting #PF leaves CR2 alone.
fn inject_pf(ctx: &mut Ctx) -> Outcome {
    let _ = cpu::set_cr2(0x1234_5000);
    let (_, event) = inject(ctx, 0x8000_0b0e, 6, 0, &[])?;
    check!("CR2", event.cr2, 0x1234_5000);
    Ok(())
}

fn inject_software(ctx: &mut Ctx) -> Outcome {
    let (mut vm, event) = inject(ctx, 0x8000_0480, 0, 2, &[])?;
    check!("return RIP - code", event.rip - vm.code, 2);
    vm.finish()?;
    Ok(())
}

fn inject_software_exception(ctx: &mut Ctx) -> Outcome {
    let (vm, event) = inject(ctx, 0x8000_0603, 0, 1, &[])?;
    check!("#BP: return RIP - code", event.rip - vm.code, 1);
    memory::reset();
    let (vm, event) = inject(ctx, 0x8000_0604, 0, 3, &[])?;
    check!("#OF: return RIP - code", event.rip - vm.code, 3);
    Ok(())
}

fn inject_icebp(ctx: &mut Ctx) -> Outcome {
    let (vm, event) = inject(ctx, 0x8000_0501, 0, 1, &[])?;
    check!("return RIP - code", event.rip - vm.code, 1);
    Ok(())
}

/// A software interrupt above the gate's DPL is #GP(vector * 8 + 2); a privileged software exception and
/// hardware events don't look at it.
fn inject_software_dpl(ctx: &mut Ctx) -> Outcome {
    let user: &[Op] = &[Setup(|vm| vm.segments([0x23, 0x2b], 0xa0fb, 0xc0f3))];
    let mut vm = Vm::new(&ctx.caps, code!["nop", "nop", "vmcall"])?;
    apply(&mut vm, user)?;
    vm.set(ENTRY_INFO, 0x8000_0481)?;
    vm.set(ENTRY_LEN, 2)?;
    let event = vm.expect_event(13)?;
    check!("error code", event.code, 0x81 * 8 + 2);
    check!("RIP - code", event.rip - vm.code, 0);
    memory::reset();
    let mut vm = Vm::new(&ctx.caps, code!["nop", "nop", "vmcall"])?;
    apply(&mut vm, user)?;
    vm.set(ENTRY_INFO, 0x8000_0501)?;
    vm.set(ENTRY_LEN, 1)?;
    vm.expect_event(1)?;
    Ok(())
}

fn inject_bitmap_ignored(ctx: &mut Ctx) -> Outcome {
    inject(ctx, 0x8000_0306, 0, 0, &[Set(EXCEPTIONS, 0xffff_ffff)])?;
    memory::reset();
    inject(ctx, 0x8000_0b0e, 2, 0, &[Set(EXCEPTIONS, 0xffff_ffff)])?;
    Ok(())
}

fn inject_user(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.segments([0x23, 0x2b], 0xa0fb, 0xc0f3)?;
    vm.set(ENTRY_INFO, 0x8000_0b0d)?;
    vm.set(ENTRY_CODE, 0x20)?;
    let event = vm.expect_event(13)?;
    check!("pushed CS", event.cs, 0x23);
    check!("pushed RSP", event.rsp, vm.stack + 4096);
    check!("error code", event.code, 0x20);
    check!("CS of the handler", vm.get(CS_SEL)?, 8);
    vm.set(GUEST_RIP, vm.get(GUEST_RIP)? + 3)?;
    vm.finish()?;
    check!("CS after IRET", vm.get(CS_SEL)?, 0x23);
    Ok(())
}

/// In real-address mode events go through the interrupt vector table.
fn inject_real(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "nop", "nop", "vmcall"])?;
    vm.real_mode(0x8000, 16)?;
    let table = memory::page();
    vm.set(IDTR_BASE, table)?;
    // Vector 21H: 0800:0003, the VMCALL.
    memory::write(table + 4 * 0x21, 0x0800_0003_u32);
    vm.set(ENTRY_INFO, 0x8000_0421)?;
    vm.set(ENTRY_LEN, 2)?;
    let e = vm.expect(reason::VMCALL)?;
    check!("RIP", e.rip, 3);
    check!("RSP", vm.get(GUEST_RSP)?, 0x1000 - 6);
    check!("pushed IP", memory::read::<u16>(0x8000 + 0x1000 - 6), 2);
    check!("pushed CS", memory::read::<u16>(0x8000 + 0x1000 - 4), 0x800);
    Ok(())
}

fn inject_hlt(ctx: &mut Ctx) -> Outcome {
    if ctx.caps.misc >> 6 & 1 == 0 {
        return skip("activity state not offered");
    }
    let (mut vm, _) = inject(ctx, 0x8000_0056, 0, 0, &[Set(GUEST_RFLAGS, 0x202), Set(ACTIVITY, 1)])?;
    check!("activity", vm.get(ACTIVITY)?, 0);
    vm.finish()?;
    Ok(())
}

/// Without an event L2 stays in HLT.
fn hlt_stays(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.need_pin(pin::TIMER)?;
    vm.set(TIMER, 1_000_000 >> (ctx.caps.misc & 0x1f))?;
    vm.set(ACTIVITY, 1)?;
    let e = vm.expect(reason::TIMER)?;
    check!("RIP - code", e.rip - vm.code, 0);
    check!("activity", vm.get(ACTIVITY)?, 1);
    Ok(())
}

/// The RFLAGS that an injected fault pushes has RF as the VMCS has it.
fn inject_rf(ctx: &mut Ctx) -> Outcome {
    let (_, event) = inject(ctx, 0x8000_0306, 0, 0, &[Set(GUEST_RFLAGS, 0x1_0002)])?;
    check!("RF", event.rflags >> 16 & 1, 1);
    Ok(())
}

/// L2's #UD meets a gate that is not present: #NP exits, with #UD in the vectoring information.
fn vectoring_exception(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["ud2"])?;
    let idt = memory::page();
    memory::copy(idt, trap::l2_idt_base(), 4096);
    memory::write(idt + 16 * 6 + 5, 0x0e_u8);
    vm.set(IDTR_BASE, idt)?;
    vm.set(EXCEPTIONS, 1 << 11)?;
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("interruption information", e.info, 0x8000_0b0b_u32);
    check!("error code", e.code, 6 * 8 + 3);
    check!("IDT-vectoring information", e.idt_info, 0x8000_0306_u32);
    check!("RIP - code", e.rip - vm.code, 0);
    Ok(())
}

fn vectoring_injected(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop"])?;
    vm.set(IDTR_BASE, 5 << 30)?;
    vm.set(EXCEPTIONS, 1 << 14)?;
    vm.set(ENTRY_INFO, 0x8000_0b0d)?;
    vm.set(ENTRY_CODE, 0x48)?;
    let e = vm.run()?;
    // #PF while delivering #GP is #DF; the bitmap sees the #PF first.
    check!("exit reason", e.reason, reason::EXCEPTION_NMI);
    check!("interruption information", e.info & 0xff, 14);
    check!("IDT-vectoring information", e.idt_info, 0x8000_0b0d_u32);
    check!("IDT-vectoring error code", e.idt_code, 0x48);
    Ok(())
}

fn vectoring_software(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["int 0x80"])?;
    vm.set(IDTR_BASE, 5 << 30)?;
    vm.set(EXCEPTIONS, 1 << 14)?;
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("interruption information", e.info, 0x8000_0b0e_u32);
    check!("IDT-vectoring information", e.idt_info, 0x8000_0480_u32);
    check!("instruction length", e.len, 2);
    check!("RIP - code", e.rip - vm.code, 0);
    check!("qualification", e.qualification, (5_u64 << 30) + 16 * 0x80);
    Ok(())
}

/// An EPT violation while an event is delivered: the event is in the vectoring information, and
/// injecting it again delivers it.
fn vectoring_ept(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["int 0x80", "vmcall"])?;
    let ept = vm.need_ept()?;
    let stack = vm.stack;
    ept.map(stack, 0, 0);
    let e = vm.expect(reason::EPT_VIOLATION)?;
    check!("guest-physical address", e.physical & !0xfff, stack);
    check!("IDT-vectoring information", e.idt_info, 0x8000_0480_u32);
    check!("instruction length", e.len, 2);
    check!("write", e.qualification & 7, 2);
    ept.map(stack, stack, 7 | 6 << 3);
    let _ = crate::guest::vmx::invept(2, 0);
    vm.set(ENTRY_INFO, e.idt_info.into())?;
    vm.set(ENTRY_LEN, e.len.into())?;
    let event = vm.expect_event(0x80)?;
    check!("return RIP - code", event.rip - vm.code, 2);
    Ok(())
}

/// Injects an event whose frame meets a page that EPT does not map; it is delivered at the second attempt.
fn vectoring_ept_event(ctx: &Ctx, info: u32, code: u32, error: u64) -> Outcome<Vm> {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "nop", "vmcall"])?;
    let ept = vm.need_ept()?;
    let stack = vm.stack;
    ept.map(stack, 0, 0);
    vm.set(GUEST_RFLAGS, 0x202)?;
    vm.set(ENTRY_INFO, info.into())?;
    vm.set(ENTRY_CODE, error)?;
    let e = vm.expect(reason::EPT_VIOLATION)?;
    check!("IDT-vectoring information", e.idt_info, info);
    check!("IDT-vectoring error code", e.idt_code & code, error);
    check!("interruption information", e.info >> 31, 0);
    check!("RIP - code", e.rip - vm.code, 0);
    check!("RSP", vm.get(GUEST_RSP)?, stack + 4096);
    ept.map(stack, stack, 7 | 6 << 3);
    let _ = crate::guest::vmx::invept(2, 0);
    Ok(vm)
}

fn vectoring_ept_interrupt(ctx: &mut Ctx) -> Outcome {
    let mut vm = vectoring_ept_event(ctx, 0x8000_0057, 0, 0)?;
    vm.set(ENTRY_INFO, vm.get(IDT_INFO)?)?;
    vm.expect_event(0x57)?;
    Ok(())
}

fn vectoring_ept_exception(ctx: &mut Ctx) -> Outcome {
    let mut vm = vectoring_ept_event(ctx, 0x8000_0b0d, !0, 0x18)?;
    vm.set(ENTRY_INFO, vm.get(IDT_INFO)?)?;
    vm.set(ENTRY_CODE, vm.get(IDT_CODE)?)?;
    let event = vm.expect_event(13)?;
    check!("error code", event.code, 0x18);
    Ok(())
}

/// §28.3.4: an NMI whose delivery was interrupted has not been delivered, but blocks NMIs; injecting it again needs
/// that undone.
fn vectoring_ept_nmi(ctx: &mut Ctx) -> Outcome {
    let mut vm = vectoring_ept_event(ctx, 0x8000_0202, 0, 0)?;
    check!("blocking by NMI", vm.get(INTERRUPTIBILITY)? & 8, 8);
    vm.set(INTERRUPTIBILITY, 0)?;
    vm.set(ENTRY_INFO, vm.get(IDT_INFO)?)?;
    vm.expect_event(2)?;
    check!("blocking by NMI in the handler", vm.get(INTERRUPTIBILITY)? & 8, 8);
    Ok(())
}

fn vectoring_double(ctx: &mut Ctx) -> Outcome {
    // #GP whose gate is not present gives #NP: two contributory exceptions are #DF.
    let mut vm = Vm::new(&ctx.caps, code!["mov ds, ecx"])?;
    vm.regs.rcx = 0x7ff8;
    let idt = memory::page();
    memory::copy(idt, trap::l2_idt_base(), 4096);
    memory::write(idt + 16 * 13 + 5, 0x0e_u8);
    vm.set(IDTR_BASE, idt)?;
    vm.set(EXCEPTIONS, 1 << 8)?;
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("interruption information", e.info, 0x8000_0b08_u32);
    check!("error code", e.code, 0);
    // §28.2.4: a double fault is no exit during delivery of the first event.
    check!("IDT-vectoring information", e.idt_info >> 31, 0);
    Ok(())
}

fn vectoring_none(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall", "vmcall"])?;
    vm.set(ENTRY_INFO, 0x8000_0306)?;
    vm.expect_event(6)?;
    // The event was delivered before the exit.
    check!("IDT-vectoring information", vm.get(IDT_INFO)? >> 31, 0);
    Ok(())
}

fn pending_debug(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "vmcall"])?;
    vm.set(PENDING_DEBUG, 0x4000)?;
    vm.set(GUEST_RFLAGS, 0x102)?;
    let event = vm.expect_event(1)?;
    check!("RIP - code", event.rip - vm.code, 0);
    memory::reset();
    let mut vm = Vm::new(&ctx.caps, code!["nop", "vmcall"])?;
    vm.set(EXCEPTIONS, 2)?;
    vm.set(PENDING_DEBUG, 0x1001)?;
    let e = vm.expect(reason::EXCEPTION_NMI)?;
    check!("interruption information", e.info, 0x8000_0301_u32);
    check!("qualification", e.qualification & 0xf, 1);
    Ok(())
}

fn mov_ss_saved(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov ss, eax", "cpuid", "vmcall"])?;
    vm.regs.rax = 0x10;
    let e = vm.expect(reason::CPUID)?;
    check!("interruptibility", vm.get(INTERRUPTIBILITY)?, 2);
    vm.set(INTERRUPTIBILITY, 0)?;
    vm.skip_instruction(&e)?;
    vm.finish()?;
    check!("interruptibility", vm.get(INTERRUPTIBILITY)?, 0);
    Ok(())
}

fn sti_saved(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["sti", "cpuid", "vmcall"])?;
    vm.expect(reason::CPUID)?;
    check!("interruptibility", vm.get(INTERRUPTIBILITY)?, 1);
    check!("IF", vm.get(GUEST_RFLAGS)? & 0x200, 0x200);
    Ok(())
}

/// L2's own HLT without HLT exiting: an interrupt for L1 finds it halted.
fn hlt_saved(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["wrmsr", "hlt", "vmcall"])?;
    vm.need_pin(pin::TIMER)?;
    vm.set(TIMER, 2_000_000 >> (ctx.caps.misc & 0x1f))?;
    vm.need_primary(primary::MSR_BITMAPS)?;
    vm.set(MSR_BITMAP, memory::page())?;
    vm.regs.rcx = 0xc000_0102;
    vm.expect(reason::TIMER)?;
    check!("activity", vm.get(ACTIVITY)?, 1);
    Ok(())
}

fn shutdown(ctx: &mut Ctx) -> Outcome {
    if ctx.caps.misc >> 7 & 1 == 0 {
        return skip("activity state not offered");
    }
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.need_pin(pin::TIMER)?;
    vm.set(TIMER, 1_000_000 >> (ctx.caps.misc & 0x1f))?;
    vm.set(ACTIVITY, 2)?;
    vm.expect(reason::TIMER)?;
    check!("activity", vm.get(ACTIVITY)?, 2);
    Ok(())
}

/// ICR: INIT, physical destination.
const INIT: u64 = 0x4500;

/// INIT exits from L2 whatever the controls.
fn init(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["wrmsr", "2: jmp 2b"])?;
    vm.need_primary(primary::MSR_BITMAPS)?;
    vm.set(MSR_BITMAP, memory::page())?;
    vm.regs.rcx = 0x830;
    vm.regs.rax = INIT;
    vm.regs.rdx = cpu::msr(0x802);
    let e = vm.expect(reason::INIT)?;
    check!("qualification", e.qualification, 0);
    check!("interruption information", e.info >> 31, 0);
    Ok(())
}

/// In VMX root operation INIT is blocked, and exits once L2 runs.
fn init_blocked(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["2: jmp 2b"])?;
    let _ = cpu::wrmsr(0x830, cpu::msr(0x802) << 32 | INIT);
    let e = vm.expect(reason::INIT)?;
    check!("RIP - code", e.rip - vm.code, 0);
    Ok(())
}

/// ICR: start-up IPI to page 9AH, physical destination.
const SIPI: u64 = 0x4600 | 0x9a;

/// A start-up IPI exits from wait-for-SIPI, with its vector; nothing else does, not even the timer. An IPI takes its
/// time: this one arrives after the entry.
fn sipi(ctx: &mut Ctx) -> Outcome {
    if ctx.caps.misc >> 8 & 1 == 0 {
        return skip("activity state not offered");
    }
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.need_pin(pin::TIMER)?;
    vm.set(TIMER, 0)?;
    vm.set(ACTIVITY, 3)?;
    let _ = cpu::wrmsr(0x830, cpu::msr(0x802) << 32 | SIPI);
    let e = vm.expect(reason::SIPI)?;
    check!("qualification", e.qualification, 0x9a);
    check!("activity", vm.get(ACTIVITY)?, 3);
    check!("RIP - code", e.rip - vm.code, 0);
    check!("interruption information", e.info >> 31, 0);
    Ok(())
}

/// In any other state it is lost.
fn sipi_discarded(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["nop", "vmcall"])?;
    let _ = cpu::wrmsr(0x830, cpu::msr(0x802) << 32 | SIPI);
    vm.finish()?;
    Ok(())
}
