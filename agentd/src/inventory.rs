//! The book: what is known of every instance and what each is charged, under one synchronous lock that is never held over
//! a call to a backend. Knows nothing of how observations are made.
//!
//! An instance is known by its id: a name may be given to another one while the one that had it goes on under a new name,
//! and what it is charged and what holds it goes with it.
//!
//! Listings run beside changes, so an observation may be older than what the book already has: each observation carries the
//! [`Moment`] at which it was begun, and an older one never replaces a newer one. An instance with a change in flight takes
//! no observation but the change's own.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::time::Duration;

use agentd_core::api::{Happening, HistoryEntry, Hold, HoldKind, Instance, Loan, Move};
use agentd_core::config::Config;
use agentd_core::drift::{drift, drift_after, is_of};
use agentd_core::instance::{InstanceId, Kind, Observed, Reading, Ref, State, Usage};
use agentd_core::ledger::{Charge, Ledger};
use agentd_core::operation::{Operation, Outcome, Pending, REPAIR, Uptime, same_boot};
use agentd_core::plan::{HostCapacity, Mark, Targets, Verb, caps, charge_of};

use agentd_core::units::{ByteCount, Limit};
use tokio::time::Instant;

use crate::clock::{now_ms, uptime};
use crate::store::{Entry, Remembered, Told};

/// A point in the order of observations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

/// What is known of one instance.
#[derive(Debug, Clone)]
pub struct Known {
    /// The latest observation.
    pub observed: Observed,
    /// The latest one that could be read, where that is another one.
    readable: Option<Box<Observed>>,
    /// Changes with identity, boot, state, accepted, persistent and holds; never used twice.
    pub version: String,
    /// What blocks its changes.
    pub holds: Vec<Hold>,
    /// What it has for a time only.
    pub loans: Vec<Loan>,
    /// What changes have left pending.
    pub pending: Vec<Pending>,
    /// Whether it is a VM that gives back, in its own time, what it was booted with beyond what is saved.
    settling: bool,
    /// When the observation was begun.
    seen: Moment,
    /// When it was taken; not in this life of the daemon where there is none.
    at: Option<Instant>,
    /// Whether a change of it is in flight.
    busy: bool,
    /// Whether it was to be looked at meanwhile, for another reason than that change.
    missed: bool,
    /// Whether a change ended without an observation: its charge stays until the next one.
    unseen: bool,
    /// What changes were to move whose outcome nobody knows yet.
    doubtful: Vec<Targets>,
}

impl Known {
    fn is_recovering(&self) -> bool {
        self.holds.iter().any(|hold| hold.hold == HoldKind::Recovering)
    }

    /// What it has for a time only, as it is told.
    pub fn told_loans(&self) -> Vec<Loan> {
        if self.loans.is_empty() {
            return Vec::new();
        }
        let (now_ms, up) = (now_ms(), uptime());
        self.loans.iter().map(|loan| loan.told(now_ms, up.as_ref())).collect()
    }

    /// The latest observation that told something.
    fn last_readable(&self) -> &Observed {
        self.readable.as_deref().unwrap_or(&self.observed)
    }

    /// What the record keeps of it. That it is recovering is found out anew.
    fn remembered(&self, stamp: u64, ledger: &Ledger) -> Remembered {
        let holds = self.holds.iter().filter(|hold| hold.hold != HoldKind::Recovering);
        // One that can't be read now is remembered as it was when it could: it is charged and compared by that.
        let observed = Observed { reference: self.observed.reference.clone(), ..self.last_readable().clone() };
        Remembered {
            stamp,
            observed,
            version: self.version.clone(),
            holds: holds.cloned().collect(),
            loans: self.loans.clone(),
            pending: self.pending.clone(),
            unseen: self.unseen.then(|| ledger.charge(&self.observed.instance_id())),
        }
    }
}

/// What was changed behind the daemon's back.
#[derive(Debug, Clone)]
pub struct Drift {
    /// The instance as it is now.
    pub observed: Observed,
    /// Its version now.
    pub version: String,
    /// What moved.
    pub moves: Vec<Move>,
}

