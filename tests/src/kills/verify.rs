//! What must hold once the dust has settled, whenever a daemon was killed. The engine's own file says what is there; the
//! daemon is asked only for what it has on record.

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::{
    life::{Home, Life},
    run::{OPEN, send},
    scenario::{Ask, OVERHEAD, Scenario},
};
use crate::lab::Response;

/// What a client asked for and was told; nothing where the daemon was killed first.
#[derive(Debug, Clone)]
pub(super) struct Told {
    pub(super) ask: Ask,
    pub(super) reply: Option<Response>,
}

impl Told {
    /// The operation that it was told of.
    pub(super) fn operation(&self) -> Option<String> {
        self.reply.as_ref()?.json()["operation"].as_str().map(str::to_owned)
    }
}

/// Everything that the daemon has on record.
struct Record {
    operations: BTreeMap<String, Value>,
    /// The newest first.
    history: Vec<Value>,
    /// By reference.
    instances: BTreeMap<String, Value>,
    capacity: Value,
}

impl Record {
    fn of(life: &Life) -> Result<Record> {
        let here = "the last life goes on";
        let text = |value: &Value, member: &str| value[member].as_str().unwrap_or_default().to_owned();
        let items = |list: Value| list["items"].as_array().cloned().unwrap_or_default();
        let operations = life.operations()?.context(here)?;
        let instances = items(life.get("/v1/instances")?.context(here)?);
        Ok(Record {
            operations: operations.into_iter().map(|operation| (text(&operation, "operation"), operation)).collect(),
            history: items(life.get("/v1/history?limit=1000")?.context(here)?),
            instances: instances.into_iter().map(|instance| (text(&instance, "ref"), instance)).collect(),
            capacity: life.get("/v1/capacity")?.context(here)?,
        })
    }

    fn is_held(&self, reference: &str) -> bool {
        self.instances.get(reference).is_some_and(|shown| holds(shown).contains(&"needs-attention"))
    }
}

/// The kinds of an instance's holds.
fn holds(shown: &Value) -> Vec<&str> {
    shown["holds"].as_array().into_iter().flatten().filter_map(|hold| hold["hold"].as_str()).collect()
}

/// One VM of the engine: what it has by the engine's own file.
#[derive(Debug, Clone, PartialEq)]
struct Machine {
    /// Running or paused.
    runs: bool,
    paused: bool,
    live: Value,
    saved: Value,
    observed: Value,
}

/// What the engine has: by its file, or as it began where it has not written any.
fn machines(scenario: &Scenario, home: &Home) -> Result<BTreeMap<String, Machine>> {
    let Ok(text) = fs::read(home.folder().join("engine.json")) else { return Ok(beginning(scenario)) };
    let kept: BTreeMap<String, Value> = serde_json::from_slice(&text)?;
    let machine = |(name, kept): (String, Value)| {
        let [live, saved, observed] = ["live", "saved", "observed"].map(|side| kept[side].clone());
        (
            format!("vm/{name}"),
            Machine { runs: kept["state"] != "stopped", paused: kept["state"] == "paused", live, saved, observed },
        )
    };
    Ok(kept.into_iter().map(machine).collect())
}

fn beginning(scenario: &Scenario) -> BTreeMap<String, Machine> {
    let machine = |spec: &Value| {
        let all = json!({"cpus": spec["cpus"], "cpu_limit": "none", "memory": spec["memory"]});
        let (runs, name) = (spec["stopped"] != true, spec["name"].as_str().unwrap_or_default());
        (format!("vm/{name}"), Machine { runs, paused: false, live: all.clone(), saved: all.clone(), observed: all })
    };
    scenario.engine["instances"].as_array().into_iter().flatten().map(machine).collect()
}

/// What the engine must have if every operation did what its record says, and nothing else.
fn expected(scenario: &Scenario, record: &Record) -> Result<BTreeMap<String, Machine>> {
    let mut machines = beginning(scenario);
    for operation in record.operations.values() {
        if !matches!(operation["outcome"].as_str(), Some("changed" | "pending")) {
            continue;
        }
        let reference = operation["ref"].as_str().unwrap_or_default();
        let machine = machines.get_mut(reference).with_context(|| format!("no {reference}"))?;
        match operation["verb"].as_str() {
            Some("stop") if operation["outcome"] == "changed" => (machine.runs, machine.paused) = (false, false),
            Some("stop") => {}
            Some("start" | "restart") => (machine.runs, machine.live) = (true, machine.saved.clone()),
            Some("suspend") => machine.paused = true,
            Some("resume") => machine.paused = false,
            Some("resize" | "undo") => {
                for change in operation["changes"].as_array().into_iter().flatten() {
                    let field = change["field"].as_str().unwrap_or_default();
                    let saved = change.get("saved_requested").unwrap_or(&change["requested"]);
                    machine.saved[field] = saved.clone();
                    if machine.runs {
                        machine.live[field] = change["requested"].clone();
                    }
                }
                if operation["restart"] == true {
                    machine.live = machine.saved.clone();
                }
            }
            other => bail!("an operation {other:?}"),
        }
    }
    Ok(machines)
}

