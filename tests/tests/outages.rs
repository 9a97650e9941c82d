//! Engines that are killed in the middle of changes and come back: every instance is wholly as before or as asked for, and
//! what was held for it goes on by itself.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use agentd_tests::lab::{Agentd, Docker, Domain, Lab, Libvirt, wait_until};
use agentd_tests::sim::rng::Rng;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;
const ROUNDS: usize = 5;

/// Changes these instances from one size to the other and back, all at once, until each was told no; `kill` is called
/// after a number of changes that chance tells. Gives what each was told last.
fn change_until_killed(
    agentd: &Agentd,
    references: &[String],
    sizes: &[Value; 2],
    after: usize,
    kill: impl FnOnce() -> Result<()>,
) -> Result<Vec<Value>> {
    let (done, gone_on) = (&AtomicUsize::new(0), &AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let workers: Vec<_> = references
            .iter()
            .map(|reference| {
                scope.spawn(move || -> Result<Value> {
                    for size in sizes.iter().cycle() {
                        let reply = agentd.post(&format!("/v1/instances/{reference}/resize"), size)?;
                        if reply.status != 200 {
                            gone_on.fetch_add(1, Ordering::Relaxed);
                            return Ok(reply.json());
                        }
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    unreachable!("there is always another size")
                })
            })
            .collect();
        wait_until("some changes", LIMIT, || {
            ensure!(gone_on.load(Ordering::Relaxed) == 0, "refused before anything was killed");
            Ok((done.load(Ordering::Relaxed) >= after).then_some(()))
        })?;
        kill()?;
        workers.into_iter().map(|worker| worker.join().expect("a worker")).collect()
    })
}

/// Waits until nothing recovers any more and the kind is there again; gives the instances.
fn settled(agentd: &Agentd) -> Result<Vec<Value>> {
    wait_until("recovery to end by itself", LIMIT, || {
        let list = agentd.get("/v1/instances")?.json();
        let items = list["items"].as_array().cloned().unwrap_or_default();
        let recovering = items.iter().any(|item| item["holds"].to_string().contains("recovering"));
        Ok((list["unavailable"] == json!([]) && !recovering).then_some(items))
    })
}

/// How the operations ended, once none is open any more.
fn ends(agentd: &Agentd) -> Result<BTreeMap<String, usize>> {
    wait_until("every operation to have its end on record", LIMIT, || {
        let mut ends = BTreeMap::new();
        for operation in agentd.get("/v1/operations?limit=1000")?.json()["items"].as_array().into_iter().flatten() {
            let outcome = operation["outcome"].as_str().context("an outcome")?;
            ensure!(!matches!(outcome, "running" | "unknown"), "{operation}");
            *ends.entry(outcome.to_owned()).or_default() += 1;
        }
        Ok(Some(ends))
    })
}

/// The newest operation of an instance.
fn last_of(agentd: &Agentd, reference: &str) -> Result<Value> {
    Ok(agentd.get(&format!("/v1/operations?ref={reference}&limit=1"))?.json()["items"][0].clone())
}

fn is_held(instance: &Value) -> bool {
    instance["holds"].to_string().contains("needs-attention")
}

fn clear(agentd: &Agentd, reference: &str) -> Result<()> {
    let cleared = agentd.post(&format!("/v1/instances/{reference}/clear-hold"), &json!({}))?;
    ensure!(cleared.status == 200, "{}", cleared.text());
    Ok(())
}

