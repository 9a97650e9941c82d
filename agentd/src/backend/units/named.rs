//! The cgroups that the config gives a name, version 1 or 2: delegated to agentd, so it writes them itself. They have no
//! saved form and are neither started nor stopped.

use std::collections::BTreeMap;

use agentd_core::error::Code;
use agentd_core::instance::{Ability, Barred, Covered, Demand, Kind, Observed, Reading, Ref, Saved, State, Usage};
use agentd_core::operation::Identity;
use agentd_core::plan::{Action, Values};
use agentd_core::units::{Cpus, Limit};
use cgroups_rs::fs::cpu::CpuController;
use cgroups_rs::fs::memory::MemController;
use cgroups_rs::fs::{Cgroup, hierarchies};
use serde::{Deserialize, Serialize};

use super::view::{no_cpu_limit, page};
use crate::backend::BackendError;
use crate::backend::cgroup::{Host, Seen};

/// Why one can't be paused.
const NO_FREEZER: &str =
    "it has no freezer: that takes cgroup v2, or below v1's freezer a cgroup of the same path with the same processes";
/// The kernel's default period, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;
/// The least quota that the kernel takes, in microseconds.
const LEAST_QUOTA: u64 = 1_000;

/// The kernel's own numbers, verbatim: what an undo hands back. −1 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Native {
    quota: i64,
    period: u64,
    memory: i64,
}

/// One cgroup as it is now.
pub(super) fn observed(
    host: &Host,
    name: &str,
    path: &str,
    covered: &BTreeMap<String, Covered>,
) -> Result<Observed, BackendError> {
    let reference = Ref::new(Kind::Unit, name).map_err(|problem| BackendError::Failed(problem.detail))?;
    let boot = host.number_of(path).map(|number| format!("cgroup {number}"));
    let seen = host.look_at(path).filter(|_| boot.is_some());
    let up = seen.is_some();
    let seen = seen.unwrap_or_default();
    let native = native(path, &seen);
    let period = native.period.max(1);
    let able = |there: bool, controller: &str| match there {
        true => Ability::Yes,
        false => Ability::No(Code::Unsupported, format!("the controller {controller} is off in {path}")),
    };
    let cpus = Reading {
        accepted: seen.cpus,
        observed: seen.cpus,
        confirmed: None,
        persistent: None,
        ceiling: None,
        saved_ceiling: None,
        floor: None,
        grain: Cpus::from_millis(1),
        least: Cpus::from_millis((LEAST_QUOTA * 1000).div_ceil(period)),
        live: able(seen.cpus.is_some(), "cpu"),
        unlimit: Ability::Yes,
    };
    let memory = Reading {
        accepted: seen.memory,
        observed: seen.memory,
        confirmed: None,
        persistent: None,
        ceiling: None,
        saved_ceiling: None,
        floor: None,
        grain: page(),
        least: page(),
        live: able(seen.memory.is_some(), "memory"),
        unlimit: Ability::Yes,
    };
    let freezer = host.freezer_of(path);
    let no_freezer = freezer.is_none();
    let within = |limited: fn(&Covered) -> bool| covered.values().any(limited);
    let mut notes = vec![format!("cgroup {path}")];
    notes.extend(
        covered.iter().filter(|(_, limits)| limits.cpus || limits.memory).map(|(outer, _)| {
            format!("within unit/{outer}, whose limits count: what that limits is not charged again")
        }),
    );
    Ok(Observed {
        reference,
        id: path.to_owned(),
        boot,
        state: match (up, freezer.and_then(|freezer| freezer.is_frozen())) {
            (false, _) => State::Stopped,
            (true, Some(true)) => State::Paused,
            (true, _) => State::Running,
        },
        barred: Barred {
            power: Some("it is a cgroup, and neither started nor stopped".into()),
            restart: None,
            pause: no_freezer.then(|| NO_FREEZER.into()),
        },
        saved: Saved::Nowhere,
        demand: Demand { cpus: cpus.accepted, memory: memory.accepted },
        covered: Covered { cpus: within(|outer| outer.cpus), memory: within(|outer| outer.memory) },
        cpus,
        cpu_limit: no_cpu_limit(),
        memory,
        used: seen.used.map_or(Usage::Unknown, Usage::Known),
        parts: None,
        saved_parts: None,
        labels: BTreeMap::new(),
        notes,
        switched_off: false,
        unchangeable: (!up).then(|| format!("there is no cgroup {path} now")),
        native: serde_json::to_value(native).unwrap_or_default(),
    })
}

