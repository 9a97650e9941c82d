//! A background program of the lab: started with its output in a log, ended by its own process id.
//! Knows nothing about what the program is.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        LazyLock, Mutex, PoisonError,
        mpsc::{SyncSender, sync_channel},
    },
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::{
        prctl::set_pdeathsig,
        signal::{Signal, kill},
    },
    unistd::Pid,
};

use super::Lab;

/// A running child; dropping it kills it.
pub(crate) struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command`, which should have been made by [`Lab::command`]; its output is appended to `NAME.log`.
    pub(crate) fn start(lab: &Lab, name: &str, command: Command) -> Result<Self> {
        Self::start_logging_to(&lab.log_path(name), name, command)
    }

    /// Starts `command` with its output appended to a file.
    pub(crate) fn start_logging_to(log: &Path, name: &str, mut command: Command) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = spawn(command).with_context(|| format!("cannot start {name}"))?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// The process id, as seen from everywhere: the lab has no process namespace of its own.
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// An error, with the end of the log, where the program has ended.
    pub(crate) fn still_runs(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("ended with {status}:\n{}", self.log_tail()),
        }
    }

    /// How it ended, where it has.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(self.pid(), signal)?)
    }

    /// Ends it at once, as `kill -9` does, and waits until it is gone.
    pub(crate) fn kill_hard(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for its end, at most `limit`; gives the exit code where it ended by itself.
    pub(crate) fn wait_end(&mut self, limit: std::time::Duration) -> Result<Option<i32>> {
        super::wait_until("the end of a program", limit, || Ok(self.child.try_wait()?)).map(|status| status.code())
    }

    /// The last 60 lines that it printed.
    pub(crate) fn log_tail(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

/// Spawns a child that dies with this process, even where this process is killed.
///
/// The kernel's death signal is sent when the *thread* that made the child ends, and a test is a thread: so all
/// children are made by one thread that never ends.
fn spawn(mut command: Command) -> io::Result<Child> {
    type Request = (Command, SyncSender<io::Result<Child>>);
    static SPAWNER: LazyLock<Mutex<SyncSender<Request>>> = LazyLock::new(|| {
        let (sender, requests) = sync_channel::<Request>(0);
        std::thread::spawn(move || {
            for (mut command, reply) in requests {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(sender)
    });
    // SAFETY: prctl is async-signal-safe.
    unsafe { command.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from)) };
    let (reply, child) = sync_channel(1);
    let sent = SPAWNER.lock().unwrap_or_else(PoisonError::into_inner).send((command, reply));
    sent.map_err(io::Error::other)?;
    child.recv().map_err(io::Error::other)?
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.kill_hard();
    }
}
