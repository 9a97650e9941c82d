//! Carries out a plan: applies each step, reads back what came of it, records both; where a step fails, walks the done
//! steps backwards. It chooses nothing: what to do, what takes it back and what must be seen is all in the plan.
//!
//! ```text
//!   apply ─► read back ─► done | pending ─► next step
//!     │          └──────► failed ─┐
//!     └─► error ──────────────────┴─► undo backwards ─► rolled back, or partial and held
//!     └─► no answer in time ─► unknown and held: nothing more is touched
//! ```

use std::time::Duration;

use agentd_core::api::HoldKind;
use agentd_core::error::{Code, Problem};
use agentd_core::instance::{Observed, Usage};
use agentd_core::operation::{Identity, Operation, Outcome, StepState, same_boot};
use agentd_core::plan::{Action, Reached, Scope, Settle, UndoClass, Verb, may_be_ours, reached, unchanged_since};
use tokio::time::{Instant, sleep};

use crate::backend::{Backend, BackendError, Look};
use crate::journal::Journal;

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

/// What one step came to.
enum StepEnd {
    Done,
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
    journal: &'a dyn Journal,
    operation: &'a mut Operation,
    guest_deadline: Instant,
    wait: Duration,
}

impl<'a> Executor<'a> {
    /// `wait` bounds the wait for the guest over all steps.
    pub fn new(
        backend: &'a dyn Backend,
        journal: &'a dyn Journal,
        operation: &'a mut Operation,
        wait: Duration,
    ) -> Self {
        Executor { backend, journal, operation, guest_deadline: Instant::now() + wait, wait }
    }

    /// Carries the plan out to its end.
    pub async fn run(mut self) -> Ended {
        let mut stopped_early = false;
        for index in 0..self.operation.steps.len() {
            if stopped_early {
                self.advance(index, StepState::Skipped, None).await;
                continue;
            }
            self.advance(index, StepState::Doing, None).await;
            match self.step(index).await {
                StepEnd::Done => {
                    self.advance(index, StepState::Done, None).await;
                    // A guest that went down by itself needs no hard stop.
                    stopped_early = self.operation.steps[index].step.action == Action::Shutdown;
                }
                StepEnd::Pending(seen) => {
                    // A stop says in a note of its own how it went.
                    if self.operation.verb != Verb::Stop {
                        self.operation.notes.push(seen);
                    }
                    self.advance(index, StepState::Pending, None).await;
                }
                StepEnd::Overtaken(seen) => self.advance(index, StepState::Failed, Some(seen)).await,
                StepEnd::Unknown(problem) => {
                    self.advance(index, StepState::Pending, Some(problem.detail.clone())).await;
                    self.operation.fail(Outcome::Unknown, &problem);
                    let reason = format!("{}; what came of it isn't known yet", problem.detail);
                    return Ended { problem: Some(problem), hold: Some((HoldKind::Recovering, reason)) };
                }
                StepEnd::Abandoned(why) => {
                    self.advance(index, StepState::Failed, Some(why.clone())).await;
                    let problem = Problem::new(Code::InvalidState, why)
                        .hint("look at it with `ctl show` and decide again: what ran before is gone");
                    return self.unwind(index, problem, true, true).await;
                }
                StepEnd::Failed { problem, untouched } => {
                    self.advance(index, StepState::Failed, Some(problem.detail.clone())).await;
                    return self.unwind(index, problem, untouched, false).await;
                }
            }
        }
        self.operation.succeed();
        Ended::default()
    }

