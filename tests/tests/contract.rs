//! The OpenAPI document against a live agentd: schemathesis makes requests of it, good ones and bad ones, and each reply has to be
//! one that the document tells of. It speaks TCP only, so socat stands between, on a network that nobody else is on.

use std::{
    process::{Child, Stdio},
    time::Duration,
};

use agentd_tests::lab::{Agentd, Docker, Lab, binary, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);
const PORT: u16 = 8080;
/// That each reply's status, headers and body are as the document has them.
const CHECKS: &str =
    "status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance";
/// Requests for each operation of the document; `AGENTD_CONTRACT_EXAMPLES` says another number.
const EXAMPLES: u32 = 20;

/// Ends with the test.
struct Socat(Child);

impl Drop for Socat {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Requests of all kinds; whatever is asked, no reply but one that is documented.
fn keeps_its_contract(lab: &Lab, agentd: &Agentd, kind: &str, checks: &str) -> Result<()> {
    let schemathesis =
        binary("SCHEMATHESIS", "../tools/schemathesis/bin/schemathesis").context("`make test` installs it")?;
    let forward = format!("UNIX-CONNECT:{}", agentd.socket().display());
    let listen = format!("TCP-LISTEN:{PORT},bind=127.0.0.1,fork,reuseaddr");
    lab.run("ip", &["link", "set", "lo", "up"])?;
    let socat = lab.command("socat").args([&listen, &forward]).stderr(Stdio::null()).spawn().context("socat")?;
    let _socat = Socat(socat);
    let url = format!("http://127.0.0.1:{PORT}/v1/openapi.json");
    wait_until("socat to listen", LIMIT, || Ok(lab.run("curl", &["-sf", "-o", "/dev/null", &url]).ok()))?;
    let examples =
        std::env::var("AGENTD_CONTRACT_EXAMPLES").ok().and_then(|text| text.parse().ok()).unwrap_or(EXAMPLES);
    // Of anything at all, and then of instances that there are.
    for known in ["", &format!("[parameters]\n\"path.kind\" = \"{kind}\"\n\"path.name\" = \"web\"\n")] {
        let config = agentd.folder().join("schemathesis.toml");
        std::fs::write(&config, known)?;
        let output = lab
            .command(&schemathesis)
            // More than one worker makes Python 3.11 fail in its parser now and then.
            .arg("--config-file")
            .arg(&config)
            .args(["run", &url, "--phases", "examples,coverage,fuzzing", "--seed", "1", "--workers", "1"])
            .args(["--max-examples", &examples.to_string(), "--request-timeout", "30", "--checks", checks])
            // What goes on for ever has no end to be checked.
            .args(["--exclude-path", "/v1/events", "--exclude-path-regex", "/logs$"])
            // A connection that nothing is asked on for a while is closed, perhaps as it is asked again.
            .args(["--header", "Connection: close"])
            .args(["--generation-deterministic", "--no-color"])
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        println!("{said}");
        ensure!(output.status.success() && said.contains("Test cases:"), "{said}");
    }
    let operations = agentd.get(&format!("/v1/operations?ref={kind}/web"))?.json();
    ensure!(operations["items"].as_array().is_some_and(|made| made.len() > 10), "{operations}");
    ensure!(!agentd.log().contains("panicked"), "{}", agentd.log());
    let capacity = agentd.get("/v1/capacity")?;
    ensure!(!capacity.text().contains("\"over\":true"), "{}", capacity.text());
    Ok(())
}

#[test]
fn with_a_fake_engine_every_reply_is_documented() -> Result<()> {
    let lab = Lab::new()?;
    let vm = |name: &str, state: &str| json!({"name": name, "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "used": "100MiB", "stopped": state == "down"});
    let spec = json!({"instances": [vm("web", "up"), vm("db", "up"), vm("off", "down")]});
    let agentd = Agentd::with_config("[capacity]\ncpus = 8\nmemory = \"16GiB\"\n").fake(spec).inside(&lab).start()?;
    keeps_its_contract(&lab, &agentd, "vm", &format!("not_a_server_error,{CHECKS}"))
}

#[test]
fn with_a_real_docker_every_reply_is_documented() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    for name in ["web", "db"] {
        docker.run(name, &["--cpus", "0.5", "-m", "64m", "--memory-swap", "64m"])?;
    }
    let config =
        format!("[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\n", docker.socket().display());
    let agentd = Agentd::with_config(&config).inside(&lab).start()?;
    // A real engine may refuse what was asked of it, which is a 500 of its own in the table.
    keeps_its_contract(&lab, &agentd, "container", CHECKS)
}
