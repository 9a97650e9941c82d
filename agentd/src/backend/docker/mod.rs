//! Docker containers: limits changed with one update call each, read back from the kernel's cgroup. The only module that
//! knows NanoCPUs, quotas and memory-swap.
//!
//! ```text
//!   client   calls with deadlines         limits   Docker's numbers and the updates made of them
//!   view     them and what the kernel enforces (the cgroup), as an observation
//!   logs     what a container wrote, as the engine keeps it
//! ```

mod client;
#[cfg(feature = "fake")]
pub(super) mod fuzzing;
mod limits;
#[cfg(all(test, feature = "live-docker"))]
mod live_tests;
mod logs;
mod transport;
mod view;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agentd_core::instance::{Kind, Observed, Ref, State};
use agentd_core::operation::Identity;
use agentd_core::plan::{Action, Scope};
use agentd_core::units::Cpus;
use agentd_core::usage::Counters;
use async_trait::async_trait;
use bollard::models::{ContainerInspectResponse, ContainerSummary, ContainerUpdateBody};
use futures_util::StreamExt;
use tokio::sync::mpsc;

use self::client::Client;
use self::limits::{Impossible, Native};
use super::{Backend, BackendError, LogAsk, LogFrames, Look, Notice, cgroup, check_boot, differing};

/// How many containers are asked about at once.
const INSPECTED_AT_ONCE: usize = 16;
/// The shortest id prefix that serves as a name.
const SHORTEST_PREFIX: usize = 6;
/// How long the engine's word on the host's CPUs serves; it changes with CPU hotplug and a restart of the engine at most.
const HOST_CPUS_SERVE: Duration = Duration::from_secs(600);
/// When it is asked again where it had no answer, so that an engine that hangs on this alone doesn't hold up each look.
const HOST_CPUS_RETRY: Duration = Duration::from_secs(60);
/// How long the engine's list serves for telling what stirred. In between it is asked what happened, which it has at hand: a
/// list takes it a tenth of a millisecond for each container.
const LIST_SERVES: Duration = Duration::from_secs(20);
/// How long the look that a change was planned on serves for making it: another one just before the update costs a tenth of that
/// update, and what happens in between would be as unseen.
const LOOK_SERVES: Duration = Duration::from_millis(100);
/// What a container is asked to stop with where it names nothing else.
const DEFAULT_STOP_SIGNAL: &str = "SIGTERM";

/// The engine behind one socket.
#[derive(Debug)]
pub struct Docker {
    client: Client,
    host: Arc<cgroup::Host>,
    /// When to ask for the host's CPUs again, and what was answered. Never locked over an await.
    host_cpus: Mutex<Option<(Instant, Option<Cpus>)>>,
    /// The last look at each running container, by id.
    looked: Mutex<HashMap<String, Looked>>,
    told: Mutex<Told>,
}

/// What of a look at a running container serves other calls.
#[derive(Debug)]
struct Looked {
    /// When it was begun.
    at: Instant,
    /// Which run of it that was.
    boot: Option<String>,
    /// Its main process: where its cgroup is found.
    pid: u32,
    /// Its limits as they were.
    native: Native,
}

/// What the engine told when it was last asked what stirred.
#[derive(Debug, Default)]
struct Told {
    /// Of each container: its names and its state.
    listed: BTreeMap<String, (Option<Vec<String>>, Option<String>)>,
    /// When that list was begun.
    at: Option<Instant>,
    /// Until when it is known what happened since, in Unix time.
    until: Duration,
}

/// Unix time.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

impl Docker {
    /// Connects to nothing yet: the engine may come up later, and go and come back.
    pub fn new(socket: PathBuf) -> Self {
        Docker {
            client: Client::new(socket),
            host: Arc::new(cgroup::Host::new()),
            host_cpus: Mutex::new(None),
            looked: Mutex::default(),
            told: Mutex::default(),
        }
    }

