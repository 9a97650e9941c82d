//! What instances and the host use: looks at their counters when somebody asks, and keeps the last ones, so that the next look
//! has something to be compared with. Nothing is looked at while nobody asks.
//!
//! ```text
//!   who asks ─► observed ─► looked at (one look serves all who ask at that moment) ─► a rate ────────────► told
//!                                         └─ nothing to compare with: the first look ─► a moment later, again
//! ```

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use agentd_core::access::Right;
use agentd_core::api::{HostUse, UsageList, UsageView};
use agentd_core::error::Problem;
use agentd_core::instance::{InstanceId, Kind, Observed, Target};
use agentd_core::pattern::Pattern;
use agentd_core::units::ByteCount;
use agentd_core::usage::{Counters, Rate, Track, view};
use futures_util::StreamExt;

use super::{Engine, Peer};
use crate::clock;

/// How long after its first look an instance is looked at again, so that the first who asks is told a rate.
const PAIR: Duration = Duration::from_millis(400);
/// A look, and a listing, serves all who ask within this time, in µs.
const SERVES: u64 = 200_000;
/// How old the look at an instance may be with which its use is told at once.
const JUST_NOW: Duration = Duration::from_secs(1);
/// How old the listing may be that tells which instances there are.
const LISTING_AGE: Duration = Duration::from_millis(500);
/// Instances looked at side by side.
const LOOKS_AT_ONCE: usize = 16;
/// A tick of /proc/stat in µs: USER_HZ is 100 on every architecture that agentd is built for.
const TICK_USEC: u64 = 10_000;

/// The last looks.
#[derive(Debug, Default)]
pub(super) struct Looks {
    instances: Mutex<HashMap<InstanceId, Arc<tokio::sync::Mutex<Last>>>>,
    host: Mutex<Track>,
}

/// The last looks at one instance.
#[derive(Debug, Default)]
struct Last {
    track: Track,
    /// When the newest one ended, of which run it was, and what came of it.
    newest: Option<(u64, Option<String>, Result<Counters, String>)>,
}

/// An instance with what was counted of it.
#[derive(Debug)]
pub(crate) struct Looked {
    /// As it was seen.
    pub(crate) observed: Observed,
    /// What was counted, or why nothing could be.
    pub(crate) counted: Result<Counters, String>,
    rate: Option<Rate>,
}

impl Engine {
    /// What one instance uses; `now` leaves a rate out that would have to be waited for, and looks at nothing but counters where the
    /// instance was looked at a moment ago.
    pub async fn usage(&self, peer: &Peer, target: &Target, now: bool) -> Result<UsageView, Problem> {
        let known = match target {
            Target::Full(reference) if now => self.book().looked_at(reference, JUST_NOW).cloned(),
            _ => None,
        };
        let observed = match known {
            Some(observed) => observed,
            None => self.find(peer, target).await?,
        };
        self.authorize(peer, Right::Read, &observed, target)?;
        self.forget_looks_at_what_is_gone();
        let mut looked = self.look_once(observed).await;
        if looked.may_get_a_rate() && !now {
            tokio::time::sleep(PAIR).await;
            looked = self.look_once(looked.observed).await;
        }
        Ok(looked.view())
    }

    /// What the instances use that are up and that a caller may see, and what is in use of the host.
    pub async fn usages(
        &self,
        peer: &Peer,
        kind: Option<Kind>,
        pattern: Option<&Pattern>,
    ) -> Result<UsageList, Problem> {
        match kind {
            Some(kind) => {
                self.source(kind)?;
                self.refresh_kind(kind, LISTING_AGE).await;
            }
            None => self.refresh(LISTING_AGE).await,
        }
        let up = self.visible_and_up(peer, |observed| {
            kind.is_none_or(|kind| observed.reference.kind() == kind)
                && pattern.is_none_or(|pattern| pattern.matches(observed.reference.as_str(), &observed.labels))
        });
        let (looked, host) = tokio::join!(self.look_for_rates(up), self.host_use());
        let mut items: Vec<UsageView> = looked.into_iter().map(Looked::view).collect();
        items.sort_by(|a, b| a.reference.cmp(&b.reference));
        Ok(UsageList { items, host })
    }

    /// The instances that are up and that a caller may see, as they are known.
    pub(crate) fn visible_and_up(&self, peer: &Peer, fits: impl Fn(&Observed) -> bool) -> Vec<Observed> {
        let settings = self.settings();
        let sees = |seen: &Observed| settings.access.can_see(&peer.caller, seen.reference.as_str(), &seen.labels);
        let book = self.book();
        let all = book.all().map(|known| &known.observed);
        all.filter(|seen| seen.state.is_up() && fits(seen) && sees(seen)).cloned().collect()
    }

