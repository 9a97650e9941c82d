//! `--host`: the agentd of another machine. The system's own ssh makes its socket one of ours for as long as the command runs,
//! so who asks is the user that ssh logged in, as agentd sees every caller; agentd itself listens on no network.

use std::path::{Path, PathBuf};
use std::time::Duration;

use openssh::{ControlPersist, Error, ForwardType, KnownHosts, Session, SessionBuilder};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

use crate::client::{Client, GLANCE_TIME};
use crate::error::Failure;

/// What an address begins with.
const SCHEME: &str = "ssh://";
/// How long ssh may take to connect.
const CONNECT_TIME: Duration = Duration::from_secs(15);
/// How often a silent connection is asked for a sign of life.
const ALIVE: Duration = Duration::from_secs(15);
/// How long ssh outlives a ctl that was killed, in seconds.
const LINGER: usize = 30;

/// An agentd's socket on another machine, as one of ours. Closed when it is dropped.
#[derive(Debug)]
pub(crate) struct Tunnel {
    runtime: Runtime,
    session: Option<Session>,
    /// Open to nobody else: whoever can connect to what is in it asks as we do.
    folder: TempDir,
}

impl Tunnel {
    /// Connects `ssh://[USER@]HOST[:PORT]`. Asks nothing of anybody: a key or an agent, and a host key that is known.
    pub(crate) fn open(address: &str, socket: &Path) -> Result<Self, Failure> {
        let destination = destination(address)?;
        let failed = |why: String| {
            let hint = format!("try it by hand: ssh {}", destination.trim_start_matches(SCHEME));
            Failure::unreachable(format!("ssh to {address} failed: {why}"), hint)
        };
        let local = |error: std::io::Error| failed(format!("nothing can be set up for it here: {error}"));
        let folder = tempfile::Builder::new().prefix("ctl-").tempdir().map_err(local)?;
        let runtime = Builder::new_current_thread().enable_all().build().map_err(local)?;
        let mut builder = SessionBuilder::default();
        builder
            .known_hosts_check(KnownHosts::Strict)
            .connect_timeout(CONNECT_TIME)
            .server_alive_interval(ALIVE)
            .control_directory(folder.path());
        if let Some(linger) = std::num::NonZeroUsize::new(LINGER) {
            builder.control_persist(ControlPersist::IdleFor(linger));
        }
        let mut tunnel = Tunnel { runtime, session: None, folder };
        let forwarded = tunnel.runtime.block_on(async {
            let session = builder.connect(&destination).await?;
            let (ours, theirs) = (tunnel.socket(), socket.to_owned());
            session.request_port_forward(ForwardType::Local, ours, theirs).await?;
            Ok(session)
        });
        tunnel.session = Some(forwarded.map_err(|error| failed(reason(&error)))?);
        tunnel.answers(address, socket)?;
        Ok(tunnel)
    }

    /// The socket here.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("agentd.sock")
    }

    /// ssh takes each connection, and closes it at once where there is nothing behind it: told now, that is "not reached", and
    /// not a change of which nobody knows what became.
    fn answers(&self, address: &str, socket: &Path) -> Result<(), Failure> {
        // A refusal is an answer.
        match Client::new(&self.socket()).get_within("/v1/sizes", GLANCE_TIME.max(CONNECT_TIME)) {
            Err(failure) if failure.code == Failure::UNREACHABLE => {
                let user = address.trim_start_matches(SCHEME).split_once('@').map_or("you", |(user, _)| user);
                Err(Failure::unreachable(
                    format!("ssh reached {address}, and no agentd answers at {} there", socket.display()),
                    format!(
                        "there: is it running (systemctl status agentd)? is {user} in the group of the socket (id)?"
                    ),
                ))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            // It ends by itself soon; there is nobody to tell.
            let _ = self.runtime.block_on(session.close());
        }
    }
}

/// The address as ssh may be given it.
fn destination(address: &str) -> Result<String, Failure> {
    let rest = address.strip_prefix(SCHEME).unwrap_or_default();
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    // ssh would read the first as an option.
    let strange = rest.starts_with('-') || host.is_empty() || host.starts_with(['-', ':']);
    if strange || rest.contains(|c: char| c.is_whitespace() || c.is_control() || c == '/') {
        return Err(Failure::usage(
            format!("{address:?} is no host to connect to"),
            "it is ssh://USER@HOST or ssh://HOST, with :PORT where that isn't 22; what else ssh needs is in ~/.ssh/config".into(),
        ));
    }
    Ok(address.to_owned())
}

/// The words of ssh itself.
fn reason(error: &Error) -> String {
    let own = match error {
        Error::Connect(why) | Error::Master(why) => why.to_string(),
        other => {
            let mut text = other.to_string();
            let mut source = std::error::Error::source(other);
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            text
        }
    };
    own.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_address_of_ssh_is_one() {
        for good in ["ssh://kvm1", "ssh://ops@kvm1.example.org", "ssh://ops@kvm1:2222", "ssh://[fe80::1]:22"] {
            assert!(destination(good).is_ok(), "{good}");
        }
        for bad in [
            "kvm1",
            "tcp://kvm1",
            "ssh://",
            "ssh://ops@",
            "ssh://-oProxyCommand=x",
            "ssh://a@-b",
            "ssh://a b",
            "ssh://a/b",
        ] {
            let failure = destination(bad).unwrap_err();
            assert_eq!(failure.exit, 2, "{bad}");
        }
    }
}
