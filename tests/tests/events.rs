//! What happens, as it happens: each event once and in order, over a reader that stalls, one that comes back and an agentd that is
//! restarted; only what a caller may see.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use agentd_tests::lab::{Agentd, Docker, Lab, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

fn vm(name: &str) -> Value {
    json!({"name": name, "cpus": 1, "memory": 1u64 << 30, "max_cpus": 8, "max_memory": 8u64 << 30, "used": 100 << 20})
}

fn fake(names: &[&str], more: &str) -> Result<Agentd> {
    let instances: Vec<Value> = names.iter().map(|name| vm(name)).collect();
    let config = format!("[capacity]\ncpus = 64\nmemory = \"64GiB\"\n{more}");
    Agentd::with_config(&config).fake(json!({"instances": instances})).start()
}

fn resize(agentd: &Agentd, name: &str, cpus: u32) -> Result<()> {
    let reply = agentd.post(&format!("/v1/instances/vm/{name}/resize"), &json!({"cpus": cpus}))?;
    ensure!(reply.status == 200, "{}", reply.text());
    Ok(())
}

/// The seqs of all that is on record, the oldest first.
fn on_record(agentd: &Agentd) -> Result<Vec<u64>> {
    let mut stream = agentd.events("/v1/events?follow=false&tail=10000", &[])?;
    let mut seqs = Vec::new();
    while let Ok((id, ..)) = stream.next(LIMIT) {
        seqs.push(id.parse()?);
    }
    Ok(seqs)
}

#[test]
fn events_come_as_they_happen_filtered_and_from_any_place_on() -> Result<()> {
    let agentd = fake(&["web", "db"], "")?;
    let mut all = agentd.events("/v1/events", &[])?;
    let mut drift = agentd.events("/v1/events?type=state&match=vm/web", &[])?;
    resize(&agentd, "db", 2)?;
    resize(&agentd, "web", 2)?;
    let (first, name, data) = all.next(LIMIT)?;
    let entry: Value = serde_json::from_str(&data)?;
    ensure!((name.as_str(), &entry["ref"], &entry["seq"].to_string()) == ("change", &json!("vm/db"), &first), "{data}");
    ensure!(entry["moves"][0]["after"] == 2 && entry["who"]["uid"] == 0, "{entry}");
    ensure!(all.next(LIMIT)?.2.contains("vm/web"));
    let refused = agentd.post("/v1/instances/vm/web/resize", &json!({"cpus": 99}))?;
    ensure!(refused.status == 422 || refused.status == 429, "{}", refused.text());
    ensure!(all.next(LIMIT)?.1 == "refusal");
    // A stop is a change and a state; the filtered one hears of no more than it asked for.
    ensure!(agentd.post("/v1/instances/vm/web/stop", &json!({}))?.status == 200);
    let (id, name, data) = drift.next(LIMIT)?;
    let entry: Value = serde_json::from_str(&data)?;
    ensure!(
        name == "state" && entry["moves"] == json!([{"field": "state", "before": "running", "after": "stopped"}]),
        "{data}"
    );
    let both: BTreeSet<String> = [all.next(LIMIT)?.1, all.next(LIMIT)?.1].into();
    ensure!(both == ["change".to_owned(), "state".to_owned()].into(), "{both:?}");
    // The history tells what was done, not each state.
    let history = agentd.get("/v1/history")?.json();
    ensure!(history["items"].as_array().is_some_and(|items| items.len() == 4), "{history}");

    // Who comes back is told the rest; who was at the end, nothing.
    let mut rest = agentd.events("/v1/events?follow=false", &[("Last-Event-ID", &first)])?;
    let mut count = 0;
    while rest.next(LIMIT).is_ok() {
        count += 1;
    }
    ensure!(count == 4, "{count}");
    ensure!(agentd.events("/v1/events?follow=false", &[("Last-Event-ID", &id)])?.next(LIMIT).is_err());
    let mut tail = agentd.events("/v1/events?follow=false&tail=1&type=change", &[])?;
    ensure!(tail.next(LIMIT)?.2.contains("\"stop\"") && tail.next(LIMIT).is_err());
    // A place that this record never had.
    let (_, name, data) = agentd.events("/v1/events", &[("Last-Event-ID", "999999")])?.next(LIMIT)?;
    ensure!(name == "lost" && data.contains("999999"), "{name} {data}");
    for (path, header) in [
        ("/v1/events?type=nonsense", "1"),
        ("/v1/events?tail=1", "1"),
        ("/v1/events", "x"),
        ("/v1/events?tail=10001", ""),
    ] {
        let headers: &[(&str, &str)] = if header.is_empty() { &[] } else { &[("Last-Event-ID", header)] };
        let reply = agentd.http("GET", path, headers, b"")?;
        ensure!((reply.status, &reply.json()["code"]) == (400, &json!("invalid-request")), "{path}: {}", reply.text());
    }
    Ok(())
}

