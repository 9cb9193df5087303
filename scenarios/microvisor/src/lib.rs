//! A small bare-metal VMX hypervisor that runs as L1 and runs micro L2 guests: the test bed
//! for VMX emulation, and the program that exit benchmarks run in.
//!
//! The hypervisor itself is the module `guest`; `build.rs` makes it a multiboot image, whose
//! place [`IMAGE`] tells. This library is what host programs see of it.
//!
//! The image's command line, in words:
//!
//! - `only=PREFIX`: run the cases whose names start with one of the prefixes, which commas part;
//! - `list`: print the names and sections of the cases and end;
//! - `bench`: measure exits instead; `rounds=N` is the number of rounds of each; `mmu=ept` (the default) or
//!   `mmu=shadow-on-ept` says whether L2 runs with EPT of L1;
//! - `vmexit`: measure, without VMX, what exits cost the guest that causes them; with `rounds=N`;
//! - `exactly=NAME`: with `bench` and `vmexit`, only those with one of the names, which commas part;
//! - `verbose`: print each case's name before it runs;
//! - `abort=WHAT`: instead of the cases, an exit of L2 that ends in a VMX abort: `msr_store`, `msr_load`, `pdptes` or
//!   `address_size`.
//!
//! Where the processor offers Hyper-V's enlightened VMCS, virtual machines use it, except in cases about VMX
//! instructions themselves (`instr.`).
//!
//! Each case ends in one line, `ok NAME`, `skip NAME (why)` or `FAIL NAME: what`; the last line counts
//! them. Before it, a run of all cases says how many of the exit reasons and VM-instruction errors came that
//! [`EXITS`] and [`ERRORS`] have cases for; a case that does not cause what it is listed for fails. The image ends through isa-debug-exit at port F4H: 0 when no case failed, 1 when some did,
//! 2 after an exception or a panic in the hypervisor itself.

/// Path of the multiboot image.
pub const IMAGE: &str = env!("MICROVISOR_IMAGE");

/// The image itself.
pub const BYTES: &[u8] = include_bytes!(env!("MICROVISOR_IMAGE"));

macro_rules! check_table {
    ($($name:ident $section:literal $body:tt;)*) => {
        /// Names of the VM-entry checks that have a case, `check.NAME`.
        pub const CHECKS: &[&str] = &[$(stringify!($name)),*];
    };
}
include!("check_table.rs");
include!("coverage.rs");
include!("benchmarks.rs");

// Compiled into the image by `build.rs`; here only to be seen by lints and documentation.
#[cfg(any(clippy, doc))]
#[allow(dead_code, reason = "its entry point is the image's")]
mod guest;
