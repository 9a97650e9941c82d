//! What a backend is: the one small trait between the daemon and an engine, the same for libvirt, Docker and the fake.
//! Units of engines (KiB, microseconds, NanoCPUs) never leave the module of their backend.

mod cgroup;
pub mod docker;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
#[cfg(feature = "fake")]
pub mod fuzzing;
pub mod libvirt;
mod logs;
pub(crate) mod timed;
pub mod units;

use std::collections::BTreeMap;
use std::time::Duration;

use agentd_core::error::{Code, Problem};
use agentd_core::instance::{Kind, Observed, Ref};
use agentd_core::operation::Identity;
use agentd_core::plan::{Action, Preparation, Redefinition};
use agentd_core::usage::Counters;
use async_trait::async_trait;
use tokio::sync::mpsc;

pub use self::logs::{LogAsk, LogFrames};

/// Why a call to a backend gave nothing.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BackendError {
    /// The engine's daemon does not answer: nothing was done.
    #[error("{0}")]
    Unavailable(String),
    /// There is no such instance, or it is another one by now.
    #[error("{0}")]
    NotFound(String),
    /// A name prefix fits several.
    #[error("{0}")]
    Ambiguous(String),
    /// The engine refused or failed. What of it took effect must be observed.
    #[error("{0}")]
    Failed(String),
    /// The engine can't do this for this instance: nothing was done.
    #[error("{0}")]
    Unsupported(String),
    /// The instance is in a state that doesn't allow this: nothing was done.
    #[error("{0}")]
    InvalidState(String),
    /// The guest was asked and has not obeyed within the engine's own time; it may yet.
    #[error("{0}")]
    GuestLate(String),
    /// Our deadline passed while the call was under way: nobody knows yet what came of it.
    #[error("{0}")]
    Timeout(String),
    /// Too many calls are overdue already: nothing was done.
    #[error("{0}")]
    Overloaded(String),
}

impl BackendError {
    /// The code that a caller is told.
    pub fn code(&self) -> Code {
        match self {
            BackendError::Unavailable(_) => Code::BackendUnavailable,
            BackendError::NotFound(_) => Code::NotFound,
            BackendError::Ambiguous(_) => Code::Ambiguous,
            BackendError::Failed(_) | BackendError::GuestLate(_) => Code::BackendFailed,
            BackendError::Unsupported(_) => Code::Unsupported,
            BackendError::InvalidState(_) => Code::InvalidState,
            BackendError::Timeout(_) => Code::BackendTimeout,
            BackendError::Overloaded(_) => Code::Overloaded,
        }
    }
}

impl From<BackendError> for Problem {
    fn from(error: BackendError) -> Problem {
        Problem::new(error.code(), error.to_string())
    }
}

/// How closely to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// What the engine and the kernel tell at once.
    Plain,
    /// The same to read back a change of ours: what that can't have touched may be told as it was seen within the last second.
    Back,
    /// Also how much memory is in use inside, asking the guest and waiting for its answer for at most this long.
    Usage(Duration),
}

/// What an engine announces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Something changed about the instance with this name or id.
    Instance(String),
    /// Something changed, or may have: look at all.
    All,
}

/// An engine. `timed.rs` hands each of its calls on.
#[async_trait]
pub trait Backend: Send + Sync {
    /// The kind of instances that it has.
    fn kind(&self) -> Kind;

    /// Its name and where it is, for people: `libvirt qemu:///system`.
    fn name(&self) -> String;

    /// Its version where it answers, else [`BackendError::Unavailable`] with why and what to do.
    async fn health(&self) -> Result<String, BackendError>;

    /// Every instance. One that vanishes or can't be read while the list is made is left out or shown as
    /// `State::Unknown`; it never fails the whole list.
    async fn list(&self) -> Result<Vec<Observed>, BackendError>;

