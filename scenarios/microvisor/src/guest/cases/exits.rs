//! VM exits that L2's instructions cause (SDM Vol. 3C §26.1 and ch. 28): reason, qualification, length,
//! information; and that they do not happen without their control.

use super::checks::Op::{self, *};
use super::checks::apply;
use crate::guest::fields::*;
use crate::guest::suite::{Ctx, Outcome, check, fail};
use crate::guest::vm::{Exit, Regs, Vm, code};
use crate::guest::{cpu, memory, trap};

/// What the exit-instruction-information field shall be.
#[derive(Clone, Copy)]
enum Info {
    /// Undefined for this exit.
    Any,
    /// These bits, this value.
    Bits(u32, u32),
}
use Info::*;

/// An exit by the guest's first instruction.
struct Row {
    /// What makes it exit.
    with: &'static [Op],
    /// L2's registers.
    regs: fn(&Vm) -> Regs,
    /// L2's code.
    code: fn() -> u64,
    reason: u32,
    len: u32,
    /// The exit qualification; `None` where RBX has it.
    qualification: Option<u64>,
    info: Info,
    /// Whether L2 gets to its VMCALL with `with` left out.
    passes: bool,
}

/// Memory operand `[rbx]`: address size, segment, index, base.
const MEMORY: u32 = 0x0fc3_8780;
/// 64-bit address, DS, no index, base RBX.
const AT_RBX: u32 = 2 << 7 | 3 << 15 | 1 << 22 | 3 << 23;

fn run_row(ctx: &Ctx, row: &Row) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, (row.code)())?;
    apply(&mut vm, row.with)?;
    vm.regs = (row.regs)(&vm);
    let rbx = vm.regs.rbx;
    let before = vm.regs;
    let e = vm.expect(row.reason)?;
    check!("RIP - code", e.rip.wrapping_sub(vm.code), 0);
    check!("instruction length", e.len, row.len);
    check!("qualification", e.qualification, row.qualification.unwrap_or(rbx));
    if let Bits(mask, value) = row.info {
        check!("instruction information", e.instruction & mask, value);
    }
    check!("interruption information", e.info >> 31, 0);
    check!("IDT-vectoring information", e.idt_info >> 31, 0);
    // The instruction has had no effect.
    check!("RAX", vm.regs.rax, before.rax);
    check!("RCX", vm.regs.rcx, before.rcx);
    check!("RDX", vm.regs.rdx, before.rdx);
    // Behind it, L2 goes on.
    vm.skip_instruction(&e)?;
    vm.finish()?;
    if row.passes {
        let mut vm = Vm::new(&ctx.caps, (row.code)())?;
        vm.regs = (row.regs)(&vm);
        // Not all controls: what the instruction needs to exist stays.
        for op in row.with {
            if matches!(op, Secondary(secondary::RDTSCP | secondary::INVPCID) | Set(..) | Or(..)) {
                apply(&mut vm, &[*op])?;
            }
        }
        vm.finish()?;
    }
    Ok(())
}

fn plain(_: &Vm) -> Regs {
    Regs { rax: 0x1111, rbx: 0x2222, rcx: 0, rdx: 0x4444, ..Regs::default() }
}
fn at_data(vm: &Vm) -> Regs {
    Regs { rax: 1, rbx: vm.data, ..Regs::default() }
}
fn cr3_in_rax(_: &Vm) -> Regs {
    Regs { rax: cpu::cr3(), ..Regs::default() }
}
fn port(_: &Vm) -> Regs {
    Regs { rdx: 0x80, rax: 0x11, ..Regs::default() }
}

const NONE: &[Op] = &[];

macro_rules! rows {
    ($($name:literal $section:literal $with:expr, $regs:ident, [$($line:literal),*], $reason:ident, $len:literal, $qualification:expr, $info:expr, $passes:literal;)*) => {
        const ROWS: &[crate::guest::suite::Case] = &[$(
            crate::guest::suite::Case {
                name: concat!("exit.", $name),
                section: concat!("Vol. 3C ", $section),
                vmx: true,
                run: |ctx| run_row(ctx, &Row {
                    with: $with, regs: $regs, code: || code![$($line,)* "vmcall", "2: jmp 2b"], reason: reason::$reason, len: $len,
                    qualification: $qualification, info: $info, passes: $passes,
                }),
            },
        )*];
    };
}

