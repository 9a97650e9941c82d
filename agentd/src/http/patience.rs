//! A connection to somebody who may stop reading: a write that makes no progress for too long ends it, and much sooner while
//! the daemon stops. Knows no HTTP.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio::time::sleep;

/// How long a reader may take nothing: as long as somebody looks at one page of `ctl logs -f web | less`. What is kept for it
/// meanwhile is bounded, and so is the number of those like it.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);
/// The same while the daemon stops, and waits for this.
pub(super) const WHILE_STOPPING: Duration = Duration::from_secs(2);

/// A stream whose writes don't wait for ever.
pub(super) struct Patient<S> {
    stream: S,
    stop: watch::Receiver<bool>,
    /// Ends when the write under way has waited for long enough.
    waited: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl<S> Patient<S> {
    pub(super) fn new(stream: S, stop: watch::Receiver<bool>) -> Self {
        Patient { stream, stop, waited: None }
    }

    /// What a write came to, or that it has waited for too long.
    fn bounded(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.waited = None;
            return written;
        }
        let waited = self.waited.get_or_insert_with(|| Box::pin(too_long(self.stop.clone())));
        ready!(waited.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the reader takes nothing")))
    }
}

async fn too_long(mut stop: watch::Receiver<bool>) {
    let stopping = async {
        // Where nobody is left who could say so, the daemon stops too.
        let _ = stop.wait_for(|stop| *stop).await;
        sleep(WHILE_STOPPING).await;
    };
    tokio::select! {
        () = sleep(PATIENCE) => {}
        () = stopping => {}
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.bounded(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.bounded(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    // A Unix socket has nothing to flush and shuts down at once.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::{Instant, timeout};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_takes_nothing_is_given_up_and_a_slow_one_is_not() {
        let (ours, mut theirs) = tokio::io::duplex(16);
        let (_stop, stopped) = watch::channel(false);
        let mut ours = Patient::new(ours, stopped);
        let begun = Instant::now();
        let reader = async {
            let mut some = [0; 16];
            for _ in 0..3 {
                sleep(PATIENCE.mul_f64(0.9)).await;
                theirs.read_exact(&mut some).await.unwrap();
            }
            std::future::pending::<()>().await;
        };
        let written = async { ours.write_all(&[7; 1000]).await };
        let error = tokio::select! { written = written => written.unwrap_err(), () = reader => unreachable!() };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed().as_secs(), PATIENCE.mul_f64(0.9 * 3.0 + 1.0).as_secs());
    }

    #[tokio::test(start_paused = true)]
    async fn a_daemon_that_stops_has_little_patience() {
        let (ours, _theirs) = tokio::io::duplex(16);
        let (stop, stopped) = watch::channel(false);
        let mut ours = Patient::new(ours, stopped);
        let mut written = std::pin::pin!(ours.write_all(&[7; 1000]));
        assert!(timeout(PATIENCE / 2, &mut written).await.is_err());
        stop.send(true).unwrap();
        let begun = Instant::now();
        assert!(written.await.is_err());
        assert_eq!(begun.elapsed().as_secs(), WHILE_STOPPING.as_secs());
    }
}
