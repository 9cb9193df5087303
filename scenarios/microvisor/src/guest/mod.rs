//! The hypervisor.

#[macro_use]
mod console;
mod abort;
mod bench;
mod boot;
mod cases;
mod coverage;
mod cpu;
mod ept;
mod evmcs;
mod fields;
mod legacy;
mod memory;
mod suite;
mod trap;
mod vm;
mod vmexit;
mod vmx;

/// The hypervisor in Rust, entered from [`boot`] with the multiboot information.
#[unsafe(no_mangle)]
unsafe extern "C" fn microvisor_main(info: u64) -> ! {
    cpu::mask_pic();
    trap::init();
    let options = unsafe { boot::command_line(info) };
    let failed = suite::main(options);
    cpu::exit(u32::from(failed))
}

/// A panic: say so and end with status 2.
pub fn panicked(info: &core::panic::PanicInfo) -> ! {
    println!("PANIC: {info}");
    cpu::exit(2)
}