rows! {
    "cpuid" "26.1.2" NONE, plain, ["cpuid"], CPUID, 2, Some(0), Any, false;
    "cpuid.prefixed" "28.2.5" NONE, plain, [".byte 0xf2, 0x48, 0x0f, 0xa2"], CPUID, 4, Some(0), Any, false;
    "invd" "26.1.2" NONE, plain, ["invd"], INVD, 2, Some(0), Any, false;
    "vmcall" "26.1.2" NONE, plain, ["vmcall"], VMCALL, 3, Some(0), Any, false;
    "hlt" "26.1.3" &[Primary(primary::HLT)], plain, ["hlt"], HLT, 1, Some(0), Any, false;
    "invlpg" "26.1.3" &[Primary(primary::INVLPG)], at_data, ["invlpg [rbx]"], INVLPG, 3, None, Any, true;
    "rdpmc" "26.1.3" &[Primary(primary::RDPMC)], plain, ["rdpmc"], RDPMC, 2, Some(0), Any, false;
    "rdtsc" "26.1.3" &[Primary(primary::RDTSC)], plain, ["rdtsc"], RDTSC, 2, Some(0), Any, true;
    "rdtscp" "26.1.3" &[Feature(0x8000_0001, 3, 27), Secondary(secondary::RDTSCP), Primary(primary::RDTSC)], plain, ["rdtscp"], RDTSCP, 3, Some(0), Any, true;
    "pause" "26.1.3" &[Primary(primary::PAUSE)], plain, ["pause"], PAUSE, 2, Some(0), Any, true;
    "monitor" "26.1.3" &[Feature(1, 2, 3), Primary(primary::MONITOR)], plain, ["monitor"], MONITOR, 3, Some(0), Any, true;
    "mwait" "26.1.3" &[Feature(1, 2, 3), Primary(primary::MWAIT)], plain, ["mwait"], MWAIT, 3, Some(0), Any, true;
    "wbinvd" "26.1.3" &[Secondary(secondary::WBINVD)], plain, ["wbinvd"], WBINVD, 2, Some(0), Any, true;
    "xsetbv" "26.1.2" &[Feature(1, 2, 26), Or(GUEST_CR4, 1 << 18)], plain, ["xsetbv"], XSETBV, 3, Some(0), Any, false;
    "rdrand" "26.1.3" &[Feature(1, 2, 30), Secondary(secondary::RDRAND)], plain, ["rdrand rax"], RDRAND, 4, Some(0), Bits(0x1878, 2 << 11), true;
    "rdrand.16" "28.2.5" &[Feature(1, 2, 30), Secondary(secondary::RDRAND)], plain, ["rdrand cx"], RDRAND, 4, Some(0), Bits(0x1878, 1 << 3), true;
    "rdrand.32" "28.2.5" &[Feature(1, 2, 30), Secondary(secondary::RDRAND)], plain, ["rdrand r10d"], RDRAND, 4, Some(0), Bits(0x1878, 10 << 3 | 1 << 11), true;
    "rdseed" "26.1.3" &[Feature(7, 1, 18), Secondary(secondary::RDSEED)], plain, ["rdseed rdx"], RDSEED, 4, Some(0), Bits(0x1878, 2 << 3 | 2 << 11), true;
    "invpcid" "26.1.3" &[Feature(7, 1, 10), Secondary(secondary::INVPCID), Primary(primary::INVLPG)], at_data, ["invpcid rax, [rbx]"], INVPCID, 5, Some(0), Bits(MEMORY | 0xf << 28, AT_RBX), true;
    "sgdt" "26.1.3" &[Secondary(secondary::DESCRIPTOR)], at_data, ["sgdt [rbx]"], GDTR_IDTR, 3, Some(0), Bits(MEMORY | 3 << 28, AT_RBX), true;
    "sidt" "26.1.3" &[Secondary(secondary::DESCRIPTOR)], at_data, ["sidt [rbx + 0x10]"], GDTR_IDTR, 4, Some(0x10), Bits(MEMORY | 3 << 28, AT_RBX | 1 << 28), true;
    "lgdt" "26.1.3" &[Secondary(secondary::DESCRIPTOR)], at_data, ["lgdt [rbx + rax * 8]"], GDTR_IDTR, 4, Some(0), Bits(0x0fff_8383 | 3 << 28, 3 | 2 << 7 | 3 << 15 | 3 << 23 | 2 << 28), true;
    "lidt" "26.1.3" &[Secondary(secondary::DESCRIPTOR)], at_data, ["lidt [rbx]"], GDTR_IDTR, 3, Some(0), Bits(MEMORY | 3 << 28, AT_RBX | 3 << 28), false;
    "sldt" "26.1.3" &[Secondary(secondary::DESCRIPTOR)], plain, ["sldt ecx"], LDTR_TR, 3, Some(0), Bits(0x478 | 3 << 28, 1 << 3 | 1 << 10), false;
    "str" "26.1.3" &[Secondary(secondary::DESCRIPTOR)], at_data, ["str word ptr [rbx]"], LDTR_TR, 3, Some(0), Bits(MEMORY | 3 << 28, AT_RBX | 1 << 28), true;
    "lldt" "26.1.3" &[Secondary(secondary::DESCRIPTOR)], plain, ["lldt cx"], LDTR_TR, 3, Some(0), Bits(0x478 | 3 << 28, 1 << 3 | 1 << 10 | 2 << 28), true;
    "ltr" "26.1.3" &[Secondary(secondary::DESCRIPTOR)], plain, ["ltr cx"], LDTR_TR, 3, Some(0), Bits(0x478 | 3 << 28, 1 << 3 | 1 << 10 | 3 << 28), false;
    "vmclear" "26.1.2" NONE, at_data, ["vmclear [rbx]"], VMCLEAR, 4, Some(0), Bits(MEMORY, AT_RBX), false;
    "vmlaunch" "26.1.2" NONE, plain, ["vmlaunch"], VMLAUNCH, 3, Some(0), Any, false;
    "vmptrld" "26.1.2" NONE, at_data, ["vmptrld [rbx - 8]"], VMPTRLD, 4, Some(0xffff_ffff_ffff_fff8), Bits(MEMORY, AT_RBX), false;
    "vmptrst" "26.1.2" NONE, at_data, ["vmptrst [rbx]"], VMPTRST, 3, Some(0), Bits(MEMORY, AT_RBX), false;
    "vmread" "26.1.2" NONE, plain, ["vmread rax, rcx"], VMREAD, 3, Some(0), Bits(0xf000_0478, 1 << 10 | 1 << 28), false;
    "vmread.memory" "26.1.2" NONE, at_data, ["vmread [rbx], rcx"], VMREAD, 3, Some(0), Bits(MEMORY | 0xf << 28, AT_RBX | 1 << 28), false;
    "vmwrite" "26.1.2" NONE, plain, ["vmwrite r12, rax"], VMWRITE, 4, Some(0), Bits(0xf000_0478, 1 << 10 | 12 << 28), false;
    "vmresume" "26.1.2" NONE, plain, ["vmresume"], VMRESUME, 3, Some(0), Any, false;
    "vmxoff" "26.1.2" NONE, plain, ["vmxoff"], VMXOFF, 3, Some(0), Any, false;
    "vmxon" "26.1.2" NONE, at_data, ["vmxon [rbx]"], VMXON, 4, Some(0), Bits(MEMORY, AT_RBX), false;
    "invept" "26.1.2" &[Secondary(secondary::EPT)], at_data, ["invept rax, [rbx]"], INVEPT, 5, Some(0), Bits(MEMORY | 0xf << 28, AT_RBX), false;
    "invvpid" "26.1.2" &[Secondary(secondary::VPID), Set(VPID, 1)], at_data, ["invvpid r9, [rbx]"], INVVPID, 6, Some(0), Bits(MEMORY | 0xf << 28, AT_RBX | 9 << 28), false;
    "cr3.load" "28.2.1" &[Primary(primary::CR3_LOAD)], cr3_in_rax, ["mov cr3, rax"], CR, 3, Some(3), Any, true;
    "cr3.store" "28.2.1" &[Primary(primary::CR3_STORE)], plain, ["mov r9, cr3"], CR, 4, Some(0x913), Any, true;
    "cr8.load" "28.2.1" &[Primary(primary::CR8_LOAD)], plain, ["mov cr8, rcx"], CR, 4, Some(0x108), Any, true;
    "cr8.store" "28.2.1" &[Primary(primary::CR8_STORE)], plain, ["mov rdx, cr8"], CR, 4, Some(0x218), Any, false;
    "cr0.mask" "26.1.3" &[Set(CR0_MASK, 8), Set(CR0_SHADOW, 8)], cr0_in_rax, ["mov cr0, rax"], CR, 3, Some(0), Any, false;
    "cr4.mask" "26.1.3" &[Set(CR4_MASK, 4), Set(CR4_SHADOW, 4)], cr4_in_rax, ["mov cr4, rax"], CR, 3, Some(4), Any, false;
    "clts" "26.1.3" &[Set(CR0_MASK, 8), Set(CR0_SHADOW, 8)], plain, ["clts"], CR, 2, Some(0x20), Any, false;
    "lmsw" "26.1.3" &[Set(CR0_MASK, 8), Set(CR0_SHADOW, 0)], lmsw_ts, ["lmsw ax"], CR, 3, Some(0x30 | 0xb << 16), Any, false;
    "mov_dr.to" "28.2.1" &[Primary(primary::MOV_DR)], dr7_in_rax, ["mov dr7, rax"], DR, 3, Some(7), Any, true;
    "mov_dr.from" "28.2.1" &[Primary(primary::MOV_DR)], plain, ["mov r9, dr0"], DR, 4, Some(0x910), Any, true;
    "io.in" "28.2.1" &[Primary(primary::IO_ALL)], port, ["in al, dx"], IO, 1, Some(0x80_0008), Any, false;
    "io.out" "28.2.1" &[Primary(primary::IO_ALL)], port, ["out dx, eax"], IO, 1, Some(0x80_0003), Any, true;
    "io.immediate" "28.2.1" &[Primary(primary::IO_ALL)], port, ["out 0x80, ax"], IO, 3, Some(0x80_0041), Any, true;
    "rdmsr" "26.1.3" NONE, msr_tsc, ["rdmsr"], RDMSR, 2, Some(0), Any, false;
    "wrmsr" "26.1.3" NONE, msr_tsc, ["wrmsr"], WRMSR, 2, Some(0), Any, false;
}

