//! An instance of each kind at rest, to ask things of.

use std::collections::BTreeMap;

use agentd_core::instance::{Ability, Barred, Covered, Demand, Kind, Observed, Reading, Ref, Saved, State, Usage};
use agentd_core::units::{ByteCount, Cpus, Limit};

fn at_rest<T: Copy>(value: Limit<T>, grain: T, least: T, ceiling: Option<T>) -> Reading<T> {
    Reading {
        accepted: Some(value),
        observed: Some(value),
        confirmed: None,
        persistent: Some(value),
        ceiling,
        saved_ceiling: ceiling,
        floor: None,
        grain,
        least,
        live: Ability::Yes,
        unlimit: Ability::Yes,
    }
}

/// A VM of 2 of 4 vCPUs and 1 of 2 GiB, a container and a unit of half a CPU and 64 MiB; up or down.
pub(crate) fn one(kind: Kind, up: bool) -> Observed {
    let is_vm = kind == Kind::Vm;
    let page = ByteCount::mib(1);
    let (cpus, memory) = match kind {
        Kind::Vm => (
            at_rest(Limit::At(Cpus::whole(2)), Cpus::whole(1), Cpus::whole(1), Some(Cpus::whole(4))),
            at_rest(Limit::At(ByteCount::mib(1024)), page, page, Some(ByteCount::mib(2048))),
        ),
        Kind::Container | Kind::Unit => (
            at_rest(Limit::At(Cpus::from_millis(500)), Cpus::from_millis(10), Cpus::from_millis(10), None),
            at_rest(Limit::At(ByteCount::mib(64)), page, page, None),
        ),
    };
    Observed {
        reference: Ref::new(kind, "web").expect("a name"),
        id: "id".into(),
        boot: up.then(|| "1".into()),
        state: if up { State::Running } else { State::Stopped },
        saved: match kind {
            Kind::Vm => Saved::Apart,
            Kind::Container => Saved::Together,
            Kind::Unit => Saved::OnRequest,
        },
        demand: Demand { cpus: cpus.persistent, memory: memory.persistent },
        cpus,
        cpu_limit: if is_vm {
            at_rest(Limit::Unlimited, Cpus::from_millis(1), Cpus::from_millis(10), None)
        } else {
            Reading::absent(Cpus::from_millis(1), "it has cpus for that")
        },
        memory,
        used: Usage::Known(ByteCount::mib(32)),
        covered: Covered::default(),
        barred: Barred::default(),
        parts: None,
        saved_parts: None,
        labels: BTreeMap::new(),
        notes: Vec::new(),
        switched_off: false,
        unchangeable: None,
        native: serde_json::Value::Null,
    }
}
