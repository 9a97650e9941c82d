//! The book by itself: names that move, charges and holds that stay, what is drift and what isn't.

use agentd_core::api::HoldKind;
use agentd_core::operation::{Identity, Outcome, Who};
use agentd_core::plan::{Aim, Plan, Verb};
use agentd_core::units::{ByteCount, Cpus, Limit};
use futures_util::FutureExt;

use super::*;
use crate::backend::fake::Fake;
use crate::backend::{Backend, Look};

const HOST: HostCapacity = HostCapacity { cpus: Cpus::whole(8), memory: ByteCount::mib(16 * 1024) };

fn config() -> Config {
    Config::parse("test", "[capacity]\nreserved_memory = 0\nvm_overhead = 0\n").unwrap()
}

/// `vm/web`, which runs with 2 vCPUs and 1 GiB; one that can't be read where `blind`.
fn web(blind: bool) -> Observed {
    let spec = serde_json::json!({"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB"});
    let fake = Fake::new(serde_json::from_value(serde_json::json!({"instances": [spec]})).unwrap());
    fake.blur("web", blind);
    fake.observe("web", Look::Plain).now_or_never().unwrap().unwrap()
}

fn named(name: &str) -> Ref {
    Ref::new(Kind::Vm, name).unwrap()
}

fn with_cpus(observed: &Observed, cpus: u32) -> Observed {
    let mut other = observed.clone();
    (other.cpus.accepted, other.cpus.observed) =
        (Some(Limit::At(Cpus::whole(cpus))), Some(Limit::At(Cpus::whole(cpus))));
    other
}

/// A book that has seen these.
fn book(listing: &[Observed]) -> Book {
    let mut book = Book::new(&config(), HOST, "test".into());
    list(&mut book, listing);
    book
}

fn list(book: &mut Book, listing: &[Observed]) -> Vec<Drift> {
    let begun = book.moment();
    book.record_listing(Kind::Vm, listing.to_vec(), begun, &config())
}

fn look(book: &mut Book, observed: &Observed) -> Option<Drift> {
    let begun = book.moment();
    book.record(observed.clone(), begun, &config())
}

/// A change of this instance's vCPUs, to three, that is under way.
fn change(observed: &Observed, charge: Charge) -> Operation {
    let two = Some(Limit::At(Cpus::whole(2)));
    let requested = Limit::At(Cpus::whole(3));
    let aim = Aim { before: two, saved_before: two, requested, saved_requested: None, live: true, saved: true };
    let targets = Targets { cpus: Some(aim), ..Targets::default() };
    let plan = Plan::empty(observed.reference.clone(), Identity::of(observed), Verb::Resize);
    let who = Who { uid: 0, gid: 0, pid: 1, command: "test".into() };
    Operation::new("1".into(), who, Plan { targets, charge, ..plan }, 0)
}

/// Two instances under these names, the first with a hold.
fn two(names: [&str; 2]) -> (Book, [Observed; 2]) {
    let call = |name, id: &str| Observed { reference: named(name), id: id.to_owned(), ..web(false) };
    let two = [call(names[0], "1"), call(names[1], "2")];
    let mut book = book(&two);
    book.hold(&two[0].instance_id(), HoldKind::NeedsAttention, "look".into());
    (book, two)
}

#[test]
fn a_name_may_go_to_another_instance_and_charge_and_holds_stay_where_they_were() {
    let (_, [one, other]) = two(["web", "new"]);
    // The second takes the name of the first, which goes on as `old`.
    let moved =
        [Observed { reference: named("old"), ..one.clone() }, Observed { reference: named("web"), ..other.clone() }];
    let back = [moved[1].clone(), moved[0].clone()];
    let ways: [&dyn Fn(&mut Book) -> bool; 3] = [
        &|book| list(book, &moved).is_empty(),
        &|book| moved.iter().all(|observed| look(book, observed).is_none()),
        &|book| back.iter().all(|observed| look(book, observed).is_none()),
    ];
    for way in ways {
        let (mut book, _) = two(["web", "new"]);
        let committed = book.ledger().committed();
        book.take_unrecorded();
        assert!(way(&mut book), "a new name is no drift");
        assert_eq!(book.ledger().committed(), committed);
        let holds = |name: &str| book.named(&named(name)).map(|known| known.holds.len());
        assert_eq!([holds("old"), holds("web"), holds("new")], [Some(1), Some(0), None]);
        assert_eq!(book.take_unrecorded().len(), 2, "the new names are for the record");
    }
}

