//! What a sighting of a domain means in the words that every kind of instance shares. Pure.

use std::collections::BTreeMap;

use agentd_core::error::{Code, Problem};
use agentd_core::instance::{Ability, Demand, Kind, Observed, Reading, Ref, Saved, State, Usage};
use agentd_core::units::{ByteCount, Cpus, Limit};
use serde_json::json;
use virt_sys as sys;

use super::asked::Memory;
use super::ffi::Bandwidth;
use super::look::{Balloon, Sighting};
use super::quota;
use super::xml::Definition;

/// libvirt counts KiB, a guest's balloon pages of 4 KiB: a target between two pages would never be reached exactly.
const PAGE_KIB: u64 = 4;
/// Below this no guest lives; libvirt itself would take 1 KiB.
const LEAST_MEMORY_KIB: u64 = 4 << 10;

/// What changes with every start: the domain id, with the start time of its QEMU where that is known, because ids begin
/// anew when libvirtd does.
pub(super) fn boot(id: Option<u32>, start: Option<u64>) -> Option<String> {
    match (id?, start) {
        (id, Some(start)) => Some(format!("{id}@{start}")),
        (id, None) => Some(id.to_string()),
    }
}

/// Whether two boots are the same, as far as both tell.
pub(super) fn same_boot(a: Option<&str>, b: Option<&str>) -> bool {
    let (Some(a), Some(b)) = (a, b) else { return a == b };
    let split = |boot: &str| match boot.split_once('@') {
        Some((id, start)) => (id.to_owned(), Some(start.to_owned())),
        None => (boot.to_owned(), None),
    };
    let ((a_id, a_start), (b_id, b_start)) = (split(a), split(b));
    a_id == b_id && (a_start.is_none() || b_start.is_none() || a_start == b_start)
}

impl Sighting {
    /// Its boot.
    pub(super) fn boot(&self) -> Option<String> {
        boot(self.id, self.process.map(|process| process.start))
    }

    /// vCPUs that QEMU runs where libvirt counts another number: (libvirt's, QEMU's).
    pub(super) fn vcpu_disagreement(&self) -> Option<(u32, u32)> {
        let counted = self.live.as_ref()?.vcpus;
        let threads = self.process?.vcpus?;
        (counted != threads).then_some((counted, threads))
    }

    /// Memory in KiB that the balloon leaves the guest now.
    pub(super) fn balloon_now(&self) -> Option<u64> {
        let live = self.live.as_ref()?;
        match &self.balloon {
            Balloon::Said { stats, .. } => stats.actual.or(Some(live.current_memory)),
            _ => Some(live.current_memory),
        }
    }
}

/// Why vCPUs can't be changed while libvirt and QEMU count differently.
pub(super) fn disagreement(counted: u32, threads: u32) -> String {
    format!(
        "libvirt counts {counted} vCPUs, QEMU runs {threads}: an unplug that timed out was obeyed late; no vCPU change until \
         they agree, at the latest after its next start"
    )
}

/// The sighting as an observation. What was asked of the guest and is still open is in `asked`.
pub(super) fn observed(seen: &Sighting, asked: &mut Memory) -> Result<Observed, Problem> {
    let reference = Ref::new(Kind::Vm, &seen.name)?;
    let boot = seen.boot();
    if boot.is_none() {
        asked.forget(&seen.uuid);
    }
    let state = state(seen.state);
    let mut notes = Vec::new();
    let cpus = cpus(seen, state, boot.as_deref(), asked, &mut notes);
    let memory = memory(seen, state, boot.as_deref(), asked, &mut notes);
    let boots_with = seen.saved.as_ref().or(seen.live.as_ref());
    Ok(Observed {
        reference,
        id: seen.uuid.clone(),
        boot,
        state,
        saved: if seen.saved.is_some() { Saved::Apart } else { Saved::Nowhere },
        cpu_limit: cpu_limit(seen),
        used: used(seen),
        demand: Demand {
            cpus: boots_with.map(|definition| vcpus(definition.vcpus)),
            // All of it is the guest's until its balloon driver runs.
            memory: boots_with.map(|definition| Limit::At(bytes(definition.memory))),
        },
        cpus,
        memory,
        labels: BTreeMap::new(),
        notes,
        unchangeable: None,
        native: native(seen),
    })
}

