//! The lab: real engines (Docker, libvirt with QEMU) started privately for a test, and the daemon started among them.
//! Everything lives below one temporary folder and in namespaces and cgroups of its own; nothing of the machine is used
//! or changed, and nothing outlives the test process, however that ends.

mod agentd;
pub(crate) mod daemon;
mod docker;
mod guest;
mod guest_image;
mod host;
pub(crate) mod http;
mod liar;
mod libvirt;
mod lxd;
mod namespace;
mod prometheus;
mod testdriver;
mod tmux;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

pub use agentd::{Agentd, Builder as AgentdBuilder, CtlOutput, binary, target_folder};
pub use docker::{CgroupPaths, Docker};
pub use guest::{Domain, Guest, Stat, vcpu_threads};
pub use guest_image::GuestImage;
pub use host::Host;
pub use http::{Events, Response};
pub use liar::{Liar, Lie};
pub use libvirt::Libvirt;
pub use lxd::Lxd;
pub use namespace::Lab;
pub use prometheus::{Prometheus, promtool};
pub use testdriver::{TestNode, test_domain};
pub use tmux::Tmux;

/// How often a condition is looked at.
const PAUSE: Duration = Duration::from_millis(20);

/// Looks at `probe` until it gives a value, and fails with `what` and the last error once `limit` has passed.
///
/// An error of the probe counts as "not yet": what is waited for (a socket, a file) often isn't there at first.
pub fn wait_until<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        let last = match probe() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if start.elapsed() >= limit {
            let waited = format!("waited {:.1} s in vain for {what}", start.elapsed().as_secs_f64());
            match last {
                Some(error) => return Err(error).context(waited),
                None => bail!(waited),
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// Makes the calling thread another user's, for what it connects to from now on.
///
/// # Errors
/// We are not root.
pub fn become_user(uid: u32) -> Result<()> {
    // SAFETY: a system call that takes numbers and changes the ids of this thread only. glibc's own function would change
    // those of all threads.
    let done = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, -1_i64, i64::from(uid), -1_i64) };
    anyhow::ensure!(done == 0, "{}", std::io::Error::last_os_error());
    Ok(())
}

/// What a finished command printed to standard output; an error that shows all of it where it did not end with 0.
pub(crate) fn stdout_of(command: &mut std::process::Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{:?} ended with {}: {}{}", command.get_program(), output.status, stderr.trim_end(), stdout.trim_end());
    }
    Ok(stdout)
}
