//! A log that is a plain file on this host: its end or all of it, and what is written to it from now on, also where it is
//! cut or another one takes its name (a rotation). Knows not who writes it.
//!
//! It is looked at a few times a second while nothing comes: that costs one system call, where inotify would tell of every
//! write to the folder, and of none on some file systems.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream;
use nix::fcntl::OFlag;

use super::{LogAsk, LogFrames, PIECE, stdout};
use crate::backend::BackendError;

/// How often a file that is followed is looked at.
const GLANCE: Duration = Duration::from_millis(200);

/// A file that is read on.
struct Reading {
    path: PathBuf,
    file: File,
    follow: bool,
    /// Whether whoever writes it is still there. What was written before is read after the answer.
    written: Box<dyn Fn() -> bool + Send>,
}

/// What a glance at the file came to.
enum Seen {
    Bytes(Bytes),
    Nothing,
    End,
}

/// Reads the file at this path, which must be a regular one: no link, no device. It is followed as long as `written` holds.
pub(in crate::backend) async fn read(
    path: PathBuf,
    ask: &LogAsk,
    written: impl Fn() -> bool + Send + 'static,
) -> Result<LogFrames, BackendError> {
    let (tail, follow) = (ask.tail, ask.follow);
    let open = move || {
        let mut file = open(&path).map_err(|error| unreadable(&path, &error))?;
        if let Some(lines) = tail {
            let start = start_of_tail(&file, lines).map_err(|error| broken(&path, &error))?;
            file.seek(SeekFrom::Start(start)).map_err(|error| broken(&path, &error))?;
        }
        Ok(Reading { path, file, follow, written: Box::new(written) })
    };
    let reading = off_thread(open).await??;
    Ok(stream::unfold(Some(reading), next).boxed())
}

/// The next piece, and what is left to read.
async fn next(reading: Option<Reading>) -> Option<(Result<Bytes, BackendError>, Option<Reading>)> {
    let mut reading = reading?;
    loop {
        let glance = move || {
            let seen = reading.glance().map_err(|error| broken(&reading.path, &error));
            (seen, reading)
        };
        let seen = match off_thread(glance).await {
            Ok((seen, back)) => {
                reading = back;
                seen
            }
            Err(error) => return Some((Err(error), None)),
        };
        match seen {
            Ok(Seen::Bytes(bytes)) => return Some((Ok(bytes), Some(reading))),
            Ok(Seen::Nothing) => tokio::time::sleep(GLANCE).await,
            Ok(Seen::End) => return None,
            Err(error) => return Some((Err(error), None)),
        }
    }
}

/// Files block.
async fn off_thread<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> Result<T, BackendError> {
    let lost = |_| BackendError::Failed("the reading of a log broke off".into());
    tokio::task::spawn_blocking(job).await.map_err(lost)
}

impl Reading {
    fn glance(&mut self) -> io::Result<Seen> {
        // In this order: what it wrote last is there once it is gone, and in the old file once there is a new one.
        let more = self.follow && (self.written)();
        let newer = if self.follow { self.newer()? } else { None };
        if let Some(bytes) = self.piece()? {
            return Ok(Seen::Bytes(bytes));
        }
        let begun_anew = match newer {
            Some(newer) => {
                self.file = newer;
                true
            }
            None => self.follow && self.file.metadata()?.len() < self.file.stream_position()?,
        };
        if begun_anew {
            self.file.rewind()?;
            if let Some(bytes) = self.piece()? {
                return Ok(Seen::Bytes(bytes));
            }
        }
        Ok(if more { Seen::Nothing } else { Seen::End })
    }

    fn piece(&mut self) -> io::Result<Option<Bytes>> {
        let mut bytes = vec![0; PIECE];
        let length = loop {
            match self.file.read(&mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => break read?,
            }
        };
        Ok(stdout(bytes.get(..length).unwrap_or_default()))
    }

