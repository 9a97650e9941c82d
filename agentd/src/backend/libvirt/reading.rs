//! What a sighting of a domain means in the words that every kind of instance shares. Pure.

use std::collections::BTreeMap;
use std::time::Instant;

use agentd_core::error::{Code, Problem};
use agentd_core::instance::{
    Ability, Barred, Covered, Demand, Kind, Observed, Parts, Reading, Ref, Saved, State, Usage,
};
use agentd_core::plan::Headroom;
use agentd_core::units::{ByteCount, Cpus, Limit};
use serde::Deserialize;
use serde_json::json;
use virt_sys as sys;

use super::asked::{Asked, Memory, Unplug};
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

    /// Memory in KiB that the guest has now: what the balloon leaves it and what its memory devices give it. The balloon's own
    /// report leaves the devices out, libvirt's `<currentMemory>` has them in (measured on 9.0).
    fn memory_now(&self) -> Option<u64> {
        Some(self.balloon_now()?.saturating_add(self.live.as_ref()?.device_current))
    }

    /// What of that the balloon leaves the guest.
    fn balloon_now(&self) -> Option<u64> {
        let live = self.live.as_ref()?;
        let counted = live.current_memory.saturating_sub(live.device_current);
        match &self.balloon {
            Balloon::Said { stats, .. } => Some(stats.actual.unwrap_or(counted)),
            _ => Some(counted),
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

/// Why vCPUs of an emulated guest stay as they are after an unplug that it obeyed late.
const AFTER_LATE_UNPLUG: &str = "it obeyed an unplug after libvirt had given up on it, and an emulating QEMU has been seen to \
    crash at the next change of vCPUs; they can be changed again after its next start";

/// What a domain is called: by its name, or by its UUID where no reference can have such a name, which libvirt takes. Whoever names
/// a domain does not keep it out of what is counted.
pub(super) fn reference(name: &str, uuid: &str) -> Result<Ref, Problem> {
    Ref::new(Kind::Vm, name).or_else(|_| Ref::new(Kind::Vm, uuid))
}

/// The sighting as an observation. What was asked of the guest and is still open is in `asked`.
pub(super) fn observed(seen: &Sighting, asked: &mut Memory) -> Result<Observed, Problem> {
    let reference = reference(&seen.name, &seen.uuid)?;
    let boot = seen.boot();
    if boot.is_none() {
        asked.forget(&seen.uuid);
    }
    let state = state(seen.state, seen.id.is_some());
    let mut notes = Vec::new();
    if reference.name() != seen.name {
        notes.push(format!(
            "libvirt's name for it, {:?}, can't be part of a reference: here its UUID is its name",
            seen.name
        ));
    }
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
        covered: Covered::default(),
        barred: Barred {
            restart: seen.saved.is_none().then(|| "it is transient: once it is down, libvirt forgets it".into()),
            ..Barred::default()
        },
        demand: Demand {
            cpus: boots_with.map(|definition| vcpus(definition.vcpus)),
            // All of it is the guest's until its balloon driver runs.
            memory: boots_with.map(|definition| Limit::At(bytes(boots_with_memory(definition)))),
        },
        parts: seen.live.as_ref().and_then(|live| {
            let balloon = memory.accepted.and_then(Limit::at)?.checked_sub(bytes(live.plugged()))?;
            parts(live, balloon)
        }),
        saved_parts: seen
            .saved
            .as_ref()
            .and_then(|saved| parts(saved, bytes(saved_memory(saved).saturating_sub(saved.plugged())))),
        cpus,
        memory,
        labels: BTreeMap::new(),
        notes,
        switched_off: seen.state == (sys::VIR_DOMAIN_SHUTOFF, sys::VIR_DOMAIN_SHUTOFF_DESTROYED),
        unchangeable: None,
        native: native(seen, asked.known(&seen.uuid)),
    })
}

