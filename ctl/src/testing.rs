//! A server of a few lines that does what it is told, for tests of the client and of whole commands.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver};
use std::thread;

/// What the server does with a connection.
pub(crate) enum Does {
    /// Reads the request and answers with these bytes.
    Say(String),
    /// Reads the request and hangs up.
    HangUp,
    /// Answers without reading, and hangs up.
    TurnAway(String),
}

pub(crate) struct Server {
    directory: tempfile::TempDir,
    requests: Receiver<String>,
}

impl Server {
    /// Serves one connection after the other, then takes the socket away.
    pub(crate) fn new(script: Vec<Does>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let (seen, requests) = mpsc::channel();
        thread::spawn(move || {
            let last = script.len();
            for (number, does) in (1..).zip(script) {
                let (mut stream, _) = listener.accept().unwrap();
                if number == last {
                    std::fs::remove_file(&path).unwrap();
                }
                if let Does::TurnAway(reply) = does {
                    stream.write_all(reply.as_bytes()).unwrap();
                    continue;
                }
                let mut request = Vec::new();
                let mut byte = [0];
                while !request.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
                    request.push(byte[0]);
                }
                let head = String::from_utf8(request).unwrap().to_lowercase();
                let length = head
                    .split("content-length: ")
                    .nth(1)
                    .map_or(0, |rest| rest.split("\r\n").next().unwrap().parse().unwrap());
                let mut body = vec![0; length];
                stream.read_exact(&mut body).unwrap();
                seen.send(head + &String::from_utf8(body).unwrap()).unwrap();
                if let Does::Say(reply) = does {
                    stream.write_all(reply.as_bytes()).unwrap();
                }
            }
        });
        Server { directory, requests }
    }

    /// The path of the socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    /// What was asked, in order, in lower case; waits until the script is over.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests.iter().collect()
    }
}

/// A reply with its length.
pub(crate) fn reply(status: u16, body: &str) -> String {
    format!("HTTP/1.1 {status} Reason\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
}

/// A header of a request.
pub(crate) fn header(request: &str, name: &str) -> String {
    let start = format!("{name}: ");
    request.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_default().to_owned()
}
