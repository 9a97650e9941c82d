//! Two hundred clients on fifty instances at once: containers of a real Docker and VMs of libvirt's test driver under one
//! ledger. No cap is passed at any observation; no change is lost, made twice, or told otherwise than it is on record.
//!
//! The clients go on for 30 s; `AGENTD_LOAD_SECONDS` in the environment says another length.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use agentd_tests::lab::{Agentd, CgroupPaths, Docker, Lab, Response, TestNode, become_user, wait_until};
use agentd_tests::sim::rng::Rng;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

const CLIENTS: usize = 200;
/// Of each kind.
const EACH: usize = 25;
const MIB: u64 = 1 << 20;
/// Users of every Debian: agentd takes 16 connections of each, and 120 of all but root together.
const USERS: [&str; 13] =
    ["daemon", "bin", "sys", "games", "man", "lp", "mail", "news", "uucp", "www-data", "backup", "list", "nobody"];
/// What the host may promise, and what its containers may, in thousandths of a CPU and in bytes.
const HOST: Sum = Sum { cpus: 64_000, memory: 15 * 1024 * MIB };
const OF_CONTAINERS: Sum = Sum { cpus: 17_000, memory: 1300 * MIB };
/// The least that a VM of this test has.
const LEAST_VM: Sum = Sum { cpus: 1000, memory: 256 * MIB };
/// How often the watcher looks.
const SAMPLING: Duration = Duration::from_millis(100);
/// Two changes of one container never fit into this.
const QUICK: Duration = Duration::from_millis(15);
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Sum {
    cpus: u64,
    memory: u64,
}

impl Sum {
    fn add(&mut self, other: Sum) {
        self.cpus += other.cpus;
        self.memory += other.memory;
    }

    fn least(self, other: Sum) -> Sum {
        Sum { cpus: self.cpus.min(other.cpus), memory: self.memory.min(other.memory) }
    }

    fn most(self, other: Sum) -> Sum {
        Sum { cpus: self.cpus.max(other.cpus), memory: self.memory.max(other.memory) }
    }

    fn fits(self, cap: Sum) -> bool {
        self.cpus <= cap.cpus && self.memory <= cap.memory
    }
}

fn millis(cpus: &Value) -> u64 {
    let cpus = cpus.as_f64().unwrap_or_default();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a handful of CPUs")]
    let millis = (cpus * 1000.0).round() as u64;
    millis
}

/// What an instance has, as the API tells it.
fn observed(instance: &Value) -> Sum {
    let memory = instance["memory"]["observed"].as_u64().unwrap_or_default();
    Sum { cpus: millis(&instance["cpus"]["observed"]), memory }
}

/// What a container has, as its cgroup tells it.
fn limits(cgroup: &CgroupPaths) -> Result<Sum> {
    let (quota, period) = cgroup.cpu_quota()?;
    let quota = quota.context("every container of this test has a limit")?;
    let memory = cgroup.memory_limit()?.context("every container of this test has a limit")?;
    Ok(Sum { cpus: u64::try_from(quota * 1000 / period)?, memory })
}

fn limits_of(cgroups: &[CgroupPaths]) -> Result<Vec<Sum>> {
    cgroups.iter().map(limits).collect()
}

/// What a client was told of one request.
struct Told {
    key: Option<String>,
    status: u16,
    code: String,
    detail: String,
    operation: Option<String>,
    outcome: String,
}

#[derive(Default)]
struct Heard {
    requests: usize,
    reads: usize,
    turned_away: usize,
    /// Connections that were closed without a word.
    closed: usize,
    changes: Vec<Told>,
}

impl Heard {
    fn add(&mut self, other: Heard) {
        self.requests += other.requests;
        self.reads += other.reads;
        self.turned_away += other.turned_away;
        self.closed += other.closed;
        self.changes.extend(other.changes);
    }
}

struct Client<'a> {
    agentd: &'a Agentd,
    instances: &'a [String],
    number: usize,
    rng: Rng,
    heard: Heard,
    last: Option<String>,
}

