//! What every decision of agentd is made of, pure: no runtime, no files, no clock, no engine. The daemon does what is
//! decided here; `ctl` speaks the same types.

#![forbid(unsafe_code)]

pub mod access;
pub mod api;
pub mod config;
pub mod drift;
pub mod error;
pub mod instance;
pub mod ledger;
pub mod operation;
pub mod pattern;
pub mod plan;
#[cfg(feature = "openapi")]
mod schema;
pub mod units;
pub mod usage;
