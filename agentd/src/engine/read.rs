//! Everything that is read: instances, capacity, sizes, operations, health. Reads never wait for changes; what a caller may
//! not see isn't there for it.

use std::collections::BTreeMap;
use std::time::Duration;

use agentd_core::access::{Decision, Right};
use agentd_core::api::{
    BackendHealth, Capacity, CapacityOf, Happening, Health, HistoryEntry, HistoryList, Hold, HoldKind, Instance,
    InstanceList, KindUse, LimitUse, OperationView, SizeList, SizeView,
};
use agentd_core::config::{LimitRule, VmMemory};
use agentd_core::error::{Code, Problem};
use agentd_core::instance::{InstanceId, Kind, Observed, Ref, State, Target};
use agentd_core::operation::{Operation, Outcome, Who};
use agentd_core::pattern::Pattern;
use agentd_core::plan::capabilities;
use agentd_core::units::Limit;

use super::change::with_inputs;
use super::keys::lost;
use super::{Engine, Failure, Peer, not_found};
use crate::clock::now_ms;
use crate::executor::unrecorded;
use crate::store::{Entry, Page, Recorded, Told};

/// Which instances a list shows.
#[derive(Debug, Default)]
pub struct Filter {
    /// Of this kind.
    pub kind: Option<Kind>,
    /// That this pattern fits.
    pub pattern: Option<Pattern>,
    /// In this state.
    pub state: Option<State>,
    /// Whose next start has other values than what runs, or hasn't.
    pub next_boot: Option<bool>,
    /// VMs that can't grow without a restart, or what can.
    pub unprepared: Option<bool>,
    /// At most this many.
    pub limit: Option<usize>,
    /// After this reference.
    pub cursor: Option<String>,
}

/// The most instances on one page.
const LONGEST_PAGE: usize = 1000;
/// How much of the record is read for one page, most of which its reader may not see.
const MOST_READ: usize = 10_000;

impl Engine {
    /// The instances that a caller may see, freshly listed.
    pub async fn list(&self, peer: &Peer, filter: &Filter) -> Result<InstanceList, Problem> {
        if let Some(kind) = filter.kind {
            self.source(kind)?;
            self.refresh_kind(kind, Duration::ZERO).await;
        } else {
            self.refresh(Duration::ZERO).await;
        }
        let settings = self.settings();
        let book = self.book();
        let fits = |observed: &Observed| {
            let (reference, labels) = (observed.reference.as_str(), &observed.labels);
            filter.kind.is_none_or(|kind| observed.reference.kind() == kind)
                && filter.state.is_none_or(|state| observed.state == state)
                && filter.unprepared.is_none_or(|unprepared| observed.unprepared().is_some() == unprepared)
                && filter.next_boot.is_none_or(|differs| observed.differs_at_next_boot().is_empty() != differs)
                && filter.pattern.as_ref().is_none_or(|pattern| pattern.matches(reference, labels))
                && settings.access.can_see(&peer.caller, reference, labels)
        };
        let all: Vec<_> = book.all().filter(|known| fits(&known.observed)).collect();
        let total = all.len();
        let limit = filter.limit.unwrap_or(LONGEST_PAGE).clamp(1, LONGEST_PAGE);
        let after = |reference: &str| filter.cursor.as_deref().is_none_or(|cursor| reference > cursor);
        // The book is ordered by kind, then name; the wire's order is that of the text, so that a cursor is just a text.
        let mut page: Vec<_> = all.into_iter().filter(|known| after(known.observed.reference.as_str())).collect();
        page.sort_by(|a, b| a.observed.reference.as_str().cmp(b.observed.reference.as_str()));
        let more = page.len() > limit;
        page.truncate(limit);
        let next_cursor = more.then(|| page.last().map(|known| known.observed.reference.to_string())).flatten();
        let items = page.into_iter().map(|known| book.instance(known, &settings.config)).collect();
        Ok(InstanceList { items, next_cursor, total, unavailable: book.unavailable().keys().copied().collect() })
    }

