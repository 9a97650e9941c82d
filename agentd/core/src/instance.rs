//! What an instance is and what was seen of it: references, states and the observation that a backend hands over.
//! Knows nothing of where an observation comes from; a backend's native values travel through here unread.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Code, Problem};
use crate::units::{ByteCount, Cpus, Limit, Quantity};

/// The kinds of instances, one backend each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A libvirt domain.
    Vm,
    /// A Docker container.
    Container,
    /// A systemd unit, or a cgroup that the config gives a name.
    Unit,
}

impl Kind {
    /// Every kind, in the order in which lists show them.
    pub const ALL: [Kind; 3] = [Kind::Vm, Kind::Container, Kind::Unit];

    /// The name on the wire and on the command line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Vm => "vm",
            Kind::Container => "container",
            Kind::Unit => "unit",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        Kind::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or_else(|| {
            Problem::new(Code::InvalidRequest, format!("{:?} is not a kind of instance", clip(text)))
                .hint("kinds are vm, container and unit")
        })
    }
}

/// The longest name in bytes; Linux file names, and so libvirt's domain names, end there.
pub const LONGEST_NAME: usize = 255;

/// A kind and a name that fits the kind's grammar: `vm/web`, `container/db`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ref {
    kind: Kind,
    /// `vm/web`, whole: the form that patterns, logs and the wire use.
    text: String,
}

impl Ref {
    /// Checks the name against the kind's grammar.
    pub fn new(kind: Kind, name: &str) -> Result<Self, Problem> {
        check_name(name)?;
        let fits = match kind {
            // libvirt forbids `/` and control characters only; the rest is data.
            Kind::Vm => true,
            // moby's RestrictedNamePattern; also what keeps a name one path segment of Docker's API.
            Kind::Container => {
                name.starts_with(|c: char| c.is_ascii_alphanumeric())
                    && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
            }
            // systemd.unit(5): letters, digits, and ":-_.\@".
            Kind::Unit => name.chars().all(|c| c.is_ascii_alphanumeric() || ":-_.\\@".contains(c)),
        };
        if fits {
            Ok(Ref { kind, text: format!("{kind}/{name}") })
        } else {
            Err(Problem::new(Code::InvalidRequest, format!("{:?} can't be the name of a {kind}", clip(name)))
                .hint("use the name or id that `ctl list` shows"))
        }
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The name without the kind.
    pub fn name(&self) -> &str {
        &self.text[self.kind.as_str().len() + 1..]
    }

    /// Whether it is a unit that is none of systemd's: a cgroup that the config gives a name, which has no unit's suffix.
    pub fn is_cgroup(&self) -> bool {
        let suffixed = [".service", ".scope", ".slice"].iter().any(|suffix| self.text.ends_with(suffix));
        self.kind == Kind::Unit && !suffixed
    }

    /// `kind/name`.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl fmt::Display for Ref {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Serialize for Ref {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Ref {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match Target::from_str(&text) {
            Ok(Target::Full(reference)) => Ok(reference),
            _ => Err(serde::de::Error::custom(format!("{text:?} is not a reference"))),
        }
    }
}

/// What a caller typed: a full reference, or a bare name that must fit exactly one instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `vm/web`
    Full(Ref),
    /// `web`
    Bare(String),
}

impl Target {
    /// As it was written.
    pub fn as_str(&self) -> &str {
        match self {
            Target::Full(reference) => reference.as_str(),
            Target::Bare(name) => name,
        }
    }
}

impl FromStr for Target {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        match text.split_once('/') {
            Some((kind, name)) => Ok(Target::Full(Ref::new(Kind::from_str(kind)?, name)?)),
            None => check_name(text).map(|()| Target::Bare(text.to_owned())),
        }
    }
}

