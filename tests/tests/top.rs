//! `ctl top` on a real terminal over a real Docker engine: what is on the screen, what keys do, and that the terminal is as it
//! was on every way out.

use agentd_tests::lab::{Agentd, Docker, Lab, Tmux};
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// A busy container that its limit holds back, and an idle one that comes first by name.
fn host() -> Result<(Agentd, Docker)> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    docker.run_command("busy", &["--cpus", "0.3", "-m", "64m"], &["sh", "-c", "while :; do :; done"])?;
    docker.run("an-idle-one", &["--cpus", "1", "-m", "128m"])?;
    let config = format!(
        "[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\nreserved_memory = 0\n",
        docker.socket().display()
    );
    Ok((Agentd::with_config(&config).inside(&lab).start()?, docker))
}

/// The line of an instance, in words.
fn row<'a>(screen: &'a str, reference: &str) -> Option<Vec<&'a str>> {
    screen
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|words| words.first() == Some(&reference))
}

/// The instances, from above.
fn order(screen: &str) -> Vec<&str> {
    screen
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|word| word.starts_with("container/"))
        .collect()
}

/// CPUs in use, of `0.3/0.5`.
fn rate(screen: &str, reference: &str) -> Option<f64> {
    row(screen, reference)?.get(2)?.split_once('/')?.0.parse().ok()
}

/// The terminal is the shell's again: its own screen, a cursor, lines that are echoed and can be edited.
fn is_as_before(tmux: &Tmux) -> Result<()> {
    tmux.wait_for("the prompt", |screen| screen.trim_end().ends_with("ready>"))?;
    assert_eq!(tmux.tell("#{alternate_on} #{cursor_flag}")?, "0 1");
    tmux.line("stty -a | tr -s ' ;' '\\n' | grep -cx -e icanon -e echo -e isig | sed s/^/modes=/")?;
    let modes = |screen: &str| screen.lines().find_map(|line| line.strip_prefix("modes=")?.trim().parse::<u8>().ok());
    let screen = tmux.wait_for("the modes", |screen| modes(screen).is_some())?;
    assert_eq!(modes(&screen), Some(3), "{screen}");
    Ok(())
}

#[test]
fn a_host_is_seen_sorted_filtered_and_left_at_80_by_24_and_at_200_by_60() -> Result<()> {
    let (agentd, _docker) = host()?;
    let tmux = Tmux::with_ctl(&agentd, (80, 24), &[("LC_ALL", "C.UTF-8")])?;
    assert_eq!(agentd.ctl(&["resize", "busy", "--memory", "+32MiB", "--for", "3h"]).code, Some(0));
    tmux.line("ctl top --interval 500ms")?;
    // The limit is seen in the rate, the work in the throttling, the loan in its end.
    let screen = tmux.wait_for("a rate at the limit", |screen| {
        rate(screen, "container/busy").is_some_and(|rate| (0.2..0.4).contains(&rate)) && screen.contains('%')
    })?;
    assert_eq!(order(&screen), ["container/busy", "container/an-idle-one"], "the busy one comes first: {screen}");
    assert!(row(&screen, "container/busy").is_some_and(|row| row.contains(&"until")), "{screen}");
    assert!(screen.lines().all(|line| line.chars().count() <= 80) && screen.lines().count() == 24, "{screen}");
    assert!(screen.contains("█") && screen.contains("1.3 committed"), "{screen}");
    assert!(screen.contains("/96M") && screen.contains("/128M"), "{screen}");
    assert_eq!(tmux.tell("#{alternate_on} #{cursor_flag}")?, "1 0");

    tmux.keys(&["n"])?;
    tmux.wait_for("an order by name", |screen| order(screen) == ["container/an-idle-one", "container/busy"])?;
    tmux.keys(&["r"])?;
    tmux.wait_for("the other way", |screen| order(screen) == ["container/busy", "container/an-idle-one"])?;
    tmux.keys(&["/", "i", "d", "l"])?;
    tmux.wait_for("what is typed", |screen| order(screen) == ["container/an-idle-one"] && screen.contains("/idl_"))?;
    tmux.keys(&["C-u", "b", "*", "Enter"])?;
    tmux.wait_for("a pattern", |screen| order(screen) == ["container/busy"] && screen.contains("only \"b*\""))?;
    tmux.keys(&["/", "BSpace", "BSpace", "Enter", "?"])?;
    tmux.wait_for("help", |screen| order(screen).len() == 2 && screen.contains("t throttled"))?;

    tmux.resize((200, 60))?;
    let wide = tmux.wait_for("the whole headers", |screen| screen.contains("BALLOON LAG"))?;
    assert!(wide.contains("THROTTLED") && wide.lines().next().is_some_and(|line| line.chars().count() > 190), "{wide}");
    tmux.resize((40, 10))?;
    tmux.wait_for("fewer columns", |screen| !screen.contains("THR") && screen.contains("MEM/LIMIT"))?;
    tmux.resize((80, 24))?;
    tmux.wait_for("all columns", |screen| screen.contains("THR"))?;
    let styled = tmux.styled_screen()?;
    assert!(styled.contains("\u{1b}[38;5;2m"), "in use is green: {styled:?}");
    tmux.keys(&["q"])?;
    is_as_before(&tmux)
}

