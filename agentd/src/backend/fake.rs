//! A whole engine in memory, behind the same trait, with faults that can be switched on: the daemon runs complete without
//! a hypervisor, and every failure that a real engine can't be made to have can be had here. Compiled for tests only.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use agentd_core::error::Code;
use agentd_core::instance::{Ability, Barred, Covered, Demand, Kind, Observed, Reading, Ref, Saved, State, Usage};
use agentd_core::operation::Identity;
use agentd_core::plan::{Action, Headroom, Preparation, Redefinition, Scope, Values};
use agentd_core::units::{ByteCount, Cpus, Limit};
use agentd_core::usage::{Bandwidth, Counters};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, mpsc};

use super::{Backend, BackendError, Look, Notice};
use crate::clock;

/// What a faulty call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// Fails and does nothing.
    Fail,
    /// Fails after having done it.
    FailAfter,
    /// Reports success and does nothing.
    Lie,
    /// The engine is gone: nothing is done.
    Unavailable,
    /// The backend's code itself breaks.
    Panic,
    /// Does not return within the deadline; it is never done.
    Hang,
    /// Does not return within the deadline; it is done all the same.
    HangAfter,
    /// Does not return within the deadline; it is done when [`Fake::land`] says so, or after [`FakeSpec::late_ms`].
    HangLate,
    /// The guest takes its time: accepted, observed only when [`Fake::settle`] says so.
    GuestLate,
}

/// Which call is faulty: the `nth` apply (from 0) on the instance, counted over its life, undos included.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultAt {
    /// On which instance, `vm/web`.
    pub instance: Ref,
    /// On which of its applies.
    pub nth: usize,
    /// What happens there.
    pub fault: Fault,
}

/// One instance of the fake.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FakeInstance {
    /// Its name.
    pub name: String,
    /// vCPUs, live and saved.
    pub cpus: Cpus,
    /// Memory, live and saved.
    pub memory: ByteCount,
    /// The most vCPUs.
    pub max_cpus: Cpus,
    /// The most memory.
    pub max_memory: ByteCount,
    /// What is in use inside; unknown where absent.
    #[serde(default)]
    pub used: Option<ByteCount>,
    /// What is in use inside, told only to who waits for it.
    #[serde(default)]
    pub used_when_asked: Option<ByteCount>,
    /// CPUs that it uses all the time; nobody counts them where absent.
    #[serde(default)]
    pub burns: Option<Cpus>,
    /// A guest without a balloon driver.
    #[serde(default)]
    pub silent: bool,
    /// Whether it is down.
    #[serde(default)]
    pub stopped: bool,
    /// Its state, where it is neither running nor down.
    #[serde(default)]
    pub state: Option<State>,
    /// Goes down and comes up by itself, from one listing to the next.
    #[serde(default)]
    pub flaps: bool,
    /// Ignores a graceful stop.
    #[serde(default)]
    pub stubborn: bool,
    /// Is gone when it is down.
    #[serde(default)]
    pub transient: bool,
}

/// A fake engine as a file describes it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FakeSpec {
    /// The instances.
    pub instances: Vec<FakeInstance>,
    /// The faults.
    pub faults: Vec<FaultAt>,
    /// How long each apply takes, in milliseconds.
    pub delay_ms: u64,
    /// How long each listing takes, in milliseconds.
    pub list_ms: u64,
    /// Whether it can be followed: what stirs is told, and nothing need be listed for that.
    pub announces: bool,
    /// How many of the first questions about what stirs fail.
    pub mute: usize,
    /// How long after it was sent a call comes about that did not return in time, in milliseconds; also where the daemon has
    /// ended meanwhile.
    pub late_ms: Option<u64>,
    /// Where the instances are kept, so that they outlive the daemon as those of a real engine do.
    pub state: Option<PathBuf>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Machine {
    spec: FakeInstance,
    state: State,
    boot: u64,
    live: Held,
    observed: Held,
    saved: Held,
    applies: usize,
    blurred: bool,
    /// Calls that are on their way, each with the time at which it comes about.
    #[serde(default)]
    late: Vec<(u64, Identity, Action)>,
    /// How far its saved definition lets it grow, where that is something else than how far it can now.
    #[serde(default)]
    saved_most: Option<(Cpus, ByteCount)>,
}

