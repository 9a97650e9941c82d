//! Plans of the verbs that change whether an instance runs. Bringing something up passes admission like a growth; bringing
//! it down asks first and is hard only where the caller said so; a restart keeps its share from one to the other.

use std::time::Duration;

use super::checks::admit_restart;
use super::restart::{all_that_is_saved, goes_back_up};
use super::states::goes;
use super::{Action, Inputs, Mark, Plan, Settle, Step, Targets, UndoClass, Values, Verb, admission, describe};
use crate::api::HoldKind;
use crate::error::{Code, Problem};
use crate::instance::{Kind, State};

/// How long a start may take until the instance runs.
pub(super) const START_TIME: Duration = Duration::from_secs(30);
/// How long a hard stop may take until it is seen.
pub(super) const KILL_TIME: Duration = Duration::from_secs(15);
/// How long a freeze or a thaw may take until it is seen.
const PAUSE_TIME: Duration = Duration::from_secs(15);

/// Brings an instance up.
pub fn start(inputs: &Inputs<'_>) -> Result<Plan, Problem> {
    let observed = inputs.observed;
    let reference = &observed.reference;
    let mut plan = inputs.empty_plan(Verb::Start);
    if !goes(observed, Verb::Start, false)? {
        plan.notes.push(format!("{reference} is already {}", observed.state));
        return Ok(plan);
    }
    barred(inputs, observed.barred.power.as_ref())?;
    inputs.refuse_if_blocked()?;
    let wanted = admission::start_charge(observed, inputs.config);
    inputs
        .ledger
        .check(&observed.instance_id(), wanted)
        .map_err(|refused| admission::refusal(inputs, &refused, wanted))?;
    plan.charge = wanted;
    plan.steps.push(step(inputs, Action::Start, Settle::Within(START_TIME)));
    Ok(plan)
}

/// Brings an instance down: gracefully within `timeout`, then hard only with `force`. No hold is in its way.
pub fn stop(inputs: &Inputs<'_>, timeout: Option<Duration>, force: bool) -> Result<Plan, Problem> {
    let observed = inputs.observed;
    let reference = &observed.reference;
    let mut plan = inputs.empty_plan(Verb::Stop);
    if !goes(observed, Verb::Stop, force)? {
        plan.notes.push(format!("{reference} is already {}", observed.state));
        return Ok(plan);
    }
    barred(inputs, observed.barred.power.as_ref())?;
    // A paused guest can't be asked; with force there is only the hard way.
    if observed.state != State::Paused {
        let timeout = timeout.unwrap_or(inputs.rules.stop_timeout);
        plan.steps.push(step(inputs, Action::Shutdown, Settle::Within(timeout)));
    }
    if force {
        plan.steps.push(step(inputs, Action::Kill, Settle::Within(KILL_TIME)));
    }
    let wanted = admission::start_charge(observed, inputs.config);
    let (caps, committed) = (inputs.ledger.caps().host, inputs.ledger.committed());
    let own = inputs.ledger.charge(&observed.instance_id());
    let over_cpus = committed.cpus.saturating_sub(own.cpus).saturating_add(wanted.cpus) > caps.cpus;
    let over_memory = committed.memory.saturating_sub(own.memory).saturating_add(wanted.memory) > caps.memory;
    if over_cpus || over_memory {
        plan.notes
            .push(format!("the host is at its cap: a later start of {reference} would be refused as things stand"));
    }
    Ok(plan)
}

