//! What libvirt doesn't announce and the kernel tells. vCPUs that come and go: each has a cgroup `vcpuN` below its domain's, and
//! a folder can be watched. Where a domain has no cgroup of its own there is nothing to watch, and nothing comes from a libvirt
//! in another cgroup namespace: the kernel tells of a folder in the namespace alone that changed it. And definitions that are
//! written anew: each is a file of its domain's name.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use futures_util::StreamExt;
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask};

use super::calls::Job;
use super::{cgroup, ffi, process};
use crate::backend::Notice;

/// Room for some dozen events of folders with short names.
type Buffer = [u8; 4096];

/// A boot of a domain: its UUID and its id.
pub(super) type Boot = (String, u32);

/// What is watched: the cgroups of domains that run, and the folder of definitions.
pub(super) struct Hotplug {
    events: EventStream<Buffer>,
    watched: HashMap<Boot, WatchDescriptor>,
    definitions: Option<WatchDescriptor>,
}

/// A domain that runs, and its cgroup where that was looked for and found.
pub(super) type Running = (Boot, Option<PathBuf>);

/// What runs. The cgroups of the `known` are not looked for again.
pub(super) fn running(job: &Job<'_>, known: &HashSet<Boot>) -> Result<Vec<Running>, ffi::Error> {
    let domains = job.connect.domains()?;
    let running = domains.iter().filter_map(|domain| {
        let (name, boot) = (domain.name().ok()?, (domain.uuid().ok()?, domain.id()?));
        let find = || cgroup::folder(process::pid(job.pid_dirs, &name, &boot.0)?);
        let folder = if known.contains(&boot) { None } else { find() };
        Some((boot, folder))
    });
    Ok(running.collect())
}

/// Where the libvirt behind a URI keeps definitions, if it is on this host.
pub(super) fn definitions(uri: &str) -> Option<PathBuf> {
    let path = uri.split_once('?').map_or(uri, |(path, _)| path);
    match path {
        "qemu:///system" => Some(PathBuf::from("/etc/libvirt/qemu")),
        "qemu:///session" => {
            let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".config"));
            let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from).or_else(home)?;
            Some(config.join("libvirt/qemu"))
        }
        _ => None,
    }
}

impl Hotplug {
    /// Watches the folder of definitions, where there is one, and no domain yet.
    pub(super) fn new(definitions: Option<&Path>) -> io::Result<Hotplug> {
        let events = Inotify::init()?.into_event_stream([0; size_of::<Buffer>()])?;
        // libvirt writes a definition beside the old one and renames it.
        let watch = |folder: &Path| match events.watches().add(folder, WatchMask::MOVED_TO | WatchMask::ONLYDIR) {
            Ok(descriptor) => Some(descriptor),
            Err(error) => {
                tracing::debug!("{} can't be watched: {error}", folder.display());
                None
            }
        };
        let definitions = definitions.and_then(watch);
        Ok(Hotplug { events, watched: HashMap::new(), definitions })
    }

    /// What is watched.
    pub(super) fn known(&self) -> HashSet<Boot> {
        self.watched.keys().cloned().collect()
    }

    /// Watches what runs, and nothing else.
    pub(super) fn follow(&mut self, running: Vec<Running>) {
        let mut watches = self.events.watches();
        let up: HashSet<&Boot> = running.iter().map(|(boot, _)| boot).collect();
        self.watched.retain(|boot, descriptor| {
            let stays = up.contains(boot);
            if !stays {
                // Refused where the cgroup is gone, and the watch with it.
                let _ = watches.remove(descriptor.clone());
            }
            stays
        });
        for (boot, folder) in running {
            let Some(folder) = folder else { continue };
            match watches.add(&folder, WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR) {
                Ok(descriptor) => drop(self.watched.insert(boot, descriptor)),
                Err(error) => tracing::debug!("{} can't be watched: {error}", folder.display()),
            }
        }
    }

    /// Waits for a vCPU that comes or goes. May be dropped at any time, nothing is lost.
    pub(super) async fn next(&mut self) -> Notice {
        loop {
            match self.events.next().await {
                Some(Ok(event)) => {
                    if let Some(notice) = self.notice(&event) {
                        return notice;
                    }
                }
                Some(Err(error)) => {
                    tracing::warn!("vCPUs that come and go are not announced any more: {error}");
                    return std::future::pending().await;
                }
                None => return std::future::pending().await,
            }
        }
    }

