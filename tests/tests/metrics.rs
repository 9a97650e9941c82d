//! Metrics on their way to a graph: from a daemon with a fake engine and a real Docker, through `ctl metrics --textfile` and a real
//! node_exporter, into a real Prometheus, where each expression of the dashboard gives something.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agentd_tests::lab::{Agentd, Docker, Lab, Prometheus, promtool, wait_until};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(60);

fn packaged(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/prometheus").join(name)
}

/// Every `expr` of the dashboard, for all hosts.
fn expressions() -> Result<BTreeSet<String>> {
    fn collect(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("expr").and_then(Value::as_str).map(|expr| expr.replace("$host", ".*")));
                fields.values().for_each(|value| collect(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(packaged("grafana-dashboard.json"))?)?;
    let mut found = BTreeSet::new();
    collect(&dashboard, &mut found);
    Ok(found)
}

/// The value of a series, by its whole name as it stands on the page.
fn value(page: &str, series: &str) -> Option<f64> {
    page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

fn machines() -> Value {
    let machine = |name: &str| json!({"name": name, "cpus": 1, "memory": "1GiB", "max_cpus": 4, "max_memory": "4GiB", "used": "200MiB", "burns": 1.5});
    json!({"instances": [machine("web"), machine("db")]})
}

#[test]
fn every_panel_of_the_dashboard_has_data_through_the_textfile_collector() -> Result<()> {
    let lab = Lab::new()?;
    let docker = Docker::start(&lab)?;
    let config = format!(
        "[libvirt]\n[docker]\nsocket = \"{}\"\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\nreserved_memory = 0\n\
         [[limit]]\nmatch = \"vm/*\"\ntotal_memory = \"6GiB\"\n",
        docker.socket().display()
    );
    let agentd = Agentd::with_config(&config).inside(&lab).fake(machines()).start()?;
    // One that is held back by its limit, and one in which something is killed again and again.
    let busy = ["sh", "-c", "while :; do :; done"];
    docker.run_command("half", &["--cpus", "0.2", "-m", "64m", "--memory-swap", "64m"], &busy)?;
    let greedy = ["sh", "-c", "while :; do dd if=/dev/zero of=/dev/null bs=64M count=1; sleep 1; done"];
    docker.run_command("greedy", &["--cpus", "0.5", "-m", "16m", "--memory-swap", "16m"], &greedy)?;

    let prometheus = Prometheus::start()?;
    let file = prometheus.textfiles().join("agentd.prom");
    let path = file.to_string_lossy().into_owned();
    let mut memory = 512;
    let mut write = || -> Result<()> {
        // Something happens all the time: changes, and refusals.
        memory = if memory == 512 { 768 } else { 512 };
        let changed = agentd.post("/v1/instances/vm/web/resize", &json!({"memory": format!("{memory}MiB")}))?;
        ensure!(changed.status == 200, "{}", changed.text());
        let refused = agentd.post("/v1/instances/vm/web/resize", &json!({"cpus": 4, "memory": "64GiB"}))?;
        ensure!(refused.status >= 400, "{}", refused.text());
        let written = agentd.ctl(&["metrics", "--textfile", &path]);
        ensure!(written.code == Some(0) && written.stdout.is_empty(), "{written:?}");
        Ok(())
    };
    write()?;
    let said = promtool(&["check", "metrics"], Some(&file))?;
    ensure!(said.trim().is_empty(), "promtool has a remark: {said}");
    promtool(&["check", "rules", &packaged("agentd.rules.yml").to_string_lossy()], None)?;

    let mut open = expressions()?;
    ensure!(open.len() >= 25, "the dashboard has {} expressions", open.len());
    wait_until("data for each expression", LIMIT, || {
        write()?;
        for expression in open.clone() {
            if !prometheus.query(&expression)?.is_empty() {
                open.remove(&expression);
            }
        }
        ensure!(open.is_empty(), "nothing yet for {open:#?}");
        Ok(Some(()))
    })?;
    // The exporter found nothing to complain of, and what arrived is what was told.
    ensure!(prometheus.query("node_textfile_scrape_error == 0")?.len() == 1);
    let seen = prometheus.query("agentd_capacity_cpus{what=\"allowed\"}")?;
    ensure!(seen[0]["value"][1] == "8", "{seen:?}");
    // A daemon that is away leaves the file as it was: its age tells.
    let before = fs::read(&file)?;
    agentd.kill()?;
    let away = agentd.ctl(&["metrics", "--textfile", &path]);
    ensure!(away.code == Some(3) && fs::read(&file)? == before, "{away:?}");
    Ok(())
}

#[test]
fn the_page_counts_what_happened_and_shows_a_caller_no_more_than_it_may_see() -> Result<()> {
    let config = "[libvirt]\n[capacity]\ncpus = 8\nmemory = \"8GiB\"\nreserved_memory = 0\n\
                  [[access]]\nuser = \"nobody\"\nallow = [\"read\"]\nmatch = \"vm/web\"\n\
                  [[limit]]\nmatch = \"vm/db\"\ntotal_cpus = 4\n[[limit]]\nmatch = \"vm/*\"\ntotal_cpus = 8\n";
    let agentd = Agentd::with_config(config).fake(machines()).start()?;
    ensure!(agentd.ctl(&["resize", "web", "--cpus", "2"]).code == Some(0));
    ensure!(agentd.ctl(&["resize", "web", "--cpus", "2"]).code == Some(0), "it has that already");
    ensure!(agentd.ctl(&["resize", "db", "--memory", "64GiB"]).code != Some(0));
    let reply = agentd.get("/metrics")?;
    ensure!(reply.header("content-type") == Some("text/plain; version=0.0.4; charset=utf-8"), "{reply:?}");
    let page = reply.text();
    let is = |series: &str, expected: f64| {
        let found = value(&page, series).with_context(|| format!("{series} isn't on the page:\n{page}"))?;
        ensure!((found - expected).abs() < 1e-9, "{series} is {found}, not {expected}");
        Ok(())
    };
    is("agentd_operations_total{outcome=\"changed\",verb=\"resize\"}", 1.0)?;
    is("agentd_operations_total{outcome=\"unchanged\",verb=\"resize\"}", 1.0)?;
    is("agentd_capacity_cpus{what=\"committed\"}", 3.0)?;
    is("agentd_capacity_cpus{what=\"free\"}", 5.0)?;
    is("agentd_instances_up{kind=\"vm\"}", 2.0)?;
    is("agentd_instance_cpus{kind=\"vm\",ref=\"vm/web\"}", 2.0)?;
    is("agentd_instances_left_out", 0.0)?;
    is("agentd_changes{state=\"under-way\"}", 0.0)?;
    is("agentd_backend_up{kind=\"vm\"}", 1.0)?;
    ensure!(page.contains("agentd_refusals_total{code=\""), "{page}");
    // It has no limit of CPU time, so nothing can be said of throttling; and that is not 0.
    ensure!(!page.contains("agentd_instance_throttled_seconds_total"), "{page}");
    ensure!(value(&page, "agentd_process_resident_memory_bytes") > Some(1e6), "{page}");
    ensure!(value(&page, "agentd_store_size_bytes") > Some(0.0), "{page}");

    // Somebody who may see one of them.
    // A socket of root's own is made for root and a group; here everybody may connect, and the rules decide.
    fs::set_permissions(agentd.socket(), fs::Permissions::from_mode(0o666))?;
    let nobody = nix::unistd::User::from_name("nobody")?.context("there is a nobody")?;
    let ask = |args: &[&str]| -> Result<String> {
        let mut command = agentd.ctl_command()?;
        let output = command.args(args).uid(nobody.uid.as_raw()).gid(nobody.gid.as_raw()).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let page = ask(&["metrics"])?;
    ensure!(page.contains("ref=\"vm/web\"") && !page.contains("vm/db"), "{page}");
    ensure!(page.contains("agentd_instances_up{kind=\"vm\"} 2\n"), "sums are over everything: {page}");
    ensure!(page.contains("limit=\"vm/*\"") && agentd.get("/metrics")?.text().contains("limit=\"vm/db\""), "{page}");
    let capacity: Value = serde_json::from_str(&ask(&["capacity", "-o", "json"])?)?;
    let patterns: Vec<&Value> =
        capacity["limits"].as_array().into_iter().flatten().map(|limit| &limit["match"]).collect();
    ensure!(patterns == ["vm/*"], "a limit under which it sees nothing: {capacity}");
    let list: Value = serde_json::from_str(&ask(&["usage", "-o", "json"])?)?;
    let names: Vec<&Value> = list["items"].as_array().into_iter().flatten().map(|item| &item["ref"]).collect();
    ensure!(names == ["vm/web"], "{list}");
    ensure!(list["items"][0]["cpu"]["rate"].as_f64().is_some_and(|rate| (rate - 1.5).abs() < 0.15), "{list}");
    let hidden = agentd.ctl_command()?.args(["usage", "vm/db"]).uid(nobody.uid.as_raw()).output()?;
    ensure!(hidden.status.code() == Some(6), "{hidden:?}");
    Ok(())
}
