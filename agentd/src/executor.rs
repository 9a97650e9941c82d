//! Carries out a plan: applies each step, reads back what came of it, records both; where a step fails, walks the done
//! steps backwards. It chooses nothing: what to do, what takes it back and what must be seen is all in the plan.
//!
//! ```text
//!   apply ─► read back ─► done | pending ─► next step
//!     │          └──────► failed ─┐
//!     └─► error ──────────────────┴─► undo backwards ─► rolled back, or partial and held
//!     └─► no answer in time ─► unknown and held: nothing more is touched until it is recovered
//! ```
//!
//! An exact step that another one follows is read back with that one, unless that one can't be taken back for sure: a look costs
//! as much as a step.
//!
//! A change that was cut off, by the end of the daemon or by a call that did not return, is recovered here too: by what is
//! seen, on the same walks.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agentd_core::api::HoldKind;
use agentd_core::error::{Code, Problem};
use agentd_core::instance::{Observed, Reading, Ref, Usage};
use agentd_core::operation::{Course, Identity, Operation, Outcome, StepRecord, StepState, same_boot};
use agentd_core::plan::{
    Action, Aim, Reached, Scope, Settle, Targets, UndoClass, Verb, may_be_ours, may_stand_unseen, obeyed, overwritten,
    reached, unchanged_since,
};
use tokio::time::{Instant, sleep};

use crate::backend::{Backend, BackendError, Look};
use crate::inventory::Moment;
use crate::store::{Entry, Store, StoreError};

/// How long a value that is set at once may take to be read back: engines answer before their files are written.
const GRACE: Duration = Duration::from_secs(2);
/// How long an undo may take to be seen.
const UNDO_TIME: Duration = Duration::from_secs(8);
/// The pauses between two looks at something that moves.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// How carrying out a plan ended; the outcome itself is in the operation.
#[derive(Debug, Default)]
pub struct Ended {
    /// What went wrong.
    pub problem: Option<Problem>,
    /// The hold that the instance needs.
    pub hold: Option<(HoldKind, String)>,
}

impl Ended {
    /// A defect ended `what` half-way: nothing must wait for its end, and somebody must look.
    pub fn by_defect(operation: &mut Operation, what: &str) -> Self {
        let reference = &operation.reference;
        let detail = format!("a defect of agentd ended {what} of {reference} half-way; its journal has the details");
        let problem = Problem::new(Code::Internal, detail.clone())
            .hint(format!("look with `ctl show {reference}`, then `ctl clear-hold {reference}`"));
        operation.fail(Outcome::Partial, &problem);
        Ended { problem: Some(problem), hold: Some((HoldKind::NeedsAttention, detail)) }
    }
}

/// What one step came to.
enum StepEnd {
    Done,
    /// Applied; it is read back with what follows.
    Unread,
    Pending(String),
    /// A graceful stop that a hard one follows.
    Overtaken(String),
    Failed {
        problem: Problem,
        /// The backend said that it did nothing.
        untouched: bool,
    },
    /// Nobody knows yet.
    Unknown(Problem),
    /// It isn't the instance that was planned for any more.
    Abandoned(String),
}

/// One operation on its way.
pub struct Executor<'a> {
    backend: &'a dyn Backend,
    store: &'a Store,
    operation: &'a mut Operation,
    guest_deadline: Instant,
    wait: Duration,
    recovering: bool,
    /// The step whose beginning went on record with the plan.
    marked: Option<usize>,
    /// What tells when a look was begun, where that is wanted.
    moment: Option<&'a (dyn Fn() -> Moment + Send + Sync)>,
    /// What was seen since the last call that may have changed something, and when that look was begun.
    seen: Mutex<Option<(Observed, Moment)>>,
}

impl<'a> Executor<'a> {
    /// `wait` bounds the wait for the guest over all steps.
    pub fn new(backend: &'a dyn Backend, store: &'a Store, operation: &'a mut Operation, wait: Duration) -> Self {
        let guest_deadline = Instant::now() + wait;
        let (recovering, marked, moment, seen) = (false, None, None, Mutex::default());
        Executor { backend, store, operation, guest_deadline, wait, recovering, marked, moment, seen }
    }

    /// Takes it that the beginning of this step is on record.
    pub fn marked(self, step: Option<usize>) -> Self {
        Executor { marked: step, ..self }
    }

    /// Keeps what was seen last, with the moment at which that look was begun: an older look must not take its place.
    pub fn stamped(self, moment: &'a (dyn Fn() -> Moment + Send + Sync)) -> Self {
        Executor { moment: Some(moment), ..self }
    }

    /// Carries the plan out to its end. Of one that went well, with what was seen after its last step.
    pub async fn run(mut self) -> (Ended, Option<(Observed, Moment)>) {
        let ended = self.walk().await;
        let seen = self.seen.into_inner().unwrap_or_else(PoisonError::into_inner);
        let seen = seen.filter(|_| ended.problem.is_none());
        (ended, seen)
    }