/// Brings an instance down and up again: down gracefully within `timeout`, then hard only with `force`. What it is charged
/// stays reserved in between, so that nobody else can take its place while it is down.
pub fn restart(inputs: &Inputs<'_>, timeout: Option<Duration>, force: bool) -> Result<Plan, Problem> {
    let observed = inputs.observed;
    goes(observed, Verb::Restart, force)?;
    barred(inputs, observed.barred.power.as_ref().or(observed.barred.restart.as_ref()))?;
    inputs.refuse_if_blocked()?;
    let mut plan = inputs.empty_plan(Verb::Restart);
    plan.charge = admit_restart(inputs, &Targets::default(), false)?;
    let timeout = Settle::Within(timeout.unwrap_or(inputs.rules.stop_timeout));
    if observed.reference.kind() == Kind::Unit {
        // One job of systemd's, so that what hangs on the unit is brought back with it.
        plan.steps.push(step(inputs, Action::Restart { boot: observed.boot.clone() }, timeout));
        plan.notes.push("what does not stop by itself systemd kills when the unit's TimeoutStopSec is over".into());
        return Ok(plan);
    }
    if observed.state != State::Paused {
        plan.steps.push(goes_back_up(inputs, Action::Shutdown, timeout));
    }
    if force {
        plan.steps.push(goes_back_up(inputs, Action::Kill, Settle::Within(KILL_TIME)));
    }
    plan.steps.push(step(inputs, Action::Boot { values: Values::default() }, Settle::Within(START_TIME)));
    all_that_is_saved(observed, &Targets::default(), &mut plan.notes);
    Ok(plan)
}

/// Pauses an instance, and holds it so that nothing but a stop or a resume is done to it. One that is paused already is held;
/// one that is held and was woken is paused again.
pub fn suspend(inputs: &Inputs<'_>, reason: &str) -> Result<Plan, Problem> {
    let observed = inputs.observed;
    let runs = goes(observed, Verb::Suspend, false)?;
    barred(inputs, observed.barred.pause.as_ref())?;
    inputs.refuse_if_blocked_but_by(HoldKind::Suspended)?;
    let mut plan = inputs.empty_plan(Verb::Suspend);
    let held = inputs.holds.iter().find(|hold| hold.hold == HoldKind::Suspended);
    if runs {
        plan.steps.push(pause(inputs, Action::Pause, Action::Unpause));
    } else if held.is_some() {
        plan.notes.push(format!("{} is already suspended", observed.reference));
        return Ok(plan);
    } else {
        plan.notes.push(format!("{} is already paused; a resume will leave it so", observed.reference));
    }
    // One that was woken behind our back goes back to what it was before it was suspended first.
    let before = held.and_then(|hold| hold.before).unwrap_or(observed.state);
    plan.mark = Some(Mark::Hold { reason: reason.to_owned(), before });
    Ok(plan)
}

/// Lifts the hold of a suspended instance and puts back the state of before; wakes one that somebody else has paused.
pub fn resume(inputs: &Inputs<'_>) -> Result<Plan, Problem> {
    let observed = inputs.observed;
    let reference = &observed.reference;
    let held = inputs.holds.iter().find(|hold| hold.hold == HoldKind::Suspended);
    let mut plan = inputs.empty_plan(Verb::Resume);
    let paused = match goes(observed, Verb::Resume, false) {
        // It went down meanwhile: what is left of the suspension is its hold.
        Err(_) if held.is_some() && !observed.state.is_up() => {
            plan.notes.push(format!("{reference} is {} by now; `ctl start {reference}` brings it up", observed.state));
            false
        }
        paused => paused?,
    };
    inputs.refuse_if_blocked_but_by(HoldKind::Suspended)?;
    if paused && held.is_some_and(|hold| hold.before == Some(State::Paused)) {
        plan.notes
            .push(format!("{reference} was paused before it was suspended, and stays so; resume it again to wake it"));
    } else if paused {
        barred(inputs, observed.barred.pause.as_ref())?;
        plan.steps.push(pause(inputs, Action::Unpause, Action::Pause));
    } else if held.is_none() {
        plan.notes.push(format!("{reference} is already {}", observed.state));
    }
    plan.mark = held.map(|_| Mark::Lift);
    Ok(plan)
}

