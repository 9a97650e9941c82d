//! Hours of mixed load with faults: one daemon over a fake engine and a real Docker, another over libvirt's test driver. Clients
//! resize, suspend, stop, lend, take back and read; Docker is spoken for by one who lies, stalls and breaks off now and then,
//! and the fake's steps fail by themselves. No cap is ever passed, nothing panics, nothing is left open at the end, and neither
//! memory nor descriptors nor threads grow.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::lab::{Agentd, Docker, Lab, Liar, Lie, TestNode, wait_until};
use crate::sim::rng::Rng;

/// Instances of each kind, and clients of each daemon.
const EACH: usize = 8;
/// How often memory, descriptors and threads are counted.
const SAMPLING: Duration = Duration::from_secs(10);
/// How long it takes at most until all is at rest after the last fault.
const LIMIT: Duration = Duration::from_secs(120);

/// What came of it.
#[derive(Debug, Default)]
pub struct Totals {
    /// Replies, by method and status or outcome.
    pub replies: BTreeMap<String, u64>,
    /// Faults that were injected, by kind.
    pub faults: BTreeMap<String, u64>,
    /// Looks at the capacity, of which none showed a cap that was passed.
    pub looks: u64,
    /// Memory in MiB, descriptors and threads of each daemon: the median of the second quarter of the time, and of the last.
    pub growth: BTreeMap<&'static str, [[u64; 3]; 2]>,
}

#[derive(Debug, Default)]
struct Counts(Mutex<BTreeMap<String, u64>>);