/// Everything that is known, and the ledger over it.
#[derive(Debug)]
pub struct Book {
    known: BTreeMap<InstanceId, Known>,
    /// Who was last seen with which name.
    names: HashMap<Ref, InstanceId>,
    /// What the record doesn't know yet.
    unrecorded: BTreeSet<InstanceId>,
    /// Who has something for a time only, or a hold: asked each second, of few among many.
    noted: BTreeSet<InstanceId>,
    /// What was seen to happen and is not in the history yet.
    untold: Vec<Entry>,
    /// The kinds of which everything is known: what turns up from there on is new.
    listed: BTreeSet<Kind>,
    ledger: Ledger,
    clock: u64,
    versions: u64,
    /// Keeps versions of two lives of the daemon apart.
    epoch: String,
    unavailable: BTreeMap<Kind, String>,
}

impl Book {
    /// An empty book. `epoch` must differ from that of every earlier life of the daemon.
    pub fn new(config: &Config, host: HostCapacity, epoch: String) -> Self {
        Book {
            known: BTreeMap::new(),
            names: HashMap::new(),
            unrecorded: BTreeSet::new(),
            noted: BTreeSet::new(),
            untold: Vec::new(),
            listed: BTreeSet::new(),
            ledger: Ledger::new(caps(config, host)),
            clock: 0,
            versions: 0,
            epoch,
            unavailable: BTreeMap::new(),
        }
    }

    /// Another config: other caps, other limits, other charges.
    pub fn set_config(&mut self, config: &Config, host: HostCapacity) {
        let known = &self.known;
        self.ledger.set_caps(caps(config, host), |instance| match known.get(instance) {
            Some(known) => limits_of(&known.observed, config),
            None => Vec::new(),
        });
        for (instance, known) in &self.known {
            let charge = charge_now(&self.ledger, &known.observed, config);
            self.ledger.observe(instance, charge, &limits_of(&known.observed, config));
        }
    }

    /// The beginning of an observation.
    pub fn moment(&mut self) -> Moment {
        self.clock += 1;
        Moment(self.clock)
    }

    /// Takes what an earlier life of the daemon knew of an instance. It is charged from here on, whether or not its backend
    /// answers. Where it was seen in this life already, only what can't be seen is taken.
    pub fn restore(&mut self, remembered: Remembered, config: &Config) {
        let Remembered { stamp, observed, version, holds, loans, pending, unseen } = remembered;
        self.clock = self.clock.max(stamp);
        let instance = observed.instance_id();
        // What is new since then has come while nobody looked.
        self.listed.insert(instance.kind);
        if let Some(known) = self.known.get_mut(&instance) {
            (known.holds, known.loans, known.pending) = (holds, loans, pending);
            self.note(&instance);
            return;
        }
        self.ledger.observe(&instance, charge_of(&observed, config), &limits_of(&observed, config));
        if let Some(charge) = unseen {
            self.ledger.reserve(&instance, charge);
        }
        let (seen, unseen) = (Moment(0), unseen.is_some());
        let seen_with_it = self.names.get(&observed.reference).and_then(|other| self.known.get(other));
        if seen_with_it.is_none_or(|other| other.seen == Moment(0)) {
            self.names.insert(observed.reference.clone(), instance.clone());
        }
        let known = Known {
            observed,
            readable: None,
            version,
            holds,
            loans,
            pending,
            settling: false,
            seen,
            at: None,
            busy: false,
            missed: false,
            unseen,
            doubtful: Vec::new(),
        };
        self.known.insert(instance.clone(), known);
        self.note(&instance);
    }

    /// Keeps in mind whether there is something to be looked for of an instance.
    fn note(&mut self, instance: &InstanceId) {
        let known = self.known.get(instance);
        if known.is_some_and(|known| !known.loans.is_empty() || !known.holds.is_empty()) {
            self.noted.insert(instance.clone());
        } else {
            self.noted.remove(instance);
        }
    }

    fn noted(&self) -> impl Iterator<Item = (&InstanceId, &Known)> {
        self.noted.iter().filter_map(|instance| self.known.get_key_value(instance))
    }

