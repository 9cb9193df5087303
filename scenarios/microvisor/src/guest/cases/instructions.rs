//! Failures and effects of the VMX instructions in L1 (SDM Vol. 3C ch. 31).

use core::arch::asm;

use super::cases;
use crate::guest::fields::*;
use crate::guest::suite::{Ctx, Outcome, check, enter_vmx, fail, skip};
use crate::guest::vm::{Exit, Vm, code, ok};
use crate::guest::vmx::{self, Vmx, VmxError};
use crate::guest::{cpu, memory, trap};

cases! { true;
    "instr.capabilities.basic" "Vol. 3D A.1" basic;
    "instr.capabilities.controls" "Vol. 3D A.2" control_msrs;
    "instr.capabilities.fixed_bits" "Vol. 3D A.7" fixed_bits;
    "instr.capabilities.vmcs_enum" "Vol. 3D A.9" vmcs_enum;
    "instr.capabilities.read_only" "Vol. 3D A" capabilities_read_only;
    "instr.feature_control.locked" "Vol. 3C 24.7" feature_control_locked;
    "instr.cr.fixed_in_operation" "Vol. 3C 24.8" fixed_in_operation;
    "instr.vmxon.without_vmxe" "Vol. 3C 31.3 VMXON" vmxon_without_vmxe;
    "instr.vmxon.cpl3" "Vol. 3C 31.3 VMXON" vmxon_cpl3;
    "instr.vmxon.fixed_bits" "Vol. 3C 31.3 VMXON" vmxon_fixed_bits;
    "instr.vmxon.address" "Vol. 3C 31.3 VMXON" vmxon_address;
    "instr.vmxon.revision" "Vol. 3C 31.3 VMXON" vmxon_revision;
    "instr.vmxon.in_root" "Vol. 3C 31.3 VMXON" vmxon_in_root;
    "instr.vmxon.memory_operand" "Vol. 3C 31.3 VMXON" vmxon_memory_operand;
    "instr.vmxoff" "Vol. 3C 31.3 VMXOFF" vmxoff;
    "instr.vmxoff.cpl3" "Vol. 3C 31.3 VMXOFF" vmxoff_cpl3;
    "instr.outside_operation" "Vol. 3C 31.3" outside_operation;
    "instr.cpl3" "Vol. 3C 31.3" all_cpl3;
    "instr.compatibility_mode" "Vol. 3C 31.3" compatibility_mode;
    "instr.register_operand" "Vol. 3C 31.3" register_operand;
    "instr.memory_operand.not_canonical" "Vol. 3C 31.3" operand_not_canonical;
    "instr.memory_operand.stack" "Vol. 3C 31.3" operand_stack;
    "instr.memory_operand.page_fault" "Vol. 3C 31.3" operand_page_fault;
    "instr.memory_operand.across_pages" "Vol. 3C 31.3" operand_across_pages;
    "instr.memory_operand.no_memory" "Vol. 3C 31.3" operand_no_memory;
    "instr.memory_operand.segment_base" "Vol. 3C 31.3" operand_segment_base;
    "instr.vmclear.address" "Vol. 3C 31.3 VMCLEAR" vmclear_address;
    "instr.vmclear.vmxon_pointer" "Vol. 3C 31.3 VMCLEAR" vmclear_vmxon_pointer;
    "instr.vmclear.current" "Vol. 3C 31.3 VMCLEAR" vmclear_current;
    "instr.vmptrld.address" "Vol. 3C 31.3 VMPTRLD" vmptrld_address;
    "instr.vmptrld.vmxon_pointer" "Vol. 3C 31.3 VMPTRLD" vmptrld_vmxon_pointer;
    "instr.vmptrld.revision" "Vol. 3C 31.3 VMPTRLD" vmptrld_revision;
    "instr.vmptrst" "Vol. 3C 31.3 VMPTRST" vmptrst;
    "instr.no_current_vmcs" "Vol. 3C 31.2" no_current_vmcs;
    "instr.vmread.unsupported" "Vol. 3C 31.3 VMREAD" vmread_unsupported;
    "instr.vmwrite.unsupported" "Vol. 3C 31.3 VMWRITE" vmwrite_unsupported;
    "instr.vmwrite.read_only" "Vol. 3C 31.3 VMWRITE" vmwrite_read_only;
    "instr.vmread.memory_destination" "Vol. 3C 31.3 VMREAD" vmread_memory;
    "instr.fields.all" "Vol. 3D B" all_fields;
    "instr.fields.high_halves" "Vol. 3C 25.11.2" high_halves;
    "instr.fields.widths" "Vol. 3C 25.11.2" field_widths;
    "instr.vmcs.persistence" "Vol. 3C 25.1" persistence;
    "instr.vmcs.two" "Vol. 3C 25.1" two_vmcss;
    "instr.vmlaunch.not_clear" "Vol. 3C 31.3 VMLAUNCH" vmlaunch_not_clear;
    "instr.vmresume.not_launched" "Vol. 3C 31.3 VMRESUME" vmresume_not_launched;
    "instr.vmresume.after_vmclear" "Vol. 3C 31.3 VMRESUME" vmresume_after_vmclear;
    "instr.vmlaunch.mov_ss" "Vol. 3C 31.3 VMLAUNCH" vmlaunch_mov_ss;
    "instr.vmlaunch.flags" "Vol. 3C 31.2" vmlaunch_flags;
    "instr.vmlaunch.order" "Vol. 3C 27.1" check_order;
    "instr.invept" "Vol. 3C 31.3 INVEPT" invept;
    "instr.invvpid" "Vol. 3C 31.3 INVVPID" invvpid;
    "instr.vmcall.in_root" "Vol. 3C 31.3 VMCALL" vmcall_in_root;
    "instr.vmfunc.outside_l2" "Vol. 3C 31.3 VMFUNC" vmfunc_outside;
    "instr.error_field" "Vol. 3C 31.4" error_field;
}

