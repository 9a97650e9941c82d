//! The daemon as a process: its config file, its socket, its signals, and who may speak to it.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use agentd_tests::lab::{Agentd, binary, wait_until};
use anyhow::Result;
use nix::sys::signal::Signal;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(30);

/// Runs `agentd --check` on a file; whether it was taken, and what it said.
fn check(path: &Path) -> Result<(bool, String)> {
    let output = Command::new(binary("AGENTD_BIN", "agentd")?).arg("--check").arg("--config").arg(path).output()?;
    Ok((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

fn fake(config: &str, folder: &Path) -> Result<Agentd> {
    let spec = json!({"instances": [
        {"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "used": "200MiB"},
        {"name": "ci-1", "cpus": 1, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "used": "200MiB"}]});
    let path = folder.join("fake.json");
    std::fs::write(&path, spec.to_string())?;
    Agentd::with_config(config).env("AGENTD_FAKE", &path.to_string_lossy()).start()
}

#[test]
fn config_files_that_cant_be_trusted_or_understood_are_refused_with_every_fault() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("agentd.toml");
    assert!(check(&file)?.1.contains("can't be opened"));
    assert!(check(folder.path())?.1.contains("not a regular file"));
    std::fs::write(&file, "")?;
    assert!(check(&file)?.0, "an empty file is every default");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666))?;
    assert!(check(&file)?.1.contains("writable by others"));
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o664))?;
    assert!(check(&file)?.1.contains("writable by others"), "by a group is by others");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644))?;
    std::os::unix::fs::chown(&file, Some(65534), None)?;
    let (taken, said) = check(&file)?;
    assert!(!taken && said.contains("belongs to uid 65534"), "its owner could write it: {said}");
    std::os::unix::fs::chown(&file, Some(0), None)?;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644))?;
    // Who may write to its folder could put another file there; in a folder like /tmp only its owner could.
    let of_folder = |mode: u32| std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(mode));
    for mode in [0o777, 0o775] {
        of_folder(mode)?;
        let (taken, said) = check(&file)?;
        assert!(!taken && said.contains(&format!("{}: is writable by others", folder.path().display())), "{said}");
    }
    of_folder(0o1777)?;
    assert!(check(&file)?.0);
    of_folder(0o755)?;
    std::os::unix::fs::chown(folder.path(), Some(65534), None)?;
    assert!(check(&file)?.1.contains("belongs to uid 65534"));
    std::os::unix::fs::chown(folder.path(), Some(0), None)?;
    std::fs::write(&file, "[capacity]\ncpu_overcommit = 0\nvm_overhead = \"1GB\"\ncolour = 3\n")?;
    let (taken, said) = check(&file)?;
    assert!(!taken);
    for place in ["agentd.toml:2:", "agentd.toml:3:", "agentd.toml:4:"] {
        assert!(said.contains(place), "{place} isn't in {said}");
    }
    Ok(())
}

#[test]
fn a_socket_in_use_is_refused_and_one_left_behind_is_taken_over() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let agentd = fake("", folder.path())?;
    let second = Command::new(binary("AGENTD_BIN", "agentd")?)
        .args(["--config".as_ref(), agentd.config_file().as_os_str(), "--socket".as_ref(), agentd.socket().as_os_str()])
        .args(["--state-dir".as_ref(), folder.path().as_os_str()])
        .output()?;
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("served by another agentd"));
    let same_state = Command::new(binary("AGENTD_BIN", "agentd")?)
        .args([
            "--config".as_ref(),
            agentd.config_file().as_os_str(),
            "--state-dir".as_ref(),
            agentd.state_dir().as_os_str(),
        ])
        .args(["--socket".as_ref(), folder.path().join("other.sock").as_os_str()])
        .output()?;
    assert!(String::from_utf8_lossy(&same_state.stderr).contains("in use by another agentd"));
    agentd.kill()?;
    assert!(agentd.socket().exists(), "kill -9 leaves the socket");
    agentd.start_again()?;
    assert_eq!(agentd.get("/v1/health")?.status, 200);
    assert_eq!(agentd.stop()?, Some(0));
    assert!(!agentd.socket().exists());
    Ok(())
}

#[test]
fn a_reload_takes_a_good_file_whole_and_says_why_it_does_not_take_a_bad_one() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let agentd = fake("[capacity]\ncpus = 8\n", folder.path())?;
    let allowed =
        || -> Result<f64> { Ok(agentd.get("/v1/capacity")?.json()["cpus"]["allowed"].as_f64().unwrap_or_default()) };
    assert_eq!(allowed()?, 8.0);
    agentd.write_config("[capacity]\ncpus = 16\n")?;
    agentd.signal(Signal::SIGHUP)?;
    wait_until("the new caps", LIMIT, || Ok((allowed()? == 16.0).then_some(())))?;
    agentd.write_config("[capacity]\ncpus = 32\ncolour = 1\n")?;
    agentd.signal(Signal::SIGHUP)?;
    wait_until("the rejected reload in health", LIMIT, || {
        let health = agentd.get("/v1/health")?.json();
        Ok((health["ok"] == false && health["notes"].to_string().contains("colour")).then_some(()))
    })?;
    assert_eq!(allowed()?, 16.0);
    agentd.write_config("[capacity]\ncpus = 4\n[server]\nread_only = true\n")?;
    agentd.signal(Signal::SIGHUP)?;
    wait_until("the kill switch", LIMIT, || Ok((agentd.get("/v1/health")?.json()["read_only"] == true).then_some(())))?;
    let refused = agentd.post("/v1/instances/vm/web/resize", &json!({"cpus": 1}))?;
    assert_eq!((refused.status, refused.json()["code"].clone()), (403, json!("forbidden")));
    // Over a cap that was lowered: left alone and shown; it can only shrink.
    agentd.write_config("[capacity]\ncpus = 2\n")?;
    agentd.signal(Signal::SIGHUP)?;
    wait_until("the host over its cap", LIMIT, || {
        Ok((agentd.get("/v1/capacity")?.json()["cpus"]["over"] == true).then_some(()))
    })?;
    assert_eq!(agentd.post("/v1/instances/vm/web/resize", &json!({"cpus": 3}))?.status, 429);
    assert_eq!(agentd.post("/v1/instances/vm/web/resize", &json!({"cpus": 1}))?.status, 200);
    Ok(())
}