    /// Does what has not been done.
    async fn walk(&mut self) -> Ended {
        for index in 0..self.operation.steps.len() {
            if self.is_needless(index) {
                self.advance(index, StepState::Skipped, None);
                continue;
            }
            match self.operation.steps[index].state {
                StepState::Planned => {
                    // What can't be taken back for sure is begun only where all before it is done.
                    if self.operation.steps[index].step.class != UndoClass::Exact
                        && let Some(ended) = self.read_unread(index).await
                    {
                        return ended;
                    }
                    self.advance(index, StepState::Doing, None);
                    if self.operation.steps[index].step.is_marked()
                        && self.marked != Some(index)
                        && let Err(error) = self.mark().await
                    {
                        let end = StepEnd::Failed { problem: unrecorded(&error), untouched: true };
                        if let Some(ended) = self.take(index, end).await {
                            return ended;
                        }
                    }
                }
                // A recovery finishes it.
                StepState::Doing => {}
                _ => continue,
            }
            let end = self.step(index).await;
            if let Some(ended) = self.take(index, end).await {
                return ended;
            }
        }
        if let Some(ended) = self.read_unread(self.operation.steps.len()).await {
            return ended;
        }
        self.operation.succeed();
        Ended::default()
    }

    /// Reads back what was applied and not read back yet, of the steps before this one.
    async fn read_unread(&mut self, before: usize) -> Option<Ended> {
        for index in 0..before {
            if self.operation.steps[index].state == StepState::Doing {
                let end = self.read(index, Instant::now()).await;
                if let Some(ended) = self.take(index, end).await {
                    return Some(ended);
                }
            }
        }
        None
    }

    /// Takes down what a step came to; where nothing may follow it, ends the change.
    async fn take(&mut self, index: usize, end: StepEnd) -> Option<Ended> {
        match end {
            StepEnd::Done => self.advance(index, StepState::Done, None),
            StepEnd::Unread => {}
            StepEnd::Pending(seen) => {
                // A stop says in a note of its own how it went.
                if self.operation.verb != Verb::Stop {
                    self.operation.notes.push(seen);
                }
                self.advance(index, StepState::Pending, None);
            }
            StepEnd::Overtaken(seen) => self.advance(index, StepState::Failed, Some(seen)),
            StepEnd::Unknown(problem) => {
                self.operation.steps[index].error = Some(problem.detail.clone());
                return Some(self.unknown(problem));
            }
            StepEnd::Abandoned(why) => {
                self.advance(index, StepState::Failed, Some(why.clone()));
                self.read_rest().await;
                let problem = Problem::new(Code::InvalidState, why)
                    .hint("look at it with `ctl show` and decide again: what ran before is gone");
                return Some(self.unwind(problem, Some(index), true).await);
            }
            StepEnd::Failed { problem, untouched } => {
                self.advance(index, StepState::Failed, Some(problem.detail.clone()));
                self.read_rest().await;
                return Some(self.unwind(problem, untouched.then_some(index), false).await);
            }
        }
        None
    }

    /// Whether a step is read back with those that follow: what it sets must be there when they are done, too.
    fn reads_later(&self, index: usize) -> bool {
        let (step, after) = (&self.operation.steps[index].step, &self.operation.steps[index + 1..]);
        !self.recovering
            && !step.is_marked()
            && !after.is_empty()
            && after.iter().all(|later| step.action.outlasts(&later.step.action))
    }

    /// Before anything is taken back: of what was applied and not read back, whether it was done.
    async fn read_rest(&mut self) {
        for index in 0..self.operation.steps.len() {
            let StepRecord { step, state, .. } = &self.operation.steps[index];
            if *state == StepState::Doing {
                let action = step.action.clone();
                let settled = self.settle(&action, Instant::now() + GRACE).await;
                let done = matches!(settled, Settled::Reached);
                self.advance(index, if done { StepState::Done } else { StepState::Failed }, None);
            }
        }
    }

    /// A guest that went down by itself needs no hard stop.
    fn is_needless(&self, index: usize) -> bool {
        let steps = &self.operation.steps;
        let before = index.checked_sub(1).and_then(|before| steps.get(before));
        steps[index].state == StepState::Planned
            && steps[index].step.action == Action::Kill
            && before.is_some_and(|b| b.step.action == Action::Shutdown && b.state == StepState::Done)
    }

    /// Nobody knows what came of a call: the instance is held, and nothing more is done before that is known.
    fn unknown(&mut self, problem: Problem) -> Ended {
        self.operation.fail(Outcome::Unknown, &problem);
        let reason = format!("{}; what came of it isn't known yet", problem.detail);
        Ended { problem: Some(problem), hold: Some((HoldKind::Recovering, reason)) }
    }

