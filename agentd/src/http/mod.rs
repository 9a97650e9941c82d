//! The socket: accepts connections, learns who is at the other end, bounds what they may send, and hands requests to the
//! routes. Knows no instance and no engine.
//!
//! The loop is our own over hyper because bounds matter here: a half-sent request must not stay open for ever.

mod body;
mod crowd;
mod logs;
mod metrics;
mod patience;
mod peer;
mod power;
mod problem;
mod routes;
mod streams;
mod usage;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::response::IntoResponse;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, watch};
use tower::ServiceExt;

pub use routes::{openapi, router};

use self::crowd::{Bounds, Crowd};
use self::patience::Patient;
use self::streams::Streams;
use crate::engine::Engine;

/// The longest headers.
const HEADER_BYTES: usize = 16 * 1024;
/// How long headers may take to arrive, and how long a body may.
const ARRIVAL: Duration = Duration::from_secs(5);
/// Connections; root's places are there so that `ctl list` answers while others crowd.
const CONNECTIONS: Bounds = Bounds { all: 128, a_uid: 16, roots: 8 };
/// How long requests under way may take to end when the daemon stops.
const DRAIN: Duration = Duration::from_secs(30);

/// Serves until `stop` says so, then lets what is under way end.
pub async fn serve(listener: UnixListener, engine: Engine, mut stop: watch::Receiver<bool>) -> io::Result<()> {
    let router = router(engine);
    let graceful = GracefulShutdown::new();
    let crowd = Crowd::new(CONNECTIONS);
    let streams = Streams::new(stop.clone());
    // Those who find no place get one short answer; this many at once.
    let turned_away = Arc::new(Semaphore::new(32));
    loop {
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: let some come back before trying again.
                    tracing::error!("a connection could not be accepted: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            _ = stop.wait_for(|stop| *stop) => break,
        };
        let credentials = match stream.peer_cred() {
            Ok(credentials) => credentials,
            Err(error) => {
                tracing::warn!("a connection without peer credentials was closed: {error}");
                continue;
            }
        };
        let Some(place) = crowd.enter(credentials.uid()) else {
            if let Ok(permit) = Arc::clone(&turned_away).try_acquire_owned() {
                tokio::spawn(async move {
                    problem::turn_away(stream).await;
                    drop(permit);
                });
            }
            continue;
        };
        let (router, watcher) = (router.clone(), graceful.watcher());
        let (streams, stream) = (streams.clone(), Patient::new(stream, stop.clone()));
        tokio::spawn(async move {
            let who = peer::connected(credentials);
            let service = tower::service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
                let (who, router, streams) = (who.clone(), router.clone(), streams.clone());
                async move {
                    request.extensions_mut().insert(streams);
                    match peer::identify(who).await {
                        Ok(peer) => request.extensions_mut().insert(peer),
                        Err(problem) => return Ok(problem::Refusal::from(problem).into_response()),
                    };
                    router.oneshot(request.map(axum::body::Body::new)).await
                }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(ARRIVAL)
                .max_buf_size(HEADER_BYTES + 4096)
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
            if let Err(error) = watcher.watch(connection).await {
                tracing::debug!(%error, "a connection ended early");
            }
            drop(place);
        });
    }
    drop(listener);
    if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::warn!("requests were still under way after {} s", DRAIN.as_secs());
    }
    Ok(())
}