#[test]
fn it_lives_through_an_agentd_that_goes_and_gives_the_terminal_back_on_every_way_out() -> Result<()> {
    let (agentd, _docker) = host()?;
    let tmux = Tmux::with_ctl(&agentd, (80, 24), &[("LC_ALL", "C"), ("NO_COLOR", "1")])?;
    tmux.line("ctl top --interval 500ms")?;
    let screen = tmux.wait_for("instances", |screen| order(screen).len() == 2 && screen.contains("% "))?;
    assert!(screen.is_ascii() && screen.contains("#"), "{screen}");
    let styled = tmux.styled_screen()?;
    let colors = |number: &str| matches!(number.parse(), Ok(30..=38 | 40..=48 | 90..=107));
    for sequence in styled.split("\u{1b}[").skip(1) {
        let codes = sequence.split('m').next().unwrap_or_default();
        assert!(!codes.split([';', ':']).any(colors), "a colour: {styled:?}");
    }

    agentd.kill()?;
    let screen = tmux.wait_for("what is wrong", |screen| screen.contains("agentd does not answer: "))?;
    assert_eq!(order(&screen).len(), 2, "what was seen last stays: {screen}");
    agentd.start_again()?;
    tmux.wait_for("agentd again", |screen| !screen.contains("does not answer") && order(screen).len() == 2)?;

    for (signal, exit) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130)] {
        let shell = tmux.tell("#{pane_pid}")?;
        let children = std::fs::read_to_string(format!("/proc/{shell}/task/{shell}/children"))?;
        kill(Pid::from_raw(children.trim().parse().context("ctl is the shell's only child")?), signal)?;
        tmux.wait_for("the prompt", |screen| screen.trim_end().ends_with("ready>"))?;
        tmux.line("echo ended=$?")?;
        tmux.wait_for("the exit code", |screen| screen.contains(&format!("\nended={exit}")))?;
        is_as_before(&tmux)?;
        tmux.line("clear; ctl top")?;
        tmux.wait_for("instances", |screen| order(screen).len() == 2)?;
    }
    tmux.keys(&["C-c"])?;
    is_as_before(&tmux)
}

#[test]
fn where_there_is_no_terminal_it_prints_lines_or_one_document() -> Result<()> {
    let (agentd, _docker) = host()?;
    let output = agentd.ctl(&["top", "--sort", "name"]);
    assert_eq!((output.code, output.stderr.as_str()), (Some(0), ""), "{output:?}");
    assert_eq!(order(&output.stdout), ["container/an-idle-one", "container/busy"]);
    assert!(output.stdout.starts_with("CPU ") && output.stdout.contains(" committed, "), "{output:?}");
    assert!(output.stdout.contains("REF ") && output.stdout.contains("THROTTLED"), "{output:?}");
    assert!(!output.stdout.contains(|c: char| c.is_control() && c != '\n'), "{output:?}");
    assert!(rate(&output.stdout, "container/busy").is_some(), "{output:?}");

    let one = agentd.ctl(&["top", "--match", "container/b*", "-o", "json"]);
    let document: Value = serde_json::from_str(&one.stdout)?;
    assert_eq!(document["instances"].as_array().map(Vec::len), Some(1), "{document}");
    assert_eq!(document["instances"][0]["usage"]["ref"], "container/busy");
    assert_eq!(document["host"]["cpus"]["allowed"], 8);
    assert!(document["host"]["used"]["memory"].as_u64().is_some_and(|bytes| bytes > 0), "{document}");

    // Also on a terminal, where one look is asked for; and the bars of `ctl capacity` there.
    let tmux = Tmux::with_ctl(&agentd, (80, 24), &[("LC_ALL", "C.UTF-8")])?;
    tmux.line("ctl top --once; ctl capacity")?;
    let screen = tmux.wait_for("both", |screen| screen.contains("KIND") && screen.trim_end().ends_with("ready>"))?;
    assert!(screen.contains("CPU/LIMIT") && screen.contains("▒ 1.3 committed"), "{screen}");
    assert_eq!(tmux.tell("#{alternate_on}")?, "0");
    agentd.kill()?;
    assert_eq!(agentd.ctl(&["top"]).code, Some(3));
    Ok(())
}
