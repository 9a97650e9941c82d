//! VMs through libvirt: lists and observes domains, carries out single steps on them, and survives a libvirt or a QEMU that
//! hangs, breaks off or is away.
//!
//! | file | what it knows |
//! |---|---|
//! | `ffi.rs` | libvirt's C calls, made safe |
//! | `calls.rs` | threads, deadlines, connections |
//! | `look.rs`, `xml.rs`, `process.rs`, `cgroup.rs` | what can be seen of a domain |
//! | `reading.rs`, `quota.rs` | what that means |
//! | `counters.rs` | what was counted of a domain |
//! | `asked.rs` | what was asked of a guest and is still open |
//! | `guests.rs` | how guests behave |
//! | `recent.rs` | what was seen a moment ago |
//! | `change.rs` | one step |
//! | `watch.rs`, `hotplug.rs` | what libvirt and the kernel announce |
//! | `console.rs` | where a guest's console is logged |

mod asked;
mod calls;
mod cgroup;
mod change;
mod console;
mod counters;
mod ffi;
#[cfg(feature = "fake")]
pub(super) mod fuzzing;
mod guests;
mod hotplug;
mod look;
mod prepare;
mod process;
mod quota;
mod reading;
mod recent;
#[cfg(test)]
mod tests;
mod watch;
mod xml;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use agentd_core::instance::{Kind, Observed, Ref, State};
use agentd_core::operation::Identity;
use agentd_core::plan::{Action, Preparation, Redefinition, Scope, Values, describe};
use agentd_core::units::{ByteCount, Limit};
use agentd_core::usage::Counters;
use async_trait::async_trait;
use futures_util::StreamExt;
use tokio::sync::mpsc;
use virt_sys as sys;

use self::asked::Memory;
use self::calls::{Calls, Class, READ_DEADLINE};
use self::change::Done;
use self::guests::Guests;
use self::look::{Balloon, Glance, Sighting};
use self::recent::Recent;
use super::{Backend, BackendError, LogAsk, LogFrames, Look, Notice, cgroup as kernel, differing};

/// Domains looked at side by side when all are listed.
const LOOKS_AT_ONCE: usize = 6;
/// Of a look's deadline, what is left to QEMU beside the wait for its guest.
const BESIDE_THE_WAIT: Duration = Duration::from_secs(2);

/// The libvirt at one URI.
#[derive(Debug)]
pub struct Libvirt {
    uri: String,
    calls: Calls,
    asked: Mutex<Memory>,
    guests: Arc<Mutex<Guests>>,
    recent: Mutex<Recent>,
    host: Arc<kernel::Host>,
    /// What was seen of each domain when it was last looked over.
    told: Mutex<BTreeMap<String, Glance>>,
    /// Whether a definition tells all of what is saved of the CPU bandwidth.
    saves_bandwidth: bool,
}

impl Libvirt {
    /// Connects at the first call, so that agentd starts where libvirt is down.
    pub fn new(uri: String) -> Self {
        let host = Arc::new(kernel::Host::new());
        Libvirt {
            calls: Calls::new(&uri),
            asked: Mutex::default(),
            guests: Arc::default(),
            recent: Mutex::default(),
            host,
            told: Mutex::default(),
            saves_bandwidth: is_system_qemu(&uri),
            uri,
        }
    }