/// What the only virtio-mem device of a definition makes of its memory; several are left to whoever has put them there.
fn parts(definition: &Definition, balloon: ByteCount) -> Option<Parts> {
    let [plug] = &definition.plugs[..] else { return None };
    (plug.block > 0).then(|| Parts {
        base: bytes(definition.memory.saturating_sub(plug.size)),
        balloon,
        plugged: bytes(plug.requested),
        size: bytes(plug.size),
        block: bytes(plug.block),
    })
}

/// The most memory in KiB that a definition lets the guest have without another one.
pub(super) fn saved_ceiling(definition: &Definition) -> u64 {
    if definition.plugs.len() == 1 { definition.memory } else { boots_with_memory(definition) }
}

/// How far a definition lets the guest grow.
pub(super) fn headroom(definition: &Definition) -> Headroom {
    let memory = Some(bytes(saved_ceiling(definition)));
    Headroom { cpus: Some(Cpus::whole(definition.max_vcpus)), memory, boots_with: None }
}

/// The same in bytes.
pub(super) fn saved_bytes(saved: &Definition) -> ByteCount {
    bytes(saved_memory(saved))
}

/// What the next start gives the guest: a balloon that is asked for more than there is leaves all.
fn saved_memory(saved: &Definition) -> u64 {
    saved.current_memory.min(saved.memory.saturating_sub(saved.device_size)).saturating_add(saved.device_requested)
}

/// What a start takes before a guest has given anything back.
fn boots_with_memory(definition: &Definition) -> u64 {
    definition.memory.saturating_sub(definition.device_size).saturating_add(definition.device_requested)
}