/// All that must hold.
pub(super) fn verify(scenario: &Scenario, home: &Home, life: &Life, told: &[Told]) -> Result<()> {
    let record = Record::of(life)?;
    let there = machines(scenario, home)?;
    each_is_accounted_for(scenario, &record)?;
    what_was_told_is_on_record(&record, told)?;
    the_history_tells_each_once(&record)?;
    all_or_nothing(scenario, &record, &there)?;
    the_ledger_is_what_is_there(&record, &there)
}

/// No operation is open, no step is between two places, and each outcome is what its steps came to.
fn each_is_accounted_for(scenario: &Scenario, record: &Record) -> Result<()> {
    for operation in record.operations.values() {
        let outcome = operation["outcome"].as_str().unwrap_or_default();
        let steps: Vec<&str> =
            operation["steps"].as_array().into_iter().flatten().filter_map(|step| step["state"].as_str()).collect();
        // A start and a stop are never taken back.
        let resizes = !matches!(operation["verb"].as_str(), Some("start" | "stop"));
        let fits: &[&str] = match outcome {
            "changed" | "pending" if resizes && operation["restart"] == false => &["done", "pending"],
            "changed" | "pending" => &["done", "pending", "failed", "skipped"],
            "rolled-back" if resizes => &["planned", "failed", "undone", "skipped"],
            "rolled-back" => &["planned", "failed", "skipped"],
            "partial" if scenario.may_be_partial => &["planned", "done", "pending", "failed", "undone", "undo-failed"],
            "refused" | "unchanged" => &[],
            _ => bail!("an outcome that nothing here explains: {operation}"),
        };
        // A change that breaks half-way leaves its steps as they were; it is told, and held.
        let broke = outcome == "partial" && operation["code"] == "internal";
        ensure!(broke || steps.iter().all(|state| fits.contains(state)), "steps {steps:?} of {operation}");
        let reference = operation["ref"].as_str().unwrap_or_default();
        ensure!(outcome != "partial" || record.is_held(reference), "partial, and not held: {operation}");
    }
    for (reference, instance) in &record.instances {
        let partial = |operation: &Value| operation["outcome"] == "partial" && operation["ref"] == reference.as_str();
        // Of a suspension the instance's own operations tell.
        let held = holds(instance).iter().any(|hold| *hold != "suspended");
        ensure!(!held || record.operations.values().any(partial), "held, and nobody knows why: {instance}");
    }
    Ok(())
}

/// Whoever got an id or an end finds it on record.
fn what_was_told_is_on_record(record: &Record, told: &[Told]) -> Result<()> {
    for Told { ask, reply } in told {
        let Some(reply) = reply else { continue };
        let body = reply.json();
        let Some(id) = body["operation"].as_str() else {
            ensure!(matches!(body["code"].as_str(), Some("held" | "busy")), "{ask:?} got {body}");
            continue;
        };
        let operation = record.operations.get(id).with_context(|| format!("{id} is lost; {ask:?} got {body}"))?;
        // An acknowledgement promises an end, and an outcome that nobody knew has one by now.
        let open = reply.status == 202 || body["outcome"] == "unknown";
        ensure!(open || operation["outcome"] == body["outcome"], "told {body}, on record {operation}");
    }
    Ok(())
}

