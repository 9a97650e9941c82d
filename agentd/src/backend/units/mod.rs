//! Units: systemd's services, scopes and slices that the config allows, changed by systemd itself and never by writing its
//! files; and the cgroups that the config gives a name, which nobody else manages. The only module that knows properties of
//! systemd and the files of a cgroup that are written.
//!
//! ```text
//!   bus     systemd's manager over D-Bus         files   what a unit's files say: what it has after the next boot
//!   named   the cgroups of [units.cgroups]       view    properties, files and cgroup, as an observation
//!   journal a unit's messages
//! ```

mod bus;
mod files;
#[cfg(feature = "fake")]
pub(super) mod fuzzing;
mod journal;
mod named;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};

use agentd_core::config;
use agentd_core::instance::{Covered, Kind, Observed, Ref, State};
use agentd_core::operation::Identity;
use agentd_core::plan::{Action, Scope, Values};
use agentd_core::units::Limit;
use agentd_core::usage::Counters;
use async_trait::async_trait;
use futures_util::StreamExt;
use tokio::sync::mpsc;

use self::bus::{Bus, Setting};
use self::view::{Native, Unit};
use super::{Backend, BackendError, LogAsk, LogFrames, Look, Notice, cgroup, check_boot};

/// How many units are asked about at once.
const ASKED_AT_ONCE: usize = 8;
/// Slices that hold VMs and containers, or everything.
const NEVER: [&str; 3] = ["-.slice", "system.slice", "machine.slice"];

/// The units and cgroups of this host.
#[derive(Debug)]
pub struct Units {
    config: RwLock<Arc<config::Units>>,
    bus: Bus,
    host: Arc<cgroup::Host>,
}

impl Units {
    /// Connects to nothing yet. `bus` is an address of D-Bus; the system's own where there is none.
    pub fn new(config: config::Units, bus: Option<String>) -> Self {
        Units { config: RwLock::new(Arc::new(config)), bus: Bus::new(bus), host: Arc::new(cgroup::Host::new()) }
    }

    /// Takes another config: what is allowed from now on.
    pub fn allow(&self, config: config::Units) {
        *self.config.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
    }

