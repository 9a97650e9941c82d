//! The route of events: what is asked for, decoded, and the events as server-sent ones (the HTML standard's
//! `text/event-stream`).

use agentd_core::access::Right;
use agentd_core::api::{HistoryEntry, ProblemDocument};
use agentd_core::error::{Code, Problem};
use agentd_core::instance::Kind;
use agentd_core::pattern::Pattern;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Extension, Query, State as AxumState};
use axum::http::HeaderMap;
use axum::response::Response;
use bytes::Bytes;
use futures_util::{Stream, stream};
use serde::Deserialize;
use serde_json::json;

use super::problem::Refusal;
use super::routes::{anywhere, decode_query, text_header};
use super::streams::Streams;
use crate::engine::{Begin, Engine, Event, EventFilter, Events, LONGEST_TAIL, Peer, types};

/// A line that means nothing.
const HEARTBEAT: &[u8] = b":\n\n";
/// How many events go into one chunk.
const CHUNK: usize = 64;

/// What the route takes.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// `vm`, `container` or `unit`.
    kind: Option<String>,
    /// A glob over references, or `label:KEY=VALUE`.
    #[serde(rename = "match")]
    #[param(rename = "match")]
    pattern: Option<String>,
    /// Only of these types, with commas: `change`, `refusal`, `drift`, `hold-cleared`, `settled`, `state`.
    #[serde(rename = "type")]
    #[param(rename = "type")]
    types: Option<String>,
    /// Begin with the newest so many, at most 10,000; 0 where absent. Not together with `Last-Event-ID`.
    tail: Option<usize>,
    /// `false`: end with what there is, rather than go on.
    follow: Option<bool>,
}

/// What happens, as it happens: server-sent events. `event` is the type, `id` the place on record, `data` the entry of the history as one
/// line of JSON. A reader that comes back with `Last-Event-ID` is sent what it has missed, each event once. `lost`: what it has missed
/// is not on record any more, from `after` to before `oldest`. `dropped`, the last one: it has taken nothing for too long. An event with
/// an id and no data says where a stream begins.
#[utoipa::path(get, path = "/v1/events",
    params(EventsQuery, ("Last-Event-ID" = Option<u64>, Header)), responses(
    (status = 200, body = HistoryEntry, content_type = "text/event-stream"),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
pub(super) async fn events(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(streams): Extension<Streams>,
    headers: HeaderMap,
    query: Result<Query<EventsQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let query = decode_query(query)?;
    anywhere(&engine, &peer, Right::Read)?;
    let filter = EventFilter {
        kind: query.kind.map(|kind| kind.parse::<Kind>()).transpose()?,
        pattern: query
            .pattern
            .map(|pattern| Pattern::parse(&pattern).map_err(|e| Problem::new(Code::InvalidRequest, e.to_string())))
            .transpose()?,
        types: query.types.as_deref().map(types).transpose()?.unwrap_or_default(),
    };
    let from = match (last_event(&headers)?, query.tail) {
        (Some(_), Some(_)) => {
            let detail = "tail can't be combined with Last-Event-ID: one says how many, the other from where on";
            return Err(Problem::new(Code::InvalidRequest, detail).into());
        }
        (Some(place), None) => Begin::After(place),
        (None, Some(tail)) if tail > LONGEST_TAIL => {
            let detail = format!("tail is {tail}; {LONGEST_TAIL} at most");
            return Err(Problem::new(Code::InvalidRequest, detail).hint("GET /v1/history pages further back").into());
        }
        (None, tail) => Begin::Tail(tail.unwrap_or_default()),
    };
    let place = streams.admit(peer.who.uid)?;
    let events = engine.events(&peer, filter, from, query.follow.unwrap_or(true)).await?;
    Ok(place.reply("text/event-stream", HEARTBEAT, chunks(events)))
}

fn last_event(headers: &HeaderMap) -> Result<Option<u64>, Problem> {
    let Some(text) = text_header(headers, "last-event-id")? else { return Ok(None) };
    let wrong = |_| Problem::new(Code::InvalidRequest, format!("Last-Event-ID: {text:?} is no id of an event"));
    text.parse().map(Some).map_err(wrong)
}

/// The events in chunks, and at the end why there are no more.
fn chunks(events: Events) -> impl Stream<Item = Bytes> + Send + 'static {
    stream::unfold(Some(events), |events| async move {
        let mut events = events?;
        let mut some = Vec::with_capacity(CHUNK);
        if events.queue.recv_many(&mut some, CHUNK).await > 0 {
            let text: String = some.iter().map(written).collect();
            return Some((Bytes::from(text), Some(events)));
        }
        let why = events.dropped.get()?;
        Some((Bytes::from(format!("event: dropped\ndata: {}\n\n", json!({ "reason": why }))), None))
    })
}

fn written(event: &Event) -> String {
    match event {
        Event::Begins(place) => format!("id: {place}\n\n"),
        Event::Happened(entry) => {
            let (seq, happening) = (entry.seq, entry.happening.as_str());
            // JSON has no line end of its own.
            format!("id: {seq}\nevent: {happening}\ndata: {}\n\n", serde_json::to_string(entry).unwrap_or_default())
        }
        Event::Lost(lost) => {
            format!("event: lost\ndata: {}\n\n", serde_json::to_string(lost).unwrap_or_default())
        }
    }
}
