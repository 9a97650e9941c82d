//! Operations whose outcome nobody knows: a call did not return in time. The instance is held and its charge stays until
//! the call has ended and the truth is observed; then the hold ends by itself, or becomes one that wants a look.

use std::time::Duration;

use agentd_core::api::HoldKind;
use agentd_core::instance::State;
use agentd_core::operation::{Operation, Outcome};
use tokio::time::sleep;

use super::Engine;
use crate::backend::{BackendError, Look};

/// How often an instance is looked at.
const PAUSE: Duration = Duration::from_millis(500);

impl Engine {
    /// Looks at an operation's instance until the truth is known. Runs beside everything else.
    pub(super) fn watch_unsettled(&self, operation: Operation) {
        let engine = self.clone();
        tokio::spawn(async move { engine.settle(operation).await });
    }

    async fn settle(&self, mut operation: Operation) {
        let reference = operation.reference.clone();
        let Ok(backend) = self.backend(reference.kind()) else { return };
        loop {
            sleep(PAUSE).await;
            if backend.is_under_way(&operation.identity).await {
                continue;
            }
            let slot = self.slot(&reference);
            let _turn = slot.turn.lock().await;
            let begun = self.book().moment();
            let observed = match backend.observe(reference.name(), Look::Plain).await {
                Ok(observed) if observed.state == State::Unknown => continue,
                Ok(observed) => Some(observed),
                Err(BackendError::NotFound(_)) => None,
                Err(_) => continue,
            };
            operation.settle_unknown(observed.as_ref());
            {
                let mut book = self.book();
                let settings = self.settings();
                book.lift(&reference, HoldKind::Recovering);
                match observed {
                    Some(observed) => book.end(&reference, Some((observed, begun)), &settings.config, true),
                    None => book.drop_gone(&reference),
                }
                if operation.outcome == Outcome::Partial {
                    let reason = operation.problem.as_ref().map_or_else(String::new, |(_, detail)| detail.clone());
                    book.hold(&reference, HoldKind::NeedsAttention, reason);
                }
            }
            let outcome = operation.outcome.as_str();
            tracing::info!(operation = operation.id, instance = %reference, outcome, "the outcome is known now");
            if let Err(error) = self.journal().write(&operation).await {
                tracing::error!(operation = operation.id, %error, "an outcome could not be recorded");
            }
            return;
        }
    }
}