/// What no kind allows in a name.
fn check_name(name: &str) -> Result<(), Problem> {
    let why = if name.is_empty() {
        "is empty"
    } else if name.len() > LONGEST_NAME {
        "is longer than 255 bytes"
    } else if name.contains('/') {
        "contains a slash"
    } else if name.chars().any(char::is_control) {
        "contains a control character"
    } else if matches!(name, "." | "..") || name.trim() != name {
        "is not a name"
    } else {
        return Ok(());
    };
    Err(Problem::new(Code::InvalidRequest, format!("the name {:?} {why}", clip(name)))
        .hint("use the name or id that `ctl list` shows"))
}

/// At most 64 characters of what a caller sent, for use in a message.
fn clip(text: &str) -> String {
    match text.char_indices().nth(64) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// The state of an instance, the same words for every kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It runs.
    Running,
    /// It is frozen: it keeps its memory and runs nothing.
    Paused,
    /// It is down.
    Stopped,
    /// It is on its way up.
    Starting,
    /// It is on its way down.
    Stopping,
    /// It went down by itself.
    Crashed,
    /// The backend could not say.
    Unknown,
}

impl State {
    /// The name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
            State::Starting => "starting",
            State::Stopping => "stopping",
            State::Crashed => "crashed",
            State::Unknown => "unknown",
        }
    }

    /// Whether it holds CPU and memory of the host. What can't be told counts as held.
    pub const fn is_up(self) -> bool {
        !matches!(self, State::Stopped | State::Crashed)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for State {
    type Err = Problem;

    fn from_str(text: &str) -> Result<Self, Problem> {
        serde_json::from_value(serde_json::Value::String(text.to_owned())).map_err(|_| {
            Problem::new(Code::InvalidRequest, format!("{:?} is not a state", clip(text)))
                .hint("states are running, paused, stopped, starting, stopping, crashed and unknown")
        })
    }
}

/// The fields that a resize can change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum Field {
    /// vCPUs of a VM, CPU-time limit of anything else.
    Cpus,
    /// CPU-time cap of a whole VM.
    CpuLimit,
    /// What a VM's guest has, the memory limit of anything else.
    Memory,
}

impl Field {
    /// The name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Field::Cpus => "cpus",
            Field::CpuLimit => "cpu_limit",
            Field::Memory => "memory",
        }
    }
}

/// Whether a change is possible, and if not, with which code and why.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Ability {
    /// It is possible.
    Yes,
    /// It is possible, and nothing takes it back: the sentence says so.
    OneWay(String),
    /// It isn't: the code of the refusal, and a sentence that names the cause.
    No(Code, String),
}

/// One field of an instance as a backend sees it. Values are `None` where they are unknown or don't apply.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(bound(serialize = "T: Serialize", deserialize = "T: Quantity + Deserialize<'de>"))]
pub struct Reading<T> {
    /// The backend's present target, whoever set it.
    pub accepted: Option<Limit<T>>,
    /// Read back from hypervisor, engine or cgroup.
    pub observed: Option<Limit<T>>,
    /// Seen from inside the guest; `None` where nothing inside can be asked.
    pub confirmed: Option<Limit<T>>,
    /// What the next start will have; `None` where there is no saved form.
    pub persistent: Option<Limit<T>>,
    /// The most that can be reached live.
    pub ceiling: Option<T>,
    /// The most that the saved definition allows for the next start.
    pub saved_ceiling: Option<T>,
    /// The least that can be reached live, where that is more than the least of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor: Option<T>,
    /// The step in which the backend counts; requests are rounded up to it.
    pub grain: T,
    /// The least that the backend takes.
    pub least: T,
    /// Whether it can be changed while the instance is up.
    pub live: Ability,
    /// Whether `none` (no limit) can be set.
    pub unlimit: Ability,
}

