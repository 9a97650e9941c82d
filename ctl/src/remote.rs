//! `--host`: the agentd of another machine. The system's own ssh makes its socket one of ours for as long as the command runs,
//! so who asks is the user that ssh logged in, as agentd sees every caller; agentd itself listens on no network.

use std::io;
use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use openssh::{ControlPersist, Error, ForwardType, KnownHosts, Session, SessionBuilder};
use tempfile::TempDir;
use tokio::runtime::Builder;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::client::Client;
use crate::error::Failure;

/// What an address begins with.
const SCHEME: &str = "ssh://";
/// How long ssh may take to connect.
const CONNECT_TIME: Duration = Duration::from_secs(15);
/// How long all of it may take, until there is a socket here.
const SETUP_TIME: Duration = Duration::from_secs(30);
/// How often a silent connection is asked for a sign of life.
const ALIVE: Duration = Duration::from_secs(15);
/// How long ssh outlives a ctl that was killed with SIGKILL, in seconds.
const LINGER: usize = 30;

/// An agentd's socket on another machine, as one of ours. Closed when it is dropped, and when ctl is interrupted.
#[derive(Debug)]
pub(crate) struct Tunnel {
    socket: PathBuf,
    end: Option<oneshot::Sender<()>>,
    keeper: Option<JoinHandle<()>>,
}

impl Tunnel {
    /// Connects `ssh://[USER@]HOST[:PORT]`. Asks nothing of anybody: a key or an agent, and a host key that is known.
    pub(crate) fn open(address: &str, socket: &Path) -> Result<Self, Failure> {
        check(address, socket)?;
        let failed = |why: String| {
            let hint = format!("try it by hand: ssh {address}; it must not ask for anything");
            Failure::unreachable(format!("ssh to {address} failed: {why}"), hint)
        };
        let local = |error: io::Error| failed(format!("nothing can be set up for it here: {error}"));
        // Open to nobody else: whoever can connect to what is in it asks as we do.
        let folder = tempfile::Builder::new().prefix("ctl-").tempdir().map_err(local)?;
        let ours = folder.path().join("agentd.sock");
        let (end, ended) = oneshot::channel();
        let (tell, told) = mpsc::channel();
        let (to, there, here) = (address.to_owned(), socket.to_owned(), ours.clone());
        let keeper = std::thread::Builder::new()
            .name("ssh".into())
            .spawn(move || keep(&to, &there, &here, folder, &tell, ended))
            .map_err(local)?;
        let tunnel = Tunnel { socket: ours, end: Some(end), keeper: Some(keeper) };
        told.recv().unwrap_or_else(|_| Err("its thread ended".into())).map_err(failed)?;
        tunnel.answers(address, socket)?;
        Ok(tunnel)
    }

    /// The socket here.
    pub(crate) fn socket(&self) -> PathBuf {
        self.socket.clone()
    }

    /// ssh takes each connection, and closes it at once where there is nothing behind it: told now, that is "not reached", and
    /// not a change of which nobody knows what became.
    fn answers(&self, address: &str, socket: &Path) -> Result<(), Failure> {
        // A refusal is an answer.
        match Client::new(&self.socket).get_within("/v1/sizes", CONNECT_TIME) {
            Err(failure) if failure.code == Failure::UNREACHABLE => Err(Failure::unreachable(
                format!("ssh reached {address}, and no agentd answers at {} there", socket.display()),
                "there: is it running (systemctl status agentd), is that user in the socket's group (id), does sshd forward \
                 sockets (AllowStreamLocalForwarding)?"
                    .into(),
            )),
            _ => Ok(()),
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(keeper) = self.keeper.take() {
            // It has nothing to tell.
            let _ = keeper.join();
        }
    }
}

/// Runs on a thread of its own until `ended`. An interrupted ctl leaves no ssh and no folder behind either.
fn keep(
    address: &str,
    there: &Path,
    here: &Path,
    folder: TempDir,
    tell: &mpsc::Sender<Result<(), String>>,
    ended: oneshot::Receiver<()>,
) {
    let runtime = Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string());
    let kept = runtime.and_then(|runtime| runtime.block_on(hold(address, there, here, folder.path(), tell, ended)));
    drop(folder);
    match kept {
        // As a shell tells of a command that a signal has ended.
        Ok(Some(signal)) => {
            crate::top::restore();
            exit(128 + signal.as_raw_value())
        }
        Ok(None) => {}
        // Who asked has gone where nobody listens.
        Err(why) => drop(tell.send(Err(why))),
    }
}

