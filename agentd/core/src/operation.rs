//! An operation: one requested change from its plan to its outcome, and the one function that knows which step may follow
//! which, live and after a crash. A plain value: the daemon records it, replies with it, and recovers from it.
//!
//! ```text
//!   step:       planned ─► doing ─► done ────► undoing ─► undone
//!                            │  └─► pending       └─────► undo-failed
//!                            └────► failed ───► undoing
//!   operation:  running ─► changed | unchanged | pending | rolled-back | partial | unknown | abandoned
//!               refused (never ran)
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::api::Loan;
use crate::error::{Code, Problem};
use crate::instance::{Field, InstanceId, Observed, Ref, State};
use crate::ledger::Charge;
use crate::plan::{Action, Mark, Plan, Reached, Settle, Standing, Step, Targets, Verb, obeyed, reached};

/// Where a step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum StepState {
    /// Not begun.
    Planned,
    /// The call to the backend is under way, or its read-back is.
    Doing,
    /// Done and read back.
    Done,
    /// Accepted; the guest has not obeyed yet.
    Pending,
    /// Not needed: what it is for had already come about.
    Skipped,
    /// The backend refused, or the read-back showed something else.
    Failed,
    /// Being taken back.
    Undoing,
    /// Taken back and read back.
    Undone,
    /// Taking it back failed.
    UndoFailed,
}

impl StepState {
    /// Whether a step may go from here to `next`. The only place that knows.
    pub const fn may_become(self, next: StepState) -> bool {
        use StepState::{Doing, Done, Failed, Pending, Planned, Skipped, UndoFailed, Undoing, Undone};
        matches!(
            (self, next),
            (Planned, Doing | Skipped)
                | (Doing, Done | Pending | Failed)
                | (Done | Pending | Failed, Undoing)
                | (Undoing, Undone | UndoFailed)
        )
    }
}

/// How an operation ended, or that it still runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// A dry run: nothing was done.
    Planned,
    /// It is under way.
    Running,
    /// Done and read back.
    Changed,
    /// It was already so.
    Unchanged,
    /// Accepted by the backend, the guest has not obeyed yet.
    Pending,
    /// A step failed and everything before it was undone.
    RolledBack,
    /// Refused before its first step.
    Refused,
    /// A step failed and something before it could not be undone.
    Partial,
    /// The instance was rebooted or replaced meanwhile.
    Abandoned,
    /// A call to the backend did not return; nobody knows yet.
    Unknown,
}

impl Outcome {
    /// The name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Outcome::Planned => "planned",
            Outcome::Running => "running",
            Outcome::Changed => "changed",
            Outcome::Unchanged => "unchanged",
            Outcome::Pending => "pending",
            Outcome::RolledBack => "rolled-back",
            Outcome::Refused => "refused",
            Outcome::Partial => "partial",
            Outcome::Abandoned => "abandoned",
            Outcome::Unknown => "unknown",
        }
    }
}

/// Who asked, as the kernel told it of the socket's peer when it connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Who {
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Process id; for the record only, never for a decision.
    pub pid: i32,
    /// The process's name; for the record only.
    pub command: String,
}

impl fmt::Display for Who {
    /// The command in quotes: a process may give itself any name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid {} ({:?})", self.uid, self.command)
    }
}

/// The command on record of what agentd does by itself: to put drift back. Longer than the kernel lets a process's name be.
pub const REPAIR: &str = "agentd (repair_drift)";
/// And who takes back what was lent.
pub const RETURN: &str = "agentd (--for)";
/// And who starts what went down after its restart was given up.
pub const RESTART: &str = "agentd (--restart)";

/// What of an instance must still be the same for an undo or a recovery to concern it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Domain UUID or full container id.
    pub id: String,
    /// What changes with every start.
    pub boot: Option<String>,
}

impl Identity {
    /// The identity that an observation shows.
    pub fn of(observed: &Observed) -> Self {
        Identity { id: observed.id.clone(), boot: observed.boot.clone() }
    }
}

