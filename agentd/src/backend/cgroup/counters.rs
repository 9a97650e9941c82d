//! What the kernel has counted of a cgroup, version 1 or 2: CPU time, what a limit held back, what memory it takes, OOM kills,
//! pressure. A number that isn't there is unknown, never 0.

use std::os::fd::OwnedFd;

use agentd_core::api::PressureUse;
use agentd_core::units::{ByteCount, Limit};
use agentd_core::usage::{Bandwidth, Counters};

use super::{Host, controller_path, number, open_below, own_path, parse_cpu_max, read_at};
use crate::clock;

/// The folders of one cgroup; in version 2 they are one and the same.
#[derive(Debug)]
struct Folders {
    cpu: Option<OwnedFd>,
    cpuacct: Option<OwnedFd>,
    memory: Option<OwnedFd>,
}

impl Host {
    /// What was counted of the container `id`, whose main process is `pid`; `None` where that is another process by now.
    pub(in crate::backend) fn counters(&self, pid: u32, id: &str) -> Option<Counters> {
        self.counters_of(pid, |path| own_path(path, id))
    }

    /// What was counted of the cgroup that `part` makes of the path of a process; `None` where it makes none of any.
    pub(in crate::backend) fn counters_of(&self, pid: u32, part: impl Fn(&str) -> Option<&str>) -> Option<Counters> {
        let list = std::fs::read_to_string(self.processes.join(pid.to_string()).join("cgroup")).ok()?;
        if self.unified {
            let (_, path) = controller_path(&list, None)?;
            return open_below(&self.cgroups, part(path)?).map(|folder| unified(&folder));
        }
        let open = |controller: &str| {
            let (mount, path) = controller_path(&list, Some(controller))?;
            let path = part(path)?;
            open_below(&self.cgroups.join(mount), path).or_else(|| open_below(&self.cgroups.join(controller), path))
        };
        legacy(&Folders { cpu: open("cpu"), cpuacct: open("cpuacct"), memory: open("memory") })
    }

    /// What was counted of the cgroup at this path below the root; `None` where there is none.
    pub(in crate::backend) fn counters_at(&self, path: &str) -> Option<Counters> {
        if self.unified {
            return open_below(&self.cgroups, path).map(|folder| unified(&folder));
        }
        let open = |controller: &str| open_below(&self.cgroups.join(controller), path);
        legacy(&Folders { cpu: open("cpu"), cpuacct: open("cpuacct"), memory: open("memory") })
    }
}

fn unified(folder: &OwnedFd) -> Counters {
    let cpu = read_at(folder, "cpu.stat").unwrap_or_default();
    // One read holds them all, and it is of this moment.
    let at_usec = clock::monotonic_usec();
    let limited = read_at(folder, "cpu.max").and_then(|text| parse_cpu_max(&text));
    let bandwidth = || {
        Some(Bandwidth {
            periods: field(&cpu, "nr_periods")?,
            throttled: field(&cpu, "nr_throttled")?,
            throttled_usec: field(&cpu, "throttled_usec")?,
        })
    };
    Counters {
        at_usec,
        cpu_usec: field(&cpu, "usage_usec"),
        bandwidth: limited.filter(|limit| *limit != Limit::Unlimited).and_then(|_| bandwidth()),
        host_memory: read_at(folder, "memory.current").and_then(|text| number(&text)).and_then(ByteCount::new),
        oom_kills: read_at(folder, "memory.events").and_then(|text| field(&text, "oom_kill")),
        pressure: pressure(folder),
    }
}

/// `None` where all of its folders are gone.
fn legacy(Folders { cpu, cpuacct, memory }: &Folders) -> Option<Counters> {
    if cpu.is_none() && cpuacct.is_none() && memory.is_none() {
        return None;
    }
    let read = |folder: &Option<OwnedFd>, name| folder.as_ref().and_then(|folder| read_at(folder, name));
    let used = read(cpuacct, "cpuacct.usage").and_then(|text| number(&text));
    let at_usec = clock::monotonic_usec();
    let stat = read(cpu, "cpu.stat").unwrap_or_default();
    let quota: Option<i64> = read(cpu, "cpu.cfs_quota_us").and_then(|text| text.trim().parse().ok());
    let bandwidth = || {
        Some(Bandwidth {
            periods: field(&stat, "nr_periods")?,
            throttled: field(&stat, "nr_throttled")?,
            throttled_usec: field(&stat, "throttled_time")? / 1000,
        })
    };
    Some(Counters {
        at_usec,
        cpu_usec: used.map(|nanoseconds| nanoseconds / 1000),
        bandwidth: quota.filter(|quota| *quota > 0).and_then(|_| bandwidth()),
        host_memory: read(memory, "memory.usage_in_bytes").and_then(|text| number(&text)).and_then(ByteCount::new),
        // Since Linux 4.13.
        oom_kills: read(memory, "memory.oom_control").and_then(|text| field(&text, "oom_kill")),
        // Version 1 has none.
        pressure: None,
    })
}

