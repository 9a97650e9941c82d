//! Replies: JSON for what went well, an RFC 9457 problem document for what didn't, one way each.

use agentd_core::api::ProblemDocument;
use agentd_core::error::{Code, Problem};
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::engine::Failure;

/// What every handler may end with.
#[derive(Debug)]
pub(super) struct Refusal(pub Box<Failure>);

impl<T: Into<Failure>> From<T> for Refusal {
    fn from(failure: T) -> Self {
        Refusal(Box::new(failure.into()))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Failure { problem, operation } = *self.0;
        let code = problem.code;
        let mut response = json(status(code), &document(problem, operation));
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if code.http() == 503 || code.http() == 429 {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

fn status(code: Code) -> StatusCode {
    StatusCode::from_u16(code.http()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

pub(super) fn document(problem: Problem, operation: Option<Box<agentd_core::api::OperationView>>) -> ProblemDocument {
    let code = problem.code;
    let operation = operation.map(|operation| *operation);
    let (id, outcome, steps, instance) = match operation {
        Some(view) => (view.operation, Some(view.outcome), view.steps, view.instance.map(Box::new)),
        None => (None, None, Vec::new(), None),
    };
    ProblemDocument {
        type_: format!("/problems/{code}"),
        title: code.as_str().replace('-', " "),
        status: code.http(),
        code,
        detail: problem.detail,
        hint: problem.hint,
        operation: id,
        outcome,
        steps,
        instance,
        numbers: problem.numbers.map(|numbers| *numbers).unwrap_or_default(),
    }
}

/// A JSON reply.
pub(super) fn json<T: Serialize>(status: StatusCode, value: &T) -> Response {
    match serde_json::to_vec(value) {
        Ok(mut body) => {
            body.push(b'\n');
            let content_type = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
            (status, content_type, Body::from(body)).into_response()
        }
        Err(error) => {
            tracing::error!(%error, "defect: a reply can't be written as JSON");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// Answers a connection for which there is no place, whatever it would have asked.
pub(super) async fn turn_away(mut stream: UnixStream) {
    let problem =
        Problem::new(Code::Overloaded, "there are too many connections").hint("close some, or try again in a moment");
    let body = serde_json::to_string(&document(problem, None)).unwrap_or_default();
    let reply = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/problem+json\r\ncontent-length: {}\r\n\
         retry-after: 1\r\nconnection: close\r\n\r\n{body}",
        body.len()
    );
    // A peer that doesn't read is not waited for.
    let _ = tokio::time::timeout(std::time::Duration::from_secs(1), stream.write_all(reply.as_bytes())).await;
}
