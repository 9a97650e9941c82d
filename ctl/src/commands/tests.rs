//! Commands from what is typed to what is printed.

use agentd_core::api::{Apply, ResizeRequest, Restart};
use clap::Parser as _;
use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::args::Resize;
use crate::testing::{Does, Server, reply};

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
    let good = check("[docker]\n[capacity]\nreserved_cpus = 2\n");
    assert_eq!((good.exit, good.out), (0, format!("{}: ok\n", file.display())));
    let bad = check("[capacity]\nreserved_cpu = 2\nreserved_memory = \"1GB\"\n");
    assert_eq!((bad.exit, bad.out.as_str()), (2, ""));
    let lines: Vec<_> = bad.err.lines().collect();
    assert_eq!(lines.len(), 2, "every fault is told: {lines:?}");
    assert!(lines[0].starts_with(&format!("error: {}:2:1: ", file.display())), "{lines:?}");
    let directory = run(&args(&format!("ctl check-config {}", directory.path().display())));
    assert!(directory.exit == 2 && directory.err.contains("is not a regular file"), "{directory:?}");
    assert_eq!(run(&args("ctl check-config /nowhere/agentd.toml")).exit, 2);
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666)).unwrap();
    let warned = check("");
    assert_eq!(warned.exit, 0);
    assert!(warned.err.contains("neither [libvirt] nor [docker] nor [units]"), "{}", warned.err);
    // The second where the tests are not run by root.
    assert!(warned.err.contains("mode 0666") || warned.err.contains("belongs to uid"), "{}", warned.err);
}

#[test]
fn each_shell_is_told_to_ask_ctl_itself() {
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&args(&format!("ctl completions {shell}"))).out;
        assert!(script.contains("_CTL_COMPLETE") && script.contains("ctl"), "{shell}: {script}");
    }
}

fn run_with(server: &Server, line: &str) -> Report {
    run(&args(&format!("ctl --socket {} {line}", server.socket().display())))
}

fn instance(name: &str) -> String {
    let field = r#"{"accepted":2,"observed":2,"confirmed":null,"persistent":2,"ceiling":4}"#;
    format!(
        r#"{{"ref":"vm/{name}","kind":"vm","name":"{name}","id":"i","state":"running","version":"v","cpus":{field},"cpu_limit":{field},"memory":{field},"committed":{{"cpus":2,"memory":0}},"labels":{{}},"holds":[],"notes":[],"new":1}}"#
    )
}

