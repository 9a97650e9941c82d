//! The planner on observations made by hand: the very steps, and every refusal with its code and numbers.

use std::collections::BTreeMap;

use super::{
    Action, HostCapacity, Inputs, Mark, Plan, Reached, Scope, Settle, UndoClass, Values, Verb, caps, charge_of,
    reached, resize, start, start_charge, stop,
};
use crate::api::{Hold, HoldKind, ResizeRequest};
use crate::config::Config;
use crate::error::{Code, Problem};
use crate::instance::{Ability, Barred, Covered, Demand, Kind, Observed, Parts, Reading, Ref, Saved, State, Usage};
use crate::ledger::{Charge, Ledger};
use crate::units::{ByteCount, Cpus, Limit};

pub(super) const MIB: fn(u32) -> ByteCount = ByteCount::mib;
const HOST: HostCapacity = HostCapacity { cpus: Cpus::whole(8), memory: ByteCount::mib(8192) };

pub(super) fn same<T: Copy>(value: Limit<T>, grain: T, least: T, ceiling: Option<T>) -> Reading<T> {
    Reading {
        accepted: Some(value),
        observed: Some(value),
        confirmed: None,
        persistent: Some(value),
        ceiling,
        saved_ceiling: ceiling,
        floor: None,
        grain,
        least,
        live: Ability::Yes,
        unlimit: Ability::Yes,
    }
}

/// A running VM: 2 of 4 vCPUs, 1 of 2 GiB, no cpu_limit, 300 MiB in use.
pub(crate) fn vm() -> Observed {
    Observed {
        reference: Ref::new(Kind::Vm, "web").unwrap(),
        id: "uuid".into(),
        boot: Some("1".into()),
        state: State::Running,
        saved: Saved::Apart,
        cpus: same(Limit::At(Cpus::whole(2)), Cpus::whole(1), Cpus::whole(1), Some(Cpus::whole(4))),
        cpu_limit: same(Limit::Unlimited, Cpus::from_millis(1), Cpus::from_millis(10), None),
        memory: same(Limit::At(MIB(1024)), ByteCount::new(4096).unwrap(), MIB(1), Some(MIB(2048))),
        used: Usage::Known(MIB(300)),
        demand: Demand { cpus: Some(Limit::At(Cpus::whole(2))), memory: Some(Limit::At(MIB(2048))) },
        covered: Covered::default(),
        barred: Barred::default(),
        parts: None,
        saved_parts: None,
        labels: BTreeMap::new(),
        notes: Vec::new(),
        switched_off: false,
        unchangeable: None,
        native: serde_json::json!({"quota": 33333}),
    }
}

/// A running container: 0.5 CPUs, 64 MiB, 10 MiB in use.
pub(crate) fn container() -> Observed {
    let cpus = Limit::At(Cpus::from_millis(500));
    Observed {
        reference: Ref::new(Kind::Container, "db").unwrap(),
        saved: Saved::Together,
        cpus: same(cpus, Cpus::from_millis(1), Cpus::from_millis(10), Some(Cpus::whole(8))),
        cpu_limit: Reading::absent(Cpus::from_millis(1), "a container has cpus for that"),
        memory: same(Limit::At(MIB(64)), ByteCount::new(4096).unwrap(), MIB(6), None),
        used: Usage::Known(MIB(10)),
        demand: Demand { cpus: Some(cpus), memory: Some(Limit::At(MIB(64))) },
        covered: Covered::default(),
        parts: None,
        saved_parts: None,
        ..vm()
    }
}

/// A running service of systemd: 0.5 CPUs, 64 MiB, 10 MiB in use.
pub(crate) fn unit() -> Observed {
    Observed { reference: Ref::new(Kind::Unit, "batch.service").unwrap(), saved: Saved::OnRequest, ..container() }
}

