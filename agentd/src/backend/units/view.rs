//! What systemd, the files of a unit and the kernel's cgroup say of one unit, as the observation that the rest of agentd
//! works with. Pure.

use std::collections::BTreeMap;

use agentd_core::instance::{Ability, Barred, Covered, Demand, Kind, Observed, Reading, Ref, Saved, State, Usage};
use agentd_core::plan::{Values, same_cpu_time};
use agentd_core::units::{ByteCount, Cpus, Limit};
use serde::{Deserialize, Serialize};
use zbus::zvariant::OwnedValue;

use super::bus::{Properties, Setting};
use super::files;
use crate::backend::BackendError;
use crate::backend::cgroup::Seen;

/// systemd's "no limit".
pub(super) const INFINITY: u64 = u64::MAX;
/// What thousandths of a CPU are in microseconds a second.
const USEC_PER_MILLI: u64 = 1000;
/// systemd writes a quota into a drop-in in whole percents.
const CPU_GRAIN: Cpus = Cpus::from_millis(10);
/// Where systemd keeps what it was told to keep; it goes before what it was told for the time being.
const CONTROL: &str = "/etc/systemd/system.control/";
/// A page.
const PAGE: u64 = 4096;

pub(super) fn page() -> ByteCount {
    ByteCount::new(PAGE).unwrap_or(ByteCount::ZERO)
}

/// What systemd tells of a unit, as far as it is used here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Unit {
    /// Its proper name; it may have others.
    pub(super) id: String,
    pub(super) load: String,
    pub(super) active: String,
    pub(super) sub: String,
    pub(super) freezer: String,
    /// Whether systemd can freeze it (systemd 246 and cgroup v2).
    pub(super) can_freeze: bool,
    pub(super) fragment: String,
    pub(super) drop_ins: Vec<String>,
    pub(super) transient: bool,
    /// 16 bytes that are new with each start; empty while it is down.
    pub(super) invocation: Vec<u8>,
    /// The path of its cgroup; empty where it has none.
    pub(super) cgroup: String,
    pub(super) slice: String,
    /// Microseconds of CPU a second.
    pub(super) cpu_quota: u64,
    /// Bytes.
    pub(super) memory_max: u64,
}

impl Unit {
    pub(super) fn of(mut properties: Properties) -> Self {
        let mut take = |name: &str| properties.remove(name);
        fn get<T: TryFrom<OwnedValue> + Default>(value: Option<OwnedValue>) -> T {
            value.and_then(|value| T::try_from(value).ok()).unwrap_or_default()
        }
        let number = |value: Option<OwnedValue>| value.and_then(|value| u64::try_from(value).ok()).unwrap_or(INFINITY);
        Unit {
            id: get(take("Id")),
            load: get(take("LoadState")),
            active: get(take("ActiveState")),
            sub: get(take("SubState")),
            freezer: get(take("FreezerState")),
            can_freeze: get(take("CanFreeze")),
            fragment: get(take("FragmentPath")),
            drop_ins: get(take("DropInPaths")),
            transient: get(take("Transient")),
            invocation: get(take("InvocationID")),
            cgroup: get(take("ControlGroup")),
            slice: get(take("Slice")),
            cpu_quota: number(take("CPUQuotaPerSecUSec")),
            memory_max: number(take("MemoryMax")),
        }
    }

