//! The disk under SQLite: what a database keeps over crashes, and that the disk really loses what it may.

use std::collections::BTreeMap;

use rusqlite::{Connection, Error, ErrorCode, OpenFlags, Result, TransactionBehavior};

use super::{Disk, Faults};
use crate::sim::rng::Rng;

const PATH: &str = "/agentd.db";
const WAL: &str = "/agentd.db-wal";

fn open(disk: &Disk) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags_and_vfs(PATH, flags, disk.vfs_name())?;
    db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 7;")?;
    db.execute_batch("CREATE TABLE IF NOT EXISTS record (change INTEGER, part INTEGER, text TEXT)")?;
    Ok(db)
}

/// One transaction of several rows, some longer than a page.
fn commit(db: &mut Connection, change: u32) -> Result<()> {
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let parts = parts(change);
    for part in 0..parts {
        let text = "x".repeat(((change * 37 + part * 991) % 6000) as usize);
        transaction.execute("INSERT INTO record VALUES (?1, ?2, ?3)", (change, part, text))?;
    }
    transaction.commit()
}

fn parts(change: u32) -> u32 {
    change % 4 + 1
}

/// How many rows each change has; panics unless the database is sound and each change whole or absent.
fn changes(db: &Connection) -> BTreeMap<u32, u32> {
    let verdict: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(verdict, "ok");
    let mut rows = db.prepare("SELECT change, count(*) FROM record GROUP BY change").unwrap();
    let found: BTreeMap<u32, u32> =
        rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap().collect::<Result<_>>().unwrap();
    for (change, rows) in &found {
        assert_eq!(*rows, parts(*change), "change {change} is half there");
    }
    found
}

fn count(db: &Connection) -> u32 {
    changes(db).len().try_into().unwrap()
}

fn code(error: &Error) -> ErrorCode {
    error.sqlite_error_code().unwrap()
}

/// Commits from `first` on until the power goes; how many were acknowledged.
fn commit_until_down(disk: &Disk, first: u32) -> u32 {
    let mut acknowledged = first;
    let Ok(mut db) = open(disk) else { return first };
    while commit(&mut db, acknowledged).is_ok() {
        acknowledged += 1;
    }
    assert!(disk.is_down());
    acknowledged
}

/// Crashes in a row at random calls; after each the acknowledged changes must be there, and no more than one other.
/// Gives back how many acknowledged changes were lost, if `strict` doesn't say that there must be none.
fn crash_often(seed: u64, sector: usize, faults: Faults, strict: bool) -> (u32, u64) {
    let mut chance = Rng::new(seed);
    let disk = Disk::new(seed);
    disk.set_sector_size(sector);
    disk.set_powersafe_overwrite(!seed.is_multiple_of(3));
    disk.set_faults(faults);
    let mut next = 0;
    for _ in 0..4 {
        disk.crash_at(disk.counters().calls() + 1 + chance.below(120));
        let acknowledged = commit_until_down(&disk, next);
        disk.restart();
        let found = match open(&disk) {
            Ok(db) if strict => count(&db),
            Ok(db) => {
                db.query_row("SELECT count(DISTINCT change) FROM record", [], |row| row.get(0)).unwrap_or_default()
            }
            Err(error) if strict => panic!("seed {seed}: {error}"),
            Err(_) => 0,
        };
        if found < acknowledged {
            assert!(!strict, "seed {seed}: {found} of {acknowledged} changes are left");
            return (acknowledged - found, disk.trace());
        }
        assert!(found <= acknowledged + 1, "seed {seed}: {found} changes, {acknowledged} acknowledged");
        next = found;
    }
    (0, disk.trace())
}

#[test]
fn what_was_acknowledged_survives_every_crash_and_the_rest_is_whole_or_absent() {
    for seed in 0..350 {
        let sector = if seed % 2 == 0 { 512 } else { 4096 };
        crash_often(seed, sector, Faults::default(), true);
    }
}

#[test]
fn a_sync_that_is_ignored_loses_what_was_acknowledged() {
    let faults = Faults { ignore_sync: true, ..Faults::default() };
    let losers = (0..40).filter(|seed| crash_often(*seed, 512, faults, false).0 > 0).count();
    assert!(losers > 10, "{losers} of 40 disks lost something");
}

