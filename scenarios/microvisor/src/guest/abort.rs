//! VMX aborts (SDM Vol. 3C §28.7): exits of L2 that can't load L1's state. They end the machine, so that each is a
//! run of its own.

use super::fields::*;
use super::suite::{Ctx, Outcome, Stop, fail};
use super::vm::{Vm, code};
use super::{legacy, memory};

/// Causes the abort that `what` names; returns, as a failure, only if there was none.
pub fn main(ctx: &Ctx, what: &str) -> bool {
    let outcome = super::suite::enter_vmx(ctx).and_then(|()| match what {
        "msr_store" => msr_store(ctx),
        "msr_load" => msr_load(ctx),
        "pdptes" => pdptes(ctx),
        "address_size" => address_size(ctx),
        _ => fail!("no such abort"),
    });
    match outcome {
        Err(Stop::Fail(text)) => println!("FAIL {what}: {}", text.as_str()),
        Err(Stop::Skip(why)) => println!("skip {what} ({why})"),
        Ok(()) => println!("FAIL {what}: L2 exited without a VMX abort"),
    }
    true
}

/// Abort 1: an MSR of the store list can't be read.
fn msr_store(ctx: &Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    let list = memory::page();
    memory::write(list, 0x1234_5678_u64);
    vm.set(EXIT_STORE_ADDR, list)?;
    vm.set(EXIT_STORE_COUNT, 1)?;
    vm.run().map(drop)
}

/// Abort 4: an MSR of the load list can't be written.
fn msr_load(ctx: &Ctx) -> Outcome {
    let mut vm = Vm::new(&ctx.caps, code!["vmcall"])?;
    let list = memory::page();
    memory::write(list, 0xc000_0102_u64);
    memory::write(list + 8, 1_u64 << 63);
    vm.set(EXIT_LOAD_ADDR, list)?;
    vm.set(EXIT_LOAD_COUNT, 1)?;
    vm.run().map(drop)
}

/// Abort 2: a PDPTE of a 32-bit L1 has a reserved bit.
fn pdptes(ctx: &Ctx) -> Outcome {
    legacy::enter_from_32_bit(ctx, code!["vmcall"], |vm| {
        let table = memory::page();
        memory::write(table, 3_u64);
        vm.set(HOST_CR3, table)?;
        vm.set(HOST_CR4, vm.get(HOST_CR4)? | 0x20)
    })?;
    Ok(())
}

/// Abort 6: L2 is in IA-32e mode, which it went into after entry, and L1 wants to be in 32-bit mode.
fn address_size(ctx: &Ctx) -> Outcome {
    let l2 = code![
        ".code32",
        "mov eax, cr0",
        "and eax, 0x7fffffff",
        "mov cr0, eax",
        "mov eax, cr4",
        "or eax, 0x20",
        "mov cr4, eax",
        "mov eax, offset boot_pml4",
        "mov cr3, eax",
        "mov ecx, 0xc0000080",
        "rdmsr",
        "or eax, 0x100",
        "wrmsr",
        "mov eax, cr0",
        "or eax, 0x80000000",
        "mov cr0, eax",
        "vmcall",
        ".code64"
    ];
    legacy::enter_from_32_bit(ctx, l2, |vm| {
        vm.need_secondary(secondary::UNRESTRICTED)?;
        vm.need_primary(primary::MSR_BITMAPS)?;
        vm.set(MSR_BITMAP, memory::page())
    })?;
    Ok(())
}