    /// Applies one step and reads back what came of it.
    async fn step(&mut self, index: usize) -> StepEnd {
        let record = &self.operation.steps[index].step;
        let (action, settle) = (record.action.clone(), record.settle);
        let began = Instant::now();
        match self.backend.apply(&self.operation.reference, &self.operation.identity, &action).await {
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
            Err(error) => {
                let untouched = !matches!(error, BackendError::Failed(_));
                let problem = Problem::from(error);
                return StepEnd::Failed { problem, untouched };
            }
        }
        let hard_stop_follows =
            self.operation.steps.get(index + 1).is_some_and(|next| next.step.action == Action::Kill);
        let deadline = match settle {
            Settle::AtOnce => began + GRACE,
            Settle::Guest => self.guest_deadline,
            Settle::Within(time) => began + time,
        };
        match self.settle(&action, deadline).await {
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
                Settle::Guest | Settle::Within(_) => StepEnd::Pending(format!("the guest has not obeyed yet: {seen}")),
            },
        }
    }

    /// A guest that was given time and whose balloon driver gave no sign of life.
    fn silent(&self, action: &Action, observed: &Observed) -> bool {
        let memory = matches!(action, Action::Set { scope: Scope::Live, values } if values.memory.is_some());
        memory && self.wait > Duration::ZERO && observed.used == Usage::Silent
    }

    /// Looks until an action's effect is seen, or until `deadline`.
    async fn settle(&self, action: &Action, deadline: Instant) -> Settled {
        let mut pause = FIRST_PAUSE;
        loop {
            let over = Instant::now() >= deadline;
            match self.look().await {
                Ok(observed) => {
                    if let Some(why) = self.replaced(&observed, action) {
                        return Settled::Abandoned(why);
                    }
                    match reached(action, &observed) {
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

    async fn look(&self) -> Result<Observed, BackendError> {
        self.backend.observe(self.operation.reference.name(), Look::Plain).await
    }

    /// Looks until there is an answer, or until `deadline`: an engine that is being restarted is back in a moment.
    async fn look_until(&self, deadline: Instant) -> Result<Observed, BackendError> {
        loop {
            match self.look().await {
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
        let live = match action {
            Action::Set { scope, .. } | Action::Restore { scope, .. } => *scope != Scope::Saved,
            Action::Start | Action::Shutdown | Action::Kill => false,
        };
        if live
            && self.operation.verb.resizes()
            && planned.boot.is_some()
            && !same_boot(planned.boot.as_deref(), now.boot.as_deref())
        {
            return Some(format!("{reference} was stopped or restarted while it was changed"));
        }
        None
    }

    /// Takes back what was done, the last first. `failed` is the step that failed; it may have taken effect in part. What
    /// was changed of a run that is over by now went with it.
    async fn unwind(mut self, failed: usize, cause: Problem, untouched: bool, mut gone: bool) -> Ended {
        let mut stuck: Vec<String> = Vec::new();
        for index in (0..=failed).rev() {
            let state = self.operation.steps[index].state;
            let undoable = matches!(state, StepState::Done | StepState::Pending | StepState::Failed);
            if !undoable || (index == failed && untouched) {
                continue;
            }
            match self.undo(index, index == failed).await {
                Ok(()) => {}
                Err(Stuck::Gone) => gone = true,
                Err(Stuck::Left(why)) => stuck.push(why),
            }
        }
        if stuck.is_empty() {
            self.operation.fail(if gone { Outcome::Abandoned } else { Outcome::RolledBack }, &cause);
            return Ended { problem: Some(cause), hold: None };
        }
        let reference = &self.operation.reference;
        let detail = format!(
            "a change of {reference} failed and could not be taken back whole: {}; and then: {}",
            cause.detail,
            stuck.join("; ")
        );
        let problem = Problem::new(Code::Partial, detail.clone()).hint(format!(
            "{reference} takes no change but stop until somebody has looked: `ctl show {reference}`, then `ctl clear-hold {reference}`"
        ));
        self.operation.fail(Outcome::Partial, &problem);
        Ended { problem: Some(problem), hold: Some((HoldKind::NeedsAttention, detail)) }
    }

    /// Takes one step back, or says why it couldn't.
    async fn undo(&mut self, index: usize, is_failed: bool) -> Result<(), Stuck> {
        let step = self.operation.steps[index].step.clone();
        let what = &step.what;
        let observed = match self.look_until(Instant::now() + UNDO_TIME).await {
            Ok(observed) => observed,
            Err(BackendError::NotFound(_)) => return Err(Stuck::Gone),
            // What can't be seen may be somebody else's by now.
            Err(error) => return Err(Stuck::Left(format!("{what} was not taken back: {error}"))),
        };
        if self.replaced(&observed, &step.action).is_some() {
            return Err(Stuck::Gone);
        }
        let Some(undo) = step.undo else {
            // A step that failed and shows no effect needs no way back.
            let nothing = is_failed && !matches!(reached(&step.action, &observed), Reached::Yes);
            return if nothing { Ok(()) } else { Err(Stuck::Left(format!("{what} can't be taken back"))) };
        };
        if is_failed && reached(&undo, &observed) == Reached::Yes {
            // It failed and left nothing behind.
            return Ok(());
        }
        let ours = if is_failed {
            may_be_ours(&step.action, &undo, &observed)
        } else {
            unchanged_since(&step.action, &observed)
        };
        if !ours {
            let why = format!("{what} is no longer what is there: somebody else changed it meanwhile");
            return Err(Stuck::Left(why));
        }
        self.advance(index, StepState::Undoing, None).await;
        let applied = self.backend.apply(&self.operation.reference, &self.operation.identity, &undo).await;
        let deadline = Instant::now() + UNDO_TIME;
        let seen = self.settle(&undo, if applied.is_ok() { deadline } else { Instant::now() }).await;
        let outcome = match (applied, seen) {
            (Ok(()), Settled::Reached) => Ok(()),
            // The target is back; the guest follows in its own time, as it would have without us.
            (Ok(()), Settled::Missed { refused: false, .. })
                if step.settle == Settle::Guest && step.class == UndoClass::Exact =>
            {
                Ok(())
            }
            (Ok(()), Settled::Missed { seen, .. }) => Err(format!("after {what} was taken back, {seen}")),
            (Ok(()), Settled::Abandoned(why) | Settled::Unobservable(why)) => Err(why),
            // A step that failed was never whole; that its undo fails too and the old values are read is as it was.
            (Err(_), Settled::Reached) if is_failed => Ok(()),
            (Err(error), _) => Err(format!("taking back {what} failed: {error}")),
        };
        let state = if outcome.is_ok() { StepState::Undone } else { StepState::UndoFailed };
        self.advance(index, state, outcome.as_ref().err().cloned()).await;
        outcome.map_err(Stuck::Left)
    }

    /// Moves a step on and records it.
    async fn advance(&mut self, index: usize, to: StepState, error: Option<String>) {
        if let Err(illegal) = self.operation.advance(index, to) {
            tracing::error!(operation = self.operation.id, %illegal, "defect: illegal transition");
        }
        if let (Some(error), Some(record)) = (error, self.operation.steps.get_mut(index)) {
            record.error = Some(match record.error.take() {
                Some(first) => format!("{first}; {error}"),
                None => error,
            });
        }
        if let Err(error) = self.journal.write(self.operation).await {
            tracing::error!(operation = self.operation.id, %error, "a step could not be recorded");
        }
    }
}

/// Why a step was not taken back.
enum Stuck {
    /// What it changed is gone, with its instance or with that run of it.
    Gone,
    /// It is still there, and why.
    Left(String),
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