    /// One instance, freshly observed.
    pub async fn show(&self, peer: &Peer, target: &Target) -> Result<Instance, Problem> {
        let observed = self.find(peer, target).await?;
        self.authorize(peer, Right::Read, &observed, target)?;
        let settings = self.settings();
        let book = self.book();
        // With a change in flight the book keeps what it had; the reader gets what is seen now all the same.
        match book.get(&observed.instance_id()) {
            Some(known) => {
                let charge = book.ledger().charge(&observed.instance_id());
                let (version, holds, sizes) = (known.version.clone(), known.holds.clone(), &settings.config.sizes);
                let capabilities = with_inputs(&book, &settings, &observed, capabilities);
                Ok(Instance {
                    capabilities: Some(capabilities),
                    loans: known.told_loans(),
                    ..Instance::new(&observed, version, charge, holds, sizes)
                })
            }
            None => Err(not_found(observed.reference.as_str())),
        }
    }

    /// Lifts `needs-attention` after a fresh look.
    pub async fn clear_hold(&self, peer: &Peer, target: &Target) -> Result<Instance, Problem> {
        self.refuse_before_restored()?;
        let observed = self.find(peer, target).await?;
        self.authorize(peer, Right::Admin, &observed, target)?;
        // In a task of its own: a caller that goes away must not leave it half-way.
        let (engine, instance, who) = (self.clone(), observed.instance_id(), peer.who.clone());
        let lifted = tokio::spawn(async move { engine.lift_for_good(&instance, who).await });
        lifted.await.unwrap_or_else(|_| Err(lost("lifting the hold")))?;
        self.show(peer, target).await
    }

    /// Lifts a hold from the record, then from the book: told to be gone, it isn't there again after a restart.
    async fn lift_for_good(&self, instance: &InstanceId, who: Who) -> Result<(), Problem> {
        let (entries, uid) = {
            let mut book = self.book();
            let Some(known) = book.get(instance) else { return Err(not_found(&instance.to_string())) };
            let reference = known.observed.reference.clone();
            let hold = known.holds.iter().find(|hold| hold.hold == HoldKind::NeedsAttention);
            let Some(Hold { reason, .. }) = hold.cloned() else { return Ok(()) };
            let mark = format!("clear-hold/{}", known.version);
            let uid = who.uid;
            let entry = HistoryEntry {
                who: Some(who),
                verb: Some("clear-hold".into()),
                detail: Some(reason),
                ..HistoryEntry::new(Happening::HoldCleared, &reference, Some(instance.id.clone()))
            };
            let mut entries = vec![Entry::History(Box::new(Told { entry, at_ms: now_ms(), mark }))];
            entries.extend(book.entry_without(instance, HoldKind::NeedsAttention));
            (entries, uid)
        };
        self.store().commit(entries).await.map_err(|error| unrecorded(&error))?;
        let lifted = {
            let mut book = self.book();
            book.lift(instance, HoldKind::NeedsAttention);
            book.entry(instance)
        };
        tracing::info!(%instance, uid, "the hold of {instance} was cleared by uid {uid}");
        // Once more: a look that was recorded meanwhile still had it.
        self.store().commit_and_keep(lifted.into_iter().collect()).await.map_err(|error| unrecorded(&error))
    }