    /// Never held over a call.
    fn asked(&self) -> MutexGuard<'_, Memory> {
        // Each change of it is one statement, so a panic elsewhere leaves it whole.
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never held over a call.
    fn guests(&self) -> MutexGuard<'_, Guests> {
        of(&self.guests)
    }

    /// Never held over a call.
    fn recent(&self) -> MutexGuard<'_, Recent> {
        of(&self.recent)
    }

    /// All that can be seen of a domain. The balloon last, because asking QEMU hangs where QEMU hangs: what was seen before that
    /// is told all the same.
    async fn see(&self, name: &str, look: Look) -> Result<Sighting, BackendError> {
        let what = format!("observe {name}");
        let wait = match look {
            Look::Plain | Look::Back => Duration::ZERO,
            Look::Usage(wait) => wait.min(READ_DEADLINE - BESIDE_THE_WAIT),
        };
        let (began, now) = (self.recent().ticket(), Instant::now());
        let kept = if look == Look::Back { self.recent().of(name, now) } else { None };
        let so_far = Arc::new(Mutex::new(None));
        let (named, called, seen_first) = (name.to_owned(), what.clone(), Arc::clone(&so_far));
        let (calls, guests, saves_bandwidth) = (self.calls.clone(), Arc::clone(&self.guests), self.saves_bandwidth);
        let job = move |job: &calls::Job<'_>| {
            let again = match kept.as_ref().filter(|kept| kept.serves(Instant::now())) {
                Some(kept) => look::sight_again(job.connect, kept, job.pid_dirs, saves_bandwidth)?,
                None => None,
            };
            let is_whole = again.is_none();
            let (domain, mut seen) = match again {
                Some(again) => again,
                None => {
                    let domain = look::look_up(job.connect, &named)?;
                    let seen = look::sight(&domain, job.pid_dirs, saves_bandwidth)?;
                    (domain, seen)
                }
            };
            let Some(live) = &seen.live else { return Ok((seen, is_whole)) };
            if calls.is_stuck(&seen.uuid) {
                seen.balloon = Balloon::Deaf("an earlier call is overdue".into());
                return Ok((seen, false));
            }
            *of(&seen_first) = Some(seen.clone());
            job.concerns(&seen.uuid);
            let (period, wait) = (live.stats_period, if live.balloon { wait } else { Duration::ZERO });
            let still = of(&guests).still(&seen.uuid);
            seen.balloon = match look::ask_balloon(&domain, period, wait, still) {
                Ok(balloon) => balloon,
                Err(error) if job.is_cut_off(&error) => return Err(error.into()),
                Err(error) => Balloon::Deaf(calls::translate(&called, &error).to_string()),
            };
            Ok((seen, is_whole))
        };
        let (seen, is_whole) = match self.calls.run(Class::Look, "", &what, job).await {
            Err(error @ BackendError::Timeout(_)) => {
                let seen: Option<Sighting> = of(&so_far).take();
                let seen = seen.ok_or_else(|| error.clone())?;
                (Sighting { balloon: Balloon::Deaf(error.to_string()), ..seen }, false)
            }
            seen => seen?,
        };
        if seen.live.is_none() {
            return Ok(seen);
        }
        let actual = if let Balloon::Said { stats, .. } = &seen.balloon { stats.actual } else { None };
        let still = self.guests().still(&seen.uuid);
        self.guests().balloon_seen(&seen.uuid, actual, look::now());
        if is_whole {
            self.recent().looked(&seen, (began, now), still);
        }
        Ok(seen)
    }

    /// Asks the agent in a running guest what is online there. One that does not answer is left alone for a while: libvirt
    /// waits for it for 5 s, and for an answer that it has begun for ever.
    async fn ask_agent(&self, seen: &mut Sighting) {
        let connected = seen.live.as_ref().is_some_and(|live| live.agent);
        if !connected || seen.state.0 != sys::VIR_DOMAIN_RUNNING {
            return;
        }
        if let Some(told) = self.guests().told(&seen.uuid, Instant::now()) {
            seen.online = told;
            return;
        }
        let asked = Instant::now();
        if !self.guests().ask_agent(&seen.uuid, asked) {
            return;
        }
        let (uuid, what) = (seen.uuid.clone(), format!("ask the guest agent of {}", seen.name));
        let guests = Arc::clone(&self.guests);
        let job = move |job: &calls::Job<'_>| {
            let answer = job.connect.by_uuid(&uuid).and_then(|domain| look::ask_agent(&domain));
            of(&guests).agent_returned(&uuid);
            Ok(answer?)
        };
        // As a call that concerns no domain: an agent that hangs holds up nothing but itself.
        match self.calls.run(Class::Ask, "", &what, job).await {
            Ok(online) => {
                seen.online = online;
                self.guests().agent_told(&seen.uuid, online, asked);
            }
            Err(error) => {
                tracing::debug!("{what}: {error}");
                let returned = !matches!(error, BackendError::Timeout(_));
                self.guests().agent_is_deaf(&seen.uuid, Instant::now(), returned);
            }
        }
    }

    /// Whether libvirt is at work on a domain, for whomever.
    async fn is_occupied(&self, uuid: &str) -> Result<bool, BackendError> {
        let what = format!("ask whether libvirt is at work on {uuid}");
        let of = uuid.to_owned();
        let job = move |job: &calls::Job<'_>| Ok(job.connect.by_uuid(&of)?.is_occupied()?);
        if self.calls.run(Class::Look, "", &what, job).await? {
            return Ok(true);
        }
        // While libvirt waits for a guest to let a vCPU go, QEMU has no command to answer and the domain passes for free. So
        // one more question: it gets its turn when the call has ended.
        let of = uuid.to_owned();
        let job = move |job: &calls::Job<'_>| Ok(job.connect.by_uuid(&of)?.memory_stats()?);
        self.calls.run(Class::Ask, uuid, &what, job).await.map(|_| false)
    }

    fn understand(&self, seen: &Sighting) -> Result<Observed, BackendError> {
        reading::observed(seen, &mut self.asked()).map_err(|problem| BackendError::Unsupported(problem.detail))
    }
}

