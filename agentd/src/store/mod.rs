//! The record: operations, keys, holds, what was accepted, the history. What [`Store::commit`] answers well is on the disk.
//!
//! ```text
//!   commit ─► queue ─► one thread: all that waits in one transaction ─► disk ─► answers
//!   reads  ─► what is under way, from memory ─► the rest, by a connection of their own
//! ```
//!
//! A store that can't be written refuses what is new and keeps what must not be lost in memory, until the disk takes it. One
//! that can't be read is told, never taken for an empty one.

mod db;
mod schema;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use agentd_core::api::{Happening, HistoryEntry, Hold, Loan, OperationView};
use agentd_core::instance::{InstanceId, Observed};
use agentd_core::ledger::Charge;
use agentd_core::operation::{Operation, Pending};
use nix::fcntl::{Flock, FlockArg};
use tokio::sync::{oneshot, watch};

use self::db::{Db, Reader};
pub use self::db::{Entry, Key, Location, Page, Told};
use crate::engine::Failure;
use crate::metrics::Metrics;

/// How often a store in trouble is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// The most entries that are kept in memory for a disk that takes none.
const BACKLOG: usize = 100_000;

/// Why the store gave or took nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Another agentd has it.
    #[error("{0} is in use by another agentd; stop it first, or use another --state-dir")]
    InUse(String),
    /// What is there can't be taken for the record.
    #[error(
        "the record can't be read: {0}; put back the file that was there, or move it away to begin anew, without holds, keys \
         and history"
    )]
    Unreadable(String),
    /// The disk doesn't take it.
    #[error("the record can't be written: {0}")]
    Unwritable(String),
}

impl StoreError {
    /// What came of reading.
    fn unreadable(self) -> Self {
        if let StoreError::Unwritable(why) = self { StoreError::Unreadable(why) } else { self }
    }

    /// The same with the file's path.
    fn of(&self, path: &Path) -> Self {
        let with = |why: &str| format!("{why} ({})", path.display());
        match self {
            StoreError::InUse(state_dir) => StoreError::InUse(state_dir.clone()),
            StoreError::Unreadable(why) => StoreError::Unreadable(with(why)),
            StoreError::Unwritable(why) => StoreError::Unwritable(with(why)),
        }
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
        match error.sqlite_error_code() {
            Some(DatabaseCorrupt | NotADatabase) => StoreError::Unreadable(error.to_string()),
            _ => StoreError::Unwritable(error.to_string()),
        }
    }
}

/// What a change came to, as its caller is told.
pub type Reply = Result<OperationView, Failure>;

/// An operation as it is on record.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// The operation.
    pub operation: Operation,
    /// What its caller was told at its end, or when nobody knew it.
    pub reply: Option<Reply>,
    /// Whether the disk has not taken that yet.
    pub unwritten: bool,
}

/// Operations under way, and those that the disk has not taken yet: newer than what the file has.
type Live = Arc<Mutex<HashMap<String, Recorded>>>;

/// What is kept of an instance.
#[derive(Debug, Clone)]
pub struct Remembered {
    /// Grows with each change of what is known: of two the one with the higher stamp is the newer, whichever is written last.
    pub stamp: u64,
    /// The last observation.
    pub observed: Observed,
    /// Its version.
    pub version: String,
    /// What blocks its changes, but for what a restart finds out by itself.
    pub holds: Vec<Hold>,
    /// What it has for a time only.
    pub loans: Vec<Loan>,
    /// What changes have left pending.
    pub pending: Vec<Pending>,
    /// What it stays charged until it is seen again, where a change of it ended and what it left was not seen.
    pub unseen: Option<Charge>,
}

/// What an earlier life of the daemon left behind.
#[derive(Debug, Default)]
pub struct Loaded {
    /// The operations whose outcome isn't known, the oldest first.
    pub unfinished: Vec<Recorded>,
    /// The instances.
    pub remembered: Vec<Remembered>,
    /// The keys that were used.
    pub keys: Vec<Key>,
}