/// Whether two boots are the same, as far as both tell: a backend that can't always see when a process started writes `3`
/// for what is `3@1234` at other times.
pub fn same_boot(a: Option<&str>, b: Option<&str>) -> bool {
    let (Some(a), Some(b)) = (a, b) else { return a == b };
    let split = |boot: &'_ str| {
        boot.split_once('@').map_or((boot.to_owned(), None), |(id, start)| (id.to_owned(), Some(start.to_owned())))
    };
    let ((a_id, a_start), (b_id, b_start)) = (split(a), split(b));
    a_id == b_id && (a_start.is_none() || b_start.is_none() || a_start == b_start)
}

/// A step with where it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The step as planned.
    pub step: Step,
    /// Where it is.
    pub state: StepState,
    /// The backend's own words, where it failed.
    pub error: Option<String>,
}

/// One requested change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Operation {
    /// A ULID: unique, and sorts by time.
    pub id: String,
    /// Of which instance.
    pub reference: Ref,
    /// And of which one exactly.
    pub identity: Identity,
    /// What was asked for.
    pub verb: Verb,
    /// By whom.
    pub who: Who,
    /// The values before and the values asked for.
    pub targets: Targets,
    /// The steps.
    pub steps: Vec<StepRecord>,
    /// What the instance is charged until the outcome is known.
    pub charge: Charge,
    /// The operation that it takes back.
    pub undoes: Option<String>,
    /// For how many milliseconds it is meant to last, where it goes back by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lent_ms: Option<u64>,
    /// What becomes of the instance's hold once the steps are done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
    /// How it ended, or that it runs.
    pub outcome: Outcome,
    /// Why, where it ended badly.
    pub problem: Option<(Code, String)>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// Milliseconds since the Unix epoch when it began.
    pub started_ms: u64,
    /// The host's uptime then, where that is to be counted from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_up: Option<Uptime>,
    /// How long it took.
    pub elapsed_ms: u64,
}

/// How long a host has been up: a clock that nobody sets (CLOCK_BOOTTIME).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uptime {
    /// Since which boot: the kernel's id of it.
    pub boot: String,
    /// For how many milliseconds.
    pub ms: u64,
}

/// What a change has left pending: a guest that has not obeyed yet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pending {
    /// The operation's id.
    pub operation: String,
    /// What was asked for.
    pub verb: Verb,
    /// Which fields it moves; none where it is about running or not.
    pub fields: Vec<Field>,
    /// The run that it is about.
    pub boot: Option<String>,
    /// What has to be seen.
    pub awaits: Vec<Action>,
}

impl Pending {
    /// Whether it has come about; `None` where it never will, because that run is over.
    pub fn has_settled(&self, observed: &Observed) -> Option<bool> {
        let begins = |action: &Action| action.starts() || matches!(action, Action::Restart { .. });
        let about_this_run = !self.awaits.iter().any(begins);
        let same_run = same_boot(self.boot.as_deref(), observed.boot.as_deref());
        // That it is down is what a stop waits for.
        let over = observed.state.is_up() || self.awaits.iter().any(Action::is_live);
        if about_this_run && !same_run && over {
            return None;
        }
        Some(self.awaits.iter().all(|action| obeyed(action, observed) == Reached::Yes))
    }

    /// Whether a later change has taken its place: one of the same fields, or one that starts or stops. One that came to nothing,
    /// or whose end nobody knows, has not.
    pub fn is_superseded_by(&self, later: &Operation) -> bool {
        if later.is_open() || matches!(later.outcome, Outcome::RolledBack | Outcome::Unchanged) {
            return false;
        }
        let fields = later.targets.fields();
        // A pause keeps the run, and what a guest is to do in it.
        let keeps_the_run = later.verb.resizes() || matches!(later.verb, Verb::Suspend | Verb::Resume);
        let power = !later.does_nothing() && (self.fields.is_empty() || !keeps_the_run);
        power || self.fields.iter().any(|field| fields.contains(field))
    }
}

/// How a change that was cut off goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Course {
    /// Everything that it was to do is there.
    Done,
    /// What is missing is done: what is there can't be taken back.
    Finish,
    /// What is there of it is taken back.
    TakeBack {
        /// Another run of the instance began meanwhile; what was changed of the one before went with it.
        rebooted: bool,
    },
    /// Another instance has its name by now: nothing of it is there.
    Replaced,
}

/// A step was asked to go where it can't.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("step {index} can't go from {from:?} to {to:?}")]
pub struct IllegalTransition {
    /// Which step.
    pub index: usize,
    /// Where it is, or `None` where there is no such step.
    pub from: Option<StepState>,
    /// Where it was to go.
    pub to: StepState,
}

