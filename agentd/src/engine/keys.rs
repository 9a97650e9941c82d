//! Submitting a change: it gets an id and a task of its own, and all who sent it under one Idempotency-Key get its one
//! reply. Keys are kept in memory; refusals from before the intent are forgotten at once, since trying again is the point.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agentd_core::api::OperationView;
use agentd_core::error::{Code, Problem};
use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Ask, Engine, Failure, Peer};

/// How long a key is kept.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// How many keys are kept; over that, the oldest go.
const MOST: usize = 16_384;

/// What a change came to.
pub(super) type Reply = Result<OperationView, Failure>;

/// A change that was taken on.
#[derive(Debug, Clone)]
pub struct Submitted {
    /// Its operation's id.
    pub id: String,
    reply: watch::Receiver<Option<Reply>>,
}

impl Submitted {
    /// Waits for the change to end.
    pub async fn reply(mut self) -> Reply {
        match self.reply.wait_for(Option::is_some).await {
            Ok(reply) => reply.clone().unwrap_or_else(|| Err(lost().into())),
            Err(_) => Err(lost().into()),
        }
    }
}

fn lost() -> Problem {
    Problem::new(Code::Internal, "the change ended without an outcome: this is a defect of agentd")
        .hint("`ctl show` tells what is observed; the journal has the details")
}

#[derive(Debug)]
struct Kept {
    request: String,
    born: Instant,
    submitted: Submitted,
}

/// The keys in use, by caller.
#[derive(Debug, Default)]
pub(super) struct Keys(Mutex<HashMap<(u32, String), Kept>>);

impl Keys {
    fn lock(&self) -> MutexGuard<'_, HashMap<(u32, String), Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make_room(kept: &mut HashMap<(u32, String), Kept>) {
        if kept.len() < MOST {
            return;
        }
        kept.retain(|_, entry| entry.born.elapsed() < KEPT);
        while kept.len() >= MOST {
            let Some(oldest) = kept.iter().min_by_key(|(_, entry)| entry.born).map(|(key, _)| key.clone()) else {
                return;
            };
            kept.remove(&oldest);
        }
    }
}

impl Engine {
    /// Takes a change on; it runs to its end whether or not anybody waits for it. `key` is the caller's Idempotency-Key
    /// with the request that it stands for.
    pub fn submit(&self, peer: Peer, ask: Ask, key: Option<(String, String)>) -> Result<Submitted, Problem> {
        let Some((key, request)) = key else { return Ok(self.spawn(peer, ask, None)) };
        let place = (peer.who.uid, key);
        let mut keys = self.inner.keys.lock();
        if let Some(kept) = keys.get(&place)
            && kept.born.elapsed() < KEPT
        {
            if kept.request == request {
                return Ok(kept.submitted.clone());
            }
            return Err(Problem::new(
                Code::IdempotencyMismatch,
                "this Idempotency-Key came with another request before",
            )
            .hint("use a new key for a new request"));
        }
        Keys::make_room(&mut keys);
        let submitted = self.spawn(peer, ask, Some(place.clone()));
        keys.insert(place, Kept { request, born: Instant::now(), submitted: submitted.clone() });
        Ok(submitted)
    }

    fn spawn(&self, peer: Peer, ask: Ask, key: Option<(u32, String)>) -> Submitted {
        let id = ulid::Ulid::new().to_string();
        let (send, reply) = watch::channel(None);
        let (engine, operation) = (self.clone(), id.clone());
        tokio::spawn(async move {
            let reply = AssertUnwindSafe(engine.change(operation, peer, ask)).catch_unwind().await;
            let reply = reply.unwrap_or_else(|_| Err(lost().into()));
            if let (Some(key), Err(failure)) = (&key, &reply)
                && failure.operation.is_none()
                && matches!(failure.problem.code.http(), 409 | 429 | 503)
            {
                engine.inner.keys.lock().remove(key);
            }
            // Nobody may be waiting any more.
            let _ = send.send(Some(reply));
        });
        Submitted { id, reply }
    }
}
