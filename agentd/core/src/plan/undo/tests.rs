//! Undo on observations made by hand, and its promise on any: what a change moved comes back to the last value, and an
//! undo of the undo moves it again.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::api::{Hold, HoldKind, OperationView};
use crate::instance::{Ability, Kind, Observed, Reading, Ref, Saved, State, Usage};
use crate::operation::{StepState, Who};
use crate::plan::tests::{MIB, container, plan, same, steps, unit, vm, with};
use crate::plan::{Reached, UndoClass, may_be_ours, overwritten, reached};
use crate::units::{ByteCount, Cpus};

/// What a backend keeps to itself: here the values, marked with the start that they were read at.
fn native(observed: &Observed) -> Value {
    json!({"boot": observed.boot, "quota": observed.cpu_limit.accepted, "cpus": observed.cpus.accepted})
}

/// What is observed after some steps, of a backend and a guest that obey.
fn after(observed: &Observed, steps: &[crate::plan::Step]) -> Observed {
    fn put<T: Copy>(reading: &mut Reading<T>, scope: Scope, up: bool, value: Option<Limit<T>>) {
        let Some(value) = value else { return };
        if scope != Scope::Saved && up {
            (reading.accepted, reading.observed) = (Some(value), Some(value));
        }
        if scope != Scope::Live {
            reading.persistent = Some(value);
        }
    }
    let mut now = observed.clone();
    let up = now.state.is_up();
    for step in steps {
        let (scope, values) = step.action.sets().unwrap();
        put(&mut now.cpus, scope, up, values.cpus);
        put(&mut now.cpu_limit, scope, up, values.cpu_limit);
        put(&mut now.memory, scope, up, values.memory);
        assert_eq!(reached(&step.action, &now), Reached::Yes);
    }
    now.native = native(&now);
    now
}

/// A plan that was carried out to its end.
fn ended(plan: Plan, outcome: Outcome) -> Operation {
    let who = Who { uid: 0, gid: 0, pid: 1, command: "ctl".into() };
    let mut operation = Operation::new("01J".into(), who, plan, 0);
    for record in &mut operation.steps {
        record.state = StepState::Done;
    }
    operation.outcome = outcome;
    operation
}

/// A change that was made, and what is observed then.
fn change(observed: &Observed, config: &str, body: Value) -> (Operation, Observed) {
    let plan = plan(observed, config, body).unwrap();
    let now = after(observed, &plan.steps);
    (ended(plan, Outcome::Changed), now)
}

fn undo_of(operation: &Operation, now: &Observed, config: &str) -> Result<Plan, Problem> {
    with(now, config, |inputs| undo(inputs, operation))
}

#[track_caller]
fn refused(operation: &Operation, now: &Observed, config: &str, code: Code) -> Problem {
    let problem = undo_of(operation, now, config).unwrap_err();
    assert_eq!(problem.code, code, "{problem}");
    problem
}

fn cpus(count: u32) -> Option<Limit<Cpus>> {
    Some(Limit::At(Cpus::whole(count)))
}

#[test]
fn what_a_change_touched_goes_back_in_the_order_of_a_resize() {
    let (operation, now) = change(&vm(), "", json!({"cpus": 4, "memory": "2G", "cpu_limit": 1.5}));
    let plan = undo_of(&operation, &now, "").unwrap();
    assert_eq!(
        steps(&plan),
        [
            "libvirt setVcpus saved 2",
            "libvirt setSchedulerParameters saved global_quota none",
            "libvirt setMemory saved 1 GiB",
            "libvirt setSchedulerParameters live global_quota none",
            "libvirt setMemory live 1 GiB",
            "libvirt setVcpus live 2",
        ]
    );
    assert_eq!((plan.verb, plan.undoes.as_deref()), (Verb::Undo, Some("01J")));
    assert_eq!(plan.steps[5].undo_what.as_deref(), Some("libvirt setVcpus live 4"));
    // Charged what it has until it is seen to have less.
    assert_eq!(plan.charge.cpus, Cpus::whole(4));
}

