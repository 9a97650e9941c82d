//! What a command came to, and the one place that prints it: text for people or the API's JSON, colours on a terminal
//! only, a reader that went away borne in silence.

pub(crate) mod bar;
pub(crate) mod harmless;
pub(crate) mod history;
pub(crate) mod live;
pub(crate) mod outcome;
pub(crate) mod table;
pub(crate) mod text;
pub(crate) mod usage;

use std::io::{self, ErrorKind, Write as _};
use std::os::fd::AsFd;

use crate::error::Failure;

/// What a command has to say and its exit code.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Report {
    /// For standard output.
    pub(crate) out: String,
    /// For standard error.
    pub(crate) err: String,
    /// The exit code.
    pub(crate) exit: u8,
    /// Something was or may have been changed: the exit code says what, whatever becomes of the printing.
    pub(crate) keep_exit: bool,
}

/// Where a report goes to: JSON or text, and how wide the terminals are.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Screen {
    /// `-o json`
    pub(crate) json: bool,
    /// `-q`
    pub(crate) quiet: bool,
    /// The width of the terminal on standard output; None where it is none.
    pub(crate) out_width: Option<usize>,
    /// The same of standard error.
    pub(crate) err_width: Option<usize>,
}

impl Screen {
    /// The present one.
    pub(crate) fn new(json: bool, quiet: bool) -> Self {
        Screen { json, quiet, out_width: width(io::stdout()), err_width: err_width() }
    }

    /// A success: the API's own JSON, or text and what belongs on standard error.
    pub(crate) fn success(&self, json: &str, out: String, err: String) -> Report {
        match (self.quiet, self.json) {
            (true, _) => Report::default(),
            (_, true) => Report { out: document(json), ..Report::default() },
            _ => Report { out, err, ..Report::default() },
        }
    }

    /// A failure.
    pub(crate) fn failure(&self, failure: &Failure) -> Report {
        let exit = failure.exit;
        if self.json {
            Report { out: document(&failure.document), exit, ..Report::default() }
        } else {
            Report { err: text::failure(failure, self.err_width), exit, ..Report::default() }
        }
    }
}

/// One JSON document with one line end, safe for a terminal: what a string may carry raw and a terminal may obey is
/// written as JSON's own escape.
fn document(json: &str) -> String {
    let mut out = String::with_capacity(json.len() + 1);
    for c in json.trim_end().chars() {
        if text::is_dangerous(c) && !matches!(c, '\n' | '\t' | '\r') {
            // All of them are in the basic multilingual plane.
            out.push_str(&format!("\\u{:04x}", u32::from(c)));
        } else {
            out.push(c);
        }
    }
    out.push('\n');
    out
}

/// The width of the terminal on standard error; None where it is none.
pub(crate) fn err_width() -> Option<usize> {
    width(io::stderr())
}

fn width(stream: impl AsFd + io::IsTerminal) -> Option<usize> {
    if !stream.is_terminal() {
        return None;
    }
    let columns = rustix::termios::tcgetwinsize(stream).map_or(0, |size| usize::from(size.ws_col));
    // A terminal that doesn't know says 0; one too narrow for anything is better left to wrap by itself.
    Some(if columns == 0 { 80 } else { columns.max(20) })
}

/// Prints a report and gives the exit code.
pub(crate) fn print(report: Report) -> u8 {
    let written = emit(anstream::stdout(), &report.out);
    // There is nowhere left to say that standard error fails.
    let _ = emit(anstream::stderr(), &report.err);
    match written {
        // The reader has read enough: `ctl list | head -1` is no failure.
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            let _ = writeln!(anstream::stderr(), "error: can't write to standard output: {error}");
            if report.keep_exit || report.exit != 0 { report.exit } else { 1 }
        }
        _ => report.exit,
    }
}

fn emit(mut stream: impl io::Write, text: &str) -> io::Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    stream.write_all(text.as_bytes())?;
    stream.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_keeps_its_meaning_and_loses_what_a_terminal_obeys() {
        let said = document("{\"a\":\"x\u{9b}31m\u{7f}\u{202e}y\"}\n\n");
        assert_eq!(said, "{\"a\":\"x\\u009b31m\\u007f\\u202ey\"}\n");
        let value: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!(value["a"], "x\u{9b}31m\u{7f}\u{202e}y");
    }

    #[test]
    fn quiet_says_nothing_on_success_and_everything_on_failure() {
        let screen = Screen { quiet: true, ..Screen::default() };
        assert_eq!(screen.success("{}", "text".into(), "note".into()), Report::default());
        let failed = screen.failure(&Failure::internal("no".into()));
        assert!(failed.err.contains("error: internal: no") || failed.err.contains("internal: no"), "{failed:?}");
        assert_eq!(failed.exit, 1);
    }

    #[test]
    fn json_failures_are_the_problem_document_on_standard_output() {
        let body = r#"{"code":"not-found","detail":"there is no vm/web"}"#;
        let screen = Screen { json: true, ..Screen::default() };
        let report = screen.failure(&Failure::from_reply(404, body));
        assert_eq!((report.out.as_str(), report.err.as_str(), report.exit), (&*format!("{body}\n"), "", 6));
    }
}
