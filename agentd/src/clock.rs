//! The time of day, for the record, and one that only goes forward, for rates. Simulations have a time of day of their own.

use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agentd_core::operation::Uptime;
use nix::time::{ClockId, clock_gettime};

/// The time of day.
pub(crate) fn now() -> SystemTime {
    #[cfg(any(test, feature = "fake"))]
    if let Some(now) = CLOCK.with_borrow(|clock| clock.as_ref().map(|clock| clock())) {
        return now;
    }
    SystemTime::now()
}

/// Milliseconds since the Unix epoch.
pub(crate) fn now_ms() -> u64 {
    millis(now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// How long the host has been up. `None` where the kernel does not tell which boot this is.
pub(crate) fn uptime() -> Option<Uptime> {
    static BOOT: LazyLock<Option<String>> = LazyLock::new(|| {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(id.trim().to_owned()).filter(|id| !id.is_empty())
    });
    #[cfg(any(test, feature = "fake"))]
    if CLOCK.with_borrow(Option::is_some) {
        return Some(Uptime { boot: "simulated".into(), ms: now_ms() });
    }
    let up = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?);
    Some(Uptime { boot: BOOT.clone()?, ms: millis(up) })
}

/// Whether what is too old may be removed for ever by the time of day: not while that is far ahead of where it was, as the host's
/// uptime tells, until it has been there for as long as that.
#[derive(Debug)]
pub(crate) struct Steady {
    /// The time of day less the uptime, in milliseconds, as it is trusted.
    offset: i128,
    /// The uptime at which it was first seen to be ahead.
    ahead_since: Option<u64>,
}

impl Steady {
    /// How far the time of day may jump, and how long a longer jump is doubted.
    const FAR_MS: u64 = 24 * 3_600_000;

    pub(crate) fn new(now_ms: u64, up_ms: u64) -> Self {
        Steady { offset: i128::from(now_ms) - i128::from(up_ms), ahead_since: None }
    }

    /// By how many milliseconds it is ahead, where that is too far.
    pub(crate) fn ahead(&mut self, now_ms: u64, up_ms: u64) -> Option<u64> {
        let offset = i128::from(now_ms) - i128::from(up_ms);
        let ahead = u64::try_from(offset - self.offset).unwrap_or(0);
        if ahead <= Self::FAR_MS {
            self.ahead_since = None;
            return None;
        }
        let since = *self.ahead_since.get_or_insert(up_ms);
        if up_ms.saturating_sub(since) > Self::FAR_MS {
            *self = Self::new(now_ms, up_ms);
            return None;
        }
        Some(ahead)
    }
}

/// Microseconds since some moment of this life of the daemon, by a clock that nobody sets.
pub(crate) fn monotonic_usec() -> u64 {
    static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(BEGAN.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// The time of day, RFC 3339 in UTC, to the millisecond.
pub(crate) fn rfc3339() -> String {
    jiff::Timestamp::try_from(now()).map_or_else(|_| String::new(), |at| format!("{at:.3}"))
}

/// A duration in milliseconds.
pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(any(test, feature = "fake"))]
type Clock = Box<dyn Fn() -> SystemTime>;

#[cfg(any(test, feature = "fake"))]
thread_local! {
    static CLOCK: std::cell::RefCell<Option<Clock>> = const { std::cell::RefCell::new(None) };
}

/// From now on this is the time of day on this thread, or the system's own.
#[cfg(any(test, feature = "fake"))]
pub fn set(clock: Option<Clock>) {
    CLOCK.set(clock);
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000;

    #[test]
    fn a_clock_that_is_set_far_ahead_is_doubted_for_a_day() {
        let mut steady = Steady::new(1_000_000 * HOUR, 5 * HOUR);
        assert_eq!(steady.ahead(1_000_001 * HOUR, 6 * HOUR), None);
        assert_eq!(steady.ahead(900_000 * HOUR, 7 * HOUR), None, "nothing looks old by a clock that is behind");
        assert_eq!(steady.ahead(1_000_025 * HOUR, 7 * HOUR), None, "summer time, or a slow clock set right");
        let year = 8760 * HOUR;
        assert_eq!(steady.ahead(1_000_003 * HOUR + year, 8 * HOUR), Some(year));
        assert_eq!(steady.ahead(1_000_004 * HOUR, 9 * HOUR), None, "set back");
        assert_eq!(steady.ahead(1_000_005 * HOUR + year, 10 * HOUR), Some(year));
        assert_eq!(steady.ahead(1_000_029 * HOUR + year, 34 * HOUR), Some(year));
        assert_eq!(steady.ahead(1_000_030 * HOUR + year, 35 * HOUR), None, "by now it is what it is");
        assert_eq!(steady.ahead(1_000_031 * HOUR + year, 36 * HOUR), None);
    }
}
