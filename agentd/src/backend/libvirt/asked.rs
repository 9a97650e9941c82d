//! What was asked of a running guest and has not come about yet. Neither libvirt nor QEMU's commands tell the balloon's
//! target or an unplug that is still open, so the backend remembers its own until they are obeyed or somebody else asks.
//! It goes with each observation, and from the last one comes back after a restart of the daemon.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What is remembered of one domain. Belongs to one boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Asked {
    boot: String,
    balloon: Option<Balloon>,
    unplug: Option<Unplug>,
}

/// How long a balloon that is at its new target may still move towards the target before: a guest fills its balloon in
/// batches, and asks for the target between two of them. Bounded, because what moves it later is somebody else's wish.
const WAVERS: Duration = Duration::from_secs(10);

/// A balloon's target in KiB, and the range in which the balloon is on its way there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Balloon {
    low: u64,
    high: u64,
    target: u64,
    /// Whether it may still be on its way to an earlier target.
    #[serde(default)]
    wavers: bool,
    /// When it was first seen at its target.
    #[serde(skip)]
    seen_there: Option<Instant>,
}

/// An unplug that libvirt gave up waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Unplug {
    /// It is open: so many vCPUs are to be left.
    Open(u32),
    /// It came about: so many are left, and the guest itself let the others go.
    Obeyed(u32),
}

/// What is remembered, by UUID.
#[derive(Debug, Default)]
pub(super) struct Memory(HashMap<String, Asked>);

impl Memory {
    fn of(&mut self, uuid: &str, boot: &str) -> &mut Asked {
        let asked = self.0.entry(uuid.to_owned()).or_default();
        if asked.boot != boot {
            *asked = Asked { boot: boot.to_owned(), ..Asked::default() };
        }
        asked
    }

    /// The balloon was asked to go from one size to another.
    pub(super) fn balloon_asked(&mut self, uuid: &str, boot: &str, from: u64, target: u64) {
        let asked = self.of(uuid, boot);
        let earlier = asked.balloon.map(|earlier| earlier.target);
        let ends = [from, target, earlier.unwrap_or(from)];
        asked.balloon = Some(Balloon {
            low: ends.into_iter().fold(target, u64::min),
            high: ends.into_iter().fold(target, u64::max),
            target,
            wavers: earlier.is_some_and(|earlier| earlier != target),
            seen_there: None,
        });
    }

    /// The balloon's target while it is on its way there. Forgotten once it has arrived, and once it leaves the way: then it
    /// follows another target, set by somebody else.
    pub(super) fn balloon_target(&mut self, uuid: &str, boot: &str, now: u64, at: Instant) -> Option<u64> {
        let asked = self.of(uuid, boot);
        let balloon = asked.balloon.as_mut()?;
        if now == balloon.target {
            balloon.seen_there.get_or_insert(at);
        }
        let patience = if balloon.wavers { WAVERS } else { Duration::ZERO };
        let arrived = balloon.seen_there.is_some_and(|since| at.saturating_duration_since(since) >= patience);
        if arrived || now < balloon.low || now > balloon.high {
            asked.balloon = None;
        }
        asked.balloon.map(|balloon| balloon.target)
    }

    /// An unplug to this many vCPUs has timed out.
    pub(super) fn unplug_is_late(&mut self, uuid: &str, boot: &str, vcpus: u32) {
        self.of(uuid, boot).unplug = Some(Unplug::Open(vcpus));
    }

    /// A new change of vCPUs replaces what was asked before.
    pub(super) fn vcpus_replaced(&mut self, uuid: &str, boot: &str) {
        self.of(uuid, boot).unplug = None;
    }

    /// The late unplug of a domain in which QEMU runs `present` vCPUs, and libvirt counts the same or not (`agreed`). Once
    /// it is obeyed and they agree it is closed, and another number of vCPUs is somebody else's wish.
    pub(super) fn late_unplug(&mut self, uuid: &str, boot: &str, present: u32, agreed: bool) -> Option<Unplug> {
        let asked = self.of(uuid, boot);
        asked.unplug = match asked.unplug? {
            Unplug::Open(left) if agreed && present <= left => Some(Unplug::Obeyed(present)),
            Unplug::Obeyed(left) if present != left => None,
            unchanged => Some(unchanged),
        };
        asked.unplug
    }