fn fails(what: &'static str, got: Vmx, expected: VmxError) -> Outcome {
    match got {
        Err(e) if e == expected => Ok(()),
        Err(VmxError::Fault(f)) if matches!(expected, VmxError::Fault(e) if e.vector == f.vector && e.code == f.code) => {
            Ok(())
        }
        got => fail!("{what}: expected {expected:x?}, got {got:x?}"),
    }
}

fn exception(vector: u8, code: u32) -> VmxError {
    VmxError::Fault(trap::Fault { vector, code, rip: 0, cr2: 0 })
}

const UD: u8 = 6;
const SS: u8 = 12;
const GP: u8 = 13;
const PF: u8 = 14;

fn region(ctx: &Ctx) -> u64 {
    let at = memory::page();
    memory::write(at, ctx.caps.revision());
    at
}

/// Runs code at privilege level 3 until it faults; the fault is the result.
fn in_user(code: u64) -> Result<(), trap::Fault> {
    run_at(code, 0x23, 0x2b)
}

/// Runs code with these selectors until it faults.
fn run_at(code: u64, cs: u64, ss: u64) -> Result<(), trap::Fault> {
    let stack = memory::page() + 4096;
    unsafe {
        (&raw mut trap::TRAP.vector).write_volatile(trap::NONE);
        asm!(
            "push rbx",
            "push rbp",
            "mov [rip + {fixup_rsp}], rsp",
            "lea rax, [rip + 66f]",
            "mov [rip + {fixup}], rax",
            "push {ss}",
            "push {stack}",
            "push 2",
            "push {cs}",
            "push {code}",
            "iretq",
            "66:",
            "mov eax, 0x10",
            "mov ds, eax",
            "mov es, eax",
            "pop rbp",
            "pop rbx",
            ss = in(reg) ss,
            cs = in(reg) cs,
            code = in(reg) code,
            stack = in(reg) stack,
            fixup = sym trap::FIXUP,
            fixup_rsp = sym trap::FIXUP_RSP,
            out("rax") _,
        );
        (&raw mut trap::FIXUP_RSP).write_volatile(0);
    }
    trap::last().map_or(Ok(()), Err)
}

fn faults_at(what: &'static str, got: Result<(), trap::Fault>, vector: u8, rip: u64) -> Outcome {
    match got {
        Err(f) if f.vector == vector && f.rip == rip => Ok(()),
        got => fail!("{what}: expected exception {vector} at {rip:#x}, got {got:x?}"),
    }
}

fn basic(ctx: &mut Ctx) -> Outcome {
    let basic = ctx.caps.basic;
    check!("bit 31", basic >> 31 & 1, 0);
    let size = basic >> 32 & 0x1fff;
    if size == 0 || size > 4096 {
        fail!("region size: expected 1 to 4096, got {size}")
    }
    check!("memory type (WB)", basic >> 50 & 0xf, 6);
    check!("INS/OUTS information", basic >> 54 & 1, 1);
    check!("bits 63:57", basic >> 57, 0);
    Ok(())
}

fn control_msrs(ctx: &mut Ctx) -> Outcome {
    let true_forms = ctx.caps.basic >> 55 & 1 != 0;
    // MSR, reserved bits that are always 1 (the default1 class).
    for (msr, default1) in [(0x481, 0x16), (0x482, 0x0401_e172), (0x483, 0x0003_6dff), (0x484, 0x11ff)] {
        let value = cpu::msr(msr);
        let (one, may) = (value & 0xffff_ffff, value >> 32);
        if one & !may != 0 {
            fail!("MSR {msr:#x}: bits {:#x} must and may not be 1", one & !may)
        }
        check!(format_args!("MSR {msr:#x}: the default1 class"), one & default1, default1);
        if true_forms {
            let form = cpu::msr(msr + 12);
            check!(format_args!("MSR {:#x}: allowed 1-settings as without TRUE", msr + 12), form >> 32, may);
            if form & 0xffff_ffff & !one != 0 {
                fail!("MSR {:#x} demands more than MSR {msr:#x}", msr + 12)
            }
        }
    }
    if ctx.caps.secondary.may != 0 {
        check!("MSR 0x48b: allowed 0-settings", ctx.caps.secondary.one, 0);
    }
    Ok(())
}

fn fixed_bits(ctx: &mut Ctx) -> Outcome {
    let c = ctx.caps;
    check!("CR0 bits that must be and must not be 1", c.cr0_fixed[0] & !c.cr0_fixed[1], 0);
    check!("CR4 bits that must be and must not be 1", c.cr4_fixed[0] & !c.cr4_fixed[1], 0);
    check!("CR0: PE, NE, PG", c.cr0_fixed[0] & 0x8000_0021, 0x8000_0021_u64);
    check!("CR4: VMXE", c.cr4_fixed[0] & 0x2000, 0x2000);
    Ok(())
}

fn vmcs_enum(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    let highest = cpu::msr(0x48a) >> 1 & 0x1ff;
    // No field has a higher index, in any width and type.
    for width in 0..4_u32 {
        for ty in 0..4_u32 {
            for index in highest as u32 + 1..0x40 {
                let field = width << 13 | ty << 10 | index << 1;
                if let Ok(v) = vmx::vmread(field) {
                    fail!("field {field:#x} with index {index:#x} above {highest:#x} reads {v:#x}")
                }
            }
        }
    }
    vm.make_current()
}

fn capabilities_read_only(_: &mut Ctx) -> Outcome {
    for msr in 0x480..=0x491 {
        if let Ok(value) = cpu::rdmsr(msr) {
            match cpu::wrmsr(msr, value) {
                Err(f) => check!("vector", f.vector, GP),
                Ok(()) => fail!("WRMSR of {msr:#x}: expected #GP"),
            }
        }
    }
    Ok(())
}

