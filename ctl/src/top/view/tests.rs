//! What is on the screen, as text.

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent};
use serde_json::json;

use super::super::source::Sample;
use super::super::testing::{balloon, instance, now, sample, usage};
use super::*;
use crate::args::SortKey;
use crate::error::Failure;

const PLAIN: Look = Look { glyphs: &bar::ASCII, colors: false };
const RICH: Look = Look { glyphs: &bar::UNICODE, colors: true };

/// The screen's lines, without the blanks at their ends.
fn screen(model: &mut Model, (width, height): (u16, u16), look: Look) -> Vec<String> {
    let buffer = buffer(model, (width, height), look);
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
    (0..height).map(line).collect()
}

fn buffer(model: &mut Model, (width, height): (u16, u16), look: Look) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    let drawn = terminal.draw(|frame| {
        model.set_page(page(frame.area().height));
        draw(frame.area(), frame.buffer_mut(), model, None, look);
    });
    drawn.unwrap().buffer.clone()
}

fn model() -> Model {
    let mut model = Model::new(sample(), now(), SortKey::Cpu);
    for _ in 0..2 {
        model.take(Ok(sample()), now());
    }
    model
}

#[test]
fn at_80_by_24_every_column_is_there() {
    assert_eq!(
        screen(&mut model(), (80, 24), RICH)[..10],
        [
            "ctl top  4 of 5 instances up, by cpu                                    14:00:00",
            "CPU █████████▒▒▒▒▒▒▒▒▒·· █ 27.3 used  ▒ 54 committed  · 6 free of 60 CPUs",
            "MEM ██████████▒▒▒▒▒····· █ 64.0 used  ▒ 96.0 committed  · 31.0 free of 127.0 GiB",
            "REF                STATE   CPU/LIMIT       MEM/LIMIT        THR  LAG",
            "container/db       running     1.9/2   ███ 400M/512M   ▆▆▆  12%    - until 14:05",
            "vm/ci-1            running     0.5/2   ▃▃▃ 128M/512M   ▃▃▃    - 112M needs-atte…",
            "vm/idle            running     0/0.5   ▁▁▁ 128M/512M   ▃▃▃   0%    0",
            "unit/batch.service running    -/none          -/512M          -    -",
            "vm/off             stopped         -               -          -    -",
            "",
        ]
    );
    assert_eq!(screen(&mut model(), (80, 24), RICH)[23], "1 to 5 of 5  ? keys  q quit");
}

#[test]
fn where_there_is_ascii_only_the_signs_are_ascii() {
    let mut strange = sample();
    strange.instances.push((instance("vm/über", &json!({})), None));
    let mut model = Model::new(strange, now(), SortKey::Name);
    let lines = screen(&mut model, (80, 24), PLAIN);
    assert!(lines.iter().all(|line| line.is_ascii()), "{lines:#?}");
    assert_eq!(lines[1], "CPU #########=========.. # 27.3 used  = 54 committed  . 6 free of 60 CPUs");
    assert!(lines.iter().any(|line| line.starts_with("vm/?ber ")), "{lines:#?}");
}

#[test]
fn at_200_by_60_the_headers_are_whole_and_the_past_is_long() {
    let mut model = model();
    for _ in 0..KEPT {
        model.take(Ok(sample()), now());
    }
    let lines = screen(&mut model, (200, 60), RICH);
    for title in ["CPU/LIMIT", "MEM/LIMIT", "THROTTLED", "BALLOON LAG"] {
        assert!(lines[3].contains(title), "{}", lines[3]);
    }
    assert!(lines[4].contains(&"█".repeat(KEPT)) && lines[4].contains(&"▆".repeat(KEPT)), "{}", lines[4]);
    assert!(lines[5].ends_with("112M needs-attention"), "{}", lines[5]);
    assert_eq!(lines[59], "1 to 5 of 5  ? keys  q quit");
}

#[test]
fn at_40_by_10_the_least_important_columns_are_left_out_and_the_rest_scrolls() {
    let mut model = model();
    let lines = screen(&mut model, (40, 9), PLAIN);
    assert_eq!(
        lines,
        [
            "ctl top  4 of 5 instances up, ~ 14:00:00",
            "CPU # 27.3  = 54  . 6/60 CPUs",
            "MEM # 64.0  = 96.0  . 31.0/127.0 GiB",
            "REF                CPU/LIMIT MEM/LIMIT",
            "container/db           1.9/2 400M/512M",
            "vm/ci-1                0.5/2 128M/512M",
            "vm/idle                0/0.5 128M/512M",
            "unit/batch.service    -/none    -/512M",
            "1 to 4 of 5  ? keys  q quit",
        ]
    );
    model.press(KeyCode::End.into());
    let lines = screen(&mut model, (40, 9), PLAIN);
    assert!(lines[7].starts_with("vm/off ") && lines[8].starts_with("2 to 5 of 5"), "{lines:#?}");
    assert_eq!(screen(&mut model, (40, 10), PLAIN)[8].trim_end(), "vm/off                     -         -");
}

