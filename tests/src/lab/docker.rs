//! A private Docker engine with an image of its own: no registry, no bridge, no firewall rules, its own containerd.
//! Its containers live on when it is killed, as on a host with `live-restore`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};

use super::{Lab, daemon::Daemon, stdout_of, wait_until};

/// The image that every container of the lab is made of: busybox.
const IMAGE: &str = "lab";

/// A running private dockerd.
pub struct Docker {
    lab: Lab,
    daemon: Option<Daemon>,
}

/// Where a container's cgroup files are, as seen from outside the lab. On cgroup v2 both are the same folder.
#[derive(Debug, Clone)]
pub struct CgroupPaths {
    /// The folder with `cpu.cfs_quota_us` or `cpu.max`.
    pub cpu: PathBuf,
    /// The folder with `memory.limit_in_bytes` or `memory.max`.
    pub memory: PathBuf,
}

impl CgroupPaths {
    /// CPU time limit as (quota, period) in microseconds; no quota is no limit.
    ///
    /// # Errors
    /// A file that is not there: the container has ended.
    pub fn cpu_quota(&self) -> Result<(Option<i64>, i64)> {
        if let Ok(max) = fs::read_to_string(self.cpu.join("cpu.max")) {
            let (quota, period) = max.trim().split_once(' ').context("cpu.max has two numbers")?;
            return Ok((quota.parse().ok(), period.parse()?));
        }
        let read = |file: &str| -> Result<i64> { Ok(fs::read_to_string(self.cpu.join(file))?.trim().parse()?) };
        Ok((Some(read("cpu.cfs_quota_us")?).filter(|&quota| quota >= 0), read("cpu.cfs_period_us")?))
    }

    /// Memory limit in bytes; none is no limit.
    ///
    /// # Errors
    /// A file that is not there: the container has ended.
    pub fn memory_limit(&self) -> Result<Option<u64>> {
        let file = ["memory.max", "memory.limit_in_bytes"].map(|file| self.memory.join(file));
        let text = fs::read_to_string(&file[0]).or_else(|_| fs::read_to_string(&file[1]))?;
        // v1 has no word for "none": it is the largest multiple of the page size.
        Ok(text.trim().parse().ok().filter(|&limit: &u64| limit < 1 << 62))
    }
}

impl Docker {
    /// Starts the engine and imports the image `lab`.
    ///
    /// # Errors
    /// Docker not installed, or an engine that doesn't come up; the message has the end of its log.
    pub fn start(lab: &Lab) -> Result<Self> {
        let mut docker = Self { lab: lab.clone(), daemon: None };
        fs::write(docker.folder().join("daemon.json"), "{}")?;
        docker.start_again()?;
        docker.import_image()?;
        Ok(docker)
    }

    /// The engine's socket; the path is the same inside and outside the lab.
    pub fn socket(&self) -> PathBuf {
        self.lab.dir().join("docker/docker.sock")
    }