/// One step. Nothing is done where the cgroup is another one by now.
pub(super) fn apply(
    host: &Host,
    target: &Ref,
    path: &str,
    identity: &Identity,
    action: &Action,
) -> Result<(), BackendError> {
    let (values, native) = match action {
        Action::Set { values, .. } => (values, None),
        Action::Restore { values, native, .. } => (values, Some(native)),
        Action::Pause | Action::Unpause => {
            check_number(host, target, path, identity)?;
            let freezer =
                host.freezer_of(path).ok_or_else(|| BackendError::Unsupported(format!("{target}: {NO_FREEZER}")))?;
            return freezer
                .freeze(*action == Action::Pause)
                .map_err(|error| BackendError::Failed(format!("{target} can't be frozen or thawed: {error}")));
        }
        Action::Define { .. }
        | Action::Start
        | Action::Boot { .. }
        | Action::Shutdown
        | Action::Kill
        | Action::Restart { .. } => {
            return Err(BackendError::Unsupported(format!("{target} is a cgroup: it is neither started nor stopped")));
        }
    };
    check_number(host, target, path, identity)?;
    let now = self::native(path, &host.look_at(path).unwrap_or_default());
    let want = match native {
        None => now.with(values),
        Some(native) => serde_json::from_value(native.clone()).map_err(|error| {
            BackendError::Failed(format!("{target} can't be put back: its record is unreadable: {error}"))
        })?,
    };
    write(path, values, &want).map_err(|why| BackendError::Failed(format!("{target} can't be changed: {why}")))
}

/// Nothing is done to one that was removed or made anew.
fn check_number(host: &Host, target: &Ref, path: &str, identity: &Identity) -> Result<(), BackendError> {
    if host.number_of(path).map(|number| format!("cgroup {number}")) == identity.boot {
        return Ok(());
    }
    Err(BackendError::NotFound(format!("{target} was removed or made anew meanwhile")))
}

impl Native {
    fn with(self, values: &Values) -> Native {
        let mut native = self;
        match values.cpus {
            Some(Limit::At(cpus)) => {
                let quota = u128::from(cpus.millis()) * u128::from(self.period) / 1000;
                native.quota = i64::try_from(quota).unwrap_or(i64::MAX).max(LEAST_QUOTA.cast_signed());
            }
            Some(Limit::Unlimited) => native.quota = -1,
            None => {}
        }
        match values.memory {
            Some(Limit::At(memory)) => native.memory = i64::try_from(memory.bytes()).unwrap_or(i64::MAX),
            Some(Limit::Unlimited) => native.memory = -1,
            None => {}
        }
        native
    }
}

fn open(path: &str) -> Cgroup {
    // Named, because otherwise the library would make folders in every hierarchy.
    let controllers = vec!["cpu".to_owned(), "memory".to_owned()];
    Cgroup::load_with_specified_controllers(hierarchies::auto(), path.trim_start_matches('/'), controllers)
}

fn native(path: &str, seen: &Seen) -> Native {
    let cgroup = open(path);
    let cpu: Option<&CpuController> = cgroup.controller_of();
    let memory = match seen.memory {
        Some(Limit::At(memory)) => i64::try_from(memory.bytes()).unwrap_or(i64::MAX),
        Some(Limit::Unlimited) | None => -1,
    };
    let quota = cpu.and_then(|cpu| cpu.cfs_quota().ok()).filter(|quota| *quota != i64::MAX);
    let period = cpu.and_then(|cpu| cpu.cfs_period().ok());
    Native { quota: quota.unwrap_or(-1), period: period.unwrap_or(DEFAULT_PERIOD), memory }
}

fn write(path: &str, values: &Values, want: &Native) -> Result<(), String> {
    let cgroup = open(path);
    let missing = || "its controllers are off".to_owned();
    if values.memory.is_some() {
        let memory: &MemController = cgroup.controller_of().ok_or_else(missing)?;
        memory.set_limit(want.memory).map_err(|error| told(&error))?;
    }
    if values.cpus.is_some() {
        let cpu: &CpuController = cgroup.controller_of().ok_or_else(missing)?;
        cpu.set_cfs_quota_and_period(Some(want.quota), None).map_err(|error| told(&error))?;
    }
    Ok(())
}

/// The library's words with those of the kernel.
fn told(error: &cgroups_rs::fs::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
