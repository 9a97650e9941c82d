//! What a backend gives of an instance's log, and how that is cut into frames (`agentd_core::api::LogStream`). Knows no engine
//! and no HTTP.
//!
//! A log may be of any size: it is a stream that is asked for its next piece when the reader has taken the one before.

pub(super) mod file;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agentd_core::api::{LOG_HEADER, LogStream};
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::BoxStream;

use super::BackendError;

/// How much is read at once; a piece with its headers is about as large.
pub(super) const PIECE: usize = 64 * 1024;

/// What of a log is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogAsk {
    /// The last so many lines; all where there is none.
    pub tail: Option<u64>,
    /// What was logged from then on.
    pub since: Option<SystemTime>,
    /// Go on with what is logged from now on.
    pub follow: bool,
}

impl LogAsk {
    /// Since when, as time since the Unix epoch.
    pub(super) fn since_epoch(&self) -> Option<Duration> {
        self.since.map(|since| since.duration_since(UNIX_EPOCH).unwrap_or_default())
    }
}

/// A log: pieces of whole frames. It ends where the log ends, or with what is wrong.
pub type LogFrames = BoxStream<'static, Result<Bytes, BackendError>>;

/// One piece in the making.
#[derive(Debug, Default)]
pub(super) struct Piece {
    bytes: BytesMut,
    /// Where the last frame begins and of which stream it is.
    last: Option<(usize, LogStream)>,
}

impl Piece {
    /// Adds bytes of a stream: to the last frame where that is of the same stream.
    pub(super) fn push(&mut self, stream: LogStream, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let begin = match self.last {
            Some((begin, last)) if last == stream => begin,
            _ => {
                self.bytes.put_slice(&stream.header(0));
                self.bytes.len() - LOG_HEADER
            }
        };
        self.bytes.put_slice(bytes);
        // A piece is about 64 KiB, so this is its length.
        let length = u32::try_from(self.bytes.len() - begin - LOG_HEADER).unwrap_or(u32::MAX);
        self.bytes[begin..begin + LOG_HEADER].copy_from_slice(&stream.header(length));
        self.last = Some((begin, stream));
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// What there is of it, where there is anything.
    pub(super) fn take(&mut self) -> Option<Bytes> {
        self.last = None;
        Some(self.bytes.split().freeze()).filter(|bytes| !bytes.is_empty())
    }
}

/// Bytes of standard output as a piece of their own.
pub(super) fn stdout(bytes: &[u8]) -> Option<Bytes> {
    let mut piece = Piece::default();
    piece.push(LogStream::Stdout, bytes);
    piece.take()
}

/// What the frames of a piece hold, for tests.
#[cfg(test)]
pub(super) fn unframe(mut piece: &[u8]) -> Vec<(LogStream, Vec<u8>)> {
    let mut frames = Vec::new();
    while !piece.is_empty() {
        let (stream, length) = LogStream::read(piece[..LOG_HEADER].try_into().unwrap()).unwrap();
        let end = LOG_HEADER + usize::try_from(length).unwrap();
        frames.push((stream, piece[LOG_HEADER..end].to_vec()));
        piece = &piece[end..];
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_one_stream_become_one_frame() {
        let mut piece = Piece::default();
        for (stream, text) in [
            (LogStream::Stdout, "a"),
            (LogStream::Stdout, "b"),
            (LogStream::Stderr, "c"),
            (LogStream::Stderr, ""),
            (LogStream::Stdout, "d"),
        ] {
            piece.push(stream, text.as_bytes());
        }
        let frames = unframe(&piece.take().unwrap());
        let expected = [(LogStream::Stdout, "ab"), (LogStream::Stderr, "c"), (LogStream::Stdout, "d")];
        assert_eq!(frames, expected.map(|(stream, text)| (stream, text.as_bytes().to_vec())));
        assert_eq!(piece.take(), None);
        piece.push(LogStream::Stdout, b"e");
        assert_eq!(
            unframe(&piece.take().unwrap()),
            [(LogStream::Stdout, b"e".to_vec())],
            "a piece begins with a header"
        );
    }
}
