//! See `tests::fuzz::devices`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| tests::fuzz::devices(data));
