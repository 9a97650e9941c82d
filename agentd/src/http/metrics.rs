//! `GET /metrics`: the page for Prometheus, in its text format.

use agentd_core::api::ProblemDocument;
use axum::extract::{Extension, State as AxumState};
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::problem::Refusal;
use super::routes::{Need, anywhere};
use crate::engine::{Engine, Peer};

/// What Prometheus asks for: the host, the instances that the caller may see, and agentd itself.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, body = String, content_type = "text/plain"),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json")))]
pub(super) async fn metrics(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(Need(right)): Extension<Need>,
) -> Result<Response, Refusal> {
    anywhere(&engine, &peer, right)?;
    let page = engine.metrics(&peer).await;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response())
}
