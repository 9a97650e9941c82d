//! `kill -9` of the daemon at every place that it reaches, and of its recoveries at every place of theirs: what is left is
//! whole, on record, and paid for.

use std::time::Duration;

use agentd_tests::kills::{Home, Kill, Life, all, sweep};
use agentd_tests::lab::{Docker, Domain, Guest, Lab, Libvirt, vcpu_threads, wait_until};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// Most of a case is waiting for the daemon's own pauses: many at once keep a small machine busy.
const AT_ONCE: usize = 40;
/// Of each that many-th case all recoveries are killed, too; `soak kills` has the time for more.
const CHAIN: u64 = 200;

#[test]
fn killed_anywhere_a_change_is_whole_or_not_at_all_and_nothing_that_was_told_is_lost() -> Result<()> {
    let tally = sweep(&all(), CHAIN, AT_ONCE)?;
    println!("{} kills, {} of them in recoveries; {:?}", tally.kills, tally.in_recovery, tally.places);
    assert!(tally.kills >= 500, "{tally:?}");
    for place in ["store: before", "store: after", "backend: before", "backend: after", "reply: before"] {
        assert!(tally.places.get(place).is_some_and(|count| *count >= 10), "{place}: {tally:?}");
    }
    Ok(())
}

const MIB: u64 = 1 << 20;
/// No change of two fields has more places than this.
const MOST_PLACES: u64 = 40;

/// One resize, killed at this place, its recovery killed too, and then left alone. Whether it was cut off, and what is on
/// record of it, where anything is.
fn cut_off(home: &Home, reference: &str, body: &Value, place: u64) -> Result<(bool, Option<Value>, Life)> {
    let life = home.start(Kill::At(place))?;
    let path = format!("/v1/instances/{reference}/resize");
    let reply = life.ask("POST", &path, &[("Content-Type", "application/json")], body.to_string().as_bytes())?;
    let was_cut_off = !life.settle(&["running", "unknown"])?;
    life.kill()?;
    let life = home.start(Kill::At(1 + place % 4))?;
    life.settle(&["running", "unknown"])?;
    life.kill()?;
    let life = home.start(Kill::Never)?;
    ensure!(life.settle(&["running", "unknown"])?, "the last life was killed by nobody");
    let operations = life.operations()?.context("it lives")?;
    ensure!(operations.len() <= 1, "{operations:?}");
    let operation = operations.into_iter().next();
    if let Some(reply) = reply {
        let (told, recorded) = (reply.json(), operation.clone().context("what was told is on record")?);
        ensure!(told["outcome"] == recorded["outcome"], "told {told}, on record {recorded}");
    }
    let list = life.get("/v1/instances")?.context("it lives")?;
    ensure!(list["items"][0]["holds"] == json!([]), "{list}; {operation:?}\n{}", home.log());
    Ok((was_cut_off, operation, life))
}

/// Whether the change was made, by what is on record.
fn was_made(operation: Option<&Value>) -> Result<bool> {
    match operation.map(|operation| operation["outcome"].as_str().unwrap_or_default()) {
        Some("changed" | "pending") => Ok(true),
        None | Some("rolled-back") => Ok(false),
        _ => bail!("{operation:?}"),
    }
}