impl Client<'_> {
    /// Asks until there is a place for it.
    fn ask(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Result<Response> {
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
        for (name, value) in headers {
            request += &format!("{name}: {value}\r\n");
        }
        request += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        loop {
            self.heard.requests += 1;
            match self.agentd.raw(request.as_bytes()) {
                Ok(reply) if reply.status == 503 && reply.json()["code"] == "overloaded" => self.heard.turned_away += 1,
                Ok(reply) => return Ok(reply),
                // More are turned away than can be told so. The record shows whether any of these did something.
                Err(_) => self.heard.closed += 1,
            }
            // Not a wait for anything: how often one comes back who was sent away.
            std::thread::sleep(Duration::from_millis(20 + self.rng.below(200)));
        }
    }

    fn change(&mut self, path: &str, headers: &[(&str, &str)], body: &Value) -> Result<()> {
        let reply = self.ask("POST", path, headers, &body.to_string())?;
        let said = reply.json();
        let word = |field: &str| said[field].as_str().map(str::to_owned);
        let told = Told {
            key: headers.iter().find(|(name, _)| *name == "Idempotency-Key").map(|(_, key)| (*key).to_owned()),
            status: reply.status,
            code: word("code").unwrap_or_default(),
            detail: word("detail").unwrap_or_default(),
            operation: word("operation"),
            outcome: word("outcome").unwrap_or_default(),
        };
        ensure!(told.status != 200 || told.operation.is_some(), "a change without an operation: {said}");
        if told.outcome == "changed" {
            self.last.clone_from(&told.operation);
        }
        self.heard.changes.push(told);
        Ok(())
    }

    /// A size to ask for: absolute or relative, one field or both.
    fn size(&mut self, container: bool) -> Value {
        let mut body = serde_json::Map::new();
        let which = self.rng.below(3);
        let relative = self.rng.chance(1, 2);
        let sign = if self.rng.chance(1, 2) { "+" } else { "-" };
        if which != 1 {
            let cpus = match (container, relative) {
                (true, false) => json!((1 + self.rng.below(15)) as f64 / 10.0),
                (true, true) => json!(format!("{sign}0.{}", 1 + self.rng.below(4))),
                (false, false) => json!(1 + self.rng.below(4)),
                (false, true) => json!(format!("{sign}1")),
            };
            body.insert("cpus".into(), cpus);
        }
        if which != 0 {
            let memory = match (container, relative) {
                (true, false) => json!((16 + 4 * self.rng.below(21)) * MIB),
                (true, true) => json!(format!("{sign}{}MiB", 4 * (1 + self.rng.below(4)))),
                (false, false) => json!((256 + 64 * self.rng.below(13)) * MIB),
                (false, true) => json!(format!("{sign}{}MiB", 64 * (1 + self.rng.below(3)))),
            };
            body.insert("memory".into(), memory);
        }
        Value::Object(body)
    }

    fn act(&mut self) -> Result<()> {
        let reference = self.instances[self.rng.index(self.instances.len())].clone();
        let instance = format!("/v1/instances/{reference}");
        let resize = format!("{instance}/resize");
        let body = self.size(reference.starts_with("container/"));
        match self.rng.below(10) {
            0 => {
                let path = match self.rng.below(4) {
                    0 => "/v1/capacity",
                    1 => "/v1/instances?kind=vm",
                    2 => "/v1/operations?limit=20",
                    _ => &instance,
                };
                let reply = self.ask("GET", path, &[], "")?;
                ensure!(reply.status == 200, "{path}: {}", reply.text());
                self.heard.reads += 1;
            }
            1 => {
                let Some(last) = self.last.take() else { return Ok(()) };
                self.change(&format!("/v1/operations/{last}/undo"), &[], &json!({}))?;
            }
            2 => {
                let key = format!("{}-{}", self.number, self.heard.requests);
                for _ in 0..2 {
                    self.change(&resize, &[("Idempotency-Key", &key)], &body)?;
                }
            }
            3 => {
                // Both at once: what the other hears is ours as well.
                let key = format!("{}-{}", self.number, self.heard.requests);
                let headers = [("Idempotency-Key", key.as_str())];
                let mut other = Client { rng: Rng::new(self.rng.bits()), heard: Heard::default(), last: None, ..*self };
                std::thread::scope(|scope| -> Result<()> {
                    let twice = scope.spawn(|| other.change(&resize, &headers, &body));
                    self.change(&resize, &headers, &body)?;
                    twice.join().expect("the other")
                })?;
                self.heard.add(other.heard);
            }
            4 => {
                let seen = self.ask("GET", &instance, &[], "")?;
                let version = seen.header("etag").context("an ETag")?.to_owned();
                self.heard.reads += 1;
                self.change(&resize, &[("If-Match", &version)], &body)?;
            }
            _ => self.change(&resize, &[], &body)?,
        }
        Ok(())
    }
}

