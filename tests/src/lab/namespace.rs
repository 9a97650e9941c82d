//! One lab: a temporary folder, a private mount, network and cgroup namespace, and a guardian process that ends all of it.
//! Knows nothing about the engines that run inside.

use std::{
    ffi::CString,
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    fcntl::OFlag,
    sched::{CloneFlags, setns},
    sys::stat::Mode,
    unistd::{geteuid, setsid},
};

use super::wait_until;

/// What the guardian runs; it also holds the rules of cleaning up.
const GUARDIAN: &str = include_str!("../../assets/guardian.sh");

/// A private corner of the machine that ends with the test process. Needs root.
///
/// Cloning it gives another handle on the same lab; the last one dropped takes the lab down.
#[derive(Clone)]
pub struct Lab {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    name: String,
    join: Vec<CString>,
    namespaces: Vec<(OwnedFd, CloneFlags)>,
    guardian: Mutex<(Child, Option<ChildStdin>)>,
}

impl Lab {
    /// Makes a lab: folder, cgroups, namespaces.
    ///
    /// # Errors
    /// Not being root, or a kernel that refuses the namespaces.
    pub fn new() -> Result<Self> {
        ensure!(geteuid().is_root(), "the lab needs root: it makes namespaces and cgroups");
        // Short, since Unix sockets below it must fit into 108 bytes; removed by the guardian.
        let dir = tempfile::Builder::new().prefix("lab-").tempdir().context("no temporary folder")?.keep();
        let name = format!("agentd-{}", dir.file_name().context("a temporary folder has a name")?.to_string_lossy());
        let mut command = Command::new("sh");
        command.args(["-c", GUARDIAN, "guardian"]).arg(&dir).arg(&name).env("LC_ALL", "C");
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        // SAFETY: setsid is async-signal-safe. It keeps a Ctrl-C at the terminal from ending the guardian early.
        unsafe { command.pre_exec(|| setsid().map(drop).map_err(io::Error::from)) };
        let log = dir.join("guardian.log");
        let mut guardian = command.stderr(File::create(&log)?).spawn().context("cannot start the guardian")?;
        let stdin = guardian.stdin.take();
        let holder = wait_until("the lab's namespaces", Duration::from_secs(20), || {
            if let Some(status) = guardian.try_wait()? {
                anyhow::bail!("the guardian ended with {status}");
            }
            Ok(fs::read_to_string(dir.join("holder")).ok())
        })
        .with_context(|| fs::read_to_string(&log).unwrap_or_default())?;
        let holder = holder.trim();
        let namespaces = [("cgroup", CloneFlags::CLONE_NEWCGROUP), ("net", CloneFlags::CLONE_NEWNET)]
            .into_iter()
            .chain([("mnt", CloneFlags::CLONE_NEWNS)])
            .map(|(kind, flag)| Ok((File::open(format!("/proc/{holder}/ns/{kind}"))?.into(), flag)))
            .collect::<io::Result<Vec<_>>>()
            .context("cannot open the lab's namespaces")?;
        let join = fs::read_to_string(dir.join("join"))?.lines().map(CString::new).collect::<Result<_, _>>()?;
        for folder in ["logs", "home"] {
            fs::create_dir(dir.join(folder))?;
        }
        let guardian = Mutex::new((guardian, stdin));
        Ok(Self { inner: Arc::new(Inner { dir, name, join, namespaces, guardian }) })
    }

    /// The lab's folder: the same path inside and outside.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// What the lab's cgroups are called, a folder below each hierarchy of the machine.
    pub fn cgroup_name(&self) -> &str {
        &self.inner.name
    }

    /// Where a path of inside the lab is to be found from outside: libvirt's folders are elsewhere, and a cgroup path
    /// starts at the lab's own cgroup.
    pub fn outside(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        for folder in ["run/libvirt", "var/lib/libvirt", "etc/libvirt", "var/log/libvirt", "var/cache/libvirt"] {
            if let Ok(below) = inside.strip_prefix(Path::new("/").join(folder)) {
                return self.dir().join("root").join(folder).join(below);
            }
        }
        let Ok(below) = inside.strip_prefix("/sys/fs/cgroup") else { return inside.to_owned() };
        let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let mut parts = below.components();
        let mut path = PathBuf::from("/sys/fs/cgroup");
        if !unified {
            path.extend(parts.next());
        }
        path.join(&self.inner.name).join(parts.as_path())
    }

    /// A command that will run inside the lab: in its cgroups, mounts and network, with a home of its own.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("HOME", self.dir().join("home")).env("LC_ALL", "C").env_remove("XDG_RUNTIME_DIR");
        command.env_remove("DOCKER_HOST").env_remove("LIBVIRT_DEFAULT_URI");
        let inner = Arc::clone(&self.inner);
        let enter = move || {
            inner.join.iter().try_for_each(join_cgroup)?;
            inner.namespaces.iter().try_for_each(|(fd, flag)| setns(fd, *flag))?;
            Ok(())
        };
        // SAFETY: the closure only makes system calls (open, write, close, setns) on what was prepared before the fork;
        // it neither allocates nor takes a lock.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Runs a command inside and gives what it printed.
    ///
    /// # Errors
    /// Where it could not be run or did not end with 0; the message has what it printed.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        super::stdout_of(self.command(program).args(args))
    }

    /// The file below the lab that a program's output goes to.
    pub(crate) fn log_path(&self, program: &str) -> PathBuf {
        self.dir().join("logs").join(format!("{program}.log"))
    }
}

/// Moves the calling process into a cgroup, given the path of its `cgroup.procs`.
fn join_cgroup(procs: &CString) -> nix::Result<()> {
    let fd: OwnedFd = nix::fcntl::open(procs.as_c_str(), OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    nix::unistd::write(&fd, b"0").map(drop)
}

impl Drop for Inner {
    fn drop(&mut self) {
        let guardian = self.guardian.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        drop(guardian.1.take());
        let _ = guardian.0.wait();
    }
}