/// The record; clones share one.
#[derive(Debug, Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    location: Location,
    writer: Access,
    reader: Mutex<Option<Reader>>,
    live: Live,
    /// Why nothing can be written now.
    trouble: Arc<Mutex<Option<StoreError>>>,
    /// Whether it was read: what isn't known to be the record is not read from either.
    loaded: AtomicBool,
    /// Who follows the history.
    told: Arc<watch::Sender<()>>,
    /// How many wait for the disk.
    waiting: AtomicUsize,
    /// Where it is counted what goes on record.
    metrics: OnceLock<Metrics>,
}

#[derive(Debug)]
enum Access {
    /// A thread of its own, so that a slow disk stops nothing else.
    Thread(Mutex<Sender<Work>>),
    /// Within the call: for simulations, which must be the same each time.
    #[cfg(any(test, feature = "fake"))]
    Inline(Box<Mutex<Writer>>),
}

#[derive(Debug)]
enum Work {
    Load { answer: oneshot::Sender<Result<Loaded, StoreError>> },
    Commit { entries: Vec<Entry>, kept: bool, answer: Option<oneshot::Sender<Result<(), StoreError>>> },
    Prune { history_before_ms: u64, keys_before_ms: u64 },
}

impl Store {
    /// The store in a state directory, which nothing has looked at yet: [`Store::load`] comes first.
    pub fn new(state_dir: &Path) -> Self {
        let location = Location { path: state_dir.join("agentd.db"), vfs: None };
        let trouble = Arc::new(Mutex::new(Some(unread())));
        let live = Live::default();
        let writer = Writer::new(location.clone(), Some(state_dir.to_owned()), Arc::clone(&trouble), Arc::clone(&live));
        let told = Arc::clone(&writer.told);
        let (send, receive) = channel();
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || writer.run(&receive))
            .map_or_else(|error| tracing::error!("the record's thread can't be started: {error}"), drop);
        Store::with(location, Access::Thread(Mutex::new(send)), trouble, live, told)
    }

    /// A store without a thread, at a location of the caller's choice. `may_be_new` says whether it may be empty.
    #[cfg(any(test, feature = "fake"))]
    pub fn inline(location: Location, may_be_new: bool) -> Self {
        let trouble = Arc::new(Mutex::new(Some(unread())));
        let live = Live::default();
        let mut writer = Writer::new(location.clone(), None, Arc::clone(&trouble), Arc::clone(&live));
        writer.may_be_new = may_be_new;
        let told = Arc::clone(&writer.told);
        Store::with(location, Access::Inline(Box::new(Mutex::new(writer))), trouble, live, told)
    }

    fn with(
        location: Location,
        writer: Access,
        trouble: Arc<Mutex<Option<StoreError>>>,
        live: Live,
        told: Arc<watch::Sender<()>>,
    ) -> Self {
        let (reader, loaded, waiting) = (Mutex::default(), AtomicBool::new(false), AtomicUsize::new(0));
        let metrics = OnceLock::new();
        Store { shared: Arc::new(Shared { location, writer, reader, live, trouble, loaded, told, waiting, metrics }) }
    }

    /// Opens it and reads what an earlier life left behind. Nothing can be written before that has gone well; may be tried
    /// again.
    pub async fn load(&self) -> Result<Loaded, StoreError> {
        let (answer, loaded) = oneshot::channel();
        self.send(Work::Load { answer });
        let loaded = loaded.await.unwrap_or_else(|_| Err(gone()))?;
        self.shared.loaded.store(true, Ordering::Release);
        let mut live = self.live();
        for recorded in &loaded.unfinished {
            live.insert(recorded.operation.id.clone(), recorded.clone());
        }
        Ok(loaded)
    }

    /// Writes all of it or none, on the disk when it returns.
    pub async fn commit(&self, entries: Vec<Entry>) -> Result<(), StoreError> {
        self.write(entries, false).await
    }

    /// The same for what has happened already: where the disk doesn't take it now, it is told, and kept until it does.
    pub async fn commit_and_keep(&self, entries: Vec<Entry>) -> Result<(), StoreError> {
        self.write(entries, true).await
    }

    /// Writes it with what comes next, within a moment. Nobody waits for it.
    pub fn write_later(&self, entries: Vec<Entry>) {
        if !entries.is_empty() {
            self.send(Work::Commit { entries, kept: true, answer: None });
        }
    }

    async fn write(&self, entries: Vec<Entry>, kept: bool) -> Result<(), StoreError> {
        crate::failpoint::reach("store: before").await;
        let (answer, written) = oneshot::channel();
        let waits = Waits::of(&self.shared.waiting);
        self.send(Work::Commit { entries, kept, answer: Some(answer) });
        let written = written.await.unwrap_or_else(|_| Err(gone()));
        drop(waits);
        crate::failpoint::reach("store: after").await;
        written
    }

    /// Shows an operation as it stands to who reads it now, without waiting for the disk.
    pub fn show(&self, operation: &Operation) {
        if let Some(recorded) = self.live().get_mut(&operation.id) {
            recorded.operation = operation.clone();
        }
    }

    /// Whether another operation of the same instance has no end yet, under whichever name that was begun. One that never
    /// had a plan did nothing to any.
    pub fn has_open_beside(&self, operation: &Operation) -> bool {
        let instance = operation.instance_id();
        let live = self.live();
        let mut others = live.values().map(|recorded| &recorded.operation).filter(|other| other.id != operation.id);
        others.any(|other| other.is_open() && other.instance_id() == instance)
    }

    /// An operation by its id.
    pub async fn operation(&self, id: &str) -> Result<Option<Recorded>, StoreError> {
        let live = self.live().get(id).cloned();
        if live.is_some() {
            return Ok(live);
        }
        let id = id.to_owned();
        self.read(move |reader| reader.operation(&id)).await
    }

    /// The newest operations first: those of one instance, of one caller, from before one of them, where these are named.
    pub async fn newest(
        &self,
        reference: Option<String>,
        uid: Option<u32>,
        before: Option<String>,
        limit: usize,
    ) -> Result<Vec<Operation>, StoreError> {
        let fits = |operation: &Operation| {
            reference.as_deref().is_none_or(|reference| operation.reference.as_str() == reference)
                && uid.is_none_or(|uid| operation.who.uid == uid)
                && before.as_deref().is_none_or(|before| operation.id.as_str() < before)
        };
        let mut newest: Vec<Operation> = {
            let live = self.live();
            live.values().map(|recorded| &recorded.operation).filter(|operation| fits(operation)).cloned().collect()
        };
        let filed = self.read(move |reader| reader.newest(reference.as_deref(), uid, before.as_deref(), limit)).await?;
        newest.extend(filed);
        // What is under way is in the file too, as it was then; a stable sort leaves the newer one first.
        newest.sort_by(|a, b| b.id.cmp(&a.id));
        newest.dedup_by(|a, b| a.id == b.id);
        newest.truncate(limit);
        Ok(newest)
    }

    /// A page of the history, the newest first.
    pub async fn history(&self, page: Page) -> Result<Vec<HistoryEntry>, StoreError> {
        self.read(move |reader| reader.history(&page)).await
    }

    /// What came after this place, the oldest first; states of instances included, which the history leaves out.
    pub async fn after(&self, seq: u64, limit: usize) -> Result<Vec<HistoryEntry>, StoreError> {
        self.read(move |reader| reader.after(seq, limit)).await
    }

    /// The places of the oldest entry that is kept (the next one where none is) and of the newest that there ever was.
    pub async fn ends(&self) -> Result<(u64, u64), StoreError> {
        self.read(Reader::ends).await
    }

    /// Changes whenever something was written to the history.
    pub fn told(&self) -> watch::Receiver<()> {
        self.shared.told.subscribe()
    }

    /// Forgets ended operations and history from before the first, keys from before the second.
    pub fn prune(&self, history_before_ms: u64, keys_before_ms: u64) {
        self.send(Work::Prune { history_before_ms, keys_before_ms });
    }

    /// Why nothing can be written now, where that is so.
    pub fn trouble(&self) -> Option<StoreError> {
        lock(&self.shared.trouble).clone()
    }

    /// From now on what goes on record is counted there, too.
    pub(crate) fn count_with(&self, metrics: Metrics) {
        // The first engine over it is the only one.
        let _ = self.shared.metrics.set(metrics);
    }

    /// How many commits wait for the disk.
    pub(crate) fn waiting(&self) -> usize {
        self.shared.waiting.load(Ordering::Relaxed)
    }

    /// Its size on disk in bytes, with its log; `None` where it isn't there.
    pub(crate) fn size(&self) -> Option<u64> {
        let path = &self.shared.location.path;
        let size = |ending: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(ending);
            std::fs::metadata(name).ok().map(|file| file.len())
        };
        Some(size("")? + size("-wal").unwrap_or(0) + size("-shm").unwrap_or(0))
    }

    async fn read<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Reader) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        if !self.shared.loaded.load(Ordering::Acquire) {
            return Err(self.trouble().unwrap_or_else(unread));
        }
        let shared = Arc::clone(&self.shared);
        let job = move || {
            let mut reader = lock(&shared.reader);
            let open = match reader.take() {
                Some(open) => open,
                None => Reader::open(&shared.location)?,
            };
            let answer = job(&open);
            // One that failed is opened anew the next time.
            if answer.is_ok() {
                *reader = Some(open);
            }
            answer
        };
        let answer = match self.shared.writer {
            Access::Thread(_) => tokio::task::spawn_blocking(job).await.unwrap_or_else(|_| Err(gone())),
            #[cfg(any(test, feature = "fake"))]
            Access::Inline(_) => job(),
        };
        answer.map_err(StoreError::unreadable)
    }

    fn send(&self, work: Work) {
        if let (Work::Commit { entries, kept: true, .. }, Some(metrics)) = (&work, self.shared.metrics.get()) {
            let told =
                entries.iter().filter_map(|entry| if let Entry::History(told) = entry { Some(told) } else { None });
            told.for_each(|told| metrics.recorded(&told.entry));
        }
        match &self.shared.writer {
            // Where the thread is gone the answer's channel is dropped, and that is told.
            Access::Thread(sender) => drop(lock(sender).send(work)),
            #[cfg(any(test, feature = "fake"))]
            Access::Inline(writer) => lock(writer).work(vec![work]),
        }
    }

    fn live(&self) -> MutexGuard<'_, HashMap<String, Recorded>> {
        lock(&self.shared.live)
    }
}

