//! The seeded simulation (src/sim): many schedules of operations, faults, crashes and changes by others, each checked against
//! the promises.

use agentd_tests::sim::run;

/// Few enough for every run of the tests; `make soak` runs a million.
const SCHEDULES: u64 = 3000;

#[test]
fn every_schedule_keeps_the_promises() {
    let only = std::env::var("AGENTD_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    let seeds = only.map_or(0..SCHEDULES, |seed| seed..seed + 1);
    for seed in seeds {
        if let Err(broken) = run(seed, only.is_some()) {
            panic!("seed {seed}: {broken}\nagain, and aloud, with AGENTD_SEED={seed}");
        }
    }
}
