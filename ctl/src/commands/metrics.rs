//! `ctl metrics`: the daemon's page for Prometheus, on standard output or as a file for node_exporter's textfile collector.

use std::fs::Permissions;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use tempfile::Builder;

use super::Context;
use crate::args::Metrics;
use crate::error::Failure;
use crate::render::Report;
use crate::render::text::clean;

/// Prints the page, or writes it where it was asked to.
pub(super) fn metrics(context: &Context, args: &Metrics) -> Result<Report, Failure> {
    let page = context.get("/metrics")?.body;
    let Some(path) = &args.textfile else {
        // There is no JSON of it. An instance may have any name, and a terminal may obey it.
        let shown = |line| clean(line) + "\n";
        let out = if context.screen.out_width.is_some() { page.lines().map(shown).collect() } else { page };
        return Ok(if context.screen.quiet { Report::default() } else { Report { out, ..Report::default() } });
    };
    match write(path, &page) {
        Ok(()) => Ok(Report::default()),
        Err(error) => Err(Failure::unwritable(format!("{} can't be written: {error}", path.display()))),
    }
}

/// Writes a file whole or not at all: the collector reads at any time. What it reads ends in `.prom`, and the one beside it, which
/// becomes it, doesn't.
fn write(path: &Path, page: &str) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut new = Builder::new().prefix(".ctl-metrics-").suffix(".new").tempfile_in(folder)?;
    new.write_all(page.as_bytes())?;
    // The collector runs as a user of its own.
    new.as_file().set_permissions(Permissions::from_mode(0o644))?;
    new.persist(path).map(drop).map_err(|error| error.error)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_file_is_replaced_whole_for_everybody_to_read_and_nothing_stays_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agentd.prom");
        for page in ["a 1\n", "b 2\n"] {
            write(&path, page).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), page);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o644);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_can_not_be_written_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("taken")).unwrap();
        assert!(write(&folder.path().join("taken"), "a 1\n").is_err());
        assert!(write(&folder.path().join("nowhere/agentd.prom"), "a 1\n").is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
