//! Submitting a change: it gets an id and a task of its own, and all who sent it under one Idempotency-Key get its one
//! reply, also when the daemon was restarted in between. Refusals from before the intent are forgotten at once, since trying
//! again is the point.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agentd_core::api::OperationView;
use agentd_core::error::{Code, Problem};
use agentd_core::instance::{Ref, Target};
use agentd_core::operation::{Identity, Operation, Outcome};
use agentd_core::plan::Plan;
use futures_util::FutureExt;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::time::Instant;

use super::{Ask, Engine, Peer};
use crate::clock::now_ms;
use crate::store::{Entry, Key, Recorded, Reply, StoreError};

/// How long a key is kept.
pub(super) const KEPT: Duration = Duration::from_secs(24 * 3600);
/// How many keys are kept of one caller; over that, its oldest go, and nobody else's.
const MOST: usize = 32_768;

/// A change that was taken on.
#[derive(Debug, Clone)]
pub struct Submitted {
    /// Its operation's id.
    pub id: String,
    /// Its reply, or none where that is on record.
    reply: Option<watch::Receiver<Option<Reply>>>,
    /// Held while it is acknowledged and while it ends, so that neither overtakes the other half-way.
    gate: Arc<tokio::sync::Mutex<()>>,
}

impl Submitted {
    /// A change, and the one who will say what it came to.
    pub(super) fn new(id: String) -> (watch::Sender<Option<Reply>>, Submitted) {
        let (send, reply) = watch::channel(None);
        (send, Submitted { id, reply: Some(reply), gate: Arc::default() })
    }

    /// A change whose reply is on record.
    pub(super) fn recorded(id: String) -> Submitted {
        Submitted { id, reply: None, gate: Arc::default() }
    }

    fn has_ended(&self) -> bool {
        self.reply.as_ref().is_none_or(|reply| reply.borrow().is_some())
    }
}

pub(super) fn lost(what: &str) -> Problem {
    Problem::new(Code::Internal, format!("{what} ended without an outcome: this is a defect of agentd"))
        .hint("`ctl show` tells what is observed; the journal has the details")
}

#[derive(Debug)]
struct Kept {
    /// A digest of the request that it stands for.
    request: Vec<u8>,
    born_ms: u64,
    /// How old it was when this life of the daemon came to know it, and since when that is; the time of day may be set meanwhile.
    known: (Duration, Instant),
    submitted: Submitted,
}

impl Kept {
    fn is_over(&self) -> bool {
        let (age, since) = self.known;
        age + since.elapsed() > KEPT
    }
}

/// The keys in use, by caller.
#[derive(Debug, Default)]
pub(super) struct Keys(Mutex<HashMap<(u32, String), Kept>>);

impl Keys {
    fn lock(&self) -> MutexGuard<'_, HashMap<(u32, String), Kept>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a key that an earlier life of the daemon was given.
    pub(super) fn restore(&self, key: Key, submitted: Submitted) {
        let Key { uid, key, request, born_ms, .. } = key;
        let known = (Duration::from_millis(now_ms().saturating_sub(born_ms)), Instant::now());
        self.lock().insert((uid, key), Kept { request, born_ms, known, submitted });
    }

    /// The reply of an operation is on record from here on, and what is on record may still change: nobody knew, now
    /// somebody does.
    pub(super) fn is_on_record(&self, operation: &str) {
        for kept in self.lock().values_mut().filter(|kept| kept.submitted.id == operation) {
            kept.submitted.reply = None;
        }
    }

    /// Forgets those that are over, whoever gave them.
    pub(super) fn drop_over(&self) {
        self.lock().retain(|_, kept| !kept.is_over());
    }

