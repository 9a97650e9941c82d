//! Keeps inventory, ledger and record true while nobody asks: what engines announce is looked at soon, everything now and
//! then. What was changed behind the daemon's back is drift: it is told, and put back where the config says so.

use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agentd_core::access::Right;
use agentd_core::api::{Apply, HoldKind, Move, ResizeRequest};
use agentd_core::error::Code;
use agentd_core::instance::{InstanceId, Kind, Observed, Saved, Target};
use agentd_core::operation::REPAIR;
use agentd_core::units::{Amount, Limit};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::loans::Tried;
use super::{Ask, Engine, Peer, Source, Wish, keys};
use crate::backend::{BackendError, Notice};
use crate::clock::{Steady, millis, now_ms, uptime};
use crate::inventory::Drift;

/// How many announcements may wait; when there are more, all is looked at.
const NOTICES: usize = 1024;
/// Announcements come in bursts: all of one are looked at together.
const BURST: Duration = Duration::from_millis(100);
/// systemd may still be setting cgroups when it says that it has read its units anew.
const RELOADED: Duration = Duration::from_millis(500);
/// How many instances of a kind that is followed are looked at each time, whatever was heard of them: of those that are up.
const ROUND: usize = 20;
/// How long a lost engine is left alone before it is watched again.
const RECONNECT: Duration = Duration::from_secs(1);
/// How long an engine that could not tell what stirs is left alone before it is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(10);
/// How often what changed of the inventory goes on record, and what is due is looked for.
const SECOND: Duration = Duration::from_secs(1);
/// How often what is too old is removed from the record.
const PRUNING: Duration = Duration::from_secs(3600);
/// How long what moves may take to come to rest before it is put back.
const AT_REST: Duration = Duration::from_secs(1);
/// How long a value that was put back is left alone: two who put back each other's values should not keep the host busy.
const REPAIR_PAUSE: Duration = Duration::from_secs(10);
/// How long a repair waits for a guest.
const REPAIR_WAIT: Duration = Duration::from_secs(10);

impl Engine {
    /// Keeps the inventory true: looks at all each `listing`, and at what is announced. Runs until the daemon ends.
    pub fn keep_fresh(&self, listing: Duration) {
        for kind in self.inner.sources.keys().copied() {
            let engine = self.clone();
            tokio::spawn(async move { engine.listen(kind).await });
        }
        let engine = self.clone();
        tokio::spawn(async move {
            loop {
                engine.refresh(Duration::ZERO).await;
                engine.tick(listing).await;
                engine.go_round().await;
            }
        });
        let engine = self.clone();
        tokio::spawn(async move { engine.each_second().await });
    }

    /// Looks at everything after each reload of systemd, which can put old limits back. Runs until the daemon ends.
    pub async fn follow_reloads(&self) {
        let engine = self.clone();
        let look = move || {
            let engine = engine.clone();
            tokio::spawn(async move {
                sleep(RELOADED).await;
                engine.refresh(Duration::ZERO).await;
            });
        };
        crate::systemd::reloads(None, look).await;
    }

    /// Puts on record what waits for it, before the daemon ends.
    pub async fn end_record(&self) {
        let unrecorded = self.book().take_unrecorded();
        if let Err(error) = self.store().commit(unrecorded).await {
            tracing::error!("the last of what was seen could not be recorded: {error}");
        }
    }

    /// Puts on record what was seen, takes back what was lent.
    async fn each_second(&self) {
        let began = Instant::now();
        let up_ms = || uptime().map_or_else(|| millis(began.elapsed()), |up| up.ms);
        let mut steady = Steady::new(now_ms(), up_ms());
        let mut prune_at = began + Duration::from_secs(60);
        let mut tried = Tried::new();
        loop {
            self.tick(SECOND).await;
            self.return_loans(&mut tried);
            let unrecorded = self.book().take_unrecorded();
            self.store().write_later(unrecorded);
            if Instant::now() >= prune_at {
                prune_at = Instant::now() + PRUNING;
                self.inner.keys.drop_over();
                if let Some(ahead) = steady.ahead(now_ms(), up_ms()) {
                    let hours = ahead / 3_600_000;
                    tracing::warn!(
                        "the clock was set ahead by {hours} h: all of the record would look old, and nothing is removed from it yet"
                    );
                    continue;
                }
                let retention = self.settings().config.server.history_retention;
                self.store()
                    .prune(now_ms().saturating_sub(millis(retention)), now_ms().saturating_sub(millis(keys::KEPT)));
            }
        }
    }

