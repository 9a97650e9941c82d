//! Bodies of requests, planned; and what the record gives back, taken up.

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;

use agentd::inventory::Book;
use agentd::store::Remembered;
use agentd_core::api::{
    HistoryEntry, Hold, Loan, OperationView, PrepareRequest, ResizeRequest, StopRequest, SuspendRequest, UndoRequest,
};
use agentd_core::config::{Config, parse_duration};
use agentd_core::error::Problem;
use agentd_core::instance::{Kind, Observed};
use agentd_core::ledger::{Charge, Ledger};
use agentd_core::operation::{Operation, Pending};
use agentd_core::plan::{self, HostCapacity, Inputs, Plan, caps, charge_of};
use agentd_core::units::{ByteCount, Cpus};

const HOST: HostCapacity = HostCapacity { cpus: Cpus::whole(8), memory: ByteCount::mib(8192) };
const TEXTS: [&str; 4] = [
    "",
    "[capacity]\ncpus = 4\nmemory = \"3GiB\"\n",
    "[[limit]]\nmatch = \"*/*\"\nmax_cpus = 3\nmax_memory = \"1536MiB\"\n[sizes.large]\ncpus = 4\nmemory = \"2GiB\"\n",
    "[capacity]\ncpus = 4\n[[limit]]\nmatch = \"vm/*\"\ntotal_cpus = 3\n\
     total_memory = \"1GiB\"\n",
];
static CONFIGS: LazyLock<[Config; 4]> =
    LazyLock::new(|| TEXTS.map(|text| Config::parse("agentd.toml", text).expect("a valid config")));

/// A body of a change, on an instance of each kind that is up or down, under different caps: no plan passes one.
pub fn requests(data: &[u8]) {
    let [how, body @ ..] = data else { return };
    let kind = Kind::ALL[usize::from(how & 3) % 3];
    let config = &CONFIGS[usize::from(how >> 2 & 3)];
    let observed = crate::instances::one(kind, how >> 4 & 1 == 0);
    decided(&observed, config, |inputs| {
        if let Ok(request) = serde_json::from_slice::<ResizeRequest>(body) {
            let text = serde_json::to_vec(&request).expect("a request is JSON");
            assert_eq!(
                serde_json::from_slice::<ResizeRequest>(&text).ok(),
                Some(request.clone()),
                "it is told as it was read"
            );
            within(inputs, plan::resize(inputs, &request, None));
            plan::redefinition(inputs, &request);
            for time in [request.wait, request.for_].into_iter().flatten() {
                let _ = parse_duration(&time);
            }
        }
        if let Ok(request) = serde_json::from_slice::<PrepareRequest>(body) {
            let _ = plan::headroom(inputs, &request);
        }
        if let Ok(request) = serde_json::from_slice::<StopRequest>(body) {
            let timeout = request.timeout.as_deref().and_then(|text| parse_duration(text).ok());
            within(inputs, plan::stop(inputs, timeout, request.force));
            within(inputs, plan::restart(inputs, timeout, request.force));
        }
        if let Ok(request) = serde_json::from_slice::<SuspendRequest>(body) {
            within(inputs, plan::suspend(inputs, &request.reason));
        }
        let _ = serde_json::from_slice::<UndoRequest>(body);
    });
}

fn decided(observed: &Observed, config: &Config, decide: impl FnOnce(&Inputs<'_>)) {
    let rules = config.rules_for(observed.reference.as_str(), &observed.labels);
    let host = HostCapacity {
        cpus: config.capacity.cpus.or_host(HOST.cpus),
        memory: config.capacity.memory.or_host(HOST.memory),
    };
    let mut ledger = Ledger::new(caps(config, host));
    ledger.observe(&observed.instance_id(), charge_of(observed, config), &rules.matching);
    decide(&Inputs { observed, holds: &[], config, rules: &rules, host, ledger: &ledger });
}

/// A plan charges no more than the caps let it, and each of its steps says what it is.
fn within(inputs: &Inputs<'_>, planned: Result<Plan, Problem>) {
    let instance = inputs.observed.instance_id();
    match planned {
        Ok(plan) => {
            assert!(inputs.ledger.check(&instance, plan.charge).is_ok(), "{:?} passes a cap", plan.charge);
            assert!(plan.steps.iter().all(|step| !step.what.is_empty()));
        }
        Err(problem) => assert!(!problem.detail.is_empty(), "refused without a word"),
    }
}

/// What an entry of the record may be: read or refused, and what is read is taken up.
pub fn record(data: &[u8]) {
    let _ = serde_json::from_slice::<HistoryEntry>(data);
    let _ = serde_json::from_slice::<OperationView>(data);
    let holds = serde_json::from_slice::<Vec<Hold>>(data).unwrap_or_default();
    let loans = serde_json::from_slice::<Vec<Loan>>(data).unwrap_or_default();
    let pending = serde_json::from_slice::<Vec<Pending>>(data).unwrap_or_default();
    let unseen = serde_json::from_slice::<Charge>(data).ok();
    let config = &CONFIGS[3];
    let mut book = Book::new(config, HOST, "epoch".into());
    let observed = serde_json::from_slice::<Observed>(data).ok();
    let known = observed.clone().unwrap_or_else(|| crate::instances::one(Kind::Vm, true));
    let instance = known.instance_id();
    let remembered =
        Remembered { stamp: 1, observed: known.clone(), version: "1".into(), holds, loans, pending, unseen };
    book.restore(remembered, config);
    if let Ok(mut operation) = serde_json::from_slice::<Operation>(data) {
        let text = serde_json::to_vec(&operation).expect("an operation is JSON");
        assert!(serde_json::from_slice::<Operation>(&text).is_ok(), "what is written can be read");
        book.recovering(&operation, "it is found out".into());
        let _ = plan_undo(&known, config, &operation);
        let _ = operation.resume(&known);
    }
    book.due(u64::MAX, None);
    book.counts();
    if let Some(known) = book.get(&instance) {
        book.instance(known, config);
    }
    // It is seen for the first time, and once more as another one was seen before.
    for seen in [known.clone(), crate::instances::one(Kind::Vm, true), known] {
        let begun = book.moment();
        book.record(seen, begun, config);
    }
    book.take_unrecorded();
    if let Some(observed) = observed {
        decided(&observed, config, |inputs| {
            plan::capabilities(inputs);
            plan::start_charge(&observed, config);
            let bodies = [r#"{"cpus":"+1","memory":"+512M"}"#, r#"{"cpus":1,"cpu_limit":0.5,"apply":"live"}"#];
            for request in bodies.map(|body| serde_json::from_str::<ResizeRequest>(body).expect("a request")) {
                if let Ok(plan) = plan::resize(inputs, &request, None) {
                    let admitted = inputs.ledger.check(&observed.instance_id(), plan.charge);
                    assert!(admitted.is_ok(), "{:?} passes a cap", plan.charge);
                }
            }
            let _ = plan::stop(inputs, Some(Duration::from_secs(1)), true);
            let _ = plan::start(inputs);
            observed.differs_at_next_boot();
        });
        let labels: BTreeMap<String, String> = observed.labels;
        let _ = config.rules_for("vm/web", &labels);
    }
}

fn plan_undo(observed: &Observed, config: &Config, operation: &Operation) -> Result<(), Problem> {
    let mut planned = Ok(());
    decided(observed, config, |inputs| planned = plan::undo(inputs, operation).map(drop));
    planned
}
