//! Freezing a cgroup that the config gives a name: `cgroup.freeze` of version 2, the freezer controller of version 1, where a
//! cgroup of the same path must be there for it (cgroup-v2.rst, cgroup-v1/freezer-subsystem.rst).

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::{Host, open_below, read_at};

/// The freezer of one cgroup.
#[derive(Debug)]
pub(crate) struct Freezer {
    folder: OwnedFd,
    unified: bool,
}

impl Host {
    /// The freezer of the cgroup at this path; `None` where it has none.
    pub(crate) fn freezer_of(&self, path: &str) -> Option<Freezer> {
        let root = if self.unified { self.cgroups.clone() } else { self.cgroups.join("freezer") };
        let freezer = Freezer { folder: open_below(&root, path)?, unified: self.unified };
        freezer.is_frozen()?;
        // Of version 1 each controller has a tree of its own, and a process that is in one need not be in the other.
        let holds = |folder: &OwnedFd| {
            let own = read_at(&freezer.folder, "cgroup.procs").unwrap_or_default();
            let own: Vec<&str> = own.lines().collect();
            read_at(folder, "cgroup.procs").unwrap_or_default().lines().all(|process| own.contains(&process))
        };
        let others = ["cpu", "memory"].map(|controller| open_below(&self.cgroups.join(controller), path));
        (self.unified || others.iter().flatten().all(holds)).then_some(freezer)
    }
}

impl Freezer {
    /// Whether all its processes have come to rest; `None` where that can't be read.
    pub(crate) fn is_frozen(&self) -> Option<bool> {
        if self.unified {
            let events = read_at(&self.folder, "cgroup.events")?;
            return events.lines().find_map(|line| line.strip_prefix("frozen ")).map(|frozen| frozen == "1");
        }
        read_at(&self.folder, "freezer.state").map(|state| state.trim() == "FROZEN")
    }

    /// Asks its processes to rest, or to run on.
    pub(crate) fn freeze(&self, frozen: bool) -> std::io::Result<()> {
        let (name, value) = match (self.unified, frozen) {
            (true, true) => ("cgroup.freeze", "1"),
            (true, false) => ("cgroup.freeze", "0"),
            (false, true) => ("freezer.state", "FROZEN"),
            (false, false) => ("freezer.state", "THAWED"),
        };
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let file = openat(self.folder.as_fd(), name, flags, Mode::empty())?;
        File::from(file).write_all(value.as_bytes())
    }
}
