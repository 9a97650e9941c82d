//! Changes on the fake engine, through the engine's front door: what succeeds, what is refused, and what is left after each
//! fault at each step.

mod followed;
mod lifecycle;
mod recovery;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use agentd_core::access::{AccessTable, Caller, ResolvedPrincipal, ResolvedRule, Right};
use agentd_core::api::{Happening, HistoryEntry, HoldKind, OperationView, ResizeRequest};
use agentd_core::config::Config;
use agentd_core::error::Code;
use agentd_core::instance::{InstanceId, Kind, Observed, Ref, State, Target};
use agentd_core::operation::{Identity, Operation, Outcome, StepState, Who};
use agentd_core::pattern::Pattern;
use agentd_core::plan::{HostCapacity, Plan, Values, Verb};
use agentd_core::units::{ByteCount, Cpus, Limit};
use futures_util::FutureExt;
use proptest::prelude::*;
use sha2::Digest;

use super::{Ask, Engine, Failure, Peer, Settings, Wish};
use crate::backend::fake::{Fake, FakeSpec};
use crate::backend::{Backend, Look};
use crate::clock::now_ms;
use crate::store::{Entry, Key, Location, Page, Store, Told};

const HOST: HostCapacity = HostCapacity { cpus: Cpus::whole(8), memory: ByteCount::mib(16 * 1024) };

pub(super) fn engine(spec: serde_json::Value, config: &str) -> (Engine, Arc<Fake>) {
    let spec: FakeSpec = serde_json::from_value(spec).unwrap();
    let fake = Arc::new(Fake::new(spec));
    let config = Config::parse("test", config).unwrap();
    let settings = Settings { config, access: AccessTable::new(Vec::new(), 0), host: HOST, notes: Vec::new() };
    let backends: Vec<Arc<dyn Backend>> = vec![Arc::clone(&fake) as Arc<dyn Backend>];
    let engine = Engine::new(backends, settings, store(), "test".into());
    engine.restore().now_or_never().unwrap().unwrap();
    (engine, fake)
}

/// A store in memory, of its own.
fn store() -> Store {
    Store::inline(store_location(), true)
}

/// Where there is no store yet. One in memory is there as long as somebody has it open.
fn store_location() -> Location {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    let name = format!("/engine-{}", COUNT.fetch_add(1, Ordering::Relaxed));
    Location { path: name.into(), vfs: Some("memdb".into()) }
}