fn cr0_in_rax(_: &Vm) -> Regs {
    Regs { rax: cpu::cr0() & !8, ..Regs::default() }
}
fn cr4_in_rax(_: &Vm) -> Regs {
    Regs { rax: cpu::cr4() & !4, ..Regs::default() }
}
fn lmsw_ts(_: &Vm) -> Regs {
    Regs { rax: 0xb, ..Regs::default() }
}
fn dr7_in_rax(_: &Vm) -> Regs {
    Regs { rax: 0x400, ..Regs::default() }
}
fn msr_tsc(_: &Vm) -> Regs {
    Regs { rcx: 0x10, rax: 1, ..Regs::default() }
}

super::cases! { true;
    "exit.user.cpuid" "Vol. 3C 26.1.1" user_cpuid;
    "exit.user.vmx_instructions" "Vol. 3C 26.1.1" user_vmx;
    "exit.user.faults_first" "Vol. 3C 26.1.1" user_faults;
    "exit.vmptrst.rip_relative" "Vol. 3C 28.2.1" rip_relative;
    "exit.user.mov_dr" "Vol. 3C 26.1.3" user_mov_dr;
    "exit.cr3.targets" "Vol. 3C 26.1.3" cr3_targets;
    "exit.cr0.shadow" "Vol. 3C 26.3" cr0_shadow;
    "exit.cr4.shadow" "Vol. 3C 26.3" cr4_shadow;
    "exit.cr0.no_exit_when_equal" "Vol. 3C 26.1.3" cr0_equal;
    "exit.cr0.fixed_bits" "Vol. 3C 26.8" cr0_fixed;
    "exit.clts.no_exit" "Vol. 3C 26.1.3" clts_passes;
    "exit.clts.masked" "Vol. 3C 26.3" clts_masked;
    "exit.lmsw.memory" "Vol. 3C 28.2.1" lmsw_memory;
    "exit.smsw.shadow" "Vol. 3C 26.3" smsw_shadow;
    "exit.io.bitmap" "Vol. 3C 25.6.4" io_bitmap;
    "exit.io.bitmap.wide" "Vol. 3C 25.6.4" io_bitmap_wide;
    "exit.io.wrap" "Vol. 3C 26.1.3" io_wrap;
    "exit.io.string" "Vol. 3C 28.2.1" io_string;
    "exit.io.rep_string" "Vol. 3C 28.2.1" io_rep;
    "exit.io.real_mode" "Vol. 3C 28.2.5" io_real;
    "exit.msr.bitmap" "Vol. 3C 25.6.9" msr_bitmap;
    "exit.msr.out_of_range" "Vol. 3C 26.1.3" msr_out_of_range;
    "exit.pause.loop" "Vol. 3C 26.1.3" pause_loop;
    "exit.rdtscp.disabled" "Vol. 3C 26.3" rdtscp_disabled;
    "exit.invpcid.disabled" "Vol. 3C 26.3" invpcid_disabled;
    "exit.vmfunc.disabled" "Vol. 3C 26.5.6" vmfunc_disabled;
    "exit.vmfunc.unsupported" "Vol. 3C 26.5.6" vmfunc_unsupported;
    "exit.xsaves" "Vol. 3C 26.1.3" xsaves;
    "exit.triple_fault" "Vol. 3C 26.2" triple_fault;
    "exit.rdpmc.off" "Vol. 3C 26.1.3" rdpmc_off;
    "exit.never" "Vol. 3C 26.1.2" never;
    "exit.task_switch" "Vol. 3C 28.2.1" task_switch;
    "exit.task_switch.iret" "Vol. 3C 28.2.1" task_switch_iret;
    "exit.task_switch.gate" "Vol. 3C 28.2.1" task_switch_gate;
    "exit.task_switch.idt" "Vol. 3C 28.2.4" task_switch_idt;
    "exit.task_switch.faults" "Vol. 3C 26.4.2" task_switch_faults;
    "exit.real_mode" "Vol. 3C 26.8" real_mode;
    "exit.protected_mode" "Vol. 3C 26.8" protected_mode;
    "exit.state.saved" "Vol. 3C 28.3" state_saved;
    "exit.state.host" "Vol. 3C 28.5" host_state;
    "exit.state.host_segments" "Vol. 3C 28.5.2" host_segments;
    "exit.state.rip_not_canonical" "Vol. 3C 27.3.1.4" rip_not_canonical;
    "exit.state.entry_cleared" "Vol. 3C 28.2" entry_info_cleared;
    "exit.state.lma" "Vol. 3C 28.3" save_lma;
    "exit.state.debug_controls" "Vol. 3C 28.3.1" debug_controls;
    "exit.state.efer" "Vol. 3C 28.3.1" efer_switch;
    "exit.state.pat" "Vol. 3C 28.3.1" pat_switch;
}

/// All cases of the module.
pub const GROUPS: [&[crate::guest::suite::Case]; 2] = [ROWS, CASES];

fn user(vm: &Vm) -> Outcome {
    vm.segments([0x23, 0x2b], 0xa0fb, 0xc0f3)
}

fn user_cpuid(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["cpuid", "vmcall"])?;
    user(&vm)?;
    let e = vm.expect(reason::CPUID)?;
    check!("CS of L2", vm.get(CS_SEL)?, 0x23);
    vm.skip_instruction(&e)?;
    vm.finish()?;
    Ok(())
}

/// VMX instructions exit at every privilege level.
fn user_vmx(ctx: &mut Ctx) -> Outcome {
    for (code, reason) in [
        (code!["vmread rax, rcx"], reason::VMREAD),
        (code!["vmxoff"], reason::VMXOFF),
        (code!["vmlaunch"], reason::VMLAUNCH),
        (code!["vmcall"], reason::VMCALL),
        (code!["vmclear [rsp - 64]"], reason::VMCLEAR),
    ] {
        memory::reset();
        let mut vm = Vm::new(&ctx.caps, code)?;
        user(&vm)?;
        let e = vm.expect(reason)?;
        check!("RIP - code", e.rip.wrapping_sub(code), 0);
    }
    Ok(())
}

