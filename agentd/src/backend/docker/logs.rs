//! A container's log, as the engine keeps it: asked for over its socket and handed on as it comes. Knows the frames in which
//! Docker tells stdout and stderr apart.
//!
//! Not by bollard's own call, which makes a value of each line and keeps as much of it as the engine has sent at once.

use std::path::Path;
use std::time::Duration;

use agentd_core::api::{LOG_HEADER, LogStream};
use agentd_core::instance::Ref;
use bollard::models::ContainerInspectResponse;
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response, header};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::client::{Client, READ, refused, root_cause};
use super::view;
use crate::backend::BackendError;
use crate::backend::logs::{LogAsk, LogFrames, PIECE, Piece};

/// The driver that keeps nothing.
const NO_DRIVER: &str = "none";
/// How much of the engine's words is kept.
const WORDS: usize = 4096;
/// How long a log that is followed is silent before its container is looked at.
const SILENT: Duration = Duration::from_secs(5);

/// The connection's task, which ends with who reads from it.
struct Connection(JoinHandle<()>);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How a log ends.
enum End {
    Whole,
    Broken(BackendError),
}

/// A container whose log is followed.
struct Follow {
    client: Client,
    id: String,
    /// Where to ask for all of it once more, when it has ended. Not with a tail, of which nobody knows where it began.
    again: Option<String>,
}

/// A log that is being read.
struct Reading {
    body: Incoming,
    /// `None` for a terminal's, which has no frames.
    demux: Option<Demux>,
    passed: Passed,
    /// What is followed, until it has ended.
    follow: Option<Follow>,
    /// How it ended, where that is yet to be told.
    ended: Option<End>,
    _connection: Connection,
}

/// The log of a container.
pub(super) async fn read(
    client: &Client,
    target: &Ref,
    found: &ContainerInspectResponse,
    ask: &LogAsk,
) -> Result<LogFrames, BackendError> {
    let driver = found.host_config.as_ref().and_then(|host| host.log_config.as_ref()?.typ.as_deref());
    let driver = driver.unwrap_or_default();
    let unkept = || {
        let why = format!("{target} has the logging driver {driver:?}, which keeps nothing that could be read");
        BackendError::Unsupported(why)
    };
    if driver == NO_DRIVER {
        return Err(unkept());
    }
    let id = view::id(found);
    let (body, connection) = open(client.socket(), &path(id, ask)).await.map_err(|error| match error {
        // The text of moby's `ErrReadLogsNotSupported`, logger/errors.go; the status differs by version.
        BackendError::Failed(why) if why.contains("does not support reading") => unkept(),
        error => error,
    })?;
    let terminal = found.config.as_ref().and_then(|config| config.tty).unwrap_or_default();
    let follow = ask.follow.then(|| {
        let again = ask.tail.is_none().then(|| path(id, &LogAsk { follow: false, ..*ask }));
        Follow { client: client.clone(), id: id.to_owned(), again }
    });
    let reading = Reading {
        body,
        demux: (!terminal).then(Demux::default),
        passed: Passed::default(),
        follow,
        ended: None,
        _connection: connection,
    };
    Ok(stream::unfold(Some(reading), next).boxed())
}

/// Asks the engine for a log.
async fn open(socket: &Path, path: &str) -> Result<(Incoming, Connection), BackendError> {
    let gone =
        |why: String| BackendError::Unavailable(format!("docker can't be reached at {}: {why}", socket.display()));
    let asked = async {
        let stream = UnixStream::connect(socket).await.map_err(|error| gone(error.to_string()))?;
        let broke = |error: hyper::Error| gone(format!("the connection broke: {}", root_cause(&error)));
        let mut http = http1::Builder::new();
        let (mut sender, connection) = http.max_buf_size(PIECE).handshake(TokioIo::new(stream)).await.map_err(broke)?;
        // How it ends shows in the body.
        let connection = Connection(tokio::spawn(async move { drop(connection.await) }));
        let request = Request::get(path).header(header::HOST, "docker").body(Empty::<Bytes>::new());
        let request = request.map_err(|error| BackendError::Failed(format!("{path} can't be asked for: {error}")))?;
        Ok((sender.send_request(request).await.map_err(broke)?, connection))
    };
    let (reply, connection) = tokio::time::timeout(READ, asked).await.unwrap_or_else(|_| Err(late(READ)))?;
    if !reply.status().is_success() {
        let status = reply.status().as_u16();
        return Err(refused("logs", status, &words(reply).await));
    }
    Ok((reply.into_body(), connection))
}