/// Looks at the truth, again and again.
#[derive(Debug, Default)]
struct Watcher {
    samples: usize,
    /// Of those, in how many nothing moved while it was looked.
    still: usize,
    retaken: usize,
    host: Sum,
    containers: Sum,
    committed: Sum,
}

impl Watcher {
    /// What all have at one instant, at least: one after the other is looked at, so each counts with the lesser of what it
    /// had before and after that instant, and a VM that changed in between with the least that one has.
    fn look(&mut self, agentd: &Agentd, cgroups: &[CgroupPaths]) -> Result<()> {
        let vms = || -> Result<Vec<Value>> {
            let reply = agentd.raw(b"GET /v1/instances?kind=vm HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
            ensure!(reply.status == 200, "root always finds a place: {}", reply.text());
            Ok(reply.json()["items"].as_array().cloned().unwrap_or_default())
        };
        let (vms_before, began) = (vms()?, Instant::now());
        let (before, after) = (limits_of(cgroups)?, limits_of(cgroups)?);
        if began.elapsed() > QUICK {
            self.retaken += 1;
            return Ok(());
        }
        let vms_after = vms()?;
        ensure!(vms_before.len() == EACH && vms_after.len() == EACH, "VMs are missing");
        let mut of_containers = Sum::default();
        for (before, after) in before.iter().zip(&after) {
            of_containers.add(before.least(*after));
        }
        let mut still = before == after;
        let (mut host, mut committed) = (of_containers, Sum::default());
        for (before, after) in vms_before.iter().zip(&vms_after) {
            let same = before["version"] == after["version"];
            still &= same;
            host.add(if same { observed(before).least(observed(after)) } else { LEAST_VM });
        }
        for vm in &vms_after {
            let charge = &vm["committed"];
            committed.add(Sum { cpus: millis(&charge["cpus"]), memory: charge["memory"].as_u64().unwrap_or_default() });
        }
        self.samples += 1;
        self.still += usize::from(still);
        self.host = self.host.most(host);
        self.containers = self.containers.most(of_containers);
        self.committed = self.committed.most(committed);
        ensure!(
            of_containers.fits(OF_CONTAINERS),
            "the containers have {of_containers:?}, {OF_CONTAINERS:?} is allowed"
        );
        ensure!(host.fits(HOST), "all have {host:?}, {HOST:?} is allowed");
        ensure!(committed.fits(HOST), "{committed:?} is promised to the VMs alone, {HOST:?} is allowed");
        Ok(())
    }
}

/// The same of the containers alone, which is quicker done.
#[derive(Debug, Default)]
struct FastWatcher {
    looks: usize,
    retaken: usize,
    most: Sum,
}

impl FastWatcher {
    fn look(&mut self, cgroups: &[CgroupPaths]) -> Result<()> {
        let began = Instant::now();
        let mut all = Sum::default();
        for (before, after) in limits_of(cgroups)?.iter().zip(limits_of(cgroups)?) {
            all.add(before.least(after));
        }
        if began.elapsed() > QUICK {
            self.retaken += 1;
            return Ok(());
        }
        self.looks += 1;
        self.most = self.most.most(all);
        ensure!(all.fits(OF_CONTAINERS), "the containers have {all:?}, {OF_CONTAINERS:?} is allowed");
        Ok(())
    }
}

/// Does this again and again, until it is over.
fn each_while(pause: Duration, over: &AtomicBool, mut look: impl FnMut() -> Result<()>) -> Result<()> {
    while !over.load(Ordering::Relaxed) {
        let began = Instant::now();
        look()?;
        std::thread::sleep(pause.saturating_sub(began.elapsed()));
    }
    Ok(())
}

/// All of the history, oldest first.
fn history(agentd: &Agentd) -> Result<Vec<Value>> {
    let (mut all, mut before) = (Vec::new(), String::new());
    loop {
        let page = agentd.get(&format!("/v1/history?limit=1000{before}"))?.json();
        all.extend(page["items"].as_array().context("a page")?.iter().cloned());
        let Some(next) = page["next"].as_u64() else { break };
        before = format!("&before={next}");
    }
    all.reverse();
    Ok(all)
}

fn length() -> Duration {
    let seconds = std::env::var("AGENTD_LOAD_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(30))
}

#[test]
fn two_hundred_clients_pass_no_cap_and_lose_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let mut cgroups = Vec::new();
    for number in 0..EACH {
        let sizes = ["--cpus", "0.5", "-m", "48m", "--memory-swap", "48m"];
        cgroups.push(docker.cgroup(&docker.run(&format!("c{number}"), &sizes)?)?);
    }
    let node = TestNode::uniform(lab.dir(), EACH, (1, 4), (512, 1024))?;
    let users: Vec<_> = USERS.iter().filter_map(|name| nix::unistd::User::from_name(name).ok().flatten()).collect();
    let mut config = format!(
        "[docker]\nsocket = \"{}\"\n[libvirt]\nuri = \"{}\"\n[scaling]\nmax_cpus = 4\n\
         [capacity]\ncpus = {}\nmemory = {}\nreserved_memory = 0\nvm_overhead = 0\n\
         [[limit]]\nmatch = \"vm/*\"\nmin_memory = {}\nshrink = \"always\"\n\
         [[limit]]\nmatch = \"container/*\"\nshrink_margin = \"4MiB\"\ntotal_cpus = {}\ntotal_memory = {}\n",
        docker.socket().display(),
        node.uri(),
        HOST.cpus / 1000,
        HOST.memory,
        LEAST_VM.memory,
        OF_CONTAINERS.cpus / 1000,
        OF_CONTAINERS.memory,
    );
    for user in &users {
        config += &format!("[[access]]\nuser = \"{}\"\nallow = [\"read\", \"resize\"]\nmatch = \"*\"\n", user.name);
    }
    let agentd = Agentd::with_config(&config).start()?;
    std::fs::set_permissions(agentd.socket(), std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
    let listed = || -> Result<Vec<Value>> {
        Ok(agentd.get("/v1/instances")?.json()["items"].as_array().cloned().unwrap_or_default())
    };
    let at_first = listed()?;
    let instances: Vec<String> = at_first.iter().filter_map(|item| item["ref"].as_str().map(str::to_owned)).collect();
    ensure!(instances.len() == 2 * EACH, "{instances:?}");

    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed()?.as_secs();
    println!("seed {seed}, {} users, {:?}", users.len(), length());
    let over = AtomicBool::new(false);
    let end = Instant::now() + length();
    let (watcher, fast, heard) = std::thread::scope(|scope| -> Result<(Watcher, FastWatcher, Vec<Heard>)> {
        let watching = scope.spawn(|| {
            let mut watcher = Watcher::default();
            each_while(SAMPLING, &over, || watcher.look(&agentd, &cgroups)).map(|()| watcher)
        });
        let watching_fast = scope.spawn(|| {
            let mut watcher = FastWatcher::default();
            each_while(SAMPLING / 5, &over, || watcher.look(&cgroups)).map(|()| watcher)
        });
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let mut client = Client {
                    agentd: &agentd,
                    instances: &instances,
                    number,
                    rng: Rng::new(seed.wrapping_add(number as u64)),
                    heard: Heard::default(),
                    last: None,
                };
                let uid = users[number % users.len()].uid.as_raw();
                scope.spawn(move || {
                    become_user(uid)?;
                    while Instant::now() < end {
                        client.act()?;
                    }
                    anyhow::Ok(client.heard)
                })
            })
            .collect();
        let heard = clients.into_iter().map(|client| client.join().expect("a client"));
        let heard = heard.collect::<Vec<_>>();
        over.store(true, Ordering::Relaxed);
        let watcher = watching.join().expect("the watcher")?;
        let fast = watching_fast.join().expect("the other watcher")?;
        Ok((watcher, fast, heard.into_iter().collect::<Result<_>>()?))
    })?;

