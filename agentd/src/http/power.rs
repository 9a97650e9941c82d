//! The routes of the verbs that change whether an instance runs.

use agentd_core::api::{OperationView, ProblemDocument, StartRequest, StopRequest, SuspendRequest};
use agentd_core::error::{Code, Problem};
use agentd_core::instance::Kind;
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, State as AxumState};
use axum::http::HeaderMap;
use axum::response::Response;

use super::body::Json;
use super::problem::Refusal;
use super::routes::{Need, change, decode_path, duration};
use crate::engine::{Engine, Peer, Wish};

/// The longest reason, in characters.
const LONGEST_REASON: usize = 500;

/// Stops one instance: gracefully, then, only where `force` says so, hard.
#[utoipa::path(post, path = "/v1/instances/{kind}/{name}/stop",
    params(("kind" = Kind, Path), ("name" = String, Path), ("If-Match" = Option<String>, Header),
        ("Idempotency-Key" = Option<String>, Header), ("Prefer" = Option<String>, Header)),
    request_body = Option<StopRequest>, responses(
    (status = 200, body = OperationView), (status = 202, body = OperationView),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
pub(super) async fn stop(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(Need(right)): Extension<Need>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
    body: Json<StopRequest>,
) -> Result<Response, Refusal> {
    let target = decode_path(path)?;
    let timeout = duration("timeout", body.value.timeout.as_deref())?;
    let wish = Wish::Stop { timeout, force: body.value.force };
    change(engine, peer, right, target, wish, body.value.dry_run, &headers, "stop", &body.text).await
}

/// Starts one instance, where the caps allow it.
#[utoipa::path(post, path = "/v1/instances/{kind}/{name}/start",
    params(("kind" = Kind, Path), ("name" = String, Path), ("If-Match" = Option<String>, Header),
        ("Idempotency-Key" = Option<String>, Header), ("Prefer" = Option<String>, Header)),
    request_body = Option<StartRequest>, responses(
    (status = 200, body = OperationView), (status = 202, body = OperationView),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
pub(super) async fn start(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(Need(right)): Extension<Need>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
    body: Json<StartRequest>,
) -> Result<Response, Refusal> {
    let target = decode_path(path)?;
    change(engine, peer, right, target, Wish::Start, body.value.dry_run, &headers, "start", &body.text).await
}

/// Brings one instance down, as a stop does, and up again.
#[utoipa::path(post, path = "/v1/instances/{kind}/{name}/restart",
    params(("kind" = Kind, Path), ("name" = String, Path), ("If-Match" = Option<String>, Header),
        ("Idempotency-Key" = Option<String>, Header), ("Prefer" = Option<String>, Header)),
    request_body = Option<StopRequest>, responses(
    (status = 200, body = OperationView), (status = 202, body = OperationView),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
pub(super) async fn restart(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(Need(right)): Extension<Need>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
    body: Json<StopRequest>,
) -> Result<Response, Refusal> {
    let target = decode_path(path)?;
    let timeout = duration("timeout", body.value.timeout.as_deref())?;
    let wish = Wish::Restart { timeout, force: body.value.force };
    change(engine, peer, right, target, wish, body.value.dry_run, &headers, "restart", &body.text).await
}

/// Pauses one instance and holds it: nothing but a stop or a resume is done to it.
#[utoipa::path(post, path = "/v1/instances/{kind}/{name}/suspend",
    params(("kind" = Kind, Path), ("name" = String, Path), ("If-Match" = Option<String>, Header),
        ("Idempotency-Key" = Option<String>, Header), ("Prefer" = Option<String>, Header)),
    request_body = SuspendRequest, responses(
    (status = 200, body = OperationView), (status = 202, body = OperationView),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
pub(super) async fn suspend(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(Need(right)): Extension<Need>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
    body: Json<SuspendRequest>,
) -> Result<Response, Refusal> {
    let target = decode_path(path)?;
    let wish = Wish::Suspend { reason: reason(&body.value.reason)? };
    change(engine, peer, right, target, wish, body.value.dry_run, &headers, "suspend", &body.text).await
}

/// Lifts the hold of a suspended instance and puts back the state of before.
#[utoipa::path(post, path = "/v1/instances/{kind}/{name}/resume",
    params(("kind" = Kind, Path), ("name" = String, Path), ("If-Match" = Option<String>, Header),
        ("Idempotency-Key" = Option<String>, Header), ("Prefer" = Option<String>, Header)),
    request_body = Option<StartRequest>, responses(
    (status = 200, body = OperationView), (status = 202, body = OperationView),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
pub(super) async fn resume(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(Need(right)): Extension<Need>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
    body: Json<StartRequest>,
) -> Result<Response, Refusal> {
    let target = decode_path(path)?;
    let wish = Wish::Resume;
    change(engine, peer, right, target, wish, body.value.dry_run, &headers, "resume", &body.text).await
}

/// A reason is for people, in one line.
fn reason(text: &str) -> Result<String, Problem> {
    let text = text.trim();
    let length = text.chars().count();
    if (1..=LONGEST_REASON).contains(&length) && !text.chars().any(char::is_control) {
        return Ok(text.to_owned());
    }
    let detail = format!("reason has {length} characters; 1 to {LONGEST_REASON} in one line are wanted");
    Err(Problem::new(Code::InvalidRequest, detail).hint("say why it is suspended, for those who find it so"))
}
