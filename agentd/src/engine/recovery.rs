//! Operations that nobody saw the end of: the daemon ended in the middle of them, or a call did not return. The instance is
//! held and its charge stays until its backend answers and the truth is observed; then the change is brought to an end, and
//! the hold ends by itself, or becomes one that wants a look.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::Ordering;
use std::time::Duration;

use agentd_core::error::{Code, Problem};
use agentd_core::instance::{InstanceId, State};
use agentd_core::operation::{Operation, Outcome};
use agentd_core::plan::Verb;
use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::sleep;

use super::Engine;
use super::keys::Submitted;
use crate::backend::{BackendError, Look};
use crate::clock::{millis, now_ms};
use crate::executor::{Ended, Executor};
use crate::store::{Recorded, Reply, StoreError};

/// How often an instance is looked at. Also before the first look: what an earlier life of the daemon had just sent to an
/// engine has arrived by then.
const PAUSE: Duration = Duration::from_millis(500);
/// How long agentd waits before it reads a record again that it could not read.
const PATIENCE: Duration = Duration::from_secs(5);

impl Engine {
    /// Takes up what an earlier life of the daemon left behind: what it knew and promised, the keys that it was given, the
    /// changes that it did not end. Changes are refused until this has gone well.
    pub async fn restore(&self) -> Result<(), StoreError> {
        let loaded = self.store().load().await?;
        let mut unfinished: BTreeMap<InstanceId, Vec<Operation>> = BTreeMap::new();
        let mut untold = BTreeSet::new();
        {
            let mut book = self.book();
            let config = &self.settings().config;
            // What is of a kind that is switched off by now is neither seen nor charged, nor brought to an end.
            // The newest last: a name belongs to who had it last.
            let mut remembered = loaded.remembered;
            remembered.sort_by_key(|remembered| remembered.stamp);
            for remembered in remembered {
                if let Ok(backend) = self.backend(remembered.observed.reference.kind()) {
                    backend.recall(&remembered.observed);
                    book.restore(remembered, config);
                }
            }
            for Recorded { operation, reply, .. } in loaded.unfinished {
                if self.backend(operation.reference.kind()).is_err() {
                    let (id, instance) = (&operation.id, &operation.reference);
                    tracing::warn!(operation = id, %instance, "{instance}: its kind is switched off, a change stays as it was cut off");
                    continue;
                }
                let reason = format!("agentd was ended in the middle of a {} of it", operation.verb);
                book.recovering(&operation, reason);
                if reply.is_none() {
                    untold.insert(operation.id.clone());
                }
                unfinished.entry(operation.instance_id()).or_default().push(operation);
            }
        }
        let mut replies = BTreeMap::new();
        for key in loaded.keys {
            let id = key.operation.clone();
            // Where it was told that nobody knows how it came out, that is on record, and told again until somebody does.
            let submitted = if untold.contains(&id) {
                let (send, submitted) = Submitted::new(id.clone());
                replies.insert(id, send);
                submitted
            } else {
                Submitted::recorded(id)
            };
            self.inner.keys.restore(key, submitted);
        }
        for operations in unfinished.into_values() {
            let (instance, count) = (&operations[0].reference, operations.len());
            tracing::warn!(%instance, count, "{instance}: agentd was ended in the middle of {count} change(s); settling them");
            let replies = operations.iter().map(|operation| replies.remove(&operation.id)).collect();
            self.recover_in_order(operations, replies);
        }
        self.inner.restored.store(true, Ordering::Release);
        self.watch_over_again().await;
        Ok(())
    }

    /// Tries until that has gone well.
    pub async fn restore_when_possible(&self) {
        while let Err(error) = self.restore().await {
            tracing::debug!(%error, "the record still can't be read");
            sleep(PATIENCE).await;
        }
    }

    /// Brings operations of one instance to their ends, the oldest first. Runs beside everything else.
    pub(super) fn recover(&self, operations: Vec<Operation>) {
        let replies = operations.iter().map(|_| None).collect();
        self.recover_in_order(operations, replies);
    }

