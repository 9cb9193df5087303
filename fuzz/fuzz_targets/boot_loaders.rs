//! See `tests::fuzz::boot_loaders`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::boot_loaders(data));
