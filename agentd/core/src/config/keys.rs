//! Every key of the config file in one table: which keys there are (the rest is unknown), their defaults, and a line of
//! documentation for each. Knows nothing of their types.

/// One key of the config file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyDoc {
    /// The section as its heading has it: `server`, `units.cgroups`, `sizes.NAME`, `limit`, `access`.
    pub section: &'static str,
    /// The key; `NAME` where the file chooses it.
    pub key: &'static str,
    /// The default as TOML; None where there is none.
    pub default: Option<&'static str>,
    /// What it means, with its unit.
    pub doc: &'static str,
}

const fn key(section: &'static str, key: &'static str, default: &'static str, doc: &'static str) -> KeyDoc {
    KeyDoc { section, key, default: Some(default), doc }
}

const fn bare(section: &'static str, key: &'static str, doc: &'static str) -> KeyDoc {
    KeyDoc { section, key, default: None, doc }
}

/// Every key, in the order in which the file is usually written.
pub const KEYS: &[KeyDoc] = &[
    key("server", "socket", "\"/run/agentd/agentd.sock\"", "The Unix socket that agentd listens on; an absolute path."),
    key("server", "state_dir", "\"/var/lib/agentd\"", "The directory of the store; an absolute path."),
    key("server", "read_only", "false", "True: every change is refused."),
    key("server", "history_retention", "\"90d\"", "How long history is kept."),
    key(
        "libvirt",
        "uri",
        "\"qemu:///system\"",
        "The libvirt connection. Without the section virtual machines are off.",
    ),
    key(
        "docker",
        "socket",
        "\"/var/run/docker.sock\"",
        "The engine's Unix socket; an absolute path. Without the section containers are off.",
    ),
    key(
        "units",
        "allow",
        "[]",
        "Globs over the names of the systemd units that may be changed, such as \"batch-*.service\". Without the section \
         units are off.",
    ),
    bare("units.cgroups", "NAME", "A cgroup given to agentd: its path below the cgroup root, beginning with a slash."),
    key("capacity", "cpus", "\"auto\"", "CPUs there are; 0 and \"auto\" are the host's own."),
    key("capacity", "memory", "\"auto\"", "Memory there is; 0 and \"auto\" are the host's own."),
    key("capacity", "reserved_cpus", "0", "CPUs kept for the host itself."),
    key("capacity", "reserved_memory", "\"1GiB\"", "Memory kept for the host itself."),
    key("capacity", "cpu_overcommit", "1.0", "CPUs promised for each that there is, after the reserve."),
    key("capacity", "memory_overcommit", "1.0", "Bytes promised for each that there is, after the reserve."),
    key("capacity", "vm_overhead", "\"200MiB\"", "What QEMU itself takes beyond the guest's memory, per running VM."),
    key(
        "capacity",
        "vm_memory",
        "\"observed\"",
        "Which memory of a VM counts: \"observed\", or \"maximum\", what it could take back from its balloon at will.",
    ),
    key("scaling", "max_cpus", "0", "Most CPUs of one instance, live and by prepare; 0 or less is the host's own."),
    key("scaling", "max_memory", "0", "Most memory of one instance, live and by prepare; 0 or less is the host's own."),
    bare("sizes.NAME", "cpus", "CPUs of the size."),
    bare("sizes.NAME", "memory", "Memory of the size."),
    key("sizes.NAME", "cpu_limit", "\"none\"", "CPU-time cap of a VM, in CPUs, or \"none\"."),
    bare("limit", "match", "The instances it is about: a glob over references, or \"label:KEY=VALUE\". Required."),
    bare("limit", "min_memory", "Least memory of one instance."),
    bare("limit", "max_cpus", "Most CPUs of one instance."),
    bare("limit", "max_memory", "Most memory of one instance."),
    bare("limit", "total_cpus", "Most CPUs of all that match, together."),
    bare("limit", "total_memory", "Most memory of all that match, together, overheads included."),
    key("limit", "live", "true", "False: no live change, for anybody."),
    key("limit", "unlimited", "false", "True: a limit may be taken away."),
    key("limit", "shrink", "\"if-unused\"", "When memory may be taken away: \"always\", \"if-unused\" or \"never\"."),
    bare(
        "limit",
        "shrink_margin",
        "Memory kept above what is in use; 64MiB, but at most a quarter of it, where not stated.",
    ),
    key("limit", "stop_timeout", "\"60s\"", "How long a graceful stop may take."),
    key("limit", "repair_drift", "false", "True: what was changed behind agentd's back is put back."),
    bare("access", "user", "The user it is about; or group."),
    bare("access", "group", "The group it is about; or user."),
    bare(
        "access",
        "allow",
        "What is allowed: a list of \"read\", \"logs\", \"resize\", \"power\", \"admin\". Required.",
    ),
    bare("access", "match", "For which instances: as in a limit. Required."),
];

/// The top-level names of the file.
pub(super) const TOP: [&str; 9] =
    ["server", "libvirt", "docker", "units", "capacity", "scaling", "sizes", "limit", "access"];

/// The keys of one section.
pub(super) fn of(section: &str) -> impl Iterator<Item = &'static str> {
    KEYS.iter().filter(move |key| key.section == section).map(|key| key.key)
}

/// A hint for an unknown key: the section where a key of that name belongs, or the known one that is nearly the same.
pub(super) fn did_you_mean(unknown: &str, known: impl Iterator<Item = &'static str>) -> Option<String> {
    const FAR: usize = 40; // longer than any key, and keeps the comparison short
    if unknown.len() > FAR {
        return None;
    }
    if let Some(elsewhere) = KEYS.iter().find(|key| key.key == unknown) {
        return Some(format!("it belongs in [{}]", elsewhere.section));
    }
    let (edits, key) = known.map(|key| (distance(unknown, key), key)).min()?;
    (edits <= 2 && edits < key.len().div_ceil(2)).then(|| format!("did you mean `{key}`?"))
}

/// How many single-character edits lie between two words (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.chars().count()).collect();
    for (above, left) in from.chars().enumerate() {
        let mut diagonal = above;
        let mut last = above + 1;
        for (cell, right) in row.iter_mut().skip(1).zip(to.chars()) {
            let up = *cell;
            last = (diagonal + usize::from(left != right)).min(up + 1).min(last + 1);
            diagonal = up;
            *cell = last;
        }
        if let Some(first) = row.first_mut() {
            *first = above + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_counted() {
        for (from, to, edits) in
            [("", "", 0), ("a", "", 1), ("", "ab", 2), ("kitten", "sitting", 3), ("mach", "match", 1)]
        {
            assert_eq!(distance(from, to), edits, "{from} {to}");
            assert_eq!(distance(to, from), edits, "{to} {from}");
        }
    }

    #[test]
    fn a_near_key_is_suggested_and_a_far_one_is_not() {
        assert_eq!(did_you_mean("max_cpu", of("limit")).as_deref(), Some("did you mean `max_cpus`?"));
        assert_eq!(did_you_mean("colour", of("limit")), None);
        assert_eq!(did_you_mean("vm_overhead", of("scaling")).as_deref(), Some("it belongs in [capacity]"));
    }
}