impl Operation {
    /// An operation at its beginning.
    pub fn new(id: String, who: Who, plan: Plan, started_ms: u64) -> Self {
        Operation {
            id,
            reference: plan.reference,
            identity: plan.identity,
            verb: plan.verb,
            who,
            targets: plan.targets,
            steps: plan
                .steps
                .into_iter()
                .map(|step| StepRecord { step, state: StepState::Planned, error: None })
                .collect(),
            charge: plan.charge,
            undoes: plan.undoes,
            lent_ms: plan.lent_ms,
            mark: plan.mark,
            outcome: Outcome::Running,
            problem: None,
            notes: plan.notes,
            started_ms,
            started_up: None,
            elapsed_ms: 0,
        }
    }

    /// What its instance is known by; empty for one that never had a plan.
    pub fn instance_id(&self) -> InstanceId {
        InstanceId { kind: self.reference.kind(), id: self.identity.id.clone() }
    }

    /// Moves one step on, where that is legal. Steps are taken back the last first: each when those after it are out of the
    /// way, taken back or not.
    pub fn advance(&mut self, index: usize, to: StepState) -> Result<(), IllegalTransition> {
        let in_the_way = |record: &StepRecord| {
            matches!(record.state, StepState::Doing | StepState::Done | StepState::Pending | StepState::Undoing)
        };
        let in_order =
            to != StepState::Undoing || self.steps.get(index + 1..).is_none_or(|after| !after.iter().any(in_the_way));
        match self.steps.get_mut(index) {
            Some(record) if in_order && record.state.may_become(to) => {
                record.state = to;
                Ok(())
            }
            other => Err(IllegalTransition { index, from: other.map(|record| record.state), to }),
        }
    }

    /// Begins the first step whose beginning is to be on record, ahead of the exact ones before it; which that is. A recovery takes
    /// a step that is recorded as begun for one that may have begun.
    pub fn mark_ahead(&mut self) -> Option<usize> {
        let first = self.steps.iter().position(|record| record.step.is_marked())?;
        self.advance(first, StepState::Doing).ok().map(|()| first)
    }

    /// Whether there is nothing to do.
    pub fn does_nothing(&self) -> bool {
        self.steps.is_empty() && self.mark.is_none()
    }

    /// Whether its outcome is not known yet: it runs, or a call of it did not return.
    pub fn is_open(&self) -> bool {
        matches!(self.outcome, Outcome::Running | Outcome::Unknown)
    }

    /// What its instance has for a time only since it ended.
    pub fn loan(&self) -> Option<Loan> {
        let lasts = self.lent_ms.filter(|_| matches!(self.outcome, Outcome::Changed | Outcome::Pending))?;
        let (operation, fields) = (self.id.clone(), self.targets.fields());
        let due_up = self.started_up.clone().map(|up| Uptime { ms: up.ms.saturating_add(lasts), ..up });
        Some(Loan { operation, fields, due_ms: self.started_ms.saturating_add(lasts), due_up })
    }

    /// What it has left pending.
    pub fn pending(&self) -> Option<Pending> {
        let awaited = self.steps.iter().filter(|record| record.state == StepState::Pending);
        let awaits: Vec<Action> = awaited.map(|record| record.step.action.clone()).collect();
        if self.outcome != Outcome::Pending || awaits.is_empty() {
            return None;
        }
        let (operation, boot) = (self.id.clone(), self.identity.boot.clone());
        Some(Pending { operation, verb: self.verb, fields: self.targets.fields(), boot, awaits })
    }

    /// Whether its instance's hold is put or lifted by it. One that is on its way puts it at once, and lifts it once it has
    /// settled.
    pub fn marks(&self) -> Option<&Mark> {
        let due = |mark: &&Mark| match self.outcome {
            Outcome::Changed => true,
            Outcome::Pending => matches!(mark, Mark::Hold { .. }),
            _ => false,
        };
        self.mark.as_ref().filter(due)
    }

    /// Whether it takes its instance down and brings it up again.
    pub fn restarts(&self) -> bool {
        self.steps.iter().any(|record| matches!(record.step.action, Action::Boot { .. }))
    }

