//! What Docker's inspect and the kernel's cgroup say of one container, as the observation that the rest of agentd works
//! with. Pure.

use std::collections::{BTreeMap, HashMap};

use agentd_core::error::{Code, Problem};
use agentd_core::instance::{Ability, Barred, Covered, Demand, Kind, Observed, Reading, Ref, Saved, State, Usage};
use agentd_core::units::{ByteCount, Cpus, Limit};
use bollard::models::{ContainerInspectResponse, ContainerState, ContainerStateStatusEnum as Status, ContainerSummary};

use super::limits::{MEMORY_STAYS, Native, STUCK, same_cpus};
use crate::backend::cgroup::Seen;

/// Docker counts CPUs finer, people don't.
const CPU_GRAIN: Cpus = Cpus::from_millis(1);
/// A page: the kernel rounds a limit down to whole ones.
const PAGE: u64 = 4096;
/// The least memory limit that Docker takes (moby's `linuxMinMemory`, 6 MiB since 20.10).
const LEAST_MEMORY: ByteCount = ByteCount::mib(6);

const COMPOSE: &str = "com.docker.compose.project";
const SWARM: &str = "com.docker.swarm.service.id";

/// The full id, or nothing.
pub(super) fn id(inspected: &ContainerInspectResponse) -> &str {
    inspected.id.as_deref().unwrap_or_default()
}

/// The name without Docker's leading slash.
pub(super) fn name(inspected: &ContainerInspectResponse) -> &str {
    inspected.name.as_deref().unwrap_or_default().trim_start_matches('/')
}

/// The main process, where there is one.
pub(super) fn pid(inspected: &ContainerInspectResponse) -> Option<u32> {
    inspected.state.as_ref().and_then(|state| u32::try_from(state.pid?).ok()).filter(|pid| *pid > 0)
}

/// What changes with every start: when it started and as which process. `None` while there is no process.
pub(super) fn boot(inspected: &ContainerInspectResponse) -> Option<String> {
    let started = inspected.state.as_ref()?.started_at.as_deref()?;
    state(inspected).is_up().then_some(())?;
    pid(inspected).map(|pid| format!("{started} pid {pid}"))
}

/// Its state in agentd's words.
pub(super) fn state(inspected: &ContainerInspectResponse) -> State {
    match inspected.state.as_ref().and_then(|state| state.status) {
        Some(Status::RUNNING) => State::Running,
        Some(Status::PAUSED) => State::Paused,
        Some(Status::CREATED | Status::EXITED | Status::DEAD) => State::Stopped,
        Some(Status::RESTARTING) => State::Starting,
        Some(Status::REMOVING | Status::STOPPING) => State::Stopping,
        Some(Status::EMPTY) | None => State::Unknown,
    }
}

/// The values that Docker keeps, verbatim.
pub(super) fn native(inspected: &ContainerInspectResponse) -> Native {
    inspected.host_config.as_ref().map(Native::of).unwrap_or_default()
}

/// One container. `seen` is `None` while it is down.
pub(super) fn observed(
    inspected: &ContainerInspectResponse,
    seen: Option<Seen>,
    host_cpus: Option<Cpus>,
) -> Result<Observed, Problem> {
    let native = native(inspected);
    let state = state(inspected);
    let up = seen.is_some();
    let seen = seen.unwrap_or_default();
    let memory_limit = native.memory_limit();
    let cpus = Reading {
        accepted: Some(if up { native.live_cpus(seen.cpus) } else { native.saved_cpus() }),
        observed: seen.cpus,
        confirmed: None,
        persistent: Some(native.saved_cpus()),
        ceiling: host_cpus,
        saved_ceiling: host_cpus,
        floor: None,
        grain: CPU_GRAIN,
        least: native.least_cpus(),
        live: if native.is_stuck() { Ability::No(Code::Unsupported, STUCK.into()) } else { Ability::Yes },
        unlimit: unlimit_cpus(&native),
    };
    let memory = Reading {
        accepted: Some(memory_limit),
        observed: seen.memory.map(|seen| unrounded(memory_limit, seen)),
        confirmed: None,
        persistent: Some(memory_limit),
        ceiling: None,
        saved_ceiling: None,
        floor: None,
        grain: ByteCount::new(PAGE).unwrap_or(ByteCount::ZERO),
        least: LEAST_MEMORY,
        live: Ability::Yes,
        unlimit: Ability::No(Code::Unsupported, MEMORY_STAYS.into()),
    };
    let labels = labels(inspected.config.as_ref().and_then(|config| config.labels.as_ref()));
    let mut notes = notes(inspected.state.as_ref(), &labels, &native);
    notes.extend(disagreements(&cpus, &memory, up));
    // Docker takes longer names than any reference can have. Whoever names a container does not keep it out of what is counted.
    let reference = match Ref::new(Kind::Container, name(inspected)) {
        Ok(reference) => reference,
        Err(_) => {
            notes.push("its name can't be part of a reference: here its id is its name".to_owned());
            Ref::new(Kind::Container, id(inspected))?
        }
    };
    Ok(Observed {
        reference,
        id: id(inspected).to_owned(),
        boot: boot(inspected),
        state,
        saved: Saved::Together,
        demand: Demand { cpus: cpus.persistent, memory: memory.persistent },
        covered: Covered::default(),
        barred: Barred {
            restart: inspected.host_config.as_ref().and_then(|host| host.auto_remove).unwrap_or_default().then(|| {
                "it was run with --rm: Docker removes it when it stops".into()
            }),
            ..Barred::default()
        },
        parts: None,
        saved_parts: None,
        cpus,
        cpu_limit: no_cpu_limit(),
        memory,
        used: seen.used.map_or(Usage::Unknown, Usage::Known),
        switched_off: false,
        unchangeable: labels.contains_key(SWARM).then(|| {
            "swarm manages it and would replace it; change the service (`docker service update --limit-cpu --limit-memory`)"
                .into()
        }),
        labels,
        notes,
        native: serde_json::to_value(native).unwrap_or_default(),
    })
}

