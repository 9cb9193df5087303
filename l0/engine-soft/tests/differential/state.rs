//! The part of a processor that an instruction of user mode works on.

use crate::layout::DATA_SIZE;

/// Registers before or after an instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// RAX … R15.
    pub gpr: [u64; 16],
    /// RFLAGS: status flags and DF.
    pub rflags: u64,
    /// YMM0–15.
    pub vectors: [[u64; 4]; 16],
    /// FXSAVE64 image, bytes 0–159 without MXCSR.
    pub x87: [u8; 160],
    /// MXCSR.
    pub mxcsr: u32,
}

/// How an instruction ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It completed; RIP relative to its start.
    Next(u64),
    /// It faulted: vector, and for #PF error code and address.
    Fault(u8, u32, u64),
}

/// The data pages.
pub type Data = [u8; DATA_SIZE];
