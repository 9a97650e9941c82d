//! The plan of a resize that can't be made live: down, saved anew, up again, with what was asked for. Only where the caller
//! has allowed a restart by name, and hard only where also that was allowed. What was down stays down.

use std::fmt::Display;

use super::checks::{able, admit_restart, check_bounds, check_scaling, check_shrink};
use super::power::{KILL_TIME, START_TIME};
use super::resize::{Needed, Place, in_blocks};
use super::steps::steps;
use super::{Action, Aim, Inputs, Plan, Preparation, Redefinition, Settle, Step, Targets, UndoClass, Values, describe};
use crate::api::ResizeRequest;
use crate::config::Shrink;
use crate::error::{Code, Numbers, Problem};
use crate::instance::{Ability, Field, Observed, Reading, Saved, State, Usage};
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
            } else {
                in_blocks(observed.saved_parts, observed.saved_parts, aim, &mut plan.notes);
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
            plan.steps.push(goes_back_up(inputs, Action::Shutdown, Settle::Within(timeout)));
            if force {
                plan.steps.push(goes_back_up(inputs, Action::Kill, Settle::Within(KILL_TIME)));
            }
        }
        if redefinition.is_some() {
            // It may have been made for something else than what is aimed at by now.
            let Some(made) = made.filter(|made| Some(made.of) == redefinition) else {
                return Err(
                    Problem::new(Code::Busy, format!("{} was changed meanwhile", observed.reference)).hint("try again")
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
                ..goes_back_up(inputs, Action::Boot { values }, Settle::Within(START_TIME))
            });
            let how =
                if force { "it is restarted, hard where it does not shut down in time" } else { "it is restarted" };
            plan.notes.push(format!("{} can't get this live: {how}", observed.reference));
            all_that_is_saved(observed, &targets, &mut plan.notes);
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

/// A restart brings all that is saved, asked for or not.
pub(super) fn all_that_is_saved(observed: &Observed, targets: &Targets, notes: &mut Vec<String>) {
    also_saved("cpus", targets.cpus.is_none(), &observed.cpus, notes);
    also_saved("cpu_limit", targets.cpu_limit.is_none(), &observed.cpu_limit, notes);
    also_saved("memory", targets.memory.is_none(), &observed.memory, notes);
}

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
pub(super) fn goes_back_up(inputs: &Inputs<'_>, action: Action, settle: Settle) -> Step {
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::instance::{Demand, Observed, Parts};
    use crate::plan::tests::{MIB, vm, with};
    use crate::plan::{Headroom, redefinition, resize};

    /// The plan with a definition that lets it have anything; `of` is what that was made for, where that is something else.
    fn plan_of(observed: &Observed, config: &str, body: Value, of: Option<Redefinition>) -> Result<Plan, Problem> {
        let request = serde_json::from_value(body).unwrap();
        with(observed, config, |inputs| {
            let anything = Headroom { cpus: Some(Cpus::whole(64)), memory: Some(MIB(1 << 20)), boots_with: None };
            let made = redefinition(inputs, &request).map(|asked| Preparation {
                of: of.unwrap_or(asked),
                before: anything,
                after: anything,
                changes: vec!["all".into()],
                notes: Vec::new(),
                old: "old".into(),
                new: "new".into(),
            });
            resize(inputs, &request, made.as_ref())
        })
    }

    fn plan(observed: &Observed, config: &str, mut body: Value) -> Result<Plan, Problem> {
        body["restart"] = "if-needed".into();
        plan_of(observed, config, body, None)
    }

    fn no_balloon() -> Observed {
        let mut web = vm();
        web.memory.live = Ability::No(Code::Unsupported, "it has no balloon device".into());
        web.used = Usage::Unknown;
        web
    }

    #[test]
    fn it_is_bound_by_shrink_and_scaling() {
        let less = || json!({"memory": "512MiB"});
        let code = |seen: &Observed, config, body| plan(seen, config, body).unwrap_err().code;
        let using = |used| Observed { used: Usage::Known(MIB(used)), ..no_balloon() };
        assert!(plan(&no_balloon(), "", less()).unwrap().restarts() && plan(&using(100), "", less()).is_ok());
        assert_eq!(code(&using(500), "", less()), Code::BelowMinimum);
        let never = "[[limit]]\nmatch = \"*\"\nshrink = \"never\"\n";
        assert_eq!(code(&no_balloon(), never, less()), Code::BelowMinimum);
        assert_eq!(code(&vm(), "[scaling]\nmax_cpus = 5\n", json!({"cpus": 6})), Code::LimitExceeded);
        assert!(plan(&vm(), "[scaling]\nmax_cpus = 6\n", json!({"cpus": 6})).is_ok());
        // What is no live change is not forbidden as one.
        let off = "[[limit]]\nmatch = \"*\"\nlive = false\n";
        assert!(plan(&vm(), off, json!({"cpus": 3})).unwrap().restarts());
    }

    #[test]
    fn what_is_saved_already_is_admitted_and_told_with_it() {
        let mut web = vm();
        web.cpus.persistent = Some(Limit::At(Cpus::whole(4)));
        web.demand = Demand { cpus: web.cpus.persistent, ..web.demand };
        let more = || json!({"memory": "3GiB"});
        let small = "[capacity]\ncpus = 3\n[scaling]\nmax_memory = \"8GiB\"\n";
        assert_eq!(plan(&web, small, more()).unwrap_err().code, Code::CapacityExceeded);
        let planned = plan(&web, "[scaling]\nmax_memory = \"8GiB\"\n", more()).unwrap();
        assert_eq!(planned.charge.cpus, Cpus::whole(4));
        assert!(planned.notes.iter().any(|note| note.ends_with("saved before: cpus 2 → 4")), "{:?}", planned.notes);
    }

    #[test]
    fn where_only_what_is_saved_is_in_the_way_nothing_is_restarted() {
        let mut web = vm();
        web.cpus.saved_ceiling = Some(Cpus::whole(2));
        let refused = plan(&web, "", json!({"cpus": 3})).unwrap_err();
        assert_eq!(refused.code, Code::Unsupported, "{refused}");
    }

    #[test]
    fn a_definition_that_was_made_for_something_else_is_not_used() {
        let body = || json!({"cpus": 6, "restart": "if-needed"});
        let other = Redefinition::Boot { cpus: Some(Cpus::whole(7)), memory: None };
        assert_eq!(plan_of(&vm(), "", body(), Some(other)).unwrap_err().code, Code::Busy);
        assert!(plan_of(&vm(), "", body(), None).is_ok());
    }

    #[test]
    fn what_no_start_brings_takes_no_restart() {
        let mut web = vm();
        web.cpu_limit.live = Ability::No(Code::Unsupported, "no CPU controller".into());
        let refused = plan(&web, "", json!({"cpu_limit": 1.5})).unwrap_err();
        assert_eq!(refused.code, Code::Unsupported, "{refused}");
    }

    #[test]
    fn what_is_plugged_comes_in_blocks_also_by_a_restart() {
        let mut web = vm();
        let parts = Parts { base: MIB(1024), balloon: MIB(1024), plugged: MIB(0), size: MIB(1024), block: MIB(128) };
        (web.parts, web.saved_parts) = (Some(parts), Some(parts));
        let off = "[[limit]]\nmatch = \"*\"\nlive = false\n";
        let planned = plan(&web, off, json!({"memory": "1100MiB"})).unwrap();
        assert_eq!(planned.targets.memory.unwrap().requested, Limit::At(MIB(1152)));
        assert!(planned.notes.iter().any(|note| note.contains("in blocks")), "{:?}", planned.notes);
        // What it boots with is a whole number of MiB.
        let planned = plan(&no_balloon(), "", json!({"memory": (512_u64 << 20) + 4096})).unwrap();
        assert_eq!(planned.targets.memory.unwrap().requested, Limit::At(MIB(513)));
    }
}
