//! The walk of a change: observe, plan, reserve, record, execute, settle the book, reply. It runs in a task of its own, so
//! that a caller that goes away changes nothing.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use agentd_core::access::Right;
use agentd_core::api::{Happening, HistoryEntry, HoldKind, OperationView, PrepareRequest, ResizeRequest};
use agentd_core::drift::made;
use agentd_core::error::{Code, Problem};
use agentd_core::instance::{Observed, State, Target, Usage};
use agentd_core::ledger::Charge;
use agentd_core::operation::{Identity, Operation, Outcome};
use agentd_core::plan::{
    Inputs, Mark, Plan, Preparation, Redefinition, Verb, headroom, prepare, redefinition, resize, restart, resume,
    start, stop, suspend, undo,
};
use futures_util::FutureExt;
use tokio::time::Instant;

use super::{Engine, Failure, Peer, Queued, not_found};
use crate::backend::{BackendError, Look};
use crate::clock::{millis, now_ms, uptime};
use crate::executor::{Ended, Executor, unrecorded};
use crate::inventory::Book;
use crate::store::{Entry, Key, Reply, Told};

/// How old the inventory of an engine may be when a growth is admitted against it, where following it doesn't tell all.
const ADMISSION_AGE: Duration = Duration::from_secs(2);
/// How long a guest may take to tell what it uses.
const USAGE_TIME: Duration = Duration::from_secs(5);

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum Wish {
    /// Change CPUs and memory, waiting this long for the guest; with what the backend makes of the definition, once it was
    /// asked.
    Resize(ResizeRequest, Duration, Option<Box<Preparation>>),
    /// Bring it down.
    Stop {
        /// How long a graceful stop may take; the config's where absent.
        timeout: Option<Duration>,
        /// Hard when that is over.
        force: bool,
    },
    /// Bring it up.
    Start,
    /// Bring it down and up again.
    Restart {
        /// How long a graceful stop may take; the config's where absent.
        timeout: Option<Duration>,
        /// Hard when that is over.
        force: bool,
    },
    /// Pause it and hold it.
    Suspend {
        /// Why.
        reason: String,
    },
    /// Lift that hold and let it run on.
    Resume,
    /// Take this change back, waiting this long for the guest.
    Undo(Box<Operation>, Duration),
    /// Put headroom into what is saved; with what the backend makes of it, once it was asked.
    Prepare(PrepareRequest, Option<Box<Preparation>>),
}

impl Wish {
    pub(super) fn verb(&self) -> Verb {
        match self {
            Wish::Resize(..) => Verb::Resize,
            Wish::Stop { .. } => Verb::Stop,
            Wish::Start => Verb::Start,
            Wish::Restart { .. } => Verb::Restart,
            Wish::Suspend { .. } => Verb::Suspend,
            Wish::Resume => Verb::Resume,
            Wish::Undo(..) => Verb::Undo,
            Wish::Prepare(..) => Verb::Prepare,
        }
    }
}

/// A change as it comes in.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Of what.
    pub target: Target,
    /// What.
    pub wish: Wish,
    /// The right that it needs on its target.
    pub right: Right,
    /// Plan only.
    pub dry_run: bool,
    /// The version that the instance must still have.
    pub if_version: Option<String>,
}

