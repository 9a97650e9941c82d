//! Engines and guests that lie, stall and break off: a real Docker behind a socket that does that to it, and the fake engine where
//! no socket is between. Whatever they say, agentd answers, keeps within its memory, passes no cap, and is right again once they are.

use std::time::Duration;

use agentd_tests::lab::{Agentd, CgroupPaths, Docker, Domain, Lab, Liar, Libvirt, Lie, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(90);
const MIB: u64 = 1 << 20;
/// What its unit lets it have.
const MEMORY: u64 = 512 * MIB;

struct Bench {
    agentd: Agentd,
    liar: Liar,
    cgroup: CgroupPaths,
    _docker: Docker,
    _lab: Lab,
}

impl Bench {
    fn new() -> Result<Bench> {
        let lab = Lab::new()?;
        let docker = Docker::start(&lab)?;
        let cgroup = docker.cgroup(&docker.run("db", &["--cpus", "0.5", "-m", "64m", "--memory-swap", "64m"])?)?;
        let liar = Liar::start(&lab.dir().join("liar.sock"), &docker.socket())?;
        let socket = liar.socket().display();
        let config =
            format!("[docker]\nsocket = \"{socket}\"\n[capacity]\ncpus = 4\nmemory = \"2GiB\"\nreserved_memory = 0\n");
        // Of another engine, which no liar stands before.
        let vm = json!({"name": "web", "cpus": 1, "memory": "64MiB", "max_cpus": 2, "max_memory": "64MiB"});
        let agentd = Agentd::with_config(&config).fake(json!({ "instances": [vm] })).start()?;
        let bench = Bench { agentd, liar, cgroup, _docker: docker, _lab: lab };
        bench.is_right(0.5)?;
        Ok(bench)
    }

    fn resize(&self, cpus: f64) -> Result<(u16, Value)> {
        let reply = self.agentd.post("/v1/instances/container/db/resize", &json!({ "cpus": cpus, "wait": "0s" }))?;
        Ok((reply.status, reply.json()))
    }

    /// It answers, has not panicked, promises no more than it may, and is within its memory.
    fn is_sound(&self, about: &str) -> Result<()> {
        let capacity = self.agentd.get("/v1/capacity")?;
        ensure!(capacity.status == 200 && !capacity.text().contains("\"over\":true"), "{about}: {}", capacity.text());
        ensure!(!self.agentd.log().contains("panicked"), "{about}: {}", self.agentd.log());
        let most = self.agentd.status("VmHWM")? << 10;
        ensure!(most < MEMORY, "{about}: it had {most} bytes");
        Ok(())
    }

    /// With an honest engine, everything is as it is.
    fn is_right(&self, cpus: f64) -> Result<()> {
        wait_until("the truth to be told again", LIMIT, || {
            let list = self.agentd.get("/v1/instances?kind=container")?.json();
            let db = &list["items"][0];
            ensure!(list["unavailable"] == json!([]) && list["total"] == 1 && db["ref"] == "container/db", "{list}");
            ensure!(db["cpus"]["observed"] == cpus && db["holds"] == json!([]), "{list}");
            Ok(Some(()))
        })
        .with_context(|| self.agentd.log())
    }

    fn cpus(&self) -> Result<f64> {
        let (quota, period) = self.cgroup.cpu_quota()?;
        #[allow(clippy::cast_precision_loss, reason = "a fraction of a second in microseconds")]
        Ok(quota.context("a quota")? as f64 / period as f64)
    }
}

/// What may be said in place of the truth to any question.
fn lies() -> Vec<(&'static str, Lie)> {
    let said = |status: u16, body: Value| Lie::Instead(status, body.to_string().into_bytes());
    let container = |host: Value| {
        json!({"Id": "x".repeat(64), "Name": "/db", "State": {"Status": "running", "Running": true, "Pid": 1,
               "StartedAt": "2026-01-01T00:00:00Z"}, "Config": {"Labels": {}}, "HostConfig": host})
    };
    let most = i64::MAX;
    vec![
        ("nothing", Lie::Instead(200, Vec::new())),
        ("null", said(200, Value::Null)),
        ("a number", said(200, json!(7))),
        ("wrong types", said(200, container(json!({"NanoCpus": "lots", "Memory": [1]})))),
        ("negative numbers", said(200, container(json!({"NanoCpus": -5, "Memory": -1, "CpuQuota": i64::MIN})))),
        (
            "huge numbers",
            said(200, container(json!({"NanoCpus": most, "Memory": most, "CpuPeriod": most, "CpuQuota": most}))),
        ),
        ("numbers that are none", said(200, container(json!({"NanoCpus": 1e300, "Memory": 0.5})))),
        (
            "names with escapes",
            said(200, json!([{"Id": "\u{1b}[2J", "Names": ["/\u{1b}]0;owned\u{7}", "/--help", "/../../etc"]}])),
        ),
        ("deep nesting", Lie::Instead(200, [b"[".repeat(100_000), b"]".repeat(100_000)].concat())),
        ("half of it", Lie::Half),
        ("64 MiB of it", Lie::Endless(64 << 20)),
        ("a GiB of it", Lie::Endless(1 << 30)),
        ("no HTTP", Lie::Noise),
        ("a closed connection", Lie::Closed),
        (
            "a long refusal",
            Lie::Instead(500, [b"{\"message\":\"".to_vec(), b"\\u001b[2Jx".repeat(1 << 18), b"\"}".to_vec()].concat()),
        ),
        ("a redirect", said(301, json!({"message": "elsewhere"}))),
        ("a status that is none", said(999, json!({}))),
        ("no such container", said(404, json!({"message": "No such container: db"}))),
    ]
}

#[test]
fn what_docker_says_of_its_containers_may_be_anything() -> Result<()> {
    let bench = Bench::new()?;
    for about in ["/json", "/containers/json", "/events", "/info"] {
        let mut told = 0;
        // What is asked for only after announcements have broken off takes a second each time: some lies do for that.
        let anew = matches!(about, "/containers/json" | "/events");
        for (what, lie) in lies().into_iter().step_by(if anew { 3 } else { 1 }) {
            let what = format!("{what} of {about}");
            bench.liar.lie(about, lie);
            if anew {
                bench.liar.hang_up();
                wait_until("it to be asked for", LIMIT, || Ok((bench.liar.lied() > 0).then_some(())))?;
            }
            for path in ["/v1/instances?max_age=0s", "/v1/instances/container/db", "/v1/health"] {
                let reply = bench.agentd.get(path)?;
                ensure!(reply.text().len() < 64 << 10, "{what}: {path} says {} bytes", reply.text().len());
            }
            let (status, reply) = bench.resize(1.0)?;
            ensure!(status != 200 || bench.cpus()? == 1.0, "{what}: {reply}, and it is {}", bench.cpus()?);
            bench.is_sound(&what)?;
            told += bench.liar.be_honest();
        }
        ensure!(told > 0, "{about} was never asked for");
        wait_until("a change to go well", LIMIT, || Ok((bench.resize(0.5)?.0 == 200).then_some(())))?;
        bench.is_right(0.5)?;
    }
    Ok(())
}

#[test]
fn what_docker_says_of_a_change_is_not_believed_before_it_is_seen() -> Result<()> {
    let bench = Bench::new()?;
    let mut lies = lies();
    lies.push(("an answer that is lost", Lie::Lost));
    for (what, lie) in lies {
        bench.liar.lie("/update", lie);
        let before = bench.cpus()?;
        let wanted = if before == 0.5 { 1.0 } else { 0.5 };
        let (status, reply) = bench.resize(wanted)?;
        let now = bench.cpus()?;
        ensure!(now == before || now == wanted, "{what}: {before} became {now}");
        ensure!(status != 200 || now == wanted, "{what}: told as done and not so: {reply}");
        ensure!(bench.liar.be_honest() > 0, "{what} was never said");
        bench.is_sound(what)?;
        // What was held because nobody knew is found out by looking.
        bench.is_right(bench.cpus()?).with_context(|| what.to_owned())?;
    }
    Ok(())
}

#[test]
fn a_docker_that_never_answers_holds_up_nothing_but_itself() -> Result<()> {
    let bench = Bench::new()?;
    bench.liar.lie("", Lie::Never);
    let reply = bench.agentd.get("/v1/capacity")?;
    ensure!(reply.status == 200, "{}", reply.text());
    // While a change waits for Docker, the other engine's are made.
    let problem = std::thread::scope(|scope| -> Result<(u16, Value)> {
        let waits = scope.spawn(|| bench.resize(1.0));
        for cpus in [2, 1, 2] {
            let reply = bench.agentd.post("/v1/instances/vm/web/resize", &json!({ "cpus": cpus }))?;
            ensure!(reply.status == 200 && !waits.is_finished(), "{} {}", reply.status, reply.text());
        }
        waits.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    })?;
    let (status, problem) = problem;
    ensure!(
        status >= 500 && problem["detail"].as_str().is_some_and(|detail| detail.contains("docker")),
        "{status} {problem}"
    );
    bench.is_sound("no answer")?;
    bench.liar.be_honest();
    wait_until("a change to go well", LIMIT, || Ok((bench.resize(1.0)?.0 == 200).then_some(())))?;
    bench.is_right(1.0)
}

#[test]
fn guests_whose_agents_flood_stall_or_lie_are_told_as_they_are_and_hold_up_no_other() -> Result<()> {
    let lab = Lab::new()?;
    let libvirt = Libvirt::start(&lab)?;
    let define = |name: &str, more: &[&str]| {
        let domain = Domain::new(name).vcpus(1, 4).memory(128, 128).agent();
        more.iter().fold(domain, |domain, word| domain.flag(word)).define_and_start(&libvirt)
    };
    let honest = define("honest", &[])?;
    let liars = [define("flood", &["lies=flood"])?, define("stall", &["lies=stall"])?, define("huge", &["lies=huge"])?];
    let config = format!(
        "[libvirt]\nuri = \"{}\"\n[capacity]\ncpus = 16\nmemory = \"4GiB\"\n[scaling]\nmax_cpus = 16\n",
        libvirt.uri()
    );
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    let show = |name: &str| Ok::<_, anyhow::Error>(agentd.get(&format!("/v1/instances/vm/{name}"))?.json());
    wait_until("the honest one's agent to be heard", LIMIT, || {
        Ok((show("honest")?["cpus"]["confirmed"] == 1).then_some(()))
    })?;
    for guest in &liars {
        // libvirt has heard of an agent, and asks it.
        wait_until("an agent to be there", LIMIT, || {
            let xml = guest.virsh("dumpxml", &[])?;
            Ok(xml.contains("state='connected'").then_some(()))
        })?;
        let output = agentd.ctl(&["resize", guest.name(), "--cpus", "2", "--live-only", "--wait", "5s", "-o", "json"]);
        let reply: Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        ensure!(matches!(output.code, Some(0 | 8)), "{output:?}");
        let seen = &reply["instance"]["cpus"];
        ensure!(seen["observed"] == 2, "QEMU has them, whatever the guest says: {reply}");
        ensure!(seen["confirmed"].as_u64().is_none_or(|told| told <= 2), "more than it has: {reply}");
        // Neither its memory nor anybody else waits for that.
        let output = agentd.ctl(&["resize", guest.name(), "--memory", "120MiB", "--live-only", "--wait", "0s"]);
        ensure!(matches!(output.code, Some(0 | 8)), "{output:?}");
        let output = agentd.ctl(&["resize", "honest", "--cpus", "+1", "--live-only", "--wait", "60s"]);
        ensure!(output.code == Some(0) && output.stdout.contains("confirmed by the guest"), "{output:?}");
        ensure!(!agentd.log().contains("panicked"), "{}", agentd.log());
        let most = agentd.status("VmHWM")? << 10;
        ensure!(most < MEMORY, "{}: it had {most} bytes", guest.name());
    }
    let capacity = agentd.get("/v1/capacity")?.json();
    ensure!(capacity["over"] == json!(false) || capacity["over"].is_null(), "{capacity}");
    drop(honest);
    Ok(())
}
