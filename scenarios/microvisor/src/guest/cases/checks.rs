//! The checks of VM entry (SDM Vol. 3C §27.2 and §27.3.1): the machine of `Vm::new` passes all;
//! each case breaks one rule and sees how the entry fails, then stays just within it.

use crate::guest::fields::*;
use crate::guest::legacy::{Ended, enter_from_32_bit};
use crate::guest::suite::{Ctx, Outcome, check, fail, skip};
use crate::guest::vm::{CODE32, DATA, Vm, code};
use crate::guest::vmx::{Allowed, VmxError};
use crate::guest::{cpu, evmcs, memory};

use Expect::*;
use Op::*;

/// How an entry that breaks the rule fails.
#[derive(Clone, Copy)]
pub enum Expect {
    /// VM-instruction error 7.
    Controls,
    /// VM-instruction error 8.
    Host,
    /// Exit reason 33 with this qualification.
    Guest(u64),
}

/// One change of the VMCS. The control-setting ones skip the case if the control is not offered.
#[derive(Clone, Copy)]
pub enum Op {
    /// Sets a field.
    Set(u32, u64),
    /// Sets bits of a field.
    Or(u32, u64),
    /// Clears bits of a field.
    Clear(u32, u64),
    /// Sets pin-based controls.
    Pin(u32),
    /// Sets primary controls.
    Primary(u32),
    /// Sets secondary controls.
    Secondary(u32),
    /// Sets exit controls.
    Exit(u32),
    /// Sets entry controls.
    Entry(u32),
    /// Sets a field to a new page's address plus an offset.
    Page(u32, u64),
    /// Sets a field to the first address beyond the physical-address width.
    Beyond(u32),
    /// Sets a field to so many bytes below that.
    BelowBeyond(u32, u64),
    /// Sets the bit of a field that is just beyond the physical-address width.
    OrBeyond(u32),
    /// Sets a field to what an MSR holds.
    SetMsr(u32, u32),
    /// Writes a byte to memory at the address in a field plus an offset.
    Poke(u32, u64, u8),
    /// Writes 32 bits to memory at the address in a field plus an offset.
    Poke32(u32, u64, u32),
    /// Writes the revision identifier with other bits to memory at the address in a field.
    Revision(u32, u32),
    /// Lets L2 run for no time, by the preemption timer.
    Timer,
    /// Skips the case if CPUID does not show a feature: leaf, register, bit.
    Feature(u32, usize, u32),
    /// Anything else.
    Setup(fn(&mut Vm) -> Outcome),
}

pub(super) fn apply(vm: &mut Vm, ops: &[Op]) -> Outcome {
    for op in ops {
        match *op {
            Set(field, value) => vm.set(field, value)?,
            Or(field, bits) => vm.set(field, vm.get(field)? | bits)?,
            Clear(field, bits) => vm.set(field, vm.get(field)? & !bits)?,
            Pin(bits) => vm.need_pin(bits)?,
            Primary(bits) => vm.need_primary(bits)?,
            Secondary(bits) => vm.need_secondary(bits)?,
            Exit(bits) => vm.need_exit(bits)?,
            Entry(bits) => vm.need_entry(bits)?,
            Page(field, offset) => vm.set(field, memory::page() + offset)?,
            Beyond(field) => vm.set(field, vm.caps.beyond())?,
            BelowBeyond(field, bytes) => vm.set(field, vm.caps.beyond() - bytes)?,
            OrBeyond(field) => vm.set(field, vm.get(field)? | vm.caps.beyond())?,
            SetMsr(field, msr) => vm.set(field, cpu::msr(msr))?,
            Poke(field, offset, byte) => memory::write(vm.get(field)? + offset, byte),
            Poke32(field, offset, word) => memory::write(vm.get(field)? + offset, word),
            Revision(field, bits) => memory::write(vm.get(field)?, vm.caps.revision() | bits),
            Timer => timer(vm)?,
            Feature(leaf, register, bit) => {
                if cpu::cpuid(leaf, 0)[register] >> bit & 1 == 0 {
                    return skip("CPUID does not show the feature");
                }
            }
            Setup(f) => f(vm)?,
        }
    }
    Ok(())
}

/// Ends L2 before its first instruction.
fn timer(vm: &mut Vm) -> Outcome {
    vm.need_pin(pin::TIMER)?;
    vm.set(TIMER, 0)
}

