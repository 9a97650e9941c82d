//! A connection that is kept open for one request after the other: what a program pays for a call, without a process or a
//! connection of its own.

use std::{
    io::{BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
};

use anyhow::Result;

use crate::lab::{
    Response,
    http::{connect, read_response},
};

/// An HTTP/1.1 connection over a Unix socket.
pub struct Kept(BufReader<UnixStream>);

impl Kept {
    /// Connects.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn open(socket: &Path) -> Result<Self> {
        Ok(Kept(BufReader::new(connect(socket)?)))
    }

    /// Sends one request and reads its reply.
    ///
    /// # Errors
    /// The connection broke, or the reply is malformed.
    pub fn ask(&mut self, method: &str, path: &str, body: &str) -> Result<Response> {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        self.0.get_mut().write_all(request.as_bytes())?;
        read_response(&mut self.0, false)
    }
}