    let told: Vec<&Told> = heard.iter().flat_map(|heard| &heard.changes).collect();
    let sum = |of: fn(&Heard) -> usize| heard.iter().map(of).sum::<usize>();
    let mut ends: BTreeMap<&str, usize> = BTreeMap::new();
    for told in &told {
        *ends.entry(if told.code.is_empty() { &told.outcome } else { &told.code }).or_default() += 1;
    }
    println!(
        "{} requests ({} turned away, {} closed), {} reads, {} replies to changes: {ends:?}",
        sum(|heard| heard.requests),
        sum(|heard| heard.turned_away),
        sum(|heard| heard.closed),
        sum(|heard| heard.reads),
        told.len()
    );
    let details: BTreeMap<&str, &str> = told.iter().map(|told| (told.code.as_str(), told.detail.as_str())).collect();
    println!("{details:#?}\n{watcher:?} of {HOST:?} and {OF_CONTAINERS:?}; {fast:?}");
    let none_failed = ["internal", "partial", "backend-failed", "backend-timeout", "store-unavailable"];
    ensure!(none_failed.iter().all(|code| !ends.contains_key(code)), "{ends:?}");
    ensure!(ends.contains_key("changed") && ends.contains_key("capacity-exceeded"), "no load at all: {ends:?}");
    ensure!(watcher.samples > 0 && fast.looks > 0, "nothing was watched");

