//! The types on the wire (v1): what is asked and what is answered, JSON both ways. CPUs are numbers, bytes are integers,
//! `"none"` is no limit, null is unknown or not applicable. Knows nothing of HTTP.

mod logs;
mod usage;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use crate::config::Size;
use crate::error::{Code, Numbers};
use crate::instance::{Field, Kind, Observed, Reading, Ref, State};
use crate::ledger::Charge;
use crate::operation::{Operation, Outcome, StepState, Uptime, Who};
use crate::plan::Aim;
use crate::units::{Amount, ByteCount, Cpus, Limit, Quantity};

pub use logs::{LOG_HEADER, LOG_HEARTBEAT, LOG_MEDIA_TYPE, LogStream};
pub use usage::{BalloonUse, CpuUse, HostUse, MemoryUse, PressureUse, UsageList, UsageView};

/// A field of an instance in its five values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(bound(serialize = "T: Serialize", deserialize = "T: Quantity + Deserialize<'de>"))]
pub struct FieldView<T> {
    /// The backend's present target.
    pub accepted: Option<Limit<T>>,
    /// Read back from hypervisor, engine or cgroup.
    pub observed: Option<Limit<T>>,
    /// Seen from inside the guest.
    pub confirmed: Option<Limit<T>>,
    /// What the next start will have.
    pub persistent: Option<Limit<T>>,
    /// The most that can be reached live.
    // utoipa's generics lose the null of an optional parameter.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub ceiling: Option<T>,
}

impl<T: Copy> From<&Reading<T>> for FieldView<T> {
    fn from(reading: &Reading<T>) -> Self {
        FieldView {
            accepted: reading.accepted,
            observed: reading.observed,
            confirmed: reading.confirmed,
            persistent: reading.persistent,
            ceiling: reading.ceiling,
        }
    }
}

/// What an instance has for a time only: a change that goes back by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Loan {
    /// The change.
    pub operation: String,
    /// The fields that it grew.
    pub fields: Vec<Field>,
    /// When it goes back, in milliseconds since the Unix epoch.
    pub due_ms: u64,
    /// The same by a clock that nobody sets; on record only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(ignore))]
    pub due_up: Option<Uptime>,
}

impl Loan {
    /// How many milliseconds are left of it: by the host's uptime, and where it was booted since by the time of day, which is all
    /// that two boots have in common.
    pub fn left_ms(&self, now_ms: u64, up: Option<&Uptime>) -> u64 {
        match (&self.due_up, up) {
            (Some(due), Some(up)) if due.boot == up.boot => due.ms.saturating_sub(up.ms),
            _ => self.due_ms.saturating_sub(now_ms),
        }
    }

    /// As it is told: due by the time of day as that is now, where somebody has set it since.
    #[must_use]
    pub fn told(&self, now_ms: u64, up: Option<&Uptime>) -> Loan {
        let due_ms = match (&self.due_up, up) {
            (Some(due), Some(up)) if due.boot == up.boot => now_ms.saturating_add(due.ms).saturating_sub(up.ms),
            _ => self.due_ms,
        };
        let was_set = due_ms.abs_diff(self.due_ms) > CLOCKS_AGREE_MS;
        Loan { due_ms: if was_set { due_ms } else { self.due_ms }, due_up: None, ..self.clone() }
    }
}

/// How far two clocks may be apart before one of them has been set: both are read one after the other, and one is slewed.
const CLOCKS_AGREE_MS: u64 = 1000;

/// Why an instance takes no change but stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Hold {
    /// What kind of hold.
    pub hold: HoldKind,
    /// Why, and what to do.
    pub reason: String,
    /// Who put it, where somebody did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub who: Option<Who>,
    /// Since when, in milliseconds since the Unix epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since_ms: Option<u64>,
    /// Of a suspension: the state that a resume puts back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<State>,
    /// Of a suspension: whether somebody has woken the instance since, past agentd.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub woken: bool,
}

impl Hold {
    /// One that nobody put by name.
    pub fn new(hold: HoldKind, reason: String) -> Self {
        Hold { hold, reason, who: None, since_ms: None, before: None, woken: false }
    }
}

