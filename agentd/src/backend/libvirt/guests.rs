//! How guests behave, as far as it decides what is asked of them: since when a balloon stands still, and whose agent does not
//! answer. Forgotten when the daemon ends: it is found out anew.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long a guest agent that did not answer is not asked again.
const LEFT_ALONE: Duration = Duration::from_secs(120);

/// By UUID.
#[derive(Debug, Default)]
pub(super) struct Guests {
    still: HashMap<String, Still>,
    deaf: HashMap<String, Instant>,
}

/// A balloon that was seen at this size ever since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Still {
    /// What it leaves the guest, KiB.
    pub(super) actual: u64,
    /// In seconds since the Unix epoch.
    pub(super) since: u64,
}

impl Guests {
    /// A balloon was seen at this size now.
    pub(super) fn balloon_seen(&mut self, uuid: &str, actual: Option<u64>, now: u64) {
        match actual {
            Some(actual) => {
                let still = self.still.entry(uuid.to_owned()).or_insert(Still { actual, since: now });
                if still.actual != actual {
                    *still = Still { actual, since: now };
                }
            }
            None => drop(self.still.remove(uuid)),
        }
    }

    /// Since when a balloon stands still.
    pub(super) fn still(&self, uuid: &str) -> Option<Still> {
        self.still.get(uuid).copied()
    }

    /// An agent did not answer.
    pub(super) fn agent_is_deaf(&mut self, uuid: &str, now: Instant) {
        self.deaf.insert(uuid.to_owned(), now + LEFT_ALONE);
    }

    /// Whether an agent has not answered of late.
    pub(super) fn is_deaf(&mut self, uuid: &str, now: Instant) -> bool {
        self.deaf.retain(|_, until| now < *until);
        self.deaf.contains_key(uuid)
    }

    /// Forgets the domains that are gone.
    pub(super) fn keep_only(&mut self, exists: impl Fn(&str) -> bool) {
        self.still.retain(|uuid, _| exists(uuid));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_balloon_stands_still_since_it_was_first_seen_where_it_is() {
        let mut guests = Guests::default();
        for (actual, now, since) in [(320, 10, 10), (320, 12, 10), (200, 13, 13), (160, 14, 14), (160, 20, 14)] {
            guests.balloon_seen("a", Some(actual), now);
            assert_eq!(guests.still("a"), Some(Still { actual, since }));
        }
        guests.balloon_seen("a", None, 21);
        assert_eq!((guests.still("a"), guests.still("b")), (None, None));
    }

    #[test]
    fn a_deaf_agent_is_asked_again_after_a_while() {
        let (mut guests, now) = (Guests::default(), Instant::now());
        guests.agent_is_deaf("a", now);
        assert!(guests.is_deaf("a", now) && !guests.is_deaf("b", now) && !guests.is_deaf("a", now + LEFT_ALONE));
    }
}
