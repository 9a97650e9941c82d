//! The store's file: all SQL is here, all of it synchronous. Knows no threads and no waiting.

use std::path::PathBuf;

use agentd_core::api::HistoryEntry;
use agentd_core::instance::InstanceId;
use agentd_core::operation::Operation;
use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Loaded, Recorded, Remembered, Reply, StoreError, schema};

/// Where the store is.
#[derive(Debug, Clone)]
pub struct Location {
    /// Its file.
    pub path: PathBuf,
    /// The SQLite VFS to go through; the system's where absent.
    pub vfs: Option<String>,
}

/// An Idempotency-Key with what it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Whose.
    pub uid: u32,
    /// The key.
    pub key: String,
    /// SHA-256 of the request.
    pub request: Vec<u8>,
    /// The operation that it began.
    pub operation: String,
    /// Milliseconds since the Unix epoch.
    pub born_ms: u64,
}

/// One thing to write. Writing one twice is writing it once: nobody knows of a commit that failed whether it did.
#[derive(Debug, Clone)]
pub enum Entry {
    /// An operation as it stands, with the reply once it has one.
    Operation(Box<Operation>, Option<Box<Reply>>),
    /// An operation that has no plan yet, unless it is known already.
    Queued(Box<Operation>),
    /// A key that was used.
    Key(Key),
    /// The key of this operation was used for nothing.
    ForgetKey(String),
    /// What is known of an instance.
    Instance(Box<Remembered>),
    /// An instance that is gone, and the stamp of that.
    Gone(InstanceId, u64),
    /// Something for the history.
    History(Box<Told>),
}

/// Something for the history.
#[derive(Debug, Clone)]
pub struct Told {
    /// What happened; its `seq` and `at` are not looked at.
    pub entry: HistoryEntry,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// What no two entries share.
    pub mark: String,
}

/// A page of the history.
#[derive(Debug, Clone, Default)]
pub struct Page {
    /// Of one instance.
    pub reference: Option<String>,
    /// Of one caller.
    pub uid: Option<u32>,
    /// Before this place.
    pub before: Option<u64>,
    /// At most this many.
    pub limit: usize,
    /// With the states of instances, too.
    pub states: bool,
}

/// After how many pages of the log it is copied into the file: 32 MB.
const CHECKPOINT: i32 = 8000;
/// How much of its file a connection keeps in memory. What is written is small and mostly at the ends of its trees, so that
/// SQLite's own 2 MiB would mostly be what an idle daemon holds on to.
const CACHE_KIB: i64 = 512;
/// The most states of instances that are kept.
const MOST_STATES: i64 = 200_000;

/// An open store.
#[derive(Debug)]
pub(super) struct Db {
    connection: Connection,
}

impl Db {
    /// Opens the store for writing, brings it to today's schema, and looks at every page of it where `whole`.
    pub(super) fn open(location: &Location, may_be_new: bool, whole: bool) -> Result<Self, StoreError> {
        let create = if may_be_new { OpenFlags::SQLITE_OPEN_CREATE } else { OpenFlags::empty() };
        let mut connection = connect(location, OpenFlags::SQLITE_OPEN_READ_WRITE | create)?;
        let version = schema::version(&connection, may_be_new)?;
        // What is acknowledged is on the disk: FULL syncs the log at each commit. EXTRA is that, and syncs the folder when the
        // journal of a store that is just being made is deleted: come back after a power cut it would undo the store.
        connection.pragma_update(None, "synchronous", "EXTRA")?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        // A change is some 20 pages of the log. At SQLite's own 1000, two changes in a hundred wait while it is copied into the file.
        connection.pragma_update(None, "wal_autocheckpoint", CHECKPOINT)?;
        schema::migrate(&mut connection, version)?;
        if whole {
            let found: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
            if found != "ok" {
                // SQLite's words come in lines.
                let found = found.lines().collect::<Vec<_>>().join(" ");
                return Err(StoreError::Unreadable(format!("it is damaged: {found}")));
            }
        }
        if whole {
            // What an earlier life had in the log may be in the kernel's memory only, where a sync of it failed before it
            // was killed. Copied into the file it is synced anew; and with a new beginning of the log on the disk, nothing
            // of the old one counts any more.
            connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
            schema::touch(&connection)?;
        }
        Ok(Db { connection })
    }