/// `id` is a full id, so it is one segment of a path.
fn path(id: &str, ask: &LogAsk) -> String {
    let tail = ask.tail.map_or_else(|| "all".to_owned(), |lines| lines.to_string());
    let mut path = format!("/containers/{id}/logs?stdout=1&stderr=1&follow={}&tail={tail}", u8::from(ask.follow));
    if let Some(since) = ask.since_epoch() {
        path += &format!("&since={}.{:09}", since.as_secs(), since.subsec_nanos());
    }
    path
}

fn late(deadline: Duration) -> BackendError {
    BackendError::Timeout(format!("docker gave no answer to `logs` within {} s", deadline.as_secs()))
}

/// What the engine says in an error's body.
async fn words(reply: Response<Incoming>) -> String {
    let body = Limited::new(reply.into_body(), WORDS).collect();
    let Ok(Ok(body)) = tokio::time::timeout(READ, body).await else { return "no reason was given".into() };
    let text = String::from_utf8_lossy(&body.to_bytes()).into_owned();
    let told: Option<serde_json::Value> = serde_json::from_str(&text).ok();
    told.and_then(|told| Some(told.get("message")?.as_str()?.to_owned())).unwrap_or(text)
}

/// The next piece, and what is left to read. Docker sends each line by itself: what has come by now goes on as one.
async fn next(reading: Option<Reading>) -> Option<(Result<Bytes, BackendError>, Option<Reading>)> {
    let mut reading = reading?;
    let mut piece = Piece::default();
    while reading.ended.is_none() && piece.len() < PIECE {
        let taken = if piece.is_empty() {
            match reading.wait().await {
                Some(come) => reading.take(come, &mut piece),
                None => Err(End::Whole),
            }
        } else {
            match reading.body.frame().now_or_never() {
                Some(come) => reading.take(come, &mut piece),
                None => break,
            }
        };
        reading.ended = match taken {
            Ok(()) => None,
            Err(End::Whole) => reading.read_again().await,
            Err(broken) => Some(broken),
        };
    }
    match (piece.take(), reading.ended.take()) {
        (Some(piece), ended) => Some((Ok(piece), Some(Reading { ended, ..reading }))),
        (None, Some(End::Broken(error))) => Some((Err(error), None)),
        (None, _) => None,
    }
}

impl Reading {
    /// What comes next of the body, or `None` where a log that is followed has ended unsaid: its container was down already when
    /// it had been silent for a while, and nothing came in as long again. Docker doesn't always end it for a reader that began
    /// to follow while the container ended.
    async fn wait(&mut self) -> Option<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(follow) = &self.follow else { return Some(self.body.frame().await) };
        let mut down = false;
        loop {
            if let Ok(come) = tokio::time::timeout(SILENT, self.body.frame()).await {
                return Some(come);
            }
            if down {
                return None;
            }
            down = follow.is_down().await;
        }
    }

    /// Asks for what Docker left out of a log that was followed to its end: 20.10 ends it with its container also for a reader
    /// that was behind (seen with 20.10.24 when it was some MiB behind; moby rewrote this in 23.0). Read anew, what has been
    /// passed on is skipped, by its length. Without an `again`, Docker's word stands.
    async fn read_again(&mut self) -> Option<End> {
        let Some(Follow { client, again: Some(path), .. }) = self.follow.take() else { return Some(End::Whole) };
        match open(client.socket(), &path).await {
            Ok((body, connection)) => {
                (self.body, self._connection) = (body, connection);
                self.demux = self.demux.as_ref().map(|_| Demux::default());
                self.passed.begin_anew();
                None
            }
            // Removed as soon as it had ended (`docker run --rm`).
            Err(BackendError::NotFound(_) | BackendError::InvalidState(_)) => Some(End::Whole),
            Err(error) => Some(End::Broken(error)),
        }
    }

    /// Takes what came of the body.
    fn take(&mut self, come: Option<Result<Frame<Bytes>, hyper::Error>>, piece: &mut Piece) -> Result<(), End> {
        let failed = |why: String| End::Broken(BackendError::Failed(why));
        let bytes = match come {
            None if self.demux.as_ref().is_none_or(Demux::is_between_frames) => return Err(End::Whole),
            None => return Err(failed("docker ended the log in the middle of a frame".into())),
            Some(Err(error)) => {
                let why = format!("docker broke off while its log was read: {}", root_cause(&error));
                return Err(End::Broken(BackendError::Unavailable(why)));
            }
            Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
        };
        let passed = &mut self.passed;
        let mut push = |stream, bytes: &[u8]| piece.push(stream, passed.rest(stream, bytes));
        match &mut self.demux {
            Some(demux) => demux.take(&bytes, &mut push).map_err(failed),
            None => {
                push(LogStream::Stdout, &bytes);
                Ok(())
            }
        }
    }
}