#[test]
fn a_real_container_is_wholly_before_or_wholly_after_wherever_the_daemon_is_killed() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let id =
        docker.run("web", &["--cpu-period", "100000", "--cpu-quota", "50000", "-m", "64m", "--memory-swap", "64m"])?;
    let cgroup = docker.cgroup(&id)?;
    let config =
        format!("[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\n", docker.socket().display());
    let values = [(0.5, 50_000, 64 * MIB), (1.5, 150_000, 128 * MIB)];
    let mut now = 0;
    let (mut ends, mut kills) = ([0, 0], 0);
    for place in 1..MOST_PLACES {
        let home = Home::new(&config)?;
        let (cpus, ..) = values[1 - now];
        let memory = values[1 - now].2;
        let body = json!({"cpus": cpus, "memory": memory});
        let (was_cut_off, operation, life) = cut_off(&home, "container/web", &body, place)?;
        let made = was_made(operation.as_ref())?;
        ends[usize::from(made)] += 1;
        now = if made { 1 - now } else { now };
        let (cpus, quota, memory) = values[now];
        assert_eq!(cgroup.cpu_quota()?, (Some(quota), 100_000), "place {place}: {operation:?}");
        assert_eq!(cgroup.memory_limit()?, Some(memory), "place {place}: {operation:?}");
        let inspected = docker.docker(&["inspect", "-f", "{{.HostConfig.CpuQuota}} {{.HostConfig.Memory}}", "web"])?;
        assert_eq!(inspected, format!("{quota} {memory}"), "place {place}: {operation:?}");
        let capacity = life.get("/v1/capacity")?.context("it lives")?;
        assert_eq!(capacity["cpus"]["committed"], json!(cpus), "place {place}: {capacity}");
        assert_eq!(capacity["memory"]["committed"], memory, "place {place}: {capacity}");
        kills += home.places().len();
        if !was_cut_off {
            println!("{kills} kills over {place} places: {} undone, {} made", ends[0], ends[1]);
            assert!(ends[0] > 0 && ends[1] > 1, "some were cut off before it was done, some after: {ends:?}");
            return Ok(());
        }
    }
    bail!("it has no end")
}

