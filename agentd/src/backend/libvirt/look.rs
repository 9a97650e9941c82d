//! Looks at a domain: everything that libvirt, `/proc` and the cgroup say of it, gathered on a blocking thread and handed
//! over uninterpreted. What it means is `reading.rs`'s business.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::ffi::{self, Bandwidth, CONFIG, Connect, Domain, Info, LIVE, MemoryStats};
use super::guests::Still;
use super::process::{self, Process};
use super::recent::Kept;
use super::xml::{self, Definition};
use super::{cgroup, quota};
use agentd_core::units::{Cpus, Limit};

/// What was seen of one domain, in libvirt's own terms.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sighting {
    /// Its name.
    pub(super) name: String,
    /// Its UUID.
    pub(super) uuid: String,
    /// Its id while it is active.
    pub(super) id: Option<u32>,
    /// `virDomainState` and reason.
    pub(super) state: (u32, u32),
    /// The definition of what runs.
    pub(super) live: Option<Definition>,
    /// The definition that the next start takes; `None` for a transient domain.
    pub(super) saved: Option<Definition>,
    /// The CPU bandwidth of what runs, or why there is none.
    pub(super) live_bandwidth: Result<Bandwidth, String>,
    /// The CPU bandwidth of the next start, or why there is none.
    pub(super) saved_bandwidth: Result<Bandwidth, String>,
    /// Its QEMU on this host.
    pub(super) process: Option<Process>,
    /// The limit in its cgroup.
    pub(super) cgroup_limit: Option<Limit<Cpus>>,
    /// What the balloon says.
    pub(super) balloon: Balloon,
    /// How many vCPUs are online inside, where a guest agent tells.
    pub(super) online: Option<u64>,
}

/// What came of asking the balloon.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Balloon {
    /// It was not asked: the domain is down.
    NotAsked,
    /// QEMU did not answer, with why.
    Deaf(String),
    /// QEMU answered.
    Said {
        /// The answer.
        stats: MemoryStats,
        /// Whether the guest's part of it is of now, and of the balloon as it is.
        fresh: bool,
    },
}

/// The domain that a caller's word names: its UUID, or its name. What looks like a UUID is one first: libvirt lets a domain
/// have another one's as its name.
pub(super) fn look_up(connect: &Connect, name: &str) -> Result<Arc<Domain>, ffi::Error> {
    if is_uuid(name) { connect.by_uuid(name).or_else(|_| connect.by_name(name)) } else { connect.by_name(name) }
}

/// 32 hexadecimal digits, with hyphens wherever libvirt takes them.
fn is_uuid(text: &str) -> bool {
    text.len() <= 64
        && text.bytes().filter(u8::is_ascii_hexdigit).count() == 32
        && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

/// What can be told of a domain that is one of many: whether another look at it would show something else.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Glance {
    name: String,
    id: Option<u32>,
    info: Option<Info>,
}

/// All domains, by UUID: one question, and one more for each that is up, which libvirt answers by itself.
pub(super) fn glance(connect: &Connect) -> Result<BTreeMap<String, Glance>, ffi::Error> {
    let domains = connect.domains()?;
    let told = domains.iter().filter_map(|domain| {
        let (name, id) = (domain.name().ok()?, domain.id());
        let info = id.and_then(|_| domain.info().ok());
        Some((domain.uuid().ok()?, Glance { name, id, info }))
    });
    Ok(told.collect())
}