fn machine(ctx: &Ctx) -> Outcome<Vm> {
    memory::reset();
    Vm::new(&ctx.caps, code!["vmcall", "2: jmp 2b"])
}

fn must_fail(ctx: &Ctx, expect: Expect, what: &dyn core::fmt::Display, ops: [&[Op]; 2]) -> Outcome {
    let mut vm = machine(ctx)?;
    for list in ops {
        apply(&mut vm, list)?;
    }
    let vmcs = vm.current_pointer();
    match (vm.enter(), expect) {
        (Err(VmxError::Valid(7)), Controls) | (Err(VmxError::Valid(8)), Host) => Ok(()),
        (Ok(e), Guest(qualification)) if e.reason == 0x8000_0021 => {
            if e.qualification != qualification {
                fail!("{what}: expected qualification {qualification}, got {:#x}", e.qualification)
            }
            // A failed entry leaves the launch state and the current VMCS as they were.
            check!("current VMCS", crate::guest::vmx::vmptrst().unwrap_or(0), vmcs);
            Ok(())
        }
        (got, expect) => {
            let expected = match expect {
                Controls => "VMfailValid(7)",
                Host => "VMfailValid(8)",
                Guest(_) => "exit reason 0x80000021",
            };
            match got {
                Ok(e) => fail!(
                    "{what}: expected {expected}, got exit reason {:#x}, qualification {:#x}",
                    e.reason,
                    e.qualification
                ),
                Err(e) => fail!("{what}: expected {expected}, got {e:x?}"),
            }
        }
    }
}

fn must_enter(ctx: &Ctx, what: &dyn core::fmt::Display, ops: [&[Op]; 2]) -> Outcome {
    let mut vm = machine(ctx)?;
    for list in ops {
        apply(&mut vm, list)?;
    }
    // L2 that executes ends by itself.
    if vm.caps.pin.can(pin::TIMER) || vm.get(ACTIVITY)? != 0 {
        timer(&mut vm)?;
    }
    match vm.enter() {
        Ok(e) if e.reason >> 31 == 0 => Ok(()),
        Ok(e) => {
            fail!(
                "{what}: expected entry, got exit reason {:#x}, qualification {:#x}",
                e.reason,
                e.qualification
            )
        }
        Err(e) => fail!("{what}: expected entry, got {e:x?}"),
    }
}

/// Runs a row of the table. A variant that needs what is not offered is left out; if none of
/// the failing ones remains, the case is skipped.
fn run(ctx: &Ctx, expect: Expect, setup: &[Op], bad: &[&[Op]], good: &[&[Op]]) -> Outcome {
    use crate::guest::suite::Stop;
    let mut failing = 0;
    for (i, ops) in bad.iter().enumerate() {
        match must_fail(ctx, expect, &format_args!("bad {i}"), [setup, ops]) {
            Err(Stop::Skip(_)) => {}
            other => {
                other?;
                failing += 1;
            }
        }
    }
    if failing == 0 {
        return skip("control not offered");
    }
    for (i, ops) in good.iter().enumerate() {
        match must_enter(ctx, &format_args!("good {i}"), [setup, ops]) {
            Err(Stop::Skip(_)) => {}
            other => other?,
        }
    }
    Ok(())
}

/// A guest in 32-bit protected mode with 32-bit paging.
fn legacy(vm: &mut Vm) -> Outcome {
    vm.and(ENTRY_CTL, !entry::IA32E)?;
    vm.set(GUEST_CR4, vm.get(GUEST_CR4)? & !(1 << 5 | 1 << 17))?;
    vm.segments([0x18, 0x10], CODE32, DATA)
}

/// One with PAE paging, no PDPTE present.
fn pae(vm: &mut Vm) -> Outcome {
    legacy(vm)?;
    vm.set(GUEST_CR4, vm.get(GUEST_CR4)? | 1 << 5)?;
    for i in 0..4 {
        vm.set(PDPTE0 + 2 * i, 0)?;
    }
    Ok(())
}

/// One in virtual-8086 mode.
fn v8086(vm: &mut Vm) -> Outcome {
    legacy(vm)?;
    vm.segments([0x800, 0x800], 0xf3, 0xf3)?;
    for i in 0..6 {
        vm.set(ES_BASE + 2 * i, 0x8000)?;
        vm.set(ES_LIMIT + 2 * i, 0xffff)?;
    }
    vm.set(GUEST_RIP, 0)?;
    vm.set(GUEST_RSP, 0x1000)?;
    vm.set(GUEST_RFLAGS, 1 << 17 | 2)
}

