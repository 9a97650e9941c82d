//! The store on a real file: what is on record is there after a restart, and what can't be read is not taken for nothing.

use agentd_core::api::{Happening, HistoryEntry};
use agentd_core::instance::{InstanceId, Kind, Ref};
use agentd_core::operation::{Identity, Outcome, Who};
use agentd_core::plan::{Plan, Verb};
use tempfile::TempDir;

use super::*;
use crate::backend::fake::Fake;
use crate::backend::{Backend, Look};

fn operation(id: &str, outcome: Outcome) -> Operation {
    let identity = Identity { id: "1".into(), boot: None };
    let plan = Plan::empty(Ref::new(Kind::Vm, "web").unwrap(), identity, Verb::Resize);
    let who = Who { uid: 7, gid: 7, pid: 1, command: "test".into() };
    Operation { outcome, ..Operation::new(id.into(), who, plan, 1000) }
}

fn entry(operation: &Operation) -> Entry {
    Entry::Operation(Box::new(operation.clone()), None)
}

fn told(mark: &str) -> Entry {
    let web = Ref::new(Kind::Vm, "web").unwrap();
    let entry = HistoryEntry { detail: Some(mark.into()), ..HistoryEntry::new(Happening::Drift, &web, None) };
    Entry::History(Box::new(Told { entry, at_ms: 1_700_000_000_123, mark: mark.into() }))
}

async fn open(dir: &TempDir) -> (Store, Result<Loaded, StoreError>) {
    let store = Store::new(dir.path());
    // The store of before may take a moment to let go.
    for _ in 0..100 {
        match store.load().await {
            Err(StoreError::InUse(_)) => tokio::time::sleep(Duration::from_millis(10)).await,
            loaded => return (store, loaded),
        }
    }
    panic!("the store is still in use");
}

async fn unreadable(dir: &TempDir) -> String {
    let (store, loaded) = open(dir).await;
    let Err(StoreError::Unreadable(why)) = loaded else { panic!("{loaded:?}") };
    assert!(store.commit(vec![told("a")]).await.is_err(), "what can't be read isn't written to");
    assert!(store.trouble().is_some());
    why
}

/// A store with one operation, and the bytes of its file.
async fn filled() -> (TempDir, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let (store, loaded) = open(&dir).await;
    loaded.unwrap();
    store.commit(vec![entry(&operation("1", Outcome::Changed)), told("a")]).await.unwrap();
    drop(store);
    drop(open(&dir).await);
    let path = dir.path().join("agentd.db");
    // The log goes into the file when the last connection closes.
    for _ in 0..500 {
        if !dir.path().join("agentd.db-wal").exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let bytes = std::fs::read(&path).unwrap();
    (dir, bytes)
}

#[tokio::test]
async fn what_was_committed_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (store, loaded) = open(&dir).await;
    assert!(loaded.unwrap().unfinished.is_empty());
    let key = Key { uid: 7, key: "k".into(), request: vec![1, 2], operation: "2".into(), born_ms: 1000 };
    let (ended, running) = (operation("1", Outcome::Changed), operation("2", Outcome::Running));
    store.commit(vec![entry(&ended), told("a")]).await.unwrap();
    store.commit(vec![entry(&running), Entry::Key(key.clone())]).await.unwrap();
    store.write_later(vec![told("b"), told("a")]);
    drop(store);
    let (store, loaded) = open(&dir).await;
    let loaded = loaded.unwrap();
    let unfinished: Vec<Operation> = loaded.unfinished.into_iter().map(|recorded| recorded.operation).collect();
    assert_eq!((unfinished, loaded.keys), (vec![running.clone()], vec![key]));
    assert_eq!(store.newest(None, Some(7), None, 10).await.unwrap(), vec![running, ended]);
    assert!(store.newest(None, Some(8), None, 10).await.unwrap().is_empty());
    let history = store.history(Page { limit: 10, ..Page::default() }).await.unwrap();
    let told: Vec<_> = history.iter().map(|entry| (entry.seq, entry.detail.as_deref().unwrap())).collect();
    assert_eq!(told, [(2, "b"), (1, "a")], "what is told twice is in it once");
    assert_eq!(history[0].at, "2023-11-14T22:13:20.123Z");
}

#[tokio::test]
async fn an_operation_under_way_is_read_as_it_stands() {
    let dir = tempfile::tempdir().unwrap();
    let (store, loaded) = open(&dir).await;
    loaded.unwrap();
    let mut running = operation("1", Outcome::Running);
    store.show(&running);
    assert!(store.operation("1").await.unwrap().is_none(), "it is not on record yet");
    store.commit(vec![entry(&running)]).await.unwrap();
    running.notes.push("half-way".into());
    store.show(&running);
    assert_eq!(store.operation("1").await.unwrap().unwrap().operation, running);
    assert_eq!(store.newest(None, None, None, 10).await.unwrap(), [running]);
}

