//! What moved between two observations, and whether somebody else must have moved it. Pure.

use crate::api::{Move, MoveOf};
use crate::instance::{Observed, Reading};
use crate::operation::{Operation, Outcome, same_boot};
use crate::plan::{Aim, Targets, same_cpu_time};
use crate::units::{Cpus, Limit};

/// The values that differ, those that run and those that are saved.
pub fn moves(before: &Observed, after: &Observed) -> Vec<Move> {
    let mut moves = Vec::new();
    let whole = |a, b| a == b;
    let is_vm = before.reference.kind() == crate::instance::Kind::Vm;
    moves.extend(field(&before.cpus, &after.cpus, if is_vm { whole } else { about_same }).into_iter().map(Move::Cpus));
    moves.extend(field(&before.cpu_limit, &after.cpu_limit, about_same).into_iter().map(Move::CpuLimit));
    moves.extend(field(&before.memory, &after.memory, |a, b| a == b).into_iter().map(Move::Memory));
    moves
}

/// What was changed behind the daemon's back between two observations with no change of its own in between. A value that
/// another start brought, or one that could not be read before or can't be now, was changed by nobody.
/// `settling`: a guest that gives back, in its own time, what it was booted with beyond what is saved for it.
pub fn drift(before: &Observed, after: &Observed, settling: bool) -> Vec<Move> {
    drift_from(before, before, after, settling)
}

/// The same with a change of its own in between, which has left it as `left` where nobody else has touched it.
pub fn drift_after(ended: &Operation, before: &Observed, after: &Observed) -> Vec<Move> {
    drift_from(before, &left_by(ended, before), after, false)
}

fn drift_from(before: &Observed, left: &Observed, after: &Observed, settling: bool) -> Vec<Move> {
    if before.id != after.id {
        return Vec::new();
    }
    let same_run = before.boot.is_some() && same_boot(before.boot.as_deref(), after.boot.as_deref());
    let told = |saved: bool, known: bool| known && (saved || same_run);
    let mut moves = moves(left, after);
    // A guest that has just started gives back, in its own time, what it was booted with beyond what is saved.
    let at = |value: Option<Limit<_>>| value.and_then(Limit::at);
    let settles = before.reference.kind() == crate::instance::Kind::Vm
        && (settling || at(before.memory.accepted).is_some_and(|was| Some(was) >= before.memory.ceiling))
        && match (at(after.memory.accepted), at(after.memory.persistent)) {
            (Some(now), Some(saved)) => now >= saved && at(before.memory.accepted) > Some(now),
            _ => false,
        };
    moves.retain(|moved| match moved {
        Move::Memory(m) if !m.saved && settles => false,
        Move::Cpus(m) | Move::CpuLimit(m) => told(m.saved, m.before.is_some() && m.after.is_some()),
        Move::Memory(m) => told(m.saved, m.before.is_some() && m.after.is_some()),
        Move::State { .. } => true,
    });
    moves
}

/// What is there after a change that was seen to be done, if nobody else has touched it since: what was there before it, with
/// what it has set.
fn left_by(operation: &Operation, before: &Observed) -> Observed {
    fn set<T: Copy + PartialEq>(reading: &mut Reading<T>, aim: Option<Aim<T>>) {
        let Some(aim) = aim else { return };
        if aim.live {
            reading.accepted = Some(aim.requested);
        }
        if aim.saved {
            reading.persistent = Some(aim.to_save());
        }
    }
    let mut left = before.clone();
    if operation.outcome == Outcome::Changed {
        set(&mut left.cpus, operation.targets.cpus);
        set(&mut left.cpu_limit, operation.targets.cpu_limit);
        set(&mut left.memory, operation.targets.memory);
    }
    left
}

/// Whether a change was to move this field, on whichever side: what it is found at after it is its own doing.
pub fn is_of(targets: &Targets, moved: &Move) -> bool {
    match moved {
        Move::Cpus(_) => targets.cpus.is_some(),
        Move::CpuLimit(_) => targets.cpu_limit.is_some(),
        Move::Memory(_) => targets.memory.is_some(),
        Move::State { .. } => false,
    }
}