/// The kinds of holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum HoldKind {
    /// Somebody suspended it.
    Suspended,
    /// A change ended partial: somebody must look.
    NeedsAttention,
    /// The outcome of a call to its backend isn't known yet.
    Recovering,
}

impl HoldKind {
    /// The name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            HoldKind::Suspended => "suspended",
            HoldKind::NeedsAttention => "needs-attention",
            HoldKind::Recovering => "recovering",
        }
    }
}

/// An instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Instance {
    /// `kind/name`
    #[serde(rename = "ref")]
    pub reference: String,
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Domain UUID or container id.
    pub id: String,
    /// Its state.
    pub state: State,
    /// Changes whenever the instance does; its ETag.
    pub version: String,
    /// vCPUs, or the CPU limit.
    pub cpus: FieldView<Cpus>,
    /// CPU-time cap of a whole VM.
    pub cpu_limit: FieldView<Cpus>,
    /// Memory.
    pub memory: FieldView<ByteCount>,
    /// What it is charged.
    pub committed: Charge,
    /// Docker's labels.
    pub labels: BTreeMap<String, String>,
    /// What blocks changes.
    pub holds: Vec<Hold>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// The size of the config whose values it has; null where there is none.
    #[serde(default)]
    pub size: Option<String>,
    /// The fields whose next start has another value than what runs.
    #[serde(default)]
    pub next_boot: Vec<Field>,
    /// What it has for a time only.
    #[serde(default)]
    pub loans: Vec<Loan>,
    /// Why a VM can't grow without a restart; null where it can.
    #[serde(default)]
    pub unprepared: Option<String>,
    /// What can be done about each field, and why not; only where one instance is asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Capabilities>,
}

/// What can be done about each field of an instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Capabilities {
    /// vCPUs, or the CPU limit.
    pub cpus: Capability,
    /// CPU-time cap of a whole VM.
    pub cpu_limit: Capability,
    /// Memory.
    pub memory: Capability,
}

/// What can be done about one field.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Capability {
    /// While it runs.
    pub live: Possible,
    /// From its next start on.
    pub restart: Possible,
    /// Taking its limit away.
    pub unlimited: Possible,
}

/// Whether something is possible, and how far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Possible {
    /// Whether it is.
    pub possible: bool,
    /// The least value: CPUs, or bytes.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub least: Option<serde_json::Number>,
    /// The greatest value; null where nothing bounds it.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub most: Option<serde_json::Number>,
    /// Why it isn't possible, or what bounds it.
    pub why: Option<String>,
}

impl Possible {
    /// It is, without bounds.
    pub const fn yes() -> Self {
        Possible { possible: true, least: None, most: None, why: None }
    }

    /// It isn't.
    pub fn no(why: String) -> Self {
        Possible { possible: false, least: None, most: None, why: Some(why) }
    }
}

impl Instance {
    /// An observation with what the daemon adds to it.
    pub fn new(
        observed: &Observed,
        version: String,
        committed: Charge,
        holds: Vec<Hold>,
        sizes: &BTreeMap<String, Size>,
    ) -> Self {
        Instance {
            size: sizes.iter().filter(|(_, size)| size.fits(observed)).map(|(name, _)| name.clone()).next(),
            next_boot: observed.differs_at_next_boot(),
            loans: Vec::new(),
            unprepared: observed.unprepared(),
            capabilities: None,
            reference: observed.reference.to_string(),
            kind: observed.reference.kind(),
            name: observed.reference.name().to_owned(),
            id: observed.id.clone(),
            state: observed.state,
            version,
            cpus: (&observed.cpus).into(),
            cpu_limit: (&observed.cpu_limit).into(),
            memory: (&observed.memory).into(),
            committed,
            labels: observed.labels.clone(),
            holds,
            notes: observed.notes.clone(),
        }
    }
}

/// A page of instances.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct InstanceList {
    /// The page.
    pub items: Vec<Instance>,
    /// Where the next page begins, or null.
    pub next_cursor: Option<String>,
    /// How many there are on all pages.
    pub total: usize,
    /// The kinds whose backend does not answer.
    pub unavailable: Vec<Kind>,
}

/// To where a resize goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Apply {
    /// What runs and what is saved.
    #[default]
    Both,
    /// What runs only.
    Live,
    /// What is saved only.
    NextBoot,
}