/// What can be told without asking QEMU: answers at once, also where QEMU hangs. Of the CPU bandwidth libvirt is asked only
/// where neither the kernel nor the definition tells it (`saves_bandwidth`): that takes two questions for each side.
pub(super) fn sight(domain: &Domain, pid_dirs: &[PathBuf], saves_bandwidth: bool) -> Result<Sighting, ffi::Error> {
    let (name, uuid) = (domain.name()?, domain.uuid()?);
    let (state, id) = (domain.state()?, domain.id());
    let active = id.is_some();
    let live = if active { Some(read(domain, false)?) } else { None };
    let saved = if domain.is_persistent()? { Some(read(domain, true)?) } else { None };
    let bandwidth = |flags| domain.bandwidth(flags).map_err(|error| error.message);
    let process = if active { process::find(pid_dirs, &name, &uuid) } else { None };
    let in_kernel = process.and_then(|process| cgroup::bandwidth(process.pid));
    Ok(Sighting {
        id,
        state,
        live_bandwidth: match in_kernel {
            _ if !active => Err("it is down".to_owned()),
            Some((enforced, true)) => Ok(enforced),
            _ => bandwidth(LIVE),
        },
        saved_bandwidth: match &saved {
            None => Err("it is transient".to_owned()),
            Some(saved) if saves_bandwidth => Ok(saved.bandwidth),
            Some(_) => bandwidth(CONFIG),
        },
        cgroup_limit: in_kernel.map(|(enforced, _)| quota::limit(enforced)),
        balloon: Balloon::NotAsked,
        online: None,
        name,
        uuid,
        live,
        saved,
        process,
    })
}

/// A definition of it.
fn read(domain: &Domain, saved: bool) -> Result<Definition, ffi::Error> {
    let definition = xml::definition(&domain.xml(saved)?);
    definition.map_err(|message| ffi::Error { code: virt_sys::VIR_ERR_XML_ERROR, message })
}

/// The same, where all that was touched since it was seen is known: only that is asked. `None` where the kernel doesn't say that it
/// is the same run with the same vCPUs, or where it doesn't tell its CPU bandwidth.
pub(super) fn sight_again(
    connect: &Connect,
    kept: &Kept,
    pid_dirs: &[PathBuf],
    saves_bandwidth: bool,
) -> Result<Option<(Arc<Domain>, Sighting)>, ffi::Error> {
    let Sighting { name, uuid, .. } = &kept.seen;
    let process = process::find(pid_dirs, name, uuid);
    let enforced = process.and_then(|process| cgroup::bandwidth(process.pid)).filter(|(_, own)| *own);
    let Some((enforced, _)) = enforced.filter(|_| process == kept.seen.process) else { return Ok(None) };
    let domain = match connect.known(uuid) {
        Some(domain) => domain,
        None => connect.by_uuid(uuid)?,
    };
    let mut seen = Sighting { balloon: Balloon::NotAsked, online: None, ..kept.seen.clone() };
    (seen.live_bandwidth, seen.cgroup_limit) = (Ok(enforced), Some(quota::limit(enforced)));
    if kept.saved {
        let saved = read(&domain, true)?;
        seen.saved_bandwidth =
            if saves_bandwidth { Ok(saved.bandwidth) } else { domain.bandwidth(CONFIG).map_err(|error| error.message) };
        seen.saved = Some(saved);
    }
    Ok(Some((domain, seen)))
}

/// Asks the guest agent how many vCPUs are online inside.
pub(super) fn ask_agent(domain: &Domain) -> Result<Option<u64>, ffi::Error> {
    Ok(count(&domain.guest_vcpus()?))
}