impl Machine {
    fn saved_most(&self) -> (Cpus, ByteCount) {
        self.saved_most.unwrap_or((self.spec.max_cpus, self.spec.max_memory))
    }

    /// Another run, with what was saved.
    fn boot(&mut self) {
        self.boot += 1;
        (self.spec.max_cpus, self.spec.max_memory) = self.saved_most();
        self.saved_most = None;
        self.live = self.saved;
        self.observed = self.saved;
    }
}

/// What is told of an instance by one question about all.
type Told = (State, u64, Held);

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Held {
    cpus: Limit<Cpus>,
    cpu_limit: Limit<Cpus>,
    memory: Limit<ByteCount>,
}

impl Held {
    fn set(&mut self, values: &Values) {
        self.cpus = values.cpus.unwrap_or(self.cpus);
        self.cpu_limit = values.cpu_limit.unwrap_or(self.cpu_limit);
        self.memory = values.memory.unwrap_or(self.memory);
    }
}

/// The fake engine; it has VMs.
#[derive(Debug)]
pub struct Fake {
    machines: Mutex<BTreeMap<String, Machine>>,
    faults: Mutex<Vec<FaultAt>>,
    delay: Duration,
    list_delay: Duration,
    slow_look: Mutex<Option<Duration>>,
    state: Option<PathBuf>,
    /// Calls that did not return in time and come about later.
    late: Mutex<Vec<(Ref, Identity, Action)>>,
    /// How often each instance was started, asked to go down or switched off, by name.
    verbs: Mutex<BTreeMap<String, usize>>,
    /// Names of what was changed behind the daemon's back.
    announced: broadcast::Sender<String>,
    /// What was told of each instance when it was last asked what stirred, where it tells that.
    told: Option<Mutex<BTreeMap<String, Told>>>,
    /// How many more questions about that fail.
    mute: Mutex<usize>,
    late_after: Option<Duration>,
    /// When this life of the daemon began, in milliseconds since the Unix epoch.
    began_ms: u64,
    /// How long a hanging call keeps its caller before the deadline ends it.
    pub deadline: Duration,
}

impl Fake {
    /// A fake engine from its description.
    pub fn new(spec: FakeSpec) -> Self {
        let machine = |spec: FakeInstance| {
            let held = Held { cpus: Limit::At(spec.cpus), cpu_limit: Limit::Unlimited, memory: Limit::At(spec.memory) };
            let mut observed = held;
            if spec.silent {
                observed.memory = Limit::At(spec.max_memory);
            }
            let state = spec.state.unwrap_or(if spec.stopped { State::Stopped } else { State::Running });
            (
                spec.name.clone(),
                Machine {
                    spec,
                    state,
                    boot: 1,
                    live: held,
                    observed,
                    saved: held,
                    applies: 0,
                    blurred: false,
                    late: Vec::new(),
                    saved_most: None,
                },
            )
        };
        let kept = spec.state.as_ref().and_then(|path| std::fs::read(path).ok());
        let kept = kept.and_then(|text| serde_json::from_slice(&text).ok());
        Fake {
            machines: Mutex::new(kept.unwrap_or_else(|| spec.instances.into_iter().map(machine).collect())),
            state: spec.state,
            late: Mutex::default(),
            verbs: Mutex::default(),
            faults: Mutex::new(spec.faults),
            late_after: spec.late_ms.map(Duration::from_millis),
            began_ms: now_ms(),
            delay: Duration::from_millis(spec.delay_ms),
            list_delay: Duration::from_millis(spec.list_ms),
            slow_look: Mutex::default(),
            announced: broadcast::Sender::new(64),
            told: spec.announces.then(Mutex::default),
            mute: Mutex::new(spec.mute),
            deadline: Duration::from_millis(200),
        }
    }

