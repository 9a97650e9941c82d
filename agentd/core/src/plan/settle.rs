//! What a step must have brought about, against what is observed. Pure; the executor asks, waits, and asks again.

use super::{Action, Scope, Values};
use crate::instance::{Kind, Observed, Reading, State};
use crate::units::{Cpus, Limit};

/// How far a step has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reached {
    /// What it is for is observed.
    Yes,
    /// It was accepted; what is observed moves or may move. What is seen, in words.
    NotYet(String),
    /// It was not even accepted. What is seen, in words.
    No(String),
}

/// systemd's cgroup driver rounds a quota up to 1 % of a CPU, so what is read back may be that much above.
const CPU_TOLERANCE: u64 = 10;

/// Whether a limit of CPU time reads back as what was asked for.
pub fn same_cpu_time(want: Limit<Cpus>, seen: Limit<Cpus>) -> bool {
    match (want, seen) {
        (Limit::At(want), Limit::At(seen)) => {
            seen >= want && seen.millis() - want.millis() < CPU_TOLERANCE || seen == want
        }
        (want, seen) => want == seen,
    }
}

/// How an instance's `cpus` are compared: vCPUs are counted, CPU time is measured.
pub(super) fn cpus_rule(observed: &Observed) -> fn(Limit<Cpus>, Limit<Cpus>) -> bool {
    if observed.reference.kind() == Kind::Vm { |a, b| a == b } else { same_cpu_time }
}

/// Compares what an action should bring about with what is observed.
pub fn reached(action: &Action, observed: &Observed) -> Reached {
    match action {
        Action::Set { scope, values } | Action::Restore { scope, values, .. } => {
            let (scope, saved) = (*scope, action.saves().unwrap_or(values));
            let cpus = values.cpus.zip(saved.cpus);
            let cpu_limit = values.cpu_limit.zip(saved.cpu_limit);
            let memory = values.memory.zip(saved.memory);
            let fields = [
                cpus.map(|want| field("cpus", scope, want, &observed.cpus, observed, cpus_rule(observed))),
                cpu_limit.map(|want| field("cpu_limit", scope, want, &observed.cpu_limit, observed, same_cpu_time)),
                memory.map(|want| field("memory", scope, want, &observed.memory, observed, |a, b| a == b)),
            ];
            fields.into_iter().flatten().fold(Reached::Yes, worse)
        }
        Action::Define { headroom, .. } => {
            let (cpus, memory) = (observed.cpus.saved_ceiling, observed.memory.saved_ceiling);
            let boots = headroom.boots_with.is_none_or(|boot| observed.memory.persistent == Some(Limit::At(boot)));
            if boots && (cpus, memory) == (headroom.cpus, headroom.memory) {
                return Reached::Yes;
            }
            let told = |value: Option<String>| value.unwrap_or_else(|| "unknown".into());
            let (cpus, memory) = (told(cpus.map(|c| c.to_string())), told(memory.map(|m| m.to_string())));
            Reached::No(format!("its saved definition lets it have {cpus} vCPUs and {memory}"))
        }
        Action::Start => match observed.state {
            State::Running => Reached::Yes,
            state => Reached::NotYet(format!("it is {state}")),
        },
        Action::Boot { values } => {
            let set = Action::Set { scope: Scope::Live, values: *values };
            match (reached(&Action::Start, observed), reached(&set, observed)) {
                (Reached::Yes, Reached::No(seen) | Reached::NotYet(seen)) => Reached::NotYet(seen),
                (Reached::Yes, Reached::Yes) => Reached::Yes,
                (down, _) => down,
            }
        }
        Action::Restart { boot } => match observed.state {
            State::Running if observed.boot != *boot => Reached::Yes,
            State::Running => Reached::NotYet("it still runs as it did".into()),
            state => Reached::NotYet(format!("it is {state}")),
        },
        Action::Pause => match observed.state {
            State::Paused => Reached::Yes,
            state => Reached::NotYet(format!("it is {state}")),
        },
        // One that is starting has its own clock.
        Action::Unpause => match observed.state {
            State::Running | State::Starting => Reached::Yes,
            state => Reached::NotYet(format!("it is {state}")),
        },
        Action::Shutdown | Action::Kill => match observed.state {
            State::Stopped | State::Crashed => Reached::Yes,
            state => Reached::NotYet(format!("it is {state}")),
        },
    }
}

/// The same, and that the guest has obeyed where it can be asked: vCPUs may be there and not be used. Not of what is taken
/// back: what was offline before may stay so.
pub fn obeyed(action: &Action, observed: &Observed) -> Reached {
    let cpus = match action {
        Action::Set { scope: Scope::Live, values } | Action::Boot { values } => values.cpus,
        _ => None,
    };
    let there = cpus.filter(|want| observed.reference.kind() == Kind::Vm && observed.cpus.observed == Some(*want));
    match (reached(action, observed), there, observed.cpus.confirmed) {
        (Reached::Yes, Some(there), Some(online)) if online != there => {
            Reached::NotYet(format!("the guest has {online} of its {there} vCPUs online"))
        }
        (reached, ..) => reached,
    }
}

/// Whether what a step set is still what is there: only then may its undo run.
pub fn unchanged_since(action: &Action, observed: &Observed) -> bool {
    !matches!(reached(action, observed), Reached::No(_))
}

