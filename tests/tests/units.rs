//! The cgroups that the config gives a name, on this machine's own cgroups: what a resize does shows in their files. Units of
//! systemd are tested where there is a systemd: tests/host.rs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use agentd_tests::lab::{Agentd, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// A cgroup of the test's own; dropped, it is gone with what runs in it.
struct Cgroup {
    path: String,
    process: Option<Child>,
}

impl Cgroup {
    fn make(path: &str) -> Result<Self> {
        let cgroup = Cgroup { path: format!("/agentd-test-{}-{path}", std::process::id()), process: None };
        for folder in cgroup.folders() {
            fs::create_dir_all(&folder).with_context(|| format!("{} can't be made", folder.display()))?;
        }
        Ok(cgroup)
    }

    /// Version 1 has one for each controller.
    fn folders(&self) -> Vec<PathBuf> {
        let root = Path::new("/sys/fs/cgroup");
        let roots = if unified() { vec![root.to_owned()] } else { vec![root.join("cpu"), root.join("memory")] };
        roots.into_iter().map(|root| root.join(self.path.trim_start_matches('/'))).collect()
    }

    fn read(&self, name: &str) -> Result<String> {
        let found = self.folders().into_iter().map(|folder| folder.join(name)).find(|file| file.exists());
        Ok(fs::read_to_string(found.with_context(|| format!("no {name} in {}", self.path))?)?.trim().to_owned())
    }

    /// CPUs in thousandths; `None` without a limit.
    fn cpus(&self) -> Result<Option<u64>> {
        let (quota, period) = if unified() {
            let both = self.read("cpu.max")?;
            both.split_once(' ').map(|(quota, period)| (quota.to_owned(), period.to_owned())).context("two numbers")?
        } else {
            (self.read("cpu.cfs_quota_us")?, self.read("cpu.cfs_period_us")?)
        };
        Ok(quota.parse::<u64>().ok().map(|quota| quota * 1000 / period.parse::<u64>().unwrap_or(1)))
    }

    fn memory(&self) -> Result<Option<u64>> {
        let text = self.read(if unified() { "memory.max" } else { "memory.limit_in_bytes" })?;
        Ok(text.parse::<u64>().ok().filter(|bytes| *bytes < u64::MAX / 4))
    }

    /// Runs something in it that holds this much memory.
    fn hold(&mut self, bytes: u64) -> Result<()> {
        let procs: Vec<String> =
            self.folders().iter().map(|folder| format!("echo $$ >{}/cgroup.procs", folder.display())).collect();
        let line = format!("{}; x=$(head -c {bytes} /dev/zero | tr '\\0' a); sleep 1000; echo $x", procs.join("; "));
        self.process = Some(Command::new("sh").args(["-c", &line]).spawn()?);
        Ok(())
    }

