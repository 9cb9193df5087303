//! placeholder
pub mod boot;
pub mod image;