impl Engine {
    /// Makes a change, or plans it. Ends when the change has ended.
    pub(super) async fn change(&self, id: String, peer: Peer, ask: Ask, key: Option<Key>) -> Reply {
        let began = Instant::now();
        self.refuse_when_read_only(&ask)?;
        // A record in trouble is asked once more whether it takes anything: before that nothing is looked at, and nothing is
        // refused that would have to be recorded.
        if !ask.dry_run && self.store().trouble().is_some() {
            self.store().commit(Vec::new()).await.map_err(|error| unrecorded(&error))?;
        }
        let seen = self.find(&peer, &ask.target).await?;
        match self.authorize(&peer, ask.right, &seen, &ask.target) {
            Ok(rule) => {
                let (who, instance, verb) = (&peer.who, &seen.reference, ask.wish.verb());
                let dry = if ask.dry_run { "dry run of a " } else { "" };
                tracing::info!(
                    operation = %id, %instance, uid = who.uid, pid = who.pid, rule, %verb,
                    "{dry}{verb} of {instance} asked for by {who}, allowed by {rule}"
                );
            }
            Err(problem) => {
                self.record_refusal(&id, &peer, &ask, &seen, &problem, None).await;
                return Err(problem.into());
            }
        }

        if ask.dry_run {
            let seen = self.look_closer(&ask, seen).await?;
            let ask = self.with_definition(ask, &seen).await?;
            let observed = self.prepare_to_plan(&ask, seen).await?;
            let (plan, observed) = self.plan_on(&self.book(), &peer, &ask, &observed)?;
            return Ok(self.planned(plan, &observed));
        }
        let instance = seen.instance_id();
        let queued = match Queued::enter(self.slot(&instance), &seen.reference) {
            Ok(queued) => queued,
            Err(problem) => {
                self.record_refusal(&id, &peer, &ask, &seen, &problem, None).await;
                return Err(problem.into());
            }
        };
        let waited = queued.0.turn.try_lock().is_err();
        let _turn = queued.0.turn.lock().await;
        // A change that ended since makes what was seen before stale, also where this one had not to wait for it.
        let stale = waited || self.book().get(&instance).is_none_or(|known| known.observed != seen);
        let seen = if stale { self.find(&peer, &ask.target).await? } else { seen };
        let still = self.authorize(&peer, ask.right, &seen, &ask.target);
        let same = if seen.instance_id() == instance { Ok(()) } else { Err(another_by_now(&seen)) };
        if let Err(problem) = still.and(same).and_then(|()| self.refuse_when_read_only(&ask)) {
            self.record_refusal(&id, &peer, &ask, &seen, &problem, None).await;
            return Err(problem.into());
        }

        let seen = match self.look_closer(&ask, seen.clone()).await {
            Ok(seen) => seen,
            Err(problem) => {
                self.record_refusal(&id, &peer, &ask, &seen, &problem, key).await;
                return Err(problem.into());
            }
        };
        let ask = match self.with_definition(ask.clone(), &seen).await {
            Ok(ask) => ask,
            Err(problem) => {
                self.record_refusal(&id, &peer, &ask, &seen, &problem, key).await;
                return Err(problem.into());
            }
        };
        let (plan, observed) = match self.plan_and_reserve(&peer, &ask, seen).await {
            Ok(planned) => planned,
            Err((problem, observed)) => {
                self.record_refusal(&id, &peer, &ask, &observed, &problem, key).await;
                return Err(problem.into());
            }
        };
        let mut operation = Operation::new(id, peer.who.clone(), plan, now_ms());
        operation.started_up = operation.lent_ms.and_then(|_| uptime());
        if operation.does_nothing() {
            operation.succeed();
            operation.elapsed_ms = millis(began.elapsed());
            let reply = Ok(self.view(&operation, Some(&observed)));
            let mut entries = self.end_of(&operation, &reply, Some(&observed));
            entries.extend(key.map(Entry::Key));
            self.store().commit_and_keep(entries).await.map_err(|error| unrecorded(&error))?;
            return reply;
        }
        // With the mark of its first step that has one: that is a commit less.
        let mut intended = operation.clone();
        let marked = intended.mark_ahead();
        let mut intent = vec![Entry::Operation(Box::new(intended), None)];
        // With what is known of the instance: a recovery holds it by that.
        intent.extend(self.book().entry(&instance));
        intent.extend(key.map(Entry::Key));
        if let Err(error) = self.store().commit(intent).await {
            // Nothing has happened to it since.
            let mut book = self.book();
            let seen = Some((observed, book.moment()));
            let settled = !self.store().has_open_beside(&operation);
            book.end(&operation, seen, &self.settings().config, settled);
            let missed = book.was_missed(&instance);
            drop(book);
            if missed {
                self.look_soon(&instance);
            }
            return Err(unrecorded(&error).into());
        }
        self.execute(operation, marked, &ask, began).await
    }

