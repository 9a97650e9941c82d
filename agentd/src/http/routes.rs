//! The routes of the API: one table that shows for each what it needs and what it does, and the handlers, which decode,
//! ask the engine and encode. Nothing is decided here.

use std::time::Duration;

use agentd_core::access::{Decision, Right};
use agentd_core::api::{
    Capacity, Health, HistoryList, Instance, InstanceList, OperationList, OperationView, PrepareRequest,
    ProblemDocument, ResizeRequest, SizeList, UndoRequest,
};
use agentd_core::config::parse_duration;
use agentd_core::error::{Code, Problem};
use agentd_core::instance::{Kind, Ref, State, Target};
use agentd_core::operation::Outcome;
use agentd_core::pattern::Pattern;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Extension, Path, Query, Request, State as AxumState};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Router, routing};
use serde::Deserialize;
use utoipa::OpenApi;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter};
use utoipa_axum::routes;

use super::body::Json;
use super::events::{__path_events, events};
use super::logs::{__path_logs, logs};
use super::power;
use super::problem::{Refusal, json};
use super::{metrics, usage};
use crate::engine::{Ask, Engine, Filter, Peer, Wish};
use crate::store::Page;

/// How long a change waits for the guest where the request doesn't say.
const DEFAULT_WAIT: Duration = Duration::from_secs(10);
/// The longest wait or timeout that a request may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(3600);
/// How many operations a list shows where the request doesn't say.
const DEFAULT_OPERATIONS: usize = 100;
/// The longest headers that are taken.
const HEADER_BYTES: usize = 16 * 1024;

/// The right that a route needs. Routes of an instance need it on that instance, the others on any.
#[derive(Debug, Clone, Copy)]
pub(super) struct Need(pub(super) Right);

#[derive(OpenApi)]
#[openapi(info(
    title = "agentd",
    description = "CPU and memory of running VMs, containers and units, changed live under one set of host caps.",
    license(name = "Apache-2.0")
))]
struct Document;

/// The table. What each route needs stands beside it.
fn for_each_route(mut take: impl FnMut(UtoipaMethodRouter<Engine>)) {
    let mut need = |right: Right, (schemas, paths, methods): UtoipaMethodRouter<Engine>| {
        take((schemas, paths, methods.layer(Extension(Need(right)))));
    };
    need(Right::Read, routes!(instances));
    need(Right::Read, routes!(instance));
    need(Right::Logs, routes!(logs));
    need(Right::Resize, routes!(resize));
    need(Right::Resize, routes!(prepare));
    need(Right::Power, routes!(power::stop));
    need(Right::Power, routes!(power::start));
    need(Right::Power, routes!(power::restart));
    need(Right::Power, routes!(power::suspend));
    need(Right::Power, routes!(power::resume));
    need(Right::Admin, routes!(clear_hold));
    need(Right::Read, routes!(capacity));
    need(Right::Read, routes!(sizes));
    need(Right::Read, routes!(operations));
    need(Right::Read, routes!(operation));
    need(Right::Resize, routes!(undo));
    need(Right::Read, routes!(history));
    need(Right::Read, routes!(events));
    need(Right::Read, routes!(health));
    need(Right::Read, routes!(usage::usage));
    need(Right::Read, routes!(usage::usages));
    need(Right::Read, routes!(metrics::metrics));
}

/// The router over an engine.
pub fn router(engine: Engine) -> Router {
    let mut router: Router<Engine> = Router::new();
    // What describes a route is dropped with it here: all of that at once would leave holes of megabytes in a heap that is never
    // as full again.
    for_each_route(|(_, paths, methods)| {
        for path in paths.paths.keys() {
            router = std::mem::take(&mut router).route(path, methods.clone());
        }
    });
    router
        .route("/v1/openapi.json", routing::get(serve_document))
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(engine.clone(), at_the_door))
        .with_state(engine)
}

/// Made when somebody asks: nobody does on most hosts, and it is as large as all else that an idle daemon serves with.
async fn serve_document() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], openapi().to_json().unwrap_or_default())
}

/// The OpenAPI document, from the types.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut documented = OpenApiRouter::with_openapi(Document::openapi());
    for_each_route(|route| documented = std::mem::take(&mut documented).routes(route));
    documented.into_openapi()
}

