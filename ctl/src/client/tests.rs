//! The client against a server of a few lines: what it sends, and what it makes of replies, refusals and silence.

use std::os::unix::net::UnixListener;

use super::*;
use crate::testing::{Does, Server, header, reply};

fn client(server: &Server) -> Client {
    Client { pauses: &[Duration::ZERO; 3], ..Client::new(&server.socket()) }
}

fn change() -> Change {
    Change {
        path: "/v1/instances/vm/web/resize".into(),
        body: r#"{"cpus":4}"#.into(),
        if_version: Some("b3a9".into()),
        reference: "vm/web".into(),
    }
}

fn ok() -> Does {
    Does::Say(reply(200, "{}"))
}

fn overloaded() -> String {
    reply(503, r#"{"code":"overloaded","detail":"full"}"#)
}

#[test]
fn every_byte_outside_the_unreserved_is_encoded() {
    assert_eq!(encode("aZ09-._~"), "aZ09-._~");
    assert_eq!(encode("a b/c?d=é%"), "a%20b%2Fc%3Fd%3D%C3%A9%25");
    let reference = Ref::new(agentd_core::instance::Kind::Vm, "$(id) #1").unwrap();
    assert_eq!(instance_path(&reference), "/v1/instances/vm/%24%28id%29%20%231");
}

#[test]
fn a_change_carries_its_key_its_version_and_its_body() {
    let server = Server::new(vec![ok()]);
    assert_eq!(client(&server).change(&change()), Ok(Reply { status: 200, body: "{}".into() }));
    let request = server.requests().remove(0);
    assert!(request.starts_with("post /v1/instances/vm/web/resize http/1.1\r\n"), "{request}");
    assert!(request.ends_with("\r\n\r\n{\"cpus\":4}"), "{request}");
    assert_eq!(header(&request, "if-match"), "\"b3a9\"");
    assert_eq!(header(&request, "content-type"), "application/json");
    let key = header(&request, "idempotency-key");
    assert!(key.len() == 32 && key.bytes().all(|byte| byte.is_ascii_hexdigit()), "{key}");
}

#[test]
fn two_changes_have_two_keys() {
    assert_ne!(new_key(), new_key());
}

#[test]
fn where_nobody_listens_nothing_was_sent() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("nobody");
    let failure = Client::new(&path).change(&change()).unwrap_err();
    assert_eq!(failure.exit, 3);
    assert_eq!(failure.detail, format!("can't connect to {}: No such file or directory (os error 2)", path.display()));
    assert_eq!(failure.hint.as_deref(), Some("is agentd running? systemctl status agentd"));
    assert_eq!(Client::new(&path).get("/v1/health").unwrap_err().exit, 3);
}

#[test]
fn a_path_too_long_for_a_socket_is_unreachable_and_no_panic() {
    let failure = Client::new(Path::new(&"x".repeat(200))).get("/v1/health").unwrap_err();
    assert_eq!(failure.exit, 3, "{failure:?}");
}

#[test]
fn a_broken_connection_is_asked_again_under_the_same_key() {
    let server = Server::new(vec![Does::HangUp, Does::HangUp, ok()]);
    assert_eq!(client(&server).change(&change()).map(|reply| reply.status), Ok(200));
    let requests = server.requests();
    assert_eq!(requests.len(), 3);
    assert!(requests.iter().all(|request| request == &requests[0]), "{requests:?}");
}

#[test]
fn a_reply_cut_short_is_a_broken_connection() {
    let server = Server::new(vec![Does::Say("HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{".into()), ok()]);
    assert_eq!(client(&server).change(&change()).map(|reply| reply.body), Ok("{}".into()));
}

#[test]
fn where_asking_again_does_not_help_the_outcome_is_unknown() {
    // The fourth try finds no socket any more.
    let server = Server::new(vec![Does::HangUp, Does::Say(overloaded()), Does::HangUp]);
    let failure = client(&server).change(&change()).unwrap_err();
    assert_eq!((failure.exit, failure.code.as_str()), (7, "outcome-unknown"));
    assert!(failure.detail.starts_with("the change of vm/web was sent and its outcome is unknown: "), "{failure:?}");
    assert_eq!(failure.hint.as_deref(), Some("look before you try again: ctl show vm/web"));
    let keys: Vec<_> = server.requests().iter().map(|request| header(request, "idempotency-key")).collect();
    assert_eq!(keys.len(), 3);
    assert!(keys.iter().all(|key| !key.is_empty() && *key == keys[0]), "{keys:?}");
}