/// Faults by privilege come before exits.
fn user_faults(ctx: &mut Ctx) -> Outcome {
    for (what, code) in [
        ("HLT", code!["hlt"]),
        ("INVLPG", code!["invlpg [rsp]"]),
        ("MOV to CR3", code!["mov cr3, rax"]),
        ("RDMSR", code!["rdmsr"]),
        ("IN", code!["in al, 0x80"]),
        ("INVD", code!["invd"]),
        ("CLTS", code!["clts"]),
        ("LGDT", code!["lgdt [rsp]"]),
    ] {
        memory::reset();
        let mut vm = Vm::new(&ctx.caps, code)?;
        let _ =
            apply(&mut vm, &[Primary(primary::HLT | primary::INVLPG | primary::IO_ALL | primary::MOV_DR)]);
        let _ = apply(&mut vm, &[Secondary(secondary::DESCRIPTOR)]);
        user(&vm)?;
        let event = vm.expect_event(13)?;
        check!(format_args!("{what}: RIP - code"), event.rip.wrapping_sub(code), 0);
        check!(format_args!("{what}: error code"), event.code, 0);
    }
    Ok(())
}

/// The qualification is the address, not the displacement.
fn rip_relative(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code![".byte 0x0f, 0xc7, 0x3d, 0x10, 0, 0, 0"])?;
    let e = vm.expect(reason::VMPTRST)?;
    check!("instruction length", e.len, 7);
    check!("qualification", e.qualification, vm.code + 7 + 0x10);
    check!("no index, no base", e.instruction & 0x0840_0780, 2 << 7 | 1 << 22 | 1 << 27);
    Ok(())
}

/// MOV DR exits before its privilege is checked, and before CR4.DE makes DR4 #UD.
fn user_mov_dr(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov rax, dr7"])?;
    vm.need_primary(primary::MOV_DR)?;
    user(&vm)?;
    let e = vm.expect(reason::DR)?;
    check!("qualification", e.qualification, 0x17);
    memory::reset();
    let mut vm = Vm::new(&ctx.caps, code![".byte 0x0f, 0x23, 0xe0"])?;
    vm.need_primary(primary::MOV_DR)?;
    vm.set(GUEST_CR4, vm.get(GUEST_CR4)? | 8)?;
    let e = vm.expect(reason::DR)?;
    check!("qualification", e.qualification, 4);
    Ok(())
}

fn cr3_targets(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov cr3, rax", "mov cr3, rbx", "vmcall"])?;
    vm.need_primary(primary::CR3_LOAD)?;
    if ctx.caps.misc >> 16 & 0x1ff == 0 {
        return crate::guest::suite::skip("no CR3 targets");
    }
    vm.set(CR3_COUNT, 1)?;
    vm.set(CR3_TARGET0, cpu::cr3())?;
    vm.regs.rax = cpu::cr3();
    vm.regs.rbx = cpu::cr3() | 0x18;
    let e = vm.expect(reason::CR)?;
    check!("RIP - code", e.rip - vm.code, 3);
    check!("qualification", e.qualification, 0x303);
    Ok(())
}

fn cr0_shadow(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov rax, cr0", "vmcall"])?;
    let cr0 = vm.get(GUEST_CR0)?;
    vm.set(CR0_MASK, 0x0004_0008)?;
    vm.set(CR0_SHADOW, 0x0005_0008)?;
    vm.finish()?;
    check!("CR0 that L2 reads", vm.regs.rax, cr0 & !0x0004_0008 | 0x0004_0008);
    Ok(())
}

fn cr4_shadow(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov rax, cr4", "vmcall"])?;
    let cr4 = vm.get(GUEST_CR4)?;
    vm.set(CR4_MASK, 0x2000 | 4)?;
    vm.set(CR4_SHADOW, 4)?;
    vm.finish()?;
    check!("CR4 that L2 reads", vm.regs.rax, cr4 & !0x2000 | 4);
    Ok(())
}

/// Bits that L1 owns keep their value; the others change.
fn cr0_equal(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov cr0, rax", "vmcall"])?;
    let cr0 = vm.get(GUEST_CR0)?;
    vm.set(CR0_MASK, 8)?;
    vm.set(CR0_SHADOW, 8)?;
    vm.regs.rax = cr0 | 8 | 1 << 16;
    vm.finish()?;
    check!("CR0 of L2", vm.get(GUEST_CR0)?, cr0 & !8 | 1 << 16);
    Ok(())
}

/// In VMX non-root operation too, setting fixed bits wrongly is #GP.
fn cr0_fixed(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov cr0, rax"])?;
    vm.regs.rax = vm.get(GUEST_CR0)? & !0x20;
    vm.expect_event(13)?;
    let mut vm = Vm::new(&ctx.caps, code!["mov cr4, rax"])?;
    vm.regs.rax = vm.get(GUEST_CR4)? & !0x2000;
    vm.expect_event(13)?;
    Ok(())
}

fn clts_passes(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["clts", "vmcall"])?;
    vm.set(GUEST_CR0, vm.get(GUEST_CR0)? | 8)?;
    vm.finish()?;
    check!("CR0.TS of L2", vm.get(GUEST_CR0)? & 8, 0);
    Ok(())
}

/// CLTS with TS owned by L1 and 0 in the shadow does nothing.
fn clts_masked(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["clts", "vmcall"])?;
    vm.set(GUEST_CR0, vm.get(GUEST_CR0)? | 8)?;
    vm.set(CR0_MASK, 8)?;
    vm.set(CR0_SHADOW, 0)?;
    vm.finish()?;
    check!("CR0.TS of L2", vm.get(GUEST_CR0)? & 8, 8);
    Ok(())
}

fn lmsw_memory(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["lmsw [rbx + 4]", "vmcall"])?;
    vm.set(CR0_MASK, 8)?;
    memory::write(vm.data + 4, 0xb_u16);
    vm.regs.rbx = vm.data;
    let e = vm.expect(reason::CR)?;
    check!("qualification", e.qualification, 0x70 | 0xb << 16);
    check!("guest-linear address", e.linear, vm.data + 4);
    check!("instruction length", e.len, 4);
    Ok(())
}

fn smsw_shadow(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["smsw ax", "vmcall"])?;
    vm.set(CR0_MASK, 8)?;
    vm.set(CR0_SHADOW, 8)?;
    vm.finish()?;
    check!("TS that L2 reads", vm.regs.rax & 8, 8);
    Ok(())
}

fn io_bitmap(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(
        &ctx.caps,
        code!["out 0x80, al", "mov dx, 0x8080", "out dx, al", "mov dl, 0x81", "out dx, al", "vmcall"],
    )?;
    vm.need_primary(primary::IO_BITMAPS)?;
    // Unconditional exiting is ignored with bitmaps.
    if ctx.caps.primary.can(primary::IO_ALL) {
        vm.or(PRIMARY, primary::IO_ALL)?;
    }
    let (a, b) = (memory::page(), memory::page());
    vm.set(IO_A, a)?;
    vm.set(IO_B, b)?;
    // Port 8081H: the second bitmap.
    memory::write(b + (0x81 >> 3), 1_u8 << 1);
    let e = vm.expect(reason::IO)?;
    check!("qualification", e.qualification, 0x8081_0000_u64);
    vm.skip_instruction(&e)?;
    vm.finish()?;
    // Port 80H: the first bitmap.
    memory::write(b + (0x81 >> 3), 0_u8);
    memory::write(a + (0x80 >> 3), 1_u8);
    vm.set(GUEST_RIP, vm.code)?;
    let e = vm.expect(reason::IO)?;
    check!("qualification", e.qualification, 0x80_0040);
    vm.skip_instruction(&e)?;
    vm.finish()?;
    Ok(())
}