/// How many numbers a list such as `0-2,5` has; `None` where it is none.
fn count(list: &str) -> Option<u64> {
    list.split(',').try_fold(0_u64, |all, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<u64>().ok()?, last.trim().parse::<u64>().ok()?);
        all.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// Asks QEMU for the balloon, and for at most `wait` the guest for its use of memory. `period` is how often its driver
/// reports now; where that is never, it is asked to once a second for as long as we wait. `still` is what is known of where
/// the balloon stands.
pub(super) fn ask_balloon(
    domain: &Domain,
    period: u32,
    wait: Duration,
    still: Option<Still>,
) -> Result<Balloon, ffi::Error> {
    let first = domain.memory_stats()?;
    let fresh = is_fresh(&first, period, now()) && is_of_this_balloon(&first, still);
    if fresh || wait.is_zero() {
        return Ok(Balloon::Said { fresh, stats: first });
    }
    // Drivers without stats refuse: then there is nothing to wait for.
    if domain.set_stats_period(1).is_err() {
        return Ok(Balloon::Said { stats: first, fresh: false });
    }
    let answer = await_update(domain, first, wait);
    // Also where the answer is an error: what was there before comes back.
    let back = domain.set_stats_period(period);
    if let Err(error) = back {
        tracing::warn!("the balloon's reporting period can't be put back to {period} s: {}", error.message);
    }
    answer
}

/// Waits for a report that was made while the balloon stood where it stands.
fn await_update(domain: &Domain, first: MemoryStats, wait: Duration) -> Result<Balloon, ffi::Error> {
    let end = Instant::now() + wait;
    let mut before = first;
    loop {
        let stats = domain.memory_stats()?;
        let newer = stats.last_update.unwrap_or(0) > before.last_update.unwrap_or(0);
        let fresh = newer && stats.actual == before.actual;
        let left = end.saturating_duration_since(Instant::now());
        if fresh || left.is_zero() {
            return Ok(Balloon::Said { stats, fresh });
        }
        if stats.actual != before.actual {
            before = stats;
        }
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
}

/// Whether the guest's report is one of the balloon as it is: what a guest could give away before its balloon grew is more
/// than what it can now.
fn is_of_this_balloon(stats: &MemoryStats, still: Option<Still>) -> bool {
    still.is_some_and(|still| stats.actual == Some(still.actual) && stats.last_update > Some(still.since))
}

/// Whether the guest's numbers are of now: at most two of its reports old, and a second for the rounding. Without a period
/// the driver reports once when it is loaded and never again.
fn is_fresh(stats: &MemoryStats, period: u32, now: u64) -> bool {
    let age = u64::from(period) * 2 + 1;
    stats.usable.is_some() && stats.last_update.is_some_and(|at| at != 0 && at.saturating_add(age) >= now)
}

/// Seconds since the Unix epoch, as QEMU dates a guest's reports.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_from_before_the_balloon_moved_says_nothing_about_now() {
        let stats = MemoryStats { actual: Some(160), usable: Some(230), last_update: Some(1000) };
        let still = |actual, since| Some(Still { actual, since, first: Instant::now() });
        assert!(is_of_this_balloon(&stats, still(160, 999)));
        for still in [None, still(160, 1000), still(160, 1001), still(320, 990)] {
            assert!(!is_of_this_balloon(&stats, still), "{still:?}");
        }
    }

    #[test]
    fn what_an_agent_lists_is_counted_or_nothing_is_told() {
        for (list, expected) in [("0", Some(1)), ("0-2,5", Some(4)), ("0-18446744073709551614", Some(u64::MAX))] {
            assert_eq!(count(list), expected, "{list}");
        }
        for list in ["", "3-1", "x", "0-18446744073709551615", "0-18446744073709551614,9", "-1", "1-"] {
            assert_eq!(count(list), None, "{list}");
        }
    }

    #[test]
    fn only_uuids_are_looked_up_as_uuids() {
        assert!(is_uuid("6d9a8a5e-0000-4000-8000-000000000001") && is_uuid("6d9a8a5e000040008000000000000001"));
        for text in ["web", "", "6d9a8a5e-0000-4000-8000-00000000000", "6d9a8a5e-0000-4000-8000-00000000000g"] {
            assert!(!is_uuid(text), "{text}");
        }
    }

    #[test]
    fn numbers_of_a_driver_that_stopped_reporting_are_stale() {
        let stats = |last_update| MemoryStats { actual: Some(1), usable: Some(1), last_update };
        assert!(is_fresh(&stats(Some(1000)), 0, 1001) && !is_fresh(&stats(Some(1000)), 0, 1002));
        assert!(is_fresh(&stats(Some(1000)), 5, 1011) && !is_fresh(&stats(Some(1000)), 5, 1012));
        assert!(!is_fresh(&stats(Some(0)), 5, 1) && !is_fresh(&stats(None), 5, 1));
    }
}