    fn config(&self) -> Arc<config::Units> {
        Arc::clone(&self.config.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A unit that may be seen here, as systemd has it.
    async fn find(&self, name: &str) -> Result<Unit, BackendError> {
        let unknown =
            || BackendError::NotFound(format!("there is no unit {name:?} among those that the config allows"));
        if !may_be(name, &self.config()) {
            return Err(unknown());
        }
        let unit = Unit::of(self.bus.properties(name).await?);
        // A name may be an alias of something that isn't allowed.
        if unit.load == "not-found" || !may_be(&unit.id, &self.config()) || self.holds_others(&unit) {
            return Err(unknown());
        }
        Ok(unit)
    }

    /// Whether VMs or containers are in it: their engines' limits are theirs.
    fn holds_others(&self, unit: &Unit) -> bool {
        unit.section() == Some("Slice") && !unit.cgroup.is_empty() && has_engines_scope(&self.host, &unit.cgroup)
    }

    /// What of a unit an outer one is charged for.
    async fn covered(&self, slices: Vec<String>) -> Result<BTreeMap<String, Covered>, BackendError> {
        let mut covered = BTreeMap::new();
        for slice in slices {
            match self.find(&slice).await {
                Ok(outer) => drop(covered.insert(outer.id.clone(), outer.limits())),
                Err(BackendError::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(covered)
    }

    async fn describe(&self, unit: Unit) -> Result<Observed, BackendError> {
        let covered = self.covered(unit.slices()).await?;
        let host = Arc::clone(&self.host);
        let look = move || {
            let saved = files::read(unit.section().unwrap_or_default(), &unit.fragment, &unit.drop_ins, host_memory());
            let seen = Some(unit.cgroup.as_str()).filter(|path| !path.is_empty()).and_then(|path| host.look_at(path));
            let mut observed = view::observed(&unit, saved, seen, &covered)?;
            keep_awake(&mut observed, &unit.cgroup);
            Ok(observed)
        };
        let broken = |_| BackendError::Failed("a look at a unit broke off".into());
        tokio::task::spawn_blocking(look).await.map_err(broken)?
    }

    /// One of a list: `None` where it is none that can be shown.
    async fn describe_listed(&self, name: String) -> Option<Result<Observed, BackendError>> {
        match self.find(&name).await {
            Ok(unit) => Some(self.describe(unit).await),
            Err(BackendError::NotFound(_)) => None,
            Err(error) => Some(Err(error)),
        }
    }

    async fn named(&self, name: &str, path: &str) -> Result<Observed, BackendError> {
        let outer = path.split('/').filter(|part| !part.is_empty() && may_be(part, &self.config()));
        let mut covered = self.covered(outer.map(ToOwned::to_owned).collect()).await?;
        for (other, above) in &self.config().cgroups {
            let within = path.strip_prefix(above.as_str()).is_some_and(|rest| rest.starts_with('/'));
            if let Some(seen) = self.host.look_at(above).filter(|_| within) {
                let (cpus, memory) = (seen.cpus.and_then(Limit::at), seen.memory.and_then(Limit::at));
                covered.insert(other.clone(), Covered { cpus: cpus.is_some(), memory: memory.is_some() });
            }
        }
        let mut observed = named::observed(&self.host, name, path, &covered)?;
        keep_awake(&mut observed, path);
        Ok(observed)
    }

    async fn set(&self, unit: &Unit, scope: Scope, settings: &[Setting]) -> Result<(), BackendError> {
        if settings.is_empty() {
            return Ok(());
        }
        self.bus.set(&unit.id, settings, scope == Scope::Live).await
    }

    /// Puts back what was there: what is saved first, since that is set on what runs at once.
    async fn restore(
        &self,
        unit: &Unit,
        scope: Scope,
        values: &Values,
        native: &serde_json::Value,
    ) -> Result<(), BackendError> {
        let unreadable = |why: String| BackendError::Failed(format!("unit/{} can't be put back: {why}", unit.id));
        let before: Native = serde_json::from_value(native.clone())
            .map_err(|error| unreadable(format!("its record is unreadable: {error}")))?;
        let settings = |saved| {
            let unknown = || unreadable("what its files said before is unknown".into());
            before.settings(values, saved).ok_or_else(unknown)
        };
        if scope != Scope::Live {
            let saved = settings(true)?;
            self.set(unit, Scope::Both, &saved).await?;
            if !unit.state().is_up() || settings(false)? == saved {
                return Ok(());
            }
        }
        self.set(unit, Scope::Live, &settings(false)?).await
    }
}

/// A glob of the config as systemd takes them, which has no braces: with something in their place that lets more pass.
fn fnmatch(glob: &str) -> String {
    glob.split_once('{').map_or_else(|| glob.to_owned(), |(before, _)| format!("{before}*"))
}

/// Whether a unit of this name may be seen and changed: one that the config allows, and no engine's.
fn may_be(name: &str, config: &config::Units) -> bool {
    let plain = Ref::new(Kind::Unit, name).is_ok() && view::section(name).is_some();
    // A template has no cgroup; its instances do.
    let template = name.rsplit_once('.').is_some_and(|(stem, _)| stem.ends_with('@'));
    plain && !template && !NEVER.contains(&name) && !is_engines(name) && config.allows(name)
}

/// Whether libvirt or Docker made a scope of this name.
fn is_engines(name: &str) -> bool {
    let Some(stem) = name.strip_suffix(".scope") else { return false };
    let container =
        stem.strip_prefix("docker-").is_some_and(|id| id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()));
    container || stem.starts_with("machine-qemu") || stem.starts_with("machine-lxc")
}

/// Whether an engine's scope is in this cgroup or in a slice below it.
fn has_engines_scope(host: &cgroup::Host, path: &str) -> bool {
    host.names_below(path).iter().any(|name| {
        is_engines(name) || (name.ends_with(".slice") && has_engines_scope(host, &format!("{path}/{name}")))
    })
}

/// What agentd itself runs in, or asks systemd by, can't be paused: nothing could ever resume it.
fn keep_awake(observed: &mut Observed, path: &str) {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().filter_map(|line| line.splitn(3, ':').nth(2));
    if !path.is_empty() && own.into_iter().any(|own| within(own, path)) {
        observed.barred.pause = Some("agentd itself runs in it, and could not resume it".into());
    } else if matches!(observed.reference.name(), "dbus.service" | "dbus-broker.service") {
        observed.barred.pause = Some("agentd asks systemd by way of it, and could not resume it".into());
    }
}

/// Whether a cgroup is this one, or below it.
fn within(path: &str, outer: &str) -> bool {
    path.strip_prefix(outer.trim_end_matches('/')).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The host's memory in bytes, which a share in a unit's file is of.
fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse().ok());
    kib.and_then(|kib: u64| kib.checked_mul(1024))
}

#[async_trait]
impl Backend for Units {
    fn kind(&self) -> Kind {
        Kind::Unit
    }

    fn name(&self) -> String {
        "systemd".into()
    }

    async fn health(&self) -> Result<String, BackendError> {
        let config = self.config();
        if config.allow.is_empty() {
            return Ok(format!("{} named cgroups, no unit allowed", config.cgroups.len()));
        }
        Ok(format!("systemd {}", self.bus.version().await?))
    }

    async fn list(&self) -> Result<Vec<Observed>, BackendError> {
        let config = self.config();
        let mut names = BTreeSet::new();
        // A config that allows none has no need of systemd.
        if !config.allow.is_empty() {
            let patterns: Vec<String> = config.allow.iter().map(|pattern| fnmatch(pattern.as_str())).collect();
            names.extend(self.bus.names(&patterns).await?.into_iter().filter(|name| may_be(name, &config)));
        }
        let described = futures_util::stream::iter(names).map(|name| self.describe_listed(name));
        let described = described.buffer_unordered(ASKED_AT_ONCE).filter_map(std::future::ready);
        let described: Vec<Result<Observed, BackendError>> = described.collect().await;
        // Two names of one unit are one.
        let mut listed: BTreeMap<String, Observed> = BTreeMap::new();
        for unit in described {
            match unit {
                Ok(unit) => drop(listed.insert(unit.id.clone(), unit)),
                Err(error @ BackendError::Unavailable(_)) => return Err(error),
                Err(error) => tracing::debug!(%error, "a unit can't be shown"),
            }
        }
        for (name, path) in &config.cgroups {
            let cgroup = self.named(name, path).await?;
            listed.insert(cgroup.id.clone(), cgroup);
        }
        Ok(listed.into_values().collect())
    }

    async fn observe(&self, name: &str, _look: Look) -> Result<Observed, BackendError> {
        let config = self.config();
        // A cgroup is known by its path, too.
        match config.cgroups.iter().find(|(known, path)| *known == name || *path == name) {
            Some((name, path)) => self.named(name, path).await,
            None => {
                let unit = self.find(name).await?;
                self.describe(unit).await
            }
        }
    }

    async fn logs(&self, target: &Ref, identity: &Identity, ask: &LogAsk) -> Result<LogFrames, BackendError> {
        if self.config().cgroups.values().any(|path| *path == identity.id) {
            let why = format!("{target} is a cgroup, and what is in it logs wherever it likes");
            return Err(BackendError::Unsupported(why));
        }
        let unit = self.find(&identity.id).await?;
        journal::read(journal::JOURNALCTL, &journal::FOLDERS, &unit.id, ask)
    }

    async fn counters(&self, observed: &Observed) -> Result<Counters, BackendError> {
        let path = match self.config().cgroups.values().find(|path| **path == observed.id) {
            Some(path) => path.clone(),
            None => self.find(&observed.id).await?.cgroup,
        };
        let host = Arc::clone(&self.host);
        // Without a process systemd keeps no cgroup, and an empty path would be the root's.
        let counted = move || if path.is_empty() { None } else { host.counters_at(&path) };
        let counted = tokio::task::spawn_blocking(counted).await.ok().flatten();
        counted.ok_or_else(|| BackendError::NotFound(format!("{} has no cgroup by now", observed.reference)))
    }

    async fn is_under_way(&self, identity: &Identity) -> bool {
        self.bus.is_changing(&identity.id)
    }

    async fn watch(&self, notices: mpsc::Sender<Notice>) -> BackendError {
        if self.config().allow.is_empty() {
            return std::future::pending().await;
        }
        self.bus.watch(&notices, |name| may_be(name, &self.config())).await
    }

    async fn apply(&self, target: &Ref, identity: &Identity, action: &Action) -> Result<(), BackendError> {
        let config = self.config();
        if let Some((_, path)) = config.cgroups.iter().find(|(_, path)| **path == identity.id) {
            let (host, path) = (Arc::clone(&self.host), path.clone());
            let (target, identity, action) = (target.clone(), identity.clone(), action.clone());
            let write = move || named::apply(&host, &target, &path, &identity, &action);
            let broken = |_| BackendError::Failed("a write to a cgroup broke off".into());
            return tokio::task::spawn_blocking(write).await.map_err(broken)?;
        }
        let unit = match self.find(&identity.id).await {
            // Nothing was asked for yet, so nothing is unknown.
            Err(BackendError::Timeout(why)) => {
                return Err(BackendError::Unavailable(format!("{why}; nothing was changed")));
            }
            found => found?,
        };
        let is_service = unit.section() == Some("Service");
        match action {
            Action::Set { scope, values } => {
                check_boot(target, identity, unit.boot())?;
                self.set(&unit, *scope, &view::settings(values)).await
            }
            Action::Restore { scope, values, native, .. } => {
                check_boot(target, identity, unit.boot())?;
                self.restore(&unit, *scope, values, native).await
            }
            Action::Start | Action::Boot { .. } if is_service => self.bus.start(&unit.id).await,
            Action::Shutdown | Action::Kill if matches!(unit.state(), State::Stopped | State::Crashed) => Ok(()),
            Action::Shutdown if is_service => {
                check_boot(target, identity, unit.boot())?;
                self.bus.stop(&unit.id).await
            }
            Action::Kill if is_service => {
                check_boot(target, identity, unit.boot())?;
                // What systemd is told to stop it doesn't start again.
                self.bus.stop(&unit.id).await?;
                self.bus.kill(&unit.id).await
            }
            Action::Restart { .. } if is_service => {
                check_boot(target, identity, unit.boot())?;
                self.bus.restart(&unit.id).await
            }
            Action::Pause => {
                check_boot(target, identity, unit.boot())?;
                self.bus.freeze(&unit.id).await
            }
            Action::Unpause => {
                check_boot(target, identity, unit.boot())?;
                self.bus.thaw(&unit.id).await
            }
            Action::Define { .. } => Err(BackendError::Unsupported(format!("{target} has no definition"))),
            Action::Start | Action::Boot { .. } | Action::Shutdown | Action::Kill | Action::Restart { .. } => Err(
                BackendError::Unsupported(format!("{target} is no service: it is neither started nor stopped here")),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use agentd_core::config::Config;

    use super::*;

    fn config(text: &str) -> config::Units {
        Config::parse("test", text).unwrap().units.unwrap()
    }

    #[test]
    fn only_what_the_config_allows_and_no_engine_owns_is_a_unit() {
        let all = config("[units]\nallow = [\"*\"]");
        let docker = format!("docker-{}.scope", "0a".repeat(32));
        for no in [
            docker.as_str(),
            "machine-qemu\\x2d1\\x2dweb.scope",
            "machine.slice",
            "system.slice",
            "-.slice",
            "getty@.service",
            "a.mount",
            "a",
            "a/b.service",
        ] {
            assert!(!may_be(no, &all), "{no}");
        }
        for yes in ["getty@tty1.service", "ci.slice", "docker-me.scope", "docker.service", "user.slice"] {
            assert!(may_be(yes, &all), "{yes}");
        }
        assert!(!may_be("other.service", &config("[units]\nallow = [\"batch-*.service\"]")));
        assert!(!may_be("a.service", &config("[units]")));
    }

    #[test]
    fn what_agentd_runs_in_is_told_from_its_neighbours() {
        for outer in ["/system.slice", "/system.slice/agentd.service", "/"] {
            assert!(within("/system.slice/agentd.service", outer), "{outer}");
        }
        for beside in ["/system", "/system.slice/agentd.service/below", "/system.slice/agent"] {
            assert!(!within("/system.slice/agentd.service", beside), "{beside}");
        }
    }

    #[test]
    fn systemd_is_asked_for_no_less_than_a_glob_means() {
        assert_eq!(fnmatch("batch-*.service"), "batch-*.service");
        assert_eq!(fnmatch("a{b,c}.service"), "a*");
    }

    #[tokio::test]
    async fn without_a_bus_units_are_unavailable_and_cgroups_are_not() {
        let nowhere = || Some("unix:path=/nonexistent/bus".to_owned());
        let units = Units::new(config("[units]\nallow = [\"*\"]"), nowhere());
        assert!(matches!(units.list().await, Err(BackendError::Unavailable(_))));
        assert!(matches!(units.observe("a.service", Look::Plain).await, Err(BackendError::Unavailable(_))));
        assert!(matches!(units.observe("../a.service", Look::Plain).await, Err(BackendError::NotFound(_))));
        let units = Units::new(config("[units]\n[units.cgroups]\nbatch = \"/agentd-nowhere\""), nowhere());
        let listed = units.list().await.unwrap();
        assert_eq!((listed.len(), listed[0].state, listed[0].id.as_str()), (1, State::Stopped, "/agentd-nowhere"));
        assert!(units.health().await.is_ok());
        let known: BTreeMap<_, _> =
            listed.into_iter().map(|unit| (unit.reference.to_string(), unit.unchangeable)).collect();
        assert!(known["unit/batch"].as_ref().unwrap().contains("no cgroup"));
        // Another config is in force at once.
        units.allow(config("[units]"));
        assert!(units.list().await.unwrap().is_empty());
    }
}