/// Whether a restart is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// It isn't.
    #[default]
    Never,
    /// It is, where the change can't be made live.
    IfNeeded,
}

/// The body of a resize. An absent field stays as it is; `"none"` and null take a limit away; `"+1"` is relative.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ResizeRequest {
    /// vCPUs of a VM, CPU limit of anything else.
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Limit<Amount<Cpus>>>,
    /// CPU-time cap of a whole VM.
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub cpu_limit: Option<Limit<Amount<Cpus>>>,
    /// Memory; a number of bytes, or a string such as `"8GiB"`.
    #[serde(deserialize_with = "present", skip_serializing_if = "Option::is_none")]
    pub memory: Option<Limit<Amount<ByteCount>>>,
    /// A size of the config file, in place of the three fields above.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Plan only.
    pub dry_run: bool,
    /// Whether a restart is allowed.
    pub restart: Restart,
    /// With `restart`: whether it may be hard.
    pub force: bool,
    /// Live, saved or both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub apply: Option<Apply>,
    /// Go back by itself after this time, e.g. `"2h"`; only for growth, which is then not saved where that can be left out.
    #[serde(rename = "for", skip_serializing_if = "Option::is_none")]
    pub for_: Option<String>,
    /// How long to wait for the guest, e.g. `"30s"`; 10 s where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wait: Option<String>,
}

/// The body of a prepare. With neither maximum it goes as far as the config lets it; with one, the other stays.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct PrepareRequest {
    /// The most vCPUs that it is to be able to have without a restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<f64>))]
    pub max_cpus: Option<Cpus>,
    /// The most memory; a number of bytes, or a string such as `"32GiB"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_memory: Option<ByteCount>,
    /// Plan only.
    pub dry_run: bool,
}

/// The body of a stop or a restart.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct StopRequest {
    /// How long a graceful stop may take, e.g. `"60s"`; the config's `stop_timeout` where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
    /// Switch it off hard when the time is over.
    pub force: bool,
    /// Plan only.
    pub dry_run: bool,
}

/// The body of a suspend.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct SuspendRequest {
    /// Why, for those who find it suspended: 1 to 500 characters.
    pub reason: String,
    /// Plan only.
    pub dry_run: bool,
}

/// The body of a start, of a resume, or of a request that takes no parameters.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct StartRequest {
    /// Plan only.
    pub dry_run: bool,
}

/// Tells `null` (no limit) from an absent field.
fn present<'de, D: Deserializer<'de>, T: Quantity>(deserializer: D) -> Result<Option<Limit<T>>, D::Error> {
    Ok(Some(Option::<Limit<T>>::deserialize(deserializer)?.unwrap_or(Limit::Unlimited)))
}

/// What became of one field.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(bound(serialize = "T: Serialize", deserialize = "T: Quantity + Deserialize<'de>"))]
pub struct ChangeOf<T> {
    /// What was accepted before.
    pub before: Option<Limit<T>>,
    /// What was asked for, made absolute.
    pub requested: Limit<T>,
    /// What was asked for the next start, where that is another value: an undo puts both back to their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saved_requested: Option<Limit<T>>,
    /// The backend's target now.
    pub accepted: Option<Limit<T>>,
    /// Read back.
    pub observed: Option<Limit<T>>,
    /// Seen from inside the guest.
    pub confirmed: Option<Limit<T>>,
    /// Whether what runs has it.
    pub live: bool,
    /// Whether the next start will have it.
    pub persistent: bool,
}

/// What became of a field, with its name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "field", rename_all = "snake_case")]
pub enum Change {
    /// vCPUs or CPU limit.
    Cpus(ChangeOf<Cpus>),
    /// CPU-time cap of a whole VM.
    CpuLimit(ChangeOf<Cpus>),
    /// Memory.
    Memory(ChangeOf<ByteCount>),
}

