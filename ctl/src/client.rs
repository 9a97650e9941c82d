//! The client of agentd's API: one request, one reply, over the Unix socket. Knows HTTP, and what it means for a change
//! when a connection breaks; knows no command and prints nothing.
//!
//! `ureq` over a transport of our own. Measured: one question from `exec` to exit takes 1.5 ms with it and 1.4 ms with
//! hyper on tokio, of which 0.6 ms are any process's, at the same size of binary. So start time does not decide; ctl asks
//! one thing at a time, and blocking calls with deadlines are the plainer code for that. Our own reading of HTTP on
//! `httparse` would win nothing and own the lengths and chunks. ureq's transport traits are outside of its semver promise,
//! hence the `~` in Cargo.toml; `socket.rs` is all that depends on them.

mod pages;
mod socket;

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use agentd_core::instance::{Ref, Target};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use crate::error::Failure;
pub(crate) use pages::all_pages;
use socket::{ConnectFailed, Connection};

/// How long a reply to a question may take.
const QUESTION_TIME: Duration = Duration::from_secs(30);
/// How long the reply to a change may take. The server takes waits of up to an hour, and another change of the same
/// instance may go first.
const CHANGE_TIME: Duration = Duration::from_secs(130 * 60);
/// How long a look at a change's progress may take.
pub(crate) const GLANCE_TIME: Duration = Duration::from_secs(2);
/// The largest reply that is read: more than a thousand instances.
const LARGEST_REPLY: u64 = 64 << 20;
/// The pauses before a change whose connection broke is asked for again, together about as long as a restart of agentd.
const RETRY_PAUSES: [Duration; 5] = [
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_millis(1000),
    Duration::from_millis(1500),
    Duration::from_millis(2000),
];

/// Everything but RFC 3986's unreserved characters.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A text as one path segment or one query value.
pub(crate) fn encode(text: &str) -> String {
    utf8_percent_encode(text, RESERVED).to_string()
}

/// The path of an instance.
pub(crate) fn instance_path(reference: &Ref) -> String {
    format!("/v1/instances/{}/{}", reference.kind(), encode(reference.name()))
}

/// A successful reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    /// The HTTP status, 2xx.
    pub(crate) status: u16,
    /// The JSON.
    pub(crate) body: String,
}

impl Reply {
    /// The JSON as a type of the API.
    pub(crate) fn read<T: serde::de::DeserializeOwned>(&self) -> Result<T, Failure> {
        serde_json::from_str(&self.body)
            .map_err(|error| Failure::internal(format!("agentd's reply can't be understood: {error}")))
    }
}

/// A change to be sent.
#[derive(Debug, Clone)]
pub(crate) struct Change {
    /// Where to.
    pub(crate) path: String,
    /// The JSON.
    pub(crate) body: String,
    /// Only at this version.
    pub(crate) if_version: Option<String>,
    /// Of which instance, for messages.
    pub(crate) reference: String,
}

/// How one request ended without a reply.
enum Broken {
    /// There was never a connection.
    Unconnected(ConnectFailed),
    /// There was one; what the server did is unknown.
    Unanswered(String),
    /// The reply did not come in time.
    Late,
}

/// The client.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    agent: ureq::Agent,
    socket: PathBuf,
    /// The pauses before each new try.
    pauses: &'static [Duration],
}

impl Client {
    /// A client of the agentd behind this socket. Connects when it is asked something.
    pub(crate) fn new(socket: &Path) -> Self {
        let config = ureq::config::Config::builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .max_response_header_size(64 * 1024)
            .user_agent(concat!("ctl/", env!("CARGO_PKG_VERSION")))
            .build();
        let agent = ureq::Agent::with_parts(config, Connection::to(socket), socket::NoNames);
        Client { agent, socket: socket.to_owned(), pauses: &RETRY_PAUSES }
    }

    /// Asks a question, which may be asked again at will.
    pub(crate) fn get(&self, path: &str) -> Result<Reply, Failure> {
        self.get_within(path, QUESTION_TIME)
    }

    /// Asks a question, with a time of its own for the reply.
    pub(crate) fn get_within(&self, path: &str, time: Duration) -> Result<Reply, Failure> {
        let request = self.agent.get(address(path)).config().timeout_global(Some(time)).build();
        self.read(request.call()).map_err(|broken| self.unanswered(broken, time)).and_then(judge)
    }

    /// Asks for a reply that goes on, and gives its body as it comes: only its beginning has a deadline.
    pub(crate) fn stream(&self, path: &str) -> Result<impl Read + use<>, Failure> {
        let request = self.agent.get(address(path)).config().timeout_recv_response(Some(QUESTION_TIME)).build();
        let reply = request.call().map_err(|error| self.unanswered(broken(error), QUESTION_TIME))?;
        if !reply.status().is_success() {
            let refused = self.read(Ok(reply)).map_err(|broken| self.unanswered(broken, QUESTION_TIME))?;
            return Err(Failure::from_reply(refused.status, &refused.body));
        }
        Ok(reply.into_body().into_reader())
    }

    /// A reply that went on broke off.
    pub(crate) fn broke_off(&self, why: &io::Error) -> Failure {
        Failure::unreachable(
            format!("the connection to {} broke before the reply had ended: {why}", self.socket.display()),
            "agentd may have been stopped; see what it says: journalctl -u agentd".into(),
        )
    }