    /// The container that a checked name or id prefix means. Docker would take any prefix, of one character even.
    async fn find(&self, name: &str) -> Result<ContainerInspectResponse, BackendError> {
        let unknown = || BackendError::NotFound(format!("there is no container {name:?}"));
        // The grammar keeps a name one path segment of Docker's API.
        if Ref::new(Kind::Container, name).is_err() {
            return Err(unknown());
        }
        match self.client.inspect(name).await {
            Ok(found) if means(name, &found) => Ok(found),
            Ok(_) | Err(BackendError::NotFound(_)) => Err(unknown()),
            Err(BackendError::Ambiguous(_)) if is_prefix(name) => Err(BackendError::Ambiguous(format!(
                "the ids of several containers begin with {name}; give more of the id, or the name"
            ))),
            Err(BackendError::Ambiguous(_)) => Err(unknown()),
            Err(error) => Err(error),
        }
    }

    /// The same container, by its full id, or [`BackendError::NotFound`].
    async fn find_same(&self, target: &Ref, identity: &Identity) -> Result<ContainerInspectResponse, BackendError> {
        let gone = || BackendError::NotFound(format!("{target} is gone: there is no container with its id any more"));
        if identity.id.len() < SHORTEST_PREFIX || Ref::new(Kind::Container, &identity.id).is_err() {
            return Err(gone());
        }
        match self.client.inspect(&identity.id).await {
            Ok(found) if view::id(&found) == identity.id => Ok(found),
            Ok(_) | Err(BackendError::NotFound(_) | BackendError::Ambiguous(_)) => Err(gone()),
            // Nothing was asked for yet, so nothing is unknown.
            Err(BackendError::Timeout(why)) => Err(BackendError::Unavailable(format!("{why}; nothing was changed"))),
            Err(error) => Err(error),
        }
    }

    /// Describes what was inspected in a call that was begun then.
    async fn describe(&self, inspected: &ContainerInspectResponse, at: Instant) -> Result<Observed, BackendError> {
        let seen = match view::pid(inspected).filter(|_| view::state(inspected).is_up()) {
            Some(pid) => {
                let (host, id) = (Arc::clone(&self.host), view::id(inspected).to_owned());
                let (boot, native) = (view::boot(inspected), view::native(inspected));
                self.looked_at(&id, Looked { at, boot, pid, native });
                Some(tokio::task::spawn_blocking(move || host.look(pid, &id)).await.unwrap_or_default())
            }
            None => None,
        };
        view::observed(inspected, seen, self.host_cpus().await)
            .map_err(|problem| BackendError::Failed(format!("docker's answer can't be used: {}", problem.detail)))
    }

    /// Never locked over an await.
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Never locked over an await.
    fn looked(&self) -> MutexGuard<'_, HashMap<String, Looked>> {
        self.looked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what a look has told, unless a later one has told since.
    fn looked_at(&self, id: &str, new: Looked) {
        let mut looked = self.looked();
        if looked.get(id).is_none_or(|known| known.at <= new.at) {
            looked.insert(id.to_owned(), new);
        }
    }

    /// The limits of a container that was looked at a moment ago and runs as it did when a change was planned. They serve once:
    /// the change that is made of them replaces them. With its process: whether that still runs is for the kernel to say.
    fn just_seen(&self, identity: &Identity) -> Option<(u32, Native)> {
        let mut looked = self.looked();
        let last = looked.get_mut(&identity.id)?;
        let serves = last.boot.is_some() && last.boot == identity.boot && last.at.elapsed() < LOOK_SERVES;
        last.boot = None;
        serves.then_some((last.pid, last.native))
    }

    /// The host's CPUs as the engine counts them, which is the most that it takes for `--cpus`.
    async fn host_cpus(&self) -> Option<Cpus> {
        let known = *self.host_cpus.lock().unwrap_or_else(PoisonError::into_inner);
        match known {
            Some((until, cpus)) if Instant::now() < until => cpus,
            _ => self.ask_host_cpus().await,
        }
    }