#[test]
fn a_container_whose_name_goes_to_another_one_while_the_daemon_is_dead_is_found_by_its_id() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let size = |milli: u64, mib: u64| {
        let (quota, memory) = ((milli * 100).to_string(), format!("{mib}m"));
        ["--cpu-period", "100000", "--cpu-quota", &quota, "-m", &memory, "--memory-swap", &memory].map(str::to_owned)
    };
    let run = |name: &str, size: &[String]| -> Result<String> {
        docker.run(name, &size.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let cgroup = docker.cgroup(&run("web", &size(500, 64))?)?;
    let config =
        format!("[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\n", docker.socket().display());
    let values = [(500, 64), (1500, 128)];
    let (mut now, mut moved) = (0, 0);
    for place in 1..MOST_PLACES {
        let home = Home::new(&config)?;
        let (milli, mib) = values[1 - now];
        let body = json!({"cpus": f64::from(milli) / 1000.0, "memory": format!("{mib}MiB")});
        let life = home.start(Kill::At(place))?;
        let headers = [("Content-Type", "application/json")];
        life.ask("POST", "/v1/instances/container/web/resize", &headers, body.to_string().as_bytes())?;
        let was_cut_off = !life.settle(&["running", "unknown"])?;
        life.kill()?;
        // A call that was under way comes about in the engine, or is gone with its caller, before the name goes away.
        std::thread::sleep(Duration::from_millis(300));
        docker.docker(&["rename", "web", "old"])?;
        let other = docker.cgroup(&run("web", &size(250, 32))?)?;

        let life = home.start(Kill::Never)?;
        ensure!(life.settle(&["running", "unknown"])?, "it was killed by nobody");
        let operation = life.operations()?.context("it lives")?.into_iter().next();
        let made = was_made(operation.as_ref())?;
        // One that was on record with its plan, and not with its end.
        moved += usize::from(operation.as_ref().is_some_and(|operation| operation["ref"] == "container/old"));
        now = if made { 1 - now } else { now };
        let (milli, mib) = values[now];
        assert_eq!(cgroup.cpu_quota()?.0, Some(i64::from(milli) * 100), "place {place}: {operation:?}");
        assert_eq!(cgroup.memory_limit()?, Some(mib * MIB), "place {place}: {operation:?}");
        assert_eq!((other.cpu_quota()?.0, other.memory_limit()?), (Some(25_000), Some(32 * MIB)), "place {place}");
        let capacity = life.get("/v1/capacity")?.context("it lives")?;
        assert_eq!(capacity["cpus"]["committed"], json!(f64::from(milli + 250) / 1000.0), "place {place}: {capacity}");
        assert_eq!(capacity["memory"]["committed"], (mib + 32) * MIB, "place {place}: {capacity}");
        let list = life.get("/v1/instances")?.context("it lives")?;
        let held = list["items"].as_array().is_none_or(|items| items.iter().any(|item| item["holds"] != json!([])));
        ensure!(!held && list["total"] == 2, "place {place}: {list}");
        docker.rm("web")?;
        docker.docker(&["rename", "old", "web"])?;
        if !was_cut_off {
            println!("{place} places, at {moved} of them it went on under another name");
            ensure!(moved > 2, "{moved}");
            return Ok(());
        }
    }
    bail!("it has no end")
}

/// What a guest really has: vCPUs by QEMU's threads, its balloon in MiB, and both as they are saved.
fn truth(guest: &Guest<'_>) -> Result<[u64; 4]> {
    let number = |text: &str, before: &str| -> Result<u64> {
        let rest = text.split_once(before).with_context(|| format!("no {before} in {text}"))?.1;
        Ok(rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse()?)
    };
    let saved = guest.virsh("dumpxml", &["--inactive"])?;
    let saved_cpus = guest.virsh("vcpucount", &["--config", "--current"])?.trim().parse()?;
    Ok([
        vcpu_threads(guest.qemu_pid()?)?.len() as u64,
        number(&guest.virsh("dommemstat", &[])?, "actual ")? / 1024,
        saved_cpus,
        number(&saved, "<currentMemory unit='KiB'>")? / 1024,
    ])
}

#[test]
fn a_real_guest_is_wholly_before_or_wholly_after_wherever_the_daemon_is_killed() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 4).memory(384, 384).define_and_start(&libvirt)?;
    let config = format!(
        "[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 16\nmemory = \"16GiB\"\nvm_overhead = \"1MiB\"\n\
         [scaling]\nmax_cpus = 16\n[[limit]]\nmatch = \"*\"\nshrink_margin = \"16MiB\"\n",
        libvirt.uri()
    );
    let mut now = [1, 384];
    let (mut ends, mut kills) = ([0, 0], 0);
    for place in 1..MOST_PLACES {
        let home = Home::new(&config)?.inside(&lab);
        let wanted = [now[0] + 1, 384 + 320 - now[1]];
        let body = json!({"cpus": wanted[0], "memory": wanted[1] * MIB});
        let (was_cut_off, operation, life) = cut_off(&home, "vm/web", &body, place)?;
        let made = was_made(operation.as_ref())?;
        ends[usize::from(made)] += 1;
        now = if made { wanted } else { now };
        let whole = [now[0], now[1], now[0], now[1]];
        wait_until("the guest to have it whole", Duration::from_secs(20), || {
            let there = truth(&guest)?;
            ensure!(there == whole, "place {place}: {there:?} is there, {whole:?} by {operation:?}");
            Ok(Some(()))
        })?;
        let capacity = life.get("/v1/capacity")?.context("it lives")?;
        assert_eq!(capacity["cpus"]["committed"], now[0], "place {place}: {capacity}");
        assert_eq!(capacity["memory"]["committed"], (now[1] + 1) * MIB, "place {place}: {capacity}");
        kills += home.places().len();
        life.kill()?;
        if !was_cut_off {
            println!("{kills} kills over {place} places: {} undone, {} made", ends[0], ends[1]);
            assert!(ends[0] > 0 && ends[1] > 1, "some were cut off before it was done, some after: {ends:?}");
            return Ok(());
        }
        // QEMU without KVM doesn't always survive a hot-add after a removal, and the guest has room for four. A step that
        // was begun is told as failed or undone, never as planned.
        let begun =
            |steps: &Value| steps.as_array().and_then(|steps| steps.last()).is_some_and(|s| s["state"] != "planned");
        let removed = !made && operation.as_ref().is_some_and(|operation| begun(&operation["steps"]));
        if removed || now[0] >= 4 {
            guest.virsh("destroy", &[])?;
            guest.virsh("setvcpus", &["1", "--config"])?;
            guest.virsh("setmem", &["384M", "--config"])?;
            guest.start()?;
            now = [1, 384];
        }
    }
    bail!("it has no end")
}

