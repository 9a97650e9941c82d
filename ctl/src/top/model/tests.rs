//! What keys and samples do to what is shown.

use ratatui::crossterm::event::KeyEvent;
use serde_json::json;

use super::super::testing::{MIB, instance, now, sample, usage};
use super::*;

fn model() -> Model {
    let mut model = Model::new(sample(), now(), SortKey::Cpu);
    model.set_page(3);
    model
}

fn press(model: &mut Model, keys: &str) {
    for key in keys.chars() {
        let code = match key {
            '\n' => KeyCode::Enter,
            '\u{1b}' => KeyCode::Esc,
            '\u{8}' => KeyCode::Backspace,
            other => KeyCode::Char(other),
        };
        assert!(model.press(KeyEvent::from(code)), "{key:?} ended it");
    }
}

fn names(model: &Model) -> Vec<String> {
    model.rows().iter().map(Row::reference).collect()
}

#[test]
fn each_key_sorts_by_its_value_and_what_is_unknown_comes_last_either_way() {
    let mut model = model();
    let unknown = ["unit/batch.service", "vm/off"];
    assert_eq!(names(&model), ["container/db", "vm/ci-1", "vm/idle", unknown[0], unknown[1]]);
    press(&mut model, "r");
    assert_eq!(names(&model), ["vm/idle", "vm/ci-1", "container/db", unknown[0], unknown[1]]);
    press(&mut model, "m");
    assert_eq!(names(&model)[..2], ["container/db", "vm/ci-1"], "another key starts with the largest");
    press(&mut model, "l");
    assert_eq!(names(&model)[..3], ["vm/ci-1", "vm/idle", "container/db"], "then by name");
    press(&mut model, "t");
    assert_eq!(names(&model)[..2], ["container/db", "vm/idle"]);
    press(&mut model, "nr");
    assert_eq!(names(&model), ["vm/off", "vm/idle", "vm/ci-1", "unit/batch.service", "container/db"]);
}

#[test]
fn a_filter_is_a_part_of_a_name_or_a_pattern_and_escape_takes_it_back() {
    let mut model = model();
    press(&mut model, "/Vm/I");
    assert_eq!(names(&model), ["vm/idle"], "while it is typed");
    press(&mut model, "\n");
    assert_eq!(model.filter(), ("Vm/I", false));
    press(&mut model, "/\u{8}\u{8}\u{8}\u{8}ci-*");
    assert_eq!(names(&model), ["vm/ci-1"], "a pattern of names is one of any kind");
    press(&mut model, "\u{1b}");
    assert_eq!((model.filter(), names(&model).len()), (("Vm/I", false), 1));
    press(&mut model, "/\u{8}\u{8}\u{8}\u{8}[");
    assert_eq!(names(&model).len(), 0, "what is no pattern is a part of a name");
    press(&mut model, "\u{8}\n");
    assert_eq!(names(&model).len(), 5);
}

#[test]
fn q_escape_and_control_c_end_it_and_a_filter_may_have_a_q() {
    for code in [KeyCode::Char('q'), KeyCode::Esc] {
        assert!(!model().press(code.into()));
    }
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    let mut model = model();
    press(&mut model, "/q");
    assert_eq!(model.filter(), ("q", true));
    assert!(!model.press(control_c));
}

#[test]
fn scrolling_ends_where_the_rows_do() {
    let mut model = model();
    let first = |model: &Model| (model.visible().1, model.visible().0.len());
    for (code, at) in [
        (KeyCode::Up, 0),
        (KeyCode::Down, 1),
        (KeyCode::PageDown, 2),
        (KeyCode::Down, 2),
        (KeyCode::PageUp, 0),
        (KeyCode::End, 2),
        (KeyCode::Home, 0),
        (KeyCode::End, 2),
    ] {
        model.press(code.into());
        assert_eq!(first(&model), (at, 3), "{code:?}");
    }
    model.set_page(40);
    assert_eq!(first(&model), (0, 5), "a larger window shows more");
    model.set_page(0);
    model.press(KeyCode::End.into());
    press(&mut model, "/idle\n");
    assert_eq!(first(&model), (0, 1), "fewer rows are shown from the first on");
}