    /// Charges an operation whose outcome nobody knows, and holds its instance until somebody does.
    pub fn recovering(&mut self, operation: &Operation, reason: String) {
        let instance = operation.instance_id();
        self.ledger.reserve(&instance, operation.charge);
        self.hold(&instance, HoldKind::Recovering, reason);
        if let Some(known) = self.known.get_mut(&instance) {
            known.doubtful.push(operation.targets);
        }
    }

    /// One instance for the record, changed or not.
    pub fn entry(&mut self, instance: &InstanceId) -> Option<Entry> {
        let Moment(stamp) = self.moment();
        self.known.get(instance).map(|known| Entry::Instance(Box::new(known.remembered(stamp, &self.ledger))))
    }

    /// One instance for the record as it is without a hold that is about to be lifted.
    pub fn entry_without(&mut self, instance: &InstanceId, hold: HoldKind) -> Option<Entry> {
        let Moment(stamp) = self.moment();
        let mut remembered = self.known.get(instance)?.remembered(stamp, &self.ledger);
        remembered.holds.retain(|known| known.hold != hold);
        Some(Entry::Instance(Box::new(remembered)))
    }

    /// What changed of the instances since this was last asked, for the record, with the drift that was found: what is
    /// recorded without it would never be told.
    pub fn take_unrecorded(&mut self) -> Vec<Entry> {
        let unrecorded = std::mem::take(&mut self.unrecorded);
        let untold = std::mem::take(&mut self.untold);
        if unrecorded.is_empty() {
            return untold;
        }
        // Who takes them earlier may be the later one to write them.
        let Moment(stamp) = self.moment();
        let entry = |instance: InstanceId| match self.known.get(&instance) {
            Some(known) => Entry::Instance(Box::new(known.remembered(stamp, &self.ledger))),
            None => Entry::Gone(instance, stamp),
        };
        unrecorded.into_iter().map(entry).chain(untold).collect()
    }

    /// The same with this instance, changed or not.
    pub fn take_unrecorded_and(&mut self, instance: InstanceId) -> Vec<Entry> {
        if self.known.contains_key(&instance) {
            self.unrecorded.insert(instance);
        }
        self.take_unrecorded()
    }

    /// Takes an observation of one instance that was begun at `begun`. Ignored where something newer is known, or where a
    /// change is in flight and this isn't its own. Tells what somebody else must have changed since the one before.
    pub fn record(&mut self, observed: Observed, begun: Moment, config: &Config) -> Option<Drift> {
        self.take(observed, begun, config, None)
    }

