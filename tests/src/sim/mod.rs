//! A seeded simulation of the daemon: the real engine, executor, store and recovery over a fake hypervisor and a faulty disk,
//! on virtual time in one thread. A schedule interleaves operations of several callers with faults of both, changes behind
//! the daemon's back, kills and power cuts at any place; then everything is calmed and the promises are checked.
//!
//! Everything here follows from a seed: same seed and same calls, same results.

mod check;
pub mod disk;
mod many;
pub mod rng;
mod schedule;
mod world;

pub use many::{Broken, Totals, run_many};
pub use world::{Stats, run};