#[test]
fn a_guest_that_obeys_late_is_told_as_settled_once() -> Result<()> {
    let instances = json!([vm("web")]);
    // The stubborn one is asked to stop, and goes down a while later by itself.
    let mut fake = json!({"instances": instances});
    fake["instances"][0]["stubborn"] = json!(true);
    let agentd = Agentd::with_config("[capacity]\ncpus = 64\nmemory = \"64GiB\"\n").fake(fake).start()?;
    let mut events = agentd.events("/v1/events?type=change,settled", &[])?;
    let stop = agentd.post("/v1/instances/vm/web/stop", &json!({"timeout": "1s"}))?;
    ensure!(stop.json()["outcome"] == "pending", "{}", stop.text());
    ensure!(events.next(LIMIT)?.1 == "change");
    // Over a restart of agentd it is still waited for.
    agentd.kill()?;
    agentd.start_again()?;
    let mut events = agentd.events("/v1/events?type=change,settled", &[])?;
    ensure!(agentd.post("/v1/instances/vm/web/stop", &json!({"timeout": "1s", "force": true}))?.status == 200);
    // It was superseded by the hard stop, and only that is told.
    ensure!(events.next(LIMIT)?.1 == "change");
    ensure!(events.next(Duration::from_secs(3)).is_err(), "one that was superseded has not settled");
    Ok(())
}

/// Who stalls is dropped, and finds each event once when it comes back by the last that it has seen. `AGENTD_EVENTS_PAUSE` says for how
/// many seconds it stalls at least, `AGENTD_EVENTS_RATE` how many events
/// there are a second.
#[test]
fn a_reader_that_stalls_loses_its_connection_and_no_event() -> Result<()> {
    let pause = std::env::var("AGENTD_EVENTS_PAUSE").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let pause = Duration::from_secs(pause);
    let rate = std::env::var("AGENTD_EVENTS_RATE").ok().and_then(|text| text.parse().ok()).unwrap_or(200);
    let flapping = |number: usize| {
        let mut vm = vm(&format!("vm{number}"));
        vm["flaps"] = json!(true);
        vm
    };
    let instances: Vec<Value> = (0..rate / 4).map(flapping).collect();
    let config = "[capacity]\ncpus = 64000\nmemory = \"64000GiB\"\n";
    let agentd = Agentd::with_config(config).fake(json!({"instances": instances})).start()?;
    let mut stalled = agentd.events("/v1/events", &[])?;
    let mut brisk = agentd.events("/v1/events", &[])?;
    let over = AtomicBool::new(false);
    // Each listing finds all of them in another state.
    let make = || -> Result<()> {
        while !over.load(Ordering::Relaxed) {
            let began = Instant::now();
            ensure!(agentd.get("/v1/instances?limit=1")?.status == 200);
            std::thread::sleep(Duration::from_millis(250).saturating_sub(began.elapsed()));
        }
        Ok(())
    };
    let mut slowest = Duration::ZERO;
    let read = std::thread::scope(|scope| -> Result<(Vec<u64>, Vec<u64>)> {
        let maker = scope.spawn(make);
        let quick = scope.spawn(|| {
            let mut seqs: Vec<u64> = Vec::new();
            while let Ok((id, ..)) = brisk.next(Duration::from_secs(5)) {
                seqs.extend(id.parse::<u64>());
            }
            seqs
        });
        let mut seqs: Vec<u64> = vec![stalled.next(LIMIT)?.0.parse()?];
        let began = Instant::now();
        // It takes a while until the socket takes no more.
        while began.elapsed() < pause || !agentd.log().contains("a reader of events was dropped") {
            ensure!(began.elapsed() < pause + LIMIT, "it is not dropped");
            let asked = Instant::now();
            ensure!(agentd.get("/v1/capacity")?.status == 200);
            slowest = slowest.max(asked.elapsed());
            std::thread::sleep(Duration::from_millis(200));
        }
        let stalled_for = began.elapsed();
        // What was on its way to it comes, then why there is no more, then the end.
        let mut dropped = false;
        loop {
            match stalled.next(LIMIT) {
                Ok((_, event, _)) if event == "dropped" => dropped = true,
                Ok((id, ..)) => seqs.push(id.parse()?),
                Err(_) => break,
            }
        }
        over.store(true, Ordering::Relaxed);
        maker.join().map_err(|_| anyhow::anyhow!("a client broke"))??;
        ensure!(dropped, "after {} events nobody said why", seqs.len());
        println!(
            "stalled for {stalled_for:.0?}, dropped after {} events; slowest other reply {slowest:.0?}",
            seqs.len()
        );
        let brisk = quick.join().map_err(|_| anyhow::anyhow!("a reader broke"))?;
        Ok((seqs, brisk))
    })?;
    let (mut seqs, brisk) = read;
    let last = seqs.last().context("some were read")?.to_string();
    let mut rest = agentd.events("/v1/events?follow=false", &[("Last-Event-ID", &last)])?;
    while let Ok((id, ..)) = rest.next(LIMIT) {
        seqs.push(id.parse()?);
    }
    println!(
        "{} events, {} of them from where it was",
        seqs.len(),
        seqs.len() - seqs.iter().position(|seq| seq.to_string() == last).unwrap_or(0)
    );
    let begin = seqs[0];
    let made: Vec<u64> = (begin..=*seqs.last().context("the last")?).collect();
    ensure!(seqs == made, "{} events were seen, there were {}", seqs.len(), made.len());
    // One that takes them as they come is never dropped.
    let brisk: Vec<u64> = brisk.into_iter().filter(|seq| *seq >= begin).collect();
    ensure!(brisk == made, "{} of {}", brisk.len(), made.len());
    Ok(())
}

