//! Containers on a real Docker engine, through ctl's API: what a resize does shows in the container's own cgroup.

use std::time::Duration;

use agentd_tests::lab::{Agentd, Docker, Lab, TestNode, wait_until};
use anyhow::Result;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// Whatever the host of the test has, the caps are these.
fn config(docker: &Docker) -> String {
    format!(
        "[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\n\
         [[limit]]\nmatch = \"*\"\nunlimited = true\n",
        docker.socket().display()
    )
}

fn resize(agentd: &Agentd, name: &str, body: &Value) -> Result<(u16, Value)> {
    let reply = agentd.post(&format!("/v1/instances/container/{name}/resize"), body)?;
    Ok((reply.status, reply.json()))
}

#[test]
fn cpus_and_memory_go_up_and_back_in_one_call_and_the_cgroup_shows_it() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let agentd = Agentd::with_config(&config(&docker)).start()?;
    // One limited by NanoCPUs, one by quota and period; both with a memory-swap that equals the memory.
    let quota = ["--cpu-period", "50000", "--cpu-quota", "25000", "-m", "64m", "--memory-swap", "64m"];
    for (name, args) in [("nano", &["--cpus", "0.5", "-m", "64m", "--memory-swap", "64m"][..]), ("quota", &quota)] {
        let cgroup = docker.cgroup(&docker.run(name, args)?)?;
        let (_, period) = cgroup.cpu_quota()?;
        let (status, reply) = resize(&agentd, name, &json!({"cpus": 1.5, "memory": "128MiB"}))?;
        assert_eq!((status, &reply["outcome"]), (200, &json!("changed")), "{reply}");
        assert_eq!(reply["steps"].as_array().map(Vec::len), Some(1), "one call for all fields");
        assert_eq!(cgroup.cpu_quota()?, (Some(period * 3 / 2), period));
        assert_eq!(cgroup.memory_limit()?, Some(128 * MIB));
        let (_, reply) = resize(&agentd, name, &json!({"cpus": 1.5, "memory": "128MiB"}))?;
        assert_eq!(reply["outcome"], "unchanged");
        let (status, reply) = resize(&agentd, name, &json!({"cpus": 0.5, "memory": "64MiB"}))?;
        assert_eq!((status, &reply["outcome"]), (200, &json!("changed")), "{reply}");
        assert_eq!(cgroup.cpu_quota()?, (Some(period / 2), period));
        assert_eq!(cgroup.memory_limit()?, Some(64 * MIB));
        // Far above the memory-swap of before, in one go; then without a CPU limit.
        assert_eq!(resize(&agentd, name, &json!({"memory": "1GiB"}))?.0, 200);
        assert_eq!(cgroup.memory_limit()?, Some(1024 * MIB));
        let (status, reply) = resize(&agentd, name, &json!({"cpus": "none"}))?;
        assert_eq!(status, 200, "{reply}");
        assert_eq!(cgroup.cpu_quota()?.0, None);
    }
    Ok(())
}

#[test]
fn a_shrink_below_what_is_in_use_is_refused_with_the_numbers() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let agentd = Agentd::with_config(&config(&docker)).start()?;
    let id = docker.run_memory_eater("eater", &["--cpus", "0.5", "-m", "128m", "--memory-swap", "128m"], 64)?;
    let memory = docker.cgroup(&id)?.memory;
    wait_until("64 MiB to be in use", LIMIT, || {
        let usage = ["memory.usage_in_bytes", "memory.current"].map(|file| std::fs::read_to_string(memory.join(file)));
        let usage: u64 = usage.into_iter().flatten().next().unwrap_or_default().trim().parse()?;
        Ok((usage >= 64 * MIB).then_some(()))
    })?;
    let (status, problem) = resize(&agentd, "eater", &json!({"memory": "48MiB"}))?;
    assert_eq!((status, &problem["code"]), (422, &json!("below-minimum")), "{problem}");
    let number = |key: &str| problem[key].as_u64().unwrap_or_default();
    assert!(number("used") >= 64 * MIB && number("requested") == 48 * MIB, "{problem}");
    assert_eq!(docker.cgroup(&id)?.memory_limit()?, Some(128 * MIB));
    for (body, code) in [
        (json!({"cpus": 0.001}), "below-minimum"),
        (json!({"memory": 6 * MIB - 1}), "below-minimum"),
        (json!({"cpus": 1, "apply": "live"}), "unsupported"),
        (json!({"cpu_limit": 1}), "unsupported"),
        (json!({"memory": "none"}), "unsupported"),
        (json!({"cpus": 64}), "capacity-exceeded"),
    ] {
        assert_eq!(resize(&agentd, "eater", &body)?.1["code"], code, "{body}");
    }
    Ok(())
}