    /// Ends a change that was cut off by what is seen now: it was done, or what is left of it is taken back. What is not
    /// absolute is never done again. `since` is how long ago it began.
    pub async fn recover(mut self, observed: &Observed, since: Duration) -> Ended {
        self.recovering = true;
        if self.operation.restarts() {
            return self.recover_restart(observed, since).await;
        }
        if !self.operation.verb.resizes() {
            return self.recover_verb(observed, since).await;
        }
        match self.operation.resume(observed) {
            Ok(Course::Done) => {
                self.operation.problem = None;
                self.operation.succeed();
                Ended::default()
            }
            Ok(Course::Finish) => {
                self.operation.problem = None;
                self.walk().await
            }
            Ok(Course::TakeBack { rebooted }) => {
                let problem = self.cut_off();
                self.unwind(problem, None, rebooted).await
            }
            Ok(Course::Replaced) => self.replaced_meanwhile(),
            Err(illegal) => {
                crate::failpoint::defect(&format!("operation {}: {illegal}", self.operation.id));
                let problem = self.cut_off();
                self.partial(&problem, &illegal.to_string())
            }
        }
    }

    /// Why a change that was cut off ends as it does.
    fn cut_off(&self) -> Problem {
        let reference = &self.operation.reference;
        match &self.operation.problem {
            Some((code, detail)) => Problem::new(*code, detail.clone()),
            None => {
                Problem::new(Code::Internal, format!("agentd was ended in the middle of this change of {reference}"))
                    .hint("look at it with `ctl show`, then try again")
            }
        }
    }

    fn replaced_meanwhile(&mut self) -> Ended {
        let reference = &self.operation.reference;
        let detail = format!("{reference} is another one by now: what was changed of the one before is gone with it");
        let problem = Problem::new(Code::InvalidState, detail).hint("look at it with `ctl show` and decide again");
        self.operation.fail(Outcome::Abandoned, &problem);
        Ended { problem: Some(problem), hold: None }
    }

    /// A start or a stop that was cut off: it ends by the state that is seen once it has had its time.
    async fn recover_verb(&mut self, observed: &Observed, since: Duration) -> Ended {
        if observed.id != self.operation.identity.id {
            return self.replaced_meanwhile();
        }
        for index in 0..self.operation.steps.len() {
            let step = self.operation.steps[index].step.clone();
            match self.operation.steps[index].state {
                StepState::Doing => {
                    let time = if let Settle::Within(time) = step.settle { time } else { GRACE };
                    let deadline = Instant::now() + time.saturating_sub(since);
                    let end = match self.settle(&step.action, deadline).await {
                        Settled::Reached => StepState::Done,
                        Settled::Unobservable(why) => return self.unknown(Problem::new(Code::BackendTimeout, why)),
                        // A shutdown that was asked for may be on its way for as long as the guest likes, and systemd's job
                        // for as long as the unit takes.
                        Settled::Missed { .. } if matches!(step.action, Action::Shutdown | Action::Restart { .. }) => {
                            StepState::Pending
                        }
                        Settled::Missed { .. } | Settled::Abandoned(_) => StepState::Failed,
                    };
                    self.advance(index, end, None);
                }
                StepState::Planned => self.advance(index, StepState::Skipped, None),
                _ => {}
            }
        }
        let seen = match self.look(Look::Plain).await {
            Ok(observed) => Some(observed.state.is_up()),
            Err(BackendError::NotFound(_)) => None,
            Err(error) => return self.unknown(error.into()),
        };
        let asked = self.operation.steps.iter().any(|record| record.state == StepState::Pending);
        let reference = &self.operation.reference;
        match (self.operation.verb, seen) {
            (Verb::Start, Some(true)) | (Verb::Stop, Some(false) | None) => {
                // Each of its steps is marked before it begins: what has no mark was somebody else's doing.
                let begun = self.operation.steps.iter().any(|record| record.state != StepState::Skipped);
                let outcome = if begun { Outcome::Changed } else { Outcome::Unchanged };
                (self.operation.problem, self.operation.outcome) = (None, outcome);
                Ended::default()
            }
            (Verb::Stop | Verb::Restart, Some(true)) if asked => {
                (self.operation.problem, self.operation.outcome) = (None, Outcome::Pending);
                Ended::default()
            }
            (Verb::Restart, Some(false)) => {
                let problem = self.cut_off();
                self.partial(&problem, "it is down")
            }
            (Verb::Restart | Verb::Suspend | Verb::Resume, Some(_)) if self.is_done() => {
                self.operation.problem = None;
                self.operation.succeed();
                Ended::default()
            }
            (Verb::Start | Verb::Restart | Verb::Suspend | Verb::Resume, None) => {
                let problem = Problem::new(Code::InvalidState, format!("{reference} is gone"));
                self.operation.fail(Outcome::Abandoned, &problem);
                Ended { problem: Some(problem), hold: None }
            }
            // What has a way back may have been on it.
            (Verb::Suspend | Verb::Resume, _) => {
                let problem = self.cut_off();
                self.unwind(problem, None, false).await
            }
            _ => {
                let problem = self.cut_off();
                self.operation.fail(Outcome::RolledBack, &problem);
                Ended { problem: Some(problem), hold: None }
            }
        }
    }