    /// Looks at the counters of instances; at those that can't be told a rate yet twice, all of them in the same moment.
    async fn look_for_rates(&self, instances: Vec<Observed>) -> Vec<Looked> {
        let (young, mut looked): (Vec<Looked>, Vec<Looked>) =
            self.look_at(instances).await.into_iter().partition(Looked::may_get_a_rate);
        if !young.is_empty() {
            tokio::time::sleep(PAIR).await;
            looked.extend(self.look_at(young.into_iter().map(|looked| looked.observed).collect()).await);
        }
        looked
    }

    /// Looks at the counters of instances.
    pub(crate) async fn look_at(&self, instances: Vec<Observed>) -> Vec<Looked> {
        self.forget_looks_at_what_is_gone();
        let looks = instances.into_iter().map(|observed| self.look_once(observed));
        futures_util::stream::iter(looks).buffer_unordered(LOOKS_AT_ONCE).collect().await
    }

    async fn look_once(&self, observed: Observed) -> Looked {
        if !observed.state.is_up() {
            return Looked { observed, counted: Ok(Counters::default()), rate: None };
        }
        let asked = clock::monotonic_usec();
        let last = {
            let mut instances = self.inner.looks.instances.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(instances.entry(observed.instance_id()).or_default())
        };
        // Held over the look: who asks meanwhile waits for it and is told what it brings. Nobody else's waits with it.
        let mut last = last.lock().await;
        let serves = |at: u64, run: &Option<String>| at.saturating_add(SERVES) > asked && *run == observed.boot;
        let newest = match last.newest.take().filter(|(at, run, _)| serves(*at, run)) {
            Some(newest) => newest,
            None => {
                let counted = match self.backend(observed.reference.kind()) {
                    Ok(backend) => backend.counters(&observed).await.map_err(|error| error.to_string()),
                    Err(problem) => Err(problem.detail),
                };
                if let Ok(counted) = &counted {
                    last.track.take(observed.boot.as_deref(), counted);
                }
                (clock::monotonic_usec(), observed.boot.clone(), counted)
            }
        };
        let counted = newest.2.clone();
        last.newest = Some(newest);
        Looked { rate: last.track.rate().filter(|_| counted.is_ok()), observed, counted }
    }

    /// An instance that is gone takes its looks with it.
    fn forget_looks_at_what_is_gone(&self) {
        let known: HashSet<InstanceId> = self.book().all().map(|known| known.observed.instance_id()).collect();
        let mut instances = self.inner.looks.instances.lock().unwrap_or_else(PoisonError::into_inner);
        instances.retain(|instance, _| known.contains(instance));
    }

    /// What is in use of the host, by whatever runs on it.
    async fn host_use(&self) -> HostUse {
        let cpus = match self.look_at_host() {
            None => {
                tokio::time::sleep(PAIR).await;
                self.look_at_host()
            }
            cpus => cpus,
        };
        HostUse { cpus, memory: read("/proc/meminfo").as_deref().and_then(memory_in_use) }
    }

    fn look_at_host(&self) -> Option<f64> {
        let cpu_usec = read("/proc/stat").as_deref().and_then(busy_usec);
        let counted = Counters { at_usec: clock::monotonic_usec(), cpu_usec, ..Counters::default() };
        let mut track = self.inner.looks.host.lock().unwrap_or_else(PoisonError::into_inner);
        track.take(None, &counted);
        track.rate().and_then(|rate| rate.cpus)
    }
}

impl Looked {
    fn view(self) -> UsageView {
        view(&self.observed, self.counted.as_ref().map_err(String::as_str), self.rate, clock::rfc3339())
    }

    /// Whether all that it lacks for a rate is another look.
    fn may_get_a_rate(&self) -> bool {
        self.rate.is_none() && self.counted.as_ref().is_ok_and(|counted| counted.cpu_usec.is_some())
    }
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// What all CPUs together were busy since the host's boot, by the first line of /proc/stat (proc(5)): all but idle and iowait.
/// What guests got is in `user` already.
fn busy_usec(stat: &str) -> Option<u64> {
    let fields: Option<Vec<u64>> = stat
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_ascii_whitespace()
        .take(8)
        .map(|field| field.parse().ok())
        .collect();
    let fields = fields.filter(|fields| fields.len() == 8)?;
    let busy = fields.iter().enumerate().filter(|(place, _)| !matches!(place, 3 | 4)).map(|(_, ticks)| ticks);
    busy.sum::<u64>().checked_mul(TICK_USEC)
}

fn memory_in_use(meminfo: &str) -> Option<ByteCount> {
    let fields: BTreeMap<&str, u64> = meminfo
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name, value.trim().strip_suffix(" kB")?.trim().parse().ok()?))
        })
        .collect();
    let used = fields.get("MemTotal")?.checked_sub(*fields.get("MemAvailable")?)?;
    used.checked_mul(1 << 10).and_then(ByteCount::new)
}

#[cfg(test)]
mod tests;
