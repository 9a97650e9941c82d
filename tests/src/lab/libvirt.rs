//! A private libvirt: virtlogd and libvirtd in the lab's own folders, and virsh on it. Domains are QEMU without KVM.
//! They live on when libvirtd is killed, as on a real host.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result};

use super::{Lab, daemon::Daemon, stdout_of, wait_until};

/// Settings of the QEMU driver. QEMU runs as root, so that neither /dev/kvm's mode (an unreadable one makes libvirt probe
/// every QEMU anew, for half a minute) nor the ownership of the lab's files matters.
const QEMU_CONF: &str = "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nremember_owner = 0\n\
    security_driver = \"none\"\nnamespaces = []\n";

/// Settings of libvirtd: no polkit, whoever reaches the socket may use it.
const LIBVIRTD_CONF: &str = "auth_unix_ro = \"none\"\nauth_unix_rw = \"none\"\nunix_sock_rw_perms = \"0700\"\n";

/// A running private libvirt.
pub struct Libvirt {
    lab: Lab,
    libvirtd: Option<Daemon>,
    _virtlogd: Daemon,
}

impl Libvirt {
    /// Starts virtlogd and libvirtd and waits until QEMU's driver answers.
    ///
    /// # Errors
    /// libvirt not installed, or one that doesn't come up; the message has the end of its log.
    pub fn start(lab: &Lab) -> Result<Self> {
        let etc = lab.outside("/etc/libvirt");
        fs::write(etc.join("qemu.conf"), QEMU_CONF)?;
        fs::write(etc.join("libvirtd.conf"), LIBVIRTD_CONF)?;
        fs::write(etc.join("virtlogd.conf"), "")?;
        // libvirt makes these on its own only where the package did not, and virtlogd never does.
        fs::create_dir_all(lab.outside("/var/log/libvirt/qemu"))?;
        let mut command = lab.command("virtlogd");
        command.arg("--pid-file").arg(lab.dir().join("virtlogd.pid"));
        let virtlogd = Daemon::start(lab, "virtlogd", command)?;
        let mut libvirt = Self { lab: lab.clone(), libvirtd: None, _virtlogd: virtlogd };
        libvirt.start_again()?;
        Ok(libvirt)
    }

    /// The connection URI; it holds both inside and outside the lab.
    pub fn uri(&self) -> String {
        format!("qemu:///system?socket={}", self.socket().display())
    }

    /// libvirtd's socket, as seen from anywhere. Inside the lab it is /run/libvirt/libvirt-sock, too.
    pub fn socket(&self) -> PathBuf {
        self.lab.outside("/run/libvirt/libvirt-sock")
    }

    /// The lab that it runs in.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// libvirtd's process id, for tests that stop or limit it; none while it is killed.
    pub fn pid(&self) -> Option<i32> {
        self.libvirtd.as_ref().map(|daemon| daemon.pid().as_raw())
    }

    /// Ends libvirtd as `kill -9` does; domains run on.
    ///
    /// # Errors
    /// It was not running.
    pub fn kill(&mut self) -> Result<()> {
        self.libvirtd.take().context("libvirtd doesn't run")?.kill_hard()
    }

    /// Starts libvirtd on the same folders, after [`kill`](Self::kill), and waits until it answers.
    ///
    /// # Errors
    /// One that doesn't come up; the message has the end of its log.
    pub fn start_again(&mut self) -> Result<()> {
        let mut command = self.lab.command("libvirtd");
        command.arg("--pid-file").arg(self.lab.dir().join("libvirtd.pid"));
        let mut daemon = Daemon::start(&self.lab, "libvirtd", command)?;
        let uri = self.uri();
        wait_until("libvirtd's answer", Duration::from_secs(120), || {
            if let Err(ended) = daemon.still_runs() {
                return Ok(Some(Err(ended)));
            }
            // virsh without a socket would ask systemd's units to start one; there are none.
            if !self.socket().exists() {
                return Ok(None);
            }
            stdout_of(self.lab.command("virsh").args(["-c", &uri, "list", "--all"])).map(|_| Some(Ok(())))
        })
        .with_context(|| self.lab.log_path("libvirtd").display().to_string())??;
        self.libvirtd = Some(daemon);
        Ok(())
    }

    /// A `virsh` command on this libvirt, to be given arguments.
    pub fn command(&self) -> Command {
        let mut command = self.lab.command("virsh");
        command.args(["-q", "-c", &self.uri()]);
        command
    }

    /// Runs `virsh ARGS…` and gives what it printed, without the last newline.
    ///
    /// # Errors
    /// An exit code other than 0; the message has what it printed.
    pub fn virsh(&self, args: &[&str]) -> Result<String> {
        Ok(stdout_of(self.command().args(args))?.trim_end().to_owned())
    }

    /// The process id of a domain's QEMU, from libvirt's own pid file.
    ///
    /// # Errors
    /// The domain doesn't run.
    pub fn qemu_pid(&self, domain: &str) -> Result<i32> {
        let file = self.lab.outside("/run/libvirt/qemu").join(format!("{domain}.pid"));
        Ok(fs::read_to_string(&file).with_context(|| format!("{domain} doesn't run"))?.trim().parse()?)
    }
}
