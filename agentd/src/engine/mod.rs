//! The owner of inventory and ledger, and the only way to them: what is read, what is changed, who may. Knows no HTTP and no
//! engine's words; it joins the pure decisions of core with the backends and the record.
//!
//! The book is under a plain lock that is never held over an await; changes of one instance run one at a time behind its
//! [`Slot`], those of different instances share nothing but that lock. Names are looked up once, at the door: from there on
//! an instance is its id, since a name may go to another one at any time.

mod change;
mod events;
mod keys;
mod late;
mod loans;
mod logs;
mod metrics;
mod read;
mod recovery;
mod refusals;
#[cfg(test)]
mod tests;
mod usage;
mod watch;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use agentd_core::access::{AccessTable, Caller, Decision, Right};
use agentd_core::api::OperationView;
use agentd_core::config::Config;
use agentd_core::error::{Code, Problem};
use agentd_core::instance::{InstanceId, Kind, Observed, Ref, Target};
use agentd_core::operation::Who;
use agentd_core::plan::HostCapacity;
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::sync::watch as channel;
use tokio::time::Instant;

pub use change::{Ask, Wish};
pub use events::{Begin, Event, EventFilter, Events, LONGEST_TAIL, types};
pub use keys::Submitted;
pub use read::Filter;

use crate::backend::timed::Timed;
use crate::backend::{Backend, BackendError, Look};
use crate::clock;
use crate::executor::unrecorded;
use crate::inventory::Book;
use crate::metrics::Metrics;
use crate::store::{Store, StoreError};

/// How long a request waits for the listing of one kind; then what was known of it before has to do, and is told.
const LISTING_PATIENCE: Duration = Duration::from_secs(3);

/// Instances of a kind that are looked at side by side.
const LOOKS_AT_ONCE: usize = 6;

/// What a note of a reload that was not taken begins with.
const NOT_RELOADED: &str = "the config file was not reloaded, the one before is in force";

/// What is in force: the config file and what was made of it. Replaced whole by a reload.
#[derive(Debug)]
pub struct Settings {
    /// The config.
    pub config: Config,
    /// Its `[[access]]` rules with names resolved to ids.
    pub access: AccessTable,
    /// What the host has, `auto` resolved.
    pub host: HostCapacity,
    /// What `ctl health` should say of the config: a reload that was rejected, a group that doesn't exist.
    pub notes: Vec<String>,
}

/// A caller, with what the record keeps of it.
#[derive(Debug, Clone)]
pub struct Peer {
    /// What decisions go by.
    pub caller: Caller,
    /// What the record keeps.
    pub who: Who,
}

impl Peer {
    /// The daemon itself, on record under this command.
    pub(crate) fn itself(command: &str) -> Self {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        Peer {
            caller: Caller { uid, gid, groups: Vec::new() },
            who: Who { uid, gid, pid: std::process::id().cast_signed(), command: command.to_owned() },
        }
    }
}

/// A request that ended badly, with the operation where there is one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failure {
    /// Why.
    pub problem: Problem,
    /// The operation.
    pub operation: Option<Box<OperationView>>,
}

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Failure { problem, operation: None }
    }
}

/// Orders the changes of one instance: one runs, one waits, the next hears `busy`.
#[derive(Debug, Default)]
struct Slot {
    turn: tokio::sync::Mutex<()>,
    queued: AtomicUsize,
}

/// One backend, and how far what is known of its instances can be relied on.
struct Source {
    backend: Arc<dyn Backend>,
    /// When the last look at all was begun; held while there is one.
    listed: tokio::sync::Mutex<Option<Instant>>,
    following: Mutex<Following>,
}

/// How closely an engine is followed.
#[derive(Debug, Default)]
struct Following {
    /// Since when everything that is announced is heard, and [`Backend::stirred`] tells the rest.
    heard: Option<Instant>,
    /// When the last full listing that went well was begun.
    listed: Option<Instant>,
    /// What was announced and has not been looked at yet.
    announced: BTreeSet<String>,
    /// What the slow round over all of them looked at last.
    round: Option<InstanceId>,
}

impl Source {
    fn new(backend: Arc<dyn Backend>) -> Self {
        Source { backend, listed: tokio::sync::Mutex::default(), following: Mutex::default() }
    }