#[test]
fn a_change_under_way_ends_before_the_daemon_does() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let spec = json!({"delay_ms": 500, "instances": [
        {"name": "web", "cpus": 2, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "used": "200MiB"}]});
    let path = folder.path().join("fake.json");
    std::fs::write(&path, spec.to_string())?;
    let agentd = Agentd::with_config("[capacity]\ncpus = 8\n").env("AGENTD_FAKE", &path.to_string_lossy()).start()?;
    let headers = [("Content-Type", "application/json"), ("Prefer", "wait=0")];
    let reply = agentd.http("POST", "/v1/instances/vm/web/resize", &headers, br#"{"cpus":4,"memory":"2GiB"}"#)?;
    assert_eq!(reply.status, 202);
    assert_eq!(agentd.stop()?, Some(0));
    assert!(agentd.log().contains("outcome=\"changed\""), "{}", agentd.log());
    Ok(())
}

/// A uid that no rule names hears `forbidden`; one whose rule matches other instances hears `not-found`; rights bind.
#[test]
fn callers_are_held_to_their_rules() -> Result<()> {
    const NOBODY: u32 = 65534;
    let folder = tempfile::tempdir()?;
    let agentd = fake("", folder.path())?;
    // A socket of root's own is made for root and a group; here everybody may connect, and the rules decide.
    let open = || std::fs::set_permissions(agentd.socket(), std::fs::Permissions::from_mode(0o666));
    open()?;
    std::fs::set_permissions(
        agentd.socket().parent().unwrap_or(Path::new("/")),
        std::fs::Permissions::from_mode(0o755),
    )?;
    let say = |method: &str, path: &str, body: &str| -> Result<(String, serde_json::Value)> {
        let mut curl = Command::new("curl");
        curl.args(["-s", "-o", "-", "-w", "\n%{http_code}", "-X", method, "--unix-socket"]).arg(agentd.socket());
        curl.args(["-H", "Content-Type: application/json"]).arg(format!("http://agentd{path}"));
        if !body.is_empty() {
            curl.args(["-d", body]);
        }
        let output = curl.uid(NOBODY).gid(NOBODY).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (body, status) = text.rsplit_once('\n').unwrap_or(("", &text));
        Ok((status.to_owned(), serde_json::from_str(body).unwrap_or_default()))
    };
    let ask = |method: &str, path: &str, body: &str| -> Result<(String, String)> {
        let (status, body) = say(method, path, body)?;
        Ok((status, body["code"].as_str().unwrap_or_default().to_owned()))
    };
    for path in ["/v1/instances", "/v1/instances/vm/web", "/v1/instances/vm/nix", "/v1/health", "/v1/capacity"] {
        assert_eq!(ask("GET", path, "")?, ("403".into(), "forbidden".into()), "{path}");
    }
    agentd.write_config("[[access]]\nuser = \"nobody\"\nallow = [\"read\", \"power\"]\nmatch = \"vm/ci-*\"\n")?;
    agentd.signal(Signal::SIGHUP)?;
    wait_until("the rule", LIMIT, || Ok((ask("GET", "/v1/instances/vm/ci-1", "")?.0 == "200").then_some(())))?;
    assert_eq!(ask("GET", "/v1/instances/vm/web", "")?, ("404".into(), "not-found".into()));
    assert_eq!(ask("GET", "/v1/instances?name=web", "")?, ("404".into(), "not-found".into()));
    let resize = ("403".into(), "forbidden".into());
    assert_eq!(ask("POST", "/v1/instances/vm/ci-1/resize", r#"{"cpus":2}"#)?, resize);
    assert_eq!(ask("POST", "/v1/instances/vm/web/resize", r#"{"cpus":1}"#)?, ("404".into(), "not-found".into()));
    assert_eq!(ask("POST", "/v1/instances/vm/ci-1/stop", "")?.0, "200");
    // What others did is not there for it, whatever it was done to.
    let by_root = |name: &str| -> Result<String> {
        let reply =
            agentd.post(&format!("/v1/instances/vm/{name}/resize"), &serde_json::json!({ "memory": "+256MiB" }))?;
        assert_eq!(reply.status, 200, "{}", reply.text());
        Ok(reply.json()["operation"].as_str().unwrap_or_default().to_owned())
    };
    let others = [by_root("ci-1")?, by_root("web")?];
    for path in ["/v1/operations", "/v1/history"] {
        let told = say("GET", path, "")?.1.to_string();
        assert!(told.contains("vm/ci-1"), "its own stop: {told}");
        assert!(!told.contains("vm/web") && !others.iter().any(|id| told.contains(id)), "{path}: {told}");
    }
    for id in others {
        assert_eq!(ask("GET", &format!("/v1/operations/{id}"), "")?, ("404".into(), "not-found".into()));
    }
    let none = say("GET", "/v1/operations?ref=vm/web", "")?;
    assert!(none.0 == "404" || none.1["items"] == serde_json::json!([]), "{none:?}");
    Ok(())
}