    /// Executes what is planned, reserved and recorded; settles the book; replies.
    async fn execute(
        &self,
        mut operation: Operation,
        marked: Option<usize>,
        ask: &Ask,
        began: Instant,
    ) -> Result<OperationView, Failure> {
        let instance = operation.instance_id();
        let wait = match &ask.wish {
            Wish::Resize(_, wait, _) | Wish::Undo(_, wait) => *wait,
            _ => Duration::ZERO,
        };
        let backend = self.backend(instance.kind)?;
        let moment = || self.book().moment();
        let executor = Executor::new(&*backend, self.store(), &mut operation, wait);
        let run = executor.marked(marked).stamped(&moment).run();
        let ended = AssertUnwindSafe(run).catch_unwind().await;
        let (ended, seen) = ended.unwrap_or_else(|_| (Ended::by_defect(&mut operation, "a change"), None));

        // The look after the last step of a change that went well is as good as another one.
        let (look, begun) = match seen {
            Some((observed, begun)) => (Ok(observed), begun),
            None => {
                let begun = moment();
                (backend.observe(&operation.identity.id, Look::Plain).await, begun)
            }
        };
        let gone = matches!(look, Err(BackendError::NotFound(_)));
        let observed = look.ok();
        let (drift, missed) = {
            let mut book = self.book();
            if let Some(observed) = &observed {
                operation.reference = observed.reference.clone();
            }
            let seen = observed.clone().map(|observed| (observed, begun));
            // A stop passes a hold of an unknown outcome, and may end before or after what that is of.
            let settled = !operation.is_open() && !self.store().has_open_beside(&operation);
            let drift = book.end(&operation, seen, &self.settings().config, settled);
            if gone && !operation.is_open() {
                book.drop_gone(&instance);
            }
            match &ended.hold {
                Some((HoldKind::Recovering, reason)) => book.recovering(&operation, reason.clone()),
                Some((hold, reason)) => book.hold(&instance, *hold, reason.clone()),
                None => {}
            }
            (drift, book.was_missed(&instance))
        };
        if missed {
            self.look_soon(&instance);
        }
        if let Some(observed) = &observed {
            operation.note_stop(observed);
            operation.note_restart(observed);
        }
        operation.elapsed_ms = millis(began.elapsed());
        let reply = self.end(&operation, ended, observed.as_ref()).await;
        self.drifted(drift);
        self.watch_over(&operation);
        if operation.is_open() {
            self.recover(vec![operation]);
        }
        reply
    }

    /// Puts the end of an operation on record, and tells what its caller is told.
    pub(super) async fn end(&self, operation: &Operation, ended: Ended, observed: Option<&Observed>) -> Reply {
        self.log(operation, observed);
        let view = self.view(operation, observed);
        let reply = match ended.problem {
            Some(problem) => Err(Failure { problem, operation: Some(Box::new(view)) }),
            None => Ok(view),
        };
        let Some(unrecorded) = self.record_end(operation, &reply, observed).await else { return reply };
        Err(match reply {
            Ok(view) => Failure { problem: unrecorded, operation: Some(Box::new(view)) },
            Err(mut failure) => {
                failure.problem.detail = format!("{}; {}", failure.problem.detail, unrecorded.detail);
                failure
            }
        })
    }

    /// Puts the end of an operation on record with what it left behind. What the disk doesn't take now it is given again
    /// later, and the caller is told.
    pub(super) async fn record_end(
        &self,
        operation: &Operation,
        reply: &Reply,
        observed: Option<&Observed>,
    ) -> Option<Problem> {
        let entries = self.end_of(operation, reply, observed);
        let error = self.store().commit_and_keep(entries).await.err()?;
        let detail = format!(
            "the change of {} ended as {}, and that could not be recorded yet: {error}",
            operation.reference,
            operation.outcome.as_str()
        );
        tracing::error!(operation = operation.id, "{detail}");
        Some(
            Problem::new(Code::StoreUnavailable, detail)
                .hint("it is recorded as soon as the disk takes it; see `ctl health`"),
        )
    }

