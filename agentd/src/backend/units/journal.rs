//! A unit's log: its messages in the systemd journal, as journalctl reads them. The journal's files have a format and
//! compressions of their own, and the one who knows them is on every host that keeps a journal.
//!
//! The journal keeps messages, not streams: everything is standard output here, each message with a line's end.

use std::path::Path;
use std::process::{ExitStatus, Stdio};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStderr, ChildStdout, Command};

use crate::backend::BackendError;
use crate::backend::logs::{LogAsk, LogFrames, PIECE, stdout};

/// Who reads the journal.
pub(super) const JOURNALCTL: &str = "journalctl";
/// Where a journal is: kept on disk, or until the next boot.
pub(super) const FOLDERS: [&str; 2] = ["/var/log/journal", "/run/log/journal"];
/// How much of what journalctl complains of is told.
const WORDS: u64 = 1000;

/// A journalctl that is being read from. It is killed when this is dropped.
struct Reading {
    child: Child,
    out: ChildStdout,
    err: ChildStderr,
}

/// What the journal has of a unit, whose name systemd itself has told.
pub(super) fn read(program: &str, folders: &[&str], unit: &str, ask: &LogAsk) -> Result<LogFrames, BackendError> {
    if unit.ends_with(".slice") {
        let why = format!("unit/{unit} is a slice and writes no log of its own; the units in it do");
        return Err(BackendError::Unsupported(why));
    }
    if !folders.iter().any(|folder| has_entries(Path::new(folder))) {
        let why = format!("this host keeps no journal: there is nothing in {}", folders.join(" or "));
        return Err(BackendError::Unsupported(why));
    }
    let unread =
        |why: String| BackendError::Unavailable(format!("{program}, which reads the journal, can't be run: {why}"));
    let mut command = Command::new(program);
    command.args(arguments(unit, ask)).env("LC_ALL", "C").kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| unread(error.to_string()))?;
    let (Some(out), Some(err)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(unread("it has no output".into()));
    };
    Ok(stream::unfold(Some(Reading { child, out, err }), next).boxed())
}

fn has_entries(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

/// One word each, so that a unit's name is nothing else, whatever it is.
fn arguments(unit: &str, ask: &LogAsk) -> Vec<String> {
    // `all` also keeps --follow from beginning with the last ten.
    let lines = ask.tail.map_or_else(|| "all".to_owned(), |lines| lines.to_string());
    // --all: long and unprintable messages too.
    let mut arguments: Vec<String> =
        ["--no-pager", "--quiet", "--output=cat", "--all"].map(str::to_owned).into_iter().collect();
    arguments.push(format!("--unit={unit}"));
    arguments.push(format!("--lines={lines}"));
    arguments
        .extend(ask.since_epoch().map(|since| format!("--since=@{}.{:06}", since.as_secs(), since.subsec_micros())));
    arguments.extend(ask.follow.then(|| "--follow".to_owned()));
    arguments
}

/// The next piece, and what is left to read.
async fn next(reading: Option<Reading>) -> Option<(Result<Bytes, BackendError>, Option<Reading>)> {
    let mut reading = reading?;
    let mut bytes = vec![0; PIECE];
    let failed = match reading.out.read(&mut bytes).await {
        Ok(0) => match reading.child.wait().await {
            Ok(status) if status.success() => return None,
            Ok(status) => complaint(status, reading.err).await,
            Err(error) => format!("what became of it is unknown: {error}"),
        },
        Ok(length) => {
            let piece = stdout(bytes.get(..length).unwrap_or_default())?;
            return Some((Ok(piece), Some(reading)));
        }
        Err(error) => error.to_string(),
    };
    Some((Err(BackendError::Failed(format!("journalctl did not read the journal to its end: {failed}"))), None))
}

async fn complaint(status: ExitStatus, err: ChildStderr) -> String {
    let mut words = Vec::new();
    // What can't be read is not told.
    let _ = err.take(WORDS).read_to_end(&mut words).await;
    let words = String::from_utf8_lossy(&words);
    format!("{status}: {}", words.lines().map(str::trim).collect::<Vec<_>>().join("; "))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, UNIX_EPOCH};

    use tempfile::TempDir;

    use super::*;
    use crate::backend::logs::unframe;

    /// A journalctl that is a shell script, in a folder that passes for a journal.
    fn journalctl(script: &str) -> (TempDir, String, String) {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("journalctl");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let (program, journal) = (program.to_str().unwrap().to_owned(), folder.path().to_str().unwrap().to_owned());
        (folder, program, journal)
    }

    async fn text(frames: LogFrames) -> Result<String, BackendError> {
        let pieces: Vec<_> = frames.collect().await;
        let mut text = Vec::new();
        for piece in pieces {
            text.extend(unframe(&piece?).into_iter().flat_map(|(_, bytes)| bytes));
        }
        Ok(String::from_utf8(text).unwrap())
    }

    #[tokio::test]
    async fn journalctl_is_given_one_word_for_each_thing_that_is_asked() {
        let (_folder, program, journal) = journalctl("for word; do echo \"[$word]\"; done");
        let ask = LogAsk { tail: Some(3), since: Some(UNIX_EPOCH + Duration::from_millis(1500)), follow: true };
        let told = text(read(&program, &[&journal], "a\\x2d@b.service", &ask).unwrap()).await.unwrap();
        assert_eq!(
            told,
            "[--no-pager]\n[--quiet]\n[--output=cat]\n[--all]\n[--unit=a\\x2d@b.service]\n[--lines=3]\n\
             [--since=@1.500000]\n[--follow]\n"
        );
        let told = text(read(&program, &[&journal], "a.service", &LogAsk::default()).unwrap()).await.unwrap();
        assert!(told.ends_with("[--lines=all]\n"), "{told}");
    }

    #[tokio::test]
    async fn a_journalctl_that_fails_is_told_with_its_words() {
        let (_folder, program, journal) = journalctl("echo line; echo 'Failed to open: no' >&2; exit 1");
        let mut frames = read(&program, &[&journal], "a.service", &LogAsk::default()).unwrap();
        assert!(frames.next().await.unwrap().is_ok());
        let Some(Err(BackendError::Failed(why))) = frames.next().await else { panic!("no error") };
        assert!(why.contains("exit status: 1: Failed to open: no"), "{why}");
        assert!(frames.next().await.is_none());
    }

    #[tokio::test]
    async fn a_reader_that_goes_away_ends_journalctl() {
        let (_folder, program, journal) = journalctl("echo $$; exec sleep 1000");
        let mut frames = read(&program, &[&journal], "a.service", &LogAsk::default()).unwrap();
        let first = unframe(&frames.next().await.unwrap().unwrap()).remove(0).1;
        let process = format!("/proc/{}", String::from_utf8(first).unwrap().trim());
        assert!(Path::new(&process).exists());
        drop(frames);
        while Path::new(&process).exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn a_host_without_a_journal_and_a_slice_have_no_log_and_a_missing_journalctl_is_told() {
        let (folder, program, journal) = journalctl("exit 0");
        let empty = folder.path().join("empty");
        std::fs::create_dir(&empty).unwrap();
        let ask = LogAsk::default();
        let error = |program: &str, folder: &str, unit: &str| read(program, &[folder], unit, &ask).err().unwrap();
        assert!(matches!(error(&program, empty.to_str().unwrap(), "a.service"), BackendError::Unsupported(_)));
        assert!(matches!(error(&program, &journal, "ci.slice"), BackendError::Unsupported(_)));
        assert!(matches!(error("/nowhere/journalctl", &journal, "a.service"), BackendError::Unavailable(_)));
    }
}