    /// The same; `ended` is the change that ends with it.
    fn take(&mut self, observed: Observed, begun: Moment, config: &Config, ended: Option<&Operation>) -> Option<Drift> {
        let instance = observed.instance_id();
        if let Some(old) = self.known.get_mut(&instance).filter(|old| old.busy && ended.is_none()) {
            old.missed = true;
            return None;
        }
        let old = self.known.get(&instance);
        if old.is_some_and(|old| old.seen > begun) {
            return None;
        }
        let (busy, missed) = old.map_or((false, false), |old| (old.busy, old.missed));
        let unseen = old.is_some_and(|old| old.unseen);
        let mut holds = old.map(|old| old.holds.clone()).unwrap_or_default();
        let loans = old.map(|old| old.loans.clone()).unwrap_or_default();
        let mut pending = old.map(|old| old.pending.clone()).unwrap_or_default();
        if let Some(ended) = ended {
            pending.retain(|pending| !pending.is_superseded_by(ended));
        }
        let mut doubtful = old.map(|old| old.doubtful.clone()).unwrap_or_default();
        let settling = old.is_some_and(|old| settles(old, &observed));
        let changed = old.is_none_or(|old| fingerprint(&old.observed) != fingerprint(&observed));
        let mut moves = match old {
            Some(old) if !unseen => match ended {
                Some(ended) => drift_after(ended, old.last_readable(), &observed),
                None => drift(old.last_readable(), &observed, settling),
            },
            _ => Vec::new(),
        };
        // Of a change that was seen to be done, or to be overwritten, it is known what it has left. Of what another one was
        // to move, nobody knows whether it moved by itself.
        let own = ended.filter(|ended| ended.outcome != Outcome::Changed && !ended.was_overwritten());
        let own = own.map(|ended| &ended.targets);
        if let Some(done) = ended.filter(|ended| ended.outcome == Outcome::Changed)
            && let Some(place) = doubtful.iter().position(|targets| *targets == done.targets)
        {
            doubtful.remove(place);
        }
        moves.retain(|moved| !own.into_iter().chain(&doubtful).any(|targets| is_of(targets, moved)));
        let by_us = ended.is_some_and(|ended| ended.mark.is_some()) || old.is_some_and(Known::is_recovering);
        let woken = !by_us && wake(&mut holds, &pending, &observed);
        if woken {
            moves.push(Move::State { before: Some(State::Paused), after: Some(observed.state) });
        }
        let readable = old
            .filter(|old| observed.state == State::Unknown && old.last_readable().state != State::Unknown)
            .map(|old| Box::new(old.last_readable().clone()));
        let before = old.map(|old| &old.observed.reference).filter(|before| **before != observed.reference).cloned();
        let settled = settle(&mut pending, &observed);
        if settled.iter().any(|done| done.verb == Verb::Resume) {
            holds.retain(|hold| hold.hold != HoldKind::Suspended);
        }
        let remembered = before.is_none()
            && old.is_some_and(|old| old.pending == pending && old.holds == holds)
            && old.is_some_and(|old| !changed && !unseen && old.observed.native == observed.native);
        let version = match old {
            Some(old) if !changed => old.version.clone(),
            _ => self.next_version(),
        };
        let charge = charge_now(&self.ledger, &observed, config);
        if !remembered || charge != self.ledger.charge(&instance) {
            self.unrecorded.insert(instance.clone());
        }
        self.ledger.observe(&instance, charge, &limits_of(&observed, config));
        // One that can't be read shows nothing of what a change has left.
        let blind = observed.state == State::Unknown;
        if unseen && !blind {
            self.ledger.release(&instance, charge);
        }
        let unseen = unseen && blind;
        if let Some(before) = before {
            self.unname(&before, &instance);
        }
        self.names.insert(observed.reference.clone(), instance.clone());
        let drift = (!moves.is_empty()).then(|| Drift { observed: observed.clone(), version: version.clone(), moves });
        self.untold.extend(drift.as_ref().map(|drift| told(drift, config)));
        self.untold.extend(settled.iter().map(|done| told_settled(done, &observed)));
        let was = self.known.get(&instance).map(|old| old.observed.state);
        if was != Some(observed.state) && (was.is_some() || self.listed.contains(&instance.kind)) {
            self.untold.push(told_state(&observed, was, Some(observed.state), &version));
        }
        let known = Known {
            observed,
            readable,
            version,
            holds,
            loans,
            pending,
            settling,
            seen: begun,
            at: Some(Instant::now()),
            busy,
            missed,
            unseen,
            doubtful,
        };
        self.known.insert(instance.clone(), known);
        self.note(&instance);
        drift
    }

    /// A name isn't this instance's any more; it may be another one's by now.
    fn unname(&mut self, name: &Ref, instance: &InstanceId) {
        if self.names.get(name) == Some(instance) {
            self.names.remove(name);
        }
    }

    /// Takes a full listing of one kind that was begun at `begun`: what it doesn't have is gone.
    pub fn record_listing(&mut self, kind: Kind, listing: Vec<Observed>, begun: Moment, config: &Config) -> Vec<Drift> {
        self.unavailable.remove(&kind);
        let listed: BTreeSet<InstanceId> = listing.iter().map(Observed::instance_id).collect();
        let of_kind = self.known.keys().filter(|instance| instance.kind == kind);
        let gone: Vec<InstanceId> = of_kind.filter(|instance| !listed.contains(instance)).cloned().collect();
        for instance in gone {
            self.forget(&instance, begun);
        }
        let drift = listing.into_iter().filter_map(|observed| self.record(observed, begun, config)).collect();
        self.listed.insert(kind);
        drift
    }

    /// A backend that does not answer: what is known of its instances stands, and so do their charges.
    pub fn record_unavailable(&mut self, kind: Kind, why: String) {
        self.unavailable.insert(kind, why);
    }

    /// A backend that answers.
    pub fn record_available(&mut self, kind: Kind) {
        self.unavailable.remove(&kind);
    }