    fn notice(&mut self, event: &EventOwned) -> Option<Notice> {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            return Some(Notice::All);
        }
        if event.mask.contains(EventMask::IGNORED) {
            self.watched.retain(|_, descriptor| *descriptor != event.wd);
        }
        if self.definitions.as_ref() == Some(&event.wd) {
            let domain = Path::new(event.name.as_deref()?).to_str()?.strip_suffix(".xml")?;
            return Some(Notice::Instance(domain.to_owned()));
        }
        event.name.as_deref().filter(|name| is_vcpu(name))?;
        let ((uuid, _), _) = self.watched.iter().find(|(_, descriptor)| **descriptor == event.wd)?;
        Some(Notice::Instance(uuid.clone()))
    }
}

fn is_vcpu(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b"vcpu")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn running(uuid: &str, id: u32, folder: &std::path::Path) -> Running {
        ((uuid.into(), id), Some(folder.to_owned()))
    }

    #[tokio::test]
    async fn a_vcpu_that_comes_or_goes_is_announced_for_its_domain_and_other_cgroups_are_not() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut hotplug = Hotplug::new(None).unwrap();
        hotplug.follow(vec![running("a", 1, a.path()), running("b", 2, b.path())]);
        std::fs::create_dir(a.path().join("emulator")).unwrap();
        std::fs::create_dir(b.path().join("vcpu1")).unwrap();
        std::fs::create_dir(a.path().join("vcpu3")).unwrap();
        std::fs::remove_dir(a.path().join("vcpu3")).unwrap();
        for expected in ["b", "a", "a"] {
            assert_eq!(hotplug.next().await, Notice::Instance(expected.into()));
        }
    }

    #[tokio::test]
    async fn a_definition_that_is_written_anew_is_announced_by_the_name_of_its_domain() {
        let folder = tempfile::tempdir().unwrap();
        let mut hotplug = Hotplug::new(Some(folder.path())).unwrap();
        for name in ["web.xml.new", "notes", "web.1.xml"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        std::fs::rename(folder.path().join("web.xml.new"), folder.path().join("web.xml")).unwrap();
        assert_eq!(hotplug.next().await, Notice::Instance("web".into()));
        std::fs::rename(folder.path().join("notes"), folder.path().join("more")).unwrap();
        std::fs::rename(folder.path().join("web.1.xml"), folder.path().join("web.2.xml")).unwrap();
        assert_eq!(hotplug.next().await, Notice::Instance("web.2".into()));
        assert!(Hotplug::new(Some(std::path::Path::new("/nowhere"))).unwrap().definitions.is_none());
    }

    #[test]
    fn only_a_libvirt_of_this_host_has_definitions_here() {
        let system = Some(PathBuf::from("/etc/libvirt/qemu"));
        assert_eq!((definitions("qemu:///system"), definitions("qemu:///system?socket=/x")), (system.clone(), system));
        assert_eq!((definitions("qemu+ssh://host/system"), definitions("test:///default")), (None, None));
    }

    #[tokio::test]
    async fn a_domain_that_stopped_is_watched_no_more_and_a_new_boot_is() {
        let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut hotplug = Hotplug::new(None).unwrap();
        hotplug.follow(vec![running("a", 1, old.path())]);
        // Its cgroup need not be looked for again.
        hotplug.follow(vec![(("a".into(), 1), None)]);
        assert_eq!(hotplug.known(), HashSet::from([("a".into(), 1)]));
        hotplug.follow(vec![running("a", 2, new.path())]);
        assert_eq!(hotplug.known(), HashSet::from([("a".into(), 2)]));
        std::fs::create_dir(old.path().join("vcpu1")).unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), hotplug.next()).await.is_err());
        std::fs::create_dir(new.path().join("vcpu1")).unwrap();
        assert_eq!(hotplug.next().await, Notice::Instance("a".into()));
    }

    #[tokio::test]
    async fn a_cgroup_that_vanishes_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let mut hotplug = Hotplug::new(None).unwrap();
        hotplug.follow(vec![running("a", 1, folder.path())]);
        drop(folder);
        assert!(tokio::time::timeout(Duration::from_millis(50), hotplug.next()).await.is_err());
        assert_eq!(hotplug.known(), HashSet::new());
    }
}