    /// Of the kinds that are followed, looks at some more of what nothing was heard of: not all changes are announced, and an idle
    /// daemon on a host with many instances should not take more of it than on one with few.
    async fn go_round(&self) {
        for (kind, source) in self.inner.sources.iter().filter(|(_, source)| source.is_followed()) {
            let next = {
                let mut following = source.following();
                let next = self.book().next_of(*kind, following.round.as_ref(), ROUND);
                following.round = next.last().cloned();
                next
            };
            self.look_again(*kind, next.into_iter().map(|instance| instance.id)).await;
        }
    }

    async fn listen(&self, kind: Kind) {
        let Ok(source) = self.source(kind) else { return };
        loop {
            let (send, notices) = mpsc::channel(NOTICES);
            let hears = AtomicBool::new(true);
            let watch = async {
                let lost = source.backend.watch(send).await;
                hears.store(false, Ordering::Release);
                source.following().heard = None;
                lost
            };
            let (lost, ()) = tokio::join!(watch, self.follow(kind, source, notices, &hears));
            tracing::debug!(%kind, error = %lost, "announcements have ended");
            sleep(RECONNECT).await;
            // What happened meanwhile was announced to nobody.
            self.refresh_kind(kind, Duration::ZERO).await;
        }
    }

    /// Looks at what is announced, until nothing is any more.
    async fn follow(&self, kind: Kind, source: &Source, mut notices: mpsc::Receiver<Notice>, hears: &AtomicBool) {
        let mut missed = false;
        loop {
            let first = if missed {
                timeout(ASK_AGAIN, notices.recv()).await.unwrap_or(Some(Notice::All))
            } else {
                notices.recv().await
            };
            let Some(first) = first else { return };
            let mut all = take(source, first);
            // Who lists everything meanwhile looks at them at once.
            sleep(BURST).await;
            while let Ok(notice) = notices.try_recv() {
                all |= take(source, notice);
            }
            if all {
                let begun = Instant::now();
                // What stirs from here on is told the next time.
                let stirs = source.backend.stirred().await;
                source.following().heard = (stirs.is_ok() && hears.load(Ordering::Acquire)).then_some(begun);
                missed = stirs.is_err_and(|error| !matches!(error, BackendError::Unsupported(_)));
                self.refresh_kind(kind, Duration::ZERO).await;
                continue;
            }
            let looked = {
                // Who asks for a list meanwhile waits for what is looked at here.
                let _looking = source.listed.lock().await;
                let names = std::mem::take(&mut source.following().announced);
                self.look_again(kind, names).await
            };
            if !looked {
                // Gone, or not to be seen: a listing tells which.
                self.refresh_kind(kind, Duration::ZERO).await;
            }
        }
    }

    /// Looks at an instance once more, of which something was announced in the middle of a change.
    pub(super) fn look_soon(&self, instance: &InstanceId) {
        let (engine, InstanceId { kind, id }) = (self.clone(), instance.clone());
        tokio::spawn(async move {
            sleep(BURST).await;
            if !engine.look_again(kind, [id]).await {
                engine.refresh_kind(kind, Duration::ZERO).await;
            }
        });
    }

    /// Tells what was changed behind the daemon's back, and puts it back where the config says so.
    pub(super) fn drifted(&self, drift: impl IntoIterator<Item = Drift>) {
        for drift in drift {
            let (reference, moves) = (&drift.observed.reference, &drift.moves);
            let repair = self.settings().config.rules_for(reference.as_str(), &drift.observed.labels).repair_drift;
            let words: Vec<String> = moves.iter().map(ToString::to_string).collect();
            let words = words.join(", ");
            tracing::warn!(instance = %reference, repair, "{reference} was changed behind agentd's back: {words}");
            let Drift { observed, version, moves } = drift;
            let unrecorded = self.book().take_unrecorded();
            self.store().write_later(unrecorded);
            if repair {
                self.repair_soon(observed, version, moves);
            }
        }
    }