/// Whether what an action was asked for may stand though nothing of it is seen: no hypervisor tells a balloon's target, and
/// a guest may follow it at any later time.
pub fn may_stand_unseen(action: &Action, observed: &Observed) -> bool {
    let memory = matches!(action.sets(), Some((Scope::Live, values)) if values.memory.is_some());
    memory && observed.reference.kind() == Kind::Vm
}

/// Whether what is there may have come of a step that failed: each field has what the step was to set or what its undo puts
/// back. vCPUs are plugged one by one, so those of a VM may be on the way; so may its balloon in a recovery, because what
/// target it was given not every hypervisor tells. Anything else was set by somebody else.
pub fn may_be_ours(action: &Action, undo: &Action, observed: &Observed, recovering: bool) -> bool {
    let (Some((scope, new)), Some((_, old))) = (action.sets(), undo.sets()) else { return true };
    // What is compared below is what is saved, but for a live step.
    let old = undo.saves().filter(|_| scope != Scope::Live).unwrap_or(old);
    fn value<T: Copy>(scope: Scope, reading: &Reading<T>) -> Option<Limit<T>> {
        if scope == Scope::Live { reading.accepted } else { reading.persistent }
    }
    let either = |new: Option<Limit<Cpus>>, old: Option<Limit<Cpus>>, now: Option<Limit<Cpus>>| {
        new.is_none() || [new, old].into_iter().flatten().any(|set| now.is_some_and(|now| same_cpu_time(set, now)))
    };
    let cpus = value(scope, &observed.cpus);
    let on_the_way = observed.reference.kind() == Kind::Vm
        && match (new.cpus.and_then(Limit::at), old.cpus.and_then(Limit::at), cpus.and_then(Limit::at)) {
            (Some(new), Some(old), Some(now)) => (new.min(old)..=new.max(old)).contains(&now),
            _ => false,
        };
    let memory = value(scope, &observed.memory);
    let balloon_on_the_way = recovering
        && scope == Scope::Live
        && observed.reference.kind() == Kind::Vm
        && match (new.memory.and_then(Limit::at), old.memory.and_then(Limit::at), memory.and_then(Limit::at)) {
            (Some(new), Some(old), Some(now)) => (new.min(old)..=new.max(old)).contains(&now),
            _ => false,
        };
    (on_the_way || either(new.cpus, old.cpus, cpus))
        && either(new.cpu_limit, old.cpu_limit, value(scope, &observed.cpu_limit))
        && (new.memory.is_none()
            || balloon_on_the_way
            || memory.is_some() && (memory == new.memory || memory == old.memory))
}

/// Whether somebody else has set every field since that a step was to set: nothing of the step is left to be taken back.
pub fn overwritten(action: &Action, observed: &Observed) -> bool {
    fn other<T: Copy>(
        scope: Scope,
        set: Option<Limit<T>>,
        now: &Reading<T>,
        up: bool,
        same: fn(Limit<T>, Limit<T>) -> bool,
    ) -> bool {
        let Some(set) = set else { return true };
        let differs = |value: Option<Limit<T>>| value.is_some_and(|value| !same(set, value));
        // What is accepted and what is enforced are two things.
        let live = differs(now.accepted) && (now.observed.is_none() || differs(now.observed));
        let saved = differs(now.persistent);
        match scope {
            Scope::Live => live,
            Scope::Saved => saved,
            Scope::Both => saved && (live || !up),
        }
    }
    let Some((scope, set)) = action.sets() else { return false };
    let up = observed.state.is_up();
    other(scope, set.cpus, &observed.cpus, up, cpus_rule(observed))
        && other(scope, set.cpu_limit, &observed.cpu_limit, up, same_cpu_time)
        && other(scope, set.memory, &observed.memory, up, |a, b| a == b)
}

fn field<T: Copy + PartialEq + std::fmt::Display>(
    name: &str,
    scope: Scope,
    (want, want_saved): (Limit<T>, Limit<T>),
    reading: &Reading<T>,
    observed: &Observed,
    same: fn(Limit<T>, Limit<T>) -> bool,
) -> Reached {
    let fits = |value: Option<Limit<T>>| value.is_some_and(|value| same(want, value));
    let fits_saved = reading.persistent.is_some_and(|value| same(want_saved, value));
    let told = |value: Option<Limit<T>>| value.map_or_else(|| "unknown".to_owned(), |value| value.to_string());
    if scope != Scope::Live && !fits_saved {
        return Reached::No(format!("{name} saved is {}, asked for was {want_saved}", told(reading.persistent)));
    }
    if scope == Scope::Saved || (scope == Scope::Both && !observed.state.is_up()) {
        return Reached::Yes;
    }
    if !fits(reading.accepted) {
        return Reached::No(format!("{name} accepted is {}, asked for was {want}", told(reading.accepted)));
    }
    if !fits(reading.observed) {
        return Reached::NotYet(format!("{name} is {}, asked for was {want}", told(reading.observed)));
    }
    Reached::Yes
}

fn worse(a: Reached, b: Reached) -> Reached {
    match (&a, &b) {
        (Reached::No(_), _) | (_, Reached::Yes) => a,
        (_, Reached::No(_)) | (Reached::Yes, _) => b,
        (Reached::NotYet(_), Reached::NotYet(_)) => a,
    }
}

impl Values {
    /// Whether the values of every field here are those observed in this scope: nothing is left of what a step did.
    pub fn are_observed(&self, scope: Scope, observed: &Observed) -> bool {
        reached(&Action::Set { scope, values: *self }, observed) == Reached::Yes
    }
}
