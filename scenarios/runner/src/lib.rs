//! Scenarios: runs of `nestvmm` that are described in a file, driven over their consoles and judged.
//!
//! - [`process`]: a program on pipes or on a pseudo-terminal: type, and wait for what it prints.

pub mod process;
pub mod terminal;
mod transcript;
