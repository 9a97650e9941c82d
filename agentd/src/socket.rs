//! The listening socket: systemd's where it passes one, else our own. A path that a live agentd serves is refused; one that
//! a dead one left is taken over.

use std::io::{self, ErrorKind};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use tokio::net::UnixListener;

/// A socket, and the path to take away at the end where it is our own.
#[derive(Debug)]
pub struct Socket {
    /// The listener.
    pub listener: UnixListener,
    own_path: Option<PathBuf>,
}

impl Socket {
    /// Takes systemd's socket, else binds `path`. Call before threads are started: it sets the umask for a moment.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        if let Some(fd) = passed_by_systemd()? {
            let listener = StdListener::from(fd);
            listener.set_nonblocking(true)?;
            return Ok(Socket { listener: UnixListener::from_std(listener)?, own_path: None });
        }
        clear(path)?;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(|| format!("{} can't be made", folder.display()))?;
        }
        // Bound with no rights for others from the first moment on; the group is root's until systemd makes the socket.
        let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let bound = StdListener::bind(path);
        nix::sys::stat::umask(before);
        let listener = bound.with_context(|| format!("{} can't be bound", path.display()))?;
        if let Ok(Some(group)) = nix::unistd::Group::from_name("agentd")
            && nix::unistd::chown(path, None, Some(group.gid)).is_ok()
        {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
        }
        listener.set_nonblocking(true)?;
        Ok(Socket { listener: UnixListener::from_std(listener)?, own_path: Some(path.to_owned()) })
    }
}

/// What is to be taken away when the daemon ends.
#[derive(Debug)]
pub struct Leftover(Option<PathBuf>);

impl Socket {
    /// Takes the socket apart: the listener to serve, and what its path leaves to clean.
    pub fn split(self) -> (UnixListener, Leftover) {
        (self.listener, Leftover(self.own_path))
    }
}

impl Drop for Leftover {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // It may be gone already; nothing depends on it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Makes way at `path`, or says who is there.
fn clear(path: &Path) -> anyhow::Result<()> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("{} can't be looked at", path.display())),
    };
    if !metadata.file_type().is_socket() {
        bail!("{} is there and is not a socket; it is left alone", path.display());
    }
    match StdStream::connect(path) {
        Ok(_) => bail!("{} is served by another agentd; stop it first, or use another --socket", path.display()),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).with_context(|| format!("{} can't be taken over", path.display()))
        }
        Err(error) => Err(error).with_context(|| format!("whether {} is in use can't be told", path.display())),
    }
}

/// The one socket that the service manager passed, if it did (sd_listen_fds(3)).
fn passed_by_systemd() -> io::Result<Option<OwnedFd>> {
    let mut passed = sd_notify::listen_fds()?;
    let Some(fd) = passed.next() else { return Ok(None) };
    if passed.next().is_some() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "more than one socket was passed; one is expected"));
    }
    // SAFETY: the service manager passed this descriptor to this process, and nothing else here has taken it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) }))
}
