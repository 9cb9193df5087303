//! Scenarios: runs of `nestvmm` that are described in a file, driven over their consoles and judged.
//!
//! - [`process`]: a program on pipes or on a pseudo-terminal: type, and wait for what it prints;
//! - [`scenario`]: the file format, with [`counts`] for comparisons of exit counts;
//! - [`run`] and [`suite`]: running one and running many; [`report`]: what came of it.

pub mod counts;
pub mod limit;
pub mod options;
pub mod pattern;
pub mod process;
pub mod report;
pub mod run;
pub mod scenario;
pub mod shipped;
pub mod source;
pub mod statistics;
pub mod suite;
pub mod terminal;
mod transcript;
