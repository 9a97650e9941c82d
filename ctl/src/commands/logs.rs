//! `ctl logs`: takes a log's frames apart and hands each stream's bytes on as they come.

use std::io::{self, ErrorKind, Read};

use agentd_core::api::{LOG_HEADER, LogStream};
use serde_json::json;

use super::Context;
use crate::args::Logs;
use crate::client::{encode, instance_path};
use crate::error::Failure;
use crate::render::Report;
use crate::render::live::{Live, json_line, unwritten};

/// How much is read at once.
const PIECE: usize = 64 * 1024;
/// The longest line of a log that becomes one line of JSON; a longer one becomes several.
const LONGEST_LINE: usize = 1 << 20;
/// The status that a problem without one of its own is told under.
const SERVER_ERROR: u16 = 500;

/// How the reading of a log ended early.
#[derive(Debug)]
enum Cut {
    /// The connection broke, or what came is no log.
    Broken(io::Error),
    /// What came could not be written.
    Unwritten(io::Error),
    /// agentd says why it can't go on.
    Told(Failure),
}

/// Where a log's bytes go.
trait Sink {
    fn take(&mut self, stream: LogStream, bytes: &[u8]) -> io::Result<()>;
    fn end(&mut self) -> io::Result<()>;
}

/// Shows a log.
pub(super) fn logs(context: &Context, args: &Logs) -> Result<Report, Failure> {
    let reference = context.client.resolve(&args.of.reference)?;
    let mut query = vec![format!("follow={}", args.follow)];
    query.extend(args.tail.map(|lines| format!("tail={lines}")));
    query.extend(args.since.as_deref().map(|since| format!("since={}", encode(since))));
    let path = format!("{}/logs?{}", instance_path(&reference), query.join("&"));
    let (client, screen) = (context.client.clone(), context.screen);
    let reply = context.watch(None, move || client.stream(&path))?;
    let ended = match (screen.quiet, screen.json) {
        (true, _) => copy(reply, &mut Nowhere),
        (_, true) => copy(reply, &mut Lines::new(Live::stdout())),
        _ => copy(reply, &mut Streams { out: Live::stdout(), err: Live::stderr() }),
    };
    match ended {
        Ok(()) => Ok(Report::default()),
        Err(Cut::Told(failure)) => Err(failure),
        Err(Cut::Broken(why)) => Err(context.client.broke_off(&why)),
        Err(Cut::Unwritten(error)) => Ok(unwritten(&error)),
    }
}

/// Hands on frame after frame until the log ends.
fn copy(mut reply: impl Read, sink: &mut impl Sink) -> Result<(), Cut> {
    let copied = copy_frames(&mut reply, sink);
    // What was held back goes before what went wrong.
    let ended = sink.end().map_err(Cut::Unwritten);
    copied.and(ended)
}

fn copy_frames(reply: &mut impl Read, sink: &mut impl Sink) -> Result<(), Cut> {
    let mut piece = vec![0; PIECE];
    let mut words = Vec::new();
    while let Some((stream, length)) = header(reply).map_err(Cut::Broken)? {
        let mut left = u64::from(length);
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(PIECE).min(PIECE);
            let bytes = match reply.read(piece.get_mut(..most).unwrap_or_default()) {
                Ok(0) => return Err(Cut::Broken(ErrorKind::UnexpectedEof.into())),
                Ok(some) => piece.get(..some).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(Cut::Broken(error)),
            };
            left -= bytes.len() as u64;
            match stream {
                LogStream::Problem if words.len() < PIECE => words.extend_from_slice(bytes),
                LogStream::Problem => {}
                stream => sink.take(stream, bytes).map_err(Cut::Unwritten)?,
            }
        }
        if !words.is_empty() {
            return Err(Cut::Told(problem(&words)));
        }
    }
    Ok(())
}