#[test]
fn a_backlog_keeps_how_changes_ended_and_the_newest_of_each_instance() {
    let row = |id: &str, stamp| Entry::Gone(InstanceId { kind: Kind::Vm, id: id.to_owned() }, stamp);
    let mut backlog: Vec<Entry> = Vec::new();
    for n in 0..10 {
        backlog.push(row("web", if n == 3 { 100 } else { n }));
        backlog.push(told(&n.to_string()));
        backlog.push(entry(&operation(&n.to_string(), Outcome::Changed)));
    }
    let mut whole = backlog.clone();
    shorten(&mut whole, 30);
    assert_eq!(whole.len(), 30);
    shorten(&mut backlog, 15);
    let rows: Vec<u64> =
        backlog.iter().filter_map(|e| if let Entry::Gone(_, n) = e { Some(*n) } else { None }).collect();
    assert_eq!(rows, [100], "by its stamp, whichever came last");
    let marks: Vec<&str> = backlog
        .iter()
        .filter_map(|e| if let Entry::History(told) = e { Some(told.mark.as_str()) } else { None })
        .collect();
    assert_eq!(marks, ["6", "7", "8", "9"], "the oldest drift goes");
    assert_eq!(backlog.iter().filter(|entry| matches!(entry, Entry::Operation(..))).count(), 10);
    shorten(&mut backlog, 3);
    assert_eq!(backlog.iter().filter(|entry| matches!(entry, Entry::Operation(..))).count(), 10);
}

#[tokio::test]
async fn one_daemon_has_a_state_directory() {
    let dir = tempfile::tempdir().unwrap();
    let (_store, loaded) = open(&dir).await;
    loaded.unwrap();
    let second = Store::new(dir.path());
    assert!(matches!(second.load().await, Err(StoreError::InUse(_))));
}

#[tokio::test]
async fn what_is_there_and_cant_be_read_is_never_taken_for_an_empty_store() {
    let (dir, bytes) = filled().await;
    let path = dir.path().join("agentd.db");
    let noise: Vec<u8> = (0..bytes.len()).map(|n| u8::try_from(n * 31 % 251).unwrap()).collect();
    let mut torn = bytes.clone();
    torn[4096..8192].fill(0xAA);
    for (what, damaged) in [("empty", Vec::new()), ("cut", bytes[..5000].to_vec()), ("noise", noise), ("torn", torn)] {
        std::fs::write(&path, &damaged).unwrap();
        unreadable(&dir).await;
        assert_eq!(std::fs::read(&path).unwrap(), damaged, "{what} was left alone");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(unreadable(&dir).await.contains("gone"));
    assert!(!path.exists());
    // Put back, it is as it was.
    std::fs::write(&path, &bytes).unwrap();
    let (store, loaded) = open(&dir).await;
    loaded.unwrap();
    assert!(store.operation("1").await.unwrap().is_some());
}

#[tokio::test]
async fn a_store_of_an_older_schema_is_brought_to_todays_with_all_that_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut connection = rusqlite::Connection::open(dir.path().join("agentd.db")).unwrap();
    schema::migrate_to(&mut connection, 0, 1).unwrap();
    let spec = serde_json::json!({"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB"});
    let fake = Fake::new(serde_json::from_value(serde_json::json!({"instances": [spec]})).unwrap());
    let observed = serde_json::to_string(&fake.observe("web", Look::Plain).await.unwrap()).unwrap();
    connection
        .execute_batch(&format!(
            "INSERT INTO instances VALUES ('vm/web', 3, 'a-1', '[{{\"hold\":\"needs-attention\",\"reason\":\"look\"}}]',
             '{observed}');"
        ))
        .unwrap();
    drop(connection);
    std::fs::write(dir.path().join("lock"), "1\n").unwrap();
    let (_store, loaded) = open(&dir).await;
    let remembered = loaded.unwrap().remembered;
    assert_eq!((remembered.len(), remembered[0].stamp, remembered[0].holds.len()), (1, 3, 1));
    assert!(remembered[0].unseen.is_none());
}

#[tokio::test]
async fn a_newer_schema_is_refused() {
    let (dir, _) = filled().await;
    let connection = rusqlite::Connection::open(dir.path().join("agentd.db")).unwrap();
    connection.pragma_update(None, "user_version", 99).unwrap();
    drop(connection);
    assert!(unreadable(&dir).await.contains("newer agentd"));
}

#[tokio::test]
async fn the_history_only_grows() {
    let (dir, _) = filled().await;
    let connection = rusqlite::Connection::open(dir.path().join("agentd.db")).unwrap();
    let error = connection.execute("UPDATE history SET body = '{}'", []).unwrap_err();
    assert!(error.to_string().contains("only grows"));
}

#[tokio::test]
async fn a_file_that_is_cut_or_replaced_under_way_is_told() {
    let (dir, bytes) = filled().await;
    let path = dir.path().join("agentd.db");
    let (store, loaded) = open(&dir).await;
    loaded.unwrap();
    store.commit(vec![told("b")]).await.unwrap();
    File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
    let error = store.commit(vec![told("c")]).await.unwrap_err();
    assert!(error.to_string().contains("cut"), "{error}");
    assert!(store.trouble().is_some());
    std::fs::remove_file(&path).unwrap();
    store.commit(vec![told("c")]).await.unwrap_err();
    assert!(!path.exists(), "no empty one takes its place");
    std::fs::write(&path, bytes).unwrap();
    store.commit(vec![told("c")]).await.unwrap_err();
}
