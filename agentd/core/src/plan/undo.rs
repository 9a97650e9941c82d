//! The plan of an undo: a change taken back, only the fields that it touched, each side to its own value of before, and
//! only where nobody has changed it since. What an operation's record says is held against what is observed now; from
//! there on it goes the way of every resize.

use super::resize::{Place, complete, place};
use super::scalar::Scalar;
use super::settle::{cpus_rule, same_cpu_time};
use super::{Action, Aim, Inputs, Plan, Scope, Targets, Values, Verb};
use crate::error::{Code, Problem};
use crate::instance::{Field, Reading, Saved};
use crate::operation::{Operation, Outcome, same_boot};
use crate::units::Limit;

/// Plans to take `taken_back` back, or refuses it with what is in the way.
pub fn undo(inputs: &Inputs<'_>, taken_back: &Operation) -> Result<Plan, Problem> {
    let observed = inputs.observed;
    let (reference, id) = (&observed.reference, &taken_back.id);
    let mut plan = inputs.empty_plan(Verb::Undo);
    plan.undoes = Some(id.clone());
    refuse_verb(taken_back)?;
    refuse_outcome(taken_back)?;
    if matches!(taken_back.outcome, Outcome::Unchanged | Outcome::Planned) {
        plan.notes.push(format!("operation {id} changed nothing"));
        return Ok(plan);
    }
    if observed.id != taken_back.identity.id {
        return Err(Problem::new(
            Code::InvalidState,
            format!(
                "operation {id} changed another {reference}; the one that has that name by now was never part of it"
            ),
        )
        .hint(format!("see what this one has: ctl show {reference}")));
    }
    inputs.refuse_if_blocked()?;

    let place = place(observed, None, &mut plan.notes)?;
    let undo = Undo { inputs, taken_back, place };
    let then = &taken_back.targets;
    plan.targets = Targets {
        cpus: undo.aim(Field::Cpus, then.cpus, &observed.cpus, cpus_rule(observed), &mut plan.notes)?,
        cpu_limit: undo.aim(Field::CpuLimit, then.cpu_limit, &observed.cpu_limit, same_cpu_time, &mut plan.notes)?,
        memory: undo.aim(Field::Memory, then.memory, &observed.memory, |a, b| a == b, &mut plan.notes)?,
    };
    let mut plan = complete(inputs, plan, place, |scope, values| undo.action(scope, values))?;
    if plan.targets == Targets::default() {
        plan.notes.push(format!("nothing is left of operation {id}: what it changed has ended"));
    } else if plan.steps.is_empty() {
        plan.notes.push(format!("{reference} is already as it was before operation {id}"));
    } else if let Some(record) =
        taken_back.steps.iter().find(|record| record.step.undo.is_none() && !record.step.action.starts())
    {
        return Err(Problem::new(
            Code::Unsupported,
            format!("operation {id} can't be taken back: nothing takes back `{}`", record.step.what),
        )
        .hint(format!("change what can be changed: ctl resize {reference}")));
    }
    Ok(plan)
}

/// Refuses what has no values to go back to.
fn refuse_verb(taken_back: &Operation) -> Result<(), Problem> {
    let (Operation { id, reference, verb, .. }, opposite) = match taken_back.verb {
        Verb::Resize | Verb::Undo => return Ok(()),
        Verb::Start => (taken_back, Verb::Stop),
        Verb::Stop => (taken_back, Verb::Start),
        Verb::Suspend => (taken_back, Verb::Resume),
        Verb::Resume => (taken_back, Verb::Suspend),
        Verb::Restart => {
            return Err(Problem::new(
                Code::Unsupported,
                format!("operation {id} is a restart: there is nothing of it to take back", id = taken_back.id),
            )
            .hint(format!("`ctl show {}` tells how it runs now", taken_back.reference)));
        }
        Verb::Prepare => {
            return Err(Problem::new(
                Code::Unsupported,
                format!("operation {} is a prepare, which only makes room: it is not taken back", taken_back.id),
            )
            .hint("its maximum takes nothing of the host; change the definition by hand if it has to go"));
        }
    };
    Err(Problem::new(Code::Unsupported, format!("operation {id} is a {verb}, and only changes of size are taken back"))
        .hint(format!("ctl {opposite} {reference}")))
}