/// An access exits if the bit of any of its ports is 1.
fn io_bitmap_wide(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["in eax, 0x80", "vmcall"])?;
    vm.need_primary(primary::IO_BITMAPS)?;
    let (a, b) = (memory::page(), memory::page());
    vm.set(IO_A, a)?;
    vm.set(IO_B, b)?;
    memory::write(a + (0x80 >> 3), 1_u8 << 3);
    let e = vm.expect(reason::IO)?;
    check!("qualification", e.qualification, 0x80_004b);
    memory::write(a + (0x80 >> 3), 1_u8 << 4);
    vm.finish()?;
    Ok(())
}

fn io_wrap(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["in ax, dx", "vmcall"])?;
    vm.need_primary(primary::IO_BITMAPS)?;
    vm.set(IO_A, memory::page())?;
    vm.set(IO_B, memory::page())?;
    vm.regs.rdx = 0xffff;
    let e = vm.expect(reason::IO)?;
    check!("qualification", e.qualification, 0xffff_0009_u64);
    Ok(())
}

fn io_string(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["outsb", "insw", "vmcall"])?;
    vm.need_primary(primary::IO_ALL)?;
    vm.regs.rdx = 0x80;
    vm.regs.rsi = vm.data + 0x10;
    vm.regs.rdi = vm.data + 0x20;
    let e = vm.expect(reason::IO)?;
    check!("OUTS: qualification", e.qualification, 0x80_0010);
    check!("OUTS: guest-linear address", e.linear, vm.data + 0x10);
    check!("OUTS: address size and segment", e.instruction & 0x3_8380, 2 << 7 | 3 << 15);
    vm.skip_instruction(&e)?;
    let e = vm.expect(reason::IO)?;
    check!("INS: qualification", e.qualification, 0x80_0019);
    check!("INS: guest-linear address", e.linear, vm.data + 0x20);
    check!("INS: address size", e.instruction & 0x380, 2 << 7);
    check!("INS: instruction length", e.len, 2);
    Ok(())
}

fn io_rep(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["rep outsd", "vmcall"])?;
    vm.need_primary(primary::IO_ALL)?;
    vm.regs.rdx = 0x80;
    vm.regs.rcx = 5;
    vm.regs.rsi = vm.data;
    let e = vm.expect(reason::IO)?;
    check!("qualification", e.qualification, 0x80_0033);
    check!("RCX", vm.regs.rcx, 5);
    check!("guest-linear address", e.linear, vm.data);
    // With a count of 0 there is no access and no exit.
    vm.regs.rcx = 0;
    vm.finish()?;
    Ok(())
}

fn io_real(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code![".byte 0x64, 0x6e, 0x0f, 0x01, 0xc1"])?;
    vm.need_primary(primary::IO_ALL)?;
    vm.real_mode(0x8000, 16)?;
    vm.set(FS_SEL, 0x900)?;
    vm.set(FS_BASE, 0x9000)?;
    vm.regs.rdx = 0x80;
    vm.regs.rsi = 0x123;
    let e = vm.expect(reason::IO)?;
    check!("qualification", e.qualification, 0x80_0010);
    check!("guest-linear address", e.linear, 0x9123);
    check!("16-bit address, FS", e.instruction & 0x3_8380, 4 << 15);
    check!("instruction length", e.len, 2);
    vm.skip_instruction(&e)?;
    vm.finish()?;
    Ok(())
}

fn msr_bitmap(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["rdmsr", "wrmsr", "vmcall"])?;
    vm.need_primary(primary::MSR_BITMAPS)?;
    let bitmap = memory::page();
    vm.set(MSR_BITMAP, bitmap)?;
    let saved = cpu::msr(cpu::MSR_KERNEL_GS_BASE);
    // Offsets of the four bitmaps: read low, read high, write low, write high.
    for (msr, index, read, write) in [(0x174_u64, 0x174, 0, 0x800), (0xc000_0102, 0x102, 0x400, 0xc00)] {
        for (read_bit, write_bit) in [(false, false), (true, false), (false, true)] {
            memory::fill(bitmap, 0, 4096);
            let mask = 1_u8 << (index & 7);
            if read_bit {
                memory::write(bitmap + read + (index >> 3), mask);
            }
            if write_bit {
                memory::write(bitmap + write + (index >> 3), mask);
            }
            vm.set(GUEST_RIP, vm.code)?;
            vm.regs = Regs { rcx: msr, ..Regs::default() };
            if read_bit || write_bit {
                let e = vm.expect(if read_bit { reason::RDMSR } else { reason::WRMSR })?;
                check!("RIP - code", e.rip - vm.code, if read_bit { 0 } else { 2 });
                vm.skip_instruction(&e)?;
            }
            vm.finish()?;
        }
    }
    let _ = cpu::wrmsr(cpu::MSR_KERNEL_GS_BASE, saved);
    Ok(())
}

/// MSRs outside both ranges exit whatever the bitmaps say.
fn msr_out_of_range(ctx: &mut Ctx) -> Outcome {
    for msr in [0x2000_u64, 0x4000_0000, 0xbfff_ffff, 0xc000_2000, 0xffff_ffff] {
        memory::reset();
        let mut vm = Vm::new(&ctx.caps, code!["rdmsr", "wrmsr", "vmcall"])?;
        vm.need_primary(primary::MSR_BITMAPS)?;
        vm.set(MSR_BITMAP, memory::page())?;
        vm.regs.rcx = msr;
        let e = vm.expect(reason::RDMSR)?;
        vm.skip_instruction(&e)?;
        let e = vm.expect(reason::WRMSR)?;
        vm.skip_instruction(&e)?;
        vm.finish()?;
    }
    Ok(())
}

/// A loop of PAUSE within the window exits; at privilege level 3 it does not.
fn pause_loop(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["2: pause", "inc rbx", "jmp 2b"])?;
    vm.need_secondary(secondary::PAUSE_LOOP)?;
    vm.set(PLE_GAP, 0xffff_ffff)?;
    vm.set(PLE_WINDOW, 4096)?;
    let e = vm.expect(reason::PAUSE)?;
    if vm.regs.rbx == 0 {
        fail!("expected more than one PAUSE in the window")
    }
    check!("instruction length", e.len, 2);
    Ok(())
}

fn rdtscp_disabled(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["rdtscp", "vmcall"])?;
    vm.and(SECONDARY, !secondary::RDTSCP)?;
    vm.expect_event(6)?;
    Ok(())
}

fn invpcid_disabled(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["invpcid rax, [rbx]", "vmcall"])?;
    vm.and(SECONDARY, !secondary::INVPCID)?;
    vm.regs.rbx = vm.data;
    vm.expect_event(6)?;
    Ok(())
}

fn vmfunc_disabled(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmfunc"])?;
    vm.expect_event(6)?;
    Ok(())
}

