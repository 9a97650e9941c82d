//! Calls to the engine: a deadline of our own around each whole call, and every way in which one can end as a
//! [`BackendError`]. Knows nothing of what the answers mean.
//!
//! Each request has a connection of its own (`transport.rs`), so there is nothing to repair after the engine was restarted.
//! bollard sends no API version in the path (0.21 joins an absolute path to its versioned base), and an engine takes
//! that for its own newest one: no negotiation is needed, and engines that refuse old versions are served too.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bollard::API_DEFAULT_VERSION;
use bollard::errors::Error;
use bollard::models::{ContainerInspectResponse, ContainerSummary, ContainerUpdateBody, SystemInfo, SystemVersion};
use bollard::query_parameters::{
    EventsOptionsBuilder, InspectContainerOptions, KillContainerOptionsBuilder, ListContainersOptionsBuilder,
    StartContainerOptions,
};
use futures_util::{Stream, StreamExt, TryStreamExt};

use super::transport;
use crate::backend::BackendError;

/// How long a question may take.
pub(super) const READ: Duration = Duration::from_secs(10);
/// How long a change may take. The engine itself waits up to 12 s for a killed process.
const CHANGE: Duration = Duration::from_secs(20);
/// bollard's own limit, which ends with the headers: beyond ours, so that ours decides.
const BOLLARD_SECONDS: u64 = 60;
/// bollard's own limit for a change: one that hangs is remembered for as long.
const HUNG_SECONDS: u64 = 24 * 3600;

/// What can tell of a change of limits or state. Not `exec_…`, of which health checks make one a second.
const EVENTS: &[&str] =
    &["create", "destroy", "die", "kill", "oom", "pause", "rename", "start", "stop", "unpause", "update"];

/// What a call does, for the words and the meaning of a failure.
#[derive(Clone, Copy)]
enum Call {
    Read,
    Change,
}

/// The engine behind one socket. Holds no connection.
#[derive(Debug, Clone)]
pub(super) struct Client {
    socket: PathBuf,
    /// The containers, by full id, with a change that was sent and not answered.
    changing: Arc<Mutex<Vec<String>>>,
}

/// A change of one container until the engine has answered or the connection is gone.
struct Changing {
    id: String,
    all: Arc<Mutex<Vec<String>>>,
}

impl Changing {
    fn enter(all: &Arc<Mutex<Vec<String>>>, id: &str) -> Self {
        lock(all).push(id.to_owned());
        Changing { id: id.to_owned(), all: Arc::clone(all) }
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        let mut all = lock(&self.all);
        if let Some(at) = all.iter().position(|id| *id == self.id) {
            all.swap_remove(at);
        }
    }
}

