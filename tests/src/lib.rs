//! What the whole-program tests share: the built `nestvmm` program, the images that it makes, and
//! a driver that types at a guest's console and waits for what it prints.
//!
//! A failed expectation panics with what the program has printed so far: this crate is for tests.

pub mod artifacts;
pub mod fuzz;
pub mod guest;
pub mod payload;
pub mod process;
pub mod program;
