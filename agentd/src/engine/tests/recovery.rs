//! Changes of unknown outcome on the fake engine: what is seen of an instance that comes and goes, or can't be read, while
//! their end is looked for.

use super::*;

/// A change of `web` of which nobody knows what came, because the call on its one step did this.
async fn cut_off(ask: Ask, fault: &str) -> (Engine, Arc<Fake>, String) {
    let faults = serde_json::json!([{"instance": "vm/web", "nth": 0, "fault": fault}]);
    let (engine, fake) = engine(web(&faults), CONFIG);
    let failure = submit(&engine, ask).await.unwrap_err();
    assert_eq!(failure.problem.code, Code::BackendTimeout);
    let id = failure.operation.unwrap().operation.unwrap();
    (engine, fake, id)
}

fn more() -> Ask {
    resize(&serde_json::json!({"cpus": 4, "apply": "live"}), SHORT)
}

async fn outcome(engine: &Engine, id: &str) -> Outcome {
    engine.operation(&peer(), id).await.unwrap().outcome
}

fn committed(engine: &Engine) -> Cpus {
    engine.book().ledger().committed().cpus
}

async fn a_while() {
    tokio::time::sleep(Duration::from_secs(2)).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_gone_has_taken_its_change_with_it_and_a_stop_has_come_about() {
    let stop = ask(Wish::Stop { timeout: Some(SHORT), force: false });
    for (ask, expected) in [(more(), Outcome::Abandoned), (stop, Outcome::Changed)] {
        let (engine, fake, id) = cut_off(ask, "hang").await;
        fake.remove("web");
        a_while().await;
        assert_eq!((outcome(&engine, &id).await, committed(&engine)), (expected, Cpus::ZERO));
        assert_eq!(engine.show(&peer(), &Target::Full(reference())).await.unwrap_err().code, Code::NotFound);
    }
}

#[tokio::test(start_paused = true)]
async fn what_cant_be_read_is_held_and_charged_until_it_can() {
    let (engine, fake, id) = cut_off(more(), "hang-after").await;
    fake.blur("web", true);
    a_while().await;
    assert_eq!((outcome(&engine, &id).await, committed(&engine)), (Outcome::Unknown, Cpus::whole(4)));
    assert_eq!(submit(&engine, more()).await.unwrap_err().problem.code, Code::Held);
    fake.blur("web", false);
    a_while().await;
    assert_eq!((outcome(&engine, &id).await, committed(&engine)), (Outcome::Changed, Cpus::whole(4)));
}

#[tokio::test(start_paused = true)]
async fn what_can_be_read_no_more_once_its_end_is_found_is_told_when_it_can() {
    let (engine, fake, id) = cut_off(more(), "hang-after").await;
    // The look that finds the end; the next one is to tell what there is with it.
    fake.slow_next_look(Duration::from_secs(3));
    a_while().await;
    fake.blur("web", true);
    for _ in 0..3 {
        a_while().await;
        assert_eq!(outcome(&engine, &id).await, Outcome::Unknown);
    }
    fake.blur("web", false);
    a_while().await;
    assert_eq!((outcome(&engine, &id).await, committed(&engine)), (Outcome::Changed, Cpus::whole(4)));
}

#[tokio::test(start_paused = true)]
async fn what_is_gone_once_its_end_is_found_is_charged_nothing() {
    let (engine, fake, id) = cut_off(more(), "hang-after").await;
    fake.slow_next_look(Duration::from_secs(3));
    a_while().await;
    fake.remove("web");
    a_while().await;
    assert_eq!((outcome(&engine, &id).await, committed(&engine)), (Outcome::Changed, Cpus::ZERO));
}

#[tokio::test(start_paused = true)]
async fn what_is_remembered_of_a_kind_that_is_switched_off_is_neither_seen_nor_charged() {
    let fake = Arc::new(Fake::new(serde_json::from_value(web(&serde_json::json!([]))).unwrap()));
    let location = store_location();
    let life = |backends: Vec<Arc<dyn Backend>>, may_be_new| {
        let config = Config::parse("test", CONFIG).unwrap();
        let settings = Settings { config, access: AccessTable::new(Vec::new(), 0), host: HOST, notes: Vec::new() };
        Engine::new(backends, settings, Store::inline(location.clone(), may_be_new), "test".into())
    };
    let first = life(vec![Arc::clone(&fake) as Arc<dyn Backend>], true);
    first.restore().await.unwrap();
    submit(&first, more()).await.unwrap();
    first.end_record().await;
    for (backends, cpus) in [(vec![fake as Arc<dyn Backend>], Cpus::whole(4)), (Vec::new(), Cpus::ZERO)] {
        let next = life(backends, false);
        next.restore().await.unwrap();
        assert_eq!(committed(&next), cpus);
    }
}