    fn recover_in_order(&self, operations: Vec<Operation>, replies: Vec<Option<watch::Sender<Option<Reply>>>>) {
        let engine = self.clone();
        tokio::spawn(async move {
            for (operation, waiting) in operations.into_iter().zip(replies) {
                let id = operation.id.clone();
                let reply = engine.recover_one(operation).await;
                if let Some(waiting) = waiting {
                    // Nobody may be waiting any more.
                    let _ = waiting.send(Some(reply));
                }
                engine.inner.keys.is_on_record(&id);
            }
        });
    }

    async fn recover_one(&self, mut operation: Operation) -> Reply {
        let instance = operation.instance_id();
        if instance.id.is_empty() {
            // It was acknowledged and never planned: nothing was done.
            let ended = end_before_its_plan(&mut operation);
            return self.end(&operation, ended, None).await;
        }
        let backend = match self.backend(instance.kind) {
            Ok(backend) => backend,
            Err(problem) => return Err(problem.into()),
        };
        loop {
            sleep(PAUSE).await;
            if backend.is_under_way(&operation.identity).await {
                continue;
            }
            let slot = self.slot(&instance);
            let _turn = slot.turn.lock().await;
            let since = Duration::from_millis(now_ms().saturating_sub(operation.started_ms));
            // By its id, which stays where its name is given to another one.
            let ended = match backend.observe(&instance.id, Look::Plain).await {
                Ok(observed) if observed.state == State::Unknown => continue,
                Ok(observed) => {
                    let run = Executor::new(&*backend, self.store(), &mut operation, Duration::ZERO)
                        .recover(&observed, since);
                    let ended = AssertUnwindSafe(run).catch_unwind().await;
                    ended.unwrap_or_else(|_| Ended::by_defect(&mut operation, "the recovery of a change"))
                }
                Err(BackendError::NotFound(_)) => end_without_instance(&mut operation),
                Err(_) => continue,
            };
            if operation.is_open() {
                continue;
            }
            // It has an end now; what is told with it has to be seen.
            let (observed, begun) = loop {
                let begun = self.book().moment();
                match backend.observe(&instance.id, Look::Plain).await {
                    Ok(observed) if observed.state != State::Unknown => break (Some(observed), begun),
                    Err(BackendError::NotFound(_)) => break (None, begun),
                    Ok(_) | Err(_) => sleep(PAUSE).await,
                }
            };
            let drift = {
                let mut book = self.book();
                let settled = !self.store().has_open_beside(&operation);
                let drift = match observed.clone() {
                    Some(observed) => {
                        operation.reference = observed.reference.clone();
                        book.end(&operation, Some((observed, begun)), &self.settings().config, settled)
                    }
                    None => {
                        book.drop_gone(&instance);
                        None
                    }
                };
                if let Some((hold, reason)) = &ended.hold {
                    book.hold(&instance, *hold, reason.clone());
                }
                drift
            };
            if let Some(observed) = &observed {
                operation.note_stop(observed);
                operation.note_restart(observed);
            }
            operation.elapsed_ms = operation.elapsed_ms.max(millis(since));
            let reply = self.end(&operation, ended, observed.as_ref()).await;
            self.drifted(drift);
            self.watch_over(&operation);
            return reply;
        }
    }
}

/// A change that was waiting for its turn.
fn end_before_its_plan(operation: &mut Operation) -> Ended {
    let (verb, reference) = (operation.verb, &operation.reference);
    let detail = format!("agentd was ended before this {verb} of {reference} began: nothing was done");
    let problem = Problem::new(Code::Internal, detail).hint("try again");
    operation.fail(Outcome::RolledBack, &problem);
    Ended { problem: Some(problem), hold: None }
}

/// A stop of an instance that is gone has come about; any other change went with it.
fn end_without_instance(operation: &mut Operation) -> Ended {
    if operation.verb == Verb::Stop {
        (operation.outcome, operation.problem) = (Outcome::Changed, None);
        return Ended::default();
    }
    let problem = Problem::new(Code::InvalidState, format!("{} is gone", operation.reference));
    operation.fail(Outcome::Abandoned, &problem);
    Ended { problem: Some(problem), hold: None }
}