/// A container that Docker lists and doesn't describe: shown, and nothing claimed.
pub(super) fn unreadable(summary: &ContainerSummary, why: &str) -> Option<Observed> {
    let listed = summary.names.iter().flatten().map(|name| name.trim_start_matches('/'));
    // A link's name has a slash in it and is another container's alias.
    let named = listed.filter(|name| !name.contains('/')).find_map(|name| Ref::new(Kind::Container, name).ok());
    let reference = named.or_else(|| Ref::new(Kind::Container, summary.id.as_deref()?).ok())?;
    let labels = labels(summary.labels.as_ref());
    Some(Observed {
        reference,
        id: summary.id.clone()?,
        boot: None,
        state: State::Unknown,
        saved: Saved::Together,
        cpus: Reading::absent(CPU_GRAIN, why),
        cpu_limit: no_cpu_limit(),
        memory: Reading::absent(ByteCount::new(PAGE).unwrap_or(ByteCount::ZERO), why),
        used: Usage::Unknown,
        demand: Demand { cpus: None, memory: None },
        covered: Covered::default(),
        barred: Barred::default(),
        parts: None,
        saved_parts: None,
        labels,
        notes: vec![why.to_owned()],
        switched_off: false,
        unchangeable: None,
        native: serde_json::Value::Null,
    })
}

fn no_cpu_limit() -> Reading<Cpus> {
    Reading::absent(CPU_GRAIN, "only a VM has a cpu_limit beside its cpus; the CPU limit of a container is its cpus")
}

fn unlimit_cpus(native: &Native) -> Ability {
    if native.saved_cpus() == Limit::Unlimited || !native.in_nano_form() {
        return Ability::Yes;
    }
    Ability::OneWay(
        "it was made with --cpus: once that limit is gone, Docker drops every later one at the next start, \
         so it takes a new container to limit it again"
            .into(),
    )
}

/// The kernel's value, or the limit that was set where the kernel only rounded it down to whole pages.
fn unrounded(set: Limit<ByteCount>, seen: Limit<ByteCount>) -> Limit<ByteCount> {
    match (set, seen) {
        (Limit::At(bytes), Limit::At(seen)) if bytes.bytes() / PAGE * PAGE == seen.bytes() => set,
        _ => seen,
    }
}

fn labels(labels: Option<&HashMap<String, String>>) -> BTreeMap<String, String> {
    labels.into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
}

fn notes(state: Option<&ContainerState>, labels: &BTreeMap<String, String>, native: &Native) -> Vec<String> {
    let mut notes = Vec::new();
    match state.and_then(|state| state.status) {
        Some(Status::RESTARTING) => {
            notes.push("docker is about to start it again: a change now would only be kept for that start".into());
        }
        Some(Status::DEAD) => notes.push("docker failed to remove it: it can't be started, only removed".into()),
        Some(Status::EXITED) if state.is_some_and(|state| state.oom_killed == Some(true)) => {
            notes.push("the kernel killed it for lack of memory".into());
        }
        _ => {}
    }
    if let Some(project) = labels.get(COMPOSE) {
        notes.push(format!("managed by compose (project {project}): recreating it drops what is changed here"));
    }
    if native.is_stuck() {
        notes.push(format!("no CPU limit lasts over a start: {STUCK}"));
    }
    notes
}

/// Where the kernel doesn't have what Docker says: inspect shows what was written down before the runtime was asked, and
/// others write to cgroups too.
fn disagreements(cpus: &Reading<Cpus>, memory: &Reading<ByteCount>, up: bool) -> Vec<String> {
    let mut notes = Vec::new();
    match (cpus.accepted, cpus.observed) {
        (Some(said), Some(seen)) if !same_cpus(said, seen) => {
            notes.push(format!("docker says {said} CPUs, the cgroup has {seen}"));
        }
        _ => {}
    }
    match (memory.accepted, memory.observed) {
        (Some(said), Some(seen)) if said != seen => {
            notes.push(format!("docker says {said} of memory, the cgroup has {seen}"));
        }
        _ => {}
    }
    if up && (cpus.observed.is_none() || memory.observed.is_none()) {
        notes.push("its cgroup can't be read: what the kernel enforces is unknown".into());
    }
    notes
}

#[cfg(test)]
mod tests;
