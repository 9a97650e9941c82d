//! How bollard's requests reach the engine: a connection for each over the engine's socket, which gives no more than a bounded
//! number of bytes. bollard itself reads an answer whole, however long the engine makes it.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bollard::BollardRequest;
use bollard::errors::Error;
use hyper::Response;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{HOST, HeaderValue};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;

/// The longest answer. A listing of 10,000 containers is some 20 MB.
pub(super) const ANSWER: usize = 64 << 20;
/// The most of announcements before they are asked for anew: some thousands. bollard looks through a line from its beginning
/// each time that more of it has come, which takes minutes of an endless one.
pub(super) const ANNOUNCED: usize = 4 << 20;

/// Sends a request over a connection of its own, which ends with its answer, and at the latest after so many bytes of it.
pub(super) async fn send(socket: PathBuf, most: usize, request: BollardRequest) -> Result<Response<Incoming>, Error> {
    let stream = UnixStream::connect(&socket).await.map_err(unheard)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(Bounded { stream, most, left: most })).await?;
    // How it ends shows in the answer.
    tokio::spawn(async move { drop(connection.await) });
    let (mut parts, body) = request.into_parts();
    parts.uri = parts.uri.path_and_query().map_or_else(|| "/".parse(), |path| path.as_str().parse())?;
    parts.headers.insert(HOST, HeaderValue::from_static("docker"));
    Ok(sender.send_request(BollardRequest::from_parts(parts, body)).await?)
}

/// A connection that was never made: nobody has heard anything.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct Unheard(io::Error);

fn unheard(error: io::Error) -> Error {
    Error::IOError { err: io::Error::new(error.kind(), Unheard(error)) }
}

/// Whether this is of a connection that was never made.
pub(super) fn is_unheard(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Unheard>())
}

/// A stream of which no more than so many bytes are read.
struct Bounded {
    stream: UnixStream,
    most: usize,
    left: usize,
}

impl AsyncRead for Bounded {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.left == 0 {
            let why = format!("more than {} MiB came", self.most >> 20);
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, why)));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        self.left = self.left.saturating_sub(buf.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