    /// The section of its files that its limits are in, which is also what it is; `None` for what has no limits.
    pub(super) fn section(&self) -> Option<&'static str> {
        section(&self.id)
    }

    /// Its state in agentd's words.
    pub(super) fn state(&self) -> State {
        match (self.active.as_str(), self.freezer.as_str()) {
            ("active" | "reloading" | "refreshing", "frozen") => State::Paused,
            ("active" | "reloading" | "refreshing", _) => State::Running,
            ("inactive", _) => State::Stopped,
            ("failed", _) => State::Crashed,
            ("activating", _) => State::Starting,
            ("deactivating", _) => State::Stopping,
            _ => State::Unknown,
        }
    }

    /// What changes with every start; `None` while it is down.
    pub(super) fn boot(&self) -> Option<String> {
        let up = self.state().is_up() && self.invocation.iter().any(|byte| *byte != 0);
        up.then(|| self.invocation.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The slices that it is in, the nearest first, without the root's.
    pub(super) fn slices(&self) -> Vec<String> {
        let mut slices = Vec::new();
        let mut next = if self.id.ends_with(".slice") { parent_slice(&self.id) } else { Some(self.slice.clone()) };
        while let Some(slice) = next.filter(|slice| !slice.is_empty() && slice != "-.slice") {
            next = parent_slice(&slice);
            slices.push(slice);
        }
        slices
    }

    /// What an outer one has a limit on.
    pub(super) fn limits(&self) -> Covered {
        Covered { cpus: self.cpu_quota != INFINITY, memory: self.memory_max != INFINITY }
    }
}

/// The section for the limits of a unit of this name.
pub(super) fn section(name: &str) -> Option<&'static str> {
    match name.rsplit_once('.')?.1 {
        "service" => Some("Service"),
        "slice" => Some("Slice"),
        "scope" => Some("Scope"),
        _ => None,
    }
}

/// The slice that a slice is in: `a-b.slice` is in `a.slice` (systemd.slice(5)).
pub(super) fn parent_slice(slice: &str) -> Option<String> {
    let name = slice.strip_suffix(".slice").filter(|name| *name != "-")?;
    Some(name.rsplit_once('-').map_or_else(|| "-.slice".to_owned(), |(outer, _)| format!("{outer}.slice")))
}

/// systemd's own numbers, verbatim: what an undo hands back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Native {
    cpu_quota: u64,
    memory_max: u64,
    saved_cpu_quota: Option<u64>,
    saved_memory_max: Option<u64>,
}

impl Native {
    /// What the fields of `values` were: of what runs, or of what is saved. `None` where one is unknown.
    pub(super) fn settings(&self, values: &Values, saved: bool) -> Option<Vec<Setting>> {
        let mut settings = Vec::new();
        if values.cpus.is_some() {
            settings.push((CPU_QUOTA, if saved { self.saved_cpu_quota? } else { self.cpu_quota }));
        }
        if values.memory.is_some() {
            settings.push((MEMORY_MAX, if saved { self.saved_memory_max? } else { self.memory_max }));
        }
        Some(settings)
    }
}

const CPU_QUOTA: &str = "CPUQuotaPerSecUSec";
const MEMORY_MAX: &str = "MemoryMax";

/// The properties that set these values.
pub(super) fn settings(values: &Values) -> Vec<Setting> {
    let mut settings = Vec::new();
    if let Some(cpus) = values.cpus {
        let quota = cpus.at().map_or(INFINITY, |cpus| cpus.millis().saturating_mul(USEC_PER_MILLI));
        settings.push((CPU_QUOTA, quota));
    }
    if let Some(memory) = values.memory {
        settings.push((MEMORY_MAX, memory.at().map_or(INFINITY, ByteCount::bytes)));
    }
    settings
}