    /// Whether all of its steps are done; one of which only the hold is left has none.
    fn is_done(&self) -> bool {
        self.operation.steps.iter().all(|record| record.state == StepState::Done)
    }

    /// A restart that was cut off. What it has begun goes on: until it has taken its instance down it is taken
    /// back, from there on it is finished, or taken back where that fails. It is never made hard here.
    async fn recover_restart(&mut self, observed: &Observed, since: Duration) -> Ended {
        if observed.id != self.operation.identity.id {
            return self.replaced_meanwhile();
        }
        let mut goes_back = self.operation.steps.iter().any(|record| {
            matches!(record.state, StepState::Undoing | StepState::Undone | StepState::UndoFailed)
                || (record.state == StepState::Failed && record.step.action != Action::Shutdown)
        });
        let (mut down, identity) = (false, self.operation.identity.clone());
        let boots_anew = observed.state.is_up() && !same_boot(identity.boot.as_deref(), observed.boot.as_deref());
        for index in 0..self.operation.steps.len() {
            let StepRecord { step, state, .. } = self.operation.steps[index].clone();
            let takes_down = matches!(step.action, Action::Shutdown | Action::Kill);
            let end = match state {
                // It was down, and is up again: with its host, or by somebody else.
                StepState::Doing if takes_down && boots_anew => StepState::Done,
                StepState::Doing => {
                    let time = if let Settle::Within(time) = step.settle { time } else { GRACE };
                    match self.settle(&step.action, Instant::now() + time.saturating_sub(since)).await {
                        Settled::Reached => StepState::Done,
                        Settled::Unobservable(why) => return self.unknown(Problem::new(Code::BackendTimeout, why)),
                        Settled::Missed { observed, .. } if step.action.starts() && observed.state.is_up() => {
                            StepState::Pending
                        }
                        Settled::Missed { .. } | Settled::Abandoned(_) => StepState::Failed,
                    }
                }
                // What an exact step did is on no record, and can be told from what is seen.
                StepState::Planned if !step.is_marked() && reached(&step.action, observed) == Reached::Yes => {
                    self.advance(index, StepState::Doing, None);
                    StepState::Done
                }
                StepState::Done => {
                    down |= takes_down;
                    // Taking back what is exact is on no record either.
                    goes_back |= !step.is_marked() && reached(&step.action, observed) != Reached::Yes;
                    continue;
                }
                _ => continue,
            };
            self.advance(index, end, None);
            down |= takes_down && end == StepState::Done;
            goes_back |= !takes_down && end == StepState::Failed;
        }
        if goes_back || !down {
            let problem = self.cut_off();
            return self.unwind(problem, None, false).await;
        }
        self.operation.problem = None;
        self.walk().await
    }

    /// Applies one step and reads back what came of it, or leaves that to the next one.
    async fn step(&self, index: usize) -> StepEnd {
        let action = self.operation.steps[index].step.action.clone();
        let began = Instant::now();
        match self.apply(&action).await {
            Ok(()) => {}
            Err(BackendError::GuestLate(why)) => return StepEnd::Pending(why),
            Err(BackendError::Timeout(why)) => {
                return StepEnd::Unknown(
                    Problem::new(Code::BackendTimeout, why)
                        .hint("`ctl show` tells what is observed; the hold ends when the outcome is known"),
                );
            }
            Err(BackendError::NotFound(why)) => {
                let stop = matches!(action, Action::Shutdown | Action::Kill);
                let down = stop && matches!(self.settle(&action, began).await, Settled::Reached);
                return if down { StepEnd::Done } else { StepEnd::Abandoned(why) };
            }
            // It is up with what it was to have, whoever has started it.
            Err(_) if matches!(action, Action::Boot { .. }) && self.is_up().await => {
                let time = self.wait.max(GRACE);
                if matches!(self.settle(&action, Instant::now() + time).await, Settled::Reached) {
                    return StepEnd::Done;
                }
                let detail = format!("{} was started by somebody else meanwhile", self.operation.reference);
                return StepEnd::Failed { problem: Problem::new(Code::InvalidState, detail), untouched: true };
            }
            Err(error) => {
                let untouched = !matches!(error, BackendError::Failed(_));
                let problem = Problem::from(error);
                return StepEnd::Failed { problem, untouched };
            }
        }
        if self.reads_later(index) { StepEnd::Unread } else { self.read(index, began).await }
    }

