//! A Prometheus that scrapes a node_exporter that reads one folder of text files: the way that agentd's metrics take on a real
//! host. Both listen on ports of their own on the loopback.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tempfile::TempDir;

use super::daemon::Daemon;
use super::{stdout_of, wait_until};

/// How long each of them may take to listen.
const START: Duration = Duration::from_secs(60);

/// Both, running; dropped, they are killed.
pub struct Prometheus {
    folder: TempDir,
    address: String,
    _daemons: [Daemon; 2],
}

impl Prometheus {
    /// Starts both and waits until the first scrape is there.
    ///
    /// # Errors
    /// One of them isn't installed or ended; the message has its log.
    pub fn start() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("prometheus-").tempdir()?;
        let textfiles = folder.path().join("textfiles");
        std::fs::create_dir(&textfiles)?;
        let (exporter, address) = (free_port()?, free_port()?);
        let mut command = Command::new("prometheus-node-exporter");
        command.arg(format!("--web.listen-address={exporter}")).arg("--collector.disable-defaults");
        command.arg("--collector.textfile").arg(format!("--collector.textfile.directory={}", textfiles.display()));
        let exporter_daemon =
            Daemon::start_logging_to(&folder.path().join("exporter.log"), "prometheus-node-exporter", command)?;

        let config = folder.path().join("prometheus.yml");
        std::fs::write(
            &config,
            format!(
                "global: {{scrape_interval: 1s}}\nscrape_configs:\n  - job_name: node\n    static_configs: [{{targets: ['{exporter}']}}]\n"
            ),
        )?;
        let mut command = Command::new("prometheus");
        command.arg(format!("--config.file={}", config.display()));
        command.arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()));
        command.arg(format!("--web.listen-address={address}"));
        let mut daemon = Daemon::start_logging_to(&folder.path().join("prometheus.log"), "prometheus", command)?;
        let running = wait_until("Prometheus' first scrape", START, || {
            if let Err(ended) = daemon.still_runs() {
                return Ok(Some(Err(ended)));
            }
            Ok((!query_at(&address, "up == 1")?.is_empty()).then_some(Ok(())))
        });
        running.with_context(|| daemon.log_tail())??;
        Ok(Self { folder, address, _daemons: [exporter_daemon, daemon] })
    }

    /// The folder of the textfile collector.
    pub fn textfiles(&self) -> PathBuf {
        self.folder.path().join("textfiles")
    }

    /// What an expression gives now: the elements of its vector.
    ///
    /// # Errors
    /// Prometheus does not take the expression, or doesn't answer.
    pub fn query(&self, expression: &str) -> Result<Vec<Value>> {
        query_at(&self.address, expression)
    }
}

fn query_at(address: &str, expression: &str) -> Result<Vec<Value>> {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--get", "--data-urlencode"]).arg(format!("query={expression}"));
    let answer = stdout_of(command.arg(format!("http://{address}/api/v1/query")))?;
    let mut answer: Value = serde_json::from_str(&answer).with_context(|| format!("{expression}: {answer}"))?;
    anyhow::ensure!(answer["status"] == "success", "{expression}: {answer}");
    let result = answer["data"]["result"].take();
    Ok(result.as_array().cloned().unwrap_or_default())
}

/// What Prometheus' own tool says of a file or, on its standard input, of a text.
///
/// # Errors
/// It finds something wrong; the message says what.
pub fn promtool(args: &[&str], input: Option<&Path>) -> Result<String> {
    let mut command = Command::new("promtool");
    command.args(args);
    if let Some(input) = input {
        command.stdin(std::fs::File::open(input)?);
    }
    let output = command.output().context("promtool can't be run")?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    anyhow::ensure!(output.status.success(), "promtool {args:?} ended with {}: {said}", output.status);
    Ok(said)
}

/// A port that nobody has; somebody may take it before it is used, and then that one's log says so.
fn free_port() -> Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}
