//! The route of logs: what is asked for, decoded, and the log as a stream. The frames are those of `agentd_core::api`.

use std::time::{SystemTime, UNIX_EPOCH};

use agentd_core::api::{LOG_HEARTBEAT, LOG_MEDIA_TYPE, LogStream, ProblemDocument};
use agentd_core::config::parse_duration;
use agentd_core::error::{Code, Problem};
use agentd_core::instance::Kind;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Extension, Path, Query, State as AxumState};
use axum::response::Response;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use serde::Deserialize;

use super::problem::{Refusal, document};
use super::routes::{decode_path, decode_query};
use super::streams::Streams;
use crate::backend::{BackendError, LogAsk, LogFrames};
use crate::clock;
use crate::engine::{Engine, Peer};

/// The longest tail, in lines.
const LONGEST_TAIL: u64 = 1_000_000;

/// What the route takes.
#[derive(Debug, Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct LogsQuery {
    /// Only the last so many lines.
    tail: Option<u64>,
    /// Only what was logged since: `10m` ago, or from an RFC 3339 time on. `unsupported` for VMs, whose consoles know no times.
    since: Option<String>,
    /// `true`: go on with what is logged from now on, until the instance ends or the caller hangs up.
    follow: Option<bool>,
}

/// A log on the wire, of which JSON's schemas have nothing to say.
struct Frames;

impl utoipa::PartialSchema for Frames {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        let any = utoipa::openapi::schema::SchemaType::AnyValue;
        utoipa::openapi::ObjectBuilder::new().schema_type(any).description(Some("frames, as bytes")).into()
    }
}

impl utoipa::ToSchema for Frames {}

/// The log of one instance: what a container wrote, a unit's messages in the journal, a VM's serial console where its
/// definition has it written to a file. In frames: one byte that names the stream (1 stdout, 2 stderr, 3 problem), three of
/// zero, a length as a big-endian 32-bit number, and that many bytes. Where a frame ends means nothing. Only containers without a
/// terminal have a stderr. A frame of length 0 means nothing. One of stream 3 is the last: its bytes are a problem document that says
/// why the log can't go on. A reply that ends without one is whole; one that breaks off (no last chunk) is not.
#[utoipa::path(get, path = "/v1/instances/{kind}/{name}/logs",
    params(("kind" = Kind, Path), ("name" = String, Path), LogsQuery), responses(
    (status = 200, body = Frames, content_type = "application/vnd.agentd.logs"),
    (status = "4XX", body = ProblemDocument, content_type = "application/problem+json"),
    (status = "5XX", body = ProblemDocument, content_type = "application/problem+json")))]
pub(super) async fn logs(
    AxumState(engine): AxumState<Engine>,
    Extension(peer): Extension<Peer>,
    Extension(streams): Extension<Streams>,
    path: Result<Path<(String, String)>, PathRejection>,
    query: Result<Query<LogsQuery>, QueryRejection>,
) -> Result<Response, Refusal> {
    let (target, query) = (decode_path(path)?, decode_query(query)?);
    let since = query.since.as_deref().map(since).transpose()?;
    if let Some(tail) = query.tail.filter(|tail| *tail > LONGEST_TAIL) {
        let detail = format!("tail is {tail}; {LONGEST_TAIL} lines at most");
        return Err(Problem::new(Code::InvalidRequest, detail).hint("leave it out for the whole log").into());
    }
    let ask = LogAsk { tail: query.tail, since, follow: query.follow.unwrap_or_default() };
    let place = streams.admit(peer.who.uid)?;
    let log = engine.logs(&peer, &target, &ask).await?;
    Ok(place.reply(LOG_MEDIA_TYPE, &LOG_HEARTBEAT, framed(log)))
}

/// A time, or how long ago one is.
fn since(text: &str) -> Result<SystemTime, Problem> {
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(time.into());
    }
    let ago = parse_duration(text).map_err(|_| {
        Problem::new(Code::InvalidRequest, format!("since: {text:?} is neither a time nor how long ago one is"))
            .hint("such as 10m, 2h or 2026-01-31T08:00:00Z")
    })?;
    Ok(clock::now().checked_sub(ago).unwrap_or(UNIX_EPOCH))
}

/// The pieces of a log, and where it can't go on, why.
fn framed(log: LogFrames) -> impl Stream<Item = Bytes> + Send + 'static {
    let last = |error: BackendError| {
        tracing::debug!(%error, "a log could not be read on");
        let words = serde_json::to_vec(&document(Problem::from(error), None)).unwrap_or_default();
        // A problem document is far shorter.
        let length = u32::try_from(words.len()).unwrap_or_default();
        Bytes::from([LogStream::Problem.header(length).as_slice(), &words].concat())
    };
    log.map(move |piece| piece.unwrap_or_else(last))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use agentd_core::api::LOG_HEADER;
    use futures_util::stream;

    use super::*;

    #[test]
    fn since_is_a_time_or_how_long_ago_one_is() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        for text in ["2026-01-31T08:00:00Z", "2026-01-31T09:00:00+01:00"] {
            assert_eq!(since(text).unwrap(), at(1_769_846_400), "{text}");
        }
        let then = since("10m").unwrap();
        let ago = SystemTime::now().duration_since(then).unwrap();
        assert!((600..660).contains(&ago.as_secs()), "{ago:?}");
        assert_eq!(since("99y").unwrap_err().code, Code::InvalidRequest);
        assert_eq!(since("").unwrap_err().code, Code::InvalidRequest);
    }

    #[tokio::test]
    async fn a_log_that_breaks_off_ends_with_the_problem() {
        let pieces = [Ok(Bytes::from_static(b"whole frames")), Err(BackendError::Unavailable("gone".into()))];
        let mut sent: Vec<Bytes> = framed(stream::iter(pieces).boxed()).collect().await;
        let last = sent.pop().unwrap();
        assert_eq!(sent, ["whole frames"]);
        let (header, words) = last.split_at(LOG_HEADER);
        let length = u32::try_from(words.len()).unwrap();
        assert_eq!(LogStream::read(header.try_into().unwrap()), Some((LogStream::Problem, length)));
        let told: serde_json::Value = serde_json::from_slice(words).unwrap();
        assert_eq!((told["code"].as_str(), told["detail"].as_str()), (Some("backend-unavailable"), Some("gone")));
    }
}
