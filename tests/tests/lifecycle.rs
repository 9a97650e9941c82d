//! Start, stop, restart, suspend and resume: the table of states and verbs, whole on the fake engine and as far as it can be
//! reached on real ones; a suspension over the ends of agentd and of the engines; a wake by hand.

use std::time::Duration;

use agentd_core::instance::State;
use agentd_core::plan::Verb;
use agentd_core::plan::states::{Verdict, verdict};
use agentd_tests::lab::{Agentd, Docker, Domain, Lab, Libvirt, Response, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(120);
const CAPACITY: &str =
    "[capacity]\ncpus = 64\nmemory = \"64GiB\"\n[[limit]]\nmatch = \"*\"\nshrink_margin = \"16MiB\"\n";

fn show(agentd: &Agentd, reference: &str) -> Result<Value> {
    Ok(agentd.get(&format!("/v1/instances/{reference}"))?.json())
}

fn ask(agentd: &Agentd, reference: &str, verb: &str, body: &Value) -> Result<Response> {
    agentd.post(&format!("/v1/instances/{reference}/{verb}"), body)
}

fn state(agentd: &Agentd, reference: &str, wanted: &str) -> Result<()> {
    wait_until(&format!("{reference} to be {wanted}"), LIMIT, || {
        Ok((show(agentd, reference)?["state"] == wanted).then_some(()))
    })
}

/// The hold of a suspension; null where there is none.
fn hold(agentd: &Agentd, reference: &str) -> Result<Value> {
    let shown = show(agentd, reference)?;
    let hold = shown["holds"].as_array().context("holds")?.iter().find(|hold| hold["hold"] == "suspended").cloned();
    Ok(hold.unwrap_or_default())
}

fn suspend(agentd: &Agentd, reference: &str) -> Result<()> {
    let reply = ask(agentd, reference, "suspend", &json!({"reason": "backup"}))?;
    ensure!(reply.status == 200 && reply.json()["outcome"] == "changed", "{}", reply.text());
    ensure!(reply.json()["instance"]["state"] == "paused", "{}", reply.text());
    Ok(())
}

/// What is sent for a verb: something that it changes, hard where it may be.
fn body(reference: &str, verb: Verb, force: bool) -> Value {
    match verb {
        Verb::Suspend => json!({"reason": "the table"}),
        Verb::Stop | Verb::Restart => json!({"force": force, "timeout": "20s"}),
        // That a VM that is paused takes, too; its guest can't obey.
        Verb::Resize | Verb::Undo if reference.starts_with("vm/") => json!({"cpu_limit": 2}),
        Verb::Resize | Verb::Undo => json!({"memory": "+16MiB"}),
        Verb::Start | Verb::Resume | Verb::Prepare => json!({}),
    }
}

/// What the API says of a verb, against the table. A dry run, so that the next one finds the same state.
fn goes_by_the_table(agentd: &Agentd, reference: &str, state: State, verb: Verb) -> Result<()> {
    let case = format!("{verb} of a {state} {reference}");
    let dry = |force| -> Result<Response> {
        let mut body = body(reference, verb, force);
        body["dry_run"] = json!(true);
        ask(agentd, reference, &verb.to_string(), &body)
    };
    let (soft, hard) = (dry(false)?, dry(true)?);
    let goes = |reply: &Response| reply.status == 200 && reply.json()["outcome"] == "planned";
    let refused = |reply: &Response| (reply.status, &reply.json()["code"]) == (409, &json!("invalid-state"));
    let fits = match verdict(state, verb) {
        // What has no definition takes none; and there may be room enough in one that has.
        Verdict::Goes if verb == Verb::Prepare && !reference.starts_with("vm/") => soft.status == 422,
        Verdict::Goes if verb == Verb::Prepare => soft.status == 200 || soft.status == 422,
        Verdict::Goes => goes(&soft),
        Verdict::Already => {
            soft.status == 200 && soft.json()["outcome"] == "unchanged"
            // What is paused already is held.
            || (verb == Verb::Suspend && goes(&soft))
        }
        Verdict::GoesHard { .. } => refused(&soft) && goes(&hard),
        Verdict::Refused { .. } => refused(&soft) && refused(&hard),
    };
    ensure!(fits, "{case}: {:?}, and it says {} {}", verdict(state, verb), soft.text(), hard.text());
    Ok(())
}

#[test]
fn every_state_and_verb_goes_by_the_table() -> Result<()> {
    let vm = |state: State| {
        json!({"name": format!("in-{state}"), "cpus": 2, "memory": 1u64 << 30, "max_cpus": 8, "max_memory": 8u64 << 30,
               "used": 100 << 20, "state": state.as_str()})
    };
    let fake = json!({"instances": State::ALL.map(vm)});
    let agentd = Agentd::with_config(CAPACITY).fake(fake).start()?;
    let mut pairs = 0;
    for (state, verb) in State::ALL.into_iter().flat_map(|state| Verb::ALL.map(|verb| (state, verb))) {
        goes_by_the_table(&agentd, &format!("vm/in-{state}"), state, verb)?;
        pairs += 1;
    }
    ensure!(pairs == 49, "{pairs}");
    // And not only planned: each that goes is made.
    for (verb, from, to) in [
        ("start", "stopped", "running"),
        ("start", "crashed", "running"),
        ("restart", "running", "running"),
        ("suspend", "running", "paused"),
        ("resume", "running", "running"),
        ("stop", "running", "stopped"),
        ("resume", "paused", "running"),
    ] {
        let reference = format!("vm/in-{from}");
        let body = if verb == "suspend" { json!({"reason": "r"}) } else { json!({}) };
        let reply = ask(&agentd, &reference, verb, &body)?;
        ensure!(reply.status == 200 && reply.json()["instance"]["state"] == to, "{verb} {reference}: {}", reply.text());
    }
    Ok(())
}

#[test]
fn bad_reasons_change_nothing() -> Result<()> {
    let fake = json!({"instances": [{"name": "web", "cpus": 1, "memory": 1u64 << 30, "max_cpus": 2, "max_memory": 1u64 << 30}]});
    let agentd = Agentd::with_config(CAPACITY).fake(fake).start()?;
    for body in [
        json!({}),
        json!({"reason": ""}),
        json!({"reason": " \t"}),
        json!({"reason": "a\u{1b}[31mb"}),
        json!({"reason": "x".repeat(501)}),
    ] {
        let reply = ask(&agentd, "vm/web", "suspend", &body)?;
        ensure!((reply.status, &reply.json()["code"]) == (400, &json!("invalid-request")), "{body}: {}", reply.text());
    }
    ensure!(show(&agentd, "vm/web")?["state"] == "running");
    Ok(())
}

/// Takes one real instance through every state that it can be brought to, and tries every verb in each.
fn real_one_goes_by_the_table(agentd: &Agentd, reference: &str) -> Result<()> {
    let all = |state: State| -> Result<()> {
        Verb::ALL.into_iter().try_for_each(|verb| goes_by_the_table(agentd, reference, state, verb))
    };
    let made = |verb: &str, body: &Value| -> Result<Value> {
        let reply = ask(agentd, reference, verb, body)?;
        ensure!(reply.status == 200 && reply.json()["outcome"] == "changed", "{verb} {reference}: {}", reply.text());
        Ok(reply.json())
    };
    state(agentd, reference, "running")?;
    all(State::Running)?;
    let before = show(agentd, reference)?;
    let restarted = made("restart", &json!({"force": true, "timeout": "20s"}))?;
    ensure!(restarted["restart"] == true && restarted["instance"]["state"] == "running", "{restarted}");
    for field in ["cpus", "memory"] {
        ensure!(restarted["instance"][field]["persistent"] == before[field]["persistent"], "{restarted}");
    }
    suspend(agentd, reference)?;
    ensure!(made("resume", &json!({}))?["instance"]["state"] == "running");
    ensure!(hold(agentd, reference)?.is_null());
    // Paused by somebody else is paused, and held by nobody.
    suspend(agentd, reference)?;
    let held = ask(agentd, reference, "resize", &json!({"memory": "+16MiB"}))?;
    ensure!((held.status, &held.json()["code"]) == (409, &json!("held")), "{}", held.text());
    ensure!(held.text().contains("backup"), "{}", held.text());
    made("stop", &json!({"force": true}))?;
    let held = ask(agentd, reference, "start", &json!({}))?;
    ensure!((held.status, &held.json()["code"]) == (409, &json!("held")), "it is suspended still: {}", held.text());
    made("resume", &json!({}))?;
    all(State::Stopped)?;
    made("start", &json!({}))?;
    Ok(())
}

#[test]
fn a_real_container_goes_by_the_table_and_stays_suspended_over_every_restart() -> Result<()> {
    let lab = Lab::new()?;
    let mut docker = Docker::start(&lab)?;
    docker.run("db", &["-m", "64m", "--memory-swap", "64m", "--restart", "unless-stopped"])?;
    docker.run("once", &["--rm", "-m", "64m", "--memory-swap", "64m"])?;
    let config = format!("[docker]\nsocket = \"{}\"\n{CAPACITY}", docker.socket().display());
    let agentd = Agentd::with_config(&config).start()?;
    let reference = "container/db";
    real_one_goes_by_the_table(&agentd, reference)?;
    let gone = ask(&agentd, "container/once", "restart", &json!({}))?;
    ensure!((gone.status, &gone.json()["code"]) == (422, &json!("unsupported")), "{}", gone.text());
    ensure!(gone.text().contains("--rm"), "{}", gone.text());

    // What somebody else has paused is held as it is, and left so.
    docker.docker(&["pause", "db"])?;
    state(&agentd, reference, "paused")?;
    suspend(&agentd, reference)?;
    ensure!(ask(&agentd, reference, "resume", &json!({}))?.status == 200);
    ensure!(show(&agentd, reference)?["state"] == "paused" && hold(&agentd, reference)?.is_null());
    ensure!(ask(&agentd, reference, "resume", &json!({}))?.status == 200);
    state(&agentd, reference, "running")?;

    suspend(&agentd, reference)?;
    let before = hold(&agentd, reference)?;
    ensure!(
        (&before["reason"], &before["who"]["uid"], &before["before"])
            == (&json!("backup"), &json!(0), &json!("running")),
        "{before}"
    );
    agentd.kill()?;
    agentd.start_again()?;
    ensure!(hold(&agentd, reference)? == before && show(&agentd, reference)?["state"] == "paused");
    ensure!(agentd.stop()? == Some(0));
    docker.kill()?;
    docker.start_again()?;
    agentd.start_again()?;
    wait_until("the engine to be back", LIMIT, || Ok((show(&agentd, reference)?["state"] != "unknown").then_some(())))?;
    ensure!(hold(&agentd, reference)? == before, "{}", show(&agentd, reference)?);

    // A wake by hand is drift, and leaves the hold.
    if show(&agentd, reference)?["state"] != "paused" {
        ensure!(ask(&agentd, reference, "suspend", &json!({"reason": "backup"}))?.status == 200);
        state(&agentd, reference, "paused")?;
    }
    docker.docker(&["unpause", "db"])?;
    is_told_of_the_wake(&agentd, reference)
}

fn is_told_of_the_wake(agentd: &Agentd, reference: &str) -> Result<()> {
    let entry = wait_until("the wake on record", LIMIT, || {
        let history = agentd.get(&format!("/v1/history?ref={reference}"))?.json();
        let drift = |entry: &&Value| entry["happening"] == "drift" && entry["moves"][0]["field"] == "state";
        Ok(history["items"].as_array().and_then(|items| items.iter().find(drift)).cloned())
    })?;
    ensure!(entry["moves"][0] == json!({"field": "state", "before": "paused", "after": "running"}), "{entry}");
    ensure!(!hold(agentd, reference)?.is_null(), "what was woken is held all the same");
    // Suspended again it is as it was, and a resume gives it back.
    suspend(agentd, reference)?;
    ensure!(ask(agentd, reference, "resume", &json!({}))?.status == 200);
    state(agentd, reference, "running")
}

#[test]
fn a_real_guest_goes_by_the_table_and_stays_suspended_over_every_restart() -> Result<()> {
    let lab = Lab::new()?;
    let mut libvirt = Libvirt::start(&lab)?;
    let config = format!("[libvirt]\nuri = \"{}\"\n{CAPACITY}", libvirt.uri());
    let agentd = {
        let guest = Domain::new("web").vcpus(1, 2).memory(256, 256).define_and_start(&libvirt)?;
        let agentd = Agentd::with_config(&config).inside(&lab).start()?;
        guest.wait_for("one CPU", LIMIT, |stat| stat.nproc == 1)?;
        real_one_goes_by_the_table(&agentd, "vm/web")?;
        guest.wait_for("one CPU", LIMIT, |stat| stat.nproc == 1)?;
        suspend(&agentd, "vm/web")?;
        std::mem::forget(guest);
        agentd
    };
    let before = hold(&agentd, "vm/web")?;
    agentd.kill()?;
    libvirt.kill()?;
    libvirt.start_again()?;
    agentd.start_again()?;
    state(&agentd, "vm/web", "paused")?;
    ensure!(hold(&agentd, "vm/web")? == before && before["reason"] == "backup", "{before}");
    libvirt.virsh(&["resume", "web"])?;
    is_told_of_the_wake(&agentd, "vm/web")?;
    libvirt.virsh(&["destroy", "web"])?;
    Ok(())
}

#[test]
fn a_restart_keeps_its_share_while_it_is_down() -> Result<()> {
    let vm = |name: &str, cpus: u32, stopped: bool| json!({"name": name, "cpus": cpus, "memory": 1u64 << 30, "max_cpus": 8, "max_memory": 8u64 << 30, "stopped": stopped});
    let fake = json!({"instances": [vm("web", 3, false), vm("db", 3, true)], "delay_ms": 1500});
    let agentd = Agentd::with_config("[capacity]\ncpus = 4\nmemory = \"64GiB\"\n").fake(fake).start()?;
    let path = "/v1/instances/vm/web/restart";
    let headers = [("Content-Type", "application/json"), ("Prefer", "wait=0")];
    let accepted = agentd.http("POST", path, &headers, b"{}")?;
    ensure!(accepted.status == 202, "{}", accepted.text());
    // Whenever it is tried, the share of the one that goes down and comes up is not to be had.
    let address = format!("/v1/operations/{}", accepted.json()["operation"].as_str().context("an id")?);
    let mut tried = 0;
    while agentd.get(&address)?.json()["outcome"] == "running" {
        let refused = ask(&agentd, "vm/db", "start", &json!({}))?;
        ensure!((refused.status, &refused.json()["code"]) == (429, &json!("capacity-exceeded")), "{}", refused.text());
        tried += 1;
    }
    ensure!(tried > 2 && agentd.get(&address)?.json()["outcome"] == "changed", "tried {tried} times");
    Ok(())
}