#[test]
fn a_connection_that_does_not_sync_loses_what_was_acknowledged() {
    let lost = (0..40).filter(|seed| {
        let disk = Disk::new(*seed);
        let mut db = open(&disk).unwrap();
        db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE); PRAGMA synchronous = OFF").unwrap();
        commit(&mut db, 0).unwrap();
        disk.crash();
        drop(db);
        changes(&open(&disk).unwrap()).is_empty()
    });
    let lost = lost.count();
    assert!((1..40).contains(&lost), "{lost} of 40: chance has a say");
}

#[test]
fn a_kill_loses_nothing_and_its_handles_are_dead() {
    for seed in 0..50 {
        let disk = Disk::new(seed.into());
        disk.set_faults(Faults { ignore_sync: true, ..Faults::default() });
        let mut db = open(&disk).unwrap();
        for change in 0..seed {
            commit(&mut db, change).unwrap();
        }
        db.execute_batch("BEGIN IMMEDIATE; INSERT INTO record VALUES (1, 1, 'half a change')").unwrap();
        disk.kill();
        assert_eq!(code(&db.execute_batch("COMMIT").unwrap_err()), ErrorCode::SystemIoFailure);
        // The dead one is still open: neither its locks nor its shared memory are in the way.
        let mut next = open(&disk).unwrap();
        assert_eq!(count(&next), seed);
        commit(&mut next, seed).unwrap();
        drop((db, next));
        assert_eq!(disk.bytes(WAL), None, "the last connection took the database for itself and tidied up");
        assert_eq!(count(&open(&disk).unwrap()), seed + 1);
    }
}

#[test]
fn a_kill_within_a_call_loses_nothing_that_was_acknowledged() {
    for call in 1..150 {
        let disk = Disk::new(call);
        disk.crash_at(call);
        let acknowledged = commit_until_down(&disk, 0);
        disk.kill();
        let found = count(&open(&disk).unwrap());
        assert!((acknowledged..=acknowledged + 1).contains(&found), "{found} of {acknowledged} after call {call}");
    }
}

#[test]
fn a_reader_sees_the_state_in_which_it_began() {
    let disk = Disk::new(1);
    let (mut writer, reader) = (open(&disk).unwrap(), open(&disk).unwrap());
    let seen = || reader.query_row("SELECT count(*) FROM record", [], |row| row.get::<_, u32>(0)).unwrap();
    commit(&mut writer, 0).unwrap();
    reader.execute_batch("BEGIN").unwrap();
    assert_eq!(seen(), parts(0));
    for change in 1..20 {
        commit(&mut writer, change).unwrap();
        assert_eq!(seen(), parts(0));
    }
    reader.execute_batch("COMMIT").unwrap();
    assert_eq!(seen(), (0..20).map(parts).sum::<u32>());

    writer.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert_eq!(code(&reader.execute_batch("BEGIN IMMEDIATE").unwrap_err()), ErrorCode::DatabaseBusy);
}

#[test]
fn threads_that_read_and_write_see_whole_changes() {
    let disk = Disk::new(1);
    let mut writer = open(&disk).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let reader = open(&disk).unwrap();
            let mut last = 0;
            while last < 300 {
                // A busy answer is no fault: the disk's sleeps don't wait.
                let rows = reader.prepare("SELECT change, count(*) FROM record GROUP BY change ORDER BY change");
                let Ok(mut rows) = rows else { continue };
                let found = rows.query_map([], |row| Ok((row.get::<_, u32>(0)?, row.get::<_, u32>(1)?)));
                let Ok(found) = found.and_then(Iterator::collect::<Result<Vec<_>>>) else { continue };
                assert!(found.iter().all(|(change, rows)| *rows == parts(*change)));
                assert!(found.len() >= last, "time goes on");
                last = found.len();
            }
        });
        for change in 0..300 {
            while commit(&mut writer, change).is_err() {}
        }
    });
}