/// A guest at privilege level 3 in 64-bit mode.
fn user(vm: &mut Vm) -> Outcome {
    vm.segments([0x23, 0x2b], 0xa0fb, 0xc0f3)
}

fn ldtr(vm: &mut Vm) -> Outcome {
    vm.set(LDTR_SEL, 0x70)?;
    vm.set(LDTR_BASE, vm.data)?;
    vm.set(LDTR_LIMIT, 0xffff)?;
    vm.set(LDTR_AR, 0x82)
}

/// Every bit that must be 1, cleared; every bit that must not be, set.
fn reserved(ctx: &Ctx, field: u32, allowed: Allowed, setup: &[Op]) -> Outcome {
    must_enter(ctx, &"as allowed", [setup, &[]])?;
    for bit in 0..32 {
        let mask = 1_u64 << bit;
        if u64::from(allowed.one) & mask != 0 {
            must_fail(ctx, Controls, &format_args!("bit {bit} = 0"), [setup, &[Clear(field, mask)]])?;
        }
        if u64::from(allowed.may) & mask == 0 {
            must_fail(ctx, Controls, &format_args!("bit {bit} = 1"), [setup, &[Or(field, mask)]])?;
        }
    }
    Ok(())
}

fn pin_reserved(ctx: &mut Ctx) -> Outcome {
    reserved(ctx, PIN, ctx.caps.pin, &[])
}
fn primary_reserved(ctx: &mut Ctx) -> Outcome {
    reserved(ctx, PRIMARY, ctx.caps.primary, &[])
}
fn secondary_reserved(ctx: &mut Ctx) -> Outcome {
    reserved(ctx, SECONDARY, ctx.caps.secondary, &[Primary(primary::SECONDARY)])?;
    // Without "activate secondary controls" the field does not matter.
    must_enter(
        ctx,
        &"not activated",
        [&[Clear(PRIMARY, primary::SECONDARY as u64)], &[Set(SECONDARY, 0xffff_ffff)]],
    )
}
fn exit_reserved(ctx: &mut Ctx) -> Outcome {
    reserved(ctx, EXIT_CTL, ctx.caps.exit, &[])
}
fn entry_reserved(ctx: &mut Ctx) -> Outcome {
    reserved(ctx, ENTRY_CTL, ctx.caps.entry, &[])
}

fn cr3_targets(ctx: &mut Ctx) -> Outcome {
    let most = ctx.caps.misc >> 16 & 0x1ff;
    run(
        ctx,
        Controls,
        &[],
        &[&[Set(CR3_COUNT, most + 1)], &[Set(CR3_COUNT, 0x8000_0000)]],
        &[&[Set(CR3_COUNT, most)], &[Set(CR3_COUNT, 0)]],
    )
}

fn eptp_memory_type(ctx: &mut Ctx) -> Outcome {
    for ty in 0..8 {
        let supported = match ty {
            0 => ctx.caps.ept_vpid >> 8 & 1 != 0,
            6 => ctx.caps.ept_vpid >> 14 & 1 != 0,
            _ => false,
        };
        let ops: [&[Op]; 2] = [&[Secondary(secondary::EPT)], &[Clear(EPTP, 7), Or(EPTP, ty)]];
        match supported {
            true => must_enter(ctx, &format_args!("type {ty}"), ops)?,
            false => must_fail(ctx, Controls, &format_args!("type {ty}"), ops)?,
        }
    }
    Ok(())
}

fn eptp_walk_length(ctx: &mut Ctx) -> Outcome {
    for length in 0..8 {
        let supported = length == 3 && ctx.caps.ept_vpid >> 6 & 1 != 0;
        if length == 4 && ctx.caps.ept_vpid >> 7 & 1 != 0 {
            continue;
        }
        let ops: [&[Op]; 2] = [&[Secondary(secondary::EPT)], &[Clear(EPTP, 0x38), Or(EPTP, length << 3)]];
        match supported {
            true => must_enter(ctx, &format_args!("bits 5:3 = {length}"), ops)?,
            false => must_fail(ctx, Controls, &format_args!("bits 5:3 = {length}"), ops)?,
        }
    }
    Ok(())
}

