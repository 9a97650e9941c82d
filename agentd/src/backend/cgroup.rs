//! What the kernel enforces for a cgroup, version 1 or 2: read below the root without following a link, never by a path that
//! a caller sent. `counters.rs` has what it has counted.

mod counters;
#[cfg(feature = "fake")]
pub(super) mod fuzzing;

mod freezer;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use agentd_core::units::{ByteCount, Cpus, Limit};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

/// From here on the kernel takes a memory limit for none: the greatest whole number of pages, of 64 KiB at most.
const NO_MEMORY_LIMIT: u64 = i64::MAX.unsigned_abs() - 0xffff;

/// Where the cgroups and processes of a host are.
#[derive(Debug, Clone)]
pub(super) struct Host {
    /// `/sys/fs/cgroup`
    pub(super) cgroups: PathBuf,
    /// `/proc`
    pub(super) processes: PathBuf,
    /// One tree for all controllers (version 2).
    pub(super) unified: bool,
}

/// What a cgroup says. `None` where it can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Seen {
    pub(super) cpus: Option<Limit<Cpus>>,
    pub(super) memory: Option<Limit<ByteCount>>,
    /// In use, without the inactive file cache: the number that `docker stats` shows.
    pub(super) used: Option<ByteCount>,
}

impl Host {
    /// This host's. Version 2 is told by the file system that is mounted: a hybrid layout has tmpfs there and keeps CPU
    /// and memory in version 1.
    pub(super) fn new() -> Self {
        let cgroups = PathBuf::from("/sys/fs/cgroup");
        let unified = statfs(&cgroups).is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
        Host { cgroups, processes: PathBuf::from("/proc"), unified }
    }

    /// The limits and the use of the container `id`, whose main process is `pid`.
    pub(super) fn look(&self, pid: u32, id: &str) -> Seen {
        let list = self.processes.join(pid.to_string()).join("cgroup");
        let Ok(list) = std::fs::read_to_string(list) else { return Seen::default() };
        if self.unified { self.look_unified(&list, id) } else { self.look_legacy(&list, id) }
    }

    /// Whether this process runs, and is one of the container `id`.
    pub(super) fn has(&self, pid: u32, id: &str) -> bool {
        let list = std::fs::read_to_string(self.processes.join(pid.to_string()).join("cgroup")).unwrap_or_default();
        let controller = if self.unified { None } else { Some("memory") };
        controller_path(&list, controller).is_some_and(|(_, path)| own_path(path, id).is_some())
    }

    /// The limits and the use of the cgroup at this path below the root, `None` where there is no such cgroup. A limit is
    /// `None` where its controller is off there.
    pub(super) fn look_at(&self, path: &str) -> Option<Seen> {
        if self.unified {
            return Some(read_unified(&open_below(&self.cgroups, path)?));
        }
        let open = |controller: &str| open_below(&self.cgroups.join(controller), path);
        let (cpu, memory) = (open("cpu"), open("memory"));
        let there = cpu.is_some() || memory.is_some() || open("systemd").is_some();
        there.then(|| read_legacy(cpu.as_ref(), memory.as_ref()))
    }

    /// What tells a cgroup from a later one at the same path: the number of its folder.
    pub(super) fn number_of(&self, path: &str) -> Option<u64> {
        let roots = ["cpu", "memory"].map(|controller| self.cgroups.join(controller));
        let folder = if self.unified {
            open_below(&self.cgroups, path)
        } else {
            roots.iter().find_map(|root| open_below(root, path))
        };
        Some(nix::sys::stat::fstat(folder?).ok()?.st_ino)
    }