/// A step as it is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StepView {
    /// What it does.
    pub what: String,
    /// What takes it back, or null.
    pub undo: Option<String>,
    /// Where it is.
    pub state: StepState,
    /// The backend's own words, where it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The reply to a change, and an operation in the record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct OperationView {
    /// Its id; null for a dry run.
    pub operation: Option<String>,
    /// `resize`, `undo`, `prepare`, `start`, `stop`, `restart`, `suspend`, `resume`.
    pub verb: String,
    /// The operation that it takes back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undoes: Option<String>,
    /// How it ended, or that it runs.
    pub outcome: Outcome,
    /// Of which instance.
    #[serde(rename = "ref")]
    pub reference: String,
    /// Whether nothing was meant to be done.
    pub dry_run: bool,
    /// Whether it takes a restart.
    #[serde(default)]
    pub restart: bool,
    /// How long it took.
    pub elapsed_ms: u64,
    /// What became of each field.
    pub changes: Vec<Change>,
    /// The steps.
    pub steps: Vec<StepView>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// Who asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub who: Option<Who>,
    /// The code, where it ended badly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<Code>,
    /// Why, where it ended badly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The instance afterwards, where it could be observed.
    pub instance: Option<Instance>,
}

impl OperationView {
    /// An operation, with the observation and the view of its instance where there is one.
    pub fn new(operation: &Operation, observed: Option<&Observed>, instance: Option<Instance>) -> Self {
        OperationView {
            operation: Some(operation.id.clone()),
            verb: operation.verb.to_string(),
            undoes: operation.undoes.clone(),
            outcome: operation.outcome,
            reference: operation.reference.to_string(),
            dry_run: false,
            restart: operation.restarts(),
            elapsed_ms: operation.elapsed_ms,
            changes: changes(operation, observed),
            steps: operation
                .steps
                .iter()
                .map(|record| StepView {
                    what: record.step.what.clone(),
                    undo: record.step.undo_what.clone(),
                    state: record.state,
                    error: record.error.clone(),
                })
                .collect(),
            notes: operation.notes.clone(),
            who: Some(operation.who.clone()),
            code: operation.problem.as_ref().map(|(code, _)| *code),
            detail: operation.problem.as_ref().map(|(_, detail)| detail.clone()),
            instance,
        }
    }
}

/// The targets of an operation against what was observed.
fn changes(operation: &Operation, observed: Option<&Observed>) -> Vec<Change> {
    fn one<T: Copy + PartialEq>(aim: &Aim<T>, reading: Option<&Reading<T>>) -> ChangeOf<T> {
        ChangeOf {
            before: aim.before,
            requested: aim.requested,
            saved_requested: aim.saved_requested,
            accepted: reading.and_then(|r| r.accepted),
            observed: reading.and_then(|r| r.observed),
            confirmed: reading.and_then(|r| r.confirmed),
            live: aim.live && reading.is_some_and(|r| r.observed == Some(aim.requested)),
            persistent: aim.saved && reading.is_some_and(|r| r.persistent == Some(aim.to_save())),
        }
    }
    let targets = &operation.targets;
    let cpus = targets.cpus.as_ref().map(|aim| Change::Cpus(one(aim, observed.map(|o| &o.cpus))));
    let cpu_limit = targets.cpu_limit.as_ref().map(|aim| Change::CpuLimit(one(aim, observed.map(|o| &o.cpu_limit))));
    let memory = targets.memory.as_ref().map(|aim| Change::Memory(one(aim, observed.map(|o| &o.memory))));
    [cpus, cpu_limit, memory].into_iter().flatten().collect()
}

/// A page of operations, newest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct OperationList {
    /// The page.
    pub items: Vec<OperationView>,
}

/// What kind of thing the history tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Happening {
    /// A change ended, or its outcome became known.
    Change,
    /// A change was refused: nothing was done.
    Refusal,
    /// A size was changed behind agentd's back.
    Drift,
    /// A hold was lifted by somebody.
    HoldCleared,
    /// What a change had left pending has come about.
    Settled,
    /// An instance went into another state, came or went. In the events only, not in the history.
    State,
}

impl Happening {
    /// Every type of event.
    pub const ALL: [Happening; 6] = [
        Happening::Change,
        Happening::Refusal,
        Happening::Drift,
        Happening::HoldCleared,
        Happening::Settled,
        Happening::State,
    ];

    /// The name on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Happening::Change => "change",
            Happening::Refusal => "refusal",
            Happening::Drift => "drift",
            Happening::HoldCleared => "hold-cleared",
            Happening::Settled => "settled",
            Happening::State => "state",
        }
    }
}