/// What a change moved, or was to move where nothing is observed any more. Where it was done and somebody else moved the same
/// since, this ends at what it had set: the rest is drift.
pub fn made(operation: &Operation, observed: Option<&Observed>) -> Vec<Move> {
    if operation.was_overwritten() {
        return Vec::new();
    }
    fn sides<T: Copy + PartialEq>(
        aim: Option<Aim<T>>,
        reading: Option<&Reading<T>>,
        done: bool,
        same: fn(Limit<T>, Limit<T>) -> bool,
    ) -> Vec<MoveOf<T>> {
        let Some(aim) = aim else { return Vec::new() };
        let after = |seen: Option<Limit<T>>, set| seen.map(|seen| if done && !same(set, seen) { set } else { seen });
        let accepted = after(reading.and_then(|reading| reading.accepted), aim.requested);
        let persistent = after(reading.and_then(|reading| reading.persistent), aim.to_save());
        let live = MoveOf { saved: false, before: aim.before, after: accepted };
        let saved = MoveOf { saved: true, before: aim.saved_before, after: persistent };
        let sides = [aim.live.then_some(live), aim.saved.then_some(saved)];
        sides.into_iter().flatten().filter(|moved| moved.before != moved.after).collect()
    }
    let (targets, done) = (&operation.targets, operation.outcome == Outcome::Changed);
    let mut moves: Vec<Move> = Vec::new();
    moves.extend(sides(targets.cpus, observed.map(|o| &o.cpus), done, about_same).into_iter().map(Move::Cpus));
    let cpu_limit = sides(targets.cpu_limit, observed.map(|o| &o.cpu_limit), done, about_same);
    moves.extend(cpu_limit.into_iter().map(Move::CpuLimit));
    moves.extend(sides(targets.memory, observed.map(|o| &o.memory), done, |a, b| a == b).into_iter().map(Move::Memory));
    moves
}

/// Whether two limits of CPU time are one, whichever of them was rounded.
fn about_same(a: Limit<Cpus>, b: Limit<Cpus>) -> bool {
    same_cpu_time(a, b) || same_cpu_time(b, a)
}