    /// The names of the cgroups right below this path.
    pub(super) fn names_below(&self, path: &str) -> Vec<String> {
        let root = if self.unified { self.cgroups.clone() } else { self.cgroups.join("systemd") };
        // Opened as a path; read by way of /proc, which is that same folder.
        let Some(folder) = open_below(&root, path) else { return Vec::new() };
        let entries = std::fs::read_dir(format!("/proc/self/fd/{}", folder.as_raw_fd()));
        let entries = entries.into_iter().flatten().filter_map(Result::ok);
        let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        folders.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    fn look_unified(&self, list: &str, id: &str) -> Seen {
        let Some(path) = controller_path(list, None).and_then(|(_, path)| own_path(path, id)) else {
            return Seen::default();
        };
        open_below(&self.cgroups, path).map(|folder| read_unified(&folder)).unwrap_or_default()
    }

    fn look_legacy(&self, list: &str, id: &str) -> Seen {
        let open = |controller: &str| {
            let (mount, path) = controller_path(list, Some(controller))?;
            let path = own_path(path, id)?;
            // Where controllers are mounted together the folder bears the whole list, `cpu,cpuacct`; the single names
            // beside it are links.
            open_below(&self.cgroups.join(mount), path).or_else(|| open_below(&self.cgroups.join(controller), path))
        };
        read_legacy(open("cpu").as_ref(), open("memory").as_ref())
    }
}

fn read_unified(folder: &OwnedFd) -> Seen {
    let current = read_at(folder, "memory.current").and_then(|text| number(&text));
    let stat = read_at(folder, "memory.stat").unwrap_or_default();
    Seen {
        cpus: read_at(folder, "cpu.max").and_then(|text| parse_cpu_max(&text)),
        memory: read_at(folder, "memory.max").and_then(|text| parse_memory(&text)),
        used: working_set(current, &stat, "inactive_file"),
    }
}

fn read_legacy(cpu: Option<&OwnedFd>, memory: Option<&OwnedFd>) -> Seen {
    let mut seen = Seen::default();
    if let Some(folder) = cpu {
        let quota = read_at(folder, "cpu.cfs_quota_us").and_then(|text| text.trim().parse().ok());
        let period = read_at(folder, "cpu.cfs_period_us").and_then(|text| text.trim().parse().ok());
        seen.cpus = quota.zip(period).map(|(quota, period)| cpus_of_quota(quota, period));
    }
    if let Some(folder) = memory {
        let usage = read_at(folder, "memory.usage_in_bytes").and_then(|text| number(&text));
        let stat = read_at(folder, "memory.stat").unwrap_or_default();
        seen.memory = read_at(folder, "memory.limit_in_bytes").and_then(|text| parse_memory(&text));
        seen.used = working_set(usage, &stat, "total_inactive_file");
    }
    seen
}

/// The line of a controller in `/proc/PID/cgroup` (cgroups(7)): the list of controllers it is mounted with and the path.
/// `None` asks for the line of version 2.
fn controller_path<'a>(list: &'a str, controller: Option<&str>) -> Option<(&'a str, &'a str)> {
    list.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (hierarchy, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let fits = match controller {
            Some(controller) => controllers.split(',').any(|name| name == controller),
            None => hierarchy == "0" && controllers.is_empty(),
        };
        fits.then_some((controllers, path))
    })
}

/// The container's own cgroup: the path up to the part that bears its full id (`/docker/ID`, `/system.slice/docker-ID.scope`).
/// What lies below was made inside the container; a path without the id is that of another process, which got the same
/// process id in between.
fn own_path<'a>(path: &'a str, id: &str) -> Option<&'a str> {
    if id.is_empty() {
        return None;
    }
    let at = path.find(id)? + id.len();
    let end = path[at..].find('/').map_or(path.len(), |slash| at + slash);
    path.get(..end)
}

/// Opens a folder below `root`, following no link and leaving it nowhere. Part by part, since openat2(2) needs Linux 5.6.
fn open_below(root: &Path, path: &str) -> Option<OwnedFd> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_PATH;
    let mut folder = nix::fcntl::open(root, flags, Mode::empty()).ok()?;
    for part in path.split('/').filter(|part| !part.is_empty()) {
        if part == ".." {
            return None;
        }
        folder = openat(folder.as_fd(), part, flags | OFlag::O_NOFOLLOW, Mode::empty()).ok()?;
    }
    Some(folder)
}

fn read_at(folder: &OwnedFd, name: &str) -> Option<String> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let file = openat(folder.as_fd(), name, flags, Mode::empty()).ok()?;
    let mut text = String::new();
    File::from(file).take(64 * 1024).read_to_string(&mut text).ok()?;
    Some(text)
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// `max 100000` or `150000 100000`.
fn parse_cpu_max(text: &str) -> Option<Limit<Cpus>> {
    let mut words = text.split_whitespace();
    let (quota, period) = (words.next()?, words.next()?.parse().ok()?);
    let quota = if quota == "max" { -1 } else { quota.parse().ok()? };
    Some(cpus_of_quota(quota, period))
}

/// `max`, or bytes; version 1 writes "no limit" as the greatest number of whole pages.
fn parse_memory(text: &str) -> Option<Limit<ByteCount>> {
    match text.trim() {
        "max" => Some(Limit::Unlimited),
        bytes => Some(memory_of_bytes(bytes.parse().ok()?)),
    }
}

/// A quota in microseconds a period as CPUs, to the nearest thousandth. Setting and reading both round to the nearest, so
/// that every value reads back as it was set for any period that Docker takes.
pub(super) fn cpus_of_quota(quota: i64, period: i64) -> Limit<Cpus> {
    match (u64::try_from(quota), u64::try_from(period)) {
        (Ok(quota), Ok(period)) if quota > 0 && period > 0 => {
            let millis = (u128::from(quota) * 1000 + u128::from(period) / 2) / u128::from(period);
            Limit::At(u64::try_from(millis).map_or(Cpus::MAX, Cpus::from_millis))
        }
        _ => Limit::Unlimited,
    }
}