    /// Another file that has its name by now. In the middle of a rotation there is none.
    fn newer(&self) -> io::Result<Option<File>> {
        match open(&self.path) {
            Ok(file) => Ok(Some(file).filter(|file| !same(file, &self.file))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn same(one: &File, other: &File) -> bool {
    let id = |file: &File| file.metadata().map(|data| (data.dev(), data.ino())).ok();
    id(one) == id(other)
}

/// Opens what must be a regular file, and waits for nobody where it is something else.
fn open(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    Ok(file)
}

/// Where the last `lines` lines begin; the last one need not have its end yet.
fn start_of_tail(file: &File, lines: u64) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let mut end = length;
    let mut left = lines;
    let mut block = vec![0; PIECE];
    if lines == 0 {
        return Ok(length);
    }
    while end > 0 {
        let start = end.saturating_sub(PIECE as u64);
        // At most PIECE.
        let block = &mut block[..usize::try_from(end - start).unwrap_or(PIECE)];
        file.read_exact_at(block, start)?;
        for (back, byte) in (1..).zip(block.iter().rev()) {
            let at = end - back;
            // The end of the last line begins no other one.
            if *byte == b'\n' && at + 1 != length {
                left -= 1;
                if left == 0 {
                    return Ok(at + 1);
                }
            }
        }
        end = start;
    }
    Ok(0)
}

fn unreadable(path: &Path, error: &io::Error) -> BackendError {
    let shown = path.display();
    BackendError::Unsupported(match error.kind() {
        io::ErrorKind::NotFound => {
            format!("its log {shown} isn't there, or not where agentd can see it (ProtectHome=)")
        }
        io::ErrorKind::PermissionDenied => format!(
            "agentd may not read its log {shown}: as root without capabilities it reads what root owns, or all may read"
        ),
        _ => format!("its log {shown} can't be opened: {error}"),
    })
}

fn broken(path: &Path, error: &io::Error) -> BackendError {
    BackendError::Failed(format!("the log {} can't be read on: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use agentd_core::api::LogStream;
    use tempfile::TempDir;

    use super::super::unframe;
    use super::*;

    struct Log {
        folder: TempDir,
        written: Arc<AtomicBool>,
    }

    impl Log {
        fn new(text: &[u8]) -> Self {
            let log = Log { folder: tempfile::tempdir().unwrap(), written: Arc::new(AtomicBool::new(true)) };
            fs::write(log.path(), text).unwrap();
            log
        }

        fn path(&self) -> PathBuf {
            self.folder.path().join("console.log")
        }

        fn append(&self, text: &str) {
            OpenOptions::new().append(true).open(self.path()).unwrap().write_all(text.as_bytes()).unwrap();
        }

        async fn read(&self, tail: Option<u64>, follow: bool) -> LogFrames {
            let written = Arc::clone(&self.written);
            let ask = LogAsk { tail, follow, since: None };
            read(self.path(), &ask, move || written.load(Ordering::Relaxed)).await.unwrap()
        }

        fn end(&self) {
            self.written.store(false, Ordering::Relaxed);
        }
    }

    /// As many bytes as these, or all where they end before.
    async fn take(frames: &mut LogFrames, length: usize) -> String {
        let mut all = Vec::new();
        while all.len() < length {
            let Some(piece) = frames.next().await else { break };
            for (stream, bytes) in unframe(&piece.unwrap()) {
                assert_eq!(stream, LogStream::Stdout);
                all.extend(bytes);
            }
        }
        String::from_utf8(all).unwrap()
    }

    #[tokio::test]
    async fn all_of_a_file_comes_and_then_the_end() {
        let text: String = (0..100_000).map(|number| format!("{number}\n")).collect();
        let log = Log::new(text.as_bytes());
        assert!(take(&mut log.read(None, false).await, usize::MAX).await == text);
        assert_eq!(take(&mut Log::new(b"").read(None, false).await, usize::MAX).await, "");
    }

    #[tokio::test]
    async fn a_tail_has_so_many_lines_wherever_they_begin() {
        for (text, lines, expected) in [
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc", 2, "b\nc"),
            ("a\nb\nc", 9, "a\nb\nc"),
            ("a\n\n\n", 2, "\n\n"),
            ("a\nb", 0, ""),
            ("", 3, ""),
            ("\n", 1, "\n"),
        ] {
            let log = Log::new(text.as_bytes());
            assert_eq!(take(&mut log.read(Some(lines), false).await, usize::MAX).await, expected, "{text:?} {lines}");
        }
        // Over the edges of blocks, with lines longer than one.
        for length in [PIECE - 1, PIECE, PIECE + 1, 3 * PIECE] {
            let text = format!("{}\n{}\n{}\n", "a".repeat(length), "b".repeat(length), "c");
            let log = Log::new(text.as_bytes());
            let expected = format!("{}\nc\n", "b".repeat(length));
            assert!(take(&mut log.read(Some(2), false).await, usize::MAX).await == expected, "{length}");
        }
    }

    #[tokio::test]
    async fn what_is_written_is_followed_until_its_writer_is_gone() {
        let log = Log::new(b"a\nb\n");
        let mut frames = log.read(Some(1), true).await;
        assert_eq!(take(&mut frames, 2).await, "b\n");
        log.append("c\n");
        assert_eq!(take(&mut frames, 2).await, "c\n");
        log.append("last words\n");
        log.end();
        assert_eq!(take(&mut frames, usize::MAX).await, "last words\n");
    }

    #[tokio::test]
    async fn a_rotation_loses_nothing_and_a_cut_begins_anew() {
        let log = Log::new(b"a\n");
        let mut frames = log.read(None, true).await;
        assert_eq!(take(&mut frames, 2).await, "a\n");
        log.append("b\n");
        fs::rename(log.path(), log.folder.path().join("console.log.0")).unwrap();
        fs::write(log.path(), "longer\n").unwrap();
        assert_eq!(take(&mut frames, 9).await, "b\nlonger\n");
        File::create(log.path()).unwrap();
        log.append("d\n");
        log.end();
        assert_eq!(take(&mut frames, usize::MAX).await, "d\n");
    }

    #[tokio::test]
    async fn only_a_regular_file_is_read() {
        let log = Log::new(b"secret\n");
        let folder = log.folder.path();
        std::os::unix::fs::symlink(log.path(), folder.join("link")).unwrap();
        nix::unistd::mkfifo(&folder.join("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for name in ["link", "pipe", ".", "missing"] {
            let error = read(folder.join(name), &LogAsk::default(), || true).await.err();
            assert!(matches!(error, Some(BackendError::Unsupported(_))), "{name}: {error:?}");
        }
    }
}