    /// Reads back what came of a step that was applied.
    async fn read(&self, index: usize, began: Instant) -> StepEnd {
        let record = &self.operation.steps[index].step;
        let (action, settle) = (record.action.clone(), record.settle);
        let hard_stop_follows =
            self.operation.steps.get(index + 1).is_some_and(|next| next.step.action == Action::Kill);
        let deadline = match settle {
            Settle::AtOnce => began + GRACE,
            Settle::Guest => self.guest_deadline,
            Settle::Within(time) => began + time,
        };
        let mut settled =
            self.settle_by(if action.starts() { &Action::Start } else { &action }, deadline, obeyed).await;
        if matches!(action, Action::Boot { .. }) && matches!(settled, Settled::Reached) {
            // The guest has only now begun to have time.
            settled = self.settle_by(&action, Instant::now() + self.wait, obeyed).await;
        }
        match settled {
            Settled::Reached => StepEnd::Done,
            Settled::Abandoned(why) => StepEnd::Abandoned(why),
            Settled::Unobservable(why) => StepEnd::Unknown(Problem::new(
                Code::BackendTimeout,
                format!("the step was accepted, but what came of it can't be observed: {why}"),
            )),
            Settled::Missed { refused: true, seen, .. } => StepEnd::Failed {
                problem: Problem::new(
                    Code::BackendFailed,
                    format!("{} reported success, but {seen}", self.backend.name()),
                ),
                untouched: false,
            },
            Settled::Missed { seen, observed, .. } => match settle {
                Settle::AtOnce => StepEnd::Failed {
                    problem: Problem::new(
                        Code::BackendFailed,
                        format!("{} reported success, but {seen}", self.backend.name()),
                    ),
                    untouched: false,
                },
                Settle::Guest if self.silent(&action, &observed) => StepEnd::Failed {
                    problem: Problem::new(
                        Code::GuestSilent,
                        format!(
                            "the balloon driver of {} has never spoken: {seen} after {:.1} s",
                            self.operation.reference,
                            began.elapsed().as_secs_f32()
                        ),
                    )
                    .hint("the old target was put back; check that the guest has the virtio balloon driver loaded"),
                    untouched: false,
                },
                Settle::Within(time) if hard_stop_follows => {
                    StepEnd::Overtaken(format!("{seen} after {:.1} s", time.as_secs_f32()))
                }
                // systemd took the restart, and what it started is not there.
                Settle::Within(_) if matches!(action, Action::Restart { .. }) && !observed.state.is_up() => {
                    let detail = format!("{} took the restart, but {seen}", self.backend.name());
                    StepEnd::Failed { problem: Problem::new(Code::BackendFailed, detail), untouched: false }
                }
                // An engine that says that it has started what then isn't there.
                Settle::Within(_) if action.starts() && !observed.state.is_up() => StepEnd::Failed {
                    problem: Problem::new(
                        Code::BackendFailed,
                        format!("{} reported that it has started, but {seen}", self.backend.name()),
                    ),
                    untouched: false,
                },
                Settle::Within(time) if action == Action::Shutdown && self.operation.restarts() => {
                    StepEnd::Failed { problem: self.stays_up(&seen, time), untouched: false }
                }
                Settle::Guest | Settle::Within(_) => StepEnd::Pending(format!("the guest has not obeyed yet: {seen}")),
            },
        }
    }

    async fn is_up(&self) -> bool {
        self.look(Look::Plain).await.is_ok_and(|observed| observed.state.is_up())
    }

    /// A guest that does not shut down, and is not to be switched off.
    fn stays_up(&self, seen: &str, time: Duration) -> Problem {
        let reference = &self.operation.reference;
        let detail = format!("{reference} was asked to shut down, and {seen} after {:.1} s", time.as_secs_f32());
        Problem::new(Code::GuestSilent, detail).hint(
            "nothing was changed. If it goes down in the next minutes all the same, it is started again as it was. A longer \
             stop_timeout ([[limit]]) gives it more time, --force switches it off when that is over",
        )
    }

    /// A guest that was given time and whose balloon driver gave no sign of life.
    fn silent(&self, action: &Action, observed: &Observed) -> bool {
        let memory = matches!(action.sets(), Some((Scope::Live, values)) if values.memory.is_some());
        memory && self.wait > Duration::ZERO && observed.used == Usage::Silent
    }

    /// Looks until an action's effect is seen, or until `deadline`.
    async fn settle(&self, action: &Action, deadline: Instant) -> Settled {
        self.settle_by(action, deadline, reached).await
    }