    /// Puts back what moved once it has come to rest. What moves in several goes, a guest's balloon say, is put back to where
    /// it was before the first.
    fn repair_soon(&self, observed: Observed, version: String, moves: Vec<Move>) {
        let mut repairs = self.inner.repairs.lock().unwrap_or_else(PoisonError::into_inner);
        repairs.retain(|_, repair| repair.waits || repair.at.elapsed() < REPAIR_PAUSE);
        let instance = observed.instance_id();
        let known = repairs.get_mut(&instance);
        if let Some(repair) = known.filter(|repair| repair.waits) {
            let moves = repair.moves.drain(..).collect::<Vec<_>>().into_iter().chain(moves);
            repair.moves = first_of_each_side(moves);
            (repair.version, repair.observed) = (version, observed);
            return;
        }
        let pause =
            repairs.get(&instance).map_or(Duration::ZERO, |last| REPAIR_PAUSE.saturating_sub(last.at.elapsed()));
        let at = tokio::time::Instant::now();
        repairs.insert(instance.clone(), Repair { observed, version, moves, at, waits: true });
        let engine = self.clone();
        tokio::spawn(async move {
            sleep(AT_REST.max(pause)).await;
            let repair = {
                let mut repairs = engine.inner.repairs.lock().unwrap_or_else(PoisonError::into_inner);
                repairs.get_mut(&instance).map(|repair| {
                    (repair.waits, repair.at) = (false, tokio::time::Instant::now());
                    repair.clone()
                })
            };
            let Some(Repair { observed, version, moves, .. }) = repair else { return };
            let left = engine.repair(&observed, version, &moves).await;
            if left.is_empty() || engine.put_back_with_next(&instance, &left) {
                return;
            }
            // Drift may have been found a moment ago, and be on its way here.
            sleep(AT_REST).await;
            if !engine.put_back_with_next(&instance, &left) {
                tracing::warn!(%instance, "drift of {instance} was not put back: it was changed on purpose meanwhile");
            }
        });
    }

    /// What moved again before it was put back goes back to where it was before the first move; whether there is such.
    fn put_back_with_next(&self, instance: &InstanceId, left: &[Move]) -> bool {
        let mut repairs = self.inner.repairs.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(next) = repairs.get_mut(instance).filter(|next| next.waits) else { return false };
        next.moves = first_of_each_side(left.iter().cloned().chain(next.moves.drain(..)));
        true
    }

    /// What puts back the suspension of an instance that was woken.
    fn suspension_of(&self, observed: &Observed) -> Option<Wish> {
        let book = self.book();
        let holds = &book.get(&observed.instance_id())?.holds;
        let hold = holds.iter().find(|hold| hold.hold == HoldKind::Suspended)?;
        Some(Wish::Suspend { reason: hold.reason.clone() })
    }