    fn unanswered(&self, broken: Broken, time: Duration) -> Failure {
        match broken {
            Broken::Unconnected(failed) => self.unreachable(&failed),
            Broken::Unanswered(why) => Failure::unreachable(
                format!("the connection to {} broke before the reply: {why}", self.socket.display()),
                "see what agentd says: journalctl -u agentd".into(),
            ),
            Broken::Late => Failure::unreachable(
                format!("agentd did not answer within {} s ({})", time.as_secs(), self.socket.display()),
                "see whether it is well: systemctl status agentd".into(),
            ),
        }
    }

    /// Asks for a change. Where the connection breaks after it was sent, it is asked for again under the same
    /// Idempotency-Key: the server carries it out once and gives the recorded outcome the second time.
    pub(crate) fn change(&self, change: &Change) -> Result<Reply, Failure> {
        let key = new_key()?;
        let deadline = Instant::now() + CHANGE_TIME;
        let mut pauses = self.pauses.iter();
        let mut first = None;
        loop {
            let why = match self.send(change, &key, deadline) {
                Ok(reply) if first.is_some() && reply.status == 503 => {
                    format!("asked again, agentd said: {}", Failure::from_reply(503, &reply.body).detail)
                }
                Ok(reply) => return judge(reply),
                Err(Broken::Unconnected(failed)) if first.is_none() => return Err(self.unreachable(&failed)),
                Err(Broken::Late) => return Err(unknown(change, "the reply did not come")),
                Err(Broken::Unconnected(ConnectFailed(error))) => format!("agentd can't be reached again: {error}"),
                Err(Broken::Unanswered(why)) => why,
            };
            let first = first.get_or_insert(why);
            match pauses.next() {
                Some(pause) => thread::sleep(*pause),
                None => return Err(unknown(change, first)),
            }
        }
    }

    /// The instance that was typed: as it is where the kind was given, else the one that the server finds.
    pub(crate) fn resolve(&self, text: &str) -> Result<Ref, Failure> {
        match text.parse::<Target>()? {
            Target::Full(reference) => Ok(reference),
            Target::Bare(name) => {
                let found: Value = self.get(&bare_path(&name))?.read()?;
                let reference = found.get("ref").cloned().unwrap_or_default();
                serde_json::from_value(reference)
                    .map_err(|error| Failure::internal(format!("agentd's reply names no instance: {error}")))
            }
        }
    }

    /// The instance that was typed, whole, in one request.
    pub(crate) fn look_up(&self, text: &str) -> Result<Reply, Failure> {
        self.get(&match text.parse::<Target>()? {
            Target::Full(reference) => instance_path(&reference),
            Target::Bare(name) => bare_path(&name),
        })
    }

    fn send(&self, change: &Change, key: &str, deadline: Instant) -> Result<Reply, Broken> {
        let time = deadline.saturating_duration_since(Instant::now());
        let mut request = self
            .agent
            .post(address(&change.path))
            .header("content-type", "application/json")
            .header("idempotency-key", key);
        if let Some(version) = &change.if_version {
            request = request.header("if-match", format!("\"{version}\""));
        }
        self.read(request.config().timeout_global(Some(time)).build().send(change.body.as_str()))
    }

    /// Reads a reply to its end.
    fn read(&self, reply: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Reply, Broken> {
        let mut reply = reply.map_err(broken)?;
        let status = reply.status().as_u16();
        let body = reply.body_mut().with_config().limit(LARGEST_REPLY).read_to_string().map_err(broken)?;
        Ok(Reply { status, body })
    }

    fn unreachable(&self, ConnectFailed(error): &ConnectFailed) -> Failure {
        use std::io::ErrorKind;
        let detail = format!("can't connect to {}: {error}", self.socket.display());
        let hint = match error.kind() {
            ErrorKind::PermissionDenied => {
                let group = socket::group_of(&self.socket).unwrap_or_else(|| "agentd, as a rule".into());
                let hint = format!("the socket is open to root and to its group, {group}; see who you are: id");
                return Failure::not_permitted(detail, hint);
            }
            ErrorKind::TimedOut | ErrorKind::WouldBlock => "it takes no connections; systemctl status agentd".into(),
            _ => "is agentd running? systemctl status agentd".into(),
        };
        Failure::unreachable(detail, hint)
    }
}

fn bare_path(name: &str) -> String {
    format!("/v1/instances?name={}", encode(name))
}

/// The authority is for HTTP's sake; the connector ignores it.
fn address(path: &str) -> String {
    format!("http://agentd{path}")
}

fn broken(error: ureq::Error) -> Broken {
    match error {
        ureq::Error::Timeout(_) => Broken::Late,
        ureq::Error::Other(other) => match other.downcast::<ConnectFailed>() {
            Ok(failed) => Broken::Unconnected(*failed),
            Err(other) => Broken::Unanswered(other.to_string()),
        },
        ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut => Broken::Late,
        ureq::Error::Io(error) => Broken::Unanswered(error.to_string()),
        other => Broken::Unanswered(other.to_string()),
    }
}

fn judge(reply: Reply) -> Result<Reply, Failure> {
    if (200..300).contains(&reply.status) { Ok(reply) } else { Err(Failure::from_reply(reply.status, &reply.body)) }
}

fn unknown(change: &Change, why: &str) -> Failure {
    Failure::outcome_unknown(
        format!("the change of {} was sent and its outcome is unknown: {why}", change.reference),
        format!("look before you try again: ctl show {}", change.reference),
    )
}

/// 128 random bits in hexadecimal.
fn new_key() -> Result<String, Failure> {
    let mut bytes = [0_u8; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| Failure::internal(format!("the kernel gives no random numbers: {error}")))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests;
