//! The tables, and how an older store becomes one of today.

use rusqlite::Connection;

use super::StoreError;

/// Says in the file itself whose it is: `agtd`.
const APPLICATION: i32 = 0x6167_7464;

/// Each entry makes a store of the version before it one of its own: the first an empty one.
const MIGRATIONS: &[&str] = &[
    "
CREATE TABLE operations (
    id          TEXT PRIMARY KEY,           -- a ULID: sorts by time
    reference   TEXT NOT NULL,              -- kind/name
    uid         INTEGER NOT NULL,           -- who asked
    started_ms  INTEGER NOT NULL,           -- since the Unix epoch
    open        INTEGER NOT NULL,           -- 1 until its outcome is known
    body        TEXT NOT NULL,              -- the operation with its plan and steps, JSON
    reply       TEXT                        -- what its caller was told at its end, JSON
) WITHOUT ROWID;
CREATE INDEX operations_of_instance ON operations (reference, id);
CREATE INDEX operations_open ON operations (id) WHERE open = 1;
CREATE TABLE keys (
    uid         INTEGER NOT NULL,
    key         TEXT NOT NULL,              -- the caller's Idempotency-Key
    request     BLOB NOT NULL,              -- SHA-256 of what it stands for
    operation   TEXT NOT NULL,
    born_ms     INTEGER NOT NULL,
    PRIMARY KEY (uid, key)
) WITHOUT ROWID;
CREATE TABLE instances (
    reference   TEXT PRIMARY KEY,
    stamp       INTEGER NOT NULL,           -- grows with what is known of it
    version     TEXT NOT NULL,
    holds       TEXT NOT NULL,              -- JSON
    observed    TEXT NOT NULL               -- the last observation: what was accepted, JSON
) WITHOUT ROWID;
CREATE TABLE history (
    seq         INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms       INTEGER NOT NULL,
    reference   TEXT NOT NULL,
    uid         INTEGER,
    mark        TEXT NOT NULL UNIQUE,       -- what is told once only: an operation's outcome, a version
    body        TEXT NOT NULL               -- JSON
);
CREATE INDEX history_of_instance ON history (reference, seq);
CREATE TRIGGER history_only_grows BEFORE UPDATE ON history BEGIN SELECT raise(ABORT, 'the history only grows'); END;
",
    "
CREATE TABLE known (
    id          TEXT PRIMARY KEY,           -- kind/id: what stays when the name goes to another one
    stamp       INTEGER NOT NULL,           -- grows with what is known of it
    version     TEXT NOT NULL,
    holds       TEXT NOT NULL,              -- JSON
    observed    TEXT NOT NULL,              -- the last observation: its name, what was accepted, JSON
    unseen      TEXT                        -- what it stays charged: a change of it ended that was not seen yet, JSON
) WITHOUT ROWID;
INSERT OR REPLACE INTO known
    SELECT substr(reference, 1, instr(reference, '/')) || json_extract(observed, '$.id'),
           stamp, version, holds, observed, NULL
    FROM instances ORDER BY stamp;
DROP TABLE instances;
ALTER TABLE known RENAME TO instances;
CREATE TABLE room (                         -- one row, which says nothing: whether there is room for more than a change takes
    id          INTEGER PRIMARY KEY,
    filler      BLOB NOT NULL
);
",
    "ALTER TABLE instances ADD COLUMN loans TEXT NOT NULL DEFAULT '[]';    -- what it has for a time only, JSON",
    "ALTER TABLE instances ADD COLUMN pending TEXT NOT NULL DEFAULT '[]';  -- what changes have left pending, JSON",
];

/// The schema that a store has, without touching it. An empty one is taken for a new one only where `may_be_new`: a store
/// that was there before and is empty now has lost what it knew.
pub(super) fn version(connection: &Connection, may_be_new: bool) -> Result<usize, StoreError> {
    let number = |connection: &Connection, name| connection.pragma_query_value(None, name, |row| row.get::<_, i32>(0));
    let (application, version) = (number(connection, "application_id")?, number(connection, "user_version")?);
    let newest = i32::try_from(MIGRATIONS.len()).unwrap_or(i32::MAX);
    match (application, version) {
        (0, 0) if may_be_new => Ok(0),
        (0, 0) => Err(StoreError::Unreadable("it is empty, and it wasn't before".into())),
        (APPLICATION, version) if version > newest => Err(StoreError::Unreadable(format!(
            "it has schema {version}, written by a newer agentd; this one knows schemas up to {newest}"
        ))),
        (APPLICATION, version) => Ok(usize::try_from(version).unwrap_or(0)),
        _ => Err(StoreError::Unreadable("it is a database, but none of agentd's".into())),
    }
}

/// Brings a store of schema `known` to today's.
pub(super) fn migrate(connection: &mut Connection, known: usize) -> Result<(), StoreError> {
    if known == MIGRATIONS.len() { Ok(()) } else { migrate_to(connection, known, MIGRATIONS.len()) }
}

/// One transaction: a migration that is cut off has not begun.
pub(super) fn migrate_to(connection: &mut Connection, known: usize, version: usize) -> Result<(), StoreError> {
    let transaction = connection.transaction()?;
    for migration in &MIGRATIONS[known..version] {
        transaction.execute_batch(migration)?;
    }
    transaction.pragma_update(None, "application_id", APPLICATION)?;
    transaction.pragma_update(None, "user_version", i32::try_from(version).unwrap_or(i32::MAX))?;
    Ok(transaction.commit()?)
}

/// Writes more than a change takes, and nothing that matters.
pub(super) fn fill_room(connection: &Connection) -> Result<(), StoreError> {
    connection.execute("INSERT OR REPLACE INTO room (id, filler) VALUES (1, randomblob(131072))", [])?;
    Ok(())
}

/// Writes to a store without changing it.
pub(super) fn touch(connection: &Connection) -> Result<(), StoreError> {
    let version: i32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    Ok(connection.pragma_update(None, "user_version", version)?)
}