    fn end_of(&self, operation: &Operation, reply: &Reply, observed: Option<&Observed>) -> Vec<Entry> {
        let mut entries = vec![Entry::Operation(Box::new(operation.clone()), Some(Box::new(reply.clone())))];
        entries.push(told(operation, observed));
        // With its hold, where that left one, and with what others changed meanwhile: none is on record without the other. It
        // comes after the change, whose values it is told from.
        entries.extend(self.book().take_unrecorded_and(operation.instance_id()));
        entries
    }

    /// A wish that needs another saved definition, with what its backend makes of that; any other wish as it is.
    async fn with_definition(&self, mut ask: Ask, seen: &Observed) -> Result<Ask, Problem> {
        let wanted = {
            let (book, settings) = (self.book(), self.settings());
            with_inputs(&book, &settings, seen, |inputs| match &ask.wish {
                Wish::Prepare(request, _) => Ok(Some(Redefinition::Headroom(headroom(inputs, request)?.0))),
                Wish::Resize(request, ..) => Ok::<_, Problem>(redefinition(inputs, request)),
                _ => Ok(None),
            })?
        };
        let (Some(wanted), Wish::Prepare(_, made) | Wish::Resize(_, _, made)) = (wanted, &mut ask.wish) else {
            return Ok(ask);
        };
        let backend = self.backend(seen.reference.kind())?;
        *made = Some(Box::new(backend.redefine(&seen.reference, &Identity::of(seen), &wanted).await?));
        Ok(ask)
    }

    fn refuse_when_read_only(&self, ask: &Ask) -> Result<(), Problem> {
        if self.settings().config.server.read_only && !ask.dry_run {
            return Err(Problem::new(Code::Forbidden, "changes are switched off on this host")
                .hint("[server] read_only in the config file is true"));
        }
        Ok(())
    }

    /// Plans and reserves the charge, both under one hold of the book.
    async fn plan_and_reserve(
        &self,
        peer: &Peer,
        ask: &Ask,
        seen: Observed,
    ) -> Result<(Plan, Observed), (Problem, Observed)> {
        let before = seen.clone();
        let observed = self.prepare_to_plan(ask, seen).await.map_err(|problem| (problem, before))?;
        let mut book = self.book();
        let (plan, observed) =
            self.plan_on(&book, peer, ask, &observed).map_err(|problem| (problem, observed.clone()))?;
        if !plan.does_nothing() {
            book.begin(&observed.instance_id(), plan.charge);
        }
        Ok((plan, observed))
    }

    /// Plans on the latest that the book has. Whether the caller may, and the version that it named, are asked of that: it
    /// may have been replaced or changed behind our back while a listing was waited for.
    pub(super) fn plan_on(
        &self,
        book: &Book,
        peer: &Peer,
        ask: &Ask,
        seen: &Observed,
    ) -> Result<(Plan, Observed), Problem> {
        let observed = book.latest(seen).ok_or_else(|| not_found(seen.reference.as_str()))?;
        self.authorize(peer, ask.right, &observed, &ask.target)?;
        check_version(book, ask, &observed)?;
        let plan = plan_with(book, &self.settings(), ask, &observed)?;
        if plan.restarts() {
            self.authorize(peer, Right::Power, &observed, &ask.target)?;
        }
        Ok((plan, observed))
    }

    /// Where a plan turns on what the guest uses, and that is not known, asks the guest for it.
    async fn look_closer(&self, ask: &Ask, seen: Observed) -> Result<Observed, Problem> {
        check_version(&self.book(), ask, &seen)?;
        let planned = self.plan_now(ask, &seen);
        let about_use = matches!(&planned, Err(p) if matches!(p.code, Code::BelowMinimum | Code::GuestSilent));
        if !about_use || matches!(seen.used, Usage::Known(_)) || seen.state != State::Running {
            return Ok(seen);
        }
        let closer = self.observe(seen.reference.kind(), seen.reference.name(), Look::Usage(USAGE_TIME)).await?;
        if closer.instance_id() == seen.instance_id() { Ok(closer) } else { Err(another_by_now(&closer)) }
    }

