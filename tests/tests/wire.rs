//! Bad input on the wire, on the fake engine: each answers with its code and changes nothing.

use std::io::{Read, Write};
use std::time::Duration;

use agentd_tests::lab::{Agentd, Response, wait_until};
use anyhow::Result;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);
const CONFIG: &str = "[capacity]\ncpus = 16\n";

/// `vm/web` (2 of 4 vCPUs, 1 of 4 GiB, 200 MiB in use) and `vm/off`, stopped.
fn agentd() -> Result<Agentd> {
    slow_agentd(0)
}

/// The same, each step taking this long.
fn slow_agentd(delay_ms: u64) -> Result<Agentd> {
    let spec = json!({"delay_ms": delay_ms, "instances": [
        {"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "used": "200MiB"},
        {"name": "off", "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "stopped": true}]});
    Agentd::with_config(CONFIG).fake(spec).start()
}

fn code(reply: &Response) -> String {
    reply.json()["code"].as_str().unwrap_or_default().to_owned()
}

fn web(agentd: &Agentd) -> Result<Value> {
    Ok(agentd.get("/v1/instances/vm/web")?.json())
}

/// Percent-encodes every byte that isn't a letter or digit.
fn segment(name: &str) -> String {
    name.bytes()
        .map(|b| if b.is_ascii_alphanumeric() { (b as char).to_string() } else { format!("%{b:02X}") })
        .collect()
}

#[test]
fn names_that_are_no_names_are_invalid_and_unknown_ones_not_found() -> Result<()> {
    let agentd = agentd()?;
    let long = "a".repeat(300);
    for name in ["a/b", "..", "../info?x=", "a\0b", "a\nb", &long, " "] {
        for path in [format!("/v1/instances/vm/{}", segment(name)), format!("/v1/instances?name={}", segment(name))] {
            let reply = agentd.get(&path)?;
            assert_eq!((reply.status, code(&reply)), (400, "invalid-request".into()), "{path}");
        }
    }
    for name in ["$(id)", "a;b", "a?b=c#d", "a%2fb", "nix", "-rf"] {
        let reply = agentd.get(&format!("/v1/instances/vm/{}", segment(name)))?;
        assert_eq!((reply.status, code(&reply)), (404, "not-found".into()), "{name}");
    }
    for (path, status, expected) in [
        ("/v1/instances/pod/web", 400, "invalid-request"),
        ("/v1/instances/container/web", 404, "not-found"),
        ("/v1/instances/vm/a%ff", 400, "invalid-request"),
        ("/v1/instances?kind=pod", 400, "invalid-request"),
        ("/v1/instances?state=asleep", 400, "invalid-request"),
        ("/v1/instances?match=%5B", 400, "invalid-request"),
        ("/v1/instances?colour=red", 400, "invalid-request"),
        ("/v1/instances?limit=x", 400, "invalid-request"),
    ] {
        let reply = agentd.get(path)?;
        assert_eq!((reply.status, code(&reply)), (status, expected.into()), "{path}");
    }
    assert_eq!(agentd.get("/v1/instances?name=web")?.json()["ref"], "vm/web");
    Ok(())
}

#[test]
fn bodies_that_cant_be_meant_answer_with_their_code_and_change_nothing() -> Result<()> {
    let agentd = agentd()?;
    let before = web(&agentd)?;
    let deep = format!("{}1{}", "{\"cpus\":".repeat(5000), "}".repeat(5000));
    for (body, status, expected) in [
        (r#"{"cpus":0}"#, 400, "invalid-request"),
        (r#"{"cpus":-1}"#, 400, "invalid-request"),
        (r#"{"cpus":1.5}"#, 400, "invalid-request"),
        (r#"{"cpus":1000000000}"#, 400, "invalid-request"),
        (r#"{"cpus":NaN}"#, 400, "invalid-request"),
        (r#"{"cpus":"many"}"#, 400, "invalid-request"),
        (r#"{"cpus":"none"}"#, 400, "invalid-request"),
        (r#"{"cpus":null}"#, 400, "invalid-request"),
        (r#"{"cpus":true}"#, 400, "invalid-request"),
        (r#"{"cpus":1e999}"#, 400, "invalid-request"),
        (r#"{"cpus":"-2"}"#, 400, "invalid-request"),
        (r#"{"memory":0}"#, 400, "invalid-request"),
        (r#"{"memory":-1}"#, 400, "invalid-request"),
        (r#"{"memory":1}"#, 422, "below-minimum"),
        (r#"{"memory":"1.5GiB"}"#, 400, "invalid-request"),
        (r#"{"memory":1.5}"#, 400, "invalid-request"),
        (r#"{"memory":9223372036854775808}"#, 400, "invalid-request"),
        (r#"{"memory":"8 GB!"}"#, 400, "invalid-request"),
        (r#"{"memory":"8GB"}"#, 400, "invalid-request"),
        (r#"{"cpu_limit":0.001}"#, 422, "below-minimum"),
        (r#"{"cpus":"+3"}"#, 422, "restart-required"),
        (r#"{"cpus":"+30"}"#, 429, "capacity-exceeded"),
        (r#"{"memory":"5GiB"}"#, 422, "restart-required"),
        (r#"{"size":"huge"}"#, 404, "not-found"),
        (r#"{"size":"huge","cpus":1}"#, 400, "invalid-request"),
        (r#"{"cpus":3,"wait":"soon"}"#, 400, "invalid-request"),
        (r#"{"cpus":3,"wait":"2d"}"#, 400, "invalid-request"),
        (r#"{"cpus":3,"apply":"later"}"#, 400, "invalid-request"),
        (r#"{"cpus":3,"restart":"if-needed","apply":"live"}"#, 400, "invalid-request"),
        (r#"{"cpus":3,"restart":"if-needed","for":"2h"}"#, 400, "invalid-request"),
        (r#"{"cpus":3,"restart":"always"}"#, 400, "invalid-request"),
        (r#"{"cpus":3,"force":true}"#, 400, "invalid-request"),
        (r#"{"cpus":1,"for":"2h"}"#, 400, "invalid-request"),
        (r#"{"cpus":3,"for":"soon"}"#, 400, "invalid-request"),
        (r#"{"cpux":3}"#, 400, "invalid-request"),
        (r#"{"cpus":3,"cpus":4}"#, 400, "invalid-request"),
        (r#"{"cpus":3"#, 400, "invalid-request"),
        (r#"{"cpus":3}}"#, 400, "invalid-request"),
        ("cpus=3", 400, "invalid-request"),
        ("[3]", 400, "invalid-request"),
        ("{}", 400, "invalid-request"),
        ("", 400, "invalid-request"),
        (&deep, 400, "invalid-request"),
        (&" ".repeat(1 << 20), 413, "body-too-large"),
    ] {
        let shown: String = body.chars().take(60).collect();
        let headers = [("Content-Type", "application/json")];
        let reply = agentd.http("POST", "/v1/instances/vm/web/resize", &headers, body.as_bytes())?;
        assert_eq!((reply.status, code(&reply)), (status, expected.into()), "{shown}: {}", reply.text());
    }
    assert_eq!(web(&agentd)?, before);
    Ok(())
}

#[test]
fn other_content_types_routes_and_methods_have_their_codes() -> Result<()> {
    let agentd = agentd()?;
    let resize = "/v1/instances/vm/web/resize";
    for headers in [&[][..], &[("Content-Type", "text/plain")], &[("Content-Type", "application/jsonx")]] {
        let reply = agentd.http("POST", resize, headers, br#"{"cpus":3}"#)?;
        assert_eq!((reply.status, code(&reply)), (415, "unsupported-media-type".into()), "{headers:?}");
    }
    let utf8 = [("Content-Type", "application/json; charset=utf-8")];
    assert_eq!(agentd.http("POST", resize, &utf8, br#"{"cpus":2}"#)?.status, 200);
    for (method, path, status, expected) in [
        ("DELETE", "/v1/capacity", 405, "method-not-allowed"),
        ("GET", resize, 405, "method-not-allowed"),
        ("PUT", "/v1/instances/vm/web", 405, "method-not-allowed"),
    ] {
        let reply = agentd.http(method, path, &[], b"")?;
        assert_eq!((reply.status, code(&reply)), (status, expected.into()), "{method} {path}");
    }
    for path in ["/", "/v1", "/v2/instances", "/v1/instances/", "/v1/instances/vm/web/shrink", "//etc/passwd"] {
        let reply = agentd.raw(format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").as_bytes())?;
        assert_eq!((reply.status, code(&reply)), (404, "not-found".into()), "{path}");
    }
    Ok(())
}

#[test]
fn requests_that_arrive_in_part_or_too_large_are_ended() -> Result<()> {
    let agentd = agentd()?;
    // Headers that stop in the middle: the connection is closed, in its own time.
    let mut half = agentd.connect()?;
    half.set_read_timeout(Some(Duration::from_secs(60)))?;
    half.write_all(b"GET /v1/health HTTP/1.1\r\nHost:")?;
    // A body that stops in the middle is told so.
    let mut body = agentd.connect()?;
    body.set_read_timeout(Some(Duration::from_secs(60)))?;
    body.write_all(
        b"POST /v1/instances/vm/web/resize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n\
          Connection: close\r\nContent-Length: 100\r\n\r\n{\"cpus\":",
    )?;
    let mut reply = String::new();
    body.read_to_string(&mut reply)?;
    assert!(reply.contains("408") && reply.contains("request-timeout"), "{reply}");
    let mut rest = Vec::new();
    half.read_to_end(&mut rest)?;
    let large = agentd.raw(
        format!("GET /v1/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Large: {}\r\n\r\n", "a".repeat(17 << 10))
            .as_bytes(),
    )?;
    assert_eq!(large.status, 431);
    assert_eq!(agentd.get("/v1/health")?.status, 200);
    Ok(())
}

#[test]
fn the_headers_that_steer_a_change_are_kept_to() -> Result<()> {
    let agentd = agentd()?;
    let path = "/v1/instances/vm/web/resize";
    let json = ("Content-Type", "application/json");
    let version = format!("\"{}\"", web(&agentd)?["version"].as_str().unwrap_or_default());
    let other = agentd.http("POST", path, &[json, ("If-Match", "\"other\"")], br#"{"cpus":3}"#)?;
    assert_eq!((other.status, code(&other)), (412, "version-mismatch".into()));
    let key = ("Idempotency-Key", "k1");
    let first = agentd.http("POST", path, &[json, key, ("If-Match", &version)], br#"{"cpus":"+1"}"#)?;
    assert_eq!(first.status, 200, "{}", first.text());
    let again = agentd.http("POST", path, &[json, key, ("If-Match", &version)], br#"{"cpus":"+1"}"#)?;
    assert_eq!(again.json()["operation"], first.json()["operation"]);
    let mismatch = agentd.http("POST", path, &[json, key], br#"{"cpus":"+2"}"#)?;
    assert_eq!((mismatch.status, code(&mismatch)), (422, "idempotency-mismatch".into()));
    assert_eq!(web(&agentd)?["cpus"]["observed"], 3);
    let id = first.json()["operation"].as_str().unwrap_or_default().to_owned();
    assert_eq!(agentd.get(&format!("/v1/operations/{id}"))?.json()["outcome"], "changed");
    assert_eq!(agentd.get("/v1/operations/nix")?.status, 404);
    assert!(!agentd.get("/v1/operations?ref=vm/web")?.json()["items"].as_array().is_none_or(Vec::is_empty));
    Ok(())
}

#[test]
fn pages_of_a_list_join_to_the_whole() -> Result<()> {
    let agentd = agentd()?;
    let first = agentd.get("/v1/instances?limit=1")?.json();
    assert_eq!((first["total"].clone(), first["items"][0]["ref"].clone()), (json!(2), json!("vm/off")));
    let cursor = first["next_cursor"].as_str().unwrap_or_default().replace('/', "%2F");
    let second = agentd.get(&format!("/v1/instances?limit=1&cursor={cursor}"))?.json();
    assert_eq!((second["items"][0]["ref"].clone(), second["next_cursor"].clone()), (json!("vm/web"), Value::Null));
    assert_eq!(agentd.get("/v1/instances?state=stopped&match=vm%2Fo*")?.json()["total"], 1);
    Ok(())
}

#[test]
fn a_caller_that_does_not_wait_is_told_where_to_look_and_one_that_goes_away_changes_nothing() -> Result<()> {
    let agentd = slow_agentd(200)?;
    let path = "/v1/instances/vm/web/resize";
    let headers = [("Content-Type", "application/json"), ("Prefer", "wait=0")];
    let reply = agentd.http("POST", path, &headers, br#"{"cpus":3,"memory":"2GiB"}"#)?;
    assert_eq!((reply.status, &reply.json()["outcome"]), (202, &json!("running")), "{}", reply.text());
    let operation = reply.header("location").unwrap_or_default().to_owned();
    wait_until("the change to end", LIMIT, || {
        Ok((agentd.get(&operation)?.json()["outcome"] == "changed").then_some(()))
    })?;
    assert_eq!(web(&agentd)?["cpus"]["observed"], 3);
    // Sent, and gone before the answer.
    let body = r#"{"cpus":4}"#;
    let mut gone = agentd.connect()?;
    write!(
        gone,
        "POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    wait_until("the change to begin", LIMIT, || {
        let newest = agentd.get("/v1/operations?ref=vm/web&limit=1")?.json();
        Ok((newest["items"][0]["changes"][0]["requested"] == 4).then_some(()))
    })?;
    drop(gone);
    wait_until("the change to end all the same", LIMIT, || Ok((web(&agentd)?["cpus"]["observed"] == 4).then_some(())))
}