/// `virDomainState` in our words. `active` says that it has a QEMU.
fn state((state, reason): (u32, u32), active: bool) -> State {
    match state {
        sys::VIR_DOMAIN_NOSTATE | sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED => State::Running,
        sys::VIR_DOMAIN_PAUSED if reason == sys::VIR_DOMAIN_PAUSED_STARTING_UP => State::Starting,
        sys::VIR_DOMAIN_PAUSED | sys::VIR_DOMAIN_PMSUSPENDED => State::Paused,
        sys::VIR_DOMAIN_SHUTDOWN => State::Stopping,
        sys::VIR_DOMAIN_SHUTOFF => State::Stopped,
        // A guest that panicked, with <on_crash>preserve: its QEMU keeps all that it has, and can be resumed.
        sys::VIR_DOMAIN_CRASHED if active => State::Paused,
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
    let agreed = seen.vcpu_disagreement().is_none();
    let unplug = boot.zip(present).and_then(|(boot, present)| asked.late_unplug(&seen.uuid, boot, present, agreed));
    let open = match unplug {
        Some(Unplug::Open(left)) => Some(left),
        _ => None,
    };
    let mut live = while_paused(state, Ability::Yes);
    if let Some((counted, threads)) = seen.vcpu_disagreement() {
        let why = disagreement(counted, threads);
        notes.push(why.clone());
        live = Ability::No(Code::InvalidState, why);
    } else if matches!(unplug, Some(Unplug::Obeyed(_))) && seen.process.is_some_and(|process| process.emulates) {
        // A restart of libvirtd makes the counts agree again, and a hot-add then still killed QEMU 7.2 under TCG
        // ("double free or corruption"), 2 times of 2. Under KVM QEMU tells libvirt of a late unplug, and all is well.
        live = Ability::No(Code::InvalidState, AFTER_LATE_UNPLUG.into());
    }
    let online = seen.online;
    if let (Some(online), Some(present)) =
        (online, present.filter(|present| online.is_some_and(|online| online > u64::from(*present))))
    {
        notes.push(format!("its guest agent tells of {online} vCPUs, QEMU has {present}: it isn't believed"));
    }
    let saved = seen.saved.as_ref();
    Reading {
        accepted: open.or(counted).map(vcpus),
        observed: present.map(vcpus),
        // QEMU drops a vCPU only after the guest has let it go; of one that was added only an agent in the guest tells.
        confirmed: match (unplug, present) {
            (_, Some(present)) if online.is_some_and(|online| online <= u64::from(present)) => {
                online.and_then(|online| u32::try_from(online).ok()).map(vcpus)
            }
            (Some(Unplug::Open(left) | Unplug::Obeyed(left)), Some(present)) if present <= left => Some(vcpus(present)),
            _ => None,
        },
        persistent: saved.map(|saved| vcpus(saved.vcpus)),
        ceiling: seen.live.as_ref().map(|live| Cpus::whole(live.max_vcpus)),
        saved_ceiling: saved.map(|saved| Cpus::whole(saved.max_vcpus)),
        // Where libvirt lists none of a QEMU's, none can leave.
        floor: seen
            .live
            .as_ref()
            .and_then(|live| live.fixed_vcpus.or(seen.process.map(|_| live.vcpus)))
            .map(Cpus::whole),
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
        floor: None,
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
    let (now, balloon) = (seen.memory_now(), seen.balloon_now());
    let target = boot.zip(balloon).and_then(|(boot, now)| asked.balloon_target(&seen.uuid, boot, now, Instant::now()));
    let devices = seen.live.as_ref().map_or(0, |live| live.device_requested);
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
        } else if let Some(how) = running.pinned {
            let why = format!("its memory is {how}: the guest would lose it and the host gain none");
            notes.push(why.clone());
            live = no(why);
        }
    }
    let saved = seen.saved.as_ref();
    Reading {
        accepted: target.or(balloon).map(|kib| Limit::At(bytes(kib.saturating_add(devices)))),
        observed: now.map(|kib| Limit::At(bytes(kib))),
        confirmed: now.filter(|_| has_spoken(seen)).map(|kib| Limit::At(bytes(kib))),
        persistent: saved.map(|saved| Limit::At(bytes(saved_memory(saved)))),
        // The balloon gives back all that it took, and one device all that it has; of several, nothing is asked for here.
        ceiling: seen.live.as_ref().map(|live| bytes(saved_ceiling(live))),
        saved_ceiling: saved.map(|saved| bytes(saved_ceiling(saved))),
        floor: None,
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
            stats.last_update.is_some_and(|at| at != 0)
                || stats.actual.is_some_and(|actual| actual.saturating_add(live.device_size) != live.memory)
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
        Balloon::Said { stats, fresh: true } => match (seen.memory_now(), stats.usable) {
            (Some(now), Some(usable)) => Usage::Known(bytes(now.saturating_sub(usable))),
            _ => Usage::Unknown,
        },
        Balloon::Said { .. } if is_silent(seen) => Usage::Silent,
        _ => Usage::Unknown,
    }
}

/// Where `native` has what was asked of the guest and is still open.
const ASKED: &str = "asked";

/// libvirt's own values, for an undo that puts back exactly what was there; and what was asked, for [`asked_in`].
fn native(seen: &Sighting, asked: Option<&Asked>) -> serde_json::Value {
    let side = |definition: &Option<Definition>, bandwidth: &Result<Bandwidth, String>| {
        let bandwidth = bandwidth.as_ref().ok();
        json!({
            "vcpus": definition.as_ref().map(|definition| definition.vcpus),
            "memory_kib": definition.as_ref().map(|definition| definition.current_memory),
            "global_quota": bandwidth.map(|bandwidth| bandwidth.quota),
            "global_period": bandwidth.map(|bandwidth| bandwidth.period),
        })
    };
    let mut native =
        json!({ "live": side(&seen.live, &seen.live_bandwidth), "saved": side(&seen.saved, &seen.saved_bandwidth) });
    if let Some(asked) = asked {
        native[ASKED] = json!(asked);
    }
    native
}

