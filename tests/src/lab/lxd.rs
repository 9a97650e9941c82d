//! A private LXD with one busybox container: a peer to measure beside. Knows nothing of agentd.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result};

use super::{Lab, daemon::Daemon, stdout_of, wait_until};

/// What the container runs: nothing, and it goes down when asked.
const INIT: &str = "#!/bin/sh\ntrap 'exit 0' TERM PWR INT\nwhile :; do sleep 1000 & wait $!; done\n";

/// A running LXD.
pub struct Lxd {
    lab: Lab,
    container: String,
    daemon: Daemon,
}

impl Drop for Lxd {
    fn drop(&mut self) {
        // It would outlive its daemon, and the lab.
        let _ = self.lxc(&["delete", "--force", &self.container]);
    }
}

impl Lxd {
    /// Starts the daemon with a pool of storage in the lab's folder, and a container of this name.
    ///
    /// # Errors
    /// LXD is not installed or doesn't come up; the message has what it said.
    pub fn start(lab: &Lab, container: &str) -> Result<Self> {
        let folder = lab.dir().join("lxd");
        fs::create_dir_all(&folder)?;
        // With mounts of its own only: inside the lab's cgroups LXC finds no root that it would take.
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "lxd", "--group", "root"]).env("LXD_DIR", &folder);
        let daemon = Daemon::start(lab, "lxd", command)?;
        let mut lxd = Self { lab: lab.clone(), container: container.to_owned(), daemon };
        wait_until("LXD's answer", Duration::from_secs(60), || match lxd.daemon.still_runs() {
            Ok(()) => Ok(lxd.lxc(&["list"]).ok().map(|_| Ok(()))),
            Err(ended) => Ok(Some(Err(ended))),
        })??;
        lxd.lxc(&["storage", "create", "default", "dir"])?;
        lxd.lxc(&["profile", "device", "add", "default", "root", "disk", "path=/", "pool=default"])?;
        let image = lxd.image()?;
        lxd.lxc(&["image", "import", &image.to_string_lossy(), "--alias", "busybox"])?;
        let log = folder.join("logs").join(container).join("lxc.log");
        lxd.lxc(&["launch", "busybox", container, "-c", "security.privileged=true"])
            .with_context(|| fs::read_to_string(log).unwrap_or_default())?;
        Ok(lxd)
    }

    /// An `lxc` command on this LXD that can be run from anywhere, to be given arguments.
    pub fn command(&self) -> Command {
        let mut command = Command::new("lxc");
        command.env("LXD_DIR", self.lab.dir().join("lxd")).env("HOME", self.lab.dir().join("home")).env("LC_ALL", "C");
        command
    }

    /// Runs `lxc ARGS…` and gives what it printed.
    ///
    /// # Errors
    /// An exit code other than 0; the message has what it printed.
    pub fn lxc(&self, args: &[&str]) -> Result<String> {
        stdout_of(self.command().args(args))
    }

    /// An image of busybox.
    fn image(&self) -> Result<PathBuf> {
        let folder = self.lab.dir().join("lxd-image");
        let bin = folder.join("rootfs/bin");
        fs::create_dir_all(&bin)?;
        for name in ["sbin", "dev", "proc", "sys", "etc", "tmp", "root", "run"] {
            fs::create_dir_all(folder.join("rootfs").join(name))?;
        }
        fs::copy("/bin/busybox", bin.join("busybox")).context("busybox-static is not installed")?;
        for link in ["sh", "sleep"] {
            std::os::unix::fs::symlink("busybox", bin.join(link))?;
        }
        let init = folder.join("rootfs/sbin/init");
        fs::write(&init, INIT)?;
        fs::set_permissions(&init, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        fs::write(folder.join("metadata.yaml"), "architecture: x86_64\ncreation_date: 1\n")?;
        let tar = self.lab.dir().join("image.tar.gz");
        let mut pack = Command::new("tar");
        pack.arg("-C").arg(&folder).arg("-czf").arg(&tar).args(["metadata.yaml", "rootfs"]);
        stdout_of(&mut pack)?;
        Ok(tar)
    }
}
