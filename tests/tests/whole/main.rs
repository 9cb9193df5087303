//! Whole-program tests: the real `nestvmm` program boots real kernels.

mod boot;
mod input;
mod linux;
mod payloads;
mod terminal;