#[test]
fn what_was_used_is_kept_by_identity_and_what_nobody_saw_is_a_gap() {
    let mut model = model();
    let trail = |model: &Model, name: &str| -> Vec<Option<f64>> {
        model
            .rows()
            .iter()
            .find(|row| row.reference() == name)
            .unwrap()
            .cpu_trail()
            .0
            .unwrap()
            .iter()
            .copied()
            .collect()
    };
    model.take(Err(Failure::unreachable("gone".into(), String::new())), now());
    model.take(Ok(sample()), now());
    assert_eq!(trail(&model, "vm/idle"), [Some(0.004), None, Some(0.004)]);
    assert_eq!(trail(&model, "vm/off"), [None, None, None]);
    // The name goes to another instance.
    let mut other = sample();
    other.instances = vec![(
        instance("vm/idle", &json!({"id": "another"})),
        Some(usage("vm/idle", &json!({"rate": 1.5}), &json!({"used": MIB}))),
    )];
    model.take(Ok(other), now());
    assert_eq!(trail(&model, "vm/idle"), [Some(1.5)]);
    for _ in 0..2 * KEPT {
        model.take(Ok(sample()), now());
    }
    assert_eq!(trail(&model, "vm/idle").len(), KEPT);
}

#[test]
fn trouble_is_told_keeps_what_was_seen_and_ends_with_the_next_sample() {
    let mut model = model();
    model.take(Err(Failure::unreachable("can't connect to /s: \u{1b}[2J".into(), String::new())), now());
    let trouble = model.trouble.clone().unwrap();
    assert_eq!(trouble, "agentd does not answer: can't connect to /s: \\u{1b}[2J, trying again");
    assert_eq!(names(&model).len(), 5);
    let forbidden = r#"{"code":"forbidden","detail":"no rule lets you look"}"#;
    model.take(Err(Failure::from_reply(403, forbidden)), now());
    assert_eq!(model.trouble.as_deref(), Some("forbidden: no rule lets you look, trying again"));
    model.take(Ok(sample()), now());
    assert_eq!(model.trouble, None);
}

#[test]
fn values_are_short_and_what_is_unknown_is_a_dash() {
    let model = model();
    let rows = model.rows();
    let told = |name: &str| {
        let row = rows.iter().find(|row| row.reference() == name).unwrap();
        [row.cpu(), row.memory(), row.throttled(), row.lag(), row.notes(&now()).join(", ")]
    };
    assert_eq!(told("container/db"), ["1.9/2", "400M/512M", "12%", "-", "until 14:05"]);
    assert_eq!(told("vm/ci-1"), ["0.5/2", "128M/512M", "-", "112M", "needs-attention"]);
    assert_eq!(told("vm/idle"), ["0/0.5", "128M/512M", "0%", "0", ""], "the CPU limit of a VM is below its vCPUs");
    assert_eq!(told("unit/batch.service"), ["-/none", "-/512M", "-", "-", ""]);
    assert_eq!(told("vm/off"), ["-", "-", "-", "-", ""]);
}

#[test]
fn an_end_that_is_a_day_away_is_told_with_its_day() {
    let lent = |ms: u64| {
        let instance = instance("vm/a", &json!({"loans": [{"operation": "o", "fields": ["cpus"], "due_ms": ms}]}));
        Row::new(&instance, None, None).notes(&now())[0].clone()
    };
    // 11 hours after 14:00 is another day, and still the next 01:00.
    assert_eq!(lent(super::super::testing::NOW_MS + 11 * 3_600_000), "until 01:00");
    assert_eq!(lent(super::super::testing::NOW_MS + 86_400_000), "until 03-02 14:00");
    assert_eq!(lent(u64::MAX), "for a time");
}