    async fn ask_host_cpus(&self) -> Option<Cpus> {
        let answer = self.client.info().await.ok().and_then(|info| u32::try_from(info.ncpu?).ok());
        let answer = answer.filter(|cpus| *cpus > 0).map(Cpus::whole);
        let mut known = self.host_cpus.lock().unwrap_or_else(PoisonError::into_inner);
        let serves = if answer.is_some() { HOST_CPUS_SERVE } else { HOST_CPUS_RETRY };
        let cpus = answer.or_else(|| known.and_then(|(_, cpus)| cpus));
        *known = Some((Instant::now() + serves, cpus));
        cpus
    }

    /// One of a list: `None` where it has vanished since.
    async fn describe_listed(&self, summary: ContainerSummary) -> Option<Observed> {
        let id = summary.id.as_deref().filter(|id| Ref::new(Kind::Container, id).is_ok())?;
        let begun = Instant::now();
        let answer = match self.client.inspect(id).await {
            Ok(inspected) => self.describe(&inspected, begun).await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(observed) => Some(observed),
            Err(BackendError::NotFound(_)) => None,
            Err(error) => view::unreadable(&summary, &error.to_string()),
        }
    }

    async fn update(
        &self,
        target: &Ref,
        id: &str,
        body: Result<Option<ContainerUpdateBody>, Impossible>,
    ) -> Result<(), BackendError> {
        match body {
            Ok(Some(body)) => self.client.update(id, body).await,
            Ok(None) => Ok(()),
            Err(Impossible::Unsupported(why)) => Err(BackendError::Unsupported(format!("{target}: {why}"))),
            Err(Impossible::NoWayBack(why)) => {
                Err(BackendError::Failed(format!("{target} can't be put back as it was: {why}")))
            }
        }
    }

    /// Asks it to go down with its own stop signal. Not the engine's `stop`, which kills by itself after a time of its own;
    /// and the stop signal keeps restart policies from starting it again, as `stop` does (moby's daemon/kill.go,
    /// docker-kill(1)).
    async fn shut_down(&self, target: &Ref, found: &ContainerInspectResponse) -> Result<(), BackendError> {
        if view::state(found) == State::Paused {
            return Err(BackendError::InvalidState(format!(
                "{target} is paused and can't be asked to stop: docker would let it run on for that"
            )));
        }
        let signal = found.config.as_ref().and_then(|config| config.stop_signal.as_deref()).unwrap_or_default();
        let signal = if signal.is_empty() { DEFAULT_STOP_SIGNAL } else { signal };
        self.send(view::id(found), signal).await
    }

    /// Sends a signal that is to bring it down; one that went down in between needs none.
    async fn send(&self, id: &str, signal: &str) -> Result<(), BackendError> {
        match self.client.signal(id, signal).await {
            Err(BackendError::InvalidState(words)) if words.contains("is not running") => Ok(()),
            result => result,
        }
    }
}

#[async_trait]
impl Backend for Docker {
    fn kind(&self) -> Kind {
        Kind::Container
    }

    fn name(&self) -> String {
        format!("docker {}", self.client.socket().display())
    }

    async fn health(&self) -> Result<String, BackendError> {
        let version = self.client.version().await?;
        // The engine may have been restarted on a host that has other CPUs online by now.
        self.ask_host_cpus().await;
        let text = |value: Option<String>| value.unwrap_or_else(|| "unknown".into());
        Ok(format!("docker {} (API {})", text(version.version), text(version.api_version)))
    }

    async fn list(&self) -> Result<Vec<Observed>, BackendError> {
        let summaries = self.client.list().await?;
        self.host_cpus().await;
        let listed: HashSet<&str> = summaries.iter().filter_map(|summary| summary.id.as_deref()).collect();
        self.looked().retain(|id, _| listed.contains(id.as_str()));
        let described = futures_util::stream::iter(summaries)
            .map(|summary| self.describe_listed(summary))
            .buffer_unordered(INSPECTED_AT_ONCE)
            .filter_map(std::future::ready);
        Ok(described.collect().await)
    }

