//! The one ledger over all kinds: what each instance is charged, what the host and each `[[limit]]` may commit, and the
//! decision whether a growth is admitted. Knows nothing of where charges come from or how long they last.
//!
//! ```text
//!   observe ──► settled ──────────────┐
//!                                     ├─ charge = max, per dimension ──► totals (host, each limit)
//!   admit ────► in flight ──release──►┘
//! ```
//!
//! Growth is charged in full by [`Ledger::reserve`] before its first step; shrinkage is credited only when an observation
//! shows it. All of it is synchronous and cheap, so that the owner can hold a plain lock around it.

use std::collections::{BTreeMap, btree_map};

use serde::{Deserialize, Serialize};

use crate::instance::InstanceId;
use crate::units::{ByteCount, Cpus};

/// CPUs and memory together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Charge {
    /// CPUs.
    #[cfg_attr(feature = "openapi", schema(value_type = f64))]
    pub cpus: Cpus,
    /// Memory in bytes.
    #[cfg_attr(feature = "openapi", schema(value_type = i64))]
    pub memory: ByteCount,
}

impl Charge {
    /// Nothing.
    pub const ZERO: Charge = Charge { cpus: Cpus::ZERO, memory: ByteCount::ZERO };

    /// The larger of the two in each dimension.
    #[must_use]
    pub fn max(self, other: Charge) -> Charge {
        Charge { cpus: self.cpus.max(other.cpus), memory: self.memory.max(other.memory) }
    }
}

/// A sum of charges, wide enough that no number of instances overflows it: thousandths of a CPU, and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Sum {
    cpus: u128,
    memory: u128,
}

impl Sum {
    fn replace(&mut self, old: Charge, new: Charge) {
        self.cpus = self.cpus + u128::from(new.cpus.millis()) - u128::from(old.cpus.millis());
        self.memory = self.memory + u128::from(new.memory.bytes()) - u128::from(old.memory.bytes());
    }

    fn charge(self) -> Charge {
        Charge {
            cpus: u64::try_from(self.cpus).map_or(Cpus::MAX, |m| Cpus::from_millis(m).min(Cpus::MAX)),
            memory: u64::try_from(self.memory)
                .ok()
                .and_then(|b| ByteCount::from_bytes(b).ok())
                .unwrap_or(ByteCount::MAX),
        }
    }
}

/// The caps that a ledger keeps to.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Caps {
    /// (capacity − reserved) × overcommit.
    pub host: Charge,
    /// `total_cpus` and `total_memory` of each `[[limit]]`, by its place in the config.
    pub limits: Vec<LimitCap>,
}

/// The totals of one `[[limit]]`; `None` where it sets none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LimitCap {
    /// `total_cpus`
    pub cpus: Option<Cpus>,
    /// `total_memory`
    pub memory: Option<ByteCount>,
}

/// The two dimensions of a charge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// CPUs.
    Cpus,
    /// Memory.
    Memory,
}

/// Which cap a growth ran into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cap {
    /// `[capacity]`
    Host,
    /// The `[[limit]]` at this place of the config.
    Limit(usize),
}

/// A growth that was not admitted. Values are those of `resource`; the other dimension stands in the charges unread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// Which cap.
    pub cap: Cap,
    /// Which dimension.
    pub resource: Resource,
    /// What the cap allows.
    pub allowed: Charge,
    /// What is committed under it now, this instance included.
    pub committed: Charge,
    /// What this instance is charged now.
    pub now: Charge,
    /// The largest charge that this instance could have now under this cap.
    pub largest: Charge,
}

#[derive(Debug, Clone, PartialEq, Default)]
struct Entry {
    settled: Charge,
    in_flight: Option<Charge>,
    limits: Vec<usize>,
}

impl Entry {
    fn charge(&self) -> Charge {
        self.in_flight.map_or(self.settled, |in_flight| in_flight.max(self.settled))
    }
}