    fn following(&self) -> MutexGuard<'_, Following> {
        self.following.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether everything has been listed since all that is announced is heard: then what is known is kept true by looking
    /// at what stirs, and costs the same however many instances there are.
    fn is_followed(&self) -> bool {
        let following = self.following();
        following.heard.zip(following.listed).is_some_and(|(heard, listed)| listed >= heard)
    }
}

struct Inner {
    sources: BTreeMap<Kind, Source>,
    settings: RwLock<Arc<Settings>>,
    book: Mutex<Book>,
    store: Store,
    /// Whether what an earlier life of the daemon left behind is taken up; before that nothing is changed.
    restored: AtomicBool,
    ids: Mutex<ulid::Generator>,
    slots: Mutex<HashMap<InstanceId, Arc<Slot>>>,
    /// Drift that is to be put back, and what was put back a moment ago.
    repairs: Mutex<HashMap<InstanceId, watch::Repair>>,
    keys: keys::Keys,
    refusals: refusals::Refusals,
    looks: usage::Looks,
    metrics: Metrics,
    /// When it was made: what is done now and then is done at whole multiples of its pause since then.
    began: Instant,
    /// The changes that were taken on and have not ended, as they are told until they are on record.
    under_way: channel::Sender<HashMap<String, OperationView>>,
}

/// The engine; clones share one.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

impl Engine {
    /// An engine over these backends, one a kind. `epoch` must differ from that of every earlier life.
    /// Changes nothing before [`Engine::restore`] has gone well.
    pub fn new(backends: Vec<Arc<dyn Backend>>, settings: Settings, store: Store, epoch: String) -> Self {
        let metrics = Metrics::new();
        store.count_with(metrics.clone());
        let timed = |backend| Arc::new(Timed::new(backend, metrics.clone())) as Arc<dyn Backend>;
        let source = |backend: Arc<dyn Backend>| (backend.kind(), Source::new(backend));
        let book = Mutex::new(Book::new(&settings.config, settings.host, epoch));
        Engine {
            inner: Arc::new(Inner {
                sources: backends.into_iter().map(timed).map(source).collect(),
                settings: RwLock::new(Arc::new(settings)),
                book,
                store,
                restored: AtomicBool::new(false),
                ids: Mutex::new(ulid::Generator::new()),
                slots: Mutex::default(),
                repairs: Mutex::default(),
                keys: keys::Keys::default(),
                refusals: refusals::Refusals::default(),
                looks: usage::Looks::default(),
                metrics,
                began: Instant::now(),
                under_way: channel::Sender::default(),
            }),
        }
    }