/// The history has the end of each operation once, in order, and nothing that did not happen.
fn the_history_tells_each_once(record: &Record) -> Result<()> {
    let seqs: Vec<u64> = record.history.iter().filter_map(|entry| entry["seq"].as_u64()).collect();
    ensure!(seqs.len() == record.history.len() && seqs.windows(2).all(|pair| pair[0] > pair[1]), "{seqs:?}");
    for (id, operation) in &record.operations {
        let of = |entry: &&Value| entry["operation"] == id.as_str();
        let ends = record.history.iter().filter(of).filter(|entry| entry["outcome"] == operation["outcome"]).count();
        let others = record.history.iter().filter(of).filter(|entry| entry["happening"] != "settled");
        let others = others.filter(|entry| entry["outcome"] != operation["outcome"]);
        ensure!(ends == 1, "the history tells {ends} times of {operation}");
        for other in others {
            ensure!(other["outcome"] == "unknown", "the history tells {other} of {operation}");
        }
    }
    for entry in &record.history {
        let known = entry["operation"].as_str().is_some_and(|id| record.operations.contains_key(id));
        ensure!(known, "nobody did this: {entry}");
    }
    Ok(())
}

/// Each instance has what the ends of its operations say, live and saved: wholly before or wholly after each.
fn all_or_nothing(scenario: &Scenario, record: &Record, there: &BTreeMap<String, Machine>) -> Result<()> {
    for (reference, wanted) in expected(scenario, record)? {
        if record.is_held(&reference) {
            continue;
        }
        let found = there.get(&reference).with_context(|| format!("no {reference}"))?;
        let suspended = record.instances.get(&reference).is_some_and(|shown| holds(shown).contains(&"suspended"));
        ensure!(
            (found.paused, suspended) == (wanted.paused, wanted.paused),
            "{reference} is {found:?}, suspended: {suspended}, by its operations {wanted:?}: {:#?}",
            record.operations
        );
        ensure!(
            found.runs == wanted.runs && found.saved == wanted.saved && (!found.runs || found.live == wanted.live),
            "{reference} has {found:?}, by its operations {wanted:?}: {:#?}",
            record.operations
        );
    }
    Ok(())
}

/// What is promised is what is there: of what runs, the most of what was accepted and what is observed.
fn the_ledger_is_what_is_there(record: &Record, there: &BTreeMap<String, Machine>) -> Result<()> {
    let most = |machine: &Machine, field: &str| {
        let side = |side: &Value| side[field].as_u64().unwrap_or_default();
        side(&machine.live).max(side(&machine.observed))
    };
    let up = there.values().filter(|machine| machine.runs);
    let cpus: u64 = up.clone().map(|machine| most(machine, "cpus")).sum();
    let memory: u64 = up.map(|machine| most(machine, "memory") + OVERHEAD).sum();
    let (promised, capacity) = (|resource: &str| record.capacity[resource]["committed"].clone(), &record.capacity);
    ensure!(
        promised("cpus").as_f64() == Some(f64::from(u32::try_from(cpus)?)) && promised("memory") == memory,
        "there are {cpus} CPUs and {memory} bytes: {there:?}; promised are {capacity}"
    );
    Ok(())
}

/// Asks again what was asked under a key: it has one effect in all, and everybody gets the one answer.
pub(super) fn verify_keys(scenario: &Scenario, home: &Home, life: &Life, told: &[Told]) -> Result<()> {
    let before = Record::of(life)?;
    for Told { ask, reply } in told.iter().filter(|told| told.ask.key.is_some()) {
        let patient = Ask { at_once: false, ..ask.clone() };
        let again = || -> Result<(Told, Response)> {
            let told = send(life, &patient, &[])?;
            let reply = told.reply.clone().context("the last life goes on")?;
            ensure!(life.settle(OPEN)?, "the last life goes on");
            Ok((told, reply))
        };
        let mut first = again()?;
        // Nobody knew, and somebody does by now.
        if first.1.json()["outcome"] == "unknown" {
            first = again()?;
        }
        let ((first, one), (_, two)) = (first, again()?);
        ensure!((one.status, &one.body) == (two.status, &two.body), "{} and {}", one.text(), two.text());
        let id = first.operation().context("an answer under a key has its operation")?;
        if let Some(reply) = reply {
            ensure!(reply.json()["operation"] == id.as_str(), "{id} is another one than that of {}", reply.text());
            let same = (one.status, &one.body) == (reply.status, &reply.body);
            let open = reply.status == 202 || reply.json()["outcome"] == "unknown";
            ensure!(open || same, "{} and {}", reply.text(), one.text());
        }
        let after = Record::of(life)?;
        let new = after.operations.len() - before.operations.len();
        ensure!(new <= usize::from(!before.operations.contains_key(&id)), "asking again made {new} operations");
        what_was_told_is_on_record(&after, &[first])?;
    }
    verify(scenario, home, life, told)
}