    fn remove(&mut self) {
        if let Some(mut process) = self.process.take() {
            // With what it has started, which is in the cgroup too.
            let procs = self.read("cgroup.procs").unwrap_or_default();
            let _ = Command::new("kill").arg("-9").args(procs.lines()).status();
            let _ = process.wait();
        }
        for folder in self.folders() {
            let removed = wait_until("an empty cgroup", LIMIT, || {
                Ok((!folder.exists() || fs::remove_dir(&folder).is_ok()).then_some(()))
            });
            removed.unwrap_or_else(|error| println!("{} is left behind: {error:#}", folder.display()));
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.remove();
    }
}

fn unified() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

fn config(cgroups: &[(&str, &Cgroup)], more: &str) -> String {
    let named: String = cgroups.iter().map(|(name, cgroup)| format!("{name} = \"{}\"\n", cgroup.path)).collect();
    format!("[units]\n[units.cgroups]\n{named}[capacity]\ncpus = 2\nmemory = \"2GiB\"\nreserved_memory = 0\n{more}")
}

fn resize(agentd: &Agentd, name: &str, body: &Value) -> Result<(u16, Value)> {
    let reply = agentd.post(&format!("/v1/instances/unit/{name}/resize"), body)?;
    Ok((reply.status, reply.json()))
}

#[test]
fn a_named_cgroup_is_limited_freed_and_put_back() -> Result<()> {
    let mut batch = Cgroup::make("batch")?;
    let unlimited = "[[limit]]\nmatch = \"unit/*\"\nunlimited = true\n";
    let agentd = Agentd::with_config(&config(&[("batch", &batch)], unlimited)).start()?;
    let list = agentd.get("/v1/instances?kind=unit")?.json();
    assert_eq!(
        (&list["items"][0]["ref"], &list["items"][0]["cpus"]["accepted"]),
        (&json!("unit/batch"), &json!("none"))
    );

    let (status, reply) = resize(&agentd, "batch", &json!({"cpus": 0.3, "memory": "64MiB"}))?;
    assert_eq!((status, &reply["outcome"]), (200, &json!("changed")), "{reply}");
    assert_eq!((batch.cpus()?, batch.memory()?), (Some(300), Some(64 * MIB)));
    assert_eq!(reply["instance"]["cpus"]["persistent"], Value::Null);
    ensure!(reply["notes"].to_string().contains("until it is gone"), "{reply}");
    let capacity = agentd.get("/v1/capacity")?.json();
    assert_eq!(capacity["cpus"]["committed"], json!(0.3), "{capacity}");

    // More than the host has; then away again, and back.
    let (status, reply) = resize(&agentd, "batch", &json!({"cpus": 3}))?;
    assert_eq!((status, &reply["code"]), (429, &json!("capacity-exceeded")), "{reply}");
    let (status, reply) = resize(&agentd, "batch", &json!({"cpus": "none", "memory": "none"}))?;
    assert_eq!((status, batch.cpus()?, batch.memory()?), (200, None, None), "{reply}");
    let undone = agentd.ctl(&["undo", "unit/batch"]);
    assert_eq!((undone.code, batch.cpus()?, batch.memory()?), (Some(0), Some(300), Some(64 * MIB)), "{undone:?}");

    // What is in use is not taken.
    batch.hold(30 * MIB)?;
    wait_until("the memory to be in use", LIMIT, || {
        let (_, reply) = resize(&agentd, "batch", &json!({"memory": "20MiB", "dry_run": true}))?;
        Ok((reply["code"] == "below-minimum" && reply["used"].as_u64() >= Some(30 * MIB)).then_some(()))
    })?;
    let (status, reply) = resize(&agentd, "batch", &json!({"memory": "20MiB"}))?;
    assert_eq!((status, &reply["code"], batch.memory()?), (422, &json!("below-minimum"), Some(64 * MIB)), "{reply}");

    let lent = agentd.ctl(&["resize", "unit/batch", "--cpus", "0.4", "--for", "3s"]);
    assert_eq!((lent.code, batch.cpus()?), (Some(0), Some(400)), "{lent:?}");
    for verb in ["start", "stop"] {
        let refused = agentd.ctl(&[verb, "unit/batch"]);
        assert_eq!(refused.code, if verb == "start" { Some(0) } else { Some(9) }, "{refused:?}");
    }
    // Gone, and then another one at its path.
    batch.remove();
    wait_until("it to be gone", LIMIT, || {
        Ok((agentd.get("/v1/instances/unit/batch")?.json()["state"] == "stopped").then_some(()))
    })?;
    let (status, reply) = resize(&agentd, "batch", &json!({"cpus": 1}))?;
    ensure!(status != 200 && reply.to_string().contains("there is no cgroup"), "{status} {reply}");
    for folder in batch.folders() {
        fs::create_dir_all(folder)?;
    }
    // What was lent to the other one is not taken from this one, and its changes are not taken back here.
    let undone = agentd.ctl(&["undo", "unit/batch"]);
    assert_ne!(undone.code, Some(0), "{undone:?}");
    wait_until("the loan to be over", LIMIT, || {
        Ok((agentd.get("/v1/instances/unit/batch")?.json()["loans"] == json!([])).then_some(()))
    })?;
    assert_eq!((batch.cpus()?, batch.memory()?), (None, None));
    let (status, reply) = resize(&agentd, "batch", &json!({"cpus": 1}))?;
    assert_eq!((status, batch.cpus()?), (200, Some(1000)), "{reply}");
    Ok(())
}

#[test]
fn of_nested_cgroups_the_outermost_with_a_limit_is_charged() -> Result<()> {
    let outer = Cgroup::make("outer")?;
    let inner = Cgroup::make("outer/inner")?;
    let agentd = Agentd::with_config(&config(&[("outer", &outer), ("inner", &inner)], "")).start()?;
    let committed = || -> Result<Value> { Ok(agentd.get("/v1/capacity")?.json()["cpus"]["committed"].clone()) };
    assert_eq!(resize(&agentd, "inner", &json!({"cpus": 1}))?.0, 200);
    assert_eq!(committed()?, json!(1));
    assert_eq!(resize(&agentd, "outer", &json!({"cpus": 2}))?.0, 200);
    wait_until("the inner one to be charged no more", LIMIT, || {
        agentd.get("/v1/instances?kind=unit")?;
        Ok((committed()? == json!(2)).then_some(()))
    })?;
    // It may have what it likes within the outer one's limit.
    let (status, reply) = resize(&agentd, "inner", &json!({"cpus": 2}))?;
    assert_eq!((status, inner.cpus()?), (200, Some(2000)), "{reply}");
    drop(agentd);
    drop(inner);
    drop(outer);
    Ok(())
}