/// One unit. `seen` is what its cgroup says, `None` where it has none.
pub(super) fn observed(
    unit: &Unit,
    saved: files::Saved,
    seen: Option<Seen>,
    covered: &BTreeMap<String, Covered>,
) -> Result<Observed, BackendError> {
    let reference = Ref::new(Kind::Unit, &unit.id)
        .map_err(|problem| BackendError::Failed(format!("systemd's answer can't be used: {}", problem.detail)))?;
    let state = unit.state();
    let up = state.is_up();
    let lasts = !unit.transient && unit.section() != Some("Scope");
    let (cpus_now, memory_now) = (cpus(unit.cpu_quota), memory(unit.memory_max));
    // A unit without a process has no cgroup, and nothing to limit there.
    let seen = seen.unwrap_or(Seen { cpus: Some(cpus_now), memory: Some(memory_now), used: Some(ByteCount::ZERO) });
    let saved_cpus = saved.cpu_quota.map(cpus).filter(|_| lasts);
    let saved_memory = saved.memory_max.map(memory).filter(|_| lasts);
    let reading_cpus = Reading {
        accepted: up.then_some(cpus_now),
        // Where its controller is off, nothing is limited.
        observed: up.then_some(seen.cpus.unwrap_or(Limit::Unlimited)),
        confirmed: None,
        persistent: saved_cpus,
        ceiling: None,
        saved_ceiling: None,
        floor: None,
        grain: CPU_GRAIN,
        least: CPU_GRAIN,
        live: Ability::Yes,
        unlimit: Ability::Yes,
    };
    let reading_memory = Reading {
        accepted: up.then_some(memory_now),
        observed: up.then_some(unrounded(memory_now, seen.memory.unwrap_or(Limit::Unlimited))),
        confirmed: None,
        persistent: saved_memory,
        ceiling: None,
        saved_ceiling: None,
        floor: None,
        grain: page(),
        least: page(),
        live: Ability::Yes,
        unlimit: Ability::Yes,
    };
    let outer =
        Covered { cpus: covered.values().any(|outer| outer.cpus), memory: covered.values().any(|outer| outer.memory) };
    let mut notes = notes(unit, &reading_cpus, &reading_memory);
    for (slice, limits) in covered {
        let what = match (limits.cpus, limits.memory) {
            (true, true) => "CPUs and memory",
            (true, false) => "CPUs",
            (false, true) => "memory",
            (false, false) => continue,
        };
        notes.push(format!("within unit/{slice}, whose limit counts: its own {what} are not charged again"));
    }
    let differs = (up && lasts) && (saved_cpus != Some(cpus_now) || saved_memory != Some(memory_now));
    if differs && unit.drop_ins.iter().any(|path| path.starts_with(CONTROL)) {
        notes.push(format!("what is live only ends with systemd's next daemon-reload: {CONTROL} goes before it"));
    }
    if lasts && (saved.cpu_quota.is_none() || saved.memory_max.is_none()) {
        notes.push("a file of it can't be read or understood: what it has after the next boot is unknown".into());
    }
    Ok(Observed {
        id: unit.id.clone(),
        boot: unit.boot(),
        state,
        saved: if lasts { Saved::OnRequest } else { Saved::Nowhere },
        // What its next start has is what systemd has in memory; only the host's next boot goes by the files.
        demand: Demand { cpus: Some(cpus_now), memory: Some(memory_now) },
        covered: outer,
        barred: barred(unit),
        cpus: reading_cpus,
        cpu_limit: no_cpu_limit(),
        memory: reading_memory,
        used: if up { seen.used.map_or(Usage::Unknown, Usage::Known) } else { Usage::Unknown },
        parts: None,
        saved_parts: None,
        labels: BTreeMap::new(),
        notes,
        switched_off: false,
        unchangeable: unchangeable(unit),
        native: serde_json::to_value(Native {
            cpu_quota: unit.cpu_quota,
            memory_max: unit.memory_max,
            saved_cpu_quota: saved.cpu_quota,
            saved_memory_max: saved.memory_max,
        })
        .unwrap_or_default(),
        reference,
    })
}

pub(super) fn no_cpu_limit() -> Reading<Cpus> {
    Reading::absent(CPU_GRAIN, "only a VM has a cpu_limit beside its cpus; the CPU limit of a unit is its cpus")
}

fn barred(unit: &Unit) -> Barred {
    let service = unit.section() == Some("Service");
    let power = (!service).then(|| "it is no service, and neither started nor stopped here".to_owned());
    let pause =
        (!unit.can_freeze).then(|| "systemd can't freeze it: that takes cgroup v2 and a unit that runs".to_owned());
    Barred { power, restart: None, pause }
}

