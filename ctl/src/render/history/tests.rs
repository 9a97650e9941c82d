//! The history, as people read it.

use serde_json::{Value, json};

use super::*;

fn local() -> Local {
    let passwd = "root:x:0:0:root:/root:/bin/sh\nali\u{1b}ce:x:1000:1000::/home/a:/bin/sh\nbroken\n";
    Local { zone: TimeZone::fixed(jiff::tz::offset(2)), users: users(passwd) }
}

fn entry(more: Value) -> HistoryEntry {
    let mut whole = json!({"seq": 1, "at": "2026-03-01T22:30:05.123Z", "happening": "change", "ref": "vm/web",
        "who": {"uid": 0, "gid": 0, "pid": 4711, "command": "ctl"}, "operation": "01J", "verb": "resize",
        "outcome": "changed", "moves": [], "code": null, "detail": null});
    for (key, value) in more.as_object().unwrap() {
        whole[key] = value.clone();
    }
    serde_json::from_value(whole).unwrap()
}

fn moved(field: &str, saved: bool, before: Value, after: Value) -> Value {
    json!({"field": field, "saved": saved, "before": before, "after": after})
}

fn entries() -> Vec<HistoryEntry> {
    let (four, eight) = (json!(4_u64 << 30), json!(8_u64 << 30));
    vec![
        entry(json!({"happening": "drift", "who": null, "operation": null, "verb": null, "outcome": null,
            "moves": [moved("memory", true, eight.clone(), json!(null))]})),
        entry(json!({"happening": "refusal", "outcome": "refused", "code": "capacity-exceeded", "ref": "container/db",
            "who": {"uid": 33, "gid": 33, "pid": 9, "command": "a\u{1b}b"}, "detail": "the host allows\n3 CPUs"})),
        entry(json!({"moves": [moved("cpus", false, json!(2), json!(4)), moved("cpus", true, json!(3), json!(4)),
            moved("memory", false, four.clone(), eight.clone()), moved("memory", true, four, eight)]})),
        entry(json!({"happening": "hold-cleared", "operation": null, "verb": "clear-hold", "outcome": null})),
    ]
}

#[test]
fn entries_tell_who_did_what_and_what_moved_and_how_it_ended() {
    assert_eq!(
        history(&entries(), false, &local(), None),
        "\
TIME                 INSTANCE      WHO             WHAT        OUTCOME
2026-03-02 00:30:05  vm/web        —               drift       memory 8 GiB → unknown (saved)
2026-03-02 00:30:05  container/db  33 a\\u{1b}b[9]  resize      refused: capacity-exceeded: the host allows\\n3 CPUs
2026-03-02 00:30:05  vm/web        root ctl[4711]  resize      changed: cpus 2 → 4, cpus 3 → 4 (saved), memory 4 GiB → 8 GiB
2026-03-02 00:30:05  vm/web        root ctl[4711]  clear-hold  —
"
    );
}

#[test]
fn the_history_of_one_instance_names_the_operations_instead() {
    let text = history(&entries()[2..], true, &local(), None);
    assert_eq!(
        text,
        "\
TIME                 WHO             WHAT        OUTCOME
2026-03-02 00:30:05  root ctl[4711]  resize      changed: cpus 2 → 4, cpus 3 → 4 (saved), memory 4 GiB → 8 GiB (01J)
2026-03-02 00:30:05  root ctl[4711]  clear-hold  —
"
    );
}

#[test]
fn the_table_fits_the_terminal_and_an_operation_stays_in_one_piece() {
    let id = "01J9ZQ6Y3F8V4T7N2K5M0X1ABC";
    let mut entries = entries();
    entries[2].operation = Some(id.into());
    for of_one in [false, true] {
        let text = history(&entries, of_one, &local(), Some(80));
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert_eq!(text.contains(id), of_one, "{text}");
    }
}

#[test]
fn users_and_times_that_make_no_sense_are_told_as_they_are() {
    assert_eq!(local().time("soon\u{7}"), "soon\\u{7}");
    let who = Who { uid: 1000, gid: 0, pid: 1, command: "x".into() };
    assert_eq!(local().who(&who), "ali\\u{1b}ce x[1]");
}
