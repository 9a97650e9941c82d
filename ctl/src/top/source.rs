//! What `ctl top` shows, asked from agentd in one go: the host, the instances, what they use. Knows no terminal.

use std::collections::HashMap;
use std::time::Duration;

use agentd_core::api::{Capacity, HostUse, Instance, InstanceList, UsageList, UsageView};
use agentd_core::instance::Kind;
use serde_json::{Value, json};

use crate::client::{Client, Reply, all_pages, encode};
use crate::error::Failure;

/// How long one answer may take: a host that is slow is no reason to call it gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// Who is asked, and about which instances.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    client: Client,
    /// `--match`
    pattern: Option<String>,
}

/// The answers, as they came.
#[derive(Debug)]
pub(crate) struct Answers {
    capacity: Reply,
    instances: Reply,
    usage: Reply,
}

/// The answers, read.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sample {
    /// What the host has and has promised.
    pub(crate) capacity: Capacity,
    /// What is in use of the host.
    pub(crate) host: HostUse,
    /// Each instance, and what it uses where that is known.
    pub(crate) instances: Vec<(Instance, Option<UsageView>)>,
    /// The kinds whose backend does not answer.
    pub(crate) unavailable: Vec<Kind>,
}

impl Source {
    /// Asks this agentd, about those that match.
    pub(crate) fn new(client: Client, pattern: Option<String>) -> Self {
        Source { client, pattern }
    }

    /// Asks for everything.
    pub(crate) fn ask(&self) -> Result<Answers, Failure> {
        let get = |path: &str| self.client.get_within(path, PATIENCE);
        let query: Vec<String> = self.pattern.iter().map(|pattern| format!("match={}", encode(pattern))).collect();
        let usage = if query.is_empty() { "/v1/usage".into() } else { format!("/v1/usage?{}", query.join("&")) };
        Ok(Answers {
            capacity: get("/v1/capacity")?,
            instances: all_pages("/v1/instances", &query, get)?,
            usage: get(&usage)?,
        })
    }
}

impl Answers {
    /// The answers as the API's types.
    pub(crate) fn sample(&self) -> Result<Sample, Failure> {
        let (list, usage): (InstanceList, UsageList) = (self.instances.read()?, self.usage.read()?);
        let mut used: HashMap<String, UsageView> =
            usage.items.into_iter().map(|item| (item.reference.clone(), item)).collect();
        let with_use = |instance: Instance| {
            let used = used.remove(&instance.reference);
            (instance, used)
        };
        Ok(Sample {
            capacity: self.capacity.read()?,
            host: usage.host,
            instances: list.items.into_iter().map(with_use).collect(),
            unavailable: list.unavailable,
        })
    }

    /// One document of all: the host with what is in use of it, and the instances, each with its use. What a newer agentd
    /// tells beyond what ctl knows is in it, too.
    pub(crate) fn document(&self) -> Result<String, Failure> {
        let (mut host, mut list, mut usage): (Value, Value, Value) =
            (self.capacity.read()?, self.instances.read()?, self.usage.read()?);
        host["used"] = usage["host"].take();
        let mut used: HashMap<String, Value> = HashMap::new();
        if let Some(Value::Array(items)) = usage.get_mut("items").map(Value::take) {
            used.extend(items.into_iter().filter_map(|item| Some((item.get("ref")?.as_str()?.to_owned(), item))));
        }
        let mut instances = list["items"].take();
        for instance in instances.as_array_mut().into_iter().flatten() {
            let of = instance.get("ref").and_then(Value::as_str).and_then(|reference| used.remove(reference));
            instance["usage"] = of.unwrap_or(Value::Null);
        }
        Ok(json!({"host": host, "instances": instances, "unavailable": list["unavailable"].take()}).to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Does, Server, reply};

    const FIELD: &str = r#"{"accepted":2,"observed":2,"confirmed":null,"persistent":2,"ceiling":4}"#;

    fn instance(name: &str) -> String {
        format!(
            r#"{{"ref":"vm/{name}","kind":"vm","name":"{name}","id":"i","state":"running","version":"v","cpus":{FIELD},"cpu_limit":{FIELD},"memory":{FIELD},"committed":{{"cpus":2,"memory":0}},"labels":{{}},"holds":[],"notes":[],"new":1}}"#
        )
    }

    fn answers() -> Vec<Does> {
        let of = r#"{"total":8,"reserved":0,"overcommit":1.0,"allowed":8,"committed":4,"free":4,"over":false}"#;
        let page = |name: &str, cursor: &str| {
            let items = instance(name);
            format!(r#"{{"items":[{items}],"next_cursor":{cursor},"total":2,"unavailable":["unit"]}}"#)
        };
        let usage = r#"{"items":[{"ref":"vm/b","kind":"vm","at":"2026-03-01T14:00:00Z","cpu":{"rate":0.5},"memory":{},
            "pressure":null,"notes":[],"newer":2}],"host":{"cpus":null,"memory":5}}"#;
        [
            format!(
                r#"{{"cpus":{of},"memory":{of},"by_kind":{{}},"limits":[],"vm_memory":"observed","vm_overhead":0,"unlimited":[],"unavailable":[]}}"#
            ),
            page("a", "\"c\""),
            page("b", "null"),
            usage.to_owned(),
        ]
        .map(|body| Does::Say(reply(200, &body)))
        .into()
    }

    #[test]
    fn one_look_asks_for_all_that_matches_and_puts_it_together() {
        let server = Server::new(answers());
        let source = Source::new(Client::new(&server.socket()), Some("vm/*".into()));
        let answers = source.ask().unwrap();
        let sample = answers.sample().unwrap();
        let rates: Vec<_> = sample.instances.iter().map(|(_, usage)| usage.as_ref().and_then(|u| u.cpu.rate)).collect();
        assert_eq!(rates, [None, Some(0.5)], "each has its own, and what nobody told is unknown");
        assert_eq!((sample.host.cpus, sample.host.memory.map(|bytes| bytes.bytes())), (None, Some(5)));
        assert_eq!(sample.unavailable, [Kind::Unit]);
        let asked = server.requests();
        for (request, path) in asked.iter().zip([
            "get /v1/capacity http",
            "get /v1/instances?match=vm%2f%2a http",
            "get /v1/instances?match=vm%2f%2a&cursor=c http",
            "get /v1/usage?match=vm%2f%2a http",
        ]) {
            assert!(request.starts_with(path), "{asked:?}");
        }
        let document: Value = serde_json::from_str(&answers.document().unwrap()).unwrap();
        assert_eq!((&document["host"]["used"]["memory"], &document["host"]["cpus"]["allowed"]), (&json!(5), &json!(8)));
        assert_eq!(document["instances"][0]["usage"], Value::Null);
        assert_eq!(
            (&document["instances"][1]["usage"]["newer"], &document["instances"][1]["new"]),
            (&json!(2), &json!(1))
        );
    }

    #[test]
    fn an_agentd_that_goes_in_the_middle_is_a_failure_and_no_half_sample() {
        let mut script = answers();
        script.truncate(2);
        let server = Server::new(script);
        let failure = Source::new(Client::new(&server.socket()), None).ask().unwrap_err();
        assert_eq!(failure.code, Failure::UNREACHABLE);
    }
}
