//! Places at which a test can delay the daemon or end it: before and after each write of the record, each call that changes
//! something at a backend, and each reply. Nothing but a name outside of tests.
//!
//! A whole daemon is killed at the n-th place that it reaches by `AGENTD_KILL_AT=n`; a simulation in the same process sets
//! a hook for its thread.

#[cfg(not(any(test, feature = "fake")))]
pub(crate) async fn reach(_place: &'static str) {}

/// Tells of what must never happen. In the journal of an operator's daemon, too; a test fails of it.
pub(crate) fn defect(what: &dyn std::fmt::Display) {
    tracing::error!("defect: {what}");
    #[cfg(any(test, feature = "fake"))]
    armed::tell_defect();
}

#[cfg(any(test, feature = "fake"))]
pub(crate) use armed::reach;
#[cfg(any(test, feature = "fake"))]
pub use armed::{Fate, hook};

#[cfg(any(test, feature = "fake"))]
mod armed {
    use std::cell::RefCell;
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    /// What happens at a place.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Fate {
        /// It goes on.
        Pass,
        /// It goes on after this time; others run meanwhile.
        Delay(Duration),
        /// It never goes on: the hook's owner drops the daemon.
        Die,
    }

    type Hook = Box<dyn FnMut(&'static str) -> Fate>;

    thread_local! {
        static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
    }

    /// Asks this from now on at each place that is reached on this thread, or nobody.
    pub fn hook(hook: Option<Hook>) {
        HOOK.with(|held| *held.borrow_mut() = hook);
    }

    pub(super) fn tell_defect() {
        HOOK.with(|held| {
            if let Some(hook) = held.borrow_mut().as_mut() {
                hook("defect");
            }
        });
    }

    static KILL_AT: LazyLock<Option<u64>> = LazyLock::new(|| std::env::var("AGENTD_KILL_AT").ok()?.parse().ok());
    static REACHED: AtomicU64 = AtomicU64::new(0);

    pub(crate) async fn reach(place: &'static str) {
        let fate = HOOK.with(|held| held.borrow_mut().as_mut().map_or(Fate::Pass, |hook| hook(place)));
        match fate {
            Fate::Pass => {}
            Fate::Delay(time) => tokio::time::sleep(time).await,
            Fate::Die => std::future::pending().await,
        }
        let Some(kill_at) = *KILL_AT else { return };
        if REACHED.fetch_add(1, Ordering::SeqCst) + 1 == kill_at {
            eprintln!("killed at place {kill_at}, {place}");
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
        }
    }
}