    /// The host: what it has, what is promised, what is free. Sums are over everything; names are those that the caller may
    /// see, and of limits those under which it sees something.
    pub async fn capacity(&self, peer: &Peer) -> Capacity {
        self.refresh(Duration::ZERO).await;
        let settings = self.settings();
        let config = &settings.config;
        let book = self.book();
        let ledger = book.ledger();
        let (allowed, committed) = (ledger.caps().host, ledger.committed());
        let mut by_kind: BTreeMap<Kind, KindUse> = BTreeMap::new();
        let mut unlimited = Vec::new();
        for known in book.all() {
            let observed = &known.observed;
            let entry = by_kind.entry(observed.reference.kind()).or_default();
            let charge = ledger.charge(&observed.instance_id());
            entry.instances += 1;
            entry.committed.cpus = entry.committed.cpus.saturating_add(charge.cpus);
            entry.committed.memory = entry.committed.memory.saturating_add(charge.memory);
            if observed.state.is_up() {
                entry.up += 1;
                let none = observed.cpus.accepted == Some(Limit::Unlimited)
                    || observed.memory.accepted == Some(Limit::Unlimited);
                if none && settings.access.can_see(&peer.caller, observed.reference.as_str(), &observed.labels) {
                    unlimited.push(observed.reference.to_string());
                }
            }
        }
        unlimited.sort();
        let (access, unlabelled) = (&settings.access, BTreeMap::new());
        let concerns = |limit: &LimitRule| {
            let mut all = book.all().map(|known| (known.observed.reference.as_str(), &known.observed.labels));
            // Whose rule has the limit's own pattern in it need see none of them yet.
            access.can_see(&peer.caller, limit.pattern.as_str(), &unlabelled)
                || all.any(|(reference, labels)| {
                    limit.pattern.matches(reference, labels) && access.can_see(&peer.caller, reference, labels)
                })
        };
        let limits = config.limits.iter().enumerate().filter(|(_, limit)| concerns(limit)).map(|(place, limit)| {
            let committed = ledger.committed_under(place);
            LimitUse {
                pattern: limit.pattern.to_string(),
                total_cpus: limit.total_cpus,
                total_memory: limit.total_memory,
                committed,
                over: limit.total_cpus.is_some_and(|total| committed.cpus > total)
                    || limit.total_memory.is_some_and(|total| committed.memory > total),
            }
        });
        Capacity {
            cpus: CapacityOf {
                total: settings.host.cpus,
                reserved: config.capacity.reserved_cpus,
                overcommit: ratio(config.capacity.cpu_overcommit.millis()),
                allowed: allowed.cpus,
                committed: committed.cpus,
                free: allowed.cpus.saturating_sub(committed.cpus),
                over: committed.cpus > allowed.cpus,
            },
            memory: CapacityOf {
                total: settings.host.memory,
                reserved: config.capacity.reserved_memory,
                overcommit: ratio(config.capacity.memory_overcommit.millis()),
                allowed: allowed.memory,
                committed: committed.memory,
                free: allowed.memory.saturating_sub(committed.memory),
                over: committed.memory > allowed.memory,
            },
            by_kind,
            limits: limits.collect(),
            vm_memory: match config.capacity.vm_memory {
                VmMemory::Observed => "observed".into(),
                VmMemory::Maximum => "maximum".into(),
            },
            vm_overhead: config.capacity.vm_overhead,
            unlimited,
            unavailable: book.unavailable().keys().copied().collect(),
        }
    }

    /// The sizes of the config file.
    pub fn sizes(&self) -> SizeList {
        let settings = self.settings();
        let view = |(name, size): (&String, &agentd_core::config::Size)| SizeView {
            name: name.clone(),
            cpus: size.cpus,
            memory: size.memory,
            cpu_limit: size.cpu_limit,
        };
        SizeList { items: settings.config.sizes.iter().map(view).collect() }
    }

    /// Under which name the instance of an operation is to be found now.
    pub fn name_now(&self, operation: &Operation) -> Ref {
        let book = self.book();
        let known = book.get(&operation.instance_id());
        known.map_or_else(|| operation.reference.clone(), |known| known.observed.reference.clone())
    }

    /// An operation of the caller's own, or anybody's with the right `admin`.
    pub async fn operation(&self, peer: &Peer, id: &str) -> Result<OperationView, Problem> {
        let missing = || no_operation(id);
        let own = |view: &OperationView| view.who.as_ref().is_some_and(|who| who.uid == peer.who.uid);
        let not_yet = self.not_yet_recorded(id).filter(own);
        match self.store().operation(id).await {
            Ok(Some(recorded)) if self.may_see_operation(peer, &recorded.operation) => Ok(self.view_of(recorded)),
            Ok(Some(_)) => Err(missing()),
            Ok(None) => not_yet.ok_or_else(missing),
            Err(error) => not_yet.ok_or_else(|| unrecorded(&error)),
        }
    }

    /// An operation that a caller may see, as it is recorded.
    pub async fn recorded(&self, peer: &Peer, id: &str) -> Result<Operation, Problem> {
        match self.store().operation(id).await {
            Ok(Some(recorded)) if self.may_see_operation(peer, &recorded.operation) => Ok(recorded.operation),
            Ok(_) => Err(no_operation(id)),
            Err(error) => Err(unrecorded(&error)),
        }
    }

