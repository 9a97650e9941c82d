//! Submitting a change: it gets an id and a task of its own, and all who sent it under one Idempotency-Key get its one
//! reply. Keys are kept in memory; refusals from before the intent are forgotten at once, since trying again is the point.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::AssertUnwindSafe;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agentd_core::api::OperationView;
use agentd_core::error::{Code, Problem};
use agentd_core::instance::Target;
use agentd_core::operation::Outcome;
use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Ask, Engine, Failure, Peer};

/// How long a key is kept.
const KEPT: Duration = Duration::from_secs(24 * 3600);
/// How many keys are kept of one caller; over that, its oldest go, and nobody else's.
const MOST: usize = 4096;

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
    /// A digest: bodies are long, and a caller that finds two with the same one misleads only itself.
    request: u64,
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

    fn make_room(kept: &mut HashMap<(u32, String), Kept>, uid: u32) {
        if kept.keys().filter(|(owner, _)| *owner == uid).count() < MOST {
            return;
        }
        kept.retain(|_, entry| entry.born.elapsed() < KEPT);
        let own = kept.iter().filter(|((owner, _), _)| *owner == uid);
        let ended = own.filter(|(_, entry)| entry.submitted.reply.borrow().is_some());
        let mut ended: Vec<_> = ended.map(|(key, entry)| (entry.born, key.clone())).collect();
        ended.sort();
        for (_, key) in ended.into_iter().take(MOST / 8) {
            kept.remove(&key);
        }
    }
}

fn digest(request: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    request.hash(&mut hasher);
    hasher.finish()
}

/// One change that was taken on and has not ended.
struct UnderWay {
    engine: Engine,
    id: String,
}

impl UnderWay {
    fn enter(engine: &Engine, id: &str, peer: &Peer, ask: &Ask) -> Self {
        let view = OperationView {
            operation: Some(id.to_owned()),
            verb: ask.wish.verb().to_string(),
            outcome: Outcome::Running,
            reference: match &ask.target {
                Target::Full(reference) => reference.to_string(),
                Target::Bare(name) => name.clone(),
            },
            dry_run: ask.dry_run,
            elapsed_ms: 0,
            changes: Vec::new(),
            steps: Vec::new(),
            notes: vec!["it waits for its turn".into()],
            who: Some(peer.who.clone()),
            code: None,
            detail: None,
            instance: None,
        };
        engine.inner.under_way.send_modify(|changes| {
            changes.insert(id.to_owned(), view);
        });
        UnderWay { engine: engine.clone(), id: id.to_owned() }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.engine.inner.under_way.send_modify(|changes| {
            changes.remove(&self.id);
        });
    }
}

impl Engine {
    /// Takes a change on; it runs to its end whether or not anybody waits for it. `key` is the caller's Idempotency-Key
    /// with the request that it stands for.
    pub fn submit(&self, peer: Peer, ask: Ask, key: Option<(String, String)>) -> Result<Submitted, Problem> {
        let Some((key, request)) = key else { return Ok(self.spawn(peer, ask, None)) };
        let (place, request) = ((peer.who.uid, key), digest(&request));
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
        Keys::make_room(&mut keys, place.0);
        let submitted = self.spawn(peer, ask, Some(place.clone()));
        keys.insert(place, Kept { request, born: Instant::now(), submitted: submitted.clone() });
        Ok(submitted)
    }

    /// A change that was taken on and isn't on record yet: it looks, or waits for its turn.
    pub(super) fn not_yet_recorded(&self, id: &str) -> Option<OperationView> {
        self.inner.under_way.borrow().get(id).cloned()
    }

    /// Waits until no change is under way.
    pub async fn idle(&self) {
        // The sender is our own, so this can't end by its being gone.
        let _ = self.inner.under_way.subscribe().wait_for(HashMap::is_empty).await;
    }

    fn spawn(&self, peer: Peer, ask: Ask, key: Option<(u32, String)>) -> Submitted {
        let id = ulid::Ulid::new().to_string();
        let (send, reply) = watch::channel(None);
        let (engine, operation) = (self.clone(), id.clone());
        let under_way = UnderWay::enter(self, &id, &peer, &ask);
        tokio::spawn(async move {
            let _under_way = under_way;
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
