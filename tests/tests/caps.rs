//! The caps over all kinds together, under concurrency: containers of a real Docker engine and VMs of libvirt's test driver
//! under one ledger, asked by forty `ctl` at once.

use std::collections::BTreeMap;
use std::process::Stdio;

use agentd_tests::lab::{Agentd, Docker, Lab, TestNode};
use anyhow::Result;
use serde_json::{Value, json};

const EACH: usize = 20;

#[test]
fn of_forty_that_ask_for_one_more_at_once_exactly_as_many_succeed_as_fit() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    // Each has 0.5 CPUs; a host of 2 CPUs lets a container grow to 1.5.
    for number in 0..EACH {
        docker.run(&format!("c{number}"), &["--cpus", "0.5", "-m", "16m"])?;
    }
    let node = TestNode::uniform(lab.dir(), EACH, (1, 4), (256, 1024))?;
    // 20 × 0.5 + 20 × 1 are committed; there is room for 4 more.
    let config = format!(
        "[docker]\nsocket = \"{}\"\n[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 34\nmemory = \"64GiB\"\n\
         [scaling]\nmax_cpus = 4\n",
        docker.socket().display(),
        node.uri()
    );
    let agentd = Agentd::with_config(&config).start()?;
    let list = agentd.get("/v1/instances")?.json();
    let references: Vec<String> = list["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|item| item["ref"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(references.len(), 2 * EACH);
    let committed = || -> Result<Value> { Ok(agentd.get("/v1/capacity")?.json()["cpus"]["committed"].clone()) };
    assert_eq!(committed()?, 30);

    let children = references.iter().map(|reference| {
        let mut command = agentd.ctl_command()?;
        command.args(["resize", reference, "--cpus", "+1"]).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command.spawn()?)
    });
    let children: Vec<_> = children.collect::<Result<_>>()?;
    let mut exits: BTreeMap<i32, usize> = BTreeMap::new();
    for child in children {
        let output = child.wait_with_output()?;
        let code = output.status.code().unwrap_or(-1);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(code == 0 || said.contains("capacity-exceeded"), "{code}: {said}");
        *exits.entry(code).or_default() += 1;
    }
    assert_eq!(exits, BTreeMap::from([(0, 4), (4, 36)]));

    // What the engines report adds up, and so does the ledger: the containers' own cgroups, and libvirt's counts.
    assert_eq!(committed()?, 34);
    let mut quotas = 0;
    for number in 0..EACH {
        let id = docker.docker(&["inspect", "-f", "{{.Id}}", &format!("c{number}")])?;
        quotas += docker.cgroup(id.trim())?.cpu_quota()?.0.unwrap_or_default();
    }
    let vms = agentd.get("/v1/instances?kind=vm")?.json();
    let counted: u64 =
        vms["items"].as_array().into_iter().flatten().filter_map(|vm| vm["cpus"]["observed"].as_u64()).sum();
    assert_eq!(u64::try_from(quotas)? + counted * 100_000, 34 * 100_000);
    // Nothing is left of the refusals, and what shrinks makes room again.
    let grown = vms["items"].as_array().into_iter().flatten().find(|vm| vm["cpus"]["observed"] == 2);
    if let Some(name) = grown.and_then(|vm| vm["name"].as_str()) {
        let path = format!("/v1/instances/vm/{name}/resize");
        assert_eq!(agentd.post(&path, &json!({"cpus": 1}))?.status, 200);
        assert_eq!(committed()?, 33);
        assert_eq!(agentd.post(&path, &json!({"cpus": "+1"}))?.status, 200);
        assert_eq!(agentd.post(&path, &json!({"cpus": "+1"}))?.status, 429);
    }
    Ok(())
}

#[test]
fn a_limits_total_binds_vms_and_containers_that_it_matches_together() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    docker.run("ci-c", &["--cpus", "1", "-m", "64m", "--label", "team=ci"])?;
    docker.run("other", &["--cpus", "0.5", "-m", "64m"])?;
    let node = TestNode::uniform(lab.dir(), 1, (1, 4), (256, 1024))?;
    let config = format!(
        "[docker]\nsocket = \"{}\"\n[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 64\nmemory = \"64GiB\"\n\
         [scaling]\nmax_cpus = 4\n[[limit]]\nmatch = \"*\"\ntotal_cpus = 4\n[[limit]]\nmatch = \"label:team=ci\"\nmax_cpus = 1.5\n",
        docker.socket().display(),
        node.uri()
    );
    let agentd = Agentd::with_config(&config).start()?;
    let resize = |reference: &str, cpus: &str| agentd.ctl(&["resize", reference, "--cpus", cpus]);
    let output = resize("container/ci-c", "2");
    assert_eq!(output.code, Some(4), "{output:?}");
    assert!(output.stderr.contains("limit-exceeded") && output.stderr.contains("1.5"), "{output:?}");
    assert_eq!(resize("container/ci-c", "1.5").code, Some(0));
    assert_eq!(resize("container/other", "1").code, Some(0));
    let vm = agentd.get("/v1/instances?kind=vm")?.json()["items"][0]["ref"].as_str().unwrap_or_default().to_owned();
    let output = resize(&vm, "2");
    assert_eq!(output.code, Some(4), "{output:?}");
    assert!(output.stderr.contains("3.5 are committed") && output.stderr.contains("total_cpus"), "{output:?}");
    assert_eq!(resize("container/other", "0.5").code, Some(0));
    assert_eq!(resize(&vm, "2").code, Some(0));
    Ok(())
}