    /// What there is to tell a later life of the daemon about a domain.
    pub(super) fn known(&self, uuid: &str) -> Option<&Asked> {
        self.0.get(uuid).filter(|asked| asked.balloon.is_some() || asked.unplug.is_some())
    }

    /// What an earlier life of the daemon told. What this one knows is newer; another boot, or a guest that has obeyed
    /// meanwhile, is found out at the next look.
    pub(super) fn recall(&mut self, uuid: &str, asked: Asked) {
        if self.known(uuid).is_none() {
            self.0.insert(uuid.to_owned(), asked);
        }
    }

    /// Forgets a domain that is down.
    pub(super) fn forget(&mut self, uuid: &str) {
        self.0.remove(uuid);
    }

    /// Forgets the domains that are gone.
    pub(super) fn keep_only(&mut self, exists: impl Fn(&str) -> bool) {
        self.0.retain(|uuid, _| exists(uuid));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_stands_until_it_is_reached() {
        let (mut memory, at) = (Memory::default(), Instant::now());
        memory.balloon_asked("a", "1", 500, 300);
        for now in [500, 450, 470, 301] {
            assert_eq!(memory.balloon_target("a", "1", now, at), Some(300), "{now}");
        }
        assert_eq!(memory.balloon_target("a", "1", 300, at), None);
        assert_eq!(memory.balloon_target("a", "1", 310, at), None, "reached once is reached");
    }

    #[test]
    fn a_balloon_that_leaves_the_way_follows_somebody_elses_target() {
        for now in [501, 299] {
            let (mut memory, at) = (Memory::default(), Instant::now());
            memory.balloon_asked("a", "1", 500, 300);
            assert_eq!(memory.balloon_target("a", "1", now, at), None, "{now}");
        }
    }

    #[test]
    fn a_new_target_may_be_passed_on_the_way_to_an_earlier_one() {
        let (mut memory, at) = (Memory::default(), Instant::now());
        memory.balloon_asked("a", "1", 500, 300);
        memory.balloon_asked("a", "1", 450, 480);
        assert_eq!(memory.balloon_target("a", "1", 440, at), Some(480));
        assert_eq!(memory.balloon_target("a", "1", 480, at), Some(480), "it may not have asked for it yet");
        assert_eq!(memory.balloon_target("a", "1", 475, at + WAVERS / 2), Some(480), "nor had it");
        assert_eq!(memory.balloon_target("a", "1", 475, at + WAVERS), None, "by now it is somebody else's target");
    }

    #[test]
    fn a_balloon_that_is_sent_back_before_it_moved_may_move_yet() {
        let (mut memory, at) = (Memory::default(), Instant::now());
        memory.balloon_asked("a", "1", 500, 300);
        memory.balloon_asked("a", "1", 500, 500);
        for now in [500, 495, 490, 500] {
            assert_eq!(memory.balloon_target("a", "1", now, at), Some(500), "{now}");
        }
    }

    #[test]
    fn an_unplug_is_open_until_obeyed_and_agreed_on() {
        let mut memory = Memory::default();
        memory.unplug_is_late("a", "1", 2);
        assert_eq!(memory.late_unplug("a", "1", 3, true), Some(Unplug::Open(2)));
        assert_eq!(memory.late_unplug("a", "1", 2, false), Some(Unplug::Open(2)));
        assert_eq!(memory.late_unplug("a", "1", 2, true), Some(Unplug::Obeyed(2)));
        assert_eq!(memory.late_unplug("a", "1", 3, true), None, "plugged in by somebody else");
    }

    #[test]
    fn another_boot_or_domain_has_been_asked_nothing() {
        let mut memory = Memory::default();
        memory.unplug_is_late("a", "1", 2);
        assert_eq!(memory.late_unplug("b", "1", 3, true), None);
        assert_eq!(memory.late_unplug("a", "1", 3, true), Some(Unplug::Open(2)));
        assert_eq!(memory.late_unplug("a", "2", 3, true), None);
    }
}