impl Follow {
    /// Whether the container is known to be down or gone.
    async fn is_down(&self) -> bool {
        match self.client.inspect(&self.id).await {
            Ok(found) => found.state.and_then(|state| state.running) == Some(false),
            Err(error) => matches!(error, BackendError::NotFound(_)),
        }
    }
}

/// How much of stdout and of stderr has been passed on, and how much is not to be once more.
#[derive(Debug, Default)]
struct Passed {
    on: [usize; 2],
    skip: [usize; 2],
}

impl Passed {
    /// What of this is new.
    fn rest<'a>(&mut self, stream: LogStream, bytes: &'a [u8]) -> &'a [u8] {
        let [out, err] = [0, 1];
        let of = if stream == LogStream::Stderr { err } else { out };
        let (Some(on), Some(skip)) = (self.on.get_mut(of), self.skip.get_mut(of)) else { return bytes };
        let (_, rest) = bytes.split_at(bytes.len().min(*skip));
        *skip -= bytes.len() - rest.len();
        *on += rest.len();
        rest
    }

    fn begin_anew(&mut self) {
        self.skip = self.on;
    }
}

/// Docker's frames, of which any part may come at a time (moby's pkg/stdcopy).
#[derive(Debug, Default)]
struct Demux {
    /// What there is of a header.
    header: Vec<u8>,
    /// The stream of the frame, and how much of it is to come.
    frame: Option<(LogStream, usize)>,
    /// What the engine says in place of a log.
    words: Vec<u8>,
}

impl Demux {
    /// Takes what came, or tells why the log can't go on.
    fn take(&mut self, mut bytes: &[u8], push: &mut impl FnMut(LogStream, &[u8])) -> Result<(), String> {
        while !bytes.is_empty() {
            let Some((stream, left)) = self.frame.take() else {
                let (begin, rest) = bytes.split_at(bytes.len().min(LOG_HEADER - self.header.len()));
                self.header.extend(begin);
                bytes = rest;
                if let Ok(header) = <[u8; LOG_HEADER]>::try_from(self.header.as_slice()) {
                    self.header.clear();
                    let (stream, length) = LogStream::read(header)
                        .ok_or_else(|| format!("docker's log has no frame where one must begin: {header:?}"))?;
                    self.frame = usize::try_from(length).ok().filter(|length| *length > 0).map(|left| (stream, left));
                }
                continue;
            };
            let (now, rest) = bytes.split_at(bytes.len().min(left));
            bytes = rest;
            let left = left - now.len();
            match stream {
                LogStream::Problem => {
                    self.words.extend(now.iter().take(WORDS - self.words.len()));
                    if left == 0 {
                        let words = String::from_utf8_lossy(&self.words);
                        return Err(format!("docker can't read on in its log: {}", words.trim()));
                    }
                }
                stream => push(stream, now),
            }
            self.frame = (left > 0).then_some((stream, left));
        }
        Ok(())
    }

    fn is_between_frames(&self) -> bool {
        self.header.is_empty() && self.frame.is_none()
    }
}

/// Any bytes as a log of the engine's.
#[cfg(feature = "fake")]
pub(super) mod fuzzing {
    use super::{Demux, LogStream};

