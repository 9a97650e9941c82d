//! The lines of changes, as people read them.

use serde_json::{Value, json};

use super::*;

fn view(outcome: &str, changes: Value, more: Value) -> OperationView {
    let mut whole = json!({"operation": "01J", "verb": "resize", "outcome": outcome, "ref": "vm/web", "dry_run": false,
        "elapsed_ms": 213, "changes": changes, "steps": [], "notes": [], "instance": null});
    for (key, value) in more.as_object().unwrap() {
        whole[key] = value.clone();
    }
    serde_json::from_value(whole).unwrap()
}

fn cpus(confirmed: Value, live: bool, persistent: bool) -> Value {
    json!({"field": "cpus", "before": 2, "requested": 4, "accepted": 4, "observed": 4, "confirmed": confirmed,
        "live": live, "persistent": persistent})
}

fn memory(confirmed: Value, live: bool, persistent: bool) -> Value {
    let (before, after) = (4_u64 << 30, 8_u64 << 30);
    json!({"field": "memory", "before": before, "requested": after, "accepted": after, "observed": after,
        "confirmed": confirmed, "live": live, "persistent": persistent})
}

fn instance(state: &str) -> Value {
    let field = json!({"accepted": null, "observed": null, "confirmed": null, "persistent": null, "ceiling": null});
    json!({"ref": "vm/web", "kind": "vm", "name": "web", "id": "5781", "state": state, "version": "b3a9",
        "cpus": field, "cpu_limit": field, "memory": field, "committed": {"cpus": 0, "memory": 0}, "labels": {},
        "holds": [], "notes": []})
}

#[test]
fn a_change_reads_as_the_design_shows_it() {
    let view = view("changed", json!([cpus(json!(4), true, true), memory(json!(8_u64 << 30), true, true)]), json!({}));
    assert_eq!(
        operation(&view, None),
        "vm/web  cpus 2 → 4  memory 4 GiB → 8 GiB   live and saved, confirmed by the guest, 0.21 s\n"
    );
}

#[test]
fn only_what_was_observed_is_said() {
    let cases = [
        (json!([cpus(json!(null), true, true)]), "live and saved, not confirmed by the guest"),
        (json!([cpus(json!(2), true, false)]), "live only, cpus not confirmed: the guest has 2"),
        (json!([cpus(json!(null), false, true)]), "saved for the next start"),
        (
            json!([cpus(json!(4), true, true), memory(json!(null), true, false)]),
            "cpus live and saved, memory live only, cpus confirmed by the guest, memory not confirmed",
        ),
    ];
    for (changes, said) in cases {
        let line = operation(&view("changed", changes, json!({})), None);
        assert!(line.ends_with(&format!("   {said}, 0.21 s\n")), "{line}");
    }
}

#[test]
fn fields_of_a_size_that_stay_are_not_told() {
    let stays = json!({"field": "cpu_limit", "before": "none", "requested": "none", "accepted": "none",
        "observed": "none", "confirmed": null, "live": true, "persistent": true});
    let line = operation(&view("changed", json!([cpus(json!(4), true, true), stays]), json!({})), None);
    assert_eq!(line, "vm/web  cpus 2 → 4   live and saved, confirmed by the guest, 0.21 s\n");
}

#[test]
fn containers_have_no_guest_to_confirm_anything() {
    let view = view("changed", json!([cpus(json!(null), true, true)]), json!({"ref": "container/db"}));
    assert_eq!(operation(&view, None), "container/db  cpus 2 → 4   live and saved, 0.21 s\n");
}

#[test]
fn a_pending_change_says_how_far_it_is() {
    let change = json!([{"field": "memory", "before": 512 << 20, "requested": 400 << 20, "accepted": 400 << 20,
        "observed": 512 << 20, "confirmed": 512 << 20, "live": false, "persistent": true}]);
    let view = view("pending", change, json!({"elapsed_ms": 10_004, "notes": ["an event follows"]}));
    assert_eq!(
        operation(&view, None),
        "vm/web  memory 512 MiB → 400 MiB   accepted, the guest has not obeyed yet: memory is 512 MiB, asked for 400 MiB, \
         10.00 s\n  note: an event follows\n"
    );
}