impl<T: Copy> Reading<T> {
    /// A field that this instance doesn't have, with the reason.
    pub fn absent(grain: T, why: impl Into<String>) -> Self {
        let why = why.into();
        Reading {
            accepted: None,
            observed: None,
            confirmed: None,
            persistent: None,
            ceiling: None,
            saved_ceiling: None,
            floor: None,
            grain,
            least: grain,
            live: Ability::No(Code::Unsupported, why.clone()),
            unlimit: Ability::No(Code::Unsupported, why),
        }
    }
}

/// How much of its memory an instance uses, for the check before a shrink.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Usage {
    /// In use now, caches that can be dropped not counted.
    Known(ByteCount),
    /// Nothing inside can be asked.
    Unknown,
    /// The guest was asked and its balloon driver has never spoken.
    Silent,
}

/// What the next start takes from the host before a guest has given anything back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Demand {
    /// vCPUs, or the CPU limit.
    pub cpus: Option<Limit<Cpus>>,
    /// Boot memory, or the memory limit.
    pub memory: Option<Limit<ByteCount>>,
}

/// What saves a change: how `both`, `live` and `next-boot` map onto one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Saved {
    /// A definition of its own, changed apart from what runs (libvirt).
    Apart,
    /// One call changes what runs and what is kept (Docker's HostConfig).
    Together,
    /// One call changes what runs, and keeps that where it is asked to; what is kept can't be changed alone while it runs
    /// (systemd's persistent and runtime properties).
    OnRequest,
    /// Nothing is kept (a transient domain).
    Nowhere,
}

/// What of an instance is charged to an outer one already: of nested limits the outermost counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Covered {
    /// Its CPUs.
    pub cpus: bool,
    /// Its memory.
    pub memory: bool,
}

/// Why an instance can't be started and stopped, restarted or paused at all, each where it can't.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Barred {
    /// Started, stopped and restarted.
    pub power: Option<String>,
    /// Restarted.
    pub restart: Option<String>,
    /// Paused and resumed.
    pub pause: Option<String>,
}

/// How a VM's memory is made up of what its balloon leaves it and what a virtio-mem device gives it beyond that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parts {
    /// The most that the balloon leaves the guest: what it was booted with, without the device.
    pub base: ByteCount,
    /// What the balloon is to leave it.
    pub balloon: ByteCount,
    /// What the device is to give it.
    pub plugged: ByteCount,
    /// The most that the device can give.
    pub size: ByteCount,
    /// What the device gives is a multiple of this.
    pub block: ByteCount,
}

/// What an instance is known by, whatever it is called just now: its kind, and its engine's own id, which no other one has.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId {
    /// Its kind.
    pub kind: Kind,
    /// Domain UUID, full container id, name of a unit or path of a cgroup.
    pub id: String,
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.id)
    }
}

/// One instance as its backend saw it at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// Kind and name.
    pub reference: Ref,
    /// Domain UUID, full container id, name of a unit or path of a cgroup: what stays while the name may be given to something
    /// else.
    pub id: String,
    /// What changes with every start: domain id, container start time, invocation id. `None` while it is down.
    pub boot: Option<String>,
    /// Its state.
    pub state: State,
    /// How it keeps what it is told.
    pub saved: Saved,
    /// vCPUs or CPU limit.
    pub cpus: Reading<Cpus>,
    /// CPU-time cap of a whole VM.
    pub cpu_limit: Reading<Cpus>,
    /// Memory.
    pub memory: Reading<ByteCount>,
    /// Memory in use.
    pub used: Usage,
    /// What its next start takes.
    pub demand: Demand,
    /// What the memory of what runs is made up of, where it has a virtio-mem device.
    #[serde(default)]
    pub parts: Option<Parts>,
    /// The same of what is saved.
    #[serde(default)]
    pub saved_parts: Option<Parts>,
    /// What of it an outer instance is charged for.
    #[serde(default)]
    pub covered: Covered,
    /// What can't be done to it, whatever its state.
    #[serde(default)]
    pub barred: Barred,
    /// Docker's labels; empty elsewhere.
    pub labels: BTreeMap<String, String>,
    /// What a person looking at this instance should know.
    pub notes: Vec<String>,
    /// A refusal of every change, with the reason (swarm's containers, say).
    pub unchangeable: Option<String>,
    /// It is down because somebody switched it off hard, as far as its engine tells.
    #[serde(default)]
    pub switched_off: bool,
    /// The backend's own values, to be handed back verbatim for an undo.
    pub native: serde_json::Value,
}