impl Counts {
    fn add(&self, what: String, count: u64) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(what).or_default() += count;
    }

    fn take(self) -> BTreeMap<String, u64> {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One thing that a client does, and what it was told.
fn act(agentd: &Agentd, instances: &[String], rng: &mut Rng, replies: &Counts) -> Result<()> {
    let reference = &instances[rng.index(instances.len())];
    let is_vm = reference.starts_with("vm/");
    let path = format!("/v1/instances/{reference}");
    let (verb, body) = match rng.below(14) {
        0 => {
            return read(
                agentd,
                ["/v1/instances", "/v1/capacity", "/v1/history?limit=50", "/metrics"][rng.index(4)],
                replies,
            );
        }
        1 => return read(agentd, &path, replies),
        2 => {
            let request = b"GET /v1/events?follow=false&tail=20 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
            let events = agentd.raw(request)?;
            ensure!(events.status == 200, "{}", events.text());
            replies.add("events: 200".into(), 1);
            return Ok(());
        }
        3 => ("suspend", json!({"reason": "mixed load"})),
        4..=5 => ("resume", json!({})),
        6 => ("stop", json!({"force": true, "timeout": "1s"})),
        7..=8 => ("start", json!({})),
        9 => ("clear-hold", json!({})),
        10 if is_vm => ("resize", json!({"cpus": "+1", "for": "2s", "wait": "0s"})),
        _ if is_vm => {
            ("resize", json!({"cpus": 1 + rng.below(4), "memory": (256 + 64 * rng.below(8)) << 20, "wait": "0s"}))
        }
        _ => ("resize", json!({"cpus": (1 + rng.below(15)) as f64 / 10.0, "memory": (16 + 4 * rng.below(12)) << 20})),
    };
    let reply = agentd.post(&format!("{path}/{verb}"), &body)?;
    let said = reply.json();
    let end = said["outcome"].as_str().or_else(|| said["code"].as_str()).unwrap_or("none").to_owned();
    replies.add(format!("{verb}: {end}"), 1);
    ensure!(reply.status != 500 || said["code"] != "internal" || said["outcome"] == "rolled-back", "{said}");
    if rng.chance(1, 8)
        && let Some(operation) = said["operation"].as_str()
    {
        let undone = agentd.post(&format!("/v1/operations/{operation}/undo"), &json!({}))?;
        replies.add(format!("undo: {}", undone.status), 1);
    }
    Ok(())
}

fn read(agentd: &Agentd, path: &str, replies: &Counts) -> Result<()> {
    let reply = agentd.http("GET", path, &[], b"")?;
    // An engine that refuses, or does not answer in time, is told as that.
    let by_engine = matches!(reply.status, 503 | 504) || reply.text().contains("\"backend-failed\"");
    ensure!(reply.status < 500 || by_engine, "{path}: {} {}", reply.status, reply.text());
    replies.add(format!("read: {}", reply.status), 1);
    Ok(())
}

/// Lies for a moment, is honest for longer.
fn lie_now_and_then(liar: &Liar, rng: &mut Rng, faults: &Counts) {
    let kinds = [
        ("lost answers", Lie::Lost),
        ("half answers", Lie::Half),
        ("closed connections", Lie::Closed),
        ("no answers", Lie::Never),
        ("refusals", Lie::Instead(500, br#"{"message":"it is not in the mood"}"#.to_vec())),
        ("wrong types", Lie::Instead(200, br#"{"Id":7,"HostConfig":[]}"#.to_vec())),
        ("noise", Lie::Noise),
        ("8 MiB answers", Lie::Endless(8 << 20)),
    ];
    let (what, lie) = kinds[rng.index(kinds.len())].clone();
    liar.lie(["/update", "/json", "/events", "/start", ""][rng.index(5)], lie);
    thread::sleep(Duration::from_millis(100 + rng.below(900)));
    let count = liar.be_honest();
    faults.add(format!("docker: {what}"), u64::try_from(count).unwrap_or(0));
    thread::sleep(Duration::from_millis(1000 + rng.below(4000)));
}

/// Memory of its own in MiB, descriptors, threads.
fn size(agentd: &Agentd) -> Result<[u64; 3]> {
    Ok([agentd.status("RssAnon")? >> 10, u64::try_from(agentd.descriptors()?)?, agentd.status("Threads")?])
}

fn median(samples: &[[u64; 3]]) -> [u64; 3] {
    [0, 1, 2].map(|place| {
        let mut values: Vec<u64> = samples.iter().map(|sample| sample[place]).collect();
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or_default()
    })
}

/// The second quarter and the last.
fn growth(name: &str, samples: &[[u64; 3]]) -> Result<[[u64; 3]; 2]> {
    let quarter = samples.len() / 4;
    let (early, late) = (median(&samples[quarter..2 * quarter]), median(&samples[3 * quarter..]));
    let fits = late[0] <= early[0] + early[0] / 4 + 8 && late[1] <= early[1] + 16 && late[2] <= early[2] + 8;
    ensure!(fits, "{name} grew: MiB, descriptors and threads were {early:?} and are {late:?}");
    Ok([early, late])
}

fn is_within_its_caps(agentd: &Agentd) -> Result<()> {
    let capacity = agentd.get("/v1/capacity")?;
    ensure!(
        capacity.status == 200 && !capacity.text().contains("\"over\":true"),
        "a cap is passed: {}",
        capacity.text()
    );
    Ok(())
}

/// Nothing is open, away or unknown any more.
fn comes_to_rest(agentd: &Agentd) -> Result<()> {
    wait_until("all to be at rest", LIMIT, || {
        let list = agentd.get("/v1/instances?limit=1000")?.json();
        ensure!(list["unavailable"] == json!([]) && !list.to_string().contains("recovering"), "{list}");
        let operations = agentd.get("/v1/operations?limit=1000")?.json();
        let items = operations["items"].as_array().context("operations")?;
        let open = items.iter().find(|operation| matches!(operation["outcome"].as_str(), Some("running" | "unknown")));
        ensure!(open.is_none(), "{open:?}");
        Ok(Some(()))
    })?;
    ensure!(!agentd.log().contains("panicked"), "{}", agentd.log());
    is_within_its_caps(agentd)
}

/// Goes on for so long.
///
/// # Errors
/// A promise was broken; which one, with the numbers.
pub fn run(length: Duration, seed: u64) -> Result<Totals> {
    ensure!(length >= 8 * SAMPLING, "in less than {:?} nothing can be told of growth", 8 * SAMPLING);
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let mut cgroups = Vec::new();
    for number in 0..EACH {
        let limits = ["--cpus", "0.5", "-m", "32m", "--memory-swap", "32m"];
        cgroups.push(docker.cgroup(&docker.run(&format!("c{number}"), &limits)?)?);
    }
    let liar = Liar::start(&lab.dir().join("liar.sock"), &docker.socket())?;
    let vm = |number: usize| json!({"name": format!("v{number}"), "cpus": 2, "memory": "512MiB", "max_cpus": 4, "max_memory": "1GiB", "used": "64MiB"});
    let vms: Vec<Value> = (0..EACH).map(vm).collect();
    // Each hundredth step or so of each VM.
    let kinds = ["fail", "fail-after", "unavailable"];
    let fault = |at: usize| json!({"instance": format!("vm/v{}", at % EACH), "nth": 20 + at / EACH * 97, "fault": kinds[at % 3]});
    let made: Vec<Value> = (0..EACH * 1000).map(fault).collect();
    let caps = "[capacity]\ncpus = 24\nmemory = \"8GiB\"\nreserved_memory = 0\nvm_overhead = 0\n\
                [[limit]]\nmatch = \"*/*\"\nshrink = \"always\"\n";
    let config = format!("{caps}[docker]\nsocket = \"{}\"\n", liar.socket().display());
    let first = Agentd::with_config(&config).fake(json!({"instances": vms, "faults": made})).start()?;
    let node = TestNode::uniform(lab.dir(), EACH, (2, 4), (512, 1024))?;
    let second = Agentd::with_config(&format!("{caps}[libvirt]\nuri = \"{}\"\n", node.uri())).start()?;
    let named = |kind: &str, letter: &str| (0..EACH).map(|n| format!("{kind}/{letter}{n}")).collect::<Vec<_>>();
    let listed = second.get("/v1/instances")?.json();
    let of_second: Vec<String> = listed["items"]
        .as_array()
        .context("items")?
        .iter()
        .filter_map(|item| Some(item["ref"].as_str()?.to_owned()))
        .collect();
    let daemons = [
        ("fake and docker", &first, [named("vm", "v"), named("container", "c")].concat()),
        ("test driver", &second, of_second),
    ];

    let (replies, faults, over) = (Counts::default(), Counts::default(), AtomicBool::new(false));
    let end = Instant::now() + length;
    let goes_on = || Instant::now() < end && !over.load(Ordering::Relaxed);
    // Whoever fails ends it for all.
    let ending = |done: Result<()>| done.inspect_err(|_| over.store(true, Ordering::Relaxed));
    let mut samples: BTreeMap<&str, Vec<[u64; 3]>> = BTreeMap::new();
    let mut looks = 0;
    thread::scope(|scope| -> Result<()> {
        let mut working = Vec::new();
        for (place, (_, agentd, instances)) in daemons.iter().enumerate() {
            for client in 0..EACH as u64 {
                let mut rng = Rng::new(seed ^ (place as u64) << 32 ^ client);
                let (replies, goes_on, ending) = (&replies, &goes_on, &ending);
                working.push(scope.spawn(move || {
                    ending((|| {
                        while goes_on() {
                            act(agentd, instances, &mut rng, replies)?;
                        }
                        Ok(())
                    })())
                }));
            }
        }
        let lying = scope.spawn(|| {
            let mut rng = Rng::new(!seed);
            while goes_on() {
                lie_now_and_then(&liar, &mut rng, &faults);
            }
        });
        let watched = ending((|| {
            let mut sampled = Instant::now();
            while goes_on() {
                for (name, agentd, _) in &daemons {
                    is_within_its_caps(agentd).context(*name)?;
                    looks += 1;
                }
                if sampled.elapsed() >= SAMPLING {
                    sampled = Instant::now();
                    for (name, agentd, _) in &daemons {
                        samples.entry(name).or_default().push(size(agentd)?);
                    }
                }
                thread::sleep(Duration::from_millis(200));
            }
            Ok(())
        })());
        let worked = working.into_iter().try_for_each(|client| client.join().expect("a client"));
        lying.join().expect("who lies");
        watched.and(worked)
    })?;
    liar.be_honest();
    for (name, agentd, _) in &daemons {
        comes_to_rest(agentd).context(*name)?;
    }
    // What is told of the containers is what they have.
    for (number, cgroup) in cgroups.iter().enumerate() {
        let told = first.get(&format!("/v1/instances/container/c{number}"))?.json();
        if told["state"] == "running" {
            ensure!(told["memory"]["observed"].as_u64() == cgroup.memory_limit()?, "c{number}: {told}");
        }
    }
    let mut totals = Totals { replies: replies.take(), faults: faults.take(), looks, ..Totals::default() };
    let failed = ["resize: failed", "resize: backend-failed", "resize: backend-unavailable"];
    let by_itself = failed.iter().filter_map(|end| totals.replies.get(*end)).sum();
    totals.faults.insert("fake: steps that failed (and what Docker's lies came to)".into(), by_itself);
    for (name, samples) in &samples {
        totals.growth.insert(name, growth(name, samples)?);
    }
    Ok(totals)
}