#[test]
fn a_change_in_flight_takes_no_other_observation_also_under_another_name() {
    let (mut book, [one, _]) = two(["web", "other"]);
    book.begin(&one.instance_id(), book.ledger().charge(&one.instance_id()));
    let elsewhere = Observed { reference: named("old"), ..with_cpus(&one, 4) };
    assert!(look(&mut book, &elsewhere).is_none());
    assert_eq!(book.get(&one.instance_id()).unwrap().observed, one);
}

#[test]
fn an_id_is_an_id_before_it_is_anothers_name() {
    // The first has the second's id for its name.
    let (mut book, [one, other]) = two(["2", "other"]);
    book.begin(&one.instance_id(), book.ledger().charge(&one.instance_id()));
    assert!(!book.is_busy(Kind::Vm, &other.id), "nothing is under way of the second");
    assert!(book.is_busy(Kind::Vm, &one.id) && book.was_missed(&one.instance_id()));
    book.begin(&other.instance_id(), book.ledger().charge(&other.instance_id()));
    assert!(book.is_busy(Kind::Vm, "other") && book.was_missed(&other.instance_id()), "by its name");
}

#[test]
fn one_that_has_to_be_settled_is_not_dropped_by_a_listing_and_one_with_its_name_is_charged_beside_it() {
    let (mut book, [one, other]) = two(["web", "other"]);
    let committed = book.ledger().committed();
    book.recovering(&change(&one, Charge::ZERO), "cut off".into());
    let again = Observed { id: "3".into(), ..one.clone() };
    list(&mut book, &[again.clone(), other]);
    assert_eq!(book.ledger().committed().cpus, Cpus::whole(6), "it, the one with its name, the other");
    assert!(book.named(&again.reference).unwrap().holds.is_empty());
    book.drop_gone(&one.instance_id());
    assert_eq!(book.ledger().committed(), committed);
    assert!(book.named(&again.reference).is_some());
}

#[test]
fn drift_beside_a_change_is_told_and_what_the_change_was_to_move_is_not() {
    let before = web(false);
    let mut after = with_cpus(&before, 3);
    after.memory.accepted = Some(Limit::At(ByteCount::mib(512)));
    let memory = |drift: Option<Drift>| matches!(drift.unwrap().moves[..], [Move::Memory(_)]);
    // At its end.
    let mut ended = book(std::slice::from_ref(&before));
    let operation = change(&before, ended.ledger().committed());
    ended.begin(&before.instance_id(), operation.charge);
    let last = Some((after.clone(), ended.moment()));
    assert!(memory(ended.end(&operation, last, &config(), true)));
    // And while nobody knows its end.
    let mut unknown = book(std::slice::from_ref(&before));
    unknown.recovering(&operation, "cut off".into());
    assert!(memory(look(&mut unknown, &after)));
}

#[test]
fn what_somebody_else_set_in_the_place_of_what_a_change_had_set_is_drift_from_that() {
    let before = web(false);
    let after = with_cpus(&before, 5);
    for (outcome, expected) in [(Outcome::Changed, Some(3)), (Outcome::Pending, None), (Outcome::Partial, None)] {
        let mut book = book(std::slice::from_ref(&before));
        let operation = change(&before, book.ledger().committed());
        let operation = Operation { outcome, ..operation };
        book.begin(&before.instance_id(), operation.charge);
        let last = Some((after.clone(), book.moment()));
        let from = book.end(&operation, last, &config(), true).map(|drift| match &drift.moves[..] {
            [Move::Cpus(moved), ..] => moved.before,
            _ => panic!("{:?}", drift.moves),
        });
        assert_eq!(from, expected.map(|cpus| Some(Limit::At(Cpus::whole(cpus)))), "{outcome:?}");
        let told = agentd_core::drift::made(&operation, Some(&after));
        let to = if outcome == Outcome::Changed { 3 } else { 5 };
        assert!(
            matches!(&told[..], [Move::Cpus(moved), ..] if moved.after == Some(Limit::At(Cpus::whole(to)))),
            "{told:?}"
        );
    }
}

