//! What others change behind the daemon's back, on real engines: it is on record soon, with the values of before and after,
//! it makes old versions stale, and it is put back only where the config says so. What agentd does itself is no drift.

use std::time::{Duration, Instant};

use agentd_tests::lab::{Agentd, Docker, Domain, Lab, Libvirt, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(120);
/// Within this a change by hand is on record, counted from the end of the command that made it.
const SOON: Duration = Duration::from_secs(2);
const MIB: u64 = 1 << 20;

fn config(docker: Option<&Docker>, libvirt: Option<&Libvirt>, limit: &str) -> String {
    let docker = docker.map(|docker| format!("[docker]\nsocket = \"{}\"\n", docker.socket().display()));
    let libvirt = libvirt.map(|libvirt| format!("[libvirt]\nuri = \"{}\"\n", libvirt.uri()));
    format!(
        "{}{}[capacity]\ncpus = 16\nmemory = \"16GiB\"\n[scaling]\nmax_cpus = 16\n[[limit]]\nmatch = \"*\"\n\
         shrink_margin = \"16MiB\"\n{limit}",
        docker.unwrap_or_default(),
        libvirt.unwrap_or_default(),
    )
}

fn show(agentd: &Agentd, reference: &str) -> Result<Value> {
    Ok(agentd.get(&format!("/v1/instances/{reference}"))?.json())
}

/// What happened to an instance, oldest first. Asking looks at nothing.
fn history(agentd: &Agentd, reference: &str) -> Result<Vec<Value>> {
    let mut items = agentd.get(&format!("/v1/history?ref={reference}"))?.json()["items"].as_array().cloned();
    items.iter_mut().for_each(|items| items.reverse());
    items.context("a page of history")
}

fn drifts(agentd: &Agentd, reference: &str) -> Result<Vec<Value>> {
    let all = history(agentd, reference)?;
    Ok(all.into_iter().filter(|entry| entry["happening"] == "drift").collect())
}

/// What moved: field, whether saved, before, after.
type Move = (&'static str, bool, Value, Value);

/// Whether these records tell this move, in one step or several.
fn tell(records: &[Value], (field, saved, before, after): &Move) -> bool {
    let steps = records.iter().flat_map(|record| record["moves"].as_array().into_iter().flatten());
    let mut steps = steps.filter(|step| step["field"] == *field && step["saved"] == *saved);
    let first = steps.next();
    let last = steps.next_back().or(first);
    first.is_some_and(|step| step["before"] == *before) && last.is_some_and(|step| step["after"] == *after)
}

/// A change by hand is on record soon with what it moved, and the version of before is stale.
fn is_told(
    agentd: &Agentd,
    reference: &str,
    what: &str,
    change: impl FnOnce() -> Result<()>,
    moves: &[Move],
) -> Result<()> {
    let version = show(agentd, reference)?["version"].as_str().context("a version")?.to_owned();
    let known = drifts(agentd, reference)?.len();
    change().with_context(|| what.to_owned())?;
    let began = Instant::now();
    let records = || -> Result<Vec<Value>> { Ok(drifts(agentd, reference)?.split_off(known)) };
    wait_until(&format!("drift on record after {what}"), SOON, || {
        let records = records()?;
        Ok(moves.iter().all(|moved| tell(&records, moved)).then_some(()))
    })
    .with_context(|| format!("{:?}", records()))?;
    println!("{what}: on record after {:.0?}", began.elapsed());
    let path = format!("/v1/instances/{reference}/resize");
    let headers = [("Content-Type", "application/json"), ("If-Match", version.as_str())];
    let refused = agentd.http("POST", &path, &headers, br#"{"memory":"128MiB"}"#)?;
    ensure!(
        (refused.status, &refused.json()["code"]) == (412, &json!("version-mismatch")),
        "{what}: {}",
        refused.text()
    );
    ensure!(show(agentd, reference)?["version"] != version.as_str(), "{what} leaves the version as it was");
    Ok(())
}

#[test]
fn a_docker_update_is_on_record_soon_also_one_that_nobody_was_there_for() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    docker.run("db", &["--cpus", "0.5", "-m", "64m", "--memory-swap", "64m"])?;
    let agentd = Agentd::with_config(&config(Some(&docker), None, "")).start()?;
    let update = |args: &[&str]| docker.docker(&[&["update"], args, &["db"]].concat()).map(drop);
    let reference = "container/db";
    ensure!(show(&agentd, reference)?["cpus"]["accepted"] == 0.5);
    let cpus = [("cpus", false, json!(0.5), json!(0.7)), ("cpus", true, json!(0.5), json!(0.7))];
    is_told(&agentd, reference, "docker update --cpus", || update(&["--cpus", "0.7"]), &cpus)?;
    let memory =
        |before: u64, after: u64| [false, true].map(|saved| ("memory", saved, json!(before * MIB), json!(after * MIB)));
    let grow = || update(&["-m", "96m", "--memory-swap", "96m"]);
    is_told(&agentd, reference, "docker update -m", grow, &memory(64, 96))?;

    // While agentd is down.
    assert_eq!(agentd.stop()?, Some(0));
    update(&["-m", "80m", "--memory-swap", "80m"])?;
    agentd.start_again()?;
    wait_until("drift of the time in between", SOON, || {
        Ok(tell(&drifts(&agentd, reference)?[2..], &memory(96, 80)[0]).then_some(()))
    })?;
    let records = drifts(&agentd, reference)?;
    ensure!(records.len() == 3 && tell(&records[2..], &memory(96, 80)[1]), "{records:?}");
    // Killed, it has less to go by.
    agentd.kill()?;
    update(&["-m", "72m", "--memory-swap", "72m"])?;
    agentd.start_again()?;
    wait_until("drift of the time in between", SOON, || {
        Ok(tell(&drifts(&agentd, reference)?[3..], &memory(80, 72)[0]).then_some(()))
    })?;
    // It is told as what it is, and nothing is put back.
    for record in drifts(&agentd, reference)? {
        ensure!(record["who"].is_null() && record["operation"].is_null(), "{record}");
        ensure!(record["detail"].to_string().contains("left as it is"), "{record}");
    }
    let shown = show(&agentd, reference)?;
    ensure!((&shown["cpus"]["accepted"], &shown["memory"]["accepted"]) == (&json!(0.7), &json!(72 * MIB)), "{shown}");
    ensure!(history(&agentd, reference)?.iter().all(|entry| entry["happening"] != "change"), "nobody asked agentd");
    Ok(())
}

#[test]
fn what_virsh_changes_is_on_record_soon_or_with_the_next_listing() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 4).memory(256, 256).define_and_start(&libvirt)?;
    let agentd = Agentd::with_config(&config(None, Some(&libvirt), "")).inside(&lab).start()?;
    guest.wait_for("one CPU", LIMIT, |stat| stat.nproc == 1)?;
    let reference = "vm/web";
    let virsh = |command: &'static str, args: &'static [&'static str]| {
        let guest = &guest;
        move || guest.virsh(command, args).map(drop)
    };
    let balloon = [("memory", false, json!(256 * MIB), json!(200 * MIB))];
    is_told(&agentd, reference, "virsh setmem", virsh("setmem", &["200M", "--live"]), &balloon)?;
    let quota = [("cpu_limit", false, json!("none"), json!(0.5))];
    let set = virsh("schedinfo", &["--live", "--set", "global_quota=50000"]);
    is_told(&agentd, reference, "virsh schedinfo", set, &quota)?;
    let vcpus = [("cpus", false, json!(1), json!(2))];
    is_told(&agentd, reference, "virsh setvcpus --live", virsh("setvcpus", &["2", "--live"]), &vcpus)?;

    // Nothing announces what only the next start will have: the next listing shows it.
    let saved = ("cpus", true, json!(1), json!(3));
    let known = drifts(&agentd, reference)?.len();
    guest.virsh("setvcpus", &["3", "--config"])?;
    ensure!(agentd.get("/v1/instances")?.status == 200);
    wait_until("drift on record after a listing", SOON, || {
        Ok(tell(&drifts(&agentd, reference)?[known..], &saved).then_some(()))
    })?;
    // While agentd is down.
    let known = drifts(&agentd, reference)?.len();
    assert_eq!(agentd.stop()?, Some(0));
    guest.virsh("schedinfo", &["--live", "--set", "global_quota=70000"])?;
    agentd.start_again()?;
    wait_until("drift of the time in between", SOON, || {
        let quota = ("cpu_limit", false, json!(0.5), json!(0.7));
        Ok(tell(&drifts(&agentd, reference)?[known..], &quota).then_some(()))
    })?;
    ensure!(history(&agentd, reference)?.iter().all(|entry| entry["happening"] != "change"), "nobody asked agentd");
    Ok(())
}