#[test]
fn the_backends_own_values_go_back_verbatim_and_the_present_ones_are_kept_for_the_way_back() {
    let (operation, now) = change(&vm(), "", json!({"cpu_limit": 1.5}));
    let plan = undo_of(&operation, &now, "").unwrap();
    for step in &plan.steps {
        assert!(matches!(&step.action, Action::Restore { native, .. } if *native == vm().native), "{step:?}");
        assert!(matches!(&step.undo, Some(Action::Restore { native, .. }) if *native == now.native), "{step:?}");
    }
}

#[test]
fn after_a_reboot_what_runs_goes_back_by_its_values_and_what_is_saved_verbatim() {
    let (operation, now) = change(&vm(), "", json!({"cpu_limit": 1.5}));
    let rebooted = Observed { boot: Some("2".into()), ..now };
    let plan = undo_of(&operation, &rebooted, "").unwrap();
    assert_eq!(plan.steps.len(), 2);
    assert!(matches!(&plan.steps[0].action, Action::Restore { scope: Scope::Saved, .. }), "{:?}", plan.steps[0]);
    assert!(matches!(&plan.steps[1].action, Action::Set { scope: Scope::Live, .. }), "{:?}", plan.steps[1]);
    // One call sets what is saved: it is the same over a restart.
    let (operation, now) = change(&container(), "", json!({"cpus": 1}));
    let plan = undo_of(&operation, &Observed { boot: Some("2".into()), ..now }, "").unwrap();
    assert!(matches!(&plan.steps[0].action, Action::Restore { scope: Scope::Both, .. }), "{:?}", plan.steps[0]);
}

#[test]
fn a_unit_goes_back_by_the_calls_that_changed_it() {
    let (operation, now) = change(&unit(), "", json!({"cpus": 1}));
    let plan = undo_of(&operation, &now, "").unwrap();
    assert_eq!(steps(&plan), ["systemd SetUnitProperties cpus 0.5"]);
    let (operation, now) = change(&unit(), "", json!({"cpus": 1, "apply": "live"}));
    let plan = undo_of(&operation, &now, "").unwrap();
    assert_eq!(steps(&plan), ["systemd SetUnitProperties runtime cpus 0.5"]);
    // What ran with another value than what was saved does so again.
    let mut differs = unit();
    differs.cpus.persistent = cpus(2);
    let (operation, now) = change(&differs, "", json!({"cpus": 1}));
    let plan = undo_of(&operation, &now, "").unwrap();
    assert_eq!(steps(&plan), ["systemd SetUnitProperties cpus 2", "systemd SetUnitProperties runtime cpus 0.5"]);
    let back = after(&now, &plan.steps);
    assert_eq!((back.cpus.accepted, back.cpus.persistent), (differs.cpus.accepted, differs.cpus.persistent));
}

#[test]
fn each_side_goes_back_to_its_own_value() {
    let mut differs = vm();
    differs.cpus.persistent = cpus(3);
    let (operation, now) = change(&differs, "", json!({"cpus": 4}));
    let plan = undo_of(&operation, &now, "").unwrap();
    assert_eq!(steps(&plan), ["libvirt setVcpus saved 3", "libvirt setVcpus live 2"]);
    let back = after(&now, &plan.steps);
    let undone = ended(plan, Outcome::Changed);
    assert!(undone.targets.standing(&back) == crate::plan::Standing::Asked && undone.targets.are_observed(&back));
    assert!(undone.targets.standing(&now) == crate::plan::Standing::Before);
    let view = serde_json::to_value(OperationView::new(&undone, Some(&back), None)).unwrap();
    assert_eq!(view["undoes"], "01J");
    let moved = &view["changes"][0];
    assert_eq!((&moved["requested"], &moved["saved_requested"]), (&json!(2), &json!(3)));
    assert_eq!((&moved["live"], &moved["persistent"]), (&json!(true), &json!(true)));
    let kept: Operation = serde_json::from_value(serde_json::to_value(&undone).unwrap()).unwrap();
    assert_eq!(kept, undone);
    let again = undo_of(&undone, &back, "").unwrap();
    assert_eq!(steps(&again), ["libvirt setVcpus saved 4", "libvirt setVcpus live 4"]);
}

