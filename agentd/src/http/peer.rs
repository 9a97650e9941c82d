//! Who is at the other end of a connection: uid, gid and pid as the kernel tells them, the groups as the user database has
//! them. Decisions go by uid and gids; pid and command name are for the record.

use agentd_core::access::Caller;
use agentd_core::error::{Code, Problem};
use agentd_core::operation::Who;
use nix::errno::Errno;
use nix::unistd::{Gid, Uid, User, getgrouplist};
use tokio::net::unix::UCred;

use crate::engine::Peer;

/// The longest command name that is recorded; the kernel's own bound is 15.
const COMMAND_BYTES: usize = 64;

/// Whom the kernel names, and the command of that moment: a process may be gone, and its pid another's, a request later.
pub(super) fn connected(credentials: UCred) -> Who {
    let (uid, gid, pid) = (credentials.uid(), credentials.gid(), credentials.pid().unwrap_or(0));
    let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let command = command.trim_end().chars().filter(|c| !c.is_control()).take(COMMAND_BYTES).collect();
    Who { uid, gid, pid, command }
}

/// A caller with the groups that it has now. For each request: who is taken out of a group loses its rights with the next one,
/// not when it hangs up; but for the group that the calling process runs as (`newgrp`), which is the kernel's word. Root needs
/// none.
///
/// # Errors
/// The user database does not answer.
pub(super) async fn identify(who: Who) -> Result<Peer, Problem> {
    let (uid, gid) = (who.uid, who.gid);
    // The user database may be far away and slow: nobody else waits for it.
    let groups = match uid {
        0 => Ok(Vec::new()),
        _ => tokio::task::spawn_blocking(move || supplementary(uid, gid)).await.unwrap_or(Err(Errno::EIO)),
    };
    match groups {
        Ok(groups) => Ok(Peer { caller: Caller { uid, gid, groups }, who }),
        Err(error) => {
            let detail = format!("the groups of uid {uid} can't be looked up: {error}");
            tracing::warn!(uid, "{detail}");
            Err(Problem::new(Code::Overloaded, detail)
                .hint("nothing was done; try again, and look at the host's user database"))
        }
    }
}

/// The groups that the user database gives a user now. A uid without an entry has none but its own.
fn supplementary(uid: u32, gid: u32) -> Result<Vec<u32>, Errno> {
    let Some(user) = User::from_uid(Uid::from_raw(uid))? else { return Ok(Vec::new()) };
    let Ok(name) = std::ffi::CString::new(user.name) else { return Ok(Vec::new()) };
    Ok(getgrouplist(&name, Gid::from_raw(gid))?.into_iter().map(Gid::as_raw).collect())
}