pub(super) fn with<T>(observed: &Observed, config: &str, run: impl FnOnce(&Inputs<'_>) -> T) -> T {
    with_holds(observed, &[], config, run)
}

pub(super) fn with_holds<T>(
    observed: &Observed,
    holds: &[Hold],
    config: &str,
    run: impl FnOnce(&Inputs<'_>) -> T,
) -> T {
    let config = Config::parse("test", config).unwrap();
    let rules = config.rules_for(observed.reference.as_str(), &observed.labels);
    let capacity = &config.capacity;
    let host = HostCapacity { cpus: capacity.cpus.or_host(HOST.cpus), memory: capacity.memory.or_host(HOST.memory) };
    let mut ledger = Ledger::new(caps(&config, host));
    ledger.observe(&observed.instance_id(), charge_of(observed, &config), &rules.matching);
    run(&Inputs { observed, holds, config: &config, rules: &rules, host, ledger: &ledger })
}

pub(crate) fn plan(observed: &Observed, config: &str, body: serde_json::Value) -> Result<Plan, Problem> {
    let request: ResizeRequest = serde_json::from_value(body).unwrap();
    with(observed, config, |inputs| resize(inputs, &request, None))
}

pub(super) fn steps(plan: &Plan) -> Vec<&str> {
    plan.steps.iter().map(|step| step.what.as_str()).collect()
}

#[track_caller]
fn refused(observed: &Observed, config: &str, body: serde_json::Value, code: Code) -> Problem {
    let problem = plan(observed, config, body.clone()).expect_err(&body.to_string());
    assert_eq!(problem.code, code, "{body}: {problem}");
    problem
}

#[test]
fn steps_run_from_the_surest_to_undo_to_the_least_sure() {
    let plan = plan(&vm(), "", serde_json::json!({"cpus": 4, "memory": "2G", "cpu_limit": 1.5})).unwrap();
    assert_eq!(
        steps(&plan),
        [
            "libvirt setVcpus saved 4",
            "libvirt setSchedulerParameters saved global_quota 1.5",
            "libvirt setMemory saved 2 GiB",
            "libvirt setSchedulerParameters live global_quota 1.5",
            "libvirt setMemory live 2 GiB",
            "libvirt setVcpus live 4",
        ]
    );
    assert_eq!(plan.steps[5].undo_what.as_deref(), Some("libvirt setVcpus live 2"));
    assert_eq!(plan.charge, Charge { cpus: Cpus::whole(4), memory: MIB(2048 + 200) });
}

#[test]
fn a_container_gets_one_call_for_all_fields() {
    let plan = plan(&container(), "", serde_json::json!({"cpus": 1.5, "memory": "128M"})).unwrap();
    assert_eq!(steps(&plan), ["docker update cpus 1.5 memory 128 MiB"]);
    assert_eq!(plan.steps[0].undo_what.as_deref(), Some("docker update cpus 0.5 memory 64 MiB"));
}

#[test]
fn only_the_named_field_is_touched_and_what_is_already_so_needs_no_step() {
    let one = plan(&vm(), "", serde_json::json!({"memory": "1536M"})).unwrap();
    assert_eq!(steps(&one), ["libvirt setMemory saved 1536 MiB", "libvirt setMemory live 1536 MiB"]);
    assert!(plan(&vm(), "", serde_json::json!({"memory": "1G", "cpus": 2})).unwrap().steps.is_empty());
    let mut differs = vm();
    differs.cpus.persistent = Some(Limit::At(Cpus::whole(3)));
    assert_eq!(steps(&plan(&differs, "", serde_json::json!({"cpus": 2})).unwrap()), ["libvirt setVcpus saved 2"]);
}

#[test]
fn live_only_and_next_boot_touch_their_side_only() {
    let live = plan(&vm(), "", serde_json::json!({"cpus": 3, "apply": "live"})).unwrap();
    assert_eq!(steps(&live), ["libvirt setVcpus live 3"]);
    let saved = plan(&vm(), "", serde_json::json!({"cpus": 3, "apply": "next-boot"})).unwrap();
    assert_eq!(steps(&saved), ["libvirt setVcpus saved 3"]);
    for apply in ["live", "next-boot"] {
        refused(&container(), "", serde_json::json!({"cpus": 1, "apply": apply}), Code::Unsupported);
    }
}

#[test]
fn one_call_changes_a_unit_and_keeps_that_unless_it_is_asked_not_to() {
    let both = plan(&unit(), "", serde_json::json!({"cpus": 0.3, "memory": "128M"})).unwrap();
    assert_eq!(steps(&both), ["systemd SetUnitProperties cpus 0.3 memory 128 MiB"]);
    assert_eq!(both.steps[0].action.sets().unwrap().0, Scope::Both);
    let live = plan(&unit(), "", serde_json::json!({"cpus": 0.3, "apply": "live"})).unwrap();
    assert_eq!(steps(&live), ["systemd SetUnitProperties runtime cpus 0.3"]);
    refused(&unit(), "", serde_json::json!({"cpus": 0.3, "apply": "next-boot"}), Code::Unsupported);
    let stopped = Observed { state: State::Stopped, boot: None, ..unit() };
    for apply in ["both", "next-boot"] {
        let saved = plan(&stopped, "", serde_json::json!({"cpus": 0.3, "apply": apply})).unwrap();
        assert_eq!(saved.steps[0].action.sets().unwrap().0, Scope::Both, "{apply}");
        assert_eq!(saved.charge, Charge::ZERO);
    }
    // What runs with another value than what is saved goes back to each.
    let mut differs = unit();
    differs.cpus.persistent = Some(Limit::Unlimited);
    let both = plan(&differs, "", serde_json::json!({"cpus": 0.3})).unwrap();
    let undo = both.steps[0].undo.as_ref().unwrap();
    assert_eq!(
        (undo.sets().unwrap().1.cpus, undo.saves().unwrap().cpus),
        (differs.cpus.accepted, differs.cpus.persistent)
    );
    assert_eq!(reached(undo, &differs), Reached::Yes);
    assert!(matches!(reached(undo, &unit()), Reached::No(_)));
}

#[test]
fn what_was_plugged_moves_in_steps_of_its_own() {
    let parts = Parts { base: MIB(1024), balloon: MIB(512), plugged: MIB(0), size: MIB(1024), block: MIB(2) };
    let mut web = Observed { parts: Some(parts), saved_parts: Some(Parts { balloon: MIB(1024), ..parts }), ..vm() };
    web.memory = same(Limit::At(MIB(512)), MIB(1), MIB(1), Some(MIB(2048)));
    web.memory.persistent = Some(Limit::At(MIB(1024)));
    let grown = plan(&web, "", serde_json::json!({"memory": "1537M"})).unwrap();
    assert_eq!(
        steps(&grown),
        [
            "libvirt virtio-mem saved 514 MiB, 1538 MiB in all",
            "libvirt setMemory live 1 GiB",
            "libvirt virtio-mem live 514 MiB, 1538 MiB in all",
        ]
    );
    assert!(grown.notes[0].contains("blocks of 2 MiB"), "{:?}", grown.notes);
    let undo: Vec<_> = grown.steps.iter().map(|step| step.undo_what.as_deref().unwrap()).collect();
    assert_eq!(
        undo,
        [
            "libvirt virtio-mem saved 0 bytes, 1 GiB in all",
            "libvirt setMemory live 512 MiB",
            "libvirt virtio-mem live 0 bytes, 1 GiB in all",
        ]
    );
    assert_eq!(grown.charge.memory, MIB(1538 + 200));
}

#[test]
fn a_size_is_told_by_its_values() {
    let config = "[sizes.one]\ncpus = 2\nmemory = \"1G\"\n[sizes.two]\ncpus = 2\nmemory = \"1G\"\ncpu_limit = 1\n[sizes.b]\ncpus = 0.5\n";
    let sizes = Config::parse("test", config).unwrap().sizes;
    let of = |observed: &Observed| {
        sizes.iter().filter(|(_, size)| size.fits(observed)).map(|(name, _)| name.clone()).collect::<Vec<_>>()
    };
    assert_eq!((of(&vm()), of(&container())), (vec!["one".to_owned()], vec!["b".to_owned()]));
    let mut capped = vm();
    capped.cpu_limit.accepted = Some(Limit::At(Cpus::whole(1)));
    assert_eq!(of(&capped), ["two"]);
    assert_eq!(capped.differs_at_next_boot(), [crate::instance::Field::CpuLimit]);
    assert!(of(&Observed { state: State::Stopped, ..capped }) == ["one"]);
}

#[test]
fn what_an_outer_unit_is_charged_for_is_not_charged_again() {
    let config = "[capacity]\ncpus = 1\nmemory = \"2GiB\"\n";
    let covered = Observed { covered: Covered { cpus: true, memory: false }, ..unit() };
    let grown = plan(&covered, config, serde_json::json!({"cpus": 0.9, "memory": "128M"})).unwrap();
    assert_eq!(grown.charge, Charge { cpus: Cpus::ZERO, memory: MIB(128) });
    refused(&covered, config, serde_json::json!({"memory": "1100M"}), Code::CapacityExceeded);
    assert_eq!(start_charge(&covered, &Config::parse("test", "").unwrap()).cpus, Cpus::ZERO);
}

#[test]
fn a_stopped_vm_is_changed_for_its_next_start_and_admitted_then() {
    let stopped = Observed { state: State::Stopped, boot: None, ..vm() };
    let config = "[capacity]\ncpus = 2\n";
    let plan_ = plan(&stopped, config, serde_json::json!({"cpus": 4})).unwrap();
    assert_eq!(steps(&plan_), ["libvirt setVcpus saved 4"]);
    refused(&stopped, "", serde_json::json!({"cpus": 4, "apply": "live"}), Code::InvalidState);
    refused(&stopped, "", serde_json::json!({"cpus": 5}), Code::Unsupported);
    let cap = "[[limit]]\nmatch = \"vm/*\"\nmax_cpus = 3\n";
    refused(&stopped, cap, serde_json::json!({"cpus": 4}), Code::LimitExceeded);
}

#[test]
fn a_transient_vm_is_changed_live_and_says_so() {
    let mut transient = Observed { saved: Saved::Nowhere, ..vm() };
    transient.cpus.persistent = None;
    let plan_ = plan(&transient, "", serde_json::json!({"cpus": 3})).unwrap();
    assert_eq!(steps(&plan_), ["libvirt setVcpus live 3"]);
    assert!(plan_.notes[0].contains("no saved form"));
    refused(&transient, "", serde_json::json!({"cpus": 3, "apply": "next-boot"}), Code::Unsupported);
}

#[test]
fn relative_values_become_absolute_in_the_plan() {
    let plan_ = plan(&vm(), "", serde_json::json!({"cpus": "+1", "memory": "-512M"})).unwrap();
    assert!(steps(&plan_).contains(&"libvirt setVcpus live 3"));
    assert!(steps(&plan_).contains(&"libvirt setMemory live 512 MiB"));
    refused(&vm(), "", serde_json::json!({"cpus": "-3"}), Code::InvalidRequest);
    refused(&vm(), "", serde_json::json!({"cpu_limit": "+1"}), Code::InvalidRequest);
}

#[test]
fn values_that_cant_be_meant_are_invalid() {
    for body in [
        serde_json::json!({}),
        serde_json::json!({"cpus": 0}),
        serde_json::json!({"cpus": "-2"}),
        serde_json::json!({"cpus": 1.5}),
        serde_json::json!({"cpus": "none"}),
        serde_json::json!({"cpus": null}),
        serde_json::json!({"memory": 0}),
        serde_json::json!({"memory": "none"}),
        serde_json::json!({"size": "small", "cpus": 1}),
    ] {
        refused(&vm(), "[sizes.small]\ncpus = 1\n", body, Code::InvalidRequest);
    }
    refused(&vm(), "", serde_json::json!({"size": "none such"}), Code::NotFound);
}

#[test]
fn the_least_that_an_engine_takes_is_kept_to() {
    refused(&container(), "", serde_json::json!({"cpus": 0.001}), Code::BelowMinimum);
    refused(&container(), "", serde_json::json!({"memory": 6 * 1024 * 1024 - 4096}), Code::BelowMinimum);
    let rounded = plan(&container(), "", serde_json::json!({"memory": (80 << 20) + 1})).unwrap();
    assert!(rounded.notes[0].contains("rounded up"), "{:?}", rounded.notes);
}

#[test]
fn a_refusal_by_the_hosts_cap_shows_the_arithmetic() {
    let config = "[capacity]\ncpus = 4\nreserved_cpus = 1\ncpu_overcommit = 1.0\n";
    let problem = refused(&vm(), config, serde_json::json!({"cpus": 4}), Code::CapacityExceeded);
    assert_eq!(
        problem.detail,
        "the host allows 3 CPUs ((4 − 1 reserved) × 1.0, [capacity] cpu_overcommit), 2 are committed, \
         vm/web asks for 2 more"
    );
    assert_eq!(problem.hint.as_deref(), Some("the most vm/web can have now is 3 CPUs"));
    let numbers = problem.numbers.unwrap();
    assert_eq!(numbers.largest_feasible, Some(3.into()));
    assert!(plan(&vm(), config, serde_json::json!({"cpus": 3})).is_ok());
}

#[test]
fn the_largest_memory_told_fits_with_its_overhead_and_one_page_more_does_not() {
    let config = "[capacity]\nmemory = \"2000MiB\"\nreserved_memory = 0\n";
    let problem = refused(&vm(), config, serde_json::json!({"memory": "2G"}), Code::CapacityExceeded);
    let largest = problem.numbers.unwrap().largest_feasible.unwrap().as_u64().unwrap();
    assert_eq!(ByteCount::new(largest), Some(MIB(2000 - 200)));
    assert!(plan(&vm(), config, serde_json::json!({"memory": largest})).is_ok());
    refused(&vm(), config, serde_json::json!({"memory": largest + 4096}), Code::CapacityExceeded);
}

#[test]
fn a_limits_total_binds_its_matches_together() {
    let config = "[[limit]]\nmatch = \"vm/*\"\ntotal_cpus = 3\n";
    let problem = refused(&vm(), config, serde_json::json!({"cpus": 4}), Code::CapacityExceeded);
    assert!(problem.detail.contains("the limit on \"vm/*\""), "{problem}");
}

#[test]
fn beyond_the_ceiling_a_vm_needs_a_restart_and_the_ceiling_is_named() {
    let problem = refused(&vm(), "", serde_json::json!({"cpus": 5}), Code::RestartRequired);
    assert!(problem.detail.contains("can reach 4 cpus"), "{problem}");
    refused(&vm(), "", serde_json::json!({"memory": "3G"}), Code::RestartRequired);
    refused(&vm(), "[scaling]\nmax_cpus = 3\n", serde_json::json!({"cpus": 4}), Code::LimitExceeded);
}

#[test]
fn bounds_stop_what_moves_out_and_let_back_in_what_is_out_already() {
    let config = "[[limit]]\nmatch = \"*\"\nmax_cpus = 1\nmin_memory = \"1500MiB\"\n";
    refused(&vm(), config, serde_json::json!({"cpus": 3}), Code::LimitExceeded);
    let mut big = vm();
    big.cpus = same(Limit::At(Cpus::whole(4)), Cpus::whole(1), Cpus::whole(1), Some(Cpus::whole(4)));
    assert!(plan(&big, config, serde_json::json!({"cpus": 2})).is_ok());
    // What runs is out already and comes back in, but what is saved would move out.
    big.cpus.persistent = Some(Limit::At(Cpus::whole(1)));
    refused(&big, config, serde_json::json!({"cpus": 3}), Code::LimitExceeded);
    refused(&vm(), config, serde_json::json!({"memory": "900M"}), Code::BelowMinimum);
    assert!(plan(&vm(), config, serde_json::json!({"memory": "1200M"})).is_ok());
}

#[test]
fn what_is_in_use_is_never_taken() {
    let problem = refused(&vm(), "", serde_json::json!({"memory": "360M"}), Code::BelowMinimum);
    assert_eq!(problem.numbers.unwrap().smallest_feasible, Some((364 << 20).into()));
    assert!(plan(&vm(), "", serde_json::json!({"memory": "364M"})).is_ok());
    let unknown = Observed { used: Usage::Unknown, ..vm() };
    refused(&unknown, "", serde_json::json!({"memory": "900M"}), Code::BelowMinimum);
    let silent = Observed { used: Usage::Silent, ..vm() };
    refused(&silent, "", serde_json::json!({"memory": "900M"}), Code::GuestSilent);
    let rule = |word: &str| format!("[[limit]]\nmatch = \"*\"\nshrink = \"{word}\"\n");
    assert!(plan(&unknown, &rule("always"), serde_json::json!({"memory": "100M"})).is_ok());
    refused(&vm(), &rule("never"), serde_json::json!({"memory": "900M"}), Code::BelowMinimum);
    // The margin is no more than a quarter of what it has, unless the config states one: 10 in use, and 16 of 64.
    refused(&container(), "", serde_json::json!({"memory": "25M"}), Code::BelowMinimum);
    assert!(plan(&container(), "", serde_json::json!({"memory": "26M"})).is_ok());
    let stated = "[[limit]]\nmatch = \"*\"\nshrink_margin = \"64MiB\"\n";
    refused(&container(), stated, serde_json::json!({"memory": "60M"}), Code::BelowMinimum);
}

#[test]
fn a_limit_is_taken_away_only_where_the_config_says_so() {
    let body = serde_json::json!({"cpus": "none"});
    refused(&container(), "", body.clone(), Code::LimitExceeded);
    let config = "[[limit]]\nmatch = \"*\"\nunlimited = true\n";
    assert_eq!(steps(&plan(&container(), config, body).unwrap()), ["docker update cpus none"]);
    assert!(plan(&vm(), "", serde_json::json!({"cpu_limit": 0.5})).is_ok());
    let mut capped = vm();
    capped.cpu_limit.accepted = Some(Limit::At(Cpus::from_millis(500)));
    assert!(plan(&capped, "", serde_json::json!({"cpu_limit": "none"})).is_ok());
}

#[test]
fn what_cant_be_taken_back_says_so_before_it_is_done() {
    let mut made_with_cpus = container();
    made_with_cpus.cpus.unlimit = Ability::OneWay("Docker drops later limits".into());
    let config = "[[limit]]\nmatch = \"*\"\nunlimited = true\n";
    let plan_ = plan(&made_with_cpus, config, serde_json::json!({"cpus": "none"})).unwrap();
    assert_eq!(plan_.steps[0].undo, None);
    assert!(plan_.notes[0].contains("can't be taken back"), "{:?}", plan_.notes);
    let mut free = container();
    free.memory = same(Limit::Unlimited, ByteCount::new(4096).unwrap(), MIB(6), None);
    free.memory.unlimit = Ability::No(Code::Unsupported, "Docker keeps it".into());
    let plan_ = plan(&free, "", serde_json::json!({"memory": "128M"})).unwrap();
    assert_eq!((plan_.steps[0].undo.as_ref(), plan_.notes.len()), (None, 1));
}

#[test]
fn giving_a_limit_to_what_has_none_is_admitted_on_a_full_host() {
    let mut free = container();
    free.cpus = same(Limit::Unlimited, Cpus::from_millis(1), Cpus::from_millis(10), None);
    free.memory = same(Limit::Unlimited, ByteCount::new(4096).unwrap(), MIB(6), None);
    let config = "[capacity]\ncpus = 1\nmemory = \"2G\"\n";
    let plan_ = plan(&free, config, serde_json::json!({"cpus": 4, "memory": "1500M"})).unwrap();
    assert_eq!(plan_.charge, Charge { cpus: Cpus::whole(4), memory: MIB(1500) });
}

#[test]
fn holds_and_switches_refuse() {
    let request: ResizeRequest = serde_json::from_value(serde_json::json!({"cpus": 3})).unwrap();
    let observed = vm();
    with(&observed, "", |inputs| {
        let holds = [Hold::new(HoldKind::NeedsAttention, "half done".into())];
        let held = Inputs { holds: &holds, ..*inputs };
        assert_eq!(resize(&held, &request, None).unwrap_err().code, Code::Held);
        assert!(stop(&held, None, false).is_ok());
    });
    let config = "[[limit]]\nmatch = \"*\"\nlive = false\n";
    refused(&vm(), config, serde_json::json!({"cpus": 3}), Code::RestartRequired);
    assert!(plan(&vm(), config, serde_json::json!({"cpus": 3, "apply": "next-boot"})).is_ok());
    refused(&container(), config, serde_json::json!({"cpus": 1}), Code::Unsupported);
    let swarm = Observed { unchangeable: Some("swarm manages it".into()), ..container() };
    refused(&swarm, "", serde_json::json!({"cpus": 1}), Code::Unsupported);
}

#[test]
fn a_size_sets_every_field() {
    let config = "[sizes.small]\ncpus = 1\nmemory = \"512M\"\n";
    let mut capped = vm();
    capped.cpu_limit = same(Limit::At(Cpus::from_millis(500)), Cpus::from_millis(1), Cpus::from_millis(10), None);
    let plan_ = plan(&capped, config, serde_json::json!({"size": "small"})).unwrap();
    assert!(steps(&plan_).contains(&"libvirt setSchedulerParameters live global_quota none"));
    assert_eq!(plan_.steps.len(), 6);
}

#[test]
fn start_and_stop_are_plans_too() {
    let stopped = Observed { state: State::Stopped, boot: None, ..vm() };
    with(&stopped, "", |inputs| assert_eq!(steps(&start(inputs).unwrap()), ["libvirt create"]));
    with(&stopped, "", |inputs| assert!(stop(inputs, None, false).unwrap().steps.is_empty()));
    with(&stopped, "[capacity]\nmemory = \"2G\"\n", |inputs| {
        assert_eq!(start(inputs).unwrap_err().code, Code::CapacityExceeded);
    });
    let paused = Observed { state: State::Paused, ..vm() };
    with(&paused, "", |inputs| {
        assert_eq!(stop(inputs, None, false).unwrap_err().code, Code::InvalidState);
        assert_eq!(steps(&stop(inputs, None, true).unwrap()), ["libvirt destroy"]);
        assert_eq!(start(inputs).unwrap_err().code, Code::InvalidState);
    });
    with(&vm(), "", |inputs| {
        assert_eq!(steps(&stop(inputs, None, true).unwrap()), ["libvirt shutdown (ACPI)", "libvirt destroy"]);
    });
}

#[test]
fn what_a_step_set_is_told_from_what_only_moves() {
    let plan_ = plan(&vm(), "", serde_json::json!({"memory": "512M", "apply": "live"})).unwrap();
    let action = &plan_.steps[0].action;
    assert!(matches!(reached(action, &vm()), Reached::No(_)));
    let mut moving = vm();
    moving.memory.accepted = Some(Limit::At(MIB(512)));
    assert!(matches!(reached(action, &moving), Reached::NotYet(_)));
    moving.memory.observed = Some(Limit::At(MIB(512)));
    assert_eq!(reached(action, &moving), Reached::Yes);
}

#[test]
fn a_quota_that_the_cgroup_driver_rounds_up_by_less_than_a_hundredth_is_the_same() {
    let plan_ = plan(&container(), "", serde_json::json!({"cpus": 1.501})).unwrap();
    let mut seen = container();
    seen.cpus = same(Limit::At(Cpus::from_millis(1501)), Cpus::from_millis(1), Cpus::from_millis(10), None);
    seen.cpus.observed = Some(Limit::At(Cpus::from_millis(1510)));
    assert_eq!(reached(&plan_.steps[0].action, &seen), Reached::Yes);
    seen.cpus.observed = Some(Limit::At(Cpus::from_millis(1511)));
    assert!(matches!(reached(&plan_.steps[0].action, &seen), Reached::NotYet(_)));
}

#[test]
fn vcpus_that_cant_leave_need_a_restart() {
    let mut web = vm();
    web.cpus.floor = Some(Cpus::whole(2));
    (web.cpus.accepted, web.cpus.observed) = (Some(Limit::At(Cpus::whole(3))), Some(Limit::At(Cpus::whole(3))));
    assert!(plan(&web, "", serde_json::json!({"cpus": 2})).is_ok());
    let refused = plan(&web, "", serde_json::json!({"cpus": 1})).unwrap_err();
    assert_eq!((refused.code, refused.numbers.unwrap().smallest_feasible), (Code::RestartRequired, Some(2.into())));
    assert!(plan(&web, "", serde_json::json!({"cpus": 1, "apply": "next-boot"})).is_ok());
    let by_restart = plan(&web, "", serde_json::json!({"cpus": 1, "restart": "if-needed"})).unwrap();
    assert!(by_restart.restarts());
}

#[test]
fn a_step_outlasts_what_sets_other_fields_or_the_other_side() {
    let cpus = Values { cpus: Some(Limit::At(Cpus::whole(2))), ..Values::default() };
    let memory = Values { memory: Some(Limit::At(ByteCount::mib(512))), ..Values::default() };
    let both = Values { cpus: cpus.cpus, ..memory };
    let set = |scope, values| Action::Set { scope, values };
    let (live, saved, together) = (Scope::Live, Scope::Saved, Scope::Both);
    for (step, later, outlasts) in [
        (set(live, cpus), set(live, memory), true),
        (set(saved, cpus), set(live, cpus), true),
        (set(live, cpus), set(saved, cpus), true),
        (set(together, memory), set(live, cpus), true),
        // What systemd keeps of a unit it also sets on what runs; what that is to have instead comes after it.
        (set(together, cpus), set(live, cpus), false),
        (set(live, cpus), set(live, cpus), false),
        (set(live, memory), set(live, both), false),
        (set(live, cpus), Action::Pause, false),
        (Action::Start, set(live, cpus), false),
    ] {
        assert_eq!(step.outlasts(&later), outlasts, "{step:?} before {later:?}");
    }
}

#[test]
fn a_refusal_has_the_numbers_of_its_cap_and_of_no_other() {
    let host = "[capacity]\ncpus = 4\nreserved_cpus = 1.5\nmemory = \"2000MiB\"\nreserved_memory = \"300MiB\"\n";
    let of_cpus = refused(&vm(), host, serde_json::json!({"cpus": 4}), Code::CapacityExceeded);
    let numbers = serde_json::to_value(of_cpus.numbers.unwrap()).unwrap();
    assert_eq!(
        numbers,
        serde_json::json!({
            "resource": "cpus", "allowed": 2.5, "capacity": 4, "reserved": 1.5, "overcommit": 1.0, "committed": 2,
            "requested": 2, "largest_feasible": 2, "config_key": "capacity.cpu_overcommit",
        }),
        "2.5 are free, of which a VM has use for 2"
    );
    let of_memory = refused(&vm(), host, serde_json::json!({"memory": "1800M"}), Code::CapacityExceeded);
    assert_eq!(
        of_memory.hint.as_deref(),
        Some("the most vm/web can have now is 1500 MiB (each VM's memory counts with 200 MiB of overhead)")
    );
    let numbers = serde_json::to_value(of_memory.numbers.unwrap()).unwrap();
    let mib = |mib: u64| mib << 20;
    assert_eq!(
        numbers,
        serde_json::json!({
            "resource": "memory", "allowed": mib(1700), "capacity": mib(2000), "reserved": mib(300), "overcommit": 1.0,
            "committed": mib(1224), "requested": mib(776), "largest_feasible": mib(1500),
            "config_key": "capacity.memory_overcommit",
        })
    );
    let limit = "[[limit]]\nmatch = \"*\"\ntotal_cpus = 0.505\ntotal_memory = \"64MiB\"\n";
    for (body, key) in
        [(serde_json::json!({"cpus": 1}), "total_cpus"), (serde_json::json!({"memory": "65M"}), "total_memory")]
    {
        let problem = refused(&container(), limit, body, Code::CapacityExceeded);
        assert!(!problem.hint.unwrap().contains("overhead"), "a container has none");
        let numbers = problem.numbers.unwrap();
        assert!(
            numbers.capacity.is_none() && numbers.reserved.is_none() && numbers.overcommit.is_none(),
            "{numbers:?}"
        );
        assert_eq!(numbers.config_key, Some(Config::limit_key(0, key)));
    }
}

#[test]
fn where_nothing_is_free_that_is_said_and_the_least_is_still_something() {
    for (cap, body, fits) in [
        ("total_cpus = 0.01\n", serde_json::json!({"cpus": 1}), true),
        ("total_cpus = 0.009\n", serde_json::json!({"cpus": 1}), false),
        ("total_memory = \"6MiB\"\n", serde_json::json!({"memory": "65M"}), true),
        ("total_memory = \"5MiB\"\n", serde_json::json!({"memory": "65M"}), false),
    ] {
        let problem = refused(&container(), &format!("[[limit]]\nmatch = \"*\"\n{cap}"), body, Code::CapacityExceeded);
        assert_eq!(problem.hint.as_deref().unwrap().contains("nothing is free"), !fits, "{cap}: {problem:?}");
    }
}

#[test]
fn who_has_no_limit_of_memory_is_charged_what_it_uses_and_who_has_one_is_charged_that() {
    let config = Config::parse("test", "").unwrap();
    let of = |observed: &Observed| charge_of(observed, &config).memory;
    assert_eq!(of(&container()), MIB(64));
    let used = Observed { used: Usage::Known(MIB(100)), ..container() };
    assert_eq!(of(&used), MIB(64), "more than its limit is nothing that it keeps");
    let mut free = used;
    free.memory.accepted = Some(Limit::Unlimited);
    assert_eq!(of(&free), MIB(100), "its limit is on its way out");
    free.memory.observed = Some(Limit::Unlimited);
    assert_eq!(of(&free), MIB(100));
    assert_eq!(of(&Observed { used: Usage::Unknown, ..free }), ByteCount::ZERO);
}

#[test]
fn values_hold_parts_of_them_and_what_is_beside() {
    let (two, four) = (Some(Limit::At(Cpus::whole(2))), Some(Limit::At(Cpus::whole(4))));
    let (mib, more) = (Some(Limit::At(MIB(1))), Some(Limit::At(MIB(2))));
    let all = Values { cpus: two, cpu_limit: four, memory: mib, plugged: None };
    let none = Values::default();
    for part in
        [all, none, Values { cpus: two, ..none }, Values { cpu_limit: four, ..none }, Values { memory: mib, ..none }]
    {
        assert!(all.include(&part), "{part:?}");
        assert_eq!(none.include(&part), part == none);
        assert_eq!(part.beside(&all), none);
        assert_eq!(part.beside(&none), part);
    }
    for other in [Values { cpus: four, ..all }, Values { cpu_limit: two, ..all }, Values { memory: more, ..all }] {
        assert!(!all.include(&other), "{other:?}");
        assert_eq!(other.beside(&all).fields().len(), 1);
    }
    assert_eq!(all.beside(&Values { cpus: four, cpu_limit: two, memory: more, plugged: None }), all);
}

#[test]
fn steps_and_actions_say_what_they_are_about() {
    let values = Values { cpus: Some(Limit::At(Cpus::whole(2))), ..Values::default() };
    let set = |scope| Action::Set { scope, values };
    for (scope, live, saves) in [(Scope::Live, true, false), (Scope::Saved, false, true), (Scope::Both, true, true)] {
        assert_eq!((set(scope).is_live(), set(scope).saves().is_some()), (live, saves), "{scope:?}");
    }
    let saved = Values { cpus: Some(Limit::Unlimited), ..Values::default() };
    let back = Action::Restore { scope: Scope::Live, values, saved: Some(saved), native: serde_json::Value::Null };
    assert_eq!(back.saves(), Some(&saved));
    for action in [Action::Start, Action::Boot { values }] {
        assert!(action.starts() && !action.is_live() && action.saves().is_none(), "{action:?}");
    }
    for action in [set(Scope::Live), Action::Kill, Action::Shutdown, Action::Restart { boot: None }, Action::Pause] {
        assert!(!action.starts(), "{action:?}");
    }
    let [mut step] =
        plan(&vm(), "", serde_json::json!({"cpus": 3, "apply": "live"})).unwrap().steps.try_into().unwrap();
    for (class, settle, marked) in [
        (UndoClass::Exact, Settle::AtOnce, false),
        (UndoClass::Exact, Settle::Guest, true),
        (UndoClass::Attempt, Settle::AtOnce, true),
        (UndoClass::None, Settle::Guest, true),
    ] {
        (step.class, step.settle) = (class, settle);
        assert_eq!(step.is_marked(), marked, "{class:?} {settle:?}");
    }
    use Verb::{Prepare, Resize, Restart, Resume, Start, Stop, Suspend, Undo};
    assert!([Resize, Undo, Prepare].into_iter().all(Verb::resizes));
    assert!(![Start, Stop, Restart, Suspend, Resume].into_iter().any(Verb::resizes));
}

#[test]
fn a_plan_does_nothing_without_a_step_and_a_mark_and_charges_what_is_charged() {
    let already = plan(&vm(), "", serde_json::json!({"cpus": 2})).unwrap();
    assert!(already.does_nothing() && !already.restarts());
    assert_eq!(already.charge, Charge { cpus: Cpus::whole(2), memory: MIB(1024 + 200) });
    assert!(!Plan { mark: Some(Mark::Lift), ..already.clone() }.does_nothing());
    let changes = plan(&vm(), "", serde_json::json!({"cpus": 3})).unwrap();
    assert!(!changes.does_nothing() && !changes.restarts());
}

#[test]
fn every_refusal_has_the_numbers_behind_it_and_the_key_that_sets_them() {
    let mib = |mib: u64| mib << 20;
    let limit = |key: &str| format!("[[limit]]\nmatch = \"*\"\n{key}\n");
    let (vm, container) = (vm(), container());
    let mut held_down = vm.clone();
    held_down.memory.floor = Some(MIB(900));
    let mut saved_at_most = vm.clone();
    saved_at_most.cpus.saved_ceiling = Some(Cpus::whole(3));
    let table = [
        (
            &vm,
            limit("live = false"),
            serde_json::json!({"cpus": 3, "apply": "live"}),
            serde_json::json!({"config_key": "limit.live"}),
        ),
        (
            &container,
            limit(""),
            serde_json::json!({"cpus": "none"}),
            serde_json::json!({"config_key": "limit.unlimited"}),
        ),
        (
            &vm,
            limit("max_cpus = 3"),
            serde_json::json!({"cpus": 4}),
            serde_json::json!({
                "resource": "cpus", "allowed": 3, "requested": 4, "largest_feasible": 3, "config_key": "[[limit]] 1 max_cpus",
            }),
        ),
        (
            &vm,
            "[scaling]\nmax_memory = \"1536MiB\"\n".into(),
            serde_json::json!({"memory": "2G"}),
            serde_json::json!({
                "resource": "memory", "allowed": mib(1536), "requested": mib(2048), "largest_feasible": mib(1536),
                "config_key": "scaling.max_memory",
            }),
        ),
        (
            &vm,
            limit("min_memory = \"600MiB\""),
            serde_json::json!({"memory": "512M"}),
            serde_json::json!({
                "resource": "memory", "requested": mib(512), "smallest_feasible": mib(600),
                "config_key": "[[limit]] 1 min_memory",
            }),
        ),
        (
            &vm,
            limit("shrink = \"never\""),
            serde_json::json!({"memory": "512M"}),
            serde_json::json!({"config_key": "limit.shrink"}),
        ),
        (
            &vm,
            limit("shrink_margin = \"50MiB\""),
            serde_json::json!({"memory": "320M"}),
            serde_json::json!({
                "resource": "memory", "requested": mib(320), "used": mib(300), "smallest_feasible": mib(350),
                "config_key": "limit.shrink_margin",
            }),
        ),
        (
            &vm,
            limit(""),
            serde_json::json!({"cpus": 5}),
            serde_json::json!({"resource": "cpus", "requested": 5, "largest_feasible": 4}),
        ),
        (
            &held_down,
            limit(""),
            serde_json::json!({"memory": "800M"}),
            serde_json::json!({"resource": "memory", "requested": mib(800), "smallest_feasible": mib(900)}),
        ),
        (
            &saved_at_most,
            limit(""),
            serde_json::json!({"cpus": 4, "apply": "next-boot"}),
            serde_json::json!({"resource": "cpus", "requested": 4, "largest_feasible": 3}),
        ),
    ];
    for (observed, config, body, numbers) in table {
        let problem = plan(observed, &config, body.clone()).expect_err(&body.to_string());
        let told = serde_json::to_value(problem.numbers.as_deref().cloned().unwrap_or_default()).unwrap();
        assert_eq!(told, numbers, "{body}: {problem:?}");
    }
    let unknown = Observed { used: Usage::Unknown, ..vm };
    let problem = refused(&unknown, "", serde_json::json!({"memory": "512M"}), Code::BelowMinimum);
    assert_eq!(problem.numbers.unwrap().config_key.as_deref(), Some("limit.shrink"));
}

#[test]
fn the_very_bound_is_within_it() {
    let limit = |key: &str| format!("[[limit]]\nmatch = \"*\"\nshrink = \"always\"\n{key}\n");
    plan(&vm(), &limit("min_memory = \"512MiB\""), serde_json::json!({"memory": "512M"})).unwrap();
    plan(&vm(), &limit("max_cpus = 3"), serde_json::json!({"cpus": 3})).unwrap();
    plan(&vm(), "", serde_json::json!({"cpus": 4, "memory": "2G"})).unwrap();
    let mut held_down = vm();
    held_down.memory.floor = Some(MIB(900));
    plan(&held_down, &limit(""), serde_json::json!({"memory": "900M"})).unwrap();
    // What is out already and stays where it is moves no further.
    plan(&vm(), &limit("min_memory = \"1500MiB\"\nmax_cpus = 1"), serde_json::json!({"memory": "1G", "cpus": 2}))
        .unwrap();
    refused(&vm(), &limit("min_memory = \"1500MiB\""), serde_json::json!({"memory": "1000M"}), Code::BelowMinimum);
}
