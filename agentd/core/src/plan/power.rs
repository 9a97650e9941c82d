//! Plans of the verbs that change whether an instance runs. Bringing something up passes admission like a growth; bringing
//! it down asks first and is hard only where the caller said so.

use std::time::Duration;

use super::{Action, Inputs, Plan, Settle, Step, UndoClass, Verb, admission, describe};
use crate::error::{Code, Problem};
use crate::instance::State;

/// How long a start may take until the instance runs.
pub(super) const START_TIME: Duration = Duration::from_secs(30);
/// How long a hard stop may take until it is seen.
pub(super) const KILL_TIME: Duration = Duration::from_secs(15);

/// Brings an instance up.
pub fn start(inputs: &Inputs<'_>) -> Result<Plan, Problem> {
    let observed = inputs.observed;
    let reference = &observed.reference;
    let mut plan = inputs.empty_plan(Verb::Start);
    match observed.state {
        State::Running | State::Starting => {
            plan.notes.push(format!("{reference} is already {}", observed.state));
            return Ok(plan);
        }
        State::Paused => {
            return Err(Problem::new(Code::InvalidState, format!("{reference} is paused, not stopped"))
                .hint("it has to be resumed, not started"));
        }
        State::Stopping | State::Unknown => {
            return Err(Problem::new(Code::InvalidState, format!("{reference} is {}", observed.state))
                .hint("wait until it is stopped"));
        }
        State::Stopped | State::Crashed => {}
    }
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

/// Brings an instance down: gracefully within `timeout`, then hard only with `force`.
pub fn stop(inputs: &Inputs<'_>, timeout: Option<Duration>, force: bool) -> Result<Plan, Problem> {
    let observed = inputs.observed;
    let reference = &observed.reference;
    let mut plan = inputs.empty_plan(Verb::Stop);
    match observed.state {
        State::Stopped | State::Crashed => {
            plan.notes.push(format!("{reference} is already {}", observed.state));
            return Ok(plan);
        }
        State::Paused if !force => {
            return Err(Problem::new(
                Code::InvalidState,
                format!("{reference} is paused: a shutdown would not be seen now and would fire when it resumes"),
            )
            .hint("resume it first, or add --force to switch it off hard"));
        }
        _ => {}
    }
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