#[test]
fn drift_is_put_back_where_the_config_says_so_and_that_is_on_record() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").define_and_start(&libvirt)?;
    let cgroup = docker.cgroup(&docker.run("db", &["--cpus", "0.5", "-m", "64m", "--memory-swap", "64m"])?)?;
    let config = config(Some(&docker), Some(&libvirt), "repair_drift = true\n");
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    ensure!(agentd.get("/v1/instances")?.json()["total"] == 2);
    let (quota, memory) = (cgroup.cpu_quota()?, cgroup.memory_limit()?);
    docker.docker(&["update", "--cpus", "0.9", "-m", "96m", "--memory-swap", "96m", "db"])?;
    guest.virsh("schedinfo", &["--live", "--set", "global_quota=50000"])?;
    let (mut at_drift, mut at_repair) = (0, 0);
    for (reference, before, after) in [("container/db", json!(0.5), json!(0.9)), ("vm/web", json!("none"), json!(0.5))]
    {
        let field = if reference == "vm/web" { "cpu_limit" } else { "cpus" };
        let entries = wait_until(&format!("{reference} to be put back"), LIMIT, || {
            let entries = history(&agentd, reference)?;
            Ok(entries.iter().any(|entry| entry["outcome"] == "changed").then_some(entries))
        })?;
        ensure!(tell(&entries[..1], &(field, false, before.clone(), after.clone())), "{entries:?}");
        ensure!(
            entries[0]["happening"] == "drift" && entries[0]["detail"].to_string().contains("put back"),
            "{entries:?}"
        );
        let repair = entries.iter().find(|entry| entry["happening"] == "change").context("a change")?;
        ensure!(repair["who"]["command"] == "agentd (repair_drift)" && repair["outcome"] == "changed", "{repair}");
        ensure!(tell(std::slice::from_ref(repair), &(field, false, after, before.clone())), "{repair}");
        ensure!(show(&agentd, reference)?[field]["observed"] == before);
        at_drift += entries.iter().filter(|entry| entry["happening"] == "drift").count();
        at_repair += entries.iter().filter(|entry| entry["happening"] == "change").count();
    }
    println!("{at_drift} records of drift, {at_repair} of repairs");
    ensure!((cgroup.cpu_quota()?, cgroup.memory_limit()?) == (quota, memory), "{:?}", cgroup.cpu_quota()?);
    Ok(())
}

