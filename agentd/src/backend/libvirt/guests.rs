//! How guests behave, as far as it decides what is asked of them: since when a balloon stands still, and whose agent does not
//! answer. Forgotten when the daemon ends: it is found out anew.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// How long a guest agent that did not answer is not asked again.
const LEFT_ALONE: Duration = Duration::from_secs(120);
/// How long an answer holds: who waits for something else looks many times a second.
const HOLDS: Duration = Duration::from_millis(200);
/// With so many that hang no agent is asked at all: each holds one of libvirt's workers.
const MOST_HANGING: usize = 3;

/// By UUID.
#[derive(Debug, Default)]
pub(super) struct Guests {
    still: HashMap<String, Still>,
    deaf: HashMap<String, Instant>,
    /// Agents that are being asked, and whether their answer is overdue.
    asked: HashMap<String, bool>,
    /// What agents told of a moment ago; nothing of before vCPUs changed.
    told: HashMap<String, (Instant, Option<Option<u64>>)>,
}

/// A balloon that was seen at this size ever since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Still {
    /// What it leaves the guest, KiB.
    pub(super) actual: u64,
    /// In seconds since the Unix epoch.
    pub(super) since: u64,
    /// The same moment.
    pub(super) first: Instant,
}

impl Guests {
    /// A balloon was seen at this size now.
    pub(super) fn balloon_seen(&mut self, uuid: &str, actual: Option<u64>, now: u64) {
        match actual {
            Some(actual) => {
                let new = Still { actual, since: now, first: Instant::now() };
                let still = self.still.entry(uuid.to_owned()).or_insert(new);
                if still.actual != actual {
                    *still = new;
                }
            }
            None => drop(self.still.remove(uuid)),
        }
    }

    /// Since when a balloon stands still.
    pub(super) fn still(&self, uuid: &str) -> Option<Still> {
        self.still.get(uuid).copied()
    }

    /// Whether an agent may be asked now; then it is, until it has returned.
    pub(super) fn ask_agent(&mut self, uuid: &str, now: Instant) -> bool {
        self.deaf.retain(|_, until| now < *until);
        let hanging = self.asked.values().filter(|overdue| **overdue).count();
        if self.deaf.contains_key(uuid) || self.asked.contains_key(uuid) || hanging >= MOST_HANGING {
            return false;
        }
        self.asked.insert(uuid.to_owned(), false);
        true
    }

    /// What an agent told a moment ago.
    pub(super) fn told(&self, uuid: &str, now: Instant) -> Option<Option<u64>> {
        self.told.get(uuid).filter(|(at, _)| now.saturating_duration_since(*at) < HOLDS).and_then(|(_, told)| *told)
    }

    /// An agent that was `asked` then has told how many vCPUs are online.
    pub(super) fn agent_told(&mut self, uuid: &str, online: Option<u64>, asked: Instant) {
        if self.told.get(uuid).is_none_or(|(at, _)| *at <= asked) {
            self.told.insert(uuid.to_owned(), (asked, Some(online)));
        }
    }

    /// What an agent was asked before is of vCPUs that are other ones by now, also where its answer comes later.
    pub(super) fn vcpus_changed(&mut self, uuid: &str, now: Instant) {
        self.told.insert(uuid.to_owned(), (now, None));
    }

    /// A call to an agent has come back, with an answer or without.
    pub(super) fn agent_returned(&mut self, uuid: &str) {
        self.asked.remove(uuid);
    }

    /// An agent did not answer: the call has `returned`, or is overdue.
    pub(super) fn agent_is_deaf(&mut self, uuid: &str, now: Instant, returned: bool) {
        self.deaf.insert(uuid.to_owned(), now + LEFT_ALONE);
        if returned {
            // It may never have been begun.
            self.asked.remove(uuid);
        } else if let Some(overdue) = self.asked.get_mut(uuid) {
            *overdue = true;
        }
    }

    /// Forgets the domains that are gone.
    pub(super) fn keep_only(&mut self, exists: impl Fn(&str) -> bool) {
        self.still.retain(|uuid, _| exists(uuid));
        self.told.retain(|uuid, _| exists(uuid));
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
            assert_eq!(guests.still("a").map(|still| (still.actual, still.since)), Some((actual, since)));
        }
        guests.balloon_seen("a", None, 21);
        assert_eq!((guests.still("a"), guests.still("b")), (None, None));
    }

    #[test]
    fn a_deaf_agent_is_asked_again_after_a_while() {
        let (mut guests, now) = (Guests::default(), Instant::now());
        assert!(guests.ask_agent("a", now) && !guests.ask_agent("a", now), "one question at a time");
        guests.agent_returned("a");
        guests.agent_is_deaf("a", now, true);
        assert!(!guests.ask_agent("a", now) && guests.ask_agent("b", now) && guests.ask_agent("a", now + LEFT_ALONE));
    }

    #[test]
    fn what_an_agent_told_holds_for_a_moment_and_until_vcpus_change() {
        let (mut guests, now) = (Guests::default(), Instant::now());
        guests.agent_told("a", Some(2), now);
        assert_eq!(
            (guests.told("a", now), guests.told("a", now + HOLDS), guests.told("b", now)),
            (Some(Some(2)), None, None)
        );
        let moment = Duration::from_millis(1);
        guests.vcpus_changed("a", now + moment);
        guests.agent_told("a", Some(2), now);
        assert_eq!(guests.told("a", now + moment), None, "an answer that was on its way meanwhile");
        guests.agent_told("a", Some(3), now + 2 * moment);
        assert_eq!(guests.told("a", now + 2 * moment), Some(Some(3)));
    }

    #[test]
    fn agents_that_hang_hold_up_agents_only_and_few() {
        let (mut guests, now) = (Guests::default(), Instant::now());
        for uuid in ["a", "b", "c"] {
            assert!(guests.ask_agent(uuid, now));
            guests.agent_is_deaf(uuid, now, false);
        }
        let later = now + 2 * LEFT_ALONE;
        assert!(!guests.ask_agent("a", later) && !guests.ask_agent("d", later));
        guests.agent_returned("b");
        assert!(!guests.ask_agent("a", later) && guests.ask_agent("d", later));
    }
}