#[test]
fn the_rollback_journal_locks_work_without_shared_memory() {
    let disk = Disk::new(1);
    let (mut one, other) = (open(&disk).unwrap(), open(&disk).unwrap());
    drop(other);
    one.execute_batch("PRAGMA journal_mode = DELETE").unwrap();
    commit(&mut one, 0).unwrap();
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE;
    let other = Connection::open_with_flags_and_vfs(PATH, flags, disk.vfs_name()).unwrap();
    one.execute_batch("BEGIN IMMEDIATE; DELETE FROM record").unwrap();
    assert_eq!(changes(&other).len(), 1);
    assert_eq!(code(&other.execute_batch("BEGIN IMMEDIATE").unwrap_err()), ErrorCode::DatabaseBusy);
    other.execute_batch("BEGIN; SELECT * FROM record").unwrap();
    assert_eq!(code(&one.execute_batch("COMMIT").unwrap_err()), ErrorCode::DatabaseBusy);
    other.execute_batch("COMMIT").unwrap();
    one.execute_batch("COMMIT").unwrap();
    assert!(changes(&other).is_empty());
}

#[test]
fn a_full_disk_says_so_and_keeps_what_it_has() {
    for room in 0..40 {
        let disk = Disk::new(room);
        let mut db = open(&disk).unwrap();
        commit(&mut db, 0).unwrap();
        disk.set_full(true);
        let used: usize = disk.files().iter().map(|(_, len)| len).sum();
        disk.set_capacity(Some(used as u64 + room * 1000));
        let mut acknowledged = 1;
        let error = loop {
            assert!(acknowledged < 100, "the disk has no end");
            match commit(&mut db, acknowledged) {
                Ok(()) => acknowledged += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(code(&error), ErrorCode::DiskFull);
        assert_eq!(count(&db), acknowledged);
        disk.crash();
        drop(db);
        disk.set_full(false);
        let mut db = open(&disk).unwrap();
        // The refused change was rolled back, but all of it may have reached the WAL before the room ran out.
        let found = count(&db);
        assert!((acknowledged..=acknowledged + 1).contains(&found), "{found} of {acknowledged}");
        commit(&mut db, found).unwrap();
    }
}

#[test]
fn a_failed_sync_is_told_and_what_it_dropped_no_later_sync_saves() {
    let lost = (0..60).filter(|seed| {
        let disk = Disk::new(*seed);
        // Without this promise the padding of an acknowledged commit is left to the next sync, and if that one fails,
        // later commits are lost behind it.
        disk.set_powersafe_overwrite(true);
        let mut db = open(&disk).unwrap();
        commit(&mut db, 0).unwrap();
        disk.set_faults(Faults { syncs: 1, ..Faults::default() });
        assert_eq!(code(&commit(&mut db, 1).unwrap_err()), ErrorCode::SystemIoFailure);
        assert_eq!(disk.faults(), Faults::default(), "the fault is used up");
        // SQLite writes the same frames again for the next change, so that its acknowledgement holds.
        commit(&mut db, 2).unwrap();
        disk.crash();
        drop(db);
        let found: Vec<_> = changes(&open(&disk).unwrap()).into_keys().collect();
        assert_eq!(found, [0, 2], "seed {seed}");

        let mut model = super::Model::new(*seed);
        let file = model.open(Some("/f"), true, false).unwrap();
        model.write(file, 0, &[1; 512]).unwrap();
        model.sync(file).unwrap();
        model.write(file, 0, &[2; 512]).unwrap();
        model.faults.syncs = 1;
        model.sync(file).unwrap_err();
        model.sync(file).unwrap();
        let mut bytes = [0; 512];
        model.read(file, 0, &mut bytes).unwrap();
        assert_eq!(bytes, [2; 512], "the cache keeps it");
        model.crash();
        model.read(file, 0, &mut bytes).unwrap();
        bytes == [1; 512]
    });
    let lost = lost.count();
    assert!((1..60).contains(&lost), "{lost} of 60: chance has a say");
}

#[test]
fn writes_reads_and_rights_fail_on_demand() {
    let disk = Disk::new(1);
    let mut db = open(&disk).unwrap();
    commit(&mut db, 0).unwrap();
    disk.set_faults(Faults { writes: u32::MAX, ..Faults::default() });
    assert_eq!(code(&commit(&mut db, 1).unwrap_err()), ErrorCode::SystemIoFailure);
    disk.set_faults(Faults::default());
    commit(&mut db, 1).unwrap();
    drop(db);
    disk.set_faults(Faults { reads: u32::MAX, ..Faults::default() });
    assert_eq!(code(&open(&disk).unwrap_err()), ErrorCode::SystemIoFailure);
    disk.set_faults(Faults { read_only: true, ..Faults::default() });
    let error = open(&disk).and_then(|mut db| commit(&mut db, 2)).unwrap_err();
    assert!(matches!(code(&error), ErrorCode::ReadOnly | ErrorCode::CannotOpen), "{error}");
    disk.set_faults(Faults::default());
    assert_eq!(changes(&open(&disk).unwrap()).len(), 2);
}

#[test]
fn damage_is_found() {
    let cut = |disk: &Disk| disk.truncate(PATH, 4096);
    let rot = |disk: &Disk| (0..200).for_each(|seed| disk.corrupt(PATH, seed));
    for damage in [cut as fn(&Disk), rot] {
        let disk = Disk::new(1);
        let mut db = open(&disk).unwrap();
        (0..20).for_each(|change| commit(&mut db, change).unwrap());
        drop(db);
        let before = disk.bytes(PATH).unwrap();
        damage(&disk);
        assert_ne!(disk.bytes(PATH).unwrap(), before);
        let verdict = open(&disk).and_then(|db| db.query_row("PRAGMA integrity_check", [], |row| row.get(0)));
        assert_ne!(verdict, Ok("ok".to_owned()));
    }
}

#[test]
fn a_file_that_was_never_synced_may_be_missing_and_a_deletion_may_come_back() {
    let (mut missing, mut back) = (0, 0);
    for seed in 0..60 {
        let mut model = super::Model::new(seed);
        let old = model.open(Some("/old"), true, false).unwrap();
        model.write(old, 0, b"old").unwrap();
        model.sync(old).unwrap();
        model.open(Some("/new"), true, false).unwrap();
        model.delete("/old", false).unwrap();
        model.crash();
        missing += usize::from(model.named("/new").is_none());
        back += usize::from(model.named("/old").is_some_and(|file| file.bytes() == b"old"));
    }
    assert!((1..60).contains(&missing) && (1..60).contains(&back), "{missing} missing, {back} back");
}

#[test]
fn the_same_seed_gives_the_same_disk() {
    let faults = Faults { ignore_sync: true, ..Faults::default() };
    for seed in 0..20 {
        for faults in [Faults::default(), faults] {
            let strict = !faults.ignore_sync;
            assert_eq!(crash_often(seed, 512, faults, strict), crash_often(seed, 512, faults, strict));
        }
    }
    let traces: std::collections::BTreeSet<_> =
        (0..20).map(|seed| crash_often(seed, 512, Faults::default(), true).1).collect();
    assert_eq!(traces.len(), 20, "other seeds, other disks");
}

#[test]
fn clock_and_names_are_the_disks_own() {
    let (one, other) = (Disk::new(1), Disk::new(1));
    assert_ne!(one.vfs_name(), other.vfs_name());
    one.set_clock(1_000_000_000_000);
    let db = open(&one).unwrap();
    let time: String = db.query_row("SELECT CURRENT_TIMESTAMP", [], |row| row.get(0)).unwrap();
    assert_eq!(time, "2001-09-09 01:46:40");
    assert!(other.files().is_empty());
    assert!(one.bytes(WAL).is_some_and(|wal| !wal.is_empty()));
}

#[test]
#[should_panic(expected = "a disk is dropped before its connections")]
fn a_disk_outlives_its_connections() {
    let disk = Disk::new(1);
    let _db = open(&disk).unwrap();
    drop(disk);
}

#[test]
#[ignore = "a measurement: cargo test --release -p agentd-tests --lib sim::disk -- --ignored --nocapture"]
fn schedules_a_second() {
    let begin = std::time::Instant::now();
    let mut count = 0_u32;
    while begin.elapsed().as_secs() < 5 {
        let disk = Disk::new(count.into());
        let mut db = open(&disk).unwrap();
        (0..10).for_each(|change| commit(&mut db, change).unwrap());
        disk.crash();
        drop(db);
        assert_eq!(changes(&open(&disk).unwrap()).len(), 10);
        count += 1;
    }
    println!("{:.0} schedules a second", f64::from(count) / begin.elapsed().as_secs_f64());
    let begin = std::time::Instant::now();
    (0..100_000).for_each(|seed| drop(Disk::new(seed)));
    println!("{:?} a disk", begin.elapsed() / 100_000);
}