/// Whether a URI is that of QEMU's driver with all its rights, on whichever host: a session's has no CPU bandwidth.
fn is_system_qemu(uri: &str) -> bool {
    let path = uri.split_once('?').map_or(uri, |(path, _)| path);
    path.starts_with("qemu") && path.ends_with("/system")
}

fn of<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Backend for Libvirt {
    fn kind(&self) -> Kind {
        Kind::Vm
    }

    fn name(&self) -> String {
        format!("libvirt {}", self.uri)
    }

    async fn health(&self) -> Result<String, BackendError> {
        self.calls.run(Class::Look, "", "ask libvirt's version", |job| Ok(job.connect.versions()?)).await
    }

    async fn list(&self) -> Result<Vec<Observed>, BackendError> {
        let job = |job: &calls::Job<'_>| {
            let domains = job.connect.domains()?;
            Ok(domains.iter().filter_map(|domain| Some((domain.name().ok()?, domain.uuid().ok()?))).collect::<Vec<_>>())
        };
        let known = self.calls.run(Class::Look, "", "list the domains", job).await?;
        let uuids: HashSet<&str> = known.iter().map(|(_, uuid)| uuid.as_str()).collect();
        let exists = |uuid: &str| uuids.contains(uuid);
        self.asked().keep_only(exists);
        self.guests().keep_only(exists);
        self.recent().keep_only(exists);
        let looks = known.into_iter().map(|(name, uuid)| async move {
            let seen = self.see(&uuid, Look::Plain).await;
            match seen.and_then(|seen| self.understand(&seen)) {
                Ok(observed) => Some(observed),
                Err(BackendError::NotFound(_)) => None,
                Err(error) => {
                    tracing::warn!("vm/{name} ({uuid}) can't be read: {error}");
                    unreadable(&name, uuid, &error)
                }
            }
        });
        Ok(futures_util::stream::iter(looks).buffered(LOOKS_AT_ONCE).filter_map(std::future::ready).collect().await)
    }

    async fn stirred(&self) -> Result<Vec<String>, BackendError> {
        if self.calls.are_single() {
            return Err(BackendError::Unsupported("libvirt's test driver announces nothing to others".into()));
        }
        let job = |job: &calls::Job<'_>| Ok(look::glance(job.connect)?);
        let now = self.calls.run(Class::Look, "", "look over the domains", job).await?;
        self.asked().keep_only(|uuid| now.contains_key(uuid));
        self.guests().keep_only(|uuid| now.contains_key(uuid));
        self.recent().keep_only(|uuid| now.contains_key(uuid));
        Ok(differing(&mut of(&self.told), now))
    }

    async fn observe(&self, name: &str, look: Look) -> Result<Observed, BackendError> {
        if name.contains('\0') {
            return Err(BackendError::NotFound(format!("no domain has the name {name:?}")));
        }
        let mut seen = self.see(name, look).await?;
        self.ask_agent(&mut seen).await;
        self.understand(&seen)
    }

    async fn counters(&self, observed: &Observed) -> Result<Counters, BackendError> {
        let (host, dirs, uuid) = (Arc::clone(&self.host), self.calls.pid_dirs(), observed.id.clone());
        let (name, boot) = (observed.reference.name().to_owned(), observed.boot.clone());
        let read = move || counters::of_process(&host, &dirs, &name, &uuid, boot.as_deref());
        if let Some(counted) = tokio::task::spawn_blocking(read).await.ok().flatten() {
            return Ok(counted);
        }
        let (what, uuid) = (format!("ask libvirt for the CPU time of {}", observed.reference), observed.id.clone());
        let job = move |job: &calls::Job<'_>| Ok(job.connect.by_uuid(&uuid)?.cpu_time()?);
        self.calls.run(Class::Look, "", &what, job).await.map(counters::of_libvirt)
    }

    async fn apply(&self, target: &Ref, identity: &Identity, action: &Action) -> Result<(), BackendError> {
        let what = format!("{} of {target}", describe(target, action));
        let kept = self.recent().change_begins(&identity.id, Instant::now());
        let (of, step, seen) = (identity.clone(), action.clone(), kept.clone());
        let job = move |job: &calls::Job<'_>| change::apply(job, &of, &step, seen.as_ref());
        let class = if action.starts() { Class::Start } else { Class::Change };
        let done = self.calls.run(class, &identity.id, &what, job).await;
        self.recent().change_ended(&identity.id, kept.filter(|_| done.is_ok()).and_then(|kept| kept.after(action)));
        self.guests().vcpus_changed(&identity.id, Instant::now());
        let done = done?;
        let (uuid, boot) = (identity.id.as_str(), identity.boot.as_deref().unwrap_or_default());
        match done {
            Done::Plain => Ok(()),
            Done::Balloon { from, target } => {
                self.asked().balloon_asked(uuid, boot, from, target);
                Ok(())
            }
            Done::Booted { boot, from, target } => {
                self.asked().balloon_asked(uuid, &boot, from, target);
                Ok(())
            }
            Done::Vcpus => {
                self.asked().vcpus_replaced(uuid, boot);
                Ok(())
            }
            Done::Late { vcpus, words } => {
                self.asked().unplug_is_late(uuid, boot, vcpus);
                Err(BackendError::GuestLate(format!("{what}: {words}")))
            }
        }
    }

    async fn redefine(
        &self,
        target: &Ref,
        identity: &Identity,
        redefinition: &Redefinition,
    ) -> Result<Preparation, BackendError> {
        let (of, redefinition) = (identity.clone(), *redefinition);
        let job = move |job: &calls::Job<'_>| change::redefined(job, &of, &redefinition);
        self.calls.run(Class::Look, &identity.id, &format!("read the definition of {target}"), job).await
    }

    async fn logs(&self, _target: &Ref, identity: &Identity, ask: &LogAsk) -> Result<LogFrames, BackendError> {
        console::read(&self.calls, &self.uri, &identity.id, ask).await
    }

    async fn is_under_way(&self, identity: &Identity) -> bool {
        if self.calls.is_changing(&identity.id) || self.calls.is_stuck(&identity.id) {
            return true;
        }
        match self.is_occupied(&identity.id).await {
            Ok(occupied) => occupied,
            // Somewhere in libvirt something hangs, and it may be that very call.
            Err(BackendError::Timeout(_) | BackendError::Overloaded(_)) => true,
            // Calls end with their libvirtd, and with their domain. Of anything else the observation that follows will tell.
            Err(_) => false,
        }
    }

    async fn watch(&self, notices: mpsc::Sender<Notice>) -> BackendError {
        watch::watch(&self.calls, &self.uri, &notices).await
    }

    fn recall(&self, observed: &Observed) {
        if let Some(asked) = reading::asked_in(&observed.native) {
            self.asked().recall(&observed.id, asked);
        }
    }

    fn may_have_been_asked(&self, action: &Action, observed: &Observed) {
        // What a device gives is libvirt's to tell; only the balloon's target nobody tells.
        let plugged = observed.parts.map_or(ByteCount::ZERO, |parts| parts.plugged);
        let kib = |memory: Option<Limit<ByteCount>>| {
            memory.and_then(Limit::at).map(|bytes| bytes.saturating_sub(plugged).bytes() >> 10)
        };
        let balloon = |(scope, values): (Scope, &Values)| {
            kib(values.memory.filter(|_| scope == Scope::Live && values.plugged.is_none()))
        };
        let target = action.sets().and_then(balloon);
        if let (Some(boot), Some(from), Some(target)) = (&observed.boot, kib(observed.memory.observed), target) {
            self.asked().balloon_asked(&observed.id, boot, from, target);
        }
    }
}

/// A domain of which nothing can be told but that it is there.
fn unreadable(name: &str, uuid: String, error: &BackendError) -> Option<Observed> {
    use agentd_core::instance::{Barred, Covered, Demand, Reading, Saved, Usage};
    use agentd_core::units::{ByteCount, Cpus};
    let why = format!("it can't be read: {error}");
    Some(Observed {
        reference: reading::reference(name, &uuid).ok()?,
        id: uuid,
        boot: None,
        state: State::Unknown,
        saved: Saved::Apart,
        cpus: Reading::absent(Cpus::whole(1), why.clone()),
        cpu_limit: Reading::absent(Cpus::from_millis(1), why.clone()),
        memory: Reading::absent(ByteCount::mib(1), why.clone()),
        used: Usage::Unknown,
        demand: Demand { cpus: None, memory: None },
        covered: Covered::default(),
        barred: Barred::default(),
        parts: None,
        saved_parts: None,
        labels: std::collections::BTreeMap::new(),
        notes: vec![why.clone()],
        switched_off: false,
        unchangeable: Some(why),
        native: serde_json::Value::Null,
    })
}
