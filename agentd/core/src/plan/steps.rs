//! The steps of a resize: from the surest to undo to the least sure, each with its way back.

use super::resize::{Needed, Place};
use super::{Action, Inputs, Plan, Scope, Settle, Step, UndoClass, Values, describe};
use crate::instance::{Ability, Field, Kind, Observed, Parts, Reading};
use crate::units::{ByteCount, Limit};

/// The steps, from the surest to undo to the least sure.
/// `action` makes the call that sets some values.
pub(super) fn steps(
    inputs: &Inputs<'_>,
    needed: &Needed,
    place: Place,
    action: impl Fn(Scope, Values) -> Action,
) -> Vec<Step> {
    let observed = inputs.observed;
    let kind = observed.reference.kind();
    let step = |scope, values, class, settle| step(observed, scope, values, action(scope, values), class, settle);
    if place.together {
        // What ran with another value than what was saved does so again after an undo.
        let both = (needed.saved != Values::default()).then_some((Scope::Both, needed.saved));
        let apart = needed.live.beside(&needed.saved);
        let live = (place.live && apart != Values::default()).then_some((Scope::Live, apart));
        let steps = both.into_iter().chain(live);
        return steps.map(|(scope, values)| step(scope, values, UndoClass::Exact, Settle::AtOnce)).collect();
    }
    if kind != Kind::Vm {
        let live = (needed.live != Values::default())
            .then(|| step(Scope::Live, needed.live, UndoClass::Exact, Settle::AtOnce));
        return live.into_iter().collect();
    }
    let only = |field: Field, values: &Values| match field {
        Field::Cpus => values.cpus.map(|cpus| Values { cpus: Some(cpus), ..Values::default() }),
        Field::CpuLimit => values.cpu_limit.map(|limit| Values { cpu_limit: Some(limit), ..Values::default() }),
        Field::Memory => values.memory.map(|memory| Values { memory: Some(memory), ..Values::default() }),
    };
    let order = [
        (Scope::Saved, Field::Cpus, UndoClass::Exact, Settle::AtOnce),
        (Scope::Saved, Field::CpuLimit, UndoClass::Exact, Settle::AtOnce),
        (Scope::Saved, Field::Memory, UndoClass::Exact, Settle::AtOnce),
        (Scope::Live, Field::CpuLimit, UndoClass::Exact, Settle::AtOnce),
        (Scope::Live, Field::Memory, UndoClass::Exact, Settle::Guest),
        (Scope::Live, Field::Cpus, UndoClass::Attempt, Settle::Guest),
    ];
    let mut steps = Vec::new();
    for (scope, field, class, settle) in order {
        let live = scope == Scope::Live;
        let values = if live { &needed.live } else { &needed.saved };
        let parts = if live { observed.parts } else { observed.saved_parts };
        match (only(field, values), parts) {
            (Some(Values { memory: Some(Limit::At(memory)), .. }), Some(parts)) => {
                steps.extend(part_by_part(observed, scope, parts, memory, settle, &action));
            }
            (Some(values), _) => steps.push(step(scope, values, class, settle)),
            (None, _) => {}
        }
    }
    steps
}

/// The steps of memory that is made up of parts: each moves one, and goes back to where that was.
fn part_by_part(
    observed: &Observed,
    scope: Scope,
    parts: Parts,
    memory: ByteCount,
    settle: Settle,
    action: impl Fn(Scope, Values) -> Action,
) -> Vec<Step> {
    let mut now = Values { memory: Some(Limit::At(parts.sum())), plugged: Some(parts.plugged), ..Values::default() };
    let mut steps = Vec::new();
    for stop in parts.way_to(memory) {
        let values = Values { memory: Some(Limit::At(stop.memory)), plugged: stop.plugged, ..Values::default() };
        let before = Values { plugged: now.plugged.filter(|_| stop.plugged.is_some()), ..now };
        // What was plugged needs the guest to give it back.
        let exact = scope == Scope::Saved || stop.plugged.is_none();
        let class = if exact { UndoClass::Exact } else { UndoClass::Attempt };
        let undo = Action::Restore { scope, values: before, saved: None, native: observed.native.clone() };
        steps.push(with_undo(observed, action(scope, values), undo, class, settle));
        now = Values { plugged: stop.plugged.or(now.plugged), ..values };
    }
    steps
}

/// What can't be taken back is told before it is done: a limit that nothing can take away again, or that nothing can put
/// back.
pub(super) fn make_one_way(observed: &Observed, values: &Values, plan: &mut Plan) {
    fn caution<T: Copy + PartialEq>(value: Option<Limit<T>>, reading: &Reading<T>) -> Option<String> {
        match (value?, reading.persistent, &reading.unlimit) {
            (Limit::Unlimited, Some(Limit::At(_)), Ability::OneWay(why)) => Some(why.clone()),
            (Limit::At(_), Some(Limit::Unlimited), Ability::No(_, why)) => Some(why.clone()),
            _ => None,
        }
    }
    let cautions = [caution(values.cpus, &observed.cpus), caution(values.memory, &observed.memory)];
    for caution in cautions.into_iter().flatten() {
        plan.notes.push(format!("this can't be taken back: {caution}"));
        for step in &mut plan.steps {
            (step.undo, step.undo_what, step.class) = (None, None, UndoClass::None);
        }
    }
}

/// One step with its way back: the values of before, from the backend's own.
fn step(observed: &Observed, scope: Scope, values: Values, action: Action, class: UndoClass, settle: Settle) -> Step {
    let old = |saved: bool| Values {
        cpus: values.cpus.and(if saved { observed.cpus.persistent } else { observed.cpus.accepted }),
        cpu_limit: values.cpu_limit.and(if saved {
            observed.cpu_limit.persistent
        } else {
            observed.cpu_limit.accepted
        }),
        memory: values.memory.and(if saved { observed.memory.persistent } else { observed.memory.accepted }),
        plugged: None,
    };
    let up = observed.state.is_up();
    let apart = (scope == Scope::Both && up && old(true) != old(false)).then(|| old(true));
    let values = old(scope == Scope::Saved || !up);
    let undo = Action::Restore { scope, values, saved: apart, native: observed.native.clone() };
    with_undo(observed, action, undo, class, settle)
}

fn with_undo(observed: &Observed, action: Action, undo: Action, class: UndoClass, settle: Settle) -> Step {
    Step {
        what: describe(&observed.reference, &action),
        undo_what: Some(describe(&observed.reference, &undo)),
        action,
        undo: Some(undo),
        class,
        settle,
    }
}
