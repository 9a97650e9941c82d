//! What a change aims at, field by field and side by side, and how what is observed stands to that: the one measure of whether a change
//! was made, was not, or is half-way, for the executor, the recovery and the loans.

use serde::{Deserialize, Serialize};

use super::{Scope, Values};
use crate::instance::{Field, Observed, Reading};
use crate::units::{ByteCount, Cpus, Limit, Quantity};

/// The value of one field before, and the value asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound(serialize = "T: Serialize", deserialize = "T: Quantity + Deserialize<'de>"))]
pub struct Aim<T> {
    /// Before: of what runs where that is changed, else of what is saved.
    pub before: Option<Limit<T>>,
    /// What was saved before.
    pub saved_before: Option<Limit<T>>,
    /// Asked for, absolute and in the backend's grain.
    pub requested: Limit<T>,
    /// What the next start is to have, where that is another value than what runs is to have: what differed before a
    /// change differs again after its undo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved_requested: Option<Limit<T>>,
    /// Whether what runs is to have it.
    pub live: bool,
    /// Whether the next start is to have it.
    pub saved: bool,
}

impl<T: Copy + PartialEq> Aim<T> {
    /// What the next start is to have, where it is changed.
    pub fn to_save(&self) -> Limit<T> {
        self.saved_requested.unwrap_or(self.requested)
    }

    /// The value asked for and the value of before, of each side that it changes.
    pub(crate) fn sides(&self) -> impl Iterator<Item = (Limit<T>, Option<Limit<T>>)> {
        let live = self.live.then_some((self.requested, self.before));
        live.into_iter().chain(self.saved.then_some((self.to_save(), self.saved_before)))
    }
}

/// What a change aims at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Targets {
    /// vCPUs or CPU limit.
    pub cpus: Option<Aim<Cpus>>,
    /// CPU-time cap of a whole VM.
    pub cpu_limit: Option<Aim<Cpus>>,
    /// Memory.
    pub memory: Option<Aim<ByteCount>>,
}

/// How what is observed stands to what a change aimed at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Every field has what was asked for.
    Asked,
    /// Every field has what it had before.
    Before,
    /// Some have, some haven't.
    Between,
}

impl Targets {
    /// The fields that are aimed at.
    pub fn fields(&self) -> Vec<Field> {
        let fields = [
            self.cpus.map(|_| Field::Cpus),
            self.cpu_limit.map(|_| Field::CpuLimit),
            self.memory.map(|_| Field::Memory),
        ];
        fields.into_iter().flatten().collect()
    }

    /// Whether all that was to be changed live is not only accepted but there.
    pub fn are_observed(&self, observed: &Observed) -> bool {
        let values = Values {
            cpus: self.cpus.filter(|aim| aim.live).map(|aim| aim.requested),
            cpu_limit: self.cpu_limit.filter(|aim| aim.live).map(|aim| aim.requested),
            memory: self.memory.filter(|aim| aim.live).map(|aim| aim.requested),
            plugged: None,
        };
        values.are_observed(Scope::Live, observed)
    }

    /// Whether what ran before differed from what was saved.
    pub fn differed(&self) -> bool {
        fn one<T: Copy + PartialEq>(aim: Option<Aim<T>>) -> bool {
            aim.is_some_and(|aim| aim.live && aim.saved && aim.before != aim.saved_before)
        }
        one(self.cpus) || one(self.cpu_limit) || one(self.memory)
    }

    /// Whether every value is one of before or the one asked for: nobody else has set any.
    pub fn are_ours(&self, observed: &Observed) -> bool {
        fn one<T: Copy + PartialEq>(aim: Option<Aim<T>>, reading: &Reading<T>) -> bool {
            aim.is_none_or(|aim| {
                let live = !aim.live || reading.accepted == aim.before || reading.accepted == Some(aim.requested);
                let saved = reading.persistent;
                live && (!aim.saved || saved == aim.saved_before || saved == Some(aim.to_save()))
            })
        }
        one(self.cpus, &observed.cpus) && one(self.cpu_limit, &observed.cpu_limit) && one(self.memory, &observed.memory)
    }