/// What every instance is charged, against the caps.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    caps: Caps,
    entries: BTreeMap<InstanceId, Entry>,
    host: Sum,
    limits: Vec<Sum>,
}

impl Ledger {
    /// An empty ledger.
    pub fn new(caps: Caps) -> Self {
        let limits = vec![Sum::default(); caps.limits.len()];
        Ledger { caps, entries: BTreeMap::new(), host: Sum::default(), limits }
    }

    /// Other caps over the same charges; `matching` tells which limits an instance falls under now.
    pub fn set_caps(&mut self, caps: Caps, matching: impl Fn(&InstanceId) -> Vec<usize>) {
        let mut next = Ledger::new(caps);
        for (instance, entry) in std::mem::take(&mut self.entries) {
            let limits = matching(&instance);
            next.put(&instance, Entry { limits, ..entry });
        }
        *self = next;
    }

    /// Records what was observed of an instance, new or known. A growth in flight stays charged.
    pub fn observe(&mut self, instance: &InstanceId, settled: Charge, limits: &[usize]) {
        let in_flight = self.entries.get(instance).and_then(|entry| entry.in_flight);
        self.put(instance, Entry { settled, in_flight, limits: limits.to_vec() });
    }

    /// Charges what [`Ledger::check`] let pass, or what passes without a check: a limit for what had none. The charge is
    /// the larger of `wanted` and what is settled. Whoever checks and reserves holds the ledger's lock over both.
    pub fn reserve(&mut self, instance: &InstanceId, wanted: Charge) {
        let entry = self.entries.get(instance).cloned().unwrap_or_default();
        let in_flight = Some(entry.in_flight.map_or(wanted, |now| now.max(wanted)));
        self.put(instance, Entry { in_flight, ..entry });
    }

    /// Admits or refuses that an instance be charged `wanted`, charging nothing. Only a dimension that grows is held
    /// against the caps, so a host over its caps still lets everything shrink. What was never observed has nothing, and the
    /// host's cap only: which limits it falls under nobody has told.
    pub fn check(&self, instance: &InstanceId, wanted: Charge) -> Result<(), Refused> {
        let (now, limits) = match self.entries.get(instance) {
            Some(entry) => (entry.charge(), entry.limits.as_slice()),
            None => (Charge::ZERO, [].as_slice()),
        };
        let host = (Cap::Host, Some(self.caps.host.cpus), Some(self.caps.host.memory), self.host);
        let limits = limits.iter().filter_map(|&place| {
            let cap = self.caps.limits.get(place)?;
            Some((Cap::Limit(place), cap.cpus, cap.memory, *self.limits.get(place)?))
        });
        for (cap, cpus, memory, sum) in std::iter::once(host).chain(limits) {
            let allowed = Charge { cpus: cpus.unwrap_or(Cpus::MAX), memory: memory.unwrap_or(ByteCount::MAX) };
            let others_cpus = sum.cpus - u128::from(now.cpus.millis());
            let others_memory = sum.memory - u128::from(now.memory.bytes());
            let over_cpus =
                cpus.is_some_and(|c| others_cpus + u128::from(wanted.cpus.millis()) > u128::from(c.millis()));
            let over_memory =
                memory.is_some_and(|m| others_memory + u128::from(wanted.memory.bytes()) > u128::from(m.bytes()));
            let resource = if wanted.cpus > now.cpus && over_cpus {
                Resource::Cpus
            } else if wanted.memory > now.memory && over_memory {
                Resource::Memory
            } else {
                continue;
            };
            let others = Sum { cpus: others_cpus, memory: others_memory }.charge();
            let largest = Charge {
                cpus: allowed.cpus.saturating_sub(others.cpus),
                memory: allowed.memory.saturating_sub(others.memory),
            };
            return Err(Refused { cap, resource, allowed, committed: sum.charge(), now, largest });
        }
        Ok(())
    }