fn vmfunc_unsupported(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmfunc", "vmcall"])?;
    vm.need_secondary(secondary::VMFUNC)?;
    vm.set(VMFUNC_CTL, 0)?;
    for function in [0, 5, 63] {
        vm.set(GUEST_RIP, vm.code)?;
        vm.regs.rax = function;
        let e = vm.expect(reason::VMFUNC)?;
        check!("instruction length", e.len, 3);
    }
    // A function number above 63 is #UD.
    vm.set(GUEST_RIP, vm.code)?;
    vm.regs.rax = 64;
    let e = vm.run()?;
    if !matches!(e.reason, reason::VMCALL | reason::VMFUNC)
        || e.reason == reason::VMCALL && trap::l2_event().vector != 6
    {
        fail!("VMFUNC 64: expected #UD or exit reason 59, got exit reason {}", e.reason)
    }
    Ok(())
}

fn xsaves(ctx: &mut Ctx) -> Outcome {
    if cpu::cpuid(1, 0)[2] >> 26 & 1 == 0 || cpu::cpuid(0xd, 1)[0] >> 3 & 1 == 0 {
        return crate::guest::suite::skip("CPUID does not show the feature");
    }
    let mut vm = Vm::new(&ctx.caps, code!["xsaves [rbx]", "xrstors [rbx]", "vmcall"])?;
    vm.set(GUEST_CR4, vm.get(GUEST_CR4)? | 1 << 18)?;
    // Without "enable XSAVES/XRSTORS" they are #UD.
    vm.and(SECONDARY, !secondary::XSAVES)?;
    vm.regs = Regs { rax: 1, rbx: vm.data, ..Regs::default() };
    vm.expect_event(6)?;
    vm.set(GUEST_RIP, vm.code)?;
    vm.set(GUEST_RSP, vm.stack + 4096)?;
    vm.need_secondary(secondary::XSAVES)?;
    vm.set(XSS_BITMAP, 0)?;
    vm.finish()?;
    // XSAVES exits if EDX:EAX AND IA32_XSS AND the bitmap is not 0; IA32_XSS is 0 here.
    vm.set(XSS_BITMAP, u64::MAX)?;
    vm.set(GUEST_RIP, vm.code)?;
    vm.finish()?;
    Ok(())
}

fn triple_fault(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["ud2"])?;
    vm.set(IDTR_LIMIT, 0)?;
    let e = vm.expect(reason::TRIPLE_FAULT)?;
    check!("qualification", e.qualification, 0);
    check!("RIP - code", e.rip - vm.code, 0);
    Ok(())
}

fn task_switch(ctx: &mut Ctx) -> Outcome {
    // jmp 28H:0; call 28H:0
    let mut vm = Vm::new(&ctx.caps, code![".byte 0xea, 0, 0, 0, 0, 0x28, 0, 0x9a, 0, 0, 0, 0, 0x28, 0"])?;
    vm.protected32()?;
    let gdt = memory::page();
    memory::copy(gdt, trap::gdt_base(), 128);
    let tss = memory::page();
    memory::write(gdt + 0x28, 103 | (tss & 0xff_ffff) << 16 | 0x89_u64 << 40 | (tss >> 24) << 56);
    vm.set(GDTR_BASE, gdt)?;
    let e = vm.expect(reason::TASK_SWITCH)?;
    check!("JMP: qualification", e.qualification, 0x8000_0028_u64);
    check!("JMP: instruction length", e.len, 7);
    vm.skip_instruction(&e)?;
    let e = vm.expect(reason::TASK_SWITCH)?;
    check!("CALL: qualification", e.qualification, 0x28);
    check!("RIP - code", e.rip - vm.code, 7);
    Ok(())
}

/// A machine in 32-bit protected mode whose GDT has an available (or busy) 32-bit TSS at 28H and a task gate to it at
/// 30H.
fn tasks(ctx: &Ctx, code: u64, tss_type: u64) -> Outcome<Vm> {
    memory::reset();
    let mut vm = Vm::new(&ctx.caps, code)?;
    vm.protected32()?;
    let gdt = memory::page();
    memory::copy(gdt, trap::gdt_base(), 128);
    let tss = memory::page();
    memory::write(gdt + 0x28, 103 | (tss & 0xff_ffff) << 16 | tss_type << 40 | (tss >> 24) << 56);
    memory::write(gdt + 0x30, 0x28_u64 << 16 | 0x85 << 40);
    vm.set(GDTR_BASE, gdt)?;
    Ok(vm)
}

/// IRET with NT set goes back to the task that the TSS links to, which is busy.
fn task_switch_iret(ctx: &mut Ctx) -> Outcome {
    let mut vm = tasks(ctx, code![".byte 0xcf"], 0x8b)?;
    let own = memory::page();
    memory::write(own, 0x28_u16);
    vm.set(TR_BASE, own)?;
    vm.set(GUEST_RFLAGS, 0x4002)?;
    let e = vm.expect(reason::TASK_SWITCH)?;
    check!("qualification", e.qualification, 0x4000_0028);
    check!("instruction length", e.len, 1);
    check!("RIP - code", e.rip - vm.code, 0);
    check!("IDT-vectoring information", e.idt_info >> 31, 0);
    Ok(())
}

/// CALL and JMP through a task gate: the qualification has the TSS's selector, not the gate's.
fn task_switch_gate(ctx: &mut Ctx) -> Outcome {
    let code = code![".byte 0xea, 0, 0, 0, 0, 0x30, 0, 0x9a, 0, 0, 0, 0, 0x30, 0"];
    let mut vm = tasks(ctx, code, 0x89)?;
    let e = vm.expect(reason::TASK_SWITCH)?;
    check!("JMP: qualification", e.qualification, 0x8000_0028_u64);
    check!("JMP: instruction length", e.len, 7);
    vm.skip_instruction(&e)?;
    let e = vm.expect(reason::TASK_SWITCH)?;
    check!("CALL: qualification", e.qualification, 0x28);
    check!("CALL: instruction length", e.len, 7);
    Ok(())
}