/// Events that a reader has missed and that are not on record any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LostEvents {
    /// The last that the reader has seen.
    pub after: u64,
    /// The oldest that is still there.
    pub oldest: u64,
}

/// A value before and after.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(bound(serialize = "T: Serialize", deserialize = "T: Quantity + Deserialize<'de>"))]
pub struct MoveOf<T> {
    /// Whether it is the saved value, not the one that runs.
    pub saved: bool,
    /// Before; null where it was unknown.
    pub before: Option<Limit<T>>,
    /// After; null where it is unknown.
    pub after: Option<Limit<T>>,
}

/// What moved, with its field's name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "field", rename_all = "snake_case")]
pub enum Move {
    /// vCPUs or CPU limit.
    Cpus(MoveOf<Cpus>),
    /// CPU-time cap of a whole VM.
    CpuLimit(MoveOf<Cpus>),
    /// Memory.
    Memory(MoveOf<ByteCount>),
    /// Its state.
    State {
        /// Before; null where it was not there.
        before: Option<State>,
        /// After; null where it is gone.
        after: Option<State>,
    },
}

impl fmt::Display for Move {
    /// `cpus 2 → 4`, `saved memory 4 GiB → 8 GiB`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn told<T: Copy + fmt::Display>(f: &mut fmt::Formatter<'_>, name: &str, of: &MoveOf<T>) -> fmt::Result {
            let value = |value: Option<Limit<T>>| value.map_or_else(|| "unknown".to_owned(), |value| value.to_string());
            let side = if of.saved { "saved " } else { "" };
            write!(f, "{side}{name} {} → {}", value(of.before), value(of.after))
        }
        match self {
            Move::Cpus(of) => told(f, "cpus", of),
            Move::CpuLimit(of) => told(f, "cpu_limit", of),
            Move::Memory(of) => told(f, "memory", of),
            Move::State { before, after } => {
                let word = |state: &Option<State>, none| state.map_or(none, State::as_str);
                write!(f, "state {} → {}", word(before, "absent"), word(after, "gone"))
            }
        }
    }
}

/// One entry of the history, which only grows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HistoryEntry {
    /// Its place: each entry has a higher one than those before it.
    pub seq: u64,
    /// When, RFC 3339 in UTC.
    pub at: String,
    /// What kind of thing happened.
    pub happening: Happening,
    /// To which instance.
    #[serde(rename = "ref")]
    pub reference: String,
    /// Its engine's own id, which stays where its name goes to another one; null where it was not known.
    #[serde(default)]
    pub id: Option<String>,
    /// Who asked for it; null where nobody asked agentd.
    pub who: Option<Who>,
    /// The operation, where there is one.
    pub operation: Option<String>,
    /// `resize`, `stop`, `start`, `undo`, `suspend`, `clear-hold` and so on.
    pub verb: Option<String>,
    /// How it ended.
    pub outcome: Option<Outcome>,
    /// What moved.
    pub moves: Vec<Move>,
    /// The code, where it ended badly.
    pub code: Option<Code>,
    /// Why, or what to know.
    pub detail: Option<String>,
}

impl HistoryEntry {
    /// An entry that tells no more than this; the record gives it its place and time.
    pub fn new(happening: Happening, reference: &Ref, id: Option<String>) -> Self {
        HistoryEntry {
            seq: 0,
            at: String::new(),
            happening,
            reference: reference.to_string(),
            id: id.filter(|id| !id.is_empty()),
            who: None,
            operation: None,
            verb: None,
            outcome: None,
            moves: Vec::new(),
            code: None,
            detail: None,
        }
    }
}

/// A page of the history, newest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct HistoryList {
    /// The page.
    pub items: Vec<HistoryEntry>,
    /// Ask with `before` of this for the next page; null where there is none.
    pub next: Option<u64>,
}

/// The body of an undo.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct UndoRequest {
    /// Plan only.
    pub dry_run: bool,
    /// How long to wait for the guest, e.g. `"30s"`; 10 s where absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wait: Option<String>,
}

