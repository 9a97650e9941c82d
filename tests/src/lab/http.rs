//! A hand-written HTTP/1.1 client on a Unix socket: small, blocking, and able to send what no library would.
//! Knows nothing about the API.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

/// No reply takes longer than this; a test that waits for more is broken.
const PATIENCE: Duration = Duration::from_secs(120);

/// A reply, whole.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// Header names, in lower case, and values, in the order in which they came.
    pub headers: Vec<(String, String)>,
    /// The body, out of its chunks.
    pub body: Vec<u8>,
}

impl Response {
    /// The first header of that name, whatever its case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    ///
    /// # Panics
    /// Where it isn't JSON; the message shows it.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in the body {:?}", self.text()))
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// The bytes of one request; sets Host, `Content-Length` and `Connection: close`.
pub(crate) fn encode(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !body.is_empty() || matches!(method, "POST" | "PUT" | "PATCH") {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    head.push_str("\r\n");
    [head.as_bytes(), body].concat()
}

/// Sends one request on a connection of its own and reads the whole reply.
pub(crate) fn request(
    socket: &Path,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Response> {
    let stream = connect(socket)?;
    // A server may refuse a request (too large) and close before it has read all of it: the reply counts.
    let sent = (&stream).write_all(&encode(method, path, headers, body));
    let reply = read_response(&mut BufReader::new(stream), method == "HEAD");
    match (reply, sent) {
        (Err(_), Err(unsent)) => Err(unsent).context("cannot send the request"),
        (reply, _) => reply,
    }
}

/// A connection with a limit on how long it may stay silent.
pub(crate) fn connect(socket: &Path) -> Result<UnixStream> {
    let stream = UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Reads one reply: head and body.
pub(crate) fn read_response(from: &mut impl BufRead, head_only: bool) -> Result<Response> {
    let mut response = read_head(from)?;
    if head_only || response.status == 204 || response.status == 304 {
        return Ok(response);
    }
    if response.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked")) {
        while let Some(chunk) = read_chunk(from)? {
            response.body.extend(chunk);
        }
    } else if let Some(length) = response.header("content-length") {
        let mut body = vec![0; length.parse().context("a Content-Length that is no number")?];
        from.read_exact(&mut body).context("the body is shorter than its Content-Length")?;
        response.body = body;
    } else {
        from.read_to_end(&mut response.body)?;
    }
    Ok(response)
}

fn read_head(from: &mut impl BufRead) -> Result<Response> {
    let status_line = read_line(from)?;
    let status =
        status_line.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).and_then(|code| code.parse().ok());
    let status = status.with_context(|| format!("no status line: {status_line:?}"))?;
    let mut headers = Vec::new();
    loop {
        let line = read_line(from)?;
        if line.is_empty() {
            return Ok(Response { status, headers, body: Vec::new() });
        }
        let (name, value) = line.split_once(':').with_context(|| format!("no header: {line:?}"))?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

fn read_line(from: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    ensure!(from.read_line(&mut line)? > 0, "the connection was closed in the middle of a reply");
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

fn read_chunk(from: &mut impl BufRead) -> Result<Option<Vec<u8>>> {
    let line = read_line(from)?;
    let length = line.split(';').next().unwrap_or_default().trim();
    let length = usize::from_str_radix(length, 16).with_context(|| format!("no chunk length: {line:?}"))?;
    let mut chunk = vec![0; length];
    from.read_exact(&mut chunk)?;
    ensure!(read_line(from)?.is_empty(), "no end of a chunk");
    Ok((length > 0).then_some(chunk))
}

/// A stream of server-sent events that stays open.
pub struct Events {
    from: BufReader<UnixStream>,
    chunked: bool,
    pending: Vec<u8>,
}

impl Events {
    /// Opens it; an error where the reply isn't 200.
    pub(crate) fn open(socket: &Path, path: &str, headers: &[(&str, &str)]) -> Result<Self> {
        let mut stream = connect(socket)?;
        stream.write_all(&encode("GET", path, headers, b""))?;
        let mut from = BufReader::new(stream);
        let head = read_head(&mut from)?;
        ensure!(head.status == 200, "events: status {}", head.status);
        let chunked = head.header("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
        Ok(Self { from, chunked, pending: Vec::new() })
    }

    /// The next event as (id, event name, data), comments left out; an error after `limit` without one.
    ///
    /// # Errors
    /// Silence for that long, or a connection that was closed.
    pub fn next(&mut self, limit: Duration) -> Result<(String, String, String)> {
        self.from.get_ref().set_read_timeout(Some(limit))?;
        let (mut id, mut event, mut data) = Default::default();
        loop {
            let line = self.line()?;
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value).to_owned();
            match field {
                "id" => id = value,
                "event" => event = value,
                "data" if String::is_empty(&data) => data = value,
                "data" => data = format!("{data}\n{value}"),
                "" if line.is_empty() && !data.is_empty() => return Ok((id, event, data)),
                _ => {}
            }
        }
    }

    fn line(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned());
            }
            if self.chunked {
                match read_chunk(&mut self.from)? {
                    Some(chunk) => self.pending.extend(chunk),
                    None => bail!("the stream of events has ended"),
                }
            } else if self.from.read_until(b'\n', &mut self.pending)? == 0 {
                bail!("the stream of events has ended");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunked_reply_is_put_together() {
        let bytes =
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n";
        let reply = read_response(&mut &bytes[..], false).unwrap();
        assert_eq!((reply.status, reply.text().as_str(), reply.header("x-a")), (200, "abcde", Some("b")));
    }

    #[test]
    fn a_reply_that_was_cut_off_is_an_error() {
        let bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc";
        assert!(read_response(&mut &bytes[..], false).is_err());
    }
}