/// One VM `web`: 2 of 4 vCPUs, 1 of 4 GiB, 200 MiB in use, and these faults.
pub(super) fn web(faults: &serde_json::Value) -> serde_json::Value {
    serde_json::json!({
        "instances": [{"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "used": "200MiB"}],
        "faults": faults,
    })
}

pub(super) const CONFIG: &str = "[capacity]\nreserved_memory = 0\nvm_overhead = 0\n";

pub(super) fn peer() -> Peer {
    Peer {
        caller: Caller { uid: 0, gid: 0, groups: Vec::new() },
        who: Who { uid: 0, gid: 0, pid: 1, command: "test".into() },
    }
}

/// Somebody whom no rule names.
fn another() -> Peer {
    Peer { caller: Caller { uid: 7, gid: 7, groups: Vec::new() }, who: Who { uid: 7, ..peer().who } }
}

/// Gives that one these rights, on these instances.
fn let_in(engine: &Engine, rights: &[Right], pattern: &str) -> Peer {
    let rule = ResolvedRule {
        description: "[[access]] 1".into(),
        principal: ResolvedPrincipal::Uid(7),
        rights: rights.iter().copied().collect(),
        pattern: Pattern::parse(pattern).unwrap(),
    };
    let Settings { config, host, .. } = &*engine.settings();
    let access = AccessTable::new(vec![rule], 0);
    engine.set_settings(Settings { config: config.clone(), access, host: *host, notes: Vec::new() });
    another()
}

fn reference() -> Ref {
    Ref::new(Kind::Vm, "web").unwrap()
}

/// What the fake engine's `web` is known by.
fn instance() -> InstanceId {
    InstanceId { kind: Kind::Vm, id: "fake-web".into() }
}

fn ask(wish: Wish) -> Ask {
    let right = if matches!(wish, Wish::Resize(..)) { Right::Resize } else { Right::Power };
    Ask { target: Target::Full(reference()), wish, right, dry_run: false, if_version: None }
}

fn resize(body: &serde_json::Value, wait: Duration) -> Ask {
    let request: ResizeRequest = serde_json::from_value(body.clone()).unwrap();
    ask(Wish::Resize(request, wait, None))
}

async fn submit(engine: &Engine, ask: Ask) -> Result<OperationView, Failure> {
    engine.reply(engine.submit(peer(), ask, None).unwrap()).await
}

async fn seen(fake: &Fake) -> Observed {
    fake.observe("web", Look::Plain).await.unwrap()
}

const SHORT: Duration = Duration::from_millis(50);
const GIB: ByteCount = ByteCount::mib(1024);

#[tokio::test(start_paused = true)]
async fn a_resize_changes_what_runs_and_what_is_saved_in_one_go() {
    let (engine, fake) = engine(web(&serde_json::json!([])), CONFIG);
    let body = serde_json::json!({"cpus": 4, "memory": "2GiB", "cpu_limit": 1.5});
    let view = submit(&engine, resize(&body, SHORT)).await.unwrap();
    assert_eq!(view.outcome, Outcome::Changed);
    assert_eq!(view.steps.len(), 6);
    let now = seen(&fake).await;
    assert_eq!(
        (now.cpus.observed, now.cpus.persistent),
        (Some(Limit::At(Cpus::whole(4))), Some(Limit::At(Cpus::whole(4))))
    );
    assert_eq!(now.memory.observed, Some(Limit::At(ByteCount::mib(2048))));
    assert_eq!(now.cpu_limit.persistent, Some(Limit::At(Cpus::from_millis(1500))));
    let again = submit(&engine, resize(&body, SHORT)).await.unwrap();
    assert_eq!((again.outcome, again.steps.len()), (Outcome::Unchanged, 0));
}

#[tokio::test(start_paused = true)]
async fn a_look_that_was_begun_in_the_middle_of_a_change_does_not_take_the_place_of_its_last() {
    let mut spec = web(&serde_json::json!([]));
    spec["delay_ms"] = 50.into();
    let (engine, fake) = engine(spec, CONFIG);
    let changing = engine.clone();
    let body = serde_json::json!({"cpus": 4, "apply": "live"});
    let change = tokio::spawn(async move { submit(&changing, resize(&body, SHORT)).await.unwrap() });
    tokio::time::sleep(Duration::from_millis(10)).await;
    // It tells of the 2 vCPUs that were there when it began, long after there are 4.
    fake.slow_next_look(Duration::from_secs(1));
    engine.show(&peer(), &Target::Full(reference())).await.unwrap();
    assert_eq!(change.await.unwrap().outcome, Outcome::Changed);
    let known = engine.book().get(&instance()).unwrap().observed.cpus.accepted;
    assert_eq!(known, Some(Limit::At(Cpus::whole(4))));
    assert_eq!(engine.book().ledger().committed().cpus, Cpus::whole(4));
}

/// Every step of a resize of all fields, failing in every way that takes effect at once.
#[tokio::test(start_paused = true)]
async fn a_step_that_fails_at_any_position_leaves_everything_as_it_was() {
    for fault in ["fail", "fail-after", "lie", "unavailable"] {
        for nth in 0..6 {
            let faults = serde_json::json!([{"instance": "vm/web", "nth": nth, "fault": fault}]);
            let (engine, fake) = engine(web(&faults), CONFIG);
            let before = seen(&fake).await;
            let body = serde_json::json!({"cpus": 4, "memory": "2GiB", "cpu_limit": 1.5});
            let failure = submit(&engine, resize(&body, SHORT)).await.unwrap_err();
            let expected = if fault == "unavailable" { Code::BackendUnavailable } else { Code::BackendFailed };
            assert_eq!(failure.problem.code, expected, "{fault} at {nth}: {}", failure.problem);
            let view = failure.operation.unwrap();
            assert_eq!(view.outcome, Outcome::RolledBack, "{fault} at {nth}");
            assert_eq!(seen(&fake).await, before, "{fault} at {nth}");
            assert_eq!(engine.book().ledger().committed().cpus, Cpus::whole(2), "{fault} at {nth}");
            assert!(engine.show(&peer(), &Target::Full(reference())).await.unwrap().holds.is_empty());
        }
    }
}

/// The first step is read back with a later one; whatever becomes of that, it is found out.
#[tokio::test(start_paused = true)]
async fn what_took_no_effect_is_found_out_where_a_later_step_does_not_end_well_either() {
    for later in ["fail", "fail-after", "lie", "unavailable", "guest-late"] {
        // The sixth sets vCPUs, and is not begun where one before it took no effect.
        for nth in 1..5 {
            let faults = serde_json::json!([
                {"instance": "vm/web", "nth": 0, "fault": "lie"}, {"instance": "vm/web", "nth": nth, "fault": later}]);
            let (engine, fake) = engine(web(&faults), CONFIG);
            let before = seen(&fake).await;
            let body = serde_json::json!({"cpus": 4, "memory": "2GiB", "cpu_limit": 1.5});
            let failure = submit(&engine, resize(&body, SHORT)).await.unwrap_err();
            assert_eq!(
                failure.operation.unwrap().outcome,
                Outcome::RolledBack,
                "{later} at {nth}: {}",
                failure.problem
            );
            assert_eq!(seen(&fake).await, before, "{later} at {nth}");
            assert_eq!(engine.book().ledger().committed().cpus, Cpus::whole(2), "{later} at {nth}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_cant_be_taken_back_for_sure_is_not_begun_before_all_else_is_seen() {
    // The limit is said to be set, and is not; the vCPUs come last.
    let faults = serde_json::json!([{"instance": "vm/web", "nth": 0, "fault": "lie"}]);
    let (engine, _fake) = engine(web(&faults), CONFIG);
    let body = serde_json::json!({"cpus": 4, "cpu_limit": 1.5, "apply": "live"});
    let failure = submit(&engine, resize(&body, SHORT)).await.unwrap_err();
    let steps = failure.operation.unwrap().steps;
    let states: Vec<StepState> = steps.iter().map(|step| step.state).collect();
    assert_eq!(states, [StepState::Failed, StepState::Planned], "{steps:?}");
}

#[tokio::test(start_paused = true)]
async fn an_undo_that_fails_too_is_partial_and_held() {
    // The third step fails, and so does the first undo.
    let faults = serde_json::json!([
        {"instance": "vm/web", "nth": 2, "fault": "fail"}, {"instance": "vm/web", "nth": 3, "fault": "fail"}]);
    let (engine, _fake) = engine(web(&faults), CONFIG);
    let body = serde_json::json!({"cpus": 4, "memory": "2GiB", "cpu_limit": 1.5});
    let failure = submit(&engine, resize(&body, SHORT)).await.unwrap_err();
    assert_eq!((failure.problem.code, failure.problem.code.exit()), (Code::Partial, 7));
    let states: Vec<StepState> = failure.operation.unwrap().steps.iter().map(|step| step.state).collect();
    assert_eq!(states[..3], [StepState::Undone, StepState::UndoFailed, StepState::Failed]);
    let held = submit(&engine, resize(&serde_json::json!({"cpus": 3}), SHORT)).await.unwrap_err();
    assert_eq!(held.problem.code, Code::Held);
    // Stop still works, and a cleared hold lets changes through again.
    let target = Target::Full(reference());
    assert_eq!(engine.show(&peer(), &target).await.unwrap().holds[0].hold, HoldKind::NeedsAttention);
    submit(&engine, ask(Wish::Stop { timeout: None, force: false })).await.unwrap();
    assert!(engine.clear_hold(&peer(), &target).await.unwrap().holds.is_empty());
    submit(&engine, resize(&serde_json::json!({"cpus": 3}), SHORT)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_defect_in_the_middle_of_a_change_holds_its_instance_and_nothing_else() {
    let faults = serde_json::json!([{"instance": "vm/web", "nth": 1, "fault": "panic"}]);
    let (engine, _fake) = engine(web(&faults), CONFIG);
    let body = serde_json::json!({"cpus": 4, "memory": "2GiB"});
    let failure = submit(&engine, resize(&body, SHORT)).await.unwrap_err();
    assert_eq!(failure.problem.code, Code::Internal);
    let target = Target::Full(reference());
    assert_eq!(engine.show(&peer(), &target).await.unwrap().holds[0].hold, HoldKind::NeedsAttention);
    engine.clear_hold(&peer(), &target).await.unwrap();
    // Its observations are taken again, and so are changes.
    let view = submit(&engine, resize(&serde_json::json!({"cpus": 3}), SHORT)).await.unwrap();
    assert_eq!(view.outcome, Outcome::Changed);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_takes_its_time_is_pending_and_keeps_its_charge() {
    let faults = serde_json::json!([{"instance": "vm/web", "nth": 1, "fault": "guest-late"}]);
    let (engine, fake) = engine(web(&faults), CONFIG);
    let view = submit(&engine, resize(&serde_json::json!({"memory": "512MiB"}), SHORT)).await.unwrap();
    assert_eq!(view.outcome, Outcome::Pending);
    assert_eq!(engine.book().ledger().committed().memory, GIB);
    fake.settle();
    engine.refresh(Duration::ZERO).await;
    assert_eq!(engine.book().ledger().committed().memory, ByteCount::mib(512));
}

#[tokio::test(start_paused = true)]
async fn a_silent_guest_gets_its_old_target_back_and_nothing_else_is_changed() {
    let spec = serde_json::json!({"instances": [
        {"name": "web", "cpus": 1, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "silent": true}]});
    for (shrink, steps) in [("if-unused", 0), ("always", 3)] {
        let config = format!("{CONFIG}[[limit]]\nmatch = \"*\"\nshrink = \"{shrink}\"\n");
        let (engine, fake) = engine(spec.clone(), &config);
        let before = seen(&fake).await;
        let body = serde_json::json!({"memory": "512MiB", "cpus": 2});
        let failure = submit(&engine, resize(&body, SHORT)).await.unwrap_err();
        assert_eq!((failure.problem.code, failure.problem.code.exit()), (Code::GuestSilent, 8), "{shrink}");
        assert_eq!(seen(&fake).await, before, "{shrink}");
        let undone = failure
            .operation
            .map_or(0, |view| view.steps.iter().filter(|step| step.state == StepState::Undone).count());
        assert_eq!(undone, steps, "{shrink}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_hangs_is_unknown_keeps_its_charge_and_is_settled_by_what_is_seen() {
    for (fault, outcome, cpus) in [("hang", Outcome::RolledBack, 2), ("hang-after", Outcome::Changed, 4)] {
        let faults = serde_json::json!([{"instance": "vm/web", "nth": 0, "fault": fault}]);
        let (engine, _fake) = engine(web(&faults), CONFIG);
        let body = serde_json::json!({"cpus": 4, "apply": "live"});
        let failure = submit(&engine, resize(&body, SHORT)).await.unwrap_err();
        assert_eq!((failure.problem.code, failure.problem.code.exit()), (Code::BackendTimeout, 7));
        let id = failure.operation.unwrap().operation.unwrap();
        assert_eq!(engine.book().ledger().committed().cpus, Cpus::whole(4), "{fault}");
        let held = submit(&engine, resize(&body, SHORT)).await.unwrap_err();
        assert_eq!(held.problem.code, Code::Held);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(engine.operation(&peer(), &id).await.unwrap().outcome, outcome, "{fault}");
        assert_eq!(engine.book().ledger().committed().cpus, Cpus::whole(cpus), "{fault}");
        assert!(engine.show(&peer(), &Target::Full(reference())).await.unwrap().holds.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn what_somebody_else_changed_meanwhile_is_not_undone() {
    for (body, theirs, code) in [
        // Nothing of the change is left, so nothing is held; what they set is drift, told after the change.
        (
            serde_json::json!({"cpu_limit": 1.5, "cpus": 4, "apply": "live"}),
            Values { cpu_limit: Some(Limit::At(Cpus::whole(1))), ..Values::default() },
            Code::VersionMismatch,
        ),
        // No hypervisor tells a balloon's target: the guest may follow ours yet.
        (
            serde_json::json!({"memory": "2GiB", "cpus": 4, "apply": "live"}),
            Values { memory: Some(Limit::At(ByteCount::mib(1536))), ..Values::default() },
            Code::Partial,
        ),
    ] {
        let faults = serde_json::json!([{"instance": "vm/web", "nth": 0, "fault": "guest-late"}]);
        let (engine, fake) = engine(web(&faults), CONFIG);
        // It is accepted and waited for; meanwhile somebody changes it.
        let running = engine.submit(peer(), resize(&body, Duration::from_secs(5)), None).unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        fake.meddle("web", &theirs);
        let failure = engine.reply(running).await.unwrap_err();
        let now = seen(&fake).await;
        assert!(theirs.cpu_limit.is_none_or(|theirs| now.cpu_limit.accepted == Some(theirs)), "{}", failure.problem);
        assert!(theirs.memory.is_none_or(|theirs| now.memory.accepted == Some(theirs)), "{}", failure.problem);
        let partial = code == Code::Partial;
        let outcome = if partial { Outcome::Partial } else { Outcome::RolledBack };
        assert_eq!((failure.problem.code, failure.operation.unwrap().outcome), (code, outcome));
        let holds = engine.show(&peer(), &Target::Full(reference())).await.unwrap().holds.len();
        assert_eq!(holds, usize::from(partial));
        let history = engine.store().history(Page { limit: 10, ..Page::default() }).await.unwrap();
        let told: Vec<_> = history.iter().rev().map(|entry| (entry.happening, entry.moves.len())).collect();
        let expected = [(Happening::Change, usize::from(partial)), (Happening::Drift, 1)];
        assert_eq!(told, expected[..2 - usize::from(partial)]);
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_done_and_then_changed_by_somebody_else_is_partial() {
    let faults = serde_json::json!([{"instance": "vm/web", "nth": 1, "fault": "fail"}]);
    let mut spec = web(&faults);
    spec["delay_ms"] = 100.into();
    let (engine, fake) = engine(spec, CONFIG);
    let body = serde_json::json!({"memory": "2GiB", "cpus": 4, "apply": "live"});
    let running = engine.submit(peer(), resize(&body, Duration::from_secs(5)), None).unwrap();
    tokio::time::sleep(Duration::from_millis(150)).await;
    let theirs = Some(Limit::At(ByteCount::mib(1536)));
    fake.meddle("web", &Values { memory: theirs, ..Values::default() });
    let failure = engine.reply(running).await.unwrap_err();
    assert_eq!(seen(&fake).await.memory.accepted, theirs, "{}", failure.problem);
    assert_eq!((failure.problem.code, failure.operation.unwrap().outcome), (Code::Partial, Outcome::Partial));
    assert_eq!(engine.show(&peer(), &Target::Full(reference())).await.unwrap().holds.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_restart_meanwhile_abandons_the_change_and_takes_back_what_was_saved() {
    let mut spec = web(&serde_json::json!([]));
    spec["delay_ms"] = 100.into();
    let (engine, fake) = engine(spec, CONFIG);
    let running = engine.submit(peer(), resize(&serde_json::json!({"cpus": 4}), SHORT), None).unwrap();
    // The saved step is done, the live one is on its way.
    tokio::time::sleep(Duration::from_millis(150)).await;
    fake.restart("web");
    let failure = engine.reply(running).await.unwrap_err();
    let view = failure.operation.unwrap();
    assert_eq!((failure.problem.code, view.outcome), (Code::InvalidState, Outcome::Abandoned), "{}", failure.problem);
    assert_eq!(seen(&fake).await.cpus.persistent, Some(Limit::At(Cpus::whole(2))));
}

#[tokio::test(start_paused = true)]
async fn a_start_that_failed_and_runs_all_the_same_is_not_switched_off() {
    let spec = serde_json::json!({
        "instances": [{"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "stopped": true}],
        "faults": [{"instance": "vm/web", "nth": 0, "fault": "fail-after"}]});
    let (engine, fake) = engine(spec, CONFIG);
    let failure = submit(&engine, ask(Wish::Start)).await.unwrap_err();
    assert_eq!(failure.problem.code, Code::Partial);
    assert_eq!(seen(&fake).await.state, State::Running);
    assert_eq!(engine.book().ledger().committed().cpus, Cpus::whole(2));
}

#[tokio::test(start_paused = true)]
async fn stop_says_which_it_was_and_is_hard_only_with_force() {
    let stubborn = serde_json::json!({"instances": [
        {"name": "web", "cpus": 1, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "stubborn": true}]});
    let (engine, fake) = engine(stubborn, CONFIG);
    let timeout = Some(SHORT);
    let view = submit(&engine, ask(Wish::Stop { timeout, force: false })).await.unwrap();
    assert_eq!(view.outcome, Outcome::Pending);
    assert_eq!(seen(&fake).await.state, State::Running);
    let view = submit(&engine, ask(Wish::Stop { timeout, force: true })).await.unwrap();
    assert_eq!(view.outcome, Outcome::Changed);
    assert!(view.notes.iter().any(|note| note.contains("hard")), "{:?}", view.notes);
    assert_eq!(seen(&fake).await.state, State::Stopped);
    let view = submit(&engine, ask(Wish::Stop { timeout, force: false })).await.unwrap();
    assert_eq!(view.outcome, Outcome::Unchanged);
}

#[tokio::test(start_paused = true)]
async fn start_passes_admission_like_a_growth() {
    let spec = serde_json::json!({"instances": [
        {"name": "web", "cpus": 4, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "stopped": true},
        {"name": "db", "cpus": 6, "memory": "1GiB", "max_cpus": 8, "max_memory": "4GiB"}]});
    let (engine, fake) = engine(spec, CONFIG);
    engine.refresh(Duration::ZERO).await;
    let failure = submit(&engine, ask(Wish::Start)).await.unwrap_err();
    assert_eq!(failure.problem.code, Code::CapacityExceeded);
    submit(&engine, resize(&serde_json::json!({"cpus": 2}), SHORT)).await.unwrap();
    submit(&engine, ask(Wish::Start)).await.unwrap();
    assert_eq!(seen(&fake).await.state, State::Running);
    assert_eq!(engine.book().ledger().committed().cpus, Cpus::whole(8));
}

#[tokio::test(start_paused = true)]
async fn concurrent_growth_never_passes_the_cap_and_uses_all_of_it() {
    let instances: Vec<_> = (0..40)
        .map(|n| serde_json::json!({"name": format!("i{n}"), "cpus": 1, "memory": "64MiB", "max_cpus": 4, "max_memory": "1GiB"}))
        .collect();
    let config = format!("{CONFIG}cpus = 44\n");
    let (engine, fake) = engine(serde_json::json!({"instances": instances, "delay_ms": 5}), &config);
    let settings = Settings {
        config: Config::parse("test", &config).unwrap(),
        access: AccessTable::new(Vec::new(), 0),
        host: HostCapacity { cpus: Cpus::whole(44), ..HOST },
        notes: Vec::new(),
    };
    engine.set_settings(settings);
    let replies = (0..40).map(|n| {
        let target = Target::Full(Ref::new(Kind::Vm, &format!("i{n}")).unwrap());
        let ask = Ask { target, ..resize(&serde_json::json!({"cpus": "+1"}), SHORT) };
        engine.reply(engine.submit(peer(), ask, None).unwrap())
    });
    let replies = futures_util::future::join_all(replies).await;
    let refused =
        replies.iter().filter(|reply| matches!(reply, Err(f) if f.problem.code == Code::CapacityExceeded)).count();
    assert_eq!((replies.iter().filter(|reply| reply.is_ok()).count(), refused), (4, 36));
    let total: u64 = fake.list().await.unwrap().iter().map(|o| o.cpus.observed.unwrap().at().unwrap().millis()).sum();
    assert_eq!(total, 44_000);
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_at_a_version_and_the_run_at_it_have_the_same_steps() {
    let (engine, fake) = engine(web(&serde_json::json!([])), CONFIG);
    let body = serde_json::json!({"cpus": "+1", "memory": "+512MiB"});
    let planned = submit(&engine, Ask { dry_run: true, ..resize(&body, SHORT) }).await.unwrap();
    assert_eq!((planned.outcome, planned.operation.clone()), (Outcome::Planned, None));
    assert_eq!(seen(&fake).await.cpus.observed, Some(Limit::At(Cpus::whole(2))));
    let if_version = planned.instance.as_ref().map(|instance| instance.version.clone());
    let done = submit(&engine, Ask { if_version: if_version.clone(), ..resize(&body, SHORT) }).await.unwrap();
    let whats = |view: &OperationView| view.steps.iter().map(|step| step.what.clone()).collect::<Vec<_>>();
    assert_eq!(whats(&planned), whats(&done));
    let late = submit(&engine, Ask { if_version, ..resize(&body, SHORT) }).await.unwrap_err();
    assert_eq!(late.problem.code, Code::VersionMismatch);
}

#[tokio::test(start_paused = true)]
async fn one_change_runs_one_waits_and_the_next_hears_busy() {
    let mut spec = web(&serde_json::json!([]));
    spec["delay_ms"] = 100.into();
    let (engine, _fake) = engine(spec, CONFIG);
    let bodies = [3, 4, 2].map(|cpus| resize(&serde_json::json!({"cpus": cpus}), SHORT));
    let replies = bodies.map(|ask| engine.reply(engine.submit(peer(), ask, None).unwrap()));
    let replies = futures_util::future::join_all(replies).await;
    assert_eq!(replies.iter().filter(|reply| reply.is_ok()).count(), 2);
    assert!(replies.iter().any(|reply| matches!(reply, Err(f) if f.problem.code == Code::Busy)));
}

#[tokio::test(start_paused = true)]
async fn one_idempotency_key_has_one_effect() {
    let mut spec = web(&serde_json::json!([]));
    spec["delay_ms"] = 20.into();
    let (engine, fake) = engine(spec, CONFIG);
    let body = serde_json::json!({"cpus": "+1"});
    let key = || Some(("key".to_owned(), "request".to_owned()));
    let replies = (0..20).map(|_| engine.reply(engine.submit(peer(), resize(&body, SHORT), key()).unwrap()));
    let replies = futures_util::future::join_all(replies).await;
    let ids: std::collections::BTreeSet<_> = replies.into_iter().map(|reply| reply.unwrap().operation).collect();
    assert_eq!(ids.len(), 1);
    assert_eq!(seen(&fake).await.cpus.observed, Some(Limit::At(Cpus::whole(3))));
    let other = engine.submit(peer(), resize(&body, SHORT), Some(("key".into(), "other".into()))).unwrap_err();
    assert_eq!(other.code, Code::IdempotencyMismatch);
}

#[tokio::test(start_paused = true)]
async fn what_is_gone_when_it_is_down_is_charged_nothing() {
    let spec = serde_json::json!({"instances": [{"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 4,
        "max_memory": "4GiB", "transient": true}]});
    let (engine, _fake) = engine(spec, CONFIG);
    let view = submit(&engine, ask(Wish::Stop { timeout: Some(SHORT), force: false })).await.unwrap();
    assert_eq!(view.outcome, Outcome::Changed);
    engine.refresh(Duration::ZERO).await;
    assert_eq!(engine.book().ledger().committed().cpus, Cpus::ZERO);
}

#[tokio::test(start_paused = true)]
async fn what_can_not_be_read_keeps_its_charge() {
    let (engine, fake) = engine(web(&serde_json::json!([])), CONFIG);
    tokio::time::sleep(SHORT).await;
    engine.refresh(Duration::ZERO).await;
    fake.blur("web", true);
    tokio::time::sleep(SHORT).await;
    engine.refresh(Duration::ZERO).await;
    assert_eq!(engine.book().ledger().committed().cpus, Cpus::whole(2));
    let settings = Settings {
        config: Config::parse("test", CONFIG).unwrap(),
        access: AccessTable::new(Vec::new(), 0),
        host: HOST,
        notes: Vec::new(),
    };
    engine.set_settings(settings);
    assert_eq!(engine.book().ledger().committed().cpus, Cpus::whole(2));
    fake.blur("web", false);
    fake.meddle("web", &Values { cpus: Some(Limit::At(Cpus::whole(1))), ..Values::default() });
    tokio::time::sleep(SHORT).await;
    engine.refresh(Duration::ZERO).await;
    assert_eq!(engine.book().ledger().committed().cpus, Cpus::whole(1));
}

#[tokio::test(start_paused = true)]
async fn a_stop_meanwhile_does_not_give_back_a_growth_of_unknown_outcome() {
    let spec = serde_json::json!({
        "instances": [{"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "stubborn": true}],
        "faults": [{"instance": "vm/web", "nth": 0, "fault": "hang"}]});
    let (engine, _fake) = engine(spec, CONFIG);
    let body = serde_json::json!({"cpus": 4, "apply": "live"});
    let failure = submit(&engine, resize(&body, SHORT)).await.unwrap_err();
    assert_eq!(failure.problem.code, Code::BackendTimeout);
    let stop = ask(Wish::Stop { timeout: Some(SHORT), force: false });
    assert_eq!(submit(&engine, stop).await.unwrap().outcome, Outcome::Pending);
    assert_eq!(engine.book().ledger().committed().cpus, Cpus::whole(4));
}

#[tokio::test(start_paused = true)]
async fn a_look_that_found_nothing_does_not_undo_a_later_one() {
    let (engine, _fake) = engine(web(&serde_json::json!([])), CONFIG);
    let early = engine.book().moment();
    engine.refresh(Duration::ZERO).await;
    let config = engine.settings().config.clone();
    engine.book().record_listing(Kind::Vm, Vec::new(), early, &config);
    assert_eq!(engine.book().ledger().charge(&instance()).cpus, Cpus::whole(2));
}

#[tokio::test(start_paused = true)]
async fn a_change_that_looked_before_another_one_ended_looks_again() {
    let (engine, fake) = engine(web(&serde_json::json!([])), CONFIG);
    let more = resize(&serde_json::json!({"cpus": "+1"}), SHORT);
    fake.slow_next_look(Duration::from_secs(5));
    let slow = engine.submit(peer(), more.clone(), None).unwrap();
    tokio::time::sleep(SHORT).await;
    submit(&engine, more).await.unwrap();
    engine.reply(slow).await.unwrap();
    assert_eq!(seen(&fake).await.cpus.observed, Some(Limit::At(Cpus::whole(4))));
}

#[tokio::test(start_paused = true)]
async fn a_plan_is_made_on_the_latest_observation() {
    let (engine, fake) = engine(web(&serde_json::json!([])), CONFIG);
    let target = Target::Full(reference());
    let if_version = Some(engine.show(&peer(), &target).await.unwrap().version);
    let seen = seen(&fake).await;
    let ask = Ask { if_version, ..resize(&serde_json::json!({"cpus": "+1"}), SHORT) };
    // A listing comes in between the look and the plan.
    fake.meddle("web", &Values { cpus: Some(Limit::At(Cpus::whole(1))), ..Values::default() });
    tokio::time::sleep(SHORT).await;
    engine.refresh(Duration::ZERO).await;
    let late = engine.plan_on(&engine.book(), &peer(), &ask, &seen).unwrap_err();
    assert_eq!(late.code, Code::VersionMismatch);
    let ask = Ask { if_version: None, ..ask };
    let (plan, _) = engine.plan_on(&engine.book(), &peer(), &ask, &seen).unwrap();
    assert_eq!(plan.targets.cpus.unwrap().requested, Limit::At(Cpus::whole(2)));
}

#[tokio::test(start_paused = true)]
async fn a_growth_beside_a_shrink_is_admitted_on_a_fresh_inventory() {
    let spec = serde_json::json!({"instances": [
        {"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 8, "max_memory": "4GiB", "used_when_asked": "99MiB"},
        {"name": "db", "cpus": 2, "memory": "1GiB", "max_cpus": 8, "max_memory": "4GiB"}]});
    let (engine, fake) = engine(spec, CONFIG);
    engine.refresh(Duration::ZERO).await;
    tokio::time::sleep(Duration::from_secs(20)).await;
    fake.meddle("db", &Values { cpus: Some(Limit::At(Cpus::whole(6))), ..Values::default() });
    let body = serde_json::json!({"cpus": 4, "memory": "512MiB"});
    let failure = submit(&engine, resize(&body, SHORT)).await.unwrap_err();
    assert_eq!(failure.problem.code, Code::CapacityExceeded);
}

#[tokio::test(start_paused = true)]
async fn refusals_are_on_record_too() {
    let (engine, _fake) = engine(web(&serde_json::json!([])), CONFIG);
    let stranger = Peer { caller: Caller { uid: 7, gid: 7, groups: Vec::new() }, ..peer() };
    let ask = resize(&serde_json::json!({"cpus": 3}), SHORT);
    let failure = engine.reply(engine.submit(stranger, ask, None).unwrap()).await.unwrap_err();
    assert_eq!(failure.problem.code, Code::Forbidden);
    let recorded = engine.operations(&peer(), Some(&reference()), 10).await.unwrap();
    assert_eq!(recorded.iter().map(|view| view.outcome).collect::<Vec<_>>(), [Outcome::Refused]);
}

#[tokio::test(start_paused = true)]
async fn a_change_is_told_as_running_before_it_is_on_record_and_waited_for_at_the_end() {
    let mut spec = web(&serde_json::json!([]));
    spec["delay_ms"] = 1000.into();
    let (engine, fake) = engine(spec, CONFIG);
    let submitted = engine.submit(peer(), resize(&serde_json::json!({"cpus": 3}), SHORT), None).unwrap();
    assert_eq!(engine.running(&submitted.id).await.unwrap().outcome, Outcome::Running);
    assert_eq!(engine.operation(&peer(), &submitted.id).await.unwrap().outcome, Outcome::Running);
    let other = Peer { who: Who { uid: 7, ..peer().who }, ..peer() };
    assert_eq!(engine.operation(&other, &submitted.id).await.unwrap_err().code, Code::NotFound);
    drop(submitted);
    engine.idle().await;
    assert_eq!(seen(&fake).await.cpus.observed, Some(Limit::At(Cpus::whole(3))));
}

#[tokio::test(start_paused = true)]
async fn a_listing_that_hangs_does_not_hold_up_a_growth_and_is_told() {
    let mut spec = web(&serde_json::json!([]));
    spec["list_ms"] = 60_000.into();
    let (engine, _fake) = engine(spec, CONFIG);
    let began = tokio::time::Instant::now();
    submit(&engine, resize(&serde_json::json!({"cpus": 3}), SHORT)).await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(engine.capacity(&peer()).await.unavailable, [Kind::Vm]);
}

#[tokio::test(start_paused = true)]
async fn one_callers_keys_push_out_nobody_elses() {
    let (engine, fake) = engine(web(&serde_json::json!([])), CONFIG);
    let more = || resize(&serde_json::json!({"cpus": "+1"}), SHORT);
    let key = |key: &str| Some((key.to_owned(), "request".to_owned()));
    engine.reply(engine.submit(peer(), more(), key("mine")).unwrap()).await.unwrap();
    let other = another();
    for n in 0..20_000 {
        engine.reply(engine.submit(other.clone(), more(), key(&n.to_string())).unwrap()).await.unwrap_err();
    }
    engine.reply(engine.submit(peer(), more(), key("mine")).unwrap()).await.unwrap();
    assert_eq!(seen(&fake).await.cpus.observed, Some(Limit::At(Cpus::whole(3))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever is asked, whichever step fails, however it fails at once: either all of it is there or none of it.
    #[test]
    fn a_plans_undo_restores_what_was_observed(
        cpus in 1_u64..5, memory in 264_u32..4096, limit in 10_u64..4000, nth in 0_usize..6, kind in 0_usize..3,
    ) {
        let fault = ["fail", "fail-after", "lie"][kind];
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let faults = serde_json::json!([{"instance": "vm/web", "nth": nth, "fault": fault}]);
            let (engine, fake) = engine(web(&faults), CONFIG);
            let before = seen(&fake).await;
            let body = serde_json::json!({"cpus": cpus, "memory": format!("{memory}MiB"),
                "cpu_limit": Cpus::from_millis(limit)});
            match submit(&engine, resize(&body, SHORT)).await {
                Err(failure) => {
                    assert_eq!(failure.problem.code, Code::BackendFailed);
                    assert_eq!(seen(&fake).await, before);
                }
                Ok(view) => {
                    // The fault lay behind the last step.
                    assert!(view.steps.len() <= nth, "{view:?}");
                    let now = seen(&fake).await;
                    assert_eq!(now.cpus.persistent, Some(Limit::At(Cpus::whole(u32::try_from(cpus).unwrap()))));
                    assert_eq!(now.memory.observed, Some(Limit::At(ByteCount::mib(memory))));
                }
            }
        });
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_caller_may_not_see_takes_no_place_on_its_page() {
    let (engine, _fake) = engine(web(&serde_json::json!([])), CONFIG);
    let partial = let_in(&engine, &[Right::Read, Right::Admin], "vm/web");
    let body = serde_json::json!({"cpus": 3});
    let made = submit(&engine, resize(&body, SHORT)).await.unwrap();
    let mut entries = Vec::new();
    for n in 0..250 {
        let other = Ref::new(Kind::Vm, "other").unwrap();
        let identity = Identity { id: "2".into(), boot: None };
        let plan = Plan::empty(other.clone(), identity, Verb::Resize);
        let mut operation = Operation::new(format!("8{n:03}"), peer().who, plan, 0);
        operation.outcome = Outcome::Changed;
        let entry = HistoryEntry { who: Some(peer().who), ..HistoryEntry::new(Happening::Change, &other, None) };
        entries.push(Entry::Operation(Box::new(operation), None));
        entries.push(Entry::History(Box::new(Told { entry, at_ms: 0, mark: n.to_string() })));
    }
    engine.store().commit(entries).await.unwrap();
    let seen = engine.operations(&partial, None, 10).await.unwrap();
    assert_eq!(seen.iter().map(|view| &view.operation).collect::<Vec<_>>(), [&made.operation]);
    let page = Page { limit: 10, ..Page::default() };
    let history = engine.history(&partial, page.clone()).await.unwrap();
    assert_eq!((history.items.len(), history.next), (1, None));
    // Who may see everything gets it page by page, nothing twice and nothing left out.
    let mut page = Page { limit: 100, ..page };
    let mut places = Vec::new();
    loop {
        let history = engine.history(&peer(), page.clone()).await.unwrap();
        places.extend(history.items.iter().map(|entry| entry.seq));
        let Some(next) = history.next else { break };
        page.before = Some(next);
    }
    assert_eq!(places, (1..=251).rev().collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn a_change_of_a_kind_that_was_switched_off_stays_as_it_was_cut_off_and_is_told_so() {
    let location = store_location();
    let store = Store::inline(location.clone(), true);
    store.load().await.unwrap();
    let plan = Plan::empty(reference(), Identity { id: "1".into(), boot: None }, Verb::Resize);
    let operation = Operation::new("1".into(), peer().who, plan, now_ms());
    let request = sha2::Sha256::digest(b"request").to_vec();
    let key = Key { uid: 0, key: "key".into(), request, operation: "1".into(), born_ms: now_ms() };
    store.commit(vec![Entry::Operation(Box::new(operation), None), Entry::Key(key)]).await.unwrap();
    let config = Config::parse("test", CONFIG).unwrap();
    let settings = Settings { config, access: AccessTable::new(Vec::new(), 0), host: HOST, notes: Vec::new() };
    let engine = Engine::new(Vec::new(), settings, Store::inline(location, false), "test".into());
    engine.restore().await.unwrap();
    let again = engine.submit(peer(), resize(&serde_json::json!({}), SHORT), Some(("key".into(), "request".into())));
    let failure = engine.reply(again.unwrap()).await.unwrap_err();
    assert_eq!(failure.problem.code, Code::BackendUnavailable);
    assert!(failure.problem.detail.contains("switched off"), "{}", failure.problem);
    assert_eq!(engine.operation(&peer(), "1").await.unwrap().outcome, Outcome::Running);
    drop(store);
}

#[tokio::test(start_paused = true)]
async fn an_id_tells_no_name_to_who_may_not_see_it() {
    let (engine, _fake) = engine(web(&serde_json::json!([])), CONFIG);
    let stranger = let_in(&engine, &[Right::Read, Right::Resize], "vm/mine");
    let by_id = Target::Full(Ref::new(Kind::Vm, "fake-web").unwrap());
    let shown = engine.show(&stranger, &by_id).await.unwrap_err();
    let ask = Ask { target: by_id, ..resize(&serde_json::json!({"cpus": 3}), SHORT) };
    let changed = engine.reply(engine.submit(stranger, ask, None).unwrap()).await.unwrap_err().problem;
    for problem in [shown, changed] {
        assert_eq!(problem.code, Code::NotFound);
        assert!(problem.detail.contains("vm/fake-web") && !problem.detail.contains("vm/web"), "{problem}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_told_of_a_change_of_unknown_outcome_is_told_again_after_a_restart() {
    let mut spec = web(&serde_json::json!([{"instance": "vm/web", "nth": 0, "fault": "hang"}]));
    spec["late_ms"] = 0.into();
    let spec: FakeSpec = serde_json::from_value(spec).unwrap();
    let fake = Arc::new(Fake::new(spec));
    let location = store_location();
    let life = |may_be_new| {
        let config = Config::parse("test", CONFIG).unwrap();
        let settings = Settings { config, access: AccessTable::new(Vec::new(), 0), host: HOST, notes: Vec::new() };
        let backends: Vec<Arc<dyn Backend>> = vec![Arc::clone(&fake) as Arc<dyn Backend>];
        Engine::new(backends, settings, Store::inline(location.clone(), may_be_new), "test".into())
    };
    let first = life(true);
    first.restore().await.unwrap();
    let key = || Some(("key".to_owned(), "request".to_owned()));
    let body = serde_json::json!({"cpus": 3});
    let told = first.reply(first.submit(peer(), resize(&body, SHORT), key()).unwrap()).await.unwrap_err();
    assert_eq!(told.problem.code, Code::BackendTimeout);
    fake.blur("web", true);
    let second = life(false);
    second.restore().await.unwrap();
    let again = second.reply(second.submit(peer(), resize(&body, SHORT), key()).unwrap()).await.unwrap_err();
    assert_eq!(again.problem, told.problem);
}

#[tokio::test(start_paused = true)]
async fn what_is_told_of_a_change_before_anybody_knows_whether_its_caller_may_shows_no_instance() {
    let (engine, fake) = engine(web(&serde_json::json!([])), CONFIG);
    engine.show(&peer(), &Target::Full(reference())).await.unwrap();
    let stranger = another();
    fake.slow_next_look(Duration::from_secs(1));
    let ask = resize(&serde_json::json!({"cpus": 3}), SHORT);
    let submitted = engine.submit(stranger.clone(), ask.clone(), None).unwrap();
    tokio::time::sleep(SHORT).await;
    let view = engine.acknowledge(&submitted, &stranger, &ask).await.unwrap();
    let found = engine.operation(&stranger, &submitted.id).await.unwrap();
    assert_eq!((view.outcome, found.outcome), (Outcome::Running, Outcome::Running));
    assert!(view.instance.is_none() && found.instance.is_none(), "{view:?} {found:?}");
    // Nobody else sees it who may not see all that is done to an instance of this name.
    for (pattern, sees) in [("vm/ci-*", false), ("vm/w*", true)] {
        let overseer = let_in(&engine, &[Right::Admin], pattern);
        let overseer = Peer { who: Who { uid: 8, ..overseer.who }, ..overseer };
        assert_eq!(engine.operation(&overseer, &submitted.id).await.is_ok(), sees, "{pattern}");
    }
    let refused = engine.reply(submitted).await.unwrap_err();
    assert_eq!(refused.problem.code, Code::Forbidden);
}

/// More than it can get live, allowed to restart for it.
fn cold() -> serde_json::Value {
    serde_json::json!({"cpus": 8, "memory": "6GiB", "cpu_limit": 1.5, "restart": "if-needed"})
}

#[tokio::test(start_paused = true)]
async fn what_cant_be_had_live_is_had_by_a_restart_where_that_is_allowed() {
    let (engine, fake) = engine(web(&serde_json::json!([])), CONFIG);
    let before = seen(&fake).await;
    let refused = submit(&engine, resize(&serde_json::json!({"cpus": 8}), SHORT)).await.unwrap_err();
    assert_eq!((refused.problem.code, refused.problem.code.exit()), (Code::RestartRequired, 9));
    // Where it isn't needed there is none.
    let live = serde_json::json!({"cpus": 3, "restart": "if-needed"});
    assert_eq!(submit(&engine, resize(&live, SHORT)).await.unwrap().steps.len(), 2);
    assert_eq!(seen(&fake).await.boot, before.boot);
    let dry = submit(&engine, Ask { dry_run: true, ..resize(&cold(), SHORT) }).await.unwrap();
    let steps: Vec<&str> = dry.steps.iter().map(|step| step.what.split_once(' ').unwrap().1).collect();
    let expected = [
        "shutdown (ACPI)",
        "defineXML up to 8 vCPUs and 6 GiB",
        "setVcpus saved 8",
        "setSchedulerParameters saved global_quota 1.5",
        "create",
    ];
    assert_eq!((steps, dry.restart), (expected.to_vec(), true));
    assert_eq!(fake.verbs("web"), 0);
    let view = submit(&engine, resize(&cold(), SHORT)).await.unwrap();
    assert_eq!((view.outcome, fake.verbs("web")), (Outcome::Changed, 2));
    let now = seen(&fake).await;
    assert_ne!(now.boot, before.boot);
    assert_eq!(
        (now.cpus.observed, now.cpus.persistent, now.cpus.ceiling),
        (Some(Limit::At(Cpus::whole(8))), Some(Limit::At(Cpus::whole(8))), Some(Cpus::whole(8)))
    );
    assert_eq!(
        (now.memory.observed, now.memory.ceiling),
        (Some(Limit::At(ByteCount::mib(6144))), Some(ByteCount::mib(6144)))
    );
    assert_eq!(engine.book().ledger().committed().cpus, Cpus::whole(8));
    // Its size is taken back live as far as that goes.
    let operation = engine.store().newest(Some("vm/web".into()), None, None, 1).await.unwrap().remove(0);
    let view = submit(&engine, ask(Wish::Undo(Box::new(operation), SHORT))).await.unwrap();
    assert_eq!((view.outcome, seen(&fake).await.cpus.observed), (Outcome::Changed, Some(Limit::At(Cpus::whole(3)))));
    assert_eq!(seen(&fake).await.boot, now.boot);
}

/// Every step of a resize by restart, failing in every way that takes effect at once.
#[tokio::test(start_paused = true)]
async fn a_restart_that_fails_at_any_step_leaves_it_running_as_it_was() {
    for fault in ["fail", "fail-after", "lie", "unavailable"] {
        for nth in 0..5 {
            let faults = serde_json::json!([{"instance": "vm/web", "nth": nth, "fault": fault}]);
            let (engine, fake) = engine(web(&faults), CONFIG);
            let before = seen(&fake).await;
            let ended = submit(&engine, resize(&cold(), SHORT)).await;
            let now = seen(&fake).await;
            let case = format!("{fault} at {nth}: {ended:?}");
            assert_eq!(now.state, State::Running, "{case}");
            assert!(engine.show(&peer(), &Target::Full(reference())).await.unwrap().holds.is_empty(), "{case}");
            // An engine that says that it failed and has started it all the same.
            if (fault, nth) == ("fail-after", 4) {
                assert_eq!(ended.unwrap().outcome, Outcome::Changed);
                continue;
            }
            let failure = ended.expect_err(&case);
            assert_eq!(failure.operation.unwrap().outcome, Outcome::RolledBack, "{case}");
            let sizes = |o: &Observed| (o.cpus.clone(), o.cpu_limit.clone(), o.memory.clone());
            assert_eq!(sizes(&now), sizes(&before), "{case}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_go_down_is_switched_off_only_where_that_is_allowed() {
    let mut spec = web(&serde_json::json!([]));
    spec["instances"][0]["stubborn"] = true.into();
    let (engine, fake) = engine(spec, CONFIG);
    let before = seen(&fake).await;
    let failure = submit(&engine, resize(&cold(), SHORT)).await.unwrap_err();
    assert_eq!((failure.problem.code, failure.problem.code.exit()), (Code::GuestSilent, 8));
    assert_eq!(seen(&fake).await, before);
    let mut forced = cold();
    forced["force"] = true.into();
    let view = submit(&engine, resize(&forced, SHORT)).await.unwrap();
    let states: Vec<StepState> = view.steps.iter().take(2).map(|step| step.state).collect();
    assert_eq!((view.outcome, states), (Outcome::Changed, vec![StepState::Failed, StepState::Done]));
    assert_eq!(seen(&fake).await.cpus.observed, Some(Limit::At(Cpus::whole(8))));
}

#[tokio::test(start_paused = true)]
async fn what_is_down_stays_down_and_what_contradicts_itself_is_refused() {
    let mut spec = web(&serde_json::json!([]));
    spec["instances"][0]["stopped"] = true.into();
    let (engine, fake) = engine(spec, CONFIG);
    let refused = submit(&engine, resize(&serde_json::json!({"cpus": 8}), SHORT)).await.unwrap_err();
    assert_eq!(refused.problem.code, Code::Unsupported);
    let view = submit(&engine, resize(&cold(), SHORT)).await.unwrap();
    assert_eq!((view.outcome, fake.verbs("web"), view.restart), (Outcome::Changed, 0, false));
    let now = seen(&fake).await;
    assert_eq!((now.state, now.cpus.persistent), (State::Stopped, Some(Limit::At(Cpus::whole(8)))));
    for (key, value) in [("apply", "live"), ("apply", "next-boot"), ("for", "2h"), ("restart", "never")] {
        let mut body = cold();
        (body["force"], body[key]) = (true.into(), value.into());
        let refused = submit(&engine, resize(&body, SHORT)).await.unwrap_err();
        assert_eq!(refused.problem.code, Code::InvalidRequest, "{key} {value}: {}", refused.problem);
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_takes_the_right_to_it_and_the_room_for_it() {
    let (engine, fake) = engine(web(&serde_json::json!([])), CONFIG);
    let other = let_in(&engine, &[Right::Read, Right::Resize], "*");
    let refused = engine.reply(engine.submit(other, resize(&cold(), SHORT), None).unwrap()).await.unwrap_err();
    assert_eq!(refused.problem.code, Code::Forbidden);
    let other = let_in(&engine, &[Right::Read, Right::Resize, Right::Power], "*");
    let mut much = cold();
    much["cpus"] = 4096.into();
    for (config, code) in
        [("[scaling]\nmax_cpus = 6\n", Code::LimitExceeded), ("reserved_cpus = 8000\n", Code::CapacityExceeded)]
    {
        let Settings { access, .. } = &*engine.settings();
        let access = access.clone();
        let config = Config::parse("test", &format!("{CONFIG}{config}")).unwrap();
        engine.set_settings(Settings {
            config,
            access,
            host: HostCapacity { cpus: Cpus::whole(8192), ..HOST },
            notes: Vec::new(),
        });
        let refused =
            engine.reply(engine.submit(other.clone(), resize(&much, SHORT), None).unwrap()).await.unwrap_err();
        assert_eq!(refused.problem.code, code, "{}", refused.problem);
    }
    assert_eq!(fake.verbs("web"), 0);
}

#[tokio::test(start_paused = true)]
async fn what_goes_down_after_its_restart_was_given_up_is_started_again_unless_somebody_wanted_it_down() {
    for wanted in [false, true] {
        let mut spec = web(&serde_json::json!([]));
        spec["instances"][0]["stubborn"] = true.into();
        let (engine, fake) = engine(spec, CONFIG);
        submit(&engine, resize(&cold(), SHORT)).await.unwrap_err();
        tokio::time::sleep(Duration::from_secs(100)).await;
        if wanted {
            // It is asked once more, by somebody who means it.
            let view = submit(&engine, ask(Wish::Stop { timeout: Some(SHORT), force: false })).await.unwrap();
            assert_eq!(view.outcome, Outcome::Pending);
        }
        fake.go_down("web");
        tokio::time::sleep(Duration::from_secs(10)).await;
        let now = seen(&fake).await;
        assert_eq!(now.state, if wanted { State::Stopped } else { State::Running });
        let newest = engine.store().newest(Some("vm/web".into()), None, None, 1).await.unwrap().remove(0);
        let expected = if wanted { "test" } else { "agentd (--restart)" };
        assert_eq!(
            (newest.who.command.as_str(), newest.outcome),
            (expected, if wanted { Outcome::Pending } else { Outcome::Changed })
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_restart_that_also_shrinks_asks_the_guest_before_its_definition() {
    let mut spec = web(&serde_json::json!([]));
    spec["instances"][0]["used"] = serde_json::Value::Null;
    spec["instances"][0]["used_when_asked"] = "200MiB".into();
    let (engine, fake) = engine(spec, CONFIG);
    let body = serde_json::json!({"cpus": 8, "memory": "512MiB", "restart": "if-needed"});
    let view = submit(&engine, resize(&body, SHORT)).await.unwrap();
    assert_eq!((view.outcome, view.restart), (Outcome::Changed, true));
    assert_eq!(seen(&fake).await.cpus.observed, Some(Limit::At(Cpus::whole(8))));
}
