//! Suspensions and what settles late, on the fake engine.

use super::*;

async fn told(engine: &Engine, happening: Happening) -> Vec<HistoryEntry> {
    engine.end_record().await;
    let entries = engine.store().after(0, 1000).await.unwrap();
    entries.into_iter().filter(|entry| entry.happening == happening).collect()
}

/// A listing that is newer than what was seen before.
async fn look(engine: &Engine) {
    tokio::time::sleep(SHORT).await;
    engine.refresh(Duration::ZERO).await;
}

fn suspend() -> Ask {
    ask(Wish::Suspend { reason: "backup".into() })
}

#[tokio::test(start_paused = true)]
async fn what_was_left_pending_is_told_once_it_has_come_about() {
    let faults = serde_json::json!([{"instance": "vm/web", "nth": 1, "fault": "guest-late"}]);
    let (engine, fake) = engine(web(&faults), CONFIG);
    let view = submit(&engine, resize(&serde_json::json!({"memory": "2GiB"}), SHORT)).await.unwrap();
    assert_eq!(view.outcome, Outcome::Pending);
    look(&engine).await;
    assert!(told(&engine, Happening::Settled).await.is_empty(), "the guest has not obeyed");
    fake.settle();
    for _ in 0..2 {
        look(&engine).await;
    }
    let settled = told(&engine, Happening::Settled).await;
    assert_eq!(settled.len(), 1, "{settled:?}");
    assert_eq!((&settled[0].operation, settled[0].verb.as_deref()), (&view.operation, Some("resize")));
}

#[tokio::test(start_paused = true)]
async fn what_a_later_change_has_superseded_does_not_settle() {
    let faults = serde_json::json!([{"instance": "vm/web", "nth": 1, "fault": "guest-late"}]);
    let (engine, fake) = engine(web(&faults), CONFIG);
    submit(&engine, resize(&serde_json::json!({"memory": "2GiB"}), SHORT)).await.unwrap();
    let later = submit(&engine, resize(&serde_json::json!({"memory": "3GiB"}), SHORT)).await.unwrap();
    assert_eq!(later.outcome, Outcome::Changed);
    fake.settle();
    look(&engine).await;
    assert!(told(&engine, Happening::Settled).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_suspension_that_fails_leaves_no_hold_and_a_running_instance() {
    for fault in ["fail", "fail-after", "unavailable"] {
        let faults = serde_json::json!([{"instance": "vm/web", "nth": 0, "fault": fault}]);
        let (engine, fake) = engine(web(&faults), CONFIG);
        let failure = submit(&engine, suspend()).await.unwrap_err();
        assert_eq!(failure.operation.unwrap().outcome, Outcome::RolledBack, "{fault}");
        assert_eq!(seen(&fake).await.state, State::Running, "{fault}");
        assert!(engine.show(&peer(), &Target::Full(reference())).await.unwrap().holds.is_empty(), "{fault}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_wake_behind_our_back_is_drift_and_is_put_back_where_the_config_says_so() {
    for repair in [false, true] {
        let config = format!("{CONFIG}[[limit]]\nmatch = \"*\"\nrepair_drift = {repair}\n");
        let (engine, fake) = engine(web(&serde_json::json!([])), &config);
        submit(&engine, suspend()).await.unwrap();
        fake.go("web", State::Running);
        look(&engine).await;
        let drift = told(&engine, Happening::Drift).await;
        assert_eq!((drift.len(), drift[0].moves[0].to_string().as_str()), (1, "state paused → running"));
        tokio::time::sleep(Duration::from_secs(30)).await;
        let now = seen(&fake).await.state;
        assert_eq!(now, if repair { State::Paused } else { State::Running });
        let holds = engine.show(&peer(), &Target::Full(reference())).await.unwrap().holds;
        assert_eq!((holds.len(), holds[0].hold, holds[0].reason.as_str()), (1, HoldKind::Suspended, "backup"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_resume_of_our_own_is_no_drift() {
    let (engine, _) = engine(web(&serde_json::json!([])), CONFIG);
    submit(&engine, suspend()).await.unwrap();
    submit(&engine, ask(Wish::Resume)).await.unwrap();
    look(&engine).await;
    assert!(told(&engine, Happening::Drift).await.is_empty());
    let states = told(&engine, Happening::State).await;
    assert_eq!(states.len(), 2, "{states:?}");
}