#[test]
fn what_was_already_so_is_unchanged() {
    let resize = view("unchanged", json!([cpus(json!(4), true, true)]), json!({}));
    assert_eq!(operation(&resize, None), "vm/web  unchanged: cpus is 4\n");
    let start = view("unchanged", json!([]), json!({"verb": "start", "notes": ["vm/web is already running"]}));
    assert_eq!(operation(&start, None), "vm/web  unchanged: vm/web is already running\n");
}

#[test]
fn a_stop_says_how_it_went() {
    let more = json!({"verb": "stop", "elapsed_ms": 3200, "notes": ["it shut down by itself when asked"],
        "instance": instance("stopped")});
    assert_eq!(
        operation(&view("changed", json!([]), more), None),
        "vm/web  stopped, 3.20 s\n  note: it shut down by itself when asked\n"
    );
    let more = json!({"verb": "stop", "elapsed_ms": 60_000, "instance": instance("running")});
    assert_eq!(
        operation(&view("pending", json!([]), more), None),
        "vm/web  stop accepted, not done yet: it is still running, 60.00 s\n"
    );
}

#[test]
fn a_dry_run_shows_every_step_with_its_way_back_and_the_version() {
    let steps = json!([
        {"what": "libvirt setVcpus saved 4", "undo": "libvirt setVcpus saved 2", "state": "planned"},
        {"what": "libvirt shutdown (ACPI)", "undo": null, "state": "planned"}]);
    let more = json!({"dry_run": true, "operation": null, "steps": steps, "instance": instance("running")});
    assert_eq!(
        operation(&view("planned", json!([cpus(json!(2), false, false)]), more), None),
        "\
vm/web  cpus 2 → 4   planned, nothing is changed
  1. libvirt setVcpus saved 4
     undo: libvirt setVcpus saved 2
  2. libvirt shutdown (ACPI)
     undo: none
to run exactly this: --if-version b3a9
"
    );
}

#[test]
fn an_undo_tells_both_sides_and_how_to_put_it_back() {
    let change = json!([{"field": "cpus", "before": 4, "requested": 2, "saved_requested": 3, "accepted": 2, "observed": 2,
        "confirmed": null, "live": true, "persistent": true}]);
    let undone = view("changed", change.clone(), json!({"verb": "undo", "undoes": "01H"}));
    assert_eq!(
        operation(&undone, None),
        "vm/web  cpus 4 → 2 (saved: 3)   live and saved, not confirmed by the guest, 0.21 s\n\
         to put it back again: ctl undo 01J\n"
    );
    let planned = view("planned", change, json!({"verb": "undo", "dry_run": true, "operation": null}));
    assert!(!operation(&planned, None).contains("ctl undo"), "nothing was done");
}

#[test]
fn a_change_that_still_runs_names_its_operation() {
    let view = view("running", json!([]), json!({}));
    assert_eq!(operation(&view, None), "vm/web  still under way (operation 01J); ctl show vm/web tells where it is\n");
}

#[test]
fn escapes_from_elsewhere_do_not_reach_the_terminal() {
    let view = view("unchanged", json!([]), json!({"ref": "vm/a\u{1b}[2J", "notes": ["x\u{7}", "y\u{1b}]0;z"]}));
    assert_eq!(operation(&view, None), "vm/a\\u{1b}[2J  unchanged: x\\u{7}\n  note: y\\u{1b}]0;z\n");
}

#[test]
fn a_restart_is_told_before_and_after() {
    let change = || json!([cpus(json!(null), true, true)]);
    let line = operation(&view("changed", change(), json!({"restart": true})), None);
    assert_eq!(line, "vm/web  cpus 2 → 4   live and saved, not confirmed by the guest, by a restart, 0.21 s\n");
    let steps = json!([{"what": "libvirt shutdown (ACPI)", "undo": "libvirt create", "state": "planned"}]);
    let plan = json!({"restart": true, "dry_run": true, "steps": steps});
    let planned = operation(&view("planned", change(), plan), None);
    assert!(planned.starts_with("vm/web  cpus 2 → 4   planned with a restart, nothing is changed\n"), "{planned}");
}
