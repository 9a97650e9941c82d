//! placeholder

pub mod pattern;
pub mod units;