fn unchangeable(unit: &Unit) -> Option<String> {
    match unit.load.as_str() {
        "loaded" => None,
        "masked" => Some("it is masked (`systemctl unmask`)".into()),
        other => Some(format!("systemd has it as {other:?}: see `systemctl status {}`", unit.id)),
    }
}

fn notes(unit: &Unit, cpus: &Reading<Cpus>, memory: &Reading<ByteCount>) -> Vec<String> {
    let mut notes = Vec::new();
    if unit.active == "active" && unit.sub == "exited" {
        notes.push("its processes have ended; systemd counts it as active".into());
    }
    if let (Some(said), Some(seen)) = (cpus.accepted, cpus.observed)
        && !same_cpu_time(said, seen)
    {
        notes.push(format!("systemd says {said} CPUs, the cgroup has {seen}"));
    }
    if let (Some(said), Some(seen)) = (memory.accepted, memory.observed)
        && said != seen
    {
        notes.push(format!("systemd says {said} of memory, the cgroup has {seen}"));
    }
    notes
}

/// Microseconds a second as CPUs, to the nearest thousandth.
fn cpus(quota: u64) -> Limit<Cpus> {
    match quota {
        INFINITY => Limit::Unlimited,
        quota => Limit::At(Cpus::from_millis(quota.saturating_add(USEC_PER_MILLI / 2) / USEC_PER_MILLI)),
    }
}

fn memory(bytes: u64) -> Limit<ByteCount> {
    match ByteCount::new(bytes) {
        Some(count) if bytes != INFINITY => Limit::At(count),
        _ => Limit::Unlimited,
    }
}

/// The kernel's value, or the limit that was set where the kernel only rounded it down to whole pages.
fn unrounded(set: Limit<ByteCount>, seen: Limit<ByteCount>) -> Limit<ByteCount> {
    match (set, seen) {
        (Limit::At(bytes), Limit::At(seen)) if bytes.bytes() / PAGE * PAGE == seen.bytes() => set,
        _ => seen,
    }
}

#[cfg(test)]
mod tests {
    use agentd_core::error::Code;

    use super::*;

    fn batch() -> Unit {
        Unit {
            id: "batch.service".into(),
            load: "loaded".into(),
            active: "active".into(),
            sub: "running".into(),
            invocation: vec![0xab; 16],
            cgroup: "/system.slice/batch.service".into(),
            slice: "ci-fast.slice".into(),
            cpu_quota: 300_000,
            memory_max: 64 << 20,
            ..Unit::default()
        }
    }

    fn seen() -> Seen {
        let cpus = Some(Limit::At(Cpus::from_millis(300)));
        Seen { cpus, memory: Some(Limit::At(ByteCount::mib(64))), used: Some(ByteCount::mib(3)) }
    }

    const KEPT: files::Saved = files::Saved { cpu_quota: Some(300_000), memory_max: Some(64 << 20) };

    fn look(unit: &Unit, saved: files::Saved, seen: Option<Seen>) -> Observed {
        observed(unit, saved, seen, &BTreeMap::new()).unwrap()
    }

    #[test]
    fn a_running_service_is_what_systemd_its_files_and_its_cgroup_say() {
        let unit = look(&batch(), KEPT, Some(seen()));
        assert_eq!(
            (unit.state, unit.saved, unit.boot.as_deref()),
            (State::Running, Saved::OnRequest, Some(&*"ab".repeat(16)))
        );
        let limit = Some(Limit::At(Cpus::from_millis(300)));
        assert_eq!((unit.cpus.accepted, unit.cpus.observed, unit.cpus.persistent), (limit, limit, limit));
        assert_eq!((unit.used, unit.notes.len()), (Usage::Known(ByteCount::mib(3)), 0), "{:?}", unit.notes);
        // The kernel has another value than systemd says.
        let other = Seen { cpus: Some(Limit::Unlimited), ..seen() };
        assert!(look(&batch(), KEPT, Some(other)).notes[0].contains("systemd says 0.3 CPUs, the cgroup has none"));
        // One without a process has nothing that could be limited.
        let exited = Unit { sub: "exited".into(), ..batch() };
        assert_eq!(look(&exited, KEPT, None).cpus.observed, limit);
    }