#[test]
fn what_moves_again_before_it_was_put_back_goes_back_to_where_it_was_and_an_undo_passes_over_that() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let quota = ["--cpu-period", "100000", "--cpu-quota", "50000", "-m", "64m", "--memory-swap", "64m"];
    let cgroup = docker.cgroup(&docker.run("db", &quota)?)?;
    let agentd = Agentd::with_config(&config(Some(&docker), None, "repair_drift = true\n")).start()?;
    let ours = agentd.ctl(&["resize", "db", "--cpus", "0.75"]);
    ensure!(ours.code == Some(0), "{ours:?}");
    let began = Instant::now();
    // Now before the first is put back, now after, now in the middle; for longer than a repair is left alone.
    for round in 0..60_i64 {
        docker.docker(&["update", "--cpu-quota", &(90_000 + round * 1000).to_string(), "db"])?;
        std::thread::sleep(Duration::from_millis(40 * (round.unsigned_abs() % 11)));
    }
    println!("moved for {:.0?}", began.elapsed());
    wait_until("the quota to be what agentd had set", LIMIT, || {
        Ok((cgroup.cpu_quota()?.0 == Some(75_000)).then_some(()))
    })
    .with_context(|| format!("{:?} {:#?}", cgroup.cpu_quota(), history(&agentd, "container/db")))?;
    let undone = agentd.ctl(&["undo", "db"]);
    ensure!(undone.code == Some(0) && cgroup.cpu_quota()?.0 == Some(50_000), "{undone:?} {:?}", cgroup.cpu_quota()?);
    Ok(())
}