#[test]
fn stop_is_graceful_first_and_hard_only_with_force_and_start_is_admitted() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let agentd = Agentd::with_config(&config(&docker).replace("cpus = 8", "cpus = 2")).start()?;
    let obedient = "trap 'exit 0' TERM; while :; do sleep 0.1; done";
    let stubborn = "trap '' TERM; while :; do sleep 0.1; done";
    let restart = ["--cpus", "1", "-m", "64m", "--restart", "always"];
    docker.run_command("obedient", &restart, &["sh", "-c", obedient])?;
    docker.run_command("stubborn", &["--cpus", "1", "-m", "64m"], &["sh", "-c", stubborn])?;
    let post = |name: &str, verb: &str, body: &Value| -> Result<(u16, Value)> {
        let reply = agentd.post(&format!("/v1/instances/container/{name}/{verb}"), body)?;
        Ok((reply.status, reply.json()))
    };
    let (_, reply) = post("obedient", "stop", &json!({}))?;
    assert_eq!((&reply["outcome"], &reply["instance"]["state"]), (&json!("changed"), &json!("stopped")), "{reply}");
    assert!(reply["notes"].to_string().contains("by itself"), "{reply}");
    assert_eq!(post("obedient", "stop", &json!({}))?.1["outcome"], "unchanged");
    let (status, reply) = post("stubborn", "stop", &json!({"timeout": "1s"}))?;
    assert_eq!((status, &reply["outcome"], &reply["instance"]["state"]), (200, &json!("pending"), &json!("running")));
    let (_, reply) = post("stubborn", "stop", &json!({"timeout": "1s", "force": true}))?;
    assert_eq!((&reply["outcome"], &reply["instance"]["state"]), (&json!("changed"), &json!("stopped")), "{reply}");
    assert!(reply["notes"].to_string().contains("hard"), "{reply}");
    // Of 2 CPUs, 1 + 1 fit and 1 + 1.5 don't.
    assert_eq!(post("obedient", "start", &json!({}))?.1["outcome"], "changed");
    assert_eq!(resize(&agentd, "stubborn", &json!({"cpus": 1.5}))?.0, 200);
    let (status, problem) = post("stubborn", "start", &json!({}))?;
    assert_eq!((status, &problem["code"]), (429, &json!("capacity-exceeded")), "{problem}");
    docker.docker(&["pause", "obedient"])?;
    assert_eq!(post("obedient", "stop", &json!({}))?.1["code"], "invalid-state");
    Ok(())
}

#[test]
fn dockerd_may_die_and_come_back_while_agentd_runs_on() -> Result<()> {
    let lab = Lab::new()?;
    let mut docker = Docker::start(&lab)?;
    let node = TestNode::uniform(lab.dir(), 2, (2, 4), (1024, 4096))?;
    let config = format!("{}[libvirt]\nuri = \"{}\"\n", config(&docker), node.uri());
    let agentd = Agentd::with_config(&config).start()?;
    docker.run("web", &["--cpus", "0.5", "-m", "64m"])?;
    assert_eq!(resize(&agentd, "web", &json!({"cpus": 1}))?.0, 200);
    docker.kill()?;
    let (status, problem) = resize(&agentd, "web", &json!({"cpus": 2}))?;
    assert_eq!((status, &problem["code"]), (503, &json!("backend-unavailable")), "{problem}");
    let list = agentd.get("/v1/instances")?.json();
    assert_eq!(list["unavailable"], json!(["container"]));
    let vm =
        list["items"].as_array().into_iter().flatten().find(|item| item["kind"] == "vm").cloned().unwrap_or_default();
    let path = format!("/v1/instances/vm/{}/resize", vm["name"].as_str().unwrap_or_default());
    assert_eq!(agentd.post(&path, &json!({"cpus": 3}))?.status, 200);
    // A bare name may be a container's: that can't be told now.
    assert_eq!(agentd.get("/v1/instances?name=nix")?.json()["code"], "backend-unavailable");
    docker.start_again()?;
    wait_until("containers to be served again", Duration::from_secs(5), || {
        Ok((resize(&agentd, "web", &json!({"cpus": 2}))?.0 == 200).then_some(()))
    })?;
    Ok(())
}

