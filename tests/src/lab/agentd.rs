//! The daemon under test, as a program: started on a socket and a state folder of its own, asked over HTTP and by `ctl`.
//! Every reply over HTTP is checked against the daemon's own OpenAPI document.

use std::{
    fs,
    io::{BufReader, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::{Events, Lab, Response, daemon::Daemon, http, wait_until};
use crate::openapi::Checker;

/// How long the daemon may take to answer for the first time.
const START: Duration = Duration::from_secs(60);

/// Where a binary of the workspace is: the environment variable's word, else where cargo put it, of the same profile as the
/// program that asks.
///
/// # Errors
/// It isn't there; the message says how to build it.
pub fn binary(variable: &str, name: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    // A binary is target/PROFILE/NAME, a test target/PROFILE/deps/NAME-HASH, an example target/PROFILE/examples/NAME.
    let exe = std::env::current_exe()?;
    let found = exe.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|path| path.exists());
    found.with_context(|| format!("no {name} near {}: run `cargo build --workspace`, or set {variable}", exe.display()))
}

/// The folder that cargo builds into, for a test.
///
/// # Errors
/// The program that asks is none, or was moved.
pub fn target_folder() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let deps = exe.parent().filter(|folder| folder.ends_with("deps"));
    let target = deps.and_then(|deps| deps.ancestors().nth(2));
    Ok(target.with_context(|| format!("{} is no test that cargo has built", exe.display()))?.to_owned())
}

/// What `ctl` did.
#[derive(Debug, Clone)]
pub struct CtlOutput {
    /// The exit code; none where a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// How a daemon is to be started.
pub struct Builder<'a> {
    config: String,
    lab: Option<&'a Lab>,
    folder: Option<PathBuf>,
    envs: Vec<(String, String)>,
    fake: Option<serde_json::Value>,
}

impl<'a> Builder<'a> {
    /// Runs it inside the lab: it sees the private libvirt's folders, and cgroup paths as the engines there do.
    #[must_use]
    pub fn inside(mut self, lab: &'a Lab) -> Self {
        self.lab = Some(lab);
        self
    }

    /// Uses this folder for config, socket and state, and leaves it there in the end.
    #[must_use]
    pub fn folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.envs.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Gives it this fake engine for VMs.
    #[must_use]
    pub fn fake(mut self, spec: serde_json::Value) -> Self {
        self.fake = Some(spec);
        self
    }

    /// Starts it and waits until it answers `GET /v1/health`.
    ///
    /// # Errors
    /// It ended or did not answer; the message has its log.
    pub fn start(mut self) -> Result<Agentd> {
        let temp = match &self.folder {
            Some(_) => None,
            None => Some(tempfile::Builder::new().prefix("agentd-").tempdir()?),
        };
        let folder = self.folder.or_else(|| temp.as_ref().map(|temp| temp.path().to_owned())).context("a folder")?;
        fs::create_dir_all(folder.join("state"))?;
        // Other users must reach the socket: whether they may use it is the daemon's to decide.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
        if let Some(spec) = &self.fake {
            let path = folder.join("fake.json");
            fs::write(&path, spec.to_string())?;
            self.envs.push(("AGENTD_FAKE".into(), path.to_string_lossy().into_owned()));
        }
        let agentd = Agentd {
            daemon: Mutex::new(None),
            lab: self.lab.cloned(),
            folder,
            envs: self.envs,
            checker: Mutex::new(None),
            _temp: temp,
        };
        agentd.write_config(&self.config)?;
        agentd.start_again()?;
        Ok(agentd)
    }
}

/// A running daemon; dropped, it is killed, and where the test failed, its log is shown.
pub struct Agentd {
    daemon: Mutex<Option<Daemon>>,
    lab: Option<Lab>,
    folder: PathBuf,
    envs: Vec<(String, String)>,
    checker: Mutex<Option<Checker>>,
    _temp: Option<TempDir>,
}