    /// Whether it has asked its instance to shut down, and that was not seen to happen.
    pub fn asked_in_vain(&self) -> bool {
        let asked = |record: &StepRecord| record.step.action == Action::Shutdown && record.state == StepState::Failed;
        self.restarts() && self.steps.iter().any(asked)
    }

    /// The run that it has brought up is the one that has its values from now on.
    pub fn note_restart(&mut self, observed: &Observed) {
        if self.restarts() && matches!(self.outcome, Outcome::Changed | Outcome::Pending) {
            self.identity.boot.clone_from(&observed.boot);
        }
    }

    /// Whether somebody else set the same in the middle of it: nothing of it is left, and what stands is drift.
    pub fn was_overwritten(&self) -> bool {
        self.outcome == Outcome::RolledBack && matches!(self.problem, Some((Code::VersionMismatch, _)))
    }

    /// Ends it well.
    pub fn succeed(&mut self) {
        let pending = self.steps.iter().any(|record| record.state == StepState::Pending);
        self.outcome = match (self.does_nothing(), pending) {
            (true, _) => Outcome::Unchanged,
            (_, true) => Outcome::Pending,
            _ => Outcome::Changed,
        };
    }

    /// Ends it badly.
    pub fn fail(&mut self, outcome: Outcome, problem: &Problem) {
        self.outcome = outcome;
        self.problem = Some((problem.code, problem.detail.clone()));
    }

    /// Brings a change of CPUs and memory that was cut off in line with what is seen now, by the same transitions that it
    /// takes when it is not, and tells how it goes on.
    ///
    /// The record may lag behind: what an exact step did is only known by its effect. One that was written when its last
    /// call did not return ([`Outcome::Unknown`]) is complete, and what it has as planned was never begun.
    pub fn resume(&mut self, observed: &Observed) -> Result<Course, IllegalTransition> {
        if observed.id != self.identity.id {
            return Ok(Course::Replaced);
        }
        let rebooted =
            self.identity.boot.is_some() && !same_boot(self.identity.boot.as_deref(), observed.boot.as_deref());
        let standing = self.targets.standing(observed);
        let mut finish = false;
        for index in 0..self.steps.len() {
            let record = &self.steps[index];
            let marked = self.outcome == Outcome::Unknown || record.step.is_marked();
            if !matches!((record.state, marked), (StepState::Planned, false) | (StepState::Doing, _)) {
                continue;
            }
            let went = if rebooted && record.step.action.is_live() {
                // What it did went with that run.
                (record.state == StepState::Doing).then_some(StepState::Failed)
            } else {
                let left = record
                    .step
                    .undo
                    .as_ref()
                    .map_or(standing == Standing::Before, |undo| reached(undo, observed) == Reached::Yes);
                match reached(&record.step.action, observed) {
                    Reached::Yes => Some(StepState::Done),
                    _ if left => (record.state == StepState::Doing).then_some(StepState::Failed),
                    // Only what waits for something moves on by itself: an engine that kept a value and ended before what
                    // runs had it never gives it that.
                    Reached::NotYet(_) if record.step.settle != Settle::AtOnce => Some(StepState::Pending),
                    _ if record.step.undo.is_none() && self.targets.are_ours(observed) => {
                        finish = true;
                        None
                    }
                    _ => Some(StepState::Failed),
                }
            };
            if went.is_some() && record.state == StepState::Planned {
                self.advance(index, StepState::Doing)?;
            }
            if let Some(went) = went {
                self.advance(index, went)?;
            }
        }
        let there = |state| matches!(state, StepState::Done | StepState::Pending | StepState::Skipped);
        let begun = |record: &StepRecord| there(record.state) && record.step.undo.is_none();
        // An exact step that a recovery before this one took back is still on record as done.
        let taken_back = |StepRecord { step, .. }: &StepRecord| {
            step.undo.as_ref().is_some_and(|undo| reached(undo, observed) == Reached::Yes)
                && reached(&step.action, observed) != Reached::Yes
        };
        let done = |record: &StepRecord| there(record.state) && !taken_back(record);
        Ok(if self.steps.iter().all(done) && !rebooted && !self.steps.is_empty() {
            Course::Done
        } else if (finish || self.steps.iter().any(begun)) && !rebooted {
            Course::Finish
        } else {
            Course::TakeBack { rebooted }
        })
    }

