//! Whole-program tests: the real `nestvmm` program boots real kernels.

mod boot;
mod demo;
mod disks;
mod docs;
mod exec;
mod input;
mod iommu;
mod linux;
mod nested;
mod payloads;
mod scenarios;
mod terminal;
