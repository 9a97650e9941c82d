//! Who is at the other end of a connection, as the kernel tells it. Decisions go by uid and gids; pid and command name are
//! for the record.

use agentd_core::access::Caller;
use agentd_core::operation::Who;
use nix::unistd::{Gid, Uid, User, getgrouplist};
use tokio::net::unix::UCred;

use crate::engine::Peer;

/// The longest command name that is recorded; the kernel's own bound is 15.
const COMMAND_BYTES: usize = 64;

/// Looks a peer's supplementary groups and command up. Done once, when it connects; may block.
pub(super) fn identify(credentials: UCred) -> Peer {
    let (uid, gid, pid) = (credentials.uid(), credentials.gid(), credentials.pid().unwrap_or(0));
    let command = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let command = command.trim_end().chars().filter(|c| !c.is_control()).take(COMMAND_BYTES).collect();
    let caller = Caller { uid, gid, groups: supplementary(uid, gid) };
    Peer { caller, who: Who { uid, gid, pid, command } }
}

/// The groups that the user database gives a user now. A uid without an entry has none but its own.
fn supplementary(uid: u32, gid: u32) -> Vec<u32> {
    let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) else { return Vec::new() };
    let Ok(name) = std::ffi::CString::new(user.name) else { return Vec::new() };
    match getgrouplist(&name, Gid::from_raw(gid)) {
        Ok(groups) => groups.into_iter().map(Gid::as_raw).collect(),
        Err(error) => {
            tracing::warn!(uid, %error, "the groups of a caller can't be looked up");
            Vec::new()
        }
    }
}