/// One dimension of the host's capacity.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(bound(serialize = "T: Serialize", deserialize = "T: Quantity + Deserialize<'de>"))]
pub struct CapacityOf<T> {
    /// What the host has, or the config says it has.
    pub total: T,
    /// Kept back for the host.
    pub reserved: T,
    /// The factor on the rest, exact to thousandths.
    pub overcommit: f64,
    /// (total − reserved) × overcommit.
    pub allowed: T,
    /// Promised to what is up.
    pub committed: T,
    /// What can still be promised; 0 where the host is over its cap.
    pub free: T,
    /// Whether more is promised than allowed.
    pub over: bool,
}

/// What one `[[limit]]` has promised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LimitUse {
    /// Its `match`.
    #[serde(rename = "match")]
    pub pattern: String,
    /// `total_cpus`, or null.
    pub total_cpus: Option<Cpus>,
    /// `total_memory`, or null.
    pub total_memory: Option<ByteCount>,
    /// What is promised under it.
    pub committed: Charge,
    /// Whether more is promised than allowed.
    pub over: bool,
}

/// The host: what it has, what is promised, what is free.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Capacity {
    /// CPUs.
    pub cpus: CapacityOf<Cpus>,
    /// Memory.
    pub memory: CapacityOf<ByteCount>,
    /// What is promised to each kind.
    pub by_kind: BTreeMap<Kind, KindUse>,
    /// What is promised under each `[[limit]]`.
    pub limits: Vec<LimitUse>,
    /// `observed` or `maximum`: which memory of a VM is charged.
    pub vm_memory: String,
    /// What is charged on top of each running VM.
    pub vm_overhead: ByteCount,
    /// Instances without a limit that are up: they are charged what they use.
    pub unlimited: Vec<String>,
    /// The kinds whose backend does not answer: their last known charge stands.
    pub unavailable: Vec<Kind>,
}

/// What is promised to one kind.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, Default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct KindUse {
    /// How many are up.
    pub up: usize,
    /// How many there are.
    pub instances: usize,
    /// What is promised to them.
    pub committed: Charge,
}

/// A size of the config file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SizeView {
    /// Its name.
    pub name: String,
    /// vCPUs, or the CPU limit.
    pub cpus: Option<Cpus>,
    /// Memory.
    pub memory: Option<ByteCount>,
    /// CPU-time cap of a whole VM.
    pub cpu_limit: Limit<Cpus>,
}

/// The sizes of the config file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct SizeList {
    /// All of them, by name.
    pub items: Vec<SizeView>,
}

/// Whether agentd and its backends are well.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Health {
    /// Whether all that is configured works.
    pub ok: bool,
    /// agentd's version.
    pub version: String,
    /// Whether changes are switched off by the config file.
    pub read_only: bool,
    /// Each configured backend.
    pub backends: Vec<BackendHealth>,
    /// What a person should know: a rejected reload, held instances.
    pub notes: Vec<String>,
}

/// Whether one backend is well.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct BackendHealth {
    /// The kind that it serves.
    pub kind: Kind,
    /// Its name and where it is: `libvirt qemu:///system`.
    pub name: String,
    /// Whether it answers.
    pub ok: bool,
    /// Its version, or why it does not answer.
    pub detail: String,
}

/// An RFC 9457 problem document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Problem))]
pub struct ProblemDocument {
    /// A path that names the problem: `/problems/CODE`.
    #[serde(rename = "type")]
    pub type_: String,
    /// The code in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// The stable code.
    pub code: Code,
    /// What happened, to what, with which numbers.
    pub detail: String,
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// The operation, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    /// How the operation ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
    /// Its steps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<StepView>,
    /// The instance afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<Box<Instance>>,
    /// The numbers behind a refusal.
    #[serde(flatten)]
    pub numbers: Numbers,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::Identity;
    use crate::plan::tests::vm;
    use crate::plan::{Plan, Verb};

    const NOW: u64 = 1_700_000_000_000;

    fn up(boot: &str, ms: u64) -> Uptime {
        Uptime { boot: boot.into(), ms }
    }

    /// Lent at `NOW`, 5 s after the boot `a`, for a minute.
    fn loan() -> Loan {
        Loan { operation: "o".into(), fields: vec![Field::Cpus], due_ms: NOW + 60_000, due_up: Some(up("a", 65_000)) }
    }