    /// Lets every late guest obey.
    pub fn settle(&self) {
        for machine in self.machines().values_mut() {
            machine.observed = machine.live;
        }
    }

    /// Switches every fault off.
    pub fn calm(&self) {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Every instance as it is, whatever the daemon thinks.
    pub fn all(&self) -> Vec<Observed> {
        self.machines().values().filter_map(|machine| observe(machine, Look::Plain)).collect()
    }

    /// Cuts the host's power: calls that are under way go with it, and what ran comes back with what was saved.
    pub fn power_cut(&self) {
        self.late.lock().unwrap_or_else(PoisonError::into_inner).clear();
        for machine in self.machines().values_mut() {
            machine.boot();
        }
    }

    /// How often this instance was started, asked to go down or switched off.
    pub fn verbs(&self, name: &str) -> usize {
        self.verbs.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied().unwrap_or(0)
    }

    /// Changes what runs behind the daemon's back.
    pub fn meddle(&self, name: &str, values: &Values) {
        if let Some(machine) = self.machines().get_mut(name) {
            machine.live.set(values);
            machine.observed.set(values);
        }
        // Nobody need listen.
        let _ = self.announced.send(name.to_owned());
    }

    /// Changes what is saved behind the daemon's back, which nobody announces.
    pub fn meddle_saved(&self, name: &str, values: &Values) {
        if let Some(machine) = self.machines().get_mut(name) {
            machine.saved.set(values);
        }
    }

    /// Lets a call come about that did not return in time; whether there was one.
    pub fn land(&self) -> bool {
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        if late.is_empty() {
            return false;
        }
        let (target, identity, action) = late.remove(0);
        // It may fit what is there no more, as with a real engine.
        let _ = self.act(&target, &identity, &action, false);
        true
    }

    /// Stops and starts an instance behind the daemon's back.
    pub fn restart(&self, name: &str) {
        if let Some(machine) = self.machines().get_mut(name) {
            machine.boot();
        }
        let _ = self.announced.send(name.to_owned());
    }

    /// An instance goes down by itself.
    pub fn go_down(&self, name: &str) {
        self.go(name, State::Stopped);
    }

    /// An instance goes into this state, whoever has brought it there.
    pub fn go(&self, name: &str, state: State) {
        if let Some(machine) = self.machines().get_mut(name) {
            machine.state = state;
        }
    }

    /// An instance is undefined behind the daemon's back.
    pub fn remove(&self, name: &str) {
        self.machines().remove(name);
        let _ = self.announced.send(name.to_owned());
    }

    /// The next look takes this long to come back with what it saw when it began.
    pub fn slow_next_look(&self, time: Duration) {
        *self.slow_look.lock().unwrap_or_else(PoisonError::into_inner) = Some(time);
    }

    /// From now on an instance is there and can't be read, or can again.
    pub fn blur(&self, name: &str, blurred: bool) {
        if let Some(machine) = self.machines().get_mut(name) {
            machine.blurred = blurred;
        }
    }

    fn machines(&self) -> MutexGuard<'_, BTreeMap<String, Machine>> {
        let mut machines = self.machines.lock().unwrap_or_else(PoisonError::into_inner);
        let due = |machine: &Machine| machine.late.first().is_some_and(|(due, ..)| *due <= now_ms());
        while let Some(machine) = machines.values_mut().find(|machine| due(machine)) {
            let (_, identity, action) = machine.late.remove(0);
            let name = machine.spec.name.clone();
            // It may fit what is there no more, as with a real engine.
            let _ = self.act_on(&mut machines, &name, &identity, &action, false);
        }
        machines
    }