    /// Compares the aims with what is accepted and saved now.
    pub fn standing(&self, observed: &Observed) -> Standing {
        fn one<T: Copy + PartialEq>(aim: Option<Aim<T>>, reading: &Reading<T>, asked: &mut bool, before: &mut bool) {
            let Some(aim) = aim else { return };
            *asked &= !aim.live || reading.accepted == Some(aim.requested);
            *asked &= !aim.saved || reading.persistent == Some(aim.to_save());
            *before &= !aim.live || reading.accepted == aim.before;
            *before &= !aim.saved || reading.persistent == aim.saved_before;
        }
        let (mut asked, mut before) = (true, true);
        one(self.cpus, &observed.cpus, &mut asked, &mut before);
        one(self.cpu_limit, &observed.cpu_limit, &mut asked, &mut before);
        one(self.memory, &observed.memory, &mut asked, &mut before);
        match (asked, before) {
            (true, _) => Standing::Asked,
            (false, true) => Standing::Before,
            (false, false) => Standing::Between,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::vm;
    use super::*;

    const fn at(cpus: u32) -> Limit<Cpus> {
        Limit::At(Cpus::whole(cpus))
    }

    /// From 2 to 4, on these sides.
    fn aim(live: bool, saved: bool) -> Aim<Cpus> {
        Aim { before: Some(at(2)), saved_before: Some(at(2)), requested: at(4), saved_requested: None, live, saved }
    }

    /// Sets what runs and what is saved.
    type Set = fn(&mut Observed, Limit<Cpus>, Limit<Cpus>);

    /// The three fields by which the same aim can be reached, each with what sets it.
    fn fields(aim: Aim<Cpus>) -> [(Targets, Set); 3] {
        let mib = |cpus: Limit<Cpus>| match cpus {
            Limit::At(cpus) => Limit::At(ByteCount::new(cpus.millis() << 20).unwrap()),
            Limit::Unlimited => Limit::Unlimited,
        };
        let memory = Aim {
            before: aim.before.map(mib),
            saved_before: aim.saved_before.map(mib),
            requested: mib(aim.requested),
            saved_requested: aim.saved_requested.map(mib),
            live: aim.live,
            saved: aim.saved,
        };
        fn bytes(cpus: Limit<Cpus>) -> Option<Limit<ByteCount>> {
            cpus.at().and_then(|cpus| ByteCount::new(cpus.millis() << 20)).map(Limit::At)
        }
        let none = Targets::default();
        [
            (Targets { cpus: Some(aim), ..none }, |seen, live, saved| {
                (seen.cpus.accepted, seen.cpus.observed, seen.cpus.persistent) = (Some(live), Some(live), Some(saved));
            }),
            (Targets { cpu_limit: Some(aim), ..none }, |seen, live, saved| {
                let field = &mut seen.cpu_limit;
                (field.accepted, field.observed, field.persistent) = (Some(live), Some(live), Some(saved));
            }),
            (Targets { memory: Some(memory), ..none }, |seen, live, saved| {
                let field = &mut seen.memory;
                (field.accepted, field.observed, field.persistent) = (bytes(live), bytes(live), bytes(saved));
            }),
        ]
    }

    #[test]
    fn what_is_seen_of_each_side_that_is_aimed_at_tells_where_a_change_stands() {
        use Standing::{Asked, Before, Between};
        // On which sides, what runs, what is saved: where it stands, and whether all of it is the change's own.
        let table = [
            ((true, false), 2, 2, Before, true),
            ((true, false), 4, 2, Asked, true),
            ((true, false), 4, 9, Asked, true),
            ((true, false), 3, 2, Between, false),
            ((false, true), 2, 2, Before, true),
            ((false, true), 2, 4, Asked, true),
            ((false, true), 9, 4, Asked, true),
            ((false, true), 2, 3, Between, false),
            ((true, true), 2, 2, Before, true),
            ((true, true), 4, 4, Asked, true),
            ((true, true), 4, 2, Between, true),
            ((true, true), 2, 4, Between, true),
            ((true, true), 3, 4, Between, false),
            ((true, true), 4, 3, Between, false),
            ((false, false), 9, 9, Asked, true),
        ];
        for ((live, saved), runs, is_saved, standing, ours) in table {
            for (targets, set) in fields(aim(live, saved)) {
                let mut seen = vm();
                set(&mut seen, at(runs), at(is_saved));
                let what = format!("{targets:?}: {runs} runs, {is_saved} is saved");
                assert_eq!(targets.standing(&seen), standing, "{what}");
                assert_eq!(targets.are_ours(&seen), ours, "{what}");
                assert_eq!(targets.are_observed(&seen), !live || runs == 4, "{what}");
            }
        }
    }

    #[test]
    fn one_field_that_is_half_way_or_another_s_is_enough() {
        for (one, set_one) in fields(aim(true, false)) {
            for (other, set_other) in fields(aim(true, false)).into_iter().filter(|(other, _)| *other != one) {
                let both = Targets {
                    cpus: one.cpus.or(other.cpus),
                    cpu_limit: one.cpu_limit.or(other.cpu_limit),
                    memory: one.memory.or(other.memory),
                };
                assert_eq!(both.fields().len(), 2);
                let mut seen = vm();
                set_one(&mut seen, at(4), at(2));
                set_other(&mut seen, at(2), at(2));
                assert_eq!((both.standing(&seen), both.are_ours(&seen)), (Standing::Between, true));
                assert!(!both.are_observed(&seen));
                set_other(&mut seen, at(3), at(2));
                assert_eq!((both.standing(&seen), both.are_ours(&seen)), (Standing::Between, false));
            }
        }
    }

    #[test]
    fn the_saved_side_has_a_value_of_its_own_where_it_is_to_differ() {
        let differs = Aim { saved_requested: Some(at(3)), saved_before: Some(at(1)), ..aim(true, true) };
        for (targets, set) in fields(differs) {
            let mut seen = vm();
            for (runs, saved, standing) in
                [(4, 3, Standing::Asked), (4, 4, Standing::Between), (2, 1, Standing::Before)]
            {
                set(&mut seen, at(runs), at(saved));
                assert_eq!(targets.standing(&seen), standing, "{runs} runs, {saved} is saved");
            }
            assert_eq!(targets.fields().len(), 1);
        }
    }

    #[test]
    fn what_ran_differed_from_what_was_saved_only_where_both_sides_are_aimed_at() {
        let apart = |live, saved| Aim { saved_before: Some(at(1)), ..aim(live, saved) };
        for (aim, differed) in [
            (apart(true, true), true),
            (apart(true, false), false),
            (apart(false, true), false),
            (aim(true, true), false),
        ] {
            for (targets, _) in fields(aim) {
                assert_eq!(targets.differed(), differed, "{targets:?}");
            }
        }
        assert!(!Targets::default().differed() && Targets::default().fields().is_empty());
    }
}
