//! How a command ends badly, in one form wherever it comes from: the server's problem document, or what ctl saw itself.
//! Knows the exit codes; knows no terminal.

use std::ops::Deref;

use agentd_core::api::StepView;
use agentd_core::error::{Code, Problem};
use serde::Deserialize;
use serde_json::{Value, json};

/// The exit code of what ctl could not reach.
const UNREACHABLE_EXIT: u8 = 3;
/// The exit code of an outcome that nobody knows.
const UNKNOWN_EXIT: u8 = 7;

/// Why a command ended badly. Boxed, because every result carries room for it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Failure(Box<Parts>);

/// What there is to say about a failure.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Parts {
    /// The code in words.
    pub(crate) code: String,
    /// What happened.
    pub(crate) detail: String,
    /// What to do next.
    pub(crate) hint: Option<String>,
    /// The operation, where there is one.
    pub(crate) operation: Option<String>,
    /// How the operation ended.
    pub(crate) outcome: Option<String>,
    /// The operation's steps.
    pub(crate) steps: Vec<StepView>,
    /// What ctl exits with.
    pub(crate) exit: u8,
    /// The problem document, for `-o json`.
    pub(crate) document: String,
}

impl Deref for Failure {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// What ctl reads of a problem document: less than it can have, so that a newer server's is understood too.
#[derive(Deserialize)]
struct Told {
    code: String,
    detail: String,
    #[serde(default)]
    hint: Option<String>,
    #[serde(default)]
    operation: Option<String>,
    #[serde(default)]
    outcome: Option<String>,
    /// As JSON: a step that ctl can't read must not hide the rest.
    #[serde(default)]
    steps: Vec<Value>,
}

impl Failure {
    /// The code of what ctl could not reach.
    pub(crate) const UNREACHABLE: &'static str = "unreachable";

    /// From a reply that isn't a success.
    pub(crate) fn from_reply(status: u16, body: &str) -> Self {
        let Ok(told) = serde_json::from_str::<Told>(body) else {
            let start: String = body.chars().take(200).collect();
            return Failure::internal(format!("agentd answered with status {status} and no problem document: {start}"));
        };
        Failure(Box::new(Parts {
            exit: exit_of(&told.code, status),
            code: told.code,
            detail: told.detail,
            hint: told.hint,
            operation: told.operation,
            outcome: told.outcome,
            steps: told.steps.into_iter().filter_map(|step| serde_json::from_value(step).ok()).collect(),
            document: body.to_owned(),
        }))
    }

    /// Nobody answers at the socket.
    pub(crate) fn unreachable(detail: String, hint: String) -> Self {
        Failure::local(Failure::UNREACHABLE, UNREACHABLE_EXIT, detail, Some(hint))
    }

    /// Whether trying again may help: agentd is away, or has too much to do.
    pub(crate) fn may_pass(&self) -> bool {
        self.exit == UNREACHABLE_EXIT
    }

    /// The socket itself is not for this user. Trying again won't help, so it is not `unreachable`.
    pub(crate) fn not_permitted(detail: String, hint: String) -> Self {
        Failure::local(Code::Forbidden.as_str(), Code::Forbidden.exit(), detail, Some(hint))
    }

    /// What was typed can't be meant.
    pub(crate) fn usage(detail: String, hint: String) -> Self {
        Failure::local(Code::InvalidRequest.as_str(), Code::InvalidRequest.exit(), detail, Some(hint))
    }

    /// A change was sent, and what became of it could not be heard.
    pub(crate) fn outcome_unknown(detail: String, hint: String) -> Self {
        Failure::local("outcome-unknown", UNKNOWN_EXIT, detail, Some(hint))
    }

    /// The server said what can't be understood.
    pub(crate) fn internal(detail: String) -> Self {
        let hint = format!("this is ctl {}; `ctl health` shows agentd's version", env!("CARGO_PKG_VERSION"));
        Failure::local(Code::Internal.as_str(), Code::Internal.exit(), detail, Some(hint))
    }

    /// A file of this side can't be written.
    pub(crate) fn unwritable(detail: String) -> Self {
        let hint = "name a file in a folder that is there and that you may write".to_owned();
        Failure::local(Code::Internal.as_str(), Code::Internal.exit(), detail, Some(hint))
    }

    fn local(code: &str, exit: u8, detail: String, hint: Option<String>) -> Self {
        let document = document(code, None, &detail, hint.as_deref());
        let (code, steps) = (code.to_owned(), Vec::new());
        Failure(Box::new(Parts { code, detail, hint, operation: None, outcome: None, steps, exit, document }))
    }
}

/// What ctl found wrong by itself, in the server's form.
impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        let code = problem.code;
        let document = document(code.as_str(), Some(code.http()), &problem.detail, problem.hint.as_deref());
        let mut failure = Failure::local(code.as_str(), code.exit(), problem.detail, problem.hint);
        failure.0.document = document;
        failure
    }
}

/// A problem document in the server's form; without a status where no HTTP was spoken.
fn document(code: &str, status: Option<u16>, detail: &str, hint: Option<&str>) -> String {
    let mut members = json!({"type": format!("/problems/{code}"), "title": code.replace('-', " "), "code": code,
        "detail": detail});
    if let Some(status) = status {
        members["status"] = status.into();
    }
    if let Some(hint) = hint {
        members["hint"] = hint.into();
    }
    members.to_string()
}

/// The exit code of an error code; of one that ctl doesn't know yet, that of the first with the same HTTP status.
fn exit_of(code: &str, status: u16) -> u8 {
    let known = Code::ALL.iter().find(|known| known.as_str() == code);
    let alike = || Code::ALL.iter().find(|known| known.http() == status);
    known.or_else(alike).map_or(Code::Internal.exit(), |code| code.exit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_table_gives_its_exit_code() {
        for code in Code::ALL {
            let body = json!({"type": "/problems/x", "status": code.http(), "code": code, "detail": "d", "new": 1})
                .to_string();
            let failure = Failure::from_reply(code.http(), &body);
            assert_eq!(failure.exit, code.exit(), "{code}");
            assert_eq!(failure.document, body);
        }
    }

    #[test]
    fn a_code_of_a_newer_server_exits_as_its_status_says() {
        assert_eq!(Failure::from_reply(503, r#"{"code":"melted","detail":"d"}"#).exit, 3);
        assert_eq!(Failure::from_reply(418, r#"{"code":"teapot","detail":"d"}"#).exit, 1);
    }

    #[test]
    fn a_reply_without_a_problem_document_is_told_with_its_beginning() {
        let failure = Failure::from_reply(502, "<html>bad gateway");
        assert_eq!(failure.exit, 1);
        assert!(failure.detail.contains("status 502") && failure.detail.contains("<html>bad"), "{failure:?}");
    }

    #[test]
    fn a_step_that_is_not_understood_does_not_hide_the_problem() {
        let body = r#"{"code":"backend-failed","detail":"d","outcome":"rolled-back",
            "steps":[{"what":"a","undo":null,"state":"undone"},{"what":"b","undo":null,"state":"melted"}]}"#;
        let failure = Failure::from_reply(500, body);
        assert_eq!((failure.exit, failure.steps.len()), (1, 1));
    }
}