/// Task gates in the IDT: the event is in the vectoring information.
fn task_switch_idt(ctx: &mut Ctx) -> Outcome {
    // What, code, VM-entry injection, the vectoring information, its error code, instruction length.
    type Row = (&'static str, u64, u64, u32, u32, Option<u32>);
    let rows: [Row; 5] = [
        ("INT n", code![".byte 0xcd, 0x20"], 0, 0x8000_0420, 0, Some(2)),
        ("INT3", code![".byte 0xcc"], 0, 0x8000_0603, 0, Some(1)),
        ("#UD", code![".byte 0x0f, 0x0b"], 0, 0x8000_0306, 0, None),
        ("#GP", code![".byte 0x8e, 0xd9"], 0, 0x8000_0b0d, 0x7ff8, None),
        ("an injected interrupt", code!["nop"], 0x8000_0055, 0x8000_0055, 0, None),
    ];
    for (what, code, inject, info, error, len) in rows {
        let mut vm = tasks(ctx, code, 0x89)?;
        let idt = memory::page();
        for vector in 0..256 {
            memory::write(idt + 8 * vector, 0x28_u64 << 16 | 0x85 << 40);
        }
        vm.set(IDTR_BASE, idt)?;
        vm.set(GUEST_RFLAGS, 0x202)?;
        vm.set(ENTRY_INFO, inject)?;
        vm.regs.rcx = 0x7ffb;
        let e = vm.expect(reason::TASK_SWITCH)?;
        check!(format_args!("{what}: qualification"), e.qualification, 0xc000_0028_u64);
        check!(format_args!("{what}: IDT-vectoring information"), e.idt_info, info);
        if info & 0x800 != 0 {
            check!(format_args!("{what}: IDT-vectoring error code"), e.idt_code, error);
        }
        if let Some(len) = len {
            check!(format_args!("{what}: instruction length"), e.len, len);
        }
        check!(format_args!("{what}: RIP - code"), e.rip - vm.code, 0);
        check!(format_args!("{what}: interruption information"), e.info >> 31, 0);
    }
    Ok(())
}

/// What faults instead of switching: a busy TSS (#GP), one that is not present (#NP).
fn task_switch_faults(ctx: &mut Ctx) -> Outcome {
    let jump = code![".byte 0xea, 0, 0, 0, 0, 0x28, 0"];
    for (what, tss_type, vector) in [("busy", 0x8b, 13), ("not present", 0x09, 11)] {
        let mut vm = tasks(ctx, jump, tss_type)?;
        vm.set(EXCEPTIONS, 0xffff_ffff)?;
        let e = vm.expect(reason::EXCEPTION_NMI)?;
        check!(format_args!("{what}: vector"), e.info & 0xff, vector);
        check!(format_args!("{what}: error code"), e.code, 0x28);
    }
    Ok(())
}

/// Without RDPMC exiting: there are no counters, so that RDPMC is #GP.
fn rdpmc_off(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["rdpmc", "vmcall"])?;
    vm.regs.rcx = 0x4000_0100;
    let event = vm.expect_event(13)?;
    check!("error code", event.code, 0);
    Ok(())
}

/// Instructions whose exits can't occur here are #UD: RSM outside SMM, GETSEC without CR4.SMXE, TPAUSE and UMWAIT
/// without their control, ENCLS without SGX.
fn never(ctx: &mut Ctx) -> Outcome {
    for (what, code) in [
        ("RSM", code![".byte 0x0f, 0xaa"]),
        ("GETSEC", code![".byte 0x0f, 0x37"]),
        ("TPAUSE", code![".byte 0x66, 0x0f, 0xae, 0xf0"]),
        ("UMWAIT", code![".byte 0xf2, 0x0f, 0xae, 0xf0"]),
        ("ENCLS", code![".byte 0x0f, 0x01, 0xcf"]),
    ] {
        memory::reset();
        let mut vm = Vm::new(&ctx.caps, code)?;
        let event = vm.expect_event(6)?;
        check!(format_args!("{what}: RIP - code"), event.rip.wrapping_sub(code), 0);
    }
    Ok(())
}

fn real_mode(ctx: &mut Ctx) -> Outcome {
    // mov eax, cr0; mov bx, cs; cpuid; vmcall
    let mut vm =
        Vm::new(&ctx.caps, code![".byte 0x0f, 0x20, 0xc0, 0x8c, 0xcb, 0x0f, 0xa2, 0x0f, 0x01, 0xc1"])?;
    vm.real_mode(0x8000, 16)?;
    let e = vm.expect(reason::CPUID)?;
    check!("RIP", e.rip, 5);
    check!("CR0.PE that L2 sees", vm.regs.rax & 1, 0);
    check!("CS that L2 sees", vm.regs.rbx, 0x800);
    vm.skip_instruction(&e)?;
    let e = vm.finish()?;
    check!("RIP", e.rip, 7);
    check!("IA-32e mode guest", vm.get(ENTRY_CTL)? & u64::from(entry::IA32E), 0);
    Ok(())
}

fn protected_mode(ctx: &mut Ctx) -> Outcome {
    // mov eax, 12345678H; inc eax; vmcall: 40H is INC EAX in 32-bit code, a REX prefix in 64-bit code.
    let mut vm = Vm::new(&ctx.caps, code![".byte 0xb8, 0x78, 0x56, 0x34, 0x12, 0x40, 0x0f, 0x01, 0xc1"])?;
    vm.protected32()?;
    vm.finish()?;
    check!("RAX", vm.regs.rax, 0x1234_5679);
    Ok(())
}

/// The state that L2 has made is in the VMCS after the exit.
fn state_saved(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(
        &ctx.caps,
        code![
            "mov cr3, rax",
            "mov ds, ecx",
            "mov fs, ecx",
            "push 0x8d7",
            "popfq",
            "mov rsp, 0x123450",
            "mov r8, 0x88",
            "mov r15, 0xff",
            "mov rbp, 0xbb",
            "vmcall"
        ],
    )?;
    vm.regs.rax = cpu::cr3() | 0x18;
    vm.regs.rcx = 0x2b;
    let e = vm.finish()?;
    check!("CR3", vm.get(GUEST_CR3)?, cpu::cr3() | 0x18);
    check!("DS selector", vm.get(DS_SEL)?, 0x2b);
    check!("DS access rights", vm.get(DS_AR)?, 0xc0f3);
    check!("DS limit", vm.get(DS_LIMIT)?, 0xffff_ffff);
    check!("FS base", vm.get(FS_BASE)?, 0);
    check!("RFLAGS", vm.get(GUEST_RFLAGS)?, 0x8d7);
    check!("RSP", vm.get(GUEST_RSP)?, 0x12_3450);
    check!("RIP", vm.get(GUEST_RIP)?, e.rip);
    check!("CS access rights", vm.get(CS_AR)?, 0xa09b);
    check!("R8", vm.regs.r[0], 0x88);
    check!("R15", vm.regs.r[7], 0xff);
    check!("RBP", vm.regs.rbp, 0xbb);
    check!("activity", vm.get(ACTIVITY)?, 0);
    check!("interruptibility", vm.get(INTERRUPTIBILITY)?, 0);
    check!("link pointer", vm.get(LINK)?, u64::MAX);
    Ok(())
}

