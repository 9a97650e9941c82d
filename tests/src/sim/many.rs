//! Many schedules, on as many threads as there are processors.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};

use super::world::{Stats, run};

/// Sums over schedules.
#[derive(Debug, Clone, Copy, Default)]
pub struct Totals {
    /// How many schedules were carried out.
    pub schedules: u64,
    /// What happened in them.
    pub stats: Stats,
}

/// The first schedule that broke a promise.
#[derive(Debug, Clone)]
pub struct Broken {
    /// Its seed.
    pub seed: u64,
    /// What was broken, in words.
    pub what: String,
}

/// Carries out `count` schedules from the seed `first` on, and tells `progress` of each thousand; ends at the first that
/// breaks a promise.
pub fn run_many(first: u64, count: u64, progress: impl Fn(u64) + Sync) -> Result<Totals, Broken> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let (next, end) = (AtomicU64::new(first), first.saturating_add(count));
    let totals = Mutex::new(Totals::default());
    let broken: Mutex<Option<Broken>> = Mutex::default();
    let lock = |broken: &Mutex<Option<Broken>>| broken.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let work = || {
        while lock(&broken).is_none() {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                return;
            }
            match run(seed, false) {
                Ok(stats) => {
                    let mut totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
                    totals.schedules += 1;
                    totals.stats.crashes += stats.crashes;
                    totals.stats.operations += stats.operations;
                    totals.stats.changed += stats.changed;
                    totals.stats.ended_badly += stats.ended_badly;
                    if totals.schedules.is_multiple_of(1000) {
                        progress(totals.schedules);
                    }
                }
                Err(what) => {
                    // Of several found at once the lowest is told, so that it is the same each time.
                    let mut broken = broken.lock().unwrap_or_else(PoisonError::into_inner);
                    if broken.as_ref().is_none_or(|known| seed < known.seed) {
                        *broken = Some(Broken { seed, what });
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    match lock(&broken) {
        Some(broken) => Err(broken),
        None => Ok(*totals.lock().unwrap_or_else(PoisonError::into_inner)),
    }
}
