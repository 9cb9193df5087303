//! APIC virtualization: TPR shadow, APIC accesses, register virtualization, virtual interrupts, posted
//! interrupts (SDM Vol. 3C ch. 30).

use crate::guest::fields::*;
use crate::guest::suite::{Ctx, Outcome, check, fail};
use crate::guest::vm::{Regs, Vm, code};
use crate::guest::{cpu, memory, trap};

super::cases! { true;
    "apic.tpr_shadow" "Vol. 3C 30.3" tpr_shadow;
    "apic.tpr_threshold" "Vol. 3C 30.1.2" tpr_threshold;
    "apic.tpr_threshold.at_entry" "Vol. 3C 27.7.7" tpr_threshold_at_entry;
    "apic.access.read" "Vol. 3C 30.4" access_read;
    "apic.access.write" "Vol. 3C 30.4" access_write;
    "apic.access.fetch" "Vol. 3C 30.4.6" access_fetch;
    "apic.access.tpr" "Vol. 3C 30.4" access_tpr;
    "apic.access.without_ept" "Vol. 3C 30.4" access_without_ept;
    "apic.registers.read" "Vol. 3C 30.4.2" registers_read;
    "apic.registers.write" "Vol. 3C 30.4.3" registers_write;
    "apic.registers.not_virtualized" "Vol. 3C 30.4.2" registers_other;
    "apic.x2apic.tpr" "Vol. 3C 30.5" x2apic_tpr;
    "apic.x2apic.registers" "Vol. 3C 30.5" x2apic_registers;
    "apic.virtual_interrupt" "Vol. 3C 30.2.2" virtual_interrupt;
    "apic.virtual_interrupt.masked" "Vol. 3C 30.2.1" virtual_interrupt_masked;
    "apic.virtual_interrupt.at_sti" "Vol. 3C 30.2.2" virtual_interrupt_sti;
    "apic.self_ipi" "Vol. 3C 30.1.5" self_ipi;
    "apic.eoi" "Vol. 3C 30.1.4" eoi;
    "apic.eoi.exit" "Vol. 3C 30.1.4" eoi_exit;
    "apic.posted" "Vol. 3C 30.6" posted;
    "apic.posted.other_vector" "Vol. 3C 30.6" posted_other;
}

const VTPR: u64 = 0x80;

fn shadowed(ctx: &Ctx, code: u64) -> Outcome<(Vm, u64)> {
    let vm = Vm::new(&ctx.caps, code)?;
    vm.need_primary(primary::TPR_SHADOW)?;
    let page = memory::page();
    vm.set(VIRTUAL_APIC, page)?;
    vm.set(TPR_THRESHOLD, 0)?;
    Ok((vm, page))
}

fn tpr_shadow(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) = shadowed(ctx, code!["mov rbx, cr8", "mov cr8, rax", "vmcall"])?;
    memory::write(page + VTPR, 0x30_u32);
    vm.regs.rax = 9;
    let real = cpu::msr(0x808);
    vm.finish()?;
    check!("CR8 that L2 read", vm.regs.rbx, 3);
    check!("VTPR", memory::read::<u32>(page + VTPR), 0x90);
    check!("TPR of L1", cpu::msr(0x808), real);
    Ok(())
}

/// The exit comes behind the instruction that lowers the TPR.
fn tpr_threshold(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) = shadowed(ctx, code!["mov cr8, rax", "mov cr8, rbx", "nop", "vmcall"])?;
    memory::write(page + VTPR, 0x70_u32);
    vm.set(TPR_THRESHOLD, 5)?;
    vm.regs.rax = 5;
    vm.regs.rbx = 4;
    let e = vm.expect(reason::TPR)?;
    check!("RIP - code", e.rip - vm.code, 8);
    check!("VTPR", memory::read::<u32>(page + VTPR), 0x40);
    check!("qualification", e.qualification, 0);
    Ok(())
}