#[test]
fn a_balloon_target_that_the_guest_has_not_begun_to_follow_is_taken_back_too() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let guest = Domain::new("web").vcpus(1, 2).memory(384, 384).define_and_start(&libvirt)?;
    let config = format!(
        "[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 4\nmemory = \"4GiB\"\n[[limit]]\nmatch = \"*\"\nshrink_margin = \"16MiB\"\n",
        libvirt.uri()
    );
    let home = Home::new(&config)?.inside(&lab);
    let life = home.start(Kill::Never)?;
    guest.slow(true)?;
    let headers = [("Content-Type", "application/json"), ("Prefer", "wait=2")];
    let body = json!({"memory": "320MiB", "wait": "5m"}).to_string();
    let reply = life.ask("POST", "/v1/instances/vm/web/resize", &headers, body.as_bytes())?.context("it lives")?;
    let last =
        |reply: &Value| reply["steps"].as_array().and_then(|steps| steps.last()).map(|step| step["state"].clone());
    let operation = reply.json();
    ensure!((reply.status, last(&operation)) == (202, Some(json!("doing"))), "{operation}");
    life.kill()?;
    let life = home.start(Kill::Never)?;
    ensure!(life.settle(&["running", "unknown"])?, "it was killed by nobody");
    let operation = life.operations()?.context("it lives")?.remove(0);
    ensure!(operation["outcome"] == "rolled-back", "{operation}");
    // What it was asked for before it follows as soon as it can.
    guest.slow(false)?;
    for _ in 0..8 {
        std::thread::sleep(Duration::from_secs(1));
        let [_, balloon, _, saved] = truth(&guest)?;
        ensure!((balloon, saved) == (384, 384), "the guest went to {balloon} MiB after {operation}");
    }
    Ok(())
}

/// A container that had a name and is gone, or goes on under another one: who has the name now is charged all the same.
#[test]
fn a_container_in_the_place_of_one_that_has_to_be_settled_is_charged_from_the_start() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let run = |name: &str, quota: &str| {
        docker.run(name, &["--cpu-period", "100000", "--cpu-quota", quota, "-m", "64m", "--memory-swap", "64m"])
    };
    let config =
        format!("[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 3\nmemory = \"8GiB\"\n", docker.socket().display());
    let headers = [("Content-Type", "application/json")];
    run("other", "50000")?;
    for (way, committed) in [(&["rm", "-f", "web"][..], json!(2.5)), (&["rename", "web", "old"], json!(3))] {
        run("web", "50000")?;
        let home = Home::new(&config)?;
        // After the intent is on record, before anything is asked of the engine.
        let life = home.start(Kill::At(3))?;
        life.ask("POST", "/v1/instances/container/web/resize", &headers, br#"{"cpus": 1}"#)?;
        life.settle(&["running", "unknown"])?;
        ensure!(home.places() == ["backend: before"], "{:?}", home.places());
        docker.docker(way)?;
        run("web", "200000")?;
        let life = home.start(Kill::Never)?;
        let began = std::time::Instant::now();
        while began.elapsed() < Duration::from_secs(4) {
            let path = "/v1/instances/container/other/resize";
            let reply = life.ask("POST", path, &headers, br#"{"cpus": 2}"#)?.context("it lives")?;
            ensure!(reply.status == 429, "{way:?}: {} {}", reply.status, reply.text());
        }
        ensure!(life.settle(&["running", "unknown"])?, "it was killed by nobody");
        let capacity = life.get("/v1/capacity")?.context("it lives")?;
        assert_eq!(capacity["cpus"]["committed"], committed, "{way:?}: {capacity}");
        life.kill()?;
        docker.rm("web")?;
    }
    Ok(())
}
