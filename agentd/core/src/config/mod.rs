//! The config file as typed values: every section, every default, and which rules hold for an instance. Reads a text that
//! it is given; knows no files, no user database and no host.

mod check;
mod duration;
mod keys;
mod reader;
mod rules;
mod sections;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::access::Rights;
use crate::instance::{Kind, Observed, Reading};
use crate::pattern::Pattern;
pub use crate::units::Ratio;
use crate::units::{ByteCount, Cpus, Limit};
pub use duration::{DurationError, display_duration, parse_duration};
pub use keys::{KEYS, KeyDoc};
pub use rules::{Bound, Rules};

/// The whole config file. [`Config::default`] is what an empty file means.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `[server]`
    pub server: Server,
    /// `[libvirt]`; None: virtual machines are off.
    pub libvirt: Option<Libvirt>,
    /// `[docker]`; None: containers are off.
    pub docker: Option<Docker>,
    /// `[units]`; None: units and cgroups are off.
    pub units: Option<Units>,
    /// `[capacity]`
    pub capacity: Capacity,
    /// `[scaling]`
    pub scaling: Scaling,
    /// `[sizes.NAME]`
    pub sizes: BTreeMap<String, Size>,
    /// `[[limit]]`, in the order of the file.
    pub limits: Vec<LimitRule>,
    /// `[[access]]`, in the order of the file.
    pub access: Vec<AccessRule>,
}

/// `[server]`: where agentd listens and keeps its state. Changes need a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// The Unix socket, an absolute path. Default `/run/agentd/agentd.sock`.
    pub socket: PathBuf,
    /// The directory of the store, an absolute path. Default `/var/lib/agentd`.
    pub state_dir: PathBuf,
    /// Refuse every change. Default false.
    pub read_only: bool,
    /// How long history is kept. Default 90 days.
    pub history_retention: Duration,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            socket: PathBuf::from("/run/agentd/agentd.sock"),
            state_dir: PathBuf::from("/var/lib/agentd"),
            read_only: false,
            history_retention: Duration::from_secs(90 * 24 * 60 * 60),
        }
    }
}

/// `[libvirt]`: virtual machines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Libvirt {
    /// The connection URI. Default `qemu:///system`.
    pub uri: String,
}

impl Default for Libvirt {
    fn default() -> Self {
        Self { uri: "qemu:///system".to_owned() }
    }
}

/// `[docker]`: containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Docker {
    /// The engine's Unix socket, an absolute path. Default `/var/run/docker.sock`.
    pub socket: PathBuf,
}

impl Default for Docker {
    fn default() -> Self {
        Self { socket: PathBuf::from("/var/run/docker.sock") }
    }
}

/// `[units]`: systemd units and cgroups that have a name here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Units {
    /// Globs over the names of the systemd units that may be changed. Default: none.
    pub allow: Vec<Pattern>,
    /// `[units.cgroups]`: name of the instance → path below the cgroup root, beginning with `/`. Default: none.
    pub cgroups: BTreeMap<String, String>,
}

impl Units {
    /// Whether a systemd unit of this name may be changed.
    #[must_use]
    pub fn allows(&self, unit: &str) -> bool {
        self.allow.iter().any(|pattern| pattern.matches(unit, &BTreeMap::new()))
    }
}

/// A value, or "what the host has".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum AutoOr<T> {
    /// The host's own.
    #[default]
    Auto,
    /// This much.
    At(T),
}

impl<T> AutoOr<T> {
    /// The value, with the host's own for [`AutoOr::Auto`].
    pub fn or_host(self, host: T) -> T {
        match self {
            Self::Auto => host,
            Self::At(value) => value,
        }
    }
}

/// `auto`, or the value.
impl<T: fmt::Display> fmt::Display for AutoOr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.pad("auto"),
            Self::At(value) => value.fmt(f),
        }
    }
}

/// `[capacity]`: what the host may promise: (capacity − reserved) × overcommit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// CPUs there are. Default: the host's own.
    pub cpus: AutoOr<Cpus>,
    /// Memory there is. Default: the host's own.
    pub memory: AutoOr<ByteCount>,
    /// CPUs kept for the host itself. Default 0.
    pub reserved_cpus: Cpus,
    /// Memory kept for the host itself. Default 1 GiB.
    pub reserved_memory: ByteCount,
    /// CPUs promised for each that there is. Default 1.0.
    pub cpu_overcommit: Ratio,
    /// Bytes promised for each that there is. Default 1.0.
    pub memory_overcommit: Ratio,
    /// What QEMU itself takes beyond the guest's memory, for each running VM. Default 200 MiB.
    pub vm_overhead: ByteCount,
    /// Which memory of a VM counts. Default observed.
    pub vm_memory: VmMemory,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            cpus: AutoOr::Auto,
            memory: AutoOr::Auto,
            reserved_cpus: Cpus::ZERO,
            reserved_memory: ByteCount::gib(1),
            cpu_overcommit: Ratio::ONE,
            memory_overcommit: Ratio::ONE,
            vm_overhead: ByteCount::mib(200),
            vm_memory: VmMemory::Observed,
        }
    }
}

/// Which memory of a VM counts against the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VmMemory {
    /// What it has now.
    #[default]
    Observed,
    /// What it could take back from its balloon at will.
    Maximum,
}

impl fmt::Display for VmMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Observed => "observed",
            Self::Maximum => "maximum",
        })
    }
}

