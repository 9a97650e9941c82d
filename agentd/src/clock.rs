//! The time of day, for the record. Simulations have one of their own.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

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