fn feature_control_locked(_: &mut Ctx) -> Outcome {
    let value = cpu::msr(cpu::MSR_FEATURE_CONTROL);
    check!("lock and VMX outside SMX", value & 5, 5);
    match cpu::wrmsr(cpu::MSR_FEATURE_CONTROL, value) {
        Err(f) => check!("vector", f.vector, GP),
        Ok(()) => fail!("WRMSR of IA32_FEATURE_CONTROL when locked: expected #GP"),
    }
    Ok(())
}

fn fixed_in_operation(_: &mut Ctx) -> Outcome {
    let (cr0, cr4) = (cpu::cr0(), cpu::cr4());
    for (what, got) in [
        ("CR0.NE = 0", cpu::set_cr0(cr0 & !0x20)),
        ("CR0.PG = 0", cpu::set_cr0(cr0 & !(1 << 31))),
        ("CR4.VMXE = 0", cpu::set_cr4(cr4 & !0x2000)),
    ] {
        match got {
            Err(f) => check!(what, f.vector, GP),
            Ok(()) => fail!("{what} in VMX operation: expected #GP"),
        }
    }
    check!("CR0", cpu::cr0(), cr0);
    check!("CR4", cpu::cr4(), cr4);
    Ok(())
}

fn off() -> Outcome {
    ok("VMXOFF", vmx::vmxoff())
}

fn vmxon_without_vmxe(ctx: &mut Ctx) -> Outcome {
    off()?;
    if cpu::set_cr4(cpu::cr4() & !0x2000).is_err() {
        fail!("CR4.VMXE cannot be cleared outside VMX operation")
    }
    fails("VMXON with CR4.VMXE = 0", vmx::vmxon(ctx.vmxon), exception(UD, 0))?;
    enter_vmx(ctx)
}

fn vmxon_cpl3(ctx: &mut Ctx) -> Outcome {
    let code = code!["vmxon [rsp - 16]"];
    off()?;
    faults_at("VMXON at privilege level 3", in_user(code), GP, code)?;
    enter_vmx(ctx)?;
    faults_at("VMXON at privilege level 3 in VMX operation", in_user(code), GP, code)
}

fn vmxon_fixed_bits(ctx: &mut Ctx) -> Outcome {
    off()?;
    let cr0 = cpu::cr0();
    if cpu::set_cr0(cr0 & !0x20).is_err() {
        fail!("CR0.NE cannot be cleared outside VMX operation")
    }
    fails("VMXON with CR0.NE = 0", vmx::vmxon(ctx.vmxon), exception(GP, 0))?;
    let _ = cpu::set_cr0(cr0);
    enter_vmx(ctx)
}

fn vmxon_address(ctx: &mut Ctx) -> Outcome {
    off()?;
    for address in [ctx.vmxon + 1, ctx.vmxon + 0x800, ctx.caps.beyond(), 1 << 63 | ctx.vmxon] {
        fails("VMXON with a wrong address", vmx::vmxon(address), VmxError::Invalid)?;
    }
    enter_vmx(ctx)
}

fn vmxon_revision(ctx: &mut Ctx) -> Outcome {
    off()?;
    memory::write(ctx.vmxon, ctx.caps.revision() ^ 1);
    fails("VMXON with a wrong revision identifier", vmx::vmxon(ctx.vmxon), VmxError::Invalid)?;
    memory::write(ctx.vmxon, ctx.caps.revision() | 1 << 31);
    fails("VMXON with bit 31 of the revision identifier", vmx::vmxon(ctx.vmxon), VmxError::Invalid)?;
    memory::write(ctx.vmxon, ctx.caps.revision());
    ok("VMXON", vmx::vmxon(ctx.vmxon))
}

fn vmxon_in_root(ctx: &mut Ctx) -> Outcome {
    fails("VMXON in VMX root operation without a current VMCS", vmx::vmxon(ctx.vmxon), VmxError::Invalid)?;
    let _vm = Vm::new(&ctx.caps, 0)?;
    fails("VMXON in VMX root operation", vmx::vmxon(ctx.vmxon), VmxError::Valid(15))
}

fn vmxon_memory_operand(ctx: &mut Ctx) -> Outcome {
    off()?;
    fails(
        "VMXON of a page that is not present",
        vmx::vmxon_at((5_u64 << 30) as *const u64),
        exception(PF, 0),
    )?;
    fails("VMXON of a non-canonical address", vmx::vmxon_at((1_u64 << 63) as *const u64), exception(GP, 0))?;
    enter_vmx(ctx)
}

fn vmxoff(ctx: &mut Ctx) -> Outcome {
    off()?;
    fails("VMXOFF outside VMX operation", vmx::vmxoff(), exception(UD, 0))?;
    // CR0 and CR4 are free again.
    let cr4 = cpu::cr4();
    if cpu::set_cr4(cr4 & !0x2000).is_err() {
        fail!("CR4.VMXE cannot be cleared after VMXOFF")
    }
    let _ = cpu::set_cr4(cr4);
    enter_vmx(ctx)
}

fn vmxoff_cpl3(_: &mut Ctx) -> Outcome {
    let code = code!["vmxoff"];
    faults_at("VMXOFF at privilege level 3", in_user(code), GP, code)
}

fn outside_operation(ctx: &mut Ctx) -> Outcome {
    let region = region(ctx);
    off()?;
    let ud = exception(UD, 0);
    fails("VMCLEAR outside VMX operation", vmx::vmclear(region), ud)?;
    fails("VMPTRLD outside VMX operation", vmx::vmptrld(region), ud)?;
    fails("VMPTRST outside VMX operation", vmx::vmptrst().map(drop), ud)?;
    fails("VMREAD outside VMX operation", vmx::vmread(REASON).map(drop), ud)?;
    fails("VMWRITE outside VMX operation", vmx::vmwrite(GUEST_RIP, 0), ud)?;
    fails("INVEPT outside VMX operation", vmx::invept(2, 0), ud)?;
    fails("INVVPID outside VMX operation", vmx::invvpid(2, 0, 0), ud)?;
    fails("VMCALL outside VMX operation", vmx::vmcall(), ud)?;
    fails("VMLAUNCH outside VMX operation", bare("vmlaunch"), ud)?;
    fails("VMRESUME outside VMX operation", bare("vmresume"), ud)?;
    enter_vmx(ctx)
}

