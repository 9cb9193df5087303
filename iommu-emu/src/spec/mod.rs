//! Constants and formats of the specification; no behaviour.

pub mod descriptor;
pub mod fault;
pub mod interrupt;
pub mod reg;
pub mod table;