fn tpr_threshold_at_entry(ctx: &mut Ctx) -> Outcome {
    // The check on controls forbids it, but not with "virtualize APIC accesses".
    let (mut vm, page) = shadowed(ctx, code!["nop", "vmcall"])?;
    vm.need_secondary(secondary::APIC_ACCESS)?;
    vm.set(APIC_ACCESS, memory::page())?;
    memory::write(page + VTPR, 0x40_u32);
    vm.set(TPR_THRESHOLD, 5)?;
    let e = vm.expect(reason::TPR)?;
    check!("RIP - code", e.rip - vm.code, 0);
    Ok(())
}

/// RBX is the APIC-access page.
fn accessing(ctx: &Ctx, code: u64, controls: u32) -> Outcome<(Vm, u64)> {
    let (mut vm, page) = shadowed(ctx, code)?;
    vm.need_secondary(secondary::APIC_ACCESS | controls)?;
    let access = memory::page();
    vm.set(APIC_ACCESS, access)?;
    vm.regs = Regs { rbx: access, rax: 0x55, ..Regs::default() };
    Ok((vm, page))
}

fn access_read(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _) = accessing(ctx, code!["mov eax, [rbx + 0x20]", "vmcall"], 0)?;
    let e = vm.expect(reason::APIC_ACCESS)?;
    check!("qualification", e.qualification, 0x20);
    check!("RIP - code", e.rip - vm.code, 0);
    check!("RAX", vm.regs.rax, 0x55);
    Ok(())
}

fn access_write(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _) = accessing(ctx, code!["mov [rbx + 0x300], eax", "vmcall"], 0)?;
    let e = vm.expect(reason::APIC_ACCESS)?;
    check!("qualification", e.qualification, 0x1300);
    check!("RIP - code", e.rip - vm.code, 0);
    Ok(())
}

fn access_fetch(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _) = accessing(ctx, code!["lea rax, [rbx + 0x80]", "jmp rax"], 0)?;
    let e = vm.expect(reason::APIC_ACCESS)?;
    check!("qualification", e.qualification, 0x2080);
    Ok(())
}

/// With the TPR shadow alone, offset 80H is virtualized.
fn access_tpr(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) =
        accessing(ctx, code!["mov edx, [rbx + 0x80]", "mov [rbx + 0x80], eax", "vmcall"], 0)?;
    memory::write(page + VTPR, 0x60_u32);
    vm.finish()?;
    check!("what L2 read", vm.regs.rdx, 0x60);
    check!("VTPR", memory::read::<u32>(page + VTPR), 0x55);
    Ok(())
}

fn access_without_ept(ctx: &mut Ctx) -> Outcome {
    let (mut vm, _) = accessing(ctx, code!["mov eax, [rbx + 0x30]", "vmcall"], 0)?;
    if vm.ept.is_some() {
        vm.and(SECONDARY, !secondary::EPT)?;
    }
    let e = vm.expect(reason::APIC_ACCESS)?;
    check!("qualification", e.qualification, 0x30);
    Ok(())
}

fn registers_read(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) = accessing(
        ctx,
        code!["mov eax, [rbx + 0x20]", "mov ecx, [rbx + 0x300]", "vmcall"],
        secondary::APIC_REGISTERS,
    )?;
    memory::write(page + 0x20, 0x0700_0000_u32);
    memory::write(page + 0x300, 0x1234_u32);
    vm.finish()?;
    check!("ID", vm.regs.rax, 0x0700_0000);
    check!("ICR", vm.regs.rcx, 0x1234);
    Ok(())
}

fn registers_write(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) = accessing(
        ctx,
        code!["mov [rbx + 0x310], eax", "mov [rbx + 0x300], eax", "nop", "vmcall"],
        secondary::APIC_REGISTERS,
    )?;
    vm.regs.rax = 0x5500_0066;
    // The high half of the ICR takes the write alone, but for its reserved bytes; the low half exits
    // behind it.
    let e = vm.expect(reason::APIC_WRITE)?;
    check!("qualification", e.qualification, 0x300);
    check!("high half of the ICR", memory::read::<u32>(page + 0x310), 0x5500_0000);
    check!("low half of the ICR", memory::read::<u32>(page + 0x300), 0x5500_0066);
    check!("RIP - code", e.rip - vm.code, 12);
    vm.finish()?;
    Ok(())
}

