//! Any text as the files of a cgroup.

use super::counters::{field, stalled};
use super::{controller_path, cpus_of_quota, number, own_path, parse_cpu_max, parse_memory, working_set};
use crate::backend::fuzzing::Numbers;

/// Files below `/sys/fs/cgroup` and of `/proc/PID`.
pub fn cgroup(data: &[u8]) {
    let mut numbers = Numbers(data);
    cpus_of_quota(numbers.i64(), numbers.i64());
    let usage = numbers.maybe(Numbers::u64);
    let Some(text) = numbers.text() else { return };
    parse_cpu_max(text);
    parse_memory(text);
    let used = working_set(usage, text, "inactive_file");
    assert!(used.is_none_or(|used| Some(used.bytes()) <= usage), "more is used than there is");
    if let Some(share) = stalled(text, "some") {
        assert!((0.0..=1.0).contains(&share), "{share} of all time");
    }
    field(text, "nr_periods");
    number(text);
    for controller in [None, Some("cpu"), Some("memory")] {
        if let Some((_, path)) = controller_path(text, controller) {
            assert!(!path.contains('\n'));
            let own = own_path(path, "0123");
            assert!(own.is_none_or(|own| path.starts_with(own) && own.contains("0123")), "{path:?} is not its own");
        }
    }
    super::super::libvirt::fuzzing::proc_files(text);
}
