//! The QEMU process behind a domain: its start time, and how many vCPUs it really runs. After an unplug that timed out
//! only the threads tell; libvirt's own count can stay wrong for good, and asking QEMU's monitor taints the domain.

use std::fs;
use std::path::{Path, PathBuf};

/// A running QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    /// Its process id.
    pub(super) pid: u32,
    /// When it started, in clock ticks since the host's boot: with it a recycled domain id fools nobody.
    pub(super) start: u64,
    /// Its vCPU threads; `None` where their names don't tell.
    pub(super) vcpus: Option<u32>,
    /// Whether it emulates its vCPUs (TCG) in place of running them on the host's (KVM).
    pub(super) emulates: bool,
}

impl Process {
    /// Whether it still runs, and not only its entry among the processes.
    pub(super) fn runs(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let dead = stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']));
        !dead && start_time(&stat) == Some(self.start)
    }
}

/// The process id of a domain on this host, found by the pid file that libvirt keeps and checked against the UUID on the
/// command line.
pub(super) fn pid(pid_dirs: &[PathBuf], name: &str, uuid: &str) -> Option<u32> {
    pid_dirs.iter().find_map(|dir| {
        // A libvirt name has no slash, so it is one path segment.
        let pid: u32 = fs::read_to_string(dir.join(format!("{name}.pid"))).ok()?.trim().parse().ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        command.split(|byte| *byte == 0).any(|word| word == uuid.as_bytes()).then_some(pid)
    })
}

/// When the process of a domain on this host was started.
pub(super) fn start(pid_dirs: &[PathBuf], name: &str, uuid: &str) -> Option<u64> {
    start_time(&fs::read_to_string(format!("/proc/{}/stat", pid(pid_dirs, name, uuid)?)).ok()?)
}

/// The process of a domain on this host.
pub(super) fn find(pid_dirs: &[PathBuf], name: &str, uuid: &str) -> Option<Process> {
    let pid = pid(pid_dirs, name, uuid)?;
    let start = start_time(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?;
    let names = threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("comm")).ok());
    let names: Vec<String> = names.filter(|name| is_vcpu(name.trim_end())).collect();
    let vcpus = u32::try_from(names.len()).ok().filter(|count| *count > 0);
    Some(Process { pid, start, vcpus, emulates: names.iter().any(|name| name.trim_end().ends_with("/TCG")) })
}

/// Where the libvirt behind a URI keeps pid files, if it is on this host: beside its socket, where the URI names one, else
/// where the system's and the session's daemons have theirs. On another host no pid file fits the UUID.
pub(super) fn pid_dirs(uri: &str) -> Vec<PathBuf> {
    let query = uri.split_once('?').map_or("", |(_, query)| query);
    let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket="));
    if let Some(beside) = socket.and_then(|socket| Path::new(socket).parent()) {
        return vec![beside.join("qemu")];
    }
    let session = std::env::var_os("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("libvirt/qemu/run"));
    [PathBuf::from("/run/libvirt/qemu")].into_iter().chain(session).collect()
}

/// QEMU names its vCPU threads `CPU 0/KVM`, `CPU 1/TCG` (libvirt always starts it with `debug-threads=on`).
fn is_vcpu(name: &str) -> bool {
    name.strip_prefix("CPU ")
        .and_then(|rest| rest.split_once('/'))
        .is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Field 22 of `/proc/PID/stat` (proc(5)), counted after the name, which may hold spaces and brackets.
pub(super) fn start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_threads_of_single_vcpus_count() {
        for name in ["CPU 0/KVM", "CPU 1/TCG", "CPU 254/KVM"] {
            assert!(is_vcpu(name), "{name}");
        }
        for name in ["qemu-system-x86", "IO mon_iothread", "CPU /KVM", "CPU x/KVM", "ALL CPUs/TCG", "CPU 0"] {
            assert!(!is_vcpu(name), "{name}");
        }
    }

    #[test]
    fn pid_files_are_beside_the_socket_that_a_uri_names() {
        assert_eq!(pid_dirs("qemu:///system?socket=/lab/run/libvirt-sock"), [Path::new("/lab/run/qemu")]);
        assert_eq!(pid_dirs("qemu:///system")[0], Path::new("/run/libvirt/qemu"));
    }

    #[test]
    fn a_process_runs_until_it_is_dead_and_no_other_one_is_it() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let start = |pid| start_time(&fs::read_to_string(format!("/proc/{pid}/stat")).unwrap()).unwrap();
        let process = Process { pid: child.id(), start: start(child.id()), vcpus: None, emulates: false };
        assert!(process.runs() && !Process { start: process.start + 1, ..process }.runs());
        child.kill().unwrap();
        // Dead, and not reaped yet.
        while process.runs() {
            std::thread::yield_now();
        }
        assert!(Path::new(&format!("/proc/{}", process.pid)).exists());
        child.wait().unwrap();
        assert!(!process.runs());
    }

    #[test]
    fn the_start_time_survives_any_process_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 99";
        assert_eq!(start_time(&format!("17 (qemu) {rest}")), Some(4242));
        assert_eq!(start_time(&format!("17 (a) b (c) {rest}")), Some(4242));
        assert_eq!(start_time("17"), None);
    }
}
