//! A VM's log: what its guest writes to a serial port or console, where the definition has libvirt write that to a file. Knows
//! where the file is; how one is read is `logs/file.rs`'s business.

use std::path::PathBuf;

use quick_xml::escape::unescape;

use super::calls::{Calls, Class, Fail, Job};
use super::process::{self, Process};
use super::xml::tree;
use crate::backend::BackendError;
use crate::backend::logs::{LogAsk, LogFrames, file};

/// What would have to be in a definition.
const HINT: &str = "a serial port of it would have to write to a file, as <serial type='file'><source \
    path='/var/log/libvirt/qemu/NAME-serial.log'/></serial> does, or <log file='…'/> in one of another type";

/// Where the log of a domain is, and who writes it.
struct Place {
    name: String,
    path: Option<String>,
    active: bool,
    process: Option<Process>,
}

/// The log of a domain.
pub(super) async fn read(calls: &Calls, uri: &str, uuid: &str, ask: &LogAsk) -> Result<LogFrames, BackendError> {
    if !is_local(uri) {
        let why = format!("its log is a file of the host behind {uri}, and agentd reads those of its own");
        return Err(BackendError::Unsupported(why));
    }
    if ask.since.is_some() {
        let why = "what a guest writes to its console carries no times: since when can't be told, the last lines can";
        return Err(BackendError::Unsupported(why.into()));
    }
    let (of, what) = (uuid.to_owned(), format!("read the definition of {uuid}"));
    let place = calls.run(Class::Look, "", &what, move |job: &Job<'_>| find(job, &of)).await?;
    let Place { name, path, active, process } = place;
    let Some(path) = path else {
        return Err(BackendError::Unsupported(format!("vm/{name} writes no log: {HINT}")));
    };
    match process {
        Some(process) => file::read(path.into(), ask, move || process.runs()).await,
        None if active && ask.follow => Err(BackendError::Unsupported(format!(
            "vm/{name} has no QEMU that can be seen on this host, so nobody can tell when its log ends"
        ))),
        // Nobody writes to the log of a VM that is down.
        None => file::read(PathBuf::from(path), ask, || false).await,
    }
}

/// What runs writes where its own definition says, which the next start's need not.
fn find(job: &Job<'_>, uuid: &str) -> Result<Place, Fail> {
    let domain = job.connect.by_uuid(uuid)?;
    let (name, active) = (domain.name()?, domain.id().is_some());
    let unread = |why: String| Fail::Told(BackendError::Failed(format!("vm/{name}: {why}")));
    let path = log_path(&domain.xml(!active)?).map_err(unread)?;
    let process = if active { process::find(job.pid_dirs, &name, uuid) } else { None };
    Ok(Place { name, path, active, process })
}

/// The file that the first serial port or console with one writes to: itself, or beside what it is (formatdomain, "Consoles,
/// serial, parallel & channel devices").
pub(super) fn log_path(xml: &str) -> Result<Option<String>, String> {
    let root = tree::parse(xml)?;
    let Some(devices) = root.child("devices") else { return Ok(None) };
    let written = devices.all("serial").chain(devices.all("console")).find_map(|port| {
        let itself = port.attribute(xml, "type") == Some("file");
        let source = port.child("source").filter(|_| itself).and_then(|source| source.attribute(xml, "path"));
        source.or_else(|| port.child("log")?.attribute(xml, "file"))
    });
    let read = |path: &str| unescape(path).map(|path| path.into_owned());
    written.map(read).transpose().map_err(|error| format!("its definition can't be read: {error}"))
}

/// Whether a URI names no other host: `scheme://HOST/path?…`.
fn is_local(uri: &str) -> bool {
    uri.split_once("://").is_none_or(|(_, rest)| rest.is_empty() || rest.starts_with(['/', '?']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(devices: &str) -> Option<String> {
        log_path(&format!("<domain><name>a</name><devices>{devices}</devices></domain>")).unwrap()
    }

    #[test]
    fn the_first_port_that_writes_a_file_is_the_log() {
        let file = "<serial type='file'><source path='/log/a&amp;b'/><target port='0'/></serial>";
        assert_eq!(path(file).as_deref(), Some("/log/a&b"));
        let logged = "<serial type='pty'><source path='/dev/pts/3'/><log file='/log/c' append='on'/></serial>";
        assert_eq!(path(logged).as_deref(), Some("/log/c"));
        let plain = "<serial type='pty'><source path='/dev/pts/3'/></serial>";
        let console = "<console type='pty'><log file=\"/log/d\"/></console>";
        assert_eq!(path(&format!("{console}{plain}{logged}")).as_deref(), Some("/log/c"), "serial ports go first");
        assert_eq!(path(&format!("{plain}{console}")).as_deref(), Some("/log/d"));
    }

    #[test]
    fn what_is_no_file_or_no_console_is_no_log() {
        for devices in [
            "<serial type='pty'><source path='/dev/pts/3'/></serial>",
            "<serial type='dev'><source path='/dev/ttyS0'/></serial>",
            "<disk type='file'><source file='/disk'/></disk>",
            "<parallel type='file'><source path='/log/a'/></parallel>",
            "",
        ] {
            assert_eq!(path(devices), None, "{devices}");
        }
        assert_eq!(log_path("<domain/>"), Ok(None));
        assert!(log_path("<domain>").is_err());
    }

    #[test]
    fn only_a_libvirt_of_this_host_writes_files_here() {
        for local in ["qemu:///system", "qemu:///system?socket=/a", "qemu+unix:///system", "test:///default"] {
            assert!(is_local(local), "{local}");
        }
        for remote in ["qemu+ssh://root@kvm1/system", "qemu+tls://kvm1/system"] {
            assert!(!is_local(remote), "{remote}");
        }
    }
}