fn registers_other(ctx: &mut Ctx) -> Outcome {
    // Offset 390H (current count) is not virtualized.
    let (mut vm, _) = accessing(ctx, code!["mov eax, [rbx + 0x390]", "vmcall"], secondary::APIC_REGISTERS)?;
    let e = vm.expect(reason::APIC_ACCESS)?;
    check!("qualification", e.qualification, 0x390);
    Ok(())
}

fn x2apic(ctx: &Ctx, code: u64, controls: u32) -> Outcome<(Vm, u64)> {
    let (vm, page) = shadowed(ctx, code)?;
    vm.need_secondary(secondary::X2APIC | controls)?;
    vm.need_primary(primary::MSR_BITMAPS)?;
    vm.set(MSR_BITMAP, memory::page())?;
    Ok((vm, page))
}

fn x2apic_tpr(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) = x2apic(ctx, code!["rdmsr", "mov rbx, rax", "mov eax, 0xb0", "wrmsr", "vmcall"], 0)?;
    memory::write(page + VTPR, 0x20_u32);
    vm.regs.rcx = 0x808;
    let real = cpu::msr(0x808);
    vm.finish()?;
    check!("TPR that L2 read", vm.regs.rbx, 0x20);
    check!("VTPR", memory::read::<u32>(page + VTPR), 0xb0);
    check!("TPR of L1", cpu::msr(0x808), real);
    Ok(())
}

fn x2apic_registers(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) = x2apic(ctx, code!["rdmsr", "vmcall"], secondary::APIC_REGISTERS)?;
    memory::write(page + 0x20, 0x1234_5678_u32);
    vm.regs.rcx = 0x802;
    vm.finish()?;
    check!("ID that L2 read", vm.regs.rax, 0x1234_5678);
    Ok(())
}

/// A machine with virtual-interrupt delivery.
fn delivering(ctx: &Ctx, code: u64) -> Outcome<(Vm, u64)> {
    let (vm, page) = shadowed(ctx, code)?;
    vm.need_pin(pin::EXTERNAL)?;
    vm.need_secondary(secondary::VIRTUAL_INTERRUPTS)?;
    for field in [EOI_EXIT0, EOI_EXIT1, EOI_EXIT2, EOI_EXIT3, INTERRUPT_STATUS] {
        vm.set(field, 0)?;
    }
    Ok((vm, page))
}

/// Address of the word with `vector`'s bit in a 256-bit register of the APIC page.
fn word(page: u64, register: u64, vector: u64) -> u64 {
    page + register + 0x10 * (vector >> 5)
}

fn request(vm: &Vm, page: u64, vector: u64) -> Outcome {
    memory::write(word(page, 0x200, vector), 1_u32 << (vector & 31));
    vm.set(INTERRUPT_STATUS, vector)
}

fn virtual_interrupt(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) = delivering(ctx, code!["nop", "vmcall"])?;
    vm.set(GUEST_RFLAGS, 0x202)?;
    request(&vm, page, 0x61)?;
    let event = vm.expect_event(0x61)?;
    check!("RIP - code", event.rip - vm.code, 0);
    check!("VISR", memory::read::<u32>(word(page, 0x100, 0x61)), 2);
    check!("VIRR", memory::read::<u32>(word(page, 0x200, 0x61)), 0);
    check!("guest interrupt status", vm.get(INTERRUPT_STATUS)?, 0x6100);
    check!("VPPR", memory::read::<u32>(page + 0xa0), 0x60);
    Ok(())
}

fn virtual_interrupt_masked(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) = delivering(ctx, code!["nop", "mov cr8, rbx", "nop", "vmcall"])?;
    vm.set(GUEST_RFLAGS, 0x202)?;
    memory::write(page + VTPR, 0x60_u32);
    request(&vm, page, 0x61)?;
    vm.regs.rbx = 5;
    // Delivered when the TPR goes below its class.
    let event = vm.expect_event(0x61)?;
    check!("RIP - code", event.rip - vm.code, 5);
    Ok(())
}

fn virtual_interrupt_sti(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) = delivering(ctx, code!["nop", "sti", "nop", "nop", "vmcall"])?;
    request(&vm, page, 0x71)?;
    let event = vm.expect_event(0x71)?;
    check!("RIP - code", event.rip - vm.code, 3);
    Ok(())
}