/// Host registers come from the VMCS.
fn host_state(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    let (cr0, cr4) = (cpu::cr0(), cpu::cr4());
    vm.set(HOST_CR0, cr0 ^ 1 << 16)?;
    vm.set(HOST_CR4, cr4 ^ 4)?;
    vm.set(HOST_CR3, cpu::cr3() | 8)?;
    vm.set(HOST_FS_BASE, 0xffff_8000_1234_5000)?;
    vm.set(HOST_GS_BASE, 0x1234)?;
    vm.set(HOST_SYSENTER_CS, 0x55)?;
    vm.set(HOST_SYSENTER_ESP, 0x66)?;
    vm.set(HOST_SYSENTER_EIP, 0x77)?;
    cpu::set_dr7(0x455).unwrap_or(());
    vm.finish()?;
    check!("CR0", cpu::cr0(), cr0 ^ 1 << 16);
    check!("CR4", cpu::cr4(), cr4 ^ 4);
    check!("CR3", cpu::cr3() & 8, 8);
    check!("FS base", cpu::msr(cpu::MSR_FS_BASE), 0xffff_8000_1234_5000_u64);
    check!("GS base", cpu::msr(cpu::MSR_GS_BASE), 0x1234);
    check!("IA32_SYSENTER_CS", cpu::msr(cpu::MSR_SYSENTER_CS), 0x55);
    check!("IA32_SYSENTER_ESP", cpu::msr(cpu::MSR_SYSENTER_ESP), 0x66);
    check!("IA32_SYSENTER_EIP", cpu::msr(cpu::MSR_SYSENTER_EIP), 0x77);
    check!("DR7", cpu::dr7(), 0x400);
    check!("IA32_DEBUGCTL", cpu::msr(cpu::MSR_DEBUGCTL), 0);
    for msr in [
        cpu::MSR_FS_BASE,
        cpu::MSR_GS_BASE,
        cpu::MSR_SYSENTER_CS,
        cpu::MSR_SYSENTER_ESP,
        cpu::MSR_SYSENTER_EIP,
    ] {
        let _ = cpu::wrmsr(msr, 0);
    }
    Ok(())
}

fn selector(which: &str) -> u64 {
    let value: u64;
    unsafe {
        match which {
            "cs" => core::arch::asm!("mov {0:e}, cs", out(reg) value),
            "ss" => core::arch::asm!("mov {0:e}, ss", out(reg) value),
            "ds" => core::arch::asm!("mov {0:e}, ds", out(reg) value),
            "es" => core::arch::asm!("mov {0:e}, es", out(reg) value),
            "fs" => core::arch::asm!("mov {0:e}, fs", out(reg) value),
            _ => core::arch::asm!("str {0:e}", out(reg) value),
        }
    }
    value & 0xffff
}

fn host_segments(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.set(HOST_DS, 0)?;
    vm.set(HOST_ES, 0x28)?;
    vm.set(HOST_FS, 0x10)?;
    vm.finish()?;
    check!("CS", selector("cs"), 8);
    check!("SS", selector("ss"), 0x10);
    check!("DS", selector("ds"), 0);
    check!("ES", selector("es"), 0x28);
    check!("FS", selector("fs"), 0x10);
    check!("TR", selector("tr"), trap::L1_TR);
    let mut pointer = [0_u16; 5];
    unsafe { core::arch::asm!("sgdt [{}]", in(reg) pointer.as_mut_ptr()) };
    check!("GDTR limit", pointer[0], 0xffff);
    unsafe { core::arch::asm!("sidt [{}]", in(reg) pointer.as_mut_ptr()) };
    check!("IDTR limit", pointer[0], 0xffff);
    unsafe { core::arch::asm!("mov ds, {0:e}", "mov es, {0:e}", "mov fs, {1:e}", in(reg) 0x10, in(reg) 0) };
    Ok(())
}

/// VM entry asks for identical bits 63:48 of RIP and leaves bit 47 to the fetch, which is #GP.
fn rip_not_canonical(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.set(EXCEPTIONS, 1 << 13)?;
    for rip in [1_u64 << 47, 0xffff_7fff_ffff_f000] {
        vm.set(GUEST_RIP, rip)?;
        let e = vm.expect(reason::EXCEPTION_NMI)?;
        check!("interruption information", e.info, 0x8000_0b0d_u32);
        check!("error code", e.code, 0);
        check!("RIP", e.rip, rip);
    }
    Ok(())
}

/// An exit clears the valid bit of the VM-entry interruption information.
fn entry_info_cleared(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.set(ENTRY_INFO, 0x8000_0306)?;
    vm.expect_event(6)?;
    check!("valid bit", vm.get(ENTRY_INFO)? >> 31, 0);
    Ok(())
}

/// L2 leaves long mode: the exit stores LMA in the entry controls.
fn save_lma(ctx: &mut Ctx) -> Outcome {
    if ctx.caps.misc >> 5 & 1 == 0 {
        return crate::guest::suite::skip("not offered");
    }
    // 64-bit, then compatibility mode by far return, then CR0.PG = 0.
    let mut vm = Vm::new(
        &ctx.caps,
        code![
            "push 0x18",
            "lea rax, [rip + 2f]",
            "push rax",
            ".byte 0x48, 0xcb",
            ".code32",
            "2: mov eax, cr0",
            "and eax, 0x7fffffff",
            "mov cr0, eax",
            "vmcall",
            ".code64"
        ],
    )?;
    vm.need_secondary(secondary::UNRESTRICTED)?;
    vm.finish()?;
    check!("IA-32e mode guest", vm.get(ENTRY_CTL)? & u64::from(entry::IA32E), 0);
    check!("CR0.PG of L2", vm.get(GUEST_CR0)? >> 31, 0);
    check!("L1 in long mode", cpu::msr(cpu::MSR_EFER) & 0x400, 0x400);
    Ok(())
}

fn debug_controls(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov rbx, dr7", "mov rax, 0x403", "mov dr7, rax", "vmcall"])?;
    vm.need_entry(entry::LOAD_DEBUG)?;
    vm.need_exit(exit::SAVE_DEBUG)?;
    vm.set(GUEST_DR7, 0x401)?;
    vm.finish()?;
    check!("DR7 that L2 sees", vm.regs.rbx, 0x401);
    check!("DR7 saved", vm.get(GUEST_DR7)?, 0x403);
    check!("DR7 of L1", cpu::dr7(), 0x400);
    Ok(())
}

fn efer_switch(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov ecx, 0xc0000080", "rdmsr", "vmcall"])?;
    vm.need_entry(entry::LOAD_EFER)?;
    vm.need_exit(exit::LOAD_EFER | exit::SAVE_EFER)?;
    vm.need_primary(primary::MSR_BITMAPS)?;
    vm.set(MSR_BITMAP, memory::page())?;
    let efer = cpu::msr(cpu::MSR_EFER);
    vm.set(GUEST_EFER, efer ^ 1)?;
    vm.set(HOST_EFER, efer)?;
    vm.finish()?;
    check!("EFER that L2 sees", vm.regs.rax, efer ^ 1);
    check!("EFER saved", vm.get(GUEST_EFER)?, efer ^ 1);
    check!("EFER of L1", cpu::msr(cpu::MSR_EFER), efer);
    Ok(())
}

fn pat_switch(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov ecx, 0x277", "rdmsr", "xor al, 7", "wrmsr", "vmcall"])?;
    vm.need_entry(entry::LOAD_PAT)?;
    vm.need_exit(exit::LOAD_PAT | exit::SAVE_PAT)?;
    vm.need_primary(primary::MSR_BITMAPS)?;
    vm.set(MSR_BITMAP, memory::page())?;
    vm.set(GUEST_PAT, 0x0007_0406_0007_0406)?;
    vm.set(HOST_PAT, 0x0007_0406_0007_0506)?;
    vm.finish()?;
    check!("PAT saved", vm.get(GUEST_PAT)?, 0x0007_0406_0007_0401_u64);
    check!("PAT of L1", cpu::msr(cpu::MSR_PAT), 0x0007_0406_0007_0506_u64);
    let _: Exit = Exit::default();
    Ok(())
}