/// The next header; `None` at the end of the log.
fn header(reply: &mut impl Read) -> io::Result<Option<(LogStream, u32)>> {
    let mut header = [0; LOG_HEADER];
    let mut have = 0;
    while let Some(rest) = header.get_mut(have..).filter(|rest| !rest.is_empty()) {
        match reply.read(rest) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(some) => have += some,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let read = LogStream::read(header);
    read.map(Some).ok_or_else(|| io::Error::other(format!("{header:?} begins no frame of a log")))
}

fn problem(words: &[u8]) -> Failure {
    let words = String::from_utf8_lossy(words);
    let status = serde_json::from_str::<serde_json::Value>(&words).ok().and_then(|told| told.get("status")?.as_u64());
    Failure::from_reply(status.and_then(|status| u16::try_from(status).ok()).unwrap_or(SERVER_ERROR), &words)
}

/// `-q`
struct Nowhere;

impl Sink for Nowhere {
    fn take(&mut self, _: LogStream, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn end(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Each stream to its own.
struct Streams {
    out: Live,
    err: Live,
}

impl Sink for Streams {
    fn take(&mut self, stream: LogStream, bytes: &[u8]) -> io::Result<()> {
        if stream == LogStream::Stderr { self.err.write(bytes) } else { self.out.write(bytes) }
    }

    fn end(&mut self) -> io::Result<()> {
        self.out.end().and(self.err.end())
    }
}

/// A line of JSON for each line of a stream: `{"stream":"stdout","line":"…"}`, with `"partial":true` where the line goes on in the
/// next one of its stream. What is no text is replaced.
struct Lines<W> {
    to: W,
    /// What there is of the present line of stdout and of stderr.
    open: [Vec<u8>; 2],
}

impl<W: Out> Lines<W> {
    fn new(to: W) -> Self {
        Lines { to, open: Default::default() }
    }
}

/// Where lines go.
trait Out {
    fn out(&mut self, text: &str) -> io::Result<()>;
}

impl Out for Live {
    fn out(&mut self, text: &str) -> io::Result<()> {
        self.write(text.as_bytes())
    }
}

impl<W: Out> Sink for Lines<W> {
    fn take(&mut self, stream: LogStream, bytes: &[u8]) -> io::Result<()> {
        let [out, err] = &mut self.open;
        let open = if stream == LogStream::Stderr { err } else { out };
        let mut text = String::new();
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            open.extend_from_slice(part);
            let whole = open.ends_with(b"\n");
            if whole || open.len() >= LONGEST_LINE {
                text += &line(stream, open, !whole);
                open.clear();
            }
        }
        if text.is_empty() { Ok(()) } else { self.to.out(&text) }
    }

    fn end(&mut self) -> io::Result<()> {
        for (open, stream) in self.open.iter_mut().zip([LogStream::Stdout, LogStream::Stderr]) {
            if !open.is_empty() {
                self.to.out(&line(stream, open, false))?;
                open.clear();
            }
        }
        Ok(())
    }
}

fn line(stream: LogStream, bytes: &[u8], partial: bool) -> String {
    let text = String::from_utf8_lossy(bytes.strip_suffix(b"\n").unwrap_or(bytes));
    let mut value = json!({"stream": stream, "line": text});
    if partial {
        value["partial"] = true.into();
    }
    json_line(&value)
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Out for String {
        fn out(&mut self, text: &str) -> io::Result<()> {
            self.push_str(text);
            Ok(())
        }
    }

    /// Keeps what comes.
    #[derive(Default)]
    struct Kept(Vec<(LogStream, Vec<u8>)>);

    impl Sink for Kept {
        fn take(&mut self, stream: LogStream, bytes: &[u8]) -> io::Result<()> {
            match self.0.last_mut() {
                Some((last, all)) if *last == stream => all.extend_from_slice(bytes),
                _ => self.0.push((stream, bytes.to_vec())),
            }
            Ok(())
        }

        fn end(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Gives a byte at a time.
    struct Slow<'a>(&'a [u8]);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let most = buffer.len().min(1);
            self.0.read(&mut buffer[..most])
        }
    }

    fn frame(stream: LogStream, bytes: &[u8]) -> Vec<u8> {
        [&stream.header(u32::try_from(bytes.len()).unwrap()), bytes].concat()
    }

    fn wire() -> Vec<u8> {
        let heartbeat = agentd_core::api::LOG_HEARTBEAT.to_vec();
        [
            frame(LogStream::Stdout, b"a\xff\n"),
            heartbeat,
            frame(LogStream::Stderr, b"\x1b[2J"),
            frame(LogStream::Stdout, b"b"),
        ]
        .concat()
    }

    #[test]
    fn every_byte_goes_to_its_stream_however_it_comes() {
        let expected = [
            (LogStream::Stdout, b"a\xff\n".to_vec()),
            (LogStream::Stderr, b"\x1b[2J".to_vec()),
            (LogStream::Stdout, b"b".to_vec()),
        ];
        let mut kept = Kept::default();
        assert!(copy(Slow(&wire()), &mut kept).is_ok());
        assert_eq!(kept.0, expected);
    }

    #[test]
    fn a_log_that_is_cut_is_not_taken_for_one_that_ended() {
        let wire = wire();
        for length in [1, 7, 9, wire.len() - 1] {
            assert!(matches!(copy(&wire[..length], &mut Kept::default()), Err(Cut::Broken(_))), "{length}");
        }
        assert!(matches!(copy(&b"not a log at all"[..], &mut Kept::default()), Err(Cut::Broken(_))));
    }

    #[test]
    fn what_agentd_says_at_the_end_is_the_failure() {
        let words = br#"{"status":503,"code":"backend-unavailable","detail":"docker went away"}"#;
        let wire = [frame(LogStream::Stdout, b"a"), frame(LogStream::Problem, words)].concat();
        let mut kept = Kept::default();
        let Err(Cut::Told(failure)) = copy(&wire[..], &mut kept) else { panic!("no failure") };
        assert_eq!((failure.exit, failure.detail.as_str(), kept.0.len()), (3, "docker went away", 1));
    }

    #[test]
    fn lines_of_both_streams_become_lines_of_json() {
        let wire = [
            frame(LogStream::Stdout, b"one\ntw"),
            frame(LogStream::Stderr, b"\x1b[2J\xff\n"),
            frame(LogStream::Stdout, b"o\nlast"),
        ]
        .concat();
        let mut lines = Lines::new(String::new());
        assert!(copy(&wire[..], &mut lines).is_ok());
        let told: Vec<serde_json::Value> = lines.to.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let expected = [("stdout", "one"), ("stderr", "\u{1b}[2J\u{fffd}"), ("stdout", "two"), ("stdout", "last")];
        assert_eq!(told, expected.map(|(stream, line)| json!({"stream": stream, "line": line})));
        assert!(!lines.to.contains('\u{1b}'), "nothing raw that a terminal obeys");
    }

    #[test]
    fn a_line_without_an_end_is_told_in_parts() {
        let mut lines = Lines::new(String::new());
        for _ in 0..LONGEST_LINE / PIECE + 1 {
            lines.take(LogStream::Stdout, &[b'x'; PIECE]).unwrap();
        }
        lines.end().unwrap();
        let told: Vec<serde_json::Value> = lines.to.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((told.len(), &told[0]["partial"], told[1].get("partial")), (2, &json!(true), None));
    }
}