    async fn stirred(&self) -> Result<Vec<String>, BackendError> {
        let (begun, now) = (Instant::now(), now());
        let since = {
            let told = self.told();
            // A clock that was set back tells nothing.
            let serves = told.at.is_some_and(|at| at.elapsed() < LIST_SERVES) && told.until <= now;
            serves.then_some(told.until)
        };
        if let Some(since) = since {
            let happened = self.client.happened(since, now).await?;
            self.told().until = now;
            return Ok(happened);
        }
        let told = |summary: ContainerSummary| {
            let state = summary.state.map(|state| state.to_string());
            Some((summary.id?, (summary.names, state)))
        };
        let listed: BTreeMap<_, _> = self.client.list().await?.into_iter().filter_map(told).collect();
        self.looked().retain(|id, _| listed.contains_key(id));
        let mut told = self.told();
        (told.at, told.until) = (Some(begun), now);
        Ok(differing(&mut told.listed, listed))
    }

    async fn observe(&self, name: &str, _look: Look) -> Result<Observed, BackendError> {
        let begun = Instant::now();
        let inspected = self.find(name).await?;
        self.describe(&inspected, begun).await
    }

    async fn counters(&self, observed: &Observed) -> Result<Counters, BackendError> {
        let gone = || BackendError::NotFound(format!("{} has no cgroup by now", observed.reference));
        let pid = self.looked().get(&observed.id).map(|looked| looked.pid).ok_or_else(gone)?;
        let (host, id) = (Arc::clone(&self.host), observed.id.clone());
        let counted = tokio::task::spawn_blocking(move || host.counters(pid, &id)).await;
        counted.ok().flatten().ok_or_else(gone)
    }

    async fn is_under_way(&self, identity: &Identity) -> bool {
        self.client.is_changing(&identity.id)
    }

    async fn watch(&self, notices: mpsc::Sender<Notice>) -> BackendError {
        let began = now();
        let mut events = match self.client.events(began, None) {
            Ok(events) => Box::pin(events),
            Err(error) => return error,
        };
        // What happened before is not announced. Nobody listens any more when the daemon ends.
        let _ = notices.send(Notice::All).await;
        loop {
            match events.next().await {
                Some(Ok(id)) => drop(notices.send(Notice::Instance(id)).await),
                Some(Err(error)) => return error,
                None => return self.client.hung_up(),
            }
        }
    }

    async fn logs(&self, target: &Ref, identity: &Identity, ask: &LogAsk) -> Result<LogFrames, BackendError> {
        let found = self.find_same(target, identity).await?;
        logs::read(&self.client, target, &found, ask).await
    }

    async fn apply(&self, target: &Ref, identity: &Identity, action: &Action) -> Result<(), BackendError> {
        if let Action::Set { scope, values } = action
            && let Some((pid, now)) = self.just_seen(identity)
            && self.host.has(pid, &identity.id)
        {
            check_scope(target, *scope)?;
            return self.update(target, &identity.id, now.set(values)).await;
        }
        let found = self.find_same(target, identity).await?;
        let now = view::native(&found);
        match action {
            Action::Set { scope, values } => {
                check_boot(target, identity, view::boot(&found))?;
                check_scope(target, *scope)?;
                self.update(target, &identity.id, now.set(values)).await
            }
            Action::Restore { scope, values, native, .. } => {
                check_boot(target, identity, view::boot(&found))?;
                check_scope(target, *scope)?;
                let before: Native = serde_json::from_value(native.clone()).map_err(|error| {
                    BackendError::Failed(format!(
                        "{target} can't be put back as it was: its record is unreadable: {error}"
                    ))
                })?;
                self.update(target, &identity.id, now.restore(&before, values)).await
            }
            Action::Define { .. } => Err(BackendError::Unsupported(format!("{target} has no definition"))),
            Action::Start | Action::Boot { .. } => self.client.start(&identity.id).await,
            Action::Shutdown | Action::Kill if matches!(view::state(&found), State::Stopped | State::Crashed) => Ok(()),
            Action::Pause => {
                check_boot(target, identity, view::boot(&found))?;
                self.client.pause(&identity.id).await
            }
            Action::Unpause => {
                check_boot(target, identity, view::boot(&found))?;
                self.client.unpause(&identity.id).await
            }
            Action::Restart { .. } => {
                Err(BackendError::Unsupported(format!("{target} is stopped and started instead")))
            }
            Action::Shutdown => {
                check_boot(target, identity, view::boot(&found))?;
                self.shut_down(target, &found).await
            }
            Action::Kill => {
                check_boot(target, identity, view::boot(&found))?;
                self.send(&identity.id, "SIGKILL").await
            }
        }
    }
}