    /// Writes all entries or none of them; what it wrote is on the disk when it returns. `doubtful`: only where the disk has
    /// room for more than that, so that what comes next is not refused again.
    pub(super) fn commit<'a>(
        &mut self,
        entries: impl Iterator<Item = &'a Entry>,
        doubtful: bool,
    ) -> Result<(), StoreError> {
        let transaction = self.connection.transaction()?;
        if doubtful {
            schema::fill_room(&transaction)?;
        }
        for entry in entries {
            write(&transaction, entry)?;
        }
        Ok(transaction.commit()?)
    }

    /// Everything that a daemon must know when it starts.
    pub(super) fn load(&self) -> Result<Loaded, StoreError> {
        let mut statement = self.connection.prepare("SELECT body, reply FROM operations WHERE open = 1 ORDER BY id")?;
        let mut open = statement.query([])?;
        let mut unfinished = Vec::new();
        while let Some(row) = open.next()? {
            unfinished.push(recorded(&row.get::<_, String>(0)?, row.get::<_, Option<String>>(1)?)?);
        }
        let mut statement =
            self.connection.prepare("SELECT stamp, version, holds, observed, unseen, loans, pending FROM instances")?;
        let mut instances = statement.query([])?;
        let mut remembered = Vec::new();
        while let Some(row) = instances.next()? {
            remembered.push(Remembered {
                stamp: row.get::<_, i64>(0)?.unsigned_abs(),
                version: row.get(1)?,
                holds: parse(&row.get::<_, String>(2)?)?,
                observed: parse(&row.get::<_, String>(3)?)?,
                unseen: row.get::<_, Option<String>>(4)?.map(|charge| parse(&charge)).transpose()?,
                loans: parse(&row.get::<_, String>(5)?)?,
                pending: parse(&row.get::<_, String>(6)?)?,
            });
        }
        let mut statement = self.connection.prepare("SELECT uid, key, request, operation, born_ms FROM keys")?;
        let keys = statement.query_map([], |row| {
            Ok(Key {
                uid: row.get(0)?,
                key: row.get(1)?,
                request: row.get(2)?,
                operation: row.get(3)?,
                born_ms: row.get::<_, i64>(4)?.unsigned_abs(),
            })
        })?;
        let keys = keys.collect::<Result<_, _>>()?;
        Ok(Loaded { unfinished, remembered, keys })
    }

    /// Forgets ended operations and history from before the first, keys from before the second.
    pub(super) fn prune(&mut self, history_before_ms: u64, keys_before_ms: u64) -> Result<(), StoreError> {
        let transaction = self.connection.transaction()?;
        let (history, keys) = (signed(history_before_ms), signed(keys_before_ms));
        transaction.execute("DELETE FROM keys WHERE born_ms < ?1", [keys])?;
        transaction.execute(
            "DELETE FROM operations WHERE open = 0 AND started_ms < ?1 AND id NOT IN (SELECT operation FROM keys)",
            [history],
        )?;
        transaction.execute("DELETE FROM history WHERE at_ms < ?1", [history])?;
        // A container that crashes all day would fill the disk.
        transaction.execute(
            "DELETE FROM history WHERE mark GLOB 'state/*' AND seq <=
                 (SELECT seq FROM history WHERE mark GLOB 'state/*' ORDER BY seq DESC LIMIT 1 OFFSET ?1)",
            [MOST_STATES],
        )?;
        Ok(transaction.commit()?)
    }
}

/// A connection for reading beside the one that writes: in WAL mode neither waits for the other.
#[derive(Debug)]
pub(super) struct Reader {
    connection: Connection,
}

