//! A terminal that a test can type into and look at: a private tmux server with one window, in a folder of its own.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::{Agentd, binary, daemon::Daemon, stdout_of, wait_until};

/// How long a screen may take to show what it is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// One window with a shell; dropped, it ends with all that runs in it.
pub struct Tmux {
    folder: TempDir,
    _server: Daemon,
}

impl Tmux {
    /// Opens a window of this many columns and lines with a shell in it, which has these variables.
    ///
    /// # Errors
    /// tmux is not installed, or says no.
    pub fn open((columns, lines): (u16, u16), variables: &[(&str, &str)]) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("tmux-").tempdir()?;
        // In the foreground, so that it ends with the test however that ends. No configuration but tmux's own.
        let mut command = Command::new("tmux");
        command.arg("-S").arg(folder.path().join("s")).args(["-f", "/dev/null", "-D"]).env("LC_ALL", "C.UTF-8");
        command.env_remove("TMUX").env_remove("NO_COLOR");
        let server = Daemon::start_logging_to(&folder.path().join("log"), "tmux", command)?;
        // What the shell reads first: tmux would give it the PATH of its own, and dash takes no prompt from a variable. The
        // prompt is one that no program prints.
        let profile = folder.path().join("profile");
        let set = variables.iter().map(|(name, value)| format!("export {name}='{}'\n", value.replace('\'', "'\\''")));
        fs::write(&profile, set.chain(["PS1='ready> '\n".to_owned()]).collect::<String>())?;
        let profile = format!("ENV={}", profile.display());
        let tmux = Self { folder, _server: server };
        let size = [columns, lines].map(|number| number.to_string());
        let open = ["new-session", "-d", "-s", "w", "-x", &size[0], "-y", &size[1], "-e", &profile, "sh"];
        wait_until("tmux", PATIENCE, || tmux.run(&open).map(Some))?;
        tmux.wait_for("a prompt", |screen| screen.contains("ready>"))?;
        Ok(tmux)
    }

    /// The same, where `ctl` is the one that was built and asks this agentd.
    ///
    /// # Errors
    /// tmux is not installed, or says no; or there is no `ctl`.
    pub fn with_ctl(agentd: &Agentd, size: (u16, u16), more: &[(&str, &str)]) -> Result<Self> {
        let (socket, ctl) = (agentd.socket(), binary("CTL_BIN", "ctl")?);
        let path = format!("{}:{}", ctl.parent().context("a folder")?.display(), std::env::var("PATH")?);
        let variables = [("AGENTD_SOCKET", socket.to_str().context("a path")?), ("PATH", &path)];
        Self::open(size, &[&variables, more].concat())
    }

    /// Types a line into it.
    ///
    /// # Errors
    /// The window is gone.
    pub fn line(&self, text: &str) -> Result<()> {
        self.run(&["send-keys", "-t", "w", "-l", text])?;
        self.keys(&["Enter"])
    }

    /// Presses keys by their names in tmux: `q`, `Enter`, `PageDown`, `C-c`.
    ///
    /// # Errors
    /// The window is gone.
    pub fn keys(&self, keys: &[&str]) -> Result<()> {
        self.run(&[&["send-keys", "-t", "w"], keys].concat()).map(drop)
    }

    /// Gives the window another size.
    ///
    /// # Errors
    /// The window is gone.
    pub fn resize(&self, (columns, lines): (u16, u16)) -> Result<()> {
        let size = [columns, lines].map(|number| number.to_string());
        self.run(&["resize-window", "-t", "w", "-x", &size[0], "-y", &size[1]]).map(drop)
    }

    /// What is on the screen, as text.
    ///
    /// # Errors
    /// The window is gone.
    pub fn screen(&self) -> Result<String> {
        self.run(&["capture-pane", "-t", "w", "-p"])
    }

    /// What is on the screen, with the escape sequences of its colours and the like.
    ///
    /// # Errors
    /// The window is gone.
    pub fn styled_screen(&self) -> Result<String> {
        self.run(&["capture-pane", "-t", "w", "-p", "-e"])
    }

    /// What tmux knows of the window, by a format of tmux(1): `#{cursor_flag}`.
    ///
    /// # Errors
    /// The window is gone.
    pub fn tell(&self, format: &str) -> Result<String> {
        Ok(self.run(&["display-message", "-t", "w", "-p", format])?.trim_end().to_owned())
    }

    /// Waits until the screen is as it should be, and gives it.
    ///
    /// # Errors
    /// It isn't in time; the message has the screen.
    pub fn wait_for(&self, what: &str, is: impl Fn(&str) -> bool) -> Result<String> {
        let found = wait_until(what, PATIENCE, || Ok(Some(self.screen()?).filter(|screen| is(screen))));
        found.with_context(|| format!("the screen is\n{}", self.screen().unwrap_or_default()))
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let socket: PathBuf = self.folder.path().join("s");
        // -N: there is no other server to be started.
        stdout_of(
            Command::new("tmux").arg("-N").arg("-S").arg(socket).args(args).env("LC_ALL", "C.UTF-8").env_remove("TMUX"),
        )
    }
}
