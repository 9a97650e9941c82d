//! placeholder

pub mod units;