    /// Sees to it that the inventory is fresh where the change grows.
    async fn prepare_to_plan(&self, ask: &Ask, seen: Observed) -> Result<Observed, Problem> {
        check_version(&self.book(), ask, &seen)?;
        let planned = self.plan_now(ask, &seen);
        match planned {
            Ok(plan) => {
                if grows(self.book().ledger().charge(&seen.instance_id()), plan.charge) {
                    self.refresh_to_admit(ADMISSION_AGE).await;
                }
            }
            // What was promised may have been given back since the last listing.
            Err(problem) if problem.code == Code::CapacityExceeded => self.refresh(Duration::ZERO).await,
            Err(problem) => return Err(problem),
        }
        Ok(seen)
    }

    fn plan_now(&self, ask: &Ask, observed: &Observed) -> Result<Plan, Problem> {
        let book = self.book();
        plan_with(&book, &self.settings(), ask, observed)
    }

    fn planned(&self, plan: Plan, observed: &Observed) -> OperationView {
        let who = agentd_core::operation::Who { uid: 0, gid: 0, pid: 0, command: String::new() };
        let operation = Operation::new(String::new(), who, plan, 0);
        let mut view = self.view(&operation, Some(observed));
        view.operation = None;
        view.who = None;
        view.dry_run = true;
        view.outcome = if operation.does_nothing() { Outcome::Unchanged } else { Outcome::Planned };
        view
    }

    /// The operation with its instance as the book has it now.
    pub(super) fn view(&self, operation: &Operation, observed: Option<&Observed>) -> OperationView {
        let settings = self.settings();
        let book = self.book();
        // By its id only: who has the name now may be none of the caller's business.
        let known = book.get(&operation.instance_id());
        let instance = known.map(|known| book.instance(known, &settings.config));
        OperationView::new(operation, observed, instance)
    }

    /// A refusal is on record too, though it never ran. Where the disk doesn't take it, it is a refusal all the same.
    async fn record_refusal(
        &self,
        id: &str,
        peer: &Peer,
        ask: &Ask,
        observed: &Observed,
        problem: &Problem,
        key: Option<Key>,
    ) {
        let plan = Plan::empty(observed.reference.clone(), Identity::of(observed), ask.wish.verb());
        let mut operation = Operation::new(id.to_owned(), peer.who.clone(), plan, now_ms());
        operation.fail(Outcome::Refused, problem);
        self.log(&operation, None);
        let reply = Box::new(Err(problem.clone().into()));
        let told = told(&operation, None);
        let mut entries = vec![Entry::Operation(Box::new(operation), Some(reply)), told];
        // What may pass the next time is not remembered: trying again is the point.
        if matches!(problem.code.http(), 409 | 429 | 503 | 504) {
            entries.push(Entry::ForgetKey(id.to_owned()));
        } else {
            entries.extend(key.map(Entry::Key));
        }
        if let Err(error) = self.store().commit_and_keep(entries).await {
            tracing::error!(operation = id, "a refusal could not be recorded yet: {error}");
        }
    }

    fn log(&self, operation: &Operation, observed: Option<&Observed>) {
        let (who, verb) = (&operation.who, operation.verb);
        let (uid, pid) = (who.uid, who.pid);
        let (id, instance, outcome) = (&operation.id, &operation.reference, operation.outcome.as_str());
        match &operation.problem {
            None => {
                let moved: Vec<String> = made(operation, observed).iter().map(ToString::to_string).collect();
                let moved = if moved.is_empty() { moved.concat() } else { format!(": {}", moved.join(", ")) };
                tracing::info!(
                    operation = %id, %instance, uid, pid, outcome, %verb,
                    "{verb} of {instance} by {who}: {outcome}{moved}"
                )
            }
            Some((code, detail)) => {
                tracing::warn!(
                    operation = %id, %instance, uid, pid, outcome, %code, %verb,
                    "{verb} of {instance} by {who}: {outcome}, {code}: {detail}"
                );
            }
        }
    }
}

