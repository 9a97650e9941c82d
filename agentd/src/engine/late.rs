//! A guest that was asked to shut down for a resize, did not in time, and does a while later: nobody can take that back, and
//! nobody wanted it to stay down. It is started again, as it was, unless somebody has asked for something else meanwhile.
//! Whether it was that request it obeyed, or another that went past agentd, nobody can tell: hence a few minutes.

use std::time::Duration;

use agentd_core::access::Right;
use agentd_core::instance::{State, Target};
use agentd_core::operation::{Operation, Outcome, RESTART, same_boot};
use tokio::time::{Instant, sleep};

use super::{Ask, Engine, Peer, Wish};
use crate::backend::Look;
use crate::clock::now_ms;

/// For how long such a guest is watched. What goes down later does so for reasons of its own.
const WATCHED: Duration = Duration::from_secs(300);
/// How often.
const PAUSE: Duration = Duration::from_secs(2);

impl Engine {
    /// Watches over the instance of a resize that has asked it to go down and has given up.
    pub(super) fn watch_over(&self, operation: &Operation) {
        if operation.outcome == Outcome::RolledBack && operation.asked_in_vain() {
            let (engine, operation) = (self.clone(), operation.clone());
            tokio::spawn(async move { engine.start_if_it_goes_down(&operation).await });
        }
    }

    /// Takes up what an earlier life of the daemon was watching over.
    pub(super) async fn watch_over_again(&self) {
        let newest = self.store().newest(None, None, None, 200).await.unwrap_or_default();
        newest.iter().for_each(|operation| self.watch_over(operation));
    }

    async fn start_if_it_goes_down(&self, operation: &Operation) {
        let instance = operation.instance_id();
        let ended = operation.started_ms.saturating_add(operation.elapsed_ms);
        let since = Duration::from_millis(now_ms().saturating_sub(ended));
        let end = Instant::now() + WATCHED.saturating_sub(since);
        while Instant::now() < end {
            sleep(PAUSE).await;
            let reference = self.name_now(operation);
            if self.is_overtaken(operation, reference.as_str()).await {
                return;
            }
            let Ok(seen) = self.observe(instance.kind, &instance.id, Look::Plain).await else { continue };
            match seen.state {
                // That was somebody.
                _ if seen.switched_off => return,
                State::Stopped | State::Crashed => {}
                _ if same_boot(seen.boot.as_deref(), operation.identity.boot.as_deref()) => continue,
                // Somebody has started it.
                _ => return,
            }
            tracing::warn!(%instance, operation = operation.id, "{reference} went down after its restart was given up: it is started again");
            let if_version = self.book().get(&instance).map(|known| known.version.clone());
            let (target, wish) = (Target::Full(seen.reference), Wish::Start);
            let ask = Ask { target, wish, right: Right::Power, dry_run: false, if_version };
            let ended = match self.submit(Peer::itself(RESTART), ask, None) {
                Ok(submitted) => self.reply(submitted).await.map_err(|failure| failure.problem),
                Err(problem) => Err(problem),
            };
            if let Err(problem) = ended {
                tracing::error!(%instance, "{reference} went down late and could not be started again: {problem}");
            }
            return;
        }
    }

    /// Whether something else was asked of its instance since, and not refused; or nobody can tell.
    async fn is_overtaken(&self, operation: &Operation, reference: &str) -> bool {
        let Ok(newest) = self.store().newest(Some(reference.to_owned()), None, None, 100).await else { return true };
        newest.iter().any(|later| later.id > operation.id && later.outcome != Outcome::Refused)
    }
}