/// VMLAUNCH or VMRESUME that is expected to fail.
fn bare(instruction: &str) -> Vmx {
    let flags = match instruction {
        "vmlaunch" => trap::guarded!("push 0x8d7\npopfq\nvmlaunch")?,
        _ => trap::guarded!("push 0x8d7\npopfq\nvmresume")?,
    };
    vmx::outcome(flags)
}

fn all_cpl3(ctx: &mut Ctx) -> Outcome {
    let _vm = Vm::new(&ctx.caps, 0)?;
    for (what, code) in [
        ("VMCLEAR", code!["vmclear [rsp - 16]"]),
        ("VMPTRLD", code!["vmptrld [rsp - 16]"]),
        ("VMPTRST", code!["vmptrst [rsp - 16]"]),
        ("VMREAD", code!["vmread rax, rcx"]),
        ("VMWRITE", code!["vmwrite rax, rcx"]),
        ("VMLAUNCH", code!["vmlaunch"]),
        ("VMRESUME", code!["vmresume"]),
        ("VMCALL", code!["vmcall"]),
    ] {
        faults_at(what, in_user(code), GP, code)?;
    }
    if ctx.caps.secondary.can(secondary::EPT) {
        let code = code!["invept rax, [rsp - 16]"];
        faults_at("INVEPT", in_user(code), GP, code)?;
    }
    if ctx.caps.secondary.can(secondary::VPID) {
        let code = code!["invvpid rax, [rsp - 16]"];
        faults_at("INVVPID", in_user(code), GP, code)?;
    }
    Ok(())
}

/// In compatibility mode the instructions are #UD.
fn compatibility_mode(ctx: &mut Ctx) -> Outcome {
    let _vm = Vm::new(&ctx.caps, 0)?;
    for (what, code) in [
        ("VMPTRST", code![".byte 0x0f, 0xc7, 0x3c, 0x24"]),
        ("VMPTRLD", code![".byte 0x0f, 0xc7, 0x34, 0x24"]),
        ("VMCLEAR", code![".byte 0x66, 0x0f, 0xc7, 0x34, 0x24"]),
        ("VMXON", code![".byte 0xf3, 0x0f, 0xc7, 0x34, 0x24"]),
        ("VMREAD", code![".byte 0x0f, 0x78, 0xc8"]),
        ("VMWRITE", code![".byte 0x0f, 0x79, 0xc1"]),
        ("VMLAUNCH", code![".byte 0x0f, 0x01, 0xc2"]),
        ("VMRESUME", code![".byte 0x0f, 0x01, 0xc3"]),
        ("VMXOFF", code![".byte 0x0f, 0x01, 0xc4"]),
        ("VMCALL", code![".byte 0x0f, 0x01, 0xc1"]),
    ] {
        faults_at(what, run_at(code, 0x18, 0x10), UD, code)?;
    }
    Ok(())
}

/// Register forms of what takes memory only are #UD or other instructions.
fn register_operand(ctx: &mut Ctx) -> Outcome {
    let _vm = Vm::new(&ctx.caps, 0)?;
    let got = trap::guarded!(".byte 0x66, 0x0f, 0x38, 0x80, 0xc0").map(drop).map_err(VmxError::Fault);
    fails("INVEPT with a register for memory", got, exception(UD, 0))?;
    let got = trap::guarded!(".byte 0x66, 0x0f, 0x38, 0x81, 0xc0").map(drop).map_err(VmxError::Fault);
    fails("INVVPID with a register for memory", got, exception(UD, 0))?;
    let got = trap::guarded!(".byte 0xf0, 0x0f, 0x01, 0xc4").map(drop).map_err(VmxError::Fault);
    fails("LOCK VMXOFF", got, exception(UD, 0))
}

type Taking = fn(*const u64) -> Vmx;
const TAKING: [(&str, Taking); 3] =
    [("VMCLEAR", vmx::vmclear_at), ("VMPTRLD", vmx::vmptrld_at), ("VMPTRST", vmx::vmptrst_at)];

fn operand_not_canonical(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    for (what, f) in TAKING {
        fails(what, f((1_u64 << 47) as *const u64), exception(GP, 0))?;
    }
    if ctx.caps.secondary.can(secondary::EPT) {
        fails("INVEPT", vmx::invept_at(2, (1_u64 << 47) as *const u64), exception(GP, 0))?;
    }
    let at = 1_u64 << 47;
    let got = trap::guarded!("vmread [{at}], {f}", at = in(reg) at, f = in(reg) u64::from(GUEST_RIP));
    fails("VMREAD", got.map(drop).map_err(VmxError::Fault), exception(GP, 0))?;
    let got = trap::guarded!("vmwrite {f}, [{at}]", at = in(reg) at, f = in(reg) u64::from(GUEST_RIP));
    fails("VMWRITE", got.map(drop).map_err(VmxError::Fault), exception(GP, 0))?;
    check!("current VMCS", ok("VMPTRST", vmx::vmptrst())?, vm.vmcs);
    Ok(())
}

/// A non-canonical address in the stack segment is #SS(0).
fn operand_stack(ctx: &mut Ctx) -> Outcome {
    let _vm = Vm::new(&ctx.caps, 0)?;
    // RSP as base register makes it the stack segment.
    let got = trap::guarded!("vmptrst [rsp + {i}]", i = in(reg) 1_u64 << 47);
    fails("VMPTRST", got.map(drop).map_err(VmxError::Fault), exception(SS, 0))
}