impl Agentd {
    /// A daemon with this config file, to be started.
    pub fn with_config(config: &str) -> Builder<'static> {
        Builder { config: config.to_owned(), lab: None, folder: None, envs: Vec::new(), fake: None }
    }

    /// The folder of all this, that a test may put further files into; a temporary one ends with the daemon.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("agentd.sock")
    }

    /// Its state folder.
    pub fn state_dir(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Its config file.
    pub fn config_file(&self) -> PathBuf {
        self.folder.join("agentd.toml")
    }

    /// Writes another config file; [`signal`](Self::signal) with SIGHUP then makes the daemon read it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_config(&self, config: &str) -> Result<()> {
        Ok(fs::write(self.config_file(), config)?)
    }

    /// Starts it on the same folder, after [`kill`](Self::kill) or [`stop`](Self::stop), and waits until it answers.
    ///
    /// # Errors
    /// It ended or did not answer; the message has its log.
    pub fn start_again(&self) -> Result<()> {
        let program = binary("AGENTD_BIN", "agentd")?;
        let mut command = match &self.lab {
            Some(lab) => lab.command(program),
            None => Command::new(program),
        };
        command.arg("--config").arg(self.config_file()).arg("--socket").arg(self.socket());
        command.arg("--state-dir").arg(self.state_dir()).envs(self.envs.iter().map(|(name, value)| (name, value)));
        let mut daemon = Daemon::start_logging_to(&self.folder.join("agentd.log"), "agentd", command)?;
        wait_until("agentd's answer", START, || {
            if let Err(ended) = daemon.still_runs() {
                return Ok(Some(Err(ended)));
            }
            let reply = http::request(&self.socket(), "GET", "/v1/health", &[], b"")?;
            Ok((reply.status == 200).then_some(Ok(())))
        })
        .with_context(|| daemon.log_tail())??;
        *self.slot() = Some(daemon);
        Ok(())
    }

    /// Ends it as `kill -9` does.
    ///
    /// # Errors
    /// It was not running.
    pub fn kill(&self) -> Result<()> {
        self.slot().take().context("agentd doesn't run")?.kill_hard()
    }

    /// Ends it as systemd does, by SIGTERM, and gives its exit code.
    ///
    /// # Errors
    /// It was not running, or is still there after 60 s.
    pub fn stop(&self) -> Result<Option<i32>> {
        let mut daemon = self.slot().take().context("agentd doesn't run")?;
        daemon.signal(Signal::SIGTERM)?;
        daemon.wait_end(Duration::from_secs(60))
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It doesn't run.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.slot().as_ref().context("agentd doesn't run")?.signal(signal)
    }

    /// Its process id, none while it is down.
    pub fn pid(&self) -> Option<i32> {
        self.slot().as_ref().map(|daemon| daemon.pid().as_raw())
    }

    /// All that it has logged, over restarts.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("agentd.log")).unwrap_or_default()
    }

    /// A `ctl` command for this daemon, to be given arguments (and perhaps a user: `.uid()`, `.gid()`).
    ///
    /// # Errors
    /// The binary isn't there.
    pub fn ctl_command(&self) -> Result<Command> {
        let mut command = Command::new(binary("CTL_BIN", "ctl")?);
        command.env("AGENTD_SOCKET", self.socket()).env("NO_COLOR", "1").env("LC_ALL", "C").stdin(Stdio::null());
        Ok(command)
    }

    /// Runs `ctl ARGS…`.
    ///
    /// # Panics
    /// Where it cannot be run at all.
    pub fn ctl(&self, args: &[&str]) -> CtlOutput {
        let output = self.ctl_command().and_then(|mut command| Ok(command.args(args).output()?));
        let output = output.expect("ctl can be run");
        CtlOutput {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Sends one request and checks the reply against the OpenAPI document.
    ///
    /// # Errors
    /// No reply, or a malformed one.
    ///
    /// # Panics
    /// The reply isn't documented.
    pub fn http(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Response> {
        let reply = http::request(&self.socket(), method, path, headers, body)?;
        let mut checker = self.checker.lock().unwrap_or_else(PoisonError::into_inner);
        if checker.is_none() {
            let document = http::request(&self.socket(), "GET", "/v1/openapi.json", &[], b"")?;
            *checker = Some(Checker::new(serde_json::from_slice(&document.body).context("the OpenAPI document")?)?);
        }
        if let Some(checker) = checker.as_ref() {
            checker.check(method, path, reply.status, reply.header("content-type").unwrap_or_default(), &reply.body);
        }
        Ok(reply)
    }

    /// A GET, checked.
    ///
    /// # Errors
    /// As [`http`](Self::http).
    pub fn get(&self, path: &str) -> Result<Response> {
        self.http("GET", path, &[], b"")
    }

    /// A POST of a JSON body, checked.
    ///
    /// # Errors
    /// As [`http`](Self::http).
    pub fn post(&self, path: &str, body: &serde_json::Value) -> Result<Response> {
        self.http("POST", path, &[("Content-Type", "application/json")], body.to_string().as_bytes())
    }

    /// Opens a stream of server-sent events; the headers may have a `Last-Event-ID`.
    ///
    /// # Errors
    /// A reply other than 200.
    pub fn events(&self, path: &str, headers: &[(&str, &str)]) -> Result<Events> {
        Events::open(&self.socket(), path, headers)
    }

    /// Sends bytes as they are, which need not be HTTP, and reads a reply. Nothing is checked.
    ///
    /// # Errors
    /// The connection was closed without one, or the reply is malformed.
    pub fn raw(&self, bytes: &[u8]) -> Result<Response> {
        let mut stream = self.connect()?;
        // The daemon may refuse and close before all is sent.
        let _ = stream.write_all(bytes);
        http::read_response(&mut BufReader::new(stream), false)
    }

    /// A number of `/proc/PID/status`, such as `VmHWM` or `RssAnon` (KiB) or `Threads`.
    ///
    /// # Errors
    /// It doesn't run, or has no such field.
    pub fn status(&self, field: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid().context("it runs")?))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        let number = line.and_then(|line| line.split_whitespace().next()).with_context(|| field.to_owned())?;
        Ok(number.parse()?)
    }

    /// How many descriptors it has open.
    ///
    /// # Errors
    /// It doesn't run.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.pid().context("it runs")?))?.count())
    }

    /// A bare connection, for half-sent requests.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn connect(&self) -> Result<UnixStream> {
        http::connect(&self.socket())
    }

    fn slot(&self) -> MutexGuard<'_, Option<Daemon>> {
        self.daemon.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Agentd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- agentd's log ---\n{}\n--- end ---", self.log());
        }
    }
}
