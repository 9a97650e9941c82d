//! What a simulated daemon stands on instead of the real world. Everything here follows from a seed: same seed and same
//! calls, same results.

pub mod disk;
pub mod rng;