fn page(name: &str, cursor: &str) -> Does {
    let items = instance(name);
    Does::Say(reply(200, &format!(r#"{{"items":[{items}],"next_cursor":{cursor},"total":2,"unavailable":["unit"]}}"#)))
}

#[test]
fn a_list_follows_its_cursors_to_the_end() {
    let server = Server::new(vec![page("a", "\"c 1\""), page("b", "null")]);
    let report = run_with(&server, "list --match vm/* --state running");
    assert_eq!(report.exit, 0);
    assert!(report.out.contains("vm/a") && report.out.contains("vm/b"), "{}", report.out);
    assert!(report.err.starts_with("warning: the backend of kind unit does not answer"), "{}", report.err);
    let requests = server.requests();
    assert!(requests[0].starts_with("get /v1/instances?match=vm%2f%2a&state=running http"), "{requests:?}");
    assert!(
        requests[1].starts_with("get /v1/instances?match=vm%2f%2a&state=running&cursor=c%201 http"),
        "{requests:?}"
    );
}

#[test]
fn a_list_as_json_is_one_document_with_everything_in_it() {
    let server = Server::new(vec![page("a", "\"c\""), page("b", "null")]);
    let report = run_with(&server, "list -o json");
    let document: serde_json::Value = serde_json::from_str(&report.out).unwrap();
    assert_eq!(document["items"][1]["name"], "b");
    assert_eq!((&document["items"][0]["new"], &document["next_cursor"]), (&1.into(), &serde_json::Value::Null));
    assert_eq!(report.err, "");
}

#[test]
fn a_list_that_goes_in_a_circle_ends() {
    let server = Server::new(vec![page("a", "\"c\""), page("a", "\"c\"")]);
    assert_eq!(run_with(&server, "list").exit, 1);
}

#[test]
fn an_empty_list_says_so_beside_the_output() {
    let empty = r#"{"items":[],"next_cursor":null,"total":0,"unavailable":[]}"#;
    let server = Server::new(vec![Does::Say(reply(200, empty))]);
    let report = run_with(&server, "list --kind vm");
    assert_eq!((report.out.as_str(), report.err.as_str(), report.exit), ("", "no instance matches\n", 0));
}

fn outcome_of(outcome: &str, status: u16) -> Report {
    let view = format!(
        r#"{{"operation":"01J","verb":"stop","outcome":"{outcome}","ref":"vm/web","dry_run":false,"elapsed_ms":1000,"changes":[],"steps":[],"notes":[],"instance":{}}}"#,
        instance("web")
    );
    run_with(&Server::new(vec![Does::Say(reply(status, &view))]), "-q stop vm/web")
}

#[test]
fn outcomes_give_their_exit_codes() {
    for (outcome, status, exit) in
        [("changed", 200, 0), ("unchanged", 200, 0), ("running", 202, 0), ("pending", 200, 8)]
    {
        assert_eq!(outcome_of(outcome, status).exit, exit, "{outcome}");
    }
    assert_eq!(outcome_of("changed", 200).out, "");
    assert!(outcome_of("pending", 200).out.contains("still running"), "-q hides success only");
}

#[test]
fn an_answer_that_cannot_be_read_after_a_change_is_an_unknown_outcome() {
    let report = run_with(&Server::new(vec![Does::Say(reply(200, "{}"))]), "stop vm/web");
    assert_eq!(report.exit, 7, "{}", report.err);
    let report = run_with(&Server::new(vec![Does::Say(reply(200, "{}"))]), "stop vm/web --dry-run");
    assert_eq!(report.exit, 1, "{}", report.err);
}

#[test]
fn health_tells_by_its_exit_code_whether_all_is_well() {
    for (ok, exit) in [(true, 0), (false, 3)] {
        let body = format!(r#"{{"ok":{ok},"version":"0.1.0","read_only":false,"backends":[],"notes":[]}}"#);
        let report = run_with(&Server::new(vec![Does::Say(reply(200, &body))]), "-q health");
        assert_eq!((report.exit, report.out.is_empty()), (exit, ok));
    }
}

#[test]
fn a_history_is_asked_for_as_it_was_typed_and_tells_how_to_go_on() {
    let entry = r#"{"seq":7,"at":"2026-03-01T22:30:05Z","happening":"change","ref":"vm/web","who":null,"operation":"01J","verb":"resize","outcome":"changed","moves":[],"code":null,"detail":null,"new":1}"#;
    let body = format!(r#"{{"items":[{entry}],"next":7}}"#);
    let found = Does::Say(reply(200, r#"{"ref":"vm/web"}"#));
    let server = Server::new(vec![found, Does::Say(reply(200, &body))]);
    let report = run_with(&server, "history web --limit 1 --before 9");
    assert_eq!((report.exit, report.err.as_str()), (0, "there is more of vm/web: --before 7\n"));
    assert!(report.out.contains("01J") && report.out.contains("changed"), "{}", report.out);
    let requests = server.requests();
    assert!(requests[1].starts_with("get /v1/history?ref=vm%2fweb&limit=1&before=9 http"), "{requests:?}");

    let server = Server::new(vec![Does::Say(reply(200, &body))]);
    let report = run_with(&server, "history -o json");
    assert_eq!((report.out, report.err.as_str()), (format!("{body}\n"), ""));
    assert!(server.requests()[0].starts_with("get /v1/history http"));

    let server = Server::new(vec![Does::Say(reply(200, r#"{"items":[],"next":null}"#))]);
    let report = run_with(&server, "history vm/web");
    assert_eq!((report.exit, report.out.as_str(), report.err.as_str()), (0, "", "nothing is on record of vm/web\n"));
}
