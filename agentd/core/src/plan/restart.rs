//! The plan of a resize that can't be made live: down, saved anew, up again, with what was asked for. Only where the caller
//! has allowed a restart by name, and hard only where also that was allowed. What was down stays down.

use std::fmt::Display;

use super::checks::{able, admit_restart, check_bounds, check_scaling, check_shrink};
use super::power::{KILL_TIME, START_TIME};
use super::resize::{Needed, Place};
use super::steps::steps;
use super::{Action, Aim, Inputs, Plan, Preparation, Redefinition, Settle, Step, Targets, UndoClass, Values, describe};
use crate::api::ResizeRequest;
use crate::config::Shrink;
use crate::error::{Code, Numbers, Problem};
use crate::instance::{Ability, Field, Reading, Saved, State, Usage};
use crate::units::{ByteCount, Cpus, Limit};

/// What a VM boots with is counted by that much: QEMU's machines take no less.
const BOOT_GRAIN: ByteCount = ByteCount::mib(1);

/// Whether a restart, or another definition of what is down, may make possible what was refused.
pub(super) fn may_help(inputs: &Inputs<'_>, refused: &Problem) -> bool {
    let restartable = matches!(inputs.observed.state, State::Running | State::Stopped | State::Crashed);
    restartable
        && inputs.observed.saved == Saved::Apart
        && matches!(refused.code, Code::RestartRequired | Code::Unsupported | Code::InvalidState)
}

/// A resize by restart, before its definition is made.
#[derive(Debug)]
pub(super) struct ByRestart {
    plan: Plan,
    /// What the saved definition needs for it; `None` where it has that.
    pub(super) redefinition: Option<Redefinition>,
    force: bool,
}

impl ByRestart {
    /// What has to be done for these targets, which could not be reached live.
    pub(super) fn new(
        inputs: &Inputs<'_>,
        request: &ResizeRequest,
        mut plan: Plan,
        refused: Problem,
    ) -> Result<Self, Problem> {
        let observed = inputs.observed;
        // What its engine can't do for any run of it no restart brings.
        if plan.targets.cpu_limit.is_some() && matches!(observed.cpu_limit.live, Ability::No(Code::Unsupported, _)) {
            return Err(refused);
        }
        let targets = &mut plan.targets;
        let beyond =
            |value: Option<Cpus>| value.filter(|value| observed.cpus.saved_ceiling.is_none_or(|most| *value > most));
        let cpus = beyond(targets.cpus.and_then(|aim| aim.requested.at()));
        let mut memory = None;
        if let Some(aim) = &mut targets.memory
            && let Limit::At(wanted) = aim.requested
        {
            let beyond = observed.memory.saved_ceiling.is_none_or(|most| wanted > most);
            // What no balloon gives back is what it boots with.
            if beyond || matches!(observed.memory.live, Ability::No(Code::Unsupported, _)) {
                memory = Some(boots_with(aim, wanted, &mut plan.notes)?);
            } else if let Some(fits) = observed.saved_parts.and_then(|parts| parts.fit(wanted)) {
                in_blocks(aim, wanted, fits, &mut plan.notes);
            }
        }
        let redefinition = (cpus.is_some() || memory.is_some()).then_some(Redefinition::Boot { cpus, memory });
        Ok(ByRestart { plan, redefinition, force: request.force })
    }

