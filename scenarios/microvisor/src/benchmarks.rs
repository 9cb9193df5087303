// What benchmarks there are, and how exit traces show where one begins and ends. Included by the image and by
// the library.

/// A write to this port begins a measurement, for those who watch exits from outside.
pub const BEGIN_PORT: u16 = 0xeb;
/// A write to this port ends it. One that ends without is void.
pub const END_PORT: u16 = 0xec;

/// Names of the benchmarks of `bench`, in the order in which they run.
pub const BENCHMARKS: &[&str] = &[
    "cpuid_bare",
    "cpuid",
    "cpuid_vpid",
    "vmcall",
    "inl",
    "mov_dr",
    "wr_tsc_adjust",
    "ept_violation",
    "page_touch",
    "ept_fill_4k",
    "ept_fill_2m",
];

/// Names of the benchmarks of `vmexit`, in the order in which they run.
pub const VMEXITS: &[&str] = &[
    "cpuid",
    "vmcall",
    "inl",
    "mov_dr",
    "rd_pat_msr",
    "mov_to_cr0",
    "mov_to_cr3",
    "invlpg",
    "rd_tsc_adjust",
    "wr_tsc_adjust",
    "outb_to_post",
    "inl_from_pmtimer",
    "mmio_read",
    "self_ipi_sti_nop",
    "self_ipi_sti_hlt",
    "page_touch",
];
