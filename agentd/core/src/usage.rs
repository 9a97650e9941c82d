//! What counters of an instance say when they are looked at twice: how many CPUs it uses, and how often its limit held it
//! back. Pure: knows neither where counters come from nor what time it is.
//!
//! ```text
//!   looks   ├──────┼──┼─────┼──┤ now        a rate is over the youngest look that is at least GOOD_WINDOW old, so that
//!              base ┘              └ newest   callers who ask at the same time don't shorten each other's windows
//! ```

mod view;

pub use view::view;

use std::collections::VecDeque;

use crate::api::PressureUse;
use crate::units::ByteCount;

/// The shortest time that a rate is told of, in µs: the kernel enforces limits in periods of 100 ms.
const LEAST_WINDOW: u64 = 200_000;
/// Over a window of this length a rate is worth something, in µs; where there is none, the longest one has to do.
const GOOD_WINDOW: u64 = 900_000;
/// A look that is older says nothing about now, in µs.
const LONGEST_WINDOW: u64 = 60_000_000;
/// Looks that are closer to each other than this are kept as one, in µs.
const SPACING: u64 = 100_000;

/// What was counted of an instance by one moment. `None` where nobody counts it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Counters {
    /// When it was read, on a clock that only goes forward, in µs.
    pub at_usec: u64,
    /// CPU time since its start, in µs.
    pub cpu_usec: Option<u64>,
    /// What its limit of CPU time did; `None` where it has none.
    pub bandwidth: Option<Bandwidth>,
    /// What it takes of the host's memory.
    pub host_memory: Option<ByteCount>,
    /// Processes in it that the kernel has killed for want of memory.
    pub oom_kills: Option<u64>,
    /// Pressure stall information.
    pub pressure: Option<PressureUse>,
}

/// How the kernel has enforced a limit of CPU time since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// Periods in which it had something to run.
    pub periods: u64,
    /// Those of them in which its limit held it back.
    pub throttled: u64,
    /// For how long it was held back, in µs.
    pub throttled_usec: u64,
}

/// What two looks say.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// The time between them, in ms.
    pub window_ms: u64,
    /// CPUs in use.
    pub cpus: Option<f64>,
    /// The share of periods in which its limit held it back.
    pub throttled: Option<f64>,
}

/// One look, as far as a rate is made of it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sample {
    at: u64,
    cpu: Option<u64>,
    bandwidth: Option<Bandwidth>,
}

/// The last looks at one instance, as many as the next rate may need.
#[derive(Debug, Clone, Default)]
pub struct Track {
    run: Option<String>,
    samples: VecDeque<Sample>,
}

impl Track {
    /// Takes a look at this run of the instance. What was counted of an earlier run, or before a counter went back, is
    /// forgotten: it says nothing about this one.
    pub fn take(&mut self, run: Option<&str>, counters: &Counters) {
        let sample = Sample { at: counters.at_usec, cpu: counters.cpu_usec, bandwidth: counters.bandwidth };
        if self.run.as_deref() != run || self.samples.back().is_some_and(|last| sample.is_less_than(last)) {
            self.samples.clear();
        }
        self.run = run.map(ToOwned::to_owned);
        // The newest goes, and not the one before it: a window must not begin later because somebody else looks, too.
        if let [.., before, last] = self.samples.make_contiguous()
            && last.at.saturating_sub(before.at) < SPACING
        {
            self.samples.pop_back();
        }
        self.samples.push_back(sample);
        // The looks to come are later, so that none older than the present base is ever needed again.
        let young = |sample: &Sample| counters.at_usec.saturating_sub(sample.at) <= LONGEST_WINDOW;
        let base = self.base();
        self.samples.retain(|sample| young(sample) && base.is_none_or(|base| sample.at >= base.at));
    }

    /// What the newest look and an earlier one say together; `None` until two were had that are far enough apart.
    pub fn rate(&self) -> Option<Rate> {
        let (now, base) = (self.samples.back()?, self.base()?);
        let window = now.at.saturating_sub(base.at);
        let cpu = now.cpu.zip(base.cpu).and_then(|(now, base)| now.checked_sub(base));
        Some(Rate {
            window_ms: window / 1000,
            cpus: cpu.map(|cpu| share(cpu, window)),
            throttled: now.bandwidth.zip(base.bandwidth).and_then(|(now, base)| {
                let throttled = now.throttled.checked_sub(base.throttled)?;
                Some(share(throttled, now.periods.checked_sub(base.periods)?).min(1.0))
            }),
        })
    }

    /// What the newest look is compared with: the youngest that makes a good window, else the oldest that makes one at all.
    fn base(&self) -> Option<Sample> {
        let now = self.samples.back()?.at;
        let age = |sample: &&Sample| now.saturating_sub(sample.at);
        let good = self.samples.iter().rev().find(|sample| age(sample) >= GOOD_WINDOW);
        let base = good.or_else(|| self.samples.front().filter(|sample| age(sample) >= LEAST_WINDOW));
        base.filter(|sample| age(sample) <= LONGEST_WINDOW).copied()
    }
}

