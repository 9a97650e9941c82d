//! The planner: what was observed, what is asked, what the config and the ledger allow → a plan of absolute steps, each
//! with the way back, or a refusal with its numbers. Pure: the executor that carries a plan out chooses nothing, and the
//! planner knows nothing of sockets, clocks or backends beyond their words for the steps.

mod admission;
mod capabilities;
mod checks;
mod parts;
mod power;
mod prepare;
mod resize;
mod restart;
mod scalar;
mod settle;
pub mod states;
mod steps;
mod targets;
#[cfg(test)]
pub(crate) mod tests;
mod undo;
mod words;

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use admission::{HostCapacity, caps, charge_of, start_charge};
pub use capabilities::capabilities;
pub use power::{restart, resume, start, stop, suspend};
pub use prepare::{Preparation, headroom, prepare};
pub use resize::{redefinition, resize};
pub use settle::{
    Reached, may_be_ours, may_stand_unseen, obeyed, overwritten, reached, same_cpu_time, unchanged_since,
};
pub use targets::{Aim, Standing, Targets};
pub use undo::undo;
pub use words::describe;

use crate::api::{Hold, HoldKind};
use crate::config::{Config, Rules};
use crate::error::{Code, Problem};
use crate::instance::{Field, Observed, Ref, State};
use crate::ledger::{Charge, Ledger};
use crate::operation::Identity;
use crate::units::{ByteCount, Cpus, Limit};

/// What a plan is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verb {
    /// Change CPUs and memory.
    Resize,
    /// Bring it up.
    Start,
    /// Bring it down.
    Stop,
    /// Take an earlier change back.
    Undo,
    /// Put headroom into what is saved.
    Prepare,
    /// Bring it down and up again.
    Restart,
    /// Pause it and hold it.
    Suspend,
    /// Lift the hold of a suspension and wake it.
    Resume,
}

impl Verb {
    /// Whether it changes CPUs and memory, not whether the instance runs.
    pub const fn resizes(self) -> bool {
        matches!(self, Verb::Resize | Verb::Undo | Verb::Prepare)
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verb::Resize => "resize",
            Verb::Start => "start",
            Verb::Stop => "stop",
            Verb::Undo => "undo",
            Verb::Prepare => "prepare",
            Verb::Restart => "restart",
            Verb::Suspend => "suspend",
            Verb::Resume => "resume",
        })
    }
}

/// Which of an instance's two sets of values a step sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// What runs.
    Live,
    /// What the next start will have.
    Saved,
    /// Both, in one call.
    Both,
}

/// Absolute values for one atomic call; an absent field stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Values {
    /// vCPUs or CPU limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<Limit<Cpus>>,
    /// CPU-time cap of a whole VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_limit: Option<Limit<Cpus>>,
    /// Memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Limit<ByteCount>>,
    /// Of `memory`, what a virtio-mem device is asked to give, where that is what the call is about; else it is about the
    /// balloon, and the device stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plugged: Option<ByteCount>,
}

impl Values {
    /// The fields that are set.
    pub fn fields(&self) -> Vec<Field> {
        let set = [
            self.cpus.map(|_| Field::Cpus),
            self.cpu_limit.map(|_| Field::CpuLimit),
            self.memory.map(|_| Field::Memory),
        ];
        set.into_iter().flatten().collect()
    }

    /// Those of these values that `other` doesn't set, or sets to something else.
    fn beside(&self, other: &Values) -> Values {
        Values {
            cpus: self.cpus.filter(|_| self.cpus != other.cpus),
            cpu_limit: self.cpu_limit.filter(|_| self.cpu_limit != other.cpu_limit),
            memory: self.memory.filter(|_| self.memory != other.memory),
            plugged: None,
        }
    }

    /// Whether every field that `part` sets is set here to the same value.
    fn include(&self, part: &Values) -> bool {
        (part.cpus.is_none() || part.cpus == self.cpus)
            && (part.cpu_limit.is_none() || part.cpu_limit == self.cpu_limit)
            && (part.memory.is_none() || part.memory == self.memory)
    }
}

/// How far a VM's saved definition lets it grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Headroom {
    /// vCPUs.
    pub cpus: Option<Cpus>,
    /// Memory.
    pub memory: Option<ByteCount>,
    /// The memory that the next start gives, where that is what it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boots_with: Option<ByteCount>,
}