    fn late_ms(&self) -> u64 {
        self.late_after.map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX))
    }

    fn fault(&self, target: &Ref, nth: usize) -> Option<Fault> {
        let faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        faults.iter().find(|at| at.instance == *target && at.nth == nth).map(|at| at.fault)
    }

    fn keep(&self, machines: &BTreeMap<String, Machine>) {
        let Some(path) = &self.state else { return };
        let new = path.with_extension("new");
        let text = serde_json::to_vec(machines).unwrap_or_default();
        if std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, path)).is_err() {
            tracing::error!("the fake engine can't keep its instances");
        }
    }

    /// Does what an apply does, where its instance is the one that is meant. `late` keeps what is observed as it was.
    fn act(&self, target: &Ref, identity: &Identity, action: &Action, late: bool) -> Result<(), BackendError> {
        self.act_on(&mut self.machines(), target.name(), identity, action, late)
    }

    fn act_on(
        &self,
        machines: &mut BTreeMap<String, Machine>,
        name: &str,
        identity: &Identity,
        action: &Action,
        late: bool,
    ) -> Result<(), BackendError> {
        let machine = find(machines, name)?;
        if identity.id != id(&machine.spec.name) {
            return Err(BackendError::NotFound("another instance has that name now".into()));
        }
        match action {
            Action::Set { scope: Scope::Live, .. } | Action::Restore { scope: Scope::Live, .. }
                if identity.boot != Some(machine.boot.to_string()) =>
            {
                return Err(BackendError::NotFound("it was restarted meanwhile".into()));
            }
            Action::Set { scope, values } | Action::Restore { scope, values, .. } => {
                if *scope != Scope::Live {
                    machine.saved.set(values);
                }
                if *scope != Scope::Saved {
                    if !matches!(machine.state, State::Running | State::Paused) {
                        return Err(BackendError::InvalidState("it doesn't run".into()));
                    }
                    machine.live.set(values);
                    if !late {
                        let memory = machine.observed.memory;
                        machine.observed.set(values);
                        if machine.spec.silent {
                            machine.observed.memory = memory;
                        }
                    }
                }
            }
            Action::Define { definition, before, .. } => {
                let read = |value| serde_json::from_value::<Definition>(value).ok();
                match (read(definition.clone()), read(before.clone())) {
                    (Some(definition), Some(before)) if before == Definition::of(machine) => {
                        machine.saved_most = Some((definition.max_cpus, definition.max_memory));
                        machine.saved.memory = Limit::At(definition.memory);
                    }
                    _ => return Err(BackendError::InvalidState("its definition was changed meanwhile".into())),
                }
            }
            Action::Start | Action::Boot { .. } if !machine.state.is_up() => {
                machine.state = State::Running;
                machine.boot();
            }
            Action::Start | Action::Boot { .. } => return Err(BackendError::InvalidState("it runs already".into())),
            Action::Restart { .. } => {
                machine.state = State::Running;
                machine.boot();
            }
            Action::Pause if machine.state == State::Running => machine.state = State::Paused,
            Action::Unpause if machine.state == State::Paused => machine.state = State::Running,
            Action::Pause | Action::Unpause => {
                return Err(BackendError::InvalidState(format!("it is {}", machine.state)));
            }
            Action::Shutdown if machine.spec.stubborn => {}
            Action::Shutdown | Action::Kill if machine.spec.transient => {
                machines.remove(name);
            }
            Action::Shutdown | Action::Kill => machine.state = State::Stopped,
        }
        self.keep(machines);
        Ok(())
    }
}

/// The definition of a VM of the fake.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Definition {
    max_cpus: Cpus,
    max_memory: ByteCount,
    memory: ByteCount,
}

impl Definition {
    fn of(machine: &Machine) -> Self {
        let (max_cpus, max_memory) = machine.saved_most();
        Definition { max_cpus, max_memory, memory: machine.saved.memory.at().unwrap_or(max_memory) }
    }