impl Reader {
    pub(super) fn open(location: &Location) -> Result<Self, StoreError> {
        let connection = connect(location, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        connection.pragma_update(None, "query_only", true)?;
        Ok(Reader { connection })
    }

    pub(super) fn operation(&self, id: &str) -> Result<Option<Recorded>, StoreError> {
        let mut statement = self.connection.prepare_cached("SELECT body, reply FROM operations WHERE id = ?1")?;
        let row = statement
            .query_row([id], |row| Ok((row.get::<_, String>(0)?, row.get::<_, Option<String>>(1)?)))
            .optional()?;
        row.map(|(body, reply)| recorded(&body, reply)).transpose()
    }

    /// The newest operations first: those of one instance, of one caller, from before one of them, where these are named.
    pub(super) fn newest(
        &self,
        reference: Option<&str>,
        uid: Option<u32>,
        before: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Operation>, StoreError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT body FROM operations
             WHERE (?1 IS NULL OR reference = ?1) AND (?2 IS NULL OR uid = ?2) AND (?3 IS NULL OR id < ?3)
             ORDER BY id DESC LIMIT ?4",
        )?;
        let rows = statement.query_map(params![reference, uid, before, count(limit)], |row| row.get::<_, String>(0))?;
        rows.map(|body| parse(&body?)).collect()
    }

    pub(super) fn history(&self, page: &Page) -> Result<Vec<HistoryEntry>, StoreError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT seq, at_ms, body FROM history
             WHERE (?1 IS NULL OR reference = ?1) AND (?2 IS NULL OR uid = ?2) AND (?3 IS NULL OR seq < ?3)
             AND (?5 OR mark NOT GLOB 'state/*') ORDER BY seq DESC LIMIT ?4",
        )?;
        let before = page.before.map(signed);
        let rows = statement
            .query_map(params![page.reference, page.uid, before, count(page.limit), page.states], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, row.get::<_, String>(2)?))
            })?;
        rows.map(|row| entry(row?)).collect()
    }

    /// What came after this place, the oldest first.
    pub(super) fn after(&self, seq: u64, limit: usize) -> Result<Vec<HistoryEntry>, StoreError> {
        let mut statement = self
            .connection
            .prepare_cached("SELECT seq, at_ms, body FROM history WHERE seq > ?1 ORDER BY seq LIMIT ?2")?;
        let rows = statement.query_map(params![signed(seq), count(limit)], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?, row.get::<_, String>(2)?))
        })?;
        rows.map(|row| entry(row?)).collect()
    }

    /// The places of the oldest entry that is kept and of the newest that there ever was, pruned ones included.
    pub(super) fn ends(&self) -> Result<(u64, u64), StoreError> {
        let place = |sql| self.connection.query_row(sql, [], |row| row.get::<_, Option<i64>>(0)).optional();
        let first = place("SELECT min(seq) FROM history")?.flatten();
        let last = place("SELECT seq FROM sqlite_sequence WHERE name = 'history'")?.flatten();
        let last = last.unwrap_or(0).unsigned_abs();
        Ok((first.map_or(last + 1, i64::unsigned_abs), last))
    }
}

/// A row of the history.
fn entry((seq, at_ms, body): (i64, i64, String)) -> Result<HistoryEntry, StoreError> {
    let entry: HistoryEntry = parse(&body)?;
    Ok(HistoryEntry { seq: seq.unsigned_abs(), at: rfc3339(at_ms), ..entry })
}

fn connect(location: &Location, flags: OpenFlags) -> Result<Connection, StoreError> {
    let flags = flags | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = match &location.vfs {
        Some(vfs) => Connection::open_with_flags_and_vfs(&location.path, flags, vfs.as_str()),
        None => Connection::open_with_flags(&location.path, flags),
    }?;
    connection.busy_timeout(std::time::Duration::from_secs(5))?;
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    Ok(connection)
}

