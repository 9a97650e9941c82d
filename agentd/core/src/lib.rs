//! placeholder

pub mod access;
pub mod config;
pub mod pattern;
pub mod units;