    fn make_room(kept: &mut HashMap<(u32, String), Kept>, uid: u32) {
        if kept.keys().filter(|(owner, _)| *owner == uid).count() < MOST {
            return;
        }
        kept.retain(|_, entry| !entry.is_over());
        let own = kept.iter().filter(|((owner, _), _)| *owner == uid);
        let ended = own.filter(|(_, entry)| entry.submitted.has_ended());
        let mut ended: Vec<_> = ended.map(|(key, entry)| (entry.born_ms, key.clone())).collect();
        ended.sort();
        for (_, key) in ended.into_iter().take(MOST / 8) {
            kept.remove(&key);
        }
    }
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
            restart: false,
            elapsed_ms: 0,
            changes: Vec::new(),
            steps: Vec::new(),
            notes: vec!["it waits for its turn".into()],
            who: Some(peer.who.clone()),
            code: None,
            detail: None,
            undoes: None,
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
        self.refuse_before_restored()?;
        let Some((key, request)) = key else { return Ok(self.spawn(peer, ask, None)) };
        let (place, request) = ((peer.who.uid, key), Sha256::digest(request.as_bytes()).to_vec());
        let mut keys = self.inner.keys.lock();
        if let Some(kept) = keys.get(&place).filter(|kept| !kept.is_over()) {
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
        let born_ms = now_ms();
        let key =
            Key { uid: place.0, key: place.1.clone(), request: request.clone(), operation: String::new(), born_ms };
        let submitted = self.spawn(peer, ask, Some(key));
        let known = (Duration::ZERO, Instant::now());
        keys.insert(place, Kept { request, born_ms, known, submitted: submitted.clone() });
        Ok(submitted)
    }

    /// Waits for a change to end, and tells what it came to.
    pub async fn reply(&self, submitted: Submitted) -> Reply {
        let Some(mut waiting) = submitted.reply else { return self.recorded_reply(&submitted.id).await };
        match waiting.wait_for(Option::is_some).await {
            Ok(reply) => reply.clone().unwrap_or_else(|| Err(lost("the change").into())),
            Err(_) => Err(lost("the change").into()),
        }
    }

    async fn recorded_reply(&self, id: &str) -> Reply {
        match self.store().operation(id).await {
            Ok(Some(Recorded { reply: Some(reply), unwritten: false, .. })) => reply,
            // What is not on record yet is not told as if it were.
            Ok(Some(Recorded { reply: Some(reply), .. })) => match self.store().commit(Vec::new()).await {
                Ok(()) => reply,
                Err(error) => {
                    let detail = format!("the change has ended, and that could not be recorded yet: {error}");
                    Err(Problem::new(Code::StoreUnavailable, detail).hint("see `ctl health`, then try again").into())
                }
            },
            Ok(Some(Recorded { operation, .. })) if self.backend(operation.reference.kind()).is_err() => {
                let kind = operation.reference.kind();
                let detail = format!("the change was cut off, and instances of kind {kind} are switched off since");
                Err(Problem::new(Code::BackendUnavailable, detail)
                    .hint("what came of it is found out once a section of the config file switches the kind on")
                    .into())
            }
            Ok(_) => Err(lost("the change").into()),
            Err(error) => {
                let detail = format!("the change was taken on before, and what came of it can't be told now: {error}");
                Err(Problem::new(Code::StoreUnavailable, detail).hint("see `ctl health`, then try again").into())
            }
        }
    }

    /// A change that was taken on and isn't on record yet: it looks, or waits for its turn.
    pub(super) fn not_yet_recorded(&self, id: &str) -> Option<OperationView> {
        self.inner.under_way.borrow().get(id).cloned()
    }

    /// Sees to it that a change which is told to be running is on record before that is told: what was acknowledged is
    /// accounted for, whatever becomes of the daemon. Its view, or none where it has ended, or can't be acknowledged: then
    /// its reply is to be waited for.
    pub async fn acknowledge(&self, submitted: &Submitted, peer: &Peer, ask: &Ask) -> Option<OperationView> {
        let (engine, submitted, peer, ask) = (self.clone(), submitted.clone(), peer.clone(), ask.clone());
        // In a task of its own: a caller that goes away must not leave it half-way.
        let task = tokio::spawn(async move {
            engine.put_on_record(&submitted, &peer, &ask).await.ok()?;
            engine.running(&submitted.id).await.filter(|view| view.outcome == Outcome::Running)
        });
        task.await.ok().flatten()
    }

