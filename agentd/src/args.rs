//! The daemon's command line. Knows nothing of what it is for: the manual page is made from it, too.

use std::path::PathBuf;

use clap::Parser;

/// Changes CPU and memory of running VMs and containers, live, under one set of host caps.
#[derive(Debug, Parser)]
#[command(name = "agentd", version)]
pub(crate) struct Args {
    /// The config file.
    #[arg(long, default_value = "/etc/agentd/agentd.toml")]
    pub(crate) config: PathBuf,
    /// The socket to serve, in place of the config's; one that systemd passes wins over both.
    #[arg(long)]
    pub(crate) socket: Option<PathBuf>,
    /// Where state is kept, in place of the config's.
    #[arg(long)]
    pub(crate) state_dir: Option<PathBuf>,
    /// Check the config file and end.
    #[arg(long)]
    pub(crate) check: bool,
    /// A fake engine for VMs, described by this file; for tests.
    #[cfg(feature = "fake")]
    #[arg(long, hide = true, env = "AGENTD_FAKE")]
    pub(crate) fake: Option<PathBuf>,
}