/// What every request passes: the bound of its headers, and that some rule names its caller.
async fn at_the_door(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    request: Request,
    next: Next,
) -> Response {
    let headers = request.headers().iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum::<usize>();
    if headers + request.uri().to_string().len() > HEADER_BYTES {
        let problem = Problem::new(
            Code::HeadersTooLarge,
            format!("headers and path are longer than {} KiB", HEADER_BYTES / 1024),
        );
        return Refusal::from(problem).into_response();
    }
    if let Err(problem) = engine.admit_caller(&peer) {
        return Refusal::from(problem).into_response();
    }
    next.run(request).await
}

async fn no_route(request: Request) -> Refusal {
    let path: String = request.uri().path().chars().take(200).collect();
    Problem::new(Code::NotFound, format!("there is no route {path:?}"))
        .hint("GET /v1/openapi.json lists the routes")
        .into()
}

async fn wrong_method(request: Request) -> Refusal {
    let path: String = request.uri().path().chars().take(200).collect();
    Problem::new(Code::MethodNotAllowed, format!("{path:?} doesn't take {}", request.method()))
        .hint("GET /v1/openapi.json lists the routes with their methods")
        .into()
}

/// What `GET /v1/instances` takes.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct InstancesQuery {
    /// A bare name: the answer is the one instance that has it.
    name: Option<String>,
    /// `vm`, `container` or `unit`.
    kind: Option<String>,
    /// A glob over references, or `label:KEY=VALUE`.
    #[serde(rename = "match")]
    #[param(rename = "match")]
    pattern: Option<String>,
    /// `running`, `stopped`, …
    state: Option<String>,
    /// `true`: only those whose next start has other values than what runs; `false`: only the others.
    next_boot: Option<bool>,
    /// `true`: only VMs that can't grow without a restart; `false`: only the others.
    unprepared: Option<bool>,
    /// At most this many.
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// What `GET /v1/operations` takes.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct OperationsQuery {
    /// Of this instance only, `vm/web`.
    #[serde(rename = "ref")]
    #[param(rename = "ref")]
    reference: Option<String>,
    /// At most this many.
    limit: Option<usize>,
}

/// A page of instances, or, with `name`, one instance.
#[utoipa::path(get, path = "/v1/instances", params(InstancesQuery), responses(
    (status = 200, body = InstancesReply),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
async fn instances(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    query: Result<Query<InstancesQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let query = decode_query(query)?;
    if let Some(name) = query.name {
        if query.kind.is_some() || query.pattern.is_some() || query.state.is_some() {
            return Err(Problem::new(Code::InvalidRequest, "name can't be combined with kind, match or state").into());
        }
        let target: Target = name.parse()?;
        return Ok(one_instance(&engine.show(&peer, &target).await?));
    }
    let filter = Filter {
        kind: query.kind.map(|kind| kind.parse::<Kind>()).transpose()?,
        pattern: pattern(query.pattern.as_deref())?,
        state: query.state.map(|state| state.parse::<State>()).transpose()?,
        next_boot: query.next_boot,
        unprepared: query.unprepared,
        limit: query.limit,
        cursor: query.cursor,
    };
    Ok(json(StatusCode::OK, &engine.list(&peer, &filter).await?))
}

/// The two answers of `GET /v1/instances`.
#[derive(serde::Serialize, utoipa::ToSchema)]
#[serde(untagged)]
#[allow(dead_code, reason = "describes the reply in the OpenAPI document")]
enum InstancesReply {
    List(InstanceList),
    One(Box<Instance>),
}

