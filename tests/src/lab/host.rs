//! A whole host as a virtual machine: Debian with systemd, cgroup v2, libvirt and Docker, as `tests/lab/image.sh` makes it
//! from packages. For what an engine alone can't show: units, users, the journal, a reboot. Everything in it is done over ssh.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use super::daemon::Daemon;
use super::{stdout_of, target_folder, wait_until};

/// How long it may take to boot; all of it is emulated.
const BOOT: Duration = Duration::from_secs(300);
/// How long it may take to go down.
const DOWN: Duration = Duration::from_secs(120);

/// The host; dropped, it is switched off, and its disk is gone.
pub struct Host {
    daemon: Option<Daemon>,
    image: PathBuf,
    folder: TempDir,
    port: u16,
}

impl Host {
    /// Boots a fresh one and waits until it can be worked in. The first makes the image, which later ones share.
    ///
    /// # Errors
    /// It can't be built, or does not come up; the message has its console.
    pub fn boot() -> Result<Self> {
        let image = image()?;
        let folder = tempfile::Builder::new().prefix("host-").tempdir()?;
        // A disk of its own; where the file system can, the blocks are shared.
        let copy = ["--reflink=auto", "--sparse=always"];
        stdout_of(Command::new("cp").args(copy).arg(image.join("disk.img")).arg(folder.path().join("disk.img")))?;
        for file in ["key", "host.pub"] {
            fs::copy(image.join(file), folder.path().join(file))?;
        }
        // Free a moment ago: whoever takes it meanwhile makes QEMU end with a message that says so.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut host = Host { daemon: None, image, folder, port };
        host.power_on()?;
        Ok(host)
    }

    /// Switches it on and waits for it.
    fn power_on(&mut self) -> Result<()> {
        let file = |name: &str| self.folder.path().join(name);
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "4096", "-display", "none"]);
        qemu.args(["-append", "root=/dev/vda rw console=ttyS0", "-monitor", "none", "-no-reboot"]);
        qemu.arg("-kernel").arg(self.image.join("vmlinuz")).arg("-initrd").arg(self.image.join("initrd.img"));
        qemu.arg("-drive").arg(format!("file={},if=virtio,format=raw,cache=unsafe", file("disk.img").display()));
        qemu.args(["-nic", &format!("user,model=virtio-net-pci,hostfwd=tcp:127.0.0.1:{}-:22", self.port)]);
        qemu.args(["-object", "rng-random,filename=/dev/urandom,id=rng", "-device", "virtio-rng-pci,rng=rng"]);
        qemu.arg("-serial").arg(format!("file:{}", file("console.log").display()));
        self.daemon = Some(Daemon::start_logging_to(&file("qemu.log"), "the host", qemu)?);
        let up = wait_until("the host to come up", BOOT, || {
            if let Some(daemon) = &mut self.daemon {
                daemon.still_runs()?;
            }
            std::thread::sleep(Duration::from_secs(1));
            let state = self.ssh("root", "systemctl is-system-running --wait 2>/dev/null || true")?;
            Ok(matches!(state.as_str(), "running" | "degraded").then_some(()))
        });
        up.with_context(|| self.console())
    }

    /// Reboots it as an administrator would.
    ///
    /// # Errors
    /// It does not come up again.
    pub fn reboot(&mut self) -> Result<()> {
        // The connection breaks before the command has ended.
        let _ = self.ssh("root", "systemctl reboot");
        self.wait_for_the_end()?;
        self.power_on()
    }

    /// Cuts its power, and gives it back.
    ///
    /// # Errors
    /// It does not come up again.
    pub fn cut_power(&mut self) -> Result<()> {
        drop(self.daemon.take());
        self.power_on()
    }

    fn wait_for_the_end(&mut self) -> Result<()> {
        let began = Instant::now();
        while self.daemon.as_mut().is_some_and(|daemon| daemon.still_runs().is_ok()) {
            ensure!(began.elapsed() < DOWN, "it does not go down\n{}", self.console());
            std::thread::sleep(Duration::from_millis(200));
        }
        self.daemon = None;
        Ok(())
    }

    /// Runs a line of shell as this user; what it prints, without the last line's end.
    ///
    /// # Errors
    /// It ended with another code than 0: what it printed, both ways.
    pub fn ssh(&self, user: &str, line: &str) -> Result<String> {
        let output = self.try_ssh(user, line)?;
        let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if !output.status.success() {
            bail!("`{line}` as {user} ended with {}: {}{}", output.status, stderr.trim_end(), stdout.trim_end());
        }
        Ok(stdout.trim_end().to_owned())
    }

    /// The same, however it ends.
    ///
    /// # Errors
    /// ssh can't be run.
    pub fn try_ssh(&self, user: &str, line: &str) -> Result<Output> {
        let mut ssh = self.command("ssh");
        ssh.args(["-p", &self.port.to_string(), "root@127.0.0.1", "--"]);
        // A login of its own each time, so that groups are those of now.
        let line =
            if user == "root" { line.to_owned() } else { format!("runuser -u {user} -- sh -c {}", quoted(line)) };
        ssh.arg(line).output().context("ssh can't be run")
    }

    /// Copies a file into it.
    ///
    /// # Errors
    /// It can't be copied.
    pub fn put(&self, from: &Path, to: &str) -> Result<()> {
        let mut scp = self.command("scp");
        scp.args(["-q", "-P", &self.port.to_string()]).arg(from).arg(format!("root@127.0.0.1:{to}"));
        stdout_of(&mut scp).map(drop)
    }

    /// `ssh` or `scp`, with all that makes it ask nothing and remember nothing.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let key = self.folder.path().join("key");
        command.arg("-i").arg(key).args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
        command.args(["-o", "LogLevel=ERROR", "-o", "ConnectTimeout=10", "-o", "BatchMode=yes"]);
        // A host that hangs ends what waits for it: three minutes without a sign of life are long, also for an emulated one.
        command.args(["-o", "ServerAliveInterval=30", "-o", "ServerAliveCountMax=6"]);
        // One connection for all: each of its own takes a second of an emulated machine.
        let control = format!("ControlPath={}", self.folder.path().join("ssh").display());
        command.args(["-o", "ControlMaster=auto", "-o", "ControlPersist=60", "-o", &control]);
        command
    }

    /// For ssh from outside: the port, the file of root's key, and that of the host's public one.
    pub fn address(&self) -> (u16, PathBuf, PathBuf) {
        (self.port, self.folder.path().join("key"), self.folder.path().join("host.pub"))
    }

    fn console(&self) -> String {
        let all = fs::read(self.folder.path().join("console.log")).unwrap_or_default();
        let all = String::from_utf8_lossy(&all);
        let lines: Vec<&str> = all.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The connection that is kept for later ones.
        let _ = self.command("ssh").args(["-O", "exit", "root@127.0.0.1"]).output();
    }
}

/// A word for a shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The image, made where there is none that this script would make: below `AGENTD_HOST_IMAGES`, else beside what cargo built.
fn image() -> Result<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("lab/image.sh");
    let folder = match std::env::var_os("AGENTD_HOST_IMAGES") {
        Some(folder) => PathBuf::from(folder),
        None => target_folder()?.join("host-images"),
    };
    let sum = stdout_of(Command::new("sha256sum").arg(&script))?;
    let image = folder.join(sum.get(..12).context("a checksum")?);
    println!("the host's image: {}", image.display());
    stdout_of(Command::new(script).arg(&image))?;
    Ok(image)
}
