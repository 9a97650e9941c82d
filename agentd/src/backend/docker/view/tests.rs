use bollard::models::{ContainerConfig, HostConfig};

use super::*;

const ID: &str = "c60e8af7eff2d8e6ad101151c6d4ed02505b278dceac08e04253641bc5ce5078";

fn inspected(status: Status) -> ContainerInspectResponse {
    let up = matches!(status, Status::RUNNING | Status::PAUSED);
    ContainerInspectResponse {
        id: Some(ID.into()),
        name: Some("/web".into()),
        state: Some(ContainerState {
            status: Some(status),
            pid: Some(if up { 42 } else { 0 }),
            started_at: Some("2026-11-21T05:07:58.8Z".into()),
            ..Default::default()
        }),
        host_config: Some(HostConfig {
            nano_cpus: Some(500_000_000),
            memory: Some(64 << 20),
            memory_swap: Some(128 << 20),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn labelled(key: &str, value: &str) -> ContainerInspectResponse {
    let labels = HashMap::from([(key.to_owned(), value.to_owned())]);
    let config = ContainerConfig { labels: Some(labels), ..Default::default() };
    ContainerInspectResponse { config: Some(config), ..inspected(Status::RUNNING) }
}

fn seen(millis: u64, memory: u64) -> Seen {
    Seen {
        cpus: Some(Limit::At(Cpus::from_millis(millis))),
        memory: ByteCount::new(memory).map(Limit::At),
        used: Some(ByteCount::mib(5)),
    }
}

#[test]
fn every_state_of_docker_has_its_word() {
    for (status, word) in [
        (Status::RUNNING, State::Running),
        (Status::PAUSED, State::Paused),
        (Status::CREATED, State::Stopped),
        (Status::EXITED, State::Stopped),
        (Status::DEAD, State::Stopped),
        (Status::RESTARTING, State::Starting),
        (Status::REMOVING, State::Stopping),
        (Status::STOPPING, State::Stopping),
        (Status::EMPTY, State::Unknown),
    ] {
        assert_eq!(state(&inspected(status)), word, "{status}");
    }
    assert_eq!(state(&ContainerInspectResponse::default()), State::Unknown);
}

#[test]
fn a_running_container_shows_both_what_docker_says_and_what_the_kernel_does() {
    let shown = observed(&inspected(Status::RUNNING), Some(seen(1000, 64 << 20)), Some(Cpus::whole(2))).unwrap();
    assert_eq!(shown.reference.as_str(), "container/web");
    assert_eq!(shown.id, ID);
    assert_eq!(shown.boot.as_deref(), Some("2026-11-21T05:07:58.8Z pid 42"));
    assert_eq!(shown.cpus.accepted, Some(Limit::At(Cpus::from_millis(500))));
    assert_eq!(shown.cpus.observed, Some(Limit::At(Cpus::whole(1))));
    assert_eq!(shown.cpus.ceiling, Some(Cpus::whole(2)));
    assert_eq!(shown.notes, ["docker says 0.5 CPUs, the cgroup has 1"]);
    assert_eq!(shown.used, Usage::Known(ByteCount::mib(5)));
    assert_eq!(
        shown.native,
        serde_json::json!({"NanoCpus":500_000_000,"CpuQuota":0,"CpuPeriod":0,"Memory":64 << 20,"MemorySwap":128 << 20})
    );
}

#[test]
fn what_the_systemd_driver_rounds_up_is_no_disagreement() {
    let shown = observed(&inspected(Status::RUNNING), Some(seen(509, 64 << 20)), None).unwrap();
    assert!(shown.notes.is_empty(), "{:?}", shown.notes);
}

#[test]
fn a_limit_that_the_kernel_rounded_down_to_pages_reads_as_it_was_set() {
    let mut odd = inspected(Status::RUNNING);
    odd.host_config.as_mut().unwrap().memory = Some(100_000_001);
    let shown = observed(&odd, Some(seen(500, 99_999_744)), None).unwrap();
    assert_eq!(shown.memory.observed, shown.memory.accepted);
    assert!(shown.notes.is_empty(), "{:?}", shown.notes);
}

#[test]
fn a_stopped_container_has_no_boot_and_nothing_observed() {
    let shown = observed(&inspected(Status::EXITED), None, None).unwrap();
    assert_eq!((shown.boot, shown.cpus.observed, shown.memory.observed), (None, None, None));
    assert_eq!(shown.memory.persistent, Some(Limit::At(ByteCount::mib(64))));
    assert_eq!(shown.demand.memory, shown.memory.persistent);
    assert_eq!(shown.used, Usage::Unknown);
    assert!(shown.notes.is_empty(), "{:?}", shown.notes);
}

#[test]
fn a_cgroup_that_cannot_be_read_is_said_and_not_guessed() {
    let shown = observed(&inspected(Status::RUNNING), Some(Seen::default()), None).unwrap();
    assert_eq!((shown.cpus.observed, shown.memory.observed), (None, None));
    assert!(shown.notes.iter().any(|note| note.contains("can't be read")), "{:?}", shown.notes);
}

#[test]
fn limits_that_docker_cannot_take_away_say_so() {
    let shown = observed(&inspected(Status::RUNNING), Some(seen(500, 64 << 20)), Some(Cpus::whole(8))).unwrap();
    assert!(matches!(shown.cpus.unlimit, Ability::OneWay(_)));
    assert!(matches!(shown.memory.unlimit, Ability::No(Code::Unsupported, _)));

    let mut quota = inspected(Status::RUNNING);
    quota.host_config = Some(HostConfig { cpu_quota: Some(50_000), ..Default::default() });
    let shown = observed(&quota, None, None).unwrap();
    assert_eq!(shown.cpus.unlimit, Ability::Yes);
}

#[test]
fn a_container_whose_cpu_limit_was_lifted_for_good_takes_no_other() {
    let mut stuck = inspected(Status::RUNNING);
    stuck.host_config.as_mut().unwrap().cpu_quota = Some(-1);
    let shown = observed(&stuck, Some(seen(500, 64 << 20)), None).unwrap();
    assert_eq!(shown.cpus.accepted, Some(Limit::At(Cpus::from_millis(500))));
    assert_eq!(shown.cpus.persistent, Some(Limit::Unlimited));
    assert!(matches!(shown.cpus.live, Ability::No(Code::Unsupported, _)));
    assert_eq!(shown.notes.len(), 1, "{:?}", shown.notes);
}

#[test]
fn compose_is_warned_of_and_swarm_is_left_alone() {
    let shown = observed(&labelled(COMPOSE, "shop"), Some(seen(500, 64 << 20)), None).unwrap();
    assert!(shown.notes[0].contains("project shop") && shown.unchangeable.is_none());
    let shown = observed(&labelled(SWARM, "x1"), Some(seen(500, 64 << 20)), None).unwrap();
    assert!(shown.unchangeable.is_some());
}

#[test]
fn a_container_that_cannot_be_inspected_is_shown_as_unknown() {
    let summary = ContainerSummary {
        id: Some(ID.into()),
        names: Some(vec!["/other/alias".into(), "/web".into()]),
        ..Default::default()
    };
    let shown = unreadable(&summary, "docker gave no answer").unwrap();
    assert_eq!((shown.reference.as_str(), shown.state), ("container/web", State::Unknown));
    assert_eq!(shown.cpus.accepted, None);
    assert_eq!(shown.notes, ["docker gave no answer"]);
}
