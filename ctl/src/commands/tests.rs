//! Commands from what is typed to what is printed, without a server.

use agentd_core::api::{Apply, ResizeRequest, Restart};
use clap::Parser as _;

use super::*;
use crate::args::Resize;

fn args(line: &str) -> Args {
    Args::try_parse_from(line.split(' ')).unwrap()
}

fn request(line: &str) -> Result<ResizeRequest, Failure> {
    match args(line).command {
        Command::Resize(resize) => resize::request(&resize as &Resize),
        other => panic!("{other:?}"),
    }
}

fn body(line: &str) -> String {
    serde_json::to_string(&request(line).unwrap()).unwrap()
}

#[test]
fn relative_values_reach_the_server_as_such() {
    let sent = body("ctl resize web --cpus -1 --memory -512M --cpu-limit +0.5");
    assert!(sent.contains(r#""cpus":"-1""#), "{sent}");
    assert!(sent.contains(r#""cpu_limit":"+0.5""#), "{sent}");
    let back: ResizeRequest = serde_json::from_str(&sent).unwrap();
    assert_eq!(back, request("ctl resize web --cpus -1 --memory -512M --cpu-limit +0.5").unwrap());
}

#[test]
fn none_and_plain_numbers_reach_the_server() {
    let sent = body("ctl resize web --cpus 1.5 --memory none --cpu-limit none");
    assert!(sent.contains(r#""cpus":1.5"#) && sent.contains(r#""memory":"none""#), "{sent}");
}

#[test]
fn options_become_members_of_the_request() {
    let request = request(
        "ctl resize web --size standard-2 --dry-run --restart if-needed --force --next-boot --for 2h --wait 30s",
    )
    .unwrap();
    assert_eq!(request.size.as_deref(), Some("standard-2"));
    assert!(request.dry_run && request.force);
    assert_eq!((request.restart, request.apply), (Restart::IfNeeded, Some(Apply::NextBoot)));
    assert_eq!((request.for_.as_deref(), request.wait.as_deref()), (Some("2h"), Some("30s")));
}

#[test]
fn wrong_units_are_told_here_in_the_servers_form() {
    for (line, said) in [
        ("ctl resize web --memory 8GB", "--memory: `8GB`"),
        ("ctl resize web --memory 1.5GiB", "--memory: `1.5GiB` has a fraction"),
        ("ctl resize web --cpus four", "--cpus: `four` is not an amount"),
        ("ctl resize web --cpus --dry-run", "--cpus: `--dry-run`"),
        ("ctl resize web --cpus 4 --wait soon", "--wait: `soon` is no duration"),
    ] {
        let failure = request(line).unwrap_err();
        assert_eq!((failure.code.as_str(), failure.exit), ("invalid-request", 2), "{line}");
        assert!(failure.detail.starts_with(said), "{line}: {}", failure.detail);
    }
}

#[test]
fn a_version_is_taken_with_and_without_the_quotes_of_an_etag() {
    assert_eq!(version("b3a9"), Ok("b3a9".into()));
    assert_eq!(version("\"b3a9\""), Ok("b3a9".into()));
    for bad in ["", "\"\"", "a b", "a\r\nx: y", "a\"b"] {
        assert_eq!(version(bad).unwrap_err().exit, 2, "{bad:?}");
    }
}

#[test]
fn what_is_wrong_with_what_was_typed_needs_no_daemon() {
    for line in [
        "ctl --socket /nowhere show pod/web",
        "ctl --socket /nowhere list --state asleep",
        "ctl --socket /nowhere stop web --timeout never",
        "ctl --socket /nowhere resize web --memory 8GB",
    ] {
        assert_eq!(run(&args(line)).exit, 2, "{line}");
    }
    assert_eq!(run(&args("ctl --socket /nowhere show vm/web")).exit, 3);
}

#[test]
fn a_config_file_is_checked_without_a_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("agentd.toml");
    let check = |text: &str| {
        std::fs::write(&file, text).unwrap();
        run(&args(&format!("ctl check-config {}", file.display())))
    };
    let good = check("[capacity]\nreserved_cpus = 2\n");
    assert_eq!((good.exit, good.out), (0, format!("{}: ok\n", file.display())));
    let bad = check("[capacity]\nreserved_cpu = 2\nreserved_memory = \"1GB\"\n");
    assert_eq!((bad.exit, bad.out.as_str()), (2, ""));
    let lines: Vec<_> = bad.err.lines().collect();
    assert_eq!(lines.len(), 2, "every fault is told: {lines:?}");
    assert!(lines[0].starts_with(&format!("error: {}:2:1: ", file.display())), "{lines:?}");
    let directory = run(&args(&format!("ctl check-config {}", directory.path().display())));
    assert!(directory.exit == 2 && directory.err.contains("is not a regular file"), "{directory:?}");
    assert_eq!(run(&args("ctl check-config /nowhere/agentd.toml")).exit, 2);
}

#[test]
fn completions_name_the_commands() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&args(&format!("ctl completions {shell}"))).out;
        assert!(script.contains("clear-hold") && script.contains("if-version"), "{shell}");
    }
}