fn lock(changing: &Mutex<Vec<String>>) -> MutexGuard<'_, Vec<String>> {
    // Each change of it is one statement, so a panic elsewhere leaves it whole.
    changing.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    pub(super) fn new(socket: PathBuf) -> Self {
        Client { socket, changing: Arc::default() }
    }

    /// Whether a change of this container is still with the engine, one that we wait for no more included.
    pub(super) fn is_changing(&self, id: &str) -> bool {
        lock(&self.changing).iter().any(|changing| changing == id)
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) async fn version(&self) -> Result<SystemVersion, BackendError> {
        let docker = self.connect()?;
        self.run(Call::Read, "version", docker.version()).await
    }

    pub(super) async fn info(&self) -> Result<SystemInfo, BackendError> {
        let docker = self.connect()?;
        self.run(Call::Read, "info", docker.info()).await
    }

    /// Every container, stopped ones too.
    pub(super) async fn list(&self) -> Result<Vec<ContainerSummary>, BackendError> {
        let docker = self.connect()?;
        let options = ListContainersOptionsBuilder::new().all(true).build();
        self.run(Call::Read, "list of containers", docker.list_containers(Some(options))).await
    }

    /// `name` must have been checked: it becomes part of a path.
    pub(super) async fn inspect(&self, name: &str) -> Result<ContainerInspectResponse, BackendError> {
        let docker = self.connect()?;
        let what = format!("inspect {name}");
        self.run(Call::Read, &what, docker.inspect_container(name, None::<InspectContainerOptions>)).await
    }

    /// One update of a container by its full id.
    pub(super) async fn update(&self, id: &str, body: ContainerUpdateBody) -> Result<(), BackendError> {
        let docker = self.connect_for(HUNG_SECONDS, transport::ANSWER)?;
        let call = {
            let id = id.to_owned();
            async move { docker.update_container(&id, body).await }
        };
        self.change(id, &format!("update {}", short(id)), call).await
    }

    /// Starts it. One that runs already is fine.
    pub(super) async fn start(&self, id: &str) -> Result<(), BackendError> {
        let docker = self.connect_for(HUNG_SECONDS, transport::ANSWER)?;
        let call = {
            let id = id.to_owned();
            async move { docker.start_container(&id, None::<StartContainerOptions>).await }
        };
        self.change(id, &format!("start {}", short(id)), call).await
    }

    /// Freezes its processes.
    pub(super) async fn pause(&self, id: &str) -> Result<(), BackendError> {
        let docker = self.connect_for(HUNG_SECONDS, transport::ANSWER)?;
        let call = {
            let id = id.to_owned();
            async move { docker.pause_container(&id).await }
        };
        self.change(id, &format!("pause {}", short(id)), call).await
    }

    /// Lets its processes run on.
    pub(super) async fn unpause(&self, id: &str) -> Result<(), BackendError> {
        let docker = self.connect_for(HUNG_SECONDS, transport::ANSWER)?;
        let call = {
            let id = id.to_owned();
            async move { docker.unpause_container(&id).await }
        };
        self.change(id, &format!("unpause {}", short(id)), call).await
    }

    /// Sends a signal to its main process.
    pub(super) async fn signal(&self, id: &str, signal: &str) -> Result<(), BackendError> {
        let docker = self.connect_for(HUNG_SECONDS, transport::ANSWER)?;
        let options = KillContainerOptionsBuilder::new().signal(signal).build();
        let what = format!("kill --signal {signal} {}", short(id));
        let call = {
            let id = id.to_owned();
            async move { docker.kill_container(&id, Some(options)).await }
        };
        self.change(id, &what, call).await
    }

    /// What happened to containers between these times (Unix seconds), by full id, as far as the engine still has it at hand.
    pub(super) async fn happened(&self, since: Duration, until: Duration) -> Result<Vec<String>, BackendError> {
        let happened = self.events(since, Some(until))?.try_collect();
        let told = tokio::time::timeout(READ, happened).await;
        told.unwrap_or_else(|_| Err(self.late(Call::Read, "events", READ)))
    }

    /// What happens to containers from `since` on (Unix seconds), by full id, until the connection is lost or `until`. What
    /// happened between then and now comes first, so nothing is missed while connecting.
    pub(super) fn events(
        &self,
        since: Duration,
        until: Option<Duration>,
    ) -> Result<impl Stream<Item = Result<String, BackendError>> + Send + use<>, BackendError> {
        // The limit on bollard's side ends with the headers, which the engine sends at once.
        let docker = self.connect_for(READ.as_secs(), transport::ANNOUNCED)?;
        let only = |word: &str, values: &[&str]| (word.to_owned(), values.iter().map(|&value| value.into()).collect());
        let filters: HashMap<String, Vec<String>> = [only("type", &["container"]), only("event", EVENTS)].into();
        let stamp = |time: Duration| format!("{}.{:09}", time.as_secs(), time.subsec_nanos());
        let mut options = EventsOptionsBuilder::new().since(&stamp(since)).filters(&filters);
        if let Some(until) = until {
            options = options.until(&stamp(until));
        }
        let options = options.build();
        let client = self.clone();
        Ok(docker.events(Some(options)).filter_map(move |event| {
            let id = match event {
                Ok(event) => event.actor.and_then(|actor| actor.id).map(Ok),
                Err(error) => Some(Err(client.failed(Call::Read, "events", &error))),
            };
            std::future::ready(id)
        }))
    }

    /// The end of what the engine announces.
    pub(super) fn hung_up(&self) -> BackendError {
        self.unreachable("it announces nothing any more")
    }

    /// A change goes on after our deadline: hung up on, the engine might do it all the same, and nobody would know when.
    async fn change(
        &self,
        id: &str,
        what: &str,
        call: impl Future<Output = Result<(), Error>> + Send + 'static,
    ) -> Result<(), BackendError> {
        let changing = Changing::enter(&self.changing, id);
        let call = tokio::spawn(async move {
            let answer = call.await;
            drop(changing);
            answer
        });
        let lost = || Error::IOError { err: std::io::Error::other("the call was lost") };
        self.run(Call::Change, what, async { call.await.unwrap_or_else(|_| Err(lost())) }).await
    }

    fn connect(&self) -> Result<bollard::Docker, BackendError> {
        self.connect_for(BOLLARD_SECONDS, transport::ANSWER)
    }

    fn connect_for(&self, seconds: u64, most: usize) -> Result<bollard::Docker, BackendError> {
        let socket = self.socket.clone();
        let transport = move |request| transport::send(socket.clone(), most, request);
        bollard::Docker::connect_with_custom_transport(transport, Some("http://docker"), seconds, API_DEFAULT_VERSION)
            .map_err(|error| self.unreachable(&error.to_string()))
    }

    async fn run<T>(
        &self,
        call: Call,
        what: &str,
        answer: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, BackendError> {
        let deadline = match call {
            Call::Read => READ,
            Call::Change => CHANGE,
        };
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.failed(call, what, &error)),
            Err(_) => Err(self.late(call, what, deadline)),
        }
    }

    fn late(&self, call: Call, what: &str, deadline: Duration) -> BackendError {
        let (socket, seconds) = (self.socket.display(), deadline.as_secs());
        BackendError::Timeout(match call {
            Call::Read => {
                format!("docker at {socket} took a connection and gave no answer to `{what}` within {seconds} s")
            }
            Call::Change => format!(
                "docker at {socket} gave no answer to `{what}` within {seconds} s: whether it was done is unknown until it \
                 answers again"
            ),
        })
    }

    /// What a failed call means.
    fn failed(&self, call: Call, what: &str, error: &Error) -> BackendError {
        match error {
            Error::DockerResponseServerError { status_code, message } => refused(what, *status_code, message),
            Error::IOError { err } if transport::is_unheard(err) => self.unreachable(&err.to_string()),
            Error::RequestTimeoutError => self.late(call, what, Duration::from_secs(BOLLARD_SECONDS)),
            Error::HyperResponseError { .. } | Error::IOError { .. } => {
                let (socket, cause) = (self.socket.display(), root_cause(error));
                match call {
                    Call::Read => self.unreachable(&format!("the connection broke during `{what}`: {cause}")),
                    Call::Change => BackendError::Timeout(format!(
                        "the connection to docker at {socket} broke during `{what}` ({cause}): whether it was done is \
                         unknown until docker answers again"
                    )),
                }
            }
            error => BackendError::Failed(format!("docker's answer to `{what}` can't be read: {error}")),
        }
    }

    fn unreachable(&self, cause: &str) -> BackendError {
        BackendError::Unavailable(format!(
            "docker can't be reached at {}: {cause}; look at `systemctl status docker`",
            self.socket.display()
        ))
    }
}