    /// Ends what [`Ledger::reserve`] charged: from here on the instance is charged what was observed.
    pub fn release(&mut self, instance: &InstanceId, settled: Charge) {
        if let Some(entry) = self.entries.get(instance) {
            self.put(instance, Entry { settled, in_flight: None, limits: entry.limits.clone() });
        }
    }

    /// Drops an instance that is gone. One with a growth in flight stays: its outcome isn't known yet.
    pub fn forget(&mut self, instance: &InstanceId) {
        if let btree_map::Entry::Occupied(entry) = self.entries.entry(instance.clone())
            && entry.get().in_flight.is_none()
        {
            let old = entry.remove();
            self.add(&old.limits, old.charge(), Charge::ZERO);
        }
    }

    /// What is committed in all.
    pub fn committed(&self) -> Charge {
        self.host.charge()
    }

    /// What is committed under the `[[limit]]` at this place of the config.
    pub fn committed_under(&self, limit: usize) -> Charge {
        self.limits.get(limit).copied().unwrap_or_default().charge()
    }

    /// What one instance is charged.
    pub fn charge(&self, instance: &InstanceId) -> Charge {
        self.entries.get(instance).map_or(Charge::ZERO, Entry::charge)
    }

    /// The caps in force.
    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    fn put(&mut self, instance: &InstanceId, entry: Entry) {
        if let Some(old) = self.entries.remove(instance) {
            self.add(&old.limits, old.charge(), Charge::ZERO);
        }
        self.add(&entry.limits, Charge::ZERO, entry.charge());
        self.entries.insert(instance.clone(), entry);
    }