/// One instance.
#[utoipa::path(get, path = "/v1/instances/{kind}/{name}",
    params(("kind" = Kind, Path), ("name" = String, Path, description = "one percent-encoded segment")), responses(
    (status = 200, body = Instance, headers(("ETag" = String, description = "the instance's version"))),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
async fn instance(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    path: Result<Path<(String, String)>, PathRejection>,
) -> Result<Response, Refusal> {
    let target = decode_path(path)?;
    Ok(one_instance(&engine.show(&peer, &target).await?))
}

pub(super) fn one_instance(instance: &Instance) -> Response {
    with_etag(json(StatusCode::OK, instance), Some(instance))
}

pub(super) fn with_etag(mut response: Response, instance: Option<&Instance>) -> Response {
    if let Some(etag) = instance.and_then(|instance| format!("\"{}\"", instance.version).parse().ok()) {
        response.headers_mut().insert(header::ETAG, etag);
    }
    response
}

/// Changes CPUs and memory of one instance, as one change.
#[utoipa::path(post, path = "/v1/instances/{kind}/{name}/resize",
    params(("kind" = Kind, Path), ("name" = String, Path), ("If-Match" = Option<String>, Header),
        ("Idempotency-Key" = Option<String>, Header), ("Prefer" = Option<String>, Header)),
    request_body = ResizeRequest, responses(
    (status = 200, body = OperationView), (status = 202, body = OperationView),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
async fn resize(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(Need(right)): Extension<Need>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
    body: Json<ResizeRequest>,
) -> Result<Response, Refusal> {
    let target = decode_path(path)?;
    let wait = duration("wait", body.value.wait.as_deref())?.unwrap_or(DEFAULT_WAIT);
    let dry_run = body.value.dry_run;
    let wish = Wish::Resize(body.value, wait, None);
    change(engine, peer, right, target, wish, dry_run, &headers, "resize", &body.text).await
}

/// Puts headroom into a VM's saved definition, so that it can grow without a restart after its next one.
#[utoipa::path(post, path = "/v1/instances/{kind}/{name}/prepare",
    params(("kind" = Kind, Path), ("name" = String, Path), ("If-Match" = Option<String>, Header),
        ("Idempotency-Key" = Option<String>, Header), ("Prefer" = Option<String>, Header)),
    request_body = Option<PrepareRequest>, responses(
    (status = 200, body = OperationView), (status = 202, body = OperationView),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
async fn prepare(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(Need(right)): Extension<Need>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
    body: Json<PrepareRequest>,
) -> Result<Response, Refusal> {
    let target = decode_path(path)?;
    let dry_run = body.value.dry_run;
    let wish = Wish::Prepare(body.value, None);
    change(engine, peer, right, target, wish, dry_run, &headers, "prepare", &body.text).await
}

/// Takes one change back: only the fields that it touched, each to what it was before. Those of others take the right
/// `admin` on top.
#[utoipa::path(post, path = "/v1/operations/{id}/undo",
    params(("id" = String, Path), ("If-Match" = Option<String>, Header),
        ("Idempotency-Key" = Option<String>, Header), ("Prefer" = Option<String>, Header)),
    request_body = Option<UndoRequest>, responses(
    (status = 200, body = OperationView), (status = 202, body = OperationView),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
async fn undo(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(Need(right)): Extension<Need>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    body: Json<UndoRequest>,
) -> Result<Response, Refusal> {
    let Path(id) = path.map_err(bad_path)?;
    let wait = duration("wait", body.value.wait.as_deref())?.unwrap_or(DEFAULT_WAIT);
    let operation = engine.recorded(&peer, &id).await?;
    let (target, dry_run) = (Target::Full(engine.name_now(&operation)), body.value.dry_run);
    let wish = Wish::Undo(Box::new(operation), wait);
    change(engine, peer, right, target, wish, dry_run, &headers, &format!("undo {id}"), &body.text).await
}

/// Lifts the hold `needs-attention`, after a fresh look.
#[utoipa::path(post, path = "/v1/instances/{kind}/{name}/clear-hold",
    params(("kind" = Kind, Path), ("name" = String, Path)), responses(
    (status = 200, body = Instance),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
async fn clear_hold(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    path: Result<Path<(String, String)>, PathRejection>,
) -> Result<Response, Refusal> {
    let target = decode_path(path)?;
    Ok(one_instance(&engine.clear_hold(&peer, &target).await?))
}

/// The host: what it has, what is promised, what is free.
#[utoipa::path(get, path = "/v1/capacity", responses(
    (status = 200, body = Capacity),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json")))]
async fn capacity(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(Need(right)): Extension<Need>,
) -> Result<Response, Refusal> {
    anywhere(&engine, &peer, right)?;
    Ok(json(StatusCode::OK, &engine.capacity(&peer).await))
}

/// The sizes of the config file.
#[utoipa::path(get, path = "/v1/sizes", responses(
    (status = 200, body = SizeList),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json")))]
async fn sizes(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(Need(right)): Extension<Need>,
) -> Result<Response, Refusal> {
    anywhere(&engine, &peer, right)?;
    Ok(json(StatusCode::OK, &engine.sizes()))
}

/// The newest operations that the caller may see.
#[utoipa::path(get, path = "/v1/operations", params(OperationsQuery), responses(
    (status = 200, body = OperationList),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
async fn operations(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    query: Result<Query<OperationsQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let query = decode_query(query)?;
    let reference = full_reference(query.reference.as_deref())?;
    let limit = query.limit.unwrap_or(DEFAULT_OPERATIONS);
    let items = engine.operations(&peer, reference.as_ref(), limit).await?;
    Ok(json(StatusCode::OK, &OperationList { items }))
}

/// What `GET /v1/history` takes.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct HistoryQuery {
    /// Of this instance only, `vm/web`.
    #[serde(rename = "ref")]
    #[param(rename = "ref")]
    reference: Option<String>,
    /// At most this many.
    limit: Option<usize>,
    /// Before this `seq`: the `next` of the page before.
    before: Option<u64>,
}

/// Who did what, newest first: everything with the right `admin`, else what the caller itself asked for.
#[utoipa::path(get, path = "/v1/history", params(HistoryQuery), responses(
    (status = 200, body = HistoryList),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
async fn history(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    query: Result<Query<HistoryQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let query = decode_query(query)?;
    let page = Page {
        reference: full_reference(query.reference.as_deref())?.map(|reference| reference.to_string()),
        uid: None,
        before: query.before,
        limit: query.limit.unwrap_or(DEFAULT_OPERATIONS),
        states: false,
    };
    Ok(json(StatusCode::OK, &engine.history(&peer, page).await?))
}

/// One operation.
#[utoipa::path(get, path = "/v1/operations/{id}", params(("id" = String, Path)), responses(
    (status = 200, body = OperationView),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
async fn operation(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Response, Refusal> {
    let Path(id) = path.map_err(bad_path)?;
    Ok(json(StatusCode::OK, &engine.operation(&peer, &id).await?))
}

/// Whether agentd and its backends are well.
#[utoipa::path(get, path = "/v1/health", responses(
    (status = 200, body = Health),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json")))]
async fn health(AxumState(engine): AxumState<Engine>, Extension(peer): Extension<Peer>) -> Response {
    json(StatusCode::OK, &engine.health(&peer).await)
}

/// What all changes share: the headers that steer them, and how long the reply may take.
#[allow(clippy::too_many_arguments, reason = "the parts of one request, taken apart by its handler")]
pub(super) async fn change(
    engine: Engine,
    peer: Peer,
    right: Right,
    target: Target,
    wish: Wish,
    dry_run: bool,
    headers: &HeaderMap,
    verb: &str,
    text: &[u8],
) -> Result<Response, Refusal> {
    let if_version = match text_header(headers, header::IF_MATCH.as_str())? {
        Some("*") | None => None,
        Some(tag) => Some(tag.trim_start_matches("W/").trim_matches('"').to_owned()),
    };
    let request = format!("{verb} {target:?} {if_version:?} {}", String::from_utf8_lossy(text));
    // As a structured field it is in quotes, and most clients send it without.
    let key = text_header(headers, "idempotency-key")?.map(|key| (key.trim_matches('"').to_owned(), request));
    // A dry run leaves nothing behind that could be looked at later.
    let bound = prefer_wait(headers)?.filter(|_| !dry_run);
    let ask = Ask { target, wish, right, dry_run, if_version };
    let submitted = engine.submit(peer.clone(), ask.clone(), key)?;
    let reply = match bound {
        None => engine.reply(submitted).await,
        Some(bound) => match tokio::time::timeout(bound, engine.reply(submitted.clone())).await {
            Ok(reply) => reply,
            Err(_) => match engine.acknowledge(&submitted, &peer, &ask).await {
                Some(view) => {
                    crate::failpoint::reach("reply: before").await;
                    return Ok(accepted(&submitted.id, &view));
                }
                None => engine.reply(submitted).await,
            },
        },
    };
    crate::failpoint::reach("reply: before").await;
    let view = reply?;
    let status = if view.outcome == Outcome::Running { StatusCode::ACCEPTED } else { StatusCode::OK };
    Ok(with_etag(json(status, &view), view.instance.as_ref()))
}

/// The reply to a caller that doesn't want to wait longer: where to look.
fn accepted(id: &str, view: &OperationView) -> Response {
    let mut response = json(StatusCode::ACCEPTED, view);
    if let Ok(location) = format!("/v1/operations/{id}").parse() {
        response.headers_mut().insert(header::LOCATION, location);
    }
    response
}

/// Whether a caller has a right anywhere at all.
pub(super) fn anywhere(engine: &Engine, peer: &Peer, right: Right) -> Result<(), Problem> {
    match engine.settings().access.decide(&peer.caller, right, None) {
        Decision::Allowed { .. } => Ok(()),
        _ => Err(Problem::new(Code::Forbidden, format!("uid {} has no right `{right}`", peer.who.uid))
            .hint("an [[access]] rule of the config file would have to give it")),
    }
}

pub(super) fn decode_path(path: Result<Path<(String, String)>, PathRejection>) -> Result<Target, Problem> {
    let Path((kind, name)) = path.map_err(bad_path)?;
    Ok(Target::Full(Ref::new(kind.parse()?, &name)?))
}

fn bad_path(rejection: PathRejection) -> Problem {
    Problem::new(Code::InvalidRequest, rejection.body_text())
}

pub(super) fn full_reference(text: Option<&str>) -> Result<Option<Ref>, Problem> {
    match text.map(str::parse).transpose()? {
        None => Ok(None),
        Some(Target::Full(reference)) => Ok(Some(reference)),
        Some(Target::Bare(_)) => Err(Problem::new(Code::InvalidRequest, "ref must name the kind, as in vm/web")),
    }
}

pub(super) fn decode_query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, Problem> {
    match query {
        Ok(Query(query)) => Ok(query),
        Err(rejection) => Err(Problem::new(Code::InvalidRequest, rejection.body_text())
            .hint("GET /v1/openapi.json lists what each route takes")),
    }
}

pub(super) fn pattern(text: Option<&str>) -> Result<Option<Pattern>, Problem> {
    text.map(|text| Pattern::parse(text).map_err(|e| Problem::new(Code::InvalidRequest, e.to_string()))).transpose()
}

pub(super) fn duration(field: &str, text: Option<&str>) -> Result<Option<Duration>, Problem> {
    let Some(text) = text else { return Ok(None) };
    let invalid = |why: String| Problem::new(Code::InvalidRequest, format!("{field}: {why}")).hint("such as 30s or 5m");
    // A bare 0 is clear enough.
    let time = if text == "0" { Duration::ZERO } else { parse_duration(text).map_err(|e| invalid(e.to_string()))? };
    if time > LONGEST_WAIT {
        return Err(invalid(format!("{text} is longer than the longest, 1h")));
    }
    Ok(Some(time))
}

pub(super) fn text_header<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Problem> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    let invalid = |why: &str| Problem::new(Code::InvalidRequest, format!("the header {name} {why}"));
    if values.next().is_some() {
        return Err(invalid("is there twice"));
    }
    match value.to_str() {
        Ok(text) if (1..=255).contains(&text.len()) => Ok(Some(text)),
        Ok(_) => Err(invalid("must have 1 to 255 characters")),
        Err(_) => Err(invalid("must be plain text")),
    }
}

/// `Prefer: wait=N`, RFC 7240; other preferences are not ours.
fn prefer_wait(headers: &HeaderMap) -> Result<Option<Duration>, Problem> {
    let values = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    for preference in values.flat_map(|value| value.split(',')) {
        if let Some(seconds) = preference.trim().strip_prefix("wait=") {
            let seconds = seconds
                .trim_matches('"')
                .parse()
                .map_err(|_| Problem::new(Code::InvalidRequest, "Prefer: wait takes a whole number of seconds"))?;
            return Ok(Some(Duration::from_secs(seconds)));
        }
    }
    Ok(None)
}
