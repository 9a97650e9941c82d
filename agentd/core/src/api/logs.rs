//! A log on the wire: frames, so that stdout and stderr stay apart and every byte stays what it is. The layout is that of
//! Docker's multiplexed streams: one byte that says which stream, three of zero, the length of what follows as a big-endian
//! 32-bit number, and then that many bytes. Where a frame ends means nothing: a line may go on in the next one of its stream.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The media type of a log.
pub const LOG_MEDIA_TYPE: &str = "application/vnd.agentd.logs";
/// The length of what is before each frame's bytes.
pub const LOG_HEADER: usize = 8;
/// A frame that says nothing: something to send while there is no log.
pub const LOG_HEARTBEAT: [u8; LOG_HEADER] = LogStream::Problem.header(0);

/// What the bytes of a frame are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogStream {
    /// What was written to standard output, and all of a log that knows no streams (a terminal's, a journal's, a console's).
    Stdout,
    /// What was written to standard error.
    Stderr,
    /// No log: the problem document that says why the log can't go on. The last frame, but for empty ones, which mean nothing.
    Problem,
}

impl LogStream {
    /// What goes before this many bytes of the stream.
    pub const fn header(self, length: u32) -> [u8; LOG_HEADER] {
        let [a, b, c, d] = length.to_be_bytes();
        let stream = match self {
            LogStream::Stdout => 1,
            LogStream::Stderr => 2,
            LogStream::Problem => 3,
        };
        [stream, 0, 0, 0, a, b, c, d]
    }

    /// The stream and the number of bytes that a header announces; `None` where it is none.
    pub const fn read(header: [u8; LOG_HEADER]) -> Option<(Self, u32)> {
        let [stream, 0, 0, 0, a, b, c, d] = header else { return None };
        let stream = match stream {
            // 0 is what Docker calls stdin: what an attached terminal was sent, in the order of its output.
            0 | 1 => LogStream::Stdout,
            2 => LogStream::Stderr,
            3 => LogStream::Problem,
            _ => return None,
        };
        Some((stream, u32::from_be_bytes([a, b, c, d])))
    }
}

impl fmt::Display for LogStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LogStream::Stdout => "stdout",
            LogStream::Stderr => "stderr",
            LogStream::Problem => "problem",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written() {
        for stream in [LogStream::Stdout, LogStream::Stderr, LogStream::Problem] {
            for length in [0, 1, 0x0102_0304, u32::MAX] {
                assert_eq!(LogStream::read(stream.header(length)), Some((stream, length)));
            }
        }
        assert_eq!(LogStream::Stderr.header(0x0102_0304), [2, 0, 0, 0, 1, 2, 3, 4]);
    }

    #[test]
    fn what_is_no_header_is_not_taken_for_one() {
        for header in [[4, 0, 0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0, 0, 1], [1, 0, 0, 9, 0, 0, 0, 1], *b"a line\n "] {
            assert_eq!(LogStream::read(header), None);
        }
    }
}