/// `virDomainState` in our words.
fn state((state, reason): (u32, u32)) -> State {
    match state {
        sys::VIR_DOMAIN_NOSTATE | sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED => State::Running,
        sys::VIR_DOMAIN_PAUSED if reason == sys::VIR_DOMAIN_PAUSED_STARTING_UP => State::Starting,
        sys::VIR_DOMAIN_PAUSED | sys::VIR_DOMAIN_PMSUSPENDED => State::Paused,
        sys::VIR_DOMAIN_SHUTDOWN => State::Stopping,
        sys::VIR_DOMAIN_SHUTOFF => State::Stopped,
        sys::VIR_DOMAIN_CRASHED => State::Crashed,
        _ => State::Unknown,
    }
}

fn vcpus(count: u32) -> Limit<Cpus> {
    Limit::At(Cpus::whole(count))
}

fn bytes(kib: u64) -> ByteCount {
    kib.checked_mul(1 << 10).and_then(ByteCount::new).unwrap_or(ByteCount::MAX)
}

/// A paused guest can't obey.
fn while_paused(state: State, ability: Ability) -> Ability {
    if state == State::Paused {
        Ability::No(Code::InvalidState, "it is paused, the guest can't obey".into())
    } else {
        ability
    }
}

fn cpus(
    seen: &Sighting,
    state: State,
    boot: Option<&str>,
    asked: &mut Memory,
    notes: &mut Vec<String>,
) -> Reading<Cpus> {
    let counted = seen.live.as_ref().map(|live| live.vcpus);
    let present = seen.process.and_then(|process| process.vcpus).or(counted);
    let late = boot.and_then(|boot| asked.late_unplug(&seen.uuid, boot));
    let open = late.filter(|late| seen.vcpu_disagreement().is_some() || present > Some(*late));
    let mut live = while_paused(state, Ability::Yes);
    if let Some((counted, threads)) = seen.vcpu_disagreement() {
        let why = disagreement(counted, threads);
        notes.push(why.clone());
        live = Ability::No(Code::InvalidState, why);
    }
    let saved = seen.saved.as_ref();
    Reading {
        accepted: open.or(counted).map(vcpus),
        observed: present.map(vcpus),
        // QEMU drops a vCPU only after the guest has let it go; of one that was added the guest says nothing.
        confirmed: present.filter(|present| late.is_some_and(|late| *present <= late)).map(vcpus),
        persistent: saved.map(|saved| vcpus(saved.vcpus)),
        ceiling: seen.live.as_ref().map(|live| Cpus::whole(live.max_vcpus)),
        saved_ceiling: saved.map(|saved| Cpus::whole(saved.max_vcpus)),
        grain: Cpus::whole(1),
        least: Cpus::whole(1),
        live,
        unlimit: Ability::No(Code::InvalidRequest, "a VM has a number of vCPUs".into()),
    }
}

fn cpu_limit(seen: &Sighting) -> Reading<Cpus> {
    let grain = Cpus::from_millis(1);
    let (live, saved) = (&seen.live_bandwidth, &seen.saved_bandwidth);
    let why = |words: &str| format!("libvirt offers no CPU bandwidth for it: {words}");
    if let (Err(no_live), Err(no_saved)) = (live, saved) {
        return Reading::absent(grain, why(if seen.live.is_some() { no_live } else { no_saved }));
    }
    let accepted = live.as_ref().ok().map(|bandwidth| quota::limit(*bandwidth));
    Reading {
        accepted,
        // Where the cgroup isn't on this host, libvirt's word is all there is.
        observed: if seen.process.is_some() { seen.cgroup_limit.filter(|_| accepted.is_some()) } else { accepted },
        confirmed: None,
        persistent: saved.as_ref().ok().map(|bandwidth| quota::limit(*bandwidth)),
        ceiling: None,
        saved_ceiling: None,
        grain,
        least: Cpus::from_millis(10),
        live: match live {
            Err(no_live) if seen.live.is_some() => Ability::No(Code::Unsupported, why(no_live)),
            _ => Ability::Yes,
        },
        unlimit: Ability::Yes,
    }
}