    async fn put_on_record(&self, submitted: &Submitted, peer: &Peer, ask: &Ask) -> Result<(), StoreError> {
        let Target::Full(reference) = &ask.target else { return Ok(()) };
        let _gate = submitted.gate.lock().await;
        if submitted.has_ended() || self.store().operation(&submitted.id).await?.is_some() {
            return Ok(());
        }
        let operation = unplanned(&submitted.id, peer, ask, reference);
        let key =
            self.inner.keys.lock().iter().find(|(_, kept)| kept.submitted.id == submitted.id).map(|(key, kept)| {
                let (uid, key) = key.clone();
                Key { uid, key, request: kept.request.clone(), operation: submitted.id.clone(), born_ms: kept.born_ms }
            });
        let mut entries = vec![Entry::Queued(Box::new(operation))];
        entries.extend(key.map(Entry::Key));
        self.store().commit(entries).await
    }

    /// Waits until no change is under way.
    pub async fn idle(&self) {
        // The sender is our own, so this can't end by its being gone.
        let _ = self.inner.under_way.subscribe().wait_for(HashMap::is_empty).await;
    }

    fn spawn(&self, peer: Peer, ask: Ask, key: Option<Key>) -> Submitted {
        let id = self.next_id();
        let (send, submitted) = Submitted::new(id.clone());
        let (engine, operation, gate) = (self.clone(), id.clone(), Arc::clone(&submitted.gate));
        let under_way = UnderWay::enter(self, &id, &peer, &ask);
        let key = key.map(|key| Key { operation: id, ..key });
        tokio::spawn(async move {
            let _under_way = under_way;
            let (asker, asked) = (peer.clone(), ask.clone());
            let place = key.as_ref().map(|key| (key.uid, key.key.clone()));
            let change = AssertUnwindSafe(engine.change(operation.clone(), peer, ask, key)).catch_unwind();
            let reply = change.await.unwrap_or_else(|_| Err(lost("the change").into()));
            let forgotten = matches!(&reply, Err(failure) if failure.operation.is_none()
                && matches!(failure.problem.code.http(), 409 | 429 | 503 | 504));
            let gate = gate.lock().await;
            engine.end_unplanned(&operation, &asker, &asked, &reply).await;
            if let (Some(place), true) = (&place, forgotten) {
                engine.inner.keys.lock().remove(place);
                // What never came to be on record need not be taken out of it: a store in trouble would keep all of these.
                if !matches!(engine.store().operation(&operation).await, Ok(None)) {
                    engine.store().write_later(vec![Entry::ForgetKey(operation.clone())]);
                }
            }
            // Nobody may be waiting any more.
            let _ = send.send(Some(reply));
            drop(gate);
            if place.is_some()
                && matches!(engine.store().operation(&operation).await, Ok(Some(Recorded { reply: Some(_), .. })))
            {
                engine.inner.keys.is_on_record(&operation);
            }
        });
        submitted
    }

    /// A change that was acknowledged before it had a plan, and then came to nothing, ends on record too.
    async fn end_unplanned(&self, id: &str, peer: &Peer, ask: &Ask, reply: &Reply) {
        let (Target::Full(reference), Err(failure)) = (&ask.target, reply) else { return };
        let Ok(Some(recorded)) = self.store().operation(id).await else { return };
        if !recorded.operation.is_open() || !recorded.operation.steps.is_empty() {
            return;
        }
        let mut operation = unplanned(id, peer, ask, reference);
        operation.fail(Outcome::Refused, &failure.problem);
        self.record_end(&operation, reply, None).await;
    }
}

/// A change that has no plan yet.
fn unplanned(id: &str, peer: &Peer, ask: &Ask, reference: &Ref) -> Operation {
    let plan = Plan::empty(reference.clone(), Identity { id: String::new(), boot: None }, ask.wish.verb());
    Operation::new(id.to_owned(), peer.who.clone(), plan, now_ms())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn keys_are_kept_for_a_day_and_then_forgotten() {
        let keys = Keys::default();
        let born = |key: &str, age: Duration| {
            let born_ms = now_ms() - crate::clock::millis(age);
            let key = Key { uid: 7, key: key.into(), request: Vec::new(), operation: key.into(), born_ms };
            keys.restore(key, Submitted::recorded("1".into()));
        };
        born("old", KEPT - Duration::from_secs(60));
        born("new", Duration::ZERO);
        keys.drop_over();
        assert_eq!(keys.lock().len(), 2);
        tokio::time::advance(Duration::from_secs(120)).await;
        keys.drop_over();
        assert_eq!(keys.lock().keys().map(|(_, key)| key.as_str()).collect::<Vec<_>>(), ["new"]);
    }
}
