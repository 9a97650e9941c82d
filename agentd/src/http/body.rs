//! Request bodies: bounded in size and time, declared as JSON, decoded strictly, with the place of what is wrong.

use std::time::Duration;

use agentd_core::error::{Code, Problem};
use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::header;
use http_body_util::{BodyExt, Limited};
use serde::de::DeserializeOwned;

use super::problem::Refusal;

/// The longest body.
const BODY_BYTES: usize = 64 * 1024;
/// How long a body may take to arrive.
const ARRIVAL: Duration = Duration::from_secs(5);

/// A decoded body and the bytes that it was decoded from.
pub(super) struct Json<T> {
    pub value: T,
    pub text: Vec<u8>,
}

impl<T: DeserializeOwned + Default, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Refusal> {
        let declared = request.headers().get(header::CONTENT_TYPE).cloned();
        let text = read(request.into_body()).await?;
        // A request without parameters needs neither body nor content type.
        if text.is_empty() {
            return Ok(Json { value: T::default(), text });
        }
        let is_json = declared.as_ref().and_then(|value| value.to_str().ok()).is_some_and(|value| {
            let kind = value.split(';').next().unwrap_or_default().trim();
            kind.eq_ignore_ascii_case("application/json")
        });
        if !is_json {
            let told = declared.map_or_else(|| "nothing".to_owned(), |value| format!("{value:?}"));
            let detail = format!("the body must be declared as application/json, not as {told}");
            return Err(Problem::new(Code::UnsupportedMediaType, detail)
                .hint("send the header `Content-Type: application/json`")
                .into());
        }
        // serde takes an array for a struct, field by field; on the wire that would be a guess.
        if !text.trim_ascii_start().starts_with(b"{") {
            return Err(Problem::new(Code::InvalidRequest, "the body must be a JSON object")
                .hint("GET /v1/openapi.json describes what can be sent")
                .into());
        }
        match serde_json::from_slice(&text) {
            Ok(value) => Ok(Json { value, text }),
            Err(error) => Err(Problem::new(Code::InvalidRequest, format!("the body can't be understood: {error}"))
                .hint("GET /v1/openapi.json describes what can be sent")
                .into()),
        }
    }
}

async fn read(body: Body) -> Result<Vec<u8>, Problem> {
    match tokio::time::timeout(ARRIVAL, Limited::new(body, BODY_BYTES).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes().to_vec()),
        Ok(Err(error)) if error.is::<http_body_util::LengthLimitError>() => {
            Err(Problem::new(Code::BodyTooLarge, format!("the body is longer than {} KiB", BODY_BYTES / 1024)))
        }
        Ok(Err(error)) => Err(Problem::new(Code::InvalidRequest, format!("the body broke off: {error}"))),
        Err(_) => {
            Err(Problem::new(Code::RequestTimeout, format!("the body did not arrive within {} s", ARRIVAL.as_secs())))
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, sleep};

    use super::*;

    #[tokio::test]
    async fn a_body_of_64_kib_is_read_and_one_byte_more_is_too_large() {
        assert_eq!(read(Body::from(vec![b' '; 64 * 1024])).await.unwrap().len(), 64 * 1024);
        let refused = read(Body::from(vec![b' '; 64 * 1024 + 1])).await.unwrap_err();
        assert_eq!((refused.code, refused.detail.as_str()), (Code::BodyTooLarge, "the body is longer than 64 KiB"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_has_five_seconds_however_busily_it_arrives() {
        let drops = |pause: u64| {
            let drops = futures_util::stream::unfold((), move |()| async move {
                sleep(Duration::from_millis(pause)).await;
                Some((Ok::<_, std::io::Error>(" "), ()))
            });
            Body::from_stream(drops)
        };
        for pause in [10, 1000, 60_000] {
            let begun = Instant::now();
            let refused = read(drops(pause)).await.unwrap_err();
            assert_eq!((refused.code, begun.elapsed().as_secs()), (Code::RequestTimeout, 5), "{refused}");
        }
    }
}