    nothing_was_lost_or_done_twice(&agentd, &told)?;
    let at_last = listed()?;
    the_record_tells_how_it_came(&agentd, &at_first, &at_last)?;
    all_adds_up(&agentd, &docker, &cgroups, &at_last)?;
    Ok(())
}

fn nothing_was_lost_or_done_twice(agentd: &Agentd, told: &[&Told]) -> Result<()> {
    // A key stands for one operation at the most.
    let mut by_key: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for told in told {
        if let (Some(key), Some(operation)) = (&told.key, &told.operation) {
            by_key.entry(key).or_default().insert(operation);
        }
    }
    for (key, operations) in &by_key {
        ensure!(operations.len() == 1, "the key {key} made {operations:?}");
    }
    let promised: BTreeMap<&str, &str> =
        told.iter().filter_map(|told| Some((told.operation.as_deref()?, told.outcome.as_str()))).collect();
    // Refusals are recorded while nobody waits for that.
    let without_key = told.iter().filter(|told| told.key.is_none());
    let busy = without_key.filter(|told| told.code == "busy").count();
    let history = wait_until("the last refusal on record", LIMIT, || {
        let history = history(agentd)?;
        Ok((history.iter().filter(|entry| entry["code"] == "busy").count() >= busy).then_some(history))
    })?;
    let mut recorded: BTreeMap<&str, &str> = BTreeMap::new();
    for entry in &history {
        match entry["happening"].as_str() {
            Some("change") => {
                let operation = entry["operation"].as_str().context("a change without an operation")?;
                let outcome = entry["outcome"].as_str().unwrap_or_default();
                if let Some(before) = recorded.insert(operation, outcome) {
                    bail!("{operation} ended twice, as {before} and as {outcome}");
                }
            }
            Some("refusal") => {}
            other => bail!("{other:?} happened: {entry}"),
        }
    }
    for (operation, outcome) in &promised {
        ensure!(
            recorded.get(operation) == Some(outcome),
            "{operation}: told {outcome}, on record {:?}",
            recorded.get(operation)
        );
    }
    let unheard: Vec<_> = recorded.keys().filter(|operation| !promised.contains_key(*operation)).collect();
    ensure!(unheard.is_empty(), "nobody was told of {unheard:?}");
    for (operation, outcome) in promised.iter().step_by(1 + promised.len() / 200) {
        let view = agentd.get(&format!("/v1/operations/{operation}"))?.json();
        ensure!(view["outcome"] == **outcome, "{operation}: told {outcome}, kept {view}");
    }
    println!("{} operations told and on record, {} entries of history", promised.len(), history.len());
    Ok(())
}