/// Connects, tells that it has, and holds the connection; what ended it, where that was a signal.
async fn hold(
    address: &str,
    there: &Path,
    here: &Path,
    folder: &Path,
    tell: &mpsc::Sender<Result<(), String>>,
    ended: oneshot::Receiver<()>,
) -> Result<Option<SignalKind>, String> {
    let (mut interrupt, mut terminate) = signals().map_err(|error| error.to_string())?;
    let session = tokio::select! {
        session = timeout(SETUP_TIME, forward(address, there, here, folder)) => match session {
            Ok(session) => session.map_err(|error| reason(&error))?,
            Err(_) => return Err(format!("it took more than {} s", SETUP_TIME.as_secs())),
        },
        _ = interrupt.recv() => return Ok(Some(SignalKind::interrupt())),
        _ = terminate.recv() => return Ok(Some(SignalKind::terminate())),
    };
    drop(tell.send(Ok(())));
    let by = tokio::select! {
        _ = ended => None,
        _ = interrupt.recv() => Some(SignalKind::interrupt()),
        _ = terminate.recv() => Some(SignalKind::terminate()),
    };
    // It ends by itself soon; there is nobody to tell.
    let _ = session.close().await;
    Ok(by)
}

fn signals() -> io::Result<(Signal, Signal)> {
    Ok((signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?))
}

/// One ssh that runs nothing there: the forward alone.
async fn forward(address: &str, there: &Path, here: &Path, folder: &Path) -> Result<Session, Error> {
    let mut builder = SessionBuilder::default();
    builder
        .known_hosts_check(KnownHosts::Strict)
        .connect_timeout(CONNECT_TIME)
        .server_alive_interval(ALIVE)
        .control_directory(folder);
    if let Some(linger) = std::num::NonZeroUsize::new(LINGER) {
        builder.control_persist(ControlPersist::IdleFor(linger));
    }
    let session = builder.connect_mux(address).await?;
    session.request_port_forward(ForwardType::Local, here.to_owned(), there.to_owned()).await?;
    Ok(session)
}

/// Whether ssh may be given this.
fn check(address: &str, socket: &Path) -> Result<(), Failure> {
    let rest = address.strip_prefix(SCHEME).unwrap_or_default();
    let host = rest.rsplit_once('@').map_or(rest, |(_, host)| host);
    // ssh would read the first as an option; colons and brackets it reads in more than one way.
    let strange = rest.starts_with('-') || host.is_empty() || host.starts_with(['-', ':']);
    let strange = strange || host.matches(':').count() > 1 || host.contains(['[', ']']);
    if strange || rest.contains(|c: char| c.is_whitespace() || c.is_control() || c == '/') {
        return Err(Failure::usage(
            format!("{address:?} is no host to connect to"),
            "it is ssh://USER@HOST or ssh://HOST, with :PORT where that isn't 22; what else ssh needs, and an IPv6 address, \
             goes into ~/.ssh/config"
                .into(),
        ));
    }
    if !socket.is_absolute() || socket.as_os_str().as_encoded_bytes().contains(&b':') {
        let detail = format!("{} is no socket that ssh can forward", socket.display());
        return Err(Failure::usage(detail, "with --host, --socket is an absolute path there, without a colon".into()));
    }
    Ok(())
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
        let socket = Path::new("/run/agentd/agentd.sock");
        for good in ["ssh://kvm1", "ssh://ops@kvm1.example.org", "ssh://ops@kvm1:2222"] {
            assert!(check(good, socket).is_ok(), "{good}");
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
            "ssh://[fe80::1]:22",
            "ssh://fe80::1",
        ] {
            assert_eq!(check(bad, socket).unwrap_err().exit, 2, "{bad}");
        }
        for bad in ["agentd.sock", "/run/a:b"] {
            assert_eq!(check("ssh://kvm1", Path::new(bad)).unwrap_err().exit, 2, "{bad}");
        }
    }
}