fn eptp_accessed_dirty(ctx: &mut Ctx) -> Outcome {
    let ops: [&[Op]; 2] = [&[Secondary(secondary::EPT)], &[Or(EPTP, 0x40)]];
    match ctx.caps.ept_vpid >> 21 & 1 != 0 {
        true => must_enter(ctx, &"bit 6 = 1", ops),
        false => must_fail(ctx, Controls, &"bit 6 = 1", ops),
    }
}

fn vm_functions(ctx: &mut Ctx) -> Outcome {
    let setup: &[Op] = &[Secondary(secondary::VMFUNC), Page(EPTP_LIST, 0)];
    must_enter(ctx, &"as allowed", [setup, &[Set(VMFUNC_CTL, ctx.caps.vmfunc)]])?;
    for bit in (0..64).filter(|bit| ctx.caps.vmfunc >> bit & 1 == 0) {
        must_fail(ctx, Controls, &format_args!("bit {bit} = 1"), [setup, &[Set(VMFUNC_CTL, 1 << bit)]])?;
    }
    Ok(())
}

fn injection_length(ctx: &mut Ctx) -> Outcome {
    let zero = ctx.caps.misc >> 30 & 1 != 0;
    // A software interrupt, a privileged software exception (#DB), a software exception (#BP).
    for event in [0x8000_0480, 0x8000_0501, 0x8000_0603] {
        let setup: &[Op] = &[Set(ENTRY_INFO, event)];
        for length in [16, 0x8000_0000] {
            must_fail(
                ctx,
                Controls,
                &format_args!("{event:#x} of length {length:#x}"),
                [setup, &[Set(ENTRY_LEN, length)]],
            )?;
        }
        for length in [1, 15] {
            must_enter(
                ctx,
                &format_args!("{event:#x} of length {length}"),
                [setup, &[Set(ENTRY_LEN, length)]],
            )?;
        }
        let ops: [&[Op]; 2] = [setup, &[Set(ENTRY_LEN, 0)]];
        match zero {
            true => must_enter(ctx, &format_args!("{event:#x} of length 0"), ops)?,
            false => must_fail(ctx, Controls, &format_args!("{event:#x} of length 0"), ops)?,
        }
    }
    // Other events have no length.
    must_enter(ctx, &"#UD", [&[Set(ENTRY_INFO, 0x8000_0306)], &[Set(ENTRY_LEN, 16)]])
}

fn activity_supported(ctx: &mut Ctx) -> Outcome {
    if !ctx.caps.pin.can(pin::TIMER) {
        return skip("control not offered");
    }
    for state in [4, 5, 0x8000_0000] {
        must_fail(ctx, Guest(0), &format_args!("activity state {state:#x}"), [&[], &[Set(ACTIVITY, state)]])?;
    }
    must_enter(ctx, &"active", [&[], &[Set(ACTIVITY, 0)]])?;
    for state in 1..4 {
        let ops: [&[Op]; 2] = [&[Set(ACTIVITY, state)], &[]];
        match ctx.caps.misc >> (5 + state) & 1 != 0 {
            // Nothing but a SIPI ends wait-for-SIPI: not entered here.
            true if state == 3 => {}
            true => must_enter(ctx, &format_args!("activity state {state}"), ops)?,
            false => must_fail(ctx, Guest(0), &format_args!("activity state {state}"), ops)?,
        }
    }
    Ok(())
}

