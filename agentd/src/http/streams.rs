//! Replies that go on: a body of chunks that come when they come. Streams are few, take no more than their reader does, and
//! end when either side goes away. Knows not what is in them.
//!
//! Nothing is queued here: a chunk is asked for when the socket takes one, so who makes them waits for the reader, and of a
//! reader that takes nothing `patience.rs` has had enough at some time. hyper hears of a client that hangs up also while
//! there is nothing to send, and drops the body; with it go the producer and the place.

use std::io;
use std::time::Duration;

use agentd_core::error::{Code, Problem};
use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use tokio::sync::watch;

use super::crowd::{Bounds, Crowd, Place};

/// Streams at once. Each has a connection, and of those three quarters are left for questions and changes.
const STREAMS: Bounds = Bounds { all: 32, a_uid: 4, roots: 4 };
/// How long a stream may be silent. A client that has sent more than its request is heard of only when it is written to, and
/// an `ssh` in between learns that there is still somebody.
const SILENCE: Duration = Duration::from_secs(15);

/// The streams of a server, an extension of each request. Clones share one count.
#[derive(Debug, Clone)]
pub(super) struct Streams {
    crowd: Crowd,
    stop: watch::Receiver<bool>,
}

/// A place for one stream.
#[derive(Debug)]
pub(super) struct Admitted {
    place: Place,
    stop: watch::Receiver<bool>,
}

impl Streams {
    pub(super) fn new(stop: watch::Receiver<bool>) -> Self {
        Streams { crowd: Crowd::new(STREAMS), stop }
    }

    /// A place, to be had before anything is asked of an engine.
    pub(super) fn admit(&self, uid: u32) -> Result<Admitted, Problem> {
        match self.crowd.enter(uid) {
            Some(place) => Ok(Admitted { place, stop: self.stop.clone() }),
            None => Err(Problem::new(
                Code::Overloaded,
                format!(
                    "too many streams are open: uid {uid} may have {}, all callers together {}",
                    if uid == 0 { STREAMS.all } else { STREAMS.a_uid },
                    STREAMS.all
                ),
            )
            .hint("end one that follows logs or events")),
        }
    }
}

/// What one stream is at a moment.
struct Open {
    chunks: BoxStream<'static, Bytes>,
    heartbeat: Bytes,
    stop: watch::Receiver<bool>,
    /// Given back when the body is dropped.
    _place: Place,
}

impl Admitted {
    /// The reply. Chunks should not be much larger than 64 KiB. `heartbeat` is sent into a silence and must mean nothing in
    /// this media type. The end of `chunks` is the end of the reply; the end of the daemon breaks it off, which a client can tell
    /// apart.
    pub(super) fn reply(
        self,
        media_type: &'static str,
        heartbeat: &'static [u8],
        chunks: impl Stream<Item = Bytes> + Send + 'static,
    ) -> Response {
        let open = Open {
            chunks: chunks.boxed(),
            heartbeat: Bytes::from_static(heartbeat),
            stop: self.stop,
            _place: self.place,
        };
        let body = Body::from_stream(stream::unfold(Some(open), next));
        ([(header::CONTENT_TYPE, HeaderValue::from_static(media_type))], body).into_response()
    }
}

/// The next chunk, and what is left of the stream.
async fn next(open: Option<Open>) -> Option<(io::Result<Bytes>, Option<Open>)> {
    let mut open = open?;
    let chunk = tokio::select! {
        // An error, too, is the end of the daemon.
        _ = open.stop.wait_for(|stop| *stop) => return Some((Err(io::Error::other("agentd stops")), None)),
        chunk = open.chunks.next() => chunk?,
        () = tokio::time::sleep(SILENCE) => open.heartbeat.clone(),
    };
    Some((Ok(chunk), Some(open)))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use http_body_util::BodyExt;
    use hyper::server::conn::http1;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;
    use tokio::sync::oneshot;
    use tokio::time::Instant;

    use super::*;

    const UID: u32 = 7;

    fn streams() -> (watch::Sender<bool>, Streams) {
        let (stop, stopped) = watch::channel(false);
        (stop, Streams::new(stopped))
    }

    /// A stream that says one thing and then nothing, and what tells when it is dropped.
    fn silent_after(first: &'static str) -> (impl Stream<Item = Bytes> + Send, oneshot::Receiver<()>) {
        let (held, dropped) = oneshot::channel::<()>();
        let silence = stream::pending::<Bytes>().map(move |chunk| {
            let _held = &held;
            chunk
        });
        (stream::iter([Bytes::from_static(first.as_bytes())]).chain(silence), dropped)
    }

    #[tokio::test(start_paused = true)]
    async fn a_silence_is_broken_by_the_heartbeat() {
        let (_stop, streams) = streams();
        let reply = streams.admit(UID).unwrap().reply("text/plain", b":", stream::pending());
        let mut body = reply.into_body();
        let begun = Instant::now();
        for number in 1..=3 {
            let frame = body.frame().await.unwrap().unwrap().into_data().unwrap();
            assert_eq!((frame.as_ref(), begun.elapsed()), (b":".as_slice(), SILENCE * number));
        }
    }

    #[tokio::test]
    async fn a_stream_ends_with_its_chunks_and_is_broken_off_with_the_daemon() {
        let (stop, streams) = streams();
        let chunks = || stream::iter(["a", "b"].map(|text| Bytes::from_static(text.as_bytes())));
        let reply = streams.admit(UID).unwrap().reply("text/plain", b"", chunks());
        assert_eq!(reply.into_body().collect().await.unwrap().to_bytes(), "ab");
        let reply = streams.admit(UID).unwrap().reply("text/plain", b"", stream::pending());
        stop.send(true).unwrap();
        assert!(reply.into_body().collect().await.is_err());
    }

    #[tokio::test]
    async fn one_stream_too_many_is_refused_until_another_ends() {
        let (_stop, streams) = streams();
        let open = |_| streams.admit(UID).unwrap().reply("text/plain", b"", stream::pending());
        let mut replies: Vec<_> = (0..STREAMS.a_uid).map(open).collect();
        let refused = streams.admit(UID).unwrap_err();
        assert_eq!(refused.code, Code::Overloaded);
        assert!(refused.detail.contains("uid 7 may have 4"), "{refused}");
        assert!(streams.admit(0).is_ok());
        replies.pop();
        assert!(streams.admit(UID).is_ok());
    }

    #[tokio::test]
    async fn a_client_that_hangs_up_is_heard_of_while_nothing_is_sent() {
        let (_stop, streams) = streams();
        let (mut client, server) = UnixStream::pair().unwrap();
        let (chunks, dropped) = silent_after("first");
        let reply = Mutex::new(Some(streams.admit(UID).unwrap().reply("text/plain", b"", chunks)));
        let answer = service_fn(move |_| std::future::ready(reply.lock().unwrap().take().ok_or("asked twice")));
        let connection = http1::Builder::new().serve_connection(TokioIo::new(server), answer);
        let served = tokio::spawn(connection);
        client.write_all(b"GET / HTTP/1.1\r\nhost: agentd\r\n\r\n").await.unwrap();
        let mut said = Vec::new();
        while !said.ends_with(b"first\r\n") {
            assert_ne!(client.read_buf(&mut said).await.unwrap(), 0);
        }
        drop(client);
        assert!(dropped.await.is_err(), "the producer is dropped");
        assert!(served.await.unwrap().is_err());
    }
}
