//! What was seen of a domain a moment ago, for whoever reads back a change of ours: what that change can't have touched is not
//! asked again. A QEMU that moves its balloon answers late, and each question to libvirt waits with it. What somebody else does
//! in that moment is announced, and looked at after the change.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use agentd_core::plan::{Action, Scope};

use super::guests::Still;
use super::look::{Balloon, Sighting};

/// How long what was seen serves.
const LASTS: Duration = Duration::from_secs(1);
/// A balloon that was seen at the same size for so long is not on its way.
const STANDS: Duration = Duration::from_millis(200);
/// Of so many domains at once; others are asked about whole.
const MOST: usize = 64;

/// A whole look, and what was changed since.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Kept {
    /// What was seen.
    pub(super) seen: Sighting,
    /// Whether the saved definition was changed since.
    pub(super) saved: bool,
    /// Whether the balloon was given another target since, or was not seen to stand where it stood.
    balloon: bool,
    at: Instant,
}

impl Kept {
    /// Whether it was seen a moment ago.
    pub(super) fn serves(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < LASTS
    }

    /// Where the balloon stands, in KiB.
    pub(super) fn stands(&self, now: Instant) -> Option<u64> {
        match &self.seen.balloon {
            Balloon::Said { stats, .. } if !self.balloon && self.serves(now) => stats.actual,
            _ => None,
        }
    }

    /// After this step; `None` where it may have touched more than can be told.
    pub(super) fn after(self, action: &Action) -> Option<Kept> {
        let (scope, values) = action.sets()?;
        match scope {
            Scope::Saved => Some(Kept { saved: true, ..self }),
            Scope::Live if values.cpus.is_none() && values.plugged.is_none() => {
                Some(Kept { balloon: self.balloon || values.memory.is_some(), ..self })
            }
            _ => None,
        }
    }
}

/// A point in the order of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

/// By UUID.
#[derive(Debug, Default)]
pub(super) struct Recent {
    kept: HashMap<String, Kept>,
    /// When each was last changed: a look that was begun before that is of no use after it.
    changed: HashMap<String, Ticket>,
    clock: u64,
}

impl Recent {
    /// The beginning of a look.
    pub(super) fn ticket(&self) -> Ticket {
        Ticket(self.clock)
    }

    /// A whole look has ended that was begun then, at `now`; `still` is what was known of its balloon before.
    pub(super) fn looked(&mut self, seen: &Sighting, (began, now): (Ticket, Instant), still: Option<Still>) {
        if self.kept.get(&seen.uuid).is_some_and(|kept| kept.at > now) {
            return;
        }
        if self.kept.len() >= MOST {
            self.kept.retain(|_, kept| kept.serves(now));
        }
        let stale = self.changed.get(&seen.uuid).is_some_and(|changed| *changed > began);
        // What memory devices give moves by itself, and a balloon's target is set beside it: that is asked each time.
        let devices = seen.live.as_ref().is_none_or(|live| live.device_size > 0);
        let full = self.kept.len() >= MOST && !self.kept.contains_key(&seen.uuid);
        if seen.process.is_none() || devices || stale || full {
            self.kept.remove(&seen.uuid);
            return;
        }
        let actual = if let Balloon::Said { stats, .. } = &seen.balloon { stats.actual } else { None };
        let stood = |still: Still| Some(still.actual) == actual && now.saturating_duration_since(still.first) >= STANDS;
        let kept = Kept { seen: seen.clone(), saved: false, balloon: !still.is_some_and(stood), at: now };
        self.kept.insert(seen.uuid.clone(), kept);
    }

    /// What was seen of it, if that was a moment ago.
    pub(super) fn of(&self, uuid: &str, now: Instant) -> Option<Kept> {
        self.kept.get(uuid).filter(|kept| kept.serves(now)).cloned()
    }

    /// A change of it begins: until it has ended nothing that is known serves.
    pub(super) fn change_begins(&mut self, uuid: &str, now: Instant) -> Option<Kept> {
        self.mark(uuid);
        self.kept.remove(uuid).filter(|kept| kept.serves(now))
    }

    /// It has ended; `kept` is what is still known.
    pub(super) fn change_ended(&mut self, uuid: &str, kept: Option<Kept>) {
        self.mark(uuid);
        self.kept.remove(uuid);
        self.kept.extend(kept.map(|kept| (uuid.to_owned(), kept)));
    }

    /// Forgets the domains that are gone.
    pub(super) fn keep_only(&mut self, exists: impl Fn(&str) -> bool) {
        self.kept.retain(|uuid, _| exists(uuid));
        self.changed.retain(|uuid, _| exists(uuid));
    }

    fn mark(&mut self, uuid: &str) {
        self.clock += 1;
        self.changed.insert(uuid.to_owned(), Ticket(self.clock));
    }
}

#[cfg(test)]
mod tests {
    use agentd_core::plan::Values;
    use agentd_core::units::{ByteCount, Cpus, Limit};

    use super::*;
    use crate::backend::libvirt::reading::tests::running;