/// What had been asked of the guest when this was observed; `None` also where it was written in a form of another version.
pub(super) fn asked_in(native: &serde_json::Value) -> Option<Asked> {
    native.get(ASKED).and_then(|asked| Asked::deserialize(asked).ok())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::backend::libvirt::ffi::MemoryStats;
    use crate::backend::libvirt::process::Process;

    /// A running QEMU domain: 3 of 4 vCPUs by both counts, 384 of 512 MiB.
    pub(in super::super) fn running() -> Sighting {
        let definition = Definition {
            memory: 512 << 10,
            current_memory: 384 << 10,
            max_vcpus: 4,
            vcpus: 3,
            balloon: true,
            ..Definition::default()
        };
        let none = Bandwidth { quota: -1, period: 100_000 };
        let stats = MemoryStats { actual: Some(384 << 10), usable: Some(300 << 10), last_update: Some(1) };
        Sighting {
            name: "web".into(),
            uuid: "u".into(),
            id: Some(7),
            state: (sys::VIR_DOMAIN_RUNNING, 0),
            live: Some(definition.clone()),
            saved: Some(definition),
            live_bandwidth: Ok(none),
            saved_bandwidth: Ok(Bandwidth::default()),
            process: Some(Process { pid: 1, start: 42, vcpus: Some(3), emulates: false }),
            cgroup_limit: Some(Limit::Unlimited),
            balloon: Balloon::Said { stats, fresh: true },
            online: None,
        }
    }

    fn threads(count: u32) -> Option<Process> {
        Some(Process { pid: 1, start: 42, vcpus: Some(count), emulates: false })
    }

    #[test]
    fn states_have_our_words() {
        for (seen, expected) in [
            ((sys::VIR_DOMAIN_NOSTATE, 0), State::Running),
            ((sys::VIR_DOMAIN_BLOCKED, 0), State::Running),
            ((sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_USER), State::Paused),
            ((sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_STARTING_UP), State::Starting),
            ((sys::VIR_DOMAIN_PMSUSPENDED, 0), State::Paused),
            ((sys::VIR_DOMAIN_SHUTDOWN, 0), State::Stopping),
            ((sys::VIR_DOMAIN_SHUTOFF, 0), State::Stopped),
            ((sys::VIR_DOMAIN_CRASHED, 0), State::Crashed),
            ((99, 0), State::Unknown),
        ] {
            assert_eq!(state(seen, false), expected, "{seen:?}");
        }
        let panicked = (sys::VIR_DOMAIN_CRASHED, sys::VIR_DOMAIN_CRASHED_PANICKED);
        assert_eq!(state(panicked, true), State::Paused, "it is there, with all that it has");
    }

    #[test]
    fn a_late_unplug_is_told_by_qemus_threads_and_blocks_vcpus() {
        let (mut asked, mut seen) = (Memory::default(), running());
        asked.unplug_is_late("u", "7@42", 2);
        let waiting = observed(&seen, &mut asked).unwrap().cpus;
        assert_eq!((waiting.accepted, waiting.observed), (Some(vcpus(2)), Some(vcpus(3))));
        assert_eq!((waiting.confirmed, waiting.live), (None, Ability::Yes));
        seen.process = threads(2);
        let obeyed = observed(&seen, &mut asked).unwrap();
        assert_eq!((obeyed.cpus.accepted, obeyed.cpus.observed), (Some(vcpus(2)), Some(vcpus(2))));
        assert_eq!(obeyed.cpus.confirmed, Some(vcpus(2)));
        assert!(matches!(&obeyed.cpus.live, Ability::No(Code::InvalidState, why) if why.contains("counts 3")));
        assert_eq!(obeyed.memory.live, Ability::Yes);
        // libvirt, started anew, counts 2 as well.
        if let Some(live) = &mut seen.live {
            live.vcpus = 2;
        }
        assert_eq!(observed(&seen, &mut asked).unwrap().cpus.live, Ability::Yes);
        seen.process = seen.process.map(|process| Process { emulates: true, ..process });
        assert!(matches!(observed(&seen, &mut asked).unwrap().cpus.live, Ability::No(Code::InvalidState, _)));
    }

    #[test]
    fn what_an_agent_tells_confirms_and_what_cant_be_is_not_believed() {
        let told = |online| {
            let seen = Sighting { online, ..running() };
            let observed = observed(&seen, &mut Memory::default()).unwrap();
            (observed.cpus.confirmed, observed.notes.len())
        };
        assert_eq!((told(None), told(Some(3)), told(Some(2))), ((None, 0), (Some(vcpus(3)), 0), (Some(vcpus(2)), 0)));
        assert_eq!((told(Some(4)), told(Some(u64::MAX))), ((None, 1), (None, 1)));
    }

    #[test]
    fn a_balloon_on_its_way_is_accepted_but_not_observed() {
        let (mut asked, seen) = (Memory::default(), running());
        asked.balloon_asked("u", "7@42", 384 << 10, 256 << 10);
        let memory = observed(&seen, &mut asked).unwrap().memory;
        assert_eq!(memory.accepted, Some(Limit::At(ByteCount::mib(256))));
        assert_eq!((memory.observed, memory.confirmed), (Some(Limit::At(ByteCount::mib(384))), memory.observed));
    }

    /// A daemon that was killed and has come back: all it has is the last observation, as the disk has it.
    fn next_life(last: &Observed) -> Memory {
        let written = serde_json::to_string(last).unwrap();
        let last: Observed = serde_json::from_str(&written).unwrap();
        let mut memory = Memory::default();
        if let Some(asked) = asked_in(&last.native) {
            memory.recall(&last.id, asked);
        }
        memory
    }

    #[test]
    fn what_a_guest_was_asked_survives_the_daemon() {
        let seen = running();
        let obeyed = Sighting { process: threads(2), ..running() };
        let asked = |ask: &dyn Fn(&mut Memory)| {
            let mut asked = Memory::default();
            ask(&mut asked);
            asked
        };
        for (seen, mut asked) in [
            (&seen, asked(&|asked| asked.balloon_asked("u", "7@42", 384 << 10, 256 << 10))),
            (&seen, asked(&|asked| asked.unplug_is_late("u", "7@42", 2))),
            (&obeyed, asked(&|asked| asked.unplug_is_late("u", "7@42", 2))),
        ] {
            let before = observed(seen, &mut asked).unwrap();
            let mut later = next_life(&before);
            assert_eq!(observed(seen, &mut later).unwrap(), before);
            // As `Obeyed`, which is told by this alone.
            let agreed = |process| Sighting { process, ..running() };
            assert_eq!(
                observed(&agreed(threads(3)), &mut later).unwrap(),
                observed(&agreed(threads(3)), &mut asked).unwrap()
            );
            let rebooted = Sighting { id: Some(8), ..seen.clone() };
            let fresh = observed(&rebooted, &mut Memory::default()).unwrap();
            assert_eq!(observed(&rebooted, &mut next_life(&before)).unwrap(), fresh);
        }
    }

    #[test]
    fn an_obeyed_unplug_still_closes_an_emulated_guests_vcpus_in_the_daemons_next_life() {
        let mut seen = running();
        seen.process = threads(2).map(|process| Process { emulates: true, ..process });
        if let Some(live) = &mut seen.live {
            live.vcpus = 2;
        }
        let mut asked = Memory::default();
        asked.unplug_is_late("u", "7@42", 2);
        let before = observed(&seen, &mut asked).unwrap();
        assert!(matches!(before.cpus.live, Ability::No(Code::InvalidState, _)));
        assert_eq!(observed(&seen, &mut next_life(&before)).unwrap(), before);
    }

    #[test]
    fn what_this_life_was_told_outweighs_an_earlier_one_and_nothing_asked_leaves_no_trace() {
        let (mut asked, seen) = (Memory::default(), running());
        let quiet = observed(&seen, &mut asked).unwrap();
        assert_eq!(
            (quiet.native.get(ASKED), asked_in(&quiet.native), asked_in(&serde_json::Value::Null)),
            (None, None, None)
        );
        asked.balloon_asked("u", "7@42", 384 << 10, 256 << 10);
        let before = observed(&seen, &mut asked).unwrap();
        let mut now = Memory::default();
        observed(&seen, &mut now).unwrap();
        now.recall("u", asked_in(&before.native).unwrap());
        assert_eq!(observed(&seen, &mut now).unwrap(), before, "also where somebody has looked already");
        now.balloon_asked("u", "7@42", 384 << 10, 300 << 10);
        now.recall("u", asked_in(&before.native).unwrap());
        assert_eq!(observed(&seen, &mut now).unwrap().memory.accepted, Some(Limit::At(ByteCount::mib(300))));
        assert_eq!((&before.native["live"], &before.native["saved"]), (&quiet.native["live"], &quiet.native["saved"]));
    }

    #[test]
    fn use_is_what_the_guest_could_not_give_away() {
        let mut seen = running();
        assert_eq!(used(&seen), Usage::Known(ByteCount::mib(84)));
        let full = MemoryStats { actual: Some(512 << 10), usable: None, last_update: Some(0) };
        seen.balloon = Balloon::Said { stats: full, fresh: false };
        assert_eq!(used(&seen), Usage::Silent);
        let stale = MemoryStats { last_update: Some(9), ..full };
        seen.balloon = Balloon::Said { stats: stale, fresh: false };
        assert_eq!(used(&seen), Usage::Unknown);
    }

    #[test]
    fn memory_that_would_not_come_back_is_not_shrunk() {
        let change: [fn(&mut Definition); 2] = [|d| d.pinned = Some("in huge pages"), |d| d.balloon = false];
        for change in change {
            let mut seen = running();
            change(seen.live.as_mut().unwrap());
            let memory = observed(&seen, &mut Memory::default()).unwrap().memory;
            assert!(matches!(memory.live, Ability::No(Code::Unsupported, _)), "{memory:?}");
        }
    }

    #[test]
    fn memory_devices_count_beside_the_balloon() {
        let mut seen = running();
        let live = seen.live.as_mut().unwrap();
        (live.memory, live.device_size) = (768 << 10, 256 << 10);
        (live.device_current, live.device_requested) = (128 << 10, 128 << 10);
        let memory = observed(&seen, &mut Memory::default()).unwrap().memory;
        assert_eq!(memory.observed, Some(Limit::At(ByteCount::mib(384 + 128))));
        assert_eq!(memory.ceiling, Some(ByteCount::mib(512 + 128)));
    }

    #[test]
    fn a_paused_guest_takes_a_cpu_limit_only() {
        let mut seen = running();
        seen.state = (sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_USER);
        let observed = observed(&seen, &mut Memory::default()).unwrap();
        assert!(matches!(observed.cpus.live, Ability::No(Code::InvalidState, _)));
        assert!(matches!(observed.memory.live, Ability::No(Code::InvalidState, _)));
        assert_eq!(observed.cpu_limit.live, Ability::Yes);
    }

    #[test]
    fn the_quota_observed_is_the_cgroups() {
        let mut seen = running();
        seen.cgroup_limit = Some(Limit::At(Cpus::from_millis(500)));
        let limit = observed(&seen, &mut Memory::default()).unwrap().cpu_limit;
        assert_eq!((limit.accepted, limit.observed), (Some(Limit::Unlimited), seen.cgroup_limit));
        seen.live_bandwidth = Err("the cgroup controller isn't mounted".into());
        let limit = observed(&seen, &mut Memory::default()).unwrap().cpu_limit;
        assert!(matches!(&limit.live, Ability::No(Code::Unsupported, why) if why.contains("mounted")));
        assert_eq!((limit.accepted, limit.persistent), (None, Some(Limit::Unlimited)));
    }
}