    /// The plan, with what the backend made of the definition.
    pub(super) fn plan(self, inputs: &Inputs<'_>, made: Option<&Preparation>) -> Result<Plan, Problem> {
        let ByRestart { mut plan, redefinition, force } = self;
        let (observed, targets) = (inputs.observed, plan.targets);
        let up = observed.state.is_up();
        let saved = Needed::of(&targets, observed, Place { live: false, saved: true, together: false }).saved;
        able(inputs, Field::Cpus, &observed.cpus, None, saved.cpus)?;
        able(inputs, Field::CpuLimit, &observed.cpu_limit, None, saved.cpu_limit)?;
        able(inputs, Field::Memory, &observed.memory, None, saved.memory)?;
        check_bounds(inputs, &targets)?;
        check_scaling(inputs, &targets)?;
        // What nobody can tell is in use does not outlive the restart.
        let known = matches!(observed.used, Usage::Known(_)) || inputs.rules.shrink == Shrink::Never;
        if let Some(aim) = targets.memory.as_ref().filter(|_| up && known) {
            check_shrink(inputs, aim)?;
        }
        let boots_anew = matches!(redefinition, Some(Redefinition::Boot { memory: Some(_), .. }));
        if up {
            plan.charge = admit_restart(inputs, &targets, boots_anew)?;
        }
        let mut rest = saved;
        if up {
            let timeout = inputs.rules.stop_timeout;
            plan.steps.push(power(inputs, Action::Shutdown, Settle::Within(timeout)));
            if force {
                plan.steps.push(power(inputs, Action::Kill, Settle::Within(KILL_TIME)));
            }
        }
        if redefinition.is_some() {
            // It may have been made for something else than what is aimed at by now.
            let Some(made) = made.filter(|made| Some(made.of) == redefinition) else {
                return Err(
                    Problem::new(Code::Busy, format!("{} was changed meanwhile", observed.reference)).hint("ask again")
                );
            };
            plan.notes.extend(made.notes.iter().chain(&made.changes).cloned());
            reaches(inputs, &targets, made)?;
            if !made.changes.is_empty() {
                plan.steps.push(made.step(&observed.reference));
            }
            if boots_anew {
                rest.memory = None;
            }
        }
        let place = Place { live: false, saved: true, together: false };
        let needed = Needed { live: Values::default(), saved: rest };
        plan.steps.extend(steps(inputs, &needed, place, |scope, values| Action::Set { scope, values }));
        if up {
            let values = Values {
                cpus: targets.cpus.map(|aim| aim.requested),
                cpu_limit: targets.cpu_limit.map(|aim| aim.requested),
                memory: targets.memory.map(|aim| aim.requested),
                plugged: None,
            };
            plan.steps.push(Step {
                undo: None,
                undo_what: None,
                class: UndoClass::None,
                ..power(inputs, Action::Boot { values }, Settle::Within(START_TIME))
            });
            let how =
                if force { "it is restarted, hard where it does not shut down in time" } else { "it is restarted" };
            plan.notes.push(format!("{} can't get this live: {how}", observed.reference));
            also_saved("cpus", targets.cpus.is_none(), &observed.cpus, &mut plan.notes);
            also_saved("cpu_limit", targets.cpu_limit.is_none(), &observed.cpu_limit, &mut plan.notes);
            also_saved("memory", targets.memory.is_none(), &observed.memory, &mut plan.notes);
        }
        Ok(plan)
    }
}

/// A VM's boot memory is a whole number of MiB.
fn boots_with(aim: &mut Aim<ByteCount>, wanted: ByteCount, notes: &mut Vec<String>) -> Result<ByteCount, Problem> {
    let boot = wanted
        .round_up_to(BOOT_GRAIN)
        .ok_or_else(|| Problem::new(Code::InvalidRequest, format!("memory {wanted} is more than any host has")))?;
    if boot != wanted {
        notes.push(format!("memory {wanted} is rounded up to {boot}: a VM boots with a multiple of {BOOT_GRAIN}"));
    }
    (aim.requested, aim.saved_requested) = (Limit::At(boot), None);
    Ok(boot)
}

/// What is plugged comes in blocks.
fn in_blocks(aim: &mut Aim<ByteCount>, wanted: ByteCount, fits: ByteCount, notes: &mut Vec<String>) {
    if fits != wanted {
        notes.push(format!("memory {wanted} is rounded up to {fits}: it is plugged in blocks"));
    }
    (aim.requested, aim.saved_requested) = (Limit::At(fits), None);
}

/// A restart brings all that is saved, asked for or not.
fn also_saved<T: Copy + PartialEq + Display>(name: &str, unnamed: bool, reading: &Reading<T>, notes: &mut Vec<String>) {
    if let (true, Some(now), Some(saved)) = (unnamed, reading.accepted, reading.persistent)
        && now != saved
    {
        notes.push(format!("it then also has what was saved before: {name} {now} → {saved}"));
    }
}

/// The definition that was made must let it have what was asked for.
fn reaches(inputs: &Inputs<'_>, targets: &Targets, made: &Preparation) -> Result<(), Problem> {
    let reference = &inputs.observed.reference;
    let refused = |field: &str, most: String, want: String, numbers: Numbers| {
        let notes = made.notes.join("; ");
        let why = if notes.is_empty() { String::new() } else { format!(": {notes}") };
        let detail = format!("the definition of {reference} can't be given {want} {field}, {most} at most{why}");
        Problem::new(Code::Unsupported, detail).numbers(numbers)
    };
    if let (Some(Limit::At(want)), Some(most)) = (targets.cpus.map(|aim| aim.requested), made.after.cpus)
        && want > most
    {
        return Err(refused("cpus", most.to_string(), want.to_string(), Numbers::default()));
    }
    if let (Some(Limit::At(want)), Some(most)) = (targets.memory.map(|aim| aim.requested), made.after.memory)
        && want > most
    {
        return Err(refused("memory", most.to_string(), want.to_string(), Numbers::default()));
    }
    Ok(())
}

/// A step down or up. Its way back is to run again: taken back the last first, that is when all else is as it was.
fn power(inputs: &Inputs<'_>, action: Action, settle: Settle) -> Step {
    let reference = &inputs.observed.reference;
    let undo = Action::Start;
    Step {
        what: describe(reference, &action),
        undo_what: Some(describe(reference, &undo)),
        action,
        undo: Some(undo),
        class: UndoClass::Attempt,
        settle,
    }
}