fn operand_page_fault(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    let at = 5_u64 << 30;
    for (what, f) in TAKING {
        // VMPTRST writes.
        let code = if what == "VMPTRST" { 2 } else { 0 };
        match f(at as *const u64) {
            Err(VmxError::Fault(fault)) => {
                check!(what, fault.vector, PF);
                check!(format_args!("{what}: error code"), fault.code, code);
                check!(format_args!("{what}: CR2"), fault.cr2, at);
            }
            got => fail!("{what}: expected #PF, got {got:x?}"),
        }
    }
    let got = trap::guarded!("vmread [{at}], {f}", at = in(reg) at, f = in(reg) u64::from(GUEST_RIP));
    fails("VMREAD", got.map(drop).map_err(VmxError::Fault), exception(PF, 2))?;
    let got = trap::guarded!("vmwrite {f}, [{at}]", at = in(reg) at, f = in(reg) u64::from(GUEST_RIP));
    fails("VMWRITE", got.map(drop).map_err(VmxError::Fault), exception(PF, 0))?;
    check!("current VMCS", ok("VMPTRST", vmx::vmptrst())?, vm.vmcs);
    Ok(())
}

fn operand_across_pages(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    let pages = memory::pages(2);
    let at = (pages + 4096 - 3) as *mut u64;
    ok("VMPTRST", vmx::vmptrst_at(at))?;
    check!("what VMPTRST stored", unsafe { at.read_unaligned() }, vm.vmcs);
    ok("VMPTRLD", vmx::vmptrld_at(at))?;
    check!("current VMCS", ok("VMPTRST", vmx::vmptrst())?, vm.vmcs);
    Ok(())
}

/// FS has a base; index and displacement count.
/// Where there is no memory, reads give ones and writes are lost: the operand is what any load or store would see.
fn operand_no_memory(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    let nowhere = 0x8000_0000_u64 as *mut u64;
    check!("a load", memory::read::<u64>(nowhere as u64), u64::MAX);
    ok("VMPTRST", vmx::vmptrst_at(nowhere))?;
    fails("VMPTRLD", vmx::vmptrld_at(nowhere), VmxError::Valid(9))?;
    fails("VMCLEAR", vmx::vmclear_at(nowhere), VmxError::Valid(2))?;
    if ctx.caps.secondary.can(secondary::EPT) {
        fails("INVEPT", vmx::invept_at(1, nowhere), VmxError::Valid(28))?;
    }
    check!("the current VMCS", vmx::vmptrst().unwrap_or(0), vm.vmcs);
    let mut flags =
        trap::guarded!("push 0x8d7\npopfq\nvmread [{at}], {f}", at = in(reg) nowhere, f = in(reg) 0x681e_u64);
    ok("VMREAD", flags.map_err(VmxError::from).and_then(vmx::outcome))?;
    flags = trap::guarded!("push 0x8d7\npopfq\nvmwrite {f}, [{at}]", at = in(reg) nowhere, f = in(reg) 0x681e_u64);
    ok("VMWRITE", flags.map_err(VmxError::from).and_then(vmx::outcome))?;
    check!("the field", vm.get(GUEST_RIP)?, u64::MAX);
    off()?;
    fails("VMXON", vmx::vmxon_at(nowhere), VmxError::Invalid)?;
    enter_vmx(ctx)
}

fn operand_segment_base(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    let page = memory::page();
    let saved = cpu::msr(cpu::MSR_FS_BASE);
    let _ = cpu::wrmsr(cpu::MSR_FS_BASE, page);
    let got = trap::guarded!("vmptrst fs:[{i} * 8 + 0x20]", i = in(reg) 3_u64);
    let _ = cpu::wrmsr(cpu::MSR_FS_BASE, saved);
    check!("fault", got.is_err(), false);
    check!("what VMPTRST stored", memory::read::<u64>(page + 0x38), vm.vmcs);
    Ok(())
}

fn vmclear_address(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    for address in [vm.vmcs + 1, vm.vmcs + 0x800, ctx.caps.beyond(), 1 << 63] {
        fails("VMCLEAR with a wrong address", vmx::vmclear(address), VmxError::Valid(2))?;
    }
    Ok(())
}

fn vmclear_vmxon_pointer(ctx: &mut Ctx) -> Outcome {
    let _vm = Vm::new(&ctx.caps, 0)?;
    fails("VMCLEAR of the VMXON region", vmx::vmclear(ctx.vmxon), VmxError::Valid(3))
}

fn vmclear_current(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    // Another VMCS: the current one stays.
    ok("VMCLEAR of another VMCS", vmx::vmclear(region(ctx)))?;
    check!("current VMCS", ok("VMPTRST", vmx::vmptrst())?, vm.vmcs);
    ok("VMCLEAR of the current VMCS", vmx::vmclear(vm.vmcs))?;
    check!("current VMCS after VMCLEAR", ok("VMPTRST", vmx::vmptrst())?, u64::MAX);
    Ok(())
}

fn vmptrld_address(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    for address in [vm.vmcs + 1, vm.vmcs + 0x800, ctx.caps.beyond(), 1 << 63] {
        fails("VMPTRLD with a wrong address", vmx::vmptrld(address), VmxError::Valid(9))?;
    }
    check!("current VMCS", ok("VMPTRST", vmx::vmptrst())?, vm.vmcs);
    Ok(())
}

fn vmptrld_vmxon_pointer(ctx: &mut Ctx) -> Outcome {
    let _vm = Vm::new(&ctx.caps, 0)?;
    fails("VMPTRLD of the VMXON region", vmx::vmptrld(ctx.vmxon), VmxError::Valid(10))
}

fn vmptrld_revision(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    let other = memory::page();
    memory::write(other, ctx.caps.revision() ^ 1);
    fails("VMPTRLD with a wrong revision identifier", vmx::vmptrld(other), VmxError::Valid(11))?;
    memory::write(other, ctx.caps.revision() | 1 << 31);
    if ctx.caps.secondary.can(secondary::SHADOWING) {
        ok("VMPTRLD of a shadow VMCS", vmx::vmptrld(other))?;
        ok("VMCLEAR of a shadow VMCS", vmx::vmclear(other))?;
        vm.make_current()?;
    } else {
        fails("VMPTRLD of a shadow VMCS", vmx::vmptrld(other), VmxError::Valid(11))?;
    }
    check!("current VMCS", ok("VMPTRST", vmx::vmptrst())?, vm.vmcs);
    Ok(())
}

