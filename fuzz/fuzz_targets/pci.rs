//! See `tests::fuzz::pci`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    tests::fuzz::pci(data);
});
