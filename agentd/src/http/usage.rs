//! The routes of what instances use: they decode, ask the engine and encode.

use agentd_core::api::{ProblemDocument, UsageList, UsageView};
use agentd_core::instance::Kind;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Extension, Path, Query, State as AxumState};
use axum::http::StatusCode;
use axum::response::Response;
use serde::Deserialize;

use super::problem::{Refusal, json};
use super::routes::{Need, anywhere, decode_path, decode_query, pattern};
use crate::engine::{Engine, Peer};

/// What `GET /v1/usage` takes.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct UsageQuery {
    /// `vm`, `container` or `unit`.
    kind: Option<String>,
    /// A glob over references, or `label:KEY=VALUE`.
    #[serde(rename = "match")]
    #[param(rename = "match")]
    pattern: Option<String>,
}

/// What `GET /v1/instances/{kind}/{name}/usage` takes.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct OneQuery {
    /// Tell at once, without a rate where there is none yet.
    #[serde(default)]
    now: bool,
}

/// What one instance uses. The first time it takes a moment longer, unless `now`: a rate needs two looks.
#[utoipa::path(get, path = "/v1/instances/{kind}/{name}/usage",
    params(("kind" = Kind, Path), ("name" = String, Path, description = "one percent-encoded segment"), OneQuery), responses(
    (status = 200, body = UsageView),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
pub(super) async fn usage(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    path: Result<Path<(String, String)>, PathRejection>,
    query: Result<Query<OneQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let (target, OneQuery { now }) = (decode_path(path)?, decode_query(query)?);
    Ok(json(StatusCode::OK, &engine.usage(&peer, &target, now).await?))
}

/// What all instances use that are up, and what is in use of the host.
#[utoipa::path(get, path = "/v1/usage", params(UsageQuery), responses(
    (status = 200, body = UsageList),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
pub(super) async fn usages(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(Need(right)): Extension<Need>,
    query: Result<Query<UsageQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    anywhere(&engine, &peer, right)?;
    let query = decode_query(query)?;
    let kind = query.kind.map(|kind| kind.parse::<Kind>()).transpose()?;
    let pattern = pattern(query.pattern.as_deref())?;
    Ok(json(StatusCode::OK, &engine.usages(&peer, kind, pattern.as_ref()).await?))
}
