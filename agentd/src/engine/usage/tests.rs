//! Looks at the fake engine, whose `web` burns what it is told to; and how files of /proc are read.

use serde_json::json;

use super::*;
use crate::engine::tests::{CONFIG, engine, peer, web};

fn burning(more: &serde_json::Value) -> serde_json::Value {
    let mut spec = web(&json!([]));
    spec["instances"][0]["burns"] = 0.5.into();
    for (name, value) in more.as_object().into_iter().flatten() {
        spec["instances"][0][name] = value.clone();
    }
    spec
}

fn target() -> Target {
    "vm/web".parse().unwrap()
}

/// How often the engine was asked for counters.
fn looks(engine: &Engine) -> u64 {
    calls(engine, "counters")
}

fn calls(engine: &Engine, call: &str) -> u64 {
    let page = crate::metrics::Page::of(&engine.inner.metrics).text();
    let series = format!("agentd_backend_call_seconds_count{{call=\"{call}\",kind=\"vm\",result=\"ok\"}} ");
    page.lines().find_map(|line| line.strip_prefix(series.as_str())).map_or(0, |count| count.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_first_is_told_a_rate_and_all_who_ask_at_once_share_the_looks() {
    let (engine, _) = engine(burning(&json!({})), CONFIG);
    let (peer, target) = (peer(), target());
    let asked = (0..20).map(|_| engine.usage(&peer, &target, false));
    for told in futures_util::future::join_all(asked).await {
        let cpu = told.unwrap().cpu;
        assert!(cpu.rate.is_some_and(|rate| (rate - 0.5).abs() < 0.01), "{cpu:?}");
        assert!(cpu.window_ms >= Some(400), "{cpu:?}");
    }
    let looks = looks(&engine);
    assert!((2..=6).contains(&looks), "20 callers made for {looks} looks");
}

#[tokio::test(start_paused = true)]
async fn who_asks_for_what_can_be_told_now_waits_for_no_rate() {
    let (engine, _) = engine(burning(&json!({})), CONFIG);
    let began = tokio::time::Instant::now();
    let told = engine.usage(&peer(), &target(), true).await.unwrap();
    assert!(told.cpu.rate.is_none() && began.elapsed() < PAIR, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn what_was_looked_at_a_moment_ago_is_not_looked_at_again_for_what_can_be_told_now() {
    let (engine, _) = engine(burning(&json!({})), CONFIG);
    engine.show(&peer(), &target()).await.unwrap();
    for (pause, expected) in [(Duration::ZERO, 1), (JUST_NOW * 2, 2)] {
        tokio::time::sleep(pause).await;
        engine.usage(&peer(), &target(), true).await.unwrap();
        assert_eq!(calls(&engine, "observe"), expected);
    }
}

#[tokio::test]
async fn another_run_is_not_compared_with_the_one_before() {
    let (engine, fake) = engine(burning(&json!({})), CONFIG);
    engine.usage(&peer(), &target(), false).await.unwrap();
    tokio::time::sleep(2 * PAIR).await;
    fake.restart("web");
    let again = engine.usage(&peer(), &target(), false).await.unwrap().cpu;
    assert!(again.rate.is_some() && again.window_ms < Some(1200), "{again:?}");
}

#[tokio::test]
async fn what_nobody_counts_is_told_without_waiting_for_a_second_look() {
    let (engine, _) = engine(web(&json!([])), CONFIG);
    let told = engine.usage(&peer(), &target(), false).await.unwrap();
    assert_eq!((told.cpu.rate, told.cpu.total_ms, told.cpu.throttled), (None, None, None));
    assert_eq!(looks(&engine), 1);
}

#[tokio::test]
async fn an_instance_that_is_gone_takes_its_looks_with_it() {
    let (engine, fake) = engine(burning(&json!({"transient": true})), CONFIG);
    assert_eq!(engine.usages(&peer(), None, None).await.unwrap().items.len(), 1);
    assert_eq!(engine.inner.looks.instances.lock().unwrap().len(), 1);
    fake.remove("web");
    tokio::time::sleep(LISTING_AGE).await;
    assert!(engine.usages(&peer(), None, None).await.unwrap().items.is_empty());
    assert!(engine.inner.looks.instances.lock().unwrap().is_empty());
}

#[test]
fn a_host_is_busy_with_all_but_idling_and_waiting() {
    let stat = "cpu  100 20 30 4000 500 6 7 8 90 9\ncpu0 1 2 3 4 5 6 7 8 9 0\n";
    assert_eq!(busy_usec(stat), Some((100 + 20 + 30 + 6 + 7 + 8) * TICK_USEC));
    for short in ["", "cpu 1 2\n", "cpu a b c d e f g h\n"] {
        assert_eq!(busy_usec(short), None, "{short:?}");
    }
}

#[test]
fn memory_that_can_be_had_is_not_in_use() {
    let text = "MemTotal:  4096 kB\nMemFree: 1 kB\nMemAvailable: 1024 kB\nHugePages_Total: 0\n";
    assert_eq!(memory_in_use(text), Some(ByteCount::mib(3)));
    assert_eq!(memory_in_use("MemTotal: 4096 kB\n"), None);
}
