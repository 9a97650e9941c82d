//! The one table of states and verbs, for all kinds: whether a verb goes on from a state, is already so there, or is refused
//! with a reason. Asked of what is observed, never of what is remembered; every plan begins here.
//!
//! ```text
//!              start                       suspend
//!   stopped ──────────► starting ─► running ◄─────► paused
//!      ▲                               │    resume    │
//!      └────────────── stopping ◄──────┴──────────────┘ stop (paused: --force)
//! ```

use super::Verb;
use crate::error::{Code, Problem};
use crate::instance::{Observed, State};

/// What a state makes of a verb.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Goes,
    /// It goes on only where it may be hard.
    GoesHard {
        /// Why not else.
        why: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// There is nothing to do.
    Already,
    /// It is refused.
    Refused {
        /// Why.
        why: &'static str,
        /// What to do.
        hint: &'static str,
    },
}

impl State {
    /// Every state.
    pub const ALL: [State; 7] = [
        State::Running,
        State::Paused,
        State::Stopped,
        State::Starting,
        State::Stopping,
        State::Crashed,
        State::Unknown,
    ];
}

impl Verb {
    /// The verbs of the table, in the order in which it shows them. An undo is a resize.
    pub const ALL: [Verb; 7] =
        [Verb::Start, Verb::Stop, Verb::Restart, Verb::Suspend, Verb::Resume, Verb::Resize, Verb::Prepare];
}

/// The table.
pub const fn verdict(state: State, verb: Verb) -> Verdict {
    use State::{Crashed, Paused, Running, Starting, Stopped, Stopping, Unknown};
    use Verdict::{Already, Goes, GoesHard, Refused};
    const WAIT: &str = "look with `ctl show` and ask again when it is running or stopped";
    const START: &str = "`ctl start` brings it up";
    const UNSEEN: &str = "a shutdown would not be seen now and would fire when it resumes";
    match (verb, state) {
        (Verb::Prepare, _) => Goes,
        (Verb::Resize | Verb::Undo, Running | Paused | Stopped | Crashed) => Goes,

        (Verb::Start, Running | Starting) => Already,
        (Verb::Start, Stopped | Crashed) => Goes,
        (Verb::Start, Paused) => Refused { why: "it is not stopped", hint: "it has to be resumed, not started" },

        (Verb::Stop, Stopped | Crashed) => Already,
        (Verb::Stop, Paused) => GoesHard { why: UNSEEN, hint: "resume it first, or add --force to switch it off hard" },
        (Verb::Stop, Running | Starting | Stopping | Unknown) => Goes,

        (Verb::Restart, Running) => Goes,
        (Verb::Restart, Paused) => {
            GoesHard { why: UNSEEN, hint: "resume it first, or add --force to switch it off hard and start it anew" }
        }
        (Verb::Restart, Stopped | Crashed) => Refused { why: "nothing of it runs", hint: START },

        (Verb::Suspend, Running) => Goes,
        (Verb::Suspend, Paused) => Already,
        (Verb::Suspend, Stopped | Crashed) => {
            Refused { why: "nothing of it runs that could be paused", hint: "it holds no share of the host as it is" }
        }

        (Verb::Resume, Running) => Already,
        (Verb::Resume, Paused) => Goes,
        (Verb::Resume, Stopped | Crashed) => Refused { why: "it is not paused", hint: START },

        (
            Verb::Start | Verb::Restart | Verb::Suspend | Verb::Resume | Verb::Resize | Verb::Undo,
            Stopping | Unknown,
        )
        | (Verb::Restart | Verb::Suspend | Verb::Resume | Verb::Resize | Verb::Undo, Starting) => {
            Refused { why: "what comes of that has to be seen first", hint: WAIT }
        }
    }
}

/// Whether a verb goes on from the state that is observed; not where it is already so.
pub(super) fn goes(observed: &Observed, verb: Verb, hard: bool) -> Result<bool, Problem> {
    match verdict(observed.state, verb) {
        Verdict::Goes => Ok(true),
        Verdict::GoesHard { .. } if hard => Ok(true),
        Verdict::Already => Ok(false),
        Verdict::GoesHard { why, hint } | Verdict::Refused { why, hint } => {
            let (reference, state) = (&observed.reference, observed.state);
            let hint = hint.replace("`ctl start`", &format!("`ctl start {reference}`"));
            let hint = hint.replace("`ctl show`", &format!("`ctl show {reference}`"));
            Err(Problem::new(Code::InvalidState, format!("{reference} is {state}: {why}")).hint(hint))
        }
    }
}

/// The table as the README shows it.
pub fn table() -> String {
    let mut lines = vec![String::from("| |"), String::from("|---|")];
    for verb in Verb::ALL {
        lines[0] += &format!(" {verb} |");
        lines[1] += "---|";
    }
    for state in State::ALL {
        let mut line = format!("| {state} |");
        for verb in Verb::ALL {
            line += match verdict(state, verb) {
                Verdict::Goes => " yes |",
                Verdict::GoesHard { .. } => " --force |",
                Verdict::Already => " already so |",
                Verdict::Refused { .. } => " refused |",
            };
        }
        lines.push(line);
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `AGENTD_WRITE_README=1 cargo test -p agentd-core --lib readme` writes it anew.
    #[test]
    fn the_readme_shows_the_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md");
        let text = std::fs::read_to_string(path).unwrap();
        let (before, rest) = text.split_once("<!-- states -->\n").unwrap();
        let (shown, after) = rest.split_once("\n<!-- /states -->").unwrap();
        if std::env::var_os("AGENTD_WRITE_README").is_some() {
            let text = format!("{before}<!-- states -->\n{}\n<!-- /states -->{after}", table());
            std::fs::write(path, text).unwrap();
        } else {
            assert_eq!(shown, table(), "AGENTD_WRITE_README=1 writes it anew");
        }
    }

    #[test]
    fn no_state_is_without_a_way_out() {
        for state in State::ALL {
            let out = Verb::ALL.into_iter().filter(|verb| *verb != Verb::Prepare);
            let ways = out.filter(|verb| matches!(verdict(state, *verb), Verdict::Goes | Verdict::GoesHard { .. }));
            assert!(ways.count() > 0, "{state}");
        }
    }

    #[test]
    fn a_refusal_says_why_and_what_to_do() {
        for (state, verb) in State::ALL.into_iter().flat_map(|state| Verb::ALL.map(|verb| (state, verb))) {
            if let Verdict::Refused { why, hint } | Verdict::GoesHard { why, hint } = verdict(state, verb) {
                assert!(why.len() > 10 && hint.len() > 10, "{verb} {state}");
            }
        }
    }
}
