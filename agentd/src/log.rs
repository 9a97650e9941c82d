//! Where messages go: into the journal with their fields as fields, where stderr is the journal; else to stderr, a line each.
//! Names are data here, too: in the journal a message is one entry whatever is in it, and on stderr no control character begins
//! a line of its own or speaks to a terminal.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::stat::fstat;
use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// What the names of fields begin with in the journal: `journalctl AGENTD_INSTANCE=vm/web`.
const PREFIX: &str = "AGENTD";

/// Takes the process's messages from here on. `AGENTD_LOG` says which: a level, or `module=level` and the like.
pub fn init() {
    let filter = EnvFilter::try_from_env("AGENTD_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    let journal = is_the_journal(io::stderr().as_fd()).then(tracing_journald::layer).and_then(Result::ok);
    match journal {
        Some(journal) => {
            // A change that went well is no notice: those are for what somebody may want to look at.
            let priorities = PriorityMappings { info: Priority::Informational, ..PriorityMappings::new() };
            let journal = journal
                .with_field_prefix(Some(PREFIX.to_owned()))
                .with_syslog_identifier("agentd".into())
                .with_priority_mappings(priorities);
            registry.with(journal).init();
        }
        None => {
            let stderr = tracing_subscriber::fmt::layer().with_writer(|| OneLine(io::stderr())).with_ansi(false);
            registry.with(stderr).init();
        }
    }
}

/// Whether this is the stream that systemd has made to the journal: its device and inode are in `JOURNAL_STREAM`, which what a
/// service starts inherits, too (systemd.exec(5)).
fn is_the_journal(stream: BorrowedFd<'_>) -> bool {
    let told = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    fstat(stream).is_ok_and(|file| told == format!("{}:{}", file.st_dev, file.st_ino))
}

/// Writes what it is given in one go as one line.
struct OneLine<W>(W);

impl<W: Write> Write for OneLine<W> {
    fn write(&mut self, message: &[u8]) -> io::Result<usize> {
        self.0.write_all(one_line(&String::from_utf8_lossy(message)).as_bytes())?;
        Ok(message.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn one_line(message: &str) -> String {
    let (text, end) = message.strip_suffix('\n').map_or((message, ""), |text| (text, "\n"));
    let mut line = String::with_capacity(message.len());
    for c in text.chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line + end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_forges_no_line_and_speaks_to_no_terminal() {
        assert_eq!(one_line("a \n2026 ERROR b\u{1b}[2J\r\u{9b}c\n"), "a \\n2026 ERROR b\\u{1b}[2J\\r\\u{9b}c\n");
        assert_eq!(one_line("no end"), "no end");
        let mut out = Vec::new();
        assert_eq!(OneLine(&mut out).write(b"a\nb\n").unwrap(), 4);
        assert_eq!(out, b"a\\nb\n");
    }
}