/// Refuses what has not ended, and what did not end as it was meant to.
fn refuse_outcome(taken_back: &Operation) -> Result<(), Problem> {
    let Operation { id, reference, .. } = taken_back;
    let (why, hint) = match taken_back.outcome {
        Outcome::Changed | Outcome::Pending | Outcome::Unchanged | Outcome::Planned => return Ok(()),
        Outcome::Running => ("has not ended", format!("wait for it: ctl show {reference}")),
        Outcome::Unknown => ("has not ended: what came of it isn't known yet", format!("ctl show {reference}")),
        Outcome::Refused => ("was refused: nothing was done", "there is nothing to take back".to_owned()),
        Outcome::RolledBack => ("failed and was taken back then", "there is nothing to take back".to_owned()),
        Outcome::Partial => (
            "ended half done, so there is no whole change to take back",
            format!("look at it with `ctl show {reference}`, put it right, then: ctl clear-hold {reference}"),
        ),
        Outcome::Abandoned => (
            "was given up when its instance was restarted or replaced",
            format!("see what it has with `ctl show {reference}`, and say what it should have: ctl resize {reference}"),
        ),
    };
    Err(Problem::new(Code::InvalidState, format!("operation {id} of {reference} {why}")).hint(hint))
}

/// What each field's way back is judged from.
struct Undo<'a> {
    inputs: &'a Inputs<'a>,
    taken_back: &'a Operation,
    place: Place,
}

impl Undo<'_> {
    /// One field's way back: what each side that was changed had before. `None` where no such side is left.
    fn aim<T: Scalar>(
        &self,
        field: Field,
        then: Option<Aim<T>>,
        reading: &Reading<T>,
        same: fn(Limit<T>, Limit<T>) -> bool,
        notes: &mut Vec<String>,
    ) -> Result<Option<Aim<T>>, Problem> {
        let Some(then) = then else { return Ok(None) };
        // What was already so was not changed, and is somebody else's to change since.
        let live = then.live && then.before != Some(then.requested);
        let saved = then.saved && then.saved_before != Some(then.to_save());
        // One call has always changed both sides, to one value; whether the instance was up then makes no difference.
        let (live, saved, saved_before) = if self.inputs.observed.saved == Saved::Together {
            (live || saved, live || saved, then.before)
        } else {
            (live, saved, then.saved_before)
        };
        let (live, saved) = (live && self.place.live, saved && self.place.saved);

        let live_before = live.then(|| {
            let now = reading.accepted;
            self.way_back(field, "", then.requested, then.before, now, same)
        });
        let saved_before = saved.then(|| {
            let now = reading.persistent;
            self.way_back(field, "saved ", then.to_save(), saved_before, now, same)
        });
        let (live_before, saved_before) = (live_before.transpose()?, saved_before.transpose()?);
        let Some(requested) = live_before.or(saved_before) else { return Ok(None) };
        if let (false, Some(now)) = (live, reading.accepted.filter(|now| self.place.live && *now != requested)) {
            notes.push(format!("what runs keeps {} {now}: only its next start was changed", field.as_str()));
        }
        Ok(Some(Aim {
            before: if live { reading.accepted } else { reading.persistent },
            saved_before: reading.persistent,
            requested,
            saved_requested: saved_before.filter(|saved| *saved != requested),
            live,
            saved,
        }))
    }

    /// The value of before, where the present one is still what the change gave, or is back already.
    fn way_back<T: Scalar>(
        &self,
        field: Field,
        side: &str,
        given: Limit<T>,
        before: Option<Limit<T>>,
        now: Option<Limit<T>>,
        same: fn(Limit<T>, Limit<T>) -> bool,
    ) -> Result<Limit<T>, Problem> {
        let Operation { id, reference, .. } = self.taken_back;
        let name = field.as_str();
        let option = name.replace('_', "-");
        let Some(before) = before else {
            let detail = format!("what the {side}{name} of {reference} was before operation {id} is unknown");
            return Err(Problem::new(Code::Unsupported, detail)
                .hint(format!("say what it should have: ctl resize {reference} --{option} …")));
        };
        if now.is_some_and(|now| same(given, now) || same(before, now)) {
            return Ok(before);
        }
        let now = now.map_or_else(|| "unknown".to_owned(), |now| now.to_string());
        let detail = format!(
            "the {side}{name} of {reference} is {now} now; operation {id} had set it to {given} (before: {before})"
        );
        let value = before.to_string().replace(' ', "");
        Err(Problem::new(Code::InvalidState, detail).hint(format!(
            "it was changed since; if it is to go back all the same: ctl resize {reference} --{option} {value}"
        )))
    }

    /// The call that brings some values back: with the backend's own values of before, verbatim, where they still mean
    /// what they meant. Those of what runs are of one start; what is saved outlives it, and is as the change left it.
    fn action(&self, scope: Scope, values: Values) -> Action {
        let (then, now) = (&self.taken_back.identity.boot, &self.inputs.observed.boot);
        let valid = scope != Scope::Live || same_boot(then.as_deref(), now.as_deref());
        let recorded = self.taken_back.steps.iter().find_map(|record| match &record.step.undo {
            Some(Action::Restore { scope: of, values: old, native, .. }) if *of == scope && old.include(&values) => {
                Some(native.clone())
            }
            _ => None,
        });
        match recorded.filter(|_| valid) {
            Some(native) => Action::Restore { scope, values, saved: None, native },
            None => Action::Set { scope, values },
        }
    }
}

#[cfg(test)]
mod tests;