    async fn settle_by(&self, action: &Action, deadline: Instant, judge: fn(&Action, &Observed) -> Reached) -> Settled {
        let judged =
            |observed: &Observed| self.replaced(observed, action).is_none() && judge(action, observed) == Reached::Yes;
        // What was seen since the last call is as good as another look.
        if self.seen().as_ref().is_some_and(|(observed, _)| judged(observed)) {
            return Settled::Reached;
        }
        // What an earlier life of the daemon has done here is not known.
        let look = if self.recovering { Look::Plain } else { Look::Back };
        let mut pause = FIRST_PAUSE;
        loop {
            let over = Instant::now() >= deadline;
            match self.look(look).await {
                Ok(observed) => {
                    if let Some(why) = self.replaced(&observed, action) {
                        return Settled::Abandoned(why);
                    }
                    match judge(action, &observed) {
                        Reached::Yes => return Settled::Reached,
                        // Engines may answer a moment before what they answer can be read; a refusal is final only late.
                        Reached::No(seen) if over => {
                            return Settled::Missed { refused: true, seen, observed: Box::new(observed) };
                        }
                        Reached::NotYet(seen) if over => {
                            return Settled::Missed { refused: false, seen, observed: Box::new(observed) };
                        }
                        Reached::No(_) | Reached::NotYet(_) => {}
                    }
                }
                Err(BackendError::NotFound(_)) if matches!(action, Action::Shutdown | Action::Kill) => {
                    // A transient domain and a container run with --rm are gone when they are down.
                    return Settled::Reached;
                }
                Err(BackendError::NotFound(why)) => return Settled::Abandoned(why),
                Err(error) if over => return Settled::Unobservable(error.to_string()),
                Err(_) => {}
            }
            sleep(pause.min(deadline.saturating_duration_since(Instant::now()))).await;
            pause = (pause * 3 / 2).min(LONGEST_PAUSE);
        }
    }

    async fn look(&self, look: Look) -> Result<Observed, BackendError> {
        // By its id: a name may be given to another one while this one goes on under a new name.
        let begun = self.moment.map(|moment| moment());
        let observed = self.backend.observe(&self.operation.identity.id, look).await?;
        *self.seen() = begun.map(|begun| (observed.clone(), begun));
        Ok(observed)
    }

    fn seen(&self) -> MutexGuard<'_, Option<(Observed, Moment)>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Looks until there is an answer, or until `deadline`: an engine that is being restarted is back in a moment.
    async fn look_until(&self, deadline: Instant) -> Result<Observed, BackendError> {
        loop {
            match self.look(Look::Plain).await {
                Err(error) if !matches!(error, BackendError::NotFound(_)) && Instant::now() < deadline => {
                    sleep(LONGEST_PAUSE).await;
                }
                answer => return answer,
            }
        }
    }

    /// Whether what is seen isn't what was planned for: another instance of that name, or another start of it.
    fn replaced(&self, observed: &Observed, action: &Action) -> Option<String> {
        let planned = &self.operation.identity;
        let now = Identity::of(observed);
        let reference = &self.operation.reference;
        if now.id != planned.id {
            return Some(format!("{reference} is another one by now: its id was {}, it is {}", planned.id, now.id));
        }
        if action.is_live()
            && self.operation.verb.resizes()
            && planned.boot.is_some()
            && !same_boot(planned.boot.as_deref(), now.boot.as_deref())
        {
            return Some(format!("{reference} was stopped or restarted while it was changed"));
        }
        None
    }

    /// Takes back what was done, the last first; not the step of which the backend said that it did nothing. `gone` says
    /// that what was changed of a run went with it.
    async fn unwind(&mut self, mut cause: Problem, untouched: Option<usize>, mut gone: bool) -> Ended {
        // What an earlier walk could not take back, too: it was broken off because an engine was away.
        let left = self.operation.steps.iter().filter(|record| record.state == StepState::UndoFailed);
        let mut stuck: Vec<String> = left.filter_map(|record| record.error.clone()).collect();
        for index in (0..self.operation.steps.len()).rev() {
            let state = self.operation.steps[index].state;
            let undoable =
                matches!(state, StepState::Done | StepState::Pending | StepState::Failed | StepState::Undoing);
            if !undoable || Some(index) == untouched {
                continue;
            }
            match self.undo(index, state == StepState::Failed).await {
                Ok(()) => self.close(index, StepState::Undone, None),
                Err(Stuck::Gone) => {
                    gone = true;
                    self.close(index, StepState::Undone, None);
                }
                Err(Stuck::Overwritten) => {
                    cause = changed_meanwhile(&self.operation.reference, &cause);
                }
                Err(Stuck::Left(why)) => {
                    self.close(index, StepState::UndoFailed, Some(why.clone()));
                    stuck.push(why);
                }
                Err(Stuck::Away(why)) => {
                    let detail = format!("{}; and then: {why}", cause.detail);
                    let hint =
                        "`ctl show` tells what is observed; what is left is taken back as soon as that is possible";
                    return self.unknown(Problem::new(Code::BackendTimeout, detail).hint(hint));
                }
            }
        }
        if stuck.is_empty() {
            let restarted = |record: &StepRecord| {
                matches!(record.step.action, Action::Shutdown | Action::Kill) && record.state == StepState::Undone
            };
            if self.operation.steps.iter().any(restarted) {
                let runs =
                    if self.operation.targets.differed() { "with what was saved of it" } else { "as it was before" };
                cause.detail = format!("{}; {} runs again {runs}", cause.detail, self.operation.reference);
            }
            self.operation.fail(if gone { Outcome::Abandoned } else { Outcome::RolledBack }, &cause);
            return Ended { problem: Some(cause), hold: None };
        }
        self.partial(&cause, &stuck.join("; "))
    }