#[test]
fn only_the_fields_and_sides_that_a_change_touched_go_back() {
    // Memory was named and was already so; since then somebody else has changed it.
    let (operation, mut now) = change(&vm(), "", json!({"cpus": 4, "memory": "1G"}));
    now.memory = same(Limit::At(MIB(2048)), MIB(1), MIB(1), Some(MIB(2048)));
    let plan = undo_of(&operation, &now, "").unwrap();
    assert_eq!(steps(&plan), ["libvirt setVcpus saved 2", "libvirt setVcpus live 2"]);
    assert_eq!(plan.targets.memory, None);
    let (operation, now) = change(&vm(), "", json!({"cpus": 4, "apply": "live"}));
    assert_eq!(steps(&undo_of(&operation, &now, "").unwrap()), ["libvirt setVcpus live 2"]);
}

#[test]
fn what_somebody_changed_since_is_refused_by_name() {
    let (operation, now) = change(&vm(), "", json!({"cpus": 4, "memory": "2G"}));
    let mut moved = now.clone();
    moved.memory.accepted = Some(Limit::At(MIB(1536)));
    let problem = refused(&operation, &moved, "", Code::InvalidState);
    assert_eq!(
        problem.detail,
        "the memory of vm/web is 1536 MiB now; operation 01J had set it to 2 GiB (before: 1 GiB)"
    );
    assert!(problem.hint.unwrap().ends_with("ctl resize vm/web --memory 1GiB"));
    let mut moved = now.clone();
    moved.cpus.persistent = cpus(1);
    assert!(
        refused(&operation, &moved, "", Code::InvalidState).detail.starts_with("the saved cpus of vm/web is 1 now")
    );
    let unknown = Observed { cpus: Reading { accepted: None, ..now.cpus.clone() }, ..now };
    refused(&operation, &unknown, "", Code::InvalidState);
}

#[test]
fn a_quota_that_the_cgroup_driver_rounded_up_is_still_the_one_that_was_set() {
    let (operation, mut now) = change(&container(), "", json!({"cpus": 1.501}));
    now.cpus.accepted = Some(Limit::At(Cpus::from_millis(1510)));
    assert_eq!(steps(&undo_of(&operation, &now, "").unwrap()), ["docker update cpus 0.5"]);
    now.cpus.accepted = Some(Limit::At(Cpus::from_millis(1520)));
    refused(&operation, &now, "", Code::InvalidState);
}

#[test]
fn what_is_back_already_needs_no_step() {
    let (operation, _) = change(&vm(), "", json!({"cpus": 4, "memory": "2G"}));
    let plan = undo_of(&operation, &vm(), "").unwrap();
    assert!(plan.steps.is_empty());
    assert_eq!(plan.notes, ["vm/web is already as it was before operation 01J"]);
    // A live change that a restart took back.
    let (operation, _) = change(&vm(), "", json!({"cpus": 4, "apply": "live"}));
    assert!(undo_of(&operation, &Observed { boot: Some("2".into()), ..vm() }, "").unwrap().steps.is_empty());
}

#[test]
fn of_what_has_stopped_only_the_saved_side_goes_back() {
    let (operation, now) = change(&vm(), "", json!({"cpus": 4}));
    let stopped = Observed { state: State::Stopped, boot: None, ..now };
    assert_eq!(steps(&undo_of(&operation, &stopped, "").unwrap()), ["libvirt setVcpus saved 2"]);
    let (operation, now) = change(&vm(), "", json!({"cpus": 4, "apply": "live"}));
    let stopped = Observed { state: State::Stopped, boot: None, ..now };
    let plan = undo_of(&operation, &stopped, "").unwrap();
    assert!(plan.steps.is_empty() && plan.notes[0].contains("nothing is left"), "{:?}", plan.notes);
    refused(&operation, &Observed { state: State::Stopping, ..stopped }, "", Code::InvalidState);
}