    /// Gives what it could not put back because more had moved meanwhile.
    async fn repair(&self, observed: &Observed, version: String, moves: &[Move]) -> Vec<Move> {
        let none = Vec::new;
        let reference = &observed.reference;
        let peer = Peer::itself(REPAIR);
        // Where one call does both sides, one request is both.
        let sides: &[Option<bool>] =
            if observed.saved == Saved::Together { &[None] } else { &[Some(true), Some(false)] };
        let mut if_version = Some(version);
        if let Some(wish) = self.suspension_of(observed).filter(|_| moves.iter().any(is_state)) {
            let (target, if_version) = (Target::Full(reference.clone()), if_version.take());
            let ask = Ask { target, wish, right: Right::Power, dry_run: false, if_version };
            let ended = match self.submit(peer, ask, None) {
                Ok(submitted) => self.reply(submitted).await.map_err(|failure| failure.problem),
                Err(problem) => Err(problem),
            };
            if let Err(problem) = ended {
                tracing::warn!(instance = %reference, "{reference} was woken and not suspended again: {problem}");
            }
            // What is held is changed by nobody, so that nothing else can have moved.
            return none();
        }
        for (place, side) in sides.iter().enumerate() {
            let Some(request) = back(moves, *side, observed.saved) else { continue };
            let ask = Ask {
                target: Target::Full(reference.clone()),
                wish: Wish::Resize(request, REPAIR_WAIT, None),
                right: Right::Resize,
                dry_run: false,
                // Who changed it on purpose meanwhile is not overruled.
                if_version: if_version.take(),
            };
            let submitted = match self.submit(peer.clone(), ask, None) {
                Ok(submitted) => submitted,
                Err(problem) => {
                    tracing::warn!(instance = %reference, "drift of {reference} was not put back: {problem}");
                    return none();
                }
            };
            match self.reply(submitted).await {
                // And who changes it between the two sides isn't either.
                Ok(view) => match view.instance {
                    Some(instance) => if_version = Some(instance.version),
                    None => {
                        tracing::warn!(instance = %reference, "{reference} is gone, and its drift with it");
                        return none();
                    }
                },
                Err(failure) if failure.problem.code == Code::VersionMismatch => {
                    let left =
                        |moved: &&Move| sides[place..].iter().any(|side| side.is_none_or(|s| s == is_saved(moved)));
                    return moves.iter().filter(left).cloned().collect();
                }
                Err(failure) => {
                    let problem = &failure.problem;
                    tracing::warn!(instance = %reference, "drift of {reference} was not put back: {problem}");
                    return none();
                }
            }
        }
        none()
    }
}

/// Takes an announcement down; whether it concerns all.
fn take(source: &Source, notice: Notice) -> bool {
    match notice {
        Notice::All => true,
        Notice::Instance(name) => {
            source.following().announced.insert(name);
            false
        }
    }
}

fn is_state(moved: &Move) -> bool {
    matches!(moved, Move::State { .. })
}

/// Of what moved several times the first.
fn first_of_each_side(moves: impl Iterator<Item = Move>) -> Vec<Move> {
    let mut first: Vec<Move> = Vec::new();
    for moved in moves {
        let side = |moved: &Move| (std::mem::discriminant(moved), is_saved(moved));
        if first.iter().all(|known| side(known) != side(&moved)) {
            first.push(moved);
        }
    }
    first
}

/// Drift that is to be put back, or was a moment ago.
#[derive(Debug, Clone)]
pub(super) struct Repair {
    observed: Observed,
    version: String,
    moves: Vec<Move>,
    at: tokio::time::Instant,
    waits: bool,
}

fn is_saved(moved: &Move) -> bool {
    match moved {
        Move::Cpus(moved) | Move::CpuLimit(moved) => moved.saved,
        Move::Memory(moved) => moved.saved,
        Move::State { .. } => false,
    }
}

/// The request that puts back what moved: the saved side, the one that runs, or both in one.
fn back(moves: &[Move], side: Option<bool>, keeps: Saved) -> Option<ResizeRequest> {
    fn to<T>(before: Option<Limit<T>>) -> Option<Limit<Amount<T>>> {
        before.map(|before| before.map(Amount::To))
    }
    let apply = side.map(|saved| match (saved, keeps) {
        (false, _) => Apply::Live,
        // What is saved of a unit is set on what runs at once; that goes back after it.
        (true, Saved::OnRequest) => Apply::Both,
        (true, _) => Apply::NextBoot,
    });
    let mut request = ResizeRequest { apply, ..ResizeRequest::default() };
    let ours = |saved: bool| side.is_none_or(|side| side == saved);
    for moved in moves {
        match moved {
            Move::Cpus(moved) if ours(moved.saved) => request.cpus = to(moved.before),
            Move::CpuLimit(moved) if ours(moved.saved) => request.cpu_limit = to(moved.before),
            Move::Memory(moved) if ours(moved.saved) => request.memory = to(moved.before),
            _ => {}
        }
    }
    (request.cpus.is_some() || request.cpu_limit.is_some() || request.memory.is_some()).then_some(request)
}
