//! The seeded simulation (src/sim): many schedules of operations, faults, crashes and changes by others, each checked against
//! the promises.

use agentd_tests::sim::{run, run_many};

/// Few enough for every run of the tests; `make soak` runs a million.
const SCHEDULES: u64 = 3000;

#[test]
fn every_schedule_keeps_the_promises() {
    let only = std::env::var("AGENTD_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    if let Some(seed) = only {
        run(seed, true).unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
        return;
    }
    match run_many(0, SCHEDULES, |_| {}) {
        Ok(totals) => println!("{totals:?}"),
        Err(broken) => {
            panic!("seed {}: {}\nagain, and aloud, with AGENTD_SEED={}", broken.seed, broken.what, broken.seed)
        }
    }
}