#[test]
fn a_name_that_two_kinds_share_is_ambiguous_and_a_deleted_instance_is_gone() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let node = TestNode::uniform(lab.dir(), 1, (2, 4), (1024, 4096))?;
    let agentd = Agentd::with_config(&format!("{}[libvirt]\nuri = \"{}\"\n", config(&docker), node.uri())).start()?;
    let vm = agentd.get("/v1/instances?kind=vm")?.json()["items"][0].clone();
    let name = vm["name"].as_str().unwrap_or_default();
    let id = docker.run(name, &["--cpus", "0.5", "-m", "64m"])?;
    let by_name = || agentd.get(&format!("/v1/instances?name={name}"));
    let ambiguous = by_name()?;
    assert_eq!((ambiguous.status, &ambiguous.json()["code"]), (409, &json!("ambiguous")));
    let output = agentd.ctl(&["show", name]);
    assert_eq!(output.code, Some(6));
    assert!(output.stderr.contains(&format!("container/{name}")) && output.stderr.contains(&format!("vm/{name}")));
    // The first 12 characters of an id serve as a name.
    assert_eq!(agentd.get(&format!("/v1/instances?name={}", &id[..12]))?.json()["name"], name);
    docker.rm(name)?;
    assert_eq!(by_name()?.json()["ref"], format!("vm/{name}"));
    let gone = agentd.get(&format!("/v1/instances/container/{name}"))?;
    assert_eq!((gone.status, &gone.json()["code"]), (404, &json!("not-found")));
    assert_eq!(resize(&agentd, name, &json!({"cpus": 1}))?.0, 404);
    Ok(())
}

#[test]
fn a_container_that_is_renamed_while_it_is_changed_is_changed_whole_and_charged_once() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let agentd = Agentd::with_config(&config(&docker)).start()?;
    let cgroup = docker.cgroup(&docker.run("db", &["--cpus", "0.5", "-m", "64m", "--memory-swap", "64m"])?)?;
    let sizes = [(1.0, 96), (0.5, 64)];
    let (mut changed, mut refused, mut renamed) = (0, 0, 0);
    std::thread::scope(|scope| -> Result<()> {
        let changes = scope.spawn(|| -> Result<Vec<(u16, Value)>> {
            let mut replies = Vec::new();
            for round in 0..60 {
                let (cpus, mib) = sizes[round % 2];
                let name = if round % 4 < 2 { "db" } else { "store" };
                replies.push(resize(&agentd, name, &json!({"cpus": cpus, "memory": format!("{mib}MiB")}))?);
            }
            Ok(replies)
        });
        let mut names = ["db", "store"];
        while !changes.is_finished() {
            docker.docker(&["rename", names[0], names[1]])?;
            names.reverse();
            renamed += 1;
        }
        if names[0] == "store" {
            docker.docker(&["rename", "store", "db"])?;
        }
        let replies = changes.join().map_err(|_| anyhow::anyhow!("it panicked"))??;
        for (status, reply) in replies {
            match (status, reply["code"].as_str()) {
                (200, _) => changed += 1,
                (404, Some("not-found")) => refused += 1,
                _ => anyhow::bail!("{status} {reply}"),
            }
        }
        Ok(())
    })?;
    println!("{renamed} times renamed, {changed} changes, {refused} under a name that it had no more");
    let list = wait_until("one name", LIMIT, || {
        let list = agentd.get("/v1/instances")?.json();
        Ok((list["total"] == 1 && list["items"][0]["ref"] == "container/db").then_some(list))
    })?;
    let instance = &list["items"][0];
    assert_eq!((&instance["holds"], changed > 10), (&json!([]), true), "{instance}");
    let (cpus, memory) = (&instance["cpus"]["accepted"], &instance["memory"]["accepted"]);
    let there = (cgroup.cpu_quota()?.0, cgroup.memory_limit()?);
    let whole = [(100_000, json!(1), 96), (50_000, json!(0.5), 64)].into_iter().any(|(quota, limit, mib)| {
        there == (Some(quota), Some(mib * MIB)) && (cpus, memory) == (&limit, &json!(mib * MIB))
    });
    assert!(whole, "{there:?} {instance}");
    let capacity = agentd.get("/v1/capacity")?.json();
    assert_eq!((&capacity["cpus"]["committed"], &capacity["memory"]["committed"]), (cpus, memory), "{capacity}");
    Ok(())
}