    /// Neither done nor taken back: somebody must look.
    fn partial(&mut self, cause: &Problem, stuck: &str) -> Ended {
        let reference = &self.operation.reference;
        let detail = format!(
            "a change of {reference} failed and could not be taken back whole: {}; and then: {stuck}",
            cause.detail
        );
        let problem = Problem::new(Code::Partial, detail.clone()).hint(format!(
            "{reference} takes no change but stop until somebody has looked: `ctl show {reference}`, then `ctl clear-hold {reference}`"
        ));
        self.operation.fail(Outcome::Partial, &problem);
        Ended { problem: Some(problem), hold: Some((HoldKind::NeedsAttention, detail)) }
    }

    /// Ends the taking back of a step. One that failed and left nothing behind stays as it is.
    fn close(&mut self, index: usize, to: StepState, error: Option<String>) {
        match self.operation.steps[index].state {
            StepState::Failed if to == StepState::Undone => return,
            StepState::Undoing => {}
            _ => self.advance(index, StepState::Undoing, None),
        }
        self.advance(index, to, error);
    }

    /// Takes one step back, or says why it couldn't.
    async fn undo(&mut self, index: usize, is_failed: bool) -> Result<(), Stuck> {
        let step = self.operation.steps[index].step.clone();
        let (what, again) = (&step.what, self.operation.steps[index].state == StepState::Undoing);
        let observed = match self.look_until(Instant::now() + UNDO_TIME).await {
            Ok(observed) => observed,
            Err(BackendError::NotFound(_)) => return Err(Stuck::Gone),
            // What can't be seen may be somebody else's by now.
            Err(error) => return Err(Stuck::Away(format!("{what} was not taken back yet: {error}"))),
        };
        if self.replaced(&observed, &step.action).is_some() {
            return Err(Stuck::Gone);
        }
        let Some(undo) = step.undo.clone() else {
            // A step that failed and shows no effect needs no way back; nor does a start of what runs as it did before, which is
            // all that a restart without new values can come to.
            let same = matches!(step.action, Action::Boot { .. }) && self.operation.targets == Targets::default();
            let shows_nothing = !matches!(reached(&step.action, &observed), Reached::Yes);
            let went_down = matches!(step.action, Action::Restart { .. }) && !observed.state.is_up();
            let nothing =
                !went_down && ((is_failed && shows_nothing) || (step.action.starts() && (same || shows_nothing)));
            return if nothing { Ok(()) } else { Err(Stuck::Left(format!("{what} can't be taken back"))) };
        };
        if undo.starts() && !self.runs_as_before(&observed) {
            let why = "it was started by somebody else, and does not run with what it had";
            return Err(Stuck::Left(format!("{what} was not taken back: {why}")));
        }
        let stands_unseen = self.recovering && may_stand_unseen(&step.action, &observed);
        if reached(&undo, &observed) == Reached::Yes && !stands_unseen {
            // It failed and left nothing behind, or was taken back before, or by somebody else.
            return Ok(());
        }
        let ours = if is_failed || again {
            may_be_ours(&step.action, &undo, &observed, self.recovering)
        } else {
            // An exact undo is on no record: a life before may have sent it, and what it set is what is accepted by now.
            let sent_before = self.recovering && !matches!(reached(&undo, &observed), Reached::No(_));
            sent_before || unchanged_since(&step.action, &observed)
        };
        // Not of what a guest may still follow unseen, and not where nobody knows what happened meanwhile.
        let certain = is_failed && !self.recovering && !may_stand_unseen(&step.action, &observed);
        if certain && !ours && overwritten(&step.action, &observed) {
            return Err(Stuck::Overwritten);
        }
        if !ours {
            let why = format!("{what} is no longer what is there: somebody else changed it meanwhile");
            return Err(Stuck::Left(why));
        }
        if !again {
            self.advance(index, StepState::Undoing, None);
            // Where it can't be recorded it is done all the same: to leave it would be worse.
            if step.is_marked()
                && let Err(error) = self.mark().await
            {
                tracing::error!(operation = self.operation.id, "an undo could not be recorded: {error}");
            }
        }
        if stands_unseen {
            self.backend.may_have_been_asked(&step.action, &observed);
        }
        let applied = self.apply(&undo).await;
        if let Err(BackendError::Timeout(why)) = &applied {
            return Err(Stuck::Away(format!("taking back {what} has not returned: {why}")));
        }
        let deadline = Instant::now() + UNDO_TIME;
        let seen = self.settle(&undo, if applied.is_ok() { deadline } else { Instant::now() }).await;
        match (applied, seen) {
            (Ok(()), Settled::Reached) => Ok(()),
            // The target is back; the guest follows in its own time, as it would have without us.
            (Ok(()), Settled::Missed { refused: false, .. })
                if step.settle == Settle::Guest && step.class == UndoClass::Exact =>
            {
                Ok(())
            }
            // A step that failed was never whole; that its undo fails too and the old values are read is as it was.
            (Err(_), Settled::Reached) if is_failed => Ok(()),
            (Err(BackendError::Unavailable(why) | BackendError::Overloaded(why)), _)
            | (Ok(()), Settled::Unobservable(why)) => {
                Err(Stuck::Away(format!("{what} was not seen to be taken back yet: {why}")))
            }
            (Ok(()), Settled::Missed { seen, .. }) => Err(Stuck::Left(format!("after {what} was taken back, {seen}"))),
            (Ok(()), Settled::Abandoned(_)) => Err(Stuck::Gone),
            (Err(error), _) => Err(Stuck::Left(format!("taking back {what} failed: {error}"))),
        }
    }