    /// What is in force.
    pub fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.inner.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes new settings whole.
    pub fn set_settings(&self, settings: Settings) {
        let settings = Arc::new(settings);
        // Both under the book's lock, and everybody who writes to the book asks for the settings under it too: what is
        // recorded by the old `[[limit]]`s never lands in the ledger of the new ones.
        let mut book = self.book();
        book.set_config(&settings.config, settings.host);
        *self.inner.settings.write().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    /// Puts a note of a reload that was not taken on the settings in force, for `ctl health`, in place of an earlier one; the
    /// next that is taken drops it.
    pub fn note(&self, note: String) {
        let mut settings = self.inner.settings.write().unwrap_or_else(PoisonError::into_inner);
        let mut notes = settings.notes.clone();
        notes.retain(|known| !known.starts_with(NOT_RELOADED));
        // Faults come in lines.
        notes.push(format!("{NOT_RELOADED}: {}", note.lines().collect::<Vec<_>>().join("; ")));
        let Settings { config, access, host, .. } = &**settings;
        *settings = Arc::new(Settings { config: config.clone(), access: access.clone(), host: *host, notes });
    }

    /// The record.
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// Operations of one daemon sort by the order in which they came, also within a millisecond.
    fn next_id(&self) -> String {
        let mut ids = self.inner.ids.lock().unwrap_or_else(PoisonError::into_inner);
        ids.generate_from_datetime(clock::now()).unwrap_or_else(|_| ulid::Ulid::new()).to_string()
    }

    /// Refuses changes while nobody knows what an earlier life of the daemon promised and left unfinished.
    fn refuse_before_restored(&self) -> Result<(), Problem> {
        if self.inner.restored.load(Ordering::Acquire) {
            return Ok(());
        }
        let unread = || StoreError::Unreadable("it is being read".into());
        Err(unrecorded(&self.store().trouble().unwrap_or_else(unread)))
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.inner.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn source(&self, kind: Kind) -> Result<&Source, Problem> {
        self.inner.sources.get(&kind).ok_or_else(|| {
            Problem::new(Code::NotFound, format!("instances of kind {kind} are switched off on this host"))
                .hint("a section of the config file switches a kind on")
        })
    }

    fn backend(&self, kind: Kind) -> Result<Arc<dyn Backend>, Problem> {
        self.source(kind).map(|source| Arc::clone(&source.backend))
    }

    /// Refuses a caller that no rule names, before anything is looked up.
    pub fn admit_caller(&self, peer: &Peer) -> Result<(), Problem> {
        if self.settings().access.knows(&peer.caller) {
            return Ok(());
        }
        self.tell_refusal(peer, "a request", &Decision::NoRule);
        Err(Problem::new(Code::Forbidden, format!("no rule lets uid {} in", peer.who.uid))
            .hint("an [[access]] rule of the config file must name your user or a group of yours"))
    }

    fn tell_refusal(&self, peer: &Peer, what: &str, decision: &Decision) {
        let (who, uid, pid) = (&peer.who, peer.who.uid, peer.who.pid);
        let (told, left_out) = self.inner.refusals.one_more(uid);
        if left_out > 0 {
            tracing::warn!(uid, "{left_out} more refusals of uid {uid} were left out here");
        }
        if told {
            tracing::warn!(uid, pid, "{what} by {who}: {decision}");
        }
    }

    /// Whether a caller may do this to an instance. One that its rules don't match is `not-found` to it, by the very name
    /// that it gave: an id tells it no other.
    fn authorize(&self, peer: &Peer, right: Right, observed: &Observed, asked: &Target) -> Result<String, Problem> {
        let reference = &observed.reference;
        let decision = self.settings().access.decide(&peer.caller, right, Some((reference.as_str(), &observed.labels)));
        let (who, uid, pid) = (&peer.who, peer.who.uid, peer.who.pid);
        if let Decision::Allowed { rule } = &decision {
            tracing::debug!(instance = %reference, uid, pid, rule, %right, "{right} of {reference} by {who}: {decision}");
        } else {
            self.tell_refusal(peer, &format!("{right} of {reference}"), &decision);
        }
        match decision {
            Decision::Allowed { rule } => Ok(rule),
            Decision::NoMatch => Err(not_found(asked.as_str())),
            Decision::NoRule | Decision::Lacks(_) => Err(Problem::new(
                Code::Forbidden,
                format!("uid {} has no right `{right}` on {reference}", peer.who.uid),
            )
            .hint("an [[access]] rule of the config file would have to give it")),
        }
    }

    /// Observes one instance freshly and takes the observation into the book.
    async fn observe(&self, kind: Kind, name: &str, look: Look) -> Result<Observed, Problem> {
        let backend = self.backend(kind)?;
        let begun = self.book().moment();
        match backend.observe(name, look).await {
            Ok(observed) => {
                let drift = self.book().record(observed.clone(), begun, &self.settings().config);
                self.drifted(drift);
                Ok(observed)
            }
            Err(error) => {
                if matches!(error, BackendError::NotFound(_))
                    && let Ok(reference) = Ref::new(kind, name)
                {
                    // Gone, or under another name: a listing tells which.
                    let known = self.book().named(&reference).is_some();
                    if known {
                        self.refresh_kind(kind, Duration::ZERO).await;
                    }
                    return Err(not_found(reference.as_str()));
                }
                Err(explain(kind, error))
            }
        }
    }

    /// Finds what a caller means, whatever it may do to it: a full reference (or id), or a bare name that fits exactly one
    /// instance that the caller may see.
    async fn find(&self, peer: &Peer, target: &Target) -> Result<Observed, Problem> {
        let name = match target {
            Target::Full(reference) => return self.observe(reference.kind(), reference.name(), Look::Plain).await,
            Target::Bare(name) => name,
        };
        let kinds: Vec<Kind> =
            self.inner.sources.keys().copied().filter(|kind| Ref::new(*kind, name).is_ok()).collect();
        let looks = kinds.iter().map(|kind| self.observe(*kind, name, Look::Plain));
        let mut found = Vec::new();
        let mut down = None;
        for (kind, look) in kinds.iter().zip(futures_util::future::join_all(looks).await) {
            match look {
                Ok(observed) => found.push(observed),
                Err(problem) if problem.code == Code::NotFound => {}
                Err(problem) => down = Some((*kind, problem)),
            }
        }
        let access = &self.settings().access;
        found.retain(|observed| access.can_see(&peer.caller, observed.reference.as_str(), &observed.labels));
        if let Some((kind, problem)) = down {
            let detail = format!("{name:?} may be a {kind}, and that can't be told now: {}", problem.detail);
            return Err(Problem::new(problem.code, detail).hint(format!("name the kind, as in `vm/{name}`")));
        }
        match (found.pop(), found.is_empty()) {
            (None, _) => Err(not_found(name)),
            (Some(one), true) => Ok(one),
            (Some(last), false) => {
                found.push(last);
                let names: Vec<&str> = found.iter().map(|observed| observed.reference.as_str()).collect();
                Err(Problem::new(Code::Ambiguous, format!("{name:?} fits {}", names.join(" and ")))
                    .hint(format!("name the kind: {}", names.join(" or "))))
            }
        }
    }

    /// Sees to it that the inventory of every kind was looked at not longer than `max_age` ago. One look at a kind serves all who
    /// wait for it; a backend that does not answer leaves what is known of its instances in force.
    async fn refresh(&self, max_age: Duration) {
        let kinds: Vec<Kind> = self.inner.sources.keys().copied().collect();
        futures_util::future::join_all(kinds.into_iter().map(|kind| self.refresh_kind(kind, max_age))).await;
    }

    /// The same of the kinds of which what is known is not true enough to admit a growth: those that are not followed, and those
    /// that have instances which are charged what they use.
    async fn refresh_to_admit(&self, max_age: Duration) {
        let kinds: Vec<Kind> = {
            let book = self.book();
            let stale = |kind: &Kind, source: &Source| !source.is_followed() || book.charges_use(*kind);
            let sources = self.inner.sources.iter();
            sources.filter(|(kind, source)| stale(kind, source)).map(|(kind, _)| *kind).collect()
        };
        futures_util::future::join_all(kinds.into_iter().map(|kind| self.refresh_kind(kind, max_age))).await;
    }

    /// Waits for a listing for a bounded time: an engine that hangs must not hold up the changes of other kinds. What comes
    /// later is taken all the same.
    async fn refresh_kind(&self, kind: Kind, max_age: Duration) {
        let engine = self.clone();
        let listing = tokio::spawn(async move { engine.list_kind(kind, max_age).await });
        if tokio::time::timeout(LISTING_PATIENCE, listing).await.is_err() {
            let why = format!("it was not listed within {} s", LISTING_PATIENCE.as_secs());
            self.book().record_unavailable(kind, why);
        }
    }

    async fn list_kind(&self, kind: Kind, max_age: Duration) {
        let Ok(source) = self.source(kind) else { return };
        let asked = Instant::now();
        let mut listed = source.listed.lock().await;
        if listed.is_some_and(|begun| begun + max_age >= asked) {
            return;
        }
        let started = Instant::now();
        if source.is_followed() && self.look_at_stirred(kind, source).await {
            *listed = Some(started);
            return;
        }
        let begun = self.book().moment();
        let listing = source.backend.list().await;
        *listed = Some(started);
        match listing {
            Ok(listing) => {
                source.following().listed = Some(started);
                if self.book().unavailable().contains_key(&kind) {
                    tracing::info!("{kind}s can be listed again");
                }
                let drift = self.book().record_listing(kind, listing, begun, &self.settings().config);
                self.drifted(drift);
            }
            Err(error) => {
                let why = error.to_string();
                // Once, and not at each of the tries that follow.
                if self.book().unavailable().get(&kind) != Some(&why) {
                    tracing::warn!("{kind}s can't be listed: {why}");
                }
                self.book().record_unavailable(kind, why);
            }
        }
    }

    /// Looks at what stirred and at what moves, of an engine that is followed; whether that went well.
    async fn look_at_stirred(&self, kind: Kind, source: &Source) -> bool {
        let Ok(stirred) = source.backend.stirred().await else { return false };
        let mut names = std::mem::take(&mut source.following().announced);
        names.extend(stirred);
        names.extend(self.book().moving(kind));
        let looked = self.look_again(kind, names).await;
        if looked {
            self.book().record_available(kind);
        }
        looked
    }

    /// Looks at these instances, by name or id; whether each could be seen, or is known to be gone.
    async fn look_again(&self, kind: Kind, names: impl IntoIterator<Item = String>) -> bool {
        let looks = names.into_iter().map(|name| async move {
            let Ok(source) = self.source(kind) else { return false };
            // A change in flight looks for itself; what happens just after that is looked at after it.
            if self.book().is_busy(kind, &name) {
                return true;
            }
            let begun = self.book().moment();
            match source.backend.observe(&name, Look::Plain).await {
                Ok(observed) => {
                    let instance = observed.instance_id();
                    // What was known by this very id is gone where it is only another one's name by now.
                    if instance.id != name {
                        self.book().forget(&InstanceId { kind, id: name }, begun);
                    }
                    let drift = self.book().record(observed, begun, &self.settings().config);
                    self.drifted(drift);
                    // A change has ended meanwhile, and may have told of what it did not touch as it was before this look.
                    if self.book().knows_newer(&instance, begun) {
                        self.look_soon(&instance);
                    }
                    true
                }
                // What was known by this very id is gone. Of a name it can't be told whose it was, but what stirred can.
                Err(BackendError::NotFound(_)) => {
                    let known = self.book().forget(&InstanceId { kind, id: name }, begun);
                    known || source.is_followed()
                }
                Err(_) => false,
            }
        });
        futures_util::stream::iter(looks).buffer_unordered(LOOKS_AT_ONCE).all(std::future::ready).await
    }

    /// Waits for the next whole multiple of `pause` since the engine was made. What is done now and then by several is so done
    /// together, and wakes an idle host once.
    pub async fn tick(&self, pause: Duration) {
        let (since, pause_ms) = (clock::millis(self.inner.began.elapsed()), clock::millis(pause).max(1));
        let next = Duration::from_millis((since / pause_ms + 1) * pause_ms);
        tokio::time::sleep_until(self.inner.began + next).await;
    }

    fn slot(&self, instance: &InstanceId) -> Arc<Slot> {
        let mut slots = self.inner.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // Slots that nobody holds are dropped when there are many, so that names that come and go don't pile up.
        if slots.len() > 4096 {
            slots.retain(|_, slot| Arc::strong_count(slot) > 1);
        }
        Arc::clone(slots.entry(instance.clone()).or_default())
    }
}

/// A place in an instance's queue.
struct Queued(Arc<Slot>);

impl Queued {
    fn enter(slot: Arc<Slot>, reference: &Ref) -> Result<Self, Problem> {
        let before = slot.queued.fetch_add(1, Ordering::AcqRel);
        let queued = Queued(slot);
        if before >= 2 {
            return Err(Problem::new(
                Code::Busy,
                format!("a change of {reference} is under way and another one waits for it"),
            )
            .hint("try again when they have ended"));
        }
        Ok(queued)
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.0.queued.fetch_sub(1, Ordering::AcqRel);
    }
}

fn not_found(name: &str) -> Problem {
    Problem::new(Code::NotFound, format!("there is no instance {name:?}")).hint("`ctl list` shows those that there are")
}

/// A backend's error with what to do about it.
fn explain(kind: Kind, error: BackendError) -> Problem {
    let hint = match (&error, kind) {
        (BackendError::Unavailable(_), Kind::Vm) => {
            "see `systemctl status libvirtd virtqemud`; other kinds go on working"
        }
        (BackendError::Unavailable(_), _) => "see `systemctl status docker`; other kinds go on working",
        (BackendError::Overloaded(_), _) => {
            "calls to this engine hang; see what it is doing before more is asked of it"
        }
        _ => return error.into(),
    };
    Problem::from(error).hint(hint)
}