/// What a VM's saved definition is to be changed to; an absent field stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redefinition {
    /// Room for later growth without a restart, no more than this.
    Headroom(Headroom),
    /// What the next start is to have.
    Boot {
        /// A maximum of vCPUs that is at least this.
        cpus: Option<Cpus>,
        /// Exactly this much memory, what memory devices are to give at once included.
        memory: Option<ByteCount>,
    },
}

/// One atomic call to a backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "kebab-case")]
pub enum Action {
    /// Set these values.
    Set {
        /// Where.
        scope: Scope,
        /// To what.
        values: Values,
    },
    /// Put back what was there, from the backend's own values.
    Restore {
        /// Where.
        scope: Scope,
        /// What it reads as afterwards.
        values: Values,
        /// What is saved afterwards, where that is something else than what runs.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        saved: Option<Values>,
        /// The backend's values, verbatim, as `Observed::native` had them.
        native: serde_json::Value,
    },
    /// Replace the saved definition.
    Define {
        /// How far it lets the VM grow.
        headroom: Headroom,
        /// The backend's definition.
        definition: serde_json::Value,
        /// The one that must still be there.
        before: serde_json::Value,
    },
    /// Bring it up.
    Start,
    /// Bring it up, so that it has what was saved for it.
    Boot {
        /// What it has then.
        values: Values,
    },
    /// Ask it to go down.
    Shutdown,
    /// Switch it off hard.
    Kill,
    /// Bring it down and up again, in one go of its engine's.
    Restart {
        /// The run that is to end.
        boot: Option<String>,
    },
    /// Freeze it.
    Pause,
    /// Let it run on.
    Unpause,
}

impl Action {
    /// Where it sets which values; `None` where it sets none.
    pub const fn sets(&self) -> Option<(Scope, &Values)> {
        match self {
            Action::Set { scope, values } | Action::Restore { scope, values, .. } => Some((*scope, values)),
            Action::Define { .. }
            | Action::Start
            | Action::Boot { .. }
            | Action::Shutdown
            | Action::Kill
            | Action::Restart { .. }
            | Action::Pause
            | Action::Unpause => None,
        }
    }

    /// What is saved when it is done, where it saves anything.
    pub fn saves(&self) -> Option<&Values> {
        match self {
            Action::Restore { saved: Some(saved), .. } => Some(saved),
            _ => self.sets().filter(|(scope, _)| *scope != Scope::Live).map(|(_, values)| values),
        }
    }

    /// Whether what it sets can still be read back when `later` is done, too: that sets other fields, or the other side where
    /// each side is set by itself.
    pub fn outlasts(&self, later: &Action) -> bool {
        let (Some((scope, values)), Some((other, others))) = (self.sets(), later.sets()) else { return false };
        let apart = matches!((scope, other), (Scope::Live, Scope::Saved) | (Scope::Saved, Scope::Live));
        apart || values.fields().iter().all(|field| !others.fields().contains(field))
    }

    /// Whether it concerns one run of its instance.
    pub fn is_live(&self) -> bool {
        self.sets().is_some_and(|(scope, _)| scope != Scope::Saved)
    }

    /// Whether it brings its instance up.
    pub const fn starts(&self) -> bool {
        matches!(self, Action::Start | Action::Boot { .. })
    }
}

/// How sure it is that a step can be taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UndoClass {
    /// Taking it back is as sure as doing it.
    Exact,
    /// Taking it back needs the guest.
    Attempt,
    /// It can't be taken back.
    None,
}

/// What must be seen after a step, and for how long it is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Settle {
    /// At once, or the step has failed.
    AtOnce,
    /// The guest must obey; bounded by the request's wait. Late is pending, a silent guest fails the step.
    Guest,
    /// The state must be reached within this time. Late is pending.
    Within(Duration),
}

/// One step of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Step {
    /// What it does, in the backend's words.
    pub what: String,
    /// What takes it back, in the backend's words.
    pub undo_what: Option<String>,
    /// The call.
    pub action: Action,
    /// The call that takes it back.
    pub undo: Option<Action>,
    /// How sure that is.
    pub class: UndoClass,
    /// What must be seen afterwards.
    pub settle: Settle,
}