fn vmptrst(ctx: &mut Ctx) -> Outcome {
    check!("without a current VMCS", ok("VMPTRST", vmx::vmptrst())?, u64::MAX);
    let vm = Vm::new(&ctx.caps, 0)?;
    check!("with one", ok("VMPTRST", vmx::vmptrst())?, vm.vmcs);
    Ok(())
}

fn no_current_vmcs(ctx: &mut Ctx) -> Outcome {
    fails("VMREAD", vmx::vmread(REASON).map(drop), VmxError::Invalid)?;
    fails("VMWRITE", vmx::vmwrite(GUEST_RIP, 0), VmxError::Invalid)?;
    fails("VMLAUNCH", bare("vmlaunch"), VmxError::Invalid)?;
    fails("VMRESUME", bare("vmresume"), VmxError::Invalid)?;
    fails("VMCLEAR of a wrong address", vmx::vmclear(1), VmxError::Invalid)?;
    fails("VMPTRLD of a wrong address", vmx::vmptrld(1), VmxError::Invalid)?;
    fails("VMPTRLD of the VMXON region", vmx::vmptrld(ctx.vmxon), VmxError::Invalid)?;
    fails("VMCALL", vmx::vmcall(), VmxError::Invalid)
}

fn vmread_unsupported(ctx: &mut Ctx) -> Outcome {
    let _vm = Vm::new(&ctx.caps, 0)?;
    // Unused index, bit 12, bits above 14, the high half of a 32-bit field.
    for field in [0x0ffe, 0x1800, 0x5000, 0x8000, 1 << 32 | u64::from(GUEST_RIP), 0x4001] {
        fails("VMREAD of no field", vmx::vmread64(field).map(drop), VmxError::Valid(12))?;
    }
    Ok(())
}

fn vmwrite_unsupported(ctx: &mut Ctx) -> Outcome {
    let _vm = Vm::new(&ctx.caps, 0)?;
    for field in [0x0ffe, 0x1800, 0x5000, 0x8000, 1 << 32 | u64::from(GUEST_RIP), 0x4001] {
        fails("VMWRITE of no field", vmx::vmwrite64(field, 0), VmxError::Valid(12))?;
    }
    Ok(())
}

fn vmwrite_read_only(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    let any = ctx.caps.misc >> 29 & 1 != 0;
    for field in [VM_ERROR, REASON, QUALIFICATION, INSTR_LEN, GUEST_LINEAR, GUEST_PHYS] {
        match any {
            true => {
                vm.set(field, 0x123)?;
                check!(format_args!("field {field:#x}"), vm.get(field)?, 0x123);
            }
            false => fails("VMWRITE of a read-only field", vmx::vmwrite(field, 1), VmxError::Valid(13))?,
        }
    }
    Ok(())
}

fn vmread_memory(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    let page = memory::page();
    memory::write(page, u64::MAX);
    vm.set(CS_SEL, 0x1234)?;
    let got = trap::guarded!("vmread [{at}], {f}", at = in(reg) page, f = in(reg) u64::from(CS_SEL));
    check!("fault", got.is_err(), false);
    check!("all 64 bits are written", memory::read::<u64>(page), 0x1234);
    memory::write(page, 0x8765_4321_0000_5678_u64);
    let got = trap::guarded!("vmwrite {f}, [{at}]", at = in(reg) page, f = in(reg) u64::from(CS_SEL));
    check!("fault", got.is_err(), false);
    check!("the field", vm.get(CS_SEL)?, 0x5678);
    Ok(())
}

/// Fields that exist on every processor with the controls that are offered.
const ALWAYS: &[u32] = &[
    ES_SEL,
    CS_SEL,
    SS_SEL,
    DS_SEL,
    FS_SEL,
    GS_SEL,
    LDTR_SEL,
    TR_SEL,
    HOST_ES,
    HOST_CS,
    HOST_SS,
    HOST_DS,
    HOST_FS,
    HOST_GS,
    HOST_TR,
    IO_A,
    IO_B,
    EXIT_STORE_ADDR,
    EXIT_LOAD_ADDR,
    ENTRY_LOAD_ADDR,
    TSC_OFFSET,
    LINK,
    GUEST_DEBUGCTL,
    PIN,
    PRIMARY,
    EXCEPTIONS,
    PF_MASK,
    PF_MATCH,
    CR3_COUNT,
    EXIT_CTL,
    EXIT_STORE_COUNT,
    EXIT_LOAD_COUNT,
    ENTRY_CTL,
    ENTRY_LOAD_COUNT,
    ENTRY_INFO,
    ENTRY_CODE,
    ENTRY_LEN,
    ES_LIMIT,
    CS_LIMIT,
    SS_LIMIT,
    DS_LIMIT,
    FS_LIMIT,
    GS_LIMIT,
    LDTR_LIMIT,
    TR_LIMIT,
    GDTR_LIMIT,
    IDTR_LIMIT,
    ES_AR,
    CS_AR,
    SS_AR,
    DS_AR,
    FS_AR,
    GS_AR,
    LDTR_AR,
    TR_AR,
    INTERRUPTIBILITY,
    ACTIVITY,
    GUEST_SYSENTER_CS,
    HOST_SYSENTER_CS,
    CR0_MASK,
    CR4_MASK,
    CR0_SHADOW,
    CR4_SHADOW,
    GUEST_CR0,
    GUEST_CR3,
    GUEST_CR4,
    ES_BASE,
    CS_BASE,
    SS_BASE,
    DS_BASE,
    FS_BASE,
    GS_BASE,
    LDTR_BASE,
    TR_BASE,
    GDTR_BASE,
    IDTR_BASE,
    GUEST_DR7,
    GUEST_RSP,
    GUEST_RIP,
    GUEST_RFLAGS,
    PENDING_DEBUG,
    GUEST_SYSENTER_ESP,
    GUEST_SYSENTER_EIP,
    HOST_CR0,
    HOST_CR3,
    HOST_CR4,
    HOST_FS_BASE,
    HOST_GS_BASE,
    HOST_TR_BASE,
    HOST_GDTR,
    HOST_IDTR,
    HOST_SYSENTER_ESP,
    HOST_SYSENTER_EIP,
    HOST_RSP,
    HOST_RIP,
];

