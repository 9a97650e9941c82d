//! What a schedule does, drawn from its seed before anything runs.

use std::time::Duration;

use serde_json::{Value, json};

use super::rng::Rng;

/// One request of a caller.
#[derive(Debug, Clone)]
pub(super) struct Request {
    /// Of which instance.
    pub(super) instance: String,
    pub(super) what: What,
    /// Its Idempotency-Key.
    pub(super) key: Option<String>,
    /// Whether the caller is content with hearing that it runs.
    pub(super) hurried: bool,
}

#[derive(Debug, Clone)]
pub(super) enum What {
    Resize(Value),
    Stop {
        force: bool,
    },
    Start,
    /// Of the newest change of that instance that its caller knows of.
    Undo,
}

/// How a life of the daemon ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// It is killed at the n-th place that it reaches.
    Kill(u64),
    /// The host's power goes when it reaches the n-th place.
    PowerCut(u64),
    /// The host's power goes within the n-th call to the disk.
    TornWrite(u64),
}

#[derive(Debug, Clone)]
pub(super) struct Schedule {
    pub(super) instances: Vec<String>,
    /// The description of the fake engine.
    pub(super) fake: Value,
    pub(super) cpus: u64,
    pub(super) memory_mib: u32,
    /// What each caller asks for, in order.
    pub(super) callers: Vec<Vec<Request>>,
    pub(super) ends: Vec<End>,
    /// Whether somebody changes values behind the daemon's back.
    pub(super) meddling: bool,
    /// Whether instances are restarted behind the daemon's back.
    pub(super) restarting: bool,
    /// Whether the disk is full or fails now and then.
    pub(super) disk_faults: bool,
}

impl Schedule {
    pub(super) fn draw(rng: &mut Rng) -> Self {
        let instances: Vec<String> = ["a", "b", "c"].iter().take(1 + rng.index(3)).map(|&n| n.to_owned()).collect();
        let spec = |name: &String, rng: &mut Rng| {
            json!({
                "name": name, "cpus": 2, "memory": "1GiB", "max_cpus": 8, "max_memory": "8GiB", "used": "100MiB",
                "stopped": rng.chance(1, 8), "stubborn": rng.chance(1, 4),
            })
        };
        let specs: Vec<Value> = instances.iter().map(|name| spec(name, rng)).collect();
        let mut faults = Vec::new();
        for _ in 0..rng.below(4) {
            let kinds = ["fail", "fail-after", "lie", "unavailable", "hang", "hang-after", "hang-late", "guest-late"];
            let (name, kind) = (&instances[rng.index(instances.len())], kinds[rng.index(kinds.len())]);
            faults.push(json!({"instance": format!("vm/{name}"), "nth": rng.below(14), "fault": kind}));
        }
        let callers = (0..1 + rng.index(4))
            .map(|caller| (0..1 + rng.index(4)).map(|n| request(rng, &instances, caller, n)).collect())
            .collect();
        let ends = (0..rng.below(4))
            .map(|_| match rng.below(4) {
                0 => End::PowerCut(1 + rng.below(40)),
                1 => End::TornWrite(1 + rng.below(120)),
                _ => End::Kill(1 + rng.below(40)),
            })
            .collect();
        Schedule {
            fake: json!({"instances": specs, "faults": faults, "delay_ms": rng.below(3) * 40, "announces": rng.chance(1, 2)}),
            cpus: 4 + rng.below(8),
            memory_mib: u32::try_from(2048 + rng.below(8) * 1024).unwrap_or(2048),
            instances,
            callers,
            ends,
            meddling: rng.chance(1, 5),
            restarting: rng.chance(1, 5),
            disk_faults: rng.chance(1, 4),
        }
    }
}

fn request(rng: &mut Rng, instances: &[String], caller: usize, n: usize) -> Request {
    let cpus = ["+1", "-1", "3", "4"][rng.index(4)];
    let memory = ["+512MiB", "-256MiB", "2GiB", "3GiB"][rng.index(4)];
    let cpu_limit = [json!(1.5), json!(2.5), json!("none")][rng.index(3)].clone();
    let what = match rng.below(11) {
        0 => What::Resize(json!({"cpus": cpus})),
        1 => What::Resize(json!({"memory": memory})),
        2 | 3 => What::Resize(json!({"cpus": cpus, "memory": memory})),
        4 | 5 => What::Resize(json!({"cpus": cpus, "memory": memory, "cpu_limit": cpu_limit})),
        6 => What::Stop { force: rng.chance(1, 2) },
        7 => What::Start,
        8 => What::Undo,
        9 => What::Resize(json!({"cpus": 10, "memory": memory, "restart": "if-needed", "force": rng.chance(1, 2)})),
        _ => What::Resize(json!({"memory": memory, "apply": "next-boot"})),
    };
    Request {
        instance: instances[rng.index(instances.len())].clone(),
        what,
        key: rng.chance(2, 3).then(|| format!("key-{caller}-{n}")),
        hurried: rng.chance(1, 4),
    }
}

/// A time for something to happen, from at once to a few seconds.
pub(super) fn some_time(rng: &mut Rng) -> Duration {
    Duration::from_millis([0, 1, 20, 150, 600, 2500][rng.index(6)] + rng.below(20))
}