#[test]
fn what_was_changed_for_the_next_start_leaves_what_runs_alone_and_says_so() {
    let stopped = Observed { state: State::Stopped, boot: None, ..vm() };
    let (operation, mut now) = change(&stopped, "", json!({"cpus": 4}));
    (now.state, now.boot) = (State::Running, Some("2".into()));
    (now.cpus.accepted, now.cpus.observed) = (cpus(4), cpus(4));
    let plan = undo_of(&operation, &now, "").unwrap();
    assert_eq!(steps(&plan), ["libvirt setVcpus saved 2"]);
    assert_eq!(plan.notes, ["what runs keeps cpus 4: only its next start was changed"]);
    // A container has one set of limits, whether it was up then or is now.
    let stopped = Observed { state: State::Stopped, boot: None, ..container() };
    let (operation, mut now) = change(&stopped, "", json!({"cpus": 1}));
    (now.state, now.boot, now.cpus.accepted) = (State::Running, Some("2".into()), cpus(1));
    now.cpus.observed = cpus(1);
    let plan = undo_of(&operation, &now, "").unwrap();
    assert_eq!((steps(&plan), plan.targets.cpus.unwrap().live), (vec!["docker update cpus 0.5"], true));
}

#[test]
fn only_changes_of_size_that_ended_well_are_taken_back() {
    let (operation, now) = change(&vm(), "", json!({"cpus": 4}));
    for outcome in [Outcome::Changed, Outcome::Pending] {
        assert_eq!(undo_of(&Operation { outcome, ..operation.clone() }, &now, "").unwrap().steps.len(), 2);
    }
    let nothing = undo_of(&Operation { outcome: Outcome::Unchanged, ..operation.clone() }, &now, "").unwrap();
    assert_eq!((nothing.steps.len(), nothing.notes.len()), (0, 1));
    for outcome in [
        Outcome::Running,
        Outcome::Unknown,
        Outcome::Refused,
        Outcome::RolledBack,
        Outcome::Partial,
        Outcome::Abandoned,
    ] {
        let problem = refused(&Operation { outcome, ..operation.clone() }, &now, "", Code::InvalidState);
        assert!(problem.hint.is_some(), "{problem}");
    }
    for (verb, opposite) in [(Verb::Start, "ctl stop vm/web"), (Verb::Stop, "ctl start vm/web")] {
        let problem = refused(&Operation { verb, ..operation.clone() }, &now, "", Code::Unsupported);
        assert_eq!(problem.hint.as_deref(), Some(opposite));
    }
}

#[test]
fn another_instance_of_the_same_name_is_left_alone() {
    let (operation, now) = change(&vm(), "", json!({"cpus": 4}));
    let problem = refused(&operation, &Observed { id: "other".into(), ..now }, "", Code::InvalidState);
    assert!(problem.detail.contains("has that name by now"), "{problem}");
}

#[test]
fn what_refuses_a_resize_refuses_an_undo() {
    let (operation, now) = change(&vm(), "", json!({"cpus": 1, "memory": "512M"}));
    with(&now, "", |inputs| {
        let holds = [Hold::new(HoldKind::Suspended, "r".into())];
        assert_eq!(undo(&Inputs { holds: &holds, ..*inputs }, &operation).unwrap_err().code, Code::Held);
    });
    let swarm = Observed { unchangeable: Some("swarm".into()), ..now.clone() };
    refused(&operation, &swarm, "", Code::Unsupported);
    refused(&operation, &now, "[[limit]]\nmatch = \"*\"\nlive = false\n", Code::RestartRequired);
    refused(&operation, &now, "[capacity]\ncpus = 1\n", Code::CapacityExceeded);
    refused(&operation, &now, "[[limit]]\nmatch = \"*\"\nmax_memory = \"600MiB\"\n", Code::LimitExceeded);
    let mut paused = Observed { state: State::Paused, ..now };
    paused.cpus.live = Ability::No(Code::InvalidState, "it is paused".into());
    refused(&operation, &paused, "", Code::InvalidState);

    let (grown, now) = change(&vm(), "", json!({"memory": "2G"}));
    let busy = Observed { used: Usage::Known(MIB(1000)), ..now.clone() };
    refused(&grown, &busy, "", Code::BelowMinimum);
    refused(&grown, &Observed { used: Usage::Silent, ..now }, "", Code::GuestSilent);
}

