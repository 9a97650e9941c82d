//! `kill -9` of the daemon at every place that it reaches, and of its recoveries at every place of theirs: what is left is
//! whole, on record, and paid for.

use agentd_tests::kills::{all, sweep};
use anyhow::Result;

/// Most of a case is waiting for the daemon's own pauses: many at once keep a small machine busy.
const AT_ONCE: usize = 8;
/// Of each that many-th case all recoveries are killed, too; `soak kills` has the time for more.
const CHAIN: u64 = 4;

#[test]
fn killed_anywhere_a_change_is_whole_or_not_at_all_and_nothing_that_was_told_is_lost() -> Result<()> {
    let tally = sweep(&all(), CHAIN, AT_ONCE)?;
    println!("{} kills, {} of them in recoveries; {:?}", tally.kills, tally.in_recovery, tally.places);
    assert!(tally.kills >= 500, "{tally:?}");
    for place in ["store: before", "store: after", "backend: before", "backend: after", "reply: before"] {
        assert!(tally.places.get(place).is_some_and(|count| *count >= 10), "{place}: {tally:?}");
    }
    Ok(())
}
