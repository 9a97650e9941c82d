//! What was counted of a running domain: by its cgroup where libvirt made one for the whole VM, by its QEMU process, or, where
//! that isn't on this host, by libvirt. Asks QEMU nothing, so that it answers where QEMU hangs.

use std::fs;
use std::path::PathBuf;

use agentd_core::units::ByteCount;
use agentd_core::usage::Counters;

use super::{cgroup, process};
use crate::backend::cgroup::Host;
use crate::clock;

/// A tick of `/proc/PID/stat` in µs: USER_HZ is 100 on every architecture that agentd is built for.
const TICK_USEC: u64 = 10_000;

/// What was counted of the QEMU that was started as `boot` says; `None` where there is no such process on this host.
pub(super) fn of_process(
    host: &Host,
    pid_dirs: &[PathBuf],
    name: &str,
    uuid: &str,
    boot: Option<&str>,
) -> Option<Counters> {
    let pid = process::pid(pid_dirs, name, uuid)?;
    let stat = fs::read_to_string(host.processes.join(pid.to_string()).join("stat")).ok()?;
    let at_usec = clock::monotonic_usec();
    let start = boot?.split_once('@')?.1;
    // Another one under the same name is another run.
    if process::start_time(&stat)?.to_string() != start {
        return None;
    }
    let own = Counters { at_usec, cpu_usec: cpu_usec(&stat), ..Counters::default() };
    let counted = host.counters_of(pid, cgroup::own_path).unwrap_or_default();
    // What the cgroup doesn't count the process does; never the times of one with the moment of the other.
    let counted =
        if counted.cpu_usec.is_some() { counted } else { Counters { at_usec, cpu_usec: own.cpu_usec, ..counted } };
    let status = fs::read_to_string(host.processes.join(pid.to_string()).join("status")).ok();
    // Its cgroup is charged for the page cache of its disks, too.
    Some(Counters { host_memory: status.as_deref().and_then(resident), ..counted })
}

/// CPU time that libvirt tells of, in nanoseconds.
pub(super) fn of_libvirt(nanoseconds: u64) -> Counters {
    Counters { at_usec: clock::monotonic_usec(), cpu_usec: Some(nanoseconds / 1000), ..Counters::default() }
}

/// Fields 14 and 15 of `/proc/PID/stat` (proc(5)), those of all its threads, also of ended ones.
pub(super) fn cpu_usec(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    user.checked_add(system)?.checked_mul(TICK_USEC)
}

/// What it has of the host's memory, huge pages too, which the kernel counts apart.
pub(super) fn resident(status: &str) -> Option<ByteCount> {
    let kib = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse().ok()
    };
    let all = kib("VmRSS:")?.checked_add(kib("HugetlbPages:").unwrap_or(0))?;
    all.checked_mul(1 << 10).and_then(ByteCount::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_a_process_survive_its_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 150 50 13 14";
        assert_eq!(cpu_usec(&format!("17 (a) b (c) {rest}")), Some(2_000_000));
        assert_eq!(cpu_usec("17 (a) S 1 2"), None);
    }

    #[test]
    fn huge_pages_are_the_hosts_memory_too() {
        let status = "Name:\tqemu\nVmRSS:\t    2048 kB\nRssAnon:\t 1 kB\nHugetlbPages:\t    1024 kB\n";
        assert_eq!(resident(status), Some(ByteCount::mib(3)));
        assert_eq!(resident("Name:\tqemu\nVmRSS:\t 2048 kB\n"), Some(ByteCount::mib(2)));
        assert_eq!(resident("Name:\tzombie\n"), None);
    }
}