    /// However it is cut, it says the same.
    pub(in super::super) fn log(bytes: &[u8]) {
        let read = |length: usize| {
            let (mut demux, mut said) = (Demux::default(), Vec::new());
            let mut push = |stream: LogStream, text: &[u8]| said.extend(text.iter().map(|byte| (stream, *byte)));
            let end = bytes.chunks(length).try_for_each(|piece| demux.take(piece, &mut push));
            (end, said)
        };
        assert_eq!(read(usize::MAX), read(3));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::backend::logs::unframe;

    fn frame(stream: LogStream, text: &[u8]) -> Vec<u8> {
        [&stream.header(u32::try_from(text.len()).unwrap()), text].concat()
    }

    /// What one stream has said.
    fn said(frames: &[(LogStream, Vec<u8>)], of: LogStream) -> Vec<u8> {
        frames.iter().filter(|(stream, _)| *stream == of).flat_map(|(_, bytes)| bytes.clone()).collect()
    }

    proptest! {
        #[test]
        fn frames_are_the_same_however_they_are_cut(
            frames in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..40)), 0..20),
            cuts in prop::collection::vec(1_usize..30, 1..50),
        ) {
            let frames: Vec<_> = frames.into_iter()
                .map(|(error, bytes)| (if error { LogStream::Stderr } else { LogStream::Stdout }, bytes)).collect();
            let wire: Vec<u8> = frames.iter().flat_map(|(stream, bytes)| frame(*stream, bytes)).collect();
            let (mut demux, mut seen, mut rest, mut cuts) = (Demux::default(), Vec::new(), &wire[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
                let mut piece = Piece::default();
                demux.take(now, &mut |stream, bytes| piece.push(stream, bytes)).unwrap();
                seen.extend(piece.take().map(|piece| unframe(&piece)).unwrap_or_default());
                rest = later;
            }
            prop_assert!(demux.is_between_frames());
            for stream in [LogStream::Stdout, LogStream::Stderr] {
                prop_assert_eq!(said(&seen, stream), said(&frames, stream));
            }
        }
    }

    /// An engine whose only container is down and whose log, followed, never ends.
    fn endless() -> (tempfile::TempDir, Client) {
        let folder = tempfile::tempdir().unwrap();
        let listener = tokio::net::UnixListener::bind(folder.path().join("docker.sock")).unwrap();
        tokio::spawn(async move {
            let mut held = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 4096];
                let read = stream.read(&mut request).await.unwrap();
                let request = String::from_utf8_lossy(&request[..read]).into_owned();
                let body: &[u8] = if request.contains("/json") {
                    br#"{"State": {"Running": false}}"#
                } else if request.contains("follow=1") {
                    b"one"
                } else {
                    b"one, two"
                };
                let more = usize::from(request.contains("follow=1"));
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len() + more);
                stream.write_all(&[head.as_bytes(), body].concat()).await.unwrap();
                held.push(stream);
            }
        });
        let client = Client::new(folder.path().join("docker.sock"));
        (folder, client)
    }

    #[tokio::test(start_paused = true)]
    async fn a_follower_whom_the_engine_forgot_ends_with_its_container_and_has_all_of_its_log() {
        let (_folder, client) = endless();
        let found: ContainerInspectResponse = serde_json::from_str(r#"{"Id": "c1", "Config": {"Tty": true}}"#).unwrap();
        let target = Ref::new(agentd_core::instance::Kind::Container, "c1").unwrap();
        for (tail, whole) in [(None, "one, two"), (Some(1), "one")] {
            let ask = LogAsk { follow: true, tail, ..LogAsk::default() };
            let frames = read(&client, &target, &found, &ask).await.unwrap();
            let pieces: Vec<Bytes> = frames.map(|piece| piece.unwrap()).collect().await;
            let said = pieces.iter().flat_map(|piece| said(&unframe(piece), LogStream::Stdout)).collect::<Vec<u8>>();
            assert_eq!(String::from_utf8(said).unwrap(), whole);
        }
    }

    #[test]
    fn what_the_engine_says_in_place_of_a_log_is_an_error() {
        let mut demux = Demux::default();
        let wire = [frame(LogStream::Stdout, b"a\n"), frame(LogStream::Problem, b"unexpected EOF\n")].concat();
        let why = demux.take(&wire, &mut |_, _| {}).unwrap_err();
        assert_eq!(why, "docker can't read on in its log: unexpected EOF");
        let why = Demux::default().take(b"no frames at all", &mut |_, _| {}).unwrap_err();
        assert!(why.contains("no frame where one must begin"), "{why}");
    }

    #[test]
    fn what_has_been_passed_on_is_not_passed_on_again() {
        let mut passed = Passed::default();
        assert_eq!(passed.rest(LogStream::Stdout, b"abc"), b"abc");
        assert_eq!(passed.rest(LogStream::Stderr, b"x"), b"x");
        passed.begin_anew();
        assert_eq!(passed.rest(LogStream::Stdout, b"ab"), b"");
        assert_eq!(passed.rest(LogStream::Stderr, b"xy"), b"y");
        assert_eq!(passed.rest(LogStream::Stdout, b"cd"), b"d");
        assert_eq!(passed.rest(LogStream::Stdout, b"e"), b"e");
    }

    #[test]
    fn what_is_asked_for_is_passed_on() {
        let ask =
            LogAsk { tail: Some(7), since: Some(std::time::UNIX_EPOCH + Duration::from_millis(1500)), follow: true };
        assert_eq!(path("0a", &ask), "/containers/0a/logs?stdout=1&stderr=1&follow=1&tail=7&since=1.500000000");
        assert_eq!(path("0a", &LogAsk::default()), "/containers/0a/logs?stdout=1&stderr=1&follow=0&tail=all");
    }
}