/// Refuses what an instance can't have done to it at all.
fn barred(inputs: &Inputs<'_>, why: Option<&String>) -> Result<(), Problem> {
    match why {
        Some(why) => Err(Problem::new(Code::Unsupported, format!("{}: {why}", inputs.observed.reference))),
        None => Ok(()),
    }
}

/// A step that is not taken back: a start that failed and runs all the same may be somebody else's start, and nobody allowed
/// to switch that off.
fn step(inputs: &Inputs<'_>, action: Action, settle: Settle) -> Step {
    Step {
        what: describe(&inputs.observed.reference, &action),
        undo_what: None,
        action,
        undo: None,
        class: UndoClass::None,
        settle,
    }
}

fn pause(inputs: &Inputs<'_>, action: Action, undo: Action) -> Step {
    let undo_what = Some(describe(&inputs.observed.reference, &undo));
    Step { undo_what, undo: Some(undo), class: UndoClass::Exact, ..step(inputs, action, Settle::Within(PAUSE_TIME)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Hold;
    use crate::instance::Observed;
    use crate::plan::states::{Verdict, verdict};
    use crate::plan::tests::{container, vm, with_holds};

    fn planned(observed: &Observed, holds: &[Hold], verb: Verb, hard: bool) -> Result<Plan, Problem> {
        with_holds(observed, holds, "", |inputs| match verb {
            Verb::Start => start(inputs),
            Verb::Stop => stop(inputs, None, hard),
            Verb::Restart => restart(inputs, None, hard),
            Verb::Suspend => suspend(inputs, "backup"),
            Verb::Resume => resume(inputs),
            Verb::Resize | Verb::Undo | Verb::Prepare => unreachable!("no verb of power"),
        })
    }

    fn suspended(before: State) -> Vec<Hold> {
        vec![Hold { before: Some(before), ..Hold::new(HoldKind::Suspended, "backup".into()) }]
    }

    fn actions(plan: &Plan) -> Vec<&Action> {
        plan.steps.iter().map(|step| &step.action).collect()
    }

    #[test]
    fn every_verb_goes_by_the_table() {
        for mut observed in [vm(), container()] {
            for state in State::ALL {
                observed.state = state;
                if !state.is_up() {
                    observed.boot = None;
                }
                for verb in [Verb::Start, Verb::Stop, Verb::Restart, Verb::Suspend, Verb::Resume] {
                    let (soft, hard) = (planned(&observed, &[], verb, false), planned(&observed, &[], verb, true));
                    let case = format!("{verb} of a {state} one: {soft:?}");
                    match verdict(state, verb) {
                        Verdict::Goes => assert!(!soft.unwrap().steps.is_empty(), "{case}"),
                        Verdict::Already => assert!(soft.unwrap().steps.is_empty(), "{case}"),
                        Verdict::Refused { .. } => {
                            assert_eq!(soft.unwrap_err().code, Code::InvalidState, "{case}");
                            assert_eq!(hard.unwrap_err().code, Code::InvalidState, "{case}");
                        }
                        Verdict::GoesHard { .. } => {
                            assert_eq!(soft.unwrap_err().code, Code::InvalidState, "{case}");
                            assert!(!hard.unwrap().steps.is_empty(), "{case}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_restart_keeps_its_share_and_is_hard_only_where_it_may_be() {
        let observed = vm();
        let plan = planned(&observed, &[], Verb::Restart, false).unwrap();
        assert!(matches!(actions(&plan)[..], [Action::Shutdown, Action::Boot { .. }]), "{plan:?}");
        assert!(plan.charge.cpus > crate::units::Cpus::ZERO && plan.restarts());
        let plan = planned(&observed, &[], Verb::Restart, true).unwrap();
        assert!(matches!(actions(&plan)[..], [Action::Shutdown, Action::Kill, Action::Boot { .. }]), "{plan:?}");
        let paused = Observed { state: State::Paused, ..observed };
        let plan = planned(&paused, &[], Verb::Restart, true).unwrap();
        assert!(matches!(actions(&plan)[..], [Action::Kill, Action::Boot { .. }]), "{plan:?}");
    }

    #[test]
    fn what_is_suspended_takes_nothing_but_stop_and_resume() {
        let observed = Observed { state: State::Paused, ..vm() };
        let holds = suspended(State::Running);
        assert_eq!(planned(&observed, &holds, Verb::Restart, true).unwrap_err().code, Code::Held);
        assert_eq!(actions(&planned(&observed, &holds, Verb::Stop, true).unwrap()), [&Action::Kill]);
        let plan = planned(&observed, &holds, Verb::Resume, false).unwrap();
        assert_eq!((actions(&plan), &plan.mark), (vec![&Action::Unpause], &Some(Mark::Lift)));
        let down = Observed { state: State::Stopped, boot: None, ..vm() };
        assert_eq!(planned(&down, &holds, Verb::Start, false).unwrap_err().code, Code::Held);
        let plan = planned(&down, &holds, Verb::Resume, false).unwrap();
        assert_eq!((plan.steps.len(), &plan.mark), (0, &Some(Mark::Lift)));
        assert!(plan.notes[0].contains("ctl start"), "{plan:?}");
    }

    #[test]
    fn a_resume_puts_back_the_state_of_before() {
        let paused = Observed { state: State::Paused, ..container() };
        let plan = planned(&paused, &[], Verb::Suspend, false).unwrap();
        let mark = Mark::Hold { reason: "backup".into(), before: State::Paused };
        assert_eq!((plan.steps.len(), &plan.mark), (0, &Some(mark)));
        let plan = planned(&paused, &suspended(State::Paused), Verb::Resume, false).unwrap();
        assert_eq!((plan.steps.len(), &plan.mark), (0, &Some(Mark::Lift)));
        // Somebody else's pause is lifted where nothing holds it.
        let plan = planned(&paused, &[], Verb::Resume, false).unwrap();
        assert_eq!((actions(&plan), &plan.mark), (vec![&Action::Unpause], &None));
    }

    #[test]
    fn one_that_was_woken_is_suspended_again_as_it_was() {
        let plan = planned(&vm(), &suspended(State::Running), Verb::Suspend, false).unwrap();
        assert_eq!(actions(&plan), [&Action::Pause]);
        assert_eq!(plan.mark, Some(Mark::Hold { reason: "backup".into(), before: State::Running }));
        let paused = Observed { state: State::Paused, ..vm() };
        let plan = planned(&paused, &suspended(State::Running), Verb::Suspend, false).unwrap();
        assert_eq!((plan.steps.len(), &plan.mark), (0, &None));
    }

    #[test]
    fn no_hold_but_its_own_is_passed() {
        for hold in [HoldKind::NeedsAttention, HoldKind::Recovering] {
            let holds = [Hold::new(hold, "look".into())];
            for verb in [Verb::Suspend, Verb::Restart] {
                assert_eq!(planned(&vm(), &holds, verb, false).unwrap_err().code, Code::Held, "{verb}");
            }
            let paused = Observed { state: State::Paused, ..vm() };
            assert_eq!(planned(&paused, &holds, Verb::Resume, false).unwrap_err().code, Code::Held);
        }
    }

    #[test]
    fn what_an_instance_cant_have_done_to_it_is_unsupported() {
        let mut observed = vm();
        observed.barred.restart = Some("it is transient".into());
        observed.barred.pause = Some("it has no freezer".into());
        for (verb, why) in [(Verb::Restart, "transient"), (Verb::Suspend, "freezer")] {
            let refused = planned(&observed, &[], verb, false).unwrap_err();
            assert!(refused.code == Code::Unsupported && refused.detail.contains(why), "{refused:?}");
        }
        assert!(planned(&observed, &[], Verb::Stop, false).is_ok());
        observed.barred.power = Some("it is a cgroup".into());
        assert_eq!(planned(&observed, &[], Verb::Stop, true).unwrap_err().code, Code::Unsupported);
    }
}