    /// Drops an instance that was seen to be gone by a look begun at `begun`, unless something newer is known, a change is in
    /// flight, or one has to be settled, which finds out by itself. Whether it was known at all.
    pub fn forget(&mut self, instance: &InstanceId, begun: Moment) -> bool {
        let gone = |known: &Known| known.seen <= begun && !known.busy && !known.is_recovering();
        let known = self.known.get(instance);
        let is_known = known.is_some();
        if known.is_some_and(gone) {
            self.drop_gone(instance);
        }
        is_known
    }

    /// Whether an instance of a kind is charged what it uses, which nobody announces: it has no limit of memory.
    pub fn charges_use(&self, kind: Kind) -> bool {
        self.known.iter().any(|(instance, known)| instance.kind == kind && is_charged_by_use(&known.observed))
    }

    /// The ids of the instances of a kind that are not at rest: what is accepted is not what is observed, they are on their way
    /// up or down, something is expected of them, or they are charged what they use.
    pub fn moving(&self, kind: Kind) -> Vec<String> {
        fn moves<T: PartialEq>(reading: &Reading<T>) -> bool {
            reading.accepted != reading.observed
        }
        let of_kind = self.known.iter().filter(|(instance, _)| instance.kind == kind);
        let moving = of_kind.filter(|(_, known)| {
            let Observed { state, cpus, cpu_limit, memory, .. } = &known.observed;
            matches!(state, State::Starting | State::Stopping | State::Unknown)
                || is_charged_by_use(&known.observed)
                || known.unseen
                || known.settling
                || !known.pending.is_empty()
                || (state.is_up() && (moves(cpus) || moves(cpu_limit) || moves(memory)))
        });
        moving.map(|(instance, _)| instance.id.clone()).collect()
    }

    /// The next instances of a kind after this one, round and round: so many of those that are up, or a fifth of that of those
    /// that are down, which are changed by their definition alone, and of that it is told.
    pub fn next_of(&self, kind: Kind, after: Option<&InstanceId>, count: usize) -> Vec<InstanceId> {
        let first = InstanceId { kind, id: String::new() };
        let from = |bound| {
            let known = self.known.range::<InstanceId, _>((bound, Bound::Unbounded));
            known.take_while(|(instance, _)| instance.kind == kind)
        };
        let later = from(after.map_or(Bound::Included(&first), Bound::Excluded));
        let all = || from(Bound::Included(&first));
        let mut room = count;
        let fits = |(_, known): &(&InstanceId, &Known)| {
            let down = matches!(known.observed.state, State::Stopped | State::Crashed);
            let left = room.checked_sub(if down { 5 } else { 1 });
            room = left.unwrap_or(0);
            left.is_some()
        };
        let next = later.chain(all()).take(all().count()).take_while(fits);
        next.map(|(instance, _)| instance.clone()).collect()
    }

    /// Drops an instance that is known to be gone, whatever was in flight on it.
    pub fn drop_gone(&mut self, instance: &InstanceId) {
        if let Some(known) = self.known.remove(instance) {
            self.unname(&known.observed.reference, instance);
            self.note(instance);
            let version = self.next_version();
            self.untold.push(told_state(&known.observed, Some(known.observed.state), None, &version));
        }
        self.ledger.release(instance, Charge::ZERO);
        self.ledger.forget(instance);
        self.unrecorded.insert(instance.clone());
    }

    /// Begins a change: the charge is reserved and other observations stay out.
    pub fn begin(&mut self, instance: &InstanceId, charge: Charge) {
        self.ledger.reserve(instance, charge);
        if let Some(known) = self.known.get_mut(instance) {
            (known.busy, known.missed) = (true, false);
        }
    }

    /// Whether it was to be looked at in the middle of the change that has ended now: what was to be seen may have come after the
    /// change's own looks.
    pub fn was_missed(&mut self, instance: &InstanceId) -> bool {
        self.known.get_mut(instance).is_some_and(|known| std::mem::take(&mut known.missed))
    }

