//! What was lent for a time (`--for`) goes back by itself: on time, on a full host, over a kill of the daemon; and not where
//! somebody has changed it since.

use std::fs;
use std::time::{Duration, Instant};

use agentd_tests::lab::{Agentd, Docker, Lab, wait_until};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

const LIMIT: Duration = Duration::from_secs(60);
/// The host is full once `web` has grown.
const CONFIG: &str = "[capacity]\ncpus = 6\nmemory = \"64GiB\"\n[scaling]\nmax_cpus = 16\nmax_memory = \"32GiB\"\n";

struct Bench {
    agentd: Agentd,
    _folder: TempDir,
}

impl Bench {
    fn new(extra: &Value) -> Result<Bench> {
        let folder = tempfile::tempdir()?;
        let vm = |name: &str| json!({"name": name, "cpus": 2, "memory": 1u64 << 30, "max_cpus": 8, "max_memory": 8u64 << 30, "used": 100 << 20});
        let mut spec = json!({"instances": [vm("web"), vm("db")], "state": folder.path().join("engine.json")});
        for (member, value) in extra.as_object().into_iter().flatten() {
            spec[member] = value.clone();
        }
        let file = folder.path().join("fake.json");
        fs::write(&file, spec.to_string())?;
        let agentd = Agentd::with_config(CONFIG).folder(folder.path()).env("AGENTD_FAKE", &file.to_string_lossy());
        Ok(Bench { agentd: agentd.start()?, _folder: folder })
    }

    fn ctl(&self, line: &str) -> (Option<i32>, String) {
        let output = self.agentd.ctl(&line.split(' ').collect::<Vec<_>>());
        (output.code, output.stdout + &output.stderr)
    }

    fn web(&self) -> Result<Value> {
        Ok(self.agentd.get("/v1/instances/vm/web")?.json())
    }

    /// Waits until it has that many CPUs and nothing lent.
    fn is_back(&self, cpus: u64) -> Result<()> {
        wait_until("what was lent to be back", LIMIT, || {
            let web = self.web()?;
            Ok((web["cpus"]["accepted"] == cpus && web["loans"] == json!([])).then_some(()))
        })
    }
}

#[test]
fn growth_for_a_time_goes_back_by_itself_on_a_full_host_too() -> Result<()> {
    let bench = Bench::new(&json!({}))?;
    let began = Instant::now();
    let (code, text) = bench.ctl("resize web --cpus +2 --for 3s");
    ensure!(code == Some(0) && text.contains("live only") && text.contains("goes back by itself after 3s"), "{text}");
    ensure!(bench.ctl("resize db --cpus +1").0 == Some(4), "the host is full");
    let web = bench.web()?;
    assert_eq!((&web["cpus"]["accepted"], &web["cpus"]["persistent"]), (&json!(4), &json!(2)), "{web}");
    assert_eq!(web["loans"][0]["fields"], json!(["cpus"]));
    ensure!(bench.ctl("show web").1.contains("goes back"), "{}", bench.ctl("show web").1);
    bench.is_back(2)?;
    ensure!(began.elapsed() >= Duration::from_secs(3), "too early: {:?}", began.elapsed());
    let (_, history) = bench.ctl("history web");
    ensure!(history.contains("agentd (--for)"), "{history}");
    // Only growth is lent, and only to what runs.
    for (line, code) in [
        ("resize web --cpus 1 --for 3s", 2),
        ("resize web --cpus 3 --for 0s", 2),
        ("resize web --cpus 3 --for soon", 2),
        ("resize web --cpus 3 --for 3s --next-boot", 2),
    ] {
        let (found, text) = bench.ctl(line);
        ensure!(found == Some(code), "{line}: {found:?} {text}");
    }
    Ok(())
}

#[test]
fn a_loan_outlives_the_daemon() -> Result<()> {
    let bench = Bench::new(&json!({}))?;
    ensure!(bench.ctl("resize web --cpus 4 --for 5s").0 == Some(0));
    bench.agentd.kill()?;
    bench.agentd.start_again()?;
    assert_eq!(bench.web()?["loans"].as_array().map(Vec::len), Some(1));
    bench.is_back(2)?;
    // One that is over while nobody is there goes back at once.
    ensure!(bench.ctl("resize web --cpus 4 --for 2s").0 == Some(0));
    bench.agentd.kill()?;
    std::thread::sleep(Duration::from_secs(3));
    bench.agentd.start_again()?;
    bench.is_back(2)
}

#[test]
fn a_later_change_an_undo_and_a_hold_have_their_say() -> Result<()> {
    let bench = Bench::new(&json!({}))?;
    // A later change of the field cancels it, one of another field doesn't.
    ensure!(bench.ctl("resize web --cpus 4 --for 3s").0 == Some(0));
    ensure!(bench.ctl("resize web --memory 2GiB").0 == Some(0));
    assert_eq!(bench.web()?["loans"].as_array().map(Vec::len), Some(1));
    ensure!(bench.ctl("resize web --cpus 3 --live-only").0 == Some(0));
    assert_eq!(bench.web()?["loans"], json!([]));
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(bench.web()?["cpus"]["accepted"], 3);
    // An undo ends it early.
    ensure!(bench.ctl("resize web --cpus 4 --for 1h").0 == Some(0));
    ensure!(bench.ctl("undo web").0 == Some(0));
    let web = bench.web()?;
    assert_eq!((&web["cpus"]["accepted"], &web["loans"]), (&json!(3), &json!([])), "{web}");
    Ok(())
}

#[test]
fn a_guest_that_resists_is_asked_again() -> Result<()> {
    // The second call is the way back; it fails, and so does what puts the growth back.
    let faults = json!([{"instance": "vm/web", "nth": 1, "fault": "fail"}]);
    let bench = Bench::new(&json!({"faults": faults}))?;
    ensure!(bench.ctl("resize web --cpus 4 --for 1s").0 == Some(0));
    wait_until("the first try to fail", LIMIT, || {
        Ok(bench.ctl("history web").1.contains("backend-failed").then_some(()))
    })?;
    assert_eq!(bench.web()?["loans"].as_array().map(Vec::len), Some(1));
    bench.is_back(2)
}

#[test]
fn a_container_gets_its_limits_for_a_time() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let quota = ["--cpu-period", "100000", "--cpu-quota", "50000", "-m", "64m", "--memory-swap", "64m"];
    let cgroup = docker.cgroup(&docker.run("db", &quota)?)?;
    let config =
        format!("[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\n", docker.socket().display());
    let agentd = Agentd::with_config(&config).start()?;
    let lent = agentd.ctl(&["resize", "db", "--cpus", "1.5", "--memory", "128MiB", "--for", "3s"]);
    ensure!(lent.code == Some(0), "{lent:?}");
    assert_eq!((cgroup.cpu_quota()?.0, cgroup.memory_limit()?), (Some(150_000), Some(128 << 20)));
    wait_until("what was lent to be back", LIMIT, || {
        Ok(((cgroup.cpu_quota()?.0, cgroup.memory_limit()?) == (Some(50_000), Some(64 << 20))).then_some(()))
    })
}