/// A name that goes to another instance in the middle of things.
fn another_by_now(seen: &Observed) -> Problem {
    let detail = format!("{} is another instance by now than when this was asked", seen.reference);
    Problem::new(Code::Busy, detail).hint("look at it, then decide again")
}

fn check_version(book: &Book, ask: &Ask, seen: &Observed) -> Result<(), Problem> {
    let Some(wanted) = &ask.if_version else { return Ok(()) };
    let now = book.get(&seen.instance_id()).map(|known| known.version.clone()).unwrap_or_default();
    if now == *wanted {
        return Ok(());
    }
    Err(Problem::new(
        Code::VersionMismatch,
        format!("{} is at version {now:?}, not at {wanted:?}: it changed meanwhile", seen.reference),
    )
    .hint("look at it again, then decide again"))
}

fn plan_with(book: &Book, settings: &super::Settings, ask: &Ask, observed: &Observed) -> Result<Plan, Problem> {
    with_inputs(book, settings, observed, |inputs| match &ask.wish {
        Wish::Resize(request, _, made) => resize(inputs, request, made.as_deref()),
        Wish::Stop { timeout, force } => stop(inputs, *timeout, *force),
        Wish::Start => start(inputs),
        Wish::Restart { timeout, force } => restart(inputs, *timeout, *force),
        Wish::Suspend { reason } => suspend(inputs, reason),
        Wish::Resume => resume(inputs),
        Wish::Undo(operation, _) => undo(inputs, operation),
        Wish::Prepare(request, Some(made)) => prepare(inputs, request, made),
        Wish::Prepare(request, None) => headroom(inputs, request).map(|_| inputs.nothing(Verb::Prepare)),
    })
}

/// All that core decides from about an instance.
pub(super) fn with_inputs<T>(
    book: &Book,
    settings: &super::Settings,
    observed: &Observed,
    decide: impl FnOnce(&Inputs<'_>) -> T,
) -> T {
    let rules = settings.config.rules_for(observed.reference.as_str(), &observed.labels);
    let holds = book.get(&observed.instance_id()).map(|known| known.holds.clone()).unwrap_or_default();
    let inputs = Inputs {
        observed,
        holds: &holds,
        config: &settings.config,
        rules: &rules,
        host: settings.host,
        ledger: book.ledger(),
    };
    decide(&inputs)
}

fn grows(now: Charge, wanted: Charge) -> bool {
    wanted.cpus > now.cpus || wanted.memory > now.memory
}

/// What the history tells of an operation: once for each outcome that it had.
fn told(operation: &Operation, observed: Option<&Observed>) -> Entry {
    let refused = operation.outcome == Outcome::Refused;
    let happening = if refused { Happening::Refusal } else { Happening::Change };
    let entry = HistoryEntry {
        who: Some(operation.who.clone()),
        operation: Some(operation.id.clone()),
        verb: Some(operation.verb.to_string()),
        outcome: Some(operation.outcome),
        moves: agentd_core::drift::made(operation, observed),
        code: operation.problem.as_ref().map(|(code, _)| *code),
        detail: match (&operation.problem, operation.marks()) {
            (Some((_, detail)), _) => Some(detail.clone()),
            (None, Some(Mark::Hold { reason, .. })) => Some(reason.clone()),
            (None, _) => None,
        },
        ..HistoryEntry::new(happening, &operation.reference, Some(operation.identity.id.clone()))
    };
    let mark = format!("{}/{}", operation.id, operation.outcome.as_str());
    Entry::History(Box::new(Told { entry, at_ms: now_ms(), mark }))
}