    /// Says in words how a stop went; nothing for other verbs.
    pub fn note_stop(&mut self, observed: &Observed) {
        if self.verb != Verb::Stop || self.steps.is_empty() {
            return;
        }
        let killed = self.steps.iter().any(|r| r.step.action == Action::Kill && r.state == StepState::Done);
        self.notes.push(match (observed.state, killed) {
            (State::Stopped | State::Crashed, false) => "it shut down by itself when asked".into(),
            (State::Stopped | State::Crashed, true) => {
                "it did not shut down within the timeout and was switched off hard".into()
            }
            (state, _) => format!("it was asked to shut down and is still {state}; --force would switch it off hard"),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::{Course, Operation, Outcome, Who};
    use crate::instance::Observed;
    use crate::plan::Scope;
    use crate::plan::tests::{container, plan, vm};
    use crate::units::{Cpus, Limit};

    use super::StepState::{self, Doing, Done, Failed, Pending, Planned, Skipped, UndoFailed, Undoing, Undone};

    const ALL: [StepState; 9] = [Planned, Doing, Done, Pending, Skipped, Failed, Undoing, Undone, UndoFailed];

    #[test]
    fn a_step_is_never_done_twice() {
        for from in ALL {
            assert_eq!(from.may_become(Doing), from == Planned, "{from:?}");
        }
    }

    /// A VM and a change of it: saved cpus, saved memory, live memory (marked), live cpus (marked).
    fn change() -> (Observed, Operation) {
        let observed = vm();
        let plan = plan(&observed, "", serde_json::json!({"cpus": 4, "memory": "2GiB"})).unwrap();
        let who = Who { uid: 0, gid: 0, pid: 1, command: "test".into() };
        let operation = Operation::new("1".into(), who, plan, 0);
        assert_eq!(operation.steps.len(), 4);
        (observed, operation)
    }

    /// What is seen once the first `done` steps are done.
    fn after(observed: &Observed, operation: &Operation, done: usize) -> Observed {
        let mut seen = observed.clone();
        for record in &operation.steps[..done] {
            let Some((scope, values)) = record.step.action.sets() else { continue };
            if let Some(value) = values.cpus {
                match scope {
                    Scope::Saved => seen.cpus.persistent = Some(value),
                    _ => (seen.cpus.accepted, seen.cpus.observed) = (Some(value), Some(value)),
                }
            }
            if let Some(value) = values.memory {
                match scope {
                    Scope::Saved => seen.memory.persistent = Some(value),
                    _ => (seen.memory.accepted, seen.memory.observed) = (Some(value), Some(value)),
                }
            }
        }
        seen
    }

    #[test]
    fn a_change_that_was_cut_off_goes_on_by_what_is_seen() {
        for done in 0..=4 {
            // The record knows of a step that is marked once it is, and of no other.
            let (observed, mut operation) = change();
            for index in (0..done).filter(|index| operation.steps[*index].step.is_marked()).collect::<Vec<_>>() {
                mark(&mut operation, index);
            }
            let seen = after(&observed, &operation, done);
            let course = operation.resume(&seen).unwrap();
            assert_eq!(course, if done == 4 { Course::Done } else { Course::TakeBack { rebooted: false } }, "{done}");
            let states: Vec<_> = operation.steps.iter().map(|record| record.state).collect();
            assert!(states[..done].iter().all(|state| *state == Done), "{done} {states:?}");
            assert!(states[done..].iter().all(|state| *state == Planned), "{done} {states:?}");
        }
    }

    #[test]
    fn steps_are_taken_back_the_last_first() {
        let (_, mut operation) = change();
        for index in 0..2 {
            operation.advance(index, Doing).unwrap();
            operation.advance(index, Done).unwrap();
        }
        assert!(operation.advance(0, Undoing).is_err(), "the last goes first");
        operation.advance(1, Undoing).unwrap();
        assert!(operation.advance(0, Undoing).is_err(), "and to its end");
        operation.advance(1, UndoFailed).unwrap();
        operation.advance(0, Undoing).unwrap();
    }

    /// On record are the marks of steps that are marked; those before them were done.
    fn mark(operation: &mut Operation, index: usize) {
        for before in 0..index {
            if operation.steps[before].state == Planned {
                operation.advance(before, Doing).unwrap();
            }
            if operation.steps[before].state == Doing {
                operation.advance(before, Done).unwrap();
            }
        }
        operation.advance(index, Doing).unwrap();
    }

    #[test]
    fn a_marked_step_that_shows_no_effect_has_failed() {
        let (observed, mut operation) = change();
        mark(&mut operation, 2);
        let seen = after(&observed, &operation, 2);
        assert_eq!(operation.resume(&seen), Ok(Course::TakeBack { rebooted: false }));
        assert_eq!(operation.steps[2].state, Failed);
    }

    #[test]
    fn what_an_earlier_recovery_took_back_is_not_done_because_somebody_else_did_the_rest() {
        let (observed, mut operation) = change();
        mark(&mut operation, 3);
        let mut seen = observed.clone();
        (seen.cpus.accepted, seen.cpus.observed) = (Some(Limit::At(Cpus::whole(4))), Some(Limit::At(Cpus::whole(4))));
        assert_eq!(operation.clone().resume(&seen), Ok(Course::TakeBack { rebooted: false }));
        // What somebody else has set since to a third value was there all the same.
        let mut seen = after(&observed, &operation, 4);
        seen.cpus.persistent = Some(Limit::At(Cpus::whole(3)));
        assert_eq!(operation.resume(&seen), Ok(Course::Done));
    }

    #[test]
    fn what_was_done_to_another_run_or_instance_is_gone() {
        let (observed, mut operation) = change();
        mark(&mut operation, 2);
        let mut seen = after(&observed, &operation, 2);
        seen.boot = Some("2".into());
        assert_eq!(operation.clone().resume(&seen), Ok(Course::TakeBack { rebooted: true }));
        seen.id = "another".into();
        assert_eq!(operation.resume(&seen), Ok(Course::Replaced));
    }

    #[test]
    fn a_record_that_was_complete_says_what_was_never_begun() {
        // Somebody else has set the saved cpus meanwhile, to the very value that was planned and never begun.
        let (observed, mut operation) = change();
        operation.outcome = Outcome::Unknown;
        let seen = after(&observed, &operation, 1);
        assert_eq!(operation.resume(&seen), Ok(Course::TakeBack { rebooted: false }));
        assert!(operation.steps.iter().all(|record| record.state == Planned));
    }

    #[test]
    fn what_cant_be_taken_back_is_finished() {
        let (observed, mut operation) = change();
        for record in &mut operation.steps {
            record.step.undo = None;
        }
        let seen = after(&observed, &operation, 2);
        assert_eq!(operation.resume(&seen), Ok(Course::Finish));
    }

    #[test]
    fn what_an_engine_kept_and_never_gave_to_what_runs_is_taken_back() {
        let observed = container();
        let plan = plan(&observed, "", serde_json::json!({"cpus": 1})).unwrap();
        let who = Who { uid: 0, gid: 0, pid: 1, command: "test".into() };
        let mut operation = Operation::new("1".into(), who, plan, 0);
        operation.advance(0, Doing).unwrap();
        operation.outcome = Outcome::Unknown;
        let mut seen = observed.clone();
        let asked = operation.targets.cpus.map(|aim| aim.requested);
        (seen.cpus.accepted, seen.cpus.persistent) = (asked, asked);
        assert_ne!(seen.cpus.observed, asked);
        assert_eq!(operation.resume(&seen), Ok(Course::TakeBack { rebooted: false }));
        assert_eq!(operation.steps[0].state, Failed);
        seen.cpus.observed = asked;
        let mut whole = operation.clone();
        whole.steps[0].state = Doing;
        assert_eq!(whole.resume(&seen), Ok(Course::Done));
    }

    #[test]
    fn boots_are_compared_as_far_as_both_tell() {
        use super::same_boot;
        assert!(same_boot(Some("3@10"), Some("3@10")) && same_boot(None, None));
        assert!(!same_boot(Some("3@10"), Some("3@11")) && !same_boot(Some("3@10"), Some("4@10")));
        assert!(same_boot(Some("3"), Some("3@11")) && !same_boot(None, Some("3")));
    }

    #[test]
    fn what_was_never_begun_is_never_undone() {
        assert!(!Planned.may_become(Undoing));
        assert!(!Skipped.may_become(Undoing));
        for to in ALL {
            assert!(!Undone.may_become(to) && !UndoFailed.may_become(to), "{to:?}");
        }
    }
}
