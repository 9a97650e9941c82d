//! The words for steps: what a backend call is named in a dry run, a reply and the record. Knows the vocabulary of each
//! kind's engine and nothing else of it.

use super::{Action, Headroom, Scope, Values};
use crate::instance::{Kind, Ref};

/// A step in the words of the engine that carries it out: `libvirt setVcpus live 4`.
pub fn describe(reference: &Ref, action: &Action) -> String {
    let kind = reference.kind();
    let engine = match kind {
        Kind::Vm => "libvirt",
        Kind::Container => "docker",
        Kind::Unit if reference.is_cgroup() => "cgroup",
        Kind::Unit => "systemd",
    };
    let call = match (kind, action) {
        (_, Action::Set { scope, values } | Action::Restore { scope, values, .. }) => set(reference, *scope, values),
        (_, Action::Define { headroom, .. }) => define(headroom),
        (Kind::Vm, Action::Start | Action::Boot { .. }) => "create".into(),
        (Kind::Vm, Action::Shutdown) => "shutdown (ACPI)".into(),
        (Kind::Vm, Action::Kill) => "destroy".into(),
        (Kind::Container, Action::Shutdown) => "kill (stop signal)".into(),
        (Kind::Container, Action::Kill) => "kill (SIGKILL)".into(),
        (_, Action::Start | Action::Boot { .. }) => "start".into(),
        (_, Action::Shutdown) => "stop".into(),
        (_, Action::Kill) => "kill".into(),
        (_, Action::Restart { .. }) => "restart".into(),
        (Kind::Vm, Action::Pause) => "suspend".into(),
        (Kind::Vm, Action::Unpause) => "resume".into(),
        (Kind::Container, Action::Pause) => "pause".into(),
        (Kind::Container, Action::Unpause) => "unpause".into(),
        (Kind::Unit, Action::Pause) => "freeze".into(),
        (Kind::Unit, Action::Unpause) => "thaw".into(),
    };
    format!("{engine} {call}")
}

fn define(headroom: &Headroom) -> String {
    let cpus = headroom.cpus.map(|cpus| format!("{cpus} vCPUs"));
    let memory = headroom.memory.map(|memory| memory.to_string());
    let all: Vec<String> = cpus.into_iter().chain(memory).collect();
    format!("defineXML up to {}", all.join(" and "))
}

fn set(reference: &Ref, scope: Scope, values: &Values) -> String {
    let kind = reference.kind();
    let vm = kind == Kind::Vm;
    let place = match scope {
        Scope::Live if vm => "live ",
        Scope::Saved if vm => "saved ",
        _ => "",
    };
    let mut words = Vec::new();
    if let Some(cpus) = values.cpus {
        words.push(format!("{}{place}{cpus}", if vm { "setVcpus " } else { "cpus " }));
    }
    if let Some(limit) = values.cpu_limit {
        words.push(format!("setSchedulerParameters {place}global_quota {limit}"));
    }
    if let (Some(memory), Some(plugged)) = (values.memory, values.plugged) {
        words.push(format!("virtio-mem {place}{plugged}, {memory} in all"));
    } else if let Some(memory) = values.memory {
        words.push(format!("{}{place}{memory}", if vm { "setMemory " } else { "memory " }));
    }
    let words = words.join(" ");
    match kind {
        Kind::Vm => words,
        Kind::Container => format!("update {words}"),
        Kind::Unit if reference.is_cgroup() => format!("write {words}"),
        Kind::Unit if scope == Scope::Live => format!("SetUnitProperties runtime {words}"),
        Kind::Unit => format!("SetUnitProperties {words}"),
    }
}