/// The bits that a field's width gives it (SDM Vol. 3C table 25-20).
fn width_mask(field: u32) -> u64 {
    match field >> 13 & 3 {
        0 => 0xffff,
        2 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

fn pattern(field: u32, seed: u64) -> u64 {
    let mut x = (u64::from(field) + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^= x >> 29;
    x.wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// Each field holds what was written to it. Access rights may keep defined bits only.
fn all_fields(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    for &field in ALWAYS {
        vm.set(field, pattern(field, 1))?;
    }
    for &field in ALWAYS {
        let defined = if (ES_AR..=TR_AR).contains(&field) { 0x1_f0ff } else { width_mask(field) };
        check!(format_args!("field {field:#x}"), vm.get(field)? & defined, pattern(field, 1) & defined);
    }
    Ok(())
}

fn high_halves(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    for field in [TSC_OFFSET, IO_A, LINK, GUEST_DEBUGCTL] {
        vm.set(field, 0x1122_3344_5566_7788)?;
        check!("high half", vm.get(field + 1)?, 0x1122_3344);
        vm.set(field + 1, 0xaabb_ccdd_99aa_bbcc)?;
        check!("both halves", vm.get(field)?, 0x99aa_bbcc_5566_7788_u64);
        vm.set(field, 0x55)?;
        check!("high half after a full write", vm.get(field + 1)?, 0);
    }
    // Only 64-bit fields have high halves.
    for field in [CS_SEL + 1, PIN + 1, GUEST_RIP + 1] {
        fails("VMREAD of a high half", vmx::vmread(field).map(drop), VmxError::Valid(12))?;
    }
    Ok(())
}

fn field_widths(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    for (field, expected) in
        [(CS_SEL, 0xffff), (EXCEPTIONS, 0xffff_ffff), (TSC_OFFSET, u64::MAX), (GUEST_RSP, u64::MAX)]
    {
        vm.set(field, u64::MAX)?;
        check!(format_args!("field {field:#x}"), vm.get(field)?, expected);
    }
    Ok(())
}

/// A VMCS survives VMCLEAR, VMPTRLD of another and VMXOFF.
fn persistence(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    for &field in ALWAYS {
        vm.set(field, pattern(field, 2))?;
    }
    let expect = |when: &'static str| -> Outcome {
        for &field in ALWAYS {
            let defined = if (ES_AR..=TR_AR).contains(&field) { 0x1_f0ff } else { width_mask(field) };
            check!(
                format_args!("field {field:#x} {when}"),
                vm.get(field)? & defined,
                pattern(field, 2) & defined
            );
        }
        Ok(())
    };
    ok("VMCLEAR", vmx::vmclear(vm.vmcs))?;
    vm.make_current()?;
    expect("after VMCLEAR")?;
    let other = region(ctx);
    ok("VMCLEAR", vmx::vmclear(other))?;
    ok("VMPTRLD", vmx::vmptrld(other))?;
    vm.make_current()?;
    expect("after VMPTRLD of another VMCS")?;
    ok("VMCLEAR", vmx::vmclear(vm.vmcs))?;
    off()?;
    enter_vmx(ctx)?;
    check!("current VMCS after VMXON", ok("VMPTRST", vmx::vmptrst())?, u64::MAX);
    vm.make_current()?;
    expect("after VMXOFF and VMXON")?;
    check!("revision identifier", memory::read::<u32>(vm.vmcs), ctx.caps.revision());
    Ok(())
}

/// Two VMCSs, entered in turn, keep apart.
fn two_vmcss(ctx: &mut Ctx) -> Outcome {
    let code = code!["2: inc rbx", "vmcall", "jmp 2b"];
    let mut a = Vm::new(&ctx.caps, code)?;
    let mut b = Vm::new(&ctx.caps, code)?;
    a.regs.rbx = 100;
    b.regs.rbx = 200;
    for round in 1..4 {
        a.make_current()?;
        let e = a.finish()?;
        a.skip_instruction(&e)?;
        b.make_current()?;
        let e = b.finish()?;
        b.skip_instruction(&e)?;
        check!("RBX of the first", a.regs.rbx, 100 + round);
        check!("RBX of the second", b.regs.rbx, 200 + round);
    }
    let _ = vmx::vmclear(a.vmcs);
    Ok(())
}

fn vmlaunch_not_clear(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.finish()?;
    fails("VMLAUNCH of a launched VMCS", bare("vmlaunch"), VmxError::Valid(4))
}

fn vmresume_not_launched(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    fails("VMRESUME of a VMCS that is not launched", bare("vmresume"), VmxError::Valid(5))?;
    vm.make_current()
}

fn vmresume_after_vmclear(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.finish()?;
    ok("VMCLEAR", vmx::vmclear(vm.vmcs))?;
    vm.make_current()?;
    fails("VMRESUME after VMCLEAR", bare("vmresume"), VmxError::Valid(5))?;
    vm.launched = false;
    vm.finish()?;
    Ok(())
}

fn vmlaunch_mov_ss(ctx: &mut Ctx) -> Outcome {
    let _vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    let got = trap::guarded!("push 0x8d7\npopfq\nmov ss, {ss:e}\nvmlaunch", ss = in(reg) 0x10_u32)?;
    fails("VMLAUNCH after MOV SS", vmx::outcome(got), VmxError::Valid(26))
}

impl From<trap::Fault> for crate::guest::suite::Stop {
    fn from(fault: trap::Fault) -> Self {
        Self::Fail(crate::guest::suite::Text::new(format_args!("unexpected exception {fault:x?}")))
    }
}

/// A VM exit loads RFLAGS with 2.
fn vmlaunch_flags(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["mov eax, 0x8d7", "push rax", "popfq", "vmcall"])?;
    let e: Exit = vm.finish()?;
    check!("RFLAGS of L2", vm.get(GUEST_RFLAGS)? & 0x8d5, 0x8d5);
    check!("instruction length", e.len, 3);
    Ok(())
}

/// A VMCS that is not clear is found before wrong controls; controls before host state before guest
/// state.
fn check_order(ctx: &mut Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    vm.set(PIN, 0)?;
    vm.set(HOST_CR4, 0)?;
    vm.set(GUEST_RFLAGS, 0)?;
    fails("VMRESUME", bare("vmresume"), VmxError::Valid(5))?;
    match bare("vmlaunch") {
        // Both control fields and host state are wrong: the processor may report either.
        Err(VmxError::Valid(7 | 8)) => {}
        got => fail!("VMLAUNCH: expected VMfailValid(7) or (8), got {got:x?}"),
    }
    vm.set(PIN, ctx.caps.pin.one.into())?;
    fails("VMLAUNCH", bare("vmlaunch"), VmxError::Valid(8))?;
    vm.set(HOST_CR4, cpu::cr4())?;
    match vm.enter() {
        Ok(e) => check!("exit reason", e.reason, 0x8000_0021_u32),
        got => fail!("VMLAUNCH: expected exit reason 0x80000021, got {got:x?}"),
    }
    vm.set(GUEST_RFLAGS, 2)?;
    vm.finish()?;
    Ok(())
}

fn invept(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    let cap = ctx.caps.ept_vpid;
    if !ctx.caps.secondary.can(secondary::EPT) || cap >> 20 & 1 == 0 {
        return fails("INVEPT", vmx::invept(2, 0), exception(UD, 0));
    }
    let eptp = vm.need_ept()?.eptp();
    for kind in [0, 1, 2, 3, 1 << 32 | 1] {
        let offered = matches!(kind, 1 | 2) && cap >> (24 + kind) & 1 != 0;
        let got = vmx::invept(kind, eptp);
        match offered {
            true => ok("INVEPT", got)?,
            false => fails("INVEPT of a type that is not offered", got, VmxError::Valid(28))?,
        }
    }
    if cap >> 25 & 1 != 0 {
        fails("INVEPT with a wrong EPTP", vmx::invept(1, eptp | 1 << 11), VmxError::Valid(28))?;
        fails("INVEPT with a wrong memory type", vmx::invept(1, eptp & !7 | 3), VmxError::Valid(28))?;
    }
    fails(
        "INVEPT of a page that is not present",
        vmx::invept_at(2, (5_u64 << 30) as *const u64),
        exception(PF, 0),
    )
}

fn invvpid(ctx: &mut Ctx) -> Outcome {
    let _vm = Vm::new(&ctx.caps, 0)?;
    let cap = ctx.caps.ept_vpid;
    if !ctx.caps.secondary.can(secondary::VPID) || cap >> 32 & 1 == 0 {
        return fails("INVVPID", vmx::invvpid(2, 0, 0), exception(UD, 0));
    }
    for kind in [0, 1, 2, 3, 4, 1 << 32 | 1] {
        let offered = kind < 4 && cap >> (40 + kind) & 1 != 0;
        let got = vmx::invvpid(kind, 1, 0x1000);
        match offered {
            true => ok("INVVPID", got)?,
            false => fails("INVVPID of a type that is not offered", got, VmxError::Valid(28))?,
        }
        if !offered {
            continue;
        }
        fails(
            "INVVPID with bits 63:16 of the descriptor",
            vmx::invvpid(kind, 1 << 16 | 1, 0),
            VmxError::Valid(28),
        )?;
        if kind != 2 {
            fails("INVVPID of VPID 0", vmx::invvpid(kind, 0, 0), VmxError::Valid(28))?;
        }
        if kind == 0 {
            fails("INVVPID of a non-canonical address", vmx::invvpid(0, 1, 1 << 47), VmxError::Valid(28))?;
        }
    }
    fails(
        "INVVPID of a page that is not present",
        vmx::invvpid_at(2, (5_u64 << 30) as *const u64),
        exception(PF, 0),
    )
}

/// Without the dual-monitor treatment, VMCALL in root operation is VMfail(1).
fn vmcall_in_root(ctx: &mut Ctx) -> Outcome {
    let _vm = Vm::new(&ctx.caps, 0)?;
    fails("VMCALL", vmx::vmcall(), VmxError::Valid(1))
}

fn vmfunc_outside(_: &mut Ctx) -> Outcome {
    let got = trap::guarded!("vmfunc", in("eax") 0, in("ecx") 0).map(drop).map_err(VmxError::Fault);
    fails("VMFUNC outside VMX non-root operation", got, exception(UD, 0))
}

/// The VM-instruction error stays until the next VMfailValid.
fn error_field(ctx: &mut Ctx) -> Outcome {
    let vm = Vm::new(&ctx.caps, 0)?;
    fails("VMCLEAR of the VMXON region", vmx::vmclear(ctx.vmxon), VmxError::Valid(3))?;
    check!("VM-instruction error", vm.get(VM_ERROR)?, 3);
    vm.set(GUEST_RIP, 0)?;
    check!("VM-instruction error after a success", vm.get(VM_ERROR)?, 3);
    fails("VMRESUME", bare("vmresume"), VmxError::Valid(5))?;
    check!("VM-instruction error", vm.get(VM_ERROR)?, 5);
    if ctx.caps.physical_bits == 0 {
        return skip("CPUID shows no physical-address width");
    }
    Ok(())
}