    fn add(&mut self, limits: &[usize], old: Charge, new: Charge) {
        self.host.replace(old, new);
        for &place in limits {
            if let Some(sum) = self.limits.get_mut(place) {
                sum.replace(old, new);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::instance::Kind;

    const CAP: Charge = Charge { cpus: Cpus::whole(16), memory: ByteCount::mib(16 * 1024) };
    const LIMIT: LimitCap = LimitCap { cpus: Some(Cpus::whole(6)), memory: None };

    fn instance(number: usize) -> InstanceId {
        InstanceId { kind: Kind::Vm, id: number.to_string() }
    }

    /// Odd instances fall under the one limit.
    fn limits(number: usize) -> &'static [usize] {
        if number % 2 == 1 { &[0] } else { &[] }
    }

    fn ledger() -> Ledger {
        Ledger::new(Caps { host: CAP, limits: vec![LIMIT] })
    }

    /// As the engine does it, under one lock.
    fn admit(ledger: &mut Ledger, instance: &InstanceId, wanted: Charge) -> Result<(), Refused> {
        ledger.check(instance, wanted)?;
        ledger.reserve(instance, wanted);
        Ok(())
    }

    fn charge() -> impl Strategy<Value = Charge> {
        (0..9000_u64, 0..9000_u32)
            .prop_map(|(cpus, mib)| Charge { cpus: Cpus::from_millis(cpus), memory: ByteCount::mib(mib) })
    }

    #[derive(Debug, Clone)]
    enum Event {
        Observe(usize, Charge),
        Admit(usize, Charge),
        Release(usize, Charge),
        Forget(usize),
    }

    fn event() -> impl Strategy<Value = Event> {
        let number = || 0..6_usize;
        prop_oneof![
            (number(), charge()).prop_map(|(n, c)| Event::Observe(n, c)),
            (number(), charge()).prop_map(|(n, c)| Event::Admit(n, c)),
            (number(), charge()).prop_map(|(n, c)| Event::Release(n, c)),
            number().prop_map(Event::Forget),
        ]
    }

    proptest! {
        #[test]
        fn never_admits_a_growth_past_a_cap(events in prop::collection::vec(event(), 1..80)) {
            let mut ledger = ledger();
            for event in events {
                match event {
                    Event::Observe(n, c) => ledger.observe(&instance(n), c, limits(n)),
                    Event::Release(n, c) => ledger.release(&instance(n), c),
                    Event::Forget(n) => ledger.forget(&instance(n)),
                    Event::Admit(n, wanted) => {
                        // The owner observes before it admits; without that, the host's cap holds all the same.
                        let known = ledger.entries.get(&instance(n)).is_some_and(|entry| entry.limits == limits(n));
                        let before = ledger.charge(&instance(n));
                        let admitted = admit(&mut ledger, &instance(n), wanted).is_ok();
                        let after = ledger.charge(&instance(n));
                        if admitted {
                            prop_assert_eq!(after, before.max(wanted));
                            if after.cpus > before.cpus { prop_assert!(ledger.committed().cpus <= CAP.cpus); }
                            if after.memory > before.memory { prop_assert!(ledger.committed().memory <= CAP.memory); }
                            if known && n % 2 == 1 && after.cpus > before.cpus {
                                prop_assert!(Some(ledger.committed_under(0).cpus) <= LIMIT.cpus);
                            }
                        } else {
                            prop_assert_eq!(after, before);
                        }
                    }
                }
            }
        }

        #[test]
        fn charge_and_release_balance(events in prop::collection::vec(event(), 1..80)) {
            let mut ledger = ledger();
            let mut model: BTreeMap<usize, (Charge, Option<Charge>)> = BTreeMap::new();
            for event in events {
                match event {
                    Event::Observe(n, c) => {
                        ledger.observe(&instance(n), c, limits(n));
                        model.entry(n).or_default().0 = c;
                    }
                    Event::Admit(n, c) if model.contains_key(&n) => {
                        if admit(&mut ledger, &instance(n), c).is_ok() {
                            let entry = model.entry(n).or_default();
                            entry.1 = Some(entry.1.map_or(c, |now| now.max(c)));
                        }
                    }
                    Event::Release(n, c) if model.contains_key(&n) => {
                        ledger.release(&instance(n), c);
                        model.insert(n, (c, None));
                    }
                    Event::Forget(n) => {
                        ledger.forget(&instance(n));
                        if model.get(&n).is_some_and(|entry| entry.1.is_none()) { model.remove(&n); }
                    }
                    Event::Admit(..) | Event::Release(..) => {}
                }
            }
            let sum = |odd_only: bool| model.iter().filter(|(n, _)| !odd_only || *n % 2 == 1).fold(
                (0, 0),
                |(cpus, memory), (_, (settled, in_flight))| {
                    let charge = in_flight.map_or(*settled, |c| c.max(*settled));
                    (cpus + charge.cpus.millis(), memory + charge.memory.bytes())
                },
            );
            let told = |charge: Charge| (charge.cpus.millis(), charge.memory.bytes());
            prop_assert_eq!(told(ledger.committed()), sum(false));
            prop_assert_eq!(told(ledger.committed_under(0)), sum(true));
            for n in model.keys() {
                ledger.release(&instance(*n), Charge::ZERO);
                ledger.forget(&instance(*n));
            }
            prop_assert_eq!(ledger.committed(), Charge::ZERO);
            prop_assert_eq!(ledger.committed_under(0), Charge::ZERO);
        }

        #[test]
        fn the_largest_value_told_is_admitted_and_one_more_is_not(first in charge(), second in charge()) {
            let mut ledger = ledger();
            ledger.observe(&instance(0), first, &[]);
            ledger.observe(&instance(2), second, &[]);
            let Err(refused) = ledger.check(&instance(0), Charge { cpus: Cpus::whole(100), memory: first.memory })
                else { return Ok(()) };
            let largest = Charge { cpus: refused.largest.cpus, memory: first.memory };
            prop_assert!(ledger.check(&instance(0), largest).is_ok());
            let more = Charge { cpus: Cpus::from_millis(largest.cpus.millis().max(first.cpus.millis()) + 1), ..largest };
            prop_assert!(ledger.check(&instance(0), more).is_err());
        }
    }

    #[test]
    fn a_host_over_its_caps_lets_everything_shrink_and_nothing_grow() {
        let mut ledger = ledger();
        let over = Charge { cpus: Cpus::whole(20), memory: ByteCount::mib(20 * 1024) };
        ledger.observe(&instance(0), over, &[]);
        assert!(ledger.check(&instance(0), Charge { cpus: Cpus::whole(19), memory: over.memory }).is_ok());
        assert!(ledger.check(&instance(0), over).is_ok(), "what stays as it is does not grow");
        let refused = ledger.check(&instance(0), Charge { cpus: Cpus::whole(21), memory: over.memory }).unwrap_err();
        assert_eq!((refused.cap, refused.resource), (Cap::Host, Resource::Cpus));
        let more = Charge { cpus: over.cpus, memory: ByteCount::mib(20 * 1024 + 1) };
        let refused = ledger.check(&instance(0), more).unwrap_err();
        assert_eq!((refused.cap, refused.resource), (Cap::Host, Resource::Memory));
    }

    #[test]
    fn other_caps_hold_at_once_over_the_same_charges_and_for_those_that_match_now() {
        let mut ledger = ledger();
        let one = Charge { cpus: Cpus::whole(1), memory: ByteCount::mib(512) };
        let four = Charge { cpus: Cpus::whole(4), ..one };
        for number in [0, 1] {
            ledger.observe(&instance(number), one, limits(number));
        }
        admit(&mut ledger, &instance(0), four).unwrap();
        let caps = Caps { host: CAP, limits: vec![LimitCap { cpus: Some(Cpus::whole(4)), memory: None }, LIMIT] };
        ledger.set_caps(caps.clone(), |instance| if instance.id == "0" { vec![0] } else { vec![1] });
        assert_eq!(ledger.caps(), &caps);
        assert_eq!(ledger.committed(), Charge { cpus: Cpus::whole(5), memory: ByteCount::mib(1024) });
        assert_eq!((ledger.committed_under(0), ledger.committed_under(1)), (four, one));
        let refused = ledger.check(&instance(0), Charge { cpus: Cpus::whole(5), ..one }).unwrap_err();
        assert_eq!(refused.cap, Cap::Limit(0));
        // What was in flight is still.
        ledger.forget(&instance(0));
        assert_eq!(ledger.charge(&instance(0)), four);
    }

    #[test]
    fn what_was_never_observed_is_held_to_the_hosts_cap_and_is_charged() {
        let mut ledger = ledger();
        let more = Charge { cpus: Cpus::whole(17), memory: ByteCount::mib(1) };
        assert_eq!(ledger.check(&instance(1), more).unwrap_err().largest.cpus, CAP.cpus);
        admit(&mut ledger, &instance(1), CAP).unwrap();
        assert_eq!(ledger.committed(), CAP);
        ledger.release(&instance(0), CAP);
        assert_eq!(ledger.committed(), CAP, "what is not there is not released");
    }

    #[test]
    fn a_limit_that_the_caps_dont_have_counts_and_binds_nothing() {
        let mut ledger = ledger();
        ledger.observe(&instance(0), Charge { cpus: Cpus::whole(1), memory: ByteCount::mib(1) }, &[0, 7]);
        admit(&mut ledger, &instance(0), Charge { cpus: Cpus::whole(5), memory: ByteCount::mib(1) }).unwrap();
        assert_eq!(ledger.committed_under(0).cpus, Cpus::whole(5));
        assert_eq!(ledger.committed_under(7), Charge::ZERO);
    }

    #[test]
    fn a_growth_in_flight_stays_charged_while_observations_come_in() {
        let mut ledger = ledger();
        let one = Charge { cpus: Cpus::whole(1), memory: ByteCount::mib(512) };
        let four = Charge { cpus: Cpus::whole(4), memory: ByteCount::mib(512) };
        ledger.observe(&instance(0), one, &[]);
        admit(&mut ledger, &instance(0), four).unwrap();
        ledger.observe(&instance(0), one, &[]);
        assert_eq!(ledger.committed(), four);
        ledger.release(&instance(0), one);
        assert_eq!(ledger.committed(), one);
    }
}