    /// Ends a change with what was observed at its end. `settled` says that no outcome is unknown any more, this change's or
    /// an earlier one's: then the hold for that ends, and the charge is what is seen; without an observation it stays until
    /// one is had. Tells what somebody else changed meanwhile of what this change had no business with.
    pub fn end(
        &mut self,
        operation: &Operation,
        observed: Option<(Observed, Moment)>,
        config: &Config,
        settled: bool,
    ) -> Option<Drift> {
        let (instance, looked) = (operation.instance_id(), observed.is_some());
        if settled {
            self.lift(&instance, HoldKind::Recovering);
        }
        // It may be older than what is known by now.
        let drift = observed.and_then(|(observed, begun)| self.take(observed, begun, config, Some(operation)));
        let Some(known) = self.known.get_mut(&instance) else { return drift };
        known.busy = false;
        known.pending.retain(|pending| !pending.is_superseded_by(operation));
        known.pending.extend(operation.pending());
        if lend(&mut known.loans, operation) || operation.outcome == Outcome::Pending {
            self.unrecorded.insert(instance.clone());
        }
        if settled {
            known.doubtful.clear();
            known.unseen |= !looked || known.observed.state == State::Unknown;
            if known.unseen {
                self.unrecorded.insert(instance.clone());
            } else {
                self.ledger.release(&instance, charge_of(&known.observed, config));
            }
        }
        self.note(&instance);
        match operation.marks().cloned() {
            Some(Mark::Hold { reason, before }) => {
                let (who, since_ms, before) = (Some(operation.who.clone()), Some(operation.started_ms), Some(before));
                let holds = self.known.get(&instance).map(|known| known.holds.as_slice()).unwrap_or_default();
                let first = holds.iter().find(|hold| hold.hold == HoldKind::Suspended);
                let hold = match first.filter(|_| operation.who.command == REPAIR) {
                    // What agentd puts back is still whose it was.
                    Some(first) => Hold { woken: false, ..first.clone() },
                    None => Hold { who, since_ms, before, ..Hold::new(HoldKind::Suspended, reason) },
                };
                self.put(&operation.instance_id(), hold);
            }
            Some(Mark::Lift) => drop(self.lift(&operation.instance_id(), HoldKind::Suspended)),
            None => {}
        }
        drift
    }

    /// What was lent and is due, of instances that nothing holds.
    pub fn due(&self, now_ms: u64, up: Option<&Uptime>) -> Vec<(InstanceId, Loan)> {
        let free = self.noted().filter(|(_, known)| known.holds.is_empty() && !known.busy);
        let loans = free.flat_map(|(instance, known)| known.loans.iter().map(move |loan| (instance, loan)));
        loans
            .filter(|(_, loan)| loan.left_ms(now_ms, up) == 0)
            .map(|(instance, loan)| (instance.clone(), loan.clone()))
            .collect()
    }

    /// Ends a loan.
    pub fn end_loan(&mut self, instance: &InstanceId, operation: &str) {
        if let Some(known) = self.known.get_mut(instance) {
            known.loans.retain(|loan| loan.operation != operation);
            self.unrecorded.insert(instance.clone());
            self.note(instance);
        }
    }

    /// Puts a hold on an instance.
    pub fn hold(&mut self, instance: &InstanceId, hold: HoldKind, reason: String) {
        self.put(instance, Hold::new(hold, reason));
    }

    fn put(&mut self, instance: &InstanceId, hold: Hold) {
        let version = self.next_version();
        if let Some(known) = self.known.get_mut(instance) {
            known.holds.retain(|known| known.hold != hold.hold);
            known.holds.push(hold);
            known.version = version;
            self.unrecorded.insert(instance.clone());
            self.note(instance);
        }
    }

    /// Lifts a hold; whether there was one.
    pub fn lift(&mut self, instance: &InstanceId, hold: HoldKind) -> bool {
        let version = self.next_version();
        let Some(known) = self.known.get_mut(instance) else { return false };
        let before = known.holds.len();
        known.holds.retain(|known| known.hold != hold);
        let lifted = known.holds.len() < before;
        if lifted {
            known.version = version;
            self.unrecorded.insert(instance.clone());
            self.note(instance);
        }
        lifted
    }

    /// What is known of one instance.
    pub fn get(&self, instance: &InstanceId) -> Option<&Known> {
        self.known.get(instance)
    }