#[test]
fn ctl_events_goes_on_over_a_restart_of_agentd_one_line_an_event() -> Result<()> {
    let agentd = fake(&["web"], "")?;
    let mut command = agentd.ctl_command()?;
    command.args(["events", "-f", "--type", "change", "-o", "json"]).stdout(Stdio::piped()).stderr(Stdio::null());
    // What happened before it has begun is not its business, so it is asked for from the beginning.
    command.args(["--after", "0"]);
    let mut ctl = command.spawn()?;
    let mut lines = BufReader::new(ctl.stdout.take().context("a pipe")?).lines();
    let mut next = || -> Result<Value> { Ok(serde_json::from_str(&lines.next().context("a line")??)?) };
    resize(&agentd, "web", 2)?;
    ensure!(next()?["moves"][0]["after"] == 2);
    agentd.kill()?;
    agentd.start_again()?;
    resize(&agentd, "web", 3)?;
    ensure!(agentd.stop()? == Some(0));
    agentd.start_again()?;
    resize(&agentd, "web", 4)?;
    ensure!(next()?["moves"][0]["after"] == 3 && next()?["moves"][0]["after"] == 4);
    ctl.kill()?;
    ctl.wait()?;
    let shown = agentd.ctl(&["events", "--tail", "1", "--type", "change"]);
    ensure!(shown.code == Some(0) && shown.stdout.lines().count() == 1 && shown.stdout.contains("→ 4"), "{shown:?}");
    Ok(())
}

#[test]
fn a_container_that_comes_goes_and_fails_is_heard_of() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    docker.run("db", &["-m", "64m"])?;
    let config =
        format!("[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\n", docker.socket().display());
    let agentd = Agentd::with_config(&config).start()?;
    ensure!(agentd.get("/v1/instances")?.json()["total"] == 1);
    let mut events = agentd.events("/v1/events?kind=container&type=state", &[])?;
    let mut hears = |name: &str, before: Value, after: Value| -> Result<()> {
        // On its way it may be seen in a state between.
        let mut from = Value::Null;
        loop {
            let (_, _, data) = events.next(LIMIT)?;
            let entry: Value = serde_json::from_str(&data)?;
            ensure!(entry["ref"] == format!("container/{name}") && entry["who"].is_null(), "{entry}");
            from = if from.is_null() { json!([entry["moves"][0]["before"]]) } else { from };
            if entry["moves"][0]["after"] == after {
                ensure!(from == json!([before]), "{entry}");
                return Ok(());
            }
        }
    };
    docker.docker(&["pause", "db"])?;
    hears("db", json!("running"), json!("paused"))?;
    docker.docker(&["unpause", "db"])?;
    hears("db", json!("paused"), json!("running"))?;
    docker.run("new", &["-m", "64m"])?;
    hears("new", Value::Null, json!("running"))?;
    docker.rm("db")?;
    hears("db", json!("running"), Value::Null)?;
    Ok(())
}

#[test]
fn nobody_hears_of_what_its_rules_dont_show() -> Result<()> {
    let rules = "[[access]]\nuser = \"nobody\"\nallow = [\"read\", \"resize\"]\nmatch = \"vm/w*\"\n";
    let agentd = fake(&["web", "db"], rules)?;
    let socket = agentd.socket();
    wait_until("the socket", LIMIT, || Ok(socket.exists().then_some(())))?;
    for name in ["web", "db"] {
        resize(&agentd, name, 2)?;
        ensure!(agentd.post(&format!("/v1/instances/vm/{name}/stop"), &json!({}))?.status == 200);
    }
    ensure!(on_record(&agentd)?.len() == 6);
    std::os::unix::fs::chown(&socket, Some(65534), None)?;
    std::fs::set_permissions(agentd.folder(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let output = std::process::Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "curl", "-s", "--unix-socket"])
        .arg(&socket)
        .arg("http://localhost/v1/events?follow=false&tail=100")
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    // What it may see went into another state by itself; who else has changed it is for those with the right `admin`.
    let events: Vec<&str> = text.lines().filter(|line| line.starts_with("data: ")).collect();
    ensure!(events.len() == 1 && events[0].contains("vm/web") && events[0].contains("stopped"), "{text}");
    Ok(())
}
