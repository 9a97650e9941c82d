//! Tables, as people read them.

use serde_json::{Value, json};

use super::*;

fn field(accepted: Value, observed: Value, saved: Value) -> Value {
    json!({"accepted": accepted, "observed": observed, "confirmed": observed, "persistent": saved, "ceiling": null})
}

fn instance(reference: &str, state: &str, more: Value) -> Instance {
    let (kind, name) = reference.split_once('/').unwrap();
    let mut whole = json!({"ref": reference, "kind": kind, "name": name, "id": "5781", "state": state, "version": "b3a9",
        "cpus": field(json!(2), json!(2), json!(2)), "cpu_limit": field(json!("none"), json!("none"), json!("none")),
        "memory": field(json!(4_u64 << 30), json!(4_u64 << 30), json!(4_u64 << 30)),
        "committed": {"cpus": 2, "memory": 4_504_682_496_u64}, "labels": {}, "holds": [], "notes": []});
    for (key, value) in more.as_object().unwrap() {
        whole[key] = value.clone();
    }
    serde_json::from_value(whole).unwrap()
}

#[test]
fn numbers_stand_to_the_right_and_what_moves_shows_both_values() {
    let nothing = field(json!(null), json!(null), json!(null));
    let list = list(
        &[
            instance("vm/web", "running", json!({})),
            instance(
                "vm/ci-1",
                "running",
                json!({"memory": field(json!(400 << 20), json!(512 << 20), json!(400 << 20)),
                    "holds": [{"hold": "needs-attention", "reason": "r"}], "notes": ["a", "b"]}),
            ),
            instance(
                "container/db",
                "stopped",
                json!({"cpus": field(json!(null), json!(null), json!(1.5)), "cpu_limit": nothing,
                    "memory": field(json!("none"), json!("none"), json!("none")), "committed": {"cpus": 0, "memory": 0}}),
            ),
        ],
        false,
        None,
    );
    assert_eq!(
        list,
        "\
REF           STATE     CPUS  CPU LIMIT         MEMORY     COMMITTED
vm/web        running      2       none          4 GiB  2 / 4296 MiB
vm/ci-1       running      2       none  512 → 400 MiB  2 / 4296 MiB  held: needs-attention, 2 notes
container/db  stopped  (1.5)          —           none   0 / 0 bytes
"
    );
}

#[test]
fn one_instance_shows_all_five_values_and_what_to_do() {
    let instance = instance(
        "vm/web",
        "running",
        json!({"cpu_limit": field(json!(null), json!(null), json!(null)), "labels": {"a": "b\u{1b}"},
            "memory": field(json!(400 << 20), json!(512 << 20), json!(400 << 20)),
            "holds": [{"hold": "needs-attention", "reason": "half of it was done"}], "notes": ["balloon driver silent"]}),
    );
    assert_eq!(
        show(&instance, None),
        "\
vm/web  running  id 5781  version b3a9
        accepted  observed  confirmed  persistent  ceiling
cpus           2         2          2           2        —
memory   400 MiB   512 MiB    512 MiB     400 MiB        —
committed 2 CPUs, 4296 MiB
label a=b\\u{1b}
note: balloon driver silent
memory is 512 MiB, asked for 400 MiB: the guest has not obeyed yet
held (needs-attention): half of it was done
  what to do: look at it, also with `ctl history vm/web`, put right what is wrong, then: ctl clear-hold vm/web; stop works meanwhile
"
    );
}

#[test]
fn every_hold_says_what_to_do() {
    for (hold, said) in [
        ("suspended", "ctl resume vm/web; stop works"),
        ("needs-attention", "ctl clear-hold vm/web; stop works"),
        ("recovering", "it ends by itself once the backend answers; stop works"),
    ] {
        let instance = instance("vm/web", "running", json!({"holds": [{"hold": hold, "reason": "r"}]}));
        let text = show(&instance, None);
        assert!(text.contains(&format!("held ({hold}): r\n  what to do: ")) && text.contains(said), "{text}");
    }
}