    /// What is known of the instance that was last seen with this name.
    pub fn named(&self, reference: &Ref) -> Option<&Known> {
        self.names.get(reference).and_then(|instance| self.known.get(instance))
    }

    /// The latest observation of an instance that its caller has looked at: that one, or one that was begun later. What a
    /// closer look told of its use of memory is kept.
    pub fn latest(&self, seen: &Observed) -> Option<Observed> {
        let mut latest = self.known.get(&seen.instance_id())?.observed.clone();
        if latest.boot == seen.boot && !matches!(latest.used, Usage::Known(_)) {
            latest.used = seen.used;
        }
        Some(latest)
    }

    /// Whether a change is in flight of the instance with this id or name, which is to be looked at: then that is done after it.
    pub fn is_busy(&mut self, kind: Kind, name: &str) -> bool {
        // What is an id is one first: another instance may have it for a name.
        let mut instance = InstanceId { kind, id: name.to_owned() };
        if !self.known.contains_key(&instance)
            && let Some(named) = Ref::new(kind, name).ok().and_then(|reference| self.names.get(&reference))
        {
            instance = named.clone();
        }
        self.known.get_mut(&instance).is_some_and(|known| {
            known.missed |= known.busy;
            known.busy
        })
    }

    /// An instance of this name that was looked at within this time.
    pub fn looked_at(&self, reference: &Ref, within: Duration) -> Option<&Observed> {
        let known = self.named(reference)?;
        known.at.filter(|at| at.elapsed() <= within).map(|_| &known.observed)
    }

    /// Whether something newer is known than what a look can have seen that was begun then.
    pub fn knows_newer(&self, instance: &InstanceId, begun: Moment) -> bool {
        self.known.get(instance).is_some_and(|known| known.seen > begun)
    }

    /// Everything that is known.
    pub fn all(&self) -> impl Iterator<Item = &Known> {
        self.known.values()
    }

    /// How many instances of each kind are known, and how many of all are held.
    pub fn counts(&self) -> (BTreeMap<Kind, usize>, usize) {
        let mut kinds = BTreeMap::new();
        for InstanceId { kind, .. } in self.known.keys() {
            *kinds.entry(*kind).or_default() += 1;
        }
        (kinds, self.noted().filter(|(_, known)| !known.holds.is_empty()).count())
    }

    /// The ledger.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The kinds whose backend does not answer, with the reason.
    pub fn unavailable(&self) -> &BTreeMap<Kind, String> {
        &self.unavailable
    }

    /// One instance as it goes on the wire.
    pub fn instance(&self, known: &Known, config: &Config) -> Instance {
        let charge = self.ledger.charge(&known.observed.instance_id());
        let (version, holds) = (known.version.clone(), known.holds.clone());
        let loans = known.told_loans();
        Instance { loans, ..Instance::new(&known.observed, version, charge, holds, &config.sizes) }
    }

    fn next_version(&mut self) -> String {
        self.versions += 1;
        format!("{}-{:x}", self.epoch, self.versions)
    }
}

/// What the end of a change makes of what was lent before it: what it took back itself is over, and so is what was lent of a
/// field that it changed. Whether that is any.
fn lend(loans: &mut Vec<Loan>, operation: &Operation) -> bool {
    let (before, done) = (loans.len(), matches!(operation.outcome, Outcome::Changed | Outcome::Pending));
    let fields = operation.targets.fields();
    let touches = |loan: &Loan| loan.fields.iter().any(|field| fields.contains(field));
    loans.retain(|loan| !done || (operation.undoes.as_ref() != Some(&loan.operation) && !touches(loan)));
    let ended = loans.len() < before;
    let lent = operation.loan();
    let begun = lent.is_some();
    loans.extend(lent);
    ended || begun
}

/// What the history tells of drift.
fn told(drift: &Drift, config: &Config) -> Entry {
    let Drift { observed, version, moves } = drift;
    let repair = config.rules_for(observed.reference.as_str(), &observed.labels).repair_drift;
    let detail = if repair { "it is to be put back ([[limit]] repair_drift)" } else { "it is left as it is" };
    let entry = HistoryEntry {
        moves: moves.clone(),
        detail: Some(detail.to_owned()),
        ..HistoryEntry::new(Happening::Drift, &observed.reference, Some(observed.id.clone()))
    };
    Entry::History(Box::new(Told { entry, at_ms: now_ms(), mark: format!("drift/{version}") }))
}