    #[test]
    fn a_stopped_one_has_what_is_saved_and_a_transient_one_saves_nothing() {
        let stopped = Unit { active: "inactive".into(), invocation: Vec::new(), ..batch() };
        let unit = look(&stopped, KEPT, None);
        assert_eq!((unit.state, unit.boot, unit.cpus.accepted), (State::Stopped, None, None));
        assert_eq!(unit.cpus.persistent, Some(Limit::At(Cpus::from_millis(300))));
        for transient in [Unit { transient: true, ..batch() }, Unit { id: "batch.scope".into(), ..batch() }] {
            let unit = look(&transient, KEPT, Some(seen()));
            assert_eq!((unit.saved, unit.cpus.persistent), (Saved::Nowhere, None));
        }
    }

    #[test]
    fn what_is_only_for_now_and_what_cant_be_read_is_told() {
        let kept = Unit { drop_ins: vec![format!("{CONTROL}batch.service.d/50-CPUQuota.conf")], ..batch() };
        let saved = files::Saved { cpu_quota: Some(INFINITY), ..KEPT };
        assert!(look(&kept, saved, Some(seen())).notes[0].contains("next daemon-reload"));
        assert!(look(&batch(), saved, Some(seen())).notes.is_empty());
        let unknown = look(&batch(), files::Saved { cpu_quota: None, memory_max: None }, Some(seen()));
        assert!(unknown.notes[0].contains("can't be read") && unknown.cpus.persistent.is_none());
        let masked = look(&Unit { load: "masked".into(), ..batch() }, KEPT, Some(seen()));
        assert!(masked.unchangeable.unwrap().contains("unmask"));
        assert!(matches!(&unknown.cpu_limit.live, Ability::No(Code::Unsupported, _)));
    }

    #[test]
    fn a_unit_is_in_its_slice_and_in_those_that_hold_that() {
        assert_eq!(batch().slices(), ["ci-fast.slice", "ci.slice"]);
        assert_eq!(Unit { id: "ci-fast.slice".into(), ..Unit::default() }.slices(), ["ci.slice"]);
        assert!(Unit { id: "ci.slice".into(), ..Unit::default() }.slices().is_empty());
        assert!(Unit { slice: "-.slice".into(), ..batch() }.slices().is_empty());
        let covered = BTreeMap::from([("ci.slice".to_owned(), Covered { cpus: true, memory: false })]);
        let unit = observed(&batch(), KEPT, Some(seen()), &covered).unwrap();
        assert_eq!(unit.covered, Covered { cpus: true, memory: false });
        assert!(unit.notes[0].contains("unit/ci.slice") && unit.notes[0].contains("CPUs are"), "{:?}", unit.notes);
    }

    #[test]
    fn an_undo_has_systemds_own_numbers() {
        let unit = Unit { cpu_quota: 333_333, ..batch() };
        let native: Native = serde_json::from_value(look(&unit, KEPT, Some(seen())).native).unwrap();
        let cpus = Values { cpus: Some(Limit::Unlimited), ..Values::default() };
        assert_eq!(native.settings(&cpus, false), Some(vec![(CPU_QUOTA, 333_333)]));
        assert_eq!(native.settings(&cpus, true), Some(vec![(CPU_QUOTA, 300_000)]));
        assert_eq!(settings(&cpus), [(CPU_QUOTA, INFINITY)]);
        let unknown = Native { saved_cpu_quota: None, ..native };
        assert_eq!(unknown.settings(&cpus, true), None);
    }
}