impl Observed {
    /// Why a VM can't grow without a restart, or, where it is down, won't be able to after its start; `None` where it can, and
    /// for what has no such bounds.
    pub fn unprepared(&self) -> Option<String> {
        fn stuck<T: Copy + PartialOrd + fmt::Display>(name: &str, reading: &Reading<T>, up: bool) -> Option<String> {
            let (now, most) = match up {
                true => (reading.accepted, reading.ceiling),
                false => (reading.persistent, reading.saved_ceiling),
            };
            match (&reading.live, now, most) {
                (Ability::No(_, why), ..) if up => Some(format!("{name}: {why}")),
                (_, Some(Limit::At(now)), Some(most)) if now >= most => Some(format!("{name}: {most} is its maximum")),
                _ => None,
            }
        }
        let up = self.state.is_up();
        let fields = [stuck("cpus", &self.cpus, up), stuck("memory", &self.memory, up)];
        let reasons: Vec<String> = fields.into_iter().flatten().collect();
        (self.reference.kind() == Kind::Vm && !reasons.is_empty()).then(|| reasons.join("; "))
    }

    /// The fields whose next start has another value than what runs is to have.
    pub fn differs_at_next_boot(&self) -> Vec<Field> {
        fn differs<T: PartialEq>(reading: &Reading<T>) -> bool {
            matches!((&reading.accepted, &reading.persistent), (Some(now), Some(next)) if now != next)
        }
        let fields = [
            (Field::Cpus, differs(&self.cpus)),
            (Field::CpuLimit, differs(&self.cpu_limit)),
            (Field::Memory, differs(&self.memory)),
        ];
        fields.into_iter().filter(|(_, differs)| self.state.is_up() && *differs).map(|(field, _)| field).collect()
    }

    /// What it is known by.
    pub fn instance_id(&self) -> InstanceId {
        InstanceId { kind: self.reference.kind(), id: self.id.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_paths_or_lines_are_refused_for_every_kind() {
        for name in ["", "a/b", "../info?x=", "..", ".", "a\0b", "a\nb", "\u{7f}", " a", "a ", &"a".repeat(300)] {
            for kind in Kind::ALL {
                assert_eq!(Ref::new(kind, name).unwrap_err().code, Code::InvalidRequest, "{kind} {name:?}");
            }
        }
    }

    #[test]
    fn metacharacters_are_data_for_vms_and_refused_for_containers() {
        for name in ["a;rm -rf b", "$(id)", "a?b=c", "a#b", "a%2fb", "-x", "a b"] {
            assert!(Ref::new(Kind::Vm, name).is_ok(), "{name:?}");
            assert!(Ref::new(Kind::Container, name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn targets_are_full_or_bare() {
        assert_eq!("web".parse(), Ok(Target::Bare("web".into())));
        assert_eq!("vm/web".parse::<Target>(), Ref::new(Kind::Vm, "web").map(Target::Full));
        assert!("pod/web".parse::<Target>().is_err());
        assert!("vm/a/b".parse::<Target>().is_err());
        assert!("vm/".parse::<Target>().is_err());
    }

    #[test]
    fn a_reference_survives_the_wire() {
        let reference = Ref::new(Kind::Vm, "web 1").unwrap();
        assert_eq!(reference.name(), "web 1");
        let json = serde_json::to_string(&reference).unwrap();
        assert_eq!(serde_json::from_str::<Ref>(&json).unwrap(), reference);
    }
}
