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
