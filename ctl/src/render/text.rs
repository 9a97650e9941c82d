//! Sentences: what came from elsewhere made safe, lines wrapped, failures in their form. Knows no replies.

use agentd_core::api::StepView;
use agentd_core::operation::StepState;
use clap::builder::styling::{AnsiColor, Style};
use textwrap::Options;

use crate::error::Failure;

const ERROR: Style = AnsiColor::Red.on_default().bold();
/// What is wrong without being the command's failure.
pub(crate) const WARNING: Style = AnsiColor::Yellow.on_default().bold();
const HINT: Style = AnsiColor::Cyan.on_default();

/// What a terminal may obey, or what turns the order of a line about: control characters and Unicode's marks of
/// direction and line.
pub(crate) fn is_dangerous(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A text from elsewhere, with what a terminal may obey written out.
pub(crate) fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_dangerous(c) { out.extend(c.escape_default()) } else { out.push(c) }
    }
    out
}

/// A paragraph, wrapped to the width where there is one, with a line end.
pub(crate) fn paragraph(text: &str, rest_indent: usize, width: Option<usize>) -> String {
    let Some(width) = width else { return format!("{text}\n") };
    let indent = " ".repeat(rest_indent);
    // Words stay whole: they are names and commands that somebody may copy.
    let options = Options::new(width).subsequent_indent(&indent).break_words(false);
    let mut out = textwrap::wrap(text, options).join("\n");
    out.push('\n');
    out
}

/// `error: CODE: detail`, the hint, and for a change that failed what became of its steps.
pub(crate) fn failure(failure: &Failure, width: Option<usize>) -> String {
    let head = format!("{ERROR}error:{ERROR:#} {}: {}", clean(&failure.code), clean(&failure.detail));
    let mut out = paragraph(&head, "error: ".len(), width);
    if let Some(hint) = &failure.hint {
        out += &paragraph(&format!("  {HINT}hint:{HINT:#} {}", clean(hint)), "  hint: ".len(), width);
    }
    if let Some(operation) = &failure.operation {
        let outcome = failure.outcome.as_deref().map(|outcome| format!(": {}", clean(outcome))).unwrap_or_default();
        out += &format!("  operation {}{outcome}\n", clean(operation));
    }
    out + &steps_with_states(&failure.steps, width)
}

/// Steps, each with where it is.
fn steps_with_states(steps: &[StepView], width: Option<usize>) -> String {
    let state_width = steps.iter().map(|step| state(step.state).len()).max().unwrap_or(0);
    let mut out = String::new();
    for (step, number) in steps.iter().zip(1_usize..) {
        let error = step.error.as_deref().map(|error| format!(": {}", clean(error))).unwrap_or_default();
        let line = format!("  {number}. {:state_width$}  {}{error}", state(step.state), clean(&step.what));
        out += &paragraph(&line, state_width + 7, width);
    }
    out
}

/// Numbered steps with what would take each back.
pub(crate) fn plan(steps: &[StepView], width: Option<usize>) -> String {
    let mut out = String::new();
    for (step, number) in steps.iter().zip(1_usize..) {
        let undo = step.undo.as_deref().map_or_else(|| "none".to_owned(), clean);
        out += &paragraph(&format!("  {number}. {}", clean(&step.what)), 5, width);
        out += &paragraph(&format!("     undo: {undo}"), 11, width);
    }
    out
}

const fn state(state: StepState) -> &'static str {
    match state {
        StepState::Planned => "not begun",
        StepState::Doing => "under way",
        StepState::Done => "done",
        StepState::Pending => "pending",
        StepState::Skipped => "skipped",
        StepState::Failed => "failed",
        StepState::Undoing => "being undone",
        StepState::Undone => "undone",
        StepState::UndoFailed => "undo failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(text: &str) -> String {
        anstream::adapter::strip_str(text).to_string()
    }

    #[test]
    fn what_a_terminal_would_obey_is_written_out() {
        assert_eq!(clean("a\u{1b}[31mb\r\nc\u{9b}d\u{202e}é"), "a\\u{1b}[31mb\\r\\nc\\u{9b}d\\u{202e}é");
    }

    #[test]
    fn a_refusal_reads_as_the_design_shows_it() {
        let body = r#"{"code":"capacity-exceeded","hint":"the most vm/web can have now is 10 CPUs","detail":
"the host allows 60 CPUs ((32 − 2 reserved) × 2.0, [capacity] cpu_overcommit), 54 are committed, vm/web asks for 60 more"}"#;
        let refused = Failure::from_reply(429, body);
        assert_eq!(
            plain(&failure(&refused, Some(114))),
            "\
error: capacity-exceeded: the host allows 60 CPUs ((32 − 2 reserved) × 2.0, [capacity] cpu_overcommit), 54 are
       committed, vm/web asks for 60 more
  hint: the most vm/web can have now is 10 CPUs
"
        );
        assert_eq!(failure(&refused, None).lines().count(), 2, "not wrapped where nobody looks");
    }

    #[test]
    fn a_change_that_was_undone_shows_its_steps() {
        let body = r#"{"code":"backend-failed","detail":"libvirt refused","operation":"01J","outcome":"rolled-back","steps":[
            {"what":"libvirt setMemory saved 8 GiB","undo":"x","state":"undone"},
            {"what":"libvirt setMemory live 8 GiB","undo":"x","state":"failed","error":"no\nroom"},
            {"what":"libvirt setVcpus live 4","undo":"x","state":"planned"}]}"#;
        assert_eq!(
            plain(&failure(&Failure::from_reply(500, body), None)),
            "\
error: backend-failed: libvirt refused
  operation 01J: rolled-back
  1. undone     libvirt setMemory saved 8 GiB
  2. failed     libvirt setMemory live 8 GiB: no\\nroom
  3. not begun  libvirt setVcpus live 4
"
        );
    }
}