#[test]
fn a_change_whose_end_was_not_seen_keeps_its_charge_and_is_no_drift_after_a_restart_either() {
    let before = web(false);
    let after = with_cpus(&before, 3);
    let mut book = book(std::slice::from_ref(&before));
    let grown = Charge { cpus: Cpus::whole(3), ..book.ledger().committed() };
    book.begin(&before.instance_id(), grown);
    assert!(book.end(&change(&before, grown), None, &config(), true).is_none());
    let rows = book.take_unrecorded();
    let [Entry::Instance(row)] = &rows[..] else { panic!("{rows:?}") };
    let mut later = Book::new(&config(), HOST, "later".into());
    later.restore((**row).clone(), &config());
    assert_eq!(later.ledger().committed(), grown);
    assert!(look(&mut later, &after).is_none(), "it is the change's own");
    assert!(look(&mut later, &before).is_some());
    assert_eq!(later.ledger().committed().cpus, Cpus::whole(2));
    let rows = later.take_unrecorded();
    assert!(matches!(&rows[..], [Entry::Instance(row), Entry::History(_)] if row.unseen.is_none()), "{rows:?}");
}

#[test]
fn a_change_after_which_nothing_could_be_read_is_no_drift_when_it_can() {
    let (before, blind) = (web(false), web(true));
    let after = with_cpus(&before, 3);
    for at_the_end in [true, false] {
        let mut book = book(std::slice::from_ref(&before));
        let grown = Charge { cpus: Cpus::whole(3), ..book.ledger().committed() };
        book.begin(&before.instance_id(), grown);
        let last = at_the_end.then(|| (blind.clone(), book.moment()));
        book.end(&change(&before, grown), last, &config(), true);
        assert!(look(&mut book, &blind).is_none());
        assert_eq!(book.ledger().committed(), grown, "nobody has seen that it is less");
        assert!(look(&mut book, &after).is_none(), "its own");
        assert!(look(&mut book, &with_cpus(&before, 1)).is_some());
        assert_eq!(book.ledger().committed().cpus, Cpus::whole(1));
    }
}

#[test]
fn a_change_that_ends_with_a_look_older_than_the_last_listing_gives_its_charge_back_too() {
    let (mut book, two) = two(["web", "other"]);
    let committed = book.ledger().committed();
    let operation = change(&two[0], Charge { cpus: Cpus::whole(7), ..committed });
    book.recovering(&operation, "cut off".into());
    assert!(book.ledger().committed().cpus > committed.cpus);
    let last = (two[0].clone(), book.moment());
    list(&mut book, &two);
    book.end(&operation, Some(last), &config(), true);
    assert_eq!(book.ledger().committed(), committed);
    assert!(!book.get(&two[0].instance_id()).unwrap().is_recovering());
}

#[test]
fn a_change_of_unknown_outcome_is_charged_until_it_is_settled() {
    let before = web(false);
    let mut book = book(std::slice::from_ref(&before));
    let grown = Charge { cpus: Cpus::whole(3), ..book.ledger().committed() };
    let operation = Operation { outcome: Outcome::Unknown, ..change(&before, grown) };
    book.begin(&before.instance_id(), grown);
    let last = (before.clone(), book.moment());
    book.end(&operation, Some(last), &config(), false);
    assert_eq!(book.ledger().committed(), grown);
    look(&mut book, &before);
    assert_eq!(book.ledger().committed(), grown);
    let last = (before.clone(), book.moment());
    book.end(&operation, Some(last), &config(), true);
    assert_eq!(book.ledger().committed().cpus, Cpus::whole(2));
}

