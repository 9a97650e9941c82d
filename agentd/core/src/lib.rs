//! placeholder

pub mod access;
pub mod pattern;
pub mod units;