    /// Whether what is up has, of what was to be changed, what ran or what was saved before.
    fn runs_as_before(&self, observed: &Observed) -> bool {
        fn one<T: Copy + PartialEq>(aim: Option<Aim<T>>, reading: &Reading<T>) -> bool {
            aim.is_none_or(|aim| {
                let now = reading.accepted;
                now.is_none() || now == aim.before || now == aim.saved_before || now != Some(aim.requested)
            })
        }
        let targets = &self.operation.targets;
        !observed.state.is_up()
            || (one(targets.cpus, &observed.cpus)
                && one(targets.cpu_limit, &observed.cpu_limit)
                && one(targets.memory, &observed.memory))
    }

    async fn apply(&self, action: &Action) -> Result<(), BackendError> {
        *self.seen() = None;
        crate::failpoint::reach("backend: before").await;
        let applied = self.backend.apply(&self.operation.reference, &self.operation.identity, action).await;
        crate::failpoint::reach("backend: after").await;
        applied
    }

    /// Records the operation as it stands, on the disk.
    async fn mark(&self) -> Result<(), StoreError> {
        self.store.commit(vec![Entry::Operation(Box::new(self.operation.clone()), None)]).await
    }

    /// Moves a step on and shows it to who reads.
    fn advance(&mut self, index: usize, to: StepState, error: Option<String>) {
        if let Err(illegal) = self.operation.advance(index, to) {
            crate::failpoint::defect(&format!("operation {}: {illegal}", self.operation.id));
        }
        if let (Some(error), Some(record)) = (error, self.operation.steps.get_mut(index)) {
            record.error = Some(match record.error.take() {
                Some(first) => format!("{first}; {error}"),
                None => error,
            });
        }
        self.store.show(self.operation);
    }
}

/// A change that the record doesn't take is not begun, or goes no further.
pub(crate) fn unrecorded(error: &StoreError) -> Problem {
    Problem::new(Code::StoreUnavailable, error.to_string()).hint("see `ctl health`; reads go on")
}

/// A step failed because somebody else set the same meanwhile. What they set stands: who comes last is right.
fn changed_meanwhile(reference: &Ref, cause: &Problem) -> Problem {
    let detail = format!("{reference} was changed by somebody else in the middle of this change: {}", cause.detail);
    Problem::new(Code::VersionMismatch, detail)
        .hint("nothing of this change is left; look at it again, then decide again")
}

/// Why a step was not taken back.
enum Stuck {
    /// Nothing of it is left: somebody else has set the same since.
    Overwritten,
    /// What it changed is gone, with its instance or with that run of it.
    Gone,
    /// It is still there, and why.
    Left(String),
    /// Its engine does not answer, and what it said last.
    Away(String),
}

/// What looking after a step came to.
enum Settled {
    Reached,
    Missed {
        /// The value was not even accepted.
        refused: bool,
        /// What is seen, in words.
        seen: String,
        observed: Box<Observed>,
    },
    /// It is another instance, or another start of it, or gone.
    Abandoned(String),
    /// Looking itself fails.
    Unobservable(String),
}