/// `[scaling]`: the bound of every growth but of what is only saved, and of `prepare`; what `prepare` makes room for when it
/// isn't told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scaling {
    /// CPUs of one instance. Default: the host's own.
    pub max_cpus: AutoOr<Cpus>,
    /// Memory of one instance. Default: the host's own.
    pub max_memory: AutoOr<ByteCount>,
}

/// `[sizes.NAME]`: fields that are set together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// CPUs. Absent: the size leaves them as they are.
    pub cpus: Option<Cpus>,
    /// Memory. Absent: the size leaves it as it is.
    pub memory: Option<ByteCount>,
    /// CPU-time cap of a vm. Absent in the file: none.
    pub cpu_limit: Limit<Cpus>,
}

impl Size {
    /// Whether an instance has these values: what runs, or what it will start with.
    #[must_use]
    pub fn fits(&self, observed: &Observed) -> bool {
        fn has<T: Copy + PartialEq>(reading: &Reading<T>, up: bool) -> Option<Limit<T>> {
            if up { reading.accepted } else { reading.persistent }
        }
        let up = observed.state.is_up();
        let one = |want: Option<Limit<Cpus>>, has: Option<Limit<Cpus>>| want.is_none() || want == has;
        let vm = observed.reference.kind() == Kind::Vm;
        one(self.cpus.map(Limit::At), has(&observed.cpus, up))
            && self.memory.is_none_or(|memory| has(&observed.memory, up) == Some(Limit::At(memory)))
            // What has no cpu_limit has none.
            && (!vm || has(&observed.cpu_limit, up).unwrap_or(Limit::Unlimited) == self.cpu_limit)
    }
}

/// When an instance's memory may be taken away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shrink {
    /// Whatever is in use.
    Always,
    /// Down to what is in use plus the margin; unknown use refuses.
    #[default]
    IfUnused,
    /// Not at all.
    Never,
}

impl fmt::Display for Shrink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Always => "always",
            Self::IfUnused => "if-unused",
            Self::Never => "never",
        })
    }
}

/// One `[[limit]]`. A key that the file leaves out is None, so that the last rule that states it wins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitRule {
    /// `match`: the instances it is about. Required.
    pub pattern: Pattern,
    /// Least memory of one instance. No default.
    pub min_memory: Option<ByteCount>,
    /// Most CPUs of one instance. No default.
    pub max_cpus: Option<Cpus>,
    /// Most memory of one instance. No default.
    pub max_memory: Option<ByteCount>,
    /// Most CPUs of all that match, together. No default.
    pub total_cpus: Option<Cpus>,
    /// Most memory of all that match, together, overheads included. No default.
    pub total_memory: Option<ByteCount>,
    /// Whether live changes are allowed. Default true.
    pub live: Option<bool>,
    /// Whether a limit may be taken away. Default false.
    pub unlimited: Option<bool>,
    /// When memory may be taken away. Default if-unused.
    pub shrink: Option<Shrink>,
    /// Memory kept above what is in use. Default 64 MiB.
    pub shrink_margin: Option<ByteCount>,
    /// How long a graceful stop may take. Default 60 s.
    pub stop_timeout: Option<Duration>,
    /// Whether what was changed behind agentd's back is put back. Default false.
    pub repair_drift: Option<bool>,
}

/// Whom an `[[access]]` rule is about, by name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Principal {
    /// A user name.
    User(String),
    /// A group name.
    Group(String),
}

/// `user deploy`, `group agentd`.
impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User(name) => write!(f, "user {name}"),
            Self::Group(name) => write!(f, "group {name}"),
        }
    }
}

/// One `[[access]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessRule {
    /// Whom it is about: exactly one of `user` and `group`.
    pub principal: Principal,
    /// What they may do. Never empty.
    pub allow: Rights,
    /// `match`: for which instances. Required.
    pub pattern: Pattern,
}

impl AccessRule {
    /// How the rule is named on record, given its place in [`Config::access`]: `[[access]] 2 (group agentd)`.
    #[must_use]
    pub fn describe(&self, index: usize) -> String {
        format!("[[access]] {} ({})", index + 1, self.principal)
    }
}

/// One thing that is wrong with a config file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The file, as it was named to [`Config::parse`].
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The key, such as `[capacity] reserved_cpus` or `[[limit]] 2 match`; empty for a syntax error.
    pub key: String,
    /// What is wrong, and what to write instead.
    pub message: String,
}

/// `file:line:column: key: message`.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: ", self.file, self.line, self.column)?;
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

impl Config {
    /// Reads a config file's text. `file_name` is for messages only.
    ///
    /// # Errors
    /// Everything that is wrong with it, in the order of the file: syntax, unknown keys, wrong units, contradictions.
    pub fn parse(file_name: &str, text: &str) -> Result<Self, Vec<Fault>> {
        sections::parse(file_name, text)
    }

    /// What is valid and yet hardly meant, in words for an operator.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        match &self.units {
            None if self.libvirt.is_none() && self.docker.is_none() => warnings.push(
                "there is neither [libvirt] nor [docker] nor [units], so there is nothing that agentd could change"
                    .into(),
            ),
            Some(units) if units.allow.is_empty() && units.cgroups.is_empty() => {
                warnings.push(
                    "[units] allows no unit and names no cgroup, so there is none that agentd could change".into(),
                );
            }
            _ => {}
        }
        warnings
    }

    /// Whether two configs have the same `[server]`, which a running daemon cannot change.
    #[must_use]
    pub fn same_server(&self, other: &Self) -> bool {
        self.server == other.server
    }
}
