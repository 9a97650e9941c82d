//! An engine that is followed: what is known is kept true by what stirs, and nothing waits for a listing.

use std::sync::Arc;
use std::time::Duration;

use agentd_core::error::Code;
use agentd_core::instance::State;
use agentd_core::plan::Values;
use agentd_core::units::{Cpus, Limit};
use tokio::time::{Instant, sleep};

use super::super::Filter;
use super::{CONFIG, Engine, Fake, SHORT, engine, peer, resize, submit};

/// How long a full listing takes: nobody may wait for one.
const LISTING: Duration = Duration::from_secs(60);

/// Two VMs of an engine that can be followed, and is; a step takes 50 ms.
async fn followed() -> (Engine, Arc<Fake>) {
    followed_after(0).await
}

/// The same where the first `mute` questions about what stirs have failed.
async fn followed_after(mute: usize) -> (Engine, Arc<Fake>) {
    let vm = |name: &str| serde_json::json!({"name": name, "cpus": 2, "memory": "1GiB", "max_cpus": 8, "max_memory": "4GiB", "used": "200MiB"});
    let list_ms = u64::try_from(LISTING.as_millis()).unwrap();
    let spec = serde_json::json!({
        "instances": [vm("db"), vm("web")], "announces": true, "list_ms": list_ms, "delay_ms": 50, "mute": mute,
    });
    let (engine, fake) = engine(spec, CONFIG);
    engine.keep_fresh(Duration::from_secs(30));
    sleep(LISTING * 3).await;
    (engine, fake)
}

/// What a list tells of a VM's state and vCPUs, and that it came at once.
async fn listed(engine: &Engine, name: &str) -> Option<(State, Option<Limit<Cpus>>)> {
    // One look serves all who have asked by the time when it begins.
    sleep(Duration::from_millis(1)).await;
    let began = Instant::now();
    let list = engine.list(&peer(), &Filter::default()).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1) && list.unavailable.is_empty(), "{:?}", began.elapsed());
    let item = list.items.into_iter().find(|item| item.name == name)?;
    Some((item.state, item.cpus.observed))
}

fn cpus(count: u32) -> Values {
    Values { cpus: Some(Limit::At(Cpus::whole(count))), ..Values::default() }
}

#[tokio::test(start_paused = true)]
async fn a_growth_waits_for_no_listing_and_counts_what_others_have_taken() {
    let (engine, fake) = followed().await;
    let began = Instant::now();
    submit(&engine, resize(&serde_json::json!({"cpus": 4}), SHORT)).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    // 4 and 3 of 8.
    fake.meddle("db", &cpus(3));
    sleep(Duration::from_secs(1)).await;
    let refused = submit(&engine, resize(&serde_json::json!({"cpus": 6}), SHORT)).await.unwrap_err();
    assert_eq!(refused.problem.code, Code::CapacityExceeded);
    // What is given back unheard is seen before a growth is refused for it.
    fake.go("db", State::Stopped);
    sleep(Duration::from_millis(1)).await;
    submit(&engine, resize(&serde_json::json!({"cpus": 6}), SHORT)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_list_tells_at_once_what_has_just_changed_whether_it_was_announced_or_not() {
    let (engine, fake) = followed().await;
    fake.meddle("db", &cpus(3));
    assert_eq!(listed(&engine, "db").await, Some((State::Running, Some(Limit::At(Cpus::whole(3))))));
    fake.go("db", State::Paused);
    assert_eq!(listed(&engine, "db").await.unwrap().0, State::Paused);
    fake.remove("db");
    assert_eq!(listed(&engine, "db").await, None);
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_could_not_tell_what_stirs_when_it_was_first_asked_is_followed_later() {
    let (engine, fake) = followed_after(1).await;
    fake.meddle("db", &cpus(3));
    assert_eq!(listed(&engine, "db").await, Some((State::Running, Some(Limit::At(Cpus::whole(3))))));
}

#[tokio::test(start_paused = true)]
async fn what_nothing_is_heard_of_is_looked_at_in_turn() {
    let (engine, fake) = followed().await;
    // What is saved is nothing that one question tells.
    fake.meddle_saved("db", &cpus(5));
    sleep(Duration::from_secs(61)).await;
    let list = engine.list(&peer(), &Filter::default()).await.unwrap();
    let db = list.items.into_iter().find(|item| item.name == "db").unwrap();
    assert_eq!(db.cpus.persistent, Some(Limit::At(Cpus::whole(5))));
}

#[tokio::test(start_paused = true)]
async fn what_is_announced_in_the_middle_of_a_change_is_looked_at_after_it() {
    let (engine, fake) = followed().await;
    let changing = engine.clone();
    let body = serde_json::json!({"cpus": 4, "apply": "live"});
    let change = tokio::spawn(async move { submit(&changing, resize(&body, SHORT)).await.unwrap() });
    sleep(Duration::from_millis(10)).await;
    // The change's own look at its end has begun before that, and takes longer.
    fake.slow_next_look(Duration::from_secs(1));
    sleep(Duration::from_millis(500)).await;
    let limit = Some(Limit::At(Cpus::from_millis(1500)));
    fake.meddle("web", &Values { cpu_limit: limit, ..Values::default() });
    change.await.unwrap();
    let known = || engine.book().get(&super::instance()).unwrap().observed.cpu_limit.accepted;
    assert_ne!(known(), limit);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(known(), limit);
}