fn activity_injection(ctx: &mut Ctx) -> Outcome {
    let flags: Op = Set(GUEST_RFLAGS, 0x202);
    let offered = |state: u64| ctx.caps.misc >> (5 + state) & 1 != 0;
    if offered(1) {
        let setup: &[Op] = &[Set(ACTIVITY, 1), flags, Set(ENTRY_LEN, 2)];
        for event in [0x8000_0306, 0x8000_0b0d, 0x8000_0480, 0x8000_0603] {
            must_fail(ctx, Guest(0), &format_args!("{event:#x} in HLT"), [setup, &[Set(ENTRY_INFO, event)]])?;
        }
        for event in [0x8000_0040, 0x8000_0202, 0x8000_0301, 0x8000_0312] {
            must_enter(ctx, &format_args!("{event:#x} in HLT"), [setup, &[Set(ENTRY_INFO, event)]])?;
        }
    }
    if offered(2) {
        let setup: &[Op] = &[Set(ACTIVITY, 2), flags];
        for event in [0x8000_0306, 0x8000_0040, 0x8000_0301] {
            must_fail(
                ctx,
                Guest(0),
                &format_args!("{event:#x} in shutdown"),
                [setup, &[Set(ENTRY_INFO, event)]],
            )?;
        }
        for event in [0x8000_0202, 0x8000_0312] {
            must_enter(ctx, &format_args!("{event:#x} in shutdown"), [setup, &[Set(ENTRY_INFO, event)]])?;
        }
    }
    if offered(3) {
        let setup: &[Op] = &[Set(ACTIVITY, 3), flags];
        for event in [0x8000_0306, 0x8000_0040, 0x8000_0202] {
            must_fail(
                ctx,
                Guest(0),
                &format_args!("{event:#x} in wait-for-SIPI"),
                [setup, &[Set(ENTRY_INFO, event)]],
            )?;
        }
    }
    if !offered(1) && !offered(2) && !offered(3) {
        return skip("control not offered");
    }
    Ok(())
}

/// Processors may or may not refuse this; if the entry fails, then with qualification 3.
fn nmi_blocked_by_sti(ctx: &mut Ctx) -> Outcome {
    let mut vm = machine(ctx)?;
    apply(
        &mut vm,
        &[Set(ENTRY_INFO, 0x8000_0202), Set(GUEST_RFLAGS, 0x202), Set(INTERRUPTIBILITY, 1), Timer],
    )?;
    match vm.enter() {
        Ok(e) if e.reason == 0x8000_0021 => check!("qualification", e.qualification, 3),
        Ok(e) if e.reason >> 31 == 0 => {}
        other => fail!("expected entry or exit reason 0x80000021, got {other:x?}"),
    }
    must_enter(ctx, &"no blocking", [&[Set(ENTRY_INFO, 0x8000_0202)], &[Set(GUEST_RFLAGS, 0x202)]])
}

/// VM entry from an L1 outside IA-32e mode: 64-bit state is refused, and so is what a 32-bit host
/// can't have; a 32-bit guest runs.
fn legacy_mode(ctx: &mut Ctx) -> Outcome {
    // The world switch of 32-bit mode knows ordinary VMCSs alone.
    evmcs::want(false);
    let code = || code!["vmcall", "2: jmp 2b"];
    let cases: [(&str, &[Op]); 6] = [
        ("64-bit host", &[Or(EXIT_CTL, exit::HOST_64 as u64)]),
        ("IA-32e mode guest", &[Or(ENTRY_CTL, entry::IA32E as u64)]),
        ("both", &[Or(EXIT_CTL, exit::HOST_64 as u64), Or(ENTRY_CTL, entry::IA32E as u64)]),
        ("null SS", &[Set(HOST_SS, 0)]),
        ("64-bit RIP", &[Or(HOST_RIP, 1 << 32)]),
        ("PCIDE", &[Or(HOST_CR4, 1 << 17)]),
    ];
    for (what, ops) in cases {
        match enter_from_32_bit(ctx, code(), |vm| apply(vm, ops))? {
            Ended::Failed(8) => {}
            got => fail!("{what}: expected VMfailValid(8), got {got:x?}"),
        }
    }
    match enter_from_32_bit(ctx, code(), |_| Ok(()))? {
        Ended::Exit(reason::VMCALL) => Ok(()),
        got => fail!("32-bit host and guest: expected exit reason 18, got {got:x?}"),
    }
}

macro_rules! body {
    ({ custom: $f:ident }) => {
        $f
    };
    ({ expect: $expect:expr, setup: [$($s:expr),*], bad: [$([$($b:expr),*]),*], good: [$([$($g:expr),*]),*] }) => {
        |ctx| run(ctx, $expect, &[$($s),*], &[$(&[$($b),*]),*], &[$(&[$($g),*]),*])
    };
}
macro_rules! check_table {
    ($($name:ident $section:literal $body:tt;)*) => {
        /// The cases of this module.
        pub const CASES: &[crate::guest::suite::Case] = &[$(
            crate::guest::suite::Case {
                name: concat!("check.", stringify!($name)),
                section: concat!("Vol. 3C ", $section),
                vmx: true,
                run: body!($body),
            },
        )*];
    };
}
include!("../../check_table.rs");