#[test]
fn a_dockerd_killed_in_the_middle_of_changes_leaves_none_half_done() -> Result<()> {
    let lab = Lab::new()?;
    let mut docker = Docker::start(&lab)?;
    let mut cgroups = Vec::new();
    for name in ["c1", "c2", "c3", "c4"] {
        let id = docker.run(name, &["--cpus", "0.5", "-m", "64m", "--memory-swap", "64m"])?;
        cgroups.push((format!("container/{name}"), docker.cgroup(&id)?));
    }
    let references: Vec<String> = cgroups.iter().map(|(reference, _)| reference.clone()).collect();
    let config =
        format!("[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 16\nmemory = \"8GiB\"\n", docker.socket().display());
    let agentd = Agentd::with_config(&config).start()?;
    let sizes = [json!({"cpus": 1, "memory": "96MiB"}), json!({"cpus": 0.5, "memory": "64MiB"})];
    let seed = u64::from(std::process::id());
    let mut rng = Rng::new(seed);
    println!("seed {seed}");
    for round in 0..ROUNDS {
        let after = 4 + rng.index(40);
        let last = change_until_killed(&agentd, &references, &sizes, after, || docker.kill())?;
        docker.start_again()?;
        let codes: Vec<_> = last.iter().map(|problem| problem["code"].to_string()).collect();
        let mut held = 0;
        for instance in settled(&agentd)? {
            let reference = instance["ref"].as_str().context("a reference")?;
            let (_, cgroup) = cgroups.iter().find(|(name, _)| name == reference).context("a container")?;
            let observed = (cgroup.cpu_quota()?.0, cgroup.memory_limit()?);
            let field = |name: &str| ["accepted", "observed", "persistent"].map(|side| instance[name][side].clone());
            let told = [field("cpus"), field("memory")];
            if is_held(&instance) {
                held += 1;
                println!("held: {observed:?} {}", instance["holds"]);
                clear(&agentd, reference)?;
                continue;
            }
            let whole = [(50_000, json!(0.5), 64 * MIB), (100_000, json!(1), 96 * MIB)].into_iter().any(
                |(quota, cpus, memory)| {
                    let all = |value: Value| [value.clone(), value.clone(), value];
                    observed == (Some(quota), Some(memory)) && told == [all(cpus), all(json!(memory))]
                },
            );
            ensure!(
                whole,
                "{reference} has {observed:?} after round {round}, {codes:?}: {instance}, {}",
                last_of(&agentd, reference)?
            );
        }
        ensure!(held * 2 < cgroups.len(), "{held} of {} are held after round {round}: {codes:?}", cgroups.len());
        println!("killed after {after} changes: {codes:?}, {held} held, {:?}", ends(&agentd)?);
    }
    Ok(())
}

#[test]
fn a_libvirtd_killed_in_the_middle_of_changes_leaves_none_half_done() -> Result<()> {
    let lab = Lab::new()?;
    let mut libvirt = Libvirt::start(&lab)?;
    let names = ["a", "b"];
    for name in names {
        let guest = Domain::new(name).memory(400, 512).define_and_start(&libvirt)?;
        guest.virsh("schedinfo", &["--live", "--config", "--set", "global_quota=50000"])?;
    }
    let references = names.map(|name| format!("vm/{name}"));
    let config = format!(
        "[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 16\nmemory = \"16GiB\"\n[scaling]\nmax_cpus = 16\n\
         [[limit]]\nmatch = \"*\"\nshrink_margin = \"16MiB\"\n",
        libvirt.uri()
    );
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    let sizes = [json!({"cpu_limit": 1, "memory": "450MiB"}), json!({"cpu_limit": 0.5, "memory": "400MiB"})];
    let seed = u64::from(std::process::id());
    let mut rng = Rng::new(seed);
    println!("seed {seed}");
    for round in 0..ROUNDS {
        let after = 2 + rng.index(20);
        let last = change_until_killed(&agentd, &references, &sizes, after, || libvirt.kill())?;
        libvirt.start_again()?;
        let codes: Vec<_> = last.iter().map(|problem| problem["code"].to_string()).collect();
        let mut held = 0;
        for instance in settled(&agentd)? {
            let reference = instance["ref"].as_str().context("a reference")?;
            let field = |name: &str| ["accepted", "observed", "persistent"].map(|side| instance[name][side].clone());
            if is_held(&instance) {
                held += 1;
                println!("held: {:?} {:?} {}", field("cpu_limit"), field("memory"), instance["holds"]);
                clear(&agentd, reference)?;
                continue;
            }
            let whole = [(json!(0.5), 400), (json!(1), 450)].into_iter().find(|(limit, memory)| {
                let all = |value: Value| [value.clone(), value.clone(), value];
                field("cpu_limit") == all(limit.clone()) && field("memory") == all(json!(memory * MIB))
            });
            let (limit, memory) =
                whole.with_context(|| format!("{reference} after round {round}, {codes:?}: {instance}"))?;
            // libvirt says so, too.
            let name = reference.trim_start_matches("vm/");
            let quota = if limit == 1 { 100_000 } else { 50_000 };
            for (side, xml) in [
                ("live", libvirt.virsh(&["dumpxml", name])?),
                ("saved", libvirt.virsh(&["dumpxml", "--inactive", name])?),
            ] {
                ensure!(
                    xml.contains(&format!("<currentMemory unit='KiB'>{}<", memory * 1024)),
                    "{side} {memory}: {xml}"
                );
                ensure!(xml.contains(&format!("<global_quota>{quota}<")), "{side} {quota}: {xml}");
            }
        }
        println!("killed after {after} changes: {codes:?}, {held} held, {:?}", ends(&agentd)?);
    }
    Ok(())
}