/// Each change begins with what the one before it left behind, from what was there at first to what is there at last.
fn the_record_tells_how_it_came(agentd: &Agentd, at_first: &[Value], at_last: &[Value]) -> Result<()> {
    let sizes = |instances: &[Value]| -> BTreeMap<(String, String, bool), Value> {
        let mut sizes = BTreeMap::new();
        for instance in instances {
            for field in ["cpus", "memory"] {
                for (saved, side) in [(false, "accepted"), (true, "persistent")] {
                    let key = (instance["ref"].to_string(), field.to_owned(), saved);
                    sizes.insert(key, instance[field][side].clone());
                }
            }
        }
        sizes
    };
    let mut now = sizes(at_first);
    let mut moved = 0;
    for entry in history(agentd)? {
        for step in entry["moves"].as_array().into_iter().flatten() {
            let field = step["field"].as_str().unwrap_or_default().to_owned();
            let key = (entry["ref"].to_string(), field, step["saved"] == true);
            let value = now.get_mut(&key).with_context(|| format!("{key:?} of {entry}"))?;
            ensure!(*value == step["before"], "{key:?} was {value}, and then: {entry}");
            *value = step["after"].clone();
            moved += 1;
        }
    }
    println!("{moved} moves on record");
    for (key, value) in sizes(at_last) {
        ensure!(now[&key] == value, "{key:?} is {value}, the record ends with {}", now[&key]);
    }
    Ok(())
}

fn all_adds_up(agentd: &Agentd, docker: &Docker, cgroups: &[CgroupPaths], at_last: &[Value]) -> Result<()> {
    let mut all = Sum::default();
    for (number, cgroup) in cgroups.iter().enumerate() {
        let (name, limits) = (format!("container/c{number}"), limits(cgroup)?);
        let instance = at_last.iter().find(|instance| instance["ref"] == name.as_str()).context("a container")?;
        ensure!(observed(instance) == limits, "{name} has {limits:?}, and this is told: {instance}");
        let format = "{{.HostConfig.Memory}}";
        let inspected = docker.docker(&["inspect", "-f", format, &format!("c{number}")])?;
        ensure!(inspected == limits.memory.to_string(), "{name}: {inspected}");
        all.add(limits);
    }
    for vm in at_last.iter().filter(|instance| instance["kind"] == "vm") {
        all.add(observed(vm));
    }
    let capacity = agentd.get("/v1/capacity")?.json();
    let committed = Sum {
        cpus: millis(&capacity["cpus"]["committed"]),
        memory: capacity["memory"]["committed"].as_u64().unwrap_or_default(),
    };
    ensure!(committed == all, "{committed:?} is promised, {all:?} is there");
    Ok(())
}