    fn headroom(self) -> Headroom {
        Headroom { cpus: Some(self.max_cpus), memory: Some(self.max_memory), boots_with: None }
    }
}

fn now_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

fn id(name: &str) -> String {
    format!("fake-{name}")
}

fn find<'a>(machines: &'a mut BTreeMap<String, Machine>, name: &str) -> Result<&'a mut Machine, BackendError> {
    let name = name.strip_prefix("fake-").unwrap_or(name);
    machines.get_mut(name).ok_or_else(|| BackendError::NotFound(format!("there is no vm/{name}")))
}

fn observe(machine: &Machine, look: Look) -> Option<Observed> {
    if machine.blurred {
        return blurred(machine);
    }
    let up = machine.state.is_up();
    let spec = &machine.spec;
    let unlimit = Ability::No(Code::InvalidRequest, "a VM has a number of them".into());
    let reading = |live: Limit<Cpus>, seen: Limit<Cpus>, saved: Limit<Cpus>| Reading {
        accepted: up.then_some(live),
        observed: up.then_some(seen),
        confirmed: None,
        persistent: Some(saved),
        ceiling: None,
        saved_ceiling: None,
        floor: None,
        grain: Cpus::from_millis(1),
        least: Cpus::from_millis(10),
        live: Ability::Yes,
        unlimit: Ability::Yes,
    };
    Some(Observed {
        reference: Ref::new(Kind::Vm, &spec.name).ok()?,
        id: id(&spec.name),
        boot: up.then(|| machine.boot.to_string()),
        state: machine.state,
        saved: Saved::Apart,
        cpus: Reading {
            ceiling: Some(spec.max_cpus),
            saved_ceiling: Some(machine.saved_most().0),
            grain: Cpus::whole(1),
            least: Cpus::whole(1),
            unlimit: unlimit.clone(),
            ..reading(machine.live.cpus, machine.observed.cpus, machine.saved.cpus)
        },
        cpu_limit: reading(machine.live.cpu_limit, machine.observed.cpu_limit, machine.saved.cpu_limit),
        memory: Reading {
            accepted: up.then_some(machine.live.memory),
            observed: up.then_some(machine.observed.memory),
            confirmed: (up && !spec.silent).then_some(machine.observed.memory),
            persistent: Some(machine.saved.memory),
            ceiling: Some(spec.max_memory),
            saved_ceiling: Some(machine.saved_most().1),
            floor: None,
            grain: ByteCount::mib(1),
            least: ByteCount::mib(1),
            live: Ability::Yes,
            unlimit,
        },
        used: match (spec.used, look) {
            _ if spec.silent => Usage::Silent,
            (Some(used), _) => Usage::Known(used),
            (None, Look::Usage(_)) => spec.used_when_asked.map_or(Usage::Unknown, Usage::Known),
            (None, Look::Plain | Look::Back) => Usage::Unknown,
        },
        demand: Demand { cpus: Some(machine.saved.cpus), memory: Some(machine.saved.memory) },
        covered: Covered::default(),
        barred: Barred { restart: spec.transient.then(|| "it is gone once it is down".into()), ..Barred::default() },
        parts: None,
        saved_parts: None,
        labels: BTreeMap::new(),
        notes: Vec::new(),
        switched_off: false,
        unchangeable: None,
        native: serde_json::Value::Null,
    })
}

/// What a real engine shows of an instance that it lists and can't describe.
fn blurred(machine: &Machine) -> Option<Observed> {
    let sharp = observe(&Machine { blurred: false, ..machine.clone() }, Look::Plain)?;
    let why = "it can't be read";
    Some(Observed {
        boot: None,
        state: State::Unknown,
        cpus: Reading::absent(sharp.cpus.grain, why),
        cpu_limit: Reading::absent(sharp.cpu_limit.grain, why),
        memory: Reading::absent(sharp.memory.grain, why),
        used: Usage::Unknown,
        demand: Demand { cpus: None, memory: None },
        ..sharp
    })
}