    /// An operation that was just submitted, as the record has it.
    pub(super) async fn running(&self, id: &str) -> Option<OperationView> {
        let recorded = self.store().operation(id).await.ok().flatten();
        recorded.map(|recorded| self.view_of(recorded)).or_else(|| self.not_yet_recorded(id))
    }

    /// As its caller was told at its end; as it stands before that.
    fn view_of(&self, recorded: Recorded) -> OperationView {
        let Recorded { operation, reply, .. } = recorded;
        match reply {
            Some(Ok(view)) => view,
            Some(Err(Failure { operation: Some(view), .. })) => *view,
            _ => self.view(&operation, None),
        }
    }

    /// The newest operations that a caller may see, those of one instance where it is named.
    pub async fn operations(
        &self,
        peer: &Peer,
        reference: Option<&Ref>,
        limit: usize,
    ) -> Result<Vec<OperationView>, Problem> {
        let (limit, own) = (limit.clamp(1, LONGEST_PAGE), self.only_own(peer));
        let chunk = chunk(limit);
        let (mut visible, mut before) = (Vec::new(), None);
        // What a caller may not see takes no place on its page; but nobody has the whole record read for one.
        for _ in 0..MOST_READ / chunk {
            let newest = self.store().newest(reference.map(Ref::to_string), own, before, chunk).await;
            let newest = newest.map_err(|error| unrecorded(&error))?;
            before = newest.last().map(|last| last.id.clone());
            let more = newest.iter().filter(|operation| self.may_see_operation(peer, operation));
            visible.extend(more.map(|operation| OperationView::new(operation, None, None)));
            if visible.len() >= limit || newest.len() < chunk {
                break;
            }
        }
        visible.truncate(limit);
        Ok(visible)
    }

    /// The history, newest first: everything with the right `admin`, else what the caller itself asked for.
    pub async fn history(&self, peer: &Peer, mut page: Page) -> Result<HistoryList, Problem> {
        let limit = page.limit.clamp(1, LONGEST_PAGE);
        (page.uid, page.limit) = (self.only_own(peer), chunk(limit));
        let mut visible = Vec::new();
        for _ in 0..MOST_READ / page.limit {
            let entries = self.store().history(page.clone()).await.map_err(|error| unrecorded(&error))?;
            let more = entries.len() == page.limit;
            page.before = entries.last().map(|entry| entry.seq).filter(|_| more);
            visible.extend(entries.into_iter().filter(|entry| self.may_see_entry(peer, entry)));
            if !more || visible.len() > limit {
                break;
            }
        }
        let more = visible.len() > limit;
        visible.truncate(limit);
        // Where all that was read is shown, the next page begins with what was not read.
        let next = if more { visible.last().map(|entry| entry.seq) } else { page.before };
        Ok(HistoryList { items: visible, next })
    }

    pub(super) fn may_see_entry(&self, peer: &Peer, entry: &HistoryEntry) -> bool {
        let (access, labels) = (&self.settings().access, self.labels(entry));
        let admin = access.decide(&peer.caller, Right::Admin, Some((&entry.reference, &labels)));
        let own = entry.who.as_ref().is_some_and(|who| who.uid == peer.who.uid);
        // A refusal names what the caller may not even know of.
        let refused = entry.happening == Happening::Refusal;
        let own = own && (!refused || access.can_see(&peer.caller, &entry.reference, &labels));
        matches!(admin, Decision::Allowed { .. }) || own
    }

    /// The caller's uid, where it may see nobody else's operations anywhere.
    fn only_own(&self, peer: &Peer) -> Option<u32> {
        let admin = self.settings().access.decide(&peer.caller, Right::Admin, None);
        (!matches!(admin, Decision::Allowed { .. })).then_some(peer.who.uid)
    }

    /// The labels of the instance that this happened to. Of one that is gone nobody knows any, whoever has its name now.
    pub(super) fn labels(&self, entry: &HistoryEntry) -> BTreeMap<String, String> {
        let (Ok(Target::Full(reference)), Some(id)) = (entry.reference.parse(), &entry.id) else {
            return BTreeMap::new();
        };
        let instance = InstanceId { kind: reference.kind(), id: id.clone() };
        self.book().get(&instance).map(|known| known.observed.labels.clone()).unwrap_or_default()
    }