    fn step(scope: Scope, values: Values) -> Action {
        Action::Set { scope, values }
    }

    fn memory() -> Values {
        Values { memory: Some(Limit::At(ByteCount::mib(256))), ..Values::default() }
    }

    /// A whole look at it, begun at `now` with this ticket, at a balloon that has stood for long.
    fn look(recent: &mut Recent, seen: &Sighting, began: Ticket, now: Instant) {
        let still = Still { actual: 384 << 10, since: 1000, first: now.checked_sub(STANDS).unwrap() };
        recent.looked(seen, (began, now), Some(still));
    }

    #[test]
    fn a_look_serves_for_a_moment_and_only_if_no_change_was_begun_since() {
        let (mut recent, now) = (Recent::default(), Instant::now());
        let first = recent.ticket();
        look(&mut recent, &running(), first, now);
        assert!(recent.of("u", now).is_some() && recent.of("v", now).is_none());
        assert!(recent.of("u", now + LASTS).is_none());
        assert!(recent.change_begins("u", now).is_some() && recent.of("u", now).is_none());
        look(&mut recent, &running(), first, now);
        assert!(recent.of("u", now).is_none(), "it may have seen half of the change");
        let within = recent.ticket();
        recent.change_ended("u", None);
        look(&mut recent, &running(), within, now);
        assert!(recent.of("u", now).is_none());
        let after = recent.ticket();
        look(&mut recent, &running(), after, now);
        assert!(recent.of("u", now).is_some());
    }

    #[test]
    fn a_look_that_took_long_does_not_take_the_place_of_a_later_one() {
        let (mut recent, now) = (Recent::default(), Instant::now());
        let (began, later) = (recent.ticket(), now + Duration::from_millis(10));
        look(&mut recent, &Sighting { name: "later".into(), ..running() }, began, later);
        look(&mut recent, &running(), began, now);
        assert_eq!(recent.of("u", later).unwrap().seen.name, "later");
    }

    #[test]
    fn a_balloon_stands_where_it_was_seen_before_until_it_is_given_a_target() {
        let (mut recent, now) = (Recent::default(), Instant::now());
        let began = recent.ticket();
        look(&mut recent, &running(), began, now);
        let kept = recent.of("u", now).unwrap();
        assert_eq!((kept.stands(now), kept.stands(now + LASTS)), (Some(384 << 10), None));
        assert_eq!(kept.after(&step(Scope::Live, memory())).unwrap().stands(now), None);
        let still = |actual, first| Some(Still { actual, since: 1000, first });
        let long_ago = now.checked_sub(STANDS * 2).unwrap();
        for still in [None, still(384 << 10, now), still(300 << 10, long_ago)] {
            recent.looked(&running(), (began, now), still);
            assert_eq!(recent.of("u", now).unwrap().stands(now), None, "{still:?}");
        }
    }

    #[test]
    fn what_a_step_may_have_touched_is_not_told_of_before() {
        let kept = || {
            let (mut recent, now) = (Recent::default(), Instant::now());
            let began = recent.ticket();
            look(&mut recent, &running(), began, now);
            recent.of("u", now).unwrap()
        };
        let limit = Values { cpu_limit: Some(Limit::At(Cpus::whole(1))), ..Values::default() };
        let after = |scope, values| kept().after(&step(scope, values)).map(|kept| (kept.saved, kept.balloon));
        assert_eq!(after(Scope::Live, limit), Some((false, false)));
        assert_eq!(after(Scope::Live, memory()), Some((false, true)));
        assert_eq!(after(Scope::Saved, memory()), Some((true, false)));
        let cpus = Values { cpus: Some(Limit::At(Cpus::whole(2))), ..Values::default() };
        let plugged = Values { plugged: Some(ByteCount::mib(1)), ..memory() };
        assert_eq!((after(Scope::Live, cpus), after(Scope::Live, plugged)), (None, None));
        assert!(kept().after(&Action::Kill).is_none());
        let twice = kept().after(&step(Scope::Live, memory())).unwrap().after(&step(Scope::Live, limit)).unwrap();
        assert!(twice.balloon);
    }

    #[test]
    fn what_can_move_unseen_and_more_than_are_kept_are_asked_about_whole() {
        let (mut recent, now) = (Recent::default(), Instant::now());
        let began = recent.ticket();
        let mut with_device = running();
        with_device.live.as_mut().unwrap().device_size = 1 << 20;
        for seen in [Sighting { process: None, ..running() }, with_device] {
            look(&mut recent, &seen, began, now);
            assert!(recent.of("u", now).is_none());
        }
        for number in 0..=MOST {
            look(&mut recent, &Sighting { uuid: number.to_string(), ..running() }, began, now);
        }
        assert!(recent.of("0", now).is_some() && recent.of(&MOST.to_string(), now).is_none());
        look(&mut recent, &running(), began, now + LASTS);
        assert_eq!(recent.kept.len(), 1, "what is old has made room");
    }
}
