//! What was lent for a time goes back by itself: each change with `--for` is taken back as any other change is, once its time
//! is over. A guest that resists, a hold, an engine that is away: it is tried again. A value that somebody has changed since is
//! theirs, and the loan is over.

use std::collections::HashMap;
use std::time::Duration;

use agentd_core::access::Right;
use agentd_core::api::Loan;
use agentd_core::error::Code;
use agentd_core::instance::{InstanceId, Target};
use agentd_core::operation::RETURN;
use agentd_core::plan::{Standing, Targets};
use tokio::time::Instant;

use super::{Ask, Engine, Failure, Peer, Wish};
use crate::clock::{now_ms, uptime};

/// When what could not be taken back is tried again.
const AGAIN: Duration = Duration::from_secs(15);
/// How long taking back waits for a guest.
const WAIT: Duration = Duration::from_secs(10);

/// The operations that have lent what is being taken back, and when each may be tried again.
pub(super) type Tried = HashMap<String, Instant>;

impl Engine {
    /// Begins to take back what was lent and is due.
    pub(super) fn return_loans(&self, tried: &mut Tried) {
        let due = self.book().due(now_ms(), uptime().as_ref());
        tried.retain(|operation, _| due.iter().any(|(_, loan)| loan.operation == *operation));
        for (instance, loan) in due {
            let now = Instant::now();
            if tried.get(&loan.operation).is_some_and(|until| now < *until) {
                continue;
            }
            // One that is still being tried then hears that it is busy.
            tried.insert(loan.operation.clone(), now + AGAIN);
            let engine = self.clone();
            tokio::spawn(async move { engine.take_back(&instance, &loan).await });
        }
    }

    async fn take_back(&self, instance: &InstanceId, loan: &Loan) {
        let peer = Peer::itself(RETURN);
        let operation = match self.recorded(&peer, &loan.operation).await {
            Ok(operation) => operation,
            Err(problem) if problem.code == Code::NotFound => {
                return self.loan_is_over(instance, loan, &problem.detail);
            }
            Err(_) => return,
        };
        let targets = operation.targets;
        let target = Target::Full(self.name_now(&operation));
        let wish = Wish::Undo(Box::new(operation), WAIT);
        let ask = Ask { target, wish, right: Right::Resize, dry_run: false, if_version: None };
        let ended = match self.submit(peer, ask, None) {
            Ok(submitted) => self.reply(submitted).await,
            Err(problem) => Err(Failure::from(problem)),
        };
        match ended {
            Ok(_) => self.loan_is_over(instance, loan, "it was taken back"),
            Err(failure) if failure.problem.code == Code::NotFound || !self.still_has(instance, &targets) => {
                self.loan_is_over(instance, loan, &failure.problem.detail);
            }
            Err(failure) => {
                tracing::info!(%instance, operation = loan.operation, "what was lent is not taken back yet: {}", failure.problem);
            }
        }
    }

    /// Whether it has what it was lent: else somebody has changed that since, and nothing is left to be taken back.
    fn still_has(&self, instance: &InstanceId, targets: &Targets) -> bool {
        self.book().get(instance).is_some_and(|known| targets.standing(&known.observed) == Standing::Asked)
    }

    fn loan_is_over(&self, instance: &InstanceId, loan: &Loan, why: &str) {
        let booted = loan.due_up.as_ref().zip(uptime()).is_some_and(|(due, up)| due.boot != up.boot);
        let how = if booted { " (the host was booted since: when it was due, the time of day has told)" } else { "" };
        tracing::info!(%instance, operation = loan.operation, "what was lent to {instance} is over: {why}{how}");
        let unrecorded = {
            let mut book = self.book();
            book.end_loan(instance, &loan.operation);
            book.take_unrecorded()
        };
        self.store().write_later(unrecorded);
    }
}