/// docker's own words, as the error that they are.
pub(super) fn refused(what: &str, status: u16, message: &str) -> BackendError {
    let message = &clipped(message.trim());
    if status == 404 {
        return BackendError::NotFound(format!("docker: {message}"));
    }
    if message.to_ascii_lowercase().contains("multiple ids found with provided prefix") {
        return BackendError::Ambiguous(format!("docker: {message}"));
    }
    let detail = format!("docker refused `{what}`: {message} (HTTP {status})");
    // An update answers 409 to what can't go together in a config; elsewhere 409 is about the state.
    let about_state = status == 409 && (!what.starts_with("update") || message.contains("marked for removal"));
    if about_state { BackendError::InvalidState(detail) } else { BackendError::Failed(detail) }
}

/// So much of an engine's words as somebody reads, in one line.
fn clipped(words: &str) -> String {
    const MOST: usize = 600;
    let mut line: String = words.chars().take(MOST).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if words.chars().nth(MOST).is_some() {
        line.push('…');
    }
    line
}

/// The innermost error, which names the reason: `Permission denied (os error 13)`.
pub(super) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut inner = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

/// As people know ids.
fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    use super::*;

    /// An engine that reads one request and then answers with these bytes and hangs up, or never answers.
    fn engine(answer: Option<&'static str>) -> (tempfile::TempDir, Client) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("docker.sock")).unwrap();
        tokio::spawn(async move {
            let mut held = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                match answer {
                    Some(answer) => drop(stream.write_all(answer.as_bytes()).await),
                    None => held.push(stream),
                }
            }
        });
        let client = Client::new(folder.path().join("docker.sock"));
        (folder, client)
    }

    #[tokio::test]
    async fn a_missing_socket_is_unavailable_and_says_what_to_do() {
        let Err(BackendError::Unavailable(words)) = Client::new("/nowhere/docker.sock".into()).version().await else {
            panic!("not unavailable")
        };
        assert!(words.contains("/nowhere/docker.sock") && words.contains("systemctl status docker"), "{words}");
    }

    #[tokio::test]
    async fn a_socket_that_nobody_serves_is_unavailable_for_reads_and_changes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docker.sock");
        drop(UnixListener::bind(&path).unwrap());
        let client = Client::new(path);
        for error in [client.version().await.unwrap_err(), client.start("abc").await.unwrap_err()] {
            let BackendError::Unavailable(words) = error else { panic!("{error:?}") };
            assert!(words.contains("refused"), "{words}");
        }
    }

    #[tokio::test]
    async fn a_connection_that_breaks_leaves_a_change_unknown_and_a_read_undone() {
        for broken in ["", "HTTP/1.1 200 OK\r\n"] {
            let (_folder, client) = engine(Some(broken));
            assert!(matches!(client.version().await, Err(BackendError::Unavailable(_))));
            let Err(BackendError::Timeout(words)) = client.update("abc", ContainerUpdateBody::default()).await else {
                panic!("not unknown")
            };
            assert!(words.contains("unknown"), "{words}");
        }
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_no_answer() {
        let (_folder, client) = engine(Some("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"Version\":"));
        assert!(matches!(client.version().await, Err(BackendError::Unavailable(_))));
    }

    #[tokio::test]
    async fn events_tell_ids_until_the_stream_breaks() {
        let (_folder, client) = engine(Some(concat!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n",
            r#"{"Type":"container","Action":"update","Actor":{"ID":"c60e8af7","Attributes":{"name":"web"}},"time":1}"#,
            "\n",
            r#"{"Type":"container","Action":"die","Actor":{"ID":"abcdef01"},"time":2}"#,
            "\n",
        )));
        let events: Vec<_> = client.events(Duration::ZERO, None).unwrap().collect().await;
        assert_eq!(events, [Ok("c60e8af7".into()), Ok("abcdef01".into())]);
        let docker = crate::backend::docker::Docker::new(client.socket().to_owned());
        let (send, mut notices) = tokio::sync::mpsc::channel(8);
        let ended = crate::backend::Backend::watch(&docker, send).await;
        assert!(matches!(&ended, BackendError::Unavailable(why) if why.contains("systemctl")), "{ended:?}");
        assert_eq!(notices.recv().await, Some(crate::backend::Notice::All));
        assert_eq!(notices.recv().await, Some(crate::backend::Notice::Instance("c60e8af7".into())));
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_hangs_ends_by_our_deadline() {
        let (_folder, client) = engine(None);
        let began = Instant::now();
        assert!(matches!(client.version().await, Err(BackendError::Timeout(_))));
        assert!(matches!(client.start("abc").await, Err(BackendError::Timeout(_))));
        assert!(began.elapsed() < READ);
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_that_hangs_is_under_way_until_the_engine_lets_go() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("docker.sock")).unwrap();
        let client = Client::new(folder.path().join("docker.sock"));
        assert!(matches!(client.start("abc").await, Err(BackendError::Timeout(_))));
        assert!(client.is_changing("abc") && !client.is_changing("abd"));
        drop(listener);
        while client.is_changing("abc") {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn requests_bear_no_api_version() {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("docker.sock")).unwrap();
        let client = Client::new(folder.path().join("docker.sock"));
        let heard = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 4096];
            let length = stream.read(&mut request).await.unwrap();
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        let _ = client.inspect("web").await;
        assert!(heard.await.unwrap().starts_with("GET /containers/web/json "));
    }

    #[test]
    fn refusals_keep_dockers_words_and_find_their_code() {
        let error = |what, status, message| refused(what, status, message);
        assert!(matches!(error("inspect web", 404, "No such container: web"), BackendError::NotFound(_)));
        assert!(matches!(error("start a", 409, "cannot start a paused container"), BackendError::InvalidState(_)));
        assert!(
            matches!(error("update a", 409, "Conflicting options"), BackendError::Failed(w) if w.contains("Conflicting"))
        );
        assert!(matches!(error("update a", 409, "container is marked for removal"), BackendError::InvalidState(_)));
        assert!(matches!(error("update a", 400, "Minimum memory limit"), BackendError::Failed(_)));
        assert!(matches!(error("update a", 500, "runc did not"), BackendError::Failed(_)));
        let prefix = "Multiple IDs found with provided prefix: abcdef";
        assert!(matches!(error("inspect abcdef", 400, prefix), BackendError::Ambiguous(_)));
    }
}