#[test]
fn bounds_bind_each_side_by_its_own_value() {
    let mut differs = vm();
    differs.cpus.persistent = cpus(4);
    let (operation, now) = change(&differs, "", json!({"cpus": 3}));
    let problem = refused(&operation, &now, "[[limit]]\nmatch = \"*\"\nmax_cpus = 3\n", Code::LimitExceeded);
    assert!(problem.detail.starts_with("cpus 4 is more"), "{problem}");
}

#[test]
fn what_nothing_takes_back_is_unsupported() {
    let mut free = container();
    free.memory = same(Limit::Unlimited, MIB(1), MIB(6), None);
    free.memory.unlimit = Ability::No(Code::Unsupported, "Docker keeps it".into());
    let config = "[[limit]]\nmatch = \"*\"\nunlimited = true\n";
    let (operation, now) = change(&free, config, json!({"memory": "128M"}));
    assert_eq!(operation.steps[0].step.class, UndoClass::None);
    assert!(refused(&operation, &now, config, Code::Unsupported).detail.contains("Docker keeps it"));
    // Where the instance alone doesn't tell, the record does.
    let mut one_way = container();
    one_way.cpus.unlimit = Ability::OneWay("Docker drops later limits".into());
    let (operation, now) = change(&one_way, config, json!({"cpus": "none"}));
    assert!(refused(&operation, &now, config, Code::Unsupported).detail.contains("nothing takes back"));
    // A limit may be put on and be taken away again only where the config lets it be.
    let mut free = container();
    free.cpus = same(Limit::Unlimited, Cpus::from_millis(1), Cpus::from_millis(10), None);
    let (operation, now) = change(&free, "", json!({"cpus": 1}));
    refused(&operation, &now, "", Code::LimitExceeded);
    assert_eq!(steps(&undo_of(&operation, &now, config).unwrap()), ["docker update cpus none"]);
}

#[test]
fn a_failed_step_of_an_undo_is_told_from_somebody_elses() {
    let (operation, now) = change(&container(), "", json!({"memory": "128M"}));
    let plan = undo_of(&operation, &now, "").unwrap();
    let (action, way_back) = (&plan.steps[0].action, plan.steps[0].undo.as_ref().unwrap());
    let mut seen = now;
    assert!(may_be_ours(action, way_back, &seen, false) && may_be_ours(action, way_back, &container(), false));
    seen.memory.persistent = Some(Limit::At(MIB(96)));
    assert!(!may_be_ours(action, way_back, &seen, false));
    assert!(overwritten(action, &seen));
    seen.memory.accepted = action.sets().unwrap().1.memory;
    assert!(!overwritten(action, &seen), "what runs is what it set");
    seen.memory.accepted = Some(Limit::At(MIB(96)));
    assert!(overwritten(action, &seen));
    seen.memory.persistent = None;
    assert!(!overwritten(action, &seen), "nobody can tell");
}

/// The values of an instance, those that run only where it does.
fn values(observed: &Observed) -> [Option<String>; 6] {
    let up = observed.state.is_up();
    let tell = |value: Option<String>, live: bool| value.filter(|_| up || !live);
    let limits = [&observed.cpus, &observed.cpu_limit];
    let [cpus, cpu_limit] = limits.map(|r| (r.accepted.map(|v| v.to_string()), r.persistent.map(|v| v.to_string())));
    let memory = &observed.memory;
    [
        tell(cpus.0, true),
        tell(cpus.1, false),
        tell(cpu_limit.0, true),
        tell(cpu_limit.1, false),
        tell(memory.accepted.map(|v| v.to_string()), true),
        tell(memory.persistent.map(|v| v.to_string()), false),
    ]
}

fn cpu_time() -> impl Strategy<Value = Limit<Cpus>> {
    prop_oneof![Just(Limit::Unlimited), (10_u64..4000).prop_map(|millis| Limit::At(Cpus::from_millis(millis)))]
}