/// Whether a name that was asked for is this container's name, its full id, or enough of its id.
fn means(name: &str, found: &ContainerInspectResponse) -> bool {
    view::name(found) == name || (is_prefix(name) && view::id(found).starts_with(name))
}

fn is_prefix(name: &str) -> bool {
    name.len() >= SHORTEST_PREFIX && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// One update changes what runs and what is kept; nothing does only one of them.
fn check_scope(target: &Ref, scope: Scope) -> Result<(), BackendError> {
    match scope {
        Scope::Both => Ok(()),
        Scope::Live | Scope::Saved => Err(BackendError::Unsupported(format!(
            "{target} keeps one set of limits: what runs and what is saved can't differ"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "c60e8af7eff2d8e6ad101151c6d4ed02505b278dceac08e04253641bc5ce5078";

    fn web() -> ContainerInspectResponse {
        ContainerInspectResponse { id: Some(ID.into()), name: Some("/web".into()), ..Default::default() }
    }

    #[test]
    fn a_look_serves_one_change_of_the_run_that_it_saw_and_not_for_long() {
        let docker = Docker::new("/nonexistent".into());
        let run = |boot: Option<&str>| Identity { id: ID.into(), boot: boot.map(Into::into) };
        let look = |at: Instant| {
            let native = Native { memory: 1 << 30, ..Native::default() };
            docker.looked().insert(ID.into(), Looked { at, boot: Some("1".into()), pid: 1, native });
        };
        assert_eq!(docker.just_seen(&run(Some("1"))), None, "nobody looked");
        let now = Instant::now();
        look(now);
        assert_eq!(docker.just_seen(&run(Some("1"))).map(|(_, native)| native.memory), Some(1 << 30));
        assert_eq!(docker.just_seen(&run(Some("1"))), None, "it has changed since");
        assert_eq!(docker.just_seen(&run(None)), None);
        for other in [run(Some("2")), run(None)] {
            look(now);
            assert_eq!(docker.just_seen(&other), None);
        }
        look(now.checked_sub(LOOK_SERVES).unwrap());
        assert_eq!(docker.just_seen(&run(Some("1"))), None, "too long ago");
    }

    #[test]
    fn a_name_an_id_and_six_characters_of_it_mean_a_container_and_fewer_do_not() {
        for name in ["web", ID, &ID[..12], &ID[..6]] {
            assert!(means(name, &web()), "{name}");
        }
        for name in ["we", "c", &ID[..5], "other", "c60e8b", &ID[1..]] {
            assert!(!means(name, &web()), "{name}");
        }
    }

    #[test]
    fn a_short_name_of_hexadecimal_digits_is_still_a_name() {
        let found = ContainerInspectResponse { name: Some("/db".into()), ..web() };
        assert!(means("db", &found));
    }

    #[tokio::test]
    async fn names_that_could_be_paths_never_reach_the_socket() {
        let docker = Docker::new("/nowhere/docker.sock".into());
        for name in ["", "../info", "a/b", "a?all=1", "a#b", "a b", "-x", "%2e%2e", "."] {
            assert!(matches!(docker.observe(name, Look::Plain).await, Err(BackendError::NotFound(_))), "{name:?}");
        }
        assert!(matches!(docker.observe("web", Look::Plain).await, Err(BackendError::Unavailable(_))));
    }

    #[tokio::test]
    async fn the_engine_may_be_down_when_agentd_starts() {
        let docker = Docker::new("/nowhere/docker.sock".into());
        assert!(matches!(docker.health().await, Err(BackendError::Unavailable(_))));
        assert!(matches!(docker.list().await, Err(BackendError::Unavailable(_))));
    }
}