impl Sample {
    /// Whether something that only grows has shrunk.
    fn is_less_than(&self, before: &Sample) -> bool {
        let cpu = self.cpu.zip(before.cpu).is_some_and(|(now, before)| now < before);
        let bandwidth = self.bandwidth.zip(before.bandwidth);
        cpu || self.at < before.at || bandwidth.is_some_and(|(now, before)| now.periods < before.periods)
    }
}

/// None of nothing is 0: where no period began, nothing was held back.
#[allow(clippy::cast_precision_loss, reason = "a share of counters; the 53 bits are for 285 years of µs")]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(ms: u64, cpu_ms: u64) -> Counters {
        Counters { at_usec: ms * 1000, cpu_usec: Some(cpu_ms * 1000), ..Counters::default() }
    }

    fn track(looks: &[(u64, u64)]) -> Track {
        let mut track = Track::default();
        for (ms, cpu_ms) in looks {
            track.take(Some("1"), &counters(*ms, *cpu_ms));
        }
        track
    }

    /// Window and CPUs.
    fn rate(looks: &[(u64, u64)]) -> Option<(u64, f64)> {
        track(looks).rate().map(|rate| (rate.window_ms, rate.cpus.unwrap()))
    }

    #[test]
    fn a_rate_takes_two_looks_that_are_far_enough_apart() {
        assert_eq!(rate(&[(1000, 500)]), None);
        assert_eq!(rate(&[(1000, 500), (1199, 600)]), None);
        assert_eq!(rate(&[(1000, 500), (1300, 650)]), Some((300, 0.5)));
        assert_eq!(rate(&[(1000, 500), (11_000, 15_500)]), Some((10_000, 1.5)));
        assert_eq!(rate(&[(1000, 500), (2000, 500)]), Some((1000, 0.0)), "nothing used is 0, and known");
    }

    #[test]
    fn callers_who_ask_at_once_do_not_shorten_each_others_windows() {
        // Two who ask once a second, a tenth of a second apart; then a dozen who ask all the time.
        let two = [(0, 0), (100, 50), (1000, 500), (1100, 550), (2000, 1000), (2100, 1050)];
        assert_eq!(rate(&two), Some((1000, 0.5)));
        let many: Vec<(u64, u64)> = (0..500).map(|n| (n * 20, n * 10)).collect();
        let track = track(&many);
        let window = track.rate().unwrap().window_ms;
        assert!((900..=1100).contains(&window), "{window}");
        assert!(track.samples.len() <= 12, "{} looks are kept", track.samples.len());
    }

    #[test]
    fn a_look_of_long_ago_says_nothing_about_now() {
        assert_eq!(rate(&[(0, 0), (61_000, 30_000)]), None);
        assert_eq!(rate(&[(0, 0), (61_000, 30_000), (61_300, 30_300)]), Some((300, 1.0)));
    }

    #[test]
    fn what_began_anew_has_no_rate_yet() {
        assert_eq!(rate(&[(0, 5000), (1000, 4000)]), None, "a counter that went back");
        assert_eq!(rate(&[(0, 5000), (1000, 4000), (2000, 4500)]), Some((1000, 0.5)));
        let mut track = track(&[(0, 0), (1000, 500)]);
        track.take(Some("2"), &counters(2000, 900));
        assert_eq!(track.rate(), None, "another run");
        track.take(Some("2"), &counters(3000, 1000));
        assert_eq!(track.rate().and_then(|rate| rate.cpus), Some(0.1));
    }

    #[test]
    fn how_often_a_limit_held_it_back_is_a_share_of_its_periods() {
        let look = |ms, periods, throttled| Counters {
            bandwidth: Some(Bandwidth { periods, throttled, throttled_usec: 0 }),
            ..counters(ms, ms / 2)
        };
        let share = |looks: [Counters; 2]| {
            let mut track = Track::default();
            looks.iter().for_each(|look| track.take(None, look));
            track.rate().unwrap().throttled
        };
        assert_eq!(share([look(0, 100, 30), look(1000, 110, 35)]), Some(0.5));
        assert_eq!(share([look(0, 100, 30), look(1000, 100, 30)]), Some(0.0), "it had nothing to run");
        assert_eq!(share([counters(0, 0), look(1000, 110, 35)]), None, "the limit is new");
        assert_eq!(share([look(0, 100, 30), counters(1000, 500)]), None, "the limit is gone");
    }

    #[test]
    fn what_nobody_counts_is_unknown_and_not_0() {
        let mut track = Track::default();
        for at_usec in [0, 1_000_000] {
            track.take(None, &Counters { at_usec, ..Counters::default() });
        }
        assert_eq!(track.rate(), Some(Rate { window_ms: 1000, cpus: None, throttled: None }));
    }
}