    /// Ends the engine as `kill -9` does. Its containers live on; its socket file stays, and nobody answers there.
    ///
    /// # Errors
    /// The engine was not running.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.take().context("dockerd doesn't run")?.kill_hard()?;
        // Its containerd dies with it, a moment later. A dockerd started meanwhile would wait for that one in vain, and
        // so it would where the machine's process number 1 doesn't reap: a zombie counts as running there.
        let file = self.folder().join("exec/containerd/containerd.pid");
        if let Ok(pid) = fs::read_to_string(&file) {
            let stat = PathBuf::from(format!("/proc/{}/stat", pid.trim()));
            wait_until("containerd's end", Duration::from_secs(20), || {
                let stat = fs::read_to_string(&stat).unwrap_or_default();
                let state = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().next()).unwrap_or("Z");
                Ok(matches!(state, "Z" | "X").then_some(()))
            })?;
            let _ = fs::remove_file(file);
        }
        Ok(())
    }

    /// Starts the engine on the same folders, after [`kill`](Self::kill), and waits until it answers.
    ///
    /// # Errors
    /// An engine that doesn't come up; the message has the end of its log.
    pub fn start_again(&mut self) -> Result<()> {
        let folder = self.folder();
        let mut command = self.lab.command("dockerd");
        command.arg("--config-file").arg(folder.join("daemon.json"));
        command.arg("--data-root").arg(folder.join("data")).arg("--exec-root").arg(folder.join("exec"));
        command.arg("--pidfile").arg(folder.join("pid")).arg("-H").arg(self.host());
        command.args([
            "--bridge=none",
            "--iptables=false",
            "--ip6tables=false",
            "--ip-forward=false",
            "--ip-masq=false",
        ]);
        command.args(["--exec-opt", "native.cgroupdriver=cgroupfs", "--live-restore", "--userland-proxy=false"]);
        let mut daemon = Daemon::start(&self.lab, "dockerd", command)?;
        wait_until("dockerd's answer", Duration::from_secs(60), || {
            // A ping by the client would be slower, and loud while the socket isn't there.
            Ok(daemon.still_runs().map_or_else(|ended| Some(Err(ended)), |()| self.pings().then_some(Ok(()))))
        })??;
        self.daemon = Some(daemon);
        Ok(())
    }

    fn pings(&self) -> bool {
        super::http::request(&self.socket(), "GET", "/_ping", &[], b"").is_ok_and(|reply| reply.status == 200)
    }

    fn folder(&self) -> PathBuf {
        let folder = self.lab.dir().join("docker");
        fs::create_dir_all(&folder).ok();
        folder
    }

    fn host(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// A `docker` command on this engine, to be given arguments.
    pub fn command(&self) -> Command {
        let mut command = self.lab.command("docker");
        command.arg("-H").arg(self.host());
        command
    }

    /// Runs `docker ARGS…` and gives what it printed, without the last newline.
    ///
    /// # Errors
    /// An exit code other than 0; the message has what it printed.
    pub fn docker(&self, args: &[&str]) -> Result<String> {
        Ok(stdout_of(self.command().args(args))?.trim_end().to_owned())
    }

    /// Runs a container in the background that sleeps until it is stopped; `args` are further arguments of
    /// `docker run`. Gives its full id.
    ///
    /// # Errors
    /// What docker says.
    pub fn run(&self, name: &str, args: &[&str]) -> Result<String> {
        self.run_command(name, args, &["sleep", "1000000"])
    }

    /// Runs a container in the background that holds `mib` MiB of memory until it is stopped; gives its full id.
    ///
    /// # Errors
    /// What docker says.
    pub fn run_memory_eater(&self, name: &str, args: &[&str], mib: u32) -> Result<String> {
        self.run_command(name, args, &["/bin/eat", &mib.to_string()])
    }

    /// Runs a container in the background with a command of its own; gives its full id.
    ///
    /// # Errors
    /// What docker says.
    pub fn run_command(&self, name: &str, args: &[&str], command: &[&str]) -> Result<String> {
        // With an init, since a process number 1 that is just `sleep` ignores SIGTERM and every stop would take 10 s.
        let all = [&["run", "-d", "--init", "--network=none", "--name", name], args, &[IMAGE], command].concat();
        self.docker(&all)
    }

    /// Removes a container, running or not.
    ///
    /// # Errors
    /// What docker says.
    pub fn rm(&self, name: &str) -> Result<()> {
        self.docker(&["rm", "-f", name]).map(drop)
    }

    /// The cgroup folders of a running container, found by its first process; `container` is a name or an id.
    ///
    /// # Errors
    /// No such container, or it doesn't run.
    pub fn cgroup(&self, container: &str) -> Result<CgroupPaths> {
        let pid = self.docker(&["inspect", "-f", "{{.State.Pid}}", container])?;
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).context("the container doesn't run")?;
        let folder = |controller: &str| -> Option<PathBuf> {
            let mounted = Path::new("/sys/fs/cgroup");
            let lines = cgroups.lines().map(|line| line.splitn(3, ':').collect::<Vec<_>>());
            for parts in lines.filter(|parts| parts.len() == 3) {
                let path = parts[2].trim_start_matches('/');
                if parts[1].split(',').any(|name| name == controller) {
                    return Some(mounted.join(controller).join(path));
                }
                if parts[1].is_empty() && mounted.join("cgroup.controllers").exists() {
                    return Some(mounted.join(path));
                }
            }
            None
        };
        Ok(CgroupPaths {
            cpu: folder("cpu").context("no cpu cgroup")?,
            memory: folder("memory").context("no memory cgroup")?,
        })
    }

    /// Makes the image out of busybox, a folder of links, and a shell script that holds memory.
    fn import_image(&self) -> Result<()> {
        let root = self.folder().join("image");
        let bin = root.join("bin");
        fs::create_dir_all(&bin)?;
        for folder in ["dev", "proc", "sys", "etc"] {
            fs::create_dir(root.join(folder))?;
        }
        // tmp is writable by anybody, for containers with a user of their own.
        fs::create_dir(root.join("tmp"))?;
        fs::copy("/bin/busybox", bin.join("busybox")).context("busybox-static is not installed")?;
        for link in ["sh", "sleep", "cat", "dd", "echo", "true", "false", "tail", "yes", "head", "ls", "ps"] {
            std::os::unix::fs::symlink("busybox", bin.join(link))?;
        }
        let eat = bin.join("eat");
        fs::write(&eat, include_str!("../../assets/eat.sh"))?;
        fs::set_permissions(&eat, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let mut tar = Command::new("tar").arg("-C").arg(&root).args(["-c", "."]).stdout(Stdio::piped()).spawn()?;
        let archive = tar.stdout.take().context("tar has an output")?;
        stdout_of(self.command().args(["import", "-", IMAGE]).stdin(archive))?;
        tar.wait()?;
        Ok(())
    }
}