#[test]
fn one_that_cant_be_read_keeps_its_charge_and_its_values_over_a_restart() {
    let before = web(false);
    let mut book = book(std::slice::from_ref(&before));
    let committed = book.ledger().committed();
    look(&mut book, &web(true));
    assert_eq!(book.get(&before.instance_id()).unwrap().observed.state, State::Unknown);
    let Some(Entry::Instance(row)) = book.entry(&before.instance_id()) else { panic!() };
    let mut later = Book::new(&config(), HOST, "later".into());
    later.restore(*row, &config());
    assert_eq!(later.ledger().committed(), committed);
    assert!(look(&mut later, &with_cpus(&before, 3)).is_some(), "what moved meanwhile is told");
}

#[test]
fn a_record_that_can_be_read_late_takes_nothing_back_of_what_was_seen_meanwhile() {
    let now = web(false);
    let gone = Observed { id: "gone".into(), ..now.clone() };
    let remembered = |observed: Observed, stamp| Remembered {
        loans: Vec::new(),
        pending: Vec::new(),
        stamp,
        observed,
        version: "old".into(),
        holds: vec![Hold::new(HoldKind::NeedsAttention, "look".into())],
        unseen: None,
    };
    let mut book = book(std::slice::from_ref(&now));
    book.restore(remembered(with_cpus(&now, 1), 7), &config());
    book.restore(remembered(gone, 9), &config());
    let known = book.named(&now.reference).unwrap();
    assert_eq!((&known.observed, known.holds.len()), (&now, 1), "its values of now, its hold of before");
    assert_eq!(book.ledger().charge(&now.instance_id()).cpus, Cpus::whole(2));
}

#[test]
fn what_is_charged_by_its_use_is_looked_at_with_what_moves_and_what_is_down_is_not() {
    let limited = web(false);
    let mut unlimited = limited.clone();
    (unlimited.memory.accepted, unlimited.memory.observed) = (Some(Limit::Unlimited), Some(Limit::Unlimited));
    let down = Observed { state: State::Stopped, ..unlimited.clone() };
    // What an engine tells of a limit that nothing has yet.
    let mut made = Observed { state: State::Stopped, ..limited.clone() };
    made.memory.observed = None;
    for (observed, by_use) in [(limited, false), (unlimited.clone(), true), (down, false), (made, false)] {
        let book = book(std::slice::from_ref(&observed));
        assert_eq!(book.charges_use(observed.reference.kind()), by_use, "{observed:?}");
        assert_eq!(!book.moving(observed.reference.kind()).is_empty(), by_use, "{observed:?}");
    }
}

#[test]
fn a_slow_round_comes_to_all_and_to_those_that_are_down_less_often() {
    let one = |number: usize, state: State| Observed {
        reference: named(&format!("vm-{number}")),
        id: format!("{number:02}"),
        state,
        ..web(false)
    };
    let state = |number: usize| if number < 30 { State::Running } else { State::Stopped };
    let all: Vec<Observed> = (0..60).map(|number| one(number, state(number))).collect();
    let book = book(&all);
    let (mut seen, mut last, mut rounds) = (BTreeSet::new(), None, 0);
    while seen.len() < all.len() {
        let next = book.next_of(Kind::Vm, last.as_ref(), 20);
        assert!((1..=20).contains(&next.len()), "{next:?}");
        seen.extend(next.iter().cloned());
        last = next.last().cloned();
        rounds += 1;
    }
    // 30 at 20 a time, 30 at 4 a time.
    assert_eq!(rounds, 9);
    assert!(Book::new(&config(), HOST, "test".into()).next_of(Kind::Vm, None, 20).is_empty());
    assert_eq!(book.counts(), (BTreeMap::from([(Kind::Vm, 60)]), 0));
}
