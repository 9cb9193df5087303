//! The nestvmm program.
fn main() {}