#[test]
fn what_agentd_changes_itself_is_never_drift() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 4).memory(512, 512).define_and_start(&libvirt)?;
    docker.run("db", &["--cpus", "0.5", "-m", "64m", "--memory-swap", "64m"])?;
    let agentd = Agentd::with_config(&config(Some(&docker), Some(&libvirt), "")).inside(&lab).start()?;
    let resize = |reference: &str, body: Value| -> Result<Value> {
        let reply = agentd.post(&format!("/v1/instances/{reference}/resize"), &body)?;
        ensure!(reply.status == 200, "{reference} {body}: {}", reply.text());
        Ok(reply.json())
    };
    let undo = |of: &Value| -> Result<Value> {
        let id = of["operation"].as_str().context("an operation")?;
        let reply = agentd.post(&format!("/v1/operations/{id}/undo"), &json!({}))?;
        ensure!(reply.status == 200, "undo: {}", reply.text());
        Ok(reply.json())
    };
    let both = resize("container/db", json!({"cpus": 1, "memory": "96MiB"}))?;
    undo(&both)?;
    let both = resize("vm/web", json!({"cpus": 2, "memory": "400MiB", "cpu_limit": 1.5}))?;
    ensure!(both["outcome"] == "changed", "{both}");
    guest.wait_for("two CPUs", LIMIT, |stat| stat.nproc == 2)?;
    // A balloon that goes its way long after the reply, and listings meanwhile. What it uses it has to have told before.
    wait_until("the guest to tell what it uses", LIMIT, || {
        let asked = agentd.post("/v1/instances/vm/web/resize", &json!({"memory": "300MiB", "dry_run": true}))?;
        Ok((asked.status == 200).then_some(()))
    })?;
    guest.slow(true)?;
    let slow = resize("vm/web", json!({"memory": "300MiB", "wait": "1s"}));
    ensure!(agentd.get("/v1/instances")?.status == 200);
    guest.slow(false)?;
    let slow = slow?;
    println!("the slow balloon: {}", slow["outcome"]);
    wait_until("the balloon at its target", LIMIT, || {
        let listed = agentd.get("/v1/instances?kind=vm")?.json();
        Ok((listed["items"][0]["memory"]["observed"] == 300 * MIB).then_some(()))
    })?;
    undo(&slow)?;
    wait_until("the balloon where it was", LIMIT, || {
        Ok((show(&agentd, "vm/web")?["memory"]["observed"] == 400 * MIB).then_some(()))
    })?;

    // Once what comes after all that is on record, all that would be, too.
    docker.docker(&["update", "--cpus", "0.7", "db"])?;
    guest.virsh("schedinfo", &["--live", "--set", "global_quota=70000"])?;
    for (reference, moved) in [
        ("container/db", ("cpus", false, json!(0.5), json!(0.7))),
        ("vm/web", ("cpu_limit", false, json!(1.5), json!(0.7))),
    ] {
        wait_until(&format!("the drift of {reference}"), LIMIT, || {
            Ok(drifts(&agentd, reference)?
                .last()
                .is_some_and(|last| tell(std::slice::from_ref(last), &moved))
                .then_some(()))
        })?;
        let drifts = drifts(&agentd, reference)?;
        ensure!(drifts.len() == 1, "{drifts:?}");
    }
    Ok(())
}

#[test]
fn a_host_that_was_taken_over_its_cap_by_hand_only_shrinks() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    for name in ["db", "web"] {
        let quota = ["--cpu-period", "100000", "--cpu-quota", "50000"];
        docker.run(name, &[&quota[..], &["-m", "64m", "--memory-swap", "64m"]].concat())?;
    }
    let config = config(Some(&docker), None, "").replace("cpus = 16\nmemory", "cpus = 2\nmemory");
    let agentd = Agentd::with_config(&config).start()?;
    let resize = |name: &str, cpus: f64| -> Result<(u16, Value)> {
        let reply = agentd.post(&format!("/v1/instances/container/{name}/resize"), &json!({"cpus": cpus}))?;
        Ok((reply.status, reply.json()))
    };
    ensure!(agentd.get("/v1/capacity")?.json()["cpus"]["committed"] == 1);
    docker.docker(&["update", "--cpu-quota", "300000", "db"])?;
    wait_until("the drift", SOON, || Ok((drifts(&agentd, "container/db")?.len() == 1).then_some(())))?;
    let (status, problem) = resize("web", 0.75)?;
    ensure!((status, &problem["code"]) == (429, &json!("capacity-exceeded")), "{problem}");
    let capacity = agentd.get("/v1/capacity")?.json();
    ensure!((&capacity["cpus"]["committed"], &capacity["cpus"]["over"]) == (&json!(3.5), &json!(true)), "{capacity}");
    ensure!(resize("web", 0.25)?.0 == 200, "it can shrink while the host is over its cap");
    ensure!(resize("web", 0.5)?.0 == 429, "and what it gave is not given back");
    ensure!(resize("db", 1.75)?.0 == 200);
    let capacity = agentd.get("/v1/capacity")?.json();
    ensure!((&capacity["cpus"]["committed"], &capacity["cpus"]["over"]) == (&json!(2), &json!(false)), "{capacity}");
    ensure!(resize("web", 0.5)?.0 == 429 && resize("db", 1.5)?.0 == 200 && resize("web", 0.5)?.0 == 200);
    Ok(())
}
