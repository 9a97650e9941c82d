//! From a config file to what is in force: the file's own rights checked, its text parsed, its users and groups looked up,
//! the host measured where the config says `auto`.

use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use agentd_core::access::{AccessTable, ResolvedPrincipal, ResolvedRule};
use agentd_core::config::{Config, Fault, Principal};
use agentd_core::plan::HostCapacity;
use agentd_core::units::{ByteCount, Cpus};
use nix::libc::S_ISVTX;
use nix::unistd::{Group, User, geteuid};

use crate::engine::Settings;

/// Why a config file was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// It can't be read, or may not be trusted.
    #[error("{path}: {why}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Its text has faults: all of them.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Faults(Vec<Fault>),
    /// The host can't be measured.
    #[error("what this host has can't be told: {0}")]
    Host(String),
}

/// Reads and checks a config file.
pub fn read(path: &Path) -> Result<Config, SettingsError> {
    let file_error = |why: String| SettingsError::File { path: path.to_owned(), why };
    let mut file = File::open(path).map_err(|error| file_error(format!("can't be opened: {error}")))?;
    // Asked of the open file, so that what is checked is what is read.
    let metadata = file.metadata().map_err(|error| file_error(format!("can't be looked at: {error}")))?;
    if !metadata.is_file() {
        return Err(file_error("is not a regular file".into()));
    }
    is_ours(&metadata).map_err(&file_error)?;
    // Who may write to its folder may put another one of root's files in its place; not where only owners may (/tmp).
    let folder = path.canonicalize().ok().and_then(|path| path.parent().map(Path::to_owned)).unwrap_or_default();
    let of_folder =
        folder.metadata().map_err(|error| file_error(format!("has a folder that can't be looked at: {error}")))?;
    if of_folder.mode() & S_ISVTX == 0 {
        is_ours(&of_folder).map_err(|why| SettingsError::File { path: folder, why })?;
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(|error| file_error(format!("can't be read: {error}")))?;
    Config::parse(&path.display().to_string(), &text).map_err(SettingsError::Faults)
}

/// Whether nobody but root and agentd itself can write to a file or a folder; why not.
fn is_ours(metadata: &Metadata) -> Result<(), String> {
    let (owner, own) = (metadata.uid(), geteuid().as_raw());
    if owner != 0 && owner != own {
        return Err(format!("belongs to uid {owner}; it must belong to root or to agentd's own uid {own}"));
    }
    if metadata.mode() & 0o022 != 0 {
        let mode = metadata.mode() & 0o7777;
        return Err(format!("is writable by others (mode {mode:04o}); `chmod go-w` it"));
    }
    Ok(())
}

/// Makes what is in force of a config.
pub fn resolve(config: Config) -> Result<Settings, SettingsError> {
    let mut notes = Vec::new();
    let access = resolve_access(&config, &mut notes);
    let host = measure(&config)?;
    notes.extend(nothing_left(&config, host));
    Ok(Settings { config, access, host, notes })
}

/// A rule about a user or group that doesn't exist lets nobody in; it is told, and the other rules stand.
fn resolve_access(config: &Config, notes: &mut Vec<String>) -> AccessTable {
    let mut rules = Vec::new();
    for (index, rule) in config.access.iter().enumerate() {
        let principal = match &rule.principal {
            Principal::User(name) => {
                User::from_name(name).ok().flatten().map(|user| ResolvedPrincipal::Uid(user.uid.as_raw()))
            }
            Principal::Group(name) => {
                Group::from_name(name).ok().flatten().map(|group| ResolvedPrincipal::Gid(group.gid.as_raw()))
            }
        };
        let description = rule.describe(index);
        match principal {
            Some(principal) => {
                rules.push(ResolvedRule { description, principal, rights: rule.allow, pattern: rule.pattern.clone() });
            }
            None => {
                notes.push(format!("{description}: there is no such {}, so this rule lets nobody in", rule.principal))
            }
        }
    }
    AccessTable::new(rules, geteuid().as_raw())
}

/// Reserves that leave nothing to promise: of a host that is measured only the host can tell.
fn nothing_left(config: &Config, host: HostCapacity) -> Vec<String> {
    let capacity = &config.capacity;
    let mut notes = Vec::new();
    if capacity.reserved_cpus >= host.cpus {
        let (reserved, all) = (capacity.reserved_cpus, host.cpus);
        notes.push(format!("[capacity] reserved_cpus keeps {reserved} of {all} CPUs back: no instance may grow"));
    }
    if capacity.reserved_memory >= host.memory {
        let (reserved, all) = (capacity.reserved_memory, host.memory);
        notes.push(format!("[capacity] reserved_memory keeps {reserved} of {all} back: no instance may grow"));
    }
    notes
}

/// What the host has: the config's word, else the kernel's.
fn measure(config: &Config) -> Result<HostCapacity, SettingsError> {
    let cpus = std::thread::available_parallelism().map_err(|error| SettingsError::Host(error.to_string()))?;
    let online = std::fs::read_to_string("/sys/devices/system/cpu/online").ok().and_then(|text| count_cpus(&text));
    let cpus = online.or(u32::try_from(cpus.get()).ok()).unwrap_or(1);
    let meminfo = std::fs::read_to_string("/proc/meminfo").map_err(|error| SettingsError::Host(error.to_string()))?;
    let memory = total_memory(&meminfo)
        .ok_or_else(|| SettingsError::Host("/proc/meminfo has no MemTotal that can be read".into()))?;
    Ok(HostCapacity {
        cpus: config.capacity.cpus.or_host(Cpus::whole(cpus)),
        memory: config.capacity.memory.or_host(memory),
    })
}

/// Counts a CPU list of the kernel, `0-3,8,10-11` (cpuset(7)).
fn count_cpus(list: &str) -> Option<u32> {
    list.trim().split(',').try_fold(0_u32, |sum, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        sum.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

/// `MemTotal` of /proc/meminfo, which counts in KiB (proc(5)).
fn total_memory(meminfo: &str) -> Option<ByteCount> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    ByteCount::new(kib.checked_mul(1024)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserves_that_leave_nothing_and_principals_that_are_nobody_are_told() {
        let notes = |text: &str| resolve(Config::parse("a.toml", text).unwrap()).unwrap().notes;
        let told = notes(
            "[docker]\n[capacity]\nreserved_cpus = 100000\nreserved_memory = \"1000000GiB\"\n\
             [[access]]\nuser = \"nobody-of-that-name\"\nallow = [\"read\"]\nmatch = \"*\"\n",
        );
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(told[1].contains("reserved_cpus keeps 100000 of"), "{told:?}");
        assert_eq!(notes("[docker]\n[capacity]\nreserved_memory = \"1MiB\"\n"), Vec::<String>::new());
    }

    #[test]
    fn cpu_lists_are_counted() {
        assert_eq!(count_cpus("0-3,8,10-11\n"), Some(7));
        assert_eq!(count_cpus("0\n"), Some(1));
        for bad in ["", "3-1", "a", "0-", "0-4294967295"] {
            assert_eq!(count_cpus(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn memory_is_read_in_kib() {
        assert_eq!(total_memory("MemTotal:        2048 kB\nMemFree: 1 kB\n"), Some(ByteCount::mib(2)));
        assert_eq!(total_memory("MemFree: 1 kB\n"), None);
    }
}