fn write(transaction: &Transaction<'_>, entry: &Entry) -> Result<(), StoreError> {
    match entry {
        Entry::Operation(operation, reply) => {
            let reply = reply.as_ref().map(text).transpose()?;
            transaction
                .prepare_cached(
                    "INSERT INTO operations (id, reference, uid, started_ms, open, body, reply)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
                     ON CONFLICT (id) DO UPDATE SET
                         reference = excluded.reference, open = excluded.open, body = excluded.body,
                         reply = coalesce(excluded.reply, reply)",
                )?
                .execute(params![
                    operation.id,
                    operation.reference.as_str(),
                    operation.who.uid,
                    signed(operation.started_ms),
                    operation.is_open(),
                    text(operation)?,
                    reply
                ])?;
        }
        Entry::Queued(operation) => {
            transaction
                .prepare_cached(
                    "INSERT INTO operations (id, reference, uid, started_ms, open, body)
                     VALUES (?1, ?2, ?3, ?4, 1, ?5) ON CONFLICT (id) DO NOTHING",
                )?
                .execute(params![
                    operation.id,
                    operation.reference.as_str(),
                    operation.who.uid,
                    signed(operation.started_ms),
                    text(operation)?
                ])?;
        }
        Entry::Key(key) => {
            transaction
                .prepare_cached(
                    "INSERT OR REPLACE INTO keys (uid, key, request, operation, born_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
                )?
                .execute(params![key.uid, key.key, key.request, key.operation, signed(key.born_ms)])?;
        }
        Entry::ForgetKey(operation) => {
            transaction.prepare_cached("DELETE FROM keys WHERE operation = ?1")?.execute([operation])?;
        }
        Entry::Instance(instance) => {
            transaction
                .prepare_cached(
                    "INSERT INTO instances (id, stamp, version, holds, observed, unseen, loans, pending)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)
                     ON CONFLICT (id) DO UPDATE SET
                         stamp = excluded.stamp, version = excluded.version, holds = excluded.holds,
                         observed = excluded.observed, unseen = excluded.unseen, loans = excluded.loans,
                         pending = excluded.pending
                     WHERE excluded.stamp > stamp",
                )?
                .execute(params![
                    instance.observed.instance_id().to_string(),
                    signed(instance.stamp),
                    instance.version,
                    text(&instance.holds)?,
                    text(&instance.observed)?,
                    instance.unseen.as_ref().map(text).transpose()?,
                    text(&instance.loans)?,
                    text(&instance.pending)?
                ])?;
        }
        Entry::Gone(instance, stamp) => {
            transaction
                .prepare_cached("DELETE FROM instances WHERE id = ?1 AND stamp < ?2")?
                .execute(params![instance.to_string(), signed(*stamp)])?;
        }
        Entry::History(told) => {
            let Told { entry, at_ms, mark } = &**told;
            transaction
                .prepare_cached(
                    "INSERT INTO history (at_ms, reference, uid, mark, body) VALUES (?1, ?2, ?3, ?4, ?5)
                     ON CONFLICT (mark) DO NOTHING",
                )?
                .execute(params![
                    signed(*at_ms),
                    entry.reference,
                    entry.who.as_ref().map(|who| who.uid),
                    mark,
                    text(entry)?
                ])?;
        }
    }
    Ok(())
}

fn recorded(body: &str, reply: Option<String>) -> Result<Recorded, StoreError> {
    let reply = reply.map(|reply| parse(&reply)).transpose()?;
    Ok(Recorded { operation: parse(body)?, reply, unwritten: false })
}

fn text(value: &impl Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|error| StoreError::Unwritable(error.to_string()))
}

fn parse<T: DeserializeOwned>(text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(|error| StoreError::Unreadable(format!("an entry can't be understood: {error}")))
}

/// SQLite's integers are signed.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn count(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

fn rfc3339(at_ms: i64) -> String {
    jiff::Timestamp::from_millisecond(at_ms).map_or_else(|_| String::new(), |at| format!("{at:.3}"))
}
