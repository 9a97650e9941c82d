//! Which change is the last one, and what is asked of the daemon.

use clap::Parser as _;
use serde_json::{Value, json};

use super::*;
use crate::args::Args;
use crate::commands::run;
use crate::testing::{Does, Server, header, reply};

const RESIZE: &str = "01J9ZQ6Y3F8V4T7N2K5M0X1ABC";
const UNDO: &str = "01J9ZQ6Y3F8V4T7N2K5M0X1ABD";

fn operation(id: &str, verb: &str, outcome: &str, undoes: Option<&str>) -> Value {
    let mut view = json!({"operation": id, "verb": verb, "outcome": outcome, "ref": "vm/web", "dry_run": false,
        "elapsed_ms": 213, "changes": [], "steps": [], "notes": [], "instance": null});
    if let Some(undoes) = undoes {
        view["undoes"] = undoes.into();
    }
    view
}

fn last(operations: &[Value]) -> Result<String, Failure> {
    let operations: Vec<OperationView> =
        operations.iter().map(|view| serde_json::from_value(view.clone()).unwrap()).collect();
    let reference = Ref::new(agentd_core::instance::Kind::Vm, "web").unwrap();
    last_change(&reference, &operations)
}

#[test]
fn an_operation_is_told_from_a_name() {
    assert!(is_operation(RESIZE));
    for name in ["web", "vm/web", "01j9zq6y3f8v4t7n2k5m0x1abc", "81J9ZQ6Y3F8V4T7N2K5M0X1ABC", &RESIZE.replace('J', "I")]
    {
        assert!(!is_operation(name), "{name}");
    }
    // The beginning of a container's id.
    assert!(!is_operation("060e8af7eff2d8e6ad101151c6"));
}

#[test]
fn the_last_change_is_the_newest_resize_that_ended_well() {
    let last = last(&[
        operation("6", "stop", "changed", None),
        operation("5", "resize", "rolled-back", None),
        operation("4", "resize", "unchanged", None),
        operation("3", "resize", "refused", None),
        operation("2", "resize", "pending", None),
        operation("1", "resize", "changed", None),
    ]);
    assert_eq!(last.unwrap(), "2");
}

#[test]
fn undoing_again_walks_back_and_never_does_again_what_was_taken_back() {
    let mut record = vec![operation("2", "resize", "changed", None), operation("1", "resize", "changed", None)];
    record.insert(0, operation("3", "undo", "changed", Some("2")));
    assert_eq!(last(&record).unwrap(), "1");
    // One that failed took nothing back.
    record.insert(0, operation("4", "undo", "rolled-back", Some("1")));
    assert_eq!(last(&record).unwrap(), "1");
    record.insert(0, operation("5", "undo", "pending", Some("1")));
    let failure = last(&record).unwrap_err();
    assert_eq!((failure.code.as_str(), failure.exit), ("not-found", 6));
    assert!(failure.hint.as_deref().unwrap().contains("ctl history vm/web"));
}

#[test]
fn a_change_that_was_put_back_is_the_last_one_again() {
    let record = [
        operation("4", "undo", "changed", Some("3")),
        operation("3", "undo", "changed", Some("2")),
        operation("2", "resize", "changed", None),
        operation("1", "resize", "changed", None),
    ];
    assert_eq!(last(&record).unwrap(), "2");
}

#[test]
fn a_change_under_way_is_waited_for() {
    let record = [operation("2", "resize", "running", None), operation("1", "resize", "changed", None)];
    assert_eq!(last(&record).unwrap_err().exit, 10);
}

fn run_with(server: &Server, line: &str) -> crate::render::Report {
    let line = format!("ctl --socket {} {line}", server.socket().display());
    run(&Args::try_parse_from(line.split(' ')).unwrap())
}

fn say(value: Value) -> Does {
    Does::Say(reply(200, &value.to_string()))
}

#[test]
fn an_instances_last_change_is_looked_up_and_taken_back() {
    let server = Server::new(vec![
        say(json!({"ref": "vm/web"})),
        say(json!({"items": [operation(RESIZE, "resize", "changed", None)]})),
        say(operation(UNDO, "undo", "changed", Some(RESIZE))),
    ]);
    let report = run_with(&server, "undo web --if-version \"b3a9\" --wait 30s");
    assert_eq!((report.exit, report.keep_exit), (0, true), "{}", report.err);
    assert!(report.out.ends_with(&format!("to put it back again: ctl undo {UNDO}\n")), "{}", report.out);
    let requests = server.requests();
    assert!(requests[0].starts_with("get /v1/instances?name=web http"), "{requests:?}");
    assert!(requests[1].starts_with("get /v1/operations?ref=vm%2fweb&limit=200 http"), "{requests:?}");
    let post = format!("post /v1/operations/{}/undo http", RESIZE.to_lowercase());
    assert!(requests[2].starts_with(&post), "{requests:?}");
    assert_eq!(header(&requests[2], "if-match"), "\"b3a9\"");
    assert_eq!(header(&requests[2], "idempotency-key").len(), 32);
    assert!(requests[2].ends_with(r#"{"dry_run":false,"wait":"30s"}"#), "{requests:?}");
}

#[test]
fn an_operation_is_taken_back_by_its_id() {
    let planned = operation(UNDO, "undo", "planned", Some(RESIZE));
    let server = Server::new(vec![say(operation(RESIZE, "resize", "changed", None)), say(planned)]);
    let report = run_with(&server, &format!("undo {RESIZE} --dry-run"));
    assert_eq!((report.exit, report.keep_exit), (0, false), "{}", report.err);
    let requests = server.requests();
    assert!(requests[0].starts_with("get /v1/operations/01j"), "{requests:?}");
    assert!(requests[1].ends_with(r#"{"dry_run":true}"#), "{requests:?}");
}

#[test]
fn an_undo_whose_connection_breaks_is_asked_for_again_under_the_same_key() {
    let server = Server::new(vec![
        say(operation(RESIZE, "resize", "changed", None)),
        Does::HangUp,
        say(operation(UNDO, "undo", "pending", Some(RESIZE))),
    ]);
    let report = run_with(&server, &format!("undo {RESIZE}"));
    assert_eq!(report.exit, 8, "{}", report.err);
    let requests = server.requests();
    assert_eq!(header(&requests[1], "idempotency-key"), header(&requests[2], "idempotency-key"));
}

#[test]
fn where_there_is_nothing_to_take_back_nothing_is_sent() {
    let server = Server::new(vec![say(json!({"items": [operation("1", "start", "changed", None)]}))]);
    let report = run_with(&server, "undo vm/web");
    assert_eq!((report.exit, server.requests().len()), (6, 1), "{}", report.err);
}

#[test]
fn what_is_wrong_with_what_was_typed_needs_no_daemon() {
    for line in ["undo vm/web --wait soon", "undo vm/web --if-version a\"b", "undo pod/web"] {
        let line = format!("ctl --socket /nowhere {line}");
        assert_eq!(run(&Args::try_parse_from(line.split(' ')).unwrap()).exit, 2, "{line}");
    }
}