/// Whether a suspended instance is seen to run though nobody asked agentd for that, for the first time since it was suspended: it
/// was woken, or brought down and up again.
fn wake(holds: &mut [Hold], pending: &[Pending], observed: &Observed) -> bool {
    let Some(hold) = holds.iter_mut().find(|hold| hold.hold == HoldKind::Suspended) else { return false };
    let runs = matches!(observed.state, State::Running | State::Starting);
    let on_its_way = pending.iter().any(|pending| matches!(pending.verb, Verb::Suspend | Verb::Resume));
    let woken = runs && !on_its_way && !hold.woken;
    hold.woken = runs && (hold.woken || woken);
    woken
}

/// What of what was left pending has come about, taken out of it with what never will.
fn settle(pending: &mut Vec<Pending>, observed: &Observed) -> Vec<Pending> {
    let settled = pending.iter().filter(|pending| pending.has_settled(observed) == Some(true)).cloned().collect();
    pending.retain(|pending| observed.state == State::Unknown || pending.has_settled(observed) == Some(false));
    settled
}

/// Whether a VM has begun a run with more memory than is saved for it, and goes on giving that back.
fn settles(old: &Known, observed: &Observed) -> bool {
    let (before, at) = (old.last_readable(), |value: Option<Limit<ByteCount>>| value.and_then(Limit::at));
    let begun = old.settling || !same_boot(before.boot.as_deref(), observed.boot.as_deref());
    let more = at(observed.memory.accepted) >= at(observed.memory.persistent) && observed.memory.persistent.is_some();
    // Once it has come down to what is saved it is like any other.
    let arrived = at(before.memory.accepted).is_some() && before.memory.accepted == before.memory.persistent;
    observed.reference.kind() == Kind::Vm && begun && more && !(old.settling && arrived)
}

/// What the history tells of a guest that has obeyed late.
fn told_settled(done: &Pending, observed: &Observed) -> Entry {
    let Pending { operation, verb, .. } = done;
    let entry = HistoryEntry {
        operation: Some(operation.clone()),
        verb: Some(verb.to_string()),
        detail: Some("what this change had left pending has come about".to_owned()),
        ..HistoryEntry::new(Happening::Settled, &observed.reference, Some(observed.id.clone()))
    };
    Entry::History(Box::new(Told { entry, at_ms: now_ms(), mark: format!("settled/{operation}") }))
}

/// What the events tell of an instance that went into another state, came or went.
fn told_state(observed: &Observed, before: Option<State>, after: Option<State>, version: &str) -> Entry {
    let entry = HistoryEntry {
        moves: vec![Move::State { before, after }],
        ..HistoryEntry::new(Happening::State, &observed.reference, Some(observed.id.clone()))
    };
    Entry::History(Box::new(Told { entry, at_ms: now_ms(), mark: format!("state/{version}") }))
}

/// What an observation charges. One of an instance that can't be read now gives nothing back: it may well run on as it was.
fn charge_now(ledger: &Ledger, observed: &Observed, config: &Config) -> Charge {
    let told = charge_of(observed, config);
    if observed.state == State::Unknown { told.max(ledger.charge(&observed.instance_id())) } else { told }
}

/// The places of the `[[limit]]`s that an instance falls under by its present name and labels.
fn limits_of(observed: &Observed, config: &Config) -> Vec<usize> {
    config.rules_for(observed.reference.as_str(), &observed.labels).matching
}

/// Whether what it is charged follows its use of memory.
fn is_charged_by_use(observed: &Observed) -> bool {
    observed.state.is_up() && observed.memory.accepted == Some(Limit::Unlimited)
}

/// What a version stands for, apart from holds.
fn fingerprint(observed: &Observed) -> impl PartialEq {
    (
        (observed.boot.clone(), observed.state),
        (observed.cpus.accepted, observed.cpus.persistent),
        (observed.cpu_limit.accepted, observed.cpu_limit.persistent),
        (observed.memory.accepted, observed.memory.persistent),
    )
}

#[cfg(test)]
mod tests;