#[test]
fn the_lag_of_a_balloon_is_told_where_its_column_finds_no_room() {
    let instances = vec![(
        instance("vm/a-name-of-26-characters-x", &json!({})),
        Some(usage("vm/a", &json!({}), &balloon(9 << 20))),
    )];
    let mut model = Model::new(Sample { instances, ..sample() }, now(), SortKey::Cpu);
    let narrow = screen(&mut model, (60, 10), PLAIN);
    assert!(!narrow[3].contains("LAG") && narrow[4].ends_with("lag 9M"), "{narrow:#?}");
    let wide = screen(&mut model, (120, 10), PLAIN);
    assert!(wide[3].contains("BALLOON LAG") && wide[4].ends_with("9M") && !wide[4].contains("lag"), "{wide:#?}");
}

#[test]
fn no_size_and_no_name_breaks_it() {
    let mut strange = sample();
    for name in
        ["vm/a\u{1b}[31m\r\nb\u{202e}", &format!("vm/{}", "宽".repeat(40)), &format!("container/{}", "x".repeat(300))]
    {
        strange.instances.push((
            instance(name, &json!({})),
            Some(usage(name, &json!({"rate": 1e12}), &json!({"used": 1_u64 << 62}))),
        ));
    }
    let mut model = Model::new(strange, now(), SortKey::Name);
    for width in (0..100).chain([130, 200, 1000]) {
        for height in [0, 1, 2, 3, 4, 5, 6, 10, 24] {
            let lines = screen(&mut model, (width, height), RICH);
            assert!(lines.iter().all(|line| !line.contains(char::is_control)), "{lines:#?}");
        }
    }
    let lines = screen(&mut model, (80, 24), RICH);
    assert!(lines.iter().any(|line| line.starts_with("vm/a\\u{1b}[31m\\r\\nb… running")), "{lines:#?}");
    assert!(lines.iter().any(|line| line.starts_with("vm/宽 宽 宽 ") && line.contains('…')), "{lines:#?}");
}

#[test]
fn colors_only_repeat_what_is_said() {
    let colored = |look| {
        buffer(&mut model(), (80, 24), look)
            .content
            .iter()
            .any(|cell| cell.fg != Color::Reset || cell.bg != Color::Reset)
    };
    assert!(colored(RICH) && !colored(PLAIN));
    assert!(!colored(Look { colors: false, ..RICH }));
}

#[test]
fn the_line_at_the_foot_tells_what_matters_most() {
    let mut model = model();
    let foot = |model: &mut Model| screen(model, (80, 24), PLAIN)[23].clone();
    model.press(KeyCode::Char('?').into());
    assert_eq!(foot(&mut model), "c cpu  m memory  n name  t throttled  l lag  r reverse  / filter  q quit");
    model.take(Err(Failure::unreachable("can't connect to /s: No such file".into(), String::new())), now());
    assert_eq!(foot(&mut model), "agentd does not answer: can't connect to /s: No such file, trying again");
    assert!(screen(&mut model, (80, 24), PLAIN)[4].starts_with("container/db"), "what was seen last stays");
    for key in "/ci".chars() {
        model.press(KeyEvent::from(KeyCode::Char(key)));
    }
    assert!(foot(&mut model).starts_with("/ci_  "), "{}", foot(&mut model));
    model.press(KeyCode::Enter.into());
    assert!(screen(&mut model, (80, 24), PLAIN)[0].contains(", only \"ci\""));
    model.take(
        Ok(Sample { instances: Vec::new(), unavailable: vec![agentd_core::instance::Kind::Vm], ..sample() }),
        now(),
    );
    model.press(KeyCode::Char('?').into());
    assert_eq!(foot(&mut model), "the backend of kind vm does not answer: what it has is as it was last seen");
    model.take(Ok(Sample { instances: Vec::new(), ..sample() }), now());
    assert_eq!(foot(&mut model), "no instance matches  ? keys  q quit");
}