impl Step {
    /// Whether its beginning is on record before it begins. What an exact step did can be told from what is seen; what waits
    /// for a guest, or can't be taken back for sure, can't.
    pub fn is_marked(&self) -> bool {
        self.class != UndoClass::Exact || self.settle != Settle::AtOnce
    }
}

/// What a change makes of the hold of a suspension.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mark", rename_all = "kebab-case")]
pub enum Mark {
    /// It is put.
    Hold {
        /// Why, in the words of who asked.
        reason: String,
        /// The state that a resume puts back.
        before: State,
    },
    /// It is lifted.
    Lift,
}

/// What will be done, so specific that the executor chooses nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// To which instance.
    pub reference: Ref,
    /// And to which one exactly.
    pub identity: Identity,
    /// What was asked for.
    pub verb: Verb,
    /// The values before and the values asked for.
    pub targets: Targets,
    /// The steps, in order; none where it is already so.
    pub steps: Vec<Step>,
    /// What the instance is charged while the plan runs; admitted against the ledger that the planner was given.
    pub charge: Charge,
    /// The operation that it takes back.
    pub undoes: Option<String>,
    /// For how many milliseconds it is meant to last, where it goes back by itself.
    pub lent_ms: Option<u64>,
    /// What becomes of the instance's hold once the steps are done.
    pub mark: Option<Mark>,
    /// What a person should know.
    pub notes: Vec<String>,
}

impl Plan {
    /// Whether there is anything to do.
    pub fn does_nothing(&self) -> bool {
        self.steps.is_empty() && self.mark.is_none()
    }

    /// Whether it takes its instance down and brings it up again.
    pub fn restarts(&self) -> bool {
        self.steps.iter().any(|step| matches!(step.action, Action::Boot { .. }))
    }

    /// A plan with nothing in it yet: no step, no charge.
    pub fn empty(reference: Ref, identity: Identity, verb: Verb) -> Self {
        Plan {
            reference,
            identity,
            verb,
            targets: Targets::default(),
            steps: Vec::new(),
            charge: Charge::ZERO,
            undoes: None,
            lent_ms: None,
            mark: None,
            notes: Vec::new(),
        }
    }
}

/// All that a plan is made from, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The latest observation of the instance.
    pub observed: &'a Observed,
    /// What blocks its changes.
    pub holds: &'a [Hold],
    /// The config.
    pub config: &'a Config,
    /// What the config's limits say of this instance.
    pub rules: &'a Rules,
    /// What the host has.
    pub host: HostCapacity,
    /// What everybody is charged, this instance's latest observation included.
    pub ledger: &'a Ledger,
}

impl Inputs<'_> {
    /// Refuses what a hold or the instance's owner forbids.
    fn refuse_if_blocked(&self) -> Result<(), Problem> {
        self.refuse_if_held(|_| true)
    }

    /// The same of what has to do with this kind of hold itself.
    fn refuse_if_blocked_but_by(&self, own: HoldKind) -> Result<(), Problem> {
        self.refuse_if_held(|hold| hold.hold != own)
    }

    fn refuse_if_held(&self, by: impl Fn(&&Hold) -> bool) -> Result<(), Problem> {
        let reference = &self.observed.reference;
        if let Some(hold) = self.holds.iter().find(by) {
            let hint = match hold.hold {
                HoldKind::Suspended => "`ctl resume` it first; stop --force still works",
                HoldKind::NeedsAttention => {
                    "look at it with `ctl show`, put right what is wrong, then `ctl clear-hold` it; stop still works"
                }
                HoldKind::Recovering => "the hold ends by itself once its backend answers; stop still works",
            };
            let detail = format!("{reference} is held ({}): {}", hold.hold.as_str(), hold.reason);
            return Err(Problem::new(Code::Held, detail).hint(hint));
        }
        match &self.observed.unchangeable {
            Some(why) => Err(Problem::new(Code::Unsupported, format!("{reference} can't be changed here: {why}"))),
            None => Ok(()),
        }
    }

    /// A plan that does nothing.
    pub fn nothing(&self, verb: Verb) -> Plan {
        self.empty_plan(verb)
    }

    /// A plan with nothing in it yet, charged as its instance is.
    fn empty_plan(&self, verb: Verb) -> Plan {
        let (reference, identity) = (self.observed.reference.clone(), Identity::of(self.observed));
        let charge = self.ledger.charge(&self.observed.instance_id());
        Plan { charge, ..Plan::empty(reference, identity, verb) }
    }
}