fn field<T: Copy + PartialEq>(
    before: &Reading<T>,
    after: &Reading<T>,
    same: fn(Limit<T>, Limit<T>) -> bool,
) -> Vec<MoveOf<T>> {
    let differ = |a: Option<Limit<T>>, b: Option<Limit<T>>| match (a, b) {
        (Some(a), Some(b)) => !same(a, b),
        (a, b) => a.is_some() != b.is_some(),
    };
    let sides = [(false, before.accepted, after.accepted), (true, before.persistent, after.persistent)];
    let moved = sides.into_iter().filter(|(_, before, after)| differ(*before, *after));
    moved.map(|(saved, before, after)| MoveOf { saved, before, after }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operation::{Identity, Who};
    use crate::plan::tests::{container, vm};
    use crate::plan::{Plan, Verb};
    use crate::units::{ByteCount, Cpus};

    fn at(cpus: u32) -> Option<Limit<Cpus>> {
        Some(Limit::At(Cpus::whole(cpus)))
    }

    #[test]
    fn what_moved_by_itself_is_drift_on_either_side() {
        let before = vm();
        let mut after = vm();
        after.cpus.accepted = at(3);
        after.memory.persistent = Some(Limit::At(ByteCount::mib(512)));
        let cpus = MoveOf { saved: false, before: before.cpus.accepted, after: at(3) };
        let memory = MoveOf { saved: true, before: before.memory.persistent, after: after.memory.persistent };
        assert_eq!(drift(&before, &after, false), [Move::Cpus(cpus), Move::Memory(memory)]);
        assert!(drift(&before, &before, false).is_empty());
    }

    #[test]
    fn a_guest_that_gives_back_what_it_was_booted_with_is_not_drift() {
        let mut before = vm();
        before.memory.accepted = before.memory.ceiling.map(Limit::At);
        let mut after = vm();
        for now in [1500, 1024] {
            after.memory.accepted = Some(Limit::At(ByteCount::mib(now)));
            assert!(drift(&before, &after, false).is_empty(), "{now}");
        }
        after.memory.accepted = Some(Limit::At(ByteCount::mib(700)));
        assert_eq!(drift(&before, &after, false).len(), 1, "less than is saved");
        assert_eq!(drift(&vm(), &before, false).len(), 1, "and more");
    }

    #[test]
    fn what_another_start_brought_or_cant_be_read_is_not() {
        let before = vm();
        let mut after = vm();
        after.cpus.accepted = at(3);
        after.boot = Some("another".into());
        assert!(drift(&before, &after, false).is_empty(), "it has what was saved");
        after.cpus.persistent = at(3);
        assert_eq!(drift(&before, &after, false).len(), 1, "what is saved outlives a start");
        assert!(drift(&before, &Observed { id: "another".into(), ..after.clone() }, false).is_empty());
        let mut unread = vm();
        (unread.cpus.accepted, unread.cpus.persistent) = (None, None);
        assert!(drift(&before, &unread, false).is_empty() && drift(&unread, &before, false).is_empty());
    }

    #[test]
    fn a_guest_that_gives_back_what_it_was_booted_with_moves_down_and_stops_at_what_is_saved() {
        let mut before = vm();
        before.memory.accepted = before.memory.ceiling.map(Limit::At);
        let mut saved = before.clone();
        saved.memory.persistent = Some(Limit::At(ByteCount::mib(512)));
        assert_eq!(drift(&before, &saved, false).len(), 1, "what is saved is nothing that a guest gives back");
        // One that settles need not be at its ceiling any more; a container never settles.
        let (mut part, mut rest) = (vm(), vm());
        part.memory.accepted = Some(Limit::At(ByteCount::mib(1500)));
        rest.memory.accepted = Some(Limit::At(ByteCount::mib(1200)));
        assert!(drift(&part, &rest, true).is_empty());
        assert_eq!(drift(&part, &rest, false).len(), 1);
        assert_eq!(drift(&rest, &part, true).len(), 1, "more");
        let of = |observed: &Observed| Observed { reference: container().reference, ..observed.clone() };
        assert_eq!(drift(&of(&part), &of(&rest), true).len(), 1);
    }

    #[test]
    fn cpu_time_is_the_same_where_it_was_rounded_and_vcpus_are_not() {
        let milli = |milli| Some(Limit::At(Cpus::from_millis(milli)));
        let (mut before, mut after) = (container(), container());
        (before.cpus.accepted, after.cpus.accepted) = (milli(1501), milli(1510));
        assert!(moves(&before, &after).is_empty() && moves(&after, &before).is_empty());
        let of = |observed: &Observed| Observed { reference: vm().reference, ..observed.clone() };
        assert_eq!(moves(&of(&before), &of(&after)).len(), 1);
    }

    #[test]
    fn memory_that_cant_be_read_has_not_moved() {
        let mut unread = vm();
        (unread.memory.accepted, unread.memory.persistent) = (None, None);
        assert!(drift(&vm(), &unread, false).is_empty() && drift(&unread, &vm(), false).is_empty());
        let mut stopped = vm();
        (stopped.boot, stopped.memory.accepted) = (None, Some(Limit::At(ByteCount::mib(1))));
        assert!(drift(&stopped, &vm(), false).is_empty(), "of no run to another");
    }

    /// A change of a VM's vCPUs, on these sides, that ended so.
    fn change(live: bool, saved: bool, outcome: Outcome) -> Operation {
        let aim = Aim {
            before: at(2),
            saved_before: at(2),
            requested: Limit::At(Cpus::whole(3)),
            saved_requested: Some(Limit::At(Cpus::whole(4))),
            live,
            saved,
        };
        let targets = Targets { cpus: Some(aim), ..Targets::default() };
        let plan = Plan { targets, ..Plan::empty(vm().reference, Identity::of(&vm()), Verb::Resize) };
        let who = Who { uid: 0, gid: 0, pid: 1, command: "test".into() };
        Operation { outcome, ..Operation::new("1".into(), who, plan, 0) }
    }

    #[test]
    fn after_a_change_of_its_own_what_it_set_is_no_drift_and_what_is_there_instead_is() {
        let seen = |accepted, persistent| {
            let mut seen = vm();
            (seen.cpus.accepted, seen.cpus.persistent) = (at(accepted), at(persistent));
            seen
        };
        for (live, saved, outcome, left) in [
            (true, true, Outcome::Changed, seen(3, 4)),
            (true, false, Outcome::Changed, seen(3, 2)),
            (false, true, Outcome::Changed, seen(2, 4)),
            (true, true, Outcome::RolledBack, seen(2, 2)),
        ] {
            let ended = change(live, saved, outcome);
            assert!(drift_after(&ended, &vm(), &left).is_empty(), "{live} {saved} {outcome:?}");
            let moved = drift_after(&ended, &vm(), &seen(1, 1));
            assert_eq!(moved.len(), 2, "{live} {saved} {outcome:?}");
            let from = |side: usize| if let Move::Cpus(moved) = &moved[side] { moved.before } else { None };
            assert_eq!((from(0), from(1)), (left.cpus.accepted, left.cpus.persistent));
        }
    }

    #[test]
    fn a_change_moves_the_fields_that_it_names() {
        let mut targets = change(true, true, Outcome::Changed).targets;
        let of = MoveOf { saved: false, before: at(1), after: at(2) };
        let memory = Move::Memory(MoveOf { saved: false, before: None, after: None });
        let state = Move::State { before: None, after: None };
        let all = [Move::Cpus(of.clone()), Move::CpuLimit(of), memory, state];
        let named = |targets: &Targets| all.iter().map(|moved| is_of(targets, moved)).collect::<Vec<_>>();
        assert_eq!(named(&targets), [true, false, false, false]);
        (targets.cpu_limit, targets.cpus) = (targets.cpus, None);
        assert_eq!(named(&targets), [false, true, false, false]);
    }
}