    fn may_see_operation(&self, peer: &Peer, operation: &Operation) -> bool {
        let (reference, own) = (&operation.reference, operation.who.uid == peer.who.uid);
        let access = &self.settings().access;
        let is_admin = |labels: &BTreeMap<String, String>| {
            access.decide(&peer.caller, Right::Admin, Some((reference.as_str(), labels))).is_allowed()
        };
        // One that has no plan yet tells nothing but what its caller has asked; whether there is such an instance isn't known.
        if operation.identity.id.is_empty() && operation.is_open() {
            return own || is_admin(&BTreeMap::new());
        }
        let labels = self.book().get(&operation.instance_id()).map(|known| known.observed.labels.clone());
        // Of an instance that is gone nobody knows the labels any more; who was let change it may hear how that went.
        let gone = labels.is_none() && operation.outcome != Outcome::Refused;
        let labels = labels.unwrap_or_default();
        is_admin(&labels) || (own && (gone || access.can_see(&peer.caller, reference.as_str(), &labels)))
    }

    /// What is going on, in one line.
    pub fn status(&self) -> String {
        let settings = self.settings();
        let mut kinds: BTreeMap<Kind, usize> = self.inner.sources.keys().map(|kind| (*kind, 0)).collect();
        let (held, away) = {
            let book = self.book();
            let (known, held) = book.counts();
            kinds.extend(known);
            (held, book.unavailable().keys().map(|kind| format!("{kind}s unavailable")).collect::<Vec<_>>())
        };
        let mut parts: Vec<String> = kinds.iter().map(|(kind, count)| counted(*count, kind.as_str())).collect();
        parts.push(counted(self.inner.under_way.borrow().len(), "change") + " under way");
        if held > 0 {
            parts.push(format!("{held} held"));
        }
        parts.extend(away);
        if settings.config.server.read_only {
            parts.push("read_only: changes are refused".into());
        }
        parts.extend(settings.notes.iter().cloned());
        parts.extend(self.store().trouble().map(|why| format!("changes are refused: {why}")));
        // A line of its own in what the service manager shows.
        parts.join(", ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
    }

    /// Whether agentd and its backends are well, and which of the instances that the caller may see are held.
    pub async fn health(&self, peer: &Peer) -> Health {
        let looks = self.inner.sources.values().map(|source| async move {
            let (ok, detail) = match source.backend.health().await {
                Ok(version) => (true, version),
                Err(error) => (false, error.to_string()),
            };
            BackendHealth { kind: source.backend.kind(), name: source.backend.name(), ok, detail }
        });
        let backends = futures_util::future::join_all(looks).await;
        let settings = self.settings();
        let mut notes = settings.notes.clone();
        let trouble = self.store().trouble();
        notes.extend(trouble.as_ref().map(|why| format!("changes are refused: {why}")));
        let seen =
            |observed: &Observed| settings.access.can_see(&peer.caller, observed.reference.as_str(), &observed.labels);
        let mut held = Vec::new();
        for known in self.book().all().filter(|known| seen(&known.observed)) {
            for hold in &known.holds {
                held.push(format!("{} is held ({})", known.observed.reference, hold.hold.as_str()));
            }
        }
        held.sort();
        notes.extend(held);
        Health {
            ok: backends.iter().all(|backend| backend.ok) && settings.notes.is_empty() && trouble.is_none(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            read_only: settings.config.server.read_only,
            backends,
            notes,
        }
    }
}

/// Nobody's, or one that the caller may not see; an id has 26 characters.
fn no_operation(id: &str) -> Problem {
    let id: String = id.chars().take(40).collect();
    Problem::new(Code::NotFound, format!("there is no operation {id:?}")).hint("`ctl history` shows those on record")
}

/// How much of the record is read at once for a page from which something may be left out.
fn chunk(limit: usize) -> usize {
    (limit + 1).max(100)
}

/// `1 vm`, `2 vms`.
fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// A ratio in thousandths as the wire's number.
#[allow(clippy::cast_precision_loss, reason = "a ratio is at most a million thousandths")]
fn ratio(millis: u64) -> f64 {
    millis as f64 / 1000.0
}