    /// The ids of the instances that came, went, or are seen to be in another state or of another size than when this was last
    /// asked, all of them at first: what one question to the engine tells, however many instances there are. Together with
    /// [`Backend::watch`] it keeps a listing true. [`BackendError::Unsupported`] where only [`Backend::list`] tells.
    async fn stirred(&self) -> Result<Vec<String>, BackendError> {
        Err(BackendError::Unsupported("only a listing tells".into()))
    }

    /// One instance by its name, UUID, or id prefix (6 characters or more). The answer's `reference` has its proper name.
    async fn observe(&self, name: &str, look: Look) -> Result<Observed, BackendError>;

    /// What was counted by now of an instance that was seen up: CPU time, what limits held back, OOM kills.
    async fn counters(&self, observed: &Observed) -> Result<Counters, BackendError> {
        Err(BackendError::Unsupported(format!("nobody counts what {} uses", observed.reference)))
    }

    /// One atomic step on exactly this instance: [`BackendError::NotFound`] where id or boot are not those of `identity`
    /// (boot is not compared for what concerns the saved form or for a start). Returns once the engine has accepted;
    /// what came of it is for `observe`.
    async fn apply(&self, target: &Ref, identity: &Identity, action: &Action) -> Result<(), BackendError>;

    /// What becomes of the saved definition of exactly this instance when it is changed so. Changes nothing.
    async fn redefine(
        &self,
        target: &Ref,
        _identity: &Identity,
        _redefinition: &Redefinition,
    ) -> Result<Preparation, BackendError> {
        Err(BackendError::Unsupported(format!("{target} has no definition that could be changed")))
    }

    /// The log of exactly this instance. What it can't give of what is asked is [`BackendError::Unsupported`], with why. Whoever
    /// drops the log ends whatever reads it.
    async fn logs(&self, target: &Ref, _identity: &Identity, _ask: &LogAsk) -> Result<LogFrames, BackendError> {
        Err(BackendError::Unsupported(format!("{target} has no log that could be read")))
    }

    /// Whether a call that changes this instance is still under way: one that ran into its deadline, or one that an earlier
    /// life of the daemon left behind in the engine.
    async fn is_under_way(&self, _identity: &Identity) -> bool {
        false
    }

    /// Sends what the engine and the kernel announce of its instances, until the engine is lost; then it is called again.
    /// Begins with [`Notice::All`] once it listens, because what happened before was not heard.
    /// Announcements are hints: they say where to look, and some changes have none.
    async fn watch(&self, _notices: mpsc::Sender<Notice>) -> BackendError {
        std::future::pending().await
    }

    /// Reminds the backend of what it told in an earlier life of the daemon and the engine itself can't tell, from the last
    /// observation of that life.
    fn recall(&self, _observed: &Observed) {}

    /// Tells the backend of a step that an earlier life of the daemon may have carried out on this instance, though nothing of
    /// it is seen: what the guest still does about it is ours, and not somebody else's.
    fn may_have_been_asked(&self, _action: &Action, _observed: &Observed) {}
}

/// The ids of what differs between what was told of all the last time and what is told now, which takes its place.
fn differing<T: PartialEq>(last: &mut BTreeMap<String, T>, now: BTreeMap<String, T>) -> Vec<String> {
    let gone = last.keys().filter(|id| !now.contains_key(*id));
    let other = now.iter().filter(|(id, told)| last.get(*id) != Some(*told)).map(|(id, _)| id);
    let stirred = gone.chain(other).cloned().collect();
    *last = now;
    stirred
}

/// A step is for the run that it was planned on. One planned while the instance was down is not for one that runs.
fn check_boot(target: &Ref, identity: &Identity, boot: Option<String>) -> Result<(), BackendError> {
    if boot == identity.boot {
        return Ok(());
    }
    let what = match (&identity.boot, boot) {
        (None, _) => "was started",
        (Some(_), None) => "went down",
        (Some(_), Some(_)) => "was restarted",
    };
    Err(BackendError::NotFound(format!("{target} {what} meanwhile")))
}