#[test]
fn the_host_shows_what_is_over_its_cap() {
    let of = |total: u64, committed: u64, free: u64, over: bool| {
        json!({"total": total, "reserved": 0, "overcommit": 2.0, "allowed": 2 * total, "committed": committed,
            "free": free, "over": over})
    };
    let capacity: Capacity = serde_json::from_value(json!({
        "cpus": of(32, 70, 0, true), "memory": of(128 << 30, 200 << 30, 56 << 30, false),
        "by_kind": {"vm": {"up": 3, "instances": 4, "committed": {"cpus": 12, "memory": 1 << 30}}},
        "limits": [{"match": "vm/ci-*", "total_cpus": 16, "total_memory": null,
            "committed": {"cpus": 17, "memory": 0}, "over": true}],
        "vm_memory": "observed", "vm_overhead": 200 << 20, "unlimited": ["container/a", "unit/b"], "unavailable": []}))
    .unwrap();
    let text = self::capacity(&capacity, None);
    assert_eq!(
        text,
        "\
HOST        CPUS   MEMORY
total         32  128 GiB
reserved       0  0 bytes
overcommit   2.0      2.0
allowed       64  256 GiB
committed     70  200 GiB  CPUs OVER the cap
free           0   56 GiB

KIND      UP  CPUS  MEMORY
vm    3 of 4    12   1 GiB

LIMIT        CPUS   MEMORY
vm/ci-*  17 of 16  0 bytes  OVER

a vm is charged its observed memory and 200 MiB more while it runs
unlimited, charged what they use now: container/a, unit/b
"
    );
}

#[test]
fn a_narrow_terminal_wraps_marks_and_keeps_references_whole() {
    let long = instance(
        "vm/a-name-that-is-long",
        "running",
        json!({"notes": ["a"],
        "holds": [{"hold": "suspended", "reason": "r"}]}),
    );
    let list = list(&[long], false, Some(80));
    assert!(list.contains("vm/a-name-that-is-long  running"), "{list}");
    assert!(list.lines().all(|line| line.chars().count() <= 80), "{list}");
}

#[test]
fn backends_that_are_down_stand_out() {
    let health: Health = serde_json::from_value(json!({"ok": false, "version": "0.1.0", "read_only": true,
        "backends": [{"kind": "vm", "name": "libvirt qemu:///system", "ok": false, "detail": "no\nanswer"}],
        "notes": ["the new config is invalid"]}))
    .unwrap();
    assert_eq!(
        anstream::adapter::strip_str(&self::health(&health, None)).to_string(),
        "\
agentd 0.1.0 is not well, read-only: every change is refused
warning: the new config is invalid
KIND  STATE  BACKEND
vm    DOWN   libvirt qemu:///system  no\\nanswer
"
    );
}

#[test]
fn what_an_instance_can_become_and_will_become_is_shown_with_the_reasons() {
    let way = |most: u64, why: &str| json!({"possible": true, "least": 1, "most": most, "why": why});
    let not = |why: &str| json!({"possible": false, "least": null, "most": null, "why": why});
    let yes = json!({"possible": true, "least": null, "most": null, "why": null});
    let memory = json!({"possible": true, "least": 4 << 20, "most": 8_u64 << 30, "why": "its ceiling"});
    let can = json!({
        "cpus": {"live": way(4, "its ceiling"), "restart": way(16, "[scaling] max_cpus"), "unlimited": not("a VM has a number")},
        "cpu_limit": {"live": not("it is stopped"), "restart": yes, "unlimited": yes},
        "memory": {"live": memory, "restart": memory, "unlimited": not("a VM has an amount")},
    });
    let more = json!({"capabilities": can, "size": "standard-2", "next_boot": ["cpus"],
        "cpus": field(json!(2), json!(2), json!(3)),
        "loans": [{"operation": "01J", "fields": ["memory"], "due_ms": 0}], "unprepared": null});
    let shown = show(&instance("vm/web", "running", more), None);
    for line in [
        "size standard-2",
        "next boot: cpus 3",
        "cpus: live 1 to 4 (its ceiling); by a restart 1 to 16 ([scaling] max_cpus); not without a limit (a VM has a number)",
        "cpu_limit: not live (it is stopped); by a restart; without a limit",
        "memory: live 4 MiB to 8 GiB (its ceiling); by a restart 4 MiB to 8 GiB (its ceiling); not without a limit (a VM has an amount)",
    ] {
        assert!(shown.lines().any(|shown| shown == line), "{line} in\n{shown}");
    }
    assert!(shown.contains("memory for a time: goes back ") && shown.contains("(01J)"), "{shown}");
    let listed = list(
        &[instance("vm/web", "running", json!({"unprepared": "cpus: 2 is its maximum", "size": "s"}))],
        true,
        None,
    );
    assert!(listed.contains("size s, cpus: 2 is its maximum"), "{listed}");
}