fn memory(
    seen: &Sighting,
    state: State,
    boot: Option<&str>,
    asked: &mut Memory,
    notes: &mut Vec<String>,
) -> Reading<ByteCount> {
    let now = seen.balloon_now();
    let target = boot.zip(now).and_then(|(boot, now)| asked.balloon_target(&seen.uuid, boot, now));
    if let Balloon::Deaf(why) = &seen.balloon {
        notes.push(format!("QEMU does not answer: {why}"));
    }
    if is_silent(seen) && state == State::Running {
        notes.push("balloon driver silent".into());
    }
    let mut live = while_paused(state, Ability::Yes);
    if let Some(running) = &seen.live {
        let no = |why: String| Ability::No(Code::Unsupported, why);
        if !running.balloon {
            live = no("it has no balloon device".into());
        } else if running.memory_devices {
            live =
                no("it has memory devices (virtio-mem or DIMM) beside its balloon, which this version doesn't resize"
                    .into());
        } else if let Some(how) = running.pinned {
            let why = format!("its memory is {how}: the guest would lose it and the host gain none");
            notes.push(why.clone());
            live = no(why);
        }
    }
    let saved = seen.saved.as_ref();
    Reading {
        accepted: target.or(now).map(|kib| Limit::At(bytes(kib))),
        observed: now.map(|kib| Limit::At(bytes(kib))),
        confirmed: now.filter(|_| has_spoken(seen)).map(|kib| Limit::At(bytes(kib))),
        persistent: saved.map(|saved| Limit::At(bytes(saved.current_memory))),
        ceiling: seen.live.as_ref().map(|live| bytes(live.memory)),
        saved_ceiling: saved.map(|saved| bytes(saved.memory)),
        grain: bytes(PAGE_KIB),
        least: bytes(LEAST_MEMORY_KIB),
        live,
        unlimit: Ability::No(Code::InvalidRequest, "a VM has an amount of memory".into()),
    }
}

/// Whether the balloon driver has ever given a sign: a report of its own, or a balloon that moved.
fn has_spoken(seen: &Sighting) -> bool {
    match (&seen.balloon, &seen.live) {
        (Balloon::Said { stats, .. }, Some(live)) => {
            stats.last_update.is_some_and(|at| at != 0) || stats.actual.is_some_and(|actual| actual != live.memory)
        }
        _ => false,
    }
}

/// Whether it was asked and has never given one. A driver of libvirt that reports no `last_update` at all says nothing.
fn is_silent(seen: &Sighting) -> bool {
    match &seen.balloon {
        Balloon::Said { stats, .. } => stats.last_update == Some(0) && !has_spoken(seen),
        _ => false,
    }
}

/// In use is what the guest has and could not give away: `actual − usable`. Not `available − usable`: with autodeflate the
/// guest's total stays while the balloon grows, and the balloon's pages would count as used; without it the kernel's own
/// reserve would count as free.
fn used(seen: &Sighting) -> Usage {
    match &seen.balloon {
        Balloon::Said { stats, fresh: true, .. } => match (stats.actual, stats.usable) {
            (Some(actual), Some(usable)) => Usage::Known(bytes(actual.saturating_sub(usable))),
            _ => Usage::Unknown,
        },
        Balloon::Said { .. } if is_silent(seen) => Usage::Silent,
        _ => Usage::Unknown,
    }
}

/// libvirt's own values, for an undo that puts back exactly what was there.
fn native(seen: &Sighting) -> serde_json::Value {
    let side = |definition: &Option<Definition>, bandwidth: &Result<Bandwidth, String>| {
        let bandwidth = bandwidth.as_ref().ok();
        json!({
            "vcpus": definition.as_ref().map(|definition| definition.vcpus),
            "memory_kib": definition.as_ref().map(|definition| definition.current_memory),
            "global_quota": bandwidth.map(|bandwidth| bandwidth.quota),
            "global_period": bandwidth.map(|bandwidth| bandwidth.period),
        })
    };
    json!({ "live": side(&seen.live, &seen.live_bandwidth), "saved": side(&seen.saved, &seen.saved_bandwidth) })
}