#[async_trait]
impl Backend for Fake {
    fn kind(&self) -> Kind {
        Kind::Vm
    }

    fn name(&self) -> String {
        "the fake engine".into()
    }

    async fn health(&self) -> Result<String, BackendError> {
        Ok("fake".into())
    }

    async fn list(&self) -> Result<Vec<Observed>, BackendError> {
        if self.list_delay > Duration::ZERO {
            tokio::time::sleep(self.list_delay).await;
        }
        let mut machines = self.machines();
        for machine in machines.values_mut().filter(|machine| machine.spec.flaps) {
            machine.state = if machine.state.is_up() { State::Stopped } else { State::Running };
        }
        Ok(machines.values().filter_map(|machine| observe(machine, Look::Plain)).collect())
    }

    async fn stirred(&self) -> Result<Vec<String>, BackendError> {
        let Some(told) = &self.told else { return Err(BackendError::Unsupported("only a listing tells".into())) };
        let mute = {
            let mut left = self.mute.lock().unwrap_or_else(PoisonError::into_inner);
            let mute = *left > 0;
            *left = left.saturating_sub(1);
            mute
        };
        if mute {
            return Err(BackendError::Unavailable("the fake engine is mute".into()));
        }
        let now: BTreeMap<String, Told> = self
            .machines()
            .values()
            .map(|machine| (id(&machine.spec.name), (machine.state, machine.boot, machine.live)))
            .collect();
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(super::differing(&mut told, now))
    }

    async fn observe(&self, name: &str, look: Look) -> Result<Observed, BackendError> {
        let seen = {
            let mut machines = self.machines();
            observe(find(&mut machines, name)?, look)
        };
        let slow = self.slow_look.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(time) = slow {
            tokio::time::sleep(time).await;
        }
        seen.ok_or_else(|| BackendError::NotFound(format!("there is no vm/{name}")))
    }

    async fn counters(&self, observed: &Observed) -> Result<Counters, BackendError> {
        let mut machines = self.machines();
        let machine = find(&mut machines, observed.reference.name())?;
        let at_usec = clock::monotonic_usec();
        // The kernel gives it no more than its limit, and what it would have burned beyond that it was held back.
        let (wants, limit) = (machine.spec.burns, machine.live.cpu_limit.at());
        let gets = wants.map(|wants| limit.map_or(wants, |limit| limit.min(wants)));
        Ok(Counters {
            at_usec,
            cpu_usec: gets.map(|cpus| at_usec * cpus.millis() / 1000),
            bandwidth: limit.map(|_| {
                let periods = at_usec / 100_000;
                let throttled = if gets == wants { 0 } else { periods };
                Bandwidth { periods, throttled, throttled_usec: throttled * 10_000 }
            }),
            host_memory: machine.observed.memory.at(),
            oom_kills: Some(0),
            pressure: None,
        })
    }