fn self_ipi(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) = x2apic(ctx, code!["wrmsr", "nop", "vmcall"], secondary::VIRTUAL_INTERRUPTS)?;
    vm.need_pin(pin::EXTERNAL)?;
    vm.set(INTERRUPT_STATUS, 0)?;
    vm.set(GUEST_RFLAGS, 0x202)?;
    vm.regs = Regs { rcx: 0x83f, rax: 0x52, ..Regs::default() };
    let event = vm.expect_event(0x52)?;
    check!("RIP - code", event.rip - vm.code, 2);
    check!("VISR", memory::read::<u32>(word(page, 0x100, 0x52)), 1 << 18);
    Ok(())
}

fn eoi_machine(ctx: &Ctx) -> Outcome<(Vm, u64)> {
    let (mut vm, page) = x2apic(ctx, code!["wrmsr", "nop", "vmcall"], secondary::VIRTUAL_INTERRUPTS)?;
    vm.need_pin(pin::EXTERNAL)?;
    for field in [EOI_EXIT0, EOI_EXIT1, EOI_EXIT2, EOI_EXIT3] {
        vm.set(field, 0)?;
    }
    memory::write(word(page, 0x100, 0x63), 1_u32 << 3);
    vm.set(INTERRUPT_STATUS, 0x6300)?;
    vm.regs = Regs { rcx: 0x80b, ..Regs::default() };
    Ok((vm, page))
}

fn eoi(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) = eoi_machine(ctx)?;
    vm.finish()?;
    check!("VISR", memory::read::<u32>(word(page, 0x100, 0x63)), 0);
    check!("guest interrupt status", vm.get(INTERRUPT_STATUS)?, 0);
    Ok(())
}

fn eoi_exit(ctx: &mut Ctx) -> Outcome {
    let (mut vm, page) = eoi_machine(ctx)?;
    vm.set(EOI_EXIT1, 1 << (0x63 & 63))?;
    let e = vm.expect(reason::EOI)?;
    check!("qualification", e.qualification, 0x63);
    check!("RIP - code", e.rip - vm.code, 2);
    check!("VISR", memory::read::<u32>(word(page, 0x100, 0x63)), 0);
    Ok(())
}

fn posted_machine(ctx: &Ctx) -> Outcome<(Vm, u64)> {
    let (vm, _) = delivering(ctx, code!["2: nop", "jmp 2b"])?;
    vm.need_pin(pin::POSTED)?;
    vm.need_exit(exit::ACK)?;
    let descriptor = memory::page();
    vm.set(POSTED_DESC, descriptor)?;
    vm.set(POSTED_VECTOR, 0xf2)?;
    vm.set(GUEST_RFLAGS, 0x202)?;
    // PIR for vector 81H; outstanding notification.
    memory::write(descriptor + (0x81 >> 3), 1_u8 << 1);
    memory::write(descriptor + 32, 1_u8);
    Ok((vm, descriptor))
}

/// The notification interrupt makes posted interrupts virtual ones, without an exit.
fn posted(ctx: &mut Ctx) -> Outcome {
    let (mut vm, descriptor) = posted_machine(ctx)?;
    cpu::apic::send_self(0xf2);
    vm.expect_event(0x81)?;
    check!("PIR", memory::read::<u8>(descriptor + (0x81 >> 3)), 0);
    check!("outstanding notification", memory::read::<u8>(descriptor + 32) & 1, 0);
    check!("notification in service", cpu::apic::in_service(0xf2), false);
    Ok(())
}

fn posted_other(ctx: &mut Ctx) -> Outcome {
    let (mut vm, descriptor) = posted_machine(ctx)?;
    cpu::apic::send_self(0x91);
    let e = vm.expect(reason::EXTERNAL)?;
    check!("interruption information", e.info, 0x8000_0091_u32);
    check!("PIR", memory::read::<u8>(descriptor + (0x81 >> 3)), 2);
    cpu::apic::eoi();
    if trap::l2_event().vector != trap::NONE {
        fail!("unexpected event {} in L2", trap::l2_event().vector)
    }
    Ok(())
}
