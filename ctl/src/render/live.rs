//! What is printed while it comes: a log's bytes, line by line of an endless reply. Each piece is out before the next one is
//! asked for. Knows no replies.

use std::io::{self, ErrorKind, IsTerminal, Write};

use super::Report;
use super::harmless::Harmless;

/// A stream that bytes of unknown origin are written to: as they are, or harmless where a terminal shows them.
pub(crate) struct Live {
    to: Box<dyn Write>,
    terminal: Option<Harmless>,
}

impl Live {
    /// Standard output.
    pub(crate) fn stdout() -> Self {
        let to = io::stdout();
        Live { terminal: terminal(&to), to: Box::new(to) }
    }

    /// Standard error.
    pub(crate) fn stderr() -> Self {
        let to = io::stderr();
        Live { terminal: terminal(&to), to: Box::new(to) }
    }

    /// Writes a piece.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.terminal {
            Some(harmless) => self.to.write_all(harmless.take(bytes).as_bytes())?,
            None => self.to.write_all(bytes)?,
        }
        self.to.flush()
    }

    /// Writes what was held back for what might have followed it.
    pub(crate) fn end(&mut self) -> io::Result<()> {
        if let Some(harmless) = &mut self.terminal {
            self.to.write_all(harmless.end().as_bytes())?;
        }
        self.to.flush()
    }
}

fn terminal(to: &impl IsTerminal) -> Option<Harmless> {
    let colours = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    to.is_terminal().then(|| Harmless::new(colours))
}

/// How a command ends whose output could not be written: quietly where its reader has read enough.
pub(crate) fn unwritten(error: &io::Error) -> Report {
    match error.kind() {
        ErrorKind::BrokenPipe => Report::default(),
        _ => Report { err: format!("error: can't write the output: {error}\n"), exit: 1, ..Report::default() },
    }
}

/// One line of JSON, safe for a terminal.
pub(crate) fn json_line(value: &serde_json::Value) -> String {
    super::document(&value.to_string())
}
