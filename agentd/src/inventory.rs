//! The book: what is known of every instance and what each is charged, under one synchronous lock that is never held over
//! a call to a backend. Knows nothing of how observations are made.
//!
//! Listings run beside changes, so an observation may be older than what the book already has: each observation carries the
//! [`Moment`] at which it was begun, and an older one never replaces a newer one. An instance with a change in flight takes
//! no observation but the change's own.

use std::collections::{BTreeMap, BTreeSet};

use agentd_core::api::{Hold, HoldKind, Instance, Move};
use agentd_core::config::Config;
use agentd_core::drift::{drift, is_of};
use agentd_core::instance::{Kind, Observed, Ref, State, Usage};
use agentd_core::ledger::{Charge, Ledger};
use agentd_core::plan::{HostCapacity, Targets, caps, charge_of};

use crate::store::{Entry, Remembered};

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
    /// When the observation was begun.
    seen: Moment,
    /// Whether a change of it is in flight.
    busy: bool,
    /// Whether a change ended without an observation: its charge stays until the next one.
    unseen: bool,
}

impl Known {
    /// The latest observation that told something.
    fn last_readable(&self) -> &Observed {
        self.readable.as_deref().unwrap_or(&self.observed)
    }

    /// What the record keeps of it. That it is recovering is found out anew.
    fn remembered(&self, stamp: u64, ledger: &Ledger) -> Remembered {
        let holds = self.holds.iter().filter(|hold| hold.hold != HoldKind::Recovering);
        Remembered {
            stamp,
            observed: self.observed.clone(),
            version: self.version.clone(),
            holds: holds.cloned().collect(),
            unseen: self.unseen.then(|| ledger.charge(&self.observed.reference)),
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
    known: BTreeMap<Ref, Known>,
    /// What the record doesn't know yet.
    unrecorded: BTreeSet<Ref>,
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
            unrecorded: BTreeSet::new(),
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
        self.ledger.set_caps(caps(config, host), |reference| match known.get(reference) {
            Some(known) => config.rules_for(reference.as_str(), &known.observed.labels).matching,
            None => config.rules_for(reference.as_str(), &BTreeMap::new()).matching,
        });
        for (reference, known) in &self.known {
            let limits = config.rules_for(reference.as_str(), &known.observed.labels).matching;
            self.ledger.observe(reference, charge_now(&self.ledger, &known.observed, config), &limits);
        }
    }

    /// The beginning of an observation.
    pub fn moment(&mut self) -> Moment {
        self.clock += 1;
        Moment(self.clock)
    }

    /// Takes what an earlier life of the daemon knew of an instance. It is charged from here on, whether or not its backend
    /// answers.
    pub fn restore(&mut self, remembered: Remembered, config: &Config) {
        let Remembered { stamp, observed, version, holds, unseen } = remembered;
        self.clock = self.clock.max(stamp);
        let reference = observed.reference.clone();
        let limits = config.rules_for(reference.as_str(), &observed.labels).matching;
        self.ledger.observe(&reference, charge_of(&observed, config), &limits);
        if let Some(charge) = unseen {
            self.ledger.reserve(&reference, charge);
        }
        let (seen, unseen) = (Moment(0), unseen.is_some());
        let known = Known { observed, readable: None, version, holds, seen, busy: false, unseen };
        self.known.insert(reference, known);
    }

    /// Charges an operation whose outcome nobody knows, and holds its instance until somebody does.
    pub fn recovering(&mut self, reference: &Ref, charge: Charge, reason: String) {
        self.ledger.reserve(reference, charge);
        self.hold(reference, HoldKind::Recovering, reason);
    }

    /// One instance for the record, changed or not.
    pub fn entry(&mut self, reference: &Ref) -> Option<Entry> {
        let Moment(stamp) = self.moment();
        self.known.get(reference).map(|known| Entry::Instance(Box::new(known.remembered(stamp, &self.ledger))))
    }

    /// One instance for the record as it is without a hold that is about to be lifted.
    pub fn entry_without(&mut self, reference: &Ref, hold: HoldKind) -> Option<Entry> {
        let Moment(stamp) = self.moment();
        let mut remembered = self.known.get(reference)?.remembered(stamp, &self.ledger);
        remembered.holds.retain(|known| known.hold != hold);
        Some(Entry::Instance(Box::new(remembered)))
    }

    /// What changed of the instances since this was last asked, for the record.
    pub fn take_unrecorded(&mut self) -> Vec<Entry> {
        let unrecorded = std::mem::take(&mut self.unrecorded);
        if unrecorded.is_empty() {
            return Vec::new();
        }
        // Who takes them earlier may be the later one to write them.
        let Moment(stamp) = self.moment();
        let entry = |reference: Ref| match self.known.get(&reference) {
            Some(known) => Entry::Instance(Box::new(known.remembered(stamp, &self.ledger))),
            None => Entry::Gone(reference, stamp),
        };
        unrecorded.into_iter().map(entry).collect()
    }

    /// Takes an observation of one instance that was begun at `begun`. Ignored where something newer is known, or where a
    /// change is in flight and this isn't its own. Tells what somebody else must have changed since the one before.
    pub fn record(&mut self, observed: Observed, begun: Moment, config: &Config) -> Option<Drift> {
        self.take(observed, begun, config, None)
    }

    /// The same; `own` are the targets of the change that ends with it.
    fn take(&mut self, observed: Observed, begun: Moment, config: &Config, own: Option<&Targets>) -> Option<Drift> {
        let reference = observed.reference.clone();
        if !self.known.contains_key(&reference)
            && let Some((before, busy)) = self.name_before(&observed)
        {
            // A change in flight of it finds out by itself.
            if busy {
                return None;
            }
            self.renamed(&before, &reference, config);
        }
        let old = self.known.get(&reference);
        if old.is_some_and(|old| old.seen > begun || (old.busy && own.is_none())) {
            return None;
        }
        let replaced = old.is_some_and(|old| old.observed.id != observed.id);
        let (busy, unseen) = old.map_or((false, false), |old| (old.busy, old.unseen));
        // Another instance under the same name starts without the holds of the one before.
        let holds = if replaced { Vec::new() } else { old.map(|old| old.holds.clone()).unwrap_or_default() };
        let changed = old.is_none_or(|old| fingerprint(&old.observed) != fingerprint(&observed) || old.holds != holds);
        // Of one whose last change has an end that nobody knows, nobody knows either what moved by itself.
        let mut moves = match old {
            Some(old) if !unseen && !self.is_recovering(&reference) => drift(old.last_readable(), &observed),
            _ => Vec::new(),
        };
        moves.retain(|moved| own.is_none_or(|targets| !is_of(targets, moved)));
        let readable = old
            .filter(|old| observed.state == State::Unknown && !replaced && old.last_readable().state != State::Unknown)
            .map(|old| Box::new(old.last_readable().clone()));
        let remembered = old.is_some_and(|old| !changed && !unseen && old.observed.native == observed.native);
        let version = match old {
            Some(old) if !changed => old.version.clone(),
            _ => self.next_version(),
        };
        let limits = config.rules_for(reference.as_str(), &observed.labels).matching;
        let charge = charge_now(&self.ledger, &observed, config);
        if !remembered || charge != self.ledger.charge(&reference) {
            self.unrecorded.insert(reference.clone());
        }
        self.ledger.observe(&reference, charge, &limits);
        if unseen {
            self.ledger.release(&reference, charge);
        }
        let drift = (!moves.is_empty()).then(|| Drift { observed: observed.clone(), version: version.clone(), moves });
        self.known.insert(reference, Known { observed, readable, version, holds, seen: begun, busy, unseen: false });
        drift
    }

    /// The name under which this instance is known, and whether a change of it is in flight.
    fn name_before(&self, observed: &Observed) -> Option<(Ref, bool)> {
        let same = |known: &&Known| {
            known.observed.id == observed.id && known.observed.reference.kind() == observed.reference.kind()
        };
        self.known.values().find(same).map(|known| (known.observed.reference.clone(), known.busy))
    }

    /// An instance goes on under another name: what it is charged and what holds it goes with it.
    pub fn renamed(&mut self, old: &Ref, new: &Ref, config: &Config) {
        let recovering = self.is_recovering(old);
        let Some(mut known) = self.known.remove(old) else { return };
        let charge = self.ledger.charge(old);
        self.ledger.release(old, Charge::ZERO);
        self.ledger.forget(old);
        let limits = config.rules_for(new.as_str(), &known.observed.labels).matching;
        self.ledger.observe(new, charge_of(&known.observed, config).max(self.ledger.charge(new)), &limits);
        self.ledger.reserve(new, charge);
        known.observed.reference = new.clone();
        known.readable = None;
        // What it was charged beside what is seen goes with the next look, unless somebody still has to settle that.
        known.unseen |= !known.busy && !recovering;
        known.version = self.next_version();
        self.known.insert(new.clone(), known);
        self.unrecorded.extend([old.clone(), new.clone()]);
    }

    /// Takes a full listing of one kind that was begun at `begun`: what it doesn't have is gone.
    pub fn record_listing(&mut self, kind: Kind, listing: Vec<Observed>, begun: Moment, config: &Config) -> Vec<Drift> {
        self.unavailable.remove(&kind);
        let listed: BTreeSet<&Ref> = listing.iter().map(|observed| &observed.reference).collect();
        let gone: Vec<Ref> = self
            .known
            .keys()
            .filter(|reference| reference.kind() == kind && !listed.contains(reference))
            .cloned()
            .collect();
        for reference in gone {
            self.forget(&reference, begun);
        }
        listing.into_iter().filter_map(|observed| self.record(observed, begun, config)).collect()
    }

    /// A backend that does not answer: what is known of its instances stands, and so do their charges.
    pub fn record_unavailable(&mut self, kind: Kind, why: String) {
        self.unavailable.insert(kind, why);
    }

    /// Drops an instance that was seen to be gone by a look begun at `begun`, unless something newer is known or a change is
    /// in flight.
    pub fn forget(&mut self, reference: &Ref, begun: Moment) {
        let Some(known) = self.known.get(reference).filter(|known| known.seen <= begun && !known.busy) else { return };
        if known.unseen {
            self.drop_gone(reference);
        } else {
            self.known.remove(reference);
            self.ledger.forget(reference);
            self.unrecorded.insert(reference.clone());
        }
    }

    /// Drops an instance that is known to be gone, whatever was in flight on it.
    pub fn drop_gone(&mut self, reference: &Ref) {
        self.known.remove(reference);
        self.ledger.release(reference, Charge::ZERO);
        self.ledger.forget(reference);
        self.unrecorded.insert(reference.clone());
    }

    /// Begins a change: the charge is reserved and other observations stay out.
    pub fn begin(&mut self, reference: &Ref, charge: Charge) {
        self.ledger.reserve(reference, charge);
        if let Some(known) = self.known.get_mut(reference) {
            known.busy = true;
        }
    }

    /// Ends a change with what was observed at its end. `settled` says that no outcome is unknown any more, this change's or
    /// an earlier one's: then the hold for that ends, and the charge is what is seen; without an observation it stays until
    /// one is had. Tells what somebody else changed meanwhile of what this change had no business with.
    pub fn end(
        &mut self,
        reference: &Ref,
        targets: &Targets,
        observed: Option<(Observed, Moment)>,
        config: &Config,
        settled: bool,
    ) -> Option<Drift> {
        let (unseen, doubtful) = (settled && observed.is_none(), self.is_recovering(reference));
        if settled {
            self.lift(reference, HoldKind::Recovering);
        }
        let drift = observed.and_then(|(observed, begun)| {
            let charge = charge_now(&self.ledger, &observed, config);
            let drift = self.take(observed, begun, config, Some(targets));
            if settled {
                self.ledger.release(reference, charge);
            }
            drift.filter(|_| !doubtful)
        });
        if let Some(known) = self.known.get_mut(reference) {
            (known.busy, known.unseen) = (false, unseen);
            if unseen {
                self.unrecorded.insert(reference.clone());
            }
        }
        drift
    }

    fn is_recovering(&self, reference: &Ref) -> bool {
        self.known.get(reference).is_some_and(|known| known.holds.iter().any(|hold| hold.hold == HoldKind::Recovering))
    }

    /// Puts a hold on an instance.
    pub fn hold(&mut self, reference: &Ref, hold: HoldKind, reason: String) {
        let version = self.next_version();
        if let Some(known) = self.known.get_mut(reference) {
            known.holds.retain(|known| known.hold != hold);
            known.holds.push(Hold { hold, reason });
            known.version = version;
            self.unrecorded.insert(reference.clone());
        }
    }

    /// Lifts a hold; whether there was one.
    pub fn lift(&mut self, reference: &Ref, hold: HoldKind) -> bool {
        let version = self.next_version();
        let Some(known) = self.known.get_mut(reference) else { return false };
        let before = known.holds.len();
        known.holds.retain(|known| known.hold != hold);
        let lifted = known.holds.len() < before;
        if lifted {
            self.unrecorded.insert(reference.clone());
            known.version = version;
        }
        lifted
    }

    /// What is known of one instance.
    pub fn get(&self, reference: &Ref) -> Option<&Known> {
        self.known.get(reference)
    }

    /// The latest observation of an instance that its caller has looked at: that one, or one that was begun later. What a
    /// closer look told of its use of memory is kept.
    pub fn latest(&self, seen: &Observed) -> Option<Observed> {
        let mut latest = self.known.get(&seen.reference)?.observed.clone();
        let same = (&latest.id, &latest.boot) == (&seen.id, &seen.boot);
        if same && !matches!(latest.used, Usage::Known(_)) {
            latest.used = seen.used;
        }
        Some(latest)
    }

    /// Whether a change is in flight of the instance with this name or id.
    pub fn is_busy(&self, kind: Kind, name: &str) -> bool {
        match Ref::new(kind, name).ok().and_then(|reference| self.known.get(&reference)) {
            Some(known) => known.busy,
            None => self.known.values().any(|known| known.busy && known.observed.id == name),
        }
    }

    /// Everything that is known, by kind and name.
    pub fn all(&self) -> impl Iterator<Item = &Known> {
        self.known.values()
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
    pub fn instance(&self, known: &Known) -> Instance {
        let charge = self.ledger.charge(&known.observed.reference);
        Instance::new(&known.observed, known.version.clone(), charge, known.holds.clone())
    }

    fn next_version(&mut self) -> String {
        self.versions += 1;
        format!("{}-{:x}", self.epoch, self.versions)
    }
}

/// What an observation charges. One of an instance that can't be read now gives nothing back: it may well run on as it was.
fn charge_now(ledger: &Ledger, observed: &Observed, config: &Config) -> Charge {
    let told = charge_of(observed, config);
    if observed.state == State::Unknown { told.max(ledger.charge(&observed.reference)) } else { told }
}

/// What a version stands for, apart from holds.
fn fingerprint(observed: &Observed) -> impl PartialEq {
    (
        (observed.id.clone(), observed.boot.clone(), observed.state),
        (observed.cpus.accepted, observed.cpus.persistent),
        (observed.cpu_limit.accepted, observed.cpu_limit.persistent),
        (observed.memory.accepted, observed.memory.persistent),
    )
}