/// A number of a file of lines such as `nr_periods 17`.
pub(super) fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| number(line.strip_prefix(name)?.strip_prefix(' ')?))
}

/// Pressure of a cgroup of version 2; `None` where the kernel was built or booted without it.
fn pressure(folder: &OwnedFd) -> Option<PressureUse> {
    let (cpu, memory) = (read_at(folder, "cpu.pressure"), read_at(folder, "memory.pressure"));
    if cpu.is_none() && memory.is_none() {
        return None;
    }
    let share = |text: &Option<String>, kind| text.as_deref().and_then(|text| stalled(text, kind));
    Some(PressureUse {
        cpu_some: share(&cpu, "some"),
        memory_some: share(&memory, "some"),
        memory_full: share(&memory, "full"),
    })
}

/// `some avg10=1.50 avg60=… avg300=… total=…`: the share of the last 10 s.
pub(super) fn stalled(text: &str, kind: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(' '))?;
    let percent: f64 = line.split_whitespace().find_map(|word| word.strip_prefix("avg10="))?.parse().ok()?;
    percent.is_finite().then(|| (percent / 100.0).clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

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

    #[test]
    fn version_2_is_counted_in_microseconds_and_has_pressure() {
        let root = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| write(root.path(), &format!("cgroup/a.slice/{name}"), text);
        file("cpu.stat", "usage_usec 1500\nuser_usec 1\nnr_periods 10\nnr_throttled 4\nthrottled_usec 250\n");
        file("cpu.max", "50000 100000\n");
        file("memory.current", "8192\n");
        file("memory.events", "low 0\noom 9\noom_kill 2\noom_group_kill 0\n");
        file(
            "cpu.pressure",
            "some avg10=12.50 avg60=1.00 avg300=0.00 total=9\nfull avg10=0.00 avg60=0 avg300=0 total=0\n",
        );
        file("memory.pressure", "some avg10=3.00 avg60=0 avg300=0 total=1\nfull avg10=1.00 avg60=0 avg300=0 total=1\n");
        let host = host(root.path(), true);
        let counted = host.counters_at("/a.slice").unwrap();
        let pressure = PressureUse { cpu_some: Some(0.125), memory_some: Some(0.03), memory_full: Some(0.01) };
        let bandwidth = Some(Bandwidth { periods: 10, throttled: 4, throttled_usec: 250 });
        assert_eq!((counted.cpu_usec, counted.bandwidth), (Some(1500), bandwidth));
        assert_eq!((counted.oom_kills, counted.pressure), (Some(2), Some(pressure)));
        assert_eq!(counted.host_memory, ByteCount::new(8192));
        // Without a limit nothing holds it back, whatever was counted while it had one.
        file("cpu.max", "max 100000\n");
        assert_eq!(host.counters_at("/a.slice").unwrap().bandwidth, None);
        assert_eq!(host.counters_at("/b.slice"), None);
    }

    #[test]
    fn version_1_is_counted_in_nanoseconds_by_several_controllers() {
        let root = tempfile::tempdir().unwrap();
        let list = format!("4:memory:/docker/{ID}\n1:cpu,cpuacct:/docker/{ID}\n0::/docker/{ID}\n");
        write(root.path(), "proc/7/cgroup", &list);
        let file = |controller: &str, name: &str, text: &str| {
            write(root.path(), &format!("cgroup/{controller}/docker/{ID}/{name}"), text);
        };
        file("cpu,cpuacct", "cpuacct.usage", "1500000\n");
        file("cpu,cpuacct", "cpu.stat", "nr_periods 10\nnr_throttled 4\nthrottled_time 250000\n");
        file("cpu,cpuacct", "cpu.cfs_quota_us", "50000\n");
        file("memory", "memory.usage_in_bytes", "8192\n");
        file("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n");
        let counted = host(root.path(), false).counters(7, ID).unwrap();
        let bandwidth = Some(Bandwidth { periods: 10, throttled: 4, throttled_usec: 250 });
        assert_eq!((counted.cpu_usec, counted.bandwidth), (Some(1500), bandwidth));
        assert_eq!((counted.oom_kills, counted.pressure), (Some(2), None));
        assert_eq!(counted.host_memory, ByteCount::new(8192));
        assert_eq!(host(root.path(), false).counters(7, &"0".repeat(64)), None, "another process");
    }

    #[test]
    fn numbers_that_are_missing_or_make_no_sense_are_unknown() {
        let root = tempfile::tempdir().unwrap();
        write(root.path(), "cgroup/a/cpu.stat", "usage_usec x\n");
        write(root.path(), "cgroup/a/cpu.max", "1000 100000\n");
        write(root.path(), "cgroup/a/cpu.pressure", "some avg10=NaN\nfull avg60=1\n");
        let counted = host(root.path(), true).counters_at("a").unwrap();
        let unknown =
            Counters { at_usec: counted.at_usec, pressure: Some(PressureUse::default()), ..Counters::default() };
        assert_eq!(counted, unknown);
    }
}