    async fn is_under_way(&self, identity: &Identity) -> bool {
        // Of those that an earlier life sent nobody here knows.
        let mine = |machine: &Machine| machine.late.iter().any(|(due, ..)| *due > self.began_ms + self.late_ms());
        self.machines().values().any(|machine| id(&machine.spec.name) == identity.id && mine(machine))
            || self.late.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|(_, of, _)| of.id == identity.id)
    }

    async fn redefine(
        &self,
        target: &Ref,
        _identity: &Identity,
        redefinition: &Redefinition,
    ) -> Result<Preparation, BackendError> {
        let old = Definition::of(find(&mut self.machines(), target.name())?);
        let mut new = old;
        match redefinition {
            Redefinition::Headroom(most) => {
                new.max_cpus = most.cpus.unwrap_or(old.max_cpus).max(old.max_cpus);
                new.max_memory = most.memory.unwrap_or(old.max_memory).max(old.max_memory);
            }
            Redefinition::Boot { cpus, memory } => {
                new.max_cpus = cpus.unwrap_or(old.max_cpus).max(old.max_cpus);
                (new.max_memory, new.memory) = memory.map_or((old.max_memory, old.memory), |memory| (memory, memory));
            }
        }
        let value = |definition: Definition| {
            serde_json::to_value(definition).map_err(|error| BackendError::Failed(error.to_string()))
        };
        let changes = if new == old { Vec::new() } else { vec!["its definition".into()] };
        let (of, before, after) = (*redefinition, old.headroom(), new.headroom());
        Ok(Preparation { of, before, after, changes, notes: Vec::new(), old: value(old)?, new: value(new)? })
    }

    async fn apply(&self, target: &Ref, identity: &Identity, action: &Action) -> Result<(), BackendError> {
        if action.starts() || matches!(action, Action::Shutdown | Action::Kill) {
            let mut verbs = self.verbs.lock().unwrap_or_else(PoisonError::into_inner);
            *verbs.entry(target.name().to_owned()).or_default() += 1;
        }
        let nth = {
            let mut machines = self.machines();
            let machine = find(&mut machines, target.name())?;
            let nth = machine.applies;
            machine.applies += 1;
            self.keep(&machines);
            nth
        };
        if self.delay > Duration::ZERO {
            tokio::time::sleep(self.delay).await;
        }
        let failed = || BackendError::Failed("the fake engine was told to fail".into());
        let hung = || BackendError::Timeout("the fake engine did not answer in time".into());
        match self.fault(target, nth) {
            None => self.act(target, identity, action, false),
            Some(Fault::Fail) => Err(failed()),
            Some(Fault::FailAfter) => self.act(target, identity, action, false).and_then(|()| Err(failed())),
            Some(Fault::Lie) => Ok(()),
            Some(Fault::Panic) => panic!("the fake engine was told to break"),
            Some(Fault::Unavailable) => Err(BackendError::Unavailable("the fake engine is gone".into())),
            Some(Fault::GuestLate) => self.act(target, identity, action, true),
            Some(fault @ (Fault::Hang | Fault::HangAfter | Fault::HangLate)) => {
                if fault == Fault::HangLate && self.late_after.is_some() {
                    let mut machines = self.machines();
                    let call = (now_ms() + self.late_ms(), identity.clone(), action.clone());
                    find(&mut machines, target.name())?.late.push(call);
                    self.keep(&machines);
                } else if fault == Fault::HangLate {
                    let call = (target.clone(), identity.clone(), action.clone());
                    self.late.lock().unwrap_or_else(PoisonError::into_inner).push(call);
                }
                tokio::time::sleep(self.deadline).await;
                if fault == Fault::HangAfter {
                    self.act(target, identity, action, false)?;
                }
                Err(hung())
            }
        }
    }

    async fn watch(&self, notices: mpsc::Sender<Notice>) -> BackendError {
        let mut announced = self.announced.subscribe();
        let _ = notices.send(Notice::All).await;
        loop {
            let notice = match announced.recv().await {
                Ok(name) => Notice::Instance(name),
                Err(broadcast::error::RecvError::Lagged(_)) => Notice::All,
                Err(broadcast::error::RecvError::Closed) => return BackendError::Unavailable("it is gone".into()),
            };
            let _ = notices.send(notice).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_changed_behind_the_daemons_back_is_announced() {
        let fake = Fake::new(FakeSpec::default());
        let (send, mut notices) = mpsc::channel(8);
        let story = async {
            assert_eq!(notices.recv().await, Some(Notice::All));
            fake.meddle("web", &Values::default());
            assert_eq!(notices.recv().await, Some(Notice::Instance("web".into())));
        };
        tokio::select! {
            () = story => {}
            error = fake.watch(send) => panic!("{error}"),
        }
    }
}