    #[test]
    fn what_is_left_of_a_loan_goes_by_uptime_and_over_a_boot_by_the_time_of_day() {
        let loan = loan();
        // 10 s later, whatever the clock was set to meanwhile.
        for now in [NOW + 10_000, 0, NOW + 86_400_000] {
            assert_eq!(loan.left_ms(now, Some(&up("a", 15_000))), 50_000);
        }
        assert_eq!(loan.left_ms(NOW, Some(&up("a", 65_001))), 0);
        // Another boot, or one that nobody knows: uptimes can't be compared.
        for other in [Some(up("b", 15_000)), None] {
            assert_eq!(loan.left_ms(NOW + 10_000, other.as_ref()), 50_000);
            assert_eq!(loan.left_ms(NOW + 60_001, other.as_ref()), 0);
        }
        let old = Loan { due_up: None, ..loan };
        assert_eq!(old.left_ms(NOW + 59_000, Some(&up("a", 0))), 1000);
    }

    #[test]
    fn a_loan_is_told_as_due_by_the_clock_as_it_is_now_where_that_was_set() {
        let loan = loan();
        let told = |now: u64, up: &Uptime| loan.told(now, Some(up)).due_ms;
        assert_eq!(told(NOW + 10_000, &up("a", 15_000)), loan.due_ms);
        // Slewed by less than is noticed, and by more, either way.
        assert_eq!(told(NOW + 11_000, &up("a", 15_000)), loan.due_ms);
        assert_eq!(told(NOW + 11_001, &up("a", 15_000)), NOW + 61_001);
        assert_eq!(told(NOW + 8_999, &up("a", 15_000)), NOW + 58_999);
        assert_eq!(told(NOW + 3_600_000, &up("b", 15_000)), loan.due_ms);
        assert_eq!(loan.told(NOW, None), Loan { due_up: None, ..loan });
    }

    #[test]
    fn words_are_those_of_the_wire() {
        for hold in [HoldKind::Suspended, HoldKind::NeedsAttention, HoldKind::Recovering] {
            assert_eq!(serde_json::to_value(hold).unwrap(), hold.as_str());
        }
        for happening in Happening::ALL {
            assert_eq!(serde_json::to_value(happening).unwrap(), happening.as_str());
        }
    }

    #[test]
    fn moves_are_told_with_their_side_and_both_values() {
        let one = |cpus| Some(Limit::At(Cpus::whole(cpus)));
        let cpus = MoveOf { saved: false, before: one(2), after: Some(Limit::Unlimited) };
        let memory = MoveOf { saved: true, before: None, after: Some(Limit::At(ByteCount::gib(8))) };
        for (moved, told) in [
            (Move::Cpus(cpus.clone()), "cpus 2 → none"),
            (Move::CpuLimit(cpus), "cpu_limit 2 → none"),
            (Move::Memory(memory), "saved memory unknown → 8 GiB"),
            (Move::State { before: None, after: Some(State::Running) }, "state absent → running"),
            (Move::State { before: Some(State::Paused), after: None }, "state paused → gone"),
        ] {
            assert_eq!(moved.to_string(), told);
        }
    }

    #[test]
    fn a_change_is_live_and_saved_where_it_was_to_be_and_is_seen_to_be() {
        let (two, three) = (Limit::At(Cpus::whole(2)), Limit::At(Cpus::whole(3)));
        let aim = |live, saved| Aim {
            before: Some(two),
            saved_before: Some(two),
            requested: three,
            saved_requested: None,
            live,
            saved,
        };
        let told = |live, saved, seen, persistent| {
            let mut observed = vm();
            (observed.cpus.observed, observed.cpus.persistent) = (Some(seen), Some(persistent));
            let who = Who { uid: 0, gid: 0, pid: 1, command: "test".into() };
            let reference = observed.reference.clone();
            let mut plan = Plan::empty(reference, Identity::of(&observed), Verb::Resize);
            plan.targets.cpus = Some(aim(live, saved));
            let changes = changes(&Operation::new("1".into(), who, plan, 0), Some(&observed));
            let [Change::Cpus(change)] = changes.as_slice() else { panic!("{changes:?}") };
            (change.live, change.persistent)
        };
        assert_eq!(told(true, true, three, three), (true, true));
        assert_eq!(told(false, false, three, three), (false, false), "somebody else's doing");
        assert_eq!(told(true, true, two, two), (false, false));
        assert_eq!(told(true, false, three, two), (true, false));
    }
}
