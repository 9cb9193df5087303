//! Whole-program tests: the real `nestvmm` program boots real kernels.

mod boot;