/// A memory limit in bytes, where the greatest numbers are the kernel's way to say none.
pub(super) fn memory_of_bytes(bytes: u64) -> Limit<ByteCount> {
    match ByteCount::new(bytes) {
        Some(count) if bytes < NO_MEMORY_LIMIT => Limit::At(count),
        _ => Limit::Unlimited,
    }
}

fn working_set(usage: Option<u64>, stat: &str, key: &str) -> Option<ByteCount> {
    let inactive = stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ').and_then(number));
    ByteCount::new(usage?.saturating_sub(inactive.unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const ID: &str = "c60e8af7eff2d8e6ad101151c6d4ed02505b278dceac08e04253641bc5ce5078";

    fn write(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn host(root: &Path, unified: bool) -> Host {
        Host { cgroups: root.join("cgroup"), processes: root.join("proc"), unified }
    }

    fn cpus(millis: u64) -> Option<Limit<Cpus>> {
        Some(Limit::At(Cpus::from_millis(millis)))
    }

    fn mib(mib: u32) -> Option<Limit<ByteCount>> {
        Some(Limit::At(ByteCount::mib(mib)))
    }

    #[test]
    fn version_2_is_read_from_the_containers_own_scope_even_if_its_process_moved_below() {
        let root = tempfile::tempdir().unwrap();
        let scope = format!("system.slice/docker-{ID}.scope");
        write(root.path(), "proc/7/cgroup", &format!("0::/{scope}/init.scope\n"));
        write(root.path(), &format!("cgroup/{scope}/cpu.max"), "150000 100000\n");
        write(root.path(), &format!("cgroup/{scope}/memory.max"), "67108864\n");
        write(root.path(), &format!("cgroup/{scope}/memory.current"), "3145728\n");
        write(
            root.path(),
            &format!("cgroup/{scope}/memory.stat"),
            "anon 5\ninactive_file_x 9\ninactive_file 1048576\n",
        );
        write(root.path(), &format!("cgroup/{scope}/init.scope/cpu.max"), "max 100000\n");
        let seen = host(root.path(), true).look(7, ID);
        assert_eq!(seen, Seen { cpus: cpus(1500), memory: mib(64), used: Some(ByteCount::mib(2)) });
    }

    #[test]
    fn version_1_is_read_from_each_controller() {
        let root = tempfile::tempdir().unwrap();
        let list = format!("4:memory:/docker/{ID}\n1:cpu,cpuacct:/docker/{ID}\n0::/docker/{ID}\n");
        write(root.path(), "proc/7/cgroup", &list);
        write(root.path(), &format!("cgroup/cpu,cpuacct/docker/{ID}/cpu.cfs_quota_us"), "33333\n");
        write(root.path(), &format!("cgroup/cpu,cpuacct/docker/{ID}/cpu.cfs_period_us"), "50000\n");
        write(root.path(), &format!("cgroup/memory/docker/{ID}/memory.limit_in_bytes"), "9223372036854771712\n");
        write(root.path(), &format!("cgroup/memory/docker/{ID}/memory.usage_in_bytes"), "4096\n");
        write(root.path(), &format!("cgroup/memory/docker/{ID}/memory.stat"), "total_inactive_file 8192\n");
        let seen = host(root.path(), false).look(7, ID);
        assert_eq!(seen, Seen { cpus: cpus(667), memory: Some(Limit::Unlimited), used: Some(ByteCount::ZERO) });
    }

    #[test]
    fn another_process_under_the_same_pid_is_not_taken_for_the_container() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "proc/7/cgroup", "0::/system.slice/ssh.service\n");
        write(root.path(), "cgroup/system.slice/ssh.service/cpu.max", "150000 100000\n");
        assert_eq!(host(root.path(), true).look(7, ID), Seen::default());
        assert_eq!(host(root.path(), true).look(8, ID), Seen::default());
    }

    #[test]
    fn links_and_ways_out_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "cgroup/real/cpu.max", "max 100000\n");
        std::os::unix::fs::symlink("real", root.path().join("cgroup/link")).unwrap();
        let top = root.path().join("cgroup");
        assert!(open_below(&top, "/real").is_some());
        assert!(open_below(&top, "/link").is_none());
        assert!(open_below(&top, "/real/../real").is_none());
        assert!(open_below(&top, "/../proc").is_none());
    }

    #[test]
    fn numbers_that_make_no_sense_are_unknown_and_none_is_none() {
        assert_eq!(parse_cpu_max("max 100000\n"), Some(Limit::Unlimited));
        assert_eq!(parse_cpu_max("100000"), None);
        assert_eq!(parse_cpu_max("a b"), None);
        assert_eq!(parse_memory("max\n"), Some(Limit::Unlimited));
        assert_eq!(parse_memory("-5"), None);
        assert_eq!(parse_memory(""), None);
    }
}