/// One who waits for the disk, also where it is given up.
struct Waits<'a>(&'a AtomicUsize);

impl<'a> Waits<'a> {
    fn of(waiting: &'a AtomicUsize) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Waits(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What there is to say before anything was tried.
fn unread() -> StoreError {
    StoreError::Unreadable("it is being read".into())
}

fn gone() -> StoreError {
    StoreError::Unwritable("its thread has ended: restart agentd".into())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The one who writes.
#[derive(Debug)]
struct Writer {
    location: Location,
    /// Where the lock is; none for a store that nobody shares.
    state_dir: Option<PathBuf>,
    lock: Option<Flock<File>>,
    may_be_new: bool,
    /// Whether it was read: before that nothing may be written, since nobody knows what it would replace.
    loaded: bool,
    db: Option<Db>,
    /// Inode and length of the file when it was last seen to be whole.
    seen: Option<(u64, u64)>,
    backlog: Vec<Entry>,
    trouble: Arc<Mutex<Option<StoreError>>>,
    live: Live,
    told: Arc<watch::Sender<()>>,
}

impl Writer {
    fn new(
        location: Location,
        state_dir: Option<PathBuf>,
        trouble: Arc<Mutex<Option<StoreError>>>,
        live: Live,
    ) -> Self {
        Writer {
            location,
            state_dir,
            lock: None,
            may_be_new: false,
            loaded: false,
            db: None,
            seen: None,
            backlog: Vec::new(),
            trouble,
            live,
            told: Arc::default(),
        }
    }

    fn run(mut self, work: &Receiver<Work>) {
        loop {
            let well = lock(&self.trouble).is_none() || !self.loaded;
            let first = if self.backlog.is_empty() && well {
                work.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                work.recv_timeout(RETRY)
            };
            match first {
                // All that waits shares one transaction, and one sync of the disk.
                Ok(first) => self.work(std::iter::once(first).chain(work.try_iter()).collect()),
                Err(RecvTimeoutError::Timeout) => self.work(Vec::new()),
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn work(&mut self, work: Vec<Work>) {
        let mut commits = Vec::new();
        let mut prunes = Vec::new();
        for work in work {
            match work {
                Work::Load { answer } => {
                    let loaded = self.load();
                    self.tell(loaded.as_ref().err());
                    // Nobody may be waiting any more.
                    let _ = answer.send(loaded);
                }
                Work::Commit { entries, kept, answer } => commits.push((entries, kept, answer)),
                Work::Prune { history_before_ms, keys_before_ms } => prunes.push((history_before_ms, keys_before_ms)),
            }
        }
        // One in trouble is tried also where there is nothing to write, to hear when it is out of it.
        let in_trouble = self.loaded && lock(&self.trouble).is_some();
        if !commits.is_empty() || !self.backlog.is_empty() || in_trouble {
            let entries = self.backlog.iter().chain(commits.iter().flat_map(|(entries, ..)| entries));
            let written = unchanged(&self.location, &mut self.seen)
                .and_then(|()| write(&mut self.db, self.loaded, &self.location, entries, in_trouble));
            if self.loaded {
                self.tell(written.as_ref().err());
            }
            let history = |entry: &Entry| matches!(entry, Entry::History(_));
            let told = commits.iter().any(|(entries, ..)| entries.iter().any(history)) || !self.backlog.is_empty();
            if told && written.is_ok() {
                self.told.send_replace(());
            }
            if written.is_ok() && !self.backlog.is_empty() {
                self.backlog.clear();
                lock(&self.live).retain(|_, recorded| recorded.operation.is_open());
            }
            for (entries, kept, answer) in commits {
                self.show(&entries, kept, written.is_err());
                if written.is_err() && kept {
                    self.backlog.extend(entries);
                }
                if let Some(answer) = answer {
                    let _ = answer.send(written.clone());
                }
            }
            shorten(&mut self.backlog, BACKLOG);
        }
        for (history_before_ms, keys_before_ms) in prunes {
            if let Some(db) = &mut self.db
                && let Err(error) = db.prune(history_before_ms, keys_before_ms)
            {
                tracing::warn!("what is too old could not be removed from the record: {error}");
            }
        }
    }

    /// What reads find of operations before they find the file.
    fn show(&self, entries: &[Entry], kept: bool, unwritten: bool) {
        let mut live = lock(&self.live);
        for entry in entries {
            match entry {
                Entry::Operation(operation, _) if !unwritten && !operation.is_open() => {
                    drop(live.remove(&operation.id))
                }
                Entry::Operation(operation, reply) if !unwritten || kept => {
                    let told = live.remove(&operation.id).and_then(|recorded| recorded.reply);
                    let (operation, reply) = (*operation.clone(), reply.as_deref().cloned().or(told));
                    live.insert(operation.id.clone(), Recorded { operation, reply, unwritten });
                }
                _ => {}
            }
        }
    }

    /// Says when the store gets into trouble and when it is out of it, once each.
    fn tell(&self, error: Option<&StoreError>) {
        let mut trouble = lock(&self.trouble);
        let now = error.map(|error| error.of(&self.location.path));
        match (&*trouble, &now) {
            (_, Some(now)) if trouble.as_ref() != Some(now) => {
                tracing::error!("{now}: changes are refused until that is put right; reads go on");
            }
            (Some(before), None) if self.loaded && *before != unread() => {
                tracing::info!("the record can be written; before, {before}")
            }
            _ => {}
        }
        *trouble = now;
    }

    fn load(&mut self) -> Result<Loaded, StoreError> {
        if let Some(state_dir) = &self.state_dir {
            if self.lock.is_none() {
                self.lock = Some(take_lock(state_dir)?);
            }
            let lock = self.lock.as_deref();
            // The lock's file says whether there ever was a store here: one that has vanished since is not a new one.
            self.may_be_new = lock.and_then(|file| file.metadata().ok()).is_some_and(|found| found.len() == 0);
            if !self.may_be_new && !self.location.path.exists() {
                return Err(StoreError::Unreadable(format!(
                    "it is gone; put it back, or remove {} to begin with an empty one",
                    state_dir.join(LOCK).display()
                )));
            }
            // SQLite would take it for a new one, and remove the log beside it, which may hold what is missing.
            if !self.may_be_new && self.location.path.metadata().is_ok_and(|found| found.len() == 0) {
                return Err(StoreError::Unreadable("it is empty, and it wasn't before".into()));
            }
            make_private(&self.location.path)?;
        }
        let db = Db::open(&self.location, self.may_be_new, true)?;
        let loaded = db.load().map_err(StoreError::unreadable)?;
        if let Some(lock) = &mut self.lock
            && self.may_be_new
        {
            lock.write_all(b"1\n").and_then(|()| lock.sync_all()).map_err(unwritable)?;
        }
        (self.db, self.loaded, self.may_be_new) = (Some(db), true, false);
        Ok(loaded)
    }
}

/// Keeps a backlog to a length: of what is known of an instance only the newest counts, and after that the oldest drift goes.
/// How a change ended never does; there are only as many as were under way when the disk took no more.
fn shorten(backlog: &mut Vec<Entry>, most: usize) {
    if backlog.len() <= most {
        return;
    }
    let row = |entry: &Entry| match entry {
        Entry::Instance(remembered) => Some((remembered.observed.instance_id(), remembered.stamp)),
        Entry::Gone(instance, stamp) => Some((instance.clone(), *stamp)),
        _ => None,
    };
    let mut newest: HashMap<InstanceId, u64> = HashMap::new();
    for (instance, stamp) in backlog.iter().filter_map(row) {
        newest.entry(instance).and_modify(|newest| *newest = stamp.max(*newest)).or_insert(stamp);
    }
    backlog.retain(|entry| row(entry).is_none_or(|(instance, stamp)| newest.get(&instance) == Some(&stamp)));
    let mut over = backlog.len().saturating_sub(most);
    let dropped = over;
    backlog.retain(|entry| {
        let may_go = |told: &Told| matches!(told.entry.happening, Happening::Drift | Happening::State);
        let goes = over > 0 && matches!(entry, Entry::History(told) if may_go(told));
        over -= usize::from(goes);
        !goes
    });
    if dropped > over {
        tracing::error!("drift that no disk took for too long is left out of the history, {} entries", dropped - over);
    }
}

/// Whether the file is still the one that was read: SQLite would go on with one that somebody has removed, replaced or cut,
/// and what it then wrote could not be read after a restart. It only ever grows.
fn unchanged(location: &Location, seen: &mut Option<(u64, u64)>) -> Result<(), StoreError> {
    if location.vfs.is_some() {
        return Ok(());
    }
    let found = std::fs::metadata(&location.path).map_err(unwritable)?;
    let now = (found.ino(), found.len());
    match seen {
        Some((inode, length)) if (*inode, *length) != (now.0, (*length).min(now.1)) => Err(StoreError::Unreadable(
            "it was replaced or cut while agentd ran; put back the one that was there, or restart agentd to read this one".into(),
        )),
        _ => {
            *seen = Some(now);
            Ok(())
        }
    }
}

/// Writes all of it, or none.
fn write<'a>(
    db: &mut Option<Db>,
    loaded: bool,
    location: &Location,
    entries: impl Iterator<Item = &'a Entry>,
    doubtful: bool,
) -> Result<(), StoreError> {
    if !loaded {
        return Err(StoreError::Unwritable("it could not be read when agentd started".into()));
    }
    // A connection that failed stays: it knows that what a failed sync left in the log does not count, and writes over it. A
    // new one would take that for committed, and what the kernel has given up on would be missing after a power cut.
    match db {
        Some(db) => db.commit(entries, doubtful),
        None => db.insert(Db::open(location, false, false)?).commit(entries, doubtful),
    }
}

/// Beside the store: who has it, and whether there ever was one.
const LOCK: &str = "lock";

/// One agentd a state directory: two would promise the same capacity twice.
fn take_lock(state_dir: &Path) -> Result<Flock<File>, StoreError> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state_dir).map_err(unwritable)?;
    let path = state_dir.join(LOCK);
    let file = File::options().read(true).append(true).create(true).mode(0o600).open(&path).map_err(unwritable)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| StoreError::InUse(state_dir.display().to_string()))
}

/// Makes the file, so that SQLite doesn't make it for all to read.
fn make_private(path: &Path) -> Result<(), StoreError> {
    File::options().append(true).create(true).mode(0o600).open(path).map(drop).map_err(unwritable)
}

fn unwritable(error: std::io::Error) -> StoreError {
    StoreError::Unwritable(error.to_string())
}