#[test]
fn a_server_that_turns_us_away_unread_is_overloaded_and_not_unknown() {
    let server = Server::new(vec![Does::TurnAway(overloaded())]);
    let failure = client(&server).change(&change()).unwrap_err();
    assert_eq!((failure.exit, failure.code.as_str()), (3, "overloaded"));
}

#[test]
fn a_problem_gives_its_exit_code_and_its_text() {
    let problem = reply(412, r#"{"code":"version-mismatch","detail":"changed"}"#);
    let server = Server::new(vec![Does::Say(problem)]);
    let failure = client(&server).change(&change()).unwrap_err();
    assert_eq!((failure.exit, failure.detail.as_str()), (10, "changed"));
}

#[test]
fn chunked_replies_are_read() {
    let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\n{\r\n1\r\n}\r\n0\r\n\r\n";
    let server = Server::new(vec![Does::Say(chunked.into())]);
    assert_eq!(client(&server).get("/v1/health").map(|reply| reply.body), Ok("{}".into()));
}

#[test]
fn a_silent_server_is_not_waited_for_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let _silent = UnixListener::bind(&path).unwrap();
    let failure = Client::new(&path).get_within("/v1/health", Duration::from_millis(50)).unwrap_err();
    assert_eq!(failure.exit, 3, "{failure:?}");
}

#[test]
fn a_bare_name_is_resolved_by_the_server() {
    let server = Server::new(vec![Does::Say(reply(200, r#"{"ref":"vm/we b"}"#))]);
    assert_eq!(client(&server).resolve("we b").map(|reference| reference.to_string()), Ok("vm/we b".into()));
    assert!(server.requests()[0].starts_with("get /v1/instances?name=we%20b http/1.1\r\n"));
    assert_eq!(client(&server).resolve("vm/web").unwrap().as_str(), "vm/web", "asks nobody");
    assert_eq!(client(&server).resolve("pod/web").unwrap_err().exit, 2);
}

/// A reply of which these chunks came, and its end where it had one.
fn chunked(chunks: &[&str], ended: bool) -> Does {
    let mut reply = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    for chunk in chunks {
        reply += &format!("{:x}\r\n{chunk}\r\n", chunk.len());
    }
    Does::Say(if ended { reply + "0\r\n\r\n" } else { reply })
}

#[test]
fn a_reply_that_goes_on_is_read_as_it_comes() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("s")).unwrap();
    let client = Client::new(&directory.path().join("s"));
    let server = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let Does::Say(first) = chunked(&["one"], false) else { unreachable!() };
        std::io::Write::write_all(&mut stream, first.as_bytes()).unwrap();
        stream
    });
    let mut reply = client.stream("/v1/x").unwrap();
    let mut some = [0; 100];
    // The server says no more before this has been read.
    assert_eq!(reply.read(&mut some).unwrap(), 3);
    let mut stream = server.join().unwrap();
    std::io::Write::write_all(&mut stream, b"3\r\ntwo\r\n0\r\n\r\n").unwrap();
    let mut rest = String::new();
    reply.read_to_string(&mut rest).unwrap();
    assert_eq!((&some[..3], rest.as_str()), (b"one".as_slice(), "two"));
}

#[test]
fn a_reply_that_broke_off_is_told_from_one_that_ended() {
    let server = Server::new(vec![chunked(&["one"], true), chunked(&["one"], false)]);
    let client = client(&server);
    let read = || {
        let mut text = String::new();
        client.stream("/v1/x").unwrap().read_to_string(&mut text).map(|_| text)
    };
    assert_eq!(read().unwrap(), "one");
    let failure = client.broke_off(&read().unwrap_err());
    assert!(failure.exit == 3 && failure.detail.contains("broke before the reply had ended"), "{failure:?}");
}

#[test]
fn a_stream_that_is_refused_is_a_failure_like_any_other() {
    let server = Server::new(vec![Does::Say(overloaded())]);
    assert_eq!(client(&server).stream("/v1/x").err().map(|failure| failure.exit), Some(3));
}
