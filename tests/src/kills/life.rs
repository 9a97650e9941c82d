//! One daemon through several lives on one state folder: started to be killed at a place of its own choosing, or at a moment
//! of ours, and started again. Knows nothing about what it is asked.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::os::unix::process::ExitStatusExt;
use tempfile::TempDir;

use crate::lab::{Lab, Response, binary, daemon::Daemon, http};

/// How long anything may take that a machine under load does: starting, dying, settling.
const PATIENCE: Duration = Duration::from_secs(90);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(10);

/// When a daemon is to be killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kill {
    /// Not by itself.
    Never,
    /// At the n-th place that it reaches.
    At(u64),
    /// This long after it is ready.
    After(Duration),
}

/// What the lives of one daemon share: config, socket, state, log.
pub struct Home {
    folder: TempDir,
    lab: Option<Lab>,
    envs: BTreeMap<String, String>,
}

impl Home {
    /// A fresh one with this config file.
    ///
    /// # Errors
    /// No temporary folder.
    pub fn new(config: &str) -> Result<Home> {
        let folder = tempfile::Builder::new().prefix("agentd-").tempdir()?;
        fs::create_dir(folder.path().join("state"))?;
        fs::write(folder.path().join("agentd.toml"), config)?;
        Ok(Home { folder, lab: None, envs: BTreeMap::new() })
    }

    /// Its daemons run inside this lab.
    #[must_use]
    pub fn inside(mut self, lab: &Lab) -> Home {
        self.lab = Some(lab.clone());
        self
    }

    /// Sets a variable of their environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Home {
        self.envs.insert(name.to_owned(), value.to_owned());
        self
    }

    /// The folder of all this.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The state folder.
    pub fn state_dir(&self) -> PathBuf {
        self.folder().join("state")
    }

    /// All that its daemons have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder().join("agentd.log")).unwrap_or_default()
    }

    /// The names of the places at which its daemons have killed themselves.
    pub fn places(&self) -> Vec<String> {
        let log = self.log();
        let killed = log.lines().filter_map(|line| line.strip_prefix("killed at place "));
        killed.filter_map(|line| line.split_once(", ")).map(|(_, place)| place.to_owned()).collect()
    }

    /// Begins a life, and waits until it answers, or is killed before it does.
    ///
    /// # Errors
    /// It ended otherwise, or does not answer.
    pub fn start(&self, kill: Kill) -> Result<Life> {
        let program = binary("AGENTD_BIN", "agentd")?;
        let mut command = self.lab.as_ref().map_or_else(|| Command::new(&program), |lab| lab.command(&program));
        let socket = self.folder().join("agentd.sock");
        command.arg("--config").arg(self.folder().join("agentd.toml")).arg("--socket").arg(&socket);
        command.arg("--state-dir").arg(self.state_dir()).envs(&self.envs).env_remove("AGENTD_KILL_AT");
        if let Kill::At(place) = kill {
            command.env("AGENTD_KILL_AT", place.to_string());
        }
        let daemon = Daemon::start_logging_to(&self.folder().join("agentd.log"), "agentd", command)?;
        let life = Life { daemon: Mutex::new(daemon), socket };
        // Somebody else's answer, of the life before, can't come: its socket went with it.
        life.wait("the daemon's answer", || {
            Ok(http::request(&life.socket, "GET", "/v1/health", &[], b"").is_ok_and(|reply| reply.status == 200))
        })?;
        Ok(life)
    }
}

/// One life of a daemon; dropped, it ends at once.
pub struct Life {
    daemon: Mutex<Daemon>,
    socket: PathBuf,
}

impl Life {
    /// Whether it was killed.
    ///
    /// # Errors
    /// It ended in another way.
    pub fn is_dead(&self) -> Result<bool> {
        let mut daemon = self.daemon.lock().unwrap_or_else(PoisonError::into_inner);
        match daemon.ended()? {
            None => Ok(false),
            Some(status) => {
                ensure!(status.signal() == Some(Signal::SIGKILL as i32), "it ended with {status}");
                Ok(true)
            }
        }
    }

    /// Ends it as `kill -9` does.
    ///
    /// # Errors
    /// It can't be.
    pub fn kill(&self) -> Result<()> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner).kill_hard()
    }

    /// Sends one request; none where it was killed before it answered.
    ///
    /// # Errors
    /// No reply, though it lives.
    pub fn ask(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Option<Response>> {
        match http::request(&self.socket, method, path, headers, body) {
            Ok(reply) => Ok(Some(reply)),
            Err(error) => {
                // A connection ends a moment before its process does.
                let began = Instant::now();
                while began.elapsed() < Duration::from_secs(10) {
                    if self.is_dead()? {
                        return Ok(None);
                    }
                    std::thread::sleep(PAUSE);
                }
                Err(error).with_context(|| format!("{method} {path}, and the daemon lives"))
            }
        }
    }

    /// The JSON of a GET; none where it was killed before it answered.
    ///
    /// # Errors
    /// No reply, or one other than 200.
    pub fn get(&self, path: &str) -> Result<Option<Value>> {
        let Some(reply) = self.ask("GET", path, &[], b"")? else { return Ok(None) };
        ensure!(reply.status == 200, "GET {path}: {} {}", reply.status, reply.text());
        Ok(Some(reply.json()))
    }

    /// Every operation on record, the oldest first; none where it was killed.
    ///
    /// # Errors
    /// As [`Life::get`].
    pub fn operations(&self) -> Result<Option<Vec<Value>>> {
        let Some(list) = self.get("/v1/operations?limit=1000")? else { return Ok(None) };
        let mut operations = list["items"].as_array().cloned().unwrap_or_default();
        operations.reverse();
        Ok(Some(operations))
    }

    /// Waits until no operation has one of these outcomes and nothing is held as recovering; whether it lived to see it.
    ///
    /// # Errors
    /// It never comes to that.
    pub fn settle(&self, open: &[&str]) -> Result<bool> {
        let still = |operations: &[Value]| {
            operations.iter().any(|operation| open.iter().any(|outcome| operation["outcome"] == *outcome))
        };
        self.wait("its operations to end", || {
            let Some(operations) = self.operations()? else { return Ok(false) };
            if still(&operations) {
                return Ok(false);
            }
            let Some(list) = self.get("/v1/instances")? else { return Ok(false) };
            let held = list["items"].to_string().contains("\"recovering\"");
            Ok(!held)
        })
    }

    /// Waits for something; whether it lived to see it.
    fn wait(&self, what: &str, mut probe: impl FnMut() -> Result<bool>) -> Result<bool> {
        let began = Instant::now();
        loop {
            if self.is_dead()? {
                return Ok(false);
            }
            if probe()? {
                return Ok(true);
            }
            if began.elapsed() > PATIENCE {
                bail!("waited {} s in vain for {what}", PATIENCE.as_secs());
            }
            std::thread::sleep(PAUSE);
        }
    }
}