prop_compose! {
    fn any_vm()(live in 1_u32..=4, saved in 1_u32..=4, limits in (cpu_time(), cpu_time()),
                memory in (1_u64..1 << 31, 1_u64..1 << 31), up: bool, kept: bool) -> Observed {
        let mut vm = vm();
        (vm.cpus.accepted, vm.cpus.observed, vm.cpus.persistent) = (cpus(live), cpus(live), cpus(saved));
        let limit = Some(limits.0);
        (vm.cpu_limit.accepted, vm.cpu_limit.observed, vm.cpu_limit.persistent) = (limit, limit, Some(limits.1));
        let bytes = |bytes| ByteCount::new(bytes).map(Limit::At);
        let (now, next) = (bytes(memory.0), bytes(memory.1));
        (vm.memory.accepted, vm.memory.observed, vm.memory.persistent) = (now, now, next);
        if !kept && up {
            vm.saved = Saved::Nowhere;
            (vm.cpus.persistent, vm.cpu_limit.persistent, vm.memory.persistent) = (None, None, None);
        }
        if !up {
            (vm.state, vm.boot) = (State::Stopped, None);
        }
        vm.native = native(&vm);
        vm
    }
}

prop_compose! {
    fn any_container()(limit in cpu_time(), memory in 6_u64 << 20..1 << 30, up: bool) -> Observed {
        let mut db = container();
        db.reference = Ref::new(Kind::Container, "db").unwrap();
        db.cpus = same(limit, Cpus::from_millis(1), Cpus::from_millis(10), Some(Cpus::whole(8)));
        db.memory = same(Limit::At(ByteCount::new(memory).unwrap()), ByteCount::new(4096).unwrap(), MIB(6), None);
        if !up {
            (db.state, db.boot) = (State::Stopped, None);
        }
        db.native = native(&db);
        db
    }
}

fn any_request() -> impl Strategy<Value = Value> {
    let cpus = proptest::option::of(prop_oneof![(1_u32..=4).prop_map(|n| json!(n)), cpu_time().prop_map(|c| json!(c))]);
    let limit = proptest::option::of(cpu_time().prop_map(|limit| json!(limit)));
    let memory = proptest::option::of((6_u64 << 20..1 << 31).prop_map(|bytes| json!(bytes)));
    let apply = proptest::option::of(prop_oneof![Just(json!("live")), Just(json!("next-boot"))]);
    (cpus, limit, memory, apply).prop_map(|(cpus, limit, memory, apply)| {
        let fields = [("cpus", cpus), ("cpu_limit", limit), ("memory", memory), ("apply", apply)];
        fields.into_iter().filter_map(|(name, value)| value.map(|value| (name.to_owned(), value))).collect()
    })
}

proptest! {
    #[test]
    fn an_undo_brings_every_value_back_and_its_undo_moves_it_again(
        before in prop_oneof![any_vm(), any_container()], body in any_request(), rebooted: bool,
    ) {
        let config = "[[limit]]\nmatch = \"*\"\nunlimited = true\nshrink = \"always\"\n";
        let Ok(change) = plan(&before, config, body) else { return Ok(()) };
        let mut changed = after(&before, &change.steps);
        let ends = |plan: Plan| {
            let outcome = if plan.steps.is_empty() { Outcome::Unchanged } else { Outcome::Changed };
            ended(plan, outcome)
        };
        let operation = ends(change);
        // Another start with the same values: what runs may not be put back by values of the start before.
        if rebooted && changed.boot.is_some() {
            changed.boot = Some("2".into());
        }
        let back_plan = undo_of(&operation, &changed, config).unwrap();
        for step in &back_plan.steps {
            if let Action::Restore { scope: Scope::Live, native, .. } = &step.action {
                prop_assert_eq!(&native["boot"], &json!(changed.boot));
            }
        }
        let back = after(&changed, &back_plan.steps);
        prop_assert_eq!(values(&back), values(&before));
        let again = undo_of(&ends(back_plan), &back, config).unwrap();
        prop_assert_eq!(values(&after(&back, &again.steps)), values(&changed));
    }
}
